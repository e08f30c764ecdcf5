"""The annotation models: how one kind of drawings departs from the truth, as logits of confusion matrices.

    image --(a field: free values at each place)--> (B or 1, outputs, *G) --(a structure)--> (B or 1, C, C, *G)

A field says where matrices may differ: nowhere, between images, on a grid, or at every pixel. It has a network of its own: a
backbone that is shared with the segmentation lets the matrices absorb the objects (mIoU 45 against 93 on MNIST digits). A
structure says which matrices there can be. Logits are [observed, true]: `coarse_kernels` takes the softmax over the first.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from coarse_kernels import confusion_logits

from ..config import DrawingsConfig
from .blocks import convolution, run
from .unet import UNet

_STEM = 32  # channels at the stride of a grid
_START_SCALE = 0.1  # of the last layer's weights: a field starts as nearly the same matrix everywhere


# ---- structures: (B, outputs, *G) free values -> (B, C, C, *G) logits -------------------------------------------


class Structure(nn.Module, ABC):
    """Which matrices there can be."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

    @abstractmethod
    def start(self) -> Tensor:
        """(outputs,) free values of the matrix to start from."""


class Full(Structure):
    """Any matrix: C * C free logits.

    Args:
        num_classes: C >= 2.
        diagonal, missing: of the matrix to start from, as in `coarse_kernels.confusion_logits`; `start` raises its ValueError.

    Shape: (B or 1, C * C, *G) -> (B or 1, C, C, *G) logits [observed, true].
    """

    def __init__(self, num_classes: int, diagonal: float = 0.7, missing: float | None = None):
        super().__init__(num_classes)
        self.diagonal, self.missing = diagonal, missing

    def start(self) -> Tensor:
        """(C * C,) float32 logits of the matrix to start from."""
        return confusion_logits(self.num_classes, self.diagonal, self.missing).flatten()

    def forward(self, free: Tensor) -> Tensor:
        """The logits of these free values."""
        return free.unflatten(1, (self.num_classes, self.num_classes))


class Floor(Structure):
    """A = (1 - floor) * softmax(free) + floor * I: a class is drawn as itself with at least probability ``floor``.

    Logits of A need to be right up to a constant in each column. Off the diagonal they stay the free ones x[i, j]; the
    diagonal becomes log(exp x[j, j] + floor / (1 - floor) * sum_i exp x[i, j]): one copy of the field, not four.
    """

    def __init__(self, num_classes: int, diagonal: float, floor: float):
        super().__init__(num_classes)
        confusion_logits(num_classes, diagonal)  # checks both
        if not 0 < floor < diagonal:
            raise ValueError(f"floor: expected a number above 0 and below diagonal = {diagonal:g}, got {floor}")
        self.diagonal, self.floor = diagonal, floor

    def start(self) -> Tensor:
        matrix = torch.full((self.num_classes, self.num_classes), (1 - self.diagonal) / (self.num_classes - 1))
        return matrix.fill_diagonal_(self.diagonal - self.floor).log().flatten()

    def forward(self, free: Tensor) -> Tensor:
        x = free.unflatten(1, (self.num_classes, self.num_classes)).float()
        least = x.logsumexp(1) + math.log(self.floor / (1 - self.floor))  # (B, C, *G)
        diagonal = torch.logaddexp(x.diagonal(dim1=1, dim2=2).movedim(-1, 1), least)
        return x.diagonal_scatter(diagonal.movedim(1, -1), dim1=1, dim2=2)


class LowRank(Structure):
    """One matrix of logits for all places, plus U V^T of ``rank`` at each: 2 * C * rank values instead of C * C."""

    def __init__(self, num_classes: int, diagonal: float, rank: int):
        super().__init__(num_classes)
        if not 1 <= rank <= num_classes:
            raise ValueError(f"rank: expected a number from 1 to the number of classes {num_classes}, got {rank}")
        self.rank = rank
        self.base = nn.Parameter(confusion_logits(num_classes, diagonal))

    def start(self) -> Tensor:
        """V = 0: no change. U must not be 0 too, or neither would have a gradient; equal columns would stay equal."""
        u = torch.randn(self.num_classes, self.rank) / math.sqrt(self.rank)
        return torch.cat([u.flatten(), torch.zeros(self.num_classes * self.rank)])

    def forward(self, free: Tensor) -> Tensor:
        u, v = free.unflatten(1, (2, self.num_classes, self.rank)).float().unbind(1)  # (B, C, rank, *G)
        logits = self.base.view(1, *self.base.shape, *(1 for _ in free.shape[2:]))
        for k in range(self.rank):
            logits = torch.addcmul(logits, u[:, :, None, k], v[:, None, :, k])
        return logits


