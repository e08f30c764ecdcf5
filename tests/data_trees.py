"""Small data sets in the layouts of the real ones, with something to learn: an object has the colour of its class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coarse_train.data.camvid import CLASSES as CAMVID
from coarse_train.data.cityscapes import CLASSES as CITYSCAPES
from coarse_train.data.classes import IGNORE, Classes

SIZE = (16, 24)  # height, width
COUNTS = {"train": 4, "val": 2, "test": 2}
FOLDER_CLASSES = Classes(
    names=("ground", "road", "car"),
    colours=((60, 160, 60), (120, 120, 120), (200, 40, 40)),
    ids=(0, 7, 20),
    ignored=(9,),
    by_colour=True,
)
FOLDER_TOML = """
ignore = [9]

[[class]]
name = "ground"
colour = [60, 160, 60]

[[class]]
name = "road"
id = 7
colour = [120, 120, 120]

[[class]]
name = "car"
id = 20
colour = [200, 40, 40]
"""


def scene(
    seed: int, classes: Classes, *, size: tuple[int, int] = SIZE, chosen: tuple[int, ...] = (0, 1, 2)
) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and its mask (H, W): blocks of the classes ``chosen`` on the first of them, with some noise."""
    rng = np.random.default_rng(seed)
    mask = np.full(size, chosen[0], np.uint8)
    for label in (*chosen[1:], *chosen[1:]):
        height, width = rng.integers(size[0] // 4, size[0] // 2), rng.integers(size[1] // 4, size[1] // 2)
        top, left = rng.integers(0, size[0] - height), rng.integers(0, size[1] - width)
        mask[top : top + height, left : left + width] = label
    colours = np.array(classes.colours)[mask] + rng.integers(-12, 13, (*size, 3))
    return colours.clip(0, 255).astype(np.uint8), mask


def coarse(mask: np.ndarray) -> np.ndarray:
    """(H, W): the mask without the pixels on either side of an outline."""
    positive = mask.copy()
    down, right = mask[1:] != mask[:-1], mask[:, 1:] != mask[:, :-1]
    positive[1:][down] = positive[:-1][down] = IGNORE
    positive[:, 1:][right] = positive[:, :-1][right] = IGNORE
    return positive


def not_these(mask: np.ndarray, num_classes: int, layers: int) -> np.ndarray:
    """(layers, H, W): each layer names another wrong class, in the left half of the image."""
    negative = np.stack([(mask + 1 + layer) % num_classes for layer in range(layers)]).astype(np.uint8)
    negative[:, :, mask.shape[1] // 2 :] = IGNORE
    return negative


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def write_drawings(folder: Path, name: str, layers: np.ndarray, classes: Classes) -> None:
    """NAME.png, NAME.1.png, ... as `coarse-train simulate` writes them. layers: (K, H, W) classes."""
    for number, layer in enumerate(layers):
        save(folder / (f"{name}.{number}.png" if number else f"{name}.png"), classes.encode(layer))


def write_folder_tree(root: Path, *, counts: Mapping[str, int] = COUNTS, flat: bool = False) -> Path:
    """Your own images: masks, positives, and two layers of negatives for every other image."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.toml").write_text(FOLDER_TOML)
    for part, split in enumerate(counts):
        base = root if flat and split == "train" else root / split
        for number in range(counts[split]):
            image, mask = scene(100 * part + number, FOLDER_CLASSES)
            name = f"day{number % 2}/{split}{number}"
            save(base / "images" / f"{name}.png", image)
            save(base / "masks" / f"{name}.png", FOLDER_CLASSES.encode(mask))
            save(base / "positives" / f"{name}.png", FOLDER_CLASSES.encode(coarse(mask)))
            write_drawings(base / "negatives", name, not_these(mask, 3, 1 + number % 2), FOLDER_CLASSES)
    return root


def write_cityscapes_tree(
    root: Path, *, counts: Mapping[str, int] | None = None, size: tuple[int, int] = SIZE, train_ids: bool = False
) -> Path:
    """leftImg8bit, gtCoarse and gtFine; road, car and sky."""
    counts = {**COUNTS, "train_extra": 2} if counts is None else counts
    for part, split in enumerate(counts):
        for number in range(counts[split]):
            image, mask = scene(100 * part + number, CITYSCAPES, size=size, chosen=(0, 13, 10))
            city = f"{split}city{number % 2}"
            stem = f"{city}/{city}_{number:06d}_000019"
            save(root / "leftImg8bit" / split / f"{stem}_leftImg8bit.png", image)
            maps = {"gtCoarse": coarse(mask), "gtFine": mask}
            for kind in {"train_extra": ("gtCoarse",), "test": ("gtFine",)}.get(split, ("gtCoarse", "gtFine")):
                labels, suffix = CITYSCAPES.encode(maps[kind]), "labelIds"
                labels[labels == IGNORE] = 0  # the official tool writes "unlabeled"
                if train_ids:
                    labels, suffix = maps[kind], "labelTrainIds"
                save(root / kind / split / f"{stem}_{kind}_{suffix}.png", labels)
                (root / kind / split / f"{stem}_{kind}_polygons.json").write_text("{}")
    return root


def write_camvid_tree(root: Path, *, counts: Mapping[str, int] = COUNTS, size: tuple[int, int] = SIZE) -> Path:
    """X and Xannot; sky, road and car, with a border that is unlabelled."""
    for part, split in enumerate(counts):
        for number in range(counts[split]):
            image, mask = scene(100 * part + number, CAMVID, size=size, chosen=(0, 3, 8))
            mask[:, 0] = 11
            save(root / split / f"{split}_{number:04d}.png", image)
            save(root / f"{split}annot" / f"{split}_{number:04d}.png", mask)
    return root


def eye(seed: int, size: tuple[int, int] = (24, 32)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image (H, W, 3), its vessels (H, W), 0 none, 1 artery, 2 vein, 3 crossing, and the field of view (H, W) bool."""
    rng = np.random.default_rng(seed)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    inside = ((rows - height / 2) / (height / 2)) ** 2 + ((columns - width / 2) / (width / 2)) ** 2 < 1
    vessels = np.zeros(size, np.uint8)
    row, column = rng.integers(height // 3, 2 * height // 3), rng.integers(width // 3, 2 * width // 3)
    vessels[row : row + 2] = 1
    vessels[:, column : column + 2] += 2
    vessels[~inside] = 0
    colours = np.array([(220, 120, 60), (190, 40, 40), (110, 20, 30), (120, 20, 30)])[vessels]
    image = (colours + rng.integers(-10, 11, (*size, 3))).clip(0, 255).astype(np.uint8)
    image[~inside] = 0
    return image, vessels, inside


def _white(where: np.ndarray) -> np.ndarray:
    return np.where(where, 255, 0).astype(np.uint8)


def write_drive_tree(root: Path, *, training: int = 10, test: int = 3, test_labels: bool = True) -> Path:
    """training has one observer, test has two, or none where ``test_labels`` is False (newer downloads)."""
    for part, first, count in (("training", 21, training), ("test", 1, test)):
        for number in range(first, first + count):
            image, vessels, inside = eye(number)
            save(root / part / "images" / f"{number:02d}_{part}.tif", image)
            save(root / part / "mask" / f"{number:02d}_{part}_mask.gif", _white(inside))
            if part == "training" or test_labels:
                save(root / part / "1st_manual" / f"{number:02d}_manual1.gif", _white(vessels > 0))
            if part == "test" and test_labels:
                save(root / part / "2nd_manual" / f"{number:02d}_manual2.gif", _white(vessels == 1))
    return root


def write_les_av_tree(root: Path, *, images: int = 13) -> Path:
    """All folders of the archive; the numbers of the images are not in the order of their texts."""
    colours = np.array([(0, 0, 0), (255, 0, 0), (0, 0, 255), (0, 255, 0)], np.uint8)
    for number in range(5, 5 + images):
        image, vessels, inside = eye(number)
        painted = colours[vessels]
        painted[vessels.any(0).argmax()] = 255  # a row that is unknown
        painted[~inside] = 0
        save(root / "images" / f"{number}.png", image)
        save(root / "arteries-and-veins" / f"{number}.png", painted)
        save(root / "vessel-segmentations" / f"{number}.png", painted.any(2))  # bool gives a 1-bit PNG
        save(root / "arteries" / f"{number}.png", vessels == 1)
        save(root / "veins" / f"{number}.png", vessels == 2)
        save(root / "masks" / f"{number}_mask.gif", _white(inside))
    return root


def write_chasedb1_tree(root: Path) -> Path:
    """Both eyes of 14 children; the second observer misses the veins."""
    for child in range(1, 15):
        for side in "LR":
            image, vessels, _ = eye(2 * child + (side == "R"))
            save(root / f"Image_{child:02d}{side}.jpg", image)
            save(root / f"Image_{child:02d}{side}_1stHO.png", vessels > 0)
            save(root / f"Image_{child:02d}{side}_2ndHO.png", vessels == 1)
    return root


def save_small_segformer(folder: Path, num_classes: int) -> None:
    """Local weights, as `--network segformer --weights` takes them; skips the test where transformers is not there."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8, 16, 16], "decoder_hidden_size": 8}
    config = transformers.SegformerConfig(num_labels=num_classes, depths=[1] * 4, num_attention_heads=[1] * 4, **sizes)
    transformers.SegformerForSemanticSegmentation(config).save_pretrained(folder)
