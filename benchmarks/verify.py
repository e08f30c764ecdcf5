"""Right or wrong: every provider is held to the float64 reference, on the very inputs that are measured where that fits.

The truth is added up in bands of rows, so that no field in float64 is ever whole in memory but the gradient's.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import coarse_kernels

from .problem import IGNORE, Inputs, Problem
from .providers import Provider, Thunk, setting

# Relative error of the loss, and in 2-norm of each gradient, on the same (rounded) inputs.
# float32: plain PyTorch and the kernels are within 5e-7, and 2e-6 with a transition; a wrong term or a dropped pixel shows at
#   1e-3. 16 bits: the mathematics is float32, but a stored gradient has 8 bits of bfloat16,
#   2**-9 at worst, or 11 of float16.
LOSS_BOUND = {"fp32": 2e-6, "bf16": 2e-5, "fp16": 2e-5, "fp64": 1e-12}
GRADIENT_BOUND = {"fp32": 5e-6, "bf16": 8e-3, "fp16": 1e-3, "fp64": 1e-10}
# float16 trains with a scaled loss (torch.amp.GradScaler begins here): of a mean over an image most of the gradient is below
# what float16 has digits for, whoever computes it.
LOSS_SCALE = {"fp16": 65536.0}
# Where a pixel is sure and a negative drawing agrees, its gradient p - r is a difference of two numbers near 1, and nobody has
# more than five digits of what is left: twice the error of the reference in the same dtype is allowed, up to this one.
MOST_USUAL = 1e-4
POSTERIOR_BOUND = {"fp32": 1e-5, "bf16": 8e-3, "fp16": 2e-3, "fp64": 1e-10}  # absolute
ARGMAX_BOUND = 2e-5  # how far below the largest logit, of its size, the one of the chosen class may be
BAND_BYTES = 256 << 20  # of one float64 field in a band; the reference holds about a dozen of them at a time
# C x C x pixels above which a CPU takes too long: then a smaller image of the kind is verified, and of the image itself the
# gradients in two bands
CPU_VALUES = 64 << 20
SMALL = (64, 128)


class Unavailable(RuntimeError):
    """This provider cannot run on this machine; the others can."""


class DoesNotFit(RuntimeError):
    """This provider ran out of memory."""


def lacks_memory(error: Exception) -> bool:
    """Also as PyTorch's allocator and the pool say it on a CPU."""
    words = ("allocate memory", "out of memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(word in str(error) for word in words)


class Call:
    """One provider on one problem: `before` and `after` are outside the clock, `run` is under it."""

    def __init__(self, problem: Problem, provider: Provider, inputs: Inputs):
        self.problem, self.provider, self.inputs = problem, provider, inputs
        self.name = f"{problem} | {provider.name}"
        self.loss_scale = LOSS_SCALE.get(problem.dtype, 1.0)
        self._thunk: Thunk | None = None
        self._held: Tensor | None = None

    def before(self) -> None:
        self.after()
        if self._thunk is None:
            self._thunk = self.provider.prepare(self.problem, self.inputs)
        if self.problem.mode == "b":
            self._held = self._thunk()

    def run(self) -> None:
        assert self._thunk is not None
        mode = self.problem.mode
        if mode == "b":
            assert self._held is not None
            self._backward(self._held)
        elif mode in ("fb", "f"):
            self._held = self._thunk()
            if mode == "fb":
                self._backward(self._held)
        else:
            with torch.no_grad():
                self._held = self._thunk()

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale == 1.0 else loss * self.loss_scale).backward()

    def after(self) -> None:
        self._held = None
        for leaf in self.inputs.leaves.values():
            leaf.grad = None

    def result(self) -> Tensor:
        """The loss, posterior or label map; gradients are left in the inputs. Also the warm-up."""
        try:
            with setting(self.provider, self.problem.threads):
                self.before()
                self.run()
            assert self._held is not None
            return self._held.detach()
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            if not lacks_memory(error):
                if self.provider.group == "compiled":  # no C++ compiler, or a graph that inductor cannot take
                    raise Unavailable(f"{type(error).__name__}: {lines[0]}") from error
                raise
            reason = lines[0]
        # Raised out here, where the first error and with it every tensor of the frames that it left are gone.
        self.after()
        raise DoesNotFit(reason)


class Truth(NamedTuple):
    """In float64. loss: 0-d, or the posterior; gradients: by the names of `Inputs.leaves`."""

    loss: Tensor
    gradients: dict[str, Tensor]


def verified_problem(problem: Problem, device: str) -> Problem:
    """The problem itself, or where float64 would take a CPU minutes a smaller image of the same kind."""
    width = problem.classes**2 if problem.fields else problem.classes
    if device != "cpu" or problem.mode == "map" or width * problem.pixels <= CPU_VALUES:
        return problem
    return problem.scaled_down(*SMALL)


