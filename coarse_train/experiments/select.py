"""What ten masks can decide: `--select-with 10` against every candidate that it chooses among, over the noises of the map.

Regret: the score of the best candidate, known only to who has all test masks, less the score of the run that ten validation
masks chose: after a fifth of the steps they keep some, and of those that go on to the end the best. Every candidate is trained
alone, so that it is seen what a wrong choice would have cost. Which go on was decided after the regret of some seeds had been
seen: what that is worth is told by the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ..config import FitConfig, recipe
from ..selection import candidates
from .experiment import ExperimentConfig, Part, Result
from .noise_map import PRESETS, canvases
from .table import Row

QUESTION = "Do ten dense masks choose the right way to learn, whatever is wrong with the drawings, and what does an error cost?"
MASKS = 10
CHOSEN = f"select-with {MASKS}"
# How many candidates go on was chosen by the regret of the first three; that all with a pen do, and in how many folds
# fine-tuning is scored, by that of the others.
_RULE_SEEDS = (0, 1, 2, 3, 4, 5)


def parts(config: ExperimentConfig) -> list[Part]:
    presets = ("thick",) if config.quick else PRESETS
    return [Part(preset, rows_of(preset)) for preset in presets]


def rows_of(preset: str) -> dict[str, Row]:
    """Every candidate, each on its own, and the run that chooses."""
    base = replace(canvases(preset), positive=recipe("mnist").positive, select_with=MASKS)
    found = candidates(base, ("positive", "negative"), pen=Path("pen.json"), estimable=True)
    return {**{name: _alone(row) for name, row in found.items()}, CHOSEN: base}


def _alone(row: FitConfig) -> FitConfig:
    """Without a choice, and with the pen measured on as many masks."""
    if row.positive.pen is None:
        return replace(row, select_with=0)
    positive = replace(row.positive, pen="auto")
    return replace(row, select_with=0, positive=positive, data=replace(row.data, dense_images=MASKS))


def regrets(result: Result) -> dict[int, float]:
    """By seed; 0 where the chosen run is better than every candidate alone."""
    found = {}
    for seed in sorted({cell.seed for cell in result.cells}):
        own = {cell.method: cell.miou for cell in result.cells if cell.seed == seed}
        best = max(score for row, score in own.items() if row != CHOSEN)
        found[seed] = max(0.0, best - own[CHOSEN])
    return found


def conclude(results: Sequence[Result]) -> list[str]:
    sentences = []
    seeds = sorted({seed for result in results for seed in regrets(result)})
    for rule, part in (
        ("which had no part in the choice of the rule", [seed for seed in seeds if seed not in _RULE_SEEDS]),
        ("by which the rule was chosen", [seed for seed in seeds if seed in _RULE_SEEDS]),
    ):
        values = [value for result in results for seed, value in regrets(result).items() if seed in part]
        if values:
            mean = statistics.fmean(values)
            sentences.append(
                f"Regret of {CHOSEN} on seeds {' '.join(map(str, part))}, {rule}: {mean:.1f} points on average over "
                f"{len(results)} noises, {'within' if mean <= 1 else 'NOT within'} the 1 point that was hoped for; "
                f"{max(values):.1f} at most."
            )
    for result in results:
        rows = [row for row in result.rows if row != CHOSEN]
        best, worst = max(rows, key=result.mean), min(rows, key=result.mean)
        sentences.append(
            f"{result.title}: regret {_by_seed(list(regrets(result).values()))}; "
            f"best {best} {result.mean(best):.1f}, worst {worst} {result.mean(worst):.1f}."
        )
    return sentences


def _by_seed(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):+.1f} ({', '.join(f'{value:+.1f}' for value in values)})"


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Every candidate as a point, the chosen run as a line across."""
    figure.set_size_inches(1.3 * len(results) + 3, 4.6)
    axis = figure.subplots()
    for row in results[0].rows:
        means = [result.mean(row) if row in result.rows else np.nan for result in results]
        if row == CHOSEN:
            axis.plot(range(len(results)), means, "k_", markersize=28, markeredgewidth=2, label=row)
        else:
            axis.plot(range(len(results)), means, "o", label=row, alpha=0.8)
    axis.set_xticks(range(len(results)), [PRESETS[result.title] for result in results], fontsize=8)
    axis.set_ylabel("mean IoU on held-out digits, %")
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
