"""Label Studio: the export called JSON, a list of tasks.

    [{"id": 1, "data": {"image": "/data/upload/1/1a2b3c4d-a.jpg"}, "annotations": [{"was_cancelled": false, "result": [
      {"id": "x", "type": "polygonlabels", "original_width": 6, "original_height": 4, "image_rotation": 0,
       "value": {"points": [[x, y], ...], "polygonlabels": ["car"]}},
      {"id": "x", "type": "choices", "value": {"choices": ["negative"]}}]}]}]

Sources: https://labelstud.io/guide/task_format, https://labelstud.io/tags/ (rectanglelabels, ellipselabels, polygonlabels,
brushlabels, keypointlabels) and `converter/` of label-studio-sdk. x, width and radiusX are in percent of the image's width,
y, height and radiusY of its height; rectangles turn clockwise about their first corner, ellipses about their centre. A
brush's "rle" is a stream of bits, of RGBA pixels row by row; a pixel is drawn where alpha is above 0. Results of one id are
one region: <Labels> and <Rectangle> give two, a <Choices perRegion> one more. Of several annotations the last counts that
is not cancelled, one marked as ground truth before it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import partial
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from .geometry import Geometry, Polygon, Runs, Size, Stroke, as_points, ellipse, rectangle
from .source import Entry, Export, Picture, Shape, Source, read_json, safe_name


def read(source: Source) -> Export:
    entries = []
    several = 0
    for path in source.files(".json", "the .json of Label Studio's export 'JSON'").values():
        tasks = read_json(path)
        if not isinstance(tasks, list) or not all(isinstance(task, dict) and "annotations" in task for task in tasks):
            raise ValueError(
                f"{path}: expected Label Studio's export 'JSON', got another one (JSON-MIN?); export as JSON"
            )
        for number, task in enumerate(tasks):
            done = [one for one in task["annotations"] if not one.get("was_cancelled")]
            several += len(done) > 1
            chosen = next(
                (one for one in reversed(done) if one.get("ground_truth")), done[-1] if done else {"result": []}
            )
            where = f"{path}, task {task.get('id', number)}"
            entries.append(Entry(where, partial(_picture, source, task, chosen["result"], where)))
    notes = (
        (f"{several} images have several annotations: the last one, or the ground truth, was read",) if several else ()
    )
    return Export(entries, notes=notes)


def _picture(source: Source, task: dict[str, Any], results: list[dict[str, Any]], where: str) -> Picture:
    recorded = _image_path(task["data"])
    original = re.sub(
        r"(^|/)[0-9a-f]{8}-(?=[^/]+$)", r"\1", recorded
    )  # an upload gets eight digits in front of its name
    try:
        image = source.find_image(recorded)
    except FileNotFoundError:
        image, recorded = source.find_image(original), original
    sizes = {(one["original_height"], one["original_width"]) for one in results if one.get("original_width")}
    size = source.size(image, None)
    for there in sorted(sizes):
        source.size(image, there)
    regions: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in results:
        if one.get("image_rotation"):
            raise ValueError(
                f"expected image_rotation 0, got {one['image_rotation']}; turn the image before it is drawn on"
            )
        if "id" in one and isinstance(one.get("value"), dict):
            regions[one["id"]].append(one)
    shapes = [shape for parts in regions.values() for shape in _shapes(source, parts, size)]
    return Picture(safe_name(recorded), image, size, tuple(shapes), where)


def _image_path(data: dict[str, Any]) -> str:
    """The path in the URL of a task's image."""
    texts = [value for value in (data.get("image"), *data.values()) if isinstance(value, str)]
    if not texts:
        raise ValueError(f"expected the image's address in 'data', got {sorted(data)}")
    url = urlsplit(texts[0])
    inside = parse_qs(url.query).get("d")  # /data/local-files/?d=folder/a.jpg
    path = inside[0] if inside else unquote(url.path)
    return (
        re.sub(r"^/?data/upload/(\d+/)?", "", path)
        if inside or url.path.startswith("/data/")
        else path.rsplit("/", 1)[-1]
    )


def _shapes(source: Source, parts: list[dict[str, Any]], size: Size) -> list[Shape]:
    """One region: its geometry, for each of its labels."""
    value = {key: item for one in parts for key, item in one["value"].items()}
    geometry = _geometry(source, value, size)
    if geometry is None:  # choices, texts and ratings about the image as a whole
        return []
    labels = next((item for key, item in value.items() if key.endswith("labels")), None)
    flags = {choice: True for one in parts for choice in one["value"].get("choices", [])}
    return [source.shape(label, [geometry], flags) for label in labels or [None]]


def _geometry(source: Source, value: dict[str, Any], size: Size) -> Geometry | None:
    height, width = size
    scale = np.array([width, height]) / 100
    if "rle" in value:
        return decode_brush(value["rle"], size)
    if "points" in value:
        return Polygon(as_points(value["points"]) * scale)
    if "x" not in value:
        if any(key.endswith("labels") for key in value):
            raise ValueError(f"expected a polygon, rectangle, ellipse, brush or key point, got {sorted(value)}")
        return None
    x, y = corner = as_points([value["x"], value["y"]])[0] * scale
    turn = float(value.get("rotation") or 0)
    if "radiusX" in value:
        return ellipse(x, y, value["radiusX"] * scale[0], value["radiusY"] * scale[1], turn)
    if "height" in value:
        return rectangle(x, y, x + value["width"] * scale[0], y + value["height"] * scale[1], turn, corner)
    return Stroke(corner[None], source.line_width)


def decode_brush(data: Any, size: Size) -> Runs:
    """The bits: 32 for the number of bytes, 5 for the bits of a byte less 1, four times 4 for the bits of a length less 1; then
    blocks of 1 for "one byte, repeated", 2 for which kind of length, the length less 1, and the byte, or as many bytes as the
    length. (https://github.com/thi-ng/umbrella, packages/rle-pack.)
    """
    try:
        octets = bytes(list(data))
        bits = f"{int.from_bytes(octets, 'big'):0{8 * len(octets)}b}"
        position = 0

        def take(count: int) -> int:
            nonlocal position
            position += count
            return int(bits[position - count : position], 2)

        total, word = take(32), take(5) + 1
        lengths = [take(4) + 1 for _ in range(4)]
        if total != 4 * size[0] * size[1]:
            raise ValueError(f"{total} bytes")
        values: list[int] = []
        counts: list[int] = []
        done = 0
        while done < total:
            repeated = take(1)
            count = take(lengths[take(2)]) + 1
            done += count
            values += [take(word)] if repeated else [take(word) for _ in range(count)]
            counts += [count] if repeated else [1] * count
    except (TypeError, ValueError) as error:
        wanted = f"a brush's rle of {size[1]}x{size[0]} RGBA pixels"
        raise ValueError(f"expected {wanted}, got one that is damaged or of another size ({error})") from error
    pixels = np.repeat(np.array(values) > 0, counts)[:total]
    return Runs.of(pixels.reshape(*size, 4)[..., 3])
