"""The tables of the README and of the pages that are made of committed results, or of the constants of the tests:
`python -m benchmarks.tables` writes them anew.

A table lies between two comments, ``<!-- table NAME -->`` and ``<!-- end -->``; what is around it is written by hand.
tests/test_readme.py holds each to the results.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from tests import contract

from .problem import parse
from .report import Table, read_csv

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "benchmarks" / "results" / "xeon-processor-avx512-2-cores"
GPU = ROOT / "benchmarks" / "results" / "nvidia-h200"
PAGES = ("README.md", "docs/contract.md", "docs/memory.md", "docs/speed.md")
T = TypeVar("T")
_PLACE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)

_SPEED = (  # what it is, the problem as `python -m benchmarks` takes it
    ("C = 2, a matrix at every pixel", "c2 256x512"),
    ("C = 10, likewise", "c10 128x256"),
    ("C = 19, likewise", "c19 128x256"),
    ("C = 19, with malloc as it comes", "c19 256x512 fresh"),
    ("the same, PyTorch told to use huge pages", "c19 256x512 thp"),
    ("C = 19, matrices at every 8 pixels", "c19 256x512 cm8"),
    ("C = 19, one matrix", "c19 256x512 cmglobal"),
)
# Both threads beside one, and each kind of kernel.
_SHARES = (
    "c10 128x256",
    "c19 128x256",
    "c19 256x512",
    "c19 256x512 t2",
    "c19 256x512 cm8",
    "c19 256x512 cm8 t2",
    "c19 1024x2048 seg4 labels",
    "c19 1024x2048 seg4 labels t2",
)
_GPU = (
    ("pixel grid, float32", "c19 1024x2048 positive+negative noise"),
    ("pixel grid, bfloat16", "c19 1024x2048 bf16 positive+negative noise"),
    ("stride 8, float32", "c19 1024x2048 cm8 positive+negative noise"),
)
_MEMORY = (
    ("labels alone, against `F.interpolate` + `F.cross_entropy`", "c19 1024x2048 seg4 labels", ""),
    (
        "a field at stride 8 and one trusted negative layer",
        "c19 1024x2048 seg4 cm8 positive+trusted",
        " (gradients: 57)",
    ),
    ("`label_map`, against `F.interpolate(...).argmax(1)`", "c19 1024x2048 seg4 map", ""),
)
_STEPS = (
    ("ours", "cpu"),
    ("plain PyTorch, gradient derived by hand", "closed_form"),
    ("published formulation", "published"),
)
_SIZES = ("256x512", "512x1024", "1024x2048")


def speed(results: Path = CPU) -> list[str]:
    """Nanoseconds a pixel, and how many times as long the others take."""
    table = Table(read_csv(results / "results.csv"))
    lines = [
        "| problem | ours, ns per pixel | published (permute, bmm) | best plain PyTorch, gradient by autograd | "
        "best plain PyTorch, gradient derived by hand | torch.compile |",
        "|---|---|---|---|---|---|",
    ]
    for words, line in _SPEED:
        name = str(parse(line))
        own = _there(table.ours(name), name)
        ratios = [table.best(name, kind) for kind in ("published", "autograd", "plain", "compiled")]
        # the best that autograd differentiates is the best of all where nobody derived anything
        if ratios[2] == ratios[1]:
            ratios[2] = None
        shown = ["" if one is None else f"{_digits(table.times_ours(name, one))}x" for one in ratios]
        lines.append(f"| {words}: `{line}` | {table.ns(name, own):.0f} | {' | '.join(shown)} |")
    return lines


def shares(results: Path = CPU) -> list[str]:
    """How near the limits of the machine ours comes, what a second thread gives, and its peak."""
    table = Table(read_csv(results / "results.csv"))
    lines = [
        "| problem | nearest limit | reached | of a copy | one thread takes | peak over the inputs, MB | of it gradients |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in _SHARES:
        problem = parse(line)
        name, alone = str(problem), str(replace(problem, threads=1))
        own, limit, other = _there(table.ours(name), name), _there(table.limit(name), name), table.ours(alone)
        faster = ""
        if problem.threads > 1 and other is not None:
            faster = f"{table.value(alone, other) / table.value(name, own):.2f}x"
        cells = [f"`{line}`", limit.name, f"{100 * table.limit_share(name, own):.0f} %"]
        cells += [f"{100 * table.copy_share(name, own):.0f} %", faster]
        cells += [_digits(table.value(name, who, quantity)) for who, quantity in ((own, "peak"), ("", "gradients"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def errors(results: Path = CPU) -> list[str]:
    """The largest error of all problems, of ours and of plain PyTorch."""
    table = Table(read_csv(results / "results.csv"))
    lines = ["| storage | problems | who | loss | class logits | field |", "|---|---|---|---|---|---|"]
    for dtype, words in (("fp32", "float32"), ("bf16", "bfloat16")):
        problems = [name for name in table.problems if parse(name).dtype == dtype]
        for kind, who in (("ours", "ours"), ("plain", "plain PyTorch")):
            cells: list[str] = []
            verified: set[str] = set()
            for quantity in ("loss", "class logits", "field"):
                found = {
                    (name, provider): table.value(name, provider, f"error of {quantity}")
                    for name in problems
                    for provider in table.providers(name, kind)
                }
                known = {place: value for place, value in found.items() if not math.isnan(value)}
                verified |= {name for name, _ in known}
                cells.append(f"{max(known.values()):.0e}" if known else "")
            if any(cells):  # nothing of others is timed in every dtype
                lines.append(f"| {words} | {len(verified)} | {who} | {' | '.join(cells)} |")
    return lines


def gpu(results: Path = GPU) -> list[str]:
    """Times and memory on a GPU; in brackets times ours."""
    table = Table(read_csv(results / "results.csv"))
    lines = [
        "| C = 19, 1024x2048, both kinds | cuda | triton | of a device copy | published (permute, bmm) | best plain PyTorch | "
        "extra memory | of it gradients | plain PyTorch at least |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for words, line in _GPU:
        name = str(parse(line))
        published, plain = (_there(table.best(name, kind), name) for kind in ("published", "plain"))
        peaks = _there(table.peaks(name), name)
        cells = [f"{_digits(table.value(name, who))} ms" for who in ("cuda", "triton")]
        cells.append(f"{100 * table.copy_share(name, 'cuda'):.0f} %")
        cells += [
            f"{_digits(table.value(name, who))} ms ({_digits(table.times_ours(name, who))}x)"
            for who in (published, plain)
        ]
        cells += [f"{_digits(mb / 1e3)} GB" for mb in (peaks[0], table.value(name, "", "gradients"), peaks[1])]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def memory(results: Path = CPU) -> list[str]:
    """Peaks over the inputs, and times."""
    table = Table(read_csv(results / "results.csv"))
    lines = ["| | ours | plain PyTorch |", "|---|---|---|"]
    for words, line, note in _MEMORY:
        name = str(parse(line))
        own, plain = _there(table.ours(name), name), table.best(name, "plain")
        other = "" if plain is None else f"{table.value(name, plain, 'peak'):.0f} MB, {table.value(name, plain):.0f} ms"
        peak, time = table.value(name, own, "peak"), table.value(name, own)
        lines.append(f"| {words} | **{peak:.0f} MB**{note}, {time:.0f} ms | {other} |")
    return lines


def step(results: Path = CPU) -> list[str]:
    """Peaks and seconds of a training step, and the largest image that fits."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in (results / "step.md").read_text().splitlines()]
    largest = {row[0]: row[1:] for row in rows if row and re.fullmatch(r"\d+ GB", row[0])}
    lines = [
        f"| | {' | '.join(_SIZES)} | the largest image in 8 GB | in 16 GB |",
        f"|{'---|' * (len(_SIZES) + 3)}",
    ]
    for place, (words, provider) in enumerate(_STEPS):
        cells = []
        for size in _SIZES:
            found = [
                row
                for row in rows
                if row and f" {size} " in row[0] and " positive+trusted " in row[0] and row[1].startswith(provider)
            ]
            assert len(found) == 1, f"{size} {provider}: {len(found)} rows in {results / 'step.md'}"
            gigabytes, seconds = float(found[0][2]), float(found[0][4].split()[0])
            cells.append(f"{gigabytes:.{2 if gigabytes < 0.995 else 1}f} GB, {_digits(seconds)} s")
        cells[-1] = f"**{cells[-1]}**" if place == 0 else cells[-1]
        cells += [largest[f"{gigabytes} GB"][place].split()[0] for gigabytes in (8, 16)]
        lines.append(f"| {words} | {' | '.join(cells)} |")
    return lines


def bounds() -> list[str]:
    """What the tests allow beside the error of plain PyTorch."""
    return contract.table().splitlines()


TABLES = {
    "speed": speed,
    "shares": shares,
    "gpu": gpu,
    "memory": memory,
    "step": step,
    "bounds": bounds,
    "errors": errors,
}


def _there(found: T | None, problem: str) -> T:
    assert found is not None, f"{problem}: not in the committed results"
    return found


def _digits(value: float) -> str:
    """Two of them, or all before the point."""
    decimals = max(0, 1 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{decimals}f}"


def updated(text: str) -> str:
    """A page with its tables as the results are now."""
    return _PLACE.sub(lambda place: "\n".join((place[1], *TABLES[place[2]](), "", place[3])), text)


if __name__ == "__main__":
    for page in PAGES:
        path = ROOT / page
        path.write_text(updated(path.read_text()))
