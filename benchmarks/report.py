"""The report, in words and tables, from the measurements of a run."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .problem import parse
from .providers import PLAIN
from .sets import Bar, Group

DISTURBED = 0.9  # of the cores that a row runs on: with less, it shared them with other processes
KINDS = {"published": ("published",), "plain": PLAIN, "autograd": ("autograd", "torch"), "compiled": ("compiled",)}
LIMITS = {
    "bytes": "copy",
    "exponentials": "exp",
    "multiply-adds": "fma",
}  # what is counted -> the machine's rate for it

Row = Mapping[str, Any]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def number(value: Any) -> float:
    return math.nan if value in ("", None) else float(value)


@dataclass(frozen=True)
class Limit:
    """Of a problem on this machine: the largest of what its bytes, exponentials and multiply-adds take at the least."""

    name: str
    seconds: float


class Table:
    """Measurements, found by problem, provider and quantity."""

    def __init__(self, rows: Iterable[Row]):
        self.rows = list(rows)
        self._at = {(r["problem"], r["provider"], r["quantity"]): r for r in self.rows}
        self._problems: dict[str, dict[str, str]] = {}
        for row in self.rows:
            own = self._problems.setdefault(row["problem"], {})
            if row["provider"]:
                own[row["provider"]] = row["group"]
        #: the first of ours: bars are about it, and about no other that stands in where it failed
        self.main = next((row["provider"] for row in self.rows if row["group"] == "ours"), None)
        self.machines = [name for name in self._problems if name.startswith("machine ")]
        self.problems = [name for name in self._problems if name not in self.machines]

    def providers(self, problem: str, kind: str | None = None) -> list[str]:
        groups = KINDS.get(kind or "", (kind,))
        return [name for name, group in self._problems.get(problem, {}).items() if kind is None or group in groups]

    def row(self, problem: str, provider: str, quantity: str = "time") -> Row | None:
        return self._at.get((problem, provider, quantity))

    def value(self, problem: str, provider: str, quantity: str = "time") -> float:
        row = self.row(problem, provider, quantity)
        return math.nan if row is None else number(row["value"])

    def best(self, problem: str, kind: str, quantity: str = "time") -> str | None:
        """The provider of this kind with the least of a quantity."""
        values = {name: self.value(problem, name, quantity) for name in self.providers(problem, kind)}
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        return min(known, key=known.__getitem__, default=None)

    def ours(self, problem: str) -> str | None:
        """The first of ours that was timed: what ratios are taken against."""
        names = self.providers(problem, "ours")
        return next((name for name in names if self.row(problem, name)), None) or next(iter(names), None)

    def peaks(self, problem: str) -> tuple[float, float] | None:
        """MB over the inputs: ours, and the plain formulation that takes least. Not of small images: a page is a page."""
        own, least = self.ours(problem), self.best(problem, "plain", "peak")
        if own is None or least is None or not self.value(problem, own, "peak") > 1:
            return None
        return self.value(problem, own, "peak"), self.value(problem, least, "peak")

    def times_ours(self, problem: str, provider: str) -> float:
        own = self.ours(problem)
        return math.nan if own is None else self.value(problem, provider) / self.value(problem, own)

    def ns(self, problem: str, provider: str) -> float:
        return 1e6 * self.value(problem, provider) / parse(problem).pixels

    def limit(self, problem: str) -> Limit | None:
        threads = parse(problem).threads
        seconds = {
            counted: self.value(problem, "", counted.replace("-", "_")) / self.value(f"machine t{threads}", "", rate)
            for counted, rate in LIMITS.items()
        }
        known = {name: value for name, value in seconds.items() if not math.isnan(value)}
        if not known:
            return None
        name = max(known, key=known.__getitem__)
        return Limit(name, known[name])

    def limit_share(self, problem: str, provider: str) -> float:
        limit = self.limit(problem)
        return math.nan if limit is None else 1e3 * limit.seconds / self.value(problem, provider)

    def copy_share(self, problem: str, provider: str) -> float:
        copy = self.value(f"machine t{parse(problem).threads}", "", "copy")
        return 1e3 * self.value(problem, "", "bytes") / copy / self.value(problem, provider)


def figure(bar: Bar, problem: str, first: str, table: Table) -> float:
    """What is held to a bar; NaN where it was not measured. ``first``: the first problem of its group."""
    own = table.ours(problem)
    if own is None or own != table.main:
        return math.nan
    if bar.figure in KINDS:
        best = table.best(problem, bar.figure)
        return math.nan if best is None else table.times_ours(problem, best)
    if bar.figure in ("time", "speedup"):
        other = table.ours(first)
        ratio = math.nan if other is None else table.ns(problem, own) / table.ns(first, other)
        return ratio if bar.figure == "time" else 1 / ratio
    if bar.figure == "fresh":
        reused = str(replace(parse(problem), buffers="reused"))
        other = table.ours(reused)
        return math.nan if other is None else table.value(problem, own) / table.value(reused, other)
    if bar.figure == "memory":
        peaks = table.peaks(problem)
        return math.nan if peaks is None else peaks[1] / peaks[0]
    if bar.figure == "triton":
        return table.value(problem, "triton") / table.value(problem, "cuda")
    return {
        "ms": table.value(problem, own),
        "ns": table.ns(problem, own),
        "copy": table.copy_share(problem, own),
        "limit": table.limit_share(problem, own),
        "peak": table.value(problem, own, "peak"),
    }[bar.figure]


_WORDS = {
    "published": "times the published formulation",
    "plain": "times the best plain PyTorch",
    "autograd": "times the best plain PyTorch by autograd",
    "compiled": "times torch.compile",
    "ms": "milliseconds",
    "ns": "nanoseconds a pixel",
    "copy": "of a copy's bandwidth",
    "limit": "of the nearest limit",
    "peak": "MB at the peak over the inputs, gradients included",
    "memory": "times less memory than any plain PyTorch",
    "triton": "times of cuda, for triton",
    "fresh": "times the time with reused buffers",
}


def _of(bar: Bar, first: str) -> str:
    return _WORDS.get(bar.figure, f"time a pixel, {'over' if bar.at_most else 'faster than'} `{first}`")


# ---- the report ------------------------------------------------------------------------------------------------------


def markdown(
    groups: Sequence[Group],
    rows: Sequence[Row],
    machine: Mapping[str, Any],
    wrong: Sequence[str],
    notes: Sequence[str],
    seconds: float,
) -> str:
    """``wrong``: what failed; ``notes``: what was not run, and why."""
    table = Table(rows)
    lines = [f"# {machine['hardware']}", "", *_conditions(machine, seconds), *_machine_limits(table)]
    if wrong:
        lines += ["**Wrong or failed, and therefore not measured:**", "", *(f"- {line}" for line in wrong), ""]
    lines += ["## In words", "", *(f"- {line}" for line in in_words(groups, table)), ""]
    lines += _bars(groups, table)
    lines += _problems(table)
    lines += _scaling(table)
    lines += _everybody(table)
    if notes:
        lines += ["## Not run", "", *(f"- {line}" for line in notes), ""]
    return "\n".join(lines) + "\n"


def _conditions(machine: Mapping[str, Any], seconds: float) -> list[str]:
    shown = (
        "cpu",
        "gpu",
        "isa_torch",
        "isa_extension",
        "driver",
        "cuda",
        "triton",
        "torch",
        "python",
        "os",
        "date",
        "commit",
    )
    facts = "; ".join(f"{key} {machine[key]}" for key in shown if machine.get(key) not in (None, "", "none"))
    return [
        f"{facts}. `{machine['command']}`, {seconds:.0f} s.",
        "",
        "Every figure is of a provider whose result and gradients passed the float64 check, of large images on a CPU in some "
        "bands. Times are medians of interleaved "
        'runs; `python -m benchmarks "PROBLEM"` measures one line of a table again. How it is measured, and what the words of '
        "a problem mean: `benchmarks/README.md`, `benchmarks/problem.py`.",
        "",
    ]


def _machine_limits(table: Table) -> list[str]:
    if not table.machines:
        return []
    lines = [
        "| limits, same run | copy, read + written, GB/s | read, GB/s | exponentials, 1e9/s | multiply-adds, 1e9/s |",
        "|---|---|---|---|---|",
    ]
    for name in table.machines:
        values = [table.value(name, "", rate) / 1e9 for rate in ("copy", "read", "exp", "fma")]
        shown = ["" if math.isnan(value) else f"{value:.3g}" for value in values]
        lines.append(f"| threads: {name.removeprefix('machine t')} | {' | '.join(shown)} |")
    return [*lines, ""]


def in_words(groups: Sequence[Group], table: Table) -> list[str]:
    """Where ours wins, where it does not, what the next limit is."""
    timed = [name for name in table.problems if (own := table.ours(name)) and table.row(name, own)]
    if not timed:
        return ["Nothing was timed."]
    found = []
    leads = {}
    for name in timed:
        best = min(
            (one for kind in ("plain", "published", "compiled") if (one := table.best(name, kind))),
            key=lambda one, name=name: table.value(name, one),  # type: ignore[misc]
            default=None,
        )
        if best is not None:
            leads[name] = (table.times_ours(name, best), best)
    if leads:
        ahead = {name: lead for name, lead in leads.items() if lead[0] > 1}
        least, most = min(leads, key=lambda n: leads[n][0]), max(leads, key=lambda n: leads[n][0])
        found.append(
            f"Ours is the fastest in {len(ahead)} of {len(leads)} problems that others compute, too, between "
            f"{leads[least][0]:.3g} times (`{least}`, against {leads[least][1]}) and {leads[most][0]:.3g} times (`{most}`, "
            f"against {leads[most][1]})."
        )
        found += [
            f"It is NOT in `{name}`: {by} takes {ratio:.2f} of its time."
            for name, (ratio, by) in leads.items()
            if ratio <= 1
        ]
    judged = [
        (bar, figure(bar, str(e.problem), str(group[0].problem), table))
        for group in groups
        for e in group
        for bar in e.bars
    ]
    known = [(bar, value) for bar, value in judged if not math.isnan(value)]
    if known:
        met = sum(bar.is_met(value) for bar, value in known)
        found.append(f"Of {len(known)} bars {met} are met, {len(known) - met} are missed.")
    found += _limits_in_words(timed, table)
    memory = {name: peaks[1] / peaks[0] for name in table.problems if (peaks := table.peaks(name)) is not None}
    if memory:
        low, high = min(memory, key=memory.__getitem__), max(memory, key=memory.__getitem__)
        found.append(
            f"The plain formulation that takes least memory takes {memory[low]:.2g} (`{low}`) to {memory[high]:.2g} times "
            f"(`{high}`) the peak of ours."
        )
    found += _data_in_words(timed, table)
    disturbed = [row for row in table.rows if row.get("disturbed") not in (None, "", False)]
    if disturbed:
        names = ", ".join(sorted({f"`{row['problem']}`" for row in disturbed}))
        found.append(
            f"**{len(disturbed)} times were disturbed**: after three tries they still had less than {100 * DISTURBED:.0f} % of "
            f"their cores ({names}). Run again with nothing else running."
        )
    return found


def _limits_in_words(timed: Sequence[str], table: Table) -> list[str]:
    by: dict[str, list[tuple[float, str]]] = {}
    for name in timed:
        limit, own = table.limit(name), table.ours(name)
        assert own is not None
        if limit is not None:
            by.setdefault(limit.name, []).append((table.limit_share(name, own), name))
    found = []
    for limit_name, shares in by.items():
        low, lowest = min(shares)
        high, highest = max(shares)
        found.append(
            f"The nearest limit is {limit_name} in {len(shares)} of {len(timed)} problems, of which ours reaches "
            f"{100 * low:.0f} % (`{lowest}`) to {100 * high:.0f} % (`{highest}`)."
        )
    return found


def _data_in_words(timed: Sequence[str], table: Table) -> list[str]:
    found = []
    for name in timed:
        problem = parse(name)
        if problem.data not in ("noise", "random"):
            continue
        usual = str(replace(problem, data="blobs"))
        own, other = table.ours(name), table.ours(usual)
        if own is not None and other is not None and table.row(usual, other):
            ratio = table.value(name, own) / table.value(usual, other)
            found.append(f"`{name}` takes {ratio:.2f} times as long as data like those of training.")
    return found


def _bars(groups: Sequence[Group], table: Table) -> list[str]:
    lines = ["## Bars", "", "| problem | bar | measured | |", "|---|---|---|---|"]
    for group in groups:
        first = str(group[0].problem)
        for entry in group:
            for bar in entry.bars:
                value = figure(bar, str(entry.problem), first, table)
                verdict = "not measured" if math.isnan(value) else "met" if bar.is_met(value) else "**missed**"
                sign, measured = "<=" if bar.at_most else ">=", "" if math.isnan(value) else f"{value:.3g}"
                lines.append(f"| `{entry.problem}` | {sign} {bar.bound:g} {_of(bar, first)} | {measured} | {verdict} |")
    return [*lines, ""] if len(lines) > 4 else []


def _problems(table: Table) -> list[str]:
    timed = [name for name in table.problems if (own := table.ours(name)) and table.row(name, own)]
    if not timed:
        return []
    lines = [
        "## Ours, and how many times as long the others take",
        "",
        "Best plain: the fastest in plain PyTorch, a gradient derived and written by hand included; by autograd: without that. "
        "Limit: what bytes, exponentials or multiply-adds of the problem take on this machine at the least, and the share of "
        "it that ours reaches. Peak: over the inputs, gradients included; beside it the plain one that takes least.",
        "",
        "| problem | kernels | ms | ns a pixel | limit | reached | published | best plain | which | autograd | compiled | "
        "peak MB | least plain MB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in timed:
        own, plain, least = table.ours(name), table.best(name, "plain"), table.best(name, "plain", "peak")
        assert own is not None
        row, limit = table.row(name, own), table.limit(name)
        assert row is not None
        cells = [
            f"`{name}`",
            f"{own}: {row['kernels']}" if row["kernels"] else own,
            f"{number(row['value']):.3g}",
            f"{table.ns(name, own):.3g}",
            "" if limit is None else limit.name,
            _shown(100 * table.limit_share(name, own), ".0f", " %"),
            *(_ratio(table, name, kind) for kind in ("published", "plain")),
            plain or "",
            *(_ratio(table, name, kind) for kind in ("autograd", "compiled")),
            _shown(table.value(name, own, "peak"), ".1f"),
            "" if least is None else _shown(table.value(name, least, "peak"), ".1f"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _shown(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else format(value, form) + unit


def _ratio(table: Table, problem: str, kind: str) -> str:
    best = table.best(problem, kind)
    if best is not None:
        return f"{table.times_ours(problem, best):.2f}"
    needs = [table.value(problem, name, "needs") for name in table.providers(problem, kind)]
    return next((f"needs {value:.0f} GB" for value in needs if not math.isnan(value)), "")


# ---- scaling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """Problems that differ in one thing: pixels or classes."""

    along: str
    about: str
    provider: str
    sizes: tuple[float, ...]
    milliseconds: tuple[float, ...]

    @property
    def exponent(self) -> float:
        """Of time over size, by least squares on logarithms."""
        return float(np.polyfit(np.log(self.sizes), np.log(self.milliseconds), 1)[0])


def series(table: Table) -> list[Series]:
    """Of every provider, where there are at least three sizes."""
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for name in table.problems:
        problem = parse(name)
        for provider in table.providers(name):
            value = table.value(name, provider)
            if math.isnan(value):
                continue
            for along, size, about in (
                ("pixels", problem.pixels, re.sub(r"\b\d+x\d+ ", "", name)),
                ("classes", problem.classes, re.sub(r"^c\d+ ", "", name)),
            ):
                found.setdefault((along, about, provider), {}).setdefault(size, value)
    return [
        Series(along, about, provider, tuple(sorted(values)), tuple(values[size] for size in sorted(values)))
        for (along, about, provider), values in found.items()
        if len(values) >= 3
    ]


def _scaling(table: Table) -> list[str]:
    fits = series(table)
    if not fits:
        return []
    lines = ["## Scaling", "", "Time grows with this power of the size:", ""]
    lines += ["| along | problem | provider | sizes | power |", "|---|---|---|---|---|"]
    for fit in fits:
        sizes = ", ".join(f"{size:g}" for size in fit.sizes)
        lines.append(f"| {fit.along} | `{fit.about}` | {fit.provider} | {sizes} | {fit.exponent:.2f} |")
    return [*lines, ""]


def _everybody(table: Table) -> list[str]:
    lines = ["## Everybody", ""]
    for name in table.problems:
        own = table.ours(name)
        moved = table.value(name, "", "bytes")
        lines += [
            f"### `{name}`",
            "",
            "| provider | ms | p20 | p80 | runs | ns a pixel | times ours | GB/s | peak MB | off from float64 by |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        order = sorted(table.providers(name), key=lambda one, name=name: _last_if_nan(table.value(name, one)))  # type: ignore[misc]
        for one in order:
            row, needs = table.row(name, one), table.value(name, one, "needs")
            if row is None:
                text = "" if math.isnan(needs) else f"does not fit: needs {needs:.0f} GB, computed"
                cells = [one, text, *[""] * 6]
            else:
                milliseconds = number(row["value"])
                cells = [
                    one,
                    *(f"{number(row[key]):.3g}" for key in ("value", "p20", "p80")),
                    str(row["runs"]),
                    f"{table.ns(name, one):.3g}",
                    "" if own is None else f"{table.times_ours(name, one):.2f}",
                    _shown(moved / milliseconds / 1e6, ".3g"),
                ]
            cells += [_shown(table.value(name, one, "peak"), ".1f"), _worst_error(table, name, one)]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _last_if_nan(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _worst_error(table: Table, problem: str, provider: str) -> str:
    own = [r for r in table.rows if r["problem"] == problem and r["provider"] == provider]
    found = [(number(r["value"]), r["quantity"]) for r in own if r["quantity"].startswith("error of ")]
    return f"{max(found)[0]:.1e}" if found else ""
