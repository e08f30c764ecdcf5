"""What only a device can get wrong: streams, graphs, synchronisation, 64-bit sizes, memory, choice of backend."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import backends as registry
from tests.contract import GRADIENT_APART, LOSS_APART
from tests.gpu.device import CUDA, backends, needs_cuda, needs_memory, require
from tests.helpers import (
    SCHEDULES,
    Problem,
    device,
    evaluate,
    generator,
    gradient_error,
    leaf,
    loss_error,
    make_problem,
    oracle,
    put,
)

DEVICE = require()  # for conftest

GRIDS = {"pixel": None, "strided": (9, 17), "one-point": (1, 1)}
SIZE = (36, 68)

FUSED = pytest.mark.fused
SCHEDULE = pytest.mark.parametrize("schedule", SCHEDULES)
GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def step(problem: Problem, backend: str, schedule: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward and backward without a look at any value (`evaluate` looks)."""
    seg, cm, transition = leaf(problem.seg), leaf(problem.cm), leaf(problem.transition)
    with ck.use_schedule(schedule):
        loss = ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend, **problem.options).loss
        loss.backward()
    named = {"seg": seg, "cm": cm, "transition": transition}
    return loss.detach(), {name: t.grad for name, t in named.items() if t is not None and t.grad is not None}


def hold(found: tuple[Tensor, dict[str, Tensor]], problem: Problem) -> None:
    truth = oracle(problem)
    assert loss_error(found[0], truth.loss) < LOSS_APART
    assert found[1].keys() == truth.gradients.keys()
    for name, grad in found[1].items():
        assert gradient_error(grad, truth.gradients[name]) < GRADIENT_APART, name


# --- which backend ------------------------------------------------------------------------------------------------------


@pytest.fixture
def free_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COARSE_KERNELS_BACKEND", raising=False)
    registry._remember.cache_clear()


def test_a_fused_backend_serves_this_device() -> None:
    """Without one every other test here is skipped, which must not look like success."""
    assert backends(), registry.explain(DEVICE)


