"""The definition: plain PyTorch, any device, any order of derivative. Read this to know what the kernels compute.

Everything is in log space, so it needs no epsilon; it materialises the C x C field at pixel resolution, which is what
the other backends exist to avoid.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import Stream

_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


def interpolate(field: Tensor, size: tuple[int, ...] | torch.Size) -> Tensor:
    """(B, K, *G) -> (B, K, *S), linear, align_corners=False; the field itself where G = S."""
    if tuple(field.shape[2:]) == tuple(size):
        return field
    if all(points == 1 for points in field.shape[2:]):
        return field.expand(*field.shape[:2], *size)  # F.interpolate would make NaN of -inf, as 0 * -inf
    return F.interpolate(field, size=tuple(size), mode=_MODES[len(size)], align_corners=False)


def label_weights(stream: Stream) -> Tensor:
    """(B, *S) weight of each pixel: class_weight[label] * pixel_weight, 0 where there is no label."""
    valid = stream.labelled
    # where, not products: the weight of an unlabelled pixel, or of a class that nobody drew, may be inf or NaN
    weight = valid.to(stream.compute_dtype)
    if stream.class_weight is not None:
        labels = torch.where(valid, stream.labels, 0).long()
        weight = torch.where(valid, stream.class_weight.detach().to(weight.dtype)[labels], 0.0)
    if stream.pixel_weight is not None:
        weight = torch.where(valid, weight * stream.pixel_weight.detach().to(weight.dtype), 0.0)
    return weight


class _Pixels:
    """The per-pixel quantities of the module `functional`, (B, C, *S) and (B, *S). Unlabelled pixels: label 0, logits 0.

    Their logits are replaced, not masked afterwards, so that a NaN there reaches neither the sums nor the gradients.
    """

    def __init__(self, stream: Stream):
        size, dtype, classes = stream.labels.shape[1:], stream.compute_dtype, stream.num_classes
        valid = stream.labelled
        labels = torch.where(valid, stream.labels, 0).long()
        seg = interpolate(stream.seg_logits.to(dtype), size)
        log_p = F.log_softmax(torch.where(valid.unsqueeze(1), seg, 0.0), dim=1)
        reported = None  # T[i, y], (B, C, *S)
        if stream.transition is not None:
            reported = stream.transition.to(dtype)[:, labels].movedim(0, 1)

        if stream.cm_logits is None:  # A = I: q[j] = T[j, y]
            self.trace = torch.zeros_like(log_p[:, 0])
            if reported is None:
                reported = F.one_hot(labels, classes).movedim(-1, 1).to(dtype)
            self.log_joint = log_p + reported.detach().log()
            self.nll = -_log_weighted_sum(reported, log_p, 1)
            return
        cm = interpolate(stream.cm_logits.to(dtype).flatten(1, 2), size).unflatten(1, (classes, classes))
        log_a = F.log_softmax(torch.where(valid[:, None, None], cm, 0.0), dim=1)  # (B, C observed, C true, *S)
        self.trace = log_a.diagonal(dim1=1, dim2=2).exp().sum(-1)
        if reported is None:
            index = labels[:, None, None].expand(-1, 1, classes, *size)
            self.log_joint = log_p + log_a.gather(1, index).squeeze(1)
        else:
            with torch.no_grad():
                self.log_joint = log_p + _log_weighted_sum(reported.unsqueeze(2), log_a, 1)
        # A label that no class can explain: loss inf and gradient 0, not NaN.
        possible = _possible(self.log_joint)
        if reported is None:
            nll = -torch.logsumexp(torch.where(possible, self.log_joint, 0.0), dim=1)
        else:
            # over observed and true classes at once: a column with q[j] = 0 has a gradient at T[i, y] all the same
            each = reported.unsqueeze(2).expand_as(log_a).flatten(1, 2)
            nll = -_log_weighted_sum(each, (log_p.unsqueeze(1) + log_a).flatten(1, 2), 1)
        self.nll = torch.where(possible.squeeze(1), nll, math.inf)
        self.trace = torch.where(possible.squeeze(1), self.trace, self.trace.detach())


def _possible(log_joint: Tensor) -> Tensor:
    """(B, 1, *S): some class explains the label. NaN counts as possible, so that it is seen in the loss."""
    return ((log_joint > -math.inf) | log_joint.isnan()).any(1, keepdim=True)


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

    def unsupported(self, stream: Stream) -> str | None:
        return None

    def labelled_weight(self, stream: Stream) -> Tensor:
        weight = label_weights(stream)
        if stream.reduction == "none":
            return weight
        return weight.sum(dtype=torch.float64).to(weight.dtype)

    def nll_map(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        pixels = _Pixels(stream)
        weight = label_weights(stream)
        weighs = weight != 0  # 0 * inf is not 0
        nll = torch.where(weighs, weight * torch.where(weighs, pixels.nll, 0.0), 0.0)
        trace = torch.where(weighs, weight * torch.where(weighs, pixels.trace, 0.0), 0.0)
        loss = nll + stream.trace_weight * trace
        return loss, nll.detach(), trace.detach()

    def nll_sum(self, stream: Stream, scale: Tensor | None, loss_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll, trace = (term.sum() for term in self.nll_map(stream))
        if scale is not None:
            loss, nll, trace = (torch.where(scale == 0, 0.0, term) * scale for term in (loss, nll, trace))
        # a weight of 0 counts for nothing, even if the sum is inf
        return torch.where(loss.isinf(), 0.0, loss) * 0.0 if loss_scale == 0 else loss * loss_scale, nll, trace

    def posterior(self, stream: Stream) -> Tensor:
        log_joint = _Pixels(stream).log_joint
        seg = interpolate(stream.seg_logits.to(stream.compute_dtype), stream.labels.shape[1:])
        labelled = stream.labelled.unsqueeze(1)
        posterior = torch.where(labelled & _possible(log_joint), F.softmax(log_joint, 1), F.softmax(seg, 1))
        return posterior.to(stream.seg_logits.dtype)


BACKEND = ReferenceBackend()
