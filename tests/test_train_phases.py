"""Masks after drawings: what each phase reads, how fast it learns, and that a resume lands in the right one."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from coarse_train import advice, trials
from coarse_train import run as run_folder
from coarse_train.advice import describe_risks
from coarse_train.cli import main
from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, ModelConfig, OptimConfig, load_toml, recipe
from coarse_train.data import IGNORE, Subset, open_split
from coarse_train.data.sampler import StepSampler
from coarse_train.data.segmentation import choose_dense
from coarse_train.distributed import join_world
from coarse_train.engine import fit
from coarse_train.rules import check_config
from coarse_train.schedule import plan_phases
from coarse_train.selection import candidates, choose, open_splits

from . import data_trees

DATA = DataConfig(dataset="mnist", limit=24, supervision="then-masks", dense_images=5)


def _config(out: Path, **changes: Any) -> FitConfig:
    base = FitConfig(
        data=DATA,
        out=out,
        steps=8,
        batch_size=4,
        threads=1,
        model=ModelConfig(widths=(4, 8)),
        optim=OptimConfig(lr=1e-2, finetune=0.5, schedule="constant", warmup=0.0),
    )
    return replace(base, **changes)


def _rows(out: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


@pytest.mark.slow
def test_drawings_come_first_and_then_masks_alone(tmp_path: Path) -> None:
    fit(_config(tmp_path))
    rows = _rows(tmp_path)
    for row in rows[:4]:
        assert "positive_nll" in row
        assert "mask_nll" not in row
    for row in rows[4:]:
        assert "mask_nll" in row
        assert "positive_nll" not in row
        assert "negative_nll" not in row
    assert [row["lr"] for row in rows] == [1e-2] * 4 + [pytest.approx(2.5e-3)] * 4


@pytest.mark.slow
def test_each_phase_has_a_warm_up_and_a_fall_of_its_own(tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, finetune=0.5, finetune_lr=1e-3, warmup=0.25, schedule="cosine")
    fit(_config(tmp_path, optim=optim, steps=16))
    rates = [row["lr"] for row in _rows(tmp_path)]
    for rate, own in ((1e-2, rates[:8]), (1e-3, rates[8:])):
        assert own[0] == pytest.approx(rate / 2)
        assert max(own) == pytest.approx(rate)
        assert own[-1] < 0.2 * rate


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [2, 4, 6])
def test_a_run_goes_on_in_the_phase_it_was_in(tmp_path: Path, stopped: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(_config(tmp_path / "whole"))
    config = _config(tmp_path / "cut", save_every=stopped)
    kept = run_folder.save

    class Stopped(Exception):
        pass

    def save(path: Path, content: dict[str, Any]) -> None:
        kept(path, content)
        raise Stopped

    monkeypatch.setattr(run_folder, "save", save)
    with pytest.raises(Stopped):
        fit(config)
    monkeypatch.setattr(run_folder, "save", kept)
    fit(replace(config, resume=True))
    one, other = (run_folder.load(tmp_path / name / "last.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_masks_of_the_second_phase_are_the_ones_that_mixed_would_read(tmp_path: Path) -> None:
    source = open_split(DATA, "train")
    config = _config(tmp_path)
    phases = plan_phases(config, source)
    chosen = sorted(choose_dense(source, DATA, config.seed))
    assert isinstance(phases[1].source, Subset)
    assert phases[1].source.indices == chosen
    assert (phases[0].last, phases[1].first, phases[1].last) == (4, 4, 8)
    mixed = replace(config, data=replace(DATA, supervision="mixed-then-masks"))
    assert plan_phases(mixed, source)[0].data.supervision == "mixed"
    alone = replace(config, data=replace(DATA, supervision="masks"))
    (only,) = plan_phases(alone, source)
    assert isinstance(only.source, Subset)
    assert only.source.indices == chosen
    fit(replace(mixed, steps=4))
    rows = _rows(tmp_path)
    assert any("mask_nll" in row for row in rows[:2])
    assert "positive_nll" not in rows[3]


def test_every_length_has_both_phases(tmp_path: Path) -> None:
    source = open_split(DATA, "train")
    for steps in (2, 3, 10, 101):
        for share in (0.01, 0.5, 0.99):
            config = _config(tmp_path, steps=steps, optim=OptimConfig(finetune=share))
            first, second = plan_phases(config, source)
            assert 0 < first.last == second.first < second.last == steps
    with pytest.raises(ValueError, match="steps: expected at least 2 with supervision then-masks, got 1"):
        fit(_config(tmp_path, steps=1))
    with pytest.raises(ValueError, match="finetune: expected a number between 0 and 1, got 1"):
        fit(_config(tmp_path, optim=OptimConfig(finetune=1.0)))


def test_a_share_of_every_batch_has_masks() -> None:
    dense = {3, 5, 11}
    sampler = StepSampler(20, 8, 30, seed=0, dense=dense, dense_share=0.25)
    batches = list(sampler)
    assert all(sum(index in dense for _, index in batch) == 2 for batch in batches)
    for own in (dense, set(range(20)) - dense):
        keys = [(epoch, index) for batch in batches for epoch, index in batch if index in own]
        first = keys[: len(own)]
        assert {index for _, index in first} == own  # every image once before any comes again
        assert len(set(keys)) == len(keys)
    odd = list(StepSampler(20, 3, 100, seed=0, dense=dense, dense_share=0.25))
    assert abs(sum(index in dense for batch in odd for _, index in batch) - 75) <= 1
    resumed = StepSampler(20, 8, 30, seed=0, first=11, dense=dense, dense_share=0.25)
    assert list(resumed) == batches[11:]
    ranks = [list(StepSampler(20, 8, 30, seed=0, dense=dense, dense_share=0.25, rank=rank, world=2)) for rank in (0, 1)]
    assert [one + other for one, other in zip(*ranks, strict=True)] == batches
    with pytest.raises(ValueError, match="dense_share: expected images with a mask and others, got 20 and the rest"):
        StepSampler(20, 8, 30, seed=0, dense=set(range(20)), dense_share=0.5)


def test_masks_of_the_validation_split_are_learned_from_or_scored_but_not_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, data=replace(DATA, dense_split="val", dense_images=6))
    train = open_split(config.data, "train")
    splits = open_splits(config, train)
    assert splits.validation is None
    assert splits.masks is not None
    assert len(splits.masks) == 6
    assert math.isnan(fit(config).score)
    assert "6 dense masks of the validation split are learned from" in capsys.readouterr().err
    chosen = open_splits(replace(config, data=DATA, select_with=6), train).validation
    assert chosen is not None
    assert [chosen.name(k) for k in range(6)] == [splits.masks.name(k) for k in range(6)]


@pytest.mark.slow
def test_fine_tuning_is_one_of_the_candidates(tmp_path: Path) -> None:
    data = DataConfig(dataset="mnist", variant="thick", limit=24)
    fit(_config(tmp_path, data=data, select_with=6, select_steps=2, steps=2))
    contents = [run_folder.load(path) for path in tmp_path.glob("trial_fine-tuning_on_the_masks/fold_*_of_5/last.pt")]
    assert sorted(content["config"]["data"]["dense_images"] for content in contents) == [4, 5, 5, 5, 5]
    assert len({content["data"]["validation masks"] for content in contents}) == 5
    written = json.loads((tmp_path / "selection.json").read_text())
    assert not math.isnan(written["rounds"][-1]["mean_iou"]["fine-tuning on the masks"])
    assert {"pen", "pen, matrix on positive"} <= set(
        written["rounds"][0]["mean_iou"]
    )  # its outlines are a pixel too far
    assert written["cost_if_wrong"][written["chosen"]] == 0
    assert json.loads((tmp_path / "pen.json").read_text())["radius"]["3"] == 1


@pytest.mark.slow
def test_a_run_whose_masks_chose_the_pen_goes_on_where_it_was_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trials, "_score", lambda *given: 90.0 * (given[3].name == "trial_pen"))
    data = DataConfig(dataset="mnist", variant="thick", limit=24)
    config = _config(tmp_path / "here", data=data, select_with=4, steps=2)
    fit(config)
    assert load_toml(tmp_path / "here" / "config.toml").positive.pen == tmp_path / "here" / "pen.json"
    fit(replace(config, resume=True))  # as it was given first
    (tmp_path / "here").rename(tmp_path / "there")
    capsys.readouterr()
    assert main(["fit", str(tmp_path / "there" / "config.toml"), "--resume", "--steps", "2"]) == 0
    assert "taken: pen" in capsys.readouterr().err


def test_a_pen_file_of_one_s_own_is_not_measured_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "_score", lambda *_: 1.0)
    path = tmp_path / "pen.json"
    path.write_text('{"radius": {"3": 5}}')
    data = DataConfig(dataset="mnist", variant="thick", limit=24)
    config = _config(tmp_path, data=data, select_with=4, positive=DrawingsConfig(pen=path))
    with join_world("cpu") as world:
        choose(config, open_split(data, "train"), world, fit)
    assert json.loads(path.read_text()) == {"radius": {"3": 5}}


@pytest.mark.slow
def test_a_choice_of_a_run_that_was_given_up_is_not_found_by_the_next_one_in_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trials, "_score", lambda *_: 1.0)
    data = DataConfig(dataset="mnist", limit=24)
    config = _config(tmp_path, data=data, select_with=4, steps=2)
    with join_world("cpu") as world:
        choose(config, open_split(data, "train"), world, fit)
    assert (tmp_path / "selection.json").exists()
    (tmp_path / ".run").touch()  # as a run leaves it
    (tmp_path / "trial_of_mine").mkdir()
    other = replace(config, select_with=0)
    fit(other)
    assert (tmp_path / "trial_of_mine").exists()  # what is no trial of the run is left alone
    assert fit(replace(other, resume=True)).steps == 2


@pytest.mark.slow
def test_a_run_goes_on_with_the_pen_that_it_began_with_alone(tmp_path: Path) -> None:
    path = tmp_path / "pen.json"
    path.write_text('{"radius": {"3": 1}}')
    data = DataConfig(dataset="mnist", limit=24)
    config = _config(tmp_path / "run", data=data, positive=DrawingsConfig(pen=path), steps=2)
    fit(config)
    path.write_text('{"radius": {"3": 2}}')
    with pytest.raises(ValueError, match="resume: expected the pen of the run"):
        fit(replace(config, resume=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": replace(DATA, dense_split="val"), "select_with": 10},
            "select_with: expected 0 or as many as",
        ),
        (
            {"data": replace(DATA, dense_split="val"), "positive": DrawingsConfig(pen="auto")},
            "positive.pen: expected None",
        ),
        ({"mask_weight": 0.0}, "mask_weight: expected a number above 0 with supervision then-masks"),
    ],
)
def test_masks_that_would_be_read_for_nothing_are_refused(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        check_config(_config(tmp_path, **changes))


def test_a_pixel_with_two_negative_drawings_is_one_pixel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else overlapping layers would hide that hardly anything is covered."""
    positive = torch.full((4, 4), 2, dtype=torch.uint8)
    negative = torch.full((2, 4, 4), IGNORE, dtype=torch.uint8)
    negative[0, 0, :2], negative[1, 0, :3] = 1, 3
    sample = SimpleNamespace(positive=positive, negative=negative)
    monkeypatch.setattr(advice, "SegmentationData", lambda *_, **__: [sample])
    counts, drawn, both = advice._counts(_config(tmp_path), open_split(DATA, "train"))
    assert (drawn[2], both[2], counts[2, 1], counts[2, 3]) == (16, 3, 2, 3)
    assert counts.sum() == 5


