"""What every backend owes beyond the right numbers: memory, autograd, strides, missing labels, threads."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import functional
from coarse_kernels.backends.operator import Arguments
from tests.contract import GRADIENT_APART, GRADIENT_FLOOR, LOSS_APART
from tests.helpers import (
    SCHEDULES,
    Problem,
    check,
    device,
    evaluate,
    generator,
    gradient_error,
    leaf,
    loss_error,
    make_problem,
    on_threads,
    operators_of,
    oracle,
    put,
)

pytestmark = pytest.mark.usefixtures("poison")

EVERY = pytest.mark.every
MAX_CLASSES = {"cuda": 256, "cuda-emulated": 256, "triton": 256}
COMPILED = pytest.mark.fused
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
# 27 columns: planes begin anywhere in a line. 2 x 16 x 24: whole vectors and aligned planes.
GRID = pytest.mark.parametrize(
    ("size", "grid"),
    [((10, 27), None), ((16, 24), None), ((10, 27), (3, 5)), ((10, 27), (1, 1))],
    ids=["pixel-odd", "pixel", "strided", "one-point"],
)


def leaves(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    seg, cm = leaf(problem.seg), leaf(problem.cm)
    assert seg is not None
    assert cm is not None
    return seg, cm, leaf(problem.transition)


def gradients(*tensors: Tensor | None) -> list[Tensor]:
    found = [tensor.grad for tensor in tensors if tensor is not None]
    assert all(grad is not None for grad in found)
    return [grad.clone() for grad in found if grad is not None]


@contextlib.contextmanager
def calls_of_the_operator(monkeypatch: pytest.MonkeyPatch, backend: str) -> Iterator[list[int]]:
    """``wanted`` of each call of the backend's operator `annotation_objective`."""
    seen: list[int] = []
    operators = operators_of(backend)
    operator = operators.annotation_objective

    def spy(*args: Any) -> Any:
        seen.append(Arguments(*args).wanted)
        return operator(*args)

    with monkeypatch.context() as patch:
        patch.setattr(operators, "annotation_objective", spy)
        yield seen


# --- outputs ----------------------------------------------------------------------------------------------------------


