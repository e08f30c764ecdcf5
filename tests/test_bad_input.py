"""Bad input: the error names the argument, what came and what was expected, and nothing was computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

import coarse_kernels as ck
from coarse_kernels import backends

B, C, H, W = 2, 3, 4, 5


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every way into a backend is watched; tests that expect an error end with the list empty."""
    entered: list[str] = []
    for backend in backends._REGISTRY.values():
        for name in ("labelled_weight", "nll_sums", "nll_maps", "posterior", "label_map"):
            monkeypatch.setattr(backend, name, lambda *a, _name=name, **k: entered.append(_name), raising=True)
    yield entered
    assert entered == []


def good() -> dict[str, Any]:
    return {
        "seg_logits": torch.zeros(B, C, H, W),
        "cm_logits": torch.zeros(B, C, C, H, W),
        "labels": torch.zeros(B, H, W, dtype=torch.uint8),
        "transition": ck.uniform_transition(C),
    }


def matrix(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows)


class Mask(torch.Tensor):
    """As torchvision's, fastai's and MONAI's: a tensor with a name for what is in it."""


NAN, INF = torch.nan, torch.inf
# argument, what is given, exception, what the message has to contain besides the argument's name
CASES: list[tuple[str, Any, type[Exception], list[str]]] = [
    # ranks
    ("seg_logits", torch.zeros(C, H), ValueError, ["(B, C, *S)", "2 dimensions"]),
    ("seg_logits", torch.zeros(1, C, 2, 2, 2, 2), ValueError, ["1, 2 or 3 spatial", "6 dimensions"]),
    ("labels", torch.zeros(B, W, dtype=torch.uint8), ValueError, ["(B, *S)", "(2, 5)"]),
    ("labels", torch.zeros(B, 1, 1, H, W, dtype=torch.uint8), ValueError, ["(B, *S)", "(2, 1, 1, 4, 5)"]),
    ("cm_logits", torch.zeros(B, C, C, W), ValueError, ["(B or 1, C, C, *G)", "(2, 3, 3, 5)"]),
    # channels
    ("seg_logits", torch.zeros(B, 1, H, W), ValueError, ["C >= 2", "(2, 1, 4, 5)"]),
    ("cm_logits", torch.zeros(B, C * C - 1, H, W), ValueError, ["C*C", "C = 3", "(2, 8, 4, 5)"]),
    ("cm_logits", torch.zeros(B, C, C + 1, H, W), ValueError, ["C = 3", "(2, 3, 4, 4, 5)"]),
    ("cm_logits", torch.zeros(B, C, H, W), ValueError, ["C*C", "(2, 3, 4, 5)"]),
    # batches
    ("labels", torch.zeros(B + 1, H, W, dtype=torch.uint8), ValueError, ["B = 2", "(3, 4, 5)"]),
    ("cm_logits", torch.zeros(B + 1, C, C, H, W), ValueError, ["B = 2", "batch 3"]),
    # grids
    ("cm_logits", torch.zeros(B, C, C, H + 1, W), ValueError, ["(5, 5)", "larger than the image", "(4, 5)"]),
    ("cm_logits", torch.zeros(B, C, C, 0, W), ValueError, ["at least 1", "(0, 5)"]),
    ("seg_logits", torch.zeros(B, C, H, W + 1), ValueError, ["(4, 6)", "larger than the image", "(4, 5)"]),
    # types
    ("seg_logits", [[0.0]], TypeError, ["torch.Tensor", "list"]),
    ("seg_logits", torch.zeros(B, C, H, W, dtype=torch.int64), TypeError, ["float32", "torch.int64"]),
    ("seg_logits", torch.zeros(B, C, H, W, dtype=torch.complex64), TypeError, ["float32", "torch.complex64"]),
    ("cm_logits", "identity", TypeError, ["torch.Tensor", "str"]),
    ("cm_logits", torch.zeros(B, C, C, H, W, dtype=torch.uint8), TypeError, ["float32", "torch.uint8"]),
    ("labels", None, TypeError, ["torch.Tensor", "NoneType"]),
    ("labels", torch.zeros(B, H, W), TypeError, ["integer", "torch.float32"]),
    ("labels", torch.zeros(B, H, W, dtype=torch.bool), TypeError, ["integer", "torch.bool"]),
    ("seg_logits", torch.zeros(B, C, H, W).to_sparse(), TypeError, ["dense", "torch.sparse_coo"]),
    ("cm_logits", torch.zeros(B, C, C, H, W).to_sparse(), TypeError, ["dense", "torch.sparse_coo"]),
    ("labels", torch.zeros(B, H, W, dtype=torch.uint8).to_sparse(), TypeError, ["dense", "torch.sparse_coo"]),
    ("transition", ck.uniform_transition(C).to_sparse(), TypeError, ["dense", "torch.sparse_coo"]),
    # label values
    ("labels", torch.full((B, H, W), C, dtype=torch.uint8), ValueError, ["[0, 3)", "255", "got 3"]),
    ("labels", torch.full((B, H, W), 254, dtype=torch.uint8), ValueError, ["[0, 3)", "got 254"]),
    ("labels", torch.full((B, H, W), -1), ValueError, ["[0, 3)", "got -1"]),
    ("labels", torch.full((B, H, W), -1, dtype=torch.int8), ValueError, ["[0, 3)", "got -1"]),
    ("labels", torch.full((B, H, W), 1 << 40), ValueError, ["[0, 3)", str(1 << 40)]),
    ("labels", torch.full((B, H, W), 255 + (1 << 32)), ValueError, ["[0, 3)", str(255 + (1 << 32))]),
    ("labels", torch.full((B, H, W), 7, dtype=torch.int32), ValueError, ["[0, 3)", "got 7"]),
    ("labels", torch.full((B, H, W), 77).as_subclass(Mask), ValueError, ["[0, 3)", "got 77"]),
    ("labels", torch.full((B, H, W), -1).as_subclass(Mask), ValueError, ["[0, 3)", "got -1"]),
    # transition
    ("transition", torch.zeros(C, C + 1), ValueError, ["(3, 3)", "(3, 4)"]),
    ("transition", torch.zeros(C), ValueError, ["(3, 3)", "(3,)"]),
    ("transition", torch.zeros(C, C, dtype=torch.int64), TypeError, ["float32", "torch.int64"]),
    ("transition", matrix([0, 1, 0], [1, 0, 0], [-0.5, 1.5, 0]), ValueError, [">= 0", "-0.5"]),
    ("transition", matrix([0, 1, 0], [1, 0, 0], [NAN, 1, 0]), ValueError, ["finite", "nan"]),
    ("transition", matrix([0, 1, 0], [1, 0, 0], [INF, 1, 0]), ValueError, ["finite", "inf"]),
    ("transition", matrix([0.0, 40, 60], [90, 0, 10], [14, 14, 0]), ValueError, ["sum to 1", "[100.0, 100.0, 28.0]"]),
    ("transition", 100 * ck.uniform_transition(C), ValueError, ["sum to 1", "[100.0, 100.0, 100.0]"]),
    ("transition", matrix([0, 0.9, 0.5], [0.4, 0, 0.5], [0.6, 0.1, 0]), ValueError, ["sum to 1", "[1.4, 0.9, 0.7]"]),
    ("transition", 1.05 * ck.uniform_transition(C, dtype=torch.bfloat16), ValueError, ["sum to 1", "1.0"]),
    ("transition", (2 * ck.uniform_transition(C)).as_subclass(Mask), ValueError, ["sum to 1", "[2.0, 2.0, 2.0]"]),
    ("transition", "uniform", TypeError, ["torch.Tensor", "str"]),
    # weights
    ("class_weight", torch.ones(C + 1), ValueError, ["(3,)", "(4,)"]),
    ("class_weight", torch.ones(1, C), ValueError, ["(3,)", "(1, 3)"]),
    ("class_weight", [1.0, 1.0, 1.0], TypeError, ["torch.Tensor", "list"]),
    ("class_weight", torch.ones(C, dtype=torch.int64), TypeError, ["float32", "torch.int64"]),
    ("class_weight", torch.ones(C, requires_grad=True), ValueError, ["constant", "requires grad", "detach"]),
    ("pixel_weight", torch.ones(B, 1, H, W), ValueError, ["(2, 4, 5)", "(2, 1, 4, 5)"]),
    ("pixel_weight", torch.ones(H, W), ValueError, ["(2, 4, 5)", "(4, 5)"]),
    ("pixel_weight", torch.ones(B, H, W, requires_grad=True), ValueError, ["constant", "requires grad", "detach"]),
    ("class_weight", torch.tensor([-1.0, 1.0, 1.0]), ValueError, [">= 0", "got -1.0"]),
    ("class_weight", torch.tensor([NAN, 1.0, 1.0]), ValueError, ["finite", "got nan"]),
    ("class_weight", torch.tensor([INF, 1.0, 1.0]), ValueError, ["finite", "got inf"]),
    ("pixel_weight", torch.full((B, H, W), -2.0), ValueError, [">= 0", "got -2.0"]),
    ("pixel_weight", torch.full((B, H, W), NAN), ValueError, ["finite", "got nan"]),
    ("pixel_weight", torch.full((B, H, W), INF).as_subclass(Mask), ValueError, ["finite", "got inf"]),
    # they are float32 where the logits are: 1e200 would be inf there
    (
        "pixel_weight",
        torch.full((B, H, W), 1e200, dtype=torch.float64),
        ValueError,
        ["finite", "float32", "got 1e+200"],
    ),
    ("class_weight", torch.full((C,), 1e39, dtype=torch.float64), ValueError, ["finite", "float32", "got 1e+39"]),
    # settings
    ("reduction", "avg", ValueError, ["mean", "sum", "none", "'avg'"]),
    ("reduction", None, ValueError, ["mean", "None"]),
    ("backend", "gpu", ValueError, ["cpu", "reference", "'gpu'"]),
    ("backend", ["cpu"], ValueError, ["cpu", "reference", "['cpu']"]),
    ("normalizer", -1, ValueError, [">= 0", "-1"]),
    ("normalizer", NAN, ValueError, ["finite", "nan"]),
    ("normalizer", "batch", TypeError, ["number", "'batch'"]),
    ("normalizer", True, TypeError, ["number", "True"]),
    ("normalizer", torch.ones(2), ValueError, ["0-d", "(2,)"]),
    ("normalizer", torch.tensor(-1.0), ValueError, [">= 0", "-1.0"]),
    ("normalizer", torch.tensor(-3), ValueError, [">= 0", "-3"]),
    ("normalizer", torch.tensor(NAN), ValueError, ["finite", "nan"]),
    ("normalizer", torch.tensor(INF), ValueError, ["finite", "inf"]),
    ("normalizer", torch.tensor(-2.0).as_subclass(Mask), ValueError, [">= 0", "-2.0"]),
    ("normalizer", torch.tensor(1e-40, dtype=torch.float64), ValueError, ["reciprocal float32 holds", "1e-40"]),
    ("normalizer", 1e-40, ValueError, ["reciprocal float32 holds", "1e-40"]),
    ("normalizer", torch.tensor(True), TypeError, ["floats or ints", "torch.bool"]),
    ("normalizer", torch.ones((), requires_grad=True), ValueError, ["constant", "requires grad", "detach"]),
    ("trace_weight", "0.1", TypeError, ["number", "'0.1'"]),
    ("trace_weight", None, TypeError, ["number", "None"]),
    ("trace_weight", NAN, ValueError, ["finite", "nan"]),
    ("trace_weight", True, TypeError, ["number", "True"]),
    ("trace_weight", torch.tensor(0.1), TypeError, ["number", "tensor(0.1"]),
    ("ignore_index", True, TypeError, ["int", "True"]),
    ("ignore_index", torch.tensor(255), TypeError, ["int", "tensor(255)"]),
    ("ignore_index", 2.5, TypeError, ["int", "2.5"]),
    ("ignore_index", None, TypeError, ["int", "None"]),
    # devices
    ("cm_logits", torch.zeros(B, C, C, H, W, device="meta"), ValueError, ["cpu", "meta"]),
    ("labels", torch.zeros(B, H, W, dtype=torch.uint8, device="meta"), ValueError, ["cpu", "meta"]),
    ("transition", torch.zeros(C, C, device="meta"), ValueError, ["cpu", "meta"]),
    ("class_weight", torch.ones(C, device="meta"), ValueError, ["cpu", "meta"]),
    ("pixel_weight", torch.ones(B, H, W, device="meta"), ValueError, ["cpu", "meta"]),
    ("normalizer", torch.ones((), device="meta"), ValueError, ["cpu", "meta"]),
]


