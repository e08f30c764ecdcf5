"""Sizes beyond what the other tests have (`make test-large`): more than 2^31 elements, a million images, 256 classes. Minutes,
and up to 14 GB; a test for which memory lacks is skipped and says so. Not collected by `make test`.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import Drawings
from tests.contract import GRADIENT_APART, gradient_floor
from tests.helpers import check, evaluate, generator, gradient_error, make_problem, on_threads, oracle

pytestmark = pytest.mark.skipif("cpu" not in ck.available_backends(), reason="not built")
BEYOND = 2**31


def needs(gigabytes: float) -> None:
    """Skips where so much memory is not free."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        pytest.skip("no way to see how much memory is free")
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable"))
    free = int(line.split()[1]) / 2**20
    if free < gigabytes:
        pytest.skip(f"needs {gigabytes:g} GB of free memory, {free:.1f} are there")


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    yield
    gc.collect()
    ck.empty_pool()


def filled(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Random numbers that come again after 1,000,003: a period that no stride has."""
    block = (2 * torch.randn(1_000_003, generator=generator(seed))).to(dtype)
    tensor = torch.empty(math.prod(shape), dtype=dtype)
    for first in range(0, tensor.numel(), len(block)):
        part = tensor[first : first + len(block)]
        part.copy_(block[: len(part)])
    return tensor.view(shape)


def labels_of(*shape: int, classes: int) -> Tensor:
    block = torch.randint(0, classes, (999_983,), dtype=torch.uint8, generator=generator(1))
    block[torch.rand(block.shape, generator=generator(2)) < 0.3] = 255
    count = math.prod(shape)
    return block.repeat(count // len(block) + 1)[:count].view(shape)


def close(ours: Tensor, alone: Tensor) -> bool:
    return float((ours.float() - alone.float()).norm()) <= gradient_floor(ours.dtype) * float(alone.float().norm())


def test_a_field_of_more_than_2_to_the_31_elements() -> None:
    """In bands of rows, each a problem of its own: they are independent, and each is far below 2^31."""
    needs(14)
    height, width, classes = 2048, 2912, 19
    seg = filled(1, classes, height, width).requires_grad_()
    cm = filled(1, classes, classes, height, width, seed=1)
    assert cm.numel() > BEYOND
    cm.requires_grad_()
    labels = labels_of(1, height, width, classes=classes)
    out = ck.annotation_nll(seg, cm, labels, trace_weight=0.1, reduction="sum", backend="cpu")
    out.loss.backward()
    assert seg.grad is not None
    assert cm.grad is not None
    total, count = 0.0, 0.0
    for first in range(0, height, 256):
        rows = slice(first, first + 256)
        parts = [t.detach()[..., rows, :].contiguous().requires_grad_() for t in (seg, cm)]
        own = ck.annotation_nll(*parts, labels[:, rows], trace_weight=0.1, reduction="sum", backend="cpu")
        own.loss.backward()
        total, count = total + own.loss.item(), count + own.count.item()
        for whole, part in zip((seg, cm), parts, strict=True):
            assert part.grad is not None
            assert close(whole.grad[..., rows, :], part.grad), first  # type: ignore[index]
    assert out.loss.item() == pytest.approx(total, rel=1e-6)
    assert out.count.item() == count


def test_class_logits_of_more_than_2_to_the_31_elements() -> None:
    needs(14)
    images, classes, size = 9, 256, (1024, 1024)
    seg = filled(images, classes, *size)
    assert seg.numel() > BEYOND
    seg.requires_grad_()
    labels = labels_of(images, *size, classes=255)
    out = ck.annotation_objective(seg, [Drawings(labels)], reduction="sum", backend="cpu")
    out.loss.backward()
    names = ck.label_map(seg.detach(), size, backend="cpu")
    assert seg.grad is not None
    total = 0.0
    for image in range(images):
        own = seg.detach()[image : image + 1].requires_grad_()
        loss = ck.annotation_objective(own, [Drawings(labels[image : image + 1])], reduction="sum", backend="cpu").loss
        (gradient,) = torch.autograd.grad(loss, own)
        total += loss.item()
        assert torch.equal(seg.grad[image], gradient[0]), image
        assert torch.equal(names[image], ck.label_map(own, size, backend="cpu")[0]), image
    assert out.loss.item() == pytest.approx(total, rel=1e-6)


def test_an_image_of_more_than_2_to_the_31_pixels() -> None:
    """Class logits of one point, so that all is known: so many pixels of each label at -log p."""
    needs(6)
    height = width = 46_342
    assert height * width > BEYOND
    seg = torch.tensor([0.3, -0.9]).view(1, 2, 1, 1).requires_grad_()
    labels = labels_of(1, height, width, classes=2)
    # in bands: a sum of truth values makes int64 of all of them first
    counts = sum(torch.bincount(band.flatten(), minlength=256)[:2].double() for band in labels.split(1024, dim=1))
    assert isinstance(counts, Tensor)
    out = ck.annotation_objective(seg, [Drawings(labels)], backend="cpu", reduction="sum")
    out.loss.backward()
    log_p = seg.detach().double().flatten().log_softmax(0)
    assert out.loss.item() == pytest.approx(float(-(counts * log_p).sum()), rel=1e-6)
    assert out.parts[0].count.item() == pytest.approx(float(counts.sum()), rel=1e-6)
    assert seg.grad is not None
    wanted = counts.sum() * log_p.exp() - counts
    # a float32 sum of 67 million pixels a task; seen: 3e-4
    assert gradient_error(seg.grad.flatten(), wanted) < 1e-3


@pytest.mark.parametrize("cm_batch", [pytest.param(1_000_000, id="each its matrix"), pytest.param(1, id="one for all")])
def test_a_million_images_of_one_pixel(cm_batch: int) -> None:
    needs(6)
    check(make_problem(3, (1, 1), batch=1_000_000, cm_batch=cm_batch, stream="random", trace_weight=0.1), "cpu")


def test_a_million_images_of_one_pixel_are_an_image_of_a_million() -> None:
    needs(2)
    seg = torch.randn(1_000_000, 3, 1, 1, generator=generator(0)).requires_grad_()
    labels = labels_of(1_000_000, 1, 1, classes=3)
    flat = seg.detach().movedim(0, -1).reshape(1, 3, 1000, 1000).clone().requires_grad_()
    losses = [
        ck.annotation_objective(own, [Drawings(shaped)], reduction="sum", backend="cpu").loss
        for own, shaped in ((seg, labels), (flat, labels.view(1, 1000, 1000)))
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
    (one,), (other,) = (torch.autograd.grad(loss, own) for loss, own in zip(losses, (seg, flat), strict=True))
    assert gradient_error(one.movedim(0, -1).reshape(other.shape), other) < GRADIENT_APART


@pytest.mark.parametrize("column", [False, True], ids=["row", "column"])
def test_an_image_of_one_row_or_one_column(column: bool) -> None:
    """Four million pixels in a line, matrices and class logits coarser: as near to float64 as F.interpolate in float32."""
    needs(6)

    def line(length: int) -> tuple[int, int]:
        return (length, 1) if column else (1, length)

    check(make_problem(2, line(4_000_003), line(500_003), batch=1, seg_grid=line(1_000_001)), "cpu")


def test_256_classes_with_a_matrix_at_every_pixel() -> None:
    """Two rows of it against float64."""
    needs(5)
    problem = make_problem(256, (64, 64), batch=1, trace_weight=0.1, reduction="sum", stream="random")
    ours = evaluate(problem, "cpu")
    assert problem.cm is not None
    part = make_problem(256, (2, 3), batch=1, trace_weight=0.1, reduction="sum")
    rows, columns = slice(62, 64), slice(61, 64)
    part = type(part)(
        problem.seg[..., rows, columns].contiguous(),
        problem.cm[..., rows, columns].contiguous(),
        problem.labels[..., rows, columns].contiguous(),
        problem.transition,
        {"trace_weight": 0.1, "reduction": "sum"},
    )
    truth = oracle(part)
    for name in ("seg", "cm"):
        assert gradient_error(ours.gradients[name][..., rows, columns], truth.gradients[name]) < GRADIENT_APART


@pytest.mark.parametrize("grid", [None, (64, 128), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.parametrize("cm_batch", [1, 2])
def test_any_number_of_threads_gives_the_same_bits(cm_batch: int, grid: tuple[int, int] | None) -> None:
    needs(4)
    size = (256, 512)
    problem = make_problem(
        11, size, grid, batch=2, cm_batch=cm_batch, seg_grid=(64, 128), stream="random", trace_weight=0.1
    )
    first, *others = on_threads((1, 2, 3, 5, 8, 13), lambda: evaluate(problem, "cpu"))
    for other in others:
        assert torch.equal(first.loss, other.loss)
        for name, gradient in first.gradients.items():
            assert torch.equal(gradient, other.gradients[name]), name
