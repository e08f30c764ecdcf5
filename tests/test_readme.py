"""What the README and the pages of docs/ show has to run, and has to be there."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import coarse_kernels
import coarse_train.data
import coarse_train.model
import coarse_train.simulate
from benchmarks import tables
from coarse_kernels import env_report

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "coarse_train/README.md", "examples/README.md")),
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if page.name != "report.md"),
]
WITH_LINKS = [
    *PAGES,
    *sorted((ROOT / "docs").rglob("report.md")),
    *sorted(page for room in ("benchmarks", "tests") for page in (ROOT / room).rglob("*.md")),
]
CODE = re.compile(r"^```python\n(.*?)^```", re.S | re.M)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def run_code(page: Path) -> dict[str, object]:
    """The names that all Python of a page leaves, run in its order."""
    names: dict[str, object] = {"__name__": "page"}
    exec("\n".join(CODE.findall(page.read_text())), names)
    return names


# ---- code --------------------------------------------------------------------------------------------------------------


def test_the_usage_of_the_readme_runs() -> None:
    names = run_code(ROOT / "README.md")
    head, before, after = (names[name] for name in ("head", "before", "after"))
    assert isinstance(head, torch.nn.Module)
    assert isinstance(before, torch.Tensor)
    assert isinstance(after, torch.Tensor)
    torch.testing.assert_close(after, before)  # "the same number"
    for tensor in (names["seg_logits"], *head.parameters()):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())


@pytest.mark.slow
def test_the_python_of_the_training_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_code(ROOT / "coarse_train" / "README.md")
    assert (tmp_path / "runs" / "first" / "last.pt").is_file()


PAGES_WITH_CODE = [page for page in PAGES if "README" not in page.name and CODE.search(page.read_text())]


@pytest.mark.parametrize("page", PAGES_WITH_CODE, ids=name_of)
def test_the_python_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To its end, and what it computes is finite."""
    monkeypatch.chdir(tmp_path)
    names = run_code(page)
    assert any(getattr(value, "__module__", "").startswith("coarse_") for value in names.values())  # it is about us
    computed = {name: value for name, value in names.items() if isinstance(value, torch.Tensor)}
    wrong = [name for name, value in computed.items() if not value.isfinite().all()]
    wrong += [n for n, v in computed.items() if v.is_leaf and v.grad is not None and not v.grad.isfinite().all()]
    assert wrong == []


def test_pages_with_code_are_found() -> None:
    assert {"docs/method.md", "docs/recipes.md", "docs/memory.md"} <= {name_of(page) for page in PAGES_WITH_CODE}


# ---- what is named is there ----------------------------------------------------------------------------------------------


def test_the_readme_is_one_screen() -> None:
    assert sum(any(letter.isalnum() for letter in word) for word in README.split()) <= 1000


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub and MyST name them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", WITH_LINKS, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    for target in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_includes_is_there(page: Path) -> None:
    for path, options in re.findall(r"^```\{(?:literal)?include\} (\S+)\n((?::.*\n)*)", page.read_text(), re.M):
        text = (page.parent / path).read_text()
        for mark in re.findall(r"^:(?:start-at|end-at): \"?([^\"\n]+)", options, re.M):
            assert mark in text, f"{path}: {mark}"


def test_every_page_is_in_a_table_of_contents() -> None:
    docs = ROOT / "docs"
    listed = set()
    for page in docs.rglob("*.md"):
        for tree in re.findall(r"^```\{toctree\}\n(.*?)^```", page.read_text(), re.S | re.M):
            lines = [line for line in tree.splitlines() if line and not line.startswith(":")]
            paths = [re.sub(r".*<(.*)>", r"\1", line) for line in lines]  # "its title <path>"
            listed |= {(page.parent / f"{path}.md").resolve() for path in paths}
    assert {*docs.rglob("*.md")} - {docs / "index.md"} == listed


def test_the_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = {word for page in PAGES for word in re.findall(r"(?:`|^    )make ([a-z-]+)", page.read_text(), re.M)}
    assert named
    assert not [name for name in named if not re.search(rf"^{name}:", makefile, re.M)]


def test_the_options_of_the_commands_exist() -> None:
    fields = "\n".join(path.read_text() for path in (ROOT / "coarse_train").rglob("*.py"))
    # of other programs, and of a field called kind
    others = {"--as", "--help", "--labelflags", "--no-build-isolation", "--nproc-per-node"}
    pages = [page for page in PAGES if page.parent.name in ("training", "coarse_train") or page.name == "own-data.md"]
    named = {word for page in pages for word in re.findall(r"(?:^|[ `(])(--[a-z][\w.-]*)", page.read_text(), re.M)}
    assert len(named) > 20
    for option in sorted(named - others):
        field = option[2:].rpartition(".")[2].replace("-", "_")
        assert re.search(rf"^    {field}: ", fields, re.M), option


