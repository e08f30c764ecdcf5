"""Drawings as a hurried person makes them: as much area as asked for, errors that are known, files that are the same again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import contourpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from coarse_train.commands import simulate as command
from coarse_train.commands.simulate import SimulateConfig, run_simulate
from coarse_train.data import IGNORE, Record, Source
from coarse_train.data.classes import Classes
from coarse_train.simulate import (
    LEVELS,
    Mix,
    Process,
    Strokes,
    draw_coarse,
    generator_for,
    level,
    others,
    pair_counts,
    shares,
    swapped,
)
from coarse_train.simulate.shapes import KINDS, douglas_peucker

CAMVID = Path(os.environ.get("COARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "camvid"
EXACT = Strokes(1.0, Mix(exact=1.0), smallest=0.0)

# What one image's labelled area by known area must lie in, positive and negative. Negative drawings stay below where they
# keep off the class that they name.
BANDS = {
    "scribble": ((0.009, 0.011), (0.009, 0.011)),
    "spots": ((0.047, 0.053), (0.047, 0.053)),
    "sketch": ((0.23, 0.26), (0.19, 0.26)),
    "coarse": ((0.54, 0.62), (0.5, 0.62)),
    "full": ((1.0, 1.0), (0.85, 1.0)),
}


def _scene(seed: int, shape: tuple[int, int] = (160, 240), classes: int = 8, objects: int = 30) -> np.ndarray:
    """Ellipses of all sizes on top of each other."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, np.uint8)
    for _ in range(objects):
        radius = shape[0] * np.exp(rng.uniform(np.log(0.03), np.log(0.4)))
        flat, row, column = rng.uniform(0.4, 2.5), rng.integers(shape[0]), rng.integers(shape[1])
        mask[((rows - row) / radius) ** 2 + ((columns - column) / radius / flat) ** 2 < 1] = rng.integers(classes)
    return mask


def _disc(radius: int) -> np.ndarray:
    side = 4 * radius + 1
    rows, columns = np.mgrid[:side, :side] - 2 * radius
    return (rows**2 + columns**2 <= radius**2).astype(np.uint8)


def _squares(label: int, count: int = 60) -> np.ndarray:
    """Squares of one class, each a region of its own since unknown pixels lie between."""
    mask = np.full((8, 8 * count), IGNORE, np.uint8)
    for k in range(count):
        mask[1:7, 8 * k + 1 : 8 * k + 7] = label
    return mask


def _ratio(drawing: np.ndarray, mask: np.ndarray) -> float:
    return float(np.count_nonzero(drawing != IGNORE) / np.count_nonzero(mask != IGNORE))


def _check_bands(name: str, masks: list[np.ndarray], num_classes: int) -> None:
    (low, high), (negative_low, negative_high) = BANDS[name]
    process = level(name, num_classes)
    for seed, mask in enumerate(masks):
        positive, negative = draw_coarse(mask, process, np.random.default_rng(seed))
        assert low <= _ratio(positive, mask) <= high
        for layer in negative:
            assert negative_low <= _ratio(layer, mask) <= negative_high


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", LEVELS)
def test_a_level_labels_the_area_that_it_says(name: str) -> None:
    _check_bands(name, [_scene(seed) for seed in range(4)], 8)


@pytest.mark.sampled(5)
@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}; COARSE_DATA names its parent folder")
@pytest.mark.parametrize("name", LEVELS)
def test_a_level_labels_the_area_that_it_says_on_camvid(name: str) -> None:
    masks = [np.array(Image.open(path)) for path in sorted((CAMVID / "valannot").glob("*.png"))[::26]]
    assert len(masks) == 4
    for mask in masks:
        mask[mask == 11] = IGNORE
    _check_bands(name, masks, 11)


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.12, 0.4, 0.8, 0.9, 1])
def test_any_ratio_is_reached(ratio: float) -> None:
    mask = _scene(3)
    positive, negative = draw_coarse(mask, level(ratio, 8), np.random.default_rng(0))
    assert _ratio(positive, mask) == pytest.approx(ratio, rel=0.1)
    assert all(_ratio(layer, mask) == pytest.approx(ratio, rel=0.15) for layer in negative)


def test_a_ratio_may_be_a_text() -> None:
    assert level("0.3", 4).positive == level(0.3, 4).positive
    assert level("0.3", 4).positive.mix == LEVELS["sketch"][0].mix


