"""The demo and the tuning, end to end on a few steps; the command line."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from coarse_train.experiments.methods import CROSS_ENTROPIES, METHODS
from coarse_train.experiments.tune import TRIALS, TuneConfig, chosen_settings, run_tune, used, write_json

from coarse_train.cli import main
from coarse_train.experiments.demo import DemoConfig, run_demo
from coarse_train.experiments.report import verdict
from coarse_train.simulate import PRESETS

TINY = DemoConfig(steps=4, batch_size=4, evaluations=2, max_train=24, max_test=12)
HERE = Path(__file__).resolve().parents[1]


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(x) for x in value.values())
    if isinstance(value, list):
        return all(_finite(x) for x in value)
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_demo_writes_results_and_figure(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "demo"
    run_demo(replace(TINY, task=task, out=out))
    results = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == list(METHODS)
    for row in results["rows"]:
        assert 0 <= row["miou"] <= row["miou_best"] <= 100
        assert row["seconds"] > 0
        assert (row["cm_error"] is not None) == row["method"].startswith("coarse")
    assert results["seed"] == 0
    assert results["preset"]["name"] == task
    assert 0 < results["cm_error"] < 1
    assert results["backend"] in ("reference", "cpu")
    assert set(results["config"]["settings"]) == set(METHODS)
    assert results["config"]["selection"]
    scores = {row["method"]: row["miou"] for row in results["rows"]}
    assert results["lead"] == pytest.approx(scores["coarse_both"] - max(scores[m] for m in CROSS_ENTROPIES), abs=0.01)
    assert _finite(results)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(path.name for path in out.iterdir()) == ["figure.png", "results.json"]
    printed = capsys.readouterr().out
    assert all(method in printed for method in METHODS)
    assert verdict(results) in printed


def test_equal_seeds_give_equal_numbers(tmp_path: Path) -> None:
    first, second = (run_demo(replace(TINY, steps=3, out=tmp_path / name)) for name in "ab")
    for results in (first, second):
        for row in results["rows"]:  # type: ignore[attr-defined]
            del row["seconds"]
        del results["config"]["out"]  # type: ignore[attr-defined]
    assert first == second


@pytest.mark.parametrize(
    ("lead", "words"),
    [(12.0, "12.0 points above .* as expected"), (3.0, "3.0 points above .*NOT"), (-2.0, "2.0 points BELOW .*NOT")],
)
def test_the_verdict_says_so_also_where_it_is_not_ahead(lead: float, words: str) -> None:
    sentence = verdict({"lead": lead, "expected_lead": 8.0, "best_cross_entropy": "ce_both"})
    import re

    assert re.search(words, sentence)


def test_bad_input_is_one_line_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "train-images-idx3-ubyte").write_bytes(b"not idx at all")
    (empty / "train-labels-idx1-ubyte").write_bytes(b"")
    for arguments, message in (
        (["--data", str(tmp_path / "nowhere")], "data: expected train-images-idx3-ubyte"),
        (["--data", str(empty)], f"{empty}/train-images-idx3-ubyte: expected an IDX file"),
        (["--task", "ternary"], "task: expected one of ('multiclass', 'binary'), got 'ternary'"),
        (["--steps", "0"], "steps: expected a number >= 1, got 0"),
        (["--backend", "quantum"], "backend: expected one that can run here"),
    ):
        assert main(["demo", "--out", str(out), *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()


def test_an_out_folder_that_cannot_be_written_stops_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert main(["demo", "--out", str(blocked / "demo"), "--max-train", "24", "--max-test", "12"]) == 1
    assert "out: expected a folder that can be written" in capsys.readouterr().err


def test_write_json_leaves_the_old_file_where_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"good": 1})
    with pytest.raises(TypeError):
        write_json(path, {"bad": object()})
    assert json.loads(path.read_text()) == {"good": 1}


def test_command_line_as_a_module() -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-m", "coarse_train", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    assert "tune-demo" in done.stdout


@pytest.mark.parametrize("command", ["demo", "tune-demo"])
def test_command_line_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--task", "--data", "--seed", "--out"))


def test_tuning_gives_every_method_the_same_number_of_trials() -> None:
    for group in TRIALS.values():
        assert set(group) == set(METHODS)
        assert len({len(settings) for settings in group.values()}) == 1
        for settings in group.values():
            assert len(set(settings)) == len(settings)


def test_tune_writes_every_trial(tmp_path: Path) -> None:
    trials = {method: group[:2] for method, group in TRIALS["multiclass"].items()}
    chosen = ("ce_both", "coarse_both")
    path = run_tune(TuneConfig(steps=2, out=tmp_path, methods=chosen, max_train=24), trials)
    table = json.loads(path.read_text())
    assert [row["method"] for row in table["trials"]] == ["ce_both"] * 2 + ["coarse_both"] * 2
    for method in chosen:
        scores = [row["validation_miou"] for row in table["trials"] if row["method"] == method]
        assert table["chosen"][method]["validation_miou"] == max(scores)


def test_the_demo_uses_what_tuning_chose() -> None:
    """The committed table has equally many trials for every method, and the demo takes the best of each."""
    table = json.loads((HERE / "coarse_train" / "experiments" / "tuned_multiclass.json").read_text())
    settings, selection = chosen_settings("multiclass")
    assert "TRUE MASKS" in selection
    counts = {method: [row["method"] for row in table["trials"]].count(method) for method in METHODS}
    assert len(set(counts.values())) == 1
    for method in METHODS:
        top = max((row for row in table["trials"] if row["method"] == method), key=lambda row: row["validation_miou"])
        assert used(method, settings[method]) == {
            k: v for k, v in top.items() if k not in ("method", "validation_miou")
        }


@pytest.mark.parametrize("task", list(PRESETS))
def test_every_task_has_settings_for_every_row(task: str) -> None:
    assert set(chosen_settings(task)[0]) == set(METHODS)
