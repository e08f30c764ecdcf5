"""A few dense masks beside drawings of everything: what is the best use of them?

Drawings are positive ones alone, so that nothing but the masks tells what is wrong with them: names, outlines, or both.
Every row sees the same masks and as many steps; each has one number that matters, tuned with the same number of trials at
20 masks, and kept for the other numbers of masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from ..config import DrawingsConfig, FitConfig, recipe
from .corrector import corrected
from .experiment import ExperimentConfig, Part, Result
from .noise_map import STEPS, TRUSTED, at_rate, canvases
from .table import Row

QUESTION = "With drawings of every image and dense masks of N: which use of both learns most?"
MASKS = (5, 6, 10, 20, 50, 100)
_TUNED_AT = 20
_NOISE = {
    "majority": "two names mostly wrong",
    "thick": "outlines too far",
    "thin": "outlines not far enough",
    "thick_names": "both: thick, and two names mostly wrong",
}
_SHARE = 0.25  # of a batch, with a mask
_WEIGHTS = (0.3, 1.0, 3.0, 10.0)
_FINETUNED = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
_OURS = ("mixed", "pen", "pen_finetune", "pen_mixed")
_OTHERS = ("masks", "ce_mixed", "finetune", "corrector")


def parts(config: ExperimentConfig) -> list[Part]:
    out = (config.out or Path("runs") / config.name) / "corrected"
    found = []
    for noise in ("majority", "thick") if config.quick else _NOISE:
        base = replace(canvases(noise), negative=replace(TRUSTED, weight=0.0))
        if config.quick:
            base = replace(base, data=replace(base.data, limit=64))
        for count in (6, _TUNED_AT) if config.quick else MASKS:
            title = _title(noise, count)
            tuned_as = None if count == _TUNED_AT else _title(noise, _TUNED_AT)
            rows = rows_of(base, count, recipe("mnist").positive, out / title, 30 if config.quick else STEPS)
            found.append(Part(title, rows, tuned_as=tuned_as))
    return found


def _title(noise: str, count: int) -> str:
    return f"{noise}, {count} masks"


def rows_of(
    base: FitConfig, count: int, matrix: DrawingsConfig, out: Path, corrector_steps: int
) -> dict[str, Row | Mapping[str, Row]]:
    """
    drawings       cross-entropy on the drawings, no masks
    masks          cross-entropy on the masks alone; tuned: learning rate
    ce_mixed       cross-entropy on drawings and masks; tuned: weight of the masks
    finetune       drawings, then masks; tuned: learning rate of the second phase
    corrector      a network that mends drawings, trained on the pairs, teaches; tuned: its learning rate
    mixed          drawings through a global matrix, and masks; tuned: weight of the masks
    pen            outlines moved back by what the pairs say, then as ce_mixed
    pen_finetune   outlines moved back, then as finetune
    pen_mixed      outlines moved back, then the matrix and the masks
    supervised     cross-entropy on all masks
    """
    few = replace(base, data=replace(base.data, dense_images=count))
    mixed = replace(few, data=replace(few.data, supervision="mixed", dense_share=_SHARE))
    then = replace(few, data=replace(few.data, supervision="then-masks"))
    masks = replace(few, data=replace(few.data, supervision="masks"))

    def drawn(config: FitConfig, **changes: object) -> FitConfig:
        return replace(config, positive=replace(config.positive, **changes))  # type: ignore[arg-type]

    def weighted(config: FitConfig) -> dict[str, Row]:
        return {f"mask weight {weight:g}": replace(config, mask_weight=weight) for weight in _WEIGHTS}

    def tuned(config: FitConfig) -> dict[str, Row]:
        return {
            f"then lr {rate:g}x": replace(config, optim=replace(config.optim, finetune_lr=rate * config.optim.lr))
            for rate in _FINETUNED
        }

    def corrector(lr: float, seed: int) -> FitConfig:
        folder = out / f"{lr:g}-{seed}"
        return corrected(mixed, seed, folder, lr=lr * base.optim.lr, steps=corrector_steps)

    with_matrix = replace(mixed, positive=matrix)
    return {
        "drawings": base,
        "masks": {f"lr {rate:g}x": at_rate(masks, rate) for rate in (0.25, 0.5, 1.0, 2.0)},
        "ce_mixed": weighted(mixed),
        "finetune": tuned(then),
        "corrector": {f"its lr {rate:g}x": partial(corrector, rate) for rate in (0.25, 0.5, 1.0, 2.0)},
        "mixed": weighted(with_matrix),
        "pen": weighted(drawn(mixed, pen="auto")),
        "pen_finetune": tuned(drawn(then, pen="auto")),
        "pen_mixed": weighted(drawn(with_matrix, pen="auto")),
        "supervised": replace(base, data=replace(base.data, supervision="masks")),
    }


def conclude(results: Sequence[Result]) -> list[str]:
    sentences = []
    for result in results:
        means = {row: result.mean(row) for row in result.rows}
        ours, other = max(_OURS, key=means.__getitem__), max(_OTHERS, key=means.__getitem__)
        sentences.append(
            f"{result.title}: {ours} {means[ours]:.1f}, the best without a matrix or a pen, {other}, {means[other]:.1f} "
            f"({means[ours] - means[other]:+.1f}); fine-tuning {means['finetune']:.1f}, masks alone {means['masks']:.1f}, "
            f"all masks {means['supervised']:.1f}."
        )
    return sentences


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Score over the number of masks, a panel for each noise."""
    kinds = list(dict.fromkeys(result.title.split(",")[0] for result in results))
    figure.set_size_inches(4.6 * len(kinds), 4.6)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        own = [result for result in results if result.title.split(",")[0] == kind]
        counts = [int(result.title.split()[-2]) for result in own]
        for row in own[0].rows:
            style = "-" if row in _OURS else ":" if row in ("drawings", "supervised") else "--"
            axis.plot(counts, [result.mean(row) for result in own], style, marker="o", markersize=3, label=row)
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("dense masks")
        axis.set_title(_NOISE.get(kind, kind), fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean IoU, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=10, frameon=False)
