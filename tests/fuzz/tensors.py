"""The tensors of a case, and what a backend makes of them."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import coarse_kernels as ck
from tests.contract import FLOAT16_LOSS_SCALE

from .case import Case

Array = np.ndarray[Any, np.dtype[Any]]
STORAGE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Logits are multiples of this, and shifts of 1/4: adding one is exact in float32.
_STEP = 1 / 64


@dataclass
class Kind:
    """Labels have an axis of layers. ``of``: the number of the kind whose matrices and transition these are: a relation may
    use them twice."""

    labels: Tensor
    cm: Tensor | None
    transition: Tensor | None
    learned: bool
    weight: float
    trace_weight: float
    class_weight: Tensor | None
    pixel_weight: Tensor | None
    normalizer: float | None
    of: int


@dataclass
class Tensors:
    seg: Tensor
    kinds: list[Kind]
    ignore_index: int
    reduction: str
    schedule: str


@dataclass
class Found:
    """Losses by name ("loss", "nll0", ...) and gradients ("seg", "cm0", "transition0"), in float64."""

    losses: dict[str, Array] = field(default_factory=dict)
    gradients: dict[str, Array] = field(default_factory=dict)


def numbers(tensor: Tensor, dtype: Any = np.float64) -> Array:
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.numpy().astype(dtype)


def tensors_of(case: Case) -> tuple[Tensors, float | Array]:
    """And what the loss is multiplied with before backward: a map with reduction none."""
    rng = np.random.Generator(np.random.SFC64(case.seed))
    dtype, classes, batch = STORAGE[case.dtype], case.classes, case.batch

    def logits(stored: torch.dtype, *shape: int) -> Tensor:
        values = rng.standard_normal(shape, np.float32) * np.float32(case.scale)
        values = np.round(values / _STEP) * np.float32(_STEP) if case.scale >= 0.5 else values
        if case.holes:
            holes = rng.random(shape) < 0.08
            holes[:, 0] = False  # a column of -inf alone is no distribution
            values = np.where(holes, np.float32(-math.inf), values)
        return torch.from_numpy(values).to(stored)

    seg = logits(dtype, batch, classes, *case.seg)
    kinds = []
    drawn = np.zeros((batch, *case.size), bool)
    wide = torch.float64 in (dtype, STORAGE[case.cm_dtype or case.dtype])
    for number, kind in enumerate(case.kinds):
        labels = rng.integers(0, classes, (batch, kind.layers, *case.size))
        here = rng.random(labels.shape) < case.drawn
        here.reshape(batch, -1)[:, : here[0].size // 4] &= case.drawn == 1  # in runs, as drawings are
        here &= labels != case.ignore
        drawn |= here.any(1)
        labels[~here] = case.ignore
        cm = None
        if kind.grid is not None:
            stored = STORAGE[case.cm_dtype or case.dtype]
            cm = logits(stored, 1 if kind.shared else batch, classes, classes, *kind.grid)
            if case.junk and kind.grid == case.size and not kind.shared:
                nowhere = torch.from_numpy(~here.any(1))[:, None, None].expand_as(cm)
                cm = cm.masked_fill(nowhere, math.nan)
        kinds.append(
            Kind(
                torch.from_numpy(labels).to(getattr(torch, case.labels)),
                cm,
                _transition(kind.stream, classes, rng, torch.float64 if wide else torch.float32),
                kind.stream == "random",
                kind.weight,
                kind.trace,
                torch.from_numpy(rng.random(classes, np.float32) * rng.integers(0, 3, classes)).float()
                if kind.classes
                else None,
                torch.from_numpy(rng.random(labels.shape, np.float32) * (rng.random(labels.shape) < 0.8)).float()
                if kind.pixels
                else None,
                case.normalizer or None,
                number,
            )
        )
    if case.junk and case.seg == case.size:
        seg = seg.masked_fill(torch.from_numpy(~drawn)[:, None], math.nan)
    incoming: float | Array = (1.0, -2.5)[case.seed % 2] if case.seed % 17 else 0.0
    half = torch.float16 in (dtype, STORAGE[case.cm_dtype or case.dtype])
    if case.reduction == "none":
        incoming = rng.standard_normal((batch, *case.size), np.float32).astype(np.float64)
        if case.seed % 3 == 0:  # that of one region less another: in sum often exactly 0
            incoming = np.sign(np.trunc(2 * incoming))
    if half and case.reduction == "mean":
        incoming = incoming * FLOAT16_LOSS_SCALE
    return Tensors(seg, kinds, case.ignore, case.reduction, case.schedule), incoming


def _transition(stream: str, classes: int, rng: np.random.Generator, dtype: torch.dtype) -> Tensor | None:
    if stream == "positive":
        return None
    if stream == "uniform":
        return ck.uniform_transition(classes, dtype=dtype)
    if stream == "partial":
        matrix = np.full((classes, classes), 1 / (classes - 1), np.float32)
        matrix[:, 0] = 0
    else:
        matrix = rng.random((classes, classes), np.float32) + np.float32(0.05)
        np.fill_diagonal(matrix, 0)
        matrix /= matrix.sum(1, keepdims=True)
    return torch.from_numpy(matrix).to(dtype)


def moved(tensors: Tensors, by: float, seed: int) -> Tensors:
    """All logits and learned transitions in float64, each moved at random by at most so much of its size."""
    rng = np.random.default_rng(seed)

    def move(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.double() * torch.from_numpy(1 + by * rng.uniform(-1, 1, tuple(tensor.shape)))

    kinds = [
        replace(kind, cm=move(kind.cm), transition=move(kind.transition) if kind.learned else kind.transition)
        for kind in tensors.kinds
    ]
    seg = move(tensors.seg)
    assert seg is not None
    return replace(tensors, seg=seg, kinds=kinds)


# --- evaluated -------------------------------------------------------------------------------------------------------------


def leaf(tensor: Tensor, wanted: bool = True) -> Tensor:
    return tensor.detach().requires_grad_(wanted)


@dataclass
class Leaves:
    seg: Tensor
    drawings: list[ck.Drawings]
    named: dict[str, Tensor]


def leaves_of(tensors: Tensors) -> Leaves:
    named: dict[str, Tensor] = {"seg": leaf(tensors.seg)}
    drawings = []
    for kind in tensors.kinds:
        cm, transition = kind.cm, kind.transition
        if cm is not None:
            cm = named.setdefault(f"cm{kind.of}", leaf(cm))
        if transition is not None and kind.learned:
            transition = named.setdefault(f"transition{kind.of}", leaf(transition))
        drawings.append(
            ck.Drawings(
                kind.labels,
                cm,
                transition,
                weight=kind.weight,
                trace_weight=kind.trace_weight,
                class_weight=kind.class_weight,
                pixel_weight=kind.pixel_weight,
                normalizer=kind.normalizer,
            )
        )
    return Leaves(named["seg"], drawings, named)


def run(tensors: Tensors, backend: str, incoming: float | Array, *, by_parts: bool = False) -> Found:
    """Forward and backward. by_parts: through the losses of the parts instead of through their sum."""
    leaves = leaves_of(tensors)
    with ck.use_schedule(tensors.schedule):
        out = ck.annotation_objective(
            leaves.seg, leaves.drawings, ignore_index=tensors.ignore_index, reduction=tensors.reduction, backend=backend
        )
        loss = out.loss
        if by_parts:
            # a weight of 0 counts for nothing, even where the loss is inf
            terms = [
                kind.weight * part.loss for kind, part in zip(tensors.kinds, out.parts, strict=True) if kind.weight
            ]
            terms = [term.sum(1) if tensors.reduction == "none" else term for term in terms]
            loss = sum(terms, 0.0 * out.loss if not terms else 0.0)  # type: ignore[arg-type]
        loss.backward(torch.as_tensor(incoming).to(loss).expand_as(loss))
    found = Found({"loss": numbers(out.loss)})
    for number, part in enumerate(out.parts):
        for name in ("loss", "nll", "trace", "count"):
            found.losses[f"{name}{number}"] = numbers(getattr(part, name))
    for name, tensor in leaves.named.items():
        if tensor.grad is None:
            found.gradients[name] = np.zeros(tuple(tensor.shape))
        else:
            assert tensor.grad.dtype == tensor.dtype, f"gradient of {name}: {tensor.grad.dtype}"
            found.gradients[name] = numbers(tensor.grad)
    return found


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that an element nobody writes is seen; one thread, since images are small; and no warning that
    matrices drawn at random have no diagonal."""
    deterministic = torch.utils.deterministic
    before, threads = deterministic.fill_uninitialized_memory, torch.get_num_threads()  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
