"""Outlines: how far a pen's are off, measured where there are a dense mask and a drawing, and undone in the drawings.

No confusion matrix at a pixel mends an outline, for what is drawn at a place depends on the truth near it. So outlines that
are off by a distance are moved back by it, before anything is learned.

The model of a pen. s is the signed distance of a pixel to an object of the mask, below 0 inside. A pen of radius d draws
where s <= d, so a drawing that is made with radii d in parts w[d] covers a pixel with probability

    P(drawn | s) = outside + (inside - outside) sum_d w[d] [s <= d]

which is any function that does not rise with s: its maximum likelihood, over all w, ``inside`` and ``outside`` at once, is the
isotonic regression of "drawn" on s (Ayer et al. 1955, "An empirical distribution function for sampling with incomplete
information"), and w are its steps. The radius is the median of w: half of the outlines reach further.

A brush may differ from image to image, as it does where people zoom. Where each image has something thin, the drawing tells
which brush it was: its thinnest strokes are half as wide as the thinnest things are, and the radius. That first part is the
same for all images, and pairs say how much it is; where it is not, one radius for all is the better guess (`PenOfClass`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import scipy

from .. import IGNORE, is_background
from ..label_maps import check_pair
from .moving import LARGEST, Pen, around, boxes_of, half_width, undo, whole

_LEVELS = 2 * LARGEST + 2  # of the signed distance: the radii, the smallest that covers a pixel, and "none does"
_LEAST_CONTRAST = 0.2  # between inside and outside, below which a drawing does not follow the mask
_LEAST_MENDED = 0.25
_LEAST_PAIRS = 2


def to_json(report: PenReport, *, each: bool = False) -> str:
    """pen.json: what `read_pen` reads, with a radius of its own for ``each`` image or without, and all that was measured."""
    pen = report.pen(each=each)
    content = {
        "radius": dict(zip(report.names, pen.radii, strict=True)),
        **({"width": dict(zip(report.names, pen.widths, strict=True))} if pen.widths else {}),
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
    width: half of the width, in pixels, that the thinnest strokes would have with a radius of 0 (`Pen`), the median of the
        pairs; None: none has both a radius and strokes.
    least: the smallest radius of a pair by itself.
    undone_one, undone_each: as ``undone``, of each pair by what the others say: one radius for all, or a radius for each image.
        0 with fewer than two pairs.
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
    width: float | None = None
    least: int | None = None
    undone_one: float = 0.0
    undone_each: float = 0.0
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
    def differs(self) -> bool:
        """Whether a radius for each image leaves less wrong than one for all, by a quarter and more."""
        return self.width is not None and self.undone_each < (1 - _LEAST_MENDED) * self.undone_one

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

    @property
    def differing(self) -> tuple[str, ...]:
        """The classes whose pen differs between images (`PenOfClass.differs`). Beside other objects only those that are drawn
        too wide in every pair: what others are drawn over loses more in one image than in the next, and that is no pen."""
        return tuple(
            name
            for name, one in zip(self.names, self.classes, strict=True)
            if one.differs and (self._alone or (one.least or 0) > 0)
        )

    @property
    def _alone(self) -> bool:
        return sum(not is_background(name) for name in self.names) == 1

    def pen(self, *, each: bool = False) -> Pen:
        """To undo what was measured, with one radius for all images, or ``each`` with its own: of classes that are `differing`,
        and of one that is alone with a background, of which pairs with the same brush cannot tell."""
        if not each:
            return Pen(self.radii())
        widths = tuple(
            one.width if self._alone or name in self.differing else None
            for name, one in zip(self.names, self.classes, strict=True)
        )
        return Pen(self.radii(), widths=widths if any(width is not None for width in widths) else ())

    def radii(self) -> tuple[float, ...]:
        """What `Pen` takes: pixels for each of ``names``. A class that is in too few pairs is taken to be drawn as all of them
        together: by the same hand."""
        moves = [self.together.move if one.few else one.move for one in self.classes]
        return tuple(0.0 if is_background(name) else float(move) for name, move in zip(self.names, moves, strict=True))


def describe_pen(pen: Pen | None, report: PenReport | None, names: Sequence[str]) -> list[str]:
    """A sentence for the log of a run with a pen."""
    if pen is None:
        return []
    moved = ", ".join(f"{name} {radius:+g}" for name, radius in zip(names, pen.radii, strict=True) if radius) or "none"
    if any(width is not None for width in pen.widths):
        moved += " where an image has no strokes of its own to tell; in all others by their thinnest ones"
    silent = {"moved over": pen.band, "of what stays and is not proven": pen.doubt}
    left_open = ", ".join(f"{pixels:g} pixels {where}" for where, pixels in silent.items() if pixels)
    sentence = f"outlines of positive drawings that are moved back, pixels too far (below 0: not far enough): {moved}"
    sentence += f"; left open: {left_open}" if left_open else ""
    if pen.moves and not any(map(is_background, names)) and len(set(pen.radii)) == 1:
        sentence += "; no class is called background: where two of these touch, their border stays"
    if report is None:
        return [sentence]
    few = [name for name, one in zip(names, report.classes, strict=True) if one.radius is not None and one.few]
    unsure = f"; too few to be sure of {', '.join(few)} (`coarse-train pen` shows them)" if few else ""
    return [f"{sentence}; measured on {len(report.images)} images with a mask and a drawing{unsure}"]


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
    thin: list[list[float]] = []
    objects = [label for label, name in enumerate(names) if not is_background(name)]
    for name, drawing, mask in pairs:
        try:
            check_pair(drawing, mask, len(names))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        images.append(name)
        counts.append(count(drawing, mask, len(names)))
        found = [half_width(drawing == label) if label in objects else None for label in range(len(names))]
        thin.append([np.nan if one is None else one for one in found])
    if not images:
        raise ValueError("pen: expected images with a dense mask and a positive drawing to measure it with, got none")
    every, strokes = np.stack(counts), np.array(thin)
    classes = [
        _of_class(every[:, label], strokes[:, label]) if label in objects else PenOfClass()
        for label in range(len(names))
    ]
    together = _of_class(every[:, objects].sum(1), np.full(len(images), np.nan))  # strokes are of one class
    return PenReport(tuple(images), tuple(names), tuple(classes), together)


@dataclass(frozen=True)
class Leftover:
    """What undoing a pen leaves, of what was drawn where the truth is known.

    wrong: in parts of the objects' area in the masks, names included.
    objects, background: the part of what would be called so without a doubt that says nothing.
    """

    wrong: float
    objects: float
    background: float


def leftovers(
    pairs: Iterable[tuple[str, np.ndarray, np.ndarray]], pen: Pen, names: Sequence[str], doubts: Sequence[float]
) -> list[Leftover]:
    """What undoing ``pen`` leaves with each of the ``doubts`` (`Pen.doubt`, pixels). ``pairs``: as `measure` takes them."""
    objects = [label for label, name in enumerate(names) if not is_background(name)]
    wrong, silent, area, said = np.zeros(len(doubts)), np.zeros((len(doubts), 2)), 0, np.zeros(2)
    for _, drawing, mask in pairs:
        without = undo(drawing, replace(pen, doubt=0.0))
        known = (mask != IGNORE) & (without != IGNORE)
        kinds = [known & (np.isin(without, objects) == kind) for kind in (True, False)]
        area += np.count_nonzero(known & np.isin(mask, objects))
        said += [np.count_nonzero(kind) for kind in kinds]
        for index, doubt in enumerate(doubts):
            after = undo(drawing, replace(pen, doubt=doubt))
            wrong[index] += np.count_nonzero(known & (after != mask) & (after != IGNORE))
            silent[index] += [np.count_nonzero(kind & (after == IGNORE)) for kind in kinds]
    shares = silent / np.maximum(said, 1)
    return [Leftover(float(part) / max(area, 1), *map(float, share)) for part, share in zip(wrong, shares, strict=True)]


def count(drawing: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, levels, 2) int64 pixels on each level of the signed distance to objects drawn under each name: all, and drawn.

    The name that an object was given is the label that is more frequent on it than around it by most, so that wrong names are
    no wrong outlines; and by it `undo` finds them. An object without one was left out and tells nothing.
    """
    result = np.zeros((num_classes, _LEVELS, 2), np.int64)
    for label, box in boxes_of(mask).items():
        part = around(box, LARGEST + 1, mask.shape)  # all pixels on a level that is counted, and all that decides it
        drawn_part, mask_part = drawing[part], mask[part]
        known, region = mask_part != IGNORE, mask_part == label
        if label == IGNORE or region.all():
            continue
        numbers, objects = scipy.ndimage.label(region, structure=np.ones((3, 3)))
        outside, (rows, columns) = scipy.ndimage.distance_transform_edt(~region, return_indices=True)
        nearest = numbers[rows, columns]
        level = np.where(region, 1 - np.ceil(scipy.ndimage.distance_transform_edt(region)), np.ceil(outside))
        near = known & (level <= LARGEST + 1)
        on = _shares(drawn_part, nearest, near & region, objects)
        contrast = on - _shares(drawn_part, nearest, near & ~region, objects)
        given = np.where(contrast.max(1) >= _LEAST_CONTRAST, contrast.argmax(1), -1)
        counted = near & (given[nearest] >= 0)
        places = np.maximum(level[counted], -LARGEST).astype(np.int64) + LARGEST
        names = given[nearest[counted]]
        drawn = drawn_part[counted] == names
        at = names * _LEVELS + places
        for kind, which in enumerate((at, at[drawn])):
            result[:, :, kind] += np.bincount(which, minlength=num_classes * _LEVELS).reshape(num_classes, _LEVELS)
    return result


