"""A case is one line of text, such as

    c3 b2 7x5 seg3x2 fp32 mean scale3 drawn0.7 ignore255 uint8 one_pass seed12 split | positive*2 3x2 w0.5 classes

    c3 b2 7x5 seg3x2    classes, images, pixels (1 to 3 axes), points of the class logits
    fp32                storage of the class logits (fp32, bf16, fp16, fp64), after "+" that of the fields, where it is another
    mean                reduction: mean, sum, none; mean3.5: with that normalizer
    scale3              standard deviation of all logits
    drawn0.7            share of the labels that is there; ignore255: the number of those that are not; uint8: their dtype
    one_pass            schedule, or recompute
    holes               some logits are -inf, but no first class
    junk                logits of pixels without any label are NaN
    split               what is compared with float64: `relations.RELATIONS`
    | ...               a kind of drawings: stream, *layers, points of its field or "trusted" (none), "shared" by all images,
                        w0.5 its weight, class weights, pixel weights, trace0.1 the weight of the trace

Streams: positive (T = I), uniform, random (learned), fixed (random, not learned), partial (nothing is ever reported as 0).
Values come of ``seed`` alone.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, TypeVar

X = TypeVar("X")
Grid = tuple[int, ...]
STREAMS = ("positive", "uniform", "random", "fixed", "partial")
DTYPES = ("fp32", "bf16", "fp16", "fp64")
LABELS = ("uint8", "int64", "int32", "int16", "int8")
SCALES = (0.1, 1.0, 3.0, 10.0, 30.0, 100.0, 1e3, 1e4)
REDUCTIONS = ("mean", "sum", "none")
SCHEDULES = ("one_pass", "recompute")


@dataclass(frozen=True)
class Kind:
    stream: str = "positive"
    layers: int = 1
    grid: Grid | None = None  # None: trusted
    shared: bool = False
    weight: float = 1.0
    classes: bool = False
    pixels: bool = False
    trace: float = 0.0

    def __str__(self) -> str:
        words = [
            self.stream + (f"*{self.layers}" if self.layers != 1 else ""),
            "trusted" if self.grid is None else times(self.grid),
            *(["shared"] if self.shared else []),
            *([f"w{self.weight:g}"] if self.weight != 1 else []),
            *(["classes"] if self.classes else []),
            *(["pixels"] if self.pixels else []),
            *([f"trace{self.trace:g}"] if self.trace else []),
        ]
        return " ".join(words)


@dataclass(frozen=True)
class Case:
    classes: int = 2
    batch: int = 1
    size: Grid = (1,)
    seg: Grid = (1,)
    kinds: tuple[Kind, ...] = (Kind(),)
    dtype: str = "fp32"
    cm_dtype: str = ""  # as dtype
    reduction: str = "mean"
    normalizer: float = 0.0  # none
    scale: float = 1.0
    drawn: float = 1.0
    ignore: int = 255
    labels: str = "uint8"
    schedule: str = "one_pass"
    holes: bool = False
    junk: bool = False
    seed: int = 0
    relation: str = "same"

    def __str__(self) -> str:
        words = [
            f"c{self.classes}",
            f"b{self.batch}",
            times(self.size),
            f"seg{times(self.seg)}",
            self.dtype + (f"+{self.cm_dtype}" if self.cm_dtype else ""),
            self.reduction + (f"{self.normalizer:g}" if self.normalizer else ""),
            f"scale{self.scale:g}",
            f"drawn{self.drawn:g}",
            f"ignore{self.ignore}",
            self.labels,
            self.schedule,
            *(["holes"] if self.holes else []),
            *(["junk"] if self.junk else []),
            f"seed{self.seed}",
            self.relation,
        ]
        return " | ".join([" ".join(words), *map(str, self.kinds)])

    @property
    def pixels(self) -> int:
        return math.prod(self.size)

    @property
    def cells(self) -> int:
        """Points of all grids that are interpolated, in all images."""
        grids = (self.seg, *(kind.grid for kind in self.kinds if kind.grid is not None))
        return self.batch * sum(math.prod(g) for g in grids if g != self.size)

    def fits(self) -> bool:
        """Whether it is a problem that may be asked, and whose answer float32 can hold."""
        grids = [self.seg, *(kind.grid for kind in self.kinds if kind.grid is not None)]
        if any(len(g) != len(self.size) or any(p > s for p, s in zip(g, self.size, strict=True)) for g in grids):
            return False
        # F.interpolate makes NaN of -inf between points, and the neighbours of NaN are NaN
        exact = all(g == self.size or math.prod(g) == 1 for g in grids)
        return _holds(self.labels, self.ignore) and (exact or not (self.holes or self.junk))


def _holds(labels: str, ignore: int) -> bool:
    """Whether labels of that dtype can say that there is none."""
    return ignore >= 0 if labels == "uint8" else labels != "int8" or ignore < 128


def times(grid: Grid) -> str:
    return "x".join(map(str, grid))


# --- from text -----------------------------------------------------------------------------------------------------------

_WORDS: dict[str, Callable[[re.Match[str]], dict[str, Any]]] = {
    r"c(\d+)": lambda m: {"classes": int(m[1])},
    r"b(\d+)": lambda m: {"batch": int(m[1])},
    r"(\d+(?:x\d+)*)": lambda m: {"size": _grid(m[1])},
    r"seg(\d+(?:x\d+)*)": lambda m: {"seg": _grid(m[1])},
    rf"({'|'.join(DTYPES)})(?:\+({'|'.join(DTYPES)}))?": lambda m: {"dtype": m[1], "cm_dtype": m[2] or ""},
    r"(mean|sum|none)([\d.e+-]+)?": lambda m: {"reduction": m[1], "normalizer": float(m[2] or 0)},
    r"scale([\d.e+-]+)": lambda m: {"scale": float(m[1])},
    r"drawn([\d.e+-]+)": lambda m: {"drawn": float(m[1])},
    r"ignore(-?\d+)": lambda m: {"ignore": int(m[1])},
    rf"({'|'.join(LABELS)})": lambda m: {"labels": m[1]},
    rf"({'|'.join(SCHEDULES)})": lambda m: {"schedule": m[1]},
    r"(holes|junk)": lambda m: {m[1]: True},
    r"seed(\d+)": lambda m: {"seed": int(m[1])},
    r"([a-z_]+)": lambda m: {"relation": m[1]},
}
_KIND_WORDS: dict[str, Callable[[re.Match[str]], dict[str, Any]]] = {
    rf"({'|'.join(STREAMS)})(?:\*(\d+))?": lambda m: {"stream": m[1], "layers": int(m[2] or 1)},
    r"trusted": lambda m: {"grid": None},
    r"(\d+(?:x\d+)*)": lambda m: {"grid": _grid(m[1])},
    r"(shared|classes|pixels)": lambda m: {m[1]: True},
    r"w([\d.e+-]+)": lambda m: {"weight": float(m[1])},
    r"trace([\d.e+-]+)": lambda m: {"trace": float(m[1])},
}


def parse(line: str) -> Case:
    """The case of a line; ValueError naming the word that is not understood."""
    first, *kinds = line.split("|")
    found = _read(first, _WORDS)
    return Case(**found, kinds=tuple(Kind(**_read(kind, _KIND_WORDS)) for kind in kinds))


def _read(text: str, words: dict[str, Callable[[re.Match[str]], dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for word in text.split():
        matches = (make(match) for pattern, make in words.items() if (match := re.fullmatch(pattern, word)))
        value = next(matches, None)
        if value is None:
            raise ValueError(f"case: expected words as in {str(Case())!r}, got {word!r}")
        found |= value
    return found


def _grid(text: str) -> Grid:
    return tuple(map(int, text.split("x")))


# --- at random -----------------------------------------------------------------------------------------------------------


class Chooser(Protocol):
    """Who draws: `random.Random`, or hypothesis."""

    def integer(self, low: int, high: int) -> int: ...

    def of(self, options: Sequence[X]) -> X: ...


class Dice:
    """Of a seed; fifty times as fast as hypothesis."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return low + int(self._random.random() * (high - low + 1))

    def of(self, options: Sequence[X]) -> X:
        return options[int(self._random.random() * len(options))]


