"""One training step at full resolution on a CPU: `make highres`, or `python -m benchmarks.highres`.

1024x2048, 19 classes, positive and negative drawings, forward, backward, AdamW; the network's class logits are at stride 4.
Which drawings have confusion matrices, a field on a stride-8 grid for each such kind:

    positives    recommended: the negative drawings are trusted, since free matrices on both kinds are degenerate
    both         a field for each kind

    ours         `coarse_kernels`, one call: logits and fields are interpolated inside the kernel
    published    the same networks; logits and fields interpolated by PyTorch, then permute and bmm (`baselines.published`)

Every size is a process of its own, and its peak resident memory (interpreter and libraries included) is what the operating
system reports. The published step grows by the C x C fields, so it is measured at sizes that fit into free memory, and where
the next one would not, the line through the measured sizes gives the figure, marked as computed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

MATRICES = ("positives", "both")  # which drawings have them; the recommended configuration comes first
STRIDE = 8
TRACE_WEIGHT = 0.01
WIDTHS = (32, 64, 128, 192)
LIMIT_GB = 8.0
GB = 1e9
SAFE_SHARE = 0.9  # of the memory that is free: more than that is not tried


def step(matrices: str, kind: str, height: int, width: int, classes: int, steps: int) -> dict[str, float]:
    """Train ``steps`` + 1 steps in this process; the first warms up. Returns peak bytes, median seconds, the first loss."""
    import resource

    import torch

    from benchmarks import baselines
    from coarse_kernels import Drawings, annotation_objective, uniform_transition
    from coarse_train.config import DrawingsConfig, FitConfig, ModelConfig
    from coarse_train.model import ModelOutput, build_model, parameter_groups

    field = DrawingsConfig(cm="grid", stride=STRIDE)
    of_negatives = {"positives": DrawingsConfig(), "both": field}[matrices]
    config = FitConfig(model=ModelConfig(network="street", widths=WIDTHS), positive=field, negative=of_negatives)
    torch.manual_seed(0)
    model = build_model(config, 3, classes, None)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.optim))
    image = torch.rand(1, 3, height, width)
    positive, negative = (torch.randint(0, classes, (1, height, width), dtype=torch.uint8) for _ in range(2))
    transition = uniform_transition(classes)

    def ours(out: ModelOutput) -> torch.Tensor:
        kinds = [
            Drawings(positive, out.positive_cm, trace_weight=TRACE_WEIGHT),
            Drawings(negative, out.negative_cm, transition, trace_weight=TRACE_WEIGHT),
        ]
        return annotation_objective(out.seg_logits, kinds).loss

    def published(out: ModelOutput) -> torch.Tensor:
        assert out.positive_cm is not None
        size = (height, width)
        logits = torch.nn.functional.interpolate(out.seg_logits, size, mode="bilinear", align_corners=False)
        loss = baselines.published(logits, out.positive_cm, positive, None, TRACE_WEIGHT)
        if out.negative_cm is not None:
            return loss + baselines.published(logits, out.negative_cm, negative, transition, TRACE_WEIGHT)
        # trusted: p itself, in the same layout, without a matrix to multiply it with
        named = logits.softmax(1).permute(0, 2, 3, 1).reshape(-1, classes) @ transition
        log_named = named.clamp_min(baselines.TINY).log()
        return loss + torch.nn.functional.nll_loss(log_named, negative.flatten().long(), ignore_index=baselines.IGNORE)

    objective = {"ours": ours, "published": published}[kind]
    losses, seconds = [], []
    for _ in range(steps + 1):
        started = time.perf_counter()
        loss = objective(model(image))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del loss
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak": peak, "seconds": sorted(seconds[1:])[(len(seconds) - 1) // 2], "loss": losses[0]}


def measure(matrices: str, kind: str, height: int, width: int, classes: int, steps: int) -> dict[str, float]:
    """`step` in a process of its own."""
    order = json.dumps([matrices, kind, height, width, classes, steps])
    command = [sys.executable, "-m", "benchmarks.highres", "--worker", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).resolve().parents[1])
    if done.returncode != 0:
        raise RuntimeError(
            f"{kind} with matrices on {matrices} at {height}x{width} ended with status {done.returncode}:\n"
            f"{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def line_through(sizes: list[int], peaks: list[float]) -> tuple[float, float]:
    """(bytes at 0 pixels, bytes per pixel) of the line through the two largest sizes."""
    slope = (peaks[-1] - peaks[-2]) / (sizes[-1] - sizes[-2])
    return peaks[-1] - slope * sizes[-1], slope


def free_bytes() -> float:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compare(matrices: str, height: int, width: int, classes: int, steps: int) -> list[dict[str, object]]:
    """Rows of the table, the whole image first: ours and published at the whole, half, a quarter and an eighth of each side."""
    by_size: list[list[dict[str, object]]] = []
    sizes: list[int] = []
    peaks: list[float] = []
    for part in (8, 4, 2, 1):
        h, w = height // part, width // part
        where = {"matrices": matrices, "size": f"{h}x{w}"}
        ours = measure(matrices, "ours", h, w, classes, steps)
        rows: list[dict[str, object]] = [{"step": "ours", "how": "measured", **where, **ours}]
        by_size.append(rows)
        pixels = h * w
        expected = (
            sum(a * b for a, b in zip(line_through(sizes, peaks), (1, pixels), strict=True)) if len(sizes) > 1 else 0
        )
        if expected > SAFE_SHARE * free_bytes():
            rows.append({"step": "published", "how": "computed", **where, "peak": expected})
            continue
        published = measure(matrices, "published", h, w, classes, 1)  # most of a minute each at half size
        if abs(published["loss"] - ours["loss"]) > 1e-3 * abs(ours["loss"]):
            raise RuntimeError(
                f"{h}x{w}, matrices on {matrices}: the losses differ, {ours['loss']} and {published['loss']}: "
                "nothing to compare"
            )
        rows.append({"step": "published", "how": "measured", **where, **published})
        sizes.append(pixels)
        peaks.append(published["peak"])
    return [row for rows in reversed(by_size) for row in rows]


def table(rows: list[dict[str, object]]) -> str:
    lines = ["| matrices on | step | size | peak memory, GB | s per step | |", "|---|---|---|---|---|---|"]
    for row in rows:
        seconds = f"{row['seconds']:.2f}" if "seconds" in row else "not run"
        lines.append(
            f"| {row['matrices']} | {row['step']} | {row['size']} | {float(str(row['peak'])) / GB:.2f} | {seconds} "
            f"| {row['how']} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of ours, after one that warms up")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/highres.md"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        print(json.dumps(step(*json.loads(options.worker))))
        return 0
    from .measure import environment

    shape = (options.height, options.width, options.classes, options.steps)
    rows = [row for matrices in MATRICES for row in compare(matrices, *shape)]
    facts = ", ".join(f"{name} {value}" for name, value in environment().items())
    text = (
        f"One training step, {options.classes} classes, positive and negative drawings, class logits at stride 4, confusion "
        f"matrices on a stride-{STRIDE} grid; recommended: on the {MATRICES[0]}, the others trusted\n\n"
        f"{table(rows)}\n\n{facts}\n"
    )
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text)
    peak = max(float(str(row["peak"])) for row in rows if row["step"] == "ours") / GB
    print(f"ours: peak {peak:.2f} GB, {'within' if peak < LIMIT_GB else 'NOT within'} {LIMIT_GB:g} GB")
    return 0 if peak < LIMIT_GB else 1


if __name__ == "__main__":
    sys.exit(main())