def _shares(drawing: np.ndarray, numbers: np.ndarray, where: np.ndarray, objects: int) -> np.ndarray:
    """(objects + 1, IGNORE) share of each label of ``drawing`` on each number, of at least 1, among the pixels ``where``."""
    pairs = numbers[where].astype(np.int64) * 256 + drawing[where]
    seen = np.bincount(pairs, minlength=(objects + 1) * 256).reshape(objects + 1, 256)
    return seen[:, :IGNORE] / np.maximum(seen.sum(1, keepdims=True), 1)


def _of_class(counts: np.ndarray, thin: np.ndarray) -> PenOfClass:
    """``counts``: (images, levels, 2). ``thin``: (images,) half of the width of the thinnest strokes, NaN without any."""
    total = counts.sum(0)
    pairs = int(counts.any((1, 2)).sum())
    if pairs == 0:
        return PenOfClass()
    fit = _fit(total)
    own = total[: LARGEST + 1]  # up to level 0, an object's outermost pixels
    area = max(1, int(own[:, 0].sum()))
    without = tuple(_fit(total - one).radius for one in counts)
    fits = [_fit(one) for one in counts]
    width, by_one, by_each = _by_image(fits, counts, thin, without)
    return PenOfClass(
        radius=fit.radius,
        spread=fit.spread,
        inside=float(fit.drawn[0]),
        outside=float(fit.drawn[-1]),
        missed=float((own[:, 0] - own[:, 1]).sum() / area),
        added=float(total[LARGEST + 1 :, 1].sum() / area),
        undone=fit.errors(total[:, 0]) / area,
        width=width,
        least=min((one.radius for one in fits if one.radius is not None), default=None),
        undone_one=by_one / area,
        undone_each=by_each / area,
        pairs=pairs,
        without=without,
        drawn=tuple(fit.drawn.tolist()),
    )


