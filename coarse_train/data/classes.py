"""The classes of a data set: their names, colours, and the values that stand for them in its label files."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .. import IGNORE
from ..label_maps import check_labels
from ..storage import read_text
from .walk import listed

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


RGB = tuple[int, int, int]
_MANY = 8  # values that are in no table: resizing with smoothing makes as many
_IS_NOTHING = "what stands for no class belongs in the table's `ignore`"
_SLIP = 8  # by which a channel of a colour may be off that was meant
KINDS = {"positives": "positive", "negatives": "negative", "masks": "mask"}  # as folders and tables call them


@dataclass(frozen=True)
class Classes:
    """A class table. Inside the package class k is the index k (a "train id"); label files may have other values. Values and
    colours are from 0 to 255.

    names: of the classes, 2 to 254, each once.
    colours: (red, green, blue) of each class.
    ids: value of class k in label files; ``()`` means k itself.
    ignored: further values of label files that mean "no class"; `IGNORE` (255) does, unless it is the id of a class.
    aliases: (value, class), further values of a class.
    ignored_in: (kind, value), values that mean "no class" in label files of one kind alone, "positive", "negative" or "mask",
        even where they are ids.
    ignored_colours: likewise in coloured label files.
    by_colour: ``colours`` are those of label files, too: coloured ones can be read, and palettes count by their colours.

    Raises:
        ValueError: names, ids, values that are ignored or, with ``by_colour``, colours that contradict each other, or are not
            as many as classes; naming the field, what came and what was expected.
    """

    names: tuple[str, ...]
    colours: tuple[RGB, ...]
    ids: tuple[int, ...] = ()
    ignored: tuple[int, ...] = ()
    aliases: tuple[tuple[int, int], ...] = ()
    ignored_in: tuple[tuple[str, int], ...] = ()
    ignored_colours: tuple[RGB, ...] = ()
    by_colour: bool = False

    def __post_init__(self) -> None:
        count = len(self.names)
        if not 2 <= count < IGNORE:
            raise ValueError(f"names: expected 2 to {IGNORE - 1} classes, got {count}")
        if len(set(self.names)) != count:
            raise ValueError(f"names: expected each name once, got {self.names}")
        for field in ("colours", "ids"):
            if len(getattr(self, field)) not in ({count} if field == "colours" else {0, count}):
                raise ValueError(f"{field}: expected one for each of {count} classes, got {len(getattr(self, field))}")
        values = [*self.file_ids, *(value for value, _ in self.aliases), *self.ignored]
        if len(set(values)) != len(values) or not all(0 <= value <= 255 for value in values):
            raise ValueError(f"ids, ignored: expected different values from 0 to 255, got {values}")
        kinds = {kind for kind, _ in self.ignored_in}
        if not kinds <= set(KINDS.values()) or not all(0 <= value <= 255 for _, value in self.ignored_in):
            raise ValueError(f"ignored_in: expected {tuple(KINDS.values())}, each with 0 to 255, got {self.ignored_in}")
        shades = [*self.colours, *self.ignored_colours]
        if self.by_colour and len(set(shades)) != len(shades):
            raise ValueError(f"colours: expected different ones for classes and for what is ignored, got {shades}")

    def __len__(self) -> int:
        """C."""
        return len(self.names)

    @property
    def file_ids(self) -> tuple[int, ...]:
        """(C,) the value of each class in label files."""
        return self.ids or tuple(range(len(self.names)))

    @cached_property
    def _from_file(self) -> dict[str | None, np.ndarray]:
        """(256,) classes of the values in label files of each kind, -1 for those that are in no table."""
        common = np.full(256, -1, np.int16)
        common[[IGNORE, *self.ignored]] = IGNORE
        common[list(self.file_ids)] = np.arange(len(self))
        for value, label in self.aliases:
            common[value] = label
        tables: dict[str | None, np.ndarray] = {kind: common.copy() for kind in (None, *KINDS.values())}
        for kind, value in self.ignored_in:
            tables[kind][value] = IGNORE
        return tables

    def _table(self, kind: str | None) -> np.ndarray:
        if kind not in self._from_file:
            raise ValueError(f"kind: expected one of {tuple(KINDS.values())} or None, got {kind!r}")
        return self._from_file[kind]

    def ignored_values(self, kind: str | None = None) -> frozenset[int]:
        """The values that mean "no class" in label files of a kind, "positive", "negative" or "mask"; None: in those of
        every kind."""
        return frozenset(np.flatnonzero(self._table(kind) == IGNORE).tolist())

    def decode(self, labels: np.ndarray, path: Path | str, kind: str | None = None) -> np.ndarray:
        """(H, W) uint8 as in a label file of a kind (as in `ignored_values`) -> (H, W) uint8 classes, `IGNORE` for "no class".

        Raises ValueError naming ``path`` and the values that are in no table."""
        table = self._table(kind)
        decoded = table[labels]
        if (decoded < 0).any():
            unknown = np.unique(labels[decoded < 0]).tolist()
            many = len(unknown) > _MANY
            got = f"{unknown[:_MANY]} and {len(unknown) - _MANY} more" if many else f"{unknown}"
            why = (
                f"{_IS_NOTHING}; values in between are what resizing leaves that is not `nearest`"
                if many
                else _IS_NOTHING
            )
            raise ValueError(f"{path}: expected labels among {np.flatnonzero(table >= 0).tolist()}, got {got}; {why}")
        return decoded.astype(np.uint8)

    @cached_property
    def _of_colours(self) -> tuple[np.ndarray, np.ndarray]:
        """(n,) colours as numbers, in ascending order, and their classes."""
        numbers = _numbered(np.array([*self.colours, *self.ignored_colours]))
        labels = np.concatenate([np.arange(len(self)), np.full(len(self.ignored_colours), IGNORE)])
        order = np.argsort(numbers)
        return numbers[order], labels[order].astype(np.uint8)

    def decode_colours(self, pixels: np.ndarray, path: Path | str) -> np.ndarray:
        """(H, W, 3 or 4) uint8 as in a coloured label file -> (H, W) uint8 classes, `IGNORE` for colours that are ignored and
        for what is transparent.

        Raises ValueError naming ``path`` and the colours that are in no table, with their numbers of pixels."""
        numbers = _numbered(pixels)
        known, labels = self._of_colours
        place = np.searchsorted(known, numbers).clip(max=len(known) - 1)
        decoded, unknown = labels[place], known[place] != numbers
        if pixels.shape[-1] == 4:
            decoded[pixels[..., 3] == 0] = IGNORE
            unknown &= pixels[..., 3] > 0
        if unknown.any():
            found, counts = np.unique(numbers[unknown], return_counts=True)
            most = [f"{_colour(found[k])} at {counts[k]} pixels" for k in np.argsort(-counts, kind="stable")]
            raise ValueError(f"{path}: expected the colours of the class table, got {listed(most)}; {_IS_NOTHING}")
        return decoded

    def counts_by_colour(self, palette: np.ndarray, used: np.ndarray, path: Path | str, kind: str | None) -> bool:
        """Whether the (n, 3) uint8 ``palette`` of a label map with the numbers ``used`` says what these are: all its colours
        are in the table. Otherwise the numbers do.

        Raises ValueError naming ``path`` where two colours of the table say other classes than their numbers and others are not
        in it, or one does and another is hardly off: a slip in the palette would be other classes."""
        colours = _numbered(palette[used])
        known = np.isin(colours, self._of_colours[0])
        if known.all():
            return True
        numbers = self._table(kind)[used]
        labels = self._of_colours[1][
            np.searchsorted(self._of_colours[0], colours).clip(max=len(self._of_colours[0]) - 1)
        ]
        differ = np.flatnonzero(
            known & (numbers != IGNORE) & (numbers != labels)
        )  # a number that is ignored proves nothing
        table = np.array([*self.colours, *self.ignored_colours], int)
        off = np.abs(palette[used][~known].astype(int)[:, None] - table).max(2).min(1)
        if len(differ) > 1 or (len(differ) and (off <= _SLIP).any()):
            unknown = [
                f"{_colour(number)} of {value}" for number, value in zip(colours[~known], used[~known], strict=True)
            ]
            raise ValueError(
                f"{path}: expected a palette with the colours of the class table, got {listed(unknown)} that are not in it, "
                f"and {_colour(colours[differ[0]])} of {used[differ[0]]}, which is another class's; where numbers "
                "are meant, save it without a palette"
            )
        return False

    def encode(self, classes: np.ndarray, kind: str | None = None) -> np.ndarray:
        """(H, W) uint8 classes -> the values of the data set's label files, of one kind where those differ; for `IGNORE` itself
        or, where that is the id of a class, a value that is ignored. Raises ValueError where there is none for what occurs."""
        decoded = self._table(kind)
        check_labels("classes", classes, len(self))
        table = np.full(256, -1, np.int16)
        for value in (*(value for value, _ in reversed(self.aliases)), *self.file_ids):
            if decoded[value] != IGNORE:
                table[decoded[value]] = value
        nothing = np.flatnonzero(decoded == IGNORE)
        if len(nothing):
            table[IGNORE] = IGNORE if IGNORE in nothing else nothing[0]
        values = table[classes]
        if (values < 0).any():
            what = [self.names[k] if k < len(self) else "no class" for k in np.unique(classes[values < 0])]
            raise ValueError(f"ids, ignored: expected a value of label files that says {', '.join(what)}, got none")
        return values.astype(np.uint8)

    def paint(self, classes: np.ndarray) -> np.ndarray:
        """(H, W) uint8 classes -> (H, W, 3) uint8 colours; `IGNORE`, and what else is no class, is light grey (238)."""
        table = np.full((256, 3), 238, np.uint8)
        table[: len(self)] = self.colours
        return table[classes]


def read_classes_of(dataset: str) -> Classes:
    """Of a data set that has its table here, in the format of a user's own: tables/DATASET.toml."""
    return read_classes(Path(__file__).parent / "tables" / f"{dataset}.toml")


