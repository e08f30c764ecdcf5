"""Drawings as each annotation tool exports them, by the formats that the modules of `coarse_train.exports` cite."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from coarse_train.data.classes import IGNORE

SIZE = (12, 16)  # height, width
FORMS = ("polygon", "box", "mask")
TOOLS = ("labelme", "coco", "cvat", "voc", "labelstudio")
IMAGES = {"labelme": ".", "coco": "images", "cvat": "images", "voc": "JPEGImages", "labelstudio": "."}  # in an export


class Box(NamedTuple):
    label: str
    x0: int
    y0: int
    x1: int
    y1: int
    negative: bool = False

    @property
    def corners(self) -> list[tuple[int, int]]:
        return [(self.x0, self.y0), (self.x1, self.y0), (self.x1, self.y1), (self.x0, self.y1)]

    def mask(self, size: tuple[int, int] = SIZE) -> np.ndarray:
        mask = np.zeros(size, bool)
        mask[self.y0 : self.y1, self.x0 : self.x1] = True
        return mask


# the car lies on the road; two negatives overlap, one told by its label and one by a flag
BOXES = (
    Box("road", 2, 1, 10, 7),
    Box("car", 8, 5, 14, 11),
    Box("not car", 0, 0, 6, 4),
    Box("road", 4, 2, 12, 10, True),
)


def expected() -> tuple[np.ndarray, np.ndarray]:
    """(H, W) and (2, H, W): what `BOXES` are in the folder; road is class 0, car 1."""
    positive = np.full(SIZE, IGNORE, np.uint8)
    positive[1:7, 2:10] = 0
    positive[5:11, 8:14] = 1
    negative = np.full((2, *SIZE), IGNORE, np.uint8)
    negative[0, 0:4, 0:6] = 1
    negative[0, 2:10, 4:12] = 0
    negative[1, 2:4, 4:6] = 1
    return positive, negative


def photo(seed: int = 0, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def save_photo(path: Path, pixels: np.ndarray | None = None, orientation: int = 1) -> Path:
    """orientation: of the EXIF tag; ``pixels`` are as stored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if orientation != 1:
        exif[0x0112] = orientation
    Image.fromarray(photo() if pixels is None else pixels).save(path, exif=exif)
    return path


