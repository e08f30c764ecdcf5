"""The machine's limits and its description: rates that can be, arguments that cannot, names fit for a folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import FrozenInstanceError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import limits
from benchmarks.limits import Limits, hardware_name, machine, measure
from coarse_kernels import native
from tests.helpers import run_python

needs_tools = pytest.mark.skipif(native.TOOLS is None, reason=str(native.TOOLS_ERROR))
needs_triton = pytest.mark.skipif(limits.triton is None, reason="triton is not installed")

# Bytes/s and 1/s that a machine may have: wide, since tests share it with others.
BYTES, OPERATIONS = (1e8, 1e13), (1e6, 1e14)


def between(value: float, bounds: tuple[float, float]) -> bool:
    return isinstance(value, float) and bounds[0] < value < bounds[1]


# --- the extension's tools --------------------------------------------------------------------------------------------


@needs_tools
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_tools(threads: int) -> None:
    tools: Any = native.TOOLS
    assert between(tools.copy_bandwidth(megabytes=5, repeats=3, threads=threads), BYTES)
    assert between(tools.read_bandwidth(megabytes=5, repeats=3, threads=threads), BYTES)
    assert between(tools.exp_throughput(repeats=2, threads=threads), OPERATIONS)
    assert between(tools.fma_throughput(repeats=2, threads=threads), OPERATIONS)


@needs_tools
def test_more_threads_than_cores() -> None:
    tools: Any = native.TOOLS
    assert between(tools.copy_bandwidth(megabytes=1, repeats=1, threads=40), (1e5, 1e13))


@needs_tools
@pytest.mark.parametrize("value", [0, -1, 2**31 - 1])
@pytest.mark.parametrize(
    ("tool", "name"),
    [
        *((f"{what}_bandwidth", name) for what in ("copy", "read") for name in ("megabytes", "repeats", "threads")),
        *((f"{what}_throughput", name) for what in ("exp", "fma") for name in ("repeats", "threads")),
    ],
)
def test_bad_arguments_of_tools(tool: str, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name}: expected at least 1 and at most \d+, got {value}$"):
        getattr(native.TOOLS, tool)(**{name: value})


@needs_tools
@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_tools_on_every_instruction_set(isa: str) -> None:
    tools: Any = native.TOOLS
    if isa not in tools.cpu_info()["supported"]:
        pytest.skip(f"this machine has no {isa}")
    code = """
import coarse_kernels._native as m
print(m.cpu_info()["isa"], m.read_bandwidth(4, 2), m.fma_throughput(2), m.exp_throughput(2, 2), m.copy_bandwidth(4, 2))
"""
    done = run_python(code, COARSE_KERNELS_ISA=isa)
    assert done.returncode == 0, done.stderr
    used, *rates = done.stdout.split()
    assert used == isa
    assert all(float(rate) > 1e6 for rate in rates)


@pytest.mark.slow
@needs_tools
def test_the_lock_is_released() -> None:
    """Another thread of Python goes on meanwhile: it would not get a turn while a tool holds the lock."""
    code = """
import threading
import coarse_kernels._native as m
m.cpu_info()
turns, done = 0, threading.Event()
def count():
    global turns
    while not done.wait(0.001):
        turns += 1
thread = threading.Thread(target=count)
thread.start()
before = turns
m.exp_throughput(repeats=200)
inside = turns - before
done.set()
thread.join()
assert inside > 3, inside
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


# --- measure ----------------------------------------------------------------------------------------------------------


