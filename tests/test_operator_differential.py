"""Every backend that can run against the oracle, over shapes that each have a reason."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import coarse_kernels as ck
from tests.contract import FLOAT16_LOSS_SCALE, GRADIENT_APART, GRADIENT_FLOOR, posterior_bound
from tests.helpers import SCHEDULES, check, evaluate, generator, gradient_error, make_problem, oracle

pytestmark = pytest.mark.usefixtures("poison")


@dataclass(frozen=True)
class Shape:
    reason: str
    classes: int
    size: tuple[int, ...]
    grid: tuple[int, ...] | None = None
    batch: int = 2
    cm_batch: int | None = None
    seg_grid: tuple[int, ...] | None = None


SHAPES = (
    # pixel grid, classes
    Shape("smallest C, which has its own code", 2, (9, 31)),
    Shape("C odd and tiny", 3, (8, 16)),
    Shape("C no power of two", 5, (5, 33)),
    Shape("C prime above 8", 11, (4, 17)),
    Shape("C of Cityscapes, whole vectors", 19, (4, 32)),
    Shape("C of Cityscapes, odd width: unaligned planes", 19, (3, 33)),
    Shape("C above 19: beyond any fast path", 20, (3, 16)),
    Shape("C above a vector of 32", 33, (2, 20)),
    # pixel grid, ranks and widths
    Shape("rank 1", 4, (45,)),
    Shape("rank 3", 3, (3, 4, 5)),
    Shape("one pixel", 3, (1, 1)),
    Shape("one column: a pixel per row", 3, (37, 1)),
    Shape("a lane less than a vector", 3, (2, 15)),
    Shape("one vector exactly", 3, (1, 16), batch=1),
    Shape("a lane more than a vector", 3, (1, 17)),
    Shape("a lane less than two vectors", 5, (1, 31)),
    Shape("wide and odd", 3, (3, 250)),
    Shape("several tasks and a short last one", 2, (65, 131)),
    Shape("several tasks, whole tiles, aligned", 3, (64, 144)),
    Shape("tasks and a tail of one pixel", 2, (17, 241), batch=3),
    # one field for all images
    Shape("one field for three images, pixel grid", 4, (6, 23), batch=3, cm_batch=1),
    Shape("one field, C = 2, several tiles", 2, (20, 40), batch=3, cm_batch=1),
    Shape("one field for three images, strided", 4, (16, 24), (4, 6), batch=3, cm_batch=1),
    Shape("one global matrix for three images", 5, (9, 20), (1, 1), batch=3, cm_batch=1),
    Shape("one field with many grid rows: groups of images are not cut", 3, (40, 6), (20, 3), batch=3, cm_batch=1),
    Shape("one field for 20 images: more than there are copies", 2, (4, 5), (2, 2), batch=20, cm_batch=1),
    # strided
    Shape("stride 8", 5, (32, 40), (4, 5)),
    Shape("stride 4, C of Cityscapes", 19, (12, 36), (3, 9)),
    Shape("stride 2: cells smaller than a segment", 3, (10, 22), (5, 11)),
    Shape("odd strides 5 and 3", 3, (25, 33), (5, 11)),
    Shape("sizes that are no multiples", 4, (23, 37), (4, 6)),
    Shape("one matrix per image", 11, (13, 18), (1, 1)),
    Shape("a column of matrices", 3, (21, 17), (4, 1)),
    Shape("a row of matrices", 3, (21, 17), (1, 5)),
    Shape("full height, one column", 3, (9, 17), (9, 1)),
    Shape("one row, full width", 3, (9, 17), (1, 17)),
    Shape("image minus 1: nearly every pixel its own cell", 3, (11, 19), (10, 18)),
    Shape("equal in y only", 3, (7, 20), (7, 5)),
    Shape("equal in x only", 3, (20, 18), (5, 18)),
    Shape("cells of 70 rows: cut into bands", 3, (140, 6), (2, 3)),
    Shape("one cell of 1100 rows: more bands than copies", 2, (1100, 3), (1, 1), batch=1),
    Shape("cells of 100 rows, one field for three images", 2, (200, 5), (2, 2), batch=3, cm_batch=1),
    Shape("tall, odd stride: lambda far from the origin", 2, (1001, 3), (334, 2), batch=1),
    Shape("one column of pixels", 3, (24, 1), (3, 1)),
    Shape("one row of pixels", 3, (1, 50), (1, 7)),
    Shape("widths 15 to 17 points of grid in a vector", 3, (8, 31), (4, 16)),
    Shape("250 wide, stride of no whole number", 3, (6, 250), (2, 83)),
    Shape("C above a vector, strided", 33, (6, 10), (2, 3)),
    Shape("C = 2, strided", 2, (16, 33), (4, 5)),
    Shape("rank 1, strided", 4, (50,), (7,)),
    Shape("rank 3, strided in every axis", 3, (5, 9, 18), (2, 3, 5)),
    Shape("rank 3, equal in depth", 3, (3, 8, 17), (3, 2, 5)),
    Shape("rank 3, depth 1 grid and one field", 2, (4, 8, 9), (1, 2, 3), batch=3, cm_batch=1),
    # class logits on a coarser grid
    Shape("seg logits coarser, pixel grid", 3, (8, 12), seg_grid=(4, 5)),
    Shape("seg logits coarser, strided", 3, (8, 12), (2, 3), seg_grid=(4, 6)),
    Shape("seg logits one point, rank 3", 2, (2, 4, 3), (1, 2, 3), seg_grid=(1, 1, 1)),
)

# What goes with the shapes, in turn: primes, so that every pair of values meets some shape.
STREAMS = ("positive", "uniform", "random")
IGNORED = ("some", "none", "some", "image", "some")
LABELS = (torch.uint8, torch.int64, torch.int32, torch.int16)
REDUCTIONS = ("mean", "sum", "none")


def options_for(turn: int, shape: Shape) -> dict[str, Any]:
    gen = generator(turn)
    options: dict[str, Any] = {"trace_weight": (0.0, 0.2)[turn % 2], "reduction": REDUCTIONS[turn % 3]}
    if turn % 5 < 2:
        options["class_weight"] = torch.rand(shape.classes, generator=gen) + 0.2
    if turn % 7 < 3:
        options["pixel_weight"] = torch.rand(shape.batch, *shape.size, generator=gen)
    return options


@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.reason.replace(" ", "_"))
@pytest.mark.fused
def test_shapes(backend: str, shape: Shape, stream: str) -> None:
    turn = 3 * SHAPES.index(shape) + STREAMS.index(stream) + SHAPES.index(shape)
    problem = make_problem(
        shape.classes,
        shape.size,
        shape.grid,
        batch=shape.batch,
        cm_batch=shape.cm_batch,
        seg_grid=shape.seg_grid,
        stream=stream,
        ignored=IGNORED[turn % 5],
        label_dtype=LABELS[turn % 4],
        seed=turn,
        **options_for(turn, shape),
    )
    check(problem, backend, SCHEDULES[turn // 2 % 2])


GRIDS = {"pixel": None, "strided": (3, 5)}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("stream", ["positive", "random"])
@pytest.mark.fused
def test_dtypes(backend: str, stream: str, dtype: torch.dtype, grid: tuple[int, int] | None, schedule: str) -> None:
    problem = make_problem(5, (10, 21), grid, stream=stream, trace_weight=0.1).to(dtype)
    # float16 gradients need loss scaling, as documented: without it they fall among its subnormals
    check(problem, backend, schedule, FLOAT16_LOSS_SCALE if dtype == torch.float16 else None)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
@pytest.mark.fused
def test_logits_of_two_dtypes(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype], grid: tuple[int, int] | None
) -> None:
    problem = make_problem(3, (10, 21), grid, reduction="sum")
    assert problem.cm is not None
    problem = dataclasses.replace(problem, seg=problem.seg.to(dtypes[0]), cm=problem.cm.to(dtypes[1]))
    truth, ours = oracle(problem), evaluate(problem, backend)
    for name, bound in (("seg", dtypes[0]), ("cm", dtypes[1])):
        floor = GRADIENT_APART if bound == torch.float32 else GRADIENT_FLOOR[bound]
        assert ours.gradients[name].dtype == bound
        assert gradient_error(ours.gradients[name], truth.gradients[name]) < floor


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("cm_batch", [1, 3])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.fused
def test_half_gradient_of_a_field_is_rounded_once(
    backend: str, half: torch.dtype, cm_batch: int, grid: tuple[int, int] | None
) -> None:
    """Sums over pixels and images are float32: a sum kept in 16 bits would stall."""
    problem = make_problem(3, (20, 30), grid, batch=3, cm_batch=cm_batch, reduction="sum").to(half)
    truth, ours = oracle(problem), evaluate(problem, backend)
    exact = truth.gradients["cm"]
    error = (ours.gradients["cm"].cpu().double() - exact).abs()
    unit = torch.finfo(half).eps
    assert bool((error <= 0.51 * unit * exact.abs() + 1e-5).all())


@pytest.mark.parametrize("ignored", ["none", "some", "image", "all"])
@pytest.mark.parametrize("ignore_index", [255, -100, 2, 0])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.fused
def test_ignored(backend: str, grid: tuple[int, int] | None, ignore_index: int, ignored: str) -> None:
    """In int64: checks make that of any other type but uint8, whose kernels the shapes above meet as often."""
    problem = make_problem(
        4, (8, 18), grid, ignored=ignored, ignore_index=ignore_index, label_dtype=torch.int64, trace_weight=0.1
    )
    check(problem, backend)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weights", ["class", "pixel", "both"])
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.fused
def test_weights(backend: str, grid: tuple[int, int] | None, weights: str, reduction: str, schedule: str) -> None:
    gen = generator(3)
    options: dict[str, Any] = {"reduction": reduction}
    if weights != "pixel":
        options["class_weight"] = torch.tensor([0.0, 0.5, 2.0, 7.0])  # one class does not count
    if weights != "class":
        options["pixel_weight"] = torch.rand(2, 8, 18, generator=gen) * torch.randint(0, 2, (2, 8, 18), generator=gen)
    problem = make_problem(4, (8, 18), grid, stream="random", trace_weight=0.1, **options)
    grad_output = torch.randn(2, 8, 18, generator=gen) if reduction == "none" else -2.5
    check(problem, backend, schedule, grad_output)


@pytest.mark.parametrize("normalizer", [37.0, 5, torch.tensor(12.5), torch.tensor(12.5, dtype=torch.float64)], ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.fused
def test_normalizer(backend: str, grid: tuple[int, int] | None, schedule: str, normalizer: Any) -> None:
    problem = make_problem(3, (8, 18), grid, trace_weight=0.1)
    out = check(problem.with_options(normalizer=normalizer), backend, schedule)
    total = evaluate(problem.with_options(reduction="sum"), backend)
    assert out.loss.item() == pytest.approx(total.loss.item() / float(normalizer), rel=1e-6)
    assert out.count.item() == (problem.labels != 255).sum().item()


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.fused
def test_posterior(backend: str, dtype: torch.dtype, stream: str, grid: tuple[int, int] | None) -> None:
    problem = make_problem(5, (9, 18), grid, stream=stream).to(dtype)
    args = (problem.seg, problem.cm, problem.labels, problem.transition)
    ours = ck.annotation_posterior(*args, backend=backend)
    wide = problem.on("cpu").to(torch.float64)
    truth = ck.annotation_posterior(wide.seg, wide.cm, wide.labels, wide.transition, backend="reference")
    assert ours.device == problem.seg.device
    assert ours.dtype == dtype
    assert ours.shape == problem.seg.shape
    assert not ours.requires_grad
    assert gradient_error(ours, truth) < posterior_bound(dtype)
    ignored = (problem.labels == 255).unsqueeze(1).expand_as(ours)
    assert ignored.any()
    plain = problem.seg.double().softmax(1)
    assert gradient_error(ours[ignored], plain[ignored]) < posterior_bound(dtype)


@st.composite
def problems(draw: st.DrawFn) -> Any:
    rank = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, {1: 70, 2: 24, 3: 8}[rank])) for _ in range(rank))
    grid = tuple(draw(st.integers(1, s)) for s in size)
    batch = draw(st.integers(1, 3))
    return make_problem(
        draw(st.integers(2, 7)),
        size,
        grid,
        batch=batch,
        cm_batch=draw(st.sampled_from([1, batch])),
        stream=draw(st.sampled_from(STREAMS)),
        ignored=draw(st.sampled_from(["none", "some", "image"])),
        label_dtype=draw(st.sampled_from(LABELS)),
        scale=draw(st.sampled_from([0.1, 1.0, 5.0])),
        seed=draw(st.integers(0, 99)),
        trace_weight=draw(st.sampled_from([0.0, 0.05, 1.0])),
        reduction=draw(st.sampled_from(REDUCTIONS)),
    )


@pytest.mark.fused
@hypothesis.given(problem=problems(), schedule=st.sampled_from(SCHEDULES))
@hypothesis.settings(max_examples=60)
def test_any_problem(backend: str, problem: Any, schedule: str) -> None:
    check(problem, backend, schedule)