@COMPILED
@SCHEDULE
@GRID
@pytest.mark.parametrize("ignored", ["some", "image", "all"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_ignored_pixels_leave_no_output_unwritten(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None, ignored: str, reduction: str
) -> None:
    """Liger-Kernel PR#1338: an early return for ignored rows left what torch.empty had found in memory."""
    problem = make_problem(3, size, grid, ignored=ignored, stream="random", trace_weight=0.1, reduction=reduction)
    out = evaluate(problem, backend, schedule)
    for name in ("loss", "nll", "trace", "count"):
        assert getattr(out, name).isfinite().all(), name
    for name, grad in out.gradients.items():
        assert grad.isfinite().all(), name
    unlabelled = (problem.labels == 255).unsqueeze(1).expand_as(problem.seg)
    assert unlabelled.any()
    assert (out.gradients["seg"][unlabelled] == 0).all()
    if grid is None:
        field = (problem.labels == 255)[:, None, None].expand_as(out.gradients["cm"])
        assert (out.gradients["cm"][field] == 0).all()
    assert ck.annotation_posterior(problem.seg, problem.cm, problem.labels, backend=backend).isfinite().all()


@COMPILED
def test_dirty_memory_of_the_allocator_is_overwritten(backend: str) -> None:
    """Without PyTorch's own poison: blocks of the very sizes, freed full of NaN, are what the operator gets."""
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    for grid in (None, (4, 5)):
        problem = make_problem(3, (21, 33), grid, ignored="image", stream="random")
        assert problem.cm is not None
        for _ in range(20):
            dirty = [torch.full_like(t, torch.nan) for t in (problem.seg, problem.cm, problem.labels.float()) * 3]
            dirty += [torch.full((n,), torch.nan, device=device()) for n in (1, 2, 9)]
            del dirty
            for schedule in SCHEDULES:
                out = evaluate(problem, backend, schedule)
                assert all(grad.isfinite().all() for grad in out.gradients.values())


@EVERY
@SCHEDULE
@GRID
def test_a_gradient_is_never_written_over_the_logits(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    """Liger-Kernel #343, #272. The logits keep value and version, and another consumer of them its own gradient."""
    problem = make_problem(3, size, grid, stream="random")
    seg, cm, transition = leaves(problem)
    versions = [seg._version, cm._version]
    with ck.use_schedule(schedule):
        square = (seg**2).sum() + (cm**2).sum()
        out = ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend)
        (out.loss + square).backward()
    assert [seg._version, cm._version] == versions
    alone = evaluate(problem, backend, schedule)
    assert torch.equal(seg, problem.seg)
    for tensor, name in ((seg, "seg"), (cm, "cm")):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, 2 * tensor.detach() + alone.gradients[name])
        storages = {tensor.untyped_storage().data_ptr(), tensor.grad.untyped_storage().data_ptr()}
        assert len(storages) == 2


@COMPILED
def test_nll_trace_and_count_are_detached(backend: str) -> None:
    seg, cm, _ = leaves(make_problem(3, (4, 5)))
    labels = put(torch.zeros(2, 4, 5, dtype=torch.uint8))
    for reduction in ("mean", "sum", "none"):
        out = ck.annotation_nll(seg, cm, labels, reduction=reduction, backend=backend)
        assert out.loss.requires_grad
        assert not any(t.requires_grad for t in (out.nll, out.trace, out.count))
        assert all(t.shape == (labels.shape if reduction == "none" else ()) for t in out)


# --- which gradients --------------------------------------------------------------------------------------------------


@COMPILED
@SCHEDULE
@pytest.mark.parametrize("grid", [None, (3, 5)], ids=["pixel", "strided"])
@pytest.mark.parametrize("wanted", range(8))
def test_only_the_gradients_that_are_asked_for(
    monkeypatch: pytest.MonkeyPatch, backend: str, schedule: str, grid: tuple[int, int] | None, wanted: int
) -> None:
    problem = make_problem(3, (10, 21), grid, stream="random", trace_weight=0.1)
    truth = oracle(problem)
    seg, cm, transition = leaves(problem)
    assert transition is not None
    named = {"seg": seg, "cm": cm, "transition": transition}
    for bit, tensor in enumerate(named.values()):
        tensor.requires_grad_(bool(wanted >> bit & 1))
    with ck.use_schedule(schedule), calls_of_the_operator(monkeypatch, backend) as calls:
        out = ck.annotation_nll(seg, cm, problem.labels, transition, trace_weight=0.1, backend=backend)
        assert calls == [wanted if schedule == "one_pass" else 0]
        assert out.loss.requires_grad == (wanted != 0)
        if wanted:
            out.loss.backward()
            assert calls == ([wanted] if schedule == "one_pass" else [0, wanted])
    for bit, (name, tensor) in enumerate(named.items()):
        if wanted >> bit & 1:
            assert tensor.grad is not None
            assert gradient_error(tensor.grad, truth.gradients[name]) < GRADIENT_APART
        else:
            assert tensor.grad is None


@COMPILED
@SCHEDULE
def test_no_grad_computes_no_gradient(monkeypatch: pytest.MonkeyPatch, backend: str, schedule: str) -> None:
    problem = make_problem(3, (10, 21), stream="random")
    seg, cm, transition = leaves(problem)
    truth = oracle(problem)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), ck.use_schedule(schedule), calls_of_the_operator(monkeypatch, backend) as calls:
            out = ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend)
        assert calls == [0]
        assert not out.loss.requires_grad
        assert loss_error(out.loss, truth.loss) < LOSS_APART


@COMPILED
@SCHEDULE
@GRID
def test_autograd_grad_of_one_input(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    """All three want a gradient, but only one is asked for, then another of the kept graph."""
    problem = make_problem(3, size, grid, stream="random", trace_weight=0.1)
    truth = oracle(problem)
    seg, cm, transition = leaves(problem)
    assert transition is not None
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, cm, problem.labels, transition, trace_weight=0.1, backend=backend).loss
        for tensor, name in ((cm, "cm"), (seg, "seg"), (transition, "transition"), (cm, "cm")):
            (grad,) = torch.autograd.grad(loss, [tensor], retain_graph=True)
            assert gradient_error(grad, truth.gradients[name]) < GRADIENT_APART


# --- grad_output ------------------------------------------------------------------------------------------------------


