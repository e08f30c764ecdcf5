"""Three annotators, each with a confusion matrix of their own: two of them mix classes up, one draws little, but is right.

    python examples/annotators.py

Prints the matrix of each as it is learned, beside the one that the drawings were made with.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coarse_kernels import ConfusionHead, Drawings, annotation_objective

CLASSES, FEATURES = 4, 8
# p(drawn i | true j), columns sum to 1. The first calls most of class 1 "2"; the second half of class 3 "0".
TRUE = torch.stack([torch.eye(CLASSES)] * 2)
TRUE[0, :, 1] = torch.tensor([0.0, 0.4, 0.6, 0.0])
TRUE[1, :, 3] = torch.tensor([0.5, 0.0, 0.0, 0.5])
CAREFUL = 0.1  # the share of the image that the third annotator draws on


def scene(images: int, colours: Tensor, size: int = 32) -> tuple[Tensor, list[Tensor]]:
    """Features (B, FEATURES, size, size) and what the three have drawn."""
    truth = torch.randint(0, CLASSES, (images, size // 4, size // 4))
    drawn = [torch.multinomial(matrix.T[truth.flatten()], 1).view(truth.shape) for matrix in TRUE]
    drawn.append(torch.where(torch.rand(truth.shape) < CAREFUL, truth, 255))
    truth, *drawn = (part.repeat_interleave(4, 1).repeat_interleave(4, 2) for part in (truth, *drawn))
    image = colours[truth].movedim(-1, 1) + 0.5 * torch.randn(images, FEATURES, size, size)
    return image, [layer.to(torch.uint8) for layer in drawn]


def main(arguments: Sequence[str] | None = None) -> Tensor:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    config = parser.parse_args(arguments)

    torch.manual_seed(0)
    colours = torch.randn(CLASSES, FEATURES)
    model = nn.Sequential(nn.Conv2d(FEATURES, 32, 1), nn.ReLU(), nn.Conv2d(32, CLASSES, 1))
    heads = nn.ModuleList([ConfusionHead(CLASSES), ConfusionHead(CLASSES)])
    optimizer = torch.optim.Adam([*model.parameters(), *heads.parameters()], lr=2e-2)
    for step in range(config.steps):
        image, (first, second, third) = scene(8, colours)
        kinds = [Drawings(first, heads[0]()), Drawings(second, heads[1]()), Drawings(third)]
        out = annotation_objective(model(image), kinds)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % 100 == 0:
            print(
                f"step {step}: loss {out.loss.item():.3f}, of each {[round(part.nll.item(), 3) for part in out.parts]}"
            )

    learned = torch.stack([head().detach().squeeze().softmax(0) for head in heads])
    for number, (found, true) in enumerate(zip(learned, TRUE, strict=True), 1):
        print(f"annotator {number}, p(drawn | true): learned, and as it was")
        for row_found, row_true in zip(found.tolist(), true.tolist(), strict=True):
            print("   ", " ".join(f"{x:.2f}" for x in row_found), "  |  ", " ".join(f"{x:.2f}" for x in row_true))
    error = (learned - TRUE).abs()
    print(f"an entry is off by {error.mean():.3f} on average, {error.max():.3f} at most")
    return learned


if __name__ == "__main__":
    main()
