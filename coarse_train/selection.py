"""What a few dense masks decide, and that they decide nothing else.

What is wrong with drawings decides what helps: a confusion matrix for names, on the kind that is worse, moved outlines for
outlines, neither where both kinds are good. Drawings alone do not tell: the wrong side costs 20 points and more, and the
likelihood of held-out drawings does not see it. A few masks do. So the run begins once for each candidate, the best few go on
to the end, and the best of those is the run: successive halving (Karnin, Koren and Somekh, ICML 2013) in one round.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from .config import FitConfig, Measured, from_dict, to_dict
from .criterion import open_transition
from .data import FolderNotFound, Source, Subset, open_split
from .data.segmentation import NO_DRAWINGS, pairs_of
from .distributed import World
from .pen import measure, to_json
from .rules import check_config
from .run import check_same_run, is_run, write_text
from .trials import Selection, Splits, adopt, labelled, read_content, read_selection, run_rounds, write_content

_FINE_TUNING = "fine-tuning on the masks"
_CLOSE = 2.0  # points of mean IoU: a lead that another choice of masks may turn round


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


def settled(config: FitConfig, source: Source) -> tuple[FitConfig, list[str]]:
    """With what ``cm`` "auto" is for this data, and a line for the log where there was one."""
    present, lines = kinds_of_drawings(config, source), []
    for kind, other in (("positive", "negative"), ("negative", "positive")):
        own = getattr(config, kind)
        if own.cm != "auto":
            continue
        # of the only drawings there are, nothing would hold a matrix to the truth
        trusted = other in present and getattr(config, other).cm in ("none", "auto")
        held = kind in present and (trusted or config.data.supervision.startswith("mixed"))
        config = replace(config, **{kind: replace(own, cm="global" if held else "none")})
        if kind in present:
            why = (
                "with something beside them to trust"
                if held
                else "with nothing beside them to hold a matrix to the truth"
            )
            lines.append(f"{kind} drawings, {why}: --{kind}.cm {getattr(config, kind).cm}, as auto chooses")
    return config, lines


def candidates(
    config: FitConfig, present: tuple[str, ...], *, pen: Path | None = None, estimable: bool = False
) -> dict[str, FitConfig]:
    """What there is to choose from, by name, where there are the kinds of drawings ``present``.

    The matrix is the one of the config, or a global one with the settings of the positive drawings where it has none.
    pen: a pen.json with radii that are not all 0; left out where the config has a pen of its own, which all candidates then
    keep. estimable: both kinds meet; without a matrix a uniform transition is then estimated, by which cross-entropy gains as
    much as by anything, and with one it is not.
    """
    kinds = (config.positive, config.negative)
    given = next((kind for kind in kinds if kind.cm != "none"), replace(config.positive, cm="global"))
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
        found[_FINE_TUNING] = replace(bare, data=data)
    return found


def choose(
    config: FitConfig, train: Source, world: World, fit: Callable[..., Any]
) -> tuple[FitConfig, Selection | None]:
    """The config of the best candidate on ``select_with`` masks, and how they did.

    As it came, and None, unless masks may choose and there is something to choose. What the candidate has learned is in the run
    folder then, for the run to go on from. Fine-tuning on the masks is scored by cross-validation over them, never on what was
    learned from, and has then learned from the drawings alone. selection.json in the run folder tells a resumed run how far it
    came.
    """
    present = kinds_of_drawings(config, train)
    if config.data.supervision == "drawings" and not present:
        if not any(kind in train.kinds(index) for index in range(len(train)) for kind in ("positive", "negative")):
            raise ValueError(NO_DRAWINGS)
        raise ValueError("weight: expected a number above 0 for a kind of drawings that there is, got none")
    path = config.out / "selection.json"
    if not config.resume and world.is_main:
        path.unlink(missing_ok=True)  # of a run that was given up
    if config.resume and (taken := _taken_up(config)):
        return adopt(*taken, world), taken[1]
    if not config.select_with or config.select_steps == 0 or not present or config.data.dense_split == "val":
        return config, None
    if not config.resume and world.is_main:
        for folder in config.out.glob("trial_*"):  # as above; a run that makes no trials has none to clear away
            if is_run(folder) or is_run(folder / "fold_0"):  # that of an earlier version; else it is none of ours
                shutil.rmtree(folder, ignore_errors=True)
    splits = open_splits(config, train)
    assert splits.validation is not None
    pen, left_out = None, []
    if "positive" in present and config.positive.pen is None:  # else all candidates keep that
        pen, why_not = _measured(config, splits.validation, config.out / "pen.json", world)
        left_out += [f"outlines moved back: {why_not}"] if why_not else []
    found = candidates(config, present, pen=pen, estimable=_estimable(config, train, present))
    with_labels = len(labelled(splits.validation))
    if not with_labels:
        raise ValueError(
            f"select_with: expected masks with labelled pixels to choose by, got {len(splits.validation)} without"
        )
    if _FINE_TUNING in found and (why_not := _not_to_tune(found[_FINE_TUNING], with_labels)):
        del found[_FINE_TUNING]
        left_out.append(f"{_FINE_TUNING}: {why_not}")
    rounds = run_rounds(config, found, splits, world, fit)
    last = rounds[-1].scores
    selection = Selection(config.select_with, tuple(rounds), max(last, key=lambda name: last[name]), tuple(left_out))
    chosen = found[selection.chosen]
    if world.is_main:
        write_content(
            config,
            rounds,
            chosen=selection.chosen,
            chosen_by=f"{config.select_with} dense validation masks",
            cost_if_wrong=selection.lost(),
            left_out=left_out,
            config=to_dict(chosen),
        )
    return adopt(chosen, selection, world), selection


def _not_to_tune(row: FitConfig, with_labels: int) -> str | None:
    """Why the run of fine-tuning, on so many masks that have labels, is no candidate."""
    if with_labels < 2:
        return "one alone has labels, which is either learned from or scored"
    if row.steps < 2:
        return "a step has no two phases"
    try:
        check_config(row)
    except ValueError as error:  # by what a run from drawings alone need not have
        return str(error)
    return None


def _estimable(config: FitConfig, train: Source, present: tuple[str, ...]) -> bool:
    if len(present) < 2 or len(train.classes) < 3:
        return False
    try:
        open_transition(replace(config, transition="estimated"), train)
    except ValueError:  # they meet nowhere
        return False
    return True


def _measured(config: FitConfig, masks: Source, path: Path, world: World) -> tuple[Path | None, str | None]:
    """pen.json with what drawings of the images with ``masks`` say, where there are any and outlines are to be moved; else why
    not."""
    pairs = list(pairs_of(masks, config.data, config.seed, range(len(masks))))
    report = measure(pairs, masks.classes.names) if pairs else None
    if world.is_main and report is not None:
        write_text(path, to_json(report, each=bool(report.differing)))
    world.wait()
    if report is None:
        return None, f"none of the {len(masks)} images whose masks choose has a positive drawing to measure them on"
    if not report.pen(each=bool(report.differing)).moves:
        return None, "they are where the masks have them"
    return path, None


def _taken_up(config: FitConfig) -> tuple[FitConfig, Selection] | None:
    """What was chosen when the run began; ``config`` may be what was given then, or that of the run folder, which is what was
    chosen."""
    selection, content = read_selection(config.out, config.select_with), read_content(config.out)
    if selection is None:
        return None
    given, chosen = from_dict(content["given"]), from_dict(content["config"])
    # what was changed on the way; where there is a checkpoint, `read_resume` asks whether it may be
    lenient = replace(config, resume_changed=True) if (config.out / "last.pt").exists() else config
    try:
        check_same_run(chosen, lenient)
        return config, selection
    except ValueError:
        check_same_run(given, lenient)
    # the same choice, with what may differ between a run and its continuation as it is now
    found = candidates(config, ("positive", "negative"), pen=config.out / "pen.json", estimable=True)
    return replace(found[selection.chosen], transition=chosen.transition), selection


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
    end = ", and the checkpoint" if validation is not None else ", and are then learned from; the last step counts"
    last, lost = selection.last(), selection.lost()
    wide = max(map(len, last))
    steps = [f"step {one.steps}" for one in selection.rounds]
    lines = [
        f"{sentence} choose what is learned from and how{end}; mean IoU of every candidate:",
        f"  {'':<{wide}}{''.join(f'{step:>12}' for step in steps)}  points lost, had it been taken",
    ]
    for name in last:
        scores = [one.scores.get(name) for one in selection.rounds]
        told = "".join(f"{'-' if score is None else f'{score:.2f}':>12}" for score in scores)
        points = lost[name]
        lines.append(f"  {name:<{wide}}{told}{'-' if points is None else f'{points:.2f}':>10}")
    lines += [f"no candidate is {one}" for one in selection.left_out]
    final = selection.rounds[-1].scores
    close = [name for name in final if name != selection.chosen and final[selection.chosen] - final[name] < _CLOSE]
    doubt = f"; {', '.join(close)} might do as well, for {selection.masks} masks tell no better" if close else ""
    lines.append(f"taken: {selection.chosen}{doubt}")
    if len(selection.rounds) > 1:
        first = selection.rounds[0].steps
        lines.append(
            f"points of those that ended early are of step {first}, and they may have come to more: --select-steps "
            f"{config.steps} lets all go on"
        )
    return lines
