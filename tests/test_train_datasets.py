"""Every data set through every command, on trees in the official layouts: simulate, fit, evaluate, predict."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coarse_train.cli import main
from coarse_train.config import DataConfig
from coarse_train.data import DATASETS, open_split
from tests import data_trees

TREES: dict[str, Callable[[Path], Path]] = {
    "folder": data_trees.write_folder_tree,
    "cityscapes": data_trees.write_cityscapes_tree,
    "camvid": data_trees.write_camvid_tree,
    "chasedb1": data_trees.write_chasedb1_tree,
    "drive": data_trees.write_drive_tree,
    "les_av": data_trees.write_les_av_tree,
}
REAL = Path(os.environ.get("COARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
SMALL = ["--network", "unet", "--widths", "4", "8", "--steps", "2", "--batch-size", "2", "--crop", "16", "16"]
SMALL += ["--workers", "0", "--threads", "1", "--precision", "fp32", "--device", "cpu"]


def test_there_is_a_tree_for_every_data_set() -> None:
    assert {*TREES, "mnist"} == {*DATASETS}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("dataset", list(TREES))
def test_a_data_set_goes_through_all_commands(dataset: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root, drawings, run = TREES[dataset](tmp_path / "data"), tmp_path / "drawings", tmp_path / "run"
    assert main(["simulate", dataset, "--root", str(root), "--out", str(drawings)]) == 0
    noise = json.loads((drawings / "noise.json").read_text())
    assert set(noise["splits"]) == {"train", "val"}

    options = ["--positives", str(drawings / "positives"), "--negatives", str(drawings / "negatives")]
    assert main(["fit", dataset, "--root", str(root), "--out", str(run), *options, *SMALL]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["positive_nll"] > 0
    assert rows[0]["negative_nll"] > 0
    assert "mean_iou" in rows[-1]

    capsys.readouterr()
    assert main(["evaluate", str(run / "last.pt"), "--out", str(tmp_path / "scores.json")]) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["mean_iou"] == pytest.approx(rows[-1]["mean_iou"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in scores["classes"])

    assert main(["predict", str(run / "last.pt"), "--out", str(tmp_path / "found")]) == 0
    labels = sorted((tmp_path / "found" / "labels").rglob("*.png"))
    assert len(labels) == scores["images"] == len(list((tmp_path / "found" / "overlays").rglob("*.png")))
    classes = open_split(DataConfig(dataset=dataset, root=root), "val").classes
    assert {*np.unique(np.asarray(Image.open(labels[0]))).tolist()} <= {*classes.file_ids}


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason=f"real data is not at {REAL}; COARSE_DATA names its folder")
@pytest.mark.parametrize(("dataset", "folder"), [("camvid", "camvid"), ("chasedb1", "chasedb1"), ("mnist", "mnist")])
def test_real_data_is_trained_on(dataset: str, folder: str, tmp_path: Path) -> None:
    options = ["--limit", "2", "--select-with", "2", "--select-steps", "0"]
    options += ["--simulate", "scribble"] if dataset != "mnist" else []  # which has drawings
    assert main(["fit", dataset, "--root", str(REAL / folder), "--out", str(tmp_path), *options, *SMALL]) == 0
    assert (tmp_path / "best.pt").is_file()


def test_a_bad_image_is_an_error_or_a_listed_skip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_trees.write_folder_tree(tmp_path / "data")
    bad = sorted(path for path in (root / "train" / "images").rglob("*") if path.is_file())[0]
    bad.write_bytes(bad.read_bytes()[:60])
    command = ["fit", "folder", "--root", str(root), *SMALL]
    assert main([*command, "--out", str(tmp_path / "a")]) == 1
    assert str(bad) in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path / "b"), "--skip-bad"]) == 0
    assert f"{bad.stem}: {bad}: expected" in capsys.readouterr().err
