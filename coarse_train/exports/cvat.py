"""CVAT: annotations.xml of the export "CVAT for images 1.1", images/ beside it.

    <annotations><meta>... <label><name>car</name><color>#fa3253</color></label> ...</meta>
      <image id="0" name="a.jpg" width="6" height="4" subset="Validation">
        <polygon label="car" z_order="0" points="1.00,0.50;...">  <attribute name="negative">true</attribute>  </polygon>
        <box xtl="" ytl="" xbr="" ybr="" rotation="">  <ellipse cx="" cy="" rx="" ry="" rotation="">  <polyline points="">
        <mask rle="3, 2, 1" left="" top="" width="" height="">

Source: https://docs.cvat.ai/docs/other/xml_format and `dataset_manager/formats` of CVAT. Points are (x, y) from the corner
of the image; boxes and ellipses turn clockwise, in degrees, about their centre; run lengths go along the rows of the mask's
rectangle and start with what is outside. Shapes of a higher z_order lie on top, of the same one the later. Tags say nothing
about places and are left out. Subsets are those of a project; its images lie in images/SUBSET.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from .geometry import Geometry, Polygon, Runs, Size, Stroke, as_points, ellipse, rectangle
from .source import Entry, Export, Picture, Source, read_xml, safe_name, split_called

_TYPES = "polygon, box, ellipse, polyline, points and mask"


def read(source: Source) -> Export:
    entries: list[Entry] = []
    colours: dict[str, tuple[int, int, int]] = {}
    labels: dict[str, None] = {}
    for path in source.files(".xml", "annotations.xml of CVAT").values():
        root = read_xml(path)
        if root.tag != "annotations" or root.find("track") is not None:
            got = "CVAT for video" if root.tag == "annotations" else f"<{root.tag}>"
            raise ValueError(f"{path}: expected the export 'CVAT for images 1.1', got {got}; export it as that")
        for label in root.iterfind("meta//label"):
            name, colour = (label.findtext("name") or "").strip(), label.findtext("color") or ""
            labels[name] = None
            if len(colour) == 7:
                red, green, blue = bytes.fromhex(colour[1:])
                colours[name] = red, green, blue
        for image in root.iterfind("image"):
            where = f"{path}, image {image.get('name')!r}"
            entries.append(Entry(where, partial(_picture, source, path, image, where)))
    return Export(entries, tuple(labels), colours)


def _picture(source: Source, path: Path, image: Element, where: str) -> Picture:
    name = image.attrib["name"]
    base = path.parent / "images"
    found = source.find_image(name, base, base / image.get("subset", "default"))
    size = source.size(found, (int(image.attrib["height"]), int(image.attrib["width"])))
    drawn = [element for element in image if element.tag != "tag"]
    drawn.sort(key=lambda element: int(element.get("z_order", 0)))
    shapes = []
    for element in drawn:
        flags = {attribute.attrib["name"]: attribute.text for attribute in element.iterfind("attribute")}
        shapes.append(source.shape(element.get("label"), [_geometry(source, element, size)], flags))
    return Picture(safe_name(name), found, size, tuple(shapes), where, split_called(image.get("subset", "")))


def _geometry(source: Source, element: Element, size: Size) -> Geometry:
    def numbers(*names: str) -> list[float]:
        return [float(element.attrib[name]) for name in names]

    kind, turn = element.tag, float(element.get("rotation", 0))
    if kind == "box":
        x0, y0, x1, y1 = numbers("xtl", "ytl", "xbr", "ybr")
        return rectangle(x0, y0, x1, y1, turn)
    if kind == "ellipse":
        x, y, radius_x, radius_y = numbers("cx", "cy", "rx", "ry")
        return ellipse(x, y, radius_x, radius_y, turn)
    if kind == "mask":
        left, top, width, height = (int(number) for number in numbers("left", "top", "width", "height"))
        if min(left, top, width, height) < 0 or top + height > size[0] or left + width > size[1]:
            raise ValueError(
                f"expected a mask inside {size[1]}x{size[0]} pixels, got {width}x{height} at {left}, {top}"
            )
        counts = np.array([int(count) for count in element.attrib["rle"].split(",")])
        return Runs(counts, (height, width), top, left)
    if kind in ("polygon", "polyline", "points"):
        points = as_points(
            [[float(number) for number in point.split(",")] for point in element.attrib["points"].split(";")]
        )
        return Polygon(points) if kind == "polygon" else Stroke(points, source.line_width)
    raise ValueError(
        f"expected shapes of type {_TYPES}, got {kind!r} ({element.get('label')!r}); draw it as one of these"
    )
