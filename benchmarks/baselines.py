"""The competitors: one annotation stream in plain PyTorch, mean over the labelled pixels.

Every function maps ``(seg_logits, cm_logits, labels, transition | None, trace_weight)`` to the scalar loss::

    mean over labelled pixels of  -log sum_j p[j] q[j]  +  trace_weight * tr A,      q[j] = sum_i T[i,y] A[i,j]

with seg_logits (B, C, H, W), cm_logits (B, C observed, C true, h, w), labels (B, H, W) and `IGNORE` where nothing is
drawn. A field on a coarser grid is interpolated to (H, W) first.

"Best plain PyTorch" is the fastest of `PLAIN`, per case. All of them work on probabilities with a clamp at `TINY`: that
is faster than log space and right at the logits that are timed, though not at extreme ones (gradients vanish once the
probability of a label is below `TINY`; the fused kernels and `log_space` keep them). What was tried and what it took:
CANDIDATES.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
TINY = 1e-30  # far above the smallest normal float32 (1.2e-38), so that 1 / TINY is finite

Formulation = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
# (seg_logits, cm_logits, labels, negative_cm, negative_labels, transition, trace_weight): both streams, one loss
Objective = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


# --- shared pieces ----------------------------------------------------------------------------------------------------


def interpolate(cm_logits: Tensor, size: torch.Size) -> Tensor:
    """(B, C, C, h, w) -> (B, C, C, H, W), bilinear, align_corners=False."""
    if cm_logits.shape[3:] == size:
        return cm_logits
    flat = F.interpolate(cm_logits.flatten(1, 2), size=tuple(size), mode="bilinear", align_corners=False)
    return flat.view(*cm_logits.shape[:3], *size)


@functools.cache
def _interpolation_matrix(size: int, grid: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, grid): linear interpolation of one axis as a matrix, from F.interpolate itself."""
    identity = torch.eye(grid, dtype=dtype, device=device)[None]
    return F.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T.contiguous()


def interpolate_matmul(cm_logits: Tensor, size: torch.Size) -> Tensor:
    """`interpolate` as two matrix products: its backward is two products too, 4x faster than that of F.interpolate."""
    if cm_logits.shape[3:] == size:
        return cm_logits
    rows, columns = (
        _interpolation_matrix(n, m, cm_logits.dtype, cm_logits.device)
        for n, m in zip(size, cm_logits.shape[3:], strict=True)
    )
    return rows @ (cm_logits @ columns.T)


