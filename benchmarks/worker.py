"""Cases in a process of their own: `python -m benchmarks.worker '{...}'`, started by `benchmarks.cpu` and `benchmarks.gpu`.

For the CPU one case each, because malloc reads its settings at start-up, and one case's heap is no business of the next:
the last line of its output is JSON, the rows, the contestants that are wrong, those that cannot run here. For a GPU many
cases, and a line for each as soon as it is done: an illegal access takes the process with it, but nothing that was measured.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .cases import CASES, SMOKE, AnyInputs, Case, leaves, make_inputs, with_full_contestants
from .contestants import (
    OURS,
    Contestant,
    DoesNotFit,
    Unavailable,
    clear,
    errors,
    errors_in_bands,
    first_run,
    make_contestants,
    run_once,
    truth,
    verdict,
)
from .gpu_cases import BY_NAME as GPU_BY_NAME
from .gpu_cases import TARGET_CASE_NAMES, chosen_contestants
from .measure import LEAST_ROUNDS, Meter, Timing, meter_for, peak_extra_bytes, time_all

BY_NAME = {case.name: case for case in (*CASES, SMOKE)}
TARGET_SHARE = 3  # times as many runs for a row that a target names
EVENT = "BENCHMARK "  # begins a line of JSON among whatever compilers print


@dataclasses.dataclass
class Verified:
    fit: list[tuple[Contestant, dict[str, float]]]  # may be timed; the errors found
    wrong: dict[str, str]  # and why
    absent: dict[str, str]  # cannot run here, and why
    too_large: list[Contestant]  # ran out of memory


def verify(
    case: Case, contestants: Sequence[Contestant], find_errors: Callable[[Contestant], dict[str, float]]
) -> Verified:
    result = Verified([], {}, {}, [])
    for contestant in contestants:
        label = " ".join(filter(None, (contestant.name, contestant.schedule, f"({contestant.threads} threads)")))
        try:
            found = find_errors(contestant)
        except Unavailable as reason:
            result.absent[label] = str(reason)
            continue
        except DoesNotFit:
            result.too_large.append(contestant)
            continue
        except Exception as error:  # a kernel that does not compile, or does not launch: the others are not to blame
            result.wrong[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        complaint = verdict(case, found)
        if complaint is None:
            result.fit.append((contestant, found))
        else:
            result.wrong[label] = complaint
    return result


def row(
    case: Case,
    contestant: Contestant,
    found: dict[str, float],
    timing: Timing,
    our_ms: float,
    copy_gb: float,
    machine: dict[str, Any],
    peak: float = math.nan,
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
        "labels": case.labels,
        "status": "ok",
        "contestant": contestant.name,
        "schedule": contestant.schedule,
        "mode": case.mode,
        "threads": contestant.threads,
        "buffers": case.buffers,
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "runs": timing.runs,
        "host_ms": timing.host_ms,
        "ns_per_pixel": 1e9 * seconds / case.pixels,
        "times_ours": timing.median_ms / our_ms,
        "ideal_mb": case.ideal_bytes / 1e6,
        "gb_per_s": gigabytes,
        "copy_gb_per_s": copy_gb,
        "copy_fraction": gigabytes / copy_gb,
        # NaN on the CPU, where it is measured in a process of its own
        "peak_extra_mb": peak / 1e6,
        "peak_over_cm": peak / case.cm_bytes,
        "peak_over_gradients": peak / case.logit_bytes,
        "needs_gb": math.nan,  # of one that does not fit
        "page_faults": timing.page_faults,
        "cpu_share": timing.cpu_share,
        "loss_error": found["loss"],
        "grad_seg_error": found.get("grad_seg", math.nan),
        "grad_cm_error": found.get("grad_cm", math.nan),
        "grad_negative_cm_error": found.get("grad_negative_cm", math.nan),
        **machine,
    }


def race(case: Case, contestants: Sequence[Contestant], budget: float, repeats: int | None) -> dict[str, Any]:
    """Verify, then time. Where ours is wrong nobody is timed: there would be nothing to compare with."""
    meter = meter_for(case.device)
    inputs = make_inputs(case)
    expected = truth(inputs)
    verified = verify(case, contestants, lambda contestant: errors(contestant, inputs, expected))
    return {
        "rows": timed_rows(case, verified, inputs, meter, budget, repeats),
        "wrong": verified.wrong,
        "absent": verified.absent,
    }


def timed_rows(
    case: Case,
    verified: Verified,
    inputs: AnyInputs,
    meter: Meter,
    budget: float,
    repeats: int | None,
    peaks: dict[Contestant, float] | None = None,
) -> list[dict[str, Any]]:
    fit = verified.fit
    if not any(contestant.name.startswith(OURS) for contestant, _ in fit):
        return []
    timings = time_all([contestant for contestant, _ in fit], inputs, budget, repeats, meter)
    # Ratios are taken against our first row: first backend, schedule and thread count.
    our_ms = next(t.median_ms for (c, _), t in zip(fit, timings, strict=True) if c.name.startswith(OURS))
    copies = {threads: meter.copy_bandwidth(threads) for threads in {contestant.threads for contestant, _ in fit}}
    machine = meter.environment()
    return [
        row(
            case,
            contestant,
            found,
            timing,
            our_ms,
            copies[contestant.threads],
            machine,
            math.nan if peaks is None else peaks[contestant],
        )
        for (contestant, found), timing in zip(fit, timings, strict=True)
    ]


# --- many cases, on a device that keeps its memory to itself ------------------------------------------------------------


def race_on_device(
    case: Case, contestants: Sequence[Contestant], backends: Sequence[str], budget: float, repeats: int | None
) -> dict[str, Any]:
    """`race` for sizes at which one contestant can fill the device: truth in bands, peak memory, who does not fit."""
    meter = meter_for(case.device)
    inputs = make_inputs(case)
    peaks: dict[Contestant, float] = {}

    def examine(contestant: Contestant) -> dict[str, float]:
        meter.make_room()
        found = errors_in_bands(contestant, case, inputs)
        if verdict(case, found) is None:  # the second run: what the first has loaded and set aside is no part of it
            try:
                peaks[contestant] = meter.peak_extra_bytes(contestant, inputs)
            except torch.OutOfMemoryError:
                raise DoesNotFit(contestant, "in its second run") from None
            finally:
                clear(inputs)
        return found

    verified = verify(case, contestants, examine)
    while True:
        try:
            rows = timed_rows(case, verified, inputs, meter, budget, repeats, peaks)
            break
        except DoesNotFit as full:
            verified.too_large.append(full.contestant)
            verified.fit = [(other, found) for other, found in verified.fit if other is not full.contestant]
    if rows:
        held = sum(leaf.nbytes for leaf in leaves(inputs).values()) + case.fields * case.pixels
        clear(inputs)
        del inputs
        meter.make_room()
        rows += [
            does_not_fit(case, contestant, rows[0], held + needed(case, contestant, backends, meter))
            for contestant in verified.too_large
        ]
    elif verified.too_large:
        verified.wrong["ours"] = "none of ours is both right and small enough, so nobody was timed"
    return {"rows": rows, "wrong": verified.wrong, "absent": verified.absent}


def needed(case: Case, contestant: Contestant, backends: Sequence[str], meter: Meter) -> float:
    """Peak extra bytes that it would have at full size: everything that it makes grows with the number of pixels."""
    parts = 4 if case.height % (4 * case.stride) == 0 == case.width % (4 * case.stride) else 2
    small = dataclasses.replace(case, height=case.height // parts, width=case.width // parts)
    inputs = make_inputs(small)
    again = next(
        c for c in make_contestants(small, *backends) if (c.name, c.schedule) == (contestant.name, contestant.schedule)
    )
    try:
        first_run(again, inputs)
        return parts**2 * meter.peak_extra_bytes(again, inputs)
    except (DoesNotFit, Unavailable):
        return math.nan
    finally:
        clear(inputs)


def does_not_fit(case: Case, contestant: Contestant, like: dict[str, Any], needs: float) -> dict[str, Any]:
    """A row without figures but one: how much memory it would take, computed from a smaller image of the same kind."""
    measured: tuple[str, ...] = (
        "ns_per_pixel",
        "times_ours",
        "gb_per_s",
        "copy_fraction",
        "page_faults",
        "cpu_share",
        "host_ms",
    )
    measured += ("median_ms", "p20_ms", "p80_ms", "peak_extra_mb", "peak_over_cm", "peak_over_gradients")
    measured += tuple(key for key in like if key.endswith("_error"))
    return {
        **like,
        **dict.fromkeys(measured, math.nan),
        "status": "does not fit",
        "contestant": contestant.name,
        "schedule": contestant.schedule,
        "runs": 0,
        "needs_gb": needs / 1e9,
    }


def stream(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One result per case of ``task``, as it is done."""
    for name in task["cases"]:
        if time.time() >= task["deadline"]:
            yield {"case": name, "skipped": "the time budget was used up"}
            continue
        yield {"case": name, "begins": True}
        torch._dynamo.reset()  # its caches are per code object, and full after eight cases
        case = dataclasses.replace(GPU_BY_NAME[name], device=task["device"])
        case = chosen_contestants(case, compile=task["compile"], full=task["full"])
        budget = task["budget"] * (TARGET_SHARE if name in TARGET_CASE_NAMES else 1)
        started = time.monotonic()
        try:
            contestants = make_contestants(case, *task["backends"])
            result = race_on_device(case, contestants, task["backends"], budget, task["repeats"])
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        yield {"case": name, "seconds": time.monotonic() - started, **result}
        gc.collect()
        if torch.device(task["device"]).type == "cuda":
            torch.cuda.synchronize()  # raises after an illegal access: this process is of no use any more
            torch.cuda.empty_cache()


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
    if task["do"] == "stream":
        for event in stream(task):
            print(EVENT + json.dumps(event), flush=True)
        return 0
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
