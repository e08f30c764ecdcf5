"""Cityscapes (Cordts et al., CVPR 2016), as downloaded: 19 classes of street scenes, 2048x1024.

    ROOT/leftImg8bit/SPLIT/CITY/CITY_SEQ_FRAME_leftImg8bit.png
    ROOT/gtCoarse/SPLIT/CITY/CITY_SEQ_FRAME_gtCoarse_labelIds.png     positive drawings: the polygons drawn in minutes
    ROOT/gtFine/SPLIT/CITY/CITY_SEQ_FRAME_gtFine_labelIds.png         masks

SPLIT is train, val or test; variant "train_extra" adds the 19,998 images of that folder to the training images, which have
coarse polygons alone. Where gtCoarse/SPLIT or gtFine/SPLIT is there it is complete; where it is not, the images have no such
map. The official masks of test say "unlabeled" everywhere. Files called ``_labelTrainIds.png`` do where there is none called
``_labelIds.png``. Encoded are label ids, which is what the official evaluation reads. An image is called CITY/CITY_SEQ_FRAME.

Folders of drawings (``positives``, ``negatives``) hold SPLIT/CITY/CITY_SEQ_FRAME_gtCoarse_labelIds.png, as gtCoarse/ does, or
SPLIT/CITY/CITY_SEQ_FRAME.png, as `coarse-train simulate` writes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .classes import Classes, read_classes_of
from .files import FileSource, Item, check_choice, first, match, open_files, root_folder
from .images import read_labels
from .walk import Fault, find_files, find_pngs

if TYPE_CHECKING:
    from ..config import DataConfig


CLASSES = read_classes_of("cityscapes")
_TRAIN_IDS = Classes(CLASSES.names, CLASSES.colours)


def open_split(config: DataConfig, split: str) -> FileSource:
    """The images of ``split`` in the layout above; variants "" and "train_extra"."""
    check_choice(config, split, "train_extra")
    root = root_folder(config, "Cityscapes", "leftImg8bit")
    faults: list[Fault] = []
    items = _items(root, split, config, faults)
    if config.variant == "train_extra" and split == "train":
        items += _items(root, "train_extra", config, faults)
    return open_files(
        items,
        CLASSES,
        config,
        split,
        readers={"positive": _read, "mask": _read},
        faults=faults,
        find=_find_drawings,
        drawing_reader=_read,
    )


def _find_drawings(folder: Path) -> dict[str, Path]:
    """Of a folder of drawings: official names, as in gtCoarse/, or NAME.png where there are none."""
    return _find_labels(folder, "gtCoarse") or find_pngs(folder)


def _items(root: Path, part: str, config: DataConfig, faults: list[Fault]) -> list[Item]:
    images = find_files(root / "leftImg8bit" / part, "_leftImg8bit.png")
    drawn = config.positives is not None or config.negatives is not None
    coarse = {} if config.positives else _label_maps(root / "gtCoarse" / part, images, faults)
    fine = _label_maps(root / "gtFine" / part, images, faults)
    if part != "test" and not drawn and not coarse and not fine:
        raise FileNotFoundError(f"{root}: expected labels in gtCoarse/{part}/ or gtFine/{part}/, got neither")
    return [Item(name, path, positive=first(coarse, name), mask=first(fine, name)) for name, path in images.items()]


def _label_maps(folder: Path, images: dict[str, Path], faults: list[Fault]) -> dict[str, tuple[Path, ...]]:
    if not folder.is_dir():
        return {}
    kind = folder.parent.name  # gtCoarse or gtFine
    return match(images, _find_labels(folder, kind), f"{kind} label map", folder, faults)


def _find_labels(folder: Path, kind: str) -> dict[str, Path]:
    train_ids = find_files(folder, f"_{kind}_labelTrainIds.png")
    return {**train_ids, **find_files(folder, f"_{kind}_labelIds.png")}


def _read(path: Path) -> np.ndarray:
    classes = _TRAIN_IDS if path.name.endswith("_labelTrainIds.png") else CLASSES
    return classes.decode(read_labels(path), path)
