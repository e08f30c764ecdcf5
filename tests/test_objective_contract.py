"""What `annotation_objective` owes beyond the numbers of random drawings: coherent drawings, seams, parts, odd weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import coarse_kernels as ck
from coarse_kernels import Drawings
from tests.contract import GRADIENT_APART, LOSS_APART, MANY_SHARES, gradient_bound, gradient_floor, loss_bound
from tests.helpers import (
    SCHEDULES,
    generator,
    gradient_error,
    leaf,
    loss_error,
    on_threads,
    put,
    random_transition,
)

pytestmark = pytest.mark.usefixtures("poison")

EVERY = pytest.mark.every
FUSED = pytest.mark.fused


def blobs(size: tuple[int, ...], layers: int, classes: int, seed: int) -> Tensor:
    """(2, layers, *size) labels in patches of about 20 pixels, a few pixels and the first patch not drawn: as people draw."""
    gen = generator(seed)
    patches = torch.randint(0, classes, (2 * layers, 1, *(max(1, s // 20) for s in size)), generator=gen).float()
    labels = torch.nn.functional.interpolate(patches, size=size, mode="nearest").reshape(2, layers, *size).long()
    labels[torch.rand(labels.shape, generator=gen) < 0.05] = 255
    labels[..., : size[-1] // 5] = 255
    return labels


def evaluate(seg: Tensor, kinds: list[Drawings], backend: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Loss, and the gradients of the class logits and of every matrix and transition."""
    own = leaf(seg.to(dtype))
    assert own is not None
    leaves, drawings = [own], []
    for kind in kinds:
        cm = None if kind.cm_logits is None else leaf(kind.cm_logits.to(dtype))
        transition = None if kind.transition is None else leaf(kind.transition.to(dtype))
        leaves += [t for t in (cm, transition) if t is not None]
        drawings.append(dataclasses.replace(kind, cm_logits=cm, transition=transition))
    loss = ck.annotation_objective(own, drawings, backend=backend).loss
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def check(seg: Tensor, kinds: list[Drawings], backend: str, more: float = 0.0) -> None:
    """By the bounds of tests/contract.py. ``more``: what is allowed to a gradient beside them."""
    loss, grads = evaluate(seg, kinds, backend, torch.float32)
    plain_loss, plain = evaluate(seg, kinds, "reference", torch.float32)
    truth, expected = evaluate(seg, kinds, "reference", torch.float64)
    assert loss_error(loss, truth) <= loss_bound(loss_error(plain_loss, truth), torch.float32)
    for ours, usual, theirs in zip(grads, plain, expected, strict=True):
        bound = gradient_bound(gradient_error(usual, theirs), torch.float32)
        assert gradient_error(ours, theirs) <= bound + more