def test_the_first_fused_backend_is_chosen(free_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[str] = []
    for name in ck.available_backends(DEVICE):
        monkeypatch.setattr(registry._REGISTRY[name], "nll_sums", _entering(entered, name))
    problem = make_problem(3, (4, 5))
    ck.annotation_nll(problem.seg, problem.cm, problem.labels)
    assert entered == [ck.available_backends(DEVICE)[0]]
    assert entered != ["reference"]


def _entering(entered: list[str], name: str) -> Callable[..., Any]:
    inner = registry._REGISTRY[name].nll_sums

    def call(*args: Any) -> Any:
        entered.append(name)
        return inner(*args)

    return call


def test_an_automatic_choice_falls_back_and_says_so_once(
    free_choice: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(problem: Any) -> str:
        return "not today"

    for name in backends():
        monkeypatch.setattr(registry._REGISTRY[name], "unsupported", refuse)
    problem = make_problem(3, (4, 5))
    with caplog.at_level(logging.WARNING, logger="coarse_kernels"):
        for _ in range(3):
            loss = ck.annotation_nll(problem.seg, problem.cm, problem.labels).loss
    assert loss_error(loss, oracle(problem).loss) < LOSS_APART
    for name in backends():
        said = [record for record in caplog.records if repr(name) in record.message and "not today" in record.message]
        assert len(said) == 1, name
        with pytest.raises(RuntimeError, match="not today"):
            ck.annotation_nll(problem.seg, problem.cm, problem.labels, backend=name)


@needs_cuda
def test_a_cpu_backend_is_refused_for_cuda_tensors() -> None:
    problem = make_problem(3, (4, 5))
    with pytest.raises(RuntimeError, match="cpu"):
        ck.annotation_nll(problem.seg, problem.cm, problem.labels, backend="cpu")


# --- values of labels ---------------------------------------------------------------------------------------------------


@FUSED
@SCHEDULE
@GRID
@pytest.mark.parametrize("stream", ["positive", "random"])
@pytest.mark.parametrize(
    ("dtype", "strangers"), [(torch.uint8, (3, 77, 254)), (torch.int64, (3, -1, -100, 1 << 40, -(1 << 62)))], ids=str
)
@needs_cuda
def test_a_label_out_of_range_is_no_label(
    backend: str,
    schedule: str,
    grid: tuple[int, int] | None,
    stream: str,
    dtype: torch.dtype,
    strangers: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody looks at labels on CUDA: it would wait for the device. One out of range weighs nothing and reads nothing."""
    monkeypatch.delenv("COARSE_KERNELS_DEBUG", raising=False)
    problem = make_problem(3, SIZE, grid, stream=stream, trace_weight=0.1, label_dtype=dtype)
    clean, draw = problem.labels, put(torch.rand(problem.labels.shape, generator=generator(1)))
    strange = clean.clone()
    for turn, stranger in enumerate(strangers):
        strange[(draw > 0.1 * turn) & (draw < 0.1 * turn + 0.03)] = stranger
    clean = torch.where((strange >= 0) & (strange < 3), strange, 255)
    assert int((strange != clean).sum()) > 0
    expected = dataclasses.replace(problem, labels=clean)
    found = evaluate(dataclasses.replace(problem, labels=strange), backend, schedule)
    hold((found.loss, found.gradients), expected)
    assert found.count == (clean != 255).sum()
    arguments = (problem.seg, problem.cm)
    posterior = ck.annotation_posterior(*arguments, strange, problem.transition, backend=backend)
    assert torch.equal(posterior, ck.annotation_posterior(*arguments, clean, problem.transition, backend=backend))


@FUSED
def test_the_debug_switch_looks_at_labels_and_transition(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COARSE_KERNELS_DEBUG", "1")
    problem = make_problem(3, (4, 5), stream="random")
    problem.labels[1, 2, 3] = 77
    with pytest.raises(ValueError, match=r"labels.*77"):
        ck.annotation_nll(problem.seg, problem.cm, problem.labels, backend=backend)
    with pytest.raises(ValueError, match="transition"):
        ck.annotation_nll(problem.seg, problem.cm, problem.labels, -torch.ones(3, 3, device=device()), backend=backend)


# --- determinism, gradcheck ---------------------------------------------------------------------------------------------


@FUSED
@SCHEDULE
@pytest.mark.parametrize(
    ("size", "grid", "cm_batch"),
    [
        ((129, 257), None, 3),
        ((129, 257), None, 1),  # summed over the images
        ((128, 256), (16, 32), 3),
        ((130, 251), (16, 31), 1),
        ((256, 256), (1, 1), 1),  # everything lands in one matrix
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_three_runs_agree_bit_for_bit(
    backend: str, schedule: str, dtype: torch.dtype, size: tuple[int, int], grid: tuple[int, int] | None, cm_batch: int
) -> None:
    """No float atomics: enough pixels that an order of addition left to chance would show."""
    problem = make_problem(5, size, grid, batch=3, cm_batch=cm_batch, stream="random", trace_weight=0.1).to(dtype)
    first, *others = (step(problem, backend, schedule) for _ in range(3))
    for loss, gradients in others:
        assert torch.equal(loss, first[0])
        for name, grad in gradients.items():
            assert torch.equal(grad, first[1][name]), name


@FUSED
@SCHEDULE
@pytest.mark.parametrize("grid", [None, (2, 3), (1, 1)], ids=["pixel", "strided", "one-point"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck_in_float64(backend: str, schedule: str, grid: tuple[int, int] | None, reduction: str) -> None:
    problem = make_problem(3, (4, 6), grid, batch=1, stream="random", scale=1.0).to(torch.float64)

    def use(seg: Tensor, cm: Tensor, transition: Tensor) -> Tensor:
        transition = transition / transition.sum(1, keepdim=True)  # finite differences keep rows that sum to 1
        return ck.annotation_nll(
            seg, cm, problem.labels, transition, trace_weight=0.1, reduction=reduction, backend=backend
        ).loss

    assert problem.transition is not None
    transition = problem.transition + 0.1  # so that no entry becomes negative on the way
    with ck.use_schedule(schedule):
        assert torch.autograd.gradcheck(use, (leaf(problem.seg), leaf(problem.cm), leaf(transition)))


# --- streams, graphs, synchronisation -----------------------------------------------------------------------------------


def sleep(milliseconds: float) -> None:
    torch.cuda._sleep(int(milliseconds * 2e6))  # cycles; clocks are below 2 GHz, so it takes at least that long


@needs_cuda
@FUSED
@SCHEDULE
@GRID
def test_everything_runs_on_the_caller_s_stream(backend: str, schedule: str, grid: tuple[int, int] | None) -> None:
    """pytorch/audio #118. The inputs are NaN until the side stream, after a while, has filled them in: a kernel on any other
    stream reads the NaN. Meanwhile the default stream is busy: one that waited for it would finish after it.
    """
    problem = make_problem(3, SIZE, grid, stream="random", trace_weight=0.1)
    assert problem.cm is not None
    real = problem.seg.clone(), problem.cm.clone()
    late = dataclasses.replace(problem, seg=torch.full_like(real[0], torch.nan), cm=torch.full_like(real[1], torch.nan))
    assert late.cm is not None
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(late, backend, schedule)  # code is loaded and memory is there: neither may wait later
        torch.cuda.synchronize()
        late.seg.fill_(torch.nan)
        late.cm.fill_(torch.nan)
    torch.cuda.synchronize()
    sleep(500.0)
    default_done = torch.cuda.Event()
    default_done.record()
    with torch.cuda.stream(side):
        sleep(20.0)
        late.seg.copy_(real[0])
        late.cm.copy_(real[1])
        found = step(late, backend, schedule)
        side_done = torch.cuda.Event()
        side_done.record()
    side_done.synchronize()
    assert not default_done.query(), "it waited for the default stream"
    torch.cuda.synchronize()
    hold(found, problem)


@needs_cuda
@FUSED
def test_a_normalizer_on_the_host_does_not_wait_for_the_device(backend: str) -> None:
    """Copied from pageable memory it did, and ended a capture."""
    problem = make_problem(3, SIZE)
    given = {"normalizer": torch.tensor(7.0), "backend": backend}
    expected = ck.annotation_nll(problem.seg, problem.cm, problem.labels, **given).loss
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = ck.annotation_nll(problem.seg, problem.cm, problem.labels, **given).loss
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(loss, expected)


@needs_cuda
@FUSED
@SCHEDULE
@GRID
@pytest.mark.parametrize("objective", [False, True], ids=["annotation_nll", "coarse_label_loss"])
def test_cuda_graph(backend: str, schedule: str, grid: tuple[int, int] | None, objective: bool) -> None:
    """Captured once, forward and backward; replayed on other inputs, labels among them."""
    first, *others = (make_problem(3, SIZE, grid, seed=seed) for seed in range(3))
    seg, cm, labels = leaf(first.seg), leaf(first.cm), first.labels.clone()
    assert seg is not None
    assert cm is not None

    def use(seg: Tensor, cm: Tensor, labels: Tensor, name: str) -> Tensor:
        if objective:
            out = ck.coarse_label_loss(seg, cm, labels, cm, labels, negative_weight=0.5, trace_weight=0.1, backend=name)
        else:
            out = ck.annotation_nll(seg, cm, labels, trace_weight=0.1, backend=name)  # type: ignore[assignment]
        return out.loss

    def once() -> Tensor:
        seg.grad = cm.grad = None
        with ck.use_schedule(schedule):
            loss = use(seg, cm, labels, backend)
            loss.backward()
        return loss.detach()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            once()
    torch.cuda.current_stream().wait_stream(side)
    seg.grad = cm.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = once()
    for other in (*others, first):
        assert other.cm is not None
        with torch.no_grad():
            seg.copy_(other.seg)
            cm.copy_(other.cm)
            labels.copy_(other.labels)
        graph.replay()
        torch.cuda.synchronize()
        truth = other.on("cpu").to(torch.float64)
        seg_, cm_ = leaf(truth.seg), leaf(truth.cm)
        assert seg_ is not None
        assert cm_ is not None
        expected = use(seg_, cm_, truth.labels, "reference")
        expected.backward()
        assert loss_error(loss, expected) < LOSS_APART
        for ours, wide in ((seg.grad, seg_.grad), (cm.grad, cm_.grad)):
            assert ours is not None
            assert wide is not None
            assert gradient_error(ours, wide) < GRADIENT_APART


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


@needs_cuda
@FUSED
@SCHEDULE
@GRID
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_host_never_waits(
    backend: str, schedule: str, grid: tuple[int, int] | None, reduction: str, request: pytest.FixtureRequest
) -> None:
    """Liger-Kernel PR#1292. Only waits that PyTorch knows of are seen; test_everything_runs_on_... would show the others."""
    weights = {"class_weight": torch.rand(3), "pixel_weight": torch.rand(2, *SIZE)}
    problem = make_problem(3, SIZE, grid, stream="random", trace_weight=0.1, reduction=reduction, **weights)
    if reduction == "mean":
        problem = problem.with_options(normalizer=torch.tensor(12.0))
    seg, cm, transition = leaf(problem.seg), leaf(problem.cm), leaf(problem.transition)
    negative = make_problem(3, SIZE, grid, seed=1)
    other = leaf(negative.cm)
    torch.cuda.synchronize()
    request.getfixturevalue("no_synchronisation")
    with pytest.raises(RuntimeError, match="synchroniz"):  # that waiting is seen at all
        seg.sum().item()
    with ck.use_schedule(schedule):
        out = ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend, **problem.options)
        out.loss.sum().backward()
        both = ck.coarse_label_loss(
            seg, cm, problem.labels, other, negative.labels, reduction=reduction, backend=backend
        )
        (both.loss.sum() * 3.0).backward()
        ck.annotation_posterior(problem.seg, problem.cm, problem.labels, backend=backend)
        with torch.no_grad():
            ck.annotation_nll(problem.seg, problem.cm, problem.labels, normalizer=7.0, backend=backend)
    torch.cuda.set_sync_debug_mode("default")
    for gradient in (seg.grad, cm.grad, transition.grad, other.grad):
        assert gradient is not None
        assert gradient.isfinite().all()


@needs_cuda
@FUSED
@SCHEDULE
@GRID
def test_a_device_that_is_not_the_current_one(backend: str, schedule: str, grid: tuple[int, int] | None) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two devices, there is {torch.cuda.device_count()}")
    problem = make_problem(3, SIZE, grid, stream="random", trace_weight=0.1).on("cuda:1")
    assert torch.cuda.current_device() == 0
    loss, gradients = step(problem, backend, schedule)
    assert torch.cuda.current_device() == 0
    assert {loss.device.index, *(grad.device.index for grad in gradients.values())} == {1}
    hold((loss, gradients), problem)


# --- size and memory ----------------------------------------------------------------------------------------------------


@needs_cuda
@FUSED
@SCHEDULE
def test_a_field_of_more_than_two_to_the_31_elements(backend: str, schedule: str) -> None:
    """Liger-Kernel #803, #1248, #1483: offsets in 32 bits. 3.03e9 elements; both ends of it against the reference."""
    batch, classes, side = 8, 19, 1024
    needs_memory(24.0)  # field, its gradient, and that times what arrives from above
    gen = torch.Generator(device=DEVICE).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        made = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
        return made.normal_(0.0, 3.0, generator=gen).requires_grad_()

    seg, cm = normal(batch, classes, side, side), normal(batch, classes, classes, side, side)
    assert cm.numel() > 1 << 31
    labels = torch.randint(0, classes, (batch, side, side), generator=gen, device=DEVICE).to(torch.uint8)
    labels[torch.rand(labels.shape, generator=gen, device=DEVICE) < 0.2] = 255
    transition = ck.uniform_transition(classes, device=DEVICE)
    with ck.use_schedule(schedule):
        out = ck.annotation_nll(seg, cm, labels, transition, trace_weight=0.1, backend=backend)
        out.loss.backward()
    assert seg.grad is not None
    assert cm.grad is not None
    count = int((labels != 255).sum())
    assert out.count == count
    with torch.no_grad():
        pixels = ck.annotation_nll(
            seg, cm, labels, transition, trace_weight=0.1, reduction="none", backend=backend
        ).loss
    assert float((pixels.double().sum() / count - out.loss).abs()) < 1e-5 * float(out.loss)
    for image in (0, batch // 2, batch - 1):
        for rows, columns in ((slice(0, 16), slice(0, 40)), (slice(side - 16, side), slice(side - 40, side))):
            at = (slice(image, image + 1), ..., rows, columns)
            crop = Problem(
                seg.detach()[at], cm.detach()[at], labels[at], transition, {"trace_weight": 0.1, "normalizer": count}
            )
            truth = oracle(dataclasses.replace(crop, learn_transition=False))
            assert gradient_error(seg.grad[at], truth.gradients["seg"]) < 1e-2  # stored in bfloat16
            assert gradient_error(cm.grad[at], truth.gradients["cm"]) < 1e-2
            # A gradient of 1e-7 in bfloat16 hides little, a loss in float32 nothing.
            truth = oracle(crop.with_options(normalizer=None, reduction="none"))
            assert loss_error(pixels[at], truth.loss) < LOSS_APART


def peak_extra(work: Callable[[], Any], leaves: Sequence[Tensor]) -> int:
    """Bytes beyond what is there before, gradients of the leaves included."""
    work()  # workspaces that stay, code that is loaded
    for tensor in leaves:
        tensor.grad = None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


SLACK = 32 << 20  # bytes: label scans, partial sums of the loss, rounding of blocks


@needs_cuda
@FUSED
@SCHEDULE
@pytest.mark.parametrize("train", [True, False], ids=["train", "no_grad"])
@pytest.mark.parametrize("stride", [1, 8])
def test_peak_memory(backend: str, schedule: str, stride: int, train: bool) -> None:
    """At stride 8 the field at full resolution would be 757 MB, its grid is 12: nothing of H x W x C x C may exist.

    A gradient that is multiplied by what arrives from above, which nobody can look at without waiting, exists twice for a
    moment; hence a factor of 2 where it is formed in forward.
    """
    needs_memory(6.0)
    classes, size = 19, (512, 1024)
    grid = (size[0] // stride, size[1] // stride)
    problem = make_problem(classes, size, grid, batch=1, trace_weight=0.1)
    seg, cm = leaf(problem.seg), leaf(problem.cm)
    assert seg is not None
    assert cm is not None

    def work() -> Tensor:
        with ck.use_schedule(schedule), torch.set_grad_enabled(train):
            loss = ck.annotation_nll(seg, cm, problem.labels, trace_weight=0.1, backend=backend).loss
            if train:
                loss.backward()
        return loss

    peak = peak_extra(work, (seg, cm))
    gradients = (seg.nbytes + cm.nbytes) * train
    # On a grid also what each cell adds to its corners, before it is gathered: four shares of the field's own size.
    partial = 4 * cm.nbytes * train * (stride > 1)
    copies = 2 if schedule == "one_pass" else 1
    assert gradients <= peak <= copies * gradients + partial + SLACK, f"{peak / 1e6:.1f} MB"
    if stride > 1:
        assert peak < classes**2 * size[0] * size[1] * 4 / 3


@pytest.mark.skipif(CUDA, reason="the rehearsal's own check")
def test_the_rehearsal_runs_the_fused_cpu_backend() -> None:
    assert backends() == ("cpu",)
