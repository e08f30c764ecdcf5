"""The native code under ASan + UBSan, and its threads under TSan.

    python -m tests.sanitize            all steps; exit status 1 where one finds something
    python -m tests.sanitize --steps driver-address tests

driver-address   a program that calls the CPU operators without PyTorch (driver.cpp) under ASan and UBSan
driver-thread    the same under TSan: parallel_for by threads that it knows, several callers, the pool emptied meanwhile
tests            the operator's tests, with extensions built for ASan and UBSan in an interpreter that has ASan preloaded
fuzz             problems drawn at random (tests/fuzz), the same way
tests-thread     the operator's tests with TSan; parallel loops run on threads that it knows (known_threads_of_torch.h)
fuzz-thread      problems drawn at random, the same way
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CPU = ROOT / "csrc" / "cpu"
KERNELS = tuple(CPU / f"{name}.cpp" for name in ("dispatch", "kernels_baseline", "kernels_avx2", "kernels_avx512"))
# As setup.py has them, but for what would hide a line.
FLAGS = ("-std=c++20", "-O1", "-g1", "-fPIC", "-ffp-contract=fast", "-fno-math-errno", "-fno-omit-frame-pointer", "-w")
# vptr wants the type information of classes of PyTorch's that are not there.
ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=undefined")
THREAD = ("-fsanitize=thread",)
# Every shape of the differential tests has a reason, and the others repeat them with other values.
TESTS = ("objective_differential", "operator_differential", "one_matrix", "operator_contract", "native")
SELECTED = "shapes or any_number_of_pixels or unwritten or begin_on_a_line or taps or one_pixel"
NOT_RUN = -1000  # no signal's
CHAINS = (("driver-address", "tests", "fuzz"), ("driver-thread", "tests-thread", "fuzz-thread"))
# Not leaks: the interpreter and PyTorch hold what they hold until the end.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
}


def run(command: Sequence[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def compiler() -> str:
    return os.environ.get("CXX", "c++")


def folder_of(*parts: object) -> Path:
    """Of builds of these sources with these flags; kept, so that a second run compiles nothing."""
    digest = hashlib.sha256(repr(parts).encode())
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.read_bytes())
    return Path(tempfile.gettempdir()) / f"coarse_kernels_sanitized_{digest.hexdigest()[:16]}"


def compiled(sources: Sequence[Path], flags: Sequence[str], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)

    def one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        if not target.exists():
            part = target.with_suffix(".part")
            done = run([compiler(), *flags, "-c", source, "-o", part], capture_output=True)
            if done.returncode != 0:
                raise SystemExit(f"{source.name}: {done.stderr[-3000:]}")
            part.replace(target)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
        return list(pool.map(one, sources))


# --- steps ----------------------------------------------------------------------------------------------------------------


def driver(sanitizer: Sequence[str]) -> int:
    flags = [*FLAGS, *sanitizer]
    objects = compiled(KERNELS, flags, folder_of(flags))
    own = [path.read_bytes() for path in sorted(HERE.rglob("*")) if path.suffix in (".h", ".cpp")]
    folder = folder_of(flags, own)
    program = folder / "driver"
    if not program.exists():
        objects += compiled([HERE / "driver.cpp"], [*flags, f"-I{HERE / 'shim'}"], folder)
        linked = run([compiler(), *sanitizer, *objects, "-pthread", "-o", program], capture_output=True)
        if linked.returncode != 0:
            raise SystemExit(linked.stderr[-3000:])
    status = 0
    for isa in ("avx512", "avx2", "baseline"):
        status = run([program], env={**os.environ, **OPTIONS, "COARSE_KERNELS_ISA": isa}).returncode or status
    return status


def tree(sanitizer: Sequence[str]) -> Path:
    """A copy of the packages and their tests whose extensions are built for ``sanitizer``."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    stable = ("-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY")
    includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), pybind11.get_include(), _python_include())]
    flags = [*FLAGS, *sanitizer, *stable, *includes]
    threads = HERE / "known_threads_of_torch.h"
    own = ["-include", threads] if sanitizer == THREAD else []
    folder = folder_of(flags, torch.__version__, sys.version, *(path.read_bytes() for path in own[1:]))
    objects = compiled([CPU / "ops_cpu.cpp"], [*flags, *map(str, own)], folder / "objects")
    objects += compiled(KERNELS, [*FLAGS, *sanitizer], folder_of([*FLAGS, *sanitizer]))  # the driver's
    tools = compiled([ROOT / "csrc" / "native.cpp"], flags, folder / "objects")
    copy = folder / "tree"
    shutil.rmtree(copy, ignore_errors=True)
    ignore = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("coarse_kernels", "coarse_train", "benchmarks", "tests", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", copy)
    torch_flags = [f"-L{path}" for path in cpp_extension.library_paths()]
    for name, parts, libraries in (
        ("_C.abi3.so", objects, [*torch_flags, "-ltorch_cpu", "-ltorch"]),
        ("_native.so", tools, ["-pthread"]),
    ):
        linked = run([compiler(), "-shared", *sanitizer, *parts, *libraries, "-o", copy / "coarse_kernels" / name])
        if linked.returncode != 0:
            raise SystemExit(f"{name} cannot be linked")
    return copy


def _python_include() -> str:
    import sysconfig

    return sysconfig.get_paths()["include"]


def in_tree(sanitizer: Sequence[str], *command: str) -> int:
    """A command of the interpreter with the sanitizer preloaded, in the copy. Beside ASan libstdc++, in which it looks for what
    throws as it starts; TSan wants memory to lie where it expects it, not at random."""
    fixed = ["setarch", "-R"] if sanitizer == THREAD else []
    if fixed and (shutil.which(fixed[0]) is None or run([*fixed, "true"], capture_output=True).returncode != 0):
        print("`setarch -R` is not there, or not allowed (a container's seccomp profile may refuse it)")
        return NOT_RUN
    preloaded = ("tsan",) if sanitizer == THREAD else ("asan", "stdc++")
    names = [run([compiler(), f"-print-file-name=lib{name}.so"], capture_output=True) for name in preloaded]
    copy = tree(sanitizer)
    environment = {**os.environ, **OPTIONS, "PYTHONPATH": str(copy), "COARSE_TEST_EMULATION": "0"}
    environment["LD_PRELOAD"] = ":".join(one.stdout.strip() for one in names)
    if sanitizer == THREAD:
        environment["OMP_NUM_THREADS"] = "1"  # OpenMP's are not known
    return run([*fixed, sys.executable, *command], cwd=copy, env=environment).returncode


def tests(sanitizer: Sequence[str]) -> int:
    more, selected = (("pool", "processes"), f"{SELECTED} or threads") if sanitizer == THREAD else ((), SELECTED)
    files = [f"tests/test_{name}.py" for name in (*TESTS, *more)]
    # what a sanitizer writes as it ends the process is not to be captured
    options = ("-x", "-q", "--capture=sys", "-p", "no:cacheprovider", "-k", selected)
    return in_tree(sanitizer, "-m", "pytest", *options, *files)


def fuzz(sanitizer: Sequence[str], seconds: float) -> int:
    out = ROOT / "runs" / ("fuzz_thread" if sanitizer == THREAD else "fuzz_address")
    return in_tree(sanitizer, "-m", "tests.fuzz", "--seconds", str(seconds), "--out", str(out))


def in_order(names: Sequence[str], seconds: float) -> int:
    """Steps, one after another."""
    steps: dict[str, Callable[[], int]] = {
        "driver-address": lambda: driver(ADDRESS),
        "tests": lambda: tests(ADDRESS),
        "fuzz": lambda: fuzz(ADDRESS, seconds),
        "driver-thread": lambda: driver(THREAD),
        "tests-thread": lambda: tests(THREAD),
        "fuzz-thread": lambda: fuzz(THREAD, seconds),
    }
    lines, failed = [], False
    for name in names:
        began = time.monotonic()
        status = steps[name]()
        failed |= status not in (0, NOT_RUN)
        said = {0: "clean", NOT_RUN: "NOT RUN"}.get(status, f"status {status}")
        lines.append(f"{name}: {said}, {time.monotonic() - began:.0f} s")
        print(lines[-1], flush=True)
    print("\n".join(["", *lines]))  # once more, below what the last step wrote
    return 1 if failed else 0


def beside(chains: Sequence[Sequence[str]], seconds: float) -> int:
    """Steps of each sanitizer in a process of their own: neither builds what the other does, and most run on one thread. Lines
    say whose they are."""

    def steps(chain: Sequence[str]) -> int:
        command = [sys.executable, "-m", "tests.sanitize", "--seconds", str(seconds), "--steps", *chain]
        options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
            for line in process.stdout:
                print(f"[{chain[0].removeprefix('driver-')}] {line}", end="", flush=True)
        return int(process.returncode)

    with ThreadPoolExecutor(len(chains)) as pool:
        return 1 if any(pool.map(steps, chains)) else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitize", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", nargs="*", choices=[name for chain in CHAINS for name in chain], help="some of them")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each step `fuzz`")
    given = parser.parse_args()
    wanted = [[name for name in chain if name in (given.steps or chain)] for chain in CHAINS]
    wanted = [chain for chain in wanted if chain]
    return in_order(wanted[0], given.seconds) if len(wanted) == 1 else beside(wanted, given.seconds)


if __name__ == "__main__":
    sys.exit(main())
