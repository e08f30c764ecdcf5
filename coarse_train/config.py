"""What a run is made of: one frozen dataclass, which is the command line, the TOML file and the record of a run at once.

    FitConfig -> fit(config)          coarse-train fit camvid --root DIR --steps 500
              -> config.toml          coarse-train fit runs/camvid/config.toml --seed 1 --out runs/again

The docstring of a field is its help on the command line. A config is not checked as it is made: `fit` raises ValueError naming
the field, what came and what was expected.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import cattrs
import tomli_w
import tyro

from .data.images import MAX_PIXELS
from .storage import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


Naming = Literal["uniform", "objects", "estimated", "learned"]
Measured = Literal["auto", "image"]
Balanced = Literal["balanced"]
Supervision = Literal["drawings", "masks", "mixed", "then-masks", "mixed-then-masks"]


@dataclass(frozen=True)
class DataConfig:
    """Which images and drawings, and how they are transformed."""

    dataset: str = "folder"
    """folder (your own), cityscapes, camvid, chasedb1, drive, les_av or mnist."""
    root: Path | None = None
    """Folder of the data set in its official layout (mnist: without it, the sample in the package)."""
    variant: str = ""
    """Which labels, where a data set has several; its module lists them. Empty: the usual ones."""
    positives: Path | None = None
    """Folder of positive drawings, DIR/SPLIT/NAME.png (cityscapes: its own names too); without it what the data set has."""
    negatives: Path | None = None
    """Folder of negative drawings, the same; further layers are NAME.1.png, NAME.2.png, ..."""
    simulate: str | None = None
    """Draw the kinds that are lacking from the dense masks, as they are read, at this level: scribble, spots, sketch, coarse
    or full; or on a part of the area from 0.01 to 1, such as 0.25."""
    supervision: Supervision = "drawings"
    """What is learned from: coarse drawings; dense masks; mixed, masks for some images and drawings for the others; then-masks,
    drawings of all images first and then the masks of some (fine-tuning); or mixed first and then masks alone."""
    dense_images: int = 0
    """Masks are read of so many training images, chosen by the seed, and of no others (masks: 0 for all)."""
    dense_split: Literal["train", "val"] = "train"
    """supervision=then-masks: val learns from masks of that split instead, which are then not scored. `select_with` sets it."""
    dense_share: float | None = None
    """supervision=mixed: part of each batch, above 0 and below 1, that are images with a mask; without it as they come."""
    limit: int | None = None
    """At most so many training images (the first), 1 or more."""
    skip_bad: bool = False
    """List and leave out images whose files are missing, damaged or inconsistent; without it the first is an error."""
    check: Literal["error", "note", "off"] = "error"
    """Every file is read once before the first step, and remembered. error: a class of your own table of which there is not one
    pixel to learn from stops the run, where there are no negative drawings and no `limit`; note: it is told; off: nothing is
    read beforehand."""
    max_pixels: int = MAX_PIXELS
    """Images and label maps of more pixels are an error: a small file may be made to fill the memory."""
    crop: tuple[int, int] | None = None
    """Height and width of training crops, in pixels; without it whole images, which then must have one size."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Range of the random zoom before cropping: two factors above 0, the smaller first; uniform in their logarithm."""
    flip: bool = False
    """Mirror left and right, half the time."""
    colour: float = 0.0
    """Strength of random brightness, contrast and saturation, from 0 to 1: factors in 1 +- this."""
    workers: int = 0
    """Processes that read and transform images; 0: the training process does."""


@dataclass(frozen=True)
class ModelConfig:
    """The segmentation network."""

    network: str = "unet"
    """unet, street (encoder-decoder for street scenes), segformer (needs the extra `transformers`), or any nn.Module as
    package.module:name, called as name(channels_in, num_classes), (B, channels, H, W) -> (B, num_classes, h, w)."""
    widths: tuple[int, ...] | None = None
    """Channels of the levels, finest first: unet, without it 16 32 64; street, 4 or 5 of them, without it 32 64 128 192 256."""
    norm: Literal["group", "batch"] = "group"
    """Group normalisation does not depend on what else is in the batch: accumulation and ranks change nothing."""
    weights: Path | None = None
    """segformer: folder with local weights; without it a small one from scratch."""
    checkpointing: bool = False
    """Recompute activations in backward: less memory, about a third more time."""


