"""What is special to the CUDA kernels, shown by the emulator; what they share with every backend is in test_operator_*."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from typing import Any

import pytest
import torch

from coarse_kernels import backends
from coarse_kernels.backends.operator import Arguments, differentiable, present
from tests import cuda_emulation
from tests.cuda_emulation import build
from tests.helpers import check, make_problem, run_python
from tests.test_objective_differential import Kind, evaluate, make

pytestmark = pytest.mark.kernels
if cuda_emulation.NAME not in backends._REGISTRY:
    pytest.skip("make test-kernels: it takes COARSE_TEST_EMULATION=1", allow_module_level=True)
REASON = backends.explain("cpu")[cuda_emulation.NAME]


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

# Several kinds. Trusted: labels in registers and in memory, the transition, each class grid, cells of one thread, a few, and
# several warps, tiles that share cells, volumes; label maps. With matrices, beside class logits on each grid: cells, pixels,
# pieces; posteriors.
ORDER_KINDS = """
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
    (5, (20, 70), (Kind(grid=(5, 9)), Kind("fixed", 2, grid=(2, 1), cm_batch=1), Kind()), (10, 18)),
    (3, (40, 30), (Kind(grid=(2, 1)), Kind("uniform", 2, grid=None)), (1, 1)),
    (3, (9, 31), (Kind("random", 2, grid=(4, 30)), Kind(layers=2, grid=None)), (9, 15)),
    (3, (4, 6, 7), (Kind(grid=(2, 3, 7)), Kind("random")), (2, 2, 2)),
]
for classes, size, kinds, grid in cases:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        objective = make(classes, size, kinds, grid).to(dtype)
        result = evaluate(objective, "cuda-emulated", None, "one_pass", None)
        tensors = [*result.losses.values(), *result.gradients.values()]
        tensors.append(ck.label_map(objective.seg, size, backend="cuda-emulated"))
        seg, drawings, _ = objective.drawings(None)
        tensors.append(ck.annotation_posterior(seg.detach(), drawings, backend="cuda-emulated").detach())
        digest = hashlib.sha256(b"".join(t.double().numpy().tobytes() for t in tensors))
        print(digest.hexdigest()[:16])
"""


@pytest.mark.parametrize(("code", "results"), [(ORDER, 36), (ORDER_KINDS, 42)], ids=["matrix", "kinds"])
def test_the_order_of_threads_changes_no_bit(code: str, results: int) -> None:
    """A race shows as a result that depends on which thread came first."""
    forward = run_python(code)
    reverse = run_python(code, COARSE_EMULATION_ORDER="reverse")
    assert forward.returncode == 0, forward.stderr
    assert len(forward.stdout.split()) == results
    assert reverse.stdout == forward.stdout, reverse.stderr


def call_of(
    kinds: tuple[Kind, ...], seg_grid: tuple[int, int] | None, dtype: torch.dtype = torch.float32, classes: int = 3
) -> Arguments:
    """Of the operator, as it is called under everything that looks at labels first; every gradient is wanted."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    objective = make(classes, (9, 21), kinds, seg_grid, label_dtype=torch.int64).to(dtype)
    absent = torch.empty(0, dtype=wide)

    def each(name: str) -> list[torch.Tensor]:
        return [absent if kind[name] is None else kind[name].to(wide) for kind in objective.kinds]

    fields = [absent if kind["cm"] is None else kind["cm"] for kind in objective.kinds]
    scale = [torch.tensor(0.5, dtype=wide), *[absent] * (len(kinds) - 1)]
    call = Arguments(
        objective.seg, [kind["labels"] for kind in objective.kinds], fields, each("transition"), each("class_weight"),
        each("pixel_weight"), scale, [1.0, *[0.7] * (len(kinds) - 1)], [0.3 * present(field) for field in fields],
        255, False, 0,
    )  # fmt: skip
    return call._replace(wanted=sum(bit for bit, _ in differentiable(call)))


def run(call: Arguments) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(operators().annotation_objective(*call))  # type: ignore[attr-defined]


def weighted(*others: Kind, **what: Any) -> tuple[Kind, ...]:
    return (Kind(class_weight=True, pixel_weight=True, **what), *others)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("seg_grid", [None, (3, 5)], ids=["pixel", "strided"])
