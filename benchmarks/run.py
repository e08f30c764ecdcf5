"""`python -m benchmarks`: verify, then measure, ours against plain PyTorch. README.md says how to read it.

    python -m benchmarks                                   the table of this machine, under five minutes on a CPU
    python -m benchmarks --quick                           only the problems that a bar names
    python -m benchmarks --full                            all problems, all of torch.compile
    python -m benchmarks "c19 128x256 cm8" --provider eager compiled      one problem (`problem.py`), printed, not kept
    python -m benchmarks --mode correct,bitwise            no clock: right or wrong, and the same bits each time
    python -m benchmarks --device cuda --budget-seconds 400

Without problems the table goes to results/HARDWARE: results.csv (a measurement a line), machine.json, report.md and plots;
written after each problem. Exit status: 0; 1 if a provider was wrong (it is not measured) or a problem failed; 2 if there is
nothing to measure. A bar that is missed is in the table, and no error.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
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

from . import limits, meters, report, sets, worker
from .problem import parse
from .sets import Entry, Group

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
ISA = "COARSE_KERNELS_ISA"
SILENCE = 400.0  # seconds without a word from a worker: a kernel that hangs must not use up the machine
GROUP_SECONDS = {"quick": 3.0, "default": 2.5, "full": 20.0}  # of timed runs, for each problem of a group
TRIES = 3  # of a group whose rows were disturbed by other work
COLUMNS = (
    "problem", "provider", "group", "kernels", "quantity", "value", "unit", "p20", "p80", "runs", "cpu_share", "disturbed",
    "note", "hardware", "commit", "date",
)  # fmt: skip

Event = dict[str, Any]
Row = dict[str, Any]


# ---- processes -------------------------------------------------------------------------------------------------------


def cores(threads: int) -> list[int]:
    """Those that ``threads`` threads are pinned to: the first that this process may use."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(threads))
    return sorted(os.sched_getaffinity(0))[:threads]


def environment(buffers: str, threads: int) -> dict[str, str]:
    """Of a worker on a CPU: nothing of the caller's about malloc, threads and kernels, and exactly one of our settings. The
    instruction set alone is taken over: the results are named after it.
    """
    chosen = {
        "fresh": {},
        "thp": {"THP_MEM_ALLOC_ENABLE": "1"},
        "reused": meters.REUSE_ENVIRONMENT,
        "live": meters.LIVE_ENVIRONMENT,
    }[buffers]
    dropped = ("MALLOC_", "OMP_", "GOMP_", "KMP_", "MKL_", "COARSE_KERNELS_")
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    if ISA in os.environ:
        inherited[ISA] = os.environ[ISA]
    for name in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE"):
        inherited.pop(name, None)
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    places = ",".join(f"{{{core}}}" for core in cores(threads))
    return {
        **inherited,
        **chosen,
        "OMP_NUM_THREADS": str(threads),
        "OMP_PROC_BIND": "close",
        "OMP_PLACES": places,
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": path,
    }


Source = Callable[[dict[str, Any]], Iterator[Event]]


def in_this_process(task: dict[str, Any]) -> Iterator[Event]:
    """For debuggers and tests."""
    yield from worker.stream(task)


def in_a_process(task: dict[str, Any], silence: float = SILENCE) -> Iterator[Event]:
    """Events of a worker, until it ends, dies, or is silent for too long."""
    on_cpu = torch.device(task["device"]).type == "cpu"
    own = environment(task["buffers"], task["threads"])
    if not on_cpu:
        own = {**os.environ, "PYTHONPATH": own["PYTHONPATH"]}
    if task["do"] == "limits":  # of threads that are not OpenMP's, and would all be bound where the first one is
        own = {key: value for key, value in own.items() if key not in ("OMP_PROC_BIND", "OMP_PLACES")}
    pinned = cores(task["threads"]) if on_cpu and hasattr(os, "sched_setaffinity") else []
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", json.dumps(task)],
        env=own,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=(lambda: os.sched_setaffinity(0, pinned)) if pinned else None,
    )
    assert child.stdout is not None
    watch = threading.Timer(silence, child.kill)
    watch.start()
    try:
        for line in child.stdout:
            if not line.startswith(worker.EVENT):
                sys.stderr.write(line)
                continue
            watch.cancel()
            event = json.loads(line.removeprefix(worker.EVENT))
            if "alive" not in event:
                yield event
            watch = threading.Timer(silence, child.kill)
            watch.start()
    finally:
        watch.cancel()
        child.kill()
        child.wait()


