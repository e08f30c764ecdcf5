"""The fused C++ kernels (csrc/cpu). Instruction set chosen at run time: `coarse_kernels._native.cpu_info()`."""

from __future__ import annotations

from torch import Tensor

from .. import native
from ..checks import Stream
from . import operator


class CpuBackend:
    name = "cpu"
    device_types: tuple[str, ...] = ("cpu",)

    def unavailable(self) -> str | None:
        return native.operators_reason()

    def unsupported(self, stream: Stream) -> str | None:
        return None

    def labelled_weight(self, stream: Stream) -> Tensor:
        return operator.labelled_weight(stream)

    def nll_sum(self, stream: Stream, scale: Tensor | None, loss_scale: float) -> tuple[Tensor, Tensor, Tensor]:
        return operator.nll_sum(stream, scale, loss_scale)

    def nll_map(self, stream: Stream) -> tuple[Tensor, Tensor, Tensor]:
        return operator.nll_map(stream)

    def posterior(self, stream: Stream) -> Tensor:
        return operator.posterior(stream)


BACKEND = CpuBackend()
