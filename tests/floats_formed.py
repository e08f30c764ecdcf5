"""What a piece of code calls and how large the tensors are that it forms, seen from outside of the operators."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class FloatsFormed(TorchDispatchMode):
    """``largest``: numbers in the largest tensor of floating-point numbers. ``calls``: of each operator, by its full name."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[str(func.overloadpacket)] += 1
        sizes = (t.numel() for t in tree_leaves(out) if isinstance(t, Tensor) and t.is_floating_point())
        self.largest = max(self.largest, *sizes, 0)
        return out


def assert_most_probable(labels: Tensor, logits: Tensor) -> None:
    """``labels`` (B, H, W) are the argmax of the interpolated ``logits`` (B, C, h, w), wherever that is no close call."""
    full = torch.nn.functional.interpolate(logits.double(), labels.shape[1:], mode="bilinear", align_corners=False)
    first, second = full.topk(2, 1).values.unbind(1)
    clear = first - second > 1e-5 * first.abs()
    assert clear.double().mean() > 0.99
    assert torch.equal(labels[clear].long(), full.argmax(1)[clear])
