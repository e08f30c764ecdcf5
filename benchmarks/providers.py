"""Who computes a problem. To add one: a function here under `@_provider`, or a formulation of `baselines` in `_FORMULATIONS`.

    ours        backends of coarse_kernels: reference, cpu, triton, cuda; "cpu/recompute": under the other schedule
    published   as Zhang et al. (2020) wrote it
    autograd, by hand, torch   plain PyTorch: differentiated by autograd, with its gradient derived and written by hand, and
                what PyTorch has a function for. The fastest of the three is "best plain PyTorch"
    compiled    torch.compile of some of them (compile time is not counted)

A provider refuses a problem with a reason, which the table shows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import coarse_kernels
from coarse_kernels import backends
from coarse_kernels.schedule import SCHEDULES

from . import baselines
from .problem import Inputs, Problem

Thunk = Callable[[], Tensor]  # loss, posterior or label map
PLAIN = ("autograd", "by hand", "torch")  # groups


@dataclass(frozen=True)
class Provider:
    """``prepare``: what runs under the clock, from inputs; what it does itself is not timed. ``refuses``: why not, or None."""

    name: str
    group: str
    prepare: Callable[[Problem, Inputs], Thunk]
    refuses: Callable[[Problem, str], str | None]
    backend: str = ""  # of ours, and its schedule
    schedule: str | None = None


def providers(problem: Problem, device: str) -> list[Provider]:
    """All there are, ours first, whether or not they refuse ``problem``: then `Provider.refuses` says why."""
    own = [_ours(name, schedule) for name in backends.explain(device) for schedule in SCHEDULES]
    return [*own, *_PROVIDERS]


def choose(problem: Problem, device: str, wanted: Sequence[str]) -> tuple[list[Provider], dict[str, str]]:
    """Those that can run, and of the others that are named in ``wanted`` why not.

    wanted: names, groups, "compiled" (the usual ones), "recompute" (ours under that schedule), "eager" (all that is neither
        compiled nor recomputed nor the reference).
    """
    chosen, refused = [], {}
    for provider in providers(problem, device):
        if not any(_is(provider, word) for word in wanted):
            continue
        reason = provider.refuses(problem, device)
        if reason is None:
            chosen.append(provider)
        else:
            refused[provider.name] = reason
    known = {word for p in providers(problem, device) for word in (p.name, p.group)} | {"eager", "recompute"}
    for word in wanted:
        if word not in known:
            raise ValueError(f"provider: expected one of {sorted(known)}, got {word!r}")
    return chosen, refused


def _is(provider: Provider, word: str) -> bool:
    recomputes = provider.schedule == "recompute"
    if word == "eager":
        return provider.group != "compiled" and not recomputes and provider.backend != "reference"
    if word == "recompute":
        return recomputes and provider.backend != "reference"
    if word == "ours":
        return provider.group == "ours" and not recomputes and provider.backend != "reference"
    if word == "compiled":
        return provider.name in _USUALLY_COMPILED
    return word in (provider.name, provider.group)


# ---- ours ------------------------------------------------------------------------------------------------------------


def _ours(backend: str, schedule: str) -> Provider:
    def refuses(problem: Problem, device: str) -> str | None:
        if schedule != SCHEDULES[0] and not problem.wants_gradient:
            return "without gradients there is one schedule"
        return backends.explain(device)[backend]

    def prepare(problem: Problem, inputs: Inputs) -> Thunk:
        seg_logits, kinds, size = inputs
        if problem.mode == "map":
            return lambda: coarse_kernels.label_map(seg_logits, size, backend=backend)
        if problem.mode == "posterior":
            return lambda: coarse_kernels.annotation_posterior(seg_logits, kinds, backend=backend)
        return lambda: coarse_kernels.annotation_objective(seg_logits, kinds, backend=backend).loss

    name = backend if schedule == SCHEDULES[0] else f"{backend}/{schedule}"
    return Provider(name, "ours", prepare, refuses, backend, schedule)


def kernels(provider: Provider, inputs: Inputs) -> str:
    """Which of ours run, one for each kind of drawings: "strided, trusted"; "" for the others' and for a label map."""
    if not provider.backend or not inputs.kinds:
        return ""
    lines = coarse_kernels.explain(inputs.seg_logits, inputs.kinds, backend=provider.backend).splitlines()
    found = (line.partition("]: ")[2] for line in lines if line.lstrip().startswith("drawings["))
    return ", ".join(kernel.partition(":")[0] for kernel in found)


