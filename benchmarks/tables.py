"""The tables of the README and of the pages that are made of committed results, or of the constants of the tests:
`python -m benchmarks.tables` writes them anew.

A table lies between two comments, ``<!-- table NAME -->`` and ``<!-- end -->``; what is around it is written by hand.
tests/test_readme.py holds each to the results.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

from tests import contract

from .problem import parse
from .report import Table, read_csv

ROOT = Path(__file__).resolve().parents[1]
CPU = ROOT / "benchmarks" / "results" / "xeon-processor-avx512-2-cores"
PAGES = ("README.md", "docs/contract.md", "docs/memory.md", "docs/speed.md")
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
        own = table.ours(name)
        assert own is not None, f"{name}: not in {results}"
        ratios = [table.best(name, kind) for kind in ("published", "autograd", "plain", "compiled")]
        # the best that autograd differentiates is the best of all where nobody derived anything
        if ratios[2] == ratios[1]:
            ratios[2] = None
        shown = ["" if one is None else f"{_digits(table.times_ours(name, one))}x" for one in ratios]
        lines.append(f"| {words}: `{line}` | {table.ns(name, own):.0f} | {' | '.join(shown)} |")
    return lines


def memory(results: Path = CPU) -> list[str]:
    """Peaks over the inputs, and times."""
    table = Table(read_csv(results / "results.csv"))
    lines = ["| | ours | plain PyTorch |", "|---|---|---|"]
    for words, line, note in _MEMORY:
        name = str(parse(line))
        own, plain = table.ours(name), table.best(name, "plain")
        assert own is not None, f"{name}: not in {results}"
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
                if row and row[0].startswith("`c19 ") and f" {size} " in row[0] and row[1].startswith(provider)
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


TABLES = {"speed": speed, "memory": memory, "step": step, "bounds": bounds}


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
