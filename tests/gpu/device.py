"""The device of this directory: CUDA, or what COARSE_TEST_DEVICE names.

COARSE_TEST_DEVICE=cpu rehearses the harness on a machine without a GPU: whatever does not need CUDA itself then runs on CPU
tensors with the CPU backend, and the rest skips with its reason. It says nothing about a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch

from tests.helpers import fused

DEVICE = os.environ.get("COARSE_TEST_DEVICE", "cuda")
CUDA = torch.device(DEVICE).type == "cuda"


def no_device() -> str | None:
    """Why nothing here can run, or None."""
    if not CUDA or torch.cuda.is_available():
        return None
    why = "torch is built without CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
    return f"tests/gpu: {why} (torch {torch.__version__}); COARSE_TEST_DEVICE=cpu rehearses the harness"


def require() -> str:
    """The device; skips the calling module as a whole where there is none."""
    if reason := no_device():
        pytest.skip(reason, allow_module_level=True)
    return DEVICE


def backends() -> tuple[str, ...]:
    return fused(DEVICE)


needs_cuda = pytest.mark.skipif(not CUDA, reason=f"needs CUDA itself; COARSE_TEST_DEVICE={DEVICE}")


def needs_memory(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:.0f} GB of free device memory, there are {free:.1f}")
