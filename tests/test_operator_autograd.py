"""Whoever differentiates in another way than one backward gets the right number or a clear error, never 0 and never a part.

Second derivatives, torch.func, forward mode, scaled losses in 16 bits, subclasses of Tensor.
"""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels.backends import autograd, operator
from tests.contract import GRADIENT_APART, GRADIENT_FLOOR, LOSS_FLOOR
from tests.helpers import (
    SCHEDULES,
    Problem,
    device,
    generator,
    gradient_error,
    leaf,
    loss_error,
    make_problem,
    operators_of,
    oracle,
    put,
    random_transition,
)

FUSED = pytest.mark.fused
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
F64 = torch.float64


class Mask(torch.Tensor):
    """As torchvision's, fastai's and MONAI's."""


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- first derivatives, by every door ---------------------------------------------------------------------------------


def by_grad(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(function(*at), at)


def by_backward(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor | None, ...]:
    function(*at).backward()
    return tuple(t.grad for t in at)


def by_backward_of_inputs(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor | None, ...]:
    """One after the other: none of them may get what was not asked for."""
    loss = function(*at)
    for number, tensor in enumerate(at):
        loss.backward(inputs=[tensor], retain_graph=True)
        assert all(other.grad is None for other in at[number + 1 :])
    return tuple(t.grad for t in at)


def by_vjp(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.functional.vjp(function, at)[1]


def by_jacobian(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.functional.jacobian(function, at)


def by_func_grad(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    return torch.func.grad(function, argnums=(0, 1, 2))(*at)


def by_func_vjp(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    value, pull = torch.func.vjp(function, *at)
    return pull(torch.ones_like(value))


def by_jvp_along_each_axis(function: Callable[..., Tensor], *at: Tensor) -> tuple[Tensor, ...]:
    """Forward mode knows it, too, a number at a time."""
    return torch.func.jacfwd(function, argnums=(0, 1, 2))(*at)


TRANSFORMS = (by_func_grad, by_func_vjp, by_jvp_along_each_axis)
FIRST = (by_grad, by_backward, by_backward_of_inputs, by_vjp, by_jacobian, *TRANSFORMS)


@pytest.mark.every
@SCHEDULE
@pytest.mark.parametrize("grid", [None, (2, 3), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.parametrize("door", FIRST, ids=lambda door: door.__name__.removeprefix("by_"))
def test_a_first_derivative_is_right_by_every_door_or_names_the_reference(
    backend: str, schedule: str, grid: tuple[int, int] | None, door: Callable[..., Any]
) -> None:
    problem = make_problem(3, (4, 5), grid, stream="random", trace_weight=0.1, batch=1)
    truth = oracle(problem)
    leaves = [leaf(t) for t in (problem.seg, problem.cm, problem.transition)]

    def loss(seg: Tensor, cm: Tensor, transition: Tensor) -> Tensor:
        return ck.annotation_nll(seg, cm, problem.labels, transition, trace_weight=0.1, backend=backend).loss

    with ck.use_schedule(schedule):
        if door in TRANSFORMS and backend != "reference":
            with pytest.raises(RuntimeError, match=f'backend {backend!r}.*backend="reference"'):
                door(loss, *leaves)
            return
        found = door(loss, *leaves)
    for name, gradient in zip(("seg", "cm", "transition"), found, strict=True):
        assert gradient is not None
        assert gradient_error(gradient, truth.gradients[name]) < GRADIENT_APART, name


# --- second derivatives -----------------------------------------------------------------------------------------------


def network() -> tuple[Tensor, torch.nn.Module]:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 4, 1), torch.nn.Tanh(), torch.nn.Conv2d(4, 3, 1))
    return put(torch.randn(2, 2, 4, 5, generator=generator(1))), net.to(device())


Loss = Callable[[Tensor], Tensor]


def hessian_vector_product(loss: Loss) -> Any:
    x, net = network()
    parameters = list(net.parameters())
    grads = torch.autograd.grad(loss(net(x)), parameters, create_graph=True)
    ones = [torch.ones_like(p) for p in parameters]
    return torch.autograd.grad(grads, parameters, grad_outputs=ones, allow_unused=True)


def penalty(loss: Loss) -> tuple[Tensor, list[Tensor]]:
    x, net = network()
    logits = net(x)
    value = loss(logits)
    (grad,) = torch.autograd.grad(value, logits, create_graph=True)
    return value + 10 * grad.pow(2).sum(), list(net.parameters())


def penalty_backward(loss: Loss) -> Any:
    penalty(loss)[0].backward()


def penalty_backward_of_inputs(loss: Loss) -> Any:
    total, parameters = penalty(loss)
    total.backward(inputs=parameters)


def penalty_grad(loss: Loss) -> Any:
    return torch.autograd.grad(*penalty(loss))


def at_logits(functional: Callable[..., Any], *vector: Tensor) -> Callable[[Loss], Any]:
    logits = torch.randn(2, 3, 4, 5, generator=generator(2))
    return lambda loss: functional(loss, put(logits), *map(put, vector))


ONES = torch.ones(2, 3, 4, 5)
DOORS: dict[str, Callable[[Loss], Any]] = {
    "hessian_vector_product": hessian_vector_product,
    "penalty_backward": penalty_backward,
    "penalty_backward_of_inputs": penalty_backward_of_inputs,
    "penalty_grad": penalty_grad,
    "functional.hvp": at_logits(torch.autograd.functional.hvp, ONES),
    "functional.vhp": at_logits(torch.autograd.functional.vhp, ONES),
    "functional.hessian": at_logits(torch.autograd.functional.hessian),
    "functional.jvp": at_logits(torch.autograd.functional.jvp, ONES),  # the derivative of a backward by what comes in
}


@FUSED
@SCHEDULE
@pytest.mark.parametrize("use", [lambda out: out.loss, lambda out: out.loss**2, lambda out: out.parts[1].loss])
@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
def test_double_backward_names_the_reference(
    backend: str, schedule: str, use: Callable[[ck.Objective], Tensor], door: Callable[[Loss], Any]
) -> None:
    """AdaHessian, gradient penalties, second-order MAML: the operator's part was left out where autograd is told whose gradient
    is wanted."""
    problem = make_problem(3, (4, 5), stream="random")
    drawings = [ck.Drawings(problem.labels), ck.Drawings(problem.labels, problem.cm, problem.transition)]

    def loss(name: str) -> Loss:
        return lambda seg: use(ck.annotation_objective(seg, drawings, backend=name))

    with ck.use_schedule(schedule):
        with pytest.raises(RuntimeError, match='backend="reference"'):
            door(loss(backend))
        door(loss("reference"))


@FUSED
@SCHEDULE
@pytest.mark.parametrize("name", ["seg", "cm", "transition"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_by_one_input_names_the_reference(
    backend: str, schedule: str, name: str, reduction: str
) -> None:
    """Of each gradient by each input, though one_pass keeps none of them."""
    problem = make_problem(3, (4, 5), stream="random")
    for of in ("seg", "cm", "transition"):
        leaves = {key: leaf(getattr(problem, key)) for key in ("seg", "cm", "transition")}
        with ck.use_schedule(schedule):
            out = ck.annotation_nll(
                leaves["seg"], leaves["cm"], problem.labels, leaves["transition"], reduction=reduction, backend=backend
            )
            (first,) = torch.autograd.grad(out.loss.sum(), leaves[of], create_graph=True)
            with pytest.raises(RuntimeError, match='backend="reference"'):
                torch.autograd.grad(first.pow(2).sum(), leaves[name], allow_unused=True)


@pytest.mark.sampled(3)
@FUSED
@pytest.mark.parametrize("door", ["grad", "inputs", "backward"])
def test_double_backward_of_a_compiled_function_raises(backend: str, door: str) -> None:
    problem = make_problem(3, (4, 5))
    compiled = torch.compile(
        lambda seg: ck.annotation_nll(seg, problem.cm, problem.labels, backend=backend).loss, backend="aot_eager"
    )
    seg, factor = leaf(problem.seg), put(torch.ones(())).requires_grad_()
    assert seg is not None
    (first,) = torch.autograd.grad(compiled(seg * factor), seg, create_graph=True)
    total = first.pow(2).sum()

    def second() -> None:
        if door == "grad":
            torch.autograd.grad(total, [factor], allow_unused=True)
        else:
            total.backward(inputs=[factor] if door == "inputs" else None)

    with pytest.raises(RuntimeError, match="double backward"):
        second()


@FUSED
def test_the_graph_of_a_first_derivative_is_freed(backend: str) -> None:
    """create_graph=True without a second backward keeps no more than any other graph."""
    problem = make_problem(3, (4, 5))
    seg = leaf(problem.seg)
    assert seg is not None

    def step() -> None:
        loss = ck.annotation_nll(seg, problem.cm, problem.labels, backend=backend).loss
        torch.autograd.grad(loss, seg, create_graph=True)

    step()
    gc.collect()
    before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    for _ in range(5):
        step()
    assert sum(issubclass(type(o), Tensor) for o in gc.get_objects()) == before


# --- torch.func and forward mode --------------------------------------------------------------------------------------


def functions(backend: str | None) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    """Of one tensor each: the function, where, and a direction."""
    problem = make_problem(3, (4, 5), (2, 3), seg_grid=(3, 4)).to(F64)
    seg, cm, labels = problem.seg, problem.cm, problem.labels
    gen = generator(3)
    transition = put(random_transition(3, gen).double())
    turn = put((random_transition(3, gen) - random_transition(3, gen)).double())  # rows that sum to 0
    options: dict[str, Any] = {"trace_weight": 0.1, "backend": backend}
    assert cm is not None
    at_seg, at_cm = (put(torch.randn(t.shape, generator=gen, dtype=F64)) for t in (seg, cm))

    def objective(seg: Tensor) -> Tensor:
        drawings = [
            ck.Drawings(labels, cm, trace_weight=0.1),
            ck.Drawings(labels.unsqueeze(1), None, transition, weight=0.3),
        ]
        return ck.annotation_objective(seg, drawings, backend=backend).loss

    return {
        "seg": (lambda t: ck.annotation_nll(t, cm, labels, transition, **options).loss, seg, at_seg),
        "cm": (lambda t: ck.annotation_nll(seg, t, labels, transition, **options).loss, cm, at_cm),
        "transition": (lambda t: ck.annotation_nll(seg, cm, labels, t, **options).loss, transition, turn),
        "transition, trusted": (lambda t: ck.annotation_nll(seg, None, labels, t, **options).loss, transition, turn),
        "map": (lambda t: ck.annotation_nll(t, cm, labels, reduction="none", **options).loss, seg, at_seg),
        "objective": (objective, seg, at_seg),
    }


def posteriors(backend: str | None) -> dict[str, tuple[Callable[[Tensor], Tensor], Tensor, Tensor]]:
    found = functions(backend)
    (_, seg, at), (_, cm, towards), (_, transition, turn) = (found[name] for name in ("seg", "cm", "transition"))
    labels = make_problem(3, (4, 5)).labels
    return {
        "seg": (lambda t: ck.annotation_posterior(t, cm, labels, backend=backend), seg, at),
        "cm": (lambda t: ck.annotation_posterior(seg, t, labels, transition, backend=backend), cm, towards),
        "transition": (lambda t: ck.annotation_posterior(seg, cm, labels, t, backend=backend), transition, turn),
        "transition, trusted": (
            lambda t: ck.annotation_posterior(seg, None, labels, t, backend=backend),
            transition,
            turn,
        ),
    }


NAMES = ("seg", "cm", "transition", "transition, trusted", "map", "objective")
POSTERIORS = NAMES[:4]


def dual_numbers(function: Callable[[Tensor], Tensor], at: Tensor, towards: Tensor) -> Tensor:
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(function(fwAD.make_dual(at, towards))).tangent
    assert tangent is not None
    return tangent


FORWARD: dict[str, Callable[..., Tensor]] = {
    "jvp": lambda function, at, towards: torch.func.jvp(function, (at,), (towards,))[1],
    "dual numbers": dual_numbers,
}


def difference(function: Callable[[Tensor], Tensor], at: Tensor, towards: Tensor, step: float = 1e-6) -> Tensor:
    return (function(at + step * towards) - function(at - step * towards)) / (2 * step)


@pytest.mark.parametrize("name", [None, "reference"], ids=str)
@pytest.mark.parametrize("mode", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("of", NAMES)
def test_forward_mode_is_the_difference_quotient_and_not_zero(of: str, mode: Callable[..., Tensor], name: str) -> None:
    function, at, towards = functions(name)[of]
    expected = difference(function, at, towards)
    assert expected.abs().max() > 1e-4
    assert loss_error(mode(function, at, towards), expected) < 1e-7


@pytest.mark.parametrize("mode", FORWARD.values(), ids=FORWARD)
@pytest.mark.parametrize("of", POSTERIORS)
def test_forward_mode_of_the_posterior(of: str, mode: Callable[..., Tensor]) -> None:
    function, at, towards = posteriors(None)[of]
    expected = difference(function, at, towards)
    assert expected.abs().max() > 1e-4
    assert loss_error(mode(function, at, towards), expected) < 1e-7


def test_columns_and_rows_of_a_jacobian_agree() -> None:
    function, at, _ = functions(None)["map"]
    columns, rows = torch.func.jacfwd(function)(at), torch.func.jacrev(function)(at)
    assert columns.abs().max() > 1e-3
    assert gradient_error(columns, rows) < GRADIENT_FLOOR[F64]
    vectorized = torch.autograd.functional.jacobian(function, at, strategy="forward-mode", vectorize=True)
    assert gradient_error(vectorized, rows) < GRADIENT_FLOOR[F64]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linearize_finds_no_value_to_read_in_its_trace(reduction: str) -> None:
    problem = make_problem(3, (6, 9), (2, 3))

    seg, cm = problem.seg.double(), problem.cm.double()

    def loss(seg: Tensor) -> Tensor:
        return ck.annotation_nll(seg, cm, problem.labels, reduction=reduction).loss

    towards = torch.randn(seg.shape, generator=generator(3), dtype=torch.float64)
    value, slope = torch.func.linearize(loss, seg)
    expected = torch.func.jvp(loss, (seg,), (towards,))
    torch.testing.assert_close((value, slope(towards)), expected, rtol=1e-12, atol=1e-14)


@FUSED
@pytest.mark.parametrize("of", NAMES)
def test_forward_mode_of_a_fused_backend_names_the_reference(backend: str, of: str) -> None:
    function, at, towards = functions(backend)[of]
    for mode in FORWARD.values():
        with pytest.raises(RuntimeError, match=f'backend {backend!r}.*backend="reference"'):
            mode(function, at, towards)
    with pytest.raises(RuntimeError, match=f'backend {backend!r}.*backend="reference"'):
        torch.func.grad(lambda t: function(t).sum())(at)
    if of in POSTERIORS:
        with pytest.raises(RuntimeError, match=f'backend {backend!r}.*backend="reference"'):
            dual_numbers(*posteriors(backend)[of])
    if of == "seg":
        with pytest.raises(RuntimeError, match=f'backend {backend!r}.*backend="reference"'):
            torch.func.vmap(lambda t: ck.label_map(t[None], (6, 6), backend=backend))(at)


@FUSED
def test_constants_in_a_dual_level_are_served_by_the_fused_backend(backend: str) -> None:
    """Only a tensor with a tangent asks for a derivative."""
    function, at, _ = functions(backend)["seg"]
    with fwAD.dual_level():
        assert loss_error(function(at), functions("reference")["seg"][0](at)) < LOSS_FLOOR[F64]


@pytest.mark.parametrize("name", [None, "reference"], ids=str)
def test_per_sample_gradients(name: str) -> None:
    """vmap(grad) over images and their labels."""
    problem = make_problem(3, (4, 5), (2, 3), stream="random").to(F64)

    def loss(seg: Tensor, cm: Tensor | None, labels: Tensor) -> Tensor:
        cm = None if cm is None else cm[None]
        return ck.annotation_nll(seg[None], cm, labels[None], problem.transition, trace_weight=0.1, backend=name).loss

    grads = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1)))(problem.seg, problem.cm, problem.labels)
    trusted = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, 0))(problem.seg, None, problem.labels)
    losses = torch.func.vmap(loss)(problem.seg, problem.cm, problem.labels)
    for image in range(2):
        seg, cm = leaf(problem.seg[image]), leaf(problem.cm[image])  # type: ignore[index]
        assert seg is not None
        assert cm is not None
        alone = loss(seg, cm, problem.labels[image])
        for ours, truth in zip(grads, torch.autograd.grad(alone, (seg, cm)), strict=True):
            assert gradient_error(ours[image], truth) < GRADIENT_FLOOR[torch.float64]
        (truth,) = torch.autograd.grad(loss(seg, None, problem.labels[image]), seg)
        assert gradient_error(trusted[image], truth) < GRADIENT_FLOOR[torch.float64]
        assert loss_error(losses[image], alone) < LOSS_FLOOR[F64]


@pytest.mark.parametrize("name", [None, "reference"], ids=str)
def test_vmap_of_posterior_and_label_map(name: str) -> None:
    problem = make_problem(3, (4, 5), (2, 3), stream="random").to(F64)
    posterior = torch.func.vmap(lambda s, c, y: ck.annotation_posterior(s[None], c[None], y[None], backend=name)[0])
    expected = ck.annotation_posterior(problem.seg, problem.cm, problem.labels, backend="reference")
    assert gradient_error(posterior(problem.seg, problem.cm, problem.labels), expected) < GRADIENT_FLOOR[torch.float64]
    labels = torch.func.vmap(lambda s: ck.label_map(s[None], (7, 9), backend=name)[0])(problem.seg)
    assert torch.equal(labels, ck.label_map(problem.seg, (7, 9)))


@FUSED
@SCHEDULE
def test_batches_of_incoming_gradients_are_right_or_name_the_reference(backend: str, schedule: str) -> None:
    """Rows of a Jacobian by vmap over the backward."""
    problem = make_problem(3, (4, 5)).to(F64)
    factors = put(torch.tensor([1.0, -2.5], dtype=F64))
    seg = leaf(problem.seg)
    assert seg is not None
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, problem.cm, problem.labels, backend=backend).loss
        (once,) = torch.autograd.grad(loss, seg, retain_graph=True)
        if schedule == "one_pass":
            (batch,) = torch.autograd.grad(loss, seg, grad_outputs=factors, is_grads_batched=True)
            assert gradient_error(batch, factors.view(2, 1, 1, 1, 1) * once) < GRADIENT_FLOOR[torch.float64]
        else:
            with pytest.raises(RuntimeError, match='backend="reference"'):
                torch.autograd.grad(loss, seg, grad_outputs=factors, is_grads_batched=True)


@FUSED
@SCHEDULE
def test_a_tangent_that_comes_in_with_the_gradient_names_the_reference(backend: str, schedule: str) -> None:
    problem = make_problem(3, (4, 5))
    seg = leaf(problem.seg)
    assert seg is not None
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, problem.cm, problem.labels, backend=backend).loss
    with fwAD.dual_level():
        factor = fwAD.make_dual(torch.ones_like(loss), torch.ones_like(loss))
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(loss, seg, grad_outputs=factor)


@pytest.mark.slow
def test_transforms_inside_and_around_a_compiled_function() -> None:
    problem = make_problem(3, (4, 5)).to(F64)

    def loss(seg: Tensor) -> Tensor:
        return ck.annotation_nll(seg, problem.cm, problem.labels).loss

    towards = put(torch.randn(problem.seg.shape, generator=generator(0), dtype=F64))
    expected = torch.func.grad(loss)(problem.seg)
    compiled = torch.compile(loss, backend="aot_eager")
    # and again under each transform: guarded
    assert loss_error(compiled(problem.seg), loss(problem.seg)) < LOSS_FLOOR[F64]
    assert (
        gradient_error(torch.compile(torch.func.grad(loss), backend="aot_eager")(problem.seg), expected)
        < GRADIENT_FLOOR[torch.float64]
    )
    assert gradient_error(torch.func.grad(compiled)(problem.seg), expected) < GRADIENT_FLOOR[torch.float64]
    assert loss_error(dual_numbers(compiled, problem.seg, towards), (expected * towards).sum()) < LOSS_FLOOR[F64]


def test_nothing_is_said_of_transforms_in_the_ordinary_path(caplog: pytest.LogCaptureFixture) -> None:
    problem = make_problem(3, (4, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ck.annotation_nll(leaf(problem.seg), problem.cm, problem.labels).loss.backward()
    assert caplog.records == []


# --- 16 bits and factors ----------------------------------------------------------------------------------------------


def drawn(size: int) -> tuple[Tensor, Tensor, Tensor]:
    gen = generator(0)
    field = torch.zeros(1, 4, 4, 1, 1)
    field[0, range(4), range(4)] = 3.0
    logits, labels = torch.randn(1, 4, size, size, generator=gen), torch.randint(0, 4, (1, size, size), generator=gen)
    return put(logits), put(field), put(labels)


@FUSED
@SCHEDULE
@pytest.mark.parametrize("factor", [32768.0, 65536.0, 2.0**20])
@pytest.mark.parametrize("kept", [False, True])
def test_a_scaled_loss_in_float16_is_finite_and_right(backend: str, schedule: str, factor: float, kept: bool) -> None:
    """65536, with which GradScaler begins, is inf in float16."""
    logits, field, labels = drawn(64)
    seg, cm = leaf(logits.half()), leaf(field.half())
    wide = leaf(logits.half().double())
    assert seg is not None
    assert wide is not None
    # as many pixels more as keep the largest gradient in the range of float16
    normalizer = 64.0 * 64.0 * max(1.0, factor / 65536.0)
    ck.annotation_nll(wide, field.double(), labels, normalizer=normalizer, backend="reference").loss.backward()
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, cm, labels, normalizer=normalizer, backend=backend).loss * factor
        loss.backward(retain_graph=kept)
    assert seg.grad is not None
    assert wide.grad is not None
    assert gradient_error(seg.grad.double() / factor, wide.grad) < 1e-3


@FUSED
@SCHEDULE
def test_a_grad_scaler_out_of_the_box_trains_from_step_one(backend: str, schedule: str) -> None:
    torch.manual_seed(0)
    head = torch.nn.Conv2d(3, 4, 1).to(device())
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device().type)
    _, field, labels = drawn(64)
    x = put(torch.rand(1, 3, 64, 64, generator=generator(0)))
    for _ in range(3):
        before, scale = head.weight.detach().clone(), scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast(device().type, torch.float16):
            logits = head(x)
        assert logits.dtype == torch.float16
        with ck.use_schedule(schedule):
            loss = ck.annotation_nll(logits, field, labels, backend=backend).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale, "a step was left out"
        assert not torch.equal(head.weight, before)


@FUSED
@SCHEDULE
def test_the_mean_of_a_large_image_in_float16_keeps_its_gradient_under_a_grad_scaler(
    backend: str, schedule: str
) -> None:
    """1024 x 1024 pixels: each gradient is below what float16 resolves, until it is scaled."""
    logits, field, labels = drawn(64)
    seg, wide = leaf(logits.half()), leaf(logits.half().double())
    assert seg is not None
    assert wide is not None
    factor, pixels = 65536.0, 1024.0 * 1024.0
    ck.annotation_nll(wide, field.double(), labels, normalizer=pixels, backend="reference").loss.backward()
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, field.half(), labels, normalizer=pixels, backend=backend).loss
        (loss * factor).backward()
    assert seg.grad is not None
    assert wide.grad is not None
    assert gradient_error(seg.grad.double() / factor, wide.grad) < GRADIENT_FLOOR[torch.float16]