def read_classes(path: Path) -> Classes:
    """The class table in a ``classes.toml``, whose keys `coarse_train.data.folder` explains.

    Raises:
        ValueError: naming the file and the key.
        FileNotFoundError: there is no such file.
    """
    try:
        content = tomllib.loads(read_text(path))
        _known_keys(content, {"class", "ignore"}, "")
        entries = content.get("class")
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"class: expected tables [[class]], got {entries!r}")
        colours = palette(len(entries))
        rows = [_row(entry, index, colours[index]) for index, entry in enumerate(entries)]
        names, ids, shades = zip(*rows, strict=True) if rows else ((), (), ())
        given = content.get("ignore", [])
        ignored, ignored_colours = _ignored("ignore", [] if isinstance(given, dict) else given)
        ignored_in: list[tuple[str, int]] = []
        if isinstance(given, dict):
            _known_keys(given, set(KINDS), "ignore.")
            for folder, values in given.items():
                numbers, more = _ignored(f"ignore.{folder}", values)
                ignored_in += [(KINDS[folder], value) for value in numbers]
                ignored_colours += [colour for colour in more if colour not in ignored_colours]
        every = [*shades, *ignored_colours]
        return Classes(
            names,
            shades,
            tuple(values[0] for values in ids),
            tuple(ignored),
            tuple((value, label) for label, values in enumerate(ids) for value in values[1:]),
            tuple(ignored_in),
            tuple(ignored_colours),
            by_colour=all("colour" in entry for entry in entries) and len(set(every)) == len(every),
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected the class table of your images, got no file") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _ignored(key: str, values: Any) -> tuple[list[int], list[RGB]]:
    """Numbers and colours in a list of ``ignore``."""
    if not isinstance(values, list) or not all(_is_byte(value, 255) or _is_colour(value) for value in values):
        raise ValueError(f"{key}: expected a list of integers from 0 to 255 and of colours [r, g, b], got {values!r}")
    numbers = [value for value in values if isinstance(value, int)]
    return numbers, [(value[0], value[1], value[2]) for value in values if isinstance(value, list)]


def _row(entry: dict[str, Any], index: int, colour: RGB) -> tuple[str, list[int], RGB]:
    key = f"class {index}"
    _known_keys(entry, {"name", "id", "colour"}, f"{key}.")
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key}.name: expected a text, got {name!r}")
    number = entry.get("id", index)
    numbers = number if isinstance(number, list) and number else [number]
    if not all(_is_byte(value, 255) for value in numbers):
        raise ValueError(f"{key}.id: expected an integer from 0 to 255, or a list of them, got {number!r}")
    given = entry.get("colour", list(colour))
    if not _is_colour(given):
        raise ValueError(f"{key}.colour: expected three integers from 0 to 255, got {given!r}")
    return name, numbers, (given[0], given[1], given[2])