@pytest.mark.parametrize(
    ("classes", "kinds"),
    [
        (3, lambda layers: weighted(Kind("random", layers), layers=layers)),
        (3, lambda layers: weighted(Kind("uniform", layers, grid=(9, 21)), layers=layers, grid=(3, 5))),
        (4, lambda layers: weighted(Kind("random", layers, grid=(3, 5)), layers=layers, grid=(9, 21))),
    ],
    ids=["trusted", "fast", "general"],
)
@pytest.mark.parametrize("bad", [-1, 77, 2**40, -(2**62)])
def test_a_label_out_of_range_is_no_label_and_no_address(
    bad: int, classes: int, kinds: Any, seg_grid: tuple[int, int] | None, layers: int
) -> None:
    """On CUDA nobody looks at labels first, for that would wait for the device."""
    call = call_of(kinds(layers), seg_grid, classes=classes)
    for each in call.labels:
        each.view(-1)[::7] = bad
    right = call._replace(labels=[torch.where(each == bad, 255, each) for each in call.labels])
    maps = [c._replace(scale=[torch.empty(0)] * 2, weight=[1.0, 1.0], per_pixel=True, wanted=0) for c in (call, right)]
    for pair in ((call, right), maps):
        for got, expected in zip(*map(run, pair), strict=True):
            assert torch.equal(got, expected)
    assert run(call)[0].isfinite()
    for got, labels in zip(operators().annotation_objective(*maps[0])[1], call.labels, strict=True):  # type: ignore[attr-defined]
        assert not got[labels == bad].any()
    posterior = operators().objective_posterior  # type: ignore[attr-defined]
    assert torch.equal(*(posterior(*c[:4], 255) for c in (call, right)))
    single = [[t[:1] for t in c[1:4]] for c in (call, right)]  # of one layer with a matrix: the kernels of the loss
    single = [[[labels[0][:, :1].contiguous()], *rest] for labels, *rest in single]
    assert torch.equal(*(posterior(call.seg_logits, *lists, 255) for lists in single))
    count = operators().labelled_weight  # type: ignore[attr-defined]
    weights = call.class_weight[0], call.pixel_weight[0]
    assert torch.equal(*(count(c.labels[0], *weights, classes, 255) for c in (call, right)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("seg_grid", [None, (3, 5)], ids=["pixel", "strided"])
def test_opcheck_several_kinds(seg_grid: tuple[int, int] | None, dtype: torch.dtype) -> None:
    overload = operators().annotation_objective.default  # type: ignore[attr-defined]
    kinds = weighted(Kind("random", 2), Kind("uniform", grid=(3, 5)), Kind("random", 2, grid=(9, 21)), layers=2)
    call = call_of(kinds, seg_grid, dtype)
    absent = [torch.empty(0, dtype=call.scale[0].dtype)] * 4
    maps = call._replace(scale=absent, weight=[1.0] * 4, per_pixel=True, wanted=0)
    for sample in (call, call._replace(wanted=0), maps):
        result = torch.library.opcheck(overload, tuple(sample), test_utils=["test_schema", "test_faketensor"])
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize(
    ("classes", "kinds"),
    [
        (19, (Kind("uniform", 2, grid=(8, 16)), Kind(grid=(4, 4)), Kind())),  # fused on a grid of cells
        (22, (Kind(grid=(8, 16)), Kind())),  # piece by piece
    ],
    ids=["cells", "pieces"],
)
def test_class_logits_on_their_own_grid_never_take_the_size_of_the_image(classes: int, kinds: tuple[Kind, ...]) -> None:
    size = (64, 128)
    objective = make(classes, size, kinds, (16, 32), batch=1)
    with torch.profiler.profile(profile_memory=True) as profile:
        evaluate(objective, cuda_emulation.NAME, None, "one_pass", None)
    taken = [event.self_cpu_memory_usage for event in profile.events() if event.name.startswith("aten::empty")]
    assert len(taken) > 5
    floats = max(taken) // 4
    assert 4 * cuda_sum_rows() <= floats < 0.75 * classes * size[0] * size[1], floats


def cuda_sum_rows() -> int:
    """What every kind has for sums, and more than anything else of so small an image."""
    found = re.search(r"kSumRows = (\d+)", (build.CSRC / "cuda" / "launch.h").read_text())
    assert found is not None
    return int(found[1])


def test_the_gradient_of_kinds_without_layers_is_zero() -> None:
    for seg_grid in (None, (3, 5)):
        for dtype in (torch.float32, torch.bfloat16):
            call = call_of((Kind("random"), Kind(grid=(3, 5)), Kind("random", grid=(9, 21))), seg_grid, dtype)
            out = run(call._replace(labels=[each[:, :0] for each in call.labels]))
            assert not any(t.any() for t in out)
            assert sorted(t.shape for t in out if t.dim() > 1) == sorted(t.shape for _, t in differentiable(call))


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