@FUSED
@pytest.mark.parametrize("kept", [False, True])
def test_a_saved_gradient_in_bfloat16_is_multiplied_in_float32(backend: str, kept: bool) -> None:
    """The factor itself is not rounded to the storage."""
    problem = make_problem(3, (10, 27), batch=1)
    seg = leaf(problem.seg.to(torch.bfloat16))
    assert seg is not None
    factor = 1.0 + 2.0**-6 + 2.0**-10
    with ck.use_schedule("one_pass"):
        loss = ck.annotation_nll(seg, problem.cm, problem.labels, backend=backend).loss
        (once,) = torch.autograd.grad(loss, seg, retain_graph=True)
        (loss * factor).backward(retain_graph=kept)
    assert seg.grad is not None
    assert torch.equal(seg.grad, (once.float() * factor).to(torch.bfloat16))
    assert not torch.equal(seg.grad, once * torch.tensor(factor, dtype=torch.bfloat16, device=device()))


def test_a_factor_without_a_value_is_multiplied_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        grad = torch.randn(400, generator=generator(0)).to(dtype) / 2**16
        for factor in (1.0 + 2.0**-6 + 2.0**-10, 2.0**17):
            assert torch.equal(autograd._times(grad, torch.tensor(factor)), (grad.float() * factor).to(dtype))


