"""The six rows of the demo: what each one learns from, and its settings.

    ce_positive      cross-entropy on the positive drawings
    ce_negative      likelihood of the negative drawings, trusted
    ce_both          the sum of the two
    coarse_positive  positive drawings through a confusion matrix that is learned
    coarse_both      the same, with the negative drawings trusted
    supervised       cross-entropy on the true masks

Everything else (network, steps, batches and their order, optimizer, schedule) is the same for all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import coarse_kernels

from ..data import IGNORE, InMemory, Sample
from ..model import AnnotationModel, CoarseModel, Full, GlobalField, PixelField, UNet
from .loop import LossFunction

METHODS = ("ce_positive", "ce_negative", "ce_both", "coarse_positive", "coarse_both", "supervised")
CROSS_ENTROPIES = METHODS[:3]


@dataclass(frozen=True)
class MethodSettings:
    """What is tuned. A field that a method does not use is left alone.

    transition: how a negative drawing is explained. "uniform": it says no more than that y is absent; up to a constant
        this is -log(1 - p[y]). "estimated": from where the two drawings meet. No drawing ever names the background, so
        an object has fewer labels to share its probability and explains each of them better than the background does:
        this pulls towards objects, inside the margin too.
    confusion: "global" or "pixel" (`coarse_train.model.annotation`).
    diagonal, missing: the confusion matrix to start from (`coarse_kernels.confusion_logits`).
    """

    lr: float = 8e-3
    transition: str = "uniform"
    negative_weight: float = 1.0
    confusion: str = "global"
    cm_lr: float = 1e-2
    diagonal: float = 0.7
    missing: float | None = None
    trace_weight: float = 0.0


def build_model(method: str, settings: MethodSettings, num_classes: int, seed: int) -> CoarseModel:
    """Equal seeds give equal segmentation networks, whatever the method."""
    torch.manual_seed(seed)
    segmentation = UNet(1, num_classes)
    if method not in ("coarse_positive", "coarse_both"):
        return CoarseModel(segmentation)
    structure = Full(num_classes, settings.diagonal, settings.missing)
    start = structure.start()
    field = GlobalField(start) if settings.confusion == "global" else PixelField(start, 1, norm="batch")
    return CoarseModel(segmentation, AnnotationModel(field, structure))


def transition_for(kind: str, train_set: InMemory, num_classes: int) -> Tensor:
    """(C, C) [true, named]; reads the drawings only."""
    if kind == "uniform":
        return coarse_kernels.uniform_transition(num_classes)
    if kind == "estimated":
        drawings = train_set.stacked
        return coarse_kernels.estimate_transition(
            drawings.positive, drawings.negative[:, 0], num_classes, ignore_index=IGNORE
        )
    raise ValueError(f"transition: expected 'uniform' or 'estimated', got {kind!r}")


def build_loss(method: str, settings: MethodSettings, transition: Tensor, backend: str | None = None) -> LossFunction:
    """The loss of one row (module docstring). ``backend`` serves the confusion matrices; None: the library chooses."""

    def supervised(seg_logits: Tensor, cm_logits: Tensor | None, batch: Sample) -> Tensor:
        return nn.functional.cross_entropy(seg_logits, batch.mask.long(), ignore_index=IGNORE)

    def ce_positive(seg_logits: Tensor, cm_logits: Tensor | None, batch: Sample) -> Tensor:
        return nn.functional.cross_entropy(seg_logits, batch.positive.long(), ignore_index=IGNORE)

    def ce_negative(seg_logits: Tensor, cm_logits: Tensor | None, batch: Sample) -> Tensor:
        return coarse_kernels.annotation_nll(
            seg_logits, None, batch.negative[:, 0], transition, ignore_index=IGNORE
        ).loss

    def ce_both(seg_logits: Tensor, cm_logits: Tensor | None, batch: Sample) -> Tensor:
        positive = ce_positive(seg_logits, cm_logits, batch)
        return positive + settings.negative_weight * ce_negative(seg_logits, cm_logits, batch)

    def coarse(seg_logits: Tensor, cm_logits: Tensor | None, batch: Sample) -> Tensor:
        return coarse_kernels.coarse_label_loss(
            seg_logits,
            cm_logits,
            batch.positive,
            None,  # A = I: the negative drawings are trusted
            batch.negative[:, 0] if method == "coarse_both" else None,
            transition if method == "coarse_both" else None,
            trace_weight=settings.trace_weight,
            negative_weight=settings.negative_weight,
            ignore_index=IGNORE,
            backend=backend,
        ).loss

    return {
        "ce_positive": ce_positive,
        "ce_negative": ce_negative,
        "ce_both": ce_both,
        "coarse_positive": coarse,
        "coarse_both": coarse,
        "supervised": supervised,
    }[method]


@torch.no_grad()
def estimated_confusion(model: CoarseModel, images: Tensor) -> Tensor:
    """(C, C) p(drawn | true) that the model believes: A[:, j] averaged over the pixels with their p[j]; a global matrix
    is returned as it is. ``images``: (N, 1, H, W)."""
    model.eval()
    weighted, weight = torch.zeros(()), torch.zeros(())
    for image in images.split(64):
        seg_logits, cm_logits, _, _ = model(image)
        assert cm_logits is not None
        p = seg_logits.softmax(1).unsqueeze(1)  # (B, 1, C, H, W)
        weighted = weighted + (cm_logits.softmax(1) * p).sum((0, 3, 4))
        weight = weight + p.sum((0, 3, 4))
    return weighted / weight
