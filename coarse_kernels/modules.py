"""nn.Module forms of the public functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import checks, wrapped
from .functional import annotation_nll, annotation_objective, coarse_label_loss
from .problem import Drawings, compute_dtype
from .results import AnnotationLoss, CoarseLabelLoss, Objective
from .transition import estimate_transition, uniform_transition


class AnnotationObjective(nn.Module):
    """`annotation_objective` with its settings fixed; what belongs to a kind of drawings comes with its `Drawings`.

    Args:
        ignore_index, reduction, backend: as in `annotation_objective`.

    Shape: ``forward(seg_logits (B, C, *s), drawings)`` -> `Objective`.

    Raises:
        ValueError, TypeError: where it is called, as `annotation_objective`.
    """

    def __init__(self, *, ignore_index: int = 255, reduction: str = "mean", backend: str | None = None):
        super().__init__()
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend

    def forward(self, seg_logits: Tensor, drawings: Sequence[Drawings]) -> Objective:
        """`annotation_objective` of these."""
        return annotation_objective(
            seg_logits, drawings, ignore_index=self.ignore_index, reduction=self.reduction, backend=self.backend
        )

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class AnnotationNLL(nn.Module):
    """`annotation_nll` with its settings fixed.

    Args:
        trace_weight, ignore_index, class_weight, reduction, backend: as in `annotation_nll`. ``class_weight`` becomes a buffer.

    Shape: ``forward(seg_logits (B, C, *s), cm_logits (B or 1, C, C, *G) | None, labels (B, *S), transition (C, C) | None,
    pixel_weight (B, *S) | None, normalizer)`` -> `AnnotationLoss`.

    Raises:
        ValueError, TypeError: where it is called, as `annotation_nll`.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        *,
        trace_weight: float = 0.0,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ):
        super().__init__()
        self.trace_weight = trace_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        seg_logits: Tensor,
        cm_logits: Tensor | None,
        labels: Tensor,
        transition: Tensor | None = None,
        *,
        pixel_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> AnnotationLoss:
        """`annotation_nll` of these."""
        return annotation_nll(
            seg_logits,
            cm_logits,
            labels,
            transition,
            trace_weight=self.trace_weight,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"trace_weight={self.trace_weight}, ignore_index={self.ignore_index}, reduction={self.reduction!r}"


class CoarseLabelCriterion(nn.Module):
    """`coarse_label_loss` with its settings fixed, and its transition a `TransitionMatrix` (learned ones train with it).

    Args:
        transition: a `TransitionMatrix`; None is uniform.
        trace_weight, negative_weight, ignore_index, class_weight, reduction, backend: as in `coarse_label_loss`.
            ``class_weight`` becomes a buffer.

    Shape: ``forward(seg_logits, positive_cm | None, positive_labels | None, negative_cm=None, negative_labels=None)``
    -> `CoarseLabelLoss`; shapes as in `coarse_label_loss`.

    Raises:
        TypeError: ``transition`` is no module.
        ValueError, TypeError: where it is called, as `coarse_label_loss`.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        transition: TransitionMatrix | None = None,
        *,
        trace_weight: float = 0.0,
        negative_weight: float = 1.0,
        ignore_index: int = 255,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
        backend: str | None = None,
    ):
        super().__init__()
        if transition is not None and not isinstance(transition, nn.Module):
            raise TypeError(
                "transition: expected a TransitionMatrix (of a tensor: TransitionMatrix.fixed(tensor)), "
                f"got {type(transition).__name__}"
            )
        self.transition = transition
        self.trace_weight = trace_weight
        self.negative_weight = negative_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.backend = backend
        self.register_buffer("class_weight", class_weight)

    def forward(
        self,
        seg_logits: Tensor,
        positive_cm: Tensor | None,
        positive_labels: Tensor | None,
        negative_cm: Tensor | None = None,
        negative_labels: Tensor | None = None,
        *,
        pixel_weight: Any = None,
        normalizer: Any = None,
    ) -> CoarseLabelLoss:
        """`coarse_label_loss` of these."""
        transition = None if self.transition is None or negative_labels is None else self.transition()
        return coarse_label_loss(
            seg_logits,
            positive_cm,
            positive_labels,
            negative_cm,
            negative_labels,
            transition,
            trace_weight=self.trace_weight,
            negative_weight=self.negative_weight,
            ignore_index=self.ignore_index,
            class_weight=self.class_weight,
            pixel_weight=pixel_weight,
            reduction=self.reduction,
            normalizer=normalizer,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return (
            f"trace_weight={self.trace_weight}, negative_weight={self.negative_weight}, "
            f"ignore_index={self.ignore_index}, reduction={self.reduction!r}"
        )


class TransitionMatrix(nn.Module):
    """Transition of the negative drawings, (C, C) with zero diagonal and rows that sum to 1; ``forward()`` returns it.

    Build it by name: `TransitionMatrix.uniform`, ``.fixed``, ``.estimated``, ``.learned``. Only the learned one has a
    parameter: logits (C, C) of the off-diagonal softmax, ``M[i, y] = softmax over y != i``.

    Args:
        matrix: (C, C) with zero diagonal and rows that sum to 1; kept in float32 (float64 for float64), and so it stays where
            the module is cast to 16 bits, in which rows do not sum to 1 (the logits of a learned one are cast). Rows that
            came in 16 bits are divided by their sums.
        learned: train it from there.

    Raises:
        ValueError, TypeError: ``matrix`` is no such matrix; naming what came and what was expected.
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor, *, learned: bool = False):
        super().__init__()
        checks.check_transition("matrix", matrix)
        matrix = _with_unit_rows(wrapped.plain(matrix).detach())
        self.is_learned = learned
        if learned:
            # a zero off the diagonal could never grow back from -inf
            self.logits = nn.Parameter(matrix.clamp_min(1e-6).log().fill_diagonal_(0.0))
        else:
            self.register_buffer("matrix", matrix.clone())

    @classmethod
    def uniform(cls, num_classes: int) -> TransitionMatrix:
        """`uniform_transition`, not trained."""
        return cls(uniform_transition(num_classes))

    @classmethod
    def fixed(cls, matrix: Tensor) -> TransitionMatrix:
        """``matrix``, not trained."""
        return cls(matrix)

    @classmethod
    def estimated(
        cls, positive_labels: Tensor, negative_labels: Tensor, num_classes: int, **options: Any
    ) -> TransitionMatrix:
        """From co-occurrence; ``options`` are those of `estimate_transition`."""
        return cls(estimate_transition(positive_labels, negative_labels, num_classes, **options))

    @classmethod
    def learned(cls, num_classes: int, initial: Tensor | None = None) -> TransitionMatrix:
        """Trained from ``initial`` (uniform where None)."""
        uniform = uniform_transition(num_classes)
        if isinstance(initial, Tensor) and initial.shape != uniform.shape:
            raise ValueError(
                f"initial: expected (C, C) = {tuple(uniform.shape)} as num_classes says, got {tuple(initial.shape)}"
            )
        return cls(uniform if initial is None else initial, learned=True)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TransitionMatrix:
        exact = None if self.is_learned else self.matrix
        super()._apply(fn, recurse)
        if exact is not None and self.matrix.element_size() == 2:  # .half(): on its new device, as exact as it was
            self.matrix = exact.to(self.matrix.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        stored = None if self.is_learned else state_dict.get(f"{prefix}matrix")
        if isinstance(stored, Tensor) and stored.shape == self.matrix.shape:  # else PyTorch says what is wrong
            state_dict = {**state_dict, f"{prefix}matrix": _with_unit_rows(stored)}
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self) -> Tensor:
        """(C, C) [true, named]; differentiable where it is learned, and not 0."""
        if not self.is_learned:
            return self.matrix
        diagonal = torch.eye(self.logits.shape[0], dtype=torch.bool, device=self.logits.device)
        matrix = self.logits.masked_fill(diagonal, -torch.inf).softmax(1)
        # Where it is 0 nothing bounds p / D, of which its gradient is a sum: a network that is sure of what it rules out has
        # 1e50, inf in float32. That is dropped here; softmax would multiply it with the 0, and give NaN to the whole row.
        return matrix.masked_fill(matrix == 0, 0.0)


def _with_unit_rows(matrix: Tensor) -> Tensor:
    """In the compute dtype; of 16 bits rows that sum to 1 as exactly as they can there."""
    exact = matrix.to(compute_dtype(matrix))
    sums = exact.sum(1, keepdim=True)
    return exact if matrix.element_size() > 2 else exact / torch.where(sums > 0, sums, 1.0)
