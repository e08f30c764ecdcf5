"""One image or label map from a file, as it is stored: nothing is turned, scaled or repaired.

A label map must fit its image pixel by pixel and value by value, so what Pillow would alter on the way is refused.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from ..storage import is_lfs_pointer

_GREY = ("1", "L", "LA")
_COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
_STRETCHED = {"L;2": 85, "L;4": 17}  # Pillow stretches grey values of 2 and 4 bits to 0..255


def read_image(path: Path) -> np.ndarray:
    """(H, W, 1) uint8 of a grey image, (H, W, 3) uint8 of any other; alpha is dropped, EXIF orientation ignored."""
    image, packing = _decoded(path)
    if ";16" in packing or image.mode not in _GREY + _COLOUR:
        raise ValueError(f"{path}: expected a grey or colour image of 8 bits per channel, got {packing or image.mode}")
    if image.mode in _GREY:
        return np.array(image.convert("L"))[..., None]
    return np.array(image.convert("RGB"))


def with_channels(image: np.ndarray, channels: int, name: str) -> np.ndarray:
    """(H, W, 1 or ``channels``) -> (H, W, ``channels``): grey is repeated. Raises ValueError naming any other image."""
    if image.shape[2] not in (1, channels):
        raise ValueError(f"{name}: expected an image of {channels} channel(s) for this network, got {image.shape[2]}")
    return np.broadcast_to(image, (*image.shape[:2], channels))


def read_labels(path: Path) -> np.ndarray:
    """(H, W) uint8, the values in the file: grey values, palette indices, or 0 and 1 of a 1-bit image."""
    image, packing = _decoded(path)
    if image.mode not in ("1", "L", "P") or image.format == "JPEG":
        got = "JPEG, which alters values" if image.format == "JPEG" else f"mode {image.mode}"
        raise ValueError(f"{path}: expected a label map of one channel of at most 8 bits, got {got}")
    return np.array(image).astype(np.uint8) // _STRETCHED.get(packing, 1)


def read_binary(path: Path) -> np.ndarray:
    """(H, W) uint8, 1 where a black and white image is white; 0 and 1 do for black and white, too."""
    image, _ = _decoded(path)
    if image.mode not in _GREY + _COLOUR or image.format == "JPEG":
        raise ValueError(f"{path}: expected a lossless black and white image, got {image.format} of mode {image.mode}")
    grey = np.array(image.convert("L"))
    values = set(np.unique(grey).tolist())
    if not (values <= {0, 255} or values <= {0, 1}):
        raise ValueError(f"{path}: expected black (0) and white (255 or 1), got values {sorted(values)[:8]}")
    return (grey > 0).astype(np.uint8)


def _decoded(path: Path) -> tuple[Image.Image, str]:
    """The image, and how its pixels are packed in the file, such as "L;4" or "RGB;16B"."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an image file, got {'a folder' if path.is_dir() else 'none'}")
    try:
        with Image.open(path) as image:
            args = image.tile[0][3] if image.tile else ""
            packing = args if isinstance(args, str) else str(args[0]) if args else ""
            # Pillow turns TIFF, and only TIFF, as the tag says, and deletes the tag
            turned = image.format == "TIFF" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            image.load()
    except Exception as error:  # Pillow's readers raise OSError, SyntaxError, struct.error and more on damaged data
        got = (
            "a git-lfs pointer (`git lfs pull` fetches it)"
            if is_lfs_pointer(path)
            else f"one that cannot be read ({error})"
        )
        raise ValueError(f"{path}: expected a complete image file, got {got}") from error
    if turned:
        raise ValueError(f"{path}: expected a TIFF that is stored upright, got one with an orientation tag")
    return image, packing
