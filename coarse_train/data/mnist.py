"""MNIST: IDX files, the sample that ships with the package, and digits placed on a canvas as a segmentation task.

    ROOT/{train,t10k}-{images-idx3,labels-idx1}-ubyte, or the same with .gz; without ROOT the sample

Two digits on 48x48 pixels, drawn by one of `PROCESSES`, which is the variant ("": "hasty"): background, 0, 3, 4, 7, or
background and digit in "binary" and "binary_names". "digits-R" (R one of `AREAS`) has one digit on 28x28 pixels, any of the
ten, background and digit, and drawings of training images alone, of about a part R of the image. The canvases and their
drawings are the same in every run and for every ``limit``: the first nine tenths of the training digits are train, the rest
val.

The IDX format: two zero bytes, a type byte (0x08 = unsigned byte), the number of axes, each axis as a big-endian
uint32, then the values. Files may be gzip-compressed; that is told from their first bytes, not from their name.
"""

from __future__ import annotations

import gzip
import zlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..simulate import Mix, Process, Strokes, draw_coarse, others, swapped
from . import Record
from .classes import OKABE_ITO, Classes
from .files import (
    check_choice,
    check_size,
    find_drawings,
    first,
    read_map,
    sift,
    stack_layers,
    training_limit,
)
from .walk import Fault, without

if TYPE_CHECKING:
    from ..config import DataConfig

SAMPLE_DIR = Path(__file__).parent / "mnist_sample"
DIGITS = (0, 3, 4, 7)  # the object classes, in this order: class k is DIGITS[k - 1], class 0 is the background
CANVAS = 48
_CELL = CANVAS // 2  # each digit has a quadrant of its own, so digits never overlap
_BORDER = 4  # MNIST digits are 20x20 in a 28x28 frame
_INK = 100  # a pixel of a digit is object from this grey value on
# Positive drawings in haste: mostly incomplete, sometimes too wide or displaced; what no object covers is background. Negative
# ones with a margin: "not a 4", about every object, honest, and weak, since one of three wrong digits is named. So neither
# kind is enough.
_WHOLE = Strokes(1.0, Mix(exact=1.0), balance=1.0, smallest=0.0, paper=0)
_POSITIVE = Strokes(
    1.0, Mix(fractured=0.6, dilated=0.2, shifted=0.2), balance=1.0, smallest=0.0, kept=(0.3, 0.7), paper=0
)
_NEGATIVE = Strokes(
    1.0, Mix(fractured=0.3, shifted=0.3, exact=0.4), balance=1.0, smallest=0.0, kept=(0.3, 0.7), margin=(2, 4)
)
# hasty: three objects in ten carry another digit's name, and a name is right more often than any other.
# majority: two of the four are drawn as another one more often than not, as by somebody who knows one name for two things
#   ("car" for a van), so the most frequent name of such an object is not its own. That is realistic for names; that every
#   object has a negative drawing, and an honest one, is what a project would have to pay for. All four are equally frequent:
#   with half as many of the two that are misnamed, a name is mostly right again for who sees it.
# half, sparse: majority, but of the objects only 50 and 15 in a hundred have a negative drawing.
# alike: majority, but no negative drawing tells the two from each other that are drawn as one ("not a truck" on a van).
# swallowed: one class is left out, background in its place, in 65 drawings of 100; negative drawings may say "not background".
# thick, thin: every name is right, and every outline a pixel too far out or in, which is half an object's area and more.
# thick_names: thick, and the names of majority.
# whole_names, binary_names: outlines are right, only names are wrong: those of majority, and "nothing" for 6 digits in 10 of a
#   binary mask. So the confusion matrix of pixels is the one of names that the process states.
# majority_spots, majority_scribbles: the names of majority on a few discs and strokes, for the background too, of both kinds of
#   drawings; what they leave out says nothing.
# binary: the paper's masks, thin or fractured; negative drawings say what is not there at every pixel, with the errors of all
#   kinds of outlines.
PROCESSES = {
    "majority": Process(
        "majority", _POSITIVE, _NEGATIVE, swapped(5, {2: 1, 4: 3}, 0.6), others(5, 0), layers=1, background=0
    ),
    "hasty": Process(
        "hasty", _POSITIVE, _NEGATIVE, swapped(5, {1: 2, 2: 3, 3: 4, 4: 1}, 0.3), others(5, 0), layers=1, background=0
    ),
    **{
        name: Process(
            name,
            _POSITIVE,
            replace(_NEGATIVE, skipped=skipped, surest=0),
            swapped(5, {2: 1, 4: 3}, 0.6),
            others(5, 0),
            layers=1,
            background=0,
        )
        for name, skipped in (("half", 0.5), ("sparse", 0.85))
    },
    "alike": Process(
        "alike",
        _POSITIVE,
        _NEGATIVE,
        swapped(5, {2: 1, 4: 3}, 0.6),
        (*others(5, 0)[:1], *2 * ((0, 0, 0, 0.5, 0.5),), *2 * ((0, 0.5, 0.5, 0, 0),)),
        layers=1,
        background=0,
    ),
    "swallowed": Process(
        "swallowed", _POSITIVE, _NEGATIVE, swapped(5, {2: 0}, 0.65), others(5), layers=1, background=0
    ),
    **{
        name: Process(
            name,
            replace(_WHOLE, margin=(margin, margin)),
            _NEGATIVE,
            swapped(5, pairs, 0.6),
            others(5, 0),
            layers=1,
            background=0,
        )
        for name, margin, pairs in (
            ("thick", 1, {}),
            ("thin", -1, {}),
            ("thick_names", 1, {2: 1, 4: 3}),
            ("whole_names", 0, {2: 1, 4: 3}),
        )
    },
    "binary_names": Process(
        "binary_names",
        _WHOLE,
        replace(_NEGATIVE, mix=Mix(fractured=0.6, exact=0.4), margin=(0, 0)),
        swapped(2, {1: 0}, 0.6),
        others(2),
        layers=1,
        background=0,
        careful=False,
    ),
    **{
        name: Process(name, strokes, strokes, swapped(5, {2: 1, 4: 3}, 0.6), others(5, 0), layers=1)
        for name, strokes in (
            ("majority_spots", Strokes(0.1, Mix(spots=1.0), pen=0.06, balance=0.5, smallest=0.0)),
            ("majority_scribbles", Strokes(0.05, Mix(scribble=1.0), balance=0.5, smallest=0.0)),
        )
    },
    "binary": Process(
        "binary",
        Strokes(1.0, Mix(fractured=0.5, eroded=0.5), balance=1.0, smallest=0.0, kept=(0.3, 0.7), paper=0),
        Strokes(
            1.0,
            Mix(fractured=0.2, eroded=0.2, dilated=0.2, shifted=0.2, polygon=0.2),
            balance=1.0,
            smallest=0.0,
            kept=(0.3, 0.7),
            paper=1,
        ),
        swapped(2, {}, 0.0),
        others(2),
        layers=1,
        background=0,
        careful=False,
    ),
}
AREAS = (0.01, 0.05, 0.25, 0.5, 1.0)


