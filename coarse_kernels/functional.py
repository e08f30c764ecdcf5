"""The public functions: the likelihood of coarse drawings under a pixel-wise confusion matrix.

Per pixel, with true class ``j`` and observed (drawn) class ``i``::

    p      = softmax(s)                                 true class, from segmentation logits s (C)
    A[i,j] = softmax over i of a[i,j]                   p(observed i | true j), from CM logits a (C, C)
    q[j]   = sum_i T[i,y] A[i,j]                        p(label y | true j); T = I for a positive drawing
    nll    = -log sum_j p[j] q[j]                       -log (A p)[y], or -log (M^T A p)[y] for a negative drawing
    loss   = nll + trace_weight * tr(A)

(arXiv 2508.18186, Eq. 4-6; trace regulariser of Tanno et al., CVPR 2019.)

Data flows one way: `checks` validates the arguments once, `backends` chooses who computes, the backend computes.

Shape letters: ``B`` batch, ``C`` classes, ``*S`` pixel grid (1, 2 or 3 axes, defined by the labels), ``*G`` grid of
the confusion matrices, same number of axes, any size from 1 to S.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks
from .transition import uniform_transition


class AnnotationLoss(NamedTuple):
    """One annotation stream. With ``reduction="none"`` every field is a (B, *S) map, else a 0-d tensor.

    loss: ``nll + trace_weight * trace``; the only field that carries gradient.
    nll: weighted negative log-likelihood of the labels, reduced like the loss; detached.
    trace: weighted ``tr(A)``, reduced like the loss; detached. 0 for a trusted source (``cm_logits=None``).
    count: sum of the weights of the labelled pixels (their number where no weight is given); detached. Divide by its
        global sum under data parallelism or gradient accumulation (`reduction="sum"`, or ``normalizer``).
    """

    loss: Tensor
    nll: Tensor
    trace: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count


class CoarseLabelLoss(NamedTuple):
    """The whole objective; an absent stream is None.

    loss: ``positive.loss + negative_weight * negative.loss``.
    """

    loss: Tensor
    positive: AnnotationLoss | None
    negative: AnnotationLoss | None


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
    """Negative log-likelihood of one stream of drawings, with its confusion matrices (module docstring: equations).

    Args:
        seg_logits: (B, C, *S) logits of the true class; or on a coarser grid, then interpolated to S (linearly,
            ``align_corners=False``, in float32) ahead of the kernel.
        cm_logits: (B or 1, C, C, *G) or (B or 1, C*C, *G) logits of ``p(observed | true)``; first index observed, second
            true. Interpolated to S exactly as `torch.nn.functional.interpolate(align_corners=False)`, inside the kernel.
            None is a trusted source, A = I: plain cross-entropy, or complementary-label learning with a transition.
        labels: (B, *S) integer class of the drawing at each pixel. uint8 and int64 are read as they are.
        transition: (C, C), entry [i, y] the probability that class i is reported as label y: None for positive
            drawings (identity), a matrix with zero diagonal for negative ones (`uniform_transition`).
        trace_weight: weight of ``tr(A)`` in the loss. Above about 1/C the classes can flip.
        ignore_index: label of pixels that nobody drew on; they count in no sum and get zero gradient.
        class_weight: (C,) weight of a pixel by its label. A constant: not differentiated.
        pixel_weight: (B, *S) weight of a pixel. A constant: not differentiated.
        reduction: "mean" divides by the summed weight of the labelled pixels, or by ``normalizer``; "sum"; "none" gives
            the weighted map. Nothing labelled: the mean is 0 and so are its gradients.
        normalizer: what "mean" divides by, a number or 0-d tensor, such as the labelled weight over all ranks.
        backend: "reference", "cpu", ...; None takes the best that can run (`available_backends`).

    Returns:
        `AnnotationLoss` in float32 (float64 for float64 logits), whatever the storage dtype of the logits.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected, before anything is computed.
        RuntimeError: a backend was asked for by name that cannot run here, with the reason; or second derivatives, which
            only ``backend="reference"`` has.

    Under autocast the logits keep the dtype that they have; the mathematics is float32 (float64 for float64).
    A label that no class can explain (probability exactly 0) has loss inf and zero gradient.
    """
    stream = checks.check_stream(
        seg_logits,
        cm_logits,
        labels,
        transition,
        trace_weight=trace_weight,
        ignore_index=ignore_index,
        class_weight=class_weight,
        pixel_weight=pixel_weight,
        reduction=reduction,
        normalizer=normalizer,
    )
    return _reduce(stream, backend, 1.0)


def coarse_label_loss(
    seg_logits: Tensor,
    positive_cm: Tensor | None,
    positive_labels: Tensor | None,
    negative_cm: Tensor | None = None,
    negative_labels: Tensor | None = None,
    transition: Tensor | None = None,
    *,
    trace_weight: float = 0.01,
    negative_weight: float = 1.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | tuple[float | Tensor | None, float | Tensor | None] | None = None,
    backend: str | None = None,
) -> CoarseLabelLoss:
    """The paper's objective (Eq. 4-6): positive stream + ``negative_weight`` x negative stream, each with its trace.

    Args:
        seg_logits: (B, C, *S), shared by both streams. See `annotation_nll` for every argument not listed here.
        positive_cm, negative_cm: CM logits of each stream; None trusts that source (A = I). Give the confusion matrix to
            the stream that is known to be worse and trust the other: free matrices on both streams are degenerate.
        positive_labels: (B, *S), "this region is class y"; None: no positive stream.
        negative_labels: (B, *S), "this region is not class y"; None: no negative stream. Not both may be None.
        transition: (C, C) with zero diagonal, for the negative stream; None is uniform, ``1 / (C - 1)``.
        negative_weight: weight of the negative stream in the sum, >= 0.
        pixel_weight, normalizer: for both streams, or a (positive, negative) pair.

    Returns:
        `CoarseLabelLoss`; its ``positive`` and ``negative`` are the streams' own losses, without ``negative_weight``.

    Raises:
        ValueError, TypeError: as `annotation_nll`; also for a transition with a non-zero diagonal.
    """
    checks.num_classes(seg_logits)
    checks.check_objective(positive_cm, positive_labels, negative_cm, negative_labels, transition, negative_weight)
    pixel_weights = checks.per_stream("pixel_weight", pixel_weight)
    normalizers = checks.per_stream("normalizer", normalizer)

    def check(cm: Tensor | None, labels: Tensor, side: int, **options: Any) -> checks.Stream:
        return checks.check_stream(
            seg_logits,
            cm,
            labels,
            trace_weight=trace_weight,
            ignore_index=ignore_index,
            class_weight=class_weight,
            pixel_weight=pixel_weights[side],
            reduction=reduction,
            normalizer=normalizers[side],
            **options,
        )

    # Both are checked before either is computed.
    streams: list[checks.Stream | None] = [None, None]
    if positive_labels is not None:
        names = ("positive_cm", "positive_labels")
        streams[0] = check(positive_cm, positive_labels, 0, transition=None, names=names)
    if negative_labels is not None:
        if transition is None:
            dtype = checks.compute_dtype(seg_logits.dtype)
            transition = uniform_transition(checks.num_classes(seg_logits), device=seg_logits.device, dtype=dtype)
        names = ("negative_cm", "negative_labels")
        streams[1] = check(negative_cm, negative_labels, 1, transition=transition, names=names, complementary=True)

    positive = negative = total = None
    if streams[0] is not None:
        positive = _reduce(streams[0], backend, 1.0)
        total = positive.loss
    if streams[1] is not None:
        # The weight goes into the operator rather than onto its result: a gradient formed in the forward pass then
        # already has it, and backward needs no second pass over a field of C x C values.
        scaled = _reduce(streams[1], backend, negative_weight)
        total = scaled.loss if total is None else total + scaled.loss
        own_loss = scaled.loss / negative_weight if negative_weight != 0 else scaled.nll + trace_weight * scaled.trace
        negative = scaled._replace(loss=own_loss)
    assert total is not None  # check_objective has seen to it
    return CoarseLabelLoss(total, positive, negative)


def annotation_posterior(
    seg_logits: Tensor,
    cm_logits: Tensor | None,
    labels: Tensor,
    transition: Tensor | None = None,
    *,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    """p(true class | image, drawing): the soft label that the model believes under the drawing.

        r[j] = p[j] q[j] / sum_k p[k] q[k]

    Arguments as in `annotation_nll`. Returns (B, C, *S) on the pixel grid, in the dtype of ``seg_logits``, detached. At
    a pixel without label, or with a label that no class can explain, the posterior is p itself.
    """
    stream = checks.check_stream(seg_logits, cm_logits, labels, transition, ignore_index=ignore_index)
    with torch.no_grad():
        return backends.select(stream, backend).posterior(stream)


def _reduce(stream: checks.Stream, backend: str | None, loss_scale: float) -> AnnotationLoss:
    """Run one checked stream; ``loss_scale`` multiplies the loss (and so its gradients), not nll and trace."""
    chosen = backends.select(stream, backend)
    count = chosen.labelled_weight(stream)
    if stream.reduction == "none":
        loss, nll, trace = chosen.nll_map(stream)
        loss = loss if loss_scale == 1.0 else loss * loss_scale
        return AnnotationLoss(loss, nll, trace, count)
    scale = _scale(stream, count)
    loss, nll, trace = chosen.nll_sum(stream, scale, loss_scale)
    return AnnotationLoss(loss, nll, trace, count)


def _scale(stream: checks.Stream, count: Tensor) -> Tensor | None:
    """What the sums are multiplied with: None (1) for "sum", else 1 / normalizer, and 0 where nothing is labelled."""
    if stream.reduction == "sum":
        return None
    normalizer = stream.normalizer
    if normalizer is None:
        normalizer = count
    elif not isinstance(normalizer, Tensor):
        return torch.full_like(count, 1.0 / normalizer)
    normalizer = normalizer.detach().to(count)  # a 0-d CPU tensor is welcome, but kernels read it on the device
    return torch.where(normalizer == 0, 0.0, 1.0 / torch.where(normalizer == 0, 1.0, normalizer))
