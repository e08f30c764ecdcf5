"""The machine: what it is, and its own limits, which a benchmark's figures are held against.

A case is bound by memory or by arithmetic. `measure` says how fast this machine copies, reads, forms exponentials and
multiplies and adds; `machine` and `hardware_name` say which machine that was.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from coarse_kernels import native, pool

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

DEVICES = ("cpu", "cuda")
CUDA_MEGABYTES = 1024
# Programs of a Triton kernel for each multiprocessor: several times what fits, so that the last to end do not count.
PROGRAMS, BLOCK, UNROLL = 64, 1024, 16

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_COMPANIES = {"intel", "amd", "apple", "arm", "ampere", "qualcomm"}


@dataclass(frozen=True)
class Limits:
    """Rates that nothing on the machine exceeds; NaN where unknown, and then `reasons` has why, by the field's name.

    copy: bytes/s of a copy in memory, read plus written. read: bytes/s of a sum. exp: float32 exponentials/s. fma: float32
    multiply-adds/s, a multiplication and an addition together being one.
    """

    copy: float
    read: float
    exp: float
    fma: float
    reasons: dict[str, str] = field(default_factory=dict)


def measure(device: str, threads: int, megabytes: int | None = None) -> Limits:
    """The limits of ``device`` ("cpu" or "cuda") with ``threads`` threads, which count on the CPU only.

    Buffers have ``megabytes`` (2^20 bytes); by default 1024 on CUDA, and on the CPU several times its largest cache: a
    buffer that fits in there is copied faster than memory can do it.
    """
    _check_device(device)
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    if megabytes is not None and megabytes < 1:
        raise ValueError(f"megabytes: expected at least 1, got {megabytes}")
    if device == "cuda":
        return _measure_cuda(megabytes or CUDA_MEGABYTES)
    return _measure_cpu(threads, megabytes or _past_the_caches())


def machine(device: str) -> dict[str, object]:
    """What a JSON file says of the machine; sizes in bytes, and only what the system tells. Names no host and no folder.

    cpu, cores (that this process may use), caches (by level), memory, isa_torch, isa_extension, torch, python, os,
    compiler (of the extension), pool_limit (of what waits in its pool), huge_pages; on "cuda" also gpu, driver, cuda, triton,
    multiprocessors, gpu_memory, gpu_l2.
    """
    _check_device(device)
    facts: dict[str, object] = {"cpu": _cpu_model(), "cores": _cores(), "caches": _caches()}
    if (memory := _memory()) is not None:
        facts["memory"] = memory
    facts["isa_torch"] = torch.backends.cpu.get_cpu_capability()
    if (isa := _extension_isa()) is not None:
        facts["isa_extension"] = isa
    facts |= {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "os": f"{platform.system()} {platform.release()}",
    }
    facts["pool_limit"] = pool.pool_limit()
    if (pages := _huge_pages()) is not None:
        facts["huge_pages"] = pages
    build_info = getattr(native.TOOLS, "build_info", None)
    if build_info is not None:
        facts["compiler"] = str(build_info()["compiler"])
    if device == "cuda":
        properties = torch.cuda.get_device_properties()
        facts |= {
            "gpu": properties.name,
            "driver": _driver(),
            "cuda": torch.version.cuda or "none",
            "triton": "none" if triton is None else str(triton.__version__),
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory": properties.total_memory,
            "gpu_l2": properties.L2_cache_size,
        }
    return facts


def hardware_name(device: str) -> str:
    """A folder's name for results of this machine: lower-case letters, digits and hyphens.

    On the CPU its model, instruction set and cores that this process may use, as in "xeon-processor-avx512-2-cores"; on
    CUDA the GPU's name, as in "nvidia-h200".
    """
    _check_device(device)
    if device == "cuda":
        return _slug(torch.cuda.get_device_name())
    isa = _extension_isa() or torch.backends.cpu.get_cpu_capability()
    cores = _cores()
    return _slug(f"{_cpu_name(_cpu_model())} {isa} {cores} core{'' if cores == 1 else 's'}")


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise ValueError(f"device: expected one of {', '.join(DEVICES)}, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device: torch finds no CUDA device")


# --- limits of the CPU ------------------------------------------------------------------------------------------------


def _measure_cpu(threads: int, megabytes: int) -> Limits:
    copy, read = _torch_rates(threads, megabytes)
    tools = native.TOOLS
    reason = None
    if tools is None or native.OPERATORS is None:  # the tools run the kernels of the operators' module
        reason = "the compiled extension is not built"
    elif not hasattr(tools, "fma_throughput"):
        reason = "the compiled extension is older than this benchmark: build it again"
    if tools is None or reason is not None:
        return Limits(copy, read, math.nan, math.nan, dict.fromkeys(("exp", "fma"), str(reason)))
    # A neighbour on the same core can halve a rate for a second: each gets its chance at several times.
    rounds = [
        (
            tools.copy_bandwidth(megabytes, 3, threads),
            tools.read_bandwidth(megabytes, 3, threads),
            tools.exp_throughput(15, threads),
            tools.fma_throughput(15, threads),
        )
        for _ in range(4)
    ]
    tool_copy, tool_read, exp, fma = map(max, zip(*rounds, strict=True))
    return Limits(max(copy, tool_copy), max(read, tool_read), exp, fma)


def _torch_rates(threads: int, megabytes: int) -> tuple[float, float]:
    """Bytes/s of PyTorch's copy, read plus written, and of its sum, on touched memory."""
    source = torch.rand(megabytes * 2**20 // 4)
    target = torch.ones_like(source)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        copy = _best_seconds(lambda: target.copy_(source))
        read = _best_seconds(lambda: source.sum())
    finally:
        torch.set_num_threads(before)
    return 2 * source.nbytes / copy, source.nbytes / read


def _best_seconds(work: Callable[[], object], repeats: int = 9) -> float:
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def _past_the_caches() -> int:
    """Megabytes: four times the largest cache, but no more than a sixteenth of memory, since a copy takes two of them."""
    largest = max(_caches().values(), default=0)
    wanted = max(256 << 20, 4 * largest)
    return max(1, min(wanted, (_memory() or 16 * wanted) // 16) >> 20)


# --- limits of the GPU ------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _exp_kernel(out, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]
        """x = exp(-x) on BLOCK numbers, rounds * UNROLL times: it goes to 0.567. Their sum is written, lest nothing be."""
        x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
        for _ in range(rounds):
            for _ in tl.static_range(UNROLL):
                x = tl.exp(-x)
        tl.store(out + tl.program_id(0), tl.sum(x))

    @triton.jit
    def _fma_kernel(out, rounds, BLOCK: tl.constexpr, UNROLL: tl.constexpr):  # type: ignore[no-untyped-def]
        """x = x / 2 + 1, as above: it goes to 2. The compiler makes one instruction of it."""
        x = tl.arange(0, BLOCK).to(tl.float32) / BLOCK
        for _ in range(rounds):
            for _ in tl.static_range(UNROLL):
                x = x * 0.5 + 1.0
        tl.store(out + tl.program_id(0), tl.sum(x))


def _measure_cuda(megabytes: int) -> Limits:
    source = torch.rand(megabytes * 2**20 // 4, device="cuda")  # not a constant: the memory must not get to know it
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best_cuda_seconds(lambda: target.copy_(source))
    read = source.nbytes / _best_cuda_seconds(lambda: source.sum())
    if triton is None:
        return Limits(copy, read, math.nan, math.nan, dict.fromkeys(("exp", "fma"), "triton is not installed"))
    # Some milliseconds each: exponentials have a unit of their own, with an eighth of the lanes.
    try:
        return Limits(copy, read, _triton_rate(_exp_kernel, 128), _triton_rate(_fma_kernel, 1024))
    except Exception as error:  # a compiler that fails costs two figures, and no run
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Limits(copy, read, math.nan, math.nan, dict.fromkeys(("exp", "fma"), reason))


def _triton_rate(kernel: Any, rounds: int) -> float:
    """Operations per second of one of the kernels above."""
    programs = PROGRAMS * torch.cuda.get_device_properties().multi_processor_count
    out = torch.empty(programs, device="cuda")
    seconds = _best_cuda_seconds(lambda: kernel[(programs,)](out, rounds, BLOCK=BLOCK, UNROLL=UNROLL, num_warps=4))
    return programs * BLOCK * rounds * UNROLL / seconds


def _best_cuda_seconds(work: Callable[[], object], repeats: int = 20) -> float:
    """Device seconds between two events, behind a pause in which the host queues them: the device waits for nobody."""
    work()  # compiles, and has the allocator find its blocks
    best = math.inf
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(1_000_000)  # cycles: half a millisecond
        start.record()
        work()
        stop.record()
        stop.synchronize()
        best = min(best, 1e-3 * start.elapsed_time(stop))
    return best


# --- the machine ------------------------------------------------------------------------------------------------------


def _huge_pages() -> str | None:
    """When the system gives them out: always, madvise (to who asks) or never."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return None
    chosen = re.search(r"\[(\w+)\]", text)
    return chosen[1] if chosen else None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _cpu_name(model: str) -> str:
    """``model`` without trade marks, clock rate and company, unless a single word would be left: "Apple M2"."""
    words = re.sub(r"\((R|TM|C)\)|®|™|(CPU )?@ *[\d.]+ *[GM]Hz", " ", model, flags=re.IGNORECASE).split()
    rest = [word for word in words if word.lower() not in _COMPANIES]
    return " ".join(rest if len(rest) > 1 else words)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"


def _cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _caches() -> dict[str, int]:
    """Bytes of the first core's caches: L1d, L1i, L2, ...; empty where the system does not tell."""
    found = {}
    for index in sorted(_CACHES.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
            number, unit = re.fullmatch(r"(\d+)([KMG]?)", size).groups()  # type: ignore[union-attr]
        except (OSError, AttributeError):
            continue
        suffix = {"Data": "d", "Instruction": "i"}.get(kind, "")
        found[f"L{level}{suffix}"] = int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]
    return found


def _memory() -> int | None:
    """Bytes of physical memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _extension_isa() -> str | None:
    """Instruction set of the extension's kernels, or None where it is not built."""
    cpu_info = getattr(native.TOOLS, "cpu_info", None)
    return None if cpu_info is None or native.OPERATORS is None else str(cpu_info()["isa"])


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"
