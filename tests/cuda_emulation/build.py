"""The CUDA kernels built for the CPU (emulated_cuda.h), as operators `torch.ops.coarse_kernels_emulated`."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SOURCES = sorted(path for end in ("cu", "cpp") for path in (CSRC / "cuda").glob(f"*.{end}"))


def library() -> Path:
    """Built once for each state of the sources, in the temporary folder; about a minute."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"no C++ compiler {compiler!r}")
    flags = [
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-w",
        "-U_FORTIFY_SOURCE",
        "-DCOARSE_EMULATED",
        "-DCOARSE_PIECE_BYTES=200000",
        "-DTORCH_TARGET_VERSION=0x020b000000000000",
        "-DTORCH_STABLE_ONLY",
    ]
    digest = hashlib.sha256(repr((flags, torch.__version__, sys.version)).encode())
    for path in sorted([*CSRC.glob("*"), *(CSRC / "cuda").glob("*"), *HERE.glob("*.h")]):
        if path.suffix in (".h", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"coarse_kernels_emulated_{digest.hexdigest()[:16]}"
    flags += [
        f"-I{path}" for path in (HERE, *cpp_extension.include_paths())
    ]  # not in the digest: clones share what is built
    target = folder / "emulated.so"
    if target.exists():
        return target
    work = Path(tempfile.mkdtemp(dir=folder.parent))

    def compile_one(source: Path) -> Path:
        made = work / f"{source.name}.o"
        run([compiler, *flags, "-x", "c++", "-c", str(source), "-o", str(made)])
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
    run(
        [compiler, "-shared", *map(str, objects), *libraries, "-ltorch_cpu", "-ltorch", "-o", str(work / "emulated.so")]
    )
    folder.mkdir(exist_ok=True)
    os.replace(work / "emulated.so", target)  # whole or not at all: two test runs may build at once
    shutil.rmtree(work)
    return target


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:1] + command[-4:])} failed:\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(library())
