"""Experiments: what is tuned and how, what they conclude from cells, and that each runs and writes its report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from matplotlib.figure import Figure

from coarse_train.cli import main
from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, ModelConfig, recipe
from coarse_train.data import open_split
from coarse_train.experiments import experiment, few_masks, few_masks_verdicts, noise_map, select
from coarse_train.experiments.cell import Cell
from coarse_train.experiments.corrector import corrected
from coarse_train.experiments.experiment import ExperimentConfig, Name, Part, Result, quick, run_parts
from coarse_train.experiments.redrawn import redrawn, widened
from coarse_train.experiments.table import config_of
from coarse_train.rules import check_config

from . import data_trees


def cell(row: str, seed: int, miou: float, **more: Any) -> Cell:
    known = {"miou_validation": None, "miou_best": None, "seconds": 1.0, "iou": {}, "cm_error": None, "believed": None}
    return Cell(row, seed, miou, **{**known, "observed": None, "reads": "scores", "folder": "", **more})


def result(title: str, scores: Mapping[str, float], seeds: int = 2) -> Result:
    """Made up: every seed scores the same."""
    cells = [cell(row, seed, score, iou={"vessel": score}) for row, score in scores.items() for seed in range(seeds)]
    return Result(title, dict.fromkeys(scores, FitConfig()), cells, "test")


def _scores(rows: Mapping[str, Any], start: float = 50.0) -> dict[str, float]:
    return {row: start + place for place, row in enumerate(rows)}


def _config(name: Any, folder: Path, *, quick: bool = False) -> ExperimentConfig:
    if name != "annotators":
        return ExperimentConfig(name, quick=quick, out=folder)
    data_trees.write_chasedb1_tree(folder / "data" / "chasedb1")
    return ExperimentConfig(name, quick=quick, out=folder, data=folder / "data")


def _made_up(part: Part) -> Result:
    """Scores that rise from row to row, and matrices."""
    rows = {row: next(iter(each.values())) if isinstance(each, Mapping) else each for row, each in part.rows.items()}
    variants = [row.data for row in rows.values() if isinstance(row, FitConfig)]
    classes = open_split(variants[0], "val").classes.names
    matrix = np.eye(len(classes)).tolist()
    cells = [
        cell(
            row,
            seed,
            score,
            iou=dict.fromkeys(classes, score),
            cm_error=0.1,
            believed=matrix,
            observed=matrix,
            miou_validation=score,
            miou_best=score,
        )
        for row, score in _scores(rows).items()
        for seed in (0, 1)
    ]
    return Result(part.title, rows, cells, part.split)


def _module(name: str) -> Any:
    return experiment.import_module(f"coarse_train.experiments.{experiment.EXPERIMENTS[name]}")


@pytest.mark.parametrize("name", get_args(Name))
@pytest.mark.parametrize("small", [False, True])
def test_every_row_can_be_trained_and_rows_that_are_tuned_have_equal_trials(
    name: str, small: bool, tmp_path: Path
) -> None:
    parts = _module(name).parts(_config(name, tmp_path, quick=small))
    titles = [part.title for part in parts]
    assert len(set(titles)) == len(titles)
    for part in parts:
        trials = {row: len(each) for row, each in part.rows.items() if isinstance(each, Mapping)}
        assert len(set(trials.values())) <= 1
        assert part.tuned_as is None or part.tuned_as in titles
        assert part.tuned_as is None or parts[titles.index(part.tuned_as)].tuned_as is None
        assert " | " not in part.title
        for each in part.rows.values():
            for row in each.values() if isinstance(each, Mapping) else (each,):
                if isinstance(row, FitConfig):  # the others train something first
                    check_config(row)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tables", ["all", "first", "last"])
@pytest.mark.parametrize("name", get_args(Name))
def test_each_experiment_draws_and_concludes_from_cells_alone(name: str, tables: str, tmp_path: Path) -> None:
    module = _module(name)
    parts = module.parts(_config(name, tmp_path))
    results = [_made_up(part) for part in {"all": parts, "first": parts[:1], "last": parts[-1:]}[tables]]
    sentences = module.conclude(results)
    assert sentences
    assert all(sentence.endswith(".") for sentence in sentences)
    figure = Figure(layout="constrained")
    module.draw(results, figure)
    if tables == "all":  # the layout takes longest, and is one
        figure.savefig(tmp_path / "figure.png")


def test_a_tuned_row_is_the_best_of_its_settings_on_validation_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def run_table(rows: Mapping[str, FitConfig], seeds: tuple[int, ...], out: Path, **options: Any) -> list[Cell]:
        asked.append((options["split"], tuple(seeds)))
        return [cell(row, seed, config_of(config, seed).optim.lr) for row, config in rows.items() for seed in seeds]

    monkeypatch.setattr(experiment, "run_table", run_table)
    base = FitConfig()
    settings = {f"lr {lr}": replace(base, optim=replace(base.optim, lr=lr)) for lr in (0.1, 0.3, 0.2)}
    parts = [
        Part("one", {"plain": base, "tuned": settings}),
        Part(
            "two", {"tuned": {name: replace(row, steps=7) for name, row in settings.items()}}, tuned_as="one", seeds=1
        ),
        Part("three", {"plain": base}, split="val"),
    ]
    one, two, three = run_parts(parts, (0, 1), tmp_path)
    assert asked == [("val", (0,)), ("test", (0, 1)), ("test", (0,)), ("val", (0, 1))]
    assert one.chosen == two.chosen == {"tuned": "lr 0.3"}
    assert one.tried == {"tuned": 3}
    assert one.rows["tuned"] == settings["lr 0.3"]
    assert config_of(two.rows["tuned"], 0).steps == 7
    assert [c.seed for c in two.cells] == [0]
    assert three.chosen == {}


def test_a_table_alone_is_tuned_where_it_takes_its_settings_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[str] = []

    def run_table(rows: Mapping[str, FitConfig], seeds: tuple[int, ...], out: Path, **options: Any) -> list[Cell]:
        trained.extend(rows)
        return [cell(row, seed, config_of(config, seed).optim.lr) for row, config in rows.items() for seed in seeds]

    monkeypatch.setattr(experiment, "run_table", run_table)
    rows = {"tuned": {"a": FitConfig()}}
    parts = [Part("one", rows), Part("two", rows, tuned_as="one"), Part("three", rows), Part("four", rows)]
    assert [result.title for result in run_parts(parts, (0,), tmp_path, tables=("four", "two"))] == ["two", "four"]
    assert trained == ["one | tuned | a", "four | tuned | a", "two | tuned", "four | tuned"]
    with pytest.raises(
        ValueError, match=r"tables: expected some of one; two; three; four \(a quick run has fewer\), got five"
    ):
        run_parts(parts, (0,), tmp_path, tables=("one", "five"))


def test_a_report_of_one_table_says_so_and_takes_no_other_experiments_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_table(rows: Mapping[str, FitConfig], seeds: tuple[int, ...], out: Path, **options: Any) -> list[Cell]:
        out.mkdir(exist_ok=True)
        matrix = np.eye(5).tolist()
        more = {"cm_error": 0.1, "believed": matrix, "observed": matrix, "miou_validation": 1.0, "miou_best": 1.0}
        more["folder"] = str(out)
        return [cell(row, seed, 50.0, **more) for row in rows for seed in seeds]

    monkeypatch.setattr(experiment, "run_table", run_table)
    out = tmp_path / "one"
    command = ["experiment", "structure", "--seeds", "3", "4", "--tables", "spots", "regions", "--out", str(out)]
    assert main(command) == 0
    report = (out / "report.md").read_text()
    assert "`coarse-train experiment structure --seeds 3 4 --tables spots regions`" in report
    assert "2 of the 3 tables of this experiment. Not asked for: scribbles." in report
    assert "wins on each of regions, spots" in report
    assert "trusted as well; tuned: how" in report  # what the rows are
    assert json.loads((out / "results.json").read_text())["left_out"] == ["scribbles"]
    assert main(["experiment", "sanity", "--out", str(out)]) == 1
    assert "out: expected a folder without another experiment's results" in capsys.readouterr().err
    assert main(["experiment", "structure", "--quick", "--seeds", "7", "8", "--out", str(tmp_path / "two")]) == 0
    assert "--seeds 7 --quick" in (tmp_path / "two" / "report.md").read_text()


def test_quick_is_small() -> None:
    base = replace(recipe("mnist"), steps=600)
    part = quick(Part("one", {"plain": base, "seeded": lambda seed: base, "tuned": {"a": base, "b": base}}))
    for each in part.rows.values():
        for row in each.values() if isinstance(each, Mapping) else (each,):
            assert (config_of(row, 3).steps, config_of(row, 3).evaluate_every) == (10, 10)
            assert config_of(row, 3).data.limit == 64
    assert list(part.rows["tuned"]) == ["a"]  # type: ignore[arg-type]


# ---- what they say --------------------------------------------------------------------------------------------------


def test_the_map_says_where_the_method_loses() -> None:
    """Against the best cross-entropy, an untuned one too, and in how many seeds: a mean of three hides one that it lost."""
    ahead = {"ce_both_tuned": 80.0, "method": 85.0, "method_tuned": 86.0, "method_pen": 85.0, "supervised": 95.0}
    mixed = result("half", ahead)
    cells = [replace(c, miou=79.0 if c.seed == 1 and c.method == "method" else c.miou) for c in mixed.cells]
    first, second, third = noise_map.conclude(
        [result("majority", ahead), result("sparse", {**ahead, "ce_positive": 90.0}), replace(mixed, cells=cells)]
    )
    assert "majority: the method +5.0 points (ahead in 2 of 2 seeds) untuned and +6.0 points (ahead in 2 of 2" in first
    assert "best cross-entropy, ce_both_tuned;" in first
    assert "sparse: the method -5.0 points (ahead in 0 of 2 seeds) untuned and -4.0 points (ahead in 0 of 2" in second
    assert "best cross-entropy, ce_positive;" in second
    assert "half: the method +2.0 points (ahead in 1 of 2 seeds) untuned" in third


def test_few_masks_names_the_best_use_of_both_sides() -> None:
    scores = {"masks": 60.0, "finetune": 70.0, "corrector": 75.0, "mixed": 50.0, "pen": 80.0, "pen_nothing": 79.0}
    scores |= {"supervised": 90.0, "drawings": 40.0}
    one, nothing, dice = few_masks.conclude([result("thick, 10 masks", scores)])
    assert "the best row with a matrix or a pen, pen, has 80.0, the best without, corrector, 75.0 (+5.0)" in one
    assert "given to what lies there (pen), +1.0 over saying nothing" in nothing
    assert "pen 88.9, corrector 85.7, finetune 82.4, masks 75.0" in dice  # 2 I / (1 + I)
    scores |= {"pen_alone": 81.0, "pen_doubt": 82.5, "pen_doubt_alone": 80.0}
    one, _, doubt, _ = few_masks.conclude([result("thick, 10 masks", scores)])
    assert "pen_doubt, has 82.5" in one
    assert "near the outline saying nothing: +2.5 (pen_doubt) and -1.0 (pen_doubt_alone)" in doubt


def test_few_masks_says_what_was_hoped_for_and_what_was_missed() -> None:
    scores = {"masks": 60.0, "finetune": 82.0, "corrector": 75.0, "mixed": 50.0, "pen": 84.0, "supervised": 88.0}
    of_twenty = few_masks.conclude([result("thick, 20 masks", scores)])[1]
    assert (
        "HOPED FOR: 1 points over the best of masks, finetune, corrector, mixed; pen is +2.00 over finetune: reac"
        in of_twenty
    )
    assert "within 3 of all masks, it is 4.00 behind: NOT reached." in of_twenty
    of_six = few_masks.conclude([result("thick, 6 masks", {**scores, "supervised": 86.0})])[1]
    assert "HOPED FOR: 5 points over" in of_six
    assert "pen is +2.00 over finetune: NOT reached; within 3 of all masks, it is 2.00 behind: reached." in of_six
    of_names = few_masks.conclude([result("majority, 20 masks", {**scores, "mixed": 84.0})])[1]
    assert of_names.endswith("masks, finetune, corrector; mixed is +2.00 over finetune: reached.")  # and not the pen
    of_thin = few_masks.conclude([result("thin, 20 masks", {**scores, "corrector": 99.0})])[1]
    assert "HOPED FOR: 10 points over the best of finetune; pen is +2.00 over finetune: NOT reached." in of_thin


def test_regret_is_told_apart_for_seeds_that_the_rule_was_chosen_by() -> None:
    one = result("thick", {"all trusted": 80.0, "pen": 90.0, select.CHOSEN: 87.0}, seeds=8)
    cells = [replace(c, miou=89.5) if c.method == select.CHOSEN and c.seed >= 6 else c for c in one.cells]
    honest, chosen_by, second = select.conclude([replace(one, cells=cells)])
    assert (
        "on seeds 6 7, which had no part in the choice of the rule: 0.5 points on average over 1 noises, wi" in honest
    )
    assert (
        "on seeds 0 1 2 3 4 5, by which the rule was chosen: 3.0 points on average over 1 noises, NOT within"
        in chosen_by
    )
    assert (
        "regret +2.4 (+3.0, +3.0, +3.0, +3.0, +3.0, +3.0, +0.5, +0.5); best pen 90.0, worst all trusted 80.0." in second
    )
    assert (
        len(select.conclude([result("thick", {"pen": 90.0, select.CHOSEN: 87.0}, seeds=3)])) == 2
    )  # nothing of no seeds


def test_luck_of_one_seed_makes_up_for_no_regret_of_another() -> None:
    lucky = {"all trusted": 80.0, "pen": 90.0, select.CHOSEN: 95.0}
    assert select.regrets(result("thick", lucky)) == {0: 0.0, 1: 0.0}


# ---- drawings that they make ----------------------------------------------------------------------------------------


def _maps(records: Any) -> list[tuple[Any, Any]]:
    return [(record.positive, record.mask) for record in records]


@pytest.mark.slow
def test_a_corrector_learns_to_move_outlines_back(tmp_path: Path) -> None:
    base = replace(recipe("mnist"), positive=DrawingsConfig(), negative=DrawingsConfig(weight=0.0), threads=1)
    data = DataConfig(dataset="mnist", variant="thick", limit=60, supervision="mixed", dense_images=20)
    config = replace(base, data=data)
    taught = corrected(config, 0, tmp_path / "drawn", lr=8e-3, steps=100)
    assert taught.data.positives == tmp_path / "drawn"
    before, after = open_split(data, "train"), open_split(taught.data, "train")

    def too_much(source: Any) -> float:
        """Drawn area of objects by their own, less 1."""
        records = [source.load(index) for index in range(60)]
        drawn, true = (np.mean([(part != 0).mean() for part in parts]) for parts in zip(*_maps(records), strict=True))
        return float(drawn / true - 1)

    assert too_much(before) > 0.5
    assert abs(too_much(after)) < 0.4 * too_much(before)
    files = {path: path.read_bytes() for path in (tmp_path / "drawn" / "train").iterdir()}
    assert corrected(config, 0, tmp_path / "drawn", lr=8e-3, steps=100) == taught  # what is there is taken
    assert all(path.read_bytes() == content for path, content in files.items())


def test_vessels_of_a_brush_are_drawn_once_and_are_too_wide(tmp_path: Path) -> None:
    root = data_trees.write_chasedb1_tree(tmp_path / "chase")
    data = DataConfig(dataset="chasedb1", root=root)
    source = open_split(data, "train")
    made = redrawn(source, tmp_path / "brush", lambda mask, rng: widened(mask, 1, 2).astype(np.uint8), known_by=2)
    drawn = open_split(replace(data, positives=made), "train")
    for index in range(len(source)):
        record = drawn.load(index)
        assert record.positive is not None
        assert record.mask is not None
        assert ((record.positive == 1) >= (record.mask == 1)).all()
        assert (record.positive == 1).sum() > (record.mask == 1).sum()
    assert redrawn(source, tmp_path / "brush", lambda mask, rng: mask, known_by=2) == made
    assert redrawn(source, tmp_path / "brush", lambda mask, rng: mask, known_by=3) != made  # and not for another brush
    assert (open_split(replace(data, positives=made), "train").load(0).positive == drawn.load(0).positive).all()


def test_it_is_said_how_far_drawings_that_were_moved_back_are_from_the_masks(tmp_path: Path) -> None:
    root = data_trees.write_chasedb1_tree(tmp_path / "chase")
    data = DataConfig(dataset="chasedb1", root=root)
    made = redrawn(
        open_split(data, "train"),
        tmp_path / "brush",
        lambda mask, rng: widened(mask, 1, 2).astype(np.uint8),
        known_by=2,
    )
    config = FitConfig(data=replace(data, positives=made), negative=DrawingsConfig(weight=0.0))
    rows = {"drawings": config, "pen": replace(config, positive=DrawingsConfig(pen=2.0)), "masks": config}
    rows["finetune"] = rows["supervised"] = rows["masks"]
    fake = result("chase brush, 2 masks", dict.fromkeys(rows, 50.0), seeds=1)
    fake = replace(fake, rows=rows)
    before, after = (few_masks_verdicts.mended_dice(fake, row) for row in ("drawings", "pen"))
    assert before < 75
    assert after > 90
    assert f"as each row reads them: drawings {before:.1f}, pen {after:.1f}." in few_masks.conclude([fake])[-1]


def test_photographs_are_left_out_where_they_are_not_there(tmp_path: Path) -> None:
    without = few_masks.parts(ExperimentConfig("few-masks", out=tmp_path))
    assert not any("chase" in part.title or "camvid" in part.title for part in without)
    data_trees.write_chasedb1_tree(tmp_path / "data" / "chasedb1")
    found = few_masks.parts(ExperimentConfig("few-masks", out=tmp_path, data=tmp_path / "data"))
    assert sum("chase" in part.title for part in found) == 4


@pytest.mark.slow
def test_names_first_trains_twice(tmp_path: Path) -> None:
    base = replace(
        noise_map.canvases("thick_names"),
        negative=DrawingsConfig(weight=0.0),
        steps=2,
        model=ModelConfig(widths=(4, 8)),
        data=DataConfig(dataset="mnist", variant="thick_names", limit=16),
    )
    rows = few_masks.rows_of(base, 4, recipe("mnist").positive, tmp_path, 2)
    settings = rows["names_first"]
    assert isinstance(settings, Mapping)
    config = config_of(settings["mask weight 1"], 1)
    assert config.data.positives is not None
    assert len(list((config.data.positives / "train").iterdir())) == 16
    assert config.positive.pen == "auto"
    assert config.positive.cm == "none"
    assert config.mask_weight == 1
