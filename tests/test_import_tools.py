"""Drawings of annotation tools become the `folder` layout, pixel by pixel."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import warnings
from dataclasses import fields, replace
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import tyro
from PIL import Image, ImageOps

from coarse_train.cli import main
from coarse_train.commands.import_ import ImportConfig, run_import
from coarse_train.config import DataConfig, FitConfig
from coarse_train.data import IGNORE, Record, open_split
from coarse_train.data.classes import read_classes
from coarse_train.exports.coco import decode_counts
from coarse_train.exports.geometry import Polygon, Region, Runs, Stroke, ellipse, rectangle

from .tool_exports import (
    BOXES,
    FORMS,
    SIZE,
    TOOLS,
    Box,
    coco_annotation,
    cvat_element,
    cvat_image,
    expected,
    labelme_shape,
    labelstudio_results,
    labelstudio_task,
    photo,
    png_base64,
    runs,
    save_photo,
    write_coco,
    write_coco_images,
    write_cvat,
    write_cvat_images,
    write_drawn,
    write_labelme,
    write_labelstudio,
    write_tool,
)

EVERY = [(tool, form) for tool in TOOLS for form in FORMS if tool != "voc" or form == "box"]


def imported(tool: str, source: Path, out: Path, **settings: object) -> Record:
    """The first training image of the folder that is made."""
    config = replace(ImportConfig(tool, source, out), **settings)  # type: ignore[arg-type]
    run_import(config)
    return open_split(DataConfig(dataset="folder", root=out), config.split).load(0)


def whole(region: Region, size: tuple[int, int]) -> np.ndarray:
    canvas = np.zeros(size, bool)
    canvas[region.rows, region.columns] = region.mask
    return canvas


@pytest.mark.parametrize(("tool", "form"), EVERY)
def test_every_tool_and_every_way_to_draw_gives_the_same_maps(tool: str, form: str, tmp_path: Path) -> None:
    source = write_tool(tool, tmp_path / "export", form=form)
    save_photo(source / "a.png")
    record = imported(tool, source, tmp_path / "out", classes=("road", "car"))
    positive, negative = expected()
    assert record.positive is not None
    assert record.negative is not None
    np.testing.assert_array_equal(record.positive, positive)
    np.testing.assert_array_equal(record.negative, negative)
    np.testing.assert_array_equal(record.image, photo())
    assert record.mask is None
    assert (tmp_path / "out/train/images/a.png").read_bytes() == (source / "a.png").read_bytes()


@pytest.mark.parametrize("tool", TOOLS)
def test_drawings_on_a_phone_photo_lie_where_they_were_drawn(tool: str, tmp_path: Path) -> None:
    source = write_tool(tool, tmp_path / "export", form="box")
    shown = photo(3)
    save_photo(source / "a.png", np.rot90(shown).copy(), orientation=6)  # 6: to be turned clockwise to be shown
    record = imported(tool, source, tmp_path / "out", classes=("road", "car"))
    np.testing.assert_array_equal(record.image, shown)
    np.testing.assert_array_equal(record.positive, expected()[0])
    with Image.open(tmp_path / "out/train/images/a.png") as image:
        assert not image.getexif()


@pytest.mark.parametrize("orientation", range(2, 9))
def test_every_orientation_is_followed_or_with_stored_left_out(orientation: int, tmp_path: Path) -> None:
    source = tmp_path / "export"
    size = SIZE[::-1] if orientation > 4 else SIZE
    save_photo(source / "a.jpg", photo(1, size), orientation)
    with Image.open(source / "a.jpg") as image:
        shown, stored = np.array(ImageOps.exif_transpose(image)), np.array(image)
    write_labelme(source, [labelme_shape(box) for box in BOXES], imagePath="a.jpg")
    np.testing.assert_array_equal(imported("labelme", source, tmp_path / "out").image, shown)
    write_labelme(
        source, [labelme_shape(box) for box in BOXES], imagePath="a.jpg", imageHeight=size[0], imageWidth=size[1]
    )
    record = imported("labelme", source, tmp_path / "stored", orientation="stored")
    np.testing.assert_array_equal(record.image, stored)


def test_labelme_without_its_image_uses_the_one_inside(tmp_path: Path) -> None:
    source = write_labelme(tmp_path / "export", [labelme_shape(box) for box in BOXES], imageData=png_base64(photo(5)))
    record = imported("labelme", source, tmp_path / "out")
    np.testing.assert_array_equal(record.image, photo(5))


def test_labelme_masks_are_cut_to_their_corners_and_to_the_image(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    values = np.arange(20).reshape(4, 5) % 3
    shape = labelme_shape(BOXES[0], "mask") | {"mask": png_base64(values.astype(np.uint8))}
    other = labelme_shape(Box("car", 0, 0, 1, 1))
    write_labelme(tmp_path, [other, shape | {"points": [[13, 9], [16, 13]]}])
    positive = np.full(SIZE, IGNORE, np.uint8)
    positive[0, 0] = 1
    positive[9:12, 13:16][values[:3, :3] > 0] = 0
    record = imported("labelme", tmp_path, tmp_path / "out", classes=("road", "car"))
    np.testing.assert_array_equal(record.positive, positive)


def test_lines_points_circles_and_turned_shapes_cover_the_pixels_they_hold(tmp_path: Path) -> None:
    x, y = np.meshgrid(np.arange(SIZE[1]) + 0.5, np.arange(SIZE[0]) + 0.5)
    line = np.hypot(np.clip(x, 2, 12) - x, y - 3) <= 1.5
    circle = np.hypot(x - 8, y - 6) < 4
    cos, sin = np.cos(np.pi / 6), np.sin(np.pi / 6)

    def turned(about: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Where the pixels were before a turn by 30 degrees, clockwise as y points down."""
        dx, dy = x - about[0], y - about[1]
        return cos * dx + sin * dy, cos * dy - sin * dx

    along, across = turned((8, 6))
    box = (np.abs(along) < 5) & (np.abs(across) < 3)
    ellipse_ = (along / 6) ** 2 + (across / 2) ** 2 < 1
    corner = np.logical_and.reduce(
        [turned((4, 1))[0] > 0, turned((4, 1))[0] < 8, turned((4, 1))[1] > 0, turned((4, 1))[1] < 4]
    )
    np.testing.assert_array_equal(whole(Stroke(np.array([[2.0, 3], [12, 3]]), 3).region(SIZE), SIZE), line)
    np.testing.assert_array_equal(whole(ellipse(8, 6, 4, 4).region(SIZE), SIZE), circle)
    save_photo(tmp_path / "a.png")

    def drawn(name: str, tool: str) -> np.ndarray:
        record = imported(tool, tmp_path, tmp_path / name, line_width=3, classes=("road", "car"))
        assert record.positive is not None
        return record.positive == 0

    for kind, points, wanted in (
        ("linestrip", [[2, 3], [7, 3], [12, 3]], line),
        ("line", [[2, 3], [12, 3]], line),
        ("point", [[8, 6]], np.hypot(x - 8, y - 6) <= 1.5),
        ("circle", [[8, 6], [8, 10]], circle),
    ):
        write_labelme(tmp_path, [labelme_shape(BOXES[0]) | {"shape_type": kind, "points": points}])
        np.testing.assert_array_equal(drawn(kind, "labelme"), wanted)
    (tmp_path / "a.json").unlink()
    for name, element, wanted in (
        ("polyline", '<polyline label="road" points="2,3;12,3"/>', line),
        ("box", '<box label="road" xtl="3" ytl="3" xbr="13" ybr="9" rotation="30"/>', box),
        ("ellipse", '<ellipse label="road" cx="8" cy="6" rx="6" ry="2" rotation="30"/>', ellipse_),
    ):
        write_cvat(tmp_path, [element])
        np.testing.assert_array_equal(drawn(name, "cvat"), wanted)
    scale = 100 / np.array(SIZE[::-1])
    head = {"id": "r", "original_width": SIZE[1], "original_height": SIZE[0], "image_rotation": 0, "type": ""}
    place = dict(zip(("x", "y"), (4, 1) * scale, strict=True)) | {"width": 8 * scale[0], "height": 4 * scale[1]}
    radii = {"x": 50, "y": 50, "radiusX": 6 * scale[0], "radiusY": 2 * scale[1]}
    for name, value, wanted in (("ls box", place, corner), ("ls ellipse", radii, ellipse_)):
        result = head | {"value": value | {"rotation": 30, "labels": ["road"]}}
        write_labelstudio(tmp_path, [labelstudio_task([result])])
        np.testing.assert_array_equal(drawn(name, "labelstudio"), wanted)


