"""How the settings of the demo were chosen: `python -m coarse_train tune-demo`.

Every method, the baselines and the supervised row included, gets the same number of trials (`TRIALS`), trained on the
training canvases and scored at the last step on the validation canvases, which are made of other training digits. The
score reads the TRUE MASKS of the validation canvases: selection sees dense labels of that part, for every row.
The test digits are not looked at. The tables of all trials are ``tuned_<task>.json`` beside this file, and the demo
takes the best trial of each method from there (`chosen_settings`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from ..data.mnist import load_splits
from ..simulate import PRESETS
from .loop import TrainConfig, train
from .methods import METHODS, MethodSettings, build_loss, build_model, transition_for

_RATES = (2e-3, 4e-3, 8e-3, 1.6e-2)


def _trials(
    confusion: str, diagonal: float, other_start: tuple[float, float | None]
) -> dict[str, list[MethodSettings]]:
    base = MethodSettings(confusion=confusion, diagonal=diagonal)
    other = replace(base, diagonal=other_start[0], missing=other_start[1])
    rates = [replace(base, lr=lr) for lr in _RATES]
    return {
        "ce_positive": rates,
        "ce_negative": [
            replace(base, lr=lr, transition=kind) for lr in (4e-3, 1.6e-2) for kind in ("estimated", "uniform")
        ],
        "ce_both": [
            replace(base, transition=kind, negative_weight=weight)
            for kind, weight in (("estimated", 0.3), ("estimated", 0.6), ("estimated", 1.0), ("uniform", 1.0))
        ],
        "coarse_positive": [
            base,
            other,
            replace(other, cm_lr=3e-2),
            replace(base, trace_weight=0.005),
        ],
        "coarse_both": [
            base,
            replace(base, trace_weight=0.005),
            other,
            replace(other, transition="estimated", negative_weight=0.3),
        ],
        "supervised": rates,
    }


# Per task: method -> four settings. The annotator's matrix is global where classes are swapped, and per pixel for
# binary masks, where all there is to learn is the outline.
TRIALS = {
    "multiclass": _trials("global", 0.7, (0.5, 0.3)),
    "binary": _trials("pixel", 0.8, (0.65, None)),
}


@dataclass(frozen=True)
class TuneConfig:
    """Try the settings of `TRIALS` and write every trial's validation score."""

    task: str = "multiclass"
    data: Path | None = None
    """Folder with the IDX files of MNIST; without it the sample in the package."""
    seed: int = 0
    out: Path = Path("runs/tune")
    steps: int = 1200
    threads: int | None = None
    max_train: int | None = None
    """At most so many training canvases."""
    methods: tuple[str, ...] = METHODS


def run_tune(config: TuneConfig, trials: dict[str, list[MethodSettings]] | None = None) -> Path:
    """Run all trials, print them, and return the path of the table (JSON), which is rewritten after every trial."""
    if config.task not in TRIALS:
        raise ValueError(f"task: expected one of {tuple(TRIALS)}, got {config.task!r}")
    if unknown := set(config.methods) - set(METHODS):
        raise ValueError(f"methods: expected some of {METHODS}, got {sorted(unknown)}")
    config.out.mkdir(parents=True, exist_ok=True)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    preset = PRESETS[config.task]
    splits = load_splits(folder=config.data, preset=preset, seed=config.seed, max_train=config.max_train)
    todo = [(m, s) for m, group in (trials or TRIALS[config.task]).items() if m in config.methods for s in group]
    rows: list[dict[str, object]] = []
    path = config.out / f"tuned_{config.task}.json"
    for method, settings in tqdm(todo, desc="trials"):
        model = build_model(method, settings, preset.num_classes, config.seed)
        transition = transition_for(settings.transition, splits.train, preset.num_classes)
        run = TrainConfig(steps=config.steps, lr=settings.lr, cm_lr=settings.cm_lr, evaluations=1, seed=config.seed)
        history = train(
            model, build_loss(method, settings, transition), splits.train, splits.validation, preset.num_classes, run
        )
        rows.append({"method": method, "validation_miou": round(history.last, 2), **used(method, settings)})
        tqdm.write(str(rows[-1]))
        table = {
            "selection": "mIoU at the last step on the validation canvases, with their true masks",
            "steps": config.steps,
            "seed": config.seed,
            "validation_canvases": len(splits.validation),
            "trials": rows,
            "chosen": {m: best(rows, m) for m in METHODS if any(row["method"] == m for row in rows)},
        }
        write_json(path, table)
    return path


def chosen_settings(task: str) -> tuple[dict[str, MethodSettings], str]:
    """method -> the best of its trials in ``tuned_<task>.json``, and a sentence on how that was chosen; the first of
    `TRIALS` for a task that has no table."""
    path = Path(__file__).with_name(f"tuned_{task}.json")
    if not path.exists():
        return {
            method: group[0] for method, group in TRIALS[task].items()
        }, "not tuned: the first of TRIALS for each row"
    table = json.loads(path.read_text())
    settings = {}
    for method, row in table["chosen"].items():
        settings[method] = MethodSettings(**{k: v for k, v in row.items() if k not in ("method", "validation_miou")})
    trials = len(table["trials"]) // len(METHODS)
    return settings, (
        f"{trials} trials for each row, the best by mIoU at the last step on {table['validation_canvases']} validation "
        f"canvases (other training digits) with their TRUE MASKS; test digits were not looked at. Trials: {path.name}"
    )


def best(rows: Sequence[dict[str, object]], method: str) -> dict[str, object]:
    """The trial of ``method`` with the highest score; the first of equals."""
    return max((row for row in rows if row["method"] == method), key=lambda row: float(str(row["validation_miou"])))


def used(method: str, settings: MethodSettings) -> dict[str, object]:
    """The fields of ``settings`` that ``method`` reads."""
    fields = {"lr"}
    if method in ("ce_negative", "ce_both", "coarse_both"):
        fields.add("transition")
    if method in ("ce_both", "coarse_both"):
        fields.add("negative_weight")
    if method in ("coarse_positive", "coarse_both"):
        fields |= {"confusion", "cm_lr", "diagonal", "missing", "trace_weight"}
    return {name: value for name, value in asdict(settings).items() if name in fields}


def write_json(path: Path, content: object) -> None:
    """All or nothing: a reader never sees half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    os.replace(temporary, path)
