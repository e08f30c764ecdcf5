"""Says why a run without a device skipped everything, and ends a process whose CUDA context is lost."""

from __future__ import annotations

import os
import sys
from collections.abc import Generator
from typing import Any

import pytest
import torch

from tests.gpu.device import CUDA, DEVICE, backends, no_device


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Generator[None, Any, Any]:
    """After an illegal access every call of CUDA fails, so every later test of this process would, whatever it tests."""
    report = yield
    if CUDA and report.failed and call.when == "call" and (why := lost_context()):
        print(
            f"\n{item.nodeid}: the CUDA context is lost ({why})\n{report.longreprtext}", file=sys.__stderr__, flush=True
        )
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)  # pytest-xdist reports this test as the one that crashed, and starts another worker
        pytest.exit("the CUDA context is lost", returncode=3)
    return report


def lost_context() -> str | None:
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reason = no_device()
    if reason is None:
        name = torch.cuda.get_device_name() if torch.device(DEVICE).type == "cuda" else "a rehearsal, no GPU figure"
        reason = f"tests/gpu: {DEVICE} ({name}), backends {', '.join(backends()) or 'none but the reference'}"
    terminalreporter.write_line(reason)
