"""Problems in a process of their own: `python -m benchmarks.worker` with a task in JSON, started by `benchmarks.run`.

On a CPU one group of problems each, because malloc reads its settings at start-up, and one group's heap is no business of the
next. On a GPU many groups, and a line for each as soon as it is done: an illegal access takes the process with it, but
nothing that was measured.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from . import limits
from .meters import Meter, meter_for, time_all
from .problem import Inputs, Problem, cost, make_inputs, parse
from .providers import choose, kernels
from .verify import (
    Call,
    DoesNotFit,
    Truth,
    Unavailable,
    bits,
    complaint,
    errors,
    errors_in_sample,
    find_truth,
    sample_truth,
    verified_problem,
)

EVENT = "BENCHMARK "  # begins a line of JSON among whatever compilers print
AGREEMENT = 1e-4  # of two losses in float32
MB = 1e6
MEASURED = ("speed", "memory")
MODES = (*MEASURED, "correct", "bitwise")

Row = dict[str, Any]
_heard = False  # somebody listens, and would end a worker that is silent


def alive() -> None:
    if _heard:
        print(EVENT + '{"alive": true}', flush=True)


@dataclass
class _Found:
    """What is known of a group. ``unfit``: too large for the device, with what they would need."""

    rows: list[Row] = field(default_factory=list)
    wrong: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    unfit: list[Call] = field(default_factory=list)

    def add(self, call: Call, quantity: str, value: float, unit: str, **more: Any) -> None:
        self.rows.append(
            {
                "problem": str(call.problem),
                "provider": call.provider.name,
                "group": call.provider.group,
                "kernels": kernels(call.provider, call.inputs),
                "quantity": quantity,
                "value": value,
                "unit": unit,
                **more,
            }
        )


def examine(group: Sequence[tuple[str, Sequence[str]]], device: str, task: dict[str, Any]) -> dict[str, Any]:
    """Verify, then measure, the problems of a group: lines and the words of their providers. {"rows", "wrong", "absent"}.

    task: "modes"; "peaks": whether to take peak memory beside time, which on a CPU takes another process (`weigh`); "budget"
    and "most" of `time_all`.
    """
    found, meter = _Found(), meter_for(device)
    for line, words in group:
        problem = parse(line)
        inputs = make_inputs(problem, device)
        chosen, refused = choose(problem, device, words)
        found.absent |= {f"{problem}: {name}": why for name, why in refused.items() if name in words}
        if "skip_compiled" in task:
            chosen = [provider for provider in chosen if provider.group != "compiled"]
        calls = [Call(problem, provider, inputs) for provider in chosen]
        if task.get("verified"):  # by an earlier attempt; what is wrong is not among them
            found.calls += [call for call in calls if _warmed(call)]
        else:
            _verify(calls, device, found, meter)
    modes = task["modes"]
    if "bitwise" in modes:
        _compare_bits(found)
    if task["peaks"]:
        _peaks(found, meter)
    if "speed" in modes:
        _time(found, meter, task["budget"], task["most"])
    for call in found.unfit:
        found.add(
            call, "needs", _needs(call, device, meter) / 1e9, "GB", note="does not fit; computed from a smaller image"
        )
    if not any(call.provider.group == "ours" for call in found.calls):
        found.wrong.setdefault(
            f"{group[0][0]}: ours", "none of ours is both right and small enough, so nobody was timed"
        )
    return {"rows": found.rows, "wrong": found.wrong, "absent": found.absent}


def _warmed(call: Call) -> bool:
    call.result()
    call.after()
    return True


def _verify(calls: Sequence[Call], device: str, found: _Found, meter: Meter) -> None:
    problem, inputs = calls[0].problem, calls[0].inputs
    on = verified_problem(problem, device)
    small = inputs if on == problem else make_inputs(on, device)
    try:
        truth = find_truth(on, small)
    except torch.OutOfMemoryError as error:
        found.absent[f"{problem}: everybody"] = f"its truth in float64 does not fit: {str(error).splitlines()[0]}"
        return
    usual = _usual(on, small, truth, device)
    for call in calls:
        alive()
        label = f"{problem}: {call.provider.name}"
        checked = call if on == problem else Call(on, call.provider, small)
        meter.make_room()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # inductor's own deprecation warnings
                off = errors(checked, truth)
        except Unavailable as reason:
            found.absent[label] = str(reason)
            continue
        except DoesNotFit:
            found.unfit.append(call)
            continue
        except Exception as error:  # a kernel that does not compile, or does not launch: the others are not to blame
            found.wrong[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            continue
        why = complaint(on, off, usual)
        if why is not None:
            found.wrong[label] = why
            continue
        found.calls.append(call)
        for name, value in off.items():
            unit = "absolute" if name == "posterior" else "relative"
            found.add(call, f"error of {name}", value, unit, note=f"on {on}")
    if on != problem and found.calls:
        _verify_sample([call for call in found.calls if call.problem == problem], usual, found)


def _usual(problem: Problem, inputs: Inputs, truth: Truth, device: str) -> dict[str, float]:
    """Errors of the reference in the problem's own dtype; none where it does not fit."""
    (reference,) = choose(problem, device, ["reference"])[0]
    try:
        return errors(Call(problem, reference, inputs), truth)
    except DoesNotFit:
        return {}


