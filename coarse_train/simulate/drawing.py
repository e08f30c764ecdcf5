"""Coarse drawings as a hurried person makes them, on any dense mask.

    positive, negative = draw_coarse(mask, level("sketch", num_classes=11, confusion=0.1), np.random.default_rng(0))

A region is an 8-connected component of one class, unless objects are given; no class is a background, unless the process
has one. A positive drawing covers a region, badly, with the class that the confusion matrix [drawn, true] gives. A negative
drawing covers one, more generously, with a class that it is not: the transition [true, named] gives it. Large regions are
drawn first and smaller ones on top of them, as one colours a picture in: so a pole in front of a building stays, and a
region that is drawn too wide takes from larger neighbours only, where a person would have coloured over them too. What is
drawn nowhere is `IGNORE`, or what the paper says.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from zlib import crc32

import numpy as np
import scipy

from .. import IGNORE
from ..label_maps import check_labels
from .noise import Process, Strokes
from .shapes import KINDS, REACH, size_of

_SPECK = 1e-4  # of the image's area: 17 pixels of CamVid, which has hundreds of unlabelled pixels strewn over the road


def generator_for(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one image's drawings: its name decides, and ``seed`` >= 0, not its place or who draws it.

    Raises ValueError for a seed below 0.
    """
    if seed < 0:
        raise ValueError(f"seed: expected a whole number >= 0, got {seed}")
    return np.random.default_rng([seed, crc32(name.encode("utf-8", "surrogateescape"))])


def draw_coarse(
    mask: np.ndarray, process: Process, rng: np.random.Generator, *, objects: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Positive (H, W) and negative (K, H, W) drawings of a dense mask, uint8: classes, `IGNORE` (255) where nothing is drawn.

    Where the mask is `IGNORE` nothing is drawn. More layers do not change the first ones.

    Args:
        mask: (H, W) uint8, classes from 0 to C - 1 or `IGNORE`.
        process: how it is drawn; it has C classes and K layers.
        rng: equal states give equal drawings; `generator_for` gives each image its own.
        objects: (H, W) integers; numbers from 1 what is drawn as one region, however many components it has; 0: the background,
            which the process then has. None: each component is a region.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"mask: expected (H, W) uint8, got {mask.shape} {mask.dtype}")
    check_labels("mask", mask, process.num_classes)
    if objects is not None and process.background is None:
        raise ValueError(f"objects: expected None, since process {process.name!r} has no background")
    if objects is not None and objects.shape != mask.shape:
        raise ValueError(f"objects: expected {mask.shape} as mask has, got {objects.shape}")
    scene = _Scene(mask, process.background, objects)
    confusion, naming = np.array(process.confusion), process.naming
    positive = _paint(scene, process.positive, lambda true: int(rng.choice(len(confusion), p=confusion[:, true])), rng)
    negative = np.full((process.layers, *mask.shape), IGNORE, np.uint8)
    for layer in negative:
        layer[:] = _paint(
            scene,
            process.negative,
            lambda true: int(rng.choice(len(naming), p=naming[true])),
            rng,
            keep_off=process.careful,
        )
    if process.part is not None:
        positive = _shown(positive, process.part, rng)
        negative = np.array([_shown(layer, process.part, rng) for layer in negative], np.uint8).reshape(negative.shape)
    return positive, negative


def _shown(layer: np.ndarray, strokes: Strokes, rng: np.random.Generator) -> np.ndarray:
    """A part of a drawing (H, W): strokes on its regions, that say what it says."""
    return _paint(_Scene(layer, None, None), strokes, lambda drawn: drawn, rng)


class _Scene:
    """A mask as a person sees it: regions, largest first, with what, where and how large, and the depth of every pixel in
    its own. Specks are not seen, holes of unknown class neither: they belong to the region around them."""

    def __init__(self, mask: np.ndarray, background: int | None, objects: np.ndarray | None):
        self.mask = mask
        numbers, classes = _components(mask) if objects is None else _given(objects, mask)
        speck = np.bincount(numbers.ravel(), minlength=len(classes)) < _SPECK * mask.size
        if speck[numbers].any() and not speck[numbers].all():
            rows, columns = scipy.ndimage.distance_transform_edt(
                speck[numbers], return_distances=False, return_indices=True
            )
            numbers = numbers[rows, columns]
        areas = np.bincount(numbers.ravel(), minlength=len(classes))
        boxes = scipy.ndimage.find_objects(numbers)
        order = np.argsort(-areas, kind="stable").tolist()
        order = [n for n in order if areas[n] and classes[n] not in (IGNORE, background)]
        self.numbers, self.depth = numbers, _depth(numbers)
        self.seen = np.array(classes, np.uint8)[numbers]
        self.regions = [(n, classes[n], boxes[n - 1]) for n in order]
        self.areas = areas[order].astype(np.float64)


