"""Fixtures and settings that the operator's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch

from . import cuda_emulation

cuda_emulation.register()  # before tests ask which backends there are

# The same examples in every run: a failure must be one that the next person can see too.
hypothesis.settings.register_profile(
    "coarse",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("coarse")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: more than about ten seconds on two cores")


@pytest.fixture
def poison() -> Iterator[None]:
    """Fresh memory holds NaN (labels: the largest integer), so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
