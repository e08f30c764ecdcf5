"""`coarse-train experiment NAME`: a question, tables that answer it, a report.

An experiment is a module beside this one with

    QUESTION                     one sentence
    parts(config) -> [Part]      its tables
    rows_of                      makes the rows of one; its docstring says what they are, and stands in the report
    conclude(results) -> [str]   what holds and what does not, from the cells alone
    draw(results, figure)        the figure

and its name in `Name`. All parts are trained as one table, tuned rows first on the validation split, each with the same
number of trials, which the report prints. Whatever was interrupted goes on when the command is called again.
"""

from __future__ import annotations

import inspect
import math
import platform
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
import tyro

from ..config import FitConfig
from ..run import write_text
from .cell import Cell, Scores, read_scores, write_scores
from .table import Row, Summary, config_of, read_results, run_table, text, write_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Name = Literal["noise-map", "few-masks", "select", "negatives", "annotators", "sanity", "trace-weight", "structure"]
EXPERIMENTS = {name: name.replace("-", "_") for name in get_args(Name)}  # name -> module
_TUNING_SEED = 0
_QUICK_STEPS = 10


@dataclass(frozen=True)
class ExperimentConfig:
    """One of the experiments on what helps when: train its tables, print them, write report.md, results.json and figure.png."""

    name: tyro.conf.Positional[Name]
    """noise-map: ways to learn x what is wrong with the drawings. few-masks: dense masks of some images beside drawings.
    select: what `--select-with 10` chooses, and what being wrong would cost. sanity: matrices of known noise, believed and
    true. trace-weight: weights of the trace x fields of matrices. structure: fields and structures of matrices on regions,
    spots and scribbles. negatives: what they add to positives, by annotated area. annotators: two observers of CHASE_DB1,
    who disagree."""
    quick: bool = False
    """A few steps on a few images, one trial a row, some of the tables: to see that it runs. Its figures mean nothing."""
    tables: tuple[str, ...] = ()
    """Titles of the tables to train, as the report has them; without it all. The report in OUT is then of these tables alone;
    the runs of the others stay there."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the networks, the order of the batches and the choice of masks."""
    data: Path | None = None
    """Folder of data sets: DATA/mnist, DATA/camvid, DATA/cityscapes, DATA/chasedb1. What needs one that is not there is left
    out and named; canvases of digits are made of the sample in the package, and without DATA the eyes of a quick run
    are made up."""
    out: Path | None = None
    """Without it runs/NAME, or runs/NAME-quick. Runs whose scores are there, in a cells.json from elsewhere too, are not
    trained again, where DATA and OUT are named as they were there."""
    jobs: int | None = None
    """Runs at a time; without it one for each core."""
    backend: str | None = None
    """Backend of coarse_kernels; without it the best that can run."""

    def root(self, dataset: str) -> Path | None:
        """The folder of a data set, where there is one."""
        if self.data is None:
            return None
        folder = self.data / dataset
        return folder if folder.is_dir() else None


@dataclass(frozen=True)
class Part:
    """One table. A row is a config, or settings of it to choose from: the best mean IoU at the last step on the validation
    split. ``tuned_as``: the part whose choices of equal row and setting are taken over, instead of tuning again. ``seeds``: at
    most so many of them."""

    title: str
    rows: Mapping[str, Row | Mapping[str, Row]]
    split: str = "test"
    tuned_as: str | None = None
    seeds: int | None = None


@dataclass(frozen=True)
class Result:
    """The cells of a part. ``chosen``: row -> setting, ``tried``: the number of settings; ``tuned_as``: of which part, where it
    was not this one."""

    title: str
    rows: Mapping[str, Row]
    cells: Sequence[Cell]
    split: str
    chosen: Mapping[str, str] = field(default_factory=dict)
    tried: Mapping[str, int] = field(default_factory=dict)
    tuned_as: str | None = None

    def mean(self, row: str, of: str = "miou") -> float:
        """Over the seeds, of a number of `Cell`; NaN where a cell has none."""
        values = [getattr(cell, of) for cell in self.cells if cell.method == row]
        return statistics.fmean(math.nan if value is None else value for value in values)

    def spread(self, row: str) -> float:
        return Summary.of(self.cells, row).spread

    def lead(self, row: str, others: Sequence[str]) -> float:
        """Over the best of ``others`` by its mean; NaN where one is missing."""
        rival = self.best(other for other in others if other != row)
        return math.nan if rival is None or self.best((row,)) is None else self.mean(row) - self.mean(rival)

    def wins(self, row: str, others: Sequence[str]) -> int:
        """In how many seeds it is ahead of that best one: a mean over few seeds says little of its own spread."""
        rival = self.best(other for other in others if other != row)
        scores = {(cell.method, cell.seed): cell.miou for cell in self.cells}
        return sum(score > scores[rival, seed] for (method, seed), score in scores.items() if rival and method == row)

    def best(self, rows: Iterable[str]) -> str | None:
        """By its mean; None where none of them was run."""
        known = {cell.method for cell in self.cells}
        return max((row for row in rows if row in known), key=self.mean, default=None)


