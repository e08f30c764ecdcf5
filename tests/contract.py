"""How close to float64 a result has to be: the numbers of the numerics contract, which tests take from here, or say why not.

The measure is the plain PyTorch formulation in the same dtype. Of a loss (relative to max(1, |truth|)) at most `LOSS_FACTOR`
times its error, of a gradient (in the 2-norm) `GRADIENT_FACTOR` times, plus a floor by the dtype that logits are stored in:

    loss_floor(dtype, scale), gradient_floor(dtype, scale)

Of a few numbers plain PyTorch may be lucky. Then the measure is the problem itself: how far the truth moves when every input
moves by at most a unit roundoff of the compute dtype. No formulation in that dtype can be asked for more.

``scale`` is that of the logits, a standard deviation. A float32 logit of size 4 x scale is only known to 3e-8 of that, so an
exponential carries scale x 1e-7 of relative error whatever the formulation: above a scale of 10 floors grow with it.

`python -m tests.contract` prints them as a table.
"""

from __future__ import annotations

import torch

LOSS_FACTOR, GRADIENT_FACTOR = 2.0, 3.0

# Rounding of the mathematics (float), and of the stored gradient (bfloat16, float16).
LOSS_FLOOR = {torch.float32: 5e-7, torch.bfloat16: 5e-7, torch.float16: 5e-7, torch.float64: 1e-14}
GRADIENT_FLOOR = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-13}
# Two results that are both held may be as far apart as both floors: where one of float32 is compared with another, or with
# float64 and nobody asks how far off plain PyTorch is.
LOSS_APART, GRADIENT_APART = 2 * LOSS_FLOOR[torch.float32], 2 * GRADIENT_FLOOR[torch.float32]
SCALES = (10.0, 30.0, 120.0, 1e3, 1e4)
# Logits of +-1e4 beside ordinary ones, on the pixel grid: where two explanations of a label, each a sum of such logits,
# compete, their ratio is known to a few times 1e-3, which is how far float32 numbers of that size are apart.
EXTREME_FLOOR = 4e-3
# Where a transition is 0 nothing bounds the quotients p / D that its gradient adds up: from logits of this scale on, which
# are 88 apart here and there, they leave float32. A `TransitionMatrix` lets nothing of them through to its parameters.
LARGEST_SCALE_OF_WHAT_IS_RULED_OUT = 30.0
# Of a point of a grid that thousands of pixels read, whose shares are added in float32, and mostly cancel.
MANY_SHARES = 1e-6
# float16 gradients of a mean fall among its subnormals unless the loss is scaled, as documented.
FLOAT16_LOSS_SCALE = 1024.0


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    return torch.float64 if stored == torch.float64 else torch.float32


def loss_floor(stored: torch.dtype, scale: float = 1.0) -> float:
    return LOSS_FLOOR[stored] * max(1.0, scale / 500)


def gradient_floor(stored: torch.dtype, scale: float = 1.0) -> float:
    """Of logits and of a transition alike, the latter in the compute dtype."""
    rounding = GRADIENT_FLOOR[compute_dtype(stored)]
    return GRADIENT_FLOOR[stored] + rounding * (max(1.0, scale / 10) - 1)


def transition_floor(stored: torch.dtype, scale: float = 1.0) -> float:
    """Of the gradient of a transition where one pixel may be most of it: a quotient of exponentials of logits, which reach 4 x
    scale. ``stored``: the compute dtype."""
    return gradient_floor(stored, 4 * scale)


def unit_roundoff(stored: torch.dtype) -> float:
    """By how much of its size a number is off, at most, once it is rounded to the compute dtype."""
    return torch.finfo(compute_dtype(stored)).eps / 2


def loss_bound(plain: float, stored: torch.dtype, scale: float = 1.0) -> float:
    """``plain``: the error of the plain formulation, or the move of the truth under a roundoff of the inputs."""
    return LOSS_FACTOR * plain + loss_floor(stored, scale)


def gradient_bound(plain: float, stored: torch.dtype, scale: float = 1.0) -> float:
    return GRADIENT_FACTOR * plain + gradient_floor(stored, scale)


def posterior_bound(stored: torch.dtype) -> float:
    """In the 2-norm: as far apart as two gradients may be, or one rounding to the dtype that it is returned in."""
    own = GRADIENT_APART if compute_dtype(stored) == torch.float32 else GRADIENT_FLOOR[torch.float64]
    return max(own, torch.finfo(stored).eps / 2)


def table() -> str:
    """Markdown: what is allowed beside the error of plain PyTorch."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    lines = [f"| logit scale | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for scale in SCALES:
        cells = [f"{loss_floor(dtype, scale):.0e}, {gradient_floor(dtype, scale):.0e}" for dtype in dtypes]
        lines.append(f"| {f'up to {scale:.0f}' if scale == SCALES[0] else f'{scale:.0f}'} | {' | '.join(cells)} |")
    words = (
        f"loss, gradients; beside {LOSS_FACTOR:.0f}x and {GRADIENT_FACTOR:.0f}x the error of plain PyTorch, or, where that is "
        "lucky, the move of the exact result when every input is rounded once.",
        f"Logits of +-1e4 or -inf beside ordinary ones, gradients at each pixel: {EXTREME_FLOOR:.0e}. The parameters of a "
        "`TransitionMatrix` by the bounds of four times the scale, since a quotient of exponentials of logits may be most of "
        "their gradient. That of a transition itself may be inf or NaN in float32 where it is 0 and class logits contradict it "
        "by a margin of 88 or more.",
    )
    return "\n".join([*lines, "", *words])


if __name__ == "__main__":
    print(table())
