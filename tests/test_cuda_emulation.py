"""What is special to the CUDA kernels, shown by the emulator; what they share with every backend is in test_operator_*."""

from __future__ import annotations

import ctypes
import dataclasses
import shutil
from typing import Any

import pytest
import torch

from coarse_kernels import backends
from coarse_kernels.backends import one_by_one
from tests import cuda_emulation
from tests.cuda_emulation import build
from tests.helpers import check, make_problem, run_python
from tests.test_objective_differential import Kind, evaluate, make

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

# Trusted kinds: labels in registers and in memory, the transition, each class grid, cells of one thread, a few, and several
# warps, tiles that share cells, volumes; label maps.
ORDER_TRUSTED = """
import hashlib, torch
import coarse_kernels as ck
from tests import cuda_emulation
cuda_emulation.register()
from tests.test_objective_differential import Kind, evaluate, make
one, learned, many = (Kind(),), (Kind(), Kind("random", 2)), (Kind("uniform", 3), Kind(layers=2))
cases = [
    (5, (9, 31), one, None), (5, (9, 31), learned, None), (3, (9, 31), many, None), (5, (20, 27), one, (5, 7)),
    (3, (20, 27), learned, (5, 7)), (3, (20, 27), many, (1, 1)), (2, (100, 150), one, (2, 3)), (2, (40, 44), one, (19, 21)),
    (3, (5, 9, 18), learned, (2, 3, 5)), (19, (16, 33), one, (4, 9)),
]
for classes, size, kinds, grid in cases:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        objective = make(classes, size, kinds, grid).to(dtype)
        result = evaluate(objective, "cuda-emulated", None, "one_pass", None)
        tensors = [*result.losses.values(), *result.gradients.values()]
        tensors.append(ck.label_map(objective.seg, size, backend="cuda-emulated"))
        digest = hashlib.sha256(b"".join(t.double().numpy().tobytes() for t in tensors))
        print(digest.hexdigest()[:16])
"""


@pytest.mark.parametrize(("code", "results"), [(ORDER, 36), (ORDER_TRUSTED, 30)], ids=["matrix", "trusted"])
def test_the_order_of_threads_changes_no_bit(code: str, results: int) -> None:
    """A race shows as a result that depends on which thread came first."""
    forward = run_python(code)
    reverse = run_python(code, COARSE_EMULATION_ORDER="reverse")
    assert forward.returncode == 0, forward.stderr
    assert len(forward.stdout.split()) == results
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


def trusted_call(seg_grid: tuple[int, int] | None, layers: int, dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    """Of the operator `trusted`: T = I with weights, and a learned transition."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    kinds = (Kind(layers=layers, class_weight=True, pixel_weight=True), Kind("random", layers))
    objective = make(3, (9, 21), kinds, seg_grid, label_dtype=torch.int64).to(dtype)
    absent = torch.empty(0, dtype=wide)

    def each(name: str) -> list[torch.Tensor]:
        return [absent if kind[name] is None else kind[name].to(wide) for kind in objective.kinds]

    labels = [kind["labels"] for kind in objective.kinds]
    lists = (
        labels,
        each("transition"),
        each("class_weight"),
        each("pixel_weight"),
        [torch.tensor(0.5, dtype=wide), absent],
    )
    return objective.seg, *lists, [1.0, 0.7], 255, False, 1 | 4 << 2


@pytest.mark.parametrize("layers", [1, 3], ids=["registers", "memory"])
@pytest.mark.parametrize("seg_grid", [None, (3, 5)], ids=["pixel", "strided"])
@pytest.mark.parametrize("bad", [-1, 3, 77, 2**40, -(2**62)])
def test_a_trusted_label_out_of_range_is_no_label_and_no_address(
    bad: int, seg_grid: tuple[int, int] | None, layers: int
) -> None:
    seg, labels, *others = trusted_call(seg_grid, layers)
    for each in labels:
        each.view(-1)[::7] = bad
    right = [torch.where(each == bad, 255, each) for each in labels]
    run = operators().trusted  # type: ignore[attr-defined]
    results = [torch.utils._pytree.tree_leaves(run(seg, which, *others)) for which in (labels, right)]
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)
    assert results[0][0].isfinite()
    per_pixel = [[torch.empty(0)] * 2, [1.0, 1.0], 255, True, 0]
    maps = [run(seg, which, *others[:3], *per_pixel)[1] for which in (labels, right)]
    for got, expected, wrong in zip(*maps, labels, strict=True):
        assert torch.equal(got, expected)
        assert not got[wrong == bad].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seg_grid", [None, (3, 5)], ids=["pixel", "strided"])
def test_opcheck_trusted(seg_grid: tuple[int, int] | None, dtype: torch.dtype) -> None:
    overload = operators().trusted.default  # type: ignore[attr-defined]
    call = trusted_call(seg_grid, 2, dtype)
    absent = torch.empty(0, dtype=call[2][1].dtype)
    for sample in (call, (*call[:-1], 0), (*call[:5], [absent] * 2, [1.0, 1.0], 255, True, 0)):
        result = torch.library.opcheck(overload, sample, test_utils=["test_schema", "test_faketensor"])
        assert set(result.values()) == {"SUCCESS"}, result


def test_of_trusted_kinds_alone_nothing_is_interpolated_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    def interpolate(*args: Any) -> None:
        raise AssertionError("class logits on the grid of the image")

    monkeypatch.setattr(one_by_one, "interpolate", interpolate)
    evaluate(make(3, (9, 21), (Kind(), Kind("random", 2)), (3, 5)), cuda_emulation.NAME, None, "one_pass", None)
    with pytest.raises(AssertionError, match="the grid of the image"):
        evaluate(make(3, (9, 21), (Kind(), Kind(grid=(2, 3))), (3, 5)), cuda_emulation.NAME, None, "one_pass", None)


def test_the_gradient_of_kinds_without_layers_is_zero() -> None:
    for seg_grid in (None, (3, 5)):
        seg, labels, *others = trusted_call(seg_grid, 1)
        others[2] = [others[2][0][:, :0], others[2][1]]
        out = operators().trusted(seg, [each[:, :0] for each in labels], *others)  # type: ignore[attr-defined]
        assert not any(t.any() for t in torch.utils._pytree.tree_leaves(out))
        assert out[2].shape == seg.shape


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
