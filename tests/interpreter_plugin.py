"""pytest plugin of the processes with TRITON_INTERPRET=1 (tests/test_triton_interpreter.py).

Triton's interpreter truncates float32 to bfloat16, where every device rounds to nearest even, and takes a hundred NumPy
operations for it; it also lets NumPy warn of each exp(-inf - -inf) that the kernels select away. Neither is what is
being tested.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_cast = InterpreterBuilder.cast_impl


def _rounding_cast(self: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.float32 and target == tl.bfloat16:
        bits = src.data.astype(np.float32).view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet = (bits >> 16) | 0x40  # a NaN keeps being one
        return TensorHandle(np.where(np.isnan(src.data), quiet, rounded).astype(np.uint16), target)
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle((src.data.astype(np.uint32) << 16).view(np.float32), target)
    return _cast(self, src, dst_type)


InterpreterBuilder.cast_impl = _rounding_cast
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")
