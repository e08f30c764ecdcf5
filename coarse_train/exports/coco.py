"""COCO: one .json with images, categories and annotations.

    {"images": [{"id": 1, "file_name": "a.jpg", "height": 4, "width": 6}], "categories": [{"id": 1, "name": "car"}],
     "annotations": [{"image_id": 1, "category_id": 1, "bbox": [x, y, width, height], "attributes": {"negative": true},
                      "segmentation": [[x, y, x, y, ...], ...] or {"size": [height, width], "counts": [...] or "..."}}]}

Source: https://cocodataset.org/#format-data and `maskApi.c` of cocoapi: points are (x, y) from the corner of the image; run
lengths go down the columns, and as text each is a number of 5 bits a character from "0" on, lowest first, sign in the last,
from the third on the difference to the one before the last. An annotation without a segmentation is its box. "attributes"
is what CVAT and datumaro add. Tested against pycocotools, which is not used on files of strangers: 2.0.11 ends with a
segmentation fault at a polygon's corner far from the image, and returns memory that it never wrote where counts are too
few. Splits are told by the name of the file (instances_val2017.json) or of its folder.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .geometry import Geometry, Polygon, Runs, as_points, rectangle
from .source import Entry, Export, Picture, Source, read_json, safe_name, split_called


def read(source: Source) -> Export:
    entries: list[Entry] = []
    names: dict[str, None] = {}
    for path in source.files(".json", "a COCO file, such as instances_default.json").values():
        content = read_json(path)
        if not isinstance(content, dict) or not {"images", "annotations", "categories"} <= content.keys():
            raise ValueError(f"{path}: expected a COCO file with images, annotations and categories, got another JSON")
        categories = {category["id"]: category["name"] for category in content["categories"]}
        names |= dict.fromkeys(categories.values())
        annotations = defaultdict(list)
        for annotation in content["annotations"]:
            annotations[annotation["image_id"]].append(annotation)
        lost = sorted(annotations.keys() - {image["id"] for image in content["images"]}, key=str)
        if lost:
            raise ValueError(f"{path}: expected an image for every annotation, got none with id {lost[0]}")
        for image in content["images"]:
            read_one = partial(_picture, source, path, image, annotations[image["id"]], categories)
            entries.append(Entry(f"{path}, image {image.get('file_name')!r}", read_one))
    return Export(entries, tuple(names))


def _picture(
    source: Source, path: Path, image: dict[str, Any], annotations: list[dict[str, Any]], categories: dict[Any, str]
) -> Picture:
    name = image["file_name"]
    base = path.parent
    found = source.find_image(name, base, base / "images", base.parent / "images", base.parent / "images" / "default")
    size = source.size(found, (image["height"], image["width"]))
    shapes = []
    for annotation in annotations:
        if annotation["category_id"] not in categories:
            raise ValueError(f"expected a category of {sorted(categories)}, got {annotation['category_id']!r}")
        parts = _parts(annotation, size)
        shapes.append(source.shape(categories[annotation["category_id"]], parts, annotation.get("attributes")))
    split = split_called(path.stem.removeprefix("instances_")) or split_called(base.name)
    return Picture(safe_name(name), found, size, tuple(shapes), f"{path}, image {name!r}", split)


def _parts(annotation: dict[str, Any], size: tuple[int, int]) -> list[Geometry]:
    outline = annotation.get("segmentation")
    if isinstance(outline, dict):
        if tuple(outline["size"]) != size:
            raise ValueError(f"expected run lengths of height and width {list(size)}, got {outline['size']}")
        counts = outline["counts"]
        runs = decode_counts(counts) if isinstance(counts, str) else np.array(counts)
        return [Runs(runs, size, by_columns=True)]
    if outline:
        return [Polygon(as_points(points)) for points in outline]
    x, y, width, height = annotation["bbox"]
    return [rectangle(x, y, x + width, y + height)]


def decode_counts(text: str) -> np.ndarray:
    """Run lengths that are compressed into a text, as above."""
    counts: list[int] = []
    value = shift = 0
    for character in text.encode("ascii"):
        value |= (character - 48 & 0x1F) << shift
        shift += 5
        if shift > 60 or not 48 <= character < 112:
            raise ValueError("expected compressed run lengths, got a text that is something else")
        if not character - 48 & 0x20:  # the last of this number
            value -= (character - 48 & 0x10) << shift - 4  # its sign
            counts.append(value + counts[-2] if len(counts) > 2 else value)
            value = shift = 0
    if shift:
        raise ValueError("expected compressed run lengths, got a text that ends within a number")
    return np.array(counts, np.int64)
