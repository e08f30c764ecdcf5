"""Command line: dataclass -> options. `coarse-train --help`, or `python -m coarse_train --help`."""

from __future__ import annotations

import itertools
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from .commands.check import CheckConfig, run_check
from .commands.evaluate import EvaluateConfig, run_evaluate
from .commands.import_ import ImportConfig, run_import
from .commands.pen import PenConfig, run_pen
from .commands.predict import PredictConfig, run_predict
from .commands.report import ReportConfig, run_report
from .commands.simulate import SimulateConfig, run_simulate
from .config import FitConfig, load_toml, recipe
from .data import DATASETS
from .data.images import MAX_PIXELS
from .engine import NonFiniteStep, fit
from .experiments.demo import DemoConfig, run_demo
from .experiments.experiment import ExperimentConfig, run_experiment
from .model.networks import check_named
from .run import CheckpointError, load
from .storage import printable

# the user's to mend: one line on stderr and exit status 1; anything else is a bug of ours and shows its traceback
_EXPECTED = (ValueError, OSError, CheckpointError, NonFiniteStep)


# what goes on after Ctrl-C, and how
_GOES_ON = dict.fromkeys(("demo", "experiment"), "; what is trained is kept, and the same command goes on")
_GOES_ON["fit"] = "; the same command goes on from the last checkpoint with --resume"

DESCRIPTION = """Train segmentation networks from coarse drawings: `coarse-train fit DATASET|CONFIG.toml [options]`, where
DATASET takes the recipe of that name; then `report RUN`, `evaluate CHECKPOINT`, `predict CHECKPOINT`. `import TOOL EXPORT`
reads drawings of annotation tools, `check DATASET` says what is in your files, `simulate DATASET` draws, `pen DATASET` measures
outlines, `demo` shows it on digits, `experiment NAME` shows what helps when. `COMMAND --help` lists the options."""


def _fit(config: FitConfig) -> None:
    result = fit(config)
    if os.environ.get("RANK", "0") != "0":
        return
    score = "" if math.isnan(result.score) else f", mean IoU {result.score:.2f}"
    kept = load(result.checkpoint)["step"]  # of best.pt an earlier one
    print(f"{result.checkpoint}: step {kept} of {result.steps}{score}")


def _simulate(config: SimulateConfig) -> None:
    """Draw, and print the command that trains on the drawings."""
    out = run_simulate(config)
    given: dict[str, object] = {"root": config.root, "variant": config.variant, "limit": config.limit}
    given |= {kind: out / kind for kind in ("positives", "negatives") if (out / kind).is_dir()}
    given |= {"max-pixels": config.max_pixels if config.max_pixels != MAX_PIXELS else None}
    options = [[f"--{name}", str(value)] for name, value in given.items() if value]
    print(shlex.join(["coarse-train", "fit", config.dataset, *itertools.chain.from_iterable(options)]))


COMMANDS: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "import": (ImportConfig, run_import),
    "fit": (FitConfig, _fit),
    "check": (CheckConfig, run_check),
    "evaluate": (EvaluateConfig, run_evaluate),
    "predict": (PredictConfig, run_predict),
    "simulate": (SimulateConfig, _simulate),
    "pen": (PenConfig, run_pen),
    "report": (ReportConfig, run_report),
    "demo": (DemoConfig, run_demo),
    "experiment": (ExperimentConfig, run_experiment),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error of the user's is one line on stderr and exit status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments = [short(argument) for argument in arguments]
    try:
        if arguments[:1] == ["fit"]:
            _fit(parse_fit(arguments[1:]))
            return 0
        config = tyro.extras.subcommand_cli_from_dict(
            {name: kind for name, (kind, _) in COMMANDS.items()},
            prog="coarse-train",
            description=DESCRIPTION,
            args=arguments,
        )
        next(run for kind, run in COMMANDS.values() if isinstance(config, kind))(config)
    except BrokenPipeError:  # `... | head`: nobody reads on
        return 1
    except _EXPECTED as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        if os.environ.get("RANK", "0") == "0":
            print(f"{str(stop) or 'interrupted'}{_GOES_ON.get(arguments[0], '')}", file=sys.stderr)
        return 128 + getattr(stop, "signal", signal.SIGINT)  # as shells count
    return 0


def short(argument: str) -> str:
    """--workers, also where it is called as in files and in Python: --data.workers."""
    return re.sub(r"^--(data|model|optim|inference)\.", "--", argument)


def _named_network(arguments: list[str]) -> str | None:
    """What the command line itself says after --network."""
    words = [
        part for argument in arguments for part in argument.split("=", 1 if argument.startswith("--network=") else 0)
    ]
    return next((value for option, value in itertools.pairwise(words) if option == "--network"), None)


def parse_fit(arguments: list[str]) -> FitConfig:
    """``DATASET|CONFIG.toml [options]``: the file or the recipe gives the defaults of the options."""
    target, rest = (arguments[0], arguments[1:]) if arguments and not arguments[0].startswith("-") else ("", arguments)
    if target.endswith(".toml"):
        default = load_toml(Path(target))
        if not {"-h", "--help"} & {*rest}:
            check_named(Path(target), default.model.network, _named_network(rest))
        if (Path(target).parent / "last.pt").exists():  # the folder of a run, wherever it has been moved
            moved, pen = Path(target).parent, default.positive.pen
            if pen == default.out / "pen.json":  # which masks chose
                default = replace(default, positive=replace(default.positive, pen=moved / "pen.json"))
            default = replace(default, out=moved)
    elif target in DATASETS:
        default = recipe(target)
    elif target or not {"-h", "--help"} & {*rest}:
        got = repr(target) if target else f"{rest[0]} first" if rest else "nothing"
        raise ValueError(f"fit: expected a config.toml or one of {tuple(DATASETS)}, then options, got {got}")
    else:
        default = FitConfig()
    return tyro.cli(FitConfig, default=default, args=rest, prog=f"coarse-train fit {target or 'DATASET|CONFIG.toml'}")