def png_base64(values: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def runs(flat: np.ndarray) -> list[int]:
    """Run lengths, of zeros first."""
    ends = [*np.flatnonzero(np.diff(flat.astype(int))) + 1, len(flat)]
    counts = np.diff([0, *ends]).tolist()
    return [0, *counts] if flat[0] else counts


def brush_rle(mask: np.ndarray) -> list[int]:
    """As Label Studio's brush: RGBA, the runs that it writes (type 3: 16 bits, type 0: 3 bits), and some bytes as they are."""
    alpha = np.zeros((*mask.shape, 4), np.uint8)
    alpha[mask] = (1, 2, 3, 255)
    flat = alpha.ravel()
    bits = f"{len(flat):032b}" + f"{7:05b}" + "".join(f"{size - 1:04b}" for size in (3, 4, 8, 16))
    position = 0
    while position < len(flat):
        count = 1
        while position + count < len(flat) and flat[position + count] == flat[position]:
            count += 1
        if count == 1:  # eight bytes as they are
            block = flat[position : position + 8]
            bits += "0" + "00" + f"{len(block) - 1:03b}" + "".join(f"{value:08b}" for value in block)
            position += len(block)
        else:
            bits += "1" + "11" + f"{count - 1:016b}" + f"{flat[position]:08b}"
            position += count
    bits += "0" * (-len(bits) % 8)
    return [int(bits[index : index + 8], 2) for index in range(0, len(bits), 8)]


def labelme_shape(box: Box, form: str = "polygon") -> dict[str, Any]:
    shape: dict[str, Any] = {"label": box.label, "group_id": None, "description": "", "mask": None}
    shape |= {"flags": {"negative": True} if box.negative else {}}
    if form == "polygon":
        return shape | {"shape_type": "polygon", "points": box.corners}
    if form == "box":
        return shape | {"shape_type": "rectangle", "points": [box.corners[2], box.corners[0]]}
    inside = np.ones((box.y1 - box.y0, box.x1 - box.x0), np.uint8)
    corners = [[box.x0, box.y0], [box.x1 - 1, box.y1 - 1]]
    return shape | {"shape_type": "mask", "points": corners, "mask": png_base64(inside)}


def write_labelme(folder: Path, shapes: list[dict[str, Any]], name: str = "a", **changes: Any) -> Path:
    content = {
        "version": "5.5.0",
        "flags": {},
        "shapes": shapes,
        "imagePath": f"{Path(name).name}.png",
        "imageData": None,
    }
    content |= {"imageHeight": SIZE[0], "imageWidth": SIZE[1], **changes}
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def coco_annotation(box: Box, form: str = "polygon") -> dict[str, Any]:
    category = {"road": 3, "car": 5, "not car": 9}[box.label]
    width, height = box.x1 - box.x0, box.y1 - box.y0
    annotation: dict[str, Any] = {"category_id": category, "bbox": [box.x0, box.y0, width, height], "iscrowd": 0}
    annotation |= {"image_id": 7, "attributes": {"negative": box.negative, "occluded": False}}
    if form == "polygon":
        return annotation | {"segmentation": [[number for corner in box.corners for number in corner]]}
    if form == "box":
        return annotation | {"segmentation": []}
    return annotation | {"segmentation": {"size": list(SIZE), "counts": runs(box.mask().T.ravel())}, "iscrowd": 1}


def write_coco(folder: Path, annotations: list[dict[str, Any]], **image: Any) -> Path:
    """Of one image."""
    images = [{"id": 7, "file_name": "a.png", "height": SIZE[0], "width": SIZE[1], **image}]
    return write_coco_images(folder, images, annotations)


def write_coco_images(
    folder: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], name: str = "instances_default"
) -> Path:
    categories = [
        {"id": 3, "name": "road"},
        {"id": 4, "name": "bus"},
        {"id": 5, "name": "car"},
        {"id": 9, "name": "not car"},
    ]
    annotations = [{"id": number, **annotation} for number, annotation in enumerate(annotations)]
    path = folder / "annotations" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"images": images, "categories": categories, "annotations": annotations}))
    return path


def cvat_element(box: Box, form: str = "polygon", more: str = "") -> str:
    flag = f'<attribute name="negative">{str(box.negative).lower()}</attribute>'
    head = f'label="{box.label}" source="manual" occluded="0"{more}'
    if form == "polygon":
        points = ";".join(f"{x:.2f},{y:.2f}" for x, y in box.corners)
        return f'<polygon {head} points="{points}">{flag}</polygon>'
    if form == "box":
        return f'<box {head} xtl="{box.x0:.2f}" ytl="{box.y0:.2f}" xbr="{box.x1:.2f}" ybr="{box.y1:.2f}">{flag}</box>'
    width, height = box.x1 - box.x0 + 2, box.y1 - box.y0  # two columns of the rectangle are outside
    rectangle = np.ones((height, width), bool)
    rectangle[:, -2:] = False
    rle = ", ".join(map(str, runs(rectangle.ravel())))
    place = f'left="{box.x0}" top="{box.y0}" width="{width}" height="{height}"'
    return f'<mask {head} rle="{rle}" {place}>{flag}</mask>'


def cvat_image(elements: list[str], name: str = "a.png", size: tuple[int, int] = SIZE, subset: str = "") -> str:
    more = f' subset="{subset}" task_id="2"' if subset else ""  # of a project
    return f'<image id="0" name="{name}"{more} width="{size[1]}" height="{size[0]}">{"".join(elements)}</image>'


def write_cvat(folder: Path, elements: list[str], name: str = "a.png", size: tuple[int, int] = SIZE) -> Path:
    return write_cvat_images(folder, [cvat_image(elements, name, size)])


def write_cvat_images(folder: Path, images: list[str]) -> Path:
    labels = "".join(
        f"<label><name>{label}</name><color>{colour}</color><attributes></attributes></label>"
        for label, colour in (("road", "#804080"), ("bus", "#000001"), ("car", "#00008e"), ("not car", "#111111"))
    )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "annotations.xml"
    path.write_text(
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version><meta><task><name>t</name>'
        f"<labels>{labels}</labels></task></meta>{''.join(images)}</annotations>"
    )
    return path


