"""Which configs make sense: what each field may be, and what goes together. `config.py` says what they mean."""

from __future__ import annotations

import math
from typing import get_args

import coarse_kernels

from .config import FitConfig, Measured

_LARGEST_RATE = 1e6  # beyond, the first step leaves float32
_LARGEST_WEIGHT = 1e30  # of a class, whose sum is divided by; 1e39 is no float32, and 1e-46 is 0
_LARGEST_STRIDE = 1024  # a place for each of so many pixels; "image" has one for all
_LARGEST_PEN = 1000  # pixels
MOST_WORKERS = 1024  # processes, or threads: more start none, and some machines none at all
_LARGEST_SEED = 2**31 - 1  # `learner.step_seed` stays below 2 ** 64


def check_config(config: FitConfig) -> None:
    """Raises ValueError naming the field, what came and what was expected."""
    _check_numbers(config)
    _check_drawings(config)
    _check_masks(config)
    available = coarse_kernels.available_backends()
    if config.backend is not None and config.backend not in available:
        raise ValueError(f"backend: expected one that can run here {available}, got {config.backend!r}")


def _check_numbers(config: FitConfig) -> None:
    """Single fields; where one may be None it is not looked at."""
    for owner, name, low, high in (
        (config, "steps", 1, None),
        (config, "batch_size", 1, None),
        (config, "accumulate", 1, None),
        (config, "save_every", 1, None),
        (config, "evaluate_every", 1, None),
        (config, "threads", 1, MOST_WORKERS),
        (config, "seed", 0, _LARGEST_SEED),
        (config, "mask_weight", 0, None),
        (config, "save_minutes", 0, None),
        (config, "select_with", 0, None),
        (config, "select_steps", 0, None),
        (config, "pictures", 0, None),
        (config, "opacity", 0, 1),
        (config.data, "max_pixels", 1, None),
        (config.data, "workers", 0, MOST_WORKERS),
        (config.data, "dense_share", 0, 1),
        (config.data, "colour", 0, 1),
        (config.optim, "lr", 0, _LARGEST_RATE),
        (config.optim, "cm_lr", 0, _LARGEST_RATE),
        (config.optim, "weight_decay", 0, None),
        (config.optim, "momentum", 0, 1),
        (config.optim, "warmup", 0, 1),
        (config.optim, "hold", 0, 1),
        (config.optim, "clip", 0, None),
        (config.optim, "ema", 0, 1),
        (config.optim, "finetune", 0, 1),
        (config.optim, "finetune_lr", 0, _LARGEST_RATE),
    ):
        value = getattr(owner, name)
        if value is not None and not (math.isfinite(value) and low <= value and (high is None or value <= high)):
            bound = f"from {low} to {high}" if high is not None else f">= {low}"
            raise ValueError(f"{name}: expected a number {bound}, got {value}")
    if config.optim.ema == 1:
        raise ValueError("ema: expected a number below 1, which would keep what was there before the first step, got 1")
    weights = config.class_weight
    if isinstance(weights, tuple) and not (
        all(w == 0 or 1 / _LARGEST_WEIGHT <= w <= _LARGEST_WEIGHT for w in weights) and any(weights)
    ):
        raise ValueError(
            f"class_weight: expected numbers from {1 / _LARGEST_WEIGHT:g} to {_LARGEST_WEIGHT:g}, or some 0, got {weights}"
        )
    if config.select_steps is not None and not config.select_with:
        raise ValueError(f"select_steps: expected --select-with, which it belongs to, got {config.select_steps} alone")
    if config.resume_changed and not config.resume:
        raise ValueError("resume_changed: expected --resume, which it belongs to, got it alone")


def _check_drawings(config: FitConfig) -> None:
    """What explains each kind of drawings."""
    for side in ("positive", "negative"):
        kind = getattr(config, side)
        if not (math.isfinite(kind.weight) and kind.weight >= 0):
            raise ValueError(f"{side}.weight: expected a number >= 0, got {kind.weight}")
        if not math.isfinite(kind.trace_weight):
            raise ValueError(f"{side}.trace_weight: expected a finite number, got {kind.trace_weight}")
        if kind.weight == 0 and kind.cm not in ("none", "auto"):
            raise ValueError(f"{side}.cm: expected none where {side}.weight is 0, got {kind.cm!r}")
        if kind.missing is not None and kind.cm != "none" and kind.structure != "full":
            raise ValueError(f"{side}.missing: expected None with structure {kind.structure!r}, got {kind.missing}")
        if not 1 <= kind.stride <= _LARGEST_STRIDE:
            raise ValueError(f"{side}.stride: expected a number from 1 to {_LARGEST_STRIDE}, got {kind.stride}")
        if isinstance(kind.pen, float | int) and not abs(kind.pen) <= _LARGEST_PEN:
            raise ValueError(f"{side}.pen: expected a number of pixels, auto, image or a file, got {kind.pen}")
        for name, pixels in (("band", kind.band), ("doubt", kind.doubt)):
            if not pixels >= 0 or (pixels > 0 and kind.pen is None):
                raise ValueError(f"{side}.{name}: expected a number >= 0, and 0 without {side}.pen, got {pixels}")
    if config.negative.pen is not None:
        raise ValueError(
            f"negative.pen: expected None, since negative drawings need not follow outlines, got {config.negative.pen}"
        )
    if config.negative.weight == 0 and config.transition == "learned":
        raise ValueError("transition: expected none to be learned where negative.weight is 0, got 'learned'")


def _check_masks(config: FitConfig) -> None:
    """Which masks are read, and for what."""
    supervision, dense = config.data.supervision, config.data.dense_images
    if supervision != "drawings" and config.mask_weight == 0:
        raise ValueError(f"mask_weight: expected a number above 0 with supervision {supervision}, got 0")
    measured = config.positive.pen in get_args(Measured)
    if config.positive.pen is not None and supervision == "masks":
        raise ValueError(
            f"positive.pen: expected None with supervision masks, which reads no drawings, got {config.positive.pen!r}"
        )
    expected = None
    if dense < 0:
        expected = "a number >= 0"
    elif config.data.dense_split == "val" and supervision != "then-masks":
        raise ValueError(f"dense_split: expected train with supervision {supervision}, got 'val'")
    elif dense == 0 and supervision not in ("drawings", "masks"):
        expected = f"a number >= 1 with supervision {supervision}"
    elif dense == 0 and measured:
        expected = (
            "a number >= 1 with positive.pen auto or image, which is measured on images with a mask and a drawing"
        )
    elif dense > 0 and supervision == "drawings" and not measured:
        expected = (
            "0 with supervision drawings, unless positive.pen is auto or image; --supervision mixed learns from them"
        )
    if expected is not None:
        raise ValueError(f"dense_images: expected {expected}, got {dense}")
    if config.data.dense_split == "val":
        if config.select_with not in (0, dense):
            raise ValueError(
                f"select_with: expected 0 or as many as dense_images, {dense}, with dense_split val, which learns from those "
                f"masks, got {config.select_with}"
            )
        if measured:
            raise ValueError(
                f"positive.pen: expected None, a number or a file with dense_split val, got {config.positive.pen!r}"
            )
    share = config.data.dense_share
    if share is not None and (not 0 < share < 1 or not supervision.startswith("mixed")):
        raise ValueError(
            f"dense_share: expected a number between 0 and 1 with supervision mixed, else None, got {share}"
        )
    if supervision.endswith("then-masks") and not 0 < config.optim.finetune < 1:
        raise ValueError(f"finetune: expected a number between 0 and 1, got {config.optim.finetune}")
