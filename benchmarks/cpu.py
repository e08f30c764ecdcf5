"""`python -m benchmarks.cpu`: verify, then time, ours against plain PyTorch on the CPU. README.md says how to read it.

    python -m benchmarks.cpu                          the quick table, under five minutes
    python -m benchmarks.cpu --full                   every case, every compile mode, more rounds
    python -m benchmarks.cpu --case 'c19-stride*'     some cases
    python -m benchmarks.cpu --backend reference      no compiled kernels needed: for work on the harness itself

Exit status: 0; 1 if a contestant was wrong (it is not timed) or a case failed; 2 if there is nothing to benchmark. A
bar that is missed is in the table, and no error.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import coarse_kernels
from coarse_kernels import backends

from . import measure, report
from .cases import CASES, SMOKE, Case

ROOT = Path(__file__).resolve().parent.parent
QUICK_BUDGET, FULL_BUDGET = 5.0, 40.0  # seconds of timed runs per case


def worker_environment(buffers: str, threads: int) -> dict[str, str]:
    """The environment of one worker: nothing of ours about malloc, and exactly one of its settings."""
    chosen = {"fresh": {}, "reused": measure.REUSE_ENVIRONMENT, "live": measure.LIVE_ENVIRONMENT}[buffers]
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("MALLOC_") and key not in ("GLIBC_TUNABLES", "THP_MEM_ALLOC_ENABLE")
    }
    path = os.pathsep.join(filter(None, (str(ROOT), inherited.get("PYTHONPATH"))))
    return {
        **inherited,
        **chosen,
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PYTHONPATH": path,
    }


def ask_worker(
    task: dict[str, Any], buffers: str, threads: int, module: Sequence[str] = ("benchmarks.worker",)
) -> dict[str, Any]:
    """Run one task in a process of its own, ``python -m module task``; its result, or {"failed": why}."""
    done = subprocess.run(
        [sys.executable, "-m", *module, json.dumps({**task, "threads": task.get("threads", threads)})],
        env=worker_environment(buffers, threads),
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        tail = done.stderr.strip().splitlines()[-5:]
        return {"failed": f"exit status {done.returncode}: " + " / ".join(tail)}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def add_memory(rows: Sequence[dict[str, Any]], found: Sequence[Sequence[Any]]) -> None:
    by_key = {tuple(key): extra for *key, extra in found}
    by_name = {case.name: case for case in (*CASES, SMOKE)}
    for row in rows:
        key = (row["case"], row["contestant"], row["schedule"], row["threads"])
        if key in by_key:
            extra, case = by_key[key], by_name[row["case"]]
            row["peak_extra_mb"] = extra / 1e6
            row["peak_over_cm"] = extra / case.cm_bytes
            row["peak_over_gradients"] = extra / (case.cm_bytes + case.seg_bytes)


def run(cases: Sequence[Case], backend: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """All rows, and what went wrong."""
    rows: list[dict[str, Any]] = []
    complaints = []
    for case in cases:
        started = time.monotonic()
        task = {
            "do": "race",
            "case": case.name,
            "backend": backend,
            "full": options.full,
            "budget": FULL_BUDGET if options.full else QUICK_BUDGET,
            "repeats": options.repeats,
            "threads": options.threads,
        }
        result = ask_worker(task, case.buffers, max(options.threads, *case.threads))
        if "failed" in result:
            complaints.append(f"{case.name}: {result['failed']}")
            continue
        complaints += [f"{case.name}: {who}: {why}; not timed" for who, why in result["wrong"].items()]
        for who, why in result["absent"].items():
            print(f"{case.name}: {who} does not run here: {why}", file=sys.stderr)
        rows += result["rows"]
        print(f"{case.name}: {len(result['rows'])} contestants, {time.monotonic() - started:.0f} s", file=sys.stderr)
    if rows:
        timed = list(dict.fromkeys(row["case"] for row in rows))
        result = ask_worker({"do": "weigh", "cases": timed, "backend": backend}, "live", options.threads)
        if "failed" in result:
            complaints.append(f"peak memory: {result['failed']}")
        else:
            add_memory(rows, result["memory"])
    return rows, complaints


def choose_backend(asked: str | None) -> str:
    """The fused backend, or the one that was asked for. Exits with the reason where it cannot run."""
    reasons = backends.explain("cpu")
    name = asked if asked is not None else "cpu"
    if name not in reasons:
        sys.exit(_nothing(f"backend: expected one of {tuple(reasons)}, got {name!r}"))
    if name not in coarse_kernels.available_backends("cpu"):
        hint = "" if asked else " (--backend reference runs the harness without it)"
        sys.exit(_nothing(f"nothing to benchmark: backend {name!r} cannot run here: {reasons[name]}{hint}"))
    return name


def _nothing(message: str) -> int:
    print(message, file=sys.stderr)
    return 2


def choose_cases(patterns: Sequence[str], full: bool) -> list[Case]:
    if not patterns:
        return [case for case in CASES if full or not case.full_only]
    chosen = [case for case in (*CASES, SMOKE) if any(fnmatch.fnmatchcase(case.name, pattern) for pattern in patterns)]
    if not chosen:
        names = [case.name for case in CASES]
        sys.exit(_nothing(f"--case: expected one of {names} or a pattern, got {list(patterns)}"))
    return chosen


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="every case and compile mode, more rounds")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only these cases; repeatable")
    parser.add_argument("--repeats", type=int, help=f"most timed runs per contestant, at least {measure.LEAST_ROUNDS}")
    parser.add_argument("--threads", type=int, default=1, help="threads, except in the rows that compare threads")
    parser.add_argument("--backend", help="whose kernels are 'ours'; default cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for the results")
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < measure.LEAST_ROUNDS:
        parser.error(f"--repeats: expected at least {measure.LEAST_ROUNDS}, got {options.repeats}")
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    backend = choose_backend(options.backend)
    cases = choose_cases(options.case, options.full)
    started = time.monotonic()
    rows, complaints = run(cases, backend, options)
    if rows:
        options.out.mkdir(parents=True, exist_ok=True)
        report.write_csv(options.out / "cpu.csv", rows)
        text = report.markdown(cases, rows, time.monotonic() - started)
        (options.out / "cpu.md").write_text(text)
        print(text)
    for complaint in complaints:
        print(f"FAILED {complaint}", file=sys.stderr)
    return 1 if complaints or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
