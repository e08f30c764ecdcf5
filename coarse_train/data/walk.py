"""Which files lie in a folder of a data set: what the file system, an archive or a notebook left there never counts."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from PIL import Image

_READ = "png jpg jpeg jpe jfif jp2 tif tiff bmp gif webp ppm pgm pbm pnm"
IMAGE_SUFFIXES = tuple(f".{suffix}" for suffix in _READ.split())
_CAMERAS = (".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".rw2", ".raf")  # no reader in Pillow
_LEFTOVERS = {"__MACOSX", "@eaDir"}  # of macOS archives, of Synology's thumbnails


class FolderNotFound(FileNotFoundError):
    """A folder of a data set is not there, such as that of a split which it does not have; the message names it."""


class Fault(NamedTuple):
    """Names for which a file is missing, or that do not serve. expected: "a mask for every image"."""

    expected: str
    folder: Path
    names: list[str]
    got: str = "none for "


def without(faults: Iterable[Fault], names: Collection[str]) -> list[Fault]:
    """The faults that are left when ``names`` do not matter."""
    left = [fault._replace(names=[name for name in fault.names if name not in names]) for fault in faults]
    return [fault for fault in left if fault.names]


def find_files(folder: Path, *suffixes: str) -> dict[str, Path]:
    """The files below ``folder`` that end in one of ``suffixes`` (upper or lower case), by their relative path without
    that suffix, in the order of the paths.

    Passed over are hidden files and folders, ``__MACOSX`` and ``@eaDir``, and links to folders that are found already.

    Raises FolderNotFound where there is no such folder, ValueError where two files have one name.
    """
    return _named(_walk(folder), folder, suffixes)


def find_pictures(folder: Path, faults: list[Fault]) -> dict[str, Path]:
    """`find_files` of `IMAGE_SUFFIXES`. A picture of another suffix, unless one that is read has its name, is added to
    ``faults``."""
    paths = list(_walk(folder))
    found = _named(paths, folder, IMAGE_SUFFIXES)
    Image.init()
    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    others = known.union(_CAMERAS) - set(IMAGE_SUFFIXES)
    names = [path.relative_to(folder) for path in paths if path.suffix.lower() in others]
    unread = sorted(name.as_posix() for name in names if normalize("NFC", name.with_suffix("").as_posix()) not in found)
    if unread:
        faults.append(Fault(f"pictures of a format that is read ({', '.join(IMAGE_SUFFIXES)})", folder, unread, ""))
    return found


def find_pngs(folder: Path) -> dict[str, Path]:
    return find_files(folder, ".png")


def _named(paths: Iterable[Path], folder: Path, suffixes: Collection[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in paths:
        suffix = next((suffix for suffix in suffixes if path.name.lower().endswith(suffix.lower())), None)
        if suffix is None:
            continue
        # composed: the name that macOS takes apart is that of a file from elsewhere
        name = normalize("NFC", path.relative_to(folder).as_posix()[: -len(suffix)])
        if name in found:
            raise ValueError(f"{path}: expected one file for {name!r}, got also {found[name]}")
        found[name] = path
    return dict(sorted(found.items()))


def _walk(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise FolderNotFound(f"{folder}: expected a folder, got none")
    top = Path(os.path.realpath(folder))
    seen = {top}
    for parent, folders, files in os.walk(folder, followlinks=True):
        followed = []
        for name in sorted(folders):
            if name.startswith(".") or name in _LEFTOVERS:
                continue
            real = Path(os.path.realpath(os.path.join(parent, name)))
            twice = real in seen or (os.path.islink(os.path.join(parent, name)) and real.is_relative_to(top))
            if not twice:
                seen.add(real)
                followed.append(name)
        folders[:] = followed
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def listed(names: Iterable[str]) -> str:
    """The first five, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
