"""Clocks and meters: interleaved timing, page faults, peak memory. A `Meter` is one kind of device.

On the CPU time is wall-clock time and memory is resident memory; on CUDA time is between two events, and memory is what the
caching allocator has handed out. What is done with them is the same for both.
"""

from __future__ import annotations

import gc
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

import coarse_kernels

from .providers import setting
from .verify import Call, DoesNotFit, lacks_memory

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

LEAST_ROUNDS, OUR_ROUNDS, MOST_ROUNDS = 3, 11, 60


class Timing(NamedTuple):
    median: float  # seconds
    p20: float
    p80: float
    runs: int
    page_faults: float  # median per run; on CUDA, calls of cudaMalloc
    cpu_share: float  # CPU time over wall time of all runs: below the thread count, somebody else had the core
    host: float  # seconds until the call is back; on CUDA the device may still be at work, on the CPU it is the time itself


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[round(share * (len(ordered) - 1))]


class Sample(NamedTuple):
    seconds: float
    cpu_seconds: float
    faults: float
    host_seconds: float


class Meter(Protocol):
    """What is different from one kind of device to the next."""

    warm_below: float  # a run shorter than this, in seconds, follows an untimed one

    def timed(self, call: Call) -> Sample:
        """One run under all meters, after `Call.before`."""

    def make_room(self) -> None:
        """Called outside the clock, before the untimed run of a turn and after one that ran out of memory."""

    def peak_extra_bytes(self, call: Call) -> float:
        """Peak memory of one run over what was in use before it: gradients included. After a warm-up."""


def rounds_for(seconds: float, share: float, most: int = MOST_ROUNDS, least: int = LEAST_ROUNDS) -> int:
    """How often a call that takes ``seconds`` runs if it may use ``share`` seconds: at least ``least`` times."""
    return min(most, max(least, int(share / max(seconds, 1e-9))))


