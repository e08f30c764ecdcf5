"""`coarse-train simulate`: coarse drawings of a whole data set, into a folder, with a record of their noise.

    OUT/positives/SPLIT/NAME.png
    OUT/negatives/SPLIT/NAME.png    further layers NAME.1.png, NAME.2.png, ...
    OUT/noise.json

The folders are what `DataConfig` takes as positives and negatives; label values are those of the data set's own files.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..config import DataConfig
from ..data import IGNORE, Source, open_split
from ..data.classes import KINDS
from ..run import look_at_folder
from ..simulate import Process, draw_coarse, generator_for, level, pair_counts, shares
from .options import NamedData, check_reading

_PARTS = ("positives", "negatives", "noise.json")  # what a folder of drawings consists of; noise.json comes last


@dataclass(frozen=True)
class SimulateConfig(NamedData):
    """Draw coarse positive and negative labels for the images of a data set, from its dense masks."""

    splits: tuple[str, ...] = ("train", "val")
    """Some of train, val and test."""
    limit: int | None = None
    """At most so many images of each split (the first)."""
    level: Literal["scribble", "spots", "sketch", "coarse", "full"] = "coarse"
    """How much is drawn, and how: about 0.01, 0.05, 0.25, 0.6 or all of the area."""
    ratio: float | None = None
    """Instead of a level: labelled part of the area, 0.01 to 1, drawn in the way of the nearest level."""
    confusion: float | Path = 0.0
    """Chance that a positive drawing carries another class, any of them, or a (C, C) .npy file [drawn, true]."""
    transition: Path | None = None
    """A (C, C) .npy file [true, named] with zero diagonal: what negative drawings name. Without it any other class."""
    error: float = 0.0
    """Chance that a negative drawing names the class that is there."""
    negatives: int = 2
    """Layers of negative drawings."""
    seed: int = 0
    """Equal seeds give equal files; the drawings of one image depend on no other."""
    out: Path = Path("drawings")
    """Folder to write: positives/, negatives/ and noise.json."""
    overwrite: bool = False
    """Replace the drawings in `out`."""
    workers: int = 0
    """Processes that draw; 0: this one does."""


class _Drawn(NamedTuple):
    """What is counted of one image. confusion, naming: `pair_counts`. area: labelled pixels of the positive drawing and of each
    negative layer, then those whose class is known."""

    confusion: np.ndarray
    naming: np.ndarray
    area: np.ndarray


def run_simulate(config: SimulateConfig) -> Path:
    """Write the folder ``config.out``, all of it or nothing. Raises ValueError where it exists and is not to be replaced,
    where an image has no mask, and for bad settings."""
    _check_out(config)
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit: expected a number >= 1, got {config.limit}")
    if not config.splits or len(set(config.splits)) != len(config.splits):
        raise ValueError(f"splits: expected each split once, got {config.splits}")
    data = DataConfig(dataset=config.dataset, root=config.root, variant=config.variant, max_pixels=config.max_pixels)
    sources = {split: open_split(data, split) for split in config.splits}
    classes = sources[config.splits[0]].classes
    process = _process(config, len(classes))
    with _replacing(config.out) as folder:
        drawn = {split: _draw_split(config, split, source, process, folder) for split, source in sources.items()}
        record = _record(config, classes.names, process, drawn)
        lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
        (folder / "noise.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    return config.out


def _process(config: SimulateConfig, num_classes: int) -> Process:
    confusion = config.confusion
    return level(
        config.level if config.ratio is None else config.ratio,
        num_classes,
        confusion=_matrix("confusion", confusion) if isinstance(confusion, Path) else confusion,
        transition=None if config.transition is None else _matrix("transition", config.transition),
        error=config.error,
        layers=config.negatives,
    )


def _matrix(name: str, path: Path) -> np.ndarray:
    try:
        matrix = np.load(path, allow_pickle=False)
        return np.asarray(matrix, np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{name}: expected a number or a .npy file with a matrix, got {path} ({error})") from error


def _draw_split(config: SimulateConfig, split: str, source: Source, process: Process, folder: Path) -> list[_Drawn]:
    count = len(source) if config.limit is None else min(config.limit, len(source))
    names = {source.name(index) for index in range(count)}
    for index in range(count):
        name = source.name(index)
        if "mask" not in source.kinds(index):
            raise ValueError(f"{name}: expected a dense mask to draw from, got none in split {split!r}")
        for taken in names & {f"{name}.{k}" for k in range(1, process.layers)}:
            raise ValueError(
                f"{taken}: expected a name that is not that of a layer of {name}, which {taken}.png will be"
            )
    work = partial(_draw_one, source, process, config.seed, folder, split)
    return list(tqdm(_mapped(work, count, config.workers), split, count, leave=False, disable=None))


def _mapped(work: partial[_Drawn], count: int, workers: int) -> Iterable[_Drawn]:
    if workers == 0:
        return map(work, range(count))
    return _in_processes(work, count, workers)


def _in_processes(work: partial[_Drawn], count: int, workers: int) -> Iterator[_Drawn]:
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(work, range(count), chunksize=8)


def _draw_one(source: Source, process: Process, seed: int, folder: Path, split: str, index: int) -> _Drawn:
    record = source.load(index)
    if record.mask is None:
        raise ValueError(f"{record.name}: expected a dense mask to draw from, got none in split {split!r}")
    mask = record.mask
    positive, negative = draw_coarse(mask, process, generator_for(seed, record.name))
    files = {Path("positives", split, f"{record.name}.png"): positive}
    for k, layer in enumerate(negative):
        files[Path("negatives", split, f"{record.name}{f'.{k}' if k else ''}.png")] = layer
    for path, labels in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        encoded = source.classes.encode(labels, KINDS[path.parts[0]])
        Image.fromarray(encoded).save(folder / path, format="PNG")
    labelled = [np.count_nonzero(drawing != IGNORE) for drawing in (positive, *negative)]
    return _Drawn(
        pair_counts(positive, mask, process.num_classes),
        pair_counts(negative, np.broadcast_to(mask, negative.shape), process.num_classes),
        np.array([*labelled, np.count_nonzero(mask != IGNORE)]),
    )


def _record(
    config: SimulateConfig, names: tuple[str, ...], process: Process, drawn: dict[str, list[_Drawn]]
) -> dict[str, Any]:
    """What is in noise.json. Matrices: confusion [drawn, true], transition [true, named]; nominal and counted."""
    splits = {}
    for split, images in drawn.items():
        area = sum((image.area for image in images), np.zeros(process.layers + 2))
        ratios = [round(float(labelled / max(area[-1], 1)), 6) for labelled in area[:-1]]
        splits[split] = {"images": len(images), "area_positive": ratios[0], "area_negative": ratios[1:]}
    everything = [image for images in drawn.values() for image in images]
    zero = np.zeros((process.num_classes, process.num_classes), np.int64)
    confusion = shares(sum((image.confusion for image in everything), zero))
    transition = shares(sum((image.naming for image in everything), zero)).T
    return {
        "dataset": config.dataset,
        "variant": config.variant,
        "seed": config.seed,
        "classes": list(names),
        "process": asdict(process),
        "splits": splits,
        "confusion": _both(np.array(process.confusion), confusion),
        "transition": _both(process.naming, transition),
    }


def _both(nominal: np.ndarray, counted: np.ndarray) -> dict[str, Any]:
    return {"nominal": nominal.round(6).tolist(), "counted": counted.round(6).tolist()}


def _check_out(config: SimulateConfig) -> None:
    out = config.out
    check_reading(config.workers, config.max_pixels)
    look_at_folder("out", out, overwrite=config.overwrite)
    content = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in content if name not in _PARTS]
    if foreign:
        raise ValueError(
            f"out: expected a folder of drawings ({', '.join(_PARTS)}) to overwrite, got {out} with {foreign[0]}"
        )
    if content and "noise.json" not in content:  # drawings by hand, perhaps: deleted is only what this command has made
        raise ValueError(f"out: expected a folder with noise.json to overwrite, got {out} without")


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place at the end; on an error it goes, and ``out`` stays as it was."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as temporary:
        yield Path(temporary)
        out.mkdir(exist_ok=True)
        for part in reversed(_PARTS):  # a folder without noise.json is seen to be incomplete
            path = out / part
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for part in _PARTS:
            if (Path(temporary) / part).exists():  # there is no folder negative without layers
                os.replace(Path(temporary) / part, out / part)
