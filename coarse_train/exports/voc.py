"""Pascal VOC, labelImg and CVAT's "Segmentation mask 1.1": Annotations/NAME.xml, SegmentationClass/NAME.png, JPEGImages/.

    <annotation><filename>a.jpg</filename><size><width>6</width><height>4</height></size>
      <object><name>car</name><bndbox><xmin>1</xmin><ymin>0</ymin><xmax>3</xmax><ymax>2</ymax></bndbox></object></annotation>

    labelmap.txt      # label:colour:parts:actions
                      car:250,50,83::

Sources: http://host.robots.ox.ac.uk/pascal/VOC/voc2012 (development kit),
https://docs.cvat.ai/docs/dataset_management/formats/format-smask and `voc_format/format.py` of datumaro. A box reaches from
(xmin, ymin) to (xmax, ymax), measured from the corner of the image, as labelImg, CVAT and Roboflow write it; the kit itself
counts pixels from 1. Label maps are palette or RGB PNGs, matched by colour with labelmap.txt, without one with the kit's 20
classes. A label called background, and without one black, is "nothing drawn"; so is the kit's 224,224,192 (its border). An
image with a label map has no use for its boxes. In .xml files without Annotations/ (labelImg) all count. Splits are
ImageSets/Segmentation/{train,val,test}.txt where there are label maps, else ImageSets/Main.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from xml.etree.ElementTree import Element

import numpy as np

from ..data.images import open_image
from ..data.walk import find_files
from ..storage import read_text
from .geometry import Runs, Size, rectangle
from .source import Entry, Export, Picture, Shape, Source, read_xml, split_called

_NAMES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog"),
    *("horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
_BORDER = (224, 224, 192)
_BACKGROUND = "background"
Colour = tuple[int, int, int]


def read(source: Source) -> Export:
    base = source.folder
    maps_folder, boxes_folder = base / "SegmentationClass", base / "Annotations"
    maps = find_files(maps_folder, ".png") if maps_folder.is_dir() and source.path.is_dir() else {}
    if boxes_folder.is_dir() and source.path.is_dir():
        boxes = find_files(boxes_folder, ".xml")
    else:
        boxes = {} if maps else source.files(".xml", "SegmentationClass/*.png, Annotations/*.xml or labelImg's .xml")
    table = _label_map(base / "labelmap.txt") if maps else {}
    splits = _splits(base / "ImageSets", ("Segmentation", "Main") if maps else ("Main", "Segmentation"))
    entries = []
    for name in sorted({*maps, *boxes}):
        map_file, box_file = maps.get(name), boxes.get(name)
        read_one = partial(_picture, source, name, map_file, box_file, table, splits.get(name, ""))
        entries.append(Entry(str(map_file or box_file), read_one))
    colours = {label: colour for colour, label in table.items() if label != _BACKGROUND}
    both = len(maps.keys() & boxes.keys())
    notes = (f"{both} images have boxes and a label map: the label map was read",) if both else ()
    return Export(entries, tuple(colours), colours, notes)


def _picture(
    source: Source, name: str, map_file: Path | None, box_file: Path | None, table: dict[Colour, str], split: str
) -> Picture:
    folders = [source.folder / "JPEGImages", *([box_file.parent] if box_file else [])]
    tree = None if box_file is None else read_xml(box_file)
    recorded = tree is not None and tree.findtext("filename")
    try:
        image = source.find_image(name, *folders, any_suffix=True)
    except FileNotFoundError:
        if not recorded:
            raise
        image = source.find_image(recorded, *folders)
    sides = [tree.findtext(f"size/{side}") for side in ("height", "width")] if tree is not None else [None]
    size = source.size(image, None if not all(sides) else (int(sides[0] or 0), int(sides[-1] or 0)))
    if map_file is not None:
        return Picture(name, image, size, tuple(_of_map(source, map_file, table, image, size)), str(map_file), split)
    assert tree is not None
    shapes = tuple(_box(source, item) for item in tree.iterfind("object"))
    return Picture(name, image, size, shapes, str(box_file), split)


def _box(source: Source, item: Element) -> Shape:
    corners = [float(item.findtext(f"bndbox/{name}", "")) for name in ("xmin", "ymin", "xmax", "ymax")]
    flags = {one.findtext("name", ""): one.findtext("value") for one in item.iterfind("attributes/attribute")}
    return source.shape(item.findtext("name"), [rectangle(*corners)], flags)


def _of_map(source: Source, path: Path, table: dict[Colour, str], image: Path, size: Size) -> list[Shape]:
    with open_image(path, path) as opened:
        if opened.size != size[::-1]:
            got = f"{opened.size[0]}x{opened.size[1]}"
            raise ValueError(f"{path}: expected {size[1]}x{size[0]} pixels as {image} has, got {got}")
        if opened.mode not in ("P", "RGB"):
            raise ValueError(f"{path}: expected a palette or RGB PNG as VOC and CVAT write, got mode {opened.mode}")
        pixels = np.asarray(opened.convert("RGB"), np.uint32)
    codes = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    shapes = []
    for code, count in zip(*np.unique(codes, return_counts=True), strict=True):
        colour = (int(code) >> 16, int(code) >> 8 & 255, int(code) & 255)
        label = table.get(colour, _BACKGROUND if colour == _BORDER else None)
        if label is None:
            raise ValueError(
                f"{path}: expected the colours of labelmap.txt, got {colour} at {count} pixels; add its line"
            )
        if label != _BACKGROUND:
            shapes.append(source.shape(label, [Runs.of(codes == code)]))
    return shapes


def _label_map(path: Path) -> dict[Colour, str]:
    """Colour -> label; that of the development kit where there is no such file."""
    table: dict[Colour, str] = {}
    if not path.is_file():
        return {_kit_colour(index): name for index, name in enumerate([_BACKGROUND, *_NAMES])}
    for line in _lines(path):
        try:
            label, colour, *_ = line.split(":")
            red, green, blue = (int(value) for value in colour.split(","))
        except ValueError as error:
            raise ValueError(f"{path}: expected lines 'label:red,green,blue::', got {line!r}") from error
        if (red, green, blue) in table:
            raise ValueError(f"{path}: expected a colour of its own for each label, got {colour} for {label!r}, too")
        table[red, green, blue] = _BACKGROUND if label.strip().lower() == _BACKGROUND else label.strip()
    if _BACKGROUND not in table.values():
        table.setdefault((0, 0, 0), _BACKGROUND)
    return table


def _splits(folder: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    """Name -> split: of train.txt, val.txt and test.txt in the first of the folders that is there, a name a line."""
    found: dict[str, str] = {}
    lists = next((sorted((folder / kind).glob("*.txt")) for kind in kinds if (folder / kind).is_dir()), [])
    for path in lists:
        split = split_called(path.stem)
        for name in (line.strip('"') for line in _lines(path) if split):
            if found.setdefault(name, split) != split:
                raise ValueError(f"{path}: expected each image in one split, got {name} in {found[name]}, too")
    return found


def _lines(path: Path) -> list[str]:
    """Without empty ones and comments."""
    try:
        lines = [line.strip() for line in read_text(path).splitlines()]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return [line for line in lines if line and not line.startswith("#")]


def _kit_colour(index: int) -> Colour:
    """The bits of the index in threes, as highest bits of red, green and blue (VOClabelcolormap of the kit)."""
    red, green, blue = (sum((index >> 3 * bit + channel & 1) << 7 - bit for bit in range(8)) for channel in range(3))
    return red, green, blue
