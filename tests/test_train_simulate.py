"""Drawings come from a known noise process, and keep to it."""

from __future__ import annotations

from zlib import crc32

import numpy as np
import pytest

from coarse_train.data.mnist import SAMPLE_DIR, place_digits, read_split
from coarse_train.simulate import (
    BINARY,
    IGNORE,
    HASTY,
    MAJORITY,
    Preset,
    ShapeNoise,
    cyclic_swap,
    distort,
    draw,
    objects_of,
    observed_confusion,
)

EXACT = ShapeNoise()


@pytest.fixture(scope="module")
def canvases() -> tuple[np.ndarray, np.ndarray]:
    images, labels = read_split(SAMPLE_DIR, "test")
    _, mask, region = place_digits(images[:400], labels[:400], seed=0)
    return mask, region


def _squares(count: int, label: int) -> np.ndarray:
    mask = np.zeros((8, 8 * count), np.uint8)
    for k in range(count):
        mask[2:6, 8 * k + 2 : 8 * k + 6] = label
    return mask


@pytest.mark.parametrize("true", [1, 2, 3, 4])
def test_swap_rates_are_those_of_the_matrix(true: int) -> None:
    """2,000 objects drawn with exact outlines: each rate within 4 standard deviations of a binomial."""
    preset = Preset("swap", EXACT, EXACT, HASTY.swap)
    rng = np.random.default_rng(true)
    mask = _squares(50, true)
    drawn = np.concatenate([draw(mask, preset, rng)[0][4, 4::8] for _ in range(40)])
    count = len(drawn)
    assert count == 2000
    for label in range(5):
        expected = HASTY.swap[label][true]
        rate = float((drawn == label).mean())
        assert abs(rate - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)


def test_without_noise_the_positive_drawing_is_the_mask(canvases: tuple[np.ndarray, np.ndarray]) -> None:
    mask, region = canvases
    preset = Preset("none", EXACT, EXACT, cyclic_swap(5, 0.0))
    positive, _ = draw(mask[0], preset, np.random.default_rng(0), regions=region[0])
    np.testing.assert_array_equal(positive, mask[0])


def test_negatives_are_honest_weak_and_silent_where_nothing_is_drawn(canvases: tuple[np.ndarray, np.ndarray]) -> None:
    mask, region = canvases
    named = np.zeros((5, 5), int)
    for n in range(len(mask)):
        _, negative = draw(mask[n], HASTY, np.random.default_rng(n), regions=region[n])
        drawn = negative != IGNORE
        assert not (negative == mask[n])[drawn].any()  # never the true class
        assert 0 not in negative[drawn]  # never "not background"
        for number in (1, 2):  # one wrong class for a whole object
            labels = np.unique(negative[(region[n] == number) & drawn])
            assert len(labels) == 1
            named[int(mask[n][region[n] == number][0]), int(labels[0])] += 1
        assert 0.1 < drawn.mean() < 0.6
    for true in range(1, 5):  # uniform over the three wrong object classes
        rates = named[true] / named[true].sum()
        assert rates[0] == rates[true] == 0
        assert np.all(np.abs(rates[[k for k in range(1, 5) if k != true]] - 1 / 3) < 0.2)


def test_the_negative_keeps_off_other_objects() -> None:
    mask = np.zeros((12, 12), np.uint8)
    mask[3:9, 2:5], mask[3:9, 6:9] = 1, 2
    preset = Preset("near", EXACT, EXACT, cyclic_swap(3, 0.0), margin=(4, 4))
    for seed in range(20):
        _, negative = draw(mask, preset, np.random.default_rng(seed))
        assert set(negative[mask == 1]) == {2}
        assert set(negative[mask == 2]) == {1}


def test_ignore_in_the_mask_stays_unlabelled() -> None:
    mask = _squares(3, 1)
    mask[:, :8] = IGNORE
    positive, negative = draw(mask, HASTY, np.random.default_rng(0))
    assert (positive[:, :8] == IGNORE).all()
    assert (negative[:, :8] == IGNORE).all()
    assert (positive[:, 8:] != IGNORE).all()


def test_binary_negatives_cover_everything(canvases: tuple[np.ndarray, np.ndarray]) -> None:
    mask, region = canvases
    _, negative = draw((mask[0] > 0).astype(np.uint8), BINARY, np.random.default_rng(0), regions=region[0])
    assert set(np.unique(negative)) == {0, 1}
    assert (negative == 1)[mask[0] == 0].mean() > 0.8  # mostly "not the object" where there is none


