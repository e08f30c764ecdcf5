"""Outlines: measured on pairs of a drawing and a mask, moved back, and what a user reads of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy import ndimage

from coarse_train.cli import main
from coarse_train.commands.pen import PenConfig, run_pen, table
from coarse_train.config import DataConfig, DrawingsConfig, FitConfig, load_toml, to_toml
from coarse_train.data import IGNORE, open_split
from coarse_train.data.segmentation import SegmentationData, open_pen, pairs_of
from coarse_train.engine import fit
from coarse_train.pen import (
    LARGEST,
    Leftover,
    Pen,
    PenReport,
    describe_pen,
    half_width,
    leftovers,
    measure,
    read_pen,
    to_json,
    undo,
)
from coarse_train.pen.measure import count

from . import data_trees

NAMES = ("background", "blob", "bar")
Drawn = Callable[[np.ndarray], np.ndarray]


def scene(seed: int, size: int = 96) -> np.ndarray:
    """(H, W) smooth blobs of class 1, and bars of class 2, apart from each other."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((size, size), np.uint8)
    rows, columns = np.mgrid[:size, :size]
    for k, (row, column) in enumerate([(24, 24), (24, 72), (72, 24), (72, 72)]):
        row, column = row + rng.integers(-3, 4), column + rng.integers(-3, 4)
        if k % 2:
            mask[row - 12 : row + 12, column - 3 : column + 4] = 2
        else:
            mask[(rows - row) ** 2 + (columns - column) ** 2 <= rng.integers(8, 11) ** 2] = 1
    return mask


def moved(mask: np.ndarray, radii: dict[int, int], paper: int = 0) -> np.ndarray:
    """A drawing with every outline too far by the radius of its class."""
    drawing = np.full_like(mask, paper)
    for label, radius in radii.items():
        region = mask == label
        if radius > 0:
            region = ndimage.distance_transform_edt(~region) <= radius
        elif radius < 0:
            region = ndimage.distance_transform_edt(region) > -radius
        drawing[region] = label
    return drawing


def report_of(draw: Drawn, scenes: int = 4) -> PenReport:
    masks = [scene(seed) for seed in range(scenes)]
    return measure(((str(k), draw(mask), mask) for k, mask in enumerate(masks)), NAMES)


@pytest.mark.parametrize("blob", [-4, -1, 0, 1, 3])
@pytest.mark.parametrize("bar", [-2, 0, 2])
def test_the_radius_of_every_class_is_found_and_moved_back(blob: int, bar: int) -> None:
    report = report_of(lambda mask: moved(mask, {1: blob, 2: bar}))
    assert report.radii() == (0, blob, bar)
    assert [one.spread for one in report.classes[1:]] == [0, 0]
    assert not any(one.few for one in report.classes[1:])
    for seed in range(4):
        mask = scene(seed)
        drawing = moved(mask, {1: blob, 2: bar})
        wrong = np.count_nonzero(undo(drawing, Pen(report.radii())) != mask)
        assert wrong <= 0.05 * np.count_nonzero(mask)  # all but the corners of the bars, which a round pen rounds
        assert wrong <= np.count_nonzero(drawing != mask)


def test_wrong_names_are_no_wrong_outlines() -> None:
    def draw(mask: np.ndarray) -> np.ndarray:
        return np.array([0, 2, 1], np.uint8)[moved(mask, {1: 2, 2: -1})]

    radii = report_of(draw).radii()
    assert radii == (0, -1, 2)  # of what is drawn under a name, by which alone it can be moved back
    mask = scene(0)
    exact = np.array([0, 2, 1], np.uint8)[mask]
    wrong = np.count_nonzero(draw(mask) != exact)
    assert np.count_nonzero(undo(draw(mask), Pen(radii)) != exact) < 0.1 * wrong


def test_what_is_drawn_nowhere_may_be_a_background_or_nothing() -> None:
    report = report_of(lambda mask: moved(mask, {1: 2, 2: -1}, paper=IGNORE))
    assert report.radii() == (0, 2, -1)
    mask = scene(0)
    back = undo(moved(mask, {1: 2, 2: -1}, paper=IGNORE), Pen(report.radii()))
    assert set(np.unique(back)) == {1, 2, IGNORE}  # what is lost lies where nothing was drawn
    assert np.count_nonzero((back == 1) != (mask == 1)) <= 4


def test_objects_that_were_left_out_tell_nothing() -> None:
    def draw(mask: np.ndarray) -> np.ndarray:
        drawing = moved(mask, {1: 1, 2: 1})
        drawing[:48] = 0
        return drawing

    report = report_of(draw)
    assert report.radii() == (0, 1, 1)
    assert report.classes[1].inside == 1


def test_pens_of_two_widths_have_a_spread_and_the_median_as_radius() -> None:
    masks = [scene(seed) for seed in range(6)]
    radii = [1, 3, 3, 1, 3, 3]
    report = measure(((str(k), moved(m, {1: radii[k], 2: 0}), m) for k, m in enumerate(masks)), NAMES)
    assert report.classes[1].radius == 3
    assert 0.5 < report.classes[1].spread < 1.5
    assert report.classes[2].spread == 0


