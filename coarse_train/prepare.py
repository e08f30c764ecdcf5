"""What has to be right before the first step: the config, the run folder, the transition, the validation images."""

from __future__ import annotations

import fcntl
import math
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import coarse_kernels
from coarse_kernels import TransitionMatrix

from . import checkpoint
from .config import FitConfig, from_dict, to_dict
from .data import IGNORE, FolderNotFound, Source, Subset, open_split
from .data.segmentation import SegmentationData
from .distributed import World

_TRANSITION_IMAGES = 200  # enough for C x C counts: 35 million pixels of CamVid
# what may differ between a run and its continuation: nothing that changes a step
_FREE = {"out", "resume", "save_every", "accumulate", "backend", "device", "threads", "fsdp", "compile"}
_FREE |= {"data.root", "data.workers"}
_LARGEST_SEED = 2**31 - 1  # `engine.step_seed` stays below 2 ** 64
_MOVABLE = {"data.positives", "data.negatives"}  # another folder is fine; one where there was none is other data


def check_config(config: FitConfig) -> None:
    """Raises ValueError naming the field, what came and what was expected."""
    at_least_one = ("steps", "batch_size", "accumulate", "save_every")
    optional = ("evaluate_every", "threads")
    if config.data.workers < 0:
        raise ValueError(f"workers: expected a number >= 0, got {config.data.workers}")
    for name in (*at_least_one, *optional):
        value = getattr(config, name)
        if value is None and name in optional:
            continue
        if value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    for owner, name, low, high in (
        (config.optim, "warmup", 0.0, 1.0),
        (config.optim, "hold", 0.0, 1.0),
        (config.optim, "lr", 0.0, None),
        (config.optim, "cm_lr", 0.0, None),
        (config.optim, "weight_decay", 0.0, None),
        (config.optim, "clip", 0.0, None),
        (config, "seed", 0, _LARGEST_SEED),
        (config.optim, "ema", 0.0, 1.0),
        (config.optim, "momentum", 0.0, 1.0),
        (config.data, "colour", 0.0, 1.0),
        (config, "mask_weight", 0.0, None),
        (config, "select_with", 0, None),
        (config, "select_steps", 0, None),
    ):
        value = getattr(owner, name)
        if value is not None and not (math.isfinite(value) and low <= value and (high is None or value <= high)):
            bound = f"from {low:g} to {high:g}" if high is not None else f">= {low:g}"
            raise ValueError(f"{name}: expected a number {bound}, got {value}")
    for side in ("positive", "negative"):
        kind = getattr(config, side)
        for name in ("weight", "trace_weight"):
            value = getattr(kind, name)
            if not (math.isfinite(value) and (value >= 0 or name == "trace_weight")):
                raise ValueError(f"{side}.{name}: expected a number >= 0, got {value}")
        if kind.weight == 0 and kind.cm != "none":
            raise ValueError(f"{side}.cm: expected none where {side}.weight is 0, got {kind.cm!r}")
        if kind.stride < 1:
            raise ValueError(f"{side}.stride: expected a number >= 1, got {kind.stride}")
    if config.negative.weight == 0 and config.transition == "learned":
        raise ValueError("transition: expected none to be learned where negative.weight is 0, got 'learned'")
    if config.select_steps is not None and not config.select_with:
        raise ValueError(f"select_steps: expected --select-with, which it belongs to, got {config.select_steps} alone")
    if config.data.supervision == "masks" and config.mask_weight == 0:
        raise ValueError("mask_weight: expected a number above 0 with supervision masks, got 0")
    mixed, dense = config.data.supervision == "mixed", config.data.dense_images
    if mixed != (dense > 0):
        expected = "a number >= 1 with supervision mixed" if mixed else "0 unless supervision is mixed"
        raise ValueError(f"dense_images: expected {expected}, got {dense}")
    available = coarse_kernels.available_backends()
    if config.backend is not None and config.backend not in available:
        raise ValueError(f"backend: expected one that can run here {available}, got {config.backend!r}")


@contextmanager
def prepare_out(config: FitConfig, world: World) -> Iterator[None]:
    """Fail before the training rather than after it: a folder that can be written, no other run in it, and, until the end,
    no other process."""
    last = config.out / "last.pt"
    if last.exists() and not config.resume:
        raise ValueError(f"out: expected a new folder or --resume, got {config.out} with the checkpoint of a run")
    with ExitStack() as stack:
        if world.is_main:
            try:
                config.out.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=config.out) as file:
                    file.write(bytes(1 << 16))  # an empty file fits on a full disk
                    file.flush()
                lock = stack.enter_context(open(config.out / ".lock", "w"))
            except OSError as error:
                raise ValueError(f"out: expected a folder that can be written, got {config.out} ({error})") from error
            try:
                # Goes with this process, whatever ends it; flock would stay with the workers of a run that was killed.
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(f"out: expected a folder that no other run writes to, got {config.out}") from error
            if not config.resume:
                (config.out / "best.pt").unlink(missing_ok=True)  # of a run that was given up
        world.wait()
        yield


