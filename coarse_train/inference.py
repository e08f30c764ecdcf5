"""What a trained network says: of an image in one piece, in overlapping windows and with mirrored copies; of a data set,
one image after the other, and scored against its dense masks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from coarse_kernels import TransitionMatrix, label_map

from . import run
from .config import DataConfig, FitConfig, from_dict
from .data import Classes, Record, Source, open_split
from .data.images import LARGEST_SIDE, with_channels
from .distributed import World
from .metrics import ConfusionMeter, mean_iou_of
from .model import CoarseModel, build_model
from .model.networks import check_named

_TOGETHER = 1 << 17  # pixels in one call of a network: images of 48x48 one by one take twice as long


@dataclass(frozen=True)
class InferenceConfig:
    """How an image goes through the network.

    Raises:
        ValueError: naming the field, what came and what was expected.
    """

    window: tuple[int, int] | None = None
    """Height and width of a sliding window, in pixels; without it the whole image at once. Images that are smaller are
    padded."""
    overlap: float = 0.5
    """Share of a window that the next one covers again, at least: from 0 to below 1. Where windows overlap, probabilities are
    averaged."""
    flips: bool = False
    """Average the probabilities with those of the image mirrored left and right."""

    def __post_init__(self) -> None:
        if self.window is not None and not (
            isinstance(self.window, tuple | list)
            and len(self.window) == 2
            and all(isinstance(side, Integral) and 1 <= side <= LARGEST_SIDE for side in self.window)
        ):
            raise ValueError(f"window: expected a height and a width from 1 to {LARGEST_SIDE}, got {self.window}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: expected a share from 0 to below 1, got {self.overlap}")

    def __str__(self) -> str:
        how = "whole images" if self.window is None else "windows of {} x {}".format(*self.window)
        how += "" if self.window is None else f" that overlap by {self.overlap:g}"
        return how + (", mirrored copies" if self.flips else "")


def to_input(image: np.ndarray, channels: int, name: str) -> Tensor:
    """(H, W, 1 or ``channels``) uint8 -> (1, ``channels``, H, W) float32 in [0, 1], as in training.

    Grey is repeated for a colour network. Raises ValueError naming the image, ``name``, where it has other channels.
    """
    planes = torch.from_numpy(with_channels(image, channels, name).transpose(2, 0, 1).copy())
    return planes[None].float() / 255


@torch.no_grad()
def probabilities(segmentation: nn.Module, image: Tensor, config: InferenceConfig, num_classes: int) -> Tensor:
    """Mean of the softmax over all windows that hold a pixel, and over mirrored copies.

    The mean is formed in place: beside the result there is one window's output at a time. The network is called in the mode
    that it is in; nothing carries gradient.

    Args:
        segmentation: (B, channels, H, W) -> (B, C, h, w) logits, on a grid of their own.
        image: (B, channels, H, W) in [0, 1], such as `to_input` gives.
        config: windows and mirrored copies.
        num_classes: C.

    Returns:
        (B, C, H, W) float32 on the device of the image; 1 in sum over C.

    Raises:
        ValueError: the network returns no (B, C, h, w); naming the shapes that came and that was expected.
    """
    height, width = image.shape[-2:]
    total = torch.zeros(len(image), num_classes, height, width, device=image.device)
    times = torch.zeros(height, width, device=image.device)
    for rows, columns in _windows(height, width, config):
        part = image[..., rows, columns]
        for mirrored in (False, True) if config.flips else (False,):
            found = _logits(segmentation, part.flip(-1) if mirrored else part, config, num_classes).softmax(1)
            total[..., rows, columns] += found.flip(-1) if mirrored else found
            times[rows, columns] += 1
    return total.div_(times)


@torch.no_grad()
def predict(segmentation: nn.Module, image: Tensor, config: InferenceConfig, num_classes: int) -> Tensor:
    """The most probable class. Where one pass through the network holds the whole image there is nothing to average, and
    no probability and no logit at full resolution is formed; over windows or mirrored copies the sum of `probabilities` is.

    The network's grid may be coarser or finer than the image: its logits are interpolated to it. (Finer ones are so by
    PyTorch, at full resolution: `label_map` serves grids up to the pixels'.)

    Args:
        segmentation, image, config, num_classes: as in `probabilities`.

    Returns:
        (B, H, W) uint8, or int64 above 256 classes, on the device of the image. Among equals the first class wins.

    Raises:
        ValueError: as `probabilities`.
    """
    height, width = image.shape[-2:]
    passes = (1 + config.flips) * len(list(_windows(height, width, config)))
    if passes > 1:
        return _most_probable(probabilities(segmentation, image, config, num_classes))
    padded = _padded(image, config)
    logits = _run(segmentation, padded, num_classes)
    if any(points > pixels for points, pixels in zip(logits.shape[-2:], padded.shape[-2:], strict=True)):
        return _most_probable(_at(logits.float(), padded.shape[-2:]))[..., :height, :width]
    return label_map(logits, padded.shape[-2:])[..., :height, :width]


def _most_probable(scores: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H, W), in the dtype of `label_map`."""
    labels = scores.argmax(1)
    return labels.to(torch.uint8) if scores.shape[1] <= 256 else labels


