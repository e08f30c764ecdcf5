"""When Triton is imported, when its backend is chosen, and what is said where it cannot be. Its kernels: tests/kernels.py."""

from __future__ import annotations

import pytest

from coarse_kernels.backends import triton as backend
from tests.helpers import run_python

pytestmark = pytest.mark.skipif(backend._MISSING is not None, reason=str(backend._MISSING))


@pytest.mark.slow
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


@pytest.mark.slow
def test_on_the_cpu_it_is_interpreted_and_never_chosen() -> None:
    code = (
        "import coarse_kernels as ck\n"
        "names = ck.available_backends()\n"
        "assert names[-2:] == ('triton', 'reference'), names\n"
    )
    done = run_python(code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "expected"),
    [
        ("None", "triton is not installed"),
        pytest.param("old", "triton 3.5.1 is older than 3.6", marks=pytest.mark.slow),
        pytest.param("odd", "has no version", marks=pytest.mark.slow),
    ],
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
