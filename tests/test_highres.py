"""`make highres`: what is measured, what is computed, and that both steps do the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import highres
from coarse_kernels import Drawings, Objective, annotation_objective


def test_both_steps_compute_the_same_and_the_table_says_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(highres, "measure", highres.step)  # in this process: a fraction of a second
    out = tmp_path / "highres.md"
    assert highres.main(["--height", "128", "--width", "256", "--classes", "3", "--steps", "1", "--out", str(out)]) == 0
    text = out.read_text()
    expected = [
        f"| {matrices} | {kind} | {size} |"
        for matrices in ("positives", "both")
        for size in ("128x256", "64x128", "32x64", "16x32")
        for kind in ("ours", "published")
    ]
    rows = [line for line in text.splitlines() if "measured" in line]
    assert [row[: len(start)] for row, start in zip(rows, expected, strict=True)] == expected
    assert "within 8 GB" in capsys.readouterr().out


@pytest.mark.parametrize("matrices", highres.MATRICES)
def test_our_step_is_one_call_of_the_operator(matrices: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(seg_logits: Tensor, drawings: list[Drawings], **options: Any) -> Objective:
        fields = [None if kind.cm_logits is None else tuple(kind.cm_logits.shape[3:]) for kind in drawings]
        calls.append((tuple(seg_logits.shape[2:]), fields))
        return annotation_objective(seg_logits, drawings, **options)

    monkeypatch.setattr("coarse_kernels.annotation_objective", spy)
    highres.step(matrices, "ours", 64, 96, 3, 1)  # and one that warms up
    field_of_negatives = None if matrices == "positives" else (8, 12)
    assert calls == [((16, 24), [(8, 12), field_of_negatives])] * 2


def test_a_step_in_a_process_of_its_own() -> None:
    found = highres.measure("positives", "ours", 32, 64, 3, 1)
    assert 1e8 < found["peak"] < 4e9
    assert found["seconds"] > 0


def _fake(matrices: str, kind: str, height: int, width: int, classes: int, steps: int) -> dict[str, float]:
    return {"peak": 1e9 + 1000.0 * height * width if kind == "published" else 2e9, "seconds": 1.0, "loss": 1.0}


def test_what_does_not_fit_is_computed_from_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highres, "measure", _fake)
    monkeypatch.setattr(highres, "free_bytes", lambda: 1.6e9)
    rows = highres.compare("positives", 1024, 2048, 19, 1)
    whole = next(row for row in rows if row["step"] == "published")
    assert (whole["size"], whole["how"]) == ("1024x2048", "computed")
    assert whole["peak"] == pytest.approx(1e9 + 1000.0 * 1024 * 2048)
    assert "not run" in highres.table(rows)


def test_steps_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_loss(matrices: str, kind: str, *size: Any) -> dict[str, float]:
        return {**_fake(matrices, kind, *size), "loss": 1.0 if kind == "ours" else 1.1}

    monkeypatch.setattr(highres, "measure", other_loss)
    with pytest.raises(RuntimeError, match=r"128x256, matrices on both: the losses differ, 1.0 and 1.1"):
        highres.compare("both", 1024, 2048, 19, 1)


def test_a_step_that_needs_too_much_is_no_success(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(highres, "measure", lambda *order: {"peak": 9e9, "seconds": 1.0, "loss": 1.0})
    assert highres.main(["--out", str(tmp_path / "out.md")]) == 1
    assert "9.00" in (tmp_path / "out.md").read_text()
