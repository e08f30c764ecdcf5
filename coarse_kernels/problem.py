"""What is to be computed: an image's class logits and the kinds of drawings on it. Frozen, and without a check of their own.

Shape letters: ``B`` batch, ``C`` classes, ``K`` layers, ``*S`` pixel grid (1, 2 or 3 axes, defined by the labels), ``*G`` grid
of a confusion-matrix field and ``*s`` grid of the class logits: as many axes, any size from 1 to S.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Drawings:
    """One kind of drawings on a batch of images: everything that one annotator, or one way of drawing, has left.

    Args:
        labels: (B, *S) integer class of the drawing at each pixel, or (B, K, *S): K layers that the same matrix and the same
            transition explain, such as several negative drawings over one pixel. The layers are observations of one true
            class; their means, weights and counts are taken over all of them together.
        cm_logits: (B or 1, C, C, *G) or (B or 1, C*C, *G) logits of ``p(observed | true)``; first index observed, second true.
            None is a trusted kind, A = I: cross-entropy, or complementary-label learning with a transition.
        transition: (C, C), entry [i, y] the probability that class i is reported as label y; rows sum to 1. None: identity
            (positive drawings).
        weight: of this kind in the objective.
        trace_weight: of ``tr(A)`` in this kind's loss.
        class_weight: (C,) weight of a pixel by its label; a constant.
        pixel_weight: shaped like ``labels``; a constant.
        normalizer: what this kind's "mean" divides by instead of the summed weight of its labelled pixels.

    Floats are float32, bfloat16, float16 or float64. Nothing is checked here: what is wrong raises where the drawings are used,
    a ValueError or TypeError that names ``drawings[k].labels`` and so on.
    """

    labels: Tensor
    cm_logits: Tensor | None = None
    transition: Tensor | None = None
    weight: float = field(default=1.0, kw_only=True)
    trace_weight: float = field(default=0.0, kw_only=True)
    class_weight: Tensor | None = field(default=None, kw_only=True)
    pixel_weight: Tensor | None = field(default=None, kw_only=True)
    normalizer: float | Tensor | None = field(default=None, kw_only=True)


@dataclass(frozen=True, eq=False)
class Problem:
    """One call. Checked drawings have labels (B, K, *S) in uint8 or int64, weights to match, and fields (B or 1, C, C, *G)."""

    seg_logits: Tensor  # (B, C, *s)
    drawings: tuple[Drawings, ...]
    ignore_index: int
    reduction: str
    layered: tuple[bool, ...]  # of each kind: whether its labels came with an axis of layers

    @property
    def num_classes(self) -> int:
        return self.seg_logits.shape[1]

    @property
    def size(self) -> torch.Size:
        """*S."""
        return self.drawings[0].labels.shape[2:]

    @property
    def device(self) -> torch.device:
        return self.seg_logits.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the mathematics and of the loss."""
        return compute_dtype(self.seg_logits, *(d.cm_logits for d in self.drawings if d.cm_logits is not None))

    def labelled(self, drawings: Drawings) -> Tensor:
        """(B, K, *S) bool: where there is a label. One out of range, where nobody looked (CUDA, compiled), is none."""
        labels, classes = drawings.labels, self.num_classes
        if labels.dtype != torch.uint8:
            return (labels >= 0) & (labels < classes) & (labels != self.ignore_index)
        # a comparison with a number that uint8 does not hold would wrap: -100 is 156
        labelled = labels < classes if classes <= 255 else torch.ones_like(labels, dtype=torch.bool)
        return labelled & (labels != self.ignore_index) if 0 <= self.ignore_index <= 255 else labelled


def compute_dtype(*logits: Tensor) -> torch.dtype:
    """float64 if any logits are, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in logits) else torch.float32
