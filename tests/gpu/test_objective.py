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
from tests.contract import LOSS_APART
from tests.gpu.device import needs_cuda, needs_memory, require
from tests.helpers import SCHEDULES, generator, leaf, loss_error, put
from tests.test_objective_differential import Kind, Result, hold, make

DEVICE = require()

pytestmark = pytest.mark.usefixtures("poison")

globals().update({name: test for name, test in vars(test_objective_differential).items() if name.startswith("test_")})

TRUSTED = (Kind("positive"), Kind("uniform", 2, class_weight=True, pixel_weight=True))
# on a grid of cells, on the pixels, expanded piece by piece, and trusted
MATRICES = (Kind(grid=(9, 17)), Kind("uniform", 2, grid=None, class_weight=True), Kind(grid=(30, 60)), Kind("uniform"))
KINDS = pytest.mark.parametrize("kinds", [TRUSTED, MATRICES], ids=["trusted", "matrices"])
GRID = pytest.mark.parametrize("grid", [None, (9, 17), (1, 1)], ids=["pixel", "strided", "one-point"])
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)


@needs_cuda
@pytest.mark.fused
@SCHEDULE
@GRID
@KINDS
def test_several_kinds_in_a_cuda_graph(
    backend: str, kinds: tuple[Kind, ...], grid: tuple[int, int] | None, schedule: str
) -> None:
    """Captured once, forward, backward and label map; replayed on other logits and labels. Capture refuses what waits."""
    first, *others = (make(5, (36, 68), kinds, grid, seed=seed) for seed in range(3))
    seg, drawings, leaves = first.drawings(None)

    def once() -> tuple[Tensor, Tensor]:
        for tensor in leaves.values():
            tensor.grad = None
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
    for tensor in leaves.values():
        tensor.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, labels = once()
    for other in (*others, first):
        with torch.no_grad():
            seg.copy_(other.seg)
            for mine, kind in zip(drawings, other.kinds, strict=True):
                mine.labels.copy_(kind["labels"])
                if mine.cm_logits is not None:
                    mine.cm_logits.copy_(kind["cm"])
                for name in ("class_weight", "pixel_weight"):
                    if kind[name] is not None:
                        getattr(mine, name).copy_(kind[name])
        graph.replay()
        torch.cuda.synchronize()
        gradients = {name: tensor.grad for name, tensor in leaves.items() if tensor.grad is not None}
        hold(Result({"loss": loss}, gradients), other)
        wide = other.seg.double()
        truth = ck.label_map(wide, (36, 68), backend="reference")
        assert (labels.cpu() != truth).double().mean() < 2e-3


@needs_cuda
@pytest.mark.fused
@SCHEDULE
@GRID
@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_host_never_waits_for_several_kinds(
    backend: str, reduction: str, kinds: tuple[Kind, ...], grid: tuple[int, int] | None, schedule: str
) -> None:
    objective = make(5, (36, 68), (*kinds, Kind("random")), grid)
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
def test_a_field_and_a_trusted_layer_cost_their_gradients_and_little_more(backend: str) -> None:
    """What is recommended, at 1024 x 2048 and 19 classes: 57 MB of gradients; class logits at the pixels would be 159 MB."""
    if backend != "cuda":
        pytest.skip("what the compiled kernels promise")
    size, classes = (1024, 2048), 19
    seg = leaf(put(torch.randn(1, classes, 256, 512, generator=generator(0))))
    cm = leaf(put(torch.randn(1, classes, classes, 128, 256, generator=generator(1))))
    assert seg is not None
    assert cm is not None
    labels = put(torch.randint(0, classes, (2, 1, *size), generator=generator(2)).to(torch.uint8))
    kinds = [Drawings(labels[0], cm, trace_weight=0.01), Drawings(labels[1], None, put(ck.uniform_transition(classes)))]

    def step() -> None:
        seg.grad = cm.grad = None
        ck.annotation_objective(seg, kinds, backend=backend).loss.backward()

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated() - seg.nbytes - cm.nbytes  # gradients
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < seg.nbytes + cm.nbytes + (48 << 20), f"{peak / 1e6:.0f} MB"


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
    assert loss_error(loss, own_loss) < LOSS_APART  # the images before it share the blocks, and so the order of the sum
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(many, alone, strict=True))
