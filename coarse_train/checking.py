"""What `fit` and `coarse-train check` say of a data set's files before anything is learned; all are read once (data.inspect).

Written are check.txt, a table of what is in the files with what looks wrong, and check_SPLIT.png, images with their drawings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from .config import FitConfig
from .data import FolderNotFound, Source, open_split
from .data.findings import FOLDERS, Part, check_files, hint, notes, table
from .data.inspect import Facts, cache_file, count_channels, inspect
from .data.sheet import save_sheet
from .data.walk import listed
from .distributed import World
from .storage import printable, write_text

_PADDED = 0.2  # of a crop, from which on it is worth a word


def check_run(config: FitConfig, train: Source, world: World, *, report: bool = True) -> tuple[int, list[str]]:
    """What `fit` does first: the channels of the images, and lines for the log. With ``report`` the validation split is looked
    at too, and the files above are written into the run folder.

    Raises ValueError where a file is bad, palettes contradict each other, sizes do not fit into a batch, or a class of the
    user's own table is in nothing that is learned from.
    """
    sources = {"train": train}
    if report:
        with suppress(FolderNotFound):
            sources["val"] = open_split(config.data, "val")
    found = [inspect(one, world) if config.data.check != "off" else [None] * len(one) for one in sources.values()]
    parts = [Part(split, source, facts) for (split, source), facts in zip(sources.items(), found, strict=True)]
    lines: list[str] = []
    if report and any(map(any, found)) and world.is_main:
        (config.out / "metrics.jsonl").touch()  # of no step, where what is found stops the run
        lines = write_findings(config.out, parts, own=config.data.dataset == "folder")
    check_files(parts)
    if report:
        _check_sizes(config, parts[0], world)
        _check_learned(config, parts)
        _check_possible(config, parts[0])
        lines += _padding(config, parts[0])
    return count_channels(train, found), lines


def _check_learned(config: FitConfig, parts: Sequence[Part]) -> None:
    """Of the user's own classes. Not where negative drawings tell a class by what it is not, nor where nothing is drawn."""
    data, train = config.data, parts[0]
    if data.dataset != "folder" or data.limit is not None or data.check != "error" or train.pixels("negative").any():
        return
    positive = data.supervision != "masks" and config.positive.weight > 0
    masks = data.supervision != "drawings" or data.simulate is not None
    if not masks and not train.good("positive"):
        return
    found = {kind: train for kind, learned in (("positive", positive), ("mask", masks)) if learned}
    if data.dense_split == "val":
        found["mask"] = parts[-1]
    check_taught(found, "--check note goes on without")


def _check_possible(config: FitConfig, train: Part) -> None:
    """That no drawing has a probability of 0, and an infinite loss."""
    if config.transition != "objects" or config.data.supervision == "masks" or not config.negative.weight:
        return
    if named := train.pixels("negative")[:, :1].sum():
        raise ValueError(
            f"transition: expected negative drawings that never name {train.source.classes.names[0]!r} with 'objects', "
            f"got {named} pixels that do; uniform or estimated allow it"
        )


def check_taught(found: Mapping[str, Part], otherwise: str) -> None:
    """``found``: kind of label maps -> those that are learned from."""
    source = next(iter(found.values())).source
    total = sum(part.pixels(kind).sum(0) for kind, part in found.items())
    absent = [name for name, count in zip(source.classes.names, total, strict=True) if not count]
    if absent:
        where = " or ".join(f"{FOLDERS[kind]} of {part.split}" for kind, part in found.items())
        why = "".join(f"; {text}" for kind, part in found.items() if (text := hint(part, kind)))
        raise ValueError(
            f"classes.toml: expected pixels of every class in {where}, got none of {listed(absent)}{why}; {otherwise}"
        )


def _check_sizes(config: FitConfig, part: Part, world: World) -> None:
    alone = config.batch_size <= config.accumulate * world.size
    if config.data.crop is not None or alone or config.data.dense_images:
        return
    first: dict[tuple[int, ...], str] = {}
    for index, fact in enumerate(part.facts):
        if isinstance(fact, Facts):
            first.setdefault(tuple(fact.size), part.source.name(index))
    if len(first) > 1:
        (one, name), (other, another) = list(first.items())[:2]
        raise ValueError(
            f"crop: expected images of one size in a batch, got {one[1]}x{one[0]} pixels ({name}) and {other[1]}x{other[0]} "
            f"({another}); set --crop, or without one batches of one image"
        )


def _padding(config: FitConfig, part: Part) -> list[str]:
    """Where images do not fill a crop, what they are padded with is computed and not learned from."""
    sizes, crop = [fact.size for fact in part.good()], config.data.crop
    if crop is None or not sizes:
        return []
    largest = tuple(max(size[axis] for size in sizes) for axis in (0, 1))
    filled = min(largest[0], crop[0]) * min(largest[1], crop[1]) / (crop[0] * crop[1])
    if filled > 1 - _PADDED:
        return []
    return [
        f"note: no image is larger than {largest[1]}x{largest[0]} pixels, and crops are {crop[1]}x{crop[0]}: at least "
        f"{math.floor(100 * (1 - filled))} % of each is padding, unless it is enlarged; "
        f"--crop {min(largest[0], crop[0])} {min(largest[1], crop[1])}"
    ]


def write_findings(out: Path, parts: Sequence[Part], *, own: bool, more: Sequence[str] = ()) -> list[str]:
    """check.txt and the pictures; returns the lines for a log. ``more``: what else there is to be noted."""
    lines = [f"note: {line}" for line in (*(line for part in parts for line in notes(part, own=own)), *more)]
    bad = [f"bad: {line}" for part in parts for line in part.bad()]
    write_text(out / "check.txt", printable("\n".join([*map(table, parts), *lines, *bad]) + "\n"))
    drawn = []
    for part in parts:
        unread = {index for index, fact in enumerate(part.facts) if isinstance(fact, str)}
        if save_sheet(out / (name := f"check_{part.split}.png"), part.source, unread):
            drawn.append(name)
    place = cache_file(parts[0].source)
    where = f"remembered in {place.parent}" if place.exists() else f"not remembered, since {place} cannot be written"
    return [*lines, f"every file has been read, {where}; what is in them: {', '.join(['check.txt', *drawn])} in {out}"]
