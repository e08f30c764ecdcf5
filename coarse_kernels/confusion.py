"""Confusion matrices to start from, and a head that starts there.

The classes of a network that is trained under free matrices are defined by the matrices' diagonals alone: any permutation
of classes with the matrices permuted to match explains the drawings as well. So training has to start where class j is
mostly drawn as j. A convolution as PyTorch starts it does not: its matrices are nearly uniform, with the largest entry
anywhere, and training ends, without an error, in classes that have changed places.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_classes, check_number

DIAGONAL = 0.7  # 0.65 to 0.8 beat 0.9 and 0.99 on noisy MNIST digits
_LEAST_LEFT = 1e-6  # for names that are no background's; 1 - 0.7 is above 0.3, by a rounding
_START_SCALE = 0.1  # of PyTorch's own start: the head begins as nearly the same matrix everywhere


def confusion_logits(num_classes: int, diagonal: float = DIAGONAL, missing: float | None = None) -> Tensor:
    """(C, C) float32 logits [observed, true] to start from.

    The softmax over the first axis has ``diagonal`` (from 1/C to below 1) on its diagonal, the rest equal. With ``missing``
    the background (class 0) is another matter than the objects: p(drawn as background | object) = ``missing``, the rest of
    an object's column equal, and the background is drawn as such in 97 of 100 cases: annotators leave parts of objects out
    far more often than they invent objects.

    Args:
        num_classes: C >= 2.
        diagonal: p(drawn as j | true j).
        missing: p(drawn as background | object), above 0 and below ``1 - diagonal``; needs 3 classes. None: no background.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected.
    """
    num_classes = _check_diagonal(num_classes, diagonal)
    if missing is None:
        matrix = _full(num_classes, (1 - diagonal) / (num_classes - 1))
        return matrix.fill_diagonal_(diagonal).log()
    check_number("missing", missing)
    left = 1 - diagonal - missing  # for wrong names: an entry that starts at 0 stays there
    if num_classes < 3 or not missing > 0 or not left > _LEAST_LEFT:
        raise ValueError(
            f"missing: expected None, or a number above 0 and below 1 - diagonal = {1 - diagonal:g} "
            f"and at least 3 classes, got {missing} and {num_classes} classes"
        )
    matrix = _full(num_classes, left / (num_classes - 2))
    matrix.fill_diagonal_(diagonal)
    matrix[0] = missing
    matrix[:, 0] = 0.03 / (num_classes - 1)
    matrix[0, 0] = 0.97
    return matrix.log()


def _full(num_classes: int, value: float) -> Tensor:
    return torch.full((num_classes, num_classes), value, dtype=torch.float32)


def _check_diagonal(num_classes: int, diagonal: float) -> int:
    """The number of classes, as an int."""
    num_classes = check_classes(num_classes)
    check_number("diagonal", diagonal)
    if not 1 / num_classes <= diagonal < 1:
        raise ValueError(f"diagonal: expected a number from 1/{num_classes} to below 1, got {diagonal}")
    return num_classes


class ConfusionHead(nn.Module):
    """Features to confusion-matrix logits, by a 1x1 convolution that starts at `confusion_logits`; or, without features, one
    matrix for all places and images.

    >>> head = ConfusionHead(19, channels=64, stride=2)      # features at stride 4: matrices at stride 8
    >>> cm_logits = head(features)                           # (B, 64, h, w) -> (B, 19, 19, ceil(h / 2), ceil(w / 2))
    >>> head = ConfusionHead(19)                             # (C, C) numbers in all
    >>> cm_logits = head()                                   # (1, 19, 19, 1, 1)

    Args:
        num_classes: C.
        channels: of the features; None for one matrix everywhere.
        stride: features are averaged over so many places along each axis first: matrices need a coarser grid than classes,
            and cost C * C numbers a place.
        diagonal: p(drawn as j | true j) at the start, of every class.
        missing: as in `confusion_logits`.
        spatial_dims: of the image, where there are no features to tell (1, 2 or 3).

    Shape: ``forward(features (B, channels, *g))`` -> (B, C, C, *ceil(g / stride)); ``forward()`` -> (1, C, C, *(1, ...)). To be
    handed over as ``cm_logits``. Keep the features' network apart from the one that segments: a shared one lets the matrices
    absorb the objects. The parameters want no weight decay that would pull the diagonal to 0.

    Raises:
        ValueError, TypeError: naming the argument, what came and what was expected; in forward, features of other channels
            or rank.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int | None = None,
        *,
        stride: int = 1,
        diagonal: float = DIAGONAL,
        missing: float | None = None,
        spatial_dims: int = 2,
    ):
        super().__init__()
        num_classes = _check_diagonal(num_classes, diagonal)
        for name, number in (("channels", channels), ("stride", stride), ("spatial_dims", spatial_dims)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, Integral) or number < 1):
                raise ValueError(f"{name}: expected an int >= 1, got {number!r}")
        if spatial_dims not in (1, 2, 3):
            raise ValueError(f"spatial_dims: expected 1, 2 or 3, got {spatial_dims!r}")
        if channels is None and stride != 1:
            raise ValueError(f"stride: expected 1 where there are no features (channels=None), got {stride}")
        self.num_classes, self.channels, self.stride = num_classes, channels, stride
        self.diagonal, self.missing, self.spatial_dims = diagonal, missing, spatial_dims
        self.bias = nn.Parameter(torch.empty(num_classes * num_classes))
        self.weight = None if channels is None else nn.Parameter(torch.empty(num_classes * num_classes, channels))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the start."""
        self.bias.copy_(confusion_logits(self.num_classes, self.diagonal, self.missing).flatten())
        if self.weight is not None:
            nn.init.kaiming_uniform_(self.weight, a=5**0.5).mul_(_START_SCALE)  # as nn.Conv2d, scaled

    def forward(self, features: Tensor | None = None) -> Tensor:
        """Matrix logits of these features, or of all places."""
        classes = self.num_classes
        if self.weight is None:
            if features is not None:
                raise ValueError("features: expected none, as the head has no channels")
            return self.bias.view(1, classes, classes, *[1] * self.spatial_dims)
        if features is not None and not isinstance(features, Tensor):
            raise TypeError(f"features: expected a torch.Tensor, got {type(features).__name__}")
        if features is None or not 3 <= features.dim() <= 5 or features.shape[1] != self.channels:
            got = None if features is None else tuple(features.shape)
            raise ValueError(f"features: expected (B, {self.channels}, *g) with 1, 2 or 3 spatial axes, got {got}")
        rank = features.dim() - 2
        if self.stride > 1:
            features = _averaged(features, self.stride)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        weight = self.weight.view(*self.weight.shape, *[1] * rank)
        logits = convolution(features, weight, self.bias)
        return logits.unflatten(1, (classes, classes))

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, channels={self.channels}, stride={self.stride}, "
            f"diagonal={self.diagonal:g}, missing={self.missing}"
        )


def _averaged(features: Tensor, stride: int) -> Tensor:
    """(B, K, *g) -> (B, K, *ceil(g / stride)), means over what there is of each window."""
    if features.dim() < 5:
        pool: Any = F.avg_pool1d if features.dim() == 3 else F.avg_pool2d
        return pool(features, stride, ceil_mode=True, count_include_pad=False)
    # PyTorch's of volumes refuses axes shorter than the window, and 16 bits on a CPU
    window = [min(stride, points) for points in features.shape[2:]]
    wide = features.float() if features.device.type == "cpu" and features.element_size() == 2 else features
    return F.avg_pool3d(wide, window, stride, ceil_mode=True, count_include_pad=False).to(features.dtype)
