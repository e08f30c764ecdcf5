"""The competitors: plain PyTorch, mean over the labelled pixels.

A formulation of a kind with confusion matrices maps ``(seg_logits, cm_logits, labels, transition | None, trace_weight)`` to

    mean over labelled pixels of  -log sum_j p[j] q[j]  +  trace_weight * tr A,      q[j] = sum_i T[i,y] A[i,j]

with seg_logits (B, C, H, W), cm_logits (B, C observed, C true, h, w), labels (B, H, W) and `IGNORE` where nothing is drawn. A
field on a coarser grid is interpolated to (H, W) first. `objective` makes the sum over several kinds of one of them, class
logits interpolated once, trusted kinds without a matrix.

"Best plain PyTorch" is the fastest of all but `published`, per problem. They work on probabilities with a clamp at `TINY`: that
is faster than log space and right at the logits that are timed, though not at extreme ones (gradients vanish once the
probability of a label is below `TINY`; the fused kernels and `log_space` keep them). What was tried and what it took:
CANDIDATES.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = 255
TINY = 1e-30  # far above the smallest normal float32 (1.2e-38), so that 1 / TINY is finite

Formulation = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor]
Resize = Callable[[Tensor, torch.Size], Tensor]


# --- shared pieces ----------------------------------------------------------------------------------------------------


def interpolate(x: Tensor, size: torch.Size) -> Tensor:
    """(..., h, w) -> (..., H, W), bilinear, align_corners=False. One matrix for all pixels is one matrix for all pixels."""
    if x.shape[-2:] == size:
        return x
    if x.shape[-2:] == (1, 1):
        return x.expand(*x.shape[:-2], *size)
    flat = F.interpolate(x.flatten(1, -3), size=tuple(size), mode="bilinear", align_corners=False)
    return flat.view(*x.shape[:-2], *size)


@functools.cache
def _interpolation_matrix(size: int, grid: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(size, grid): linear interpolation of one axis as a matrix, from F.interpolate itself."""
    identity = torch.eye(grid, dtype=dtype, device=device)[None]
    return F.interpolate(identity, size=size, mode="linear", align_corners=False)[0].T.contiguous()


def interpolate_matmul(x: Tensor, size: torch.Size) -> Tensor:
    """`interpolate` as two matrix products: its backward is two products too, 4x faster than that of F.interpolate."""
    if x.shape[-2:] == size:
        return x
    rows, columns = (_interpolation_matrix(n, m, x.dtype, x.device) for n, m in zip(size, x.shape[-2:], strict=True))
    return rows @ (x @ columns.T)


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
    up: Resize = interpolate,
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
    up: Resize = interpolate,
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
    up: Resize = interpolate,
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
    up: Resize = interpolate,
    uniform: bool = False,
) -> Tensor:
    """The gradient written by hand (`_ClosedForm`): what someone would do who derived it, still in plain PyTorch.

    ``uniform``: takes any transition for the uniform one, as `softmax_rows_uniform` does.
    """
    field = up(cm_logits, labels.shape[1:])
    loss: Tensor = _ClosedForm.apply(seg_logits, field, labels, transition, trace_weight, uniform)
    return loss


# --- one matrix for all pixels of an image ----------------------------------------------------------------------------


def matrix_product(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float
) -> Tensor:
    """Where the grid is 1x1: one matrix product for all pixels, (T' A) p, and the entry of the label.

    Rows q looked up by label would be as many numbers; their gradient is then a sum over pixels one after another, which in
    float32 is off by 3e-5.
    """
    valid, index = _known(labels)
    reported = _reported_rows(cm_logits, transition, labels) @ seg_logits.softmax(1).flatten(2)
    nll = -reported.view_as(seg_logits).gather(1, index[:, None])[:, 0].clamp_min(TINY).log()
    return _masked_mean(nll, valid) + _mean_trace(cm_logits, valid, trace_weight)


def _reported_rows(cm_logits: Tensor, transition: Tensor | None, labels: Tensor) -> Tensor:
    """(B, C, C) [y, j]: q for each label."""
    cm = cm_logits[..., 0, 0].softmax(1)
    rows = cm if transition is None else transition.T @ cm
    return rows.expand(len(labels), -1, -1)