def _verify_sample(calls: Sequence[Call], usual: dict[str, float], found: _Found) -> None:
    """At full size, where all of float64 would take minutes: gradients in some bands, and one loss for all.

    The loss is held to the median of all losses, so that of two that differ neither is right.
    """
    problem = calls[0].problem
    sample = sample_truth(problem, calls[0].inputs)
    losses: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for call in calls:
        alive()
        result = call.result()
        if result.ndim == 0:
            losses[call.provider.name] = float(result)
        call.after()
        why = complaint(problem, errors_in_sample(call, sample), usual)
        if why is not None:
            reasons[call.provider.name] = f"in a band of the image, {why}"
    for name, loss in losses.items():
        difference = abs(loss / statistics.median(losses.values()) - 1)
        if not difference <= AGREEMENT:
            reasons.setdefault(name, f"at full size its loss is off by {difference:.2g} from the median of all")
    for call in calls:
        if call.provider.name in reasons:
            found.wrong[f"{problem}: {call.provider.name}"] = reasons[call.provider.name]
            found.calls.remove(call)


def _compare_bits(found: _Found) -> None:
    """Ours, again and again: the same bits, and on a CPU with any number of threads."""
    for call in found.calls:
        if call.provider.group != "ours":
            continue
        device = call.inputs.seg_logits.device.type
        counts = [call.problem.threads] * 2 if device != "cpu" else [call.problem.threads, 1, 2, 3]
        first = bits(call)
        others = [bits(Call(replace(call.problem, threads=threads), call.provider, call.inputs)) for threads in counts]
        same = all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
        across = "runs" if device != "cpu" else "runs, and 1, 2 and 3 threads"
        found.add(call, "same bits", float(same), "", note=f"over {across}")
        if not same:
            found.wrong[f"{call.problem}: {call.provider.name}"] = f"other bits over {across}"


def _peaks(found: _Found, meter: Meter) -> None:
    for call in list(found.calls):
        meter.make_room()
        try:
            found.add(call, "peak", meter.peak_extra_bytes(call) / MB, "MB", runs=1)
        except torch.OutOfMemoryError:
            found.calls.remove(call)
            found.unfit.append(call)


def _time(found: _Found, meter: Meter, budget: float, most: int) -> None:
    while any(call.provider.group == "ours" for call in found.calls):
        try:
            timings = time_all(found.calls, meter, budget, most)
            break
        except DoesNotFit as full:
            found.unfit.append(full.args[1])
            found.calls.remove(full.args[1])
    else:
        return
    for call, timing in zip(found.calls, timings, strict=True):
        spread = {"runs": timing.runs, "cpu_share": timing.cpu_share}
        milliseconds = {"value": 1e3 * timing.median, "p20": 1e3 * timing.p20, "p80": 1e3 * timing.p80}
        found.add(call, "time", unit="ms", **milliseconds, **spread)
        if call.inputs.seg_logits.device.type == "cpu":
            found.add(call, "page faults", timing.page_faults, "a run", **spread)
        else:
            found.add(call, "host time", 1e3 * timing.host, "ms", **spread)
            found.add(call, "device allocations", timing.page_faults, "a run", **spread)
    seen: set[str] = set()
    for call in found.calls:
        if str(call.problem) not in seen:
            seen.add(str(call.problem))
            found.rows += _cost_rows(call)


