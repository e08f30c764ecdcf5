"""Problems drawn at random, each held to float64 and to another way of saying the same.

    python -m tests.fuzz --seconds 3600 --seed 0        every backend and instruction set in turn; writes runs/fuzz
    python -m tests.fuzz --emulated --seconds 600       the CUDA kernels, emulated (tests/cuda_emulation), a dozen a second
    python -m tests.fuzz --interpreted --seconds 600    Triton's, in its interpreter, one or two a second
    python -m tests.fuzz "c2 b1 3x3 seg1x1 fp32 ..."    one case, by the line that a failure prints

Exit status 1 where anything is wrong. Same seed, same cases; how many of them there are is the machine's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from coarse_kernels import native
from coarse_kernels.backends import triton
from tests import cuda_emulation

from .case import parse
from .engine import Tally, check, fuzz
from .relations import describe
from .tensors import poisoned

ROOT = Path(__file__).resolve().parents[2]
# Parts of the time. The reference stands beside: its float64 is what the closed form of `oracle` is held to.
_SHARES = {"avx512": 6, "avx2": 3, "baseline": 2, "reference": 1, cuda_emulation.NAME: 1, "triton": 1}
_INTERPRETED = "triton"
_CELLS = 100  # that are interpreted for one case: each takes 20 ms


def workers() -> list[tuple[str, str]]:
    """(backend, instruction set) of what this machine can run."""
    if native.OPERATORS is None or native.TOOLS is None:
        return [("reference", "")]
    return [*(("cpu", isa) for isa in native.TOOLS.cpu_info()["supported"]), ("reference", "")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("line", nargs="?", help="one case")
    parser.add_argument("--seconds", type=float, default=60.0, help="in all; an hour makes about a million on one core")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=1, help="times that all take turns, each with seeds of its own")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "fuzz", help="folder for fuzz.json and fuzz.md")
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument(
        "--emulated", action="store_true", help="the CUDA kernels, in an emulator, instead of all others"
    )
    alone.add_argument("--interpreted", action="store_true", help="Triton's, in its interpreter, instead of all others")
    parser.add_argument("--backend", default="cpu", help="of one case; triton: with TRITON_INTERPRET=1 set")
    parser.add_argument("--worker", nargs=3, metavar=("BACKEND", "SEED", "SECONDS"), help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.backend == cuda_emulation.NAME or (given.worker and given.worker[0] == cuda_emulation.NAME):
        cuda_emulation.register()
    if triton.INTERPRETED:
        from tests import interpreter_plugin  # noqa: F401  (keeps it from being wrong or slow)
    if given.line:
        with poisoned():
            check(parse(given.line), given.backend)
        print("as it should be")
        return 0
    if given.worker:
        backend, seed, seconds = given.worker
        wanted = (lambda case: case.cells <= _CELLS) if backend == _INTERPRETED else None
        tally = fuzz(backend, seed=int(seed), seconds=float(seconds), wanted=wanted)
        print(json.dumps(tally.as_dict()))
        return 0
    return _all(given)


def _all(given: argparse.Namespace) -> int:
    alone = cuda_emulation.NAME if given.emulated else _INTERPRETED if given.interpreted else ""
    who = [(alone, "")] if alone else workers()
    whole = sum(_SHARES[isa or backend] for backend, isa in who) * given.rounds
    parts: list[dict[str, Any]] = []
    for turn in range(given.rounds):
        for number, (backend, isa) in enumerate(who):
            seconds = given.seconds * _SHARES[isa or backend] / whole
            seed = given.seed + turn * len(who) + number
            part = _in_a_process(backend, isa, seed, seconds)
            parts.append(part)
            print(f"{backend} {isa} seed {seed}: {part['cases']} cases in {part['seconds']:.0f} s", file=sys.stderr)
            for failure in part["failures"]:
                print(f"  {failure['message']}\n    {failure['line']}", file=sys.stderr)
            _write(given, parts)
    failed = any(part["failures"] or part.get("crash") for part in parts)
    print((given.out / "fuzz.md").read_text())
    return 1 if failed else 0


def _in_a_process(backend: str, isa: str, seed: int, seconds: float) -> dict[str, Any]:
    """One worker: the instruction set is chosen once in a process, and a crash is the worker's alone."""
    command = [sys.executable, "-m", "tests.fuzz", "--worker", backend, str(seed), str(seconds)]
    environment = {**os.environ, **({"COARSE_KERNELS_ISA": isa} if isa else {}), "OMP_WAIT_POLICY": "passive"}
    if backend == _INTERPRETED:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    told = {"backend": backend, "isa": isa, "seed": seed}
    if done.returncode != 0:
        crash = f"the process ended with status {done.returncode}"
        empty = Tally().as_dict()
        return told | empty | {"crash": crash}
    return told | json.loads(done.stdout.splitlines()[-1])


