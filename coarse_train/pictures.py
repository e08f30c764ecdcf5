"""Pictures to look at: label maps over their image, with a legend; matrices with the names of their classes.

By PIL rather than matplotlib, which takes 0.3 s for what takes 0.02 s here, and blurs images that have the size they should.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .data import IGNORE, Classes

_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_BLUE = np.array((0, 114, 178))  # of Okabe and Ito; a matrix goes from white to it
_GAP, _LINE = 8, 20  # pixels between things, and for a line of text
_LEAST = 200  # width of a panel in pixels, so that its title has room; small images are enlarged
_IN_A_ROW = 3
_LONGEST = 180  # pixels of a name


def overlay(image: np.ndarray, labels: np.ndarray, classes: Classes, opacity: float = 0.5) -> np.ndarray:
    """The image in grey under the colours of its classes, which a coloured one would change; their borders are drawn in full.
    Where nothing is drawn (`IGNORE`) it is the image.

    Args: image (H, W, 1 or 3) uint8, labels (H, W) uint8 classes; opacity from 0, the image, to 1, the colours.
    Shape: -> (H, W, 3) uint8.
    """
    colour = np.broadcast_to(image, (*labels.shape, 3))
    grey = colour @ np.array((0.299, 0.587, 0.114))  # luma of ITU-R BT.601, as PIL has it
    strength = np.where(_borders(labels), max(opacity, min(1.0, 2 * opacity)), opacity)[..., None]
    mixed = (1 - strength) * grey[..., None] + strength * classes.paint(labels)
    kept = (labels == IGNORE)[..., None] if opacity > 0 else True
    return np.where(kept, colour, mixed.round().astype(np.uint8))


def _borders(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels beside one of another class, below or to the right."""
    found = np.zeros(labels.shape, bool)
    found[:-1] |= labels[:-1] != labels[1:]
    found[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    return found


def draw_maps(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    classes: Classes,
    *,
    title: str = "",
    opacity: float = 0.5,
    largest: int | None = None,
) -> Image.Image:
    """The image, and beside it the image under each of ``maps`` (title -> (H, W) uint8 classes), three in a row; below them a
    legend of the classes that occur.

    ``image``: (H, W, 1 or 3) uint8. ``largest``: pixels of the longer side of a panel at most; without it every pixel is
    kept. Small images are enlarged by a whole number.
    """
    height, width = image.shape[:2]
    panels = {"image": np.broadcast_to(image, (height, width, 3))}
    panels |= {name: overlay(image, labels, classes, opacity) for name, labels in maps.items()}
    factor = max(1, _LEAST // max(height, width)) if largest is None else min(1.0, largest / max(height, width))
    if factor == 1.0 and largest is not None:
        factor = max(1, min(_LEAST, largest) // max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    columns, across = min(len(panels), _IN_A_ROW), max(size[0], _LEAST) + _GAP
    rows, down = -(-len(panels) // columns), size[1] + _LINE + _GAP
    occurring = {int(label) for labels in maps.values() for label in np.unique(labels)} - {IGNORE}
    entries = [(classes.colours[label], classes.names[label]) for label in sorted(occurring)]
    total = columns * across + _GAP
    places, legend = _flow([name for _, name in entries], total)
    top = _LINE + _GAP if title else _GAP // 2
    canvas = Image.new("RGB", (total, top + rows * down + legend), _PAPER)
    pen = ImageDraw.Draw(canvas)
    _write(pen, (_GAP, _GAP // 2), title, total - 2 * _GAP, bold=True)
    resampling = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    for number, (name, pixels) in enumerate(panels.items()):
        x, y = _GAP + number % columns * across, top + number // columns * down
        _write(pen, (x, y), name, across - _GAP)
        canvas.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, resampling), (x, y + _LINE))
    for (colour, name), (x, y) in zip(entries, places, strict=True):
        y += top + rows * down
        pen.rectangle((x, y + 2, x + 13, y + 15), colour, _INK)
        _write(pen, (x + 20, y), name, _LONGEST)
    return canvas


def _flow(names: Sequence[str], width: int) -> tuple[list[tuple[int, int]], int]:
    """Where the entries of a legend stand, line after line, and the height of all."""
    places, x, y = [], _GAP, 0
    for name in names:
        wide = 20 + min(_LONGEST, _width(name)) + 2 * _GAP
        if x > _GAP and x + wide > width:
            x, y = _GAP, y + _LINE
        places.append((x, y))
        x += wide
    return places, y + _LINE + _GAP // 2 if names else 0


def draw_matrix(matrix: np.ndarray, names: Sequence[str], *, title: str, rows: str, columns: str) -> Image.Image:
    """A matrix of shares with its numbers in percent; what is NaN is a dash.

    ``matrix``: (C, C) from 0 to 1; ``rows``, ``columns``: what they are.
    """
    cell, left = 34, _GAP + min(_LONGEST, max(map(_width, names))) + _GAP
    top = 3 * _LINE + left
    words = [title, f"rows: {rows}; columns: {columns}; in percent"]
    size = (
        max(left + cell * len(names), _width(words[0], True), _width(words[1])) + 2 * _GAP,
        top + cell * len(names) + _GAP,
    )
    canvas = Image.new("RGB", size, _PAPER)
    pen = ImageDraw.Draw(canvas)
    for number, line in enumerate(words):
        _write(pen, (_GAP, _GAP // 2 + number * _LINE), line, size[0], bold=number == 0)
    for index, name in enumerate(names):
        _write(pen, (_GAP, top + index * cell + cell // 2 - 8), name, _LONGEST)
        upright = Image.new("RGB", (left - _GAP, _LINE), _PAPER)
        _write(ImageDraw.Draw(upright), (0, 0), name, _LONGEST)
        canvas.paste(upright.rotate(90, expand=True), (left + index * cell + cell // 2 - _LINE // 2, 3 * _LINE))
    for row, column in np.ndindex(*matrix.shape):
        share = float(matrix[row, column])
        known = 0.0 if np.isnan(share) else min(max(share, 0.0), 1.0)
        x, y = left + column * cell, top + row * cell
        colour = tuple((255 + (_BLUE - 255) * known).round().astype(int).tolist())
        pen.rectangle((x, y, x + cell - 2, y + cell - 2), colour)
        text = "-" if np.isnan(share) else f"{100 * share:.0f}"
        pen.text((x + cell / 2 - 1, y + cell / 2 - 1), text, _PAPER if known > 0.75 else _INK, _font(), anchor="mm")
    return canvas


def _write(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, wide: int, *, bold: bool = False) -> None:
    """One line, cut where it is too wide."""
    text = " ".join(text.split())
    if _width(text, bold) > wide:
        while text and _width(text + "…", bold) > wide:
            text = text[:-1]
        text += "…"
    pen.text(at, text, _INK, _font(bold))


def _width(text: str, bold: bool = False) -> int:
    return int(_font(bold).getlength(" ".join(text.split()))) + 1


@cache
def _font(bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along: Latin, Greek, Cyrillic and more."""
    from matplotlib import get_data_path  # in here: its import takes longer than a picture

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", f"DejaVuSans{'-Bold' * bold}.ttf")), 13)
