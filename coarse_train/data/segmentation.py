"""A `Source` as a dataset of samples: drawings simulated where they are asked for, transforms, and what is learned from."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from ..config import DataConfig, FitConfig
from ..pen import Pen, PenReport, measure, read_pen, undo
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
NO_DRAWINGS = (
    "supervision drawings: expected positive or negative drawings, got none in the data set; give --positives or --negatives, "
    "draw them once with `coarse-train simulate`, set --simulate LEVEL, or learn from dense masks with --supervision masks"
)


class SegmentationData(Dataset[Sample]):
    """Samples of one split. Which transform a sample gets depends on (seed, epoch, index) alone, which drawings are
    simulated on (seed, name of the image).

    ``data[index]`` is a `Sample` without the axis of batches, of epoch 0, ``data[epoch, index]`` that of another epoch.

    source: the images.
    config: transforms, ``simulate`` and what is learned from; None: the defaults.
    seed: an integer >= 0.
    training: with the transforms of the config, and only with the label maps that are to be learned from (``supervision``,
        ``dense_images``); the others are `IGNORE`. Else the whole image and all of its maps.
    channels: of every sample; grey images are repeated. None: as each image has.
    pen: what is undone in positive drawings (`open_pen`).

    Raises:
        ValueError: as it is made, naming the option that makes no sense, or the image without the mask that is needed; for
            training also where there is nothing to learn from.
        ValueError, OSError: as a sample is read, what `Source.load` raises; and for other channels than ``channels``.
        IndexError: there is no image of that index.
    """

    def __init__(
        self,
        source: Source,
        config: DataConfig | None = None,
        *,
        training: bool,
        seed: int = 0,
        channels: int | None = None,
        pen: Pen | None = None,
    ):
        config = config or DataConfig()
        self.source, self.seed, self.training, self.channels = source, seed, training, channels
        self.augment = Augment(config.crop, config.scale, config.flip, config.colour) if training else None
        self.simulated = None if config.simulate is None else _process(config.simulate, len(source.classes))
        if training and not len(source):
            raise ValueError(f"dataset {config.dataset}: expected at least one training image, got none")
        self.pen = pen
        self.dense: frozenset[int] = frozenset()
        if training and config.supervision in ("masks", "mixed"):
            self.dense = choose_dense(source, config, seed)
        if training:
            self._check_supervision()
        self._cache: dict[int, tuple[bytes, int]] = {}
        self._cached = 0

    def __len__(self) -> int:
        """How many images there are."""
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
        elif self.simulated is not None or self.pen is not None:
            record = self._drawn(record, index)
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
        """What a loader with `collate` gives. Raises what went wrong in a worker: what `Source.load` raises, or ValueError
        naming two images of one batch that differ in size or channels."""
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
            raise ValueError(NO_DRAWINGS)

    def _drawn(self, record: Record, index: int) -> Record:
        """The record with simulated drawings of the kinds that it lacks, and the pen undone."""
        kinds = self.source.kinds(index)
        simulated = self.simulated if record.mask is not None and not {"positive", "negative"} <= kinds else None
        if simulated is None and (self.pen is None or record.positive is None):
            return record
        if index in self._cache:
            packed, layers = self._cache[index]
            maps = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(1 + layers, *record.image.shape[:2])
        else:
            maps = self._draw(record, kinds, simulated)
            packed = zlib.compress(maps.tobytes())
            if self._cached + len(packed) <= _CACHE_BYTES:
                self._cache[index] = packed, len(maps) - 1
                self._cached += len(packed)
        return replace(record, positive=maps[0], negative=maps[1:] if simulated is not None else record.negative)

    def _draw(self, record: Record, kinds: frozenset[str], simulated: Process | None) -> np.ndarray:
        """(1 + K, H, W): positive and, where they are simulated or were and are to be kept with them, negative drawings."""
        positive, negative = record.positive, record.negative
        if simulated is not None:
            assert record.mask is not None
            drawn = draw_coarse(record.mask, simulated, generator_for(self.seed, record.name))
            positive = positive if "positive" in kinds else drawn[0]
            negative = negative if "negative" in kinds else drawn[1]
        else:
            negative = None
        assert positive is not None
        if self.pen is not None:
            positive = undo(positive, self.pen)
        return positive[None] if negative is None else np.concatenate([positive[None], negative])


def _process(name: str, num_classes: int) -> Process:
    try:
        return level(name, num_classes)
    except ValueError as error:
        raise ValueError(f"simulate: {error}") from error


def choose_dense(source: Source, config: DataConfig, seed: int) -> frozenset[int]:
    """The training images whose dense mask may be read: ``dense_images`` of those that have one, or all with supervision masks
    and no number.

    Raises ValueError where there are not so many, or supervision masks finds an image without one.
    """
    with_mask = [index for index in range(len(source)) if "mask" in source.kinds(index)]
    if config.supervision == "masks" and not config.dense_images:
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


def plain(config: DataConfig) -> DataConfig:
    """Without transforms."""
    return replace(config, crop=None, scale=(1.0, 1.0), flip=False, colour=0.0)


def open_pen(config: FitConfig, source: Source) -> tuple[Pen | None, PenReport | None]:
    """What is to be undone in the positive drawings of ``source``, the training split, and how it was measured.

    Raises ValueError naming what is wrong with the file, or where no image has both a mask that may be read and a drawing.
    """
    given, names = config.positive.pen, source.classes.names
    if given is None or config.data.supervision == "masks":
        return None, None
    report = None
    if isinstance(given, Path):
        pen = read_pen(given, names)
    elif isinstance(given, float | int):
        pen = Pen.of_objects(given, names)
    else:
        dense = sorted(choose_dense(source, config.data, config.seed))
        report = measure(pairs_of(source, config.data, config.seed, dense), names)
        pen = report.pen(each=given == "image")
    return replace(pen, band=config.positive.band, doubt=config.positive.doubt), report


def pairs_of(
    source: Source, data: DataConfig, seed: int, indices: Iterable[int]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, positive drawing and mask of those of the images that have both: what `measure` takes."""
    dataset = SegmentationData(source, plain(data), training=False, seed=seed)
    for index in indices:
        kinds = source.kinds(index)
        if "mask" in kinds and ("positive" in kinds or data.simulate is not None):
            sample = dataset[index]
            yield source.name(index), sample.positive.numpy(), sample.mask.numpy()


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
