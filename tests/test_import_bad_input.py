"""Exports that are damaged, incomplete or hostile: one line that names the file, and nothing written."""

from __future__ import annotations

import contextlib
import json
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coarse_train.cli import main
from coarse_train.commands import import_
from coarse_train.config import DataConfig
from coarse_train.data import open_split
from coarse_train.exports.coco import decode_counts
from coarse_train.exports.labelstudio import decode_brush
from coarse_train.exports.source import safe_name

from .tool_exports import (
    BOXES,
    SIZE,
    Box,
    brush_rle,
    coco_annotation,
    cvat_element,
    labelme_shape,
    labelstudio_results,
    labelstudio_task,
    photo,
    save_photo,
    voc_object,
    write_coco,
    write_cvat,
    write_labelme,
    write_labelstudio,
    write_tool,
    write_voc,
)

SHAPES = [labelme_shape(box) for box in BOXES]
Change = dict[str, Any]


def refused(
    folder: Path, tool: str, capsys: pytest.CaptureFixture[str], *options: str, source: Path | None = None
) -> str:
    """The one line that `coarse-train import` ends with; there is no ROOT, nor a part of one."""
    before = {path for path in folder.rglob("*")}
    if options:
        assert main(["import", tool, str(source or folder), "--out", str(folder / "out"), *options]) == 1
        line = capsys.readouterr().err.strip()
    else:  # without parsing a command line, which takes most of the time
        with pytest.raises((ValueError, OSError)) as caught:
            import_.run_import(import_.ImportConfig(tool, source or folder, folder / "out"))  # type: ignore[arg-type]
        line = f"error: {caught.value}"
    assert "\n" not in line
    assert {path for path in folder.rglob("*")} == before
    return line


def coco_with(**changes: Any) -> Callable[[Path], object]:
    return lambda folder: write_coco(folder, [coco_annotation(BOXES[0]) | changes])


def labelme_with(*, shape: Change | None = None, **changes: Any) -> Callable[[Path], object]:
    shapes = changes.pop("shapes", [SHAPES[0] | (shape or {}), SHAPES[1]])
    return lambda folder: write_labelme(folder, shapes, **changes)


def cvat_with(element: str) -> Callable[[Path], object]:
    return lambda folder: write_cvat(folder, [element])