@FUSED
@SCHEDULE
def test_gradients_in_float16_are_formed_in_backward(
    backend: str, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where one of them is wanted in float16."""
    problem = make_problem(3, (4, 5))
    operators = operators_of(backend)
    run, seen = operators.annotation_objective, []
    monkeypatch.setattr(
        operators, "annotation_objective", lambda *a: (seen.append(operator.Arguments(*a).wanted), run(*a))[1]
    )
    for seg, cm, half in (
        (leaf(problem.seg.half()), problem.cm, True),
        (leaf(problem.seg), leaf(problem.cm.half()), True),  # type: ignore[union-attr]
        (leaf(problem.seg), problem.cm.half(), False),  # type: ignore[union-attr]
    ):
        seen.clear()
        with ck.use_schedule(schedule):
            ck.annotation_nll(seg, cm, problem.labels, backend=backend).loss.backward()
        assert len(seen) == (2 if half or schedule == "recompute" else 1)
        assert bool(seen[0]) == (len(seen) == 1)


# --- what is held until backward --------------------------------------------------------------------------------------


class Box:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Held:
    """Numbers in the tensors that live nodes of the graph have saved."""

    def __init__(self) -> None:
        self.boxes: weakref.WeakSet[Box] = weakref.WeakSet()

    def hooks(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)

    def pack(self, tensor: Tensor) -> Box:
        box = Box(tensor.detach())  # an output would hold the node that saved it
        self.boxes.add(box)
        return box

    def floats(self) -> int:
        gc.collect()
        return sum(box.tensor.numel() for box in self.boxes if box.tensor.is_floating_point())


def two_kinds(seg: Tensor, cm: Tensor, labels: Tensor, backend: str, **options: Any) -> ck.Objective:
    drawings = [ck.Drawings(labels, cm), ck.Drawings(labels, weight=0.5)]
    return ck.annotation_objective(seg, drawings, backend=backend, **options)


@pytest.mark.slow
@FUSED
@pytest.mark.parametrize("hooks", [False, True])
def test_who_keeps_the_loss_alone_holds_the_gradients_alone(backend: str, hooks: bool) -> None:
    """The logits of several kinds were held beside the gradients, for losses of parts that nobody had kept."""
    problem = make_problem(3, (4, 5), (2, 3))
    seg, cm = leaf(problem.seg), leaf(problem.cm)
    assert seg is not None
    assert cm is not None
    held = Held()
    logits, field = seg * 2, cm * 2
    alive = weakref.ref(logits), weakref.ref(field)
    with ck.use_schedule("one_pass"), held.hooks() if hooks else contextlib.nullcontext():
        out = two_kinds(logits, field, problem.labels, backend)
    loss = out.loss
    gradients = seg.numel() + cm.numel()
    if hooks:
        assert held.floats() > 2 * gradients
    del logits, field
    gc.collect()
    assert hooks or (alive[0]() is not None and alive[1]() is not None)
    del out
    assert held.floats() == hooks * gradients
    assert alive[0]() is None
    assert alive[1]() is None
    loss.backward()
    expected = leaf(problem.seg)
    assert expected is not None
    two_kinds(expected * 2, put(problem.cm * 2), problem.labels, "reference").loss.backward()  # type: ignore[operator]
    assert seg.grad is not None
    assert expected.grad is not None
    assert gradient_error(seg.grad, expected.grad) < GRADIENT_APART


@FUSED
def test_who_keeps_a_part_alone_holds_no_gradient(backend: str) -> None:
    problem = make_problem(3, (4, 5), (2, 3))
    held = Held()
    with ck.use_schedule("one_pass"), held.hooks():
        part = two_kinds(leaf(problem.seg), leaf(problem.cm), problem.labels, backend).parts[0].loss  # type: ignore[arg-type]
    assert held.floats() <= problem.seg.numel() + problem.cm.numel() + 2  # type: ignore[union-attr]
    part.backward()


@FUSED
@SCHEDULE
@pytest.mark.parametrize("kept", [False, True])
def test_the_total_and_its_parts_in_one_backward_or_in_several(backend: str, schedule: str, kept: bool) -> None:
    problem = make_problem(3, (4, 5), (2, 3))

    def evaluate(name: str, dtype: torch.dtype) -> list[Tensor]:
        seg, cm = leaf(problem.seg.to(dtype)), leaf(problem.cm.to(dtype))  # type: ignore[union-attr]
        assert seg is not None
        assert cm is not None
        with ck.use_schedule(schedule):
            out = two_kinds(seg, cm, problem.labels, name)
        if kept:
            out.loss.backward(retain_graph=True)
            (2 * out.parts[1].loss).backward(retain_graph=True)
            (out.loss + out.parts[0].loss).backward()
        else:
            (2 * out.loss + out.parts[0].loss + 2 * out.parts[1].loss).backward()
        assert seg.grad is not None
        assert cm.grad is not None
        return [seg.grad, cm.grad]

    for ours, truth in zip(evaluate(backend, torch.float32), evaluate("reference", F64), strict=True):
        assert gradient_error(ours, truth) < GRADIENT_APART


@pytest.mark.every
@SCHEDULE
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("of", [0, 1])
def test_a_part_alone_leaves_the_other_kind_without_a_gradient(
    backend: str, schedule: str, reduction: str, of: int
) -> None:
    """Not zero: an optimizer moves what has one, by weight decay and by momentum."""
    problem = make_problem(3, (4, 5), (2, 3), stream="random")
    seg = leaf(problem.seg)
    fields = [leaf(problem.cm) for _ in (0, 1)]
    transitions = [leaf(problem.transition) for _ in (0, 1)]
    assert seg is not None
    with ck.use_schedule(schedule):
        kinds = [ck.Drawings(problem.labels, *own) for own in zip(fields, transitions, strict=True)]
        out = ck.annotation_objective(seg, kinds, reduction=reduction, backend=backend)
    out.parts[of].loss.sum().backward()
    for own in (fields, transitions):
        assert own[1 - of].grad is None  # type: ignore[union-attr]
        assert own[of].grad.abs().sum() > 0  # type: ignore[union-attr]
    assert seg.grad is not None
    alone = leaf(problem.seg)
    ck.annotation_nll(alone, problem.cm, problem.labels, problem.transition, reduction=reduction).loss.sum().backward()  # type: ignore[arg-type]
    assert gradient_error(seg.grad, alone.grad) < GRADIENT_APART  # type: ignore[union-attr, arg-type]


# --- the operator itself ----------------------------------------------------------------------------------------------


def arguments(problem: Problem, wanted: int) -> operator.Arguments:
    absent = put(torch.empty(0))
    return operator.Arguments(
        seg_logits=leaf(problem.seg),  # type: ignore[arg-type]
        labels=[problem.labels.unsqueeze(1)],
        cm_logits=[leaf(problem.cm)],  # type: ignore[list-item]
        transition=[absent],
        class_weight=[absent],
        pixel_weight=[absent],
        scale=[absent],
        weight=[1.0],
        trace_weight=[0.1],
        ignore_index=255,
        per_pixel=False,
        wanted=wanted,
    )


@FUSED
@pytest.mark.parametrize("wanted", [0, operator.SEG, operator.cm_bit(0), operator.SEG | operator.cm_bit(0)])
def test_the_operator_told_of_some_gradients_has_all_that_are_asked_for(backend: str, wanted: int) -> None:
    """It ended in a KeyError. Its own outputs stay what they are, whatever backward is scaled with."""
    problem = make_problem(3, (4, 5), (2, 3))
    call = arguments(problem, wanted)
    out = operator.Outputs(*operators_of(backend).annotation_objective(*call))
    formed = [t.clone() for t in (out.grad_seg, *out.grad_cm)]
    (3 * out.loss).backward()
    truth = oracle(problem.with_options(trace_weight=0.1, reduction="sum"), 3.0)
    for grad, name in ((call.seg_logits.grad, "seg"), (call.cm_logits[0].grad, "cm")):
        assert grad is not None
        assert gradient_error(grad, truth.gradients[name]) < GRADIENT_APART
    for before, after in zip(formed, (out.grad_seg, *out.grad_cm), strict=True):
        assert torch.equal(before, after)


@FUSED
@pytest.mark.parametrize("wanted", [0, operator.SEG | operator.cm_bit(0)])
@pytest.mark.parametrize("by", ["seg_logits", "cm_logits"])
def test_a_second_derivative_of_the_operator_itself_is_no_silent_zero(backend: str, wanted: int, by: str) -> None:
    call = arguments(make_problem(3, (4, 5), (2, 3)), wanted)
    out = operator.Outputs(*operators_of(backend).annotation_objective(*call))
    of = {"seg_logits": call.seg_logits, "cm_logits": call.cm_logits[0]}[by]
    for first in torch.autograd.grad(out.loss, (call.seg_logits, call.cm_logits[0]), create_graph=True):
        with pytest.raises(RuntimeError, match='backend="reference"'):
            torch.autograd.grad(first.pow(2).sum(), of, allow_unused=True, retain_graph=True)


# --- subclasses of Tensor ---------------------------------------------------------------------------------------------


@pytest.mark.every
@SCHEDULE
def test_a_subclass_as_every_argument_has_the_loss_and_the_gradients_of_plain_tensors(
    backend: str, schedule: str
) -> None:
    problem = make_problem(3, (4, 5), (2, 3), stream="random")
    weights = put(torch.rand(3, generator=generator(0))), put(torch.rand(2, 4, 5, generator=generator(1)))

    def run(kind: type[Tensor]) -> tuple[ck.AnnotationLoss, list[Tensor | None], Tensor, Tensor]:
        tensors = [leaf(t) for t in (problem.seg, problem.cm, problem.transition)]
        seg, cm, transition = (t.as_subclass(kind) for t in tensors)  # type: ignore[union-attr]
        labels, class_weight, pixel_weight, normalizer = (
            t.as_subclass(kind) for t in (problem.labels, *weights, put(torch.tensor(7.0)))
        )
        with ck.use_schedule(schedule):
            out = ck.annotation_nll(
                seg,
                cm,
                labels,
                transition,
                class_weight=class_weight,
                pixel_weight=pixel_weight,
                normalizer=normalizer,
                backend=backend,
            )
            out.loss.backward()
        posterior = ck.annotation_posterior(seg, cm, labels, transition, backend=backend)
        return out, [t.grad for t in tensors if t is not None], posterior, ck.label_map(seg, (6, 7), backend=backend)

    ours, plain = run(Mask), run(torch.Tensor)
    for got, want in zip(ours[0], plain[0], strict=True):
        assert type(got) is Tensor
        assert torch.equal(got, want)
    for grad, want in zip(ours[1], plain[1], strict=True):
        assert grad is not None
        assert torch.equal(grad, want)
    assert torch.equal(ours[2], plain[2])
    assert torch.equal(ours[3], plain[3])


def test_fake_tensors_are_not_read() -> None:
    """Of a trace, or of a model that is only measured: no values to look at, and none needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    problem = make_problem(3, (4, 5), stream="random", pixel_weight=torch.rand(2, 4, 5))
    with FakeTensorMode() as mode:
        seg, cm, labels, transition, weight = (
            mode.from_tensor(t)
            for t in (problem.seg, problem.cm, problem.labels, problem.transition, problem.options["pixel_weight"])
        )
        out = ck.annotation_nll(seg, cm, labels, transition, pixel_weight=weight, normalizer=weight.sum())
        assert out.loss.shape == ()
        assert ck.annotation_posterior(seg, cm, labels, transition).shape == seg.shape


def test_values_are_looked_at_under_a_mode_that_only_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = make_problem(3, (4, 5))
    with FlopCounterMode(display=False):
        ck.annotation_nll(problem.seg, problem.cm, problem.labels)
        with pytest.raises(ValueError, match="labels: expected labels in"):
            ck.annotation_nll(problem.seg, problem.cm, torch.full_like(problem.labels, 77))
