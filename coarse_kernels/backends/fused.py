"""A `Backend` whose work is done by the operators of a namespace."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import native, schedule, wrapped
from ..problem import Drawings, Problem
from . import autograd
from .operator import MAX_KINDS, ONLY_REFERENCE, Arguments, Outputs, differentiable
from .reference import Terms, label_weights


class FusedBackend(abc.ABC):
    """A `Backend` whose work is done by the operators of ``torch.ops.<namespace>``."""

    most_classes: int | None = None  # of a kind with a matrix; trusted ones may have any number

    def __init__(self, name: str, device_types: tuple[str, ...], namespace: str):
        self.name, self.device_types, self.namespace = name, device_types, namespace

    def unavailable(self) -> str | None:
        return native.operators_reason()

    def unsupported(self, problem: Problem) -> str | None:
        if len(problem.drawings) > MAX_KINDS:
            return f"it serves up to {MAX_KINDS} kinds of drawings, got {len(problem.drawings)}"
        trusted = all(drawings.cm_logits is None for drawings in problem.drawings)
        if self.most_classes is not None and problem.num_classes > self.most_classes and not trusted:
            return f"it serves up to {self.most_classes} classes, got {problem.num_classes}"
        fields = (t for d in problem.drawings for t in (d.cm_logits, d.transition))
        return _untransformed((problem.seg_logits, *fields))

    def unsupported_tensor(self, tensor: Tensor) -> str | None:
        return _untransformed((tensor,))

    @abc.abstractmethod
    def kernels(self, problem: Problem) -> list[str]:
        """Which kernel each kind of drawings gets, and why not a faster one."""

    def _chosen(self, problem: Problem) -> list[list[int]]:
        """What the compiled operator `kernels_of` says, for all gradients that may be wanted."""
        call = self._call(problem)
        wanted = sum(bit for bit, t in differentiable(call) if t.requires_grad)
        with torch.no_grad():
            return self._operators().kernels_of(*call[:4], wanted).tolist()

    def nll_sums(self, problem: Problem, scales: Sequence[Tensor | None]) -> tuple[Tensor, tuple[Terms, ...]]:
        out = self._run(problem, scales, per_pixel=False)
        return out.loss, _terms(out)

    def nll_maps(self, problem: Problem) -> tuple[Terms, ...]:
        return _terms(self._run(problem, [None] * len(problem.drawings), per_pixel=True))

    def posterior(self, problem: Problem) -> Tensor:
        call = self._call(problem)
        posterior = self._operators().objective_posterior(*call[:4], problem.ignore_index)
        return posterior.to(problem.seg_logits.dtype)

    def labelled_weight(self, problem: Problem, drawings: Drawings) -> Tensor:
        if problem.reduction == "none":
            return label_weights(problem, drawings)
        dtype = problem.compute_dtype
        weights = (None if w is None else w.detach().to(dtype) for w in (drawings.class_weight, drawings.pixel_weight))
        weight = self._operators().labelled_weight(drawings.labels, *weights, problem.num_classes, problem.ignore_index)
        return weight.to(dtype)

    def label_map(self, seg_logits: Tensor, size: tuple[int, ...]) -> Tensor:
        return self._operators().label_map(seg_logits, size)

    def _call(self, problem: Problem) -> Arguments:
        return _arguments(problem, [None] * len(problem.drawings))

    def _operators(self) -> Any:
        return getattr(torch.ops, self.namespace)

    def _run(self, problem: Problem, scales: Sequence[Tensor | None], *, per_pixel: bool) -> Outputs:
        call = _arguments(problem, scales)._replace(per_pixel=per_pixel)
        if torch.compiler.is_compiling():
            return Outputs(*self._operators().annotation_objective(*call))
        needed = {bit: t for bit, t in differentiable(call) if t.requires_grad} if torch.is_grad_enabled() else {}
        half = any(t.dtype == torch.float16 for t in needed.values())
        if schedule.current() == "one_pass" and not per_pixel and not half:
            call = call._replace(wanted=sum(needed))
        return autograd.run(self._operators(), call, needed)


def _untransformed(tensors: Sequence[Tensor | None]) -> str | None:
    transform = wrapped.transformed(tensors)
    return None if transform is None else ONLY_REFERENCE.format(transform)


def _terms(out: Outputs) -> tuple[Terms, ...]:
    return tuple(zip(out.losses, out.nll, out.trace, strict=True))  # no generator: torch 2.14 cannot trace `yield from`


def _arguments(problem: Problem, scales: Sequence[Tensor | None]) -> Arguments:
    """Of the operator, with constants in the compute dtype and nothing wanted."""
    dtype, drawings = problem.compute_dtype, problem.drawings
    absent = problem.seg_logits.new_empty(0, dtype=dtype)

    def each(tensors: Sequence[Tensor | None], *, constant: bool = False) -> list[Tensor]:
        return [absent if t is None else (t.detach() if constant else t).to(dtype) for t in tensors]

    def logits(t: Tensor) -> Tensor:  # only float64 with float64: nobody needs the mixtures to be fast
        return t.to(dtype) if dtype == torch.float64 else t

    return Arguments(
        seg_logits=logits(problem.seg_logits),
        labels=[d.labels for d in drawings],
        cm_logits=[absent if d.cm_logits is None else logits(d.cm_logits) for d in drawings],
        transition=each([d.transition for d in drawings]),
        class_weight=each([d.class_weight for d in drawings], constant=True),
        pixel_weight=each([d.pixel_weight for d in drawings], constant=True),
        scale=each(scales),
        weight=[d.weight for d in drawings],
        trace_weight=[d.trace_weight for d in drawings],
        ignore_index=problem.ignore_index,
        per_pixel=False,
        wanted=0,
    )