def case_id(case: tuple[str, Any, type[Exception], list[str]]) -> str:
    given = case[1]
    if isinstance(given, torch.Tensor):
        return f"{case[0]}-{given.dtype}{list(given.shape)}-{given.device}-{case[3][-1]}".replace("torch.", "")
    return f"{case[0]}-{given!r}"


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(C, H, W)] * B, layout=layout)
    arguments = {**good(), "seg_logits": nested}
    assert is_told(TypeError, ["seg_logits", "dense", "nested"], lambda: ck.annotation_nll(**arguments))


def test_annotation_nll_has_one_layer() -> None:
    labels = torch.zeros(B, 1, H, W, dtype=torch.uint8)
    arguments = {**good(), "labels": labels}
    assert is_told(ValueError, ["labels", "(B, *S)", "(2, 1, 4, 5)"], lambda: ck.annotation_nll(**arguments))


def raised(call: Callable[[], Any]) -> tuple[type[Exception] | None, str]:
    """Type and message of what ``call`` raises."""
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None, ""


def is_told(error: type[Exception], parts: list[str], call: Callable[[], Any]) -> bool:
    """Whether ``call`` raises exactly ``error``, with every one of ``parts`` in its message."""
    kind, message = raised(call)
    assert kind is error, f"expected {error.__name__}, got {kind}: {message}"
    return all(part in message for part in parts)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_annotation_nll(case: tuple[str, Any, type[Exception], list[str]]) -> None:
    name, given, error, parts = case
    assert is_told(error, [name, *parts], lambda: ck.annotation_nll(**{**good(), name: given}))


