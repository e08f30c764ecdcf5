"""Two observers who disagree, real ones: CHASE_DB1, scored against the first observer on children that nobody has trained on.

The second observer has drawn every training image; of the first there are no masks, those of `MASKS` images, or all. Each
observer is a kind of drawings with a matrix of its own, or trusted. With all of both ("observers" of
`coarse_train.data.retina`) the first is in the place of negative drawings, which of two classes are positive ones of the
other; more observers, or more classes, take a list of `Drawings`, one for each, and `coarse_kernels.annotation_objective`.
Nothing is tuned: network, steps and rates are those of the recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from ..config import DrawingsConfig, FitConfig, recipe
from ..data import Source, open_split
from ..metrics import ConfusionMeter
from .experiment import ExperimentConfig, Part, Result
from .noise_map import LEFT_OUT, TRUSTED
from .table import config_of

QUESTION = (
    "Two observers disagree: how near to the first comes what is learned from the second, and what do a matrix, or a few "
    "masks by the first, add?"
)
MASKS = 3
_EYE = (96, 80)  # pixels of a made-up one
_SHARE = 0.5  # of a batch, with a mask: two images of four
_GLOBAL = DrawingsConfig(cm="global")
_FEW = ("masks", "ce_mixed", "finetune", "mixed", "mixed_finetune", "pen_image")
# row through a matrix -> row that trusts, what the first observer has given
_PAIRS = {
    "second_global": ("second", "no masks"),
    "second_grid": ("second", "no masks, on a grid"),
    "mixed": ("ce_mixed", f"{MASKS} masks"),
    "mixed_finetune": ("finetune", f"{MASKS} masks, then they alone"),
    "both_matrices": ("both", "all, each a matrix"),
    "both_second_matrix": ("both", "all, trusted"),
}


def parts(config: ExperimentConfig) -> list[Part]:
    root, title = config.root("chasedb1"), "CHASE_DB1"
    if config.data is None and config.quick:
        root, title = _made_up((config.out or Path("runs") / f"{config.name}-quick") / "made-up"), "made-up eyes"
    if root is None:
        raise ValueError(f"data: expected a folder with chasedb1, whose two observers this is about, got {config.data}")
    base = recipe("chasedb1")
    data, model = replace(base.data, root=root, workers=0), base.model  # a table has a process for each core
    if config.quick:
        data, model = replace(data, crop=(64, 64)), replace(model, widths=(8, 16))
    base = replace(base, data=data, model=model, evaluate_every=base.steps // 2)
    return [Part(title, rows_of(base))]


def rows_of(base: FitConfig) -> dict[str, FitConfig]:
    """
    second                     cross-entropy on the second observer's drawings
    second_global, _grid       through one matrix; through one at every 8 pixels, whose diagonal stays above 0.2
    masks                      cross-entropy on the masks of a few images by the first
    ce_mixed, finetune         cross-entropy on both; on the drawings, and at the end on the masks alone
    mixed, mixed_finetune      the same, drawings through one matrix
    pen_image                  as ce_mixed, outlines of the drawings moved back, each image by what its thinnest strokes say
    both                       cross-entropy on all of both observers
    both_matrices              a matrix each
    both_second_matrix         a matrix on the second alone
    first                      cross-entropy on all of the first: what can be reached
    """
    trusted = replace(base, positive=TRUSTED, negative=LEFT_OUT)
    few = replace(trusted, data=replace(trusted.data, dense_images=MASKS))
    mixed = replace(few, data=replace(few.data, supervision="mixed", dense_share=_SHARE))
    finetune = replace(few, data=replace(few.data, supervision="then-masks"))
    both_then = replace(few, data=replace(few.data, supervision="mixed-then-masks", dense_share=_SHARE))
    both = replace(trusted, data=replace(trusted.data, variant="observers"), negative=TRUSTED)
    return {
        "second": trusted,
        "second_global": replace(trusted, positive=_GLOBAL),
        "second_grid": replace(trusted, positive=DrawingsConfig(cm="grid", structure="floor")),
        "masks": replace(few, data=replace(few.data, supervision="masks")),
        "ce_mixed": mixed,
        "finetune": finetune,
        "mixed": replace(mixed, positive=_GLOBAL),
        "mixed_finetune": replace(both_then, positive=_GLOBAL),
        "pen_image": replace(mixed, positive=replace(TRUSTED, pen="image")),
        "both": both,
        "both_matrices": replace(both, positive=_GLOBAL, negative=_GLOBAL),
        "both_second_matrix": replace(both, positive=_GLOBAL),
        "first": replace(trusted, data=replace(trusted.data, supervision="masks")),
    }


def _made_up(root: Path) -> Path:
    """What CHASE_DB1 looks like: both eyes of 14 children, whose second observer leaves out thin vessels. So that a quick run
    needs no data."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(28):
        rng, name = np.random.default_rng(number), f"Image_{number // 2 + 1:02d}{'LR'[number % 2]}"
        first, second = Image.new("1", _EYE), Image.new("1", _EYE)
        for width in (1, 1, 2, 3, 3):
            line = rng.uniform(0, _EYE[0], (4, 2)).flatten().tolist()
            for observer in (first, second) if width > 1 else (first,):
                ImageDraw.Draw(observer).line(line, fill=1, width=width)
        vessels = np.asarray(first)[..., None]
        colours = np.where(vessels, (150, 40, 40), (210, 110, 60)) + rng.integers(-15, 16, (*vessels.shape[:2], 3))
        first.save(root / f"{name}_1stHO.png")
        second.save(root / f"{name}_2ndHO.png")
        Image.fromarray(colours.astype(np.uint8)).save(root / f"{name}.jpg")
    return root


