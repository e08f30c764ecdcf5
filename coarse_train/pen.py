"""Outlines: how far a pen's are off, measured where there are a dense mask and a drawing, and undone in the drawings.

No confusion matrix at a pixel mends an outline, for what is drawn at a place depends on the truth near it. So outlines that
are off by a distance are moved back by it, before anything is learned.

The model of a pen. s is the signed distance of a pixel to an object of the mask, below 0 inside. A pen of radius d draws
where s <= d, so a drawing that is made with radii d in parts w[d] covers a pixel with probability

    P(drawn | s) = outside + (inside - outside) sum_d w[d] [s <= d]

which is any function that does not rise with s: its maximum likelihood, over all w, ``inside`` and ``outside`` at once, is the
isotonic regression of "drawn" on s (Ayer et al. 1955, "An empirical distribution function for sampling with incomplete
information"), and w are its steps. The radius is the median of w: half of the outlines reach further.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage, optimize

from . import IGNORE
from .label_maps import check_pair
from .storage import read_text

LARGEST = 10  # radius in pixels that is looked for
_LEVELS = 2 * LARGEST + 2  # of the signed distance: the radii, the smallest that covers a pixel, and "none does"
_LEAST_CONTRAST = 0.2  # between inside and outside, below which a drawing does not follow the mask
_LEAST_MENDED = 0.25
_LEAST_PAIRS = 2


@dataclass(frozen=True)
class Pen:
    """What is undone.

    radii: by how many pixels the outlines of each class reach too far (below 0: not far enough); 0 for a class beyond them.
    band: of what an outline was moved over, so many pixels from the new one, >= 0, are `IGNORE` instead of what lies there.
    """

    radii: tuple[float, ...]
    band: float = 0.0

    @classmethod
    def of_objects(cls, radius: float, names: Sequence[str], band: float) -> Pen:
        """The same radius, in pixels, for every class of ``names`` but one that is called background, which has 0."""
        return cls(tuple(0.0 if name == "background" else radius for name in names), band)


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
    table[: len(pen.radii)] = pen.radii
    own = table[drawing]
    result, settled = drawing.copy(), np.zeros(drawing.shape, bool)
    for label in sorted(np.unique(drawing).tolist(), key=lambda label: (-abs(table[label]), -table[label])):
        radius = float(table[label])
        region = drawing == label
        # of another class with the opposite radius the same move is asked for
        beside = ~region & ((abs(own) < abs(radius)) | (own == -radius))
        if radius == 0 or not beside.any():
            continue
        if radius > 0:
            distance, (rows, columns) = ndimage.distance_transform_edt(~beside, return_indices=True)
            moved, becomes = region & (distance <= radius) & ~settled, drawing[rows, columns]
            left = region & ~moved
        else:
            moved = beside & (_distance(region) <= -radius) & ~settled
            becomes = np.full_like(drawing, label)
            left = ~(region | moved)
        result[moved] = becomes[moved]
        if pen.band > 0:
            result[moved & (_distance(left) <= pen.band)] = IGNORE
        settled |= moved
    return result


def _distance(where: np.ndarray) -> np.ndarray:
    """Of each pixel to the nearest one of ``where``; far where there is none."""
    if not where.any():
        return np.full(where.shape, np.inf)
    return np.asarray(ndimage.distance_transform_edt(~where))


def read_radii(path: Path, names: Sequence[str]) -> tuple[float, ...]:
    """Radii in pixels of the classes ``names``, from a pen.json as `to_json` writes it; one that is not in it, or null, has 0.

    Raises:
        ValueError: naming the file, where it is no such JSON, a radius is not finite, or a class is none of ``names``.
        FileNotFoundError: there is no such file.
    """
    try:
        radii = json.loads(read_text(path))["radius"]
        values = {str(name): float(radius or 0) for name, radius in radii.items()}
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"pen: expected a number, auto or a pen.json, got {path}, which is not there"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{path}: expected {{"radius": {{"CLASS": pixels, ...}}}}, got something else ({error})'
        ) from error
    unknown = sorted(values.keys() - {*names})
    if unknown or not all(np.isfinite(radius) for radius in values.values()):
        raise ValueError(f"{path}: expected numbers for some of the classes {tuple(names)}, got {values}")
    return tuple(values.get(name, 0.0) for name in names)


def to_json(report: PenReport) -> str:
    """pen.json: the radii that `read_radii` reads, and all that was measured."""
    content = {
        "radius": dict(zip(report.names, report.radii(), strict=True)),
        "images": list(report.images),
        "classes": {name: asdict(one) for name, one in zip(report.names, report.classes, strict=True)},
        "together": asdict(report.together),
    }
    return json.dumps(content, indent=2) + "\n"


# ---- measuring ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PenOfClass:
    """How the outlines are drawn of what is drawn under one name, whatever lies beside it: a wall that borders on little but
    poles has what poles took from it for its own radius. Areas are in parts of the objects' own.

    radius: whole pixels, above 0 where they reach too far, from -`LARGEST` to `LARGEST` (10); None: its drawings do not follow
        the masks, or there are none. The median of the mixture.
    spread: standard deviation of the radii in the mixture, in pixels.
    inside, outside: chance that a pixel far inside or far outside is drawn, with the object's name.
    missed, added: area that is lacking inside and too much outside. undone: both together, as the model expects it of
        outlines that were moved back.
    pairs: images with a mask and a drawing under that name.
    without: radius without each of the images of `PenReport.images`.
    drawn: chance that a pixel is drawn, for each signed distance from -`LARGEST` (and less) to `LARGEST` + 1, in whole pixels;
        an object's outermost ones are at 0.
    """

    radius: int | None = None
    spread: float = 0.0
    inside: float = 0.0
    outside: float = 0.0
    missed: float = 0.0
    added: float = 0.0
    undone: float = 0.0
    pairs: int = 0
    without: tuple[int | None, ...] = ()
    drawn: tuple[float, ...] = ()

    @property
    def move(self) -> int:
        """The radius that is to be undone, in pixels: 0 where that would mend less than a quarter of what is wrong, as where
        parts of objects were left out or pens are of all widths."""
        mends = self.undone < (1 - _LEAST_MENDED) * (self.missed + self.added)
        return self.radius if self.radius is not None and mends else 0

    @property
    def few(self) -> bool:
        """Whether one pair more or less might give another radius."""
        return self.pairs < _LEAST_PAIRS or any(other != self.radius for other in self.without)


@dataclass(frozen=True)
class PenReport:
    """What `measure` finds.

    images: names of those that have a mask and a drawing.
    names: of the classes.
    classes: the pen of each of them; that of a background has no radius.
    together: the pen of all but a background.
    """

    images: tuple[str, ...]
    names: tuple[str, ...]
    classes: tuple[PenOfClass, ...]
    together: PenOfClass

    def radii(self) -> tuple[float, ...]:
        """What `Pen` takes: pixels for each of ``names``. A class that is in too few pairs is taken to be drawn as all of them
        together: by the same hand."""
        moves = [self.together.move if one.few else one.move for one in self.classes]
        return tuple(0.0 if name == "background" else float(move) for name, move in zip(self.names, moves, strict=True))


def describe_pen(pen: Pen | None, report: PenReport | None, names: Sequence[str]) -> list[str]:
    """A sentence for the log of a run with a pen."""
    if pen is None:
        return []
    moved = ", ".join(f"{name} {radius:+g}" for name, radius in zip(names, pen.radii, strict=True) if radius) or "none"
    sentence = f"outlines of positive drawings that are moved back, pixels too far: {moved}"
    if report is None:
        return [sentence]
    few = [name for name, one in zip(names, report.classes, strict=True) if one.radius is not None and one.few]
    doubt = f"; too few to be sure of {', '.join(few)} (`coarse-train pen` shows them)" if few else ""
    return [f"{sentence}; measured on {len(report.images)} images with a mask and a drawing{doubt}"]


def measure(pairs: Iterable[tuple[str, np.ndarray, np.ndarray]], names: Sequence[str]) -> PenReport:
    """By how far the outlines of drawings are off, from the images that have a mask, too: the maximum likelihood of this
    module's model, an isotonic regression of "drawn" on the signed distance to objects of the mask.

    Args:
        pairs: name, drawing and mask of each image: (H, W) uint8, classes from 0 to C - 1 or `IGNORE` (255).
        names: of the C classes. One that is called background is measured by what lies on it, and has no pen of its own.

    Raises:
        ValueError: there are no pairs; or naming an image whose drawing and mask have two shapes, or hold something else.
    """
    images: list[str] = []
    counts: list[np.ndarray] = []
    for name, drawing, mask in pairs:
        try:
            check_pair(drawing, mask, len(names))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        images.append(name)
        counts.append(count(drawing, mask, len(names)))
    if not images:
        raise ValueError("pen: expected images with a dense mask and a positive drawing to measure it with, got none")
    every = np.stack(counts)
    objects = [label for label, name in enumerate(names) if name != "background"]
    classes = [_of_class(every[:, label]) if label in objects else PenOfClass() for label in range(len(names))]
    return PenReport(tuple(images), tuple(names), tuple(classes), _of_class(every[:, objects].sum(1)))


def count(drawing: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, levels, 2) int64 pixels on each level of the signed distance to objects drawn under each name: all, and drawn.

    The name that an object was given is the label that is more frequent on it than around it by most, so that wrong names are
    no wrong outlines; and by it `undo` finds them. An object without one was left out and tells nothing.
    """
    result = np.zeros((num_classes, _LEVELS, 2), np.int64)
    known = mask != IGNORE
    for label in np.unique(mask[known]).tolist():
        region = mask == label
        if region.all():
            continue
        numbers, objects = ndimage.label(region, structure=np.ones((3, 3)))
        outside, (rows, columns) = ndimage.distance_transform_edt(~region, return_indices=True)
        nearest = numbers[rows, columns]
        level = np.where(region, 1 - np.ceil(ndimage.distance_transform_edt(region)), np.ceil(outside))
        near = known & (level <= LARGEST + 1)
        on = _shares(drawing, nearest, near & region, objects)
        contrast = on - _shares(drawing, nearest, near & ~region, objects)
        given = np.where(contrast.max(1) >= _LEAST_CONTRAST, contrast.argmax(1), -1)
        counted = near & (given[nearest] >= 0)
        places = np.maximum(level[counted], -LARGEST).astype(np.int64) + LARGEST
        names = given[nearest[counted]]
        drawn = drawing[counted] == names
        at = names * _LEVELS + places
        for kind, which in enumerate((at, at[drawn])):
            result[:, :, kind] += np.bincount(which, minlength=num_classes * _LEVELS).reshape(num_classes, _LEVELS)
    return result


