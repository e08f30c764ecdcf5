"""`coarse-train check`, which is also what `fit` does first: every file of a data set read once, and what they say together.

OUT/check.txt              images and pixels of each kind and class, what can hardly be meant, and outlines that are off
OUT/check_SPLIT.png        images with their drawings on top, to be looked at

A file that has not changed since is not read again: what was found is remembered in the user's cache folder. Not so outlines,
for which the first eight training images with a drawing and a mask are read each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ..advice import describe_outlines
from ..checking import check_taught, write_findings
from ..data import FolderNotFound, open_split
from ..data.findings import Part, check_files
from ..data.inspect import inspect
from ..data.walk import listed
from ..run import look_at_folder, make_folder
from .options import DrawnData


@dataclass(frozen=True)
class CheckConfig(DrawnData):
    """Read every file of a data set once, and say what is in them and what is wrong."""

    negatives: Path | None = None
    """Folder of negative drawings, the same."""
    splits: tuple[str, ...] = ("train", "val", "test")
    """Some of train, val and test; those but train that the data set has not got are passed over."""
    out: Path = Path("runs/check")
    """Folder to write: check.txt and check_SPLIT.png."""
    overwrite: bool = False
    """Write into a folder with other files, too; they stay. Those of an earlier check are replaced in any case."""


def _own(folder: Path) -> bool:
    """Whether there is nothing but what a check has written."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return "check.txt" in names and all(name == "check.txt" or fnmatchcase(name, "check_*.png") for name in names)


def run_check(config: CheckConfig) -> list[Part]:
    """Print, write. Raises ValueError where a file is bad, palettes contradict each other, or nothing teaches a class."""
    look_at_folder("out", config.out, overwrite=config.overwrite or _own(config.out))
    data = config.data_config(negatives=config.negatives)
    if not config.splits:
        raise ValueError("splits: expected some of train, val and test, got none")
    parts = []
    for split in dict.fromkeys(config.splits):
        try:
            source = open_split(data, split)
        except FolderNotFound:
            if split == "train" or len(config.splits) == 1:
                raise
            continue
        parts.append(Part(split, source, inspect(source, made=True)))
    if not parts:
        raise FolderNotFound(
            f"splits: expected a folder for one of {listed(config.splits)}, found none in {config.root}"
        )
    train = next((part for part in parts if part.split == "train"), None)
    note = describe_outlines(train.source, data) if train is not None and not train.bad() else None
    make_folder("out", config.out)
    lines = write_findings(config.out, parts, own=config.dataset == "folder", more=[note] if note else [])
    print((config.out / "check.txt").read_text(encoding="utf-8") + lines[-1])
    check_files(parts)
    if config.dataset == "folder" and train is not None and not train.pixels("negative").any():
        check_taught({"positive": train, "mask": train}, "a class that nobody drew cannot be learned")
    return parts
