"""What the readers of all tools share: `Export`, `Picture`, `Shape`, and a `Source` that finds files and images.

Orientation tags. labelme (since 2019), CVAT (since 2022), Label Studio and labelImg (since 2020) show an image as its EXIF
tag says, and record points and size of what they show. So that is what an image is here ("shown"); ``stored`` is for tools
that do not follow the tag. Sources: labelme, pull request 305; CVAT, pull request 4529; label-studio, issue 6608; labelImg,
pull request 650.
"""

from __future__ import annotations

import base64
import io
import json
import os
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple
from unicodedata import normalize
from xml.etree import ElementTree

from PIL import ExifTags, Image, ImageOps

from ..data.images import Refused, open_image
from ..data.walk import IMAGE_SUFFIXES, find_files
from ..storage import LFS_POINTER, is_lfs_pointer
from .geometry import Geometry, Size

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
_YES = {"true", "yes", "1"}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


class Shape(NamedTuple):
    """One drawing: "here is ``label``", or with ``negative`` "here is no ``label``". Its parts may overlap."""

    label: str
    parts: tuple[Geometry, ...]
    negative: bool = False


@dataclass(frozen=True)
class Picture:
    """An image with its drawings, the later ones on top.

    name: relative path without suffix, in the new folder; never one that leaves it.
    image: its file, or the .json of labelme that holds it.
    file: what says so, for messages.
    split: where the export says that it belongs, "train", "val" or "test", if it does.
    """

    name: str
    image: Path
    size: Size
    shapes: tuple[Shape, ...]
    file: str
    split: str = ""


class Entry(NamedTuple):
    """An image of an export, not read yet. Reading may raise anything that a damaged file leads to."""

    file: str
    read: Callable[[], Picture]


@dataclass(frozen=True)
class Export:
    """labels: in the order of the export's own table, if it has one, as they are written there; colours: of some of them."""

    entries: Sequence[Entry]
    labels: tuple[str, ...] = ()
    colours: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """An export on disk, and what the user says about it; the fields are explained by `ImportConfig`."""

    path: Path
    images: Path | None = None
    negative_prefixes: tuple[str, ...] = ("not ", "not_", "not-")
    negative_flag: str = "negative"
    line_width: float = 5
    stored: bool = False

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def files(self, suffix: str, what: str) -> dict[str, Path]:
        """The files of that suffix, or the one that ``path`` is, by their relative paths without it; at least one."""
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path}: expected {what}, got no such file or folder")
        if self.path.is_file():
            if self.path.suffix.lower() in _ARCHIVES or zipfile.is_zipfile(self.path):
                raise ValueError(f"{self.path}: expected {what}, got an archive; unpack it first and name the folder")
            if self.path.suffix.lower() != suffix:
                raise ValueError(f"{self.path}: expected {what}, got a file of another kind")
            return {self.path.stem: self.path}
        found = find_files(self.path, suffix)
        if not found:
            archives = [path.name for path in self.path.iterdir() if path.suffix.lower() in _ARCHIVES]
            more = f"; unpack {archives[0]} first" if archives else ""
            raise ValueError(f"{self.path}: expected {what}, got no {suffix} file in it{more}")
        return found

    def find_image(self, recorded: str, *folders: Path, any_suffix: bool = False) -> Path:
        """The image that an export calls ``recorded``: in ``images``, ``folders`` or the export, with its path or without, its
        accents in one character with their letters or, as macOS leaves them, in two.

        Never a file outside of the export and ``images``. any_suffix: ``recorded`` has none.
        """
        wanted = PureWindowsPath(recorded).as_posix()
        given = [] if self.images is None else [self.images]
        allowed = [os.path.abspath(folder) for folder in (*given, self.folder)]
        suffixes = [*IMAGE_SUFFIXES, *(suffix.upper() for suffix in IMAGE_SUFFIXES)] if any_suffix else [""]
        ways = [normalize(form, wanted) for form in ("NFC", "NFD")]
        tails = dict.fromkeys(tail for way in (wanted, *ways) for tail in (way, PurePosixPath(way).name))
        for folder in (*given, *folders, self.folder, self.folder / "images"):
            for tail in tails:
                for suffix in suffixes:
                    path = Path(os.path.abspath(folder / f"{tail}{suffix}"))
                    if any(path.is_relative_to(base) for base in allowed) and os.path.isfile(path):
                        return path
        places = " or ".join(str(folder) for folder in (*given, self.folder))
        raise FileNotFoundError(f"expected the image {recorded[:200]!r} in {places}, got none; say --images FOLDER")

    def size(self, image: Path, recorded: tuple[Any, Any] | None) -> Size:
        """Height and width of an image as it is shown. recorded: what the export says that they are."""
        size = look_at(image, stored=self.stored)[0]
        if recorded is not None and recorded != size:
            if recorded == look_at(image, stored=not self.stored)[0]:
                other = "shown" if self.stored else "stored"
                hint = f"its orientation tag turns it: was it drawn on without? Then --orientation {other}"
            else:
                hint = "is it the image that was drawn on?"
            got = f"{recorded[1]}x{recorded[0]}"
            raise ValueError(f"expected {size[1]}x{size[0]} pixels as {image} has, got {got}; {hint}")
        return size

    def shape(self, label: Any, parts: Sequence[Geometry], flags: Mapping[str, Any] | None = None) -> Shape:
        """flags: what the tool lets one say about a drawing, such as {"negative": True}."""
        name, negative = self.base_label(label)
        said = {str(key).strip().lower(): str(value).strip().lower() for key, value in (flags or {}).items()}
        return Shape(name, tuple(parts), negative or said.get(self.negative_flag.lower()) in _YES)

    def base_label(self, label: Any) -> tuple[str, bool]:
        """ "not car" -> "car", True."""
        name = label.strip() if isinstance(label, str) else ""
        if not name:
            raise ValueError(f"expected a label for every shape, got {label!r}; name it in the tool")
        for prefix in self.negative_prefixes:
            if name.lower().startswith(prefix.lower()) and name[len(prefix) :].strip():
                return name[len(prefix) :].strip(), True
        return name, False


