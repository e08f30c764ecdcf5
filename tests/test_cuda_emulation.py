"""What is special to the CUDA kernels, shown by the emulator; what they share with every backend is in test_operator_*."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil

import pytest
import torch

from coarse_kernels import backends
from tests import cuda_emulation
from tests.cuda_emulation import build
from tests.helpers import check, make_problem, run_python

REASON = backends.explain("cpu").get(cuda_emulation.NAME, "left out by COARSE_TEST_EMULATION=0")
pytestmark = pytest.mark.skipif(REASON is not None and shutil.which("c++") is None, reason=str(REASON))


def operators() -> object:
    return getattr(torch.ops, cuda_emulation.NAMESPACE)


def test_the_kernels_build_for_the_emulator() -> None:
    assert REASON is None, REASON


# Every kernel: fast pixels in vectors and one by one, cells, large cells with copies, pieces, volumes, the transition,
# evidence too small for probabilities.
ORDER = """
import hashlib, torch
from tests import cuda_emulation
from tests.cuda_emulation import build
cuda_emulation.register()
from tests.helpers import evaluate, make_problem
cases = [
    make_problem(2, (6, 32)), make_problem(3, (5, 27), stream="random"), make_problem(19, (6, 32), stream="random"),
    make_problem(5, (20, 27), (5, 7)), make_problem(11, (40, 70), (1, 2), stream="random", learn_transition=False),
    make_problem(5, (16, 70), (2, 1), cm_batch=1, batch=3), make_problem(3, (12, 13), (5, 7), stream="random"),
    make_problem(3, (4, 6, 7), (2, 3, 7)), make_problem(23, (5, 9)), make_problem(5, (6, 32), scale=60.0),
    make_problem(5, (20, 27), (5, 7), scale=60.0), make_problem(5, (6, 32), cm_batch=1, batch=3),
]
for problem in cases:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        result = evaluate(problem.with_options(trace_weight=0.2).to(dtype), "cuda-emulated")
        tensors = [result.loss, result.nll, result.trace, *result.gradients.values()]
        digest = hashlib.sha256(b"".join(t.double().numpy().tobytes() for t in tensors))
        print(digest.hexdigest()[:16])
"""


def test_the_order_of_threads_changes_no_bit() -> None:
    """A race shows as a result that depends on which thread came first."""
    forward = run_python(ORDER)
    reverse = run_python(ORDER, COARSE_EMULATION_ORDER="reverse")
    assert forward.returncode == 0, forward.stderr
    assert len(forward.stdout.split()) == 36
    assert reverse.stdout == forward.stdout, reverse.stderr


@pytest.mark.parametrize("grid", [None, (3, 5)], ids=["pixel", "strided"])
@pytest.mark.parametrize("classes", [3, 4])  # a fast kernel, the general one
@pytest.mark.parametrize("bad", [-1, 77, 2**40, -(2**62)])
def test_a_label_out_of_range_is_no_label_and_no_address(bad: int, classes: int, grid: tuple[int, int] | None) -> None:
    """On CUDA nobody looks at labels first, for that would wait for the device."""
    problem = make_problem(classes, (9, 21), grid, stream="random", label_dtype=torch.int64)
    weights = torch.rand(classes) + 0.5, torch.rand(problem.labels.shape) + 0.5
    wrong = problem.labels.clone()
    wrong.view(-1)[::7] = bad
    right = torch.where(wrong == bad, 255, wrong)
    results = []
    for labels in (wrong, right):
        run = operators().annotation_nll  # type: ignore[attr-defined]
        args = problem.seg, problem.cm, labels, problem.transition, *weights, None, 1.0, 0.3, 255, False, 7
        out = run(*args)
        count = operators().labelled_weight(labels, *weights, classes, 255)  # type: ignore[attr-defined]
        posterior = operators().annotation_posterior(problem.seg, problem.cm, labels, problem.transition, 255)  # type: ignore[attr-defined]
        results.append((*out, count, posterior))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert results[0][0].isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_saved_gradient_is_scaled_where_it_lies(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 5, 7).to(dtype)
    factor = torch.tensor(0.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    scaled, same = gradient.clone(), gradient.clone()
    operators().scale_(scaled, factor)  # type: ignore[attr-defined]
    operators().scale_(same, torch.ones_like(factor))  # type: ignore[attr-defined]
    assert torch.equal(scaled, gradient * 0.5)
    assert torch.equal(same, gradient)


@pytest.mark.parametrize("scale", [60.0, 1e3, 1e4])
@pytest.mark.parametrize(
    ("classes", "grid", "learn"),
    [(3, None, True), (22, None, False), (3, (2, 2), True), (3, (2, 2), False)],
    ids=["learned", "many-classes", "learned-cells", "steep-cells"],
)
def test_the_loss_of_a_negative_drawing_is_as_exact_beside_large_logits(
    classes: int, grid: tuple[int, int] | None, learn: bool, scale: float
) -> None:
    """T is a factor: the logarithm of 1/2, added to a logit of 1e4, keeps three digits."""
    problem = make_problem(classes, (16, 16), grid, batch=1, stream="uniform", ignored="none", learn_transition=learn)
    cm = torch.zeros_like(problem.cm)
    cm[:, :2] = scale * (1 + 0.3 * torch.rand(cm[:, :1].shape, generator=torch.Generator().manual_seed(0)))
    check(dataclasses.replace(problem, cm=cm), cuda_emulation.NAME)


@pytest.mark.parametrize(
    ("classes", "size", "grid", "fits"),
    [
        (19, (1024, 2048), (128, 256), True),
        (21, (1024, 2048), (128, 256), False),  # its registers would spill
        (2, (1, 20_000_000), (1, 1_342_281), False),
        (2, (20_000_000, 1), (1_342_281, 1), False),
    ],
)
def test_every_pixel_of_an_axis_beyond_2_to_the_24_is_written(
    classes: int, size: tuple[int, int], grid: tuple[int, int], fits: bool
) -> None:
    """float32 positions are rounded there, and cells grow wider than `widest` says: their last pixels had no lane. Such
    grids are taken in pieces. (Running one takes the emulator a quarter of an hour.)"""
    library = ctypes.CDLL(str(build.library()))
    ask = library.coarse_strided_fits
    ask.restype, ask.argtypes = ctypes.c_bool, [ctypes.c_int, *[ctypes.c_int64] * 4]
    assert ask(classes, *size, *grid) == fits
