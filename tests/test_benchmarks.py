"""The benchmark's own correctness: problems, providers, the check before timing, the driver, bars, a run from end to end."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import against, baselines, meters, plot, providers, report, run, sets, verify, worker
from benchmarks.problem import DATA, IGNORE, Drawn, Kind, Problem, cost, make_inputs, parse
from benchmarks.providers import Provider, choose
from benchmarks.verify import Call, DoesNotFit, complaint, errors, find_truth

# C = 2: the smallest. 6x10 pixels: smaller than any drawing. 27x45, 33x47: grids whose rows lie at no whole pixels.
SMALL = (
    "c5 6x10",
    "c2 16x32 negative",
    "c5 24x40 cm4 positive+negative",
    "c3 27x45 cm9",
    "c4 33x47 seg2 cm4 positive+trusted",
    "c5 b2 24x40 seg4 cm8 positive+trusted2 same",
    "c5 24x40 cmglobal positive+negative",
    "c4 b2 16x24 seg2 cmimage",
    "c5 16x24 labels",
    "c5 16x24 seg4 labels2+trusted",
    "c3 24x40 cm4 bf16 noise",
    "c3 16x24 fp16 random",
    "c3 16x24 f",
    "c3 16x24 cm8 b",
    "c3 16x24 nograd",
    "c4 16x24 seg4 cm8 posterior positive+trusted",
    "c7 16x24 seg4 map",
    "c3 16x24 extreme",
    "c19 64x128 negative",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as problems have it; switching back and forth takes longer than the work
    yield
    torch.set_num_threads(before)


def provider(problem: Problem, name: str) -> Provider:
    (found,) = choose(problem, "cpu", [name])[0]
    return found


# ---- problems --------------------------------------------------------------------------------------------------------


def test_a_line_is_read_as_it_is_written() -> None:
    line = "c19 1024x2048 seg4 cm8 bf16 positive+trusted fb blobs"
    problem = parse(line)
    assert str(problem) == line
    assert parse("positive+trusted bf16 cm8 seg4 1024x2048 c19") == problem
    assert problem.kinds == (Kind("positive"), Kind("trusted"))
    assert problem.field_grid == (128, 256)
    assert str(parse("c2 64x64")) == "c2 64x64 seg1 cm1 fp32 positive fb blobs"
    assert str(parse("c5 b2 9x9 labels3 t2 fresh nograd")) == "c5 b2 9x9 seg1 fp32 labels3 nograd blobs t2 fresh"
    for small in SMALL:
        assert parse(str(parse(small))) == parse(small)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c19", "height"),
        ("64x64", "classes"),
        ("c19 64x64 cm8 cm4", "'cm4' says once more what field is"),
        ("c19 64x64 positiv", "got 'positiv'"),
        ("c19 64x64 trusted cm8", "no cm8"),
        ("c1 64x64", "classes >= 2"),
        ("c256 64x64", "at most 255"),
        ("c19 64x64 cm0", "strides"),
        ("c19 64x64 map positive", "label map"),
    ],
)
def test_a_line_that_says_nothing_sensible(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(line)


@pytest.mark.parametrize("data", DATA)
def test_data_are_what_their_word_says(data: str) -> None:
    problem = parse(f"c5 128x256 cm8 positive2+trusted {data}")
    inputs = make_inputs(problem)
    assert torch.equal(inputs.seg_logits, make_inputs(problem).seg_logits)
    layers = torch.cat([kind.labels.view(-1, 128, 256) for kind in inputs.kinds])
    undrawn = (layers == IGNORE).flatten(1).double().mean(1)
    low, high = {"random": (0, 0), "noise": (0.02, 0.2), "extreme": (0.02, 0.2)}.get(data, (0.2, 0.45))
    assert ((low <= undrawn) & (undrawn <= high)).all(), undrawn
    sure = (inputs.seg_logits.softmax(1).amax(1) > 0.9).double().mean()
    assert (sure > 0.7) == (data in ("blobs", "same", "extreme")), sure
    together = (layers[0] == IGNORE) == (layers[1] == IGNORE)
    assert together.all() == (data in ("same", "random"))
    diagonal = inputs.kinds[0].cm_logits.softmax(1).diagonal(dim1=1, dim2=2)  # type: ignore[union-attr]
    if data in ("blobs", "same"):
        assert 0.7 < diagonal.mean() < 0.9
        names = layers[0][layers[0] != IGNORE]
        assert len(names.unique()) == 5


def test_bytes_are_the_least_that_must_move() -> None:
    """The figures by hand: 1024 x 2048 pixels, 361 + 361 + 19 logits each, read and written, and two bytes of labels."""
    pixels = 1024 * 2048
    every, half = Drawn(pixels, pixels), Drawn(pixels / 2, pixels / 2)
    both = cost(parse("c19 1024x2048 positive+negative"), [every, every])
    assert both.bytes == 2 * 4 * (361 + 361 + 19) * pixels + 2 * pixels
    assert both.exponentials == (361 + 361 + 19) * pixels
    # sums and gradients of columns, the row that is named or all of them; sum and gradient of the class logits
    assert both.multiply_adds == (2 * 361 + 19 + 2 * 361 + 361 + 2 * 19) * pixels
    stored = cost(parse("c19 1024x2048 bf16 positive+negative"), [every, every])
    assert stored.bytes == 2 * 2 * (361 + 361 + 19) * pixels + 2 * pixels
    strided = cost(parse("c19 1024x2048 seg4 cm8 positive+trusted"), [half, every])
    assert strided.bytes == 2 * 4 * (361 * pixels // 64 + 19 * pixels // 16) + 2 * pixels
    assert strided.exponentials == 19 * pixels + 361 * pixels / 2
    layered = cost(parse("c19 1024x2048 positive3"), [Drawn(pixels / 2, pixels)])
    assert layered.exponentials == 19 * pixels + 361 * pixels / 2
    assert layered.multiply_adds == 2 * 361 * pixels / 2 + 19 * pixels + 2 * 19 * pixels
    shared = cost(parse("c19 1024x2048 cmglobal"), [half])
    assert shared.exponentials == 19 * pixels + 361
    assert all(math.isnan(value) for mode in "fb" for value in cost(parse(f"c19 1024x2048 {mode}"), [every]))
    assert cost(parse("c19 1024x2048 nograd"), [every]).bytes == 4 * (361 + 19) * pixels + pixels
    assert cost(parse("c19 1024x2048 seg4 map"), []).bytes == 4 * 19 * pixels / 16 + pixels


def test_data_do_not_depend_on_threads() -> None:
    problem = parse("c5 128x256 seg4 cm8 positive2+trusted t2")
    one = make_inputs(problem)
    torch.set_num_threads(2)
    for a, b in zip(one.kinds, make_inputs(problem).kinds, strict=True):
        assert torch.equal(a.labels, b.labels)
    assert [drawn.labels >= drawn.pixels > 0 for drawn in one.drawn()] == [True, True]


# ---- right or wrong --------------------------------------------------------------------------------------------------


@pytest.mark.sampled(3)
@pytest.mark.parametrize("line", SMALL)
def test_everybody_is_right(line: str) -> None:
    problem = parse(line)
    inputs = make_inputs(problem)
    truth = find_truth(problem, inputs)
    usual = errors(Call(problem, provider(problem, "reference"), inputs), truth)
    chosen, _ = choose(problem, "cpu", ["eager", "recompute", "reference"])
    assert {one.group for one in chosen} >= {"ours"}
    for one in chosen:
        found = errors(Call(problem, one, inputs), truth)
        assert complaint(problem, found, usual) is None, (one.name, found)
    if line != "c19 64x128 negative":
        assert complaint(problem, usual) is None


def test_gradients_of_a_mean_over_an_image_are_measured_in_float16() -> None:
    """Nobody had the digits without a scaled loss: all were called wrong, and nobody was timed."""
    problem = parse("c2 128x256 fp16")
    inputs = make_inputs(problem)
    call = Call(problem, provider(problem, "cpu"), inputs)
    truth = find_truth(problem, inputs)
    assert complaint(problem, errors(call, truth)) is None
    call.loss_scale = 1.0
    assert "class logits is off" in str(complaint(problem, errors(call, truth)))


def test_what_float32_cannot_tell_is_allowed_and_no_more() -> None:
    problem = parse("c3 9x9")
    assert complaint(problem, {"field": 3e-5}, {"field": 2e-5}) is None
    assert complaint(problem, {"field": 3e-5}, {"field": 1e-5}) is not None
    assert complaint(problem, {"field": 1e-3}, {"field": 1.0}) is not None
    assert complaint(problem, {"field": 1e-3}, {"field": math.nan}) is not None
    assert complaint(problem, {"field": math.nan}, {"field": 1e-5}) is not None


@pytest.mark.sampled(3)
@pytest.mark.parametrize("line", [one for one in SMALL if "map" not in one])
def test_bands_add_up_to_the_whole(line: str) -> None:
    """In float64, however thin: nothing is lost where they meet."""
    problem = dataclasses.replace(parse(line), dtype="fp64")
    inputs = make_inputs(problem)
    whole = find_truth(problem, inputs)
    for most in (1, 8 * problem.classes**2 * problem.width * 12):
        parts = find_truth(problem, inputs, most)
        for a, b in zip((whole.loss, *whole.gradients.values()), (parts.loss, *parts.gradients.values()), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    found = errors(Call(problem, provider(problem, "reference"), inputs), find_truth(problem, inputs, 1))
    assert all(error < 1e-10 for error in found.values()), found


@pytest.mark.parametrize("name", ["softmax_rows_matmul", "closed_form_uniform", "closed_form_matmul", "matrix_product"])
def test_a_baseline_in_float64(name: str) -> None:
    """To float64 accuracy: what differs in float32 is rounding, not a term. Also for a loss that is scaled."""
    problem = parse(f"c4 16x24 {'cmglobal' if name.startswith('matrix') else 'cm4'} positive+negative fp64")
    inputs = make_inputs(problem)
    kinds = tuple(
        dataclasses.replace(kind, transition=None if kind.transition is None else kind.transition.double())
        for kind in inputs.kinds
    )
    inputs = inputs._replace(kinds=kinds)

    def gradients(name: str) -> tuple[Tensor, ...]:
        loss = provider(problem, name).prepare(problem, inputs)()
        return torch.autograd.grad(loss * 3.0, tuple(inputs.leaves.values()))

    for own, true in zip(gradients(name), gradients("reference"), strict=True):
        torch.testing.assert_close(own, true, rtol=1e-9, atol=1e-12)


def test_closed_form_survives_a_kept_graph() -> None:
    seg_logits, kinds, _ = make_inputs(parse("c5 6x10"))
    cm_logits, labels = kinds[0].cm_logits, kinds[0].labels
    assert cm_logits is not None
    loss = baselines.closed_form(seg_logits, cm_logits, labels, None, 0.01)
    loss.backward(retain_graph=True)
    assert cm_logits.grad is not None
    once = cm_logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(cm_logits.grad, 2 * once)


@pytest.mark.slow
def test_a_compiled_objective_is_right() -> None:
    torch._dynamo.reset()
    problem = parse("c3 24x40 cm4 bf16 positive+negative")
    inputs = make_inputs(problem)
    call = Call(problem, provider(problem, "compiled:closed_form_uniform"), inputs)
    assert complaint(problem, errors(call, find_truth(problem, inputs))) is None


def of(name: str, loss: Any, group: str = "autograd") -> Provider:
    """A provider that computes ``loss(inputs)``."""
    return Provider(name, group, lambda problem, inputs: lambda: loss(inputs), lambda problem, device: None)


def _reference(inputs: Any) -> Tensor:
    return provider(parse("c3 16x24"), "reference").prepare(parse("c3 16x24"), inputs)()


class _Hole(torch.autograd.Function):
    """A gradient that is missing at the last pixel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        grad = grads[0].clone()
        grad[..., -1, -1] = 0
        return grad


