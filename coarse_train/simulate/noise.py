"""The noise of coarse drawings: settings, five levels from a scribble to everything, and what is counted in drawings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from math import log

import numpy as np

from .. import IGNORE
from ..label_maps import check_pair

Matrix = tuple[tuple[float, ...], ...]


def swapped(num_classes: int, pairs: Mapping[int, int], probability: float) -> Matrix:
    """(C, C) [drawn, true]: each class of ``pairs`` (true -> drawn) is drawn as the other one with ``probability``, from 0 to
    1, all others as themselves. Columns sum to 1.

    Raises ValueError for another probability, or a class that there is not.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected a number from 0 to 1, got {probability}")
    unknown = sorted({label for pair in pairs.items() for label in pair if not 0 <= label < num_classes})
    if unknown:
        raise ValueError(f"pairs: expected classes from 0 to {num_classes - 1}, got {unknown}")
    matrix = np.eye(num_classes)
    for true, drawn in pairs.items():
        matrix[true, true], matrix[drawn, true] = 1 - probability, probability
    return _tuples(matrix)


def others(num_classes: int, background: int | None = None) -> Matrix:
    """(C, C) [true, named]: any other class, all as often; never the background. Zero diagonal, rows sum to 1.

    Raises ValueError for fewer than 2 classes, or fewer than 3 with a background.
    """
    if num_classes < (2 if background is None else 3):
        least = "2" if background is None else "3 with a background that is never named"
        raise ValueError(f"num_classes: expected at least {least}, got {num_classes}")
    matrix = 1 - np.eye(num_classes)
    if background is not None:
        matrix[:, background] = 0
    return _tuples(matrix / matrix.sum(1, keepdims=True))


