"""Images for the tests of networks."""

from __future__ import annotations

import torch
from torch import Tensor

ODD = (37, 53)  # no multiple of anything


def make_image(batch: int = 2, size: tuple[int, int] = ODD, seed: int = 0) -> Tensor:
    """(batch, 3, *size) in [0, 1], the same for equal seeds."""
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed))
