"""Several processes, threads of Python's own, and the interpreters that there are."""

from __future__ import annotations

import os
import sysconfig
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import coarse_kernels as ck
from coarse_kernels import native
from tests import cuda_emulation
from tests.helpers import FUSED, leaf, make_problem, run_python

# The emulator of CUDA has one device's state for the whole process: a launch at a time.
BACKENDS = [name for name in FUSED if name != cuda_emulation.NAME] + ["reference"]


def _bits(seed: int, backend: str) -> list[torch.Tensor]:
    problem = make_problem(3 + seed % 3, (20, 33), (None, (5, 6), (1, 1))[seed % 3], stream="random", seed=seed)
    leaves = [leaf(problem.seg), leaf(problem.cm), leaf(problem.transition)]
    seg, cm, transition = leaves
    assert seg is not None
    out = ck.annotation_nll(seg, cm, problem.labels, transition, trace_weight=0.1, backend=backend)
    return [out.loss.detach(), out.nll, out.trace, *torch.autograd.grad(out.loss, [t for t in leaves if t is not None])]


class _Losses(Dataset[list[torch.Tensor]]):
    """Losses and gradients that are computed where the data is read."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return _bits(index, BACKENDS[0])


def _as_it_is(items: list[Any]) -> Any:
    return items[0]


@pytest.mark.slow
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_data_loader_compute_the_same_bits(start: str) -> None:
    """After the parent has used the operator on two threads, whose pool a forked child does not have."""
    if start == "fork" and not hasattr(os, "fork"):
        pytest.skip("no fork")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    expected = [_bits(index, BACKENDS[0]) for index in range(6)]
    torch.set_num_threads(threads)
    loader = DataLoader(_Losses(), batch_size=1, num_workers=2, collate_fn=_as_it_is, multiprocessing_context=start)
    for ours, theirs in zip(expected, loader, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_that_is_forked_between_forward_and_backward_has_its_own_graph() -> None:
    code = """
import os, torch, coarse_kernels as ck
from tests.helpers import make_problem
torch.set_num_threads(1)
problem = make_problem(3, (9, 20), (3, 5))
seg, cm = problem.seg.requires_grad_(), problem.cm.requires_grad_()
loss = ck.annotation_nll(seg, cm, problem.labels).loss
child = os.fork()
found = torch.autograd.grad(loss, (seg, cm))
again = torch.autograd.grad(ck.annotation_nll(seg, cm, problem.labels).loss, (seg, cm))
same = all(torch.equal(a, b) for a, b in zip(found, again))
if child == 0:
    os._exit(0 if same else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same)
"""
    done = run_python(code)
    assert done.stdout.split() == ["0", "True"], done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_of_python_compute_what_one_does(backend: str) -> None:
    """Each with problems and settings of its own, at the same time."""
    expected = [_bits(seed, backend) for seed in range(6)]
    wrong: list[str] = []
    ready = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            ready.wait()
            for turn in range(12):
                seed = (first + turn) % 6
                for one, other in zip(expected[seed], _bits(seed, backend), strict=True):
                    if not torch.equal(one, other):
                        wrong.append(f"problem {seed} in thread {first}")
        except Exception as error:
            wrong.append(repr(error))

    _together([lambda first=first: work(first) for first in range(4)])  # type: ignore[misc]
    assert wrong == []


def _together(work: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_an_interpreter_without_its_lock_does_not_get_it_back() -> None:
    """A wheel is for the limited API, which a free-threaded Python does not load: the reference serves there, and says why.
    What it compiles itself says that it needs no lock, or Python would turn its own on again, with a warning."""
    if native.OPERATORS is None:
        pytest.skip("not built")
    name = os.path.basename(str(native.OPERATORS.__file__))
    free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
    assert free_threaded != name.endswith(".abi3.so")
    if free_threaded:
        code = "import sys, coarse_kernels.native as n; assert n.OPERATORS and n.TOOLS; print(sys._is_gil_enabled())"
        done = run_python(code, PYTHONWARNINGS="error:The global interpreter lock")
        assert done.stdout == "False\n", done.stderr


@pytest.mark.slow
def test_a_free_threaded_interpreter_does_not_load_what_was_built_for_the_limited_api() -> None:
    """Python 3.13 looks for ``.abi3.so`` there too: importing it, from a folder that another Python had built in, was a
    segmentation fault."""
    if native.OPERATORS is None or not str(native.OPERATORS.__file__).endswith(".abi3.so"):
        pytest.skip("nothing was built for the limited API")
    code = """
        import sysconfig
        of = sysconfig.get_config_var
        sysconfig.get_config_var = lambda name: name == "Py_GIL_DISABLED" or of(name)
        import torch
        import coarse_kernels as ck
        from coarse_kernels import native
        assert native.OPERATORS is None
        assert ck.available_backends("cpu") == ("reference",)
        print(native.operators_reason())
    """
    done = run_python(textwrap.dedent(code))
    assert (
        "it was built, but does not load: it is for the limited API, which a free-threaded Python lacks" in done.stdout
    ), done.stderr


@pytest.mark.slow
def test_nothing_is_fetched_at_run_time(tmp_path: Path) -> None:
    """The operator, a table of runs with their figure, and what it writes, in a process that cannot connect to anything."""
    code = f"""
        import socket
        def refused(*arguments, **options):
            raise AssertionError("a connection")
        socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused
        import torch
        import coarse_kernels as ck
        ck.annotation_objective(torch.randn(1, 3, 4, 4), [ck.Drawings(torch.zeros(1, 4, 4, dtype=torch.uint8))])
        from coarse_train.cli import main
        assert main(["demo", "--steps", "2", "--limit", "24", "--jobs", "1", "--out", {str(tmp_path / "demo")!r}]) == 0
        assert main(["evaluate", "mnist", "--help"]) == 0
    """
    done = run_python(textwrap.dedent(code), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo" / "figure.png").exists()
