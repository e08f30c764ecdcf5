"""Segmentation networks and the coupled model: shapes, what normalisation and checkpointing promise, import paths."""

from __future__ import annotations

import copy
import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coarse_kernels import TransitionMatrix
from coarse_train.config import DrawingsConfig, FitConfig, ModelConfig, OptimConfig
from coarse_train.model import (
    CoarseModel,
    ModelOutput,
    SegFormer,
    StreetNet,
    UNet,
    build_model,
    build_segmentation,
    confusion_sums,
    mean_confusion,
    parameter_groups,
)
from tests.small_images import ODD, make_image

pytestmark = pytest.mark.usefixtures("one_thread")


def _unet(norm: str = "group", checkpointing: bool = False) -> UNet:
    return UNet(3, 4, (8, 16), norm=norm, checkpointing=checkpointing)


def _street(norm: str = "group", checkpointing: bool = False) -> StreetNet:
    return StreetNet(3, 4, (8, 16, 16, 16), norm=norm, checkpointing=checkpointing)


OURS = [_unet, _street]
Make = Callable[..., nn.Module]


def _shaken(model: nn.Module, scale: float) -> nn.Module:
    """Far from where it started."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=rng))
    return model


# ---- segmentation networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [ODD, (64, 96), (1, 5)])
def test_any_image_size_fits(size: tuple[int, int]) -> None:
    height, width = size
    for norm in ("group", "batch"):
        unet = UNet(3, 5, norm=norm)(make_image(2, size))
        street = StreetNet(3, 5, (8, 8, 8, 8, 8), norm=norm).eval()(make_image(2, size))
        assert unet.shape == (2, 5, height, width)
        assert street.shape == (2, 5, -(-height // 4), -(-width // 4))
        assert unet.is_contiguous()
        assert street.is_contiguous()


def test_a_size_that_fits_the_unet_is_not_padded_and_another_is_continued_with_its_border() -> None:
    network = UNet(3, 2).eval()  # multiples of 8
    small = make_image(1, (13, 16))
    bordered = torch.cat([small, small[:, :, -1:].expand(-1, -1, 3, -1)], 2)
    assert torch.equal(network(small), network(bordered)[:, :, :13])


@pytest.mark.parametrize("widths", [(16, 32), (16, 32, 64, 64, 64, 64), (16, 32, 0, 64)])
def test_street_names_widths_that_do_not_fit(widths: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="widths: expected channels at strides 2, 4, 8, 16"):
        build_segmentation(ModelConfig(network="street", widths=widths), 3, 5)


def test_street_has_widths_of_its_own_and_a_few_million_parameters() -> None:
    network = build_segmentation(ModelConfig(network="street"), 3, 19)
    assert 2e6 < sum(p.numel() for p in network.parameters()) < 6e6
    assert network.head.in_channels == 128  # type: ignore[union-attr]


@pytest.mark.parametrize("make", OURS)
def test_group_normalisation_does_not_see_the_rest_of_the_batch(make: Make) -> None:
    one, others = make_image(2), make_image(2)
    others[1] = 9 * make_image(1, seed=5)[0]
    for norm, same in (("group", True), ("batch", False)):
        network = make(norm).train()
        assert torch.equal(network(one)[0], network(others)[0]) == same


@pytest.mark.parametrize("make", OURS)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_checkpointing_changes_no_bit(make: Make, norm: str) -> None:
    """Gradients, and running statistics, which the second forward pass must not touch."""
    plain = make(norm)
    thrifty = make(norm, checkpointing=True)
    thrifty.load_state_dict(plain.state_dict())
    for network in (plain, thrifty):
        for step in range(2):
            network(make_image(seed=step)).square().mean().backward()
    for (name, p), (_, q) in zip(plain.named_parameters(), thrifty.named_parameters(), strict=True):
        assert p.grad is not None, name
        assert torch.equal(p.grad, q.grad), name  # type: ignore[arg-type]
    for name, value in plain.state_dict().items():
        assert torch.equal(value, thrifty.state_dict()[name]), name


def _peak(network: nn.Module, image: Tensor, trace: Path) -> float:
    """Bytes alive at once during forward and backward, from the allocator's own records."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        network(image).sum().backward()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    allocations = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(allocations)))


