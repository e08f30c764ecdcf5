"""Transition matrices T (C, C): entry [i, y] is the probability that a pixel of class i is reported with label y.

Negative ("this region is not y") drawings have a zero diagonal and rows that sum to 1 (complementary labels, Yu et al.,
ECCV 2018).
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, wrapped


def uniform_transition(
    num_classes: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """(C, C) with zero diagonal and ``1 / (C - 1)`` elsewhere: every class but the true one is as likely to be named.

    Args:
        num_classes: C >= 2.
        device, dtype: of the result; a float dtype.

    Raises:
        ValueError: C is no integer from 2 on. TypeError: dtype is no float.
    """
    num_classes = checks.check_classes(num_classes)
    if dtype not in checks.FLOAT_DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    off_diagonal = 1.0 - torch.eye(num_classes, device=device, dtype=dtype)
    return off_diagonal / (num_classes - 1)


def estimate_transition(
    positive_labels: Tensor,
    negative_labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = 255,
    smoothing: float = 1.0,
) -> Tensor:
    """Transition of the negative drawings, from where positive and negative drawings meet::

        M[i, y] = (n[i, y] + smoothing) / sum over z != i of (n[i, z] + smoothing),   M[i, i] = 0

    with n[i, y] the number of pixels that are drawn as i in ``positive_labels`` and as "not y" in ``negative_labels``.
    The positive drawing stands in for the true class, so its own confusions leak into M; pixels where the two
    contradict each other (y = i) are left out.

    Args:
        positive_labels, negative_labels: integer tensors of one shape, any rank; ``ignore_index`` where nothing is drawn.
        num_classes: C >= 2.
        smoothing: pseudo-count per off-diagonal entry, >= 0; a row with no count at all is uniform.

    Returns:
        (C, C) float32 on the device of the labels.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    for name, labels in (("positive_labels", positive_labels), ("negative_labels", negative_labels)):
        checks.check_tensor(name, labels)
        if labels.dtype not in checks.INT_DTYPES:
            raise TypeError(f"{name}: expected an integer tensor (uint8 or signed), got {labels.dtype}")
    if positive_labels.shape != negative_labels.shape:
        raise ValueError(
            f"negative_labels: expected the shape of positive_labels {tuple(positive_labels.shape)}, "
            f"got {tuple(negative_labels.shape)}"
        )
    if positive_labels.device != negative_labels.device:
        raise ValueError(
            f"negative_labels: expected on {positive_labels.device}, where positive_labels is, got {negative_labels.device}"
        )
    num_classes, ignore_index = checks.check_classes(num_classes), checks.check_ignore_index(ignore_index)
    checks.check_weight("smoothing", smoothing, torch.float32)
    fallback = uniform_transition(num_classes, device=positive_labels.device)
    # 255 must not wrap in int8
    positive_labels, negative_labels = (wrapped.plain(labels).long() for labels in (positive_labels, negative_labels))
    both = (positive_labels != ignore_index) & (negative_labels != ignore_index)
    observed, reported = positive_labels[both], negative_labels[both]
    for name, labels in (("positive_labels", observed), ("negative_labels", reported)):
        if labels.numel() and (labels.min() < 0 or labels.max() >= num_classes):
            raise ValueError(
                f"{name}: expected labels in [0, {num_classes}) or ignore_index {ignore_index}, "
                f"got labels from {labels.min().item()} to {labels.max().item()}"
            )
    counts = torch.bincount(observed * num_classes + reported, minlength=num_classes**2)
    counts = (counts.reshape(num_classes, num_classes).to(torch.float64) + float(smoothing)).fill_diagonal_(0.0)
    total = counts.sum(1, keepdim=True)
    estimate = torch.where(total > 0, counts / torch.where(total > 0, total, 1.0), fallback.to(torch.float64))
    return estimate.to(torch.float32)