@COMPILED
@SCHEDULE
@GRID
@pytest.mark.parametrize("factor", [-3.0, 0.0, 1e-6, 65536.0])
def test_grad_output_of_a_scaled_loss(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None, factor: float
) -> None:
    """Liger-Kernel #678: backward has to honour what comes in from above."""
    check(make_problem(3, size, grid, stream="random", trace_weight=0.1), backend, schedule, factor)


@COMPILED
@SCHEDULE
@GRID
def test_per_pixel_grad_output(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    """Liger-Kernel #968: reduction="none" with its own factor, and sign, at every pixel; some of them zero."""
    gen = generator(5)
    grad_output = torch.randn(2, *size, generator=gen) * torch.randint(0, 2, (2, *size), generator=gen)
    problem = make_problem(3, size, grid, stream="random", trace_weight=0.1, reduction="none")
    check(problem, backend, schedule, grad_output)
    weighted = problem.with_options(pixel_weight=torch.rand(2, *size, generator=gen))
    check(weighted, backend, schedule, grad_output)


@COMPILED
@SCHEDULE
@GRID
@pytest.mark.parametrize("stream", ["positive", "random"])
@pytest.mark.parametrize("cm_batch", [1, 2])
def test_grad_outputs_that_cancel_one_another(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None, stream: str, cm_batch: int
) -> None:
    """The loss of one region less that of another: weights that add up to 0 left a matrix of the image without a gradient."""
    problem = make_problem(3, size, grid, stream=stream, cm_batch=cm_batch, reduction="none", trace_weight=0.1)
    grad_output = torch.zeros(2, *size)
    for image, labels in zip(grad_output, problem.labels, strict=True):
        places = (labels.flatten() != 255).nonzero().flatten().cpu()
        half = len(places) // 2
        image.view(-1)[places[:half]], image.view(-1)[places[half : 2 * half]] = 1.0, -1.0
        assert half > 20
    check(problem, backend, schedule, grad_output)


@COMPILED
@SCHEDULE
@GRID
def test_expanded_grad_output(backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None) -> None:
    """quack PR#126: the gradient of a sum arrives with stride 0; a slice's with holes; a permuted map's permuted."""
    problem = make_problem(3, size, grid, reduction="none")
    for use in (
        lambda loss: loss.sum(),
        lambda loss: loss[:, ::2, 1::3].sum() * 2,
        lambda loss: (
            loss.permute(2, 0, 1) * torch.arange(loss.shape[0] + 0.0, device=loss.device)[None, :, None]
        ).sum(),
        lambda loss: loss.mean(0).amax(),
    ):
        found = []
        for name, data in ((backend, problem), ("reference", problem.to(torch.float64))):
            seg, cm, _ = leaves(data)
            with ck.use_schedule(schedule):
                use(ck.annotation_nll(seg, cm, data.labels, reduction="none", backend=name).loss).backward()
            found.append(gradients(seg, cm))
        for ours, truth in zip(*found, strict=True):
            assert gradient_error(ours, truth) < GRADIENT_APART


# --- several backwards ------------------------------------------------------------------------------------------------


@COMPILED
@SCHEDULE
@GRID
@pytest.mark.parametrize("times", [2, 3])
def test_retain_graph_gives_the_gradient_as_often_as_it_is_asked(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None, times: int
) -> None:
    problem = make_problem(3, size, grid, stream="random", trace_weight=0.1)
    once = evaluate(problem, backend, schedule).gradients
    seg, cm, transition = leaves(problem)
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, cm, problem.labels, transition, trace_weight=0.1, backend=backend).loss
        for turn in range(times):
            loss.backward(retain_graph=turn + 1 < times)
    for name, grad in zip(("seg", "cm", "transition"), gradients(seg, cm, transition), strict=True):
        torch.testing.assert_close(grad, times * once[name], rtol=1e-6, atol=0.0)


@COMPILED
@SCHEDULE
@GRID
def test_changing_grad_between_backwards_corrupts_nothing(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None
) -> None:
    """Gradient clipping works in place: a saved gradient that was handed out would be clipped along."""
    problem = make_problem(3, size, grid, stream="random")
    once = evaluate(problem, backend, schedule).gradients
    seg, cm, transition = leaves(problem)
    assert transition is not None
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend).loss
        loss.backward(retain_graph=True)
        for tensor in (seg, cm, transition):
            assert tensor.grad is not None
            tensor.grad.fill_(torch.nan)
            tensor.grad = None
        loss.backward()
    for name, grad in zip(("seg", "cm", "transition"), gradients(seg, cm, transition), strict=True):
        assert torch.equal(grad, once[name])


