"""Annotation models: where they start, and what each structure and each field promises."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from coarse_kernels import Drawings, TransitionMatrix, annotation_objective, confusion_logits
from coarse_train.config import DrawingsConfig, FitConfig
from coarse_train.model import CoarseModel, UNet, build_annotation, build_model
from tests.small_images import ODD, make_image

FIELDS = ("global", "image", "grid", "pixel")
STRUCTURES = ("full", "floor", "lowrank", "tied")
ALL = list(itertools.product(FIELDS, STRUCTURES))


pytestmark = pytest.mark.usefixtures("one_thread")


def _annotation(field: str, structure: str, classes: int = 4, **options: object) -> nn.Module:
    torch.manual_seed(0)
    config = DrawingsConfig(cm=field, structure=structure, **options)  # type: ignore[arg-type]
    model = build_annotation(config, 3, classes)
    assert model is not None
    return model


def _shaken(model: nn.Module, scale: float) -> nn.Module:
    """Far from where it started."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=rng))
    return model


@pytest.mark.parametrize(("field", "structure"), ALL)
def test_matrices_have_the_shape_of_their_field(field: str, structure: str) -> None:
    height, width = ODD
    expected = {
        "global": (1, 4, 4, 1, 1),
        "image": (2, 4, 4, 1, 1),
        "grid": (2, 4, 4, -(-height // 8), -(-width // 8)),
        "pixel": (2, 4, 4, height, width),
    }
    assert _annotation(field, structure)(make_image()).shape == expected[field]


@pytest.mark.parametrize("stride", [1, 2, 4, 6, 7, 16, 64])
def test_a_grid_has_a_place_for_every_stride_pixels_begun(stride: int) -> None:
    cm_logits = _annotation("grid", "tied", stride=stride)(make_image(1))
    assert cm_logits.shape[3:] == (-(-37 // stride), -(-53 // stride))


def test_a_grid_sees_every_pixel() -> None:
    image = make_image(1, (16, 24)).requires_grad_()
    _annotation("grid", "full")(image).square().sum().backward()
    assert image.grad is not None
    assert bool((image.grad != 0).all())


@pytest.mark.parametrize(("field", "structure"), ALL)
def test_every_matrix_starts_at_the_given_diagonal(field: str, structure: str) -> None:
    matrix = _annotation(field, structure, diagonal=0.6)(make_image()).softmax(1)
    expected = confusion_logits(4, 0.6).softmax(0)[None, :, :, None, None].expand_as(matrix)
    difference = (matrix - expected).abs()
    assert float(difference.detach().max()) < (1e-6 if field == "global" else 0.1)  # what is not 0 tells places apart
    assert float(difference.detach().mean()) < (1e-6 if field == "global" else 0.015)


@pytest.mark.parametrize("field", FIELDS)
def test_a_floor_holds_whatever_is_learned(field: str) -> None:
    model = _shaken(_annotation(field, "floor", floor=0.3), 30.0 if field == "global" else 3.0)
    diagonal = model(make_image()).softmax(1).detach().diagonal(dim1=1, dim2=2)
    assert float(diagonal.min()) >= 0.3 - 1e-5  # logits of some hundred have five digits behind the point
    assert float(diagonal.min()) < 0.31  # it is the floor that holds, not the numbers that are mild


def test_a_floor_is_the_mixture_with_the_identity() -> None:
    model = _shaken(_annotation("global", "floor", floor=0.3), 3.0)
    free = model.get_parameter("field.free")
    expected = 0.7 * free.view(4, 4).softmax(0) + 0.3 * torch.eye(4)
    matrix = model(make_image()).softmax(1)[0, :, :, 0, 0]
    torch.testing.assert_close(matrix, expected)
    weights = torch.rand(4, 4)
    (gradient,) = torch.autograd.grad((matrix * weights).sum(), free, retain_graph=True)
    (by_hand,) = torch.autograd.grad((expected * weights).sum(), free)
    torch.testing.assert_close(gradient, by_hand)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_a_floor_has_finite_gradients_at_huge_logits(size: float) -> None:
    model = _annotation("global", "floor")
    free = model.get_parameter("field.free")
    with torch.no_grad():
        free[0, 1] = size
    logits = model(make_image())
    logits.softmax(1).square().sum().backward()
    assert bool(logits.isfinite().all())
    assert free.grad is not None
    assert bool(free.grad.isfinite().all())


@pytest.mark.parametrize("field", FIELDS)
def test_tied_matrices_have_two_values(field: str) -> None:
    matrix = _shaken(_annotation(field, "tied"), 0.5)(make_image()).softmax(1).detach()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal))
    off = (1 - diagonal[..., 0])[:, None, None] / 3
    torch.testing.assert_close(matrix[:, 0, 1:], off[:, 0].expand(-1, 3, -1, -1))
    assert field == "global" or float(diagonal.std()) > 1e-4


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("field", FIELDS)
def test_low_rank_matrices_differ_from_the_base_by_that_rank(field: str, rank: int) -> None:
    model = _shaken(_annotation(field, "lowrank", classes=6, rank=rank), 0.5)
    base = model.get_parameter("structure.base")[None, :, :, None, None]
    change = (model(make_image(1)) - base).permute(0, 3, 4, 1, 2).flatten(0, 2)
    singular = torch.linalg.svdvals(change.detach().double())
    assert float(singular[:, rank - 1].min()) > 1e-3
    assert float((singular[:, rank] / singular[:, 0]).max()) < 1e-5


@pytest.mark.parametrize(("field", "structure"), ALL)
def test_every_parameter_learns_through_the_loss(field: str, structure: str) -> None:
    model = CoarseModel(UNet(3, 4, (8, 16)), _annotation(field, structure), None, TransitionMatrix.learned(4))
    output = model(make_image())
    labels = torch.randint(0, 4, (2, *ODD), generator=torch.Generator().manual_seed(3))
    kinds = [Drawings(labels, output.positive_cm), Drawings(labels, output.negative_cm, output.transition)]
    annotation_objective(output.seg_logits, kinds).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.isfinite().all()), name
        assert bool((parameter.grad != 0).any()), name


@pytest.mark.parametrize("structure", STRUCTURES)
def test_half_precision_features_give_the_same_matrices(structure: str) -> None:
    model = _shaken(_annotation("grid", structure), 0.05)
    exact = model(make_image()).softmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = model(make_image())
    torch.testing.assert_close(rounded.float().softmax(1), exact, atol=0.02, rtol=0)


@pytest.mark.parametrize("field", ["image", "grid", "pixel"])
def test_checkpointing_of_an_annotation_model_changes_no_bit(field: str) -> None:
    models = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        config = DrawingsConfig(cm=field)  # type: ignore[arg-type]
        model = build_annotation(config, 3, 4, norm="batch", checkpointing=checkpointing)
        assert model is not None
        model(make_image()).square().mean().backward()
        models.append(model)
    plain, thrifty = models
    assert all(
        torch.equal(a, b) for a, b in zip(plain.state_dict().values(), thrifty.state_dict().values(), strict=True)
    )
    for p, q in zip(plain.parameters(), thrifty.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]


def test_a_start_with_missing_objects() -> None:
    matrix = confusion_logits(5, 0.5, 0.3).softmax(0)
    torch.testing.assert_close(matrix.sum(0), torch.ones(5))
    assert matrix[0, 0] == pytest.approx(0.97)
    assert matrix[0, 1] == pytest.approx(0.3)
    assert matrix[2, 2] == pytest.approx(0.5)
    assert matrix[1, 2] == pytest.approx(0.2 / 3)
    with pytest.raises(ValueError, match="missing"):
        confusion_logits(5, 0.5, 0.6)


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("diagonal", [0.1, 1.0])
def test_an_impossible_diagonal_is_refused(structure: str, diagonal: float) -> None:
    with pytest.raises(ValueError, match=f"diagonal: expected a number from 1/4 to below 1, got {diagonal}"):
        _annotation("global", structure, diagonal=diagonal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"structure": "floor", "floor": 0.7}, "floor: expected a number above 0 and below diagonal = 0.7, got 0.7"),
        ({"structure": "floor", "floor": 0.0}, "floor: expected a number above 0"),
        ({"structure": "lowrank", "rank": 0}, "rank: expected a number from 1 to the number of classes 4, got 0"),
        ({"structure": "lowrank", "rank": 5}, "rank: expected a number from 1"),
        ({"structure": "full", "stride": 0}, "stride: expected a number of pixels >= 1, got 0"),
        ({"structure": "diagonal"}, "structure: expected full, floor, lowrank or tied, got 'diagonal'"),
        ({"structure": "full", "cm": "voxel"}, "cm: expected none, global, image, grid or pixel, got 'voxel'"),
    ],
)
def test_settings_of_a_stream_are_named_with_the_stream(options: dict[str, object], message: str) -> None:
    stream = DrawingsConfig(**{"cm": "grid", **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=rf"negative\.{message}"):
        build_model(FitConfig(negative=stream), 3, 4, None)
