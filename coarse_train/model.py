"""The two coupled networks: what is there (segmentation), and how it is drawn (confusion matrices of the annotator)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, pixel_shuffle, pixel_unshuffle


def _block(channels_in: int, channels_out: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for source in (channels_in, channels_out):
        layers += [nn.Conv2d(source, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A small U-Net that works on 2x2 patches (pixel unshuffle in front, pixel shuffle behind): at equal cost it has
    twice the channels at half the resolution, which a CPU turns into about 1.8 times the steps per second.

    Shape: (B, channels_in, H, W) -> (B, channels_out, H, W); H, W multiples of ``patch * 2 ** (levels - 1)``.
    """

    def __init__(self, channels_in: int, channels_out: int, widths: tuple[int, ...] = (16, 32, 64), *, patch: int = 2):
        super().__init__()
        self.patch = patch
        inputs = (channels_in * patch**2, *widths[:-1])
        self.down = nn.ModuleList(_block(a, b) for a, b in zip(inputs, widths, strict=True))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in zip(widths[-2::-1], widths[:0:-1], strict=True))
        self.head = nn.Conv2d(widths[0], channels_out * patch**2, 1)

    def forward(self, image: Tensor) -> Tensor:
        step = self.patch * 2 ** (len(self.down) - 1)
        if image.dim() != 4 or image.shape[-2] % step or image.shape[-1] % step:
            raise ValueError(f"image: expected (B, channels, H, W) with multiples of {step}, got {tuple(image.shape)}")
        # channels last: 1.3-1.7 times faster on a CPU at these widths
        x = pixel_unshuffle(image, self.patch).contiguous(memory_format=torch.channels_last)
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else max_pool2d(x, 2))
            skips.append(x)
        skips.pop()
        for block in self.up:
            x = block(torch.cat([interpolate(x, scale_factor=2.0), skips.pop()], 1))
        return pixel_shuffle(self.head(x), self.patch).contiguous()  # planes, as the loss reads them


def confusion_logits(num_classes: int, diagonal: float, missing: float | None = None) -> Tensor:
    """(C, C) logits [observed, true] to start from.

    The softmax over ``observed`` has ``diagonal`` on its diagonal, the rest equal. With ``missing`` the background
    (class 0) is another matter than the objects: p(background | object) = ``missing``, the rest of an object's column
    equal, and the background is drawn as such in 97 of 100 cases: annotators leave parts of objects out far more
    often than they invent objects.
    """
    if not 1 / num_classes <= diagonal < 1:
        raise ValueError(f"diagonal: expected a number from 1/{num_classes} to below 1, got {diagonal}")
    if missing is None:
        matrix = torch.full((num_classes, num_classes), (1 - diagonal) / (num_classes - 1))
        return matrix.fill_diagonal_(diagonal).log()
    if num_classes < 3 or not 0 < missing < 1 - diagonal:
        raise ValueError(
            f"missing: expected None, or a number above 0 and below 1 - diagonal = {1 - diagonal:g} "
            f"and at least 3 classes, got {missing} and {num_classes} classes"
        )
    matrix = torch.full((num_classes, num_classes), (1 - diagonal - missing) / (num_classes - 2))
    matrix.fill_diagonal_(diagonal)
    matrix[0] = missing
    matrix[:, 0] = 0.03 / (num_classes - 1)
    matrix[0, 0] = 0.97
    return matrix.log()


class GlobalConfusion(nn.Module):
    """One confusion matrix for the annotator, whatever the image. Shape: (B, 1, H, W) -> (1, C, C, 1, 1) logits."""

    def __init__(self, num_classes: int, diagonal: float = 0.7, missing: float | None = None):
        super().__init__()
        self.logits = nn.Parameter(confusion_logits(num_classes, diagonal, missing)[None, :, :, None, None])

    def forward(self, image: Tensor) -> Tensor:
        return self.logits


class PixelConfusion(nn.Module):
    """A confusion matrix per pixel, from the image. Shape: (B, 1, H, W) -> (B, C, C, H, W) logits."""

    def __init__(
        self,
        num_classes: int,
        diagonal: float = 0.7,
        missing: float | None = None,
        widths: tuple[int, ...] = (16, 32),
    ):
        super().__init__()
        self.num_classes = num_classes
        self.net = UNet(1, num_classes**2, widths)
        with torch.no_grad():  # the field starts as the same matrix everywhere
            self.net.head.weight.mul_(0.1)
            assert self.net.head.bias is not None
            start = confusion_logits(num_classes, diagonal, missing).flatten()
            self.net.head.bias.copy_(start.repeat_interleave(self.net.patch**2))  # pixel shuffle: channel-major

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image).unflatten(1, (self.num_classes, self.num_classes))


CONFUSIONS: dict[str, type[GlobalConfusion] | type[PixelConfusion]] = {
    "global": GlobalConfusion,
    "pixel": PixelConfusion,
}


class CoarseModel(nn.Module):
    """Segmentation network and, where the drawings are not trusted, an annotation network of its own (a shared backbone
    lets the confusion matrices absorb the objects). Any module of the same shapes fits in either place.

    Shape: (B, 1, H, W) -> seg_logits (B, C, H, W) and cm_logits (B or 1, C, C, *G), or None where drawings are trusted.
    """

    def __init__(self, segmentation: nn.Module, annotation: nn.Module | None = None):
        super().__init__()
        self.segmentation = segmentation
        self.annotation = annotation

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.segmentation(image), None if self.annotation is None else self.annotation(image)