# most images small, since a mistake shows in the smallest that has it; some larger than a task
_LONGEST = {1: 35, 2: 9, 3: 4}
# small ones have their own code, and 19 is Cityscapes; a reference takes C x C numbers a pixel
_CLASSES = (2, 3, 4, 5, 2, 3, 4, 7, 2, 3, 5, 8, 2, 3, 4, 9, 2, 3, 5, 6, 12, 19, 20, 33)
_LARGE = {1: (9001,), 2: (97, 130), 3: (9, 17, 33)}


def draw(choose: Chooser, relations: Sequence[str]) -> Case:
    """A case that fits; the earlier options of each choice are the simpler ones."""
    rank = choose.of((2, 1, 3, 2))
    large = choose.integer(0, 999) == 999
    if large:
        size: Grid = _LARGE[rank]
    else:
        size = tuple(choose.integer(1, _LONGEST[rank]) for _ in range(rank))
    classes = choose.integer(2, 4) if large else choose.of(_CLASSES)
    if classes > 9 and not large:
        size = (*(min(s, 3) for s in size[:-1]), min(size[-1], 17))
    batch = choose.of((1, 2, 2, 3))
    dtype = choose.of(("fp32", "fp32", "fp32", "bf16", "fp16", "fp64"))
    kinds = tuple(_kind(choose, size) for _ in range(choose.of((1, 1, 1, 2, 2, 3))))
    has_field = any(kind.grid is not None for kind in kinds)
    ignore = choose.of((255, 255, 255, 0, 1, -1, -100))
    case = Case(
        classes=classes,
        batch=batch,
        size=size,
        seg=_points(choose, size),
        kinds=kinds,
        dtype=dtype,
        cm_dtype=choose.of(("", "", "", "bf16", "fp32", "fp64")) if has_field else "",
        reduction=choose.of(REDUCTIONS),
        scale=choose.of(SCALES[1:4] if choose.integer(0, 2) else SCALES),
        drawn=choose.of((1.0, 0.7, 0.7, 0.3, 0.05, 0.0)),
        ignore=ignore,
        labels=choose.of([name for name in LABELS if _holds(name, ignore)]),
        schedule=choose.of(SCHEDULES),
        holes=choose.integer(0, 9) == 9,
        junk=choose.integer(0, 9) == 9,
        seed=choose.integer(0, 2**31 - 1),
        relation=choose.of(relations),
    )
    if case.reduction == "mean" and choose.integer(0, 4) == 4:
        case = replace(case, normalizer=choose.of((3.5, 1000.0)))
    return case if case.fits() else replace(case, holes=False, junk=False)


