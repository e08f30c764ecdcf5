"""A run folder: its lock, its record, its checkpoints, and whether what goes on in it is the same run.

    config.toml, metrics.jsonl, tensorboard/, pictures/, last.pt, best.pt where masks choose

Files appear whole or not at all.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from PIL.Image import Image
from tqdm import tqdm

from .config import FitConfig, Measured, anchored, from_dict, load_toml, to_dict, to_toml
from .data import Source
from .distributed import World
from .storage import LFS_POINTER, CheckpointError, is_lfs_pointer, locked, write_text, write_whole

FORMAT = 1  # of checkpoints
# what may differ between a run and its continuation: nothing that changes a step
_FREE = {"out", "resume", "save_every", "accumulate", "backend", "device", "threads", "fsdp", "compile"}
_FREE |= {"data.root", "data.workers", "save_minutes", "resume_changed", "pictures", "opacity"}
_FREE |= {"data.check", "data.max_pixels"}
# what `resume_changed` may change: nothing that decides which tensors a checkpoint holds, or what is learned from
_CHANGEABLE = {"steps", "batch_size", "precision", "evaluate_every", "mask_weight"}
_CHANGEABLE |= {f"optim.{name}" for name in ("lr", "cm_lr", "weight_decay", "momentum", "schedule", "warmup", "hold")}
_CHANGEABLE |= {f"optim.{name}" for name in ("clip", "finetune", "finetune_lr")}
_MOVABLE = {"data.positives", "data.negatives"}  # another folder is fine; one where there was none is other data
_WHOLE = (".pt", ".toml", ".json", ".html", ".part")  # suffixes of files that appear whole
_WRITTEN_WHOLE = (  # and may be half written where a process was killed
    *("last.pt", "best.pt", "nonfinite_step*.pt", "config.toml", "metrics.jsonl", "selection.json", "pen.json"),
    *("check.txt", "check_*.png"),
)
_MARK = ".run"  # that the folder is a run's, before there is a config.toml
_OF_A_RUN = {"best.pt", "metrics.jsonl", "selection.json", "tensorboard", "pictures"}  # what a run replaces, or adds to
_LINE_EVERY = 10.0  # seconds between two lines in a log file


# ---- files -------------------------------------------------------------------------------------------------------


def save(path: Path, content: dict[str, Any]) -> None:
    """Tensors and plain values only, so that `load` need not trust the file."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def load(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Raises FileNotFoundError, or CheckpointError for a file that is damaged or not ours."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a checkpoint (last.pt or best.pt of a run), found none")
    try:
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # unpickling fails in many ways
        got = LFS_POINTER if is_lfs_pointer(path) else "a damaged or foreign file"
        raise CheckpointError(f"{path}: expected a checkpoint, got {got}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got {found!r}")
    return content


# ---- the folder --------------------------------------------------------------------------------------------------


def look_at_folder(option: str, folder: Path, *, overwrite: bool) -> None:
    """Raises ValueError, naming the option, where files in ``folder`` are in the way."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option}: expected a folder, got the file {folder}")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{option}: expected an empty or new folder, or --overwrite, got {folder} with files in it")


def claim_folder(option: str, folder: Path, world: World, *, overwrite: bool) -> None:
    """Both, in every process: each looks before any writes."""
    look_at_folder(option, folder, overwrite=overwrite)
    world.wait()
    make_folder(option, folder)


def make_folder(option: str, folder: Path) -> None:
    """A folder that can be written, now rather than after the work. Raises ValueError, naming the option."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))  # an empty file fits on a full disk
            file.flush()
    except OSError as error:
        raise ValueError(f"{option}: expected a folder that can be written, got {folder} ({error})") from error


@contextmanager
def open_run(config: FitConfig, world: World) -> Iterator[None]:
    """The folder of a run, for this one alone until the end."""
    last = config.out / "last.pt"
    if last.exists() and not config.resume:
        raise ValueError(f"out: expected a new folder or --resume, got {config.out} with the checkpoint of a run")
    with ExitStack() as stack:
        if world.is_main:
            make_folder("out", config.out)
            _look_for_links(config.out)
            known = is_run(config.out)
            try:
                free = stack.enter_context(locked(config.out / ".lock"))
            except OSError as error:
                raise ValueError(f"out: expected a folder that can be written, got {config.out} ({error})") from error
            if not free:
                raise ValueError(f"out: expected a folder that no other run writes to, got {config.out}")
            _look_for_others(config, known=known)
            (config.out / _MARK).touch()
            for name in _WRITTEN_WHOLE:  # what a killed process was writing
                for part in config.out.glob(f".{name}.part"):
                    part.unlink()
        world.wait()
        yield


def _look_for_links(folder: Path) -> None:
    """Raises ValueError where what a run writes would go somewhere else: its folder may be somebody else's. A file that is
    written whole takes the place of a link."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and path.suffix not in _WHOLE:
            raise ValueError(
                f"out: expected no links in the folder of a run, got {path} to {path.readlink()}; remove it"
            )


def is_run(folder: Path) -> bool:
    """Whether a run has been in the folder. A lock does not tell: on Windows it goes with its process."""
    return (folder / _MARK).exists() or (folder / "config.toml").exists()


def _look_for_others(config: FitConfig, *, known: bool) -> None:
    """Raises ValueError where a file in the run's folder, which the run would replace or clear away, is none of a run."""
    folder = config.out
    if (folder / "config.toml").is_file():
        try:
            load_toml(folder / "config.toml")
        except ValueError as error:
            raise ValueError(
                f"out: expected a new folder or that of a run, got another config.toml ({error})"
            ) from error
    elif not known:
        names = {*_OF_A_RUN, "pen.json"} if config.select_with else _OF_A_RUN
        for path in sorted(folder.iterdir()):
            if path.name in names:
                raise ValueError(
                    f"out: expected a new folder or that of a run, got {folder} with {path.name} of no run"
                )
    if (folder / "best.pt").exists() and not config.resume:
        raise ValueError(f"out: expected a new folder or --resume, got {folder} with the checkpoint best.pt")


