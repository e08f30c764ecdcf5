"""Who runs in a case, and the check that each must pass before it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

import coarse_kernels

from . import baselines
from .cases import TRACE_WEIGHT, Case, Inputs

# Relative error against float64 on the same (rounded) inputs: loss, and 2-norm of each gradient.
# float32: plain PyTorch and the kernels are within 5e-7, and 2e-6 in the negative stream; a wrong term or a dropped
#   pixel shows at 1e-3. bfloat16: the mathematics is float32, but a stored gradient has 8 bits, 2**-9 at worst.
LOSS_BOUND = {"float32": 2e-6, "bfloat16": 2e-5, "float16": 2e-5, "float64": 1e-12}
GRADIENT_BOUND = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 8e-3, "float64": 1e-10}

OURS = "coarse_kernels"


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    formulation: baselines.Formulation
    threads: int = 1
    schedule: str = ""  # of ours only

    @contextlib.contextmanager
    def setting(self) -> Iterator[None]:
        """Threads and schedule that it runs under."""
        before = torch.get_num_threads()
        if self.threads != before:
            torch.set_num_threads(self.threads)
        try:
            with coarse_kernels.use_schedule(self.schedule or None):
                yield
        finally:
            if self.threads != before:
                torch.set_num_threads(before)


class Unavailable(RuntimeError):
    """This contestant cannot run on this machine; the others can."""


def ours(backend: str) -> baselines.Formulation:
    def annotation_nll(
        seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float
    ) -> Tensor:
        return coarse_kernels.annotation_nll(
            seg_logits, cm_logits, labels, transition, trace_weight=trace_weight, backend=backend
        ).loss

    return annotation_nll


def make_contestants(case: Case, backend: str) -> list[Contestant]:
    """Ours first: one per schedule and thread count."""
    fused = [
        Contestant(f"{OURS}:{backend}", ours(backend), threads, schedule)
        for threads in case.threads
        for schedule in case.schedules
    ]
    others = []
    for name in case.contestants:
        kind, *rest = name.split(":")
        formulation = baselines.compiled(*rest) if kind == "compiled" else baselines.BASELINES[kind]
        others.append(Contestant(name, formulation, case.threads[0]))
    return fused + others


def run_once(contestant: Contestant, inputs: Inputs) -> Tensor:
    """Forward, and backward where the inputs want gradients; those of the run before must be gone (`clear`)."""
    loss = contestant.formulation(*inputs, TRACE_WEIGHT)
    if inputs.seg_logits.requires_grad:
        loss.backward()
    return loss


def clear(inputs: Inputs) -> None:
    inputs.seg_logits.grad = inputs.cm_logits.grad = None


@dataclasses.dataclass(frozen=True)
class Truth:
    """Loss and gradients in float64, from the reference backend."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def truth(inputs: Inputs) -> Truth:
    seg, cm = (x.detach().double().requires_grad_(x.requires_grad) for x in (inputs.seg_logits, inputs.cm_logits))
    transition = None if inputs.transition is None else inputs.transition.double()
    loss = ours("reference")(seg, cm, inputs.labels, transition, TRACE_WEIGHT)
    gradients = torch.autograd.grad(loss, (seg, cm)) if inputs.seg_logits.requires_grad else ()
    return Truth(loss.detach(), gradients)


def errors(contestant: Contestant, inputs: Inputs, expected: Truth) -> dict[str, float]:
    """Relative error of the loss and, in 2-norm, of each gradient. This is also the contestant's warm-up."""
    clear(inputs)
    try:
        with contestant.setting():
            loss = run_once(contestant, inputs).detach()
    except Exception as error:
        if contestant.name.startswith("compiled"):  # no C++ compiler, or a graph that inductor cannot take
            raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        raise
    found = {"loss": float((loss.double() - expected.loss).abs() / expected.loss.abs())}
    gradients = (inputs.seg_logits.grad, inputs.cm_logits.grad)
    for name, own, true in zip(("grad_seg", "grad_cm"), gradients, expected.gradients, strict=False):
        found[name] = float("nan") if own is None else float((own.double() - true).norm() / true.norm())
    clear(inputs)
    return found


def verdict(case: Case, found: dict[str, float]) -> str | None:
    """Why it may not be timed, or None."""
    for name, error in found.items():
        bound = (LOSS_BOUND if name == "loss" else GRADIENT_BOUND)[case.dtype]
        if not error <= bound:  # NaN fails too
            return f"{name} is off by {error:.2g} (relative), allowed is {bound:.2g}"
    return None
