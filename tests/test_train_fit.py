"""`fit`: the loop, what it logs, and what each setting does."""

from __future__ import annotations

import ast
import itertools
import math
import shutil
import subprocess
import sys
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
from coarse_train.engine import fit
from coarse_train.inference import load_model
from coarse_train.model import build_model
from coarse_train.schedule import schedule
from tests import data_trees
from tests.helpers import ROOT
from tests.runs import ENVIRONMENT, _assert_same_bits, _config, _losses, _rows, _state


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


@pytest.mark.slow
def test_accumulation_changes_nothing(tmp_path: Path) -> None:
    """Drawings differ in area from image to image: a mean of means would be another loss. By SGD: the first steps of AdamW are
    signs of gradients, whichever way rounding turns the small ones."""
    sgd = OptimConfig(optimizer="sgd", lr=1e-2)
    fit(_config(tmp_path / "whole", optim=sgd))
    fit(_config(tmp_path / "parts", optim=sgd, accumulate=4))
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


@pytest.mark.sampled(4)
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


@pytest.mark.parametrize("name", ["cosine", "poly", "constant"])
def test_schedules(name: Any) -> None:
    config = OptimConfig(schedule=name, warmup=0.1, hold=0.5)
    factors = [schedule(step, 100, config) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[10:50] == [1.0] * 40
    assert all(a >= b for a, b in itertools.pairwise(factors[49:]))
    assert (factors[-1] == 1.0) if name == "constant" else (0 < factors[-1] < 0.05)


def test_fit_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--out", str(tmp_path), "--steps", "2", "--limit", "16", "--widths", "4", "8", "--threads", "1"]
    assert main(["fit", "mnist", *arguments]) == 0
    assert "last.pt: step 2 of 2, mean IoU" in capsys.readouterr().out
    assert main(["fit", "mnist", *arguments]) == 1
    assert "error: out: expected a new folder or --resume" in capsys.readouterr().err
    assert main(["fit", str(tmp_path / "config.toml"), "--resume"]) == 0
    assert main(["fit", "nothing"]) == 1
    assert "fit: expected a config.toml or one of" in capsys.readouterr().err
    (tmp_path / "bad.toml").write_text("[data]\nskipbad = true\n")
    assert main(["fit", str(tmp_path / "bad.toml")]) == 1
    assert "bad.toml: extra fields found (skipbad) @ config.data" in capsys.readouterr().err


def test_a_crop_without_a_single_label_is_a_step_like_others(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(64, 64))
    data = DataConfig(dataset="camvid", root=root, simulate="scribble", crop=(8, 8))
    result = fit(_config(tmp_path / "run", data=data, positive=DrawingsConfig(), batch_size=1, steps=30))
    assert 0.0 in _losses(tmp_path / "run")
    assert np.isfinite(result.loss)


def test_a_grey_image_among_colour_ones_is_scored(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(32, 32))
    grey = sorted((root / "val").iterdir())[0]
    Image.open(grey).convert("L").save(grey)
    data = DataConfig(dataset="camvid", root=root, simulate="coarse")
    assert np.isfinite(fit(_config(tmp_path / "run", data=data, steps=1)).score)


@pytest.mark.slow
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


def test_a_toml_file_changes_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("[positive]\nweight = 2.0\n[optim]\nclip = 0.0\n")
    config = load_toml(tmp_path / "c.toml")
    assert config.positive == replace(FitConfig().positive, weight=2.0)
    assert config.optim == replace(OptimConfig(), clip=0.0)
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_toml(tmp_path / "again.toml") == config


@pytest.mark.slow
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
    moved = math.sqrt(sum(float((after[name] - p.detach()).square().sum()) for name, p in _at_start(config).items()))
    assert moved == pytest.approx(clip or _rows(tmp_path)[0]["grad_norm"], rel=1e-3)
    assert _rows(tmp_path)[0]["grad_norm"] > 10 * 1e-3


def test_the_moving_average_follows_by_its_decay(tmp_path: Path) -> None:
    config = _config(tmp_path, steps=1, optim=OptimConfig(lr=1e-2, ema=0.75, warmup=0.0))
    fit(config)
    state = _state(tmp_path)
    for name, before in _at_start(config).items():
        torch.testing.assert_close(state["ema"][name], 0.75 * before.detach() + 0.25 * state["model"][name])


@pytest.mark.slow
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
