"""What only the Triton backend has to show, on CPU tensors with TRITON_INTERPRET=1. Run by tests/kernels.py."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import triton
import triton.language as tl

import coarse_kernels as ck
from coarse_kernels.backends import operator, reference
from coarse_kernels.backends.triton import launch, matrix, table, trusted
from tests.contract import GRADIENT_APART, GRADIENT_FLOOR, gradient_bound, loss_bound
from tests.floats_formed import FloatsFormed
from tests.helpers import (
    SCHEDULES,
    check,
    evaluate,
    generator,
    gradient_error,
    loss_error,
    make_problem,
    random_transition,
)

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.kernels]

BACKEND = "triton"
ALL_OF_ONE = operator.SEG | operator.cm_bit(0) | operator.transition_bit(0)


@pytest.fixture
def tiles_of_a_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The tiles that a GPU gets, instead of the interpreter's large ones: masked ends, several programs an image."""
    seen: list[Any] = []
    pixel_tile, cell_tile = table.pixel_tile, table.cell_tile

    def pixels(*args: Any) -> table.PixelTile:
        seen.append(pixel_tile(*args[:-1], False))
        return seen[-1]

    def cells(*args: Any) -> table.CellTile:
        seen.append(cell_tile(*args[:-1], False))
        return seen[-1]

    monkeypatch.setattr(table, "pixel_tile", pixels)
    monkeypatch.setattr(table, "cell_tile", cells)
    yield seen
    assert seen


@pytest.mark.parametrize(
    ("classes", "size", "grid"),
    [
        (2, (3, 101), None),  # 303 pixels: two blocks of 256
        (3, (2, 70), None),
        (7, (1, 65), None),  # 64 + 1
        (11, (1, 33), None),
        (19, (1, 40), None),
        (33, (1, 33), None),  # columns in five rounds, of which the last has one
        (70, (1, 33), None),
        (130, (1, 2), None),
        (2, (9, 10), (2, 2)),
        (5, (7, 8), (2, 1)),
        (11, (6, 6), (1, 2)),
        (19, (4, 5), (2, 2)),
        (33, (3, 4), (1, 2)),  # two blocks of columns
        (3, (3, 4, 4), (2, 2, 2)),
        (11, (2, 3, 3), (1, 2, 2)),
    ],
)
@pytest.mark.parametrize("stream", ["positive", "random"])
def test_the_tiles_of_a_device(
    tiles_of_a_device: list[Any], stream: str, classes: int, size: tuple[int, ...], grid: tuple[int, ...] | None
) -> None:
    problem = make_problem(classes, size, grid, batch=1, stream=stream, trace_weight=0.1, reduction="sum")
    check(problem, BACKEND)