def events(task: dict[str, Any], source: Source) -> Iterator[Event]:
    """One event per group of ``task``, with its index there, whatever happens to the process that works on it."""
    left = list(range(len(task["groups"])))
    while left:
        begun, finished = None, 0
        for event in source({**task, "groups": [task["groups"][index] for index in left]}):
            index = left[event["index"] - finished]
            if event.get("begins"):
                begun = index
                continue
            begun, finished = None, finished + 1
            left.remove(index)
            yield {**event, "index": index}
        # After an illegal access a worker reports its group and ends: the next one is then begun by another worker.
        if left and (begun is not None or not finished):
            at = left[0] if begun is None else begun
            left.remove(at)
            yield {"index": at, "failed": "its process died or was silent for too long (see above)"}


# ---- what is measured ------------------------------------------------------------------------------------------------


class Suite:
    """A run: groups, where they run, and what is known so far."""

    def __init__(self, groups: Sequence[Group], options: argparse.Namespace, source: Source = in_a_process):
        self.groups, self.options, self.source = groups, options, source
        self.machine = limits.machine(options.device) | {
            "hardware": limits.hardware_name(options.device),
            "commit": options.commit or current_commit(),
            "date": datetime.date.today().isoformat(),
            "command": shlex.join(["python", "-m", "benchmarks", *options.shown]),
        }
        self.lines = {str(entry.problem) for group in groups for entry in group}
        self.rows: list[Row] = []
        self.wrong: list[str] = []
        self.notes: list[str] = []
        self.started = time.monotonic()
        self.deadline = time.time() + options.budget_seconds

    @property
    def on_cpu(self) -> bool:
        return torch.device(self.options.device).type == "cpu"

    def task(self, do: str, groups: Sequence[Any], threads: int = 1, buffers: str = "reused") -> dict[str, Any]:
        task = {
            "do": do,
            "groups": groups,
            "device": self.options.device,
            "threads": threads,
            "buffers": buffers,
            "modes": self.options.mode,
            "peaks": "memory" in self.options.mode and not self.on_cpu,
            "budget": self.options.seconds,
            "most": self.options.most,
            "deadline": self.deadline,
        }
        return task | ({"skip_compiled": True} if self.options.no_compile else {})

    def measure(self, changed: Callable[[], None]) -> None:
        """Everything; ``changed`` is called after each group."""
        if "speed" in self.options.mode and (self.options.limits or not self.options.problem):
            asked = {entry.problem.threads for group in self.groups for entry in group}
            counts = sorted({1, *asked} if self.on_cpu else {1})
            for event in events(self.task("limits", [counts], max(counts)), self.source):
                self._take(event, "the machine's limits")
        lines = [[(str(entry.problem), entry.providers) for entry in group] for group in self.groups]
        if not self.on_cpu:
            for event in events(self.task("examine", lines), self.source):
                self._take(event, lines[event["index"]][0][0], event.get("seconds"))
                changed()
            return
        for group, own in zip(self.groups, lines, strict=True):
            self._on_cpu(group, own)
            changed()
        if "memory" in self.options.mode:
            self._weigh(changed)

    def _weigh(self, changed: Callable[[], None]) -> None:
        """Peak memory of those that were right, in a process under other settings of malloc."""
        fit: dict[str, list[str]] = {}
        for row in self.rows:
            if row["provider"] and row["provider"] not in fit.setdefault(row["problem"], []):
                fit[row["problem"]].append(row["provider"])
        groups = [[(line, names)] for line, names in fit.items() if line in self.lines]
        threads = max((entry.problem.threads for group in self.groups for entry in group), default=1)
        for event in events(self.task("weigh", groups, threads, "live"), self.source):
            self._take(event, f"{groups[event['index']][0][0]}: peak memory")
            changed()

    def _on_cpu(self, group: Group, lines: list[Any]) -> None:
        """Again where other work was in the way."""
        threads, buffers = max(entry.problem.threads for entry in group), group[0].problem.buffers
        task = self.task("examine", [lines], threads, buffers)
        (first,) = best = list(events(task, self.source))
        times = _timed(first)
        for attempt in range(1, TRIES):
            late = time.time() > self.deadline or time.monotonic() - self.started > self.options.retry_seconds
            if late or "failed" in first or not any(row["disturbed"] for row in times):
                break
            print(f"{lines[0][0]}: other work took part of the processor, attempt {attempt}", file=sys.stderr)
            right = {(row["problem"], row["provider"]) for row in times}
            again = [[line, [name for problem, name in sorted(right) if problem == line]] for line, _ in lines]
            (event,) = events({**task, "groups": [again], "verified": True}, self.source)
            if "failed" not in event and _quiet(_timed(event)) > _quiet(times):
                times = _timed(event)
        kept = [row for row in first.get("rows", []) if row["quantity"] not in _OF_TIME]
        self._take({**best[0], "rows": kept + times}, lines[0][0], first.get("seconds"))

    def _take(self, event: Event, what: str, seconds: float | None = None) -> None:
        if "skipped" in event:
            self.notes.append(f"{what}: {event['skipped']}")
        if "failed" in event:
            self.wrong.append(f"{what}: {event['failed']}")
        self.wrong += [f"{who}: {why}" for who, why in event.get("wrong", {}).items()]
        self.notes += [f"{who}: {why}" for who, why in event.get("absent", {}).items()]
        about = {key: self.machine[key] for key in ("hardware", "commit", "date")}
        self.rows += [{**dict.fromkeys(COLUMNS, ""), **row, **about} for row in event.get("rows", [])]
        if seconds is not None:
            names = {(row["problem"], row["provider"]) for row in event.get("rows", []) if row["provider"]}
            print(f"{what}: {len(names)} measured, {seconds:.0f} s", file=sys.stderr, flush=True)

    def text(self) -> str:
        return report.markdown(
            self.groups, self.rows, self.machine, self.wrong, self.notes, time.monotonic() - self.started
        )

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        write_csv(folder / "results.csv", self.rows)
        (folder / "machine.json").write_text(json.dumps(self.machine, indent=2) + "\n")
        (folder / "report.md").write_text(self.text(), encoding="utf-8")


