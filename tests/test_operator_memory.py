"""Peak memory over the inputs, measured in a process of its own."""

from __future__ import annotations

import json
import sys

import pytest

from coarse_kernels import native
from tests.helpers import run_python

pytestmark = [
    pytest.mark.skipif(native.OPERATORS is None, reason="not built"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc/self/clear_refs"),
]

# Blocks of 64 KB and more are mapped when they are allocated and unmapped when they are freed: resident is live.
LIVE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_MMAP_MAX_": str(1 << 20), "MALLOC_ARENA_MAX": "1"}
# Workspaces of the threads, label scans, bookkeeping of Python, huge pages that are rounded up.
SLACK = 8 << 20

PEAK = """
import gc, json, torch, coarse_kernels as ck
from pathlib import Path

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return 1024 * int(line.split()[1])

torch.set_num_threads(2)
{inputs}
{step}
step(*inputs(True))
given = inputs(False)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
step(*given)
print(json.dumps({{"peak": status("VmHWM") - before, "gradients": sum(t.nbytes for t in given if t.requires_grad)}}))
"""


def measure_step(inputs: str, step: str) -> dict[str, int]:
    """``inputs(small)`` -> tensors, ``step(*tensors)``: a small one ahead loads code, threads and autograd."""
    done = run_python(PEAK.format(inputs=inputs, step=step), **LIVE)
    if "PermissionError" in done.stderr:
        pytest.skip("the kernel does not let us reset the high-water mark")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def measure(
    size: tuple[int, int], grid: tuple[int, int] | None, train: bool, schedule: str = "one_pass", classes: int = 19
) -> dict[str, int]:
    inputs = f"""
def inputs(small):
    size, grid = ((32, 32), {(4, 4) if grid else None}) if small else ({size}, {grid})
    seg = torch.randn(1, {classes}, *size).requires_grad_()
    cm = torch.randn(1, {classes}, {classes}, *(grid or size)).requires_grad_()
    return seg, cm, torch.randint(0, {classes}, (1, *size), dtype=torch.uint8)
"""
    step = f"""
def step(seg, cm, labels):
    with ck.use_schedule({schedule!r}), torch.set_grad_enabled({train}):
        loss = ck.annotation_nll(seg, cm, labels, trace_weight=0.01).loss
        if {train}:
            loss.backward()
"""
    height, width = grid or size
    pixels = size[0] * size[1]
    found = measure_step(inputs, step)
    return {**found, "seg": 4 * classes * pixels, "cm": 4 * classes**2 * height * width}


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["one_pass", "recompute"])
def test_pixel_grid_costs_its_gradients(schedule: str) -> None:
    found = measure((320, 320), None, True, schedule)
    assert found["cm"] > 140 << 20
    assert found["cm"] <= found["peak"] <= found["cm"] + found["seg"] + SLACK, found


@pytest.mark.slow
def test_no_grad_forward_costs_nothing() -> None:
    assert measure((320, 320), None, False)["peak"] <= SLACK


@pytest.mark.parametrize("schedule", ["one_pass", pytest.param("recompute", marks=pytest.mark.slow)])
def test_strided_grid_never_makes_the_field(schedule: str) -> None:
    """At full resolution the field would be 189 MB, twice that with its gradient."""
    found = measure((256, 512), (32, 64), True, schedule)
    assert found["peak"] <= found["cm"] + found["seg"] + 2 * SLACK, found
    assert found["peak"] < 19 * 19 * 256 * 512 * 4 / 5


@pytest.mark.slow
def test_strided_no_grad_forward_costs_nothing() -> None:
    assert measure((256, 512), (32, 64), False)["peak"] <= SLACK


@pytest.mark.slow
def test_one_matrix_for_the_image_costs_the_class_gradient() -> None:
    found = measure((512, 1024), (1, 1), True)
    assert found["peak"] <= found["seg"] + 2 * SLACK, found


@pytest.mark.slow
def test_class_logits_never_exist_at_full_resolution() -> None:
    """40 MB they would be, and as much their gradient."""
    inputs = """
def inputs(small):
    h, w = (64, 64) if small else (512, 1024)
    seg = torch.randn(1, 19, h // 4, w // 4).requires_grad_()
    cm = torch.randn(1, 19, 19, h // 16, w // 16).requires_grad_()
    return seg, cm, *(torch.randint(0, 19, (1, k, h, w), dtype=torch.uint8) for k in (1, 2))
"""
    step = """
def step(seg, cm, positive, negative):
    kinds = [ck.Drawings(positive, cm), ck.Drawings(negative, transition=ck.uniform_transition(19))]
    ck.annotation_objective(seg, kinds).loss.backward()
    ck.label_map(seg, positive.shape[2:])
"""
    found = measure_step(inputs, step)
    assert found["peak"] <= found["gradients"] + 2 * SLACK, found


@pytest.mark.slow
def test_a_learned_transition_of_many_classes_does_not_cost_a_gradient_for_each_task() -> None:
    """1024 tasks, 184 MB."""
    inputs = """
def inputs(small):
    batch, height = (2, 32) if small else (32, 512)
    transition = torch.full((150, 150), 1 / 150).requires_grad_()
    seg = torch.randn(batch, 150, height // 32, 2).requires_grad_()
    return seg, transition, torch.randint(0, 150, (batch, height, 8), dtype=torch.uint8)
"""
    step = """
def step(seg, transition, labels):
    ck.annotation_nll(seg, None, labels, transition).loss.backward()
"""
    found = measure_step(inputs, step)
    assert found["peak"] <= found["gradients"] + (32 << 20) + SLACK, found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "grid", "batch", "fields"),
    [((1024, 256), (1, 256), 64, 64), ((32, 64, 128), (2, 64, 128), 16, 1)],
    ids=str,
)
def test_seams_between_tasks_do_not_grow_with_the_batch(
    size: tuple[int, ...], grid: tuple[int, ...], batch: int, fields: int
) -> None:
    """134 MB, for fields whose gradients take 4 MB and 256 KB: of a field with few rows every task has a copy."""
    classes = 8 if fields > 1 else 2
    inputs = f"""
def inputs(small):
    batch, fields = (2, 2 if {fields} > 1 else 1) if small else ({batch}, {fields})
    seg = torch.randn(batch, {classes}, *{(2,) * len(size)}).requires_grad_()
    cm = torch.randn(fields, {classes}, {classes}, *{grid}).requires_grad_()
    labels = torch.full((batch, *{size}), 255, dtype=torch.uint8)
    labels[..., ::8, :] = 1
    return seg, cm, labels
"""
    step = """
def step(seg, cm, labels):
    ck.annotation_nll(seg, cm, labels).loss.backward()
"""
    found = measure_step(inputs, step)
    assert found["peak"] <= found["gradients"] + (64 << 20) + 2 * SLACK, found
