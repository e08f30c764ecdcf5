"""`fit` on what is wrong: settings, files, disks, numbers. An error says what came and what was expected."""

from __future__ import annotations

import math
import resource
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coarse_train import run as run_folder
from coarse_train.cli import main
from coarse_train.config import DataConfig, DrawingsConfig, ModelConfig, OptimConfig, load_toml
from coarse_train.engine import NonFiniteStep, fit
from coarse_train.inference import load_model
from coarse_train.learner import Learner
from tests import data_trees
from tests.runs import _config, _rows


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path: Path) -> None:
    config = _config(tmp_path, optim=OptimConfig(optimizer="sgd", lr=1e6, clip=0.0, warmup=0.0), save_every=1)
    with pytest.raises(
        NonFiniteStep,
        match=r"became (nan|inf) at step \d+; its batch is in .*nonfinite_step",
    ):
        fit(config)
    (path,) = tmp_path.glob("nonfinite_step*.pt")
    with pytest.raises(
        run_folder.CheckpointError,
        match=r"nonfinite.*: expected last.pt or best.pt of .* without config",
    ):
        load_model(path)
    saved = torch.load(path, weights_only=True)
    assert saved["batch"][0]["image"].shape == (4, 1, 48, 48)
    assert set(saved["model"]) == set(run_folder.load(tmp_path / "last.pt")["model"])
    assert run_folder.load(tmp_path / "last.pt")["step"] == saved["step"] - 1
    assert all(x.isfinite().all() for x in run_folder.load(tmp_path / "last.pt")["model"].values())


@pytest.mark.slow
@pytest.mark.parametrize("values", [(torch.inf, torch.nan), (-torch.inf, 0.0)])
def test_a_last_step_that_overflows_is_neither_scored_nor_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: tuple[float, float]
) -> None:
    """No loss comes after it that would show it: such a network was scored, as all background."""
    config = _config(tmp_path)
    real = Learner.step

    def step(self: Learner, number: int, *rest: Any) -> Any:
        taken = real(self, number, *rest)
        if number == config.steps:
            next(self.networks.model.parameters()).data.view(-1)[:2] = torch.tensor(values)
        return taken

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", step)
        with pytest.raises(
            NonFiniteStep,
            match=r"^parameters became inf or NaN in step 6, which is neither scored nor kept\. A lower",
        ):
            fit(config)
    assert run_folder.load(tmp_path / "last.pt")["step"] == 4
    assert [row["step"] for row in _rows(tmp_path) if "mean_iou" in row] == [3]
    assert not math.isnan(fit(replace(config, resume=True)).score)