_OF_TIME = ("time", "page faults")


def _timed(event: Event) -> list[Row]:
    rows = [row for row in event.get("rows", []) if row["quantity"] in _OF_TIME]
    return [row | {"disturbed": row["quantity"] == "time" and _share(row) < report.DISTURBED} for row in rows]


def _share(row: Row) -> float:
    """Of the cores that it runs on, what it had. Plain PyTorch leaves some of several idle in places: there only ours tells."""
    threads = parse(row["problem"]).threads
    return float(row["cpu_share"]) / threads if row["group"] == "ours" or threads == 1 else 1.0


def _quiet(times: Sequence[Row]) -> tuple[int, float]:
    """Of two attempts the quieter one is the larger."""
    own = [row for row in times if row["quantity"] == "time"]
    return -sum(row["disturbed"] for row in own), min(map(_share, own), default=0.0)


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="raise", lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: _shown(value) for key, value in row.items()} for row in rows)


def _shown(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def current_commit() -> str:
    """Of the working tree, "+" where it has changes; "unknown" in a copy without its history (--commit)."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- command line ----------------------------------------------------------------------------------------------------


def nothing_to_measure(device: str) -> str | None:
    """Why nothing can be measured there, or None."""
    kind = torch.device(device).type
    if kind == "cuda" and not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "sees no CUDA device"
        return f"no GPU: torch {torch.__version__} {why}; nothing was measured"
    reasons = backends.explain(kind)
    if all(name == "reference" for name in coarse_kernels.available_backends(kind)):
        why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items() if reason is not None)
        return f"no fused backend can run on {kind} tensors ({why}); nothing was measured"
    return None


def choose_groups(options: argparse.Namespace) -> list[Group]:
    kind = "cpu" if torch.device(options.device).type == "cpu" else "gpu"
    words = tuple(options.provider or ())
    if options.problem:
        problems, most = [parse(line) for line in options.problem], len(cores(1 << 20))
        for problem in problems:
            if kind == "cpu" and problem.threads > most:
                raise ValueError(f"problem: expected at most {most} threads, got {problem}")
        return [(Entry(problem, words or ("eager",)),) for problem in problems]
    groups = sets.read(kind, f"{kind}-full") if options.full else sets.read(kind)
    if words:
        groups = [tuple(Entry(entry.problem, words, entry.bars) for entry in group) for group in groups]
    if kind == "cpu":
        usable = len(cores(1 << 20))
        groups = [tuple(e for e in group if e.problem.threads <= usable) for group in groups]
        groups = [group for group in groups if group]
    if options.quick:  # after those for more threads are gone, whose bar a group may have been kept for
        groups = sets.with_bars(groups)
    if options.full and not words:  # wherever something is compiled, everything that can be
        groups = [tuple(_all_compiled(entry) for entry in group) for group in groups]
    return groups


def _all_compiled(entry: Entry) -> Entry:
    if "compiled" not in entry.providers:
        return entry
    from .providers import providers

    every = tuple(one.name for one in providers(entry.problem, "cpu") if one.group == "compiled")
    return Entry(entry.problem, (*(word for word in entry.providers if word != "compiled"), *every), entry.bars)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("problem", nargs="*", help="a line such as 'c19 1024x2048 seg4 cm8 positive+trusted'")
    parser.add_argument("--device", default="cpu", help="cpu (without it) or cuda")
    parser.add_argument("--mode", default="speed,memory", help=f"some of {','.join(worker.MODES)}")
    parser.add_argument("--provider", nargs="+", metavar="WORD", help="names or groups, instead of those of the set")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="only the problems that a bar names")
    size.add_argument("--full", action="store_true", help="all problems, more runs, all of torch.compile")
    parser.add_argument("--seconds", type=float, help="of timed runs for each group of problems")
    parser.add_argument("--most", type=int, default=meters.MOST_ROUNDS, help="runs of a provider, at least 3")
    parser.add_argument("--retry-seconds", type=float, default=240.0, help="measure nothing again after so many; 240")
    parser.add_argument("--budget-seconds", type=float, default=math.inf, help="begin nothing after so many")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes most of the time")
    parser.add_argument(
        "--limits", action="store_true", help="of the machine, for a single problem, too: half a minute"
    )
    parser.add_argument("--commit", help="what to write as the commit; without it git is asked")
    parser.add_argument("--out", type=Path, help="folder of results; without it benchmarks/results/HARDWARE")
    options = parser.parse_args(argv)
    options.shown = [word for k, word in enumerate(argv) if "--out" not in (word, *argv[max(0, k - 1) : k])]
    options.mode = [word for word in options.mode.split(",") if word]
    if unknown := [word for word in options.mode if word not in worker.MODES]:
        parser.error(f"--mode: expected some of {worker.MODES}, got {unknown}")
    if options.most < meters.LEAST_ROUNDS:
        parser.error(f"--most: expected at least {meters.LEAST_ROUNDS}, got {options.most}")
    if options.seconds is None:
        options.seconds = GROUP_SECONDS["full" if options.full else "quick" if options.quick else "default"]
    if options.device not in limits.DEVICES:
        parser.error(f"--device: expected one of {limits.DEVICES}, got {options.device!r}")
    return options


def default_folder(options: argparse.Namespace, hardware: str) -> Path | None:
    """Where the table of a machine is kept; a part of it, or one in another way, takes an --out of its own."""
    changed = options.problem or options.provider or options.quick or options.no_compile
    if changed or set(options.mode) != {*worker.MEASURED}:
        return None
    return RESULTS / hardware / "full" if options.full else RESULTS / hardware


def draw(folder: Path) -> None:
    try:
        from . import plot
    except ImportError as error:  # matplotlib comes with the training package
        print(f"no plots: {error}", file=sys.stderr)
        return
    plot.draw_all(folder)


def main(argv: Sequence[str] | None = None, source: Source = in_a_process) -> int:
    options = parse_arguments(sys.argv[1:] if argv is None else argv)
    reason = None if options.provider else nothing_to_measure(options.device)
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    try:
        groups = choose_groups(options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    suite = Suite(groups, options, source)
    folder = options.out or default_folder(options, str(suite.machine["hardware"]))
    suite.measure(lambda: suite.write(folder) if folder is not None else None)
    print(suite.text())
    if folder is not None:
        draw(folder)
    for line in suite.wrong:
        print(f"FAILED {line}", file=sys.stderr)
    return 1 if suite.wrong or not suite.rows else 0
