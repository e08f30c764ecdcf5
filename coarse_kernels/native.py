"""The compiled modules, if they were built: `_C` and `_cuda` (operators, LibTorch stable ABI), `_native` (pybind11, no torch).

Nothing here raises on import but an instruction set that does not exist (COARSE_KERNELS_ISA): the reason why a module is
missing is kept for `env_report` and for error messages.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor


def _load(name: str) -> tuple[ModuleType | None, str | None]:
    spec = importlib.util.find_spec(f"coarse_kernels.{name}")
    limited = spec is not None and (spec.origin or "").endswith(".abi3.so")
    if limited and sysconfig.get_config_var("Py_GIL_DISABLED"):  # 3.13.0 loads it, and crashes
        return None, _reason(name, "it is for the limited API, which a free-threaded Python lacks")
    try:
        return importlib.import_module(f"coarse_kernels.{name}"), None
    except ImportError as error:  # not built, or built against another Python or torch
        return None, _reason(name, f"{type(error).__name__}: {error}")


def _reason(name: str, error: str) -> str:
    """Of a module that is not there what setup.py noted, of one that does not load the error."""
    if importlib.util.find_spec(f"coarse_kernels.{name}") is not None:
        return f"it was built, but does not load: {error}"
    try:
        noted = json.loads(Path(__file__).with_name("not_built.json").read_text(encoding="utf-8"))[name]
        return f"it was not built: {noted}"
    except (OSError, ValueError, LookupError):  # COARSE_KERNELS_BUILD=0, Windows, or a copy of the sources
        return f"nothing was compiled: {error}"


INSTRUCTION_SETS = ("baseline", "avx2", "avx512")  # dispatch.cpp takes another name for the first
if (os.environ.get("COARSE_KERNELS_ISA") or "baseline") not in INSTRUCTION_SETS:
    raise ValueError(
        f"COARSE_KERNELS_ISA: expected one of {INSTRUCTION_SETS}, got {os.environ['COARSE_KERNELS_ISA']!r}"
    )

# torch is imported above: the operators link against its libraries.
OPERATORS, OPERATORS_ERROR = _load("_C")
CUDA, CUDA_ERROR = (None, "it needs the module _C") if OPERATORS is None else _load("_cuda")
TOOLS, TOOLS_ERROR = _load("_native")


def operators_reason() -> str | None:
    """Why the compiled operators cannot be used, or None."""
    if OPERATORS is not None:
        return None
    return (
        f"the compiled extension is missing: {OPERATORS_ERROR}. With a C++ compiler (GCC or Clang), "
        "`COARSE_KERNELS_BUILD=1 pip install --no-build-isolation -v .` in the source folder builds it or stops where it cannot"
    )


def cuda_reason() -> str | None:
    """Why the CUDA operators cannot be used, or None."""
    if CUDA is not None:
        return None
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    return (
        f"the CUDA extension is missing: {CUDA_ERROR}. With nvcc, `COARSE_CUDA=1 pip install --no-build-isolation -v .` in "
        "the source folder builds it or stops where it cannot"
    )


def first_bad_label(labels: Tensor, num_classes: int, ignore_index: int) -> int | None:
    """A label outside [0, num_classes) that is not ``ignore_index``, or None. ``labels``: uint8 or int64."""
    if OPERATORS is not None and labels.device.type == "cpu":
        found, label = torch.ops.coarse_kernels.find_bad_label(labels, num_classes, ignore_index).tolist()
        return label if found else None
    labels = labels.long()  # or a number above 255 would wrap
    bad = labels[((labels < 0) | (labels >= num_classes)) & (labels != ignore_index)]
    return int(bad[0]) if bad.numel() else None
