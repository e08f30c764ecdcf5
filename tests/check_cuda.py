"""`make check-cuda`: nvcc over every kernel, no GPU needed. Registers, spills and shared memory of each; fails on a spill
in a fast path that is not in PARKED, on an error, and on a warning. The host glue is compiled too, against the headers of the
torch at hand.

    python -m tests.check_cuda [--arch 80 90 100] [--jobs N] [--out FILE]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CUDA = ROOT / "csrc" / "cuda"
ARCHITECTURES = ("80", "90", "100")
FAST = ("pixel_fast", "strided_fast", "gather_class_tiles", "trusted_")  # a spill there fails the check
# Bytes, stores and loads, that a tile (32 to 256 pixels) of these may park: registers are full, and the ways found around it
# cost more. On an H200 the 16-bit pixel kernel takes 2.2 ms with 16 of them where the one before took 3.6 without
# (benchmarks/NOTES.md).
PARKED = {
    "pixel_fast<17 to 19 classes, bf16": 16,
    "pixel_fast<17 to 19 classes, f16": 16,
    "strided_fast<18 classes>": 64,
    "strided_fast<19 classes>": 64,
    "strided_fast<20 classes>": 64,
}
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr"]  # as setup.py
STORAGE = {"0": "f32", "1": "f64", "2": "bf16", "3": "f16"}


@dataclass(frozen=True)
class Kernel:
    arch: str
    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int  # static; what a launch adds to it is in the second table

    @property
    def fast(self) -> bool:
        return self.name.startswith(FAST)

    @property
    def spills(self) -> bool:
        """More than what is known of it."""
        return self.spill_bytes > next((most for name, most in PARKED.items() if self.name.startswith(name)), 0)


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def sources() -> list[Path]:
    return sorted(CUDA.glob("*.cu"))


def compile_kernels(nvcc: str, source: Path, arch: str, host: bool) -> list[Kernel]:
    """``host``: also the launches, which are the same for every architecture."""
    with tempfile.TemporaryDirectory() as folder:
        target = f"arch=compute_{arch},code=sm_{arch}"
        command = [nvcc, *FLAGS, "-Xptxas", "-v", "-gencode", target, "-c" if host else "-cubin", str(source)]
        command += ["-o", f"{folder}/out.o"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0 or "warning" in done.stderr:
        raise RuntimeError(f"{source.name} for sm_{arch}:\n{done.stderr[-3000:]}")
    return parse(done.stderr, arch)


def parse(log: str, arch: str) -> list[Kernel]:
    """What ptxas -v says of each kernel."""
    kernels = []
    for part in re.split(r"Compiling entry function '", log)[1:]:
        name = readable(part[: part.index("'")])
        stores = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if stores is None or registers is None:
            raise RuntimeError(f"ptxas says nothing of {name}: {part[:500]}")
        shared = re.search(r"(\d+) bytes smem", part)
        spill = int(stores[1]) + int(stores[2])
        kernels.append(Kernel(arch, name, int(registers[1]), spill, int(shared[1]) if shared else 0))
    return kernels


def readable(mangled: str) -> str:
    """pixel_fast<up to 19 classes, f32, 1 a thread> for _ZN6coarse..., and the plain name of the others."""
    scopes, arguments = _nested_name(mangled)
    if not scopes:
        return mangled
    name = scopes[-1]
    fast = re.match(r"ILi(\d+)ELi(\d+)ELNS_7StorageE(\d)ELi(\d)E", arguments)
    if fast:
        return f"{name}<{_classes(fast[1], fast[2])}, {STORAGE[fast[3]]}, {fast[4]} a thread>"
    strided = re.match(r"ILi(\d+)ELi(\d+)E", arguments)
    if strided:
        return f"{name}<{_classes(*strided.groups())}>"
    trusted = re.match(r"ILNS_7StorageE(\d)E[fd](?:Lb([01])E)?(?:Li(\d)E)?E", arguments)
    if trusted:
        words = {"trusted_gather": ("any layers", "one layer")}.get(name, ("pixel grid", "coarser grid"))
        said = [words[int(trusted[2])]] if trusted[2] else []
        said += [f"{trusted[3]} {'classes' if name == 'trusted_gather' else 'layers'}"] if trusted[3] else []
        return f"{name}<{', '.join([STORAGE[trusted[1]], *said])}>"
    other = re.match(r"I([fd])E", arguments)
    return f"{name}<{other[1]}>" if other else name


def _classes(least: str, most: str) -> str:
    return f"{most} classes" if least == most else f"{least} to {most} classes"


def _nested_name(mangled: str) -> tuple[list[str], str]:
    """(scopes with the name last, what follows) of an Itanium name _ZN<length><scope>...: the lengths decide where one
    ends. nvcc's anonymous namespaces carry a hash of the file's path, so that anything may look like a name in there."""
    scopes: list[str] = []
    rest = mangled.removeprefix("_ZN")
    while length := re.match(r"\d+", rest):
        end = length.end() + int(length[0])
        scopes.append(rest[length.end() : end])
        rest = rest[end:]
    return scopes, rest


def compile_glue() -> str:
    """The host code with the host compiler; without a CUDA torch this is what can be known of it."""
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(), sysconfig.get_path("include")]
    abi = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Wextra", *abi]
    # torch's own headers are not ours to warn about
    command += [f"-isystem{path}" for path in includes]
    glue = sorted(CUDA.glob("*.cpp"))
    for source in glue:
        done = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
        if done.returncode != 0 or "warning" in done.stderr:
            raise RuntimeError(f"{source.name}:\n{done.stderr[-3000:]}")
    return f"{', '.join(source.name for source in glue)} compiles ({compiler})"


def table(kernels: list[Kernel]) -> str:
    """Kernels by line, architectures by column: registers, and spills where there are any."""
    architectures = sorted({kernel.arch for kernel in kernels}, key=int)
    by_name: dict[str, dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault(kernel.name, {})[kernel.arch] = kernel
    width = max(map(len, by_name))
    lines = [f"{'kernel':<{width}}  " + "  ".join(f"{'sm_' + arch:>16}" for arch in architectures)]
    for name in sorted(by_name, key=natural):
        cells = []
        for arch in architectures:
            kernel = by_name[name][arch]
            spill = f", {kernel.spill_bytes} B spilt" if kernel.spill_bytes else ""
            shared = f", {kernel.shared_bytes} B shared" if kernel.shared_bytes else ""
            cells.append(f"{kernel.registers}{spill}{shared}".rjust(16))
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    return "\n".join(lines)


def natural(name: str) -> list[int | str]:
    return [int(piece) if piece.isdigit() else piece for piece in re.split(r"(\d+)", name)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "check_cuda.txt")
    options = parser.parse_args(arguments)
    nvcc = find_nvcc()
    if nvcc is None:
        print("check-cuda: no nvcc found (PATH, CUDA_HOME): install a CUDA toolkit; no GPU is needed", file=sys.stderr)
        return 2
    jobs = [(source, arch, arch == options.arch[0]) for source in sources() for arch in options.arch]
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            found = list(pool.map(lambda job: compile_kernels(nvcc, *job), jobs))
        glue = compile_glue()
    except RuntimeError as error:
        print(f"check-cuda: {error}", file=sys.stderr)
        return 1
    kernels = [kernel for some in found for kernel in some]
    spilt = [kernel for kernel in kernels if kernel.fast and kernel.spills]
    text = f"registers a thread, as ptxas -v reports them\n\n{table(kernels)}\n\n{glue}\n"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    print(text)
    fast = sum(kernel.fast for kernel in kernels)
    print(
        f"{len(kernels)} kernels, {fast} of them fast paths; {len(spilt)} fast paths spill. Table: {options.out.name}"
    )
    for kernel in spilt:
        print(f"check-cuda: {kernel.name} on sm_{kernel.arch} spills {kernel.spill_bytes} bytes", file=sys.stderr)
    return 1 if spilt else 0


if __name__ == "__main__":
    sys.exit(main())
