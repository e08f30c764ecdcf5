"""The segmentation network that a config names: one of ours, or any module by its import path."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from ..config import ModelConfig
from . import street, unet
from .segformer import SegFormer
from .street import StreetNet
from .unet import UNet

NETWORKS = ("unet", "street", "segformer")


def check_named(where: Path, network: str, named: str | None) -> None:
    """Raises ValueError where the config in the file ``where`` has a network that is code, and nobody has ``named`` it: a file
    that came from somebody else must not say what is imported, the more so as modules may lie in the current folder."""
    if network in NETWORKS or network == named:
        return
    got = "" if named is None else f", not {named!r}"
    raise ValueError(
        f"network: expected {where} to have one of {NETWORKS}, got {network!r}{got}, which is code that would be run; "
        f"--network {network} does"
    )


def build_segmentation(
    config: ModelConfig, channels_in: int, num_classes: int, *, architecture: str | None = None
) -> nn.Module:
    """(B, channels_in, H, W) images in [0, 1] -> (B, num_classes, h, w) logits.

    Args:
        config: which network, and its options.
        channels_in: of the images; 1 or 3 for segformer.
        num_classes: C.
        architecture: what `architecture_of` returned for the network that is to be built again.

    Raises:
        ValueError: naming the option, what came and what was expected; also where a network cannot be imported.
        FileNotFoundError: segformer, where ``config.weights`` is no folder with a config.json.
    """
    if config.weights is not None and config.network != "segformer":
        raise ValueError(f"weights: expected none for network {config.network!r}, got {config.weights}")
    if config.widths is not None and config.network not in ("unet", "street"):
        raise ValueError(f"widths: expected none for network {config.network!r}, got {config.widths}")
    norm, checkpointing = config.norm, config.checkpointing
    if config.network == "unet":
        return UNet(channels_in, num_classes, config.widths or unet.WIDTHS, norm=norm, checkpointing=checkpointing)
    if config.network == "street":
        widths = config.widths or street.WIDTHS
        return StreetNet(channels_in, num_classes, widths, norm=norm, checkpointing=checkpointing)
    if config.network == "segformer":
        options: dict[str, Any] = {"weights": config.weights, "norm": norm, "architecture": architecture}
        return SegFormer(channels_in, num_classes, **options, checkpointing=checkpointing)
    if checkpointing:
        raise ValueError(f"checkpointing: expected one of {NETWORKS}, got network {config.network!r}")
    return _imported(config.network, channels_in, num_classes)


def architecture_of(network: nn.Module) -> str | None:
    """What the config does not tell of a network that may have come with weights, as a text that a checkpoint keeps
    (`SegFormer.architecture`); None for any other."""
    return network.architecture() if isinstance(network, SegFormer) else None


def _imported(path: str, channels_in: int, num_classes: int) -> nn.Module:
    module_name, _, name = path.partition(":")
    if not module_name or not name:
        raise ValueError(f"network: expected one of {NETWORKS} or package.module:name, got {path!r}")
    try:
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # a command has its own folder there, where `python -m` has the current one
        make = getattr(import_module(module_name), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(
            f"network: expected package.module:name that can be imported, got {path!r} ({error})"
        ) from error
    if not callable(make):
        raise ValueError(f"network: expected {path} to be called as name(channels_in, num_classes), got {make!r}")
    try:
        network = make(channels_in, num_classes)
    except TypeError as error:
        raise ValueError(
            f"network: expected {path} to be called as name(channels_in, num_classes), got {error}"
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(f"network: expected {path} to return an nn.Module, got {type(network).__name__}")
    return network
