"""Who computes. A backend is one module here with a `Backend` object, and one line in `_REGISTRY`.

An automatic choice falls back and logs the reason once; an explicit choice (argument, `use_backend`, environment
variable COARSE_KERNELS_BACKEND) that cannot run raises with the reason.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..problem import Drawings, Problem
from . import cpu, cuda, reference, triton
from .reference import Terms

logger = logging.getLogger("coarse_kernels")


class Backend(Protocol):
    """What a backend owes. Tensors as in `problem.Problem`; results in ``problem.compute_dtype`` unless stated."""

    name: str
    device_types: tuple[str, ...]  # empty: any

    def unavailable(self) -> str | None:
        """Why it cannot run in this process at all, or None."""

    def unsupported(self, problem: Problem) -> str | None:
        """Why it cannot serve these arguments, or None."""

    def unsupported_tensor(self, tensor: Tensor) -> str | None:
        """Why it cannot serve this tensor in `label_map`, or None."""

    def kernels(self, problem: Problem) -> list[str]:
        """In words, which kernel each kind of drawings gets, and why not a faster one."""

    def labelled_weight(self, problem: Problem, drawings: Drawings) -> Tensor:
        """Summed weight of the labels, 0-d; the (B, K, *S) weights themselves for reduction "none"."""

    def nll_sums(self, problem: Problem, scales: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Terms, ...]]:
        """The total, and of each kind 0-d ``scale * sum w (nll + trace_weight tr A)``, ``scale * sum w nll``,
        ``scale * sum w tr A``; the total is the sum over kinds of ``weight`` times the first.

        The total and the first of each kind carry gradient.
        """

    def nll_maps(self, problem: Problem) -> tuple[Terms, ...]:
        """Of each kind (B, K, *S) ``w (nll + trace_weight tr A)``, ``w nll``, ``w tr A``. Only the first carries gradient."""

    def posterior(self, problem: Problem) -> Tensor:
        """(B, C, *S) in the dtype of seg_logits."""

    def label_map(self, seg_logits: Tensor, size: tuple[int, ...]) -> Tensor:
        """(B, *S) uint8, int64 above 256 classes."""


VARIABLE = "COARSE_KERNELS_BACKEND"

# In the order in which an automatic choice tries them.
_REGISTRY: dict[str, Backend] = {
    backend.name: backend for backend in (cpu.BACKEND, cuda.BACKEND, triton.BACKEND, reference.BACKEND)
}

# The innermost `use_backend`. A plain global, so that torch.compile can guard on it.
_forced: str | None = None


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run on ``device``, in the order in which an automatic choice tries them.

    Whether they can serve certain arguments, `coarse_kernels.explain` says. RuntimeError of torch for a device that it does not
    know.
    """
    return tuple(name for name, reason in explain(device).items() if reason is None)


def explain(device: torch.device | str = "cpu") -> dict[str, str | None]:
    """For every backend, why it cannot run on ``device``, or None where it can."""
    kind = torch.device(device).type
    return {name: _reason(backend, kind) for name, backend in _REGISTRY.items()}


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Take backend ``name`` in this block wherever no ``backend=`` is given; None: that of
    COARSE_KERNELS_BACKEND, or the library chooses.

    Process-wide while it lasts, like `torch.set_default_dtype`; not meant for threads that disagree.

    Raises:
        ValueError: there is no such backend. One that cannot run raises RuntimeError with the reason where it is needed.
    """
    global _forced
    if name is not None:
        _lookup(name)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def select(problem: Problem, name: str | None) -> Backend:
    """The backend for these arguments: ``name``, else `use_backend`, else the environment, else the first that can."""
    return _first(name, problem.device.type, lambda backend: backend.unsupported(problem))


def select_for(tensor: Tensor, name: str | None) -> Backend:
    """The same where there are no drawings."""
    return _first(name, tensor.device.type, lambda backend: backend.unsupported_tensor(tensor))


def _first(name: str | None, kind: str, unsupported: Callable[[Backend], str | None]) -> Backend:
    name = name if name is not None else _forced
    said = "backend"
    if name is None:
        name, said = _from_environment(), VARIABLE
    if name is not None:
        backend = _lookup(name, said)
        reason = _reason(backend, kind) or unsupported(backend)
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
        return backend
    for backend in _REGISTRY.values():
        if backend.device_types and kind not in backend.device_types:
            continue  # not worth a word: nobody expects the CPU kernels on a GPU
        reason = backend.unavailable() or unsupported(backend)
        if reason is None:
            return backend
        _log_fallback(backend.name, kind, reason)
    raise RuntimeError(f"no backend can run on {kind}: {explain(kind)}")


def refusals(problem: Problem) -> dict[str, str]:
    """For every backend, why it cannot serve these arguments; without those that can."""
    reasons = {
        name: _reason(backend, problem.device.type) or backend.unsupported(problem)
        for name, backend in _REGISTRY.items()
    }
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _lookup(name: str, said: str = "backend") -> Backend:
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ValueError(f"{said}: expected one of {tuple(_REGISTRY)}, got {name!r}")
    return _REGISTRY[name]


def _reason(backend: Backend, kind: str) -> str | None:
    if backend.device_types and kind not in backend.device_types:
        return f"it serves {', '.join(backend.device_types)} tensors, got {kind}"
    return backend.unavailable()


def _from_environment() -> str | None:
    return os.environ.get(VARIABLE) or None


@functools.cache
def _remember(message: str) -> None:
    logger.warning(message)


def _log_fallback(name: str, kind: str, reason: str) -> None:
    if not torch.compiler.is_compiling():
        _remember(f"backend {name!r} is not used for {kind} tensors: {reason}")
