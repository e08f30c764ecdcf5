"""What goes into an sdist and a wheel, and who is told what where nothing can be built. `make release-check` does all of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from email import message_from_string
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import coarse_kernels as ck
from coarse_kernels import native
from tests import licences, offline_pages, smoke
from tests.helpers import ROOT, run_python
from tests.release_check import NOT_INSTALLED, ONLY_IN_GIT, PACKAGES, run_at_a_terminal


def git(*arguments: str) -> set[str]:
    """Names that git lists, of files that are there."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout")
    listed = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).exists()}


def setup_py(*command: str) -> subprocess.CompletedProcess[str]:
    """Nothing is compiled."""
    env = {**os.environ, "COARSE_KERNELS_BUILD": "0"}
    run = [sys.executable, "setup.py", "-q", *command]
    return subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=True)


@pytest.fixture(scope="module")
def egg_info(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file `said`: what setuptools had to say."""
    base = tmp_path_factory.mktemp("egg")
    done = setup_py("egg_info", "--egg-base", str(base))
    (place,) = base.iterdir()
    (place / "said").write_text(done.stdout + done.stderr)
    return place


def test_an_sdist_has_every_file_that_git_has(egg_info: Path) -> None:
    names = (egg_info / "SOURCES.txt").read_text().splitlines()
    packed = {name for name in names if ".egg-info/" not in name}
    assert {name for name in git("ls-files") if not name.startswith(ONLY_IN_GIT)} - packed == set()
    assert packed - git("ls-files", "--cached", "--others", "--exclude-standard") == set()


def test_a_wheel_has_every_file_of_both_packages(tmp_path: Path) -> None:
    setup_py("build_py", "--build-lib", str(tmp_path))
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {name for name in git("ls-files") if name.startswith(PACKAGES)} - NOT_INSTALLED - built == set()
    assert {"coarse_kernels/py.typed", "coarse_train/py.typed"} <= built
    assert not [name for name in built if not name.startswith(PACKAGES)]


def test_setuptools_has_nothing_to_complain_about(egg_info: Path) -> None:
    said = (egg_info / "said").read_text()
    assert not re.search("deprecat", said, re.IGNORECASE), said


def test_metadata(egg_info: Path) -> None:
    metadata = message_from_string((egg_info / "PKG-INFO").read_text())
    assert metadata["Version"] == ck.__version__
    assert metadata["License-Expression"] == "Apache-2.0 AND CC-BY-SA-3.0"
    assert metadata.get_all("License-File") == ["LICENSE", "coarse_train/data/mnist_sample/ATTRIBUTION.md"]
    assert metadata["Author"]
    assert metadata.get_all("Project-URL")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert not [one for one in metadata.get_all("Classifier", []) if one.startswith("License ::")]


def test_the_version_stands_in_one_place_and_in_the_changelog() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == ck.__version__
    literal = re.compile(rf"version\w*\b.*[\"']{re.escape(ck.__version__)}[\"']", re.IGNORECASE)
    places = [
        name for name in git("ls-files", "*.py", "*.toml") if literal.search((ROOT / name).read_text(encoding="utf-8"))
    ]
    assert places == ["coarse_kernels/version.py"]


def test_the_smoke_test_of_installed_packages_holds() -> None:
    differences = smoke.compare()
    assert len(differences) == 16
    assert max(differences.values()) < smoke.TOLERANCE


# --- setup.py where something is missing ------------------------------------------------------------------------------

RUN = """
import os, runpy, sys
{before}
sys.argv = ["setup.py", "-q", *{command!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
HIDDEN = "sys.modules['torch'] = None"
OLD = "import torch; torch.__version__ = '2.10.1+cpu'"


def setup_with(before: str, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python(
        RUN.format(before=before, command=list(command)), **{"COARSE_KERNELS_BUILD": "auto", **environment}
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "mode", "reason"),
    [
        (HIDDEN, "auto", "torch, which is not here"),
        pytest.param(HIDDEN, "1", "torch, which is not here", marks=pytest.mark.slow),
        (OLD, "auto", "torch 2.10.1+cpu is older"),
    ],
)
def test_a_build_without_torch_is_refused_in_one_line(tmp_path: Path, before: str, mode: str, reason: str) -> None:
    """A wheel without compiled code would be what the user never asked for, and would not know of."""
    done = setup_with(before, "build", "--build-base", str(tmp_path), COARSE_KERNELS_BUILD=mode)
    assert done.returncode != 0
    said = done.stderr.splitlines()[-1]
    assert said.startswith("coarse_kernels: ")
    assert reason in said
    assert "pip install" in said
    assert "--no-build-isolation" in said


def test_metadata_and_sdists_need_no_torch(tmp_path: Path) -> None:
    done = setup_with(HIDDEN, "egg_info", "--egg-base", str(tmp_path))
    assert done.returncode == 0, done.stderr


SHOWN = """
import os, runpy, sys
{before}
import setuptools
seen = {{}}
setuptools.setup = lambda **arguments: seen.update(arguments)
names = runpy.run_path("setup.py", run_name="__main__")
print(*(extension.name for extension in seen["ext_modules"]))
print(seen["options"])
print(os.environ.get("MAX_JOBS"))
"""


def shown(before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """setup.py as far as what it would build."""
    return run_python(SHOWN.format(before=before), COARSE_KERNELS_BUILD="auto", **environment)


@pytest.mark.slow
def test_a_wheel_is_for_every_python_and_built_on_every_core_where_memory_is_not_told() -> None:
    """Windows has no os.sysconf."""
    done = shown(
        "import torch; del os.sysconf; os.environ.pop('MAX_JOBS', None)"
    )  # on import, torch may ask for it itself
    assert done.returncode == 0, done.stderr
    modules, options, jobs = done.stdout.splitlines()
    assert "coarse_kernels._C" in modules.split()
    assert options == "{'bdist_wheel': {'py_limited_api': 'cp310'}}"
    assert jobs == str(os.cpu_count() or 1)


@pytest.mark.slow
def test_a_python_without_the_limited_api_is_not_promised_it() -> None:
    before = (
        "import sysconfig; of = sysconfig.get_config_var\n"
        "sysconfig.get_config_var = lambda name: name == 'Py_GIL_DISABLED' or of(name)"
    )
    assert shown(before).stdout.splitlines()[1] == "{}"


@pytest.mark.slow
def test_a_build_in_isolation_takes_the_torch_around_it(tmp_path: Path) -> None:
    """What pip does: no site-packages but its own, by a sitecustomize that PYTHONPATH leads to."""
    for name in ("setuptools", "_distutils_hack"):
        spec = find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        (tmp_path / name).symlink_to(Path(spec.origin).parent)
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.path[:] = [p for p in sys.path if 'site-packages' not in p]\n"
    )
    check = "import importlib.util; assert importlib.util.find_spec('torch') is None, sys.path"
    done = shown(check, PYTHONPATH=str(tmp_path), PYTHONNOUSERSITE="1")
    assert done.returncode == 0, done.stderr
    assert "coarse_kernels._C" in done.stdout.splitlines()[0].split()


WINDOWS = "import setuptools.command.build_ext, torch.utils.cpp_extension; sys.platform = 'win32'"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="a terminal of its own")
def test_who_installs_is_told_that_nothing_was_compiled_whatever_pip_swallows() -> None:
    """pip before 26.3 shows nothing that a build prints, and ends with "Successfully installed"."""
    code = SHOWN.format(before=WINDOWS)
    as_pip_does = (
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {code!r}], check=True, capture_output=True)"
    )
    own = {**os.environ, "PYTHONPATH": str(ROOT), "COARSE_KERNELS_BUILD": "auto"}
    said = run_at_a_terminal(sys.executable, "-c", as_pip_does, cwd=ROOT, env=own)
    (line,) = filter(None, map(str.strip, said.splitlines()))
    assert "installing without compiled code" in line
    assert "with GCC or Clang the same again compiles" in line


