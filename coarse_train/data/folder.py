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

    ignore = [0]                      further numbers that mean "nothing", if there are

    [[class]]
    name = "road"
    id = 7                            without it the position in the list, from 0
    colour = [128, 64, 128]           without it one that colour-blind people can tell from the others
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import FolderNotFound
from .classes import IGNORE, OKABE_ITO, Classes
from .files import (
    IMAGE_SUFFIXES,
    Fault,
    FileSource,
    Item,
    check_choice,
    find_files,
    first,
    match,
    open_files,
    root_folder,
    subfolders,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:
    from ..config import DataConfig

_KINDS = {"positives": "positive drawing", "negatives": "negative drawing", "masks": "mask"}


def open_split(config: DataConfig, split: str) -> FileSource:
    """The images of ``split`` in the layout above. No variants."""
    check_choice(config, split)
    root = root_folder(config, "your images with classes.toml")
    classes = read_classes(root / "classes.toml")
    base = _split_folder(root, split)
    _check_names(base)
    images = find_files(base / "images", *IMAGE_SUFFIXES)
    faults: list[Fault] = []
    overridden = {"positives": config.positives, "negatives": config.negatives}
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


def _check_names(base: Path) -> None:
    """A folder that is misspelt would leave its drawings out without a word."""
    known = {"images", *_KINDS, "train", "val", "test"}
    others = sorted(path.name for path in base.iterdir() if path.is_dir() and path.name not in known)
    near = [name for name in others if get_close_matches(name.lower(), ["images", *_KINDS], cutoff=0.7)]
    if near:
        raise ValueError(f"{base / near[0]}: expected folders called images, {', '.join(_KINDS)}, got {near[0]!r}")


def _label_maps(folder: Path, images: dict[str, Path], faults: list[Fault]) -> dict[str, tuple[Path, ...]]:
    if not folder.is_dir():
        return {}
    files = find_files(folder, *IMAGE_SUFFIXES)
    what, layers = _KINDS[folder.name], folder.name == "negatives"
    return match(images, files, what, folder, faults, layers=layers, optional=True)


def read_classes(path: Path) -> Classes:
    """The class table in a ``classes.toml``. Raises ValueError naming the file and the key."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        _known_keys(content, {"class", "ignore"}, "")
        entries = content.get("class")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"class: expected tables [[class]], got {entries!r}")
        colours = palette(len(entries))
        rows = [_row(entry, index, colours[index]) for index, entry in enumerate(entries)]
        ignored = content.get("ignore", [])
        if not isinstance(ignored, list) or not all(_is_byte(value, IGNORE) for value in ignored):
            raise ValueError(f"ignore: expected a list of integers from 0 to {IGNORE}, got {ignored!r}")
        names, ids, shades = zip(*rows, strict=True) if rows else ((), (), ())
        return Classes(names, shades, ids, tuple(ignored))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected the class table of your images, got no file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _row(entry: dict[str, Any], index: int, colour: tuple[int, int, int]) -> tuple[str, int, tuple[int, int, int]]:
    key = f"class {index}"
    _known_keys(entry, {"name", "id", "colour"}, f"{key}.")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key}.name: expected a text, got {name!r}")
    number = entry.get("id", index)
    if not _is_byte(number, IGNORE - 1):
        raise ValueError(f"{key}.id: expected an integer from 0 to {IGNORE - 1}, got {number!r}")
    given = entry.get("colour", list(colour))
    if not isinstance(given, list) or len(given) != 3 or not all(_is_byte(value, 255) for value in given):
        raise ValueError(f"{key}.colour: expected three integers from 0 to 255, got {given!r}")
    return name, number, (given[0], given[1], given[2])


def _known_keys(table: dict[str, Any], known: set[str], prefix: str) -> None:
    unknown = sorted(table.keys() - known)
    if unknown:
        raise ValueError(f"{prefix}{unknown[0]}: expected one of the keys {', '.join(sorted(known))}, got this one")


def _is_byte(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def palette(count: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that people with any colour vision can tell apart: Okabe and Ito's eight, then steps of cividis."""
    colours = OKABE_ITO[1:] + OKABE_ITO[:1]  # black last: on an overlay it looks like nothing
    if count <= len(colours):
        return colours[:count]
    from matplotlib import colormaps  # in here: its import takes longer than opening a data set

    more = colormaps["cividis"]([index / (count - len(OKABE_ITO)) for index in range(count - len(OKABE_ITO))])
    return colours + tuple((int(r), int(g), int(b)) for r, g, b in (more[:, :3] * 255).round())
