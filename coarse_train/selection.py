"""What a few dense masks decide, and that they decide nothing else.

Which kind of drawings to trust matters more than any other setting, and drawings alone do not tell: on the wrong side the
method loses 20 points and more, and the likelihood of held-out drawings does not see it. A few masks tell at once. So two
short runs, one for each side, are scored on them, and the better side is taken for the run itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .config import FitConfig, from_dict, to_dict
from .data import FolderNotFound, Source, Subset, open_split
from .distributed import World
from .run import check_same_run, write_text


def kinds_of_drawings(config: FitConfig, source: Source) -> tuple[str, ...]:
    """Those of "positive" and "negative" that the run learns from."""
    if config.data.supervision == "masks":
        return ()
    found = {kind for index in range(len(source)) for kind in source.kinds(index)}
    if config.data.simulate is not None:
        found |= {"positive", "negative"}
    return tuple(kind for kind in ("positive", "negative") if kind in found and getattr(config, kind).weight > 0)


def choose_trusted_side(
    config: FitConfig, source: Source, world: World, fit: Callable[[FitConfig], Any]
) -> tuple[FitConfig, dict[str, float]]:
    """The config with the confusion matrix on the better side, and the score of each trusted side.

    As it came, and {}, unless masks may choose (``select_with``), there are drawings of both kinds, and exactly one kind has
    a confusion matrix. What was chosen stands in selection.json in the run folder, where a resumed run finds it.
    """
    present = kinds_of_drawings(config, source)
    if config.data.supervision == "drawings" and not present:
        raise ValueError("weight: expected a number above 0 for a kind of drawings that there is, got none")
    kinds = {"positive": config.positive, "negative": config.negative}
    trusted = [name for name, kind in kinds.items() if kind.cm == "none"]
    if not config.select_with or config.select_steps == 0 or len(trusted) != 1 or len(present) < 2:
        return config, {}
    swapped = replace(
        config,
        positive=replace(config.negative, weight=config.positive.weight),
        # what drawings leave out is no statement of theirs where they say what is not there
        negative=replace(config.positive, weight=config.negative.weight, missing=None),
    )
    other = "negative" if trusted[0] == "positive" else "positive"
    candidates = {trusted[0]: config, other: swapped}  # by the trusted side, whichever was given
    path = config.out / "selection.json"
    if config.resume and path.exists():
        content = json.loads(path.read_text())
        # the config of the run folder may have the chosen side, from which `missing` of the other is not to be had again
        before, now = from_dict(content["negative_trusted"]), candidates["negative"]
        check_same_run(before, replace(now, positive=replace(now.positive, missing=before.positive.missing)))
        scores = content["mean_iou"]
    else:
        folders = {name: config.out / f"trust_{name}" for name in candidates}
        if not config.resume and world.is_main:
            for folder in folders.values():  # of a run that was given up
                shutil.rmtree(folder, ignore_errors=True)
            path.unlink(missing_ok=True)
        world.wait()
        steps = config.select_steps or max(1, config.steps // 5)
        scores = {}
        for name, candidate in candidates.items():
            trial = replace(candidate, out=folders[name], steps=steps, select_steps=0, resume=True)
            scores[name] = fit(trial).score
        if world.is_main:
            content = {
                "chosen_by": f"{config.select_with} dense validation masks",
                "mean_iou": scores,
                "negative_trusted": to_dict(candidates["negative"]),
            }
            write_text(path, json.dumps(content, indent=2) + "\n")
    return candidates[max(scores, key=lambda name: scores[name])], scores


def describe_risk(config: FitConfig, source: Source) -> str | None:
    """One sentence where nothing holds a confusion matrix: every kind of drawings that there is has one."""
    present = kinds_of_drawings(config, source)
    if config.data.supervision != "drawings" or any(getattr(config, kind).cm == "none" for kind in present):
        return None
    return (
        f"note: all drawings that there are ({', '.join(present)}) have a confusion matrix and none are trusted; nothing then "
        f"holds the matrix to the truth, and training may drift or flip classes; --{present[0]}.cm none trusts them"
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


def open_validation(config: FitConfig) -> Source | None:
    """The images that are scored during training: ``select_with`` of those with masks, chosen by the seed, or, where masks
    choose nothing, all of them. None: there are no masks."""
    try:
        source = open_split(config.data, "val")
    except FolderNotFound:
        if config.select_with:
            raise
        return None
    with_mask = [index for index in range(len(source)) if "mask" in source.kinds(index)]
    if not config.select_with:
        return Subset(source, with_mask) if with_mask else None
    if len(with_mask) < config.select_with:
        raise ValueError(
            f"select_with: expected at most the {len(with_mask)} masks of the split, got {config.select_with}"
        )
    chosen = np.random.default_rng([config.seed, 7]).permutation(len(with_mask))[: config.select_with]
    return Subset(source, [with_mask[k] for k in sorted(chosen)])
