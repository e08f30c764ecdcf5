"""Command line: dataclass -> options. `python -m coarse_train --help`."""

from __future__ import annotations

import sys

import tyro

from .experiments.demo import DemoConfig, run_demo
from .experiments.tune import TuneConfig, run_tune


def main(arguments: list[str] | None = None) -> int:
    """Run one command; an error of the user's is one line on stderr and exit status 1."""
    config = tyro.extras.subcommand_cli_from_dict(
        {"demo": DemoConfig, "tune-demo": TuneConfig}, prog="python -m coarse_train", args=arguments
    )
    try:
        if isinstance(config, DemoConfig):
            run_demo(config)
        elif isinstance(config, TuneConfig):
            run_tune(config)
    except (ValueError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
