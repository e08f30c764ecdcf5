"""Cases drawn and held to float64, as many as fit in a time; what fails is made small and printed as its line."""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch

from tests import contract

from .case import Case, Dice, draw, shrunk
from .oracle import Truth, solve
from .relations import RELATIONS, weighted
from .tensors import STORAGE, Array, Found, moved, poisoned, tensors_of

_LARGEST_FLOAT16 = 6e4
_LARGEST_RULED_OUT, _LARGEST_RULED_OUT_WIDE = (
    1e30,
    1e270,
)  # of a quotient where a transition is 0, in float32 and float64
_LARGEST_TRANSITION = 1e30  # of a quotient that float32 holds
_MOVES = 8  # random ones, of which the largest counts
_FLUSHED = 2e-8  # of a pixel's weight: 2^-126, below which an exponential is 0, over 1e-30, below which evidence is a logarithm
_OF_ENTRIES = 3.0  # floors that an entry of a transition may be off: one pixel may be all of it
_WORST_CONDITION = 3e-3  # whatever it is: beyond, somebody has to look


class Wrong(AssertionError):
    """A result is farther from float64 than the contract has it."""


@dataclass
class Failure:
    line: str
    found_as: str
    message: str


@dataclass
class Tally:
    """What was run. ``asked_plain``: cases beyond the floors, for which plain PyTorch was the measure. ``asked_condition``:
    comparisons beyond that too, for which the condition of the problem was."""

    cases: int = 0
    comparisons: int = 0
    asked_plain: int = 0
    asked_condition: int = 0
    seconds: float = 0.0
    by: dict[str, Counter[str]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)

    def add(self, case: Case) -> None:
        self.cases += 1
        forms = {"trusted" if k.grid is None else _form(k.grid, case) for k in case.kinds}
        for name, values in {
            "relation": [case.relation],
            "dtype": [case.dtype],
            "rank": [str(len(case.size))],
            "kinds": [str(len(case.kinds))],
            "form": sorted(forms),
            "stream": sorted({k.stream for k in case.kinds}),
            "scale": [f"{case.scale:g}"],
            "reduction": [case.reduction],
        }.items():
            self.by.setdefault(name, Counter()).update(values)

    def as_dict(self) -> dict[str, Any]:
        content = asdict(self)
        content["by"] = {name: dict(sorted(counter.items())) for name, counter in self.by.items()}
        return content


def _form(grid: tuple[int, ...], case: Case) -> str:
    return "pixels" if grid == case.size else "one matrix" if math.prod(grid) == 1 else "strided"


# --- one case -----------------------------------------------------------------------------------------------------------


def check(case: Case, backend: str, tally: Tally | None = None) -> None:
    """Raises `Wrong`, or whatever the call raises.

    The reference is the measure of all others. It is held to the closed form itself, in float64 alone, where the two have
    nothing but their own roundings between them.
    """
    tally = tally or Tally()
    measure = backend == "reference"
    case = replace(case, dtype="fp64", cm_dtype="") if measure else case
    tensors, incoming = tensors_of(case)
    truth = solve(tensors, incoming)
    relation = RELATIONS[case.relation]
    found = relation(case, tensors, incoming, truth, backend)

    plain: list[Found] = []

    def usual() -> Found:
        if not plain:
            tally.asked_plain += 1
            plain.append(relation(case, tensors, incoming, truth, "reference"))
        return plain[0]

    def condition(name: str) -> float:
        """How far the gradient of that name moves, of its size, at most, when all inputs are rounded otherwise."""
        tally.asked_condition += 1
        wide = torch.float64 in (STORAGE[case.dtype], STORAGE[case.cm_dtype or case.dtype])
        by = contract.unit_roundoff(torch.float64 if wide else torch.float32)
        want = _gradient(truth, name)
        beyond = _beyond(name, truth, wide)
        moves = (
            _distance(
                _without(_gradient(solve(moved(tensors, by, seed), incoming), name), beyond), _without(want, beyond)
            )
            for seed in range(_MOVES)
        )
        return max(_relative(*move) for move in moves)

    asked = None if measure else usual
    for message in differences(case, found, truth, asked, condition, tally):
        raise Wrong(message)


