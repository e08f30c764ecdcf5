"""Drawings that an experiment makes of a data set's masks, in a folder that `DataConfig.positives` reads."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import scipy
from PIL import Image

from ..data import Source
from ..simulate import generator_for

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def redrawn(source: Source, folder: Path, draw: Draw, *, known_by: object, seed: int = 0) -> Path:
    """``draw(mask, generator)`` for every image of the training split, in a folder below ``folder`` that is named after
    ``known_by``: whatever changes the drawings, by its repr."""

    def make(train: Path) -> None:
        for index in range(len(source)):
            record = source.load(index)
            if record.mask is None:
                raise ValueError(f"{record.name}: expected a dense mask to draw from, got none")
            write_map(train, source, record.name, draw(record.mask, generator_for(seed, record.name)))

    return made_once(folder / sha256(repr((known_by, seed)).encode()).hexdigest()[:8], make)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, for `DataConfig.positives`, with what ``make`` writes into its ``train``; all of it, or it is made anew."""
    done = folder / "done"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        make(folder / "train")
        done.touch()
    return folder


def write_map(folder: Path, source: Source, name: str, labels: np.ndarray) -> None:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(source.classes.encode(labels)).save(path)


def widened(mask: np.ndarray, label: int, radius: float) -> np.ndarray:
    """Where a round pen of this radius draws when it follows the outlines of a class."""
    region = mask == label
    return np.asarray(scipy.ndimage.distance_transform_edt(~region) <= radius) if region.any() else region
