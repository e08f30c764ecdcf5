"""Windows, padding, mirrored copies: they cover every pixel, and where the network is local they change nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from coarse_kernels import available_backends, use_backend
from coarse_train.inference import InferenceConfig, predict, probabilities, to_input
from coarse_train.model.street import StreetNet
from tests.floats_formed import FloatsFormed, assert_most_probable


def _local(channels: int = 3, classes: int = 4) -> nn.Module:
    """A 1x1 convolution: what it says of a pixel depends on that pixel alone."""
    torch.manual_seed(0)
    network = nn.Conv2d(channels, classes, 1)
    with torch.no_grad():
        network.weight.mul_(5)
    return network


class _Spy(nn.Module):
    """Keeps what the network is given."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []

    def forward(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return self.network(image)


class _Coarse(nn.Module):
    """Logits on a grid of every 4 pixels."""

    def forward(self, image: Tensor) -> Tensor:
        mean = nn.functional.avg_pool2d(image, 4)
        return torch.cat([mean, 1 - mean], 1)


IMAGE = torch.rand(2, 3, 23, 37, generator=torch.Generator().manual_seed(1))
WHOLE = InferenceConfig()


@pytest.mark.parametrize(
    "config",
    [
        InferenceConfig(window=(8, 16)),  # neither 23 nor 37 is a multiple: the last windows are moved back
        InferenceConfig(window=(8, 16), overlap=0.0),
        pytest.param(InferenceConfig(window=(7, 5), overlap=0.75, flips=True), marks=pytest.mark.slow),
        InferenceConfig(window=(64, 16)),  # higher than the image, not as wide
        InferenceConfig(window=(64, 64), flips=True),
        InferenceConfig(flips=True),
    ],
    ids=str,
)
def test_a_local_network_says_the_same_in_windows_and_mirrored(config: InferenceConfig) -> None:
    network = _local()
    expected = network(IMAGE).softmax(1)
    torch.testing.assert_close(probabilities(network, IMAGE, config, 4), expected, rtol=1e-6, atol=1e-7)
    assert torch.equal(predict(network, IMAGE, config, 4), expected.argmax(1).to(torch.uint8))


@given(
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    window=st.tuples(st.integers(1, 35), st.integers(1, 35)),
    overlap=st.floats(0, 0.99),
)
def test_windows_cover_every_pixel_have_one_size_and_overlap_as_told(
    size: tuple[int, int], window: tuple[int, int], overlap: float
) -> None:
    spy = _Spy(nn.Identity())
    y, x = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    image = torch.stack([y, x])[None].float()
    found = probabilities(spy, image, InferenceConfig(window=window, overlap=overlap), 2)
    assert torch.isfinite(found).all()  # a pixel in no window is 0 / 0
    torch.testing.assert_close(found, image.softmax(1), rtol=1e-5, atol=1e-7)
    assert {tuple(part.shape[2:]) for part in spy.seen} == {window}
    for axis in (0, 1):
        starts = sorted({int(part[0, axis, 0, 0]) for part in spy.seen})
        inside = min(window[axis], size[axis])
        assert all(b - a <= max(1, inside * (1 - overlap)) for a, b in itertools.pairwise(starts))


def test_probabilities_of_overlapping_windows_are_averaged() -> None:
    """A network that calls every pixel by its column in the window: 0 in the left half, 1 in the right."""

    class Halves(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            right = (torch.arange(image.shape[-1]) >= image.shape[-1] // 2).float()
            return 1000 * torch.stack([1 - right, right])[None, :, None].expand(len(image), -1, image.shape[2], -1)

    found = probabilities(Halves(), torch.zeros(1, 1, 1, 6), InferenceConfig(window=(1, 4), overlap=0.5), 2)
    # windows [0, 4) and [2, 6): columns 2 and 3 are right in the first and left in the second
    assert found[0, 1, 0].tolist() == [0, 0, 0.5, 0.5, 1, 1]


def test_mirrored_copies_are_averaged_with_the_image() -> None:
    """A network that gives logit 2 to class 1 in its first column only."""

    class First(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            logits = torch.zeros(len(image), 2, *image.shape[2:])
            logits[:, 1, :, 0] = 2
            return logits

    found = probabilities(First(), torch.zeros(1, 1, 2, 3), InferenceConfig(flips=True), 2)[0, 1]
    high = (torch.tensor(2.0).sigmoid() + 0.5) / 2
    torch.testing.assert_close(found, torch.tensor([[high, 0.5, high]] * 2))


def test_logits_on_a_coarser_grid_are_interpolated_as_in_the_loss() -> None:
    image = torch.rand(1, 1, 16, 24)
    logits = nn.functional.interpolate(_Coarse()(image), (16, 24), mode="bilinear", align_corners=False)
    assert torch.equal(probabilities(_Coarse(), image, WHOLE, 2), logits.softmax(1))
    assert torch.equal(predict(_Coarse(), image, WHOLE, 2), logits.argmax(1).to(torch.uint8))


@pytest.mark.parametrize("config", [WHOLE, InferenceConfig(window=(48, 32)), InferenceConfig(window=(64, 64))], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_pass_gives_the_argmax_of_the_interpolated_logits(config: InferenceConfig, dtype: torch.dtype) -> None:
    """Also where the image is smaller than the window: padded, and cut after the argmax."""
    torch.manual_seed(0)
    network = StreetNet(3, 4, (4, 4, 4, 4)).eval().to(dtype)
    image = torch.rand(2, 3, 48, 32).to(dtype)
    found = predict(network, image, config, 4)
    assert (found.dtype, found.shape) == (torch.uint8, (2, 48, 32))
    height, width = config.window or (48, 32)
    with torch.no_grad():
        padded = nn.functional.pad(image, (0, width - 32, 0, height - 48), mode="replicate")
        logits = network(padded).float()
    full = nn.functional.interpolate(logits, (height, width), mode="bilinear", align_corners=False)
    assert_most_probable(found, full[..., :48, :32])


@pytest.mark.skipif("cpu" not in available_backends(), reason="the compiled extension is missing")
def test_one_pass_forms_no_logits_at_full_resolution() -> None:
    network, image = StreetNet(3, 16, (8, 8, 8, 8)).eval(), torch.rand(1, 3, 64, 96)
    with use_backend("cpu"), FloatsFormed() as one_pass:
        predict(network, image, WHOLE, 16)
    assert one_pass.calls["coarse_kernels.label_map"] == 1
    assert one_pass.largest < 16 * 64 * 96 / 2
    with FloatsFormed() as averaged:  # two passes have to be added up somewhere
        predict(network, image, InferenceConfig(flips=True), 16)
    assert averaged.calls["coarse_kernels.label_map"] == 0
    assert averaged.largest == 16 * 64 * 96


def test_an_image_smaller_than_the_window_is_padded_with_its_border() -> None:
    spy = _Spy(_local(1, 2))
    image = torch.rand(1, 1, 3, 5)
    assert probabilities(spy, image, InferenceConfig(window=(8, 8)), 2).shape == (1, 2, 3, 5)
    (seen,) = spy.seen
    assert torch.equal(seen[..., :3, :5], image)
    assert torch.equal(seen[..., 3:, :5], image[..., 2:, :].expand(-1, -1, 5, -1))


def test_a_whole_image_without_mirrored_copies_needs_no_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    network = _local()
    expected = network(IMAGE).argmax(1)

    def refuse(*_: object) -> None:
        raise AssertionError("softmax")

    monkeypatch.setattr(Tensor, "softmax", refuse)
    assert torch.equal(predict(network, IMAGE, WHOLE, 4), expected.to(torch.uint8))
    with pytest.raises(AssertionError, match="softmax"):
        predict(network, IMAGE, InferenceConfig(flips=True), 4)


def test_nothing_of_it_carries_gradient() -> None:
    assert not probabilities(_local(), IMAGE, InferenceConfig(window=(8, 8)), 4).requires_grad


def test_half_precision_logits_become_float32() -> None:
    network = _local().to(torch.bfloat16)
    found = probabilities(network, IMAGE.to(torch.bfloat16), WHOLE, 4)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), torch.ones(2, 23, 37), rtol=1e-6, atol=0)


def test_logits_of_another_number_of_classes_are_named() -> None:
    with pytest.raises(ValueError, match=r"segmentation: expected logits \(2, 5, h, w\) .* got \(2, 4, 23, 37\)"):
        predict(_local(), IMAGE, WHOLE, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": (0, 8)}, r"window: expected a height and a width from 1 to 65535, got \(0, 8\)"),
        ({"overlap": 1.0}, r"overlap: expected a share from 0 to below 1, got 1.0"),
        ({"overlap": -0.1}, r"overlap: .* got -0.1"),
    ],
)
def test_settings_that_cannot_be_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InferenceConfig(**arguments)


def test_grey_images_fit_a_colour_network_and_not_the_other_way_round() -> None:
    grey = np.array([[[0], [255]]], np.uint8)
    assert to_input(grey, 3, "a.png").tolist() == [[[[0.0, 1.0]]] * 3]
    assert to_input(grey, 1, "a.png").shape == (1, 1, 1, 2)
    colour = np.zeros((2, 2, 3), np.uint8)
    with pytest.raises(ValueError, match=r"a.png: expected an image of 1 channel\(s\) for this network, got 3"):
        to_input(colour, 1, "a.png")


class _Fine(nn.Module):
    """Logits at twice the resolution of the image, along one axis or both."""

    def __init__(self, factor: tuple[int, int]):
        super().__init__()
        self.factor = factor

    def forward(self, image: Tensor) -> Tensor:
        logits = torch.cat([image, 1 - image], 1)
        return nn.functional.interpolate(logits, scale_factor=self.factor, mode="bilinear", align_corners=False)


@pytest.mark.parametrize("factor", [(2, 2), (1, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("config", [WHOLE, InferenceConfig(window=(32, 40)), InferenceConfig(flips=True)], ids=str)
def test_a_network_that_is_finer_than_the_image_is_resized_to_it(
    factor: tuple[int, int], config: InferenceConfig
) -> None:
    """One pass over the image was refused, several were not."""
    network = _Fine(factor)
    assert torch.equal(predict(network, IMAGE, config, 6), probabilities(network, IMAGE, config, 6).argmax(1).byte())


@pytest.mark.parametrize("config", [WHOLE, InferenceConfig(window=(16, 16))], ids=str)
def test_more_than_256_classes_are_not_folded_into_a_byte(config: InferenceConfig) -> None:
    class Last(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            logits = image.new_zeros(len(image), 300, *image.shape[2:])
            logits[:, 299] = 1.0
            return logits

    assert (predict(Last(), IMAGE, config, 300) == 299).all()
