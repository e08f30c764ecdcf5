"""Several kinds of drawings, trusted ones among them, on this device: tests/test_objective_differential.py, collected here a
second time with this module's DEVICE (conftest.py); and what only a device can get wrong about them.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import Drawings
from tests import test_objective_differential
from tests.gpu.device import needs_cuda, needs_memory, require
from tests.helpers import SCHEDULES, generator, gradient_error, leaf, loss_error, put
from tests.test_objective_differential import Kind, make

DEVICE = require()

pytestmark = pytest.mark.usefixtures("poison")

globals().update({name: test for name, test in vars(test_objective_differential).items() if name.startswith("test_")})

KINDS = (Kind("positive"), Kind("uniform", 2, class_weight=True, pixel_weight=True))
GRID = pytest.mark.parametrize("grid", [None, (9, 17), (1, 1)], ids=["pixel", "strided", "one-point"])
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)


@needs_cuda
@pytest.mark.fused
@SCHEDULE
@GRID
def test_trusted_kinds_in_a_cuda_graph(backend: str, grid: tuple[int, int] | None, schedule: str) -> None:
    """Captured once, forward, backward and label map; replayed on other logits and labels. Capture refuses what waits."""
    first, *others = (make(5, (36, 68), KINDS, grid, seed=seed) for seed in range(3))
    seg, drawings, _ = first.drawings(None)

    def once() -> tuple[Tensor, Tensor]:
        seg.grad = None
        with ck.use_schedule(schedule):
            loss = ck.annotation_objective(seg, drawings, backend=backend).loss
            loss.backward()
        return loss.detach(), ck.label_map(seg.detach(), (36, 68), backend=backend)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    seg.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, labels = once()
    for other in (*others, first):
        with torch.no_grad():
            seg.copy_(other.seg)
            for mine, kind in zip(drawings, other.kinds, strict=True):
                mine.labels.copy_(kind["labels"])
                for name in ("class_weight", "pixel_weight"):
                    if kind[name] is not None:
                        getattr(mine, name).copy_(kind[name])
        graph.replay()
        torch.cuda.synchronize()
        wide, wide_drawings, _ = other.drawings(torch.float64)
        expected = ck.annotation_objective(wide, wide_drawings, backend="reference").loss
        expected.backward()
        assert loss_error(loss, expected) < 1e-6
        assert seg.grad is not None
        assert wide.grad is not None
        assert gradient_error(seg.grad, wide.grad) < 2e-6
        truth = ck.label_map(wide.detach(), (36, 68), backend="reference")
        assert (labels.cpu() != truth).double().mean() < 2e-3


@needs_cuda
@pytest.mark.fused
@SCHEDULE
@GRID
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_host_never_waits_for_trusted_kinds(
    backend: str, reduction: str, grid: tuple[int, int] | None, schedule: str
) -> None:
    objective = make(5, (36, 68), (*KINDS, Kind("random")), grid)
    seg, drawings, leaves = objective.drawings(None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with ck.use_schedule(schedule):
            out = ck.annotation_objective(seg, drawings, reduction=reduction, backend=backend)
            (out.loss.sum() * 3.0).backward()
        ck.label_map(seg.detach(), (36, 68), backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for gradient in (tensor.grad for tensor in leaves.values()):
        assert gradient is not None
        assert gradient.isfinite().all()


@needs_cuda
@pytest.mark.fused
def test_cross_entropy_after_upsampling_forms_no_logits_at_the_pixels(backend: str) -> None:
    """Class logits of 19 planes on the grid of the image are 318 MB; a pixel may cost a few numbers, and no more."""
    needs_memory(6.0)
    if backend != "cuda":
        pytest.skip("what the compiled kernels promise")
    size, classes = (2048, 2048), 19
    seg = leaf(put(torch.randn(1, classes, 512, 512, generator=generator(0))))
    assert seg is not None
    labels = put(torch.randint(0, classes, (1, *size), generator=generator(1)).to(torch.uint8))

    def step() -> None:
        seg.grad = None
        ck.annotation_objective(seg, [Drawings(labels)], backend=backend).loss.backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2 * seg.nbytes + 16 * labels.numel() + (32 << 20), f"{peak / 1e6:.0f} MB"


@needs_cuda
@pytest.mark.fused
def test_class_logits_of_more_than_two_to_the_31_elements(backend: str) -> None:
    """Offsets are 64 bits wide: the last image's loss and gradient are those of the image alone."""
    needs_memory(40.0)
    if backend != "cuda":
        pytest.skip("what the compiled kernels promise")
    classes, size = 150, (2048, 2048)
    seg = torch.zeros(4, classes, *size, dtype=torch.bfloat16, device=DEVICE)  # 2.5e9
    seg[-1].normal_()
    labels = torch.full((4, *size), 255, dtype=torch.uint8, device=DEVICE)
    labels[-1] = torch.randint(0, classes, size, dtype=torch.uint8, device=DEVICE)
    results = []
    for image in (slice(0, 4), slice(3, 4)):
        own = seg[image].detach().requires_grad_()
        loss = ck.annotation_objective(own, [Drawings(labels[image])], backend=backend).loss
        loss.backward()
        assert own.grad is not None
        results.append((loss.detach(), own.grad[-1].clone(), ck.label_map(seg[image], size, backend=backend)[-1]))
        if image.start == 0:
            assert not own.grad[:-1].any()
        del own, loss
    (loss, *many), (own_loss, *alone) = results
    assert loss_error(loss, own_loss) < 1e-6  # the images before it share the blocks, and so the order of the sum
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(many, alone, strict=True))