def find_truth(problem: Problem, inputs: Inputs, most_bytes: int = BAND_BYTES) -> Truth:
    if problem.mode == "map":
        return Truth(torch.zeros(()), {})
    device = inputs.seg_logits.device
    if problem.mode == "posterior":
        bands = [
            coarse_kernels.annotation_posterior(band.seg_logits, band.kinds, backend="reference")[:, :, band.inside]
            for band in _bands(problem, inputs, most_bytes)
        ]
        return Truth(torch.cat(bands, 2), {})
    wanted = inputs.leaves if problem.mode in ("fb", "b") else {}
    loss = torch.zeros((), dtype=torch.float64, device=device)
    gradients = {name: torch.zeros_like(leaf, dtype=torch.float64) for name, leaf in wanted.items()}
    for band in _bands(problem, inputs, most_bytes):
        leaves = [band.seg_logits, *(k.cm_logits for k in band.kinds if k.cm_logits is not None)]
        part = coarse_kernels.annotation_objective(band.seg_logits, band.kinds, backend="reference").loss
        loss += part.detach()
        if wanted:
            found = torch.autograd.grad(part, leaves)
            for whole, rows, own in zip(gradients.values(), band.rows, found, strict=True):
                whole[..., rows, :] += own
    return Truth(loss, gradients)


@dataclass
class _Band:
    """Rows of the image in float64. Labels of all but its own rows are gone, so that bands add up."""

    seg_logits: Tensor
    kinds: tuple[coarse_kernels.Drawings, ...]
    rows: list[slice]  # of each leaf, that the band took
    inside: slice  # its own rows, of those that it took
    start: int  # its own rows, of the image
    stop: int
    taken: int  # rows of the image