def labelstudio_with(change: Change, **value: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        results = labelstudio_results(BOXES[0], 0)
        results[0] |= change
        results[0]["value"] = results[0]["value"] | value
        write_labelstudio(folder, [labelstudio_task(results)])

    return write


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


_BOMB = (
    '<!DOCTYPE a [<!ENTITY x "xxxxxxxxxx">'
    + "".join(f'<!ENTITY x{n} "{f"&x{n - 1 if n else str()};" * 10}">' for n in range(9))
    + "]><annotations><meta>&x8;</meta></annotations>"
)
BAD = {
    # shapes
    "unknown type": (
        "labelme",
        labelme_with(shape={"shape_type": "spline"}),
        "a.json: expected shapes of .*'spline'",
    ),
    "two corners": (
        "labelme",
        labelme_with(shape={"points": [[0, 0], [1, 1]]}),
        "expected 3 points or more of a polygon, got 2",
    ),
    "no points": ("labelme", labelme_with(shape={"points": []}), "a.json: expected points"),
    "far point": (
        "labelme",
        labelme_with(shape={"points": [[0, 0], [1e9, 0], [5, 5]]}),
        "expected points within 1000000",
    ),
    "NaN": ("labelme", labelme_with(shape={"points": [[0, 0], [float("nan"), 0], [5, 5]]}), "expected points within"),
    "text": ("labelme", labelme_with(shape={"points": "zero"}), r"expected points \[\[x, y\], ...\], got zero"),
    "no label": ("labelme", labelme_with(shape={"label": "  "}), "expected a label for every shape"),
    "label of a number": ("labelme", labelme_with(shape={"label": 7}), "expected a label for every shape, got 7"),
    "mask": (
        "labelme",
        labelme_with(shape={"shape_type": "mask", "points": [[0, 0], [1, 1]], "mask": "AA"}),
        "base64 PNG",
    ),
    "no mask": ("labelme", labelme_with(shape={"shape_type": "mask", "points": [[0, 0], [1, 1]]}), "base64 PNG"),
    "shape list": ("labelme", labelme_with(shapes=[3]), "a.json: expected an export of labelme, got another structure"),
    "key": (
        "labelme",
        text("a.json", '{"shapes": []}'),
        "a.json: expected an export of labelme, got one without 'imagePath'",
    ),
    "run lengths": (
        "coco",
        coco_with(segmentation={"size": list(SIZE), "counts": [5, 6]}),
        "expected run lengths of 192 pixels",
    ),
    "negative": (
        "coco",
        coco_with(segmentation={"size": list(SIZE), "counts": [-5, 197]}),
        "expected run lengths from 0 to 192",
    ),
    "huge": (
        "coco",
        coco_with(segmentation={"size": [10**6, 10**6], "counts": [10**12]}),
        "expected run lengths of height and",
    ),
    "overflow": (
        "coco",
        coco_with(segmentation={"size": list(SIZE), "counts": [2**63] * 3}),
        "expected run lengths from 0",
    ),
    "compressed": ("coco", coco_with(segmentation={"size": list(SIZE), "counts": "o"}), "ends within a number"),
    "category": ("coco", coco_with(category_id=44), "'a.png': expected a category of .*, got 44"),
    "image id": ("coco", coco_with(image_id=99), "expected an image for every annotation, got none with id 99"),
    "odd": ("coco", coco_with(segmentation=[[1, 2, 3]]), "expected points"),
    "cuboid": (
        "cvat",
        cvat_with('<cuboid label="car" xtl1="1"/>'),
        "'a.png': expected shapes of type polygon, box, .*'cuboid'",
    ),
    "cvat mask": (
        "cvat",
        cvat_with('<mask label="car" rle="4" left="15" top="0" width="2" height="2"/>'),
        "expected a mask inside",
    ),
    "cvat rle": (
        "cvat",
        cvat_with('<mask label="car" rle="5" left="0" top="0" width="2" height="2"/>'),
        "run lengths from 0 to 4",
    ),
    "cvat number": (
        "cvat",
        cvat_with('<box label="car" xtl="a" ytl="0" xbr="1" ybr="1"/>'),
        "annotations.xml, image 'a.png': expected an export",
    ),
    "cvat attribute": (
        "cvat",
        cvat_with('<box label="car" xtl="0"/>'),
        "expected an export of cvat, got one without 'ytl'",
    ),
    "brush": ("labelstudio", labelstudio_with({}, rle=[0, 0, 0, 4]), "task 11: expected a brush's rle of 16x12"),
    "brush number": ("labelstudio", labelstudio_with({}, rle=10**9), "expected a brush's rle"),
    "rotated": ("labelstudio", labelstudio_with({"image_rotation": 90}), "expected image_rotation 0, got 90"),
    "video": (
        "labelstudio",
        labelstudio_with({"value": {"labels": ["car"], "sequence": []}}),
        "expected a polygon, rectangle,",
    ),
    "voc box": (
        "voc",
        lambda folder: write_voc(folder, ["<object><name>car</name></object>"]),
        "a.xml: expected an export of voc, got",
    ),
    # files
    "damaged": ("labelme", text("a.json", '{"shapes": ['), "a.json: expected JSON, got a file that is damaged"),
    "not text": ("labelme", text("a.json", bytes(range(128, 256))), "a.json: expected JSON"),
    "deep": ("labelme", text("a.json", "[" * 100_000), "a.json: expected JSON"),
    "another": ("coco", labelme_with(), "a.json: expected a COCO file with images, annotations and categories"),
    "json-min": ("labelstudio", text("a.json", '[{"image": "a.png", "label": []}]'), "a.json: .*JSON-MIN"),
    "xml": (
        "cvat",
        text("annotations.xml", "<annotations><image"),
        "annotations.xml: expected XML, got a file that is damaged",
    ),
    "xml of voc": (
        "cvat",
        lambda folder: write_voc(folder, []),
        "expected the export 'CVAT for images 1.1', got <annotation>",
    ),
    "video of cvat": ("cvat", text("a.xml", "<annotations><track/></annotations>"), "got CVAT for video"),
    "bomb": ("cvat", text("annotations.xml", _BOMB), "annotations.xml: expected XML, got"),
    "outside": (
        "cvat",
        text("a.xml", '<!DOCTYPE a [<!ENTITY x SYSTEM "file:///etc/passwd">]><a>&x;</a>'),
        "expected XML",
    ),
    "nothing": ("labelme", lambda folder: None, "expected labelme's .json files, got no .json file in it"),
    "no maps": ("voc", lambda folder: None, "expected SegmentationClass"),
    "empty": ("labelme", labelme_with(shapes=[]), "expected images with drawings, got 1 without"),
    "no tasks": (
        "labelstudio",
        lambda folder: write_labelstudio(folder, []),
        "expected images with drawings, got 0 without",
    ),
    "not drawn": ("cvat", cvat_with(""), "expected images with drawings, got 1 without"),
    # images
    "smaller": (
        "labelme",
        labelme_with(imageHeight=11),
        "a.json: expected 16x12 pixels as .*a.png has, got 16x11; is it the image",
    ),
    "pages": (
        "labelme",
        lambda folder: (
            Image.fromarray(photo()).save(folder / "a.tif", save_all=True, append_images=[Image.fromarray(photo(1))]),
            write_labelme(folder, SHAPES, imagePath="a.tif"),
        ),
        "a.tif: expected a file with one picture, got 2 pages or frames; split it",
    ),
    "no image": (
        "labelme",
        labelme_with(imagePath="b.png"),
        "a.json: expected the image 'b.png' in .*; say --images FOLDER",
    ),
    "path": (
        "labelme",
        labelme_with(imagePath="../../../../../../etc/hostname"),
        "expected the image '../.*, got none",
    ),
    "absolute": (
        "labelme",
        labelme_with(imagePath="/etc/hostname"),
        "expected the image '/etc/hostname' in .*, got none",
    ),
    "no path": ("labelme", labelme_with(imagePath=None), "a.json: expected an export of labelme"),
    "zero byte": ("labelme", labelme_with(imagePath="a\0.png"), "a.json: "),
    "long": ("labelme", labelme_with(imagePath="a" * 5000), "a.json: "),
    "inside": (
        "labelme",
        labelme_with(imagePath="b.png", imageData="AAAA"),
        "a.json: expected an image, got one that cannot",
    ),
    "no address": (
        "labelstudio",
        lambda folder: write_labelstudio(folder, [labelstudio_task([]) | {"data": {}}]),
        "'data'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_one_line_that_names_the_file(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tool, write, message = BAD[case]
    save_photo(tmp_path / "a.png")
    write(tmp_path)
    line = refused(tmp_path, tool, capsys)
    assert line.startswith(f"error: {tmp_path}")
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)


@pytest.mark.parametrize("tool", ["labelme", "coco", "cvat", "voc", "labelstudio"])
def test_archives_damaged_images_and_missing_exports_are_named(
    tool: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "export.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../escaped.json", "{}")
    assert "got an archive; unpack it first and name the folder" in refused(tmp_path, tool, capsys, source=archive)
    assert "export.zip" in refused(tmp_path, tool, capsys)
    assert "got no such file or folder" in refused(tmp_path, tool, capsys, source=tmp_path / "none")
    write_tool(tool, tmp_path)
    (tmp_path / "a.png").write_bytes(b"\x89PNG not really")
    assert "a.png: expected an image, got one that cannot be read" in refused(tmp_path, tool, capsys)


def test_bad_images_can_be_left_out_and_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photo(tmp_path / "a.png")
    write_labelme(tmp_path, SHAPES)
    for name, changes in {"b": {"imagePath": "none.png"}, "c": {"imageHeight": 3, "imagePath": "a.png"}}.items():
        write_labelme(tmp_path, SHAPES, name, **changes)
    line = refused(tmp_path, "labelme", capsys)
    assert "(and 1 more); --skip-bad leaves such images out" in line
    assert main(["import", "labelme", str(tmp_path), "--out", str(tmp_path / "out"), "--skip-bad"]) == 0
    printed = capsys.readouterr().out
    assert "left out: " + str(tmp_path / "b.json") in printed
    assert "left out: " + str(tmp_path / "c.json") in printed
    assert len(open_split(DataConfig(dataset="folder", root=tmp_path / "out"), "train")) == 1


def test_names_in_an_export_never_leave_the_new_folder(tmp_path: Path) -> None:
    for name, wanted in {
        "../../a.png": "_/_/a",
        "/etc/a.png": "a",
        "C:\\photos\\a.png": "a",
        "images\\day 1\\a.b.png": "day 1/a.b",
        "https://host/x/a.png": "a",
        "day/.hidden.png": "day/hidden",
        "..": "_",
        "x/../../..": "x/_/_/_",
    }.items():
        assert safe_name(name) == wanted
    inside = tmp_path / "outer" / "export"
    save_photo(tmp_path / "outer" / "secret.png", photo(9))
    save_photo(inside / "secret.png")
    write_tool("coco", inside, image="../secret.png")
    import_.run_import(import_.ImportConfig("coco", inside, tmp_path / "deep" / "out", classes=("road", "car")))
    made = [path for path in (tmp_path / "deep").rglob("*.png")]
    assert all(path.is_relative_to(tmp_path / "deep" / "out" / "train") for path in made)
    image = next(path for path in made if path.parent.parent.name == "images" or path.parent.name == "images")
    np.testing.assert_array_equal(np.array(Image.open(image)), photo())


def test_the_folder_around_the_current_one_is_outside_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_photo(tmp_path / "secret.png")
    write_labelme(tmp_path / "export", SHAPES, imagePath="../secret.png")
    monkeypatch.chdir(tmp_path / "export")
    with pytest.raises(ValueError, match=r"expected the image '\.\./secret\.png' in \., got none"):
        import_.run_import(import_.ImportConfig("labelme", Path(), Path("../out")))
    import_.run_import(import_.ImportConfig("labelme", Path(), Path("../out"), images=Path("..")))
    assert (tmp_path / "out/train/images/a.png").is_file()


def test_one_name_for_two_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_photo(tmp_path / "a.png")
    save_photo(tmp_path / "a.1.png")
    write_labelme(tmp_path, SHAPES)
    write_labelme(tmp_path, SHAPES, "a.1")
    assert "expected one image called 'a.1'" in refused(tmp_path, "labelme", capsys)
    for path in tmp_path.glob("*.json"):
        path.unlink()
    annotation = coco_annotation(BOXES[0])
    path = write_coco(tmp_path, [annotation, annotation | {"image_id": 8}])
    content = json.loads(path.read_text())
    content["images"].append(content["images"][0] | {"id": 8, "file_name": "images/a.png"})
    path.write_text(json.dumps(content))
    assert "expected one image called 'a', got another in" in refused(tmp_path, "coco", capsys)


def test_labels_that_are_not_expected_are_named_with_what_they_look_like(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_photo(tmp_path / "a.png")
    write_labelme(tmp_path, [*SHAPES, labelme_shape(Box("raod", 0, 0, 2, 2))])
    line = refused(tmp_path, "labelme", capsys, "--classes", "road", "car")
    assert "a.json: expected a label of --classes (road, car), got 'raod' (is it 'road'?); add it" in line
    write_labelme(tmp_path, SHAPES[:1])
    assert "expected 2 or more, got ['road']; name what is around it with --background" in refused(
        tmp_path, "labelme", capsys
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--add"], "add: expected an out with classes.toml"),
        (["--val-share", "1"], "val_share: expected 0 to 0.9"),
        (["--val-share", "0.1"], "val_share: expected some of 1 images in either split"),
        (["--line-width", "0"], "line_width: expected 1 to 1000"),
        (["--images", "none"], "images: expected a folder, got none"),
        (["--keep-empty"], "keep_empty: expected --as masks and a background"),
    ],
)
def test_settings_that_make_no_sense_are_named(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_photo(tmp_path / "a.png")
    write_labelme(tmp_path, SHAPES)
    assert message in refused(tmp_path, "labelme", capsys, *options)


def test_nothing_is_left_when_writing_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        save_photo(tmp_path / f"{name}.png")
        write_labelme(tmp_path, SHAPES, name)
    copy, done = shutil.copyfile, []

    def full(source: Path, target: Path) -> object:
        done.append(source)
        if len(done) == 3:
            raise OSError(28, "No space left on device", str(target))
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", full)
    assert "No space left on device" in refused(tmp_path, "labelme", capsys)


def test_a_size_that_only_the_orientation_explains_names_the_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_photo(tmp_path / "a.png", orientation=6)  # shown as 12x16, drawn on as it is stored
    write_voc(tmp_path, [voc_object(box) for box in BOXES])
    line = refused(tmp_path, "voc", capsys)
    assert "expected 12x16 pixels" in line
    assert "Then --orientation stored" in line


def test_damaged_run_lengths_end_with_an_error_not_with_a_crash() -> None:
    rng = np.random.default_rng(0)
    good = brush_rle(BOXES[0].mask())
    for _ in range(200):
        data = [int(value) for value in rng.integers(0, 256, rng.integers(0, 40))]
        for broken in (data, good[:6] + data, good[: rng.integers(7, len(good))]):
            with contextlib.suppress(ValueError):
                assert decode_brush(broken, SIZE).counts.sum() == SIZE[0] * SIZE[1]
        with contextlib.suppress(ValueError):
            decode_counts(bytes(rng.integers(32, 127, 9).astype(np.uint8)).decode())


def test_labelstudio_regions_without_a_place_are_no_shapes(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    whole = {"id": "w", "type": "choices", "value": {"choices": ["rainy"]}}
    relation = {"type": "relation", "from_id": "r0", "to_id": "r1"}
    results = [whole, relation, *labelstudio_results(BOXES[0], 0), *labelstudio_results(BOXES[1], 1)]
    write_labelstudio(tmp_path, [labelstudio_task(results)])
    import_.run_import(import_.ImportConfig("labelstudio", tmp_path, tmp_path / "out"))
    assert len(open_split(DataConfig(dataset="folder", root=tmp_path / "out"), "train")) == 1


def test_hidden_folders_of_an_export_do_not_count(tmp_path: Path) -> None:
    save_photo(tmp_path / "a.png")
    write_labelme(tmp_path, SHAPES)
    (tmp_path / "._a.json").write_bytes(b"\0")
    (tmp_path / "annotations.txt").write_text(cvat_element(BOXES[0]))
    import_.run_import(import_.ImportConfig("labelme", tmp_path, tmp_path / "out"))
    assert len(open_split(DataConfig(dataset="folder", root=tmp_path / "out"), "train")) == 1