def _windows(height: int, width: int, config: InferenceConfig) -> Iterator[tuple[slice, slice]]:
    window = config.window or (height, width)
    for rows in _places(height, window[0], config.overlap):
        for columns in _places(width, window[1], config.overlap):
            yield rows, columns


def _places(size: int, window: int, overlap: float) -> list[slice]:
    """Slices of length min(window, size) that cover an axis; the last is moved back to end with it."""
    window = min(window, size)
    stride = max(1, int(window * (1 - overlap)))
    starts = [*range(0, size - window, stride), size - window]
    return [slice(start, start + window) for start in starts]


def _padded(part: Tensor, config: InferenceConfig) -> Tensor:
    """(B, channels, h, w), continued with its border to the size of the window."""
    height, width = part.shape[-2:]
    tall, wide = config.window or (height, width)
    return part if (tall, wide) == (height, width) else pad(part, (0, wide - width, 0, tall - height), mode="replicate")


def _run(segmentation: nn.Module, part: Tensor, num_classes: int) -> Tensor:
    """(B, channels, H, W) -> (B, C, h, w), the network's own grid and dtype."""
    logits: Tensor = segmentation(part)
    if logits.dim() != 4 or logits.shape[:2] != (len(part), num_classes):
        raise ValueError(
            f"segmentation: expected logits ({len(part)}, {num_classes}, h, w) for an image {tuple(part.shape)}, "
            f"got {tuple(logits.shape)}"
        )
    return logits


def _logits(segmentation: nn.Module, part: Tensor, config: InferenceConfig, num_classes: int) -> Tensor:
    """(B, channels, H, W) -> (B, C, H, W) float32; ``part`` is padded to the window, the network's grid may be another."""
    height, width = part.shape[-2:]
    padded = _padded(part, config)
    return _at(_run(segmentation, padded, num_classes).float(), padded.shape[-2:])[..., :height, :width]