@COMPILED
@SCHEDULE
def test_gradient_accumulation_over_batches(backend: str, schedule: str) -> None:
    """reduction="sum", or a normaliser of the whole: two halves add up to the batch."""
    problem = make_problem(3, (10, 27), (3, 5), stream="random")
    assert problem.cm is not None
    whole = evaluate(problem, backend, schedule)
    seg, cm, transition = leaves(problem)
    total = 0.0
    with ck.use_schedule(schedule):
        for half in range(2):
            part = slice(half, half + 1)
            out = ck.annotation_nll(
                seg[part], cm[part], problem.labels[part], transition, normalizer=whole.count, backend=backend
            )
            out.loss.backward()
            total += out.loss.item()
    assert total == pytest.approx(whole.loss.item(), rel=1e-6)
    for name, grad in zip(("seg", "cm", "transition"), gradients(seg, cm, transition), strict=True):
        assert gradient_error(grad, whole.gradients[name]) < GRADIENT_FLOOR[torch.float32]


@COMPILED
@SCHEDULE
def test_saved_tensor_hooks_and_checkpointing(backend: str, schedule: str) -> None:
    """Activation checkpointing and offloading repack what was saved: the gradient must survive that."""
    problem = make_problem(3, (10, 27), stream="random")
    once = evaluate(problem, backend, schedule).gradients
    with ck.use_schedule(schedule):
        seg, cm, transition = leaves(problem)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
            ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend).loss.backward()
        found = [gradients(seg, cm, transition)]
        seg, cm, transition = leaves(problem)
        loss = torch.utils.checkpoint.checkpoint(
            lambda *a: ck.annotation_nll(a[0], a[1], problem.labels, a[2], backend=backend).loss,
            seg,
            cm,
            transition,
            use_reentrant=False,
        )
        loss.backward()
        found.append(gradients(seg, cm, transition))
    for grads in found:
        for name, grad in zip(("seg", "cm", "transition"), grads, strict=True):
            assert torch.equal(grad, once[name])


@COMPILED
@SCHEDULE
def test_objective_streams_can_be_trained_apart_and_together(backend: str, schedule: str) -> None:
    """loss and its parts share one graph; every combination has the gradient of the oracle."""
    positive = make_problem(4, (6, 17), scale=2.0)
    negative = make_problem(4, (6, 17), (2, 3), scale=2.0, seed=1)

    def run(name: str, dtype: torch.dtype, use: Callable[[Any], Tensor]) -> list[Tensor]:
        seg, cm, _ = leaves(positive.to(dtype))
        _, other, _ = leaves(negative.to(dtype))
        with ck.use_schedule(schedule):
            out = ck.coarse_label_loss(
                seg, cm, positive.labels, other, negative.labels, negative_weight=0.3, trace_weight=0.05, backend=name
            )
            use(out).backward()
        return gradients(seg, cm, other)

    for use in (
        lambda out: out.loss,
        lambda out: out.loss + out.negative.loss,
        lambda out: out.positive.loss + 2 * out.negative.loss,
    ):
        for ours, truth in zip(run(backend, torch.float32, use), run("reference", torch.float64, use), strict=True):
            assert gradient_error(ours, truth) < GRADIENT_APART


# --- strides ----------------------------------------------------------------------------------------------------------


def transposed(t: Tensor) -> Tensor:
    return t.transpose(-1, -2).contiguous().transpose(-1, -2)


def sliced(t: Tensor) -> Tensor:
    """Every second image and column of something larger, from an odd start."""
    wide = torch.full((2 * t.shape[0] + 1, *t.shape[1:-1], 2 * t.shape[-1] + 1), 3, device=t.device)
    wide = wide.to(t.dtype)
    wide[1::2, ..., 1::2] = t
    return wide[1::2, ..., 1::2]


def every_second_image(t: Tensor) -> Tensor:
    wide = t.new_zeros(2 * t.shape[0], *t.shape[1:])
    wide[::2] = t
    return wide[::2]


