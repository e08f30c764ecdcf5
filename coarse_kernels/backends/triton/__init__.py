"""The fused operator in Triton: NVIDIA, AMD and Intel GPUs, no compiler at install time. Namespace `coarse_kernels_triton`.

Equations: csrc/coarse_math.h, `pixel_log_space`. Per pixel, everything in log space and float32 (float64 for float64)::

    p = softmax(s)    A = softmax_i(a)    q[j] = sum_i T[i,y] A[i,j]    h[i,j] = T[i,y] A[i,j] / q[j]
    D = sum_j p[j] q[j]    nll = -log D    r[j] = p[j] q[j] / D
    dL/ds = w (p - r)    dL/da[i,j] = w (r[j] (A[i,j] - h[i,j]) + trace_weight A[j,j] ([i = j] - A[i,j]))

A call (`objective`): all trusted kinds in one go (`trusted`), then each kind with a matrix, a layer of its labels at a time
(`matrix`). They add to the same gradients, in the compute dtype: the first writes, the others read, add and write, and what
is stored in 16 bits is rounded once. Labels and weights of a layer are read where they lie.

Schedule of a layer of a kind with a matrix, by the grid G of its field:

    G = S       `pixel_kernel`: one reading of the logits and one writing of the gradients (C <= 32; two readings beyond).
                Bytes a pixel: (2 C^2 + 2 C) of storage and the label; a second layer or kind reads C^2 + C, or C, more.
                Exponentials: C^2, and as many again with a transition; padding columns to a power of two makes 19 into 32.
    G < S       `pixel_kernel` reads each pixel's corners (from the caches) and interpolates; it leaves 12 bytes a pixel
                of evidence. `cell_kernel` goes through the pixels between neighbouring grid points, with their corners
                in registers, and adds up the gradient. Exponentials: C^2 twice. Nothing grows with H W C^2.
    dL/dT       `transition_kernel`, also from the evidence. Only when asked for.

Class logits on a grid of their own, of P points: each of these kernels interpolates them where it needs them, C times 2^rank
reads a pixel, from the caches. Their gradient at pixel resolution goes into a buffer of `launch.BAND` (32 MiB, or 64 pixels
of each image), for a band of the images at a time: planes, rows or parts of a row. `gather_kernel` then adds to each grid
point its pixels in the band, in fixed order. 4 C bytes a pixel written, and 4 C 2^rank read, mostly from the caches: a pixel
has as many corners.

Sums are in fixed order, without atomics: two runs agree bit for bit. The scalars: a float64 partial sum per program, then
one program. The gradient of a grid: cells of one colour (every second along each axis, 2^rank launches) share no point,
so that each adds to its corners in memory. A grid of few, large cells is cut into copies that are added afterwards; the
copies take at most `launch.WORKSPACE` (64 MiB) beyond the first. Cells with partial sums of their own and a kernel that
gathers them would read and write the corners the same number of times and want a buffer of 2^rank the size.
Memory beyond inputs and outputs, for a field on its own grid whose gradient is wanted: a copy of it with the C x C
entries of a point together, and its gradient in float32. For one on the pixel grid: none, or the gradient in float32
where several images or layers share a field in 16 bits. The same for class logits in 16 bits: none where one launch writes
their gradient, else the gradient in float32. And a band, where their grid is coarser.

Trusted drawings (A = I: cross-entropy after upsampling, complementary labels) have kernels of their own in
`trusted_kernels`: all kinds and layers of a call in one go, class logits on their own grid of P points for S pixels,
interpolated where they are read. K layers in all, M of them with a transition; bytes a pixel with float32 storage:

    P = S, C <= 32   `trusted_kernel`: 4 C read where there is a label, 4 C written, and K labels of one byte or eight.
                     C exponentials, and as many again for each of the M layers.
    P = S, C > 32    Logits come 32 at a time, 2 + M times: for their sums, for the sums with each T, and once more for
                     the gradient, `trusted_pixel_kernel`. 4 C (2 + M) read, 4 C written; 8 + 8 M of evidence written,
                     and read for every 32 classes.
    P < S            `trusted_kernel` reads 2^rank corners a class and pixel, from the caches: 4 C P / S bytes of memory,
                     and 8 + 8 M of evidence written. `trusted_grid_kernel` gathers the gradient: a lane or several for a
                     grid point, with the corners' logits in registers while the pixels of the 2^rank cells around it go
                     by. It reads labels and evidence 2^rank times, mostly from the caches, and writes 4 C P / S. Each
                     pixel's p is formed once for each corner: 2^rank C (1 + M) exponentials. A point is written by one
                     program; a few large cells are cut into shares (up to 64 MiB of them), which are added afterwards.
    dL/dT            `trusted_transition_kernel`, from the evidence: p / D = exp(s - shift) / sum. Only when asked for.
    label_map        `label_map_kernel`: 4 C P / S read and 1 written (8 above 256 classes).

The posterior of one layer of one kind is written by `pixel_kernel`. Of several: `log_q_kernel` adds up log q of the layers with
a matrix where the posterior will be (beside it, in float32, where that has 16 bits), and `posterior_kernel` adds that of the
trusted ones and normalises. 4 C written for the first layer, 8 C for each further one, 12 C at the end.

No tensor of C planes of pixels exists where the class logits' grid is coarser, neither logits nor gradient: a band of it, where
a kind has a matrix. Without gradients there is no evidence either. This is counted, not measured.

Copies are made of logits that are not contiguous (an expanded batch of one field is none), of labels and of weights.

Where it does not help: a field at nearly the image's size (G = S - 1) has a pixel or two a cell, and the kernel is busy
with the corners; the gradient of a transition reads the logits once for every label in a block of pixels; float64, and
more than 32 classes, spill registers. A kind of K layers pays for its exponentials K times. Class logits of a few points: their
gradient is folded by as many programs as there are points and classes.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...problem import Drawings, Problem
from .. import autograd, operator
from ..fused import FusedBackend
from .table import MAX_CLASSES

NAMESPACE = "coarse_kernels_triton"
OLDEST = (3, 6)
# Triton itself reads this variable when the kernels are defined.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _missing() -> str | None:
    """Why Triton cannot be used, found without importing it (0.2 s, and it looks for devices)."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return f"triton is not installed; `pip install 'triton>={OLDEST[0]}.{OLDEST[1]}'`"
    # Not importlib.metadata: the distribution may be triton, pytorch-triton, pytorch-triton-xpu, triton-windows.
    found = re.search(r"__version__ = ['\"]((\d+)\.(\d+)[^'\"]*)", Path(spec.origin).read_text(encoding="utf-8"))
    if found is None:
        return f"triton at {spec.origin} has no version"
    if (int(found[2]), int(found[3])) < OLDEST:
        return f"triton {found[1]} is older than {OLDEST[0]}.{OLDEST[1]}"
    return None


