"""Ours in this checkout against ours in another one: `python -m benchmarks.against OTHER_CHECKOUT [--threads 1]`.

    python -m benchmarks.against ../before                   every row of ours in the CPU table
    python -m benchmarks.against ../before --case 'c19*'     some cases (a pattern; repeatable); --full: all there are

Two processes per case, each with the `coarse_kernels` of its own checkout (built, and with `annotation_nll` as it is
here) and both with the cases and clocks of this one. Both check their results against float64. Then they take turns: an
untimed run and some 50 ms of timed ones, while the other process waits for input; from round to round the other one
begins. A round gives one ratio of times, this checkout over the other: above 1, this one is slower. The table has the
median over the rounds of both times and of the ratio, with p20 and p80 of the ratio.

Exit status: 0; 1 if either was wrong (it is not timed) or a process failed; 2 if there is nothing to compare.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

import coarse_kernels

from . import cpu, report
from .cases import CASES, SMOKE, Case, make_inputs
from .contestants import Contestant, clear, errors, make_contestants, truth, verdict
from .measure import CpuMeter, environment, percentile

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


# --- in a process of one checkout -------------------------------------------------------------------------------------


def ours_of(case: Case, backend: str, threads: int) -> list[Contestant]:
    """The rows that the table has of ours: schedules and thread counts of the case."""
    if len(case.threads) == 1:
        case = dataclasses.replace(case, threads=(threads,))
    return make_contestants(dataclasses.replace(case, contestants=()), backend)


def _say(answer: dict[str, Any]) -> None:
    print(EVENT + json.dumps(answer), flush=True)


def serve(order: str) -> None:
    """Answer requests from standard input, a line each: verify all, or run contestant k: once untimed, then timed."""
    task = json.loads(order)
    case = next(one for one in (*CASES, SMOKE) if one.name == task["case"])
    torch.set_num_threads(task["threads"])
    contestants = ours_of(case, task["backend"], task["threads"])
    inputs = make_inputs(case)
    meter = CpuMeter()
    _say({"package": str(Path(coarse_kernels.__file__).resolve().parent), "torch": torch.__version__})
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "verify":
            expected = truth(inputs)
            _say({"wrong": [verdict(case, errors(one, inputs, expected)) for one in contestants]})
            del expected
            gc.collect()
            gc.disable()
            continue
        with contestants[request["contestant"]].setting():
            meter.timed(contestants[request["contestant"]], inputs)
            samples = [meter.timed(contestants[request["contestant"]], inputs) for _ in range(request["runs"])]
        clear(inputs)
        seconds = sum(one.seconds for one in samples)
        _say(
            {
                "seconds": statistics.median(one.seconds for one in samples),
                "cpu_share": sum(one.cpu_seconds for one in samples) / seconds,
            }
        )
        gc.collect(0)


# --- the two of them --------------------------------------------------------------------------------------------------


class Failed(RuntimeError):
    """A process ended, or has the wrong package."""


class Worker:
    """A process with one checkout's `coarse_kernels`, for one case."""

    def __init__(self, checkout: Path, task: dict[str, Any], buffers: str, threads: int):
        environment = cpu.worker_environment(buffers, threads)
        environment.pop("PYTHONPATH")  # `START` says where from
        command = [sys.executable, "-c", START, str(checkout), str(cpu.ROOT), json.dumps(task)]
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
def workers(checkouts: Sequence[Path], task: dict[str, Any], buffers: str, threads: int) -> Iterator[list[Worker]]:
    started: list[Worker] = []
    try:
        for checkout in checkouts:
            started.append(Worker(checkout, task, buffers, threads))
        yield started
    finally:
        for worker in started:
            worker.close()


@dataclasses.dataclass(frozen=True)
class Result:
    case: str
    schedule: str
    threads: int
    this_ms: float
    other_ms: float
    ratio: float  # medians over the rounds
    ratio_p20: float
    ratio_p80: float
    rounds: int
    cpu_share: float  # of the worse of the two


