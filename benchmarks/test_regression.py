"""Regression timings of the fused CPU operator with pytest-benchmark; not part of the default test run.

    pytest benchmarks/test_regression.py --benchmark-autosave
    pytest benchmarks/test_regression.py --benchmark-compare --benchmark-compare-fail=median:10%

Small shapes, one thread. Absolute times of one machine against itself; for comparisons with PyTorch: `benchmarks.cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import coarse_kernels
from benchmarks.cases import Case, make_inputs
from benchmarks.contestants import Contestant, clear, errors, ours, run_once, truth, verdict

pytest.importorskip("pytest_benchmark")

CASES = (
    Case("c2", 2, 128, 256),
    Case("c10", 10, 64, 128),
    Case("c19", 19, 64, 128),
    Case("c19-negative", 19, 64, 128, stream="negative"),
    Case("c19-forward", 19, 64, 128, mode="forward"),
    Case("c19-bfloat16", 19, 64, 128, dtype="bfloat16"),
    Case("c19-stride8", 19, 128, 256, 8),
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("schedule", ["one_pass", "recompute"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(benchmark: Any, case: Case, schedule: str) -> None:
    if "cpu" not in coarse_kernels.available_backends("cpu"):
        pytest.skip("the compiled extension is missing")
    if case.mode == "forward" and schedule == "recompute":
        pytest.skip("without gradients there is one schedule")
    contestant = Contestant("coarse_kernels:cpu", ours("cpu"), 1, schedule)
    inputs = make_inputs(case)
    assert verdict(case, errors(contestant, inputs, truth(inputs))) is None

    def once() -> None:
        clear(inputs)
        run_once(contestant, inputs)

    with contestant.setting():
        benchmark(once)
