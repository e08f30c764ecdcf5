"""compute-sanitizer over sanitize.py: memory accesses (memcheck) and races in shared memory (racecheck)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.gpu import sanitize
from tests.gpu.device import CUDA, backends, needs_cuda, require
from tests.helpers import ROOT

DEVICE = require()

TIMEOUT = 240.0  # seconds; a tool that needs longer on so little is not working


def tool() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    candidates = ["compute-sanitizer", *(str(Path(home, "bin", "compute-sanitizer")) for home in homes if home)]
    return next((found for found in map(shutil.which, candidates) if found), None)


def run_under(command: list[str], backend: str) -> subprocess.CompletedProcess[str]:
    # No caching: with an allocation per tensor, an access beyond its end is beyond an allocation.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*command, sys.executable, "-m", "tests.gpu.sanitize", DEVICE, backend]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False
    )


@needs_cuda
@pytest.mark.fused
@pytest.mark.parametrize("check", ["memcheck", "racecheck"])
def test_compute_sanitizer(backend: str, check: str) -> None:
    sanitizer = tool()
    if sanitizer is None:
        pytest.skip("compute-sanitizer is neither on the PATH nor under CUDA_HOME")
    assert run_under([], backend).returncode == 0  # without the tool; and what is compiled at run time now is
    try:
        done = run_under([sanitizer, "--tool", check, "--error-exitcode", "1"], backend)
    except subprocess.TimeoutExpired:
        pytest.skip(f"compute-sanitizer --tool {check} did not end within {TIMEOUT:.0f} s")
    for refusal in ("Device not supported", "Unable to find injection library", "Failed to initialize"):
        if refusal in done.stdout + done.stderr:
            pytest.skip(f"compute-sanitizer cannot work here: {refusal}")
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert "0 wrong" in done.stdout


@pytest.mark.skipif(CUDA, reason="the rehearsal's own check")
def test_the_script_itself() -> None:
    assert sanitize.main([DEVICE]) == 0
    assert sanitize.main([DEVICE, *backends()]) == 0