def split_called(name: str) -> str:
    """ "Validation", "train2017" -> "val", "train"; "" for any other name."""
    return _SPLITS.get(re.sub(r"\d*$", "", name.strip().lower()), "")


def safe_name(recorded: str) -> str:
    """ "images/day 1/a.jpg" -> "day 1/a". No part of it leads upwards, is hidden, or names a drive."""
    path = PurePosixPath(PureWindowsPath(recorded).as_posix())
    parts = [path.name] if path.is_absolute() or ":" in recorded else list(path.parts)
    if len(parts) > 1 and parts[0] in ("images", "JPEGImages"):
        parts = parts[1:]
    parts[-1] = PurePosixPath(parts[-1]).stem
    return "/".join(part.replace(":", "_").lstrip(".") or "_" for part in parts)


def read_json(path: Path) -> Any:
    """Raises ValueError naming the file, also for one nested so deeply that the parser gives up."""
    try:
        return json.loads(path.read_bytes())  # UTF-8, UTF-16 or UTF-32
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, got {_what_else(path, error)}") from error


def read_xml(path: Path) -> ElementTree.Element:
    """Raises ValueError naming the file. expat (since 2.4.1) refuses entities that grow without end, and reads no others."""
    try:
        return ElementTree.parse(path).getroot()
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: expected XML, got {_what_else(path, error)}") from error


def _what_else(path: Path, error: Exception) -> str:
    return LFS_POINTER if is_lfs_pointer(path) else f"a file that is damaged or something else ({error})"


def image_file(path: Path) -> Path | io.BytesIO:
    """What Pillow can open: the file, or what a .json of labelme holds."""
    if path.suffix.lower() != ".json":
        return path
    return io.BytesIO(base64.b64decode(read_json(path)["imageData"]))


def look_at(path: Path, *, stored: bool) -> tuple[Size, str, bool]:
    """Size, format, and whether there is an orientation tag that turns it. Raises ValueError naming the file."""
    try:
        with open_image(image_file(path), path) as image:
            turned = 1 < image.getexif().get(ExifTags.Base.Orientation, 1) <= 8
            width, height = upright(image, stored=stored).size if turned else image.size
            return (height, width), image.format or "", turned
    except Refused:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and more on damaged data
        got = LFS_POINTER if is_lfs_pointer(path) else f"one that cannot be read ({error})"
        raise ValueError(f"{path}: expected an image, got {got}") from error


def upright(image: Image.Image, *, stored: bool) -> Image.Image:
    """The image as its orientation tag says, or as it is stored; without metadata."""
    if stored and image.format == "TIFF":  # Pillow turns TIFF, and only TIFF, whenever it reads it
        raise ValueError("the tag of a TIFF cannot be left out of account; save the image upright")
    image.load()
    result = image.copy() if stored else ImageOps.exif_transpose(image)
    result.info.clear()
    return result