_MISSING = _missing()


ONE_TILE = 32  # classes whose matrix fits the registers of a program (`table.pixel_tile`)


class TritonBackend(FusedBackend):
    most_classes = MAX_CLASSES

    def unavailable(self) -> str | None:
        return _MISSING

    def kernels(self, problem: Problem) -> list[str]:
        if problem.seg_logits.shape[0] == 0 or problem.size.numel() == 0:
            return ["none: there is no pixel"] * len(problem.drawings)
        return [_kernel_of(problem, drawings) for drawings in problem.drawings]


def _kernel_of(problem: Problem, drawings: Drawings) -> str:
    own = problem.seg_logits.shape[2:] != problem.size
    if drawings.cm_logits is None:
        return "trusted: one kernel for all such kinds, class logits read " + ("from their own grid" if own else "once")
    cells = drawings.cm_logits.shape[3:] != problem.size
    line = (
        "cells: corners read for each pixel and interpolated, the gradient gathered from the cells around each grid point"
        if cells
        else "pixels: every logit read once and every gradient written once"
    )
    if problem.num_classes > ONE_TILE:
        line += f"; logits read twice, as there are more than {ONE_TILE} classes"
    if own:
        line += "; class logits read from their own grid, their gradient folded onto it a band of the image at a time"
    if drawings.labels.shape[1] > 1:
        line += f"; {drawings.labels.shape[1]} layers one after the other"
    return line


def _on_first_call(name: str, module: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # imports Triton
        return getattr(importlib.import_module(f"{__name__}.{module}"), name)(*args)

    return run


def _define() -> torch.library.Library:
    library = operator.declare(NAMESPACE)
    autograd.register(NAMESPACE, library)
    keys = ("CUDA", "XPU", *(("CPU",) if INTERPRETED else ()))
    for name, module in (
        ("annotation_objective", "objective"),
        ("objective_posterior", "objective"),
        ("labelled_weight", "launch"),
        ("label_map", "trusted"),
        ("scale_", "launch"),
    ):
        for key in keys:
            library.impl(name, _on_first_call(name, module), key)
    return library


_LIBRARY = _define()  # the operators live as long as this does
BACKEND = TritonBackend("triton", ("cuda", "xpu", *(("cpu",) if INTERPRETED else ())), NAMESPACE)