def test_parts_that_are_left_out_move_no_outline() -> None:
    """Coarse drawings cover two thirds of an object at random: there is no distance to move anything by."""

    def draw(mask: np.ndarray) -> np.ndarray:
        rng = np.random.default_rng(0)
        drawing = mask.copy()
        drawing[rng.random(mask.shape) < 0.4] = 0
        return drawing

    report = report_of(draw)
    assert report.radii() == (0, 0, 0)
    assert report.classes[1].missed == pytest.approx(0.4, abs=0.03)


def test_drawings_that_do_not_follow_the_masks_have_no_radius() -> None:
    report = report_of(lambda mask: np.random.default_rng(0).integers(0, 3, mask.shape).astype(np.uint8))
    assert all(one.radius is None for one in report.classes)
    assert report.radii() == (0, 0, 0)


def test_one_pair_is_said_to_be_too_few() -> None:
    one = report_of(lambda mask: moved(mask, {1: 2, 2: 0}), scenes=1)
    assert one.classes[1].radius == 2
    assert one.classes[1].few
    assert "Too few pairs to be sure of blob, bar" in table(one)
    assert "Too few" not in table(report_of(lambda mask: moved(mask, {1: 2, 2: 0})))


def test_it_is_said_what_the_radius_would_be_without_each_pair() -> None:
    masks = [scene(seed) for seed in range(3)]
    report = measure(((str(k), moved(m, {1: (1, 1, 4)[k], 2: 0}), m) for k, m in enumerate(masks)), NAMES)
    assert report.images == ("0", "1", "2")
    assert report.classes[1].without == (1, 1, 1)
    masks = masks[1:]
    report = measure(((str(k), moved(m, {1: (1, 4)[k], 2: 0}), m) for k, m in enumerate(masks)), NAMES)
    assert set(report.classes[1].without) == {1, 4}
    assert report.classes[1].few


def test_a_class_in_no_pair_is_taken_to_be_drawn_as_the_others() -> None:
    masks = [np.where(scene(seed) == 2, 0, scene(seed)).astype(np.uint8) for seed in range(2)]
    report = measure(((str(k), moved(m, {1: 2}), m) for k, m in enumerate(masks)), NAMES)
    assert report.classes[2].pairs == 0
    assert report.classes[2].few
    assert report.radii() == (0, 2, 2)
    assert "in no pair: as all others together, +2" in table(report)


def test_a_radius_that_one_pair_decides_is_not_taken() -> None:
    masks = [scene(seed) for seed in range(2)]
    radii = [{1: 0, 2: 1}, {1: 0, 2: 0}]
    report = measure(((str(k), moved(m, radii[k]), m) for k, m in enumerate(masks)), NAMES)
    assert report.classes[2].few
    assert report.radii() == (0, 0, 0)


def test_nothing_to_measure_with_is_an_error() -> None:
    for drawing in (np.full_like(scene(0), 3), scene(0)[:-1]):
        with pytest.raises(ValueError, match=r"one\.png: drawing(, mask: .* one shape|: .* from 0 to 2 .*\[3\])"):
            measure([("one.png", drawing, scene(0))], NAMES)
    with pytest.raises(ValueError, match="pen: expected images with a dense mask and a positive drawing"):
        measure([], NAMES)


# ---- a brush that differs between images ---------------------------------------------------------------------------

LINES = ("background", "vessel")


def lines(seed: int, size: int = 96) -> np.ndarray:
    """(H, W) lines of class 1, one to five pixels wide, some of each image one or two."""
    rng = np.random.default_rng(seed)
    picture = Image.new("L", (size, size))
    pencil = ImageDraw.Draw(picture)
    for wide in (1, 1, 2, 3, 5):
        (x0, x1), (y0, y1) = rng.integers(0, size, (2, 2)).tolist()
        pencil.line([(x0, y0), (x1, y1)], fill=1, width=wide)
    return np.asarray(picture)


def test_each_image_has_the_radius_that_its_thinnest_strokes_tell() -> None:
    """People zoom: one radius for all of them moves half of the drawings too far, or not far enough."""
    masks, radii = [lines(seed) for seed in range(12)], [2, 4, 3, 2, 2, 4, 3, 3, 1, 4, 5, 2]
    drawings = [moved(mask, {1: radius}) for mask, radius in zip(masks, radii, strict=True)]
    report = measure(((str(k), drawings[k], masks[k]) for k in range(3)), LINES)
    assert report.differing == ("vessel",)
    assert report.classes[1].undone_each < 0.2 * report.classes[1].undone_one
    pen = report.pen(each=True)
    assert pen.widths[0] is None  # a background
    found = [pen.radii_of(drawing)[1] for drawing in drawings]
    assert np.abs(np.array(found) - radii).max() <= 1
    assert np.mean(np.array(found) == radii) >= 0.75
    wrong = [
        sum(np.count_nonzero(undo(drawing, one) != mask) for drawing, mask in zip(drawings, masks, strict=True))
        for one in (report.pen(), pen)
    ]
    assert wrong[1] < 0.3 * wrong[0]
    assert "The pen of vessel differs between images" in table(report)


