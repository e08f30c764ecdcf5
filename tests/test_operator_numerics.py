"""Logits that a probability-space kernel loses: large, infinite, NaN, and labels that cannot be."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import coarse_kernels as ck
from tests.contract import (
    EXTREME_FLOOR,
    GRADIENT_APART,
    GRADIENT_FLOOR,
    LARGEST_SCALE_OF_WHAT_IS_RULED_OUT,
    LOSS_APART,
    SCALES,
    gradient_floor,
    loss_floor,
    transition_floor,
)
from tests.helpers import (
    SCHEDULES,
    Problem,
    check,
    device,
    evaluate,
    generator,
    gradient_error,
    loss_error,
    make_problem,
    oracle,
    put,
)

pytestmark = pytest.mark.usefixtures("poison")

EVERY = pytest.mark.every
COMPILED = pytest.mark.fused
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
GRID = pytest.mark.parametrize(
    "grid", [None, (4, 7), (2, 3), (1, 1)], ids=["pixel", "strided", "coarse-strided", "one-point"]
)


@COMPILED
@SCHEDULE
@GRID
@pytest.mark.parametrize("stream", ["positive", "uniform", "random"])
@pytest.mark.parametrize("scale", SCALES)
def test_logit_scale(backend: str, schedule: str, grid: tuple[int, int] | None, stream: str, scale: float) -> None:
    """log(p + 1e-30) loses most of these gradients from scale 30 on, and p without log space is NaN."""
    learned = scale <= LARGEST_SCALE_OF_WHAT_IS_RULED_OUT  # beyond, the next test
    problem = make_problem(5, (16, 28), grid, stream=stream, scale=scale, trace_weight=0.1, learn_transition=learned)
    floors = {"loss_floor": loss_floor(torch.float32, scale), "gradient_floor": gradient_floor(torch.float32, scale)}
    check(problem, backend, schedule, **floors)


MATRICES = pytest.mark.parametrize(
    "grid", [None, (1, 1), (4, 7), (8, 20)], ids=["trusted", "one-point", "strided", "pixel"]
)


def _sure(
    grid: tuple[int, int] | None, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, ck.Drawings, ck.TransitionMatrix]:
    """Class logits, drawings and their transition, which is learned: no class is ever drawn as itself."""
    gen = generator(5)
    seg = scale * torch.randn(2, 5, 8, 20, generator=gen)
    cm = None if grid is None else scale * torch.randn(2, 5, 5, *grid, generator=gen)
    labels = torch.randint(0, 5, (2, 8, 20), generator=gen, dtype=torch.uint8)
    transition = ck.TransitionMatrix.learned(5)
    with torch.no_grad():
        transition.logits.copy_(torch.randn(5, 5, generator=gen))
    transition.to(device(), dtype)
    seg, cm = put(seg).to(dtype).requires_grad_(), None if cm is None else put(cm).to(dtype)
    return seg, ck.Drawings(put(labels), cm, transition=transition()), transition


@EVERY
@SCHEDULE
@MATRICES
@pytest.mark.parametrize("scale", SCALES)
def test_a_learned_transition_learns_whatever_the_network_is_sure_of(
    backend: str, schedule: str, grid: tuple[int, int] | None, scale: float
) -> None:
    """It was NaN from a margin of 90 on: p / D of what the transition rules out left float32, and its softmax multiplied that
    with 0."""
    grads = []
    for name, dtype in (("reference", torch.float64), (backend, torch.float32)):
        seg, drawings, transition = _sure(grid, scale, dtype)
        with ck.use_schedule(schedule):
            (3.0 * ck.annotation_objective(seg, [drawings], reduction="sum", backend=name).loss).backward()
        assert transition.logits.grad is not None
        grads.append(transition.logits.grad)
    assert gradient_error(grads[1], grads[0]) <= transition_floor(torch.float32, scale)


@pytest.mark.skipif("cpu" not in ck.available_backends(), reason="the CPU backend is not built")
@pytest.mark.xfail(strict=True, reason="inf - inf is NaN: known (docs/reliability.md); of the reference it is 0")
def test_quotients_of_what_is_ruled_out_that_cancel_are_no_nan() -> None:
    """Of a transition of one's own; a `TransitionMatrix` drops them. p / D is e^200, of two pixels that weigh 1 and -1."""
    seg = torch.tensor([200.0, 0.0]).reshape(1, 2, 1, 1).expand(1, 2, 1, 2)
    transition = torch.tensor([[0.0, 1.0], [1.0, 0.0]], requires_grad=True)
    drawings = ck.Drawings(torch.zeros(1, 1, 2, dtype=torch.uint8), transition=transition)
    losses = ck.annotation_objective(seg, [drawings], reduction="none", backend="cpu").loss
    losses.backward(torch.tensor([1.0, -1.0]).reshape(losses.shape))
    assert transition.grad is not None
    assert transition.grad.abs().sum() == 0