def _drawn(kind: str, radius: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    region = _disc(radius).astype(bool)
    depth = ndimage.distance_transform_edt(region)
    return region, KINDS[kind](region, depth, share * region.sum(), 3.0, np.random.default_rng(seed))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["dilated", "shifted", "polygon"])
def test_an_error_is_as_large_as_the_object(kind: str) -> None:
    """The part of a disc that is drawn wrongly is about the same for a radius of 8 and of 80 pixels; with errors of a
    fixed number of pixels it would be ten times smaller for the large one."""
    wrong = []
    for radius in (8, 80):
        drawings = [_drawn(kind, radius, 1.0, seed) for seed in range(30)]
        wrong.append(np.mean([(region != drawn).sum() / region.sum() for region, drawn in drawings]))
    assert wrong[1] > 0.03
    assert 0.5 < wrong[0] / wrong[1] < 2.5


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_draws_the_area_that_is_left_for_it(kind: str) -> None:
    share = 0.05 if kind in ("scribble", "spots") else 0.5
    for seed in range(10):
        region, drawn = _drawn(kind, 40, share, seed)
        assert drawn.dtype == bool
        assert 0.7 * share < drawn.sum() / region.sum() < 1.3 * share


def test_eroded_and_spots_and_fractures_stay_inside() -> None:
    for kind, share in (("eroded", 0.5), ("spots", 0.05), ("fractured", 0.5), ("exact", 0.5)):
        for seed in range(10):
            region, drawn = _drawn(kind, 40, share, seed)
            assert (drawn & ~region).sum() <= 0.005 * region.sum(), kind


def test_a_dilated_drawing_covers_the_region() -> None:
    for seed in range(10):
        region, drawn = _drawn("dilated", 40, 1.0, seed)
        assert not (region & ~drawn).any()
        assert drawn.sum() > 1.05 * region.sum()


def test_a_shifted_drawing_lies_elsewhere() -> None:
    for seed in range(10):
        region, drawn = _drawn("shifted", 40, 1.0, seed)
        moved = np.hypot(*np.subtract(ndimage.center_of_mass(drawn), ndimage.center_of_mass(region)))
        assert 1.5 < moved < 8  # 0.03 to 0.09 of 71 pixels


def test_a_fractured_drawing_has_gaps() -> None:
    pieces = [ndimage.label(_drawn("fractured", 40, 0.5, seed)[1], np.ones((3, 3)))[1] for seed in range(40)]
    assert set(pieces) == {1, 2}


def test_a_polygon_has_few_corners() -> None:
    """A jagged outline (a disc plus noise) becomes about a dozen straight edges."""
    rng = np.random.default_rng(0)
    region = _disc(60).astype(bool) & (ndimage.distance_transform_edt(_disc(60)) > rng.integers(1, 5, (241, 241)))
    depth = ndimage.distance_transform_edt(region)
    drawn = KINDS["polygon"](region, depth, float(region.sum()), 3.0, rng)
    assert drawn.sum() > 0.85 * region.sum()
    corners = []
    for shape in (region, drawn):
        outline = max(contourpy.contour_generator(z=shape.astype(np.float32)).lines(0.5), key=len)
        corners.append(len(douglas_peucker(np.asarray(outline), 1.0)))
    assert corners[0] > 60
    assert 3 <= corners[1] < 25


def test_douglas_peucker_keeps_corners_only() -> None:
    side = np.arange(20.0)
    square = np.concatenate(
        [
            np.stack([side, 0 * side], 1),
            np.stack([0 * side + 20, side], 1),
            np.stack([20 - side, 0 * side + 20], 1),
            np.stack([0 * side, 20 - side], 1),
            [[0.0, 0.0]],
        ]
    )
    square[5, 1] = 0.4  # within the tolerance
    corners = douglas_peucker(square, 0.5)
    assert sorted(map(tuple, corners.tolist())) == [(0, 0), (0, 20), (20, 0), (20, 20)]


def test_a_scribble_is_as_wide_as_the_pen_and_follows_a_bent_region() -> None:
    """In the letter L a straight line between its ends would leave it."""
    region = np.zeros((120, 120), bool)
    region[10:110, 10:40] = True
    region[80:110, 10:110] = True
    depth = ndimage.distance_transform_edt(region)
    for seed in range(10):
        drawn = KINDS["scribble"](region, depth, 500.0, 4.0, np.random.default_rng(seed))
        assert (drawn & region).sum() > 0.95 * drawn.sum()
        assert ndimage.distance_transform_edt(drawn).max() <= 5  # two strokes may cross
        assert 350 < drawn.sum() < 600


