"""Who runs in a case, and the check that each must pass before it is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import coarse_kernels

from . import baselines
from .cases import TRACE_WEIGHT, AnyInputs, BothInputs, Case, leaves

# Relative error against float64 on the same (rounded) inputs: loss, and 2-norm of each gradient.
# float32: plain PyTorch and the kernels are within 5e-7, and 2e-6 in the negative stream; a wrong term or a dropped
#   pixel shows at 1e-3. bfloat16: the mathematics is float32, but a stored gradient has 8 bits, 2**-9 at worst.
LOSS_BOUND = {"float32": 2e-6, "bfloat16": 2e-5, "float16": 2e-5, "float64": 1e-12}
GRADIENT_BOUND = {"float32": 5e-6, "bfloat16": 8e-3, "float16": 8e-3, "float64": 1e-10}

OURS = "coarse_kernels"


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    formulation: Callable[..., Tensor]  # a `baselines.Formulation`, or `Objective` where the case has both streams
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


class DoesNotFit(RuntimeError):
    """This contestant ran out of memory."""

    def __init__(self, contestant: Contestant, reason: str):
        super().__init__(reason)
        self.contestant = contestant


def ours(backend: str) -> baselines.Formulation:
    def annotation_nll(
        seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float
    ) -> Tensor:
        return coarse_kernels.annotation_nll(
            seg_logits, cm_logits, labels, transition, trace_weight=trace_weight, backend=backend
        ).loss

    return annotation_nll


def our_objective(backend: str) -> baselines.Objective:
    def coarse_label_loss(
        seg_logits: Tensor,
        cm_logits: Tensor,
        labels: Tensor,
        negative_cm: Tensor,
        negative_labels: Tensor,
        transition: Tensor,
        trace_weight: float,
    ) -> Tensor:
        return coarse_kernels.coarse_label_loss(
            seg_logits,
            cm_logits,
            labels,
            negative_cm,
            negative_labels,
            transition,
            trace_weight=trace_weight,
            backend=backend,
        ).loss

    return coarse_label_loss


def make_contestants(case: Case, *backends: str) -> list[Contestant]:
    """Ours first: one per backend, schedule and thread count."""
    both, half = case.stream == "both", case.dtype in ("bfloat16", "float16")
    fused = [
        Contestant(f"{OURS}:{backend}", our_objective(backend) if both else ours(backend), threads, schedule)
        for backend in backends
        for threads in case.threads
        for schedule in case.schedules
    ]
    others = [
        Contestant(name, baselines.contender(name, both=both, half=half), case.threads[0]) for name in case.contestants
    ]
    return fused + others


def run_once(contestant: Contestant, inputs: AnyInputs) -> Tensor:
    """Forward, and backward where the inputs want gradients; those of the run before must be gone (`clear`)."""
    loss = contestant.formulation(*inputs, TRACE_WEIGHT)
    if inputs.seg_logits.requires_grad:
        loss.backward()
    return loss


def clear(inputs: AnyInputs) -> None:
    for leaf in leaves(inputs).values():
        leaf.grad = None


@dataclasses.dataclass(frozen=True)
class Truth:
    """Loss and gradients in float64, from the reference backend."""

    loss: Tensor
    gradients: tuple[Tensor, ...]


def truth(inputs: AnyInputs) -> Truth:
    if isinstance(inputs, BothInputs):
        raise TypeError("both streams are held against `bands`")
    seg, cm = (x.detach().double().requires_grad_(x.requires_grad) for x in (inputs.seg_logits, inputs.cm_logits))
    transition = None if inputs.transition is None else inputs.transition.double()
    loss = ours("reference")(seg, cm, inputs.labels, transition, TRACE_WEIGHT)
    gradients = torch.autograd.grad(loss, (seg, cm)) if inputs.seg_logits.requires_grad else ()
    return Truth(loss.detach(), gradients)


def first_run(contestant: Contestant, inputs: AnyInputs) -> Tensor:
    """The loss; gradients are left in the inputs."""
    clear(inputs)
    try:
        with contestant.setting():
            return run_once(contestant, inputs).detach()
    except torch.OutOfMemoryError as error:
        reason = str(error).splitlines()[0]
    except Exception as error:
        if contestant.name.startswith("compiled"):  # no C++ compiler, or a graph that inductor cannot take
            raise Unavailable(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        raise
    # Raised out here, where the first error and with it every tensor of the frames that it left are gone.
    clear(inputs)
    raise DoesNotFit(contestant, reason)


def errors(contestant: Contestant, inputs: AnyInputs, expected: Truth) -> dict[str, float]:
    """Relative error of the loss and, in 2-norm, of each gradient. This is also the contestant's warm-up."""
    loss = first_run(contestant, inputs)
    found = {"loss": float((loss.double() - expected.loss).abs() / expected.loss.abs())}
    for (name, leaf), true in zip(leaves(inputs).items(), expected.gradients, strict=False):
        own = leaf.grad
        found[f"grad_{name}"] = float("nan") if own is None else float((own.double() - true).norm() / true.norm())
    clear(inputs)
    return found