class Experiment(Protocol):
    """What a module has."""

    QUESTION: str

    rows_of: Callable[..., Any]

    def parts(self, config: ExperimentConfig) -> list[Part]: ...

    def conclude(self, results: Sequence[Result]) -> list[str]: ...

    def draw(self, results: Sequence[Result], figure: Figure) -> None: ...


def run_experiment(config: ExperimentConfig) -> list[Result]:
    """Train, print and write OUT/report.md, OUT/results.json, OUT/cells.json and OUT/figure.png."""
    experiment: Experiment = import_module(f".{EXPERIMENTS[config.name]}", __package__)
    if config.data is not None and not config.data.is_dir():
        raise ValueError(f"data: expected a folder, with mnist, camvid or chasedb1 in it, got {config.data}")
    out = config.out or Path("runs") / (f"{config.name}-quick" if config.quick else config.name)
    _refuse_another(out, config)
    config = replace(config, seeds=config.seeds[:1]) if config.quick else config
    parts = experiment.parts(config)
    if config.quick:
        parts = [quick(part) for part in parts]
    if config.backend is not None:
        parts = [_changed(part, lambda row: replace(row, backend=config.backend)) for part in parts]
    known = read_scores(out / "cells.json")
    try:
        results = run_parts(parts, config.seeds, out, jobs=config.jobs, tables=config.tables, known=known)
    finally:
        if out.is_dir() and not config.quick:
            write_scores(out)
    verdicts = experiment.conclude(results)
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of every command's start
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    experiment.draw(results, figure)
    figure.savefig(out / "figure.png", dpi=110)
    left_out = [part.title for part in parts if part.title not in {result.title for result in results}]
    words = report(config, experiment.QUESTION, results, verdicts, left_out, experiment.rows_of.__doc__ or "")
    write_text(out / "report.md", words)
    _write(out / "results.json", config, results, verdicts, left_out)
    print(words)
    return results


def _refuse_another(out: Path, config: ExperimentConfig) -> None:
    """A folder has one report, and a quick one takes the place of no other."""
    content = read_results(out / "results.json")
    if content is None:
        return
    if (there := content.get("experiment")) != config.name:
        of = there or "something else"
        raise ValueError(f"out: expected a folder without another experiment's results, got {out} with those of {of}")
    if config.quick and not content.get("quick"):
        raise ValueError(f"out: expected another folder for a quick run, got {out} with the results of a full one")


def run_parts(
    parts: Sequence[Part],
    seeds: Sequence[int],
    out: Path,
    *,
    jobs: int | None = None,
    tables: Sequence[str] = (),
    known: Scores | None = None,
) -> list[Result]:
    """All parts, or those of ``tables``, tuned rows first: two tables in all, so that no core waits for a part to end.
    ``known``: as `run_table` has it."""
    trained = partial(run_table, out=out, jobs=jobs, known=known)
    titles = [part.title for part in parts]
    if unknown := [title for title in tables if title not in titles]:
        raise ValueError(
            f"tables: expected some of {'; '.join(titles)} (a quick run has fewer), got {'; '.join(unknown)}"
        )
    asked = [part for part in parts if not tables or part.title in tables]
    tuned_in = {part.tuned_as or part.title for part in asked}
    trials = {
        f"{part.title} | {row} | {setting}": (part, config)
        for part in parts
        for row, settings in part.rows.items()
        if isinstance(settings, Mapping) and part.title in tuned_in
        for setting, config in settings.items()
    }
    scores: dict[str, float] = {}
    if trials:
        configs = {name: config for name, (_, config) in trials.items()}
        scores = {cell.method: cell.miou for cell in trained(configs, (_TUNING_SEED,), split="val")}
    parts = asked
    chosen = {part.title: _choose(part, scores) for part in parts}
    rows = {
        part.title: {
            row: config[chosen[part.title][row]] if isinstance(config, Mapping) else config
            for row, config in part.rows.items()
        }
        for part in parts
    }
    results = []
    for split, count in dict.fromkeys((part.split, part.seeds) for part in parts):
        own = [part for part in parts if (part.split, part.seeds) == (split, count)]
        together = {f"{part.title} | {row}": config for part in own for row, config in rows[part.title].items()}
        cells = trained(together, seeds[:count], split=split)
        for part in own:
            prefix = f"{part.title} | "
            found = [replace(c, method=c.method[len(prefix) :]) for c in cells if c.method.startswith(prefix)]
            tried = {row: len(each) for row, each in part.rows.items() if isinstance(each, Mapping)}
            results.append(Result(part.title, rows[part.title], found, split, chosen[part.title], tried, part.tuned_as))
    return sorted(results, key=lambda result: titles.index(result.title))