@pytest.mark.parametrize("make", OURS)
def test_checkpointing_saves_memory(make: Make, tmp_path: Path) -> None:
    image = make_image(1, (192, 256))
    thrifty, plain = (_peak(make(checkpointing=on), image, tmp_path / "trace.json") for on in (True, False))
    assert thrifty < 0.7 * plain


class Constant(nn.Module):
    """Of a user: returns ``shape`` whatever comes."""

    def __init__(self, channels_in: int, num_classes: int, shape: tuple[int, ...] | None = None):
        super().__init__()
        self.value = nn.Parameter(torch.zeros(shape or (2, num_classes, 3, 3)))

    def forward(self, image: Tensor) -> Tensor:
        return self.value


def three_classes(channels_in: int, num_classes: int) -> nn.Module:
    return Constant(channels_in, 3)


def flat(channels_in: int, num_classes: int) -> nn.Module:
    return Constant(channels_in, num_classes, (2, num_classes))


def a_list(channels_in: int, num_classes: int) -> list[int]:
    return [channels_in]


A_NUMBER = 3


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> str:
    """This module under a name of its own."""
    monkeypatch.setitem(sys.modules, "my_networks", sys.modules[__name__])
    return "my_networks"


def test_any_module_serves_by_its_import_path(importable: str) -> None:
    config = FitConfig(model=ModelConfig(network=f"{importable}:Constant"))
    model = build_model(config, 3, 5, None)
    assert isinstance(model.segmentation, Constant)
    assert model(make_image()).seg_logits.shape == (2, 5, 3, 3)


@pytest.mark.parametrize(
    ("network", "message"),
    [
        ("resnet", r"network: expected one of \('unet', 'street', 'segformer'\) or package.module:name, got 'resnet'"),
        (":Constant", "network: expected one of .* got ':Constant'"),
        ("no_such_package:Net", "network: .* imported, got 'no_such_package:Net' .*No module named"),
        ("my_networks:Missing", "network: .* imported, got 'my_networks:Missing' .*has no attribute"),
        ("my_networks:A_NUMBER", "network: expected my_networks:A_NUMBER to be called .* got 3"),
        ("my_networks:a_list", "network: expected my_networks:a_list to return an nn.Module, got list"),
    ],
)
def test_an_import_path_that_does_not_serve_is_named(importable: str, network: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_segmentation(ModelConfig(network=network), 3, 5)


@pytest.mark.parametrize(("name", "shape"), [("three_classes", r"\(2, 3, 3, 3\)"), ("flat", r"\(2, 5\)")])
def test_logits_of_a_wrong_shape_are_named(importable: str, name: str, shape: str) -> None:
    model = build_model(FitConfig(model=ModelConfig(network=f"{importable}:{name}")), 3, 5, None)
    with pytest.raises(ValueError, match=rf"network: expected Constant to return .* \(2, 5, h, w\), got {shape}"):
        model(make_image())


def test_options_of_another_network_are_refused(importable: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights: expected none for network 'unet'"):
        build_segmentation(ModelConfig(weights=tmp_path), 3, 5)
    with pytest.raises(ValueError, match="checkpointing: expected one of"):
        build_segmentation(ModelConfig(network=f"{importable}:Constant", checkpointing=True), 3, 5)
    with pytest.raises(ValueError, match=r"norm: expected one of \('group', 'batch'\), got 'layer'"):
        UNet(3, 5, norm="layer")
    with pytest.raises(ValueError, match="widths: expected channels of at least one level"):
        UNet(3, 5, ())


# ---- the coupled model ------------------------------------------------------------------------------------------

CONFIG = FitConfig(
    model=ModelConfig(widths=(8, 16)),
    positive=DrawingsConfig(cm="grid", structure="floor"),
    negative=DrawingsConfig(cm="global", structure="lowrank"),
)


def test_trusted_drawings_have_no_matrix() -> None:
    output = build_model(FitConfig(positive=DrawingsConfig(), model=ModelConfig(widths=(8,))), 3, 4, None)(make_image())
    assert output.seg_logits.shape == (2, 4, *ODD)
    assert output[1:] == (None, None, None)


def test_equal_seeds_give_equal_segmentation_networks_whatever_the_drawings() -> None:
    models = []
    for config in (CONFIG, replace(CONFIG, positive=DrawingsConfig(), negative=DrawingsConfig(cm="pixel"))):
        torch.manual_seed(3)
        models.append(build_model(config, 3, 4, None).segmentation.state_dict())
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])


