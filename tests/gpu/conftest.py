"""Says why a run without a device skipped everything."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.device import DEVICE, backends, no_device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reason = no_device()
    if reason is None:
        name = torch.cuda.get_device_name() if torch.device(DEVICE).type == "cuda" else "a rehearsal, no GPU figure"
        reason = f"tests/gpu: {DEVICE} ({name}), backends {', '.join(backends()) or 'none but the reference'}"
    terminalreporter.write_line(reason)
