"""The oracle (reference backend in float64) and how close a backend has to come to it.

Bounds are those of contract.py. Errors are relative: of a loss to max(1, |truth|), of a gradient or a map in the 2-norm.

The same tests run on the CPU and, collected again by tests/gpu, on CUDA tensors. Problems are drawn on the CPU and put on
`device()`, so that they are the same on both; oracle and plain formulation are evaluated on the CPU, so that the device
under test has no part in its own measure.
"""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels.backends import _REGISTRY
from tests.contract import GRADIENT_FACTOR, GRADIENT_FLOOR, LOSS_FACTOR, LOSS_FLOOR, compute_dtype

ROOT = Path(__file__).resolve().parents[1]
SCHEDULES = ("one_pass", "recompute")


# --- the device under test ----------------------------------------------------------------------------------------------

_device = torch.device("cpu")


def device() -> torch.device:
    """Where the running test puts its tensors: ``DEVICE`` of the module that collected it, set by a fixture in conftest."""
    return _device


def use_device(name: torch.device | str) -> None:
    global _device
    _device = torch.device(name)


def put(tensor: Tensor) -> Tensor:
    return tensor.to(_device)


def fused(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """The backends that are tested on a device: all that can run there, without the oracle."""
    return tuple(name for name in ck.available_backends(device) if name != "reference")


FUSED = fused()


# --- problems -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """One stream's arguments; logits and transition are leaves that are cloned for each evaluation."""

    seg: Tensor
    cm: Tensor | None
    labels: Tensor
    transition: Tensor | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    learn_transition: bool = True

    def on(self, device: torch.device | str) -> Problem:
        """Every tensor on ``device``, strides kept."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        tensors = {name: move(getattr(self, name)) for name in ("seg", "cm", "labels", "transition")}
        return dataclasses.replace(self, **tensors, options={key: move(value) for key, value in self.options.items()})

    def to(self, dtype: torch.dtype) -> Problem:
        """Logits in ``dtype``; constants follow where that is float64."""
        constant = torch.float64 if dtype == torch.float64 else torch.float32
        options = {
            key: value.to(constant) if isinstance(value, Tensor) and value.is_floating_point() else value
            for key, value in self.options.items()
        }
        return dataclasses.replace(
            self,
            seg=self.seg.to(dtype),
            cm=None if self.cm is None else self.cm.to(dtype),
            transition=None if self.transition is None else self.transition.to(constant),
            options=options,
        )

    def with_options(self, **options: Any) -> Problem:
        return dataclasses.replace(self, options={**self.options, **options}).on(self.seg.device)


def operators_of(backend: str) -> Any:
    """The namespace of `torch.ops` that a fused backend calls."""
    return getattr(torch.ops, _REGISTRY[backend].namespace)  # type: ignore[attr-defined]


def leaf(tensor: Tensor | None, wanted: bool = True) -> Tensor | None:
    """A copy with the same strides that wants a gradient."""
    if tensor is None:
        return None
    return tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_(wanted)


@dataclass
class Result:
    loss: Tensor
    nll: Tensor
    trace: Tensor
    count: Tensor
    gradients: dict[str, Tensor]


def evaluate(
    problem: Problem, backend: str, schedule: str = "one_pass", grad_output: Tensor | float | None = None
) -> Result:
    """Forward and backward through the public function."""
    seg, cm = leaf(problem.seg), leaf(problem.cm)
    assert seg is not None
    transition = leaf(problem.transition, problem.learn_transition)
    before = [None if t is None else t.detach().clone() for t in (seg, cm, problem.labels, transition)]
    with ck.use_schedule(schedule):
        out = ck.annotation_nll(seg, cm, problem.labels, transition, backend=backend, **problem.options)
        weight = torch.ones_like(out.loss) if grad_output is None else torch.as_tensor(grad_output).to(out.loss)
        out.loss.backward(weight.expand_as(out.loss))
    for was, now in zip(before, (seg, cm, problem.labels, transition), strict=True):
        if was is not None:
            assert now is not None
            assert torch.equal(was.nan_to_num(7.0), now.detach().nan_to_num(7.0)), "an input was written to"
    gradients = {
        name: tensor.grad
        for name, tensor in (("seg", seg), ("cm", cm), ("transition", transition))
        if tensor is not None and tensor.grad is not None
    }
    return Result(out.loss.detach(), out.nll, out.trace, out.count, gradients)


def oracle(problem: Problem, grad_output: Tensor | float | None = None) -> Result:
    """On the CPU, wherever the problem is."""
    return evaluate(problem.on("cpu").to(torch.float64), "reference", grad_output=grad_output)


def loss_error(ours: Tensor, truth: Tensor) -> float:
    """Relative to max(1, |truth|), a map in the 2-norm; what is infinite or NaN has to be so in both."""
    ours, truth = ours.detach().cpu().double(), truth.detach().cpu().double()
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    finite = truth.isfinite()
    if not torch.equal(ours.nan_to_num(1e300, 2e300, 3e300)[~finite], truth.nan_to_num(1e300, 2e300, 3e300)[~finite]):
        return math.inf
    ours, truth = ours[finite], truth[finite]
    error = float((ours - truth).norm()) / max(1.0, float(truth.norm()))
    return math.inf if math.isnan(error) else error


def gradient_error(ours: Tensor, truth: Tensor) -> float:
    """2-norm of the difference over that of the truth; a truth of zeros has to be met exactly."""
    ours, truth = ours.detach().cpu().double(), truth.detach().cpu().double()
    assert ours.shape == truth.shape, (ours.shape, truth.shape)
    difference, size = float((ours - truth).norm()), float(truth.norm())
    if math.isnan(difference):
        return math.inf
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf


def check(
    problem: Problem,
    backend: str,
    schedule: str = "one_pass",
    grad_output: Tensor | float | None = None,
    *,
    loss_floor: float | None = None,
    gradient_floor: float | None = None,
) -> Result:
    """Hold one evaluation against the oracle, with the error of the plain formulation as the measure."""
    dtype = problem.seg.dtype
    loss_floor = LOSS_FLOOR[dtype] if loss_floor is None else loss_floor
    gradient_floor = GRADIENT_FLOOR[dtype] if gradient_floor is None else gradient_floor
    truth = oracle(problem, grad_output)
    plain = evaluate(problem.on("cpu"), "reference", grad_output=grad_output)
    ours = evaluate(problem, backend, schedule, grad_output)
    expected = compute_dtype(dtype)
    for name in ("loss", "nll", "trace", "count"):
        got, want, usual = (getattr(result, name) for result in (ours, truth, plain))
        assert got.dtype == expected, f"{name}: {got.dtype}"
        assert not got.requires_grad
        bound = LOSS_FACTOR * loss_error(usual, want) + loss_floor
        assert loss_error(got, want) <= bound, f"{name}: {loss_error(got, want):.2e} > {bound:.2e}: {got} for {want}"
    assert ours.gradients.keys() == truth.gradients.keys()
    for name, got in ours.gradients.items():
        leaf_dtype = getattr(problem, name).dtype
        assert got.dtype == leaf_dtype, f"gradient of {name}: {got.dtype}"
        floor = GRADIENT_FLOOR[expected] if name == "transition" else gradient_floor
        floor = max(floor, gradient_floor) if gradient_floor > GRADIENT_FLOOR[dtype] else floor
        bound = GRADIENT_FACTOR * gradient_error(plain.gradients[name], truth.gradients[name]) + floor
        error = gradient_error(got, truth.gradients[name])
        assert error <= bound, f"gradient of {name}: {error:.2e} > {bound:.2e}"
    return ours


def on_threads(counts: Sequence[int], run: Callable[[], Any]) -> list[Any]:
    """What ``run`` gives on each number of threads."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in counts:
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    return found


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_transition(classes: int, gen: torch.Generator) -> Tensor:
    """Zero diagonal, rows that sum to 1."""
    matrix = torch.rand(classes, classes, generator=gen) + 0.05
    matrix.fill_diagonal_(0.0)
    return matrix / matrix.sum(1, keepdim=True)


def make_problem(
    classes: int,
    size: tuple[int, ...],
    grid: tuple[int, ...] | None = None,
    *,
    batch: int = 2,
    cm_batch: int | None = None,
    seg_grid: tuple[int, ...] | None = None,
    stream: str = "positive",
    ignored: str = "some",
    ignore_index: int = 255,
    label_dtype: torch.dtype = torch.uint8,
    scale: float = 3.0,
    seed: int = 0,
    learn_transition: bool = True,
    **options: Any,
) -> Problem:
    """Random logits at ``scale``; ``stream`` positive, uniform or random; ``ignored`` none, some, image or all.

    On `device`, whatever that is in the running test.
    """
    gen = generator(seed)
    seg = scale * torch.randn(batch, classes, *(seg_grid or size), generator=gen)
    cm = scale * torch.randn(batch if cm_batch is None else cm_batch, classes, classes, *(grid or size), generator=gen)
    labels = torch.randint(0, classes, (batch, *size), generator=gen)
    if ignored == "some":
        # in runs, as drawings are: whole vectors without a label beside others with a few
        draw = torch.rand(labels.shape, generator=gen)
        labels[draw < 0.3] = ignore_index
        labels.view(batch, -1)[:, : labels[0].numel() // 4] = ignore_index
    elif ignored == "image":
        labels[0] = ignore_index
    elif ignored == "all":
        labels.fill_(ignore_index)
    transition = None
    if stream == "uniform":
        transition = ck.uniform_transition(classes)
    elif stream == "random":
        transition = random_transition(classes, gen)
    options = {"ignore_index": ignore_index, **options}
    return Problem(seg, cm, labels.to(label_dtype), transition, options, learn_transition).on(device())


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``code`` in a fresh interpreter that sees this repository."""
    return run_here("-c", code, **{"PYTHONPATH": str(ROOT), **environment})


def run_here(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """This Python in the repository's folder, without a terminal that setup.py could write to."""
    import os

    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        start_new_session=True,
    )
