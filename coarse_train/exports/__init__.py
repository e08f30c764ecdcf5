"""Exports of annotation tools -> the `folder` layout.

    files of a tool --(its module: read(Source) -> Export)--> Pictures with Shapes --(`write_split`)--> label maps

A tool is one module here with ``read``. It knows its files; labels, negatives, sizes, orientation, drawing and writing are the
same for all. The exports come from strangers: no name in one may lead to a file outside of it, and no number in it decides how
much memory is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .source import Export, Source


def read_export(tool: str, source: Source) -> Export:
    """What ``source`` holds. Raises ValueError or OSError naming what is wrong with it."""
    export: Export = import_module(f".{tool}", __name__).read(source)
    return export
