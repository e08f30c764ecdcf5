"""Every form in which an argument may come gives the same numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from tests.contract import GRADIENT_FLOOR, LOSS_FLOOR
from tests.helpers import generator, gradient_error, leaf, loss_error, make_problem, put

EVERY = pytest.mark.every
F64 = torch.float64


@EVERY
@pytest.mark.parametrize(
    "normalizer",
    [
        3.0,
        3,
        np.float32(3),
        np.float64(3),
        np.int64(3),
        torch.tensor(3),
        torch.tensor(3.0),
        torch.tensor(3.0).bfloat16(),
    ],
    ids=lambda n: f"{type(n).__name__}-{getattr(n, 'dtype', '')}",
)
def test_normalizer(backend: str, normalizer: Any) -> None:
    """In float64, where a reciprocal in numpy's float32 would be seen."""
    problem = make_problem(3, (4, 5)).to(F64)
    total = ck.annotation_nll(problem.seg, problem.cm, problem.labels, reduction="sum", backend=backend).loss
    ours = ck.annotation_nll(problem.seg, problem.cm, problem.labels, normalizer=normalizer, backend=backend).loss
    assert loss_error(ours, total / 3) < LOSS_FLOOR[torch.float64]


@EVERY
@pytest.mark.parametrize("zero", [torch.tensor(0.0), torch.tensor(0)], ids=str)
def test_a_normalizer_that_has_summed_up_nothing_means_zero(backend: str, zero: Tensor) -> None:
    problem = make_problem(3, (4, 5))
    seg = leaf(problem.seg)
    assert seg is not None
    loss = ck.annotation_nll(seg, problem.cm, problem.labels, normalizer=zero, backend=backend).loss
    loss.backward()
    assert loss == 0
    assert seg.grad is not None
    assert not seg.grad.any()


@EVERY
def test_numbers_of_numpy(backend: str) -> None:
    problem = make_problem(3, (4, 5), stream="random").to(F64)

    def run(number: Any, integer: Any) -> list[Tensor]:
        kind = ck.Drawings(problem.labels, problem.cm, problem.transition, weight=number, trace_weight=number)
        out = ck.annotation_objective(problem.seg, [kind], ignore_index=integer(255), backend=backend)
        two = ck.coarse_label_loss(
            problem.seg,
            None,
            problem.labels,
            problem.cm,
            problem.labels,
            trace_weight=number,
            negative_weight=number,
            ignore_index=integer(255),
            backend=backend,
        )
        return [out.loss, two.loss]

    for kind in (np.float64, np.float32, np.float16):
        for ours, usual in zip(run(kind(0.25), np.int64), run(0.25, int), strict=True):
            assert torch.equal(ours, usual)
    for ours, usual in zip(run(np.uint8(2), np.uint8), run(2, int), strict=True):
        assert torch.equal(ours, usual)


@EVERY
def test_a_matrix_flat_or_square_in_every_function(backend: str) -> None:
    problem = make_problem(3, (4, 5), (2, 3), stream="random")
    assert problem.cm is not None
    flat = problem.cm.flatten(1, 2)
    grads = []
    for cm in (problem.cm, flat):
        cm = leaf(cm)
        assert cm is not None
        out = ck.annotation_objective(
            problem.seg, [ck.Drawings(problem.labels, cm, problem.transition)], backend=backend
        )
        out.loss.backward()
        assert cm.grad is not None
        grads.append(cm.grad.reshape(flat.shape))
    assert torch.equal(*grads)
    for function in (
        lambda cm: ck.annotation_posterior(problem.seg, cm, problem.labels, backend=backend),
        lambda cm: ck.annotation_posterior(problem.seg, [ck.Drawings(problem.labels, cm)], backend=backend),
        lambda cm: ck.coarse_label_loss(problem.seg, cm, problem.labels, cm, problem.labels, backend=backend).loss,
    ):
        assert torch.equal(function(problem.cm), function(flat))


