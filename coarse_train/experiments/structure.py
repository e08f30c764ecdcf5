"""Where confusion matrices may differ and which there can be, on three amounts of drawing.

Two names of four are mostly wrong whatever the image ("majority"), so that one matrix for all images is enough; what is
asked is what finer fields and other structures do with the drawings that there are: regions, incomplete ones on a
background that is coloured in; spots; scribbles. The paper leaves open what becomes of its matrix at every pixel where
drawings are few. Negative drawings, as many, are trusted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from ..config import DrawingsConfig, FitConfig, Naming, recipe
from .experiment import ExperimentConfig, Part, Result
from .noise_map import canvases
from .trace_weight import matrix_rates

QUESTION = "Which field and structure of confusion matrices learns most from regions, from spots, from scribbles?"
# noise process -> its drawings, in a figure's words
KINDS = {"majority": "regions", "majority_spots": "spots", "majority_scribbles": "scribbles"}
_FULL = recipe("mnist").positive
_PLAIN = replace(_FULL, missing=None)  # other structures know no `missing`
STRUCTURES: dict[str, DrawingsConfig] = {
    "pixel": replace(_FULL, cm="pixel"),
    "grid 2": replace(_FULL, cm="grid", stride=2),
    "grid 4": replace(_FULL, cm="grid", stride=4),
    "grid 8": replace(_FULL, cm="grid", stride=8),
    "grid 16": replace(_FULL, cm="grid", stride=16),
    "image": replace(_FULL, cm="image"),
    "global": _FULL,
    "lowrank, grid 8": replace(_PLAIN, cm="grid", stride=8, structure="lowrank"),
    "floor, grid 8": replace(_PLAIN, cm="grid", stride=8, structure="floor"),
    "tied, global": replace(_PLAIN, structure="tied"),
}
_NAMINGS: tuple[Naming, ...] = ("uniform", "estimated")


def parts(config: ExperimentConfig) -> list[Part]:
    if config.quick:
        rows = rows_of("majority_spots")
        return [Part("spots", {row: rows[row] for row in rows if row not in ("grid 2", "grid 4")})]
    return [Part(title, rows_of(kind)) for kind, title in KINDS.items()]


def rows_of(kind: str) -> dict[str, Mapping[str, FitConfig]]:
    """The rows of `STRUCTURES`; tuned: the matrices' learning rate. ``none``: positive drawings are trusted as well; tuned: how
    negative ones name a class. A full matrix starts with part of an object left out where it is: in regions."""
    base = canvases(kind)
    rows: dict[str, Mapping[str, FitConfig]] = {}
    for row, structure in STRUCTURES.items():
        positive = structure if kind == "majority" else replace(structure, missing=None)
        rows[row] = matrix_rates(replace(base, positive=positive))
    return {**rows, "none": {name: replace(base, transition=name) for name in _NAMINGS}}


def conclude(results: Sequence[Result]) -> list[str]:
    sentences, winners = [], []
    for result in results:
        ranked = sorted((row for row in result.rows if row != "none"), key=result.mean, reverse=True)
        first, second, last = ranked[0], ranked[1], ranked[-1]
        lead, seeds = result.mean(first) - result.mean(second), max(result.spread(first), result.spread(second))
        closest = min(ranked, key=lambda row: result.mean(row, "cm_error"))
        winners.append(first)
        sentences.append(
            f"{result.title}: {first} wins with {result.mean(first):.1f}, {lead:+.1f} over {second}, "
            f"{'more' if lead > seeds > 0 else 'NOT clearly more'} than seeds differ ({seeds:.1f}); trusted drawings "
            f"{result.mean('none'):.1f} ({result.mean(first) - result.mean('none'):+.1f}); "
            f"last is {last}, {result.mean(last):.1f}. The matrix is closest with {closest}: off by "
            f"{result.mean(closest, 'cm_error'):.3f}."
        )
    if len(results) == 1:
        return sentences
    if len(set(winners)) == 1:
        sentences.append(f"{winners[0]} wins on each of {', '.join(result.title for result in results)}.")
    else:
        pairs = ", ".join(f"{result.title} {winner}" for result, winner in zip(results, winners, strict=True))
        sentences.append(f"No structure wins on every kind of drawing: {pairs}.")
    return sentences


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Scores and errors as numbers on colours, a row for each structure."""
    rows = list(results[0].rows)
    figure.set_size_inches(3.4 + 2.2 * len(results), 0.5 * len(rows) + 1.6)
    left, right = figure.subplots(1, 2, sharey=True)
    scores = np.array([[result.mean(row) for result in results] for row in rows])
    errors = np.array([[result.mean(row, "cm_error") for result in results] for row in rows])
    left.imshow(scores, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    right.imshow(errors, cmap="Reds", vmin=0, vmax=0.3, aspect="auto")
    for axis, values, form, dark in ((left, scores, "{:.1f}", 80), (right, errors, "{:.3f}", 0.18)):
        for (i, j), value in np.ndenumerate(values):
            words = "-" if np.isnan(value) else form.format(value)
            axis.text(j, i, words, ha="center", va="center", color="white" if value > dark else "black")
        axis.xaxis.tick_top()
        axis.set_xticks(range(len(results)), [result.title for result in results])
        axis.spines[:].set_visible(False)
    left.set_yticks(range(len(rows)), rows)
    left.set_title("mean IoU, last step, %", pad=12, fontsize=10)
    right.set_title("matrix off by", pad=12, fontsize=10)
