"""How large the tiles are. A table, not a search at run time: the same kernel in every process (determinism), and no
timing inside a CUDA graph's capture.

What decides is registers. In `pixel_kernel` a thread holds (BJ / warps) * C logits of one pixel: at C = 19 with 16 warps
2 columns, 38 logits, and 122 registers on sm_90 (203 with 8 warps: then one block of 8 warps fits a multiprocessor, not
16 warps). In `cell_kernel` a thread holds one column: C logits and C sums for each corner, 152 at C = 19, and 255
registers; several warps a program, which share nothing but the last sum, spilled. tests/test_triton_compile.py compiles
these shapes for sm_80, sm_90 and sm_100 and holds them to no spills.
"""

from __future__ import annotations

from typing import NamedTuple


class PixelTile(NamedTuple):
    classes: int  # CP: C padded to a power of two
    columns: int  # BJ
    pixels: int  # BLOCK
    warps: int


class CellTile(NamedTuple):
    classes: int  # CP
    columns: int  # BJ
    pixels: int  # P
    warps: int


# CP: (BJ, BLOCK, warps)
_PIXEL = {
    2: (2, 256, 4),
    4: (4, 128, 4),
    8: (8, 64, 4),
    16: (16, 32, 4),
    32: (32, 32, 16),
    64: (8, 32, 8),
    128: (4, 32, 8),
    256: (2, 32, 8),
}

MAX_CLASSES = max(_PIXEL)

# Elements of a tile under the interpreter, whose cost is per program and per operation, not per element.
_INTERPRETED = 1 << 16


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def pixel_tile(classes: int, corners: int, pixels: int, interpreted: bool) -> PixelTile:
    """For images of ``pixels`` pixels and a field read from ``corners`` grid points (1 on the pixel grid)."""
    padded = power_of_two(classes)
    columns, block, warps = _PIXEL[padded]
    if corners > 1:
        warps = min(warps, 8)  # the addresses of the corners want registers: 16 warps leave a thread 128
    if interpreted:
        block = max(16, min(4096, power_of_two(pixels), _INTERPRETED // (padded * columns)))
    return PixelTile(padded, columns, block, warps)


def cell_tile(classes: int, corners: int, pixels: int, interpreted: bool) -> CellTile:
    """For cells of about ``pixels`` pixels."""
    padded = power_of_two(classes)
    columns = min(padded, 32)
    if interpreted:
        block = min(256, power_of_two(2 * pixels), _INTERPRETED // (padded * columns * corners))
        return CellTile(padded, columns, max(1, block), 1)
    if padded > 32:
        return CellTile(padded, columns, 1, 8)  # the warps share rows and corners
    if corners == 8 and padded > 8:
        return CellTile(padded, columns, 1, 4)  # the warps share corners: 16 * C registers are too many for a lane
    # One warp, and no reduction between warps. 32 / CP pixels at a time where the columns do not fill it.
    return CellTile(padded, columns, 32 // padded, 1)


class GridTile(NamedTuple):
    classes: int  # CB
    points: int  # POINTS
    pixels: int  # PIX: lanes of a point
    warps: int


# Classes of a pixel whose logits a thread of `trusted_kernel` holds; more come as many at a time.
_AT_ONCE = 32


def class_tile(classes: int, pixels: int, interpreted: bool) -> PixelTile:
    """For the class logits of images of ``pixels`` pixels: a pixel is a lane, and its classes are in the lane's registers."""
    padded = power_of_two(classes)
    columns = min(padded, _AT_ONCE)
    block = 128 * max(1, 8 // columns)
    if interpreted:
        block = max(16, min(4096, power_of_two(max(1, pixels)), _INTERPRETED // columns))
    return PixelTile(padded, columns, block, 4)


def class_grid_tile(classes: int, corners: int, cell: int, width: int, points: int, interpreted: bool) -> GridTile:
    """For class logits on a grid of ``points``, with cells of ``cell`` pixels, ``width`` of them in a row.

    A thread holds (corners + 3) logits or sums for each class: 133 at C = 19 and four corners.
    """
    padded = power_of_two(classes)
    most = 8 if corners == 8 else 32 if classes <= 24 else 16
    columns = min(padded, most)
    if interpreted:
        pixels = min(256, power_of_two(2 * cell))
        at_once = min(power_of_two(points), max(1, _INTERPRETED // (columns * corners * pixels)))
        return GridTile(columns, at_once, pixels, 4)
    lanes = 128
    # Neighbouring lanes read neighbouring pixels of a row; and where there are few points, all lanes have work.
    row = 1 << (min(width, lanes).bit_length() - 1)
    pixels = max(row, lanes // min(lanes, power_of_two(points)))
    return GridTile(columns, lanes // pixels, pixels, 4)


def gather_tile(classes: int, cell: int, width: int, points: int, interpreted: bool) -> GridTile:
    """For adding up pixels, of which a point has ``cell`` and a row of them ``width``."""
    if interpreted:
        pixels = min(4096, power_of_two(max(1, cell)))
        columns = min(power_of_two(classes), _INTERPRETED // pixels)
        return GridTile(columns, min(power_of_two(points), max(1, _INTERPRETED // (columns * pixels))), pixels, 4)
    lanes = 128
    pixels = min(power_of_two(width), lanes)
    if points * pixels < 16 * lanes:  # few points: all lanes for each, and a program for each class
        return GridTile(1, 1, min(1024, power_of_two(cell)), 4)
    return GridTile(min(power_of_two(classes), 8), lanes // pixels, pixels, 4)