STREAM = ("seg_logits", "cm_logits", "labels", "transition", "ignore_index", "backend")


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in STREAM], ids=case_id)
def test_annotation_posterior(case: tuple[str, Any, type[Exception], list[str]]) -> None:
    name, given, error, parts = case
    assert is_told(error, [name, *parts], lambda: ck.annotation_posterior(**{**good(), name: given}))


@pytest.mark.parametrize("stream", ["positive", "negative"])
@pytest.mark.parametrize("case", [case for case in CASES if case[1] is not None], ids=case_id)
def test_coarse_label_loss(case: tuple[str, Any, type[Exception], list[str]], stream: str) -> None:
    """The same errors, under the names that this function's arguments have."""
    name, given, error, parts = case
    if stream == "positive" and name == "transition":
        pytest.skip("the positive stream has none")
    arguments = good()
    transition = arguments.pop("transition")
    renamed = {"cm_logits": f"{stream}_cm", "labels": f"{stream}_labels"}
    arguments = {renamed.get(key, key): value for key, value in arguments.items()}
    arguments = {"positive_cm": None, "positive_labels": None, **arguments}
    if stream == "negative":
        arguments["transition"] = transition
    arguments[renamed.get(name, name)] = given
    assert is_told(error, [renamed.get(name, name), *parts], lambda: ck.coarse_label_loss(**arguments))


