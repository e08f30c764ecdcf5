"""Your own photos and drawings, in Python: check them, train, look at a label map. docs/own-data.md has the commands.

    python examples/own_drawings.py ROOT --out runs/mine
    python examples/own_drawings.py --steps 60                 a folder of made images, which is written first

ROOT as `coarse-train import` writes it: classes.toml, train/{images,positives,negatives}, val/{images,masks}.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, ModelConfig, OptimConfig
from coarse_train.engine import fit
from coarse_train.inference import InferenceConfig, load_model, predict, to_input


def made_folder(root: Path) -> Path:
    """Red discs on green: a stroke on each disc, one on the ground, and "this is not a disc" beside it."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:48, :48]
    for split, number in (("train", 16), ("val", 4)):
        for index in range(number):
            cy, cx = rng.integers(16, 33, 2)
            mask = ((y - cy) ** 2 + (x - cx) ** 2 < 100).astype(np.uint8)
            image = np.where(mask[..., None] == 1, (200, 60, 60), (60, 160, 60)) + rng.normal(0, 20, (48, 48, 3))
            positive = np.full((48, 48), 255, np.uint8)  # nothing drawn
            positive[cy - 4 : cy + 5, cx - 4 : cx + 5], positive[:4] = 1, 0
            negative = np.full((48, 48), 255, np.uint8)
            negative[-4:] = 1
            maps = {"images": image.clip(0, 255).astype(np.uint8), "positives": positive, "negatives": negative}
            for kind, values in ({**maps, "masks": mask} if split == "val" else maps).items():
                (root / split / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(root / split / kind / f"{index}.png")
    (root / "classes.toml").write_text('[[class]]\nname = "ground"\n\n[[class]]\nname = "disc"\n')
    return root


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    config = parser.parse_args(arguments)
    out = config.out or Path(tempfile.mkdtemp()) / "run"
    root = config.root or made_folder(out.parent / "made")

    result = fit(
        FitConfig(
            data=DataConfig(dataset="folder", root=root, flip=True),
            model=ModelConfig(network="unet", widths=(8, 16)),
            positive=DrawingsConfig(cm="none"),  # "global" or "grid" where names are often wrong
            optim=OptimConfig(lr=1e-2),  # for a network this small
            steps=config.steps,
            out=out,
        )
    )
    print(f"mean IoU {result.score:.1f} on the masks of val; {result.checkpoint}")

    loaded = load_model(result.checkpoint)
    photo = np.asarray(Image.open(sorted((root / "val" / "images").glob("*.png"))[0]))
    labels = predict(
        loaded.model.segmentation, to_input(photo, loaded.channels, "photo"), InferenceConfig(), len(loaded.classes)
    )
    for name, pixels in zip(
        loaded.classes.names, labels.flatten().bincount(minlength=len(loaded.classes)).tolist(), strict=True
    ):
        print(f"{name}: {pixels} pixels of the first photo of val")
    return result.score


if __name__ == "__main__":
    main()
