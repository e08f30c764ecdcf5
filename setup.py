"""Builds the compiled modules, if it can. Without a compiler, without torch, or with COARSE_KERNELS_BUILD=0 the install
still succeeds: the reference backend needs none of it, and `python -m coarse_kernels.env_report` says what is missing.

COARSE_KERNELS_BUILD   auto (default): build, and go on without where that fails; 1: fail loudly; 0: do not build
COARSE_CUDA            the same for the CUDA kernels. auto: where torch has CUDA and nvcc is found (CUDA_HOME)
TORCH_CUDA_ARCH_LIST   their architectures; default 8.0;9.0;10.0;12.0+PTX, as far as nvcc knows them
MAX_JOBS               parallel compile jobs (ninja); default: one for each core and each 2 GB of memory
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from setuptools import setup


def switch(name: str) -> str:
    value = os.environ.get(name, "auto")
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"{name}: expected auto, 0 or 1, got {value!r}")
    return value


MODE, CUDA_MODE = switch("COARSE_KERNELS_BUILD"), switch("COARSE_CUDA")

CPU_SOURCES = ["ops_cpu", "dispatch", "kernels_baseline", "kernels_avx2", "kernels_avx512"]
# No -march: each kernels_*.cpp raises the instruction set for itself, and dispatch.cpp chooses at run time.
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-g0",
    "-ffp-contract=fast",  # multiply-add as one instruction, where there is one
    "-fno-math-errno",
    "-fvisibility=hidden",
    "-Wno-psabi",  # vectors never cross the boundary of a translation unit
    "-Wno-maybe-uninitialized",  # GCC 12 on its own AVX-512 intrinsics
]
# Kernels know nothing of torch; their host functions are called by ops_*.cpp.
NVCC_FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fvisibility=hidden"]
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# 2.11: the oldest torch whose stable ABI has what the operators call. STABLE_ONLY keeps every other header out.
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
JOB_BYTES = 2 << 30


def extensions() -> tuple[list, dict]:
    """(ext_modules, cmdclass), or nothing with the reason printed."""
    if MODE == "0":
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return skip(f"cannot import what the build needs ({error}); install with --no-build-isolation")

    operators = CppExtension(
        "coarse_kernels._C",
        [f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES],
        extra_compile_args=[*CXX_FLAGS, *STABLE_ABI],
        py_limited_api=True,
    )
    modules = [operators, *cuda_extensions()]
    try:
        import pybind11
    except ImportError:  # the operators do without
        skip("the NumPy view `_native` needs pybind11")
    else:
        tools = CppExtension(
            "coarse_kernels._native",
            ["csrc/native.cpp"],
            include_dirs=[pybind11.get_include()],
            extra_compile_args=CXX_FLAGS,
            extra_link_args=["-pthread"],  # std::thread, before glibc 2.34
        )
        tools.libraries = []  # no torch in it
        tools.library_dirs = []
        modules.append(tools)
    for extension in modules:
        # setuptools then copes with one that was not built
        extension.optional = (CUDA_MODE if extension.name.endswith("_cuda") else MODE) != "1"
    limit_jobs()

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever a compiler, or its absence, may raise
                if "1" in (MODE, CUDA_MODE):
                    raise
                skip(f"{type(error).__name__}: {error}")

    return modules, {"build_ext": Build.with_options(no_python_abi_suffix=False)}


def cuda_extensions() -> list:
    """The CUDA kernels, a module of their own: where they cannot be built, the rest can."""
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    nvcc = Path(home or "", "bin", "nvcc")
    if CUDA_MODE == "0":
        return []
    if torch.version.cuda is None:
        return no_cuda("this torch is built without CUDA")
    if home is None or not nvcc.exists():
        return no_cuda("no nvcc found; install a CUDA toolkit, or set CUDA_HOME")
    try:  # the two have to agree on the major version; BuildExtension would stop at it, taking the other modules along
        release = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError) as error:
        return no_cuda(f"{nvcc} does not run: {error}")
    if f"release {torch.version.cuda.split('.')[0]}." not in release:
        return no_cuda(f"torch has CUDA {torch.version.cuda}, {nvcc} is another: {release.strip().splitlines()[-1]}")
    architectures = [name for name in ARCHITECTURES if f"compute_{name.replace('.', '')}" in known]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(architectures) + "+PTX")
    print(f"coarse_kernels: CUDA kernels for {os.environ['TORCH_CUDA_ARCH_LIST']}", file=sys.stderr)
    return [
        cpp_extension.CUDAExtension(
            "coarse_kernels._cuda",
            sorted(str(path) for end in ("cpp", "cu") for path in Path("csrc/cuda").glob(f"*.{end}")),
            extra_compile_args={"cxx": [*CXX_FLAGS, *STABLE_ABI, "-DUSE_CUDA"], "nvcc": NVCC_FLAGS},
            py_limited_api=True,
        )
    ]


def no_cuda(reason: str) -> list:
    if CUDA_MODE == "1":
        raise SystemExit(f"coarse_kernels: COARSE_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    print(f"coarse_kernels: without CUDA kernels: {reason}", file=sys.stderr)
    return []


def limit_jobs() -> None:
    """As many compilers at a time as there is memory for."""
    if "MAX_JOBS" in os.environ:
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jobs = max(1, min(os.cpu_count() or 1, memory // JOB_BYTES))
    os.environ["MAX_JOBS"] = str(jobs)
    print(f"coarse_kernels: {jobs} compile jobs at a time (set MAX_JOBS to change that)", file=sys.stderr)


def skip(reason: str) -> tuple[list, dict]:
    if MODE == "1":
        raise SystemExit(f"coarse_kernels: COARSE_KERNELS_BUILD=1, but the extension cannot be built: {reason}")
    print(f"coarse_kernels: installing without compiled code: {reason}", file=sys.stderr)
    return [], {}


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
)
