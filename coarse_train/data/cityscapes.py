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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .classes import IGNORE, Classes
from .files import Fault, FileSource, Item, check_choice, find_files, find_pngs, first, match, open_files, root_folder
from .images import read_labels

if TYPE_CHECKING:
    from ..config import DataConfig


class Label(NamedTuple):
    """One row of the official table. train_id: 255 or -1 where it is not learned."""

    name: str
    id: int
    train_id: int
    colour: tuple[int, int, int]


# Facts from cityscapesscripts/helpers/labels.py (cityscapesScripts 2.2). In label files -1 does not occur: the official
# tool leaves out polygons with a negative id (preparation/json2labelImg.py), so that what they lie on shows.
LABELS = (
    Label("unlabeled", 0, 255, (0, 0, 0)),
    Label("ego vehicle", 1, 255, (0, 0, 0)),
    Label("rectification border", 2, 255, (0, 0, 0)),
    Label("out of roi", 3, 255, (0, 0, 0)),
    Label("static", 4, 255, (0, 0, 0)),
    Label("dynamic", 5, 255, (111, 74, 0)),
    Label("ground", 6, 255, (81, 0, 81)),
    Label("road", 7, 0, (128, 64, 128)),
    Label("sidewalk", 8, 1, (244, 35, 232)),
    Label("parking", 9, 255, (250, 170, 160)),
    Label("rail track", 10, 255, (230, 150, 140)),
    Label("building", 11, 2, (70, 70, 70)),
    Label("wall", 12, 3, (102, 102, 156)),
    Label("fence", 13, 4, (190, 153, 153)),
    Label("guard rail", 14, 255, (180, 165, 180)),
    Label("bridge", 15, 255, (150, 100, 100)),
    Label("tunnel", 16, 255, (150, 120, 90)),
    Label("pole", 17, 5, (153, 153, 153)),
    Label("polegroup", 18, 255, (153, 153, 153)),
    Label("traffic light", 19, 6, (250, 170, 30)),
    Label("traffic sign", 20, 7, (220, 220, 0)),
    Label("vegetation", 21, 8, (107, 142, 35)),
    Label("terrain", 22, 9, (152, 251, 152)),
    Label("sky", 23, 10, (70, 130, 180)),
    Label("person", 24, 11, (220, 20, 60)),
    Label("rider", 25, 12, (255, 0, 0)),
    Label("car", 26, 13, (0, 0, 142)),
    Label("truck", 27, 14, (0, 0, 70)),
    Label("bus", 28, 15, (0, 60, 100)),
    Label("caravan", 29, 255, (0, 0, 90)),
    Label("trailer", 30, 255, (0, 0, 110)),
    Label("train", 31, 16, (0, 80, 100)),
    Label("motorcycle", 32, 17, (0, 0, 230)),
    Label("bicycle", 33, 18, (119, 11, 32)),
    Label("license plate", -1, -1, (0, 0, 142)),
)
_LEARNED = sorted((label for label in LABELS if 0 <= label.train_id < IGNORE), key=lambda label: label.train_id)
CLASSES = Classes(
    names=tuple(label.name for label in _LEARNED),
    colours=tuple(label.colour for label in _LEARNED),
    ids=tuple(label.id for label in _LEARNED),
    ignored=tuple(label.id for label in LABELS if label.train_id == IGNORE),
)
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
