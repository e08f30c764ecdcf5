"""Options that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from ..config import DataConfig
from ..data.images import MAX_PIXELS
from ..rules import MOST_WORKERS


def check_reading(workers: int, max_pixels: int | None = None) -> None:
    """Raises ValueError naming what is none of these: processes that read images, pixels of an image."""
    if not 0 <= workers <= MOST_WORKERS:
        raise ValueError(f"workers: expected a number from 0 to {MOST_WORKERS}, got {workers}")
    if max_pixels is not None and max_pixels < 1:
        raise ValueError(f"max_pixels: expected a number >= 1, got {max_pixels}")


@dataclass(frozen=True)
class NamedData:
    """A data set."""

    dataset: tyro.conf.Positional[str] = "folder"
    """folder (your own), cityscapes, camvid, chasedb1, drive, les_av or mnist."""
    root: Path | None = None
    """Folder of the data set in its official layout (mnist: without it, the sample in the package)."""
    variant: str = ""
    """Which labels, where a data set has several; its module lists them. Empty: the usual ones."""
    max_pixels: int = MAX_PIXELS
    """Images and label maps of more pixels are an error: a small file may be made to fill the memory."""


@dataclass(frozen=True)
class DrawnData(NamedData):
    """A data set, perhaps with drawings of one's own."""

    positives: Path | None = None
    """Folder of positive drawings, DIR/SPLIT/NAME.png; without it what the data set has."""

    def data_config(self, *, negatives: Path | None = None, simulate: str | None = None) -> DataConfig:
        return DataConfig(
            dataset=self.dataset,
            root=self.root,
            variant=self.variant,
            positives=self.positives,
            negatives=negatives,
            simulate=simulate,
            max_pixels=self.max_pixels,
        )
