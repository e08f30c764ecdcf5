"""Training from coarse drawings. `fit` is the whole of it, top to bottom.

One process, or many with the same result (the batch is that of a step, however many processes share it):

    coarse-train fit camvid --root DIR --simulate coarse --out runs/camvid
    torchrun --nproc-per-node 4 -m coarse_train fit camvid --root DIR --simulate coarse --out runs/camvid
    coarse-train fit runs/camvid/config.toml --resume

A step is a function of (config, step, state): batches, transforms and random numbers depend on (seed, step) alone. So a
run that was killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from . import run
from .advice import describe_risks
from .checking import check_run
from .config import FitConfig, anchored, from_dict, to_dict
from .criterion import open_class_weights, open_transition
from .data import Sample, describe_source, open_split
from .data.sampler import StepSampler
from .data.segmentation import SegmentationData, open_pen
from .distributed import World, join_world
from .inference import score, transition_of
from .interrupt import Interrupted, Watch, shield_worker
from .learner import Learner, NonFiniteStep
from .model import architecture_of, build_model
from .pen import describe_pen
from .progress import show_progress
from .rules import check_config
from .schedule import Phase, plan_phases
from .selection import choose, describe_selection, open_splits, settled
from .trials import Splits


@dataclass(frozen=True)
class FitResult:
    """What came of a run.

    checkpoint: the one to use, best.pt where masks chose it, else last.pt.
    steps: optimizer steps that are done.
    score: its mean IoU in percent on the validation masks; NaN without any.
    last_score: that after the last step that was scored.
    loss: of the last step (`coarse_train.criterion`).
    """

    checkpoint: Path
    steps: int
    score: float
    last_score: float
    loss: float


def fit(config: FitConfig, splits: Splits | None = None, *, until: int | None = None) -> FitResult:
    """Train, score, keep: checkpoints, the record of every step and pictures go into the run folder ``config.out``.

    Args:
        config: all settings, such as `recipe` and `load_toml` give.
        splits: training images, and masks that are scored, instead of those that the config names.
        until: stop after this step, which is scored and kept, for a later call to go on from with ``resume``.

    Returns:
        `FitResult`, the same in every process.

    Raises:
        ValueError, FileNotFoundError: what is wrong with the config or the data, before the first step, for which all files
            are read once; where ``data.check`` is off, when a file is read. With ``select_with`` also masks without a labelled
            pixel, before the first trial or, without trials, at the first evaluation.
        NonFiniteStep: the loss or its gradient is not finite, after the batch has been saved in the run folder; or a parameter,
            before it takes the place of a good one in a checkpoint.
        Interrupted: a KeyboardInterrupt, after SIGTERM or Ctrl-C, when the step is done and kept.
        coarse_train.run.CheckpointError: a checkpoint cannot be written, and the last good one is intact; or the one to go on
            from cannot be read.
    """
    if until is not None and until < 1:
        raise ValueError(f"until: expected a step from 1 on, or None, got {until}")
    if config.out is None:
        raise ValueError("out: expected a folder for the run, got None")
    config = anchored(from_dict(to_dict(config)))  # paths that came as text, and types that do not fit
    check_config(config)
    with join_world(config.device) as world, ExitStack() as stack:
        if config.threads is not None:
            stack.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(config.threads)
        stack.enter_context(run.open_run(config, world))
        source = open_split(config.data, "train") if splits is None else splits.train
        config, chosen_by_auto = settled(config, source)
        channels, checked = check_run(config, source, world, report=splits is None)
        config, selection = choose(config, source, world, fit)
        _, validation, masks = open_splits(config, source) if splits is None else splits
        resumed, changes = run.read_resume(config)
        start = resumed["step"] if resumed else 0
        end = config.steps if until is None else min(until, config.steps)

        # ---- data
        classes = len(source.classes)
        pen, measured = open_pen(config, source)
        phases = plan_phases(config, source, masks)
        datasets = [
            SegmentationData(p.source, p.data, seed=config.seed, training=True, channels=channels, pen=pen)
            for p in phases
        ]
        facts = run.describe_data(source, masks if validation is None else validation, channels)
        # a file may have been measured again
        facts["pen"] = None if pen is None else list(pen.radii)
        facts["pen of each image"] = [] if pen is None else list(pen.widths)
        if resumed:
            run.check_same_data(resumed["data"], facts)
        loaders = [
            _loader(config, phase, dataset, start, world) for phase, dataset in zip(phases, datasets, strict=True)
        ]

        # ---- networks
        torch.manual_seed(config.seed)
        transition = transition_of(resumed["model"]) if resumed else open_transition(config, source)
        architecture = resumed["architecture"] if resumed else None
        model = build_model(config, channels, classes, transition, architecture=architecture, trained=bool(resumed)).to(
            world.device
        )
        learner = Learner(config, world, model, open_class_weights(config, source, world.device))
        best_score = last_score = loss = math.nan
        if resumed:
            learner.load(resumed)
            best_score, last_score = resumed["best_score"], resumed["last_score"]
            loss = resumed.get("loss", loss)  # which earlier versions did not keep
        if world.is_main and (not resumed or changes != resumed["changes"]):
            run.write_config(config, changes)
        log = stack.enter_context(run.RunLog(config, start, enabled=world.is_main))
        log.say(f"{describe_source(source)}, {classes} classes; {world.size} process(es) on {world.device.type}")
        if config.data.dense_images and config.data.supervision != "drawings" and splits is None:
            log.say(f"masks: learned from are those of {config.data.dense_images} images, chosen by the seed")
        if config.resume and not resumed and until is None:
            log.say(f"no last.pt in {config.out}: a new run")
        log.say(f"{config.out}: {start} of {config.steps} steps done")
        for line in (
            *changes,
            *checked,
            *(chosen_by_auto if selection is None else ()),
            *(describe_selection(config, validation, selection) if splits is None else ()),
            # it reads drawings; those of a trial are those of the run
            *(describe_risks(config, source) if world.is_main and until is None else ()),
            *describe_pen(pen, measured, source.classes.names),
        ):
            log.say(line)

        lasting = {  # of every checkpoint
            "config": to_dict(config),
            "classes": asdict(source.classes),
            "channels": channels,
            "data": facts,
            "changes": changes,
            "architecture": architecture_of(model.segmentation),
        }

        # ---- steps
        warned, left_out = False, 0
        step, stop = start, None
        batches = stack.enter_context(closing(_batches(loaders)))  # what ends the run ends their processes
        watch = stack.enter_context(Watch(world, config.save_minutes))
        for step in range(start + 1, end + 1):
            passes = list(itertools.islice(batches, config.accumulate))
            taken = learner.step(step, next(p for p in phases if step <= p.last), passes)
            loss = taken.values["loss"]
            left_out += taken.left_out
            if not taken.labelled and not warned:
                log.say(f"note: not one pixel of step {step} has a label")
                warned = True
            log.step(step, taken.values)

            # ---- score and keep
            improved = False
            evaluated = step % _evaluate_every(config) == 0 or step == end
            if evaluated:
                learner.check(step)
                kept, scored = learner.networks.scored().eval(), None
                if validation is not None:
                    scored = validation, score(kept.segmentation, validation, world=world, channels=channels)
                    last_score = scored[1].meter.mean_iou()
                    if config.select_with and math.isnan(last_score):
                        raise ValueError("select_with: expected masks with labelled pixels to choose by, got none")
                    improved = config.select_with > 0 and (last_score > best_score or math.isnan(best_score))
                    best_score = last_score if improved else best_score
                if world.is_main:
                    show_progress(log, config, step, kept, datasets[0], scored, world)
            stop, due = watch.look()
            if improved or due or stop or step % config.save_every == 0 or step == end:
                if not evaluated:
                    learner.check(step)
                scores = {"best_score": best_score, "last_score": last_score, "loss": loss}
                content = {**lasting, "step": step, **scores, **learner.state()}
                if world.is_main and improved:  # before last.pt, which says how good it is
                    run.save(config.out / "best.pt", content)
                if world.is_main:
                    run.save(config.out / "last.pt", content)
                watch.saved()
            if stop:
                break
        if left_out:
            log.say(f"note: {left_out} of {step - start} steps overflowed in float16 and were left out")
        stop = stop or watch.look()[0]  # also one that came with the last step: it may mean more than this run
        world.wait()  # nobody returns before the checkpoint is there
        if stop:
            raise Interrupted(
                f"stopped after step {step} of {config.steps}, which is in {config.out / 'last.pt'}", stop
            )
        by_masks = config.select_with > 0 and validation is not None
        chosen = config.out / ("best.pt" if by_masks else "last.pt")
        return FitResult(chosen, step, best_score if by_masks else last_score, last_score, loss)


def _loader(config: FitConfig, phase: Phase, dataset: SegmentationData, start: int, world: World) -> DataLoader[Sample]:
    sampler = StepSampler(
        len(dataset),
        config.batch_size,
        phase.last,
        seed=config.seed,
        first=max(start, phase.first),
        accumulate=config.accumulate,
        rank=world.rank,
        world=world.size,
        dense=dataset.dense,
        dense_share=phase.data.dense_share,
    )
    return DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.data.workers,
        collate_fn=dataset.collate,
        pin_memory=world.device.type == "cuda",
        worker_init_fn=shield_worker,
    )


def _batches(loaders: list[DataLoader[Sample]]) -> Generator[Sample]:
    for loader in loaders:
        yield from SegmentationData.batches(loader)


def _evaluate_every(config: FitConfig) -> int:
    return config.evaluate_every or max(1, config.steps // 5)


__all__ = ["FitResult", "NonFiniteStep", "Splits", "fit"]
