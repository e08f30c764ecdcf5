"""Data sets: one `Record` type on disk's side, one `Sample` type on the network's, one registry.

    files --(a data set's module)--> Source of Records --(transforms, `SegmentationData`)--> Dataset of Samples

A data set is one module here with ``open_split(config, split) -> Source``, and one line in `DATASETS`. It knows its layout
and its class table; reading, checking, transforms and batching are the same for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """One image with its drawings, or a batch of them (leading axis B).

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

    image: (H, W, channels) uint8, 1 or 3 channels.
    positive, mask: (H, W) uint8 classes, `IGNORE` where there is none.
    negative: (K, H, W) uint8.
    """

    name: str
    image: np.ndarray
    positive: np.ndarray | None = None
    negative: np.ndarray | None = None
    mask: np.ndarray | None = None


class Source(Protocol):
    """One split of one data set."""

    classes: Classes

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """What the image is called in messages and in the files of predictions: a relative path without suffix."""
        ...

    def kinds(self, index: int) -> frozenset[str]:
        """Which of "positive", "negative", "mask" this image has, without reading it."""
        ...

    def files(self, index: int) -> list[Path]:
        """What the image and its label maps are read from; nothing where they are made."""
        ...

    def load(self, index: int) -> Record:
        """Read image and label maps. Raises ValueError naming the file that is missing, damaged or inconsistent."""
        ...


class Subset:
    """Some images of a source, as a source."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices, self.classes = source, indices, source.classes

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def kinds(self, index: int) -> frozenset[str]:
        return self.source.kinds(self.indices[index])

    def files(self, index: int) -> list[Path]:
        return self.source.files(self.indices[index])

    def load(self, index: int) -> Record:
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

    Raises `FolderNotFound` where there is no such split, ValueError or FileNotFoundError naming what is wrong.
    """
    if config.dataset not in DATASETS:
        raise ValueError(f"dataset: expected one of {tuple(DATASETS)}, got {config.dataset!r}")
    module = import_module(f".{DATASETS[config.dataset]}", __name__)
    opener: Callable[[DataConfig, str], Source] = module.open_split
    return opener(config, split)


def describe_source(source: Source) -> str:
    """How many images there are, and with what."""
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
