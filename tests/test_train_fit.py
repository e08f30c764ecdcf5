"""`fit`: the loop, its result over processes and passes, and what happens when something goes wrong."""

from __future__ import annotations

import ast
import io
import itertools
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coarse_kernels import Drawings, Objective, TransitionMatrix, annotation_objective
from coarse_train import run as run_folder
from coarse_train.cli import main
from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, ModelConfig, OptimConfig, load_toml, to_toml
from coarse_train.engine import NonFiniteStep, fit
from coarse_train.inference import load_model
from coarse_train.model import build_model
from coarse_train.schedule import schedule
from tests import data_trees

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _config(out: Path, **changes: Any) -> FitConfig:
    """Six steps on digits of the sample, half a second."""
    config = FitConfig(
        data=DataConfig(dataset="mnist", limit=24, flip=True, scale=(0.8, 1.25), crop=(48, 48)),
        model=ModelConfig(widths=(4, 8)),
        optim=OptimConfig(lr=1e-2),
        out=out,
        steps=6,
        batch_size=4,
        evaluate_every=3,
        save_every=2,
        threads=1,
        device="cpu",
        pictures=0,
    )
    return replace(config, **changes)


def _rows(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in _rows(out) if "loss" in row]


def _assert_same_bits(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for k, pair in enumerate(zip(one, other, strict=True)):
            _assert_same_bits(*pair, f"{where}[{k}]")
    else:
        assert one == other or (one != one and other != other), where


def _state(out: Path, name: str = "last.pt") -> dict[str, Any]:
    content = run_folder.load(out / name)
    del content["config"]
    return content


def test_a_run_leaves_config_metrics_checkpoint_and_tensorboard(tmp_path: Path) -> None:
    config = _config(tmp_path)
    result = fit(config)
    assert load_toml(tmp_path / "config.toml") == config
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert {"positive_nll", "negative_nll", "lr", "grad_norm"} <= rows[0].keys()
    assert "mask_nll" not in rows[0]
    scores = [(row["step"], row["mean_iou"]) for row in rows if "mean_iou" in row]
    assert [step for step, _ in scores] == [3, 6]
    assert result.score == scores[-1][1]
    assert result.checkpoint == tmp_path / "last.pt"
    assert not (tmp_path / "best.pt").exists()
    assert any((tmp_path / "tensorboard").iterdir())


def test_equal_seeds_give_equal_bits_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit(_config(tmp_path / name, seed=seed))
    _assert_same_bits(_state(tmp_path / "a"), _state(tmp_path / "b"))
    assert _rows(tmp_path / "a") == _rows(tmp_path / "b")
    assert _losses(tmp_path / "a") != _losses(tmp_path / "c")


def test_it_learns(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=80, batch_size=8, optim=OptimConfig(lr=2e-2), evaluate_every=80)
    config = replace(config, positive=DrawingsConfig(), model=ModelConfig(widths=(8, 16)))
    config = replace(config, data=DataConfig(dataset="mnist", variant="binary", limit=64, supervision="masks"))
    result = fit(config)
    losses = _losses(tmp_path)
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert result.score > 60  # all background is about 45


# ---- the same result however the batch is cut ------------------------------------------------------------------


def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Drawings differ in area from image to image: a mean of means would be another loss."""
    fit(_config(tmp_path / "whole"))
    fit(_config(tmp_path / "parts", accumulate=4))
    assert _losses(tmp_path / "parts") == pytest.approx(_losses(tmp_path / "whole"), abs=1e-5)
    for name, value in _state(tmp_path / "whole")["model"].items():
        torch.testing.assert_close(_state(tmp_path / "parts")["model"][name], value, atol=1e-5, rtol=0)


def test_every_pass_is_one_call_of_the_operator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[int] = []

    def spy(seg_logits: torch.Tensor, drawings: list[Drawings], **options: Any) -> Objective:
        kinds.append(len(drawings))
        return annotation_objective(seg_logits, drawings, **options)

    monkeypatch.setattr("coarse_train.criterion.annotation_objective", spy)
    data = DataConfig(dataset="mnist", limit=24, supervision="mixed", dense_images=12)
    fit(_config(tmp_path, data=data, steps=2, accumulate=2))
    assert kinds == [3] * 4


def _run_in_two_processes(config: FitConfig, path: Path) -> None:
    path.write_text(to_toml(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "coarse_train", "fit", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, fsdp: bool) -> None:
    config = _config(tmp_path / "one", transition="learned", optim=OptimConfig(lr=1e-2, ema=0.9), steps=4)
    fit(config)
    many = replace(config, out=tmp_path / "two", fsdp=fsdp, accumulate=2, save_every=100)
    _run_in_two_processes(many, tmp_path / "two.toml")
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    one, two = _state(tmp_path / "one"), _state(tmp_path / "two")
    for kind in ("model", "ema"):
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=1e-5, rtol=0, msg=f"{kind} {name}")
    assert one["last_score"] == pytest.approx(two["last_score"], abs=0.05)
    # one process can take the state of two apart again, and the other way round
    for name, out in (("one", "two"), ("two", "one")):
        assert _state(tmp_path / name)["optimizer"].keys() == _state(tmp_path / out)["optimizer"].keys()
    fit(replace(many, resume=True, fsdp=False, accumulate=1))


@pytest.mark.slow
def test_the_score_of_two_processes_is_that_of_the_network_that_is_kept(tmp_path: Path) -> None:
    """Running statistics of batch normalisation differ between processes until they are shared."""
    config = _config(tmp_path / "run", model=ModelConfig(widths=(4, 8), norm="batch"), steps=3, evaluate_every=3)
    _run_in_two_processes(config, tmp_path / "two.toml")
    assert run_evaluate(EvaluateConfig(config.out / "last.pt"))["mean_iou"] == _rows(config.out)[-1]["mean_iou"]


# ---- interruptions ---------------------------------------------------------------------------------------------


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


def _last_step(out: Path) -> int:
    try:
        return max((row["step"] for row in _rows(out)), default=0)
    except (OSError, ValueError):
        return 0


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path) -> None:
    fit(_config(tmp_path, steps=1))
    with pytest.raises(ValueError, match="out: expected a new folder or --resume"):
        fit(_config(tmp_path, steps=1))


def test_resume_names_what_has_changed(tmp_path: Path) -> None:
    fit(_config(tmp_path, steps=2))
    with pytest.raises(ValueError, match="resume: expected batch_size as in the run, 4, got 8"):
        fit(_config(tmp_path, steps=2, resume=True, batch_size=8))


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(tmp_path: Path) -> None:
    config = _config(tmp_path, optim=OptimConfig(optimizer="sgd", lr=1e30, clip=0.0, warmup=0.0), save_every=1)
    with pytest.raises(
        NonFiniteStep,
        match=r"became (nan|inf) at step \d+; its batch is in .*nonfinite_step",
    ):
        fit(config)
    (path,) = tmp_path.glob("nonfinite_step*.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["batch"][0]["image"].shape == (4, 1, 48, 48)
    assert set(saved["model"]) == set(run_folder.load(tmp_path / "last.pt")["model"])
    assert run_folder.load(tmp_path / "last.pt")["step"] == saved["step"] - 1
    assert all(x.isfinite().all() for x in run_folder.load(tmp_path / "last.pt")["model"].values())


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


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"optim": OptimConfig(optimizer="sgd", schedule="poly", lr=1e-2, ema=0.5)},
        {"transition": "estimated", "negative": DrawingsConfig(cm="image", structure="tied")},
        {"transition": "objects", "positive": DrawingsConfig(cm="global", diagonal=0.6, missing=0.3)},
        {"positive": DrawingsConfig(cm="grid", structure="floor", trace_weight=0.01)},
        {"data": DataConfig(dataset="mnist", limit=24, supervision="masks"), "positive": DrawingsConfig()},
        {"data": DataConfig(dataset="mnist", limit=24, supervision="mixed", dense_images=6)},
    ],
    ids=["bf16", "fp16", "sgd-poly-ema", "estimated-tied", "objects-missing", "grid-floor", "masks", "mixed"],
)
def test_settings_run_and_are_restored_from_the_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = _config(tmp_path, steps=3, **changes)
    result = fit(config)
    assert np.isfinite(result.loss)
    loaded = load_model(result.checkpoint)
    assert loaded.config == config
    assert loaded.step == 3
    content = run_folder.load(result.checkpoint)
    kept = content["ema"] if config.optim.ema is not None else content["model"]
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, kept[name])
    logged = _rows(tmp_path)[0]
    assert ("mask_nll" in logged) == (config.data.supervision != "drawings")
    assert ("positive_nll" in logged) == (config.data.supervision != "masks")


@pytest.mark.slow
def test_compiled_networks_give_the_same_run(tmp_path: Path) -> None:
    plain = fit(_config(tmp_path / "plain", steps=1))
    compiled = fit(_config(tmp_path / "compiled", steps=1, compile=True))
    assert compiled.loss == pytest.approx(plain.loss, abs=1e-4)
    assert set(_state(tmp_path / "compiled")["model"]) == set(_state(tmp_path / "plain")["model"])


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
        ({"select_steps": 3}, "select_steps: expected --select-with, which it belongs to, got 3 alone"),
        (
            {"data": DataConfig(dataset="mnist", supervision="mixed")},
            "dense_images: expected a number >= 1 with supervision",
        ),
        (
            {"data": DataConfig(dataset="mnist", dense_images=3)},
            "dense_images: expected 0 with supervision drawings, unless positive.pen is auto, got 3",
        ),
        (
            {"data": DataConfig(dataset="mnist", simulate="coarse")},
            "simulate: expected images that lack drawings, but",
        ),
        ({"model": ModelConfig(network="torch.nn:Identity", widths=(4,))}, "widths: expected none for network"),
        ({"optim": OptimConfig(lr=math.inf)}, "lr: expected a number >= 0, got inf"),
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
        ({"select_with": 10**6}, "select_with: expected at most the .* masks of the split, got 1000000"),
    ],
)
def test_a_wrong_setting_is_named_before_the_first_step(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(_config(tmp_path, **changes))
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.parametrize("name", ["cosine", "poly", "constant"])
def test_schedules(name: Any) -> None:
    config = OptimConfig(schedule=name, warmup=0.1, hold=0.5)
    factors = [schedule(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:50] == [1.0] * 40
    assert all(a >= b for a, b in itertools.pairwise(factors[49:]))
    assert (factors[-1] == 1.0) if name == "constant" else (0 < factors[-1] < 0.05)


# ---- what masks decide -----------------------------------------------------------------------------------------


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
    assert "4 of these masks chose this checkpoint" in capsys.readouterr().out
    assert run_evaluate(EvaluateConfig(result.checkpoint, split="test", limit=5))["chosen_with"] == 0


def test_fit_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--steps", "2", "--limit", "16", "--widths", "4", "8", "--threads", "1"]
    assert main(["fit", "mnist", *arguments]) == 0
    assert "last.pt: 2 steps, mean IoU" in capsys.readouterr().out
    assert main(["fit", "mnist", *arguments]) == 1
    assert "error: out: expected a new folder or --resume" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "config.toml"), "--resume"]) == 0
    assert main(["fit", "nothing"]) == 1
    assert "fit: expected a config.toml or one of" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text("[data]\nskipbad = true\n")
    assert main(["fit", str(tmp_path / "bad.toml")]) == 1
    assert "bad.toml: extra fields found (skipbad) @ config.data" in capsys.readouterr().err


class OneParameterTooMany(torch.nn.Module):
    """A user's network with a parameter that gets no gradient."""

    def __init__(self, channels_in: int, num_classes: int):
        super().__init__()
        self.used = torch.nn.Conv2d(channels_in, num_classes, 1)
        self.unused = torch.nn.Linear(2, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.used(image)


@pytest.mark.parametrize(
    "changes",
    [
        {"optim": OptimConfig(optimizer="sgd", momentum=0.0, lr=1e-2)},
        {"model": ModelConfig(network="tests.test_train_fit:OneParameterTooMany")},
        {"precision": "fp16"},
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


def stop_after(config: FitConfig, step: int) -> None:
    """Make the run folder what it was when the checkpoint of ``step`` had been written."""
    kept: list[dict[str, Any]] = []
    real = run_folder.save

    def save(path: Path, content: dict[str, Any]) -> None:
        real(path, content)
        if content.get("step") == step:
            kept.append(content)
            raise KeyboardInterrupt

    shutil.rmtree(config.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save", save)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert len(kept) == 1
    assert _last_step(config.out) == step


def test_a_gradient_that_is_not_finite_stops_before_it_is_applied(tmp_path: Path) -> None:
    config = _config(tmp_path, model=ModelConfig(network="tests.test_train_fit:InfiniteGradient"), save_every=1)
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


def test_a_crop_without_a_single_label_is_a_step_like_others(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(64, 64))
    data = DataConfig(dataset="camvid", root=root, simulate="scribble", crop=(8, 8))
    result = fit(_config(tmp_path / "run", data=data, positive=DrawingsConfig(), batch_size=1, steps=30))
    assert 0.0 in _losses(tmp_path / "run")
    assert np.isfinite(result.loss)


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


def test_a_grey_image_among_colour_ones_is_scored(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(32, 32))
    grey = sorted((root / "val").iterdir())[0]
    Image.open(grey).convert("L").save(grey)
    data = DataConfig(dataset="camvid", root=root, simulate="coarse")
    assert np.isfinite(fit(_config(tmp_path / "run", data=data, steps=1)).score)


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


def test_scores_of_classes_and_images_stand_in_metrics_and_on_tensorboard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(tmp_path, pictures=3)
    fit(config)
    row = _rows(tmp_path)[-1]
    truth = run_evaluate(EvaluateConfig(tmp_path / "last.pt", device="cpu"))
    assert row["confusion"] == truth["confusion"]
    assert row["iou"] == {name: scores["iou"] for name, scores in truth["classes"].items()}
    assert None in row["iou"].values() or len(row["iou"]) == 5
    assert row["mean_iou"] == truth["mean_iou"]
    assert row["images"] == truth["images"]
    ranked = [*row["worst"], *row["best"][::-1]]
    assert [len(row["worst"]), len(row["best"])] == [3, 3]
    assert [score for _, score in ranked] == sorted(score for _, score in ranked)
    assert np.array([*row["positive_cm"].values()]).sum(0) == pytest.approx(np.ones(5), abs=1e-5)
    lowest = min((value, name) for name, value in row["iou"].items() if value is not None)
    assert f"validation masks; lowest: {lowest[1]} ({lowest[0]:.1f})" in capsys.readouterr().err
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name, value in row["iou"].items():
        found = [event.value for event in events.Scalars(f"val/iou/{name}")][-1:]
        assert found == ([] if value is None else [pytest.approx(value)])


def test_a_run_that_learns_one_class_says_so_with_and_without_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    one = OptimConfig(lr=0.0, cm_lr=0.0, weight_decay=0.0)
    model = ModelConfig(network="tests.test_train_fit:sees_one")
    data = DataConfig(root=root)
    fit(_config(tmp_path / "run", data=data, model=model, optim=one, steps=1))
    sentence = "note: at step 1 the network has collapsed to one class: 'car' at 100.0 % of the pixels, of which it is"
    assert sentence in capsys.readouterr().err
    shutil.rmtree(root / "val")
    fit(_config(tmp_path / "bare", data=data, model=model, optim=one, steps=1, pictures=1))
    assert sentence in capsys.readouterr().err
    assert sorted(path.stem for path in (tmp_path / "bare/pictures").iterdir()) == ["confusion_positive", "training"]
    assert not (tmp_path / "run/pictures").exists()


def sees_one(channels: int, num_classes: int) -> torch.nn.Module:
    network = torch.nn.Conv2d(channels, num_classes, 1)
    torch.nn.init.zeros_(network.weight)
    with torch.no_grad():
        network.bias.copy_(torch.eye(num_classes)[2] * 20)  # type: ignore[union-attr]
    return network


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


def test_trials_of_a_run_that_was_given_up_choose_nothing(tmp_path: Path) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2)
    fit(config)
    first = (tmp_path / "trial_all_trusted" / "metrics.jsonl").read_text()
    (tmp_path / "last.pt").unlink()
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


def test_a_toml_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[positive]\nweight = 2.0\n[optim]\nclip = 0.0\n")
    config = load_toml(tmp_path / "c.toml")
    assert config.positive == replace(FitConfig().positive, weight=2.0)
    assert config.optim == replace(OptimConfig(), clip=0.0)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_toml(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('steps = "3"', "expected int @ config.steps"),
        ("[data]\nskipbad = true", r"extra fields found \(skipbad\) @ config.data"),
        ('[positive]\ncm = "everywhere"', "config.positive.cm"),
        ("steps = ", "Invalid value"),
    ],
)
def test_a_mistake_in_a_toml_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ValueError, match=rf"c.toml: .*{message}"):
        load_toml(tmp_path / "c.toml")


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
    (root / "classes.toml").write_text(table)
    fit(replace(config, resume=True))
    other = data_trees.write_folder_tree(tmp_path / "more", counts={"train": 5, "val": 2})
    with pytest.raises(ValueError, match="resume: expected the training images of the run, got others"):
        fit(replace(config, resume=True, data=replace(config.data, root=other)))


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    hold = (
        "import sys; from pathlib import Path; import torch; from coarse_train.config import FitConfig\n"
        "from coarse_train.distributed import World; from coarse_train.run import open_run\n"
        "with open_run(FitConfig(out=Path(sys.argv[1])), World(0, 1, torch.device('cpu'))):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="out: expected a folder that no other run writes to"):
            fit(_config(tmp_path, steps=1))
        other.kill()
    fit(_config(tmp_path, steps=1))


def test_masks_without_a_label_choose_nothing(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(16, 16))
    for path in (root / "valannot").iterdir():
        Image.fromarray(np.full((16, 16), 11, np.uint8)).save(path)
    data = DataConfig(dataset="camvid", root=root, simulate="full")
    with pytest.raises(ValueError, match="select_with: expected masks with labelled pixels to choose by, got none"):
        fit(_config(tmp_path / "run", data=data, select_with=1))
    assert np.isnan(fit(_config(tmp_path / "other", data=data)).score)


def test_a_run_without_anything_to_learn_from_is_refused(tmp_path: Path) -> None:
    data = DataConfig(dataset="chasedb1", root=data_trees.write_chasedb1_tree(tmp_path / "chase"))
    with pytest.raises(ValueError, match="weight: expected a number above 0 for a kind of drawings that there is"):
        fit(_config(tmp_path / "run", data=data, positive=DrawingsConfig(weight=0.0)))


def test_a_grey_image_in_front_of_colour_ones_is_repeated(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(16, 16))
    grey = sorted((root / "train").iterdir())[0]
    Image.open(grey).convert("L").save(grey)
    result = fit(_config(tmp_path / "run", data=DataConfig(dataset="camvid", root=root, simulate="full"), steps=2))
    assert run_folder.load(result.checkpoint)["channels"] == 3


def _at_start(config: FitConfig) -> dict[str, torch.Tensor]:
    """The parameters before the first step."""
    torch.manual_seed(config.seed)
    return dict(build_model(config, 1, 5, TransitionMatrix.uniform(5)).named_parameters())


@pytest.mark.parametrize("clip", [1e-3, 0.0])
def test_the_gradient_is_clipped_to_the_norm_that_is_asked_for(tmp_path: Path, clip: float) -> None:
    plain = OptimConfig("sgd", lr=1.0, cm_lr=1.0, weight_decay=0.0, momentum=0.0, clip=clip, warmup=0.0)
    config = _config(tmp_path, steps=1, optim=plain)
    fit(config)
    after = _state(tmp_path)["model"]
    moved = math.sqrt(sum(float((after[name] - p).square().sum()) for name, p in _at_start(config).items()))
    assert moved == pytest.approx(clip or _rows(tmp_path)[0]["grad_norm"], rel=1e-3)
    assert _rows(tmp_path)[0]["grad_norm"] > 10 * 1e-3


def test_the_moving_average_follows_by_its_decay(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=1, optim=OptimConfig(lr=1e-2, ema=0.75, warmup=0.0))
    fit(config)
    state = _state(tmp_path)
    for name, before in _at_start(config).items():
        torch.testing.assert_close(state["ema"][name], 0.75 * before.detach() + 0.25 * state["model"][name])


def test_a_transition_from_a_file_is_the_one_that_is_used(tmp_path: Path) -> None:
    matrix = torch.rand(5, 5, generator=torch.Generator().manual_seed(0)).fill_diagonal_(0.0)
    matrix = matrix / matrix.sum(1, keepdim=True)
    np.save(tmp_path / "m.npy", matrix.numpy())
    fixed = _config(tmp_path / "fixed", steps=1, transition=tmp_path / "m.npy")
    fit(fixed)
    torch.testing.assert_close(_state(tmp_path / "fixed")["model"]["transition.matrix"], matrix)
    fit(_config(tmp_path / "uniform", steps=1))
    first, other = (_rows(tmp_path / name)[0] for name in ("fixed", "uniform"))
    assert first["positive_nll"] == other["positive_nll"]
    assert first["negative_nll"] != other["negative_nll"]


def test_objects_are_named_uniformly_and_the_background_never(tmp_path: Path) -> None:
    fit(_config(tmp_path, steps=1, transition="objects"))
    matrix = _state(tmp_path)["model"]["transition.matrix"]
    assert not matrix[:, 0].any()
    torch.testing.assert_close(matrix[0, 1:], torch.full((4,), 0.25))
    torch.testing.assert_close(matrix[1:, 1:], (1 - torch.eye(4)) / 3)


def test_bf16_computes_in_bf16(tmp_path: Path) -> None:
    full, half = (fit(_config(tmp_path / kind, steps=1, precision=kind)).loss for kind in ("fp32", "bf16"))
    assert half != full
    assert half == pytest.approx(full, rel=1e-2)


def test_weights_of_a_backbone_are_not_needed_again(tmp_path: Path) -> None:
    data_trees.save_small_segformer(tmp_path / "weights", 7)
    config = _config(tmp_path / "run", model=ModelConfig(network="segformer", weights=tmp_path / "weights"), steps=2)
    fit(config)
    shutil.rmtree(tmp_path / "weights")
    loaded = load_model(tmp_path / "run" / "last.pt")
    _assert_same_bits(dict(loaded.model.state_dict()), _state(tmp_path / "run")["model"])
    fit(replace(config, resume=True))


def test_the_training_package_knows_the_public_api_alone() -> None:
    import coarse_kernels

    for path in (ROOT / "coarse_train").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("coarse_kernels"):
                assert node.module == "coarse_kernels", f"{path}: {node.module}"
                assert {alias.name for alias in node.names} <= {*coarse_kernels.__all__}, path
            if isinstance(node, ast.Import):
                assert not any(alias.name.startswith("coarse_kernels.") for alias in node.names), path


def test_nothing_but_the_command_line_knows_of_experiments() -> None:
    for path in (ROOT / "coarse_train").rglob("*.py"):
        if path.parent.name == "experiments" or path.name == "cli.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                named = [node.module or "", *(alias.name for alias in node.names)]
                assert not any("experiments" in name.split(".") for name in named), path