class Tied(Structure):
    """One number at each place, the logit of every diagonal entry, against 0 off the diagonal."""

    eye: Tensor

    def __init__(self, num_classes: int, diagonal: float):
        super().__init__(num_classes)
        confusion_logits(num_classes, diagonal)  # checks both
        self.diagonal = diagonal
        self.register_buffer("eye", torch.eye(num_classes), persistent=False)

    def start(self) -> Tensor:
        return torch.tensor([math.log(self.diagonal * (self.num_classes - 1) / (1 - self.diagonal))])

    def forward(self, free: Tensor) -> Tensor:
        return free.unsqueeze(1) * self.eye.view(1, *self.eye.shape, *(1 for _ in free.shape[2:])).to(free.dtype)


# ---- fields: (B, channels, H, W) image -> (B or 1, outputs, *G) free values -------------------------------------


class GlobalField(nn.Module):
    """The same for every image, as the matrices of annotators in Tanno et al., CVPR 2019.

    Args:
        start: (outputs,) free values, such as `Full.start` gives.

    Shape: (B, channels, H, W) -> (1, outputs, 1, 1).
    """

    def __init__(self, start: Tensor):
        super().__init__()
        self.free = nn.Parameter(start[None, :, None, None].clone())

    def forward(self, image: Tensor) -> Tensor:
        """The parameters; the image is not looked at."""
        return self.free


class PixelField(nn.Module):
    """At every pixel, as in Zhang et al., NeurIPS 2020; for small images and few classes: 19 classes at 1024x2048 are 3 GB.

    Args:
        start: (outputs,) free values that every pixel starts near, such as `Full.start` gives.
        channels_in: of the images.
        norm, checkpointing: as in `UNet`, whose ValueError it raises.

    Shape: (B, channels_in, H, W) -> (B, outputs, H, W).
    """

    def __init__(self, start: Tensor, channels_in: int, *, norm: str = "group", checkpointing: bool = False):
        super().__init__()
        self.net = UNet(channels_in, len(start), (16, 32), norm=norm, checkpointing=checkpointing)
        _start_at(self.net.head, start.repeat_interleave(self.net.patch**2))  # pixel shuffle: channel-major

    def forward(self, image: Tensor) -> Tensor:
        """The free values of these images."""
        return self.net(image)


