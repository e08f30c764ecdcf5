"""The fused CUDA kernels (csrc/cuda). Built where torch has CUDA and nvcc is found: setup.py, COARSE_CUDA."""

from __future__ import annotations

from .. import native
from ..problem import Problem
from . import compiled
from .fused import FusedBackend

MAX_CLASSES = 256  # of a kind with a matrix: columns of a pixel have to fit in shared memory


class CudaBackend(FusedBackend):
    def unavailable(self) -> str | None:
        return native.cuda_reason()

    def unsupported(self, problem: Problem) -> str | None:
        trusted = all(drawings.cm_logits is None for drawings in problem.drawings)
        if problem.num_classes > MAX_CLASSES and not trusted:
            return f"it serves up to {MAX_CLASSES} classes, got {problem.num_classes}"
        pixels = problem.size.numel()
        if pixels >= 2**31:
            return f"it serves images of fewer than 2^31 pixels, got {pixels}"
        return super().unsupported(problem)


BACKEND = CudaBackend("cuda", ("cuda",), compiled.NAMESPACE)
