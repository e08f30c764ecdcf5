"""`coarse-train pen`: how far outlines of positive drawings are off, measured on images that have a drawing and a dense mask.

OUT/pen.json    radii for `--positive.pen OUT/pen.json`, and all that was measured
OUT/pen.png     drawings before and after, and how likely a pixel is drawn over its distance to the object
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from .. import is_background
from ..data import open_split
from ..data.classes import Classes
from ..data.segmentation import pairs_of
from ..pen import LARGEST, Leftover, PenReport, leftovers, measure, to_json, undo
from ..run import look_at_folder, make_folder, write_text
from .options import DrawnData

_DOUBTS = (1.0, 2.0)
_SHOWN = 3  # pairs in the picture


@dataclass(frozen=True)
class PenConfig(DrawnData):
    """Measure how far outlines of positive drawings are off, where images have a drawing and a dense mask."""

    simulate: str | None = None
    """Draw what is lacking from the masks at this level: scribble, spots, sketch, coarse or full."""
    split: str = "train"
    """train, val or test."""
    images: int | None = None
    """At most so many images that have both (the first): their masks, and no others, are looked at."""
    each: bool = False
    """Write a pen.json that moves each image by what its own strokes say, for a brush that differs between images."""
    seed: int = 0
    """Of simulated drawings."""
    out: Path = Path("runs/pen")
    """Folder to write: pen.json and pen.png."""
    overwrite: bool = False
    """Replace them."""


def run_pen(config: PenConfig) -> PenReport:
    """Measure, print, write. Raises ValueError where no image has both a mask and a drawing."""
    look_at_folder("out", config.out, overwrite=config.overwrite)
    if config.images is not None and not 1 <= config.images <= sys.maxsize:
        raise ValueError(f"images: expected a number from 1 to {sys.maxsize}, got {config.images}")
    data = config.data_config(simulate=config.simulate)
    source = open_split(data, config.split)
    masks = [index for index in range(len(source)) if "mask" in source.kinds(index)]
    drawn = sum("positive" in source.kinds(index) for index in masks)
    if config.simulate is not None and drawn:
        if drawn == len(masks):
            raise ValueError("simulate: expected masks that lack positive drawings, but all have them; leave it out")
        print(
            f"note: {drawn} of {len(masks)} images with a mask have a drawing of their own, and none is simulated for them"
        )

    def pairs(most: int | None) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        return islice(pairs_of(source, data, config.seed, range(len(source))), most)

    report = measure(pairs(config.images), source.classes.names)
    print(table(report))
    pen, names = report.pen(each=config.each), source.classes.names
    if pen.moves:
        print(doubt_line(leftovers(pairs(config.images), pen, names, (0.0, *_DOUBTS))))
    make_folder("out", config.out)
    shown = _SHOWN if config.images is None else min(_SHOWN, config.images)
    save_picture(config.out / "pen.png", report, list(pairs(shown)), source.classes, each=config.each)
    write_text(config.out / "pen.json", to_json(report, each=config.each))
    print(f"{config.out / 'pen.json'}, {config.out / 'pen.png'}")
    return report


def table(report: PenReport) -> str:
    """A line for each class, then what the columns are and what is to be thought of them."""
    wide = max(map(len, (*report.names, "class")))
    lines = [
        f"{'class':<{wide}}{'radius':>8}{'spread':>8}{'undo':>6}{'missed':>8}{'added':>7}{'undone':>8}{'pairs':>7}"
        "  without one pair"
    ]
    few = []
    for name, one, undone in zip(report.names, report.classes, report.radii(), strict=True):
        if one.radius is None:
            lines.append(f"{name:<{wide}}{'-':>8}{'':>44}  {_why(name, one.pairs, report.together.move)}")
            continue
        others = sorted({"none" if other is None else f"{other:+d}" for other in one.without} - {f"{one.radius:+d}"})
        if one.few:
            few.append(name)
        edge = "at least" if one.radius == LARGEST else "at most" if one.radius == -LARGEST else ""
        lines.append(
            f"{name:<{wide}}{one.radius:>+8d}{one.spread:>8.1f}{undone:>+6.0f}{one.missed:>8.2f}{one.added:>7.2f}"
            f"{one.undone:>8.2f}{one.pairs:>7d}  {', '.join(others) if others else 'the same'}{edge and f'; {edge} this'}"
        )
    lines.append(
        f"{len(report.images)} images with a drawing and a mask. Radius: pixels that outlines reach too far (below 0: not far "
        "enough), the median; spread: standard deviation; undo: what --positive.pen moves back, 0 where that mends less than a "
        "quarter; missed, added: area that is wrong, in parts of the objects' own; undone: both, expected after moving back."
    )
    for name, one in zip(report.names, report.classes, strict=True):
        if name in report.differing:
            lines.append(
                f"The pen of {name} differs between images: of each pair, by what the others say, {one.undone_one:.2f} is "
                f"wrong after moving back by one radius, {one.undone_each:.2f} by what its own thinnest strokes say: "
                "--positive.pen image, or --each here."
            )
    if few:
        lines.append(
            f"Too few pairs to be sure of {', '.join(few)}: fewer than two, or one pair less gives another radius. They are "
            f"moved as all classes together, {report.together.move:+d}."
        )
    return "\n".join(lines)


def doubt_line(found: Sequence[Leftover]) -> str:
    """Of what `leftovers` finds without any doubt, and with one and two pixels."""
    before, *after = found
    told = "; ".join(
        f"--positive.doubt {doubt:g}: {one.wrong:.3f}, and {one.objects:.0%} of objects and {one.background:.0%} of "
        "background say nothing"
        for doubt, one in zip(_DOUBTS, after, strict=True)
    )
    return f"Still wrong, names included, in parts of the objects' area: {before.wrong:.3f}; {told}."


def _why(name: str, pairs: int, together: int) -> str:
    if is_background(name):
        return "no outlines of its own"
    return "drawings do not follow the masks" if pairs else f"in no pair: as all others together, {together:+d}"


def _as_it_is(name: str) -> str:
    """For matplotlib, which takes what is between two $ for a formula, and no bytes that are not UTF-8."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def save_picture(
    path: Path,
    report: PenReport,
    pairs: Sequence[tuple[str, np.ndarray, np.ndarray]],
    classes: Classes,
    *,
    each: bool = False,
) -> None:
    """``pairs``: name, drawing, mask."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of every command's start
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 2.6 * len(pairs) + 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = np.asarray(figure.subfigures(2, 1, height_ratios=(2.6 * len(pairs), 3.2)))
    axes = above.subplots(len(pairs), 4, squeeze=False)
    pen = report.pen(each=each)
    for row, (name, drawing, mask) in zip(axes, pairs, strict=True):
        after = undo(drawing, pen)
        wrong = np.where((after != mask)[..., None], np.array([213, 94, 0], np.uint8), classes.paint(mask) // 4 + 190)
        panels = {"drawing": drawing, "moved back": after, "dense mask": mask}
        pictures = [classes.paint(labels) for labels in panels.values()]
        titles = [*panels, "orange: moved back, still not the mask"]
        for axis, title, picture in zip(row, titles, [*pictures, wrong], strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(title if title != "drawing" else f"{_as_it_is(name)}: drawing", fontsize=9)
    axis = below.subplots()
    radii = np.arange(-LARGEST, LARGEST + 2)
    for index, (name, one) in enumerate(zip(report.names, report.classes, strict=True)):
        if one.radius is not None:
            colour = np.array(classes.colours[index]) / 255
            axis.step(
                radii, one.drawn, where="mid", color=colour.tolist(), label=f"{_as_it_is(name)} ({one.radius:+d})"
            )
    axis.axvline(0.5, color="0.6", linewidth=0.8)
    axis.set_xlabel("pixels from the object's outline: inside up to 0, outside from 1")
    axis.set_ylabel("p(drawn)")
    axis.spines[["top", "right"]].set_visible(False)
    if any(one.radius is not None for one in report.classes):
        axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
