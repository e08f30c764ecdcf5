"""A few seconds of `make fuzz` (tests/fuzz), and that it finds what is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

import coarse_kernels as ck
from tests.fuzz import __main__ as command
from tests.fuzz import oracle
from tests.fuzz.case import Case, Kind, parse, simpler
from tests.fuzz.case import draw as draw_case
from tests.fuzz.engine import Wrong, cases, check, fuzz
from tests.fuzz.oracle import solve
from tests.fuzz.relations import RELATIONS, weighted
from tests.fuzz.tensors import poisoned, run, tensors_of

X = TypeVar("X")
BACKENDS = [name for name in ("cpu", "reference") if name in ck.available_backends()]


class Drawn:
    """Who draws is hypothesis."""

    def __init__(self, data: st.DataObject):
        self._data = data

    def integer(self, low: int, high: int) -> int:
        return self._data.draw(st.integers(low, high))

    def of(self, options: Sequence[X]) -> X:
        return self._data.draw(st.sampled_from(options))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("backend", BACKENDS)
@hypothesis.settings(max_examples=50)
@hypothesis.given(data=st.data())
def test_any_case(backend: str, data: st.DataObject) -> None:
    case = draw_case(Drawn(data), weighted())
    hypothesis.note(f'python -m tests.fuzz --backend {backend} "{case}"')
    with poisoned():
        check(case, backend)


# Found by fuzzing and mended; what each was is in docs/reliability.md.
FOUND = (
    "c2 b2 2x2 seg2x2 fp32 mean scale30 drawn1 ignore255 uint8 one_pass seed1625417583 same | random*2 trusted",
    "c2 b1 3x2 seg3x2 fp32 mean scale30 drawn1 ignore255 uint8 one_pass seed113480406 same | random*3 trusted",
    "c2 b2 2x3x3 seg2x3x3 fp32 mean scale30 drawn1 ignore255 uint8 one_pass seed735493729 same | random trusted",
    "c2 b1 4422 seg1 fp32+fp64 mean scale0.1 drawn1 ignore255 uint8 one_pass seed1479441170 same | random trusted "
    "| uniform*2 1907 shared w0.5 trace0.1",
    "c3 b3 9x9 seg2x1 fp32 none scale10 drawn0.7 ignore255 uint8 one_pass seed1925827645 same "
    "| random 7x2 classes pixels | positive trusted",
)


@pytest.mark.parametrize("line", FOUND)
def test_what_was_found_stays_mended(line: str) -> None:
    if "cpu" not in BACKENDS:
        pytest.skip("not built")
    with poisoned():
        check(parse(line), "cpu")


def test_interpolation_weights_that_are_kept_stay_small() -> None:
    """They were kept for every size that had come up, of long signals 70 MB each, until the fuzzer was killed at 23 GB."""
    oracle._taps(2000, 4000)
    assert oracle._small_taps.cache_info().maxsize * 8 * oracle._KEPT < 100e6
    before = oracle._small_taps.cache_info().currsize
    oracle._taps(2001, 4000)
    assert oracle._small_taps.cache_info().currsize == before


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_a_long_run(backend: str) -> None:
    tally = fuzz(backend, seed=0, count=120)
    assert (tally.cases, tally.failures) == (120, [])
    assert tally.comparisons > 5 * tally.cases


@pytest.mark.parametrize(
    "line",
    [
        "c5 b1 24 seg24 fp32 mean scale30 seed1057024121 same | positive 1 | random*3 16",
        "c6 b2 24 seg1 fp32 mean scale10 drawn0.7 ignore1 seed857458060 same | random 19 shared classes",
        "c3 b2 35 seg30 fp32 mean scale10 drawn0.7 seed1656762571 same | random trusted",
        "c2 b3 3x6 seg2x4 fp32 mean scale30 drawn0.3 seed2083666651 same | random*2 trusted",
        "c9 b2 21 seg9 fp32 mean scale10 drawn0.7 ignore1 seed1515320567 same | random 9 shared",
    ],
)
def test_where_a_pixel_lies_between_grid_points_is_known_to_one_rounding(line: str) -> None:
    """Neighbouring logits are 30 apart here: as the fraction of a coordinate of 30 it made gradients wrong by 1e-5."""
    with poisoned():
        check(parse(line), BACKENDS[0])


def test_of_a_few_numbers_plain_pytorch_may_be_lucky() -> None:
    """Its gradient is 2e-7 off, where rounding the inputs otherwise moves it by 5e-6: quotients of two signs cancel."""
    line = "c2 b2 8x8 seg1x1 fp32+bf16 none scale3 seed1525621181 same | random 7x3 w3 classes pixels | positive*3 8x8 pixels"
    with poisoned():
        check(parse(line), BACKENDS[0])


@pytest.mark.parametrize("relation", RELATIONS)
def test_every_relation_holds_where_all_its_ways_are_taken(relation: str) -> None:
    kinds = (
        Kind("random", 2, (3, 2), classes=True, pixels=True, trace=0.1),
        Kind("positive", 1, (1, 1), shared=True, weight=0.5),
        Kind("uniform", 1, None),
    )
    case = Case(4, 3, (5, 6), (1, 1), kinds, drawn=0.7, seed=5, relation=relation)
    for reduction, seed in itertools.product(("mean", "sum", "none"), range(4)):
        with poisoned():
            check(replace(case, reduction=reduction, seed=seed), BACKENDS[0])


def test_the_closed_form_is_what_autograd_makes_of_the_reference() -> None:
    """To float64's own rounding, at ordinary scales."""
    done = 0
    with poisoned():
        for case in itertools.islice(cases(1), 250):
            if case.scale > 10 or case.dtype != "fp64" or case.cm_dtype:
                continue
            tensors, incoming = tensors_of(case)
            truth, found = solve(tensors, incoming), run(tensors, "reference", incoming)
            for name, value in found.losses.items():
                np.testing.assert_allclose(
                    value, truth.losses[name], rtol=1e-12, atol=1e-11, err_msg=f"{name} of {case}"
                )
            for name, value in found.gradients.items():
                size = max(truth.sizes[name], float(np.abs(truth.gradients[name]).max()))
                error = float(np.abs(value - truth.gradients[name]).max())
                assert error <= 1e-11 * size, f"{name} of {case}"
            done += 1
    assert done > 15


