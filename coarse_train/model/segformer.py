"""SegFormer (arXiv 2105.15203) from the `transformers` library, an optional extra."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..storage import LFS_POINTER, is_lfs_pointer, one_line
from .blocks import normalisation

# what in a config of the library names implementations, or code to load
_CODE = {"attn_implementation", "_attn_implementation", "auto_map", "quantization_config", "_name_or_path"}
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which published weights expect


class SegFormer(nn.Module):
    """MiT-B0 from scratch, or any SegFormer from a local folder in the layout of `save_pretrained`.

    Shape: (B, 1 or 3, H, W) in [0, 1] -> (B, num_classes, ceil(H / 4), ceil(W / 4)) logits; H and W at least 32. A grey
    image is repeated to three channels, and images are normalised with the mean and deviation of ImageNet in here.

    Args:
        channels_in: of the images, 1 or 3.
        num_classes: C; with ``architecture`` it is the number there that counts.
        weights: folder with config.json and the weights; its classifier is made anew where it has other classes.
        norm: of the decoder, the one place that normalises over the batch; one that comes trained stays what it was.
        architecture: what `architecture` returned for a network like this one, in place of ``weights`` and ``norm``: a
            checkpoint keeps it, so that the folder of the weights is not needed again.
        checkpointing: keep the input of each transformer block only, and compute the rest again in backward.

    Raises:
        ValueError: other channels, another ``norm``, the package transformers is missing, or ``weights`` are not those of a
            SegFormer; in forward, images below 32x32.
        FileNotFoundError: ``weights`` is no folder with a config.json.
    """

    network: Any
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        channels_in: int,
        num_classes: int,
        *,
        weights: Path | None = None,
        norm: str = "group",
        architecture: str | None = None,
        checkpointing: bool = False,
    ):
        super().__init__()
        if channels_in not in (1, 3):
            raise ValueError(f"channels_in: expected 1 or 3 for segformer, got {channels_in}")
        if architecture is not None:
            self.network = _from_architecture(architecture)
        elif weights is not None:
            self.network = _from_folder(weights, num_classes, norm)
        else:
            self.network = _with_norm(_untrained({"num_labels": num_classes}), norm)
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1), persistent=False)
        if checkpointing:
            # the second name is the one before transformers 5
            enable = getattr(self.network, "activation_checkpointing_enable", None)
            (enable or self.network.gradient_checkpointing_enable)({"use_reentrant": False})

    def architecture(self) -> str:
        """JSON of the library's config, and which normalisation the decoder has."""
        batch_norm = isinstance(self.network.decode_head.batch_norm, nn.BatchNorm2d)
        config = json.loads(self.network.config.to_json_string())
        return json.dumps({"norm": "batch" if batch_norm else "group", "config": config})

    def forward(self, image: Tensor) -> Tensor:
        """The logits of these images."""
        if min(image.shape[-2:]) < 32:
            raise ValueError(f"image: expected at least 32x32 pixels for segformer, got {tuple(image.shape)}")
        return self.network(pixel_values=(image - self.mean) / self.std).logits.contiguous()


def _library() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"network: expected the package transformers for segformer (pip install transformers), got {error}"
        ) from error
    return transformers


def _untrained(config: dict[str, Any]) -> Any:
    library = _library()
    return library.SegformerForSemanticSegmentation(library.SegformerConfig.from_dict(config))


def _from_architecture(architecture: str) -> Any:
    """Of a checkpoint, which may be somebody else's: what it says of sizes counts, not whose code is to be fetched for them."""
    content = json.loads(architecture)
    known = _library().SegformerConfig().to_dict().keys() - _CODE
    return _with_norm(
        _untrained({key: content["config"][key] for key in content["config"] if key in known}), content["norm"]
    )


def _from_folder(folder: Path, num_classes: int, norm: str) -> Any:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"weights: expected a folder with config.json, got {folder}")
    try:
        network, report = _library().SegformerForSemanticSegmentation.from_pretrained(
            folder,
            num_labels=num_classes,
            local_files_only=True,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:  # its readers raise errors of their own on damaged files
        pointers = [path for path in sorted(folder.iterdir()) if is_lfs_pointer(path)]
        got = f"{pointers[0].name}, {LFS_POINTER}" if pointers else one_line(error)
        raise ValueError(f"weights: expected the weights of a SegFormer in {folder}, got {got}") from error
    missing = set(report["missing_keys"])
    if absent := sorted(key for key in missing if key.startswith("segformer.")):
        raise ValueError(f"weights: expected a SegFormer in {folder}, got none of {len(absent)} such as {absent[0]}")
    return _with_norm(network, norm) if "decode_head.batch_norm.weight" in missing else network


def _with_norm(network: Any, norm: str) -> Any:
    head = network.decode_head
    head.batch_norm = normalisation(head.batch_norm.num_features, norm)
    return network
