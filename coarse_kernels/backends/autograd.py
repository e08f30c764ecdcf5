"""How the gradients of `annotation_objective` reach autograd. One operator serves all uses:

    forward without gradient      wanted = 0
    one_pass                      forward: wanted = what autograd will ask for; backward hands it out. Of several kinds
                                  the losses of the parts are a node of their own, which recomputes
    recompute                     forward: wanted = 0; backward: the operator again, grad_output folded into scale

In eager mode through `_Objective`, a function of the tensors that are differentiated. Under torch.compile through the
autograd of the operator itself (`register`), which PyTorch generates: it takes lists of tensors apart and together again at
every call, which costs 0.3 ms.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import wrapped
from ..problem import compute_dtype
from .operator import ONLY_REFERENCE, SEG, Arguments, Outputs, cm_bit, differentiable, present, transition_bit

_SECOND_DERIVATIVE = (
    "coarse_kernels: the fused operator has no second derivatives; "
    'use backend="reference", which computes them with plain PyTorch'
)
_TENSOR_LISTS = ("labels", "cm_logits", "transition", "class_weight", "pixel_weight", "scale")
_WITHOUT_TENSORS: dict[str, Any] = dict.fromkeys(("seg_logits", *_TENSOR_LISTS))

Gradients = dict[int, Tensor]  # by bit of ``wanted``


def run(operators: Any, call: Arguments, needed: dict[int, Tensor]) -> Outputs:
    """The operator in eager mode, differentiable in ``needed``; `Outputs` without gradients."""
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        out = Outputs(*operators.annotation_objective(*call))
    if not needed:
        return out

    def node(of: _Of) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _Objective.apply(operators, call, out, of, tuple(needed), *needed.values())
        return results[:-1]  # without the anchor

    if call.wanted and not _parts_follow(call):
        # The losses of the parts need the inputs, their sum the gradients alone: who keeps one keeps nothing of the other.
        (loss,), losses = node(_LOSS), node(_LOSSES)
    else:
        loss, *losses = node(_BOTH)  # type: ignore[assignment]
    return out._replace(loss=loss, losses=list(losses), grad_seg=call.seg_logits, grad_cm=[], grad_transition=[])


class _Of(NamedTuple):
    """Results of a node of the graph."""

    loss: bool = False
    losses: bool = False


_LOSS, _LOSSES, _BOTH = _Of(loss=True), _Of(losses=True), _Of(loss=True, losses=True)


class _Objective(torch.autograd.Function):
    """A node for results that have been computed."""

    @staticmethod
    def forward(
        ctx: Any, operators: Any, call: Arguments, out: Outputs, of: _Of, bits: tuple[int, ...], *needed: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.operators, ctx.bits, ctx.of = operators, bits, of
        anchor = out.loss.new_empty(0)
        _save(ctx, call, out, of, anchor)
        return (*((out.loss,) if of.loss else ()), *(out.losses if of.losses else ()), anchor)

    @staticmethod
    def backward(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_losses = list(incoming[:-1])
        grad_loss = grad_losses.pop(0) if ctx.of.loss else None
        grad_losses = grad_losses or [None] * ctx.state.kinds
        asked = [bit for bit, wants in zip(ctx.bits, ctx.needs_input_grad[5:], strict=True) if wants]
        found = _gradients(ctx.operators, ctx, asked, grad_loss, grad_losses)
        return (None,) * 5 + tuple(found.get(bit) for bit in ctx.bits)


# --- second derivatives: a clear error ----------------------------------------------------------------------------------


# What makes a gradient depend on the inputs that it is a function of is one more output of `_Objective`, without elements,
# which backward gets back with its graph: an ``anchor``, for one_pass saves no logits. (The operator's own autograd saves its
# inputs, which do as well.) Autograd then finds the way from a gradient to the inputs, and on it `_FirstDerivative`, which
# says that there is none; a node on no such way would be left out in silence.


class _FirstDerivative(torch.autograd.Function):
    """The identity, with a clear error behind it on the way to all that the gradient is a function ``of``."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, *of: Tensor | None) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(_SECOND_DERIVATIVE)


# --- what is saved, and the gradients from it ---------------------------------------------------------------------------


class _State(NamedTuple):
    call: Arguments  # without its tensors
    kinds: int
    formed: tuple[int, ...]  # bits of the gradients that were formed in forward, saved first
    has_inputs: bool  # then the tensors of the call
    has_anchor: bool  # and last the anchor

    def formed_all(self, asked: list[int]) -> bool:
        return all(bit in self.formed for bit in asked)


