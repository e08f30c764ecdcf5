"""The objective of a training step: three streams of annotation, each a mean over its labelled pixels.

    loss = w_p / N_p  sum of -log (A_p p)[y]     + trace_weight tr(A_p)   over positively drawn pixels
         + w_n / N_n  sum of -log (M^T A_n p)[y] + trace_weight tr(A_n)   over all layers of negative drawings
         + w_m / N_m  sum of -log p[y]                                    over pixels with a dense mask

N counts the labelled pixels of the WHOLE optimizer step, over all its forward passes and all ranks, so that how a batch is
cut changes nothing. A is the identity for a stream that is trusted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from coarse_kernels import annotation_nll

from .config import FitConfig
from .data import IGNORE, Sample
from .model import ModelOutput


class Counts(NamedTuple):
    """Labelled pixels of each stream."""

    positive: float
    negative: float
    mask: float


class StepLoss(NamedTuple):
    """``loss`` carries gradient; the negative log-likelihoods are detached: each stream's share of its mean."""

    loss: Tensor
    positive_nll: Tensor
    negative_nll: Tensor
    mask_nll: Tensor


@dataclass(frozen=True)
class Criterion:
    """`__call__` gives this pass's share of the step's loss: over passes and ranks the shares sum to the loss above."""

    config: FitConfig

    def count(self, batch: Sample) -> Tensor:
        """(3,) float64 labelled pixels of `Counts`; 0 for a stream of weight 0, which is thereby left out."""
        maps = (batch.positive, batch.negative, batch.mask)
        weights = (self.config.positive.weight, self.config.negative.weight, self.config.mask_weight)
        counts = [
            (labels != IGNORE).sum(dtype=torch.float64) * (w > 0) for labels, w in zip(maps, weights, strict=True)
        ]
        return torch.stack(counts)

    def __call__(self, output: ModelOutput, batch: Sample, counts: Counts, *, scale: float = 1.0) -> StepLoss:
        """``counts``: of the whole step. ``scale`` multiplies the loss: the number of ranks where gradients are averaged."""
        zero = output.seg_logits.new_zeros((), dtype=torch.float32)
        loss, positive_nll, negative_nll, mask_nll = zero, zero, zero, zero
        positive, negative = self.config.positive, self.config.negative

        def share(
            cm: Tensor | None, labels: Tensor, transition: Tensor | None, count: float, weight: float, trace: float
        ) -> tuple[Tensor, Tensor]:
            out = annotation_nll(
                output.seg_logits,
                cm,
                labels,
                transition,
                trace_weight=trace,
                ignore_index=IGNORE,
                # the weight goes in here rather than onto the result: gradients formed with the loss then have it
                normalizer=count / (weight * scale) if count else 1.0,
                backend=self.config.backend,
            )
            return out.loss, out.nll / (weight * scale)

        # A stream without labels is computed only where a parameter hangs on it: data parallelism waits for its gradient.
        if counts.positive or output.positive_cm is not None:
            part, positive_nll = share(
                output.positive_cm, batch.positive, None, counts.positive, positive.weight, positive.trace_weight
            )
            loss = loss + part
        transition = output.negative_transition()
        if counts.negative or output.negative_cm is not None or transition.requires_grad:
            for layer in batch.negative.unbind(1):
                part, nll = share(
                    output.negative_cm, layer, transition, counts.negative, negative.weight, negative.trace_weight
                )
                loss, negative_nll = loss + part, negative_nll + nll
        if counts.mask:
            part, mask_nll = share(None, batch.mask, None, counts.mask, self.config.mask_weight, 0.0)
            loss = loss + part
        if not loss.requires_grad:  # crops without a single label: 0, with gradients of 0
            loss, _ = share(None, torch.full_like(batch.mask, IGNORE), None, 0.0, 1.0, 0.0)
        return StepLoss(loss, positive_nll, negative_nll, mask_nll)
