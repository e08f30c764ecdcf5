"""What the tables of few-masks say, in words: who is ahead, what each step of the pen is worth, and whether that is as much as
was hoped for before they were run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..data import open_split
from ..data.segmentation import open_pen
from ..pen import undo
from .experiment import Result
from .table import config_of

BY_IMAGE = ("pen_image", "pen_image_finetune")  # of a brush that differs between images, which that of digits does not
_PEN = ("pen", "pen_alone", "pen_nothing", "pen_doubt", "pen_doubt_alone", "pen_finetune")
_MIXED = ("mixed", "mixed_trace")
OURS = (*_MIXED, *_PEN, "pen_mixed", "pen_mixed_trace", "all", *BY_IMAGE)
OTHERS = ("masks", "ce_mixed", "finetune", "corrector")
_DOUBTING = (("pen_doubt", "pen"), ("pen_doubt_alone", "pen_alone"))


class _Hope(NamedTuple):
    """That the best row of ``ours`` would be so many points over the best of ``others``."""

    points: float
    ours: Sequence[str]
    others: Sequence[str]
    dice: bool = False  # of vessels, instead of mean IoU
    within: float | None = None  # so many points of all masks, too


# title of a table -> what was set down before it was run
_HOPES = {
    "majority, 20 masks": _Hope(2, _MIXED, OTHERS),
    "thick, 20 masks": _Hope(1, _PEN, (*OTHERS, "mixed"), within=3),
    "thick, 6 masks": _Hope(5, _PEN, (*OTHERS, "mixed"), within=3),
    "thin, 20 masks": _Hope(10, OURS, ("finetune",)),
    "chase brush, 2 masks": _Hope(3, ("pen", "pen_finetune", *BY_IMAGE), ("masks", "finetune"), dice=True),
}


def _kept(result: Result, hope: _Hope) -> str:
    def score(row: str) -> float:
        return _dice(result, row) if hope.dice else result.mean(row)

    ours, other = (max((row for row in rows if row in result.rows), key=score) for rows in (hope.ours, hope.others))
    lead = score(ours) - score(other)
    behind = score("supervised") - score(ours)
    words = (
        f"{result.title}: HOPED FOR: {hope.points:g} points{' of Dice' if hope.dice else ''} over the best of "
        f"{', '.join(row for row in hope.others if row in result.rows)}; {ours} is {lead:+.2f} over {other}: "
        f"{'reached' if lead >= hope.points else 'NOT reached'}"
    )
    if hope.within is not None:
        words += (
            f"; within {hope.within:g} of all masks, it is {behind:.2f} behind: "
            f"{'reached' if behind <= hope.within else 'NOT reached'}"
        )
    return f"{words}."


def conclude(results: Sequence[Result]) -> list[str]:
    sentences = []
    for result in results:
        means = {row: result.mean(row) for row in result.rows}
        ours, other = (max((row for row in rows if row in means), key=means.__getitem__) for rows in (OURS, OTHERS))
        sentences.append(
            f"{result.title}: the best row with a matrix or a pen, {ours}, has {means[ours]:.1f}, the best without, {other}, "
            f"{means[other]:.1f} ({means[ours] - means[other]:+.1f}); fine-tuning {means['finetune']:.1f}, masks alone "
            f"{means['masks']:.1f}, all masks {means['supervised']:.1f}."
        )
        if result.title in _HOPES:
            sentences.append(_kept(result, _HOPES[result.title]))
        if "names_first" in means:
            lead = means["pen_mixed"] - means["names_first"]
            sentences.append(
                f"{result.title}: outlines first and then names (pen_mixed), {lead:+.1f} over the other order (names_first)."
            )
        if "pen_nothing" in means:
            lead = means["pen"] - means["pen_nothing"]
            sentences.append(
                f"{result.title}: what outlines were moved over given to what lies there (pen), {lead:+.1f} over saying "
                "nothing (pen_nothing)."
            )
        if "pen_doubt" in means:
            leads = [f"{means[row] - means[than]:+.1f} ({row})" for row, than in _DOUBTING if row in means]
            sentences.append(
                f"{result.title}: what the drawing does not prove near the outline saying nothing: "
                f"{' and '.join(leads)} over keeping it."
            )
        if "vessel" in result.cells[0].iou:
            told_of = ("pen", *BY_IMAGE, *reversed(OTHERS), "drawings", "supervised")
            dice = {row: _dice(result, row) for row in told_of if row in means}
            told = ", ".join(f"{row} {value:.1f}" for row, value in dice.items())
            sentences.append(f"{result.title}: Dice of vessels: {told}.")
        if result.title.startswith("chase"):
            mended = {row: mended_dice(result, row) for row in ("drawings", "pen", "pen_image") if row in means}
            told = ", ".join(f"{row} {value:.1f}" for row, value in mended.items())
            sentences.append(
                f"{result.title}: Dice of the training drawings themselves, as each row reads them: {told}."
            )
    return sentences


def _dice(result: Result, row: str) -> float:
    """Of vessels, in percent, over the seeds."""
    values = [cell.iou["vessel"] or 0.0 for cell in result.cells if cell.method == row]
    return statistics.fmean(200 * value / (100 + value) for value in values)


def mended_dice(result: Result, row: str) -> float:
    """Of vessels in the training drawings, as the row reads them, with the masks: in percent, over images and seeds."""
    values = []
    for seed in sorted({cell.seed for cell in result.cells}):
        config = config_of(result.rows[row], seed)
        source = open_split(config.data, "train")
        pen, _ = open_pen(config, source)
        for index in range(len(source)):
            record = source.load(index)
            assert record.positive is not None
            assert record.mask is not None
            drawn = (record.positive if pen is None else undo(record.positive, pen)) == 1
            values.append(200 * np.count_nonzero(drawn & (record.mask == 1)) / (drawn.sum() + (record.mask == 1).sum()))
    return statistics.fmean(values)
