"""Your own images and drawings, in folders.

    ROOT/classes.toml
    ROOT/train/images/NAME.jpg        also png, tif, ...; sub-folders are part of NAME
    ROOT/train/positives/NAME.png     "this region is class y"
    ROOT/train/negatives/NAME.png     "this region is not class y"; more layers are NAME.1.png, NAME.2.png, ...
    ROOT/train/masks/NAME.png         the true classes
    ROOT/val/..., ROOT/test/...       the same

With ``ROOT/images`` beside ``classes.toml`` the folders there are the training images and ``train`` does not exist; val and
test stay where they are. Each of positives, negatives and masks may be left out, for all images or for some, but a training
image has at least one of them, and no label map is without its image. Label maps are PNG (or another lossless format) with
one number per pixel; 255 means that nothing is drawn. ``classes.toml`` says what the numbers mean:

    ignore = [0, [224, 224, 192]]     further numbers and colours that mean "nothing", if there are
    ignore = {positives = [0]}        or those of one kind of label maps, or of several, alone

    [[class]]
    name = "road"
    id = 7                            or [7, 8]: both mean it; without it the position in the list, from 0
    colour = [128, 64, 128]           without it one that colour-blind people can tell from the others

Where all classes have a colour, label maps may be coloured (RGB), and of palettes the colours count instead of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from . import FolderNotFound
from .classes import read_classes
from .files import FileSource, Item, check_choice, first, match, open_files, root_folder, subfolders
from .walk import Fault, find_pictures

if TYPE_CHECKING:
    from ..config import DataConfig

_KINDS = {"positives": "positive drawing", "negatives": "negative drawing", "masks": "mask"}
_SHORT = {"pos": "positives", "neg": "negatives"}
_SPLITS = {  # as they are called, and as people call them
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}


def open_split(config: DataConfig, split: str) -> FileSource:
    """The images of ``split`` in the layout above. No variants."""
    check_choice(config, split)
    root = root_folder(config, "your images with classes.toml")
    classes = read_classes(root / "classes.toml")
    base = _split_folder(root, split)
    _check_names(root, base)
    faults: list[Fault] = []
    images = find_pictures(base / "images", faults)
    overridden = {"positives": config.positives, "negatives": config.negatives}
    _check_places(root, base, images, [kind for kind in _KINDS if not overridden.get(kind)])
    maps = {kind: {} if overridden.get(kind) else _label_maps(base / kind, images, faults) for kind in _KINDS}
    if split == "train" and not any(overridden.values()):
        bare = [name for name in images if not any(name in found for found in maps.values())]
        if bare:
            faults.append(Fault("a label map in positives/, negatives/ or masks/ for every image", base, bare))
    items = [
        Item(
            name,
            path,
            positive=first(maps["positives"], name),
            negative=maps["negatives"].get(name, ()),
            mask=first(maps["masks"], name),
        )
        for name, path in images.items()
    ]
    return open_files(items, classes, config, split, faults=faults)


def _split_folder(root: Path, split: str) -> Path:
    flat, parted = root / "images", root / split / "images"
    if split == "train" and flat.is_dir() and parted.is_dir():
        raise ValueError(f"{root}: expected either images/ or train/images/, got both")
    if split == "train" and flat.is_dir():
        return root
    if not parted.is_dir():
        wanted = f"{split}/images/" + (" or images/" if split == "train" else "")
        raise FolderNotFound(f"{root}: expected {wanted} for split {split!r}, got {subfolders(root)}")
    return root / split


def _check_names(root: Path, base: Path) -> None:
    """A folder that is misspelt, or lies elsewhere, would leave its drawings out without a word."""
    expected = ["images", *_KINDS]
    known = {*expected, *_SPLITS}
    others = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name not in known)
    near = [name for name in others if get_close_matches(name.lower(), expected, cutoff=0.7)]
    if near:
        raise ValueError(f"{base / near[0]}: expected folders called images, {', '.join(_KINDS)}, got {near[0]!r}")
    for path in sorted(root.iterdir()):
        meant = next((split for split, names in _SPLITS.items() if path.name.lower() in names), None)
        if meant not in (None, path.name) and (path / "images").is_dir() and not (root / meant).is_dir():
            raise ValueError(f"{path}: expected a split called {meant}, got {path.name!r}")


def _check_places(root: Path, base: Path, images: dict[str, Path], kinds: Sequence[str]) -> None:
    """Likewise, where files of the images' names lie in a folder beside, or in one of a shorter name."""
    flat = (root / "images").is_dir()  # the training images lie beside the table
    for kind in kinds:
        if (base / kind).is_dir():
            continue
        places = [base / short for short, meant in _SHORT.items() if meant == kind]
        for place in [*places, *([] if flat else [root / kind])]:
            if place.is_dir() and images.keys() & find_pictures(place, []).keys():
                raise ValueError(f"{place}: expected label maps of these images in {base / kind}, got them there")


def _label_maps(folder: Path, images: dict[str, Path], faults: list[Fault]) -> dict[str, tuple[Path, ...]]:
    if not folder.is_dir():
        return {}
    files = find_pictures(folder, faults)
    what, layers = _KINDS[folder.name], folder.name == "negatives"
    return match(images, files, what, folder, faults, layers=layers, optional=True)