def test_a_polygon_is_the_pixels_whose_centres_it_holds() -> None:
    from matplotlib.path import Path as Outline

    rng = np.random.default_rng(0)
    y, x = np.mgrid[:20, :30] + 0.5
    for corners in (3, 4, 9):
        points = rng.uniform(-6, 36, (corners, 2))
        winding = np.zeros((20, 30), int)  # parity of crossings of a ray to the left, edge by edge
        for (x0, y0), (x1, y1) in itertools.pairwise([*points, points[0]]):
            crosses = (
                (np.minimum(y0, y1) <= y) & (y < np.maximum(y0, y1)) & (x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x)
            )
            winding += crosses
        np.testing.assert_array_equal(whole(Polygon(points).region((20, 30)), (20, 30)), winding % 2 == 1)
    triangle = rng.uniform(0, 20, (3, 2))
    inside = Outline(triangle).contains_points(np.stack([x.ravel(), y.ravel()], 1)).reshape(20, 30)
    np.testing.assert_array_equal(whole(Polygon(triangle).region((20, 30)), (20, 30)), inside)
    left, right = rectangle(0, 0, 4.5, 5), rectangle(4.5, 0, 9, 5)  # neighbours share no pixel and leave none out
    both = whole(left.region((6, 10)), (6, 10)).astype(int) + whole(right.region((6, 10)), (6, 10))
    np.testing.assert_array_equal(both, np.pad(np.ones((5, 9), int), ((0, 1), (0, 1))))


@pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning")
def test_polygons_and_run_lengths_are_those_of_pycocotools() -> None:
    masks = pytest.importorskip("pycocotools.mask")
    rng = np.random.default_rng(1)
    for points in ([[2, 1], [10, 1], [10, 7], [2, 7]], [[1, 1], [9, 1], [9, 9], [5, 9], [5, 4], [1, 4]]):
        flat = [float(number) for point in points for number in point]
        theirs = masks.decode(masks.frPyObjects([flat], *SIZE)[0]).astype(bool)
        np.testing.assert_array_equal(whole(Polygon(np.array(points, float)).region(SIZE), SIZE), theirs)
    star = rng.uniform(0, 100, (5, 2))
    theirs = masks.decode(masks.frPyObjects([star.ravel().tolist()], 100, 100)[0]).astype(bool)
    assert (whole(Polygon(star).region((100, 100)), (100, 100)) != theirs).mean() < 0.005
    for mask in (
        rng.random((37, 23)) < 0.5,
        np.ones((3, 5), bool),
        np.zeros((3, 5), bool),
        rng.random((400, 300)) < 0.001,
    ):
        counts = masks.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()
        ours = Runs(decode_counts(counts), mask.shape, by_columns=True)
        assert ours.counts.tolist() == runs(mask.T.ravel())
        np.testing.assert_array_equal(whole(ours.region(mask.shape), mask.shape), mask)
        np.testing.assert_array_equal(whole(Runs.of(mask).region(mask.shape), mask.shape), mask)


@pytest.mark.filterwarnings("ignore:.*__array__ implementation:DeprecationWarning")
def test_coco_run_lengths_as_text_and_polygons_of_several_parts(tmp_path: Path) -> None:
    masks = pytest.importorskip("pycocotools.mask")
    save_photo(tmp_path / "images" / "a.png")
    packed = masks.encode(np.asfortranarray(BOXES[1].mask(), dtype=np.uint8))["counts"].decode()
    write_coco(
        tmp_path,
        [
            {"image_id": 7, "category_id": 3, "segmentation": [[2, 1, 9, 1, 9, 7, 2, 7], [4, 1, 10, 1, 10, 7, 4, 7]]},
            {"image_id": 7, "category_id": 5, "segmentation": {"size": list(SIZE), "counts": packed}},
        ],
    )
    np.testing.assert_array_equal(imported("coco", tmp_path, tmp_path / "out").positive, expected()[0])


