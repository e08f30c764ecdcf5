"""Outlines that are off by a distance, moved back in the drawings, and the file that says by how much."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import scipy

from .. import IGNORE, is_background
from ..storage import read_text

LARGEST = 10  # radius in pixels that is looked for
_THIN = 0.1  # quantile of the half-widths along the middle of strokes: a tenth is thinner


@dataclass(frozen=True)
class Pen:
    """What is undone.

    radii: by how many pixels the outlines of each class reach too far (below 0: not far enough); 0 for a class beyond them.
    band: of what an outline was moved over, so many pixels from the new one, >= 0, are `IGNORE` instead of what lies there.
    doubt: of what stays, so many pixels from the new outline, >= 0, are `IGNORE` unless the drawing proves them: a pen that
        reaches too far fills gaps up to twice its radius, and one that does not reach far enough loses what is as thin, which
        moving an outline back does not bring back. inf: as far as it goes; what one class on a background then still is, is
        right if its radius is.
    widths: where radii differ between images: half of the width, in pixels, that the thinnest strokes of a class would have
        with a radius of 0. An image's radius is, in whole pixels, what its own have beyond that; None, and in an image without
        that class: ``radii``.

    Raises:
        ValueError: more ``widths`` than ``radii``, or a number of them is not finite.
    """

    radii: tuple[float, ...]
    band: float = 0.0
    doubt: float = 0.0
    widths: tuple[float | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.widths) > len(self.radii):
            raise ValueError(
                f"widths: expected at most one for each of {len(self.radii)} radii, got {len(self.widths)}"
            )
        for name, numbers in (("radii", self.radii), ("widths", self.widths)):
            if not all(number is None or np.isfinite(number) for number in numbers):
                raise ValueError(f"{name}: expected finite numbers of pixels, got {numbers}")

    @classmethod
    def of_objects(cls, radius: float, names: Sequence[str]) -> Pen:
        """The same radius, in pixels, for every class of ``names`` but a background (`is_background`), which has 0."""
        return cls(tuple(0.0 if is_background(name) else radius for name in names))

    @property
    def moves(self) -> bool:
        """Whether it changes any drawing."""
        return any(self.radii) or any(width is not None for width in self.widths)

    def radii_of(self, drawing: np.ndarray) -> tuple[float, ...]:
        """Those of one (H, W) drawing, in pixels."""
        found = list(self.radii)
        for label, width in enumerate(self.widths):
            if width is not None and (thin := half_width(drawing == label)) is not None:
                found[label] = float(whole(thin - width))
        return tuple(found)


def half_width(region: np.ndarray) -> float | None:
    """Half of the width of the thinnest strokes of a (H, W) boolean region, in pixels: a tenth of its middle lines, the ridges
    of the distance to what is not in it, are thinner. Middle lines nearer to the image's border than to what is not in the
    region do not count, since nobody sees how the stroke goes on. None where there are no others."""
    box = scipy.ndimage.find_objects(region.astype(np.uint8))
    if not box:
        return None
    place = tuple(slice(max(0, one.start - 1), one.stop + 1) for one in box[0])
    own = region[place]
    if own.all():
        return None
    depth = scipy.ndimage.distance_transform_edt(own)
    rows, columns = (np.arange(part.start, part.start + n) for part, n in zip(place, own.shape, strict=True))
    height, width = region.shape
    border = np.minimum.outer(np.minimum(rows, height - 1 - rows), np.minimum(columns, width - 1 - columns)) + 1
    ridge = own & (depth == scipy.ndimage.maximum_filter(depth, 3)) & (depth <= border)
    return float(np.quantile(depth[ridge], _THIN)) if ridge.any() else None


def whole(radius: float) -> int:
    """The nearest radius that a pen may have."""
    return int(np.clip(np.rint(radius), -LARGEST, LARGEST))


def undo(drawing: np.ndarray, pen: Pen) -> np.ndarray:
    """The drawing with its outlines moved back; the one that came stays as it is. Nothing is drawn where it is `IGNORE` (255).

    An outline has two sides. The class with the larger radius (either sign) decides how it moves, as one that is drawn over
    others with a broad pen does; two of the same radius leave it where it is, since nothing tells which of them was on top.
    What is drawn nowhere, and a background, has radius 0. A pixel that is lost goes to the nearest other side.

    Args:
        drawing: (H, W) uint8, classes or `IGNORE`.
        pen: what is undone, in pixels: distances between their centres.

    Returns:
        (H, W) uint8.
    """
    table = np.zeros(256)
    table[: len(pen.radii)] = pen.radii_of(drawing)
    own = table[drawing]
    result, settled = drawing.copy(), np.zeros(drawing.shape, bool)
    boxes = boxes_of(drawing)
    labels = sorted(np.unique(drawing).tolist(), key=lambda label: (-abs(table[label]), -table[label]))
    for radius, of_radius in groupby(labels, key=lambda label: float(table[label])):
        # of another class with the opposite radius the same move is asked for
        lower = (np.abs(own) < abs(radius)) | (own == -radius)
        if radius == 0 or not lower.any():
            continue
        if radius > 0:  # one answer for all classes of the radius: none of them is beside another
            distance, (rows, columns) = scipy.ndimage.distance_transform_edt(~lower, return_indices=True)
            inner, outer = (distance <= radius) & ~settled, drawing[rows, columns]
        for label in of_radius:
            # all that can change, and all that decides it
            box = around(boxes[label], 2 * abs(radius) + max(pen.band, pen.doubt) + 1, drawing.shape)
            region = drawing[box] == label
            if radius > 0:
                moved, becomes = region & inner[box], outer[box]
                left = region & ~moved
            else:
                moved = lower[box] & ~region & (_distance(region) <= -radius) & ~settled[box]
                becomes = np.full_like(drawing[box], label)
                left = ~(region | moved)
            if not moved.any():
                continue
            result[box][moved] = becomes[moved]
            if pen.band > 0:
                result[box][moved & (_distance(left) <= pen.band)] = IGNORE
            if pen.doubt > 0:
                # where nobody knows what is there, and under a broader pen, may be another reason why it came so far
                unknown = (drawing[box] == IGNORE) | (own[box] > abs(radius)) | (moved & (becomes == IGNORE))
                certain = settled[box] | (own[box] < 0)  # what a narrow pen drew is of its class
                certain |= _proven(left, unknown, moved, abs(radius))
                result[box][left & (_distance(moved) <= pen.doubt) & ~certain] = IGNORE
            settled[box] |= moved
    return result


def boxes_of(labels: np.ndarray) -> dict[int, tuple[slice, ...]]:
    """Where each label of a uint8 array is."""
    boxes = scipy.ndimage.find_objects(labels.astype(np.int16) + 1)
    return {label: box for label, box in enumerate(boxes) if box is not None}


def around(box: tuple[slice, ...], margin: float, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """The box with ``margin`` pixels more on each side, within ``shape``; inf: all of it."""
    more = int(min(margin, max(shape))) + 1
    return tuple(slice(max(0, one.start - more), min(one.stop + more, n)) for one, n in zip(box, shape, strict=True))


def _proven(left: np.ndarray, unknown: np.ndarray, moved: np.ndarray, radius: float) -> np.ndarray:
    """Pixels of ``left`` without which the outline would not have come so far: one of ``moved`` has no other of them within
    ``radius``, none of ``unknown``, and not the border of the image, beyond which may be others."""
    reach = min(int(radius), max(left.shape))
    squares = np.arange(-reach, reach + 1) ** 2
    disc = np.sqrt(np.add.outer(squares, squares)) <= radius  # as distances are computed
    candidates = np.pad(left | unknown, reach, constant_values=True).astype(np.float32)
    within = np.rint(scipy.signal.oaconvolve(candidates, disc.astype(np.float32), mode="valid"))
    return left & (_distance(moved & (within == 1)) <= radius)


def _distance(where: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest one of ``where``; far where there is none."""
    if not where.any():
        return np.full(where.shape, np.inf)
    return np.asarray(scipy.ndimage.distance_transform_edt(~where))


def read_pen(path: Path, names: Sequence[str]) -> Pen:
    """The pen of the classes ``names``, in pixels, from a pen.json as `to_json` writes it; one that is not in it, or null, has
    a radius of 0, and none of its own in each image.

    Raises:
        ValueError: naming the file, where it is no such JSON, a radius is not finite, or a class is none of ``names``.
        FileNotFoundError: there is no such file.
    """
    try:
        content = json.loads(read_text(Path(path)))
        values = {str(name): float(radius or 0) for name, radius in content["radius"].items()}
        widths = {str(name): float(width) for name, width in content.get("width", {}).items() if width is not None}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"pen: expected a number, auto, image or a pen.json, got {path}, which is not there"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}: expected {{"radius": {{"CLASS": pixels, ...}}}}, got something else ({error})'
        ) from error
    for read in (values, widths):
        if read.keys() - {*names} or not all(np.isfinite(number) for number in read.values()):
            raise ValueError(f"{path}: expected numbers for some of the classes {tuple(names)}, got {read}")
    return Pen(tuple(values.get(name, 0.0) for name in names), widths=tuple(map(widths.get, names)) if widths else ())
