"""What one run of a table has come to: its scores, and the matrix that it believes beside the one that is counted.

Cells of many runs travel in one file, cells.json: {hash of the run: {split: `Cell`}}.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import cattrs
import numpy as np
import torch
from torch import Tensor

from ..config import FitConfig, Measured
from ..data import Source, open_split
from ..data.segmentation import SegmentationData, open_pen, plain
from ..distributed import join_world
from ..inference import load_model, score
from ..metrics import ConfusionMeter
from ..model import CoarseModel, confusion_sums
from ..simulate import pair_counts, shares
from ..storage import locked, write_text

_MATRIX_IMAGES = 512  # of the training split, over which the believed matrix is averaged


@dataclass(frozen=True)
class Cell:
    """One row with one seed. Scores in percent.

    method, seed: the row, and its seed.
    miou: mean IoU at the last step on the split that the table asks for, with its dense masks; of a row whose
        masks choose the checkpoint (select_with), of that one.
    miou_validation, miou_best: on the validation masks at the last step, and the best of all evaluations on them (which
        chose nothing); None where there are none.
    seconds: until the last step was taken, the evaluations before it included.
    iou: of each class by its name, as ``miou``; None for a class that occurs nowhere.
    believed, observed: p(drawn | true), from 0 to 1, of the positive drawings, [drawn][true]: of a model that learned matrices,
        and counted on the same training images; None where no matrix was learned. cm_error: mean absolute difference of
        their entries, over the classes that were drawn on.
    reads: what looked at dense masks.
    folder: of the run.
    """

    method: str
    seed: int
    miou: float
    miou_validation: float | None
    miou_best: float | None
    seconds: float
    iou: dict[str, float | None]
    cm_error: float | None
    believed: list[list[float]] | None
    observed: list[list[float]] | None
    reads: str
    folder: str


Scores = dict[str, dict[str, Cell]]  # hash of a run -> split -> cell
_CONVERTER = cattrs.Converter(forbid_extra_keys=True)


def read_cell(path: Path) -> Cell:
    """Raises ValueError naming the file and what is wrong in it."""
    cell: Cell = _structured(path, "a cell of a table", Cell)
    return cell


def read_scores(path: Path) -> Scores:
    """Of a cells.json; none where there is no such file. Raises ValueError naming the file and what is wrong in it."""
    if not path.exists():
        return {}
    scores: Scores = _structured(path, "the scores of an earlier table", Scores)
    return scores


def _structured(path: Path, what: str, kind: Any) -> Any:
    try:
        found = _CONVERTER.structure(json.loads(path.read_text()), kind)
        cells = [found] if kind is Cell else [cell for splits in found.values() for cell in splits.values()]
        if any(not math.isfinite(cell.miou) for cell in cells):
            raise ValueError("a miou that is no number")
    except cattrs.BaseValidationError as error:
        raise ValueError(
            f"{path}: expected {what}, got {'; '.join(cattrs.transform_error(error, path='it'))}"
        ) from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: expected {what}, got {error}") from error
    return found


def write_scores(out: Path) -> None:
    """OUT/cells.json: what it has already, and every score in OUT/cells, a line for each run. A cell that is damaged is left
    out; where another process writes the file, this one leaves it to it.

    Raises:
        ValueError: the file that is there is damaged.
        coarse_train.run.CheckpointError: it cannot be written.
    """
    with locked(out / ".cells.lock") as free:
        if not free:  # by a process that finds the same scores
            return
        scores = read_scores(out / "cells.json")
        for kept in sorted((out / "cells").glob("*/*.json")):
            try:
                scores.setdefault(kept.parent.name, {})[kept.stem] = read_cell(kept)
            except ValueError:  # damaged: whoever asks for it is told
                continue
        lines = (
            f"{json.dumps(name)}: {json.dumps({split: asdict(cell) for split, cell in splits.items()})}"
            for name, splits in sorted(scores.items())
            if splits
        )
        write_text(out / "cells.json", "{\n" + ",\n".join(lines) + "\n}\n")


def scored(checkpoint: Path, config: FitConfig, split: str) -> Cell:
    """What a run of ``config`` has come to, on the dense masks of a split."""
    loaded = load_model(checkpoint, network=config.model.network)
    source = open_split(config.data, split)
    with join_world("cpu") as world:
        meter, _ = score(loaded.model.segmentation, source, world=world, channels=loaded.channels)
    steps = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    scores = [step["mean_iou"] for step in steps if step.get("mean_iou") is not None]
    matrices = None
    trained = loaded.config  # of a row whose masks chose, what they took
    if loaded.model.positive is not None and trained.data.supervision != "masks":
        matrices = _matrices(loaded.model, open_split(trained.data, "train"), trained, loaded.channels)
    return Cell(
        method="",
        seed=config.seed,
        miou=meter.mean_iou(),
        miou_validation=scores[-1] if scores else None,
        miou_best=max(scores, default=None),
        seconds=_seconds([step["seconds"] for step in steps if "seconds" in step]),
        iou=_by_class(meter, source),
        cm_error=None if matrices is None else matrices.error(),
        believed=None if matrices is None else matrices.believed.tolist(),
        observed=None if matrices is None else matrices.observed.tolist(),
        reads=_readers(config),
        folder=str(config.out),
    )


def _readers(config: FitConfig) -> str:
    """What looked at dense masks."""
    found = ["scores"]
    if config.data.supervision != "drawings":
        found.append(f"training ({config.data.supervision})")
    if config.select_with:
        found.append(f"a choice (select_with {config.select_with})")
    if config.positive.pen in get_args(Measured):
        found.append(f"the pen ({config.data.dense_images} of training images)")
    return "; ".join(found)


def _seconds(times: Sequence[float]) -> float:
    """Since the start of the run, which counts from 0 again where it was interrupted."""
    ends = [one for one, after in itertools.pairwise(times) if after < one]
    return sum(ends) + (times[-1] if times else 0.0)


def _by_class(meter: ConfusionMeter, source: Source) -> dict[str, float | None]:
    values = zip(source.classes.names, (100 * meter.iou()).tolist(), strict=True)
    return {name: None if value != value else round(value, 2) for name, value in values}  # NaN: in no mask


@dataclass(frozen=True)
class _Matrices:
    """(C, C) float64 [drawn, true], believed and counted over the same images."""

    believed: Tensor
    observed: Tensor

    def error(self) -> float:
        """Mean absolute difference of the entries, over the classes that were drawn on."""
        counted = self.observed.sum(0) > 0
        return float((self.believed - self.observed)[:, counted].abs().mean())


@torch.no_grad()
def _matrices(model: CoarseModel, source: Source, config: FitConfig, channels: int) -> _Matrices | None:
    """Of the positive drawings of the first training images that have a mask; None where none has both."""
    pen, _ = open_pen(config, source)
    dataset = SegmentationData(source, plain(config.data), seed=config.seed, training=False, channels=channels, pen=pen)
    classes = len(source.classes)
    weighted, weight = torch.zeros(classes, classes), torch.zeros(classes)
    counts = np.zeros((classes, classes), np.int64)
    with_mask = [index for index in range(len(dataset)) if "mask" in source.kinds(index)]
    for index in with_mask[:_MATRIX_IMAGES]:
        sample = dataset[index]
        sums = confusion_sums(model(sample.image[None]), "positive")
        weighted, weight = weighted + sums[0], weight + sums[1]
        counts += pair_counts(sample.positive.numpy(), sample.mask.numpy(), classes)
    if not counts.any():
        return None
    return _Matrices((weighted / weight).double(), torch.from_numpy(shares(counts)))
