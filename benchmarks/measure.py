"""Clocks and meters: interleaved timing, page faults, peak memory, copy bandwidth, the machine.

A `Meter` is one kind of device. On the CPU time is wall-clock time and memory is resident memory; on CUDA time is between
two events, and memory is what the caching allocator has handed out. `time_all` and the table are the same for both.
"""

from __future__ import annotations

import datetime
import gc
import math
import os
import platform
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from coarse_kernels import native

from .cases import AnyInputs
from .contestants import Contestant, DoesNotFit, clear, run_once

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
    page_faults: float  # median per run; on CUDA, calls of cudaMalloc
    cpu_share: float  # CPU time over wall time of all runs: below the thread count, someone else had the core
    runs: int
    host_ms: float  # until the call is back; on CUDA the device may still be at work, on the CPU it is the time itself


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


class _Sample(NamedTuple):
    seconds: float
    cpu_seconds: float
    faults: float
    host_seconds: float


class Meter(Protocol):
    """What is different from one kind of device to the next."""

    warm_below: float  # a run shorter than this, in seconds, follows an untimed one

    def timed(self, contestant: Contestant, inputs: AnyInputs) -> _Sample:
        """One run under all meters; what went before is freed outside the clock."""

    def make_room(self) -> None:
        """Called outside the clock, before the untimed run of a turn and after one that ran out of memory."""

    def peak_extra_bytes(self, contestant: Contestant, inputs: AnyInputs) -> float:
        """Peak memory of one run over what was in use before it: gradients included. After a warm-up."""

    def copy_bandwidth(self, threads: int) -> float:
        """GB/s, bytes read + bytes written, of the fastest copy known here: the ceiling that fractions refer to."""

    def environment(self) -> dict[str, str | int]:
        """Columns of the CSV that say where it was measured."""


