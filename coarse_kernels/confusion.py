"""Confusion matrices to start from, and a head that starts there.

The classes of a network that is trained under free matrices are defined by the matrices' diagonals alone: any permutation
of classes with the matrices permuted to match explains the drawings as well. So training has to start where class j is
mostly drawn as j. A convolution as PyTorch starts it does not: its matrices are nearly uniform, with the largest entry
anywhere, and training ends, without an error, in classes that have changed places.
"""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import wrapped

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
        ValueError: naming the argument, what came and what was expected.
    """
    check_diagonal(num_classes, diagonal)
    if missing is None:
        matrix = torch.full((num_classes, num_classes), (1 - diagonal) / (num_classes - 1))
        return matrix.fill_diagonal_(diagonal).log()
    left = 1 - diagonal - missing  # for wrong names: an entry that starts at 0 stays there
    if num_classes < 3 or not missing > 0 or not left > _LEAST_LEFT:
        raise ValueError(
            f"missing: expected None, or a number above 0 and below 1 - diagonal = {1 - diagonal:g} "
            f"and at least 3 classes, got {missing} and {num_classes} classes"
        )
    matrix = torch.full((num_classes, num_classes), left / (num_classes - 2))
    matrix.fill_diagonal_(diagonal)
    matrix[0] = missing
    matrix[:, 0] = 0.03 / (num_classes - 1)
    matrix[0, 0] = 0.97
    return matrix.log()


def check_diagonal(num_classes: int, diagonal: float) -> None:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes: expected an integer >= 2, got {num_classes!r}")
    if not 1 / num_classes <= diagonal < 1:
        raise ValueError(f"diagonal: expected a number from 1/{num_classes} to below 1, got {diagonal}")


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
        ValueError: naming the argument, what came and what was expected; in forward, features of other channels or rank.
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
        check_diagonal(num_classes, diagonal)
        for name, number in (("channels", channels), ("stride", stride)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise ValueError(f"{name}: expected an integer >= 1, got {number!r}")
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
        if features is None or not 3 <= features.dim() <= 5 or features.shape[1] != self.channels:
            got = None if features is None else tuple(features.shape)
            raise ValueError(f"features: expected (B, {self.channels}, *g) with 1, 2 or 3 spatial axes, got {got}")
        rank = features.dim() - 2
        if self.stride > 1:
            pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[rank - 1]
            features = pool(features, self.stride, ceil_mode=True, count_include_pad=False)
        convolution = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
        weight = self.weight.view(*self.weight.shape, *[1] * rank)
        logits = convolution(features, weight, self.bias)
        return logits.unflatten(1, (classes, classes))

    def extra_repr(self) -> str:
        return (
            f"num_classes={self.num_classes}, channels={self.channels}, stride={self.stride}, "
            f"diagonal={self.diagonal:g}, missing={self.missing}"
        )


# --- a start without a diagonal -----------------------------------------------------------------------------------------

_PLACES = 64  # of one image that are looked at
_looked_at: set[str] = set()  # names
_pending: list[tuple[str, Tensor, torch.cuda.Event]] = []  # what a device has yet to say


def look_for_diagonal(name: str, cm_logits: Tensor) -> None:
    """Warn, once a process for each name, where training starts from matrices whose columns mostly have their largest entry
    off the diagonal. ``cm_logits``: (B or 1, C, C, *G).

    On a GPU nobody waits: what the first call finds is said in a later one.
    """
    if _pending:
        _hear()
    if name in _looked_at or not cm_logits.requires_grad or not torch.is_grad_enabled() or cm_logits.numel() == 0:
        return
    if torch.compiler.is_compiling() or not wrapped.readable(cm_logits):
        return
    on_gpu = cm_logits.is_cuda
    if cm_logits.device.type not in ("cpu", "cuda") or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return
    _looked_at.add(name)
    with wrapped.unseen(), torch.no_grad():
        places = cm_logits[0].flatten(2)  # (C, C, places)
        places = places[..., :: max(1, places.shape[2] // _PLACES)]
        own = torch.arange(places.shape[1], device=places.device)
        share = (places.float().argmax(0) == own[:, None]).float().mean()
        if not on_gpu:
            _say(name, share.item())
            return
        found = torch.empty((), pin_memory=True)
        found.copy_(share, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        _pending.append((name, found, event))


def _hear() -> None:
    for entry in list(_pending):
        name, found, event = entry
        if event.query():
            _pending.remove(entry)
            _say(name, found.item())


def _say(name: str, share: float) -> None:
    if share > 0.5:
        return
    warn(
        f"{name}: only {100 * share:.0f} % of the columns have their largest entry on the diagonal. Where training starts so, "
        "classes end up permuted, without an error. Start at coarse_kernels.confusion_logits(num_classes), as "
        "coarse_kernels.ConfusionHead does."
    )


def warn(message: str) -> None:
    """With the line of who called the library, whatever of it and of torch lies between."""
    inside = (os.path.dirname(__file__) + os.sep, os.path.dirname(torch.__file__) + os.sep)
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