def _components(mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """(H, W) numbers of regions from 1, and the class of each number."""
    numbers = np.zeros(mask.shape, np.int32)
    classes: list[int] = [IGNORE]
    for label in np.unique(mask):
        components, count = scipy.ndimage.label(mask == label, structure=np.ones((3, 3)))
        numbers += np.where(components > 0, components + (len(classes) - 1), 0).astype(np.int32)
        classes += [int(label)] * count
    return numbers, classes


def _given(objects: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """The same of objects, with what is none of them as regions behind theirs."""
    classes = [IGNORE]
    for number in range(1, int(objects.max(initial=0)) + 1):
        found = mask[objects == number]
        classes.append(int(found[0]) if len(found) else IGNORE)
    rest, behind = _components(np.where(objects == 0, mask, IGNORE))
    numbers = np.where(objects > 0, objects, rest + (rest > 0) * (len(classes) - 1)).astype(np.int32)
    return numbers, classes + behind[1:]


def _depth(numbers: np.ndarray) -> np.ndarray:
    """Distance to the nearest pixel that has another region beside it, plus 1: one transform for all regions at once."""
    edge = np.zeros(numbers.shape, bool)
    across, down = numbers[:, 1:] != numbers[:, :-1], numbers[1:] != numbers[:-1]
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    edge[1:] |= down
    edge[:-1] |= down
    if not edge.any():
        return np.full(numbers.shape, max(numbers.shape) / 2, np.float32)
    return scipy.ndimage.distance_transform_edt(~edge).astype(np.float32) + 1


def _paint(
    scene: _Scene,
    strokes: Strokes,
    name: Callable[[int], int],
    rng: np.random.Generator,
    *,
    keep_off: bool = False,
) -> np.ndarray:
    """One layer (H, W). ``name``: true class -> class to write; with ``keep_off`` away from where that is the truth, unless
    it is the truth of the region itself."""
    mask = scene.mask
    layer = np.where(mask == IGNORE, IGNORE, strokes.paper).astype(np.uint8)
    known = np.count_nonzero(mask != IGNORE)
    drawn_at_all = (scene.areas >= strokes.smallest * mask.size) & (rng.random(len(scene.areas)) >= strokes.skipped)
    drawn_at_all[: strokes.surest] = True
    chosen = np.flatnonzero(drawn_at_all)
    plan = _shares(scene.areas[chosen], strokes.ratio * known, strokes.balance, strokes.most)
    pen = max(1.0, strokes.pen * sqrt(mask.size))
    labelled = 0
    for place, index in enumerate(chosen):
        # what came out larger or smaller than planned is made up for by those that follow
        behind = (strokes.ratio * known - labelled) / max(plan[place:].sum(), 1e-9)
        area = min(plan[place] * np.clip(behind, 0.5, 2), strokes.most * scene.areas[index])
        number, true, box = scene.regions[index]
        label = name(true)
        margin = int(rng.integers(strokes.margin[0], strokes.margin[1] + 1)) if any(strokes.margin) else 0
        window = _window(box, scene.areas[index], margin, mask.shape)
        region, depth = scene.numbers[window] == number, scene.depth[window]
        kind = list(KINDS)[int(rng.choice(len(KINDS), p=strokes.mix.chances))]
        if kind in ("eroded", "fractured") and strokes.kept != (1, 1):
            area *= rng.uniform(*strokes.kept)
        shape = _near(KINDS[kind](region, depth, max(1.0, area), pen, rng), margin) & (mask[window] != IGNORE)
        if keep_off and label != true:
            shape &= ~_near(scene.seen[window] == label, max(1.5, 0.015 * size_of(region, depth)))
            shape &= mask[window] != label
        part = layer[window]
        labelled += np.count_nonzero(shape & (part == strokes.paper))
        part[shape] = label
    if strokes.fill:
        _fill(layer, mask, round(strokes.ratio * known) - labelled)
    return layer


def _window(box: tuple[slice, ...], area: float, margin: int, shape: tuple[int, ...]) -> tuple[slice, ...]:
    reach = int(REACH * sqrt(area)) + 3 + max(0, margin)
    return tuple(slice(max(0, s.start - reach), min(n, s.stop + reach)) for s, n in zip(box, shape, strict=True))


def _near(where: np.ndarray, distance: float) -> np.ndarray:
    """``where`` and what is at most ``distance`` from it; below 0, what is further than that inside it."""
    if distance < 0:
        depth = np.asarray(scipy.ndimage.distance_transform_edt(where))
        return where & (depth > min(-distance, depth.max() - 1))  # the thinnest pen still leaves a line
    return scipy.ndimage.distance_transform_edt(~where) <= distance if distance and where.any() else where


def _shares(areas: np.ndarray, total: float, balance: float, most: float) -> np.ndarray:
    """Area for each region, in proportion to its own to the power ``balance``, at most ``most`` of it, ``total`` together."""
    weights, limits = areas**balance, most * areas
    low, high = 0.0, 1.0 if not len(areas) else float((limits / weights).max())
    for _ in range(50):
        factor = (low + high) / 2
        if np.minimum(factor * weights, limits).sum() < total:
            low = factor
        else:
            high = factor
    return np.minimum(high * weights, limits)


def _fill(layer: np.ndarray, mask: np.ndarray, count: int) -> None:
    """Give ``count`` pixels the label of the nearest drawing, the nearest pixels first."""
    empty = (layer == IGNORE) & (mask != IGNORE)
    if count <= 0 or not empty.any() or not (layer != IGNORE).any():
        return
    distance, (rows, columns) = scipy.ndimage.distance_transform_edt(layer == IGNORE, return_indices=True)
    places = np.flatnonzero(empty)
    places = places[np.argsort(distance.ravel()[places], kind="stable")[:count]]
    layer.ravel()[places] = layer[rows.ravel()[places], columns.ravel()[places]]
