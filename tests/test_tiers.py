"""Which command runs which test: none is forgotten, and what is left out has passed as it is."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from coarse_kernels import native
from tests import conftest, cuda_emulation, kernels
from tests.helpers import ROOT
from tests.kernels import PARTS, Part, imported, wrong
from tests.sanitize import __main__ as sanitizers


def test_every_test_of_each_backend_meets_the_emulated_kernels() -> None:
    files = PARTS["emulator"].files
    assert {"test_operator_contract", "test_objective_differential", "test_modules", "test_compile"} <= set(files)
    assert not {"test_one_matrix", "test_train_fit", "test_bad_input", "test_tiers"} & set(files)


def test_every_test_of_kernels_is_in_a_part_of_its_command() -> None:
    marked = {path.stem for path in (ROOT / "tests").glob("*.py") if "mark.kernels" in path.read_text()} - {
        "test_tiers"
    }
    files = {name for part in PARTS.values() for name in part.files}
    assert marked <= files
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in files)


def test_the_commands_share_all_tests_and_every_change_runs_all_commands() -> None:
    makefile, change = (ROOT / "Makefile").read_text(), (ROOT / ".ci" / "run").read_text().splitlines()
    change = [line.partition(" ARGS=")[0] for line in change]
    assert {"not slow and not kernels", "slow and not kernels"} == set(re.findall(r"pytest -m \"([^\"]*)\"", makefile))
    assert {"make test", "make test-slow", "make test-kernels", "make sanitize"} <= set(change)


class _Case:
    """Of a test with a parameter: what the marks are told by."""

    def __init__(self, name: str, backend: str, marks: dict[str, tuple[int, ...]]) -> None:
        self.nodeid = f"tests/test_x.py::test_y[{name}-{backend}]"
        self.callspec = SimpleNamespace(params={"backend": backend})
        self.marks = {mark: SimpleNamespace(args=args) for mark, args in marks.items()}

    def get_closest_marker(self, name: str) -> SimpleNamespace | None:
        return self.marks.get(name)

    def add_marker(self, name: str) -> None:
        self.marks[name] = SimpleNamespace(args=())


def test_one_case_in_n_of_what_is_sampled_is_fast_and_the_others_are_slow() -> None:
    cases = [_Case(str(number), "cpu", {"sampled": (4,)}) for number in range(10)]
    emulated = [_Case(str(number), cuda_emulation.NAME, {"sampled": (4,)}) for number in range(10)]
    long = _Case("long", "cpu", {"sampled": (4,), "slow": ()})
    conftest.pytest_collection_modifyitems([*cases, *emulated, long])  # type: ignore[list-item]
    fast = [case for case in cases if "slow" not in case.marks]
    assert len(fast) == 3
    assert all(case.marks.keys() == {"sampled", "kernels"} for case in emulated)  # which are all in make test-kernels
    again = [_Case(str(number), "cpu", {"sampled": (4,)}) for number in reversed(range(10))]
    conftest.pytest_collection_modifyitems(again)  # type: ignore[arg-type]
    assert {case.nodeid for case in again if "slow" not in case.marks} == {case.nodeid for case in fast}
    both = [_Case(str(number), backend, {"sampled": (4,)}) for backend in ("cpu", "reference") for number in range(3)]
    conftest.pytest_collection_modifyitems(both)  # type: ignore[arg-type]
    assert [case.callspec.params["backend"] for case in both if "slow" not in case.marks] == ["cpu", "reference"]
    alone = [_Case("0", "cpu", {"sampled": (4,)})]
    conftest.pytest_collection_modifyitems(alone)  # type: ignore[arg-type]
    assert "slow" not in alone[0].marks  # of few cases, or one that was asked for, one runs


@pytest.mark.slow
@pytest.mark.skipif(native.TOOLS is None, reason="no compiler built anything here")
def test_the_program_that_sanitizers_run_compiles() -> None:
    """It broke, unseen, when the operators named a function that its shim lacked; here it is seen in a second."""
    command = [sanitizers.compiler(), *sanitizers.FLAGS, "-fsyntax-only", f"-I{sanitizers.HERE / 'shim'}"]
    done = subprocess.run([*command, sanitizers.HERE / "driver.cpp"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["kill", "large", "release_check", "check_cuda", "smoke", "make_mnist_sample"])
def test_what_no_change_runs_finds_what_it_imports(name: str) -> None:
    """`make test-kill` did not, once a file of tests was cut into several."""
    module = importlib.import_module(f"tests.{name}")
    assert module.__file__ == str(ROOT / "tests" / f"{name}.py")


@pytest.mark.slow
def test_what_runs_on_a_gpu_alone_is_collected() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/gpu"]
    environment = {**os.environ, "COARSE_TEST_DEVICE": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_a_part_depends_on_its_sources_its_tests_and_what_they_import() -> None:
    paths = {str(path.relative_to(ROOT)) for path in PARTS["emulator"].paths()}
    assert {
        "csrc/coarse_math.h",
        "csrc/cuda/strided.cu",
        "coarse_kernels/backends/autograd.py",
        "tests/helpers.py",
    } <= paths
    assert {"tests/cuda_emulation/build.py", "tests/cuda_emulation/emulated_cuda.h", "tests/conftest.py"} <= paths
    assert {"tests/test_operator_contract.py", "tests/test_objective_differential.py", "tests/kernels.py"} <= paths
    assert not any(name.startswith(("csrc/cpu", "coarse_train", "docs")) for name in paths)
    assert ROOT / "tests" / "floats_formed.py" in imported([ROOT / "tests" / "triton_interpreted.py"])


# --- leaving out what has passed ----------------------------------------------------------------------------------------


@pytest.fixture
def part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Part:
    """One with one test and one source, in a repository of its own."""
    for name, text in (
        ("tests/test_it.py", "from tests import tools\n"),
        ("tests/tools.py", ""),
        ("kernel.cu", "// 1"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in ("conftest", "kernels"):
        (tmp_path / "tests" / f"{name}.py").write_text("")
    part = Part("a part", ("test_it",), ("*.cu",), least=1)
    monkeypatch.setattr(kernels, "ROOT", tmp_path)
    monkeypatch.setattr(kernels, "PASSED", tmp_path / "build" / "passed.json")
    monkeypatch.setattr(kernels, "PARTS", {"it": part})
    return part


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str | None]:
    """What each run of a part, of which there is to be one for each, ends with."""
    outcomes: list[str | None] = []
    monkeypatch.setattr(kernels, "run", lambda part: outcomes.pop(0))
    return outcomes


def test_what_passed_runs_again_when_anything_changes(
    part: Part,
    runs: list[str | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    runs += [None]
    assert kernels.main([]) == 0
    assert "passed in" in capsys.readouterr().out
    assert kernels.main([]) == 0  # no run is left to ask for
    assert "left out: nothing has changed" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("words")
    assert kernels.main([]) == 0
    for name in ("kernel.cu", "tests/test_it.py", "tests/tools.py", "tests/kernels.py"):
        (tmp_path / name).write_text((tmp_path / name).read_text() + "# 2")
        runs += [None]
        assert kernels.main([]) == 0
        assert not runs
    (tmp_path / "other.cu").write_text("")
    monkeypatch.setitem(kernels.PARTS, "it", replace(part, tools=(lambda: "compiler 2",)))
    runs += [None, None]
    assert kernels.main([]) == 0
    assert kernels.main(["it", "--again"]) == 0
    assert not runs


def test_what_failed_is_not_left_out(part: Part, runs: list[str | None], capsys: pytest.CaptureFixture[str]) -> None:
    runs += [None, "3 failures", "3 failures", None]
    assert kernels.main([]) == 0
    assert kernels.main(["--again"]) == 1
    assert "FAILED: 3 failures" in capsys.readouterr().out
    assert kernels.main([]) == 1
    assert kernels.main([]) == 0
    assert kernels.main([]) == 0
    assert not runs


def test_a_record_that_cannot_be_read_is_none(part: Part, runs: list[str | None], tmp_path: Path) -> None:
    (tmp_path / "build").mkdir()
    for damage in ("", "[]", '{"it": 3}', "\0"):
        (tmp_path / "build" / "passed.json").write_text(damage)
        runs += [None]
        assert kernels.main([]) == 0
        assert not runs


def test_a_machine_without_the_tool_leaves_its_part_out_and_never_remembers_it(
    part: Part, runs: list[str | None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(kernels.PARTS, "it", replace(part, lacks=lambda: "no nvcc on this machine"))
    assert kernels.main([]) == 0
    assert "left out: no nvcc on this machine" in capsys.readouterr().out
    assert kernels.passed() == {}


def test_an_unknown_part_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["emulater"])
    assert "expected some of emulator, interpreter, triton, nvcc, got 'emulater'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("counts", "skips", "problem"),
    [
        ('tests="7" failures="0" errors="0" skipped="0"', False, None),
        ('tests="7" failures="0" errors="0" skipped="2"', True, None),
        ('tests="7" failures="0" errors="0" skipped="2"', False, "expected none to be skipped, got 2"),
        ('tests="7" failures="0" errors="0" skipped="3"', True, "expected at least 5 tests that pass, got 4"),
        ('tests="4" failures="0" errors="0" skipped="0"', False, "expected at least 5 tests that pass, got 4"),
        ('tests="7" failures="1" errors="0" skipped="0"', False, "1 failures, 0 errors"),
        ('tests="7" failures="0" errors="2" skipped="0"', False, "0 failures, 2 errors"),
    ],
)
def test_a_selection_that_eats_the_tests_is_seen(counts: str, skips: bool, problem: str | None) -> None:
    report = ElementTree.fromstring(f"<testsuites><testsuite {counts}/></testsuites>")
    assert wrong(report.iter("testsuite"), Part("", (), (), least=5, skips=skips)) == problem
