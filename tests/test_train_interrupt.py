"""What ends a run early, what is kept then, and how it goes on: with the same bits, or with other rates if told to."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coarse_train import cli, engine, interrupt, learner
from coarse_train import run as run_folder
from coarse_train.config import DataConfig, FitConfig, ModelConfig, OptimConfig, load_toml, to_toml
from coarse_train.distributed import World
from coarse_train.engine import fit
from coarse_train.interrupt import Interrupted, Watch
from coarse_train.schedule import schedule
from tests import data_trees
from tests.runs import ENVIRONMENT, _assert_same_bits, _rows, _state
from tests.runs import _config as _of_digits

ALONE = World(0, 1, torch.device("cpu"))


def _send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def _config(out: Path, **changes: Any) -> FitConfig:
    """Six steps on four images beside ``out``, a tenth of a second."""
    root = (
        data_trees.write_folder_tree(out.parent / "data") if not (out.parent / "data").exists() else out.parent / "data"
    )
    return replace(_of_digits(out), **{"data": DataConfig(root=root), **changes})


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell that starts a job in the background has it ignore Ctrl-C; a run then does so, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    fit(_config(out, save_every=100))
    return out


def _during(call: Callable[..., Any], at: int, *numbers: int) -> Callable[..., Any]:
    """``call``, whose call number ``at`` the signals come in."""
    calls = iter(range(1, 1_000_000))

    def interrupted(*args: Any, **options: Any) -> Any:
        if next(calls) == at:
            _send(*numbers)
        return call(*args, **options)

    return interrupted


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("owner", "name", "at", "number", "step"),
    [
        (learner.Criterion, "count", 1, signal.SIGTERM, 1),
        (learner.Criterion, "__call__", 4, signal.SIGINT, 4),
        (engine, "score", 1, signal.SIGTERM, 3),
        (run_folder, "save", 1, signal.SIGINT, 3),
    ],
    ids=["first step", "forward", "evaluation", "saving"],
)
def test_a_signal_ends_the_run_after_its_step_and_it_goes_on_with_the_same_bits(
    tmp_path: Path, whole: Path, owner: Any, name: str, at: int, number: int, step: int
) -> None:
    config = _config(tmp_path / "run", save_every=2 if name == "save" else 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, _during(getattr(owner, name), at, number))
        with pytest.raises(Interrupted, match=f"stopped after step {step} of 6, which is in .*last.pt") as stopped:
            fit(config)
    assert stopped.value.signal == number
    assert run_folder.load(tmp_path / "run" / "last.pt")["step"] == step
    assert max(row["step"] for row in _rows(tmp_path / "run")) == step
    fit(replace(config, resume=True))
    _assert_same_bits(_state(tmp_path / "run"), _state(whole))
    assert _rows(tmp_path / "run") == _rows(whole)


@pytest.mark.slow
def test_a_signal_that_comes_with_the_last_step_of_a_trial_stops_what_comes_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path / "run", steps=2, select_with=2, select_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_folder, "save", _during(run_folder.save, 1, signal.SIGTERM))
        with pytest.raises(Interrupted, match=r"stopped after step 2 of 2, which is in .*trial_all_trusted.last\.pt"):
            fit(config)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert [path.name for path in config.out.glob("trial_*")] == ["trial_all_trusted"]
    assert fit(replace(config, resume=True)).steps == 2


def test_a_signal_to_all_processes_does_not_cost_the_step_its_workers(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm tells every process of a job, and a terminal every one of its group."""
    config = _config(tmp_path / "run", save_every=100)
    config = replace(config, data=replace(config.data, workers=1))
    reading: list[int] = []

    def forward(*args: Any, **options: Any) -> Any:
        if not reading:
            reading.extend(child.pid for child in multiprocessing.active_children() if child.pid is not None)
            for pid in (*reading, os.getpid()):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGINT)
            time.sleep(0.1)  # a worker that dies is noticed
        return real(*args, **options)

    real = learner.Criterion.__call__
    monkeypatch.setattr(learner.Criterion, "__call__", forward)
    with pytest.raises(Interrupted, match="stopped after step 1 of 6"):
        fit(config)
    assert len(reading) == 1
    assert not multiprocessing.active_children()
    fit(replace(config, resume=True))
    _assert_same_bits(_state(tmp_path / "run"), _state(whole))


