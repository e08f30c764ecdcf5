"""IDX files, the sample in the package, digits on a canvas."""

from __future__ import annotations

import gzip
import os
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, open_split
from coarse_train.data.mnist import (
    AREAS,
    CANVAS,
    DIGITS,
    PROCESSES,
    SAMPLE_DIR,
    place_digits,
    read_idx,
    read_split,
)
from coarse_train.pen import measure
from coarse_train.simulate import draw_coarse, pair_counts, shares

from .data_trees import save, write_drawings
from .make_mnist_sample import PER_CLASS, make_sample, write_idx

FULL = Path(os.environ.get("COARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "mnist"


# What `_drawn` gives for 50 images of each variant.
PUBLISHED = {
    "majority": 3384898058,
    "hasty": 3611368945,
    "half": 853987775,
    "sparse": 625239999,
    "alike": 3591361982,
    "swallowed": 1902026106,
    "thick": 4101347709,
    "thin": 3391462870,
    "thick_names": 3273067478,
    "whole_names": 430530592,
    "binary_names": 4244282506,
    "majority_spots": 3360066970,
    "majority_scribbles": 1858931984,
    "binary": 665638607,
    "digits-0.01": 1208779300,
    "digits-0.05": 115959780,
    "digits-0.25": 1421778077,
    "digits-0.5": 3840201306,
    "digits-1": 2295293881,
}


def _idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()


def _folder(path: Path, images: np.ndarray, labels: np.ndarray) -> Path:
    for split in ("train", "t10k"):
        (path / f"{split}-images-idx3-ubyte").write_bytes(_idx(images))
        (path / f"{split}-labels-idx1-ubyte").write_bytes(_idx(labels))
    return path


@pytest.mark.parametrize("compress", [False, True])
def test_read_idx_plain_and_gzip_whatever_the_name(tmp_path: Path, compress: bool) -> None:
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = tmp_path / "values"
    path.write_bytes(gzip.compress(_idx(array)) if compress else _idx(array))
    np.testing.assert_array_equal(read_idx(path), array)


def test_write_idx_is_read_back_and_has_the_same_bytes_every_time(tmp_path: Path) -> None:
    array = np.arange(6, dtype=np.uint8).reshape(3, 2)
    for name in ("a.gz", "b.gz"):
        write_idx(tmp_path / name, array)
    np.testing.assert_array_equal(read_idx(tmp_path / "a.gz"), array)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()


_GOOD = _idx(np.arange(24, dtype=np.uint8).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_GOOD[:-1], "expected 24 values .* got 23"),
        (_GOOD + b"x", "expected 24 values .* got 25"),
        (_GOOD[:9], "header of 16 bytes for 3 axes, got 9"),
        (b"", "no bytes"),
        (b"\x89PNG\r\n", "expected an IDX file .* got 89 50 4e 47"),
        (b"\x00\x00\x0d\x01\x00\x00\x00\x01....", "unsigned bytes .* got type 0x0d"),
        (b"\x00\x00\x08\x03" + b"\xff" * 12, "got 0 "),  # sizes whose product overflows 64 bits
        (gzip.compress(_GOOD)[:-10], "complete gzip file"),
        (gzip.compress(_GOOD)[:12] + b"junkjunkjunkjunk", "complete gzip file"),
    ],
    ids=["short", "long", "short-header", "empty", "png", "float", "overflow", "gzip-short", "gzip-junk"],
)
def test_a_damaged_file_is_named_in_the_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "damaged-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_idx(path)
    assert str(path) in str(error.value)


def test_labels_must_match_images(tmp_path: Path) -> None:
    folder = _folder(tmp_path, np.zeros((5, 28, 28), np.uint8), np.zeros(4, np.uint8))
    with pytest.raises(ValueError, match="labels-idx1-ubyte: expected 5 labels, one for each image, got 4"):
        read_split(folder, "train")


def test_wrong_ranks_and_sizes_are_named(tmp_path: Path) -> None:
    labels = np.zeros(4, np.uint8)
    with pytest.raises(ValueError, match=r"images-idx3-ubyte: expected images of shape \(N, 28, 28\), got \(4, 8, 8\)"):
        read_split(_folder(tmp_path, np.zeros((4, 8, 8), np.uint8), labels), "train")
    with pytest.raises(ValueError, match="expected labels from 0 to 9, got 12"):
        read_split(_folder(tmp_path, np.zeros((4, 28, 28), np.uint8), labels + 12), "test")