@pytest.mark.parametrize("network", ["unet", "street"])
def test_a_state_goes_into_a_model_built_anew(network: str) -> None:
    widths = (8, 16) if network == "unet" else (8, 8, 8, 8)
    config = replace(CONFIG, model=ModelConfig(network=network, widths=widths, norm="batch"))
    transition = TransitionMatrix.learned(4)
    model = _shaken(build_model(config, 3, 4, transition), 0.1)
    model(make_image())
    model.eval()
    other = build_model(config, 3, 4, TransitionMatrix.learned(4)).eval()
    other.load_state_dict(model.state_dict())
    image = make_image(1, (64, 64))
    for mine, loaded in zip(model(image), other(image), strict=True):
        assert torch.equal(mine, loaded)
    copied = copy.deepcopy(model)(image)
    assert torch.equal(copied.seg_logits, model(image).seg_logits)


def test_parameter_groups_cover_every_parameter_once_and_decay_weights_only() -> None:
    model = build_model(CONFIG, 3, 4, TransitionMatrix.learned(4))
    optim = OptimConfig(lr=1e-3, cm_lr=7e-2, weight_decay=0.1)
    groups = {group["name"]: group for group in parameter_groups(model, optim)}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_group = {key: {names[id(p)] for p in group["params"]} for key, group in groups.items()}
    assert sum(len(group["params"]) for group in groups.values()) == len(names)
    assert set().union(*by_group.values()) == set(names.values())
    assert by_group["annotation"] == {name for name in names.values() if not name.startswith("segmentation.")}
    assert "transition.logits" in by_group["annotation"]
    assert {(g["lr"], g["weight_decay"]) for g in groups.values()} == {(1e-3, 0.1), (1e-3, 0.0), (7e-2, 0.0)}
    assert (groups["weights"]["weight_decay"], groups["annotation"]["lr"]) == (0.1, 7e-2)
    assert all(p.dim() == 4 for p in groups["weights"]["params"])
    assert "segmentation.down.0.1.weight" in by_group["biases"]  # a normalisation
    torch.optim.AdamW(groups.values())


def test_parameter_groups_leave_out_what_is_fixed_or_absent() -> None:
    model = CoarseModel(_unet(), None, None, TransitionMatrix.uniform(4))
    model.segmentation.head.requires_grad_(False)
    groups = parameter_groups(model, OptimConfig())
    assert [group["name"] for group in groups] == ["weights", "biases"]
    assert all(p.requires_grad for group in groups for p in group["params"])


def _output(cm_size: tuple[int, int] | None, *, seg_size: tuple[int, int] = (8, 12), batch: int = 3) -> ModelOutput:
    rng = torch.Generator().manual_seed(2)
    cm = None if cm_size is None else 2 * torch.randn(batch, 4, 4, *cm_size, generator=rng)
    return ModelOutput(3 * torch.randn(3, 4, *seg_size, generator=rng), None, cm, None)


def test_mean_confusion_by_hand() -> None:
    output = _output((2, 3))
    assert output.negative_cm is not None
    p = output.seg_logits.softmax(1)
    matrices = output.negative_cm.softmax(1)
    # each place of the matrices covers 4x4 pixels
    everywhere = matrices.repeat_interleave(4, 3).repeat_interleave(4, 4)
    expected = (everywhere * p[:, None]).sum((0, 3, 4)) / p.sum((0, 2, 3))
    found = mean_confusion(output, "negative")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.sum(0), torch.ones(4))


@pytest.mark.parametrize("cm_size", [(3, 5), (16, 24), (1, 1)])
def test_mean_confusion_of_one_matrix_everywhere_is_that_matrix(cm_size: tuple[int, int]) -> None:
    output = _output(cm_size, seg_size=(7, 9))
    assert output.negative_cm is not None
    same = output.negative_cm[:1, :, :, :1, :1]
    expected = same[0, :, :, 0, 0].softmax(0)
    spread = output._replace(negative_cm=same.expand(3, -1, -1, *cm_size))
    torch.testing.assert_close(mean_confusion(spread, "negative"), expected)
    torch.testing.assert_close(mean_confusion(output._replace(negative_cm=same), "negative"), expected)
    assert float(confusion_sums(spread, "negative")[1].sum()) == pytest.approx(3)  # images count, not places


