"""The GPU benchmark without a GPU: the same pipeline on CPU tensors with a wall clock, and what it does when things go wrong.

Nothing here says anything about a GPU. What only runs on one: `measure.CudaMeter`.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, contestants, gpu, gpu_report, measure, plot, worker
from benchmarks.cases import Case, leaves, make_inputs
from benchmarks.contestants import (
    Contestant,
    DoesNotFit,
    bands,
    errors,
    errors_in_bands,
    make_contestants,
    run_once,
    truth,
    verdict,
)
from benchmarks.gpu_cases import BY_NAME, CASES, SMOKE, TARGET_CASE_NAMES, TARGETS, Target, chosen_contestants

SMALL = (
    Case("pixel", 3, 12, 20, stream="both"),
    Case("stride-4", 3, 32, 40, 4, stream="both"),
    Case("stride-8", 4, 48, 32, 8, stream="both", labels="random"),
    Case("one-band-of-grid", 3, 8, 16, 8, stream="both"),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as contestants have it; switching back and forth takes longer than the work
    yield
    torch.set_num_threads(before)


def rehearse(tmp_path: Path, *arguments: str) -> int:
    options = ["--device", "cpu", "--in-process", "--repeats", "3", "--out", str(tmp_path), "--backend", "reference"]
    return gpu.main([*options, *arguments])


def table(tmp_path: Path) -> list[dict[str, str]]:
    with (tmp_path / "gpu.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- what is computed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
@pytest.mark.parametrize("stream", ["positive", "negative", "both"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_bands_add_up_to_the_whole(case: Case, stream: str, rows: int) -> None:
    """In float64 the reference has no error against its own bands, however thin: nothing is lost where they meet."""
    case = dataclasses.replace(case, stream=stream, dtype="float64")
    inputs = make_inputs(case)
    reference = next(c for c in make_contestants(case, "reference") if c.name.startswith("coarse"))
    row_bytes = 8 * case.classes**2 * case.width * case.stride
    found = errors_in_bands(reference, case, inputs, rows * row_bytes)
    assert set(found) == {"loss", *(f"grad_{name}" for name in leaves(inputs))}
    assert all(error < 1e-12 for error in found.values()), found
    seen = [band.pixels for band in bands(case, inputs, rows * row_bytes)]
    assert [s.start for s in seen] == [0, *(s.stop for s in seen[:-1])]
    assert seen[-1].stop == case.height


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_errors_in_bands_are_the_errors(case: Case) -> None:
    case = dataclasses.replace(case, stream="negative")
    inputs = make_inputs(case)
    contestant = Contestant("closed_form", baselines.closed_form)
    whole, parts = errors(contestant, inputs, truth(inputs)), errors_in_bands(contestant, case, inputs, 1)
    assert whole.keys() == parts.keys()
    for name, error in whole.items():
        assert parts[name] == pytest.approx(error, rel=1e-6, abs=1e-12)


def test_an_error_in_one_pixel_is_seen() -> None:
    """A gradient that is missing at the last pixel, or a missing negative field, fails the check."""
    case = dataclasses.replace(SMALL[0], classes=19)
    inputs = make_inputs(case)

    class Hole(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            grad = grads[0].clone()
            grad[..., -1, -1] = 0
            return grad

    def hole(seg: Tensor, cm: Tensor, *rest: Any) -> Tensor:
        return baselines.objective(baselines.softmax_gather)(seg, Hole.apply(cm), *rest)

    found = errors_in_bands(Contestant("hole", hole), case, inputs)
    assert "grad_cm" in (verdict(case, found) or "")

    def detached(seg: Tensor, cm: Tensor, labels: Tensor, other: Tensor, *rest: Any) -> Tensor:
        return baselines.objective(baselines.softmax_gather)(seg, cm, labels, other.detach(), *rest)

    found = errors_in_bands(Contestant("detached", detached), case, inputs)
    assert math.isnan(found["grad_negative_cm"])
    assert verdict(case, found) is not None


@pytest.mark.parametrize("name", [c.name for c in CASES if not c.full_only and c.height == 1024])
def test_every_contestant_of_every_case_is_right(name: str) -> None:
    """The cases themselves, on a small image and without torch.compile."""
    case = chosen_contestants(BY_NAME[name], compile=False, full=False)
    case = dataclasses.replace(case, height=32, width=48, device="cpu")
    inputs = make_inputs(case)
    for contestant in make_contestants(case, "reference"):
        found = errors_in_bands(contestant, case, inputs)
        assert verdict(case, found) is None, (contestant.name, found)


def test_a_compiled_objective_is_right() -> None:
    torch._dynamo.reset()
    case = dataclasses.replace(SMALL[1], dtype="bfloat16", contestants=("compiled:closed_form_uniform",))
    inputs = make_inputs(case)
    compiled = make_contestants(case, "reference")[-1]
    assert verdict(case, errors_in_bands(compiled, case, inputs)) is None


def test_cases_are_sound() -> None:
    assert len(BY_NAME) == len(CASES) + len(SMOKE)
    for case in CASES:
        assert case.device == "cuda"
        assert case.height % case.stride == 0 == case.width % case.stride
        assert {name.split(":")[1] if ":" in name else name for name in case.contestants} <= set(baselines.BASELINES)
    product = {(c.classes, c.height, c.stride, c.dtype, c.mode) for c in CASES if c.stream == "both"}
    assert len(product) == 3 * 2 * 3 * 2 * 2
    assert [case.name for case in CASES[:3]] == list(TARGET_CASE_NAMES)
    assert {target.case for target in TARGETS} <= set(BY_NAME)
    assert {target.what for target in TARGETS} == set(gpu_report.MEASURES)


def test_bytes_are_the_least_that_must_move() -> None:
    """The figures by hand: 1024 x 2048 pixels, 361 + 361 + 19 logits each, read and written, and two bytes of labels."""
    pixel, half, strided = (BY_NAME[name] for name in TARGET_CASE_NAMES)
    pixels = 1024 * 2048
    assert pixel.ideal_bytes == 2 * 4 * (361 + 361 + 19) * pixels + 2 * pixels
    assert pixel.ideal_bytes / 1e9 == pytest.approx(12.43, abs=0.01)
    assert half.ideal_bytes == 2 * 2 * (361 + 361 + 19) * pixels + 2 * pixels
    assert strided.ideal_bytes == 2 * 4 * (2 * 361 * pixels // 64 + 19 * pixels) + 2 * pixels
    forward = dataclasses.replace(pixel, mode="forward", stream="positive")
    assert forward.ideal_bytes == 4 * (361 + 19) * pixels + pixels


def test_random_labels_are_everywhere_and_blobs_are_not() -> None:
    blobs, random = (make_inputs(dataclasses.replace(SMALL[0], labels=kind)) for kind in ("blobs", "random"))
    assert (blobs.labels == baselines.IGNORE).any()
    assert not (random.labels == baselines.IGNORE).any()


# --- the pipeline -------------------------------------------------------------------------------------------------------


def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real worker process: report, CSV with its columns, figure; and without one, the same rows."""
    options = [
        "--device",
        "cpu",
        "--case",
        "smoke-pixel",
        "--repeats",
        "3",
        "--out",
        str(tmp_path),
        "--commit",
        "abc123",
    ]
    assert gpu.main([*options, "--backend", "reference"]) == 0
    rows = table(tmp_path)
    assert tuple(rows[0]) == gpu_report.COLUMNS
    case = BY_NAME["smoke-pixel"]
    wanted = [(case.name, name) for name in (*["coarse_kernels:reference"] * 2, *case.contestants)]
    assert [(row["case"], row["contestant"]) for row in rows] == wanted
    for row in rows:
        assert row["status"] == "ok"
        assert row["commit"] == "abc123"
        assert row["gpu"] == "none"
        assert "--device cpu" in row["command"]
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert not {key for key, value in row.items() if value == ""} - {"schedule", "needs_gb"}
    text = (tmp_path / "gpu.md").read_text()
    assert "A rehearsal on the CPU" in text
    assert "## Targets" in text
    assert "| met |" in text
    assert "**missed**" in text
    assert "not measured" in text
    plot.main([str(tmp_path / "gpu.csv"), "--case", "smoke-p*"])
    assert (tmp_path / "gpu.png").read_bytes()[:4] == b"\x89PNG"
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 0
    assert [(row["case"], row["contestant"]) for row in table(tmp_path)] == wanted