@dataclass(frozen=True)
class Mix:
    """The chance that a region is drawn in each way (`shapes`).

    Raises:
        ValueError: one is below 0, or they do not sum to 1.
    """

    exact: float = 0.0
    eroded: float = 0.0
    dilated: float = 0.0
    polygon: float = 0.0
    fractured: float = 0.0
    shifted: float = 0.0
    scribble: float = 0.0
    spots: float = 0.0

    def __post_init__(self) -> None:
        if min(self.chances) < 0 or abs(sum(self.chances) - 1) > 1e-9:
            raise ValueError(f"Mix: expected chances >= 0 that sum to 1, got {self.chances}")

    @property
    def chances(self) -> tuple[float, ...]:
        """Of all ways, in the order of the fields."""
        return tuple(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Strokes:
    """How one layer is drawn.

    ratio: labelled pixels by pixels whose class is known, what is aimed at: above 0, at most 1.
    mix: the kinds of distortion.
    pen: width of a stroke, in parts of the square root of the image's area: equal on a screen, whatever the resolution.
    smallest: regions below this part of the image's area are overlooked.
    skipped: chance that a larger one is, but for the ``surest`` largest.
    balance: a region gets area in proportion to its own to this power: 1 draws the same part of each, 0.5 a line whose
        length grows with the region's width.
    most: no region is aimed to be covered by more than this part.
    fill: colour what is left between drawings with the nearest one, nearest first, until the ratio is reached.
    kept: of what a region that is eroded or fractured would get, the part that is drawn, uniform in this range.
    margin: range of whole pixels, both ends included, by which every shape is then widened, or below 0 narrowed.
    paper: what a pixel says that nothing is drawn on: nothing (`IGNORE`), or a class.

    Raises:
        ValueError: ``ratio``, ``kept`` or ``margin`` are not as above; naming what came and what was expected.
    """

    ratio: float
    mix: Mix
    pen: float = 0.007
    smallest: float = 5e-4
    skipped: float = 0.0
    balance: float = 0.75
    most: float = 1.0
    fill: bool = False
    kept: tuple[float, float] = (1.0, 1.0)
    margin: tuple[int, int] = (0, 0)
    paper: int = IGNORE
    surest: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio: expected a number above 0, at most 1, got {self.ratio}")
        if not 0 < self.kept[0] <= self.kept[1] <= 1:
            raise ValueError(f"kept: expected two numbers above 0, at most 1, the smaller first, got {self.kept}")
        if not self.margin[0] <= self.margin[1]:
            raise ValueError(f"margin: expected two numbers, the smaller first, got {self.margin}")


@dataclass(frozen=True)
class Process:
    """A whole noise process for C classes.

    name: for messages.
    positive, negative: how a layer of each kind is drawn; a ``paper`` in them is one of the classes, or `IGNORE`.
    confusion: (C, C) [drawn, true], the classes of positive drawings; columns sum to 1.
    transition: (C, C) [true, named], the classes of honest negative drawings; zero diagonal, rows sum to 1.
    error: chance that a negative drawing is wrong: it names the class that is there.
    layers: number of negative layers K. Each is drawn by itself, so they overlap.
    background: a class that nobody draws; every other region is an object on it.
    careful: negative drawings keep off what they name, unless they are wrong.
    part: strokes that show a part of each layer, on its own regions and under their names, where the rest is `IGNORE`: less is
        annotated, as badly. None: all of it.

    Raises:
        ValueError: naming the field, what came and what was expected.
    """

    name: str
    positive: Strokes
    negative: Strokes
    confusion: Matrix
    transition: Matrix
    error: float = 0.0
    layers: int = 2
    background: int | None = None
    careful: bool = True
    part: Strokes | None = None

    def __post_init__(self) -> None:
        confusion, transition = _square("confusion", self.confusion), _square("transition", self.transition)
        if len(confusion) != len(transition):
            raise ValueError(f"transition: expected {len(confusion)} classes as in confusion, got {len(transition)}")
        if confusion.min() < 0 or not np.allclose(confusion.sum(0), 1):
            raise ValueError(f"confusion: expected columns >= 0 that sum to 1, got sums {confusion.sum(0).tolist()}")
        if transition.min() < 0 or transition.diagonal().any() or not np.allclose(transition.sum(1), 1):
            raise ValueError(
                f"transition: expected rows >= 0 that sum to 1 and a zero diagonal, got sums {transition.sum(1).tolist()} "
                f"and diagonal {transition.diagonal().tolist()}"
            )
        if not 0 <= self.error <= 1:
            raise ValueError(f"error: expected a number from 0 to 1, got {self.error}")
        for name, value in (
            ("background", self.background),
            *(("paper", s.paper) for s in (self.positive, self.negative)),
        ):
            if value not in (None, IGNORE, *range(self.num_classes)):
                raise ValueError(f"{name}: expected a class below {self.num_classes}, got {value}")
        if self.layers < 0:
            raise ValueError(f"layers: expected a number >= 0, got {self.layers}")

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.confusion)

    @property
    def naming(self) -> np.ndarray:
        """(C, C) [true, named], nominal: wrong negative drawings included."""
        return (1 - self.error) * np.array(self.transition) + self.error * np.eye(self.num_classes)


# name -> (positive, negative). One mix for each amount of work: below a tenth of the area people mark, up to about a half they
# draw a part of each region, above that outlines. Outlines of negative drawings are too wide, since they need not fit.
LEVELS: dict[str, tuple[Strokes, Strokes]] = {
    "scribble": (
        Strokes(0.01, Mix(scribble=0.9, spots=0.1), smallest=1e-3, balance=0.5, skipped=0.3),
        Strokes(0.01, Mix(scribble=0.7, spots=0.3), smallest=2e-3, balance=0.5, skipped=0.2),
    ),
    "spots": (
        Strokes(0.05, Mix(spots=0.75, scribble=0.25), pen=0.012, smallest=1e-3, balance=0.6),
        Strokes(0.05, Mix(spots=0.75, scribble=0.25), pen=0.012, smallest=2e-3, balance=0.6, skipped=0.2),
    ),
    "sketch": (
        Strokes(
            0.25,
            Mix(eroded=0.3, polygon=0.25, fractured=0.15, scribble=0.2, spots=0.1),
            pen=0.025,
            balance=0.75,
            most=0.85,
        ),
        Strokes(0.25, Mix(eroded=0.2, polygon=0.4, dilated=0.2, spots=0.2), smallest=1e-3, balance=0.75, skipped=0.1),
    ),
    "coarse": (
        Strokes(0.6, Mix(polygon=0.45, eroded=0.2, fractured=0.1, dilated=0.15, shifted=0.1), balance=0.9, most=0.9),
        Strokes(0.6, Mix(dilated=0.5, polygon=0.35, shifted=0.15), smallest=1e-3, balance=0.9),
    ),
    "full": (
        Strokes(1.0, Mix(polygon=0.5, dilated=0.25, shifted=0.2, exact=0.05), smallest=2e-4, balance=1.0, fill=True),
        Strokes(1.0, Mix(dilated=0.7, polygon=0.3), balance=1.0),
    ),
}