def _confusion(drawing: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) [drawn, true]."""
    return shares(pair_counts(drawing, mask, classes))


def _transition(negative: np.ndarray, mask: np.ndarray, classes: int) -> np.ndarray:
    """(C, C) [true, named] of (..., K, H, W) on (..., H, W)."""
    return shares(pair_counts(negative, np.broadcast_to(mask[..., None, :, :], negative.shape), classes)).T


def _exact_process(confusion: np.ndarray, **options: float | np.ndarray) -> Process:
    process = level("full", len(confusion), confusion=confusion, **options)  # type: ignore[arg-type]
    return Process("exact", EXACT, EXACT, process.confusion, process.transition, process.error, 4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("true", [0, 1, 2])
def test_classes_are_confused_as_the_matrix_says(true: int) -> None:
    """600 regions drawn exactly: each rate within 4 standard deviations; [drawn, true], not the other way round."""
    confusion = np.array([[0.7, 0.0, 0.5], [0.2, 1.0, 0.1], [0.1, 0.0, 0.4]])
    process, rng = _exact_process(confusion), np.random.default_rng(true)
    mask = np.stack([_squares(true)] * 10)
    drawn = np.stack([draw_coarse(one, process, rng)[0] for one in mask])
    expected = confusion[:, true]
    assert np.all(
        np.abs(_confusion(drawn, mask, 3)[:, true] - expected) <= 4 * np.sqrt(expected * (1 - expected) / 600)
    )


def test_confusion_and_transition_are_counted_as_by_hand() -> None:
    mask = np.array([[0, 0, 1, 1, 2, IGNORE]], np.uint8)
    positive = np.array([[0, 1, 1, IGNORE, 0, 2]], np.uint8)
    negative = np.array([[[1, 2, 0, IGNORE, 1, 0]], [[2, IGNORE, 2, 2, 0, 0]]], np.uint8)
    np.testing.assert_allclose(_confusion(positive, mask, 3), [[0.5, 0, 1], [0.5, 1, 0], [0, 0, 0]])
    np.testing.assert_allclose(_transition(negative, mask, 3), [[0, 1 / 3, 2 / 3], [1 / 3, 0, 2 / 3], [0.5, 0.5, 0]])


@pytest.mark.parametrize("error", [0.0, 0.3])
def test_negatives_name_classes_as_the_transition_says(error: float) -> None:
    transition = np.array([[0, 0.25, 0.75], [1, 0, 0], [0.5, 0.5, 0]])
    process, rng = _exact_process(np.eye(3), transition=transition, error=error), np.random.default_rng(0)
    mask = np.concatenate([_squares(true, 80) for true in range(3)])
    negative = np.stack([draw_coarse(mask, process, rng)[1] for _ in range(2)])
    found = _transition(negative, np.stack([mask] * 2), 3)
    expected = (1 - error) * transition + error * np.eye(3)
    np.testing.assert_allclose(process.naming, expected)
    assert np.all(np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / 640))


# ---- objects on a background ------------------------------------------------------------------------------------


def _on_background(positive: Strokes = EXACT, negative: Strokes = EXACT, **options: object) -> Process:
    confusion, classes = swapped(3, {}, 0.0), others(3, 0)
    return Process("objects", positive, negative, confusion, classes, layers=1, background=0, **options)  # type: ignore[arg-type]


def _two_objects() -> np.ndarray:
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 5:25], mask[10:30, 32:52] = 1, 2
    return mask


def test_the_background_is_not_drawn_and_the_paper_says_what_is_left() -> None:
    mask = _two_objects()
    mask[:3] = IGNORE
    positive, negative = draw_coarse(mask, _on_background(replace(EXACT, paper=0)), np.random.default_rng(0))
    np.testing.assert_array_equal(positive, mask)
    assert set(np.unique(negative[0][mask == 0])) == {IGNORE}
    assert set(negative[0][mask == 1]) == {2}  # never the background, never itself
    assert set(negative[0][mask == 2]) == {1}


def test_objects_are_drawn_as_one_however_many_parts_they_have() -> None:
    mask = np.zeros((30, 60), np.uint8)
    mask[5:25, 2:12] = mask[5:25, 16:26] = 1
    mask[5:25, 34:44] = mask[5:25, 48:58] = 1
    objects = np.where(mask, 1 + (np.arange(60) > 30), 0)
    process = Process("swap", replace(EXACT, paper=0), EXACT, swapped(3, {1: 2}, 0.5), others(3, 0), 0.0, 0, 0)
    seen = set()
    for seed in range(20):
        positive, negative = draw_coarse(mask, process, np.random.default_rng(seed), objects=objects)
        assert negative.shape == (0, 30, 60)
        names = [set(positive[objects == number]) for number in (1, 2)]
        assert all(len(name) == 1 for name in names)
        seen.add((*names[0], *names[1]))
    assert seen == {(1, 1), (1, 2), (2, 1), (2, 2)}


def test_an_object_number_that_nothing_has_is_passed_over() -> None:
    mask = _two_objects()
    objects = np.where(mask == 2, 7, mask)
    positive, _ = draw_coarse(mask, _on_background(replace(EXACT, paper=0)), np.random.default_rng(0), objects=objects)
    np.testing.assert_array_equal(positive, mask)


def test_objects_need_a_background_and_the_size_of_the_mask() -> None:
    mask = _two_objects()
    with pytest.raises(ValueError, match=r"objects: expected None, since process 'full' has no background"):
        draw_coarse(mask, level("full", 3), np.random.default_rng(0), objects=mask)
    with pytest.raises(ValueError, match=r"objects: expected \(40, 60\) as mask has, got \(2, 2\)"):
        draw_coarse(mask, _on_background(), np.random.default_rng(0), objects=mask[:2, :2])


@pytest.mark.parametrize("kind", ["eroded", "fractured"])
def test_kept_is_the_part_that_is_drawn(kind: str) -> None:
    mask = np.zeros((80, 80), np.uint8)
    mask[10:70, 10:70] = 1
    strokes = Strokes(1.0, Mix(**{kind: 1.0}), balance=1.0, kept=(0.3, 0.7), paper=0)
    shares_drawn = [
        (draw_coarse(mask, _on_background(strokes), np.random.default_rng(seed))[0] == 1).sum() / 3600
        for seed in range(40)
    ]
    assert 0.28 < min(shares_drawn) < 0.38
    assert 0.62 < max(shares_drawn) < 0.72
    assert abs(np.mean(shares_drawn) - 0.5) < 0.08


def test_the_margin_widens_by_that_many_pixels_and_keeps_off_what_is_named() -> None:
    mask = _two_objects()
    wide = replace(EXACT, margin=(3, 3))
    _, negative = draw_coarse(mask, _on_background(negative=wide), np.random.default_rng(0))
    drawn = np.argwhere(negative[0] != IGNORE)
    assert drawn.min(0).tolist() == [7, 2]
    assert drawn.max(0).tolist() == [32, 54]
    assert not (negative[0] == mask)[negative[0] != IGNORE].any()
    distances = {
        tuple(
            np.ptp(
                np.argwhere(
                    draw_coarse(
                        mask, _on_background(negative=replace(EXACT, margin=(1, 4))), np.random.default_rng(seed)
                    )[1][0]
                    != IGNORE
                ),
                0,
            )
        )
        for seed in range(30)
    }
    assert len(distances) > 4


def test_careless_negatives_reach_over_what_they_name() -> None:
    mask = np.where(_two_objects() == 1, 1, 0).astype(np.uint8)
    confusion, classes = swapped(2, {}, 0.0), others(2)
    wide = replace(EXACT, margin=(2, 2), paper=1)
    for careful, wrong in ((True, 0), (False, 1)):
        process = Process("two", EXACT, wide, confusion, classes, layers=1, background=0, careful=careful)
        _, negative = draw_coarse(mask, process, np.random.default_rng(0))
        assert set(np.unique(negative)) == {0, 1}  # the object is not background, the rest is not an object
        assert bool(((negative[0] == 0) & (mask == 0)).sum()) == wrong


def test_a_margin_below_0_narrows_and_leaves_at_least_a_line() -> None:
    mask = np.zeros((40, 40), np.uint8)
    mask[4:20, 4:20] = 1
    mask[30:32, 2:38] = 1  # two pixels wide: nothing of it is further inside than one
    confusion, classes = swapped(2, {}, 0.0), others(2)
    narrow = Process("narrow", replace(EXACT, margin=(-2, -2)), EXACT, confusion, classes, layers=0, background=0)
    positive, _ = draw_coarse(mask, narrow, np.random.default_rng(0))
    drawn = positive == 1
    assert drawn[6:18, 6:18].all()
    assert drawn[:25].sum() == 12 * 12
    assert drawn[30:32, 2:38].all()
    assert not drawn[mask == 0].any()


def test_no_region_is_sure_to_be_drawn_where_none_is_to_be() -> None:
    mask = _two_objects()
    confusion, classes = swapped(5, {}, 0.0), others(5, 0)
    drawn = []
    for surest in (0, 1):
        process = Process(
            "sparse", EXACT, replace(EXACT, skipped=1.0, surest=surest), confusion, classes, layers=1, background=0
        )
        drawn.append(int((draw_coarse(mask, process, np.random.default_rng(0))[1] != IGNORE).sum()))
    assert drawn[0] == 0
    assert drawn[1] > 0


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("kept", (0.0, 0.5), r"kept: expected two numbers above 0"),
        ("kept", (0.7, 0.5), r"kept: expected .* the smaller first, got \(0.7, 0.5\)"),
        ("margin", (3, 2), r"margin: expected two numbers, the smaller first, got \(3, 2\)"),
    ],
)
def test_strokes_that_make_no_sense_are_refused(field: str, value: object, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        replace(EXACT, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LEVELS)
def test_an_honest_negative_never_names_what_is_there(name: str) -> None:
    mask = _scene(1)
    _, negative = draw_coarse(mask, level(name, 8), np.random.default_rng(0))
    assert (negative != IGNORE).any()
    assert not (negative == mask).any()


@pytest.mark.slow
def test_wrong_negatives_are_as_many_as_asked_for() -> None:
    """Less than the nominal 0.3, since what is drawn too wide is right beside the region."""
    process = level("coarse", 8, error=0.3)
    masks = np.stack([_scene(seed) for seed in range(12)])
    negative = np.stack([draw_coarse(mask, process, np.random.default_rng(k))[1] for k, mask in enumerate(masks)])
    wrong = (negative == masks[:, None]).sum() / (negative != IGNORE).sum()
    assert 0.2 < wrong < 0.4


def test_layers_overlap_and_more_of_them_leave_the_first_as_they_are() -> None:
    mask = _scene(2)
    positive, negative = draw_coarse(mask, level("sketch", 8, layers=4), np.random.default_rng(5))
    assert negative.shape == (4, *mask.shape)
    assert ((negative != IGNORE).sum(0) > 1).any()
    assert len({layer.tobytes() for layer in negative}) == 4
    fewer = draw_coarse(mask, level("sketch", 8), np.random.default_rng(5))
    np.testing.assert_array_equal(fewer[0], positive)
    np.testing.assert_array_equal(fewer[1], negative[:2])
    assert draw_coarse(mask, level("sketch", 8, layers=0), np.random.default_rng(5))[1].shape == (0, *mask.shape)


@pytest.mark.parametrize("name", ["coarse", "full"])
def test_a_pole_in_front_of_a_building_is_not_painted_over(name: str) -> None:
    mask = np.ones((100, 160), np.uint8)
    mask[20:80, 70:75] = 2
    for seed in range(10):
        positive, _ = draw_coarse(mask, level(name, 3), np.random.default_rng(seed))
        assert (positive[mask == 2] == 2).mean() > 0.4
        assert (positive[mask == 1] != 1).mean() < 0.7  # and the building is there


def test_what_is_unknown_stays_so() -> None:
    mask = _scene(4)
    mask[:40] = IGNORE
    for name in LEVELS:
        positive, negative = draw_coarse(mask, level(name, 8), np.random.default_rng(0))
        assert (positive[mask == IGNORE] == IGNORE).all()
        assert (negative[:, mask == IGNORE] == IGNORE).all()


@pytest.mark.parametrize("speck", [IGNORE, 2])
def test_specks_leave_no_holes_in_drawings_and_no_wrong_negatives(speck: int) -> None:
    """Single pixels, such as CamVid has on its roads, are not what a person keeps clear of."""
    mask = np.zeros((160, 240), np.uint8)
    mask[:, 120:] = 1
    speckled = mask.copy()
    speckled[20:150:20, 10:240:20] = speck
    strokes = Strokes(0.5, Mix(eroded=1.0))
    process = level("coarse", 3)
    process = Process("eroded", strokes, strokes, process.confusion, process.transition)
    for seed in range(5):
        positive, _ = draw_coarse(mask, process, np.random.default_rng(seed))
        found, negative = draw_coarse(speckled, process, np.random.default_rng(seed))
        assert (positive != found)[mask == speckled].mean() < 0.01
        assert (positive != IGNORE)[mask != speckled].mean() > 0.2  # the drawing does go over some
        assert not ((negative == speckled) & (negative != IGNORE)).any()


def test_class_zero_is_a_class_like_any_other() -> None:
    mask = np.zeros((80, 120), np.uint8)
    positive, negative = draw_coarse(mask, level("scribble", 3), np.random.default_rng(0))
    assert set(np.unique(positive)) == {0, IGNORE}
    assert set(np.unique(negative)) <= {1, 2, IGNORE}
    assert (negative != IGNORE).any()


def test_nothing_known_nothing_drawn() -> None:
    mask = np.full((20, 30), IGNORE, np.uint8)
    for drawing in draw_coarse(mask, level("full", 3), np.random.default_rng(0)):
        assert (drawing == IGNORE).all()


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    classes=st.integers(2, 5),
    name=st.sampled_from([*LEVELS, 0.02, 0.5, 0.95]),
)
def test_any_mask_can_be_drawn(seed: int, height: int, width: int, classes: int, name: str | float) -> None:
    """Single pixels, lines, noise: nothing raises, nothing is drawn on unknown pixels, negatives stay honest."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, classes + 1, (1 + height // 7, 1 + width // 7))
    mask = np.kron(coarse, np.ones((7, 7), int))[:height, :width].astype(np.uint8)
    mask[rng.random(mask.shape) < 0.03] = rng.integers(classes)
    mask[mask == classes] = IGNORE
    positive, negative = draw_coarse(mask, level(name, classes), rng)
    assert positive.dtype == negative.dtype == np.uint8
    assert positive.shape == mask.shape == negative.shape[1:]
    assert (positive[mask == IGNORE] == IGNORE).all()
    assert (negative[:, mask == IGNORE] == IGNORE).all()
    assert set(np.unique(positive)) <= {*range(classes), IGNORE}
    assert not ((negative == mask) & (negative != IGNORE)).any()
    if (mask != IGNORE).any() and name == "full":
        assert (positive != IGNORE).sum() == (mask != IGNORE).sum()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: level("rough", 3), "level: expected one of .*scribble.* or a ratio, got 'rough'"),
        (lambda: level(0.001, 3), "ratio: expected a number from 0.01 to 1, got 0.001"),
        (lambda: level("coarse", 1), "num_classes: expected at least 2, got 1"),
        (lambda: level("coarse", 3, confusion=1.5), "confusion: expected a probability, got 1.5"),
        (lambda: level("coarse", 3, confusion=np.eye(2)), r"confusion: expected shape \(3, 3\), got \(2, 2\)"),
        (lambda: level("coarse", 2, confusion=np.ones((2, 2))), "confusion: expected columns .* sum to 1"),
        (lambda: level("coarse", 2, transition=np.eye(2)), "transition: expected rows .* zero diagonal"),
        (lambda: level("coarse", 2, error=-0.1), "error: expected a number from 0 to 1, got -0.1"),
        (lambda: level("coarse", 2, layers=-1), "layers: expected a number >= 0, got -1"),
        (lambda: Mix(exact=0.5), "Mix: expected chances >= 0 that sum to 1"),
        (lambda: others(1), "num_classes: expected at least 2, got 1"),
        (
            lambda: others(2, background=0),
            "num_classes: expected at least 3 with a background that is never named, got 2",
        ),
        (lambda: swapped(3, {0: 1}, 1.5), "probability: expected a number from 0 to 1, got 1.5"),
        (lambda: swapped(3, {0: 3}, 0.5), r"pairs: expected classes from 0 to 2, got \[3\]"),
        (lambda: generator_for(-1, "image"), "seed: expected a whole number >= 0, got -1"),
        (
            lambda: pair_counts(np.array([[0]]), np.array([[3]]), 2),
            r"mask: expected classes from 0 to 1 or 255, got \[3\]",
        ),
        (
            lambda: pair_counts(np.array([[9]]), np.array([[0]]), 2),
            r"drawing: expected classes from 0 to 1 or 255, got \[9\]",
        ),
        (lambda: pair_counts(np.zeros((2, 2)), np.zeros((2, 2)), 2), "drawing: expected integers, got float64"),
        (
            lambda: pair_counts(np.zeros((2, 2), np.uint8), np.zeros((1, 2), np.uint8), 2),
            r"drawing, mask: expected one shape, got \(2, 2\) and \(1, 2\)",
        ),
        (
            lambda: draw_coarse(np.full((4, 4), 7, np.uint8), level("coarse", 3), np.random.default_rng(0)),
            r"mask: expected classes from 0 to 2 or 255, got \[7\]",
        ),
        (
            lambda: draw_coarse(np.zeros((4, 4)), level("coarse", 3), np.random.default_rng(0)),
            r"mask: expected \(H, W\) uint8, got \(4, 4\) float64",
        ),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


