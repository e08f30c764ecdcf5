"""The first run: six ways to learn segmentation from coarse drawings of real MNIST digits.

    python -m coarse_train demo                      four digit classes; two to three minutes on two idle cores
    python -m coarse_train demo --task binary        the paper's binary masks
    python -m coarse_train demo --data DIR           the full IDX files instead of the sample in the package

Two digits stand on a 48x48 canvas. Their positive drawings are mostly incomplete, and three in ten carry another
class's name; their negative drawings ("this region is not a 7") are honest but weak (`coarse_train.simulate`).
All six rows share network, steps, batches, optimizer and schedule. Scores are mIoU in percent, background included, of
held-out test digits with true masks; the last step counts, and nothing is chosen by a test score (settings: `tune.py`).

Writes ``results.json`` and ``figure.png`` to ``--out``.
"""

from __future__ import annotations

import math
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import coarse_kernels

from ..data import Splits
from ..data.mnist import load_splits
from ..model import CoarseModel
from ..simulate import PRESETS, Preset, observed_confusion
from .loop import History, TrainConfig, evaluate, train
from .methods import (
    CROSS_ENTROPIES,
    METHODS,
    MethodSettings,
    build_loss,
    build_model,
    estimated_confusion,
    transition_for,
)
from .report import print_table, save_figure
from .tune import chosen_settings, used, write_json

EXPECTED_LEAD = 8.0  # points of mIoU that coarse_both should be ahead of the best cross-entropy


@dataclass(frozen=True)
class DemoConfig:
    """Train the six rows, print the table, write results.json and figure.png."""

    task: str = "multiclass"
    """multiclass (background + 4 digit classes) or binary (background + digit)."""
    data: Path | None = None
    """Folder with the four IDX files of MNIST; without it the sample in the package."""
    seed: int = 0
    """Of the drawings, the placing of the training digits, the networks and the order of the batches."""
    out: Path = Path("runs/demo")
    steps: int = 1200
    """Training steps of each row."""
    batch_size: int = 16
    evaluations: int = 4
    """Scores on the test canvases during training, the last step included."""
    backend: str | None = None
    """Backend of coarse_kernels in the method rows; without it the best that can run."""
    threads: int | None = None
    """Threads of PyTorch; without it PyTorch's own choice. Equal seeds and threads give equal numbers."""
    max_train: int | None = None
    """At most so many training canvases."""
    max_test: int | None = None
    """At most so many test canvases."""


def run_demo(config: DemoConfig) -> dict[str, object]:
    """Run it all; returns what results.json holds."""
    preset = _check(config)
    settings, selection = chosen_settings(config.task)
    splits = load_splits(
        folder=config.data, preset=preset, seed=config.seed, max_train=config.max_train, max_test=config.max_test
    )
    _prepare_folder(config.out)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    classes = preset.num_classes
    backend = config.backend or os.environ.get("COARSE_KERNELS_BACKEND") or coarse_kernels.available_backends()[0]
    drawings = splits.train.stacked
    true_confusion = torch.from_numpy(observed_confusion(drawings.positive.numpy(), drawings.mask.numpy(), classes))

    images = splits.train.select(range(min(512, len(splits.train)))).image

    rows: list[dict[str, object]] = []
    models: dict[str, CoarseModel] = {}
    confusions: dict[str, Tensor] = {}
    with tqdm(total=config.steps * len(METHODS), unit="step", smoothing=0.05) as bar:
        for method in METHODS:
            bar.set_description(f"{method:<15}")
            model, history = _train_row(method, settings[method], config, preset, splits, backend, bar)
            if model.positive is not None:
                confusions[method] = estimated_confusion(model, images)
            rows.append(_row(method, model, history, splits, classes, confusions.get(method), true_confusion))
            models[method] = model

    results: dict[str, object] = {
        "rows": rows,
        "backend": backend,
        "seed": config.seed,
        "preset": asdict(preset),
        "config": _describe(config, splits, settings, selection),
        "cm_error": _row_of(rows, "coarse_both")["cm_error"],
        "estimated_confusion": confusions["coarse_both"].tolist(),
        "true_confusion": true_confusion.tolist(),
        **_lead(rows),
    }
    transition = transition_for(settings["coarse_both"].transition, splits.train, classes)
    save_figure(config.out / "figure.png", splits, models, transition, confusions["coarse_both"], true_confusion, rows)
    write_json(config.out / "results.json", results)
    print_table(results)
    print(f"{config.out / 'results.json'}, {config.out / 'figure.png'}")
    return results


