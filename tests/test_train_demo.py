"""The demo, a table of configs, end to end on a few steps; the command line."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coarse_train.cli import main
from coarse_train.config import DataConfig, FitConfig, from_dict
from coarse_train.data.mnist import PROCESSES
from coarse_train.experiments import cell as cells_of
from coarse_train.experiments import table
from coarse_train.experiments.cell import Cell, read_scores, write_scores
from coarse_train.experiments.demo import TUNED, DemoConfig, conclude, rows_of, run_demo, trials
from coarse_train.experiments.table import Summary, by_class, digest, run_table, text

from .data_trees import write_folder_tree

TINY = DemoConfig(steps=4, limit=24, jobs=1)
CROSS_ENTROPIES = ("ce_positive", "ce_negative", "ce_both_textbook", "ce_both_untuned", "ce_both")
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


def _as_run(config: FitConfig) -> FitConfig:
    return replace(config, steps=4, data=replace(config.data, limit=24))


def test_every_class_has_its_name_and_its_mean_over_the_seeds() -> None:
    cells = [cell("method", seed, 0.0, iou={"background": 90.0 + 4 * seed, "seven": None}) for seed in (0, 1)]
    assert by_class(cells) == "IoU by class  background   seven\nmethod              92.0       -"


@pytest.mark.slow
@pytest.mark.parametrize("task", ["majority", "binary"])
def test_demo_writes_results_and_figure(tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "demo"
    config = replace(TINY, task=task, out=out)
    if task == "binary":
        config = replace(config, rows=("ce_both_textbook", "ce_both", "coarse_both"))  # the first two may be equal
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
        as_run = replace(_as_run(rows_of(task)[row["method"]]), seed=row["seed"], out=Path(row["folder"]))
        assert from_dict(row["config"]) == as_run
    assert results["task"] == task
    assert "validation" in results["tuned"]
    assert results["conclusion"] == conclude(cells)
    assert _finite(results)
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)
    assert results["conclusion"][0] in printed


@pytest.mark.slow
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


@pytest.mark.slow
def test_scores_go_to_another_machine_in_one_file_and_are_not_trained_again(tmp_path: Path) -> None:
    row = replace(rows_of("hasty")["ce_both"], steps=2)
    row = replace(row, data=replace(row.data, limit=16))
    here, there, said = tmp_path / "here", tmp_path / "there", []
    first = run_table({"one": row}, (0, 1), here, jobs=1, said=lambda line: None)
    write_scores(here)
    scores = here / "cells.json"
    there.mkdir()
    shutil.copy(scores, there)
    known = read_scores(there / "cells.json")
    again = run_table({"one": row}, (0,), there, jobs=1, known=known, said=said.append)
    assert replace(again[0], folder="") == replace(first[0], folder="")
    assert (said, (there / "cells").exists()) == ([], False)
    longer = replace(row, steps=3)
    run_table({"longer": longer}, (0,), there, jobs=1, known=known, said=said.append)
    write_scores(there)
    assert read_scores(there / "cells.json").keys() == {*known, digest(replace(longer, seed=0, threads=1))}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("{", "Expecting property name"),
        ("[]", "has no attribute"),
        ('{"0123": []}', "expected a mapping"),
        ('{"0123": {"val": {"miou": 3}}}', "method"),
        ('{"0123": {"val": CELL}}', "a miou that is no number"),
    ],
)
def test_scores_that_are_none_are_named(content: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "cells.json"
    path.write_text(content.replace("CELL", json.dumps(asdict(cell("row", 0, float("nan"))))))
    with pytest.raises(ValueError, match=rf"cells.json: expected the scores of an earlier table, got .*({what})"):
        read_scores(path)


@pytest.fixture
def other_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_equal_seeds_give_equal_numbers_in_any_number_of_processes(tmp_path: Path, other_threads: None) -> None:
    """Whatever number of threads PyTorch has in this one."""
    row = replace(rows_of("majority")["coarse_both"], steps=3)
    row = replace(row, data=replace(row.data, limit=16))
    tables = [
        run_table({"row": row}, (0, 1), tmp_path / str(jobs), jobs=jobs, said=lambda line: None) for jobs in (1, 2)
    ]
    for one, two in zip(*tables, strict=True):
        assert replace(one, seconds=0, folder="") == replace(two, seconds=0, folder="")
    assert tables[0][0].miou != tables[0][1].miou


@pytest.mark.slow
def test_rows_that_are_equal_are_trained_once_whatever_runs_beside_them(tmp_path: Path) -> None:
    row = _as_run(rows_of("majority")["coarse_both"])
    said: list[str] = []
    cells = run_table({"one": row, "same": row}, (0, 1), tmp_path, jobs=4, said=said.append)
    assert [(cell.method, cell.seed) for cell in cells] == [("one", 0), ("one", 1), ("same", 0), ("same", 1)]
    assert cells[0].folder == cells[2].folder
    assert cells[0].miou == cells[2].miou
    assert sorted(line.split(":")[0] for line in said) == ["one, same, seed 0", "one, same, seed 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": {}}, "rows: expected at least one"),
        ({"seeds": ()}, r"seeds: expected some different numbers, got \(\)"),
        ({"seeds": (0, 0)}, r"seeds: expected some different numbers, got \(0, 0\)"),
        ({"jobs": 0}, "jobs: expected a number >= 1, got 0"),
    ],
)
def test_a_table_of_nothing_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {"rows": {"row": FitConfig()}, "seeds": (0,), "out": tmp_path / "out", **changes}
    with pytest.raises(ValueError, match=message):
        run_table(**arguments)
    assert not (tmp_path / "out").exists()


def test_what_changes_no_score_changes_no_folder() -> None:
    config = rows_of("hasty")["coarse_both"]
    assert digest(config) == digest(replace(config, out=Path("elsewhere"), save_every=7, resume=True))
    for other in (replace(config, seed=1), replace(config, threads=3), replace(config, backend="reference")):
        assert digest(config) != digest(other)


def test_other_drawings_under_the_same_name_are_another_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = rows_of("hasty")["coarse_both"]
    before = digest(config)
    monkeypatch.setitem(PROCESSES, "hasty", PROCESSES["majority"])
    table._content.cache_clear()
    assert digest(config) != before
    matrix = tmp_path / "m.npy"
    np.save(matrix, np.full((5, 5), 0.25) - np.eye(5) / 4)
    from_file = digest(replace(config, transition=matrix))
    np.save(matrix, np.roll(np.eye(5), 1, 1))
    assert digest(replace(config, transition=matrix)) != from_file
    table._content.cache_clear()


@pytest.mark.slow
def test_an_error_in_one_row_trains_no_row_that_has_not_begun(tmp_path: Path) -> None:
    row = _as_run(rows_of("hasty")["ce_both"])
    said: list[str] = []
    bad = replace(row, model=replace(row.model, network="nowhere:nothing"))
    rows = {"bad": bad, **{f"row {k}": replace(row, steps=k) for k in range(2, 7)}}
    with pytest.raises(ValueError, match=r"network: expected package\.module:name that can be imported"):
        run_table(rows, (0,), tmp_path, jobs=2, said=said.append)
    assert said[-1] == "bad, seed 0: failed"
    assert 1 <= len(list(tmp_path.glob("cells/*/test.json"))) < 5


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_table_that_is_stopped_leaves_no_process_behind(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "coarse_train", "demo", "--jobs", "2", "--out", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    heard = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # what runs in the background may have it ignored
    table_process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=heard
    )
    try:
        _until(lambda: len(list(tmp_path.glob("demo/cells/*/metrics.jsonl"))) == 2)
        children = _children(table_process.pid)
        assert len(children) >= 2
    finally:
        table_process.send_signal(how)
        table_process.wait(60)
    _until(lambda: not any(_alive(child) for child in children))


class _Pool:
    """In the place of a `ProcessPoolExecutor`: each run has ended when it is handed in, with the next outcome."""

    def __init__(self, outcomes: list[Cell | BaseException]):
        self.outcomes = iter(outcomes)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, *_: object) -> Future[Cell]:
        outcome = next(self.outcomes)
        if isinstance(outcome, BaseException):
            raise outcome
        future: Future[Cell] = Future()
        future.set_result(outcome)
        return future


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the table does with its processes."""
    calls: list[str] = []
    monkeypatch.setattr(table, "_end", lambda processes: calls.append("ended"))
    return calls