# --- the same, in bands -----------------------------------------------------------------------------------------------

BAND_BYTES = 256 << 20  # of one float64 field in a band; the reference holds about a dozen of them at a time


class Band(NamedTuple):
    """Rows of the image and, on a coarser grid, the rows of each field that belong to them; what is true of them."""

    pixels: slice
    grid: dict[str, slice]  # rows of each leaf
    loss: Tensor  # this band's part of it, 0-d
    gradients: dict[str, Tensor]  # of those rows


def bands(case: Case, inputs: AnyInputs, most_bytes: int = BAND_BYTES) -> Iterator[Band]:
    """`truth` piece by piece: at full size one field in float64 alone is 6 GB. The reference, on the inputs' device.

    A band takes two rows of grid more than it owns on either side: their pixels add to the gradient of its first and last
    row, and are interpolated from the row beyond.
    """
    stride, wants_grad = case.stride, inputs.seg_logits.requires_grad
    row_bytes = 8 * case.classes**2 * case.width * stride
    own, halo = max(1, most_bytes // row_bytes), 0 if stride == 1 else 2
    streams = [(inputs.cm_logits, inputs.labels, inputs.transition)]
    if isinstance(inputs, BothInputs):
        streams = [
            (inputs.cm_logits, inputs.labels, None),
            (inputs.negative_cm, inputs.negative_labels, inputs.transition),
        ]
    counts = [(labels != baselines.IGNORE).sum(dtype=torch.float64) for _, labels, _ in streams]
    for start in range(0, case.grid[0], own):
        stop = min(start + own, case.grid[0])
        first, last = max(0, start - halo), min(case.grid[0], stop + halo)
        inside, rows = slice(first, last), slice(first * stride, last * stride)
        mine = slice((start - first) * stride, (stop - first) * stride)
        seg = inputs.seg_logits.detach()[:, :, rows].double().requires_grad_(wants_grad)
        fields, total, owned = [], torch.zeros_like(counts[0]), torch.zeros_like(counts[0])
        for (cm, labels, transition), count in zip(streams, counts, strict=True):
            fields.append(cm.detach()[:, :, :, inside].double().requires_grad_(wants_grad))
            loss = coarse_kernels.annotation_nll(
                seg,
                fields[-1],
                labels[:, rows],
                None if transition is None else transition.double(),
                trace_weight=TRACE_WEIGHT,
                reduction="none",
                backend="reference",
            ).loss
            total = total + loss.sum() / count
            owned = owned + loss.detach()[:, mine].sum() / count
        names = tuple(leaves(inputs))
        gradients = torch.autograd.grad(total, (seg, *fields)) if wants_grad else ()
        cut = (mine, *(slice(start - first, stop - first) for _ in fields))
        pixels = slice(start * stride, stop * stride)
        yield Band(
            pixels,
            dict(zip(names, (pixels, *(slice(start, stop) for _ in fields)), strict=True)),
            owned,
            {name: grad[..., at, :] for name, grad, at in zip(names, gradients, cut, strict=False)},
        )


def errors_in_bands(
    contestant: Contestant, case: Case, inputs: AnyInputs, most_bytes: int = BAND_BYTES
) -> dict[str, float]:
    """What `errors` finds, without the truth of everything in memory at once."""
    own = first_run(contestant, inputs).double()
    device = own.device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    squares = {name: torch.zeros(2, dtype=torch.float64, device=device) for name in leaves(inputs)}
    for band in bands(case, inputs, most_bytes):
        loss += band.loss
        for name, true in band.gradients.items():
            grad = leaves(inputs)[name].grad
            if grad is None:
                squares[name] += math.nan
                continue
            difference = grad[..., band.grid[name], :].double() - true
            squares[name] += torch.stack((difference.square().sum(), true.square().sum()))
    found = {"loss": float((own - loss).abs() / loss.abs())}
    if inputs.seg_logits.requires_grad:
        found.update({f"grad_{name}": float((pair[0] / pair[1]).sqrt()) for name, pair in squares.items()})
    clear(inputs)
    return found


def verdict(case: Case, found: dict[str, float]) -> str | None:
    """Why it may not be timed, or None."""
    for name, error in found.items():
        bound = (LOSS_BOUND if name == "loss" else GRADIENT_BOUND)[case.dtype]
        if not error <= bound:  # NaN fails too
            return f"{name} is off by {error:.2g} (relative), allowed is {bound:.2g}"
    return None
