"""Data sets: one `Record` type on disk's side, one `Sample` type on the network's, one registry.

    files --(a data set's module)--> Source of Records --(transforms, `SegmentationData`)--> Dataset of Samples

A data set is one module here with ``open_split(config, split) -> Source``, and one line in `DATASETS`. It knows its layout
and its class table; reading, checking, transforms and batching are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from .classes import IGNORE, Classes
from .walk import FolderNotFound

if TYPE_CHECKING:
    from ..config import DataConfig


class Sample(NamedTuple):
    """One image with its drawings, or a batch of them (leading axis B). Classes are 0 to C - 1, `IGNORE` is 255.

    image: (channels, H, W) float32 in [0, 1].
    positive: (H, W) uint8, "this region is class y"; `IGNORE` where nothing is drawn.
    negative: (K, H, W) uint8, K layers of "this region is not class y"; `IGNORE` where nothing is drawn. More than one
        layer where one pixel has several negative drawings.
    mask: (H, W) uint8, the true class; `IGNORE` where it is not known. Read by scores and by dense supervision, by no
        other loss.
    """

    image: Tensor
    positive: Tensor
    negative: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Record:
    """One image as a data set has it, before any transform. None: the data set has no such map for this image.

    name: as `Source.name` says.
    image: (H, W, channels) uint8, 1 or 3 channels.
    positive, mask: (H, W) uint8 classes from 0 to C - 1, `IGNORE` (255) where there is none.
    negative: (K, H, W) uint8, K layers, likewise.
    """

    name: str
    image: np.ndarray
    positive: np.ndarray | None = None
    negative: np.ndarray | None = None
    mask: np.ndarray | None = None


class Source(Protocol):
    """One split of one data set; ``index`` counts its images from 0.

    classes: the class table.
    """

    classes: Classes

    def __len__(self) -> int:
        """How many images there are."""
        ...

    def name(self, index: int) -> str:
        """What the image is called in messages and in the files of predictions: a relative path without suffix, with "/"
        between folders. No other image of the split has it."""
        ...

    def kinds(self, index: int) -> frozenset[str]:
        """Which of "positive", "negative", "mask" this image has, without reading it; `load` gives those."""
        ...

    def files(self, index: int) -> list[Path]:
        """What the image and its label maps are read from; an empty list where they are made."""
        ...

    def load(self, index: int) -> Record:
        """Read image and label maps.

        Raises:
            ValueError: naming the file that is damaged, has another size than the image, or values that are no class.
            FileNotFoundError: naming the file that is missing.
        """
        ...


class Subset:
    """Some images of a source, as a source: image k of it is image ``indices[k]`` of ``source``. Nothing is read or checked as
    it is made."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        """How many images there are."""
        return len(self.indices)

    def name(self, index: int) -> str:
        """As `Source.name`."""
        return self.source.name(self.indices[index])

    def kinds(self, index: int) -> frozenset[str]:
        """As `Source.kinds`."""
        return self.source.kinds(self.indices[index])

    def files(self, index: int) -> list[Path]:
        """As `Source.files`."""
        return self.source.files(self.indices[index])

    def load(self, index: int) -> Record:
        """As `Source.load`."""
        return self.source.load(self.indices[index])


# name -> module with open_split(config, split); imported when asked for, so that none pays for another's dependencies
DATASETS = {
    "folder": "folder",
    "cityscapes": "cityscapes",
    "camvid": "camvid",
    "chasedb1": "retina",
    "drive": "retina",
    "les_av": "retina",
    "mnist": "mnist",
}


def open_split(config: DataConfig, split: str) -> Source:
    """The images of ``split`` ("train", "val" or "test") of ``config.dataset``; for training the first ``config.limit``.

    Raises:
        FolderNotFound: the data set has no such split, or not the folders of its layout; naming the folder.
        FileNotFoundError: naming a folder or a file that is missing.
        ValueError: naming the option that makes no sense, or the folder where images and label maps do not match.
    """
    if config.dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {tuple(DATASETS)}, got {config.dataset!r}")
    if isinstance(config.root, str):  # in a script
        config = replace(config, root=Path(config.root))
    module = import_module(f".{DATASETS[config.dataset]}", __name__)
    opener: Callable[[DataConfig, str], Source] = module.open_split
    return opener(config, split)


def describe_source(source: Source) -> str:
    """How many images there are, and with what, in a sentence on a training split; no file is read."""
    found = [source.kinds(index) for index in range(len(source))]
    counts = {kind: sum(kind in kinds for kinds in found) for kind in ("positive", "negative", "mask")}
    return f"{len(source)} training images, " + ", ".join(f"{count} with {kind}" for kind, count in counts.items())


__all__ = [
    "DATASETS",
    "IGNORE",
    "Classes",
    "FolderNotFound",
    "Record",
    "Sample",
    "Source",
    "Subset",
    "describe_source",
    "open_split",
]
