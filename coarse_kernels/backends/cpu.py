"""The fused C++ kernels (csrc/cpu). Instruction set chosen at run time: `coarse_kernels._native.cpu_info()`."""

from __future__ import annotations

from . import compiled
from .fused import FusedBackend

BACKEND = FusedBackend("cpu", ("cpu",), compiled.NAMESPACE)