def test_a_negative_drawing_never_names_its_own_class() -> None:
    seg, labels = torch.zeros(B, C, H, W), torch.zeros(B, H, W, dtype=torch.uint8)
    for transition in (torch.eye(C), matrix([0, 1, 0], [0.5, 0, 0.5], [0.5, 0.25, 0.25])):
        assert is_told(
            ValueError,
            ["transition", "zero diagonal", str(transition.diagonal().tolist())],
            lambda t=transition: ck.coarse_label_loss(seg, None, None, None, labels, t),  # type: ignore[misc]
        )


def test_both_streams_absent() -> None:
    assert is_told(
        ValueError,
        ["positive_labels", "negative_labels", "None"],
        lambda: ck.coarse_label_loss(torch.zeros(B, C, H, W), None, None),
    )


@pytest.mark.parametrize("stream", ["positive", "negative"])
def test_matrices_without_their_labels(stream: str) -> None:
    seg, cm, labels = (good()[name] for name in ("seg_logits", "cm_logits", "labels"))
    other = "negative" if stream == "positive" else "positive"
    arguments = {"positive_cm": None, "positive_labels": None, f"{stream}_cm": cm, f"{other}_labels": labels}
    assert is_told(ValueError, [f"{stream}_cm", f"{stream}_labels"], lambda: ck.coarse_label_loss(seg, **arguments))


