"""What the files of a data set say together: a table of what is drawn, and what can hardly be meant."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from . import Source
from .classes import IGNORE, KINDS
from .inspect import Facts
from .walk import listed

FOLDERS = {kind: folder for folder, kind in KINDS.items()}


class Part(NamedTuple):
    """A split, and of every image what `inspect` says."""

    split: str
    source: Source
    facts: Sequence[Facts | str | None]

    def good(self, kind: str | None = None) -> list[Facts]:
        """Of the images that can be read, and have a label map of the kind."""
        facts = [fact for fact in self.facts if isinstance(fact, Facts)]
        return facts if kind is None else [fact for fact in facts if kind in fact.pixels]

    def bad(self) -> list[str]:
        """What is wrong with files, a line for each image."""
        return [fact for fact in self.facts if isinstance(fact, str)]

    def pixels(self, kind: str) -> np.ndarray:
        """(images, C) pixels of each class in the label maps of a kind."""
        counts = [fact.pixels[kind] for fact in self.good(kind)]
        return np.array(counts, np.int64).reshape(len(counts), len(self.source.classes))

    def drawn(self, kind: str) -> float:
        """Share of the area, of the images with such label maps, that has a class."""
        facts = self.good(kind)
        return sum(fact.drawn[kind] for fact in facts) / max(1, sum(fact.size[0] * fact.size[1] for fact in facts))

    def nothing(self, kind: str) -> dict[int, int]:
        """Pixels of each number that means "no class"."""
        counts: dict[int, int] = {}
        for fact in self.good(kind):
            for value, count in fact.nothing.get(kind, {}).items():
                counts[int(value)] = counts.get(int(value), 0) + count
        return counts


def table(part: Part) -> str:
    """Images and pixels of each kind and class, as text."""
    facts, names = part.good(), part.source.classes.names
    kinds = [kind for kind in FOLDERS if part.good(kind)]
    sizes = sorted({(fact.size[1], fact.size[0]) for fact in facts})
    size = " to ".join("{}x{}".format(*one) for one in dict.fromkeys((*sizes[:1], *sizes[-1:])))
    colour = sum(fact.channels == 3 for fact in facts)
    lines = [
        f"{part.split}: {len(part.facts)} images{size and f', {size} pixels'}, {colour} in colour, {len(facts) - colour} grey"
    ]
    if not kinds:
        return lines[0]
    wide = max(map(len, (*names, "share drawn")))
    lines.append(" " * wide + "".join(f"{FOLDERS[kind]:>24}" for kind in kinds))
    lines.append(f"{'class':<{wide}}" + f"{'images':>9}{'pixels':>15}" * len(kinds))
    counts = {kind: part.pixels(kind) for kind in kinds}
    for label, name in enumerate(names):
        cells = [f"{(one[:, label] > 0).sum():>9,}{one[:, label].sum():>15,}" for one in counts.values()]
        lines.append(f"{name:<{wide}}{''.join(cells)}")
    shares = [f"{len(one):>9,}{100 * part.drawn(kind):>13.1f} %" for kind, one in counts.items()]
    return "\n".join([*lines, f"{'share drawn':<{wide}}{''.join(shares)}"])


def check_files(parts: Sequence[Part]) -> None:
    """Raises ValueError naming the first file that cannot be used, and one whose palette contradicts another's."""
    bad = [line for part in parts for line in part.bad()]
    if bad:
        more = f" ({len(bad)} images are bad; `coarse-train check` lists all, --skip-bad leaves them out)"
        raise ValueError(bad[0] + (more if len(bad) > 1 else ""))
    first: dict[tuple[str, str], tuple[list[int], str]] = {}
    for part in parts:
        for index, fact in enumerate(part.facts):
            for kind, palette in fact.palettes.items() if isinstance(fact, Facts) else ():
                for value, colour in palette.items():
                    before, name = first.setdefault((kind, value), (colour, part.source.name(index)))
                    if before != colour:
                        raise ValueError(
                            f"{FOLDERS[kind]} of {part.source.name(index)}: expected the palette of {name}, in which {value} "
                            f"is {tuple(before)}, got {tuple(colour)}; with a colour for each class in classes.toml they count"
                        )


def hint(part: Part, kind: str) -> str | None:
    """Of a user's own table: what the label maps of a kind look like that may be meant in another way."""
    if not part.good(kind):
        return None
    what, nothing, classes = f"{FOLDERS[kind]} of {part.split}", part.nothing(kind), part.source.classes
    total = part.pixels(kind).sum(0)
    most = int(total.argmax())
    number = classes.encode(np.array([most], np.uint8), kind)[0] if total[most] else None
    name = classes.names[most]
    absent = [classes.names[label] for label in np.flatnonzero(total == 0)]
    if len(absent) == len(classes) - 1 and number == 0 and set(nothing) == {IGNORE}:
        return (
            f"{what} have 0 and 255 alone, which say {name} and nothing; if white is a class, give it `id = 255`, and if black "
            "is nothing, write `ignore = [0]`"
        )
    ignored = {value: count for value, count in nothing.items() if value != IGNORE}
    if absent and ignored and kind != "negative":
        value = max(ignored, key=lambda one: ignored[one])
        other = next(folder for folder in KINDS if folder != FOLDERS[kind])
        return (
            f"{what} have no pixel of {listed(absent)}, but {ignored[value]} of {value}, which is ignored; if that is a class "
            f"here, add {value} to its `id = [...]`, and ignore it elsewhere alone: `ignore = {{{other} = [{value}]}}`"
        )
    full = all(fact.drawn[kind] == fact.size[0] * fact.size[1] for fact in part.good(kind))
    if kind == "mask" or not full or len(absent) == len(classes) - 1:
        return None
    # most tools write 0 where nobody drew
    blank = classes.file_ids.index(0) if 0 in classes.file_ids and total[classes.file_ids.index(0)] else most
    return (
        f"{what} leave no pixel undrawn, and {100 * total[blank] / total.sum():.0f} % are {classes.names[blank]}; if that is "
        f"what nobody drew, write `ignore = {{{FOLDERS[kind]} = [{classes.file_ids[blank]}]}}`"
    )


def notes(part: Part, *, own: bool) -> list[str]:
    """Images that were turned, and what kinds of label maps never have; with ``own``, for the user's own table, `hint`."""
    found = []
    turned = sum("image" in fact.turned for fact in part.good())
    if turned:
        found.append(
            f"{turned} images of {part.split} have an orientation tag, which is followed, as annotation tools do; drawings "
            "that were made of the image as it is stored do not fit"
        )
    for kind in FOLDERS:
        absent = np.flatnonzero(part.pixels(kind).sum(0) == 0)
        if own and (text := hint(part, kind)):
            found.append(text)
        elif part.good(kind) and kind != "negative" and len(absent):
            names = listed(part.source.classes.names[label] for label in absent)
            found.append(f"{FOLDERS[kind]} of {part.split} have no pixel of {names}")
    return found
