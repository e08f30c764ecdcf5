"""The operators that every fused backend has: schemas and fake kernels, once. They live in a namespace of `torch.ops`,
``coarse_kernels`` (compiled, CPU and CUDA) or ``coarse_kernels_triton``; namespaces differ in who implements them.

`annotation_objective` takes the parts of the kinds of drawings as lists, one element for each kind (`Arguments`); one that is
absent has the shape (0,). It returns `Outputs`, the gradients being those of ``loss``; one that is not in ``wanted`` has no
elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..problem import compute_dtype

ONLY_REFERENCE = 'the fused operators do not know {}; use backend="reference", which is plain PyTorch'


class Arguments(NamedTuple):
    """Of `annotation_objective`. Lists have an element for each kind of drawings, of shape (0,) where it is absent (`present`):
    autograd knows lists of tensors, and none of tensors or None.

    scale: what the kind's sums are multiplied with, one number on the device. weight: of the kind in ``loss``.
    per_pixel: ``losses``, ``nll`` and ``trace`` are maps shaped like the labels, scale and weight are 1, ``loss`` is absent.
    """

    seg_logits: Tensor  # (B, C, *s)
    labels: list[Tensor]  # (B, K, *S)
    cm_logits: list[Tensor]  # (B or 1, C, C, *G); absent: A = I
    transition: list[Tensor]  # (C, C); absent: T = I
    class_weight: list[Tensor]  # (C,)
    pixel_weight: list[Tensor]  # (B, K, *S)
    scale: list[Tensor]  # (); absent: 1
    weight: list[float]
    trace_weight: list[float]
    ignore_index: int
    per_pixel: bool
    wanted: int

    @property
    def compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.seg_logits, *filter(present, self.cm_logits))


class Outputs(NamedTuple):
    loss: Tensor  # sum over kinds of weight * losses
    losses: list[Tensor]  # scale * sum w (nll + trace_weight tr A)
    nll: list[Tensor]  # scale * sum w nll
    trace: list[Tensor]  # scale * sum w tr A
    grad_seg: Tensor
    grad_cm: list[Tensor]
    grad_transition: list[Tensor]


def present(t: Tensor) -> bool:
    """Not so an element of `Arguments` of shape (0,), which nothing else has: a field of no images has its other axes."""
    return t.dim() != 1 or t.numel() > 0


# Bits of ``wanted``.
SEG = 1


def cm_bit(kind: int) -> int:
    return 2 << 2 * kind


def transition_bit(kind: int) -> int:
    return 4 << 2 * kind


# Kinds of drawings in one call: the bits of ``wanted`` fit in an int64.
MAX_KINDS = 30

SCHEMAS = (
    "annotation_objective(Tensor seg_logits, Tensor[] labels, Tensor[] cm_logits, Tensor[] transition, "
    "Tensor[] class_weight, Tensor[] pixel_weight, Tensor[] scale, float[] weight, float[] trace_weight, "
    "int ignore_index, bool per_pixel, int wanted) -> (Tensor loss, Tensor[] losses, Tensor[] nll, "
    "Tensor[] trace, Tensor grad_seg, Tensor[] grad_cm, Tensor[] grad_transition)",
    "objective_posterior(Tensor seg_logits, Tensor[] labels, Tensor[] cm_logits, Tensor[] transition, int ignore_index) "
    "-> Tensor",
    "labelled_weight(Tensor labels, Tensor? class_weight, Tensor? pixel_weight, int num_classes, int ignore_index) "
    "-> Tensor",
    "label_map(Tensor seg_logits, SymInt[] size) -> Tensor",
)
# And where gradients of 3 GB are formed on a device that the host must not wait for (`_handed_out`):
SCALE = "scale_(Tensor(a!) gradient, Tensor factor) -> ()"


def differentiable(call: Arguments) -> Iterator[tuple[int, Tensor]]:
    """Bits of ``wanted`` and their tensors."""
    yield SEG, call.seg_logits
    for kind, (cm, transition) in enumerate(zip(call.cm_logits, call.transition, strict=True)):
        if present(cm):
            yield cm_bit(kind), cm
        if present(transition):
            yield transition_bit(kind), transition


# --- fake kernels: shapes and dtypes without computing ------------------------------------------------------------------


def _objective_fake(*args: Any) -> Outputs:
    call = Arguments(*args)
    dtype = call.compute_dtype

    def absent() -> Tensor:
        return call.seg_logits.new_empty((0,), dtype=dtype)

    def gradient(of: Tensor, bit: int) -> Tensor:
        return of.new_empty(of.shape) if call.wanted & bit else absent()

    def terms() -> list[Tensor]:
        return [labels.new_empty(labels.shape if call.per_pixel else (), dtype=dtype) for labels in call.labels]

    return Outputs(
        loss=absent() if call.per_pixel else call.seg_logits.new_empty((), dtype=dtype),
        losses=terms(),
        nll=terms(),
        trace=terms(),
        grad_seg=gradient(call.seg_logits, SEG),
        grad_cm=[gradient(cm, cm_bit(k)) if present(cm) else absent() for k, cm in enumerate(call.cm_logits)],
        grad_transition=[
            gradient(t, transition_bit(k)) if present(t) else absent() for k, t in enumerate(call.transition)
        ],
    )


def _posterior_fake(
    seg_logits: Tensor, labels: list[Tensor], cm_logits: list[Tensor], transition: list[Tensor], ignore_index: int
) -> Tensor:
    return seg_logits.new_empty((*seg_logits.shape[:2], *labels[0].shape[2:]))


def _labelled_weight_fake(
    labels: Tensor, class_weight: Tensor | None, pixel_weight: Tensor | None, num_classes: int, ignore_index: int
) -> Tensor:
    return labels.new_empty((), dtype=torch.float64)


def _label_map_fake(seg_logits: Tensor, size: Sequence[int]) -> Tensor:
    dtype = torch.uint8 if seg_logits.shape[1] <= 256 else torch.int64
    return seg_logits.new_empty((seg_logits.shape[0], *size), dtype=dtype)


# --- registration -------------------------------------------------------------------------------------------------------


def declare(namespace: str) -> torch.library.Library:
    """The operators of a namespace: schemas and fake kernels. They live as long as what is returned."""
    library = torch.library.Library(namespace, "DEF")
    for schema in (*SCHEMAS, SCALE):
        library.define(schema)
    fakes: dict[str, Any] = {
        "annotation_objective": _objective_fake,
        "objective_posterior": _posterior_fake,
        "labelled_weight": _labelled_weight_fake,
        "label_map": _label_map_fake,
    }
    for name, fake in fakes.items():
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    return library
