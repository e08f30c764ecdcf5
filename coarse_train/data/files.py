"""A list of files as a `Source`: finding, pairing and checking them, which every data set on disk shares.

What is missing, damaged or does not fit is an error that names the file, or with ``skip_bad`` a line
"skipped NAME: reason" on stderr and an entry in `FileSource.skipped`.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import Record, Source
from .classes import IGNORE, Classes
from .images import MAX_PIXELS, Picture, load_image, load_labels, pixel_limit, read_binary
from .inspect import inspect
from .walk import Fault, FolderNotFound, find_pngs, listed, without

if TYPE_CHECKING:
    from ..config import DataConfig

SPLITS = ("train", "val", "test")
Reader = Callable[[Path], np.ndarray]  # a label file -> (H, W) uint8 classes


Finder = Callable[[Path], dict[str, Path]]  # a folder -> its label files by the names of their images


def match(
    names: Iterable[str],
    files: Mapping[str, Path],
    what: str,
    folder: Path,
    faults: list[Fault],
    *,
    layers: bool = False,
    optional: bool = False,
    others: bool = False,
) -> dict[str, tuple[Path, ...]]:
    """name -> its file among ``files``, with ``layers`` also those called ``name.1``, ``name.2``, ...

    What is missing is added to ``faults``: a file for each of ``names`` unless ``optional``, and one of ``names`` for
    each file unless ``others`` (the folder also has files of images that are not meant).
    """
    names = dict.fromkeys(names)
    found: dict[str, tuple[Path, ...]] = {}
    left = dict(files)
    for name in names:
        if name not in files:
            continue
        keys = [name]
        while layers and (key := f"{name}.{len(keys)}") in files and key not in names:
            keys.append(key)
        found[name] = tuple(left.pop(key) for key in keys)
    missing = [name for name in names if name not in found]
    if others:  # x.2 without x.1 is a fault, another image's file is none
        left = {key: path for key, path in left.items() if re.sub(r"\.\d+$", "", key) in names}
    if missing and not optional:
        faults.append(Fault(f"a {what} for every image", folder, missing))
    if left:
        faults.append(Fault(f"an image for every {what}", folder, list(left)))
    return found


def first(found: Mapping[str, tuple[Path, ...]], name: str) -> Path | None:
    """The first file that `match` found for an image, if there is one."""
    return found[name][0] if name in found else None


@dataclass(frozen=True)
class Item:
    """The files of one image. Outside ``field_of_view`` (white inside, black outside) every label map is `IGNORE`."""

    name: str
    image: Path
    positive: Path | None = None
    negative: tuple[Path, ...] = ()
    mask: Path | None = None
    field_of_view: Path | None = None

    @property
    def files(self) -> list[Path]:
        single = (self.image, self.positive, self.mask, self.field_of_view)
        return [path for path in (*single, *self.negative) if path is not None]


class FileSource:
    """Items as a `Source`. All images have as many layers of negative drawings as the one with the most.

    readers: how the files of "positive", "negative" or "mask" are read; without one `read_labels` and `Classes.decode`.
    skipped: "NAME: reason" for each image that was left out.
    """

    def __init__(
        self,
        items: Sequence[Item],
        classes: Classes,
        *,
        readers: Mapping[str, Reader] | None = None,
        skipped: Sequence[str] = (),
        max_pixels: int = MAX_PIXELS,
    ):
        self.items = tuple(items)
        self.classes = classes
        self.max_pixels = max_pixels
        self.readers = dict(readers or {})
        self.skipped = tuple(skipped)
        self._layers = max((len(item.negative) for item in self.items), default=0)

    @classmethod
    def open(
        cls,
        items: Sequence[Item],
        classes: Classes,
        *,
        skip_bad: bool = False,
        readers: Mapping[str, Reader] | None = None,
        faults: Sequence[Fault] = (),
        max_pixels: int = MAX_PIXELS,
    ) -> FileSource:
        """The items, checked: that all files exist, or with ``skip_bad`` that all can be read and fit, which reads
        every file once. ``faults`` are what `match` found; they count as bad, too.

        Raises:
            ValueError: a name occurs twice; without ``skip_bad`` the first fault, with it where no image is good.
            FileNotFoundError: without ``skip_bad``, naming the first file that is missing.
        """
        duplicates = [name for name, count in Counter(item.name for item in items).items() if count > 1]
        if duplicates:
            raise ValueError(f"expected each image once, got more than one {listed(duplicates)}")
        if not (skip_bad or faults):
            _require_files(items)
        options: dict[str, Any] = {"readers": readers, "max_pixels": max_pixels}
        good, skipped = sift(cls(items, classes, **options), faults, skip_bad=skip_bad)
        return cls([items[index] for index in good], classes, skipped=skipped, **options)

    def __len__(self) -> int:
        return len(self.items)

    def name(self, index: int) -> str:
        return self.items[index].name

    def kinds(self, index: int) -> frozenset[str]:
        item = self.items[index]
        return frozenset(kind for kind in ("positive", "negative", "mask") if getattr(item, kind))

    def files(self, index: int) -> list[Path]:
        return self.items[index].files

    def load(self, index: int) -> Record:
        """As `Source.load`; where other images have negative drawings and this one has none, its layers are empty."""
        return self.examine(index)[0]

    def examine(self, index: int) -> tuple[Record, list[tuple[str, Picture]]]:
        """The record, and what its files hold, each with "image" or its kind; not those with a reader of their own."""
        with pixel_limit(self.max_pixels):
            seen: list[tuple[str, Picture]] = []
            return self._load(self.items[index], seen), seen

    def _load(self, item: Item, seen: list[tuple[str, Picture]]) -> Record:
        picture = load_image(item.image)
        image = picture.pixels
        seen.append(("image", picture))
        outside = None
        if item.field_of_view is not None:
            outside = read_binary(item.field_of_view) == 0
            check_size(outside, item.field_of_view, image, item.image)

        def read(kind: str, path: Path) -> np.ndarray:
            labels = read_map(path, self.classes, kind, self.readers.get(kind), seen)
            check_size(labels, path, image, item.image)
            if outside is not None:
                labels[outside] = IGNORE
            return labels

        negative = stack_layers([read("negative", path) for path in item.negative], self._layers, image)
        return Record(
            name=item.name,
            image=image,
            positive=read("positive", item.positive) if item.positive else None,
            negative=negative if self._layers else None,
            mask=read("mask", item.mask) if item.mask else None,
        )


def read_map(
    path: Path,
    classes: Classes,
    kind: str,
    reader: Reader | None = None,
    seen: list[tuple[str, Picture]] | None = None,
) -> np.ndarray:
    """(H, W) uint8 classes of a label file of a kind, "positive", "negative" or "mask"; without a reader by its numbers, or
    where the table has their colours, by these. What is transparent is `IGNORE`."""
    if reader is not None:
        return reader(path)
    picture = load_labels(path)
    pixels, palette, transparent = picture.pixels, picture.palette, picture.transparent
    if transparent is not None:  # whatever number or colour it has
        if transparent.all():
            if seen is not None:
                seen.append((kind, picture))
            return np.full(pixels.shape[:2], IGNORE, np.uint8)
        pixels = np.where(transparent, pixels[~transparent][0], pixels)
    if pixels.ndim > 2 and not classes.by_colour:
        raise ValueError(
            f"{path}: expected a label map of one channel of at most 8 bits, got mode RGB; colours are read where every class "
            "of the table has its own"
        )
    if palette is not None and classes.by_colour:
        used = np.flatnonzero(np.bincount(pixels.ravel()))
        if used[-1] < len(palette) and classes.counts_by_colour(palette, used, path, kind):
            pixels = palette[pixels]
    if seen is not None:
        seen.append((kind, picture._replace(pixels=pixels)))
    labels = classes.decode_colours(pixels, path) if pixels.ndim > 2 else classes.decode(pixels, path, kind)
    if transparent is not None:
        labels[transparent] = IGNORE
    return labels


def check_size(labels: np.ndarray, path: Path, image: np.ndarray, image_path: Path | str) -> None:
    if labels.shape == image.shape[:2]:
        return
    sizes = [f"{array.shape[1]}x{array.shape[0]}" for array in (image, labels)]
    turned = isinstance(image_path, Path) and labels.shape == image.shape[1::-1] and load_image(image_path).turned
    why = "; the image has an orientation tag, by which it is turned, and the label map is not" if turned else ""
    raise ValueError(f"{path}: expected {sizes[0]} pixels as {image_path} has, got {sizes[1]}{why}")


def stack_layers(maps: Sequence[np.ndarray], count: int, image: np.ndarray) -> np.ndarray:
    """(count, H, W) uint8: the maps, then empty layers."""
    layers = np.full((count, *image.shape[:2]), IGNORE, np.uint8)
    for layer, labels in zip(layers, maps, strict=False):
        layer[:] = labels
    return layers


def sift(source: Source, faults: Sequence[Fault], *, skip_bad: bool) -> tuple[list[int], tuple[str, ...]]:
    """The indices of the images that are good, and "NAME: reason", also printed, for what is not.

    Without ``skip_bad`` the first of ``faults`` is raised and nothing is read.
    """
    if not skip_bad:
        for fault in faults:
            raise ValueError(f"{fault.folder}: expected {fault.expected}, got {fault.got}{listed(fault.names)}")
        return list(range(len(source))), ()
    bad = {
        name: f"expected {fault.expected} in {fault.folder}, got {fault.got.removesuffix(' for ') or 'another'}"
        for fault in faults
        for name in fault.names
    }
    for index, reason in check(source).items():
        bad.setdefault(source.name(index), reason)
    skipped = tuple(f"{name}: {reason}" for name, reason in bad.items())
    for line in skipped:
        print(f"skipped {line}", file=sys.stderr)
    good = [index for index in range(len(source)) if source.name(index) not in bad]
    if not good:
        raise ValueError(f"expected at least one good image of {len(source)}, got none; {skipped[0]}")
    return good, skipped


def check(source: Source) -> dict[int, str]:
    """Index -> what is wrong with it, for all that cannot be loaded."""
    return {index: fact for index, fact in enumerate(inspect(source)) if isinstance(fact, str)}


def open_files(
    items: Sequence[Item],
    classes: Classes,
    config: DataConfig,
    split: str,
    *,
    readers: Mapping[str, Reader] | None = None,
    faults: Sequence[Fault] = (),
    find: Finder = find_pngs,
    drawing_reader: Reader | None = None,
) -> FileSource:
    """The split as the config asks for it: with its drawings in place of the data set's own, and at most ``limit``
    images in training; files of images beyond the limit are not looked at. ``find``, ``drawing_reader``: how the config's
    drawings are found in their folder and read.

    Raises:
        ValueError: there is no image, ``limit`` is below 1, or as `FileSource.open`.
        FileNotFoundError: a folder of drawings is missing, or as `FileSource.open`.
    """
    if not items:
        raise ValueError(f"{config.root}: expected images of split {split!r}, got none")
    items, faults, readers = list(items), list(faults), dict(readers or {})
    for kind, folder in (("positive", config.positives), ("negative", config.negatives)):
        if folder is None:
            continue
        drawn = find_drawings(kind, folder, split, [item.name for item in items], faults, find)
        readers.pop(kind, None)
        if drawing_reader is not None:
            readers[kind] = drawing_reader
        if kind == "positive":
            items = [replace(item, positive=first(drawn, item.name)) for item in items]
        else:
            items = [replace(item, negative=drawn.get(item.name, ())) for item in items]
    kept = training_limit(config, split, len(items))
    faults = without(faults, {item.name for item in items[kept:]})
    return FileSource.open(
        items[:kept],
        classes,
        skip_bad=config.skip_bad,
        readers=readers,
        faults=faults,
        max_pixels=config.max_pixels,
    )


def find_drawings(
    kind: str,
    folder: Path,
    split: str,
    names: Sequence[str],
    faults: list[Fault],
    find: Finder = find_pngs,
) -> dict[str, tuple[Path, ...]]:
    """The files of drawings of one kind ("positive" or "negative") in a folder of `DataConfig`; ``{}``: none are drawn.

    ``folder/NAME.png`` for the training images alone, since another split may use the same names; or where it has folders
    called train, val or test, ``folder/SPLIT/NAME.png``. More layers of negatives are ``NAME.1.png``, ``NAME.2.png``, ...
    Every training image needs a drawing; in the other splits, which are not learned from, an image may be without.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{kind}s: expected a folder of drawings, got {folder}")
    parts = [part for part in SPLITS if (folder / part).is_dir()]
    if split not in (parts or ("train",)):
        if split == "train":
            raise FileNotFoundError(f"{kind}s: expected {folder} to have a folder train, got {', '.join(parts)}")
        return {}
    base = folder / split if parts else folder
    return match(
        names,
        find(base),
        f"{kind} drawing NAME.png",
        base,
        faults,
        layers=kind == "negative",
        optional=split != "train",
        others=not parts,
    )