class Scenes:
    """A source of drawn-up scenes: masks only. Label files have the values 10, 20, 30."""

    classes = Classes(("ground", "box", "ball"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), ids=(10, 20, 30))

    def __init__(self, split: str, count: int = 4, without_mask: tuple[int, ...] = ()):
        self.split, self.count, self.without_mask = split, count, without_mask

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"town/{self.split}{index}"

    def kinds(self, index: int) -> frozenset[str]:
        return frozenset() if index in self.without_mask else frozenset({"mask"})

    def load(self, index: int) -> Record:
        mask = _scene(index + len(self.split), (60, 80), 3, 8)
        mask[:5] = IGNORE
        image = np.zeros((60, 80, 3), np.uint8)
        return Record(self.name(index), image, mask=None if index in self.without_mask else mask)


@pytest.fixture
def scenes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Source]:
    sources: dict[str, Source] = {"train": Scenes("train"), "val": Scenes("val", 2)}
    monkeypatch.setattr(command, "open_split", lambda config, split: sources[split])
    return sources


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_simulate_writes_a_file_for_each_drawing(tmp_path: Path, scenes: dict[str, Source]) -> None:
    out = run_simulate(SimulateConfig(out=tmp_path / "drawn", negatives=2))
    images = [*(f"train/town/train{k}" for k in range(4)), *(f"val/town/val{k}" for k in range(2))]
    expected = {"noise.json"}
    for image in images:
        expected |= {f"positives/{image}.png", f"negatives/{image}.png", f"negatives/{image}.1.png"}
    assert set(_files(out)) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]  # no folder is left from writing
    for path in out.rglob("*.png"):
        assert set(np.unique(np.array(Image.open(path)))) <= {10, 20, 30, IGNORE}


