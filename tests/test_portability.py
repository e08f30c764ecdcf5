"""What Windows and macOS do otherwise, as far as it can be had here: neither was run. CONTRIBUTING.md lists the rest."""

from __future__ import annotations

import math
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import limits, meters, run
from coarse_train import interrupt
from coarse_train.experiments import table
from tests.helpers import run_python


def test_a_system_without_affinity_counts_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows have no os.sched_getaffinity."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert table._cores() == limits._cores() == (os.cpu_count() or 1)
    assert run.cores(2) == [0, 1]


@pytest.mark.slow
def test_time_is_measured_where_page_faults_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no module resource; whoever imports it at the top of a module cannot be imported there."""
    monkeypatch.setitem(sys.modules, "resource", None)
    call: Any = SimpleNamespace(run=lambda: None)
    sample = meters.CpuMeter().timed(call)
    assert math.isnan(sample.faults)
    assert 0 <= sample.seconds < 1
    done = run_python("import sys; sys.modules['resource'] = None; import benchmarks.step, benchmarks.run")
    assert done.returncode == 0, done.stderr


def test_a_worker_is_shielded_where_there_is_no_alarm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "alarm", raising=False)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        interrupt.shield_worker(0)
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.slow
def test_a_training_run_whose_workers_are_spawned(tmp_path: Path) -> None:
    """As on macOS and Windows; Python 3.14 forks from a server on Linux, which pickles the same."""
    arguments = [
        "fit",
        "mnist",
        "--steps",
        "1",
        "--batch-size",
        "2",
        "--limit",
        "4",
        "--pictures",
        "0",
        "--workers",
        "1",
    ]
    arguments += ["--device", "cpu", "--out", str(tmp_path / "run")]
    code = (
        "import multiprocessing, sys\n"
        "from coarse_train.__main__ import main\n"
        "multiprocessing.set_start_method('spawn')\n"
        f"sys.argv = ['coarse-train', *{arguments!r}]\n"
        "sys.exit(main())"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "last.pt").is_file()