def read_resume(config: FitConfig) -> dict[str, Any] | None:
    """The checkpoint to go on from. None: start anew. Raises ValueError where a field that changes steps differs."""
    last = config.out / "last.pt"
    if not config.resume or not last.exists():
        return None
    content = checkpoint.load(last)
    check_same_run(from_dict(content["config"]), config)
    return content


def check_same_run(before: FitConfig, now: FitConfig) -> None:
    """Raises ValueError where a field that changes steps differs, naming it."""
    one, other = _flat(to_dict(before)), _flat(to_dict(now))
    free = _FREE if now.model.norm == "group" else _FREE - {"accumulate"}  # batch normalisation sees the parts
    for name in one:
        pair = one[name], other[name]
        if name in _MOVABLE:
            pair = pair[0] is not None, pair[1] is not None
        if name not in free and pair[0] != pair[1]:
            raise ValueError(f"resume: expected {name} as in the run, {one[name]!r}, got {other[name]!r}")


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def count_channels(source: Source) -> int:
    """1, or 3 where one of the first images has colours; grey ones among them are repeated."""
    return max(source.load(index).image.shape[2] for index in range(min(len(source), 8)))


def describe_data(source: Source, validation: Source | None, channels: int) -> dict[str, Any]:
    """What has to be the same for a run to go on: classes, channels, and which images there are, as checksums."""
    names = {"training images": source, "validation masks": validation}
    return {
        "classes": list(source.classes.names),
        "label values": list(source.classes.file_ids),
        "channels": channels,
        **{
            name: 0 if part is None else zlib.crc32("\n".join(part.name(k) for k in range(len(part))).encode())
            for name, part in names.items()
        },
    }


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """``before``, ``now``: of `describe_data`. Raises ValueError saying what is no more as it was in the run."""
    for name, value in before.items():
        if value != now[name]:
            told = "" if isinstance(value, int) and name != "channels" else f" {value}, got {now[name]}"
            raise ValueError(f"resume: expected the {name} of the run{told or ', got others'}")


def describe_source(source: Source) -> str:
    """How many images there are, and with what."""
    found = [source.kinds(index) for index in range(len(source))]
    counts = {kind: sum(kind in kinds for kinds in found) for kind in ("positive", "negative", "mask")}
    return f"{len(source)} training images, " + ", ".join(f"{count} with {kind}" for kind, count in counts.items())


def open_transition(config: FitConfig, source: Source) -> TransitionMatrix:
    """(C, C) [true, named], as the config says."""
    classes = len(source.classes)
    kind = config.transition
    if isinstance(kind, Path):
        try:
            values = np.load(kind, allow_pickle=False)
            if values.dtype.kind not in "fiub":
                raise TypeError(f"dtype {values.dtype}")
            matrix = torch.from_numpy(values.astype(np.float32))
        except (OSError, ValueError, TypeError) as error:
            raise ValueError(
                f"transition: expected a .npy file with a ({classes}, {classes}) matrix, got {kind} ({error})"
            ) from error
        if matrix.shape != (classes, classes):
            raise ValueError(f"transition: expected shape ({classes}, {classes}), got {tuple(matrix.shape)} in {kind}")
        try:
            return TransitionMatrix.fixed(matrix)
        except ValueError as error:
            raise ValueError(f"transition: {kind}: {error}") from error
    if kind == "learned":
        return TransitionMatrix.learned(classes)
    if kind == "estimated":
        return TransitionMatrix.estimated(*_meeting_labels(config, source), classes, ignore_index=IGNORE)
    return TransitionMatrix.uniform(classes)


def _meeting_labels(config: FitConfig, source: Source) -> tuple[Tensor, Tensor]:
    """Positive and negative labels, (N,) each, of the pixels that have both, in the first training images."""
    plain = replace(config.data, crop=None, scale=(1.0, 1.0), flip=False, colour=0.0)
    dataset = SegmentationData(source, plain, seed=config.seed, training=True)
    positives, negatives = [], []
    for index in range(min(len(dataset), _TRANSITION_IMAGES)):
        sample = dataset[index]
        for layer in sample.negative:
            both = (sample.positive != IGNORE) & (layer != IGNORE)
            positives.append(sample.positive[both])
            negatives.append(layer[both])
    positive = torch.cat(positives)
    if not len(positive):
        raise ValueError(
            "transition: expected pixels with a positive and a negative drawing to estimate it from, got none"
        )
    return positive, torch.cat(negatives)


def open_validation(config: FitConfig) -> Source | None:
    """The images that are scored during training: ``select_with`` of those with masks, chosen by the seed, or, where masks
    choose nothing, all of them. None: there are no masks."""
    try:
        source = open_split(config.data, "val")
    except FolderNotFound:
        if config.select_with:
            raise
        return None
    with_mask = [index for index in range(len(source)) if "mask" in source.kinds(index)]
    if not config.select_with:
        return Subset(source, with_mask) if with_mask else None
    if len(with_mask) < config.select_with:
        raise ValueError(
            f"select_with: expected at most the {len(with_mask)} masks of the split, got {config.select_with}"
        )
    chosen = np.random.default_rng([config.seed, 7]).permutation(len(with_mask))[: config.select_with]
    return Subset(source, [with_mask[k] for k in sorted(chosen)])