def _cuts(problem: Problem, inputs: Inputs, most_bytes: int) -> tuple[int, int]:
    """Rows of pixels of a band, and of its halo."""
    grids = [leaf.shape[-2] for leaf in inputs.leaves.values()]
    strides = [problem.height // rows for rows in grids if rows > 1]
    step = math.lcm(*strides) if strides else 1
    width = problem.classes**2 if problem.fields else problem.classes
    # on a grid at least three of its rows, so that one is the band's alone
    own = max(3 if step > 1 else 1, most_bytes // (8 * width * problem.images * problem.width * step)) * step
    if any(rows > 1 and rows * stride != problem.height for rows, stride in zip(grids, strides, strict=False)):
        own = problem.height  # rows of such a grid lie at no whole number of pixels
    return own, step if step > 1 else 0


def _band_starts(problem: Problem, inputs: Inputs, most_bytes: int) -> range:
    return range(0, problem.height, _cuts(problem, inputs, most_bytes)[0])


def _bands(problem: Problem, inputs: Inputs, most_bytes: int, starts: Sequence[int] | None = None) -> Iterator[_Band]:
    """All bands, or those that begin at ``starts``."""
    own, halo = _cuts(problem, inputs, most_bytes)
    counts = [(kind.labels != IGNORE).sum(dtype=torch.float64) for kind in inputs.kinds]
    for start in _band_starts(problem, inputs, most_bytes) if starts is None else starts:
        stop = min(start + own, problem.height)
        first, last = max(0, start - halo), min(problem.height, stop + halo)
        rows: list[slice] = []

        def cut(leaf: Tensor, rows: list[slice] = rows, first: int = first, last: int = last) -> Tensor:
            grid = leaf.shape[-2]
            stride = problem.height // grid if grid > 1 else 0
            whole = (
                slice(None) if not stride or last - first == problem.height else slice(first // stride, last // stride)
            )
            rows.append(whole)
            return leaf.detach()[..., whole, :].double().requires_grad_()

        seg_logits = cut(inputs.seg_logits)
        kinds = []
        for kind, count in zip(inputs.kinds, counts, strict=True):
            labels = kind.labels[..., first:last, :].clone()
            labels[..., : start - first, :] = IGNORE
            labels[..., stop - first :, :] = IGNORE
            kinds.append(
                dataclasses.replace(
                    kind,
                    labels=labels,
                    cm_logits=None if kind.cm_logits is None else cut(kind.cm_logits),
                    transition=None if kind.transition is None else kind.transition.double(),
                    normalizer=count,
                )
            )
        yield _Band(seg_logits, tuple(kinds), rows, slice(start - first, stop - first), start, stop, last - first)


class Part(NamedTuple):
    """Rows of a leaf, and its gradient there in float64."""

    rows: slice
    gradient: Tensor


def sample_truth(problem: Problem, inputs: Inputs, most_bytes: int = BAND_BYTES) -> list[dict[str, Part]]:
    """Gradients in two bands, one of them the last: of those rows of each leaf to which no other band adds."""
    if problem.mode not in ("fb", "b"):
        return []
    starts = list(_band_starts(problem, inputs, most_bytes))
    found = []
    for band in _bands(problem, inputs, most_bytes, sorted({starts[len(starts) // 2], starts[-1]})):
        leaves = [band.seg_logits, *(k.cm_logits for k in band.kinds if k.cm_logits is not None)]
        loss = coarse_kernels.annotation_objective(band.seg_logits, band.kinds, backend="reference").loss
        parts = {}
        gradients = torch.autograd.grad(loss, leaves)
        for (name, leaf), rows, gradient in zip(inputs.leaves.items(), band.rows, gradients, strict=True):
            grid = leaf.shape[-2]
            if grid == 1 or rows == slice(None):  # all bands add to it
                continue
            # the first and the last row that the band's own pixels reach are the neighbours' as well
            edge = 0 if grid == problem.height else 1
            stride = problem.height // grid
            first = band.start // stride + (edge if band.start > 0 else 0)
            last = grid if band.stop == problem.height else band.stop // stride - edge
            if last > first:
                parts[name] = Part(slice(first, last), gradient[..., first - rows.start : last - rows.start, :])
        found.append(parts)
    return found


def errors_in_sample(call: Call, sample: list[dict[str, Part]]) -> dict[str, float]:
    """The largest relative error of each gradient over the sampled bands, at full size."""
    call.result()
    found: dict[str, float] = {}
    for parts in sample:
        for name, part in parts.items():
            own = call.inputs.leaves[name].grad
            error = math.nan if own is None else _distance(own[..., part.rows, :], part.gradient, call.loss_scale)
            found[name] = error if math.isnan(error) else max(error, found.get(name, 0.0))
    call.after()
    return found


def errors(call: Call, truth: Truth) -> dict[str, float]:
    """Relative errors, absolute ones of a posterior; of a label map how much too small the logit of the chosen class is."""
    problem, inputs = call.problem, call.inputs
    result = call.result()
    if problem.mode == "map":
        found = {"label map": _gap(problem, inputs, result)}
    elif problem.mode == "posterior":
        found = {"posterior": float((result.double() - truth.loss).abs().max())}
    else:
        found = {"loss": float((result.double() - truth.loss).abs() / truth.loss.abs())}
        for name, true in truth.gradients.items():
            own = inputs.leaves[name].grad
            found[name] = math.nan if own is None else _distance(own, true, call.loss_scale)
    call.after()
    return found


def _distance(own: Tensor, true: Tensor, scale: float) -> float:
    """Of own / scale, in 2-norm, relative; an image at a time, since the difference in float64 takes as much as the truth."""
    squares = torch.zeros(2, dtype=torch.float64, device=true.device)
    for a, b in zip(own, true, strict=True):
        for one, other in zip(a, b, strict=True):
            squares += torch.stack(((one.double() / scale - other).square().sum(), other.square().sum()))
    return float((squares[0] / squares[1]).sqrt())


def _gap(problem: Problem, inputs: Inputs, chosen: Tensor) -> float:
    """Of the logit of the chosen class below the largest, over the largest of its band."""
    gaps = []
    for band in _bands(problem, inputs, BAND_BYTES):
        values = F.interpolate(
            band.seg_logits.detach(), (band.taken, problem.width), mode="bilinear", align_corners=False
        )
        values, own = values[:, :, band.inside], chosen[:, band.start : band.stop, :].long()[:, None]
        gaps.append(((values.amax(1) - values.gather(1, own)[:, 0]) / values.abs().amax()).max())
    return float(torch.stack(gaps).max())


def complaint(problem: Problem, found: dict[str, float], usual: dict[str, float] | None = None) -> str | None:
    """Why it may not be measured, or None. ``usual``: the errors of the reference backend in the problem's own dtype."""
    for name, error in found.items():
        bounds = {"loss": LOSS_BOUND, "posterior": POSTERIOR_BOUND}.get(name, GRADIENT_BOUND)
        bound = ARGMAX_BOUND if name == "label map" else bounds[problem.dtype]
        if usual is not None and name in usual:
            bound = max(bound, 2 * min(usual[name], MOST_USUAL))
        if not error <= bound:  # NaN fails too
            kind = "absolute" if name == "posterior" else "relative"
            return f"{name} is off by {error:.2g} ({kind}), allowed is {bound:.2g}"
    return None


def bits(call: Call) -> list[Tensor]:
    """Result and gradients, to be compared bit for bit."""
    result = call.result().clone()
    found = [result, *(leaf.grad.clone() for leaf in call.inputs.leaves.values() if leaf.grad is not None)]
    call.after()
    return found
