"""The benchmark's own correctness: baselines, the check before timing, the table, a run from end to end."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import against, baselines, cpu, objective, plot, report, worker
from benchmarks.cases import CASES, SMOKE, TRACE_WEIGHT, Case, Inputs, make_inputs, with_full_contestants
from benchmarks.contestants import Contestant, errors, make_contestants, ours, run_once, truth, verdict
from benchmarks.measure import environment, interleave, rounds_for

# C = 2: the smallest. C = 5 with 6x10 pixels: smaller than a blob of labels, and no power of two.
SMALL = (
    Case("pixel", 5, 6, 10),
    Case("two", 2, 16, 32),
    Case("strided", 5, 24, 40, 4),
    Case("odd", 3, 27, 45, 9),
)


def _inputs(case: Case) -> Inputs:
    inputs = make_inputs(case)
    labels = inputs.labels.clone()
    generator = torch.Generator().manual_seed(1)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = baselines.IGNORE
    assert 0 < int((labels == baselines.IGNORE).sum()) < labels.numel()
    return inputs._replace(labels=labels)


@pytest.mark.parametrize("stream", ["positive", "negative"])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("name", tuple(baselines.BASELINES))
def test_baseline_is_the_reference(name: str, case: Case, stream: str) -> None:
    case = dataclasses.replace(case, stream=stream)
    inputs = _inputs(case)
    found = errors(Contestant(name, baselines.BASELINES[name]), inputs, truth(inputs))
    assert set(found) == {"loss", "grad_seg", "grad_cm"}
    assert verdict(case, found) is None, found


@pytest.mark.parametrize("stream", ["positive", "negative"])
@pytest.mark.parametrize("name", [*baselines.PLAIN_STRIDED, *baselines.PLAIN_UNIFORM_STRIDED])
def test_baseline_in_float64(name: str, stream: str) -> None:
    """To float64 accuracy: what differs in float32 is rounding, not a term. Also for a loss that is scaled."""
    inputs = _inputs(Case("strided", 4, 16, 24, 4, dtype="float64", stream=stream))
    inputs = inputs._replace(transition=None if inputs.transition is None else inputs.transition.double())

    def gradients(formulation: baselines.Formulation) -> tuple[Tensor, ...]:
        loss = formulation(inputs.seg_logits, inputs.cm_logits, inputs.labels, inputs.transition, TRACE_WEIGHT)
        return torch.autograd.grad(loss * 3.0, (inputs.seg_logits, inputs.cm_logits))

    for own, true in zip(gradients(baselines.BASELINES[name]), gradients(ours("reference")), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-9, atol=1e-12)


def test_closed_form_survives_a_kept_graph() -> None:
    seg_logits, cm_logits, labels, transition = _inputs(SMALL[0])
    loss = baselines.closed_form(seg_logits, cm_logits, labels, transition, TRACE_WEIGHT)
    loss.backward(retain_graph=True)
    assert cm_logits.grad is not None
    once = cm_logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(cm_logits.grad, 2 * once)


def _wrong(seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, weight: float) -> Tensor:
    return baselines.softmax_gather(seg_logits, cm_logits, labels, transition, 2 * weight)  # the trace twice


def _wrong_gradient(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, weight: float
) -> Tensor:
    return baselines.softmax_gather(seg_logits.detach() * 1.0, cm_logits, labels, transition, weight)


def _nan(seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, weight: float) -> Tensor:
    return baselines.softmax_gather(seg_logits, cm_logits, labels, transition, weight) * math.nan


@pytest.mark.parametrize("formulation", [_wrong, _wrong_gradient, _nan])
def test_wrong_contestant_is_not_timed(formulation: baselines.Formulation) -> None:
    good, bad = Contestant("coarse_kernels:reference", ours("reference")), Contestant("bad", formulation)
    result = worker.race(SMOKE, [good, bad], budget=0.01, repeats=3)
    assert list(result["wrong"]) == ["bad (1 threads)"]
    assert [row["contestant"] for row in result["rows"]] == ["coarse_kernels:reference"]


def test_nobody_is_timed_where_ours_is_wrong() -> None:
    bad = Contestant("coarse_kernels:cpu", _wrong)
    result = worker.race(SMOKE, [bad, Contestant("published", baselines.published)], budget=0.01, repeats=3)
    assert result["rows"] == []
    assert len(result["wrong"]) == 1


def test_wrong_contestant_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(task: dict[str, object], buffers: str, threads: int) -> dict[str, object]:
        return {"rows": [], "wrong": {"published": "loss is off"}, "absent": {}}

    monkeypatch.setattr(cpu, "ask_worker", answer)
    assert cpu.main(["--case", "smoke", "--backend", "reference", "--out", str(tmp_path)]) == 1


def test_no_fused_backend_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu.backends, "explain", lambda device: {"cpu": "it was not built", "reference": None})
    monkeypatch.setattr(cpu.coarse_kernels, "available_backends", lambda device: ("reference",))
    with pytest.raises(SystemExit) as exit_:
        cpu.main([])
    assert exit_.value.code == 2
    assert "it was not built" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "nonsense"], "'nonsense'"),
        (["--backend", "reference", "--case", "nonsense"], "'nonsense'"),
        (["--repeats", "1"], "--repeats"),
        (["--threads", "0"], "--threads"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cpu.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_end_to_end(tmp_path: Path) -> None:
    """Real processes: the table, the CSV with its columns, the figure."""
    options = ["--case", "smoke", "--backend", "reference", "--repeats", "3", "--out", str(tmp_path)]
    assert cpu.main(options) == 0
    with (tmp_path / "cpu.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == report.COLUMNS
    assert [row["contestant"] for row in rows] == ["coarse_kernels:reference", *SMOKE.contestants]
    may_be_empty = {"schedule", "peak_extra_mb", "peak_over_cm", "peak_over_gradients"}
    for row in rows:
        assert not {key for key, value in row.items() if value == ""} - may_be_empty
        assert float(row["p20_ms"]) <= float(row["median_ms"]) <= float(row["p80_ms"])
        assert int(row["runs"]) >= 3
        assert row["buffers"] == "reused"
    assert float(rows[0]["times_ours"]) == 1.0
    text = (tmp_path / "cpu.md").read_text()
    assert ">= 1x" in text
    assert "met" in text or "missed" in text
    plot.main([str(tmp_path / "cpu.csv")])
    assert (tmp_path / "cpu.png").read_bytes()[:4] == b"\x89PNG"


def test_worker_environments_differ_only_in_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    fresh, reused = (cpu.worker_environment(buffers, 1) for buffers in ("fresh", "reused"))
    assert "MALLOC_MMAP_MAX_" not in fresh  # what the caller had set is not "the default"
    assert reused["MALLOC_MMAP_MAX_"] == "0"
    assert {key: value for key, value in reused.items() if not key.startswith("MALLOC_")} == fresh


def test_rounds_are_interleaved() -> None:
    rounds = [12, 3, 5]
    turns = interleave(rounds)
    assert len(turns) == 12
    assert [sum(k in turn for turn in turns) for k in range(3)] == rounds
    gaps = [index for index, turn in enumerate(turns) if 1 in turn]
    assert gaps == [3, 7, 11]  # spread over the whole time
    assert rounds_for(100.0, 1.0, None) == 3  # a slow one still runs three times


def _row(case: Case, contestant: str, median_ms: float, our_ms: float, threads: int = 1) -> dict[str, object]:
    numbers = dict.fromkeys(report.COLUMNS, 1.0)
    about = {"schedule": "", "contestant": contestant, "case": case.name, "threads": threads}
    return {**numbers, **environment(), **about, "median_ms": median_ms, "times_ours": median_ms / our_ms, "runs": 3}


def test_bars_are_held_against_the_fastest() -> None:
    case = next(case for case in CASES if case.name == "c19")
    rows = [
        _row(case, "coarse_kernels:cpu", 1.0, 1.0),
        _row(case, "published", 30.0, 1.0),
        _row(case, "softmax_gather", 20.0, 1.0),
        _row(case, "closed_form", 11.0, 1.0),
    ]
    assert report.measured(rows, "plain") == 11.0
    assert report.measured(rows, "autograd") == 20.0
    text = report.markdown([case], rows, 1.0)
    assert "30.0x, >= 25x met" in text
    assert "11.0x, >= 12x **missed**" in text
    assert "not run" in text  # no compiled row


def test_two_threads_are_held_against_one() -> None:
    case = next(case for case in CASES if case.threads == (1, 2))
    rows = [_row(case, "coarse_kernels:cpu", 10.0, 10.0), _row(case, "coarse_kernels:cpu", 5.0, 10.0, threads=2)]
    assert report.measured(rows, "threads") == 2.0
    assert "2.0x, >= 1.8x met" in report.markdown([case], rows, 1.0)


def test_cases_are_sound() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    for case in CASES:
        assert case.height % case.stride == 0
        assert case.width % case.stride == 0
        for schedule in (case, with_full_contestants(case)):
            assert len(make_contestants(schedule, "reference")) >= 1
        assert {kind for kind, _ in case.bars} <= {"published", "plain", "compiled", "threads"}


def test_forward_case_computes_no_gradient() -> None:
    inputs = make_inputs(dataclasses.replace(SMOKE, mode="forward"))
    loss = run_once(Contestant("ours", ours("reference")), inputs)
    assert not loss.requires_grad
    assert inputs.seg_logits.grad is None


def test_a_disturbed_run_is_said() -> None:
    case = CASES[0]
    quiet, busy = (_row(case, name, 1.0, 1.0) for name in ("coarse_kernels:cpu", "published"))
    assert "disturbed" not in report.markdown([case], [quiet, busy], 1.0)
    busy["cpu_share"] = 0.6
    assert "1 of 2 rows were disturbed" in report.markdown([case], [quiet, busy], 1.0)


# --- several kinds of drawings ----------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_objective_layers_are_a_third_undrawn() -> None:
    labels = objective.make_inputs(objective.Scene(5, 256, 512)).labels[0]
    undrawn = labels == baselines.IGNORE
    for k, (_, where) in enumerate(objective.LAYERS):
        assert 0.25 < undrawn[k].double().mean() < 0.42
        assert torch.equal(undrawn[k], undrawn[0]) == (where == "same" or k == 0)
        assert set(labels[k].unique().tolist()) == {*range(5), baselines.IGNORE}


@pytest.mark.usefixtures("one_thread")
def test_objective_every_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, so that peaks are nothing to look at: every contestant is right, every bar has its figure."""
    monkeypatch.setattr(objective, "ask", lambda task, buffers: objective.measure(task))
    assert objective.main(["--quick", "--backend", "reference", "--out", str(tmp_path)]) == 0
    with (tmp_path / "objective.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == objective.COLUMNS
    for job in objective.JOBS:
        own = [row for row in rows if row["job"] == job.name]
        measured = [row["contestant"] for row in own if row["quantity"] == job.quantity]
        assert measured == list(job.contestants)
        for row in own:
            assert float(row["value"]) >= 0
            assert (row["p20"] != "") == (row["quantity"] in ("time", "time_per_pixel"))
        wrong = [row for row in own if row["quantity"].endswith("_error") and float(row["value"]) > 1e-5]
        assert wrong == []
    text = (tmp_path / "objective.md").read_text()
    assert text.count("\n| ") - 1 == len(objective.BARS)
    assert "not measured" not in text
    assert "figures mean nothing" in text


def test_objective_peak_in_a_process_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert objective.main(["--quick", "--backend", "reference", "--case", "peak-objective"]) == 0
    assert "| <= 85 MB | " in capsys.readouterr().out


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("job", ["time-trusted-c19-1", "time-label-map"])
def test_objective_wrong_contestant_is_not_measured(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make = objective.make_contestant

    def wrong(name: str, *rest: object) -> Contestant:
        right = make(name, *rest)  # type: ignore[arg-type]
        if name not in (objective.PLAIN, objective.ARGMAX):
            return right
        return dataclasses.replace(right, formulation=lambda seg, *more: right.formulation(-seg, *more))

    monkeypatch.setattr(objective, "make_contestant", wrong)
    names = objective.BY_NAME[job].contestants
    task = {"job": job, "contestants": names, "backend": "reference", "threads": 1, "quick": True}
    result = objective.measure({**task, "buffers": "reused", "budget": 0.0, "repeats": 3})
    assert result["rows"] == []
    assert list(result["wrong"]) == [names[1]]


def _measurement(job: str, contestant: str, value: float, quantity: str = "time", **more: object) -> dict[str, object]:
    about = {"job": job, "contestant": contestant, "quantity": quantity, "value": value, "p20": value, "p80": value}
    known = {"load_before": 0.0, "buffers": "reused", "threads": 1, "cpu_share": 1.0, "kernels": "strided"}
    return {**environment(), **known, **about, **more}


def test_objective_bars_are_held_to_medians() -> None:
    jobs = [objective.BY_NAME[name] for name in ("peak-objective", "time-trusted-c19-1", "time-layers")]
    rows = [
        _measurement(jobs[0].name, "field + 1 trusted", 86.0, "peak"),
        _measurement(jobs[0].name, "field + 1 trusted", 57.3, "gradients"),
        _measurement(jobs[1].name, "trusted", 10.0),
        _measurement(jobs[1].name, objective.PLAIN, 60.0),
        _measurement(jobs[2].name, "field", 10.0),
        _measurement(jobs[2].name, "3 layers", 17.0, cpu_share=0.6),
    ]
    text = objective.markdown(rows, jobs, False, 1.0)
    assert "| <= 85 MB | 86.0 MB **missed** | strided |  | gradients 57.3 MB |" in text
    assert "| >= 5x faster | 6.00x met | strided | 10.0 (10.0 to 10.0); 4.8 ns per pixel |" in text
    assert "| <= 1.6x | 1.70x **missed** |" in text
    assert "disturbed: 0.60 of 1 cores" in text
    assert "1 of 4 times were disturbed" in text
    assert "not measured" in text  # the layers that share what is undrawn


# --- this checkout against another ------------------------------------------------------------------------------------


def test_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: a row for each of ours, with a ratio around 1, whatever else the machine does."""
    arguments = [str(cpu.ROOT), "--case", "smoke", "--backend", "reference", "--rounds", "5", "--budget", "0.5"]
    assert against.main(arguments) == 0
    out = capsys.readouterr().out
    cells = next(line for line in out.splitlines() if line.startswith("| smoke |")).split(" | ")
    assert 0.1 < float(cells[5]) < 10
    assert int(cells[7]) == 5
    assert "geometric mean" in out


def test_against_has_the_rows_of_the_table() -> None:
    for case in CASES:
        names = [(one.name, one.schedule, one.threads) for one in make_contestants(case, "reference")]
        table = [name for name in names if name[0] == "coarse_kernels:reference"]
        assert [(one.name, one.schedule, one.threads) for one in against.ours_of(case, "reference", 1)] == table


def test_against_what_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        against.main([str(tmp_path)])
    assert exit_.value.code == 2
    assert "OTHER_CHECKOUT" in capsys.readouterr().err


def test_against_a_checkout_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "coarse_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(3)")
    assert against.main([str(tmp_path), "--case", "smoke", "--backend", "reference"]) == 1
    assert "ended with status 3" in capsys.readouterr().err
