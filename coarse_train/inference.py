"""Class probabilities and classes of whole images: in one piece, in overlapping windows, and with mirrored copies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from coarse_kernels import label_map

from .data.images import with_channels


@dataclass(frozen=True)
class InferenceConfig:
    """How an image goes through the network."""

    window: tuple[int, int] | None = None
    """Height and width of a sliding window; without it the whole image at once. Images that are smaller are padded."""
    overlap: float = 0.5
    """Share of a window that the next one covers again, at least. Where windows overlap, probabilities are averaged."""
    flips: bool = False
    """Average the probabilities with those of the image mirrored left and right."""

    def __post_init__(self) -> None:
        if self.window is not None and (len(self.window) != 2 or min(self.window) < 1):
            raise ValueError(f"window: expected a height and a width of at least 1, got {self.window}")
        if not 0 <= self.overlap < 1:
            raise ValueError(f"overlap: expected a share from 0 to below 1, got {self.overlap}")

    def __str__(self) -> str:
        how = "whole images" if self.window is None else "windows of {} x {}".format(*self.window)
        how += "" if self.window is None else f" that overlap by {self.overlap:g}"
        return how + (", mirrored copies" if self.flips else "")


def to_input(image: np.ndarray, channels: int, name: str) -> Tensor:
    """(H, W, 1 or 3) uint8 -> (1, ``channels``, H, W) float32 in [0, 1], as in training.

    Grey is repeated for a colour network. Raises ValueError naming the image where the channels do not fit.
    """
    planes = torch.from_numpy(with_channels(image, channels, name).transpose(2, 0, 1).copy())
    return planes[None].float() / 255


@torch.no_grad()
def probabilities(segmentation: nn.Module, image: Tensor, config: InferenceConfig, num_classes: int) -> Tensor:
    """Mean of the softmax over all windows that hold a pixel, and over mirrored copies.

    The mean is formed in place: beside the result there is one window's output at a time.

    Shape: (B, channels, H, W) -> (B, C, H, W) float32.
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

    Shape: (B, channels, H, W) -> (B, H, W) uint8, or int64 above 256 classes.
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