def _by_image(
    fits: Sequence[_Fit], counts: np.ndarray, thin: np.ndarray, without: Sequence[int | None]
) -> tuple[float | None, float, float]:
    """`PenOfClass.width`, and the pixels that are wrong after each pair was moved back by what the others say: by one radius
    for all, and by one of its own."""
    known = [k for k, fit in enumerate(fits) if fit.radius is not None and not np.isnan(thin[k])]
    beyond = {k: float(thin[k]) - float(fits[k].radius or 0) for k in known}
    by_one = by_each = 0.0
    for k in known if len(known) >= _LEAST_PAIRS else []:
        others = float(np.median([beyond[other] for other in known if other != k]))
        pixels = counts[k, :, 0]
        by_one += fits[k].errors(pixels, without[k] or 0)
        by_each += fits[k].errors(pixels, whole(thin[k] - others))
    return float(np.median([*beyond.values()])) if beyond else None, by_one, by_each


@dataclass(frozen=True)
class _Fit:
    """``drawn``: (levels,) chance that a pixel of a level is drawn, by maximum likelihood."""

    drawn: np.ndarray
    radius: int | None
    spread: float

    def errors(self, pixels: np.ndarray, radius: int | None = None) -> float:
        """Of (levels,) pixels those expected on the wrong side after outlines were moved back by ``radius``, or their own."""
        levels = np.clip(np.arange(_LEVELS) + ((self.radius or 0) if radius is None else radius), 0, _LEVELS - 1)
        wrong = np.where(np.arange(_LEVELS) <= LARGEST, 1 - self.drawn[levels], self.drawn[levels])
        return float((pixels * wrong).sum())


def _fit(counts: np.ndarray) -> _Fit:
    """From (levels, 2) counts."""
    seen = np.flatnonzero(counts[:, 0])
    if not len(seen):
        return _Fit(np.zeros(_LEVELS), None, 0.0)
    pixels = counts[seen, 0].astype(np.float64)
    share = scipy.optimize.isotonic_regression(counts[seen, 1] / pixels, weights=pixels, increasing=False).x
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