@EVERY
def test_size_of_a_label_map(backend: str) -> None:
    logits = put(torch.randn(2, 3, 4, 5, generator=generator(0)))
    expected = ck.label_map(logits, (6, 7), backend="reference")
    for size in ([6, 7], torch.Size((6, 7)), np.array([6, 7]), (np.int64(6), np.uint8(7)), np.zeros((6, 7)).shape):
        assert torch.equal(ck.label_map(logits, size, backend=backend), expected)


@EVERY
def test_weights_where_there_is_no_label_may_be_negative(backend: str) -> None:
    problem = make_problem(3, (4, 5))
    weight = put(torch.rand(2, 4, 5, generator=generator(0)))
    ignored = weight.masked_fill(problem.labels == 255, -1.0)
    ours = ck.annotation_nll(problem.seg, problem.cm, problem.labels, pixel_weight=ignored, backend=backend)
    usual = ck.annotation_nll(problem.seg, problem.cm, problem.labels, pixel_weight=weight, backend=backend)
    assert torch.equal(ours.loss, usual.loss)
    outside = problem.labels.clamp_max(1)  # nobody has drawn class 2, and 255 is ignored all the same
    outside[problem.labels == 255] = 255
    for absent in (-1.0, torch.inf):
        class_weight = put(torch.tensor([1.0, 0.5, absent]))
        out = ck.annotation_nll(problem.seg, problem.cm, outside, class_weight=class_weight, backend=backend)
        assert out.loss.isfinite()


@EVERY
def test_an_ignore_index_that_bytes_do_not_hold_ignores_no_weight(backend: str) -> None:
    """-100 is 156 in eight bits: the bad weight of a label 156 would be overlooked."""
    seg, labels = put(torch.zeros(1, 160, 2)), put(torch.tensor([[156, 3]], dtype=torch.uint8))
    weight = put(torch.tensor([[-1.0, 1.0]]))
    with pytest.raises(ValueError, match=r"pixel_weight: expected finite numbers >= 0 .*got -1\.0"):
        ck.annotation_nll(seg, None, labels, ignore_index=-100, pixel_weight=weight, backend=backend)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("classes", [3, 19, 150])
def test_a_transition_stored_in_any_type_sums_to_one_within_its_rounding(
    backend: str, dtype: torch.dtype, classes: int
) -> None:
    seg = put(torch.randn(1, classes, 4, generator=generator(0)))
    labels = put(torch.randint(0, classes, (1, 4), generator=generator(1)))
    learned = ck.TransitionMatrix.learned(classes).to(dtype)
    with torch.no_grad():
        learned.logits.add_(torch.randn(classes, classes, generator=generator(2)).to(dtype))
    for transition in (ck.uniform_transition(classes, dtype=dtype), learned().detach()):
        ours = ck.coarse_label_loss(seg, None, None, None, labels, put(transition), backend=backend).loss
        exact = transition.double() / transition.double().sum(1, keepdim=True)
        truth = ck.coarse_label_loss(seg.double(), None, None, None, labels, put(exact), backend="reference").loss
        assert loss_error(ours, truth) < (1e-6 if dtype in (torch.float32, F64) else 1e-2)


def test_estimated_transition_of_numpy_numbers_and_any_integers() -> None:
    gen = generator(0)
    positive, negative = torch.randint(0, 4, (50,), generator=gen), torch.randint(0, 4, (50,), generator=gen)
    usual = ck.estimate_transition(positive, negative, 4, smoothing=0.5)
    ours = ck.estimate_transition(
        positive.to(torch.int8), negative.to(torch.uint8), np.int64(4), ignore_index=np.int64(255), smoothing=np.float32(0.5)
    )  # fmt: skip
    assert torch.equal(ours, usual)
    assert torch.equal(ck.uniform_transition(np.int32(4)), ck.uniform_transition(4))
    assert gradient_error(ours.sum(1), torch.ones(4)) < GRADIENT_FLOOR[torch.float32]
