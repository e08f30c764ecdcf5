"""Every fused backend once over small problems, to be run under compute-sanitizer (test_sanitize.py, README.md).

    compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.gpu.sanitize

Exit status 0; 2 where a result is wrong. Sizes are odd, so that the last block of everything is a part of one; values are
compared as well, since a kernel that does nothing is clean.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

import coarse_kernels as ck
from tests import test_objective_differential as objectives
from tests.contract import GRADIENT_APART, GRADIENT_FLOOR, LOSS_APART
from tests.helpers import SCHEDULES, evaluate, gradient_error, loss_error, make_problem, oracle, put, use_device
from tests.test_objective_differential import Kind

# classes, image, grid, images in the field
PROBLEMS = (
    (2, (7, 33), None, 2),
    (19, (5, 37), None, 2),
    (19, (5, 37), None, 1),
    (33, (2, 19), None, 2),
    (19, (21, 43), (3, 6), 2),
    (19, (21, 43), (3, 6), 1),
    (5, (19, 17), (1, 1), 1),
    (3, (4, 5, 9), (2, 2, 3), 2),
)

# classes, image, grid of the class logits, trusted kinds: labels in registers and in memory, a learned transition, cells of
# one thread, of several warps, of tiles that share some
OBJECTIVES = (
    (19, (7, 37), None, (Kind(),)),
    (3, (7, 37), None, (Kind("uniform", 3), Kind("random", 2))),
    (19, (21, 43), (5, 11), (Kind(),)),
    (2, (41, 43), (19, 21), (Kind("uniform"),)),
    (3, (95, 151), (2, 3), (Kind("random", 2), Kind())),
    (3, (4, 5, 9), (2, 2, 3), (Kind(), Kind("uniform", 4))),
)


def main(argv: Sequence[str]) -> int:
    device = argv[0] if argv else "cuda"
    use_device(device)
    wrong, runs = [], 0
    for backend in argv[1:] or [name for name in ck.available_backends(device) if name != "reference"]:
        for classes, size, grid, cm_batch in PROBLEMS:
            for dtype, stream in ((torch.float32, "positive"), (torch.bfloat16, "random")):
                problem = make_problem(classes, size, grid, cm_batch=cm_batch, stream=stream, trace_weight=0.1).to(
                    dtype
                )
                truth = oracle(problem)
                for schedule in SCHEDULES:
                    found = evaluate(problem, backend, schedule)
                    posterior = ck.annotation_posterior(problem.seg, problem.cm, problem.labels, backend=backend)
                    bound = GRADIENT_APART if dtype == torch.float32 else GRADIENT_FLOOR[dtype]
                    error = max(gradient_error(g, truth.gradients[name]) for name, g in found.gradients.items())
                    runs += 1
                    if (
                        loss_error(found.loss, truth.loss) > LOSS_APART
                        or error > bound
                        or not posterior.isfinite().all()
                    ):
                        wrong.append(f"{backend} {schedule} C={classes} {size} on {grid}, {dtype}: {error:.2g}")
        for classes, size, grid, kinds in OBJECTIVES:
            for dtype in (torch.float32, torch.bfloat16):
                objective = objectives.make(classes, size, kinds, grid).to(dtype)
                exact = objectives.evaluate(objective, "reference", torch.float64, "one_pass", None)
                ours = objectives.evaluate(objective, backend, None, "one_pass", None)
                labels = ck.label_map(put(objective.seg), size, backend=backend)
                bound = GRADIENT_APART if dtype == torch.float32 else GRADIENT_FLOOR[dtype]
                error = max(gradient_error(g, exact.gradients[name]) for name, g in ours.gradients.items())
                runs += 1
                if (
                    loss_error(ours.losses["loss"], exact.losses["loss"]) > LOSS_APART
                    or error > bound
                    or labels.max() >= classes
                ):
                    wrong.append(f"{backend}, trusted, C={classes} {size} on {grid}, {dtype}: {error:.2g}")
    print(f"{runs} runs on {device}, {len(wrong)} wrong", *wrong, sep="\n")
    return 2 if wrong or not runs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
