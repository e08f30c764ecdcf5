"""One image or label map from a file: turned as its orientation tag says, and nothing else is scaled or repaired.

A label map must fit its image pixel by pixel and value by value, so what a format or Pillow would alter on the way is refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ..storage import LFS_POINTER, is_lfs_pointer

MAX_PIXELS = 178_956_970  # Pillow's own limit, beyond which a small file may be made to fill the memory
_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_STRETCHED = {"L;2": 85, "L;4": 17, "L;2R": 85, "L;4R": 17}  # Pillow stretches grey values of 2 and 4 bits to 0..255
_LOSSLESS = ("PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP")  # of TIFF and WebP not every file
_LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
_limit: ContextVar[int] = ContextVar("max_pixels", default=MAX_PIXELS)
LARGEST_SIDE = 65535  # pixels, of crops and windows; no JPEG has more
_opening = Lock()


class Picture(NamedTuple):
    """What a file holds. pixels: (H, W) uint8 numbers, or (H, W, channels) uint8 colours. palette: (n, 3) uint8 colours of the
    numbers. turned: whether an orientation tag was followed. transparent: (H, W), where numbers are; None where none is."""

    pixels: np.ndarray
    palette: np.ndarray | None = None
    turned: bool = False
    transparent: np.ndarray | None = None


@contextmanager
def pixel_limit(pixels: int) -> Iterator[None]:
    """Files of more pixels are refused, in this thread, instead of those of more than `MAX_PIXELS`."""
    token = _limit.set(pixels)
    try:
        yield
    finally:
        _limit.reset(token)


def load_image(path: Path) -> Picture:
    """(H, W, 1) of a grey image, (H, W, 3) of any other; alpha is dropped, an orientation tag followed. Of the several pictures
    in a camera's file (MPO) it is the main one, which viewers show; other files of several pages are refused."""
    image, _, packing, turned = _decoded(path)
    if ";16" in packing or image.mode not in _GREY + _COLOUR:
        raise ValueError(f"{path}: expected a grey or colour image of 8 bits per channel, got {packing or image.mode}")
    if image.mode in _GREY:
        return Picture(np.array(image.convert("L"))[..., None], turned=turned)
    return Picture(np.array(image.convert("RGB")), turned=turned)


def read_image(path: Path) -> np.ndarray:
    """The pixels of `load_image`."""
    return load_image(path).pixels


def with_channels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
    """(H, W, 1 or ``channels``) -> (H, W, ``channels``): grey is repeated. Raises ValueError naming any other image."""
    if image.shape[2] not in (1, channels):
        raise ValueError(f"{name}: expected an image of {channels} channel(s) for this network, got {image.shape[2]}")
    return np.broadcast_to(image, (*image.shape[:2], channels))


def load_labels(path: Path) -> Picture:
    """(H, W) the values in the file: grey values, palette indices, or 0 and 1 of a 1-bit image; or (H, W, 3 or 4) of a coloured
    map. An orientation tag is followed, as annotation tools do. Raises ValueError where values may not be what was drawn."""
    image, kind, packing, turned = _decoded(path)
    _check_lossless(path, image, kind)
    if packing.partition(";")[2].strip("24R") == "I" or packing.endswith("scaled"):
        raise ValueError(
            f"{path}: expected a label map whose numbers are stored as they are, got {packing} in a {kind}"
        )
    see_through = "transparency" in image.info  # one colour, or some of a palette
    if image.mode in ("RGB", "RGBA") and ";16" not in packing:
        return Picture(np.array(image.convert("RGBA") if see_through else image), turned=turned)
    if image.mode not in ("1", "L", "P"):
        raise ValueError(f"{path}: expected a label map of one channel of at most 8 bits, got mode {image.mode}")
    palette = np.array(image.getpalette(), np.uint8).reshape(-1, 3) if image.mode == "P" else None
    numbers = np.array(image).astype(np.uint8) // _STRETCHED.get(packing, 1)
    transparent = None
    if see_through and image.mode == "P":
        transparent = np.array(image.convert("RGBA"))[..., 3] == 0
    elif see_through:  # as it is in the file, and of one bit 0 or 255
        value = image.info["transparency"]
        transparent = numbers == (value > 0 if image.mode == "1" else value)
    return Picture(numbers, palette, turned, transparent if transparent is not None and transparent.any() else None)


