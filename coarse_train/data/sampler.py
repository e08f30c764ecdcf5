"""Which images a step sees: a function of (seed, step) alone, so that a resumed run goes on with the very same batches."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import lru_cache
from math import floor

import numpy as np
from torch.utils.data import Sampler

Key = tuple[int, int]  # (epoch, index of the image): what `SegmentationData` takes


class StepSampler(Sampler[list[Key]]):
    """The keys of every forward pass of one rank, in order, from step ``first`` (counted from 0) to ``steps``.

    Epochs follow each other without a break: step t takes places [t G, (t + 1) G) of the endless row of permuted
    epochs, G = ``batch_size``. The places of a step are dealt out in blocks, pass by pass and rank by rank.

    ``dense``: some of the images, which with a ``dense_share`` fill that part of the places, in epochs of their own.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        steps: int,
        *,
        seed: int,
        first: int = 0,
        accumulate: int = 1,
        rank: int = 0,
        world: int = 1,
        dense: Collection[int] = (),
        dense_share: float | None = None,
    ):
        if batch_size % (accumulate * world):
            raise ValueError(
                f"batch_size: expected a multiple of accumulate x processes = {accumulate} x {world}, got {batch_size}"
            )
        self.count, self.batch_size, self.steps, self.seed, self.first = count, batch_size, steps, seed, first
        self.accumulate, self.rank, self.world = accumulate, rank, world
        self.per_pass = batch_size // (accumulate * world)
        self.share = dense_share
        self.groups = [sorted(dense), sorted({*range(count)} - {*dense})]
        if dense_share is not None and not all(self.groups):
            raise ValueError(
                f"dense_share: expected images with a mask and others, got {len(dense)} and the rest of {count}"
            )

    def __len__(self) -> int:
        return (self.steps - self.first) * self.accumulate

    def __iter__(self) -> Iterator[list[Key]]:
        for step in range(self.first, self.steps):
            for part in range(self.accumulate):
                start = step * self.batch_size + (part * self.world + self.rank) * self.per_pass
                yield [self.key(place) for place in range(start, start + self.per_pass)]

    def key(self, place: int) -> Key:
        if self.share is None:
            epoch, position = divmod(place, self.count)
            return epoch, int(_order(self.count, self.seed, epoch)[position])
        before, upto = floor(place * self.share), floor((place + 1) * self.share)  # spread evenly over the places
        dense = upto > before
        group = self.groups[0 if dense else 1]
        epoch, position = divmod(before if dense else place - before, len(group))
        return epoch, group[int(_order(len(group), self.seed, epoch)[position])]


@lru_cache(maxsize=8)  # a step reaches into two epochs at most, of both groups, unless the data set is tiny
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)
