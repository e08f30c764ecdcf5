"""Clocks and meters: interleaved timing, page faults, peak memory, copy bandwidth, the machine."""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import resource
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coarse_kernels import native

from .cases import Inputs
from .contestants import Contestant, clear, run_once

# glibc hands large freed blocks back to the kernel, so that a gradient of 47 MB is page-faulted in afresh each time it
# is allocated. Under these settings it keeps them. Read by malloc at start-up: a worker process gets one or the other.
REUSE_ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
    "MALLOC_ARENA_MAX": "1",
}
# To measure memory: every block of 64 KB and more is mapped, and unmapped when freed: resident is then live.
LIVE_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_MMAP_MAX_": str(1 << 20)}

LEAST_ROUNDS = 3


class Timing(NamedTuple):
    median_ms: float
    p20_ms: float
    p80_ms: float
    page_faults: float  # median per run
    cpu_share: float  # CPU time over wall time of all runs: below the thread count, someone else had the core
    runs: int


def _percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


def _synchronize(inputs: Inputs) -> None:
    if inputs.seg_logits.device.type == "cuda":
        torch.cuda.synchronize()


class _Sample(NamedTuple):
    seconds: float
    cpu_seconds: float
    faults: int


def _timed(contestant: Contestant, inputs: Inputs) -> _Sample:
    """One run under all meters; what went before is freed outside the clock."""
    clear(inputs)
    _synchronize(inputs)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    run_once(contestant, inputs)
    _synchronize(inputs)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Sample(seconds, cpu, after.ru_minflt - before.ru_minflt)


def rounds_for(seconds: float, share: float, repeats: int | None) -> int:
    """How often a contestant that takes ``seconds`` runs if it may use ``share`` seconds: at least 3 times."""
    most = 60 if repeats is None else max(repeats, LEAST_ROUNDS)
    return max(LEAST_ROUNDS, min(most, int(share / max(seconds, 1e-9))))


def interleave(rounds: Sequence[int]) -> list[list[int]]:
    """For each round, who runs: contestant k in ``rounds[k]`` rounds, spread evenly over all."""
    total = max(rounds)
    return [
        [k for k, own in enumerate(rounds) if (turn + 1) * own // total > turn * own // total] for turn in range(total)
    ]


def time_all(
    contestants: Sequence[Contestant], inputs: Inputs, budget: float, repeats: int | None = None
) -> list[Timing]:
    """Round robin, so that a slow minute of the machine hits everyone.

    A run shorter than 50 ms follows an untimed one: otherwise it pays for the caches that its predecessor has emptied.
    """
    estimates = []
    for contestant in contestants:
        with contestant.setting():
            seconds = _timed(contestant, inputs).seconds
            if seconds < 0.2:  # the first run may have paid for page faults; a slow one is slow either way
                seconds = _timed(contestant, inputs).seconds
            estimates.append(seconds)
    rounds = [rounds_for(2 * seconds, budget / len(contestants), repeats) for seconds in estimates]
    samples: list[list[_Sample]] = [[] for _ in contestants]
    gc.collect()
    gc.disable()
    try:
        for turn in interleave(rounds):
            for k in turn:
                with contestants[k].setting():
                    if estimates[k] < 0.05:
                        _timed(contestants[k], inputs)
                    samples[k].append(_timed(contestants[k], inputs))
    finally:
        gc.enable()
        clear(inputs)
    timings = []
    for sample in samples:
        milliseconds = [1e3 * one.seconds for one in sample]
        timings.append(
            Timing(
                statistics.median(milliseconds),
                _percentile(milliseconds, 0.2),
                _percentile(milliseconds, 0.8),
                statistics.median(one.faults for one in sample),
                sum(one.cpu_seconds for one in sample) / sum(one.seconds for one in sample),
                len(sample),
            )
        )
    return timings


def _status_kb(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def _peak_by_reset(work: Callable[[], Any]) -> int:
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
    before = _status_kb("VmRSS")
    work()
    return 1024 * (_status_kb("VmHWM") - before)


def _peak_by_sampling(work: Callable[[], Any]) -> int:
    """Where the high-water mark cannot be reset. Misses peaks shorter than a millisecond."""
    before = peak = _status_kb("VmRSS")
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.0005):
            peak = max(peak, _status_kb("VmRSS"))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return 1024 * (max(peak, _status_kb("VmRSS")) - before)


def peak_extra_bytes(contestant: Contestant, inputs: Inputs) -> float:
    """Peak resident memory of one run, over what was resident before it. NaN where the system does not tell.

    It contains the gradients, since those are new. Only meaningful under `LIVE_ENVIRONMENT`, after a warm-up.
    """
    clear(inputs)
    gc.collect()
    with contestant.setting():
        for meter in (_peak_by_reset, _peak_by_sampling):
            try:
                return max(0, meter(lambda: run_once(contestant, inputs)))
            except OSError:
                clear(inputs)
    return math.nan


def copy_bandwidth(threads: int, megabytes: int = 256) -> float:
    """GB/s, bytes read + bytes written, of the fastest copy known here: the ceiling that fractions refer to.

    PyTorch's copy_, and the extension's streaming copy (one thread) where it is built. Into touched memory.
    """
    source = torch.ones(megabytes * 2**20 // 4)
    target = torch.ones_like(source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        best = math.inf
        for _ in range(9):
            start = time.perf_counter()
            target.copy_(source)
            best = min(best, time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    ceiling = 2 * source.nbytes / best / 1e9
    streaming = getattr(native.TOOLS, "copy_bandwidth", None)
    if streaming is not None and threads == 1:
        ceiling = max(ceiling, float(streaming()) / 1e9)
    return ceiling


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _isa() -> str:
    """Instruction set in use: of PyTorch, and of the extension where it is built."""
    used = f"torch {torch.backends.cpu.get_cpu_capability()}"
    info = getattr(native.TOOLS, "cpu_info", None)
    if info is not None:
        facts = info()
        used += f"; coarse_kernels {facts.get('isa', facts) if isinstance(facts, dict) else facts}"
    return used


def environment() -> dict[str, str | int]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "isa": _isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
        "date": datetime.date.today().isoformat(),
    }
