"""Reading images and label maps, and lists of them: what is wrong is named, or listed, and never passed over in silence."""

from __future__ import annotations

import pickle
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, Classes
from coarse_train.data.files import FileSource, Item, check, match, open_files
from coarse_train.data.images import load_image, load_labels, read_binary, read_image, read_labels
from coarse_train.data.walk import Fault, find_files, find_pictures

from .data_trees import save, write_drawings

CLASSES = Classes(("a", "b", "c"), ((0, 0, 0), (9, 9, 9), (5, 5, 5)), ids=(0, 7, 20), ignored=(3,))
GREY = np.arange(16 * 24, dtype=np.uint16).reshape(16, 24).astype(np.uint8)
RGB = np.stack([GREY, GREY // 2, 255 - GREY], axis=2)


def _png(path: Path, packed: bytes, width: int, height: int, *, bits: int, colour: int) -> Path:
    """A PNG of any bit depth, from packed rows; Pillow cannot write all of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = len(packed) // height
    lines = b"".join(b"\0" + packed[top * row : (top + 1) * row] for top in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines)), chunk(b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    return path


def _items(root: Path, count: int = 4, *, layers: int = 1) -> list[Item]:
    """Images 0, 1, ... with all three kinds of label maps; image 0 is all class 0, image 1 all class 1, and so on."""
    items = []
    for number in range(count):
        labels = np.full((16, 24), number % 3, np.uint8)
        save(root / f"images/{number}.png", RGB)
        save(root / f"masks/{number}.png", CLASSES.encode(labels))
        save(root / f"positives/{number}.png", CLASSES.encode(labels))
        write_drawings(root / "negatives", str(number), np.stack([labels] * layers), CLASSES)
        negative = tuple(root / f"negatives/{number}{'' if not k else f'.{k}'}.png" for k in range(layers))
        items.append(
            Item(
                str(number),
                root / f"images/{number}.png",
                root / f"positives/{number}.png",
                negative,
                root / f"masks/{number}.png",
            )
        )
    return items


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_images_keep_their_channels_and_lose_alpha_without_blending(tmp_path: Path) -> None:
    alpha = np.full((16, 24, 1), 40, np.uint8)
    save(tmp_path / "grey.png", GREY)
    save(tmp_path / "grey_alpha.png", np.concatenate([GREY[..., None], alpha], axis=2))
    save(tmp_path / "rgb.png", RGB)
    save(tmp_path / "rgba.png", np.concatenate([RGB, alpha], axis=2))
    Image.fromarray(GREY > 99).save(tmp_path / "bit.png")
    for name, expected in [("grey", GREY[..., None]), ("grey_alpha", GREY[..., None]), ("rgb", RGB), ("rgba", RGB)]:
        np.testing.assert_array_equal(read_image(tmp_path / f"{name}.png"), expected)
    np.testing.assert_array_equal(read_image(tmp_path / "bit.png")[..., 0], np.where(GREY > 99, 255, 0))


def test_a_palette_is_colours_in_an_image_and_numbers_in_a_label_map(tmp_path: Path) -> None:
    palette = Image.fromarray(GREY % 3).convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "palette.png"), GREY % 3)
    colours = np.array([(10, 20, 30), (40, 50, 60), (70, 80, 90)], np.uint8)
    np.testing.assert_array_equal(read_image(tmp_path / "palette.png"), colours[GREY % 3])


@pytest.mark.parametrize("name", ["photo.jpg", "photo.png", "photo.webp", "photo.tif"])
def test_an_image_is_turned_as_its_orientation_tag_says(tmp_path: Path, name: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the first row is the right side: what was stored is turned clockwise
    upright = np.kron(np.array([[30, 200, 90], [120, 60, 240]], np.uint8), np.ones((8, 8), np.uint8))
    tag = {"tiffinfo": {0x0112: 6}} if name.endswith("tif") else {"exif": exif}
    Image.fromarray(np.rot90(upright)).save(tmp_path / name, quality=95, **tag)
    picture = load_image(tmp_path / name)
    assert picture.turned
    assert np.abs(picture.pixels[..., 0].astype(int) - upright).max() < 8
    Image.fromarray(upright).save(tmp_path / "plain.png")
    assert not load_image(tmp_path / "plain.png").turned


def test_a_drawing_of_the_image_as_it_is_stored_is_told_why_it_does_not_fit(tmp_path: Path) -> None:
    """A tag in the label file itself is followed, too."""
    exif = Image.Exif()
    exif[0x0112] = 6
    labels = np.arange(16 * 24).reshape(16, 24) % 3
    Image.fromarray(np.rot90(RGB)).save(tmp_path / "0.png", exif=exif)
    stored = Image.fromarray(np.rot90(CLASSES.encode(labels.astype(np.uint8))))
    stored.save(tmp_path / "tag.png", exif=exif)
    stored.save(tmp_path / "none.png")
    item = Item("0", tmp_path / "0.png", mask=tmp_path / "tag.png")
    np.testing.assert_array_equal(FileSource([item], CLASSES).load(0).mask, labels)
    with pytest.raises(
        ValueError, match=r"none\.png: expected 24x16 pixels .*, got 16x24; the image has an orientation tag"
    ):
        FileSource([replace(item, mask=tmp_path / "none.png")], CLASSES).load(0)


def test_a_label_file_whose_numbers_are_not_what_was_drawn_is_refused_whatever_it_is_called(tmp_path: Path) -> None:
    grey, rgb = Image.fromarray(GREY), Image.fromarray(RGB)
    rgb.save(tmp_path / "lossy.webp")
    rgb.save(tmp_path / "lossless.webp", lossless=True)
    rgb.save(tmp_path / "jpeg.tif", compression="jpeg")
    grey.save(tmp_path / "deflate.tif", compression="tiff_adobe_deflate")
    grey.save(tmp_path / "wavelets.jp2")
    grey.save(tmp_path / "jpeg_inside.png", "JPEG")
    grey.save(tmp_path / "inverted.tif", tiffinfo={262: 0})  # white is zero
    (tmp_path / "scaled.pgm").write_bytes(b"P5 2 1 3\n\x01\x03")  # Pillow makes 85 and 255 of them
    (tmp_path / "whole.pgm").write_bytes(b"P5 2 1 255\n\x01\x03")
    for name, got in {
        "lossy.webp": "lossless label map, such as PNG, got WEBP",
        "jpeg.tif": "got TIFF with jpeg compression",
        "wavelets.jp2": "got JPEG2000",
        "jpeg_inside.png": "got JPEG, which alters values",
        "inverted.tif": "stored as they are, got L;I in a TIFF",
        "scaled.pgm": "stored as they are, got L scaled in a PPM",
    }.items():
        with pytest.raises(ValueError, match=rf"{name}: .*{got}"):
            load_labels(tmp_path / name)
    np.testing.assert_array_equal(load_labels(tmp_path / "lossless.webp").pixels, RGB)
    np.testing.assert_array_equal(read_labels(tmp_path / "deflate.tif"), GREY)
    np.testing.assert_array_equal(read_labels(tmp_path / "whole.pgm"), [[1, 3]])


@pytest.mark.parametrize("name", ["stack.tif", "animated.png", "animated.gif"])
def test_a_file_of_several_pages_is_refused_and_the_main_picture_of_a_camera_is_read(tmp_path: Path, name: str) -> None:
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
    for read in (read_image, read_labels, read_binary):
        with pytest.raises(
            ValueError, match=rf"{name}: expected a file with one picture, got 2 pages or frames; split it"
        ):
            read(tmp_path / name)
    flat = [Image.new("RGB", (8, 8), (value, value, value)) for value in (40, 200)]
    flat[0].save(tmp_path / "camera.jpg", "MPO", save_all=True, append_images=flat[1:])
    np.testing.assert_array_equal(read_image(tmp_path / "camera.jpg"), np.full((8, 8, 3), 40))


def test_more_pixels_than_the_limit_are_refused_and_the_option_that_raises_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = _items(tmp_path, 1)
    with pytest.raises(ValueError, match=r"0\.png: expected at most 383 pixels, got 24x16; --max-pixels 384 reads it"):
        open_files(items, CLASSES, DataConfig(max_pixels=383), "train").load(0)
    assert open_files(items, CLASSES, DataConfig(max_pixels=384), "train").load(0).image.shape == (16, 24, 3)
    _png(tmp_path / "large.png", b"", 20_000, 9_001, bits=1, colour=0)
    with pytest.raises(ValueError, match=r"large\.png: expected at most 178956970 pixels, got 20000x9001"):
        read_labels(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # nor does Pillow's own limit hold what the option allows
    assert read_image(tmp_path / "images/0.png").shape == (16, 24, 3)


def test_16_bits_are_refused_also_where_pillow_would_drop_half_of_them(tmp_path: Path) -> None:
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "grey.png")
    deep = (RGB.astype(np.uint16) * 257).astype(">u2").tobytes()
    _png(tmp_path / "rgb.png", deep, 24, 16, bits=16, colour=2)
    for name in ("grey.png", "rgb.png"):
        with pytest.raises(
            ValueError, match=rf"{name}: expected a grey or colour image of 8 bits per channel, got .*16"
        ):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"grey\.png: expected a label map .* got mode I;16"):
        read_labels(tmp_path / "grey.png")


def test_label_maps_of_1_2_4_and_8_bits_are_their_numbers(tmp_path: Path) -> None:
    save(tmp_path / "8.png", GREY)
    np.testing.assert_array_equal(read_labels(tmp_path / "8.png"), GREY)
    Image.fromarray(GREY > 99).save(tmp_path / "1.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "1.png"), GREY > 99)
    _png(tmp_path / "4.png", bytes([0x01, 0x9F]), 4, 1, bits=4, colour=0)
    np.testing.assert_array_equal(read_labels(tmp_path / "4.png"), [[0, 1, 9, 15]])
    _png(tmp_path / "2.png", bytes([0b00011011]), 4, 1, bits=2, colour=0)
    np.testing.assert_array_equal(read_labels(tmp_path / "2.png"), [[0, 1, 2, 3]])


def test_a_label_map_in_colours_or_jpeg_is_named(tmp_path: Path) -> None:
    save(tmp_path / "colours.png", RGB)
    save(tmp_path / "lossy.jpg", GREY)
    with pytest.raises(ValueError, match=r"colours\.png: expected a label map of one channel .* got mode RGB"):
        read_labels(tmp_path / "colours.png")
    with pytest.raises(ValueError, match=r"lossy\.jpg: expected .* got JPEG"):
        read_labels(tmp_path / "lossy.jpg")


def test_black_and_white_is_read_from_any_mode_and_grey_is_named(tmp_path: Path) -> None:
    white = GREY > 99
    Image.fromarray(white).save(tmp_path / "bit.png")
    Image.fromarray(np.where(white, 255, 0).astype(np.uint8)).save(tmp_path / "white.gif")
    save(tmp_path / "one.png", white.astype(np.uint8))
    save(tmp_path / "rgb.png", np.where(white, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2))
    for name in ("bit.png", "white.gif", "one.png", "rgb.png"):
        np.testing.assert_array_equal(read_binary(tmp_path / name), white)
    save(tmp_path / "grey.png", GREY)
    with pytest.raises(ValueError, match=r"grey\.png: expected black \(0\) and white .* got values \[0, 1, 2"):
        read_binary(tmp_path / "grey.png")


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.tif", "cut.gif"])
def test_a_truncated_file_is_named(tmp_path: Path, name: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    save(tmp_path / name, noise)
    _truncate(tmp_path / name)
    for read in (read_image, read_labels, read_binary):
        with pytest.raises(ValueError, match=rf"{name}: expected a complete image file, got one that cannot be read"):
            read(tmp_path / name)


def test_damaged_empty_and_missing_files_are_named(tmp_path: Path) -> None:
    save(tmp_path / "flipped.png", RGB)
    content = bytearray((tmp_path / "flipped.png").read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(content)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    for name in ("flipped.png", "empty.png", "text.png"):
        with pytest.raises(ValueError, match=rf"{name}: expected a complete image file"):
            read_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.png: expected an image file, got none"):
        read_image(tmp_path / "none.png")
    with pytest.raises(FileNotFoundError, match="expected an image file, got a folder"):
        read_labels(tmp_path)


def test_find_files_names_by_relative_path_and_passes_over_hidden_ones(tmp_path: Path) -> None:
    for path in ("b/2.PNG", "b/1.jpg", "a.png", ".hidden.png", "notes.txt"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).touch()
    assert list(find_files(tmp_path, ".png", ".jpg")) == ["a", "b/1", "b/2"]
    (tmp_path / "b/1.png").touch()
    with pytest.raises(ValueError, match="expected one file for 'b/1', got also"):
        find_files(tmp_path, ".png", ".jpg")
    with pytest.raises(FileNotFoundError, match="elsewhere: expected a folder"):
        find_files(tmp_path / "elsewhere", ".png")


def test_what_notebooks_archives_and_file_servers_leave_in_folders_is_no_data(tmp_path: Path) -> None:
    for folder in ("", "day", ".ipynb_checkpoints", "day/.hidden", "__MACOSX", "day/@eaDir"):
        (tmp_path / "all" / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / "all" / folder / f"{len(folder)}.png").touch()
    assert list(find_files(tmp_path / "all", ".png")) == ["0", "day/3"]


def test_nothing_is_found_twice_through_links(tmp_path: Path) -> None:
    for folder in ("all/a", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.png").touch()
    for link, folder in (("0_same", "all/a"), ("a/loop", "all"), ("linked", "elsewhere"), ("again", "elsewhere")):
        (tmp_path / "all" / link).symlink_to(tmp_path / folder)
    assert list(find_files(tmp_path / "all", ".png")) == ["a/x", "again/x"]


def test_a_picture_of_a_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    for name in ("a.JPG", "b.jfif", "c.jp2", "d.heic", "e.psd", "a.tga", "notes.txt"):
        (tmp_path / name).touch()
    faults: list[Fault] = []
    assert list(find_pictures(tmp_path, faults)) == ["a", "b", "c"]
    assert [fault.names for fault in faults] == [["d.heic", "e.psd"]]  # a.tga is there as a.JPG
    with pytest.raises(
        ValueError, match=r"expected pictures of a format that is read \(\.png, .*\), got d\.heic, e\.psd$"
    ):
        FileSource.open([], CLASSES, faults=faults)


def test_an_image_without_label_map_and_a_label_map_without_image_are_listed(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.png" for name in ("a", "x", "y")}
    faults: list[Fault] = []
    found = match(["a", *"bcdefgh"], files, "mask", tmp_path, faults)
    assert found == {"a": (files["a"],)}
    with pytest.raises(ValueError, match=r"expected a mask for every image, got none for b, c, d, e, f and 2 more"):
        FileSource.open(_items(tmp_path), CLASSES, faults=faults)
    with pytest.raises(ValueError, match=r"expected an image for every mask, got none for x, y$"):
        FileSource.open(_items(tmp_path), CLASSES, faults=faults[1:])


def test_an_image_called_like_a_layer_of_another_keeps_its_own_drawing(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.png" for name in ("x", "x.1", "x.2")}
    faults: list[Fault] = []
    assert match(["x"], files, "drawing", tmp_path, faults, layers=True) == {"x": tuple(files.values())}
    found = match(["x", "x.1"], {name: files[name] for name in ("x", "x.1")}, "drawing", tmp_path, faults, layers=True)
    assert found == {"x": (files["x"],), "x.1": (files["x.1"],)}
    assert not faults


def test_records_have_what_the_files_say(tmp_path: Path) -> None:
    source = FileSource.open(_items(tmp_path), CLASSES)
    assert [source.name(index) for index in range(len(source))] == ["0", "1", "2", "3"]
    record = source.load(2)
    np.testing.assert_array_equal(record.image, RGB)
    for labels in (record.positive, record.mask):
        assert labels is not None
        assert labels.shape == (16, 24)
        assert labels.dtype == np.uint8
        assert set(labels.ravel()) == {2}
    assert record.negative is not None
    assert record.negative.shape == (1, 16, 24)
    bare = FileSource.open([Item("0", tmp_path / "images/0.png")], CLASSES)
    assert bare.kinds(0) == frozenset()
    assert (bare.load(0).positive, bare.load(0).negative, bare.load(0).mask) == (None, None, None)


def test_images_with_fewer_layers_get_empty_ones(tmp_path: Path) -> None:
    items = _items(tmp_path, layers=3)
    items = [replace(item, negative=item.negative[:number]) for number, item in enumerate(items)]
    source = FileSource.open(items, CLASSES)
    negatives = [source.load(index).negative for index in range(4)]
    assert [negative is not None and negative.shape for negative in negatives] == [(3, 16, 24)] * 4
    empty = [[bool((layer == IGNORE).all()) for layer in negative] for negative in negatives if negative is not None]
    assert empty == [[True] * 3, [False, True, True], [False, False, True], [False] * 3]
    assert [("negative" in source.kinds(index)) for index in range(4)] == [False, True, True, True]


def test_outside_the_field_of_view_nothing_is_labelled(tmp_path: Path) -> None:
    inside = np.zeros((16, 24), bool)
    inside[4:12, 6:18] = True
    save(tmp_path / "field.gif", np.where(inside, 255, 0).astype(np.uint8))
    record = FileSource.open([replace(_items(tmp_path, 2)[1], field_of_view=tmp_path / "field.gif")], CLASSES).load(0)
    assert record.negative is not None
    for labels in (record.positive, record.mask, record.negative[0]):
        np.testing.assert_array_equal(labels, np.where(inside, 1, IGNORE))


def test_a_label_map_of_another_size_is_named_with_its_image(tmp_path: Path) -> None:
    items = _items(tmp_path)
    save(tmp_path / "masks/1.png", np.zeros((24, 16), np.uint8))
    source = FileSource.open(items, CLASSES)
    source.load(0)
    with pytest.raises(ValueError, match=r"masks/1\.png: expected 24x16 pixels as .*images/1\.png has, got 16x24"):
        source.load(1)


def test_a_number_in_no_table_is_named(tmp_path: Path) -> None:
    items = _items(tmp_path)
    save(tmp_path / "positives/1.png", np.full((16, 24), 8, np.uint8))
    with pytest.raises(ValueError, match=r"positives/1\.png: expected labels among \[0, 3, 7, 20, 255\], got \[8\]"):
        FileSource.open(items, CLASSES).load(1)


def test_missing_files_are_found_before_training(tmp_path: Path) -> None:
    items = _items(tmp_path)
    (tmp_path / "masks/1.png").unlink()
    (tmp_path / "negatives/3.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"masks/1\.png: expected a file, got none \(2 of 16 are missing\)"):
        FileSource.open(items, CLASSES)


def test_skip_bad_lists_every_image_that_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = _items(tmp_path, 6)
    _truncate(tmp_path / "images/0.png")
    (tmp_path / "masks/1.png").unlink()
    save(tmp_path / "negatives/2.png", np.zeros((8, 8), np.uint8))
    save(tmp_path / "positives/3.png", np.full((16, 24), 8, np.uint8))
    faults = [Fault("a mask for every image", tmp_path, ["4"]), Fault("an image for every mask", tmp_path, ["orphan"])]
    source = FileSource.open(items, CLASSES, skip_bad=True, faults=faults)
    assert [source.name(index) for index in range(len(source))] == ["5"]
    assert check(source) == {}
    assert sorted(line.split(":")[0] for line in source.skipped) == ["0", "1", "2", "3", "4", "orphan"]
    reasons = {line.split(":")[0]: line for line in source.skipped}
    for name, reason in {
        "0": "cannot be read",
        "1": "got none",
        "2": "8x8",
        "3": "[8]",
        "4": "a mask",
        "orphan": "an image",
    }.items():
        assert reason in reasons[name]
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"skipped {line}" for line in source.skipped]
    assert captured.out == ""


def test_skip_bad_does_not_end_with_nothing(tmp_path: Path) -> None:
    items = _items(tmp_path, 2)
    for number in range(2):
        _truncate(tmp_path / f"images/{number}.png")
    with pytest.raises(ValueError, match=r"at least one good image of 2, got none; 0: .*images/0\.png"):
        FileSource.open(items, CLASSES, skip_bad=True)


def test_two_images_of_one_name_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected each image once, got more than one 0"):
        FileSource.open(_items(tmp_path, 1) * 2, CLASSES)


def test_a_source_goes_to_worker_processes(tmp_path: Path) -> None:
    source = FileSource.open(_items(tmp_path), CLASSES, readers={"mask": read_binary})
    again = pickle.loads(pickle.dumps(source))
    np.testing.assert_array_equal(again.load(0).mask, source.load(0).mask)


def _drawn(folder: Path, *, split: str = "", names: tuple[str, ...] = ("0", "1", "2", "3")) -> None:
    for name in names:
        layers = np.full((2, 16, 24), 2, np.uint8)
        layers[1] = IGNORE
        write_drawings(folder / split, name, layers[: 1 + (name == "1")], CLASSES)


def test_drawings_in_a_folder_replace_the_data_sets_own_in_each_split(tmp_path: Path) -> None:
    items = _items(tmp_path)
    for kind in ("positives", "negatives"):
        for split in ("train", "test"):
            label = {"train": 1, "test": 2}[split]
            for name in ("0", "1", "2", "3"):
                write_drawings(tmp_path / "out" / kind / split, name, np.full((1, 16, 24), label, np.uint8), CLASSES)
    save(tmp_path / "out/negatives/train/2.1.png", CLASSES.encode(np.zeros((16, 24), np.uint8)))
    config = DataConfig(positives=tmp_path / "out/positives", negatives=tmp_path / "out/negatives")
    readers = {"positive": read_binary, "mask": read_labels}  # the data set's own encoding does not hold for drawings
    train, test = (open_files(items, CLASSES, config, split, readers=readers) for split in ("train", "test"))
    for source, label, layers in ((train, 1, 2), (test, 2, 1)):
        record = source.load(0)
        assert record.negative is not None
        assert record.negative.shape == (layers, 16, 24)
        np.testing.assert_array_equal(record.positive, np.full((16, 24), label))
        np.testing.assert_array_equal(record.negative[0], np.full((16, 24), label))
        np.testing.assert_array_equal(record.mask, CLASSES.encode(np.zeros((16, 24), np.uint8)))
    negative = train.load(2).negative
    assert negative is not None
    assert [set(layer.ravel()) for layer in negative] == [{1}, {0}]
    assert open_files(items, CLASSES, config, "val").kinds(0) == {"mask"}  # nobody drew there
    (tmp_path / "out/positives/test/0.png").unlink()
    test = open_files(items, CLASSES, replace(config, skip_bad=True), "test")
    assert (len(test), test.kinds(0)) == (4, {"negative", "mask"})  # nobody learns there, but it can be scored
    config = replace(config, positives=tmp_path / "only_test")
    _drawn(tmp_path / "only_test", split="test")
    with pytest.raises(FileNotFoundError, match=r"positives: expected .*only_test to have a folder train, got test"):
        open_files(items, CLASSES, config, "train")


def test_drawings_in_a_folder_without_splits_are_those_of_the_training_images(tmp_path: Path) -> None:
    items = _items(tmp_path)
    _drawn(tmp_path / "drawn", names=("0", "1", "2", "3", "of_another_split"))
    config = DataConfig(negatives=tmp_path / "drawn")
    negative = open_files(items, CLASSES, config, "train").load(0).negative
    assert negative is not None
    assert negative.shape == (2, 16, 24)
    assert open_files(items, CLASSES, config, "val").kinds(0) == {"positive", "mask"}
    with pytest.raises(FileNotFoundError, match=r"positives: expected a folder of drawings, got .*nowhere"):
        open_files(items, CLASSES, DataConfig(positives=tmp_path / "nowhere"), "train")


def test_an_image_without_its_drawing_is_named_or_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = _items(tmp_path)
    _drawn(tmp_path / "drawn", names=("0", "2"))
    config = DataConfig(positives=tmp_path / "drawn")
    with pytest.raises(
        ValueError, match=r"drawn: expected a positive drawing NAME\.png for every image, got none for 1, 3"
    ):
        open_files(items, CLASSES, config, "train")
    source = open_files(items, CLASSES, replace(config, skip_bad=True), "train")
    assert [source.name(index) for index in range(len(source))] == ["0", "2"]
    assert [line.split(":")[0] for line in source.skipped] == ["1", "3"]
    assert capsys.readouterr().err.count("skipped ") == 2
    # beyond the limit nothing is asked for
    assert len(open_files(items, CLASSES, replace(config, limit=1), "train")) == 1


@pytest.mark.parametrize("split", ["", "train"])
def test_a_layer_that_is_not_the_next_one_is_not_lost(tmp_path: Path, split: str) -> None:
    items = _items(tmp_path)
    _drawn(tmp_path / "drawn", split=split)
    save(tmp_path / "drawn" / split / "2.2.png", np.zeros((16, 24), np.uint8))
    with pytest.raises(ValueError, match=r"expected an image for every negative drawing NAME\.png, got none for 2\.2"):
        open_files(items, CLASSES, DataConfig(negatives=tmp_path / "drawn"), "train")


def test_a_drawing_of_no_image_in_a_split_folder_is_named(tmp_path: Path) -> None:
    items = _items(tmp_path)
    _drawn(tmp_path / "drawn", split="train", names=("0", "1", "2", "3", "typo"))
    with pytest.raises(ValueError, match=r"expected an image for every negative drawing .* got none for typo"):
        open_files(items, CLASSES, DataConfig(negatives=tmp_path / "drawn"), "train")


def test_files_beyond_the_limit_are_not_looked_at(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    items = _items(tmp_path)
    _truncate(tmp_path / "images/3.png")
    (tmp_path / "masks/3.png").unlink()
    assert len(open_files(items, CLASSES, DataConfig(limit=3), "train")) == 3
    assert len(open_files(items, CLASSES, DataConfig(limit=3, skip_bad=True), "train")) == 3
    assert capsys.readouterr().err == ""
    with pytest.raises(FileNotFoundError, match=r"masks/3\.png"):
        open_files(items, CLASSES, DataConfig(limit=3), "val")
    with pytest.raises(ValueError, match="limit: expected at least 1 training image, got 0"):
        open_files(items, CLASSES, DataConfig(limit=0), "train")