def test_a_matrix_that_started_at_0_is_no_parameter_that_overflowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs that began with 1 - diagonal = missing, which is refused now, go on: a logit of -inf."""
    config = _config(tmp_path, steps=2)
    real = Learner.step

    def step(self: Learner, number: int, *rest: Any) -> Any:
        taken = real(self, number, *rest)
        dict(self.networks.model.named_parameters())["positive.field.free"].data[0, 7] = -torch.inf
        return taken

    monkeypatch.setattr(Learner, "step", step)
    assert fit(config).steps == 2


@pytest.mark.parametrize("until", [0, -1])
def test_a_run_until_no_step_is_refused(tmp_path: Path, until: int) -> None:
    with pytest.raises(ValueError, match=f"until: expected a step from 1 on, or None, got {until}"):
        fit(_config(tmp_path), until=until)


@pytest.mark.slow
def test_a_run_goes_as_far_as_it_is_told_and_on_from_there(tmp_path: Path) -> None:
    part = fit(_config(tmp_path / "parts"), until=4)
    assert part.steps == 4
    assert run_folder.load(part.checkpoint)["step"] == 4
    rest = fit(_config(tmp_path / "parts", resume=True), until=100)
    whole = fit(_config(tmp_path / "whole"))
    assert (rest.steps, rest.loss, rest.last_score) == (6, whole.loss, whole.last_score)
    again = fit(_config(tmp_path / "parts", resume=True))
    assert again.loss == whole.loss  # kept


def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    run_folder.save(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(run_folder.CheckpointError, match=r"last.pt: expected to write it, got .*File too large"):
            run_folder.save(path, {"step": 2, "weights": torch.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run_folder.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_folder_that_cannot_be_written_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*file/run"):
        fit(_config(tmp_path / "file" / "run"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not a checkpoint", lambda b: b""])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "last.pt"
    run_folder.save(path, {"step": 1})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        run_folder.CheckpointError, match=r"last.pt: expected a checkpoint, got a damaged or foreign file"
    ):
        run_folder.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps: expected a number >= 1, got 0"),
        (
            {"batch_size": 6, "accumulate": 4},
            r"batch_size: expected a multiple of accumulate x processes = 4 x 1, got 6",
        ),
        ({"optim": OptimConfig(ema=1.5)}, "ema: expected a number from 0 to 1, got 1.5"),
        (
            {"positive": DrawingsConfig(weight=0.0, cm="global")},
            "positive.cm: expected none where positive.weight is 0",
        ),
        (
            {"positive": DrawingsConfig(cm="global", diagonal=0.7, missing=0.4)},
            r"positive\.missing: expected None, or a number above 0 and below 1 - diagonal = 0.3 .*got 0.4",
        ),
        (
            {"positive": DrawingsConfig(cm="global", structure="tied", missing=0.1)},
            r"positive\.missing: expected None with structure 'tied', got 0.1",
        ),
        ({"seed": -1}, "seed: expected a number from 0 to 2147483647, got -1"),
        (
            {"negative": DrawingsConfig(weight=0.0), "transition": "learned"},
            "transition: expected none to be learned where",
        ),
        ({"positive": None}, "^positive: expected DrawingsConfig, got None"),
        ({"data": {"dataset": "mnist"}}, "^data: expected DataConfig, got {'dataset': 'mnist'}"),
        ({"select_steps": 3}, "select_steps: expected --select-with, which it belongs to, got 3 alone"),
        (
            {"data": DataConfig(dataset="mnist", supervision="mixed")},
            "dense_images: expected a number >= 1 with supervision",
        ),
        (
            {"data": DataConfig(dataset="mnist", dense_images=3)},
            "dense_images: expected 0 with supervision drawings, unless positive.pen is auto or image; .*mixed.*, got 3",
        ),
        (
            {"data": DataConfig(dataset="mnist", simulate="coarse")},
            "simulate: expected images that lack drawings, but",
        ),
        ({"model": ModelConfig(network="torch.nn:Identity", widths=(4,))}, "widths: expected none for network"),
        ({"optim": OptimConfig(lr=math.inf)}, "lr: expected a number from 0 to 1000000.0, got inf"),
        ({"positive": DrawingsConfig(weight=math.nan)}, "positive.weight: expected a number >= 0, got nan"),
        (
            {"mask_weight": 0.0, "data": DataConfig(dataset="mnist", supervision="masks")},
            "mask_weight: expected a number above 0",
        ),
        ({"backend": "quantum"}, "backend: expected one that can run here"),
        ({"data": DataConfig(dataset="imagenet")}, "dataset: expected one of .* got 'imagenet'"),
        (
            {"transition": Path("nowhere.npy")},
            r"transition: expected a .npy file with a \(5, 5\) matrix, got .*nowhere.npy",
        ),
        ({"optim": OptimConfig(lr=1e300)}, r"lr: expected a number from 0 to 1000000\.0, got 1e\+300"),
        ({"resume_changed": True}, "resume_changed: expected --resume, which it belongs to"),
        (
            {"positive": DrawingsConfig(pen=2.0), "data": DataConfig(dataset="mnist", supervision="masks")},
            r"positive\.pen: expected None with supervision masks, which reads no drawings, got 2\.0",
        ),
        ({"optim": OptimConfig(ema=1.0)}, "ema: expected a number below 1"),
        ({"threads": 2**31 - 1}, "threads: expected a number from 1 to 1024, got 2147483647"),
        ({"data": DataConfig(dataset="mnist", workers=10**6)}, "workers: expected a number from 0 to 1024"),
        ({"data": DataConfig(dataset="mnist", crop=(10**20, 2))}, "crop: expected height and width from 1 to 65535"),
        ({"data": DataConfig(dataset="mnist", scale=(1.0, math.inf))}, "scale: expected two numbers from 1/64 to 64"),
        ({"data": DataConfig(dataset="mnist", scale=(1e-9, 1e-9))}, "scale: expected two numbers from 1/64 to 64"),
        ({"positive": DrawingsConfig(cm="grid", stride=10**12)}, r"positive\.stride: expected a number from 1 to 1024"),
        ({"positive": DrawingsConfig(pen=1e300)}, r"positive\.pen: expected a number of pixels"),
        ({"class_weight": (1e39, 1.0, 1.0, 1.0, 1.0)}, "class_weight: expected numbers from 1e-30 to 1e"),
        ({"class_weight": (1e-46,) * 5}, "class_weight: expected numbers from 1e-30 to 1e"),
        (
            {"mask_weight": 0.0, "data": DataConfig(dataset="mnist", supervision="mixed", dense_images=2)},
            "mask_weight: expected a number above 0 with supervision mixed",
        ),
        ({"select_with": 10**6}, "select_with: expected at most the .* masks of the split, got 1000000"),
    ],
)
def test_a_wrong_setting_is_named_before_the_first_step(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(_config(tmp_path, **changes))
    assert not (tmp_path / "last.pt").exists()


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(tmp_path: Path) -> None:
    config = _config(tmp_path, model=ModelConfig(network="tests.test_train_bad_input:InfiniteGradient"), save_every=1)
    with pytest.raises(NonFiniteStep, match=r"the norm of the gradient became (inf|nan) at step 1; its batch is in"):
        fit(config)
    assert not (tmp_path / "last.pt").exists()


class _Overflow(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.inf


class InfiniteGradient(torch.nn.Module):
    def __init__(self, channels_in: int, num_classes: int):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels_in, num_classes, 1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return _Overflow.apply(self.layer(image))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_also_from_a_worker(
    tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(32, 32))
    bad = sorted((root / "train").iterdir())[0]
    bad.write_bytes(bad.read_bytes()[:80])
    options = ["--simulate", "coarse", "--steps", "4", "--crop", "16", "16", "--batch-size", "4", "--threads", "1"]
    command = [
        "fit",
        "camvid",
        "--root",
        str(root),
        *options,
        "--workers",
        str(workers),
        "--out",
        str(tmp_path / "run"),
    ]
    assert main(command) == 1
    printed = capsys.readouterr().err.splitlines()
    assert printed[-1].startswith(f"error: {bad}: expected")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('steps = "3"', "expected int, got '3' @ config.steps"),
        ('[positive]\ncm = "row"', r"expected one of \('none', .*\), got 'row' @ config.positive.cm"),
        ("[data]\nskipbad = true", r"extra fields found \(skipbad\) @ config.data"),
        ('[positive]\ncm = "everywhere"', "config.positive.cm"),
        ("steps = ", "Invalid value"),
    ],
)
def test_a_mistake_in_a_toml_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"c.toml: .*{message}"):
        load_toml(tmp_path / "c.toml")


def test_masks_without_a_label_choose_nothing(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(16, 16))
    for path in (root / "valannot").iterdir():
        Image.fromarray(np.full((16, 16), 11, np.uint8)).save(path)
    data = DataConfig(dataset="camvid", root=root, simulate="full")
    with pytest.raises(
        ValueError, match="select_with: expected masks with labelled pixels to choose by, got 1 without"
    ):
        fit(_config(tmp_path / "run", data=data, select_with=1))
    assert not list((tmp_path / "run").glob("trial_*"))  # before any of them
    assert np.isnan(fit(_config(tmp_path / "other", data=data)).score)


def test_a_run_without_anything_to_learn_from_is_refused(tmp_path: Path) -> None:
    data = DataConfig(dataset="chasedb1", root=data_trees.write_chasedb1_tree(tmp_path / "chase"))
    with pytest.raises(ValueError, match="weight: expected a number above 0 for a kind of drawings that there is"):
        fit(_config(tmp_path / "run", data=data, positive=DrawingsConfig(weight=0.0)))
