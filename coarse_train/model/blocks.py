"""What the networks are made of: convolutions with normalisation, and recomputed activations."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORMS = ("group", "batch")
_GROUPS = 8  # at 16 channels a group still has two, so that it is not constant where the map is a single pixel


def normalisation(channels: int, norm: str) -> nn.Module:
    """Of (B, channels, H, W), over the batch or over `_GROUPS` groups of channels of each image."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {NORMS}, got {norm!r}")
    if norm == "batch":
        return nn.BatchNorm2d(channels)
    return nn.GroupNorm(math.gcd(channels, _GROUPS), channels)


def convolution(
    channels_in: int, channels_out: int, kernel: int = 3, *, stride: int = 1, norm: str = "group"
) -> list[nn.Module]:
    """Convolution, normalisation, ReLU. Shape: (B, channels_in, H, W) -> (B, channels_out, ceil(H / stride), ...)."""
    padding = kernel // 2
    conv = nn.Conv2d(channels_in, channels_out, kernel, stride=stride, padding=padding, bias=False)
    return [conv, normalisation(channels_out, norm), nn.ReLU()]


def run(block: nn.Module, *inputs: Tensor, checkpointing: bool) -> Tensor:
    """``block(*inputs)``; with ``checkpointing`` only the inputs are kept, and backward computes the block again."""
    if not (checkpointing and torch.is_grad_enabled()):
        return block(*inputs)
    counts = any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
    if not counts or torch.compiler.is_compiling():  # compiled, a buffer is written once in any case
        return checkpoint(block, *inputs, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), _statistics_kept(block)

    return checkpoint(block, *inputs, use_reentrant=False, context_fn=contexts)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """The second forward pass must not count the batch again in the running statistics. It must save the same tensors as the
    first, so they stay where they are, and move by nothing."""
    norms = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [(module.momentum, module.num_batches_tracked) for module in norms]
    for module in norms:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, (momentum, tracked) in zip(norms, before, strict=True):
            module.momentum, module.num_batches_tracked = momentum, tracked