def _parts_follow(call: Arguments) -> bool:
    """Whether the gradient of the parts' own losses is to be had from that of their sum: a single kind's is its total's over
    its weight, if that leaves the gradient in the range of float32.
    """
    return len(call.labels) == 1 and 1e-20 < call.weight[0] < 1e20


def _save(ctx: Any, call: Arguments, out: Outputs, of: _Of, anchor: Tensor | None) -> None:
    formed = [bit for bit, _ in differentiable(call) if call.wanted & bit and of.loss]
    saved = [_of(bit, out) for bit in formed]
    # The operator itself may be asked for other gradients than it was told. It has no anchor, so the inputs stand for it.
    has_inputs = not formed or anchor is None or (of.losses and not _parts_follow(call))
    if has_inputs:
        inputs = [call.seg_logits]
        for name in _TENSOR_LISTS:
            inputs += getattr(call, name)
        saved += [t.clone() if t.is_inference() else t for t in inputs]  # a label made in inference mode is one, too
    if anchor is not None:
        saved.append(anchor)
    bare = call._replace(**_WITHOUT_TENSORS)
    ctx.state = _State(bare, len(call.labels), tuple(formed), has_inputs, anchor is not None)
    ctx.save_for_backward(*saved)


def _kind(bit: int) -> tuple[int, bool]:
    """Which kind's, and whether it is its transition's and not its field's."""
    kind, transition = divmod(bit.bit_length() - 2, 2)
    return kind, bool(transition)


def _of(bit: int, out: Outputs) -> Tensor:
    if bit == SEG:
        return out.grad_seg
    kind, transition = _kind(bit)
    return (out.grad_transition if transition else out.grad_cm)[kind]


def _gradients(
    operators: Any, ctx: Any, asked: list[int], grad_loss: Tensor | None, grad_losses: list[Tensor | None]
) -> Gradients:
    """Those that are ``asked`` for, of grad_loss * loss + sum grad_losses * losses."""
    state: _State = ctx.state
    incoming = (grad_loss, *grad_losses)
    if grad_loss is None:  # a kind whose part is not asked of has no gradient; a zero would set optimizers going
        asked = [bit for bit in asked if bit == SEG or grad_losses[_kind(bit)[0]] is not None]
    if not asked or all(grad is None for grad in incoming):
        return {}
    if wrapped.has_tangent(incoming):
        raise RuntimeError(f"coarse_kernels: {ONLY_REFERENCE.format('forward-mode derivatives of a gradient')}")
    saved = list(ctx.saved_tensors)
    anchor = saved.pop() if state.has_anchor else None
    formed, inputs = saved[: len(state.formed)], saved[len(state.formed) :]
    own_losses = any(grad is not None for grad in grad_losses)
    if formed and not state.has_inputs and own_losses:
        # the one kind: its loss is the total over its weight
        assert grad_losses[0] is not None
        own = grad_losses[0] / state.call.weight[0]
        grad_loss, own_losses = own if grad_loss is None else grad_loss + own, False
    if formed and not own_losses and state.formed_all(asked):
        assert grad_loss is not None
        kept = anchor is None or _graph_is_kept()  # without an anchor: who called the operator has the gradients, too
        grads = dict(zip(state.formed, _handed_out(operators, tuple(formed), grad_loss, kept), strict=True))
    else:
        grads = _recomputed(operators, state, inputs, grad_loss, grad_losses, asked)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        # create_graph=True: somebody may want to go on from here
        of = [t for t in inputs if t.requires_grad] if anchor is None else [anchor]
        return {bit: _FirstDerivative.apply(grads[bit], *of, *incoming) for bit in asked}
    return {bit: grads[bit] for bit in asked}


def _handed_out(operators: Any, saved: tuple[Tensor, ...], grad_loss: Tensor, kept: bool) -> tuple[Tensor, ...]:
    """The gradients saved in forward, times ``grad_loss`` in the compute dtype: in the storage dtype the factor itself may be
    inf. They are given away, or scaled in place, only where they are not ``kept``, so that nobody can ask for them again:
    under retain_graph a second backward would find them changed (by whoever owns them by then, ``param.grad`` first of all).
    """
    if not wrapped.readable(grad_loss):  # symbolic, or one of a batch of factors
        return tuple(_times(grad, grad_loss) for grad in saved)
    if grad_loss.device.type == "cpu":
        factor = grad_loss.item()
        if factor == 1.0 and not kept:
            return saved
        if factor == 0.0:  # of a transition it may be inf, which times 0 is NaN
            return tuple(torch.zeros_like(grad) for grad in saved)
        # a Python number is multiplied with in float32 whatever the gradient is stored in
        return tuple(grad * factor for grad in saved)
    if hasattr(operators, "scale_"):
        # The value is not known here without waiting for the device. A kernel looks, and mostly finds 1.
        saved = tuple(grad.clone() for grad in saved) if kept else saved
        for grad in saved:
            operators.scale_(grad, grad_loss.detach().to(compute_dtype(grad)))
        return saved
    return tuple(_times(grad, grad_loss) for grad in saved)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    dtype = compute_dtype(grad)
    return (grad.to(dtype) * factor.to(dtype)).masked_fill(factor == 0, 0.0).to(grad.dtype)


