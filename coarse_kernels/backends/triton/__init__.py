"""placeholder"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ...checks import Stream
from .. import operator
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


class TritonBackend(operator.FusedBackend):
    def unavailable(self) -> str | None:
        return _MISSING

    def unsupported(self, stream: Stream) -> str | None:
        if stream.num_classes > MAX_CLASSES:
            return f"it serves up to {MAX_CLASSES} classes, got {stream.num_classes}"
        return None


def _on_first_call(name: str) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        # imports Triton
        return getattr(importlib.import_module(f"{__name__}.launch"), name)(*args)

    return run


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for schema in operator.SCHEMAS:
        library.define(schema)
        name = schema.partition("(")[0]
        for key in ("CUDA", "XPU", *(("CPU",) if INTERPRETED else ())):
            library.impl(name, _on_first_call(name), key)
    operator.register(NAMESPACE)
    return library


_LIBRARY = _define()  # the operators live as long as this does
BACKEND = TritonBackend("triton", ("cuda", "xpu", *(("cpu",) if INTERPRETED else ())), NAMESPACE)
