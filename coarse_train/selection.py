"""What a few dense masks decide, and that they decide nothing else.

Which kind of drawings to trust matters more than any other setting, and drawings alone do not tell: on the wrong side the
method loses 20 points and more, and the likelihood of held-out drawings does not see it. A few masks tell at once. So two
short runs, one for each side, are scored on them, and the better side is taken for the run itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from . import checkpoint
from .config import FitConfig
from .data import Source
from .distributed import World


def choose_trusted_side(
    config: FitConfig, world: World, fit: Callable[[FitConfig], Any]
) -> tuple[FitConfig, dict[str, float]]:
    """The config with the confusion matrix on the better side, and the score of each trusted side.

    As it came, and {}, unless masks may choose (``select_with``) and exactly one side has a confusion matrix. What was
    chosen stands in selection.json in the run folder, where a resumed run finds it.
    """
    sides = {"positive": config.positive, "negative": config.negative}
    trusted = [name for name, stream in sides.items() if stream.cm == "none"]
    in_use = all(stream.weight > 0 for stream in sides.values()) and config.data.supervision != "masks"
    if not config.select_with or config.select_steps == 0 or len(trusted) != 1 or not in_use:
        return config, {}
    swapped = replace(
        config,
        positive=replace(config.negative, weight=config.positive.weight),
        negative=replace(config.positive, weight=config.negative.weight),
    )
    other = "negative" if trusted[0] == "positive" else "positive"
    candidates = {trusted[0]: config, other: swapped}
    path = config.out / "selection.json"
    if path.exists() and config.resume:
        scores = json.loads(path.read_text())["mean_iou"]
    else:
        scores = {}
        for name, candidate in candidates.items():
            trial = replace(
                candidate,
                out=config.out / f"trust_{name}",
                steps=config.select_steps or max(1, config.steps // 5),
                select_steps=0,
                resume=True,
            )
            scores[name] = fit(trial).score
        if world.is_main:
            content = {"chosen_by": f"{config.select_with} dense validation masks", "mean_iou": scores}
            checkpoint.write_text(path, json.dumps(content, indent=2) + "\n")
    return candidates[max(scores, key=lambda name: scores[name])], scores


def describe_risk(config: FitConfig, source: Source) -> str | None:
    """One sentence where nothing holds a confusion matrix: every kind of drawings that there is has one."""
    if config.data.supervision != "drawings":
        return None
    kinds = frozenset[str]().union(*(source.kinds(index) for index in range(len(source))))
    if config.data.simulate is not None:
        kinds |= {"positive", "negative"}
    streams = {"positive": config.positive, "negative": config.negative}
    present = [name for name, stream in streams.items() if name in kinds and stream.weight > 0]
    if not present or any(streams[name].cm == "none" for name in present):
        return None
    return (
        f"note: all drawings that there are ({', '.join(present)}) have a confusion matrix and none are trusted; nothing then "
        "holds the matrix to the truth, and training may drift or flip classes"
    )


def describe_selection(config: FitConfig, validation: Source | None, scores: dict[str, float]) -> str:
    """One sentence for the log of the run: what read a dense mask."""
    if not config.select_with:
        if validation is None:
            return "no dense masks in the validation split: nothing is scored, the last step counts"
        return (
            f"{len(validation)} dense masks of the validation split are scored and choose nothing; the last step counts"
        )
    sentence = f"{config.select_with} dense masks of the validation split choose the checkpoint"
    if not scores:
        return f"{sentence}, and nothing else"
    found = ", ".join(f"{name} trusted {value:.2f}" for name, value in scores.items())
    chosen = max(scores, key=lambda name: scores[name])
    return f"{sentence} and the trusted side, and nothing else: mean IoU {found}; the {chosen} drawings are trusted"