def _mean_trace(cm_logits: Tensor, valid: Tensor, trace_weight: float) -> Tensor:
    trace = cm_logits[..., 0, 0].softmax(1).diagonal(dim1=1, dim2=2).sum(1)
    weight = valid.flatten(1).sum(1).to(trace.dtype)
    return trace_weight * (trace * weight).sum() / weight.sum()


# --- all kinds of an image --------------------------------------------------------------------------------------------


def trusted(seg_logits: Tensor, labels: Tensor, transition: Tensor | None) -> Tensor:
    """Drawings without a matrix, labels (B, H, W) or (B, K, H, W): cross-entropy, or -log p(not this one)."""
    layers = labels.unbind(1) if labels.ndim == 4 else (labels,)
    log_p = F.log_softmax(seg_logits, 1) if transition is None else None
    p = seg_logits.softmax(1) if transition is not None else None
    total, count = seg_logits.new_zeros(()), seg_logits.new_zeros(())
    for layer in layers:
        valid, index = _known(layer)
        if log_p is not None:
            nll = -log_p.gather(1, index[:, None])[:, 0]
        else:
            assert p is not None
            assert transition is not None
            nll = -(p * _reported(transition, index)).sum(1).clamp_min(TINY).log()
        total, count = total + (nll * valid.to(nll.dtype)).sum(), count + valid.sum()
    return total / count


def trusted_published(seg_logits: Tensor, labels: Tensor, transition: Tensor | None) -> Tensor:
    """In the layout of `published`: p itself as (BHW, C), multiplied with the transition, log, NLL."""
    if labels.ndim == 4:  # one after another, as a loop over layers is written
        counts = torch.stack([(layer != IGNORE).sum() for layer in labels.unbind(1)])
        losses = [trusted_published(seg_logits, layer, transition) for layer in labels.unbind(1)]
        return (torch.stack(losses) * counts).sum() / counts.sum()
    p = seg_logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, seg_logits.shape[1])
    named = p if transition is None else p @ transition
    return F.nll_loss(named.clamp_min(TINY).log(), labels.flatten().long(), ignore_index=IGNORE)


class OfKind(NamedTuple):
    """One kind of drawings as tensors: what a function that is compiled takes."""

    cm_logits: Tensor | None
    labels: Tensor
    transition: Tensor | None
    trace_weight: float


def objective(
    formulation: Formulation, without_matrix: Callable[..., Tensor] = trusted, up: Resize = interpolate
) -> Callable[[Tensor, Sequence[OfKind]], Tensor]:
    """(seg_logits on any grid, kinds) -> the loss: one function, to be compiled as one graph. ``up``: of class logits.

    16-bit logits are converted to float32 first, as under autocast; torch.compile fuses that. In 16 bits throughout it would
    be another computation: the loss is off by 1e-3 then.
    """

    def total(seg_logits: Tensor, kinds: Sequence[OfKind]) -> Tensor:
        logits = up(_wide(seg_logits), kinds[0].labels.shape[-2:])
        loss = logits.new_zeros(())
        for cm_logits, labels, transition, trace_weight in kinds:
            if cm_logits is None:
                loss = loss + without_matrix(logits, labels, transition)
            else:
                field = _wide(cm_logits).expand(len(labels), *[-1] * (cm_logits.ndim - 1))
                loss = loss + formulation(logits, field, labels, transition, trace_weight)
        return loss

    return total


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def likelihoods(cm_logits: Tensor | None, labels: Tensor, transition: Tensor | None, classes: int) -> Tensor:
    """q[j] = p(drawn | j), (B, C, H, W); 1 where nothing is drawn."""
    valid, index = _known(labels)
    if cm_logits is None:
        table = torch.eye(classes, device=labels.device) if transition is None else transition
        q = _reported(table, index)
    else:
        cm = interpolate(_wide(cm_logits), labels.shape[1:]).softmax(1)
        if transition is None:
            q = cm.gather(1, index[:, None, None].expand(-1, 1, classes, -1, -1)).squeeze(1)
        else:
            q = (cm * _reported(transition, index).unsqueeze(2)).sum(1)
    return torch.where(valid[:, None], q, 1.0)