def test_the_variables_of_the_pages_are_read_somewhere() -> None:
    sources = "".join(
        path.read_text()
        for pattern in ("coarse_kernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "setup.py")
        for path in ROOT.glob(pattern)
    )
    variables = {name for page in PAGES for name in re.findall(r"COARSE_(?:KERNELS_[A-Z_]+|CUDA)\b", page.read_text())}
    assert len(variables) > 5
    assert not [name for name in variables if f'"{name}"' not in sources]


def test_every_public_name_has_an_entry_and_a_docstring() -> None:
    operator, training = ((ROOT / "docs" / "api" / f"{name}.md").read_text() for name in ("operator", "training"))
    entries = set(re.findall(r"^\.\. auto(?:function|class):: (\w+)", operator, re.M))
    assert entries == {*coarse_kernels.__all__} - {"__version__"}
    modules = {"coarse_train.model": coarse_train.model, "coarse_train.simulate": coarse_train.simulate}
    for name, module in (
        ("coarse_kernels", coarse_kernels),
        *modules.items(),
        ("coarse_train.data", coarse_train.data),
    ):
        documented = [getattr(module, one) for one in module.__all__ if one != "__version__"]
        for thing in documented:
            if inspect.isclass(thing) or inspect.isfunction(thing):
                assert thing.__doc__, thing
                assert not thing.__doc__.startswith(f"{thing.__name__}("), f"{thing} has the docstring of dataclasses"
        assert name == "coarse_kernels" or f".. automodule:: {name}\n" in training
    members = {name for name in modules if f".. automodule:: {name}\n   :members:" in training}
    for name in ("config", "engine", "data", "pen"):  # those that say what is public
        name = f"coarse_train.{name}"
        module = importlib.import_module(name)
        assert name not in members
        for one in module.__all__:
            thing = getattr(module, one)
            own = inspect.isclass(thing) or (inspect.isfunction(thing) and thing.__module__.startswith("coarse_train"))
            kind = "class" if inspect.isclass(thing) else "function"
            assert (f".. auto{kind}:: {name}.{one}" if own else f"`{name}.{one}`") in training


def test_the_tables_are_those_of_the_committed_results() -> None:
    for page in tables.PAGES:
        text = (ROOT / page).read_text()
        assert "<!-- table " in text
        assert tables.updated(text) == text, f"{page}: `python -m benchmarks.tables` writes them anew"


# ---- env_report ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_env_report_says_which_backend_the_cpu_gets_and_why() -> None:
    run = [sys.executable, "-m", "coarse_kernels.env_report"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.search(r"cpu: '(cpu|reference)' is tried first, unless one is named", done.stdout)
    hidden = (
        "import runpy, sys; sys.modules['coarse_kernels._C'] = None; "
        "runpy.run_module('coarse_kernels.env_report', run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COARSE_KERNELS_")}
    done = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert "cpu: 'reference' is tried first" in done.stdout
    assert "cannot: the compiled extension is missing" in done.stdout


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("BACKEND", "reference", "  backend reference"),
        ("BACKEND", "triton", "  error: backend 'triton' cannot run: "),
        ("BACKEND", "nope", "  error: COARSE_KERNELS_BACKEND: expected one of ("),
        ("SCHEDULE", "nope", "schedule: error: COARSE_KERNELS_SCHEDULE: expected one of ("),
    ],
)
def test_env_report_says_what_is_wrong_with_the_environment(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended in a traceback where it was needed most."""
    monkeypatch.setenv(f"COARSE_KERNELS_{variable}", value)
    lines = env_report.report().splitlines()
    assert any(line.startswith(said) for line in lines)
    assert lines[-1] == f"COARSE_KERNELS_{variable}={value}"


@pytest.mark.slow
def test_an_instruction_set_that_does_not_exist_is_refused_by_name() -> None:
    """The slowest kernels were taken instead, in silence."""
    environment = {**os.environ, "COARSE_KERNELS_ISA": "avx-512"}
    done = subprocess.run(
        [sys.executable, "-c", "import coarse_kernels"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=environment,
    )
    assert done.returncode != 0
    assert "COARSE_KERNELS_ISA: expected one of ('baseline', 'avx2', 'avx512'), got 'avx-512'" in done.stderr


def raised_by(function: Callable[..., Any]) -> set[str]:
    """Names of the errors that its own lines raise; of what it calls, nothing."""
    body = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    errors = [node.exc for node in ast.walk(body) if isinstance(node, ast.Raise) and node.exc is not None]
    return {ast.unparse(error.func if isinstance(error, ast.Call) else error).split(".")[-1] for error in errors}


def public_things() -> list[Any]:
    """Functions and classes that the pages of the API show."""
    things = [getattr(coarse_kernels, name) for name in coarse_kernels.__all__]
    for module in (coarse_train.model, coarse_train.simulate):
        things += [getattr(module, name) for name in module.__all__]
    page = (ROOT / "docs" / "api" / "training.md").read_text()
    for module, name in re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)\.(\w+)", page, re.M):
        things.append(getattr(importlib.import_module(module), name))
    return [one for one in things if getattr(one, "__module__", "").startswith("coarse_")]


def test_help_names_the_errors_that_a_public_function_raises() -> None:
    found = 0
    for thing in public_things():
        about = inspect.getdoc(thing) or ""
        described = [(thing, about)] if inspect.isfunction(thing) else []
        for name, one in vars(thing).items() if inspect.isclass(thing) else ():
            method = inspect.unwrap(getattr(one, "__func__", one))
            building = name in ("__init__", "__post_init__")  # what it raises stands with the class
            if not inspect.isfunction(method) or (name.startswith("_") and not building):
                continue
            if method.__code__.co_filename == inspect.getfile(thing):  # not one that `dataclasses` wrote
                described.append((method, about + (inspect.getdoc(method) or "")))
        for function, text in described:
            for error in raised_by(function):
                if not error[0].isupper():  # one that was caught, raised again
                    continue
                assert error in text, f"{function.__qualname__} raises {error}, which its docstring does not say"
                found += 1
    assert found > 20
