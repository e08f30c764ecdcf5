"""Your own images and drawings, and the table of their classes."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coarse_train.commands.predict import find_images
from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, open_split
from coarse_train.data.classes import Classes, palette, read_classes
from coarse_train.data.files import read_map

from .data_trees import FOLDER_CLASSES, FOLDER_TOML, coarse, not_these, save, scene, write_drawings, write_folder_tree


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_folder_tree(tmp_path / "mine")


def _config(root: Path) -> DataConfig:
    return DataConfig(root=root)


def test_images_drawings_and_masks_are_read_by_the_numbers_of_the_table(root: Path) -> None:
    source = open_split(_config(root), "train")
    assert [source.name(index) for index in range(len(source))] == [
        "day0/train0",
        "day0/train2",
        "day1/train1",
        "day1/train3",
    ]
    assert source.classes == FOLDER_CLASSES
    image, mask = scene(1, FOLDER_CLASSES)
    record = source.load(2)
    np.testing.assert_array_equal(record.image, image)
    np.testing.assert_array_equal(record.mask, mask)
    np.testing.assert_array_equal(record.positive, coarse(mask))
    np.testing.assert_array_equal(record.negative, not_these(mask, 3, 2))
    one_layer = source.load(0).negative
    assert one_layer is not None
    assert one_layer.shape == (2, 16, 24)
    assert (one_layer[1] == IGNORE).all()
    assert [len(open_split(_config(root), split)) for split in ("val", "test")] == [2, 2]


def test_images_beside_the_table_are_the_training_images(tmp_path: Path) -> None:
    root = write_folder_tree(tmp_path / "flat", flat=True)
    assert (root / "images").is_dir()
    train, val = (open_split(_config(root), split) for split in ("train", "val"))
    assert [train.name(0), val.name(0)] == ["day0/train0", "day0/val0"]
    assert train.kinds(0) == {"positive", "negative", "mask"}
    shutil.rmtree(root / "val")
    with pytest.raises(FileNotFoundError, match=r"flat: expected val/images/ for split 'val', got images/, "):
        open_split(_config(root), "val")
    (root / "train/images").mkdir(parents=True)
    with pytest.raises(ValueError, match="flat: expected either images/ or train/images/, got both"):
        open_split(_config(root), "train")


def test_each_kind_of_labels_may_be_missing_but_not_all(root: Path) -> None:
    shutil.rmtree(root / "train/masks")
    shutil.rmtree(root / "train/negatives")
    source = open_split(_config(root), "train")
    assert [source.kinds(index) for index in range(4)] == [{"positive"}] * 4
    assert source.load(0).negative is None
    shutil.rmtree(root / "train/positives")
    with pytest.raises(
        ValueError, match=r"expected a label map in .* for every image, got none for day0/train0, day0/train2"
    ):
        open_split(_config(root), "train")
    for kind in ("masks", "positives", "negatives"):
        shutil.rmtree(root / "val" / kind)
    assert open_split(_config(root), "val").kinds(0) == set()  # enough to predict


def test_some_images_may_have_masks_and_others_drawings(root: Path) -> None:
    for path in (root / "train/masks/day0").iterdir():
        path.unlink()
    (root / "train/positives/day1/train1.png").unlink()
    source = open_split(_config(root), "train")
    assert [sorted(source.kinds(index)) for index in range(3)] == [["negative", "positive"]] * 2 + [
        ["mask", "negative"]
    ]
    for kind in ("masks", "negatives"):
        (root / f"train/{kind}/day1/train1.png").unlink()
    (root / "train/negatives/day1/train1.1.png").unlink()
    with pytest.raises(ValueError, match="for every image, got none for day1/train1"):
        open_split(_config(root), "train")
    source = open_split(replace(_config(root), skip_bad=True), "train")
    assert len(source) == 3
    assert [line.split(":")[0] for line in source.skipped] == ["day1/train1"]  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["masks", "positives", "negatives"])
def test_a_label_map_without_its_image_is_named(root: Path, kind: str) -> None:
    save(root / f"train/{kind}/day0/trian0.png", np.zeros((16, 24), np.uint8))
    with pytest.raises(ValueError, match=rf"train/{kind}: expected an image for every .*, got none for day0/trian0"):
        open_split(_config(root), "train")


def test_a_picture_that_is_not_read_is_named_and_not_passed_over(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "train/images/day0/phone.HEIC").touch()
    with pytest.raises(ValueError, match=r"train/images: expected pictures of a format .* got day0/phone\.HEIC$"):
        open_split(_config(root), "train")
    assert len(open_split(replace(_config(root), skip_bad=True), "train")) == 4
    assert "skipped day0/phone.HEIC: expected pictures of a format" in capsys.readouterr().err
    found = find_images(root / "train/images")
    assert [name for name, _ in found] == ["day0/train0", "day0/train2", "day1/train1", "day1/train3"]
    assert "note: left out: day0/phone.HEIC; expected pictures of a format" in capsys.readouterr().err


def test_damaged_and_inconsistent_files_are_listed(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = root / "train/images/day0/train0.png"
    image.write_bytes(image.read_bytes()[:100])
    save(root / "train/masks/day0/train2.png", np.full((16, 24), 1, np.uint8))
    save(root / "train/negatives/day1/train1.1.png", np.zeros((24, 16), np.uint8))
    source = open_split(replace(_config(root), skip_bad=True), "train")
    assert [source.name(index) for index in range(len(source))] == ["day1/train3"]
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "skipped day0/train0: " in lines[0]
    assert "expected labels among [0, 7, 9, 20, 255], got [1]" in lines[1]
    assert "train1.1.png: expected 24x16 pixels" in lines[2]


def test_drawings_in_other_folders_replace_these(root: Path, tmp_path: Path) -> None:
    for name in ("day0/train0", "day0/train2", "day1/train1", "day1/train3"):
        write_drawings(tmp_path / "out/train", name, np.full((3, 16, 24), 1, np.uint8), FOLDER_CLASSES)
    save(root / "train/negatives/orphan.png", np.zeros((16, 24), np.uint8))  # this folder is not looked at
    for kind in ("masks", "positives"):
        shutil.rmtree(root / "train" / kind)
    config = replace(_config(root), negatives=tmp_path / "out")
    source = open_split(config, "train")
    assert source.kinds(0) == {"negative"}
    np.testing.assert_array_equal(source.load(0).negative, np.ones((3, 16, 24)))
    with pytest.raises(ValueError, match=r"got none for day0/train0\.1, .* and 3 more"):  # a positive has one layer
        open_split(replace(config, positives=tmp_path / "out"), "train")


def test_no_folder_and_a_wrong_folder_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"root: expected the folder of your images with classes\.toml, got none"):
        open_split(DataConfig(), "train")
    with pytest.raises(FileNotFoundError, match=r"classes\.toml: expected the class table of your images, got no file"):
        open_split(_config(tmp_path), "train")
    (tmp_path / "classes.toml").write_text(FOLDER_TOML)
    with pytest.raises(FileNotFoundError, match="expected train/images/ or images/ for split 'train', got no folders"):
        open_split(_config(tmp_path), "train")
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="expected images of split 'train', got none"):
        open_split(_config(tmp_path), "train")


def test_ids_and_colours_have_defaults(tmp_path: Path) -> None:
    path = tmp_path / "classes.toml"
    path.write_text('class = [{name = "a"}, {name = "b", id = 9}, {name = "c", colour = [1, 2, 3]}]')
    classes = read_classes(path)
    assert classes.names == ("a", "b", "c")
    assert classes.ids == (0, 9, 2)
    assert classes.colours == (*palette(3)[:2], (1, 2, 3))
    np.testing.assert_array_equal(classes.encode(np.array([[0, 1, 2, IGNORE]], np.uint8)), [[0, 9, 2, IGNORE]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"class: expected tables \[\[class\]\], got None"),
        ('[class]\nname = "a"', r"class: expected tables \[\[class\]\]"),
        ('class = [{name = "a"}]', "names: expected 2 to 254 classes, got 1"),
        ('class = [{name = "a"}, {id = 3}]', "class 1.name: expected a text, got None"),
        ('class = [{name = "a"}, {name = "a"}]', "names: expected each name once"),
        ('class = [{name = "a"}, {name = "b", id = 256}]', "class 1.id: expected an integer from 0 to 255, .* got 256"),
        ('ignore = [255]\nclass = [{name = "a"}, {name = "b", id = 255}]', "ids, ignored: expected different values"),
        ('class = [{name = "a"}, {name = "b", id = [1, 0]}]', "ids, ignored: expected different values"),
        (
            'ignore = {drawings = [0]}\nclass = [{name = "a"}, {name = "b"}]',
            "ignore.drawings: expected one of the keys",
        ),
        (
            'ignore = {masks = [[0, 0]]}\nclass = [{name = "a"}, {name = "b"}]',
            "ignore.masks: expected a list of integers",
        ),
        ('class = [{name = "a"}, {name = "b", id = true}]', "class 1.id: expected an integer .* got True"),
        ('class = [{name = "a", id = 1}, {name = "b"}]', "ids, ignored: expected different values"),
        ('class = [{name = "a", colour = [0, 0]}, {name = "b"}]', "class 0.colour: expected three integers"),
        (
            'class = [{name = "a", color = [0, 0, 0]}, {name = "b"}]',
            "class 0.color: expected one of the keys colour, id, name",
        ),
        ('ignored = [0]\nclass = [{name = "a"}, {name = "b"}]', "ignored: expected one of the keys class, ignore"),
        ('ignore = 0\nclass = [{name = "a"}, {name = "b"}]', "ignore: expected a list of integers"),
        ('ignore = [1]\nclass = [{name = "a"}, {name = "b"}]', "ids, ignored: expected different values"),
        ("class = [", "Invalid value|Unclosed array|expected"),
    ],
)
def test_what_is_wrong_in_the_table_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_classes(path)
    assert str(error.value).startswith(f"{path}: ")


def _table(tmp_path: Path, text: str) -> Classes:
    (tmp_path / "classes.toml").write_text(text)
    return read_classes(tmp_path / "classes.toml")


def test_0_may_be_nothing_in_drawings_and_a_class_in_masks(tmp_path: Path) -> None:
    """Public scribbles: 0 unknown, 1 thing, 2 background; their masks: 0 background, 1 thing."""
    classes = _table(
        tmp_path,
        'ignore = {positives = [0]}\nclass = [{name = "background", id = [0, 2]}, {name = "thing", id = 1}]',
    )
    values = np.array([[0, 1, 2, 255]], np.uint8)
    np.testing.assert_array_equal(classes.decode(values, "x", "positive"), [[IGNORE, 1, 0, IGNORE]])
    np.testing.assert_array_equal(classes.decode(values, "x", "mask"), [[0, 1, 0, IGNORE]])
    labels = np.array([[0, 1, IGNORE]], np.uint8)
    np.testing.assert_array_equal(classes.encode(labels, "positive"), [[2, 1, 255]])
    np.testing.assert_array_equal(classes.encode(labels, "mask"), [[0, 1, 255]])


def test_white_may_be_a_class(tmp_path: Path) -> None:
    pair = 'class = [{name = "ground"}, {name = "crack", id = 255}]'
    classes = _table(tmp_path, pair)
    np.testing.assert_array_equal(classes.decode(np.array([[0, 255]], np.uint8), "x"), [[0, 1]])
    np.testing.assert_array_equal(classes.encode(np.array([[0, 1]], np.uint8)), [[0, 255]])
    with pytest.raises(ValueError, match="ids, ignored: expected a value of label files that says no class, got none"):
        classes.encode(np.array([[0, IGNORE]], np.uint8))
    with pytest.raises(ValueError, match=r"classes: expected classes from 0 to 1 or 255, got \[9\]"):
        classes.encode(np.array([[9]], np.uint8))
    for call in (
        lambda: classes.decode(np.zeros((1, 1), np.uint8), "x", "masks"),
        lambda: classes.ignored_values("masks"),
    ):
        with pytest.raises(ValueError, match=r"kind: expected one of .*'mask'.* or None, got 'masks'"):
            call()
    with pytest.raises(ValueError, match=r"ignored_in: expected .*'mask'.*, got \(\('masks', 3\),\)"):
        replace(classes, ignored_in=(("masks", 3),))
    classes = _table(tmp_path, "ignore = [7]\n" + pair)
    np.testing.assert_array_equal(classes.encode(np.array([[IGNORE, 1]], np.uint8)), [[7, 255]])


COLOURS = """
ignore = [[224, 224, 192]]
class = [{name = "ground", colour = [0, 0, 0]}, {name = "cat", id = 8, colour = [64, 0, 0]}]
"""


def test_coloured_masks_are_read_where_the_table_has_the_colours(tmp_path: Path) -> None:
    classes = _table(tmp_path, COLOURS)
    shown = np.array([[0, 0, 0], [64, 0, 0], [224, 224, 192]], np.uint8)
    labels = np.arange(12).reshape(3, 4) % 3
    expected = np.array([0, 1, IGNORE])[labels]
    save(tmp_path / "rgb.png", shown[labels])
    np.testing.assert_array_equal(read_map(tmp_path / "rgb.png", classes, "mask"), expected)
    alpha = np.full((3, 4, 1), 255, np.uint8)
    alpha[0] = 0  # whatever its colour, nobody drew there
    save(tmp_path / "rgba.png", np.concatenate([shown[labels], alpha], axis=2))
    np.testing.assert_array_equal(read_map(tmp_path / "rgba.png", classes, "mask")[0], [IGNORE] * 4)
    np.testing.assert_array_equal(read_map(tmp_path / "rgba.png", classes, "mask")[1:], expected[1:])
    wrong = shown[labels]
    wrong[2, :3], wrong[1, 1] = (1, 2, 3), (64, 0, 1)
    save(tmp_path / "wrong.png", wrong)
    with pytest.raises(
        ValueError, match=r"wrong\.png: expected the colours .* got \(1, 2, 3\) at 3 pixels, \(64, 0, 1\) at 1 pixels"
    ):
        read_map(tmp_path / "wrong.png", classes, "mask")
    bare = _table(tmp_path, 'class = [{name = "ground"}, {name = "cat"}]')
    with pytest.raises(
        ValueError, match=r"rgb\.png: expected a label map of one channel .* got mode RGB; colours are read wh"
    ):
        read_map(tmp_path / "rgb.png", bare, "mask")


def test_palettes_count_by_colour_where_the_table_has_them_and_by_number_elsewhere(tmp_path: Path) -> None:
    classes = _table(tmp_path, COLOURS)
    labels = Image.fromarray(np.array([[0, 1, 1]], np.uint8)).convert("P")
    for name, shades in (("by_colour", [64, 0, 0, 0, 0, 0]), ("others", [1, 1, 1, 9, 0, 0])):
        labels.putpalette(shades)
        labels.putdata([0, 1, 1])
        labels.save(tmp_path / f"{name}.png")
    np.testing.assert_array_equal(read_map(tmp_path / "by_colour.png", classes, "mask"), [[1, 0, 0]])
    with pytest.raises(ValueError, match=r"others\.png: expected labels among \[0, 8, 255\], got \[1\]"):
        read_map(tmp_path / "others.png", classes, "mask")


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("val", "Val", "expected a split called val, got 'Val'"),
        ("val", "validation", "expected a split called val, got 'validation'"),
        ("test", "Testing", "expected a split called test, got 'Testing'"),
        (
            "train/negatives",
            "negatives",
            "negatives: expected label maps of these images in .*negatives, got them there",
        ),
        ("train/negatives", "train/neg", "neg: expected label maps of these images in .*negatives, got them there"),
    ],
)
def test_a_folder_in_another_place_or_of_another_name_is_not_left_out_without_a_word(
    before: str, after: str, told: str, root: Path
) -> None:
    (root / before).rename(root / after)
    if (root / before).exists():
        pytest.skip("a file system on which both are one")
    with pytest.raises(ValueError, match=told):
        open_split(_config(root), "train")


def test_folders_that_are_something_else_may_lie_beside_the_splits(root: Path) -> None:
    for name in ("validation", "raw", "train/raw", "runs/val/images"):  # without images, or beside val
        (root / name).mkdir(parents=True)
    assert len(open_split(_config(root), "train")) == 4
    (root / "validation" / "images").mkdir()
    assert len(open_split(_config(root), "train")) == 4
    (root / "train" / "positives").rename(root / "elsewhere")
    (root / "positives").mkdir()
    (root / "elsewhere").rename(root / "positives" / "train")  # as `--positives` takes them
    source = open_split(replace(_config(root), positives=root / "positives"), "train")
    assert all("positive" in source.kinds(index) for index in range(4))


def test_a_root_may_be_text_in_a_script(root: Path) -> None:
    assert len(open_split(DataConfig(root=str(root)), "train")) == 4  # type: ignore[arg-type]


def test_a_slip_in_a_palette_is_named_and_makes_no_other_classes(tmp_path: Path) -> None:
    """With one green of 254 instead of 255 the numbers counted, and classes changed places."""
    classes = Classes(("background", "car", "road"), ((0, 0, 0), (255, 0, 0), (0, 255, 0)), by_colour=True)
    numbers = np.array([[0, 1, 2], [1, 1, 1]], np.uint8)
    labels = Image.fromarray(numbers)

    def read(*colours: tuple[int, ...]) -> np.ndarray:
        labels.putpalette([part for colour in colours for part in colour])
        labels.save(tmp_path / "labels.png")
        return read_map(tmp_path / "labels.png", classes, "mask")

    np.testing.assert_array_equal(read((255, 0, 0), (0, 0, 0), (0, 255, 0)), np.array([1, 0, 2])[numbers])
    error = (
        r"labels\.png: .*got \(0, 254, 0\) of 2 that are not in it, and \(255, 0, 0\) of 0, which is another class's"
    )
    with pytest.raises(ValueError, match=error):
        read((255, 0, 0), (0, 0, 0), (0, 254, 0))
    np.testing.assert_array_equal(read((0, 0, 0), (255, 0, 0), (0, 254, 0)), numbers)  # as its numbers say
    np.testing.assert_array_equal(read((9, 9, 9), (8, 8, 8), (7, 7, 7)), numbers)
    np.testing.assert_array_equal(
        read((99, 99, 99), (0, 0, 0), (77, 77, 77)), numbers
    )  # black is often a palette's first or rest
    numbers = np.array([[0, 1, 2], [255, 1, 1]], np.uint8)
    labels = Image.fromarray(numbers)
    np.testing.assert_array_equal(read((99, 99, 99), (88, 88, 88), (77, 77, 77), *[(0, 0, 0)] * 253), numbers)


@pytest.mark.parametrize(
    ("mode", "by_colour"),
    [*((mode, by_colour) for mode in ("P", "L", "GIF") for by_colour in (True, False)), ("RGB", True), ("RGBA", True)],
)
def test_what_is_transparent_says_nothing_in_whatever_file(mode: str, by_colour: bool, tmp_path: Path) -> None:
    """Saved anew with a palette, what an RGBA map left open became the class of its number."""
    colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0))
    classes = Classes(("background", "car", "road"), colours, by_colour=by_colour)
    numbers = np.array([[0, 1, 2, 0], [1, 1, 2, 2]], np.uint8)
    path = tmp_path / ("labels.gif" if mode == "GIF" else "labels.png")
    if mode in ("P", "L", "GIF"):
        image = Image.fromarray(numbers)
        if mode != "L":
            image.putpalette([part for colour in colours for part in colour])
        image.save(path, transparency=0)
    else:
        alpha = np.where(numbers == 0, 0, 255).astype(np.uint8)[..., None]
        painted = np.array(colours, np.uint8)[numbers]
        image = Image.fromarray(np.concatenate([painted, alpha], -1) if mode == "RGBA" else painted)
        image.save(path, **({} if mode == "RGBA" else {"transparency": (0, 0, 0)}))
    np.testing.assert_array_equal(read_map(path, classes, "mask"), np.where(numbers == 0, IGNORE, numbers))
    for bits, packed in ((1, 2), (2, 4), (4, 16)):  # stretched to 255 as they are read
        few = np.array([[0, 1, 1]], np.uint8)
        image = Image.fromarray(few.astype(bool)) if bits == 1 else Image.fromarray(few * (255 // (packed - 1)))
        image.save(tmp_path / "few.png", bits=bits, transparency=1)
        assert (read_map(tmp_path / "few.png", replace(classes, by_colour=False), "mask")[0, 1:] == IGNORE).all()
    if mode in ("P", "L"):
        Image.fromarray(np.zeros((2, 3), np.uint8)).save(path, transparency=0)
        assert (read_map(path, classes, "mask") == IGNORE).all()


def test_the_palette_gives_different_colours_to_as_many_classes_as_there_can_be() -> None:
    for count in (2, 8, 9, 19, 254):
        colours = palette(count)
        assert len(colours) == count
        assert len(set(colours)) > 0.99 * count  # cividis has 256 steps in 8 bits, a few of them alike
        assert all(0 <= value <= 255 for colour in colours for value in colour)
    assert palette(3)[0] == (230, 159, 0)
    assert palette(8)[7] == (0, 0, 0)
    many = np.array(palette(19), int)
    apart = np.abs(many[:, None] - many[None]).max(2) + 255 * np.eye(19, dtype=int)
    assert apart.min() > 30
    assert np.ptp(many, axis=1).min() > 40  # none is a grey, which the image below them is
