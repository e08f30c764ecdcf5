"""The operators `annotation_objective` and `objective_posterior` of `torch.ops.coarse_kernels_triton`.

All trusted kinds go in one launch; then the kinds with a matrix, a layer of their labels at a time. They add to the same
gradients. No host synchronisation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operator import SEG, Arguments, Outputs, present
from . import matrix, trusted
from .launch import ClassLogits


def _check(call: Arguments, dtype: torch.dtype) -> None:
    for name in ("transition", "class_weight", "pixel_weight", "scale"):
        for tensor in getattr(call, name):
            if present(tensor) and tensor.dtype != dtype:
                raise TypeError(f"{name}: expected {dtype}, got {tensor.dtype}")


def _kinds(call: Arguments) -> tuple[list[int], list[int]]:
    """Those without a matrix, and those with one."""
    kinds = range(len(call.labels))
    return [k for k in kinds if not present(call.cm_logits[k])], [k for k in kinds if present(call.cm_logits[k])]


def annotation_objective(*args: Any) -> tuple[Any, ...]:
    call = Arguments(*args)
    dtype = call.compute_dtype
    _check(call, dtype)
    alone, with_matrix = _kinds(call)
    logits = ClassLogits(call.seg_logits, call.labels[0].shape[2:], dtype)
    others = {k: matrix.MatrixKind(call, k, logits) for k in with_matrix}
    layers = sum(kind.layers for kind in others.values())
    grad_seg = None
    if call.wanted & SEG:
        grad_seg = matrix.ClassGradient(logits, call.seg_logits, bool(alone), layers)
    # The loss of each kind times its weight, the trusted ones first.
    weighted = logits.new(len(call.labels), dtype=torch.float64)
    terms: dict[int, matrix.Terms] = {}
    if alone:
        result = trusted.run(call, alone, dtype, None if grad_seg is None else grad_seg.total, weighted)
        if grad_seg is not None:
            grad_seg.begun = True
        for kind, nll, grad in zip(alone, result.nll, result.grad_transition, strict=True):
            terms[kind] = matrix.Terms(nll.clone(), nll, torch.zeros_like(nll), logits.new(0), grad)
    for slot, kind in enumerate(with_matrix, len(alone)):
        terms[kind] = matrix.run(others[kind], call, kind, grad_seg, weighted, slot)
    parts = [terms[kind] for kind in range(len(call.labels))]
    return tuple(
        Outputs(
            loss=logits.new(0) if call.per_pixel else weighted.sum().to(dtype),
            losses=[part.loss for part in parts],
            nll=[part.nll for part in parts],
            trace=[part.trace for part in parts],
            grad_seg=logits.new(0) if grad_seg is None else grad_seg.rounded(),
            grad_cm=[part.grad_cm for part in parts],
            grad_transition=[part.grad_transition for part in parts],
        )
    )


def objective_posterior(
    seg_logits: Tensor,
    labels: list[Tensor],
    cm_logits: list[Tensor],
    transition: list[Tensor],
    ignore_index: int,
) -> Tensor:
    """p prod q, normalised, in log space: log q of the kinds with a matrix is summed where the posterior will be, or, where
    that has 16 bits, beside it; a last kernel does the rest. One kind and layer alone needs no such sum.
    """
    absent, kinds = [seg_logits.new_empty(0)] * len(labels), len(labels)
    call = Arguments(
        seg_logits, labels, cm_logits, transition, absent, absent, absent, [1.0] * kinds, [0.0] * kinds,
        ignore_index, False, 0,
    )  # fmt: skip
    dtype = call.compute_dtype
    _check(call, dtype)
    alone, with_matrix = _kinds(call)
    logits = ClassLogits(seg_logits, labels[0].shape[2:], dtype)
    others = [matrix.MatrixKind(call, k, logits) for k in with_matrix]
    out = logits.new(*seg_logits.shape[:2], *labels[0].shape[2:], dtype=seg_logits.dtype)
    if logits.empty:
        return out
    if not alone and len(others) == 1 and others[0].layers == 1:
        (band,) = matrix.whole_image(logits.field)
        others[0].pixels(0, band, posterior=out)
        return out
    log_q = None
    for kind in others:
        for layer in range(kind.layers):
            adds = log_q is not None
            if log_q is None:
                log_q = out if out.dtype == dtype else torch.empty_like(out, dtype=dtype)
            kind.log_q(layer, log_q, adds)
    trusted.posterior(call, alone, dtype, log_q, out)
    return out
