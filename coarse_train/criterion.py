"""The objective of a training step: three kinds of drawings, each a mean over its labelled pixels.

    loss = w_p / N_p  sum of -log (A_p p)[y]     + trace_weight tr(A_p)   over positively drawn pixels
         + w_n / N_n  sum of -log (M^T A_n p)[y] + trace_weight tr(A_n)   over all layers of negative drawings
         + w_m / N_m  sum of -log p[y]                                    over pixels with a dense mask

N counts the labelled pixels of the WHOLE optimizer step, over all its forward passes and all ranks, so that how a batch is
cut changes nothing. A is the identity for a kind that is trusted. With `class_weight` a pixel of a positive drawing or a mask
counts by its class, in the sum and in N. All kinds are one call of `annotation_objective`: they share p, which is formed once,
at the resolution of the drawings from logits that may be coarser.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
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
    """Labelled pixels of each kind of drawings, N of the equations above; with class weights the sum of their weights."""

    positive: float
    negative: float
    mask: float


class StepLoss(NamedTuple):
    """This pass's share of a step's loss; 0-d tensors, float32 (float64 for float64 logits).

    loss: times ``scale``; carries gradient.
    positive_nll, negative_nll, mask_nll: the share of each kind's mean negative log-likelihood, without the kind's weight and
        without its trace; detached. 0 for a kind that counts no pixel.
    """

    loss: Tensor
    positive_nll: Tensor
    negative_nll: Tensor
    mask_nll: Tensor


@dataclass(frozen=True)
class Criterion:
    """``criterion(output, batch, counts)`` gives this pass's share of the step's loss: over passes and ranks the shares sum to
    the loss above.

    config: weights of the kinds, of their traces and masks, and the backend.
    class_weights: "positive" and "mask" -> (C,) float32 weight of each class, of `open_class_weights`; without one all weigh 1.
    """

    config: FitConfig
    class_weights: Mapping[str, Tensor] = field(default_factory=dict)  # of `open_class_weights`

    def count(self, batch: Sample) -> Tensor:
        """(3,) float64 labelled pixels of `Counts` in one batch, by the weights of their classes; 0 for a kind of weight 0,
        which is thereby left out. To be summed over the passes and ranks of a step."""
        maps = {"positive": batch.positive, "negative": batch.negative, "mask": batch.mask}
        weights = (self.config.positive.weight, self.config.negative.weight, self.config.mask_weight)
        return torch.stack([self._labelled(*one) * (w > 0) for one, w in zip(maps.items(), weights, strict=True)])

    def _labelled(self, kind: str, labels: Tensor) -> Tensor:
        if kind not in self.class_weights:
            return (labels != IGNORE).sum(dtype=torch.float64)
        weights = self.class_weights[kind]
        return (torch.bincount(labels.flatten(), minlength=256)[: len(weights)] * weights.double()).sum()

    def __call__(self, output: ModelOutput, batch: Sample, counts: Counts, *, scale: float = 1.0) -> StepLoss:
        """This pass's share of the loss of a step.

        Args:
            output: of the model, for the images of ``batch``.
            batch: positive (B, H, W), negative (B, K, H, W) and mask (B, H, W) uint8; `IGNORE` (255) counts nowhere.
            counts: of the whole step.
            scale: multiplies the loss: the number of ranks where gradients are averaged.

        Raises:
            ValueError, TypeError, RuntimeError: as `coarse_kernels.annotation_nll`.
        """
        positive, negative = self.config.positive, self.config.negative
        transition = output.negative_transition()
        kinds = {
            "positive": Drawings(
                batch.positive,
                output.positive_cm,
                weight=positive.weight,
                trace_weight=positive.trace_weight,
                class_weight=self.class_weights.get("positive"),
            ),
            "negative": Drawings(
                batch.negative,
                output.negative_cm,
                transition,
                weight=negative.weight,
                trace_weight=negative.trace_weight,
            ),
            "mask": Drawings(batch.mask, weight=self.config.mask_weight, class_weight=self.class_weights.get("mask")),
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
    """(C, C) [true, named], as ``config.transition`` says.

    Raises ValueError for a file that has no such matrix, for "objects" with 2 classes, and for "estimated" where no pixel has
    both kinds of drawings.
    """
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


def open_class_weights(config: FitConfig, source: Source, device: torch.device) -> dict[str, Tensor]:
    """Kind -> (C,) float32 weight of each class in its loss, for positive drawings and masks; empty where all weigh the same.

    Balanced: the labelled pixels of a kind, divided by the classes that it has and by those of the class, as in "The balanced
    heuristic" of King and Zeng, "Logistic Regression in Rare Events Data", 2001. A class that was not seen weighs 1.

    Raises ValueError where ``config.class_weight`` has not one number for each class.
    """
    given, classes = config.class_weight, len(source.classes)
    if given is None:
        return {}
    if given != "balanced":
        if len(given) != classes:
            raise ValueError(f"class_weight: expected one number for each of {classes} classes, got {len(given)}")
        return dict.fromkeys(("positive", "mask"), torch.tensor(given, device=device))
    dataset = SegmentationData(source, plain(config.data), seed=config.seed, training=True)
    counts = {kind: np.zeros(classes) for kind in ("positive", "mask")}
    for index in np.linspace(0, len(dataset) - 1, min(len(dataset), _TRANSITION_IMAGES)).astype(int):
        sample = dataset[int(index)]
        for kind, labels in (("positive", sample.positive), ("mask", sample.mask)):
            counts[kind] += np.bincount(labels.flatten(), minlength=256)[:classes]
    weights = {}
    for kind, seen in counts.items():
        share = seen * np.count_nonzero(seen) / max(seen.sum(), 1)
        weights[kind] = torch.tensor(1 / np.where(seen > 0, share, 1), dtype=torch.float32, device=device)
    return weights


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
