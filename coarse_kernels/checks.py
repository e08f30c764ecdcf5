"""Every argument is checked here, once, before anything is computed. What comes out is a `Stream` that backends trust."""

from __future__ import annotations

import math
import numbers
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class Stream:
    """One annotation stream whose arguments fit together. Shape letters as in `functional`."""

    seg_logits: Tensor  # (B, C, *S or coarser)
    cm_logits: Tensor | None  # (B or 1, C, C, *G); None: trusted source, A = I
    labels: Tensor  # (B, *S) uint8 or int64
    transition: Tensor | None  # (C, C); None: identity
    trace_weight: float
    ignore_index: int
    class_weight: Tensor | None  # (C,)
    pixel_weight: Tensor | None  # (B, *S)
    reduction: str
    normalizer: float | Tensor | None

    @property
    def num_classes(self) -> int:
        return self.seg_logits.shape[1]

    @property
    def labelled(self) -> Tensor:
        """(B, *S) bool: where there is a label. One out of range, where nobody looked (CUDA, compiled), is none."""
        labels, classes = self.labels, self.num_classes
        if labels.dtype != torch.uint8:
            return (labels >= 0) & (labels < classes) & (labels != self.ignore_index)
        # a comparison with a number that uint8 does not hold would wrap: -100 is 156
        labelled = labels < classes if classes <= 255 else torch.ones_like(labels, dtype=torch.bool)
        return labelled & (labels != self.ignore_index) if 0 <= self.ignore_index <= 255 else labelled

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """dtype of the mathematics and of the loss: float64 if any logits are, else float32."""
        if self.cm_logits is None:
            return compute_dtype(self.seg_logits.dtype)
        return compute_dtype(torch.promote_types(self.seg_logits.dtype, self.cm_logits.dtype))


def compute_dtype(storage: torch.dtype) -> torch.dtype:
    return torch.float64 if storage == torch.float64 else torch.float32


def num_classes(seg_logits: Tensor) -> int:
    _check_float("seg_logits", seg_logits)
    if not 3 <= seg_logits.dim() <= 5:
        raise ValueError(
            "seg_logits: expected (B, C, *S) with 1, 2 or 3 spatial axes, "
            f"got {seg_logits.dim()} dimensions {_shape(seg_logits)}"
        )
    if seg_logits.shape[1] < 2:
        raise ValueError(f"seg_logits: expected C >= 2 classes on axis 1, got shape {_shape(seg_logits)}")
    return seg_logits.shape[1]


