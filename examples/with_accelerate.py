"""Hugging Face accelerate: several processes and mixed precision around the objective, with one normaliser for all.

    pip install accelerate
    accelerate launch --cpu --num_processes 2 examples/with_accelerate.py

A mean divides by the labelled pixels of its own part of the batch, and parts have different numbers of them. So the loss
is a sum, divided by the labelled pixels of the whole step: how the batch is cut changes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from plain_loop import batch, network  # beside this file

from coarse_kernels import Drawings, annotation_objective


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--mixed-precision", choices=("no", "bf16"), default="no")
    config = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.mixed_precision)
    set_seed(0)  # equal weights on all processes
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(1 + accelerator.process_index)  # and images of their own
    losses = []
    for step in range(config.steps):
        image, labels = (part.to(accelerator.device) for part in batch(4, config.size))
        logits = model(image)  # under autocast; the loss is float32 whatever dtype they have
        labelled = accelerator.reduce((labels != 255).sum().float(), reduction="sum")
        # gradients are averaged over the processes, hence the factor
        whole = labelled / accelerator.num_processes
        loss = annotation_objective(logits, [Drawings(labels, normalizer=whole)]).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), reduction="mean").item())
        if step % 10 == 0:
            accelerator.print(f"step {step}: loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