def channels_last(t: Tensor) -> Tensor:
    if t.dim() == 5:
        return t.flatten(1, 2).contiguous(memory_format=torch.channels_last)  # (B, C*C, h, w)
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


@COMPILED
@SCHEDULE
@GRID
@pytest.mark.parametrize("layout", [transposed, sliced, every_second_image, channels_last])
def test_permuted_inputs(
    backend: str,
    schedule: str,
    size: tuple[int, int],
    grid: tuple[int, int] | None,
    layout: Callable[[Tensor], Tensor],
) -> None:
    """fused-ssim PR#44: wrong for permuted inputs."""
    problem = make_problem(3, size, grid, batch=3, stream="random", pixel_weight=torch.rand(3, *size))
    assert problem.cm is not None
    truth = oracle(problem)
    seg, cm = layout(problem.seg).requires_grad_(), layout(problem.cm).requires_grad_()
    with ck.use_schedule(schedule):
        out = ck.annotation_nll(
            seg,
            cm,
            layout(problem.labels),
            None if problem.transition is None else problem.transition.t().contiguous().t(),
            pixel_weight=layout(problem.options["pixel_weight"]),
            backend=backend,
        )
        out.loss.backward()
    assert loss_error(out.loss, truth.loss) < LOSS_APART
    assert seg.grad is not None
    assert cm.grad is not None
    assert gradient_error(seg.grad, truth.gradients["seg"]) < GRADIENT_APART
    assert gradient_error(cm.grad.reshape(problem.cm.shape), truth.gradients["cm"]) < GRADIENT_APART
    posterior = ck.annotation_posterior(seg, cm, layout(problem.labels), problem.transition, backend=backend)
    wide = problem.to(torch.float64)
    expected = ck.annotation_posterior(wide.seg, wide.cm, wide.labels, wide.transition, backend="reference")
    assert gradient_error(posterior, expected) < GRADIENT_APART


@COMPILED
@SCHEDULE
@GRID
def test_expanded_field(backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None) -> None:
    """A field expanded over the batch (stride 0) is the batch-1 field, gradient included; an expanded grid as well."""
    problem = make_problem(3, size, grid, batch=3, cm_batch=1)
    truth = oracle(problem)
    seg, cm, _ = leaves(problem)
    with ck.use_schedule(schedule):
        ck.annotation_nll(seg, cm.expand(3, -1, -1, -1, -1), problem.labels, backend=backend).loss.backward()
    for name, grad in zip(("seg", "cm"), gradients(seg, cm), strict=True):
        assert gradient_error(grad, truth.gradients[name]) < GRADIENT_APART
    matrix = put(torch.randn(3, 3, generator=generator(1))).requires_grad_()
    wide = matrix.detach().double().requires_grad_()
    with ck.use_schedule(schedule):
        field = matrix[None, :, :, None, None].expand(3, 3, 3, *(grid or size))
        ck.annotation_nll(problem.seg, field, problem.labels, backend=backend).loss.backward()
    field = wide[None, :, :, None, None].expand(1, 3, 3, *size)
    ck.annotation_nll(problem.seg.double(), field, problem.labels, backend="reference").loss.backward()
    assert matrix.grad is not None
    assert wide.grad is not None
    assert gradient_error(matrix.grad, wide.grad) < GRADIENT_APART


@COMPILED
def test_logits_that_do_not_begin_on_a_line(backend: str) -> None:
    """Storage offsets of one element: vector loads and streaming stores have to cope."""
    problem = make_problem(3, (16, 32), stream="random")
    assert problem.cm is not None

    def shifted(t: Tensor) -> Tensor:
        buffer = t.new_zeros(t.numel() + 1)
        buffer[1:] = t.flatten()
        return buffer[1:].view(t.shape)

    moved = dataclasses.replace(
        problem, seg=shifted(problem.seg), cm=shifted(problem.cm), labels=shifted(problem.labels)
    )
    assert moved.cm is not None
    truth, seg, cm = oracle(problem), moved.seg.requires_grad_(), moved.cm.requires_grad_()
    ck.annotation_nll(seg, cm, moved.labels, problem.transition, backend=backend).loss.backward()
    for name, grad in zip(("seg", "cm"), gradients(seg, cm), strict=True):
        assert gradient_error(grad, truth.gradients[name]) < GRADIENT_APART


