"""The small loop of the demo and its metric."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

from coarse_train.data import IGNORE, InMemory, Sample
from coarse_train.experiments.loop import TrainConfig, evaluate, train
from coarse_train.experiments.methods import (
    METHODS,
    MethodSettings,
    build_loss,
    build_model,
    estimated_confusion,
    transition_for,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """At these sizes threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _toy(count: int = 64, swap: float = 0.3, seed: int = 0) -> InMemory:
    """8x8 images whose brightness is the class (0, 1, 2), constant per image; drawings swap 1 and 2 with ``swap``."""
    rng = torch.Generator().manual_seed(seed)
    classes = torch.arange(count) % 3
    image = (classes.float() / 2)[:, None, None, None] + 0.05 * torch.randn(count, 1, 8, 8, generator=rng)
    mask = classes[:, None, None].expand(-1, 8, 8).to(torch.uint8).contiguous()
    flip = (torch.rand(count, 8, 8, generator=rng) < swap) & (mask > 0)
    positive = torch.where(flip, 3 - mask, mask).to(torch.uint8)
    negative = torch.where(mask == 0, IGNORE, 3 - mask).to(torch.uint8)
    return InMemory(Sample(image, positive, negative.unsqueeze(1), mask))


# ---- loop -------------------------------------------------------------------------------------------------------


def test_samples_collate_to_a_sample() -> None:
    batch = default_collate([_toy()[k] for k in range(3)])
    assert isinstance(batch, Sample)
    assert batch.image.shape == (3, 1, 8, 8)
    assert batch.mask.dtype == torch.uint8


def test_in_memory_refuses_fields_of_different_length() -> None:
    with pytest.raises(ValueError, match="one length"):
        InMemory(Sample(torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 1, 8, 8), torch.zeros(3, 8, 8)))


def test_every_method_lowers_its_loss_on_the_toy() -> None:
    data = _toy()
    for method in METHODS:
        settings = MethodSettings(lr=1e-2)
        loss = build_loss(method, settings, transition_for("estimated", data, 3), "reference")
        config = TrainConfig(steps=12, batch_size=16, lr=1e-2, evaluations=3)
        history = train(build_model(method, settings, 3, seed=0), loss, data, data, 3, config)
        assert history.loss[-1] < history.loss[0], method
        assert history.steps == [4, 8, 12]
        assert len(history.miou) == 3
        assert history.best == max(history.miou)
        assert history.last == history.miou[-1]


def test_the_global_matrix_learns_the_swap() -> None:
    """Known noise: classes 1 and 2 are swapped in 0.3 of the pixels, class 0 never. A constant image of a class tells
    its whole column, so the matrix must be found to within the sampling error; negatives tell the classes apart."""
    data = _toy(96)
    settings = MethodSettings(lr=1e-2, cm_lr=5e-2)
    model = build_model("coarse_both", settings, 3, seed=0)
    loss = build_loss("coarse_both", settings, transition_for("uniform", data, 3), "reference")
    history = train(model, loss, data, data, 3, TrainConfig(steps=150, batch_size=24, lr=1e-2, cm_lr=5e-2))
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.7, 0.3], [0.0, 0.3, 0.7]])
    torch.testing.assert_close(estimated_confusion(model, data.stacked.image), expected, atol=0.04, rtol=0)
    assert history.last > 99


def test_unchanged_computation_is_bit_identical_under_a_fixed_seed() -> None:
    data = _toy()

    def run() -> tuple[list[float], dict[str, Tensor]]:
        settings = MethodSettings()
        model = build_model("coarse_both", settings, 3, seed=7)
        loss = build_loss("coarse_both", settings, transition_for("estimated", data, 3))
        history = train(model, loss, data, data, 3, TrainConfig(steps=6, batch_size=8, evaluations=6, seed=7))
        return history.loss, model.state_dict()

    (losses, state), (losses_again, state_again) = run(), run()
    assert losses == losses_again
    assert all(torch.equal(state[name], state_again[name]) for name in state)


def test_all_methods_start_from_the_same_network_and_see_the_same_batches() -> None:
    data = _toy()
    starts = [build_model(method, MethodSettings(), 3, seed=1).segmentation.state_dict() for method in METHODS]
    assert all(torch.equal(start["head.weight"], starts[0]["head.weight"]) for start in starts)
    seen: list[list[float]] = []
    for method in ("ce_positive", "coarse_both"):
        sums: list[float] = []
        inner = build_loss(method, MethodSettings(), transition_for("uniform", data, 3), "reference")

        def spy(seg: Tensor, cm: Tensor | None, batch: Sample, inner=inner, sums=sums) -> Tensor:  # type: ignore[no-untyped-def]
            sums.append(float(batch.image.sum()))
            return inner(seg, cm, batch)

        train(build_model(method, MethodSettings(), 3, seed=1), spy, data, data, 3, TrainConfig(steps=5, batch_size=8))
        seen.append(sums)
    assert seen[0] == seen[1]


def test_no_row_but_supervised_reads_the_masks() -> None:
    data = _toy()
    batch = data.select(range(8))
    poisoned = batch._replace(mask=torch.full_like(batch.mask, 2))
    for method in METHODS:
        model = build_model(method, MethodSettings(), 3, seed=0).eval()
        loss = build_loss(method, MethodSettings(), transition_for("uniform", data, 3), "reference")
        output = model(batch.image)
        logits = (output.seg_logits, output.positive_cm)
        same = torch.equal(loss(*logits, batch), loss(*logits, poisoned))
        assert same == (method != "supervised")


def test_uniform_is_complementary_label_learning() -> None:
    data = _toy()
    batch = data.select(range(6))
    logits = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    value = build_loss("ce_negative", MethodSettings(), transition_for("uniform", data, 3))(logits, None, batch)
    negative = batch.negative[:, 0]
    drawn = negative != IGNORE
    named = torch.where(drawn, negative, 0).long()
    probability = logits.softmax(1).gather(1, named[:, None])[:, 0]
    torch.testing.assert_close(value, -torch.log((1 - probability) / 2)[drawn].mean())


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    data = _toy()
    with pytest.raises(FloatingPointError, match="step 1"):
        train(
            build_model("supervised", MethodSettings(), 3, seed=0),
            lambda seg, cm, batch: seg.sum() * float("nan"),
            data,
            data,
            3,
            TrainConfig(steps=3),
        )


def test_evaluate_counts_every_pixel_once() -> None:
    data = _toy(50)
    meter = evaluate(build_model("supervised", MethodSettings(), 3, seed=0), data, 3, batch_size=16)
    assert int(meter.counts.sum()) == 50 * 64
