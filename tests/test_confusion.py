"""Where matrices start: the head, and the warning about a start without a diagonal."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn

import coarse_kernels as ck
from coarse_kernels import ConfusionHead, Drawings, confusion_logits, notices


@pytest.fixture(autouse=True)
def nothing_seen() -> Iterator[None]:
    before = set(notices._looked_at)
    notices._looked_at.clear()
    yield
    notices._looked_at.clear()
    notices._looked_at.update(before)


@pytest.mark.parametrize(("size", "stride", "grid"), [((9, 14), 1, (9, 14)), ((9, 14), 4, (3, 4)), ((7,), 2, (4,))])
def test_a_head_starts_near_the_diagonal_at_every_place(
    size: tuple[int, ...], stride: int, grid: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    head = ConfusionHead(5, channels=16, stride=stride, diagonal=0.7)
    logits = head(torch.randn(2, 16, *size))
    assert logits.shape == (2, 5, 5, *grid)
    diagonal = logits.softmax(1).diagonal(dim1=1, dim2=2)
    assert ((diagonal - 0.7).abs() < 0.1).all()
    assert diagonal.std() > 1e-3  # places differ, and may learn to


def test_a_head_without_features_is_one_matrix_for_all_places() -> None:
    head = ConfusionHead(4, diagonal=0.6, spatial_dims=3)
    logits = head()
    assert logits.shape == (1, 4, 4, 1, 1, 1)
    assert torch.allclose(logits.detach().flatten(1), confusion_logits(4, 0.6).view(1, -1))
    loss = ck.annotation_objective(torch.randn(2, 4, 3, 3, 3), [Drawings(torch.zeros(2, 6, 6, 6).byte(), logits)]).loss
    loss.backward()
    assert head.bias.grad is not None
    assert head.bias.grad.any()


def test_missing_makes_the_background_another_matter() -> None:
    head = ConfusionHead(5, diagonal=0.5, missing=0.3)
    matrix = head()[0, :, :, 0, 0].softmax(0)
    assert torch.allclose(matrix[0, 1:], torch.tensor(0.3))
    assert torch.allclose(matrix.diagonal()[1:], torch.tensor(0.5))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_classes": 1}, "num_classes: expected an int >= 2, got 1"),
        ({"num_classes": True}, "num_classes: expected an int >= 2"),
        ({"num_classes": 5.0}, "num_classes: expected an int >= 2, got 5.0"),
        ({"num_classes": 4, "diagonal": 0.2}, "diagonal: expected a number from 1/4"),
        ({"num_classes": 4, "diagonal": 1.0}, "diagonal: expected a number from 1/4"),
        ({"num_classes": 4, "channels": 0}, "channels: expected an int >= 1, got 0"),
        ({"num_classes": 4, "channels": 3, "stride": 0}, "stride: expected an int >= 1, got 0"),
        ({"num_classes": 4, "stride": 2}, "stride: expected 1 where there are no features"),
        ({"num_classes": 4, "spatial_dims": 4}, "spatial_dims: expected 1, 2 or 3, got 4"),
        ({"num_classes": 4, "missing": 0.4}, "missing: expected None, or a number"),
        # 1 - 0.7 > 0.3 by a rounding: wrong names that start at 4e-17 are never learned
        ({"num_classes": 4, "diagonal": 0.7, "missing": 0.3}, "missing: expected None, or a number above 0 and below"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ConfusionHead(**options)  # type: ignore[arg-type]


def test_numbers_of_numpy_are_numbers() -> None:
    head = ConfusionHead(np.int64(5), channels=np.int64(3), stride=np.int64(2))  # type: ignore[arg-type]
    assert head(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 5, 4, 4)


def test_features_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"features: expected \(B, 8, \*g\) .* got \(2, 4, 5, 5\)"):
        ConfusionHead(3, channels=8)(torch.zeros(2, 4, 5, 5))
    with pytest.raises(ValueError, match=r"features: expected .* got None"):
        ConfusionHead(3, channels=8)()
    with pytest.raises(ValueError, match="features: expected none"):
        ConfusionHead(3)(torch.zeros(2, 4, 5, 5))


def loss_with(cm_logits: torch.Tensor, classes: int = 4) -> torch.Tensor:
    labels = torch.zeros(2, 8, 8, dtype=torch.uint8)
    return ck.annotation_objective(torch.zeros(2, classes, 8, 8), [Drawings(labels, cm_logits)]).loss


def test_a_convolution_as_pytorch_starts_it_warns_once_by_name() -> None:
    torch.manual_seed(0)
    head = nn.Conv2d(16, 16, 1)
    cm_logits = head(torch.randn(2, 16, 8, 8)).unflatten(1, (4, 4))
    with pytest.warns(UserWarning, match=r"drawings\[0\]\.cm_logits: only \d+ % of the columns .*ConfusionHead"):
        loss_with(cm_logits)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_with(cm_logits)
    with pytest.warns(UserWarning, match="positive_cm: only"):  # another name
        ck.coarse_label_loss(torch.zeros(2, 4, 8, 8), cm_logits, torch.zeros(2, 8, 8, dtype=torch.uint8))


def test_no_warning_where_there_is_nothing_to_warn_of() -> None:
    bad = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    minority = confusion_logits(4).clone()
    minority[:, 1] = minority[:, 1].roll(1)  # one class is mostly drawn as another: not a start without a diagonal
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for good in (ConfusionHead(4, channels=3, stride=2)(torch.randn(2, 3, 8, 8)), minority.view(1, 4, 4, 1, 1)):
            loss_with(good if good.requires_grad else good.requires_grad_())
            assert notices._looked_at  # it was looked at, and found good
            notices._looked_at.clear()
        loss_with(bad)  # not trained
        with torch.no_grad():
            loss_with(bad.requires_grad_())
        assert not any(trained for _, trained in notices._looked_at)
    assert not said


class Event:
    """Of a device that has been heard of."""

    def __init__(self, wait: float = 0.0) -> None:
        self.wait, self.asked = wait, 0

    def query(self) -> bool:
        self.asked += 1
        time.sleep(self.wait)
        return True


def test_no_event_is_asked_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would end the capture with an error: what the first call found is said after it."""
    event = Event()
    monkeypatch.setitem(notices._pending, "cm_logits", (torch.tensor([0.2, 0.0]), event))  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    loss_with(confusion_logits(4).view(1, 4, 4, 1, 1))
    assert event.asked == 0
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.warns(UserWarning, match="cm_logits: only 20 % of the columns"):
        loss_with(confusion_logits(4).view(1, 4, 4, 1, 1))
    assert not notices._pending