def _part(area: float) -> Strokes | None:
    if area == 1:
        return None
    if area < 0.1:
        mix = Mix(scribble=1.0) if area < 0.03 else Mix(spots=1.0)
        return Strokes(area, mix, pen=0.07, balance=0.5, smallest=0.02)
    return Strokes(area, Mix(fractured=1.0), balance=1.0, smallest=0.0)


# digits-R: binary, of which about a part R of the area is shown, as scribbles, spots or pieces that are cut out: the area
#   differs, the errors do not, but that strokes run along the middle of a shape, where there are fewer. Negative drawings
#   cover as much as digits do, on average; those of binary cover 0.89 of it, so that the outline that most of them agree on
#   is too narrow (its mean IoU with the mask is 95.8, here 99.4; 25 digits with 80 drawings each).
_BALANCED = replace(PROCESSES["binary"], negative=replace(PROCESSES["binary"].negative, kept=(0.6, 0.9)))
_SINGLE = {f"digits-{area:g}": replace(_BALANCED, name=f"digits-{area:g}", part=_part(area)) for area in AREAS}
PROCESSES |= _SINGLE
# (process, seed, checksum of canvases and masks) -> number of a canvas -> its drawings. Drawing takes milliseconds, as long as
# a step may; runs of one process and its splits share what is there.
_DRAWN: dict[tuple[Process, int, int], dict[int, tuple[np.ndarray, np.ndarray]]] = {}
_SEEDS = {"train": 0, "val": 1_000_003, "test": 2_000_003}
_FILES = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