def training_limit(config: DataConfig, split: str, count: int) -> int:
    """How many of ``count`` images of the split are used."""
    if split != "train" or config.limit is None:
        return count
    if config.limit < 1:
        raise ValueError(f"limit: expected at least 1 training image, got {config.limit}")
    return min(count, config.limit)


def root_folder(config: DataConfig, what: str, *expected: str) -> Path:
    """``config.root``, which must be a folder with the sub-folders ``expected``; ``what`` is its name in messages.

    Raises:
        ValueError: there is no root in the config.
        FileNotFoundError: it is no folder; `FolderNotFound`: it has not those in it.
    """
    wanted = f"the folder of {what}" + (f" with {', '.join(f'{name}/' for name in expected)}" if expected else "")
    if config.root is None:
        raise ValueError(f"root: expected {wanted}, got none")
    if not config.root.is_dir():
        raise FileNotFoundError(f"{config.root}: expected {wanted}, got {'a file' if config.root.exists() else 'none'}")
    if not all((config.root / name).is_dir() for name in expected):
        raise FolderNotFound(f"{config.root}: expected {wanted}, got {subfolders(config.root)}")
    return config.root


def subfolders(folder: Path) -> str:
    names = [f"{path.name}/" for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    return listed(names) if names else "no folders in it"


def check_choice(config: DataConfig, split: str, *variants: str) -> None:
    """Raises ValueError for a split that is none of `SPLITS`, or a variant that is neither "" nor one of ``variants``."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    if config.variant not in ("", *variants):
        raise ValueError(f"variant: expected one of {('', *variants)} for {config.dataset}, got {config.variant!r}")


def _require_files(items: Sequence[Item]) -> None:
    paths = [path for item in items for path in item.files]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{missing[0]}: expected a file, got none ({len(missing)} of {len(paths)} are missing)")