@EVERY
@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("logits", [torch.float32, torch.float64])
def test_a_learned_transition_of_another_dtype_learns_too(
    backend: str, logits: torch.dtype, stored: torch.dtype
) -> None:
    """What its gradient is on the way there leaves float16 from a margin of 11 on."""
    seg, drawings, transition = _sure(None, 120.0, torch.float32)
    exact = _parameter_gradient(seg, drawings, transition, backend)
    cast = ck.TransitionMatrix.learned(5)
    cast.load_state_dict(transition.state_dict())
    cast.to(device(), stored)
    drawings = dataclasses.replace(drawings, transition=cast())
    found = _parameter_gradient(seg.detach().to(logits).requires_grad_(), drawings, cast, backend)
    assert gradient_error(found.float(), exact) < 20 * torch.finfo(stored).eps


def _parameter_gradient(
    seg: torch.Tensor, drawings: ck.Drawings, transition: ck.TransitionMatrix, backend: str
) -> torch.Tensor:
    ck.annotation_objective(seg, [drawings], backend=backend).loss.backward()
    assert transition.logits.grad is not None
    return transition.logits.grad


@EVERY
@MATRICES
@pytest.mark.parametrize("scale", SCALES)
def test_a_learned_transition_gets_numbers_from_losses_weighted_with_two_signs(
    backend: str, grid: tuple[int, int] | None, scale: float
) -> None:
    """Infinities of both signs add up to NaN, where it is 0."""
    seg, drawings, transition = _sure(grid, scale, torch.float32)
    losses = ck.annotation_objective(seg, [drawings], reduction="none", backend=backend).loss
    (losses * put(torch.randn(losses.shape, generator=generator(6)))).sum().backward()
    assert transition.logits.grad is not None
    assert transition.logits.grad.isfinite().all()


@COMPILED
@pytest.mark.parametrize("classes", [2, 3, 19])
@pytest.mark.parametrize("stream", ["positive", "random"])
def test_extreme_logits_on_the_pixel_grid(backend: str, stream: str, classes: int) -> None:
    """+-1e4 somewhere, -inf elsewhere: finite and equal to the oracle wherever that is finite."""
    problem = make_problem(classes, (6, 33), stream=stream, trace_weight=0.1, reduction="none", learn_transition=False)
    assert problem.cm is not None
    gen = generator(7)
    for logits in (problem.seg, problem.cm):
        draw = put(torch.rand(logits.shape, generator=gen))
        logits[draw < 0.05] = 1e4
        logits[(draw > 0.05) & (draw < 0.1)] = -1e4
        impossible = (draw > 0.9) & (draw < 0.95)
        impossible[:, 0] = False  # a column of -inf alone is not a distribution
        logits[impossible] = -torch.inf
    out = check(problem, backend, gradient_floor=EXTREME_FLOOR)
    assert not out.loss.isnan().any()
    for grad in out.gradients.values():
        assert grad.isfinite().all()


@COMPILED
@GRID
def test_steep_logits_on_a_grid(backend: str, grid: tuple[int, int] | None) -> None:
    """Neighbouring grid points 1e4 apart: no geometric sequence spans that. float32 knows such a logit to 1e-3."""
    problem = make_problem(3, (16, 28), grid, stream="random", trace_weight=0.1, scale=1.0, learn_transition=False)
    assert problem.cm is not None
    signs = put(torch.randint(-1, 2, problem.cm.shape, generator=generator(3)))
    problem = dataclasses.replace(problem, cm=problem.cm + 1e4 * signs)
    floors = {"loss_floor": loss_floor(torch.float32, 1e4), "gradient_floor": gradient_floor(torch.float32, 1e4)}
    out = check(problem, backend, **floors)
    assert out.loss.isfinite()
    assert all(grad.isfinite().all() for grad in out.gradients.values())