class GridField(nn.Module):
    """At every ``stride`` pixels. Strided convolutions lead down to the grid, and a U-Net works on it, so that what is as
    wide as the output is as small as the output.

    Shape: (B, channels, H, W) -> (B, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(
        self, start: Tensor, channels_in: int, stride: int, *, norm: str = "group", checkpointing: bool = False
    ):
        super().__init__()
        self.checkpointing = checkpointing
        self.stem = _stem(channels_in, stride, norm)
        self.net = UNet(_STEM, len(start), (_STEM, 64), patch=1, norm=norm, checkpointing=checkpointing)
        _start_at(self.net.head, start)

    def forward(self, image: Tensor) -> Tensor:
        x = image.contiguous(memory_format=torch.channels_last)
        return self.net(run(self.stem, x, checkpointing=self.checkpointing))


class ImageField(nn.Module):
    """One for each image, from the mean over its features. Shape: (B, channels, H, W) -> (B, outputs, 1, 1)."""

    def __init__(self, start: Tensor, channels_in: int, *, norm: str = "group", checkpointing: bool = False):
        super().__init__()
        self.checkpointing = checkpointing
        blocks = [*convolution(_STEM, 64, stride=2, norm=norm), *convolution(64, 64, norm=norm)]
        self.features = nn.Sequential(*_stem(channels_in, 8, norm), *blocks)
        self.head = nn.Conv2d(64, len(start), 1)
        _start_at(self.head, start)

    def forward(self, image: Tensor) -> Tensor:
        x = image.contiguous(memory_format=torch.channels_last)
        return self.head(run(self.features, x, checkpointing=self.checkpointing).mean((2, 3), keepdim=True))


def _stem(channels_in: int, stride: int, norm: str) -> nn.Sequential:
    """(B, channels_in, H, W) -> (B, _STEM, ceil(H / stride), ceil(W / stride)); one convolution for each factor of the stride,
    as far as the next place on both sides, so that no pixel is left out."""
    if stride < 1:
        raise ValueError(f"stride: expected a number of pixels >= 1, got {stride}")
    factors = [4] if stride % 4 == 0 else []  # at once: at half resolution the features of 1024x2048 would be 67 MB
    rest = stride // math.prod(factors)
    for factor in range(2, rest + 1):
        while rest % factor == 0:
            factors.append(factor)
            rest //= factor
    layers: list[nn.Module] = []
    channels = channels_in
    for factor in factors or [1]:
        layers += convolution(channels, _STEM, max(3, 2 * factor - 1), stride=factor, norm=norm)
        channels = _STEM
    return nn.Sequential(*layers)


@torch.no_grad()
def _start_at(head: nn.Conv2d, start: Tensor) -> None:
    head.weight.mul_(_START_SCALE)
    assert head.bias is not None
    head.bias.copy_(start)


# ---- both -------------------------------------------------------------------------------------------------------


class AnnotationModel(nn.Module):
    """How one kind of drawings departs from the truth: a field, and a structure of its free values (`build_annotation`).

    Args:
        field: (B, channels, H, W) -> (B or 1, outputs, *G).
        structure: (B or 1, outputs, *G) -> (B or 1, C, C, *G).

    Shape: (B, channels, H, W) images in [0, 1] -> (B or 1, C, C, *G) logits [observed, true], whose softmax over the first C is
    p(observed i | true j).
    """

    def __init__(self, field: nn.Module, structure: Structure):
        super().__init__()
        self.field = field
        self.structure = structure

    def forward(self, image: Tensor) -> Tensor:
        """The matrix logits of these images."""
        return self.structure(self.field(image))


def build_annotation(
    config: DrawingsConfig, channels_in: int, num_classes: int, *, norm: str = "group", checkpointing: bool = False
) -> AnnotationModel | None:
    """The annotation model of one kind of drawings; None where they are trusted (A = I).

    It starts near the matrix that ``config`` says (``diagonal``, ``missing``). Its logits are (1, C, C, 1, 1) where
    ``config.cm`` is "global", (B, C, C, 1, 1) where it is "image", (B, C, C, ceil(H / stride), ceil(W / stride)) where "grid",
    (B, C, C, H, W) where "pixel".

    Args:
        config: where matrices differ (``cm``, ``stride``), which there can be (``structure``), and where they start.
        channels_in: of the images.
        num_classes: C >= 2.
        norm: of the field's network, "group" or "batch".
        checkpointing: keep less in the field's network and compute it again in backward.

    Raises:
        ValueError: naming the field of the config or the argument, what came and what was expected.
    """
    if config.cm == "none":
        return None
    structure = _structure(config, num_classes)
    start = structure.start()
    if config.cm == "global":
        return AnnotationModel(GlobalField(start), structure)
    if config.cm == "image":
        return AnnotationModel(ImageField(start, channels_in, norm=norm, checkpointing=checkpointing), structure)
    if config.cm == "grid":
        field = GridField(start, channels_in, config.stride, norm=norm, checkpointing=checkpointing)
        return AnnotationModel(field, structure)
    if config.cm == "pixel":
        return AnnotationModel(PixelField(start, channels_in, norm=norm, checkpointing=checkpointing), structure)
    raise ValueError(f"cm: expected none, global, image, grid or pixel, got {config.cm!r}")


def _structure(config: DrawingsConfig, num_classes: int) -> Structure:
    if config.structure == "full":
        return Full(num_classes, config.diagonal, config.missing)
    if config.structure == "floor":
        return Floor(num_classes, config.diagonal, config.floor)
    if config.structure == "lowrank":
        return LowRank(num_classes, config.diagonal, config.rank)
    if config.structure == "tied":
        return Tied(num_classes, config.diagonal)
    raise ValueError(f"structure: expected full, floor, lowrank or tied, got {config.structure!r}")