def agreement(sources: Iterable[Source]) -> float:
    """Mean IoU in percent of the drawings against the masks, over all images of the sources."""
    meter: ConfusionMeter | None = None
    for source in sources:
        meter = meter or ConfusionMeter(len(source.classes))
        for index in range(len(source)):
            record = source.load(index)
            assert record.positive is not None
            assert record.mask is not None
            meter.update(torch.from_numpy(record.positive), torch.from_numpy(record.mask))
    assert meter is not None
    return meter.mean_iou()


def conclude(results: Sequence[Result]) -> list[str]:
    return [sentence for result in results for sentence in _about(result)]


def _about(result: Result) -> list[str]:
    data = config_of(result.rows["second"], 0).data
    observer = agreement([open_split(data, result.split)])
    overall = agreement(open_split(data, split) for split in ("train", "val", "test"))
    means = {row: result.mean(row) for row in result.rows}
    found = [f"{row} {means[row]:.1f}" for row in _FEW if means[row] > observer]
    missed = [f"{row} {means[row]:.1f}" for row in _FEW if means[row] <= observer]
    gains = ", ".join(
        f"{means[row] - means[other]:+.1f} ({words})" for row, (other, words) in _PAIRS.items() if row in means
    )
    return [
        f"The second observer has {observer:.1f} mean IoU with the first on these images ({overall:.1f} over all pairs).",
        f"From the second's drawings and {MASKS} masks by the first, above the second observer: "
        f"{', '.join(found) or 'nothing'}; NOT above: {', '.join(missed) or 'nothing'}.",
        f"A matrix on the second instead of trust in it: {gains} points.",
        f"All masks by the first: {means['first']:.1f}; the second's drawings alone: {means['second']:.1f}.",
    ]


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Mean and every seed of each row, and the second observer as a line."""
    (result,) = results
    rows = list(result.rows)
    means = [result.mean(row) for row in rows]
    observer = agreement([open_split(config_of(result.rows["second"], 0).data, result.split)])
    figure.set_size_inches(8, 0.36 * len(rows) + 1.6)
    axis = figure.subplots()
    matrix = {row for row in rows if any(kind.cm != "none" for kind in _kinds(config_of(result.rows[row], 0)))}
    colours = ["tab:blue" if row in matrix else "0.7" for row in rows]
    axis.bar_label(axis.barh(rows, means, color=colours), [f"{mean:.1f}" for mean in means], padding=8)
    for cell in result.cells:
        axis.plot(cell.miou, rows.index(cell.method), "k.", markersize=4)
    axis.axvline(observer, color="tab:red", linestyle="--", label=f"the second observer, {observer:.1f}")
    scores = np.array([*(cell.miou for cell in result.cells), observer])
    axis.set_xlim(max(0, scores.min() - 3), scores.max() + 3)
    axis.invert_yaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_xlabel("mean IoU with the first observer, test children, %")
    axis.set_title(f"{result.title}; blue: with a confusion matrix", fontsize=10)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", frameon=False)


def _kinds(config: FitConfig) -> tuple[DrawingsConfig, DrawingsConfig]:
    return config.positive, config.negative