def test_a_folder_without_the_files_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"expected train-images-idx3-ubyte.* in {tmp_path}"):
        read_split(tmp_path, "train")


def test_too_few_digits_of_the_classes(tmp_path: Path) -> None:
    folder = _folder(tmp_path, np.zeros((30, 28, 28), np.uint8), np.ones(30, np.uint8))
    with pytest.raises(ValueError, match=r"root: expected at least 20 digits of .* got 0"):
        open_split(DataConfig(dataset="mnist", root=folder), "train")


def test_the_sample_is_small_attributed_and_balanced() -> None:
    files = list(SAMPLE_DIR.iterdir())
    assert sum(path.stat().st_size for path in files) <= 1_000_000
    text = (SAMPLE_DIR / "ATTRIBUTION.md").read_text()
    assert "LeCun" in text
    assert "Cortes" in text
    assert "Burges" in text
    assert "licenses/by-sa/3.0" in text
    for split, count in PER_CLASS.items():
        images, labels = read_split(SAMPLE_DIR, split)
        assert images.shape == (count * len(DIGITS), 28, 28)
        assert [int((labels == digit).sum()) for digit in DIGITS] == [count] * len(DIGITS)


@pytest.mark.slow
@pytest.mark.skipif(not FULL.is_dir(), reason=f"the full MNIST is not at {FULL}; COARSE_DATA names its parent folder")
def test_the_sample_is_made_from_the_full_files(tmp_path: Path) -> None:
    assert make_sample(FULL, tmp_path) <= 1_000_000
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(read_idx(path), read_idx(SAMPLE_DIR / path.name))


@pytest.mark.slow
@pytest.mark.skipif(not FULL.is_dir(), reason=f"the full MNIST is not at {FULL}; COARSE_DATA names its parent folder")
def test_full_files_are_read() -> None:
    assert [len(read_split(FULL, split)[0]) for split in ("train", "test")] == [60_000, 10_000]
    found = [open_split(DataConfig(dataset="mnist", root=FULL, limit=40), split) for split in ("train", "val", "test")]
    assert len(found[0]) == 40
    assert all(len(source) > 1000 for source in found[1:])


def test_place_digits_uses_each_digit_once_and_never_overlaps() -> None:
    images, labels = read_split(SAMPLE_DIR, "test")
    images, labels = images[:60], labels[:60]
    canvas, mask, region = place_digits(images, labels, seed=3)
    assert canvas.shape == mask.shape == region.shape == (30, CANVAS, CANVAS)
    assert int(canvas.sum(dtype=np.int64)) == int(images[:, 4:-4, 4:-4].sum(dtype=np.int64))
    np.testing.assert_array_equal(mask > 0, region > 0)
    np.testing.assert_array_equal(mask > 0, canvas >= 100)
    for n in range(30):
        for number in (1, 2):
            assert len(np.unique(mask[n][region[n] == number])) == 1
    again = place_digits(images, labels, seed=3)
    np.testing.assert_array_equal(canvas, again[0])


@pytest.mark.slow
def test_splits_are_disjoint_and_drawings_do_not_change() -> None:
    config = DataConfig(dataset="mnist")
    sources = [open_split(config, split) for split in ("train", "val", "test")]
    assert [len(source) for source in sources] == [2016, 224, 480]
    canvases = [{source.load(index).image.tobytes() for index in range(60)} for source in sources]
    assert not canvases[0] & canvases[1]
    assert not canvases[0] & canvases[2]
    assert not canvases[1] & canvases[2]
    again = open_split(config, "train")
    for index in (0, 7, 2015):
        record = sources[0].load(index)
        assert record.image.shape == (CANVAS, CANVAS, 1)
        assert record.image.dtype == np.uint8
        for kind in ("positive", "negative", "mask"):
            np.testing.assert_array_equal(getattr(record, kind), getattr(again.load(index), kind))
        assert sources[0].kinds(index) == {"positive", "negative", "mask"}


