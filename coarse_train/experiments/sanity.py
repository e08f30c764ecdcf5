"""Known noise: the confusion matrix that is learned beside the true one.

On canvases of real digits the positive drawings' p(drawn | true) is known: counted on the images that were trained on, and
stated by the process where objects are drawn whole and only their names are wrong. The method learns one matrix for all
images from positive drawings beside trusted negative ones. Its start has 0.6 on the diagonal and, where objects are left
incomplete, 0.3 of an object drawn as background (`recipe`); where they are drawn whole the rest of a column is equal.

One process cannot be identified ("alike"). What tells a true matrix A from A = I, with what A says of a pixel as the
network's prediction, is a negative drawing that rules out what a positive one wrongly says. Here no drawing does: both
give every drawing the same likelihood, p(drawn) = A e_true and p(named) = (1 - (A e_true)[named]) / (C - 1) =
(1 - e_true[named]) / (C - 1), since A moves probability only to classes that no negative drawing of the true one names.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.figure import Figure

from ..config import FitConfig, recipe
from ..data.mnist import PROCESSES
from .cell import Cell
from .experiment import ExperimentConfig, Part, Result
from .noise_map import at_matrix_rate, canvases
from .report import draw_matrix

QUESTION = "Where the noise of the drawings is known: is it what the learned confusion matrix says?"
# noise process -> what is wrong, in a figure's words
PRESETS = {
    "binary_names": "whole objects,\n6 of 10 drawn as nothing",
    "whole_names": "whole objects,\ntwo names mostly wrong",
    "majority": "incomplete objects,\ntwo names mostly wrong",
    "alike": "the same, negatives\nnever tell them apart",
}
_WHOLE = ("binary_names", "whole_names")  # pixels have the matrix that the process states
_HOPELESS = ("alike",)
_FOUND = 0.25  # of the identity's error: below it, with every seed, a matrix, or its part about names, counts as found


def parts(config: ExperimentConfig) -> list[Part]:
    return [Part(preset, rows_of(preset)) for preset in PRESETS]


def rows_of(preset: str) -> Mapping[str, FitConfig]:
    """
    method        positive drawings through a global matrix, negative ones trusted
    method_fast   the same with three times the matrix's learning rate: what part of the error is too few steps
    identity      both kinds trusted: A = I
    """
    base = replace(canvases(preset), steps=recipe("mnist").steps)
    matrix = recipe("mnist").positive
    if preset in _WHOLE:
        matrix = replace(matrix, missing=None)
    method = replace(base, positive=matrix)
    return {"method": method, "method_fast": at_matrix_rate(method, 3.0), "identity": base}


def identity_error(cell: Cell) -> float:
    """As `Cell.cm_error`, of the identity."""
    return _error(np.eye(len(cell.observed or ())), np.array(cell.observed))


def names_error(cell: Cell) -> tuple[float, float]:
    """Of the believed matrix and of the identity where an object was drawn as an object: without class 0, columns that sum to
    1. What is left out of objects has no part in it."""
    objects = (np.array(matrix)[1:, 1:] for matrix in (cell.believed, cell.observed))
    believed, observed = (matrix / np.maximum(matrix.sum(0), 1e-9) for matrix in objects)
    return _error(believed, observed), _error(np.eye(len(observed)), observed)


def _error(matrix: np.ndarray, observed: np.ndarray) -> float:
    return float(np.abs(matrix - observed)[:, observed.sum(0) > 0].mean())


def conclude(results: Sequence[Result]) -> list[str]:
    sentences = []
    for result in results:
        own = [cell for cell in result.cells if cell.method == "method"]
        identity = statistics.fmean(map(identity_error, own))
        whole = all(cell.cm_error is not None and cell.cm_error < _FOUND * identity_error(cell) for cell in own)
        names = [names_error(cell) for cell in own]
        named = all(believed < _FOUND * trusted for believed, trusted in names)
        sentence = (
            f"{result.title}: the matrix is {'found' if whole else 'found in its names alone' if named else 'NOT found'}: "
            f"an entry is off by {result.mean('method', 'cm_error'):.3f} (at three times its learning rate "
            f"{result.mean('method_fast', 'cm_error'):.3f}), the identity's by {identity:.3f}"
        )
        believed, trusted = (statistics.fmean(errors) for errors in zip(*names, strict=True))
        if trusted > 0:
            sentence += f"; among the names of objects by {believed:.3f}, the identity's by {trusted:.3f}"
        if result.title in _WHOLE:
            stated = np.array(PROCESSES[result.title].confusion)
            errors = [float(np.abs(np.array(cell.believed) - stated).mean()) for cell in own]
            sentence += f"; from what the process states {statistics.fmean(errors):.3f}"
        sentence += f"; mean IoU {result.mean('method'):.1f}, with both kinds trusted {result.mean('identity'):.1f}."
        if result.title in _HOPELESS:
            sentence += " No drawing tells its true matrix from the identity, so that nobody can identify it."
        sentences.append(sentence)
    return sentences


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Counted above believed, a column for each process, of the first seed."""
    figure.set_size_inches(3.6 * len(results), 8.6)
    axes = figure.subplots(2, len(results), squeeze=False)
    for (upper, lower), result in zip(axes.T, results, strict=True):
        cell = next(cell for cell in result.cells if cell.method == "method")
        names = list(cell.iou)
        draw_matrix(upper, cell.observed, names, "")
        draw_matrix(lower, cell.believed, names, "")
        upper.set_title(f"{PRESETS.get(result.title, result.title)}\n\ncounted", fontsize=11)
        lower.set_title(
            f"believed, seed {cell.seed}\noff by {cell.cm_error:.3f}, identity {identity_error(cell):.3f}", fontsize=11
        )