@pytest.mark.slow
def test_windows_gets_the_reference_backend_and_is_told_so() -> None:
    done = shown(WINDOWS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == ""
    assert "MSVC" in done.stderr


@pytest.mark.slow
def test_what_pip_shows_of_a_build_is_for_who_installs() -> None:
    """pip replays warnings: torch's about a NumPy that is not there yet, setuptools' about being editable, help nobody."""
    shows = (
        "\nimport warnings; warnings.warn('Failed to initialize NumPy: no'); warnings.warn('Editable installation.')"
    )
    done = run_python(SHOWN.format(before="") + shows, COARSE_KERNELS_BUILD="auto")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr


# --- who is told ------------------------------------------------------------------------------------------------------


def test_the_reason_of_the_build_is_what_a_user_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "not_built.json").write_text(json.dumps({"_gone": "CompileError: no such header"}))
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    _, reason = native._load("_gone")
    assert reason == "it was not built: CompileError: no such header"
    monkeypatch.setattr(native, "OPERATORS", None)
    monkeypatch.setattr(native, "OPERATORS_ERROR", reason)
    said = native.operators_reason()
    assert said is not None
    assert "CompileError: no such header" in said
    assert "pip install" in said
    assert "\n" not in said


def test_a_module_that_is_there_and_does_not_load_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_broken.py").write_text("raise ImportError('libc10.so: cannot open shared object file')")
    monkeypatch.setattr(ck, "__path__", [*ck.__path__, str(tmp_path)])
    module, reason = native._load("_broken")
    assert module is None
    assert reason is not None
    assert reason.startswith("it was built, but does not load: ImportError: libc10.so")


