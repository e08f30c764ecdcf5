"""The runs that masks choose from, which begin as one for each candidate, and of which the best goes on as the run itself.

selection.json in the run folder says how far they came, for a run that was stopped to go on:

    rounds, given          after each round: the scores so far, and the config that they are for
    chosen, config, ...    when a candidate has been taken

Trials are runs like any other, in folders of their own, trial_NAME. That of fine-tuning ends with the drawings, and has others
below it, fold_K_of_N, that go on with some of the masks each.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from . import IGNORE
from .config import FitConfig, from_dict, to_dict
from .data import Source, Subset
from .distributed import World
from .inference import load_model, score
from .metrics import mean_iou_of
from .run import check_same_data, check_same_run, describe_data, is_run, load, save, write_config, write_text
from .schedule import plan_phases

_FINALISTS = 3  # of drawings as they are; two cost 1 to 3 points more, a fourth saves 0.1: docs/experiments/index.md
_FOLDS = 5  # of the masks that fine-tuning learns from; ten cost 1.5 runs more and chose no better: docs/experiments/index.md


class Splits(NamedTuple):
    """What a run reads. validation: with masks that are scored; None: there are none. masks: of images outside the training
    split, for the masks that come after drawings; None: they are of training images."""

    train: Source
    validation: Source | None
    masks: Source | None = None


class Round(NamedTuple):
    """Mean IoU on the masks of the candidates that have done so many steps."""

    steps: int
    scores: dict[str, float]


@dataclass(frozen=True)
class Selection:
    """How the candidates did on so many masks, round by round, and which was taken. left_out: what is no candidate here."""

    masks: int
    rounds: tuple[Round, ...]
    chosen: str
    left_out: tuple[str, ...] = ()

    def last(self) -> dict[str, Round]:
        """Of every candidate the last round that it was in, best first."""
        found = {name: one for one in self.rounds for name in one.scores}
        return dict(sorted(found.items(), key=lambda item: (-item[1].steps, -item[1].scores[item[0]])))

    def lost(self) -> dict[str, float | None]:
        """Of every candidate: points behind the chosen one when it was last scored; None where that was not scored then."""
        return {
            name: one.scores[self.chosen] - one.scores[name] if self.chosen in one.scores else None
            for name, one in self.last().items()
        }


def read_selection(folder: Path, masks: int) -> Selection | None:
    """Of the run in ``folder``, which so many masks chose; None: they have not, or not yet."""
    content = read_content(folder)
    if "chosen" not in content:
        return None
    return Selection(masks, tuple(_rounds_of(content)), content["chosen"], tuple(content.get("left_out", ())))


def read_content(folder: Path) -> dict[str, Any]:
    """What is in selection.json; nothing where there is none."""
    path = folder / "selection.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def write_content(given: FitConfig, rounds: list[Round], /, **more: Any) -> None:
    told = {"rounds": [{"steps": one.steps, "mean_iou": one.scores} for one in rounds], "given": to_dict(given), **more}
    write_text(given.out / "selection.json", json.dumps(told, indent=2) + "\n")


def run_rounds(
    config: FitConfig, found: dict[str, FitConfig], splits: Splits, world: World, fit: Callable[..., Any]
) -> list[Round]:
    """All candidates to ``select_steps``, the best few of them to the end; where there are no more than few, all to the end.
    One that learns from the masks in the end is not judged before it has: it is one of the few. Nor are those whose outlines
    were moved, by scores of others: all of them go on, in place of the last of the few."""
    first = min(config.select_steps or max(1, config.steps // 5), config.steps)
    ends = (first, config.steps) if first < config.steps and len(found) > _FINALISTS else (config.steps,)
    late = [name for name, row in found.items() if row.data.dense_split == "val"]
    rounds = _rounds_done(config) if config.resume else []
    for end in ends[len(rounds) :]:
        if missing := [name for done in rounds for name in done.scores if name not in found]:
            raise ValueError(
                f"resume: expected the candidates that {config.out / 'selection.json'} has scores of, got none called "
                f"{missing[0]!r}, since drawings or masks have changed; without the file the choice begins anew"
            )
        names = [name for name in found if end == config.steps or name not in late]
        if rounds:
            judged = {name: score for name, score in rounds[-1].scores.items() if name not in late}
            names = [*_best(judged, found, _FINALISTS - len(late)), *late]
        rounds.append(
            Round(end, {name: _score(found[name], splits, end, _trial(config, name), world, fit) for name in names})
        )
        if world.is_main:
            write_content(config, rounds)
    return rounds


def _best(scores: dict[str, float], found: dict[str, FitConfig], count: int) -> list[str]:
    """Thick drawings that are moved back label less, and those of thin ones more: it is learned later, or sooner, whatever it
    is worth. After 120 of 600 steps ten masks put thick ones that were moved back up to 27 points behind the best of the
    others, and at the end 23 to 26 ahead (docs/experiments/index.md)."""
    ranked = sorted(scores, key=lambda name: -scores[name])
    moved = [name for name in ranked if found[name].positive.pen is not None]
    as_they_are = [name for name in ranked if name not in moved]
    if not moved or not as_they_are:
        return ranked[:count]
    return [*as_they_are[: count - 1], *moved]


def _rounds_done(config: FitConfig) -> list[Round]:
    content = read_content(config.out)
    if not content:
        return []
    check_same_run(from_dict(content["given"]), config)
    return _rounds_of(content)


def _rounds_of(content: dict[str, Any]) -> list[Round]:
    rounds = content.get("rounds", [content])  # without: of one round of shorter runs, as it was done before
    return [Round(one["steps"], one["mean_iou"]) for one in rounds]


def _trial(config: FitConfig, name: str) -> Path:
    return config.out / f"trial_{name.replace(', ', '_').replace(' ', '_')}"


def _score(row: FitConfig, splits: Splits, until: int, folder: Path, world: World, fit: Callable[..., Any]) -> float:
    """Mean IoU of the candidate after the step ``until`` of its run, which a later call takes up there."""
    trial = replace(row, out=folder, select_steps=0, resume=True)
    if row.data.dense_split != "val":
        return float(fit(trial, splits, until=until).last_score)
    assert splits.validation is not None
    return _cross_validated(trial, splits.train, splits.validation, until, world, fit)


def _cross_validated(
    trial: FitConfig, train: Source, masks: Source, until: int, world: World, fit: Callable[..., Any]
) -> float:
    """Mean IoU of fine-tuning on ``masks``, each of which is predicted by a run that has learned from others of them alone.
    Pixels of all are counted together, as for a candidate that learns from none.

    What comes first, the drawings, knows no mask. It is learned once, by what is the run itself if this is chosen, and each
    fold goes on from there.
    """
    fit(trial, Splits(train, None, masks), until=plan_phases(trial, train, masks)[0].last)
    known, counts = labelled(masks), torch.zeros(len(train.classes), len(train.classes), dtype=torch.int64)
    folds = min(_FOLDS, len(known))
    for number in range(folds):
        scored = known[number::folds]
        learned = Subset(masks, [index for index in range(len(masks)) if index not in scored])
        data = replace(trial.data, dense_images=len(learned))
        out = trial.out / f"fold_{number + 1}_of_{folds}"
        fold = replace(trial, data=data, out=out, select_with=0, select_steps=None)
        if world.is_main and not _goes_on(fold, train, learned):
            _branch(trial.out / "last.pt", fold, train, learned)
        world.wait()
        checkpoint = fit(fold, Splits(train, None, learned), until=until).checkpoint
        found = _count(checkpoint, fold, Subset(masks, scored), world)
        if world.is_main:
            what = f"{len(scored)} masks by fine-tuning on the {len(learned)} others"
            tqdm.write(f"fold {number + 1} of {folds}, {what}: mean IoU {mean_iou_of(found):.2f}", file=sys.stderr)
        counts += found
    return mean_iou_of(counts)


def _goes_on(fold: FitConfig, train: Source, learned: Source) -> bool:
    """Whether there is one, of these settings and masks: one of others (``resume_changed``) has learned something else after
    the drawings, or for longer, than the run that it stands for."""
    path = fold.out / "last.pt"
    if not path.exists():
        return False
    content = load(path)
    try:
        check_same_run(from_dict(content["config"]), replace(fold, resume_changed=False))
        check_same_data(content["data"], content["data"] | describe_data(train, learned, content["channels"]))
    except ValueError:
        return False
    return True


def _branch(checkpoint: Path, fold: FitConfig, train: Source, learned: Source) -> None:
    """A new run folder for ``fold`` that has done what is in the checkpoint of another run, from the same drawings."""
    content = load(checkpoint)
    data = content["data"] | describe_data(train, learned, content["channels"])
    if fold.out.exists():
        shutil.rmtree(fold.out)
    fold.out.mkdir(parents=True)
    write_config(fold, content["changes"])
    save(fold.out / "last.pt", {**content, "config": to_dict(fold), "data": data})


def _count(checkpoint: Path, fold: FitConfig, scored: Source, world: World) -> Tensor:
    """(C, C) int64 pixels, true and predicted. In a function of its own: the network is gone when the next fold begins."""
    loaded = load_model(checkpoint, world.device, network=fold.model.network)
    return score(loaded.model.segmentation, scored, world=world, channels=loaded.channels).meter.counts.cpu()


def labelled(masks: Source) -> list[int]:
    """Which of the images of ``masks`` have a mask with a labelled pixel."""
    return [k for k in range(len(masks)) if (mask := masks.load(k).mask) is not None and (mask != IGNORE).any()]


def adopt(config: FitConfig, selection: Selection, world: World) -> FitConfig:
    """The trial of the chosen candidate, whose run ``config`` is, is that run: its record and its checkpoints move to the run
    folder. last.pt comes last, and then the trial goes, so that what was stopped in between is done again. Returns the config
    to go on with.

    Raises ValueError where the trial is another run, which stays where it is.
    """
    trial, last = _trial(config, selection.chosen), config.out / "last.pt"
    new = "rounds" in read_content(config.out)  # trials of earlier versions were shorter than the run
    if world.is_main and new and not last.exists() and (trial / "last.pt").exists():
        made = {name: load(trial / name) for name in ("best.pt", "last.pt") if (trial / name).exists()}
        before = replace(
            from_dict(made["last.pt"]["config"]), select_with=config.select_with, select_steps=config.select_steps
        )
        # what may differ is as it is now; what has been changed on the way `read_resume` has to see
        own = replace(before, out=config.out) if check_same_run(before, config) else config
        for name in ("tensorboard", "pictures", "metrics.jsonl"):
            if (trial / name).exists():
                if (config.out / name).is_dir():  # of a run that was given up
                    shutil.rmtree(config.out / name)
                os.replace(trial / name, config.out / name)
        write_config(own, made["last.pt"]["changes"])
        for name, content in made.items():
            save(config.out / name, {**content, "config": to_dict(own)})
    if world.is_main and new and last.exists() and is_run(trial):
        shutil.rmtree(trial)
    world.wait()
    return replace(config, resume=True) if last.exists() else config