def take_turns(pair: Sequence[Worker], k: int, about: Contestant, case: Case, budget: float, most: int) -> Result:
    """One row. ``pair``: this checkout, the other."""
    estimate = max(worker.ask(do="time", contestant=k, runs=1)["seconds"] for worker in pair)
    runs = max(1, min(MOST_RUNS, int(TURN / estimate)))
    rounds = max(min(LEAST_ROUNDS, most), min(most, int(budget / (2 * (runs + 1) * estimate))))
    seconds: list[list[float]] = [[], []]
    shares: list[list[float]] = [[], []]
    for turn in range(rounds):
        for who in (0, 1) if turn % 2 == 0 else (1, 0):
            answer = pair[who].ask(do="time", contestant=k, runs=runs)
            seconds[who].append(answer["seconds"])
            shares[who].append(answer["cpu_share"])
    ratios = [this / other for this, other in zip(*seconds, strict=True)]
    return Result(
        case.name,
        about.schedule,
        about.threads,
        1e3 * statistics.median(seconds[0]),
        1e3 * statistics.median(seconds[1]),
        statistics.median(ratios),
        percentile(ratios, 0.2),
        percentile(ratios, 0.8),
        rounds,
        min(statistics.mean(share) for share in shares),
    )


def compare(case: Case, checkouts: Sequence[Path], options: argparse.Namespace) -> tuple[list[Result], list[str]]:
    """The rows of one case, and what went wrong."""
    contestants = ours_of(case, options.backend, options.threads)
    task = {"case": case.name, "backend": options.backend, "threads": options.threads}
    results = []
    with workers(checkouts, task, case.buffers, max(one.threads for one in contestants)) as pair:
        found = [worker.ask(do="verify")["wrong"] for worker in pair]
        complaints = []
        for k, contestant in enumerate(contestants):
            wrong = [f"{worker.checkout}: {why[k]}" for worker, why in zip(pair, found, strict=True) if why[k]]
            if wrong:
                complaints += [f"{case.name} {contestant.schedule}: {why}; not timed" for why in wrong]
                continue
            results.append(take_turns(pair, k, contestant, case, options.budget, options.rounds))
    return results, complaints


HEADER = (
    "| case | schedule | threads | this, ms | other, ms | this / other | p20 to p80 | rounds | remark |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def line(row: Result) -> str:
    disturbed = row.cpu_share < report.DISTURBED * row.threads
    cells = [
        row.case,
        row.schedule,
        str(row.threads),
        f"{row.this_ms:.3f}",
        f"{row.other_ms:.3f}",
        f"{row.ratio:.3f}",
        f"{row.ratio_p20:.3f} to {row.ratio_p80:.3f}",
        str(row.rounds),
        f"disturbed: {row.cpu_share:.2f} of {row.threads} cores" if disturbed else "",
    ]
    return f"| {' | '.join(cells)} |"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT", help="root of the other checkout, built")
    parser.add_argument("--threads", type=int, default=1, help="threads, except in the rows that compare threads")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only these cases; repeatable")
    parser.add_argument("--full", action="store_true", help="also the cases that only the full table has")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of runs per row, both together")
    parser.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="most rounds per row")
    parser.add_argument("--backend", default="cpu", help="whose kernels are compared")
    options = parser.parse_args(argv)
    options.other = options.other.resolve()
    if not (options.other / "coarse_kernels" / "__init__.py").is_file():
        parser.error(f"OTHER_CHECKOUT: expected a folder with coarse_kernels in it, got {options.other}")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    options.backend = cpu.choose_backend(options.backend)
    cases = cpu.choose_cases(options.case, options.full)
    facts = ", ".join(f"{name} {value}" for name, value in environment().items())
    print(f"{facts}\n\n{HEADER}", flush=True)
    results: list[Result] = []
    complaints: list[str] = []
    for case in cases:
        try:
            rows, wrong = compare(case, (cpu.ROOT, options.other), options)
        except Failed as failure:
            rows, wrong = [], [f"{case.name}: {failure}"]
        for row in rows:
            print(line(row), flush=True)
        results += rows
        complaints += wrong
    if results:
        worst = max(results, key=lambda row: row.ratio)
        middle = statistics.geometric_mean(row.ratio for row in results)
        print(f"\ngeometric mean {middle:.3f}; highest {worst.ratio:.3f}, {worst.case} {worst.schedule}")
    for complaint in complaints:
        print(f"FAILED {complaint}", file=sys.stderr)
    return 1 if complaints or not results else 0


if __name__ == "__main__":
    sys.exit(main())
