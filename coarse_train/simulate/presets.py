"""Coarse drawings from dense masks, by a noise process that is known.

A positive drawing says "this region is class y": every object is drawn once, with its outline distorted (`ShapeNoise`)
and its class swapped with a known matrix; what no object covers is drawn as background. A negative drawing says "this
region is not class y": it covers a distorted object with a margin, and names a class that the object does not have. It
is honest, since it keeps off other objects and never names the true class, and weak, since one of many wrong classes
is named.

Class 0 is the background. Swap matrices are [drawn, true], columns sum to 1, as the confusion matrices of the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

IGNORE = 255
_DISC = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)  # radius 2, 13 pixels


@dataclass(frozen=True)
class ShapeNoise:
    """How an outline is distorted: the chance of each kind (they sum to at most 1; the rest is drawn exactly).

    broken: pieces are missing; what is left is uniform in ``kept`` of the area.
    thin: only the middle of the strokes.
    thick: one pixel too wide all round.
    shifted: moved by one or two pixels.
    filled: holes and bays of up to about 6 pixels filled in.
    """

    broken: float = 0.0
    thin: float = 0.0
    thick: float = 0.0
    shifted: float = 0.0
    filled: float = 0.0
    kept: tuple[float, float] = (0.4, 0.8)

    def __post_init__(self) -> None:
        chances = (self.broken, self.thin, self.thick, self.shifted, self.filled)
        if min(chances) < 0 or sum(chances) > 1 + 1e-9:
            raise ValueError(f"ShapeNoise: expected chances >= 0 that sum to at most 1, got {chances}")


@dataclass(frozen=True)
class Preset:
    """A whole noise process. ``swap[drawn][true]`` is (C, C); ``margin``: range of the negative drawings' margin in
    pixels. ``negatives``: "objects" as in the module docstring, or "everywhere" (two classes: each pixel is said not to
    be the other class of a distorted mask)."""

    name: str
    positive: ShapeNoise
    negative: ShapeNoise
    swap: tuple[tuple[float, ...], ...]
    margin: tuple[int, int] = (2, 4)
    negatives: str = "objects"

    def __post_init__(self) -> None:
        swap = np.array(self.swap)
        if swap.ndim != 2 or swap.shape[0] != swap.shape[1] or swap.shape[0] < 2:
            raise ValueError(f"Preset.swap: expected a square matrix of at least 2 classes, got shape {swap.shape}")
        if swap.min() < 0 or not np.allclose(swap.sum(0), 1):
            raise ValueError(f"Preset.swap: expected columns >= 0 that sum to 1, got sums {swap.sum(0).tolist()}")
        if self.negatives not in ("objects", "everywhere"):
            raise ValueError(f"Preset.negatives: expected 'objects' or 'everywhere', got {self.negatives!r}")

    @property
    def num_classes(self) -> int:
        return len(self.swap)


def cyclic_swap(num_classes: int, probability: float) -> tuple[tuple[float, ...], ...]:
    """[drawn, true]: object class k is drawn as the next object class with ``probability``; the background is not."""
    swap = np.eye(num_classes)
    for true in range(1, num_classes):
        swap[true, true] = 1 - probability
        swap[1 + true % (num_classes - 1), true] += probability
    return tuple(tuple(float(x) for x in row) for row in swap)


def look_alikes(num_classes: int, pairs: Mapping[int, int], probability: float) -> tuple[tuple[float, ...], ...]:
    """[drawn, true]: a class of ``pairs`` is drawn as the other one with ``probability``; those that are in no pair, and the
    other ones, as themselves."""
    swap = np.eye(num_classes)
    for true, drawn in pairs.items():
        swap[true, true], swap[drawn, true] = 1 - probability, probability
    return tuple(tuple(float(x) for x in row) for row in swap)


# Hasty annotation: strokes are mostly incomplete, sometimes too wide or displaced, and three objects in ten get another
# class's name. Chosen before any training, from what each drawing alone can tell: an object pixel is drawn as its own
# class about 45 times in 100, as background 35 times, as another class 20 times, while one negative drawing leaves
# C - 1 of C classes open. So neither kind is enough.
HASTY = Preset(
    name="hasty",
    positive=ShapeNoise(broken=0.6, thick=0.2, shifted=0.2),
    negative=ShapeNoise(broken=0.3, shifted=0.3),
    swap=cyclic_swap(5, 0.3),
)
# The majority is wrong: two of the four classes are drawn as another one more often than not, as by annotators who know one
# name for two things ("car" for a van). So the most frequent name of such an object is not its own, and averaging does not
# help. That is realistic for names; that every object has a negative drawing, and an honest one, is what a project would have
# to pay for. Outlines as above. All four classes are equally frequent: with half as many of the two that are misnamed, a name
# is mostly right again for who sees it, and the textbook pair gets there in some runs.
MAJORITY = Preset(
    name="majority",
    positive=HASTY.positive,
    negative=HASTY.negative,
    swap=look_alikes(5, {2: 1, 4: 3}, 0.6),
)
# The paper's binary masks: thin or fractured positives, balanced noise in the negatives (LEARNING: "thin/mixed").
BINARY = Preset(
    name="binary",
    positive=ShapeNoise(broken=0.5, thin=0.5),
    negative=ShapeNoise(broken=0.2, thin=0.2, thick=0.2, shifted=0.2, filled=0.2),
    swap=cyclic_swap(2, 0.0),
    negatives="everywhere",
)
PRESETS = {preset.name: preset for preset in (MAJORITY, HASTY, BINARY)}


def distort(region: np.ndarray, noise: ShapeNoise, rng: np.random.Generator) -> np.ndarray:
    """(H, W) bool -> (H, W) bool, the same outline drawn badly; never empty for a region that is not."""
    chances = np.array([noise.broken, noise.thin, noise.thick, noise.shifted, noise.filled])
    kind = int(rng.choice(6, p=np.append(chances, max(0.0, 1 - chances.sum())) / max(1.0, chances.sum())))
    if not region.any():
        return region.copy()
    if kind == 0:
        return _broken(region, noise.kept, rng)
    if kind == 1:
        depth = ndimage.distance_transform_cdt(region, "taxicab")
        return depth >= max(2, np.median(depth[region])) if depth.max() > 1 else region.copy()
    if kind == 2:
        return ndimage.binary_dilation(region)
    if kind == 3:
        moved = _moved(region, rng)
        return moved if moved.any() else region.copy()
    if kind == 4:
        padded = np.pad(region, 4)  # closing erodes from the border of the array
        return ndimage.binary_closing(padded, _DISC)[4:-4, 4:-4] | region
    return region.copy()


def _broken(region: np.ndarray, kept: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Cut discs out, centred on pixels that are left, until the wanted share of the area is left."""
    rows, columns = np.nonzero(region)
    left = np.ones(len(rows), bool)
    target = rng.uniform(*kept) * len(rows)
    while left.sum() > max(1.0, target):
        centre = rng.choice(np.flatnonzero(left))
        distance = np.hypot(rows - rows[centre], columns - columns[centre])
        cut = left & (distance <= rng.uniform(1.5, 3.5))
        if cut.sum() == left.sum():
            break
        left &= ~cut
    result = np.zeros_like(region)
    result[rows[left], columns[left]] = True
    return result


