"""Experiments on confusion matrices: known noise, the weight of the trace, fields and structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from coarse_train.config import FitConfig
from coarse_train.data.mnist import PROCESSES
from coarse_train.experiments import sanity, structure, trace_weight
from coarse_train.experiments.cell import Cell
from coarse_train.experiments.experiment import ExperimentConfig, Result
from coarse_train.experiments.table import config_of
from coarse_train.rules import check_config


def _cell(row: str, miou: float, cm_error: float | None = None, *, seed: int = 0, **more: Any) -> Cell:
    known = {"miou_validation": miou, "miou_best": miou, "seconds": 1.0, "iou": {}, "believed": None, "observed": None}
    return Cell(row, seed, miou, cm_error=cm_error, reads="scores", folder="", **{**known, **more})


def _result(title: str, cells: Sequence[Cell]) -> Result:
    return Result(title, {cell.method: FitConfig() for cell in cells}, cells, "test")


@pytest.mark.parametrize("module", [sanity, trace_weight, structure])
def test_rows_differ_in_what_they_are_about_alone_and_read_no_mask(module: Any) -> None:
    for part in module.parts(ExperimentConfig("sanity")):
        tried = {len(row) for row in part.rows.values() if isinstance(row, Mapping)}
        assert len(tried) <= 1  # as many trials for every row
        assert not tried or all(isinstance(row, Mapping) for row in part.rows.values())
        settings = [row if isinstance(row, Mapping) else {"": row} for row in part.rows.values()]
        configs = [config_of(config, 0) for each in settings for config in each.values()]
        for config in configs:
            check_config(config)
            assert (config.data.supervision, config.data.dense_images, config.select_with) == ("drawings", 0, 0)
            for name in ("data", "model", "steps", "batch_size", "negative"):
                assert getattr(config, name) == getattr(configs[0], name)
            assert config.negative.cm == "none"


# --- sanity -------------------------------------------------------------------------------------------------------------

_TRUE = [[1.0, 0.6], [0.0, 0.4]]


def _sanity(title: str, errors: Sequence[float]) -> list[str]:
    cells = [
        _cell("method", 92.0, error, seed=seed, believed=_TRUE, observed=_TRUE) for seed, error in enumerate(errors)
    ]
    return sanity.conclude([_result(title, [*cells, _cell("method_fast", 93.0, 0.004), _cell("identity", 95.0)])])


def test_a_matrix_is_found_where_every_seed_is_far_closer_than_the_identity() -> None:
    (found,) = _sanity("binary_names", (0.01, 0.03))
    assert "the matrix is found" in found
    assert "0.020" in found
    assert "0.300" in found  # the identity's: 1.2 / 4
    assert "from what the process states 0.000;" in found
    assert "92.0" in found
    assert "95.0" in found
    (missed,) = _sanity("binary_names", (0.01, 0.08))
    assert "the matrix is NOT found" in missed


def test_names_may_be_found_where_what_is_left_out_is_not() -> None:
    observed = [[1.0, 0.5, 0.5], [0.0, 0.3, 0.0], [0.0, 0.2, 0.5]]
    names = [[1.0, 0.0, 0.0], [0.0, 0.6, 0.0], [0.0, 0.4, 1.0]]
    for believed, verdict, error in ((names, "found in its names alone", 0.0), (np.eye(3).tolist(), "NOT found", 0.2)):
        cell = _cell("method", 90.0, 0.2, believed=believed, observed=observed)
        assert sanity.names_error(cell) == pytest.approx((error, 0.2))
        cells = [cell, _cell("method_fast", 90.0, 0.2), _cell("identity", 90.0)]
        (sentence,) = sanity.conclude([_result("majority", cells)])
        assert f"the matrix is {verdict}:" in sentence
        assert f"names of objects by {error:.3f}, the identity's by 0.200" in sentence


def test_what_nobody_can_identify_is_shown_as_such() -> None:
    (sentence,) = _sanity("alike", (0.2,))
    assert "NOT found" in sentence
    assert "nobody can identify" in sentence
    assert "states" not in sentence


def test_the_identitys_error_counts_the_classes_that_were_drawn_on() -> None:
    observed = [[0.8, 0.0, 0.3], [0.2, 0.0, 0.0], [0.0, 0.0, 0.7]]
    assert sanity.identity_error(_cell("method", 0.0, observed=observed)) == pytest.approx((0.4 + 0.6) / 6)


def test_no_drawing_of_alike_tells_its_matrix_from_the_identity() -> None:
    """With A = I the network would have to predict what A says of a pixel; a negative drawing speaks against that where it
    rules out what a positive one wrongly says."""
    for preset in sanity.PRESETS:
        process = PROCESSES[preset]
        spoken_against = (np.array(process.confusion).T * np.array(process.transition)).sum(1)
        assert (spoken_against.max() > 0) == (preset != "alike")


# --- trace-weight -------------------------------------------------------------------------------------------------------


def _trace(scores: Mapping[float, tuple[float, float]], **fields: Mapping[float, tuple[float, float]]) -> Result:
    """Weight -> last and best step; the same for all fields but those that are given."""
    cells = [
        _cell(f"{field}, {weight:g}", last - 1 + seed / 8, 0.01, seed=seed, miou_validation=last, miou_best=best)
        for field in trace_weight.FIELDS
        for weight, (last, best) in fields.get(field, scores).items()
        for seed in (-1, 1)
    ]
    return _result("majority", cells)


_FLAT = {0.0: (88.0, 88.0), 0.001: (88.5, 88.5), 0.01: (88.0, 89.0), 0.1: (85.0, 88.0), 1.0: (2.0, 40.0)}


def test_a_weight_is_stable_near_the_best_weight_and_its_own_best_step() -> None:
    assert trace_weight.stable(_trace(_FLAT), "global") == [0.0, 0.001, 0.01]
    with_falls = {0.0: (80.0, 83.0), 0.001: (81.0, 82.0), 0.01: (81.0, 85.0), 0.1: (70.0, 70.0), 1.0: (1.0, 1.0)}
    assert trace_weight.stable(_trace(_FLAT, image=with_falls), "image") == [0.001]


def test_the_conclusion_says_where_no_weight_is_stable_and_whether_the_term_helps() -> None:
    falls = {weight: (30.0, 60.0) for weight in trace_weight.WEIGHTS}
    sentences = trace_weight.conclude([_trace(_FLAT, pixel=falls)])
    assert sentences[0].startswith("majority, global: stable at 0 0.001 0.01.")
    assert "1: 1.0 (matrix off by 0.010)" in sentences[0]
    assert sentences[3].startswith("majority, pixel: stable at no weight.")
    assert "stable for every field: no weight." in sentences[4]
    assert "The term helps: at most +0.5 points over none (global, 0.001, the best of 16)" in sentences[4]
    worse = {weight: (88.0 - 10 * weight, 88.0) for weight in trace_weight.WEIGHTS}
    assert "does NOT help" in trace_weight.conclude([_trace(worse)])[-1]
    assert "stable for every field: 0 0.001 0.01 0.1." in trace_weight.conclude([_trace(worse)])[-1]


# --- structure ----------------------------------------------------------------------------------------------------------


def _structure(title: str, means: Mapping[str, float], spread: float = 1.0) -> Result:
    return _result(
        title,
        [
            _cell(row, mean + shift, None if row == "none" else (100 - mean) / 1000, seed=seed)
            for row, mean in means.items()
            for seed, shift in enumerate((-spread / 2, spread / 2))
        ],
    )


def test_the_winner_of_each_kind_of_drawing_is_named_with_its_lead() -> None:
    regions = _structure("regions", {"pixel": 50.0, "image": 60.0, "global": 88.0, "none": 70.0})
    spots = _structure("spots", {"pixel": 50.0, "image": 67.0, "global": 67.5, "none": 68.0})
    first, second, last = structure.conclude([regions, spots])
    assert "regions: global wins with 88.0, +28.0 over image, more than seeds differ (1.0)" in first
    assert "trusted drawings 70.0 (+18.0); last is pixel, 50.0." in first
    assert "closest with global: off by 0.012" in first
    assert "+0.5 over image, NOT clearly more than seeds differ (1.0); trusted drawings 68.0 (-0.5)" in second
    assert last == "global wins on each of regions, spots."
    one_seed = _structure("regions", {"image": 60.0, "global": 88.0, "none": 70.0}, spread=0.0)
    assert "NOT clearly more" in structure.conclude([one_seed])[0]


def test_no_structure_that_wins_everywhere() -> None:
    regions = _structure("regions", {"image": 60.0, "global": 88.0, "none": 70.0})
    spots = _structure("spots", {"image": 69.0, "global": 67.0, "none": 68.0})
    assert structure.conclude([regions, spots])[-1] == (
        "No structure wins on every kind of drawing: regions global, spots image."
    )