def interleave(rounds: Sequence[int]) -> list[list[int]]:
    """For each round, who runs: call k in ``rounds[k]`` rounds, spread evenly over all."""
    total = max(rounds)
    return [
        [k for k, own in enumerate(rounds) if (turn + 1) * own // total > turn * own // total] for turn in range(total)
    ]


def time_all(calls: Sequence[Call], meter: Meter, budget: float, most: int = MOST_ROUNDS) -> list[Timing]:
    """Round robin, so that a slow minute of the machine hits everyone. ``budget``: seconds for all.

    A run shorter than 50 ms follows an untimed one: otherwise it pays for the caches that its predecessor has emptied. On
    CUDA every run does: the allocator has to have the blocks again that others took. Raises `DoesNotFit` with the call as its
    second argument.
    """

    def timed(call: Call) -> Sample:
        try:
            call.before()
            return meter.timed(call)
        except Exception as error:
            if not lacks_memory(error):
                raise
            # it did fit alone, but not beside what the others have left
            reason = (str(error).splitlines() or ["out of memory"])[0]
        finally:
            call.after()
        raise DoesNotFit(reason, call)

    estimates = []
    for call in calls:
        with setting(call.provider, call.problem.threads):
            meter.make_room()
            seconds = timed(call).seconds
            if seconds < 0.2:  # the first run may have paid for page faults; a slow one is slow either way
                seconds = timed(call).seconds
            estimates.append(seconds)
    # the untimed run in front of each counts, too
    rounds = [
        # ours is in every ratio: not by three runs of a noisy second, where it is short
        rounds_for(
            2 * s, budget / len(calls), most, OUR_ROUNDS if c.provider.group == "ours" and s < 0.1 else LEAST_ROUNDS
        )
        for c, s in zip(calls, estimates, strict=True)
    ]
    samples: list[list[Sample]] = [[] for _ in calls]
    gc.collect()
    gc.disable()
    try:
        for turn in interleave(rounds):
            for k in turn:
                with setting(calls[k].provider, calls[k].problem.threads):
                    if estimates[k] < meter.warm_below:
                        meter.make_room()
                        timed(calls[k])
                    samples[k].append(timed(calls[k]))
    finally:
        gc.enable()
    return [_timing(sample) for sample in samples]


def _timing(sample: Sequence[Sample]) -> Timing:
    seconds = [one.seconds for one in sample]
    return Timing(
        statistics.median(seconds),
        percentile(seconds, 0.2),
        percentile(seconds, 0.8),
        len(sample),
        statistics.median(one.faults for one in sample),
        sum(one.cpu_seconds for one in sample) / sum(seconds),
        statistics.median(one.host_seconds for one in sample),
    )


# ---- CPU -------------------------------------------------------------------------------------------------------------


class CpuMeter:
    """Wall-clock time and resident memory of this process."""

    warm_below = 0.05

    def timed(self, call: Call) -> Sample:
        faults, cpu = _faults(), time.process_time()
        start = time.perf_counter()
        call.run()
        seconds = time.perf_counter() - start
        return Sample(seconds, time.process_time() - cpu, _faults() - faults, seconds)

    def make_room(self) -> None:
        pass

    def peak_extra_bytes(self, call: Call) -> float:
        """NaN where the system does not tell. Only meaningful under `LIVE_ENVIRONMENT`."""
        gc.collect()
        with setting(call.provider, call.problem.threads):
            for measure in (_peak_by_reset, _peak_by_sampling):
                call.before()
                coarse_kernels.empty_pool()  # what waits there would be used unseen
                try:
                    return max(0.0, float(measure(call.run)))
                except OSError:
                    continue
                finally:
                    call.after()
        return math.nan


def _faults() -> float:
    """Pages of this process that were touched for the first time; NaN where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


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


# ---- CUDA ------------------------------------------------------------------------------------------------------------


class CudaMeter:
    """Device time between two events, memory of the caching allocator.

    Each run is queued behind a write of `FLUSH_BYTES`, which leaves nothing of the inputs in the L2 cache (buffers are not
    rotated: a second set of inputs takes gigabytes, and would not fit beside the calls that need most), and behind a pause
    that is longer than the host takes to queue the run. So the device never waits for the host, as in training, where the
    host is ahead; what the host took is a quantity of its own. A call that waits for the device in the middle (a `.item()`)
    pays for it.
    """

    warm_below = math.inf
    FLUSH_BYTES = 256 << 20  # several times any L2 cache so far
    LONGEST_PAUSE = 0.02  # seconds

    def __init__(self) -> None:
        self.flush = torch.empty(self.FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.host: dict[str, float] = {}  # seconds that a call's host part took last time

    def timed(self, call: Call) -> Sample:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        mallocs = self._mallocs()
        torch.cuda.synchronize()
        self.flush.zero_()
        pause = min(1.5 * self.host.get(call.name, 1e-3) + 1e-4, self.LONGEST_PAUSE)
        torch.cuda._sleep(int(2e9 * pause))  # cycles of a clock that is below 2 GHz
        start.record()
        begin, cpu = time.perf_counter(), time.process_time()
        call.run()
        host, cpu = time.perf_counter() - begin, time.process_time() - cpu
        stop.record()
        stop.synchronize()
        self.host[call.name] = host
        return Sample(1e-3 * start.elapsed_time(stop), cpu, self._mallocs() - mallocs, host)

    def _mallocs(self) -> float:
        return float(torch.cuda.memory_stats().get("num_device_alloc", math.nan))

    def make_room(self) -> None:
        """Cached blocks go back once they are half of the device: otherwise the allocator may have to do it, timed."""
        if torch.cuda.memory_reserved() > torch.cuda.get_device_properties().total_memory / 2:
            gc.collect()
            torch.cuda.empty_cache()

    def peak_extra_bytes(self, call: Call) -> float:
        gc.collect()
        with setting(call.provider, call.problem.threads):
            call.before()
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            try:
                call.run()
                torch.cuda.synchronize()
                return torch.cuda.max_memory_allocated() - before
            finally:
                call.after()


def meter_for(device: str) -> Meter:
    return CudaMeter() if torch.device(device).type == "cuda" else CpuMeter()
