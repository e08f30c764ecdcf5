"""A table: rows that are configs, each trained with some seeds by `fit`, scored, and kept.

    from coarse_train.config import DrawingsConfig, recipe, replace
    from coarse_train.experiments.table import run_table, text, write_results

    trusted = replace(recipe("mnist"), positive=DrawingsConfig())
    rows = {"trusted": trusted, "matrix": recipe("mnist")}
    if __name__ == "__main__":  # the processes that train import this file, too
        cells = run_table(rows, seeds=(0, 1, 2), out=Path("runs/table"))
        print(text(cells, "test"))
        write_results(Path("runs/table/results.json"), cells, rows)

Each config with its seed has a folder of its own, OUT/cells/HASH, named after its settings and its data. So a table that was
interrupted goes on, and tables in one folder share the rows that they have in common.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from functools import cache
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from zlib import crc32

import torch

from ..config import DataConfig, FitConfig, changed, from_dict, to_dict
from ..data import open_split
from ..data.segmentation import SegmentationData, plain
from ..engine import fit
from ..rules import check_config
from ..run import make_folder, write_text
from .cell import Cell, Scores, read_cell, scored

_FORMAT = 2  # of a cell; another one is another folder
# in no hash: where a run lies, what it may be interrupted by, what it draws
_UNNAMED = ("out", "resume", "save_every", "pictures", "opacity")
_GRACE = 30.0  # seconds that a run has for the checkpoint, when it is stopped
_HASHED_IMAGES = 16  # of the training split, whose content, drawings included, is part of the hash


# A row: a config that gets each seed, or what makes one for a seed, where its data are made for that seed too.
Row = FitConfig | Callable[[int], FitConfig]


def config_of(row: Row, seed: int) -> FitConfig:
    """The config of a row for a seed."""
    return replace(row if isinstance(row, FitConfig) else row(seed), seed=seed)


def run_table(
    rows: Mapping[str, Row],
    seeds: Sequence[int],
    out: Path,
    *,
    split: str = "test",
    jobs: int | None = None,
    known: Scores | None = None,
    said: Callable[[str], None] = print,
) -> list[Cell]:
    """Train what is not there yet, ``jobs`` runs at a time, and return all cells in the order of rows and seeds.

    rows: name -> config, which gets each seed, or what makes one for a seed.
    seeds: different numbers from 0 on.
    out: folder of the table; runs lie in OUT/cells.
    jobs: processes; without it one for each core (one in all on a GPU), and PyTorch in each has one thread: small networks
        gain little from more.
    known: scores of runs that were trained elsewhere (`read_scores`), which are not trained again.
    split: what is scored, "val" where a data set has no "test".
    said: gets a line for each run.

    Raises:
        ValueError, FileNotFoundError: what is wrong with an argument, a config or its data, before anything is written; also
            for a kept cell that is damaged.
        ChildProcessError: a process ended by itself.
        Exception: what `fit` raises, when the runs beside it have ended: they are kept.
    """
    if not rows:
        raise ValueError(f"rows: expected at least one, got {rows}")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds: expected some different numbers, got {seeds}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs: expected a number >= 1, got {jobs}")
    seeded = {(row, seed): config_of(config, seed) for row, config in rows.items() for seed in seeds}
    for config in seeded.values():
        check_config(config)
    for data in {config.data for config in seeded.values()}:
        scored = open_split(data, split)
        bare = [scored.name(index) for index in range(len(scored)) if "mask" not in scored.kinds(index)]
        if bare:
            raise ValueError(f"split: expected dense masks in {split!r} to score with, got none for {bare[0]}")
    configs = {key: _in_cell(config, out) for key, config in seeded.items()}
    make_folder("out", out)
    runs = {config.out: config for config in configs.values()}  # rows that are equal are one run
    cells: dict[Path, Cell] = {}
    for folder in runs:
        elsewhere = (known or {}).get(folder.name, {}).get(split)
        if elsewhere is not None and not _kept(folder, split).exists():
            cells[folder] = elsewhere
    left = [config for folder, config in runs.items() if folder not in cells]
    before = {config.out for config in left if _kept(config.out, split).exists()}
    with closing(
        _all_cells(left, split, jobs or _cores())
    ) as as_they_end:  # after an error those beside it end, and are kept
        try:
            for folder, cell in as_they_end:
                names = ", ".join(row for (row, _), config in configs.items() if config.out == folder)
                if isinstance(cell, Exception):
                    said(f"{names}, seed {runs[folder].seed}: failed")
                    raise cell
                cells[folder] = cell
                when = "kept from before" if folder in before else f"after {cell.seconds:.0f} s"
                said(f"{names}, seed {cell.seed}: mean IoU {cell.miou:.1f} {when}")
        except KeyboardInterrupt as stop:
            as_they_end.throw(stop)  # where it came between two cells, the processes have to hear of it, too
    return [replace(cells[config.out], method=row, folder=str(config.out)) for (row, _), config in configs.items()]


def _cores() -> int:
    if torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _all_cells(
    runs: Sequence[FitConfig], split: str, jobs: int
) -> Generator[tuple[Path, Cell | Exception], None, None]:
    """As they end; an exception is the last."""
    if min(jobs, len(runs)) <= 1:
        for config in runs:
            try:
                cell = _run(to_dict(config), split)
            except Exception as error:
                yield config.out, error
                return
            yield config.out, cell
        return
    others = set(multiprocessing.active_children())
    # spawned, not forked: a fork of a process that has threads may hang
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(runs)), mp_context=spawn, initializer=_end_with_parent) as pool:
        try:
            yield from _as_they_end(pool, runs, split, jobs)
        except BrokenProcessPool as error:
            _end(set(multiprocessing.active_children()) - others)
            raise ChildProcessError(
                f"{runs[0].out.parent}: a process of the table ended by itself; was it killed for want of memory, or has the "
                'script no `if __name__ == "__main__":` around `run_table`? The table goes on from what is there'
            ) from error
        except KeyboardInterrupt:
            _end(set(multiprocessing.active_children()) - others)  # the signal may have come to us alone
            raise


def _as_they_end(
    pool: ProcessPoolExecutor, runs: Sequence[FitConfig], split: str, jobs: int
) -> Iterator[tuple[Path, Cell | Exception]]:
    left = iter(runs)
    running: dict[Future[Cell], Path] = {}
    # No more at a time than there are processes: what waits in a queue would be trained after an error or Ctrl-C.
    for config in itertools.islice(left, jobs):
        running[pool.submit(_run_alone, to_dict(config), split)] = config.out
    while running:
        for done in wait(running, return_when=FIRST_COMPLETED).done:
            folder = running.pop(done)
            failure = done.exception()
            if isinstance(failure, Exception) and not isinstance(failure, BrokenProcessPool):
                yield folder, failure
                return
            cell = done.result()
            for config in itertools.islice(left, 1):
                running[pool.submit(_run_alone, to_dict(config), split)] = config.out
            yield folder, cell


def _end(processes: Collection[BaseProcess]) -> None:
    """Where there are signals (not on Windows) a run that is told to stop writes a checkpoint first. A process that was told
    while nothing would look for it, after the last step of its run, waits for another run: it is killed."""
    for process in processes:
        process.terminate()
    late = time.monotonic() + _GRACE
    try:
        for process in processes:
            process.join(max(0.0, late - time.monotonic()))
    finally:  # Ctrl-C again ends the wait
        for process in processes:
            process.kill()


def _run_alone(content: dict[str, object], split: str) -> Cell:
    """In a process of the pool, which ends with a run that was stopped: it would wait for another one."""
    try:
        return _run(content, split)
    except KeyboardInterrupt:
        os._exit(1)


def _end_with_parent() -> None:
    """A pool's process waits for ever where the one that feeds it was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def digest(config: FitConfig) -> str:
    """Of the settings that are no defaults and of what they read: the first images of the training split with their drawings,
    a transition, a pen."""
    content = {key: value for key, value in changed(to_dict(config)).items() if key not in _UNNAMED}
    files = [crc32(path.read_bytes()) for path in (config.transition, config.positive.pen) if isinstance(path, Path)]
    if config.select_with and config.select_steps != 0:
        # what comes of the same settings has changed, three times
        content["trials"] = "three go on to the end, or one and those with a pen; fine-tuning in five folds"
    known = [_FORMAT, content, _content(config.data, config.seed), files]
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:12]


