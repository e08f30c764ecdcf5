"""nn.Module forms, and the transitions: uniform, estimated, fixed, learned."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import coarse_kernels as ck
from tests.helpers import generator, gradient_error, leaf, make_problem

# --- transitions ------------------------------------------------------------------------------------------------------


def test_uniform_transition() -> None:
    third = 1 / 3
    expected = torch.tensor(
        [[0, third, third, third], [third, 0, third, third], [third, third, 0, third], [third, third, third, 0]]
    )
    assert torch.equal(ck.uniform_transition(4), expected)
    assert torch.equal(ck.uniform_transition(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    wide = ck.uniform_transition(7, dtype=torch.float64)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.sum(1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-15)


def test_estimate_transition_by_hand() -> None:
    """Row 0: two "not 1", one "not 2". Row 1: one "not 0"; its contradiction is left out. Row 2: nothing drawn."""
    positive = torch.tensor([[0, 0, 0, 1, 1, 255, 2]], dtype=torch.uint8)
    negative = torch.tensor([[1, 1, 2, 0, 1, 0, 255]], dtype=torch.uint8)
    exact = ck.estimate_transition(positive, negative, 3, smoothing=0.0)
    torch.testing.assert_close(exact, torch.tensor([[0, 2 / 3, 1 / 3], [1, 0, 0], [0.5, 0.5, 0]]))
    smooth = ck.estimate_transition(positive, negative, 3)
    torch.testing.assert_close(smooth, torch.tensor([[0, 3 / 5, 2 / 5], [2 / 3, 0, 1 / 3], [0.5, 0.5, 0]]))
    assert smooth.dtype == torch.float32


def test_estimate_transition_of_other_labels() -> None:
    positive, negative = torch.tensor([0, 1, 1, -100]), torch.tensor([1, 0, -100, 0])
    for dtype in (torch.int64, torch.int32, torch.int16, torch.int8):
        found = ck.estimate_transition(positive.to(dtype), negative.to(dtype), 2, ignore_index=-100, smoothing=0.0)
        assert torch.equal(found, torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    nothing = torch.full((2, 3), 255, dtype=torch.uint8)
    assert torch.equal(ck.estimate_transition(nothing, nothing, 3), ck.uniform_transition(3))


def test_estimate_transition_finds_the_matrix_that_made_the_drawings() -> None:
    gen = generator(0)
    truth = torch.tensor([[0.0, 0.9, 0.1], [0.3, 0.0, 0.7], [0.5, 0.5, 0.0]])
    positive = torch.randint(0, 3, (200, 200), generator=gen)
    negative = torch.multinomial(truth[positive.flatten()], 1, generator=gen).reshape(positive.shape)
    torch.testing.assert_close(ck.estimate_transition(positive, negative, 3), truth, rtol=0, atol=0.02)


def test_transition_matrix_kinds() -> None:
    uniform = ck.TransitionMatrix.uniform(3)
    assert torch.equal(uniform(), ck.uniform_transition(3))
    matrix = torch.tensor([[0.0, 0.2, 0.8], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    fixed = ck.TransitionMatrix.fixed(matrix)
    assert torch.equal(fixed(), matrix)
    matrix.fill_(7.0)
    assert fixed().max() <= 1.0, "the module shares memory with its argument"
    labels = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 0])
    estimated = ck.TransitionMatrix.estimated(*labels, 3, smoothing=0.5)
    assert torch.equal(estimated(), ck.estimate_transition(*labels, 3, smoothing=0.5))
    assert not list(uniform.parameters()) + list(fixed.parameters()) + list(estimated.parameters())
    learned = ck.TransitionMatrix.learned(3)
    assert [p.shape for p in learned.parameters()] == [(3, 3)]
    torch.testing.assert_close(learned(), ck.uniform_transition(3))
    matrix = torch.tensor([[0.0, 0.25, 0.75], [0.5, 0.0, 0.5], [0.1, 0.9, 0.0]])
    torch.testing.assert_close(ck.TransitionMatrix.learned(3, matrix)(), matrix)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["given", "cast", "cast and back", "loaded"])
def test_a_transition_of_nineteen_classes_survives_16_bits(dtype: torch.dtype, way: str) -> None:
    """A row of eighteen times 1/18 in bfloat16 sums up to 1.002; training stopped at the first step."""
    module = ck.TransitionMatrix.uniform(19)
    if way == "given":
        module = ck.TransitionMatrix.fixed(ck.uniform_transition(19, dtype=dtype))
    elif way == "loaded":
        module.load_state_dict({"matrix": ck.uniform_transition(19, dtype=dtype)})
    else:
        module = nn.Sequential(module).to(dtype)[0]
        module = module.float() if way == "cast and back" else module
    assert module().dtype == torch.float32
    torch.testing.assert_close(module(), ck.uniform_transition(19), rtol=1e-6, atol=0)
    labels = torch.zeros(1, 4, 4, dtype=torch.uint8)
    assert ck.coarse_label_loss(torch.zeros(1, 19, 4, 4), None, None, None, labels, module()).loss.isfinite()


def test_a_stored_transition_that_does_not_fit_is_told_by_pytorch() -> None:
    module = ck.TransitionMatrix.uniform(3)
    with pytest.raises(RuntimeError, match="size mismatch for matrix"):
        module.load_state_dict({"matrix": torch.zeros(3, dtype=torch.bfloat16)})


@pytest.mark.parametrize("smoothing", [1e-320, 1e38])
def test_estimated_rows_sum_to_1_whatever_is_added(smoothing: float) -> None:
    labels = torch.zeros(1, 3, 3, dtype=torch.uint8)
    rows = ck.estimate_transition(labels, labels, 4, smoothing=smoothing).sum(1)
    torch.testing.assert_close(rows, torch.ones(4), rtol=1e-6, atol=0)


def test_learned_transition_stays_a_transition_and_trains() -> None:
    """Negative drawings from a known matrix, true classes known: the learned matrix goes to it."""
    gen = generator(1)
    truth = torch.tensor([[0.0, 0.9, 0.1], [0.3, 0.0, 0.7], [0.5, 0.5, 0.0]])
    classes = torch.randint(0, 3, (1, 60, 60), generator=gen)
    labels = torch.multinomial(truth[classes.flatten()], 1, generator=gen).reshape(classes.shape)
    seg = 20.0 * nn.functional.one_hot(classes, 3).movedim(-1, 1)
    identity = (20.0 * torch.eye(3)).reshape(1, 3, 3, 1, 1)
    learned = ck.TransitionMatrix.learned(3)
    criterion = ck.CoarseLabelCriterion(learned, trace_weight=0.0)
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = criterion(seg, None, None, identity, labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        matrix = learned()
        assert (matrix.diagonal() == 0).all()
        torch.testing.assert_close(matrix.sum(1), torch.ones(3))
    assert losses[-1] < losses[0] - 0.05
    torch.testing.assert_close(learned().detach(), truth, rtol=0, atol=0.05)


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ck.available_backends())
def test_annotation_nll_module_is_the_function(backend: str) -> None:
    weight = torch.tensor([0.5, 1.0, 2.0])
    problem = make_problem(3, (6, 9), (2, 3), stream="random", ignore_index=7)
    pixel_weight = torch.rand(2, 6, 9, generator=generator(0))
    module = ck.AnnotationNLL(trace_weight=0.2, ignore_index=7, class_weight=weight, reduction="mean", backend=backend)
    ours = module(
        problem.seg, problem.cm, problem.labels, problem.transition, pixel_weight=pixel_weight, normalizer=11.0
    )
    expected = ck.annotation_nll(
        problem.seg,
        problem.cm,
        problem.labels,
        problem.transition,
        trace_weight=0.2,
        ignore_index=7,
        class_weight=weight,
        pixel_weight=pixel_weight,
        normalizer=11.0,
        backend=backend,
    )
    for got, want in zip(ours, expected, strict=True):
        assert torch.equal(got, want)
    assert "trace_weight=0.2" in repr(module)


@pytest.mark.parametrize("backend", ck.available_backends())
def test_criterion_is_the_function(backend: str) -> None:
    positive, negative = make_problem(3, (6, 9), (2, 3)), make_problem(3, (6, 9), (1, 1), seed=1)
    matrix = torch.tensor([[0.0, 0.2, 0.8], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
    options: dict[str, Any] = {"trace_weight": 0.03, "negative_weight": 0.4, "reduction": "sum", "backend": backend}
    module = ck.CoarseLabelCriterion(ck.TransitionMatrix.fixed(matrix), **options)
    pair = (torch.rand(2, 6, 9, generator=generator(0)), None)
    arguments = (positive.seg, positive.cm, positive.labels, negative.cm, negative.labels)
    ours = module(*arguments, pixel_weight=pair)
    expected = ck.coarse_label_loss(*arguments, matrix, pixel_weight=pair, **options)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(ours.loss, ours.positive.loss + 0.4 * ours.negative.loss) or abs(
        ours.loss.item() - (ours.positive.loss + 0.4 * ours.negative.loss).item()
    ) < 1e-5 * abs(ours.loss.item())
    only = module(*arguments[:3])
    assert only.negative is None
    assert torch.equal(only.loss, only.positive.loss)
    only = module(positive.seg, None, None, negative.cm, negative.labels)
    assert only.positive is None
    assert only.loss.item() == pytest.approx(0.4 * only.negative.loss.item(), rel=1e-6)


def test_negative_weight_zero_switches_the_stream_off() -> None:
    positive, negative = make_problem(3, (6, 9)), make_problem(3, (6, 9), seed=1)
    seg, cm, other = leaf(positive.seg), leaf(positive.cm), leaf(negative.cm)
    assert seg is not None
    out = ck.coarse_label_loss(seg, cm, positive.labels, other, negative.labels, negative_weight=0.0)
    alone = ck.coarse_label_loss(positive.seg, positive.cm, positive.labels)
    out.loss.backward()
    assert torch.equal(out.loss, alone.loss)
    assert other is not None
    assert other.grad is not None
    assert (other.grad == 0).all()
    full = ck.coarse_label_loss(positive.seg, None, None, negative.cm, negative.labels)
    assert out.negative is not None
    assert out.negative.loss.item() == pytest.approx(full.loss.item(), rel=1e-6)


MODULES = {
    "nll": lambda: ck.AnnotationNLL(trace_weight=0.2, class_weight=torch.tensor([0.5, 1.0, 2.0])),
    "criterion": lambda: ck.CoarseLabelCriterion(ck.TransitionMatrix.learned(3), class_weight=torch.rand(3)),
    "uniform": lambda: ck.TransitionMatrix.uniform(3),
    "learned": lambda: ck.TransitionMatrix.learned(3),
}


@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_modules_copy_pickle_and_load(make) -> None:  # type: ignore[no-untyped-def]
    module = make()
    for parameter in module.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator(0)))
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    loaded = make()
    loaded.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded):
        assert other is not module
        assert repr(other) == repr(module)
        state = other.state_dict()
        assert state.keys() == module.state_dict().keys()
        for name, value in module.state_dict().items():
            assert torch.equal(state[name], value)
            assert state[name].data_ptr() != value.data_ptr()


def test_results_pickle_and_unpack() -> None:
    problem = make_problem(3, (2, 3))
    out = ck.annotation_nll(problem.seg, problem.cm, problem.labels)
    again = pickle.loads(pickle.dumps(out))
    assert isinstance(again, ck.AnnotationLoss)
    assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
    loss, nll, trace, count = out
    assert (loss is out.loss, nll is out.nll, trace is out.trace, count is out.count) == (True,) * 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_modules_move_to_another_dtype(dtype: torch.dtype) -> None:
    """model.half() takes the criterion along: class weights and transition in 16 bits still serve."""
    criterion = ck.CoarseLabelCriterion(ck.TransitionMatrix.learned(3), class_weight=torch.tensor([0.5, 1.0, 2.0]))
    problem = make_problem(3, (6, 9), (2, 3))
    before = criterion(problem.seg, problem.cm, problem.labels, problem.cm, problem.labels).loss
    criterion.to(dtype)
    moved = problem.to(dtype)
    out = criterion(moved.seg, moved.cm, problem.labels, moved.cm, problem.labels).loss
    out.backward()
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert out.item() == pytest.approx(before.item(), rel=2e-2)
    (parameter,) = criterion.parameters()
    assert parameter.grad is not None
    assert parameter.grad.dtype == dtype
    assert parameter.grad.isfinite().all()


def test_learned_transition_has_the_gradient_of_the_oracle() -> None:
    problem = make_problem(3, (6, 9), (2, 3), scale=1.0)
    found = []
    for backend, dtype in (("reference", torch.float64), (ck.available_backends()[0], torch.float32)):
        learned = ck.TransitionMatrix.learned(3).to(dtype)
        data = problem.to(dtype)
        ck.annotation_nll(data.seg, data.cm, data.labels, learned(), backend=backend).loss.backward()
        assert learned.logits.grad is not None
        found.append(learned.logits.grad)
    assert gradient_error(found[1], found[0]) < 5e-6


@pytest.mark.parametrize("backend", ck.available_backends())
def test_a_stream_of_weight_zero_adds_nothing_even_where_its_loss_is_infinite(backend: str) -> None:
    """Ablations set the weight to 0; one impossible label must not turn the objective into 0 * inf = NaN."""
    problem = make_problem(3, (4, 5), ignored="none")
    matrix = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])  # class 2 is never named
    arguments = (problem.seg, problem.cm, problem.labels)
    out = ck.coarse_label_loss(
        *arguments, problem.cm, problem.labels, matrix, negative_weight=0.0, trace_weight=0.0, backend=backend
    )
    alone = ck.coarse_label_loss(*arguments, trace_weight=0.0, backend=backend)
    assert out.negative is not None
    assert out.negative.loss == torch.inf
    assert torch.equal(out.loss, alone.loss)
