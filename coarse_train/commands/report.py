"""A run on one page: scores, curves, matrices, pictures and config in one HTML file that needs no server and no network.

coarse-train report runs/street
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import torch
import tyro
from PIL import Image

from ..config import FitConfig, load_toml
from ..metrics import describe_collapse, largest_confusions
from ..storage import look_at_file, printable, write_text
from ..trials import read_selection

_POINTS = 400  # of a curve: of longer ones the means of so many parts are drawn
_CURVES = {  # title -> (row of metrics.jsonl has this, what is drawn)
    "Loss": ("loss", ("loss", "positive_nll", "negative_nll", "mask_nll")),
    "Scores on the validation masks, %": ("mean_iou", ("mean_iou", "pixel_accuracy")),
    "Learning rate": ("lr", ("lr",)),
    "Norm of the gradient": ("grad_norm", ("grad_norm",)),
}
_NAMES = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "lr": "rate", "grad_norm": "norm"}
_NAMES |= {f"{kind}_nll": f"{kind}, -log p" for kind in ("positive", "negative", "mask")}
# Okabe and Ito's, and a dash each: told apart without colours too
_STYLES = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", ":"), ("#cc79a7", "-."))


@dataclass(frozen=True)
class ReportConfig:
    """Write a run as one HTML file: scores, curves, matrices, best and worst images, config."""

    run: tyro.conf.Positional[Path]
    """Folder of the run; it need not be finished."""
    out: Path | None = None
    """File to write; without it report.html in the folder of the run. An older one is replaced."""


def run_report(config: ReportConfig) -> Path:
    """The file that was written. Raises FileNotFoundError where ``run`` is no folder of a run."""
    out = config.out or config.run / "report.html"
    text = printable(render(config.run))
    look_at_file("out", out, text.partition("<title>")[0])
    out.parent.mkdir(parents=True, exist_ok=True)
    write_text(out, text)
    print(out)
    return out


def render(folder: Path) -> str:
    """The page. Everything that is a text of the user's is escaped."""
    rows = list(read_rows(folder / "metrics.jsonl"))
    scored = [row for row in rows if row.get("confusion")]
    matrices: dict[str, Any] = next((row for row in reversed(rows) if {"positive_cm", "negative_cm"} & row.keys()), {})
    config = load_toml(folder / "config.toml")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(
        folder=folder.resolve().name,
        config=config,
        toml=(folder / "config.toml").read_text(encoding="utf-8"),
        step=max((row["step"] for row in rows), default=0),
        last=scored[-1] if scored else None,
        best=max(scored, key=lambda row: row["mean_iou"] or -math.inf) if scored else None,
        classes=_classes(scored),
        confused=_confused(scored),
        collapse=_collapse(scored),
        matrices=[(kind, matrices[f"{kind}_cm"]) for kind in ("positive", "negative") if f"{kind}_cm" in matrices],
        curves=list(_curves(rows)),
        pictures=_pictures(folder, config, scored),
        selection=read_selection(folder, config.select_with),
    )


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Of a metrics.jsonl, each step once: of rows that a resumed run wrote again the last. A line that is being written is left
    out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise FileNotFoundError(
            f"run: expected the folder of a run, with its metrics.jsonl, got {path.parent} ({error.strerror})"
        ) from error
    found: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in lines:
        try:
            row = json.loads(line)
            found[row["step"], "loss" in row] = row
        except (ValueError, KeyError, TypeError):
            continue
    yield from (found[key] for key in sorted(found))


def _classes(scored: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A line for each class: its newest scores, and its IoU over the steps as points of a polyline in a box of 100 x 20."""
    if not scored:
        return []
    counts = torch.tensor(scored[-1]["confusion"], dtype=torch.float64)
    total, steps = counts.sum().clamp(min=1), [row["step"] for row in scored]
    found = []
    for index, (name, iou) in enumerate(scored[-1]["iou"].items()):
        values = [(step, row["iou"].get(name)) for step, row in zip(steps, scored, strict=True)]
        points = [f"{100 * step / steps[-1]:.1f},{20 - value / 5:.1f}" for step, value in values if value is not None]
        true, predicted = counts[index].sum(), counts[:, index].sum()
        found.append(
            {
                "name": name,
                "iou": iou,
                "recall": float(100 * counts[index, index] / true) if true else None,
                "precision": float(100 * counts[index, index] / predicted) if predicted else None,
                "true": float(100 * true / total),
                "predicted": float(100 * predicted / total),
                "points": " ".join(points),
                "row": [float(count / true) if true else None for count in counts[index]],
                "counts": [int(count) for count in counts[index]],
            }
        )
    return found


def _confused(scored: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    return largest_confusions(torch.tensor(scored[-1]["confusion"]), list(scored[-1]["iou"])) if scored else []


def _collapse(scored: Sequence[Mapping[str, Any]]) -> str | None:
    return describe_collapse(torch.tensor(scored[-1]["confusion"]), list(scored[-1]["iou"])) if scored else None


def _curves(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """Title and SVG, as an address that holds it."""
    for title, (field, names) in _CURVES.items():
        own = [row for row in rows if field in row]
        if own:
            yield title, _address("image/svg+xml", _draw(own, [name for name in names if any(name in r for r in own)]))


def _draw(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> bytes:
    """Curves over the steps. No text of the user's is in them: matplotlib reads some of it as formulas."""
    import matplotlib  # half a second of every command's start
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(5.2, 2.6), layout="constrained")
    axis = figure.subplots()
    for name, (colour, dash) in zip(names, _STYLES, strict=False):
        known = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        parts = [known[start:end] for start, end in pairwise(_cuts(len(known)))]
        steps, values = ([sum(one[k] for one in part) / len(part) for part in parts] for k in (0, 1))
        marker = "o" if len(parts) < 30 else ""
        axis.plot(
            steps, values, color=colour, linestyle=dash, marker=marker, markersize=3, label=_NAMES.get(name, name)
        )
    axis.set_xlabel("step")
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.3)
    if len(names) > 1:
        figure.legend(loc="outside upper left", ncols=len(names), frameon=False, fontsize=8)
    file = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "coarse_train"}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _cuts(count: int) -> list[int]:
    parts = min(count, _POINTS)
    return [part * count // parts for part in range(parts + 1)] if parts else []


def _pictures(folder: Path, config: FitConfig, scored: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, int]]:
    """Caption, address and width of the validation images that the newest scores name, and of the training image."""
    named = [
        (f"{end}_{number}", f"{end} {number}: {name}, mean IoU {iou:.2f} %")
        for end in ("worst", "best")
        for number, (name, iou) in enumerate(scored[-1][end] if scored else [], start=1)
    ]
    files = [
        (folder / "pictures" / f"{file}.png", caption) for file, caption in [*named, ("training", "training image")]
    ]
    return [(caption, *_picture(path)) for path, caption in files if path.exists()]


def _picture(path: Path) -> tuple[str, int]:
    """As JPEG, a fifth of the size."""
    file = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(file, "jpeg", quality=90)
    return _address("image/jpeg", file.getvalue()), picture.width


def _address(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