def read_labels(path: Path) -> np.ndarray:
    """(H, W) uint8, the numbers of `load_labels`; a coloured map is refused."""
    pixels = load_labels(path).pixels
    if pixels.ndim > 2:
        raise ValueError(f"{path}: expected a label map of one channel of at most 8 bits, got mode RGB")
    return pixels


def read_binary(path: Path) -> np.ndarray:
    """(H, W) uint8, 1 where a black and white image is white; 0 and 1 do for black and white, too."""
    image, kind, _, _ = _decoded(path)
    if image.mode not in _GREY + _COLOUR:
        raise ValueError(f"{path}: expected a lossless black and white image, got {kind} of mode {image.mode}")
    _check_lossless(path, image, kind)
    grey = np.array(image.convert("L"))
    values = set(np.unique(grey).tolist())
    if not (values <= {0, 255} or values <= {0, 1}):
        raise ValueError(f"{path}: expected black (0) and white (255 or 1), got values {sorted(values)[:8]}")
    return (grey > 0).astype(np.uint8)


def _check_lossless(path: Path, image: Image.Image, kind: str) -> None:
    lossy = kind not in _LOSSLESS or (kind == "TIFF" and image.info.get("compression") in _LOSSY_TIFF)
    if kind == "WEBP":  # "RIFF", size, "WEBP", kind of data: developers.google.com/speed/webp/docs/riff_container
        with open(path, "rb") as file:
            lossy = file.read(16)[12:] != b"VP8L"
    if lossy:
        compressed = f" with {image.info['compression']} compression" if kind == "TIFF" else ""
        raise ValueError(
            f"{path}: expected a lossless label map, such as PNG, got {kind}{compressed}, which alters values"
        )


class Refused(ValueError):
    """Not damaged, but not to be read either."""


def _decoded(path: Path) -> tuple[Image.Image, str, str, bool]:
    """The image, upright; its format; how its pixels are packed in the file, such as "L;4" or "RGB;16B", and
    "scaled" where Pillow scales them; and whether it was turned."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an image file, got {'a folder' if path.is_dir() else 'none'}")
    try:
        # not by its path: from a mapped TIFF that is to be turned by 90 degrees Pillow 13 takes rows of the wrong length
        with open(path, "rb") as file, open_image(file, path) as image:
            kind = image.format or "unknown"
            packing = _packing(image)
            tag = _orientation(image) if kind == "TIFF" else 1  # Pillow turns it when it is loaded, and deletes the tag
            image.load()
            turned = max(tag, _orientation(image)) in range(2, 9)
            return ImageOps.exif_transpose(image) if turned else image, kind, packing, turned
    except Refused:
        raise
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and more on damaged data
        if is_lfs_pointer(path):
            got = LFS_POINTER
        elif isinstance(error, UnidentifiedImageError):
            got = "one of no format that is known"
        else:
            got = f"one that cannot be read ({error})"
        raise ValueError(f"{path}: expected a complete image file, got {got}") from error


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (SyntaxError, ValueError, TypeError, OSError, struct.error):  # what a camera's tags hold is no pixel
        return 1


def _packing(image: Any) -> str:
    codec, _, _, args = image.tile[0] if image.tile else ("", None, 0, "")
    parts: tuple[Any, ...] = (args,) if isinstance(args, str) else tuple(args or ("",))
    scaled = codec.startswith("ppm") and parts[1:] and parts[1] != 255  # the largest value, which is made 255
    return f"{parts[0]} scaled" if scaled else str(parts[0])


def open_image(file: Path | IO[bytes], name: Path | str) -> Image.Image:
    """As Pillow opens it, reading no pixel yet, but with `pixel_limit`: Pillow's own limit is that of a whole process, and
    cannot be raised for one file. Raises `Refused`, naming it as ``name``, also where pages would be dropped."""
    with _opening:
        given, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            image = Image.open(file)
        finally:
            Image.MAX_IMAGE_PIXELS = given
    pixels = image.width * image.height
    if pixels > _limit.get():
        image.close()
        raise Refused(
            f"{name}: expected at most {_limit.get()} pixels, got {image.width}x{image.height}; --max-pixels {pixels} reads it"
        )
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if pages > 1:
        image.close()
        raise Refused(f"{name}: expected a file with one picture, got {pages} pages or frames; split it")
    return image