def _three_rows() -> dict[str, FitConfig]:
    row = _as_run(rows_of("hasty")["ce_both"])
    return {f"row {k}": replace(row, steps=k) for k in (2, 3, 4)}


def test_a_pool_that_breaks_as_the_next_run_is_handed_in_is_told_as_any_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: list[str]
) -> None:
    """A process was killed while the table wrote a line: a traceback of the pool's came, and its other processes stayed."""
    pool = _Pool([cell("", 0, 50.0), cell("", 0, 60.0), BrokenProcessPool("abruptly")])
    monkeypatch.setattr(table, "ProcessPoolExecutor", lambda *_, **__: pool)
    with pytest.raises(ChildProcessError, match="a process of the table ended by itself"):
        run_table(_three_rows(), (0,), tmp_path, jobs=2, said=lambda _: None)
    assert ended == ["ended"]


def test_ctrl_c_while_the_table_writes_a_line_ends_its_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ended: list[str]
) -> None:
    """They trained on, and it waited for them."""
    pool = _Pool([cell("", 0, 50.0) for _ in range(3)])
    monkeypatch.setattr(table, "ProcessPoolExecutor", lambda *_, **__: pool)

    def said(_: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_table(_three_rows(), (0,), tmp_path, jobs=2, said=said)
    assert ended == ["ended"]


@pytest.mark.slow
@pytest.mark.parametrize("again", [False, True], ids=["waited for", "Ctrl-C again"])
def test_a_process_that_does_not_hear_is_killed_in_the_end(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Event()
    deaf = spawn.Process(target=_deaf, args=(ready,))
    deaf.start()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have it ignored
    try:
        assert ready.wait(90)
        monkeypatch.setattr(table, "_GRACE", 60.0 if again else 0.2)
        if again:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt) if again else nullcontext():
            table._end([deaf])
        deaf.join(20)
        assert deaf.exitcode == -signal.SIGKILL
    finally:
        signal.signal(signal.SIGINT, before)
        deaf.kill()


def _deaf(ready: Event) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready.set()
    time.sleep(600)


@pytest.mark.slow
def test_a_table_whose_process_is_killed_says_so_and_ends(tmp_path: Path) -> None:
    """For want of memory, say. The other one, in the middle of a run, takes its SIGTERM for a wish to stop after the step, and
    waited for another run then, for ever."""
    command = [sys.executable, "-m", "coarse_train", "demo", "--jobs", "2", "--out", str(tmp_path / "demo")]
    environment = {**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as table:
        try:
            _until(lambda: sum(path.stat().st_size > 0 for path in tmp_path.glob("demo/cells/*/metrics.jsonl")) == 2)
            trains = [pid for pid in _children(table.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
            assert len(trains) == 2
            os.kill(trains[0], signal.SIGKILL)
            said, _ = table.communicate(timeout=90)
        finally:
            table.kill()
    assert table.returncode == 1
    assert "a process of the table ended by itself" in said
    assert not any(_alive(child) for child in trains)
    assert len(list(tmp_path.glob("demo/cells/*/last.pt"))) >= 1  # of the other one


def _until(reached: Callable[[], bool], seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.1)


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.slow
def test_a_damaged_cell_is_named(tmp_path: Path) -> None:
    row = _as_run(rows_of("hasty")["ce_both"])
    (first,) = run_table({"one": row}, (0,), tmp_path, jobs=1, said=lambda line: None)
    (Path(first.folder) / "test.json").write_text("")
    with pytest.raises(
        ValueError, match=r"test\.json: expected a cell of a table, got .*; without the file it is scored"
    ):
        run_table({"one": row}, (0,), tmp_path, jobs=1, said=lambda line: None)


def test_a_split_without_masks_is_refused_before_the_first_step(tmp_path: Path) -> None:
    root = write_folder_tree(tmp_path / "data")
    shutil.rmtree(root / "test" / "masks")
    row = FitConfig(data=DataConfig(dataset="folder", root=root))
    with pytest.raises(ValueError, match=r"split: expected dense masks in 'test' to score with, got none for "):
        run_table({"row": row}, (0,), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seconds_of_a_run_that_was_interrupted_are_those_of_its_parts() -> None:
    assert cells_of._seconds([1.0, 2.0, 3.0]) == 3.0
    assert cells_of._seconds([1.0, 2.0, 0.5, 4.0]) == 6.0
    assert cells_of._seconds([]) == 0.0


def test_rows_share_everything_but_what_they_are_about() -> None:
    for task in TUNED:
        rows = rows_of(task)
        assert set(CROSS_ENTROPIES) | {"coarse_positive", "coarse_both", "supervised"} == set(rows)
        for config in rows.values():
            same = ("model", "optim", "steps", "batch_size", "seed", "accumulate", "precision")
            assert all(getattr(config, name) == getattr(rows["supervised"], name) for name in same)
            assert config.data.variant == task
            assert config.select_with == 0
        assert all(rows[name].positive.cm == rows[name].negative.cm == "none" for name in CROSS_ENTROPIES)
        assert rows["ce_both_textbook"].transition == "uniform"
        assert TUNED[task] in trials(task)


def test_no_row_but_supervised_reads_masks() -> None:
    for name, config in rows_of("majority").items():
        assert (config.data.supervision == "masks") == (name == "supervised")
        assert config.data.simulate is None


@pytest.mark.parametrize(
    ("miou", "words"), [(90.0, "both holds: +12.0 points"), (70.0, "both does NOT hold: -8.0 points")]
)
def test_the_conclusion_says_so_also_where_it_is_not_ahead(miou: float, words: str) -> None:
    cells = [cell("ce_both", 0, 78.0), cell("coarse_both", 0, miou, cm_error=0.02)]
    first, last = conclude(cells)
    assert words in first
    assert "0.020" in last
    assert conclude([cell("supervised", 0, 95.0)]) == []


@pytest.mark.slow
def test_tasks_have_folders_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for task in ("majority", "binary"):
        run_demo(replace(TINY, task=task, rows=("ce_both",), steps=1))
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("results.json")) == [
        "runs/demo/results.json",
        "runs/demo_binary/results.json",
    ]


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


@pytest.mark.slow
@pytest.mark.parametrize("task", TUNED)
def test_tuning_tries_every_setting_on_the_validation_canvases(tmp_path: Path, task: str) -> None:
    cells = run_demo(replace(TINY, steps=1, tune=True, task=task, out=tmp_path))
    assert len(cells) == len(trials(task)) == (4 if task == "binary" else 12)
    results = json.loads((tmp_path / "tuning.json").read_text())
    best = max(cells, key=lambda cell: cell.miou).method
    assert results["conclusion"] == [f"{task}: best of {len(cells)}: {best}"]
    assert all(cell.miou == cell.miou_validation for cell in cells)


def test_bad_input_is_one_line_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for arguments, message in (
        (["--task", "ternary"], "task: expected one of ('majority', 'hasty', 'binary'), got 'ternary'"),
        (["--steps", "0"], "steps: expected a number >= 1, got 0"),
        (["--seeds", "1", "1"], "seeds: expected some different numbers, got (1, 1)"),
        (["--rows", "ce_all"], "rows: expected some of ('ce_positive',"),
        (
            ["--rows", "ce_both", "--tune"],
            "rows: expected none with --tune, which has rows of its own, got ('ce_both',)",
        ),
        (["--seeds", "-1"], "seed: expected a number from 0 to"),
        (["--data", str(tmp_path / "nowhere")], "data: expected t10k-images-idx3-ubyte"),
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
    assert main(["demo", "--out", str(blocked / "demo")]) == 1
    assert "out: expected a folder that can be written" in capsys.readouterr().err


@pytest.mark.slow
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
