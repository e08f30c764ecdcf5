"""The fused CUDA kernels (csrc/cuda). Built where torch has CUDA and nvcc is found: setup.py, COARSE_CUDA."""

from __future__ import annotations

from .. import native
from ..problem import Problem
from . import compiled
from .fused import FusedBackend

# What `Run::kernels` of csrc/cuda/run.h says, and `Refusal` of csrc/cuda/launch.h.
_WAYS = (
    "trusted: one kernel for all such kinds, the class logits read from their own grid",
    "cells: matrices interpolated from their grid, exponentials along a column of pixels as geometric sequences, the class "
    "logits read from their own grid",
    "pixels: the field is read and written where it lies",
    "pieces: expanded to the pixels a piece of an image at a time, and gathered",
)
_REFUSALS = (
    "",
    "it is float64",
    "this number of classes",
    "the transition has a gradient",
    "the image is a volume",
    "a cell has fewer than two pixels on an axis",
    "an axis has more than 2^24 pixels",
    "the class logits have a grid of their own",
    "large cells need too many copies of the gradient",
    "the field is not on the pixel grid",
    "one field on the pixel grid serves several images",
    "several layers add to a gradient in 16 bits",
)


class CudaBackend(FusedBackend):
    most_classes = 256  # columns of a pixel have to fit in shared memory

    def unavailable(self) -> str | None:
        return native.cuda_reason()

    def kernels(self, problem: Problem) -> list[str]:
        if problem.seg_logits.shape[0] == 0 or problem.size.numel() == 0:
            return ["none: there is no pixel"] * len(problem.drawings)
        lines = []
        for drawings, (way, cells, pixels, fast) in zip(problem.drawings, self._chosen(problem), strict=True):
            line = _WAYS[way]
            if way == 3:
                line += f" (not cells: {_REFUSALS[cells]}; not where it lies: {_REFUSALS[pixels]})"
            if way >= 2:
                line += f"; the general kernel, in log space: {_REFUSALS[fast]}" if fast else "; the fast kernel"
            if way and drawings.labels.shape[1] > 1:
                line += f"; {drawings.labels.shape[1]} layers one after the other"
            lines.append(line)
        return lines

    def unsupported(self, problem: Problem) -> str | None:
        pixels = problem.size.numel()
        if pixels >= 2**31:
            return f"it serves images of fewer than 2^31 pixels, got {pixels}"
        return super().unsupported(problem)


BACKEND = CudaBackend("cuda", ("cuda",), compiled.NAMESPACE)