# --- missing labels ---------------------------------------------------------------------------------------------------


@EVERY
@SCHEDULE
@GRID
@pytest.mark.parametrize("stream", ["positive", "random"])
def test_a_crop_that_is_all_ignored_is_zero_and_not_nan(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None, stream: str
) -> None:
    """mmsegmentation PR#1409, Liger-Kernel #177: division by zero labelled pixels."""
    out = evaluate(make_problem(3, size, grid, ignored="all", stream=stream, trace_weight=0.1), backend, schedule)
    assert (out.loss, out.nll, out.trace, out.count) == (0.0, 0.0, 0.0, 0.0)
    for grad in out.gradients.values():
        assert (grad == 0).all()


@EVERY
def test_the_mean_is_over_labelled_pixels_only(backend: str) -> None:
    """mmsegmentation #886: a mean over ignored pixels shrinks with the coarseness of the drawing."""
    problem = make_problem(3, (6, 10), ignored="none")
    alone = evaluate(problem, backend).loss
    labels = torch.cat([problem.labels, torch.full_like(problem.labels, 255)], dim=1)
    assert problem.cm is not None
    double = dataclasses.replace(
        problem, seg=problem.seg.repeat(1, 1, 2, 1), cm=problem.cm.repeat(1, 1, 1, 2, 1), labels=labels
    )
    assert loss_error(evaluate(double, backend).loss, alone) < LOSS_APART


@EVERY
def test_class_weights_normalise_as_cross_entropy_does(backend: str) -> None:
    """mmsegmentation #3594. A field that trusts the drawing (A = I in all but name) is weighted cross-entropy."""
    problem = make_problem(4, (6, 10), label_dtype=torch.int64, ignored="some")
    weight = put(torch.tensor([0.1, 1.0, 3.0, 0.0]))
    identity = put((60.0 * torch.eye(4)).reshape(1, 4, 4, 1, 1))
    ours = ck.annotation_nll(problem.seg, identity, problem.labels, class_weight=weight, backend=backend)
    theirs = F.cross_entropy(problem.seg, problem.labels, weight, ignore_index=255)
    assert loss_error(ours.loss, theirs) < LOSS_APART
    assert ours.count.item() == pytest.approx(weight[problem.labels[problem.labels != 255]].sum().item(), rel=1e-6)


@EVERY
@pytest.mark.parametrize("grid", [None, (2, 3)], ids=["pixel", "strided"])
def test_the_infinite_weight_of_an_absent_class_does_not_count(backend: str, grid: tuple[int, int] | None) -> None:
    """Weights of inverse frequency are inf for a class that nobody drew; F.cross_entropy copes, and so has ours."""
    labels = put(torch.tensor([[[1, 2, 255, 1], [255, 1, 2, 2], [1, 1, 1, 255], [255, 2, 2, 1]]], dtype=torch.uint8))
    problem = dataclasses.replace(make_problem(3, (4, 4), grid, batch=1), labels=labels)
    for absent in (torch.inf, torch.nan):
        ours = evaluate(problem.with_options(class_weight=torch.tensor([absent, 2.0, 0.5])), backend)
        usual = oracle(problem.with_options(class_weight=torch.tensor([0.0, 2.0, 0.5])))
        assert loss_error(ours.loss, usual.loss) < LOSS_APART
        assert loss_error(ours.count, usual.count) < LOSS_APART
        assert gradient_error(ours.gradients["seg"], usual.gradients["seg"]) < GRADIENT_APART
        assert gradient_error(ours.gradients["cm"], usual.gradients["cm"]) < GRADIENT_APART


@EVERY
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_the_weight_of_an_ignored_pixel_may_be_anything(backend: str, bad: float) -> None:
    problem = make_problem(3, (6, 20), stream="random")
    weight = put(torch.rand(2, 6, 20, generator=generator(0)))
    expected = oracle(problem.with_options(pixel_weight=weight))
    ours = evaluate(problem.with_options(pixel_weight=weight.masked_fill(problem.labels == 255, bad)), backend)
    assert loss_error(ours.loss, expected.loss) < LOSS_APART
    assert loss_error(ours.count, expected.count) < LOSS_APART
    for name, grad in ours.gradients.items():
        assert gradient_error(grad, expected.gradients[name]) < GRADIENT_APART


