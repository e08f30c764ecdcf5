"""The small in-memory loop of the demo. Read it top to bottom; `train` is all there is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import Sample
from ..metrics import ConfusionMeter
from ..model import CoarseModel

# (seg_logits (B, C, H, W), cm_logits or None, batch) -> 0-d loss
LossFunction = Callable[[Tensor, Tensor | None, Sample], Tensor]


@dataclass(frozen=True)
class TrainConfig:
    """One run. ``lr`` is the segmentation network's, ``cm_lr`` the annotation network's; both warm up over the first
    ``warmup`` share of the steps, stay until ``hold`` of them are done, and fall to 0 along a cosine. With noisy
    drawings a class may be found only after hundreds of steps, all of which need the full rate."""

    steps: int = 1200
    batch_size: int = 16
    lr: float = 4e-3
    cm_lr: float = 1e-2
    warmup: float = 0.05
    hold: float = 0.6
    evaluations: int = 4
    seed: int = 0


@dataclass(frozen=True)
class History:
    """Scores in percent at ``steps``, and the wall time of training and evaluation together."""

    steps: list[int]
    miou: list[float]
    loss: list[float]
    seconds: float

    @property
    def last(self) -> float:
        return self.miou[-1]

    @property
    def best(self) -> float:
        return max(self.miou)


def train(
    model: CoarseModel,
    loss_function: LossFunction,
    train_set: Dataset[Sample],
    score_set: Dataset[Sample],
    num_classes: int,
    config: TrainConfig,
    on_step: Callable[[float], None] | None = None,
) -> History:
    """Train ``model`` in place and score it on the true masks of ``score_set``, at equal distances, last step included.

    The scores steer nothing. ``on_step`` gets the loss after every step.
    """
    started = time.perf_counter()
    groups = [{"params": list(model.segmentation.parameters()), "lr": config.lr}]
    if model.positive is not None:
        groups.append({"params": list(model.positive.parameters()), "lr": config.cm_lr})
    optimizer = torch.optim.Adam(groups)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, config))
    score_steps = {round(config.steps * (k + 1) / config.evaluations) for k in range(config.evaluations)} - {0}

    steps: list[int] = []
    scores: list[float] = []
    losses: list[float] = []
    running: list[float] = []
    for step, batch in enumerate(_endless(train_set, config), start=1):
        model.train()
        output = model(batch.image)
        loss = loss_function(output.seg_logits, output.positive_cm, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        scheduler.step()

        running.append(loss.item())
        if not math.isfinite(running[-1]):
            raise FloatingPointError(f"the loss became {running[-1]} at step {step}; a lower learning rate may help")
        if on_step is not None:
            on_step(running[-1])
        if step in score_steps:
            steps.append(step)
            scores.append(evaluate(model, score_set, num_classes).mean_iou())
            losses.append(sum(running) / len(running))
            running = []
        if step == config.steps:
            break
    return History(steps, scores, losses, time.perf_counter() - started)


@torch.no_grad()
def evaluate(model: CoarseModel, dataset: Dataset[Sample], num_classes: int, *, batch_size: int = 64) -> ConfusionMeter:
    """Count the segmentation network's predictions against the true masks; the drawings are not looked at."""
    model.eval()
    meter = ConfusionMeter(num_classes)
    for batch in DataLoader(dataset, batch_size=batch_size):
        meter.update(model.segmentation(batch.image).argmax(1), batch.mask)
    return meter


def _endless(dataset: Dataset[Sample], config: TrainConfig) -> Iterator[Sample]:
    """Shuffled batches for ever; the order depends on the seed alone, so that every method sees the same batches."""
    order = torch.Generator().manual_seed(config.seed)
    size = min(config.batch_size, len(dataset))  # type: ignore[arg-type]
    loader = DataLoader(dataset, batch_size=size, shuffle=True, drop_last=True, generator=order)
    while True:
        yield from loader


def _schedule(step: int, config: TrainConfig) -> float:
    """Factor on both learning rates."""
    warm = max(1, round(config.steps * config.warmup))
    held = max(warm, round(config.steps * config.hold))
    if step < held:
        return min(1.0, (step + 1) / warm)
    return 0.5 * (1 + math.cos(math.pi * (step - held) / max(1, config.steps - held)))
