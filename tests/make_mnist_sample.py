"""Make the sample that ships with the package from the full MNIST; the same input gives the same bytes.

    python -m tests.make_mnist_sample SOURCE_DIR [DESTINATION_DIR]

Keeps the first digits of each class of `DIGITS`, in the order of the originals, in files of the original names.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np

from coarse_train.data.mnist import _FILES, DIGITS, SAMPLE_DIR, read_split

PER_CLASS = {"train": 1120, "test": 240}


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 ``array`` as gzip IDX; equal arrays give equal bytes (no time stamp, no file name)."""
    header = bytes([0, 0, 0x08, array.ndim]) + b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes(), 9, mtime=0))


def make_sample(source: str | Path, destination: str | Path = SAMPLE_DIR) -> int:
    """Write the four files and return their size in bytes."""
    splits = {split: read_split(source, split) for split in PER_CLASS}  # all is read before anything is written
    destination = Path(destination)
    destination.mkdir(parents=True, exist_ok=True)
    size = 0
    for split, (images, labels) in splits.items():
        kept = np.sort(np.concatenate([np.flatnonzero(labels == digit)[: PER_CLASS[split]] for digit in DIGITS]))
        for kind, array in (("images", images[kept]), ("labels", labels[kept])):
            path = destination / f"{_FILES[split, kind]}.gz"
            write_idx(path, array)
            size += path.stat().st_size
    return size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder with the four IDX files of MNIST")
    parser.add_argument("destination", type=Path, nargs="?", default=SAMPLE_DIR)
    arguments = parser.parse_args()
    size = make_sample(arguments.source, arguments.destination)
    print(f"{arguments.destination}: {size} bytes")


if __name__ == "__main__":
    main()
