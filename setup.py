"""Builds the compiled modules against the torch of the environment that they go into. Without a working compiler the install
still succeeds: the reference backend needs none of it, says why at its first use, and `python -m coarse_kernels.env_report`
says it again. Without torch nothing is built, and that is an error.

COARSE_KERNELS_BUILD   auto (default): build, and go on without a compiler; 1: fail there too; 0: do not build
COARSE_CUDA            the same for the CUDA kernels. auto: where torch has CUDA and nvcc is found (CUDA_HOME)
TORCH_CUDA_ARCH_LIST   their architectures; default 8.0;9.0;10.0;12.0+PTX, as far as nvcc knows them
MAX_JOBS               parallel compile jobs (ninja); default: one for each core and each 2 GB of memory
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

# pip (26.3 does, 23.2 did not) shows what is warned of in a build. Neither of these is for who installs.
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch, before NumPy is there; nothing here needs it
warnings.filterwarnings("ignore", "Editable installation")


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
OLDEST_TORCH = (2, 11)
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY"]
# One binary for every Python from 3.10 on; a free-threaded one has no limited API.
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")
JOB_BYTES = 2 << 30
REASONS: dict[str, str] = {}  # why a module is missing; goes into the package, where native.py reads it


def extensions() -> tuple[list, dict]:
    """(ext_modules, cmdclass)."""
    if MODE == "0":
        return [], {}
    if lacking := torch_lacking():
        return [Extension("coarse_kernels._C", [])], {"build_ext": refusal(lacking)}
    if sys.platform == "win32":
        leave_out("_C", "the kernels are written in the vector types of GCC and Clang, which MSVC does not have")
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    operators = CppExtension(
        "coarse_kernels._C",
        [f"csrc/cpu/{name}.cpp" for name in CPU_SOURCES],
        extra_compile_args=[*CXX_FLAGS, *STABLE_ABI],
        py_limited_api=LIMITED_API,
    )
    modules = [operators, *cuda_extensions(), *tools()]
    limit_jobs()
    # where `python -m pip` puts ninja, in an environment that nobody activated
    os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", ""), sysconfig.get_path("scripts")])

    class Build(BuildExtension):
        def run(self) -> None:
            package = Path("." if self.inplace else self.build_lib, "coarse_kernels")
            if not self.inplace:
                self.extensions = [one for one in self.extensions if not one.name.endswith("_native")]
                REASONS["_native"] = "a tool for work on the kernels, for one Python: editable installs have it"
            try:
                super().run()
            except Exception as error:  # whatever a compiler, or its absence, may raise
                for one in self.extensions:
                    self.failed(one, error)
            if not self.inplace:
                for one in self.extensions:
                    if module_of(one) in REASONS:  # what an earlier build has left in this folder is not of this one
                        Path(self.get_ext_fullpath(one.name)).unlink(missing_ok=True)
            note_reasons(package)
            wheel = self.distribution.get_command_obj("bdist_wheel", create=False)
            if wheel is not None and not self.inplace and all(module_of(one) in REASONS for one in self.extensions):
                # without a binary it is for every system, and must not pass for one that has it
                self.distribution.ext_modules, wheel.root_is_pure = [], True

        def build_extension(self, extension: Extension) -> None:
            try:
                super().build_extension(extension)
            except Exception as error:
                self.failed(extension, error)

        def failed(self, extension: Extension, error: Exception) -> None:
            """The others are built all the same."""
            if (CUDA_MODE if extension.name.endswith("_cuda") else MODE) == "1":
                raise error
            extension.optional = True  # setuptools then copes with one that was not built
            compiler = (getattr(self.compiler, "compiler_cxx", None) or ["c++"])[0]
            reason = f"{type(error).__name__}: {error}; -v shows what the compiler said"
            if shutil.which(compiler) is None:
                reason = f"there is no C++ compiler: {compiler} was not found"
            leave_out(module_of(extension), reason)

    return modules, {"build_ext": Build.with_options(no_python_abi_suffix=False)}


def module_of(extension: Extension) -> str:
    return extension.name.rpartition(".")[2]


def torch_lacking() -> str | None:
    """What is wrong with the torch at hand, or None.

    pip and others build in an environment of their own, which has no torch. That of the environment around it serves: the
    modules are for the stable ABI of one version, whichever torch lends its headers.
    """
    if importlib.util.find_spec("torch") is None:
        pythons = [Path(sys.executable)]
        if active := os.environ.get("VIRTUAL_ENV"):
            pythons += [Path(active, *place) for place in (("bin", "python"), ("Scripts", "python.exe"))]
        for python in pythons:
            sys.path += [place for place in paths_of(python) if place not in sys.path]
    try:
        import torch
        import torch.utils.cpp_extension
    except ImportError as error:
        return f"the kernels are compiled against torch, which is not here ({error}): `pip install torch` first, then"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST_TORCH:
        wanted = ".".join(map(str, OLDEST_TORCH))
        return f"torch {torch.__version__} is older than {wanted}: `pip install 'torch>={wanted}'` first, then"
    return None


def paths_of(python: Path) -> list[str]:
    """Where an interpreter finds packages; -E: without the variables by which pip hides them."""
    code = "import sys; print(*sys.path, sep='\\n')"
    try:
        done = subprocess.run([python, "-E", "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return [line for line in done.stdout.splitlines() if line]


def refusal(lacking: str) -> type[build_ext]:
    """Only a build is refused: metadata and sdists need no torch."""

    class Refuse(build_ext):
        def run(self) -> None:
            raise SystemExit(
                f"coarse_kernels: {lacking} the same again with --no-build-isolation (`python -m build`: --no-isolation). "
                "COARSE_KERNELS_BUILD=0 installs the reference backend alone."
            )

    return Refuse


def tools() -> list:
    """`_native`, which has no torch in it."""
    try:
        from pybind11 import get_include
        from torch.utils.cpp_extension import CppExtension
    except ImportError:  # the operators do without
        leave_out("_native", "it needs pybind11")
        return []
    native = CppExtension(
        "coarse_kernels._native",
        ["csrc/native.cpp"],
        include_dirs=[get_include()],
        extra_compile_args=CXX_FLAGS,
        extra_link_args=["-pthread"],  # std::thread, before glibc 2.34
    )
    native.libraries = []
    native.library_dirs = []
    return [native]


def cuda_extensions() -> list:
    """The CUDA kernels, a module of their own: where they cannot be built, the rest can."""
    import torch
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    nvcc = Path(home or "", "bin", "nvcc")
    if CUDA_MODE == "0":
        return no_cuda("COARSE_CUDA=0")
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
            py_limited_api=LIMITED_API,
        )
    ]


def no_cuda(reason: str) -> list:
    if CUDA_MODE == "1":
        raise SystemExit(f"coarse_kernels: COARSE_CUDA=1, but the CUDA kernels cannot be built: {reason}")
    REASONS["_cuda"] = reason
    print(f"coarse_kernels: without CUDA kernels: {reason}", file=sys.stderr)
    return []


def limit_jobs() -> None:
    """As many compilers at a time as there is memory for."""
    if "MAX_JOBS" in os.environ:
        return
    jobs = os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # a system that does not tell
        pass
    else:
        jobs = max(1, min(jobs, memory // JOB_BYTES))
    os.environ["MAX_JOBS"] = str(jobs)
    print(f"coarse_kernels: {jobs} compile jobs at a time (set MAX_JOBS to change that)", file=sys.stderr)


def note_reasons(package: Path) -> None:
    place = package / "not_built.json"
    place.unlink(missing_ok=True)
    if REASONS:
        package.mkdir(parents=True, exist_ok=True)
        place.write_text(json.dumps(REASONS, indent=2) + "\n", encoding="utf-8")


def leave_out(module: str, reason: str) -> None:
    if MODE == "1" and module == "_C":
        raise SystemExit(f"coarse_kernels: COARSE_KERNELS_BUILD=1, but {module} cannot be built: {reason}")
    REASONS[module] = reason
    said = f"coarse_kernels: installing without compiled code ({module}): {reason}"
    if module == "_C":
        said += ". The reference backend serves; with GCC or Clang the same again compiles"
        warnings.warn(said, stacklevel=2)
        tell_who_installs(said)
    else:
        print(said, file=sys.stderr)


def tell_who_installs(line: str) -> None:
    """At the terminal, if there is one: pip before 26.3 swallows whatever a build prints or warns of, and then says
    "Successfully installed"."""
    if os.name != "posix" or sys.stderr.isatty():
        return
    asked = signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # `stty tostop` would stop an install in the background
    try:
        with open("/dev/tty", "w", encoding="utf-8", errors="replace") as terminal:
            print(f"\r{line}", file=terminal)  # over the spinner
    except OSError:  # none, as in CI
        pass
    finally:
        signal.signal(signal.SIGTTOU, asked)


ext_modules, cmdclass = extensions()
setup(
    ext_modules=ext_modules,
    cmdclass=cmdclass,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API and ext_modules else {},
)