def test_transition_without_a_negative_stream() -> None:
    seg, labels = good()["seg_logits"], good()["labels"]
    assert is_told(
        ValueError,
        ["transition", "negative_labels"],
        lambda: ck.coarse_label_loss(seg, None, labels, transition=ck.uniform_transition(C)),
    )


@pytest.mark.parametrize(
    ("weight", "error"),
    [(-0.1, ValueError), (NAN, ValueError), ("1", TypeError), (True, TypeError), (torch.tensor(1.0), TypeError)],
    ids=str,
)
def test_negative_weight(weight: Any, error: type[Exception]) -> None:
    seg, labels = good()["seg_logits"], good()["labels"]
    assert is_told(
        error,
        ["negative_weight", "expected", str(weight)],
        lambda: ck.coarse_label_loss(seg, None, labels, negative_weight=weight),
    )


PARTS = ("cm_logits", "labels", "transition", "class_weight", "pixel_weight", "normalizer", "trace_weight")


@pytest.mark.parametrize("case", [case for case in CASES if case[0] in PARTS], ids=case_id)
def test_drawings(case: tuple[str, Any, type[Exception], list[str]]) -> None:
    """The same errors, under the place that the second kind has."""
    name, given, error, parts = case
    arguments = good()
    seg, first = arguments.pop("seg_logits"), ck.Drawings(torch.zeros(B, H, W, dtype=torch.uint8))
    if (name, given) == ("cm_logits", None):
        pytest.skip("a trusted kind")
    second = ck.Drawings(**{**arguments, name: given})
    assert is_told(error, [f"drawings[1].{name}", *parts], lambda: ck.annotation_objective(seg, [first, second]))


@pytest.mark.parametrize(
    ("drawings", "parts"),
    [
        (None, ["sequence", "NoneType"]),
        ([], ["at least one"]),
        (ck.Drawings(torch.zeros(B, H, W).long()), ["sequence", "Drawings"]),
        ([torch.zeros(B, H, W).long()], ["drawings[0]", "Drawings", "Tensor"]),
        (iter([ck.Drawings(torch.zeros(B, H, W).long())]), ["sequence", "list_iterator"]),
    ],
    ids=["None", "none", "not a sequence", "labels", "an iterator"],
)
def test_what_is_no_sequence_of_drawings(drawings: Any, parts: list[str]) -> None:
    seg = good()["seg_logits"]
    assert is_told(TypeError, ["drawings", *parts], lambda: ck.annotation_objective(seg, drawings))
    if drawings is not None:
        assert is_told(TypeError, ["drawings", *parts], lambda: ck.annotation_posterior(seg, drawings))