def _at(logits: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits
    return interpolate(logits, size, mode="bilinear", align_corners=False)


# ---- a trained network -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and all that is needed to use it.

    model: the networks; with an exponential moving average they have that one's parameters.
    config: of the run.
    classes: of the data set that it was trained on; plane c of the logits is class c of it.
    channels: of its images, 1 or 3.
    step: the optimizer step after which the checkpoint was written.
    """

    model: CoarseModel
    config: FitConfig
    classes: Classes
    channels: int
    step: int


def load_model(path: Path, device: torch.device | str = "cpu", *, network: str | None = None) -> LoadedModel:
    """Network, config and class table from a checkpoint alone, in evaluation mode on ``device``.

    Args:
        path: last.pt or best.pt of a run.
        device: where the parameters are put.
        network: of a network that is none of ours its import path, as in the run: a checkpoint alone makes no code run.

    Raises:
        FileNotFoundError: there is no such file.
        coarse_train.run.CheckpointError: the file is damaged, no checkpoint, or of another format.
        ValueError: its config has a field that there is not; its network is code that ``network`` does not name, or that
            cannot be imported; or it is segformer, without the package transformers.
    """
    content = run.load(Path(path))
    lacking = [
        key for key in ("config", "classes", "model", "ema", "architecture", "channels", "step") if key not in content
    ]
    if lacking:
        raise run.CheckpointError(
            f"{path}: expected last.pt or best.pt of a run, got a file without {', '.join(lacking)}"
        )
    config = from_dict(content["config"])
    check_named(path, config.model.network, network)
    classes = Classes(**content["classes"])
    transition, architecture = transition_of(content["model"]), content["architecture"]
    model = build_model(config, content["channels"], len(classes), transition, architecture=architecture, trained=True)
    model.load_state_dict(content["ema"] if content["ema"] is not None else content["model"])
    return LoadedModel(model.to(device).eval(), config, classes, content["channels"], content["step"])


def transition_of(state: dict[str, Any]) -> TransitionMatrix | None:
    """A TransitionMatrix of the kind that is in ``state``, the state_dict of a `CoarseModel`, which then fills it; None
    without one."""
    if "transition.logits" in state:
        return TransitionMatrix.learned(len(state["transition.logits"]))
    return TransitionMatrix.fixed(state["transition.matrix"]) if "transition.matrix" in state else None


def open_trained_split(
    loaded: LoadedModel,
    split: str,
    *,
    root: Path | None = None,
    dataset: str | None = None,
    variant: str | None = None,
    skip_bad: bool = False,
    max_pixels: int | None = None,
) -> Source:
    """Images and masks of the data set that a network was trained on, or of another one with the same classes.

    The drawings, limits and exceptions of the training do not apply.

    Args:
        loaded: the network.
        split: "train", "val" or "test".
        root, variant: those of the training unless given; of another data set the defaults of `DataConfig`.
        dataset: one of `coarse_train.data.DATASETS`; None: the one of the training.
        skip_bad: leave out what is bad, as in `DataConfig`.
        max_pixels: of an image; None: as in the training.

    Raises:
        ValueError: the names of the classes are not those of the network; and as `open_split`.
        FileNotFoundError: as `open_split`.
    """
    trained = loaded.config.data
    if dataset not in (None, trained.dataset):
        trained = DataConfig()
    data = DataConfig(
        dataset=dataset or trained.dataset,
        root=root or trained.root,
        variant=trained.variant if variant is None else variant,
        skip_bad=skip_bad,
        max_pixels=max_pixels or loaded.config.data.max_pixels,
    )
    source = open_split(data, split)
    if source.classes.names != loaded.classes.names:
        raise ValueError(
            f"{data.dataset}: expected the classes of the checkpoint {loaded.classes.names}, got {source.classes.names}"
        )
    return source


def predictions(
    segmentation: nn.Module,
    source: Source,
    indices: Sequence[int],
    world: World,
    *,
    channels: int | None,
    config: InferenceConfig,
    workers: int = 0,
) -> Iterator[tuple[Record, Tensor]]:
    """The records at ``indices``, in order, each with its predicted classes, (H, W) uint8 on the device of ``world``.

    In evaluation mode, and back in its own at the end; small images that follow each other and have one size go through the
    network together, others one by one.

    Args:
        segmentation: as in `probabilities`, on the device of ``world``.
        source: the images; it has as many classes as the network.
        indices: of the images, in any order.
        world: this process; it predicts all of ``indices`` itself.
        channels: of the network; None: as the image has.
        config: windows and mirrored copies.
        workers: processes that read images; 0: this one does.

    Raises:
        ValueError, OSError: an image cannot be loaded (`Source.load`); raised when it is its turn.
        ValueError: an image has other channels than ``channels``; and as `probabilities`.
    """
    was_training = segmentation.training
    segmentation.eval()
    loader = DataLoader(_Records(source, indices), batch_size=None, collate_fn=_as_it_is, num_workers=workers)
    # a network that is sharded waits for all processes in every call
    pixels = _TOGETHER if world.size == 1 else 1
    try:
        for records in _alike(loader, pixels):
            images = [to_input(one.image, channels or one.image.shape[2], one.name) for one in records]
            found = predict(segmentation, torch.cat(images).to(world.device), config, len(source.classes))
            yield from zip(records, found, strict=True)
    finally:
        segmentation.train(was_training)


def _alike(records: Iterable[Record | Exception], pixels: int) -> Iterator[list[Record]]:
    """Neighbours of one size, as many as have so many pixels together, at least one. An exception is raised in its turn."""
    group: list[Record] = []
    for record in records:
        if group and (isinstance(record, Exception) or not _fits(record, group, pixels)):
            yield group
            group = []
        if isinstance(record, Exception):
            raise record
        group.append(record)
    if group:
        yield group


def _fits(record: Record, group: list[Record], pixels: int) -> bool:
    shape = record.image.shape
    return shape == group[0].image.shape and (len(group) + 1) * shape[0] * shape[1] <= pixels


class _Records(Dataset["Record | Exception"]):
    """An exception is handed over like a record: a worker's own way wraps it in a traceback of many lines."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Record | Exception:
        try:
            return self.source.load(self.indices[place])
        except (ValueError, OSError) as error:
            return error


def _as_it_is(record: Any) -> Any:
    return record


class Scores(NamedTuple):
    """What `score` counts.

    meter: over all images.
    images: (images,) float64 mean IoU of each on its own, in percent, on the CPU; NaN where no pixel has a class.
    """

    meter: ConfusionMeter
    images: Tensor


def score(
    segmentation: nn.Module,
    source: Source,
    *,
    world: World,
    channels: int | None = None,
    config: InferenceConfig | None = None,
    workers: int = 0,
    on_prediction: Callable[[Record, np.ndarray], None] | None = None,
) -> Scores:
    """Count predictions against masks, over all processes of ``world``; all get the same scores.

    Every process runs the network on equally many images, since one that is sharded waits for all; those that some do
    to no purpose are not counted. Pixels whose mask is `IGNORE` (255) count nowhere.

    Args:
        segmentation, channels, workers: as in `predictions`.
        source: images that all have a mask.
        world: the processes that share the images.
        config: windows and mirrored copies; None: whole images.
        on_prediction: gets the images that this process counts, with their (H, W) uint8 classes.

    Raises:
        ValueError: naming an image that has no mask, before the first is read; and as `predictions`.
        OSError: as `predictions`.
    """
    count = len(source)
    bare = [source.name(index) for index in range(count) if "mask" not in source.kinds(index)]
    if bare:
        raise ValueError(f"evaluate needs dense masks; {len(bare)} of {count} images have none, such as {bare[0]}")
    places = range(world.rank, math.ceil(count / world.size) * world.size, world.size)
    own = [place % count for place in places]
    meter, images = ConfusionMeter(len(source.classes)), torch.zeros(count, dtype=torch.float64)
    how = config or InferenceConfig()
    found = predictions(segmentation, source, own, world, channels=channels, config=how, workers=workers)
    bar = tqdm(found, total=len(own), unit="image", leave=False, disable=None if world.is_main else True)
    for place, (record, predicted) in zip(places, bar, strict=True):
        if place < count:
            assert record.mask is not None  # `kinds` says so
            images[place] = mean_iou_of(meter.update(predicted, torch.from_numpy(record.mask).to(world.device)))
            if on_prediction is not None:
                on_prediction(record, predicted.cpu().numpy())
    if world.size > 1:
        meter.reduce()
    return Scores(meter, world.sum(images))
