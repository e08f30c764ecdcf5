"""The demo's table and figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

import coarse_kernels

from ..data import IGNORE, Sample, Splits
from ..model import CoarseModel

# background, then object classes: the Okabe-Ito palette, which colour-blind readers can tell apart
_COLOURS = np.array([(38, 38, 46), (230, 159, 0), (86, 180, 233), (0, 158, 115), (204, 121, 167)]) / 255
_BLANK = np.array([0.93, 0.93, 0.93])
_LEARNS_FROM = {
    "ce_positive": "positive drawings",
    "ce_negative": "negative drawings",
    "ce_both": "both",
    "coarse_positive": "positive, confusion matrix learned",
    "coarse_both": "both, confusion matrix learned",
    "supervised": "true masks",
}
_SHOWN = 4


def print_table(results: dict[str, Any]) -> None:
    """Plain text, aligned; the last line says whether the method is ahead, also where it is not."""
    print(f"\n{'method':<16}{'learns from':<36}{'mIoU':>7}{'best':>7}{'CM error':>10}{'seconds':>9}")
    for row in results["rows"]:
        error = "-" if row["cm_error"] is None else f"{row['cm_error']:.3f}"
        print(
            f"{row['method']:<16}{_LEARNS_FROM[row['method']]:<36}{row['miou']:>7.1f}{row['miou_best']:>7.1f}"
            f"{error:>10}{row['seconds']:>9.1f}"
        )
    print(
        f"mIoU in percent on held-out digits with true masks, last step; background counts. Backend of coarse rows: "
        f"{results['backend']}; seed {results['seed']}."
    )
    print(verdict(results))


def verdict(results: dict[str, Any]) -> str:
    """One sentence: coarse_both against the best cross-entropy."""
    lead, expected, best = results["lead"], results["expected_lead"], results["best_cross_entropy"]
    side = "above" if lead >= 0 else "BELOW"
    met = "as expected" if lead >= expected else "NOT as expected"
    return (
        f"coarse_both is {abs(lead):.1f} points {side} the best cross-entropy, {best}: {met} (at least {expected:g})."
    )


def save_figure(
    path: Path,
    splits: Splits,
    models: dict[str, CoarseModel],
    transition: Tensor,
    estimated: Tensor,
    true: Tensor,
    rows: Sequence[dict[str, Any]],
) -> None:
    """A few test canvases with their drawings and what became of them; confusion matrices; scores."""
    batch = splits.test.select(_shown(splits.test.stacked))
    names = splits.class_names
    panels = _panels(batch, models, transition)
    figure = Figure(figsize=(14, 2.0 * len(batch.image) + 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=(2.0 * len(batch.image), 5.2)))

    axes = top.subplots(len(batch.image), len(panels), squeeze=False)
    for column, (title, pictures) in enumerate(panels.items()):
        axes[0, column].set_title(title, fontsize=12)
        for row, picture in enumerate(pictures):
            axis = axes[row, column]
            axis.imshow(picture, interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
    handles = [Patch(color=_COLOURS[k].tolist(), label=name) for k, name in enumerate(names)]
    handles.append(Patch(facecolor=_BLANK.tolist(), edgecolor="0.6", label="nothing drawn"))
    top.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=12)

    left, middle, right = bottom.subplots(1, 3, width_ratios=(1, 1, 1.25))
    _matrix(left, estimated.numpy(), names, "estimated confusion")
    _matrix(middle, true.numpy(), names, "true confusion")
    _bars(right, rows)
    figure.savefig(path, dpi=110)


def _shown(samples: Sample) -> list[int]:
    """The first canvases with an object that carries another class's name, then the first of the others: what is to be
    seen is chosen by the drawings, never by the predictions."""
    named = (samples.positive != 0) & (samples.positive != IGNORE)
    swapped = ((samples.mask != 0) & named & (samples.positive != samples.mask)).flatten(1).any(1)
    order = sorted(range(len(samples.mask)), key=lambda n: not bool(swapped[n]))  # sorted() keeps the order of equals
    return order[:_SHOWN]


@torch.no_grad()
def _panels(batch: Sample, models: dict[str, CoarseModel], transition: Tensor) -> dict[str, np.ndarray]:
    """Column title -> (N, H, W, 3) pictures."""
    for model in models.values():
        model.eval()
    seg_logits, cm_logits, _, _ = models["coarse_both"](batch.image)
    drawings = [
        coarse_kernels.Drawings(batch.positive, cm_logits),
        coarse_kernels.Drawings(batch.negative[:, 0], None, transition),
    ]
    posterior = coarse_kernels.annotation_posterior(seg_logits, drawings, ignore_index=IGNORE)
    baseline = models["ce_both"].segmentation(batch.image).argmax(1)
    return {
        "image": batch.image[:, 0, :, :, None].expand(-1, -1, -1, 3).numpy(),
        "positive drawing\n“this is a …”": _paint(batch.positive),
        "negative drawing\n“this is not a …”": _paint(batch.negative[:, 0]),
        "prediction of\nCE on both": _paint(baseline),
        "prediction of\ncoarse_both": _paint(seg_logits.argmax(1)),
        "posterior, given\nboth drawings": posterior.permute(0, 2, 3, 1).numpy() @ _COLOURS[: posterior.shape[1]],
        "true mask": _paint(batch.mask),
    }


def _paint(labels: Tensor) -> np.ndarray:
    """(N, H, W) classes -> (N, H, W, 3)."""
    index = labels.numpy().astype(np.int64)
    picture = _COLOURS[np.where(index == IGNORE, 0, index)]
    picture[index == IGNORE] = _BLANK
    return picture


def _matrix(axis: Any, matrix: np.ndarray, names: Sequence[str], title: str) -> None:
    axis.imshow(matrix, vmin=0, vmax=1, cmap="Blues")
    for (i, j), value in np.ndenumerate(matrix):
        axis.text(
            j, i, f"{value:.2f}", ha="center", va="center", fontsize=12, color="white" if value > 0.6 else "black"
        )
    short = ["bg" if name == "background" else name for name in names]
    axis.set_xticks(range(len(names)), short, fontsize=12)
    axis.set_yticks(range(len(names)), short, fontsize=12)
    axis.set_xlabel("true class", fontsize=12)
    axis.set_ylabel("drawn as", fontsize=12)
    axis.set_title(f"{title}\np(drawn | true)", fontsize=12)


def _bars(axis: Any, rows: Sequence[dict[str, Any]]) -> None:
    colours = ["0.65" if row["method"].startswith("ce_") else "0.4" for row in rows]
    colours = ["tab:blue" if row["method"].startswith("coarse") else c for row, c in zip(rows, colours, strict=True)]
    bars = axis.barh([row["method"] for row in rows], [row["miou"] for row in rows], color=colours)
    axis.bar_label(bars, [f"{row['miou']:.1f}" for row in rows], padding=3, fontsize=12)
    axis.set_xlim(0, 112)
    axis.invert_yaxis()
    axis.tick_params(axis="y", labelsize=12)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("mIoU on held-out digits\nlast step, %", fontsize=12)
