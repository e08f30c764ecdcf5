"""The coupled model: what is there (segmentation), and how each kind of drawings departs from it (annotation)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from coarse_kernels import TransitionMatrix, uniform_transition

from ..config import FitConfig, OptimConfig
from .annotation import build_annotation
from .networks import build_segmentation


class ModelOutput(NamedTuple):
    """What `coarse_kernels` takes. None: those drawings are trusted (A = I), or the transition is the uniform one.

    seg_logits: (B, C, h, w), maybe coarser than the image; those of the package's own networks are contiguous.
    positive_cm, negative_cm: (B or 1, C, C, *G) logits [observed, true].
    transition: (C, C) [true, named], of the negative drawings; zero diagonal, rows sum to 1.
    """

    seg_logits: Tensor
    positive_cm: Tensor | None
    negative_cm: Tensor | None
    transition: Tensor | None

    def negative_transition(self) -> Tensor:
        """(C, C) [true, named]: ``transition``, or without one the uniform one, 1 / (C - 1) off the diagonal."""
        if self.transition is not None:
            return self.transition
        return uniform_transition(self.seg_logits.shape[1], device=self.seg_logits.device)


class CoarseModel(nn.Module):
    """Segmentation network; for each kind of drawings that is not trusted an annotation model, which shares nothing with
    it; and how negative drawings name a class. Any modules of these shapes fit.

    Args:
        segmentation: (B, channels, H, W) -> (B, C, h, w).
        positive, negative: (B, channels, H, W) -> (B or 1, C, C, *G) logits [observed, true]; None: those drawings are trusted.
        transition: of negative drawings; None: uniform.
        num_classes: C, to check what the segmentation network returns; None: any number.

    Raises:
        ValueError: in forward, where the segmentation network returns no (B, C, h, w); naming what came and what was expected.
    """

    def __init__(
        self,
        segmentation: nn.Module,
        positive: nn.Module | None = None,
        negative: nn.Module | None = None,
        transition: TransitionMatrix | None = None,
        *,
        num_classes: int | None = None,
    ):
        super().__init__()
        self.segmentation = segmentation
        self.positive = positive
        self.negative = negative
        self.transition = transition
        self.num_classes = num_classes

    def forward(self, image: Tensor) -> ModelOutput:
        """All networks on (B, channels, H, W) images in [0, 1]."""
        seg_logits = self.segmentation(image)
        self._check(seg_logits, len(image))
        return ModelOutput(
            seg_logits,
            None if self.positive is None else self.positive(image),
            None if self.negative is None else self.negative(image),
            None if self.transition is None else self.transition(),
        )

    def _check(self, seg_logits: Any, batch: int) -> None:
        shape = tuple(seg_logits.shape) if isinstance(seg_logits, Tensor) else None
        classes = self.num_classes
        if shape is None or len(shape) != 4 or shape[0] != batch or (classes is not None and shape[1] != classes):
            expected = f"({batch}, {'C' if classes is None else classes}, h, w)"
            raise ValueError(
                f"network: expected {type(self.segmentation).__name__} to return logits of shape {expected}, "
                f"got {type(seg_logits).__name__ if shape is None else shape}"
            )


def build_model(
    config: FitConfig,
    channels_in: int,
    num_classes: int,
    transition: TransitionMatrix | None,
    *,
    architecture: str | None = None,
    trained: bool = False,
) -> CoarseModel:
    """The networks of a run. The segmentation network comes first: with equal seeds it is the same whatever the others.

    Args:
        config: its ``model``, ``positive`` and ``negative`` say which.
        channels_in: of the images, 1 or 3.
        num_classes: C.
        transition: of negative drawings; None: uniform.
        architecture: of a checkpoint (`architecture_of`).
        trained: parameters of a checkpoint follow, so that it does not matter where matrices start: older versions took starts
            that are refused now.

    Raises:
        ValueError: naming the option, such as ``positive.rank``, what came and what was expected.
        FileNotFoundError: as `build_segmentation`.
    """
    segmentation = build_segmentation(config.model, channels_in, num_classes, architecture=architecture)
    norm, checkpointing = config.model.norm, config.model.checkpointing
    annotation: dict[str, nn.Module | None] = {}
    for name in ("positive", "negative"):
        try:
            kind = getattr(config, name)
            kind = replace(kind, missing=None) if trained else kind
            annotation[name] = build_annotation(kind, channels_in, num_classes, norm=norm, checkpointing=checkpointing)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from error
    return CoarseModel(segmentation, **annotation, transition=transition, num_classes=num_classes)


def parameter_groups(model: CoarseModel, optim: OptimConfig) -> list[dict[str, Any]]:
    """For an optimizer: weights of the segmentation network decay, its biases and normalisations do not; confusion matrices
    and a learned transition have a rate of their own and do not decay, as 0 is no better a logit than another.

    Up to three, called "weights", "biases" and "annotation", each with ``name``, ``params``, ``lr`` and ``weight_decay``; one
    without trained parameters is left out."""
    segmentation = _trained(model.segmentation)
    annotation = [p for module in (model.positive, model.negative, model.transition) for p in _trained(module)]
    groups = [
        ("weights", [p for p in segmentation if p.dim() > 1], optim.lr, optim.weight_decay),
        ("biases", [p for p in segmentation if p.dim() <= 1], optim.lr, 0.0),
        ("annotation", annotation, optim.cm_lr, 0.0),
    ]
    return [
        {"name": name, "params": parameters, "lr": lr, "weight_decay": decay}
        for name, parameters, lr, decay in groups
        if parameters
    ]


def _trained(module: nn.Module | None) -> list[nn.Parameter]:
    parameters: Iterable[nn.Parameter] = () if module is None else module.parameters()
    return [p for p in parameters if p.requires_grad]


@torch.no_grad()
def confusion_sums(output: ModelOutput, kind: Literal["positive", "negative"]) -> tuple[Tensor, Tensor]:
    """Numerator (C, C) and denominator (C,) of `mean_confusion`, to be summed over batches; float32, without gradient. Each
    image counts as one, whatever the grid of its matrices.

    Raises ValueError for a ``kind`` that is neither "positive" nor "negative".
    """
    if kind not in ("positive", "negative"):
        raise ValueError(f"kind: expected 'positive' or 'negative', got {kind!r}")
    cm_logits = output.positive_cm if kind == "positive" else output.negative_cm
    p = output.seg_logits.float().softmax(1)
    if cm_logits is None:
        mass = p.mean((2, 3)).sum(0)
        return mass.diag(), mass
    p = interpolate(p, size=cm_logits.shape[3:], mode="area") / cm_logits[0, 0, 0].numel()
    return torch.einsum("bijhw,bjhw->ij", cm_logits.float().softmax(1), p), p.sum((0, 2, 3))


def mean_confusion(output: ModelOutput, kind: Literal["positive", "negative"]) -> Tensor:
    """(C, C) float32 p(drawn as i | true j) that the model believes, with A[:, j] averaged over all places x by their p[j]::

        sum over x of A[i, j](x) p[j](x)  /  sum over x of p[j](x)

    Columns sum to 1. Where the grids differ p is averaged over each place of the matrices'. The identity for drawings that are
    trusted.

    Raises ValueError as `confusion_sums`.
    """
    weighted, weight = confusion_sums(output, kind)
    return weighted / weight
