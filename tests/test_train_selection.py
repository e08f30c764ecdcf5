"""What a few dense masks decide: the side that is trusted, and the checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.config import DataConfig, DrawingsConfig, OptimConfig, load_toml
from coarse_train.engine import fit
from tests import data_trees
from tests.runs import _assert_same_bits, _config, _rows, _state


def test_a_few_masks_choose_the_trusted_side_and_the_run_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    result = fit(config)
    assert result.checkpoint == tmp_path / "best.pt"
    chosen = json.loads((tmp_path / "selection.json").read_text())["mean_iou"]
    assert set(chosen) >= {"all trusted", "matrix on positive", "matrix on negative"}
    printed = capsys.readouterr().err
    assert "4 dense masks of the validation split choose what is learned from and how, on runs of 2 steps" in printed
    assert all(f"  {name}" in printed for name in chosen)
    assert f"taken: {max(chosen, key=lambda name: chosen[name])}" in printed
    scores = [row["mean_iou"] for row in _rows(tmp_path) if "mean_iou" in row]
    assert result.score == max(scores)
    capsys.readouterr()
    assert run_evaluate(EvaluateConfig(result.checkpoint, limit=5))["chosen_with"] == 4
    assert "4 masks of this split chose this checkpoint" in capsys.readouterr().out
    assert run_evaluate(EvaluateConfig(result.checkpoint, split="test", limit=5))["chosen_with"] == 0


@pytest.mark.parametrize("given", ["positive", "negative"])
def test_the_side_that_masks_chose_stays_over_a_resume(tmp_path: Path, given: str) -> None:
    """The config of the run folder already has the chosen side: taking it up again must not swap it back."""
    matrix = DrawingsConfig(cm="global", diagonal=0.6, missing=0.3 if given == "positive" else None)
    sides = {given: matrix, "negative" if given == "positive" else "positive": DrawingsConfig()}
    config = _config(tmp_path, select_with=4, select_steps=2, **sides)
    fit(config)
    # what drawings leave out is no start for those that say what is not there
    assert load_toml(tmp_path / "trial_matrix_on_negative" / "config.toml").negative.missing is None
    chosen = load_toml(tmp_path / "config.toml")
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


def test_a_choice_without_a_checkpoint_is_not_taken_up_with_other_settings(tmp_path: Path) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    fit(config)
    for name in ("last.pt", "best.pt"):
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=r"resume: expected optim\.lr as in the run, 0\.01, got 0\.5"):
        fit(replace(config, resume=True, optim=OptimConfig(lr=0.5)))
    fit(replace(config, resume=True))


def test_trials_of_a_run_that_was_given_up_choose_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    fit(config)
    first = (tmp_path / "trial_all_trusted" / "metrics.jsonl").read_text()
    (tmp_path / "last.pt").unlink()
    (tmp_path / "best.pt").unlink()
    fit(replace(config, seed=5))
    assert (tmp_path / "trial_all_trusted" / "metrics.jsonl").read_text() != first


def test_masks_can_choose_no_matrix_where_there_is_one_kind_of_drawings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """CHASE_DB1 has one observer's drawings, on which a matrix does harm."""
    root = data_trees.write_chasedb1_tree(tmp_path / "chase")
    data = DataConfig(dataset="chasedb1", root=root)
    fit(_config(tmp_path / "run", data=data, select_with=2, steps=2))
    scores = json.loads((tmp_path / "run" / "selection.json").read_text())["mean_iou"]
    assert {"all trusted", "matrix on positive", "fine-tuning on the masks"} <= set(scores)
    assert "matrix on negative" not in scores
    fit(_config(tmp_path / "alone", data=data, select_with=2, select_steps=0, steps=1))
    printed = capsys.readouterr().err
    assert "2 dense masks of the validation split choose the checkpoint, and nothing else" in printed
    assert "note: all drawings that there are (positive) have a confusion matrix and none are trusted" in printed
    assert not (tmp_path / "alone" / "selection.json").exists()
