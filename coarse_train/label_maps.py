"""What a label map may hold, checked where one comes in."""

from __future__ import annotations

import numpy as np

from . import IGNORE


def check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises ValueError naming ``name`` unless ``labels`` are whole numbers, classes from 0 to C - 1 or `IGNORE`."""
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{name}: expected integers, got {labels.dtype}")
    wrong = (labels != IGNORE) & ((labels < 0) | (labels >= num_classes))
    if wrong.any():
        found = np.unique(labels[wrong])[:5].tolist()
        raise ValueError(f"{name}: expected classes from 0 to {num_classes - 1} or {IGNORE}, got {found}")


def check_pair(drawing: np.ndarray, mask: np.ndarray, num_classes: int) -> None:
    """Of one image."""
    if drawing.shape != mask.shape:
        raise ValueError(f"drawing, mask: expected one shape, got {drawing.shape} and {mask.shape}")
    check_labels("drawing", drawing, num_classes)
    check_labels("mask", mask, num_classes)
