"""One dict holds a run; files appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from coarse_kernels import TransitionMatrix

from .config import FitConfig, from_dict
from .data import Classes
from .model import CoarseModel, build_model

FORMAT = 1


class CheckpointError(RuntimeError):
    """A file of the run cannot be written or read; the message says which, and what is still good."""


def write_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """``write(file)`` into a temporary file beside ``path``, synced to disk, then renamed: whatever happens meanwhile,
    ``path`` is the old file or the new one."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a failed write into a RuntimeError of its own
        temporary.unlink(missing_ok=True)
        kept = "the last good one is still there" if path.exists() else "there is none yet"
        raise CheckpointError(f"{path}: expected to write it, got {_reason(error)}; {kept}") from error


def write_text(path: Path, text: str) -> None:
    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    write_whole(path, write)


def _reason(error: BaseException) -> str:
    """The OSError behind what torch.save made of it, where there is one."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return str(error).splitlines()[0]


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
        raise CheckpointError(f"{path}: expected a checkpoint, got a damaged or foreign file") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise CheckpointError(f"{path}: expected a checkpoint of format {FORMAT}, got {found!r}")
    return content


def classes_from_dict(content: dict[str, Any]) -> Classes:
    colours = tuple((int(r), int(g), int(b)) for r, g, b in content["colours"])
    return Classes(tuple(content["names"]), colours, tuple(content["ids"]), tuple(content["ignored"]))


@dataclass(frozen=True)
class LoadedModel:
    """A trained network and all that is needed to use it. With an exponential moving average ``model`` has that one."""

    model: CoarseModel
    config: FitConfig
    classes: Classes
    channels: int
    step: int


def load_model(path: Path, device: torch.device | str = "cpu") -> LoadedModel:
    """Network, config and class table from a checkpoint alone, in evaluation mode on ``device``."""
    content = load(path)
    config = from_dict(content["config"])
    classes = classes_from_dict(content["classes"])
    transition, architecture = transition_of(content["model"]), content["architecture"]
    model = build_model(config, content["channels"], len(classes), transition, architecture=architecture)
    model.load_state_dict(content["ema"] if content["ema"] is not None else content["model"])
    return LoadedModel(model.to(device).eval(), config, classes, content["channels"], content["step"])


def transition_of(state: dict[str, Any]) -> TransitionMatrix | None:
    """A TransitionMatrix of the kind that is in ``state``, which then fills it."""
    if "transition.logits" in state:
        return TransitionMatrix.learned(len(state["transition.logits"]))
    return TransitionMatrix.fixed(state["transition.matrix"]) if "transition.matrix" in state else None