@dataclass(frozen=True)
class DrawingsConfig:
    """How one kind of drawings is explained: its annotation model and its weights."""

    cm: Literal["none", "global", "image", "grid", "pixel", "auto"] = "none"
    """The confusion matrix: none (the drawings are trusted, A = I), one for all, one per image, a field on a grid of
    every `stride` pixels, or one per pixel. auto: global where drawings of the other kind, or masks beside these, can be
    trusted; else none."""
    stride: int = 8
    """cm=grid: pixels per grid point."""
    structure: Literal["full", "floor", "lowrank", "tied"] = "full"
    """full: C x C free logits; floor: the diagonal is at least `floor`; lowrank: a matrix for all plus a rank-`rank`
    change per place; tied: one diagonal and one off-diagonal value for all classes."""
    diagonal: float = 0.7
    """p(drawn as j | true j) to start from, from 1/C to below 1."""
    missing: float | None = None
    """structure=full, where class 0 is the background: p(drawn as background | object) to start from, above 0 and below
    1 - `diagonal`; needs 3 classes."""
    floor: float = 0.2
    """structure=floor: the least p(drawn as j | true j), above 0 and below `diagonal`."""
    rank: int = 2
    """structure=lowrank: rank of the change, from 1 to C."""
    trace_weight: float = 0.0
    """Weight of tr(A); start at 0. With too much classes flip: of five, matrices of an image or a pixel lose from 0.001 or
    0.01 on, those every 8 pixels from 0.1; of two, all but one matrix for all images at 1, and 0.1 was best."""
    weight: float = 1.0
    """Weight of these drawings in the loss, >= 0; 0 leaves them out."""
    pen: float | Measured | Path | None = None
    """Positive drawings: by how many pixels outlines reach too far (below 0: not far enough), which is undone as they are read,
    for every class but one called background. auto: measured for each class on the images whose masks may be read
    (`dense_images`). image: so, and in each image by how thin its own strokes are, for a brush that differs between images; or
    the pen.json that `coarse-train pen` wrote."""
    band: float = 0.0
    """Of what an outline was moved over, so many pixels from the new one say nothing instead of what lies there."""
    doubt: float = 0.0
    """Of what stays, so many pixels from the new outline say nothing unless the drawing proves them: a broad pen fills narrow
    gaps, which moving the outline back does not open."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """sgd has Nesterov momentum."""
    lr: float = 2e-3
    """Learning rate of the segmentation network."""
    cm_lr: float = 1e-2
    """Learning rate of confusion matrices and of a learned transition."""
    weight_decay: float = 1e-4
    """Of the segmentation network's weights, not of biases, normalisations and confusion matrices."""
    momentum: float = 0.9
    """sgd only."""
    schedule: Literal["cosine", "poly", "constant"] = "cosine"
    """After `warmup` and `hold`, down to 0 (poly: power 0.9), or not at all."""
    warmup: float = 0.05
    """Share of the steps in which the rates rise."""
    hold: float = 0.0
    """Share of the steps, warm-up included, before they fall."""
    clip: float = 1.0
    """Largest 2-norm of the gradient of all parameters; 0: no limit."""
    finetune: float = 0.3
    """supervision then-masks: share of the steps, at the end, that see masks alone."""
    finetune_lr: float | None = None
    """Their learning rate, with a warm-up and a fall of its own; without it a quarter of `lr`."""
    ema: float | None = None
    """Decay of an exponential moving average of the parameters, which is then what is scored and kept, such as 0.999."""


