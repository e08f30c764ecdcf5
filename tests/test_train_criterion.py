"""The objective of a step against plain PyTorch: weights, layers, traces, and a batch in parts."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, interpolate

from coarse_kernels import Drawings, Objective, annotation_objective, uniform_transition
from coarse_train.config import DrawingsConfig, FitConfig
from coarse_train.criterion import Counts, Criterion, StepLoss
from coarse_train.data import IGNORE, Sample
from coarse_train.model import ModelOutput
from coarse_train.progress import posterior

CLASSES = 3


def _batch(images: int = 4, layers: int = 2, seed: int = 0) -> Sample:
    rng = torch.Generator().manual_seed(seed)

    def labels(*shape: int, drawn: float) -> Tensor:
        values = torch.randint(0, CLASSES, shape, generator=rng, dtype=torch.uint8)
        return torch.where(torch.rand(shape, generator=rng) < drawn, values, IGNORE).to(torch.uint8)

    return Sample(
        torch.rand(images, 1, 8, 8, generator=rng),
        labels(images, 8, 8, drawn=0.5),
        labels(images, layers, 8, 8, drawn=0.3),
        labels(images, 8, 8, drawn=0.2),
    )


def _output(images: int = 4, *, cm: bool = True, seed: int = 1) -> ModelOutput:
    rng = torch.Generator().manual_seed(seed)
    seg_logits = torch.randn(images, CLASSES, 8, 8, generator=rng, requires_grad=True)
    positive_cm = torch.randn(images, CLASSES, CLASSES, 2, 2, generator=rng, requires_grad=True) if cm else None
    return ModelOutput(seg_logits, positive_cm, None, None)


def _kind_by_hand(
    output: ModelOutput, cm_logits: Tensor | None, layers: Tensor, transition: Tensor | None, trace_weight: float
) -> tuple[Tensor, Tensor]:
    """(loss, nll): means over the labelled pixels of all ``layers`` (B, K, H, W), one layer after the other, in float64, with
    logits and field at full resolution."""
    size = tuple(layers.shape[2:])
    p = interpolate(output.seg_logits.double(), size, mode="bilinear").softmax(1)
    observed, trace = p, torch.zeros_like(p[:, 0])
    if cm_logits is not None:
        field = interpolate(cm_logits.double().flatten(1, 2), size, mode="bilinear").unflatten(1, (CLASSES, CLASSES))
        matrices = field.softmax(1).expand(len(p), *field.shape[1:])
        observed = torch.einsum("bijhw,bjhw->bihw", matrices, p)
        trace = torch.einsum("bjjhw->bhw", matrices)
    if transition is not None:
        observed = torch.einsum("iy,bihw->byhw", transition.double(), observed)
    loss, nll, count = p.new_zeros(()), p.new_zeros(()), 0
    for layer in layers.unbind(1):
        drawn = layer != IGNORE
        here = -observed.gather(1, torch.where(drawn, layer, 0).long()[:, None])[:, 0][drawn].log()
        nll = nll + here.sum()
        loss = loss + (here + trace_weight * trace[drawn]).sum()
        count += int(drawn.sum())
    return loss / count, nll / count


def _by_hand(config: FitConfig, output: ModelOutput, batch: Sample) -> list[Tensor]:
    """The equation in the module's docstring: the loss, and the nll of each kind."""
    positive, negative = config.positive, config.negative
    kinds = [
        _kind_by_hand(output, output.positive_cm, batch.positive[:, None], None, positive.trace_weight),
        _kind_by_hand(output, output.negative_cm, batch.negative, output.negative_transition(), negative.trace_weight),
        _kind_by_hand(output, None, batch.mask[:, None], None, 0.0),
    ]
    weights = (positive.weight, negative.weight, config.mask_weight)
    loss = torch.stack([weight * own for weight, (own, _) in zip(weights, kinds, strict=True)]).sum()
    return [loss, *(nll for _, nll in kinds)]


