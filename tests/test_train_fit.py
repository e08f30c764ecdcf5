"""`fit`: the loop, its result over processes and passes, and what happens when something goes wrong."""

from __future__ import annotations

import itertools
import json
import os
import resource
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

from coarse_train import checkpoint
from coarse_train.cli import main
from coarse_train.config import DataConfig, FitConfig, ModelConfig, OptimConfig, StreamConfig, load_toml, save_toml
from coarse_train.engine import NonFiniteLoss, fit, schedule

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
    content = checkpoint.load(out / name)
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
    config = replace(config, positive=StreamConfig(), model=ModelConfig(widths=(8, 16)))
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


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, fsdp: bool) -> None:
    config = _config(tmp_path / "one", transition="learned", optim=OptimConfig(lr=1e-2, ema=0.9), steps=4)
    fit(config)
    many = replace(config, out=tmp_path / "two", fsdp=fsdp, accumulate=2)
    save_toml(tmp_path / "two.toml", many)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(29600 + os.getpid() % 300)]
    done = subprocess.run(
        [sys.executable, *command, "-m", "coarse_train", "fit", str(tmp_path / "two.toml")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    one, two = _state(tmp_path / "one"), _state(tmp_path / "two")
    for kind in ("model", "ema"):
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=1e-5, rtol=0, msg=f"{kind} {name}")
    assert one["last_score"] == pytest.approx(two["last_score"], abs=0.05)
    # and one process goes on from what two have left
    fit(replace(config, out=tmp_path / "two", resume=True, accumulate=2))


# ---- interruptions ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_killed_at_any_moment_and_resumed_ends_with_the_same_bits(tmp_path: Path) -> None:
    config = _config(tmp_path / "whole", steps=30, save_every=4, select_with=8, select_steps=0, evaluate_every=7)
    config = replace(config, optim=OptimConfig(lr=1e-2, ema=0.9), data=replace(config.data, workers=1))
    fit(config)
    killed = replace(config, out=tmp_path / "killed")
    save_toml(tmp_path / "killed.toml", killed)
    command = [sys.executable, "-m", "coarse_train", "fit", str(tmp_path / "killed.toml"), "--resume"]
    kills = 0
    for until in (2, 9, 15, 22):
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
    config = _config(tmp_path, optim=OptimConfig(optimizer="sgd", lr=1e30, clip=None, warmup=0.0), save_every=1)
    with pytest.raises(NonFiniteLoss, match=r"the loss became (nan|inf) at step \d+; its batch is in .*nonfinite_step"):
        fit(config)
    (path,) = tmp_path.glob("nonfinite_step*.pt")
    saved = torch.load(path, weights_only=True)
    assert saved["batch"][0]["image"].shape == (4, 1, 48, 48)
    assert checkpoint.load(tmp_path / "last.pt")["step"] == saved["step"] - 1


def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"last.pt: expected to write it, got .*File too large"):
            checkpoint.save(path, {"step": 2, "weights": torch.zeros(1 << 18)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_run_folder_that_cannot_be_written_stops_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*file/run"):
        fit(_config(tmp_path / "file" / "run"))


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"not a checkpoint", lambda b: b""])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"step": 1})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(
        checkpoint.CheckpointError, match=r"last.pt: expected a checkpoint, got a damaged or foreign file"
    ):
        checkpoint.load(path)


# ---- settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "bf16"},
        {"precision": "fp16"},
        {"optim": OptimConfig(optimizer="sgd", schedule="poly", lr=1e-2, ema=0.5)},
        {"transition": "estimated", "negative": StreamConfig(cm="tied" and "image", structure="tied")},
        {"positive": StreamConfig(cm="grid", structure="floor", trace_weight=0.01)},
        {"data": DataConfig(dataset="mnist", limit=24, supervision="masks"), "positive": StreamConfig()},
        {"data": DataConfig(dataset="mnist", limit=24, supervision="mixed", dense_images=6)},
    ],
    ids=["bf16", "fp16", "sgd-poly-ema", "estimated-tied", "grid-floor", "masks", "mixed"],
)
def test_settings_run_and_are_restored_from_the_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = _config(tmp_path, steps=3, **changes)
    result = fit(config)
    assert np.isfinite(result.loss)
    loaded = checkpoint.load_model(result.checkpoint)
    assert loaded.config == config
    assert loaded.step == 3
    content = checkpoint.load(result.checkpoint)
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
        ({"positive": StreamConfig(weight=0.0, cm="global")}, "positive.cm: expected none where positive.weight is 0"),
        ({"backend": "quantum"}, "backend: expected one that can run here"),
        ({"data": DataConfig(dataset="imagenet")}, "dataset: expected one of .* got 'imagenet'"),
        (
            {"transition": Path("nowhere.npy")},
            r"transition: expected a .npy file with a \(5, 5\) matrix, got nowhere.npy",
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
    assert set(chosen) == {"positive", "negative"}
    printed = capsys.readouterr().err
    better = max(chosen, key=lambda name: chosen[name])
    assert "4 dense masks of the validation split choose the checkpoint and the trusted side" in printed
    assert f"the {better} drawings are trusted" in printed
    kept = load_toml(tmp_path / "config.toml")
    assert getattr(kept, better).cm == "none"
    scores = [row["mean_iou"] for row in _rows(tmp_path) if "mean_iou" in row]
    assert result.score == max(scores)


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
