"""What comes between the steps of a run: SIGTERM and Ctrl-C, which end it, and the clock that asks for checkpoints.

Schedulers and spot machines send SIGTERM some seconds before they kill. All processes of a run agree on the step.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from contextlib import suppress
from types import FrameType

import torch

from .distributed import World

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ONE_PRESS = 1.0  # seconds: torchrun passes the Ctrl-C on that the terminal has sent to all of its processes
_GRACE = 30  # seconds of a worker, which is about what schedulers give


class Interrupted(KeyboardInterrupt):
    """A run was told to stop, and its checkpoint is written. `signal`: by which signal."""

    def __init__(self, message: str, number: int):
        super().__init__(message, number)
        self.signal = signal.Signals(number)

    def __str__(self) -> str:
        return str(self.args[0])


class Watch:
    """Within it signals wait for `look`, but for a second Ctrl-C, which raises KeyboardInterrupt at once. Only the main thread
    of a process gets signals; those that whoever started it ignores stay ignored.

    minutes: between checkpoints; the first is due after one at most. 0: none is.
    """

    def __init__(self, world: World, minutes: float):
        self._world, self._minutes = world, minutes
        self._taken: dict[int, float] = {}

    def __enter__(self) -> Watch:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            old = {number: signal.getsignal(number) for number in _SIGNALS}
            self._before = {number: handler for number, handler in old.items() if handler not in (signal.SIG_IGN, None)}
        for number in self._before:
            signal.signal(number, self._take)
        self._wait(min(1.0, self._minutes))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def look(self) -> tuple[int | None, bool]:
        """The signal to stop for, if a process got one, and whether a checkpoint is due. Every process has to call; all get the
        same."""
        late = self._world.is_main and time.monotonic() >= self._due
        asked = self._world.sum(
            torch.tensor([*(number in self._taken for number in _SIGNALS), late], dtype=torch.int64)
        )
        *stops, due = asked.tolist()
        return next((number for number, stop in zip(_SIGNALS, stops, strict=True) if stop), None), due > 0

    def saved(self) -> None:
        """The clock starts anew."""
        self._wait(self._minutes)

    def _wait(self, minutes: float) -> None:
        self._due = time.monotonic() + 60 * minutes if self._minutes else math.inf

    def _take(self, number: int, _: FrameType | None) -> None:
        if number not in self._taken:
            self._taken[number] = time.monotonic()
            if number == signal.SIGINT and self._world.is_main:
                with suppress(OSError, RuntimeError):  # a terminal that is gone, a line that was just being written
                    print("stopping after this step; Ctrl-C again stops at once", file=sys.stderr)
        elif number == signal.SIGINT and time.monotonic() - self._taken[number] > _ONE_PRESS:
            raise KeyboardInterrupt


def shield_worker(_: int) -> None:
    """For the processes of a `DataLoader`: what goes to a whole process group (Ctrl-C, Slurm) is answered by the one that
    trains, whose step would fail without them. They still end within `_GRACE` where a loader that is done terminates them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # on Windows nobody sends SIGTERM
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(_GRACE))
