"""The demo, a table of configs, end to end on a few steps; the command line."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coarse_train.cli import main
from coarse_train.config import FitConfig, from_dict
from coarse_train.data.mnist import PROCESSES
from coarse_train.experiments.demo import CROSS_ENTROPIES, TRIALS, TUNED, DemoConfig, conclude, rows_of, run_demo
from coarse_train.experiments.table import Cell, Summary, digest, run_table, text

TINY = DemoConfig(steps=4, limit=24, jobs=1)
HERE = Path(__file__).resolve().parents[1]


def cell(row: str, seed: int, miou: float, **more: Any) -> Cell:
    known = {"miou_validation": None, "miou_best": None, "seconds": 1.0, "iou": {}, "cm_error": None, "believed": None}
    return Cell(row, seed, miou, **{**known, "observed": None, "reads": "scores", "folder": "", **more})


def _finite(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_finite(x) for x in value.values())
    if isinstance(value, list):
        return all(_finite(x) for x in value)
    return not isinstance(value, float) or math.isfinite(value)


@pytest.mark.parametrize("task", ["majority", "binary"])
def test_demo_writes_results_and_figure(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "demo"
    config = replace(TINY, task=task, out=out)
    if task == "binary":
        config = replace(config, rows=("ce_both", "coarse_both"))
    cells = run_demo(config)
    results = json.loads((out / "results.json").read_text())
    names = list(config.rows or rows_of(task))
    assert [row["method"] for row in results["rows"]] == names
    for row in results["rows"]:
        assert 0 <= row["miou"] <= 100
        assert row["miou_validation"] <= row["miou_best"] <= 100
        assert row["seconds"] > 0
        assert (row["cm_error"] is not None) == row["method"].startswith("coarse")
        assert ("masks" in row["reads"]) == (row["method"] == "supervised")
        assert set(row["iou"]) == {"background", *(("digit",) if task == "binary" else "0347")}
    assert {row: from_dict({k: v for k, v in c.items() if v is not None}) for row, c in results["configs"].items()}
    assert results["task"] == task
    assert "validation" in results["tuned"]
    assert results["conclusion"] == conclude(cells)
    assert _finite(results)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert results["conclusion"][0] in printed


def test_a_table_goes_on_where_it_was_and_shares_rows(tmp_path: Path) -> None:
    row = replace(rows_of("hasty")["ce_both"], steps=2)
    row = replace(row, data=replace(row.data, limit=16))
    said: list[str] = []
    (first,) = run_table({"one": row}, (0,), tmp_path, jobs=1, said=said.append)
    kept = Path(first.folder) / "test.json"
    written = kept.stat().st_mtime_ns
    again = run_table({"another name": row, "more": replace(row, steps=3)}, (0,), tmp_path, jobs=1, said=said.append)
    assert kept.stat().st_mtime_ns == written
    assert (again[0].method, again[0].miou, again[0].folder) == ("another name", first.miou, first.folder)
    assert again[1].folder != first.folder
    kept.unlink()  # as a run that was killed before it was scored
    (last,) = run_table({"one": row}, (0,), tmp_path, jobs=1, said=said.append)
    assert last.miou == first.miou
    assert len(said) == 4


def test_equal_seeds_give_equal_numbers_in_any_number_of_processes(tmp_path: Path) -> None:
    row = replace(rows_of("majority")["coarse_both"], steps=3)
    row = replace(row, data=replace(row.data, limit=16))
    tables = [
        run_table({"row": row}, (0, 1), tmp_path / str(jobs), jobs=jobs, said=lambda line: None) for jobs in (1, 2)
    ]
    for one, two in zip(*tables, strict=True):
        assert replace(one, seconds=0, folder="") == replace(two, seconds=0, folder="")
    assert tables[0][0].miou != tables[0][1].miou


def test_what_changes_no_score_changes_no_folder() -> None:
    config = FitConfig()
    same = replace(config, out=Path("elsewhere"), threads=3, backend="reference", save_every=7, resume=True)
    assert digest(config) == digest(same)
    for other in (replace(config, seed=1), replace(config, steps=7), rows_of("hasty")["ce_both"]):
        assert digest(config) != digest(other)


def test_rows_share_everything_but_what_they_are_about() -> None:
    for task in PROCESSES:
        rows = rows_of(task)
        assert set(CROSS_ENTROPIES) | {"coarse_positive", "coarse_both", "supervised"} == set(rows)
        for config in rows.values():
            same = ("model", "optim", "steps", "batch_size", "seed", "accumulate", "precision")
            assert all(getattr(config, name) == getattr(rows["supervised"], name) for name in same)
            assert config.data.variant == task
            assert config.select_with == 0
        assert all(rows[name].positive.cm == rows[name].negative.cm == "none" for name in CROSS_ENTROPIES)
        assert rows["ce_both_textbook"].transition == "uniform"
        assert TUNED[task] in TRIALS


def test_no_row_but_supervised_reads_masks() -> None:
    for name, config in rows_of("majority").items():
        assert (config.data.supervision == "masks") == (name == "supervised")
        assert config.data.simulate is None


@pytest.mark.parametrize(
    ("score", "words"), [(90.0, "12.0 points above the tuned"), (70.0, "8.0 points BELOW the tuned")]
)
def test_the_conclusion_says_so_also_where_it_is_not_ahead(score: float, words: str) -> None:
    cells = [cell("ce_both", 0, 78.0), cell("coarse_both", 0, score, cm_error=0.02)]
    first, last = conclude(cells)
    assert words in first
    assert "0.020" in last
    assert conclude([cell("supervised", 0, 95.0)]) == []


def test_the_printed_table_has_every_seed_their_mean_and_spread() -> None:
    cells = [cell("a", 0, 80.0), cell("a", 1, 84.0), cell("longer", 0, 60.0, miou_best=61.0), cell("longer", 1, 61.0)]
    lines = text(cells, "test").splitlines()
    assert re.split(r"\s+", lines[0]) == [
        "row",
        "seed",
        "0",
        "seed",
        "1",
        "mean",
        "spread",
        "best",
        "CM",
        "error",
        "seconds",
    ]
    assert re.split(r"\s+", lines[1]) == ["a", "80.0", "84.0", "82.0", "4.0", "-", "-", "1"]
    assert re.split(r"\s+", lines[2])[:6] == ["longer", "60.0", "61.0", "60.5", "1.0", "61.0"]
    assert Summary.of(cells, "a") == Summary(82.0, 4.0)


def test_tuning_tries_every_setting_on_the_validation_canvases(tmp_path: Path) -> None:
    cells = run_demo(replace(TINY, steps=1, tune=True, out=tmp_path))
    assert len(cells) == len(TRIALS)
    results = json.loads((tmp_path / "tuning.json").read_text())
    best = max(cells, key=lambda cell: cell.miou).method
    assert results["conclusion"] == [f"majority: best of {len(TRIALS)}: {best}"]
    assert all(cell.miou == cell.miou_validation for cell in cells)


def test_bad_input_is_one_line_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        (["--task", "ternary"], "task: expected one of ('majority', 'hasty', 'binary'), got 'ternary'"),
        (["--steps", "0"], "steps: expected a number >= 1, got 0"),
        (["--seeds", "1", "1"], "seeds: expected some different numbers, got (1, 1)"),
        (["--rows", "ce_all"], "rows: expected some of ('ce_positive',"),
        (["--backend", "quantum"], "backend: expected one that can run here"),
    ):
        assert main(["demo", "--out", str(out), *arguments]) == 1
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert main(["demo", "--out", str(out), "--data", str(tmp_path / "nowhere"), "--jobs", "1"]) == 1
    assert "data: expected train-images-idx3-ubyte" in capsys.readouterr().err


def test_an_out_folder_that_cannot_be_written_stops_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    assert main(["demo", "--out", str(blocked / "demo")]) == 1
    assert "out: expected a folder that can be written" in capsys.readouterr().err


def test_command_line_as_a_module() -> None:
    environment = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(
        [sys.executable, "-m", "coarse_train", "--help"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_command_line_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert all(option in printed for option in ("--task", "--data", "--seeds", "--out", "--tune"))