@dataclass(frozen=True)
class FitConfig:
    """Train a segmentation network from coarse drawings."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    optim: Annotated[OptimConfig, tyro.conf.arg(name="")] = field(default_factory=OptimConfig)
    positive: DrawingsConfig = field(default_factory=lambda: DrawingsConfig(cm="global"))
    negative: DrawingsConfig = field(default_factory=DrawingsConfig)
    transition: Naming | Path = "uniform"
    """How negative drawings name a class: uniform, objects (uniform but for class 0, a background that no drawing names),
    estimated from where the two kinds of drawings meet, learned from uniform, or a (C, C) .npy file with zero diagonal,
    [true, named]. Where class 0 is never named, objects and estimated pull towards objects: cross-entropy on drawings that
    leave parts of them out gains by it, together with a confusion matrix it is too much."""
    mask_weight: float = 1.0
    """Weight of the dense masks in the loss, above 0 with any supervision but drawings."""
    class_weight: tuple[float, ...] | Balanced | None = None
    """Weight of each class in the loss of positive drawings and of masks, in the order of the table; or balanced: the inverse
    of its share of what these label in the training images (in 200 of them, evenly spread): all classes weigh the same.
    Negative drawings have none, since what one names is not what is there; `negative.weight` is that of them all."""

    out: Path = Path("runs/fit")
    """Run folder: config.toml, metrics.jsonl, last.pt, best.pt, tensorboard, pictures."""
    resume: bool = False
    """Go on from last.pt in the run folder."""
    resume_changed: bool = False
    """With resume: also where steps, batch size, precision, learning rates or their schedule are not as in the run. The rest of
    the run has the new ones; config.toml and checkpoints record what was changed, and after which step."""
    seed: int = 0
    """Of networks, batches, transforms, simulated drawings and chosen masks; from 0 to 2^31 - 1."""
    steps: int = 1000
    """Optimizer steps."""
    batch_size: int = 8
    """Images per optimizer step, over all ranks and accumulation steps, of whose product it is a multiple."""
    accumulate: int = 1
    """Forward and backward passes per optimizer step and rank."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast of the networks; the loss is float32 whatever they return."""
    compile: bool = False
    """torch.compile the networks."""
    fsdp: bool = False
    """With torchrun: shard parameters, gradients and optimizer state (FSDP2) instead of replicating them (DDP)."""
    backend: str | None = None
    """Backend of coarse_kernels; without it the best that can run."""
    device: str | None = None
    """Without it cuda where there is one, else cpu."""
    threads: int | None = None
    """Threads of PyTorch on the CPU; equal seeds and threads give equal numbers."""

    evaluate_every: int | None = None
    """Steps between scores on the validation split; without it a fifth of the run."""
    save_every: int = 100
    """Steps between checkpoints."""
    save_minutes: float = 10.0
    """Minutes between checkpoints by the clock, the first after one at most; 0: none. They change no result."""
    pictures: int = 3
    """So many of the best and of the worst validation images, a training image and the confusion matrices are drawn at every
    evaluation, for tensorboard and the folder `pictures`. 0: no pictures."""
    opacity: float = 0.5
    """Of the classes' colours in them, over the image: from 0 to 1."""
    select_with: int = 0
    """Use so many dense masks of the validation split to choose: both kinds trusted, a matrix on either, outlines moved back,
    both, or fine-tuning on these masks; then the checkpoint. Nothing else is done with them, unless fine-tuning wins: they are
    learned from then, and the last step counts. 0: masks choose nothing, the last step counts."""
    select_steps: int | None = None
    """Steps after which the masks keep some of up to six candidates: fine-tuning and the best two, or, where outlines may be
    moved, fine-tuning, those with moved outlines and the best of the others. They go on, and the best of them at the end is the
    run. Without it a fifth of the run; as many as `steps`: all go on to the end. 0: masks choose the checkpoint alone."""


RECIPES = Path(__file__).parent / "recipes"


def recipe(dataset: str) -> FitConfig:
    """What `coarse-train fit DATASET` begins with: the config of one of `coarse_train.data.DATASETS`.

    Raises FileNotFoundError where there is no such data set.
    """
    return load_toml(RECIPES / f"{dataset}.toml")


def load_toml(path: Path) -> FitConfig:
    """The config in a TOML file, as `to_toml` writes it; what is left out has its default.

    Raises:
        ValueError: naming the file, and the key where one is unknown or has the wrong type; also where it is no TOML in UTF-8.
        FileNotFoundError: there is no such file.
    """
    try:
        return from_dict(tomllib.loads(read_text(Path(path))))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: expected a config file, got none") from error
    except IsADirectoryError as error:
        raise ValueError(f"{path}: expected a config file, got a folder") from error
    except (tomllib.TOMLDecodeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def to_toml(config: FitConfig) -> str:
    """The text of a file that `load_toml` reads back as ``config``; fields that are None are left out."""
    return tomli_w.dumps(_without_none(to_dict(config)))


def to_dict(config: FitConfig) -> dict[str, Any]:
    """Dictionaries of plain values, paths as text: what a checkpoint keeps, and `from_dict` reads back. Raises ValueError that
    names a group of settings that is something else."""
    for name, group in _GROUPS.items():
        if not isinstance(getattr(config, name), group):
            raise ValueError(f"{name}: expected {group.__name__}, got {getattr(config, name)!r}")
    return _CONVERTER.unstructure(config)


def anchored(config: FitConfig) -> FitConfig:
    """With absolute paths of what it reads, so that a run can be gone on with and used from another working directory.

    Raises ValueError naming a path that a TOML file cannot hold.
    """

    def absolute(name: str, path: Any) -> Any:
        return _in_utf8(name, path.absolute()) if isinstance(path, Path) else path

    _in_utf8("out", config.out)
    data = {name: absolute(name, getattr(config.data, name)) for name in ("root", "positives", "negatives")}
    return replace(
        config,
        data=replace(config.data, **data),
        model=replace(config.model, weights=absolute("weights", config.model.weights)),
        positive=replace(config.positive, pen=absolute("positive.pen", config.positive.pen)),
        transition=absolute("transition", config.transition),
    )


def _in_utf8(name: str, path: Path) -> Path:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name}: expected a path in UTF-8 (rename its folder), got {str(path)!r}") from error
    return path


