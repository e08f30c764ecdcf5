"""A segmentation network for street scenes: large images in which a class is told by its surroundings."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, relu

from .blocks import convolution, normalisation, run

WIDTHS = (32, 64, 128, 192, 256)
_RATES = (2, 4, 8)


class _Residual(nn.Module):
    """Basic block of a ResNet; the shortcut averages before it thins out (ResNet-D, arXiv 1812.01187)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, norm: str):
        super().__init__()
        self.body = nn.Sequential(
            *convolution(channels_in, channels_out, stride=stride, norm=norm),
            nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False),
            normalisation(channels_out, norm),
        )
        shortcut: list[nn.Module] = [] if stride == 1 else [nn.AvgPool2d(stride, ceil_mode=True)]
        if channels_in != channels_out:
            shortcut += [nn.Conv2d(channels_in, channels_out, 1, bias=False), normalisation(channels_out, norm)]
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + self.shortcut(x))


class _Context(nn.Module):
    """The surroundings of each place: dilated convolutions and the mean of the image (ASPP of DeepLabV3, arXiv
    1706.05587), separable into depth and space. Shape: (B, channels, H, W) -> (B, width, H, W)."""

    def __init__(self, channels: int, width: int, norm: str):
        super().__init__()
        self.near = nn.Sequential(*convolution(channels, width, 1, norm=norm))
        self.far = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, padding=rate, dilation=rate, groups=channels, bias=False),
                *convolution(channels, width, 1, norm=norm),
            )
            for rate in _RATES
        )
        self.join = nn.Sequential(*convolution(width * (len(_RATES) + 1), width, 1, norm=norm))
        # no normalisation: of one value per channel it would leave nothing
        self.everywhere = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.cat([self.near(x), *(branch(x) for branch in self.far)], 1)
        return self.join(places) + self.everywhere(x)


class _Merge(nn.Module):
    """One level of the decoder: what comes from below, enlarged, and the encoder's own level (FPN, arXiv 1612.03144)."""

    def __init__(self, channels: int, width: int, norm: str):
        super().__init__()
        self.lateral = nn.Conv2d(channels, width, 1)
        self.smooth = nn.Sequential(*convolution(width, width, norm=norm))

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        enlarged = interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
        return self.smooth(enlarged + self.lateral(skip))


class StreetNet(nn.Module):
    """Residual encoder to stride 32 (16 with four widths), context at the coarsest level, decoder up to stride 4.

    The logits stay at stride 4: `coarse_kernels` interpolates them to the labels; at 1024x2048 with 19 classes they are
    10 MB instead of 159. With `WIDTHS` 4.9 million parameters, and there 1.5 GB for the training step of one image in float32
    with a stride-8 field of confusion matrices, 0.7 GB with checkpointing.

    Shape: (B, channels_in, H, W) -> (B, channels_out, ceil(H / 4), ceil(W / 4)), any H and W.

    Args:
        channels_in, channels_out: of the images, and C.
        widths: channels at strides 2, 4, 8, 16 and, with five, 32; the decoder has those of stride 8.
        norm, checkpointing: as in `UNet`.

    Raises:
        ValueError: not four or five widths of at least 1, or another ``norm``.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        widths: tuple[int, ...] = WIDTHS,
        *,
        norm: str = "group",
        checkpointing: bool = False,
    ):
        super().__init__()
        if len(widths) not in (4, 5) or min(widths) < 1:
            raise ValueError(f"widths: expected channels at strides 2, 4, 8, 16 and maybe 32 for street, got {widths}")
        self.checkpointing = checkpointing
        self.stem = nn.Sequential(*convolution(channels_in, widths[0], stride=2, norm=norm))
        self.stages = nn.ModuleList(
            nn.Sequential(_Residual(a, b, 2, norm), _Residual(b, b, 1, norm)) for a, b in pairwise(widths)
        )
        width = widths[2]
        self.context = _Context(widths[-1], width, norm)
        self.merges = nn.ModuleList(_Merge(channels, width, norm) for channels in widths[-2:0:-1])
        self.head = nn.Conv2d(width, channels_out, 1)

    def forward(self, image: Tensor) -> Tensor:
        """The logits of these images."""
        x = image.contiguous(memory_format=torch.channels_last)
        x = run(self.stem, x, checkpointing=self.checkpointing)
        levels: list[Tensor] = []
        for stage in self.stages:
            x = run(stage, x, checkpointing=self.checkpointing)
            levels.append(x)
        x = run(self.context, levels.pop(), checkpointing=self.checkpointing)
        for merge in self.merges:
            x = run(merge, x, levels.pop(), checkpointing=self.checkpointing)
        return self.head(x).contiguous()  # planes, as the loss reads them
