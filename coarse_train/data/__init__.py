"""Datasets: one `Sample` type, one registry.

A dataset is a `torch.utils.data.Dataset` of `Sample`; `torch.utils.data.default_collate` turns samples into a batch,
which is a `Sample` too, with a leading batch axis. A new dataset is one module here and one line in `DATASETS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = 255  # nobody drew here; it counts in no loss and in no score


class Sample(NamedTuple):
    """One image with its two drawings, or a batch of them (leading axis B).

    image: (1, H, W) float32.
    positive: (H, W) uint8, "this region is class y"; `IGNORE` where nothing is drawn.
    negative: (H, W) uint8, "this region is not class y"; `IGNORE` where nothing is drawn.
    mask: (H, W) uint8, the true class. Read by scores and by the fully supervised row, by no other loss.
    """

    image: Tensor
    positive: Tensor
    negative: Tensor
    mask: Tensor


class InMemory(Dataset[Sample]):
    """A stacked `Sample` (images (N, 1, H, W), label maps (N, H, W)) as a dataset of N samples."""

    def __init__(self, stacked: Sample):
        lengths = {len(field) for field in stacked}
        if len(lengths) != 1:
            raise ValueError(f"stacked: expected fields of one length, got {[len(field) for field in stacked]}")
        self.stacked = stacked

    def __len__(self) -> int:
        return len(self.stacked.image)

    def __getitem__(self, index: int) -> Sample:
        return Sample(*(field[index] for field in self.stacked))

    def select(self, indices: list[int] | range) -> Sample:
        """The samples at ``indices`` as one batch."""
        chosen = torch.as_tensor(list(indices))
        return Sample(*(field[chosen] for field in self.stacked))


class Splits(NamedTuple):
    """Disjoint parts of one dataset, with the names of its classes; ``class_names[0]`` is the background."""

    train: InMemory
    validation: InMemory
    test: InMemory
    class_names: tuple[str, ...]


def _mnist(**options: object) -> Splits:
    from .mnist import load_splits  # in here: the registry must not import every dataset's dependencies

    return load_splits(**options)  # type: ignore[arg-type]


DATASETS: dict[str, Callable[..., Splits]] = {"mnist": _mnist}

__all__ = ["DATASETS", "IGNORE", "InMemory", "Sample", "Splits"]