@pytest.mark.parametrize("classes", [3, 33])
@pytest.mark.parametrize("grid", [None, (2, 2), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.parametrize("cm_batch", [1, 2])
def test_offsets_in_64_bits(
    monkeypatch: pytest.MonkeyPatch, cm_batch: int, grid: tuple[int, int] | None, classes: int
) -> None:
    """From 2^31 elements on; what is tested is that the wide path computes the same."""
    size = (4, 9) if classes == 3 else (2, 5)
    problem = make_problem(classes, size, grid, cm_batch=cm_batch, stream="random", trace_weight=0.1)
    narrow = evaluate(problem, BACKEND)
    monkeypatch.setattr(launch, "WIDE_FROM", 0)
    wide = check(problem, BACKEND)
    for name, grad in wide.gradients.items():
        assert torch.equal(grad, narrow.gradients[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("cm_batch", [1, 3])
@pytest.mark.parametrize("grid", [(3, 4), (1, 1)], ids=["strided", "one-point"])
def test_without_workspace(
    monkeypatch: pytest.MonkeyPatch, grid: tuple[int, int], cm_batch: int, dtype: torch.dtype
) -> None:
    """A field too large for copies: summed where it is, in its own layout (in float32 first where it has 16 bits)."""
    monkeypatch.setattr(launch, "WORKSPACE", 0)
    problem = make_problem(3, (9, 14), grid, batch=3, cm_batch=cm_batch, trace_weight=0.1, reduction="sum").to(dtype)
    check(problem, BACKEND)


@pytest.mark.parametrize("busy", [1, 7, 64])
def test_any_number_of_copies(monkeypatch: pytest.MonkeyPatch, busy: int) -> None:
    """A large cell is cut; shares of unequal length, or empty ones, add up to the same."""
    monkeypatch.setattr(launch, "INTERPRETED_BUSY", busy)
    monkeypatch.setattr(table, "_INTERPRETED", 512)  # 16 pixels at a time
    check(make_problem(3, (13, 17), (1, 2), batch=2, stream="random", trace_weight=0.1), BACKEND)


@pytest.mark.parametrize("grid", [None, (3, 4), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.parametrize("cm_batch", [1, 3])
def test_two_runs_agree_bit_for_bit(cm_batch: int, grid: tuple[int, int] | None) -> None:
    problem = make_problem(3, (20, 31), grid, batch=3, cm_batch=cm_batch, stream="random", trace_weight=0.1)
    first, second = evaluate(problem, BACKEND), evaluate(problem, BACKEND)
    assert torch.equal(first.loss, second.loss)
    for name, grad in first.gradients.items():
        assert torch.equal(grad, second.gradients[name]), name


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e-9, 65536.0, 1 / 3])
def test_a_float_in_two_parts(value: float) -> None:
    high, low = launch.two_floats(value)
    assert abs(high + low - value) <= 2**-47 * abs(value)
    assert abs(low) <= 2**-23 * abs(high)


def test_too_many_classes_are_refused_by_name() -> None:
    seg, cm = torch.randn(1, 257, 2), torch.randn(1, 257, 257, 1)
    labels = torch.tensor([[0, 256]])
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run: it serves up to 256 classes, got 257"):
        ck.annotation_nll(seg, cm, labels, backend=BACKEND)


def arguments(
    seg: torch.Tensor, kinds: Sequence[ck.Drawings], wanted: int = 0, per_pixel: bool = False, **lists: Any
) -> operator.Arguments:
    """Of the operator; nothing is scaled."""
    absent = seg.new_empty(0, dtype=torch.float64 if seg.dtype == torch.float64 else torch.float32)

    def each(name: str) -> list[torch.Tensor]:
        return [absent if getattr(k, name) is None else getattr(k, name) for k in kinds]

    names = ("labels", "cm_logits", "transition", "class_weight", "pixel_weight")
    numbers = [1.0 if per_pixel else k.weight for k in kinds], [k.trace_weight for k in kinds], 255, per_pixel, wanted
    call = operator.Arguments(seg, *map(each, names), [absent] * len(kinds), *numbers)
    return call._replace(**lists)


def run(call: operator.Arguments) -> operator.Outputs:
    return operator.Outputs(*torch.ops.coarse_kernels_triton.annotation_objective(*call))


def same(first: operator.Outputs, second: operator.Outputs) -> bool:
    leaves = torch.utils._pytree.tree_leaves
    return all(torch.equal(a, b) for a, b in zip(leaves(first), leaves(second), strict=True))


def test_a_wrong_argument_of_the_operator_is_named() -> None:
    seg, cm, labels = torch.randn(1, 3, 4), torch.randn(1, 3, 3, 2), torch.zeros(1, 1, 4, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"transition: expected torch\.float32"):
        run(arguments(seg, [ck.Drawings(labels, cm, torch.eye(3).double())]))
    with pytest.raises(ValueError, match="cm_logits: expected a grid of 1 point"):
        run(arguments(seg, [ck.Drawings(labels, torch.randn(1, 3, 3, 5))]))
    with pytest.raises(ValueError, match="seg_logits: expected a grid of 1 point"):
        run(arguments(torch.randn(1, 3, 5), [ck.Drawings(labels, cm)]))


@st.composite
def problems(draw: st.DrawFn) -> Any:
    rank = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, {1: 30, 2: 9, 3: 4}[rank])) for _ in range(rank))
    grid = tuple(draw(st.sampled_from(sorted({1, 2, 3, s}))) for s in size)
    grid = tuple(min(g, s) for g, s in zip(grid, size, strict=True))
    batch = draw(st.integers(1, 3))
    return make_problem(
        draw(st.integers(2, 7)),
        size,
        grid,
        batch=batch,
        cm_batch=draw(st.sampled_from([1, batch])),
        stream=draw(st.sampled_from(["positive", "uniform", "random"])),
        ignored=draw(st.sampled_from(["none", "some", "image"])),
        label_dtype=draw(st.sampled_from([torch.uint8, torch.int64])),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0])),
        seed=draw(st.integers(0, 99)),
        trace_weight=draw(st.sampled_from([0.0, 0.05, 1.0])),
        reduction=draw(st.sampled_from(["mean", "sum", "none"])),
    )


@hypothesis.given(problem=problems(), schedule=st.sampled_from(SCHEDULES))
@hypothesis.settings(max_examples=30)
def test_any_small_problem(problem: Any, schedule: str) -> None:
    check(problem, BACKEND, schedule)