@EVERY
@pytest.mark.parametrize("label", [156, 44])
def test_ignore_index_does_not_wrap_around_in_uint8(backend: str, label: int) -> None:
    """-100 is 156 in eight bits, and 300 is 44: a class of that number is labelled all the same."""
    classes = 160
    seg = put(torch.randn(1, classes, 2, generator=generator(0)))
    cm = put(torch.randn(1, classes, classes, 1, generator=generator(1)))
    labels = put(torch.tensor([[label, 3]]))
    expected = ck.annotation_nll(seg.double(), cm.double(), labels, ignore_index=-1, backend="reference")
    for ignore_index in (-100, 300):
        ours = ck.annotation_nll(seg, cm, labels.to(torch.uint8), ignore_index=ignore_index, backend=backend)
        assert ours.count.item() == 2
        assert loss_error(ours.loss, expected.loss) < LOSS_APART


@EVERY
@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("classes", [130, 300])
def test_more_classes_than_the_label_type_can_name(backend: str, label_dtype: torch.dtype, classes: int) -> None:
    """Comparisons with the class count must not wrap around in eight bits."""
    seg = put(torch.randn(1, classes, 3, generator=generator(0)))
    cm = put(torch.randn(1, classes, classes, 1, generator=generator(1)))
    labels = put(torch.tensor([[100, 3, 7]]))
    ignored = -1 if label_dtype == torch.int8 else 255
    expected = ck.annotation_nll(seg.double(), cm.double(), labels, ignore_index=-1, backend="reference")
    if classes > MAX_CLASSES.get(backend, classes):
        with pytest.raises(RuntimeError, match=f"{backend}.* up to {MAX_CLASSES[backend]} classes, got {classes}"):
            ck.annotation_nll(seg, cm, labels.to(label_dtype), ignore_index=ignored, backend=backend)
        return
    ours = ck.annotation_nll(seg, cm, labels.to(label_dtype), ignore_index=ignored, backend=backend)
    assert loss_error(ours.loss, expected.loss) < LOSS_APART


@EVERY
def test_trusted_kinds_have_any_number_of_classes(backend: str) -> None:
    """Triton refused what its kernels can."""
    seg = leaf(torch.randn(1, 300, 3, 4, generator=generator(0)).to(device()))
    labels = torch.randint(0, 300, (1, 3, 4), generator=generator(1)).to(device())
    assert seg is not None
    loss = ck.annotation_objective(seg, [ck.Drawings(labels)], ignore_index=-1, backend=backend).loss
    loss.backward()
    expected = leaf(seg.double())
    truth = torch.nn.functional.cross_entropy(expected, labels)  # type: ignore[arg-type]
    truth.backward()
    assert loss_error(loss, truth) < LOSS_APART
    assert gradient_error(seg.grad, expected.grad) < GRADIENT_APART  # type: ignore[union-attr, arg-type]


@EVERY
@SCHEDULE
@pytest.mark.parametrize("cm_batch", [0, 1])
@pytest.mark.parametrize("grid", [None, (2, 3), (1, 1)], ids=["pixel", "strided", "one-point"])
def test_an_empty_batch_has_zero_loss_and_zero_gradients(
    backend: str, schedule: str, grid: tuple[int, int] | None, cm_batch: int
) -> None:
    """The last, empty shard of a sampler: the shared field still gets a gradient, and it is zero."""
    problem = make_problem(3, (4, 5), grid, batch=0, cm_batch=cm_batch, ignored="none", stream="random")
    for reduction in ("mean", "sum", "none"):
        out = evaluate(problem.with_options(reduction=reduction), backend, schedule)
        assert out.loss.sum() == 0
        assert out.count.sum() == 0
        for name, grad in out.gradients.items():
            assert (grad == 0).all(), name


@EVERY
@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_has_zero_loss(backend: str, size: tuple[int, int]) -> None:
    problem = make_problem(3, size, ignored="none")
    out = evaluate(problem, backend)
    assert (out.loss, out.count) == (0.0, 0.0)
    assert all(grad.numel() == 0 for grad in out.gradients.values())


