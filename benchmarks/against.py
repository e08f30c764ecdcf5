"""Ours in this checkout against ours in another one: `python -m benchmarks.against OTHER_CHECKOUT [PROBLEM ...]`.

    python -m benchmarks.against ../before                       every problem of the CPU set
    python -m benchmarks.against ../before "c19 256x512 cm8"     some; --full: all there are

Two processes per problem, each with the `coarse_kernels` of its own checkout (built, with `annotation_objective` as it is
here) and both with the problems and clocks of this one. Both check their results against float64. Then they take turns: an
untimed run and some 50 ms of timed ones, while the other process waits for input; from round to round the other one begins. A
round gives one ratio of times, this checkout over the other: above 1, this one is slower. The table has the median over the
rounds of both times and of the ratio, with p20 and p80 of the ratio.

Exit status: 0; 1 if either was wrong (it is not timed) or a process failed; 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import coarse_kernels

from . import limits, report, run, sets
from .meters import CpuMeter, percentile
from .problem import Problem, make_inputs, parse
from .providers import choose, setting
from .verify import Call, complaint, errors, find_truth, verified_problem

TURN = 0.05  # seconds of timed runs in a turn, if one run is not longer
MOST_RUNS = 20  # in a turn
LEAST_ROUNDS, MOST_ROUNDS = 5, 60
BUDGET = 8.0  # seconds per row, both together
EVENT = "AGAINST "  # begins a line of JSON

# The package under test from one root, the harness from another; both roots have both. Not from the current folder.
START = """
import sys
checkout, harness, task = sys.argv[1:]
sys.path.insert(0, checkout)
import coarse_kernels
sys.path[0] = harness
from benchmarks.against import serve
serve(task)
"""


# ---- in a process of one checkout ------------------------------------------------------------------------------------


def _say(answer: dict[str, Any]) -> None:
    print(EVENT + json.dumps(answer), flush=True)


def serve(order: str) -> None:
    """Answer requests from standard input, a line each: verify, or run: once untimed, then timed."""
    task = json.loads(order)
    problem = parse(task["problem"])
    torch.set_num_threads(problem.threads)
    (provider,) = choose(problem, "cpu", [task["provider"]])[0]
    call = Call(problem, provider, make_inputs(problem))
    meter = CpuMeter()
    _say({"package": str(Path(coarse_kernels.__file__).resolve().parent), "torch": torch.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "verify":
            small = verified_problem(problem, "cpu")
            inputs = call.inputs if small == problem else make_inputs(small)
            checked = Call(small, provider, inputs)
            truth = find_truth(small, inputs)
            (reference,) = choose(small, "cpu", ["reference"])[0]
            usual = errors(Call(small, reference, inputs), truth)
            _say({"wrong": complaint(small, errors(checked, truth), usual)})
            del inputs, checked, truth
            gc.collect()
            gc.disable()
            continue
        samples = []
        with setting(provider, problem.threads):
            for _ in range(request["runs"] + 1):
                call.before()
                samples.append(meter.timed(call))
        call.after()
        timed = samples[1:]
        seconds = sum(one.seconds for one in timed)
        _say(
            {
                "seconds": statistics.median(one.seconds for one in timed),
                "cpu_share": sum(one.cpu_seconds for one in timed) / seconds,
            }
        )
        gc.collect(0)


# ---- the two of them -------------------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A process ended, or has the wrong package."""


class Worker:
    """A process with one checkout's `coarse_kernels`, for one problem."""

    def __init__(self, checkout: Path, task: dict[str, Any]):
        problem = parse(task["problem"])
        environment = run.environment(problem.buffers, problem.threads)
        environment.pop("PYTHONPATH")  # `START` says where from
        command = [sys.executable, "-c", START, str(checkout), str(run.ROOT), json.dumps(task)]
        self.checkout = checkout
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=checkout
        )
        package = Path(self._answer()["package"])
        if package != checkout / "coarse_kernels":
            self.close()
            raise Failed(f"{checkout}: coarse_kernels came from {package}")

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(EVENT):
                answer: dict[str, Any] = json.loads(line[len(EVENT) :])
                return answer
        raise Failed(f"{self.checkout}: ended with status {self.process.wait()}")

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended: `_answer` says so
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


@contextmanager
def workers(checkouts: Sequence[Path], task: dict[str, Any]) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        for checkout in checkouts:
            started.append(Worker(checkout, task))
        yield started
    finally:
        for worker in started:
            worker.close()


@dataclass(frozen=True)
class Result:
    problem: Problem
    provider: str
    this_ms: float
    other_ms: float
    ratio: float  # medians over the rounds
    ratio_p20: float
    ratio_p80: float
    rounds: int
    cpu_share: float  # of the worse of the two