def test_a_line_is_the_whole_case() -> None:
    for case in itertools.islice(cases(3), 300):
        assert case.fits()
        assert parse(str(case)) == case
    with pytest.raises(ValueError, match=r"case: expected words as in .*, got 'fp31'"):
        parse("c3 fp31")


def test_what_is_simpler_is_simpler_and_ends() -> None:
    case, steps = next(itertools.islice(cases(4), 7, None)), 0
    while (other := next((one for one in simpler(case) if one.fits()), None)) is not None:
        case, steps = other, steps + 1
        assert steps < 200
    assert case == replace(Case(), seed=case.seed)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("sign", "gradient of cm0"),
        ("loss", "loss"),
        ("nan", "gradient of seg"),
    ],
)
def test_a_mistake_is_found_and_made_small(monkeypatch: pytest.MonkeyPatch, wrong: str, message: str) -> None:
    """A gradient of matrices with the wrong sign where images are wider than 3, a loss that forgets an image, a pixel that
    nobody writes."""
    real = ck.annotation_objective

    def mistaken(seg: torch.Tensor, drawings: Any, **options: Any) -> ck.Objective:
        kinds = list(drawings)
        if wrong == "sign":
            for number, kind in enumerate(kinds):
                if kind.cm_logits is not None and kind.labels.shape[-1] > 3:
                    cm = kind.cm_logits
                    kinds[number] = replace(kind, cm_logits=2 * cm.detach() - cm)
        elif wrong == "nan" and seg.requires_grad:
            seg = _NanBack.apply(seg)
        out = real(seg, kinds, **options)
        return out._replace(loss=out.loss * 0.5) if wrong == "loss" and len(seg) > 1 else out

    monkeypatch.setattr(ck, "annotation_objective", mistaken)
    tally = fuzz("reference", seed=0, count=300, most_failures=1)
    (failure,) = tally.failures
    assert message in failure.message
    small = parse(failure.line)
    assert small.pixels <= 4
    assert len(small.kinds) == 1
    with poisoned(), pytest.raises(Wrong):
        check(small, "reference")


class _NanBack(torch.autograd.Function):
    """The identity, whose gradient misses its last element."""

    @staticmethod
    def forward(ctx: Any, seg: torch.Tensor) -> torch.Tensor:
        return seg.view_as(seg)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        grad = grad.clone()
        grad[..., -1] = torch.nan
        return grad


def test_the_command_counts_and_says_what_it_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def worker(backend: str, isa: str, seed: int, seconds: float) -> dict[str, Any]:
        tally = fuzz(backend, seed=seed, count=20)
        return {"backend": backend, "isa": isa, "seed": seed} | json.loads(json.dumps(tally.as_dict()))

    monkeypatch.setattr(command, "workers", lambda: [("reference", "")])
    monkeypatch.setattr(command, "_in_a_process", worker)
    assert command.main(["--seconds", "1", "--rounds", "2", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "fuzz.md").read_text()
    assert text.startswith("# 40 problems drawn at random")
    assert "Nothing wrong was found." in text
    assert json.loads((tmp_path / "fuzz.json").read_text())["cases"] == 40


@pytest.mark.slow
def test_a_worker_that_crashes_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = command._in_a_process("none", "", 0, 0.1)  # no such backend: every case fails, and none is counted as held
    assert part["failures"] or "crash" in part
    monkeypatch.setattr(command, "workers", lambda: [("reference", "")])
    monkeypatch.setattr(command, "_in_a_process", lambda *a: part | {"backend": "reference", "isa": ""})
    assert command.main(["--out", str(tmp_path)]) == 1
    assert "Wrong:" in (tmp_path / "fuzz.md").read_text()


@pytest.mark.slow
def test_the_kernels_of_triton_are_fuzzed_in_its_interpreter() -> None:
    pytest.importorskip("triton")
    part = command._in_a_process("triton", "", 3, 10.0)  # a busy machine may not do more than one in that time
    assert not part["failures"]
    assert "crash" not in part
    assert part["cases"] >= 1
    assert part["comparisons"] >= 4