def test_one_radius_is_better_where_things_are_thick_and_thin_and_the_brush_is_one() -> None:
    report = report_of(lambda mask: moved(mask, {1: 2, 2: 2}))
    assert not report.differing
    assert "differs between images" not in table(report)
    assert report.pen() == Pen(report.radii())


def test_only_classes_whose_pen_differs_are_moved_by_their_own_strokes() -> None:
    """A disc is thick in one image and thinner in the next, whatever the brush: what lines tell is not true of it."""

    def both(seed: int, radius: int) -> tuple[str, np.ndarray, np.ndarray]:
        mask = lines(seed)
        rows, columns = np.mgrid[:96, :96]
        size = np.random.default_rng(100 + seed).integers(8, 16)
        mask = np.where((rows - 70) ** 2 + (columns - 30) ** 2 <= size**2, 2, mask).astype(np.uint8)
        return str(seed), moved(mask, {1: radius, 2: radius}), mask

    names = ("background", "vessel", "disc")
    report = measure((both(seed, 1 + seed) for seed in range(4)), names)
    pen = report.pen(each=True)
    assert pen.widths[1] is not None
    assert pen.widths[2] is None
    for seed in range(4, 8):
        _, drawing, _ = both(seed, 3)
        assert pen.radii_of(drawing)[2] == report.radii()[2]


def test_what_others_are_drawn_over_has_no_brush_of_its_own() -> None:
    """Lines of different brushes over a field of which only strips are left: it loses, more in one image than in the next."""

    def overdrawn(seed: int) -> tuple[str, np.ndarray, np.ndarray]:
        mask = np.where(lines(seed) == 1, 1, 2).astype(np.uint8)
        drawing = np.where(moved(mask, {1: 1 + seed % 3}) == 1, 1, 2).astype(np.uint8)
        return str(seed), drawing, mask

    report = measure(map(overdrawn, range(6)), ("sky", "line", "field"))
    assert report.classes[2].least is not None
    assert report.classes[2].least < 0
    assert report.differing == ("line",)
    assert report.pen(each=True).widths[2] is None


@pytest.mark.parametrize("wrong", [(None, np.nan), (None, np.inf), (None, 1.0, 1.0)])
def test_a_pen_of_no_width_is_named(wrong: tuple[float | None, ...]) -> None:
    with pytest.raises(ValueError, match="widths: expected"):
        Pen((0.0, 1.0), widths=wrong)


def test_strokes_along_the_border_tell_nothing() -> None:
    """Nobody sees how wide they are."""
    region = np.zeros((20, 20), bool)
    region[:3] = True
    assert half_width(region) is None
    region[10:13] = True
    assert half_width(region) == 2


def test_one_pair_tells_nothing_of_a_difference() -> None:
    report = measure([("one", moved(lines(0), {1: 3}), lines(0))], LINES)
    assert not report.classes[1].differs
    assert report.classes[1].undone_one == report.classes[1].undone_each == 0
    assert report.pen(each=True).radii_of(moved(lines(1), {1: 2}))[1] == pytest.approx(2, abs=1)


def test_where_no_stroke_tells_the_radius_is_that_of_all() -> None:
    pen = Pen((0.0, 3.0), widths=(None, 1.0))
    assert pen.radii_of(np.zeros((8, 8), np.uint8)) == (0, 3)
    assert pen.radii_of(np.ones((8, 8), np.uint8)) == (0, 3)
    assert Pen((0.0, 3.0)).radii_of(moved(lines(0), {1: 1})) == (0, 3)
    assert half_width(np.zeros((4, 4), bool)) is None
    band = np.zeros((9, 9), bool)
    band[3:6] = True
    assert half_width(band) == 2  # the middle one of three lines is two from what is outside


# ---- where regions touch ------------------------------------------------------------------------------------------


def street() -> tuple[np.ndarray, np.ndarray]:
    """A pole (2) of 4 pixels in front of a wall (0) above a road (1), and it drawn 2 pixels too wide: no background."""
    mask = np.zeros((60, 200), np.uint8)
    mask[40:] = 1
    mask[10:50, 18:22] = 2
    drawing = mask.copy()
    drawing[ndimage.distance_transform_edt(mask != 2) <= 2] = 2
    return mask, drawing


def test_what_a_broad_pen_took_from_its_neighbours_goes_back_to_the_nearest() -> None:
    mask, drawing = street()
    report = measure([("a", drawing, mask), ("b", drawing[:, ::-1], mask[:, ::-1])], ("wall", "road", "pole"))
    assert report.radii() == (0, 0, 2)
    back = undo(drawing, Pen(report.radii()))
    assert (
        np.count_nonzero(back != mask) <= 12
    )  # at the four corners of the pole, and where wall and road meet behind it
    assert set(np.unique(back[8:12, 16:24])) == {0, 2}
    assert set(np.unique(back[48:52, 16:24])) == {1, 2}


def test_two_classes_of_one_radius_keep_their_border() -> None:
    """Nothing tells which of them was drawn on top."""
    _, drawing = street()
    assert np.array_equal(undo(drawing, Pen((2, 2, 2))), drawing)
    assert np.array_equal(undo(drawing, Pen((0, 0, 0))), drawing)
    # opposite radii ask for the same move
    assert np.array_equal(undo(drawing, Pen((-2, -2, 2))), undo(drawing, Pen((0, 0, 2))))


