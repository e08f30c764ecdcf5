"""`make bench-step`: what is measured, what is computed, and that all steps do the same."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks import step, tables
from benchmarks.problem import parse
from benchmarks.step import GB, Line, Measured
from coarse_kernels import Drawings, Objective, annotation_objective

SMALL = ("c3 128x256 seg4 cm8 positive+trusted fresh", "c3 128x256 seg4 cm8 positive+negative fresh")


@pytest.mark.slow
def test_all_steps_compute_the_same_and_the_table_says_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "measure", step.step)  # in this process: a fraction of a second
    assert step.main([*SMALL, "--steps", "1", "--largest", "--no-confirm", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "step.md").read_text()
    expected = [
        f"| `{parse(line.replace('128x256', size))}` | {name}"
        for line, plain in zip(SMALL, ("closed_form_matmul |", "closed_form_uniform_matmul |"), strict=True)
        for size in ("128x256", "64x128", "32x64", "16x32")
        for name in ("cpu: strided", plain, "published |")
    ]
    rows = [line for line in text.splitlines() if line.endswith("| measured |")]
    assert [row[: len(start)] for row, start in zip(rows, expected, strict=True)] == expected
    assert "## The largest image" in text


def test_a_named_problem_is_measured_and_takes_the_place_of_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(step, "measure", _fake)
    monkeypatch.setattr(step, "ROOT", tmp_path)
    assert step.main([SMALL[0]]) == 0
    printed = capsys.readouterr().out
    assert "128x256" in printed
    assert "largest image" not in printed
    assert not list(tmp_path.iterdir())


def test_the_front_page_shows_the_recommended_of_all_steps_that_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second configuration in the results was two rows where one was looked for."""
    kernels = {"ours": "cpu: strided", "plain": "closed_form_matmul", "published": "published"}

    def measured(line: str, name: str, device: str, steps: int) -> Measured:
        both = 1e9 * ("negative" in line)
        found = _fake(line, name, device, steps)
        return found._replace(peak=found.peak + both, seconds=2.0 if both else 1.0, what=kernels[name])

    monkeypatch.setattr(step, "measure", measured)
    monkeypatch.setattr(step, "free_bytes", lambda device: 1e12)
    assert step.main([*step.PROBLEMS, "--largest", "--no-confirm", "--out", str(tmp_path)]) == 0
    *_, ours, plain, published = tables.step(tmp_path)
    assert ours.startswith("| ours | 0.51 GB, 1.0 s | 0.55 GB, 1.0 s | **0.71 GB, 1.0 s** | ")
    assert plain.split(" | ")[1:4] == ["0.51 GB, 1.0 s", "0.55 GB, 1.0 s", "0.71 GB, 1.0 s"]
    assert published.split(" | ")[1:4] == ["1.1 GB, 1.0 s", "1.5 GB, 1.0 s", "3.1 GB, 1.0 s"]


def test_of_two_steps_the_median_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 9.0, 10.0, 11.0, 20.0, 23.0])  # one that warms up, then 1 s and 3 s
    monkeypatch.setattr(step.time, "perf_counter", lambda: next(clock))
    found = step.step("c3 32x64 seg4 cm8 positive+trusted fresh", "reference", "cpu", 2)
    assert (found.seconds, found.least, found.most) == (2.0, 1.0, 3.0)


