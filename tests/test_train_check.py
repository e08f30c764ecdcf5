"""`coarse-train check`, and the same as the first seconds of `fit`: what is wrong is told before the first step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coarse_train.checking import check_run
from coarse_train.cli import main
from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, replace
from coarse_train.criterion import open_class_weights
from coarse_train.data import open_split
from coarse_train.data.files import FileSource
from coarse_train.data.inspect import Facts, cache_file, inspect
from coarse_train.data.sheet import draw_sheet
from coarse_train.distributed import World

from .data_trees import FOLDER_CLASSES, coarse, save, scene, write_camvid_tree, write_folder_tree

WORLD = World(0, 1, torch.device("cpu"))
FIT = "--crop None --scale 1 1 --colour 0 --workers 0 --batch-size 2 --widths 4 8 --threads 1 --positive.cm none --steps 1"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three classes; positives and masks alone."""
    root = write_folder_tree(tmp_path / "mine")
    for split in ("train", "val", "test"):
        shutil.rmtree(root / split / "negatives")
    return root


def _config(root: Path, **data: object) -> FitConfig:
    config = FitConfig(data=DataConfig(root=root), positive=DrawingsConfig(), out=root.parent / "run")
    config.out.mkdir(exist_ok=True)
    return replace(config, data=replace(config.data, **data))


def _checked(config: FitConfig) -> tuple[int, list[str]]:
    return check_run(config, open_split(config.data, "train"), WORLD)


