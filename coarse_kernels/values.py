"""Checks that look at values, where they can be had at once: on a CPU, outside of a trace. Elsewhere everything passes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import notices, wrapped
from .problem import Drawings, Problem

Names = Callable[[str], str]  # part of Drawings -> what the caller's user knows it as


def _to_read(tensor: Any) -> Tensor | None:
    """The tensor whose values are looked at: on the CPU in eager mode; elsewhere that would wait for the device or break the
    graph. COARSE_KERNELS_DEBUG=1 looks at them on every device.
    """
    if not isinstance(tensor, Tensor):
        return None
    tensor = wrapped.underneath(tensor)
    if not wrapped.readable(tensor):
        return None
    return tensor if tensor.device.type == "cpu" or os.environ.get("COARSE_KERNELS_DEBUG") == "1" else None


def check_values(
    seg_logits: Tensor, drawings: Drawings, ignore_index: int, name: Names, complementary: bool, dtype: torch.dtype
) -> None:
    if torch.compiler.is_compiling():
        return
    limits = torch.finfo(dtype)
    classes = seg_logits.shape[1]
    labels, normalizer, transition = map(_to_read, (drawings.labels, drawings.normalizer, drawings.transition))
    if drawings.cm_logits is not None:
        notices.look_at_matrices(name("cm_logits"), drawings.cm_logits)
    with wrapped.unseen(), torch.no_grad():
        if transition is not None:
            check_probabilities(name("transition"), transition, complementary)
        if normalizer is not None:
            value = normalizer.item()
            if not 0 <= value < math.inf:
                raise ValueError(f"{name('normalizer')}: expected a finite number >= 0, got {value}")
            check_reciprocal(name("normalizer"), value)
        if labels is None:
            return
        _check_label_range(name("labels"), labels, classes, ignore_index)
        _look_for_one_hot(name("labels"), labels, classes)
        labelled: Tensor | None = None
        for part in ("class_weight", "pixel_weight"):
            weight = _to_read(getattr(drawings, part))
            if weight is None or not _may_be_bad(weight, limits.max):
                continue
            if labelled is None:
                labelled = _labelled(labels, ignore_index)
            of_labels = weight[labels[labelled].long()] if part == "class_weight" else weight[labelled]
            bad = of_labels[~((of_labels >= 0) & (of_labels <= limits.max))]
            if bad.numel():
                raise ValueError(
                    f"{name(part)}: expected finite numbers >= 0 of {dtype} where there is a label, got {bad[0].item()}"
                )


def _look_for_one_hot(name: str, labels: Tensor, classes: int) -> None:
    """Warn where what are taken for C layers of labels is one label a pixel, one-hot: a loss comes out, and another one."""
    if labels.shape[1] != classes or labels.numel() == 0:
        return
    first = labels[:1]  # an image tells
    if first.max().item() == 1 and bool((first.sum(1) == 1).all()):
        notices.warn(
            f"{name}: expected class numbers, got as many layers as there are classes ({classes}), of 0 and 1 that sum to 1 at "
            "every pixel. If they are one-hot, labels.argmax(1) is what is meant."
        )


def _labelled(labels: Tensor, ignore_index: int) -> Tensor:
    """Of labels that are in range or ignored."""
    if labels.dtype == torch.uint8 and not 0 <= ignore_index <= 255:  # would wrap: -100 is 156
        return torch.ones_like(labels, dtype=torch.bool)
    return labels != ignore_index


def _may_be_bad(weight: Tensor, most: float) -> bool:
    """In one pass and without a temporary: whether any, labelled or not, is negative, above ``most`` or NaN."""
    if weight.numel() == 0:
        return False
    smallest, largest = weight.aminmax()
    return not (smallest.item() >= 0 and largest.item() <= most)


# Of a row's sum: 16 bits round each entry by up to 2^-9 of it.
_ROW_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.bfloat16: 2e-2, torch.float16: 1e-2}


def check_probabilities(name: str, matrix: Tensor, complementary: bool) -> None:
    matrix = matrix.detach()
    if not bool((matrix >= 0).all()) or not bool(matrix.isfinite().all()):
        raise ValueError(
            f"{name}: expected finite entries >= 0, got entries from {matrix.min().item()} to {matrix.max().item()}"
        )
    if complementary and bool((matrix.diagonal() != 0).any()):
        raise ValueError(
            f"{name}: a negative drawing never names its own class, expected a zero diagonal, "
            f"got {matrix.diagonal().tolist()}"
        )
    rows = matrix.double().sum(1)
    if bool(((rows - 1.0).abs() > _ROW_TOLERANCE[matrix.dtype]).any()):
        raise ValueError(
            f"{name}: row i holds the probabilities of what class i is reported as, expected rows that sum to 1, "
            f"got row sums {[round(row, 6) for row in rows.tolist()]}"
        )


def _check_label_range(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    from . import native  # the fused scan where it is built: one pass and no temporary

    bad = native.first_bad_label(labels, classes, ignore_index)
    if bad is not None:
        raise ValueError(f"{name}: expected labels in [0, {classes}) or ignore_index {ignore_index}, got {bad}")


def check_counts(problem: Problem, counts: Sequence[Tensor]) -> None:
    """That means can be divided by the summed weights of the labelled pixels, where they are."""
    if torch.compiler.is_compiling():
        return
    for k, (drawings, count) in enumerate(zip(problem.drawings, counts, strict=True)):
        if drawings.normalizer is not None or (drawings.class_weight is None and drawings.pixel_weight is None):
            continue  # not asked for, or a number of pixels
        known = _to_read(count)
        if known is None:
            continue
        with wrapped.unseen():
            value = known.item()
        limits = torch.finfo(count.dtype)
        if 0 < value < limits.tiny or not value <= limits.max:
            which = "" if len(counts) == 1 else f"drawings[{k}]."
            raise ValueError(
                f"{which}class_weight, {which}pixel_weight: expected weights that sum up to 0, or to a number from "
                f"{limits.tiny:.2g} to {limits.max:.2g} ({count.dtype}), over the labelled pixels, got {value}"
            )


def check_reciprocal(name: str, number: float) -> None:
    """0 is what batches without labels have summed up to, and their mean is 0."""
    least = torch.finfo(torch.float32).tiny
    if 0 < number < least:
        raise ValueError(f"{name}: expected 0 or a number >= {least}, whose reciprocal float32 holds, got {number}")