@cache
def _content(data: DataConfig, seed: int) -> int:
    dataset = SegmentationData(open_split(data, "train"), plain(data), seed=seed, training=False)
    checksum = len(dataset)
    for index in range(min(len(dataset), _HASHED_IMAGES)):
        for field in dataset[index]:
            checksum = crc32(field.numpy().tobytes(), checksum)
    return checksum


def _in_cell(config: FitConfig, out: Path) -> FitConfig:
    config = replace(config, threads=config.threads or 1, resume=True, pictures=0)
    return replace(config, out=out / "cells" / digest(config))


def _run(content: dict[str, object], split: str) -> Cell:
    """In a process of its own, so that what `fit` says goes to a file."""
    config = from_dict(content)
    kept = _kept(config.out, split)
    if not kept.exists():
        config.out.mkdir(parents=True, exist_ok=True)
        with (
            open(config.out / "log.txt", "a", encoding="utf-8", errors="backslashreplace") as log,
            redirect_stderr(log),
            _threads(config.threads),
        ):
            checkpoint = fit(config).checkpoint
            cell = scored(checkpoint, config, split)
        write_text(kept, json.dumps(asdict(cell), indent=2) + "\n")
    try:
        return read_cell(kept)
    except ValueError as error:
        raise ValueError(f"{error}; without the file it is scored again") from error


