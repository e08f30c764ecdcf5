"""The first run: ways to learn segmentation from coarse drawings of real MNIST digits.

    coarse-train demo                        under four minutes on two idle cores
    coarse-train demo --task hasty           names wrong in three drawings of ten, the majority right
    coarse-train demo --task binary          the paper's binary masks
    coarse-train demo --seeds 0 1 2          every row three times
    coarse-train demo --tune                 how transition and weight of the tuned row were chosen

Question: does a confusion matrix that is learned with the network help where most drawings of a class carry another's name?

Two digits stand on a 48x48 canvas. Positive drawings ("this is a 7") are mostly incomplete; in the task "majority" two
of the four digits are drawn under the name of another in six cases of ten, as by somebody who knows one name for two things.
Negative drawings ("this is not a 4") are honest and on every object: realistic names, an unrealistic effort
(`coarse_train.data.mnist`). All rows share network, steps, batches, optimizer and schedule. Scores are mIoU in percent,
background included, of held-out test digits; the last step counts, and no score chooses anything but what is tuned of
``ce_both`` (`TUNED`).
"""

from __future__ import annotations

import itertools
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..config import DrawingsConfig, FitConfig, recipe
from ..data.mnist import PROCESSES
from .cell import Cell
from .report import save_figure
from .table import Summary, by_class, read_results, run_table, text, write_results

TRUSTED = DrawingsConfig()
# task -> the matrix: global where names are wrong whatever the image; at every pixel for binary masks, where all there is to
# learn is the outline.
_GLOBAL = recipe("mnist").positive
MATRIX = {
    "majority": _GLOBAL,
    "hasty": _GLOBAL,
    "binary": DrawingsConfig(cm="pixel", diagonal=0.8),
}
WEIGHTS = (0.3, 0.6, 1.0, 1.4)
# task -> the best of `trials` by mIoU of the last step on the validation canvases, seed 0: `--tune`.
TUNED: dict[str, tuple[str, float]] = {
    "majority": ("objects", 1.0),
    "hasty": ("estimated", 1.0),
    "binary": ("uniform", 1.4),
}


def trials(task: str) -> list[tuple[str, float]]:
    """What is tried for ``ce_both``: how a negative drawing is explained, and how much it weighs beside a positive one. The
    other rows are as they come. Of two classes there is one transition."""
    transitions = ("uniform",) if PROCESSES[task].num_classes == 2 else ("uniform", "objects", "estimated")
    return list(itertools.product(transitions, WEIGHTS))


def rows_of(task: str) -> dict[str, FitConfig]:
    """
    ce_positive, ce_negative   cross-entropy on one kind of drawings alone
    ce_both_textbook           on both: -log p[y] and -log(1 - p[y])
    ce_both_untuned            on both, the transition estimated from where the two kinds meet
    ce_both                    on both, transition and weight tuned
    coarse_positive            positive drawings through a matrix that is learned, alone
    coarse_both                the same beside trusted negative drawings; nothing is tuned
    supervised                 cross-entropy on the true masks
    """
    base = recipe("mnist")
    base = replace(base, data=replace(base.data, variant=task), positive=TRUSTED, negative=TRUSTED)
    without = replace(TRUSTED, weight=0.0)
    transition, weight = TUNED[task]
    return {
        "ce_positive": replace(base, negative=without),
        "ce_negative": replace(base, positive=without),
        "ce_both_textbook": base,
        "ce_both_untuned": replace(base, transition="estimated"),
        "ce_both": cross_entropy(base, transition, weight),
        "coarse_positive": replace(base, positive=MATRIX[task], negative=without),
        "coarse_both": replace(base, positive=MATRIX[task]),
        "supervised": replace(base, data=replace(base.data, supervision="masks")),
    }


def cross_entropy(base: FitConfig, transition: str, weight: float) -> FitConfig:
    return replace(base, transition=transition, negative=replace(TRUSTED, weight=weight))  # type: ignore[arg-type]


@dataclass(frozen=True)
class DemoConfig:
    """Ways to learn from coarse drawings of MNIST digits: train them all, print a table, write results.json and figure.png."""

    task: str = "majority"
    """majority (two classes mostly drawn under another's name), hasty (three names in ten wrong) or binary (outlines)."""
    data: Path | None = None
    """Folder with the four IDX files of MNIST; without it the sample in the package."""
    seeds: tuple[int, ...] = (0,)
    """Of the networks and the order of the batches; the canvases and their drawings are the same for all."""
    out: Path | None = None
    """Without it runs/demo, runs/demo_hasty or runs/demo_binary. A table that was interrupted goes on where it was, and rows
    that are there are not trained again."""
    steps: int | None = None
    """Training steps of each row; without it those of the recipe."""
    rows: tuple[str, ...] | None = None
    """Some of the rows, which are ce_positive, ce_negative, ce_both_textbook, ce_both_untuned, ce_both, coarse_positive,
    coarse_both and supervised."""
    tune: bool = False
    """Instead try the settings of `ce_both` on the validation canvases, and write tuning.json."""
    jobs: int | None = None
    """Runs at a time; without it one for each core."""
    backend: str | None = None
    """Backend of coarse_kernels; without it the best that can run."""
    limit: int | None = None
    """At most so many training canvases."""


