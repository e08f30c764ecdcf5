"""A table: rows that are configs, each trained with some seeds by `fit`, scored, and kept.

    rows = {"trusted": config, "matrix": replace(config, positive=DrawingsConfig(cm="global"))}
    cells = run_table(rows, seeds=(0, 1, 2), out=Path("runs/table"))

Each config with its seed has a folder of its own, OUT/cells/HASH, named after all that changes its result. So a table that
was interrupted goes on, and tables in one folder share the rows that they have in common.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..config import FitConfig, from_dict, to_dict
from ..data import Source, open_split
from ..data.segmentation import SegmentationData
from ..distributed import join_world
from ..engine import fit
from ..inference import load_model, score
from ..metrics import ConfusionMeter
from ..model import confusion_sums
from ..run import write_text
from ..simulate import pair_counts, shares

# They change no score: where a run lies, what it may be interrupted by, who computes.
_FREE = ("out", "resume", "save_every", "backend", "device", "threads")
_MATRIX_IMAGES = 512  # of the training split, over which the believed matrix is averaged


@dataclass(frozen=True)
class Cell:
    """One row with one seed. Scores in percent.

    method: the row. miou: mean IoU at the last step on the split that the table asks for, with its dense masks.
    miou_validation, miou_best: on the validation masks at the last step, and the best of all evaluations on them (which
        chose nothing); None where there are none.
    iou: of each class, as ``miou``; None for a class that occurs nowhere.
    believed, observed: p(drawn | true) of the positive drawings, [drawn][true]: of the model where it has matrices, and
        counted on the training images that have a mask. cm_error: mean absolute difference of their entries.
    reads: what looked at dense masks.
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


def run_table(
    rows: Mapping[str, FitConfig],
    seeds: Sequence[int],
    out: Path,
    *,
    split: str = "test",
    jobs: int | None = None,
    said: Callable[[str], None] = print,
) -> list[Cell]:
    """Train what is not there yet, ``jobs`` runs at a time, and return all cells in the order of rows and seeds.

    jobs: processes; without it one for each core, and PyTorch in each has one thread: small networks gain little from more.
    """
    todo = [(row, _with_seed(config, seed, out)) for row, config in rows.items() for seed in seeds]
    jobs = min(len(todo), jobs or len(os.sched_getaffinity(0)))
    cells: dict[tuple[str, int], Cell] = {}
    tasks = [(row, to_dict(config), split) for row, config in todo]
    if jobs <= 1:
        for task in tasks:
            _collect(cells, _run(*task), said)
    else:
        # spawned, not forked: a fork of a process that has threads may hang
        with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
            for done in as_completed([pool.submit(_run, *task) for task in tasks]):
                _collect(cells, done.result(), said)
    return [cells[row, config.seed] for row, config in todo]


def _collect(cells: dict[tuple[str, int], Cell], cell: Cell, said: Callable[[str], None]) -> None:
    cells[cell.method, cell.seed] = cell
    said(f"{cell.method}, seed {cell.seed}: mean IoU {cell.miou:.1f} after {cell.seconds:.0f} s")


def digest(config: FitConfig) -> str:
    content = {key: value for key, value in to_dict(config).items() if key not in _FREE}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _with_seed(config: FitConfig, seed: int, out: Path) -> FitConfig:
    config = replace(config, seed=seed, threads=config.threads or 1, resume=True)
    return replace(config, out=out / "cells" / digest(config), save_every=max(1, config.steps))


def _run(row: str, content: dict[str, object], split: str) -> Cell:
    """In a process of its own, so that what `fit` says goes to a file."""
    config = from_dict(content)
    kept = config.out / f"{split}.json"
    if not kept.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        with open(config.out / "log.txt", "a") as log, redirect_stderr(log):
            fit(config)
            cell = _cell(row, config, split)
        write_text(kept, json.dumps(asdict(cell), indent=2) + "\n")
    return replace(Cell(**json.loads(kept.read_text())), method=row, folder=str(config.out))


