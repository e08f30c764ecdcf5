"""What the map of the experiments says of a run before it begins: where a confusion matrix has nothing to hold on to."""

from __future__ import annotations

import math

import numpy as np

from . import is_background
from .config import DataConfig, DrawingsConfig, FitConfig
from .data import IGNORE, Source
from .data.segmentation import SegmentationData, choose_dense, pairs_of, plain
from .pen import measure
from .selection import kinds_of_drawings
from .simulate import pair_counts

_IMAGES = 32  # training images that are looked at
_FEW = 0.2  # of what is positively drawn, with a negative drawing on it: below, the matrix loses to cross-entropy
_CONTRADICTED = 0.005  # of where both kinds meet, the same name in both: below, nothing says that names are wrong
_COPIES = 0.9  # of what is positively drawn, with a negative drawing on it, and
_COPIED = 0.5  # of where both meet, the same name in both: above, negative drawings were made as positive ones are
_SEEN = 500  # pixels of a name with a negative drawing, from which on a name that never comes is no chance
_LISTED = 3
_PAIRS = 8
_PIXELS = 20_000_000  # of pairs in all: some 20 seconds where every class is everywhere


def describe_risks(config: FitConfig, source: Source) -> list[str]:
    """A sentence for each risk."""
    present = kinds_of_drawings(config, source)
    kinds: dict[str, DrawingsConfig] = {name: getattr(config, name) for name in present}
    matrices = [name for name, kind in kinds.items() if kind.cm != "none"]
    notes = [note for name in matrices if (note := _start(name, kinds[name], len(source.classes)))]
    if config.data.supervision == "drawings" and present and len(matrices) == len(present):
        notes.append(
            f"all drawings that there are ({', '.join(present)}) have a confusion matrix and none are trusted; nothing then "
            f"holds the matrix to the truth, and training may drift or flip classes; --{present[0]}.cm none trusts them"
        )
    if {"positive", "negative"} <= set(present):
        notes += _meeting(config, source, matrix="positive" in matrices)
    if "positive" in present and config.positive.pen is None and config.data.dense_split == "train":
        notes += _outlines(config, source)
    data = config.data
    if data.dataset == "folder" and data.supervision == "drawings" and not data.dense_images and data.simulate is None:
        unread = sum("mask" in source.kinds(index) for index in range(len(source)))
        if unread:
            notes.append(
                f"{unread} training images have a dense mask, and none is learned from; --supervision mixed "
                f"--dense-images {unread} learns from them, too"
            )
    return [f"note: {note}" for note in notes]


def _start(name: str, kind: DrawingsConfig, classes: int) -> str | None:
    """Where a matrix starts without a dominant diagonal, in which case classes may be learned in another order."""
    others = classes - (2 if kind.missing is not None and classes > 2 else 1)
    largest = max((1 - kind.diagonal - (kind.missing or 0)) / others, kind.missing or 0)
    if kind.diagonal > largest:
        return None
    return (
        f"the confusion matrix of {name} drawings starts with {kind.diagonal:g} on its diagonal and {largest:.2g} beside it, "
        f"and classes may be learned in another order; --{name}.diagonal above 0.5 gives every class its own name"
    )


def _outlines(config: FitConfig, source: Source) -> list[str]:
    """Outlines that are off, as the first images say whose masks the run may read anyway."""
    if not config.data.dense_images:
        return []
    off, differing = _outlines_of(
        source, config.data, config.seed, sorted(choose_dense(source, config.data, config.seed))
    )
    how = "image" if differing else "auto"
    return [f"{off}; --positive.pen {how} moves them back, `coarse-train pen` shows them"] if off else []


def describe_outlines(source: Source, data: DataConfig) -> str | None:
    """Outlines that are off, as the first images say that have a drawing and a mask; None: none are, or it is not known."""
    both = [index for index in range(len(source)) if {"positive", "mask"} <= set(source.kinds(index))]
    off, differing = _outlines_of(source, data, 0, both)
    how = " --each" if differing else ""
    return f"{off}; `coarse-train pen{how}` measures what --positive.pen then moves back" if off else None


