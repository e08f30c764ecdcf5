"""torch.library and torch.compile: opcheck, no graph break, the numbers of eager."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import native
from coarse_kernels.backends import operator
from coarse_kernels.backends.operator import Arguments
from tests.contract import GRADIENT_APART, LOSS_APART
from tests.helpers import (
    Problem,
    device,
    generator,
    gradient_error,
    leaf,
    loss_error,
    make_problem,
    operators_of,
    oracle,
    put,
)

pytestmark = pytest.mark.skipif(native.OPERATORS is None, reason="not built")

GRIDS = {"pixel": None, "strided": (2, 3), "one-point": (1, 1)}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- opcheck ----------------------------------------------------------------------------------------------------------


def operator_samples() -> dict[str, Arguments]:
    """One kind on every grid; several kinds of everything; the edges."""
    samples: dict[str, Arguments] = {}
    gen = generator(0)

    def calls(seg: Tensor | None, *kinds: tuple[Problem, str], name: str, layers: int = 1) -> None:
        """``kinds``: whose labels and transition, and what else: (m)atrix, class (w)eight, (p)ixel weight, (s)cale."""
        assert seg is not None
        dtype = torch.float64 if seg.dtype == torch.float64 else torch.float32
        absent = torch.empty(0, dtype=dtype)
        call = Arguments(
            seg_logits=seg,
            labels=[of.labels.unsqueeze(1).repeat_interleave(layers, 1) for of, _ in kinds],
            cm_logits=[absent if "m" not in parts else leaf(of.cm) for of, parts in kinds],  # type: ignore[misc]
            transition=[absent if of.transition is None else leaf(of.transition) for of, _ in kinds],  # type: ignore[misc]
            class_weight=[torch.rand(3, generator=gen).to(dtype) if "w" in parts else absent for _, parts in kinds],
            pixel_weight=[
                torch.rand(2, layers, 4, 9, generator=gen).to(dtype) if "p" in parts else absent for _, parts in kinds
            ],
            scale=[torch.tensor(0.5, dtype=dtype) if "s" in parts else absent for _, parts in kinds],
            weight=[1.0 + kind for kind in range(len(kinds))],
            trace_weight=[0.1] * len(kinds),
            ignore_index=255,
            per_pixel=False,
            wanted=0,
        )
        samples[name] = call
        samples[f"{name}-map"] = call._replace(per_pixel=True, scale=[absent] * len(kinds), weight=[1.0] * len(kinds))
        samples[f"{name}-wanted"] = call._replace(
            wanted=sum(bit for bit, t in operator.differentiable(call) if t.requires_grad)
        )

    for name, grid in GRIDS.items():
        for stream in ("positive", "random"):
            problem = make_problem(3, (4, 9), grid, cm_batch=1 if name == "strided" else None, stream=stream)
            calls(leaf(problem.seg), (problem, "mwps" if stream == "random" else "m"), name=f"{name}-{stream}")
    positive, random = make_problem(3, (4, 9), (2, 3)), make_problem(3, (4, 9), cm_batch=1, stream="random", seed=1)
    coarse = make_problem(3, (4, 9), seg_grid=(2, 5))
    calls(leaf(positive.seg), (positive, "m"), (random, "ms"), (positive, "w"), (random, "p"), name="kinds")
    calls(leaf(coarse.seg), (positive, "m"), (random, "mp"), (positive, ""), name="kinds-layers-coarse", layers=3)
    calls(leaf(positive.seg), (positive, ""), name="trusted")
    calls(leaf(positive.seg, False), (random, "m"), name="constant-logits")
    wide = make_problem(3, (4, 9), stream="random").to(torch.float64)
    calls(leaf(wide.seg), (dataclasses.replace(wide, labels=wide.labels.long()), "mwp"), name="float64")
    for dtype in (torch.bfloat16, torch.float16):
        half = make_problem(3, (4, 9)).to(dtype)
        calls(leaf(half.seg), (half, "m"), (positive, ""), name=str(dtype))
    volume = make_problem(2, (2, 3, 4), (1, 2, 2))
    calls(leaf(volume.seg), (volume, "m"), name="rank-3")
    return samples


SAMPLES = operator_samples()
# opcheck traces each: a third in `make test`, all of them in two commands
CHECKED = [
    pytest.param(sample, id=name, marks=[pytest.mark.slow] if k % 3 else [])
    for k, (name, sample) in enumerate(SAMPLES.items())
]


def test_the_operators_have_the_schemas_that_every_namespace_shares() -> None:
    """Of Triton, and of the compiled modules."""
    for text in (*operator.SCHEMAS, operator.SCALE):
        name = text[: text.index("(")]
        compiled = getattr(torch.ops.coarse_kernels, name).default._schema
        expected = torch._C.parse_schema(f"coarse_kernels::{text}")
        assert str(compiled) == str(expected)


def on_device(sample: Arguments) -> Arguments:
    """Tensors where the test wants them; leaves stay leaves."""
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: leaf(put(t), t.requires_grad), sample)


@pytest.mark.sampled(14)
@pytest.mark.fused
@pytest.mark.parametrize("sample", CHECKED)
def test_opcheck_annotation_objective(backend: str, sample: Arguments) -> None:
    overload = operators_of(backend).annotation_objective.default
    checks = ["test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic"]
    result = torch.library.opcheck(overload, tuple(on_device(sample)), test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.sampled(15)
@pytest.mark.fused
@pytest.mark.parametrize("sample", CHECKED)
def test_opcheck_objective_posterior(backend: str, sample: Arguments) -> None:
    """Of the very drawings of the objective."""
    arguments = torch.utils._pytree.tree_map_only(Tensor, Tensor.detach, (*on_device(sample)[:4], 255))
    result = torch.library.opcheck(operators_of(backend).objective_posterior.default, arguments)
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.sampled(12)
@pytest.mark.fused
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize(("grid", "size"), [((4, 9), [4, 9]), ((2, 5), [4, 9]), ((3,), [7]), ((1, 2, 3), [2, 2, 4])])
def test_opcheck_label_map(
    backend: str, dtype: torch.dtype, classes: int, grid: tuple[int, ...], size: list[int]
) -> None:
    logits = put(torch.randn(2, classes, *grid, generator=generator(0)).to(dtype))
    result = torch.library.opcheck(operators_of(backend).label_map.default, (logits, size))
    assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.fused
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_opcheck_labelled_weight(backend: str, dtype: torch.dtype) -> None:
    overload = operators_of(backend).labelled_weight.default
    labels = put(torch.tensor([[0, 1, 255, 2]]).to(dtype))
    weights = put(torch.rand(3)), put(torch.rand(1, 4))
    for class_weight, pixel_weight in ((None, None), (weights[0], None), weights, tuple(w.double() for w in weights)):
        sample = (labels, class_weight, pixel_weight, 3, 255)
        result = torch.library.opcheck(overload, sample)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_opcheck_find_bad_label(dtype: torch.dtype) -> None:
    labels = torch.tensor([[0, 1, 255, 2]]).to(dtype)
    result = torch.library.opcheck(torch.ops.coarse_kernels.find_bad_label.default, (labels, 3, 255))
    assert set(result.values()) == {"SUCCESS"}, result


def test_find_bad_label_finds_the_first() -> None:
    find = torch.ops.coarse_kernels.find_bad_label
    for dtype in (torch.uint8, torch.int64):
        for size in (1, 7, 64, 1000):
            labels = torch.zeros(size, dtype=dtype)
            assert find(labels, 2, 255).tolist() == [0, 0]
            for at in {0, size // 2, size - 1}:
                labels.zero_()
                labels[at:] = 255
                labels[at] = 9
                assert find(labels, 2, 255).tolist() == [1, 9]
                assert find(labels, 10, 255).tolist() == [0, 0]
                assert find(labels, 2, 9).tolist() == ([0, 0] if at == size - 1 else [1, 255])


# --- torch.compile ----------------------------------------------------------------------------------------------------


def assert_compiled_as_eager(
    use: Callable[..., Tensor], *inputs: Tensor | None, backend: str, dynamic: bool | None = None
) -> None:
    """Loss and gradients of ``use`` compiled without a break, against eager."""
    compiled = torch.compile(use, fullgraph=True, backend=backend, dynamic=dynamic)
    found: list[tuple[Tensor, list[Tensor | None]]] = []
    for call in (use, compiled):
        leaves = [leaf(t) if t is not None and t.is_floating_point() else t for t in inputs]
        loss = call(*leaves)
        loss.sum().backward()
        found.append((loss.detach(), [t.grad for t in leaves if t is not None and t.is_floating_point()]))
    assert loss_error(found[1][0], found[0][0]) < LOSS_APART
    for ours, eager in zip(found[1][1], found[0][1], strict=True):
        assert (ours is None) == (eager is None)
        if ours is not None and eager is not None:
            assert gradient_error(ours, eager) < GRADIENT_APART


@pytest.mark.sampled(6)
@pytest.mark.every
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("stream", ["positive", "random"])
@pytest.mark.parametrize("grid", [None, (2, 3)], ids=["pixel", "strided"])
def test_annotation_nll(grid: tuple[int, int] | None, stream: str, reduction: str, backend: str) -> None:
    if backend == "reference" and (stream == "random") == (reduction == "none"):
        pytest.skip("it is traced operator by operator, a second each: four of the eight will do")
    problem = make_problem(3, (4, 9), grid, stream=stream)
    weight = put(torch.rand(3, generator=generator(0)))

    def use(seg: Tensor, cm: Tensor, labels: Tensor, transition: Tensor | None) -> Tensor:
        return ck.annotation_nll(
            seg, cm, labels, transition, trace_weight=0.1, class_weight=weight, reduction=reduction, backend=backend
        ).loss

    assert_compiled_as_eager(use, problem.seg, problem.cm, problem.labels, problem.transition, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("grid", [None, (2, 3)], ids=["pixel", "strided"])
def test_coarse_label_loss_with_the_default_compiler(grid: tuple[int, int] | None) -> None:
    positive, negative = make_problem(3, (4, 9), grid), make_problem(3, (4, 9), (1, 1), seed=1)

    def use(seg: Tensor, cm: Tensor, labels: Tensor, other: Tensor, negative_labels: Tensor) -> Tensor:
        return ck.coarse_label_loss(seg * 2, cm, labels, other, negative_labels, negative_weight=0.3).loss * 3

    assert_compiled_as_eager(
        use, positive.seg, positive.cm, positive.labels, negative.cm, negative.labels, backend="inductor"
    )


def test_seg_logits_on_a_coarser_grid_and_a_trusted_source() -> None:
    problem = make_problem(3, (4, 9), (2, 3), seg_grid=(2, 5))

    def use(seg: Tensor, cm: Tensor, labels: Tensor) -> Tensor:
        return ck.coarse_label_loss(seg, None, labels, cm, labels).loss

    assert_compiled_as_eager(use, problem.seg, problem.cm, problem.labels, backend="aot_eager")


@pytest.mark.slow
@pytest.mark.every
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("seg_grid", [None, (2, 5)], ids=["pixel", "strided"])
def test_an_objective_of_several_kinds_in_layers(
    seg_grid: tuple[int, int] | None, reduction: str, backend: str
) -> None:
    if backend == "reference" and (seg_grid is None) == (reduction == "none"):
        pytest.skip("it is traced operator by operator, seconds each: two of the four will do")
    first = make_problem(3, (4, 9), (2, 3), seg_grid=seg_grid, stream="random")
    other = make_problem(3, (4, 9), (1, 1), seed=1)
    layers = torch.stack([first.labels, other.labels], 1)

    def use(seg: Tensor, cm: Tensor, field: Tensor, transition: Tensor | None, labels: Tensor, two: Tensor) -> Tensor:
        kinds = [
            ck.Drawings(two, cm, transition, trace_weight=0.1),
            ck.Drawings(labels, field, weight=0.5),
            ck.Drawings(two, transition=transition, weight=0.3),
        ]
        found = ck.annotation_objective(seg, kinds, reduction=reduction, backend=backend)
        return found.loss.sum() + 0.7 * found.parts[1].loss.sum()  # a part alone, too

    tensors = first.seg, first.cm, other.cm, first.transition, first.labels, layers
    assert_compiled_as_eager(use, *tensors, backend="aot_eager")


def test_modules() -> None:
    """Criterion with a learned transition, and its gradient through the compiled graph."""
    problem = make_problem(3, (4, 9), (2, 3))
    criterion = ck.CoarseLabelCriterion(ck.TransitionMatrix.learned(3), class_weight=torch.tensor([0.5, 1.0, 2.0]))
    criterion = criterion.to(device())
    (parameter,) = criterion.parameters()
    compiled = torch.compile(criterion, fullgraph=True, backend="aot_eager")
    found: list[tuple[Tensor, Tensor]] = []
    for module in (criterion, compiled):
        parameter.grad = None
        seg, cm = leaf(problem.seg), leaf(problem.cm)
        module(seg, None, problem.labels, cm, problem.labels).loss.backward()
        assert parameter.grad is not None
        assert seg is not None
        assert seg.grad is not None
        found.append((parameter.grad, seg.grad))
    assert gradient_error(found[1][0], found[0][0]) < GRADIENT_APART
    assert gradient_error(found[1][1], found[0][1]) < GRADIENT_APART
    nll = torch.compile(ck.AnnotationNLL(trace_weight=0.1), fullgraph=True, backend="aot_eager")
    out = nll(problem.seg, problem.cm, problem.labels)
    assert loss_error(out.loss, oracle(problem.with_options(trace_weight=0.1)).loss) < LOSS_APART


def test_posterior_and_no_grad() -> None:
    problem = make_problem(3, (4, 9), stream="random")
    arguments = (problem.seg, problem.cm, problem.labels, problem.transition)
    compiled = torch.compile(ck.annotation_posterior, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ck.annotation_posterior(*arguments))
    with torch.no_grad():
        loss = torch.compile(lambda *a: ck.annotation_nll(*a).loss, fullgraph=True, backend="aot_eager")(*arguments)
    assert loss_error(loss, oracle(problem).loss) < LOSS_APART


def test_dynamic_shapes_compile_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend  # seconds, in each process that collects the tests

    counter = CompileCounterWithBackend("aot_eager")

    def use(seg: Tensor, cm: Tensor, labels: Tensor) -> Tensor:
        return ck.annotation_nll(seg, cm, labels, trace_weight=0.1).loss

    compiled = torch.compile(use, fullgraph=True, backend=counter, dynamic=True)
    compilations: list[int] = []  # after each call; torch 2.11 starts over within the first
    # No two lengths of one call are equal: the compiler would take them for the same one.
    for size, grid, batch in (((8, 12), (4, 3), 2), ((10, 21), (3, 6), 4), ((16, 9), (7, 4), 3)):
        problem = make_problem(5, size, grid, batch=batch, trace_weight=0.1)
        seg, cm = leaf(problem.seg), leaf(problem.cm)
        assert seg is not None
        assert cm is not None
        compiled(seg, cm, problem.labels).backward()
        compilations.append(counter.frame_count)
        truth = oracle(problem)
        assert seg.grad is not None
        assert cm.grad is not None
        assert gradient_error(seg.grad, truth.gradients["seg"]) < GRADIENT_APART
        assert gradient_error(cm.grad, truth.gradients["cm"]) < GRADIENT_APART
    assert compilations == [compilations[0]] * 3


def test_the_caller_s_backend_is_honoured_inside_a_compiled_function() -> None:
    problem = make_problem(3, (4, 9), stream="random")

    def use(*arguments: Any) -> Tensor:
        return ck.annotation_nll(*arguments).loss

    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    arguments = (problem.seg, problem.cm, problem.labels, problem.transition)
    names = ck.available_backends(device())
    for name in (*names, names[0]):
        with ck.use_backend(name):
            assert loss_error(compiled(*arguments), oracle(problem).loss) < LOSS_APART
