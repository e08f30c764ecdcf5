"""CHASE_DB1, DRIVE and LES-AV in their published layouts: generated, and CHASE_DB1 also real where it is present."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, Source, open_split
from coarse_train.data.retina import ARTERIES_AND_VEINS, VESSELS, read_av

from .data_trees import eye, save, write_chasedb1_tree, write_drawings, write_drive_tree, write_les_av_tree

FULL = Path(os.environ.get("COARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "chasedb1"
real = pytest.mark.skipif(not FULL.is_dir(), reason=f"CHASE_DB1 is not at {FULL}; COARSE_DATA names its parent folder")


def _names(source: Source) -> list[str]:
    return [source.name(index) for index in range(len(source))]


def _open(dataset: str, root: Path, split: str, variant: str = "") -> Source:
    return open_split(DataConfig(dataset=dataset, root=root, variant=variant), split)


def test_chasedb1_is_split_by_child(tmp_path: Path) -> None:
    root = write_chasedb1_tree(tmp_path)
    children = {
        split: {name[6:8] for name in _names(_open("chasedb1", root, split))} for split in ("train", "val", "test")
    }
    assert children["train"] == {f"{child:02d}" for child in range(1, 9)}
    assert children["val"] == {"09", "10"}
    assert children["test"] == {"11", "12", "13", "14"}
    assert [len(_open("chasedb1", root, split)) for split in ("train", "val", "test")] == [16, 4, 8]


def test_chasedb1_first_observer_is_the_mask_and_swap_exchanges_them(tmp_path: Path) -> None:
    root = write_chasedb1_tree(tmp_path)
    _, vessels, _ = eye(2)
    record, swapped = (_open("chasedb1", root, "train", variant).load(0) for variant in ("", "swap"))
    np.testing.assert_array_equal(record.mask, vessels > 0)
    np.testing.assert_array_equal(record.positive, vessels == 1)
    np.testing.assert_array_equal(swapped.mask, vessels == 1)
    np.testing.assert_array_equal(swapped.positive, vessels > 0)


def test_chasedb1_observers_are_two_kinds_of_drawings(tmp_path: Path) -> None:
    root = write_chasedb1_tree(tmp_path)
    _, vessels, _ = eye(2)
    record = _open("chasedb1", root, "train", "observers").load(0)
    np.testing.assert_array_equal(record.mask, vessels > 0)
    np.testing.assert_array_equal(record.positive, vessels == 1)
    assert record.negative is not None
    np.testing.assert_array_equal(
        record.negative[0], vessels == 0
    )  # "not background" on a vessel, "no vessel" elsewhere


def test_chasedb1_faults_are_named(tmp_path: Path) -> None:
    root = write_chasedb1_tree(tmp_path)
    (root / "Image_03R_2ndHO.png").unlink()
    with pytest.raises(ValueError, match=r"expected a label map _2ndHO\.png for every image, got none for Image_03R"):
        _open("chasedb1", root, "train")
    assert len(_open("chasedb1", root, "test")) == 8
    save(root / "Image_11L_1stHO.png", np.full((24, 32), 7, np.uint8))
    with pytest.raises(ValueError, match=r"Image_11L_1stHO\.png: expected black \(0\) and white .* got values \[7\]"):
        _open("chasedb1", root, "test").load(0)
    save(root / "preview.jpg", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"preview\.jpg: expected a name such as Image_01L\.jpg"):
        _open("chasedb1", root, "test")


def test_chasedb1_drawings_replace_the_second_observer(tmp_path: Path) -> None:
    root = write_chasedb1_tree(tmp_path / "chase")
    for name in _names(_open("chasedb1", root, "train")):
        layers = np.full((1, 24, 32), IGNORE, np.uint8)
        layers[0, :4], layers[0, 4:8] = 0, 1
        write_drawings(tmp_path / "out/train", name, layers, VESSELS)
    config = DataConfig(dataset="chasedb1", root=root, positives=tmp_path / "out")
    positive = open_split(config, "train").load(0).positive
    assert positive is not None
    assert positive[:, 0].tolist() == [0] * 4 + [1] * 4 + [IGNORE] * 16


def test_drive_ignores_what_is_outside_the_field_of_view(tmp_path: Path) -> None:
    root = write_drive_tree(tmp_path)
    image, vessels, inside = eye(21)
    source = _open("drive", root, "train")
    record = source.load(0)
    assert record.name == "21_training"
    np.testing.assert_array_equal(record.image, image)
    np.testing.assert_array_equal(record.mask, np.where(inside, vessels > 0, IGNORE))
    assert source.kinds(0) == {"mask"}


def test_drive_second_observer_of_the_test_images_is_a_positive_drawing(tmp_path: Path) -> None:
    root = write_drive_tree(tmp_path)
    _, vessels, inside = eye(1)
    record = _open("drive", root, "test").load(0)
    assert record.name == "01_test"
    np.testing.assert_array_equal(record.mask, np.where(inside, vessels > 0, IGNORE))
    np.testing.assert_array_equal(record.positive, np.where(inside, vessels == 1, IGNORE))


def test_drive_newer_downloads_have_no_labels_of_the_test_images(tmp_path: Path) -> None:
    source = _open("drive", write_drive_tree(tmp_path, test_labels=False), "test")
    assert len(source) == 3
    assert source.kinds(0) == set()
    assert source.load(0).mask is None


def test_drive_last_fifth_of_training_is_val_also_when_a_file_is_lost(tmp_path: Path) -> None:
    root = write_drive_tree(tmp_path)
    assert _names(_open("drive", root, "train")) == [f"{number}_training" for number in range(21, 29)]
    assert _names(_open("drive", root, "val")) == ["29_training", "30_training"]
    (root / "training/images/30_training.tif").unlink()
    assert len(_open("drive", root, "train")) == 8
    with pytest.raises(ValueError, match="expected an image for every label map, got none for 30_training"):
        _open("drive", root, "val")
    full = write_drive_tree(tmp_path / "full", training=20, test=1)
    assert _names(_open("drive", full, "val")) == [f"{number}_training" for number in range(37, 41)]


def test_drive_missing_labels_and_folders_are_named(tmp_path: Path) -> None:
    root = write_drive_tree(tmp_path)
    (root / "training/1st_manual/22_manual1.gif").unlink()
    with pytest.raises(ValueError, match="1st_manual: expected a label map for every image, got none for 22_training"):
        _open("drive", root, "train")
    source = open_split(DataConfig(dataset="drive", root=root, skip_bad=True), "train")
    assert len(source) == 7
    save(root / "test/mask/01_test_mask.gif", np.zeros((8, 8), np.uint8))
    with pytest.raises(ValueError, match=r"01_test_mask\.gif: expected 32x24 pixels as .*01_test\.tif has, got 8x8"):
        _open("drive", root, "test").load(0)
    (root / "test/mask").rename(root / "test/fov")
    with pytest.raises(
        FileNotFoundError, match="the folder of DRIVE with test/images/, test/mask/, got test/, training/"
    ):
        _open("drive", root, "test")


def test_les_av_vessels_and_splits_by_number(tmp_path: Path) -> None:
    root = write_les_av_tree(tmp_path)
    names = {split: _names(_open("les_av", root, split)) for split in ("train", "val", "test")}
    assert names["train"] == ["5", "6", "7", "8", "9", "10", "11", "12", "13"]  # 10 is after 9
    assert (names["val"], names["test"]) == (["14", "15"], ["16", "17"])
    record = _open("les_av", root, "train").load(0)
    _, vessels, inside = eye(5)
    assert record.mask is not None
    np.testing.assert_array_equal(record.mask == IGNORE, ~inside)
    assert set(record.mask[(vessels > 0) & inside]) == {1}
    full = write_les_av_tree(tmp_path / "full", images=22)
    assert [len(_open("les_av", full, split)) for split in ("train", "val", "test")] == [15, 3, 4]


def test_les_av_arteries_and_veins(tmp_path: Path) -> None:
    root = write_les_av_tree(tmp_path)
    source = _open("les_av", root, "train", "av")
    assert source.classes == ARTERIES_AND_VEINS
    _, vessels, inside = eye(5)
    record = source.load(0)
    assert record.mask is not None
    known = inside.copy()
    known[vessels.any(0).argmax()] = False  # white in the map
    np.testing.assert_array_equal(record.mask[known], np.array([0, 1, 2, IGNORE])[vessels[known]])
    assert set(record.mask[~known]) == {IGNORE}


def test_les_av_colours_are_read_as_the_authors_read_them(tmp_path: Path) -> None:
    """artery = (red or green) and not blue; vein = (green or blue) and not red; a channel is on above 150."""
    colours = {
        (0, 0, 0): 0,
        (255, 0, 0): 1,
        (0, 0, 255): 2,
        (0, 255, 0): IGNORE,  # a crossing is both
        (255, 255, 255): IGNORE,  # unknown is neither
        (255, 255, 0): 1,
        (0, 255, 255): 2,
        (255, 0, 255): IGNORE,
        (151, 150, 20): 1,
        (150, 150, 150): 0,
    }
    save(tmp_path / "av.png", np.array([list(colours)], np.uint8))
    assert read_av(tmp_path / "av.png").tolist() == [list(colours.values())]
    Image.new("L", (4, 4)).save(tmp_path / "grey.png")
    with pytest.raises(ValueError, match=r"grey\.png: expected a coloured map"):
        read_av(tmp_path / "grey.png")


def test_les_av_drawings_of_arteries_and_veins_are_read(tmp_path: Path) -> None:
    root = write_les_av_tree(tmp_path / "les_av")
    names = _names(_open("les_av", root, "train", "av"))
    layers = np.stack([np.full((24, 32), 2, np.uint8), np.full((24, 32), 1, np.uint8)])
    for name in names:
        write_drawings(tmp_path / "out/negatives/train", name, layers, ARTERIES_AND_VEINS)
    config = DataConfig(dataset="les_av", root=root, variant="av", negatives=tmp_path / "out/negatives")
    negative = open_split(config, "train").load(0).negative
    assert negative is not None
    inside = eye(5)[2]
    np.testing.assert_array_equal(negative, np.where(inside, layers, IGNORE))


@pytest.mark.parametrize(
    ("dataset", "what"),
    [("chasedb1", "CHASE_DB1"), ("drive", "DRIVE with training/images/"), ("les_av", "LES-AV with images/")],
)
def test_no_folder_and_a_wrong_folder_say_what_was_expected(tmp_path: Path, dataset: str, what: str) -> None:
    with pytest.raises(ValueError, match=f"root: expected the folder of {what}.* got none"):
        open_split(DataConfig(dataset=dataset), "train")
    with pytest.raises(FileNotFoundError, match=f"nowhere: expected the folder of {what}.* got none"):
        _open(dataset, tmp_path / "nowhere", "train")
    with pytest.raises((FileNotFoundError, ValueError), match=f"{tmp_path}: expected"):
        _open(dataset, tmp_path, "train")
    with pytest.raises(ValueError, match=f"variant: expected one of .* for {dataset}, got 'other'"):
        _open(dataset, tmp_path, "train", "other")


@real
def test_the_real_observers_disagree_as_published() -> None:
    """Vessel IoU of the two observers over the 28 pairs: 0.635, as measured when the data was laid out."""
    ious, count = [], 0
    for split in ("train", "val", "test"):
        source = _open("chasedb1", FULL, split)
        count += len(source)
        for index in range(len(source)):
            record = source.load(index)
            assert record.image.shape == (960, 999, 3)
            assert record.mask is not None
            assert record.positive is not None
            assert set(np.unique(record.mask)) == set(np.unique(record.positive)) == {0, 1}
            one, two = record.mask == 1, record.positive == 1
            ious.append((one & two).sum() / (one | two).sum())
    assert count == 28
    assert float(np.mean(ious)) == pytest.approx(0.635, abs=0.003)