@pytest.mark.parametrize("line", SMALL)
def test_our_step_is_one_call_of_the_operator(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def spy(seg_logits: Tensor, drawings: list[Drawings], **options: Any) -> Objective:
        fields = [None if kind.cm_logits is None else tuple(kind.cm_logits.shape[3:]) for kind in drawings]
        calls.append((tuple(seg_logits.shape[2:]), fields))
        return annotation_objective(seg_logits, drawings, **options)

    monkeypatch.setattr("coarse_kernels.annotation_objective", spy)
    step.step(line.replace("128x256", "64x96"), "reference", "cpu", 1)  # and one that warms up
    of_negatives = (8, 12) if "negative" in line else None
    assert calls == [((16, 24), [(8, 12), of_negatives])] * 2


@pytest.mark.slow
def test_a_step_in_a_process_of_its_own() -> None:
    found = step.measure("c3 32x64 seg4 cm8 positive+trusted fresh", "reference", "cpu", 1)
    assert 1e8 < found.peak < 4e9
    assert found.seconds > 0


def _fake(line: str, name: str, device: str, steps: int) -> Measured:
    pixels = parse(line).pixels
    peak = 1e9 + 1000.0 * pixels if name == "published" else 5e8 + 100.0 * pixels
    return Measured(peak, 1.0, 0.9, 1.1, 1.0, name)


def test_what_does_not_fit_is_computed_from_what_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "measure", _fake)
    monkeypatch.setattr(step, "free_bytes", lambda device: 1.6e9)
    rows, lines = step.compare(step.PROBLEMS[0], ["ours", "published"], "cpu", 1)
    whole = next(row for row in rows if row["provider"] == "published")
    assert ("1024x2048" in whole["problem"], whole["how"]) == (True, "computed")
    assert whole["peak"] == pytest.approx(1e9 + 1000.0 * 1024 * 2048)
    assert "not run" in "\n".join(step.table(rows))
    assert lines["published"] == pytest.approx(Line(1e9, 1000.0))


def test_the_largest_image_fits_and_is_trained_where_there_is_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step, "measure", _fake)
    monkeypatch.setattr(step, "free_bytes", lambda device: 20e9)
    lines = {"ours": Line(5e8, 100.0), "published": Line(1e9, 1000.0)}
    rows = step.fitting(step.PROBLEMS[0], lines, "cpu", confirm=True)
    assert len(rows) == 2 * len(step.LIMITS_GB)
    for row in rows:
        height, width = map(int, row["size"].split("x"))
        needs = lines[row["provider"]].at(height * width)
        assert needs <= row["limit"] * GB < lines[row["provider"]].at((height + 32) * (width + 64))
        assert height % 32 == width % 32 == 0
        assert width == pytest.approx(2 * height, abs=64)
        assert (row["peak"] == needs) == (row["limit"] < 18)
    text = "\n".join(step.fitting_table(rows))
    assert text.count("computed") == 4
    assert step.exceeded(rows) == []
    rows[0]["peak"] = 1.1 * rows[0]["limit"] * GB
    assert step.exceeded(rows)[0].startswith("ours at ")
    assert all(math.isnan(row["peak"]) for row in step.fitting(step.PROBLEMS[0], lines, "cpu", confirm=False))


def test_steps_that_differ_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def other_loss(line: str, name: str, *more: Any) -> Measured:
        return _fake(line, name, *more)._replace(loss=1.0 if name == "ours" else 1.1)

    monkeypatch.setattr(step, "measure", other_loss)
    with pytest.raises(RuntimeError, match=r"128x256 .* the losses of ours and published differ, 1.0 and 1.1"):
        step.compare(step.PROBLEMS[1], ["ours", "published"], "cpu", 1)


@pytest.mark.parametrize(
    "line",
    [
        "c3 64x64 seg4 labels fresh",
        "c3 64x64 cm8 positive+trusted fresh",
        "c3 64x64 seg4 cm8 positive+trusted bf16 fresh",
    ],
)
def test_a_problem_that_is_no_step(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        step.main([line])
    assert "two kinds of drawings" in capsys.readouterr().err


def test_a_step_that_dies_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(line: str, name: str, device: str, steps: int) -> Measured:
        if name == "published" and parse(line).height > 300:
            raise RuntimeError("ended with status -9")
        return _fake(line, name, device, steps)

    monkeypatch.setattr(step, "measure", dies)
    monkeypatch.setattr(step, "free_bytes", lambda device: 1e12)
    rows, lines = step.compare(step.PROBLEMS[0], ["ours", "published"], "cpu", 1)
    assert [row["how"][:6] for row in rows if row["provider"] == "published"] == ["failed"] * 2 + ["measur"] * 2
    largest = step.fitting(step.PROBLEMS[0], {"published": lines["published"]}, "cpu", confirm=True)
    assert "a step FAILED" in "\n".join(step.fitting_table(largest))
    assert len(step.exceeded(largest)) == len(step.LIMITS_GB)
