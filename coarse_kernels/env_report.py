"""`python -m coarse_kernels.env_report`: versions, what was built, which backend each device gets, and why. For bug reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable

import torch

from . import backends, native, pool, schedule
from .functional import explain
from .problem import Drawings
from .version import __version__

VARIABLES = (
    "COARSE_KERNELS_BACKEND",
    "COARSE_KERNELS_SCHEDULE",
    "COARSE_KERNELS_ISA",
    "COARSE_KERNELS_DEBUG",
    pool.VARIABLE,
)


def report() -> str:
    lines = [
        f"coarse_kernels  {__version__}",
        f"python          {platform.python_version()} on {platform.platform()}",
        f"torch           {torch.__version__}, {torch.get_num_threads()} threads",
        f"cuda            {torch.version.cuda or 'torch is built without it'}",
        f"numpy           {_version('numpy')}",
        f"triton          {_version('triton')}",
        "",
        f"operators (_C)       {_built(native.OPERATORS, native.OPERATORS_ERROR)}",
        f"CUDA (_cuda)         {_built(native.CUDA, native.cuda_reason())}",
        f"NumPy view (_native) {_built(native.TOOLS, native.TOOLS_ERROR)}",
    ]
    if native.OPERATORS is not None:
        lines.append(f"instruction set      {native.OPERATORS.isa} in use")
    if native.OPERATORS is not None and native.TOOLS is not None:
        cpu, build = native.TOOLS.cpu_info(), native.TOOLS.build_info()
        lines[-1] += f"; this machine has {', '.join(cpu['supported'])}"
        lines.append(f"built by             {build['compiler']} for {build['architecture']}")
    devices = ["cpu", *(f"cuda:{k}" for k in range(torch.cuda.device_count()))]
    for device in devices:
        lines += ["", f"{device}: {backends.available_backends(device)[0]!r} is tried first, unless one is named"]
        for name, reason in backends.explain(device).items():
            lines.append(f"  {name:<10} {'can run' if reason is None else 'cannot: ' + reason}")
    seg, cm = torch.zeros(1, 19, 64, 128), torch.zeros(1, 19, 19, 32, 64)
    labels = torch.zeros(1, 256, 512, dtype=torch.uint8)
    drawings = [Drawings(labels, cm), Drawings(labels)]
    lines += ["", "19 classes, 256x512: class logits at stride 4, a field at stride 8 and a trusted kind on the CPU:"]
    lines += [f"  {line}" for line in _told(lambda: explain(seg, drawings)).splitlines()]
    lines += ["", f"schedule: {_told(schedule.current)}"]
    lines += [f"pool of large CPU results: {pool.pool_bytes()} of at most {pool.pool_limit()} bytes wait"]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    return "\n".join(lines)


def _told(by: Callable[[], str]) -> str:
    """Or why not: what is wrong with an environment is what a report is for."""
    try:
        return by()
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _built(module: object, error: str | None) -> str:
    return "built" if module is not None else f"missing: {error}"


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