def _beyond(name: str, truth: Truth, wide: bool) -> Array:
    """Entries of a transition that are 0 and whose quotients p / D, which nothing bounds there, may leave the range: they are
    not looked at. However little is left of them where they cancel: of infinities of two signs NaN is."""
    if name[0] != "t":
        return np.zeros(_gradient(truth, name).shape, bool)
    quotients = truth.shares[name][0]
    return truth.ruled_out[name] & ~(quotients < (_LARGEST_RULED_OUT_WIDE if wide else _LARGEST_RULED_OUT))


def _without(gradient: Array, beyond: Array) -> Array:
    return np.where(beyond, 0.0, gradient)


def _gradient(truth: Truth, name: str) -> Array:
    return truth.posterior if name == "posterior" else truth.gradients[name]


def differences(
    case: Case,
    found: Found,
    truth: Truth,
    plain: Callable[[], Found] | None,
    condition: Callable[[str], float],
    tally: Tally,
) -> Iterator[str]:
    """What is farther from the truth than it may be. ``plain`` is asked only where the floor does not do, and ``condition``
    only where plain does not; without plain, floors are all there is, a hundred times as high, since the truth is rounded as
    well."""
    lenient = 1.0 if plain else 100.0
    fields = {STORAGE[case.cm_dtype or case.dtype]} if any(k.grid is not None for k in case.kinds) else set()
    stored = {"seg": STORAGE[case.dtype], "cm": STORAGE[case.cm_dtype or case.dtype]}
    wide = torch.float64 in (STORAGE[case.dtype], *fields)
    compute = torch.float64 if wide else torch.float32
    scale = case.scale
    for name, got in found.losses.items():
        tally.comparisons += 1
        want = truth.losses[name]
        off, size = _distance(got, want, finite_only=True)
        if off <= lenient * contract.loss_floor(compute, scale) * max(1.0, size):
            continue
        # each label adds the logarithm of a number that is known to so much of 1, or of the logits' size, whatever is left
        if off <= contract.loss_floor(compute) * lenient * max(1.0, scale / 2) * truth.sizes[name]:
            continue
        usual = _distance(plain().losses[name], want, finite_only=True)[0] / max(1.0, size) if plain else 0.0
        bound = contract.loss_bound(usual, compute, scale)
        if not off / max(1.0, size) <= bound:
            yield f"{name}: {off / max(1.0, size):.2e} > {bound:.2e}: {_short(got)} for {_short(want)}"
    for name, got in found.gradients.items():
        tally.comparisons += 1
        want, natural_of = _gradient(truth, name), truth.sizes.get(name, 0.0)
        beyond = _beyond(name, truth, wide)
        if name[0] == "t":
            got, want = _without(got, beyond), _without(want, beyond)
            natural_of = float(np.linalg.norm(_without(truth.shares[name][0], beyond)))
        own = stored["seg" if name == "posterior" else name.rstrip("0123456789")] if name[0] != "t" else compute
        largest = float(np.abs(want).max()) if want.size else 0.0
        if (own == torch.float16 and largest > _LARGEST_FLOAT16) or (name[0] == "t" and largest > _LARGEST_TRANSITION):
            continue
        off, size = _distance(got, want)
        floor = lenient * (contract.transition_floor if name[0] == "t" else contract.gradient_floor)(own, scale)
        if name == "posterior":
            if case.junk:  # of pixels that nobody drew NaN is right
                continue
            floor *= 2
        # each pixel adds differences of probabilities, that are known to so much of 1, however small what is left
        natural = math.sqrt(got.size) if name == "posterior" else natural_of
        if name[0] == "t":
            yield from _entries(name, got, want, truth.shares[name], floor, plain, beyond)
        if off <= floor * max(size, natural):
            continue
        usual = 0.0
        if plain:
            measure = plain().gradients[name]
            if name[0] == "t":
                measure = _without(measure, beyond)
                # a quotient beyond float32 is inf, and 0 times that NaN: for everybody, but not the quotients beside it
                held = np.isfinite(measure)
                got, want, measure = got[held], want[held], measure[held]
                off, size = _distance(got, want)
            usual = _relative(*_distance(measure, want))
        error, bound = _relative(off, size), contract.gradient_bound(usual, own, scale)
        if plain and bound < error < math.inf:
            bound = max(bound, contract.gradient_bound(min(condition(name), _WORST_CONDITION), own, scale))
        if not error <= bound or error == math.inf:
            yield f"gradient of {name}: {error:.2e} > {bound:.2e}: {_short(got)} for {_short(want)}"


