"""What a run tells: a progress bar or log lines, ``metrics.jsonl``, tensorboard scalars and pictures."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from .checkpoint import CheckpointError, write_text
from .config import FitConfig

_LINE_EVERY = 10.0  # seconds between two lines in a log file


class RunLog:
    """Of the main process (``enabled``); those of the others do nothing.

    Every step stands in metrics.jsonl once, also after a resume: what a killed run wrote beyond its checkpoint is cut off, and
    those steps are logged again.
    """

    def __init__(self, config: FitConfig, start: int, *, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        path = config.out / "metrics.jsonl"
        _keep_until(path, start)
        self._file = open(path, "a", buffering=1)  # noqa: SIM115  # open as long as the run is
        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start + 1)
        self._steps, self._first = config.steps, start
        self._started = self._last_line = time.monotonic()
        self._bar = tqdm(total=config.steps, initial=start, unit="step") if sys.stderr.isatty() else None

    def step(self, step: int, values: dict[str, float]) -> None:
        """``values`` has the loss and whatever else there is of this step."""
        if not self._enabled:
            return
        elapsed = time.monotonic() - self._started
        self._write({"step": step, **values, "seconds": round(elapsed, 3)})
        for name, value in values.items():
            self._board.add_scalar(f"train/{name}", value, step)
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            self._bar.update()
        elif time.monotonic() - self._last_line > _LINE_EVERY or step == self._steps:
            self._last_line = time.monotonic()
            rate = (step - self._first) / max(elapsed, 1e-9)
            self.say(f"step {step}/{self._steps}  loss {values['loss']:.4f}  {rate:.2f} steps/s")

    def scores(self, step: int, values: dict[str, float], images: int) -> None:
        """Scores on ``images`` images of the validation split; ``values`` has the mean IoU."""
        if not self._enabled:
            return
        self._write({"step": step, **values})
        for name, value in values.items():
            self._board.add_scalar(f"val/{name}", value, step)
        self.say(f"step {step}/{self._steps}  mean IoU {values['mean_iou']:.2f} on {images} validation masks")

    def picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """(H, W, 3) uint8."""
        if self._enabled:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def say(self, line: str) -> None:
        """One line that survives the progress bar."""
        if self._enabled:
            tqdm.write(line, file=sys.stderr)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._enabled:
            if self._bar is not None:
                self._bar.close()
            self._board.close()
            self._file.close()

    def _write(self, row: dict[str, Any]) -> None:
        line = json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()})  # JSON has no NaN
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: expected to write it, got {error}; checkpoints are intact"
            ) from error


def _keep_until(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError):  # the line that was being written when the run was killed
            continue
    write_text(path, "".join(kept))
