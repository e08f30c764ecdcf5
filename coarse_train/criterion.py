"""The objective of a training step: three kinds of drawings, each a mean over its labelled pixels.

    loss = w_p / N_p  sum of -log (A_p p)[y]     + trace_weight tr(A_p)   over positively drawn pixels
         + w_n / N_n  sum of -log (M^T A_n p)[y] + trace_weight tr(A_n)   over all layers of negative drawings
         + w_m / N_m  sum of -log p[y]                                    over pixels with a dense mask

N counts the labelled pixels of the WHOLE optimizer step, over all its forward passes and all ranks, so that how a batch is
cut changes nothing. A is the identity for a kind that is trusted. All kinds are one call of `annotation_objective`: they
share p, which is formed once, at the resolution of the drawings from logits that may be coarser.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from coarse_kernels import Drawings, TransitionMatrix, annotation_objective, uniform_transition

from .config import FitConfig
from .data import IGNORE, Sample, Source
from .data.segmentation import SegmentationData, plain
from .model import ModelOutput

_TRANSITION_IMAGES = 200  # enough for C x C counts: 35 million pixels of CamVid


class Counts(NamedTuple):
    """Labelled pixels of each kind of drawings."""

    positive: float
    negative: float
    mask: float


class StepLoss(NamedTuple):
    """``loss`` carries gradient; the negative log-likelihoods are detached: each kind's share of its mean."""

    loss: Tensor
    positive_nll: Tensor
    negative_nll: Tensor
    mask_nll: Tensor


@dataclass(frozen=True)
class Criterion:
    """`__call__` gives this pass's share of the step's loss: over passes and ranks the shares sum to the loss above."""

    config: FitConfig

    def count(self, batch: Sample) -> Tensor:
        """(3,) float64 labelled pixels of `Counts`; 0 for a kind of weight 0, which is thereby left out."""
        maps = (batch.positive, batch.negative, batch.mask)
        weights = (self.config.positive.weight, self.config.negative.weight, self.config.mask_weight)
        counts = [
            (labels != IGNORE).sum(dtype=torch.float64) * (w > 0) for labels, w in zip(maps, weights, strict=True)
        ]
        return torch.stack(counts)

    def __call__(self, output: ModelOutput, batch: Sample, counts: Counts, *, scale: float = 1.0) -> StepLoss:
        """``counts``: of the whole step. ``scale`` multiplies the loss: the number of ranks where gradients are averaged."""
        positive, negative = self.config.positive, self.config.negative
        transition = output.negative_transition()
        kinds = {
            "positive": Drawings(
                batch.positive, output.positive_cm, weight=positive.weight, trace_weight=positive.trace_weight
            ),
            "negative": Drawings(
                batch.negative,
                output.negative_cm,
                transition,
                weight=negative.weight,
                trace_weight=negative.trace_weight,
            ),
            "mask": Drawings(batch.mask, weight=self.config.mask_weight),
        }
        # A kind without labels is given only where a parameter hangs on it: data parallelism waits for its gradient.
        awaited = {
            "positive": output.positive_cm is not None,
            "negative": output.negative_cm is not None or transition.requires_grad,
            "mask": False,
        }
        given = {
            name: replace(kinds[name], weight=kinds[name].weight * scale, normalizer=count or 1.0)
            for name, count in counts._asdict().items()
            if count or awaited[name]
        }
        if not given:  # crops without a single label: 0, with gradients of 0
            given["mask"] = Drawings(torch.full_like(batch.mask, IGNORE))
        loss, parts = annotation_objective(
            output.seg_logits, list(given.values()), ignore_index=IGNORE, backend=self.config.backend
        )
        nll = {name: part.nll for name, part in zip(given, parts, strict=True)}
        # a kind of weight 0 may have labels and a matrix: its nll is a share of no mean
        shares = (nll[name] if count else loss.new_zeros(()) for name, count in counts._asdict().items())
        return StepLoss(loss, *shares)


def open_transition(config: FitConfig, source: Source) -> TransitionMatrix:
    """(C, C) [true, named], as the config says."""
    classes = len(source.classes)
    kind = config.transition
    if isinstance(kind, Path):
        try:
            values = np.load(kind, allow_pickle=False)
            if values.dtype.kind not in "fiub":
                raise TypeError(f"dtype {values.dtype}")
            matrix = torch.from_numpy(values.astype(np.float32))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"transition: expected a .npy file with a ({classes}, {classes}) matrix, got {kind} ({error})"
            ) from error
        if matrix.shape != (classes, classes):
            raise ValueError(f"transition: expected shape ({classes}, {classes}), got {tuple(matrix.shape)} in {kind}")
        try:
            return TransitionMatrix.fixed(matrix)
        except ValueError as error:
            raise ValueError(f"transition: {kind}: {error}") from error
    if kind == "objects":
        if classes < 3:
            raise ValueError(f"transition: expected at least 3 classes for objects, got {classes}")
        matrix = uniform_transition(classes)
        matrix[:, 0] = 0
        return TransitionMatrix.fixed(matrix / matrix.sum(1, keepdim=True))
    if kind == "learned":
        return TransitionMatrix.learned(classes)
    if kind == "estimated":
        return TransitionMatrix.estimated(*_meeting_labels(config, source), classes, ignore_index=IGNORE)
    return TransitionMatrix.uniform(classes)


def _meeting_labels(config: FitConfig, source: Source) -> tuple[Tensor, Tensor]:
    """Positive and negative labels, (N,) each, of the pixels that have both, in the first training images."""
    dataset = SegmentationData(source, plain(config.data), seed=config.seed, training=True)
    positives, negatives = [], []
    for index in range(min(len(dataset), _TRANSITION_IMAGES)):
        sample = dataset[index]
        for layer in sample.negative:
            both = (sample.positive != IGNORE) & (layer != IGNORE)
            positives.append(sample.positive[both])
            negatives.append(layer[both])
    positive = torch.cat(positives)
    if not len(positive):
        raise ValueError(
            "transition: expected pixels with a positive and a negative drawing to estimate it from, got none"
        )
    return positive, torch.cat(negatives)
