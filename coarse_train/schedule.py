"""What a step learns from and how fast: the phases of a run, its optimizer, its learning rates. Functions of the step alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .config import DataConfig, FitConfig, OptimConfig
from .data import Source, Subset
from .data.segmentation import choose_dense
from .model import CoarseModel, parameter_groups


@dataclass(frozen=True)
class Phase:
    """The steps after ``first`` up to ``last``: what is read in them, and the factor on all learning rates. Each phase has the
    whole schedule for itself, warm-up and fall."""

    first: int
    last: int
    source: Source
    data: DataConfig
    rate: float = 1.0


def plan_phases(config: FitConfig, source: Source, masks: Source | None = None) -> list[Phase]:
    """One, or two where masks come after drawings (supervision then-masks): those of ``masks``, or of training images."""
    data, steps = config.data, config.steps
    if not data.supervision.endswith("masks"):
        return [Phase(0, steps, source, data)]
    of_masks = masks
    if of_masks is None:
        chosen = sorted(choose_dense(source, data, config.seed))
        of_masks = source if len(chosen) == len(source) else Subset(source, chosen)
    on_masks = replace(data, supervision="masks", dense_images=0, dense_share=None)
    if data.supervision == "masks":
        return [Phase(0, steps, of_masks, on_masks)]
    if steps < 2:
        raise ValueError(f"steps: expected at least 2 with supervision {data.supervision}, got {steps}")
    first = min(steps - 1, max(1, round(steps * (1 - config.optim.finetune))))
    before = replace(data, supervision="mixed" if data.supervision == "mixed-then-masks" else "drawings")
    lr = config.optim.finetune_lr
    rate = 0.25 if lr is None else lr / config.optim.lr if config.optim.lr else 0.0
    return [Phase(0, first, source, before), Phase(first, steps, of_masks, on_masks, rate)]


def make_optimizer(model: CoarseModel, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or SGD with Nesterov momentum. Each group keeps its own rate as ``base_lr``, which `set_rates` scales."""
    groups = [{**group, "base_lr": group["lr"]} for group in parameter_groups(model, config)]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0)
    return torch.optim.AdamW(groups)


def set_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, phase: Phase, step: int) -> float:
    """Learning rates of ``step`` (counted from 1 over all phases); returns that of the first group."""
    factor = phase.rate * schedule(step - 1 - phase.first, phase.last - phase.first, config)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def schedule(step: int, steps: int, config: OptimConfig) -> float:
    """Factor on the rates at ``step`` (counted from 0): linear warm-up, 1 until ``hold``, then cosine or poly down to 0."""
    warm = max(1, round(steps * config.warmup))
    held = max(warm, round(steps * config.hold))
    if step < held or config.schedule == "constant":
        return min(1.0, (step + 1) / warm)
    done = (step - held) / max(1, steps - held)
    return (1 - done) ** 0.9 if config.schedule == "poly" else 0.5 * (1 + math.cos(math.pi * done))
