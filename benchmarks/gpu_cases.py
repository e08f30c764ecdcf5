"""What is timed on a GPU, in the order in which it is timed, and the targets.

The rows that a target names come first: device time is short. ``full_only`` cases complete the product of dtype, classes,
size, grid and mode.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

from . import baselines
from .cases import Case

_PIXEL = ("published", "log_space", *baselines.PLAIN, *baselines.PLAIN_UNIFORM)
_STRIDED = ("published", *baselines.PLAIN_STRIDED, *baselines.PLAIN_UNIFORM_STRIDED)
# One autograd formulation and one with the gradient by hand for each transition; --full compiles more.
_COMPILED = (
    "compiled:softmax_gather",
    "compiled:closed_form",
    "compiled:softmax_rows_uniform",
    "compiled:closed_form_uniform",
)
_COMPILED_FULL = (
    *_COMPILED,
    "compiled:log_space",
    "compiled:softmax_rows",
    "compiled:closed_form_uniform:max-autotune-no-cudagraphs",
)

SIZES = {"large": (1024, 2048), "small": (512, 1024)}


def _case(
    classes: int,
    size: str = "large",
    stride: int = 1,
    dtype: str = "float32",
    stream: str = "both",
    *,
    compile: bool = False,
    mode: str = "forward+backward",
    labels: str = "blobs",
) -> Case:
    height, width = SIZES[size]
    words = [f"c{classes}", f"{height}x{width}", "pixel" if stride == 1 else f"stride{stride}", dtype, stream]
    words += [word for word in (mode, labels) if word not in ("forward+backward", "blobs")]
    eager = _PIXEL if stride == 1 else _STRIDED
    if stream == "positive":  # there the uniform formulations are the others again
        eager = tuple(name for name in eager if "uniform" not in name)
    return Case(
        "-".join(words),
        classes,
        height,
        width,
        stride,
        dtype,
        stream,
        contestants=eager + (_COMPILED if compile else ()),
        mode=mode,
        labels=labels,
        # without gradients there is one schedule
        schedules=("one_pass",) if mode == "forward" else ("one_pass", "recompute"),
        device="cuda",  # whose allocator reuses buffers, as `buffers` has it by default
    )


_DEFAULT: tuple[Case, ...] = (
    # the rows that the targets name
    _case(19, compile=True),
    _case(19, dtype="bfloat16", compile=True),
    _case(19, stride=8, compile=True),
    # other grids, classes, modes
    _case(19, stride=8, dtype="bfloat16"),
    _case(19, stride=4),
    _case(11, compile=True),
    _case(2, compile=True),
    _case(19, mode="forward"),
    _case(19, stride=8, mode="forward"),
    # run time depends on the labels: every pixel labelled, and each on its own
    _case(19, labels="random"),
    _case(19, stride=8, labels="random"),
    # one stream alone
    _case(19, stream="positive"),
    _case(19, stream="negative"),
    _case(19, stride=8, stream="positive"),
    _case(11, stride=8),
    _case(2, stride=8),
    _case(11, dtype="bfloat16"),
    _case(2, dtype="bfloat16"),
    # a quarter of the pixels: launches and tails weigh more
    _case(19, "small"),
    _case(19, "small", dtype="bfloat16"),
    _case(19, "small", stride=8),
    _case(19, "small", stride=4),
    _case(11, "small"),
    _case(2, "small"),
    _case(2, "small", stride=8),
)


def _product() -> tuple[Case, ...]:
    axes = itertools.product(SIZES, (19, 11, 2), (1, 8, 4), ("float32", "bfloat16"), ("forward+backward", "forward"))
    return tuple(
        _case(classes, size, stride, dtype, mode=mode, compile=mode != "forward")
        for size, classes, stride, dtype, mode in axes
    )


_KNOWN = {case.name for case in _DEFAULT}
CASES: tuple[Case, ...] = (
    *_DEFAULT,
    *(dataclasses.replace(case, full_only=True) for case in _product() if case.name not in _KNOWN),
)

# Seconds on a CPU: tests, and a look at the tables. Only run when named.
_SMOKE = ("published", "softmax_gather", "closed_form_uniform")
SMOKE: tuple[Case, ...] = (
    Case("smoke-pixel", 3, 16, 24, 1, "float32", "both", contestants=_SMOKE, schedules=("one_pass", "recompute")),
    Case("smoke-stride8", 3, 64, 96, 8, "float32", "both", contestants=(*_SMOKE, "closed_form_uniform_matmul")),
    Case("smoke-bfloat16", 3, 16, 24, 1, "bfloat16", "both", contestants=_SMOKE),
    Case("smoke-forward", 3, 16, 24, 1, "float32", "negative", "random", "forward", contestants=_SMOKE),
)

BY_NAME = {case.name: case for case in (*CASES, *SMOKE)}


def chosen_contestants(case: Case, *, compile: bool, full: bool) -> Case:
    """Without torch.compile, or with more of it, where a case has any."""
    eager = tuple(name for name in case.contestants if not name.startswith("compiled"))
    if len(eager) == len(case.contestants) or (compile and not full):
        return case
    return dataclasses.replace(case, contestants=eager + (_COMPILED_FULL if compile else ()))


class Target(NamedTuple):
    """A figure that a case is held to. ``what``: see `gpu_report.MEASURES`."""

    case: str
    what: str
    bound: float


_PIXEL_FLOAT32, _PIXEL_BFLOAT16, _STRIDE_8 = (case.name for case in _DEFAULT[:3])

# On an H200, at 1024x2048 with 19 classes, both streams, forward + backward.
TARGETS: tuple[Target, ...] = (
    Target(_PIXEL_FLOAT32, "ms", 3.4),
    Target(_PIXEL_FLOAT32, "copy", 0.85),
    Target(_PIXEL_FLOAT32, "plain", 10.0),
    Target(_PIXEL_FLOAT32, "compiled", 3.0),
    Target(_PIXEL_BFLOAT16, "ms", 1.8),
    Target(_PIXEL_BFLOAT16, "copy", 0.80),
    Target(_PIXEL_BFLOAT16, "plain", 10.0),
    Target(_PIXEL_BFLOAT16, "compiled", 3.0),
    Target(_STRIDE_8, "ms", 0.8),
    Target(_STRIDE_8, "plain", 40.0),
    Target(_STRIDE_8, "compiled", 15.0),
    Target(_STRIDE_8, "peak_gb", 0.5),
    Target(_STRIDE_8, "memory", 30.0),
    Target(_PIXEL_FLOAT32, "triton", 1.5),
    Target(_PIXEL_BFLOAT16, "triton", 1.5),
)
SMOKE_TARGETS: tuple[Target, ...] = (
    Target("smoke-pixel", "ms", 1e9),
    Target("smoke-pixel", "copy", 1e9),
    Target("smoke-pixel", "plain", 1e-9),
    Target("smoke-pixel", "compiled", 3.0),
    Target("smoke-stride8", "peak_gb", 1e9),
    Target("smoke-stride8", "memory", 1e9),
    Target("smoke-pixel", "triton", 1.5),
)
TARGET_CASE_NAMES = tuple(dict.fromkeys(target.case for target in TARGETS))
