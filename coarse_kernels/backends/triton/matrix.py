"""Launches for one kind of drawings with a matrix, a layer of its labels at a time; and the gradients that the layers and the
kinds of a call add up. No host synchronisation.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..operator import Arguments, cm_bit, transition_bit
from . import kernels, launch, table
from .launch import (
    LINEAR,
    OPTIONS,
    Axis,
    ClassLogits,
    Field,
    contiguous_images,
    given,
    on_device,
    triton_dtype,
    two_floats,
)

Range = tuple[int, int]


class Band(NamedTuple):
    """Pixels ``begin`` to ``end`` of every image, which are a box."""

    begin: int
    end: int
    box: tuple[Range, Range, Range]


def bands(axes: tuple[Axis, ...], most: int) -> Iterator[Band]:
    """An image in bands of at most ``most`` pixels: whole planes, else whole rows, else parts of rows."""
    depth, height, width = (axis.size for axis in axes)

    def cut(size: int, at_once: int) -> list[Range]:
        parts = -(-size // max(1, at_once))
        ends = [size * n // parts for n in range(parts + 1)]
        return list(itertools.pairwise(ends))

    def whole(size: int) -> list[Range]:
        return [(0, size)]

    if most >= height * width:
        ranges = cut(depth, most // max(1, height * width)), whole(height), whole(width)
    elif most >= width:
        ranges = cut(depth, 1), cut(height, most // width), whole(width)
    else:
        ranges = cut(depth, 1), cut(height, 1), cut(width, most)
    for d, h, w in itertools.product(*ranges):
        begin = (d[0] * height + h[0]) * width + w[0]
        end = ((d[1] - 1) * height + h[1] - 1) * width + w[1]
        yield Band(begin, end, (d, h, w))


def points_of(axis: Axis, pixels: Range) -> Range:
    """The grid points of an axis that ``pixels`` have a share of, and perhaps one more."""
    if axis.mode != LINEAR:
        return pixels if axis.points == axis.size else (0, 1)

    def cell(pixel: int) -> int:  # as `first_pixel` has it
        return max(0, ((2 * pixel + 1) * axis.points - axis.size) // (2 * axis.size))

    return cell(pixels[0]), min(cell(pixels[1] - 1) + 2, axis.points)


class Sum:
    """A gradient that is a sum: in the compute dtype, rounded to its own once. ``terms``: of how many launches or images."""

    def __init__(self, of: Tensor, dtype: torch.dtype, terms: int):
        self.out = torch.empty(of.shape, dtype=of.dtype, device=of.device)
        self.total = self.out if terms <= 1 or of.dtype == dtype else torch.empty_like(self.out, dtype=dtype)
        self.begun = False  # ``total`` holds something

    def rounded(self) -> Tensor:
        if not self.begun:
            return self.out.zero_()
        return self.out if self.total is self.out else self.out.copy_(self.total)


class ClassGradient(Sum):
    """Of the class logits, of all kinds.

    On a grid of their own, kernels that work at pixel resolution write into ``buffer``, a band of every image at a time, which
    is added to the grid: nothing is as large as the image's gradient.
    """

    def __init__(self, logits: ClassLogits, of: Tensor, trusted: bool, layers: int):
        self.logits = logits
        self.on_pixels = logits.field.on_pixels
        super().__init__(of, logits.dtype, trusted + layers if self.on_pixels else trusted + 2 * layers)
        self.bands = whole_image(logits.field)
        self.buffer = self.total
        if layers and not self.on_pixels and not logits.empty:
            size = logits.batch * logits.classes * (8 if logits.dtype == torch.float64 else 4)
            most = launch.INTERPRETED_BAND if logits.interpreted else launch.BAND
            self.bands = list(bands(logits.field.axes, max(64, most // size)))
            longest = max(band.end - band.begin for band in self.bands)
            self.buffer = logits.new(logits.batch * logits.classes * longest)

    @property
    def adds(self) -> bool:
        """To what ``buffer`` holds."""
        return self.on_pixels and self.begun

    def written(self, band: Band) -> None:
        """What is to be done with ``buffer``."""
        if not self.on_pixels:
            if not self.begun:
                self.total.zero_()
            self._gather(band)
        self.begun = True

    def _gather(self, band: Band) -> None:
        logits, axes = self.logits, self.logits.field.axes
        ranges = [points_of(axis, pixels) for axis, pixels in zip(axes, band.box, strict=True)]
        _, rows, columns = (axis.points for axis in axes)
        (d0, d1), (h0, h1), (w0, w1) = ranges
        first, last = (d0 * rows + h0) * columns + w0, ((d1 - 1) * rows + h1 - 1) * columns + w1
        cell, width = 1, 1
        for axis, pixels in zip(axes, band.box, strict=True):
            stride = -(-axis.size // axis.points)
            width = min(pixels[1] - pixels[0], 2 * stride if axis.mode == LINEAR else stride)
            cell *= width
        tile = table.gather_tile(logits.classes, cell, width, last - first, logits.interpreted)
        chunks = -(-logits.classes // tile.classes)
        programs = -(-(last - first) // tile.points) * logits.batch * chunks
        limits = dict(
            zip(("first_d", "last_d", "first_h", "last_h", "first_w", "last_w"), sum(band.box, ()), strict=True)
        )
        grid = logits.field.as_seg()
        grid.pop("SEG_CORNERS")
        size = {name: logits.field.sizes[name] for name in ("depth", "height", "width")}
        with on_device(logits.device):
            kernels.gather_kernel[(programs,)](
                self.buffer, self.total, band.begin, band.end - band.begin, first, last, **limits, **size, **grid,
                C=logits.classes, CB=tile.classes, POINTS=tile.points, PIX=tile.pixels, **logits.types,
                num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip


def whole_image(field: Field) -> list[Band]:
    depth, height, width = (axis.size for axis in field.axes)
    return [Band(0, field.pixels, ((0, depth), (0, height), (0, width)))]


class Terms(NamedTuple):
    """Of one kind: 0-d, or maps (B, K, *S)."""

    loss: Tensor
    nll: Tensor
    trace: Tensor
    grad_cm: Tensor
    grad_transition: Tensor


class MatrixKind:
    """One kind of a call: its tensors as the kernels want them."""

    def __init__(self, call: Arguments, kind: int, logits: ClassLogits):
        self.logits, self.device, self.dtype = logits, logits.device, logits.dtype
        self.batch, self.classes = logits.batch, logits.classes
        if self.classes > table.MAX_CLASSES:
            raise ValueError(f"seg_logits: expected at most {table.MAX_CLASSES} classes, got {self.classes}")
        cm = call.cm_logits[kind]
        self.labels = call.labels[kind].contiguous()
        self.layers = self.labels.shape[1]
        self.field = Field(self.labels.shape[2:], cm.shape[3:])
        self.cm, self.cm_shape = contiguous_images(cm), cm.shape
        self.shared = cm.shape[0] == 1
        self.cm_stride = 0 if self.shared else self.cm.stride(0)
        self.interpreted = logits.interpreted
        corners = max(self.field.modes["CORNERS"], logits.field.modes["CORNERS"])
        self.tile = table.pixel_tile(self.classes, corners, self.field.pixels, self.interpreted)
        self.transition = given(call.transition[kind])
        self.weights = given(call.class_weight[kind]), given(call.pixel_weight[kind])
        self.scale = given(call.scale[kind])
        weight = 1.0 if call.per_pixel else call.weight[kind]
        self.constants = (*two_floats(weight), *two_floats(call.trace_weight[kind]))
        self.ignore_index = call.ignore_index
        # Offsets within an image, and pixels within a batch, fit in 32 bits: cheaper addresses.
        padded = self.tile.classes + self.tile.columns
        extent = max(padded * padded * max(self.field.pixels, self.field.points), self.batch * self.field.pixels)
        self.types = {"WIDE": extent >= launch.WIDE_FROM, "R": triton_dtype(self.dtype)}
        self.seg_grid = logits.field.as_seg()

    @property
    def empty(self) -> bool:
        return self.logits.empty

    # --- launches -------------------------------------------------------------------------------------------------------

    def programs(self, band: Band, together: bool) -> int:
        return -(-(band.end - band.begin) // self.tile.pixels) * (1 if together else self.batch)

    def pixels(
        self,
        layer: int,
        band: Band,
        *,
        sums: Tensor | None = None,
        maps: tuple[Tensor, Tensor, Tensor] | None = None,
        evidence: Tensor | None = None,
        grad_seg: ClassGradient | None = None,
        grad_cm: Sum | None = None,
        posterior: Tensor | None = None,
    ) -> None:
        """`pixel_kernel` over a band of all images. ``sums``: its partial sums, (programs, 2)."""
        # One field for all: its gradient is summed image after image by one program.
        together = grad_cm is not None and self.shared
        with on_device(self.device):
            kernels.pixel_kernel[(self.programs(band, together),)](
                self.logits.seg, self.cm, self.labels, self.transition, *self.weights, self.scale,
                sums, *(maps or (None, None, None)), evidence, None if grad_seg is None else grad_seg.buffer,
                None if grad_cm is None else grad_cm.total, posterior, *self.constants, self.ignore_index, self.batch,
                self.layers, layer, band.begin, band.end, self.cm_stride,
                0 if self.shared else self.classes**2 * self.field.points,
                **self.field.sizes, **self.seg_grid, seg_pixels=band.end - band.begin, pixels_again=self.field.pixels,
                C=self.classes, CP=self.tile.classes, BJ=self.tile.columns, BLOCK=self.tile.pixels, SHARED=together,
                ADD_SEG=grad_seg is not None and grad_seg.adds, ADD_CM=grad_cm is not None and grad_cm.begun,
                **self.field.modes, **self.types, num_warps=self.tile.warps, **OPTIONS,
            )  # fmt: skip

    def finish(self, sums: Tensor, weighted: Tensor, slot: int) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, nll, trace), 0-d; ``weighted[slot]``: for the loss times the kind's weight, in float64."""
        out = self.logits.new(), self.logits.new(), self.logits.new()
        with on_device(self.device):
            kernels.finish_kernel[(1,)](
                sums, self.scale, *out, weighted, slot, *self.constants, sums.shape[0],
                BLOCK=4096, R=self.types["R"], num_warps=8, **OPTIONS,
            )  # fmt: skip
        return out

    def transition_gradient(self, layer: int, evidence: Tensor) -> Tensor:
        """(C, C) of label and class, in float64."""
        blocks = -(-self.field.pixels // self.tile.pixels) * self.batch
        shares = max(1, min(blocks, 2 if self.interpreted else 512, launch.WORKSPACE // (8 * self.classes**2)))
        partials = self.logits.new(shares, self.classes, self.classes, dtype=torch.float64)
        with on_device(self.device):
            kernels.transition_kernel[(shares * self.classes,)](
                self.logits.seg, self.cm, self.labels, *self.weights, self.scale, evidence, partials,
                *self.constants[:2], self.ignore_index, self.batch, self.layers, layer, self.cm_stride,
                **self.field.sizes, **self.seg_grid, programs=shares,
                C=self.classes, CP=self.tile.classes, BJ=self.tile.columns, BLOCK=self.tile.pixels,
                **self.field.modes, **self.types, num_warps=min(8, self.tile.warps), **OPTIONS,
            )  # fmt: skip
        return partials.sum(0)

    def log_q(self, layer: int, out: Tensor, add: bool) -> None:
        """log q (B, C, *S) of a layer into, or added to, ``out``."""
        chunks = -(-self.classes // self.tile.columns)
        programs = -(-self.field.pixels // self.tile.pixels) * self.batch * chunks
        with on_device(self.device):
            kernels.log_q_kernel[(programs,)](
                self.cm, self.labels, self.transition, out, self.ignore_index, self.layers, layer, self.cm_stride,
                **self.field.sizes, C=self.classes, CP=self.tile.classes, BJ=self.tile.columns, BLOCK=self.tile.pixels,
                ADD=add, **self.field.modes, **self.types, num_warps=self.tile.warps, **OPTIONS,
            )  # fmt: skip


class FieldGradient:
    """Of a field on its own grid, from the evidence of the layers one after the other; rounded to storage once.

    Summed in ``copies`` x fields x points x (C, C), the entries together: a lane is a column, and so are its stores.
    A float32 field too large for the workspace is summed in place, in its own layout.
    """

    def __init__(self, kind: MatrixKind):
        self.kind = kind
        axes, classes = kind.field.axes, kind.classes
        self.fields = kind.cm_shape[0]
        self.entries = classes * classes
        numel = self.fields * kind.field.points * self.entries
        self.out = torch.empty(kind.cm_shape, dtype=kind.cm.dtype, device=kind.device)
        self.nothing = kind.empty or numel == 0 or kind.layers == 0
        if self.nothing:
            self.out.zero_()
            return
        self.images = kind.batch if kind.shared else 1
        cell = -(-self.images * kind.field.pixels // kind.field.points)
        self.tile = table.cell_tile(classes, kind.field.modes["CORNERS"], cell, kind.interpreted)
        self.columns = -(-classes // self.tile.columns)
        at_once = [-(-axis.points // 2) if axis.mode == LINEAR else axis.points for axis in axes]
        programs = at_once[0] * at_once[1] * at_once[2] * self.fields * self.columns
        steps = -(-cell // self.tile.pixels)
        busy = launch.INTERPRETED_BUSY if kind.interpreted else launch.BUSY
        size = numel * (8 if kind.dtype == torch.float64 else 4)
        self.copies = max(1, min(steps, -(-busy // programs), launch.WORKSPACE // size))
        self.in_place = size > launch.WORKSPACE and self.out.dtype == kind.dtype
        if self.in_place:
            self.total = self.out.zero_()
            self.strides = (kind.field.points, 1, self.entries * kind.field.points, 0)
        else:
            shape = self.copies, self.fields, kind.field.points, self.entries
            self.total = torch.zeros(shape, dtype=kind.dtype, device=kind.device)
            self.strides = (1, self.entries, kind.field.points * self.entries, numel)
        # The field with the C x C entries of a point together: a copy on its grid.
        self.field = kind.cm.flatten(1, 2).flatten(2).transpose(1, 2).contiguous()

    def add(self, layer: int, evidence: Tensor) -> None:
        if self.nothing:
            return
        kind, axes = self.kind, self.kind.field.axes
        # A cell reaches its own grid point and the next: every second cell at a time, along each linear axis.
        colours = itertools.product(*(range(2) if axis.mode == LINEAR else range(1) for axis in axes))
        with on_device(kind.device):
            for first in colours:
                count = [
                    (axis.points - start + 1) // 2 if axis.mode == LINEAR else axis.points
                    for axis, start in zip(axes, first, strict=True)
                ]
                grid = count[0] * count[1] * count[2] * self.fields * self.copies * self.columns
                kernels.cell_kernel[(grid,)](
                    kind.logits.seg, self.field, kind.labels, kind.transition, *kind.weights, kind.scale, evidence,
                    self.total, *kind.constants, kind.ignore_index, kind.batch, kind.layers, layer, self.images,
                    self.field.stride(0), **kind.field.sizes, **kind.seg_grid,
                    first_d=first[0], first_h=first[1], first_w=first[2],
                    cells_d=count[0], cells_h=count[1], cells_w=count[2], fields=self.fields, copies=self.copies,
                    entry_stride=self.strides[0], node_stride=self.strides[1], field_stride=self.strides[2],
                    copy_stride=self.strides[3], C=kind.classes, CP=self.tile.classes, BJ=self.tile.columns,
                    P=self.tile.pixels, **kind.field.modes, **kind.types, num_warps=self.tile.warps, **OPTIONS,
                )  # fmt: skip

    def rounded(self) -> Tensor:
        if not self.nothing and not self.in_place:
            summed = self.total[0] if self.copies == 1 else self.total.sum(0)
            self.out.view(self.fields, self.entries, self.kind.field.points).copy_(summed.transpose(1, 2))
        return self.out


def run(
    kind: MatrixKind, call: Arguments, place: int, grad_seg: ClassGradient | None, weighted: Tensor, slot: int
) -> Terms:
    """Kind number ``place`` of a call, a layer after the other. Adds to ``grad_seg``; ``weighted[slot]``: see `finish`."""
    logits = kind.logits
    grad_cm: Sum | FieldGradient | None = None
    if call.wanted & cm_bit(place):
        terms = kind.layers * (kind.batch if kind.shared else 1)
        grad_cm = Sum(kind.cm, kind.dtype, terms) if kind.field.on_pixels else FieldGradient(kind)
    on_pixels = grad_cm if isinstance(grad_cm, Sum) else None
    columns = None  # of the transition's gradient
    if call.wanted & transition_bit(place) and kind.transition is not None:
        columns = torch.zeros(kind.classes, kind.classes, dtype=torch.float64, device=kind.device)
    # 12 bytes a pixel that the gradients of a grid and of a transition need and nobody else does.
    evidence = None
    if isinstance(grad_cm, FieldGradient) or columns is not None:
        evidence = logits.new(3, kind.batch, kind.field.pixels)

    shape = kind.labels.shape
    maps = (logits.new(*shape), logits.new(*shape), logits.new(*shape)) if call.per_pixel else None
    steps = whole_image(kind.field) if grad_seg is None else grad_seg.bands
    counts = [kind.programs(band, on_pixels is not None and kind.shared) for band in steps]
    launches = list(zip(steps, counts, strict=True)) if not kind.empty else []
    total = kind.layers * sum(count for _, count in launches)
    sums = logits.new(total, 2, dtype=torch.float64) if maps is None else None
    written = 0
    for layer in range(kind.layers if launches else 0):
        for band, count in launches:
            part = None if sums is None else sums[written : written + count]
            kind.pixels(layer, band, sums=part, maps=maps, evidence=evidence, grad_seg=grad_seg, grad_cm=on_pixels)
            written += count
            if grad_seg is not None:
                grad_seg.written(band)
        if on_pixels is not None:
            on_pixels.begun = True
        if isinstance(grad_cm, FieldGradient) and evidence is not None:
            grad_cm.add(layer, evidence)
        if columns is not None and evidence is not None:
            columns += kind.transition_gradient(layer, evidence)
    if maps is None:
        assert sums is not None
        maps = kind.finish(sums, weighted, slot)
    return Terms(
        *maps,
        logits.new(0) if grad_cm is None else grad_cm.rounded(),
        logits.new(0) if columns is None else columns.t().to(kind.dtype).contiguous(),
    )
