"""A run that stopped, in whatever way, goes on with the same bits; or it says what has changed."""

from __future__ import annotations

import io
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coarse_train import run as run_folder
from coarse_train.config import DataConfig, DrawingsConfig, ModelConfig, OptimConfig, load_toml, to_toml
from coarse_train.engine import fit
from coarse_train.inference import load_model
from tests import data_trees
from tests.runs import ENVIRONMENT, _assert_same_bits, _config, _last_step, _losses, _rows, _state, stop_after


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = _config(tmp_path / "whole", steps=150, save_every=4, select_with=8, select_steps=0, evaluate_every=37)
    config = replace(config, optim=OptimConfig(lr=1e-2, ema=0.9), data=replace(config.data, workers=1))
    fit(config)
    killed = replace(config, out=tmp_path / "killed")
    (tmp_path / "killed.toml").write_text(to_toml(killed))
    command = [sys.executable, "-m", "coarse_train", "fit", str(tmp_path / "killed.toml"), "--resume"]
    kills = 0
    for until in (2, 25, 50, 75):
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while process.poll() is None and _last_step(tmp_path / "killed") < until:
            time.sleep(0.002)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.wait()
    assert kills >= 3
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    _assert_same_bits(_state(tmp_path / "killed"), _state(tmp_path / "whole"))
    _assert_same_bits(_state(tmp_path / "killed", "best.pt"), _state(tmp_path / "whole", "best.pt"))
    assert _rows(tmp_path / "killed") == _rows(tmp_path / "whole")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    fit(_config(tmp_path, steps=1))
    with pytest.raises(ValueError, match="out: expected a new folder or --resume"):
        fit(_config(tmp_path, steps=1))


def test_resume_names_what_has_changed(tmp_path: Path) -> None:
    fit(_config(tmp_path, steps=2))
    with pytest.raises(ValueError, match="resume: expected batch_size as in the run, 4, got 8"):
        fit(_config(tmp_path, steps=2, resume=True, batch_size=8))


class OneParameterTooMany(torch.nn.Module):
    """A user's network with a parameter that gets no gradient."""

    def __init__(self, channels_in: int, num_classes: int):
        super().__init__()
        self.used = torch.nn.Conv2d(channels_in, num_classes, 1)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.used(image)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    "changes",
    [
        {"optim": OptimConfig(optimizer="sgd", momentum=0.0, lr=1e-2)},
        {"model": ModelConfig(network="tests.test_train_resume:OneParameterTooMany")},
        pytest.param({"precision": "fp16"}, marks=pytest.mark.slow),
        {"optim": OptimConfig(lr=1e-2, clip=0.0)},
    ],
    ids=["plain-sgd", "unused-parameter", "fp16", "no-clipping"],
)
def test_every_kind_of_run_can_be_resumed_from_its_own_config(tmp_path: Path, changes: dict[str, Any]) -> None:
    fit(_config(tmp_path / "whole", **changes))
    config = _config(tmp_path / "parts", **changes)
    fit(config)
    last = run_folder.load(tmp_path / "parts" / "last.pt")
    stop_after(config, 4)
    written = load_toml(config.out / "config.toml")
    assert not written.resume
    fit(replace(written, resume=True))
    parts, whole = _state(tmp_path / "parts"), _state(tmp_path / "whole")
    state = parts["optimizer"][
        "state"
    ]  # a parameter without gradient comes back with an empty state that is never read
    parts["optimizer"]["state"] = {name: state[name] for name in whole["optimizer"]["state"]}
    _assert_same_bits(parts, whole)
    assert load_toml(config.out / "config.toml") == written
    assert last["step"] == 6


