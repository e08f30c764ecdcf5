"""`make test-kernels`: the kernels that no CPU runs as they are. Those of CUDA in an emulator and through nvcc, those of Triton
in its interpreter and through its compiler.

    python -m tests.kernels [PART ...] [--again] [--list]

A part is left out while all that it depends on is what it was when the part last passed here: its sources, its tests and what
they import, and the versions of the tools. What passed is kept in build/, which git ignores. Not in a commit, where it would be
a claim about somebody else's compiler, and a conflict in every merge of kernels; and not in the user's cache, where a fresh
clone would find it: there, as in CI, everything runs.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from xml.etree import ElementTree

from tests import check_cuda

ROOT = Path(__file__).resolve().parents[1]
PASSED = ROOT / "build" / "kernels_passed.json"
PYTHON = ("coarse_kernels/**/*.py", "pyproject.toml")
CUDA = ("csrc/*.h", "csrc/cuda/*")
# A test of each backend, in the words of the tests.
OF_EACH_BACKEND = re.compile(r"mark\.(fused|every)\b|\"backend\", (\w+\.)?available_backends\(\)|import .*\bFUSED\b")
# The interpreter takes 20 ms for whatever another computes in microseconds: a selection, of which
# tests/interpreter_plugin.py leaves out more.
INTERPRETED = ("test_compile", "test_operator_contract", "test_operator_differential", "test_operator_numerics")
LIMIT = 2400  # seconds a part may take; the longest takes about five minutes on two cores


@dataclass(frozen=True)
class Part:
    """``files``: of tests, of which those with the mark `kernels` run. ``least``: so many have to pass, since a selection must
    not eat them all; ``skips``: whether some may be skipped, each with its reason. ``tools``: what else has a version."""

    says: str
    files: tuple[str, ...]
    sources: tuple[str, ...]
    least: int
    skips: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    tools: tuple[Callable[[], str], ...] = ()
    lacks: Callable[[], str | None] = lambda: None

    def paths(self) -> list[Path]:
        """Everything that it depends on and that is a file of this repository."""
        found = {path for pattern in self.sources for path in ROOT.glob(pattern) if path.is_file()}
        return sorted(
            found | imported([ROOT / "tests" / f"{name}.py" for name in (*self.files, "conftest", "kernels")])
        )

    def digest(self) -> str:
        digest = hashlib.sha256(repr((self.options, sorted(self.environment.items()))).encode())
        digest.update(repr([platform.machine(), sys.version, *(tool() for tool in self.tools)]).encode())
        for path in self.paths():
            digest.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
        return digest.hexdigest()


def imported(tests: Sequence[Path]) -> set[Path]:
    """``tests`` and what they import of the folder of tests, and so on."""
    found: set[Path] = set()
    waiting = list(tests)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for name in _imports(path):
            module = ROOT / "tests" / name
            waiting += [each for each in (module.with_suffix(".py"),) if each.exists()]
            waiting += sorted(each for each in module.glob("*") if each.suffix == ".py")
            found |= {each for each in module.glob("*") if each.is_file() and each.suffix != ".py"}
    return found


def _imports(path: Path) -> Iterator[str]:
    """Names of modules and folders right under tests/."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        module = node.module or ""
        if node.level:  # of a file in tests/ itself, or in a folder of it, which is imported whole
            module = f"tests.{module}".rstrip(".")
        if module == "tests":
            yield from (alias.name for alias in node.names)
        elif module.startswith("tests."):
            yield module.split(".")[1]


