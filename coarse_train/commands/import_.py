"""`coarse-train import`: drawings of an annotation tool as a folder that `fit folder` reads.

All files are read before anything is written, and the folder appears when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tomli_w
import tyro
from tqdm import tqdm

from ..data.classes import Classes, palette, read_classes
from ..data.images import MAX_PIXELS, pixel_limit
from ..exports import read_export
from ..exports.source import Entry, Export, Picture, Source
from ..exports.writing import Drawing, Written, paths_of, write_split
from ..run import look_at_folder
from ..storage import write_text

_HEAD = "# made by coarse-train import"  # of classes.toml
_MANIFEST = ".import.json"  # the files that imports have written into a folder
_LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")  # of file managers
# What reading damaged data may raise beside ValueError and OSError, whose texts say what is wrong
_DAMAGE = (KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)


@dataclass(frozen=True)
class ImportConfig:
    """Turn the export of an annotation tool into a folder of images, positives, negatives and masks (docs/own-data.md)."""

    tool: tyro.conf.Positional[Literal["labelme", "coco", "cvat", "voc", "labelstudio"]]
    """Whose files they are. cvat: 'CVAT for images 1.1'. voc: Pascal VOC, labelImg, or CVAT's 'Segmentation mask 1.1'."""
    source: tyro.conf.Positional[Path]
    """The unpacked export: its folder, or its one file."""
    out: Path
    """Folder to write, with classes.toml; it must not exist (but see `add` and `overwrite`)."""
    images: Path | None = None
    """Folder of the images, where they are not in the export."""
    kind: Annotated[Literal["positives", "masks"], tyro.conf.arg(name="as")] = "positives"
    """What shapes are: coarse drawings that say nothing of the rest of an image, or masks. Negatives stay negatives."""
    masks: tuple[str, ...] = ()
    """Images whose shapes are masks where those of the others are positives: patterns of SPLIT/NAME, such as "val/*"."""
    background: str | None = None
    """A class, the first, for what no shape covers in masks. Without it nothing is known there."""
    classes: tuple[str, ...] = ()
    """All classes, in this order. Without it: those drawn, as the export's table (COCO, CVAT, VOC) has them, else by name."""
    ignore: tuple[str, ...] = ()
    """Labels that are no classes: where they are drawn nothing is known."""
    negative_prefix: tuple[str, ...] = ("not ", "not_", "not-")
    """A label that begins so (in upper or lower case) says what is not there: "not car"."""
    negative_flag: str = "negative"
    """So does a shape with this flag (labelme), attribute (COCO, CVAT, VOC) or choice (Label Studio)."""
    line_width: float = 5
    """Pixels; of lines and points, which have no width in the tools."""
    orientation: Literal["shown", "stored"] = "shown"
    """Whether the tool showed images as their orientation tag says, as all five do, or as they are stored."""
    split: Literal["train", "val", "test", "export"] = "train"
    """Where the images go. export: as it says, by the subsets of CVAT, the ImageSets of VOC, the names of COCO's files."""
    val_share: float = 0
    """Of the images for train, so many go into val: 0 to 0.9. Which ones depends on their names alone."""
    link: bool = False
    """Symbolic links to the images instead of copies; images with an orientation tag are saved anew all the same."""
    add: bool = False
    """Add a split to an `out` that lacks it; classes are those of its classes.toml."""
    overwrite: bool = False
    """Replace what this command has written into `out`, which it lists in .import.json; with `add` the splits that are
    imported, and no others."""
    max_pixels: int = MAX_PIXELS
    """Images and label maps of more pixels are an error: a small file may be made to fill the memory."""
    skip_bad: bool = False
    """Leave out images with something wrong, and list them."""
    keep_empty: bool = False
    """With a background: images without any shape are nothing but background. Otherwise they are left out, as not drawn yet."""


class _Loaded(NamedTuple):
    pictures: list[Picture]
    left_out: list[str]


def run_import(config: ImportConfig) -> Path:
    """Write the folder ``config.out``, all of it or nothing, and print what is in it.

    Raises ValueError or OSError naming the file or the option: for a bad setting, where anything in the export is damaged,
    missing or unknown (with ``skip_bad`` these images are left out), and where nothing is left.
    """
    _check(config)
    prefixes = config.negative_prefix
    stored = config.orientation == "stored"
    source = Source(config.source, config.images, prefixes, config.negative_flag, config.line_width, stored)
    try:
        export = read_export(config.tool, source)
    except (ValueError, OSError, *_DAMAGE) as error:
        raise ValueError(_explained(error, str(config.source), config.tool)) from error
    pictures, left_out = _load(export.entries, config)
    parts = _split(pictures, config)
    masks = _masks(parts, config)
    classes = _class_table(pictures, export, source, config)
    ignored = frozenset(config.ignore)
    drawing = Drawing(classes, "positives", config.background, ignored, config.link, stored, config.max_pixels)
    written = {split: Written() for split in parts}
    with _appearing(config, parts) as folder:
        if not config.add:
            _write_classes(classes, folder / "classes.toml")
        for split, chosen in parts.items():
            for kind, wanted in (("positives", False), ("masks", True)):
                own = [one for one in chosen if ((split, one.name) in masks) is wanted]
                written[split].add(write_split(own, replace(drawing, kind=kind), folder / split))
            if not written[split].images:
                raise ValueError(f"{config.source}: expected shapes of a class inside the images of {split}, got none")
    notes = [*export.notes, *_notes(pictures, export, source, classes), *_other_splits(pictures, config)]
    _report(config, classes, written, notes, left_out)
    return config.out