def _with(inputs: Any, change: Any) -> Any:
    kinds = tuple(dataclasses.replace(kind, cm_logits=change(kind.cm_logits)) for kind in inputs.kinds)
    return inputs._replace(kinds=kinds)


@pytest.mark.parametrize(
    ("loss", "what"),
    [
        (lambda inputs: _reference(inputs) * 1.001, "loss"),
        (lambda inputs: _reference(inputs) * math.nan, "loss"),
        (lambda inputs: _reference(inputs._replace(seg_logits=inputs.seg_logits.detach() * 1.0)), "class logits"),
        (lambda inputs: _reference(_with(inputs, lambda cm: cm.detach())), "field"),
        (lambda inputs: _reference(_with(inputs, _Hole.apply)), "field"),
    ],
    ids=["loss", "nan", "no class gradient", "no field gradient", "a pixel is missing"],
)
def test_a_wrong_provider_is_seen(loss: Any, what: str) -> None:
    problem = parse("c19 12x20 random")
    inputs = make_inputs(problem)
    found = errors(Call(problem, of("wrong", loss), inputs), find_truth(problem, inputs))
    assert (complaint(problem, found) or "").startswith(f"{what} is off by"), found


def test_a_wrong_label_map_is_seen() -> None:
    problem = parse("c7 16x24 seg4 map")
    inputs = make_inputs(problem)
    flipped = of("flipped", lambda inputs: provider(problem, "argmax").prepare(problem, inputs)().flip(-1), "torch")
    assert "label map" in (
        complaint(problem, errors(Call(problem, flipped, inputs), find_truth(problem, inputs))) or ""
    )


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "CPU_VALUES", 1000)
    monkeypatch.setattr(verify, "SMALL", (8, 16))
    monkeypatch.setattr(verify, "BAND_BYTES", 1)
    monkeypatch.setattr(worker, "sample_truth", lambda problem, inputs: verify.sample_truth(problem, inputs, 1))


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("line", ["c3 64x40 cm8", "c3 64x40 seg4 cm8 positive+trusted", "c3 32x40", "c3 32x40 b"])
def test_what_is_too_large_is_verified_small_and_in_bands(line: str) -> None:
    names = ["reference", "published", "cpu", "softmax_rows"]
    result = worker.examine([(line, names)], "cpu", TASK)
    assert result["wrong"] == {}
    assert set(timed(result)) == {name for name in names if name not in str(result["absent"])}
    notes = {row["note"] for row in result["rows"] if row["quantity"] == "error of loss"}
    assert notes == {f"on {dataclasses.replace(parse(line), height=8, width=16)}"}


