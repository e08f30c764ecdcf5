"""The operators `trusted` and `label_map` of `torch.ops.coarse_kernels_triton`. No host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..operator import SEG, present, transition_bit
from . import launch, table
from . import trusted_kernels as kernels
from .launch import OPTIONS, Field, on_device, triton_dtype, two_floats

# Programs of `trusted_grid_kernel` (4 warps) that keep a device busy. A constant, as `launch.BUSY`.
BUSY = 1024


def _given(t: Tensor) -> Tensor | None:
    return t.contiguous() if present(t) else None


class _Logits:
    """Class logits and how they meet the pixels."""

    def __init__(self, seg_logits: Tensor, size: Sequence[int]):
        self.device = seg_logits.device
        self.batch, self.classes = seg_logits.shape[:2]
        self.dtype = torch.float64 if seg_logits.dtype == torch.float64 else torch.float32
        self.seg = seg_logits.contiguous()
        self.field = Field(torch.Size(size), seg_logits.shape[2:], "seg_logits")
        if self.field.pixels >= 2**31:
            raise ValueError(f"labels: expected fewer than 2**31 pixels an image, got {self.field.pixels}")
        self.interpreted = self.device.type == "cpu"
        # Offsets within an image, and where a cell begins (times 2 grid), fit in 32 bits: cheaper addresses.
        longest = max(axis.size for axis in self.field.axes)
        extent = max(table.power_of_two(self.classes) * max(self.field.pixels, self.field.points), 4 * longest**2)
        self.types = {"WIDE": extent >= launch.WIDE_FROM, "R": triton_dtype(self.dtype)}
        self.shape = {**self.field.modes, **self.types}

    def tile(self) -> table.PixelTile:
        return table.class_tile(self.classes, self.field.pixels, self.interpreted)

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


class _Call(_Logits):
    def __init__(
        self,
        seg_logits: Tensor,
        labels: list[Tensor],
        transition: list[Tensor],
        class_weight: list[Tensor],
        pixel_weight: list[Tensor],
        scale: list[Tensor],
        weight: Sequence[float],
        ignore_index: int,
    ):
        super().__init__(seg_logits, labels[0].shape[2:])
        for name, tensors in (
            ("transition", transition), ("class_weight", class_weight), ("pixel_weight", pixel_weight), ("scale", scale)
        ):  # fmt: skip
            for tensor in tensors:
                if present(tensor) and tensor.dtype != self.dtype:
                    raise TypeError(f"{name}: expected {self.dtype}, got {tensor.dtype}")
        self.labels = tuple(t.contiguous() for t in labels)
        self.layers = tuple(t.shape[1] for t in labels)
        self.transition = tuple(_given(t.detach()) for t in transition)
        self.weights = tuple(map(_given, class_weight)), tuple(map(_given, pixel_weight))
        self.scale = tuple(map(_given, scale))
        self.factors = tuple(zip(*(two_floats(w) for w in weight), strict=True))
        self.ignore_index = ignore_index
        self.empty = self.batch * self.field.pixels == 0
        # What all kernels begin with, but for the logits.
        self.kinds = (
            self.labels, self.transition, *self.weights, self.scale, *self.factors, self.layers
        )  # fmt: skip
        self.sizes = {"ignore_index": ignore_index, "batch": self.batch, **self.field.sizes}

    def forward(
        self,
        partials: bool,
        nll_map: tuple[Tensor, ...] | None,
        evidence: Tensor | None,
        mixed: tuple[Tensor | None, ...],
        grad: Tensor | None,
    ) -> Tensor | None:
        tile = self.tile()
        programs = 0 if self.empty else -(-self.field.pixels // tile.pixels) * self.batch
        sums = self.new(programs, len(self.labels), dtype=torch.float64) if partials else None
        if programs:
            with on_device(self.device):
                kernels.trusted_kernel[(programs,)](
                    self.seg, *self.kinds, sums, nll_map, evidence, mixed, grad, **self.sizes,
                    KINDS=len(self.labels), C=self.classes, CB=tile.columns, BLOCK=tile.pixels, **self.shape,
                    num_warps=tile.warps, **OPTIONS,
                )  # fmt: skip
        return sums

    def finish(self, sums: Tensor) -> tuple[Tensor, list[Tensor]]:
        loss, nll = self.new(), [self.new() for _ in self.labels]
        with on_device(self.device):
            kernels.trusted_finish_kernel[(1,)](
                sums, self.scale, *self.factors, loss, tuple(nll), sums.shape[0],
                KINDS=len(nll), BLOCK=4096, R=self.types["R"], num_warps=8, **OPTIONS,
            )  # fmt: skip
        return loss, nll

    def gradient(self, evidence: Tensor, mixed: tuple[Tensor | None, ...], grad: Tensor) -> None:
        """Of the class logits, from what `forward` has left."""
        if self.field.on_pixels:
            tile = self.tile()
            programs = -(-self.field.pixels // tile.pixels) * self.batch * -(-self.classes // tile.columns)
            with on_device(self.device):
                kernels.trusted_pixel_kernel[(programs,)](
                    self.seg, *self.kinds, evidence, mixed, grad, **self.sizes,
                    KINDS=len(self.labels), C=self.classes, CB=tile.columns, BLOCK=tile.pixels, **self.shape,
                    num_warps=tile.warps, **OPTIONS,
                )  # fmt: skip
            return
        axes = self.field.axes
        cell = -(-self.field.pixels // self.field.points)
        grid_tile = table.class_grid_tile(
            self.classes, self.field.modes["CORNERS"], cell, axes[2].size // axes[2].points, self.field.points,
            self.interpreted,
        )  # fmt: skip
        chunks = -(-self.classes // grid_tile.classes)
        programs = -(-self.field.points // grid_tile.points) * self.batch * chunks
        size = grad.numel() * (8 if self.dtype == torch.float64 else 4)
        busy = launch.INTERPRETED_BUSY if self.interpreted else BUSY
        copies = max(1, min(-(-cell // grid_tile.pixels), -(-busy // programs), launch.WORKSPACE // size))
        # A few large cells are cut into shares, which are added in fixed order.
        out = grad if copies == 1 else self.new(copies, *grad.shape)
        with on_device(self.device):
            kernels.trusted_grid_kernel[(programs * copies,)](
                self.seg, *self.kinds, evidence, mixed, out, **self.sizes, copies=copies, copy_stride=grad.numel(),
                KINDS=len(self.labels), C=self.classes, CB=grid_tile.classes, POINTS=grid_tile.points,
                PIX=grid_tile.pixels, **self.shape, num_warps=grid_tile.warps, **OPTIONS,
            )  # fmt: skip
        if copies > 1:
            grad.copy_(out.sum(0))

    def transition_gradient(self, kind: int, mixed: Tensor) -> Tensor:
        tile = self.tile()
        blocks = -(-self.field.pixels // tile.pixels) * self.batch * self.layers[kind]
        shares = max(1, min(blocks, 2 if self.interpreted else 512, launch.WORKSPACE // (8 * self.classes**2)))
        partials = self.new(shares, self.classes, self.classes, dtype=torch.float64)
        chunks = -(-self.classes // tile.columns)
        with on_device(self.device):
            kernels.trusted_transition_kernel[(shares * self.classes * chunks,)](
                self.seg, self.labels[kind], *(w[kind] for w in self.weights), self.scale[kind], mixed, partials,
                *(f[kind] for f in self.factors), **self.sizes, layers=self.layers[kind], shares=shares,
                C=self.classes, CB=tile.columns, BLOCK=tile.pixels, **self.shape, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
        return partials.sum(0).t().to(self.dtype).contiguous()


def trusted(
    seg_logits: Tensor,
    labels: list[Tensor],
    transition: list[Tensor],
    class_weight: list[Tensor],
    pixel_weight: list[Tensor],
    scale: list[Tensor],
    weight: list[float],
    ignore_index: int,
    per_pixel: bool,
    wanted: int,
) -> tuple[Any, ...]:
    call = _Call(seg_logits, labels, transition, class_weight, pixel_weight, scale, weight, ignore_index)
    kinds = range(len(labels))
    learnt = [bool(wanted & transition_bit(k)) and call.transition[k] is not None for k in kinds]
    want_seg = bool(wanted & SEG)
    at_once = call.field.on_pixels and call.tile().columns >= call.classes
    from_evidence = want_seg and not at_once and not call.empty
    evidence = call.new(2, call.batch, call.field.pixels) if from_evidence else None
    mixed = tuple(
        call.new(2, *labels[k].shape) if call.transition[k] is not None and (from_evidence or learnt[k]) else None
        for k in kinds
    )
    grad_seg = torch.empty(seg_logits.shape, dtype=seg_logits.dtype, device=call.device) if want_seg else call.new(0)
    maps = tuple(call.new(*y.shape) for y in labels) if per_pixel else None
    sums = call.forward(not per_pixel, maps, evidence, mixed, grad_seg if want_seg and at_once else None)
    if evidence is not None:
        call.gradient(evidence, mixed, grad_seg)
    elif want_seg and call.empty:
        grad_seg.zero_()
    grads = []
    for k, terms in enumerate(mixed):
        if not learnt[k] or terms is None:
            grads.append(call.new(0))
        elif call.empty or call.layers[k] == 0:
            grads.append(torch.zeros(transition[k].shape, dtype=call.dtype, device=call.device))
        else:
            grads.append(call.transition_gradient(k, terms))
    if maps is not None:
        return call.new(0), list(maps), grad_seg, grads
    assert sums is not None
    loss, nll = call.finish(sums)
    return loss, nll, grad_seg, grads


def label_map(seg_logits: Tensor, size: Sequence[int]) -> Tensor:
    call = _Logits(seg_logits, size)
    dtype = torch.uint8 if call.classes <= 256 else torch.int64
    out = call.new(call.batch, *size, dtype=dtype)
    tile = call.tile()
    programs = -(-call.field.pixels // tile.pixels) * call.batch
    if programs:
        with on_device(call.device):
            kernels.label_map_kernel[(programs,)](
                call.seg, out, **call.field.sizes, C=call.classes, CB=min(tile.columns, 16), BLOCK=tile.pixels,
                **call.shape, num_warps=tile.warps, **OPTIONS,
            )  # fmt: skip
    return out
