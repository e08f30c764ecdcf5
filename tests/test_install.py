"""Who computes, and what is left where nothing was compiled."""

from __future__ import annotations

import logging
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import coarse_kernels as ck
from coarse_kernels import backends, native
from tests.contract import LOSS_APART
from tests.helpers import loss_error, make_problem, oracle, run_here, run_python

HIDDEN = "import sys; sys.modules['coarse_kernels._C'] = None; sys.modules['coarse_kernels._native'] = None\n"
STEP = """
import torch, coarse_kernels as ck
seg = torch.randn(1, 3, 4, 5, requires_grad=True); cm = torch.randn(1, 3, 3, 2, 2, requires_grad=True)
labels = torch.randint(0, 3, (1, 4, 5), dtype=torch.uint8)
"""


# --- choosing a backend -----------------------------------------------------------------------------------------------


class Spy:
    """Counts how often a backend is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.entered: list[str] = []
        for name, backend in backends._REGISTRY.items():
            monkeypatch.setattr(backend, "nll_sums", self.watched(name, backend.nll_sums))

    def watched(self, name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            self.entered.append(name)
            return inner(*args)

        return call


def run_one(**options: object) -> None:
    problem = make_problem(3, (4, 5))
    ck.annotation_nll(problem.seg, problem.cm, problem.labels, **options)  # type: ignore[arg-type]


@pytest.mark.skipif(native.OPERATORS is None, reason="not built")
def test_argument_before_context_before_environment_before_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COARSE_KERNELS_BACKEND", raising=False)
    spy = Spy(monkeypatch)
    run_one()
    assert spy.entered.pop() == "cpu" == ck.available_backends()[0]
    monkeypatch.setenv("COARSE_KERNELS_BACKEND", "reference")
    run_one()
    assert spy.entered.pop() == "reference"
    with ck.use_backend("cpu"):
        run_one()
        assert spy.entered.pop() == "cpu"
        run_one(backend="reference")
        assert spy.entered.pop() == "reference"
        with ck.use_backend("reference"):
            run_one()
            assert spy.entered.pop() == "reference"
        run_one()
        assert spy.entered.pop() == "cpu"
    run_one()
    assert spy.entered.pop() == "reference"
    monkeypatch.setenv("COARSE_KERNELS_BACKEND", "")
    run_one()
    assert spy.entered == ["cpu"]


def test_use_backend_is_undone_by_an_exception() -> None:
    with pytest.raises(KeyError), ck.use_backend("reference"):
        raise KeyError
    assert backends._forced is None
    with pytest.raises(KeyError), ck.use_schedule("recompute"):
        raise KeyError
    from coarse_kernels import schedule

    assert schedule._forced is None


def test_the_schedule_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    from coarse_kernels import schedule

    monkeypatch.setenv("COARSE_KERNELS_SCHEDULE", "recompute")
    assert schedule.current() == "recompute"
    with ck.use_schedule("one_pass"):
        assert schedule.current() == "one_pass"
    monkeypatch.setenv("COARSE_KERNELS_SCHEDULE", "later")
    with pytest.raises(ValueError, match="one_pass"):
        schedule.current()


def test_what_can_run_is_said_with_reasons() -> None:
    assert "reference" in ck.available_backends()
    assert ck.available_backends("cuda") == tuple(n for n, r in backends.explain("cuda").items() if r is None)
    assert backends.explain("cuda")["cpu"] is not None
    assert set(backends.explain("cpu")) == set(backends._REGISTRY)


@pytest.mark.slow
def test_without_the_extension_the_reference_serves_and_the_reason_is_logged_once() -> None:
    code = (
        HIDDEN
        + "import logging; logging.basicConfig(format='LOG %(name)s %(message)s')"
        + STEP
        + """
assert ck.available_backends() == ("reference",), ck.available_backends()
for _ in range(3):
    out = ck.annotation_nll(seg, cm, labels, trace_weight=0.1)
    out.loss.backward()
    ck.annotation_posterior(seg, cm, labels)
    ck.coarse_label_loss(seg, cm, labels, cm, labels)
assert cm.grad.isfinite().all() and seg.grad.abs().sum() > 0
assert out.loss == ck.annotation_nll(seg, cm, labels, trace_weight=0.1, backend="reference").loss
for bad in (lambda: ck.annotation_nll(seg, cm, labels, backend="cpu"),
            lambda: ck.annotation_posterior(seg, cm, labels, backend="cpu"),
            lambda: ck.annotation_nll(seg, None, labels, backend="cpu")):
    try:
        bad()
    except RuntimeError as error:
        assert "'cpu'" in str(error) and "compiler" in str(error), error
    else:
        raise AssertionError("an explicit choice fell back")