def test_noise_json_holds_what_the_files_hold(tmp_path: Path, scenes: dict[str, Source]) -> None:
    config = SimulateConfig(out=tmp_path / "drawn", ratio=0.5, confusion=0.2, error=0.1, seed=3, negatives=3)
    noise = json.loads((run_simulate(config) / "noise.json").read_text())
    assert noise["seed"] == 3
    assert noise["classes"] == ["ground", "box", "ball"]
    assert noise["process"]["positive"]["ratio"] == 0.5
    assert {split: part["images"] for split, part in noise["splits"].items()} == {"train": 4, "val": 2}
    process = level(0.5, 3, confusion=0.2, error=0.1, layers=3)
    masks, positives, negatives = [], [], []
    for split, source in scenes.items():
        part_masks, part_positives, part_negatives = [], [], []
        for index in range(len(source)):
            mask, name = source.load(index).mask, source.name(index)
            assert mask is not None
            part_masks.append(mask)
            files = [f"positives/{split}/{name}.png", *(f"negatives/{split}/{name}{k}.png" for k in ("", ".1", ".2"))]
            maps = [source.classes.decode(np.array(Image.open(config.out / file)), file) for file in files]
            part_positives.append(maps[0])
            part_negatives.append(np.stack(maps[1:]))
        known = np.count_nonzero(np.stack(part_masks) != IGNORE)
        area = np.count_nonzero(np.stack(part_positives) != IGNORE) / known
        assert noise["splits"][split]["area_positive"] == pytest.approx(area, abs=1e-6)
        for layer, value in enumerate(noise["splits"][split]["area_negative"]):
            area = np.count_nonzero(np.stack(part_negatives)[:, layer] != IGNORE) / known
            assert value == pytest.approx(area, abs=1e-6)
        masks += part_masks
        positives += part_positives
        negatives += part_negatives
    confusion = _confusion(np.stack(positives), np.stack(masks), 3)
    transition = _transition(np.stack(negatives), np.stack(masks), 3)
    for key, nominal, counted in (
        ("confusion", np.array(process.confusion), confusion),
        ("transition", process.naming, transition),
    ):
        np.testing.assert_allclose(noise[key]["nominal"], nominal, atol=1e-6)
        np.testing.assert_allclose(noise[key]["counted"], counted, atol=1e-6)


