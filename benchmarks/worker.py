"""One case in one process: `python -m benchmarks.worker '{...}'`, started by `benchmarks.cpu`.

A process of its own because malloc reads its settings at start-up, and one case's heap is no business of the next. The
last line of its output is JSON: the rows, the contestants that are wrong, those that cannot run here.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from .cases import CASES, SMOKE, Case, make_inputs, with_full_contestants
from .contestants import OURS, Contestant, Truth, Unavailable, clear, errors, make_contestants, run_once, truth, verdict
from .measure import LEAST_ROUNDS, Timing, copy_bandwidth, environment, peak_extra_bytes, time_all

BY_NAME = {case.name: case for case in (*CASES, SMOKE)}


def verify(
    case: Case, contestants: Sequence[Contestant], inputs: Any, expected: Truth
) -> tuple[list[tuple[Contestant, dict[str, float]]], dict[str, str], dict[str, str]]:
    """(who may be timed, with the errors found), who is wrong and why, who cannot run and why."""
    fit, wrong, absent = [], {}, {}
    for contestant in contestants:
        label = " ".join(filter(None, (contestant.name, contestant.schedule, f"({contestant.threads} threads)")))
        try:
            found = errors(contestant, inputs, expected)
        except Unavailable as reason:
            absent[label] = str(reason)
            continue
        complaint = verdict(case, found)
        if complaint is None:
            fit.append((contestant, found))
        else:
            wrong[label] = complaint
    return fit, wrong, absent


def row(
    case: Case,
    contestant: Contestant,
    found: dict[str, float],
    timing: Timing,
    our_ms: float,
    copy_gb: float,
    machine: dict[str, Any],
) -> dict[str, Any]:
    seconds = timing.median_ms / 1e3
    gigabytes = case.ideal_bytes / seconds / 1e9
    return {
        "case": case.name,
        "classes": case.classes,
        "height": case.height,
        "width": case.width,
        "stride": case.stride,
        "device": case.device,
        "dtype": case.dtype,
        "stream": case.stream,
        "contestant": contestant.name,
        "schedule": contestant.schedule,
        "mode": case.mode,
        "threads": contestant.threads,
        "buffers": case.buffers,
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "runs": timing.runs,
        "ns_per_pixel": 1e9 * seconds / case.pixels,
        "times_ours": timing.median_ms / our_ms,
        "ideal_mb": case.ideal_bytes / 1e6,
        "gb_per_s": gigabytes,
        "copy_gb_per_s": copy_gb,
        "copy_fraction": gigabytes / copy_gb,
        "peak_extra_mb": math.nan,  # measured in a process of its own
        "peak_over_cm": math.nan,
        "peak_over_gradients": math.nan,
        "page_faults": timing.page_faults,
        "cpu_share": timing.cpu_share,
        "loss_error": found["loss"],
        "grad_seg_error": found.get("grad_seg", math.nan),
        "grad_cm_error": found.get("grad_cm", math.nan),
        **machine,
    }


def race(case: Case, contestants: Sequence[Contestant], budget: float, repeats: int | None) -> dict[str, Any]:
    """Verify, then time. Where ours is wrong nobody is timed: there would be nothing to compare with."""
    machine = environment()
    inputs = make_inputs(case)
    fit, wrong, absent = verify(case, contestants, inputs, truth(inputs))
    result: dict[str, Any] = {"rows": [], "wrong": wrong, "absent": absent}
    if not any(contestant.name.startswith(OURS) for contestant, _ in fit):
        return result
    timings = time_all([contestant for contestant, _ in fit], inputs, budget, repeats)
    # Ratios are taken against our first row: first schedule, first thread count.
    our_ms = next(t.median_ms for (c, _), t in zip(fit, timings, strict=True) if c.name.startswith(OURS))
    copies = {threads: copy_bandwidth(threads) for threads in {contestant.threads for contestant, _ in fit}}
    result["rows"] = [
        row(case, contestant, found, timing, our_ms, copies[contestant.threads], machine)
        for (contestant, found), timing in zip(fit, timings, strict=True)
    ]
    return result


def weigh(names: Sequence[str], backend: str) -> dict[str, Any]:
    """Peak extra memory, bytes, of the eager contestants: one run each, warmed up on a tiny case."""
    found = []
    for name in names:
        case = BY_NAME[name]
        inputs = make_inputs(case)
        eager = [c for c in make_contestants(case, backend) if not c.name.startswith("compiled")]
        if (
            case.mode == "forward" or case.stream == "negative"
        ):  # what baselines hold there is no news, and takes a minute
            eager = [c for c in eager if c.name.startswith(OURS)]
        tiny = make_inputs(_tiny(case))
        for contestant in eager:
            with contestant.setting():
                run_once(contestant, tiny)
            extra = peak_extra_bytes(contestant, inputs)
            found.append([name, contestant.name, contestant.schedule, contestant.threads, extra])
        clear(inputs)
    return {"memory": found}


def _tiny(case: Case) -> Case:
    return dataclasses.replace(case, height=2 * case.stride, width=2 * case.stride)


def main(argv: Sequence[str]) -> int:
    task = json.loads(argv[0])
    warnings.simplefilter("ignore")  # inductor's own deprecation warnings
    torch.set_num_threads(task["threads"])
    if task["do"] == "weigh":
        result = weigh(task["cases"], task["backend"])
    else:
        case = BY_NAME[task["case"]]
        if task["full"]:
            case = with_full_contestants(case)
        if len(case.threads) == 1:
            case = dataclasses.replace(case, threads=(task["threads"],))
        contestants = make_contestants(case, task["backend"])
        if task["repeats"] is not None and task["repeats"] < LEAST_ROUNDS:
            raise ValueError(f"repeats: expected at least {LEAST_ROUNDS}, got {task['repeats']}")
        result = race(case, contestants, task["budget"], task["repeats"])
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
