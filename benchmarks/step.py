"""A training step, not only the operator: `make bench-step`, or `python -m benchmarks.step`.

A Cityscapes-shaped step (network `street` of coarse_train, class logits at stride 4, AdamW), with each formulation of the loss:
images a second, peak memory of the process (on a GPU of its allocator), and from these the largest image that fits into 8, 16,
24 and 80 GB.

    python -m benchmarks.step                              1024x2048 with 19 classes; about a quarter of an hour on two cores
    python -m benchmarks.step "c19 512x1024 seg4 cm8 positive+trusted t2 fresh" --provider cpu published    only printed

Every size is a process of its own. Memory grows with the pixels along a line: it is measured at an eighth, a quarter, a half
and the whole of each side, and what does not fit into free memory is computed from the two largest sizes that do, and marked.
The largest images are computed from the same line; where this machine has the memory they are trained for a step, too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from . import limits
from .problem import Problem, parse

ROOT = Path(__file__).resolve().parent.parent
# The recommended configuration first: free matrices on both kinds are degenerate.
PROBLEMS = (
    "c19 1024x2048 seg4 cm8 positive+trusted t2 fresh",
    "c19 1024x2048 seg4 cm8 positive+negative t2 fresh",
)
PLAIN = ("closed_form_uniform_matmul", "closed_form_matmul")  # the best of plain PyTorch where it serves
PROVIDERS = ("ours", "plain", "published")
WIDTHS = (32, 64, 128, 192)
LIMITS_GB = (8, 16, 24, 80)
GB = 1e9
SAFE_SHARE = 0.9  # of the memory that is free: more than that is not tried
SLACK = 1.03  # by which a confirmed peak may lie above what was computed
AGREEMENT = 1e-3  # relative difference of the first losses, of the same networks


class Measured(NamedTuple):
    peak: float  # bytes
    seconds: float  # median of the steps after the first
    least: float  # the fastest, and the slowest
    most: float
    loss: float  # of the first step
    what: str  # computed the loss


def step(line: str, name: str, device: str, steps: int) -> Measured:
    """Train ``steps`` + 1 steps in this process; the first warms up."""
    import resource

    import torch

    from coarse_train.config import DrawingsConfig, FitConfig, ModelConfig
    from coarse_train.model import build_model, parameter_groups

    from .problem import make_inputs
    from .providers import choose, kernels

    problem = parse(line)
    torch.set_num_threads(problem.threads)
    chosen = [one for word in (PLAIN if name == "plain" else (name,)) for one in choose(problem, device, [word])[0]]
    if not chosen:
        raise ValueError(f"provider: expected one that computes {line!r}, got {name!r}")
    provider = chosen[0]
    field = DrawingsConfig(cm="grid", stride=int(problem.field))
    of = [field if kind.has_field else DrawingsConfig() for kind in problem.kinds]
    config = FitConfig(model=ModelConfig(network="street", widths=WIDTHS), positive=of[0], negative=of[1])
    torch.manual_seed(0)
    model = build_model(config, 3, problem.classes, None).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim))
    image = torch.rand(problem.images, 3, *problem.size).to(device)
    data = make_inputs(problem, device)  # of which the drawings are taken
    data = data._replace(kinds=tuple(dataclasses.replace(kind, cm_logits=None) for kind in data.kinds))
    losses: list[float] = []
    seconds: list[float] = []
    ran = ""
    for _ in range(steps + 1):
        started = time.perf_counter()
        out = model(image)
        kinds = tuple(
            dataclasses.replace(kind, cm_logits=cm)
            for kind, cm in zip(data.kinds, (out.positive_cm, out.negative_cm), strict=True)
        )
        given = data._replace(seg_logits=out.seg_logits, kinds=kinds)
        ran = kernels(provider, given) if not losses else ran
        loss = provider.prepare(problem, given)()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del loss, out, kinds, given
        seconds.append(time.perf_counter() - started)
    if torch.device(device).type == "cuda":
        peak = float(torch.cuda.max_memory_reserved())
    else:
        unit = 1.0 if sys.platform == "darwin" else 1024.0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    times = seconds[1:] or seconds
    what = f"{provider.name}: {ran}" if ran else provider.name
    return Measured(peak, statistics.median(times), min(times), max(times), losses[0], what)


def measure(line: str, name: str, device: str, steps: int) -> Measured:
    """`step` in a process of its own."""
    order = json.dumps([line, name, device, steps])
    command = [sys.executable, "-m", "benchmarks.step", "--worker", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"{name}, {line}: ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return Measured(*json.loads(done.stdout.splitlines()[-1]))


# ---- sizes -----------------------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """Memory over pixels: bytes at none, and bytes a pixel."""

    start: float
    slope: float

    def at(self, pixels: float) -> float:
        return self.start + self.slope * pixels

    def largest(self, problem: Problem, most_bytes: float) -> Problem:
        """The problem on the largest image of its shape that fits, sides in multiples of 32 pixels; at least 32."""
        pixels = max(0.0, (most_bytes - self.start) / max(self.slope, 1.0))  # a pixel takes a byte at the least
        height = math.sqrt(pixels * problem.height / problem.width)
        width = height * problem.width / problem.height
        return replace(problem, height=max(32, int(height) // 32 * 32), width=max(32, int(width) // 32 * 32))


def line_through(points: Sequence[tuple[float, float]]) -> Line:
    """Through the two largest sizes of (pixels, bytes)."""
    (x0, y0), (x1, y1) = sorted(points)[-2:]
    slope = (y1 - y0) / (x1 - x0)
    return Line(y1 - slope * x1, slope)


def free_bytes(device: str) -> float:
    """That a new process may take; 0 where nothing tells."""
    if device != "cpu":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0.0
    try:  # of a container
        limit, used = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        return free if limit == "max" else min(free, float(limit) - float(used))
    except OSError:
        return free


Row = dict[str, Any]


def compare(line: str, names: Sequence[str], device: str, steps: int) -> tuple[list[Row], dict[str, Line]]:
    """Rows, the whole image first, and of each provider its memory over pixels."""
    problem = parse(line)
    rows: list[Row] = []
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for part in (8, 4, 2, 1):
        size = replace(problem, height=problem.height // part, width=problem.width // part)
        first: float | None = None
        for name in names:
            about = {"problem": str(size), "provider": name}
            known = points[name]
            if len(known) > 1 and line_through(known).at(size.pixels) > SAFE_SHARE * free_bytes(device):
                rows.append({**about, "peak": line_through(known).at(size.pixels), "how": "computed"})
                continue
            try:
                found = measure(str(size), name, device, steps)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                rows.append({**about, "peak": math.nan, "how": "failed: see what it printed"})
                continue
            first = found.loss if first is None else first
            if abs(found.loss - first) > AGREEMENT * abs(first):
                raise RuntimeError(f"{size}: the losses of {names[0]} and {name} differ, {first} and {found.loss}")
            known.append((size.pixels, found.peak))
            measured = {"seconds": found.seconds, "least": found.least, "most": found.most, "steps": steps}
            rows.append({**about, **measured, "what": found.what, "peak": found.peak, "how": "measured"})
            print(f"{size}: {name} {found.peak / GB:.2f} GB, {found.seconds:.2f} s", file=sys.stderr, flush=True)
    rows.sort(key=lambda row: -parse(row["problem"]).pixels)
    return rows, {name: line_through(known) for name, known in points.items() if len(known) > 1}


def fitting(line: str, lines: dict[str, Line], device: str, *, confirm: bool) -> list[Row]:
    """The largest image for each provider and memory; trained for a step where this machine has as much."""
    rows = []
    for name, memory in lines.items():
        for limit in LIMITS_GB:
            size = memory.largest(parse(line), limit * GB)
            row: Row = {"provider": name, "limit": limit, "size": f"{size.height}x{size.width}", "peak": math.nan}
            if confirm and limit * GB < SAFE_SHARE * free_bytes(device):
                try:  # the second step has what the optimiser keeps
                    row["peak"] = measure(str(size), name, device, 1).peak
                except RuntimeError as error:
                    row["peak"] = math.inf
                    print(error, file=sys.stderr)
                print(f"{name}, {limit} GB: {row['size']}, {row['peak'] / GB:.2f} GB", file=sys.stderr, flush=True)
            rows.append(row)
    return rows


# ---- words -----------------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| problem | loss by | peak memory, GB | images a second | s a step (least to most of the steps) | |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = ["not run"] * 2
        if "seconds" in row:
            spread = f"{row['seconds']:.2f} ({row['least']:.2f} to {row['most']:.2f} of {row['steps']})"
            times = [f"{parse(row['problem']).images / row['seconds']:.2f}", spread]
        peak = "" if math.isnan(row["peak"]) else f"{row['peak'] / GB:.2f}"
        who = row.get("what", row["provider"])
        lines.append(f"| `{row['problem']}` | {who} | {peak} | {' | '.join(times)} | {row['how']} |")
    return [*lines, ""]


def fitting_table(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row["provider"] for row in rows))
    lines = [f"| memory | {' | '.join(names)} |", f"|---|{'---|' * len(names)}"]
    for limit in LIMITS_GB:
        own = {row["provider"]: row for row in rows if row["limit"] == limit}
        cells = []
        for name in names:
            row = own[name]
            peak = row["peak"]
            confirmed = "computed" if math.isnan(peak) else f"a step took {peak / GB:.2f} GB"
            confirmed = "computed; a step FAILED" if peak == math.inf else confirmed
            cells.append(f"{row['size']} ({confirmed})")
        lines.append(f"| {limit} GB | {' | '.join(cells)} |")
    return [*lines, ""]


def exceeded(rows: Sequence[Row]) -> list[str]:
    """Where a step at the size that was computed took more than its limit."""
    return [
        f"{row['provider']} at {row['size']}: {row['peak'] / GB:.2f} GB, computed for {row['limit']} GB"
        for row in rows
        if row["peak"] > SLACK * row["limit"] * GB
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", nargs="*", help="two kinds of drawings, seg4, fields on a grid, fresh")
    parser.add_argument("--provider", nargs="+", default=PROVIDERS, help="of the loss; the first is compared with")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one that warms up")
    parser.add_argument(
        "--largest", action="store_true", help="of named problems too: the largest images, by the first one"
    )
    parser.add_argument("--no-confirm", action="store_true", help="compute the largest images, and train none of them")
    parser.add_argument(
        "--out", type=Path, help="folder; without it benchmarks/results/HARDWARE, and of named problems none"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        print(json.dumps(step(*json.loads(options.worker))))
        return 0
    started = time.monotonic()
    lines = options.problem or PROBLEMS
    for line in lines:
        problem = parse(line)
        fits = len(problem.kinds) == 2 and problem.seg_stride == 4 and problem.field.isdigit()
        if not fits or (problem.dtype, problem.mode, problem.buffers) != ("fp32", "fb", "fresh"):
            parser.error(
                f"problem: expected two kinds of drawings, seg4, a field on a grid, fp32, fb and fresh buffers, got {line!r}"
            )
    rows: list[Row] = []
    largest: list[Row] = []
    for k, line in enumerate(lines):
        found, memory = compare(line, options.provider, options.device, options.steps)
        rows += found
        if k == 0 and (options.largest or not options.problem):
            largest = fitting(line, memory, options.device, confirm=not options.no_confirm)
    machine = limits.machine(options.device)
    facts = "; ".join(
        f"{key} {machine[key]}" for key in ("cpu", "gpu", "cores", "torch", "python", "os") if machine.get(key)
    )
    text = [
        "# A training step",
        "",
        f"{facts}; {time.monotonic() - started:.0f} s. Network `street` of widths {WIDTHS}, AdamW, forward, backward and "
        'update; peak resident memory of the process (on a GPU: of its allocator), interpreter and libraries included. "ours" '
        "is one call of `annotation_objective`; the others interpolate class logits and fields with PyTorch first.",
        "",
        *table(rows),
    ]
    if largest:
        text += [
            f"## The largest image, of `{lines[0]}`",
            "",
            "Sides in the same ratio, multiples of 32.",
            "",
            *fitting_table(largest),
        ]
    over = exceeded(largest)
    text += [f"**More than computed:** {line}" for line in over]
    if options.out or not options.problem:  # a few rows do not take the place of all
        folder = options.out or ROOT / "benchmarks" / "results" / limits.hardware_name(options.device)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("\n".join(text))
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