def _graph_is_kept() -> bool:
    # A private function of autograd, the one that torch.compile uses for the same question. Without it: assume so.
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())


def _recomputed(
    operators: Any,
    state: _State,
    inputs: list[Tensor],
    grad_loss: Tensor | None,
    grad_losses: list[Tensor | None],
    asked: list[int],
) -> Gradients:
    kinds = state.kinds
    if any(wrapped.of_transform(g) for g in (grad_loss, *grad_losses) if g is not None):
        raise RuntimeError(f"coarse_kernels: {ONLY_REFERENCE.format('batches of gradients')}")
    lists: dict[str, Any] = {name: inputs[1 + kinds * n : 1 + kinds * (n + 1)] for n, name in enumerate(_TENSOR_LISTS)}
    call = state.call._replace(seg_logits=inputs[0], **lists, wanted=sum(asked), per_pixel=False)
    if state.call.per_pixel:
        # losses are the maps w (nll + ...): their gradient is that of the sum with weights w * grad
        factors = [
            torch.zeros(labels.shape, dtype=call.compute_dtype, device=labels.device)
            if grad is None
            else grad.contiguous()
            for labels, grad in zip(call.labels, grad_losses, strict=True)
        ]
        weights = [
            pixel_weight * factor if present(pixel_weight) else factor
            for pixel_weight, factor in zip(call.pixel_weight, factors, strict=True)
        ]
        call = call._replace(pixel_weight=weights, weight=[1.0] * kinds)
    else:
        weight = list(call.weight)
        scales = []
        for kind, (scale, own) in enumerate(zip(call.scale, grad_losses, strict=True)):
            factor = grad_loss
            if own is not None:
                factor = own if grad_loss is None else grad_loss * weight[kind] + own
                weight[kind] = 1.0
            if factor is None:
                factor = torch.zeros((), dtype=call.compute_dtype, device=call.seg_logits.device)
            scales.append(scale * factor if present(scale) else factor)
        call = call._replace(scale=scales, weight=weight)
    if torch.compiler.is_compiling():
        out = Outputs(*operators.annotation_objective(*call))
    else:
        with torch.no_grad():
            out = run(operators, call, {})
    return {bit: _of(bit, out) for bit in asked}


# --- the operator's own autograd, for torch.compile ---------------------------------------------------------------------


def register(namespace: str, library: torch.library.Library) -> None:
    backward = functools.partial(_backward, getattr(torch.ops, namespace))
    torch.library.register_autograd(
        f"{namespace}::annotation_objective", backward, setup_context=_setup_context, lib=library
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    call, out = Arguments(*inputs), Outputs(*output)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*out.nll, *out.trace, out.grad_seg, *out.grad_cm, *out.grad_transition)
    _save(ctx, call, out, _BOTH, None)


def _backward(
    operators: Any, ctx: Any, grad_loss: Tensor | None, grad_losses: list[Tensor | None], *others: Any
) -> tuple[Any, ...]:
    kinds = ctx.state.kinds
    wants = Arguments(*ctx.needs_input_grad)
    asked = [SEG] if wants.seg_logits else []
    for kind in range(kinds):
        asked += [cm_bit(kind)] if wants.cm_logits[kind] else []
        asked += [transition_bit(kind)] if wants.transition[kind] else []
    grads = _gradients(operators, ctx, asked, grad_loss, grad_losses)
    lists: dict[str, Any] = {name: [None] * kinds for name in _TENSOR_LISTS}
    lists["cm_logits"] = [grads.get(cm_bit(kind)) for kind in range(kinds)]
    lists["transition"] = [grads.get(transition_bit(kind)) for kind in range(kinds)]
    return tuple(Arguments(seg_logits=grads.get(SEG), **lists, **dict.fromkeys(Arguments._fields[7:])))  # type: ignore[arg-type]