def _shares(drawing: np.ndarray, numbers: np.ndarray, where: np.ndarray, objects: int) -> np.ndarray:
    """(objects + 1, IGNORE) share of each label of ``drawing`` on each number, of at least 1, among the pixels ``where``."""
    pairs = numbers[where].astype(np.int64) * 256 + drawing[where]
    seen = np.bincount(pairs, minlength=(objects + 1) * 256).reshape(objects + 1, 256)
    return seen[:, :IGNORE] / np.maximum(seen.sum(1, keepdims=True), 1)


def _of_class(counts: np.ndarray) -> PenOfClass:
    """``counts``: (images, levels, 2)."""
    total = counts.sum(0)
    pairs = int(counts.any((1, 2)).sum())
    if pairs == 0:
        return PenOfClass()
    fit = _fit(total)
    own = total[: LARGEST + 1]  # up to level 0, an object's outermost pixels
    area = max(1, int(own[:, 0].sum()))
    return PenOfClass(
        radius=fit.radius,
        spread=fit.spread,
        inside=float(fit.drawn[0]),
        outside=float(fit.drawn[-1]),
        missed=float((own[:, 0] - own[:, 1]).sum() / area),
        added=float(total[LARGEST + 1 :, 1].sum() / area),
        undone=fit.errors(total[:, 0]) / area,
        pairs=pairs,
        without=tuple(_fit(total - one).radius for one in counts),
        drawn=tuple(fit.drawn.tolist()),
    )