def take_turns(pair: Sequence[Worker], problem: Problem, provider: str, budget: float, most: int) -> Result:
    """One row. ``pair``: this checkout, the other."""
    estimate = max(worker.ask(do="time", runs=1)["seconds"] for worker in pair)
    runs = max(1, min(MOST_RUNS, int(TURN / estimate)))
    rounds = max(min(LEAST_ROUNDS, most), min(most, int(budget / (2 * (runs + 1) * estimate))))
    seconds: list[list[float]] = [[], []]
    shares: list[list[float]] = [[], []]
    for turn in range(rounds):
        for who in (0, 1) if turn % 2 == 0 else (1, 0):
            answer = pair[who].ask(do="time", runs=runs)
            seconds[who].append(answer["seconds"])
            shares[who].append(answer["cpu_share"])
    ratios = [this / other for this, other in zip(*seconds, strict=True)]
    return Result(
        problem,
        provider,
        1e3 * statistics.median(seconds[0]),
        1e3 * statistics.median(seconds[1]),
        statistics.median(ratios),
        percentile(ratios, 0.2),
        percentile(ratios, 0.8),
        rounds,
        min(statistics.mean(share) for share in shares),
    )


def compare(problem: Problem, provider: str, checkouts: Sequence[Path], options: argparse.Namespace) -> Result | str:
    """A row, or why there is none."""
    try:
        with workers(checkouts, {"problem": str(problem), "provider": provider}) as pair:
            found = [(worker.checkout, worker.ask(do="verify")["wrong"]) for worker in pair]
            if wrong := "; ".join(f"{checkout}: {why}" for checkout, why in found if why):
                return f"{wrong}; not timed"
            return take_turns(pair, problem, provider, options.budget, options.rounds)
    except Failed as failure:
        return str(failure)


HEADER = """\
| problem | ours | this, ms | other, ms | this / other | p20 to p80 | rounds | remark |
|---|---|---|---|---|---|---|---|"""


def line(row: Result) -> str:
    threads = row.problem.threads
    cells = [
        f"`{row.problem}`",
        row.provider,
        f"{row.this_ms:.3f}",
        f"{row.other_ms:.3f}",
        f"{row.ratio:.3f}",
        f"{row.ratio_p20:.3f} to {row.ratio_p80:.3f}",
        str(row.rounds),
        f"disturbed: {row.cpu_share:.2f} of {threads} cores" if row.cpu_share < report.DISTURBED * threads else "",
    ]
    return f"| {' | '.join(cells)} |"


def rows_of(options: argparse.Namespace) -> list[tuple[Problem, str]]:
    """Problems, and ours under the schedules that the set has."""
    if options.problem:
        return [(parse(one), name) for one in options.problem for name in options.provider or ("cpu",)]
    groups = sets.read("cpu", "cpu-full") if options.full else sets.read("cpu")
    found = []
    for entry in (entry for group in groups for entry in group):
        names = options.provider or ["cpu", *(["cpu/recompute"] if "recompute" in entry.providers else [])]
        found += [(entry.problem, name) for name in names]
    return found


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="root of the other checkout, built")
    parser.add_argument("problem", nargs="*", help="lines; without one the CPU set")
    parser.add_argument("--full", action="store_true", help="also the problems that only the full table has")
    parser.add_argument("--provider", nargs="+", help="whose kernels are compared; cpu")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of runs per row, both together")
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="most rounds per row")
    options = parser.parse_args(argv)
    options.other = options.other.resolve()
    if not (options.other / "coarse_kernels" / "__init__.py").is_file():
        parser.error(f"OTHER_CHECKOUT: expected a folder with coarse_kernels in it, got {options.other}")
    if options.rounds < 1:
        parser.error(f"--rounds: expected at least 1, got {options.rounds}")
    try:
        options.rows = rows_of(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse_arguments(argv)
    reason = None if options.provider else run.nothing_to_measure("cpu")
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    machine = limits.machine("cpu")
    print("; ".join(f"{key} {machine[key]}" for key in ("cpu", "cores", "torch", "os") if key in machine), flush=True)
    print(f"\n{HEADER}", flush=True)
    results: list[Result] = []
    complaints: list[str] = []
    for problem, provider in options.rows:
        found = compare(problem, provider, (run.ROOT, options.other), options)
        if isinstance(found, str):
            complaints.append(f"{problem}, {provider}: {found}")
            continue
        print(line(found), flush=True)
        results.append(found)
    if results:
        worst = max(results, key=lambda row: row.ratio)
        middle = statistics.geometric_mean(row.ratio for row in results)
        print(f"\ngeometric mean {middle:.3f}; highest {worst.ratio:.3f}, `{worst.problem}`, {worst.provider}")
    for one in complaints:
        print(f"FAILED {one}", file=sys.stderr)
    return 1 if complaints or not results else 0


if __name__ == "__main__":
    sys.exit(main())
