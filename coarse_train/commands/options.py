"""Options that commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass(frozen=True)
class DrawnData:
    """A data set, perhaps with drawings of one's own."""

    dataset: tyro.conf.Positional[str] = "folder"
    """folder (your own), cityscapes, camvid, chasedb1, drive, les_av or mnist."""
    root: Path | None = None
    """Folder of the data set in its official layout (mnist: without it, the sample in the package)."""
    variant: str = ""
    """Which labels, where a data set has several; its module lists them. Empty: the usual ones."""
    positives: Path | None = None
    """Folder of positive drawings, DIR/SPLIT/NAME.png; without it what the data set has."""
