"""Runs that are killed with SIGKILL at moments drawn at random, and disks that are really full (`make test-kill`): nothing is
lost that had been saved, and a run that goes on ends with the bits of one that nobody killed. The count is printed.

Processes are forked, so that a kill costs no start of an interpreter, and moments are spread over whole runs, the writing of
the first checkpoint among them. COARSE_TEST_KILLS (50) and COARSE_TEST_SEED (0) say how many and which. Not collected by
`make test`, which has four kills of a whole command (test_train_resume.py).
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coarse_train import run as run_folder
from coarse_train.config import DataConfig, FitConfig, OptimConfig
from coarse_train.engine import fit
from coarse_train.storage import CheckpointError, write_whole
from tests import data_trees
from tests.runs import _assert_same_bits, _last_step, _rows, _state
from tests.runs import _config as _of_digits

KILLS = int(os.environ.get("COARSE_TEST_KILLS", "50"))
SEED = int(os.environ.get("COARSE_TEST_SEED", "0"))

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")


def _config(out: Path, root: Path, **changes: Any) -> FitConfig:
    """Sixty steps on four images, with masks that choose, an average, and a checkpoint every second step."""
    config = replace(
        _of_digits(out),
        data=DataConfig(root=root),
        optim=OptimConfig(lr=1e-2, ema=0.9),
        steps=60,
        save_every=2,
        evaluate_every=7,
        select_with=2,
        select_steps=0,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_trees.write_folder_tree(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, root: Path) -> tuple[Path, float]:
    """A run that nothing interrupted, and its seconds, both of a forked process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.monotonic()
    assert _ended(_forked(lambda: fit(_config(out, root)))) == 0, _said()
    return out, time.monotonic() - began


_SAID = tempfile.TemporaryFile("w+")  # noqa: SIM115  # what children print


def _forked(work: Callable[[], object]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.dup2(_SAID.fileno(), 2)
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    return child


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _said() -> str:
    _SAID.seek(0)
    return _SAID.read()[-3000:]


def _step(folder: Path, name: str = "last.pt") -> int:
    path = folder / name
    return int(run_folder.load(path)["step"]) if path.exists() else 0


def _kill_when(child: int, due: Callable[[], bool], latest: float) -> bool:
    """Whether it was killed: SIGKILL as soon as ``due``, or after ``latest`` seconds, unless it has ended."""
    until = time.monotonic() + latest
    while time.monotonic() < until and not due():
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert os.waitstatus_to_exitcode(status) == 0, _said()
            return False
        time.sleep(0.0005)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def _moment(dice: random.Random, out: Path, saved: int, fresh: bool) -> Callable[[], bool]:
    """When a run is to be killed: while it writes a checkpoint (a ``fresh`` one: its first), or some steps on."""
    part, pause = out / ".last.pt.part", dice.uniform(0, 0.003)
    until = saved + dice.randint(0, 9)
    writing = fresh or dice.random() < 0.3

    def due() -> bool:
        if not (part.exists() if writing else _last_step(out) > until):
            return False
        time.sleep(pause if writing else 5 * pause)
        return True

    return due


def test_a_run_that_is_killed_at_any_moment_loses_nothing_that_was_saved(
    tmp_path: Path, root: Path, whole: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    expected, seconds = whole
    dice = random.Random(SEED)
    kills = runs = during_writing = during_first = 0
    config, saved, fresh = _config(tmp_path / "run0", root, resume=True), 0, True
    while kills < KILLS:
        if _step(config.out) == config.steps:  # done: it has to be the run that nobody killed
            _assert_the_same_run(config.out, expected)
            runs += 1
            config, saved, fresh = replace(config, out=tmp_path / f"run{runs}"), 0, True
        first = not (config.out / "last.pt").exists()
        due = _moment(dice, config.out, saved, fresh)
        latest = dice.uniform(0, seconds) if dice.random() < 0.2 else 10 * seconds
        child = _forked(lambda config=config: fit(config))  # type: ignore[misc]
        if not _kill_when(child, due, latest):
            continue
        kills, fresh = kills + 1, False
        writing = (config.out / ".last.pt.part").exists()
        during_writing += writing
        during_first += writing and first
        for name in ("last.pt", "best.pt"):
            assert (config.out / name).exists() or (first and saved == 0) or name == "best.pt"
            _step(config.out, name)  # it loads, or is not there
        now = _step(config.out)
        assert now >= saved, f"step {saved} had been saved, {now} is what is left"
        saved = now
    assert _ended(_forked(lambda: fit(config))) == 0, _said()
    _assert_the_same_run(config.out, expected)
    with capsys.disabled():
        print(
            f"\n{kills} kills of {runs + 1} runs, {during_writing} of them left a checkpoint that was being written, "
            f"{during_first} the first one; {runs + 1} of {runs + 1} runs ended with the same bits"
        )


def _assert_the_same_run(out: Path, expected: Path) -> None:
    for name in ("last.pt", "best.pt"):
        _assert_same_bits(_state(out, name), _state(expected, name))
    assert _rows(out) == _rows(expected)
    assert not list(out.glob(".*.part")), "what a killed process was writing is left behind"


# --- a disk that is full -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes in memory that really fill. It takes the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    ) if sys.platform == "linux" else None  # fmt: skip
    if made is None or made.returncode != 0:
        pytest.skip(f"no file system can be mounted: {made.stderr.strip() if made else sys.platform}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


def _fill(folder: Path, leave: int) -> Path:
    """A file that leaves so many bytes."""
    path = folder / "ballast"
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path.write_bytes(bytes(max(0, free - leave)))
    return path


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_a_full_disk_stops_a_run_with_its_last_checkpoint_whole(
    root: Path, whole: tuple[Path, float], disk: Path, share: float
) -> None:
    config = _config(disk / "run", root)
    real, seen = run_folder.save, []

    def save(path: Path, content: dict[str, Any]) -> None:
        if len(seen) == 6:
            _fill(disk, int(share * (config.out / "last.pt").stat().st_size))  # of a checkpoint
        seen.append(content["step"])
        real(path, content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save", save)
        with pytest.raises((CheckpointError, OSError), match="No space left on device"):
            fit(config)
    step = _step(config.out)
    assert step >= 2
    assert not list(config.out.glob(".*.part"))
    (disk / "ballast").unlink()
    fit(replace(config, resume=True))
    _assert_the_same_run(config.out, whole[0])


def test_a_disk_that_is_full_from_the_start_stops_before_the_first_step(root: Path, disk: Path) -> None:
    _fill(disk, 0)
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*No space left on device"):
        fit(_config(disk / "run", root))


def test_a_file_that_does_not_fit_leaves_the_old_one_whole(disk: Path) -> None:
    path = disk / "text"
    write_whole(path, lambda file: file.write(b"one"))
    _fill(disk, 10_000)
    with pytest.raises(CheckpointError, match="No space left on device; the last good one is still there"):
        write_whole(path, lambda file: file.write(bytes(1 << 20)))
    assert path.read_bytes() == b"one"
    assert sorted(p.name for p in disk.iterdir()) == ["ballast", "text"]