def test_a_narrow_pen_grows_over_its_neighbours_but_not_over_one_that_is_narrower() -> None:
    mask, _ = street()
    thin = mask.copy()
    thin[:, 18] = thin[:, 21] = mask[:, 0]
    back = undo(thin, Pen((0, 0, -1)))
    assert np.array_equal(back[12:48], mask[12:48])
    assert np.array_equal(undo(thin, Pen((-3, -3, -1)))[12:48, 17:23] == 2, np.zeros((36, 6), bool))


def test_a_band_says_nothing_where_an_outline_was_moved_over() -> None:
    drawing = street()[1]
    everything = undo(drawing, Pen((0, 0, 2), band=9))
    moved_over = undo(drawing, Pen((0, 0, 2))) != drawing
    assert np.array_equal(everything == IGNORE, moved_over)
    nearest = undo(drawing, Pen((0, 0, 2), band=1))
    assert 0 < np.count_nonzero(nearest == IGNORE) < np.count_nonzero(moved_over)
    assert np.array_equal(nearest[nearest != IGNORE], undo(drawing, Pen((0, 0, 2)))[nearest != IGNORE])


def _blots(rng: np.random.Generator) -> np.ndarray:
    return (ndimage.gaussian_filter(rng.standard_normal((64, 64)), 1.5) > 0.05).astype(np.uint8)


@pytest.mark.parametrize("radius", [1, 1.5, 2, 3, 13**0.5, -1, -2])
def test_what_a_drawing_does_not_prove_is_doubted_and_what_it_proves_is_true(radius: float) -> None:
    """A pen fills the gaps that are narrower than it, and undoing it leaves them filled: 4 % of thick digits. Beyond the border
    of the image, and where nothing is drawn, may be what nobody sees."""
    rng = np.random.default_rng(3)
    corrected = wrong = 0
    for _ in range(20):
        whole = _blots(rng)
        side = whole == (radius > 0)
        drawn = ((ndimage.distance_transform_edt(~side) <= abs(radius)) == (radius > 0)).astype(np.uint8)
        mask, drawing = whole[10:58, 10:58], drawn[10:58, 10:58].copy()
        drawing[20:28, 20:32] = IGNORE
        filled = undo(drawing, Pen((0, radius)))
        doubted = undo(drawing, Pen((0, radius), doubt=np.inf))
        kept = doubted != IGNORE
        assert np.array_equal(doubted[kept], mask[kept])
        assert {0, 1} <= set(doubted[kept]) or radius > 3
        wrong += np.count_nonzero((filled != mask) & (filled != IGNORE))
        corrected += np.count_nonzero(kept & (doubted != drawing))
    assert wrong > 0
    assert corrected > 0


@pytest.mark.parametrize("radius", [2, -2])
def test_doubt_reaches_as_far_as_is_asked(radius: float) -> None:
    drawing = _blots(np.random.default_rng(4))
    filled = undo(drawing, Pen((0, radius)))
    silent = {n: undo(drawing, Pen((0, radius), doubt=n)) == IGNORE for n in (1, 2, np.inf)}
    outline = ndimage.distance_transform_edt(filled == drawing)
    for n, where in silent.items():
        assert not where[filled != drawing].any()  # what was moved over is certain
        assert np.array_equal(where, silent[np.inf] & (outline <= n))
    assert 0 < silent[1].sum() < silent[2].sum() < silent[np.inf].sum()


def test_what_is_left_wrong_is_counted_with_every_doubt() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[8, 5:15] = mask[11, 5:15] = 1  # 20 pixels, two rows between them
    drawing = (ndimage.distance_transform_edt(mask == 0) <= 1).astype(np.uint8)
    drawing[0] = IGNORE  # nothing is drawn there, and nothing counts
    pairs = [("a", drawing, mask), ("b", mask, mask)]
    filled = np.count_nonzero((undo(drawing, Pen((0, 1))) != mask)[1:])
    assert filled == 16  # the rows between, but for their ends
    before, after = leftovers(pairs, Pen((0, 1)), ("background", "line"), (0, np.inf))
    # lines of one pixel, as the second drawing has them, do not survive
    assert before == Leftover(wrong=(16 + 20) / 40, objects=0, background=0)
    assert after == Leftover(wrong=20 / 40, objects=16 / 36, background=0)  # of the lines themselves all is proven
    mask[8, 5:15] = IGNORE  # nobody knows
    (half,) = leftovers([("a", drawing, mask)], Pen((0, 1)), ("background", "line"), (0,))
    assert half == Leftover(wrong=16 / 10, objects=0, background=0)


def test_the_border_of_a_straight_stroke_is_proven_and_the_gap_between_two_is_not() -> None:
    mask = np.zeros((14, 30), np.uint8)
    mask[4:6, 4:26] = mask[8:10, 4:26] = 1  # two lines, with two rows between them
    drawing = (ndimage.distance_transform_edt(mask == 0) <= 1).astype(np.uint8)
    doubted = undo(drawing, Pen((0, 1), doubt=1))
    assert (doubted[4, 4:26] == 1).all()
    assert (doubted[9, 4:26] == 1).all()
    assert (doubted[6:8, 5] == IGNORE).all()  # where the gap opens; without `doubt` it is object
    assert (undo(drawing, Pen((0, 1)))[6:8, 5] == 1).all()
    assert (doubted[:4] == 0).all()