def test_cvat_shapes_of_a_higher_layer_lie_on_top_and_bring_their_colours(tmp_path: Path) -> None:
    save_photo(tmp_path / "images" / "day 1" / "a.png")
    road, car = BOXES[:2]
    elements = [
        cvat_element(car, more=' z_order="2"'),
        cvat_element(road, more=' z_order="1"'),
        '<tag label="bus"></tag>',
    ]
    write_cvat(tmp_path, elements, "day 1/a.png")
    np.testing.assert_array_equal(imported("cvat", tmp_path, tmp_path / "out").positive, expected()[0])
    classes = read_classes(tmp_path / "out" / "classes.toml")
    assert (classes.names, classes.colours, classes.ids) == (("road", "car"), ((128, 64, 128), (0, 0, 142)), (0, 1))
    assert (tmp_path / "out/train/images/day 1/a.png").is_file()


@pytest.mark.parametrize("palette", [False, True])
def test_voc_label_maps_are_matched_by_colour(palette: bool, tmp_path: Path) -> None:
    colours = {"car": (250, 50, 83), "road": (128, 64, 128), "not car": (1, 2, 3)}
    values = np.zeros(SIZE, np.uint8)
    values[1:7, 2:10], values[5:11, 8:14], values[11, :3], values[0, 15] = 2, 1, 3, 4
    table = np.array([(0, 0, 0), *colours.values(), (224, 224, 192)], np.uint8)
    (tmp_path / "SegmentationClass").mkdir()
    if palette:
        image = Image.fromarray(values, "P")
        image.putpalette(table.ravel().tolist())
    else:
        image = Image.fromarray(table[values])
    image.save(tmp_path / "SegmentationClass" / "a.png")
    lines = "".join(f"{name}:{','.join(map(str, colour))}::\n" for name, colour in colours.items())
    (tmp_path / "labelmap.txt").write_text(f"# label:color_rgb:parts:actions\nbackground:0,0,0::\n{lines}")
    save_photo(tmp_path / "JPEGImages" / "a.jpg")
    record = imported("voc", tmp_path, tmp_path / "out")
    car_first = np.array([1, 0, *[IGNORE] * 254], np.uint8)[expected()[0]]
    np.testing.assert_array_equal(record.positive, car_first)
    assert record.negative is not None
    assert (record.negative != IGNORE).sum() == 3
    assert (record.negative[0, 11, :3] == 0).all()
    (tmp_path / "labelmap.txt").write_text("background:0,0,0::\ncar:250,50,83::\nnot car:1,2,3::\n")
    with pytest.raises(
        ValueError, match=r"a\.png: expected the colours of labelmap\.txt, got \(128, 64, 128\) at 44 pixels"
    ):
        imported("voc", tmp_path, tmp_path / "other")


def test_voc_without_a_table_has_the_classes_of_the_kit(tmp_path: Path) -> None:
    values = np.zeros((*SIZE, 3), np.uint8)
    values[0], values[1] = (128, 128, 128), (0, 64, 128)  # car, tvmonitor: 7 and 20
    (tmp_path / "SegmentationClass").mkdir()
    Image.fromarray(values).save(tmp_path / "SegmentationClass" / "a.png")
    save_photo(tmp_path / "JPEGImages" / "a.jpg")
    imported("voc", tmp_path, tmp_path / "out")
    assert read_classes(tmp_path / "out" / "classes.toml").names == ("car", "tvmonitor")