def _write(given: argparse.Namespace, parts: list[dict[str, Any]]) -> None:
    given.out.mkdir(parents=True, exist_ok=True)
    cases = sum(part["cases"] for part in parts)
    content = {"cases": cases, "seed": given.seed, "date": time.strftime("%Y-%m-%d"), "parts": parts}
    (given.out / "fuzz.json").write_text(json.dumps(content, indent=1) + "\n")
    (given.out / "fuzz.md").write_text(report(content))


def report(content: dict[str, Any]) -> str:
    """Markdown: what ran, and what was found."""
    parts = content["parts"]
    lines = [f"# {content['cases']:,} problems drawn at random", ""]
    lines += [
        "`make fuzz ARGS='--seconds N --seed N'`, each case held to float64 by the constants of `tests/contract.py`.",
        "",
    ]
    lines += [
        "| who | cases | comparisons | beyond the floor | beyond plain | cases a second | wrong |",
        "|---|---|---|---|---|---|---|",
    ]
    names = dict.fromkeys((part["backend"], part["isa"]) for part in parts)
    for backend, isa in names:
        own = [part for part in parts if (part["backend"], part["isa"]) == (backend, isa)]
        sums = {
            key: sum(part[key] for part in own)
            for key in ("cases", "comparisons", "asked_plain", "asked_condition", "seconds")
        }
        wrong = sum(len(part["failures"]) + ("crash" in part) for part in own)
        rate = sums["cases"] / max(sums["seconds"], 1e-9)
        cells = [
            f"{backend} {isa}".strip(),
            f"{sums['cases']:,}",
            f"{sums['comparisons']:,}",
            f"{sums['asked_plain']:,}",
            f"{sums['asked_condition']:,}",
        ]
        lines.append(f"| {' | '.join([*cells, f'{rate:.0f}', str(wrong)])} |")
    lines += [
        "",
        '"Beyond the floor": cases of which plain PyTorch in the same dtype was asked how far off it is. "Beyond plain":',
        "results farther off than that allows, of which the condition was asked: how far the truth moves when its inputs",
        "are rounded.",
        "",
    ]
    told = describe()
    for title in ("relation", "form", "stream", "dtype", "rank", "scale", "reduction", "kinds"):
        counts: dict[str, int] = {}
        for part in parts:
            for name, count in part["by"].get(title, {}).items():
                counts[name] = counts.get(name, 0) + count
        if title == "relation":
            lines += ["| relation | cases | |", "|---|---|---|"]
            lines += [f"| {name} | {counts[name]:,} | {told[name]} |" for name in told if name in counts]
            lines.append("")
        else:
            lines.append(f"- {title}: " + ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items())))
    found = [failure for part in parts for failure in part["failures"]]
    crashes = [
        f"- {part['backend']} {part['isa']} seed {part['seed']}: {part['crash']}" for part in parts if "crash" in part
    ]
    lines += ["", "Nothing wrong was found." if not found and not crashes else "Wrong:", *crashes]
    lines += [f"- `{failure['line']}`: {failure['message']}" for failure in found]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