def read_idx(path: str | Path) -> np.ndarray:
    """The uint8 array in an IDX file, plain or gzip.

    Raises ValueError naming the file where it is not IDX, holds another type, or has too few or too many bytes.
    """
    path = Path(path)
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path}: expected a complete gzip file, got a damaged one ({error})") from error
    if len(data) < 4 or data[:2] != b"\x00\x00":
        raise ValueError(f"{path}: expected an IDX file (first bytes 00 00), got {data[:4].hex(' ') or 'no bytes'}")
    if data[2] != 0x08:
        raise ValueError(f"{path}: expected an IDX file of unsigned bytes (type 0x08), got type 0x{data[2]:02x}")
    axes = data[3]
    header = 4 + 4 * axes
    if axes == 0 or len(data) < header:
        raise ValueError(f"{path}: expected an IDX header of {header} bytes for {axes} axes, got {len(data)} bytes")
    shape = tuple(int.from_bytes(data[4 + 4 * k : 8 + 4 * k], "big") for k in range(axes))
    expected = 1
    for size in shape:
        expected *= size  # Python integers: a damaged header must not overflow
    if len(data) - header != expected:
        raise ValueError(f"{path}: expected {expected} values for shape {shape}, got {len(data) - header} (truncated?)")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def read_split(folder: str | Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(N, 28, 28) uint8 images and (N,) uint8 labels of "train" or "test" in ``folder``; checked against each other."""
    image_path, label_path = (_find(Path(folder), _FILES[split, kind]) for kind in ("images", "labels"))
    images, labels = read_idx(image_path), read_idx(label_path)
    if images.ndim != 3 or images.shape[1:] != (28, 28):
        raise ValueError(f"{image_path}: expected images of shape (N, 28, 28), got {images.shape}")
    if labels.ndim != 1:
        raise ValueError(f"{label_path}: expected labels of shape (N,), got {labels.shape}")
    if len(images) != len(labels):
        raise ValueError(f"{label_path}: expected {len(images)} labels, one for each image, got {len(labels)}")
    if labels.size and labels.max() > 9:
        raise ValueError(f"{label_path}: expected labels from 0 to 9, got {labels.max()}")
    return images, labels


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise FileNotFoundError(f"data: expected {name} or {name}.gz in {folder}, found neither")


def place_digits(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two digits on each canvas, in different quadrants at a random place; every digit is used once.

    Args:
        images: (N, 28, 28) uint8, labels: (N,) digits that are all in `DIGITS`.

    Returns:
        canvas (N // 2, 48, 48) uint8, mask (N // 2, 48, 48) uint8 classes, and region (N // 2, 48, 48) uint8: which
        object of its image a pixel belongs to, 0 for none.
    """
    rng = np.random.default_rng(seed)
    count = len(images) // 2
    canvas, mask, region = (np.zeros((count, CANVAS, CANVAS), np.uint8) for _ in range(3))
    order = rng.permutation(len(images))
    slack = _CELL - (28 - 2 * _BORDER)
    for n in range(count):
        for slot, quadrant in enumerate(rng.permutation(4)[:2]):
            digit = order[2 * n + slot]
            crop = images[digit, _BORDER:-_BORDER, _BORDER:-_BORDER]
            top, left = (int(x) for x in rng.integers(0, slack + 1, 2) + _CELL * np.array(divmod(int(quadrant), 2)))
            window = (n, slice(top, top + crop.shape[0]), slice(left, left + crop.shape[1]))
            ink = crop >= _INK
            canvas[window] = crop
            mask[window] = ink * (1 + DIGITS.index(int(labels[digit])))
            region[window] = ink * (slot + 1)
    return canvas, mask, region


def single_digits(images: np.ndarray, labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `place_digits`, each digit (28, 28) by itself, of class 1 whichever it is; nothing is left to chance."""
    ink = (images >= _INK).astype(np.uint8)
    return images, ink, ink


def open_split(config: DataConfig, split: str) -> MnistSource:
    """The canvases of ``split``; variants are `PROCESSES`."""
    check_choice(config, split, *PROCESSES)
    process = PROCESSES[config.variant or "hasty"]
    folder = SAMPLE_DIR if config.root is None else config.root
    images, labels = read_split(folder, "test" if split == "test" else "train")
    if process.name not in _SINGLE:
        images, labels = _chosen(images, labels)
    if len(images) < 20:
        of = "" if process.name in _SINGLE else f" of {DIGITS}"
        raise ValueError(f"root: expected at least 20 digits{of} in {folder}, got {len(images)}")
    if split != "test":
        stop = len(images) - max(2, int(len(images) * 0.1))
        part = slice(stop) if split == "train" else slice(stop, None)
        images, labels = images[part], labels[part]
    source = MnistSource(images, labels, process, _SEEDS[split])
    if process.name in _SINGLE and split != "train":
        source.given = {"positive": {}, "negative": {}}  # nothing looks at drawings of 10,000 images that are scored
        return source
    names = [source.name(index) for index in range(len(source))]
    faults: list[Fault] = []
    for kind, drawings in (("positive", config.positives), ("negative", config.negatives)):
        if drawings is not None:
            source.given[kind] = find_drawings(kind, drawings, split, names, faults)
    kept = training_limit(config, split, len(names))
    source.indices = source.indices[:kept]
    if source.given:
        good, skipped = sift(source, without(faults, names[kept:]), skip_bad=config.skip_bad)
        source.indices, source.skipped = [source.indices[index] for index in good], skipped
    return source


class MnistSource:
    """Canvases as a `Source`; an image is drawn on when it is loaded, the same way every time.

    indices: the canvases that are used. given: files of drawings instead of the process's, for "positive" and "negative".
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, process: Process, seed: int):
        names = _class_names(process)
        self.classes = Classes(names, OKABE_ITO[: len(names)])
        place = single_digits if process.name in _SINGLE else place_digits
        self.canvas, mask, self.region = place(images, labels, seed)
        self.mask = mask if process.num_classes > 2 else (mask > 0).astype(np.uint8)
        self.process, self.seed = process, seed
        self.indices = list(range(len(self.canvas)))
        self.given: dict[str, dict[str, tuple[Path, ...]]] = {}
        self.skipped: tuple[str, ...] = ()
        self._drawn = _DRAWN.setdefault(
            (process, seed, zlib.crc32(np.stack([self.canvas, self.mask, self.region]).tobytes())), {}
        )

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        return f"{self.indices[index]:05d}"

    def kinds(self, index: int) -> frozenset[str]:
        kinds, name = ("positive", "negative", "mask"), self.name(index)
        return frozenset(kind for kind in kinds if kind not in self.given or name in self.given[kind])

    def files(self, index: int) -> list[Path]:
        return [path for found in self.given.values() for path in found.get(self.name(index), ())]

    def load(self, index: int) -> Record:
        n, name = self.indices[index], self.name(index)
        image, mask = self.canvas[n][..., None].copy(), self.mask[n].copy()
        both = {"positive", "negative"} <= self.given.keys()
        positive, negative = (None, None) if both else self.draw(n)
        record = Record(name, image, positive, negative, mask)
        if "positive" in self.given:
            path = first(self.given["positive"], name)
            record = replace(record, positive=self._read("positive", path, image, name) if path else None)
        if "negative" in self.given:
            files = self.given["negative"]
            layers = max((len(paths) for paths in files.values()), default=0)
            maps = [self._read("negative", path, image, name) for path in files.get(name, ())]
            record = replace(record, negative=stack_layers(maps, layers, image) if layers else None)
        return record

    def draw(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Positive (H, W) and negative (1, H, W) drawing of canvas n by the process."""
        if n not in self._drawn:
            # one generator per image: the drawings of an image do not depend on how many others there are
            rng = np.random.default_rng([self.seed, n])
            objects = None if self.process.background is None else self.region[n]
            self._drawn[n] = draw_coarse(self.mask[n], self.process, rng, objects=objects)
        positive, negative = self._drawn[n]
        return positive.copy(), negative.copy()

    def _read(self, kind: str, path: Path, image: np.ndarray, name: str) -> np.ndarray:
        labels = read_map(path, self.classes, kind)
        check_size(labels, path, image, f"canvas {name}")
        return labels


def _class_names(process: Process) -> tuple[str, ...]:
    return ("background", *(str(digit) for digit in DIGITS)) if process.num_classes > 2 else ("background", "digit")


def _chosen(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The digits of the object classes."""
    kept = np.isin(labels, DIGITS)
    return images[kept], labels[kept]
