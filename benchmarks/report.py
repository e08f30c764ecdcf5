"""From rows to CSV, and to the table with the bars that the measured ratios are held to."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import baselines
from .cases import Case
from .contestants import OURS

COLUMNS = (
    "case", "classes", "height", "width", "stride", "device", "dtype", "stream", "contestant", "schedule", "mode",
    "threads", "buffers", "median_ms", "p20_ms", "p80_ms", "runs", "ns_per_pixel", "times_ours", "ideal_mb", "gb_per_s",
    "copy_gb_per_s", "copy_fraction", "peak_extra_mb", "peak_over_cm",
    "peak_over_gradients", "page_faults", "cpu_share", "loss_error", "grad_seg_error",
    "grad_cm_error", "cpu", "cores", "isa", "torch", "python", "os", "date",
)  # fmt: skip

Row = Mapping[str, Any]

DISTURBED = 0.9  # of the cores that a row runs on: with less, it shared them with other processes


def write_csv(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _shown(row[key]) for key in columns})


def _shown(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def is_ours(row: Row) -> bool:
    return str(row["contestant"]).startswith(OURS)


KINDS: dict[str, tuple[str, ...]] = {
    "published": ("published",),
    "plain": baselines.PLAIN_NAMES,
    "autograd": ("log_space", *baselines.AUTOGRAD_NAMES),
}


def of_kind(rows: Sequence[Row], kind: str) -> list[Row]:
    """published | plain | autograd | compiled."""
    if kind == "compiled":
        return [row for row in rows if row["contestant"].startswith("compiled:")]
    return [row for row in rows if row["contestant"] in KINDS[kind]]


def fastest(rows: Sequence[Row], kind: str) -> Row | None:
    """The row that a bar of this kind refers to; one without a time (it did not fit) is none."""
    timed = [row for row in of_kind(rows, kind) if not math.isnan(row["median_ms"])]
    return min(timed, key=lambda row: float(row["median_ms"]), default=None)


def our_row(rows: Sequence[Row]) -> Row | None:
    """What ratios are taken against: ours under the default schedule, on the fewest threads."""
    return next((row for row in rows if is_ours(row)), None)


def thread_speedup(rows: Sequence[Row]) -> float | None:
    own = [row for row in rows if is_ours(row)]
    few, many = min(own, key=_threads, default=None), max(own, key=_threads, default=None)
    if few is None or many is None or few["threads"] == many["threads"]:
        return None
    return float(few["median_ms"]) / float(many["median_ms"])


def _threads(row: Row) -> int:
    return int(row["threads"])


def measured(rows: Sequence[Row], kind: str) -> float | None:
    if kind == "threads":
        return thread_speedup(rows)
    row = fastest(rows, kind)
    return None if row is None else float(row["times_ours"])


def _cell(rows: Sequence[Row], bars: Mapping[str, float], kind: str) -> str:
    """'>= 25x | 31.2x met' in one cell; the bare figure where no bar is set."""
    ratio = measured(rows, kind)
    if ratio is None:
        return "not run" if kind in bars else ""
    if kind not in bars:
        return f"{ratio:.1f}x"
    return f"{ratio:.1f}x, >= {bars[kind]:g}x {'met' if ratio >= bars[kind] else '**missed**'}"


def _describe(case: Case) -> str:
    grid = "pixel grid" if case.stride == 1 else f"stride {case.stride}"
    words = [f"C = {case.classes}", f"{case.height}x{case.width}", grid]
    if case.dtype != "float32":
        words.append(case.dtype)
    if case.stream == "negative":
        words.append("negative stream")
    if case.mode == "forward":
        words.append("forward only")
    if case.scale != 2.0:
        words.append(f"logits of scale {case.scale:g}")
    return ", ".join([*words, f"{case.buffers} buffers"])


def markdown(cases: Sequence[Case], rows: Sequence[Row], seconds: float) -> str:
    """The whole report. `cases` in the order to show; a case without rows is left out."""
    by_case = {case.name: [row for row in rows if row["case"] == case.name] for case in cases}
    shown = [case for case in cases if by_case[case.name]]
    lines = ["# CPU benchmark", ""]
    if rows:
        first = rows[0]
        lines += [
            f"{first['cpu']}, {first['cores']} cores, {first['isa']}; torch {first['torch']}, "
            f"Python {first['python']}, {first['os']}; {first['date']}. "
            "Every contestant passed the float64 check before it was timed. "
            f"{seconds:.0f} s in total.",
            "",
        ]
        disturbed = [row for row in rows if float(row["cpu_share"]) < DISTURBED * _threads(row)]
        if disturbed:
            lines += [
                f"**{len(disturbed)} of {len(rows)} rows were disturbed**: they had less than {100 * DISTURBED:.0f} % "
                "of the cores that they run on (cpu_share in the CSV). Run again with nothing else running.",
                "",
            ]
    lines += _bar_table(shown, by_case)
    lines += _resource_table(shown, by_case)
    for case in shown:
        lines += _case_table(case, by_case[case.name])
    return "\n".join(lines) + "\n"


def _bar_table(cases: Sequence[Case], by_case: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = [
        "## How many times faster",
        "",
        "Median time of the competitor over ours, float32, forward + backward unless stated, one thread. Best plain is "
        "the fastest eager formulation, including a gradient written by hand; by autograd is the fastest without that.",
        "",
        "| case | ours, ns per pixel | published | best plain PyTorch | (which) | best by autograd | torch.compile |",
        "|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rows, bars = by_case[case.name], dict(case.bars)
        own, plain = our_row(rows), fastest(rows, "plain")
        if plain is None:
            continue
        cells = [
            _describe(case),
            "not run" if own is None else f"{own['ns_per_pixel']:.1f}",
            _cell(rows, bars, "published"),
            _cell(rows, bars, "plain"),
            str(plain["contestant"]),
            _cell(rows, {}, "autograd"),
            _cell(rows, bars, "compiled"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _resource_table(cases: Sequence[Case], by_case: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = [
        "## Ours: bandwidth, memory, threads",
        "",
        "Bandwidth counts each logit read once, each gradient written once, each label read once. Extra memory is the "
        "peak over the inputs, gradients included.",
        "",
        "| case | schedule | threads | ns per pixel | GB/s | of copy | extra MB | of the CM logits | "
        "of both gradients | faults per run | CPU share | two threads |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rows = by_case[case.name]
        for row in filter(is_ours, rows):
            many = row["threads"] == max(case.threads) > min(case.threads)
            cells = [
                _describe(case),
                row["schedule"],
                str(row["threads"]),
                f"{row['ns_per_pixel']:.1f}",
                f"{row['gb_per_s']:.1f}",
                f"{100 * row['copy_fraction']:.0f} %",
                number(row["peak_extra_mb"], ".1f"),
                number(row["peak_over_cm"], ".2f"),
                number(row["peak_over_gradients"], ".2f"),
                f"{row['page_faults']:.0f}",
                f"{row['cpu_share']:.2f}",
                _cell(rows, dict(case.bars), "threads") if many else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def number(value: float, form: str, unit: str = "") -> str:
    return "" if math.isnan(value) else format(value, form) + unit


def _case_table(case: Case, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {case.name}: {_describe(case)}",
        "",
        "| contestant | schedule | threads | median ms | p20 | p80 | runs | ns per pixel | times ours | GB/s | "
        "extra MB | faults per run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: float(row["median_ms"])):
        cells = [
            row["contestant"],
            row["schedule"],
            str(row["threads"]),
            f"{row['median_ms']:.3f}",
            f"{row['p20_ms']:.3f}",
            f"{row['p80_ms']:.3f}",
            str(row["runs"]),
            f"{row['ns_per_pixel']:.1f}",
            f"{row['times_ours']:.2f}",
            f"{row['gb_per_s']:.2f}",
            number(row["peak_extra_mb"], ".1f"),
            f"{row['page_faults']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]
