"""labelme: one .json beside each image.

    {"imagePath": "a.jpg", "imageData": null or base64, "imageHeight": 4, "imageWidth": 6,
     "shapes": [{"label": "car", "shape_type": "polygon", "points": [[x, y], ...], "flags": {"negative": true}, "mask": null}]}

Source: https://github.com/wkentaro/labelme, `_label_file.py`, `_shape.py` and `_utils/shape.py` (version 7). Points are (x,
y) from the corner of the image. "mask" is a base64 PNG whose first pixel is the first point, rounded; where both points are
integers, its last is the second.
"""

from __future__ import annotations

import base64
import io
import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..data.images import open_image
from .geometry import Geometry, Polygon, Runs, Stroke, as_points, ellipse, rectangle
from .source import Entry, Export, Picture, Source, read_json

_TYPES = "polygon, rectangle, oriented_rectangle, circle, line, linestrip, point and mask"


def read(source: Source) -> Export:
    files = source.files(".json", "labelme's .json files")
    return Export([Entry(str(path), partial(_picture, source, name, path)) for name, path in files.items()])


def _picture(source: Source, name: str, path: Path) -> Picture:
    content = read_json(path)
    shapes = content["shapes"]
    try:
        image = source.find_image(content["imagePath"], path.parent)
    except FileNotFoundError:
        if not content.get("imageData"):
            raise
        image = path
    recorded = content.get("imageHeight"), content.get("imageWidth")
    size = source.size(image, None if None in recorded else recorded)
    drawn = (source.shape(shape["label"], [_geometry(source, shape)], shape.get("flags")) for shape in shapes)
    return Picture(name, image, size, tuple(drawn), str(path))


def _geometry(source: Source, shape: dict[str, Any]) -> Geometry:
    kind, points = shape.get("shape_type") or "polygon", as_points(shape["points"])
    needed = {"polygon": 3, "oriented_rectangle": 4, "rectangle": 2, "circle": 2, "line": 2, "mask": 2}.get(kind, 1)
    if len(points) < needed:
        raise ValueError(f"expected {needed} points or more of a {kind}, got {len(points)} ({shape['label']!r})")
    if kind in ("polygon", "oriented_rectangle") or (kind == "rectangle" and len(points) == 4):
        return Polygon(points)
    if kind == "rectangle":
        return rectangle(*points.min(0), *points.max(0))
    if kind == "circle":
        (x, y), radius = points[0], math.dist(points[0], points[1])
        return ellipse(x, y, radius, radius)
    if kind in ("line", "linestrip", "point"):
        return Stroke(points, source.line_width)
    if kind == "mask":
        return _mask(shape["mask"], points)
    raise ValueError(f"expected shapes of type {_TYPES}, got {kind!r} ({shape['label']!r}); draw it as one of these")


def _mask(encoded: str, points: np.ndarray) -> Runs:
    try:
        with open_image(io.BytesIO(base64.b64decode(encoded)), "its mask") as image:
            mask = np.asarray(image) > 0
    except Exception as error:  # as of any image
        raise ValueError(f"expected a mask as a base64 PNG, got one that cannot be read ({error})") from error
    if mask.ndim != 2:
        raise ValueError(f"expected a mask of one channel, got {mask.shape}")
    (left, top), (right, bottom) = points.round().astype(int)
    if (points == points.round()).all():
        mask = mask[: max(bottom - top + 1, 0), : max(right - left + 1, 0)]
    if not mask.size:
        raise ValueError("expected a mask with pixels, got an empty one")
    return Runs.of(mask, int(top), int(left))
