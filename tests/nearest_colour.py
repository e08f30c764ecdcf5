"""A network that reads the answer off the image: a pixel has the class whose colour is nearest. With a checkpoint of it
and a data set painted in those colours, every prediction and every score is known beforehand."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from coarse_train.config import DataConfig, FitConfig, ModelConfig, to_dict
from coarse_train.data import Classes
from coarse_train.model import CoarseModel, build_model
from coarse_train.run import save

# values in label files that are not the classes themselves, so that a missing translation shows
CLASSES = Classes(
    ("ground", "wall", "tree", "sky"), ((20, 20, 20), (200, 30, 30), (30, 200, 30), (30, 30, 200)), (7, 9, 23, 2), (0,)
)

NETWORK = "tests.nearest_colour:nearest_colour"


def nearest_colour(channels: int, num_classes: int) -> nn.Module:
    return nn.Conv2d(channels, num_classes, 1)


def write_checkpoint(path: Path, data: DataConfig, classes: Classes = CLASSES, *, channels: int = 3) -> Path:
    """-|x - c|^2 is a 1x1 convolution but for |x|^2, which is the same for all classes."""
    config = FitConfig(data=data, model=ModelConfig(network=NETWORK))
    model = build_model(config, channels, len(classes), None)
    colours = torch.tensor(classes.colours)[:, :channels] / 255
    with torch.no_grad():
        model.segmentation.get_parameter("weight").copy_(2 * colours[:, :, None, None])
        model.segmentation.get_parameter("bias").copy_(-(colours**2).sum(1))
    return _save(path, config, model, classes, channels)


def write_street_checkpoint(path: Path, data: DataConfig) -> Path:
    """Of a network that knows nothing and whose logits are on a grid of every 4 pixels."""
    config = FitConfig(data=data, model=ModelConfig(network="street", widths=(4, 4, 4, 4)))
    torch.manual_seed(0)
    return _save(path, config, build_model(config, 3, len(CLASSES), None), CLASSES, 3)


def _save(path: Path, config: FitConfig, model: CoarseModel, classes: Classes, channels: int) -> Path:
    content = {
        "config": to_dict(config),
        "classes": asdict(classes),
        "channels": channels,
        "architecture": None,
        "step": 7,
    }
    save(path, {**content, "model": model.state_dict(), "ema": None})
    return path


def write_folder(root: Path, split: str, images: dict[str, tuple[np.ndarray, np.ndarray | None]]) -> Path:
    """A data set "folder" of `CLASSES`. images: name -> (classes (H, W) that are painted, classes of the mask or None)."""
    tables = [
        f'[[class]]\nname = "{name}"\nid = {number}\ncolour = {list(colour)}'
        for name, number, colour in zip(CLASSES.names, CLASSES.ids, CLASSES.colours, strict=True)
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.toml").write_text("\n".join([f"ignore = {list(CLASSES.ignored)}", *tables]))
    for name, (painted, mask) in images.items():
        for folder, array in (("images", CLASSES.paint(painted)), ("masks", None if mask is None else mask)):
            if array is None:
                continue
            path = root / split / folder / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array if folder == "images" else CLASSES.encode(array)).save(path)
    return root


def random_maps(*sizes: tuple[int, int], classes: int = len(CLASSES), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, classes, size, dtype=np.uint8) for size in sizes]