def _known(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, W) where there is a label, and the labels as an index, 0 where there is none."""
    valid = labels != IGNORE
    return valid, torch.where(valid, labels, 0).long()


def _reported(transition: Tensor, index: Tensor) -> Tensor:
    """T[i, y] at each pixel, (B, C, H, W)."""
    return transition[:, index].movedim(0, 1)


def _masked_mean(pixel_loss: Tensor, valid: Tensor) -> Tensor:
    weight = valid.to(pixel_loss.dtype)
    return (pixel_loss * weight).sum() / weight.sum()


# --- as published -----------------------------------------------------------------------------------------------------


def published(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float
) -> Tensor:
    """As Zhang et al. (NeurIPS 2020) wrote it: permute to (BHW, C, C), bmm, log, NLL, trace.

    Made sound in two places: the columns are normalised with a softmax, and the log has a floor.
    """
    valid, _ = _known(labels)
    cm_logits = interpolate(cm_logits, labels.shape[1:])
    batch, classes, height, width = seg_logits.shape
    pixels = batch * height * width
    cm = cm_logits.softmax(1).permute(0, 3, 4, 1, 2).reshape(pixels, classes, classes)
    p = seg_logits.softmax(1).permute(0, 2, 3, 1).reshape(pixels, classes, 1)
    observed = torch.bmm(cm, p).view(pixels, classes)
    if transition is not None:
        observed = observed @ transition
    nll = F.nll_loss(observed.clamp_min(TINY).log(), labels.flatten().long(), ignore_index=IGNORE)
    trace = torch.diagonal(cm, dim1=1, dim2=2).sum(1)
    return nll + trace_weight * _masked_mean(trace, valid.flatten())


# --- best plain -------------------------------------------------------------------------------------------------------


def log_space(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float
) -> Tensor:
    """Everything as logarithms: no floor, right at any logits. log_softmax of the field, then row y, then logsumexp."""
    valid, index = _known(labels)
    log_cm = F.log_softmax(interpolate(cm_logits, labels.shape[1:]), 1)
    if transition is None:
        rows = index[:, None, None].expand(-1, 1, log_cm.shape[2], -1, -1)
        log_q = log_cm.gather(1, rows).squeeze(1)
    else:
        log_q = torch.logsumexp(log_cm + _reported(transition.log(), index).unsqueeze(2), 1)
    nll = -torch.logsumexp(F.log_softmax(seg_logits, 1) + log_q, 1)
    trace = log_cm.diagonal(dim1=1, dim2=2).exp().sum(-1)
    return _masked_mean(nll + trace_weight * trace, valid)


def softmax_gather(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    trace_weight: float,
    up: Callable[[Tensor, torch.Size], Tensor] = interpolate,
) -> Tensor:
    """Softmax, then row y of the matrix instead of the whole product A p."""
    valid, index = _known(labels)
    cm = up(cm_logits, labels.shape[1:]).softmax(1)
    if transition is None:
        q = cm.gather(1, index[:, None, None].expand(-1, 1, cm.shape[2], -1, -1)).squeeze(1)
    else:
        q = (cm * _reported(transition, index).unsqueeze(2)).sum(1)
    nll = -(seg_logits.softmax(1) * q).sum(1).clamp_min(TINY).log()
    trace = cm.diagonal(dim1=1, dim2=2).sum(-1)
    return _masked_mean(nll + trace_weight * trace, valid)


def softmax_rows(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    trace_weight: float,
    up: Callable[[Tensor, torch.Size], Tensor] = interpolate,
) -> Tensor:
    """`softmax_gather` with row y and the diagonal in one gather: autograd then fills one field of zeros, not two.

    For a transition there is no row to gather: the same as `softmax_gather`.
    """
    if transition is not None:
        return softmax_gather(seg_logits, cm_logits, labels, transition, trace_weight, up)
    valid, index = _known(labels)
    cm = up(cm_logits, labels.shape[1:]).softmax(1)
    rows = index[:, None, None].expand(-1, 1, cm.shape[2], -1, -1)
    diagonal = torch.arange(cm.shape[2], device=cm.device).view(1, 1, -1, 1, 1).expand_as(rows)
    q, own = cm.gather(1, torch.cat((rows, diagonal), 1)).unbind(1)
    nll = -(seg_logits.softmax(1) * q).sum(1).clamp_min(TINY).log()
    return _masked_mean(nll + trace_weight * own.sum(1), valid)


def softmax_rows_uniform(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    trace_weight: float,
    up: Callable[[Tensor, torch.Size], Tensor] = interpolate,
) -> Tensor:
    """`softmax_rows` for somebody who knows that the transition is uniform: q[j] = (1 - A[y, j]) / (C - 1).

    Columns of A sum to 1, so that the negative stream needs one row as well, where any other transition needs them all.
    With two classes that row is the other one's, without the cancellation.
    """
    valid, index = _known(labels)
    if transition is not None and cm_logits.shape[1] == 2:
        index, transition = 1 - index, None
    cm = up(cm_logits, labels.shape[1:]).softmax(1)
    rows = index[:, None, None].expand(-1, 1, cm.shape[2], -1, -1)
    diagonal = torch.arange(cm.shape[2], device=cm.device).view(1, 1, -1, 1, 1).expand_as(rows)
    q, own = cm.gather(1, torch.cat((rows, diagonal), 1)).unbind(1)
    if transition is not None:
        q = (1.0 - q) / (cm.shape[2] - 1)
    nll = -(seg_logits.softmax(1) * q).sum(1).clamp_min(TINY).log()
    return _masked_mean(nll + trace_weight * own.sum(1), valid)


class _ClosedForm(torch.autograd.Function):
    """Loss and both gradients in one go, the gradients formed in place in the two softmaxes.

        r[j]        = p[j] q[j] / sum_k p[k] q[k]
        dL/ds[j]    = p[j] - r[j]
        dL/da[i,j]  = A[i,j] (r[j] - t A[j,j] - r[j] T[i,y] / q[j])  +  t A[j,j] [i = j],     t = trace_weight

    each times the pixel's share of the mean.
    """

    @staticmethod
    def forward(
        ctx: Any,
        seg_logits: Tensor,
        cm_logits: Tensor,
        labels: Tensor,
        transition: Tensor | None,
        trace_weight: float,
        uniform: bool,
    ) -> Tensor:
        valid, index = _known(labels)
        share = valid.to(seg_logits.dtype).unsqueeze(1)
        share = share / share.sum()
        if uniform and transition is not None and cm_logits.shape[1] == 2:  # "not this one" names the other
            index, transition = 1 - index, None
        cm, p = cm_logits.softmax(1), seg_logits.softmax(1)
        others = cm.shape[1] - 1
        if transition is None or uniform:
            rows = index[:, None, None].expand(-1, 1, cm.shape[2], -1, -1)
            q = at_label = cm.gather(1, rows).squeeze(1)
            if transition is not None:
                q = (1.0 - at_label) / others
        else:
            reported = _reported(transition, index)
            q = reported[:, :1] * cm[:, 0]
            for i in range(1, cm.shape[1]):  # one class at a time: no temporary of C x C values
                q.addcmul_(reported[:, i : i + 1], cm[:, i])
        joint = p * q
        likelihood = joint.sum(1, keepdim=True).clamp_min_(TINY)
        own = cm.diagonal(dim1=1, dim2=2).movedim(-1, 1)
        loss = ((trace_weight * own.sum(1, keepdim=True) - likelihood.log()) * share).sum()

        posterior = joint.div_(likelihood).mul_(share)
        own = own * share * trace_weight
        column = posterior - own
        grad_seg = p.mul_(share).sub_(posterior)
        if transition is None:
            grad_cm = cm.mul_(column.unsqueeze(1))
            grad_cm.scatter_add_(1, rows, posterior.neg_().unsqueeze(1))
        elif (
            uniform
        ):  # T[i, y] is 1 / (C - 1) in every row but y: take it off everywhere, and give row y its share back
            ratio = posterior / q.clamp_min(TINY) / others
            grad_cm = cm.mul_((column - ratio).unsqueeze(1))
            grad_cm.scatter_add_(1, rows, at_label.mul_(ratio).unsqueeze(1))
        else:
            ratio = posterior / q.clamp_min(TINY)
            for i in range(cm.shape[1]):
                cm[:, i].mul_(torch.addcmul(column, reported[:, i : i + 1], ratio, value=-1))
            grad_cm = cm
        grad_cm.diagonal(dim1=1, dim2=2).add_(own.movedim(1, -1))
        ctx.save_for_backward(grad_seg, grad_cm)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        grad_seg, grad_cm = ctx.saved_tensors
        (factor,) = grad_outputs
        if not torch.compiler.is_compiling() and float(factor) == 1.0:  # saves a pass over the field
            return grad_seg, grad_cm, None, None, None, None
        return grad_seg * factor, grad_cm * factor, None, None, None, None


def closed_form(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    trace_weight: float,
    up: Callable[[Tensor, torch.Size], Tensor] = interpolate,
    uniform: bool = False,
) -> Tensor:
    """The gradient written by hand (`_ClosedForm`): what someone would do who derived it, still in plain PyTorch.

    ``uniform``: takes any transition for the uniform one, as `softmax_rows_uniform` does.
    """
    field = up(cm_logits, labels.shape[1:])
    loss: Tensor = _ClosedForm.apply(seg_logits, field, labels, transition, trace_weight, uniform)
    return loss


# --- both streams, half storage ---------------------------------------------------------------------------------------


def objective(formulation: Formulation) -> Objective:
    """The positive and the negative stream of one formulation, as a single function: to be compiled as one graph."""

    def both(
        seg_logits: Tensor,
        cm_logits: Tensor,
        labels: Tensor,
        negative_cm: Tensor,
        negative_labels: Tensor,
        transition: Tensor,
        trace_weight: float,
    ) -> Tensor:
        positive = formulation(seg_logits, cm_logits, labels, None, trace_weight)
        return positive + formulation(seg_logits, negative_cm, negative_labels, transition, trace_weight)

    return both


def in_float32(formulation: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """For logits stored in 16 bits: softmax and log in float32, as under autocast; torch.compile fuses the conversion.

    In 16 bits throughout it would be another computation: the loss is off by 1e-3 then.
    """

    def wide(*arguments: Any) -> Tensor:
        return formulation(
            *(
                a.float() if isinstance(a, Tensor) and a.dtype in (torch.bfloat16, torch.float16) else a
                for a in arguments
            )
        )

    return wide


# --- who is in the race -----------------------------------------------------------------------------------------------

# Ordinary formulations, differentiated by autograd.
AUTOGRAD: dict[str, Formulation] = {"softmax_gather": softmax_gather, "softmax_rows": softmax_rows}
# Those, and the gradient written by hand. The fastest of them is "best plain PyTorch".
PLAIN: dict[str, Formulation] = {**AUTOGRAD, "closed_form": closed_form}
# On a strided grid also with the interpolation as matrix products.
PLAIN_STRIDED: dict[str, Formulation] = {
    **PLAIN,
    "softmax_rows_matmul": functools.partial(softmax_rows, up=interpolate_matmul),
    "closed_form_matmul": functools.partial(closed_form, up=interpolate_matmul),
}
# Where the transition is uniform, as in the objective by default, with that in mind.
PLAIN_UNIFORM: dict[str, Formulation] = {
    "softmax_rows_uniform": softmax_rows_uniform,
    "closed_form_uniform": functools.partial(closed_form, uniform=True),
}
PLAIN_UNIFORM_STRIDED: dict[str, Formulation] = {
    **PLAIN_UNIFORM,
    "softmax_rows_uniform_matmul": functools.partial(softmax_rows_uniform, up=interpolate_matmul),
    "closed_form_uniform_matmul": functools.partial(closed_form, up=interpolate_matmul, uniform=True),
}
AUTOGRAD_NAMES = (*AUTOGRAD, "softmax_rows_matmul", "softmax_rows_uniform", "softmax_rows_uniform_matmul")
BASELINES: dict[str, Formulation] = {
    "published": published,
    "log_space": log_space,
    **PLAIN_STRIDED,
    **PLAIN_UNIFORM_STRIDED,
}
PLAIN_NAMES = tuple(name for name in BASELINES if name != "published")

COMPILED = ("softmax_gather", "softmax_rows", "closed_form")
COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


def contender(name: str, *, both: bool = False, half: bool = False) -> Callable[..., Tensor]:
    """A baseline by name, as a case wants it. "compiled:<name>[:<mode>]" is `torch.compile` of it.

    It compiles on its first call, and raises there without a compiler.
    """
    kind, *rest = name.split(":")
    found: Callable[..., Tensor] = BASELINES[rest[0] if kind == "compiled" else kind]
    found = objective(found) if both else found
    found = in_float32(found) if half else found
    if kind != "compiled":
        return found
    mode = rest[1] if len(rest) > 1 else None
    result: Callable[..., Tensor] = torch.compile(found, fullgraph=True, dynamic=False, mode=mode)
    return result
