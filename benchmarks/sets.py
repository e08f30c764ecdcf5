"""Sets of problems: the files of `sets/`, a problem a line, with who computes it and what the figures are held to.

    # a comment
    c19 128x256 noise          | eager compiled recompute  | published >= 25; plain >= 12; compiled >= 6
    c19 1024x2048 seg4 cm8     | ours
    & c19 1024x2048 seg4 cm8 positive+trusted | ours       | time <= 1.15

A line that begins with & is timed in turns with the line before, in one process. Providers: the words of `providers.choose`;
without any, "eager". Bars, behind their figures:

    published, plain, autograd, compiled   >= N: the fastest of them takes N times as long as ours
    time <= N, speedup >= N                ours, a pixel, over that of the first problem of its group; the first one's over it
    ms, ns <= N                            ours, milliseconds; nanoseconds a pixel
    copy, limit >= N                       share of a copy's bandwidth; of the nearer of the machine's limits
    peak <= N                              peak over the inputs, MB, gradients included
    memory >= N                            the plain formulation that takes least memory takes N times ours
    triton <= N                            its time over that of cuda
    fresh <= N                             ours over ours on the same problem with reused buffers
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .problem import Problem, parse

FOLDER = Path(__file__).parent / "sets"
FIGURES = (
    "published", "plain", "autograd", "compiled", "time", "speedup", "ms", "ns", "copy", "limit", "peak", "memory", "triton",
    "fresh",
)  # fmt: skip
_AT_MOST = ("time", "ms", "ns", "peak", "triton", "fresh")


@dataclass(frozen=True)
class Bar:
    """What a figure is held to: at most, or at least, ``bound``."""

    figure: str
    bound: float

    @property
    def at_most(self) -> bool:
        return self.figure in _AT_MOST

    def is_met(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def __str__(self) -> str:
        return f"{self.figure} {'<=' if self.at_most else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Entry:
    problem: Problem
    providers: tuple[str, ...] = ("eager",)
    bars: tuple[Bar, ...] = ()


Group = tuple[Entry, ...]  # what takes turns in one process


def read(*names: str) -> list[Group]:
    """The groups of some files of `sets/`, one after another."""
    return parse_lines([line for name in names for line in (FOLDER / f"{name}.txt").read_text().splitlines()])


def parse_lines(lines: Iterable[str]) -> list[Group]:
    groups: list[list[Entry]] = []
    known: set[Problem] = set()
    for line in lines:
        text = line.partition("#")[0].strip()
        if not text:
            continue
        entry = parse_entry(text.removeprefix("&"))
        if entry.problem in known:
            raise ValueError(f"set: expected each problem once, got {entry.problem} again")
        known.add(entry.problem)
        if not text.startswith("&"):
            groups.append([entry])
        elif not groups:
            raise ValueError(f"set: expected a problem before {line!r}")
        else:
            groups[-1].append(entry)
    for group in groups:
        if len({entry.problem.buffers for entry in group}) > 1:
            raise ValueError(f"set: expected one kind of buffers in a group, got {[str(e.problem) for e in group]}")
    return [tuple(group) for group in groups]


def parse_entry(text: str) -> Entry:
    problem, providers, bars, *more = [*text.split("|"), "", ""]
    if any(part.strip() for part in more):
        raise ValueError(f"set: expected PROBLEM | PROVIDERS | BARS, got {text!r}")
    return Entry(
        parse(problem.strip()),
        tuple(providers.split()) or ("eager",),
        tuple(_bar(bar.strip()) for bar in bars.split(";") if bar.strip()),
    )


def _bar(text: str) -> Bar:
    match = re.fullmatch(r"(\w+) (<=|>=) ([0-9.e+-]+)", text)
    if match is None or match[1] not in FIGURES:
        raise ValueError(f"bar: expected one of {FIGURES}, <= or >= and a number, got {text!r}")
    bar = Bar(match[1], float(match[3]))
    if bar.at_most != (match[2] == "<="):
        raise ValueError(f"bar: expected {bar}, got {text!r}")
    return bar


def with_bars(groups: Sequence[Group]) -> list[Group]:
    """Groups that have a bar, to be quick."""
    return [group for group in groups if any(entry.bars for entry in group)]