def test_equal_seeds_give_equal_bytes_whatever_else_is_drawn_and_by_whom(
    tmp_path: Path, scenes: dict[str, Source]
) -> None:
    one = _files(run_simulate(SimulateConfig(out=tmp_path / "one")))
    again = _files(run_simulate(SimulateConfig(out=tmp_path / "again", workers=2)))
    fewer = _files(run_simulate(SimulateConfig(out=tmp_path / "fewer", splits=("train",), limit=2)))
    other = _files(run_simulate(SimulateConfig(out=tmp_path / "other", seed=1)))
    assert one == again
    assert len(fewer) == 2 * 3 + 1
    assert all(content == one[name] for name, content in fewer.items() if name != "noise.json")
    assert all(content != one[name] for name, content in other.items())


def test_drawings_are_replaced_only_when_asked_for(tmp_path: Path, scenes: dict[str, Source]) -> None:
    config = SimulateConfig(out=tmp_path / "drawn", negatives=2)
    (tmp_path / "drawn").mkdir()  # empty: may be used
    before = _files(run_simulate(config))
    with pytest.raises(ValueError, match="out: expected an empty or new folder, or --overwrite"):
        run_simulate(config)
    assert _files(config.out) == before
    run_simulate(SimulateConfig(out=config.out, negatives=1, overwrite=True))
    assert not list(config.out.rglob("*.1.png"))  # no layer of the old drawings is left among the new ones
    assert (config.out / "noise.json").is_file()


