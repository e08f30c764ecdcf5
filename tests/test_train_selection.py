"""What a few dense masks decide: the side that is trusted, and the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from coarse_train import run as run_folder
from coarse_train import selection, storage, trials
from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, OptimConfig, load_toml
from coarse_train.data import open_split
from coarse_train.distributed import World, join_world
from coarse_train.engine import fit
from coarse_train.metrics import ConfusionMeter
from coarse_train.storage import write_whole
from coarse_train.trials import Round, Selection, Splits, read_selection
from tests import data_trees
from tests.runs import _assert_same_bits, _config, _rows, _state


def test_a_few_masks_choose_the_trusted_side_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    result = fit(config)
    assert result.checkpoint == tmp_path / "best.pt"
    first, last = json.loads((tmp_path / "selection.json").read_text())["rounds"]
    chosen = last["mean_iou"]
    assert (first["steps"], last["steps"]) == (2, config.steps)
    assert set(first["mean_iou"]) >= {"all trusted", "matrix on positive", "matrix on negative"}
    best = sorted(first["mean_iou"], key=lambda name: -first["mean_iou"][name])[:2]
    assert set(chosen) == {*best, "fine-tuning on the masks"}
    printed = capsys.readouterr().err
    assert "4 dense masks of the validation split choose what is learned from and how, and the checkpoint" in printed
    assert all(f"  {name}" in printed for name in first["mean_iou"])
    assert f"taken: {max(chosen, key=lambda name: chosen[name])}" in printed
    scores = [row["mean_iou"] for row in _rows(tmp_path) if "mean_iou" in row]
    assert result.score == max(scores)
    capsys.readouterr()
    assert run_evaluate(EvaluateConfig(result.checkpoint, limit=5))["chosen_with"] == 4
    assert "4 masks of this split chose this checkpoint" in capsys.readouterr().out
    assert run_evaluate(EvaluateConfig(result.checkpoint, split="test", limit=5))["chosen_with"] == 0
    assert run_evaluate(EvaluateConfig(tmp_path / "last.pt", limit=5))["chosen_with"] == 4
    assert "4 masks of this split chose what this run learned from" in capsys.readouterr().out
    (trial, *_) = tmp_path.glob("trial_[am]*")
    assert (
        run_evaluate(EvaluateConfig(trial / "last.pt", limit=5))["chosen_with"] == 0
    )  # the last step is chosen by nobody


def _prefer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that choose this candidate, whatever it learns."""
    real = trials._score

    def score(row: FitConfig, splits: Splits, until: int, folder: Path, world: World, fit: Any) -> float:
        return real(row, splits, until, folder, world, fit) + 100 * (folder.name == f"trial_{name.replace(' ', '_')}")

    monkeypatch.setattr(trials, "_score", score)