def test_two_threads_that_hear_of_it_at_once_say_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.nn.DataParallel has several; one of them found nothing to remove."""
    event, said = Event(0.2), []
    monkeypatch.setitem(notices._pending, "cm_logits", (torch.tensor([0.2, 0.0]), event))  # type: ignore[arg-type]
    monkeypatch.setattr(notices, "_say", lambda *what: said.append(what))
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(notices._hear) for _ in range(2)]:
            done.result()
    assert event.asked == 2
    assert len(said) == 1


@pytest.mark.parametrize("trained", [False, True])
def test_probabilities_in_the_place_of_logits_are_warned_of_once(trained: bool) -> None:
    """Their softmax is another, nearly uniform matrix: a loss comes out, and another one."""
    matrix = confusion_logits(4).softmax(0).view(1, 4, 4, 1, 1).requires_grad_(trained)
    with pytest.warns(
        UserWarning, match=r"drawings\[0\]\.cm_logits: expected logits, .* sum to 1 .*cm_logits\.log\(\) is"
    ):
        loss_with(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_with(matrix)
        loss_with(matrix.detach().requires_grad_())  # trained or not
        notices._looked_at.clear()
        loss_with(matrix.detach().log())
        loss_with(torch.zeros(1, 4, 4, 1, 1))


def test_a_start_without_a_diagonal_is_what_permutes_classes() -> None:
    """Two classes in two places, honest drawings: the head learns them right; a matrix that starts swapped, swapped."""
    labels = torch.zeros(1, 4, 8, dtype=torch.uint8)
    labels[..., 4:] = 1
    found = {}
    for name, start in (("head", confusion_logits(2)), ("swapped", confusion_logits(2).flip(1))):
        seg = torch.zeros(1, 2, 4, 8, requires_grad=True)
        cm = start.view(1, 2, 2, 1, 1).clone().requires_grad_()
        optimizer = torch.optim.Adam([seg, cm], 0.05)
        for _ in range(200):
            optimizer.zero_grad()
            ck.annotation_objective(seg, [Drawings(labels, cm)]).loss.backward()
            optimizer.step()
        found[name] = (seg.detach().argmax(1) == labels).float().mean().item()
    assert found == {"head": 1.0, "swapped": 0.0}


def test_a_warning_names_the_line_of_who_called_the_library() -> None:
    """A module of the library and torch's own lie between; a uniform start is a start without a diagonal."""
    criterion = ck.AnnotationObjective()
    logits = torch.zeros(1, 3, 3, 4, 4, requires_grad=True)
    with pytest.warns(UserWarning, match="33 % of the columns") as said:
        criterion(torch.randn(1, 3, 4, 4), [ck.Drawings(torch.zeros(1, 4, 4, dtype=torch.uint8), logits)])
    assert said[0].filename == __file__


@pytest.mark.parametrize("ignored", [False, True])
def test_one_hot_labels_are_no_layers(ignored: bool) -> None:
    """The mistake that segmentation code makes most: it gave a loss, of C annotators."""
    labels = torch.randint(0, 3, (2, 4, 4))
    layers = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).to(torch.uint8)
    if ignored:
        layers[:, :, 0] = 255  # as annotators leave a row out
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ck.annotation_objective(torch.randn(2, 3, 4, 4), [ck.Drawings(layers)])
    assert [str(one.message).split(":")[0] for one in said] == ([] if ignored else ["drawings[0].labels"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_head_on_a_volume_shorter_than_its_stride(dtype: torch.dtype) -> None:
    """Two slices at stride 4: the mean of the two."""
    head = ConfusionHead(3, channels=2, stride=4).to(dtype)
    features = torch.randn(1, 2, 2, 8, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits = head(features)
    assert logits.shape == (1, 3, 3, 1, 2, 3)
    assert logits.dtype == dtype
    assert head.weight is not None
    first = features[0, :, :, :4, :4].float().mean((1, 2, 3))
    expected = head.weight.float() @ first + head.bias.float()
    torch.testing.assert_close(logits[0, :, :, 0, 0, 0].flatten().float(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("diagonal", lambda: confusion_logits(3, "0.7")),
        ("diagonal", lambda: ConfusionHead(3, diagonal=None)),
        ("missing", lambda: confusion_logits(3, missing="0.1")),
        ("features", lambda: ConfusionHead(3, channels=2)(np.zeros((1, 2, 4, 4)))),
        ("spatial_dims", lambda: ConfusionHead(3, spatial_dims=2.0)),
    ],
)
def test_what_is_no_number_or_tensor_is_named(name: str, call: Callable[[], object]) -> None:
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected .*, got"):
        call()


def test_where_matrices_start_is_float32_whatever_the_default() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        assert confusion_logits(3).dtype == confusion_logits(3, 0.6, 0.3).dtype == torch.float32
    finally:
        torch.set_default_dtype(before)
