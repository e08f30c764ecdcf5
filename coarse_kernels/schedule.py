"""When a fused backend forms its gradients.

one_pass: in forward, in the pass that computes the loss. Logits are read once and the gradient written once; the gradient
    is held until backward instead of the logits (of several kinds of drawings beside them while somebody keeps the losses of
    the parts, which are differentiated from the logits: detach them, or keep the total alone). If backward then arrives with
    a factor other than 1 (a scaled loss) or under retain_graph, the saved gradient is copied; on a GPU, where the graph is
    not kept, scaled in place, for nobody can ask for it again.
recompute: in backward, from the logits. They are read twice, and nothing but the logits is held.

``reduction="none"``, torch.compile and gradients in float16 always recompute. In float16 the gradient of a mean over many
pixels is rounded to 0, and 65536 times it to inf, unless the factor of a GradScaler, known in backward, is in it before it is
rounded.

The default was chosen by measurement (docs/memory.md).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

SCHEDULES = ("one_pass", "recompute")
DEFAULT = "one_pass"
VARIABLE = "COARSE_KERNELS_SCHEDULE"

_forced: str | None = None


@contextlib.contextmanager
def use_schedule(name: str | None) -> Iterator[None]:
    """Take schedule ``name`` ("one_pass" or "recompute") in this block; None: that of COARSE_KERNELS_SCHEDULE, or
    the default. Process-wide while it lasts.

    Raises:
        ValueError: there is no such schedule.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def current() -> str:
    """`use_schedule`, else environment variable COARSE_KERNELS_SCHEDULE, else the default."""
    if _forced is not None:
        return _forced
    return _checked(os.environ.get(VARIABLE) or None, VARIABLE) or DEFAULT


def _checked(name: str | None, said: str = "schedule") -> str | None:
    if name is not None and name not in SCHEDULES:
        raise ValueError(f"{said}: expected one of {SCHEDULES}, got {name!r}")
    return name
