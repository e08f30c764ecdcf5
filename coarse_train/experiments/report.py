"""The demo's figure: a few test canvases and what became of them, the matrices, the scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data import IGNORE, Record, Source, open_split
from ..inference import load_model
from ..progress import posterior
from .cell import Cell
from .table import Summary

_BLANK = 0.93
_SHOWN = 4


def save_figure(path: Path, cells: Sequence[Cell], task: str) -> None:
    """Of the first seed. Without the row coarse_both: the scores alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second of every command's start
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    first = {cell.method: cell for cell in reversed(cells)}
    figure = Figure(figsize=(14, 2.0 * _SHOWN + 5.2 if "coarse_both" in first else 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(f"Coarse drawings of MNIST digits, task {task}")
    if "coarse_both" not in first:
        _bars(figure.subplots(), cells)
        figure.savefig(path, dpi=110)
        return
    method = first["coarse_both"]
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(2.0 * _SHOWN, 5.2)))
    source = open_split(load_model(Path(method.folder) / "last.pt").config.data, "test")
    panels = _panels([source.load(index) for index in _shown(source)], first, source)
    axes = top.subplots(_SHOWN, len(panels), squeeze=False)
    for column, (title, pictures) in enumerate(panels.items()):
        axes[0, column].set_title(title, fontsize=12)
        for row, picture in enumerate(pictures):
            axes[row, column].imshow(picture, interpolation="nearest")
            axes[row, column].set_xticks([])
            axes[row, column].set_yticks([])
    names = source.classes.names
    colours = np.array(source.classes.colours) / 255
    handles = [Patch(color=colours[k].tolist(), label=name) for k, name in enumerate(names)]
    handles.append(Patch(facecolor=(_BLANK, _BLANK, _BLANK), edgecolor="0.6", label="nothing drawn"))
    top.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=12)

    left, middle, right = bottom.subplots(1, 3, width_ratios=(1, 1, 1.25))
    draw_matrix(left, method.believed, names, "believed")
    draw_matrix(middle, method.observed, names, "counted")
    _bars(right, cells)
    figure.savefig(path, dpi=110)


def _shown(source: Source) -> list[int]:
    """The first canvases with an object that carries another class's name, then the first of the others: what is to be
    seen is chosen by the drawings, never by the predictions."""

    def swapped(index: int) -> bool:
        record = source.load(index)
        assert record.positive is not None
        assert record.mask is not None
        named = (record.positive != 0) & (record.positive != IGNORE)
        return bool(((record.mask != 0) & named & (record.positive != record.mask)).any())

    order = sorted(range(min(len(source), 64)), key=lambda index: not swapped(index))  # sorted() keeps equals in order
    return order[:_SHOWN]


@torch.no_grad()
def _panels(records: Sequence[Record], first: dict[str, Cell], source: Source) -> dict[str, Sequence[np.ndarray]]:
    """Column title -> (H, W, 3) pictures."""
    images = torch.from_numpy(np.stack([record.image for record in records])).movedim(3, 1).float() / 255
    positive = np.stack([_given(record.positive) for record in records])
    negative = np.stack([_given(record.negative) for record in records])
    output = load_model(Path(first["coarse_both"].folder) / "last.pt").model(images)
    believed = posterior(output, torch.from_numpy(positive), torch.from_numpy(negative))
    colours = np.array(source.classes.colours) / 255

    def paint(labels: np.ndarray) -> list[np.ndarray]:
        known = np.where(labels == IGNORE, 0, labels)
        return list(np.where((labels == IGNORE)[..., None], _BLANK, colours[known]))

    panels: dict[str, Sequence[np.ndarray]] = {
        "image": [np.repeat(record.image / 255, 3, 2) for record in records],
        "positive drawing\n“this is a …”": paint(positive),
        "negative drawing\n“this is not a …”": paint(negative[:, 0]),
    }
    if "ce_both" in first:
        other = load_model(Path(first["ce_both"].folder) / "last.pt").model.segmentation(images)
        panels["prediction of\nCE on both, tuned"] = paint(other.argmax(1).numpy())
    panels |= {
        "prediction of\ncoarse_both": paint(output.seg_logits.argmax(1).numpy()),
        "posterior, given\nboth drawings": list(believed.movedim(1, 3).numpy() @ colours),
        "true mask": paint(np.stack([_given(record.mask) for record in records])),
    }
    return panels


def _given(labels: np.ndarray | None) -> np.ndarray:
    assert labels is not None
    return labels


def draw_matrix(axis: Any, matrix: Sequence[Sequence[float]] | None, names: Sequence[str], title: str) -> None:
    """[drawn][true], with its numbers."""
    assert matrix is not None
    values = np.array(matrix)
    axis.imshow(values, vmin=0, vmax=1, cmap="Blues")
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=12, color=colour)
    short = ["bg" if name == "background" else name for name in names]
    axis.set_xticks(range(len(names)), short, fontsize=12)
    axis.set_yticks(range(len(names)), short, fontsize=12)
    axis.set_xlabel("true class", fontsize=12)
    axis.set_ylabel("drawn as", fontsize=12)
    axis.set_title(f"p(drawn | true), {title}", fontsize=12)


def _bars(axis: Any, cells: Sequence[Cell]) -> None:
    rows = list(dict.fromkeys(cell.method for cell in cells))
    means = [Summary.of(cells, row).mean for row in rows]
    colours = ["0.65" if row.startswith("ce_") else "tab:blue" if row.startswith("coarse") else "0.4" for row in rows]
    axis.bar_label(axis.barh(rows, means, color=colours), [f"{mean:.1f}" for mean in means], padding=3, fontsize=12)
    axis.set_xlim(0, 112)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("mIoU on held-out digits\nlast step, %", fontsize=12)
