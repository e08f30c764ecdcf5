"""Segmentation scores from a confusion matrix that is counted batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor


class ConfusionMeter:
    """Counts [true, predicted] over batches; unlabelled pixels (``ignore_index``) count nowhere."""

    def __init__(self, num_classes: int, *, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, mask: Tensor) -> None:
        """``predicted`` and ``mask``: integer classes of one shape, any rank."""
        if predicted.shape != mask.shape:
            raise ValueError(f"predicted: expected the shape of mask {tuple(mask.shape)}, got {tuple(predicted.shape)}")
        labelled = mask != self.ignore_index
        pairs = mask[labelled].long() * self.num_classes + predicted[labelled].long()
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts).to(self.counts.device)

    def iou(self) -> Tensor:
        """(C,) float64 intersection over union; NaN for a class that is neither in the masks nor predicted."""
        counts = self.counts.double()
        hit = counts.diagonal()
        return hit / (counts.sum(0) + counts.sum(1) - hit)

    def mean_iou(self) -> float:
        """Mean IoU in percent over the classes that occur, background included."""
        return 100.0 * float(self.iou().nanmean())
