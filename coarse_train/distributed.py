"""One process or many: what `torchrun` started, or a world of one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them; ``device`` is its own."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """The process that writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, on the device of ``values``; the same bits in all of them."""
        if self.size == 1:
            return values
        total = values.to(self.device, copy=True)
        dist.all_reduce(total)
        return total.to(values.device)

    def gather(self, value: Any) -> list[Any]:
        """What every process has, in the order of ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


def _device(name: str) -> torch.device:
    found = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in ("cpu", *found) and not (name == "cuda" and found):
        has = ", ".join(("cpu", *found)) + ("" if found else f" (torch {torch.__version__} sees no GPU)")
        raise ValueError(f"device: expected one of {has}, got {name!r}")
    return torch.device(name)


def _world_size() -> int:
    """Raises ValueError where WORLD_SIZE is there without the rest of what torchrun sets: some schedulers leave it behind."""
    given = os.environ.get("WORLD_SIZE", "1")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"WORLD_SIZE: expected a number of processes, got {given!r}")
    lacking = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if int(given) > 1 and lacking and not dist.is_initialized():
        raise ValueError(
            f"WORLD_SIZE: expected {', '.join(lacking)} beside WORLD_SIZE={given}, got none; start with `torchrun "
            f"--nproc-per-node {given} -m coarse_train ...`, or unset WORLD_SIZE for one process"
        )
    return int(given)


@contextmanager
def join_world(device: str | None = None) -> Iterator[World]:
    """The world that torchrun's environment variables describe. A process group that exists already is used and left alone.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None takes cuda where there is one. With several processes on CUDA each takes
            the GPU of its LOCAL_RANK.
    """
    kind = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = _world_size()
    if kind.type == "cuda" and (size > 1 or kind.index is None):
        kind = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if kind.type == "cuda":
        torch.cuda.set_device(kind)
    if dist.is_initialized():
        yield World(dist.get_rank(), dist.get_world_size(), kind)
    elif size == 1:
        yield World(0, 1, kind)
    else:
        dist.init_process_group("nccl" if kind.type == "cuda" else "gloo")
        try:
            world = World(dist.get_rank(), dist.get_world_size(), kind)
            yield world
            world.wait()  # nobody takes the group down while another still uses it
        finally:
            dist.destroy_process_group()
