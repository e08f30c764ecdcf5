"""The operators of `torch.ops.coarse_kernels_triton`: tensors in, launches, tensors out. No host synchronisation."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
import triton.language as tl
from torch import Tensor

from ..operator import SEG, cm_bit, transition_bit
from . import kernels, table

CM, TRANSITION = cm_bit(0), transition_bit(0)
EQUAL, ONE_POINT, LINEAR = range(3)  # as in `kernels`

# Bytes of the copies of a field's gradient in which shares of large cells are summed, and of a transition's. At
# 64 MiB a matrix per image (C = 19) may have thousands; a field with a million grid points has one.
WORKSPACE = 64 << 20
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


def contiguous_images(t: Tensor) -> Tensor:
    """As it is where all but the batch axis is contiguous (stride 0: an expanded field), else a copy."""
    expected = 1
    for size, stride in zip(reversed(t.shape[1:]), reversed(t.stride()[1:]), strict=True):
        if size != 1 and stride != expected:
            return t.contiguous()
        expected *= size
    return t


class Call:
    """One call of an operator: its tensors as the kernels want them."""

    def __init__(
        self,
        seg_logits: Tensor,
        cm_logits: Tensor,
        labels: Tensor,
        transition: Tensor | None,
        class_weight: Tensor | None,
        pixel_weight: Tensor | None,
        scale: Tensor | None,
        loss_scale: float,
        trace_weight: float,
        ignore_index: int,
    ):
        self.device = labels.device
        self.dtype = torch.float64 if cm_logits.dtype == torch.float64 else torch.float32
        if (seg_logits.dtype == torch.float64) != (self.dtype == torch.float64):
            raise TypeError(
                f"seg_logits, cm_logits: float64 goes with float64 only, got {seg_logits.dtype} and {cm_logits.dtype}"
            )
        self.batch, self.classes = seg_logits.shape[:2]
        if self.classes > table.MAX_CLASSES:
            raise ValueError(f"seg_logits: expected at most {table.MAX_CLASSES} classes, got {self.classes}")
        if seg_logits.shape[2:] != labels.shape[1:]:
            raise ValueError("seg_logits: expected on the pixel grid of the labels")
        for name, tensor in (
            ("transition", transition), ("class_weight", class_weight), ("pixel_weight", pixel_weight), ("scale", scale)
        ):  # fmt: skip
            if tensor is not None and tensor.dtype != self.dtype:
                raise TypeError(f"{name}: expected {self.dtype}, got {tensor.dtype}")
        self.field = Field(labels.shape[1:], cm_logits.shape[3:])
        if self.field.pixels >= 2**31:
            raise ValueError(f"labels: expected fewer than 2**31 pixels an image, got {self.field.pixels}")
        self.seg, self.cm, self.labels = seg_logits.contiguous(), contiguous_images(cm_logits), labels.contiguous()
        self.cm_shape = cm_logits.shape
        self.shared = cm_logits.shape[0] == 1
        self.cm_stride = 0 if self.shared else self.cm.stride(0)
        self.interpreted = self.device.type == "cpu"
        self.tile = table.pixel_tile(self.classes, self.field.modes["CORNERS"], self.field.pixels, self.interpreted)
        self.weights = (
            None if class_weight is None else class_weight.contiguous(),
            None if pixel_weight is None else pixel_weight.contiguous(),
        )
        self.scale = scale
        self.transition = None if transition is None else transition.detach().contiguous()
        self.constants = (*two_floats(loss_scale), *two_floats(trace_weight))
        self.ignore_index = ignore_index
        # Offsets within an image, and pixels within a batch, fit in 32 bits: cheaper addresses.
        padded = self.tile.classes + self.tile.columns
        extent = max(padded * padded * max(self.field.pixels, self.field.points), self.batch * self.field.pixels)
        self.types = {"WIDE": extent >= WIDE_FROM, "R": triton_dtype(self.dtype)}

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)

    @property
    def empty(self) -> bool:
        return self.labels.numel() == 0

    # --- launches -------------------------------------------------------------------------------------------------------

    def pixel_grid(
        self,
        *,
        partials: bool = False,
        maps: tuple[Tensor, Tensor, Tensor] | None = None,
        evidence: Tensor | None = None,
        grad_seg: Tensor | None = None,
        grad_cm: Tensor | None = None,
        posterior: Tensor | None = None,
    ) -> Tensor | None:
        """`pixel_kernel` over all images. Returns the partial sums (programs, 2), if they are asked for."""
        blocks = -(-self.field.pixels // self.tile.pixels)
        # One field for all: its gradient is summed image after image by one program.
        together = grad_cm is not None and self.shared
        programs = 0 if self.empty else blocks * (1 if together else self.batch)
        sums = self.new(programs, 2, dtype=torch.float64) if partials else None
        if programs:
            with on_device(self.device):
                kernels.pixel_kernel[(programs,)](
                    self.seg, self.cm, self.labels, self.transition, *self.weights, self.scale,
                    sums, *(maps or (None, None, None)), evidence, grad_seg, grad_cm, posterior,
                    *self.constants, self.ignore_index, self.batch, self.cm_stride,
                    0 if self.shared else self.classes**2 * self.field.points,
                    **self.field.sizes, pixels_again=self.field.pixels, C=self.classes, CP=self.tile.classes,
                    BJ=self.tile.columns, BLOCK=self.tile.pixels, SHARED=together, **self.field.modes,
                    **self.types, num_warps=self.tile.warps, **OPTIONS,
                )  # fmt: skip
        return sums

    def finish(self, sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, nll, trace), 0-d."""
        out = self.new(), self.new(), self.new()
        with on_device(self.device):
            kernels.finish_kernel[(1,)](
                sums,
                self.scale,
                *out,
                *self.constants,
                sums.shape[0],
                BLOCK=4096,
                R=self.types["R"],
                num_warps=8,
                **OPTIONS,
            )
        return out

    def cm_gradient(self, evidence: Tensor) -> Tensor:
        """Gradient of a field on its own grid, rounded to storage once.

        Summed in ``copies`` x fields x points x (C, C), the entries together: a lane is a column, and so are its stores.
        A float32 field too large for the workspace is summed in place, in its own layout.
        """
        axes, classes = self.field.axes, self.classes
        fields = self.cm_shape[0]
        entries = classes * classes
        numel = fields * self.field.points * entries
        out = torch.empty(self.cm_shape, dtype=self.cm.dtype, device=self.device)
        if self.empty or numel == 0:
            return out.zero_()

        images = self.batch if self.shared else 1
        cell = -(-images * self.field.pixels // self.field.points)
        tile = table.cell_tile(classes, self.field.modes["CORNERS"], cell, self.interpreted)
        columns = -(-classes // tile.columns)
        at_once = [-(-axis.points // 2) if axis.mode == LINEAR else axis.points for axis in axes]
        programs = at_once[0] * at_once[1] * at_once[2] * fields * columns
        steps = -(-cell // tile.pixels)
        busy = INTERPRETED_BUSY if self.interpreted else BUSY
        size = numel * (8 if self.dtype == torch.float64 else 4)
        copies = max(1, min(steps, -(-busy // programs), WORKSPACE // size))
        in_place = size > WORKSPACE and out.dtype == self.dtype
        if in_place:
            total = out.zero_()
            strides = (self.field.points, 1, entries * self.field.points, 0)
        else:
            total = torch.zeros(copies, fields, self.field.points, entries, dtype=self.dtype, device=self.device)
            strides = (1, entries, self.field.points * entries, numel)
        # The field with the C x C entries of a point together: a copy on its grid.
        field = self.cm.flatten(1, 2).flatten(2).transpose(1, 2).contiguous()
        # A cell reaches its own grid point and the next: every second cell at a time, along each linear axis.
        colours = itertools.product(*(range(2) if axis.mode == LINEAR else range(1) for axis in axes))
        with on_device(self.device):
            for first in colours:
                count = [
                    (axis.points - start + 1) // 2 if axis.mode == LINEAR else axis.points
                    for axis, start in zip(axes, first, strict=True)
                ]
                grid = count[0] * count[1] * count[2] * fields * copies * columns
                kernels.cell_kernel[(grid,)](
                    self.seg, field, self.labels, self.transition, *self.weights, self.scale, evidence, total,
                    *self.constants, self.ignore_index, self.batch, images, field.stride(0), **self.field.sizes,
                    first_d=first[0], first_h=first[1], first_w=first[2],
                    cells_d=count[0], cells_h=count[1], cells_w=count[2], fields=fields, copies=copies,
                    entry_stride=strides[0], node_stride=strides[1], field_stride=strides[2], copy_stride=strides[3],
                    C=classes, CP=tile.classes, BJ=tile.columns, P=tile.pixels, **self.field.modes, **self.types,
                    num_warps=tile.warps, **OPTIONS,
                )  # fmt: skip
        if not in_place:
            summed = total[0] if copies == 1 else total.sum(0)
            out.view(fields, entries, self.field.points).copy_(summed.transpose(1, 2))
        return out

    def transition_gradient(self, evidence: Tensor) -> Tensor:
        entries = self.classes**2
        if self.empty:
            return torch.zeros(self.classes, self.classes, dtype=self.dtype, device=self.device)
        blocks = -(-self.field.pixels // self.tile.pixels) * self.batch
        shares = max(1, min(blocks, 2 if self.interpreted else 512, WORKSPACE // (8 * entries)))
        partials = self.new(shares, self.classes, self.classes, dtype=torch.float64)
        with on_device(self.device):
            kernels.transition_kernel[(shares * self.classes,)](
                self.seg, self.cm, self.labels, *self.weights, self.scale, evidence, partials,
                *self.constants[:2], self.ignore_index, self.batch, self.cm_stride, **self.field.sizes, programs=shares,
                C=self.classes, CP=self.tile.classes, BJ=self.tile.columns, BLOCK=self.tile.pixels,
                **self.field.modes, **self.types, num_warps=min(8, self.tile.warps), **OPTIONS,
            )  # fmt: skip
        return partials.sum(0).t().to(self.dtype).contiguous()


# --- the operators ------------------------------------------------------------------------------------------------------


def annotation_nll(
    seg_logits: Tensor,
    cm_logits: Tensor,
    labels: Tensor,
    transition: Tensor | None,
    class_weight: Tensor | None,
    pixel_weight: Tensor | None,
    scale: Tensor | None,
    loss_scale: float,
    trace_weight: float,
    ignore_index: int,
    per_pixel: bool,
    wanted: int,
) -> tuple[Tensor, ...]:
    call = Call(
        seg_logits, cm_logits, labels, transition, class_weight, pixel_weight, scale,
        loss_scale, trace_weight, ignore_index,
    )  # fmt: skip
    want_transition = bool(wanted & TRANSITION) and transition is not None
    on_its_grid = bool(wanted & CM) and not call.field.on_pixels
    grad_seg = (
        torch.empty(seg_logits.shape, dtype=seg_logits.dtype, device=call.device) if wanted & SEG else call.new(0)
    )
    grad_cm, summed = call.new(0), None
    if wanted & CM and call.field.on_pixels:
        grad_cm = torch.empty(cm_logits.shape, dtype=cm_logits.dtype, device=call.device)
        # Several images sum into one field: in the compute dtype, rounded once.
        summed = grad_cm if call.batch <= 1 or not call.shared else torch.empty_like(grad_cm, dtype=call.dtype)
        if call.empty:
            summed.zero_()
    # 12 bytes a pixel that the gradients of a grid and of a transition need and nobody else does.
    evidence = call.new(3, *labels.shape) if on_its_grid or want_transition else None
    maps = (call.new(*labels.shape), call.new(*labels.shape), call.new(*labels.shape)) if per_pixel else None
    sums = call.pixel_grid(
        partials=not per_pixel,
        maps=maps,
        evidence=evidence,
        grad_seg=grad_seg if wanted & SEG else None,
        grad_cm=summed,
    )
    if summed is not None and summed is not grad_cm:
        grad_cm.copy_(summed)
    grad_transition = call.new(0)
    if evidence is not None:
        if on_its_grid:
            grad_cm = call.cm_gradient(evidence)
        if want_transition:
            grad_transition = call.transition_gradient(evidence)
    if maps is None:
        assert sums is not None
        maps = call.finish(sums)
    return (*maps, grad_seg, grad_cm, grad_transition)


def annotation_posterior(
    seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, ignore_index: int
) -> Tensor:
    call = Call(seg_logits, cm_logits, labels, transition, None, None, None, 1.0, 0.0, ignore_index)
    posterior = torch.empty(seg_logits.shape, dtype=seg_logits.dtype, device=call.device)
    call.pixel_grid(posterior=posterior)
    return posterior


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