def test_labelstudio_reads_what_people_have(tmp_path: Path) -> None:
    """The original name of an upload, a local file, the last annotation that is not cancelled, several labels of a region."""
    save_photo(tmp_path / "photos" / "a.png")
    save_photo(tmp_path / "photos" / "day 1" / "b.png")
    both = labelstudio_results(BOXES[1], 1)
    both[0]["value"]["polygonlabels"] = ["not car", "not bus"]
    first = labelstudio_task(labelstudio_results(BOXES[0], 0) + both)
    first["annotations"] = [
        first["annotations"][0] | {"result": []},
        *first["annotations"],
        first["annotations"][0] | {"was_cancelled": True, "result": []},
    ]
    second = labelstudio_task(labelstudio_results(BOXES[0], 0), "/data/local-files/?d=day%201/b.png")
    write_labelstudio(tmp_path / "export", [first, second])
    record = imported("labelstudio", tmp_path / "export", tmp_path / "out", images=tmp_path / "photos")
    assert sorted(path.name for path in (tmp_path / "out/train/images").rglob("*.png")) == ["a.png", "b.png"]
    assert read_classes(tmp_path / "out" / "classes.toml").names == ("bus", "car", "road")
    assert record.negative is not None
    for layer, label in enumerate((0, 1)):
        np.testing.assert_array_equal(record.negative[layer] == label, BOXES[1].mask())


def test_masks_have_a_background_and_what_is_ignored_is_unknown(tmp_path: Path) -> None:
    source = tmp_path / "export"
    boxes = (*BOXES[:3], Box("blur", 9, 6, 11, 8), Box("not blur", 0, 0, 3, 3))
    save_photo(source / "a.png")
    save_photo(source / "empty.png", photo(4))
    write_labelme(source, [labelme_shape(box) for box in boxes])
    write_labelme(source, [], "empty")
    save_photo(source / "ruled out.png", photo(6))
    write_labelme(source, [labelme_shape(BOXES[2])], "ruled out")
    settings = {"kind": "masks", "background": "ground", "ignore": ("blur",)}
    record = imported("labelme", source, tmp_path / "out", **settings)
    mask = np.array([2, 1, *[0] * 254], np.uint8)[expected()[0]]
    mask[6:8, 9:11] = IGNORE
    np.testing.assert_array_equal(record.mask, mask)
    assert record.positive is None
    assert record.negative is not None
    assert record.negative.shape[0] == 1
    assert read_classes(tmp_path / "out" / "classes.toml").names == ("ground", "car", "road")
    assert not (tmp_path / "out/train/images/empty.png").exists()
    assert [path.name for path in (tmp_path / "out/train/masks").iterdir()] == ["a.png"]
    imported("labelme", source, tmp_path / "kept", keep_empty=True, **settings)
    kept = open_split(DataConfig(dataset="folder", root=tmp_path / "kept"), "train").load(1)
    assert kept.mask is not None
    assert (kept.mask == 0).all()


def test_validation_images_are_chosen_or_added(tmp_path: Path) -> None:
    source = tmp_path / "export"
    for number in range(10):
        save_photo(source / f"{number}.png", photo(number))
        write_labelme(source, [labelme_shape(box) for box in BOXES], str(number))
    imported("labelme", source, tmp_path / "out", val_share=0.3)
    names = {
        split: [path.name for path in (tmp_path / "out" / split / "images").iterdir()] for split in ("train", "val")
    }
    assert [len(names["train"]), len(names["val"])] == [7, 3]
    assert sorted(names["train"] + names["val"]) == [f"{number}.png" for number in range(10)]
    (tmp_path / "out" / "classes.toml").write_text(
        '[[class]]\nname = "car"\nid = 9\n[[class]]\nname = "road"\nid = 4\n'
    )
    record = imported("labelme", source, tmp_path / "out", split="test", kind="masks", add=True)
    np.testing.assert_array_equal(record.mask, np.array([1, 0, *[IGNORE] * 254], np.uint8)[expected()[0]])
    with pytest.raises(ValueError, match=r"add: expected .* without test"):
        imported("labelme", source, tmp_path / "out", split="test", add=True)
    with pytest.raises(ValueError, match="out: expected an empty or new folder"):
        imported("labelme", source, tmp_path / "out", split="test")


