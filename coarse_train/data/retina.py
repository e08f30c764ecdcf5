"""Vessels in photographs of the retina: CHASE_DB1, DRIVE and LES-AV, as published. Classes: background, vessel.

chasedb1 (Fraz et al. 2012; 28 images 999x960 of 14 children)

    ROOT/Image_01L.jpg    ROOT/Image_01L_1stHO.png (first observer)    ROOT/Image_01L_2ndHO.png (second observer)

The first observer gives the masks, the second the positive drawings; variant "swap" exchanges them. Variant "observers" has
the first's as drawings, too, in the place of the negative ones: of two classes "this is vessel" and "this is not background"
say the same, so they are read as the latter, and a matrix on them is the first observer's. Split by child, since two eyes of
one child are alike: 01 to 08 train, 09 and 10 val, 11 to 14 test.

drive (Staal et al. 2004; 40 images 565x584)

    ROOT/training/images/21_training.tif    1st_manual/21_manual1.gif    mask/21_training_mask.gif
    ROOT/test/images/01_test.tif            1st_manual/01_manual1.gif    mask/01_test_mask.gif    2nd_manual/01_manual2.gif

The first observer gives the masks; the second, who drew the test images alone, positive drawings; newer downloads have neither
for the test images. Outside the field of view (``mask/``) all is ignored. The last fifth of ``training`` (37 to 40) is val.

les_av (LES-AV, Orlando et al., MICCAI 2018; 22 images)

    ROOT/images/12.png    vessel-segmentations/12.png    arteries-and-veins/12.png    masks/12_mask.gif

Variant "" learns vessels, variant "av" background, artery and vein from the colours of ``arteries-and-veins``: red artery, blue
vein, green crossing of both, white unknown; the last two are ignored. This follows the script with which the authors made
``vessel-segmentations``, ``arteries`` and ``veins`` (github.com/ignaciorlando/glaucoma-hemodynamics,
core/data-preprocessing/preprocess_leuven_eye_study_data.m): a channel above 150 is on; artery is red or green, and not blue;
vein is green or blue, and not red. Outside the field of view (``masks/``) all is ignored. There is no official split: by
number, the last fifth (4 of 22, as many as in arXiv 2508.18186) is test, and of the others the last fifth (3 of 18) is val.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .classes import IGNORE, Classes
from .files import FileSource, Item, check_choice, first, match, open_files, root_folder
from .images import read_binary, read_image
from .walk import Fault, find_files

if TYPE_CHECKING:
    from ..config import DataConfig

VESSELS = Classes(names=("background", "vessel"), colours=((0, 0, 0), (230, 159, 0)))
ARTERIES_AND_VEINS = Classes(names=("background", "artery", "vein"), colours=((0, 0, 0), (213, 94, 0), (0, 114, 178)))

_CHILDREN = {"train": range(1, 9), "val": range(9, 11), "test": range(11, 15)}
_ON = 150  # a channel of LES-AV's colours counts from above this value, as in the authors' script
_BINARY = {"positive": read_binary, "mask": read_binary}


def open_split(config: DataConfig, split: str) -> FileSource:
    """The images of ``split`` in the layouts above; variants: chasedb1 "swap" and "observers", les_av "av"."""
    opener = {"chasedb1": _chasedb1, "drive": _drive, "les_av": _les_av}[config.dataset]
    return opener(config, split)


def _chasedb1(config: DataConfig, split: str) -> FileSource:
    check_choice(config, split, "swap", "observers")
    root = root_folder(config, "CHASE_DB1 (Image_01L.jpg, Image_01L_1stHO.png, ...)")
    images = _of_children(find_files(root, ".jpg"), split)
    one, two = (_of_children(find_files(root, suffix), split) for suffix in ("_1stHO.png", "_2ndHO.png"))
    faults: list[Fault] = []
    masks = match(images, one, "label map _1stHO.png", root, faults)
    drawings = match(images, two, "label map _2ndHO.png", root, faults)
    if config.variant == "swap":
        masks, drawings = drawings, masks
    items = [Item(name, path, positive=first(drawings, name), mask=first(masks, name)) for name, path in images.items()]
    if config.variant == "observers":
        items = [replace(item, negative=masks.get(item.name, ())) for item in items]
    return open_files(items, VESSELS, config, split, readers=_BINARY | {"negative": _read_other}, faults=faults)


def _read_other(path: Path) -> np.ndarray:
    """(H, W) uint8: of two classes the one that is not there."""
    return 1 - read_binary(path)


def _of_children(files: Mapping[str, Path], split: str) -> dict[str, Path]:
    chosen = {}
    for name, path in files.items():
        found = re.fullmatch(r"(?:.*/)?Image_(\d\d)[LR]", name)
        if found is None:
            raise ValueError(f"{path}: expected a name such as Image_01L.jpg or Image_01L_1stHO.png")
        if int(found[1]) in _CHILDREN[split]:
            chosen[name] = path
    return chosen


def _drive(config: DataConfig, split: str) -> FileSource:
    check_choice(config, split)
    part = "test" if split == "test" else "training"
    root = root_folder(config, "DRIVE", f"{part}/images", f"{part}/mask") / part
    images, fields = find_files(root / "images", ".tif"), find_files(root / "mask", "_mask.gif")
    one, two = (
        _manual(root / "1st_manual", "_manual1.gif", part),
        _manual(root / "2nd_manual", "_manual2.gif", part),
    )
    if split != "test":
        chosen = _parts([*images, *one], 2)[split == "val"]
        images, fields, one, two = (_select(files, chosen) for files in (images, fields, one, two))
    faults: list[Fault] = []
    no_masks = split == "test" and not one
    masks = match(images, one, "label map", root / "1st_manual", faults, optional=no_masks)
    drawings = match(images, two, "label map", root / "2nd_manual", faults, optional=not two)
    inside = match(images, fields, "field of view", root / "mask", faults)
    items = [
        Item(
            name,
            path,
            positive=first(drawings, name),
            mask=first(masks, name),
            field_of_view=first(inside, name),
        )
        for name, path in images.items()
    ]
    return open_files(items, VESSELS, config, split, readers=_BINARY, faults=faults)


def _manual(folder: Path, suffix: str, part: str) -> dict[str, Path]:
    files = find_files(folder, suffix) if folder.is_dir() else {}
    return {f"{number}_{part}": path for number, path in files.items()}


def _les_av(config: DataConfig, split: str) -> FileSource:
    check_choice(config, split, "av")
    labels = "arteries-and-veins" if config.variant == "av" else "vessel-segmentations"
    root = root_folder(config, "LES-AV", "images", labels, "masks")
    images, masks = find_files(root / "images", ".png"), find_files(root / labels, ".png")
    fields = find_files(root / "masks", "_mask.gif")
    chosen = _parts([*images, *masks], 3)[("train", "val", "test").index(split)]
    images, masks, fields = (_select(files, chosen) for files in (images, masks, fields))
    faults: list[Fault] = []
    maps = match(images, masks, "label map", root / labels, faults)
    inside = match(images, fields, "field of view", root / "masks", faults)
    items = [
        Item(name, path, mask=first(maps, name), field_of_view=first(inside, name)) for name, path in images.items()
    ]
    if config.variant == "av":
        return open_files(items, ARTERIES_AND_VEINS, config, split, readers={"mask": read_av}, faults=faults)
    return open_files(items, VESSELS, config, split, readers=_BINARY, faults=faults)


def read_av(path: Path) -> np.ndarray:
    """(H, W) uint8 classes of a coloured map of LES-AV."""
    colours = read_image(path)
    if colours.shape[2] != 3:
        raise ValueError(f"{path}: expected a coloured map of arteries and veins, got a grey image")
    red, green, blue = (colours[..., channel] > _ON for channel in range(3))
    classes = np.full(red.shape, IGNORE, np.uint8)
    classes[~(red | green | blue)] = 0
    artery, vein = (red | green) & ~blue, (green | blue) & ~red
    classes[artery & ~vein] = 1
    classes[vein & ~artery] = 2
    return classes


def _parts(names: Iterable[str], count: int) -> list[list[str]]:
    """``names`` by number, cut into ``count`` parts: again and again the last fifth, at least one, is the last part.

    All names of a data set, those of orphan label maps too, so that a lost file moves no image to another part.
    """
    rest = sorted(set(names), key=lambda name: (len(name), name))  # 2 before 12
    parts: list[list[str]] = []
    for _ in range(count - 1):
        cut = len(rest) - max(1, len(rest) // 5)
        parts.insert(0, rest[cut:])
        rest = rest[:cut]
    return [rest, *parts]


def _select(files: Mapping[str, Path], chosen: Iterable[str]) -> dict[str, Path]:
    return {name: files[name] for name in chosen if name in files}
