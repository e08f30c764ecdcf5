"""What is timed: the cases with the bars they are held to, and the inputs of a case."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor

from coarse_kernels import uniform_transition

from . import baselines

TRACE_WEIGHT = 0.01


@dataclasses.dataclass(frozen=True)
class Case:
    """One row group of the table: every contestant on the same inputs in one process."""

    name: str
    classes: int
    height: int
    width: int
    stride: int = 1
    dtype: str = "float32"
    stream: str = "positive"  # positive | negative (uniform transition) | both (the objective, a field for each)
    labels: str = "blobs"  # blobs: drawings of 16 pixels, a tenth not drawn | random: each pixel labelled on its own
    mode: str = "forward+backward"  # forward+backward | forward (under no_grad)
    buffers: str = "reused"  # reused | fresh: README.md
    contestants: tuple[str, ...] = ()  # of `baselines`; "compiled:<name>[:<mode>]"
    schedules: tuple[str, ...] = ("one_pass",)  # of ours; the first is what ratios are taken against
    threads: tuple[int, ...] = (1,)  # of ours; baselines run on the first
    bars: tuple[tuple[str, float], ...] = ()  # ("published" | "plain" | "compiled" | "threads", least ratio)
    scale: float = 2.0  # standard deviation of the logits
    device: str = "cpu"
    full_only: bool = False

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def grid(self) -> tuple[int, int]:
        return self.height // self.stride, self.width // self.stride

    @property
    def itemsize(self) -> int:
        return torch.empty(0, dtype=getattr(torch, self.dtype)).element_size()

    @property
    def cm_bytes(self) -> int:
        return self.classes**2 * self.grid[0] * self.grid[1] * self.itemsize

    @property
    def seg_bytes(self) -> int:
        return self.classes * self.pixels * self.itemsize

    @property
    def fields(self) -> int:
        """Confusion-matrix fields, and label maps: one per stream."""
        return 2 if self.stream == "both" else 1

    @property
    def logit_bytes(self) -> int:
        """Of all logits; of all gradients as well."""
        return self.fields * self.cm_bytes + self.seg_bytes

    @property
    def ideal_bytes(self) -> int:
        """Each logit read once, each gradient written once, each label (a byte) read once.

        F fields on a grid of h x w, an image of H x W, b bytes per logit, forward + backward:

            2 b (F C C h w + C H W) + F H W

        Both streams read the class logits and have a gradient for them; at the least that is one read and one write.
        """
        passes = 2 if self.mode == "forward+backward" else 1
        return passes * self.logit_bytes + self.fields * self.pixels


def _bars(published: float, plain: float, compiled: float | None = None) -> tuple[tuple[str, float], ...]:
    bars = (("published", published), ("plain", plain))
    return bars if compiled is None else (*bars, ("compiled", compiled))


_PIXEL = ("published", "log_space", *baselines.PLAIN)
_STRIDED = ("published", *baselines.PLAIN_STRIDED)
# The two that win somewhere; --full compiles the third, and tries max-autotune.
_COMPILED = ("compiled:softmax_gather", "compiled:softmax_rows")
_BOTH = ("one_pass", "recompute")

CASES: tuple[Case, ...] = (
    Case("c2", 2, 256, 512, contestants=_PIXEL + _COMPILED, bars=_bars(25, 10, 10)),
    Case("c10", 10, 128, 256, contestants=_PIXEL + _COMPILED, bars=_bars(25, 10, 4.5)),
    Case("c19", 19, 128, 256, contestants=_PIXEL + _COMPILED, bars=_bars(25, 12, 6), schedules=_BOTH),
    Case(
        "c19-large-fresh",
        19,
        256,
        512,
        buffers="fresh",
        contestants=("published", *baselines.PLAIN, "compiled:softmax_rows"),
        bars=_bars(10, 5),
        schedules=_BOTH,
    ),
    Case(
        "c19-stride8",
        19,
        256,
        512,
        8,
        contestants=(*_STRIDED, "compiled:softmax_rows"),
        bars=_bars(40, 45),
        schedules=_BOTH,
    ),
    Case(
        "c19-stride4",
        19,
        256,
        512,
        4,
        contestants=(*_STRIDED, "compiled:softmax_rows"),
        bars=_bars(25, 25),
    ),
    Case("c19-forward", 19, 128, 256, mode="forward", contestants=_PIXEL),
    Case("c19-stride8-forward", 19, 256, 512, 8, mode="forward", contestants=_STRIDED),
    Case("c19-negative", 19, 128, 256, stream="negative", contestants=("published", *baselines.PLAIN)),
    Case(
        "c19-stride8-negative",
        19,
        256,
        512,
        8,
        stream="negative",
        contestants=("published", *baselines.PLAIN_STRIDED),
        full_only=True,
    ),
    # Ours alone. A baseline in bfloat16 would not compute in float32, so it is another computation.
    Case("c19-bfloat16", 19, 128, 256, dtype="bfloat16"),
    Case("c19-threads", 19, 256, 512, threads=(1, 2), bars=(("threads", 1.8),)),
    Case("c19-stride8-threads", 19, 256, 512, 8, threads=(1, 2), bars=(("threads", 1.8),)),
    Case("c19-large", 19, 256, 512, contestants=_PIXEL, schedules=_BOTH, full_only=True),
    # Logits at which probabilities underflow: kernels take their log-space path, and no clamped baseline is right.
    Case("c19-extreme", 19, 128, 256, scale=40.0, contestants=("log_space",), full_only=True),
    Case("c33", 33, 64, 128, contestants=("published", *baselines.PLAIN), full_only=True),
)

# Seconds of work in total: tests and a first look. Only run when named.
SMOKE = Case("smoke", 3, 16, 32, 4, contestants=("published", "softmax_gather", "closed_form_matmul"), bars=_bars(1, 1))


def with_full_contestants(case: Case) -> Case:
    """--full: every formulation is compiled, in every mode, wherever one is."""
    if not any(name.startswith("compiled") for name in case.contestants):
        return case
    eager = tuple(name for name in case.contestants if not name.startswith("compiled"))
    every = tuple(f"compiled:{name}:{mode}" for name in baselines.COMPILED for mode in baselines.COMPILE_MODES)
    return dataclasses.replace(case, contestants=eager + every)


class Inputs(NamedTuple):
    """One stream, in the order of a `baselines.Formulation`."""

    seg_logits: Tensor
    cm_logits: Tensor
    labels: Tensor
    transition: Tensor | None


class BothInputs(NamedTuple):
    """The objective, in the order of a `baselines.Objective`. The transition is that of the negative stream."""

    seg_logits: Tensor
    cm_logits: Tensor
    labels: Tensor
    negative_cm: Tensor
    negative_labels: Tensor
    transition: Tensor


AnyInputs = Inputs | BothInputs


def leaves(inputs: AnyInputs) -> dict[str, Tensor]:
    """What may want a gradient, by the name that its error has."""
    found = {"seg": inputs.seg_logits, "cm": inputs.cm_logits}
    return {**found, "negative_cm": inputs.negative_cm} if isinstance(inputs, BothInputs) else found


def make_inputs(case: Case, seed: int = 0) -> AnyInputs:
    """Random logits, and labels as coarse drawings have them: blobs of 16 pixels, one in ten of them not drawn.

    Blobs matter: labels that change from pixel to pixel slow gathers down. A case with random labels measures just that,
    with every pixel labelled. Drawn on the device: fields are gigabytes there.
    """
    generator = torch.Generator(case.device).manual_seed(seed)
    where: dict[str, Any] = {"generator": generator, "device": case.device}
    dtype = getattr(torch, case.dtype)
    wants_grad = case.mode == "forward+backward"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, **where).mul_(case.scale)

    def drawing() -> Tensor:
        edge = 16 if case.labels == "blobs" else 1
        blobs = (1, -(-case.height // edge), -(-case.width // edge))
        labels = torch.randint(0, case.classes, blobs, dtype=torch.uint8, **where)
        if case.labels == "random":
            return labels
        labels[torch.rand(blobs, **where) < 0.1] = baselines.IGNORE
        labels = labels.repeat_interleave(edge, 1).repeat_interleave(edge, 2)
        labels = labels[:, : case.height, : case.width].contiguous()
        # both kinds, however small the case
        labels[0, 0, :2] = torch.tensor([0, baselines.IGNORE], dtype=torch.uint8, device=case.device)
        return labels

    def field() -> Tensor:
        cm = normal(1, case.classes, case.classes, *case.grid)
        cm += 2.0 * torch.eye(case.classes, device=case.device)[:, :, None, None]  # right more often than not
        return cm.to(dtype).requires_grad_(wants_grad)

    seg = normal(1, case.classes, case.height, case.width).to(dtype).requires_grad_(wants_grad)
    cm, labels = field(), drawing()
    transition = None if case.stream == "positive" else uniform_transition(case.classes, device=case.device)
    if case.stream != "both":
        return Inputs(seg, cm, labels, transition)
    assert transition is not None
    return BothInputs(seg, cm, labels, field(), drawing(), transition)
