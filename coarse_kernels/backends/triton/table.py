"""How large the tiles are. A table, not a search at run time: the same kernel in every process (determinism), and no
timing inside a CUDA graph's capture.

What decides is registers. In `pixel_kernel` a thread holds (BJ / warps) * C logits of one pixel: at C = 19 with 8 warps
4 columns, 76 registers, in blocks of 32 pixels. In `cell_kernel` a thread holds one column: C logits, and as many sums,
for each corner. The tests compile these shapes for sm_80, sm_90 and sm_100 and look at registers and spills.
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
    32: (32, 32, 8),
    64: (8, 32, 8),
    128: (4, 32, 8),
    256: (2, 32, 8),
}

# Elements of a tile under the interpreter, whose cost is per program and per operation, not per element.
_INTERPRETED = 1 << 16


def power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def pixel_tile(classes: int, pixels: int, interpreted: bool) -> PixelTile:
    """For an image of ``pixels`` pixels."""
    padded = power_of_two(classes)
    columns, block, warps = _PIXEL[padded]
    if interpreted:
        block = max(16, min(4096, power_of_two(pixels), _INTERPRETED // (padded * columns)))
    return PixelTile(padded, columns, block, warps)


def cell_tile(classes: int, corners: int, interpreted: bool) -> CellTile:
    padded = power_of_two(classes)
    columns = min(padded, 32)
    if interpreted:
        return CellTile(padded, columns, max(1, min(256, _INTERPRETED // (padded * columns * corners))), 1)
    if padded > 32 or corners == 8:
        # one pixel at a time, so that the warps share its corners and rows
        return CellTile(padded, columns, 1, 8 if padded > 32 else 4)
    # Four warps, a pixel each, or 32 / CP pixels where a column is not a whole warp. Small classes have small cells'
    # worth of registers, so two warps there: a stride of 8 gives 64 pixels.
    warps = 4 if padded >= 16 else 2 if padded >= 8 else 1
    return CellTile(padded, columns, warps * 32 // padded, warps)
