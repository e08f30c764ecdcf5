"""The map: what is wrong with the drawings x what is learned from them, on canvases of real digits.

Every column is a noise process of `coarse_train.data.mnist`, every row a way to learn; all share network, steps, batches,
optimizer and schedule. The bar for the method is the best of three cross-entropies, as they are and tuned with as many trials
as itself.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from ..config import FitConfig, Naming, recipe
from .demo import TRUSTED
from .experiment import ExperimentConfig, Part, Result

QUESTION = "What is wrong with the drawings, and which way to learn from positive and negative ones stands it best?"
STEPS = 600
# noise process -> what is wrong, in a figure's words
PRESETS = {
    "hasty": "names wrong\nin 3 of 10",
    "majority": "two names\nmostly wrong",
    "half": "the same, negatives\non half the objects",
    "sparse": "the same, negatives\non 15 of 100",
    "alike": "the same, negatives\nnever tell them apart",
    "swallowed": "a class mostly\nleft out",
    "thick": "outlines a\npixel too far",
    "thin": "outlines not\nfar enough",
}
# their positive drawings are those of majority: rows that read no others are trained once
_SAME_POSITIVES = ("half", "sparse", "alike")
LEFT_OUT = replace(TRUSTED, weight=0.0)
_RATES = (0.25, 0.5, 1.0, 2.0)
# A choice on one seed may be worse on the others than no choice: the bar is the best of all six.
_CROSS_ENTROPIES = tuple(f"ce_{kind}{tuned}" for kind in ("positive", "negative", "both") for tuned in ("", "_tuned"))
_LEADS = ("method", "method_tuned", "method_pen")
_WORDS = {
    "ce_positive": "cross-entropy, positives",
    "ce_negative": "cross-entropy, negatives",
    "ce_both": "cross-entropy, both",
    "method": "matrix on the positives",
    "method_pen": "matrix, outlines undone",
    "supervised": "true masks",
}


def parts(config: ExperimentConfig) -> list[Part]:
    return [Part(preset, rows_of(preset)) for preset in (("majority",) if config.quick else PRESETS)]


def rows_of(preset: str) -> dict[str, FitConfig | dict[str, FitConfig]]:
    """
    ce_positive, ce_negative   cross-entropy on one kind of drawings alone; tuned: learning rate, hold or transition
    ce_both                    on both, the transition estimated; tuned: transition, weight
    method                     positive drawings through a global matrix, negative ones trusted; tuned: weight, learning rate
    method_pen                 the same, positive outlines moved back by what 6 dense masks say
    supervised                 cross-entropy on the true masks
    """
    base = canvases(preset)
    transitions: tuple[Naming, ...] = ("uniform", "objects", "estimated")
    if preset == "swallowed":  # its negative drawings name the background
        transitions = ("uniform", "estimated")
    positive = replace(canvases("majority" if preset in _SAME_POSITIVES else preset), negative=LEFT_OUT)
    negative = replace(base, positive=LEFT_OUT)
    alone: dict[str, FitConfig] = {name: replace(negative, transition=name) for name in transitions[:2]}
    if preset == "swallowed":  # "estimated" would read the positive ones
        alone = {f"hold {hold:g}": at_rate(negative, 1.0, hold=hold) for hold in (0.6, 0.3)}
    both = replace(base, transition="estimated")
    method = replace(base, positive=recipe("mnist").positive)
    pen = replace(method, positive=replace(method.positive, pen="auto"), data=replace(base.data, dense_images=6))
    return {
        "ce_positive": positive,
        "ce_positive_tuned": {
            f"lr {rate:g}x, hold {hold:g}": at_rate(positive, rate, hold=hold)
            for rate, hold in itertools.product(_RATES, (0.6, 0.3))
        },
        "ce_negative": negative,
        "ce_negative_tuned": {
            f"lr {rate:g}x, {named}": at_rate(one, rate)
            for rate, (named, one) in itertools.product(_RATES, alone.items())
        },
        "ce_both": both,
        "ce_both_tuned": {
            f"{transition}, weight {weight:g}": weighted(replace(base, transition=transition), weight)
            for transition, weight in itertools.product(transitions[-2:], (0.3, 0.6, 1.0, 1.4))
        },
        "method": method,
        "method_tuned": {
            f"lr {rate:g}x, weight {weight:g}": at_rate(weighted(method, weight), rate)
            for rate, weight in itertools.product((1.0, 2.0), (0.6, 1.0, 1.4, 2.0))
        },
        "method_pen": pen,
        "supervised": by_masks(base),
    }


def canvases(preset: str) -> FitConfig:
    """What all rows of a preset share, both kinds of drawings trusted."""
    base = recipe("mnist")
    return replace(base, data=replace(base.data, variant=preset), positive=TRUSTED, negative=TRUSTED, steps=STEPS)


def by_masks(base: FitConfig) -> FitConfig:
    """``base`` on dense masks alone. It reads no drawings, so it is written without them: one run, whatever they are."""
    variant = "majority" if base.data.dataset == "mnist" else base.data.variant
    data = replace(base.data, supervision="masks", variant=variant, positives=None)
    return replace(base, data=data, positive=TRUSTED, negative=TRUSTED)


def at_rate(config: FitConfig, factor: float, *, hold: float | None = None) -> FitConfig:
    optim = replace(config.optim, lr=factor * config.optim.lr, hold=config.optim.hold if hold is None else hold)
    return replace(config, optim=optim)


def at_matrix_rate(config: FitConfig, factor: float) -> FitConfig:
    return replace(config, optim=replace(config.optim, cm_lr=factor * config.optim.cm_lr))


def weighted(config: FitConfig, weight: float) -> FitConfig:
    return replace(config, negative=replace(config.negative, weight=weight))


def conclude(results: Sequence[Result]) -> list[str]:
    sentences = []
    for result in results:
        seeds = len({cell.seed for cell in result.cells})
        leads = {row: result.lead(row, _CROSS_ENTROPIES) for row in _LEADS}
        wins = {row: result.wins(row, _CROSS_ENTROPIES) for row in _LEADS}
        said = {row: f"{leads[row]:+.1f} points (ahead in {wins[row]} of {seeds} seeds)" for row in _LEADS}
        best = result.best(_CROSS_ENTROPIES)
        sentences.append(
            f"{result.title}: the method {said['method']} untuned and {said['method_tuned']} tuned against the best "
            f"cross-entropy, {best}; with the pen undone {said['method_pen']}; supervised {result.mean('supervised'):.1f}."
        )
    return sentences


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Scores as numbers on colours, and below them the lead over the best cross-entropy."""
    rows = list(results[0].rows)
    figure.set_size_inches(1.6 * len(results) + 3, 0.5 * (len(rows) + len(_LEADS)) + 2.6)
    upper, lower = figure.subplots(2, 1, height_ratios=(len(rows), len(_LEADS)))
    scores = np.array([[result.mean(row) for result in results] for row in rows])
    lead = np.array([[result.lead(row, _CROSS_ENTROPIES) for result in results] for row in _LEADS])
    upper.imshow(scores, cmap="Blues", vmin=0, vmax=130, aspect="auto")
    lower.imshow(lead, cmap="RdBu", vmin=-15, vmax=15, aspect="auto")
    for axis, values, labels, form in ((upper, scores, rows, "{:.1f}"), (lower, lead, _LEADS, "{:+.1f}")):
        for (i, j), value in np.ndenumerate(values):
            dark = abs(value) > 11 if axis is lower else value > 80
            axis.text(j, i, form.format(value), ha="center", va="center", color="white" if dark else "black")
        axis.set_yticks(range(len(labels)), [_in_words(row) for row in labels])
        axis.set_xticks([])
        axis.spines[:].set_visible(False)
    upper.xaxis.tick_top()
    upper.set_xticks(range(len(results)), [PRESETS[result.title] for result in results], fontsize=8)
    upper.set_title("What is wrong with the positive drawings", pad=12)
    upper.set_ylabel("mean IoU on held-out digits, last step, %")
    lower.set_title("Lead over the best cross-entropy, tuned or not", fontsize=10)


def _in_words(row: str) -> str:
    name = row.removesuffix("_tuned")
    return _WORDS.get(name, name) + (", tuned" if name != row else "")
