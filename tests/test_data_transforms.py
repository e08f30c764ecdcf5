"""Samples: one geometry for image and labels, random numbers of (seed, epoch, index), and only what is to be learned from."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch.utils.data import DataLoader

from coarse_train.commands import simulate as command
from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, Record, Sample, open_split, segmentation
from coarse_train.data.classes import Classes
from coarse_train.data.segmentation import SegmentationData
from coarse_train.data.transforms import Augment, Geometry, transform, untouched
from coarse_train.simulate import draw_coarse, generator_for, level

CAMVID = Path(os.environ.get("COARSE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "camvid"
ALL = ("positive", "negative", "mask")
EXTREMES = (ndimage.minimum_filter, ndimage.maximum_filter)
JITTER = DataConfig(crop=(24, 40), scale=(0.5, 2.0), flip=True, colour=0.3)


def _blocks(index: int, height: int, width: int) -> np.ndarray:
    """(H, W) uint8: rectangles of classes 0 to 3, each 8x8 pixels or more."""
    rng = np.random.default_rng(index)
    return np.kron(rng.integers(0, 4, (-(-height // 8), -(-width // 8))), np.ones((8, 8), int))[:height, :width].astype(
        np.uint8
    )


class Blocks:
    """Images whose brightness is 60 times the class. Drawings and mask are the same map, so they must stay the same."""

    classes = Classes(("a", "b", "c", "d"), ((0, 0, 0),) * 4)

    def __init__(
        self,
        kinds: Sequence[tuple[str, ...]] | None = None,
        sizes: list[tuple[int, int]] | None = None,
        channels: int = 3,
        layers: int = 2,
    ):
        self._kinds = kinds or [ALL] * 6
        self.sizes = sizes or [(48, 64)] * len(self._kinds)
        self.channels, self.layers = channels, layers
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return len(self._kinds)

    def name(self, index: int) -> str:
        return f"image{index}"

    def kinds(self, index: int) -> frozenset[str]:
        return frozenset(self._kinds[index])

    def load(self, index: int) -> Record:
        self.loaded.append(index)
        labels = _blocks(index, *self.sizes[index])
        image = np.repeat(labels[..., None] * 60, self.channels, axis=2).astype(np.uint8)
        maps = {"positive": labels, "negative": np.stack([labels] * self.layers), "mask": labels}
        return Record(self.name(index), image, **{kind: maps[kind] for kind in self._kinds[index]})


def _equal(one: Sample, two: Sample) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _augment(config: DataConfig) -> Augment:
    return Augment(config.crop, config.scale, config.flip, config.colour)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_sample_depends_on_seed_epoch_and_index_alone(workers: int) -> None:
    """In any order, in any process, whatever was asked for before."""
    config = replace(JITTER, simulate="coarse")
    source = Blocks([("mask",)] * 4)
    dataset = SegmentationData(source, config, training=True, seed=3)
    keys = [(epoch, index) for epoch in range(2) for index in range(4)]
    expected = {key: SegmentationData(source, config, training=True, seed=3)[key] for key in keys}
    for order in (keys, keys[::-1]):
        loader = DataLoader(dataset, batch_size=None, sampler=order, num_workers=workers)
        for key, sample in zip(order, loader, strict=True):
            assert _equal(Sample(*sample), expected[key]), key
    assert not _equal(expected[0, 1], expected[1, 1])
    assert not _equal(expected[0, 1], SegmentationData(source, config, training=True, seed=4)[0, 1])
    assert _equal(dataset[1], expected[0, 1])


def test_image_and_all_label_maps_move_together() -> None:
    source = Blocks([ALL])
    record = source.load(0)
    for seed in range(40):
        sample = transform(record, replace(_augment(JITTER), colour=0.0), np.random.default_rng(seed))
        assert sample.image.shape == (3, 24, 40)
        for labels in (sample.positive, *sample.negative):
            assert torch.equal(labels, sample.mask)
        seen = sample.mask != IGNORE
        brightness = sample.image[0] * 255 / 60
        around = [extreme(sample.mask, 3, mode="constant", cval=254) for extreme in EXTREMES]  # nor at the border
        even = around[0] == around[1]
        inside = seen & torch.from_numpy(even)  # between blocks the image is interpolated, labels are not
        assert inside.sum() > 20
        assert (brightness - sample.mask.float()).abs()[inside].max() < 0.05
        assert set(sample.mask.unique().tolist()) <= {0, 1, 2, 3, IGNORE}
        assert not sample.image[:, ~seen].any()


def test_labels_are_never_interpolated() -> None:
    """Between classes 0 and 3 there is no 1 and no 2."""
    labels = _blocks(0, 48, 64) // 2 * 3
    record = Record("image", np.zeros((48, 64, 3), np.uint8), labels, labels[None], labels)
    for seed in range(20):
        sample = transform(record, _augment(JITTER), np.random.default_rng(seed))
        for field in sample[1:]:
            assert set(field.unique().tolist()) <= {0, 3, IGNORE}


def test_samples_are_contiguous_and_of_the_documented_types() -> None:
    for channels in (1, 3):
        source = Blocks(channels=channels)
        for config, training in ((JITTER, True), (DataConfig(), False)):
            sample = SegmentationData(source, config, training=training)[0]
            height, width = (24, 40) if training else (48, 64)
            assert sample.image.shape == (channels, height, width)
            assert sample.negative.shape == (2, height, width)
            assert sample.positive.shape == sample.mask.shape == (height, width)
            assert sample.image.dtype == torch.float32
            assert all(labels.dtype == torch.uint8 for labels in sample[1:])
            assert all(field.is_contiguous() for field in sample)
            assert 0 <= sample.image.min() <= sample.image.max() <= 1


def test_a_crop_larger_than_the_image_is_padded_with_ignore() -> None:
    record = Blocks([ALL]).load(0)
    places = set()
    for seed in range(30):
        sample = transform(record, Augment(crop=(60, 100), flip=True), np.random.default_rng(seed))
        seen = sample.mask != IGNORE
        rows, columns = torch.nonzero(seen.any(1)), torch.nonzero(seen.any(0))
        assert int(seen.sum()) == 48 * 64 == len(rows) * len(columns)
        inside = sample.mask[rows[0] : rows[0] + 48, columns[0] : columns[0] + 64].numpy()
        assert record.mask is not None
        assert np.array_equal(inside, record.mask) or np.array_equal(inside, record.mask[:, ::-1])
        assert (sample.negative[:, ~seen] == IGNORE).all()
        places.add((int(rows[0]), int(columns[0])))
    assert len(places) > 15  # anywhere, not always in a corner


def test_half_of_the_images_are_mirrored() -> None:
    record = Blocks([ALL]).load(0)
    plain = untouched(record)
    mirrored = 0
    for seed in range(400):
        sample = transform(record, Augment(flip=True), np.random.default_rng(seed))
        if torch.equal(sample.mask, plain.mask.flip(-1)):
            assert torch.equal(sample.image, plain.image.flip(-1))
            assert torch.equal(sample.negative, plain.negative.flip(-1))
            mirrored += 1
        else:
            assert _equal(sample, plain)
    assert 160 < mirrored < 240  # 4 standard deviations of a binomial
    assert _equal(transform(record, Augment(), np.random.default_rng(0)), plain)


def test_the_zoom_is_uniform_on_a_logarithmic_scale() -> None:
    rng = np.random.default_rng(0)
    draws = [Geometry.draw(1000, 2000, Augment(scale=(0.5, 2.0)), rng) for _ in range(1000)]
    zooms = np.array([geometry.zoomed[0] / 1000 for geometry in draws])
    assert 0.5 <= zooms.min() < 0.52
    assert 1.95 < zooms.max() <= 2.0
    assert abs((zooms < 1).mean() - 0.5) < 0.065  # as often in as out; uniform on a linear scale: a third
    assert all(abs(geometry.zoomed[1] - 2 * geometry.zoomed[0]) <= 2 for geometry in draws)  # the aspect ratio stays


def test_every_place_of_the_image_is_cropped() -> None:
    rng = np.random.default_rng(0)
    draws = [Geometry.draw(10, 12, Augment(crop=(8, 8)), rng) for _ in range(300)]
    assert {(geometry.top, geometry.left) for geometry in draws} == {(i, j) for i in range(3) for j in range(5)}


def test_a_zoomed_crop_is_a_crop_of_the_zoomed_image() -> None:
    """Only the crop is computed; it must be what zooming everything and cropping then gives."""
    rng = np.random.default_rng(0)
    array = rng.integers(0, 256, (37, 53, 3)).astype(np.uint8)
    for seed in range(30):
        geometry = Geometry.draw(37, 53, Augment(crop=(20, 31), scale=(0.7, 1.9)), np.random.default_rng(seed))
        height, width = geometry.zoomed
        window = np.s_[geometry.top : geometry.top + geometry.height, geometry.left : geometry.left + geometry.width]
        for values, resample, tolerance in (
            (array, Image.Resampling.BILINEAR, 1),
            (array[..., 0], Image.Resampling.NEAREST, 0),
        ):
            whole = np.asarray(Image.fromarray(values).resize((width, height), resample))[window].astype(int)
            difference = np.abs(geometry.part(values, resample).astype(int) - whole)
            if tolerance:
                assert difference.max() <= tolerance
            else:
                assert (difference > 0).mean() < 0.01  # a pixel between two may go either way


def test_shrinking_averages_instead_of_skipping() -> None:
    image = np.zeros((40, 40, 1), np.uint8)
    image[::2, ::2] = image[1::2, 1::2] = 255
    sample = transform(Record("board", image), Augment(scale=(0.5, 0.5)), np.random.default_rng(0))
    assert sample.image.shape == (1, 20, 20)
    assert (sample.image - 0.5).abs().max() < 0.1


@pytest.mark.parametrize("channels", [1, 3])
def test_colours_change_the_image_and_nothing_else(channels: int) -> None:
    record = Blocks([ALL], channels=channels).load(0)
    plain = untouched(record)
    images = []
    for seed in range(20):
        sample = transform(record, Augment(colour=0.5), np.random.default_rng(seed))
        assert _equal(sample._replace(image=plain.image), plain)
        assert 0 <= sample.image.min() <= sample.image.max() <= 1
        images.append(sample.image)
    means = torch.stack([image.mean() for image in images])
    assert means.std() > 0.05  # brightness
    assert torch.stack([image.std() / image.mean() for image in images]).std() > 0.05  # contrast
    assert _equal(transform(record, Augment(colour=0.0), np.random.default_rng(0)), plain)


def test_saturation_is_between_grey_and_more_colourful() -> None:
    """A grey image has no colour to change; that of a reddish one varies by the factor in 1 +- strength."""
    grey = transform(Record("grey", np.full((4, 4, 3), 90, np.uint8)), Augment(colour=0.5), np.random.default_rng(1))
    assert torch.allclose(grey.image[0], grey.image[1])
    image = np.full((4, 4, 3), 100, np.uint8)
    image[..., 0] = 140
    spread = []
    for seed in range(200):
        sample = transform(Record("red", image), Augment(colour=0.5), np.random.default_rng(seed)).image
        spread.append(float((sample[0] - sample[1]).mean() / sample.mean()))
    before = 40 / (340 / 3)
    # a uniform image has its mean in its grey value, not in its colours: contrast scales them as saturation does
    assert 0.2 < min(spread) / before < 0.5
    assert 1.6 < max(spread) / before < 2.5


def test_evaluation_sees_the_whole_image_and_every_map() -> None:
    source = Blocks()
    config = replace(JITTER, supervision="drawings")
    dataset = SegmentationData(source, config, training=False)
    for index in range(len(dataset)):
        assert _equal(dataset[(7, index)], untouched(source.load(index)))
    assert _equal(SegmentationData(source, None, training=False)[1], untouched(source.load(1)))


def test_missing_maps_are_ignore() -> None:
    sample = SegmentationData(Blocks([("positive",)]), training=False)[0]
    assert sample.negative.shape == (1, 48, 64)
    assert (sample.negative == IGNORE).all()
    assert (sample.mask == IGNORE).all()
    assert (sample.positive != IGNORE).all()


def _present(sample: Sample) -> tuple[bool, bool, bool]:
    return tuple(bool((labels != IGNORE).any()) for labels in sample[1:])  # type: ignore[return-value]


def test_drawings_supervision_never_shows_a_mask() -> None:
    dataset = SegmentationData(Blocks(), DataConfig(supervision="drawings"), training=True)
    assert {_present(dataset[index]) for index in range(6)} == {(True, True, False)}


def test_masks_supervision_shows_nothing_else() -> None:
    dataset = SegmentationData(Blocks(), DataConfig(supervision="masks", simulate="coarse"), training=True)
    assert {_present(dataset[index]) for index in range(6)} == {(False, False, True)}


def test_mixed_supervision_takes_so_many_of_the_images_that_have_a_mask() -> None:
    kinds = [ALL if index % 2 else ("positive", "negative") for index in range(12)]
    config = DataConfig(supervision="mixed", dense_images=4)
    chosen = []
    for seed in range(6):
        dataset = SegmentationData(Blocks(kinds), config, training=True, seed=seed)
        shown = [_present(dataset[index]) for index in range(12)]
        dense = {index for index, present in enumerate(shown) if present == (False, False, True)}
        assert len(dense) == 4
        assert all(index % 2 for index in dense)
        assert all(present == (True, True, False) for index, present in enumerate(shown) if index not in dense)
        again = SegmentationData(Blocks(kinds), config, training=True, seed=seed)
        assert again.dense == dense
        chosen.append(frozenset(dense))
    assert len(set(chosen)) > 1  # the seed chooses


def test_more_dense_images_than_masks_is_an_error() -> None:
    config = DataConfig(supervision="mixed", dense_images=3)
    with pytest.raises(ValueError, match="dense_images: expected 0 to 2, the images with masks, got 3"):
        SegmentationData(Blocks([ALL, ("positive",), ALL]), config, training=True)


def test_masks_supervision_names_the_image_without_one() -> None:
    with pytest.raises(ValueError, match="image1: expected a dense mask, as supervision is masks, got none"):
        SegmentationData(Blocks([ALL, ("positive",)]), DataConfig(supervision="masks"), training=True)


def test_nothing_to_learn_from_says_what_to_do_and_reads_no_image() -> None:
    source = Blocks([("mask",)] * 3)
    for config in (DataConfig(), DataConfig(supervision="mixed", dense_images=0)):
        with pytest.raises(ValueError, match=r"--positives or --negatives.*coarse-train simulate.*--simulate LEVEL"):
            SegmentationData(source, config, training=True)
    SegmentationData(source, DataConfig(), training=False)
    SegmentationData(source, DataConfig(simulate="spots"), training=True)
    SegmentationData(source, DataConfig(supervision="mixed", dense_images=1), training=True)
    SegmentationData(Blocks([("mask",), ("mask",), ("negative",)]), DataConfig(), training=True)
    assert source.loaded == []


def test_simulated_drawings_need_a_mask_in_every_image_that_has_none() -> None:
    with pytest.raises(ValueError, match="image1: expected a dense mask to simulate drawings from, got none"):
        SegmentationData(Blocks([("mask",), ()]), DataConfig(simulate="coarse"), training=True)


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match=r"simulate: level: expected one of .*'coarse'.* got 'rough'"):
        SegmentationData(Blocks(), DataConfig(simulate="rough"), training=True)


def test_simulated_are_the_kinds_that_the_record_lacks() -> None:
    """Equal in every epoch, from the dense mask, which itself is not shown; drawings that exist are not replaced."""
    source = Blocks([("mask",), ("mask", "positive"), ("mask", "negative"), ALL, ("positive",)])
    dataset = SegmentationData(source, DataConfig(simulate="sketch"), training=True, seed=5)
    for index in range(5):
        record = source.load(index)
        sample = dataset[(3, index)]
        assert (sample.mask == IGNORE).all()
        positive, negative = record.positive, record.negative
        if record.mask is not None:
            drawn = draw_coarse(record.mask, level("sketch", 4), generator_for(5, f"image{index}"))
            positive = drawn[0] if positive is None else positive
            negative = drawn[1] if negative is None else negative
        assert positive is not None
        np.testing.assert_array_equal(sample.positive, positive)
        if negative is not None:
            np.testing.assert_array_equal(sample.negative, negative)
        assert _equal(dataset[(4, index)], sample)
    assert _present(SegmentationData(source, DataConfig(simulate="sketch"), training=False)[0]) == (True, True, True)


def test_simulated_drawings_are_transformed_with_the_image() -> None:
    source = Blocks([("mask",)])
    config = DataConfig(simulate="full", crop=(24, 40), flip=True)
    sample = SegmentationData(source, config, training=True)[0]
    classes = (sample.image[0] * 255 / 60).round()
    assert (sample.positive == classes).float().mean() > 0.7
    assert not ((sample.negative == classes) & (sample.negative != IGNORE)).any()


def _counting(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    calls: list[None] = []

    def counted(*arguments: object) -> object:
        calls.append(None)
        return draw_coarse(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(segmentation, "draw_coarse", counted)
    return calls


@pytest.mark.parametrize(("bound", "expected"), [(10**6, 3), (0, 9)])
def test_drawings_are_drawn_once_as_long_as_they_fit(
    monkeypatch: pytest.MonkeyPatch, bound: int, expected: int
) -> None:
    calls = _counting(monkeypatch)
    monkeypatch.setattr(segmentation, "_CACHE_BYTES", bound)
    dataset = SegmentationData(Blocks([("mask",)] * 3), DataConfig(simulate="coarse"), training=True)
    epochs = [[dataset[(epoch, index)] for index in range(3)] for epoch in range(3)]
    assert len(calls) == expected
    for epoch in epochs:
        assert all(_equal(one, two) for one, two in zip(epoch, epochs[0], strict=True))


def test_drawn_on_the_fly_is_what_the_command_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Blocks([("mask",)] * 2)
    monkeypatch.setattr(command, "open_split", lambda config, split: source)
    command.run_simulate(command.SimulateConfig(out=tmp_path / "out", level="sketch", seed=9, splits=("train",)))
    dataset = SegmentationData(source, DataConfig(simulate="sketch"), training=True, seed=9)
    for index in range(2):
        sample = dataset[index]
        for kind, suffix, labels in (
            ("positives", "", sample.positive),
            ("negatives", "", sample.negative[0]),
            ("negatives", ".1", sample.negative[1]),
        ):
            written = np.array(Image.open(tmp_path / "out" / kind / "train" / f"image{index}{suffix}.png"))
            np.testing.assert_array_equal(written, labels)


def test_images_of_two_sizes_in_a_batch_are_named() -> None:
    dataset = SegmentationData(Blocks([ALL] * 2, sizes=[(48, 64), (40, 64)]), DataConfig(), training=True)
    loader = DataLoader(dataset, batch_size=2, collate_fn=dataset.collate)
    with pytest.raises(ValueError, match=r"crop: .* got 64x48 .* \(image0\) and 64x40 .* \(image1\); set --crop"):
        next(dataset.batches(loader))
    alone = DataLoader(dataset, batch_size=1, collate_fn=dataset.collate)
    assert [batch.image.shape[2] for batch in alone] == [48, 40]
    cropped = SegmentationData(dataset.source, DataConfig(crop=(32, 32)), training=True)
    batch = next(iter(DataLoader(cropped, batch_size=2, collate_fn=cropped.collate)))
    assert batch.image.shape == (2, 3, 32, 32)


def test_fewer_layers_of_negatives_get_empty_ones_in_a_batch() -> None:
    dataset = SegmentationData(Blocks([ALL, ("positive",)], layers=3), DataConfig(), training=True)
    batch = next(iter(DataLoader(dataset, batch_size=2, collate_fn=dataset.collate)))
    assert isinstance(batch, Sample)
    assert batch.negative.shape == (2, 3, 48, 64)
    assert (batch.negative[0] != IGNORE).all()
    assert (batch.negative[1] == IGNORE).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Augment(crop=(0, 5)), r"crop: expected height and width from 1 to 65535, got \(0, 5\)"),
        (lambda: Augment(scale=(2.0, 1.0)), r"scale: expected .* the smaller first, got \(2.0, 1.0\)"),
        (lambda: Augment(scale=(0.0, 1.0)), r"scale: expected two numbers from 1/64 to 64"),
        (lambda: Augment(colour=1.5), "colour: expected a number from 0 to 1, got 1.5"),
        (lambda: SegmentationData(Blocks(), training=True)[6], "index: expected 0 to 5, got 6"),
    ],
)
def test_bad_settings_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises((ValueError, IndexError), match=message):
        call()


@pytest.mark.slow
@pytest.mark.skipif(not CAMVID.is_dir(), reason=f"CamVid is not at {CAMVID}; COARSE_DATA names its parent folder")
def test_camvid_with_simulated_drawings_makes_batches() -> None:
    config = DataConfig(
        "camvid", CAMVID, simulate="coarse", limit=4, crop=(128, 160), scale=(0.5, 1.5), flip=True, colour=0.3
    )
    dataset = SegmentationData(open_split(config, "train"), config, training=True)
    batch = next(iter(DataLoader(dataset, batch_size=4, collate_fn=dataset.collate)))
    assert batch.image.shape == (4, 3, 128, 160)
    assert batch.negative.shape == (4, 2, 128, 160)
    for labels in (batch.positive, batch.negative):
        assert 0.3 < (labels != IGNORE).float().mean() < 0.9
    assert (batch.mask == IGNORE).all()
