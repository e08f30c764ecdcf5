"""What a trained network says about images, as label files in the data set's own ids and as pictures to look at.

coarse-train predict runs/street/best.pt --images photos --out predictions
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from ..data import Classes, Record, Source
from ..data.images import MAX_PIXELS, pixel_limit, read_image
from ..data.walk import IMAGE_SUFFIXES, Fault, find_pictures, listed
from ..distributed import join_world
from ..inference import InferenceConfig, load_model, open_trained_split, predictions
from ..pictures import draw_maps
from ..run import claim_folder
from .options import check_reading

_LABELS, _OVERLAYS = "labels", "overlays"
_MADE = ".predict"  # an empty file in the folder that they are in


@dataclass(frozen=True)
class PredictConfig:
    """Write label maps and pictures of what a trained network finds in images."""

    checkpoint: tyro.conf.Positional[Path]
    """best.pt or last.pt of a run: the network, its classes and its data set."""
    network: str | None = None
    """package.module:name, where the run's network is none of ours: it is code, which is run only if it is named here again."""
    images: Path | None = None
    """An image, or a folder that is searched for images recursively; without it the data set's `split`."""
    split: str = "val"
    """train, val or test."""
    root: Path | None = None
    """Folder of the data set; without it that of the run."""
    out: Path = Path("predictions")
    """labels/NAME.png has the values of the data set's label files, overlays/NAME.png the image and beside it its classes in
    colour, with their names; an empty file .predict says that they are no photos. labels can be given to the official
    Cityscapes evaluator as CITYSCAPES_RESULTS."""
    overlays: bool = True
    """Write the pictures too."""
    opacity: float = 0.5
    """Of the classes' colours in them, over the image: from 0 to 1."""
    inference: Annotated[InferenceConfig, tyro.conf.arg(name="")] = field(default_factory=InferenceConfig)
    device: str | None = None
    """Without it cuda where there is one, else cpu."""
    workers: int = 0
    """Processes that read images; 0: the predicting process does."""
    max_pixels: int | None = None
    """Images and label maps of more pixels are an error; without it those of more than the run allowed."""
    overwrite: bool = False
    """Write into a folder that is not empty; other files in it stay."""


def run_predict(config: PredictConfig) -> Path:
    """The folder that was written. Under torchrun the images are spread over the processes."""
    check_reading(config.workers, config.max_pixels)
    if not 0 <= config.opacity <= 1:
        raise ValueError(f"opacity: expected a number from 0 to 1, got {config.opacity}")
    with join_world(config.device) as world:
        loaded = load_model(config.checkpoint, world.device, network=config.network)
        source: Source
        if config.images is None:
            source = open_trained_split(loaded, config.split, root=config.root, max_pixels=config.max_pixels)
        else:
            limit = config.max_pixels or loaded.config.data.max_pixels
            source = ImageFiles(find_images(config.images, but=config.out), loaded.classes, limit)
        claim_folder("out", config.out, world, overwrite=config.overwrite)
        (config.out / _MADE).touch()
        own = range(world.rank, len(source), world.size)
        found = predictions(
            loaded.model.segmentation,
            source,
            own,
            world,
            channels=loaded.channels,
            config=config.inference,
            workers=config.workers,
        )
        for record, predicted in tqdm(found, total=len(own), unit="image", disable=None if world.is_main else True):
            labels = predicted.cpu().numpy()
            write_labels(config.out / _LABELS, record.name, labels, source.classes)
            if config.overlays:
                maps = {"prediction": labels}
                picture = draw_maps(record.image, maps, source.classes, title=record.name, opacity=config.opacity)
                picture.save(_file(config.out / _OVERLAYS, record.name))
        world.wait()
        if world.is_main:
            print(f"{len(source)} images -> {config.out}")
    return config.out


class ImageFiles:
    """A `Source` of images without label maps. ``found``: name and path of each."""

    def __init__(self, found: list[tuple[str, Path]], classes: Classes, max_pixels: int = MAX_PIXELS):
        self.found, self.classes, self.max_pixels = found, classes, max_pixels

    def __len__(self) -> int:
        return len(self.found)

    def name(self, index: int) -> str:
        return self.found[index][0]

    def files(self, index: int) -> list[Path]:
        return [self.found[index][1]]

    def kinds(self, index: int) -> frozenset[str]:
        return frozenset()

    def load(self, index: int) -> Record:
        name, path = self.found[index]
        with pixel_limit(self.max_pixels):
            return Record(name, read_image(path))


def find_images(images: Path, *, but: Path | None = None) -> list[tuple[str, Path]]:
    """Relative path without suffix, and path, of one image or of all in a folder, in alphabetical order. What this command
    has written there is left out, and what would lie where it writes into the folder ``but``."""
    if images.is_file():
        return [(images.stem, images)]
    if not images.is_dir():
        raise FileNotFoundError(f"images: expected an image or a folder of images, got {images}, which does not exist")
    faults: list[Fault] = []
    made = [] if but is None else [(but / name).resolve() for name in (_LABELS, _OVERLAYS)]
    outside = [
        (name, path)
        for name, path in find_pictures(images, faults).items()
        if not any(folder in path.resolve().parents for folder in made) and not _predicted(path, images)
    ]
    for fault in faults:
        print(f"note: left out: {listed(fault.names)}; expected {fault.expected}", file=sys.stderr)
    if not outside:
        raise FileNotFoundError(f"images: expected images ({', '.join(IMAGE_SUFFIXES)}) in {images}, found none")
    return outside


def _predicted(path: Path, images: Path) -> bool:
    """Whether an earlier call has written this file, somewhere below ``images``."""
    folders = path.relative_to(images).parents
    return any(folder.name in (_LABELS, _OVERLAYS) and (images / folder.parent / _MADE).exists() for folder in folders)


def write_labels(folder: Path, name: str, predicted: np.ndarray, classes: Classes) -> None:
    """(H, W) uint8 classes -> folder/name.png with the values of the data set's label files."""
    Image.fromarray(classes.encode(predicted)).save(_file(folder, name))


def _file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"  # not with_suffix: a name may have dots
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