def test_labels_out_of_range_are_no_labels() -> None:
    """Nobody looks at them on a GPU: they count in no sum and index nothing."""
    problem = make_problem(3, (4, 9), (2, 3), stream="random", ignored="none", label_dtype=torch.int64)
    draw = torch.rand(problem.labels.shape, generator=generator(1))
    masked = problem.labels.masked_fill(draw < 0.4, 255)
    strange = masked.clone()
    strange[(masked == 255) & (draw < 0.2)] = 2**40 + 1
    strange[(masked == 255) & (draw < 0.1)] = -1
    runs = [
        run(
            arguments(
                problem.seg,
                [ck.Drawings(labels.unsqueeze(1), problem.cm, problem.transition, trace_weight=0.1)],
                ALL_OF_ONE,
            )
        )
        for labels in (masked, strange)
    ]
    assert same(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_gradient_is_scaled_where_it_lies(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 5, 7, generator=generator(0)).to(dtype)
    factor = torch.tensor(0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scaled, same = gradient.clone(), gradient.clone()
    torch.ops.coarse_kernels_triton.scale_(scaled, factor)
    torch.ops.coarse_kernels_triton.scale_(same, torch.ones_like(factor))
    assert torch.equal(scaled, gradient * 0.5)
    assert torch.equal(same, gradient)


# --- trusted kinds: class logits on their own grid ----------------------------------------------------------------------------

Kinds = tuple[ck.Drawings, ...]
EVERYTHING = operator.SEG | operator.transition_bit(0) | operator.transition_bit(1)  # of two trusted kinds


def drawn(
    classes: int,
    size: tuple[int, ...],
    *kinds: str,
    layers: Sequence[int] = (1,),
    batch: int = 2,
    ignored: str = "some",
    weighted: bool = False,
    label_dtype: torch.dtype = torch.uint8,
    seed: int = 0,
) -> Kinds:
    """Trusted drawings: "positive", "uniform" or "random" ones, with as many layers as ``layers`` says in turn."""
    gen, found = generator(seed), []
    for n, kind in enumerate(kinds):
        shape = (batch, layers[n % len(layers)], *size)
        labels = torch.randint(0, classes, shape, generator=gen)
        if ignored != "none":
            labels[torch.rand(shape, generator=gen) < (0.4 if ignored == "some" else 2.0)] = 255
            labels.view(*shape[:2], -1)[..., : labels[0, 0].numel() // 4] = 255
        options: dict[str, Any] = {"weight": 0.5 + n} if len(kinds) > 1 else {}
        if weighted:
            options["class_weight"] = torch.rand(classes, generator=gen) + 0.1
            options["pixel_weight"] = torch.rand(shape, generator=gen).masked_fill(labels == 255, math.nan)
            options["pixel_weight"][torch.rand(shape, generator=gen) < 0.2] = 0.0
        transition = {"uniform": ck.uniform_transition, "random": lambda c: random_transition(c, gen)}.get(kind)
        found.append(
            ck.Drawings(labels.to(label_dtype), None, None if transition is None else transition(classes), **options)
        )
    return tuple(found)


def of_dtype(kinds: Kinds, dtype: torch.dtype) -> Kinds:
    def cast(t: Any) -> Any:
        return t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t

    return tuple(
        dataclasses.replace(k, **{f.name: cast(getattr(k, f.name)) for f in dataclasses.fields(k)}) for k in kinds
    )


def objective(
    seg: torch.Tensor, kinds: Kinds, backend: str, schedule: str = "one_pass", *, learn: bool = True, **options: Any
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Losses (total, then those of each part) and gradients (class logits, then transition and field of each kind)."""
    seg = seg.detach().clone().requires_grad_()

    def leaves(k: ck.Drawings) -> ck.Drawings:
        transition = None if k.transition is None else k.transition.clone().requires_grad_(learn)
        cm = None if k.cm_logits is None else k.cm_logits.clone().requires_grad_()
        return dataclasses.replace(k, transition=transition, cm_logits=cm)

    kinds = tuple(map(leaves, kinds))
    with ck.use_schedule(schedule):
        out = ck.annotation_objective(seg, kinds, backend=backend, **options)
        (
            out.loss * torch.linspace(0.5, 1.5, max(1, out.loss.numel())).view(out.loss.shape).to(out.loss)
        ).sum().backward()
    losses = [out.loss.detach(), *(t.detach() for part in out.parts for t in (part.loss, part.nll, part.trace))]
    found = (seg, *(t for k in kinds for t in (k.transition, k.cm_logits)))
    return losses, [t.grad for t in found if t is not None and t.grad is not None]


def assert_as_good_as_reference(
    seg: torch.Tensor, kinds: Kinds, schedule: str = "one_pass", scale: float = 1.0, **options: Any
) -> Any:
    """Against the reference in float64, with the error of the reference in the same dtype as the measure. ``scale``: of the
    logits."""
    dtype, real = seg.dtype, torch.float64 if seg.dtype == torch.float64 else torch.float32
    truth = objective(seg.double(), of_dtype(kinds, torch.float64), "reference", **options)
    stored = tuple(
        dataclasses.replace(wide, cm_logits=k.cm_logits) for wide, k in zip(of_dtype(kinds, real), kinds, strict=True)
    )
    plain = objective(seg, stored, "reference", **options)
    ours = objective(seg, stored, BACKEND, schedule, **options)
    for got, want, usual in zip(ours[0], truth[0], plain[0], strict=True):
        assert got.dtype == real
        bound = loss_bound(loss_error(usual, want), dtype, scale)
        assert loss_error(got, want) <= bound, (got, want, usual)
    for got, want, usual in zip(ours[1], truth[1], plain[1], strict=True):
        assert got.dtype == usual.dtype
        bound = gradient_bound(gradient_error(usual, want), got.dtype, scale)
        assert gradient_error(got, want) <= bound, (gradient_error(got, want), bound)
    return ours


def logits(classes: int, grid: tuple[int, ...], batch: int = 2, scale: float = 3.0, seed: int = 1) -> torch.Tensor:
    return scale * torch.randn(batch, classes, *grid, generator=generator(seed))


PLACES = {
    "pixels": ((7, 10), (7, 10)),
    "stride_4": ((8, 12), (2, 3)),
    "odd": ((9, 13), (4, 5)),
    "minus_1": ((5, 6), (4, 5)),
    "one_point": ((6, 9), (1, 1)),
    "equal_height": ((5, 12), (5, 4)),
    "one_row": ((5, 12), (1, 4)),
    "line": ((41,), (41,)),
    "line_strided": ((41,), (7,)),
    "volume": ((3, 4, 5), (3, 4, 5)),
    "volume_strided": ((4, 5, 6), (2, 5, 3)),
    "volume_all": ((4, 4, 6), (2, 3, 2)),
    "one_pixel": ((1, 1), (1, 1)),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["positive", "uniform", "random"])
def test_a_trusted_kind(kind: str, place: str) -> None:
    size, grid = PLACES[place]
    assert_as_good_as_reference(logits(5, grid), drawn(5, size, kind, layers=[2 if place == "odd" else 1]))


@pytest.mark.parametrize(
    ("classes", "reduction"), [(2, "mean"), (2, "sum"), (5, "mean"), (5, "sum"), (19, "mean"), (33, "sum")]
)
@pytest.mark.parametrize("place", ["pixels", "odd", "one_point"])
def test_trusted_kinds_together(classes: int, reduction: str, place: str) -> None:
    """33: more than a thread holds."""
    size, grid = PLACES[place]
    kinds = drawn(classes, size, "positive", "random", "uniform", layers=[1, 2, 3], weighted=reduction == "sum")
    assert_as_good_as_reference(
        logits(classes, grid), kinds, reduction=reduction, learn=classes < 33 or place == "pixels"
    )


@pytest.mark.parametrize("place", ["pixels", "odd"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_maps_of_trusted_kinds(schedule: str, place: str) -> None:
    size, grid = PLACES[place]
    assert_as_good_as_reference(
        logits(5, grid), drawn(5, size, "positive", "random", layers=[1, 2], weighted=True), schedule, reduction="none"
    )


@pytest.mark.parametrize("place", ["pixels", "stride_4", "one_point"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_of_trusted_kinds(dtype: torch.dtype, place: str) -> None:
    size, grid = PLACES[place]
    assert_as_good_as_reference(
        logits(5, grid).to(dtype), drawn(5, size, "positive", "random", label_dtype=torch.int64)
    )


@pytest.mark.parametrize("place", ["pixels", "odd"])
@pytest.mark.parametrize("scale", [0.0, 100.0, 1e4])
@pytest.mark.parametrize("classes", [5, 33])
def test_logit_scale_of_trusted_kinds(classes: int, scale: float, place: str) -> None:
    size, grid = PLACES[place]
    kinds = drawn(classes, size, "positive", "random", "uniform")
    # not learnt: 1 / D leaves float32's range. At the pixels logits are exact, however large; between points they are rounded.
    allowed = scale if place == "odd" else 1.0
    assert_as_good_as_reference(logits(classes, grid, scale=scale), kinds, scale=allowed, learn=False)


@pytest.mark.parametrize("place", ["pixels", "odd"])
def test_nothing_labelled_by_trusted_kinds(place: str) -> None:
    size, grid = PLACES[place]
    seg = torch.full_like(logits(5, grid), math.nan)
    losses, gradients = objective(seg, drawn(5, size, "positive", "random", ignored="all"), BACKEND)
    assert all(torch.equal(t, torch.zeros_like(t)) for t in (*losses, *gradients))


@pytest.mark.parametrize("classes", [5, 33])
def test_nan_where_no_trusted_layer_has_a_label(classes: int) -> None:
    """On the pixel grid, where it is the pixel's own; and two layers leave different pixels alone."""
    size = (6, 8)
    kinds = drawn(classes, size, "positive", "random", layers=[2, 1])
    known = torch.cat([k.labels != 255 for k in kinds], 1).any(1, keepdim=True)
    seg = logits(classes, size)
    clean = assert_as_good_as_reference(torch.where(known, seg, 0.0), kinds)
    for ours, expected in zip(objective(torch.where(known, seg, math.nan), kinds, BACKEND), clean, strict=True):
        for got, want in zip(ours, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("classes", [5, 33])
@pytest.mark.parametrize("grid", [(4, 6), (2, 6), (1, 1)])
def test_labels_that_no_class_explains(grid: tuple[int, int], classes: int) -> None:
    """nll = inf and no gradient; where their weight is 0 they count for nothing."""
    size = (4, 6)
    kinds = drawn(classes, size, "positive", "random", ignored="none", layers=[2, 1])
    seg = logits(classes, grid)
    if grid != (2, 6):  # 0 * inf
        seg[:, 1] = -math.inf
    transition = kinds[1].transition
    assert transition is not None
    transition[:, 2] = 0.0  # nobody reports 2
    transition /= transition.sum(1, keepdim=True)
    losses, gradients = objective(seg, kinds, BACKEND)
    assert losses[0] == math.inf
    expected = objective(seg, kinds, "reference")
    for got, want in zip(gradients, expected[1], strict=True):
        assert got.isfinite().all()
        assert gradient_error(got, want) < 1e-5
    weight = torch.ones(classes)
    weight[1:3] = 0.0
    some = tuple(dataclasses.replace(k, class_weight=weight) for k in kinds)
    assert assert_as_good_as_reference(seg, some)[0][0].isfinite()
    assert_as_good_as_reference(seg, kinds, reduction="none")


@pytest.mark.parametrize("place", ["pixels", "odd"])
def test_a_nan_at_a_label_is_seen(place: str) -> None:
    size, grid = PLACES[place]
    kinds = drawn(5, size, "positive", "random", ignored="none")
    seg = logits(5, grid)
    seg[0, 3, 1, 1] = math.nan
    losses, gradients = objective(seg, kinds, BACKEND)
    assert losses[0].isnan()
    assert gradients[0][0].isnan().any()
    assert gradients[1].isnan().any()
    assert gradients[0][1].isfinite().all()  # the other image


def call_of(seg: torch.Tensor, kinds: Kinds, wanted: int) -> operator.Outputs:
    return run(arguments(seg, kinds, wanted))


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("per_pixel", [False, True])
def test_opcheck(per_pixel: bool, wanted: bool) -> None:
    """A trusted kind, and one of two layers with a matrix."""
    size, grid = PLACES["stride_4"]
    first, second = drawn(3, size, "random", "random", layers=[1, 2])
    second = dataclasses.replace(second, cm_logits=torch.randn(1, 3, 3, 1, 1).bfloat16(), trace_weight=0.1)
    call = arguments(logits(3, grid).bfloat16(), [first, second], per_pixel=per_pixel)
    call = call._replace(wanted=sum(bit for bit, _ in operator.differentiable(call)) if wanted else 0)
    overload = torch.ops.coarse_kernels_triton.annotation_objective.default
    torch.library.opcheck(overload, tuple(call), test_utils=("test_schema", "test_faketensor"))
    posterior = torch.ops.coarse_kernels_triton.objective_posterior.default
    torch.library.opcheck(posterior, (*call[:4], 255), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("place", ["pixels", "stride_4", "one_point"])
def test_two_runs_of_trusted_kinds_agree_bit_for_bit(place: str) -> None:
    size, grid = PLACES[place]
    seg, kinds = logits(5, grid), drawn(5, size, "positive", "random", layers=[1, 2])
    assert same(call_of(seg, kinds, EVERYTHING), call_of(seg, kinds, EVERYTHING))


@pytest.mark.parametrize(
    ("classes", "place"), [(5, "pixels"), (5, "odd"), (5, "volume_strided"), (33, "pixels"), (33, "one_row")]
)
def test_trusted_kinds_with_offsets_in_64_bits(monkeypatch: pytest.MonkeyPatch, classes: int, place: str) -> None:
    size, grid = PLACES[place]
    seg, kinds = logits(classes, grid), drawn(classes, size, "positive", "random", layers=[1, 2])
    narrow, labels = call_of(seg, kinds, EVERYTHING), ck.label_map(seg, size, backend=BACKEND)
    monkeypatch.setattr(launch, "WIDE_FROM", 0)
    assert same(narrow, call_of(seg, kinds, EVERYTHING))
    assert torch.equal(labels, ck.label_map(seg, size, backend=BACKEND))


def test_strange_labels_of_trusted_kinds_are_none() -> None:
    size, grid = PLACES["odd"]
    seg = logits(5, grid)
    kinds = drawn(5, size, "positive", "random", label_dtype=torch.int64)
    strange = tuple(dataclasses.replace(k, labels=k.labels.clone()) for k in kinds)
    for n, kind in enumerate(strange):
        draw = torch.rand(kind.labels.shape, generator=generator(n))
        kind.labels[(kind.labels == 255) & (draw < 0.5)] = 2**40 + 1
        kind.labels[(kind.labels == 255) & (draw < 0.7)] = -1
    assert same(call_of(seg, kinds, EVERYTHING), call_of(seg, strange, EVERYTHING))


@pytest.mark.parametrize(
    "wanted", [0, operator.SEG, operator.transition_bit(0), operator.transition_bit(1), EVERYTHING]
)
def test_only_what_is_wanted_of_trusted_kinds(wanted: int) -> None:
    size, grid = PLACES["stride_4"]
    seg, kinds = logits(3, grid), drawn(3, size, "random", "random")
    ours, whole = call_of(seg, kinds, wanted), call_of(seg, kinds, EVERYTHING)
    assert torch.equal(ours.loss, whole.loss)
    assert len(ours.nll) == 2
    assert torch.equal(ours.grad_seg, whole.grad_seg) if wanted & 1 else ours.grad_seg.shape == (0,)
    for k, (got, want) in enumerate(zip(ours.grad_transition, whole.grad_transition, strict=True)):
        assert torch.equal(got, want) if wanted & operator.transition_bit(k) else got.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 1, 4, 6), (2, 0, 4, 6), (2, 1, 0, 6)], ids=["images", "layers", "pixels"])
def test_trusted_kinds_of_nothing(shape: tuple[int, ...]) -> None:
    seg = torch.randn(shape[0], 3, *shape[2:]).requires_grad_()
    labels = torch.zeros(shape, dtype=torch.uint8)
    transition = random_transition(3, generator()).requires_grad_()
    out = ck.annotation_objective(seg, [ck.Drawings(labels), ck.Drawings(labels, None, transition)], backend=BACKEND)
    out.loss.backward()
    assert out.loss == 0
    assert torch.equal(seg.grad, torch.zeros_like(seg))
    assert not transition.grad.any()


@pytest.mark.parametrize("busy", [1, 7, 64])
def test_any_number_of_shares(monkeypatch: pytest.MonkeyPatch, busy: int) -> None:
    monkeypatch.setattr(launch, "INTERPRETED_BUSY", busy)
    grid_tile = table.class_grid_tile
    monkeypatch.setattr(table, "class_grid_tile", lambda *a: grid_tile(*a)._replace(pixels=8))
    assert_as_good_as_reference(logits(3, (1, 2)), drawn(3, (11, 13), "positive", "random"))


@pytest.mark.parametrize(
    ("classes", "size", "grid"),
    [
        (2, (3, 180), (3, 180)),  # 540 pixels: two blocks of 512
        (5, (3, 50), (3, 50)),
        (19, (2, 70), (2, 70)),
        (33, (2, 70), (2, 70)),
        (3, (8, 8), (2, 2)),
        (33, (5, 6), (2, 2)),
        (5, (9, 17), (3, 17)),  # more than one block of points
        (3, (2, 4, 6), (2, 2, 3)),
        (3, (5, 70), (1, 1)),
    ],
)
def test_the_tiles_of_a_device_for_trusted_kinds(
    monkeypatch: pytest.MonkeyPatch, classes: int, size: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    tile, grid_tile = table.class_tile, table.class_grid_tile
    monkeypatch.setattr(table, "class_tile", lambda *a: tile(*a[:-1], False))
    monkeypatch.setattr(table, "class_grid_tile", lambda *a: grid_tile(*a[:-1], False))
    monkeypatch.setattr(trusted, "BUSY", 4)
    seg = logits(classes, grid, batch=1)
    assert_as_good_as_reference(
        seg, drawn(classes, size, "positive", "random", layers=[1, 2], batch=1), reduction="sum"
    )
    labels = ck.label_map(seg, size, backend=BACKEND)
    assert torch.equal(labels, ck.label_map(seg, size, backend="reference"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(6, 8), (3, 2)])
def test_trusted_kinds_beside_one_with_a_matrix(grid: tuple[int, int], dtype: torch.dtype) -> None:
    """In any order; the bits of ``wanted`` are those of their own places."""
    trusted_kinds = drawn(3, (6, 8), "random", "positive", layers=[1, 2])
    cm = torch.randn(2, 3, 3, 2, 2, generator=generator(5)).to(dtype)
    other = drawn(3, (6, 8), "uniform", seed=9)[0]
    kinds = (trusted_kinds[0], dataclasses.replace(other, cm_logits=cm, trace_weight=0.1), trusted_kinds[1])
    assert_as_good_as_reference(logits(3, grid).to(dtype), kinds)


# --- kinds with a matrix: class logits on their own grid, layers, several kinds -----------------------------------------------


def mixed_kinds(
    classes: int, size: tuple[int, ...], field: tuple[int, ...], dtype: torch.dtype, batch: int = 2
) -> Kinds:
    """Two layers with a field and a learned transition, a trusted kind, and one matrix for all images."""
    kinds = drawn(classes, size, "random", "uniform", "positive", layers=[2, 1, 1], batch=batch, weighted=True)
    cm = 2 * torch.randn(batch, classes, classes, *field, generator=generator(7))
    one = 2 * torch.randn(1, classes, classes, *(1 for _ in size), generator=generator(8))
    return (
        dataclasses.replace(kinds[0], cm_logits=cm.to(dtype), trace_weight=0.1),
        kinds[1],
        dataclasses.replace(kinds[2], cm_logits=one.to(dtype)),
    )


FLOAT, HALF = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("place", "field", "dtype"),
    [
        ("pixels", "pixel", HALF),
        ("pixels", "one_point", FLOAT),
        ("odd", "pixel", HALF),
        ("odd", "strided", FLOAT),
        ("odd", "one_point", HALF),
        ("one_point", "pixel", FLOAT),
        ("one_point", "one_point", FLOAT),
        ("line_strided", "strided", FLOAT),
        ("volume_strided", "one_point", FLOAT),
    ],
)
def test_kinds_with_a_matrix(monkeypatch: pytest.MonkeyPatch, place: str, field: str, dtype: torch.dtype) -> None:
    size, grid = PLACES[place]
    points = {"pixel": size, "strided": tuple(min(2, s) for s in size), "one_point": tuple(1 for _ in size)}[field]
    monkeypatch.setattr(launch, "INTERPRETED_BAND", 0)  # 64 pixels of both images
    assert_as_good_as_reference(
        logits(3, grid).to(dtype), mixed_kinds(3, size, points, dtype), reduction="mean" if field == "pixel" else "sum"
    )


@pytest.mark.parametrize("most", [1, 4, 9, 23, 30, 59, 60, 1000])
def test_bands_are_boxes_that_cover_the_image(most: int) -> None:
    size = (3, 5, 6)
    axes = tuple(launch.Axis(s, 2) for s in size)
    pixels = torch.arange(90).view(size)
    seen = []
    for band in matrix.bands(axes, most):
        inside = pixels[tuple(slice(*limits) for limits in band.box)].flatten()
        assert torch.equal(inside, torch.arange(band.begin, band.end))
        assert len(inside) <= most
        seen.append(inside)
    assert torch.equal(torch.cat(seen), torch.arange(90))


@pytest.mark.parametrize(
    ("classes", "size", "grid"),
    [(3, (6, 7), (3, 4)), (2, (5, 70), (1, 1)), (2, (3, 4, 6), (2, 2, 2)), (2, (2, 1024), (1, 512))],
)
def test_the_tiles_of_a_device_that_fold_a_band(
    monkeypatch: pytest.MonkeyPatch, classes: int, size: tuple[int, ...], grid: tuple[int, ...]
) -> None:
    """Few points: a program for a class; and more of them."""
    tile = table.gather_tile
    monkeypatch.setattr(table, "gather_tile", lambda *a: tile(*a[:-1], False))
    monkeypatch.setattr(launch, "INTERPRETED_BAND", 1 << 13)
    kind = drawn(classes, size, "positive", batch=1)[0]
    cm = torch.randn(1, classes, classes, *(1 for _ in size), generator=generator(5))
    call = arguments(logits(classes, grid, batch=1), [dataclasses.replace(kind, cm_logits=cm)], operator.SEG)
    seg = call.seg_logits.double().requires_grad_()
    kinds = of_dtype((dataclasses.replace(kind, cm_logits=cm),), torch.float64)
    ck.annotation_objective(seg, kinds, backend="reference", reduction="sum").loss.backward()
    assert gradient_error(run(call).grad_seg, seg.grad) < 2e-5  # of a sum that cancels


def test_kinds_with_a_matrix_in_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    size, grid = PLACES["odd"]
    call = arguments(logits(3, grid), mixed_kinds(3, size, (1, 1), torch.float32))
    call = call._replace(wanted=sum(bit for bit, _ in operator.differentiable(call)))
    posterior = torch.ops.coarse_kernels_triton.objective_posterior
    narrow, r = run(call), posterior(*call[:4], 255)
    monkeypatch.setattr(launch, "WIDE_FROM", 0)
    assert same(narrow, run(call))
    assert torch.equal(r, posterior(*call[:4], 255))


def test_only_what_is_wanted_of_kinds_with_a_matrix() -> None:
    size, grid = PLACES["stride_4"]
    call = arguments(logits(3, grid), mixed_kinds(3, size, (1, 1), torch.float32))
    bits = [bit for bit, _ in operator.differentiable(call)]
    whole = run(call._replace(wanted=sum(bits)))
    for bit in (0, *bits):
        ours = run(call._replace(wanted=bit))
        assert torch.equal(ours.loss, whole.loss)
        formed = [torch.utils._pytree.tree_leaves(out[4:]) for out in (ours, whole)]
        pairs = [(got, want) for got, want in zip(*formed, strict=True) if got.numel()]
        assert len(pairs) == (bit > 0)
        assert all(torch.equal(got, want) for got, want in pairs)


def test_nothing_is_as_large_as_the_class_logits_of_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither them nor their gradient. The posterior is, and nothing beside it."""
    size, grid, classes = (8, 12), (2, 3), 5
    seg, kinds = logits(classes, grid), mixed_kinds(classes, size, (2, 2), torch.float32)
    monkeypatch.setattr(reference, "interpolate", None)
    with FloatsFormed() as formed:
        objective(seg, kinds, BACKEND)
    assert formed.largest < 2 * classes * 8 * 12
    formed = FloatsFormed()
    with torch.no_grad(), formed:
        ck.annotation_posterior(seg, kinds, backend=BACKEND)
    assert formed.largest == 2 * classes * 8 * 12
    assert sum(formed.calls[f"aten.{name}"] for name in ("new_empty", "empty", "empty_like")) <= 3, formed.calls


@pytest.mark.parametrize(("grid", "field"), [((6, 8), (6, 8)), ((3, 2), (1, 1))], ids=["pixel", "strided"])
def test_a_gradient_of_16_bits_that_is_a_sum_is_rounded_once(grid: tuple[int, int], field: tuple[int, int]) -> None:
    """Over layers, kinds and bands; that each were rounded would be seen in half of the numbers."""
    first, second = drawn(3, (6, 8), "random", "positive", layers=[3, 1], ignored="none")
    seg, cm = logits(3, grid).bfloat16(), torch.randn(2, 3, 3, *field, generator=generator(5)).bfloat16()
    ours, exact = (
        run(arguments(s, (dataclasses.replace(first, cm_logits=a), second), ALL_OF_ONE))
        for s, a in ((seg, cm), (seg.float(), cm.float()))
    )
    for got, want in ((ours.grad_seg, exact.grad_seg), (ours.grad_cm[0], exact.grad_cm[0])):
        assert got.dtype == torch.bfloat16
        difference = (got.float() - want.bfloat16().float()).abs()
        assert (difference <= 2**-7 * want.abs()).all()
        assert (difference > 0).double().mean() < 0.02
    assert gradient_error(ours.grad_transition[0], exact.grad_transition[0]) < GRADIENT_FLOOR[torch.float32]


@pytest.mark.parametrize(
    ("place", "classes"), [("pixels", 33), ("odd", 3), ("odd", 33), ("one_point", 3), ("volume_strided", 3)]
)
def test_posterior_of_kinds_and_layers(place: str, classes: int) -> None:
    size, grid = PLACES[place]
    seg, kinds = logits(classes, grid), mixed_kinds(classes, size, tuple(min(2, s) for s in size), torch.float32)
    wide = ck.annotation_posterior(seg.double(), of_dtype(kinds, torch.float64), backend="reference")
    assert gradient_error(ck.annotation_posterior(seg, kinds, backend=BACKEND), wide) < GRADIENT_APART
    assert gradient_error(ck.annotation_posterior(seg, kinds[:1], backend=BACKEND), ck.annotation_posterior(
        seg.double(), of_dtype(kinds[:1], torch.float64), backend="reference")) < GRADIENT_APART  # fmt: skip


def test_posterior_where_a_product_underflows_and_where_nothing_explains_the_labels() -> None:
    size = (1, 4)
    labels = torch.tensor([[0, 1, 2, 255]]).view(1, 1, *size)
    cm = torch.zeros(1, 3, 3, 1, 1)
    cm[:, :, 0], cm[:, 0] = (
        torch.tensor([0.0, -80.0, -90.0]).view(3, 1, 1),
        torch.tensor([0.0, -80.0, -81.0]).view(3, 1, 1),
    )
    seg = torch.tensor([[0.0, -300.0, 100.0]]).view(1, 3, 1, 1).expand(1, 3, *size).contiguous()
    seg[..., 3] = math.nan  # is p, where there is no label
    kind = ck.Drawings(torch.cat([labels] * 3, 1), cm)
    trusted_kind = ck.Drawings(torch.tensor([[255, 0, 2, 255]]).view(1, 1, *size), None, torch.tensor([
        [0.0, 0.5, 0.5], [0.0, 0.5, 0.5], [0.0, 0.5, 0.5]
    ]))  # fmt: skip
    for kinds in ((kind,), (kind, trusted_kind), (trusted_kind, ck.Drawings(labels), kind)):
        ours = ck.annotation_posterior(seg, kinds, backend=BACKEND)
        want = ck.annotation_posterior(seg.double(), of_dtype(kinds, torch.float64), backend="reference")
        assert torch.equal(ours.isnan(), want.isnan())
        assert torch.allclose(ours.double(), want, rtol=1e-5, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("shape", [(0, 1, 4, 6), (2, 0, 4, 6), (2, 1, 0, 6)], ids=["images", "layers", "pixels"])
def test_kinds_with_a_matrix_of_nothing(shape: tuple[int, ...]) -> None:
    for grid in (shape[2:], tuple(min(2, s) for s in shape[2:])):
        seg = torch.randn(shape[0], 3, *grid).requires_grad_()
        cm = torch.randn(shape[0], 3, 3, *grid).requires_grad_()
        labels = torch.zeros(shape, dtype=torch.uint8)
        transition = random_transition(3, generator()).requires_grad_()
        out = ck.annotation_objective(seg, [ck.Drawings(labels, cm, transition)], backend=BACKEND)
        out.loss.backward()
        assert out.loss == 0
        for leaf in (seg, cm, transition):
            assert torch.equal(leaf.grad, torch.zeros_like(leaf))
        r = ck.annotation_posterior(seg.detach(), [ck.Drawings(labels, cm.detach())], backend=BACKEND)
        assert r.shape == (shape[0], 3, *shape[2:])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [2, 19, 33])
def test_label_map(classes: int, place: str) -> None:
    size, grid = PLACES[place]
    seg = logits(classes, grid)
    expected = ck.label_map(seg, size, backend="reference")
    ours = ck.label_map(seg, size, backend=BACKEND)
    assert ours.dtype == expected.dtype == torch.uint8
    assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("classes", [3, 40])
@pytest.mark.parametrize("grid", [(8, 12), (2, 3), (1, 1)])
def test_ties_and_nan_in_a_label_map(grid: tuple[int, int], classes: int, dtype: torch.dtype) -> None:
    """Small integers at a stride of 4 are interpolated exactly, so that equals are equal."""
    seg = torch.randint(-1, 2, (3, classes, *grid), generator=generator(3)).to(dtype)
    seg[1][torch.rand(seg[1].shape, generator=generator(4)) < 0.05] = math.nan
    if grid != (2, 3):  # 0 * inf
        seg[2][torch.rand(seg[2].shape, generator=generator(5)) < 0.5] = -math.inf
        seg[2, :, 0, 0] = -math.inf
    ours = ck.label_map(seg, (8, 12), backend=BACKEND)
    assert torch.equal(ours, ck.label_map(seg, (8, 12), backend="reference"))


@pytest.mark.parametrize(("classes", "dtype"), [(256, torch.uint8), (257, torch.int64)])
def test_the_type_of_a_label_map(classes: int, dtype: torch.dtype) -> None:
    seg = logits(classes, (2, 2))
    ours = ck.label_map(seg, (3, 4), backend=BACKEND)
    assert ours.dtype == dtype
    assert torch.equal(ours, ck.label_map(seg, (3, 4), backend="reference"))


@triton.jit
def _square_kernel(values, out):
    value = tl.load(values)
    tl.store(out, value * value)


@pytest.mark.parametrize(("value", "fits"), [(46340, True), (-46340, True), (46341, False)])
def test_an_offset_that_overflows_ends_the_run(value: int, fits: bool) -> None:
    """Of the interpreter as tests/interpreter_plugin.py has it: on a GPU it would be a wrong address. 46340^2 < 2^31."""
    out = torch.zeros(1, dtype=torch.int32)
    launched = contextlib.nullcontext() if fits else pytest.raises(Exception, match="mul of int32 overflows")
    with launched:
        _square_kernel[(1,)](torch.tensor([value], dtype=torch.int32), out)
    assert out.item() == (value**2 if fits else 0)
