"""The definition: plain PyTorch, any device, any order of derivative. Read this to know what the kernels compute.

Everything is in log space, so it needs no epsilon; it materialises the C x C field at pixel resolution, which is what
the other backends exist to avoid.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Drawings, Problem, compute_dtype

Terms = tuple[Tensor, Tensor, Tensor]  # loss, nll, trace

logger = logging.getLogger("coarse_kernels")
_warned = False

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolate(field: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """(B, K, *G) -> (B, K, *S), linear, align_corners=False; the field itself where G = S.

    -inf is exact there, and for a field of one point. On a grid between, all that read it become NaN, those that read it with
    weight 0 (beside it along an axis as long as the pixels') included: `F.interpolate` has it so. Kernels that do not read
    a neighbour of weight 0 are exact along such an axis; nobody should count on either.
    """
    if tuple(field.shape[2:]) == tuple(size):
        return field
    if all(points == 1 for points in field.shape[2:]):
        return field.expand(*field.shape[:2], *size)  # F.interpolate would make NaN of -inf, as 0 * -inf
    if (
        torch.is_grad_enabled()
        and field.requires_grad
        and torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
    ):
        _warn_of_lost_gradients()
    if field.dtype == torch.float64:
        for axis, pixels in enumerate(size, start=2):
            # A coordinate is ((2 i + 1) G / S - 1) / 2, at least 1 / (2 S) below the next point; that is more than half a
            # step of float32 there while G S <= 2^23.
            if field.shape[axis] != pixels and field.shape[axis] * pixels > 1 << 23:
                field = _interpolate_axis(field, axis, pixels)
        if tuple(field.shape[2:]) == tuple(size):
            return field
    return F.interpolate(field, size=tuple(size), mode=_MODES[len(size)], align_corners=False)


def _interpolate_axis(field: Tensor, axis: int, pixels: int) -> Tensor:
    """Of float64, exactly: PyTorch (2.13) takes `floorf` of a coordinate in double, which far out on an axis rounds one just
    below a point up to it, and is off by up to 2e-4 of a point."""
    points = field.shape[axis]
    # times 2 S, so that nothing is rounded
    position = ((2 * torch.arange(pixels, device=field.device) + 1) * points - pixels).clamp(min=0)
    low = torch.div(position, 2 * pixels, rounding_mode="floor")
    weight = (position - low * 2 * pixels).to(field.dtype) / (2 * pixels)
    weight = weight.reshape(-1, *(1,) * (field.dim() - 1 - axis))
    high = (low + 1).clamp(max=points - 1)
    return field.index_select(axis, low) * (1 - weight) + field.index_select(axis, high) * weight


def _warn_of_lost_gradients() -> bool:
    """Once. Inductor before torch 2.14 may fuse what reads the gradient of an interpolation ahead of what adds it up."""
    global _warned
    if not _warned and torch.torch_version.TorchVersion(torch.__version__) < "2.14.0a0":
        _warned = True
        logger.warning(
            "backend 'reference' interpolates in a compiled function: if the compiler is Inductor of torch %s, a network ahead "
            "of it may get zeros for gradients (pytorch/pytorch#185509, mended in 2.14); the other backends interpolate within "
            "themselves, an interpolation of your network is as exposed",
            torch.__version__,
        )
    return True


# torch.compile calls it while it traces, instead of tracing it.
_warn_of_lost_gradients._dynamo_marked_constant = True  # type: ignore[attr-defined]


def label_weights(problem: Problem, drawings: Drawings) -> Tensor:
    """(B, K, *S) weight of each label: class_weight[label] * pixel_weight, 0 where there is none."""
    valid = problem.labelled(drawings)
    # where, not products: the weight of an unlabelled pixel, or of a class that nobody drew, may be inf or NaN
    weight = valid.to(problem.compute_dtype)
    if drawings.class_weight is not None:
        labels = torch.where(valid, drawings.labels, 0).long()
        weight = torch.where(valid, drawings.class_weight.detach().to(weight.dtype)[labels], 0.0)
    if drawings.pixel_weight is not None:
        weight = torch.where(valid, weight * drawings.pixel_weight.detach().to(weight.dtype), 0.0)
    return weight


class _Pixels:
    """The per-pixel quantities of the module `functional` for one layer of drawings, (B, C, *S) and (B, *S). Where not
    ``counts`` (B, K, *S), of unlabelled pixels: label 0, logits 0.

    Their logits are replaced, not masked afterwards, so that a NaN there reaches neither the sums nor the gradients.
    """

    def __init__(self, problem: Problem, drawings: Drawings, layer: int, counts: Tensor):
        size, dtype, classes = problem.size, problem.compute_dtype, problem.num_classes
        valid = counts[:, layer]
        labels = torch.where(valid, drawings.labels[:, layer], 0).long()
        seg = interpolate(problem.seg_logits.to(dtype), size)
        log_p = F.log_softmax(torch.where(valid.unsqueeze(1), seg, 0.0), dim=1)
        reported = None  # T[i, y], (B, C, *S)
        if drawings.transition is not None:
            reported = drawings.transition.to(dtype)[:, labels].movedim(0, 1)

        if drawings.cm_logits is None:  # A = I: q[j] = T[j, y]
            self.trace = torch.zeros_like(log_p[:, 0])
            if reported is None:
                # not F.one_hot, which looks at the values of its labels: vmap knows no such thing
                one_of = torch.arange(classes, device=labels.device).view(classes, *[1] * len(size))
                reported = (labels.unsqueeze(1) == one_of).to(dtype)
            with torch.no_grad():
                self.log_q = _log(reported)
            self.nll = -_log_weighted_sum(reported, log_p, 1)
            return
        cm = interpolate(drawings.cm_logits.to(dtype).flatten(1, 2), size).unflatten(1, (classes, classes))
        log_a = F.log_softmax(torch.where(valid[:, None, None], cm, 0.0), dim=1)  # (B, C observed, C true, *S)
        self.trace = log_a.diagonal(dim1=1, dim2=2).exp().sum(-1)
        if reported is None:
            index = labels[:, None, None].expand(-1, 1, classes, *size)
            self.log_q = log_a.gather(1, index).squeeze(1)
        else:
            with torch.no_grad():
                self.log_q = _log_weighted_sum(reported.unsqueeze(2), log_a, 1)
        # A label that no class can explain: loss inf and gradient 0, not NaN.
        log_joint = log_p + self.log_q
        possible = _possible(log_joint)
        if reported is None:
            nll = -torch.logsumexp(torch.where(possible, log_joint, 0.0), dim=1)
        else:
            # over observed and true classes at once: a column with q[j] = 0 has a gradient at T[i, y] all the same
            each = reported.unsqueeze(2).expand_as(log_a).flatten(1, 2)
            nll = -_log_weighted_sum(each, (log_p.unsqueeze(1) + log_a).flatten(1, 2), 1)
        self.nll = torch.where(possible.squeeze(1), nll, math.inf)
        self.trace = torch.where(possible.squeeze(1), self.trace, self.trace.detach())


def _possible(log_joint: Tensor) -> Tensor:
    """(B, 1, *S): some class explains the label. NaN counts as possible, so that it is seen in the loss."""
    return ((log_joint > -math.inf) | log_joint.isnan()).any(1, keepdim=True)


def _log(weight: Tensor) -> Tensor:
    """-inf with zero derivative where the weight is 0."""
    return torch.where(weight == 0, -math.inf, torch.where(weight == 0, 1.0, weight).log())


def _log_weighted_sum(weight: Tensor, log_x: Tensor, dim: int) -> Tensor:
    """log sum weight * exp(log_x) over ``dim``; -inf, with zero gradient, where no weight is positive.

    A transition may hold zeros and may want a gradient, so log(weight) is out of the question: the terms are shifted by
    the largest one that counts.
    """
    shift = torch.where(weight > 0, log_x, -math.inf).amax(dim, keepdim=True).detach()
    shift = torch.where(shift == -math.inf, 0.0, shift)
    # Above 0 only where the weight is 0; the bound keeps 0 * inf out of the sum.
    bound = 0.9 * math.log(torch.finfo(log_x.dtype).max)
    total = (weight * (log_x - shift).clamp_max(bound).exp()).sum(dim)
    return torch.where(total == 0, -math.inf, torch.where(total == 0, 1.0, total).log() + shift.squeeze(dim))


class ReferenceBackend:
    name = "reference"
    device_types: tuple[str, ...] = ()

    def unavailable(self) -> str | None:
        return None

    def unsupported(self, problem: Problem) -> str | None:
        return None

    def unsupported_tensor(self, tensor: Tensor) -> str | None:
        return None

    def kernels(self, problem: Problem) -> list[str]:
        return ["plain PyTorch at pixel resolution"] * len(problem.drawings)

    def labelled_weight(self, problem: Problem, drawings: Drawings) -> Tensor:
        weight = label_weights(problem, drawings)
        if problem.reduction == "none":
            return weight
        return weight.sum(dtype=torch.float64).to(weight.dtype)

    def nll_maps(self, problem: Problem) -> tuple[Terms, ...]:
        return tuple(self._maps(problem, drawings) for drawings in problem.drawings)

    def _maps(self, problem: Problem, drawings: Drawings) -> Terms:
        weight = label_weights(problem, drawings)
        weighs = weight != 0  # 0 * inf is not 0, nor 0 * NaN
        layers = [_Pixels(problem, drawings, layer, weighs) for layer in range(drawings.labels.shape[1])]

        # without a layer there is nothing to sum, but a gradient all the same: zeros
        inputs = (problem.seg_logits, drawings.cm_logits, drawings.transition)
        nothing = [weight, *(t[:0].sum().to(weight.dtype) for t in inputs if t is not None and not layers)]

        def weighted(terms: list[Tensor]) -> Tensor:
            stacked = torch.stack(terms, 1) if terms else sum(nothing)
            return torch.where(weighs, weight * torch.where(weighs, stacked, 0.0), 0.0)

        nll, trace = weighted([pixels.nll for pixels in layers]), weighted([pixels.trace for pixels in layers])
        return nll + drawings.trace_weight * trace, nll.detach(), trace.detach()

    def nll_sums(self, problem: Problem, scales: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Terms, ...]]:
        total: Tensor | None = None
        parts: list[Terms] = []
        for drawings, scale in zip(problem.drawings, scales, strict=True):
            loss, nll, trace = (term.sum() for term in self._maps(problem, drawings))
            if scale is not None:
                loss, nll, trace = (torch.where(scale == 0, 0.0, term) * scale for term in (loss, nll, trace))
            # a weight of 0 counts for nothing, even if the sum is inf or NaN
            own = (torch.where(loss.isfinite(), loss, 0.0) if drawings.weight == 0 else loss) * drawings.weight
            total = own if total is None else total + own
            parts.append((loss, nll, trace))
        assert total is not None  # there is at least one kind
        return total, tuple(parts)

    def posterior(self, problem: Problem) -> Tensor:
        seg = interpolate(problem.seg_logits.to(problem.compute_dtype), problem.size)
        joint = F.log_softmax(seg, 1)
        drawn = torch.zeros_like(joint[:, :1], dtype=torch.bool)
        for drawings in problem.drawings:
            valid = problem.labelled(drawings)
            for layer in range(drawings.labels.shape[1]):
                labelled = valid[:, layer].unsqueeze(1)
                joint = joint + torch.where(labelled, _Pixels(problem, drawings, layer, valid).log_q, 0.0)
                drawn = drawn | labelled
        posterior = torch.where(drawn & _possible(joint), F.softmax(joint, 1), F.softmax(seg, 1))
        return posterior.to(problem.seg_logits.dtype)

    def label_map(self, seg_logits: Tensor, size: tuple[int, ...]) -> Tensor:
        labels = interpolate(seg_logits.to(compute_dtype(seg_logits)), size).argmax(1)
        return labels.to(torch.uint8) if seg_logits.shape[1] <= 256 else labels


BACKEND = ReferenceBackend()
