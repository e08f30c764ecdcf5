"""The oracle itself: the reference backend in float64 against values that owe nothing to it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import coarse_kernels as ck
from tests.contract import LOSS_FLOOR
from tests.helpers import evaluate, gradient_error, loss_error, make_problem

F64 = torch.float64


def test_hand_computed_positive() -> None:
    """Two classes, one pixel: p = (1/4, 3/4), A = [[1/2, 1/5], [1/2, 4/5]]."""
    seg = torch.tensor([1.0, 3.0], dtype=F64).log().reshape(1, 2, 1)
    cm = torch.tensor([[0.5, 0.2], [0.5, 0.8]], dtype=F64).log().reshape(1, 2, 2, 1)
    out = ck.annotation_nll(seg, cm, torch.tensor([[1]]), trace_weight=0.1, backend="reference")
    evidence = 0.25 * 0.5 + 0.75 * 0.8  # (A p)[1] = 0.725
    assert out.nll.item() == pytest.approx(-math.log(evidence), rel=1e-14)
    assert out.trace.item() == pytest.approx(0.5 + 0.8, rel=1e-14)
    assert out.loss.item() == pytest.approx(-math.log(evidence) + 0.13, rel=1e-14)
    assert out.count.item() == 1.0
    posterior = ck.annotation_posterior(seg, cm, torch.tensor([[1]]), backend="reference").flatten()
    assert posterior.tolist() == pytest.approx([0.125 / 0.725, 0.6 / 0.725], rel=1e-14)


def test_hand_computed_negative() -> None:
    """Three classes, "not class 0", uniform M: q[j] = (1 - A[0, j]) / 2."""
    p = torch.tensor([0.5, 0.25, 0.25], dtype=F64)
    cm = torch.tensor([[0.6, 0.1, 0.2], [0.2, 0.8, 0.2], [0.2, 0.1, 0.6]], dtype=F64)
    out = ck.annotation_nll(
        p.log().reshape(1, 3, 1),
        cm.log().reshape(1, 9, 1),  # (B, C*C, *G)
        torch.tensor([[0]]),
        ck.uniform_transition(3, dtype=F64),
        backend="reference",
    )
    assert out.nll.item() == pytest.approx(-math.log(0.5 * 0.2 + 0.25 * 0.45 + 0.25 * 0.4), rel=1e-14)


@pytest.mark.parametrize("stream", ["positive", "uniform", "random"])
def test_naive_probability_space(stream: str) -> None:
    """Loops and probabilities, no logarithms but the last: an implementation with nothing in common."""
    problem = make_problem(3, (2, 3), stream=stream, trace_weight=0.2, reduction="none").to(F64)
    assert problem.cm is not None
    out = evaluate(problem, "reference")
    transition = torch.eye(3, dtype=F64) if problem.transition is None else problem.transition
    p, a = problem.seg.softmax(1), problem.cm.softmax(1)
    for b, y, x in itertools.product(range(2), range(2), range(3)):
        label = int(problem.labels[b, y, x])
        if label == 255:
            assert out.loss[b, y, x] == 0 == out.count[b, y, x]
            continue
        evidence = sum(
            float(p[b, j, y, x] * transition[i, label] * a[b, i, j, y, x]) for i in range(3) for j in range(3)
        )
        trace = sum(float(a[b, j, j, y, x]) for j in range(3))
        assert float(out.nll[b, y, x]) == pytest.approx(-math.log(evidence), rel=1e-12)
        assert float(out.trace[b, y, x]) == pytest.approx(trace, rel=1e-12)
        assert float(out.loss[b, y, x]) == pytest.approx(-math.log(evidence) + 0.2 * trace, rel=1e-12)


def closed_form(
    seg: np.ndarray, cm: np.ndarray, label: int, transition: np.ndarray, trace_weight: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of one pixel by the posterior formulas of the design."""
    p = np.exp(seg - seg.max())
    p /= p.sum()
    a = np.exp(cm - cm.max(0))
    a /= a.sum(0)
    q = transition[:, label] @ a
    evidence = p @ q
    r = p * q / evidence
    h = transition[:, label, None] * a / q
    diagonal = np.diag(a)
    d_cm = r * (a - h) + trace_weight * diagonal * (np.eye(len(p)) - a)
    d_transition = np.zeros_like(transition)
    d_transition[:, label] = -(a @ p) / evidence
    return p - r, d_cm, d_transition


