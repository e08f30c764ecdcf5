"""A few dense masks beside drawings of everything: what is the best use of them?

Drawings are positive ones alone, so that nothing but the masks tells what is wrong with them: names, outlines, or both.
Every row sees the same masks and as many steps; each has one number that matters, tuned with the same number of trials at
20 masks, and kept for the other numbers of masks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from ..config import DrawingsConfig, FitConfig, recipe
from ..data import IGNORE, open_split
from ..engine import fit
from ..inference import load_model
from ..pen import LARGEST
from ..progress import posterior
from ..simulate import Mix, Process, Strokes, draw_coarse, others, swapped
from .corrector import corrected
from .experiment import ExperimentConfig, Part, Result
from .few_masks_verdicts import BY_IMAGE, OTHERS, OURS
from .few_masks_verdicts import conclude as conclude
from .noise_map import LEFT_OUT, STEPS, TRUSTED, at_rate, by_masks, canvases
from .redrawn import made_once, redrawn, widened, write_map
from .table import Row, digest

QUESTION = "With drawings of every image and dense masks of N: which use of both learns most?"
MASKS = (20, 6, 5, 10, 50, 100)
_TUNED_AT = 20
_MANY_SEEDS = (20, 6)  # the others show how it goes on, with one
_NOISE = {
    "majority": "two names mostly wrong",
    "thick": "outlines too far",
    "thin": "outlines not far enough",
    "thick_names": "both: thick, and two names mostly wrong",
}
_SHARE = 0.25  # of a batch, with a mask
_RATES = (0.25, 0.5, 1.0, 2.0)
_WEIGHTS = (0.3, 1.0, 3.0, 10.0)
_TRACE = 0.01
_DOUBT = 1.0  # pixels; with 2 too little is left in some seeds to learn all classes in time
_FINETUNED = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
# Left out where there is no such noise.
_OF_NAMES = ("mixed_trace", "all")
_OF_OUTLINES = ("pen_alone", "pen_nothing", "pen_doubt", "pen_doubt_alone")
_OF_BOTH = ("pen_mixed_trace", "names_first")
_ON_PHOTOGRAPHS = ("drawings", *OTHERS, "mixed", "pen", "pen_finetune", *BY_IMAGE, "supervised")
_ON_ALL_DIGITS = (
    "drawings",
    *OTHERS,
    "mixed",
    "pen",
    "pen_alone",
    "pen_doubt",
    "pen_doubt_alone",
    "pen_finetune",
    "supervised",
)
_ROWS_WHEN_LONG = ("drawings", "masks", "ce_mixed", "finetune", "pen_image", "supervised")  # eight minutes a run
_PHOTOGRAPH_STEPS = 400
_LONG = 2000
_BRUSH = (2, 4)  # pixels by which it reaches beyond a vessel, for each image


def parts(config: ExperimentConfig) -> list[Part]:
    out = (config.out or Path("runs") / config.name) / "drawings"
    steps = 10 if config.quick else STEPS
    found = []
    for noise in ("thick_names",) if config.quick else _NOISE:
        base = replace(canvases(noise), negative=LEFT_OUT)
        if config.quick:
            base = replace(base, steps=steps, data=replace(base.data, limit=64))
        for count in MASKS[:1] if config.quick else MASKS:
            title = _title(noise, count)
            tuned_as = None if count == _TUNED_AT else _title(noise, _TUNED_AT)
            rows = rows_of(base, count, recipe("mnist").positive, out / title, steps)
            without = {*BY_IMAGE, *(_OF_NAMES if noise in ("thick", "thin") else _OF_OUTLINES)}
            if noise != "thick_names":
                without |= {*_OF_BOTH}
            rows = {row: one for row, one in rows.items() if row not in without}
            found.append(Part(title, rows, tuned_as=tuned_as, seeds=None if count in _MANY_SEEDS else 1))
    return found if config.quick else found + _full_mnist(config, out) + _vessels(config, out) + _streets(config, out)


def _full_mnist(config: ExperimentConfig, out: Path) -> list[Part]:
    """Outlines on canvases of all digits, which are five times as many; settings are those of the sample."""
    root = config.root("mnist")
    if root is None:
        return []
    base = replace(canvases("thick"), negative=LEFT_OUT)
    base = replace(base, data=replace(base.data, root=root))
    title = f"thick on full MNIST, {_TUNED_AT} masks"
    rows = rows_of(base, _TUNED_AT, recipe("mnist").positive, out / title, STEPS)
    return [Part(title, {row: rows[row] for row in _ON_ALL_DIGITS}, tuned_as=_title("thick", _TUNED_AT))]


def _vessels(config: ExperimentConfig, out: Path) -> list[Part]:
    """CHASE_DB1: vessels as a broad brush draws them, which is known, and as the second observer did, which is not."""
    root = config.root("chasedb1")
    if root is None:
        return []
    base = _photographs("chasedb1", root)
    source = open_split(base.data, "train")

    def brush(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return widened(mask, 1, int(rng.integers(_BRUSH[0], _BRUSH[1] + 1))).astype(np.uint8)

    def by_hand(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return draw_coarse(mask, _HURRIED, rng)[0]

    tuned = "chase brush, 2 masks"
    found = []
    for title, drawings in (
        (tuned, redrawn(source, out / "brush", brush, known_by=(root, _BRUSH))),
        ("chase simulated brush, 2 masks", redrawn(source, out / "simulated", by_hand, known_by=(root, _HURRIED))),
        ("chase second observer, 3 masks", None),
    ):
        own = replace(base, data=replace(base.data, positives=drawings))
        found.append(_part(title, own, out, tuned_as=None if title == tuned else tuned))
        if title == tuned:
            # what few masks teach is learned soon, what all drawings teach is not; it takes five times as long, so one seed
            own = replace(own, steps=_LONG, evaluate_every=_LONG // 2)
            title = f"chase brush at {_LONG} steps, 2 masks"
            found.append(replace(_part(title, own, out, tuned_as=tuned, only=_ROWS_WHEN_LONG), seeds=1))
    return found


def _streets(config: ExperimentConfig, out: Path) -> list[Part]:
    """CamVid: small things drawn 2 pixels too wide, over what is beside them. Scored on its validation split, as is usual
    for it, so that nothing is tuned there: settings are those of thick digits. A run takes ten minutes of a core: one seed."""
    root = config.root("camvid")
    if root is None:
        return []
    base = _photographs("camvid", root)
    source = open_split(base.data, "train")
    small = [source.classes.names.index(name) for name in ("pole", "sign", "fence", "pedestrian", "bicyclist")]

    def broad(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        drawing = mask.copy()
        for label in small:
            drawing[widened(mask, label, 2) & (mask != IGNORE)] = label
        return drawing

    own = replace(
        base, data=replace(base.data, positives=redrawn(source, out / "broad", broad, known_by=(root, small)))
    )
    part = _part("camvid small things too wide, 20 masks", own, out, split="val", tuned_as=_title("thick", _TUNED_AT))
    return [replace(part, seeds=1)]


_HURRIED = Process(
    "brush",
    Strokes(1.0, Mix(dilated=1.0), balance=1.0, smallest=0.0, paper=0),
    Strokes(1.0, Mix(dilated=1.0)),
    swapped(2, {}, 0.0),
    others(2),
    layers=0,
    background=0,
)


def _photographs(dataset: str, root: Path) -> FitConfig:
    base = recipe(dataset)
    data = replace(base.data, root=root, workers=0)
    return replace(base, data=data, steps=_PHOTOGRAPH_STEPS, positive=TRUSTED, negative=LEFT_OUT, threads=1)


def _part(
    title: str,
    base: FitConfig,
    out: Path,
    *,
    split: str = "test",
    tuned_as: str | None = None,
    only: Sequence[str] = _ON_PHOTOGRAPHS,
) -> Part:
    rows = rows_of(base, int(title.split()[-2]), replace(TRUSTED, cm="global"), out, base.steps)
    wanted = [row for row in only if "chase" in title or row not in BY_IMAGE]
    return Part(title, {row: rows[row] for row in wanted}, split, tuned_as)


def _title(noise: str, count: int) -> str:
    return f"{noise}, {count} masks"


def rows_of(
    base: FitConfig, count: int, matrix: DrawingsConfig, out: Path, corrector_steps: int
) -> dict[str, Row | Mapping[str, Row]]:
    """
    drawings       cross-entropy on the drawings, no masks
    masks          cross-entropy on the masks alone; tuned: learning rate
    ce_mixed       cross-entropy on drawings and masks; tuned: weight of the masks
    finetune       drawings, then masks; tuned: learning rate of the second phase
    corrector      a network that mends drawings, trained on the pairs, teaches; tuned: its learning rate
    mixed          drawings through a global matrix, and masks; tuned: weight of the masks
    mixed_trace    as mixed, with a weight of the trace, which steadies one matrix for all (trace-weight, on validation masks)
    pen            outlines moved back by what the pairs say, then as ce_mixed
    pen_alone      the same drawings without the masks, which measure the pen and nothing else; tuned: learning rate
    pen_nothing    as pen; what outlines were moved over says nothing, instead of what lies there
    pen_doubt, pen_doubt_alone   as pen and pen_alone; what stays says nothing, near the outline, where the drawing does not
                   prove it
    pen_finetune   outlines moved back, then as finetune
    pen_image, pen_image_finetune   as pen and pen_finetune, each image by what its own thinnest strokes say
    pen_mixed      outlines moved back, then the matrix and the masks
    pen_mixed_trace   outlines moved back, then as mixed_trace
    all            outlines moved back, then the matrix and the masks, then masks alone; tuned: learning rate of the last phase
    names_first    the other order: what the row mixed believes of its training images, outlines moved back
    supervised     cross-entropy on all masks
    """
    few = replace(base, data=replace(base.data, dense_images=count))
    mixed = replace(few, data=replace(few.data, supervision="mixed", dense_share=_SHARE))
    then = replace(few, data=replace(few.data, supervision="then-masks"))
    both_then = replace(mixed, data=replace(mixed.data, supervision="mixed-then-masks"), mask_weight=_WEIGHTS[0])
    masks = by_masks(few)

    def drawn(config: FitConfig, **changes: object) -> FitConfig:
        return replace(config, positive=replace(config.positive, **changes))  # type: ignore[arg-type]

    def weighted(config: FitConfig) -> dict[str, Row]:
        return {f"mask weight {weight:g}": replace(config, mask_weight=weight) for weight in _WEIGHTS}

    def rates(config: FitConfig) -> dict[str, Row]:
        return {f"lr {rate:g}x": at_rate(config, rate) for rate in _RATES}

    def tuned(config: FitConfig) -> dict[str, Row]:
        return {
            f"then lr {rate:g}x": replace(config, optim=replace(config.optim, finetune_lr=rate * config.optim.lr))
            for rate in _FINETUNED
        }

    def corrector(lr: float, seed: int) -> FitConfig:
        folder = out / f"corrected-{digest(replace(mixed, seed=seed))}-{lr:g}-{corrector_steps}"
        return corrected(mixed, seed, folder, lr=lr * base.optim.lr, steps=corrector_steps)

    with_matrix = replace(mixed, positive=matrix)
    return {
        "drawings": base,
        "masks": rates(masks),
        "ce_mixed": weighted(mixed),
        "finetune": tuned(then),
        "corrector": {f"its lr {rate:g}x": partial(corrector, rate) for rate in _RATES},
        "mixed": weighted(with_matrix),
        "mixed_trace": weighted(drawn(with_matrix, trace_weight=_TRACE)),
        "pen": weighted(drawn(mixed, pen="auto")),
        "pen_alone": rates(drawn(few, pen="auto")),
        "pen_nothing": weighted(drawn(mixed, pen="auto", band=float(LARGEST))),
        "pen_doubt": weighted(drawn(mixed, pen="auto", doubt=_DOUBT)),
        "pen_doubt_alone": rates(drawn(few, pen="auto", doubt=_DOUBT)),
        "pen_finetune": tuned(drawn(then, pen="auto")),
        "pen_image": weighted(drawn(mixed, pen="image")),
        "pen_image_finetune": tuned(drawn(then, pen="image")),
        "pen_mixed": weighted(drawn(with_matrix, pen="auto")),
        "pen_mixed_trace": weighted(drawn(with_matrix, pen="auto", trace_weight=_TRACE)),
        "all": tuned(drawn(replace(both_then, positive=matrix), pen="auto")),
        "names_first": {
            f"mask weight {weight:g}": partial(
                _names_first, replace(with_matrix, mask_weight=weight), drawn(mixed, pen="auto"), out
            )
            for weight in _WEIGHTS
        },
        "supervised": by_masks(base),
    }


def _names_first(first: FitConfig, then: FitConfig, out: Path, seed: int) -> FitConfig:
    """``then`` on drawings with the names that the config ``first``, trained with this seed, believes given the drawings. Its
    outlines are measured on images whose masks ``first`` has learned from, where they are better than elsewhere."""
    run = replace(first, seed=seed, resume=True)
    folder = out / f"names-{digest(run)}"
    run = replace(run, out=folder / "run")

    def believe(train: Path) -> None:
        model = load_model(fit(run).checkpoint, network=run.model.network).model
        source = open_split(first.data, "train")
        for index in range(len(source)):
            record = source.load(index)
            assert record.positive is not None
            image = torch.from_numpy(record.image.copy()).movedim(2, 0)[None] / 255
            nothing = np.full((1, 1, *record.positive.shape), IGNORE, np.uint8)
            with torch.no_grad():
                p = posterior(model(image), torch.from_numpy(record.positive)[None], torch.from_numpy(nothing))
            write_map(train, source, record.name, p[0].argmax(0).byte().numpy())

    believed = made_once(folder / "believed", believe)
    return replace(then, mask_weight=first.mask_weight, data=replace(then.data, positives=believed))


def _count(result: Result) -> int:
    return int(result.title.split()[-2])


def draw(results: Sequence[Result], figure: Figure) -> None:
    """Score over the number of masks, a panel for each noise of digits."""
    results = [result for result in results if result.title.split(",")[0] in _NOISE]
    kinds = list(dict.fromkeys(result.title.split(",")[0] for result in results))
    if not kinds:
        figure.text(0.5, 0.5, "no table of digits", ha="center")
        return
    rows = dict.fromkeys(row for result in results for row in result.rows)
    colours = dict(zip(rows, colormaps["tab20"].colors, strict=False))  # type: ignore[attr-defined]
    figure.set_size_inches(4.6 * len(kinds), 4.6)
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=True):
        own = [result for result in results if result.title.split(",")[0] == kind]
        own.sort(key=_count)
        counts = [_count(result) for result in own]
        for row in own[-1].rows:
            style = "-" if row in OURS else ":" if row in ("drawings", "supervised") else "--"
            axis.plot(
                counts,
                [result.mean(row) for result in own],
                style,
                marker="o",
                markersize=3,
                label=row,
                color=colours[row],
            )
        axis.set_xscale("log")
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("dense masks")
        axis.set_title(_NOISE[kind], fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("mean IoU, %")
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=min(7, 3 * len(kinds)), frameon=False
    )