def of_each_backend() -> list[str]:
    """Files; what else is in them has no mark."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [path.stem for path in files if path.stem != "test_tiers" and OF_EACH_BACKEND.search(path.read_text())]


# --- the parts ----------------------------------------------------------------------------------------------------------


def version_of(name: str) -> Callable[[], str]:
    def version() -> str:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            return f"no {name}"

    return version


def compiler() -> str:
    return _says(os.environ.get("CXX", "c++"))


def nvcc() -> str:
    return _says(check_cuda.find_nvcc())


def _says(program: str | None) -> str:
    if program is None or shutil.which(program) is None:
        return f"no {program}"
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout


def no_compiler() -> str | None:
    name = os.environ.get("CXX", "c++")
    return None if shutil.which(name) else f"no C++ compiler {name!r}"


def no_triton() -> str | None:
    from coarse_kernels.backends import triton

    return triton._MISSING


def no_nvcc() -> str | None:
    return "no nvcc on this machine" if check_cuda.find_nvcc() is None else None


TORCH, NUMPY, TRITON = map(version_of, ("torch", "numpy", "triton"))
TWO_PROCESSES = ("-n", "2", "--dist", "worksteal")
PARTS = {
    "emulator": Part(
        "the CUDA kernels on CPU tensors, with threads that are real",
        ("test_cuda_emulation", *of_each_backend()),
        (*PYTHON, *CUDA),
        1400,
        skips=True,
        environment={"COARSE_TEST_EMULATION": "1"},
        options=TWO_PROCESSES,
        tools=(TORCH, NUMPY, compiler),
        lacks=no_compiler,
    ),
    "interpreter": Part(
        "the Triton kernels on CPU tensors",
        ("triton_interpreted", *INTERPRETED),
        (*PYTHON, "tests/interpreter_plugin.py"),
        950,
        environment={"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        options=("-p", "tests.interpreter_plugin", *TWO_PROCESSES),
        tools=(TORCH, NUMPY, TRITON),
        lacks=no_triton,
    ),
    "triton": Part(
        "the Triton kernels compiled for GPUs, their registers and spills",
        ("test_triton_compile",),
        PYTHON,
        6,
        options=TWO_PROCESSES,
        tools=(TORCH, TRITON),
        lacks=no_triton,
    ),
    "nvcc": Part(
        "the CUDA kernels compiled for GPUs, their registers and spills (make check-cuda)",
        ("test_cuda_compile",),
        CUDA,
        1,
        tools=(TORCH, nvcc, compiler),
        lacks=no_nvcc,
    ),
}


# --- running them -------------------------------------------------------------------------------------------------------


def run(part: Part) -> str | None:
    """What is wrong, or None. The output of the tests goes where ours goes."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        files = [str(ROOT / "tests" / f"{name}.py") for name in part.files]
        command = [sys.executable, "-m", "pytest", "-m", "kernels", "--durations=5", f"--junitxml={report}"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **part.environment}
        try:
            done = subprocess.run(
                [*command, *part.options, *files], env=environment, cwd=ROOT, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return f"did not end within {LIMIT} seconds"
        if done.returncode != 0:
            return f"pytest ended with {done.returncode}"
        return wrong(ElementTree.parse(report).getroot().iter("testsuite"), part)


def wrong(suites: Iterator[ElementTree.Element], part: Part) -> str | None:
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for suite in suites:
        for name in counts:
            counts[name] += int(suite.get(name, 0))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if counts["failures"] or counts["errors"]:
        return f"{counts['failures']} failures, {counts['errors']} errors"
    if passed < part.least:
        return f"expected at least {part.least} tests that pass, got {passed}"
    if counts["skipped"] and not part.skips:
        return f"expected none to be skipped, got {counts['skipped']}"
    return None


def passed() -> dict[str, str]:
    """The digest with which each part last passed."""
    try:
        known = json.loads(PASSED.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember(name: str, digest: str | None) -> None:
    known = {**passed(), name: digest}
    PASSED.parent.mkdir(exist_ok=True)
    PASSED.write_text(json.dumps({key: value for key, value in known.items() if value}, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)}; default: all of them")
    parser.add_argument("--again", action="store_true", help="also what passed with these very sources")
    parser.add_argument("--list", action="store_true", help="the parts, and what each depends on")
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"expected some of {', '.join(PARTS)}, got {name!r}")
    chosen = {name: PARTS[name] for name in options.parts or PARTS}
    if options.list:
        for name, part in chosen.items():
            print(f"{name}: {part.says}", *(f"    {path.relative_to(ROOT)}" for path in part.paths()), sep="\n")
        return 0
    results = {}
    for name, part in chosen.items():
        digest = part.digest()
        if reason := part.lacks():
            results[name] = f"left out: {reason}"
        elif passed().get(name) == digest and not options.again:
            results[name] = "left out: nothing has changed since it passed (--again runs it)"
        else:
            print(f"--- {name}: {part.says}", flush=True)
            remember(name, None)
            started = time.monotonic()
            problem = run(part)
            results[name] = f"FAILED: {problem}" if problem else f"passed in {time.monotonic() - started:.0f} s"
            if problem is None:
                remember(name, digest)
    print("\ntest-kernels:", *(f"    {name:<12} {result}" for name, result in results.items()), sep="\n")
    return int(any(result.startswith("FAILED") for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
