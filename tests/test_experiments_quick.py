"""`coarse-train experiment NAME --quick`, as the pages show it, where there is no data but what comes along."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from coarse_train.cli import main
from coarse_train.experiments.experiment import EXPERIMENTS, ExperimentConfig, Name, quick


@pytest.mark.slow
@pytest.mark.parametrize("name", get_args(Name))
def test_every_experiment_runs_in_a_fresh_clone_and_reports(
    name: Name, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["experiment", name, "--quick", "--jobs", "1", "--out", str(tmp_path)]) == 0
    module = import_module(f"coarse_train.experiments.{EXPERIMENTS[name]}")
    report = (tmp_path / "report.md").read_text()
    assert module.QUESTION in report
    assert report in capsys.readouterr().out
    assert f"`coarse-train experiment {name} --seeds 0 --quick`" in report
    assert "Its figures mean nothing" in report
    written = json.loads((tmp_path / "results.json").read_text())
    assert (written["experiment"], written["quick"]) == (name, True)
    parts = [quick(part) for part in module.parts(ExperimentConfig(name, quick=True, out=tmp_path / "again"))]
    assert [row["method"] for row in written["rows"]] == [
        f"{part.title} | {row}" for part in parts for row in part.rows
    ]
    tuned = {part.title: {row for row, one in part.rows.items() if isinstance(one, Mapping)} for part in parts}
    chosen = {title: {*settings} for title, settings in written["tuned"].items()}
    assert chosen == {title: rows for title, rows in tuned.items() if rows}
    assert ("1 setting a row: " in report) == any(tuned.values())
    assert all(math.isfinite(row["miou"]) and row["seed"] == 0 for row in written["rows"])
    assert written["conclusion"]
    assert all(f"- {sentence}" in report for sentence in written["conclusion"])
    for title, settings in written["tuned"].items():
        assert f"## {title}\n" in report
        assert all(f"{row}: {setting}" in report for row, setting in settings.items())
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "made-up").is_dir() == (name == "annotators")
