"""What only the Triton backend has to show, on CPU tensors with TRITON_INTERPRET=1. Run by test_triton_interpreter.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

import coarse_kernels as ck
from coarse_kernels.backends.triton import launch, table
from tests.helpers import SCHEDULES, check, evaluate, generator, make_problem

pytestmark = pytest.mark.usefixtures("poison")

BACKEND = "triton"


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


def test_a_wrong_argument_of_the_operator_is_named() -> None:
    operator = torch.ops.coarse_kernels_triton.annotation_nll
    seg, cm, labels = torch.randn(1, 3, 4), torch.randn(1, 3, 3, 2), torch.zeros(1, 4, dtype=torch.uint8)
    rest = (1.0, 0.0, 255, False, 0)
    with pytest.raises(TypeError, match="float64 goes with float64 only"):
        operator(seg.double(), cm, labels, None, None, None, None, *rest)
    with pytest.raises(TypeError, match=r"transition: expected torch\.float32"):
        operator(seg, cm, labels, torch.eye(3).double(), None, None, None, *rest)
    with pytest.raises(ValueError, match="cm_logits: expected a grid of 1 point"):
        operator(seg, torch.randn(1, 3, 3, 5), labels, None, None, None, None, *rest)


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
    operator = torch.ops.coarse_kernels_triton.annotation_nll
    draw = torch.rand(problem.labels.shape, generator=generator(1))
    masked = problem.labels.masked_fill(draw < 0.4, 255)
    strange = masked.clone()
    strange[(masked == 255) & (draw < 0.2)] = 2**40 + 1
    strange[(masked == 255) & (draw < 0.1)] = -1
    runs = [
        operator(problem.seg, problem.cm, labels, problem.transition, None, None, None, 1.0, 0.1, 255, False, 7)
        for labels in (masked, strange)
    ]
    for ours, expected in zip(*runs, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_saved_gradient_is_scaled_where_it_lies(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 5, 7, generator=generator(0)).to(dtype)
    factor = torch.tensor(0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scaled, same = gradient.clone(), gradient.clone()
    torch.ops.coarse_kernels_triton.scale_(scaled, factor)
    torch.ops.coarse_kernels_triton.scale_(same, torch.ones_like(factor))
    assert torch.equal(scaled, gradient * 0.5)
    assert torch.equal(same, gradient)
