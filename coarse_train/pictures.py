"""Pictures of a run for tensorboard: what the networks make of a training image and its drawings."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from coarse_kernels import Drawings, annotation_posterior, label_map

from .data import IGNORE
from .data.segmentation import SegmentationData
from .model import CoarseModel, ModelOutput, mean_confusion
from .run import RunLog

_CELL = 16  # pixels per entry of a confusion matrix


@torch.no_grad()
def draw_progress(
    log: RunLog, model: CoarseModel, dataset: SegmentationData, step: int, device: torch.device, backend: str | None
) -> None:
    """The first training image: image, drawings, prediction and posterior side by side, and the confusion matrices."""
    model.eval()
    sample = dataset[0]
    output = model(sample.image[None].to(device))
    prediction = label_map(output.seg_logits, sample.image.shape[1:], backend=backend)
    believed = posterior(output, sample.positive[None].to(device), sample.negative[None].to(device), backend).argmax(1)
    paint = dataset.source.classes.paint
    image = (sample.image.movedim(0, -1).expand(-1, -1, 3) * 255).byte().numpy()
    maps = [sample.positive, sample.negative[0], prediction[0].cpu(), believed[0].byte().cpu()]
    panels = [image, *(paint(labels.numpy()) for labels in maps)]
    log.picture("image, positive, negative, prediction, posterior", np.concatenate(panels, axis=1), step)
    if output.positive_cm is not None:
        log.picture("confusion of positives [drawn, true]", grey(mean_confusion(output, "positive")), step)
    if output.negative_cm is not None:
        log.picture("confusion of negatives [drawn, true]", grey(mean_confusion(output, "negative")), step)


def posterior(output: ModelOutput, positive: Tensor, negative: Tensor, backend: str | None = None) -> Tensor:
    """(B, C, H, W) p(true class | image, all its drawings).

    Args: positive (B, H, W), negative (B, K, H, W) uint8.
    """
    drawings = [
        Drawings(positive, output.positive_cm),
        Drawings(negative, output.negative_cm, output.negative_transition()),
    ]
    return annotation_posterior(output.seg_logits.float(), drawings, ignore_index=IGNORE, backend=backend)


def grey(matrix: Tensor) -> np.ndarray:
    """(C, C) probabilities -> (C * cell, C * cell, 3) uint8, black is 1."""
    values = (255 * (1 - matrix.clamp(0, 1))).byte().cpu().numpy()
    return np.repeat(np.repeat(values, _CELL, 0), _CELL, 1)[..., None].repeat(3, 2)
