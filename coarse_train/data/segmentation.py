"""A `Source` as a dataset of samples: drawings simulated where they are asked for, transforms, and what is learned from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ..config import DataConfig
from ..simulate import Process, draw_coarse, generator_for, level
from . import Record, Sample, Source
from .classes import IGNORE
from .images import with_channels
from .sampler import Key
from .transforms import Augment, transform, untouched

# Drawing takes 0.07 to 0.10 s for a mask of CamVid (480x360), 0.7 to 1.4 s at 1024x2048 (one core, positive and two negative
# layers, scribble to full), reading an image of CamVid 0.002 s. So drawings are kept, compressed: 15 kB and 100 kB an image.
# Beyond so many bytes in a process they are drawn again in every epoch: `coarse-train simulate` draws them into files once.
_CACHE_BYTES = 300_000_000


class SegmentationData(Dataset[Sample]):
    """Samples of one split. Which transform a sample gets depends on (seed, epoch, index) alone, which drawings are
    simulated on (seed, name of the image).

    training: with the transforms of the config, and only with the label maps that are to be learned from (``supervision``,
        ``dense_images``); the others are `IGNORE`. Else the whole image and all of its maps.
    channels: of every sample; grey images are repeated. None: as each image has.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig | None = None,
        *,
        training: bool,
        seed: int = 0,
        channels: int | None = None,
    ):
        config = config or DataConfig()
        self.source, self.seed, self.training, self.channels = source, seed, training, channels
        self.augment = Augment(config.crop, config.scale, config.flip, config.colour) if training else None
        self.simulated = None if config.simulate is None else _process(config.simulate, len(source.classes))
        if training and not len(source):
            raise ValueError(f"dataset {config.dataset}: expected at least one training image, got none")
        self.dense = _dense(source, config, seed) if training else frozenset()
        if training:
            self._check_supervision()
        self._cache: dict[int, bytes] = {}
        self._cached = 0

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int | Key) -> Sample:
        """``key``: index, or (epoch, index) for the transforms of that epoch; an index alone is of epoch 0."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        record = self.source.load(index)
        if self.channels is not None:
            record = replace(record, image=with_channels(record.image, self.channels, record.name))
        if index in self.dense:
            record = replace(record, positive=None, negative=None)
        elif self.simulated is not None:
            record = self._drawn(record, index, self.simulated)
        if self.training and index not in self.dense:
            record = replace(record, mask=None)
        if self.augment is None:
            return untouched(record)
        return transform(record, self.augment, np.random.default_rng([self.seed, epoch, index]))

    def __getitems__(self, keys: Sequence[int | Key]) -> list[Sample] | Exception:
        """What `DataLoader` calls for a batch; here the names of images that do not fit together are still known.

        What is wrong with a file is handed over, not raised: a worker wraps what it raises in a traceback of many lines.
        """
        try:
            samples = [self[key] for key in keys]
            names = [self.source.name(key[1] if isinstance(key, tuple) else key) for key in keys]
            for name, sample in zip(names, samples, strict=True):
                _check_sizes(samples[0], sample, names[0], name)
        except (ValueError, OSError) as error:
            return error
        return samples

    def collate(self, samples: Sequence[Sample] | Exception) -> Sample | Exception:
        """Samples of one size as a batch; where they differ in layers of negative drawings, empty ones are added. An exception
        of `__getitems__` passes through, for the process that trains to raise (`batches`)."""
        if isinstance(samples, Exception):
            return samples
        layers = max(len(sample.negative) for sample in samples)
        return default_collate([sample._replace(negative=_with_layers(sample.negative, layers)) for sample in samples])

    @staticmethod
    def batches(loader: Iterable[Sample | Exception]) -> Iterator[Sample]:
        """What a loader with `collate` gives; raises what went wrong in a worker."""
        for batch in loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _check_supervision(self) -> None:
        """That there is something to learn from: in every image where drawings are simulated, else in one at least."""
        kinds = {index: self.source.kinds(index) for index in range(len(self)) if index not in self.dense}
        if self.simulated is not None:
            if kinds and all({"positive", "negative"} <= present for present in kinds.values()):
                raise ValueError("simulate: expected images that lack drawings, but all have both kinds; leave it out")
            for index, present in kinds.items():
                if not present:
                    raise ValueError(
                        f"{self.source.name(index)}: expected a dense mask to simulate drawings from, got none"
                    )
        elif not self.dense and not any(present & {"positive", "negative"} for present in kinds.values()):
            raise ValueError(
                "supervision drawings: expected positive or negative drawings, got none in the data set; give "
                "--positives or --negatives, draw them once with `coarse-train simulate`, set --simulate LEVEL, or learn "
                "from dense masks with --supervision masks"
            )

    def _drawn(self, record: Record, index: int, process: Process) -> Record:
        """The record with simulated drawings of the kinds that it lacks."""
        kinds = self.source.kinds(index)
        if {"positive", "negative"} <= kinds or record.mask is None:
            return record
        shape = (1 + process.layers, *record.mask.shape)
        if index in self._cache:
            maps = np.frombuffer(zlib.decompress(self._cache[index]), np.uint8).reshape(shape)
        else:
            positive, negative = draw_coarse(record.mask, process, generator_for(self.seed, record.name))
            maps = np.concatenate([positive[None], negative])
            packed = zlib.compress(maps.tobytes())
            if self._cached + len(packed) <= _CACHE_BYTES:
                self._cache[index] = packed
                self._cached += len(packed)
        return replace(
            record,
            positive=record.positive if "positive" in kinds else maps[0],
            negative=record.negative if "negative" in kinds else maps[1:],
        )


def _process(name: str, num_classes: int) -> Process:
    try:
        return level(name, num_classes)
    except ValueError as error:
        raise ValueError(f"simulate: {error}") from error


def _dense(source: Source, config: DataConfig, seed: int) -> frozenset[int]:
    """The training images that are learned from by their dense mask."""
    if config.supervision == "drawings":
        return frozenset()
    with_mask = [index for index in range(len(source)) if "mask" in source.kinds(index)]
    if config.supervision == "masks":
        if len(with_mask) < len(source):
            lacking = next(index for index in range(len(source)) if "mask" not in source.kinds(index))
            raise ValueError(f"{source.name(lacking)}: expected a dense mask, as supervision is masks, got none")
        return frozenset(with_mask)
    if not 0 <= config.dense_images <= len(with_mask):
        raise ValueError(
            f"dense_images: expected 0 to {len(with_mask)}, the images with masks, got {config.dense_images}"
        )
    chosen = np.random.default_rng([seed, 11]).permutation(len(with_mask))[: config.dense_images]
    return frozenset(with_mask[k] for k in chosen)


def _check_sizes(one: Sample, other: Sample, name_one: str, name_other: str) -> None:
    if one.image.shape == other.image.shape:
        return
    raise ValueError(
        f"crop: expected images of one size and number of channels in a batch, got {_size(one)} ({name_one}) and "
        f"{_size(other)} ({name_other}); set --crop, or without one --scale 1 1 or batches of one image"
    )


def _size(sample: Sample) -> str:
    channels, height, width = sample.image.shape
    return f"{width}x{height} pixels of {channels} channel(s)"


def _with_layers(negative: torch.Tensor, layers: int) -> torch.Tensor:
    missing = layers - len(negative)
    if missing == 0:
        return negative
    return torch.cat([negative, negative.new_full((missing, *negative.shape[1:]), IGNORE)])