def _choose(part: Part, scores: Mapping[str, float]) -> dict[str, str]:
    source = part.tuned_as or part.title
    return {
        row: max(settings, key=lambda setting: scores[f"{source} | {row} | {setting}"])
        for row, settings in part.rows.items()
        if isinstance(settings, Mapping)
    }


def _changed(part: Part, change: Callable[[FitConfig], FitConfig]) -> Part:
    def row(one: Row) -> Row:
        return change(one) if isinstance(one, FitConfig) else lambda seed: change(config_of(one, seed))

    rows = {
        name: {setting: row(one) for setting, one in each.items()} if isinstance(each, Mapping) else row(each)
        for name, each in part.rows.items()
    }
    return replace(part, rows=rows)


def quick(part: Part) -> Part:
    """The first setting of each row, 10 steps, 64 training images, and one look at the validation masks."""

    def smaller(config: FitConfig) -> FitConfig:
        data = replace(config.data, limit=min(config.data.limit or 64, 64))
        short = replace(config, steps=_QUICK_STEPS, evaluate_every=_QUICK_STEPS, data=data)
        return replace(short, select_steps=None if config.select_steps is None else 2)

    part = _changed(part, smaller)
    rows = {
        row: dict(list(config.items())[:1]) if isinstance(config, Mapping) else config
        for row, config in part.rows.items()
    }
    return replace(part, rows=rows)


def report(
    config: ExperimentConfig,
    question: str,
    results: Sequence[Result],
    verdicts: Sequence[str],
    left_out: Sequence[str] = (),
    rows: str = "",
) -> str:
    """Markdown: the question, what was found, the tables, how they are run again. ``left_out``: tables not asked for.
    ``rows``: what they are."""
    seeds = " ".join(map(str, config.seeds))
    command = f"coarse-train experiment {config.name} --seeds {seeds}" + (" --data DIR" if config.data else "")
    if config.tables:
        command += f" --tables {shlex.join(config.tables)}"
    if config.backend is not None:
        command += f" --backend {config.backend}"
    lines = [f"# {config.name}", "", question, ""]
    if rows:
        lines += ["```", inspect.cleandoc(rows), "```", ""]
    if config.quick:
        lines += ["**A quick run: it shows that everything runs. Its figures mean nothing.**", ""]
        command += " --quick"
    lines += [*(f"- {verdict}" for verdict in verdicts), "", f"`{command}`", ""]
    if left_out:
        lines += [
            f"{len(results)} of the {len(results) + len(left_out)} tables of this experiment. Not asked for: "
            f"{'; '.join(left_out)}.",
            "",
        ]
    for result in results:
        lines += [f"## {result.title}", "", "```", text(result.cells, result.split), "```", ""]
        if result.chosen:
            tried = sorted(set(result.tried.values()))
            each = " or ".join(map(str, tried)) + (" setting" if tried == [1] else " settings")
            settings = "; ".join(f"{row}: {setting}" for row, setting in result.chosen.items())
            where = f"in {result.tuned_as}" if result.tuned_as else "here"
            lines += [f"Tuned {where} on validation masks, seed {_TUNING_SEED}, {each} a row: {settings}.", ""]
    lines.append(f"torch {torch.__version__}, {platform.machine()}.")
    return "\n".join(lines) + "\n"


def _write(
    path: Path, config: ExperimentConfig, results: Sequence[Result], verdicts: Sequence[str], left_out: Sequence[str]
) -> None:
    cells = [replace(c, method=f"{r.title} | {c.method}") for r in results for c in r.cells]
    rows = {f"{r.title} | {row}": one for r in results for row, one in r.rows.items()}
    chosen = {r.title: dict(r.chosen) for r in results if r.chosen}
    write_results(
        path,
        cells,
        rows,
        experiment=config.name,
        quick=config.quick,
        conclusion=list(verdicts),
        tuned=chosen,
        left_out=list(left_out),
    )
