"""All kinds of drawings without a matrix, in one go; and label maps. No host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..operator import Arguments, present, transition_bit
from . import launch, table
from . import trusted_kernels as kernels
from .launch import OPTIONS, ClassLogits, given, on_device, two_floats

# Programs of `trusted_grid_kernel` (4 warps) that keep a device busy. A constant, as `launch.BUSY`.
BUSY = 1024


class TrustedKinds(ClassLogits):
    """The ``kinds`` of a call that have no matrix."""

    def __init__(self, call: Arguments, kinds: Sequence[int], dtype: torch.dtype):
        super().__init__(call.seg_logits, call.labels[0].shape[2:], dtype)

        def of(tensors: list[Tensor]) -> tuple[Tensor | None, ...]:
            return tuple(given(tensors[kind]) for kind in kinds)

        self.labels = tuple(call.labels[kind].contiguous() for kind in kinds)
        self.layers = tuple(labels.shape[1] for labels in self.labels)
        self.transition = of(call.transition)
        self.weights = of(call.class_weight), of(call.pixel_weight)
        self.scale = of(call.scale)
        weight = [1.0 if call.per_pixel else call.weight[kind] for kind in kinds]
        self.factors = tuple(zip(*(two_floats(w) for w in weight), strict=True))
        # What all kernels begin with, but for the logits.
        self.doubled = tuple(2 * layers for layers in self.layers)  # kernels.layers_of
        self.kinds = (
            self.labels, self.transition, *self.weights, self.scale, *self.factors, self.doubled
        )  # fmt: skip
        self.sizes = {"ignore_index": call.ignore_index, "batch": self.batch, **self.field.sizes}

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

    def finish(self, sums: Tensor, weighted: Tensor) -> list[Tensor]:
        """nll of each kind, 0-d; ``weighted``: for the loss of each times its weight."""
        nll = [self.new() for _ in self.labels]
        with on_device(self.device):
            kernels.trusted_finish_kernel[(1,)](
                sums, self.scale, *self.factors, weighted, tuple(nll), sums.shape[0],
                KINDS=len(nll), BLOCK=4096, R=self.types["R"], num_warps=8, **OPTIONS,
            )  # fmt: skip
        return nll

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


class Result(NamedTuple):
    """Lists have an element for each trusted kind."""

    nll: list[Tensor]
    grad_transition: list[Tensor]


def run(call: Arguments, kinds: Sequence[int], dtype: torch.dtype, grad_seg: Tensor | None, weighted: Tensor) -> Result:
    """The trusted ``kinds`` of a call. ``grad_seg`` is written, ``weighted`` (float64, one a kind) if there are sums."""
    of = TrustedKinds(call, kinds, dtype)
    learnt = [bool(call.wanted & transition_bit(kind)) and present(call.transition[kind]) for kind in kinds]
    at_once = of.field.on_pixels and of.tile().columns >= of.classes
    from_evidence = grad_seg is not None and not at_once and not of.empty
    evidence = of.new(2, of.batch, of.field.pixels) if from_evidence else None
    mixed = tuple(
        of.new(2, *labels.shape) if transition is not None and (from_evidence or wants) else None
        for labels, transition, wants in zip(of.labels, of.transition, learnt, strict=True)
    )
    maps = tuple(of.new(*labels.shape) for labels in of.labels) if call.per_pixel else None
    sums = of.forward(not call.per_pixel, maps, evidence, mixed, grad_seg if at_once else None)
    if grad_seg is not None and evidence is not None:
        of.gradient(evidence, mixed, grad_seg)
    elif grad_seg is not None and of.empty:
        grad_seg.zero_()
    grads = []
    for place, (terms, wants) in enumerate(zip(mixed, learnt, strict=True)):
        if not wants or terms is None:
            grads.append(of.new(0))
        elif of.empty or of.layers[place] == 0:
            grads.append(torch.zeros(of.classes, of.classes, dtype=of.dtype, device=of.device))
        else:
            grads.append(of.transition_gradient(place, terms))
    if maps is not None:
        return Result(list(maps), grads)
    assert sums is not None
    return Result(of.finish(sums, weighted), grads)


def posterior(call: Arguments, kinds: Sequence[int], dtype: torch.dtype, log_q: Tensor | None, out: Tensor) -> None:
    """From log q of the others, which may be ``out`` itself, and the trusted ``kinds``."""
    of = TrustedKinds(call, kinds, dtype)
    tile = of.tile()
    programs = -(-of.field.pixels // tile.pixels) * of.batch
    with on_device(of.device):
        kernels.posterior_kernel[(programs,)](
            of.seg, of.labels, of.transition, of.doubled, log_q, out, **of.sizes, KINDS=len(of.labels), C=of.classes,
            CB=tile.columns, BLOCK=tile.pixels, **of.shape, num_warps=tile.warps, **OPTIONS,
        )  # fmt: skip


def label_map(seg_logits: Tensor, size: Sequence[int]) -> Tensor:
    call = ClassLogits(seg_logits, size)
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