def level(
    name: str | float,
    num_classes: int,
    *,
    confusion: float | np.ndarray = 0.0,
    transition: np.ndarray | None = None,
    error: float = 0.0,
    layers: int = 2,
) -> Process:
    """The process of a level of `LEVELS`, or of any ratio from 0.01 to 1: the nearest level (in log ratio), aimed at it.

    Args:
        name: "scribble", "spots", "sketch", "coarse" or "full", which aim at 0.01, 0.05, 0.25, 0.6 and 1 of the pixels whose
            class is known; or another such ratio, also as a text.
        num_classes: C >= 2.
        confusion: chance that a positive drawing carries another class, any of them, or a (C, C) matrix [drawn, true].
        transition: (C, C) [true, named], classes of negative drawings; None: any other class.
        error, layers: as in `Process`.

    Raises:
        ValueError: naming the argument, what came and what was expected.
    """
    if num_classes < 2:
        raise ValueError(f"num_classes: expected at least 2, got {num_classes}")
    positive, negative = _strokes(name)
    any_other = np.array(others(num_classes))
    if isinstance(confusion, (int, float)):
        if not 0 <= confusion <= 1:
            raise ValueError(f"confusion: expected a probability, got {confusion}")
        confusion = (1 - confusion) * np.eye(num_classes) + confusion * any_other
    return Process(
        name=str(name),
        positive=positive,
        negative=negative,
        confusion=_matrix("confusion", confusion, num_classes),
        transition=_matrix("transition", any_other if transition is None else transition, num_classes),
        error=error,
        layers=layers,
    )


def _strokes(name: str | float) -> tuple[Strokes, Strokes]:
    if name in LEVELS:
        return LEVELS[str(name)]
    try:
        ratio = float(name)
    except ValueError:
        raise ValueError(f"level: expected one of {tuple(LEVELS)} or a ratio, got {name!r}") from None
    if not 0.01 <= ratio <= 1:
        raise ValueError(f"ratio: expected a number from 0.01 to 1, got {name}")
    nearest = min(LEVELS.values(), key=lambda pair: abs(log(pair[0].ratio / ratio)))
    return replace(nearest[0], ratio=ratio), replace(nearest[1], ratio=ratio)


def _matrix(name: str, matrix: np.ndarray, num_classes: int) -> Matrix:
    if matrix.shape != (num_classes, num_classes):
        raise ValueError(f"{name}: expected shape ({num_classes}, {num_classes}), got {matrix.shape}")
    return _tuples(matrix)


def _tuples(matrix: np.ndarray) -> Matrix:
    return tuple(tuple(float(x) for x in row) for row in matrix)


def pair_counts(drawing: np.ndarray, mask: np.ndarray, num_classes: int) -> np.ndarray:
    """(C, C) int64 [drawn, true]: pixels of ``drawing`` on ``mask``, where both are known; add up over images.

    Both are integers of one shape, classes from 0 to C - 1 or `IGNORE` (255); anything else is a ValueError.
    """
    check_pair(drawing, mask, num_classes)
    both = (drawing != IGNORE) & (mask != IGNORE)
    pairs = drawing[both].astype(np.int64) * num_classes + mask[both]
    return np.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes)


def shares(counts: np.ndarray) -> np.ndarray:
    """(C, C) float64 [drawn, true] p(drawn | true) of `pair_counts`: columns sum to 1; zeros for a class that nothing was drawn
    on."""
    return counts / np.maximum(counts.sum(0, keepdims=True), 1)


def _square(name: str, matrix: Matrix) -> np.ndarray:
    array = np.array(matrix)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or array.shape[0] < 2:
        raise ValueError(f"{name}: expected a square matrix of at least 2 classes, got shape {array.shape}")
    return array
