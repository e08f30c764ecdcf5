"""`annotation_objective` where the kernels take one kind of drawings with a matrix at a time, and class logits on the pixel
grid: CUDA and Triton. These kinds and their layers go one after the other; trusted ones all together through the operator
`trusted`, which reads class logits on their own grid, or in plain PyTorch where the namespace has none.

Below autograd: nothing here records a graph.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Drawings, Problem
from .operator import SEG, Arguments, Outputs, cm_bit, present, transition_bit
from .reference import BACKEND, interpolate, label_weights


class _Single(NamedTuple):
    """What the operator `annotation_nll` returns."""

    loss: Tensor
    nll: Tensor
    trace: Tensor
    grad_seg: Tensor
    grad_cm: Tensor
    grad_transition: Tensor


def implement(
    library: torch.library.Library, namespace: str, keys: Sequence[str], label_map: Callable[..., Any] | None = None
) -> None:
    """Implement `annotation_objective`, `objective_posterior` and `label_map` by the operators of one kind at a time.
    ``label_map``: a kernel of it, if there is one.
    """
    operators = getattr(torch.ops, namespace)
    for key in keys:
        library.impl("annotation_objective", functools.partial(_objective, operators), key)
        library.impl("objective_posterior", functools.partial(_posterior, operators), key)
        library.impl("label_map", label_map or _label_map, key)


def _present(t: Tensor) -> Tensor | None:
    return t if present(t) else None


def _objective(operators: Any, *args: Any) -> tuple[Any, ...]:
    call = Arguments(*args)
    size = call.labels[0].shape[2:]
    wide = any(t.dtype == torch.float64 for t in (call.seg_logits, *call.cm_logits))
    dtype = torch.float64 if wide else torch.float32
    together = [k for k, cm in enumerate(call.cm_logits) if not present(cm)] if hasattr(operators, "trusted") else []
    coarse = call.seg_logits.shape[2:] != size and len(together) < len(call.labels)
    seg = interpolate(call.seg_logits.to(dtype), size) if coarse else call.seg_logits

    def absent() -> Tensor:  # a new one each time: outputs of an operator do not share memory
        return seg.new_empty(0, dtype=dtype)

    total = absent() if call.per_pixel else seg.new_zeros((), dtype=dtype)
    grad_seg: Tensor | None = None
    losses, nlls, traces, grads_cm, grads_transition = [], [], [], [], []
    fused: Iterator[tuple[Tensor, Tensor]] = iter(())
    fused_seg = absent()
    if together:
        loss, terms, fused_seg, grads = _together(operators, call, together)
        total = total if call.per_pixel else loss
        fused = iter(zip(terms, grads, strict=True))
    for kind, labels in enumerate(call.labels):
        if kind in together:
            nll, grad_transition = next(fused)
            losses.append(nll.clone())
            nlls.append(nll)
            traces.append(torch.zeros_like(nll))
            grads_cm.append(absent())
            grads_transition.append(grad_transition)
            continue
        wanted = SEG * bool(call.wanted & SEG)
        wanted |= cm_bit(0) * bool(call.wanted & cm_bit(kind))
        wanted |= transition_bit(0) * bool(call.wanted & transition_bit(kind))
        cm, pixel_weight = call.cm_logits[kind], call.pixel_weight[kind]
        weight = 1.0 if call.per_pixel else call.weight[kind]
        layers = []
        for layer in range(labels.shape[1]):
            layers.append(
                _Single(
                    *(operators.annotation_nll if present(cm) else _trusted)(
                        seg,
                        cm,
                        labels[:, layer].contiguous(),
                        _present(call.transition[kind]),
                        _present(call.class_weight[kind]),
                        pixel_weight[:, layer].contiguous() if present(pixel_weight) else None,
                        _present(call.scale[kind]),
                        weight,
                        call.trace_weight[kind],
                        call.ignore_index,
                        call.per_pixel,
                        wanted,
                    )
                )
            )

        def zeros(of: Tensor) -> Tensor:
            return torch.zeros_like(of, memory_format=torch.contiguous_format)

        if call.per_pixel:
            maps = labels.new_empty(labels.shape, dtype=dtype)
            losses.append(torch.stack([out.loss for out in layers], 1) if layers else maps)
            nlls.append(torch.stack([out.nll for out in layers], 1) if layers else maps.clone())
            traces.append(torch.stack([out.trace for out in layers], 1) if layers else maps.clone())
        else:
            nll = sum((out.nll for out in layers), total.new_zeros(()))
            trace = sum((out.trace for out in layers), total.new_zeros(()))
            total = sum((out.loss for out in layers), total)
            losses.append(nll + call.trace_weight[kind] * trace)
            nlls.append(nll)
            traces.append(trace)
        grad_cm, grad_transition = absent(), absent()
        if wanted & cm_bit(0):
            grad_cm = _sum([out.grad_cm for out in layers], cm) if layers else zeros(cm)
        if wanted & transition_bit(0):
            of = call.transition[kind]
            grad_transition = _sum([out.grad_transition for out in layers], of) if layers else zeros(of)
        grads_cm.append(grad_cm)
        grads_transition.append(grad_transition)
        if wanted & SEG:
            for out in layers:
                grad_seg = out.grad_seg if grad_seg is None else grad_seg + out.grad_seg
    if not call.wanted & SEG:
        grad_seg = absent()
    else:
        if coarse and grad_seg is not None:
            grad_seg = _coarsened(grad_seg, call.seg_logits.shape)
        if together:
            grad_seg = fused_seg if grad_seg is None else grad_seg + fused_seg
        grad_seg = torch.zeros_like(call.seg_logits) if grad_seg is None else grad_seg.to(call.seg_logits.dtype)
    return tuple(Outputs(total, losses, nlls, traces, grad_seg, grads_cm, grads_transition))


def _together(operators: Any, call: Arguments, kinds: list[int]) -> tuple[Any, ...]:
    """`trusted` for these kinds."""
    lists = (call.labels, call.transition, call.class_weight, call.pixel_weight, call.scale)
    weight = [1.0 if call.per_pixel else call.weight[k] for k in kinds]
    wanted = call.wanted & SEG
    for own, kind in enumerate(kinds):
        wanted |= transition_bit(own) * bool(call.wanted & transition_bit(kind))
    return operators.trusted(
        call.seg_logits, *([of[k] for k in kinds] for of in lists), weight, call.ignore_index, call.per_pixel, wanted
    )


def _sum(grads: list[Tensor], like: Tensor) -> Tensor:
    total = grads[0]
    for grad in grads[1:]:
        total = total + grad
    return total.to(like.dtype)


def _coarsened(grad: Tensor, shape: torch.Size) -> Tensor:
    """The adjoint of `interpolate`: (B, C, *S) -> (B, C, *s)."""
    if all(points == 1 for points in shape[2:]):
        return grad.sum(tuple(range(2, grad.dim())), keepdim=True)
    rank = grad.dim() - 2
    backward = {
        1: torch.ops.aten.upsample_linear1d_backward,
        2: torch.ops.aten.upsample_bilinear2d_backward,
        3: torch.ops.aten.upsample_trilinear3d_backward,
    }[rank]
    return backward(grad, list(grad.shape[2:]), list(shape), False, *([None] * rank))


def _trusted(
    seg: Tensor,
    cm: Tensor,
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
    """`annotation_nll` with A = I: nll = -log sum_j p[j] T[j,y]."""
    drawings = Drawings(
        labels.unsqueeze(1),
        class_weight=class_weight,
        pixel_weight=None if pixel_weight is None else pixel_weight.unsqueeze(1),
    )
    problem = Problem(seg, (drawings,), ignore_index, "none", (False,))
    valid = problem.labelled(drawings)[:, 0]
    weight = label_weights(problem, drawings)[:, 0]
    dtype = weight.dtype
    y = torch.where(valid, labels, 0).long()
    log_p = F.log_softmax(torch.where(valid.unsqueeze(1), seg.to(dtype), 0.0), 1)
    if transition is None:
        log_joint = torch.full_like(log_p, -torch.inf).scatter(1, y.unsqueeze(1), 0.0) + log_p
    else:
        log_joint = log_p + transition[:, y].movedim(0, 1).log()
    log_d = torch.logsumexp(log_joint, 1)
    possible = ((log_joint > -torch.inf) | log_joint.isnan()).any(1)
    nll = torch.where(weight != 0, weight * torch.where(possible, -log_d, torch.inf), 0.0)
    trace = torch.zeros_like(nll)
    absent = nll.new_empty(0)
    factor = torch.ones((), dtype=dtype, device=seg.device) if scale is None else scale
    live = torch.where(valid & possible & (weight != 0), weight, 0.0) * factor * loss_scale
    grad_seg = grad_transition = absent
    if wanted & SEG:
        r = torch.softmax(torch.where(possible.unsqueeze(1), log_joint, 0.0), 1)
        w = live.unsqueeze(1)
        grad_seg = torch.where(w != 0, w * (log_p.exp() - r), 0.0).to(seg.dtype)
    if wanted & transition_bit(0) and transition is not None:
        # dT[i, y] = -p[i] / D, summed over the pixels of each label
        shares = torch.where(live.unsqueeze(1) != 0, -(log_p - log_d.unsqueeze(1)).exp() * live.unsqueeze(1), 0.0)
        columns = shares.movedim(1, -1).flatten(0, -2).double()
        grad_transition = torch.zeros_like(transition, dtype=torch.float64).index_add(0, y.flatten(), columns)
        grad_transition = grad_transition.t().to(transition.dtype).contiguous()
    if per_pixel:
        return nll.clone(), nll, trace, grad_seg, absent, grad_transition
    total = nll.sum(dtype=torch.float64).to(dtype)
    weighted = torch.where(factor == 0, 0.0, total) * factor
    loss = torch.zeros_like(weighted) if loss_scale == 0 else weighted * loss_scale
    return loss, weighted, trace.sum(), grad_seg, absent, grad_transition


def _posterior(
    operators: Any,
    seg_logits: Tensor,
    labels: list[Tensor],
    cm_logits: list[Tensor],
    transition: list[Tensor],
    ignore_index: int,
) -> Tensor:
    size = labels[0].shape[2:]
    single = len(labels) == 1 and labels[0].shape[1] == 1 and present(cm_logits[0])
    if single:
        seg = seg_logits
        if seg.shape[2:] != size:
            seg = interpolate(seg.to(torch.promote_types(seg.dtype, torch.float32)), size)
        return operators.annotation_posterior(
            seg, cm_logits[0], labels[0][:, 0].contiguous(), _present(transition[0]), ignore_index
        ).to(seg_logits.dtype)
    drawings = tuple(
        Drawings(y, _present(a), _present(t)) for y, a, t in zip(labels, cm_logits, transition, strict=True)
    )
    return BACKEND.posterior(Problem(seg_logits, drawings, ignore_index, "mean", (True,) * len(drawings)))


def _label_map(seg_logits: Tensor, size: Sequence[int]) -> Tensor:
    return BACKEND.label_map(seg_logits, tuple(size))
