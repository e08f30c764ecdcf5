"""Scores from counts: values by hand, what is left out, and counting over processes."""

from __future__ import annotations

import math
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from coarse_train.data import IGNORE
from coarse_train.metrics import ConfusionMeter


def _by_hand() -> ConfusionMeter:
    """Class 0: 3 of 4 pixels right, predicted 4 times; class 1: 1 of 2, 2 times; class 2: none of 1, predicted once;
    class 3 is nowhere."""
    meter = ConfusionMeter(4)
    meter.update(torch.tensor([0, 0, 0, 1, 1, 2, 0]), torch.tensor([0, 0, 0, 0, 1, 1, 2]))
    return meter


def test_scores_by_hand() -> None:
    meter = _by_hand()
    assert meter.counts.tolist() == [[3, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert meter.iou()[:3].tolist() == [3 / 5, 1 / 3, 0.0]
    assert meter.dice()[:3].tolist() == [6 / 8, 2 / 4, 0.0]
    assert meter.accuracy()[:3].tolist() == [3 / 4, 1 / 2, 0.0]
    assert meter.mean_iou() == 100 * ((3 / 5 + 1 / 3 + 0) / 3)
    assert meter.mean_dice() == 100 * ((3 / 4 + 1 / 2 + 0) / 3)
    assert meter.mean_accuracy() == 100 * ((3 / 4 + 1 / 2 + 0) / 3)
    assert meter.pixel_accuracy() == 100 * (4 / 7)


def test_a_class_that_does_not_occur_has_no_score_and_is_in_no_mean() -> None:
    meter = _by_hand()
    assert [bool(torch.isnan(score[3])) for score in (meter.iou(), meter.dice(), meter.accuracy())] == [True] * 3
    assert [int(torch.isnan(score).sum()) for score in (meter.iou(), meter.dice(), meter.accuracy())] == [1] * 3


def test_a_class_that_is_predicted_but_in_no_mask_scores_zero_and_has_no_accuracy() -> None:
    meter = ConfusionMeter(2)
    meter.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert meter.iou().tolist() == [0.5, 0.0]
    assert meter.dice().tolist() == [2 / 3, 0.0]
    assert meter.accuracy()[0] == 0.5
    assert torch.isnan(meter.accuracy()[1])
    assert (meter.mean_iou(), meter.mean_accuracy()) == (25.0, 50.0)


def test_dice_is_two_iou_over_one_plus_iou() -> None:
    rng = torch.Generator().manual_seed(0)
    meter = ConfusionMeter(7)
    meter.update(torch.randint(0, 7, (500,), generator=rng), torch.randint(0, 7, (500,), generator=rng))
    iou = meter.iou()
    torch.testing.assert_close(meter.dice(), 2 * iou / (1 + iou), rtol=1e-15, atol=0)


def test_nothing_labelled_has_no_score() -> None:
    meter = ConfusionMeter(3)
    meter.update(torch.tensor([0, 1, 2]), torch.full((3,), IGNORE))
    assert int(meter.counts.sum()) == 0
    scores = (meter.mean_iou(), meter.mean_dice(), meter.mean_accuracy(), meter.pixel_accuracy())
    assert all(math.isnan(score) for score in scores)


def test_what_is_predicted_at_unlabelled_pixels_does_not_matter() -> None:
    meter = ConfusionMeter(3)
    meter.update(torch.tensor([IGNORE, 77, 1], dtype=torch.uint8), torch.tensor([IGNORE, IGNORE, 1], dtype=torch.uint8))
    assert meter.counts.tolist() == [[0, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("predicted", "mask", "message"),
    [
        ([0, 3, 7], [0, 1, 2], r"predicted: expected classes from 0 to 2 at labelled pixels, got \[3, 7\]"),
        ([0, -1, 1], [0, 1, 2], r"predicted: expected classes from 0 to 2 at labelled pixels, got \[-1\]"),
        ([0, IGNORE, 1], [0, 1, 2], r"predicted: expected classes from 0 to 2 at labelled pixels, got \[255\]"),
        ([0, 1, 2], [0, 1, 9], r"mask: expected classes from 0 to 2 at labelled pixels, got \[9\]"),
    ],
)
def test_a_class_out_of_range_is_named_and_nothing_is_counted(
    predicted: list[int], mask: list[int], message: str
) -> None:
    meter = ConfusionMeter(3)
    with pytest.raises(ValueError, match=message):
        meter.update(torch.tensor(predicted), torch.tensor(mask))
    assert not meter.counts.any()


def test_logits_and_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"predicted: expected the shape of mask \(3,\), got \(2,\)"):
        ConfusionMeter(2).update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"predicted: expected integer classes, got torch.float32"):
        ConfusionMeter(2).update(torch.zeros(3), torch.zeros(3, dtype=torch.uint8))


def test_narrow_integers_do_not_overflow() -> None:
    """Class 20 of 30 in uint8: 20 x 30 + 20 is beyond 255."""
    meter = ConfusionMeter(30)
    meter.update(torch.full((5,), 20, dtype=torch.uint8), torch.full((5,), 20, dtype=torch.uint8))
    assert int(meter.counts[20, 20]) == 5
    assert meter.mean_iou() == 100.0


def test_counts_beyond_32_bits_are_exact() -> None:
    """2,975 images of 1024x2048 are 6.2e9 pixels."""
    meter = ConfusionMeter(2)
    meter.counts += torch.tensor([[2**33 + 1, 0], [0, 0]])
    meter.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert meter.counts.tolist() == [[2**33 + 2, 1], [0, 0]]
    assert meter.iou()[0] == (2**33 + 2) / (2**33 + 3)


def test_reduce_without_processes_changes_nothing() -> None:
    meter = _by_hand()
    meter.reduce()
    assert torch.equal(meter.counts, _by_hand().counts)


def _count(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    meter = ConfusionMeter(3)
    predicted, mask = torch.arange(12) % 3, torch.arange(12) % 2
    part = slice(0, 5) if rank == 0 else slice(5, 12)
    meter.update(predicted[part], mask[part])
    meter.reduce()
    torch.save(meter.counts, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_counts_of_two_processes_add_up_in_both(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_count, args=(port, str(tmp_path)), nprocs=2)
    whole = ConfusionMeter(3)
    whole.update(torch.arange(12) % 3, torch.arange(12) % 2)
    for rank in (0, 1):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), whole.counts)
