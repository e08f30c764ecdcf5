"""Hugging Face SegFormer, whose logits are at a quarter of the resolution: no logits at full resolution anywhere.

    pip install transformers
    python examples/segformer.py --size 256 512

The model's own loss interpolates its logits to the labels; here it is given no labels, and the objective reads its logits where
they are. Random weights; `--weights FOLDER` takes a local folder of `save_pretrained`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from coarse_kernels import ConfusionHead, Drawings, annotation_objective, label_map, uniform_transition

CLASSES = 19


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--size", type=int, nargs=2, default=(256, 512), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--weights")
    parser.add_argument("--small", action="store_true", help="two blocks and few channels, to see that it runs")
    config = parser.parse_args(arguments)

    torch.manual_seed(0)
    if config.weights is not None:
        model = SegformerForSemanticSegmentation.from_pretrained(
            config.weights, num_labels=CLASSES, ignore_mismatched_sizes=True, local_files_only=True
        )
    else:
        small = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 16}
        model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=CLASSES, **(small if config.small else {})))
    model.train()
    head = ConfusionHead(CLASSES)  # one matrix for all images; a network of its own and channels=... for one a place
    optimizer = torch.optim.AdamW(
        [
            {"params": model.parameters(), "lr": 6e-5, "weight_decay": 0.01},
            {"params": head.parameters(), "lr": 1e-2, "weight_decay": 0.0},
        ]
    )

    size = tuple(config.size)
    image = torch.randn(2, 3, *size)
    positive = torch.randint(0, CLASSES, (2, *size), dtype=torch.uint8)
    negative = torch.randint(0, CLASSES, (2, 2, *size), dtype=torch.uint8)  # two layers
    transition = uniform_transition(CLASSES)
    losses = []
    for step in range(config.steps):
        logits = model(pixel_values=image).logits
        assert logits.shape[2:] == (size[0] // 4, size[1] // 4)
        kinds = [Drawings(positive, head()), Drawings(negative, transition=transition, weight=0.6)]
        loss = annotation_objective(logits, kinds).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step}: loss {losses[-1]:.3f}")
    with torch.no_grad():
        print("label map", tuple(label_map(model.eval()(pixel_values=image).logits, size).shape))
    return losses


if __name__ == "__main__":
    main()
