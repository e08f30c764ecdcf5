"""Several kinds of drawings on one image: `make bench-objective`, or `python -m benchmarks.objective`.

    python -m benchmarks.objective                      every bar, about seven minutes
    python -m benchmarks.objective --quick              small sizes, seconds: to see that it works
    python -m benchmarks.objective --case 'time-*'      some jobs (a pattern; repeatable)
    python -m benchmarks.objective --buffers fresh      times with malloc as it comes; README.md
    python -m benchmarks.objective --device cuda        on a GPU; by default its compiled kernels, --backend triton

`annotation_objective` and `label_map` through the public API; forward + backward, float32. Memory: the peak over the
inputs of one step, gradients included, in a process of its own. Time: interleaved in one process per job, median and
p20/p80. Every contestant is held to float64 on a small image before it is measured; at full size those that compute the
same are compared.

Writes `results/objective.md`, each figure beside its bar, and `results/objective.csv`, one measurement a row (on a GPU
`objective-cuda.*`, after the backend). Exit status: 0; 1 if a contestant was wrong or a job failed; 2 if there is nothing
to benchmark. A bar that is missed is in the table, and no error. The bars are those of a CPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import coarse_kernels
from coarse_kernels import Drawings, uniform_transition

from . import baselines, cpu, gpu, report
from .cases import TRACE_WEIGHT, Case, Inputs
from .contestants import Contestant, Truth, clear, errors, first_run, verdict
from .measure import LEAST_ROUNDS, meter_for, time_all

MB = 1e6
SMALL = (64, 128)  # where everything is verified
ARGMAX_BOUND = 1e-5  # how far below the largest logit the one of the chosen class may be, logits of scale 2
AGREEMENT = 1e-4  # at full size: relative difference of losses in float32, share of pixels with another class
BUDGET = 30.0  # seconds of timed runs per job

# --- what is drawn ----------------------------------------------------------------------------------------------------

# Layers of the labels of a scene. "own": a third of each is undrawn, on its own; "same": where the first is undrawn.
LAYERS = (
    ("positive", "own"), ("positive", "own"), ("positive", "own"), ("negative", "own"), ("negative", "own"),
    ("positive", "same"), ("positive", "same"), ("positive", "same"), ("negative", "same"), ("negative", "same"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Scene:
    """An image: class logits and, where ``field_stride`` is not 0, a confusion-matrix field, each on its grid."""

    classes: int
    height: int = 1024
    width: int = 2048
    seg_stride: int = 4
    field_stride: int = 0
    gradients: bool = True

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width

    def small(self) -> Scene:
        """Same classes and grids."""
        return dataclasses.replace(self, height=SMALL[0], width=SMALL[1])

    def quick(self) -> Scene:
        return dataclasses.replace(self, height=SMALL[0], width=SMALL[1], classes=min(self.classes, 5))

    def describe(self) -> str:
        words = [f"C = {self.classes}", f"{self.height}x{self.width}", f"class logits {_grid(self.seg_stride)}"]
        if self.field_stride:
            words.append(f"field {_grid(self.field_stride)}")
        return ", ".join(words)


def _grid(stride: int) -> str:
    return "on the pixel grid" if stride == 1 else f"at stride {stride}"


def polygons(height: int, width: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """(H, W) number of the polygon that a pixel is in, and how many there are: those nearest to points on a rough grid.

    About 32 pixels across at 1024 rows, never under 16. Their edges lie at no multiple of anything, as in drawings.
    """
    edge = max(16, height // 32)
    rows, columns = -(-height // edge) + 2, -(-width // edge) + 2  # with a margin of one
    jitter = torch.rand(2, rows, columns, generator=generator)
    y = (torch.arange(height) + 0.5) / edge + 1  # in cells
    x = (torch.arange(width) + 0.5) / edge + 1
    nearest = torch.full((height, width), math.inf)
    found = torch.zeros(height, width, dtype=torch.int64)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            row, column = y.long()[:, None] + down, x.long()[None] + right
            cell = row * columns + column
            distance = (row + jitter[0].flatten()[cell] - y[:, None]).square_()
            distance += (column + jitter[1].flatten()[cell] - x[None]).square_()
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            found = torch.where(closer, cell, found)
    return found, rows * columns


def make_inputs(scene: Scene, seed: int = 0) -> Inputs:
    """Random logits of scale 2, an annotator who is right more often than not, and every layer of `LAYERS`.

    Labels are (1, L, H, W). Without a field its logits are a tensor without elements.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(2.0)

    def grid(stride: int) -> tuple[int, int]:
        return scene.height // stride, scene.width // stride

    seg = normal(1, scene.classes, *grid(scene.seg_stride)).requires_grad_(scene.gradients)
    cm = torch.empty(0)
    if scene.field_stride:
        cm = normal(1, scene.classes, scene.classes, *grid(scene.field_stride))
        cm += 2.0 * torch.eye(scene.classes)[:, :, None, None]
        cm.requires_grad_(scene.gradients)
    labels = torch.empty(1, len(LAYERS), *scene.size, dtype=torch.uint8)
    for k, (_, undrawn) in enumerate(LAYERS):
        place, count = polygons(*scene.size, generator)
        classes = torch.randint(0, scene.classes, (count,), dtype=torch.uint8, generator=generator)
        if undrawn == "own":
            classes[torch.randperm(count, generator=generator)[: count // 3]] = baselines.IGNORE
            labels[0, k] = classes[place]
        else:
            labels[0, k] = classes[place].masked_fill_(labels[0, 0] == baselines.IGNORE, baselines.IGNORE)
    return Inputs(seg, cm, labels, uniform_transition(scene.classes))


def on_device(inputs: Inputs, device: str) -> Inputs:
    def moved(t: Tensor) -> Tensor:
        return t.detach().to(device).requires_grad_(t.requires_grad)

    seg, cm, labels, transition = inputs
    return Inputs(moved(seg), moved(cm), moved(labels), None if transition is None else moved(transition))


# --- who computes what ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    """What a contestant is given of the layers of a scene, first to last + 1."""

    field: tuple[int, int] | None = None  # positive drawings that the field explains
    dense: tuple[int, int] | None = None  # trusted positive drawings: plain cross-entropy
    negative: tuple[int, int] | None = None  # trusted negative drawings: uniform transition


GIVEN = {
    "field": Given(field=(0, 1)),
    "field + 1 trusted": Given(field=(0, 1), negative=(3, 4)),
    "field + 2 trusted": Given(field=(0, 1), negative=(3, 5)),
    "field + 1 trusted, same": Given(field=(0, 1), negative=(8, 9)),
    "field + 2 trusted, same": Given(field=(0, 1), negative=(8, 10)),
    "3 layers": Given(field=(0, 3)),
    "3 layers, same": Given(field=(5, 8)),
    "trusted": Given(dense=(0, 1)),
}
PLAIN = "interpolate + cross_entropy"
LABEL_MAP, ARGMAX = "label_map", "interpolate + argmax"
SAME_ANSWER = ({"trusted", PLAIN}, {LABEL_MAP, ARGMAX})


def _layers(labels: Tensor, which: tuple[int, int]) -> Tensor:
    """One layer (B, H, W), several (B, K, H, W)."""
    first, stop = which
    return labels[:, first] if stop == first + 1 else labels[:, first:stop]


def kinds_of(
    given: Given, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float = TRACE_WEIGHT
) -> list[Drawings]:
    kinds = []
    if given.field is not None:
        kinds.append(Drawings(_layers(labels, given.field), cm_logits, trace_weight=trace_weight))
    if given.dense is not None:
        kinds.append(Drawings(_layers(labels, given.dense)))
    if given.negative is not None:
        kinds.append(Drawings(_layers(labels, given.negative), None, transition))
    return kinds


def kernels_of(name: str, inputs: Inputs, backend: str) -> str:
    """The kernel of each kind of drawings, by its first word: "strided, trusted"."""
    if name not in GIVEN:
        return ""
    lines = coarse_kernels.explain(inputs.seg_logits, kinds_of(GIVEN[name], *inputs[1:]), backend=backend).splitlines()
    kernels = (line.partition("]: ")[2] for line in lines if line.lstrip().startswith("drawings["))
    return ", ".join(kernel.partition(":")[0] for kernel in kernels)


def objective(given: Given, backend: str) -> baselines.Formulation:
    def annotation_objective(
        seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, transition: Tensor | None, trace_weight: float
    ) -> Tensor:
        kinds = kinds_of(given, cm_logits, labels, transition, trace_weight)
        return coarse_kernels.annotation_objective(seg_logits, kinds, backend=backend).loss

    return annotation_objective


def plain(labels: Tensor) -> baselines.Formulation:
    """Cross-entropy of the first layer, which it is given in int64: nobody is timed converting it."""
    targets = labels[:, 0].long()

    def cross_entropy(seg_logits: Tensor, *_: Any) -> Tensor:
        logits = F.interpolate(seg_logits, targets.shape[1:], mode="bilinear", align_corners=False)
        return F.cross_entropy(logits, targets, ignore_index=baselines.IGNORE)

    return cross_entropy


def _label_map(backend: str) -> baselines.Formulation:
    def label_map(seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
        return coarse_kernels.label_map(seg_logits, labels.shape[2:], backend=backend)

    return label_map


def _argmax(seg_logits: Tensor, cm_logits: Tensor, labels: Tensor, *_: Any) -> Tensor:
    return F.interpolate(seg_logits, labels.shape[2:], mode="bilinear", align_corners=False).argmax(1)


def make_contestant(name: str, inputs: Inputs, backend: str, threads: int) -> Contestant:
    made: dict[str, Callable[[], baselines.Formulation]] = {
        PLAIN: lambda: plain(inputs.labels),
        LABEL_MAP: lambda: _label_map(backend),
        ARGMAX: lambda: _argmax,
    }
    formulation = made[name]() if name in made else objective(GIVEN[name], backend)
    return Contestant(name, formulation, threads)


# --- right or wrong ---------------------------------------------------------------------------------------------------


def truth(given: Given, inputs: Inputs) -> Truth:
    """Loss and gradients from the reference backend in float64."""
    seg, cm = (x.detach().double().requires_grad_(x.requires_grad) for x in inputs[:2])
    transition = None if inputs.transition is None else inputs.transition.double()
    loss = objective(given, "reference")(seg, cm, inputs.labels, transition, TRACE_WEIGHT)
    wanted = (seg,) if given.field is None else (seg, cm)
    return Truth(loss.detach(), torch.autograd.grad(loss, wanted))


def find_errors(contestant: Contestant, inputs: Inputs) -> dict[str, float]:
    """Relative errors of loss and gradients; of a label map how much too small the logit of the chosen class is."""
    if contestant.name in (LABEL_MAP, ARGMAX):
        size = inputs.labels.shape[2:]
        logits = F.interpolate(inputs.seg_logits.double(), size, mode="bilinear", align_corners=False)
        chosen = logits.gather(1, first_run(contestant, inputs).long()[:, None])
        return {"argmax": float((logits.amax(1) - chosen[:, 0]).max())}
    given = GIVEN["trusted" if contestant.name == PLAIN else contestant.name]
    return errors(contestant, inputs, truth(given, inputs))


def complaint(found: Mapping[str, float]) -> str | None:
    """Why it may not be measured, or None."""
    if "argmax" in found:
        error = found["argmax"]
        return None if error <= ARGMAX_BOUND else f"chooses classes {error:.2g} below the largest logit"
    return verdict(Case("objective", 0, 0, 0), dict(found))


def disagreement(contestants: Sequence[Contestant], inputs: Inputs) -> str | None:
    """At full size, where float64 would not fit: whether those that compute the same have the same loss, or map."""
    names = {contestant.name for contestant in contestants}
    if names not in SAME_ANSWER:
        return None
    one, other = (first_run(contestant, inputs) for contestant in contestants)
    clear(inputs)
    if one.ndim == 0:
        difference = float((one - other).abs() / other.abs())
    else:
        difference = float((one.long() != other).double().mean())
    return None if difference <= AGREEMENT else f"at full size they differ by {difference:.2g}"


# --- jobs and bars ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Job:
    """What is measured together: in one process where it is time, in a process a contestant where it is memory."""

    name: str
    scene: Scene
    contestants: tuple[str, ...]
    quantity: str  # "peak" | "time"
    threads: int = 1


_BESIDE = ("field", "field + 1 trusted", "field + 2 trusted", "field + 1 trusted, same", "field + 2 trusted, same")
_LAYERED = ("field", "3 layers", "3 layers, same")
_MAPS = (LABEL_MAP, ARGMAX)
_WIDE = Scene(150, gradients=False)

JOBS = (
    Job("peak-objective", Scene(19, field_stride=8), ("field + 1 trusted",), "peak"),
    Job("peak-trusted-c19", Scene(19), ("trusted", PLAIN), "peak"),
    Job("peak-trusted-c150", Scene(150), ("trusted", PLAIN), "peak"),
    Job("peak-label-map", _WIDE, _MAPS, "peak"),
    *(
        Job(f"time-trusted-c{classes}-{threads}", Scene(classes), ("trusted", PLAIN), "time", threads)
        for classes in (19, 150)
        for threads in (1, 2)
    ),
    Job("time-beside", Scene(19, field_stride=8), _BESIDE, "time"),
    Job("time-beside-pixel-logits", Scene(19, seg_stride=1, field_stride=8), _BESIDE, "time"),
    Job("time-layers", Scene(19, field_stride=8), _LAYERED, "time"),
    Job("time-layers-pixel", Scene(19, 256, 512, seg_stride=1, field_stride=1), _LAYERED, "time"),
    Job("time-label-map", _WIDE, _MAPS, "time"),
)
BY_NAME = {job.name: job for job in JOBS}


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a figure is held to: one of three limits.

    most_mb: peak of ``own``, MB.
    most: median time of ``own`` over that of ``other``.
    least: median time of ``other`` over that of ``own``.
    """

    job: str
    what: str
    own: str
    other: str | None
    most_mb: float | None = None
    most: float | None = None
    least: float | None = None

    @property
    def words(self) -> str:
        if self.most_mb is not None:
            return f"<= {self.most_mb:g} MB"
        return f"<= {self.most:g}x" if self.most is not None else f">= {self.least:g}x faster"


def _time_bars() -> list[Bar]:
    bars = [
        Bar(f"time-trusted-c{classes}-{threads}", "trusted alone: time", "trusted", PLAIN, least=5)
        for classes in (19, 150)
        for threads in (1, 2)
    ]
    for job in ("time-beside", "time-beside-pixel-logits"):
        for count, most in ((1, 1.15), (2, 1.25)):
            what = f"{count} trusted layer{'s'[: count - 1]} beside a field: time"
            bars += [
                Bar(job, f"{what}; undrawn: {third}", f"field + {count} trusted{ending}", "field", most=most)
                for third, ending in (("a third of each layer", ""), ("the same third", ", same"))
            ]
    for job in ("time-layers", "time-layers-pixel"):
        bars += [
            Bar(job, f"3 layers under a field: time; undrawn: {third}", f"3 layers{ending}", "field", most=1.6)
            for third, ending in (("a third of each layer", ""), ("the same third", ", same"))
        ]
    return [*bars, Bar("time-label-map", "label_map: time", LABEL_MAP, ARGMAX, least=5)]


BARS = (
    Bar("peak-objective", "a field and one trusted layer: peak", "field + 1 trusted", None, most_mb=85),
    Bar("peak-trusted-c19", "trusted alone: peak", "trusted", PLAIN, most_mb=30),
    Bar("peak-trusted-c150", "trusted alone: peak", "trusted", PLAIN, most_mb=120),
    Bar("peak-label-map", "label_map: peak", LABEL_MAP, ARGMAX, most_mb=10),
    *_time_bars(),
)


# --- one job ----------------------------------------------------------------------------------------------------------

COLUMNS = (
    "job", "contestant", "kernels", "quantity", "value", "unit", "p20", "p80", "runs", "threads", "cpu_share", "page_faults",
    "buffers", "classes", "height", "width", "seg_stride", "field_stride",
    "cpu", "cores", "isa", "torch", "python", "os", "load_before", "date",
)  # fmt: skip
GPU_COLUMNS = (*COLUMNS, "gpu", "driver", "cuda", "triton")


def scene_of(job: Job, quick: bool) -> Scene:
    return job.scene.quick() if quick else job.scene


def measure(task: Mapping[str, Any]) -> dict[str, Any]:
    """Verify, then measure, in this process: {"rows": measurements, "wrong": why by contestant}."""
    torch.set_num_threads(task["threads"])
    job, backend, device = BY_NAME[task["job"]], task["backend"], task.get("device", "cpu")
    scene = scene_of(job, task["quick"])
    names = task["contestants"]
    wrong: dict[str, str] = {}
    rows: list[dict[str, Any]] = []

    def add(contestant: str, quantity: str, value: float, unit: str, **more: Any) -> None:
        about = {"job": job.name, "contestant": contestant, "quantity": quantity, "value": value, "unit": unit}
        where = {key: getattr(scene, key) for key in ("classes", "height", "width", "seg_stride", "field_stride")}
        unknown = dict.fromkeys(("p20", "p80", "runs", "cpu_share", "page_faults"), math.nan)
        about |= {"kernels": kernels.get(contestant, ""), "threads": job.threads, "buffers": task["buffers"]}
        rows.append({**unknown, **about, **where, **machine, **more})

    meter = meter_for(device)
    machine = meter.environment()
    inputs = on_device(make_inputs(scene.small()), device)
    kernels = {name: kernels_of(name, inputs, backend) for name in names}
    for name in names:
        found = find_errors(make_contestant(name, inputs, backend, job.threads), inputs)
        why = complaint(found)
        if why is not None:
            wrong[name] = why
        for key, error in found.items():
            add(name, f"{key}_error", error, "absolute" if key == "argmax" else "relative")
    if wrong:  # there would be nothing to compare with
        return {"rows": [], "wrong": wrong}

    inputs = on_device(make_inputs(scene), device)
    kernels = {name: kernels_of(name, inputs, backend) for name in names}
    contestants = [make_contestant(name, inputs, backend, job.threads) for name in names]
    if job.quantity == "peak":
        (contestant,) = contestants
        add(contestant.name, "peak", meter.peak_extra_bytes(contestant, inputs) / MB, "MB", runs=1)
        if scene.gradients:
            leaves = inputs.seg_logits.nbytes + inputs.cm_logits.nbytes
            add(contestant.name, "gradients", leaves / MB, "MB")
        return {"rows": rows, "wrong": {}}
    why = disagreement(contestants, inputs)
    if why is not None:
        return {"rows": [], "wrong": {" and ".join(names): why}}
    timings = time_all(contestants, inputs, task["budget"], task["repeats"], meter)
    for contestant, timing in zip(contestants, timings, strict=True):
        spread = {"runs": timing.runs, "cpu_share": timing.cpu_share, "page_faults": timing.page_faults}
        times = {"value": timing.median_ms, "p20": timing.p20_ms, "p80": timing.p80_ms}
        add(contestant.name, "time", unit="ms", **times, **spread)
        per_pixel = {key: 1e6 * ms / scene.pixels for key, ms in times.items()}
        add(contestant.name, "time_per_pixel", unit="ns", **per_pixel, **spread)
    return {"rows": rows, "wrong": {}}


def ask(task: dict[str, Any], buffers: str) -> dict[str, Any]:
    """`measure` in a process of its own, under these settings of malloc."""
    return cpu.ask_worker(task, buffers, task["threads"], ("benchmarks.objective", "--worker"))


def run(jobs: Sequence[Job], backend: str, options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """All measurements, and what went wrong."""
    load_before = os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan
    rows: list[dict[str, Any]] = []
    complaints = []
    for job in jobs:
        started = time.monotonic()
        groups = [[name] for name in job.contestants] if job.quantity == "peak" else [list(job.contestants)]
        buffers = "live" if job.quantity == "peak" else options.buffers
        if options.device != "cpu":
            buffers = "cached"
        for names in groups:
            task = {
                "job": job.name,
                "contestants": names,
                "backend": backend,
                "device": options.device,
                "threads": job.threads,
                "buffers": buffers,
                "quick": options.quick,
                "budget": options.budget,
                "repeats": options.repeats,
            }
            result = ask(task, "fresh" if buffers == "cached" else buffers)
            if "failed" in result:
                complaints.append(f"{job.name}: {', '.join(names)}: {result['failed']}")
                continue
            complaints += [f"{job.name}: {who}: {why}; not measured" for who, why in result["wrong"].items()]
            rows += [{**row, "load_before": load_before} for row in result["rows"]]
        print(f"{job.name}: {time.monotonic() - started:.0f} s", file=sys.stderr)
    return rows, complaints


# --- the table --------------------------------------------------------------------------------------------------------

Row = Mapping[str, Any]


def _find(rows: Sequence[Row], job: str, contestant: str | None, quantity: str) -> Row | None:
    wanted = (job, contestant, quantity)
    return next((row for row in rows if (row["job"], row["contestant"], row["quantity"]) == wanted), None)


def is_disturbed(row: Row) -> bool:
    """It had less than its cores. Plain PyTorch on two threads leaves one idle in places, so there only ours tells."""
    if row["buffers"] == "cached":  # a GPU does not need the host
        return False
    ours = row["contestant"] in GIVEN or row["contestant"] == LABEL_MAP
    return (ours or row["threads"] == 1) and float(row["cpu_share"]) < report.DISTURBED * row["threads"]


def figure(bar: Bar, rows: Sequence[Row]) -> float | None:
    """What is held to the bar: MB, or a ratio of medians. None where it was not measured."""
    own = _find(rows, bar.job, bar.own, "time" if bar.most_mb is None else "peak")
    if own is None or bar.most_mb is not None:
        return None if own is None else float(own["value"])
    other = _find(rows, bar.job, bar.other, "time")
    if other is None:
        return None
    ratio = float(own["value"]) / float(other["value"])
    return ratio if bar.most is not None else 1 / ratio


def is_met(bar: Bar, value: float) -> bool:
    if bar.most_mb is not None:
        return value <= bar.most_mb
    return value <= bar.most if bar.most is not None else value >= (bar.least or 0.0)


def _milliseconds(row: Row) -> str:
    return f"{row['value']:.1f} ({row['p20']:.1f} to {row['p80']:.1f})"


def _bar_cells(bar: Bar, rows: Sequence[Row], quick: bool) -> list[str]:
    job = BY_NAME[bar.job]
    conditions = f"{scene_of(job, quick).describe()}, {job.threads} thread{'s'[: job.threads - 1]}"
    value = figure(bar, rows)
    own = _find(rows, bar.job, bar.own, "time" if bar.most_mb is None else "peak")
    if value is None or own is None:
        return [bar.what, conditions, bar.words, "not measured", "", "", "", ""]
    judged = "" if quick else " met" if is_met(bar, value) else " **missed**"
    if bar.most_mb is not None:
        other = None if bar.other is None else _find(rows, bar.job, bar.other, "peak")
        gradients = _find(rows, bar.job, bar.own, "gradients")
        beside = [] if other is None else [f"{bar.other} {other['value']:.1f} MB"]
        beside += [] if gradients is None else [f"gradients {gradients['value']:.1f} MB"]
        return [
            bar.what,
            conditions,
            bar.words,
            f"{value:.1f} MB{judged}",
            own["kernels"],
            "",
            "; ".join(beside),
            "",
        ]
    pair = [row for name in (bar.own, bar.other) if (row := _find(rows, bar.job, name, "time")) is not None]
    scale = 1e6 / scene_of(job, quick).pixels
    shares = [f"{row['cpu_share']:.2f}" for row in pair if is_disturbed(row)]
    return [
        bar.what,
        conditions,
        bar.words,
        f"{value:.2f}x{judged}",
        own["kernels"],
        f"{_milliseconds(pair[0])}; {scale * pair[0]['value']:.1f} ns per pixel",
        f"{bar.other} {_milliseconds(pair[1])}; {scale * pair[1]['value']:.1f} ns per pixel",
        f"disturbed: {' and '.join(shares)} of {job.threads} cores" if shares else "",
    ]


def markdown(rows: Sequence[Row], jobs: Sequence[Job], quick: bool, seconds: float) -> str:
    """Every bar of the jobs, with its figure and conditions."""
    device = rows[0].get("gpu", "a CPU") if rows else "a CPU"
    lines = [f"# Several kinds of drawings in one objective, on {device}", ""]
    if quick:
        lines += ["**Small sizes, to see that it works: the bars are for others, and the figures mean nothing.**", ""]
    if rows:
        first = rows[0]
        buffers = sorted({row["buffers"] for row in rows if row["quantity"] == "time"})
        lines += [
            f"{first['cpu']}, {first['cores']} cores, {first['isa']}; torch {first['torch']}, "
            f"Python {first['python']}, {first['os']}; {first['date']}; "
            f"load average before the run {first['load_before']:.2f}. {seconds:.0f} s in total.",
            "",
            "float32, forward + backward (label maps: forward). Every contestant passed the float64 check before it "
            "was measured. Time: ms, median (p20 to p80) of interleaved runs, ratios of medians"
            + (f", {' and '.join(buffers)} buffers" if buffers else "")
            + ". Peak: resident memory over the inputs, gradients included, one step in a fresh process; "
            "MB are 1e6 bytes.",
            "",
        ]
        timed = [row for row in rows if row["quantity"] == "time"]
        disturbed = [row for row in timed if is_disturbed(row)]
        if disturbed:
            lines += [
                f"**{len(disturbed)} of {len(timed)} times were disturbed**: they had less than "
                f"{100 * report.DISTURBED:.0f} % of the cores that they run on. Run again with nothing else running.",
                "",
            ]
    lines += [
        "| case | conditions | bar | figure | kernels | ours | against | remark |",
        "|---|---|---|---|---|---|---|---|",
    ]
    names = {job.name for job in jobs}
    for bar in BARS:
        if bar.job in names:
            lines.append(f"| {' | '.join(_bar_cells(bar, rows, quick))} |")
    return "\n".join(lines) + "\n"


# --- command line -----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.objective", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes and three runs: figures mean nothing")
    parser.add_argument("--case", action="append", default=[], metavar="PATTERN", help="only these jobs; repeatable")
    parser.add_argument("--buffers", choices=("reused", "fresh"), default="reused", help="of times: README.md")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds of timed runs per job")
    parser.add_argument("--repeats", type=int, help=f"most timed runs per contestant, at least {LEAST_ROUNDS}")
    parser.add_argument("--device", default="cpu", help="of the tensors; default cpu")
    parser.add_argument("--backend", help="whose kernels are 'ours'; default cpu, on a GPU cuda")
    parser.add_argument("--out", type=Path, help="folder for the results; with --quick by default none")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeats is not None and options.repeats < LEAST_ROUNDS:
        parser.error(f"--repeats: expected at least {LEAST_ROUNDS}, got {options.repeats}")
    if options.quick:
        options.budget, options.repeats = 0.1, LEAST_ROUNDS
    elif options.out is None:
        options.out = cpu.ROOT / "benchmarks" / "results"
    return options


def choose_jobs(patterns: Sequence[str]) -> list[Job]:
    chosen = [job for job in JOBS if not patterns or any(fnmatch.fnmatchcase(job.name, one) for one in patterns)]
    if not chosen:
        print(f"--case: expected one of {list(BY_NAME)} or a pattern, got {list(patterns)}", file=sys.stderr)
        sys.exit(2)
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.worker:
        print(json.dumps(measure(json.loads(options.worker))))
        return 0
    jobs = choose_jobs(options.case)
    if options.device == "cpu":
        backend, stem = cpu.choose_backend(options.backend), "objective"
    else:
        reason = gpu.no_device(options.device)
        if reason is not None:
            print(reason, file=sys.stderr)
            return 2
        backend = gpu.choose_backends([options.backend] if options.backend else [], options.device)[0]
        stem, jobs = f"objective-{backend}", [job for job in jobs if job.threads == 1]
    started = time.monotonic()
    rows, complaints = run(jobs, backend, options)
    if rows:
        text = markdown(rows, jobs, options.quick, time.monotonic() - started)
        print(text)
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            report.write_csv(options.out / f"{stem}.csv", rows, COLUMNS if options.device == "cpu" else GPU_COLUMNS)
            (options.out / f"{stem}.md").write_text(text)
    for one in complaints:
        print(f"FAILED {one}", file=sys.stderr)
    return 1 if complaints or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