@pytest.mark.slow
def test_tensorboard_has_every_step_once_and_the_pictures(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", save_every=4, pictures=3)
    stop_after_folder = config.out
    stop_after_folder.mkdir()
    stop_after(config, 4)
    fit(replace(config, resume=True))
    events = EventAccumulator(str(config.out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(_losses(config.out))
    assert [event.step for event in events.Scalars("val/mean_iou")] == [3, 6]
    names = ["training", "confusion_positive", "confusion_validation"]
    names += [f"{end}_{number}" for end in ("worst", "best") for number in (1, 2, 3)]
    assert sorted(events.Tags()["images"]) == sorted(names)
    assert sorted(path.stem for path in (config.out / "pictures").iterdir()) == sorted(names)
    for name in names:
        shown = events.Images(name)
        assert [event.step for event in shown] == [3, 6]
        newest = Image.open(io.BytesIO(shown[-1].encoded_image_string))
        np.testing.assert_array_equal(newest, Image.open(config.out / "pictures" / f"{name}.png"))


@pytest.mark.slow
def test_a_run_that_began_where_none_may_begin_now_is_loaded_and_goes_on(tmp_path: Path) -> None:
    """A diagonal of 0.7 beside 0.3 that is missing leaves nothing to wrong names, and was advised once."""
    matrix = DrawingsConfig(cm="global", diagonal=0.6, missing=0.3)
    config = _config(tmp_path, positive=matrix)
    stop_after(config, 4)
    content = run_folder.load(tmp_path / "last.pt")
    content["config"]["positive"]["diagonal"] = 0.7
    run_folder.save(tmp_path / "last.pt", {key: value for key, value in content.items() if key != "format"})
    before = replace(config, positive=replace(matrix, diagonal=0.7))
    assert load_model(tmp_path / "last.pt").config.positive == before.positive
    assert fit(replace(before, resume=True)).steps == config.steps
    with pytest.raises(ValueError, match=r"positive\.missing: expected None, or a number above 0 and below"):
        fit(replace(before, out=tmp_path / "anew"))


def test_a_run_does_not_go_on_with_other_classes_or_images(tmp_path: Path) -> None:
    """Reordered classes would be trained on silently, with the wrong meaning."""
    root = data_trees.write_folder_tree(tmp_path / "data")
    config = _config(tmp_path / "run", data=DataConfig(root=root, crop=(16, 16)))
    config.out.mkdir()
    stop_after(config, 4)
    table = (root / "classes.toml").read_text()
    (root / "classes.toml").write_text(table.replace('"road"', '"car!"').replace('"car"', '"road"'))
    with pytest.raises(
        ValueError, match=r"resume: expected the classes of the run \['ground', 'road', 'car'\], got \["
    ):
        fit(replace(config, resume=True))
    (root / "classes.toml").write_text(
        table.replace("id = 7", "id = x").replace("id = 20", "id = 7").replace("id = x", "id = 20")
    )
    with pytest.raises(ValueError, match="resume: expected the label values of the run"):
        fit(replace(config, resume=True))
    (root / "classes.toml").write_text(table.replace("ignore = [9]", "ignore = {positives = [20]}"))
    with pytest.raises(ValueError, match="resume: expected the table of label values of the run, got others"):
        fit(replace(config, resume=True))
    (root / "classes.toml").write_text(table.replace("[60, 160, 60]", "[200, 40, 41]"))
    with pytest.raises(ValueError, match="resume: expected the table of label values of the run, got others"):
        fit(replace(config, resume=True))
    (root / "classes.toml").write_text(table.replace("ignore = [9]", "ignore = [9, 77]"))  # in no file
    fit(replace(config, resume=True))
    other = data_trees.write_folder_tree(tmp_path / "more", counts={"train": 5, "val": 2})
    with pytest.raises(ValueError, match="resume: expected the training images of the run, got others"):
        fit(replace(config, resume=True, data=replace(config.data, root=other)))


@pytest.mark.slow
def test_weights_of_a_backbone_are_not_needed_again(tmp_path: Path) -> None:
    data_trees.save_small_segformer(tmp_path / "weights", 7)
    config = _config(tmp_path / "run", model=ModelConfig(network="segformer", weights=tmp_path / "weights"), steps=2)
    fit(config)
    shutil.rmtree(tmp_path / "weights")
    loaded = load_model(tmp_path / "run" / "last.pt")
    _assert_same_bits(dict(loaded.model.state_dict()), _state(tmp_path / "run")["model"])
    fit(replace(config, resume=True))