@dataclass(frozen=True)
class _Fit:
    """``drawn``: (levels,) chance that a pixel of a level is drawn, by maximum likelihood."""

    drawn: np.ndarray
    radius: int | None
    spread: float

    def errors(self, pixels: np.ndarray) -> float:
        """Of (levels,) pixels those expected on the wrong side after outlines were moved back by the radius."""
        levels = np.clip(np.arange(_LEVELS) + (self.radius or 0), 0, _LEVELS - 1)
        wrong = np.where(np.arange(_LEVELS) <= LARGEST, 1 - self.drawn[levels], self.drawn[levels])
        return float((pixels * wrong).sum())


def _fit(counts: np.ndarray) -> _Fit:
    """From (levels, 2) counts."""
    seen = np.flatnonzero(counts[:, 0])
    if not len(seen):
        return _Fit(np.zeros(_LEVELS), None, 0.0)
    pixels = counts[seen, 0].astype(np.float64)
    share = optimize.isotonic_regression(counts[seen, 1] / pixels, weights=pixels, increasing=False).x
    drawn = share[
        np.searchsorted(seen, np.arange(_LEVELS)).clip(max=len(seen) - 1)
    ]  # of a level without pixels: as beyond
    steps = -np.diff(drawn)  # from one level to the next: the part of outlines that end between them
    if steps.sum() < _LEAST_CONTRAST:
        return _Fit(drawn, None, 0.0)
    weights, radii = steps / steps.sum(), np.arange(-LARGEST, LARGEST + 1)
    radius = int(radii[np.searchsorted(np.cumsum(weights), 0.5 - 1e-12)])
    spread = float(np.sqrt((weights * (radii - weights @ radii) ** 2).sum()))
    return _Fit(drawn, radius, spread)
