"""Coarse drawings from dense masks, by noise processes that are known.

`presets`: those of the MNIST demo, with distortions of a pixel or two, where class 0 is the background.
`process`, `drawing`, `shapes`: drawings as a hurried person makes them on any dense mask, from scribbles to everything.
`command`: the same for a whole data set, into a folder.
"""

from __future__ import annotations

from .drawing import draw_coarse, generator_for
from .presets import (
    BINARY,
    HASTY,
    IGNORE,
    MAJORITY,
    PRESETS,
    Preset,
    ShapeNoise,
    cyclic_swap,
    distort,
    draw,
    look_alikes,
    objects_of,
    observed_confusion,
)
from .process import LEVELS, Mix, Process, Strokes, level, true_confusion, true_transition

__all__ = [
    "BINARY",
    "HASTY",
    "IGNORE",
    "LEVELS",
    "MAJORITY",
    "PRESETS",
    "Mix",
    "Preset",
    "Process",
    "ShapeNoise",
    "Strokes",
    "cyclic_swap",
    "distort",
    "draw",
    "draw_coarse",
    "generator_for",
    "level",
    "look_alikes",
    "objects_of",
    "observed_confusion",
    "true_confusion",
    "true_transition",
]