def test_a_folder_with_anything_else_is_never_deleted(tmp_path: Path, scenes: dict[str, Source]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"out: expected a folder of drawings .* to overwrite, got .* with thesis.tex"):
        run_simulate(SimulateConfig(out=tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_an_error_on_the_way_leaves_the_old_drawings(tmp_path: Path, scenes: dict[str, Source]) -> None:
    out = tmp_path / "drawn"
    before = _files(run_simulate(SimulateConfig(out=out)))

    def fail(index: int) -> Record:
        raise ValueError("train/town/val1.png: damaged")

    scenes["val"].load = fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="damaged"):
        run_simulate(SimulateConfig(out=out, overwrite=True, seed=1))
    assert _files(out) == before
    assert [path.name for path in tmp_path.iterdir()] == ["drawn"]


def test_an_image_without_mask_is_named(tmp_path: Path, scenes: dict[str, Source]) -> None:
    scenes["val"] = Scenes("val", 3, without_mask=(2,))
    with pytest.raises(ValueError, match="town/val2: expected a dense mask to draw from, got none in split 'val'"):
        run_simulate(SimulateConfig(out=tmp_path / "drawn"))
    assert not (tmp_path / "drawn").exists()


def test_matrices_come_from_files(tmp_path: Path, scenes: dict[str, Source]) -> None:
    confusion = np.array([[0.6, 0, 0], [0.4, 1, 0.5], [0, 0, 0.5]])
    transition = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0]])
    np.save(tmp_path / "c.npy", confusion)
    np.save(tmp_path / "t.npy", transition)
    out = tmp_path / "drawn"
    run_simulate(SimulateConfig(out=out, confusion=tmp_path / "c.npy", transition=tmp_path / "t.npy"))
    noise = json.loads((out / "noise.json").read_text())
    np.testing.assert_allclose(noise["confusion"]["nominal"], confusion)
    np.testing.assert_allclose(noise["transition"]["nominal"], transition)
    (tmp_path / "bad.npy").write_text("no matrix")
    with pytest.raises(ValueError, match=r"confusion: expected .* a .npy file with a matrix, got .*bad.npy"):
        run_simulate(SimulateConfig(out=tmp_path / "other", confusion=tmp_path / "bad.npy"))


def test_an_image_that_is_called_like_a_layer_is_refused(tmp_path: Path, scenes: dict[str, Source]) -> None:
    scenes["train"].name = lambda index: ("a", "a.1", "b", "c")[index]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"a\.1: expected a name that is not that of a layer of a"):
        run_simulate(SimulateConfig(out=tmp_path / "drawn"))


def test_the_name_decides_the_random_numbers() -> None:
    draws = [generator_for(seed, name).random() for seed, name in ((0, "a"), (0, "a"), (0, "b"), (1, "a"))]
    assert draws[0] == draws[1]
    assert len(set(draws)) == 3