def test_masks_of_some_images_beside_drawings_of_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_drawn(
        "labelme", tmp_path / "export", dict.fromkeys(("a.png", "full-b.png", "c.png", "d.png"), BOXES)
    )
    for name in ("a", "full-b", "c", "d"):
        save_photo(source / f"{name}.png")
    out = tmp_path / "out"
    command = ["import", "labelme", str(source), "--out", str(out), "--classes", "road", "car"]
    assert main([*command, "--val-share", "0.25", "--masks", "*/full-*", "val/*", "--background", "ground"]) == 0
    printed = capsys.readouterr().out
    train, val = (open_split(DataConfig(dataset="folder", root=out), split) for split in ("train", "val"))
    kinds = {part.name(index): part.kinds(index) for part in (train, val) for index in range(len(part))}
    dense = {"full-b", val.name(0)}
    assert (len(train), len(dense)) == (3, 2)
    for name, found in kinds.items():
        assert found == {"negative", "mask" if name in dense else "positive"}
    mask = val.load(0).mask
    assert mask is not None
    np.testing.assert_array_equal(mask, np.array([1, 2, *[0] * 254], np.uint8)[expected()[0]])  # ground is class 0
    assert "scores need masks" not in printed
    rows = [line.split()[:4] for line in printed.splitlines() if line.startswith(("train", "val"))]
    assert ["train", "masks", "ground", "1"] in rows
    assert ["train", "positives", "road", "2"] in rows
    with pytest.raises(
        ValueError, match=r"masks: expected patterns of SPLIT/NAME, such as 'train/a', got 'full-\*', which"
    ):
        imported("labelme", source, tmp_path / "other", masks=("full-*",))
    with pytest.raises(ValueError, match="masks: expected none with --as masks"):
        imported("labelme", source, tmp_path / "other", masks=("*",), kind="masks")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("tool", ["cvat", "voc", "coco"])
