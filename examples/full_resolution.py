"""One training step at 1024x2048 with 19 classes: matrices for every 8x8 pixels on the positive drawings, negatives trusted.

    python examples/full_resolution.py               ours
    python examples/full_resolution.py --plain       upsampled logits and a matrix a pixel, in plain PyTorch: many gigabytes

Prints the seconds of a step and the peak memory of the process, which has to be a new one for each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

import torch
from torch import nn

from coarse_kernels import ConfusionHead, Drawings, annotation_objective, uniform_transition

CLASSES = 19


def encoder(channels: int) -> nn.Module:
    """Images to ``channels`` features at stride 4."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, channels, 3, padding=1),
    )


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--plain", action="store_true", help="by the backend `reference`")
    config = parser.parse_args(arguments)

    torch.manual_seed(0)
    segmentation = encoder(CLASSES)
    annotation = encoder(16)  # another network: a shared one would let the matrices absorb the objects
    head = ConfusionHead(CLASSES, channels=16, stride=2)
    networks = [*segmentation.parameters(), *annotation.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": networks}, {"params": head.parameters(), "weight_decay": 0.0}],  # it would pull the diagonal to 0
        lr=1e-3,
    )

    size = tuple(config.size)
    image = torch.randn(1, 3, *size)
    positive = torch.randint(0, CLASSES, (1, *size), dtype=torch.uint8)
    negative = torch.randint(0, CLASSES, (1, *size), dtype=torch.uint8)
    started = time.perf_counter()
    kinds = [
        Drawings(positive, head(torch.relu(annotation(image)))),
        Drawings(negative, transition=uniform_transition(CLASSES)),
    ]
    backend = "reference" if config.plain else None
    loss = annotation_objective(segmentation(image), kinds, backend=backend).loss
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - started
    print(f"{size[0]}x{size[1]}: loss {loss.item():.3f}, {seconds:.2f} s, peak {peak()}")
    return loss.item()


def peak() -> str:
    if sys.platform == "win32":
        return "unknown"
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