def _cell(row: str, config: FitConfig, split: str) -> Cell:
    loaded = load_model(config.out / "last.pt")
    source = open_split(config.data, split)
    with join_world("cpu") as world:
        meter = score(loaded.model.segmentation, source, world=world, channels=loaded.channels)
    steps = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    scores = [step["mean_iou"] for step in steps if step.get("mean_iou") is not None]
    believed = observed = error = None
    if loaded.model.positive is not None:
        train = open_split(config.data, "train")
        estimated, counted = _matrices(loaded.model, train, config, loaded.channels)
        error = float((estimated - counted).abs().mean())
        believed, observed = estimated.tolist(), counted.tolist()
    masks = config.data.supervision != "drawings" or config.select_with > 0
    reads = "scores" if not masks else f"scores; training ({config.data.supervision}, select_with {config.select_with})"
    return Cell(
        row,
        config.seed,
        meter.mean_iou(),
        scores[-1] if scores else None,
        max(scores, default=None),
        max((step["seconds"] for step in steps if "seconds" in step), default=0.0),
        _by_class(meter, source),
        error,
        believed,
        observed,
        reads,
        str(config.out),
    )


def _by_class(meter: ConfusionMeter, source: Source) -> dict[str, float | None]:
    shares = zip(source.classes.names, (100 * meter.iou()).tolist(), strict=True)
    return {name: None if share != share else round(share, 2) for name, share in shares}  # NaN: in no mask


@torch.no_grad()
def _matrices(model: torch.nn.Module, source: Source, config: FitConfig, channels: int) -> tuple[Tensor, Tensor]:
    """(C, C) [drawn, true] believed and counted, of the positive drawings of the first training images."""
    plain = replace(config.data, crop=None, scale=(1.0, 1.0), flip=False, colour=0.0)
    dataset = SegmentationData(source, plain, seed=config.seed, training=False, channels=channels)
    classes = len(source.classes)
    weighted, weight = torch.zeros(classes, classes), torch.zeros(classes)
    counts = np.zeros((classes, classes), np.int64)
    for index in range(min(len(dataset), _MATRIX_IMAGES)):
        sample = dataset[index]
        sums = confusion_sums(model(sample.image[None]), "positive")
        weighted, weight = weighted + sums[0], weight + sums[1]
        counts += pair_counts(sample.positive.numpy(), sample.mask.numpy(), classes)
    return (weighted / weight).double(), torch.from_numpy(shares(counts))


# --- what it says -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Over the seeds of a row: mean and the largest difference of two."""

    mean: float
    spread: float

    @staticmethod
    def of(cells: Sequence[Cell], row: str) -> Summary:
        scores = [cell.miou for cell in cells if cell.method == row]
        return Summary(statistics.fmean(scores), max(scores) - min(scores))


def text(cells: Sequence[Cell], split: str) -> str:
    """Aligned: a line for each row, with every seed where there are several."""
    rows = list(dict.fromkeys(cell.method for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    wide = max(map(len, rows))
    several = len(seeds) > 1
    head = f"{'row':<{wide}}" + "".join(f"{'seed ' + str(seed):>9}" for seed in seeds)
    lines = [head + (f"{'mean':>7}{'spread':>8}" if several else "") + f"{'best':>7}{'CM error':>10}{'seconds':>9}"]
    for row in rows:
        own = {cell.seed: cell for cell in cells if cell.method == row}
        line = f"{row:<{wide}}" + "".join(f"{own[seed].miou:>9.1f}" for seed in seeds)
        if several:
            summary = Summary.of(cells, row)
            line += f"{summary.mean:>7.1f}{summary.spread:>8.1f}"
        errors = [cell.cm_error for cell in own.values() if cell.cm_error is not None]
        error = f"{statistics.fmean(errors):.3f}" if errors else "-"
        bests = [cell.miou_best for cell in own.values() if cell.miou_best is not None]
        best = f"{statistics.fmean(bests):.1f}" if bests else "-"
        lines.append(f"{line}{best:>7}{error:>10}{statistics.fmean(c.seconds for c in own.values()):>9.0f}")
    lines.append(
        f"Mean IoU in percent at the last step, {split} masks, all classes; best: of the evaluations on validation masks; "
        "spread: largest difference between seeds."
    )
    return "\n".join(lines)


def write_results(path: Path, cells: Sequence[Cell], rows: Mapping[str, FitConfig], **more: object) -> None:
    """JSON, all or nothing."""
    configs = {row: {**to_dict(config), "out": None} for row, config in rows.items()}
    content = {"rows": [asdict(cell) for cell in cells], "configs": configs, **more}
    write_text(path, json.dumps(content, indent=2) + "\n")