@contextlib.contextmanager
def setting(provider: Provider, threads: int) -> Iterator[None]:
    """Threads and schedule that it runs under."""
    before = torch.get_num_threads()
    if threads != before:
        torch.set_num_threads(threads)
    try:
        with coarse_kernels.use_schedule(provider.schedule):
            yield
    finally:
        if threads != before:
            torch.set_num_threads(before)


# ---- plain PyTorch ---------------------------------------------------------------------------------------------------

_PROVIDERS: list[Provider] = []
Loss = Callable[[Tensor, Sequence[baselines.OfKind]], Tensor]


def _provider(name: str, group: str, refuses: Callable[[Problem, str], str | None]) -> Callable[..., None]:
    def add(prepare: Callable[[Problem, Inputs], Thunk]) -> None:
        _PROVIDERS.append(Provider(name, group, prepare, refuses))

    return add


def _over_kinds(loss: Loss, mode: str | None = None) -> Callable[[Problem, Inputs], Thunk]:
    """``mode``: of torch.compile; None: eager."""

    def prepare(problem: Problem, inputs: Inputs) -> Thunk:
        kinds = [baselines.OfKind(k.cm_logits, k.labels, k.transition, k.trace_weight) for k in inputs.kinds]
        run = loss if mode is None else torch.compile(loss, fullgraph=True, dynamic=False, mode=mode)
        return lambda: run(inputs.seg_logits, kinds)

    return prepare


def _no_loss(problem: Problem) -> str | None:
    return f"it has no formulation for mode {problem.mode}" if problem.mode in ("map", "posterior") else None


def _layers_under_a_field(problem: Problem) -> str | None:
    layered = any(kind.has_field and kind.layers > 1 for kind in problem.kinds)
    return "it has no formulation for layers under a field" if layered else None


def _clamps(problem: Problem) -> str | None:
    return "it clamps probabilities, and is wrong at such logits" if problem.data == "extreme" else None


@dataclass(frozen=True)
class _For:
    """What a formulation of a kind with a field is for. matrix: one for all pixels; strided: something on a coarse grid, since
    it interpolates by matrix products; negative: a uniform transition; any: whatever there is, by logarithms."""

    matrix: bool = False
    strided: bool = False
    negative: bool = False
    any: bool = False

    def refuses(self, problem: Problem, device: str) -> str | None:
        if reason := _no_loss(problem) or _layers_under_a_field(problem):
            return reason
        if problem.fields == 0:
            return "no kind of drawings has a field"
        if self.any:
            return None
        one = problem.field_grid == (1, 1) != problem.size
        if one != self.matrix:
            return "there is one matrix for all pixels" if one else "there is a matrix for each pixel"
        if self.strided and problem.field_grid == problem.size and problem.seg_stride == 1:
            return "everything is on the pixel grid"
        if self.negative and not any(kind.has_field and kind.is_negative for kind in problem.kinds):
            return "no kind with a field has a transition"
        return _clamps(problem)


_MATMUL = baselines.interpolate_matmul
_ROWS, _UNIFORM = baselines.softmax_rows, functools.partial(baselines.closed_form, uniform=True)
_MATMUL_ROWS = functools.partial(baselines.softmax_rows, up=_MATMUL)
_MATMUL_CLOSED = functools.partial(baselines.closed_form, up=_MATMUL)
_MATMUL_ROWS_UNIFORM = functools.partial(baselines.softmax_rows_uniform, up=_MATMUL)
_FORMULATIONS: tuple[tuple[str, str, baselines.Formulation, _For], ...] = (
    ("log_space", "autograd", baselines.log_space, _For(any=True)),
    ("softmax_gather", "autograd", baselines.softmax_gather, _For()),
    ("softmax_rows", "autograd", _ROWS, _For()),
    ("closed_form", "by hand", baselines.closed_form, _For()),
    ("softmax_rows_matmul", "autograd", _MATMUL_ROWS, _For(strided=True)),
    ("closed_form_matmul", "by hand", _MATMUL_CLOSED, _For(strided=True)),
    ("softmax_rows_uniform", "autograd", baselines.softmax_rows_uniform, _For(negative=True)),
    ("closed_form_uniform", "by hand", _UNIFORM, _For(negative=True)),
    ("softmax_rows_uniform_matmul", "autograd", _MATMUL_ROWS_UNIFORM, _For(negative=True, strided=True)),
    (
        "closed_form_uniform_matmul",
        "by hand",
        functools.partial(_UNIFORM, up=_MATMUL),
        _For(negative=True, strided=True),
    ),
    ("matrix_product", "autograd", baselines.matrix_product, _For(matrix=True)),
)
_COMPILED = ("softmax_gather", "softmax_rows", "closed_form", "closed_form_uniform", "matrix_product")
_COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
_USUALLY_COMPILED = tuple(
    f"compiled:{name}" for name in ("softmax_rows", "closed_form_uniform", "matrix_product", "cross_entropy")
)


