"""What the README shows has to run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_usage_of_the_readme_runs() -> None:
    code = re.search(r"```python\n(.*?)```", README, re.S)
    assert code is not None
    names: dict[str, object] = {}
    exec(code.group(1), names)
    head = names["head"]
    assert isinstance(head, torch.nn.Module)
    for tensor in (names["seg_logits"], *head.parameters()):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.grad is not None
        assert bool(tensor.grad.isfinite().all())


def test_the_python_of_the_training_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "coarse_train" / "README.md").read_text(), re.S)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code.group(1), names)
    assert (tmp_path / "runs" / "first" / "last.pt").is_file()


def test_the_variables_of_the_readme_are_read_somewhere() -> None:
    sources = "".join(
        path.read_text()
        for pattern in ("coarse_kernels/**/*.py", "csrc/**/*.cpp", "csrc/**/*.h", "setup.py")
        for path in ROOT.glob(pattern)
    )
    variables = set(re.findall(r"COARSE_KERNELS_[A-Z_]+", README))
    assert variables
    assert not [name for name in variables if f'"{name}"' not in sources]


def test_env_report_says_which_backend_the_cpu_gets_and_why() -> None:
    run = [sys.executable, "-m", "coarse_kernels.env_report"]
    done = subprocess.run(run, capture_output=True, text=True, check=True, cwd=ROOT)
    assert re.search(r"cpu: '(cpu|reference)' is chosen", done.stdout)
    hidden = (
        "import runpy, sys; sys.modules['coarse_kernels._C'] = None; "
        "runpy.run_module('coarse_kernels.env_report', run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COARSE_KERNELS_")}
    done = subprocess.run(
        [sys.executable, "-c", hidden], capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    )
    assert "cpu: 'reference' is chosen" in done.stdout
    assert "cannot: the compiled extension is missing" in done.stdout