@pytest.mark.sampled(3)
@pytest.mark.usefixtures("small_is_large")
@pytest.mark.parametrize("group", ["ours", "autograd"])
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda inputs, loss: loss + 0.01 * loss.detach(), "at full size its loss is off by 0.01"),
        (lambda inputs, loss: loss + _HALF.apply(inputs.seg_logits[..., -1, :]).sum(), "class logits is off by"),
        (lambda inputs, loss: loss + _HALF.apply(inputs.kinds[0].cm_logits[..., -1, :]).sum(), "field is off by"),
    ],
    ids=["loss", "class gradient", "field gradient"],
)
def test_who_is_wrong_at_full_size_alone_is_seen(
    change: Any, why: str, group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(inputs: Any) -> Tensor:
        loss = _reference(inputs)
        return loss if inputs.size == (8, 16) else change(inputs, loss)

    with_providers(monkeypatch, of("wrong", wrong, group), of("right", _reference), of("mine", _reference, "ours"))
    names = ["right", "wrong", "mine"] if group == "ours" else ["right", "mine", "wrong"]
    result = worker.examine([("c3 64x40 cm8", names)], "cpu", TASK)
    ((who, found),) = result["wrong"].items()
    assert who.endswith(": wrong")
    assert why in found
    assert sorted(timed(result)) == ["mine", "right"]


class _Half(torch.autograd.Function):
    """Nothing, with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return 0.5 * grads[0]


_HALF = _Half


# ---- a worker --------------------------------------------------------------------------------------------------------

TASK: dict[str, Any] = {"modes": ["speed"], "peaks": False, "budget": 0.01, "most": 3}
LINE = "c3 16x24 seg1 cm1 fp32 positive fb blobs"


def timed(result: dict[str, Any]) -> list[str]:
    return [row["provider"] for row in result["rows"] if row["quantity"] == "time"]


def with_providers(monkeypatch: pytest.MonkeyPatch, *more: Provider) -> None:
    monkeypatch.setattr(providers, "_PROVIDERS", list(more))


def test_a_wrong_provider_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    with_providers(monkeypatch, of("bad", lambda inputs: _reference(inputs) * 1.01), of("good", _reference))
    result = worker.examine([(LINE, ["reference", "bad", "good"])], "cpu", TASK)
    assert timed(result) == ["reference", "good"]
    assert list(result["wrong"]) == [f"{LINE}: bad"]


def test_nobody_is_timed_where_ours_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    with_providers(monkeypatch, of("ours!", lambda inputs: _reference(inputs) * 1.01, "ours"), of("good", _reference))
    result = worker.examine([(LINE, ["ours!", "good"])], "cpu", TASK)
    assert timed(result) == []
    assert f"{LINE}: ours!" in result["wrong"]


def test_a_kernel_that_does_not_start_stops_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(inputs: Any) -> Tensor:
        raise RuntimeError("no kernel image is available\nfor this device")

    with_providers(monkeypatch, of("broken", broken), of("compiled:broken", broken, "compiled"))
    result = worker.examine([(LINE, ["reference", "broken", "compiled:broken"])], "cpu", TASK)
    assert timed(result) == ["reference"]
    assert result["wrong"] == {f"{LINE}: broken": "RuntimeError: no kernel image is available"}
    assert result["absent"] == {f"{LINE}: compiled:broken": "RuntimeError: no kernel image is available"}


def out_of_memory(above: int) -> Provider:
    def hungry(inputs: Any) -> Tensor:
        if math.prod(inputs.size) > above:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 100.00 GiB.\nAnd much more.")
        return _reference(inputs)

    return of("hungry", hungry)


@pytest.mark.parametrize(("above", "needs"), [(16 * 24 // 16, 16.0), (0, math.nan)])
def test_what_does_not_fit_is_reported_with_what_it_needs(
    above: int, needs: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs on a sixteenth of the image, takes a gigabyte there, and so needs sixteen, besides the inputs."""
    with_providers(monkeypatch, out_of_memory(above))
    monkeypatch.setattr(meters.CpuMeter, "peak_extra_bytes", lambda self, call: 1e9)
    result = worker.examine([(LINE, ["reference", "hungry"])], "cpu", {**TASK, "peaks": True})
    assert timed(result) == ["reference"]
    (row,) = [row for row in result["rows"] if row["quantity"] == "needs"]
    assert row["value"] == pytest.approx(needs, abs=0.01, nan_ok=True)
    text = "".join(report._everybody(report.Table(result["rows"])))
    assert ("does not fit: needs 16 GB, computed" in text) == (needs == 16)


def test_one_that_fits_alone_but_not_among_others_is_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    once = meters.CpuMeter.timed

    def crowded(self: meters.CpuMeter, call: Call) -> Any:
        if call.provider.name == "published":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return once(self, call)

    monkeypatch.setattr(meters.CpuMeter, "timed", crowded)
    result = worker.examine([(LINE, ["reference", "published"])], "cpu", TASK)
    assert timed(result) == ["reference"]
    assert [row["provider"] for row in result["rows"] if row["quantity"] == "needs"] == ["published"]


def test_an_error_of_memory_keeps_no_tensor_alive() -> None:
    class Token:
        pass

    alive: list[weakref.ref[Token]] = []

    def hungry(inputs: Any) -> Tensor:
        token = Token()
        alive.append(weakref.ref(token))
        raise torch.OutOfMemoryError("CUDA out of memory.")

    problem = parse(LINE)
    with pytest.raises(DoesNotFit) as error:
        Call(problem, of("hungry", hungry), make_inputs(problem)).result()
    assert error.value.__context__ is None
    assert alive[0]() is None


def test_the_same_bits_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    result = worker.examine([("c5 24x40 cm8", ["ours"])], "cpu", {**TASK, "modes": ["bitwise"]})
    assert [(row["value"], row["note"]) for row in result["rows"] if row["quantity"] == "same bits"] == [
        (1.0, "over runs, and 1, 2 and 3 threads")
    ] * len(choose(parse("c5 24x40 cm8"), "cpu", ["ours"])[0])
    with_providers(
        monkeypatch,
        of("dice", lambda inputs: _reference(inputs) + 1e-6 * torch.rand((), dtype=torch.float64).float(), "ours"),
    )
    result = worker.examine([(LINE, ["dice"])], "cpu", {**TASK, "modes": ["bitwise"]})
    assert result["wrong"] == {f"{LINE}: dice": "other bits over runs, and 1, 2 and 3 threads"}


@pytest.mark.parametrize(("mode", "leaves"), [("fb", True), ("f", False), ("b", True), ("nograd", False)])
def test_a_mode_computes_what_it_says(mode: str, leaves: bool) -> None:
    problem = parse(f"c3 16x24 {mode}")
    call = Call(problem, provider(problem, "reference"), make_inputs(problem))
    call.before()
    call.run()
    assert all((leaf.grad is not None) == leaves for leaf in call.inputs.leaves.values())
    assert call.inputs.seg_logits.requires_grad == (mode != "nograd")
    call.after()
    assert all(leaf.grad is None for leaf in call.inputs.leaves.values())


def test_rounds_are_interleaved() -> None:
    rounds = [12, 3, 5]
    turns = meters.interleave(rounds)
    assert len(turns) == 12
    assert [sum(k in turn for turn in turns) for k in range(3)] == rounds
    assert [index for index, turn in enumerate(turns) if 1 in turn] == [3, 7, 11]  # spread over the whole time
    assert meters.rounds_for(100.0, 1.0) == 3  # a slow one still runs three times


# ---- sets and bars ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cpu", "cpu-full", "gpu", "gpu-full"])
def test_sets_are_sound(name: str) -> None:
    usual = name.removesuffix("-full")
    groups = sets.read(*dict.fromkeys((usual, name)))
    lines = [str(entry.problem) for group in groups for entry in group]
    for entry in (entry for group in groups for entry in group):
        chosen, _ = choose(entry.problem, "cpu", entry.providers)
        assert chosen
        for bar in entry.bars:
            assert str(dataclasses.replace(entry.problem, buffers="reused")) in lines or bar.figure != "fresh"
            if bar.figure in report.KINDS:  # somebody has to be there to be compared with
                assert any(one.group in report.KINDS[bar.figure] for one in chosen), (str(entry.problem), bar)


def test_the_sets_have_what_people_ask_for() -> None:
    every = [e.problem for group in sets.read("cpu", "cpu-full") for e in group]
    assert {p.classes for p in every} >= {2, 5, 11, 19, 34, 150}
    assert {p.field for p in every} >= {"", "1", "2", "4", "8", "16", "image", "global"}
    assert {p.seg_stride for p in every} >= {1, 4, 8}
    assert {p.dtype for p in every} == {"fp32", "bf16", "fp16"}
    assert {p.mode for p in every} == {"fb", "f", "b", "nograd", "posterior", "map"}
    assert {p.data for p in every} == set(DATA)
    assert {p.size for p in every} >= {(32, 32), (1024, 2048)}
    assert any(p.width % 32 for p in every)
    quick = sets.with_bars(sets.read("gpu"))
    assert quick == sets.read("gpu")[: len(quick)]  # where device time is short, what a bar names comes first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c3 9x9 | eager | plain <= 2", "expected plain >= 2"),
        ("c3 9x9 | eager | speedier >= 2", "bar: expected one of"),
        ("c3 9x9 | eager | plain >= 2 | more", "PROBLEM | PROVIDERS | BARS"),
        ("& c3 9x9", "a problem before"),
        ("c3 9x9 | eager\n& c3 9x9 fresh", "one kind of buffers"),
        ("c3 9x9\nc3 9x9 seg1", "each problem once"),
        ("c3 9x9\n& c3 9x9", "each problem once"),
    ],
)
def test_a_set_that_cannot_be_meant(line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sets.parse_lines(line.splitlines())


def test_an_unknown_provider_is_named() -> None:
    with pytest.raises(ValueError, match="'nobody'"):
        choose(parse(LINE), "cpu", ["nobody"])


def _rows(line: str, milliseconds: dict[str, float], **peaks: float) -> list[dict[str, Any]]:
    groups = {one.name: one.group for one in providers.providers(parse(line), "cpu")}
    rows = []
    for name, value in milliseconds.items():
        about = {"problem": line, "provider": name, "group": groups[name], "kernels": "", "unit": "ms", "runs": 9}
        rows.append({**about, "quantity": "time", "value": value, "p20": value, "p80": value})
    for name, value in peaks.items():
        rows.append({"problem": line, "provider": name, "group": groups[name], "quantity": "peak", "value": value})
    problem = parse(line)
    counted = cost(problem, [Drawn(problem.pixels, problem.pixels)] * len(problem.kinds))._asdict()
    return rows + [
        {"problem": line, "provider": "", "group": "", "quantity": k, "value": v} for k, v in counted.items()
    ]


def _machine(threads: int = 1) -> list[dict[str, Any]]:
    rates = {"copy": 10e9, "read": 8e9, "exp": 1e9, "fma": 10e9}
    about = {"problem": f"machine t{threads}", "provider": "", "group": ""}
    return [{**about, "quantity": name, "value": value} for name, value in rates.items()]


def test_bars_are_met_or_missed_by_the_measured_figures() -> None:
    first, second = (str(parse(line)) for line in ("c2 100x100", "c2 100x200 fresh"))
    slow = str(parse("c2 100x200"))
    rows = [
        *_machine(),
        *_rows(
            first,
            {"cpu": 1.0, "cpu/recompute": 0.5, "published": 30.0, "softmax_gather": 20.0, "closed_form": 11.0},
            cpu=10.0,
            softmax_gather=90.0,
            closed_form=120.0,
        ),
        *_rows(second, {"cpu": 3.0}),
        *_rows(slow, {"cpu": 2.0}),
    ]
    table = report.Table(rows)

    def figure(what: str, line: str = first) -> float:
        return report.figure(sets.Bar(what, 1.0), line, first, table)

    assert figure("published") == 30.0
    assert figure("plain") == 11.0  # the fastest, whoever wrote its gradient
    assert figure("autograd") == 20.0
    assert math.isnan(figure("compiled"))
    assert figure("memory") == 9.0  # against the one that takes least, though it is slower
    assert figure("peak") == 10.0
    assert (figure("ms"), figure("ns")) == (1.0, 100.0)
    assert figure("time", second) == 1.5  # a pixel, over the first of the group
    assert figure("speedup", second) == pytest.approx(1 / 1.5)
    assert figure("fresh", second) == 1.5
    moved = 2 * 4 * (4 + 2) * 10000 + 10000
    assert figure("copy") == pytest.approx(moved / 10e9 / 1e-3)
    assert table.limit(first) == report.Limit("exponentials", pytest.approx(6 * 10000 / 1e9))
    assert figure("limit") == pytest.approx(6 * 10000 / 1e9 / 1e-3)
    (group,) = sets.parse_lines(
        [f"{first} | | published >= 25; plain >= 12; compiled >= 3", f"& {second} | | time <= 2"][:1]
    )
    text = "\n".join(report._bars([group], table))
    assert "| >= 25 times the published formulation | 30 | met |" in text
    assert "| >= 12 times the best plain PyTorch | 11 | **missed** |" in text
    assert "| >= 3 times torch.compile |  | not measured |" in text
    words = " ".join(report.in_words([group], table))
    assert "the fastest in 1 of 1 problems" in words
    assert "Of 2 bars 1 are met, 1 are missed." in words
    assert "exponentials in 3 of 3 problems" in words


def test_where_ours_is_not_the_fastest_the_report_says_so() -> None:
    table = report.Table(_rows(LINE, {"cpu": 2.0, "closed_form": 1.0}))
    assert any(
        line == f"It is NOT in `{LINE}`: closed_form takes 0.50 of its time." for line in report.in_words([], table)
    )


def test_powers_are_fitted_where_there_are_three_sizes() -> None:
    rows = [row for size in (32, 64, 128) for row in _rows(str(parse(f"c2 {size}x{size}")), {"cpu": 1e-3 * size**2})]
    (fit,) = report.series(report.Table(rows))
    assert (fit.along, fit.provider) == ("pixels", "cpu")
    assert fit.exponent == pytest.approx(1.0)


def test_every_plot_is_drawn(tmp_path: Path) -> None:
    rows = _machine()
    for size in (32, 64, 128):
        milliseconds = {"cpu": 1e-3 * size**2, "published": 1e-2 * size**2}
        rows += _rows(str(parse(f"c2 {size}x{size}")), milliseconds, cpu=2.0, closed_form=5.0)
    run.write_csv(tmp_path / "results.csv", [{**dict.fromkeys(run.COLUMNS, ""), **row} for row in rows])
    drawn = plot.draw_all(tmp_path)
    assert [path.stem for path in drawn] == ["speedup", "memory", "roofline", "scaling"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in drawn)


# ---- the driver ------------------------------------------------------------------------------------------------------


def read(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


QUICK = ["--seconds", "0.01", "--most", "3", "--commit", "abc123"]


@pytest.mark.slow
def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: a measurement a row, the line that reproduces it, the machine, the report, figures."""
    line = "c3 64x96 seg4 cm8 positive+trusted"
    arguments = [line, "--provider", "reference", "published", "closed_form", *QUICK, "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    rows = read(tmp_path)
    assert tuple(rows[0]) == run.COLUMNS
    own = [row for row in rows if row["provider"]]
    assert {row["problem"] for row in own} == {str(parse(line))}
    quantities = {"time", "page faults", "peak", "error of loss", "error of class logits", "error of field"}
    for name in ("reference", "published", "closed_form"):
        assert {row["quantity"] for row in own if row["provider"] == name} == quantities
    for row in own:
        assert row["commit"] == "abc123"
        assert float(row["value"]) >= 0
        if row["quantity"] == "time":
            assert 0 < float(row["p20"]) <= float(row["value"]) <= float(row["p80"])
            assert int(row["runs"]) == 3
    counted = {row["quantity"] for row in rows if row["problem"] == str(parse(line)) and not row["provider"]}
    assert counted == {"bytes", "exponentials", "multiply_adds", "gradients"}
    machine = json.loads((tmp_path / "machine.json").read_text())
    assert machine["command"].startswith("python -m benchmarks 'c3 64x96")
    text = (tmp_path / "report.md").read_text()
    assert text.partition("## In words")[2].strip() in capsys.readouterr().out
    assert f"| `{parse(line)}` | reference: plain PyTorch" in text
    assert {path.name for path in plot.draw_all(tmp_path)} == {"speedup.png", "memory.png"}
    assert (tmp_path / "speedup.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "nothing")])


def in_process(*arguments: str) -> int:
    return run.main([*arguments, "--provider", "reference", *QUICK], run.in_this_process)


def test_a_wrong_provider_fails_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(worker, "complaint", lambda *which: "loss is off by 1")
    assert in_process(LINE, "--mode", "correct") == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.err
    assert "loss is off" in captured.out


def test_a_problem_alone_is_printed_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    assert in_process(LINE, "--mode", "correct") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_budget_is_kept_and_what_it_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert in_process(LINE, "--budget-seconds", "0") == 1
    assert "the time budget was used up" in capsys.readouterr().out


def test_a_disturbed_group_is_timed_again_and_the_quietest_is_kept() -> None:
    # (t1, t2) of each attempt: the second is better than the third, though the third had more of one core
    attempts = iter([(0.5, 1.9), (0.95, 1.7), (0.8, 1.98), (0.95, 1.9)])
    line = "c3 9x9"
    tasks: list[dict[str, Any]] = []

    def source(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        tasks.append(task)
        rows = []
        for threads, share in enumerate(next(attempts), 1):
            problem = str(parse(f"{line} t{threads}"))
            row = {"problem": problem, "provider": "cpu", "group": "ours", "kernels": "", "unit": ""}
            rows.append({**row, "quantity": "error of loss", "value": 0.0})
            rows.append({**row, "quantity": "time", "value": share, "p20": 1, "p80": 1, "runs": 3, "cpu_share": share})
        yield {"index": 0, "rows": rows}

    def measured() -> run.Suite:
        options = run.parse_arguments([line, "--mode", "correct"])
        suite = run.Suite(sets.parse_lines([line, f"& {line} t2"]), options, source)
        suite.measure(lambda: None)
        return suite

    first = measured()
    times = [(row["value"], row["disturbed"]) for row in first.rows if row["quantity"] == "time"]
    assert times == [(0.95, False), (1.7, True)]
    assert [row["quantity"] for row in first.rows].count("error of loss") == 2
    assert [task.get("verified", False) for task in tasks] == [False, True, True]
    assert "**1 times were disturbed**" in first.text()
    assert [row["disturbed"] for row in measured().rows if row["quantity"] == "time"] == [False, False]


def test_a_later_attempt_does_not_verify_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "find_truth", lambda *args: pytest.fail("it was verified before"))
    result = worker.examine([(LINE, ["reference"])], "cpu", {**TASK, "verified": True})
    assert timed(result) == ["reference"]


def test_only_a_whole_table_is_kept_where_results_are() -> None:
    def folder(*arguments: str) -> Path | None:
        return run.default_folder(run.parse_arguments(arguments), "machine")

    assert folder() == run.RESULTS / "machine"
    assert folder("--full") == run.RESULTS / "machine" / "full"
    for part in (["--quick"], ["--no-compile"], ["--mode", "memory"], ["--provider", "ours"], [LINE]):
        assert folder(*part) is None


def test_limits_are_measured_on_all_cores_that_are_asked_for() -> None:
    """The main thread is bound to one under OMP_PROC_BIND, and other threads inherit that."""
    seen = []

    def source(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        seen.append((task["do"], task["groups"], task["threads"]))
        yield {"index": 0, "rows": []}

    options = run.parse_arguments(["--mode", "speed"])
    run.Suite(sets.parse_lines(["c3 9x9", "c3 9x9 t2"]), options, source).measure(lambda: None)
    assert seen[0] == ("limits", [[1, 2]], 2)


def test_a_dead_worker_costs_one_group() -> None:
    """One dies in its group, one on the way to it, one after it has reported: only the groups of the first two are lost."""
    lives = iter(
        [
            [{"index": 0, "begins": True}, {"index": 0, "rows": []}, {"index": 1, "begins": True}],
            [],
            [{"index": 0, "begins": True}, {"index": 0, "rows": []}],
            [{"index": 0, "begins": True}, {"index": 0, "rows": []}],
        ]
    )
    found = list(run.events({"groups": list("abcde")}, lambda task: iter(next(lives))))
    assert [(event["index"], "failed" in event) for event in found] == [
        (0, False),
        (1, True),
        (2, True),
        (3, False),
        (4, False),
    ]


def test_a_silent_worker_is_ended() -> None:
    task = {"do": "examine", "groups": [[(LINE, ["reference"])]], "device": "cpu", "threads": 1, "buffers": "reused"}
    assert list(run.in_a_process({**task, **TASK, "deadline": 1e12}, silence=0.05)) == []


def test_a_lowered_instruction_set_is_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the highest one lay in the folder of the other."""
    monkeypatch.setenv("COARSE_KERNELS_ISA", "baseline")
    assert run.environment("fresh", 1)["COARSE_KERNELS_ISA"] == "baseline"
    monkeypatch.delenv("COARSE_KERNELS_ISA")
    assert "COARSE_KERNELS_ISA" not in run.environment("fresh", 1)


def test_worker_environments_differ_only_in_malloc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    fresh, reused = (run.environment(buffers, 1) for buffers in ("fresh", "reused"))
    assert "MALLOC_MMAP_MAX_" not in fresh  # what the caller had set is not "the default"
    assert reused["MALLOC_MMAP_MAX_"] == "0"
    assert {key: value for key, value in reused.items() if not key.startswith("MALLOC_")} == fresh
    assert fresh["OMP_NUM_THREADS"] == "1"
    assert fresh["OMP_PLACES"] == f"{{{run.cores(1)[0]}}}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mode", "speedy"], "speedy"),
        (["--most", "1"], "--most"),
        (["--device", "nonsense"], "--device"),
        (["--device", "cuda:1"], "--device"),
        (["--quick", "--full"], "not allowed"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run.main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["c3 9x9 nonsense"], [LINE, "--provider", "nobody"], ["c3 9x9 t4096"]])
