"""Random transforms of a `Record`: one geometry for the image and all of its label maps, colours for the image alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from . import Record, Sample
from .classes import IGNORE
from .images import LARGEST_SIDE

_LARGEST_ZOOM = 64
_GREY = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, as in Pillow's "L"


@dataclass(frozen=True)
class Augment:
    """What `DataConfig` says of crop, scale, flip and colour."""

    crop: tuple[int, int] | None = None
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = False
    colour: float = 0.0

    def __post_init__(self) -> None:
        if self.crop is not None and not (len(self.crop) == 2 and all(1 <= side <= LARGEST_SIDE for side in self.crop)):
            raise ValueError(f"crop: expected height and width from 1 to {LARGEST_SIDE}, got {self.crop}")
        if not 1 / _LARGEST_ZOOM <= self.scale[0] <= self.scale[1] <= _LARGEST_ZOOM:
            raise ValueError(
                f"scale: expected two numbers from 1/{_LARGEST_ZOOM} to {_LARGEST_ZOOM}, the smaller first, got {self.scale}"
            )
        if not 0 <= self.colour <= 1:
            raise ValueError(f"colour: expected a number from 0 to 1, got {self.colour}")


class Geometry(NamedTuple):
    """A part of the zoomed image, and where it comes in the result.

    zoomed: (height, width) of the whole image after the zoom. top, left, height, width: the part of it that is seen.
    above, before: rows and columns of padding ahead of it. size: (height, width) of the result.
    """

    zoomed: tuple[int, int]
    top: int
    left: int
    height: int
    width: int
    above: int
    before: int
    size: tuple[int, int]
    mirrored: bool

    @classmethod
    def draw(cls, height: int, width: int, augment: Augment, rng: np.random.Generator) -> Geometry:
        zoom = float(np.exp(rng.uniform(*np.log(augment.scale))))
        zoomed = (max(1, round(height * zoom)), max(1, round(width * zoom)))
        size = augment.crop or zoomed
        # where the image is larger than the crop the crop moves in it, where it is smaller it moves in the crop
        spare = [int(rng.integers(abs(have - want) + 1)) for have, want in zip(zoomed, size, strict=True)]
        top, left = (place if have > want else 0 for place, have, want in zip(spare, zoomed, size, strict=True))
        above, before = (place if have < want else 0 for place, have, want in zip(spare, zoomed, size, strict=True))
        mirrored = bool(rng.random() < 0.5) and augment.flip
        seen = (min(zoomed[0], size[0]), min(zoomed[1], size[1]))
        return cls(zoomed, top, left, seen[0], seen[1], above, before, size, mirrored)

    def part(self, array: np.ndarray, resample: Image.Resampling) -> np.ndarray:
        """(H, W) or (H, W, 3) uint8 -> the part that is seen, without padding. Only that part is computed."""
        height, width = array.shape[:2]
        if self.zoomed == (height, width):
            part = array[self.top : self.top + self.height, self.left : self.left + self.width]
        else:
            down, across = height / self.zoomed[0], width / self.zoomed[1]
            box = (
                self.left * across,
                self.top * down,
                min(width, (self.left + self.width) * across),
                min(height, (self.top + self.height) * down),
            )
            part = np.asarray(Image.fromarray(array).resize((self.width, self.height), resample, box))
        return part[:, ::-1] if self.mirrored else part

    def padded(self, part: np.ndarray, value: int) -> np.ndarray:
        if part.shape[:2] == self.size:
            return part
        result = np.full((*self.size, *part.shape[2:]), value, part.dtype)
        before = self.size[1] - self.before - self.width if self.mirrored else self.before
        result[self.above : self.above + self.height, before : before + self.width] = part
        return result


def transform(record: Record, augment: Augment, rng: np.random.Generator) -> Sample:
    """A random view of the record. Padding is 0 in the image and `IGNORE` in the label maps."""
    geometry = Geometry.draw(record.image.shape[0], record.image.shape[1], augment, rng)
    image = record.image[..., 0] if record.image.shape[2] == 1 else record.image
    pixels = geometry.part(image, Image.Resampling.BILINEAR).reshape(geometry.height, geometry.width, -1)
    pixels = geometry.padded(_recoloured(pixels.astype(np.float32) / 255, augment.colour, rng), 0)

    def labels(array: np.ndarray | None) -> np.ndarray | None:
        if array is None:
            return None
        return geometry.padded(geometry.part(array, Image.Resampling.NEAREST), IGNORE)

    negative = None if record.negative is None else [labels(layer) for layer in record.negative]
    return _sample(pixels, labels(record.positive), negative, labels(record.mask))


def untouched(record: Record) -> Sample:
    """The whole record as it is."""
    negative = None if record.negative is None else list(record.negative)
    return _sample(record.image.astype(np.float32) / 255, record.positive, negative, record.mask)


def _recoloured(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W, channels) float32 in [0, 1]: brightness, then contrast, then saturation, with factors in 1 +- strength."""
    brightness, contrast, saturation = rng.uniform(1 - strength, 1 + strength, 3).astype(np.float32)
    if strength == 0:
        return image
    image = image * brightness
    mean = (image @ _GREY if image.shape[2] == 3 else image).mean()
    image = (image - mean) * contrast + mean
    if image.shape[2] == 3:
        grey = (image @ _GREY)[..., None]
        image = (image - grey) * saturation + grey
    return np.clip(image, 0, 1)


def _sample(image: np.ndarray, positive: np.ndarray | None, negative: list | None, mask: np.ndarray | None) -> Sample:
    """Tensors; everything before is NumPy, for small torch operations wait for threads that other processes keep busy: 22
    of 28 ms of a sample, measured with two processes on two cores."""
    size = image.shape[:2]
    pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    layers = torch.from_numpy(np.stack([_labels(layer, size) for layer in negative or [None]]))
    return Sample(pixels, torch.from_numpy(_labels(positive, size)), layers, torch.from_numpy(_labels(mask, size)))


def _labels(array: np.ndarray | None, size: tuple[int, int]) -> np.ndarray:
    """A copy that is contiguous and may be written to."""
    return np.full(size, IGNORE, np.uint8) if array is None else np.array(array, np.uint8, order="C")