def test_of_several_classes_what_a_broader_pen_gave_back_is_not_doubted_again() -> None:
    drawing = street()[1]
    moved_over = undo(drawing, Pen((0, 0, 2))) != drawing
    assert set(np.unique(undo(drawing, Pen((0, 1, 2), doubt=np.inf))[moved_over])) == {0, 1}
    squares = np.zeros((20, 20), np.uint8)
    squares[5:15, 2:9], squares[5:15, 11:18] = 1, 2  # both narrow: what is drawn of them is of them
    assert np.array_equal(undo(squares, Pen((0, -1, -1), doubt=np.inf))[squares > 0], squares[squares > 0])


def _one_class_after_the_other(drawing: np.ndarray, pen: Pen) -> np.ndarray:
    """`undo` as it is described, pixel by pixel: distances between all pairs of them, and every class by itself."""
    places = np.stack(np.indices(drawing.shape), -1).reshape(-1, 2)
    apart = np.sqrt(((places[:, None] - places) ** 2).sum(-1))
    drawn = drawing.ravel()
    radii = np.array([pen.radii[label] if label < len(pen.radii) else 0.0 for label in drawn])
    result, settled = drawn.copy(), np.zeros(drawn.size, bool)
    for radius, label in sorted({*zip(radii, drawn, strict=True)}, key=lambda pair: (-abs(pair[0]), -pair[0], pair[1])):
        region = drawn == label
        side = np.flatnonzero(~region & ((abs(radii) < abs(radius)) | (radii == -radius)))
        if radius > 0 and side.size:
            moved = region & (apart[:, side].min(1) <= radius) & ~settled
            _, indices = ndimage.distance_transform_edt(
                ~np.isin(np.arange(drawn.size), side).reshape(drawing.shape), return_indices=True
            )
            becomes, left = drawing[tuple(indices)].ravel(), region & ~moved  # of several nearest the one that it takes
        elif radius < 0 and side.size:
            moved = np.isin(np.arange(drawn.size), side) & (apart[:, region].min(1) <= -radius) & ~settled
            becomes, left = np.full_like(drawn, label), ~(region | moved)
        else:
            continue
        result[moved] = becomes[moved]
        if pen.band:
            result[moved & (apart[:, left].min(1, initial=np.inf) <= pen.band)] = IGNORE
        if pen.doubt and moved.any():
            others = left | (drawn == IGNORE) | (radii > abs(radius)) | (moved & (becomes == IGNORE))
            border = np.minimum(places, np.array(drawing.shape) - 1 - places).min(1)
            alone = moved & ((apart[:, others] <= abs(radius)).sum(1) == 1) & (border >= int(abs(radius)))
            proven = (apart[:, alone] <= abs(radius)).any(1)
            doubted = left & (apart[:, moved].min(1, initial=np.inf) <= pen.doubt) & ~proven & ~settled & (radii >= 0)
            result[doubted] = IGNORE
        settled |= moved
    return result.reshape(drawing.shape)


@pytest.mark.parametrize("seed", range(4))
def test_many_classes_of_many_radii_are_moved_as_one_after_the_other_would_be(seed: int) -> None:
    """Classes of one radius share a search for what is nearest, and each is looked at in a box around it alone."""
    rng = np.random.default_rng(seed)
    changed = 0
    for trial in range(40):
        height, width, classes = (int(n) for n in rng.integers((1, 1, 2), (24, 24, 6)))
        smooth = [ndimage.gaussian_filter(rng.standard_normal((height, width)), 1.5) for _ in range(classes + 1)]
        drawing = np.argmax(smooth, 0).astype(np.uint8)
        drawing[drawing == classes] = IGNORE if trial % 2 else 0
        radii = rng.integers(-3, 4, classes) if trial % 3 else np.full(classes, rng.integers(1, 4))
        pen = Pen(
            tuple(map(float, radii)),
            band=float(rng.choice([0, 1, np.inf])),
            doubt=float(rng.choice([0, 1, 2.5, np.inf])),
        )
        found = undo(drawing, pen)
        changed += np.count_nonzero(found != drawing)
        assert np.array_equal(found, _one_class_after_the_other(drawing, pen)), (pen, drawing)
    assert changed > 1000


def test_a_pen_whose_median_is_right_and_that_differs_between_images_moves_them() -> None:
    """It was no candidate of `--select-with`, and `pen` did not say what it leaves."""
    radii = (0, 0, 0, 2, 4)
    pairs = [(str(k), moved(lines(k), {1: radius}), lines(k)) for k, radius in enumerate(radii)]
    report = measure(pairs, LINES)
    assert not report.pen().moves
    assert report.pen(each=True).moves
    assert leftovers(pairs, report.pen(each=True), LINES, (0,)) != leftovers(pairs, report.pen(), LINES, (0,))
    assert not Pen((0, 0), widths=(None, None)).moves