def _kind(choose: Chooser, size: Grid) -> Kind:
    trusted = choose.integer(0, 2) == 2
    return Kind(
        stream=choose.of(STREAMS),
        layers=choose.of((1, 1, 1, 2, 3)),
        grid=None if trusted else _points(choose, size),
        shared=not trusted and choose.integer(0, 2) == 2,
        weight=choose.of((1.0, 1.0, 0.5, 0.0, 3.0)),
        classes=choose.integer(0, 2) == 2,
        pixels=choose.integer(0, 2) == 2,
        trace=0.0 if trusted else choose.of((0.0, 0.1, 1.0)),
    )


def _points(choose: Chooser, size: Grid) -> Grid:
    form = choose.integer(0, 3)
    if form == 0:
        return size
    if form == 1:
        return (1,) * len(size)
    return tuple(choose.integer(1, s) for s in size)


# --- smaller ones --------------------------------------------------------------------------------------------------------


def simpler(case: Case) -> Iterator[Case]:
    """Cases with one thing less, the largest steps first."""
    for number in range(len(case.kinds)):
        if len(case.kinds) > 1:
            yield replace(case, kinds=case.kinds[:number] + case.kinds[number + 1 :])
    for axis, length in enumerate(case.size):
        for shorter in dict.fromkeys((1, length // 2, length - 1)):
            if 0 < shorter < length:
                yield _resized(case, axis, shorter)
    if len(case.size) > 1:
        for axis in range(len(case.size)):
            if case.size[axis] == 1:
                yield _without(case, axis)
    for name in [f.name for f in fields(Case) if f.name not in ("kinds", "size", "seg", "seed", "relation")]:
        plain = getattr(Case(), name)
        now = getattr(case, name)
        if now != plain:
            yield replace(case, **{name: plain})
            if name in ("classes", "batch") and now - 1 > plain:
                yield replace(case, **{name: now - 1})
    if case.seg != case.size:
        yield replace(case, seg=case.size)
    for number, kind in enumerate(case.kinds):
        for other in _simpler_kinds(kind, case.size):
            yield replace(case, kinds=(*case.kinds[:number], other, *case.kinds[number + 1 :]))
    if case.seed > 9:
        for seed in range(10):
            yield replace(case, seed=seed)
    if case.relation != "same":
        yield replace(case, relation="same")


def _simpler_kinds(kind: Kind, size: Grid) -> Iterator[Kind]:
    for f in fields(Kind):
        if getattr(kind, f.name) != f.default and f.name != "grid":
            yield replace(kind, **{f.name: f.default})
    if kind.grid is not None:
        yield replace(kind, grid=None, shared=False, trace=0.0)
        if kind.grid != size:
            yield replace(kind, grid=size)


def _resized(case: Case, axis: int, length: int) -> Case:
    def cut(grid: Grid, exact: bool) -> Grid:
        return (*grid[:axis], length if exact else min(grid[axis], length), *grid[axis + 1 :])

    kinds = tuple(k if k.grid is None else replace(k, grid=cut(k.grid, k.grid == case.size)) for k in case.kinds)
    return replace(case, size=cut(case.size, True), seg=cut(case.seg, case.seg == case.size), kinds=kinds)


def _without(case: Case, axis: int) -> Case:
    def drop(grid: Grid) -> Grid:
        return grid[:axis] + grid[axis + 1 :]

    kinds = tuple(k if k.grid is None else replace(k, grid=drop(k.grid)) for k in case.kinds)
    return replace(case, size=drop(case.size), seg=drop(case.seg), kinds=kinds)


def shrunk(case: Case, fails: Callable[[Case], bool], budget: int = 400) -> Case:
    """The simplest case found that still fails, in so many tries."""
    tries = 0
    again = True
    while again:
        again = False
        for other in simpler(case):
            if not other.fits():
                continue
            if tries >= budget:
                return case
            tries += 1
            if fails(other):
                case, again = other, True
                break
    return case