class _Stopped(torch.nn.Module):
    """A network whose second process gets SIGTERM in the third step."""

    def __init__(self, channels_in: int, num_classes: int):
        super().__init__()
        self.layer = torch.nn.Conv2d(channels_in, num_classes, 1)
        self.calls = 0

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.calls == 3 and os.environ.get("RANK") == "1":
            _send(signal.SIGTERM)
        return self.layer(image)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(tmp_path: Path) -> None:
    network = "tests.test_train_interrupt:_Stopped"
    config = _config(tmp_path / "run", model=ModelConfig(network=network), save_every=100)
    (tmp_path / "run.toml").write_text(to_toml(config))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *torchrun, "-m", "coarse_train", "fit", str(tmp_path / "run.toml"), "--network", network]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode != 0
    assert "exitcode  : 143" in done.stderr.replace("exitcode : ", "exitcode  : ")
    assert run_folder.load(config.out / "last.pt")["step"] == 3
    assert done.stderr.count("stopped after step 3 of 6, which is in") == 1


def test_a_second_ctrl_c_stops_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with Watch(ALONE, 0) as watch:
        assert watch.look() == (None, False)
        _send(signal.SIGINT, signal.SIGINT)  # one press, of which torchrun tells again
        assert watch.look() == (signal.SIGINT, False)
        monkeypatch.setattr(interrupt, "_ONE_PRESS", 0.0)
        with pytest.raises(KeyboardInterrupt) as stopped:
            _send(signal.SIGINT)
        assert stopped.type is KeyboardInterrupt
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    assert capsys.readouterr().err == "stopping after this step; Ctrl-C again stops at once\n"


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """`nohup`, or a shell that puts a script into the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Watch(ALONE, 0) as watch:
            _send(signal.SIGINT)
            assert watch.look() == (None, False)
            _send(signal.SIGTERM)
            assert watch.look() == (signal.SIGTERM, False)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_clock_asks_for_a_checkpoint_within_a_minute_and_then_every_few(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with Watch(ALONE, 10) as watch:
        due = []
        for now[0] in (1059.0, 1060.0, 1100.0, 1659.0, 1660.0):
            due.append(watch.look()[1])
            if due[-1]:
                watch.saved()
    assert due == [False, True, False, False, True]
    with Watch(ALONE, 0) as watch:
        now[0] = 1e9
        assert not watch.look()[1]


def test_checkpoints_by_the_clock_change_nothing(tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    real = run_folder.save

    def save(path: Path, content: dict[str, Any]) -> None:
        steps.append(content["step"])
        real(path, content)

    monkeypatch.setattr(run_folder, "save", save)
    fit(_config(tmp_path / "run", save_every=100, save_minutes=1e-9))
    assert steps == [1, 2, 3, 4, 5, 6]
    _assert_same_bits(_state(tmp_path / "run"), _state(whole))


def test_the_command_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.toml").write_text(to_toml(_config(tmp_path / "run")))
    arguments = ["fit", str(tmp_path / "run.toml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learner.Criterion, "__call__", _during(learner.Criterion.__call__, 2, signal.SIGTERM))
        assert cli.main(arguments) == 143
    printed = capsys.readouterr().err.splitlines()[-1]
    expected = f"stopped after step 2 of 6, which is in {tmp_path / 'run' / 'last.pt'}"
    assert printed == f"{expected}; the same command goes on from the last checkpoint with --resume"
    assert cli.main([*arguments, "--resume"]) == 0

    def pressed(_: Any) -> None:
        raise KeyboardInterrupt

    for command, said in (("predict", "interrupted"), ("demo", "interrupted; what is trained is kept")):
        kind, _ = cli.COMMANDS[command]
        monkeypatch.setitem(cli.COMMANDS, command, (kind, pressed))
        assert cli.main([command, *(["last.pt"] if command == "predict" else [])]) == 130
        printed = capsys.readouterr().err.splitlines()[-1]
        assert printed.startswith(said)
        assert "--resume" not in printed


def test_what_stopped_a_run_comes_back_from_a_process_of_a_table() -> None:
    back = pickle.loads(pickle.dumps(Interrupted("stopped after step 3", signal.SIGTERM)))
    assert (str(back), back.signal) == ("stopped after step 3", signal.SIGTERM)


# ---- going on with other settings --------------------------------------------------------------------------------


def _changed(config: FitConfig) -> FitConfig:
    return replace(config, steps=8, resume=True, optim=replace(config.optim, lr=1e-3, weight_decay=0.0))


def test_other_rates_and_more_steps_are_refused_by_the_name_of_the_switch(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", steps=2)
    fit(config)
    with pytest.raises(
        ValueError, match=r"resume: expected optim\.lr as in the run, 0\.01, got 0\.001; --resume-changed"
    ):
        fit(_changed(config))
    other = replace(config, resume=True, resume_changed=True, model=ModelConfig(widths=(4, 4)))
    with pytest.raises(ValueError, match=r"resume: expected model\.widths as in the run, .*, got \[4, 4\]$"):
        fit(other)
    with pytest.raises(ValueError, match=r"steps: expected at least the 2 that are done in .*, got 1"):
        fit(replace(config, steps=1, resume=True, resume_changed=True))


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_other_rates_and_more_steps_are_taken_with_the_switch_and_recorded(tmp_path: Path, optimizer: Any) -> None:
    momentum = 0.9 if optimizer == "adamw" else 0.0  # plain SGD keeps no state
    config = _config(tmp_path / "run", steps=4, optim=OptimConfig(lr=1e-2, optimizer=optimizer, momentum=momentum))
    fit(config)
    out, before = config.out, _rows(config.out)
    more = replace(_changed(config), resume_changed=True)
    fit(more)
    rows = _rows(tmp_path / "run")
    assert rows[: len(before)] == before
    rates = [row["lr"] for row in rows if "lr" in row]
    assert rates[4:] == [1e-3 * schedule(step, 8, more.optim) for step in range(4, 8)]
    groups = run_folder.load(out / "last.pt")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}
    changes = [
        "after step 4: optim.lr 0.001, before 0.01",
        "after step 4: optim.weight_decay 0.0, before 0.0001",
        "after step 4: steps 8, before 4",
    ]
    assert run_folder.load(tmp_path / "run" / "last.pt")["changes"] == changes
    text = (tmp_path / "run" / "config.toml").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [f"# {line}" for line in changes]
    written = load_toml(tmp_path / "run" / "config.toml")
    assert written == replace(more, resume=False, resume_changed=False)
    fit(replace(written, resume=True))  # nothing differs any more


@pytest.mark.parametrize(("before", "now"), [("fp32", "fp16"), ("fp16", "fp32")])
def test_a_run_goes_on_in_another_precision(tmp_path: Path, before: Any, now: Any) -> None:
    """It ended in "The source state dict is empty", since only float16 has a scale of its loss."""
    config = _config(tmp_path, steps=1, precision=before)
    fit(config)
    other = replace(config, steps=2, precision=now, resume=True, resume_changed=True)
    assert fit(other).steps == 2
    assert bool(run_folder.load(tmp_path / "last.pt")["scaler"]) == (now == "fp16")


def test_a_checkpoint_of_before_such_changes_were_kept_goes_on(tmp_path: Path) -> None:
    config = _config(tmp_path / "run", steps=2)
    fit(config)
    content = run_folder.load(tmp_path / "run" / "last.pt")
    del content["changes"], content["config"]["save_minutes"], content["config"]["resume_changed"], content["format"]
    run_folder.save(tmp_path / "run" / "last.pt", content)
    fit(replace(config, resume=True))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2
