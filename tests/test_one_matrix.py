"""One matrix for all pixels of an image (csrc/cpu/one_matrix.h): every option and every class of numbers against float64.

The differential tests have fields of one point among others; here are the cases that only this form has: tables that are
formed once an image, and gradients that are formed of sums over the pixels of a label.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import coarse_kernels as ck
from coarse_kernels import Drawings
from tests import test_objective_differential as objectives
from tests.contract import (
    FLOAT16_LOSS_SCALE,
    GRADIENT_APART,
    GRADIENT_FLOOR,
    LARGEST_SCALE_OF_WHAT_IS_RULED_OUT,
    gradient_floor,
)
from tests.helpers import (
    SCHEDULES,
    Problem,
    check,
    evaluate,
    generator,
    gradient_error,
    make_problem,
    on_threads,
    oracle,
    random_transition,
)
from tests.test_objective_differential import Kind

pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.skipif("cpu" not in ck.available_backends(), reason="not built"),
]

ONE = (1, 1)
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)


def test_explain_names_the_form() -> None:
    seg, labels = torch.zeros(2, 3, 4, 6), torch.zeros(2, 4, 6, dtype=torch.uint8)
    own, shared, grid = torch.zeros(2, 3, 3, 1, 1), torch.zeros(1, 3, 3, 1, 1), torch.zeros(1, 3, 3, 1, 2)
    text = ck.explain(seg, [Drawings(labels, cm) for cm in (own, shared, grid)], backend="cpu").splitlines()
    assert ["one matrix" in line for line in text[1:4]] == [True, True, False]
    # one point for one pixel is a matrix for each pixel
    alone = ck.explain(seg[..., :1, :1], [Drawings(labels[:, :1, :1], own)], backend="cpu")
    assert "pixels" in alone
    assert "one matrix" not in alone


@pytest.mark.sampled(4)
@SCHEDULE
@pytest.mark.parametrize("stream", ["positive", "uniform", "random"])
@pytest.mark.parametrize(
    ("classes", "scale"), [*((c, s) for c in (2, 5, 19, 33, 150) for s in (3.0, 100.0)), (2, 1e4), (5, 1e4), (19, 1e4)]
)
def test_classes_and_scales(classes: int, stream: str, scale: float, schedule: str) -> None:
    """A float32 logit of 1e4 is known to 1e-3, see test_operator_numerics; with many classes nothing but rounding is left of
    the gradients there. T is learned while its gradient, of quotients A / q, stays in float32.
    """
    size = (7, 33) if classes < 100 else (3, 21)
    learned = scale <= LARGEST_SCALE_OF_WHAT_IS_RULED_OUT
    problem = make_problem(
        classes, size, ONE, stream=stream, scale=scale, trace_weight=0.1, learn_transition=learned, seed=classes
    )
    check(problem, "cpu", schedule, gradient_floor=gradient_floor(torch.float32, scale))


@pytest.mark.parametrize("pixels", [1, 2, 15, 16, 17, 31, 33, 4095, 4097, 9001])
@pytest.mark.parametrize("cm_batch", [1, 3])
def test_any_number_of_pixels(pixels: int, cm_batch: int) -> None:
    """Less than a vector, tails, and several tasks; a line, so that all of it is one row."""
    problem = make_problem(3, (pixels,), (1,), batch=3, cm_batch=cm_batch, stream="random", trace_weight=0.1)
    check(problem, "cpu")


BESIDE = {
    "alone": (Kind("random", 2, grid=ONE, class_weight=True, pixel_weight=True, weight=0.7),),
    "shared": (Kind(layers=3, grid=ONE, cm_batch=1, pixel_weight=True), Kind("uniform", grid=ONE)),
    "trusted": (Kind(grid=ONE, class_weight=True), Kind("uniform", 2), Kind("random")),
    "strided": (Kind("random", grid=(2, 3)), Kind("random", 2, grid=ONE, cm_batch=1), Kind("uniform", grid=ONE)),
    "pixels": (Kind(grid=None), Kind("random", grid=ONE, cm_batch=1)),
    "all": (Kind(grid=None), Kind("uniform", grid=(2, 3)), Kind(grid=ONE), Kind("random", grid=ONE), Kind()),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("reduction", objectives.REDUCTIONS)
@pytest.mark.parametrize("seg_grid", [None, (3, 5), ONE], ids=["pixels", "coarse", "one-point"])
@pytest.mark.parametrize("kinds", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("classes", [2, 5, pytest.param(19, marks=pytest.mark.slow)])
def test_beside_other_kinds(
    classes: int, kinds: tuple[Kind, ...], seg_grid: tuple[int, int] | None, reduction: str
) -> None:
    turn = classes + len(kinds) + len(reduction)
    objective = objectives.make(classes, (19, 33), kinds, seg_grid, batch=3, seed=turn, reduction=reduction)
    objectives.check(objective, "cpu", SCHEDULES[turn % 2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cm_batch", [1, 3])
@pytest.mark.parametrize(("size", "grid"), [((45,), (1,)), ((9, 21), ONE), ((3, 5, 7), (1, 1, 1))], ids=str)
def test_storage_and_ranks(size: tuple[int, ...], grid: tuple[int, ...], cm_batch: int, dtype: torch.dtype) -> None:
    kinds = (Kind("random", 2, grid=grid, cm_batch=cm_batch), Kind(grid=grid, cm_batch=cm_batch, pixel_weight=True))
    objective = objectives.make(5, size, kinds, batch=3).to(dtype)
    objectives.check(objective, "cpu", grad_output=FLOAT16_LOSS_SCALE if dtype == torch.float16 else None)


@SCHEDULE
@pytest.mark.parametrize("cm_batch", [1, 20])
@pytest.mark.parametrize("size", [(97, 130), (5, 7)], ids=str)
@pytest.mark.parametrize("seg_stride", [1, 4])
def test_the_number_of_threads_changes_no_bit(
    seg_stride: int, size: tuple[int, int], cm_batch: int, schedule: str
) -> None:
    """20 images: more than there are groups of those that share a matrix."""
    grid = tuple(-(-s // seg_stride) for s in size)
    problem = make_problem(
        5, size, ONE, batch=20, cm_batch=cm_batch, seg_grid=grid, stream="random", trace_weight=0.1,
        pixel_weight=torch.rand(20, *size, generator=generator(1)),
    )  # fmt: skip
    first, *others = on_threads((1, 1, 2, 3), lambda: evaluate(problem, "cpu", schedule))
    for other in others:
        assert torch.equal(first.loss, other.loss)
        assert torch.equal(first.trace, other.trace)
        for name, gradient in first.gradients.items():
            assert torch.equal(gradient, other.gradients[name]), name


@pytest.mark.parametrize("stream", ["positive", "uniform", "random"])
@pytest.mark.parametrize("scale", [3.0, 40.0])
@pytest.mark.parametrize("classes", [2, 5, 33])
def test_posterior(classes: int, scale: float, stream: str) -> None:
    problem = make_problem(classes, (9, 23), ONE, stream=stream, scale=scale)
    wide = problem.to(torch.float64)
    arguments = [(p.seg, p.cm, p.labels, p.transition) for p in (problem, wide)]
    ours = ck.annotation_posterior(*arguments[0], backend="cpu")
    truth = ck.annotation_posterior(*arguments[1], backend="reference")
    assert gradient_error(ours, truth) < max(GRADIENT_APART, gradient_floor(torch.float32, scale))


@SCHEDULE
def test_a_transition_has_a_gradient_where_no_probability_of_the_label_is_left(schedule: str) -> None:
    """Labels that say "not y", matrices that are all but certain: q[y,y] is below float32, and so is the posterior of y, but
    dD/dT[y,y] = p[y] A[y,y] is not."""
    problem = make_problem(4, (6, 21), ONE, stream="uniform", ignored="none", scale=1.0)
    cm = 150.0 * torch.eye(4)[None, :, :, None, None].repeat(2, 1, 1, 1, 1)
    check(dataclasses.replace(problem, cm=cm), "cpu", schedule)


@pytest.mark.parametrize("zero", ["rows", "columns", "most"])
def test_transitions_with_zeros(zero: str) -> None:
    transition = random_transition(5, generator(0))
    if zero == "rows":
        transition[1] = torch.eye(5)[3]
    elif zero == "columns":
        transition[:, 1] = 0.0
    else:
        transition *= torch.rand(5, 5, generator=generator(1)) < 0.5
        transition[transition.sum(1) == 0, 2] = 1.0
    transition /= transition.sum(1, keepdim=True)
    for scale in (1.0, 20.0):
        problem = make_problem(5, (8, 19), ONE, stream="random", ignored="none", scale=scale, reduction="none")
        problem = dataclasses.replace(problem, transition=transition).with_options(trace_weight=0.1)
        out = check(problem, "cpu", gradient_floor=gradient_floor(torch.float32, scale))
        if zero == "columns":
            assert (out.loss[problem.labels == 1] == torch.inf).all()
        assert all(gradient.isfinite().all() for gradient in out.gradients.values())


def test_entries_of_a_transition_below_float32() -> None:
    """Subnormal, and what they report a label of."""
    transition = torch.tensor([[1.0, 1e-40, 0.0], [1.0, 3e-42, 0.0], [0.0, 0.0, 1.0]])
    problem = make_problem(3, (5, 19), ONE, stream="random", learn_transition=False, reduction="none", trace_weight=0.1)
    check(dataclasses.replace(problem, transition=transition), "cpu")


@SCHEDULE
def test_large_weights_over_tiny_evidence(schedule: str) -> None:
    """w / D leaves float32, w r does not."""
    problem = make_problem(3, (8, 16), ONE, ignored="none", reduction="sum")
    seg, cm = torch.zeros_like(problem.seg), torch.full_like(problem.cm, -33.0)  # type: ignore[arg-type]
    seg[:, 0] = 66.0
    cm[:, range(3), range(3)] = 33.0
    labels = torch.ones_like(problem.labels)
    for weight in (1e9, 1e13):
        heavy = dataclasses.replace(problem, seg=seg, cm=cm, labels=labels)
        check(heavy.with_options(pixel_weight=torch.full((2, 8, 16), weight)), "cpu", schedule)


@SCHEDULE
def test_a_nan_that_no_label_of_the_kind_meets(schedule: str) -> None:
    """At a pixel that only another kind labels, and in the matrix of an image without labels."""
    objective = objectives.make(3, (6, 33), (Kind("random", grid=ONE), Kind()))
    kind, other = objective.kinds
    kind["labels"][0, :, 2] = 255
    other["labels"][0, :, 2, 5] = 1
    objective.seg[0, 1, 2, 5] = torch.nan
    kind["labels"][1] = 255
    kind["cm"][1] = torch.nan
    ours = objectives.evaluate(objective, "cpu", None, schedule, None)
    truth = objectives.evaluate(objective, "reference", torch.float64, schedule, None)
    assert ours.losses["loss0"].isfinite()
    assert ours.losses["loss1"].isnan()
    for name in ("cm0", "transition0"):
        assert gradient_error(ours.gradients[name], truth.gradients[name]) < GRADIENT_FLOOR[torch.float32], name
    assert not ours.gradients["cm0"][1].any()


def test_a_nan_in_the_matrix_shows_in_the_loss_and_in_its_gradient() -> None:
    problem = make_problem(3, (6, 33), ONE, stream="random")
    assert problem.cm is not None
    problem.cm[1, 0, 2] = torch.nan
    out = evaluate(problem, "cpu")
    assert out.loss.isnan()
    assert out.gradients["cm"][0].isfinite().all()
    assert out.gradients["cm"][1].isnan().any()


@pytest.mark.parametrize("data", ["coherent", "random"])
def test_sums_over_many_pixels_keep_their_digits(data: str) -> None:
    """A quarter of a million pixels of one label: float32 sums of so many would be off by more."""
    gen = generator(0)
    labels = torch.ones(1, 512, 512, dtype=torch.uint8)
    if data == "random":
        labels = torch.randint(0, 3, labels.shape, generator=gen).to(torch.uint8)
    seg, cm = torch.randn(1, 3, 512, 512, generator=gen), torch.randn(1, 3, 3, 1, 1, generator=gen)
    problem = Problem(seg, cm, labels, random_transition(3, gen), {"trace_weight": 0.1})
    ours, truth = evaluate(problem, "cpu"), oracle(problem)
    for name in ("cm", "transition"):
        assert gradient_error(ours.gradients[name], truth.gradients[name]) < 3e-7, name
