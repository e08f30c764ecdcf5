"""Cityscapes in its official layout, and its official table."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, open_split
from coarse_train.data.cityscapes import CLASSES
from coarse_train.data.images import read_labels

from .data_trees import coarse, save, scene, write_cityscapes_tree, write_drawings

STEM = "traincity0/traincity0_000000_000019"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_cityscapes_tree(tmp_path / "cityscapes")


def _config(root: Path, variant: str = "") -> DataConfig:
    return DataConfig(dataset="cityscapes", root=root, variant=variant)


def test_the_table_is_the_official_one() -> None:
    official = pytest.importorskip("cityscapesscripts.helpers.labels").labels
    learned = {row.trainId: row for row in official if 0 <= row.trainId < 255}
    assert len(CLASSES) == len(learned) == 19
    assert CLASSES.ids == tuple(learned[index].id for index in range(19))
    assert CLASSES.names == tuple(learned[index].name for index in range(19))
    assert CLASSES.colours == tuple(learned[index].color for index in range(19))
    # what counts in no official score is no class
    assert set(CLASSES.ignored) == {row.id for row in official if row.ignoreInEval and row.id >= 0}


def test_encoded_and_decoded_again() -> None:
    classes = np.array([[*range(19), IGNORE]], np.uint8)
    ids = CLASSES.encode(classes)
    assert ids.tolist() == [[7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33, 255]]
    np.testing.assert_array_equal(CLASSES.decode(ids, "map.png"), classes)
    void = np.array([[0, 1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 16, 18, 29, 30]], np.uint8)
    assert set(CLASSES.decode(void, "map.png").ravel()) == {IGNORE}


def test_coarse_polygons_are_positive_drawings_and_fine_ones_masks(root: Path) -> None:
    train = open_split(_config(root), "train")
    assert [train.name(index) for index in range(len(train))] == [
        "traincity0/traincity0_000000_000019",
        "traincity0/traincity0_000002_000019",
        "traincity1/traincity1_000001_000019",
        "traincity1/traincity1_000003_000019",
    ]
    image, mask = scene(0, CLASSES, chosen=(0, 13, 10))
    record = train.load(0)
    np.testing.assert_array_equal(record.image, image)
    np.testing.assert_array_equal(record.mask, mask)
    np.testing.assert_array_equal(record.positive, coarse(mask))
    assert record.negative is None
    assert {split: len(open_split(_config(root), split)) for split in ("val", "test")} == {"val": 2, "test": 2}


def test_train_ids_do_where_there_are_no_label_ids(tmp_path: Path) -> None:
    root = write_cityscapes_tree(tmp_path / "train_ids", train_ids=True)
    _, mask = scene(0, CLASSES, chosen=(0, 13, 10))
    record = open_split(_config(root), "train").load(0)
    np.testing.assert_array_equal(record.mask, mask)
    np.testing.assert_array_equal(record.positive, coarse(mask))
    save(root / f"gtFine/train/{STEM}_gtFine_labelIds.png", np.full_like(mask, 26))  # with both, these count
    both = open_split(_config(root), "train").load(0).mask
    np.testing.assert_array_equal(both, np.full((16, 24), CLASSES.names.index("car")))


def test_train_extra_adds_images_with_coarse_polygons_alone(root: Path) -> None:
    source = open_split(_config(root, "train_extra"), "train")
    kinds = [source.kinds(index) for index in range(len(source))]
    assert kinds == [{"positive", "mask"}] * 4 + [{"positive"}] * 2
    assert source.name(4).startswith("train_extracity0/")
    assert source.load(4).mask is None
    assert len(open_split(_config(root, "train_extra"), "val")) == 2


def test_one_of_the_two_kinds_of_labels_will_do(root: Path) -> None:
    (root / "gtFine").rename(root / "later")
    assert open_split(_config(root), "train").kinds(0) == {"positive"}
    (root / "gtCoarse").rename(root / "gtFine_not")
    with pytest.raises(FileNotFoundError, match="expected labels in gtCoarse/train/ or gtFine/train/, got neither"):
        open_split(_config(root), "train")
    assert open_split(_config(root), "test").kinds(0) == set()


def test_an_id_in_no_table_is_named(root: Path) -> None:
    path = root / f"gtFine/train/{STEM}_gtFine_labelIds.png"
    save(path, np.full((16, 24), 34, np.uint8))
    with pytest.raises(ValueError, match=rf"{path.name}: expected labels among .* got \[34\]"):
        open_split(_config(root), "train").load(0)
    save(path.with_name(path.name.replace("labelIds", "labelTrainIds")), np.full((16, 24), 19, np.uint8))
    path.unlink()
    with pytest.raises(ValueError, match=r"labelTrainIds\.png: expected labels among .* got \[19\]"):
        open_split(_config(root), "train").load(0)


def test_labels_without_image_and_images_without_labels_are_named(root: Path) -> None:
    (root / f"gtCoarse/train/{STEM}_gtCoarse_labelIds.png").unlink()
    with pytest.raises(ValueError, match=f"a gtCoarse label map for every image, got none for {STEM}"):
        open_split(_config(root), "train")
    source = open_split(replace(_config(root), skip_bad=True), "train")
    assert [line.split(":")[0] for line in source.skipped] == [STEM]  # type: ignore[attr-defined]
    (root / f"leftImg8bit/train/{STEM}_leftImg8bit.png").unlink()
    with pytest.raises(ValueError, match=f"an image for every gtFine label map, got none for {STEM}"):
        open_split(_config(root), "train")


def test_the_truncated_image_of_train_extra_is_skipped_when_asked(root: Path) -> None:
    path = next((root / "leftImg8bit/train_extra").rglob("*.png"))  # troisdorf_000000_000073 is damaged in the download
    path.write_bytes(path.read_bytes()[:200])
    source = open_split(replace(_config(root, "train_extra"), skip_bad=True), "train")
    assert len(source) == 5
    assert [path.name in line for line in source.skipped] == [True]  # type: ignore[attr-defined]


def test_drawings_written_per_split_are_read_and_the_official_labels_are_not_needed(root: Path, tmp_path: Path) -> None:
    train = open_split(_config(root), "train")
    drawings = np.stack([np.full((16, 24), 13, np.uint8), np.full((16, 24), 18, np.uint8)])
    for index in range(len(train)):
        write_drawings(tmp_path / "out/positives/train", train.name(index), drawings[:1], CLASSES)
        write_drawings(tmp_path / "out/negatives/train", train.name(index), drawings, CLASSES)
    assert set(np.unique(read_labels(tmp_path / f"out/negatives/train/{STEM}.1.png"))) == {33}  # label id of bicycle
    (root / f"gtCoarse/train/{STEM}_gtCoarse_labelIds.png").unlink()
    (root / "gtFine").rename(root / "away")
    config = replace(_config(root), positives=tmp_path / "out/positives", negatives=tmp_path / "out/negatives")
    record = open_split(config, "train").load(3)
    np.testing.assert_array_equal(record.positive, drawings[0])
    np.testing.assert_array_equal(record.negative, drawings)
    (root / "gtCoarse").rename(root / "away_too")
    for split in ("train", "val"):
        kinds = open_split(config, split).kinds(0)
        assert kinds == ({"positive", "negative"} if split == "train" else set())


def test_negative_drawings_in_the_layout_of_gtcoarse_are_read(root: Path, tmp_path: Path) -> None:
    """With the colour and instance images beside the labels, as the official tools leave them."""
    folder = tmp_path / "negatives"
    shutil.copytree(root / "gtCoarse", folder)
    for path in list(folder.rglob("*_labelIds.png")):
        for other in ("color", "instanceIds", "labelTrainIds"):
            shutil.copy(path, path.with_name(path.name.replace("labelIds", other)))
    with_negatives = open_split(replace(_config(root), negatives=folder), "train")
    for index in range(len(with_negatives)):
        record = with_negatives.load(index)
        assert record.negative is not None
        np.testing.assert_array_equal(record.negative[0], record.positive)
    next(folder.rglob(f"train/{STEM}_gtCoarse_labelIds.png")).unlink()
    next(folder.rglob(f"train/{STEM}_gtCoarse_labelTrainIds.png")).unlink()
    with pytest.raises(ValueError, match=f"a negative drawing .* for every image, got none for {STEM}"):
        open_split(replace(_config(root), negatives=folder), "train")


def test_no_folder_and_a_wrong_folder_say_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="root: expected the folder of Cityscapes with leftImg8bit/, got none"):
        open_split(DataConfig(dataset="cityscapes"), "train")
    (tmp_path / "aachen").mkdir()
    with pytest.raises(FileNotFoundError, match="expected the folder of Cityscapes with leftImg8bit/, got aachen/"):
        open_split(_config(tmp_path), "train")
    (tmp_path / "leftImg8bit").mkdir()
    with pytest.raises(FileNotFoundError, match="leftImg8bit/train: expected a folder, got none"):
        open_split(_config(tmp_path), "train")
    with pytest.raises(
        ValueError, match=r"variant: expected one of \('', 'train_extra'\) for cityscapes, got 'coarse'"
    ):
        open_split(_config(tmp_path, "coarse"), "train")
    with pytest.raises(ValueError, match=r"split: expected one of \('train', 'val', 'test'\), got 'dev'"):
        open_split(_config(tmp_path), "dev")