def test_the_licence_of_every_dependency_is_listed() -> None:
    told = dict(re.findall(r"^\| ([\w-]+) \| .+ \| (.+) \|$", licences.PAGE.read_text(encoding="utf-8"), re.M))
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has none")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    assert extras.keys() == set(licences.EXTRAS) - {""}
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    direct = {canonicalize_name(Requirement(line).name) for line in lines} - {licences.OWN}
    assert direct - told.keys() <= {"tomli"}  # of Python 3.10
    assert not [name for name in direct & told.keys() if "not said" in told[name]]
    assert told["torch"].startswith("Apache-2.0 AND")


def test_a_licence_is_found_wherever_metadata_has_it() -> None:
    class Package:
        def __init__(self, **json: object) -> None:
            self.metadata = type("Metadata", (), {"json": json})

    osi = "License :: OSI Approved"
    for package, said in [
        (Package(license_expression="MIT OR Apache-2.0", license="other"), "MIT OR Apache-2.0"),
        (Package(classifier=["Topic :: Software", osi, f"{osi} :: ISC License (ISCL)"]), "ISC"),
        (Package(classifier=[f"{osi} :: BSD License"], license="BSD-3-Clause"), "BSD-3-Clause"),
        (Package(license="https://example.org/terms"), "[its own](https://example.org/terms)"),
        (Package(license="Permission is hereby granted\nto all"), "not said in its metadata"),
    ]:
        assert licences.licence(package) == said  # type: ignore[arg-type]


def test_a_page_that_loads_something_from_a_server_is_found(tmp_path: Path) -> None:
    (tmp_path / "static").mkdir()
    good = '<link rel="Canonical" href="https://a.org/"><script src="static/x.js"></script><a href="https://a.org">there</a>'
    (tmp_path / "good.html").write_text(good)
    (tmp_path / "static" / "good.css").write_text("a { background: url(data:image/png;base64,AA); b: url(x.png) }")
    assert offline_pages.main(str(tmp_path)) == 0
    bad = [
        '<script src="https://cdn.org/mathjax.js"></script>',
        '<img src="//img.org/badge.svg">',
        '<link rel="stylesheet" href="https://fonts.org/css">',
        "<style>@import 'https://fonts.org/a.css';</style>",
        '<div style="background: url(https://img.org/b.png)"></div>',
        '<img srcset="a.png 1x, https://img.org/b.png 2x">',
        '<svg><image xlink:href="https://img.org/c.png"/></svg>',
        '<base href="https://a.org/">',
        "<link href=https://fonts.org/css>",
    ]
    for number, line in enumerate(bad):
        (tmp_path / f"bad{number}.html").write_text(f"<p>\n{line}")
    (tmp_path / "static" / "bad.css").write_text('@font-face { src: url("https://fonts.org/c.woff") }')
    assert len(list(offline_pages.loaded(tmp_path))) == len(bad) + 1
    assert offline_pages.main(str(tmp_path)) == 1
    with pytest.raises(SystemExit, match="no page"):
        offline_pages.main(str(tmp_path / "static"))