with ck.use_backend("cpu"):
    try:
        ck.annotation_nll(seg, cm, labels)
    except RuntimeError as error:
        assert "compiler" in str(error)
    else:
        raise AssertionError("an explicit choice fell back")
try:
    ck.annotation_nll(seg, cm, labels + 3)
except ValueError as error:
    assert "[0, 3)" in str(error)
else:
    raise AssertionError("labels out of range")
print("done")
"""
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
    logged = [line for line in done.stderr.splitlines() if line.startswith("LOG")]
    assert len(logged) == 1, done.stderr
    assert "LOG coarse_kernels backend 'cpu' is not used" in logged[0]


@pytest.mark.slow
def test_an_environment_variable_that_cannot_run_raises_with_the_reason() -> None:
    done = run_python(HIDDEN + STEP + "ck.annotation_nll(seg, cm, labels)", COARSE_KERNELS_BACKEND="cpu")
    assert done.returncode != 0
    assert "RuntimeError: backend 'cpu' cannot run" in done.stderr
    assert "compiler" in done.stderr


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_label_checks_without_the_extension(monkeypatch: pytest.MonkeyPatch, label_dtype: torch.dtype) -> None:
    """The plain scan finds what the compiled one finds, also where numbers do not fit the label's type."""
    monkeypatch.setattr(native, "OPERATORS", None)
    signed = label_dtype != torch.uint8
    for classes, ignore_index, values, bad in (
        (3, 255, [0, 1, 2], None),
        (3, 255, [0, 3, 2], 3),
        (3, -100, [0, 1, 2], None),
        (200, 255, [0, 100, 7], None),
        (300, 1000, [0, 100, 7], None),
        (3, 255, [0, -1, 2], -1 if signed else 255),
    ):
        labels = torch.tensor(values).to(label_dtype)
        if bad == 255:  # -1 in eight bits is the ignored label itself
            bad = None
        assert native.first_bad_label(labels, classes, ignore_index) == bad, (classes, ignore_index, values)