def check_stream(
    seg_logits: Tensor,
    cm_logits: Tensor | None,
    labels: Tensor,
    transition: Tensor | None,
    *,
    trace_weight: float = 0.0,
    ignore_index: int = 255,
    class_weight: Tensor | None = None,
    pixel_weight: Tensor | None = None,
    reduction: str = "mean",
    normalizer: float | Tensor | None = None,
    names: tuple[str, str] = ("cm_logits", "labels"),
    complementary: bool = False,
) -> Stream:
    """Validate one stream; ``names`` is what the caller's user knows cm_logits and labels as."""
    classes = num_classes(seg_logits)
    batch, rank = seg_logits.shape[0], seg_logits.dim() - 2
    cm_name, labels_name = names

    _check_tensor(labels_name, labels)
    if labels.dtype not in INT_DTYPES:
        raise TypeError(f"{labels_name}: expected an integer tensor (uint8 or int64 at best), got {labels.dtype}")
    if labels.dim() != rank + 1 or labels.shape[0] != batch:
        raise ValueError(
            f"{labels_name}: expected (B, *S) with B = {batch} and {rank} spatial axes, as seg_logits {_shape(seg_logits)} "
            f"has, got {_shape(labels)}"
        )
    size = labels.shape[1:]
    _check_grid("seg_logits", seg_logits, size, labels_name)
    if cm_logits is not None:
        cm_logits = _check_cm(cm_name, cm_logits, batch, classes, rank)
        _check_grid(cm_name, cm_logits, size, labels_name)
    if transition is not None:
        _check_matrix("transition", transition, classes)
    if class_weight is not None:
        _check_constant("class_weight", class_weight, (classes,))
    if pixel_weight is not None:
        _check_constant("pixel_weight", pixel_weight, tuple(labels.shape))
    for name, tensor in (
        (cm_name, cm_logits),
        (labels_name, labels),
        ("transition", transition),
        ("class_weight", class_weight),
        ("pixel_weight", pixel_weight),
        ("normalizer", normalizer),
    ):
        if isinstance(tensor, Tensor) and tensor.device != seg_logits.device:
            if name == "normalizer" and tensor.dim() == 0 and tensor.device.type == "cpu":
                continue  # PyTorch's own rule: a 0-d CPU tensor goes with any device
            raise ValueError(f"{name}: expected on {seg_logits.device}, where seg_logits is, got {tensor.device}")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    _check_normalizer(normalizer, reduction)
    _check_number("trace_weight", trace_weight)
    if not isinstance(ignore_index, numbers.Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if transition is not None and _may_read(transition):
        _check_probabilities("transition", transition, complementary)
    if labels.dtype not in (torch.uint8, torch.int64):
        labels = labels.long()  # an int8 label would compare equal to an ignore_index of 255
    if _may_read(labels):
        _check_label_range(labels_name, labels, classes, int(ignore_index))
    return Stream(
        seg_logits=seg_logits,
        cm_logits=cm_logits,
        labels=labels,
        transition=transition,
        trace_weight=float(trace_weight),
        ignore_index=int(ignore_index),
        class_weight=class_weight,
        pixel_weight=pixel_weight,
        reduction=reduction,
        normalizer=normalizer,
    )


def check_objective(
    positive_cm: Tensor | None,
    positive_labels: Tensor | None,
    negative_cm: Tensor | None,
    negative_labels: Tensor | None,
    transition: Tensor | None,
    negative_weight: float,
) -> None:
    """What `coarse_label_loss` asks beyond its two streams."""
    if positive_labels is None and negative_labels is None:
        raise ValueError("positive_labels, negative_labels: expected at least one stream of labels, got None for both")
    for stream, cm, labels in (
        ("positive", positive_cm, positive_labels),
        ("negative", negative_cm, negative_labels),
    ):
        if cm is not None and labels is None:
            raise ValueError(
                f"{stream}_cm: got confusion matrices but {stream}_labels is None; expected both or neither"
            )
    if transition is not None and negative_labels is None:
        raise ValueError("transition: belongs to the negative stream, expected None where negative_labels is None")
    _check_number("negative_weight", negative_weight)
    if negative_weight < 0:
        raise ValueError(f"negative_weight: expected a number >= 0, got {negative_weight}")


def check_transition(name: str, matrix: Tensor) -> None:
    """A complementary transition on its own: square, finite, >= 0, zero diagonal."""
    _check_float(name, matrix)
    _check_matrix(name, matrix, matrix.shape[0] if matrix.dim() > 0 else 0)
    _check_probabilities(name, matrix, complementary=True)


def per_stream(name: str, value: Any) -> tuple[Any, Any]:
    """A value for both streams, or a (positive, negative) pair."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected one value or a (positive, negative) pair, got {len(value)} values")
    return value[0], value[1]


# --- one argument at a time ---------------------------------------------------------------------------------------------


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def _check_float(name: str, value: Any) -> None:
    _check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def _check_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {value}")


def _check_cm(name: str, cm_logits: Tensor, batch: int, classes: int, rank: int) -> Tensor:
    """-> (B or 1, C, C, *G)."""
    _check_float(name, cm_logits)
    if cm_logits.dim() == rank + 2 and cm_logits.shape[1] == classes * classes:
        cm_logits = cm_logits.unflatten(1, (classes, classes))
    fits = cm_logits.dim() == rank + 3 and cm_logits.shape[1:3] == (classes, classes)
    if not fits or cm_logits.shape[0] not in (1, batch):  # the message is built here only: it would fix dynamic shapes
        raise ValueError(
            f"{name}: expected (B or 1, C, C, *G) or (B or 1, C*C, *G) with B = {batch}, C = {classes} and {rank} grid axes, "
            f"got {_shape(cm_logits)} with batch {cm_logits.shape[0]}"
        )
    return cm_logits


def _check_grid(name: str, field: Tensor, size: torch.Size, labels_name: str) -> None:
    grid = field.shape[-len(size) :]
    if any(g > s for g, s in zip(grid, size, strict=True)):
        raise ValueError(
            f"{name}: its grid {tuple(grid)} is larger than the image {tuple(size)} that {labels_name} define"
        )
    if any(g < 1 <= s for g, s in zip(grid, size, strict=True)):
        raise ValueError(f"{name}: expected a grid of at least 1 point on each axis, got {tuple(grid)}")


def _check_matrix(name: str, matrix: Tensor, classes: int) -> None:
    _check_float(name, matrix)
    if tuple(matrix.shape) != (classes, classes):
        raise ValueError(f"{name}: expected (C, C) = ({classes}, {classes}), got {_shape(matrix)}")


def _check_constant(name: str, weight: Tensor, shape: tuple[int, ...]) -> None:
    _check_float(name, weight)
    if tuple(weight.shape) != shape:
        raise ValueError(f"{name}: expected shape {shape}, got {_shape(weight)}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: is a constant of the loss, got a tensor that requires grad; pass {name}.detach()")


def _check_normalizer(normalizer: Any, reduction: str) -> None:
    if normalizer is None:
        return
    if reduction != "mean":
        raise ValueError(f'normalizer: belongs to reduction="mean", got reduction={reduction!r}')
    if isinstance(normalizer, Tensor):
        if normalizer.dim() != 0:
            raise ValueError(f"normalizer: expected a number or a 0-d tensor, got shape {_shape(normalizer)}")
        return
    _check_number("normalizer", normalizer)
    if normalizer <= 0:
        raise ValueError(f"normalizer: expected a number > 0, got {normalizer}")


# --- checks that read values --------------------------------------------------------------------------------------------


def _may_read(tensor: Tensor) -> bool:
    """Values are looked at on the CPU in eager mode; elsewhere that would wait for the device or break the graph.

    COARSE_KERNELS_DEBUG=1 looks at them on every device.
    """
    if torch.compiler.is_compiling() or (type(tensor) is not Tensor and not isinstance(tensor, torch.nn.Parameter)):
        return False
    return tensor.device.type == "cpu" or (
        tensor.device.type != "meta" and os.environ.get("COARSE_KERNELS_DEBUG") == "1"
    )


def _check_probabilities(name: str, matrix: Tensor, complementary: bool) -> None:
    matrix = matrix.detach()
    if not bool((matrix >= 0).all()) or not bool(matrix.isfinite().all()):
        raise ValueError(
            f"{name}: expected finite entries >= 0, got entries from {matrix.min().item()} to {matrix.max().item()}"
        )
    if complementary and bool((matrix.diagonal() != 0).any()):
        raise ValueError(
            f"{name}: a negative drawing never names its own class, expected a zero diagonal, "
            f"got {matrix.diagonal().tolist()}"
        )


def _check_label_range(name: str, labels: Tensor, classes: int, ignore_index: int) -> None:
    from . import native  # the fused scan where it is built: one pass and no temporary

    bad = native.first_bad_label(labels, classes, ignore_index)
    if bad is not None:
        raise ValueError(f"{name}: expected labels in [0, {classes}) or ignore_index {ignore_index}, got {bad}")


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