def _kept(folder: Path, split: str) -> Path:
    return folder / f"{split}.json"


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """Of the scores as of the steps: sums depend on it in their last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- what it says -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Summary:
    """Over the seeds of a row: mean IoU in percent, and the largest difference of two, in points."""

    mean: float
    spread: float

    @staticmethod
    def of(cells: Sequence[Cell], row: str) -> Summary:
        """Of those of ``cells`` that are of this row."""
        scores = [cell.miou for cell in cells if cell.method == row]
        return Summary(statistics.fmean(scores), max(scores) - min(scores))


def text(cells: Sequence[Cell], split: str) -> str:
    """Aligned: a line for each row, with every seed where there are several, and what the columns are. ``cells``: of
    `run_table`, every row with every seed; ``split``: on which they were scored."""
    rows = list(dict.fromkeys(cell.method for cell in cells))
    seeds = sorted({cell.seed for cell in cells})
    wide = max(map(len, rows))
    several = len(seeds) > 1
    head = f"{'row':<{wide}}" + "".join(f"{'seed ' + str(seed):>9}" for seed in seeds)
    lines = [head + (f"{'mean':>7}{'spread':>8}" if several else "") + f"{'best':>7}{'CM error':>10}{'seconds':>9}"]
    for row in rows:
        own = {cell.seed: cell for cell in cells if cell.method == row}
        line = f"{row:<{wide}}" + "".join(f"{own[seed].miou:>9.1f}" for seed in seeds)
        if several:
            summary = Summary.of(cells, row)
            line += f"{summary.mean:>7.1f}{summary.spread:>8.1f}"
        errors = [cell.cm_error for cell in own.values() if cell.cm_error is not None]
        error = f"{statistics.fmean(errors):.3f}" if errors else "-"
        bests = [cell.miou_best for cell in own.values() if cell.miou_best is not None]
        best = f"{statistics.fmean(bests):.1f}" if bests else "-"
        lines.append(f"{line}{best:>7}{error:>10}{statistics.fmean(c.seconds for c in own.values()):>9.0f}")
    lines.append(
        f"Mean IoU in percent at the last step, {split} masks, all classes; "
        + ("spread: largest difference between seeds; " if several else "one seed: a few points may be noise; ")
        + "best: of the evaluations on validation masks; CM error: mean absolute difference of the entries of p(drawn | true), "
        "believed and counted."
    )
    return "\n".join(lines)


def by_class(cells: Sequence[Cell]) -> str:
    """Aligned: IoU of every class by its name, a line for each row, mean over the seeds; "-" where a class occurs nowhere."""
    rows = list(dict.fromkeys(cell.method for cell in cells))
    names = list(dict.fromkeys(name for cell in cells for name in cell.iou))
    wide = max(map(len, ("IoU by class", *rows)))
    lines = [f"{'IoU by class':<{wide}}" + "".join(f"  {name:>6}" for name in names)]
    for row in rows:
        line = f"{row:<{wide}}"
        for name in names:
            known = [iou for cell in cells if cell.method == row and (iou := cell.iou.get(name)) is not None]
            line += f"  {statistics.fmean(known) if known else '-':>{max(6, len(name))}{'.1f' if known else ''}}"
        lines.append(line)
    return "\n".join(lines)


def read_results(path: Path) -> dict[str, Any] | None:
    """What `write_results` has written; nothing ({}) of a file that is something else, None where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def write_results(path: Path, cells: Sequence[Cell], rows: Mapping[str, Row], **more: object) -> None:
    """JSON, all or nothing: every cell, a line each, with the config that `from_dict` reads back, of which it has what is no
    default. Folders are relative to ``path``'s. ``rows``: those of `run_table`; ``more``: further entries of the file.

    Raises coarse_train.run.CheckpointError where it cannot be written.
    """
    written = []
    for cell in cells:
        folder = os.path.relpath(cell.folder, path.parent)
        config = replace(config_of(rows[cell.method], cell.seed), out=Path(folder))
        written.append({**asdict(cell), "folder": folder, "config": changed(to_dict(config))})
    lines = {"rows": "[\n" + ",\n".join(map(json.dumps, written)) + "\n]"} | {k: json.dumps(v) for k, v in more.items()}
    write_text(path, "{\n" + ",\n".join(f"{json.dumps(k)}: {v}" for k, v in lines.items()) + "\n}\n")