@pytest.mark.slow
@pytest.mark.parametrize("given", ["positive", "negative"])
def test_the_side_that_masks_chose_stays_over_a_resume(
    tmp_path: Path, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The config of the run folder already has the chosen side: taking it up again must not swap it back."""
    _prefer("matrix on negative" if given == "positive" else "matrix on positive", monkeypatch)
    matrix = DrawingsConfig(cm="global", diagonal=0.6, missing=0.3 if given == "positive" else None)
    sides = {given: matrix, "negative" if given == "positive" else "positive": DrawingsConfig()}
    config = _config(tmp_path, select_with=4, select_steps=2, **sides)
    fit(config)
    chosen = load_toml(tmp_path / "config.toml")
    assert getattr(chosen, given).cm == "none"
    assert (chosen.positive.cm, chosen.negative.cm).count("global") == 1
    assert chosen.negative.missing is None  # what drawings leave out is no start for those that say what is not there
    before = _state(tmp_path)
    for again in (config, chosen):
        fit(replace(again, resume=True))
        _assert_same_bits(_state(tmp_path), before)
    with pytest.raises(ValueError, match=r"resume: expected optim\.lr as in the run, 0\.01, got 1\.0"):
        fit(replace(config, resume=True, optim=OptimConfig(lr=1.0)))
    # a longer one, too, goes on by the config of its folder
    fit(replace(config, resume=True, resume_changed=True, steps=config.steps + 1))
    longer = load_toml(tmp_path / "config.toml")
    assert longer.steps == config.steps + 1
    fit(replace(longer, resume=True))


@pytest.mark.slow
def test_a_choice_without_a_checkpoint_is_not_taken_up_with_other_settings(tmp_path: Path) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    fit(config)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"resume: expected optim\.lr as in the run, 0\.01, got 0\.5"):
        fit(replace(config, resume=True, optim=OptimConfig(lr=0.5)))
    fit(replace(config, resume=True))


@pytest.mark.slow
def test_trials_of_a_run_that_was_given_up_choose_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    fit(config)
    before = {path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    (tmp_path / "last.pt").unlink()
    (tmp_path / "best.pt").unlink()
    fit(replace(config, seed=5))
    after = {path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    assert len(before) == len(after) == 8  # four candidates, one of them in four folds besides
    assert not before & after


@pytest.mark.slow
def test_the_run_that_masks_chose_is_the_candidate_s_own_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not trained twice, and what was scored is what is delivered."""
    _prefer("matrix on negative", monkeypatch)
    config = _config(tmp_path / "run", select_with=4, select_steps=3)
    result = fit(config)
    taken = load_toml(tmp_path / "run" / "config.toml")
    assert taken.select_steps == 3
    alone = fit(replace(taken, out=tmp_path / "alone", select_steps=0))
    assert (result.steps, result.score, result.loss) == (6, alone.score, alone.loss)
    for name in ("last.pt", "best.pt"):
        one, other = (run_folder.load(tmp_path / out / name) for out in ("run", "alone"))
        one["config"]["out"] = other["config"]["out"]
        one["config"]["select_steps"], one["config"]["resume"] = 0, False
        _assert_same_bits(one, other)
    assert _rows(tmp_path / "run") == _rows(tmp_path / "alone")
    chosen = read_selection(tmp_path / "run", 4)
    assert chosen is not None
    assert chosen.chosen == "matrix on negative"
    left = {path.name for path in (tmp_path / "run").glob("trial_*")}
    assert left == {"trial_all_trusted", "trial_matrix_on_positive", "trial_fine-tuning_on_the_masks"}
    # what learns from masks in the end is not judged before it has
    first, last = chosen.rounds
    assert set(first.scores) == {"all trusted", "matrix on positive", "matrix on negative"}
    assert set(last.scores) == {
        "matrix on negative",
        _best(first, but="matrix on negative"),
        "fine-tuning on the masks",
    }
    (ended,) = set(first.scores) - set(last.scores)
    assert run_folder.load(tmp_path / "run" / f"trial_{ended.replace(' ', '_')}" / "last.pt")["step"] == 3


@pytest.mark.slow
def test_fine_tuning_that_masks_chose_learns_from_all_of_them_as_it_would_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its drawings were learned in the trial, once for all folds, and its masks are learned after it."""
    _prefer("fine-tuning on the masks", monkeypatch)
    result = fit(_config(tmp_path / "run", select_with=4, select_steps=3, evaluate_every=4))  # 4: drawings end
    taken = load_toml(tmp_path / "run" / "config.toml")
    assert (taken.data.supervision, taken.data.dense_split, taken.data.dense_images) == ("then-masks", "val", 4)
    alone = fit(replace(taken, out=tmp_path / "alone", select_with=0, select_steps=None))
    assert (result.checkpoint, result.steps, result.loss) == (tmp_path / "run" / "last.pt", 6, alone.loss)
    one, other = (run_folder.load(tmp_path / out / "last.pt") for out in ("run", "alone"))
    _assert_same_bits(one["model"], other["model"])
    assert one["data"] == other["data"]
    assert _rows(tmp_path / "run") == _rows(tmp_path / "alone")
    assert {path.name for path in (tmp_path / "run").glob("trial_*")} == {
        "trial_all_trusted",
        "trial_matrix_on_positive",
        "trial_matrix_on_negative",
    }


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"steps": 12}, {"optim": OptimConfig(lr=1e-2, finetune=0.5)}])
@pytest.mark.parametrize("moment", [("fold_2_of_4/last.pt", 2), ("fold_1_of_4/last.pt", 1)])
def test_folds_of_other_settings_are_no_folds_of_the_run(
    moment: tuple[str, int], changed: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ``resume_changed``: those that were done had learned from masks, then drawings, then masks."""
    _prefer("all trusted", monkeypatch)
    trial = tmp_path / "trial_fine-tuning_on_the_masks"
    _killed_after(trial / moment[0], moment[1], lambda: fit(_config(tmp_path, select_with=4, select_steps=3)))
    config = _config(tmp_path, select_with=4, select_steps=3, resume=True, resume_changed=True, **changed)
    fit(config)
    drawings = _kinds_of_steps(trial)
    assert set(drawings.values()) == {"drawings"}
    for number in (1, 2, 3, 4):
        seen = _kinds_of_steps(trial / f"fold_{number}_of_4")
        assert list(seen) == list(range(len(drawings) + 1, config.steps + 1))
        assert set(seen.values()) == {"masks"}


def _kinds_of_steps(folder: Path) -> dict[int, str]:
    return {row["step"]: "masks" if "mask_nll" in row else "drawings" for row in _rows(folder) if "loss" in row}


def _killed_after(path: Path, count: int, call: Callable[[], Any]) -> None:
    """When ``path`` has been written so often."""
    real, left = run_folder.save, [count]

    def save(to: Path, content: dict[str, Any]) -> None:
        real(to, content)
        left[0] -= to == path
        if not left[0]:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        for module in (run_folder, trials):
            patch.setattr(module, "save", save)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.slow
def test_fine_tuning_that_masks_chose_is_taken_up_by_the_config_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when config.toml had been written and last.pt had not, its drawings were learned once more, and its folds
    stayed."""
    _prefer("fine-tuning on the masks", monkeypatch)
    real = trials.save

    def save(path: Path, content: dict[str, Any]) -> None:
        if path == tmp_path / "last.pt":
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(trials, "save", save)
        with pytest.raises(KeyboardInterrupt):
            fit(_config(tmp_path, select_with=4, select_steps=3))
    assert (tmp_path / "config.toml").exists()
    assert not (tmp_path / "last.pt").exists()
    before = _rows(tmp_path)
    assert fit(replace(load_toml(tmp_path / "config.toml"), resume=True)).steps == 6
    assert _rows(tmp_path)[: len(before)] == before
    assert not (tmp_path / "trial_fine-tuning_on_the_masks").exists()


def test_a_trial_that_is_the_run_is_cleared_away_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last checkpoint that moved and the end of its folder."""
    real = shutil.rmtree

    def rmtree(path: Path, **how: Any) -> None:
        if path.parent == tmp_path:  # not a fold
            raise KeyboardInterrupt
        real(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(trials.shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            fit(_config(tmp_path, select_with=4, select_steps=3))
    assert (tmp_path / "last.pt").exists()
    selection = read_selection(tmp_path, 4)
    assert selection is not None
    trial = tmp_path / f"trial_{selection.chosen.replace(' ', '_')}"
    assert trial.exists()
    fit(_config(tmp_path, select_with=4, select_steps=3, resume=True))
    assert not trial.exists()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"optim": OptimConfig(finetune=0.0)}, "finetune: expected a number between 0 and 1, got 0.0"),
        ({"mask_weight": 0.0}, "mask_weight: expected a number above 0 with supervision then-masks, got 0"),
    ],
)
def test_fine_tuning_that_cannot_run_is_left_out_before_the_others_are_trained(
    changes: dict[str, Any], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are no error in a run that learns from drawings, and were one when all other candidates had been trained."""
    monkeypatch.setattr(trials, "_score", lambda *_: 50.0)
    config = _config(tmp_path, select_with=4, **changes)
    with join_world("cpu") as world:
        _, found = selection.choose(config, open_split(config.data, "train"), world, fit)
    assert found is not None
    assert "fine-tuning on the masks" not in found.last()
    assert f"fine-tuning on the masks: {reason}" in found.left_out


@pytest.mark.parametrize(("labelled", "steps", "reason"), [(1, 6, "one alone has labels"), (2, 1, "a step has no two")])
def test_fine_tuning_that_cannot_be_scored_is_no_candidate(
    labelled: int, steps: int, reason: str, tmp_path: Path
) -> None:
    row = selection.candidates(_config(tmp_path, select_with=4), ("positive",))["fine-tuning on the masks"]
    assert selection._not_to_tune(row, 2) is None
    said = selection._not_to_tune(replace(row, steps=steps), labelled)
    assert said is not None
    assert reason in said


def test_a_fold_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is made anew where its masks are others."""
    config = _config(tmp_path, select_with=4)
    train = open_split(config.data, "train")
    masks = selection.open_splits(config, train).validation
    assert masks is not None
    row = selection.candidates(config, ("positive", "negative"))["fine-tuning on the masks"]
    branched: list[str] = []
    real = trials._branch

    def branch(checkpoint: Path, fold: FitConfig, *others: Any) -> None:
        branched.append(str(fold.out.name))
        real(checkpoint, fold, *others)

    monkeypatch.setattr(trials, "_branch", branch)

    def scored() -> float:
        with join_world("cpu") as world:
            return trials._score(row, Splits(train, masks), config.steps, tmp_path / "trial", world, fit)

    fold = tmp_path / "trial" / "fold_2_of_4"
    _killed_after(fold / "last.pt", 2, scored)
    assert branched == ["fold_1_of_4", "fold_2_of_4"]
    before = scored()
    assert branched == [f"fold_{number}_of_4" for number in (1, 2, 3, 4)]
    assert scored() == before
    monkeypatch.setattr(trials, "labelled", lambda _: [1, 0, 2, 3])  # the first two change places
    scored()
    assert branched[4:] == ["fold_1_of_4", "fold_2_of_4"]


@pytest.mark.parametrize(("labelled", "folds"), [(7, 5), (4, 4), (2, 2)])
def test_fine_tuning_is_never_scored_by_a_mask_that_it_learned_from(
    tmp_path: Path, labelled: int, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every mask with labels is scored once; seven masks, and the pixels of all counted together."""
    config = _config(tmp_path, select_with=7)
    train = open_split(config.data, "train")
    masks = selection.open_splits(config, train).validation
    assert masks is not None
    monkeypatch.setattr(trials, "labelled", lambda given: list(range(len(given)))[:labelled])
    learned, scored, pixels, networks = [], [], [], []
    real_fit, real_score = fit, trials.score

    def seen(fold: FitConfig, splits: Splits, *, until: int) -> Any:
        assert splits.validation is None
        assert splits.masks is not None
        assert fold.data.dense_images == len(splits.masks)
        learned.append([splits.masks.name(index) for index in range(len(splits.masks))])
        return real_fit(fold, splits, until=until)

    def score(*arguments: Any, **named: Any) -> Any:
        found = real_score(*arguments, **named)
        scored.append([arguments[1].name(index) for index in range(len(arguments[1]))])
        pixels.append(found.meter.counts)
        networks.append({name: value.clone() for name, value in arguments[0].state_dict().items()})
        return found

    monkeypatch.setattr(trials, "score", score)
    row = selection.candidates(config, ("positive", "negative"))["fine-tuning on the masks"]
    with join_world("cpu") as world:
        found = trials._score(row, Splits(train, masks), config.steps, tmp_path / "trial", world, seen)
    names = [masks.name(index) for index in range(len(masks))]
    assert learned[0] == names  # of the run itself, which ends before it has seen one
    assert run_folder.load(tmp_path / "trial" / "last.pt")["step"] == 4
    assert len(learned) - 1 == len(scored) == folds
    assert sorted(name for fold in scored for name in fold) == sorted(names[:labelled])
    for others, own in zip(learned[1:], scored, strict=True):
        assert sorted(others + own) == sorted(names)
    for number, network in enumerate(networks, 1):  # what the fold has learned to its end
        content = run_folder.load(tmp_path / "trial" / f"fold_{number}_of_{folds}" / "last.pt")
        assert content["step"] == config.steps
        _assert_same_bits(network, {name: content["model"][f"segmentation.{name}"] for name in network})
    rows = [_rows(path.parent) for path in sorted(tmp_path.glob("trial/fold_*/metrics.jsonl"))]
    assert [[row["step"] for row in fold if "loss" in row] for fold in rows] == [
        [5, 6]
    ] * folds  # after what they share
    meter = ConfusionMeter(len(train.classes))
    meter.counts = sum(pixels, meter.counts)
    assert found == meter.mean_iou()


def _best(one: Round, but: str) -> str:
    return max(one.scores.keys() - {but}, key=lambda name: one.scores[name])


@pytest.fixture(scope="module")
def chosen_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chosen") / "run"
    fit(_config(out, select_with=4, select_steps=3))
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [
        ("trial_matrix_on_positive/last.pt", 1),  # at step 2 of 3
        ("trial_fine-tuning_on_the_masks/last.pt", 1),  # before the end of the drawings
        ("trial_fine-tuning_on_the_masks/fold_2_of_4/last.pt", 1),  # what was learned from drawings
        ("trial_fine-tuning_on_the_masks/fold_2_of_4/last.pt", 2),
        ("selection.json", 1),  # after the first round
        ("selection.json", 2),  # after the second
        ("selection.json", 3),  # before the run is chosen
        ("config.toml", 1),  # of the run, when all is moved but checkpoints
        ("best.pt", 1),
        ("last.pt", 1),
    ],
)
def test_a_choice_that_was_killed_anywhere_goes_on_to_the_same_run(
    moment: tuple[str, int], tmp_path: Path, chosen_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, select_with=4, select_steps=3)
    written: list[str] = []

    def write(path: Path, write_to: Callable[[BinaryIO], None]) -> None:
        written.append(path.relative_to(tmp_path).as_posix())
        if (written[-1], written.count(written[-1])) == moment:
            raise KeyboardInterrupt
        write_whole(path, write_to)

    with monkeypatch.context() as patch:
        for module in (run_folder, storage):
            patch.setattr(module, "write_whole", write)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert fit(replace(config, resume=True)).steps == 6
    _assert_same_bits(_state(tmp_path), _state(chosen_run))
    _assert_same_bits(_state(tmp_path, "best.pt"), _state(chosen_run, "best.pt"))
    assert _rows(tmp_path) == _rows(chosen_run)
    assert read_selection(tmp_path, 4) == read_selection(chosen_run, 4)
    assert {path.name for path in tmp_path.glob("trial_*")} == {path.name for path in chosen_run.glob("trial_*")}


@pytest.mark.slow
def test_what_is_no_candidate_is_said_with_its_reason(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_trees.write_folder_tree(tmp_path / "mine")
    shutil.rmtree(root / "val" / "positives")
    config = _config(tmp_path / "run", data=DataConfig(root=root, crop=(16, 24)), select_with=2, steps=2)
    fit(config)
    said = "no candidate is outlines moved back: none of the 2 images whose masks choose has a positive drawing"
    assert said in capsys.readouterr().err
    fit(replace(config, resume=True))
    assert said in capsys.readouterr().err
    fit(_config(tmp_path / "one", data=DataConfig(root=root, crop=(16, 24)), select_with=1, steps=2))
    selection = read_selection(tmp_path / "one", 1)
    assert selection is not None
    assert not any("fine-tuning" in name for name in selection.last())


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{}, {"resume_changed": True}, {"resume_changed": True, "steps": 8}])
def test_a_trial_that_was_killed_between_its_checkpoints_goes_on(tmp_path: Path, changed: dict[str, Any]) -> None:
    """The best comes before the last, which a folder without one had to have; and other trials have not begun."""
    config = _config(tmp_path, select_with=4, select_steps=3, save_every=100, evaluate_every=2)
    real = run_folder.save

    def save(path: Path, content: dict[str, Any]) -> None:
        if path == tmp_path / "trial_matrix_on_positive" / "last.pt":
            raise KeyboardInterrupt
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save", save)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert not (tmp_path / "trial_matrix_on_positive" / "last.pt").exists()
    assert (tmp_path / "trial_matrix_on_positive" / "best.pt").exists()
    steps = changed.get("steps", 6)
    assert fit(replace(config, resume=True, **changed)).steps == steps
    assert load_toml(tmp_path / "config.toml").steps == steps
    fit(replace(load_toml(tmp_path / "config.toml"), resume=True))


def test_a_run_that_is_chosen_after_it_was_moved_is_where_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    config = _config(tmp_path / "run", data=DataConfig(root=root, crop=(16, 24)), select_with=2, steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(trials, "adopt", _interrupted)
        patch.setattr(selection, "adopt", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    root.rename(tmp_path / "moved")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    moved = replace(config, data=replace(config.data, root=tmp_path / "moved"), out=tmp_path / "elsewhere", resume=True)
    result = fit(moved)
    assert load_toml(tmp_path / "elsewhere" / "config.toml").data.root == tmp_path / "moved"
    assert run_evaluate(EvaluateConfig(result.checkpoint, device="cpu"))["images"] > 0


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_choice_whose_candidates_have_changed_says_so(tmp_path: Path) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    config = _config(
        tmp_path / "run", data=DataConfig(root=root, crop=(16, 24)), select_with=2, select_steps=1, steps=2
    )
    fit(config)
    path = tmp_path / "run" / "selection.json"
    content = json.loads(path.read_text())
    first = {**content["rounds"][0]["mean_iou"], "nobody": 99.0}
    path.write_text(json.dumps({"rounds": [{"steps": 1, "mean_iou": first}], "given": content["given"]}))
    for name in ("last.pt", "best.pt"):
        (tmp_path / "run" / name).unlink()
    with pytest.raises(
        ValueError, match=r"resume: expected the candidates that .*, got none called 'nobody', since drawings"
    ):
        fit(replace(config, resume=True))


def test_the_settings_of_a_matrix_that_auto_leaves_out_are_those_of_its_candidate(tmp_path: Path) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    shutil.rmtree(root / "train" / "negatives")
    auto = DrawingsConfig(cm="auto", diagonal=0.6, missing=0.3)
    config = _config(tmp_path / "run", data=DataConfig(root=root, crop=(16, 24)), positive=auto, select_with=2, steps=1)
    fit(config)
    folders = [path for path in (tmp_path / "run").rglob("config.toml")]
    matrices = [one.positive for one in map(load_toml, folders) if one.positive.cm == "global"]
    assert matrices
    assert all((one.diagonal, one.missing) == (0.6, 0.3) for one in matrices)


@pytest.mark.slow
def test_trials_of_an_earlier_version_are_no_run(tmp_path: Path) -> None:
    """They were shorter than it, and became it."""
    config = _config(tmp_path, select_with=4, select_steps=3)
    fit(config)
    content = json.loads((tmp_path / "selection.json").read_text())
    first = content.pop("rounds")[0]
    (tmp_path / "selection.json").write_text(json.dumps({**content, **first}))
    taken = tmp_path / f"trial_{content['chosen'].replace(' ', '_')}"
    fit(replace(load_toml(tmp_path / "config.toml"), select_steps=0, out=taken, steps=2))
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink()
    assert fit(replace(config, resume=True)).steps == 6
    assert (taken / "last.pt").exists()


def test_masks_can_choose_no_matrix_where_there_is_one_kind_of_drawings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CHASE_DB1 has one observer's drawings, on which a matrix does harm."""
    root = data_trees.write_chasedb1_tree(tmp_path / "chase")
    data = DataConfig(dataset="chasedb1", root=root)
    fit(_config(tmp_path / "run", data=data, select_with=2, steps=2))
    scores = json.loads((tmp_path / "run" / "selection.json").read_text())["rounds"][0]["mean_iou"]
    assert {"all trusted", "matrix on positive", "fine-tuning on the masks"} <= set(scores)
    assert "matrix on negative" not in scores
    fit(_config(tmp_path / "alone", data=data, select_with=2, select_steps=0, steps=1))
    printed = capsys.readouterr().err
    assert "2 dense masks of the validation split choose the checkpoint, and nothing else" in printed
    assert "note: all drawings that there are (positive) have a confusion matrix and none are trusted" in printed
    assert not (tmp_path / "alone" / "selection.json").exists()


def test_drawings_that_were_moved_back_are_not_given_up_by_early_scores_of_others() -> None:
    """Thick ones: 16 points behind after a fifth of the steps, and 4.9 ahead of what was chosen without them."""
    plain = FitConfig()
    moved = replace(plain, positive=DrawingsConfig(pen=Path("pen.json")))
    found = {"trusted": plain, "positive": plain, "negative": plain, "pen": moved, "pen, positive": moved}
    scores = {"trusted": 50.6, "positive": 50.8, "negative": 58.1, "pen": 41.8, "pen, positive": 42.0}
    assert trials._best(scores, found, 2) == ["negative", "pen, positive", "pen"]  # fine-tuning is the third
    assert trials._best(scores, found, 3) == ["negative", "positive", "pen, positive", "pen"]
    assert trials._best(scores, dict.fromkeys(found, plain), 2) == ["negative", "positive"]
    assert trials._best(scores, dict.fromkeys(found, moved), 2) == [
        "negative",
        "positive",
    ]  # by the user, whatever else


def test_a_choice_that_was_stopped_in_its_second_round_keeps_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With moved outlines and fine-tuning among the candidates: who goes on is decided by scores that are on record."""
    config = _config(tmp_path, select_with=4)
    moved = replace(config, positive=DrawingsConfig(pen=Path("pen.json")))
    late = replace(config, data=replace(config.data, dense_split="val", dense_images=4))
    found = {"trusted": config, "positive": config, "pen": moved, "pen, positive": moved, "fine-tuning": late}
    scores = {"trusted": 50.0, "positive": 58.0, "pen": 41.0, "pen, positive": 42.0, "fine-tuning": 70.0}
    asked: list[tuple[str, int]] = []
    stops = {("pen", 6)}

    def score(row: FitConfig, splits: Splits, until: int, folder: Path, world: World, fit: Any) -> float:
        name = next(name for name in found if folder == trials._trial(config, name))
        if (name, until) in stops:
            raise KeyboardInterrupt
        asked.append((name, until))
        return scores[name] + until

    monkeypatch.setattr(trials, "_score", score)
    splits = Splits(open_split(config.data, "train"), None)
    with join_world("cpu") as world, pytest.raises(KeyboardInterrupt):
        trials.run_rounds(config, found, splits, world, fit)
    assert asked == [*((name, 1) for name in list(found)[:4]), ("positive", 6), ("pen, positive", 6)]
    asked.clear()
    stops.clear()
    scores.update({"trusted": 99.0, "pen": 60.0})  # which nobody asks for again in the first round
    with join_world("cpu") as world:
        first, last = trials.run_rounds(replace(config, resume=True), found, splits, world, fit)
    assert asked == [(name, 6) for name in ("positive", "pen, positive", "pen", "fine-tuning")]
    assert first == Round(1, {"trusted": 51.0, "positive": 59.0, "pen": 42.0, "pen, positive": 43.0})
    assert last == Round(6, {"positive": 64.0, "pen, positive": 48.0, "pen": 66.0, "fine-tuning": 76.0})


def test_what_a_candidate_would_have_cost_is_not_told_where_the_chosen_one_was_not_scored() -> None:
    """Fine-tuning comes in for the last round: those that had ended looked cheaper than those that went on."""
    rounds = (Round(2, {"a": 30.0, "b": 36.0}), Round(10, {"b": 40.0, "fine-tuning on the masks": 55.0}))
    assert Selection(4, rounds, "fine-tuning on the masks").lost() == {
        "fine-tuning on the masks": 0.0,
        "b": 15.0,
        "a": None,
    }
    assert Selection(4, rounds, "b").lost() == {"fine-tuning on the masks": -15.0, "b": 0.0, "a": 6.0}


def test_masks_that_chose_nothing_but_the_checkpoint_did_not_choose_the_last_step(tmp_path: Path) -> None:
    data = DataConfig(dataset="mnist", limit=24, supervision="masks")
    fit(_config(tmp_path, data=data, select_with=4))
    assert run_evaluate(EvaluateConfig(tmp_path / "last.pt", limit=5))["chosen_with"] == 0
    assert run_evaluate(EvaluateConfig(tmp_path / "best.pt", limit=5))["chosen_with"] == 4
