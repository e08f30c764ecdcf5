"""Scores of a trained network on the dense masks of a split.

coarse-train evaluate runs/street/best.pt --split test --out scores.json
torchrun --nproc-per-node 4 -m coarse_train evaluate runs/street/best.pt      the same scores
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from ..config import FitConfig
from ..data import Record, Subset
from ..distributed import World, join_world
from ..inference import InferenceConfig, LoadedModel, load_model, open_trained_split, score
from ..metrics import ConfusionMeter, describe_collapse, largest_confusions
from ..run import claim_folder, without_nan
from ..storage import look_at_file
from .options import check_reading
from .predict import write_labels

_HEAD = '{\n  "checkpoint": '  # of a file of scores


@dataclass(frozen=True)
class EvaluateConfig:
    """Score a trained network on dense masks; images that have none are counted and left out."""

    checkpoint: tyro.conf.Positional[Path]
    """best.pt or last.pt of a run: the network, its classes and its data set."""
    network: str | None = None
    """package.module:name, where the run's network is none of ours: it is code, which is run only if it is named here again."""
    split: str = "val"
    """train, val or test."""
    root: Path | None = None
    """Folder of the data set; without it that of the run."""
    dataset: str | None = None
    """Another data set with the same classes; without it that of the run."""
    variant: str | None = None
    """Another variant of its labels."""
    inference: Annotated[InferenceConfig, tyro.conf.arg(name="")] = field(default_factory=InferenceConfig)
    device: str | None = None
    """Without it cuda where there is one, else cpu."""
    workers: int = 0
    """Processes that read images; 0: the evaluating process does."""
    limit: int | None = None
    """At most so many images (the first that have a mask)."""
    skip_bad: bool = False
    """List and leave out images whose files are missing, damaged or inconsistent; without it the first is an error."""
    max_pixels: int | None = None
    """Images and label maps of more pixels are an error; without it those of more than the run allowed."""
    out: Path | None = None
    """JSON file with all scores and the confusion matrix."""
    export: Path | None = None
    """Folder for the predictions of what is scored, NAME.png with the values of the data set's label files: what the official
    Cityscapes evaluator takes as CITYSCAPES_RESULTS."""
    overwrite: bool = False
    """Export into a folder that is not empty; other files in it stay."""