def test_a_drawing_that_was_handed_out_may_be_written_to() -> None:
    """It is kept, since drawing takes longer than a step has for it."""
    source = open_split(DataConfig(dataset="mnist"), "train")
    first = source.load(0)
    assert first.positive is not None
    before = first.positive.copy()
    first.positive[:] = 3
    np.testing.assert_array_equal(source.load(0).positive, before)


@pytest.mark.slow
def test_every_process_is_a_variant_of_the_same_digits() -> None:
    for variant, process in PROCESSES.items():
        source = open_split(DataConfig(dataset="mnist", variant=variant), "train")
        record = source.load(0)
        objects = source.region[0] if process.background is not None else None  # type: ignore[attr-defined]
        positive, negative = draw_coarse(record.mask, process, np.random.default_rng([0, 0]), objects=objects)
        np.testing.assert_array_equal(record.positive, positive)
        np.testing.assert_array_equal(record.negative, negative)
        assert set(np.unique(record.mask)) <= set(range(process.num_classes))
    hasty = open_split(DataConfig(dataset="mnist", variant="hasty"), "train").load(5)
    default = open_split(DataConfig(dataset="mnist"), "train").load(5)
    np.testing.assert_array_equal(hasty.positive, default.positive)


def _drawn(variant: str, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positive (N, H, W), negative (N, 1, H, W), mask (N, H, W)."""
    source = open_split(DataConfig(dataset="mnist", variant=variant), "train")
    records = [source.load(index) for index in range(count)]
    maps = [(record.positive, record.negative, record.mask) for record in records]
    positive, negative, mask = (np.stack(part) for part in zip(*maps, strict=True))
    return positive, negative, mask


def test_hasty_drawings_are_as_documented() -> None:
    """An object pixel is drawn as its own class about 45 times in 100, as background 35 and as another class 20."""
    positive, _, mask = _drawn("hasty")
    confusion = shares(pair_counts(positive, mask, 5))
    assert abs(np.diag(confusion)[1:].mean() - 0.45) < 0.05
    assert abs(confusion[0, 1:].mean() - 0.35) < 0.05
    assert confusion[0, 0] > 0.95


@pytest.mark.slow
def test_where_the_majority_is_wrong_two_classes_are_mostly_drawn_as_another() -> None:
    positive, _, mask = _drawn("majority")
    confusion = shares(pair_counts(positive, mask, 5))
    for true, other in ((2, 1), (4, 3)):
        assert 1.2 * confusion[true, true] < confusion[other, true]
        assert confusion[true, other] < 0.02


@pytest.mark.parametrize("variant", ["hasty", "majority"])
def test_negatives_are_honest_weak_and_silent_where_nothing_is_drawn(variant: str) -> None:
    _, negative, mask = _drawn(variant)
    named = pair_counts(negative, np.broadcast_to(mask[:, None], negative.shape), 5)  # [named, true]
    assert not named.diagonal().any()  # never the true class
    assert not named[0].any()  # never "not background"
    assert 0.1 < (negative != IGNORE).mean() < 0.6
    for true in range(1, 5):  # uniform over the three wrong digits
        rates = np.delete(named[1:, true], true - 1) / named[:, true].sum()
        assert np.all(np.abs(rates - 1 / 3) < 0.12)
    covered = [(negative[n, 0][mask[n] > 0] != IGNORE).mean() for n in range(len(mask))]
    assert np.mean(covered) > 0.8  # on every object, most of it
    assert min(covered) > 0


@pytest.mark.slow
def test_outlines_of_a_thick_and_a_thin_pen_are_a_pixel_off_and_names_are_right() -> None:
    for variant, wrong in (("thick", 1.0), ("thin", -1.0)):
        positive, _, mask = _drawn(variant, 40)
        report = measure(((str(n), positive[n], mask[n]) for n in range(len(mask))), ("background", "0", "3", "4", "7"))
        assert (
            report.radii() == (0.0, wrong, wrong, wrong, wrong) or variant == "thin"
        )  # the thinnest strokes stay a line
        assert report.together.radius == wrong
        confusion = shares(pair_counts(positive, mask, 5))[1:, 1:]
        assert not (confusion - np.diag(np.diag(confusion))).any()


@pytest.mark.slow
def test_half_and_sparse_have_as_many_negative_drawings_as_they_say() -> None:
    for variant, share in (("majority", 1.0), ("half", 0.5), ("sparse", 0.15)):
        source = open_split(DataConfig(dataset="mnist", variant=variant), "train")
        negative = _drawn(variant, 200)[1]
        regions = [source.region[n] for n in range(200)]  # type: ignore[attr-defined]
        found = [bool((negative[n, 0][regions[n] == k] != IGNORE).any()) for n in range(200) for k in (1, 2)]
        assert abs(np.mean(found) - share) < 0.06


def test_look_alikes_are_never_told_apart_in_alike() -> None:
    _, negative, mask = _drawn("alike", 100)
    named = pair_counts(negative, np.broadcast_to(mask[:, None], negative.shape), 5)
    told = named[1:3, 1:3].sum() + named[3:, 3:].sum()
    assert told < 1e-3 * named.sum()  # the margin of a drawing about another object, where two touch
    assert named[1:3, 3:].all()


@pytest.mark.slow
def test_a_swallowed_class_is_mostly_background_and_negatives_may_say_so() -> None:
    positive, negative, mask = _drawn("swallowed", 200)
    assert shares(pair_counts(positive, mask, 5))[0, 2] > 0.65
    assert pair_counts(negative, np.broadcast_to(mask[:, None], negative.shape), 5)[0, 2] > 0


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["whole_names", "binary_names"])
def test_where_objects_are_drawn_whole_pixels_have_the_matrix_of_names(variant: str) -> None:
    positive, negative, mask = _drawn(variant)
    process = PROCESSES[variant]
    counts = pair_counts(positive, mask, process.num_classes)
    assert counts.sum() == mask.size  # every pixel says something
    np.testing.assert_allclose(shares(counts), process.confusion, atol=0.06)
    assert not pair_counts(negative[:, 0], mask, process.num_classes).diagonal().any()  # honest
    assert np.mean([(negative[n, 0][mask[n] > 0] != IGNORE).mean() for n in range(len(mask))]) > 0.6


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "ratio"), [("majority_spots", 0.1), ("majority_scribbles", 0.05)])
def test_a_few_discs_and_strokes_carry_the_names_of_majority_and_say_nothing_elsewhere(
    variant: str, ratio: float
) -> None:
    positive, negative, mask = _drawn(variant)
    for drawn in (positive, negative[:, 0]):
        assert abs((drawn != IGNORE).mean() - ratio) < 0.1 * ratio
    confusion = shares(pair_counts(positive, mask, 5))
    np.testing.assert_allclose(confusion, PROCESSES[variant].confusion, atol=0.1)
    for true, other in ((2, 1), (4, 3)):
        assert confusion[true, true] < confusion[other, true]
    named = pair_counts(negative[:, 0], mask, 5)
    assert not named.diagonal().any()
    assert not named[0].any()
    assert named[:, 0].sum() > named[:, 1:].sum()  # "not a 4" on the background, too


def test_binary_negatives_cover_everything() -> None:
    _, negative, mask = _drawn("binary", 50)
    assert set(np.unique(negative)) == {0, 1}
    assert (negative[:, 0] == 1)[mask == 0].mean() > 0.9  # mostly "not a digit" where there is none
    assert 0.6 < (negative[:, 0] == 0)[mask == 1].mean() < 0.95


@pytest.mark.slow
def test_drawings_are_those_of_the_published_tables() -> None:
    """Checksums of drawings that published numbers come from; another one means that their tables are out of date."""
    found = {variant: zlib.crc32(np.concatenate(_drawn(variant, 50)[:2], None).tobytes()) for variant in PROCESSES}
    assert found == PUBLISHED


@pytest.mark.slow
@pytest.mark.parametrize("area", AREAS)
def test_single_digits_are_annotated_on_a_part_of_the_area_with_the_same_errors(area: float) -> None:
    positive, negative, mask = _drawn(f"digits-{area:g}", 200)
    assert mask.shape[1:] == (28, 28)
    for layer in (positive, negative[:, 0]):
        assert abs((layer != IGNORE).mean() - area) < max(0.006, 0.02 * area)
    # a digit is drawn as background, and a background as no background: as often on every part, but along the middle of shapes
    confusion, named = shares(pair_counts(positive, mask, 2)), shares(pair_counts(negative[:, 0], mask, 2))
    assert confusion[1, 0] < 0.15
    assert named[0, 0] < 0.2
    if area > 0.1:
        assert abs(confusion[0, 1] - 0.5) < 0.08
        assert abs(named[1, 1] - 0.22) < 0.08


def test_single_digits_are_drawn_on_in_training_alone() -> None:
    for split, kinds in (("train", {"positive", "negative", "mask"}), ("val", {"mask"}), ("test", {"mask"})):
        source = open_split(DataConfig(dataset="mnist", variant="digits-0.25"), split)
        assert source.kinds(0) == kinds
        record = source.load(0)
        assert (record.positive is None) == (record.negative is None) == (split != "train")
        np.testing.assert_array_equal(record.mask, record.image[..., 0] >= 100)
    few = open_split(DataConfig(dataset="mnist", variant="digits-0.25", limit=5), "train")
    assert len(few) == 5


@pytest.mark.skipif(not FULL.is_dir(), reason=f"the full MNIST is not at {FULL}; COARSE_DATA names its parent folder")
def test_single_digits_of_the_full_files_are_all_ten() -> None:
    config = DataConfig(dataset="mnist", root=FULL, variant="digits-1")
    assert [len(open_split(config, split)) for split in ("train", "val", "test")] == [54_000, 6_000, 10_000]


def test_a_limit_takes_the_first_canvases_and_changes_none() -> None:
    whole = open_split(DataConfig(dataset="mnist"), "train")
    few = open_split(DataConfig(dataset="mnist", limit=3), "train")
    assert [few.name(index) for index in range(len(few))] == ["00000", "00001", "00002"]
    for index in range(3):
        np.testing.assert_array_equal(few.load(index).image, whole.load(index).image)
    assert len(open_split(DataConfig(dataset="mnist", limit=3), "val")) == 224


def test_drawings_in_folders_replace_those_of_the_process(tmp_path: Path) -> None:
    config = DataConfig(dataset="mnist", limit=4)
    source = open_split(config, "train")
    for index in range(len(source)):
        layers = np.full((1 + index % 2, CANVAS, CANVAS), index, np.uint8)
        write_drawings(tmp_path / "positive/train", source.name(index), layers[:1], source.classes)
        write_drawings(tmp_path / "negative/train", source.name(index), layers, source.classes)
    config = replace(config, positives=tmp_path / "positive", negatives=tmp_path / "negative")
    record = open_split(config, "train").load(2)
    np.testing.assert_array_equal(record.positive, np.full((CANVAS, CANVAS), 2))
    assert record.negative is not None
    assert [set(layer.ravel()) for layer in record.negative] == [{2}, {IGNORE}]
    np.testing.assert_array_equal(record.mask, source.load(2).mask)
    val = open_split(config, "val")
    assert val.kinds(0) == {"mask"}
    assert val.load(0).positive is None


def test_bad_drawings_in_folders_are_named_or_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("00000", "00001", "00002"):
        save(tmp_path / f"{name}.png", np.zeros((CANVAS, CANVAS), np.uint8))
    config = DataConfig(dataset="mnist", limit=4, positives=tmp_path)
    with pytest.raises(ValueError, match=r"a positive drawing NAME\.png for every image, got none for 00003"):
        open_split(config, "train")
    save(tmp_path / "00001.png", np.zeros((28, 28), np.uint8))
    with pytest.raises(ValueError, match=r"00001\.png: expected 48x48 pixels as canvas 00001 has, got 28x28"):
        open_split(replace(config, limit=3), "train").load(1)
    source = open_split(replace(config, skip_bad=True), "train")
    assert [source.name(index) for index in range(len(source))] == ["00000", "00002"]
    assert [source.load(index).name for index in range(len(source))] == ["00000", "00002"]
    assert [line[:13] for line in capsys.readouterr().err.splitlines()] == ["skipped 00003", "skipped 00001"]


def test_a_variant_that_there_is_not() -> None:
    names = ", ".join(map(repr, ("", *PROCESSES)))
    with pytest.raises(ValueError, match=rf"variant: expected one of \({names}\) for mnist, got 'swap'"):
        open_split(DataConfig(dataset="mnist", variant="swap"), "train")
