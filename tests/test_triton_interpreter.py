"""The Triton backend on CPU tensors: the tests of every backend, in processes where Triton interprets its kernels.

TRITON_INTERPRET=1 is read when kernels are defined, so it takes processes of its own; there "triton" is one of the
backends of the CPU, the last before the reference, and the parametrised tests find it. Two processes, for two cores.
What the interpreter cannot show: layouts, registers (tests/test_triton_compile.py), approximate exp and division.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from coarse_kernels.backends import triton as backend
from tests.helpers import ROOT, run_python

pytestmark = [
    pytest.mark.skipif(backend._MISSING is not None, reason=str(backend._MISSING)),
    pytest.mark.skipif(backend.INTERPRETED, reason="this is a process of that kind"),
    pytest.mark.slow,
]

# Files, and how many tests of them have to have passed: deselection (tests/interpreter_plugin.py) must not eat them all.
PARTS = {
    "numbers": (["tests/test_operator_differential.py", "tests/test_operator_numerics.py"], 380),
    "duties": (["tests/test_operator_contract.py", "tests/test_compile.py", "tests/triton_interpreted.py"], 310),
}
LIMIT = 1800  # seconds; they take three to four minutes on two cores


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[int, str]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-p", "tests.interpreter_plugin", "-k", "triton", "--durations=5", *files],
            env=environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name, (files, _) in PARTS.items()
    }
    deadline, found = time.monotonic() + LIMIT, {}
    try:
        for name, process in started.items():
            output, _ = process.communicate(timeout=max(1.0, deadline - time.monotonic()))
            found[name] = process.returncode, output
    finally:
        for process in started.values():
            process.kill()
    return found


@pytest.mark.parametrize("part", PARTS)
def test_the_tests_of_every_backend_pass(reports: dict[str, tuple[int, str]], part: str) -> None:
    code, output = reports[part]
    assert code == 0, output[-6000:]
    counts = {kind: int(number) for number, kind in re.findall(r"(\d+) (passed|failed|skipped|errors?)", output)}
    print(f"\n{part}: {output.splitlines()[-1]}")
    assert counts.get("passed", 0) >= PARTS[part][1], counts
    assert counts.keys() <= {"passed"}, counts


def test_importing_the_library_does_not_import_triton() -> None:
    done = run_python(
        "import sys, coarse_kernels as ck; assert 'triton' not in sys.modules\n"
        "print([m for m in sys.modules if m.startswith('coarse_kernels.backends.triton')])\n"
        "import coarse_kernels.backends as b\n"
        "print(b.explain('cpu')['triton'], b.explain('cuda')['triton'], b.available_backends('cpu'))"
    )
    assert done.returncode == 0, done.stderr
    modules, rest = done.stdout.splitlines()
    assert sorted(eval(modules)) == ["coarse_kernels.backends.triton", "coarse_kernels.backends.triton.table"]
    assert "it serves cuda, xpu tensors, got cpu None" in rest


def test_on_the_cpu_it_is_interpreted_and_never_chosen() -> None:
    code = (
        "import coarse_kernels as ck\n"
        "names = ck.available_backends()\n"
        "assert names[-2:] == ('triton', 'reference'), names\n"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("hidden", "expected"),
    [("None", "triton is not installed"), ("old", "triton 3.5.1 is older than 3.6"), ("odd", "has no version")],
)
def test_without_a_usable_triton_there_is_a_reason(hidden: str, expected: str, tmp_path: object) -> None:
    """The rest of the library works, and the operators still have shapes for torch.compile."""
    version = {"old": "__version__ = '3.5.1'\n", "odd": "", "None": ""}[hidden]
    done = run_python(
        "import importlib.util, types, sys\n"
        f"from pathlib import Path; path = Path({str(tmp_path)!r}) / '__init__.py'; path.write_text({version!r})\n"
        "find = importlib.util.find_spec\n"
        f"fake = None if {hidden!r} == 'None' else types.SimpleNamespace(origin=str(path))\n"
        "import torch\n"
        "importlib.util.find_spec = lambda name, *a: fake if name == 'triton' else find(name, *a)\n"
        "import coarse_kernels as ck\n"
        "from coarse_kernels.backends import explain\n"
        "print(explain('cuda')['triton'])\n"
        "seg, cm = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 3, 3, 1)\n"
        "labels = torch.tensor([[0, 1, 2, 255]])\n"
        "ck.annotation_nll(seg, cm, labels).loss.backward()\n"
        "try:\n"
        "    ck.annotation_nll(seg, None, labels, backend='triton')\n"
        "except RuntimeError as error:\n"
        "    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert expected in first
    assert "backend 'triton' cannot run" in second