def test_the_splits_of_an_export_are_kept_where_that_is_asked_for_and_else_named(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two images of one name in CVAT and COCO: a project keeps them apart by their subsets, so does the folder."""
    source, names = tmp_path / "export", ("a", "b", "other") if tool == "voc" else ("a", "a", "other")
    subsets = ("Train", "Validation", "Holdout")
    if tool == "cvat":
        shapes = [cvat_element(box) for box in BOXES]
        images = zip(names, subsets, strict=True)
        write_cvat_images(source, [cvat_image(shapes, f"{name}.png", subset=subset) for name, subset in images])
        folders = [source / "images" / subset for subset in subsets]
    elif tool == "voc":
        write_drawn(tool, source, {f"{name}.png": BOXES for name in names})
        for name, lines in {"train": "a\n", "val": '"b"\n', "trainval": "a\nb\n", "car_val": "a  1\n"}.items():
            (source / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            (source / "ImageSets" / "Main" / f"{name}.txt").write_text(lines)
        folders = [source / "JPEGImages"] * 3
    else:
        folders = [source / part for part in ("train", "valid", "elsewhere")]  # as Roboflow has it
        for name, folder in zip(names, folders, strict=True):
            images = [{"id": 7, "file_name": f"{name}.png", "height": SIZE[0], "width": SIZE[1]}]
            path = write_coco_images(folder, images, [coco_annotation(box) for box in BOXES])
            path.rename(folder / "_annotations.coco.json")
    for number, (name, folder) in enumerate(zip(names, folders, strict=True)):
        save_photo(folder / f"{name}.png", photo(number))
    out = tmp_path / "out"
    command = ["import", tool, str(source), "--out", str(out), "--classes", "road", "car"]
    assert main([*command, "--split", "export", "--masks", "val/*"]) == 0
    assert "left out: other: in no subset called train, val or test" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [".import.json", "classes.toml", "train", "val"]
    for number, (split, kind) in enumerate((("train", "positive"), ("val", "mask"))):
        part = open_split(DataConfig(dataset="folder", root=out), split)
        assert (len(part), part.kinds(0)) == (1, {"negative", kind})
        np.testing.assert_array_equal(part.load(0).image, photo(number))
        np.testing.assert_array_equal(getattr(part.load(0), kind), expected()[0])
    command[4] = str(tmp_path / "together")
    if tool == "voc":
        assert main(command) == 0
        said = "note: the export has splits of its own (train 1, val 1), and all went into train: --split export keeps them"
        assert said in capsys.readouterr().out
    else:
        assert main(command) == 1
        assert "expected one image called 'a', got another in" in (err := capsys.readouterr().err)
        assert err.endswith("; rename one, or --split export\n")


def test_an_export_without_splits_is_told_where_its_splits_are_asked_for(tmp_path: Path) -> None:
    source = write_tool("labelme", tmp_path / "export")
    save_photo(source / "a.png")
    with pytest.raises(
        ValueError, match=r"split: expected subsets called train, val or test in .*, got none; say --split"
    ):
        imported("labelme", source, tmp_path / "out", split="export")
    source = write_tool("voc", tmp_path / "voc", form="box")
    save_photo(source / "a.png")
    (source / "ImageSets" / "Main").mkdir(parents=True)
    for name in ("train", "val"):
        (source / "ImageSets" / "Main" / f"{name}.txt").write_text("a\n")
    with pytest.raises(ValueError, match=r"val\.txt: expected each image in one split, got a in train, too"):
        imported("voc", source, tmp_path / "out", split="export")


def test_a_name_whose_accents_macos_took_apart_is_that_of_its_image(tmp_path: Path) -> None:
    source = write_tool("labelme", tmp_path / "export", image=normalize("NFC", "caf\u00e9.png"))
    save_photo(source / normalize("NFD", "caf\u00e9.png"))
    np.testing.assert_array_equal(imported("labelme", source, tmp_path / "out").image, photo())


def test_images_of_more_pixels_than_the_limit_are_named_with_the_option_that_raises_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tool("labelme", tmp_path / "export")
    save_photo(source / "a.png", np.rot90(photo()).copy(), orientation=6)  # saved anew: a second place that opens it
    command = ["import", "labelme", str(source), "--out", str(tmp_path / "out"), "--max-pixels"]
    assert main([*command, "191"]) == 1
    assert "a.png: expected at most 191 pixels, got 12x16; --max-pixels 192 reads it" in capsys.readouterr().err
    assert main([*command, "192"]) == 0
    # Pillow's own limit, of which it warns below and ends above twice as much, is not heard of
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imported("labelme", source, tmp_path / "again")


def test_after_more_has_been_drawn_the_folder_is_replaced_or_stays_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tool("labelme", tmp_path / "export")
    save_photo(source / "a.png")
    out = tmp_path / "out"
    command = ["import", "labelme", str(source), "--out", str(out)]
    assert main([*command, "--classes", "road", "car"]) == 0
    assert main([*command, "--split", "val", "--add"]) == 0
    write_labelme(source, [labelme_shape(box) for box in BOXES[1:]])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for more in ([], ["--split", "val", "--add"]):
        capsys.readouterr()
        assert main([*command, *more]) == 1
        assert "--overwrite" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(
            "coarse_train.exports.writing._save", lambda *_: (_ for _ in ()).throw(OSError("the disk is full"))
        )
        assert main([*command, "--overwrite", "--background", "ground"]) == 1
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main([*command, "--split", "val", "--add", "--overwrite"]) == 0
    splits = {split: open_split(DataConfig(dataset="folder", root=out), split) for split in ("train", "val")}
    for split, expected_road in (("train", True), ("val", False)):
        positive = splits[split].load(0).positive
        assert positive is not None
        assert bool((positive == 0).any()) == expected_road
    assert main([*command, "--overwrite", "--background", "ground"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [".import.json", "classes.toml", "train"]
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_only_what_import_has_written_is_replaced(tmp_path: Path) -> None:
    source = write_tool("labelme", tmp_path / "out" / "photos")
    save_photo(source / "a.png")
    (tmp_path / "out" / "classes.toml").write_text('[[class]]\nname = "road"\n[[class]]\nname = "car"\n')
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"out: expected a folder that import has written to overwrite, got .*out"):
        imported("labelme", source, tmp_path / "out", overwrite=True)
    (tmp_path / "out" / "classes.toml").write_text("# made by coarse-train import\n")
    with pytest.raises(
        ValueError, match=r"out: expected a folder without the export to overwrite, got .* with .*photos"
    ):
        imported("labelme", source, tmp_path / "out", overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_links_lead_to_the_images_but_for_those_that_are_turned(tmp_path: Path) -> None:
    source = tmp_path / "export"
    save_photo(source / "a.png")
    save_photo(source / "b.png", np.rot90(photo()).copy(), orientation=6)
    for name in "ab":
        write_labelme(source, [labelme_shape(box) for box in BOXES], name)
    imported("labelme", source, tmp_path / "out", link=True)
    folder = tmp_path / "out" / "train" / "images"
    assert (folder / "a.png").resolve() == (source / "a.png").resolve()
    assert not (folder / "b.png").is_symlink()


def test_images_whose_shapes_say_nothing_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "export"
    drawn = {
        "a": BOXES,
        "b": (Box("road", 20, 20, 30, 30),),
        "c": (Box("blur", 0, 0, 4, 4), Box("not blur", 5, 5, 6, 6)),
    }
    for name, boxes in drawn.items():
        save_photo(source / f"{name}.png")
        write_labelme(source, [labelme_shape(box) for box in boxes], name)
    imported("labelme", source, tmp_path / "out", ignore=("blur",))
    assert [path.name for path in (tmp_path / "out/train/images").iterdir()] == ["a.png"]
    printed = capsys.readouterr().out
    assert "note: 1 shape(s) cover no pixel of their image" in printed
    assert "left out: b: no shape of a class is inside of it" in printed
    (source / "a.json").unlink()
    with pytest.raises(ValueError, match="expected shapes of a class inside the images of train, got none"):
        imported("labelme", source, tmp_path / "other", ignore=("blur",), classes=("road", "car"))
    assert not (tmp_path / "other").exists()


def test_a_format_that_training_does_not_read_is_saved_as_png(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.pcx")
    write_labelme(tmp_path, [labelme_shape(box) for box in BOXES], imagePath="a.pcx")
    np.testing.assert_array_equal(imported("labelme", tmp_path, tmp_path / "out").image, photo())


def test_the_report_counts_names_slips_and_says_what_comes_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "export"
    boxes = (*BOXES, Box("raod", 0, 11, 1, 12), Box("road", 0, 11, 1, 12), Box("car", 0, 0, 1, 1))
    for name in "ab":
        save_photo(source / f"{name}.png")
    write_labelme(source, [labelme_shape(box) for box in boxes])
    write_labelme(source, [], "b")
    assert main(["import", "labelme", str(source), "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert ["train", "positives", "road", "1", "2", "45"] in lines
    assert ["train", "positives", "car", "1", "2", "37"] in lines
    assert ["train", "negatives", "car", "1", "1", "24"] in lines
    assert ["train", "negatives", "road", "1", "1", "64"] in lines
    assert "'raod' is drawn 1x and looks like 'road'" in printed
    assert "'car' is drawn and ruled out at the same pixels of 1 image" in printed
    assert "left out: b: nothing is drawn on it" in printed
    assert f"coarse-train check folder --root {tmp_path / 'out'}" in printed
    assert json.loads((source / "a.json").read_text())["imageData"] is None


def test_the_commands_of_the_page_are_understood() -> None:
    page = (Path(__file__).parent.parent / "docs" / "own-data.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("    coarse-train import ")]
    read = [tyro.cli(ImportConfig, args=shlex.split(line, comments=True)[2:]) for line in lines]
    assert {config.tool for config in read} == set(TOOLS)
    options = set(re.findall(r"`(--[a-z-]+)", page)) - {"--labelflags"}  # labelme's
    configs = (ImportConfig, FitConfig, DataConfig)
    known = {f"--{field.name.replace('_', '-')}" for one in configs for field in fields(one)} | {"--as"}
    assert options <= known
