"""Other ways of saying the same problem, with the answer said as the first one would have it: each has to be as near to float64
as the problem itself. `python -m tests.fuzz` draws one for each case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import coarse_kernels as ck

from .case import Case
from .oracle import Truth
from .tensors import Array, Found, Kind, Tensors, leaves_of, numbers, run

Incoming = float | Array
Relation = Callable[[Case, Tensors, Incoming, Truth, str], Found]


def same(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """As it is."""
    return run(tensors, backend, incoming)


def parts(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """A backward through the losses of the kinds instead of through their sum."""
    return run(tensors, backend, incoming, by_parts=True)


def permuted(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """Classes in another order, but for one that is the number of no label."""
    generator = np.random.default_rng(case.seed)
    order = generator.permutation(case.classes)
    if 0 <= case.ignore < case.classes:
        at = int(np.flatnonzero(order == case.ignore)[0])
        order[at], order[case.ignore] = order[case.ignore], case.ignore
    index = torch.from_numpy(order)
    back = np.argsort(order)
    renamed = torch.from_numpy(back)

    def of(kind: Kind) -> Kind:
        known = kind.labels != case.ignore
        known_labels = torch.where(known, kind.labels, 0).long()
        labels = torch.where(known, renamed[known_labels], kind.labels.long()).to(kind.labels.dtype)
        return replace(
            kind,
            labels=labels,
            cm=None if kind.cm is None else kind.cm[:, index][:, :, index].contiguous(),
            transition=None if kind.transition is None else kind.transition[index][:, index].contiguous(),
            class_weight=None if kind.class_weight is None else kind.class_weight[index],
        )

    other = replace(tensors, seg=tensors.seg[:, index].contiguous(), kinds=[of(kind) for kind in tensors.kinds])
    found = run(other, backend, incoming)
    for name, gradient in found.gradients.items():
        if name == "seg":
            found.gradients[name] = gradient[:, back]
        elif name.startswith("cm"):
            found.gradients[name] = gradient[:, back][:, :, back]
        else:
            found.gradients[name] = gradient[back][:, back]
    return found


def split(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """One image after the other, divided by the labels of all."""
    mean = case.reduction == "mean"
    total = Found()
    for image in range(case.batch):
        part = slice(image, image + 1)

        def of(kind: Kind, count: float, part: slice = part) -> Kind:
            return replace(
                kind,
                labels=kind.labels[part],
                cm=kind.cm if kind.cm is None or len(kind.cm) == 1 else kind.cm[part],
                pixel_weight=None if kind.pixel_weight is None else kind.pixel_weight[part],
                normalizer=(kind.normalizer or count or 1.0) if mean else None,
            )

        kinds = [of(kind, count) for kind, count in zip(tensors.kinds, truth.counts, strict=True)]
        own = incoming if isinstance(incoming, float) else incoming[part]
        found = run(replace(tensors, seg=tensors.seg[part], kinds=kinds), backend, own)
        whole = tensors.reduction != "none"
        for name, value in found.losses.items():
            total.losses[name] = value + total.losses.get(name, 0.0) if whole else _joined(total.losses, name, value)
        for name, value in found.gradients.items():
            number = name.removeprefix("cm")
            shared = name.startswith("transition") or (number.isdigit() and len(tensors.kinds[int(number)].cm) == 1)  # type: ignore[arg-type]
            before = total.gradients
            before[name] = value + before.get(name, 0.0) if shared else _joined(before, name, value)
    return total


def _joined(before: dict[str, Array], name: str, value: Array) -> Array:
    return np.concatenate([before[name], value]) if name in before else value


def shifted(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """The same number added to all class logits of a point, and to all logits of a column of a matrix: of none is the softmax
    another. Only where the sum is exact."""
    if case.dtype not in ("fp32", "fp64") or case.cm_dtype in ("bf16", "fp16") or not 0.5 <= case.scale <= 100:
        return run(tensors, backend, incoming)
    generator = np.random.default_rng(case.seed)

    def moved(logits: Tensor) -> Tensor:
        shape = (len(logits), 1, *logits.shape[2:])
        return logits + torch.from_numpy(generator.integers(-40, 41, shape) / 4).to(logits)

    kinds = [replace(kind, cm=None if kind.cm is None else moved(kind.cm)) for kind in tensors.kinds]
    return run(replace(tensors, seg=moved(tensors.seg), kinds=kinds), backend, incoming)


def identity(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """T = I written out; and where nothing else is drawn than trusted positives, F.cross_entropy after F.interpolate."""
    _hold_cross_entropy(case, tensors, truth)
    wide = torch.float64 in (tensors.seg.dtype, *(kind.cm.dtype for kind in tensors.kinds if kind.cm is not None))
    eye = torch.eye(case.classes, dtype=torch.float64 if wide else torch.float32)
    kinds = [replace(kind, transition=eye if kind.transition is None else kind.transition) for kind in tensors.kinds]
    return run(replace(tensors, kinds=kinds), backend, incoming)


def _hold_cross_entropy(case: Case, tensors: Tensors, truth: Truth) -> None:
    if case.holes or case.junk or case.reduction != "sum":
        return
    seg = tensors.seg.double()
    if tuple(seg.shape[2:]) != case.size:
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(case.size)]
        seg = F.interpolate(seg, case.size, mode=mode)
    for number, kind in enumerate(tensors.kinds):
        if kind.cm is not None or kind.transition is not None or kind.pixel_weight is not None:
            continue
        weight = None if kind.class_weight is None else kind.class_weight.double()
        layers = kind.labels.long().unbind(1)
        theirs = sum(
            float(F.cross_entropy(seg, own, weight, ignore_index=case.ignore, reduction="sum")) for own in layers
        )
        ours = float(truth.losses[f"loss{number}"])
        assert abs(ours - theirs) <= 1e-12 * max(1.0, abs(theirs)) * max(1.0, case.scale), (ours, theirs)


def expanded(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """Fields, and class logits, of one point as fields of that value at every pixel, and of every image."""

    def wide(logits: Tensor, batch: int) -> Tensor:
        if any(points != 1 for points in logits.shape[-len(case.size) :]):
            return logits
        shape = (batch, *logits.shape[1 : -len(case.size)], *case.size)
        values = logits.expand(shape)
        return values if case.seed % 2 else values.contiguous()

    kinds = [replace(kind, cm=None if kind.cm is None else wide(kind.cm, case.batch)) for kind in tensors.kinds]
    found = run(replace(tensors, seg=wide(tensors.seg, case.batch), kinds=kinds), backend, incoming)
    for name, gradient in found.gradients.items():
        wanted = truth.gradients[name].shape
        axes = tuple(axis for axis, (own, want) in enumerate(zip(gradient.shape, wanted, strict=True)) if own != want)
        found.gradients[name] = gradient.sum(axes, keepdims=True)
    return found


def halved(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """Each kind as two of half its weight."""
    kinds = [replace(kind, weight=kind.weight / 2) for kind in tensors.kinds for _ in range(2)]
    found = run(replace(tensors, kinds=kinds), backend, incoming)
    first = {name: found.losses[f"{name[:-1]}{2 * int(name[-1])}"] for name in truth.losses if name != "loss"}
    return Found(first | {"loss": found.losses["loss"]}, found.gradients)


def layers(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """Each layer as a kind of its own."""
    mean = case.reduction == "mean"
    kinds, owners = [], []
    for number, kind in enumerate(tensors.kinds):
        for layer in range(kind.labels.shape[1]):
            own = None if kind.pixel_weight is None else kind.pixel_weight[:, layer : layer + 1]
            by = (kind.normalizer or truth.counts[number] or 1.0) if mean else None
            kinds.append(replace(kind, labels=kind.labels[:, layer : layer + 1], pixel_weight=own, normalizer=by))
            owners.append(number)
    found = run(replace(tensors, kinds=kinds), backend, incoming)
    losses = {"loss": found.losses["loss"]}
    for number, owner in enumerate(owners):
        for term in ("loss", "nll", "trace", "count"):
            value, name = found.losses[f"{term}{number}"], f"{term}{owner}"
            if case.reduction == "none":
                losses[name] = np.concatenate([losses[name], value], 1) if name in losses else value
            else:
                losses[name] = losses.get(name, 0.0) + value
    return Found(losses, found.gradients)


def layout(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """In memory otherwise: transposed, every second of a larger one, channels last, or not beginning on a line."""

    def transposed(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2)

    def sliced(t: Tensor) -> Tensor:
        wide = torch.zeros(2 * t.shape[0] + 1, *t.shape[1:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)
        wide[1::2, ..., 1::2] = t
        return wide[1::2, ..., 1::2]

    def last(t: Tensor) -> Tensor:
        return t.movedim(1, -1).contiguous().movedim(-1, 1)

    def offset(t: Tensor) -> Tensor:
        buffer = t.new_zeros(t.numel() + 1)
        buffer[1:] = t.flatten()
        return buffer[1:].view(t.shape)

    move = (transposed, sliced, last, offset)[case.seed % 4]
    kinds = [
        replace(
            kind,
            labels=move(kind.labels),
            cm=None if kind.cm is None else move(kind.cm),
            pixel_weight=None if kind.pixel_weight is None else move(kind.pixel_weight),
            transition=None if kind.transition is None else kind.transition.t().contiguous().t(),
        )
        for kind in tensors.kinds
    ]
    return run(replace(tensors, seg=move(tensors.seg), kinds=kinds), backend, incoming)


def schedules(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """The other schedule; on the CPU it gives the same bits in float32 (gradients: where nothing scales them), in float64 the
    last may differ."""
    found = run(tensors, backend, incoming)
    other = {"one_pass": "recompute", "recompute": "one_pass"}[case.schedule]
    again = run(replace(tensors, schedule=other), backend, incoming)
    if backend == "cpu" and "fp64" not in (case.dtype, case.cm_dtype):
        _assert_same(found, again, gradients=bool(np.all(np.asarray(incoming) == 1.0)))
    return again


def threads(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """Two and three threads give the bits of one."""
    found = run(tensors, backend, incoming)
    if backend == "reference":  # PyTorch promises nothing of the kind
        return found
    before = torch.get_num_threads()
    try:
        for count in (2, 3):
            torch.set_num_threads(count)
            _assert_same(found, run(tensors, backend, incoming), gradients=True)
    finally:
        torch.set_num_threads(before)
    return found


def _assert_same(one: Found, other: Found, *, gradients: bool) -> None:
    for name, value in one.losses.items():
        assert np.array_equal(value, other.losses[name], equal_nan=True), f"{name}: other bits"
    for name, value in one.gradients.items() if gradients else ():
        assert np.array_equal(value, other.gradients[name], equal_nan=True), f"gradient of {name}: other bits"


def unasked(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """Without gradients, and the label map beside it."""
    with torch.no_grad():
        leaves = leaves_of(tensors)
        out = ck.annotation_objective(
            leaves.seg, leaves.drawings, ignore_index=case.ignore, reduction=case.reduction, backend=backend
        )
        if not case.junk:
            labels = ck.label_map(leaves.seg, case.size, backend=backend)
            assert labels.shape == (case.batch, *case.size), labels.shape
            assert int(labels.max()) < case.classes, labels.max()
    found = Found({"loss": numbers(out.loss)})
    for number, part in enumerate(out.parts):
        found.losses |= {f"{name}{number}": numbers(getattr(part, name)) for name in ("loss", "nll", "trace", "count")}
    return found


def posterior(case: Case, tensors: Tensors, incoming: Incoming, truth: Truth, backend: str) -> Found:
    """p times all q, normalised."""
    leaves = leaves_of(tensors)
    values = ck.annotation_posterior(leaves.seg, leaves.drawings, ignore_index=case.ignore, backend=backend)
    assert values.dtype == tensors.seg.dtype, values.dtype
    return Found({}, {"posterior": numbers(values)})


RELATIONS: dict[str, Relation] = {
    f.__name__: f
    for f in (
        same, parts, permuted, split, shifted, identity, expanded, halved, layers, layout, schedules, threads, unasked,
        posterior,
    )
}  # fmt: skip


def weighted(often: dict[str, int] | None = None) -> list[str]:
    """Names, the cheap ones more often; `threads` wakes up others, which takes longer than the case."""
    often = {"same": 6, "threads": 1, **(often or {})}
    return [name for name in RELATIONS for _ in range(often.get(name, 3))]


def describe() -> dict[str, Any]:
    return {name: " ".join((relation.__doc__ or "").split()) for name, relation in RELATIONS.items()}