def test_fallback_logger_is_the_library_s(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    backends._remember.cache_clear()
    monkeypatch.setattr(native, "OPERATORS", None)
    monkeypatch.setattr(native, "OPERATORS_ERROR", "hidden by a test")
    problem = make_problem(3, (4, 5), (2, 2))
    with caplog.at_level(logging.WARNING, logger="coarse_kernels"):
        first = ck.annotation_nll(problem.seg, problem.cm, problem.labels)
        ck.annotation_nll(problem.seg, problem.cm, problem.labels)
    assert len(caplog.records) == 1
    assert "hidden by a test" in caplog.text
    assert loss_error(first.loss, oracle(problem).loss) < LOSS_APART
    backends._remember.cache_clear()


# --- building ---------------------------------------------------------------------------------------------------------


def build(tmp_path: Path, mode: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    return run_here("setup.py", "build_ext", *folders, **{"COARSE_KERNELS_BUILD": mode, **environment})


NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}


def binaries(tmp_path: Path) -> list[Path]:
    return [path for path in tmp_path.rglob("*") if path.suffix in (".so", ".pyd", ".dylib")]


@pytest.mark.slow
def test_without_a_compiler_the_build_goes_on_and_says_why(tmp_path: Path) -> None:
    done = build(tmp_path, "auto", **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    assert "installing without compiled code" in done.stderr + done.stdout
    assert "there is no C++ compiler: /nonexistent/c++ was not found" in done.stderr
    assert "with GCC or Clang the same again compiles" in done.stderr
    assert binaries(tmp_path) == []


@pytest.mark.slow
def test_a_wheel_in_which_nothing_was_compiled_does_not_pass_for_one_with_binaries(tmp_path: Path) -> None:
    """It had the tag of one for this system, under which pip would keep and hand it on."""
    # pip builds in the folder itself, where what an earlier one has made stays
    stale = tmp_path / "lib" / "coarse_kernels" / "_C.abi3.so"
    stale.parent.mkdir(parents=True)
    stale.touch()
    folders = ("build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path / "lib"))
    info = ("egg_info", "--egg-base", str(tmp_path))
    places = ("bdist_wheel", "--bdist-dir", str(tmp_path / "wheel"), "--dist-dir", str(tmp_path))
    done = run_here("setup.py", "-q", *folders, *info, *places, COARSE_KERNELS_BUILD="auto", **NO_COMPILER)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {"coarse_kernels/__init__.py", "coarse_kernels/not_built.json"} < {*names}
    assert not [name for name in names if ".data/" in name or name.endswith(".so")]


@pytest.mark.slow
def test_without_a_compiler_a_forced_build_fails(tmp_path: Path) -> None:
    done = build(tmp_path, "1", **NO_COMPILER)
    assert done.returncode != 0
    assert binaries(tmp_path) == []


def test_a_forbidden_build_builds_nothing(tmp_path: Path) -> None:
    done = build(tmp_path, "0")
    assert done.returncode == 0, done.stderr
    assert binaries(tmp_path) == []


def test_an_unknown_build_mode_is_refused(tmp_path: Path) -> None:
    done = build(tmp_path, "maybe")
    assert done.returncode != 0
    assert "COARSE_KERNELS_BUILD: expected auto, 0 or 1, got 'maybe'" in done.stderr


# --- the CUDA extension: what would be built, without a CUDA torch ---------------------------------------------------------

SETUP = """
import os, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME = {cuda!r}, {home!r}
import setuptools
seen = {{}}
setuptools.setup = lambda **arguments: seen.update(arguments)
exec(compile(open("setup.py").read(), "setup.py", "exec"))
print(*(extension.name for extension in seen["ext_modules"]))
print(os.environ.get("TORCH_CUDA_ARCH_LIST"), os.environ["MAX_JOBS"])
"""


def setup(cuda: str | None, home: Path | None, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {"TORCH_CUDA_ARCH_LIST": "", "MAX_JOBS": "", **environment}
    code = "import os\n" + "".join(
        f"os.environ.pop({name!r}, None)\n" for name, value in environment.items() if not value
    )
    given = {name: value for name, value in environment.items() if value}
    return run_python(code + SETUP.format(cuda=cuda, home=None if home is None else str(home)), **given)


@pytest.fixture
def toolkit(tmp_path: Path) -> Path:
    """A CUDA_HOME whose nvcc says that it is 13.0 and knows no sm_120."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "Cuda compilation tools, release 13.0, V13.0.88" && exit\n'
        "echo compute_75 compute_80 compute_90 compute_100\n"
    )
    nvcc.chmod(0o755)
    return tmp_path


@pytest.mark.slow
def test_cuda_is_built_where_torch_has_it_and_nvcc_is_found(toolkit: Path) -> None:
    done = setup("13.0", toolkit)
    assert done.returncode == 0, done.stderr
    modules, settings = done.stdout.splitlines()
    assert "coarse_kernels._cuda" in modules.split()
    assert settings.split()[0] == "8.0;9.0;10.0+PTX"
    assert f"{settings.split()[1]} compile jobs at a time" in done.stderr


@pytest.mark.slow
def test_architectures_and_jobs_of_the_environment_are_kept(toolkit: Path) -> None:
    done = setup("13.0", toolkit, TORCH_CUDA_ARCH_LIST="9.0", MAX_JOBS="3")
    assert done.stdout.splitlines()[1] == "9.0 3", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cuda", "with_toolkit", "reason"),
    [
        (None, True, "this torch is built without CUDA"),
        ("13.0", False, "no nvcc found"),
        ("12.8", True, "torch has CUDA 12.8"),
    ],
)
def test_cuda_that_cannot_be_built_is_left_out_or_fails_loudly(
    cuda: str | None, with_toolkit: bool, reason: str, toolkit: Path
) -> None:
    home = toolkit if with_toolkit else None
    left_out = setup(cuda, home)
    assert left_out.returncode == 0, left_out.stderr
    assert "coarse_kernels._C" in left_out.stdout.split()
    assert "coarse_kernels._cuda" not in left_out.stdout
    assert f"without CUDA kernels: {reason}" in left_out.stderr
    forced = setup(cuda, home, COARSE_CUDA="1")
    assert forced.returncode != 0
    assert f"COARSE_CUDA=1, but the CUDA kernels cannot be built: {reason}" in forced.stderr


@pytest.mark.slow
def test_cuda_can_be_forbidden(toolkit: Path) -> None:
    done = setup("13.0", toolkit, COARSE_CUDA="0")
    assert done.returncode == 0, done.stderr
    assert "coarse_kernels._cuda" not in done.stdout