@COMPILED
@SCHEDULE
@pytest.mark.parametrize("grid", [None, (2, 4), (1, 1)], ids=["pixel", "strided", "one-point"])
def test_confident_pixels(backend: str, schedule: str, grid: tuple[int, int] | None) -> None:
    """A network that is sure, right or wrong, and a field that trusts its labels: evidence from 1 down to e^-200."""
    gen = generator(2)
    labels = torch.randint(0, 4, (2, 8, 24), generator=gen)
    guess = torch.where(
        torch.rand(2, 8, 24, generator=gen) < 0.5, labels, torch.randint(0, 4, (2, 8, 24), generator=gen)
    )
    size = torch.tensor([5.0, 30.0, 70.0, 100.0])[torch.randint(0, 4, (2, 1, 8, 24), generator=gen)]
    seg = torch.nn.functional.one_hot(guess, 4).movedim(-1, 1) * size
    cm = (100.0 * torch.eye(4))[None, :, :, None, None].repeat(2, 1, 1, *(grid or (8, 24)))
    cm += torch.randn(cm.shape, generator=gen)
    problem = Problem(seg, cm, labels.to(torch.uint8), options={"trace_weight": 0.01}).on(device())
    check(problem, backend, schedule, gradient_floor=gradient_floor(torch.float32, 100.0))


@COMPILED
def test_evidence_on_both_sides_of_the_switch_to_log_space(backend: str) -> None:
    """Probabilities are left for log space near 1e-30 (strided: 1e-12): the two meet without a step."""
    evidence = torch.linspace(0.0, -100.0, 4 * 64).reshape(1, 4, 64)
    for grid in (None, (1, 16), (1, 1)):
        seg = torch.zeros(1, 3, 4, 64)
        seg[:, 1] = evidence
        seg[:, 2] = -120.0
        cm = torch.full((1, 3, 3, *(grid or (4, 64))), -60.0)
        for j in range(3):
            cm[:, j, j] = 60.0
        labels = torch.ones(1, 4, 64, dtype=torch.uint8)
        check(Problem(seg, cm, labels, options={"reduction": "none"}).on(device()), backend)


@EVERY
@SCHEDULE
@pytest.mark.parametrize("trace_weight", [0.0, 0.1])
@pytest.mark.parametrize("grid", [None, (2, 5), (1, 1)], ids=["pixel", "strided", "one-point"])
def test_a_label_of_probability_zero_has_infinite_loss_and_zero_gradient(
    backend: str, schedule: str, grid: tuple[int, int] | None, trace_weight: float
) -> None:
    """Class 2 is never reported: no class can explain that label. To the gradients, trace included, it is ignored."""
    transition = put(torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]]))
    problem = make_problem(
        3, (4, 20), grid, stream="random", trace_weight=trace_weight, ignored="none", reduction="none"
    )
    impossible = problem.labels == 2
    assert 0 < int(impossible.sum()) < impossible.numel()
    problem = dataclasses.replace(problem, transition=transition)
    out = evaluate(problem, backend, schedule)
    assert (out.loss[impossible] == torch.inf).all()
    assert out.loss[~impossible].isfinite().all()
    without = oracle(dataclasses.replace(problem, labels=problem.labels.masked_fill(impossible, 255)))
    for name, grad in out.gradients.items():
        assert gradient_error(grad, without.gradients[name]) < GRADIENT_APART, name
    assert evaluate(problem.with_options(reduction="mean"), backend, schedule).loss == torch.inf
    posterior = ck.annotation_posterior(problem.seg, problem.cm, problem.labels, transition, backend=backend)
    mask = impossible.unsqueeze(1).expand_as(posterior)
    torch.testing.assert_close(posterior[mask], problem.seg.softmax(1)[mask])


@EVERY
@SCHEDULE
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("width", [16, 27, 64])
def test_nan_logits_of_ignored_pixels_reach_nothing(backend: str, schedule: str, bad: float, width: int) -> None:
    for stream in ("positive", "random"):
        problem = make_problem(3, (6, width), stream=stream, trace_weight=0.1)
        assert problem.cm is not None
        expected = oracle(problem)
        ignored = problem.labels == 255
        seg = problem.seg.masked_fill(ignored.unsqueeze(1), bad)
        cm = problem.cm.masked_fill(ignored[:, None, None], bad)
        ours = evaluate(dataclasses.replace(problem, seg=seg, cm=cm), backend, schedule)
        assert loss_error(ours.loss, expected.loss) < LOSS_APART
        for name, grad in ours.gradients.items():
            assert gradient_error(grad, expected.gradients[name]) < GRADIENT_APART