def test_candidates_keep_what_was_asked_for() -> None:
    config = FitConfig(
        select_with=4,
        positive=DrawingsConfig(cm="grid", stride=4, weight=0.5, pen=2.0, band=1.0, doubt=3.0),
        negative=DrawingsConfig(weight=2),
    )
    found = candidates(config, ("positive", "negative"), pen=Path("pen.json"))
    assert set(found) == {"all trusted", "matrix on positive", "matrix on negative", "fine-tuning on the masks"}
    assert all((row.positive.pen, row.positive.band, row.positive.doubt) == (2.0, 1.0, 3.0) for row in found.values())
    assert all((row.positive.weight, row.negative.weight) == (0.5, 2) for row in found.values())
    assert found["matrix on negative"].negative.stride == 4
    assert "matrix on negative" not in candidates(config, ("positive",))
    mixed = replace(config, data=DataConfig(supervision="mixed", dense_images=3))
    assert "fine-tuning on the masks" not in candidates(mixed, ("positive",))  # it has masks to learn from already


# ---- what fit says beforehand ---------------------------------------------------------------------------------------


def _risks(variant: str, **changes: Any) -> str:
    data = DataConfig(dataset="mnist", variant=variant, limit=40)
    matrix = DrawingsConfig(cm="global", diagonal=0.6, missing=0.3)
    config = FitConfig(data=data, **{"positive": matrix, **changes})
    return "\n".join(describe_risks(config, open_split(data, "train")))


