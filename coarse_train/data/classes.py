"""The classes of a data set: their names, colours, and the values that stand for them in its label files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import IGNORE
from ..storage import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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


def read_classes_of(dataset: str) -> Classes:
    """Of a data set that has its table here, in the format of a user's own: tables/DATASET.toml."""
    return read_classes(Path(__file__).parent / "tables" / f"{dataset}.toml")


def read_classes(path: Path) -> Classes:
    """The class table in a ``classes.toml``. Raises ValueError naming the file and the key."""
    try:
        content = tomllib.loads(read_text(path))
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