@EVERY
@SCHEDULE
@pytest.mark.parametrize(
    ("grid", "node", "rows", "columns"),
    [
        # All that the node reaches is ignored: everything up to the next node, and the border, which F.interpolate
        # multiplies with weight 0 where its coordinate is clamped.
        ((4, 6), (1, 2), slice(0, 14), slice(4, 16)),
        ((4, 24), (1, 5), slice(0, 14), slice(5, 6)),  # equal in x: the columns beside it are others' alone
        ((16, 6), (4, 2), slice(4, 5), slice(4, 16)),  # equal in y
        ((4, 6), (3, 5), slice(8, 16), slice(16, 24)),  # the last node, in the corner
    ],
    ids=["strided", "equal-in-x", "equal-in-y", "corner"],
)
def test_a_nan_grid_point_under_ignored_pixels_reaches_nothing(
    backend: str, schedule: str, grid: tuple[int, int], node: tuple[int, int], rows: slice, columns: slice
) -> None:
    problem = make_problem(2, (16, 24), grid, ignored="none", trace_weight=0.1)
    assert problem.cm is not None
    problem.labels[:, rows, columns] = 255
    expected = oracle(problem)
    problem.cm[..., node[0], node[1]] = torch.nan
    ours = evaluate(problem, backend, schedule)
    assert loss_error(ours.loss, expected.loss) < LOSS_APART
    for name, grad in ours.gradients.items():
        assert gradient_error(grad, expected.gradients[name]) < GRADIENT_APART


@EVERY
@pytest.mark.parametrize("axis", ["x", "y"])
def test_minus_infinity_on_a_grid_that_equals_the_image_in_one_axis(backend: str, axis: str) -> None:
    """Along that axis nothing is interpolated, as in F.interpolate: a structural zero stays at its own pixels."""
    problem = make_problem(3, (4, 6), (1, 6) if axis == "x" else (4, 1), ignored="none", reduction="none")
    assert problem.cm is not None
    problem.cm[:, 0, 1].view(2, -1)[:, 2] = -torch.inf
    found = evaluate(problem, backend).loss.cpu()
    truth = oracle(problem).loss
    outside = truth.isfinite()
    assert outside.sum() >= truth.numel() - 2 * 6
    assert found[outside].isfinite().all()
    torch.testing.assert_close(found[outside].double(), truth[outside], rtol=1e-5, atol=1e-6)
    assert loss_error(found[outside], truth[outside]) < LOSS_APART


@EVERY
def test_a_structural_zero_in_a_global_matrix_is_not_nan(backend: str) -> None:
    """-inf in a matrix for the whole image: F.interpolate makes 0 * -inf = NaN of it in half of the rows."""
    problem = make_problem(3, (6, 5), (1, 1), ignored="none", reduction="none")
    assert problem.cm is not None
    problem.cm[:, 0, 1] = -torch.inf
    result, truth = evaluate(problem, backend), oracle(problem)
    assert result.loss.isfinite().all()
    torch.testing.assert_close(result.loss.double().cpu(), truth.loss, rtol=1e-5, atol=1e-6)
    assert loss_error(result.loss, truth.loss) < LOSS_APART
    gradient = result.gradients["cm"]
    assert gradient.isfinite().all()
    assert (gradient[:, 0, 1] == 0).all()
    torch.testing.assert_close(gradient.double().cpu(), truth.gradients["cm"], rtol=1e-4, atol=1e-6)
    assert gradient_error(gradient, truth.gradients["cm"]) < GRADIENT_APART


