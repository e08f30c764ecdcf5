"""The scores of `evaluate` on Cityscapes are those of the official evaluator on the files that it exports, digit for digit.

The official one is `cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling`. Its per-instance score is off, as it calls
np.in1d, which NumPy 2.4 no longer has.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.commands.predict import PredictConfig, run_predict
from coarse_train.config import DataConfig
from coarse_train.data.cityscapes import CLASSES
from tests.nearest_colour import NETWORK, write_checkpoint

official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

IMAGES = (("bonn", "bonn_000000_000019"), ("bonn", "bonn_000001_000019"), ("ulm", "ulm_000000_000019"))
ROAD, SKY, RIDER, TRUCK, BUS, TRAIN = (
    CLASSES.names.index(name) for name in ("road", "sky", "rider", "truck", "bus", "train")
)


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    """Three images in which a nearest-colour network sees random classes, and masks that agree in half of the pixels.

    Masks have all label ids, ignored ones too. Nowhere: train. In masks only: rider. Predicted only: truck. Predicted, but
    only where the mask is ignored: bus.
    """
    rng = np.random.default_rng(0)
    for city, name in IMAGES:
        seen = rng.integers(0, len(CLASSES), (64, 96))
        ids = rng.integers(0, 34, seen.shape)  # the label ids of the official table, license plate (-1) aside
        ids = np.where(rng.random(seen.shape) < 0.5, CLASSES.encode(seen), ids).astype(np.uint8)
        ids[np.isin(ids, [CLASSES.ids[k] for k in (TRUCK, BUS, TRAIN)])] = CLASSES.ids[SKY]
        ignored = np.isin(ids, CLASSES.ignored)
        seen[np.isin(seen, (RIDER, TRAIN)) | ((seen == BUS) & ~ignored)] = ROAD
        assert (seen[ignored] == BUS).any()
        for folder, suffix, array in (
            ("leftImg8bit", "leftImg8bit", CLASSES.paint(seen)),
            ("gtFine", "gtFine_labelIds", ids),
        ):
            path = tmp_path / "cityscapes" / folder / "val" / city / f"{name}_{suffix}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    data = DataConfig(dataset="cityscapes", root=tmp_path / "cityscapes")
    checkpoint = write_checkpoint(tmp_path / "best.pt", data, CLASSES)
    return EvaluateConfig(checkpoint, network=NETWORK, device="cpu", export=tmp_path / "labels")


def _official(root: Path, predictions: Path) -> dict[str, Any]:
    """As `csEvalPixelLevelSemanticLabeling` does with CITYSCAPES_DATASET=root and CITYSCAPES_RESULTS=predictions."""
    args = SimpleNamespace(**vars(official.args))
    args.evalInstLevelScore, args.JSONOutput, args.quiet = False, False, True
    args.predictionPath, args.predictionWalk = str(predictions), None
    truth = [str(path) for path in sorted(root.glob("gtFine/val/*/*_gtFine_labelIds.png"))]
    assert len(truth) == len(IMAGES)
    return official.evaluateImgLists([official.getPrediction(args, path) for path in truth], truth, args)


def test_iou_is_that_of_the_official_evaluator_digit_for_digit(
    config: EvaluateConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = run_evaluate(config)
    printed = capsys.readouterr().out.splitlines()
    theirs = _official(tmp_path / "cityscapes", tmp_path / "labels")
    assert set(ours["classes"]) == {name for name, score in theirs["labels"].items() if score in CLASSES.ids}
    for name, scores in ours["classes"].items():
        their_iou = 100.0 * theirs["classScores"][name]
        row = next(line for line in printed if line.startswith(f"{name}  "))  # of the table; confusions are below
        if math.isnan(their_iou):
            assert scores["iou"] is None
            assert row.split()[-2:] == ["-", "-"]
        else:
            assert scores["iou"] == their_iou
            assert row.split()[-2] == f"{their_iou:.2f}"
    mean = 100.0 * theirs["averageScoreClasses"]
    assert ours["mean_iou"] == mean
    (row,) = [line for line in printed if line.startswith("mean ")]
    assert row.split()[1] == f"{mean:.2f}"


def test_classes_that_do_not_occur_are_treated_as_the_official_evaluator_treats_them(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    ours = run_evaluate(config)["classes"]
    theirs = _official(tmp_path / "cityscapes", tmp_path / "labels")["classScores"]
    for name, expected in (("train", None), ("bus", None), ("truck", 0.0), ("rider", 0.0)):
        assert ours[name]["iou"] == expected
        assert (None if math.isnan(theirs[name]) else theirs[name]) == expected
    assert sum(scores["iou"] is not None for scores in ours.values()) == 17


def test_what_predict_writes_is_found_by_the_official_evaluator_and_scores_the_same(
    config: EvaluateConfig, tmp_path: Path
) -> None:
    out = run_predict(PredictConfig(config.checkpoint, network=NETWORK, out=tmp_path / "predictions", device="cpu"))
    ours = run_evaluate(replace(config, export=None))
    theirs = _official(tmp_path / "cityscapes", out / "labels")
    assert ours["mean_iou"] == 100.0 * theirs["averageScoreClasses"]
    assert {path.relative_to(out / "labels").as_posix() for path in (out / "labels").rglob("*.png")} == {
        f"{city}/{name}.png" for city, name in IMAGES
    }