def test_fit_warns_where_the_map_says_so() -> None:
    assert _risks("majority") == ""
    assert "has a negative drawing on it; below about 20 %" in _risks("sparse")
    assert "never contradict each other" in _risks("thick")
    assert "no negative drawing says 'not' '3' on '0'" in _risks("alike")
    weak = DrawingsConfig(cm="global", diagonal=0.2)
    assert _risks("majority", positive=DrawingsConfig()) == ""
    assert "starts with 0.2 on its diagonal and 0.2 beside it" in _risks("majority", positive=weak)
    both = _risks("majority", negative=DrawingsConfig(cm="global"))
    assert "all drawings that there are (positive, negative) have a confusion matrix" in both


def test_fit_says_where_negative_drawings_were_made_as_positive_ones(tmp_path: Path) -> None:
    root = data_trees.write_folder_tree(tmp_path / "mine")
    shutil.rmtree(root / "train" / "negatives")
    shutil.copytree(root / "train" / "positives", root / "train" / "negatives")
    config = FitConfig(data=DataConfig(root=root), positive=DrawingsConfig())
    said = "negative drawings mostly say 'not' what the positive ones on the same pixels say"
    assert said in "\n".join(describe_risks(config, open_split(config.data, "train")))
    for number, path in enumerate(sorted((root / "train" / "negatives").rglob("*.png"))):
        if number % 2:  # where there are fewer, somebody may have ruled out what is drawn wrongly
            path.unlink()
    assert said not in "\n".join(describe_risks(config, open_split(config.data, "train")))


