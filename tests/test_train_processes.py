"""A run over several processes is the run of one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.config import FitConfig, ModelConfig, OptimConfig, to_toml
from coarse_train.engine import fit
from coarse_train.trials import read_selection
from tests.runs import ENVIRONMENT, _config, _losses, _rows, _state


def _run_in_two_processes(config: FitConfig, path: Path) -> None:
    path.write_text(to_toml(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "coarse_train", "fit", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True], ids=["ddp", "fsdp"])
def test_two_processes_are_one(tmp_path: Path, fsdp: bool) -> None:
    config = _config(tmp_path / "one", transition="learned", optim=OptimConfig(lr=1e-2, ema=0.9), steps=4)
    fit(config)
    many = replace(config, out=tmp_path / "two", fsdp=fsdp, accumulate=2, save_every=100)
    _run_in_two_processes(many, tmp_path / "two.toml")
    assert _losses(tmp_path / "two") == pytest.approx(_losses(tmp_path / "one"), abs=1e-5)
    one, two = _state(tmp_path / "one"), _state(tmp_path / "two")
    for kind in ("model", "ema"):
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, atol=1e-5, rtol=0, msg=f"{kind} {name}")
    assert one["last_score"] == pytest.approx(two["last_score"], abs=0.05)
    # one process can take the state of two apart again, and the other way round
    for name, out in (("one", "two"), ("two", "one")):
        assert _state(tmp_path / name)["optimizer"].keys() == _state(tmp_path / out)["optimizer"].keys()
    fit(replace(many, resume=True, fsdp=False, accumulate=1))


@pytest.mark.slow
def test_the_score_of_two_processes_is_that_of_the_network_that_is_kept(tmp_path: Path) -> None:
    """Running statistics of batch normalisation differ between processes until they are shared."""
    config = _config(tmp_path / "run", model=ModelConfig(widths=(4, 8), norm="batch"), steps=3, evaluate_every=3)
    _run_in_two_processes(config, tmp_path / "two.toml")
    assert run_evaluate(EvaluateConfig(config.out / "last.pt"))["mean_iou"] == _rows(config.out)[-1]["mean_iou"]


@pytest.mark.slow
def test_two_processes_choose_together_and_go_on_from_what_was_chosen(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", select_with=4, select_steps=2, steps=4)
    _run_in_two_processes(config, tmp_path / "two.toml")
    chosen = read_selection(config.out, 4)
    assert chosen is not None
    assert [one.steps for one in chosen.rounds] == [2, 4]
    assert len(_losses(config.out)) == 4  # each step once
    assert _state(config.out)["step"] == 4
    assert _state(config.out, "best.pt")["best_score"] >= chosen.rounds[-1].scores[chosen.chosen]
