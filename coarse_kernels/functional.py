"""The public functions: the likelihood of coarse drawings under a pixel-wise confusion matrix.

Per pixel, with true class ``j`` and observed (drawn) class ``i``::

    p      = softmax(s)                                 true class, from segmentation logits s (C)
    A[i,j] = softmax over i of a[i,j]                   p(observed i | true j), from CM logits a (C, C)
    q[j]   = sum_i T[i,y] A[i,j]                        p(label y | true j); T = I for a positive drawing
    nll    = -log sum_j p[j] q[j]                       -log (A p)[y], or -log (M^T A p)[y] for a negative drawing
    loss   = nll + trace_weight * tr(A)

(arXiv 2508.18186, Eq. 4-6; trace regulariser of Tanno et al., CVPR 2019.)

Several kinds of drawings on one image (`Drawings`, each with or without a matrix, each with any number of layers) share p;
their losses add up, and so does what they say of the true class: ``p(true | image, drawings)`` is p times the product of all q,
normalised.

Data flows one way: `checks` validates the arguments once, `backends` chooses who computes, the backend computes.

Shape letters: ``B`` batch, ``C`` classes, ``K`` layers, ``*S`` pixel grid (1, 2 or 3 axes, defined by the labels), ``*G``
grid of the confusion matrices and ``*s`` grid of the class logits: same number of axes, any size from 1 to S, interpolated
linearly (`torch.nn.functional.interpolate(align_corners=False)`) where they are coarser.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, values, wrapped
from .problem import Drawings, Problem, compute_dtype
from .results import AnnotationLoss, CoarseLabelLoss, Objective
from .transition import uniform_transition


def annotation_objective(
    seg_logits: Tensor,
    drawings: Sequence[Drawings],
    *,
    ignore_index: int = 255,
    reduction: str = "mean",
    backend: str | None = None,
) -> Objective:
    """The objective of an image under all its drawings, in one pass: p is formed once, and so is the class gradient.

    At a pixel that is drawn as y, with ``p = softmax(seg_logits)``, ``A = softmax(cm_logits)`` over the observed class and
    ``q[j] = sum_i T[i, y] A[i, j]``, a kind of drawings costs ``-log sum_j p[j] q[j] + trace_weight * tr(A)``.

    Args:
        seg_logits: (B, C, *s) logits of the true class, on a grid of their own: the pixels' or any coarser one.
        drawings: the kinds of drawings (positive, negative, each annotator's, dense masks as a trusted kind), see `Drawings`.
        ignore_index: label of pixels that nobody drew on; they count in no sum and get zero gradient.
        reduction: "mean" divides each kind by the summed weight of its labelled pixels, or by its ``normalizer``; "sum"; "none"
            gives the weighted maps. Nothing labelled: the mean is 0 and so are its gradients.
        backend: "reference", "cpu", ...; None takes the best that can run (`available_backends`).

    Returns:
        `Objective` in float32 (float64 where any of the logits are), whatever the storage dtype of the logits. The losses of
        the parts carry gradient, too; a backward through them, rather than through the total, computes gradients anew, for
        which they hold the logits as long as they are kept.

    Raises:
        ValueError, TypeError, RuntimeError: as `annotation_nll`.

    One trusted kind is cross-entropy after upsampling, without the upsampled logits::

        annotation_objective(seg_logits, [Drawings(labels)]).loss
        == F.cross_entropy(F.interpolate(seg_logits, labels.shape[1:], mode="bilinear"), labels, ignore_index=255)
    """
    problem = checks.check_problem(seg_logits, drawings, ignore_index=ignore_index, reduction=reduction)
    return _evaluate(problem, backend)


def annotation_nll(
    seg_logits: Tensor,
    cm_logits: Tensor | None,
    labels: Tensor,
    transition: Tensor | None = None,
    *,
    trace_weight: float = 0.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    backend: str | None = None,
) -> AnnotationLoss:
    """Negative log-likelihood of one kind of drawings, with its confusion matrices.

    `annotation_objective` with one kind, without layers; the equation is there.

    Args:
        seg_logits: (B, C, *s) logits of the true class, on the pixel grid or any coarser one.
        cm_logits: (B or 1, C, C, *G) or (B or 1, C*C, *G) logits of ``p(observed | true)``; first index observed, second
            true. Interpolated to S exactly as `torch.nn.functional.interpolate(align_corners=False)`, inside the kernel.
            None is a trusted source, A = I: plain cross-entropy, or complementary-label learning with a transition.
        labels: (B, *S) integer class of the drawing at each pixel. uint8 and int64 are read as they are.
        transition: (C, C), entry [i, y] the probability that class i is reported as label y: None for positive
            drawings (identity), a matrix with zero diagonal for negative ones (`uniform_transition`). Rows sum to 1.
        trace_weight: weight of ``tr(A)`` in the loss, 0 at first; with too much classes flip (docs/method.md).
        ignore_index: label of pixels that nobody drew on; they count in no sum and get zero gradient.
        class_weight: (C,) weight of a pixel by its label, >= 0. A constant: not differentiated.
        pixel_weight: (B, *S) weight of a pixel, >= 0; anything where there is no label. A constant: not differentiated.
        reduction: "mean" divides by the summed weight of the labelled pixels, or by ``normalizer``; "sum"; "none" gives
            the weighted map. Nothing labelled: the mean is 0 and so are its gradients.
        normalizer: what "mean" divides by, a number or a 0-d tensor >= 0, such as the labelled weight over all ranks; the
            mean is 0 where the tensor is.
        backend: "reference", "cpu", ...; None takes the best that can run (`available_backends`).

    Returns:
        `AnnotationLoss` in float32 (float64 for float64 logits), whatever the storage dtype of the logits.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, before anything is computed.
        RuntimeError: a backend was asked for by name that cannot run here, with the reason; or second derivatives, which
            only ``backend="reference"`` has. So it is with torch.func and forward mode, for which None takes the reference.

    Under autocast the logits keep the dtype that they have; the mathematics is float32 (float64 for float64).
    A label that no class can explain (probability exactly 0) has loss inf and zero gradient.
    """
    drawings = Drawings(
        labels,
        cm_logits,
        transition,
        trace_weight=trace_weight,
        class_weight=class_weight,
        pixel_weight=pixel_weight,
        normalizer=normalizer,
    )
    problem = checks.check_problem(
        seg_logits, [drawings], ignore_index=ignore_index, reduction=reduction, names=[str], layers=[False]
    )
    out = _evaluate(problem, backend)
    (part,) = out.parts
    return AnnotationLoss(out.loss, part.nll, part.trace, part.count)  # torch 2.11 does not compile `_replace`


def coarse_label_loss(
    seg_logits: Tensor,
    positive_cm: Tensor | None,
    positive_labels: Tensor | None,
    negative_cm: Tensor | None = None,
    negative_labels: Tensor | None = None,
    transition: Tensor | None = None,
    *,
    trace_weight: float = 0.0,
    negative_weight: float = 1.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | tuple[float | Tensor | None, float | Tensor | None] | None = None,
    backend: str | None = None,
) -> CoarseLabelLoss:
    """The paper's objective (Eq. 4-6): positive + ``negative_weight`` x negative drawings, each with its trace.

    `annotation_objective` with these two kinds.

    Args:
        seg_logits: (B, C, *s), shared by both. See `annotation_nll` for every argument not listed here.
        positive_cm, negative_cm: CM logits of each kind; None trusts those drawings (A = I). Give the confusion matrix to
            the drawings that are known to be worse and trust the others: what two free matrices mean, only their start says.
        positive_labels: (B, *S), "this region is class y"; None: no positive drawings.
        negative_labels: (B, *S) or, several of them over one pixel, (B, K, *S), "this region is not class y"; None: no
            negative drawings. Not both may be None.
        transition: (C, C) with zero diagonal, of the negative drawings; None is uniform, ``1 / (C - 1)``.
        negative_weight: weight of the negative drawings in the sum, >= 0.
        pixel_weight, normalizer: for both kinds, or a (positive, negative) pair.

    Returns:
        `CoarseLabelLoss`; its ``positive`` and ``negative`` are the kinds' own losses, without ``negative_weight``.

    Raises:
        ValueError, TypeError: as `annotation_nll`; also for a transition with a non-zero diagonal.
    """
    checks.num_classes(seg_logits)
    checks.check_objective(positive_cm, positive_labels, negative_cm, negative_labels, transition, negative_weight)
    pixel_weights = checks.per_kind("pixel_weight", pixel_weight)
    normalizers = checks.per_kind("normalizer", normalizer)
    if negative_labels is not None and transition is None:
        dtype = compute_dtype(seg_logits)
        transition = uniform_transition(checks.num_classes(seg_logits), device=seg_logits.device, dtype=dtype)
    options: dict[str, Any] = {"trace_weight": trace_weight, "class_weight": class_weight}
    kinds: dict[str, Drawings] = {}
    if positive_labels is not None:
        kinds["positive"] = Drawings(
            positive_labels, positive_cm, pixel_weight=pixel_weights[0], normalizer=normalizers[0], **options
        )
    if negative_labels is not None:
        kinds["negative"] = Drawings(
            negative_labels,
            negative_cm,
            transition,
            weight=negative_weight,
            pixel_weight=pixel_weights[1],
            normalizer=normalizers[1],
            **options,
        )

    def known_as(kind: str) -> checks.Names:
        own = {"labels": f"{kind}_labels", "cm_logits": f"{kind}_cm", "weight": "negative_weight"}
        return lambda name: own.get(name, name)

    problem = checks.check_problem(
        seg_logits,
        list(kinds.values()),
        ignore_index=ignore_index,
        reduction=reduction,
        names=[known_as(kind) for kind in kinds],
        layers=[kind == "negative" for kind in kinds],
        complementary=[kind == "negative" for kind in kinds],
    )
    out = _evaluate(problem, backend)
    parts = dict(zip(kinds, out.parts, strict=True))
    return CoarseLabelLoss(out.loss, parts.get("positive"), parts.get("negative"))


def annotation_posterior(
    seg_logits: Tensor,
    cm_logits: Tensor | Sequence[Drawings] | None,
    labels: Tensor | None = None,
    transition: Tensor | None = None,
    *,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    """p(true class | image, drawings): the soft label that the model believes under the drawings.

    With the labels k of a pixel, of all kinds and layers together::

        r[j] = p[j] prod_k q_k[j] / sum_c p[c] prod_k q_k[c]

    Two forms: ``annotation_posterior(seg_logits, cm_logits, labels, transition)`` for one kind of drawings, and
    ``annotation_posterior(seg_logits, drawings)`` for any number of them.

    Args:
        seg_logits: (B, C, *s) logits of the true class.
        cm_logits: as in `annotation_nll`; or a sequence of `Drawings`, whose weights do not matter.
        labels, transition: as in `annotation_nll`; None beside a sequence of drawings.
        ignore_index, backend: as in `annotation_nll`.

    Returns:
        (B, C, *S) on the pixel grid, in the dtype of ``seg_logits``, detached as by `torch.no_grad`: no backward goes through
        it, forward-mode derivatives do. At a pixel without label, or with labels that no class can explain, p itself.

    Raises:
        ValueError, TypeError, RuntimeError: as `annotation_nll`.
    """
    alone = cm_logits is None or isinstance(cm_logits, Tensor) or labels is not None
    if (alone and not isinstance(cm_logits, (Drawings, Sequence))) or isinstance(cm_logits, str):
        drawings: Sequence[Drawings] = [Drawings(labels, cm_logits, transition)]  # type: ignore[arg-type]
        problem = checks.check_problem(seg_logits, drawings, ignore_index=ignore_index, names=[str], layers=[False])
    else:
        if labels is not None or transition is not None:
            raise TypeError(
                "labels, transition: are parts of the drawings where a sequence of them is given, expected None"
            )
        problem = checks.check_problem(seg_logits, cm_logits, ignore_index=ignore_index)  # type: ignore[arg-type]
    with torch.no_grad():
        return backends.select(problem, backend).posterior(problem)


def label_map(seg_logits: Tensor, size: Sequence[int], *, backend: str | None = None) -> Tensor:
    """The most probable class at each pixel: argmax over classes of the interpolated logits, which are never formed.

    Args:
        seg_logits: (B, C, *s) logits of the true class.
        size: *S, the pixel grid; each axis at least as long as that of the logits. Finer logits are an error, as they are in
            `annotation_objective`; for their labels on a coarser grid write out the expression below.
        backend: as in `annotation_nll`.

    Returns:
        (B, *S) uint8, or int64 above 256 classes; ``F.interpolate(seg_logits, size, mode="bilinear").argmax(1)`` in float32
        (float64 for float64). Among equals the first class wins, and NaN wins over all.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    size = checks.check_size(seg_logits, size)
    seg_logits = wrapped.plain(seg_logits)
    with torch.no_grad():
        return backends.select_for(seg_logits, backend).label_map(seg_logits, size)


def explain(
    seg_logits: Tensor, drawings: Sequence[Drawings], *, ignore_index: int = 255, backend: str | None = None
) -> str:
    """Which backend and which kernels `annotation_objective` takes for these arguments, and why not others.

    Nothing is computed.

    Args:
        seg_logits, drawings, ignore_index, backend: as in `annotation_objective`.

    Returns:
        Lines of text: the backend, the kernel of each kind of drawings, and for every other backend why it cannot serve them.

    Raises:
        ValueError, TypeError, RuntimeError: as `annotation_nll`; also for tensors without values (fake, traced, transformed).
    """
    problem = checks.check_problem(seg_logits, drawings, ignore_index=ignore_index)
    if not wrapped.readable(problem.seg_logits):
        raise TypeError("seg_logits: expected a tensor with values, got one of a trace or a transform")
    chosen = backends.select(problem, backend)
    lines = [f"backend {chosen.name}"]
    lines += [f"  drawings[{k}]: {kernel}" for k, kernel in enumerate(chosen.kernels(problem))]
    lines += [f"not {name}: {reason}" for name, reason in backends.refusals(problem).items()]
    return "\n".join(lines)


def _evaluate(problem: Problem, backend: str | None) -> Objective:
    """Run a checked problem."""
    chosen = backends.select(problem, backend)
    counts = [chosen.labelled_weight(problem, drawings) for drawings in problem.drawings]
    if problem.reduction == "none":
        maps = chosen.nll_maps(problem)
        total: Tensor | None = None
        parts = []
        for drawings, layered, of_kind, count in zip(problem.drawings, problem.layered, maps, counts, strict=True):
            loss, nll, trace = of_kind
            # a weight of 0 counts for nothing, even where the loss is inf or NaN
            counted = torch.where(loss.isfinite(), loss, 0.0) if drawings.weight == 0 else loss
            own = counted * drawings.weight  # by 1, too: what is written into the whole is not to be seen in a part
            summed = own.sum(1) if layered else own.squeeze(1)
            total = summed if total is None else total + summed
            parts.append(AnnotationLoss(*(t if layered else t.squeeze(1) for t in (loss, nll, trace, count))))
        assert total is not None  # there is at least one kind
        return Objective(total, tuple(parts))
    if problem.reduction == "mean":
        values.check_counts(problem, counts)
    scales = [_scale(problem, drawings, count) for drawings, count in zip(problem.drawings, counts, strict=True)]
    loss, of_kinds = chosen.nll_sums(problem, scales)
    return Objective(loss, tuple(AnnotationLoss(*terms, count) for terms, count in zip(of_kinds, counts, strict=True)))


def _reciprocal(number: float) -> float:
    return 0.0 if number == 0 else 1.0 / number


def _scale(problem: Problem, drawings: Drawings, count: Tensor) -> Tensor | None:
    """What the sums are multiplied with: None (1) for "sum", else 1 / normalizer, and 0 where nothing is labelled."""
    if problem.reduction == "sum":
        return None
    normalizer = drawings.normalizer
    if normalizer is None:
        normalizer = count
    elif not isinstance(normalizer, Tensor):
        return torch.full_like(count, _reciprocal(normalizer))
    else:
        if normalizer.device != count.device and wrapped.readable(normalizer):
            # a 0-d CPU tensor is welcome; copied as it is, the host would wait for the device
            return torch.full_like(count, _reciprocal(normalizer.item()))
        normalizer = normalizer.detach().to(count)
    # fewer steps, where the value is at hand
    if normalizer.device.type == "cpu" and wrapped.readable(normalizer) and not wrapped.mode_active():
        return torch.zeros_like(normalizer) if normalizer.item() == 0 else normalizer.reciprocal()
    return torch.where(normalizer == 0, 0.0, 1.0 / torch.where(normalizer == 0, 1.0, normalizer))