@pytest.mark.parametrize("weight", [-0.1, NAN, "1", True, torch.tensor(1.0)], ids=str)
def test_weight_of_drawings(weight: Any) -> None:
    seg, labels = good()["seg_logits"], good()["labels"]
    error = ValueError if isinstance(weight, float) else TypeError
    drawings = ck.Drawings(labels, weight=weight)
    assert is_told(error, ["drawings[0].weight", str(weight)], lambda: ck.annotation_objective(seg, [drawings]))


@pytest.mark.parametrize(
    ("size", "error", "parts"),
    [
        ((H,), ValueError, ["2 numbers", "(4,)"]),
        (H, ValueError, ["2 numbers", "4"]),
        (torch.tensor([H, W]), ValueError, ["2 numbers", "tensor"]),
        ((H, W + 0.0), TypeError, ["integers", "5.0"]),
        (np.array([4.0, 5.0]), TypeError, ["integers", "5.0"]),
        ("45", TypeError, ["integers", "45"]),
        ((H, True), TypeError, ["integers", "True"]),
        ((H - 1, W), ValueError, ["(4, 5)", "(3, 5)"]),
        ((-H, W), ValueError, ["(4, 5)", "(-4, 5)"]),
    ],
    ids=str,
)
def test_size_of_a_label_map(size: Any, error: type[Exception], parts: list[str]) -> None:
    assert is_told(error, ["size", *parts], lambda: ck.label_map(good()["seg_logits"], size))


