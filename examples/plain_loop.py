"""The drop-in loss in a plain loop: class logits stay at a quarter of the resolution, labels are at full resolution.

python examples/plain_loop.py --steps 200
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coarse_kernels import Drawings, annotation_objective, label_map

CLASSES = 4


def batch(images: int, size: int) -> tuple[Tensor, Tensor]:
    """Blocks of 16 pixels in the colours of their classes, with noise; a third of the blocks is not drawn (255)."""
    coarse = torch.randint(0, CLASSES, (images, size // 16, size // 16))
    truth = coarse.repeat_interleave(16, 1).repeat_interleave(16, 2)
    colours = torch.eye(CLASSES)[:, :3]  # the last class is black
    image = colours[truth].movedim(-1, 1) + 0.3 * torch.randn(images, 3, size, size)
    drawn = torch.where(torch.rand(coarse.shape) < 1 / 3, 255, coarse)
    return image, drawn.repeat_interleave(16, 1).repeat_interleave(16, 2).to(torch.uint8)


def network() -> nn.Module:
    """Images (B, 3, H, W) to logits (B, CLASSES, H / 4, W / 4)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, CLASSES, 1),
    )


def main(arguments: Sequence[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--size", type=int, default=128, help="of the images, a multiple of 16")
    config = parser.parse_args(arguments)

    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(config.steps):
        image, labels = batch(4, config.size)
        # was: F.cross_entropy(F.interpolate(model(image), labels.shape[1:], mode="bilinear"), labels.long(), ignore_index=255)
        loss = annotation_objective(model(image), [Drawings(labels)]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == config.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    image, labels = batch(8, config.size)
    with torch.no_grad():
        predicted = label_map(model(image), labels.shape[1:])  # was: F.interpolate(...).argmax(1)
    known = labels != 255
    accuracy = (predicted == labels)[known].float().mean().item()
    print(f"pixel accuracy {100 * accuracy:.1f} %")
    return accuracy


if __name__ == "__main__":
    main()