def test_where_nothing_moves_nothing_is_doubted() -> None:
    drawing = _blots(np.random.default_rng(5))
    assert np.array_equal(undo(drawing, Pen((0, 0.5), doubt=np.inf)), drawing)


@pytest.mark.parametrize(
    "pen",
    [Pen((0, 0, 2), band=1), Pen((0, 0, 2), doubt=1), Pen((0, 0, -2)), Pen((0, 0, 0))],
    ids=["wide", "doubted", "narrow", "exact"],
)
def test_a_drawing_is_not_written_to(pen: Pen) -> None:
    drawing = street()[1]
    before = drawing.copy()
    drawing.flags.writeable = False  # as one that is read from a file may be
    back = undo(drawing, pen)
    assert np.array_equal(drawing, before)
    assert np.array_equal(back, before) == (pen.radii == (0, 0, 0))


def test_an_object_of_less_than_the_pen_is_lost() -> None:
    drawing = np.zeros((20, 20), np.uint8)
    drawing[10, 10] = 1
    assert not undo(drawing, Pen((0, 2))).any()
    assert np.array_equal(undo(np.ones((4, 4), np.uint8), Pen((0, 2))), np.ones((4, 4)))  # a whole image of it is not


# ---- in a run -----------------------------------------------------------------------------------------------------


def _fit_config(out: Path, **changes: object) -> FitConfig:
    data = DataConfig(dataset="mnist", variant="thick", limit=24)
    base = FitConfig(data=data, out=out, steps=2, batch_size=4, threads=1, positive=DrawingsConfig())
    return replace(base, **changes)  # type: ignore[arg-type]


def test_drawings_are_moved_back_before_transforms_and_negatives_stay(tmp_path: Path) -> None:
    config = _fit_config(tmp_path, positive=DrawingsConfig(pen=1.0, doubt=2.0))
    source = open_split(config.data, "train")
    pen, report = open_pen(config, source)
    assert report is None
    assert pen == Pen((0, 1, 1, 1, 1), doubt=2.0)
    plain = SegmentationData(source, config.data, training=True)
    mended = SegmentationData(source, config.data, training=True, pen=pen)
    for _ in range(2):  # drawn, and from the cache
        for index in range(3):
            record, sample = source.load(index), mended[index]
            assert record.positive is not None
            assert np.array_equal(sample.positive, undo(record.positive, pen))
            assert np.array_equal(sample.negative, plain[index].negative)
            assert (np.asarray(sample.positive) != np.asarray(plain[index].positive)).any()


@pytest.mark.parametrize("name", ["Background", "BACKGROUND", " bg", "_background_"])
def test_a_background_is_one_in_whatever_letters(name: str) -> None:
    """Two pixels for every class but "background" were two for "Background", too, and nothing moved."""
    drawing = np.zeros((20, 20), np.uint8)
    drawing[5:14, 5:14] = 1
    expected = undo(drawing, Pen.of_objects(2, ("background", "car")))
    assert np.array_equal(undo(drawing, Pen.of_objects(2, (name, "car"))), expected)
    assert np.count_nonzero(expected != drawing) > 0
    (said,) = describe_pen(Pen.of_objects(2, ("road", "car")), None, ("road", "car"))
    assert said.endswith("no class is called background: where two of these touch, their border stays")


def test_drawings_that_are_there_are_not_simulated_without_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pen", "mnist", "--variant", "thick", "--simulate", "coarse", "--out", str(tmp_path)]
    assert main(command) == 1
    assert "simulate: expected masks that lack positive drawings, but all have them" in capsys.readouterr().err


def test_auto_reads_no_more_masks_than_it_may(tmp_path: Path) -> None:
    config = _fit_config(
        tmp_path,
        positive=DrawingsConfig(pen="auto"),
        data=DataConfig(dataset="mnist", variant="thick", limit=24, dense_images=6),
    )
    pen, report = open_pen(config, open_split(config.data, "train"))
    assert report is not None
    assert len(report.images) == 6
    assert pen == Pen((0, 1, 1, 1, 1))
    mixed = replace(config, data=replace(config.data, supervision="mixed"))
    assert open_pen(mixed, open_split(config.data, "train"))[1] == report


@pytest.mark.slow
def test_a_radius_for_each_image_is_measured_on_the_masks_that_may_be_read_and_undone_as_drawings_are_read(
    tmp_path: Path,
) -> None:
    data = DataConfig(dataset="mnist", variant="thick", limit=24, dense_images=6)
    config = _fit_config(tmp_path, positive=DrawingsConfig(pen="image", band=1.0, doubt=2.0), data=data)
    source = open_split(data, "train")
    pen, report = open_pen(config, source)
    assert report is not None
    assert len(report.images) == 6
    assert pen == replace(report.pen(each=True), band=1.0, doubt=2.0)
    sample = SegmentationData(source, replace(data, dense_images=0), training=False, pen=pen)[0]
    positive = source.load(0).positive
    assert positive is not None
    assert np.array_equal(sample.positive, undo(positive, pen))
    fit(replace(config, steps=1))
    with pytest.raises(ValueError, match="pen"):  # what was measured belongs to the run
        fit(replace(config, steps=2, resume=True, positive=DrawingsConfig(pen="auto", band=1.0, doubt=2.0)))
    (said,) = describe_pen(Pen((0, 1), widths=(None, 0.5)), None, LINES)
    assert "vessel +1 where an image has no strokes of its own to tell; in all others by their thinnest ones" in said