CONFIG = FitConfig(
    positive=DrawingsConfig(cm="grid", weight=3.0, trace_weight=0.5),
    negative=DrawingsConfig(weight=0.25),
    mask_weight=2.0,
)


def _loss(config: FitConfig, output: ModelOutput, batch: Sample, scale: float = 1.0) -> StepLoss:
    criterion = Criterion(config)
    return criterion(output, batch, Counts(*criterion.count(batch).tolist()), scale=scale)


def _assert_by_hand(config: FitConfig, output: ModelOutput, batch: Sample) -> None:
    leaves = [leaf for leaf in output if leaf is not None]
    expected = _by_hand(config, output, batch)
    wanted = torch.autograd.grad(expected[0], leaves)
    found = _loss(config, output, batch)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(found.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-7)


def test_the_loss_is_the_equation() -> None:
    _assert_by_hand(CONFIG, _output(), _batch())


@pytest.mark.parametrize("drawn", [1, 2, 3])
def test_layers_of_negative_drawings_are_summed_whatever_pads_them(drawn: int) -> None:
    """Three layers of which ``drawn`` are drawn on; a field, a learned transition, logits at half the resolution."""
    rng = torch.Generator().manual_seed(2)
    batch = _batch(layers=3)
    batch.negative[:, drawn:] = IGNORE
    transition = torch.rand(CLASSES, CLASSES, generator=rng).fill_diagonal_(0)
    output = ModelOutput(
        torch.randn(4, CLASSES, 4, 4, generator=rng, requires_grad=True),
        torch.randn(1, CLASSES, CLASSES, 1, 1, generator=rng, requires_grad=True),
        torch.randn(4, CLASSES, CLASSES, 2, 4, generator=rng, requires_grad=True),
        (transition / transition.sum(1, keepdim=True)).requires_grad_(),
    )
    config = replace(CONFIG, negative=DrawingsConfig(cm="grid", weight=0.25, trace_weight=0.1))
    _assert_by_hand(config, output, batch)
    fewer = batch._replace(negative=batch.negative[:, :drawn])
    for a, b in zip(_loss(config, output, batch), _loss(config, output, fewer), strict=True):
        torch.testing.assert_close(a, b)


def test_weights_of_classes_are_those_of_cross_entropy() -> None:
    """Trusted kinds: the weighted mean of `F.cross_entropy`; negative drawings name what is not there and are not weighted."""
    weights, batch, output = torch.tensor([0.5, 2.0, 0.0]), _batch(), _output(cm=False)
    criterion = Criterion(CONFIG, dict.fromkeys(("positive", "mask"), weights))
    counts = Counts(*criterion.count(batch).tolist())
    found = criterion(output, batch, counts)
    seg = interpolate(output.seg_logits.double(), batch.mask.shape[1:], mode="bilinear", align_corners=False)
    for nll, labels in ((found.positive_nll, batch.positive), (found.mask_nll, batch.mask)):
        wanted = cross_entropy(seg, labels.long(), weights.double(), ignore_index=IGNORE)
        torch.testing.assert_close(nll.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.negative_nll, _loss(CONFIG, output, batch).negative_nll)


def test_a_step_is_one_call_of_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[Drawings]] = []

    def spy(seg_logits: Tensor, drawings: list[Drawings], **options: Any) -> Objective:
        calls.append(drawings)
        return annotation_objective(seg_logits, drawings, **options)

    monkeypatch.setattr("coarse_train.criterion.annotation_objective", spy)
    batch = _batch()
    empty = torch.full_like(batch.positive, IGNORE)
    nothing = Sample(batch.image, empty, empty[:, None], empty)
    for labelled, cm, kinds in (
        (batch, True, 3),
        (batch._replace(mask=empty), False, 2),
        (batch._replace(positive=empty), False, 2),
        (batch._replace(positive=empty), True, 3),  # a parameter waits for its gradient
        (nothing, True, 1),
        (nothing, False, 1),
    ):
        calls.clear()
        _loss(CONFIG, _output(cm=cm), labelled)
        assert [len(drawings) for drawings in calls] == [kinds]


