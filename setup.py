"""Builds the two compiled modules, if it can. Without a compiler, without torch, or with COARSE_KERNELS_BUILD=0 the install
still succeeds: the reference backend needs none of it, and `python -m coarse_kernels.env_report` says what is missing.

COARSE_KERNELS_BUILD   auto (default): build, and go on without where that fails; 1: fail loudly; 0: do not build
MAX_JOBS               parallel compile jobs (ninja); a job takes up to 1 GB of memory
"""

from __future__ import annotations

import os
import sys

from setuptools import setup

MODE = os.environ.get("COARSE_KERNELS_BUILD", "auto")
if MODE not in ("auto", "0", "1"):
    raise SystemExit(f"COARSE_KERNELS_BUILD: expected auto, 0 or 1, got {MODE!r}")

CPU_SOURCES = ["dispatch", "kernels_baseline", "kernels_avx2", "kernels_avx512"]
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
        ["csrc/ops.cpp", *(f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES)],
        # 2.11: the oldest torch whose stable ABI has what ops.cpp calls. STABLE_ONLY keeps every other header out.
        extra_compile_args=[*CXX_FLAGS, "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"],
        py_limited_api=True,
    )
    modules = [operators]
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
        )
        tools.libraries = []  # no torch in it
        tools.library_dirs = []
        modules.append(tools)
    for extension in modules:
        extension.optional = MODE != "1"  # setuptools then copes with one that was not built

    class Build(BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # whatever a compiler, or its absence, may raise
                if MODE == "1":
                    raise
                skip(f"{type(error).__name__}: {error}")

    return modules, {"build_ext": Build.with_options(no_python_abi_suffix=False)}


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