def _check(config: ImportConfig) -> None:
    if not config.add:
        look_at_folder("out", config.out, overwrite=config.overwrite)
    elif not (config.out / "classes.toml").is_file():
        raise ValueError(f"add: expected an out with classes.toml, got {config.out} without")
    if config.overwrite and config.out.is_dir() and any(config.out.iterdir()):
        _check_replaceable(config)
    if not 0 <= config.val_share <= 0.9 or (config.val_share and config.split != "train"):
        raise ValueError(f"val_share: expected 0 to 0.9, with split train, got {config.val_share} with {config.split}")
    if not 1 <= config.line_width <= 1000:
        raise ValueError(f"line_width: expected 1 to 1000 pixels, got {config.line_width}")
    if config.images is not None and not config.images.is_dir():
        raise FileNotFoundError(f"images: expected a folder, got {config.images}")
    if config.add and (
        config.classes or config.background not in (None, *read_classes(config.out / "classes.toml").names)
    ):
        raise ValueError(f"add: expected the classes of {config.out}/classes.toml, got others; leave out --classes")
    if config.masks and config.kind == "masks":
        raise ValueError(f"masks: expected none with --as masks, which all are, got {config.masks}")
    if config.keep_empty and not (config.background and (config.kind == "masks" or config.masks)):
        raise ValueError("keep_empty: expected --as masks and a background, without which such images say nothing")


def _check_replaceable(config: ImportConfig) -> None:
    """What is deleted is only what this command has made, and never what it reads."""
    table = config.out / "classes.toml"
    if not (table.is_file() and _HEAD in table.read_text(encoding="utf-8", errors="replace")):
        raise ValueError(f"out: expected a folder that import has written to overwrite, got {config.out}")
    for path in (config.source, config.images):
        if path is not None and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(config.out)):
            raise ValueError(f"out: expected a folder without the export to overwrite, got {config.out} with {path}")


def _load(entries: Sequence[Entry], config: ImportConfig) -> _Loaded:
    """All pictures, by name, and "FILE: why" for what was left out. The first problem is raised unless it may be skipped."""
    pictures: list[Picture] = []
    problems: list[str] = []
    for entry in tqdm(entries, "reading", leave=False, disable=None):
        try:
            with pixel_limit(config.max_pixels):
                pictures.append(entry.read())
        except (ValueError, OSError, *_DAMAGE) as error:
            problems.append(_explained(error, entry.file, config.tool))
    if problems and not config.skip_bad:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{problems[0]}{more}; --skip-bad leaves such images out")
    drawn = [picture for picture in pictures if picture.shapes or config.keep_empty]
    left = [f"{one.name}: nothing is drawn on it" for one in pictures if not (one.shapes or config.keep_empty)]
    if not drawn:
        why = f"; {problems[0]}" if problems else ""
        raise ValueError(f"{config.source}: expected images with drawings, got {len(left)} without and no other{why}")
    if config.split == "export":
        left += [f"{one.name}: in no subset called train, val or test" for one in drawn if not one.split]
        drawn = [picture for picture in drawn if picture.split]
    if not drawn:
        raise ValueError(
            f"split: expected subsets called train, val or test in {config.source} (of CVAT; ImageSets of VOC; files of COCO), "
            "got none; say --split train"
        )
    return _Loaded(sorted(drawn, key=lambda one: one.name), [*problems, *left])


def _explained(error: Exception, file: str, tool: str) -> str:
    if isinstance(error, OSError) or (isinstance(error, ValueError) and "expected" in str(error)):
        return str(error) if file.split(", ")[0] in str(error) else f"{file}: {error}"
    got = f"one without {error}" if isinstance(error, KeyError) else f"another structure ({error})"
    return f"{file}: expected an export of {tool}, got {got}"


