"""pytest plugin of the processes with TRITON_INTERPRET=1 (tests/kernels.py): what they leave out, and what keeps the
interpreter from being wrong or slow. There "triton" is one of the backends of the CPU, the last before the reference, and the
tests of every backend find it. What the interpreter cannot show: layouts, registers (tests/test_triton_compile.py), approximate
exp and division.

Triton's interpreter truncates float32 to bfloat16, where every device rounds to nearest even, and takes a hundred NumPy
operations for it; it also lets NumPy warn of each exp(-inf - -inf) that the kernels select away. Neither is what is
being tested.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels import INTERPRETED

# Interpreting a cell of a grid takes 20 ms whatever its size, so that a test is worth the number of its cells.
LEFT_OUT = {
    r"more_classes_than_the_label_type.*300": "the backend serves up to 256 classes, and says so",
    r"test_the_number_of_threads": "it has none; triton_interpreted.py runs twice and compares bits",
    r"test_any_problem": "up to 1700 cells; triton_interpreted.py draws smaller ones",
    r"test_tall_image_with_an_odd_stride\[triton-grid[012]": "251 to 1500 cells; grid3 has 87",
    r"test_shapes\[triton-tall,": "668 cells; test_tall_image_with_an_odd_stride is about the same",
    r"test_shapes\[triton-(image_minus_1|stride_4|equal_in|stride_2|full_height|odd_strides|C_above_a_vector,"
    r"|widths_15|rank_3,_strided|one_field_with_many|cells_of_100).*-(positive|uniform)": "many cells: one stream",
    r"test_shapes\[triton-250_wide": "160 cells; sizes_that_are_no_multiples has the same strides of no whole number",
    r"test_dirty_memory": "a minute for what the poison fixture shows in every other test",
    r"test_logit_scale.*uniform": "a random transition is there, too",
    r"(?=.*recompute)(?=.*(strided|one-point))(?!.*(only_the_gradients|per_pixel|test_dtypes))": "the schedules belong to "
    "FusedBackend; on a grid one is enough, but where one call differs from the other",
    r"(?=.*(retain_graph|autograd_grad|changing_grad|grad_output_of_a_scaled))(?=.*strided)": "autograd is FusedBackend's: "
    "on the pixel grid and on one point",
}


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    matches = {pattern: [item for item in items if re.search(pattern, item.nodeid)] for pattern in LEFT_OUT}
    if {item.path.stem for item in items} >= set(INTERPRETED):  # not where somebody runs a file
        for pattern in (pattern for pattern, some in matches.items() if not some):
            raise ValueError(f"LEFT_OUT: {pattern!r} matches no test: was one renamed?")
    left_out = {item for some in matches.values() for item in some}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]


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


def _check_overflow(self: Any, lhs: Any, rhs: Any, binary_op: Any) -> None:
    """Of an integer sum, difference or product, whose operands have one type and shape by now. The interpreter computes each
    again in its own 64 bits, two fifths of its time, to throw the verdict away: its assertions are off without `debug`.
    Lanes that a mask leaves out count, too; 64 bits, casts and sums along an axis do not."""
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    operands = [side.handle.data.astype(np.int64) for side in (lhs, rhs)]
    exact = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[binary_op.__name__](*operands)
    fits = (dtype.get_int_min_value() <= exact) & (exact <= dtype.get_int_max_value())
    assert fits.all(), f"{binary_op.__name__} of {dtype} overflows"


TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, Any] = {}


def _np_dtype_once(dtype: Any) -> Any:
    """The interpreter fills a table of all types at each of its operations, to look one up."""
    scalar = dtype.scalar
    if scalar.name not in _np_dtypes:
        _np_dtypes[scalar.name] = _np_dtype(scalar)
    return _np_dtypes[scalar.name]


interpreter._get_np_dtype = _np_dtype_once


_block_type, _tensor = tl.block_type.__init__, tl.tensor.__init__
_block_types: dict[Any, dict[str, Any]] = {}
_tensors: dict[str, dict[str, Any]] = {}


def _block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
    """Each of the interpreter's values has a type and a shape of its own, equal to those of hundreds of others."""
    key = element_ty.name, *(getattr(size, "value", size) for size in shape)
    if key not in _block_types:
        _block_type(self, element_ty, shape)
        _block_types[key] = dict(vars(self))
    vars(self).update(_block_types[key])


def _tensor_once(self: Any, handle: Any, type: Any) -> None:
    if type.name not in _tensors:
        _tensor(self, None, type)
        _tensors[type.name] = {name: value for name, value in vars(self).items() if name not in ("handle", "type")}
    vars(self).update(_tensors[type.name], handle=handle, type=type)


tl.tensor.__init__ = _tensor_once
tl.block_type.__init__ = _block_type_once
warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton.runtime.interpreter")


class _Kept:
    """A patch that lasts as long as the launch."""

    def restore(self) -> None:
        pass


_patch_lang = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__
_scopes: dict[int, Any] = {}


def _patch_once(function: Any) -> Any:
    """The interpreter patches triton.language anew for each call of a helper, a third of its time: once a module will do."""
    module = id(function.__globals__)
    if module not in _scopes:
        _scopes[module] = _patch_lang(function)
    return _Kept()


def _launch_and_restore(self: Any, *args: Any, **kwargs: Any) -> None:
    try:
        _launch(self, *args, **kwargs)
    finally:
        for scope in reversed(_scopes.values()):
            if scope is not None:
                scope.restore()
        _scopes.clear()


interpreter._patch_lang = _patch_once
interpreter.GridExecutor.__call__ = _launch_and_restore
