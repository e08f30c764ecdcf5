"""What a run shows of itself at an evaluation: a row of scores, pictures, and in words what is wrong."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coarse_kernels import Drawings, annotation_posterior, label_map

from .config import FitConfig
from .data import IGNORE, Sample, Source
from .data.segmentation import SegmentationData
from .distributed import World
from .inference import InferenceConfig, Scores, predictions
from .metrics import ConfusionMeter, describe_collapse
from .model import CoarseModel, ModelOutput, mean_confusion
from .pictures import draw_maps, draw_matrix
from .run import RunLog

_LARGEST = 480  # pixels of a side in a picture
_LOWEST = 3  # classes that the log names


@torch.no_grad()
def show_progress(
    log: RunLog,
    config: FitConfig,
    step: int,
    model: CoarseModel,
    dataset: SegmentationData,
    scored: tuple[Source, Scores] | None,
    world: World,
) -> None:
    """In the main process alone. ``scored``: the validation images with masks, if there are any.

    The row in metrics.jsonl has ``mean_iou``, ``pixel_accuracy``, ``iou`` (class -> percent, null for one that does not occur),
    ``confusion`` (pixels [true, predicted]), ``images`` (how many), ``worst`` and ``best`` of them ([name, mean IoU]), and for
    kinds of drawings with a matrix ``positive_cm`` and ``negative_cm`` (drawn as -> share of each true class), of the first
    training image.
    """
    names = dataset.source.classes.names
    model.eval()
    sample = dataset[0]
    output = model(sample.image[None].to(world.device))
    prediction = label_map(output.seg_logits, sample.image.shape[1:], backend=config.backend)[0].cpu()
    row: dict[str, Any] = {}
    if scored is None:  # what is drawn has to tell of a collapse
        meter = ConfusionMeter(len(names))
        meter.update(prediction, sample.positive)
    else:
        meter = scored[1].meter
        row = row_of(*scored, config.pictures)
        low = [f"{name} ({iou:.1f})" for name, iou in sorted(row["iou"].items(), key=lambda one: one[1]) if iou == iou]
        log.say(
            f"step {step}/{config.steps}  mean IoU {row['mean_iou']:.2f} on {row['images']} validation masks; "
            f"lowest: {', '.join(low[:_LOWEST]) or 'none'}"
        )
    kinds = [kind for kind in ("positive", "negative") if getattr(output, f"{kind}_cm") is not None]
    matrices = {kind: mean_confusion(output, kind).tolist() for kind in kinds}  # type: ignore[arg-type]
    named = {f"{kind}_cm": dict(zip(names, matrix, strict=True)) for kind, matrix in matrices.items()}
    log.scores(step, {**row, **named})
    if collapse := describe_collapse(meter.counts, names):
        log.say(f"note: at step {step} {collapse}")
    if not config.pictures:
        return
    _draw_training(log, config, step, dataset, sample, output, prediction)
    for kind, matrix in matrices.items():
        title = f"{kind} drawings, as believed at step {step}"
        picture = draw_matrix(np.array(matrix), names, title=title, rows="drawn as", columns="true class")
        log.picture(f"confusion_{kind}", picture, step)
    if scored is not None:
        _draw_validation(log, config, step, model, dataset.channels, *scored, row, world)


def row_of(source: Source, scores: Scores, most: int) -> dict[str, Any]:
    """What metrics.jsonl keeps of ``scores`` on ``source``; at most so many images are named as worst and as best."""
    each = scores.images.tolist()
    order = sorted((index for index in range(len(each)) if not math.isnan(each[index])), key=each.__getitem__)
    named = [[source.name(index), each[index]] for index in order]
    best = min(most, len(named) // 2)
    return {
        "mean_iou": scores.meter.mean_iou(),
        "pixel_accuracy": scores.meter.pixel_accuracy(),
        "iou": dict(zip(source.classes.names, (100 * scores.meter.iou()).tolist(), strict=True)),
        "confusion": scores.meter.counts.tolist(),
        "images": len(each),
        "worst": named[: min(most, len(named) - best)],
        "best": named[::-1][:best],
    }


def _draw_training(
    log: RunLog,
    config: FitConfig,
    step: int,
    dataset: SegmentationData,
    sample: Sample,
    output: ModelOutput,
    prediction: Tensor,
) -> None:
    """The first training image, its drawings, what is predicted and what is believed."""
    device = output.seg_logits.device
    believed = posterior(output, sample.positive[None].to(device), sample.negative[None].to(device), config.backend)
    layers = len(sample.negative)
    maps = {
        "positive drawings": sample.positive,
        "negative: not this" + (f" (1 of {layers})" if layers > 1 else ""): sample.negative[0],
        "prediction": prediction,
        "posterior": believed.argmax(1)[0].byte().cpu(),
    }
    picture = draw_maps(
        (sample.image.movedim(0, -1) * 255).round().byte().numpy(),
        {name: labels.numpy() for name, labels in maps.items()},
        dataset.source.classes,
        title=f"{dataset.source.name(0)} (training), step {step}",
        opacity=config.opacity,
        largest=_LARGEST,
    )
    log.picture("training", picture, step)


def _draw_validation(
    log: RunLog,
    config: FitConfig,
    step: int,
    model: CoarseModel,
    channels: int | None,
    source: Source,
    scores: Scores,
    row: dict[str, Any],
    world: World,
) -> None:
    """The confusion matrix, and the images that ``row`` names."""
    classes, counts = source.classes, scores.meter.counts.cpu().double()
    shares = (counts / counts.sum(1, keepdim=True)).numpy()
    title = f"validation, {row['images']} images, step {step}"
    picture = draw_matrix(shares, classes.names, title=title, rows="true class", columns="predicted")
    log.picture("confusion_validation", picture, step)
    places = {source.name(index): index for index in range(len(source))}
    shown = [(f"{end}_{number}", *one) for end in ("worst", "best") for number, one in enumerate(row[end], start=1)]
    found = predictions(
        model.segmentation,
        source,
        [places[name] for _, name, _ in shown],
        world,
        channels=channels,
        config=InferenceConfig(),
    )
    for (file, name, iou), (record, labels) in zip(shown, found, strict=True):
        assert record.mask is not None
        title = f"{name}: mean IoU {iou:.1f}, step {step}"
        maps = {"mask": record.mask, "prediction": labels.cpu().numpy()}
        picture = draw_maps(record.image, maps, classes, title=title, opacity=config.opacity, largest=_LARGEST)
        log.picture(file, picture, step)


def posterior(output: ModelOutput, positive: Tensor, negative: Tensor, backend: str | None = None) -> Tensor:
    """(B, C, H, W) p(true class | image, all its drawings).

    Args: positive (B, H, W), negative (B, K, H, W) uint8.
    """
    drawings = [
        Drawings(positive, output.positive_cm),
        Drawings(negative, output.negative_cm, output.negative_transition()),
    ]
    return annotation_posterior(output.seg_logits.float(), drawings, ignore_index=IGNORE, backend=backend)
