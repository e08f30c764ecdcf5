"""Several kinds of drawings on one image, with and without a matrix, on class logits of their own grid: every backend against
the float64 reference, over shapes that each have a reason. One kind with a matrix at a time: test_operator_differential.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import Drawings
from tests.contract import FLOAT16_LOSS_SCALE, compute_dtype, gradient_bound, loss_bound, posterior_bound
from tests.helpers import (
    SCHEDULES,
    generator,
    gradient_error,
    leaf,
    loss_error,
    put,
    random_transition,
)

pytestmark = pytest.mark.usefixtures("poison")


# --- kinds of drawings, their problem, and its measure ---------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """``grid``: of its matrices; "trusted": it has none. ``stream``: positive (T = I), uniform, random (learned), fixed
    (random, not learned), partial (nothing is ever reported as label 0)."""

    stream: str = "positive"
    layers: int = 1
    grid: tuple[int, ...] | str | None = "trusted"  # None: the pixels
    cm_batch: int | None = None
    weight: float = 1.0
    class_weight: bool = False
    pixel_weight: bool = False


@dataclass
class Objective:
    """Tensors on the CPU; moved and cast where they are evaluated."""

    seg: Tensor
    kinds: list[dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)

    def drawings(self, dtype: torch.dtype | None) -> tuple[Tensor, list[Drawings], dict[str, Tensor]]:
        """Leaves by name. ``dtype``: of everything, on the CPU; None: as it is, on the device under test."""

        def moved(t: Tensor | None, constant: bool = False) -> Tensor | None:
            if t is None:
                return None
            if dtype is None:
                return put(t.double() if constant and self.seg.dtype == torch.float64 else t)
            return t.to(dtype) if t.is_floating_point() else t

        seg = leaf(moved(self.seg))
        assert seg is not None
        leaves, drawings = {"seg": seg}, []
        for number, parts in enumerate(self.kinds):
            cm = leaf(moved(parts["cm"]))
            transition = leaf(moved(parts["transition"], True), parts["learned"])
            leaves |= {f"cm{number}": cm} if cm is not None else {}
            leaves |= {f"transition{number}": transition} if transition is not None and parts["learned"] else {}
            constants = {name: moved(parts[name], True) for name in ("class_weight", "pixel_weight")}
            numbers = {name: parts[name] for name in ("weight", "trace_weight")}
            labels = moved(parts["labels"])
            assert labels is not None
            drawings.append(Drawings(labels, cm, transition, **constants, **numbers))
        return seg, drawings, leaves

    def to(self, dtype: torch.dtype) -> Objective:
        kinds = [{**kind, "cm": None if kind["cm"] is None else kind["cm"].to(dtype)} for kind in self.kinds]
        return Objective(self.seg.to(dtype), kinds, self.options)


def make(
    classes: int,
    size: tuple[int, ...],
    kinds: Sequence[Kind],
    seg_grid: tuple[int, ...] | None = None,
    *,
    batch: int = 2,
    ignored: float = 0.3,
    label_dtype: torch.dtype = torch.uint8,
    scale: float = 3.0,
    seed: int = 0,
    **options: Any,
) -> Objective:
    gen = generator(seed)
    made: list[dict[str, Any]] = []
    for kind in kinds:
        labels = torch.randint(0, classes, (batch, kind.layers, *size), generator=gen)
        labels[torch.rand(labels.shape, generator=gen) < ignored] = 255
        if labels.numel() and ignored:  # in runs, as drawings are
            labels.view(batch, -1)[:, : labels[0].numel() // 4] = 255
        cm = None
        if kind.grid != "trusted":
            cm_batch = batch if kind.cm_batch is None else kind.cm_batch
            cm = scale * torch.randn(cm_batch, classes, classes, *(kind.grid or size), generator=gen)
        transition = {
            "positive": None,
            "uniform": ck.uniform_transition(classes),
            "random": random_transition(classes, gen),
            "fixed": random_transition(classes, gen),
            "partial": torch.full((classes, classes), 1 / (classes - 1)).index_fill(1, torch.tensor([0]), 0.0),
        }[kind.stream]
        made.append(
            {
                "labels": labels.to(label_dtype),
                "cm": cm,
                "transition": transition,
                "learned": kind.stream == "random",
                "weight": kind.weight,
                "trace_weight": 0.0 if cm is None else 0.1,
                "class_weight": torch.rand(classes, generator=gen) + 0.2 if kind.class_weight else None,
                "pixel_weight": torch.rand(labels.shape, generator=gen) if kind.pixel_weight else None,
            }
        )
    seg = scale * torch.randn(batch, classes, *(seg_grid or size), generator=gen)
    return Objective(seg, made, options)


@dataclass
class Result:
    losses: dict[str, Tensor]
    gradients: dict[str, Tensor]


def evaluate(
    objective: Objective, backend: str, dtype: torch.dtype | None, schedule: str, grad_output: Tensor | float | None
) -> Result:
    seg, drawings, leaves = objective.drawings(dtype)
    with ck.use_schedule(schedule):
        out = ck.annotation_objective(seg, drawings, backend=backend, **objective.options)
        weight = torch.ones_like(out.loss) if grad_output is None else torch.as_tensor(grad_output).to(out.loss)
        out.loss.backward(weight.expand_as(out.loss))
    losses = {"loss": out.loss.detach()}
    for number, part in enumerate(out.parts):
        losses |= {f"{name}{number}": getattr(part, name).detach() for name in ("loss", "nll", "trace", "count")}
    gradients = {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
    return Result(losses, gradients)


def hold(
    ours: Result, objective: Objective, schedule: str = "one_pass", grad_output: Tensor | float | None = None
) -> None:
    """Bounds as in helpers.check, of contract.py."""
    stored = objective.seg.dtype
    compute = compute_dtype(stored)
    truth = evaluate(objective, "reference", torch.float64, schedule, grad_output)
    plain = evaluate(objective, "reference", compute, schedule, grad_output)
    for name, got in ours.losses.items():
        want = truth.losses[name]
        bound = loss_bound(loss_error(plain.losses[name], want), stored)
        assert loss_error(got, want) <= bound, f"{name}: {loss_error(got, want):.2e} > {bound:.2e}"
    assert ours.gradients.keys() == truth.gradients.keys()
    for name, got in ours.gradients.items():
        own = compute if name.startswith("transition") else stored
        bound = gradient_bound(gradient_error(plain.gradients[name], truth.gradients[name]), own)
        error = gradient_error(got, truth.gradients[name])
        assert error <= bound, f"gradient of {name}: {error:.2e} > {bound:.2e}"


def check(
    objective: Objective, backend: str, schedule: str = "one_pass", grad_output: Tensor | float | None = None
) -> Result:
    """Of a backend, held to what `hold` asks."""
    compute = compute_dtype(objective.seg.dtype)
    ours = evaluate(objective, backend, None, schedule, grad_output)
    assert all(got.dtype == compute for got in ours.losses.values()), {n: x.dtype for n, x in ours.losses.items()}
    hold(ours, objective, schedule, grad_output)
    return ours


# --- shapes ----------------------------------------------------------------------------------------------------------------

POSITIVE, UNIFORM, LEARNED = Kind(), Kind("uniform"), Kind("random")


@dataclass(frozen=True)
class Shape:
    reason: str
    classes: int
    size: tuple[int, ...]
    kinds: tuple[Kind, ...]
    seg_grid: tuple[int, ...] | None = None
    batch: int = 2


SHAPES = (
    # trusted alone, pixel grid
    Shape("cross-entropy", 3, (9, 31), (POSITIVE,)),
    Shape("complementary labels", 3, (9, 31), (UNIFORM,)),
    Shape("a learned transition", 3, (9, 31), (LEARNED,)),
    Shape("two layers", 4, (7, 20), (Kind(layers=2),)),
    Shape("three complementary layers", 4, (7, 20), (Kind("uniform", 3),)),
    Shape("three learned layers", 4, (7, 20), (Kind("random", 3),)),
    Shape("five layers: more than registers hold", 3, (6, 17), (Kind("uniform", 5),)),
    Shape("positive and complementary", 5, (8, 19), (POSITIVE, Kind("uniform", weight=0.5))),
    Shape("six kinds and ten layers", 3, (5, 18), (POSITIVE, UNIFORM, LEARNED, Kind("random", 3), Kind(layers=3), UNIFORM)),
    Shape("a kind without layers between others", 3, (5, 18), (POSITIVE, Kind("uniform", 0), UNIFORM)),
    Shape("a kind that does not count", 3, (5, 18), (Kind(weight=0.0), UNIFORM)),
    # classes
    Shape("C = 2, which has its own code", 2, (9, 31), (POSITIVE, UNIFORM)),
    Shape("C of Cityscapes", 19, (6, 33), (POSITIVE, UNIFORM)),
    Shape("C of Cityscapes, strided", 19, (16, 33), (POSITIVE, LEARNED), (4, 9)),
    Shape("C above a vector of 32", 33, (4, 21), (POSITIVE, LEARNED), (2, 7)),
    Shape("C of ADE20K", 150, (4, 13), (POSITIVE, UNIFORM), (2, 5)),
    Shape("C of ADE20K, pixel grid", 150, (3, 9), (LEARNED,)),
    Shape("C above 256", 300, (3, 7), (POSITIVE, LEARNED), (2, 3)),
    # class logits on a grid of their own
    Shape("stride 4: a network's logits", 5, (32, 40), (POSITIVE,), (8, 10)),
    Shape("stride 4, complementary", 5, (32, 40), (UNIFORM,), (8, 10)),
    Shape("stride 4, learned layers", 5, (16, 20), (Kind("random", 2),), (4, 5)),
    Shape("stride 4, five layers", 3, (16, 20), (Kind(layers=2), Kind("uniform", 3)), (4, 5)),
    Shape("strides of no whole number", 4, (23, 37), (POSITIVE, UNIFORM), (4, 6)),
    Shape("odd strides 5 and 3", 3, (25, 33), (POSITIVE, UNIFORM), (5, 11)),
    Shape("one point", 3, (13, 18), (POSITIVE, LEARNED), (1, 1)),
    Shape("one point, large enough to be shared by many threads", 2, (70, 130), (POSITIVE,), (1, 1), 1),
    Shape("few large cells: several warps on each", 2, (100, 150), (POSITIVE,), (2, 3), 1),
    Shape("nearly the image's size", 3, (11, 19), (POSITIVE, UNIFORM), (10, 18)),
    Shape("equal in y only", 3, (7, 20), (POSITIVE, UNIFORM), (7, 5)),
    Shape("equal in x only", 3, (20, 18), (POSITIVE, UNIFORM), (5, 18)),
    Shape("a column of points", 3, (21, 17), (POSITIVE, UNIFORM), (4, 1)),
    Shape("a row of points", 3, (21, 17), (POSITIVE, UNIFORM), (1, 5)),
    Shape("more points than a tile has, either way", 2, (40, 44), (POSITIVE,), (19, 21)),
    Shape("one row, more points than a tile has", 2, (1, 700), (POSITIVE, UNIFORM), (1, 300)),
    Shape("one column, more points than a tile has", 2, (700, 1), (POSITIVE, UNIFORM), (300, 1)),
    Shape("large cells, more of them than a tile has", 2, (50, 1700), (POSITIVE,), (1, 40), 1),
    Shape("tall cells", 2, (1100, 3), (POSITIVE,), (3, 2), 1),
    Shape("one pixel", 3, (1, 1), (POSITIVE, UNIFORM)),
    # ranks
    Shape("rank 1", 4, (45,), (POSITIVE, UNIFORM)),
    Shape("rank 1, strided", 4, (50,), (POSITIVE, LEARNED), (7,)),
    Shape("rank 3", 3, (3, 4, 5), (POSITIVE, UNIFORM)),
    Shape("rank 3, strided", 3, (5, 9, 18), (POSITIVE, LEARNED), (2, 3, 5)),
    Shape("rank 3, equal in depth", 3, (3, 8, 17), (POSITIVE, UNIFORM), (3, 2, 5)),
    Shape("rank 3, coarser in depth alone", 2, (7, 4, 9), (POSITIVE, UNIFORM), (3, 4, 9)),
    Shape("rank 3, one point", 2, (2, 4, 3), (POSITIVE, LEARNED), (1, 1, 1)),
    # beside kinds with a matrix
    Shape("a field for each pixel, and trusted", 3, (8, 17), (Kind(grid=None), UNIFORM)),
    Shape("a strided field, and trusted", 5, (16, 20), (Kind("uniform", grid=(4, 5)), POSITIVE)),
    Shape("one matrix, and trusted", 3, (9, 17), (Kind("random", grid=(1, 1)), LEARNED)),
    Shape("one matrix for all images, and trusted", 3, (9, 17), (Kind(grid=(1, 1), cm_batch=1), POSITIVE), batch=3),
    Shape("a field for all images, and trusted", 3, (12, 18), (POSITIVE, Kind(grid=(3, 5), cm_batch=1)), (3, 6), 3),
    Shape("two fields on two grids, and trusted", 4, (12, 18), (Kind(grid=(3, 5)), Kind("uniform", grid=(2, 9)), POSITIVE)),
    Shape(
        "all of that on coarser class logits",
        4,
        (12, 18),
        (Kind(grid=(3, 5)), Kind("random", 2), Kind("uniform", 2, grid=(2, 9)), POSITIVE),
        (3, 6),
    ),
    Shape("two kinds with a matrix, none trusted", 3, (12, 18), (Kind(grid=(3, 5)), Kind("uniform", grid=None)), (3, 6)),
    Shape("rank 3, a field and trusted", 2, (4, 8, 9), (Kind(grid=(1, 2, 3)), UNIFORM), (2, 4, 3)),
)  # fmt: skip

REDUCTIONS = ("mean", "sum", "none")
LABELS = (torch.uint8, torch.int64, torch.int32)


def served(objective: Objective, backend: str) -> None:
    """Skips what a backend refuses by number of classes."""
    classes = objective.seg.shape[1]
    if classes > 256:
        with torch.no_grad():
            seg, drawings, _ = objective.drawings(None)
            try:
                ck.annotation_objective(seg, drawings, backend=backend, **objective.options)
            except RuntimeError as error:
                if "serves up to" in str(error):
                    pytest.skip(str(error))
                raise


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.reason.replace(" ", "_"))
@pytest.mark.fused
def test_shapes(backend: str, shape: Shape, reduction: str) -> None:
    turn = 4 * SHAPES.index(shape) + REDUCTIONS.index(reduction)  # what goes with them, in turn
    objective = make(
        shape.classes,
        shape.size,
        shape.kinds,
        shape.seg_grid,
        batch=shape.batch,
        ignored=(0.3, 0.0, 0.8, 0.3, 0.3)[turn % 5],
        label_dtype=torch.int64 if shape.classes > 255 else LABELS[turn % 3],
        seed=turn,
        reduction=reduction,
    )
    served(objective, backend)
    grad_output = None
    if reduction == "none" and turn % 2:
        grad_output = torch.randn(shape.batch, *shape.size, generator=generator(turn))
    elif reduction != "none":
        grad_output = (None, -2.5)[turn % 2]
    check(objective, backend, SCHEDULES[turn // 2 % 2], grad_output)


@pytest.mark.parametrize("seg_grid", [None, (3, 7)], ids=["pixel", "strided"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("stream", ["positive", "uniform", "random"])
@pytest.mark.fused
def test_weights(backend: str, stream: str, reduction: str, seg_grid: tuple[int, int] | None) -> None:
    kinds = (
        Kind(stream, 2, class_weight=True, weight=0.7),
        Kind(stream, pixel_weight=True, weight=1.3),
        Kind(stream, grid=(2, 3), class_weight=True, pixel_weight=True),
    )
    objective = make(4, (9, 22), kinds, seg_grid, reduction=reduction)
    objective.kinds[0]["class_weight"][1] = 0.0  # one class does not count
    objective.kinds[1]["pixel_weight"][..., ::3] = 0.0
    check(objective, backend)


@pytest.mark.parametrize("seg_grid", [None, (4, 7), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [(POSITIVE,), (Kind("random", 2), Kind(grid=(2, 3)))], ids=["alone", "beside"])
@pytest.mark.fused
def test_dtypes(backend: str, kinds: tuple[Kind, ...], dtype: torch.dtype, seg_grid: tuple[int, int] | None) -> None:
    objective = make(5, (10, 21), kinds, seg_grid).to(dtype)
    # float16 gradients need loss scaling, as documented: without it they fall among its subnormals
    check(objective, backend, grad_output=FLOAT16_LOSS_SCALE if dtype == torch.float16 else None)


@pytest.mark.parametrize("scale", [30.0, 1e3, 1e4])
@pytest.mark.parametrize("stream", ["positive", "uniform", "fixed"])
@pytest.mark.fused
def test_large_logits(backend: str, stream: str, scale: float) -> None:
    """Probabilities underflow; differences of logits do not."""
    check(make(4, (9, 21), (Kind(stream),), ignored=0.0, scale=scale), backend)


# By a logit of -inf on the pixel grid and at one point (between points F.interpolate makes NaN of it, as 0 * -inf), and by a
# transition on any.
IMPOSSIBLE = [
    ("positive", None),
    ("uniform", None),
    ("fixed", None),
    ("uniform", (1, 1)),
    ("partial", (4, 7)),
    ("partial", None),
]


@pytest.mark.parametrize(("stream", "seg_grid"), IMPOSSIBLE, ids=str)
@pytest.mark.fused
def test_impossible_labels(backend: str, stream: str, seg_grid: tuple[int, int] | None) -> None:
    """The loss is inf, no gradient comes of it, and other pixels keep theirs."""
    objective = make(3, (9, 21), (Kind(stream, layers=2), POSITIVE), seg_grid, reduction="none")
    if stream != "partial":
        objective.seg[0, 1] = -torch.inf
        objective.seg[1, :2] = -torch.inf  # only class 2 is left: label 2 of a complementary kind says that it is not
    ours = check(objective, backend)
    assert ours.losses["loss0"].isinf().any()
    assert ours.losses["loss0"].isfinite().any()
    assert ours.gradients["seg"].isfinite().all()
    assert ours.gradients["seg"].any()


@pytest.mark.parametrize(("stream", "seg_grid"), IMPOSSIBLE, ids=str)
@pytest.mark.fused
def test_a_weight_of_zero_counts_for_nothing_even_beside_an_infinite_loss(
    backend: str, stream: str, seg_grid: tuple[int, int] | None
) -> None:
    objective = make(3, (9, 21), (Kind(stream, class_weight=True), POSITIVE), seg_grid, reduction="sum")
    if stream != "partial":
        objective.seg[0, :2] = -torch.inf
    weights = {"positive": [0.0, 0.0, 1.0], "partial": [0.0, 1.0, 1.0]}.get(stream, [1.0, 1.0, 0.0])
    objective.kinds[0]["class_weight"][:] = torch.tensor(weights)
    objective.kinds[1]["weight"] = 0.0
    ours = check(objective, backend)
    assert ours.losses["loss0"].isfinite()
    assert ours.losses["loss"].isfinite()


@pytest.mark.parametrize("seg_grid", [None, (4, 7), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.fused
def test_all_ignored(backend: str, seg_grid: tuple[int, int] | None) -> None:
    kinds = (POSITIVE, Kind("random", 2), Kind(grid=(2, 3)))
    for reduction in REDUCTIONS:
        objective = make(3, (8, 14), kinds, seg_grid, ignored=1.0, reduction=reduction)
        ours = check(objective, backend)
        assert all(not loss.any() for loss in ours.losses.values())
        assert all(not gradient.any() for gradient in ours.gradients.values())


@pytest.mark.parametrize("kinds", [(POSITIVE,), (Kind("random", 2), POSITIVE), (Kind("uniform", 5),)], ids=str)
@pytest.mark.fused
def test_logits_of_pixels_without_a_label_may_be_anything(backend: str, kinds: tuple[Kind, ...]) -> None:
    objective = make(3, (8, 14), kinds)
    drawn = torch.zeros(2, 8, 14, dtype=torch.bool)
    for kind in objective.kinds:
        drawn |= (kind["labels"] != 255).any(1)
    assert not drawn.all()
    objective.seg.movedim(1, -1)[~drawn] = torch.nan
    ours = check(objective, backend)
    assert ours.losses["loss"].isfinite()
    assert not ours.gradients["seg"].movedim(1, -1)[put(~drawn)].any()


@pytest.mark.fused
def test_a_coarse_logit_that_no_label_reads_may_be_anything(backend: str) -> None:
    objective = make(3, (16, 24), (POSITIVE, LEARNED), (4, 6))
    for kind in objective.kinds:
        kind["labels"][:, :, :, 12:] = 255
    objective.seg[:, :, :, 4:] = torch.nan  # pixels up to column 13 read points up to 3
    ours = check(objective, backend)
    assert ours.losses["loss"].isfinite()
    assert not ours.gradients["seg"][:, :, :, 4:].any()


@pytest.mark.parametrize("seg_grid", [None, (3, 5)], ids=["pixel", "strided"])
@pytest.mark.fused
def test_nan_is_seen(backend: str, seg_grid: tuple[int, int] | None) -> None:
    for stream in ("positive", "uniform"):
        objective = make(3, (6, 10), (Kind(stream),), seg_grid, ignored=0.0)
        objective.seg[0, 2, 1, 1] = torch.nan
        ours = evaluate(objective, backend, None, "one_pass", None)
        assert ours.losses["loss"].isnan()
        assert ours.gradients["seg"][0].isnan().any()
        assert ours.gradients["seg"][1].isfinite().all()


@pytest.mark.parametrize("seg_grid", [None, (4, 7)], ids=["pixel", "strided"])
@pytest.mark.fused
def test_batch_of_none(backend: str, seg_grid: tuple[int, int] | None) -> None:
    for kinds in ((POSITIVE,), (LEARNED, Kind(grid=(2, 3), cm_batch=1))):
        for reduction in REDUCTIONS:
            objective = make(3, (8, 14), kinds, seg_grid, batch=0, reduction=reduction)
            ours = check(objective, backend)
            assert all(not gradient.any() for gradient in ours.gradients.values())


@pytest.mark.parametrize("seg_grid", [None, (4, 7)], ids=["pixel", "strided"])
@pytest.mark.fused
def test_the_same_result_every_time(backend: str, seg_grid: tuple[int, int] | None) -> None:
    objective = make(5, (33, 41), (Kind("random", 2), POSITIVE), seg_grid)
    first, second = (evaluate(objective, backend, None, "one_pass", None) for _ in range(2))
    for name, gradient in first.gradients.items():
        assert torch.equal(gradient, second.gradients[name])
    assert torch.equal(first.losses["loss"], second.losses["loss"])


# --- posterior, label map ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seg_grid", [None, (3, 7)], ids=["pixel", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kinds",
    [(Kind("uniform", 3),), (POSITIVE, Kind("random", 2), Kind("uniform", grid=(2, 3)))],
    ids=["layers", "kinds"],
)
@pytest.mark.fused
def test_posterior_of_several(
    backend: str, kinds: tuple[Kind, ...], dtype: torch.dtype, seg_grid: tuple[int, int] | None
) -> None:
    objective = make(4, (9, 15), kinds, seg_grid).to(dtype)
    seg, drawings, _ = objective.drawings(None)
    wide, wide_drawings, _ = objective.drawings(torch.float64)
    ours = ck.annotation_posterior(seg, drawings, backend=backend)
    truth = ck.annotation_posterior(wide, wide_drawings, backend="reference")
    assert ours.dtype == dtype
    assert gradient_error(ours, truth) < posterior_bound(dtype)


GRIDS = (
    ((9, 31), (9, 31)), ((4, 7), (16, 28)), ((5, 9), (13, 20)), ((1, 1), (5, 6)), ((7, 4), (7, 19)), ((8,), (33,)),
    ((2, 3, 4), (5, 6, 7)), ((3, 6, 7), (3, 6, 7)),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [2, 5, 19, 300])
@pytest.mark.parametrize(("grid", "size"), GRIDS, ids=str)
@pytest.mark.fused
def test_label_map(
    backend: str, grid: tuple[int, ...], size: tuple[int, ...], classes: int, dtype: torch.dtype
) -> None:
    logits = torch.randn(2, classes, *grid, generator=generator(classes)).to(dtype)
    ours = ck.label_map(put(logits), size, backend=backend).cpu()
    truth = ck.label_map(logits.double(), size, backend="reference")
    assert ours.dtype == (torch.uint8 if classes <= 256 else torch.int64)
    assert ours.shape == (2, *size)
    different = (ours != truth).double().mean().item()  # where two classes are within a rounding of each other
    assert different <= (0.0 if dtype == torch.float64 or grid == size else 2e-3)


@pytest.mark.parametrize(("grid", "size"), GRIDS, ids=str)
@pytest.mark.fused
def test_label_map_with_ties_and_nan(backend: str, grid: tuple[int, ...], size: tuple[int, ...]) -> None:
    """The first of equals wins, and NaN over all, as in torch.argmax."""
    logits = torch.randn(2, 3, *grid, generator=generator(0))
    logits = torch.cat([logits, logits.flip(1)], 1)  # each class twice, bit for bit
    expected = ck.label_map(logits, size, backend="reference")
    assert torch.equal(ck.label_map(put(logits), size, backend=backend).cpu(), expected)
    logits[0, 4] = torch.nan
    logits[0, 5] = torch.nan
    logits[1, 2] = torch.inf
    ours = ck.label_map(put(logits), size, backend=backend).cpu()
    assert (ours[0] == 4).all()
    assert (ours[1] == 2).all()


@pytest.mark.fused
def test_label_map_of_nothing(backend: str) -> None:
    assert ck.label_map(put(torch.randn(0, 3, 4, 5)), (8, 9), backend=backend).shape == (0, 8, 9)