def run_demo(config: DemoConfig) -> list[Cell]:
    """All cells, as results.json has them."""
    _check(config)
    out = config.out or Path("runs") / ("demo" if config.task == "majority" else f"demo_{config.task}")

    def adapted(row: FitConfig) -> FitConfig:
        data = replace(row.data, root=config.data, limit=config.limit)
        return replace(row, data=data, backend=config.backend, steps=config.steps or row.steps)

    rows = {name: adapted(row) for name, row in rows_of(config.task).items()}
    _refuse_another(out / ("tuning.json" if config.tune else "results.json"), config.task)
    if config.tune:
        return _tune(rows["ce_both_textbook"], config, out)
    if config.rows is not None:
        rows = {name: rows[name] for name in config.rows}
    cells = run_table(rows, config.seeds, out, jobs=config.jobs)
    verdicts = conclude(cells)
    count, steps = len(trials(config.task)), recipe("mnist").steps
    facts = {
        "task": config.task,
        "tuned": f"ce_both: the best of {count} settings on validation canvases, {steps} steps, seed 0; no other row is tuned",
        "conclusion": verdicts,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }
    write_results(out / "results.json", cells, rows, **facts)
    save_figure(out / "figure.png", cells, config.task)
    print("\n".join([text(cells, "test"), by_class(cells), *verdicts]))
    print(f"{out / 'results.json'}, {out / 'figure.png'}")
    return cells


def _refuse_another(path: Path, task: str) -> None:
    """What a table replaces is a table of the task."""
    content = read_results(path)
    if content is not None and content.get("task") != task:
        of = content.get("task") or "something else"
        raise ValueError(f"out: expected a new folder or one of task {task}, got {path} of {of}")


def _tune(base: FitConfig, config: DemoConfig, out: Path) -> list[Cell]:
    tried = trials(config.task)
    rows = {f"{transition} {weight:g}": cross_entropy(base, transition, weight) for transition, weight in tried}
    cells = run_table(rows, config.seeds, out, split="val", jobs=config.jobs)
    best = max(rows, key=lambda row: Summary.of(cells, row).mean)
    print(text(cells, "validation"))
    sentence = f"{config.task}: best of {len(rows)}: {best}"
    print(sentence)
    write_results(out / "tuning.json", cells, rows, task=config.task, conclusion=[sentence])
    return cells


def conclude(cells: Sequence[Cell]) -> list[str]:
    """Whether the claims hold, also where they do not."""
    means = {row: Summary.of(cells, row).mean for row in dict.fromkeys(cell.method for cell in cells)}
    sentences = []
    for row, other, words in (
        ("coarse_both", "ce_both", "the tuned cross-entropy on both"),
        ("coarse_both", "ce_both_untuned", "the untuned cross-entropy on both"),
        ("coarse_both", "ce_both_textbook", "the textbook pair"),
        ("coarse_positive", "ce_positive", "cross-entropy on the positives"),
    ):
        if {row, other} <= means.keys():
            lead = means[row] - means[other]
            holds = "holds" if lead > 0 else "does NOT hold"
            sentences.append(f"{row} above {words} {holds}: {lead:+.1f} points.")
    errors = [cell.cm_error for cell in cells if cell.method == "coarse_both" and cell.cm_error is not None]
    if errors:
        sentences.append(f"An entry of its matrix is off by {statistics.fmean(errors):.3f}.")
    return sentences


def _check(config: DemoConfig) -> None:
    """What `run_table` does not."""
    if config.task not in MATRIX:
        raise ValueError(f"task: expected one of {tuple(MATRIX)}, got {config.task!r}")
    for name in ("steps", "limit"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected a number >= 1, got {value}")
    names = tuple(rows_of(config.task))
    if config.rows is not None and (not config.rows or set(config.rows) - set(names)):
        raise ValueError(f"rows: expected some of {names}, got {config.rows}")
    if config.rows is not None and config.tune:
        raise ValueError(f"rows: expected none with --tune, which has rows of its own, got {config.rows}")
