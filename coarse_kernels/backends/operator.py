"""What every fused backend shares: the operator `annotation_nll` with its fake kernel and autograd, and its three uses.

An operator lives in a namespace of `torch.ops`: ``coarse_kernels`` (compiled, CPU and CUDA), ``coarse_kernels_triton``.
It returns ``(loss, nll, trace, grad_seg, grad_cm, grad_transition)``, the gradients being those of ``loss``; one that is
not in ``wanted`` has no elements. The same operator serves all three uses:

    forward without gradient      wanted = 0
    one_pass                      forward: wanted = what autograd will ask for; backward hands it out
    recompute                     forward: wanted = 0; backward: the operator again, grad_output folded into scale
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from .. import native, schedule
from ..checks import Stream
from .reference import interpolate, label_weights

SEG, CM, TRANSITION = 1, 2, 4  # bits of ``wanted``

_SECOND_DERIVATIVE = (
    "coarse_kernels: the fused operator has no second derivatives; "
    'use backend="reference", which computes them with plain PyTorch'
)


# The operators of a namespace. A test holds csrc/ops.cpp to the same text.
SCHEMAS = (
    "annotation_nll(Tensor seg_logits, Tensor cm_logits, Tensor labels, Tensor? transition, Tensor? class_weight, "
    "Tensor? pixel_weight, Tensor? scale, float loss_scale, float trace_weight, int ignore_index, bool per_pixel, "
    "int wanted) -> (Tensor loss, Tensor nll, Tensor trace, Tensor grad_seg, Tensor grad_cm, Tensor grad_transition)",
    "annotation_posterior(Tensor seg_logits, Tensor cm_logits, Tensor labels, Tensor? transition, int ignore_index) "
    "-> Tensor",
    "labelled_weight(Tensor labels, Tensor? class_weight, Tensor? pixel_weight, int num_classes, int ignore_index) "
    "-> Tensor",
)
# And where gradients of 3 GB are formed on a device that the host must not wait for (`_handed_out`):
SCALE = "scale_(Tensor(a!) gradient, Tensor factor) -> ()"


class FusedBackend:
    """A `Backend` whose work is done by the operators of ``torch.ops.<namespace>``."""

    def __init__(self, name: str, device_types: tuple[str, ...], namespace: str = "coarse_kernels"):
        self.name, self.device_types, self.namespace = name, device_types, namespace

    def unavailable(self) -> str | None:
        return native.operators_reason()

    def unsupported(self, stream: Stream) -> str | None:
        return None

    def nll_sum(self, stream: Stream, scale: Tensor | None, loss_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        args = _operands(stream)
        wanted = 0
        if schedule.current() == "one_pass" and not torch.compiler.is_compiling():
            wanted = _needed(args[0], args[1], args[3])
        out = self._operators().annotation_nll(
            *args, scale, loss_scale, stream.trace_weight, stream.ignore_index, False, wanted
        )
        return out[0], out[1].detach(), out[2].detach()

    def nll_map(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        out = self._operators().annotation_nll(
            *_operands(stream), None, 1.0, stream.trace_weight, stream.ignore_index, True, 0
        )
        return out[0], out[1].detach(), out[2].detach()

    def posterior(self, stream: Stream) -> Tensor:
        seg, cm, labels, transition, *_ = _operands(stream)
        posterior = self._operators().annotation_posterior(seg, cm, labels, transition, stream.ignore_index)
        return posterior.to(stream.seg_logits.dtype)

    def labelled_weight(self, stream: Stream) -> Tensor:
        if stream.reduction == "none":
            return label_weights(stream)
        weight = self._operators().labelled_weight(
            stream.labels, *_weights(stream), stream.num_classes, stream.ignore_index
        )
        return weight.to(stream.compute_dtype)

    def _operators(self) -> Any:
        return getattr(torch.ops, self.namespace)


def _operands(stream: Stream) -> tuple[Any, ...]:
    """The leading arguments of the operator: logits on the pixel grid, constants in the compute dtype."""
    assert stream.cm_logits is not None
    size, dtype = stream.labels.shape[1:], stream.compute_dtype
    seg, cm = stream.seg_logits, stream.cm_logits
    if seg.shape[2:] != size:
        seg = interpolate(seg.to(dtype), size)
    if dtype == torch.float64:  # only float64 with float64: nobody needs the mixtures to be fast
        seg, cm = seg.to(dtype), cm.to(dtype)
    transition = None if stream.transition is None else stream.transition.to(dtype)
    return (seg, cm, stream.labels, transition, *_weights(stream))


def _weights(stream: Stream) -> tuple[Tensor | None, Tensor | None]:
    """(class_weight, pixel_weight) in the compute dtype."""
    weights = (stream.class_weight, stream.pixel_weight)
    by_class, by_pixel = (None if w is None else w.detach().to(stream.compute_dtype) for w in weights)
    return by_class, by_pixel


def _needed(seg: Tensor, cm: Tensor, transition: Tensor | None) -> int:
    if not torch.is_grad_enabled():
        return 0
    return (
        SEG * seg.requires_grad
        + CM * cm.requires_grad
        + TRANSITION * (transition is not None and transition.requires_grad)
    )


# --- fake kernels: shapes and dtypes without computing ------------------------------------------------------------------


def _nll_fake(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    scale: Tensor | None,
    loss_scale: float,
    trace_weight: float,
    ignore_index: int,
    per_pixel: bool,
    wanted: int,
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if cm_logits.dtype == torch.float64 else torch.float32
    shape = labels.shape if per_pixel else ()

    def gradient(of: Tensor | None, bit: int) -> Tensor:
        if of is None or not wanted & bit:
            return seg_logits.new_empty((0,), dtype=dtype)
        return of.new_empty(of.shape)

    return (
        *(labels.new_empty(shape, dtype=dtype) for _ in range(3)),
        gradient(seg_logits, SEG),
        gradient(cm_logits, CM),
        gradient(transition, TRANSITION),
    )


def _posterior_fake(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, ignore_index: int
) -> Tensor:
    return seg_logits.new_empty(seg_logits.shape)


def _labelled_weight_fake(
    labels: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None, num_classes: int, ignore_index: int
) -> Tensor:
    return labels.new_empty((), dtype=torch.float64)


def _find_bad_label_fake(labels: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return labels.new_empty((2,), dtype=torch.int64)


# --- autograd -----------------------------------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, loss_scale, trace_weight, ignore_index, per_pixel, wanted = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = (loss_scale, trace_weight, ignore_index)
    ctx.per_pixel, ctx.wanted = per_pixel, wanted
    ctx.save_for_backward(*(output[3:] if wanted else tensors))


def _backward(operators: Any, ctx: Any, grad_loss: Tensor | None, *others: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = [bit for index, bit in ((0, SEG), (1, CM), (3, TRANSITION)) if ctx.needs_input_grad[index]]
    none = (None,) * 12
    if grad_loss is None or not needed:
        return none
    if ctx.wanted:
        grads = _handed_out(operators, ctx.saved_tensors, grad_loss)
    else:
        grads = _recomputed(operators, ctx, grad_loss, sum(needed))
    if torch.is_grad_enabled():  # create_graph=True: somebody may want to go on from here
        grads = tuple(_FirstDerivative.apply(grad, torch.zeros((), requires_grad=True)) for grad in grads)
    seg, cm, transition = (
        grad if bit in needed else None for grad, bit in zip(grads, (SEG, CM, TRANSITION), strict=True)
    )
    return seg, cm, None, transition, *none[4:]


class _FirstDerivative(torch.autograd.Function):
    """The identity, with a clear error behind it. ``anchor`` makes the result part of a graph."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, anchor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_SECOND_DERIVATIVE)


