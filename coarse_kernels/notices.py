"""What a caller is told: arguments that are no error, and train something else than was meant."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from torch import Tensor

from . import wrapped

_PLACES = 64  # of one image that are looked at
_SUM_TOLERANCE = 1e-2  # of a column of probabilities in 16 bits
_looked_at: set[tuple[str, bool]] = set()  # names, and whether it was trained
_pending: dict[str, tuple[Tensor, torch.cuda.Event]] = {}  # what a device has yet to say, by name


def look_at_matrices(name: str, cm_logits: Tensor) -> None:
    """Warn, once a process for each name, of probabilities in the place of logits, and where training starts from matrices
    whose columns mostly have their largest entry off the diagonal. ``cm_logits``: (B or 1, C, C, *G).

    On a GPU nobody waits: what the first call finds is said in a later one.
    """
    if _pending and not torch.cuda.is_current_stream_capturing():  # where asking an event is an error
        _hear()
    trained = cm_logits.requires_grad and torch.is_grad_enabled()
    if (name, trained) in _looked_at or cm_logits.numel() == 0:
        return
    if torch.compiler.is_compiling() or not wrapped.readable(cm_logits):
        return
    on_gpu = cm_logits.is_cuda
    if cm_logits.device.type not in ("cpu", "cuda") or (on_gpu and torch.cuda.is_current_stream_capturing()):
        return
    _looked_at.add((name, trained))
    with wrapped.unseen(), torch.no_grad():
        places = cm_logits[0].flatten(2)  # (C, C, places)
        places = places[..., :: max(1, places.shape[2] // _PLACES)].float()
        own = torch.arange(places.shape[1], device=places.device)
        share = (places.argmax(0) == own[:, None]).float().mean()
        likely = ((places.sum(0) - 1).abs().max() < _SUM_TOLERANCE) & (places.min() >= 0)
        told = torch.stack([share if trained else torch.ones_like(share), likely])
        if not on_gpu:
            _say(name, *told.tolist())
            return
        found = torch.empty(2, pin_memory=True)
        found.copy_(told, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(cm_logits.device))  # of the copy, not of the current device
        _pending[name] = found, event


def _hear() -> None:
    for name, (found, event) in list(_pending.items()):
        # one of several threads that hear it says it
        if event.query() and _pending.pop(name, None) is not None:
            _say(name, *found.tolist())


def _say(name: str, share: float, likely: float) -> None:
    if likely:
        _looked_at.add((name, True))
        warn(
            f"{name}: expected logits, whose softmax over the first class axis is the matrix, got numbers >= 0 that sum to 1 "
            f"in every column. If they are the matrix itself, {name}.log() is what is meant."
        )
        return
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