@pytest.mark.parametrize("stream", ["positive", "random"])
def test_closed_form_gradients(stream: str) -> None:
    problem = make_problem(4, (3, 2), stream=stream, trace_weight=0.3, reduction="sum").to(F64)
    assert problem.cm is not None
    out = evaluate(problem, "reference")
    transition = np.eye(4) if problem.transition is None else problem.transition.numpy()
    expected = {name: np.zeros(grad.shape) for name, grad in out.gradients.items()}
    for b, y, x in itertools.product(range(2), range(3), range(2)):
        label = int(problem.labels[b, y, x])
        if label == 255:
            continue
        d_seg, d_cm, d_transition = closed_form(
            problem.seg[b, :, y, x].numpy(), problem.cm[b, :, :, y, x].numpy(), label, transition, 0.3
        )
        expected["seg"][b, :, y, x] = d_seg
        expected["cm"][b, :, :, y, x] = d_cm
        if "transition" in expected:
            expected["transition"] += d_transition
    for name, grad in out.gradients.items():
        np.testing.assert_allclose(grad.numpy(), expected[name], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("grid", [(3,), (2,)])
@pytest.mark.parametrize("stream", ["positive", "random"])
def test_gradcheck_and_gradgradcheck(stream: str, grid: tuple[int, ...]) -> None:
    problem = make_problem(3, (3,), grid, batch=1, stream=stream, ignored="none", scale=1.0).to(F64)
    assert problem.cm is not None
    inputs = [problem.seg.requires_grad_(), problem.cm.requires_grad_()]
    if problem.transition is not None:
        inputs.append(problem.transition.requires_grad_())

    def loss(seg: Tensor, cm: Tensor, transition: Tensor | None = None) -> Tensor:
        if transition is not None:  # any positive numbers, so that finite differences keep rows that sum to 1
            transition = transition / transition.sum(1, keepdim=True)
        return ck.annotation_nll(seg, cm, problem.labels, transition, trace_weight=0.1, backend="reference").loss

    if problem.transition is not None:
        with torch.no_grad():
            problem.transition.add_(0.1)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_trusted_source_is_cross_entropy(reduction: str, weighted: bool) -> None:
    problem = make_problem(5, (4, 3), label_dtype=torch.int64).to(F64)
    class_weight = torch.tensor([0.5, 1.0, 2.0, 0.1, 3.0], dtype=F64) if weighted else None
    seg, other = problem.seg.clone().requires_grad_(), problem.seg.clone().requires_grad_()
    ours = ck.annotation_nll(seg, None, problem.labels, class_weight=class_weight, reduction=reduction).loss
    theirs = F.cross_entropy(other, problem.labels, class_weight, ignore_index=255, reduction=reduction)
    ours.sum().backward()
    theirs.sum().backward()
    assert loss_error(ours, theirs) < LOSS_FLOOR[torch.float64]
    assert seg.grad is not None
    assert other.grad is not None
    assert gradient_error(seg.grad, other.grad) < 1e-14


def test_trusted_source_with_a_transition_is_complementary_label_learning() -> None:
    problem = make_problem(4, (5,), ignored="none", label_dtype=torch.int64).to(F64)
    out = ck.annotation_nll(problem.seg, None, problem.labels, ck.uniform_transition(4, dtype=F64))
    reported = (1 - problem.seg.softmax(1).gather(1, problem.labels.unsqueeze(1))) / 3
    assert loss_error(out.nll, -reported.log().mean()) < LOSS_FLOOR[torch.float64]
    assert out.trace.item() == 0.0


@pytest.mark.parametrize(
    ("size", "grid", "mode"),
    [((7,), (3,), "linear"), ((5, 7), (2, 3), "bilinear"), ((4, 5, 3), (2, 3, 3), "trilinear")],
)
def test_strided_field_is_the_interpolated_field(size: tuple[int, ...], grid: tuple[int, ...], mode: str) -> None:
    problem = make_problem(3, size, grid, seg_grid=grid).to(F64)
    assert problem.cm is not None
    cm = F.interpolate(problem.cm.flatten(1, 2), size, mode=mode, align_corners=False).unflatten(1, (3, 3))
    seg = F.interpolate(problem.seg, size, mode=mode, align_corners=False)
    strided = ck.annotation_nll(problem.seg, problem.cm, problem.labels, backend="reference")
    full = ck.annotation_nll(seg, cm, problem.labels, backend="reference")
    assert loss_error(strided.loss, full.loss) < LOSS_FLOOR[torch.float64]


def test_confusion_matrix_given_as_positive_numbers() -> None:
    """Zhang et al. 2020: softplus, divided by the column sum. The same operator on the logarithm."""
    problem = make_problem(3, (4,), ignored="none", label_dtype=torch.int64).to(F64)
    assert problem.cm is not None
    positive = F.softplus(problem.cm)
    matrix = positive / positive.sum(1, keepdim=True)
    evidence = torch.einsum("bijx,bjx->bix", matrix, problem.seg.softmax(1)).gather(1, problem.labels.unsqueeze(1))
    out = ck.annotation_nll(problem.seg, positive.log(), problem.labels, backend="reference")
    assert loss_error(out.nll, -evidence.log().mean()) < LOSS_FLOOR[torch.float64]


def test_objective_is_the_sum_of_its_streams() -> None:
    problem, negative = make_problem(4, (3, 4)).to(F64), make_problem(4, (3, 4), (2, 2), seed=1).to(F64)
    options: dict[str, Any] = {"trace_weight": 0.05, "backend": "reference"}
    out = ck.coarse_label_loss(
        problem.seg, problem.cm, problem.labels, negative.cm, negative.labels, negative_weight=0.3, **options
    )
    first = ck.annotation_nll(problem.seg, problem.cm, problem.labels, **options)
    second = ck.annotation_nll(
        problem.seg, negative.cm, negative.labels, ck.uniform_transition(4, dtype=F64), **options
    )
    assert out.positive is not None
    assert out.negative is not None
    assert loss_error(out.positive.loss, first.loss) < LOSS_FLOOR[torch.float64]
    assert loss_error(out.negative.loss, second.loss) < LOSS_FLOOR[torch.float64]
    assert loss_error(out.loss, first.loss + 0.3 * second.loss) < LOSS_FLOOR[torch.float64]


@pytest.mark.parametrize("backend", ck.available_backends())
def test_the_transition_gets_its_gradient_through_a_column_that_cannot_give_the_label(backend: str) -> None:
    """q[1] is 0, but A[0, 1] p[1] is not: D = 1/4, d loss / dT[0, 0] = -(1/2 * 1/2 + 1/2 * 1) / D."""
    seg = torch.zeros(1, 2, 1, dtype=torch.float64)
    cm = torch.zeros(1, 2, 2, 1, dtype=torch.float64)
    cm[0, 1, 1] = -torch.inf
    transition = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.zeros(1, 1, dtype=torch.uint8)
    ck.annotation_nll(seg, cm, labels, transition, backend=backend).loss.backward()
    # A = [[1/2, 1], [1/2, 0]]: q = (1/2, 0), D = 1/4
    assert transition.grad is not None
    torch.testing.assert_close(transition.grad[:, 0], torch.tensor([-3.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize(("points", "pixels"), [(5768, 9001), (8227, 8988), (4097, 5000)])
def test_float64_is_as_exact_at_the_end_of_a_long_line_as_at_its_beginning(points: int, pixels: int) -> None:
    """Where F.interpolate of PyTorch 2.13 is 1e-4 of a point off, in double as well: the loss was, too, by 1e-8."""
    problem = make_problem(2, (pixels,), (points,), batch=1).to(F64)
    assert problem.cm is not None
    index = np.arange(pixels)
    low, rest = np.divmod(np.maximum((2 * index + 1) * points - pixels, 0), 2 * pixels)
    weight, field = rest / (2 * pixels), problem.cm[0].numpy()
    a = field[..., low] * (1 - weight) + field[..., np.minimum(low + 1, points - 1)] * weight
    log_a = torch.from_numpy(a).log_softmax(0)
    drawn = problem.labels.flatten().long()
    log_q = torch.logsumexp(log_a[drawn.clamp(max=1), :, torch.arange(pixels)].T + problem.seg[0].log_softmax(0), 0)
    wanted = -log_q[drawn != 255].mean()
    assert abs(evaluate(problem, "reference").loss.item() / wanted.item() - 1) < 1e-14
