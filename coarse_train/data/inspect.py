"""Every file of a source read once: what is wrong with it, and what is in it.

What was found is remembered by path, size and time of change, in memory and in a file of the user's cache folder, so that files
that have not changed are not read again. A cache that cannot be written is no error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..distributed import World
from . import Record, Source, Subset
from .classes import IGNORE, Classes
from .images import Picture

_FORMAT = 2  # of what is remembered
_ALONE: dict[str, dict[str, Any]] = {}  # what this process knows: way of reading -> files -> state and facts


@dataclass(frozen=True)
class Facts:
    """What is in the files of one image.

    size: height and width. channels: 1 or 3. turned: of "image" and the kinds of label maps, those with an orientation tag.
    pixels: kind -> pixels of each class, over all layers. drawn: kind -> pixels with a class in any layer.
    nothing: kind -> a number that means "no class" -> its pixels. palettes: kind -> a number -> its colour, where a palette has
    one and numbers count. Both of label files without a reader of their own.
    """

    size: list[int]
    channels: int
    turned: list[str] = field(default_factory=list)
    pixels: dict[str, list[int]] = field(default_factory=dict)
    drawn: dict[str, int] = field(default_factory=dict)
    nothing: dict[str, dict[str, int]] = field(default_factory=dict)
    palettes: dict[str, dict[str, list[int]]] = field(default_factory=dict)


def inspect(source: Source, world: World | None = None, *, made: bool = False) -> list[Facts | str | None]:
    """Of every image its facts, or in words what is wrong with its files; None for one that is made and not read from files,
    unless ``made`` asks for these, too. Processes of ``world`` share the reading, and all get the same."""
    files = [source.files(index) for index in range(len(source))]
    keys = ["\n".join(os.path.abspath(path) for path in paths) for paths in files]
    states = [_state(paths) for paths in files]
    path, way = cache_file(source), _way_of_reading(source)
    known = _ALONE.setdefault(way, {})
    wanted = [index for index, paths in enumerate(files) if paths or made]

    def fresh(index: int) -> bool:
        return bool(keys[index]) and known.get(keys[index], {}).get("state") == states[index]

    if not all(map(fresh, wanted)):
        known.update(_read(path))
    remembered = {index: Facts(**known[keys[index]]["facts"]) for index in wanted if fresh(index)}
    found: dict[int, Facts | str | None] = {}
    for one in world.gather(remembered) if world else [remembered]:  # machines may have caches of their own
        found |= one
    left = [index for index in wanted if index not in found]
    parts = world.gather(_look_at(source, left[world.rank :: world.size])) if world else [_look_at(source, left)]
    for part in parts:
        found |= part
    for index in wanted:
        fact = found[index]
        if keys[index] and isinstance(fact, Facts):
            known[keys[index]] = {"state": states[index], "facts": asdict(fact)}
    if left and (world is None or world.is_main):
        _write(path, {key: known[key] for key in keys if key in known})
    return [found.get(index) for index in range(len(source))]


def count_channels(train: Source, facts: Sequence[Sequence[Facts | str | None]]) -> int:
    """1, or 3 where an image has colours; grey ones are repeated. Without facts of any split the first images are read."""
    channels = [fact.channels for found in facts for fact in found if isinstance(fact, Facts)]
    return max(channels or (train.load(index).image.shape[2] for index in range(min(len(train), 8))))


def cache_file(source: Source) -> Path:
    """Where it is remembered what is in the files of a source: below $XDG_CACHE_HOME, without it ~/.cache."""
    folders = sorted({os.path.abspath(path.parent) for index in range(len(source)) for path in source.files(index)})
    name = hashlib.sha256("\n".join([_way_of_reading(source), *folders]).encode(errors="surrogateescape")).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base, "coarse_train", f"{name[:16]}.json")


def _way_of_reading(source: Source) -> str:
    """What decides, beside its bytes, what a file says."""
    while isinstance(source, Subset):
        source = source.source
    readers = {kind: f"{one.__module__}.{one.__qualname__}" for kind, one in getattr(source, "readers", {}).items()}
    limit = getattr(source, "max_pixels", None)
    return json.dumps([_FORMAT, type(source).__name__, asdict(source.classes), sorted(readers.items()), limit])


def _state(paths: Sequence[Path]) -> list[list[int]]:
    try:
        return [[stat.st_size, stat.st_mtime_ns] for stat in map(os.stat, paths)]
    except OSError:
        return []  # is found when it is read


def _look_at(source: Source, indices: Sequence[int]) -> dict[int, Facts | str]:
    def look(index: int) -> Facts | str:
        base: Any = source
        place = index
        while isinstance(base, Subset):
            base, place = base.source, base.indices[place]
        try:
            record, seen = base.examine(place) if hasattr(base, "examine") else (base.load(place), [])
        except (ValueError, OSError) as error:
            return str(error)
        return _facts(record, seen, base.kinds(place), base.classes)

    if len(indices) < 2:
        return {index: look(index) for index in indices}
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = tqdm(pool.map(look, indices), "reading every file once", len(indices), leave=False, disable=None)
        return dict(zip(indices, found, strict=True))


def _facts(record: Record, seen: Sequence[tuple[str, Picture]], kinds: frozenset[str], classes: Classes) -> Facts:
    height, width, channels = record.image.shape
    facts = Facts([height, width], channels, sorted({kind for kind, picture in seen if picture.turned}))
    for kind in sorted(kinds):
        labels = getattr(record, kind)
        facts.pixels[kind] = _histogram(labels)[: len(classes)].tolist()
        facts.drawn[kind] = int((labels != IGNORE).reshape(-1, height, width).any(0).sum())
    for kind, picture in seen:
        if kind == "image" or picture.pixels.ndim > 2:
            continue
        opaque = picture.pixels if picture.transparent is None else picture.pixels[~picture.transparent]
        values = _histogram(opaque) if opaque.size else np.zeros(256, int)
        nothing = facts.nothing.setdefault(kind, {})
        for value in sorted(classes.ignored_values(kind) & {*np.flatnonzero(values).tolist()}):
            nothing[str(value)] = nothing.get(str(value), 0) + int(values[value])
        if picture.palette is not None:
            facts.palettes.setdefault(kind, {}).update(_colours(picture.palette, np.flatnonzero(values)))
    return facts


def _histogram(values: np.ndarray) -> np.ndarray:
    """(256,) how often each number is in uint8 ``values``, in a tenth of the time of `np.bincount`, which makes int64 of it."""
    return np.array(Image.fromarray(values.reshape(-1, values.shape[-1])).histogram())


def _colours(palette: np.ndarray, used: np.ndarray) -> dict[str, list[int]]:
    """The colours of the numbers that occur, but for `IGNORE` and for a palette that paints each number in its own grey."""
    used = used[(used < len(palette)) & (used != IGNORE)]
    if (palette[used] == used[:, None]).all():
        return {}
    return {str(value): palette[value].tolist() for value in used}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(path), **content}))
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True) if path.parent.is_dir() else None