def test_fit_says_that_masks_of_one_s_own_are_not_learned_from(tmp_path: Path) -> None:
    root = data_trees.write_folder_tree(tmp_path / "mine")
    config = FitConfig(data=DataConfig(root=root), positive=DrawingsConfig())
    source = open_split(config.data, "train")
    note = f"{len(source)} training images have a dense mask, and none is learned from; --supervision mixed"
    assert sum(note in line for line in describe_risks(config, source)) == 1
    data = replace(config.data, supervision="mixed", dense_images=len(source))
    assert not any(note in line for line in describe_risks(replace(config, data=data), source))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("left", "changes", "expected"),
    [
        (("positives", "negatives"), {}, ("global", "none")),
        (("positives",), {}, ("none", "none")),
        (("positives",), {"data": {"supervision": "mixed", "dense_images": 2}}, ("global", "none")),
        (("positives", "negatives"), {"negative": DrawingsConfig(cm="global")}, ("none", "global")),
        (("negatives",), {"positive": DrawingsConfig(), "negative": DrawingsConfig(cm="auto")}, ("none", "none")),
        (("positives", "negatives"), {"negative": DrawingsConfig(cm="auto")}, ("global", "none")),
        (("positives", "negatives"), {"negative": DrawingsConfig(weight=0.0)}, ("none", "none")),
    ],
)
def test_a_matrix_is_chosen_where_something_holds_it(
    tmp_path: Path,
    left: tuple[str, ...],
    changes: dict[str, Any],
    expected: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Positive drawings alone under a matrix, which was the default, train classes that may change places."""
    root = data_trees.write_folder_tree(tmp_path / "mine")
    for kind in {"positives", "negatives"} - {*left}:
        shutil.rmtree(root / "train" / kind)
    given = recipe("folder")
    changes = dict(changes)
    data = replace(given.data, root=root, workers=0, crop=(16, 24), **changes.pop("data", {}))
    config = replace(given, data=data, model=ModelConfig(widths=(4, 8)), steps=1, batch_size=2, device="cpu")
    config = replace(config, out=tmp_path / "run", **changes)
    fit(config)
    chosen = load_toml(tmp_path / "run" / "config.toml")
    assert (chosen.positive.cm, chosen.negative.cm) == expected
    assert "as auto chooses" in capsys.readouterr().err
    fit(replace(config, resume=True))


def test_fit_says_that_outlines_are_off_where_it_may_read_masks() -> None:
    data = DataConfig(dataset="mnist", variant="thick", limit=40, supervision="mixed", dense_images=6)
    config = FitConfig(data=data, positive=DrawingsConfig())
    source = open_split(data, "train")
    (note,) = describe_risks(config, source)
    off = re.findall(r"(\d) \+1 \(spread 0\.\d, 0 % missed, (\d+) % added\)", note)
    assert [name for name, _ in off] == ["0", "3", "4", "7"]
    assert all(int(added) > 30 for _, added in off)
    assert "--positive.pen auto moves them back, `coarse-train pen` shows them" in note
    assert describe_risks(replace(config, positive=DrawingsConfig(pen="auto")), source) == []
    right = replace(data, variant="majority")
    assert describe_risks(replace(config, data=right), open_split(right, "train")) == []


def test_fit_warns_of_nothing_where_all_is_trusted() -> None:
    for variant in ("sparse", "thick", "alike"):
        assert _risks(variant, positive=DrawingsConfig()) == ""


def test_drawings_without_negatives_are_no_reason_to_look_for_where_they_meet(tmp_path: Path) -> None:
    root = data_trees.write_chasedb1_tree(tmp_path / "chase")
    data = DataConfig(dataset="chasedb1", root=root)
    notes = describe_risks(FitConfig(data=data), open_split(data, "train"))
    assert len(notes) == 1
    assert "all drawings that there are (positive)" in notes[0]
