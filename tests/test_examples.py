"""Every example runs, at small size, and does what it says."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
Load = Callable[[str], ModuleType]


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> Load:
    """An example by its name, as a module."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def test_examples_are_short_and_listed() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    for path in (*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*.ipynb")):
        assert f"[{path.name}]({path.name})" in listed, path.name
        assert len(path.read_text().splitlines()) < 80 or path.suffix == ".ipynb", path.name


def test_the_notebook_is_committed_with_its_figures() -> None:
    cells = json.loads((EXAMPLES / "learned_matrix.ipynb").read_text())["cells"]
    (drawn,) = (cell for cell in cells if "plt.show()" in "".join(cell["source"]))
    assert any("image/png" in output.get("data", ()) for output in drawn["outputs"])


def test_the_plain_loop_learns(example: Load) -> None:
    assert example("plain_loop").main(["--steps", "60", "--size", "64"]) > 0.9


@pytest.mark.slow
def test_segformer_never_has_logits_at_full_resolution(example: Load) -> None:
    pytest.importorskip("transformers")
    with _Results() as results:
        losses = example("segformer").main(["--small", "--steps", "2", "--size", "64", "96"])
    assert len(losses) == 2
    assert torch.tensor(losses).isfinite().all()
    whole = {shape[:-2] for shape in results.shapes if shape[-2:] == (64, 96)}
    assert whole <= {(2, 3), (2,)}, "the image, and a number for each pixel"
    assert (2, 19, 16, 24) in results.shapes


class _Results(TorchDispatchMode):
    """Shapes of the floating-point results of every operator, those of backward among them."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in tree_leaves(results) if isinstance(t, Tensor) and t.is_floating_point()}
        return results


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains(example: Load, precision: str) -> None:
    state = pytest.importorskip("accelerate.state")
    losses = example("with_accelerate").main(["--steps", "30", "--size", "64", "--mixed-precision", precision])
    state.AcceleratorState._reset_state(reset_partial_state=True)  # one a process, its precision for good
    assert losses[-1] < 0.6 * losses[0]


def test_a_step_at_full_resolution_is_the_plain_one(example: Load) -> None:
    step = example("full_resolution")
    ours, plain = (step.main(["--size", "32", "64", *more]) for more in ([], ["--plain"]))
    assert ours == pytest.approx(plain, rel=1e-5)


@pytest.mark.slow
def test_the_matrices_of_annotators_are_found(example: Load) -> None:
    annotators = example("annotators")
    error = (annotators.main([]) - annotators.TRUE).abs()
    assert error.mean() < 0.03
    assert error.max() < 0.15


@pytest.mark.slow
def test_own_drawings_train_a_network(example: Load, tmp_path: Path) -> None:
    score = example("own_drawings").main(["--out", str(tmp_path / "run")])
    assert score > 60
    assert (tmp_path / "run" / "last.pt").is_file()


@pytest.mark.slow
def test_the_notebook_learns_the_matrix() -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(EXAMPLES / "learned_matrix.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    printed = [
        out["text"] for cell in notebook.cells for out in cell.get("outputs", ()) if out["output_type"] == "stream"
    ]
    error = float(printed[-1].split("off by ")[1].split()[0])
    assert error < 0.03