def test_results_are_written_case_by_case(tmp_path: Path) -> None:
    results = gpu.Results(SMOKE, tmp_path, "abc", "command")
    task = {"cases": [case.name for case in SMOKE[:2]], "device": "cpu", "backends": ["reference"], "compile": False}
    task |= {"full": False, "budget": 0.01, "repeats": 3, "deadline": math.inf}
    seen = []
    for event in gpu.events(task, gpu.in_this_process):
        results.add(event)
        results.write()
        seen.append({row["case"] for row in table(tmp_path)})
    assert seen == [{"smoke-pixel"}, {"smoke-pixel", "smoke-stride8"}]


def out_of_memory(above: int) -> baselines.Formulation:
    def published(seg: Tensor, *rest: Any) -> Tensor:
        if seg.shape[2] * seg.shape[3] > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 100.00 GiB.\nAnd much more.")
        return baselines.published(seg, *rest)

    return published


def test_what_does_not_fit_is_reported_with_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs on a sixteenth of the image, takes a gigabyte there, and so needs sixteen, besides the inputs."""
    monkeypatch.setitem(baselines.BASELINES, "published", out_of_memory(16 * 24 // 16))
    monkeypatch.setattr(measure.CpuMeter, "peak_extra_bytes", lambda self, contestant, inputs: 1e9)
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 0
    (row,) = [row for row in table(tmp_path) if row["contestant"] == "published"]
    assert row["status"] == "does not fit"
    assert float(row["needs_gb"]) == pytest.approx(16.0, abs=0.01)
    assert row["median_ms"] == row["peak_extra_mb"] == row["loss_error"] == ""
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("does not fit (needs 16 GB, computed)") == 2  # in the table, and among its case's contestants
    assert len(table(tmp_path)) == 5
    plot.main([str(tmp_path / "gpu.csv")])


def test_it_may_not_fit_at_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.BASELINES, "published", out_of_memory(0))
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 0
    assert "does not fit (needs an unknown amount)" in (tmp_path / "gpu.md").read_text()


def test_one_that_fits_alone_but_not_among_others_is_taken_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = measure.CpuMeter.timed

    def crowded(self: measure.CpuMeter, contestant: Contestant, inputs: Any) -> Any:
        if contestant.name == "published":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return timed(self, contestant, inputs)

    monkeypatch.setattr(measure.CpuMeter, "timed", crowded)
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 0
    assert [row["contestant"] for row in table(tmp_path) if row["status"] != "ok"] == ["published"]


def test_an_error_of_memory_keeps_no_tensor_alive() -> None:
    class Token:
        pass

    alive: list[weakref.ref[Token]] = []

    def hungry(*arguments: Any) -> Tensor:
        token = Token()
        alive.append(weakref.ref(token))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    case = SMALL[0]
    with pytest.raises(DoesNotFit) as error:
        contestants.first_run(Contestant("hungry", hungry), make_inputs(case))
    assert error.value.__context__ is None
    assert alive[0]() is None


_our_objective = contestants.our_objective


def wrong(formulation: Any) -> Any:
    return lambda *arguments: formulation(*arguments) * 1.001


def test_nobody_is_timed_where_ours_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contestants, "our_objective", lambda backend: wrong(_our_objective(backend)))
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 1
    assert table(tmp_path) == []
    text = (tmp_path / "gpu.md").read_text()
    assert "Wrong or failed" in text
    assert "loss is off by 0.001" in text
    assert "not measured" in text


def test_a_wrong_contestant_is_not_timed_and_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(baselines.BASELINES, "softmax_gather", wrong(baselines.softmax_gather))
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 1
    assert "softmax_gather" not in {row["contestant"] for row in table(tmp_path)}
    assert "smoke-pixel: softmax_gather (1 threads): loss is off" in (tmp_path / "gpu.md").read_text()


def test_a_kernel_that_does_not_compile_stops_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    monkeypatch.setattr(
        contestants, "our_objective", lambda backend: broken if backend == "cpu" else _our_objective(backend)
    )
    monkeypatch.setattr(gpu, "choose_backends", lambda asked, device: ["cpu", "reference"])
    assert rehearse(tmp_path, "--case", "smoke-pixel") == 1
    assert "RuntimeError: no kernel image is available" in (tmp_path / "gpu.md").read_text()
    rows = table(tmp_path)
    assert len(rows) == 5
    assert (rows[0]["contestant"], float(rows[0]["times_ours"])) == ("coarse_kernels:reference", 1.0)


def test_a_budget_is_kept_and_what_it_left_out_is_said(tmp_path: Path) -> None:
    assert rehearse(tmp_path, "--case", "smoke-*", "--budget-seconds", "0") == 1
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("the time budget was used up") == len(SMOKE)


def test_a_dead_worker_costs_one_case() -> None:
    """One dies in its case, one on the way to it, one after it has reported: only the cases of the first two are lost."""
    lives = iter(
        [
            [{"case": "a", "begins": True}, {"case": "a", "rows": []}, {"case": "b", "begins": True}],
            [],
            [{"case": "d", "begins": True}, {"case": "d", "rows": []}],
            [{"case": "e", "begins": True}, {"case": "e", "rows": []}],
        ]
    )

    def source(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from next(lives)

    found = list(gpu.events({"cases": list("abcde")}, source))
    assert [(event["case"], "failed" in event) for event in found] == [
        ("a", False),
        ("b", True),
        ("c", True),
        ("d", False),
        ("e", False),
    ]


def test_a_silent_worker_is_ended() -> None:
    task = {"cases": ["smoke-pixel"], "device": "cpu", "backends": ["reference"], "compile": False, "full": False}
    task |= {"budget": 0.01, "repeats": 3, "deadline": 1e12}
    assert list(gpu.in_a_process(task, timeout=0.05)) == []


# --- the command --------------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "no GPU" in err
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_without_a_fused_backend_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.backends, "explain", lambda device: {"cuda": "it was not built", "reference": None})
    monkeypatch.setattr(gpu.coarse_kernels, "available_backends", lambda device: ("reference",))
    with pytest.raises(SystemExit) as exit_:
        gpu.main([])
    assert exit_.value.code == 2
    assert "it was not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--out"),
        (["--repeats", "1"], "--repeats"),
        (["--device", "cpu", "--out", "x", "--backend", "nonsense"], "'nonsense'"),
        (["--device", "cpu", "--out", "x", "--backend", "reference", "--case", "nonsense"], "'nonsense'"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        gpu.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_quick_is_the_rows_with_targets() -> None:
    assert [case.name for case in gpu.choose_cases([], True, False)] == list(TARGET_CASE_NAMES)
    default, full = gpu.choose_cases([], False, False), gpu.choose_cases([], False, True)
    assert [case.name for case in default[:3]] == list(TARGET_CASE_NAMES)
    assert len(full) > len(default)
    assert all("compiled" not in name for name in chosen_contestants(CASES[0], compile=False, full=True).contestants)
    most = chosen_contestants(CASES[0], compile=True, full=True).contestants
    assert len(most) > len(CASES[0].contestants)


# --- targets ------------------------------------------------------------------------------------------------------------


def _row(contestant: str, ms: float, copy: float = 0.5, mb: float = 1000.0, **more: Any) -> dict[str, Any]:
    row = dict.fromkeys(gpu_report.COLUMNS, 1.0)
    about = {"case": TARGET_CASE_NAMES[0], "contestant": contestant, "schedule": "", "status": "ok", "device": "cuda:0"}
    figures = {
        "median_ms": ms,
        "copy_fraction": copy,
        "peak_extra_mb": mb,
        "times_ours": ms / 3.0,
        "needs_gb": math.nan,
    }
    return {**row, **about, **figures, "runs": 9, **more}


def test_targets_are_met_or_missed_by_the_measured_figures() -> None:
    rows = [
        _row("coarse_kernels:cuda", 3.0, 0.9, 400.0),
        _row("coarse_kernels:triton", 4.2),
        _row("softmax_gather", 60.0, mb=9000.0),
        _row("closed_form_uniform", 27.0, mb=12000.0),
        _row("compiled:softmax_gather", 12.0),
        _row("published", math.nan, status="does not fit", needs_gb=123.4, mb=math.nan, times_ours=math.nan),
    ]
    case = TARGET_CASE_NAMES[0]

    def judged(what: str, bound: float) -> tuple[float | None, bool]:
        found, met = gpu_report.judged(Target(case, what, bound), rows)
        return None if found is None else round(found, 6), met

    assert judged("ms", 3.0) == (3.0, True)
    assert judged("ms", 2.9) == (3.0, False)
    assert judged("copy", 0.85) == (90.0, True)
    assert judged("copy", 0.91) == (90.0, False)
    assert judged("plain", 10.0) == (9.0, False)  # the fastest, not the first
    assert judged("compiled", 3.0) == (4.0, True)
    assert judged("peak_gb", 0.5) == (0.4, True)
    assert judged("memory", 30.0) == (22.5, False)  # against the one that takes least, though it is slower
    assert judged("triton", 1.5) == (1.4, True)
    assert gpu_report.judged(Target("another", "ms", 1.0), rows) == (None, False)
    assert gpu_report.judged(Target(case, "triton", 1.5), rows[:1]) == (None, False)
    text = gpu_report.markdown([BY_NAME[case]], rows, [Target(case, "plain", 10.0)], [], [], 1.0)
    assert "times faster than the best plain PyTorch >= 10x | 9x | **missed** |" in text
    assert "does not fit (needs 123 GB, computed)" in text
    assert "closed_form_uniform" in text
    assert "rehearsal" not in text


def test_ratios_are_those_of_the_default_schedule() -> None:
    """ours() is the first row, which is that of the default schedule."""
    from coarse_kernels import schedule

    for case in CASES:
        assert case.schedules[0] == schedule.DEFAULT
    assert worker.TARGET_SHARE > 1


def test_forward_computes_no_gradient() -> None:
    inputs = make_inputs(dataclasses.replace(SMALL[0], mode="forward"))
    case = dataclasses.replace(SMALL[0], mode="forward")
    loss = run_once(make_contestants(case, "reference")[0], inputs)
    assert not loss.requires_grad
    assert errors_in_bands(make_contestants(case, "reference")[0], case, inputs).keys() == {"loss"}
