"""The command line: what a new user types, and what it answers."""

from __future__ import annotations

import builtins
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from coarse_train import __main__
from coarse_train.cli import COMMANDS, main
from coarse_train.config import RECIPES, DataConfig, FitConfig, ModelConfig, load_toml
from coarse_train.data import DATASETS
from coarse_train.engine import fit
from tests import data_trees
from tests.helpers import run_python

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--network", "unet", "--widths", "4", "8", "--steps", "1", "--batch-size", "2", "--crop", "16", "16"]
SMALL += ["--workers", "0", "--threads", "1"]


def test_every_command_lists_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as stopped:
            main([command, "--help"])
        assert stopped.value.code == 0
        assert f"coarse-train {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_command_that_does_not_train_does_not_wait_for_what_training_alone_needs() -> None:
    """Half of the time until ``coarse-train --help`` answers was theirs."""
    lazy = ("torch.distributed.tensor", "scipy.signal", "scipy.ndimage", "scipy.optimize", "scipy.sparse", "matplotlib")
    code = f"import sys, coarse_train.cli; print([m for m in {lazy} if m in sys.modules])"
    done = run_python(code)
    assert done.stdout.split() == ["[]"], done.stdout + done.stderr


def test_every_data_set_has_a_recipe() -> None:
    assert {path.stem for path in RECIPES.glob("*.toml")} == {*DATASETS}
    for name in DATASETS:
        assert load_toml(RECIPES / f"{name}.toml").data.dataset == name


def test_simulate_says_what_to_do_with_the_drawings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid")
    assert main(["simulate", "camvid", "--root", str(root), "--out", str(tmp_path / "drawings")]) == 0
    printed = capsys.readouterr().out.strip()
    assert printed.startswith(f"coarse-train fit camvid --root {root} --positives ")
    assert main([*shlex.split(printed)[1:], "--out", str(tmp_path / "run"), *SMALL]) == 0
    assert (
        main(
            [
                "simulate",
                "mnist",
                "--variant",
                "binary",
                "--limit",
                "4",
                "--negatives",
                "0",
                "--out",
                str(tmp_path / "a b"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert shlex.split(printed)[3:] == [
        "--variant",
        "binary",
        "--limit",
        "4",
        "--positives",
        str(tmp_path / "a b" / "positives"),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["check", "simulate", "pen"])
def test_the_option_that_a_message_names_is_one_of_the_command(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    options = ["folder", "--root", str(root), "--out", str(tmp_path / "out"), "--max-pixels"]
    assert main([command, *options, "383"]) == 1
    assert "expected at most 383 pixels, got 24x16; --max-pixels 384 reads it" in capsys.readouterr().err
    assert main([command, *options, "384", "--overwrite"]) == 0
    assert command != "simulate" or "--max-pixels 384" in capsys.readouterr().out


def test_drawings_by_hand_are_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "mine" / "positives" / "hand.png"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"hours of work")
    assert main(["simulate", "mnist", "--out", str(tmp_path / "mine"), "--overwrite"]) == 1
    assert "expected a folder with noise.json to overwrite" in capsys.readouterr().err
    assert mine.read_bytes() == b"hours of work"


def test_a_run_folder_that_was_moved_goes_on_where_it_is(tmp_path: Path) -> None:
    options = ["--steps", "1", "--limit", "20", "--widths", "4", "8", "--threads", "1"]
    assert main(["fit", "mnist", "--out", str(tmp_path / "here"), *options]) == 0
    (tmp_path / "here").rename(tmp_path / "there")
    assert main(["fit", str(tmp_path / "there" / "config.toml"), "--resume"]) == 0
    assert not (tmp_path / "here").exists()


def test_a_misspelt_folder_is_not_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    (root / "train" / "positives").rename(root / "train" / "positive")
    assert main(["fit", "folder", "--root", str(root), "--out", str(tmp_path / "run"), *SMALL]) == 1
    assert f"{root / 'train' / 'positive'}: expected folders called images, positives," in capsys.readouterr().err


def test_the_log_says_what_was_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    assert main(["fit", "folder", "--root", str(root), "--out", str(tmp_path / "run"), "--resume", *SMALL]) == 0
    printed = capsys.readouterr().err
    images = len([path for path in (root / "train" / "images").rglob("*") if path.is_file()])
    assert f"{images} training images, {images} with positive, " in printed
    assert f"no last.pt in {tmp_path / 'run'}: a new run" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit"], "then options, got nothing"),
        (["fit", "--root", "x", "folder"], "then options, got --root first"),
        (["fit", "nope.toml"], "nope.toml: expected a config file, got none"),
        (["fit", "mnist", "--device", "gpu"], "device: expected one of cpu"),
        (["fit", "mnist", "--workers", "-1"], "workers: expected a number from 0 to 1024, got -1"),
        (["fit", "mnist", "--network", "./here:Net"], "network: expected package.module:name that can be imported"),
        (["fit", "mnist", "--network", "torch.nn:ReLU"], "to be called as name(channels_in, num_classes), got"),
        (["evaluate", "nothing.pt"], "nothing.pt: expected a checkpoint"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "run"), "--limit", "20"] if arguments[1:2] == ["mnist"] else []
    assert main([*arguments, *out]) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert printed.startswith("error: ")
    assert message in printed


@pytest.mark.slow
def test_a_network_in_the_current_folder_is_found_by_the_command(tmp_path: Path) -> None:
    (tmp_path / "here.py").write_text(
        "import torch\n\n\ndef net(channels_in, num_classes):\n    return torch.nn.Conv2d(channels_in, num_classes, 1)\n"
    )
    run = "import sys; sys.path.remove(''); from coarse_train.__main__ import main; sys.exit(main())"
    arguments = ["fit", "mnist", "--network", "here:net", "--steps", "1", "--limit", "20", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-c", run, *arguments],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/mnist/last.pt").exists()


def test_without_the_extra_the_command_names_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without_tyro(name: str, globals: Mapping[str, Any] | None = None, *rest: Any) -> ModuleType:
        if name == "cli":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, globals, *rest)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    assert __main__.main() == 1
    assert capsys.readouterr().err == "error: coarse-train needs tyro: pip install 'coarse-kernels[train]'\n"


def test_paths_may_be_text_in_python_and_wrong_types_are_named(tmp_path: Path) -> None:
    model, data = ModelConfig(widths=(4, 8)), DataConfig(dataset="mnist", limit=20)
    fit(FitConfig(data=data, model=model, out=str(tmp_path / "run"), steps=1, threads=1))  # type: ignore[arg-type]
    assert (tmp_path / "run" / "last.pt").exists()
    with pytest.raises(ValueError, match=r"expected int, got .* @ config\.steps"):
        fit(FitConfig(data=data, out=tmp_path / "other", steps="3"))  # type: ignore[arg-type]


def test_a_run_that_is_done_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--out", str(tmp_path), "--steps", "1", "--limit", "20", "--widths", "4", "8", "--threads", "1"]
    assert main(["fit", "mnist", *options]) == 0
    before = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert main(["fit", str(tmp_path / "config.toml"), "--resume"]) == 0
    assert f"{tmp_path}: 1 of 1 steps done" in capsys.readouterr().err
    after = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)
