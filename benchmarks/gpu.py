"""`python -m benchmarks.gpu`: verify, then time, ours against plain PyTorch on a GPU. README.md says how to read it.

    python -m benchmarks.gpu                          the table, about eight minutes; the rows with targets come first
    python -m benchmarks.gpu --quick                  only the rows with targets
    python -m benchmarks.gpu --full --budget-seconds 3600    every dtype, size, grid and mode; more of torch.compile
    python -m benchmarks.gpu --case 'c19-*-stride8-*' some cases
    python -m benchmarks.gpu --device cpu --case 'smoke-*' --out rehearsal    no GPU: does the harness work?

Results are written after each case. Exit status: 0; 1 if a contestant was wrong (it is not timed) or a case failed; 2 if
there is nothing to benchmark. A target that is missed is in the report, and no error.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

import coarse_kernels
from coarse_kernels import backends

from . import gpu_report, measure, report, worker
from .cases import Case
from .gpu_cases import CASES, SMOKE, SMOKE_TARGETS, TARGET_CASE_NAMES, TARGETS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUDGET = 480.0  # seconds; a case that has begun is finished
CASE_TIMEOUT = 240.0  # seconds without a word from the worker: a kernel that hangs must not use up the machine
TIMED_SECONDS = 4.0  # of timed runs per case; three times that for a row with a target

Event = dict[str, Any]


def no_device(device: str) -> str | None:
    """Why nothing can be measured there, or None."""
    if torch.device(device).type != "cuda" or torch.cuda.is_available():
        return None
    why = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
    return f"no GPU: torch {torch.__version__} {why}; nothing was measured"


def choose_backends(asked: Sequence[str], device: str) -> list[str]:
    """The fused ones that can run there, or those that were asked for. Exits with the reason where there is none."""
    reasons = backends.explain(device)
    can_run = coarse_kernels.available_backends(device)
    for name in asked:
        if name not in reasons:
            sys.exit(_nothing(f"--backend: expected one of {tuple(reasons)}, got {name!r}"))
        if name not in can_run:
            sys.exit(_nothing(f"backend {name!r} cannot run here: {reasons[name]}"))
    found = list(asked) or [name for name in can_run if name != "reference"]
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
        sys.exit(_nothing(f"no fused backend can run on {device} tensors ({why}); nothing was measured"))
    # The one that ratios are taken against comes first.
    return sorted(found, key=lambda name: name != "cuda")


def _nothing(message: str) -> int:
    print(f"benchmarks.gpu: {message}", file=sys.stderr)
    return 2


def choose_cases(patterns: Sequence[str], quick: bool, full: bool) -> list[Case]:
    if patterns:
        chosen = [c for c in (*CASES, *SMOKE) if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in patterns)]
        if not chosen:
            names = [case.name for case in CASES if not case.full_only]
            sys.exit(_nothing(f"--case: expected one of {names} or a pattern, got {list(patterns)}"))
        return chosen
    if quick:
        return [case for case in CASES if case.name in TARGET_CASE_NAMES]
    return [case for case in CASES if full or not case.full_only]


# --- the worker -------------------------------------------------------------------------------------------------------

Source = Callable[[dict[str, Any]], Iterator[Event]]


def in_this_process(task: dict[str, Any]) -> Iterator[Event]:
    yield from worker.stream(task)


def in_a_process(task: dict[str, Any], timeout: float = CASE_TIMEOUT) -> Iterator[Event]:
    """Events of a worker, until it ends, dies, or is silent for too long."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", json.dumps({"do": "stream", **task})],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    watch = threading.Timer(timeout, child.kill)
    watch.start()
    try:
        for line in child.stdout:
            if not line.startswith(worker.EVENT):
                sys.stderr.write(line)
                continue
            watch.cancel()
            yield json.loads(line.removeprefix(worker.EVENT))
            watch = threading.Timer(timeout, child.kill)
            watch.start()
    finally:
        watch.cancel()
        child.kill()
        child.wait()