def _timed(contestant: Contestant, inputs: AnyInputs) -> _Sample:
    clear(inputs)
    before = resource.getrusage(resource.RUSAGE_SELF)
    start = time.perf_counter()
    run_once(contestant, inputs)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Sample(seconds, cpu, after.ru_minflt - before.ru_minflt, seconds)


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
    contestants: Sequence[Contestant],
    inputs: AnyInputs,
    budget: float,
    repeats: int | None = None,
    meter: Meter | None = None,
) -> list[Timing]:
    """Round robin, so that a slow minute of the machine hits everyone.

    A run shorter than 50 ms follows an untimed one: otherwise it pays for the caches that its predecessor has emptied. On
    CUDA every run does: the allocator has to have the blocks again that others took.
    """
    chosen = CpuMeter() if meter is None else meter

    def timed(contestant: Contestant) -> _Sample:
        try:
            return chosen.timed(contestant, inputs)
        except torch.OutOfMemoryError as error:  # it did fit alone, but not beside what the others have left
            reason = str(error).splitlines()[0]
        raise DoesNotFit(contestant, reason)

    estimates = []
    for contestant in contestants:
        with contestant.setting():
            chosen.make_room()
            seconds = timed(contestant).seconds
            if seconds < 0.2:  # the first run may have paid for page faults; a slow one is slow either way
                seconds = timed(contestant).seconds
            estimates.append(seconds)
    rounds = [rounds_for(2 * seconds, budget / len(contestants), repeats) for seconds in estimates]
    samples: list[list[_Sample]] = [[] for _ in contestants]
    gc.collect()
    gc.disable()
    try:
        for turn in interleave(rounds):
            for k in turn:
                with contestants[k].setting():
                    if estimates[k] < chosen.warm_below:
                        chosen.make_room()
                        timed(contestants[k])
                    samples[k].append(timed(contestants[k]))
    finally:
        gc.enable()
        clear(inputs)
    timings = []
    for sample in samples:
        milliseconds = [1e3 * one.seconds for one in sample]
        timings.append(
            Timing(
                statistics.median(milliseconds),
                percentile(milliseconds, 0.2),
                percentile(milliseconds, 0.8),
                statistics.median(one.faults for one in sample),
                sum(one.cpu_seconds for one in sample) / sum(one.seconds for one in sample),
                len(sample),
                1e3 * statistics.median(one.host_seconds for one in sample),
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


def peak_extra_bytes(contestant: Contestant, inputs: AnyInputs) -> float:
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


class CpuMeter:
    """Wall-clock time and resident memory of this process."""

    warm_below = 0.05

    def timed(self, contestant: Contestant, inputs: AnyInputs) -> _Sample:
        return _timed(contestant, inputs)

    def make_room(self) -> None:
        pass

    def peak_extra_bytes(self, contestant: Contestant, inputs: AnyInputs) -> float:
        return peak_extra_bytes(contestant, inputs)

    def copy_bandwidth(self, threads: int) -> float:
        return copy_bandwidth(threads)

    def environment(self) -> dict[str, str | int]:
        return environment()


class CudaMeter:
    """Device time between two events, memory of the caching allocator.

    Each run is queued behind a write of `FLUSH_BYTES`, which leaves nothing of the inputs in the L2 cache (buffers are not
    rotated: a second set of inputs takes gigabytes, and would not fit beside the contestants that need most), and behind a
    pause that is longer than the host takes to queue the run. So the device never waits for the host, as in training,
    where the host is ahead; what the host took is in a column of its own. A contestant that waits for the device in the
    middle (a `.item()`) pays for it.
    """

    warm_below = math.inf
    FLUSH_BYTES = 256 << 20  # several times any L2 cache so far
    LONGEST_PAUSE = 0.02  # seconds

    def __init__(self) -> None:
        self.flush = torch.empty(self.FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.host: dict[str, float] = {}  # seconds that a contestant's host part took last time

    def timed(self, contestant: Contestant, inputs: AnyInputs) -> _Sample:
        clear(inputs)
        name = f"{contestant.name} {contestant.schedule}"
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        mallocs = self._mallocs()
        torch.cuda.synchronize()
        self.flush.zero_()
        pause = min(1.5 * self.host.get(name, 1e-3) + 1e-4, self.LONGEST_PAUSE)
        torch.cuda._sleep(int(2e9 * pause))  # cycles of a clock that is below 2 GHz
        start.record()
        begin, cpu = time.perf_counter(), time.process_time()
        run_once(contestant, inputs)
        host, cpu = time.perf_counter() - begin, time.process_time() - cpu
        stop.record()
        stop.synchronize()
        self.host[name] = host
        return _Sample(1e-3 * start.elapsed_time(stop), cpu, self._mallocs() - mallocs, host)

    def _mallocs(self) -> float:
        return float(torch.cuda.memory_stats().get("num_device_alloc", math.nan))

    def make_room(self) -> None:
        """Cached blocks go back once they are half of the device: otherwise the allocator may have to do it, timed."""
        if torch.cuda.memory_reserved() > torch.cuda.get_device_properties().total_memory / 2:
            gc.collect()
            torch.cuda.empty_cache()

    def peak_extra_bytes(self, contestant: Contestant, inputs: AnyInputs) -> float:
        clear(inputs)
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with contestant.setting():
            run_once(contestant, inputs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def copy_bandwidth(self, threads: int, megabytes: int = 1024) -> float:
        source = torch.rand(megabytes * 2**20 // 4, device="cuda")  # not a constant: the memory must not get to know it
        target = torch.empty_like(source)
        best = math.inf
        for _ in range(20):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            stop.record()
            stop.synchronize()
            best = min(best, 1e-3 * start.elapsed_time(stop))
        return 2 * source.nbytes / best / 1e9

    def environment(self) -> dict[str, str | int]:
        return {**environment(), **gpu_environment()}


def gpu_environment() -> dict[str, str | int]:
    """The GPU, its driver and what is compiled for it; empty words where there is none."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "none"
    found = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if found else "none",
        "driver": _driver() if found else "none",
        "cuda": torch.version.cuda or "none",
        "triton": triton_version,
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"


def meter_for(device: str) -> Meter:
    return CudaMeter() if torch.device(device).type == "cuda" else CpuMeter()