def _class_table(pictures: Sequence[Picture], export: Export, source: Source, config: ImportConfig) -> Classes:
    first = {shape.label: picture.file for picture in reversed(pictures) for shape in picture.shapes}
    used = first.keys() - set(config.ignore)
    if config.add:
        classes = read_classes(config.out / "classes.toml")
        known, where = classes.names, f"{config.out}/classes.toml"
    else:
        table = dict.fromkeys(source.base_label(label)[0] for label in export.labels if label.strip())
        order = [name for name in table if name in used] + sorted(used - table.keys())
        names = list(config.classes or order)
        if config.background:
            names = [config.background, *(name for name in names if name != config.background)]
        if len(names) < 2:
            raise ValueError(f"classes: expected 2 or more, got {names}; name what is around it with --background NAME")
        given = zip(names, palette(len(names)), strict=True)
        colours = [export.colours.get(name, colour) for name, colour in given]
        classes = Classes(tuple(names), tuple(colours))
        known, where = classes.names, "--classes"
    unknown = sorted(used - set(known))
    if unknown:
        near = get_close_matches(unknown[0], known, 1)
        hint = f" (is it {near[0]!r}?)" if near else ""
        raise ValueError(
            f"{first[unknown[0]]}: expected a label of {where} ({', '.join(known)}), got {unknown[0]!r}{hint}; "
            "add it, rename it in the tool, or leave it out with --ignore"
        )
    return classes


def _split(pictures: Sequence[Picture], config: ImportConfig) -> dict[str, list[Picture]]:
    """The pictures of each split, by name. Validation: those whose names have the smallest hashes, as if by lot."""
    if config.split == "export":
        splits = sorted({picture.split for picture in pictures})
        return {split: [picture for picture in pictures if picture.split == split] for split in splits}
    count = round(config.val_share * len(pictures))
    if config.val_share and not 0 < count < len(pictures):
        raise ValueError(f"val_share: expected some of {len(pictures)} images in either split, got {count} in val")
    by_lot = sorted(pictures, key=lambda picture: hashlib.sha256(picture.name.encode("utf-8", "replace")).digest())
    chosen = {picture.name for picture in by_lot[:count]}
    parts: dict[str, list[Picture]] = {config.split: [picture for picture in pictures if picture.name not in chosen]}
    return parts | ({"val": [picture for picture in pictures if picture.name in chosen]} if chosen else {})


def _masks(parts: Mapping[str, Sequence[Picture]], config: ImportConfig) -> set[tuple[str, str]]:
    """Split and name of the images whose shapes are masks. Raises ValueError where two images have one name."""
    for chosen in parts.values():
        for name, count in Counter(paths_of(chosen)).items():
            if count > 1:
                files, splits = zip(*((one.file, one.split) for one in chosen if one.name == name), strict=True)
                more = ", or --split export" if len({*splits} - {""}) > 1 else ""
                raise ValueError(
                    f"{files[0]}: expected one image called {name!r}, got another in {files[-1]}; rename one{more}"
                )
    every = [(split, picture.name) for split, chosen in parts.items() for picture in chosen]
    if config.kind == "masks":
        return set(every)
    found = {pattern: {one for one in every if fnmatchcase("/".join(one), pattern)} for pattern in config.masks}
    for pattern, names in found.items():
        if not names:
            raise ValueError(
                f"masks: expected patterns of SPLIT/NAME, such as {'/'.join(every[0])!r}, got {pattern!r}, which is none"
            )
    return set().union(*found.values())


@contextmanager
def _appearing(config: ImportConfig, parts: dict[str, list[Picture]]) -> Iterator[Path]:
    """A folder beside ``out`` that is renamed at the end, or with ``add`` its splits; on an error it goes."""
    out = Path(os.path.abspath(config.out))
    taken = [split for split in parts if (out / split).exists()]
    flat = "train" in parts and (out / "images").is_dir()
    if config.add and (flat or (taken and not config.overwrite)):
        more = "" if flat else "; --overwrite replaces it"
        raise ValueError(f"add: expected {out} without {'images' if flat else taken[0]}, got one that has it{more}")
    if config.overwrite:
        _look_for_others(out, taken if config.add else None)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary, out.name or "out")  # one that has the usual permissions
        folder.mkdir()
        yield folder
        moves = {folder / split: out / split for split in parts} if config.add else {folder: out}
        before = {name for name in _written(out) if config.add and name.split("/")[0] not in parts}
        manifest = json.dumps(sorted((before | _files(folder)) - {_MANIFEST}), indent=0)
        if not config.add:
            write_text(folder / _MANIFEST, manifest)
        for number, (new, place) in enumerate(moves.items()):
            old = Path(temporary, f"before {number}")
            if place.exists():
                os.rename(place, old)
            try:
                os.rename(new, place)
            except OSError:
                if old.exists():
                    os.rename(old, place)
                raise
        if config.add:
            write_text(out / _MANIFEST, manifest)