def _handed_out(operators: Any, saved: tuple[Tensor, ...], grad_loss: Tensor) -> tuple[Tensor, ...]:
    """The gradients saved in forward, times ``grad_loss``. They are given away, or scaled in place, only where nobody can ask
    for them again: under retain_graph a second backward would find them changed (by whoever owns them by then,
    ``param.grad`` first of all).
    """
    if not _graph_is_kept():
        if grad_loss.device.type == "cpu":
            if grad_loss.detach().item() == 1.0:
                return saved
        elif hasattr(operators, "scale_"):
            # The value is not known here without waiting for the device. A kernel looks, and mostly finds 1.
            for grad in saved:
                operators.scale_(grad, grad_loss.to(_factor_dtype(grad)))
            return saved
    return tuple(grad * grad_loss.to(grad.dtype) if grad.numel() else grad for grad in saved)


def _factor_dtype(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _graph_is_kept() -> bool:
    # A private function of autograd, the one that torch.compile uses for the same question. Without it: assume so.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _recomputed(operators: Any, ctx: Any, grad_loss: Tensor, wanted: int) -> tuple[Tensor, ...]:
    seg, cm, labels, transition, class_weight, pixel_weight, scale = ctx.saved_tensors
    loss_scale, trace_weight, ignore_index = ctx.settings
    if ctx.per_pixel:
        # loss is the map w (nll + ...): its gradient is that of the sum with weights w * grad_loss
        factor = grad_loss.contiguous()
        pixel_weight = factor if pixel_weight is None else pixel_weight * factor
    else:
        scale = grad_loss if scale is None else scale * grad_loss
    out = operators.annotation_nll(
        seg,
        cm,
        labels,
        transition,
        class_weight,
        pixel_weight,
        scale,
        loss_scale,
        trace_weight,
        ignore_index,
        False,
        wanted,
    )
    return out[3:]


def register(namespace: str) -> None:
    """Fake kernels and autograd for the operators of a namespace that has been defined."""
    library = torch.library
    for name, fake in (
        ("annotation_nll", _nll_fake),
        ("annotation_posterior", _posterior_fake),
        ("labelled_weight", _labelled_weight_fake),
    ):
        library.register_fake(f"{namespace}::{name}", fake)
    backward = functools.partial(_backward, getattr(torch.ops, namespace))
    library.register_autograd(f"{namespace}::annotation_nll", backward, setup_context=_setup_context)


if native.OPERATORS is not None:
    register("coarse_kernels")
    torch.library.register_fake("coarse_kernels::find_bad_label", _find_bad_label_fake)
