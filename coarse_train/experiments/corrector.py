"""A baseline: a network R(image, drawing) -> truth, trained on the images that have both, whose output teaches the rest.

R sees one image after the other beside its drawing, one-hot, and learns the dense masks by cross-entropy. Then each other
training image gets labels that are drawn from R's probabilities, pixel by pixel: in expectation the cross-entropy on them is
that on the probabilities themselves (soft labels).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from ..config import FitConfig, replace
from ..data import IGNORE, Source, open_split
from ..data.segmentation import choose_dense, pairs_of
from ..model.unet import UNet
from ..simulate import generator_for
from .redrawn import made_once, write_map


def corrected(config: FitConfig, seed: int, folder: Path, *, lr: float, steps: int) -> FitConfig:
    """``config`` with drawings in ``folder`` in place of its own, made where they are not there: as R reads them, which is
    trained on the masks that the config with this seed reads."""

    def make(train: Path) -> None:
        source = open_split(config.data, "train")
        _draw(_trained(config, source, seed, lr, steps), config, source, seed, train)

    return replace(config, data=replace(config.data, positives=made_once(folder, make)))


def _trained(config: FitConfig, source: Source, seed: int, lr: float, steps: int) -> UNet:
    dense = sorted(choose_dense(source, config.data, seed))
    inputs, masks = [], []
    for index, (_, drawing, mask) in zip(dense, pairs_of(source, config.data, seed, dense), strict=True):
        inputs.append(_input(source.load(index).image, drawing, len(source.classes)))
        masks.append(torch.from_numpy(mask).long())
    torch.manual_seed(seed)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads or 1)
    network = UNet(inputs[0].shape[0], len(source.classes), norm=config.model.norm)
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=config.optim.weight_decay)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rng = np.random.default_rng([seed, 13])
    for _ in range(steps):
        batch = rng.integers(0, len(inputs), config.batch_size)
        windows = [_window(masks[index], config.data.crop, rng) for index in batch]
        images = torch.stack(
            [inputs[index][:, window[0], window[1]] for index, window in zip(batch, windows, strict=True)]
        )
        truth = torch.stack([masks[index][window] for index, window in zip(batch, windows, strict=True)])
        optimizer.zero_grad()
        cross_entropy(network(images), truth, ignore_index=IGNORE).backward()
        optimizer.step()
        falling.step()
    torch.set_num_threads(threads)
    return network.eval()


def _window(mask: Tensor, crop: tuple[int, int] | None, rng: np.random.Generator) -> tuple[slice, slice]:
    height, width = mask.shape
    rows, columns = (height, width) if crop is None else (min(crop[0], height), min(crop[1], width))
    top, left = (int(rng.integers(0, free + 1)) for free in (height - rows, width - columns))
    return slice(top, top + rows), slice(left, left + columns)


def _input(image: np.ndarray, drawing: np.ndarray, classes: int) -> Tensor:
    """(channels + C, H, W): nothing drawn is 0 in all classes."""
    labels = torch.from_numpy(drawing.astype(np.int64))
    drawn = one_hot(torch.where(labels == IGNORE, classes, labels), classes + 1)[..., :classes]
    return torch.cat([torch.from_numpy(image.copy()).movedim(2, 0) / 255, drawn.movedim(2, 0).float()])


@torch.no_grad()
def _draw(network: UNet, config: FitConfig, source: Source, seed: int, folder: Path) -> None:
    for index in range(len(source)):
        ((name, drawing, _),) = pairs_of(source, config.data, seed, [index])
        p = network(_input(source.load(index).image, drawing, len(source.classes))[None])[0].softmax(0)
        below = p.cumsum(0).numpy() < generator_for(seed, name).random(drawing.shape, np.float32)
        labels = below.sum(0).clip(max=len(source.classes) - 1).astype(np.uint8)
        write_map(folder, source, name, labels)