@pytest.mark.slow
def test_fit_says_what_it_moved_and_how_it_knows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--variant", "thick", "--limit", "24", "--steps", "1", "--widths", "4", "8", "--threads", "1"]
    auto = ["--positive.pen", "auto", "--dense-images", "5", "--positive.cm", "none", "--out", str(tmp_path / "a")]
    assert main(["fit", "mnist", *arguments, *auto]) == 0
    said = capsys.readouterr().err
    assert "that are moved back, pixels too far (below 0: not far enough): 0 +1, 3 +1, 4 +1, 7 +1" in said
    assert "measured on 5 images with a mask and a drawing" in said
    assert load_toml(tmp_path / "a" / "config.toml").positive.pen == "auto"
    assert main(["pen", "mnist", "--variant", "thick", "--images", "4", "--out", str(tmp_path / "pen")]) == 0
    shown = capsys.readouterr().out
    assert "4 images with a drawing and a mask" in shown
    assert "--positive.doubt 2: 0.0" in shown  # of 0.04 that moving back leaves wrong
    assert (tmp_path / "pen" / "pen.png").read_bytes()[:4] == b"\x89PNG"
    file = ["--positive.pen", str(tmp_path / "pen" / "pen.json"), "--positive.band", "1", "--out", str(tmp_path / "b")]
    assert main(["fit", "mnist", *arguments, *file, "--positive.doubt", "2"]) == 0
    said = capsys.readouterr().err
    assert "pixels too far (below 0: not far enough): 0 +1, 3 +1, 4 +1, 7 +1" in said
    assert "left open: 1 pixels moved over, 2 pixels of what stays and is not proven" in said
    for number in ("-1.5", "None"):
        assert main(["fit", "mnist", *arguments, "--positive.pen", number, "--out", str(tmp_path / number)]) == 0
    assert "pixels too far (below 0: not far enough): 0 -1.5," in capsys.readouterr().err
    config = load_toml(tmp_path / "b" / "config.toml")
    (tmp_path / "again.toml").write_text(to_toml(config))
    assert load_toml(tmp_path / "again.toml") == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--positive.pen", "auto"], "dense_images: expected a number >= 1 with positive.pen auto"),
        (["--positive.pen", "image"], "dense_images: expected a number >= 1 with positive.pen auto or image"),
        (["--positive.pen", "image", "--supervision", "masks"], "positive.pen: expected None with supervision masks"),
        (["--negative.pen", "1"], "negative.pen: expected None"),
        (["--positive.band", "1"], "positive.band: expected a number >= 0, and 0 without positive.pen, got 1.0"),
        (["--positive.doubt", "1"], "positive.doubt: expected a number >= 0, and 0 without positive.pen, got 1.0"),
        (
            ["--positive.pen", "1", "--positive.doubt", "nan"],
            "positive.doubt: expected a number >= 0, and 0 without positive.pen, got nan",
        ),
        (["--positive.pen", "nan"], "positive.pen: expected a number of pixels, auto, image or a file, got nan"),
        (
            ["--positive.pen", "nowhere.json"],
            f"pen: expected a number, auto, image or a pen.json, got {Path('nowhere.json').absolute()}",
        ),
        (["--positive.pen", "auto", "--supervision", "masks"], "positive.pen: expected None with supervision masks"),
        (["--dense-share", "0.5"], "dense_share: expected a number between 0 and 1 with supervision mixed"),
        (["--supervision", "then-masks"], "dense_images: expected a number >= 1 with supervision then-masks"),
        (["--dense-split", "val"], "dense_split: expected train with supervision drawings"),
    ],
)
def test_a_wrong_option_is_named(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "mnist", "--limit", "24", "--steps", "1", *options, "--out", "runs/never"]) == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert not Path("runs/never/last.pt").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", 'expected {"radius"'),
        ('{"radii": {}}', 'expected {"radius"'),
        ('{"radius": {"lamp": 1}}', "expected numbers for some of the classes"),
        ('{"radius": {"bar": "wide"}}', 'expected {"radius"'),
        ('{"radius": {"bar": NaN}}', "expected numbers for some"),
        ('{"radius": {"bar": 1}, "width": {"lamp": 1}}', "expected numbers for some of the classes"),
        ('{"radius": {"bar": 1}, "width": 3}', 'expected {"radius"'),
    ],
)
def test_a_damaged_pen_file_is_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "pen.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path}: {message}"):
        read_pen(path, NAMES)


def test_a_pen_file_may_be_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "pen.json"
    path.write_text('{"radius": {"bar": 2.5, "blob": null}}')
    assert read_pen(path, NAMES) == Pen((0, 0, 2.5))
    path.write_text(to_json(report_of(lambda mask: moved(mask, {1: 3, 2: -1}))))
    assert read_pen(path, NAMES) == Pen((0, 3, -1))
    assert json.loads(path.read_text())["classes"]["blob"]["radius"] == 3
    report = measure(((str(k), moved(lines(k), {1: k + 1}), lines(k)) for k in range(3)), LINES)
    path.write_text(to_json(report, each=True))
    assert read_pen(path, LINES) == report.pen(each=True) != report.pen()
    path.write_text(to_json(report))
    assert read_pen(path, LINES) == report.pen()


