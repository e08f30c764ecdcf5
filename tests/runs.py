"""Small runs of `fit`, what they leave, and how one is made that stopped early."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coarse_train import run as run_folder
from coarse_train.config import DataConfig, FitConfig, ModelConfig, OptimConfig
from coarse_train.engine import fit
from tests.helpers import ROOT

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def _config(out: Path, **changes: Any) -> FitConfig:
    """Six steps on digits of the sample, half a second."""
    config = FitConfig(
        data=DataConfig(dataset="mnist", limit=24, flip=True, scale=(0.8, 1.25), crop=(48, 48)),
        model=ModelConfig(widths=(4, 8)),
        optim=OptimConfig(lr=1e-2),
        out=out,
        steps=6,
        batch_size=4,
        evaluate_every=3,
        save_every=2,
        threads=1,
        device="cpu",
        pictures=0,
    )
    return replace(config, **changes)


def _rows(out: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without wall times."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _losses(out: Path) -> list[float]:
    return [row["loss"] for row in _rows(out) if "loss" in row]


def _assert_same_bits(one: Any, other: Any, where: str = "") -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            _assert_same_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for k, pair in enumerate(zip(one, other, strict=True)):
            _assert_same_bits(*pair, f"{where}[{k}]")
    else:
        assert one == other or (one != one and other != other), where


def _state(out: Path, name: str = "last.pt") -> dict[str, Any]:
    content = run_folder.load(out / name)
    del content["config"]
    return content


def _last_step(out: Path) -> int:
    try:
        return max((row["step"] for row in _rows(out)), default=0)
    except (OSError, ValueError):
        return 0


def stop_after(config: FitConfig, step: int) -> None:
    """Make the run folder what it was when the checkpoint of ``step`` had been written."""
    kept: list[dict[str, Any]] = []
    real = run_folder.save

    def save(path: Path, content: dict[str, Any]) -> None:
        real(path, content)
        if content.get("step") == step:
            kept.append(content)
            raise KeyboardInterrupt

    shutil.rmtree(config.out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save", save)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    assert len(kept) == 1
    assert _last_step(config.out) == step
