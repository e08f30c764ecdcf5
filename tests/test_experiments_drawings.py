"""The experiments `negatives` and `annotators`: a few steps end to end, and what they conclude from cells that are made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure

from coarse_kernels import Drawings, annotation_objective, uniform_transition
from coarse_train.config import DataConfig, FitConfig
from coarse_train.data import IGNORE, open_split
from coarse_train.data.mnist import AREAS
from coarse_train.data.segmentation import SegmentationData
from coarse_train.experiments import annotators, experiment, negatives
from coarse_train.experiments.cell import Cell
from coarse_train.experiments.experiment import ExperimentConfig, Name, Part, Result, run_experiment
from coarse_train.experiments.table import Row, config_of

from .data_trees import write_camvid_tree, write_chasedb1_tree, write_cityscapes_tree


def cells_of(means: Mapping[str, float]) -> list[Cell]:
    """Of two seeds, one point apart."""
    return [
        Cell(row, seed, mean + seed - 0.5, None, None, 1.0, {}, None, None, None, "scores", "")
        for row, mean in means.items()
        for seed in (0, 1)
    ]


def made_up(
    title: str, means: Mapping[str, float], rows: Mapping[str, Row] | None = None, split: str = "test"
) -> Result:
    return Result(title, rows or dict.fromkeys(means, FitConfig()), cells_of(means), split)


def configs(part: Part) -> dict[str, FitConfig]:
    """Of every row the first setting."""
    return {
        row: config_of(next(iter(each.values())) if isinstance(each, Mapping) else each, 0)
        for row, each in part.rows.items()
    }


def tiny(part: Part) -> Part:
    """Two steps on eight images, one setting a row."""

    def smaller(config: FitConfig) -> FitConfig:
        data = replace(config.data, limit=8, workers=0, crop=None if config.data.crop is None else (16, 16))
        return replace(config, steps=2, evaluate_every=2, batch_size=2, precision="fp32", data=data)

    return replace(part, rows={row: smaller(config) for row, config in configs(part).items()})


def run_tiny(name: Name, data: Path | None, out: Path, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    monkeypatch.setattr(experiment, "quick", tiny)
    results = run_experiment(ExperimentConfig(name, quick=True, data=data, out=out, jobs=1))
    written = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in written["rows"]] == [f"{r.title} | {row}" for r in results for row in r.rows]
    assert (out / "figure.png").read_bytes()[:4] == b"\x89PNG"
    report = (out / "report.md").read_text()
    assert all(sentence in report for sentence in written["conclusion"])
    return results


# ---- negatives ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_negatives_run_on_all_data_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_camvid_tree(tmp_path / "data" / "camvid")
    write_cityscapes_tree(tmp_path / "data" / "cityscapes")
    results = run_tiny("negatives", tmp_path / "data", tmp_path / "out", monkeypatch)
    assert [(result.title, result.split) for result in results] == [
        ("MNIST, area 0.05", "test"),
        ("MNIST, area 1", "test"),
        ("CamVid, area 0.6", "val"),
        ("Cityscapes, area 0.6", "val"),
    ]
    for result in results:
        assert all(0 <= cell.miou <= 100 for cell in result.cells)
        assert all(("training" in cell.reads) == (cell.method == "supervised") for cell in result.cells)
    assert results[0].mean("supervised") == results[1].mean("supervised")  # one run


def test_negatives_leave_out_what_is_not_there_and_say_so() -> None:
    found = negatives.parts(ExperimentConfig("negatives"))
    assert [part.title for part in found] == [f"MNIST, area {area:g}" for area in AREAS]
    means = {"ce_positive": 70.0, "ce_negative": 80.0, "ce_both": 81.0, "supervised": 99.0}
    sentences = negatives.conclude([made_up("MNIST, area 0.05", means)])
    assert [sentence.split(":")[0] for sentence in sentences[1:]] == ["CamVid", "Cityscapes"]


def test_rows_of_negatives_differ_in_what_they_are_about_alone(tmp_path: Path) -> None:
    write_camvid_tree(tmp_path / "camvid")
    write_cityscapes_tree(tmp_path / "cityscapes")
    found = negatives.parts(ExperimentConfig("negatives", data=tmp_path))
    assert len(found) == len(AREAS) + 3
    for part in found:
        rows = configs(part)
        counts = {len(each) for each in part.rows.values() if isinstance(each, Mapping)}
        assert counts == ({4} if part.title.startswith("MNIST") else set())  # as many trials each, none on val
        for row, config in rows.items():
            assert (config.model, config.steps, config.batch_size) == (
                rows["supervised"].model,
                rows["supervised"].steps,
                rows["supervised"].batch_size,
            )
            assert (config.positive.weight == 0) == (row == "ce_negative")
            assert (config.negative.weight == 0) == row.endswith("_positive")
            assert (config.positive.cm != "none") == row.startswith("method")
            assert config.negative.cm == "none"
            assert (config.data.supervision == "masks") == (row == "supervised")
            assert config.select_with == 0
    assert all(config.data.limit == 500 for config in configs(found[-1]).values())


def test_negatives_conclude_what_is_claimed_where_it_holds() -> None:
    digits = {
        "ce_positive": 77.2,
        "ce_negative": 80.0,
        "ce_both": 82.5,
        "method_positive": 90.0,
        "method_both": 96.0,
        "supervised": 99.0,
    }
    streets = {"ce_positive": 40.0, "ce_negative": 41.0, "ce_both": 46.0, "method_both": 48.0, "supervised": 50.0}
    added, streets_added, *_, bar, share = negatives.conclude(
        [made_up("MNIST, area 1", digits), made_up("CamVid, area 0.6", streets, split="val")]
    )
    assert "negatives add +5.3 points by cross-entropy and +6.0 points through a matrix" in added
    assert "claim of about 5 holds by cross-entropy, holds through a matrix" in added
    assert "are +6.0 against the better one alone, method_positive 90.0" in added
    assert "negatives add +6.0 points by cross-entropy" in streets_added
    assert "(method_both) 96.0, above 95" in bar
    assert "method_both has 96.0 % of the supervised score at equal steps, at least 95 %" in share
    assert "ce_positive 80.0, ce_negative 82.0, ce_both 92.0." in share


def test_negatives_conclude_where_the_claim_does_not_hold() -> None:
    digits = {
        "ce_positive": 90.0,
        "ce_negative": 97.0,
        "ce_both": 91.0,
        "method_positive": 94.0,
        "method_both": 93.0,
        "supervised": 99.0,
    }
    streets = {"ce_positive": 40.0, "ce_negative": 41.0, "ce_both": 40.0, "method_both": 30.0, "supervised": 50.0}
    added, *_, bar, share = negatives.conclude(
        [made_up("MNIST, area 1", digits), made_up("CamVid, area 0.6", streets, split="val")]
    )
    assert "does NOT hold by cross-entropy, does NOT hold through a matrix" in added
    assert "are -4.0 against the better one alone, ce_negative 97.0" in added
    assert "93.0, NOT above 95" in bar
    assert "has 60.0 % of the supervised score at equal steps, NOT 95 %" in share


def test_negatives_are_drawn_with_a_panel_for_each_data_set() -> None:
    means = {"ce_positive": 70.0, "ce_both": 81.0, "supervised": 99.0}
    figure = Figure()
    negatives.draw(
        [made_up(f"MNIST, area {area:g}", means) for area in AREAS] + [made_up("CamVid, area 0.6", means)], figure
    )
    digits, streets = figure.axes
    assert [axis.get_title() for axis in (digits, streets)] == ["MNIST", "CamVid"]
    assert len(digits.lines) == len(means)
    assert [label.get_text() for label in digits.get_xticklabels()] == ["0.01", "0.05", "0.25", "0.5", "1"]


def test_drawings_are_simulated_at_any_ratio_that_a_config_names(tmp_path: Path) -> None:
    config = DataConfig(dataset="camvid", root=write_camvid_tree(tmp_path, size=(48, 64)), simulate="0.25")
    dataset = SegmentationData(open_split(config, "train"), config, training=True)
    for k in range(len(dataset)):
        sample = dataset[k]
        assert 0.1 < (sample.positive != IGNORE).float().mean() < 0.4
    with pytest.raises(ValueError, match=r"simulate: ratio: expected a number from 0\.01 to 1, got 2"):
        SegmentationData(dataset.source, replace(config, simulate="2"), training=True)


# ---- annotators ---------------------------------------------------------------------------------------------------


@pytest.fixture
def chasedb1(tmp_path: Path) -> Path:
    return write_chasedb1_tree(tmp_path / "data" / "chasedb1").parent


@pytest.mark.slow
def test_annotators_run(chasedb1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = run_tiny("annotators", chasedb1, tmp_path / "out", monkeypatch)
    assert result.split == "test"
    folder = {cell.method: Path(cell.folder) for cell in result.cells}
    steps = {row: json.loads((path / "metrics.jsonl").read_text().splitlines()[0]) for row, path in folder.items()}
    assert {"positive_nll", "negative_nll"} <= steps["both_matrices"].keys()
    assert {"positive_nll", "mask_nll"} <= steps["mixed"].keys()
    assert steps["first"].keys() & {"positive_nll", "negative_nll"} == set()
    assert all(("training" in cell.reads) == (cell.method in _ROWS_WITH_MASKS) for cell in result.cells)


_ROWS_WITH_MASKS = {"masks", "ce_mixed", "finetune", "mixed", "mixed_finetune", "pen_image", "first"}


def test_annotators_need_two_observers(tmp_path: Path) -> None:
    for data in (None, tmp_path):
        with pytest.raises(ValueError, match=r"data: expected a folder with chasedb1, .*, got"):
            annotators.parts(ExperimentConfig("annotators", data=data))


def test_masks_of_the_first_observer_are_read_where_a_row_says_so_alone(chasedb1: Path) -> None:
    (part,) = annotators.parts(ExperimentConfig("annotators", data=chasedb1))
    for row, config in configs(part).items():
        supervision = config.data.supervision
        assert (supervision != "drawings") == (row in _ROWS_WITH_MASKS)
        assert config.data.dense_images == (annotators.MASKS if row in _ROWS_WITH_MASKS - {"first"} else 0)
        assert (config.data.variant == "observers") == row.startswith("both") == (config.negative.weight > 0)


def test_an_observer_in_the_place_of_negative_drawings_is_a_second_kind_of_positive_ones(chasedb1: Path) -> None:
    """-log (A p)[drawn], with the matrix that is on the negatives and the transition of a run."""
    config = DataConfig(dataset="chasedb1", root=chasedb1 / "chasedb1", variant="observers")
    record = open_split(config, "train").load(0)
    assert record.mask is not None
    assert record.negative is not None
    first, other = (torch.from_numpy(labels)[None] for labels in (record.mask, record.negative[0]))
    torch.manual_seed(0)
    logits, matrix = torch.randn(1, 2, *first.shape[1:]), torch.randn(1, 2, 2, 1, 1)
    as_positive = annotation_objective(logits, [Drawings(first, matrix)])
    as_negative = annotation_objective(logits, [Drawings(other, matrix, uniform_transition(2))])
    assert as_positive.loss == pytest.approx(as_negative.loss)


def test_agreement_is_the_mean_iou_of_drawings_and_masks(chasedb1: Path) -> None:
    data = DataConfig(dataset="chasedb1", root=chasedb1 / "chasedb1")
    counts = torch.zeros(2, 2)
    source = open_split(data, "test")
    for index in range(len(source)):
        record = source.load(index)
        assert record.positive is not None
        assert record.mask is not None
        for true in (0, 1):
            for drawn in (0, 1):
                counts[true, drawn] += int(((record.mask == true) & (record.positive == drawn)).sum())
    iou = counts.diag() / (counts.sum(0) + counts.sum(1) - counts.diag())
    assert annotators.agreement([source]) == pytest.approx(100 * float(iou.mean()), abs=1e-4)


@pytest.mark.parametrize("shift", [-3.0, 3.0])
def test_annotators_conclude_whether_the_second_observer_is_surpassed(chasedb1: Path, shift: float) -> None:
    (part,) = annotators.parts(ExperimentConfig("annotators", data=chasedb1))
    rows = configs(part)
    observer = annotators.agreement([open_split(rows["second"].data, "test")])
    means = dict.fromkeys(rows, observer + shift)
    means["second_global"] += 2
    means["mixed"] -= 1
    said, bar, matrix, _ = annotators.conclude([made_up(part.title, means, rows)])
    assert f"has {observer:.1f} mean IoU" in said
    above, below = bar.split("; NOT above: ")
    assert ("ce_mixed" in above, "ce_mixed" in below) == (shift > 0, shift < 0)
    assert "nothing" in (below if shift > 0 else above)
    assert "+2.0 (no masks), +0.0 (no masks, on a grid), -1.0 (3 masks)" in matrix


@pytest.mark.parametrize("quick", [False, True])
def test_a_folder_without_the_observers_is_named_and_nothing_is_made_up_instead(tmp_path: Path, quick: bool) -> None:
    with pytest.raises(ValueError, match=r"data: expected a folder with chasedb1, .*, got "):
        annotators.parts(ExperimentConfig("annotators", quick=quick, data=tmp_path, out=tmp_path / "out"))
    assert not (tmp_path / "out").exists()
