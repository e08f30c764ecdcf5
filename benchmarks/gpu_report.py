"""From the rows of a GPU run to its CSV columns, and to the report: targets, table, every contestant."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from . import report
from .cases import Case
from .contestants import OURS
from .gpu_cases import Target
from .report import Row

COLUMNS = (
    "case", "classes", "height", "width", "stride", "device", "dtype", "stream", "labels", "contestant", "schedule",
    "mode", "threads", "status", "median_ms", "p20_ms", "p80_ms", "runs", "host_ms", "ns_per_pixel", "times_ours",
    "ideal_mb", "gb_per_s", "copy_gb_per_s", "copy_fraction", "peak_extra_mb", "peak_over_cm", "peak_over_gradients",
    "needs_gb", "page_faults", "loss_error", "grad_seg_error", "grad_cm_error", "grad_negative_cm_error", "gpu",
    "driver", "cuda", "torch", "triton", "python", "os", "cpu", "date", "commit", "command",
)  # fmt: skip


# --- figures that targets are about -----------------------------------------------------------------------------------


def ours(rows: Sequence[Row], backend: str | None = None) -> Row | None:
    """Our row under the first schedule: of a backend, or of the first in the table (cuda, where it runs)."""
    return next(
        (row for row in rows if report.is_ours(row) and (backend is None or row["contestant"] == f"{OURS}:{backend}")),
        None,
    )


def _times(kind: str) -> Callable[[Sequence[Row]], float | None]:
    def ratio(rows: Sequence[Row]) -> float | None:
        row = report.fastest(rows, kind)
        return None if row is None else float(row["times_ours"])

    return ratio


def _column(column: str, factor: float = 1.0) -> Callable[[Sequence[Row]], float | None]:
    def value(rows: Sequence[Row]) -> float | None:
        row = ours(rows)
        return None if row is None or math.isnan(row[column]) else factor * float(row[column])

    return value


def least_memory(rows: Sequence[Row]) -> Row | None:
    """The plain PyTorch formulation that takes least, which need not be the fastest."""
    plain = [row for row in rows if row["contestant"] in report.KINDS["plain"] and not math.isnan(row["peak_extra_mb"])]
    return min(plain, key=lambda row: float(row["peak_extra_mb"]), default=None)


def _memory(rows: Sequence[Row]) -> float | None:
    own, plain = ours(rows), least_memory(rows)
    if own is None or plain is None or not own["peak_extra_mb"] > 0:
        return None
    return float(plain["peak_extra_mb"]) / float(own["peak_extra_mb"])


def _triton_over_cuda(rows: Sequence[Row]) -> float | None:
    cuda, triton = ours(rows, "cuda"), ours(rows, "triton")
    return None if cuda is None or triton is None else float(triton["median_ms"]) / float(cuda["median_ms"])


# what: (name, value, whether less is better, unit)
MEASURES: dict[str, tuple[str, Callable[[Sequence[Row]], float | None], bool, str]] = {
    "ms": ("time", _column("median_ms"), True, " ms"),
    "copy": ("bandwidth, of a copy", _column("copy_fraction", 100.0), False, " %"),
    "plain": ("times faster than the best plain PyTorch", _times("plain"), False, "x"),
    "compiled": ("times faster than torch.compile of it", _times("compiled"), False, "x"),
    "peak_gb": ("peak extra memory", _column("peak_extra_mb", 1e-3), True, " GB"),
    "memory": ("times less memory than any plain PyTorch", _memory, False, "x"),
    "triton": ("triton, over cuda", _triton_over_cuda, True, "x"),
}


def judged(target: Target, rows: Sequence[Row]) -> tuple[float | None, bool]:
    """The measured figure, in the unit of the target, and whether it meets it."""
    _, value, less, unit = MEASURES[target.what]
    found = value([row for row in rows if row["case"] == target.case])
    bound = 100.0 * target.bound if unit == " %" else target.bound
    return found, found is not None and (found <= bound if less else found >= bound)


# --- the report -------------------------------------------------------------------------------------------------------


def markdown(
    cases: Sequence[Case],
    rows: Sequence[Row],
    targets: Sequence[Target],
    complaints: Sequence[str],
    notes: Sequence[str],
    seconds: float,
) -> str:
    """``cases`` in the order to show; ``complaints``: what was wrong; ``notes``: what was not run, and why."""
    by_case = {case.name: [row for row in rows if row["case"] == case.name] for case in cases}
    lines = ["# GPU benchmark", ""]
    if rows:
        lines += _conditions(rows, seconds)
    if complaints:
        lines += ["**Wrong or failed, and therefore not timed:**", "", *(f"- {line}" for line in complaints), ""]
    lines += _targets(cases, targets, rows)
    lines += _table([case for case in cases if by_case[case.name]], by_case)
    for case in cases:
        if by_case[case.name]:
            lines += _case_table(case, by_case[case.name])
    if notes:
        lines += ["## Not run", "", *(f"- {line}" for line in notes), ""]
    return "\n".join(lines) + "\n"


def _conditions(rows: Sequence[Row], seconds: float) -> list[str]:
    first = rows[0]
    copies = sorted(float(row["copy_gb_per_s"]) for row in rows)
    lines = []
    if str(first["device"]) == "cpu":
        lines += ["**A rehearsal on the CPU: it shows that the harness works. No figure here is about a GPU.**", ""]
    return [
        *lines,
        f"{first['gpu']}, driver {first['driver']}, CUDA {first['cuda']}; torch {first['torch']}, Triton "
        f"{first['triton']}, Python {first['python']}, {first['os']}; {first['date']}, commit {first['commit']}; "
        f"`{first['command']}`, {seconds:.0f} s.",
        "",
        f"A device copy in the same run: {copies[0]:.0f} to {copies[-1]:.0f} GB/s, read + written. Every figure is of a "
        "contestant whose loss and gradients passed the float64 check on the very inputs that were timed. How it is "
        "measured: [README](../README.md).",
        "",
    ]


def _shown(value: float, unit: str) -> str:
    return f"{value:.3g}{unit}" if unit != " %" else f"{value:.0f} %"


def _targets(cases: Sequence[Case], targets: Sequence[Target], rows: Sequence[Row]) -> list[str]:
    described = {case.name: describe(case) for case in cases}
    lines = ["## Targets", "", "| case | target | measured | |", "|---|---|---|---|"]
    for target in targets:
        name, _, less, unit = MEASURES[target.what]
        found, met = judged(target, rows)
        bound = 100.0 * target.bound if unit == " %" else target.bound
        sign = "<=" if less else ">="
        verdict = "not measured" if found is None else "met" if met else "**missed**"
        measured = "" if found is None else _shown(found, unit)
        where = described.get(target.case, target.case)
        lines.append(f"| {where} | {name} {sign} {_shown(bound, unit)} | {measured} | {verdict} |")
    return [*lines, ""]


def describe(case: Case) -> str:
    grid = "pixel grid" if case.stride == 1 else f"stride {case.stride}"
    streams = {"both": "both streams", "positive": "positive stream", "negative": "negative stream"}
    words = [f"C = {case.classes}", f"{case.height}x{case.width}", grid, case.dtype, streams[case.stream]]
    if case.mode == "forward":
        words.append("forward only")
    if case.labels == "random":
        words.append("every pixel labelled at random")
    return ", ".join(words)


def _milliseconds(row: Row | None) -> str:
    if row is None:
        return ""
    return str(row["status"]) if row["status"] != "ok" else f"{row['median_ms']:.3f}"


def _table(cases: Sequence[Case], by_case: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = [
        "## Table",
        "",
        "Milliseconds are medians; ratios are the competitor's over ours (the first of cuda and triton). Best plain is "
        "the fastest eager formulation, by autograd the fastest without a gradient written by hand. Forward + backward "
        "unless stated.",
        "",
        "| case | cuda ms | triton ms | GB/s | of copy | extra GB | published | best plain | (which) | by autograd | "
        "torch.compile | least plain extra GB |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for case in cases:
        rows = by_case[case.name]
        own, plain, least = ours(rows), report.fastest(rows, "plain"), least_memory(rows)
        assert own is not None  # nobody is timed where none of ours is right
        cells = [
            describe(case),
            _milliseconds(ours(rows, "cuda")),
            _milliseconds(ours(rows, "triton")),
            report.number(own["gb_per_s"], ".0f"),
            report.number(100 * own["copy_fraction"], ".0f", " %"),
            report.number(own["peak_extra_mb"] / 1e3, ".3g"),
            _ratio(rows, "published"),
            _ratio(rows, "plain"),
            "" if plain is None else str(plain["contestant"]),
            _ratio(rows, "autograd"),
            _ratio(rows, "compiled"),
            "" if least is None else f"{least['peak_extra_mb'] / 1e3:.3g}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _ratio(rows: Sequence[Row], kind: str) -> str:
    row = report.fastest(rows, kind)
    if row is not None:
        return f"{row['times_ours']:.1f}x"
    too_large = [row for row in report.of_kind(rows, kind) if row["status"] != "ok"]
    return _unfit(too_large[0]) if too_large else ""


def _unfit(row: Row) -> str:
    needs = "an unknown amount" if math.isnan(row["needs_gb"]) else f"{row['needs_gb']:.0f} GB, computed"
    return f"{row['status']} (needs {needs})"


def _case_table(case: Case, rows: Sequence[Row]) -> list[str]:
    lines = [
        f"## {describe(case)}",
        "",
        f"`{case.name}`: at least {rows[0]['ideal_mb'] / 1e3:.3g} GB have to move.",
        "",
        "| contestant | schedule | median ms | p20 | p80 | runs | host ms | times ours | GB/s | of copy | extra GB | "
        "of the gradients | mallocs per run |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: (math.isnan(row["median_ms"]), float(row["median_ms"]))):
        if row["status"] != "ok":
            cells = [str(row["contestant"]), str(row["schedule"]), _unfit(row), *[""] * 10]
        else:
            cells = [
                row["contestant"],
                row["schedule"],
                f"{row['median_ms']:.3f}",
                f"{row['p20_ms']:.3f}",
                f"{row['p80_ms']:.3f}",
                str(row["runs"]),
                f"{row['host_ms']:.3f}",
                f"{row['times_ours']:.2f}",
                f"{row['gb_per_s']:.0f}",
                f"{100 * row['copy_fraction']:.0f} %",
                report.number(row["peak_extra_mb"] / 1e3, ".3g"),
                report.number(row["peak_over_gradients"], ".2f"),
                report.number(row["page_faults"], ".0f"),
            ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return [*lines, ""]


def with_run(rows: Sequence[dict[str, Any]], commit: str, command: str) -> list[dict[str, Any]]:
    """What only the command knows about a row; and where there is no GPU, that there is none."""
    missing = dict.fromkeys(("gpu", "driver", "cuda", "triton"), "none")
    return [{**missing, **row, "commit": commit, "command": command} for row in rows]