@pytest.mark.parametrize(
    ("name", "given", "part"),
    [
        ("negative_labels", torch.full((B, H, W), 9, dtype=torch.uint8), "got 9"),
        ("negative_labels", torch.zeros(B, H, W), "torch.float32"),
        ("negative_cm", torch.zeros(B, C, C, H + 1, W), "larger than the image"),
        ("transition", torch.eye(C), "zero diagonal"),
        ("normalizer", (1.0, -1.0), ">= 0"),
        ("pixel_weight", (None, torch.ones(H, W)), "(4, 5)"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_bad_negative_stream_is_seen_before_the_positive_one_is_computed(name: str, given: Any, part: str) -> None:
    data = good()
    arguments = {
        "positive_cm": data["cm_logits"],
        "positive_labels": data["labels"],
        "negative_cm": data["cm_logits"],
        "negative_labels": data["labels"],
        name: given,
    }
    with pytest.raises((ValueError, TypeError), match=name) as caught:
        ck.coarse_label_loss(data["seg_logits"], **arguments)
    assert part in str(caught.value)


@pytest.mark.parametrize("name", ["pixel_weight", "normalizer"])
def test_a_pair_of_three(name: str) -> None:
    seg, labels = good()["seg_logits"], good()["labels"]
    triple: dict[str, Any] = {name: (None, None, None)}
    assert is_told(
        ValueError,
        [name, "(positive, negative)", "3"],
        lambda: ck.coarse_label_loss(seg, None, labels, **triple),
    )


def test_normalizer_belongs_to_the_mean() -> None:
    for reduction in ("sum", "none"):
        assert is_told(
            ValueError,
            ["normalizer", "mean", reduction],
            lambda r=reduction: ck.annotation_nll(**good(), reduction=r, normalizer=3.0),  # type: ignore[misc]
        )


def test_unknown_backend_in_the_context_and_schedule() -> None:
    assert is_told(ValueError, ["backend", "'gpu'", "reference"], lambda: ck.use_backend("gpu").__enter__())
    assert is_told(ValueError, ["schedule", "'later'", "one_pass"], lambda: ck.use_schedule("later").__enter__())


def test_unknown_backend_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COARSE_KERNELS_BACKEND", "gpu")
    assert is_told(ValueError, ["COARSE_KERNELS_BACKEND", "'gpu'", "reference"], lambda: ck.annotation_nll(**good()))


@pytest.mark.parametrize("part", ["labels", "transition", "pixel_weight", "class_weight"])
@pytest.mark.parametrize("inside", [False, True], ids=["made outside", "made inside"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_nonsense_is_refused_inside_torch_func_too(part: str, inside: bool, transform: str) -> None:
    """What is no tensor of vmap's has values there, too."""

    def nonsense() -> dict[str, Any]:
        labels = torch.zeros(B, H, W, dtype=torch.int32)
        return {
            "labels": {"labels": labels + 99},
            "transition": {"labels": labels, "transition": torch.full((C, C), 7.0)},
            "pixel_weight": {"labels": labels, "pixel_weight": torch.full((B, H, W), -7.0)},
            "class_weight": {"labels": labels, "class_weight": torch.full((C,), -7.0)},
        }[part]

    before = nonsense()

    def loss(seg: torch.Tensor) -> torch.Tensor:
        return ck.annotation_nll(seg, None, **(nonsense() if inside else before)).loss

    seg = good()["seg_logits"]
    call = {
        "grad": lambda: torch.func.grad(loss)(seg),
        "jvp": lambda: torch.func.jvp(loss, (seg,), (seg,)),
        "vmap": lambda: torch.func.vmap(loss)(seg[None]),
    }[transform]
    assert is_told(ValueError, [part, "expected"], call)


@pytest.mark.parametrize("name", ["trace_weight", "weight"])
@pytest.mark.parametrize(
    "number", [1e39, -1e39, 10**400, Fraction(10**400), np.float64(1e300)], ids=lambda number: str(number)[:9]
)
def test_a_number_that_float32_does_not_hold_is_not_infinity_in_the_gradients(name: str, number: Any) -> None:
    drawings = ck.Drawings(good()["labels"], good()["cm_logits"], **{name: number})
    assert is_told(
        ValueError,
        [f"drawings[0].{name}", "float32"],
        lambda: ck.annotation_objective(good()["seg_logits"], [drawings]),
    )


TRANSITION_CASES: list[tuple[Callable[[], Any], type[Exception], list[str]]] = [
    (lambda: ck.uniform_transition(1), ValueError, ["num_classes", ">= 2", "1"]),
    (lambda: ck.uniform_transition(2.0), ValueError, ["num_classes", "int", "2.0"]),  # type: ignore[arg-type]
    (
        lambda: ck.estimate_transition(torch.zeros(3), torch.zeros(3, dtype=torch.uint8), 3),
        TypeError,
        ["positive_labels", "integer", "float32"],
    ),
    (
        lambda: ck.estimate_transition(torch.zeros(3, dtype=torch.uint8), torch.zeros(4, dtype=torch.uint8), 3),
        ValueError,
        ["negative_labels", "(3,)", "(4,)"],
    ),
    (
        lambda: ck.estimate_transition(torch.tensor([0, 1]), torch.tensor([1, 3]), 3),
        ValueError,
        ["negative_labels", "[0, 3)", "3"],
    ),
    (
        lambda: ck.estimate_transition(torch.tensor([0]), torch.tensor([1]), 3, smoothing=-1.0),
        ValueError,
        ["smoothing", ">= 0", "-1.0"],
    ),
    (
        lambda: ck.estimate_transition([0], torch.tensor([1]), 3),  # type: ignore[arg-type]
        TypeError,
        ["positive_labels", "torch.Tensor", "list"],
    ),
    (lambda: ck.uniform_transition(True), ValueError, ["num_classes", "int", "True"]),
    (lambda: ck.uniform_transition(3, dtype=torch.int64), TypeError, ["dtype", "float32", "torch.int64"]),
    (
        lambda: ck.estimate_transition(torch.tensor([0]), torch.tensor([1]), 3, smoothing=INF),
        ValueError,
        ["smoothing", "finite", "inf"],
    ),
    (
        lambda: ck.estimate_transition(torch.tensor([0]), torch.tensor([1]), 3, smoothing="1"),  # type: ignore[arg-type]
        TypeError,
        ["smoothing", "number", "'1'"],
    ),
    (
        lambda: ck.estimate_transition(torch.tensor([0]), torch.tensor([1]), 3, ignore_index=None),  # type: ignore[arg-type]
        TypeError,
        ["ignore_index", "int", "None"],
    ),
    (
        lambda: ck.estimate_transition(torch.tensor([0]), torch.zeros(1, dtype=torch.int64, device="meta"), 3),
        ValueError,
        ["negative_labels", "cpu", "meta"],
    ),
    (
        lambda: ck.estimate_transition(torch.tensor([7]).as_subclass(Mask), torch.tensor([1]), 3),
        ValueError,
        ["positive_labels", "[0, 3)", "7"],
    ),
    (lambda: ck.TransitionMatrix.learned(4, ck.uniform_transition(3)), ValueError, ["initial", "(4, 4)", "(3, 3)"]),
    (
        lambda: ck.CoarseLabelCriterion(ck.uniform_transition(3)),  # type: ignore[arg-type]
        TypeError,
        ["transition", "TransitionMatrix", "Tensor"],
    ),
    (lambda: ck.TransitionMatrix.fixed(torch.eye(2).as_subclass(Mask)), ValueError, ["matrix", "zero diagonal"]),
    (lambda: ck.TransitionMatrix.fixed(torch.zeros(2, 3)), ValueError, ["matrix", "(2, 3)"]),
    (lambda: ck.TransitionMatrix.fixed(torch.zeros(3)), ValueError, ["matrix", "(3,)"]),
    (lambda: ck.TransitionMatrix.fixed(torch.eye(2)), ValueError, ["matrix", "zero diagonal", "[1.0, 1.0]"]),
    (lambda: ck.TransitionMatrix.fixed(matrix([0.0, 2.0], [1.0, 0.0])), ValueError, ["matrix", "sum to 1", "2.0"]),
    (lambda: ck.TransitionMatrix.fixed(matrix([0.0, NAN], [1.0, 0.0])), ValueError, ["matrix", "finite", "nan"]),
    (lambda: ck.TransitionMatrix.learned(1), ValueError, ["num_classes", "1"]),
    (lambda: ck.TransitionMatrix.fixed([[0.0, 1.0], [1.0, 0.0]]), TypeError, ["matrix", "torch.Tensor"]),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "error", "parts"), TRANSITION_CASES, ids=range(len(TRANSITION_CASES)))
def test_transitions(call: Callable[[], Any], error: type[Exception], parts: list[str]) -> None:
    assert is_told(error, parts, call)


@pytest.mark.parametrize(
    ("name", "given", "error", "parts"),
    [
        ("reduction", "avg", ValueError, ["reduction", "'avg'"]),
        ("backend", "gpu", ValueError, ["backend", "'gpu'"]),
        ("class_weight", torch.ones(C + 1), ValueError, ["class_weight", "(3,)", "(4,)"]),
        ("trace_weight", NAN, ValueError, ["trace_weight", "nan"]),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_modules(name: str, given: Any, error: type[Exception], parts: list[str]) -> None:
    """Where the settings are checked is the module's business; that the first call raises is the user's."""
    arguments = good()
    transition = arguments.pop("transition")
    assert is_told(error, parts, lambda: ck.AnnotationNLL(**{name: given})(*arguments.values(), transition))
    assert is_told(error, parts, lambda: ck.CoarseLabelCriterion(**{name: given})(*arguments.values()))