def voc_object(box: Box) -> str:
    corners = {"xmin": box.x0, "ymin": box.y0, "xmax": box.x1, "ymax": box.y1}
    flag = f"<attribute><name>negative</name><value>{box.negative}</value></attribute>"
    places = "".join(f"<{key}>{value}</{key}>" for key, value in corners.items())
    return f"<object><name>{box.label}</name><attributes>{flag}</attributes><bndbox>{places}</bndbox></object>"


def write_voc(folder: Path, objects: list[str], name: str = "a.png", size: tuple[int, int] = SIZE) -> Path:
    path = folder / "Annotations" / f"{Path(name).stem}.xml"
    path.parent.mkdir(parents=True, exist_ok=True)
    sides = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    path.write_text(f"<annotation><filename>{name}</filename>{sides}{''.join(objects)}</annotation>")
    return path


def labelstudio_results(
    box: Box, number: int, form: str = "polygon", size: tuple[int, int] = SIZE
) -> list[dict[str, Any]]:
    def percent(x: float, y: float) -> list[float]:
        return [100 * x / size[1], 100 * y / size[0]]

    head = {"id": f"r{number}", "original_width": size[1], "original_height": size[0], "image_rotation": 0}
    head |= {"to_name": "image", "from_name": "label"}
    more = []
    if form == "polygon":
        value: dict[str, Any] = {"points": [percent(*corner) for corner in box.corners], "closed": True}
        kind = "polygonlabels"
    elif form == "box":  # <Rectangle> and <Labels>: two results of one region
        x, y = percent(box.x0, box.y0)
        width, height = percent(box.x1 - box.x0, box.y1 - box.y0)
        value, kind = {"x": x, "y": y, "width": width, "height": height, "rotation": 0}, "labels"
        more = [{**head, "type": "rectangle", "value": dict(value)}]
    else:
        value, kind = {"format": "rle", "rle": brush_rle(box.mask(size))}, "brushlabels"
    if box.negative:
        more.append({**head, "from_name": "sign", "type": "choices", "value": {"choices": ["negative"]}})
    return [{**head, "type": kind, "value": {**value, kind: [box.label]}}, *more]


def labelstudio_task(results: list[dict[str, Any]], image: str = "/data/upload/3/0a1b2c3d-a.png") -> dict[str, Any]:
    annotation = {"id": 4, "was_cancelled": False, "ground_truth": False, "result": results}
    return {"id": 11, "data": {"image": image}, "annotations": [annotation], "predictions": []}


def write_labelstudio(folder: Path, tasks: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "project-1.json"
    path.write_text(json.dumps(tasks))
    return path


def write_tool(
    tool: str, folder: Path, boxes: tuple[Box, ...] = BOXES, form: str = "polygon", image: str = "a.png"
) -> Path:
    """The export of one image without the image; ``folder`` is what `coarse-train import` gets."""
    return write_drawn(tool, folder, {image: boxes}, form)


def write_drawn(tool: str, folder: Path, drawn: dict[str, tuple[Box, ...]], form: str = "polygon") -> Path:
    """The export of some images, file name -> drawings, without the images: their folder is that of `IMAGES`."""
    if tool == "labelme":
        for image, boxes in drawn.items():
            write_labelme(folder, [labelme_shape(box, form) for box in boxes], Path(image).stem, imagePath=image)
    elif tool == "coco":
        numbered = list(enumerate(drawn.items()))
        images = [
            {"id": number, "file_name": image, "height": SIZE[0], "width": SIZE[1]} for number, (image, _) in numbered
        ]
        every = [coco_annotation(box, form) | {"image_id": number} for number, (_, boxes) in numbered for box in boxes]
        write_coco_images(folder, images, every)
    elif tool == "cvat":
        write_cvat_images(
            folder, [cvat_image([cvat_element(box, form) for box in boxes], image) for image, boxes in drawn.items()]
        )
    elif tool == "voc":
        for image, boxes in drawn.items():
            write_voc(folder, [voc_object(box) for box in boxes], image)
    else:
        tasks = []
        for image, boxes in drawn.items():
            results = [one for number, box in enumerate(boxes) for one in labelstudio_results(box, number, form)]
            tasks.append(labelstudio_task(results, f"/data/upload/3/0a1b2c3d-{image}"))
        write_labelstudio(folder, tasks)
    return folder