def test_bad_problems(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([*arguments, "--mode", "correct"], run.in_this_process) != 0
    captured = capsys.readouterr()
    assert "expected" in captured.err + captured.out


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run.main(["--device", "cuda"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert "no GPU" in err


def test_no_fused_backend_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run.backends, "explain", lambda device: {"cpu": "it was not built", "reference": None})
    monkeypatch.setattr(run.coarse_kernels, "available_backends", lambda device: ("reference",))
    assert run.main([]) == 2
    assert "it was not built" in capsys.readouterr().err


def test_quick_is_what_a_bar_names_and_full_compiles_everything() -> None:
    quick, usual, full = (
        run.choose_groups(run.parse_arguments(arguments)) for arguments in (["--quick"], [], ["--full"])
    )
    assert all(any(entry.bars for entry in group) for group in quick)
    assert len(quick) < len(usual) < len(full)
    names = {str(entry.problem): entry.providers for group in full for entry in group}
    assert "compiled:softmax_gather:max-autotune-no-cudagraphs" in names[str(parse("c19 128x256"))]


# ---- this checkout against another ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_against_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Real processes: a row with a ratio around 1, whatever else the machine does."""
    options = ["--provider", "reference", "--rounds", "5", "--budget", "0.5"]
    assert against.main([str(run.ROOT), LINE, *options]) == 0
    out = capsys.readouterr().out
    cells = next(line for line in out.splitlines() if line.startswith(f"| `{LINE}`")).split(" | ")
    assert 0.1 < float(cells[4]) < 10
    assert int(cells[6]) == 5
    assert "geometric mean" in out


def test_against_has_the_rows_of_the_table(tmp_path: Path) -> None:
    rows = against.parse_arguments([str(run.ROOT)]).rows
    entries = [entry for group in sets.read("cpu") for entry in group]
    assert {problem for problem, _ in rows} == {entry.problem for entry in entries}
    assert (parse("c19 128x256"), "cpu/recompute") in rows


def test_against_what_is_no_checkout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        against.main([str(tmp_path)])
    assert exit_.value.code == 2
    assert "OTHER_CHECKOUT" in capsys.readouterr().err


@pytest.mark.slow
def test_against_a_checkout_that_does_not_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "coarse_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit(3)")
    assert against.main([str(tmp_path), LINE, "--provider", "reference"]) == 1
    assert "ended with status 3" in capsys.readouterr().err
