"""A contact sheet: images with their drawings on top, so that what was drawn beside them is seen before anything is learned."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from . import Record, Source
from .classes import IGNORE, KINDS, Classes

_ROWS = 6
_CELL = 240  # pixels along the longer side of a picture
_LINE = 14  # of text
_PAPER = (255, 255, 255)


def draw_sheet(source: Source, but: Container[int] = ()) -> Image.Image | None:
    """Images from all over the source, a row each: as it is, and with each kind of label map. None without any. ``but``: images
    that are left out."""
    kinds = [kind for kind in KINDS.values() if any(kind in source.kinds(index) for index in range(len(source)))]
    having = [index for index in range(len(source)) if source.kinds(index) and index not in but]
    if not having:
        return None
    chosen = [having[place] for place in np.linspace(0, len(having) - 1, min(_ROWS, len(having))).round().astype(int)]
    rows = [_row(source.load(index), kinds, source.classes) for index in chosen]
    width = max(row.width for row in rows)
    legend = _legend(source.classes, width)
    sheet = Image.new("RGB", (width, legend.height + sum(row.height for row in rows)), _PAPER)
    top = 0
    for part in (legend, *rows):
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def save_sheet(path: Path, source: Source, but: Container[int] = ()) -> bool:
    """Whether there was anything to draw."""
    sheet = draw_sheet(source, but)
    if sheet is not None:
        sheet.save(path, compress_level=1)
    return sheet is not None


def _row(record: Record, kinds: list[str], classes: Classes) -> Image.Image:
    step = max(1, max(record.image.shape) // (2 * _CELL))  # large ones need not be painted pixel by pixel
    image = record.image[::step, ::step]
    image = np.broadcast_to(image, (*image.shape[:2], 3))
    pictures = {record.name: image}
    titles = {kind: folder for folder, kind in KINDS.items()}
    for kind in kinds:
        labels = getattr(record, kind)
        labels = None if labels is None else labels[..., ::step, ::step]
        if labels is None or not (labels != IGNORE).any():
            pictures[f"{titles[kind]}: none"] = image
            continue
        painted = image // 2 + 64
        for layer in labels if labels.ndim > 2 else labels[None]:
            here = layer != IGNORE
            painted[here] = image[here] // 3 + classes.paint(layer)[here] // 3 * 2
        pictures[titles[kind]] = painted
    scale = _CELL / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    row = Image.new("RGB", (len(pictures) * (_CELL + 4), size[1] + _LINE + 4), _PAPER)
    for place, (title, pixels) in enumerate(pictures.items()):
        left = place * (_CELL + 4)
        ImageDraw.Draw(row).text((left, 0), _ascii(title)[-36:], fill=(0, 0, 0))
        how = Image.Resampling.BOX if scale < 1 else Image.Resampling.NEAREST
        row.paste(Image.fromarray(np.ascontiguousarray(pixels)).resize(size, how), (left, _LINE))
    return row


def _legend(classes: Classes, width: int) -> Image.Image:
    places: list[tuple[int, int]] = []
    left = top = 0
    lengths = [22 + 6 * len(name) for name in classes.names]  # the default font has 6 pixels a letter
    for length in lengths:
        if left and left + length > width:
            left, top = 0, top + _LINE
        places.append((left, top))
        left += length
    legend = Image.new("RGB", (width, top + _LINE + 6), _PAPER)
    draw = ImageDraw.Draw(legend)
    for (x, y), name, colour in zip(places, classes.names, classes.colours, strict=True):
        draw.rectangle((x + 1, y + 2, x + 11, y + 12), fill=colour, outline=(0, 0, 0))
        draw.text((x + 15, y), _ascii(name), fill=(0, 0, 0))
    return legend


def _ascii(text: str) -> str:
    """What the default font has."""
    return text.encode("latin-1", "replace").decode("latin-1")