def test_mean_confusion_of_batches_adds_up_and_trusted_drawings_have_the_identity() -> None:
    output = _output((2, 3))
    assert output.negative_cm is not None
    parts = [
        confusion_sums(output._replace(seg_logits=seg, negative_cm=cm), "negative")
        for seg, cm in zip(output.seg_logits.split(1), output.negative_cm.split(1), strict=True)
    ]
    weighted, weight = (sum(part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(weighted / weight, mean_confusion(output, "negative"))
    assert torch.equal(mean_confusion(output, "positive"), torch.eye(4))
    with pytest.raises(ValueError, match="kind: expected 'positive' or 'negative', got 'mask'"):
        mean_confusion(output, "mask")  # type: ignore[arg-type]


# ---- segformer --------------------------------------------------------------------------------------------------


def test_segformer_without_its_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="network: expected the package transformers"):
        build_segmentation(ModelConfig(network="segformer"), 3, 5)


@pytest.mark.slow
def test_segformer_from_scratch() -> None:
    pytest.importorskip("transformers")
    network = build_segmentation(ModelConfig(network="segformer"), 1, 5).eval()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    grey = make_image(2)[:, :1]
    logits = network(grey)
    assert logits.shape == (2, 5, 10, 14)
    assert logits.is_contiguous()
    assert torch.equal(logits, network(grey.expand(-1, 3, -1, -1)))
    with pytest.raises(ValueError, match=r"image: expected at least 32x32 .* got \(1, 3, 31, 64\)"):
        network(make_image(1, (31, 64)))
    with pytest.raises(ValueError, match="channels_in: expected 1 or 3 for segformer, got 4"):
        build_segmentation(ModelConfig(network="segformer"), 4, 5)


@pytest.mark.slow
def test_segformer_from_a_local_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_sizes": [8, 8, 8, 8], "num_attention_heads": [1, 1, 1, 1], "depths": [1, 1, 1, 1]}
    config = transformers.SegformerConfig(num_labels=19, decoder_hidden_size=16, **sizes)
    whole = transformers.SegformerForSemanticSegmentation(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    whole.segformer.save_pretrained(tmp_path / "encoder")
    image = make_image(1, (64, 64))

    same = SegFormer(3, 19, weights=tmp_path / "whole").eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    normalised = (image - mean[:, None, None]) / std[:, None, None]
    torch.testing.assert_close(same(image), whole(pixel_values=normalised).logits)

    new_head = SegFormer(3, 5, weights=tmp_path / "whole", checkpointing=True)
    assert new_head(image).shape == (1, 5, 16, 16)
    assert isinstance(new_head.network.decode_head.batch_norm, nn.BatchNorm2d)  # comes trained
    from_encoder = SegFormer(3, 5, weights=tmp_path / "encoder")
    assert isinstance(from_encoder.network.decode_head.batch_norm, nn.GroupNorm)
    for network in (new_head, from_encoder):
        for name, value in whole.segformer.state_dict().items():
            assert torch.equal(value, network.network.segformer.state_dict()[name]), name

    plain = SegFormer(3, 5, weights=tmp_path / "whole")
    plain.load_state_dict(new_head.state_dict())
    for network in (plain, new_head):
        torch.manual_seed(0)  # dropout
        network.train()(image.repeat(2, 1, 1, 1)).square().mean().backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(plain.parameters(), new_head.parameters(), strict=True))  # type: ignore[arg-type]


def test_segformer_names_a_folder_that_does_not_serve(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    with pytest.raises(FileNotFoundError, match=r"weights: expected a folder with config.json, got .*nowhere"):
        SegFormer(3, 5, weights=tmp_path / "nowhere")
    transformers.SegformerConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"weights: expected the weights of a SegFormer in {tmp_path}"):
        SegFormer(3, 5, weights=tmp_path)
