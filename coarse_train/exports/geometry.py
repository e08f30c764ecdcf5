"""Where a drawing lies, and which pixels that is.

A point (x, y) is measured from the top left corner of the image: the first pixel reaches from (0, 0) to (1, 1), its centre is
(0.5, 0.5). All five tools record points like that. A pixel belongs to an outline that holds its centre; a centre on the outline
belongs to what lies right of or below it, so that neighbours share no pixel and leave none out.

Of polygons that meet the pixels' grid at corners this is what pycocotools gives; elsewhere it differs by pixels on the
outline, since pycocotools rounds corners to a fifth of a pixel. labelme's own converter takes the pixels that the outline
touches, too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

Size = tuple[int, int]  # height, width
_FARTHEST = 1e6  # pixels; what lies farther from the image than this is no drawing


class Region(NamedTuple):
    """Pixels of a rectangle inside an image. mask: bool, of the rectangle's size."""

    rows: slice
    columns: slice
    mask: np.ndarray


class Geometry(Protocol):
    def region(self, size: Size) -> Region:
        """Its pixels, as far as they are inside an image of ``size``."""
        ...


def as_points(values: Any) -> np.ndarray:
    """(N, 2) float64 from [[x, y], ...] or [x, y, x, y, ...]. Raises ValueError for anything else, and for absurd numbers."""
    try:
        points = np.asarray(values, np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError(f"expected points [[x, y], ...], got {str(values)[:60]}") from error
    if not len(points) or not (np.abs(points) < _FARTHEST).all():  # NaN is not below, either
        raise ValueError(f"expected points within {_FARTHEST:.0f} pixels, got {str(values)[:60]}")
    return points


@dataclass(frozen=True)
class Polygon:
    """points: (N, 2). Closed; where it runs over itself a pixel is inside if a ray leaves through an odd number of edges."""

    points: np.ndarray

    def region(self, size: Size) -> Region:
        (left, top), (right, bottom) = (_edges(corner, size) for corner in (self.points.min(0), self.points.max(0)))
        crossed = np.zeros((bottom - top, right - left + 1), bool)
        for (x0, y0), (x1, y1) in zip(self.points, np.roll(self.points, -1, axis=0), strict=True):
            first, last = (min(max(_first_centre(y), top), bottom) for y in (min(y0, y1), max(y0, y1)))
            rows = np.arange(first, last)
            if len(rows):
                at = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
                crossed[rows - top, np.clip(np.ceil(at - 0.5), left, right).astype(int) - left] ^= True
        return Region(slice(top, bottom), slice(left, right), np.logical_xor.accumulate(crossed[:, :-1], axis=1))


@dataclass(frozen=True)
class Stroke:
    """Pixels whose centres are within half of ``width`` of the line through ``points`` (N, 2), or of a single point."""

    points: np.ndarray
    width: float

    def region(self, size: Size) -> Region:
        radius = self.width / 2
        left, top = _edges(self.points.min(0) - radius, size)
        right, bottom = _edges(self.points.max(0) + radius, size, beyond=1)
        mask = np.zeros((bottom - top, right - left), bool)
        ends = list(itertools.pairwise(self.points)) or [(self.points[0], self.points[0])]
        for start, end in ends:
            low, high = np.minimum(start, end) - radius, np.maximum(start, end) + radius
            x0, y0 = np.maximum(_edges(low, size), (left, top))
            x1, y1 = np.minimum(_edges(high, size, beyond=1), (right, bottom))
            x, y = np.arange(x0, x1)[None] + 0.5 - start[0], np.arange(y0, y1)[:, None] + 0.5 - start[1]
            dx, dy = end - start
            along = np.clip((x * dx + y * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
            near = (x - along * dx) ** 2 + (y - along * dy) ** 2 <= radius**2
            mask[y0 - top : y1 - top, x0 - left : x1 - left] |= near
        return Region(slice(top, bottom), slice(left, right), mask)


@dataclass(frozen=True)
class Runs:
    """Run lengths of a rectangle of pixels: outside, inside, outside, ..., row by row, or column by column as COCO has them.

    Raises ValueError where they are not as many as the rectangle has pixels.
    """

    counts: np.ndarray
    size: Size
    top: int = 0
    left: int = 0
    by_columns: bool = False

    def __post_init__(self) -> None:
        pixels = self.size[0] * self.size[1]
        counts = self.counts
        if counts.dtype.kind not in "iu" or counts.ndim != 1 or (counts < 0).any() or (counts > pixels).any():
            raise ValueError(f"expected run lengths from 0 to {pixels}, got {str(counts)[:60]}")
        if counts.sum() != pixels:
            got = f"of {counts.sum()}"
            raise ValueError(f"expected run lengths of {pixels} pixels ({self.size[1]}x{self.size[0]}), got {got}")

    @classmethod
    def of(cls, mask: np.ndarray, top: int = 0, left: int = 0) -> Runs:
        """mask: (h, w) bool."""
        flat = mask.ravel()
        changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
        starts = [0] if flat[0] else []
        return cls(np.diff([*starts, 0, *changes, flat.size]), (mask.shape[0], mask.shape[1]), top, left)

    def region(self, size: Size) -> Region:
        flat = np.repeat(np.arange(len(self.counts)) % 2 == 1, self.counts)
        mask = flat.reshape(self.size[::-1]).T if self.by_columns else flat.reshape(self.size)
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = min(self.top + self.size[0], size[0]), min(self.left + self.size[1], size[1])
        bottom, right = max(bottom, top), max(right, left)
        inside = mask[top - self.top : bottom - self.top, left - self.left : right - self.left]
        return Region(slice(top, bottom), slice(left, right), inside)


def rectangle(x0: float, y0: float, x1: float, y1: float, degrees: float = 0, about: Any = None) -> Polygon:
    """From two opposite corners; turned clockwise, ``about`` a point (x, y) or its centre."""
    corners = as_points([(x0, y0), (x1, y0), (x1, y1), (x0, y1)])
    return Polygon(_turned(corners, degrees, corners.mean(0) if about is None else about))


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0) -> Polygon:
    """A polygon of 360 corners; off by less than 0.04 pixels at a radius of 1000. Turned clockwise about its centre."""
    angles = np.radians(np.arange(360) + 0.5)
    corners = as_points(np.stack([x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)], axis=1))
    return Polygon(_turned(corners, degrees, (x, y)))


def _turned(points: np.ndarray, degrees: float, about: Any) -> np.ndarray:
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points if not degrees else as_points((points - about) @ np.array([[cos, sin], [-sin, cos]]) + about)


def _first_centre(position: float) -> int:
    """The first row or column whose centre is not before ``position``."""
    return math.ceil(position - 0.5)


def _edges(corner: np.ndarray, size: Size, beyond: int = 0) -> tuple[int, int]:
    """The column and row of a corner (x, y), inside the image or at its end."""
    column, row = (_first_centre(position) + beyond for position in corner)
    return min(max(column, 0), size[1]), min(max(row, 0), size[0])