def _refuses_published(problem: Problem, device: str) -> str | None:
    return _no_loss(problem) or _layers_under_a_field(problem) or _clamps(problem)


def _refuses_alone(problem: Problem, device: str) -> str | None:
    return _no_loss(problem) or (None if problem.fields == 0 else "some kind of drawings has a field")


def _register() -> None:
    published = baselines.objective(baselines.published, baselines.trusted_published)
    _provider("published", "published", _refuses_published)(_over_kinds(published))
    _provider("trusted", "autograd", _refuses_alone)(_over_kinds(baselines.objective(baselines.softmax_gather)))
    for name, group, formulation, serves in _FORMULATIONS:
        loss = baselines.objective(formulation, up=_MATMUL if serves.strided else baselines.interpolate)
        _provider(name, group, serves.refuses)(_over_kinds(loss))
        for mode in _COMPILE_MODES if name in _COMPILED else ():
            ending = "" if mode == "default" else f":{mode}"
            _provider(f"compiled:{name}{ending}", "compiled", serves.refuses)(_over_kinds(loss, mode))


_register()


def _is_cross_entropy(problem: Problem, device: str) -> str | None:
    alone = [(kind.name, kind.layers) for kind in problem.kinds] == [("labels", 1)]
    return (
        None if alone and problem.mode not in ("map", "posterior") else "the problem is not cross-entropy of one layer"
    )


def _cross_entropy(up: baselines.Resize, compiled: bool = False) -> Callable[[Problem, Inputs], Thunk]:
    def loss(seg_logits: Tensor, targets: Tensor) -> Tensor:
        logits = up(seg_logits.float(), targets.shape[1:])
        return F.cross_entropy(logits, targets, ignore_index=baselines.IGNORE)

    def prepare(problem: Problem, inputs: Inputs) -> Thunk:
        targets = inputs.kinds[0].labels.long()  # nobody is timed converting them
        run = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
        return lambda: run(inputs.seg_logits, targets)

    return prepare


# F.interpolate and F.cross_entropy; the same with the interpolation as matrix products, whose backward is faster
_provider("cross_entropy", "torch", _is_cross_entropy)(_cross_entropy(baselines.interpolate))
_provider("cross_entropy_matmul", "torch", _is_cross_entropy)(_cross_entropy(baselines.interpolate_matmul))
_provider("compiled:cross_entropy", "compiled", _is_cross_entropy)(_cross_entropy(baselines.interpolate, compiled=True))


@_provider("argmax", "torch", lambda problem, device: None if problem.mode == "map" else "the problem is no label map")
def _argmax(problem: Problem, inputs: Inputs) -> Thunk:
    """F.interpolate and argmax."""
    return lambda: baselines.interpolate(inputs.seg_logits.float(), torch.Size(inputs.size)).argmax(1)


def _is_posterior(problem: Problem, device: str) -> str | None:
    if problem.mode != "posterior":
        return "the problem is no posterior"
    return "it has no formulation for layers" if any(kind.layers > 1 for kind in problem.kinds) else None


@_provider("posterior", "torch", _is_posterior)
def _posterior(problem: Problem, inputs: Inputs) -> Thunk:
    """p times each kind's q, normalised."""

    def run() -> Tensor:
        r = baselines.interpolate(inputs.seg_logits.float(), torch.Size(inputs.size)).softmax(1)
        for kind in inputs.kinds:
            r = r * baselines.likelihoods(kind.cm_logits, kind.labels, kind.transition, problem.classes)
        return (r / r.sum(1, keepdim=True)).to(problem.storage)

    return run