def _moved(region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    down, right = 0, 0
    while down == 0 and right == 0:
        down, right = (int(x) for x in rng.integers(-2, 3, 2))
    result = np.zeros_like(region)
    height, width = region.shape
    target = np.s_[max(0, down) : height + min(0, down), max(0, right) : width + min(0, right)]
    source = np.s_[max(0, -down) : height + min(0, -down), max(0, -right) : width + min(0, -right)]
    result[target] = region[source]
    return result


def objects_of(mask: np.ndarray) -> np.ndarray:
    """(H, W) classes -> (H, W) object numbers from 1, 0 for background: 8-connected components by class."""
    regions = np.zeros(mask.shape, np.int32)
    for label in np.unique(mask[(mask != 0) & (mask != IGNORE)]):
        components, _ = ndimage.label(mask == label, structure=np.ones((3, 3)))
        regions[components > 0] = components[components > 0] + regions.max()
    return regions


def draw(
    mask: np.ndarray, preset: Preset, rng: np.random.Generator, *, regions: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative drawing, both (H, W) uint8, of a dense mask (H, W) of classes.

    ``regions`` (H, W) numbers the objects from 1; None takes connected components. Where the mask is `IGNORE` neither
    drawing says anything.
    """
    regions = objects_of(mask) if regions is None else regions
    swap = np.array(preset.swap)
    positive = np.zeros(mask.shape, np.uint8)
    negative = np.full(mask.shape, IGNORE, np.uint8)
    for number in np.unique(regions[regions > 0]):
        region = regions == number
        true = int(mask[region][0])
        positive[distort(region, preset.positive, rng)] = rng.choice(preset.num_classes, p=swap[:, true])
        if preset.negatives == "objects":
            margin = int(rng.integers(preset.margin[0], preset.margin[1] + 1))
            covered = ndimage.binary_dilation(distort(region, preset.negative, rng), _DISC, iterations=1)
            covered = ndimage.binary_dilation(covered, iterations=margin - 2) if margin > 2 else covered
            wrong = [label for label in range(1, preset.num_classes) if label != true]
            negative[covered & ((regions == 0) | region)] = rng.choice(wrong)
        else:
            drawn = distort(region, preset.negative, rng)
            negative[drawn] = 0
    if preset.negatives == "everywhere":
        negative = np.where(negative == 0, 0, 1).astype(np.uint8)  # inside "not background", outside "not the object"
    unknown = mask == IGNORE
    positive[unknown] = IGNORE
    negative[unknown] = IGNORE
    return positive, negative


def observed_confusion(drawing: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) float64 p(drawn | true), measured: pixel counts of ``drawing`` against ``mask``, columns sum to 1."""
    labelled = (drawing != IGNORE) & (mask != IGNORE)
    pairs = drawing[labelled].astype(np.int64) * num_classes + mask[labelled]
    counts = np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes).astype(np.float64)
    return counts / np.maximum(counts.sum(0, keepdims=True), 1)