@EVERY
@GRID
@pytest.mark.parametrize("where", ["seg", "cm"])
def test_a_nan_at_a_labelled_pixel_shows_in_the_loss(backend: str, grid: tuple[int, int] | None, where: str) -> None:
    """A diverged network must not be hidden by the kernel."""
    for stream in ("positive", "random"):
        problem = make_problem(3, (16, 28), grid, ignored="none", stream=stream)
        tensor = getattr(problem, where)
        tensor.view(2, -1)[1, tensor[1].numel() // 2] = torch.nan
        assert evaluate(problem, backend).loss.isnan()


@COMPILED
@pytest.mark.parametrize("grid", [None, (2, 4)], ids=["pixel", "strided"])
def test_large_weights_and_tiny_evidence(backend: str, grid: tuple[int, int] | None) -> None:
    """A weight of 1e9 over an evidence of 1e-29 is beyond float32, but only as a quotient on the way."""
    problem = make_problem(3, (8, 16), grid, ignored="none", scale=1.0, reduction="sum")
    assert problem.cm is not None
    seg = torch.zeros_like(problem.seg)
    seg[:, 0] = 33.0
    cm = torch.zeros_like(problem.cm)
    cm[:, 0, 0] = 34.0
    cm[:, 1, 1] = cm[:, 2, 2] = 34.0
    problem = dataclasses.replace(problem, seg=seg, cm=cm, labels=torch.full_like(problem.labels, 1))
    check(problem.with_options(pixel_weight=torch.full((2, 8, 16), 1e9)), backend)


@COMPILED
def test_float16_gradients_need_loss_scaling(backend: str) -> None:
    """As documented: the mean over many pixels falls below 6e-8; scaled, it is there."""
    problem = make_problem(2, (128, 128), batch=1, ignored="none", scale=0.1).to(torch.float16)
    scaled = evaluate(problem, backend, grad_output=2.0**14)
    truth = oracle(problem, 2.0**14)
    assert gradient_error(scaled.gradients["cm"], truth.gradients["cm"]) < GRADIENT_FLOOR[torch.float16]


@COMPILED
@pytest.mark.parametrize("grid", [(667, 1), (251, 2), (1500, 2), (29, 3)])
def test_tall_image_with_an_odd_stride(backend: str, grid: tuple[int, int]) -> None:
    """Interpolation weights far from the origin: as exact as F.interpolate in float32, loss map and gradient."""
    check(make_problem(2, (2001, 3), grid, batch=1, ignored="none", scale=5.0, reduction="none"), backend)


@pytest.mark.skipif("cpu" not in ck.available_backends(), reason="no compiled backend")
@pytest.mark.parametrize(
    ("size", "seg", "grid"), [((3, 3001), (2, 1999), (2, 1501)), ((3001, 3), (1999, 2), (1501, 2))], ids=["x", "y"]
)
def test_on_a_cpu_gradients_far_from_the_origin_are_as_exact_as_near_it(
    size: tuple[int, int], seg: tuple[int, int], grid: tuple[int, int]
) -> None:
    """The fraction of a float32 coordinate of 1,500 is known to 1e-4, and so were these gradients."""
    problem = make_problem(3, size, grid, batch=1, ignored="none", scale=5.0, trace_weight=0.1, seg_grid=seg)
    out, truth = evaluate(problem, "cpu"), oracle(problem)
    for name, gradient in out.gradients.items():
        assert gradient_error(gradient, truth.gradients[name]) < gradient_floor(torch.float32), name


@pytest.mark.skipif("cpu" not in ck.available_backends(), reason="no compiled backend")
@pytest.mark.parametrize(("size", "grid"), [((1, 1), None), ((2, 3), None), ((3, 3), (2, 2))])
def test_on_a_cpu_a_field_that_many_images_share_is_as_exact_as_one_of_few(
    size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    """One float32 sum over so many images loses a digit, over a million three."""
    problem = make_problem(3, size, grid, batch=20_000, cm_batch=1, stream="random", trace_weight=0.1)
    out, truth = evaluate(problem, "cpu"), oracle(problem)
    assert gradient_error(out.gradients["cm"], truth.gradients["cm"]) < gradient_floor(torch.float32)


FORMS = pytest.mark.parametrize("form", ["trusted", "pixel", "strided"])


def in_form(form: str, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Class logits at a scale where some labels are all but impossible, and a matrix that is all but I, or none."""
    gen = generator(seed)
    size = (8, 36)
    seg = 40 * torch.randn(1, classes, *size, generator=gen)
    grid = {"trusted": None, "pixel": size, "strided": (2, 9)}[form]
    if grid is None:
        return put(seg), None
    cm = 5 * torch.randn(1, classes, classes, *grid, generator=gen)
    cm[:, range(classes), range(classes)] += 150.0
    return put(seg), put(cm)


@COMPILED
@FORMS
@pytest.mark.parametrize("entry", [1e-30, 0.0])
def test_tiny_entries_of_a_transition_are_as_exact_as_others(backend: str, form: str, entry: float) -> None:
    assert wrong_with_entry(backend, form, entry) == []


@FORMS
@pytest.mark.parametrize("entry", [1e-36, 1e-40, 1e-44])
def test_on_a_cpu_so_are_the_tiniest(form: str, entry: float) -> None:
    """Below 1.2e-38 a float32 has no logarithm by its bits, and 1 over it is inf; a term beside it that counts was lost. The
    other backends lose what is within e^-87 of such an entry, and a subnormal one is 0 there."""
    if device().type != "cpu" or "cpu" not in ck.available_backends("cpu"):
        pytest.skip("of the CPU backend alone")
    assert wrong_with_entry("cpu", form, entry) == []


def wrong_with_entry(backend: str, form: str, entry: float) -> list[str]:
    """What is not as exact as it has to be, with ``entry`` in the transition."""
    seg, cm = in_form(form, 3, 5)
    transition = put(torch.tensor([[0.0, entry, 1.0], [entry, 0.5, 0.5], [0.5, 0.5, entry]]))
    labels = put(torch.randint(0, 3, (1, 8, 36), generator=generator(1)))
    problem = Problem(seg, cm, labels, transition, {"reduction": "none", "trace_weight": 0.1}, learn_transition=False)
    ours, truth = evaluate(problem, backend), oracle(problem)
    exact = {
        "nll": loss_error(ours.nll, truth.nll) < LOSS_APART,
        "nll of each pixel": torch.allclose(ours.nll.cpu().double(), truth.nll, rtol=1e-5, atol=1e-4),
        "gradient of seg": gradient_error(ours.gradients["seg"], truth.gradients["seg"])
        < GRADIENT_FLOOR[torch.float32],
    }
    if cm is not None:  # differences of probabilities that are all but equal
        # Triton adds up four corners of logits of 150, whose last place is 1.5e-5; the others add differences.
        bound = 4e-5 if (backend, form) == ("triton", "strided") else 1e-5
        found = ours.gradients["cm"].cpu().double()
        exact["gradient of cm"] = torch.allclose(found, truth.gradients["cm"], rtol=0, atol=bound)
    kinds = [ck.Drawings(labels, cm, transition)]
    wide = [ck.Drawings(labels, None if cm is None else cm.double(), transition.double())]
    posterior = ck.annotation_posterior(seg, kinds, backend=backend)
    wanted = ck.annotation_posterior(seg.double(), wide, backend="reference")
    exact["posterior"] = gradient_error(posterior, wanted) < gradient_floor(torch.float32, 150.0)
    return [name for name, holds in exact.items() if not holds]


@COMPILED
@FORMS
def test_the_gradient_of_a_transition_is_finite_where_only_its_weight_makes_it_so(backend: str, form: str) -> None:
    """p / D leaves float32 at an all but impossible label, while the weight of a pixel, one of millions, brings it back."""
    labels = put(torch.zeros(1, 4, 20, dtype=torch.uint8))
    seg = put(torch.zeros(1, 3, 4, 20))
    seg[:, 0] = 95.0 - torch.arange(20) / 10
    cm = None
    if form != "trusted":
        cm = put(torch.zeros(1, 3, 3, *((4, 20) if form == "pixel" else (2, 4))))
        cm[:, range(3), range(3)] = 100.0
    transition = put(torch.tensor([[0.0, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5]]))
    problem = Problem(seg, cm, labels, transition, {"normalizer": 1e8})
    ours, truth = evaluate(problem, backend), oracle(problem)
    assert truth.gradients["transition"].abs().max() < 1e38
    assert gradient_error(ours.gradients["transition"], truth.gradients["transition"]) < gradient_floor(
        torch.float32, 100.0
    )


@EVERY
@pytest.mark.parametrize("weight", [None, 0.3])
@pytest.mark.parametrize("points", [None, 1, 8_000, 20_011])
def test_a_loss_of_many_equal_terms_in_float64(backend: str, points: int | None, weight: float | None) -> None:
    """Added one after the other they are rounded the same way each time: they were 4e-14 off, and so was what a weighted mean
    divides by, a class weight of 0.3 for each label: 3.6e-13."""
    pixels, logits = 20_011, torch.tensor([0.3, -0.4], dtype=torch.float64)
    seg = put(logits.reshape(1, 2, 1, 1).expand(1, 2, 1, pixels).contiguous())
    cm = None if points is None else put(torch.zeros(1, 2, 2, 1, points).double())
    labels = put(torch.ones(1, 1, pixels, dtype=torch.uint8))
    by_class = None if weight is None else put(torch.full((2,), weight, dtype=torch.float64))
    drawings = ck.Drawings(labels, cm, class_weight=by_class, trace_weight=0.1)
    term = -torch.log_softmax(logits, 0)[1].item() if points is None else math.log(2) + 0.1
    count = pixels * (weight or 1.0)
    for reduction, truth in (("sum", count * term), ("mean", term)):
        out = ck.annotation_objective(seg, [drawings], reduction=reduction, backend=backend)
        assert abs(out.loss.item() / truth - 1) < (1e-15 if backend == "cpu" else loss_floor(torch.float64))
        assert abs(out.parts[0].count.item() / count - 1) < (1e-15 if backend == "cpu" else loss_floor(torch.float64))


@COMPILED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("grid", [None, 1, 2, 5], ids=["trusted", "one-point", "strided", "pixel"])
def test_a_loss_of_many_annotators(backend: str, grid: int | None, dtype: torch.dtype) -> None:
    """All layers of a few pixels were one sum in the compute dtype: of 300 it was 3e-6 off in float32."""
    layers, logits = 300, torch.tensor([0.3, -0.4], dtype=dtype)
    seg = put(logits.reshape(1, 2, 1, 1).expand(1, 2, 1, 5).contiguous())
    cm = None if grid is None else put(torch.tensor([[0.7, 0.1], [-0.2, 0.3]]).to(dtype)[None, :, :, None, None])
    cm = cm if cm is None else cm.expand(1, 2, 2, 1, grid or 1).contiguous()
    labels = put(torch.ones(1, layers, 1, 5, dtype=torch.uint8))
    problem = [ck.Drawings(labels, cm, trace_weight=0.1)]
    out = ck.annotation_objective(seg, problem, reduction="sum", backend=backend)
    one = torch.softmax(logits.double(), 0)
    a = torch.eye(2).double() if cm is None else torch.softmax(cm[0, :, :, 0, 0].double().cpu(), 0)
    truth = 5 * layers * (-(a @ one)[1].log() + (0 if cm is None else 0.1 * a.trace()))
    assert abs(out.loss.item() / truth.item() - 1) < loss_floor(dtype)


def _overflown(form: str) -> tuple[torch.Tensor, ck.Drawings]:
    """Class logits, and drawings whose transition gets a gradient beyond float32: nearly impossible labels."""
    seg = put(torch.zeros(1, 2, 4, 20))
    seg[:, 1] = 95.0
    cm = None
    if form != "trusted":
        cm = put(torch.zeros(1, 2, 2, *((4, 20) if form == "pixel" else (2, 4))))
        cm[:, range(2), range(2)] = 100.0
        cm.requires_grad_()
    transition = put(torch.tensor([[0.0, 1.0], [1.0, 0.0]])).requires_grad_()
    return seg.requires_grad_(), ck.Drawings(put(torch.ones(1, 4, 20, dtype=torch.uint8)), cm, transition)


@COMPILED
@FORMS
def test_nothing_comes_back_of_a_loss_that_counts_for_nothing(backend: str, form: str) -> None:
    """A quotient beyond float32 is inf, and 0 times that NaN: so was a transition after (0 * loss).backward() and a step."""
    seg, kind = _overflown(form)
    wanted = [tensor for tensor in (seg, kind.transition, kind.cm_logits) if tensor is not None]
    out = ck.annotation_objective(seg, [kind], backend=backend)
    for gradient in torch.autograd.grad(0 * out.loss, wanted):
        assert (gradient == 0).all()


@COMPILED
@FORMS
def test_of_a_part_that_counts_for_nothing_nothing_is_left(backend: str, form: str) -> None:
    """As a warm-up does it: 0 times the one part, once the other, and a second backward through the same graph."""
    seg, kind = _overflown(form)
    wanted = [tensor for tensor in (seg, kind.transition, kind.cm_logits) if tensor is not None]
    trusted = ck.Drawings(kind.labels)
    one, two = ck.annotation_objective(seg, [kind, trusted], backend=backend).parts
    (alone,) = torch.autograd.grad(ck.annotation_objective(seg, [trusted], backend=backend).loss, seg)
    for retained in (True, False):
        got, *others = torch.autograd.grad(0 * one.loss + two.loss, wanted, retain_graph=retained)
        torch.testing.assert_close(got, alone, rtol=1e-6, atol=0)
        assert all((gradient == 0).all() for gradient in others)