@pytest.mark.sampled(8)
@FUSED
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("stream", ["positive", "random"])
@pytest.mark.parametrize("classes", [3, 19])
@pytest.mark.parametrize(
    "grid", [(8, 11), (33, 41), (1, 1), (66, 88)], ids=["strided", "stride-2", "one-point", "pixel"]
)
def test_drawings_in_patches(backend: str, grid: tuple[int, int], classes: int, stream: str, layers: int) -> None:
    """Most segments have one label, or few: kernels know these cases, and random labels never meet them."""
    if backend != "cpu" and (classes == 19 or layers != 2):
        pytest.skip("what is special to patches is csrc/cpu/strided_grid.h's; elsewhere a selection will do")
    size, gen = (66, 88), generator(classes)
    if classes == 19 and layers == 3:
        pytest.skip("layers are 3 classes' matter")
    if classes == 19:  # as many rows, whose seams are what differs; fewer columns, for the reference's sake
        size, grid = ((22, 88), (22, 88)) if grid == size else ((66, 44), (grid[0], -(-grid[1] // 2)))
    seg = 2 * torch.randn(2, classes, size[0] // 4, size[1] // 4, generator=gen)
    cm = 2 * torch.randn(2, classes, classes, *grid, generator=gen)
    transition = None if stream == "positive" else put(random_transition(classes, gen))
    kinds = [
        Drawings(put(blobs(size, layers, classes, 1)), put(cm), transition, trace_weight=0.1),
        Drawings(put(blobs(size, 2, classes, 2)), transition=put(ck.uniform_transition(classes)), weight=0.3),
        Drawings(put(blobs(size, 1, classes, 3))),
    ]
    check(put(seg), kinds, backend)


@FUSED
@pytest.mark.parametrize("size", [(17, 9), (33, 20), (100, 7), (257, 5), (40, 3, 6)], ids=str)
def test_rows_of_a_grid_between_two_tasks_get_the_gradient_of_both(backend: str, size: tuple[int, ...]) -> None:
    """Heights around 16 and 32 rows, where an image is cut; grids whose cells are smaller, larger and as large as a part."""
    if backend != "cpu" and size[0] > 40:
        pytest.skip("seams of tasks are csrc/cpu/plan.h's; elsewhere a selection will do")
    gen = generator(len(size))
    for rows in (2, size[0] // 3, size[0] - 1):
        grid = (rows, *(max(1, s // 2) for s in size[1:]))
        seg = torch.randn(2, 3, *grid, generator=gen)
        shared = torch.randn(1, 3, 3, *grid, generator=gen)
        labels = torch.randint(0, 3, (2, *size), generator=gen)
        kinds = [Drawings(put(labels), put(shared)), Drawings(put(labels), put(torch.randn(2, 3, 3, *grid)))]
        check(put(seg), kinds, backend)


@FUSED
@pytest.mark.parametrize("points", [1, 2, 37, 2500, 5000])
def test_points_of_a_line_between_two_tasks_get_the_gradient_of_both(backend: str, points: int) -> None:
    """A signal of several tasks: one whole grid of points was one task, whatever its length."""
    if backend != "cpu" and points != 37:
        pytest.skip("seams of tasks are csrc/cpu/plan.h's; elsewhere a selection will do")
    length, gen = 5001, generator(points)
    seg, labels = torch.randn(2, 2, points, generator=gen), torch.randint(0, 2, (2, 1, length), generator=gen)
    own, shared = torch.randn(2, 2, 2, points, generator=gen), torch.randn(1, 2, 2, points // 2 + 1, generator=gen)
    kinds = [
        Drawings(put(labels), put(own), trace_weight=0.1),
        Drawings(put(labels[:, 0]), put(shared)),
        Drawings(put(labels[:, 0]), transition=put(ck.uniform_transition(2))),
    ]
    on_pixels = [Drawings(put(labels), put(torch.randn(2, 2, 2, length, generator=gen)))]
    for some in (kinds, on_pixels):
        # one point gets 10,002 shares, which are added in float32: 2.2e-6 off where 2.0e-6 is allowed (docs/contract.md)
        check(put(seg), some, backend, more=MANY_SHARES if points == 1 else 0.0)
    if backend == "cpu":
        assert "4 tasks" in ck.explain(seg, kinds[:1])
        (_, one), (_, other) = on_threads((1, 3), lambda: evaluate(seg, kinds, "cpu", torch.float32))
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))


def test_the_number_of_threads_changes_no_bit_of_an_objective() -> None:
    gen = generator(0)
    seg = torch.randn(2, 5, 24, 20, generator=gen)
    cm, other = torch.randn(1, 5, 5, 12, 10, generator=gen), torch.randn(2, 5, 5, 7, 9, generator=gen)
    kinds = [
        Drawings(blobs((96, 80), 2, 5, 1), cm),
        Drawings(blobs((96, 80), 1, 5, 2), other, random_transition(5, gen)),
        Drawings(blobs((96, 80), 1, 5, 3)),
    ]
    if "cpu" not in ck.available_backends():
        pytest.skip("not built")
    found = on_threads((1, 2, 5), lambda: evaluate(seg, kinds, "cpu", torch.float32))
    for loss, grads in found[1:]:
        assert torch.equal(loss, found[0][0])
        for ours, first in zip(grads, found[0][1], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.skipif("cpu" not in ck.available_backends(), reason="not built")
def test_the_gradient_of_a_transition_of_many_classes_is_right_and_the_same_on_any_number_of_threads() -> None:
    """More tasks than there are sums of C x C: several tasks add to each."""
    classes, gen = 150, generator(0)
    seg, labels = torch.randn(16, classes, 16, 1, generator=gen), torch.randint(0, classes, (16, 320, 4), generator=gen)
    kinds = [Drawings(labels, transition=random_transition(classes, gen))]
    (_, one), (_, other) = on_threads((1, 3), lambda: evaluate(seg, kinds, "cpu", torch.float32))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, other, strict=True))
    _, truth = evaluate(seg, kinds, "reference", torch.float64)
    assert all(gradient_error(ours, theirs) < GRADIENT_APART for ours, theirs in zip(one, truth, strict=True))


@EVERY
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("weight", [0.0, 1e-44, 0.3, 1e30])
def test_the_loss_of_a_part_has_its_own_gradient_whatever_the_weight_of_its_kind(
    backend: str, schedule: str, weight: float
) -> None:
    gen = generator(0)
    seg, labels = torch.randn(1, 3, 4, 5, generator=gen), torch.randint(0, 3, (1, 4, 5), generator=gen)
    kinds = [Drawings(put(labels), weight=weight), Drawings(put(labels.flip(1)), put(torch.randn(1, 3, 3, 2, 2)))]
    for drawings in (kinds[:1], kinds):
        found = []
        for name, dtype in ((backend, torch.float32), ("reference", torch.float64)):
            own = leaf(put(seg).to(dtype))
            with ck.use_schedule(schedule):
                ck.annotation_objective(own, drawings, backend=name).parts[0].loss.backward()
            found.append(own.grad)
        assert gradient_error(*found) < GRADIENT_APART


@FUSED
@pytest.mark.parametrize("grid", [(4, 16), (2, 3)], ids=["pixel", "strided"])
def test_a_trace_weight_of_minus_one_keeps_the_gradient_of_large_logits(backend: str, grid: tuple[int, int]) -> None:
    """In log space the weights of likelihood and trace cancelled, and with them went the whole gradient of the matrix."""
    gen = generator(0)
    seg, cm = 60 * torch.randn(1, 3, 4, 16, generator=gen), 60 * torch.randn(1, 3, 3, *grid, generator=gen)
    kinds = [Drawings(put(torch.randint(0, 3, (1, 4, 16), generator=gen)), put(cm), trace_weight=-1.0)]
    _, ours = evaluate(put(seg), kinds, backend, torch.float32)
    _, truth = evaluate(put(seg), kinds, "reference", torch.float64)
    assert gradient_error(ours[1], truth[1]) < gradient_floor(torch.float32, 60.0)


@EVERY
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_kind_of_weight_zero_leaves_the_total_finite_beside_an_impossible_label(backend: str, reduction: str) -> None:
    impossible = put(torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    labels = put(torch.zeros(1, 1, 4, dtype=torch.long))
    kinds = [Drawings(labels, None, impossible, weight=0.0), Drawings(labels)]
    out = ck.annotation_objective(put(torch.zeros(1, 2, 1, 4)), kinds, reduction=reduction, backend=backend)
    assert out.loss.sum().item() == pytest.approx(4 * 0.6931472, rel=1e-6)
    assert out.parts[0].loss.isinf().all()


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_an_image_without_a_single_layer_has_a_loss_that_trains_and_gradients_of_zero(
    backend: str, reduction: str
) -> None:
    """The reference had a constant there: backward raised."""
    seg, cm = put(torch.randn(1, 3, 4, 5)).requires_grad_(), put(torch.randn(1, 3, 3, 2, 2)).requires_grad_()
    transition = put(ck.uniform_transition(3)).requires_grad_()
    none = put(torch.zeros(1, 0, 4, 5, dtype=torch.uint8))
    kinds = [Drawings(none), Drawings(none, cm, transition, weight=0.5)]
    out = ck.annotation_objective(seg, kinds, reduction=reduction, backend=backend)
    assert out.loss.sum().item() == 0
    for part in out.parts:
        (grad,) = torch.autograd.grad(part.loss.sum(), seg, retain_graph=True)
        assert torch.equal(grad, torch.zeros_like(seg))
    out.loss.sum().backward()
    for of in (seg, cm, transition):
        assert of.grad is not None
        assert torch.equal(of.grad, torch.zeros_like(of))


@EVERY
def test_minus_infinity_on_a_grid_is_lost_at_most_where_interpolation_loses_it(backend: str) -> None:
    """Along an axis as long as the pixels' kernels do not read the neighbour that interpolation multiplies with 0."""
    seg, labels = torch.zeros(1, 3, 4, 3), torch.zeros(1, 4, 9, dtype=torch.uint8)
    seg[0, 1, 2, 0] = -torch.inf
    ours, truth = (
        ck.annotation_nll(put(seg), None, put(labels), reduction="none", backend=name).loss
        for name in (backend, "reference")
    )
    assert truth.isnan().any()
    assert not truth.isnan().all()
    assert not ours[~truth.isnan()].isnan().any()
    assert torch.allclose(ours[~truth.isnan()], truth[~truth.isnan()], rtol=LOSS_APART)


@EVERY
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_labels_that_were_made_in_inference_mode_train(backend: str, schedule: str) -> None:
    with torch.inference_mode():
        labels = put(torch.randint(0, 3, (1, 4, 5)))
    seg = put(torch.randn(1, 3, 4, 5)).requires_grad_()
    with ck.use_schedule(schedule):
        ck.annotation_objective(seg, [Drawings(labels), Drawings(labels, weight=0.5)], backend=backend).loss.backward()
    assert seg.grad is not None


def test_numbers_that_no_kernel_could_hold_are_refused_by_name() -> None:
    seg, labels = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.uint8)
    for options, name in (({"normalizer": 1e-39}, "normalizer"), ({"ignore_index": 2**63}, "ignore_index")):
        arguments: dict[str, Any] = options
        with pytest.raises(ValueError, match=name):
            ck.annotation_nll(seg, None, labels, **arguments)


@EVERY
def test_the_module_is_the_function(backend: str) -> None:
    gen = generator(0)
    seg, labels = put(torch.randn(1, 3, 4, 5, generator=gen)), put(torch.randint(0, 3, (1, 4, 5), generator=gen))
    kinds = [Drawings(labels, put(torch.randn(1, 3, 3, 2, 2, generator=gen))), Drawings(labels, weight=0.5)]
    module = ck.AnnotationObjective(reduction="sum", backend=backend)
    assert torch.equal(
        module(seg, kinds).loss, ck.annotation_objective(seg, kinds, reduction="sum", backend=backend).loss
    )
    assert "reduction='sum'" in repr(module)


def test_explain_says_who_computes_what_and_why_not_others() -> None:
    labels = torch.zeros(1, 8, 8, dtype=torch.uint8)
    seg, cm = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 3, 4, 4)
    text = ck.explain(seg, [Drawings(labels, cm), Drawings(labels)])
    assert "drawings[0]" in text
    assert "drawings[1]" in text
    assert "not cuda: it serves cuda tensors, got cpu" in text
    if "cpu" in ck.available_backends():
        assert text.startswith("backend cpu")
        assert "strided" in text
        assert "trusted" in text
    assert "plain PyTorch" in ck.explain(seg, [Drawings(labels)], backend="reference")
    with (
        FakeTensorMode() as fake,
        pytest.raises(TypeError, match="seg_logits: expected a tensor with values, got one of a"),
    ):
        ck.explain(fake.from_tensor(seg), [Drawings(fake.from_tensor(labels))])
    assert "no pixel" in ck.explain(seg[:0], [Drawings(labels[:0])]) or "cpu" not in ck.available_backends()


@EVERY
def test_a_map_that_is_written_into_leaves_its_part_alone(backend: str) -> None:
    """`loss[mask] = 0` of one kind in one layer, which weighs 1."""
    seg, labels = put(torch.randn(1, 3, 4, 5, generator=generator(0))), put(torch.zeros(1, 4, 5, dtype=torch.uint8))
    out = ck.annotation_objective(seg, [Drawings(labels)], reduction="none", backend=backend)
    before = out.parts[0].loss.clone()
    out.loss.zero_()
    assert torch.equal(out.parts[0].loss, before)


@EVERY
@pytest.mark.parametrize("weight", [3e38, 1e-39], ids=["beyond float32", "below its normal numbers"])
def test_weights_whose_sum_float32_does_not_hold_are_no_batch_without_labels(backend: str, weight: float) -> None:
    """Each of them is a finite number; the loss was 0, or inf, and the gradients NaN."""
    seg, labels = torch.randn(1, 3, 4, 5, generator=generator(0)), torch.zeros(1, 4, 5, dtype=torch.uint8)
    labels[:, 1:] = 255 if weight < 1 else 0
    labels[:, :, 2:] = 255 if weight < 1 else 0
    pixel_weight = torch.full((1, 4, 5), weight)
    with pytest.raises(ValueError, match=r"class_weight, pixel_weight: expected weights that sum up to .* got"):
        ck.annotation_objective(seg, [Drawings(labels, pixel_weight=pixel_weight)], backend=backend)
    with pytest.raises(ValueError, match=r"drawings\[1\]\.class_weight, drawings\[1\]\.pixel_weight: expected"):
        ck.annotation_objective(seg, [Drawings(labels), Drawings(labels, pixel_weight=pixel_weight)], backend=backend)
    exact = ck.annotation_objective(seg.double(), [Drawings(labels, pixel_weight=pixel_weight)], backend=backend)
    expected = ck.annotation_objective(seg.double(), [Drawings(labels)], backend=backend)
    torch.testing.assert_close(exact.loss, expected.loss, rtol=1e-12, atol=0)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
@pytest.mark.parametrize("weight", [3e38, 1e-39])
def test_weights_whose_sum_float32_does_not_hold_are_refused_inside_torch_func(transform: str, weight: float) -> None:
    seg, labels = torch.randn(1, 3, 1, 2, generator=generator(0)), torch.zeros(1, 1, 2, dtype=torch.uint8)

    def loss(seg: Tensor) -> Tensor:
        return ck.annotation_nll(seg, None, labels, pixel_weight=torch.full((1, 1, 2), weight)).loss

    call = {
        "grad": lambda: torch.func.grad(loss)(seg),
        "jvp": lambda: torch.func.jvp(loss, (seg,), (seg,)),
        "vmap": lambda: torch.func.vmap(loss)(seg[None]),
    }[transform]
    with pytest.raises(ValueError, match="class_weight, pixel_weight: expected weights that sum up to"):
        call()


def test_numbers_that_float64_holds_serve_float64() -> None:
    seg, labels = torch.randn(1, 3, 1, 2, generator=generator(0)).double(), torch.zeros(1, 1, 2, dtype=torch.uint8)
    cm = torch.zeros(1, 3, 3, 1, 1, dtype=torch.float64)
    one = ck.annotation_objective(seg, [Drawings(labels, cm, trace_weight=1.0)]).loss
    large = ck.annotation_objective(seg, [Drawings(labels, cm, weight=1e39, trace_weight=1.0, normalizer=2e0)]).loss
    torch.testing.assert_close(large / 1e39, one, rtol=1e-12, atol=0)


@EVERY
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_kind_that_weighs_nothing_shows_nothing_of_its_nan(backend: str, reduction: str) -> None:
    seg, labels = put(torch.randn(1, 3, 4, 5, generator=generator(0))), put(torch.zeros(1, 4, 5, dtype=torch.uint8))
    cm = put(torch.full((1, 3, 3, 1, 1), torch.nan))
    kinds = [Drawings(labels), Drawings(labels, cm, weight=0.0)]
    out = ck.annotation_objective(seg, kinds, reduction=reduction, backend=backend)
    alone = ck.annotation_objective(seg, kinds[:1], reduction=reduction, backend=backend)
    assert torch.equal(out.loss, alone.loss)


@EVERY
def test_pixels_that_weigh_nothing_give_no_nan_to_gradients(backend: str) -> None:
    seg = torch.randn(1, 3, 4, 5, generator=generator(0))
    seg[:, :, 2] = torch.nan
    weight = torch.ones(1, 4, 5)
    weight[:, 2] = 0
    cm = put(torch.randn(1, 3, 3, 4, 5, generator=generator(1))).requires_grad_()
    leaf_seg, labels = put(seg).requires_grad_(), put(torch.zeros(1, 4, 5, dtype=torch.uint8))
    ck.annotation_nll(leaf_seg, cm, labels, pixel_weight=put(weight), backend=backend).loss.backward()
    assert leaf_seg.grad is not None
    assert cm.grad is not None
    assert bool(leaf_seg.grad.isfinite().all())
    assert bool(cm.grad.isfinite().all())
    assert bool((leaf_seg.grad[:, :, 2] == 0).all())


@pytest.mark.skipif("cpu" not in ck.available_backends(), reason="not built")
def test_class_logits_without_a_class_do_not_end_the_process() -> None:
    """The operator itself, which the door does not guard: it divided by their number."""
    with pytest.raises(RuntimeError, match="at least one class"):
        torch.ops.coarse_kernels.label_map(torch.empty(1, 0, 4, 4), [4, 4])