@pytest.mark.parametrize(
    ("noise", "smallest", "largest"),
    [
        (ShapeNoise(broken=1.0), 0.2, 0.81),
        (ShapeNoise(thin=1.0), 0.1, 0.9),
        (ShapeNoise(thick=1.0), 1.2, 3.0),
        (ShapeNoise(shifted=1.0), 0.9, 1.0),
        (ShapeNoise(filled=1.0), 1.0, 3.0),
        (ShapeNoise(), 1.0, 1.0),
    ],
    ids=["broken", "thin", "thick", "shifted", "filled", "exact"],
)
def test_each_kind_of_distortion(
    canvases: tuple[np.ndarray, np.ndarray], noise: ShapeNoise, smallest: float, largest: float
) -> None:
    _mask, region = canvases
    areas = []
    for n in range(40):
        shape = region[n] == 1
        drawn = distort(shape, noise, np.random.default_rng(n))
        assert drawn.dtype == bool
        assert drawn.any()
        areas.append(drawn.sum() / shape.sum())
    assert smallest <= np.mean(areas) <= largest


def test_distort_of_a_single_pixel_and_of_nothing() -> None:
    dot = np.zeros((5, 5), bool)
    assert not distort(dot, ShapeNoise(broken=1.0), np.random.default_rng(0)).any()
    dot[0, 0] = True
    for kind in ("broken", "thin", "thick", "shifted", "filled"):
        assert distort(dot, ShapeNoise(**{kind: 1.0}), np.random.default_rng(0)).any()


def test_objects_of_tells_touching_classes_apart() -> None:
    mask = np.array([[1, 1, 2], [0, 0, 2], [1, 0, IGNORE]], np.uint8)
    regions = objects_of(mask)
    assert len(np.unique(regions[regions > 0])) == 3
    assert regions[0, 0] == regions[0, 1] != regions[2, 0]
    assert regions[2, 2] == 0 == regions[1, 0]


def test_observed_confusion_by_hand() -> None:
    drawing = np.array([0, 1, 1, 0, IGNORE], np.uint8)
    mask = np.array([0, 1, 0, 1, 1], np.uint8)
    np.testing.assert_allclose(observed_confusion(drawing, mask, 3), [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 0]])


def test_the_preset_is_as_documented(canvases: tuple[np.ndarray, np.ndarray]) -> None:
    """An object pixel is drawn as its own class about 45 times in 100, as background 35 and as another class 20."""
    mask, region = canvases
    rngs = [np.random.default_rng(n) for n in range(len(mask))]
    drawn = [draw(mask[n], HASTY, rngs[n], regions=region[n])[0] for n in range(len(mask))]
    confusion = observed_confusion(np.stack(drawn), mask, 5)
    assert abs(np.diag(confusion)[1:].mean() - 0.45) < 0.05
    assert abs(confusion[0, 1:].mean() - 0.35) < 0.05
    assert confusion[0, 0] > 0.95


def test_where_the_majority_is_wrong_two_classes_are_mostly_drawn_as_another(
    canvases: tuple[np.ndarray, np.ndarray],
) -> None:
    mask, region = canvases
    rngs = [np.random.default_rng(n) for n in range(len(mask))]
    drawn = [draw(mask[n], MAJORITY, rngs[n], regions=region[n]) for n in range(len(mask))]
    confusion = observed_confusion(np.stack([positive for positive, _ in drawn]), mask, 5)
    for true, other in ((2, 1), (4, 3)):
        assert 1.2 * confusion[true, true] < confusion[other, true]
        assert confusion[true, other] < 0.02
    for n, (_, negative) in enumerate(drawn):  # honest, and on every object
        assert not (negative == mask[n])[mask[n] > 0].any()
        for number in np.unique(region[n][region[n] > 0]):
            assert (negative[region[n] == number] != IGNORE).any()


def test_bad_presets_are_refused() -> None:
    with pytest.raises(ValueError, match="sum to 1"):
        Preset("bad", EXACT, EXACT, ((0.5, 0.0), (0.4, 1.0)))
    with pytest.raises(ValueError, match="square"):
        Preset("bad", EXACT, EXACT, ((1.0, 0.0),))
    with pytest.raises(ValueError, match="at most 1"):
        ShapeNoise(broken=0.8, thin=0.3)
    with pytest.raises(ValueError, match="negatives"):
        Preset("bad", EXACT, EXACT, cyclic_swap(2, 0.0), negatives="some")


def test_the_demos_drawings_are_those_of_the_published_table(canvases: tuple[np.ndarray, np.ndarray]) -> None:
    """Checksums of drawings of the release whose numbers the README gives; another one means that its table is out of date."""
    mask, region = canvases
    found = {}
    for preset in (HASTY, BINARY):
        masks = mask if preset is HASTY else (mask > 0).astype(np.uint8)
        drawn = [draw(masks[n], preset, np.random.default_rng(n), regions=region[n]) for n in range(50)]
        found[preset.name] = crc32(np.array(drawn).tobytes())
    assert found == {"hasty": 2090422109, "binary": 1293131010}
