"""Pictures -> ROOT/SPLIT of the `folder` layout.

Positives, or masks: the later shape lies on top. Negatives: of one pixel all are kept, each class in a layer of its own, the
classes in the order of the table from the first layer on. Where nothing is drawn is `IGNORE`; in masks it is the background,
where there is one, but not in an image of negatives alone.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..data.classes import IGNORE, Classes
from ..data.images import MAX_PIXELS, open_image, pixel_limit
from ..data.walk import IMAGE_SUFFIXES
from .source import Picture, Shape, image_file, look_at, upright

_FORMATS = {"JPEG": ".jpg", "MPO": ".jpg", "PNG": ".png", "BMP": ".bmp", "GIF": ".gif", "WEBP": ".webp", "TIFF": ".tif"}


@dataclass(frozen=True)
class Drawing:
    """How label maps are made. kind: "positives" or "masks". left_out: labels whose shapes hide what is below them."""

    classes: Classes
    kind: str
    background: str | None = None
    left_out: frozenset[str] = frozenset()
    link: bool = False
    stored: bool = False
    max_pixels: int = MAX_PIXELS

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes.names)}


@dataclass
class Written:
    """What has been written. counts: (class index, kind) -> images, shapes, pixels. resaved: names of images that were.
    blank: names of images that were left out, since their shapes leave all of it unknown. missed: shapes without a pixel."""

    images: int = 0
    missed: int = 0
    blank: list[str] = field(default_factory=list)
    counts: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    resaved: list[str] = field(default_factory=list)
    contradicted: Counter[str] = field(default_factory=Counter)

    def add(self, other: Written) -> None:
        self.images += other.images
        self.missed += other.missed
        self.blank += other.blank
        for key, values in other.counts.items():
            self.counts[key] = self.counts.get(key, np.zeros(3, np.int64)) + values
        self.resaved += other.resaved
        self.contradicted += other.contradicted


def write_split(pictures: Sequence[Picture], drawing: Drawing, folder: Path) -> Written:
    """images/, and positives/ or masks/, and negatives/, of all pictures."""
    written = Written()
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        done = pool.map(partial(_write, drawing=drawing, folder=folder), pictures)
        for one in tqdm(done, f"writing {folder.name}", len(pictures), leave=False, disable=None):
            written.add(one)
    return written


def _write(picture: Picture, drawing: Drawing, folder: Path) -> Written:
    top, layers, missed = label_maps(picture, drawing)
    if not layers and (top == IGNORE).all():
        return Written(missed=missed, blank=[picture.name])
    written = Written(images=1, missed=missed)
    if _write_image(picture, drawing, folder / "images"):
        written.resaved.append(picture.name)
    for number, layer in enumerate(layers):
        _save(layer, folder / "negatives" / f"{picture.name}{f'.{number}' if number else ''}.png", drawing.classes)
    if (top != IGNORE).any():
        _save(top, folder / drawing.kind / f"{picture.name}.png", drawing.classes)
    for kind, maps, negative in ((drawing.kind, [top], False), ("negatives", layers, True)):
        shapes = Counter(shape.label for shape in picture.shapes if shape.negative == negative)
        pixels = sum((np.bincount(one.ravel(), minlength=256) for one in maps), np.zeros(256, np.int64))
        for name, label in drawing.index.items():
            if shapes[name] or pixels[label]:
                written.counts[label, kind] = np.array([1, shapes[name], pixels[label]])
    same = {label for layer in layers for label in np.unique(layer[layer == top])} - {IGNORE}
    written.contradicted.update(drawing.classes.names[label] for label in same)
    return written


def label_maps(picture: Picture, drawing: Drawing) -> tuple[np.ndarray, list[np.ndarray], int]:
    """(H, W) uint8 classes of the positives or the mask; the layers of negatives, each (H, W); the shapes without a pixel."""
    index = drawing.index
    dense = drawing.kind == "masks" and not (picture.shapes and all(shape.negative for shape in picture.shapes))
    fill = index[drawing.background] if drawing.background and dense else IGNORE
    top = np.full(picture.size, fill, np.uint8)
    excluded: dict[int, np.ndarray] = {}
    missed = 0
    for shape in picture.shapes:
        if not shape.negative:
            missed += not _paint(top, shape, IGNORE if shape.label in drawing.left_out else index[shape.label])
        elif shape.label not in drawing.left_out:
            missed += not _paint(excluded.setdefault(index[shape.label], np.zeros(picture.size, bool)), shape, True)
    depth = np.zeros(picture.size, np.uint8)  # classes that are excluded here so far
    layers: list[np.ndarray] = []
    for label, where in sorted(excluded.items()):
        for number in np.unique(depth[where]):
            if number == len(layers):
                layers.append(np.full(picture.size, IGNORE, np.uint8))
            layers[number][where & (depth == number)] = label
        depth += where
    return top, layers, missed


def _paint(canvas: np.ndarray, shape: Shape, value: int | bool) -> bool:
    """Whether the shape has a pixel inside."""
    found = False
    for part in shape.parts:
        rows, columns, mask = part.region((canvas.shape[0], canvas.shape[1]))
        canvas[rows, columns][mask] = value
        found |= bool(mask.any())
    return found


def _save(labels: np.ndarray, path: Path, classes: Classes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(classes.encode(labels)).save(path)


def _write_image(picture: Picture, drawing: Drawing, folder: Path) -> bool:
    """Byte for byte, or as a link; True: as an upright PNG, since a tag turned it or its format is not read in training."""
    with pixel_limit(drawing.max_pixels):
        _, kind, turned = look_at(picture.image, stored=drawing.stored)
    embedded = picture.image.suffix.lower() == ".json"
    suffix = _FORMATS.get(kind, "") if embedded else picture.image.suffix
    path = folder / f"{picture.name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    if turned or suffix.lower() not in IMAGE_SUFFIXES:
        with pixel_limit(drawing.max_pixels), open_image(image_file(picture.image), picture.image) as image:
            result = upright(image, stored=drawing.stored)
        if result.mode in ("CMYK", "YCbCr", "HSV", "LAB"):  # which PNG has not
            result = result.convert("RGB")
        result.save(path.with_name(f"{path.name.removesuffix(suffix)}.png"))
        return True
    content = image_file(picture.image)
    if not isinstance(content, Path):
        path.write_bytes(content.getvalue())
    elif drawing.link:
        path.symlink_to(content.resolve())
    else:
        shutil.copyfile(content, path)
    return False


def paths_of(pictures: Sequence[Picture]) -> Iterator[str]:
    """The names of all label maps that could be, without suffix; one that is there twice cannot be told apart."""
    for picture in pictures:
        yield picture.name
        labels = {shape.label for shape in picture.shapes if shape.negative}
        yield from (f"{picture.name}.{number}" for number in range(1, len(labels)))