def test_a_normalizer_on_the_cpu_follows_the_logits() -> None:
    """PyTorch lets a 0-d CPU tensor go with any device; a kernel that is handed its pointer would read host memory."""
    problem = types.SimpleNamespace(reduction="mean")
    drawings = ck.Drawings(torch.empty(0), normalizer=torch.tensor(2.0))
    scale = functional._scale(problem, drawings, torch.empty((), device="meta"))  # type: ignore[arg-type]
    assert scale is not None
    assert scale.device.type == "meta"
    on_host = functional._scale(problem, drawings, torch.empty(()))  # type: ignore[arg-type]
    assert on_host is not None
    assert on_host.item() == 0.5


# --- determinism, autocast, threads -----------------------------------------------------------------------------------


@COMPILED
@SCHEDULE
@pytest.mark.parametrize(
    ("size", "grid", "cm_batch"),
    [
        ((90, 131), None, 3),  # several tasks an image
        ((90, 131), None, 1),  # tasks sum over the images
        ((96, 40), (12, 5), 3),
        ((96, 40), (12, 5), 1),
        ((200, 40), (2, 3), 1),  # copies of the gradient
        ((97, 40), (1, 1), 1),
    ],
)
def test_the_number_of_threads_changes_no_bit(
    backend: str, schedule: str, size: tuple[int, int], grid: tuple[int, int] | None, cm_batch: int
) -> None:
    """mmsegmentation #255: a nondeterministic bilinear backward. Twice with two threads, once with one: identical."""
    problem = make_problem(
        3, size, grid, batch=3, cm_batch=cm_batch, stream="random", trace_weight=0.1, pixel_weight=torch.rand(3, *size)
    )
    runs = on_threads((1, 2, 2, 4), lambda: evaluate(problem, backend, schedule))
    for other in runs[1:]:
        assert torch.equal(runs[0].loss, other.loss)
        assert torch.equal(runs[0].trace, other.trace)
        for name, grad in runs[0].gradients.items():
            assert torch.equal(grad, other.gradients[name]), name


@COMPILED
def test_the_schedules_agree_bit_for_bit(backend: str) -> None:
    for grid in (None, (3, 5)):
        problem = make_problem(5, (20, 33), grid, stream="random", trace_weight=0.1)
        first, second = (evaluate(problem, backend, schedule) for schedule in SCHEDULES)
        assert torch.equal(first.loss, second.loss)
        for name, grad in first.gradients.items():
            assert torch.equal(grad, second.gradients[name]), name


@EVERY
@SCHEDULE
@pytest.mark.parametrize("grid", [None, (3, 5)], ids=["pixel", "strided"])
def test_autocast_leaves_the_loss_in_float32(backend: str, schedule: str, grid: tuple[int, int] | None) -> None:
    problem = make_problem(3, (10, 21), grid, stream="random", trace_weight=0.1)
    outside = evaluate(problem, backend, schedule)
    with torch.autocast(device().type, dtype=torch.bfloat16):
        inside = evaluate(problem, backend, schedule)
    assert inside.loss.dtype == torch.float32
    assert loss_error(inside.loss, outside.loss) < LOSS_APART
    for name, grad in inside.gradients.items():
        assert grad.dtype == torch.float32
        assert gradient_error(grad, outside.gradients[name]) < GRADIENT_APART


@COMPILED
def test_a_convolution_under_autocast_feeds_bfloat16_logits(backend: str) -> None:
    """The usual training step: bfloat16 logits out of autocast, float32 loss, float32 parameter gradients."""
    torch.manual_seed(0)
    head = torch.nn.Conv2d(4, 3 + 9, 1).to(device())
    x = put(torch.randn(2, 4, 6, 10))
    labels = put(torch.randint(0, 3, (2, 6, 10), dtype=torch.uint8))
    with torch.autocast(device().type, dtype=torch.bfloat16):
        out = head(x)
        assert out.dtype == torch.bfloat16
        loss = ck.annotation_nll(out[:, :3], out[:, 3:], labels, backend=backend).loss
    loss.backward()
    assert loss.dtype == torch.float32
    ours = head.weight.grad
    head.weight.grad = None
    exact = head(x)
    ck.annotation_nll(exact[:, :3], exact[:, 3:], labels, backend="reference").loss.backward()
    assert ours is not None
    assert head.weight.grad is not None
    assert gradient_error(ours, head.weight.grad) < GRADIENT_FLOOR[torch.bfloat16]