def write_config(config: FitConfig, changes: Sequence[str]) -> None:
    """config.toml, with a comment for everything that was changed on the way."""
    written = to_toml(replace(config, resume=False, resume_changed=False))
    write_text(config.out / "config.toml", "".join(f"# {line}\n" for line in changes) + written)


# ---- the same run ------------------------------------------------------------------------------------------------


def read_resume(config: FitConfig) -> tuple[dict[str, Any] | None, list[str]]:
    """The checkpoint to go on from, None to start anew; and a line for every field that has been changed on the way, now or
    before. Raises ValueError where a field that changes steps differs."""
    last = config.out / "last.pt"
    if not config.resume or not last.exists():
        return None, []
    content = load(last)
    changed = check_same_run(from_dict(content["config"]), config)
    done = content["step"]
    if config.steps < done:
        raise ValueError(f"steps: expected at least the {done} that are done in {config.out}, got {config.steps}")
    content.setdefault("changes", [])
    lines = [f"after step {done}: {name} {pair[1]!r}, before {pair[0]!r}" for name, pair in changed.items()]
    return content, content["changes"] + lines


def check_same_run(before: FitConfig, now: FitConfig) -> dict[str, tuple[Any, Any]]:
    """Raises ValueError where a field that changes steps differs, naming it. With ``resume_changed`` some may: their names,
    what they were and what they are."""
    one, other = _flat(to_dict(anchored(before))), _flat(to_dict(anchored(now)))
    free = _FREE if now.model.norm == "group" else _FREE - {"accumulate"}  # batch normalisation sees the parts
    changed = {}
    for name in one:
        pair = one[name], other[name]
        if name in _MOVABLE:
            pair = pair[0] is not None, pair[1] is not None
        if name == "positive.pen":  # a file may have moved with its folder
            pair = _kind_of_pen(pair[0]), _kind_of_pen(pair[1])
        if name in free or pair[0] == pair[1]:
            continue
        if name not in _CHANGEABLE or not now.resume_changed:
            how = "; --resume-changed goes on with it" if name in _CHANGEABLE else ""
            raise ValueError(f"resume: expected {name} as in the run, {one[name]!r}, got {other[name]!r}{how}")
        changed[name] = pair
    return changed


def _kind_of_pen(value: Any) -> Any:
    return "a file" if isinstance(value, str) and value not in get_args(Measured) else value


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def describe_data(source: Source, validation: Source | None, channels: int) -> dict[str, Any]:
    """What has to be the same for a run to go on: classes, channels, and which images there are, as checksums."""
    splits = {"training images": source, "validation masks": validation}

    def checksum(part: Source) -> int:
        names = "\n".join(part.name(index) for index in range(len(part)))
        return zlib.crc32(names.encode("utf-8", "surrogateescape"))  # a name may have bytes that are no UTF-8

    return {
        "classes": list(source.classes.names),
        "label values": list(source.classes.file_ids),
        "table of label values": zlib.crc32(repr(_read_as(source)).encode()),
        "channels": channels,
        **{name: 0 if part is None else checksum(part) for name, part in splits.items()},
    }


def _read_as(source: Source) -> tuple[object, ...]:
    """What else decides which class a pixel of a label file has; numbers that are ignored alone were an error before."""
    given = source.classes
    values = {*given.file_ids, *(value for value, _ in given.aliases)}
    ignored = sorted(pair for pair in given.ignored_in if pair[1] in values)
    return sorted(given.aliases), ignored, given.colours if given.by_colour else ()


def check_same_data(before: dict[str, Any], now: dict[str, Any]) -> None:
    """``before``, ``now``: of `describe_data`. Raises ValueError saying what is no more as it was in the run."""
    for name, value in before.items():
        if value != now[name]:
            told = "" if isinstance(value, int) and name != "channels" else f" {value}, got {now[name]}"
            raise ValueError(f"resume: expected the {name} of the run{told or ', got others'}")


# ---- its record --------------------------------------------------------------------------------------------------


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
        from torch.utils.tensorboard import SummaryWriter  # in here: who only reads a run does not need it

        self._board = SummaryWriter(str(config.out / "tensorboard"), purge_step=start + 1)
        self._steps, self._first, self._pictures = config.steps, start, config.out / "pictures"
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

    def scores(self, step: int, values: dict[str, Any]) -> None:
        """What was found at an evaluation: a row; numbers in ``values``, and in dictionaries of it, are curves too."""
        if not self._enabled:
            return
        self._write({"step": step, **values})
        for name, value in _flat(values).items():
            if isinstance(value, float) and math.isfinite(value):
                self._board.add_scalar(f"val/{name.replace('.', '/', 1)}", value, step)

    def picture(self, name: str, picture: Image, step: int) -> None:
        """For tensorboard, and the newest of its name in the folder ``pictures``."""
        if self._enabled:
            self._board.add_image(name, np.asarray(picture), step, dataformats="HWC")
            path = self._pictures / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, lambda file: picture.save(file, "png"))

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
        line = json.dumps(without_nan(row))
        try:
            self._file.write(line + "\n")
        except OSError as error:
            raise CheckpointError(
                f"{self._file.name}: expected to write it, got {error}; checkpoints are intact"
            ) from error


def without_nan(value: Any) -> Any:
    """``value`` for JSON, which has no NaN and no infinity: None in their places, in lists and dictionaries too."""
    if isinstance(value, dict):
        return {key: without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
