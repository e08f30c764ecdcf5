"""Every argument is checked here, once, before anything is computed. What comes out is a `Problem` that backends trust."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import values, wrapped
from .problem import Drawings, Problem, compute_dtype
from .values import Names

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INT_DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
REDUCTIONS = ("mean", "sum", "none")


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


def check_problem(
    seg_logits: Tensor,
    drawings: Sequence[Drawings],
    *,
    ignore_index: int = 255,
    reduction: str = "mean",
    names: Sequence[Names] | None = None,
    layers: Sequence[bool] | None = None,
    complementary: Sequence[bool] | None = None,
) -> Problem:
    """Validate one call.

    names: what the caller's user knows the parts of each kind as; `Drawings` and their place in the sequence by default.
    layers: whether the labels of each kind may have an axis of layers; all may by default.
    complementary: whether the transition of each kind has to have a zero diagonal; none by default.
    """
    num_classes(seg_logits)
    if isinstance(drawings, Drawings) or not isinstance(drawings, Sequence) or len(drawings) == 0:
        got = (
            type(drawings).__name__ if isinstance(drawings, Drawings) or not isinstance(drawings, Sequence) else "none"
        )
        raise TypeError(
            f"drawings: expected a sequence of at least one Drawings, got {got}; one alone is [Drawings(...)]"
        )
    for k, each in enumerate(drawings):
        if not isinstance(each, Drawings):
            raise TypeError(f"drawings[{k}]: expected Drawings, got {type(each).__name__}")
    count = len(drawings)
    names = names or [(lambda name, k=k: f"drawings[{k}].{name}") for k in range(count)]  # type: ignore[misc]
    layers, complementary = layers or [True] * count, complementary or [False] * count
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
    ignore_index = check_ignore_index(ignore_index)
    dtype = compute_dtype(seg_logits, *(each.cm_logits for each in drawings if isinstance(each.cm_logits, Tensor)))
    checked = [
        _check_drawings(seg_logits, each, ignore_index, reduction, name, layered, zero_diagonal, dtype)
        for each, name, layered, zero_diagonal in zip(drawings, names, layers, complementary, strict=True)
    ]
    size = checked[0].labels.shape[2:]
    for each, name in zip(checked, names, strict=True):
        if each.labels.shape[2:] != size:
            raise ValueError(
                f"{name('labels')}: expected the pixel grid {tuple(size)} of {names[0]('labels')}, "
                f"got {tuple(each.labels.shape[2:])}"
            )
    rank = seg_logits.dim() - 2
    return Problem(
        seg_logits=wrapped.plain(seg_logits),
        drawings=tuple(checked),
        ignore_index=ignore_index,
        reduction=reduction,
        layered=tuple(each.labels.dim() == rank + 2 for each in drawings),
    )


def _plain(part: Any) -> Any:
    return wrapped.plain(part) if isinstance(part, Tensor) else part


def _check_drawings(
    seg_logits: Tensor,
    given: Drawings,
    ignore_index: int,
    reduction: str,
    name: Names,
    layers: bool,
    complementary: bool,
    dtype: torch.dtype,
) -> Drawings:
    classes = seg_logits.shape[1]
    batch, rank = seg_logits.shape[0], seg_logits.dim() - 2
    labels, cm_logits, transition = _plain(given.labels), _plain(given.cm_logits), _plain(given.transition)
    class_weight, pixel_weight = _plain(given.class_weight), _plain(given.pixel_weight)
    normalizer = _plain(given.normalizer)
    labels_name, cm_name = name("labels"), name("cm_logits")

    check_tensor(labels_name, labels)
    if labels.dtype not in INT_DTYPES:
        raise TypeError(f"{labels_name}: expected an integer tensor (uint8 or int64 at best), got {labels.dtype}")
    layered = layers and labels.dim() == rank + 2
    if (labels.dim() != rank + 1 and not layered) or labels.shape[0] != batch:
        shapes = "(B, *S) or (B, K, *S)" if layers else "(B, *S)"
        raise ValueError(
            f"{labels_name}: expected {shapes} with B = {batch} and {rank} spatial axes, as seg_logits {_shape(seg_logits)} "
            f"has, got {_shape(labels)}"
        )
    size = labels.shape[2:] if layered else labels.shape[1:]
    _check_grid("seg_logits", seg_logits, size, labels_name)
    if cm_logits is not None:
        cm_logits = _check_cm(cm_name, cm_logits, batch, classes, rank)
        _check_grid(cm_name, cm_logits, size, labels_name)
    if transition is not None:
        _check_matrix(name("transition"), transition, classes)
    if class_weight is not None:
        _check_constant(name("class_weight"), class_weight, (classes,))
    if pixel_weight is not None:
        _check_constant(name("pixel_weight"), pixel_weight, tuple(labels.shape))
    device = seg_logits.device
    for part, tensor in (
        ("cm_logits", cm_logits),
        ("labels", labels),
        ("transition", transition),
        ("class_weight", class_weight),
        ("pixel_weight", pixel_weight),
        ("normalizer", normalizer),
    ):
        if isinstance(tensor, Tensor) and tensor.device != device:
            if part == "normalizer" and tensor.dim() == 0 and tensor.device.type == "cpu":
                continue  # PyTorch's own rule: a 0-d CPU tensor goes with any device
            raise ValueError(f"{name(part)}: expected on {device}, where seg_logits is, got {tensor.device}")
    if normalizer is not None:
        _check_normalizer(name("normalizer"), normalizer, reduction, dtype)
    check_number(name("trace_weight"), given.trace_weight, dtype)
    check_weight(name("weight"), given.weight, dtype)
    if not torch.compiler.is_compiling():
        labels = wrapped.underneath(labels)  # integers have no derivative
    if labels.dtype not in (torch.uint8, torch.int64):
        labels = _constant(Tensor.long, labels)  # an int8 label would compare equal to an ignore_index of 255
    if not layered:
        labels = _constant(_with_layer, labels)
        pixel_weight = None if pixel_weight is None else _constant(_with_layer, pixel_weight)
    checked = Drawings(
        labels,
        cm_logits,
        transition,
        weight=float(given.weight),
        trace_weight=float(given.trace_weight),
        class_weight=class_weight,
        pixel_weight=pixel_weight,
        # numpy's float32 would make its reciprocal in float32
        normalizer=normalizer if normalizer is None or isinstance(normalizer, Tensor) else float(normalizer),
    )
    values.check_values(seg_logits, checked, ignore_index, name, complementary, dtype)
    return checked


def _constant(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """function(tensor): in torch.func still a plain tensor where it was one, whose values can be looked at."""
    if torch.compiler.is_compiling() or not wrapped.inside_a_transform() or wrapped.of_transform(tensor):
        return function(tensor)
    with wrapped.unseen():
        return function(tensor)


def _with_layer(tensor: Tensor) -> Tensor:
    return tensor.unsqueeze(1)


def check_objective(
    positive_cm: Tensor | None,
    positive_labels: Tensor | None,
    negative_cm: Tensor | None,
    negative_labels: Tensor | None,
    transition: Tensor | None,
    negative_weight: float,
) -> None:
    """What `coarse_label_loss` asks beyond its two kinds of drawings."""
    if positive_labels is None and negative_labels is None:
        raise ValueError("positive_labels, negative_labels: expected at least one of the two, got None for both")
    for kind, cm, labels in (
        ("positive", positive_cm, positive_labels),
        ("negative", negative_cm, negative_labels),
    ):
        if cm is not None and labels is None:
            raise ValueError(f"{kind}_cm: got confusion matrices but {kind}_labels is None; expected both or neither")
    if transition is not None and negative_labels is None:
        raise ValueError("transition: belongs to the negative drawings, expected None where negative_labels is None")
    check_weight("negative_weight", negative_weight)


def check_size(seg_logits: Tensor, size: Any) -> tuple[int, ...]:
    """The pixel grid that `label_map` is asked for."""
    num_classes(seg_logits)
    rank = seg_logits.dim() - 2
    if hasattr(size, "tolist") and not isinstance(size, Tensor):
        size = size.tolist()  # numpy's
    if isinstance(size, Tensor) or not isinstance(size, Sequence) or len(size) != rank:
        raise ValueError(f"size: expected {rank} numbers, one for each spatial axis of seg_logits, got {size!r}")
    if not all(isinstance(s, (numbers.Integral, torch.SymInt)) and not isinstance(s, bool) for s in size):
        raise TypeError(f"size: expected integers, got {size!r}")
    size = tuple(s if type(s) in (int, torch.SymInt) else int(s) for s in size)  # int() of a traced one would fix it
    _check_grid("seg_logits", seg_logits, torch.Size(size), "size")
    return size


def check_transition(name: str, matrix: Tensor) -> None:
    """A complementary transition on its own: square, finite, >= 0, zero diagonal, rows that sum to 1."""
    _check_float(name, matrix)
    _check_matrix(name, matrix, matrix.shape[0] if matrix.dim() > 0 else 0)
    if wrapped.readable(matrix):
        values.check_probabilities(name, matrix, complementary=True)


def check_classes(classes: Any) -> int:
    """The number of classes where there are no logits to tell."""
    if not isinstance(classes, numbers.Integral) or isinstance(classes, bool) or classes < 2:
        raise ValueError(f"num_classes: expected an int >= 2, got {classes!r}")
    return int(classes)


def check_ignore_index(ignore_index: Any) -> int:
    if type(ignore_index) is int and 0 <= ignore_index <= 255:
        return ignore_index
    if not isinstance(ignore_index, numbers.Integral) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index: expected an int, got {ignore_index!r}")
    if not -(2**63) <= int(ignore_index) < 2**63:
        raise ValueError(f"ignore_index: expected a number that int64 holds, got {ignore_index}")
    return int(ignore_index)


def per_kind(name: str, value: Any) -> tuple[Any, Any]:
    """A value for both kinds of drawings, or a (positive, negative) pair."""
    if not isinstance(value, (tuple, list)):
        return value, value
    if len(value) != 2:
        raise ValueError(f"{name}: expected one value or a (positive, negative) pair, got {len(value)} values")
    return value[0], value[1]


# --- one argument at a time ---------------------------------------------------------------------------------------------


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided or value.is_nested:
        got = "a nested one" if value.is_nested else f"one of layout {value.layout}"
        raise TypeError(f"{name}: expected a dense tensor, got {got}")
    if wrapped.is_distributed(value):
        raise TypeError(
            f"{name}: expected a plain tensor, got a DTensor; pass the part of this process ({name}.to_local()) or all of it "
            f"({name}.full_tensor())"
        )


def _check_float(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {value.dtype}")


def check_number(name: str, value: Any, dtype: torch.dtype = torch.float64) -> None:
    """Finite in ``dtype``. By comparisons: torch 2.11 cannot trace isfinite of a number that is dynamic."""
    if type(value) is not float:  # an abstract base class takes a microsecond to ask
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        try:
            value = float(value)  # numpy's float16 would be compared in float16
        except OverflowError:
            value = math.inf if value > 0 else -math.inf
    most = torch.finfo(dtype).max
    if not -most <= value <= most:  # NaN, too
        raise ValueError(f"{name}: expected a finite number of {dtype}, got {value}")


def check_weight(name: str, value: Any, dtype: torch.dtype = torch.float64) -> None:
    check_number(name, value, dtype)
    if value < 0:
        raise ValueError(f"{name}: expected a number >= 0, got {value}")


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
    if grid == size:
        return
    if any(g > s for g, s in zip(grid, size, strict=True)):
        raise ValueError(
            f"{name}: its grid {tuple(grid)} is larger than the image {tuple(size)} that {labels_name} define; "
            "expected at most a point for each pixel (F.interpolate finer ones ahead)"
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
    _check_detached(name, weight)


def _check_detached(name: str, constant: Tensor) -> None:
    if constant.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name}: is a constant of the loss, got a tensor that requires grad; pass {name}.detach()")


def _check_normalizer(name: str, normalizer: Any, reduction: str, dtype: torch.dtype) -> None:
    if reduction != "mean":
        raise ValueError(f'{name}: belongs to reduction="mean", got reduction={reduction!r}')
    if isinstance(normalizer, Tensor):
        check_tensor(name, normalizer)
        if normalizer.dim() != 0:
            raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {_shape(normalizer)}")
        if normalizer.dtype not in FLOAT_DTYPES + INT_DTYPES:  # a count of labels is an int
            raise TypeError(f"{name}: expected a number or a 0-d tensor of floats or ints, got {normalizer.dtype}")
        _check_detached(name, normalizer)
        return
    check_weight(name, normalizer, dtype)
    values.check_reciprocal(name, normalizer)


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
