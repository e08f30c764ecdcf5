"""The objective of a step against plain PyTorch: weights, layers, traces, and a batch in parts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from coarse_kernels import uniform_transition
from coarse_train.config import FitConfig, StreamConfig
from coarse_train.criterion import Counts, Criterion, StepLoss
from coarse_train.data import IGNORE, Sample
from coarse_train.model import ModelOutput
from coarse_train.pictures import posterior

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


def _by_hand(config: FitConfig, output: ModelOutput, batch: Sample) -> Tensor:
    """The equation in the module's docstring, in float64, the field at full resolution."""
    p = output.seg_logits.double().softmax(1)
    assert output.positive_cm is not None
    field = torch.nn.functional.interpolate(output.positive_cm.double().flatten(1, 2), (8, 8), mode="bilinear")
    matrices = field.unflatten(1, (CLASSES, CLASSES)).softmax(1)
    observed = torch.einsum("bijhw,bjhw->bihw", matrices, p)
    drawn = batch.positive != IGNORE
    nll = -observed.gather(1, torch.where(drawn, batch.positive, 0).long()[:, None])[:, 0].log()
    trace = torch.einsum("bjjhw->bhw", matrices)
    positive = (nll + config.positive.trace_weight * trace)[drawn].mean()
    negative = -torch.einsum("iy,bihw->byhw", uniform_transition(CLASSES).double(), p).log()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for layer in batch.negative.unbind(1):
        named = layer != IGNORE
        total = total + negative.gather(1, torch.where(named, layer, 0).long()[:, None])[:, 0][named].sum()
        count += int(named.sum())
    mask = cross_entropy(output.seg_logits.double(), batch.mask.long(), ignore_index=IGNORE)
    return config.positive.weight * positive + config.negative.weight * total / count + config.mask_weight * mask


CONFIG = FitConfig(
    positive=StreamConfig(cm="grid", weight=3.0, trace_weight=0.5),
    negative=StreamConfig(weight=0.25),
    mask_weight=2.0,
)


def _loss(config: FitConfig, output: ModelOutput, batch: Sample, scale: float = 1.0) -> StepLoss:
    criterion = Criterion(config)
    return criterion(output, batch, Counts(*criterion.count(batch).tolist()), scale=scale)


def test_the_loss_is_the_equation() -> None:
    output, batch = _output(), _batch()
    expected = _by_hand(CONFIG, output, batch)
    leaves = [output.seg_logits, output.positive_cm]
    wanted = torch.autograd.grad(expected, leaves, retain_graph=True)
    part = _loss(CONFIG, output, batch)
    torch.testing.assert_close(part.loss.double(), expected, rtol=1e-6, atol=0)
    for got, want in zip(torch.autograd.grad(part.loss, leaves), wanted, strict=True):
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-4, atol=1e-7)


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


@pytest.mark.parametrize("cm", [False, True])
def test_nothing_labelled_is_a_loss_of_zero_with_gradients(cm: bool) -> None:
    batch = Sample(*(torch.full_like(field, IGNORE) if field.dtype == torch.uint8 else field for field in _batch()))
    output = _output(cm=cm)
    loss = _loss(CONFIG, output, batch).loss
    assert loss == 0
    loss.backward()
    assert output.seg_logits.grad is not None
    assert not output.seg_logits.grad.any()


def test_a_stream_of_weight_zero_is_left_out() -> None:
    config = FitConfig(positive=StreamConfig(), negative=StreamConfig(weight=0.0), mask_weight=0.0)
    output, batch = _output(cm=False), _batch()
    expected = cross_entropy(output.seg_logits, batch.positive.long(), ignore_index=IGNORE)
    torch.testing.assert_close(_loss(config, output, batch).loss, expected)


def test_the_posterior_after_two_drawings_rules_out_what_a_negative_names() -> None:
    logits = torch.zeros(1, CLASSES, 1, 2)
    positive = torch.tensor([[[IGNORE, 1]]], dtype=torch.uint8)
    negative = torch.tensor([[[[0, IGNORE]], [[2, IGNORE]]]], dtype=torch.uint8)
    found = posterior(ModelOutput(logits, None, None, None), positive, negative)[0, :, 0]
    torch.testing.assert_close(found[:, 0], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 1], torch.tensor([0.0, 1.0, 0.0]), atol=1e-6, rtol=0)
