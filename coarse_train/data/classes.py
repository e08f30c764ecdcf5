"""The classes of a data set: their names, colours, and the values that stand for them in its label files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from .. import IGNORE

# Okabe and Ito 2008, "Color Universal Design", https://jfly.uni-koeln.de/color/: told apart by colour-blind people, too
OKABE_ITO = (
    (0, 0, 0),
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
)


@dataclass(frozen=True)
class Classes:
    """A class table. Inside the package class k is the index k (a "train id"); label files may have other values.

    ids: value of class k in label files; ``()`` means k itself.
    ignored: further values of label files that mean "no class"; `IGNORE` always does.
    """

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]
    ids: tuple[int, ...] = ()
    ignored: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 2 <= count < IGNORE:
            raise ValueError(f"names: expected 2 to {IGNORE - 1} classes, got {count}")
        if len(set(self.names)) != count:
            raise ValueError(f"names: expected each name once, got {self.names}")
        for field in ("colours", "ids"):
            if len(getattr(self, field)) not in ({count} if field == "colours" else {0, count}):
                raise ValueError(f"{field}: expected one for each of {count} classes, got {len(getattr(self, field))}")
        values = [*self.file_ids, *self.ignored]
        if len(set(values)) != len(values) or not all(0 <= value <= IGNORE for value in values) or IGNORE in self.ids:
            raise ValueError(f"ids, ignored: expected different values from 0 to {IGNORE - 1}, got {values}")

    def __len__(self) -> int:
        return len(self.names)

    @property
    def file_ids(self) -> tuple[int, ...]:
        return self.ids or tuple(range(len(self.names)))

    @cached_property
    def _from_file(self) -> np.ndarray:
        table = np.full(256, -1, np.int16)
        table[[*self.ignored, IGNORE]] = IGNORE
        table[list(self.file_ids)] = np.arange(len(self))
        return table

    def decode(self, labels: np.ndarray, path: Path | str) -> np.ndarray:
        """(H, W) uint8 as in a label file -> (H, W) uint8 classes. ``path`` is named where a value is in no table."""
        decoded = self._from_file[labels]
        if (decoded < 0).any():
            unknown = np.unique(labels[decoded < 0]).tolist()
            known = sorted({*self.file_ids, *self.ignored, IGNORE})
            raise ValueError(f"{path}: expected labels among {known}, got {unknown}")
        return decoded.astype(np.uint8)

    def encode(self, classes: np.ndarray) -> np.ndarray:
        """(H, W) uint8 classes -> the values of the data set's label files; `IGNORE` stays."""
        table = np.full(256, IGNORE, np.uint8)
        table[: len(self)] = self.file_ids
        return table[classes]

    def paint(self, classes: np.ndarray) -> np.ndarray:
        """(H, W) uint8 classes -> (H, W, 3) uint8 colours; `IGNORE` is light grey."""
        table = np.full((256, 3), 238, np.uint8)
        table[: len(self)] = self.colours
        return table[classes]
