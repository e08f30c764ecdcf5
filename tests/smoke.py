"""Is an installed package whole? Needs torch alone, no file of the repository and no pytest:

    python tests/smoke.py [--reference] [--train]

Every operator against the float64 reference, once under each instruction set that this machine has. --reference: of a package
without compiled code. --train: a run of the training package as well, from the sample that ships with it (extra `train`).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

import coarse_kernels as ck
from coarse_kernels import native

CLASSES, SIZE = 5, (24, 40)
TOLERANCE = 2e-5  # 2-norm, float32 against float64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--train", action="store_true")
    options = parser.parse_args()

    package = Path(ck.__file__).resolve().parent
    if package.with_name("setup.py").exists():
        raise SystemExit(
            f"smoke test: expected an installed package, got the working tree {package}; call it from elsewhere"
        )
    version = importlib.metadata.version("coarse-kernels")
    assert version == ck.__version__, (version, ck.__version__)
    assert files("coarse_kernels").joinpath("py.typed").is_file()
    chosen = ck.available_backends()[0]
    assert chosen == ("reference" if options.reference else "cpu"), native.operators_reason()

    differences = compare()
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] < TOLERANCE, (worst, differences[worst])
    isa = "reference" if native.OPERATORS is None else native.OPERATORS.isa
    if "COARSE_KERNELS_ISA" not in os.environ and not options.reference:
        for wanted in ("baseline", "avx2", "avx512"):
            own = {**os.environ, "COARSE_KERNELS_ISA": wanted}
            subprocess.run([sys.executable, __file__], env=own, check=True)
    if options.train:
        train()
    print(
        f"smoke test passed: coarse_kernels {version}, Python {platform.python_version()}, torch {torch.__version__}, {isa}, "
        f"{len(differences)} results within {differences[worst]:.1e}"
        + ("; a run of coarse_train" if options.train else "")
    )


def compare() -> dict[str, float]:
    """By name, how far a result is from the reference in float64."""
    torch.manual_seed(0)
    labels = torch.randint(0, CLASSES, (2, 2, *SIZE), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.2] = 255
    seg, coarse_seg = torch.randn(2, CLASSES, *SIZE), torch.randn(2, CLASSES, 6, 10)
    start = 4 * torch.eye(CLASSES).reshape(1, CLASSES, CLASSES, 1, 1)  # as training would, or each call warns
    fields = {
        "pixels": start + torch.randn(2, CLASSES, CLASSES, *SIZE),
        "strided": start + torch.randn(2, CLASSES, CLASSES, 6, 10),
        "one": start + torch.randn(1, CLASSES, CLASSES, 1, 1),
    }
    negative = ck.uniform_transition(CLASSES)
    differences: dict[str, float] = {}

    def add(name: str, compute: Callable[[Tensor, Tensor], list[Tensor]], *tensors: Tensor) -> None:
        results = [
            compute(*(tensor.detach().to(dtype, copy=True).requires_grad_() for tensor in tensors))
            for dtype in (torch.float32, torch.float64)
        ]
        for number, (ours, truth) in enumerate(zip(*results, strict=True)):
            exact = truth.detach().double()
            difference = (ours.detach().double() - exact).norm() / exact.norm()
            differences[f"{name} {number}"] = float(difference)

    def objective(seg_logits: Tensor, cm_logits: Tensor) -> list[Tensor]:
        kinds = [ck.Drawings(labels, cm_logits, trace_weight=0.1), ck.Drawings(labels, transition=negative, weight=0.6)]
        backend = "reference" if seg_logits.dtype == torch.float64 else None
        loss = ck.annotation_objective(seg_logits, kinds, backend=backend).loss
        posterior = ck.annotation_posterior(seg_logits, kinds[0].cm_logits, labels[:, 0], backend=backend)
        return [loss, *torch.autograd.grad(loss, (seg_logits, cm_logits)), posterior]

    for name, field in fields.items():
        add(name, objective, seg, field)
    add("class grid", lambda a, b: objective(a, b)[:3], coarse_seg, fields["strided"])
    wanted = torch.nn.functional.interpolate(coarse_seg, SIZE, mode="bilinear").argmax(1)
    differences["label_map"] = float((ck.label_map(coarse_seg, SIZE) != wanted).double().mean())
    return differences


def train() -> None:
    assert files("coarse_train").joinpath("py.typed").is_file()
    with tempfile.TemporaryDirectory() as folder:
        for command in (
            ["fit", "mnist", "--steps", "2", "--device", "cpu", "--out", "run"],
            ["evaluate", "run/last.pt", "--device", "cpu", "--limit", "2"],
            ["report", "run"],
        ):
            done = subprocess.run(
                [sys.executable, "-m", "coarse_train", *command], cwd=folder, capture_output=True, text=True
            )
            assert done.returncode == 0, f"coarse-train {' '.join(command)}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        steps = [
            json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        assert steps, "no step in metrics.jsonl"
        assert Path(folder, "run", "report.html").is_file()


if __name__ == "__main__":
    main()