def _entries(
    name: str,
    got: Array,
    want: Array,
    shares: tuple[Array, float],
    floor: float,
    plain: Callable[[], Found] | None,
    beyond: Array,
) -> Iterator[str]:
    """Of a transition whose entries are of many sizes a norm sees the largest: each is held to what its own pixels add."""
    terms, weight = shares

    def worst(gradient: Array) -> float:
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            off = np.maximum(np.abs(gradient - want) - _FLUSHED * weight, 0.0)
            off = np.where(off > 0, off / terms, 0.0)
        return float(off[np.isfinite(gradient)].max(initial=0.0))

    if (error := worst(got)) <= (bound := _OF_ENTRIES * floor):
        return
    if plain:
        bound += contract.GRADIENT_FACTOR * worst(_without(plain().gradients[name], beyond))
    if error > bound:
        yield f"an entry of the gradient of {name}: {error:.2e} > {bound:.2e} of its terms: {_short(got)} for {_short(want)}"


def _relative(off: float, size: float) -> float:
    return off / size if size > 0 else (math.inf if off > 0 else 0.0)


def _distance(got: Array, want: Array, finite_only: bool = False) -> tuple[float, float]:
    """2-norms of the difference and of what is wanted; infinite where one is NaN or infinite and the other is not."""
    if got.shape != want.shape:
        raise Wrong(f"shape {got.shape} for {want.shape}")
    finite = np.isfinite(want)
    if not finite.all():
        if not finite_only or not np.array_equal(got[~finite], want[~finite], equal_nan=True):
            return math.inf, 1.0
        got, want = got[finite], want[finite]
    with np.errstate(over="ignore", invalid="ignore"):
        off, size = float(np.linalg.norm((got - want).ravel())), float(np.linalg.norm(want.ravel()))
    return (math.inf if math.isnan(off) else off), size


def _short(values: Array) -> str:
    text = np.array2string(np.asarray(values).ravel()[:4], precision=6, separator=", ")
    return text if values.size <= 4 else f"{text[:-1]}, ...]"


# --- many ---------------------------------------------------------------------------------------------------------------


def cases(seed: int) -> Iterator[Case]:
    dice, names = Dice(seed), weighted()
    while True:
        yield draw(dice, names)


def fuzz(
    backend: str,
    *,
    seed: int,
    seconds: float = math.inf,
    count: int | None = None,
    most_failures: int = 5,
    shrink: bool = True,
    wanted: Callable[[Case], bool] | None = None,
) -> Tally:
    """Cases of ``seed``, those that are wanted, until the time is over, so many are done, or so many have failed."""
    tally, began = Tally(), time.monotonic()
    with poisoned():
        for case in itertools.islice(filter(wanted, cases(seed)) if wanted else cases(seed), count):
            try:
                check(case, backend, tally)
            except Exception as error:
                tally.failures.append(_failure(case, backend, error, shrink=shrink))
                if len(tally.failures) >= most_failures:
                    break
            tally.add(case)
            tally.seconds = time.monotonic() - began
            if tally.seconds > seconds:
                break
    return tally


def _failure(case: Case, backend: str, error: Exception, *, shrink: bool) -> Failure:
    kind = type(error)

    def fails(other: Case) -> bool:
        try:
            check(other, backend)
        except kind:
            return True
        except Exception:  # something else is wrong there
            return False
        return False

    small = shrunk(case, fails) if shrink else case
    try:
        check(small, backend)
        message = "not again"
    except Exception as last:
        message = f"{type(last).__name__}: {last}"
    return Failure(str(small), str(case), message)
