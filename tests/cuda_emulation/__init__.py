"""The CUDA kernels as one more backend on CPU tensors, `cuda-emulated`, so that every test of a backend is one of them too."""

from __future__ import annotations

import torch

from coarse_kernels import backends
from coarse_kernels.backends import autograd, compiled, operator
from coarse_kernels.backends.cuda import CudaBackend

from . import build

NAME, NAMESPACE = "cuda-emulated", "coarse_kernels_emulated"


class EmulatedBackend(CudaBackend):
    error: str | None = None
    library: torch.library.Library | None = None  # the operators live as long as it does

    def unavailable(self) -> str | None:
        return self.error


def register() -> None:
    """Build the emulated kernels (a minute; once for each state of the sources) and add the backend, last but for the
    reference. COARSE_TEST_EMULATION=1 asks for it (conftest.py)."""
    if NAME in backends._REGISTRY:
        return
    backend = EmulatedBackend(NAME, ("cpu",), NAMESPACE)
    try:
        torch.ops.load_library(str(build.library()))
        backend.library = operator.declare(NAMESPACE)
        backend.library.define(compiled.KERNELS_OF)
        autograd.register(NAMESPACE, backend.library)
    except (RuntimeError, OSError) as error:
        backend.error = f"{type(error).__name__}: {error}"
    reference = backends._REGISTRY.pop("reference")
    backends._REGISTRY.update({NAME: backend, "reference": reference})
