"""Outlines: how far a pen's are off, measured where there are a dense mask and a drawing, and undone in the drawings.

`moving`: a pen, and drawings whose outlines are moved back by it. `measure`: by how much, and the model behind that.
"""

from __future__ import annotations

from .measure import Leftover, PenOfClass, PenReport, describe_pen, leftovers, measure, to_json
from .moving import LARGEST, Pen, half_width, read_pen, undo

__all__ = [
    "LARGEST",
    "Leftover",
    "Pen",
    "PenOfClass",
    "PenReport",
    "describe_pen",
    "half_width",
    "leftovers",
    "measure",
    "read_pen",
    "to_json",
    "undo",
]
