"""MNIST: IDX files, the sample that ships with the package, and digits placed on a canvas as a segmentation task.

The IDX format: two zero bytes, a type byte (0x08 = unsigned byte), the number of axes, each axis as a big-endian
uint32, then the values. Files may be gzip-compressed; that is told from their first bytes, not from their name.
"""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np
import torch

from ..simulate import Preset, draw
from . import InMemory, Sample, Splits

SAMPLE_DIR = Path(__file__).parent / "mnist_sample"
DIGITS = (0, 3, 4, 7)  # the object classes, in this order: class k is DIGITS[k - 1], class 0 is the background
CANVAS = 48
_CELL = CANVAS // 2  # each digit has a quadrant of its own, so digits never overlap
_BORDER = 4  # MNIST digits are 20x20 in a 28x28 frame
_INK = 100  # a pixel of a digit is object from this grey value on
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


def write_idx(path: str | Path, array: np.ndarray) -> None:
    """Write uint8 ``array`` as gzip IDX; equal arrays give equal bytes (no time stamp, no file name)."""
    header = bytes([0, 0, 0x08, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    Path(path).write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 9, mtime=0))


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


def load_splits(
    *,
    folder: str | Path | None = None,
    preset: Preset,
    seed: int = 0,
    validation_fraction: float = 0.1,
    max_train: int | None = None,
    max_test: int | None = None,
) -> Splits:
    """The segmentation task: training and validation canvases from the training digits, test canvases from the others.

    ``folder`` holds the IDX files (None: the sample in the package). ``max_train`` and ``max_test`` bound the number of
    canvases. With a preset of two classes all digits are the one object class. Each object is drawn once: a drawing
    does not change from epoch to epoch. The test canvases are the same for every seed.
    """
    folder = SAMPLE_DIR if folder is None else Path(folder)
    parts = {split: _of_classes(*read_split(folder, split)) for split in ("train", "test")}
    for split, (digits, _) in parts.items():
        if len(digits) < 20:
            raise ValueError(f"data: expected at least 20 {split} digits of {DIGITS} in {folder}, got {len(digits)}")
    images, labels = parts["train"]
    held_out = max(2, int(len(images) * validation_fraction)) if max_train is None else max(2, max_train // 4)
    stop = len(images) - held_out
    used = stop if max_train is None else min(stop, 2 * max_train)
    test_images, test_labels = parts["test"]
    tested = len(test_images) if max_test is None else min(len(test_images), 2 * max_test)
    return Splits(
        train=_drawn(images[:used], labels[:used], preset, seed),
        validation=_drawn(images[stop:], labels[stop:], preset, seed + 1_000_003),
        test=_drawn(test_images[:tested], test_labels[:tested], preset, 2_000_003),
        class_names=("background", *(str(d) for d in DIGITS)) if preset.num_classes > 2 else ("background", "digit"),
    )


def _of_classes(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    chosen = np.isin(labels, DIGITS)
    return images[chosen], labels[chosen]


def _drawn(images: np.ndarray, labels: np.ndarray, preset: Preset, seed: int) -> InMemory:
    canvas, mask, region = place_digits(images, labels, seed)
    if preset.num_classes == 2:
        mask = (mask > 0).astype(np.uint8)
    # one generator per image: the drawings of an image do not depend on how many others there are
    drawings = [draw(mask[n], preset, np.random.default_rng([seed, n]), regions=region[n]) for n in range(len(mask))]
    positive, negative = (np.stack(maps) for maps in zip(*drawings, strict=True))
    image = torch.from_numpy(canvas).unsqueeze(1).to(torch.float32) / 255
    return InMemory(Sample(image, torch.from_numpy(positive), torch.from_numpy(negative), torch.from_numpy(mask)))