def test_observers_of_real_vessels_are_measured(tmp_path: Path) -> None:
    root = data_trees.write_chasedb1_tree(tmp_path / "chase")
    report = run_pen(PenConfig("chasedb1", root=root, out=tmp_path / "pen"))
    assert len(report.images) == len(open_split(DataConfig(dataset="chasedb1", root=root), "train"))
    with pytest.raises(ValueError, match="out: expected an empty or new folder, or --overwrite"):
        run_pen(PenConfig("chasedb1", root=root, out=tmp_path / "pen"))
    with pytest.raises(ValueError, match=r"images: expected a number from 1 to .*, got 0"):
        run_pen(PenConfig("chasedb1", root=root, images=0, out=tmp_path / "more"))


def test_a_pen_beyond_what_is_looked_for_is_said_to_be_at_least_that() -> None:
    size = 160
    mask = np.zeros((size, size), np.uint8)
    mask[70:90, 70:90] = 1
    report = measure([(str(k), moved(mask, {1: 14}), mask) for k in range(2)], NAMES)
    assert report.classes[1].radius in (None, LARGEST)


def test_simulated_drawings_are_pairs_too(tmp_path: Path) -> None:
    root = data_trees.write_camvid_tree(tmp_path / "camvid", size=(48, 64))
    data = DataConfig(dataset="camvid", root=root, simulate="full", crop=(16, 16), scale=(0.5, 2.0))
    pairs = list(pairs_of(open_split(data, "train"), data, 0, range(2)))
    assert [drawing.shape for _, drawing, _ in pairs] == [(48, 64)] * 2  # whole images, whatever training crops


def test_pixels_are_counted_as_far_as_radii_are_looked_for() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[28:36, 28:36] = 1
    found = count(moved(mask, {1: 7}), mask, 2)[1]
    levels = np.ceil(ndimage.distance_transform_edt(mask == 0))  # of the whole image
    for level in range(1, LARGEST + 2):
        pixels = int((levels == level).sum())
        assert found[LARGEST + level].tolist() == [pixels, pixels if level <= 7 else 0]


def test_check_names_no_class_of_which_pairs_tell_too_little(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A class in no pair was said to be off by what all together are, with nothing missed and nothing added."""
    root = _drawn_folder(tmp_path / "mine", lambda mask: moved(np.where(mask == 2, 0, mask).astype(np.uint8), {1: 2}))
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    note = next(line for line in capsys.readouterr().out.splitlines() if "note: outlines" in line)
    assert "blob +2" in note
    assert "bar" not in note


def test_check_measures_no_more_pixels_than_take_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("coarse_train.advice._PIXELS", 96 * 96 - 1)
    root = _drawn_folder(tmp_path / "mine", lambda mask: moved(mask, {1: 2, 2: 2}))
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    assert "note: outlines" not in capsys.readouterr().out


def _drawn_folder(root: Path, draw: Drawn, images: int = 4) -> Path:
    root.mkdir()
    (root / "classes.toml").write_text("".join(f'[[class]]\nname = "{name}"\n' for name in NAMES))
    for number in range(images):
        mask = scene(number)
        for folder, values in (("images", mask * 100), ("masks", mask), ("positives", draw(mask))):
            data_trees.save(root / "train" / folder / f"{number}.png", values)
    return root


@pytest.mark.parametrize(
    ("radii", "told"),
    [
        (None, None),
        ([{1: 2, 2: 0}] * 4, r"blob \+2 \(spread 0\.0, 0 % missed, \d\d % added\); `coarse-train pen` measures"),
        ([{1: 1}, {1: 4}, {1: 1}, {1: 4}], r"blob \+\d \([^;,]*, [^;,]*, [^;,]*\); `coarse-train pen --each` measures"),
    ],
    ids=["as they are", "too far", "differing"],
)
def test_check_says_that_outlines_are_off_and_by_how_much(
    radii: list[dict[int, int]] | None, told: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = iter(radii or ())
    root = _drawn_folder(tmp_path / "mine", lambda mask: moved(mask, next(numbers)) if radii else mask)
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "note: outlines" in line]
    assert notes == [
        line for line in (tmp_path / "out" / "check.txt").read_text().splitlines() if "note: outlines" in line
    ]
    assert len(notes) == bool(told)
    assert all(
        re.match(rf"note: [^;]* off, pixels too far \(below 0: not far enough\): {told}", line) for line in notes
    )


def test_check_reads_no_pair_where_drawings_and_masks_are_of_different_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _drawn_folder(tmp_path / "mine", lambda mask: moved(mask, {1: 2, 2: 2}))
    for number in range(4):
        (root / "train" / ("masks" if number % 2 else "positives") / f"{number}.png").unlink()
    assert main(["check", "folder", "--root", str(root), "--out", str(tmp_path / "out")]) == 0
    assert "note: outlines" not in capsys.readouterr().out
