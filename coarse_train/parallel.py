"""The networks of a run over one process or many: DDP or FSDP2 around them, their moving average, whole states in and out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .config import FitConfig
from .distributed import World
from .model import CoarseModel

_SHARD_FROM = 1_000_000  # parameters of a block that is gathered on its own; smaller ones go with what contains them
_ON_CPU = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)  # the main process gets it
_EVERYWHERE = dcp.StateDictOptions(full_state_dict=True)
_PARTIAL = dcp.StateDictOptions(
    full_state_dict=True, strict=False
)  # a parameter without gradient has no optimizer state


class Networks:
    """``model`` has the parameters, ``call`` is what training calls (the same, or DDP around it).

    Where FSDP shards the parameters, ``model`` has shards, and what is scored is a whole copy that is filled when asked for.
    """

    def __init__(self, model: CoarseModel, config: FitConfig, world: World):
        sharded = config.fsdp and world.size > 1
        self.model = model
        self._whole = copy.deepcopy(model) if sharded else None
        self._average = None if config.optim.ema is None else copy.deepcopy(model).requires_grad_(False)
        self._decay = config.optim.ema
        if config.compile:
            model.compile()
        self.call: nn.Module = model
        if sharded:
            self.call = _shard(model)
            if self._average is not None:
                _shard(self._average)
        elif world.size > 1:
            on_gpu = world.device.type == "cuda"
            foreign = ":" in config.model.network  # may have parameters that it does not use
            devices = [world.device] if on_gpu else None
            self.call = DistributedDataParallel(model, device_ids=devices, find_unused_parameters=foreign)

    @contextmanager
    def synchronised(self, now: bool) -> Iterator[None]:
        """Backward within exchanges gradients only if ``now``: accumulation needs it once a step."""
        if isinstance(self.call, DistributedDataParallel) and not now:
            with self.call.no_sync():
                yield
            return
        if isinstance(self.call, FSDPModule):
            self.call.set_requires_gradient_sync(now)
        yield

    @torch.no_grad()
    def update_average(self) -> None:
        """After a step: parameters by the decay, buffers as they are. Nothing where there is no average."""
        if self._average is None or self._decay is None:
            return
        update = get_ema_multi_avg_fn(self._decay)
        update(list(self._average.parameters()), list(self.model.parameters()), 0)
        for mine, current in zip(self._average.buffers(), self.model.buffers(), strict=True):
            mine.copy_(current)

    def scored(self) -> CoarseModel:
        """What is scored and kept: the moving average where there is one. Every process has to call."""
        kept = self.model if self._average is None else self._average
        if self._whole is None:
            if isinstance(
                self.call, DistributedDataParallel
            ):  # running statistics are each process's own until it steps
                for buffer in kept.buffers():
                    dist.broadcast(buffer, 0)
            return kept
        self._whole.load_state_dict(dcp.get_model_state_dict(kept, options=_EVERYWHERE))
        return self._whole

    def state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Whole tensors on the CPU, by the names of the parameters, so that any number of processes can go on from them. Every
        process has to call; the main one gets them."""
        return {
            "model": self.parameters(),
            "optimizer": dict(dcp.get_optimizer_state_dict(self.model, optimizer, options=_ON_CPU)),
            "ema": None if self._average is None else dict(dcp.get_model_state_dict(self._average, options=_ON_CPU)),
        }

    def parameters(self) -> dict[str, Any]:
        """The part of `state` that is called "model"."""
        return dict(dcp.get_model_state_dict(self.model, options=_ON_CPU))

    def load(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
        """What `state` gave."""
        settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
        dcp.set_model_state_dict(self.model, state["model"], options=_EVERYWHERE)
        if state["optimizer"]["state"]:  # plain SGD keeps none
            dcp.set_optimizer_state_dict(self.model, optimizer, state["optimizer"], options=_PARTIAL)
        for group, setting in zip(optimizer.param_groups, settings, strict=True):
            group.update(setting)  # rates and the like are those of the config, which may have been changed
        if self._average is not None:
            dcp.set_model_state_dict(self._average, state["ema"], options=_EVERYWHERE)


def _shard(model: nn.Module) -> nn.Module:
    """FSDP2, in place: large blocks of sequences one by one, then what is left."""
    for parent in list(model.modules()):
        if isinstance(parent, (nn.Sequential, nn.ModuleList)):
            for block in parent:
                if sum(p.numel() for p in block.parameters()) >= _SHARD_FROM and not isinstance(block, nn.ModuleList):
                    fully_shard(block)
    fully_shard(model)
    return model