def changed(content: dict[str, Any], default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Of `to_dict` what differs from the defaults: a new option with a default renames no config that has not got it."""
    if default is None:
        default = to_dict(FitConfig())
    pruned = {}
    for key, value in content.items():
        if isinstance(value, dict):
            value = changed(value, default[key])
            if value:
                pruned[key] = value
        elif value != default[key]:
            pruned[key] = value
    return pruned


def from_dict(content: dict[str, Any]) -> FitConfig:
    """The config; keys that are left out, in inner tables too, have their default. Raises ValueError naming the key."""
    try:
        return _CONVERTER.structure(_over(to_dict(FitConfig()), content), FitConfig)
    except cattrs.BaseValidationError as error:
        told = cattrs.transform_error(error, path="config", format_exception=_in_words)
        raise ValueError("; ".join(told)) from error


def _over(default: dict[str, Any], content: dict[str, Any]) -> dict[str, Any]:
    merged = {**default, **content}
    for key, value in default.items():
        if isinstance(value, dict) and isinstance(content.get(key), dict):
            merged[key] = _over(value, content[key])
    return merged


def _without_none(content: dict[str, Any]) -> dict[str, Any]:
    """TOML has no null; a missing key is one."""
    return {
        key: _without_none(value) if isinstance(value, dict) else value
        for key, value in content.items()
        if value is not None
    }


def _in_words(error: BaseException, kind: type | None) -> str:
    """What the hooks below say, where cattrs would leave it at the type that was expected."""
    if isinstance(error, ValueError) and str(error).startswith("expected "):
        return str(error)
    if get_origin(kind) is Literal:
        return f"expected one of {get_args(kind)}, got {str(error).partition(' not in literal')[0]!r}"
    return cattrs.v.format_exception(error, kind)


def _number(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, got {value!r}")
    return float(value)


def _exactly(kind: type) -> Any:
    def structure(value: Any, _: Any) -> Any:
        if type(value) is not kind:
            raise ValueError(f"expected {kind.__name__}, got {value!r}")
        return value

    return structure


def _or_file(*words: str, number: bool = False) -> Any:
    """One of the words, or a file, or with ``number`` one."""

    def structure(value: Any, _: Any) -> Any:
        if value is None or value in words:
            return value
        if number and isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
        if not isinstance(value, (str, Path)):
            raise ValueError(f"expected one of {words} or a file, got {value!r}")
        return Path(value)

    return structure


def _weights(value: Any, _: Any) -> Any:
    if value is None or value == "balanced":
        return value
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"expected a number for each class or 'balanced', got {value!r}")
    return tuple(_number(one, float) for one in value)


_GROUPS = {"data": DataConfig, "model": ModelConfig, "optim": OptimConfig}
_GROUPS |= {"positive": DrawingsConfig, "negative": DrawingsConfig}
_CONVERTER = cattrs.Converter(forbid_extra_keys=True)
_CONVERTER.register_structure_hook(float, _number)  # cattrs would turn "3" into 3.0 and "no" into True
for _kind in (int, bool, str):
    _CONVERTER.register_structure_hook(_kind, _exactly(_kind))
_CONVERTER.register_structure_hook(Path, lambda value, _: Path(value))
_CONVERTER.register_unstructure_hook(Path, str)
_CONVERTER.register_structure_hook(Naming | Path, _or_file(*get_args(Naming)))
_CONVERTER.register_structure_hook(tuple[float, ...] | Balanced | None, _weights)
_CONVERTER.register_structure_hook(float | Measured | Path | None, _or_file(*get_args(Measured), number=True))

__all__ = [
    "DataConfig",
    "DrawingsConfig",
    "FitConfig",
    "ModelConfig",
    "OptimConfig",
    "from_dict",
    "load_toml",
    "recipe",
    "replace",
    "to_dict",
    "to_toml",
]
