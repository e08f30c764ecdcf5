"""The weight of the trace: how much of it a confusion matrix stands, for each kind of field.

The objective adds trace_weight * tr(A) to the likelihood, which takes the most unreliable annotator among those that
explain the drawings. Positive drawings go through the matrix, negative ones are trusted. Each weight has the better of two
learning rates of the matrices: a field that is a network bears a tenth of what suits one matrix for all images. A weight is
stable where its last step is within 2 points of the best weight's and of its own best step, both on the validation masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..config import FitConfig
from .demo import MATRIX
from .experiment import ExperimentConfig, Part, Result
from .noise_map import at_matrix_rate, canvases

QUESTION = "How large may the weight of tr(A) be, for which field of confusion matrices, and does it help?"
WEIGHTS = (0.0, 0.001, 0.01, 0.1, 1.0)
# row -> settings of the positive drawings
FIELDS: dict[str, dict[str, Any]] = {
    "global": {"cm": "global"},
    "image": {"cm": "image"},
    "grid": {"cm": "grid", "stride": 8},
    "pixel": {"cm": "pixel"},
}
# noise process -> the matrix to start from
STARTS = {preset: MATRIX[preset] for preset in ("majority", "binary")}
_SLACK = 2.0


def parts(config: ExperimentConfig) -> list[Part]:
    if config.quick:
        return [Part("majority", rows_of("majority", (WEIGHTS[0], WEIGHTS[-1])))]
    return [Part(preset, rows_of(preset)) for preset in STARTS]


def rows_of(preset: str, weights: Sequence[float] = WEIGHTS) -> dict[str, Mapping[str, FitConfig]]:
    """Each field with each weight; tuned: the matrices' learning rate."""
    base = canvases(preset)
    return {
        _row(field, weight): matrix_rates(
            replace(base, positive=replace(STARTS[preset], trace_weight=weight, **settings))
        )
        for field, settings in FIELDS.items()
        for weight in weights
    }


def matrix_rates(config: FitConfig) -> dict[str, FitConfig]:
    """To choose from."""
    return {f"matrix's lr {rate:g}x": at_matrix_rate(config, rate) for rate in (1.0, 0.1)}


def _row(field: str, weight: float) -> str:
    return f"{field}, {weight:g}"


def _weights(result: Result) -> list[float]:
    return [weight for weight in WEIGHTS if _row("global", weight) in result.rows]


def stable(result: Result, field: str) -> list[float]:
    """The weights that are."""
    last = {weight: result.mean(_row(field, weight), "miou_validation") for weight in _weights(result)}
    best = {weight: result.mean(_row(field, weight), "miou_best") for weight in last}
    return [weight for weight in last if last[weight] >= max(*last.values(), best[weight]) - _SLACK]


def conclude(results: Sequence[Result]) -> list[str]:
    sentences = []
    for result in results:
        for field in FIELDS:
            means = {weight: result.mean(_row(field, weight)) for weight in _weights(result)}
            found = stable(result, field)
            words = " ".join(f"{weight:g}" for weight in found) if found else "no weight"
            scores = ", ".join(
                f"{weight:g}: {mean:.1f} (matrix off by {result.mean(_row(field, weight), 'cm_error'):.3f})"
                for weight, mean in means.items()
            )
            sentences.append(f"{result.title}, {field}: stable at {words}. Last step: {scores}.")
        sentences.append(_overall(result))
    return sentences


def _overall(result: Result) -> str:
    """Which weights are safe, and whether the term earns its place: the largest gain over 0, of all fields and weights."""
    common = [weight for weight in _weights(result) if all(weight in stable(result, field) for field in FIELDS)]
    words = " ".join(f"{weight:g}" for weight in common) if common else "no weight"
    gains = {
        (field, weight): result.mean(_row(field, weight)) - result.mean(_row(field, 0.0))
        for field in FIELDS
        for weight in _weights(result)[1:]
    }
    field, weight = max(gains, key=gains.__getitem__)
    gain, seeds = gains[field, weight], max(result.spread(_row(field, weight)), result.spread(_row(field, 0.0)))
    several = len({cell.seed for cell in result.cells}) > 1
    helps = "helps" if gain > seeds > 0 else "does NOT help clearly"
    scatter = f", where seeds differ by up to {seeds:.1f}" if several else ", of one seed"
    return (
        f"{result.title}: stable for every field: {words}. The term {helps}: at most {gain:+.1f} points over none "
        f"({field}, {weight:g}, the best of {len(gains)}){scatter}."
    )


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Scores above errors over the weight, a column for each field; stable weights are shaded."""
    figure.set_size_inches(3.2 * len(FIELDS), 4.6 * len(results))
    axes = figure.subplots(
        2 * len(results), len(FIELDS), squeeze=False, sharey="row", height_ratios=(3, 2) * len(results)
    )
    for result, upper, lower in zip(results, axes[::2], axes[1::2], strict=True):
        for field, score, error in zip(FIELDS, upper, lower, strict=True):
            _panel(score, error, result, field)
            score.set_title(f"{result.title}, {field}", fontsize=10)
        upper[0].set_ylabel("mean IoU, %")
        lower[0].set_ylabel("matrix off by")
    for axis in axes[-1]:
        axis.set_xlabel("weight of the trace")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)


def _panel(score: Axes, error: Axes, result: Result, field: str) -> None:
    weights = _weights(result)
    found = stable(result, field)
    places = range(len(weights))
    for label, of, style in (
        ("last step, test", "miou", "o-"),
        ("last step, validation", "miou_validation", "o--"),
        ("best step, validation", "miou_best", "o:"),
    ):
        score.plot(places, [result.mean(_row(field, w), of) for w in weights], style, markersize=4, label=label)
    error.plot(places, [result.mean(_row(field, w), "cm_error") for w in weights], "o-", markersize=4, color="0.3")
    for axis in (score, error):
        for place, weight in enumerate(weights):
            if weight in found:
                first = weight == found[0]
                axis.axvspan(place - 0.5, place + 0.5, color="0.9", zorder=0, label="stable" if first else None)
        axis.set_xticks(places, [f"{weight:g}" for weight in weights])
        axis.set_xlim(-0.5, len(weights) - 0.5)
        axis.spines[["top", "right"]].set_visible(False)