def _outlines_of(source: Source, data: DataConfig, seed: int, indices: list[int]) -> tuple[str | None, bool]:
    """What the first of these images say of the classes that they tell enough of, and whether by how much differs."""
    pairs, pixels = [], 0
    for pair in pairs_of(source, data, seed, indices[:_PAIRS]):
        pixels += pair[1].size
        if pixels > _PIXELS:
            break
        pairs.append(pair)
    if not pairs:
        return None, False
    names = source.classes.names
    report = measure(pairs, names)
    off = [
        f"{name} {one.move:+d} (spread {one.spread:.1f}, {100 * one.missed:.0f} % missed, {100 * one.added:.0f} % added)"
        for name, one in zip(names, report.classes, strict=True)
        if one.move and (not one.few or name in report.differing)
    ]
    told = f"outlines of positive drawings are off, pixels too far (below 0: not far enough): {', '.join(off)}"
    return told if off else None, bool(report.differing)


def _meeting(config: FitConfig, source: Source, *, matrix: bool) -> list[str]:
    """What the pixels tell that have a positive and a negative drawing, ``matrix``: on a confusion matrix of the positive ones.
    A background is left out: it is what nobody drew."""
    names = source.classes.names
    objects = [label for label, name in enumerate(names) if not is_background(name)]
    counts, drawn, both = _counts(config, source)
    own, met = drawn[objects].sum(), both[objects].sum()
    # of one class on a background no name can be wrong, and a matrix did help with its outlines
    if not own or len(objects) < 2:
        return []
    notes = []
    # where they are few, somebody may have ruled out what is drawn wrongly
    if met > _COPIES * own and counts[objects, objects].sum() > _COPIED * counts[objects].sum():
        notes.append(
            "negative drawings mostly say 'not' what the positive ones on the same pixels say: one of the two contradicts the "
            "images; a negative label is a class that a region is not"
        )
    if not matrix:
        return notes
    if met < _FEW * own:
        notes.append(
            f"only {math.floor(100 * met / own)} % of what is positively drawn has a negative drawing on it; below about "
            f"{100 * _FEW:.0f} % cross-entropy was better than a confusion matrix; --positive.cm none, or, where a validation "
            "split has masks, --select-with N"
        )
    elif counts[objects, objects].sum() < _CONTRADICTED * counts[objects].sum():
        notes.append(
            "positive and negative drawings never contradict each other, so nothing says that names are wrong, and no "
            "confusion matrix mends outlines"
            + (
                "; `coarse-train pen` measures them, --positive.pen moves them back"
                if config.positive.pen is None
                else ""
            )
        )
    named = counts.sum(0)
    silent = [
        f"{names[j]!r} on {names[i]!r}"
        for i in objects
        for j in objects
        if i != j and counts[i].sum() >= _SEEN and named[j] and not counts[i, j]
    ]
    if silent and met >= _FEW * own:
        more = f" and {len(silent) - _LISTED} more" if len(silent) > _LISTED else ""
        notes.append(
            f"no negative drawing says 'not' {', '.join(silent[:_LISTED])}{more}: if one is drawn as the other, nobody can "
            "learn it"
        )
    return notes


def _counts(config: FitConfig, source: Source) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """In the first training images: (C, C) [drawn as, named as not], a pixel for each negative layer; (C,) pixels drawn as, and
    those of them with a negative drawing on them, in however many layers."""
    dataset = SegmentationData(source, plain(config.data), seed=config.seed, training=False)
    classes = len(source.classes)
    counts, drawn = np.zeros((classes, classes), np.int64), np.zeros((2, classes), np.int64)
    for index in range(min(len(dataset), _IMAGES)):
        sample = dataset[index]
        positive, layers = sample.positive.numpy(), sample.negative.numpy()
        own = positive != IGNORE
        for row, where in enumerate((own, own & (layers != IGNORE).any(0))):
            drawn[row] += np.bincount(positive[where], minlength=classes)
        for layer in layers:
            counts += pair_counts(positive, layer, classes)
    return counts, drawn[0], drawn[1]
