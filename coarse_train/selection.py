"""What a few dense masks decide, and that they decide nothing else.

What is wrong with drawings decides what helps: a confusion matrix for names, on the kind that is worse, moved outlines for
outlines, neither where both kinds are good. Drawings alone do not tell: the wrong side costs 20 points and more, and the
likelihood of held-out drawings does not see it. A few masks do. So short runs, one for each candidate, are scored on them, and
the best candidate is taken for the run itself.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from . import IGNORE
from .config import DrawingsConfig, FitConfig, Measured, from_dict, to_dict
from .criterion import open_transition
from .data import FolderNotFound, Source, Subset, open_split
from .data.segmentation import NO_DRAWINGS, pairs_of
from .distributed import World
from .pen import measure, to_json
from .run import check_same_run, is_run, write_text

_CLOSE = 2.0  # points of mean IoU: a lead that another choice of masks may turn round


class Splits(NamedTuple):
    """What a run reads. validation: with masks that are scored; None: there are none. masks: of images outside the training
    split, for the masks that come after drawings; None: they are of training images."""

    train: Source
    validation: Source | None
    masks: Source | None = None


@dataclass(frozen=True)
class Selection:
    """Mean IoU of every candidate on the masks, and which was taken."""

    masks: int
    steps: int
    scores: dict[str, float]
    chosen: str


def open_splits(config: FitConfig, train: Source) -> Splits:
    """With ``select_with`` of the validation images with masks, chosen by the seed; where masks choose nothing, all of them."""
    try:
        source = open_split(config.data, "val")
    except FolderNotFound:
        if config.select_with or config.data.dense_split == "val":
            raise
        return Splits(train, None)
    with_mask = [index for index in range(len(source)) if "mask" in source.kinds(index)]
    learned = config.data.dense_images if config.data.dense_split == "val" else 0
    wanted = max(config.select_with, learned)
    if not wanted:
        return Splits(train, Subset(source, with_mask) if with_mask else None)
    if len(with_mask) < wanted:
        name = "select_with" if config.select_with else "dense_images"
        raise ValueError(f"{name}: expected at most the {len(with_mask)} masks of the split, got {wanted}")
    order = np.random.default_rng([config.seed, 7]).permutation(len(with_mask))
    chosen = Subset(source, [with_mask[k] for k in sorted(order[:wanted])])
    if learned:  # what is learned from is not scored, and no other mask is looked at
        return Splits(train, None, chosen)
    return Splits(train, chosen)


def kinds_of_drawings(config: FitConfig, source: Source) -> tuple[str, ...]:
    """Those of "positive" and "negative" that the run learns from."""
    if config.data.supervision == "masks":
        return ()
    found = {kind for index in range(len(source)) for kind in source.kinds(index)}
    if config.data.simulate is not None:
        found |= {"positive", "negative"}
    return tuple(kind for kind in ("positive", "negative") if kind in found and getattr(config, kind).weight > 0)


def candidates(
    config: FitConfig, present: tuple[str, ...], *, pen: Path | None = None, estimable: bool = False
) -> dict[str, FitConfig]:
    """What there is to choose from, by name, where there are the kinds of drawings ``present``.

    The matrix is the one of the config, or a global one where it has none. pen: a pen.json with radii that are not all 0; left
    out where the config has a pen of its own, which all candidates then keep. estimable: both kinds meet; without a matrix
    a uniform transition is then estimated, by which cross-entropy gains as much as by anything, and with one it is not.
    """
    given = next(
        (kind for kind in (config.positive, config.negative) if kind.cm != "none"), DrawingsConfig(cm="global")
    )
    own = {"pen": config.positive.pen, "band": config.positive.band, "doubt": config.positive.doubt}
    bare = replace(
        config, positive=replace(config.positive, cm="none"), negative=replace(config.negative, cm="none", missing=None)
    )
    if estimable and config.transition == "uniform":
        bare = replace(bare, transition="estimated")
    positive = replace(given, weight=config.positive.weight, **own)  # type: ignore[arg-type]
    # what drawings leave out is no statement of theirs where they say what is not there
    negative = replace(given, weight=config.negative.weight, missing=None, pen=None, band=0.0, doubt=0.0)
    found = {"all trusted": bare}
    if "positive" in present:
        found["matrix on positive"] = replace(bare, positive=positive, transition=config.transition)
    if "negative" in present:
        found["matrix on negative"] = replace(bare, negative=negative, transition=config.transition)
    if "positive" in present and pen is not None and config.positive.pen is None:
        for name, row in (("pen", "all trusted"), ("pen, matrix on positive", "matrix on positive")):
            found[name] = replace(found[row], positive=replace(found[row].positive, pen=pen))
    if (
        config.data.supervision == "drawings"
        and config.select_with > 1
        and config.positive.pen not in get_args(Measured)
    ):
        data = replace(bare.data, supervision="then-masks", dense_images=config.select_with, dense_split="val")
        found["fine-tuning on the masks"] = replace(bare, data=data)
    return found


def choose(
    config: FitConfig, train: Source, world: World, fit: Callable[[FitConfig, Splits], Any]
) -> tuple[FitConfig, Selection | None]:
    """The config of the best candidate on ``select_with`` masks, and how they did.

    As it came, and None, unless masks may choose and there is something to choose. Fine-tuning on the masks is scored by
    cross-validation over them in two folds, never on what was learned from. What was chosen stands in selection.json in the
    run folder, where a resumed run finds it.
    """
    present = kinds_of_drawings(config, train)
    if config.data.supervision == "drawings" and not present:
        if not any(kind in train.kinds(index) for index in range(len(train)) for kind in ("positive", "negative")):
            raise ValueError(NO_DRAWINGS)
        raise ValueError("weight: expected a number above 0 for a kind of drawings that there is, got none")
    path = config.out / "selection.json"
    if not config.resume and world.is_main:
        path.unlink(missing_ok=True)  # of a run that was given up
    if not config.select_with or config.select_steps == 0 or not present or config.data.dense_split == "val":
        taken = _taken_up(config) if config.resume else None
        return (config, taken[1]) if taken else (config, None)
    if config.resume and (taken := _taken_up(config)):
        return taken
    if not config.resume and world.is_main:
        for folder in config.out.glob("trial_*"):  # as above; a run that makes no trials has none to clear away
            if is_run(folder) or is_run(folder / "fold_0"):  # else it is none of ours
                shutil.rmtree(folder, ignore_errors=True)
    splits = open_splits(config, train)
    assert splits.validation is not None
    pen = None
    if "positive" in present and config.positive.pen is None:  # else all candidates keep that
        pen = _measured(config, splits.validation, config.out / "pen.json", world)
    found = candidates(config, present, pen=pen, estimable=_estimable(config, train, present))
    if not _labelled_in_both_halves(splits.validation):
        found.pop("fine-tuning on the masks", None)
    steps = config.select_steps or max(2, config.steps // 5)
    scores = {name: _score(name, row, splits, steps, config.out, fit) for name, row in found.items()}
    chosen = max(scores, key=lambda name: scores[name])
    if world.is_main:
        content = {
            "chosen": chosen,
            "chosen_by": f"{config.select_with} dense validation masks",
            "steps": steps,
            "mean_iou": scores,
            "cost_if_wrong": {name: scores[chosen] - score for name, score in scores.items()},
            "given": to_dict(config),
            "config": to_dict(found[chosen]),
        }
        write_text(path, json.dumps(content, indent=2) + "\n")
    return found[chosen], Selection(config.select_with, steps, scores, chosen)


def _labelled_in_both_halves(masks: Source) -> bool:
    """Raises ValueError where no mask has a labelled pixel."""
    labelled = {k for k in range(len(masks)) if (mask := masks.load(k).mask) is not None and (mask != IGNORE).any()}
    if not labelled:
        raise ValueError(f"select_with: expected masks with labelled pixels to choose by, got {len(masks)} without")
    return len({k % 2 for k in labelled}) == 2


def _score(
    name: str, row: FitConfig, splits: Splits, steps: int, out: Path, fit: Callable[[FitConfig, Splits], Any]
) -> float:
    """Mean IoU of a short run at its last step."""
    folder = out / f"trial_{name.replace(', ', '_').replace(' ', '_')}"
    trial = replace(row, out=folder, steps=steps, select_with=0, select_steps=None, resume=True, pictures=0)
    if row.data.dense_split != "val":
        return float(fit(trial, splits).score)
    masks = splits.validation
    assert masks is not None
    halves = [Subset(masks, range(part, len(masks), 2)) for part in (0, 1)]
    found = []
    for number, (learned, scored) in enumerate((halves, halves[::-1])):
        data = replace(trial.data, dense_images=len(learned))
        fold = replace(trial, data=data, out=folder / f"fold_{number}")
        found.append(float(fit(fold, Splits(splits.train, scored, learned)).score))
    return float(np.mean(found))


def _estimable(config: FitConfig, train: Source, present: tuple[str, ...]) -> bool:
    if len(present) < 2 or len(train.classes) < 3:
        return False
    try:
        open_transition(replace(config, transition="estimated"), train)
    except ValueError:  # they meet nowhere
        return False
    return True


def _measured(config: FitConfig, masks: Source, path: Path, world: World) -> Path | None:
    """pen.json with what drawings of the images with ``masks`` say, where there are any and outlines are to be moved."""
    pairs = list(pairs_of(masks, config.data, config.seed, range(len(masks))))
    report = measure(pairs, masks.classes.names) if pairs else None
    if world.is_main and report is not None:
        write_text(path, to_json(report, each=bool(report.differing)))
    world.wait()
    return path if report is not None and report.pen(each=bool(report.differing)).moves else None


def _taken_up(config: FitConfig) -> tuple[FitConfig, Selection] | None:
    """What was chosen when the run began; ``config`` may be what was given then, or that of the run folder, which is what was
    chosen."""
    path = config.out / "selection.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    given, chosen = from_dict(content["given"]), from_dict(content["config"])
    scores = content["mean_iou"]
    selection = Selection(config.select_with, content["steps"], scores, content["chosen"])
    # what was changed on the way; where there is a checkpoint, `read_resume` asks whether it may be
    lenient = replace(config, resume_changed=True) if (config.out / "last.pt").exists() else config
    try:
        check_same_run(chosen, lenient)
        return config, selection
    except ValueError:
        check_same_run(given, lenient)
    # the same choice, with what may differ between a run and its continuation as it is now
    found = candidates(config, ("positive", "negative"), pen=config.out / "pen.json", estimable=True)
    return replace(found[content["chosen"]], transition=chosen.transition), selection


def describe_selection(config: FitConfig, validation: Source | None, selection: Selection | None) -> list[str]:
    """For the log of the run: what read a dense mask, and what every candidate would have cost."""
    if config.data.dense_split == "val" and selection is None and validation is None:
        masks = f"{config.data.dense_images} dense masks of the validation split"
        return [f"{masks} are learned from, and no other is looked at: nothing is scored, the last step counts"]
    if not config.select_with:
        if validation is None:
            return ["there is no validation split with dense masks: nothing is scored, the last step counts"]
        return [
            f"{len(validation)} dense masks of the validation split are scored and choose nothing; the last step counts"
        ]
    sentence = f"{config.select_with} dense masks of the validation split"
    if selection is None:
        return [f"{sentence} choose the checkpoint, and nothing else"]
    wide = max(map(len, selection.scores))
    best = selection.scores[selection.chosen]
    ranked = sorted(selection.scores.items(), key=lambda item: -item[1])
    lines = [
        f"{sentence} choose what is learned from and how, on runs of {selection.steps} steps"
        + (", and the checkpoint" if validation is not None else ", and are then learned from; the last step counts"),
        f"  {'':<{wide}}  mean IoU  points lost, had it been taken",
        *(f"  {name:<{wide}}{score:>10.2f}{best - score:>8.2f}" for name, score in ranked),
    ]
    close = [name for name, score in ranked[1:] if best - score < _CLOSE]
    doubt = f"; {', '.join(close)} might do as well, for {selection.masks} masks tell no better" if close else ""
    lines.append(f"taken: {selection.chosen}{doubt}")
    if selection.steps < config.steps:
        lines.append(f"runs that short often err; as long as this one (--select-steps {config.steps}) they seldom do")
    return lines
