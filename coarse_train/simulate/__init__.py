"""Coarse drawings from dense masks, by a noise process that is known.

`noise`: the settings of a process, five levels from a scribble to everything. `shapes`: one region as a hurried person draws
it. `drawing`: a whole mask. `coarse-train simulate` does it for a data set, into a folder.
"""

from __future__ import annotations

from .drawing import draw_coarse, generator_for
from .noise import LEVELS, Mix, Process, Strokes, level, others, pair_counts, shares, swapped

__all__ = [
    "LEVELS",
    "Mix",
    "Process",
    "Strokes",
    "draw_coarse",
    "generator_for",
    "level",
    "others",
    "pair_counts",
    "shares",
    "swapped",
]