def _train_row(
    method: str,
    settings: MethodSettings,
    config: DemoConfig,
    preset: Preset,
    splits: Splits,
    backend: str,
    bar: tqdm,
) -> tuple[CoarseModel, History]:
    model = build_model(method, settings, preset.num_classes, config.seed)
    transition = transition_for(settings.transition, splits.train, preset.num_classes)
    run = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        lr=settings.lr,
        cm_lr=settings.cm_lr,
        evaluations=config.evaluations,
        seed=config.seed,
    )
    loss_function = build_loss(method, settings, transition, backend)

    def on_step(loss: float) -> None:
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        bar.update()

    return model, train(model, loss_function, splits.train, splits.test, preset.num_classes, run, on_step)


def _row(
    method: str,
    model: CoarseModel,
    history: History,
    splits: Splits,
    classes: int,
    estimated: Tensor | None,
    true_confusion: Tensor,
) -> dict[str, object]:
    per_class = (100 * evaluate(model, splits.test, classes).iou()).tolist()
    return {
        "method": method,
        "miou": round(history.last, 2),
        "miou_best": round(history.best, 2),
        "seconds": round(history.seconds, 3),
        "cm_error": None if estimated is None else round(float((estimated - true_confusion).abs().mean()), 4),
        "iou": {k: None if math.isnan(x) else round(x, 2) for k, x in zip(splits.class_names, per_class, strict=True)},
        "history": {"step": history.steps, "miou": [round(x, 2) for x in history.miou], "loss": history.loss},
    }


def _row_of(rows: list[dict[str, object]], method: str) -> dict[str, object]:
    return next(row for row in rows if row["method"] == method)


def _lead(rows: list[dict[str, object]]) -> dict[str, object]:
    """How far coarse_both is ahead of the best cross-entropy, in points of mIoU at the last step."""
    best = max((_row_of(rows, method) for method in CROSS_ENTROPIES), key=lambda row: float(str(row["miou"])))
    lead = float(str(_row_of(rows, "coarse_both")["miou"])) - float(str(best["miou"]))
    return {"best_cross_entropy": best["method"], "lead": round(lead, 2), "expected_lead": EXPECTED_LEAD}


def _describe(
    config: DemoConfig, splits: Splits, settings: dict[str, MethodSettings], selection: str
) -> dict[str, object]:
    return {
        **{name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()},
        "settings": {method: used(method, settings[method]) for method in METHODS},
        "selection": selection,
        "scored_on": "true masks of held-out test digits; miou = last step, miou_best = best of the evaluations",
        "cm_error": (
            "mean absolute difference of the entries of the estimated p(drawn | true) and of the one counted from the "
            "positive drawings and true masks of the training canvases"
        ),
        "canvases": {"train": len(splits.train), "validation": len(splits.validation), "test": len(splits.test)},
        "class_names": list(splits.class_names),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def _check(config: DemoConfig) -> Preset:
    if config.task not in PRESETS:
        raise ValueError(f"task: expected one of {tuple(PRESETS)}, got {config.task!r}")
    for name in ("steps", "batch_size", "evaluations", "threads", "max_train", "max_test"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    if config.backend is not None and config.backend not in coarse_kernels.available_backends():
        raise ValueError(
            f"backend: expected one that can run here {coarse_kernels.available_backends()}, got {config.backend!r}"
        )
    return PRESETS[config.task]


def _prepare_folder(out: Path) -> None:
    """Fail before the training, not after it."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ValueError(f"out: expected a folder that can be written, got {out} ({error})") from error
