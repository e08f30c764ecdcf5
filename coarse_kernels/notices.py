"""What a caller is told: arguments that are no error, and train something else than was meant."""

from __future__ import annotations

import os
import sys
import warnings

import torch
from torch import Tensor

from . import wrapped

_PLACES = 64  # of one image that are looked at
_looked_at: set[str] = set()  # names
_pending: dict[str, tuple[Tensor, torch.cuda.Event]] = {}  # what a device has yet to say, by name


def look_for_diagonal(name: str, cm_logits: Tensor) -> None:
    """Warn, once a process for each name, where training starts from matrices whose columns mostly have their largest entry
    off the diagonal. ``cm_logits``: (B or 1, C, C, *G).

    On a GPU nobody waits: what the first call finds is said in a later one.
    """
    if _pending and not torch.cuda.is_current_stream_capturing():  # where asking an event is an error
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
        event.record(torch.cuda.current_stream(cm_logits.device))  # of the copy, not of the current device
        _pending[name] = found, event


def _hear() -> None:
    for name, (found, event) in list(_pending.items()):
        # one of several threads that hear it says it
        if event.query() and _pending.pop(name, None) is not None:
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
