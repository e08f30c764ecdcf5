"""Figures from a folder's results.csv: `python -m benchmarks.plot benchmarks/results/HARDWARE`. Readable in black and white.

speedup.png     how many times as long as ours each kind of competitor takes
memory.png      peaks over the inputs, ours beside the plain formulation that takes least
roofline.png    bandwidth reached over exponentials a byte, under the machine's limits
scaling.png     time over pixels and over classes, with the power that fits
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .problem import parse
from .report import Table, read_csv, series

_HATCHES = {"published": "", "plain": "//", "compiled": ".."}
_GREYS = {"published": "0.35", "plain": "0.75", "compiled": "1.0"}
_MARKS = "osD^v<>P*X"


def draw_all(folder: Path) -> list[Path]:
    """Those figures for which there is something measured."""
    table = Table(read_csv(folder / "results.csv"))
    drawn = []
    for name, draw in (("speedup", speedup), ("memory", memory), ("roofline", roofline), ("scaling", scaling)):
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if draw(table, figure):
            figure.savefig(folder / f"{name}.png", dpi=110)
            drawn.append(folder / f"{name}.png")
    return drawn


def _plainly(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def speedup(table: Table, figure: Figure) -> bool:
    found = {}
    for name in table.problems:
        ratios = {kind: table.times_ours(name, best) for kind in _HATCHES if (best := table.best(name, kind))}
        if any(not math.isnan(value) for value in ratios.values()):
            found[name] = ratios
    if not found:
        return False
    figure.set_size_inches(9, 1.2 + 0.55 * len(found))
    axes = figure.subplots()
    for place, ratios in enumerate(found.values()):
        for k, (kind, value) in enumerate(ratios.items()):
            at = place + 0.27 * (k - (len(ratios) - 1) / 2)
            axes.barh(at, value, 0.25, color=_GREYS[kind], edgecolor="black", linewidth=0.6, hatch=_HATCHES[kind],
                      label=kind if place == 0 or kind not in axes.get_legend_handles_labels()[1] else None)  # fmt: skip
            axes.text(value, at, f" {value:.3g}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), list(found), fontsize=8, family="monospace")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("time over ours")
    axes.legend(frameon=False, loc="lower right")
    _plainly(axes)
    return True


def memory(table: Table, figure: Figure) -> bool:
    found = {name: peaks for name in table.problems if (peaks := table.peaks(name)) is not None}
    if not found:
        return False
    figure.set_size_inches(9, 1.2 + 0.45 * len(found))
    axes = figure.subplots()
    for place, (name, (own, least)) in enumerate(found.items()):
        first, gradients = place == 0, table.value(name, "", "gradients")
        axes.barh(place - 0.18, own, 0.34, color="0.2", label="ours" if first else None)
        axes.barh(place + 0.18, least, 0.34, color="0.8", edgecolor="black", linewidth=0.6, hatch="//",
                  label="the plain PyTorch that takes least" if first else None)  # fmt: skip
        axes.plot([gradients] * 2, [place - 0.4, place + 0.4], "k:", label="the gradients alone" if first else None)
    axes.set_yticks(range(len(found)), list(found), fontsize=8, family="monospace")
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("peak over the inputs, MB")
    figure.legend(frameon=False, loc="outside lower center", ncols=3)
    _plainly(axes)
    return True


def roofline(table: Table, figure: Figure) -> bool:
    """Both axes from the algorithm's count: exponentials a byte, and bytes a second. One thread."""
    copy, exponentials = (table.value("machine t1", "", rate) for rate in ("copy", "exp"))
    points = []
    for name in table.problems:
        own, problem = table.ours(name), parse(name)
        moved, counted = table.value(name, "", "bytes"), table.value(name, "", "exponentials")
        if own and problem.threads == 1 and counted > 0 and moved > 0 and table.row(name, own):
            points.append((counted / moved, moved / (1e-3 * table.value(name, own)) / 1e9, name))
    if not points or math.isnan(copy):
        return False
    figure.set_size_inches(8, 5.5 + 0.17 * len(points))
    axes = figure.subplots()
    low, high = min(p[0] for p in points) / 2, max(p[0] for p in points) * 2
    steps = [low * (high / low) ** (k / 200) for k in range(201)]
    limit = [min(copy, math.inf if math.isnan(exponentials) else exponentials / x) / 1e9 for x in steps]
    axes.plot(steps, limit, "k-", label="limit: copy, then exponentials")
    for k, (x, y, name) in enumerate(sorted(points)):
        axes.plot(x, y, _MARKS[k % len(_MARKS)], color="black", fillstyle="none" if k // len(_MARKS) % 2 else "full",
                  markersize=6, label=name)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("exponentials a byte")
    axes.set_ylabel("GB/s, each logit and gradient moved once")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=7)
    _plainly(axes)
    return True


def scaling(table: Table, figure: Figure) -> bool:
    found = series(table)
    kinds = [along for along in ("pixels", "classes") if any(one.along == along for one in found)]
    if not kinds:
        return False
    figure.set_size_inches(5.6 * len(kinds), 4.2 + 0.16 * len(found))
    for axes, along in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        own = [one for one in found if one.along == along]
        for k, one in enumerate(own):
            axes.plot(one.sizes, one.milliseconds, f"{_MARKS[k % len(_MARKS)]}{('-', '--', ':')[k % 3]}", color="black",
                      linewidth=0.9, markersize=4, label=f"{one.provider}, {one.about}: {one.exponent:.2f}")  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(along)
        axes.set_ylabel("ms")
        axes.legend(frameon=False, fontsize=6, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        _plainly(axes)
    return True


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="with a results.csv")
    options = parser.parse_args(argv)
    if not (options.folder / "results.csv").is_file():
        parser.error(f"expected a folder with a results.csv, got {options.folder}")
    for path in draw_all(options.folder):
        print(path)


if __name__ == "__main__":
    main()