def test_the_shares_of_two_passes_sum_to_the_loss_of_the_step() -> None:
    output, batch = _output(), _batch()
    criterion = Criterion(CONFIG)
    whole = _loss(CONFIG, output, batch)
    counts = Counts(*criterion.count(batch).tolist())
    assert output.positive_cm is not None
    shares = []
    for part in (slice(0, 1), slice(1, 4)):
        piece = ModelOutput(output.seg_logits[part], output.positive_cm[part], None, None)
        shares.append(criterion(piece, Sample(*(field[part] for field in batch)), counts))
    for field in StepLoss._fields:
        torch.testing.assert_close(sum(getattr(s, field) for s in shares), getattr(whole, field), rtol=1e-5, atol=1e-6)


def test_scale_multiplies_the_loss_and_leaves_what_is_reported() -> None:
    one, four = (_loss(CONFIG, _output(), _batch(), scale) for scale in (1.0, 4.0))
    torch.testing.assert_close(four.loss, 4 * one.loss)
    for a, b in zip(one[1:], four[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_labelled_is_a_loss_of_zero_with_gradients(learned: bool) -> None:
    """For every parameter that data parallelism waits for."""
    batch = Sample(*(torch.full_like(field, IGNORE) if field.dtype == torch.uint8 else field for field in _batch()))
    output = _output(cm=learned)
    if learned:
        transition = uniform_transition(CLASSES).requires_grad_()
        negative_cm = torch.randn(4, CLASSES, CLASSES, 1, 1).requires_grad_()
        output = output._replace(negative_cm=negative_cm, transition=transition)
    found = _loss(CONFIG, output, batch)
    assert list(found) == [0] * 4
    found.loss.backward()
    for leaf in output:
        assert leaf is None or (leaf.grad is not None and not leaf.grad.any())


def test_a_kind_of_weight_zero_is_left_out() -> None:
    config = FitConfig(positive=DrawingsConfig(), negative=DrawingsConfig(weight=0.0), mask_weight=0.0)
    output, batch = _output(cm=False), _batch()
    expected = cross_entropy(output.seg_logits, batch.positive.long(), ignore_index=IGNORE)
    found = _loss(config, output, batch)
    torch.testing.assert_close(found.loss, expected)
    assert list(found[2:]) == [0, 0]


def test_the_posterior_after_two_drawings_rules_out_what_a_negative_names() -> None:
    logits = torch.zeros(1, CLASSES, 1, 2)
    positive = torch.tensor([[[IGNORE, 1]]], dtype=torch.uint8)
    negative = torch.tensor([[[[0, IGNORE]], [[2, IGNORE]]]], dtype=torch.uint8)
    found = posterior(ModelOutput(logits, None, None, None), positive, negative)[0, :, 0]
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)


def test_the_posterior_is_the_product_of_all_drawings() -> None:
    """Drawings are independent given the true class: in float64, a drawing after the other."""
    output, batch = _output(), _batch(layers=3)
    batch.negative[0, :, 0, 0] = torch.arange(CLASSES)  # nothing is left
    assert output.positive_cm is not None
    transition = uniform_transition(CLASSES).double()
    field = interpolate(output.positive_cm.double().flatten(1, 2), (8, 8), mode="bilinear")
    matrices = field.unflatten(1, (CLASSES, CLASSES)).softmax(1)  # (B, observed, true, H, W)
    believed = output.seg_logits.double().softmax(1)
    for index in itertools.product(range(4), range(8), range(8)):
        image, y, x = index
        if batch.positive[index] != IGNORE:
            believed[image, :, y, x] *= matrices[image, int(batch.positive[index]), :, y, x]
        for layer in batch.negative[image, :, y, x]:
            if layer != IGNORE:
                believed[image, :, y, x] *= transition[:, int(layer)]
    prior, total = output.seg_logits.double().softmax(1), believed.sum(1, keepdim=True)
    expected = torch.where(total > 0, believed / total, prior)
    assert total[0, 0, 0, 0] == 0
    found = posterior(output, batch.positive, batch.negative)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-6)