def _known_keys(table: dict[str, Any], known: set[str], prefix: str) -> None:
    unknown = sorted(table.keys() - known)
    if unknown:
        where = "; it belongs above the first [[class]]" if prefix and unknown[0] == "ignore" else ""
        raise ValueError(
            f"{prefix}{unknown[0]}: expected one of the keys {', '.join(sorted(known))}, got this one{where}"
        )


def _is_byte(value: Any, largest: int) -> bool:
    return type(value) is int and 0 <= value <= largest


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_byte(part, 255) for part in value)


def _numbered(colours: np.ndarray) -> np.ndarray:
    """(..., 3 or 4) -> (...) int32, a number for each colour."""
    red, green, blue = (colours[..., channel].astype(np.int32) for channel in range(3))
    return (red << 16) | (green << 8) | blue


def _colour(number: int) -> str:
    return f"({number >> 16}, {number >> 8 & 255}, {number & 255})"


def palette(count: int) -> tuple[RGB, ...]:
    """Colours that people with any colour vision can tell apart, Okabe and Ito's eight. Of more classes the next have these
    lighter and darker, since over the grey of an image brightness alone says nothing; then come steps of cividis."""
    colours: tuple[RGB, ...] = OKABE_ITO[1:] + OKABE_ITO[:1]  # black last: on an overlay it looks like nothing
    if count <= len(colours):
        return colours[:count]
    lighter, darker = (tuple(_halfway(colour, to) for colour in OKABE_ITO[1:]) for to in (255, 0))
    colours = OKABE_ITO[1:] + lighter + darker + OKABE_ITO[:1]
    if count <= len(colours):
        return colours[:count]
    from matplotlib import colormaps  # in here: its import takes longer than opening a data set

    more = colormaps["cividis"]([index / (count - len(colours)) for index in range(count - len(colours))])
    return colours + tuple((int(r), int(g), int(b)) for r, g, b in (more[:, :3] * 255).round())


def _halfway(colour: RGB, to: int) -> RGB:
    red, green, blue = ((value + to) // 2 for value in colour)
    return red, green, blue
