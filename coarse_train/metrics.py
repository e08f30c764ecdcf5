"""Segmentation scores from a confusion matrix that is counted batch by batch.

All are the usual ones, and IoU is that of the official Cityscapes evaluator to the last digit
(tests/test_cityscapes_evaluator.py): a class that is neither in the masks nor predicted has no score and is in no mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import add

import torch
import torch.distributed as dist
from torch import Tensor

_NEARLY_ALL, _NEARLY_NONE = 0.95, 0.05


class ConfusionMeter:
    """Counts [true, predicted] over batches; unlabelled pixels (``ignore_index``) count nowhere, whatever is predicted there.

    A class has ``TP`` pixels that are right, ``FN`` of it that are predicted as another one, and ``FP`` of others that are
    predicted as it. Scores of classes are from 0 to 1, single numbers in percent.

    counts: (C, C) int64, on the device of the last batch.
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255):
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, predicted: Tensor, mask: Tensor) -> Tensor:
        """Count, and return the (C, C) int64 counts of these pixels. On CUDA the host waits, as for any `torch.bincount`.

        Args:
            predicted: integer classes, any shape; anything where the mask is ``ignore_index``.
            mask: the true ones, of the same shape; ``ignore_index`` where nothing is known.

        Raises:
            ValueError: shapes differ, a dtype is no integer, or a labelled pixel has a class outside 0 to C - 1; naming the
                argument, what came and what was expected. Nothing is counted then.
        """
        if predicted.shape != mask.shape:
            raise ValueError(f"predicted: expected the shape of mask {tuple(mask.shape)}, got {tuple(predicted.shape)}")
        for name, classes in (("predicted", predicted), ("mask", mask)):
            if classes.dtype.is_floating_point or classes.dtype.is_complex:
                raise ValueError(f"{name}: expected integer classes, got {classes.dtype}")
        size = self.num_classes
        predicted, mask = predicted.long(), mask.long()
        labelled = mask != self.ignore_index
        known = (predicted >= 0) & (predicted < size) & (mask >= 0) & (mask < size)
        # two more bins behind the pairs: unlabelled, and out of range
        bins = torch.where(labelled, torch.where(known, mask * size + predicted, size**2 + 1), size**2)
        counts = torch.bincount(bins.flatten(), minlength=size**2 + 2)
        if counts[-1]:
            raise ValueError(self._out_of_range(predicted[labelled], mask[labelled]))
        own = counts[: size**2].view(size, size)
        self.counts = self.counts.to(own.device) + own
        return own

    def _out_of_range(self, predicted: Tensor, mask: Tensor) -> str:
        for name, classes in (("predicted", predicted), ("mask", mask)):
            outside = classes[(classes < 0) | (classes >= self.num_classes)]
            if len(outside):
                found = outside.unique().tolist()
                return f"{name}: expected classes from 0 to {self.num_classes - 1} at labelled pixels, got {found}"
        raise AssertionError("no class is out of range")

    def reduce(self) -> None:
        """Add up the counts of all ranks, in place and in every rank, once: a second call would add the sums up. Without a
        process group there is nothing to do."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        on_cpu = "cpu:" in dist.get_backend_config()  # nccl alone reduces on the GPU of the process only
        counts = self.counts.to("cpu" if on_cpu else torch.device("cuda", torch.cuda.current_device()), copy=True)
        dist.all_reduce(counts)
        self.counts = counts.to(self.counts.device)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """(C,) float64: pixels that are right, that are in the masks, and that are predicted. Exact up to 2^53."""
        counts = self.counts.cpu().double()
        return counts.diagonal(), counts.sum(1), counts.sum(0)

    def iou(self) -> Tensor:
        """(C,) float64 intersection over union, TP / (TP + FN + FP); NaN for a class that is neither in the masks nor
        predicted."""
        return iou_of(self.counts)

    def dice(self) -> Tensor:
        """(C,) float64 Dice coefficient (F1), 2 TP / (2 TP + FN + FP) = 2 IoU / (1 + IoU); NaN where IoU is."""
        hit, true, predicted = self._parts()
        return 2 * hit / (true + predicted)

    def accuracy(self) -> Tensor:
        """(C,) float64 share of a class's pixels that are predicted as it (recall), TP / (TP + FN); NaN for one that is not in
        the masks."""
        hit, true, _ = self._parts()
        return hit / true

    def mean_iou(self) -> float:
        """Mean IoU in percent over the classes that occur, background included; NaN if none does."""
        return _mean_percent(self.iou())

    def mean_dice(self) -> float:
        """Mean Dice coefficient in percent over the classes that occur, background included; NaN if none does."""
        return _mean_percent(self.dice())

    def mean_accuracy(self) -> float:
        """Mean accuracy in percent over the classes that are in the masks; NaN if none is."""
        return _mean_percent(self.accuracy())

    def pixel_accuracy(self) -> float:
        """Share of labelled pixels that are right, in percent; NaN if no pixel is labelled."""
        hit, true, _ = self._parts()
        return 100.0 * float(hit.sum() / true.sum())


def iou_of(counts: Tensor) -> Tensor:
    """Intersection over union of each class, TP / (TP + FN + FP): (C, C) pixels [true, predicted] -> (C,) float64 from 0 to 1,
    on the CPU; NaN for a class that is neither in the masks nor predicted."""
    counts = counts.cpu().double()
    hit = counts.diagonal()
    return hit / (counts.sum(1) + counts.sum(0) - hit)


def mean_iou_of(counts: Tensor) -> float:
    """Mean of `iou_of` in percent, over the classes that occur; NaN if none does.

    ``counts``: (C, C) pixels [true, predicted].
    """
    return _mean_percent(iou_of(counts))


def describe_collapse(counts: Tensor, names: Sequence[str]) -> str | None:
    """A sentence where a network predicts one class almost everywhere (at 95 % of the pixels or more) and finds next to nothing
    of the others (less than 5 % of theirs); else None.

    Both are asked for: where nearly all is background, a network that finds the rest predicts it almost everywhere, too.
    ``counts``: (C, C) pixels [true, predicted]; ``names``: of the C classes.
    """
    counts = counts.cpu().double()
    total, true, predicted = counts.sum(), counts.sum(1), counts.sum(0)
    one = int(predicted.argmax())
    others, found = total - true[one], counts.diagonal().sum() - counts[one, one]
    if predicted[one] < _NEARLY_ALL * total or found >= _NEARLY_NONE * others:
        return None
    return (
        f"the network has collapsed to one class: {names[one]!r} at {100 * predicted[one] / total:.1f} % of the pixels, of "
        f"which it is {100 * true[one] / total:.1f} %; of all other classes {100 * found / others:.1f} % is found. Where that "
        "lasts, more --steps or another --lr may help, or drawings of the other classes are too few or wrong"
    )


def largest_confusions(counts: Tensor, names: Sequence[str], most: int = 5) -> list[tuple[str, str, float]]:
    """(true class, predicted as, percent of the true class's pixels), the most pixels first, at most ``most`` of them; those
    below 1 % are left out.

    ``counts``: (C, C) pixels [true, predicted]; ``names``: of the C classes.
    """
    counts = counts.cpu().double()
    wrong = counts - counts.diag().diag()
    order = wrong.flatten().argsort(descending=True, stable=True)[:most]
    pairs = [divmod(int(place), len(names)) for place in order]
    found = [(names[i], names[j], 100 * float(wrong[i, j] / counts[i].sum())) for i, j in pairs if wrong[i, j]]
    return [one for one in found if one[2] >= 1]


def _mean_percent(scores: Tensor) -> float:
    # one after the other, as the official evaluator adds them up: a vectorised sum, and sum() from Python 3.12 on, may differ
    # in the last bit
    valid = [score for score in scores.tolist() if not math.isnan(score)]
    return 100.0 * (reduce(add, valid) / len(valid)) if valid else math.nan