def test_limits_of_the_cpu() -> None:
    before = torch.get_num_threads()
    for threads in (1, 2):
        found = measure("cpu", threads, megabytes=8)
        assert between(found.copy, BYTES)
        assert between(found.read, BYTES)
        for name in ("exp", "fma"):
            rate = getattr(found, name)
            assert math.isnan(rate) == (name in found.reasons)
            assert native.TOOLS is None or between(rate, OPERATIONS)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("tools", "reason"), [(None, "not built"), (SimpleNamespace(exp_throughput=None), "older than this")]
)
def test_limits_without_the_extension(monkeypatch: pytest.MonkeyPatch, tools: Any, reason: str) -> None:
    monkeypatch.setattr(native, "OPERATORS", object())
    monkeypatch.setattr(native, "TOOLS", tools)
    found = measure("cpu", 1, megabytes=8)
    assert between(found.copy, BYTES)
    assert between(found.read, BYTES)
    assert math.isnan(found.exp)
    assert math.isnan(found.fma)
    assert found.reasons.keys() == {"exp", "fma"}
    assert all(reason in text for text in found.reasons.values())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [(("cpu", 0), "threads"), (("cpu", -2), "threads"), (("cpu", 1, 0), "megabytes"), (("tpu", 1), "device")],
)
def test_bad_arguments_of_measure(arguments: tuple[Any, ...], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        measure(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    for call in (lambda: measure("cuda", 1), lambda: machine("cuda"), lambda: hardware_name("cuda")):
        with pytest.raises(RuntimeError, match="no CUDA device"):
            call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_limits_of_the_gpu() -> None:
    found = measure("cuda", 1)
    assert between(found.copy, (1e10, 1e14))
    assert between(found.read, (1e10, 1e14))
    for name in ("exp", "fma"):
        rate = getattr(found, name)
        assert between(rate, (1e10, 1e16)) or name in found.reasons


def test_limits_do_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Limits(1.0, 1.0, 1.0, 1.0).copy = 2.0  # type: ignore[misc]


def test_buffers_are_larger_than_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    def megabytes(largest: int, memory: int | None) -> int:
        monkeypatch.setattr(limits, "_caches", lambda: {"L1d": 32 << 10, "L3": largest} if largest else {})
        monkeypatch.setattr(limits, "_memory", lambda: memory)
        return limits._past_the_caches()

    assert megabytes(0, None) == 256
    assert megabytes(8 << 20, 64 << 30) == 256
    assert megabytes(260 << 20, 64 << 30) == 1040
    assert megabytes(260 << 20, 8 << 30) == 512


# --- the GPU's kernels, without one -----------------------------------------------------------------------------------


@pytest.mark.slow
@needs_triton
def test_triton_kernels_interpreted() -> None:
    """Both go to their fixed points, x = exp(-x) and x = x / 2 + 1."""
    code = """
import torch
from benchmarks import limits
for kernel, point in ((limits._exp_kernel, 0.5671433), (limits._fma_kernel, 2.0)):
    out = torch.zeros(2)
    kernel[(2,)](out, 3, BLOCK=64, UNROLL=16)
    torch.testing.assert_close(out, torch.full((2,), 64 * point), rtol=1e-6, atol=0)
"""
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@needs_triton
def test_triton_kernels_work_in_registers(tmp_path: Path) -> None:
    """Compiled for sm_90: one instruction for each operation that is counted, and no memory but for the sum."""
    code = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from benchmarks import limits
for kernel, instruction in ((limits._exp_kernel, "ex2.approx"), (limits._fma_kernel, "fma.rn")):
    source = ASTSource(fn=kernel, signature={"out": "*fp32", "rounds": "i32", "BLOCK": "constexpr", "UNROLL": "constexpr"},
                       constexprs={"BLOCK": limits.BLOCK, "UNROLL": limits.UNROLL})
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert "ld.global" not in ptx and ".local" not in ptx
    print(ptx.count(instruction), limits.BLOCK // 128 * limits.UNROLL)
"""
    done = run_python(code, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found, expected = map(int, line.split())
        assert found % expected == 0, line  # LLVM may unroll the loop
        assert found > 0


# --- the machine ------------------------------------------------------------------------------------------------------


def test_machine_is_json_and_names_nobody() -> None:
    facts = machine("cpu")
    text = json.dumps(facts, allow_nan=False)
    assert json.loads(text) == facts
    for key in ("cpu", "cores", "caches", "isa_torch", "torch", "python", "os"):
        assert key in facts
    assert not re.search(r"/(home|root|usr|work|tmp)\b", text)
    assert str(Path.home()) not in text
    assert isinstance(facts["cores"], int)
    assert facts["cores"] >= 1
    assert facts.get("memory", 1 << 30) >= 1 << 28  # type: ignore[operator]
    if native.TOOLS is not None:
        assert facts["isa_extension"] == native.TOOLS.cpu_info()["isa"]
        assert facts["compiler"] == native.TOOLS.build_info()["compiler"]


def test_machine_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TOOLS", None)
    assert not machine("cpu").keys() & {"isa_extension", "compiler"}


def test_caches(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate(
        [
            ("1", "Data", "48K"),
            ("1", "Instruction", "32K"),
            ("2", "Unified", "2048K"),
            ("3", "Unified", "1M"),
            ("4", "", ""),
        ]
    ):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        for name, text in (("level", level), ("type", kind), ("size", size)):
            (folder / name).write_text(text + "\n")
    (tmp_path / "index9").mkdir()  # tells nothing
    monkeypatch.setattr(limits, "_CACHES", tmp_path)
    assert limits._caches() == {"L1d": 48 << 10, "L1i": 32 << 10, "L2": 2 << 20, "L3": 1 << 20}
    monkeypatch.setattr(limits, "_CACHES", tmp_path / "absent")
    assert limits._caches() == {}
    assert machine("cpu")["caches"] == {}


@pytest.mark.parametrize(
    ("model", "slug"),
    [
        ("Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "xeon-platinum-8481c"),
        ("Intel(R) Xeon(R) Processor", "xeon-processor"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", "intel-xeon"),
        ("Intel(R) Core(TM) i7-8700 CPU @ 3.20GHz", "core-i7-8700"),
        ("AMD EPYC 7B13", "epyc-7b13"),
        ("AMD Ryzen 9 5950X 16-Core Processor", "ryzen-9-5950x-16-core-processor"),
        ("Apple M2", "apple-m2"),
        ("Neoverse-V2", "neoverse-v2"),
        ("aarch64", "aarch64"),
    ],
)
def test_hardware_name(monkeypatch: pytest.MonkeyPatch, model: str, slug: str) -> None:
    monkeypatch.setattr(limits, "_cpu_model", lambda: model)
    monkeypatch.setattr(limits, "_extension_isa", lambda: "avx512")
    monkeypatch.setattr(limits, "_cores", lambda: 2)
    assert hardware_name("cpu") == f"{slug}-avx512-2-cores"
    monkeypatch.setattr(limits, "_cores", lambda: 1)
    assert hardware_name("cpu") == f"{slug}-avx512-1-core"


@pytest.mark.parametrize(
    ("gpu", "slug"),
    [
        ("NVIDIA H200", "nvidia-h200"),
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("NVIDIA GeForce RTX 4090", "nvidia-geforce-rtx-4090"),
    ],
)
def test_hardware_name_of_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: str, slug: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert hardware_name("cuda") == slug


def test_hardware_name_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "TOOLS", None)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-\d+-cores?", hardware_name("cpu"))
