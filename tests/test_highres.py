"""`make highres`: what is measured, what is computed, and that both steps do the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import highres


def test_both_steps_compute_the_same_and_the_table_says_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(highres, "measure", highres.step)  # in this process: a fraction of a second
    out = tmp_path / "highres.md"
    assert highres.main(["--height", "128", "--width", "256", "--classes", "3", "--steps", "1", "--out", str(out)]) == 0
    text = out.read_text()
    for size in ("16x32", "32x64", "64x128", "128x256"):
        for kind in ("ours", "published"):
            assert f"| {kind} | {size} |" in text
    assert text.count("| measured |") == 8
    assert "within 8 GB" in capsys.readouterr().out


def test_a_step_in_a_process_of_its_own() -> None:
    found = highres.measure("ours", 32, 64, 3, 1)
    assert 1e8 < found["peak"] < 4e9
    assert found["seconds"] > 0


def _fake(kind: str, height: int, width: int, classes: int, steps: int) -> dict[str, float]:
    return {"peak": 1e9 + 1000.0 * height * width if kind == "published" else 2e9, "seconds": 1.0, "loss": 1.0}


def test_what_does_not_fit_is_computed_from_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highres, "measure", _fake)
    monkeypatch.setattr(highres, "free_bytes", lambda: 1.6e9)
    rows = highres.compare(1024, 2048, 19, 1)
    last = [row for row in rows if row["step"] == "published"][-1]
    assert last["how"] == "computed"
    assert last["peak"] == pytest.approx(1e9 + 1000.0 * 1024 * 2048)
    assert "not run" in highres.table(rows)


def test_steps_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_loss(kind: str, *size: Any) -> dict[str, float]:
        return {**_fake(kind, *size), "loss": 1.0 if kind == "ours" else 1.1}

    monkeypatch.setattr(highres, "measure", other_loss)
    with pytest.raises(RuntimeError, match=r"128x256: the losses differ, 1.0 and 1.1"):
        highres.compare(1024, 2048, 19, 1)


def test_a_step_that_needs_too_much_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highres, "measure", lambda *order: {"peak": 9e9, "seconds": 1.0, "loss": 1.0})
    assert highres.main(["--out", str(tmp_path / "out.md")]) == 1
    assert "9.00" in (tmp_path / "out.md").read_text()