def _fit(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    status = main(["fit", "folder", "--root", str(root), "--out", str(root.parent / "fit"), *FIT.split(), *more])
    return status, capsys.readouterr().err


def _change(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in folder.rglob("*.png"):
        save(path, change(np.array(Image.open(path))))


def test_facts_are_what_was_drawn(root: Path) -> None:
    fact = inspect(open_split(DataConfig(root=root), "train"))[0]
    _, mask = scene(0, FOLDER_CLASSES)
    positive = coarse(mask)
    assert isinstance(fact, Facts)
    assert (fact.size, fact.channels, fact.turned, fact.palettes) == ([16, 24], 3, [], {})
    assert fact.pixels["mask"] == [int((mask == label).sum()) for label in range(3)]
    assert fact.pixels["positive"] == [int((positive == label).sum()) for label in range(3)]
    assert fact.drawn == {"mask": 16 * 24, "positive": int((positive < 3).sum())}
    assert fact.nothing == {"mask": {}, "positive": {"255": int((positive == 255).sum())}}


def test_a_file_that_has_not_changed_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    examine = FileSource.examine

    def spy(self: FileSource, index: int) -> object:
        read.append(self.name(index))
        return examine(self, index)

    monkeypatch.setattr(FileSource, "examine", spy)
    monkeypatch.setattr("coarse_train.data.inspect._ALONE", {})
    first = inspect(open_split(DataConfig(root=root), "train"))
    assert sorted(read) == ["day0/train0", "day0/train2", "day1/train1", "day1/train3"]
    monkeypatch.setattr("coarse_train.data.inspect._ALONE", {})  # as in the next process
    read.clear()
    assert inspect(open_split(DataConfig(root=root), "train")) == first
    assert read == []
    os.utime(root / "train/masks/day1/train1.png", ns=(1, 1))
    inspect(open_split(DataConfig(root=root, skip_bad=True), "train"))  # which looks for itself, and remembers
    assert read == ["day1/train1"]
    (root / "classes.toml").write_text((root / "classes.toml").read_text().replace("id = 7", "id = [7, 8]"))
    inspect(open_split(DataConfig(root=root), "train"))
    assert len(read) == 5


def test_a_cache_that_cannot_be_written_is_told_and_no_error(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    _, lines = _checked(_config(root))
    assert f"not remembered, since {tmp_path}/file/coarse_train/" in lines[-1]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    os.utime(root / "train/masks/day1/train1.png", ns=(1, 1))
    _, lines = _checked(_config(root))
    assert f"every file has been read, remembered in {tmp_path}/cache/coarse_train;" in lines[-1]
    cache_file(open_split(DataConfig(root=root), "train")).write_text("{damaged")
    monkeypatch.setattr("coarse_train.data.inspect._ALONE", {})
    _checked(_config(root))


def test_the_table_has_pixels_and_images_of_each_kind_and_class(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    masks = np.stack([scene(number, FOLDER_CLASSES)[1] for number in range(4)])
    drawn = np.stack([coarse(mask) for mask in masks])
    assert lines[0] == "train: 4 images, 24x16 pixels, 4 in colour, 0 grey"
    assert lines[1].split() == ["positives", "masks"]
    for label, line in enumerate(lines[3:6]):
        cells = [
            f"{count:,}" for one in (drawn, masks) for count in ((one == label).any((1, 2)).sum(), (one == label).sum())
        ]
        assert line.split() == [FOLDER_CLASSES.names[label], *cells]
    assert lines[6].split()[3:5] == [f"{100 * (drawn < 3).mean():.1f}", "%"]
    assert [line.split(":")[0] for line in lines if " images, " in line] == ["train", "val", "test"]
    assert (tmp_path / "out/check.txt").read_text().splitlines() == lines[:-1]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "check.txt", *(f"check_{split}.png" for split in ("train", "val", "test"))
    }  # fmt: skip
    # after something has been mended the same command is typed again; a folder with anything else is asked about
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    (tmp_path / "out" / "notes.txt").touch()
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 1


def test_drawings_lie_on_top_of_their_images_in_the_contact_sheet(tmp_path: Path) -> None:
    root = write_camvid_tree(tmp_path / "camvid", size=(120, 240))
    source = open_split(DataConfig(dataset="camvid", root=root), "train")
    sheet = np.array(draw_sheet(source))
    record = source.load(0)
    assert record.mask is not None
    height = len(sheet) - 4 * (120 + 14 + 4)  # the legend
    image, masks = (sheet[height + 14 :, left : left + 240][:120] for left in (0, 244))
    np.testing.assert_array_equal(image, record.image)
    known = record.mask < 255
    np.testing.assert_array_equal(
        masks[known], record.image[known] // 3 + source.classes.paint(record.mask)[known] // 3 * 2
    )
    np.testing.assert_array_equal(masks[~known], record.image[~known] // 2 + 64)


def test_all_that_is_bad_is_listed_and_one_line_says_how_many(
    root: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save(root / "train/masks/day0/train2.png", np.full((16, 24), 1, np.uint8))
    (root / "val/images/day1/val1.png").write_bytes(b"")
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert (
        "train2.png: expected labels among [0, 7, 9, 20, 255], got [1]; what stands for no class belongs in the" in err
    )
    assert "(2 images are bad; " in err
    assert (tmp_path / "out" / "check_train.png").exists()  # of the others
    assert [line.split(":")[1].split("/")[-1] for line in out.splitlines() if line.startswith("bad: ")] == [
        "train2.png", "val1.png"
    ]  # fmt: skip


def test_a_mask_of_the_validation_split_that_does_not_fit_is_told_before_the_first_step(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(root / "val/masks/day1/val1.png", np.zeros((15, 24), np.uint8))
    status, err = _fit(root, capsys)
    assert status == 1
    assert "val/masks/day1/val1.png: expected 24x16 pixels" in err
    assert (root.parent / "fit/metrics.jsonl").read_text() == ""
    assert not (root.parent / "fit/last.pt").exists()


def test_a_colour_image_after_grey_ones_makes_a_network_for_colours(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (root / "train/images").rglob("*.png"):
        Image.open(path).convert("L").save(path)
    assert _checked(_config(root))[0] == 3  # val has colours
    assert _fit(root, capsys)[0] == 0
    assert torch.load(root.parent / "fit/last.pt", weights_only=True)["channels"] == 3
    steps = (root.parent / "fit/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in steps] == [1, 1]  # the step, and its score
    shutil.rmtree(root / "val")
    assert _checked(_config(root))[0] == 1


def test_images_of_two_sizes_without_a_crop_are_told_before_the_first_step(root: Path) -> None:
    for kind in ("images", "positives", "masks"):
        path = root / "train" / kind / "day1/train3.png"
        Image.open(path).resize((20, 16), Image.Resampling.NEAREST).save(path)
    with pytest.raises(
        ValueError, match=r"crop: .* got 24x16 pixels \(day0/train0\) and 20x16 \(day1/train3\); set --crop"
    ):
        _checked(_config(root))
    _checked(_config(root, crop=(16, 16)))
    _checked(replace(_config(root), batch_size=1))


def test_background_among_the_negatives_of_a_transition_that_never_names_it_is_told_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loss became inf at step 1, and a lower --lr was advised."""
    root = write_folder_tree(tmp_path / "mine")
    status, error = _fit(root, capsys, "--transition", "objects")
    assert status == 1
    assert "transition: expected negative drawings that never name 'ground' with 'objects', got " in error
    _change(root / "train/negatives", lambda ids: np.where(ids == 0, 255, ids))
    assert _fit(root, capsys, "--transition", "objects")[0] == 0


def test_no_split_to_check_is_an_error_that_names_them(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(root / "val")
    shutil.rmtree(root / "test")
    command = ["check", "folder", "--root", str(root), "--out", str(root.parent / "checked"), "--splits"]
    for splits, told in (
        (["val", "test"], "found none in"),
        ([], "splits: expected some of train, val and test, got none"),
    ):
        assert main([*command, *splits]) == 1
        assert told in capsys.readouterr().err
    assert main([*command, "train", "train"]) == 0
    assert capsys.readouterr().out.count("train:") == 1


def test_transparent_pixels_are_counted_as_no_number(root: Path) -> None:
    path = root / "train" / "masks" / "day0" / "train0.png"
    ids = np.array(Image.open(path))
    ids[0, 0] = 9  # ignored
    ids[1:3] = 7
    Image.fromarray(ids).save(path, transparency=7)
    facts = inspect(open_split(_config(root).data, "train"), WORLD)[0]
    assert isinstance(facts, Facts)
    assert facts.nothing["mask"] == {"9": 1}
    assert facts.pixels["mask"][1] == 0
    Image.fromarray(np.full_like(ids, 7)).save(path, transparency=7)
    facts = inspect(open_split(_config(root).data, "train"), WORLD)[0]
    assert isinstance(facts, Facts)
    assert sum(facts.pixels["mask"]) == facts.drawn["mask"] == 0


@pytest.mark.slow
def test_a_name_that_is_no_utf8_is_shown_as_far_as_it_can_be(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = os.fsdecode(b"b\xe4r$a_$.png")
    for kind in ("images", "masks", "positives"):
        shutil.copy(root / "train" / kind / "day0" / "train0.png", root / "train" / kind / bad)
    assert main(["pen", "folder", "--root", str(root), "--out", str(root.parent / "pen")]) == 0
    (root / "train" / "masks" / bad).write_bytes(b"damaged")
    assert main(["check", "folder", "--root", str(root), "--out", str(root.parent / "checked")]) == 1
    assert "b\\udce4r$a_$.png" in (root.parent / "checked" / "check.txt").read_text(encoding="utf-8")


def test_a_class_that_nothing_teaches_is_named(root: Path) -> None:
    _change(root / "train/positives", lambda ids: np.where(ids == 20, 255, ids))
    _change(root / "train/masks", lambda ids: np.where(ids == 7, 0, ids))
    with pytest.raises(
        ValueError, match=r"expected pixels of every class in positives of train, got none of car; --check no"
    ):
        _checked(_config(root))
    assert "note: positives of train have no pixel of car" in _checked(_config(root, check="note"))[1]
    _checked(_config(root, supervision="mixed", dense_images=1))  # masks teach it
    with pytest.raises(ValueError, match="in masks of train, got none of road"):
        _checked(_config(root, supervision="masks"))
    for part in ("train", "val"):  # drawings of what is not there tell it, too
        save(root / part / f"negatives/day0/{part}0.png", np.full((16, 24), 7, np.uint8))
    _checked(_config(root))


def test_black_and_white_drawings_are_recognised_and_white_can_be_a_class(root: Path, tmp_path: Path) -> None:
    pair = '[[class]]\nname = "ground"\n[[class]]\nname = "crack"\n'
    (root / "classes.toml").write_text(pair)
    for split in ("train", "val"):
        for kind in ("positives", "masks"):
            _change(root / split / kind, lambda ids: np.where(ids == 20, 255, 0).astype(np.uint8))
    with pytest.raises(ValueError, match=r"got none of crack; positives of train have 0 and 255 alone, .* `id = 255`"):
        _checked(_config(root))
    (root / "classes.toml").write_text(pair + "id = 255\n")
    _, lines = _checked(_config(root))
    assert not any("255" in line for line in lines)
    mask = open_split(DataConfig(root=root), "train").load(0).mask
    np.testing.assert_array_equal(mask, scene(0, FOLDER_CLASSES)[1] == 2)


def test_scribbles_and_masks_that_mean_different_things_by_0_are_told_apart(root: Path) -> None:
    table = 'class = [{name = "background", id = %s}, {name = "road", id = 7}, {name = "car", id = 20}]\nignore = %s'
    (root / "classes.toml").write_text(table % ("2", "[0]"))
    _change(root / "train/positives", lambda ids: np.where(ids == 255, 0, np.where(ids == 0, 2, ids)).astype(np.uint8))
    shutil.rmtree(root / "val/positives")
    zeros = sum(int((scene(number, FOLDER_CLASSES)[1] == 0).sum()) for number in range(4))
    _, lines = _checked(_config(root))
    assert any(
        f"masks of train have no pixel of background, but {zeros} of 0, which is ignored" in line for line in lines
    )
    (root / "classes.toml").write_text(table % ("[0, 2]", "{positives = [0]}"))
    _, lines = _checked(_config(root))
    assert not any("no pixel" in line for line in lines)
    record = open_split(DataConfig(root=root), "train").load(0)
    mask = scene(0, FOLDER_CLASSES)[1]
    np.testing.assert_array_equal(record.mask, mask)
    np.testing.assert_array_equal(record.positive, coarse(mask))


def test_drawings_in_which_nothing_is_undrawn_are_noticed(root: Path) -> None:
    _change(root / "train/positives", lambda ids: np.where(ids == 255, 0, ids).astype(np.uint8))
    _, lines = _checked(_config(root))
    assert any(
        "positives of train leave no pixel undrawn, and" in line and "`ignore = {positives = [0]}`" in line
        for line in lines
    )


@pytest.mark.parametrize("kinds", [("positives", "negatives"), ("positives",), ("negatives",)])
def test_nothing_that_was_written_as_a_class_is_noticed_whatever_its_share(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    """As most tools write it, 0, which is a class here, too."""
    root = write_folder_tree(tmp_path / "mine")
    for kind in {"positives", "negatives"} - {*kinds}:
        shutil.rmtree(root / "train" / kind)
    for kind in kinds:
        _change(root / "train" / kind, lambda ids: np.where(ids == 255, 0, ids).astype(np.uint8))
    _, lines = _checked(_config(root))
    for kind in kinds:
        (line,) = [line for line in lines if f"{kind} of train leave no pixel undrawn, and" in line]
        assert line.endswith(f"% are {FOLDER_CLASSES.names[FOLDER_CLASSES.file_ids.index(0)]}; if that is what nobody drew, "
                             f"write `ignore = {{{kind} = [0]}}`")  # fmt: skip


def test_a_label_map_that_was_resized_with_smoothing_says_so_in_short(root: Path) -> None:
    save(root / "train/masks/day0/train2.png", np.arange(16 * 24).reshape(16, 24).astype(np.uint8))
    with pytest.raises(
        ValueError, match=r"got \[1, 2, .*\] and \d+ more; .*values in between are what resizing leaves"
    ):
        _checked(_config(root))


def test_crops_that_are_larger_than_any_image_are_noticed(root: Path) -> None:
    _, lines = _checked(_config(root, crop=(32, 32)))
    (note,) = [line for line in lines if "crops are" in line]
    assert "no image is larger than 24x16 pixels, and crops are 32x32: at least 62 % of each is padding" in note
    assert note.endswith("--crop 16 24")
    _, lines = _checked(_config(root, crop=(16, 24)))
    assert not any("crops are" in line for line in lines)


def test_palettes_that_contradict_each_other_are_an_error_and_colours_of_the_table_settle_it(root: Path) -> None:
    names = [f"day{number % 2}/train{number}" for number in range(4)]
    colours = np.array(FOLDER_CLASSES.colours, np.uint8)
    for number, name in enumerate(names):
        _, mask = scene(number, FOLDER_CLASSES)
        order = np.roll(np.arange(3), number)
        stored = Image.fromarray(np.argsort(order)[mask].astype(np.uint8)).convert("P")
        stored.putpalette(colours[order].tobytes())
        stored.putdata(np.argsort(order)[mask].ravel().tolist())
        stored.save(root / f"train/positives/{name}.png")
    for index in range(4):  # the table has the colours
        source = open_split(DataConfig(root=root), "train")
        record = source.load(index)
        np.testing.assert_array_equal(record.positive, record.mask)
    _checked(_config(root))
    (root / "classes.toml").write_text('class = [{name = "ground"}, {name = "road"}, {name = "car"}]')
    shutil.rmtree(root / "train/masks")
    shutil.rmtree(root / "val")
    with pytest.raises(
        ValueError,
        match=r"positives of day0/train2: expected the palette of day0/train0, in which 0 is ",
    ):
        _checked(_config(root))


def test_images_with_an_orientation_tag_are_counted(root: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    for name in ("day0/train0", "day1/train3"):
        path = root / f"train/images/{name}.png"
        Image.fromarray(np.array(Image.open(path))[::-1, ::-1]).save(path, exif=exif)
    _, lines = _checked(_config(root))
    assert lines[0].startswith("note: 2 images of train have an orientation tag, which is followed")
    record = open_split(DataConfig(root=root), "train").load(0)
    np.testing.assert_array_equal(record.image, scene(0, FOLDER_CLASSES)[0])


def test_check_off_reads_nothing_and_made_images_are_not_looked_at(root: Path) -> None:
    (root / "val/images/day1/val1.png").write_bytes(b"")
    assert _checked(_config(root, check="off")) == (3, [])
    mnist = FitConfig(data=DataConfig(dataset="mnist", limit=20), out=root.parent / "digits")
    assert _checked(mnist) == (1, [])
    assert not mnist.out.exists()


def test_fit_on_a_data_set_of_masks_alone_says_what_is_missing(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(root / "train/positives")
    for empty in (False, True):
        if empty:
            (root / "train/positives").mkdir()
        status, err = _fit(root, capsys)
        assert status == 1
        assert "expected positive or negative drawings, got none in the data set; give --positives" in err
    camvid = write_camvid_tree(tmp_path / "camvid")
    assert main(["fit", "camvid", "--root", str(camvid), "--out", str(tmp_path / "run")]) == 1
    assert "set --simulate LEVEL, or learn from dense masks with --supervision masks" in capsys.readouterr().err


def test_balanced_classes_weigh_the_same(root: Path) -> None:
    config = replace(_config(root, supervision="mixed", dense_images=2), class_weight="balanced")
    source = open_split(config.data, "train")
    weights = open_class_weights(config, source, torch.device("cpu"))
    dense = [fact for fact in inspect(source) if isinstance(fact, Facts)]
    for kind in ("positive", "mask"):
        assert weights[kind].shape == (3,)
    # all weighted pixels together are as many as there are, a third of each class
    drawn = replace(config, data=replace(config.data, supervision="drawings", dense_images=0))
    weights = open_class_weights(drawn, source, torch.device("cpu"))
    counts = torch.tensor([fact.pixels["positive"] for fact in dense]).sum(0)
    torch.testing.assert_close(weights["positive"] * counts, (counts.sum() / 3).expand(3))
    assert open_class_weights(replace(config, class_weight=None), source, torch.device("cpu")) == {}
    with pytest.raises(ValueError, match="class_weight: expected one number for each of 3 classes, got 2"):
        open_class_weights(replace(config, class_weight=(1.0, 2.0)), source, torch.device("cpu"))