def _look_for_others(out: Path, splits: Sequence[str] | None) -> None:
    """Raises ValueError where replacing ``splits`` of ``out``, None: all of it, would delete a file that no import has written:
    a split that was made by hand, masks beside the drawings."""
    written = _written(out)
    for place in [out] if splits is None else [out / split for split in splits]:
        for path in sorted(place.rglob("*")):
            file = path.is_symlink() or not path.is_dir()
            if file and path.name not in _LITTER and path.relative_to(out).as_posix() not in written:
                raise ValueError(f"overwrite: expected nothing but what import has written, got {path}; move it away")


def _written(out: Path) -> set[str]:
    """The files of ``out`` that imports have written, itself included."""
    try:
        return {*json.loads((out / _MANIFEST).read_text(encoding="utf-8")), _MANIFEST}
    except FileNotFoundError:
        return set()


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def _write_classes(classes: Classes, path: Path) -> None:
    names = (tomli_w.dumps({"name": name}) for name in classes.names)
    tables = [
        f"\n[[class]]\n{name}id = {number}\ncolour = {list(colour)}\n"
        for name, number, colour in zip(names, classes.file_ids, classes.colours, strict=True)
    ]
    path.write_text(f"{_HEAD}; 255 in a label map: nothing is drawn there\n" + "".join(tables), encoding="utf-8")


def _notes(pictures: Sequence[Picture], export: Export, source: Source, classes: Classes) -> Iterator[str]:
    """What may be a slip: a label of one shape alone, or one that looks like another; classes that nothing is drawn of."""
    counts = Counter(shape.label for picture in pictures for shape in picture.shapes)
    for label, count in counts.items():
        near = get_close_matches(label.lower(), [other.lower() for other in counts if counts[other] > count], 1, 0.75)
        if near and count <= 2:
            yield f"{label!r} is drawn {count}x and looks like {near[0]!r}: a slip? (rename it in the tool)"
        elif count == 1:
            yield f"{label!r} is drawn once"
    unused = [label for label in classes.names if not counts[label]]
    listed = {source.base_label(label)[0] for label in export.labels if label.strip()} - {*counts, *classes.names}
    if listed:
        yield f"no class, since nothing is drawn of it: {', '.join(sorted(listed))}"
    if unused:
        yield f"a class that nothing is drawn of: {', '.join(unused)}"


def _other_splits(pictures: Sequence[Picture], config: ImportConfig) -> Iterator[str]:
    counts = Counter(picture.split for picture in pictures if picture.split)
    if config.split != "export" and counts.keys() - {config.split}:
        parts = ", ".join(f"{split} {count}" for split, count in sorted(counts.items()))
        yield f"the export has splits of its own ({parts}), and all went into {config.split}: --split export keeps them apart"


def _report(
    config: ImportConfig, classes: Classes, written: dict[str, Written], notes: list[str], left_out: list[str]
) -> None:
    images = ", ".join(f"{split} {one.images}" for split, one in written.items())
    print(f"{config.out}: images: {images}; classes: {', '.join(classes.names)}\n")
    print(f"{'split':<6} {'kind':<10} {'class':<20} {'images':>7} {'shapes':>7} {'pixels':>12}")
    for split, one in written.items():
        for (label, kind), (pictures, shapes, pixels) in sorted(
            one.counts.items(), key=lambda item: (item[0][1], item[0][0])
        ):
            print(f"{split:<6} {kind:<10} {classes.names[label]:<20} {pictures:>7} {shapes:>7} {pixels:>12}")
    total = Written()
    for one in written.values():
        total.add(one)
    left_out = [*left_out, *(f"{name}: no shape of a class is inside of it" for name in total.blank)]
    if total.missed:
        notes.append(f"{total.missed} shape(s) cover no pixel of their image")
    if total.resaved:
        notes.append(
            f"{_some(total.resaved)}: saved anew as upright PNG (an orientation tag, or a format that is not read)"
        )
    for name, count in total.contradicted.items():
        notes.append(f"{name!r} is drawn and ruled out at the same pixels of {count} image(s)")
    kinds = {split: {kind for _, kind in one.counts} for split, one in written.items()}
    if config.background is None and any("masks" in found for found in kinds.values()):
        notes.append("where nothing is drawn nothing is known (255); --background NAME makes it a class in masks")
    elif any("positives" in found for found in kinds.values()):
        notes.append("where nothing is drawn nothing is known (255)")
    if any("masks" not in kinds[split] for split in kinds.keys() & {"val", "test"}):
        notes.append("scores need masks: draw those images densely and import them with --as masks")
    print("\n" + "\n".join(f"note: {note}" for note in notes))
    for line in left_out[:20]:
        print(f"left out: {line}")
    if len(left_out) > 20:
        print(f"left out: {len(left_out) - 20} more")
    root = shlex.quote(str(config.out))
    print(f"\nnext: coarse-train check folder --root {root}\n      coarse-train fit folder --root {root}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
