"""What all launches share, and the operators that need no more: tensors in, tensors out. No host synchronisation."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ...problem import compute_dtype
from ..operator import present
from . import kernels, table

EQUAL, ONE_POINT, LINEAR = range(3)  # as in `kernels`

# Bytes of the copies of a field's gradient in which shares of large cells are summed, and of a transition's. At
# 64 MiB a matrix per image (C = 19) may have thousands; a field with a million grid points has one.
WORKSPACE = 64 << 20
# Bytes of the gradients of class logits at pixel resolution, before they are folded onto a grid of their own.
BAND, INTERPRETED_BAND = 32 << 20, 4096
# Programs (of one warp, mostly) of `cell_kernel` that keep a device busy: 132 multiprocessors of an H200 with 8 to 32
# programs each. A constant: the number of copies, and with it the rounding, is the same on every device.
BUSY, INTERPRETED_BUSY = 4096, 4


# Elements of an image, or pixels of a batch, from which offsets are computed in 64 bits.
WIDE_FROM = 2**31
# A multiply and an add may become one instruction: what Triton did until 3.9, and no longer does from 3.10 on.
OPTIONS = {"enable_fp_fusion": True}


class Axis(NamedTuple):
    size: int
    points: int

    @property
    def mode(self) -> int:
        return EQUAL if self.points == self.size else ONE_POINT if self.points == 1 else LINEAR


class Field:
    """Where the confusion matrices, or the class logits, live: three axes, as the pixels have them."""

    def __init__(self, size: torch.Size, grid: torch.Size, name: str = "cm_logits"):
        sizes, points = (1,) * (3 - len(size)) + tuple(size), (1,) * (3 - len(grid)) + tuple(grid)
        self.axes = tuple(Axis(s, g) for s, g in zip(sizes, points, strict=True))
        if any(axis.points > axis.size or (axis.points < 1 <= axis.size) for axis in self.axes):
            raise ValueError(
                f"{name}: expected a grid of 1 point to the image's {tuple(size)} on each axis, got {tuple(grid)}"
            )
        self.pixels = sizes[0] * sizes[1] * sizes[2]
        self.points = points[0] * points[1] * points[2]
        self.on_pixels = all(axis.mode == EQUAL for axis in self.axes)
        self.sizes = dict(zip(("depth", "height", "width"), sizes, strict=True))
        self.sizes |= dict(zip(("grid_d", "grid_h", "grid_w"), points, strict=True))
        self.modes = {f"MODE_{name}": axis.mode for name, axis in zip("DHW", self.axes, strict=True)}
        self.modes["CORNERS"] = 2 ** sum(axis.mode == LINEAR for axis in self.axes)

    def as_seg(self) -> dict[str, int]:
        """The grid and how it meets the pixels, for kernels that have a second field."""
        names = {
            **{f"grid_{axis}": f"seg_{axis}" for axis in "dhw"},
            **{f"MODE_{axis}": f"SEG_{axis}" for axis in "DHW"},
        }
        values = {**self.sizes, **self.modes}
        return {new: values[name] for name, new in names.items()} | {"SEG_CORNERS": self.modes["CORNERS"]}


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device's current stream: make the tensor's device the current one."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    return getattr(torch, device.type).device(device)


def two_floats(value: float) -> tuple[float, float]:
    """``value`` as a sum of two float32: what Triton passes of a Python float."""
    high = float(np.float32(value))
    return high, float(np.float32(value - high))


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def given(t: Tensor) -> Tensor | None:
    """An element of `Arguments` as a kernel takes it."""
    return t.detach().contiguous() if present(t) else None


def contiguous_images(t: Tensor) -> Tensor:
    """As it is where all but the batch axis is contiguous (stride 0: an expanded field), else a copy."""
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


class ClassLogits:
    """Class logits, and how they meet the pixels."""

    def __init__(self, seg_logits: Tensor, size: Sequence[int], dtype: torch.dtype | None = None):
        self.device = seg_logits.device
        self.batch, self.classes = seg_logits.shape[:2]
        self.dtype = dtype or compute_dtype(seg_logits)
        self.seg = seg_logits.contiguous()
        self.field = Field(torch.Size(size), seg_logits.shape[2:], "seg_logits")
        if self.field.pixels >= 2**31:
            raise ValueError(f"labels: expected fewer than 2**31 pixels an image, got {self.field.pixels}")
        self.interpreted = self.device.type == "cpu"
        self.empty = self.batch * self.field.pixels == 0
        # Offsets within an image, and where a cell begins (times 2 grid), fit in 32 bits: cheaper addresses.
        longest = max(axis.size for axis in self.field.axes)
        extent = max(table.power_of_two(self.classes) * max(self.field.pixels, self.field.points), 4 * longest**2)
        self.types = {"WIDE": extent >= WIDE_FROM, "R": triton_dtype(self.dtype)}
        self.shape = {**self.field.modes, **self.types}

    def tile(self) -> table.PixelTile:
        return table.class_tile(self.classes, self.field.pixels, self.interpreted)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def labelled_weight(
    labels: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None, num_classes: int, ignore_index: int
) -> Tensor:
    labels = labels.contiguous()
    weights = [None if w is None else w.contiguous() for w in (class_weight, pixel_weight)]
    given = next((w for w in weights if w is not None), None)
    count = labels.numel()
    block = 65536 if labels.device.type == "cpu" else 1024
    # 1024 partial sums at most: enough programs for any device, little to add up
    programs = min(-(-count // block), 1024)
    partials = torch.empty(programs, dtype=torch.float64, device=labels.device)
    if programs:
        with on_device(labels.device):
            kernels.labelled_weight_kernel[(programs,)](
                labels, *weights, partials, count, ignore_index, C=num_classes, BLOCK=block,
                R=tl.float32 if given is None else triton_dtype(given.dtype), num_warps=4, **OPTIONS,
            )  # fmt: skip
    return partials.sum()


def scale_(gradient: Tensor, factor: Tensor) -> None:
    count, block = gradient.numel(), 65536 if gradient.device.type == "cpu" else 2048
    if count:
        with on_device(gradient.device):
            kernels.scale_kernel[(min(-(-count // block), 4096),)](
                gradient, factor, count, BLOCK=block, num_warps=4, **OPTIONS
            )
