"""One optimizer step: passes forward and backward, over all processes, and what they do to the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import run
from .config import FitConfig
from .criterion import Counts, Criterion
from .data import Sample
from .distributed import World
from .model import CoarseModel
from .schedule import Phase, make_optimizer, set_rates

_LEAST_SCALE = 2.0**-10  # of float16 losses: it begins at 65536, and such a gradient is no accident any more
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_ADVICE = "A lower --lr or --cm-lr, or --precision bf16 instead of fp16, may help"


class NonFiniteStep(FloatingPointError):
    """The loss or the gradient of a step is not finite, where the message names the file with the batch, or a parameter after
    it."""


class Taken(NamedTuple):
    """A step that was taken.

    values: its loss, the share of each kind of drawings, rate and norm. labelled: whether one pixel of it had a label.
    left_out: whether float16 overflowed, so that it changed nothing.
    """

    values: dict[str, float]
    labelled: bool
    left_out: bool


class Learner:
    """What the steps of a run change, and how: networks, optimizer, and the scale of float16 losses."""

    def __init__(self, config: FitConfig, world: World, model: CoarseModel, class_weights: Mapping[str, Tensor]):
        from .parallel import Networks  # takes a second, which commands that do not train need not wait for

        self.networks = Networks(model, config, world)
        self._config, self._world = config, world
        self._optimizer = make_optimizer(model, config.optim)
        self._scaler = torch.amp.GradScaler(world.device.type, enabled=config.precision == "fp16")
        self._criterion = Criterion(config, class_weights)

    def state(self) -> dict[str, Any]:
        """For a checkpoint. Every process has to call; the main one gets it."""
        return {"scaler": self._scaler.state_dict(), **self.networks.state(self._optimizer)}

    def load(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.networks.load(self._optimizer, state)
        if state["scaler"]:  # empty: of a run that was not in float16 until now
            self._scaler.load_state_dict(state["scaler"])

    def step(self, number: int, phase: Phase, passes: Sequence[Sample]) -> Taken:
        """``passes``: the batches of this process. Raises `NonFiniteStep` after they have been saved in the run folder."""
        config, world, networks, scaler = self._config, self._world, self.networks, self._scaler
        torch.manual_seed(step_seed(config.seed, number, world.rank))
        networks.call.train()
        rate = set_rates(self._optimizer, config.optim, phase, number)
        # Counted before the first backward: the mean is over the whole step, all passes and all ranks.
        counts = Counts(*world.sum(torch.stack([self._criterion.count(batch) for batch in passes]).sum(0)).tolist())
        parts = torch.zeros(4, device=world.device)
        for place, batch in enumerate(passes, start=1):
            batch = Sample(*(field.to(world.device, non_blocking=True) for field in batch))
            with networks.synchronised(place == len(passes)):
                with torch.autocast(world.device.type, _DTYPES[config.precision], config.precision != "fp32"):
                    output = networks.call(batch.image)
                part = self._criterion(output, batch, counts, scale=world.size)  # ranks average their gradients
                del output  # nor does the loss hold the logits: their gradients are formed
                scaler.scale(part.loss).backward()
            parts += torch.stack([part.loss.detach() / world.size, *part[1:]])
        loss, *nll = world.sum(parts).tolist()
        scaler.unscale_(self._optimizer)
        parameters = networks.model.parameters()
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, config.optim.clip or math.inf))
        # float16 overflows now and then: its scaler leaves such a step out and halves the scale, until there is none left
        overflows = scaler.is_enabled() and scaler.get_scale() > _LEAST_SCALE
        if not math.isfinite(loss) or not (math.isfinite(norm) or overflows):
            raise NonFiniteStep(self._keep_bad_step(number, loss, norm, passes))
        scaler.step(self._optimizer)
        scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        networks.update_average()
        shares = {f"{name}_nll": x for name, x, n in zip(Counts._fields, nll, counts, strict=True) if n}
        values = {"loss": loss, **shares, "lr": rate, "grad_norm": norm}
        return Taken(values, labelled=any(counts), left_out=not math.isfinite(norm))

    def check(self, number: int) -> None:
        """Before step ``number`` is scored or kept: raises `NonFiniteStep` where a finite gradient has driven a parameter out
        of its range, which the next loss would show, if there were one. Every process has to call."""
        bad = []
        for name, parameter in self.networks.model.named_parameters():
            own = getattr(parameter, "to_local", lambda p=parameter: p)().detach()
            # a matrix of an earlier version may have started at -inf, an entry that is 0
            fine = own.isfinite() if name.startswith("segmentation.") else own < math.inf
            bad.append((~fine).any())
        if self._world.sum(torch.stack(bad).any().double()):
            raise NonFiniteStep(
                f"parameters became inf or NaN in step {number}, which is neither scored nor kept. {_ADVICE}"
            )

    def _keep_bad_step(self, number: int, loss: float, norm: float, passes: Sequence[Sample]) -> str:
        """Save what the step saw on this rank, and on the main one the parameters before it; returns the message."""
        path = self._config.out / f"nonfinite_step{number}_rank{self._world.rank}.pt"
        batch = [batch._asdict() for batch in passes]
        content = {"step": number, "loss": loss, "grad_norm": norm, "batch": batch, "model": self.networks.parameters()}
        what = f"the loss became {loss}" if not math.isfinite(loss) else f"the norm of the gradient became {norm}"
        try:
            run.save(path, content)
            where = f"its batch is in {path}"
        except run.CheckpointError as error:
            where = str(error)
        return f"{what} at step {number}; {where}. {_ADVICE}"


def step_seed(seed: int, step: int, rank: int) -> int:
    """Of the random numbers of a step (dropout): no generator has to be kept in a checkpoint."""
    return (seed * 1_000_003 + step) * 4_099 + rank