def run_evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Print the table and return what `out` gets: scores in percent, None for what does not occur.

    Under torchrun the images are spread over the processes, each is counted once, and all return the same.
    """
    check_reading(config.workers, config.max_pixels)
    if config.limit is not None and config.limit < 1:
        raise ValueError(f"limit: expected a number >= 1, got {config.limit}")
    with join_world(config.device) as world:
        loaded = load_model(config.checkpoint, world.device, network=config.network)
        source = open_trained_split(
            loaded,
            config.split,
            root=config.root,
            dataset=config.dataset,
            variant=config.variant,
            skip_bad=config.skip_bad,
            max_pixels=config.max_pixels,
        )
        with_mask = [index for index in range(len(source)) if "mask" in source.kinds(index)]
        if not with_mask:
            raise ValueError(f"evaluate needs dense masks; not one of {len(source)} images of {config.split} has one")
        without = len(source) - len(with_mask)
        source = Subset(source, with_mask[: config.limit])
        images = len(source)
        _prepare_out(config, world)

        def export(record: Record, predicted: np.ndarray) -> None:
            if config.export is not None:
                write_labels(config.export, record.name, predicted, source.classes)

        meter, _ = score(
            loaded.model.segmentation,
            source,
            world=world,
            channels=loaded.channels,
            config=config.inference,
            workers=config.workers,
            on_prediction=None if config.export is None else export,
        )
        if not meter.counts.any():
            raise ValueError(
                f"evaluate needs dense masks; not one pixel of {images} images of {config.split} has a class"
            )
        result = _result(config, loaded, images, without, meter)
        if world.is_main:
            if config.out is not None:
                config.out.write_text(json.dumps(result, indent=2) + "\n")
            print(table(result))
    return result


def _prepare_out(config: EvaluateConfig, world: World) -> None:
    """Fail before the work rather than after it."""
    if config.out is not None:
        look_at_file("out", config.out, _HEAD)
        config.out.parent.mkdir(parents=True, exist_ok=True)
    if config.export is not None:
        claim_folder("export", config.export, world, overwrite=config.overwrite)


def _result(
    config: EvaluateConfig, loaded: LoadedModel, images: int, without: int, meter: ConfusionMeter
) -> dict[str, Any]:
    trained = loaded.config.data
    root = config.root or (trained.root if config.dataset in (None, trained.dataset) else None)
    own = config.split == "val" and config.dataset is None
    names = loaded.classes.names
    rows = zip(names, *((100 * s).tolist() for s in (meter.iou(), meter.dice(), meter.accuracy())), strict=True)
    result = {
        "checkpoint": str(config.checkpoint),
        "step": loaded.step,
        "dataset": config.dataset or trained.dataset,
        "root": None if root is None else str(root),
        "split": config.split,
        "images": images,
        "images_without_mask": without,
        "pixels": int(meter.counts.sum()),
        "inference": str(config.inference),
        # of the same split, `limit` or not: a score on them is no score on unseen images
        "chosen_with": loaded.config.select_with if own and _was_chosen(config.checkpoint, loaded.config) else 0,
        "learned_from": loaded.config.data.dense_images if own and loaded.config.data.dense_split == "val" else 0,
        "mean_iou": meter.mean_iou(),
        "mean_dice": meter.mean_dice(),
        "pixel_accuracy": meter.pixel_accuracy(),
        "mean_accuracy": meter.mean_accuracy(),
        "classes": {name: {"iou": iou, "dice": dice, "accuracy": accuracy} for name, iou, dice, accuracy in rows},
        "confusion": meter.counts.tolist(),  # [true, predicted]
        "most_confused": [list(pair) for pair in largest_confusions(meter.counts, names)],
        "collapse": describe_collapse(meter.counts, names),
    }
    return without_nan(result)


def _was_chosen(checkpoint: Path, config: FitConfig) -> bool:
    """By the masks of ``select_with``: the last step is not, but what the run is may be."""
    if checkpoint.name != "last.pt":
        return True
    return config.select_steps != 0 and checkpoint.with_name("selection.json").exists()


def _chosen(result: dict[str, Any]) -> str:
    what = "what this run learned from" if Path(result["checkpoint"]).name == "last.pt" else "this checkpoint"
    return f"{result['chosen_with']} masks of this split chose {what}"


def table(result: dict[str, Any]) -> str:
    """The scores as text, in percent; "-" for a class that is neither in the masks nor predicted."""
    where = f"{result['dataset']} {result['split']}" + (f" in {result['root']}" if result["root"] else "")
    wide = max(len("pixel accuracy"), *map(len, result["classes"]))
    rows = [(name, scores["iou"], scores["dice"]) for name, scores in result["classes"].items()]
    lines = [
        f"{result['checkpoint']}, step {result['step']}, on {where}",
        f"{result['images']} images, {result['pixels']} labelled pixels, {result['inference']}",
        *(
            [f"{result['images_without_mask']} more have no mask and are not scored"]
            if result["images_without_mask"]
            else []
        ),
        *([_chosen(result)] if result["chosen_with"] else []),
        *([f"{result['learned_from']} masks of this split were learned from"] if result["learned_from"] else []),
        "",
        f"{'':{wide}}     IoU    Dice",
        *(f"{name:{wide}}  {_cell(iou)}  {_cell(dice)}" for name, iou, dice in rows),
        f"{'mean':{wide}}  {_cell(result['mean_iou'])}  {_cell(result['mean_dice'])}",
        f"{'pixel accuracy':{wide}}  {_cell(result['pixel_accuracy'])}",
        *(
            ["", "most confused, the most pixels first, in percent of the class's pixels"]
            if result["most_confused"]
            else []
        ),
        *(f"{true:{wide}}  {share:6.2f}  predicted as {other}" for true, other, share in result["most_confused"]),
        *([f"note: {result['collapse']}"] if result["collapse"] else []),
    ]
    return "\n".join(lines)


def _cell(value: float | None) -> str:
    return f"{'-':>6}" if value is None else f"{value:6.2f}"