def _cost_rows(call: Call) -> list[Row]:
    """What has to be moved and computed at the least, and how large the gradients are."""
    about = {"problem": str(call.problem), "provider": "", "group": "", "kernels": ""}
    counted = cost(call.problem, call.inputs.drawn())
    rows = [{**about, "quantity": name, "value": value, "unit": ""} for name, value in counted._asdict().items()]
    if call.problem.mode in ("fb", "b"):
        size = sum(leaf.nbytes for leaf in call.inputs.leaves.values())
        rows.append({**about, "quantity": "gradients", "value": size / MB, "unit": "MB"})
    return rows


def _needs(call: Call, device: str, meter: Meter) -> float:
    """Bytes that it would take at full size, inputs and peak: everything that it makes grows with the number of pixels."""
    small = replace(call.problem, height=call.problem.height // 4, width=call.problem.width // 4)
    meter.make_room()
    inputs = make_inputs(small, device)
    again = Call(small, call.provider, inputs)
    try:
        again.result()
        held = sum(leaf.nbytes for leaf in inputs.leaves.values()) + sum(kind.labels.nbytes for kind in inputs.kinds)
        return 16 * (held + meter.peak_extra_bytes(again))
    except (DoesNotFit, Unavailable):
        return math.nan
    finally:
        again.after()


def weigh(group: Sequence[tuple[str, Sequence[str]]], device: str, task: dict[str, Any]) -> dict[str, Any]:
    """Peak memory, of those that were right: one run each, warmed up on a tiny image."""
    found, meter = _Found(), meter_for(device)
    for line, words in group:
        problem = parse(line)
        inputs = make_inputs(problem, device)
        stride = math.lcm(problem.seg_stride, int(problem.field) if problem.field.isdigit() else 1)
        tiny = problem.scaled_down(2 * stride, 2 * stride)
        tiny_inputs = make_inputs(tiny, device)
        for provider in choose(problem, device, words)[0]:
            if provider.group == "compiled":
                continue
            warm = Call(tiny, provider, tiny_inputs)
            warm.result()
            warm.after()
            found.calls.append(Call(problem, provider, inputs))
            _peaks(found, meter)
            found.calls.clear()
    return {"rows": found.rows, "wrong": {}, "absent": {}}


def limit_rows(device: str, threads: Sequence[int]) -> dict[str, Any]:
    """The machine's own limits, for each number of threads."""
    rows = []
    for count in threads:
        measured = limits.measure(device, count)
        for name in ("copy", "read", "exp", "fma"):
            value = getattr(measured, name)
            about = {"problem": f"machine t{count}", "provider": "", "group": "", "kernels": "", "note": ""}
            about["note"] = measured.reasons.get(name, "")
            rows.append(
                {**about, "quantity": name, "value": value, "unit": "B/s" if name in ("copy", "read") else "/s"}
            )
    return {"rows": rows, "wrong": {}, "absent": {}}


def stream(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """An event as each group of ``task`` begins, and one with what was found."""
    device = task["device"]
    for index, group in enumerate(task["groups"]):
        if time.time() >= task["deadline"]:
            yield {"index": index, "skipped": "the time budget was used up"}
            continue
        yield {"index": index, "begins": True}
        torch._dynamo.reset()  # its caches are per code object, and full after eight problems
        started = time.monotonic()
        try:
            if task["do"] == "limits":
                result = limit_rows(device, group)
            else:
                result = (weigh if task["do"] == "weigh" else examine)(group, device, task)
        except Exception as error:
            traceback.print_exc()
            result = {"failed": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
        yield {"index": index, "seconds": time.monotonic() - started, **result}
        gc.collect()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()  # raises after an illegal access: this process is of no use any more
            torch.cuda.empty_cache()


def main(argv: Sequence[str]) -> int:
    global _heard
    task, _heard = json.loads(argv[0]), True
    if "threads" in task:
        torch.set_num_threads(task["threads"])
    for event in stream(task):
        print(EVENT + json.dumps(event), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
