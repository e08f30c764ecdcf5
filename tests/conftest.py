"""Fixtures and settings that the operator's tests share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from zlib import crc32

import hypothesis
import pytest
import torch

from tests import cuda_emulation

if os.environ.get("COARSE_TEST_EMULATION") == "1":
    cuda_emulation.register()  # before tests ask which backends there are

from tests import helpers

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
    config.addinivalue_line("markers", "slow: more than about three seconds of a core; make test-slow")
    config.addinivalue_line(
        "markers", "kernels: of kernels that no CPU runs as they are, tests/kernels.py; make test-kernels"
    )
    config.addinivalue_line(
        "markers", "sampled(n): of its cases (of each backend) make test runs one in n, and make test-slow the others"
    )
    config.addinivalue_line("markers", "fused: once per fused backend of the collecting module's DEVICE, as `backend`")
    config.addinivalue_line("markers", "every: the same, and on the CPU the reference as well")
    # Threads of two processes on two cores wait for each other. Tests that are about threads ask for their number.
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test of each backend is one of the kernels where that backend is emulated or interpreted; of one that is sampled most
    cases are slow."""
    sampled: dict[tuple[str, object], list[pytest.Item]] = {}
    for item in items:
        case = getattr(item, "callspec", None)
        if case is not None and case.params.get("backend") in (cuda_emulation.NAME, "triton"):
            item.add_marker("kernels")
        elif item.get_closest_marker("sampled") and not item.get_closest_marker("slow"):
            backend = None if case is None else case.params.get("backend")
            sampled.setdefault((item.nodeid.partition("[")[0], backend), []).append(item)
    for cases in sampled.values():
        marker = cases[0].get_closest_marker("sampled")
        assert marker is not None
        kept = math.ceil(len(cases) / marker.args[0])
        # by a number that has nothing to do with their order, in which the innermost parameter comes round and round
        for item in sorted(cases, key=lambda item: crc32(item.nodeid.encode()))[kept:]:
            item.add_marker("slow")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`fused` and `every` depend on the module that collects a test, not on the one that defines it: tests/gpu collects the
    operator's tests a second time, with its own DEVICE.
    """
    device = getattr(metafunc.module, "DEVICE", "cpu")
    if metafunc.definition.get_closest_marker("fused"):
        metafunc.parametrize("backend", helpers.fused(device))
    elif metafunc.definition.get_closest_marker("every"):
        on_cpu = device == "cpu" and not hasattr(metafunc.module, "DEVICE")
        metafunc.parametrize("backend", helpers.ck.available_backends() if on_cpu else helpers.fused(device))


@pytest.fixture(autouse=True, scope="session")
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is remembered of data sets stays out of the user's folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def device_under_test(request: pytest.FixtureRequest) -> Iterator[None]:
    helpers.use_device(getattr(request.module, "DEVICE", "cpu"))
    yield
    helpers.use_device("cpu")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small networks, where threads wait for each other longer than they compute; and a fixed seed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poison(device_under_test: None) -> Iterator[None]:
    """Fresh memory holds NaN (labels: the largest integer), so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    # On CUDA some of PyTorch's own operators have no deterministic form; what is wanted here is the filling.
    torch.use_deterministic_algorithms(True, warn_only=helpers.device().type == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        assert torch.empty(3, device=helpers.device()).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
