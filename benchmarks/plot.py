"""Figure from the CSV: `python -m benchmarks.plot [cpu.csv] [--out cpu.png] [--column ns_per_pixel] [--case PATTERN]`."""

from __future__ import annotations

import argparse
import csv
import fnmatch
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
COLUMNS = {
    "times_ours": "time over ours (log scale)",
    "ns_per_pixel": "ns per pixel (log scale)",
    "peak_extra_mb": "peak extra memory, MB (log scale)",
}


def read(path: Path, column: str, pattern: str = "*") -> dict[str, dict[str, float]]:
    """case -> contestant -> value, of the cases that match; rows without a value are left out."""
    found: dict[str, dict[str, float]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if not fnmatch.fnmatchcase(row["case"], pattern) or not row[column] or float(row[column]) <= 0:
                continue
            name = " ".join(filter(None, (row["contestant"], row["schedule"])))
            name += f" x{row['threads']}" if row["threads"] != "1" else ""
            found.setdefault(row["case"], {})[name] = float(row[column])
    return found


def draw(values: dict[str, dict[str, float]], column: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({name for case in values.values() for name in case}, key=lambda name: (":" not in name, name))
    colours = {name: plt.get_cmap("tab20")(index % 20) for index, name in enumerate(names)}
    bars = sum(len(case) for case in values.values())
    figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * (bars + len(values))), layout="constrained")
    position, ticks = 0.0, []
    for case, contestants in values.items():
        start = position
        for name, value in sorted(contestants.items(), key=lambda item: item[1]):
            axes.barh(position, value, color=colours[name])
            axes.text(value, position, f" {value:.3g}  {name}", va="center", fontsize=7)
            position += 1
        ticks.append(((start + position - 1) / 2, case))
        position += 1
    axes.set_yticks([at for at, _ in ticks], [case for _, case in ticks])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.margins(x=0.35, y=0.01)
    axes.set_xlabel(COLUMNS[column])
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("csv", type=Path, nargs="?", default=RESULTS / "cpu.csv")
    parser.add_argument("--out", type=Path, help="default: beside the CSV")
    parser.add_argument("--column", choices=tuple(COLUMNS), default="times_ours")
    parser.add_argument("--case", default="*", metavar="PATTERN", help="only these cases")
    options = parser.parse_args(argv)
    values = read(options.csv, options.column, options.case)
    if not values:
        parser.error(f"{options.csv} holds no value of {options.column} for a case like {options.case}")
    out = options.out or options.csv.with_suffix(".png")
    draw(values, options.column, out)
    print(out)


if __name__ == "__main__":
    main()