def events(task: dict[str, Any], source: Source) -> Iterator[Event]:
    """One event per case of ``task``, whatever happens to the process that works on it."""
    left = list(task["cases"])
    while left:
        begun, finished = None, 0
        for event in source({**task, "cases": list(left)}):
            if event.get("begins"):
                begun = event["case"]
                continue
            begun, finished = None, finished + 1
            left.remove(event["case"])
            yield event
        # After an illegal access a worker reports its case and ends: the next one is then begun by another worker.
        if left and (begun is not None or not finished):
            at = left[0] if begun is None else begun
            left.remove(at)
            yield {"case": at, "failed": "its process died or was silent for too long (see above)"}


# --- results ----------------------------------------------------------------------------------------------------------


class Results:
    """What is known so far; written after every case."""

    def __init__(self, cases: Sequence[Case], folder: Path, commit: str, command: str):
        self.cases, self.folder, self.commit, self.command = cases, folder, commit, command
        self.rows: list[dict[str, Any]] = []
        self.complaints: list[str] = []
        self.notes: list[str] = []
        self.started = time.monotonic()

    def add(self, event: Event) -> None:
        name = event["case"]
        if "skipped" in event:
            self.notes.append(f"{name}: {event['skipped']}")
        if "failed" in event:
            self.complaints.append(f"{name}: {event['failed']}")
        self.complaints += [f"{name}: {who}: {why}" for who, why in event.get("wrong", {}).items()]
        self.notes += [f"{name}: {who}: {why}" for who, why in event.get("absent", {}).items()]
        self.rows += gpu_report.with_run(event.get("rows", []), self.commit, self.command)
        if "seconds" in event:
            print(f"{name}: {len(event.get('rows', []))} rows, {event['seconds']:.0f} s", file=sys.stderr, flush=True)

    def write(self) -> str:
        self.folder.mkdir(parents=True, exist_ok=True)
        report.write_csv(self.folder / "gpu.csv", self.rows, gpu_report.COLUMNS)
        smoke = all(case in SMOKE for case in self.cases)
        text = gpu_report.markdown(
            self.cases,
            self.rows,
            SMOKE_TARGETS if smoke else TARGETS,
            self.complaints,
            self.notes,
            time.monotonic() - self.started,
        )
        (self.folder / "gpu.md").write_text(text)
        return text


def current_commit() -> str:
    """Of the working tree, "+" where it has changes; "unknown" in a copy without its history (--commit)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only the rows that a target names")
    parser.add_argument("--full", action="store_true", help="every case, more of torch.compile")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only these cases; repeatable")
    parser.add_argument("--budget-seconds", type=float, default=BUDGET, help=f"begin no case after this; {BUDGET:.0f}")
    parser.add_argument("--repeats", type=int, help=f"most timed runs per contestant, at least {measure.LEAST_ROUNDS}")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument("--backend", action="append", default=[], help="whose kernels are 'ours'; default all fused")
    parser.add_argument("--device", default="cuda", help="cpu rehearses the harness")
    parser.add_argument("--in-process", action="store_true", help="no worker: for debuggers and tests")
    parser.add_argument("--commit", help="what to write as the commit; default: ask git")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for gpu.csv and gpu.md")
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < measure.LEAST_ROUNDS:
        parser.error(f"--repeats: expected at least {measure.LEAST_ROUNDS}, got {options.repeats}")
    if torch.device(options.device).type != "cuda" and options.out.resolve() == RESULTS:
        parser.error("--device: a rehearsal does not go where measured results are; give it an --out of its own")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if reason := no_device(options.device):
        return _nothing(reason)
    chosen = choose_backends(options.backend, options.device)
    cases = choose_cases(options.case, options.quick, options.full)
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if argv is None else argv)])
    results = Results(cases, options.out, options.commit or current_commit(), command)
    task = {
        "cases": [case.name for case in cases],
        "device": options.device,
        "backends": chosen,
        "compile": not options.no_compile,
        "full": options.full,
        "budget": TIMED_SECONDS,
        "repeats": options.repeats,
        "deadline": time.time() + options.budget_seconds,
    }
    text = ""
    for event in events(task, in_this_process if options.in_process else in_a_process):
        results.add(event)
        text = results.write()
    print(text)
    for complaint in results.complaints:
        print(f"FAILED {complaint}", file=sys.stderr)
    return 1 if results.complaints or not results.rows else 0


if __name__ == "__main__":
    sys.exit(main())
