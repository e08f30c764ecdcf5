"""What a trained network says about images, as label files in the data set's own ids and as pictures to look at.

coarse-train predict runs/street/best.pt --images photos --out predictions
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .checkpoint import LoadedModel, load_model
from .config import DataConfig
from .data import Classes, Record, Source, open_split
from .data.files import IMAGE_SUFFIXES, find_files
from .data.images import read_image
from .distributed import World, join_world
from .inference import InferenceConfig, predict, to_input


@dataclass(frozen=True)
class PredictConfig:
    """Write label maps and pictures of what a trained network finds in images."""

    checkpoint: tyro.conf.Positional[Path]
    """best.pt or last.pt of a run: the network, its classes and its data set."""
    images: Path | None = None
    """An image, or a folder that is searched for images recursively; without it the data set's `split`."""
    split: str = "val"
    """train, val or test."""
    root: Path | None = None
    """Folder of the data set; without it that of the run."""
    out: Path = Path("predictions")
    """labels/NAME.png has the values of the data set's label files, overlays/NAME.png the image with its classes in
    colour. labels can be given to the official Cityscapes evaluator as CITYSCAPES_RESULTS."""
    overlays: bool = True
    """Write the pictures too."""
    inference: Annotated[InferenceConfig, tyro.conf.arg(name="")] = field(default_factory=InferenceConfig)
    device: str | None = None
    """Without it cuda where there is one, else cpu."""
    workers: int = 0
    """Processes that read images; 0: the predicting process does."""
    overwrite: bool = False
    """Write into a folder that is not empty; other files in it stay."""


def run_predict(config: PredictConfig) -> Path:
    """The folder that was written. Under torchrun the images are spread over the processes."""
    with join_world(config.device) as world:
        loaded = load_model(config.checkpoint, world.device)
        source: Source
        if config.images is None:
            source = open_trained_split(loaded, config.split, root=config.root)
        else:
            source = ImageFiles(find_images(config.images, but=config.out), loaded.classes)
        prepare_folder("out", config.out, world, overwrite=config.overwrite)
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
            write_labels(config.out / "labels", record.name, labels, source.classes)
            if config.overlays:
                write_overlay(config.out / "overlays", record, labels, source.classes)
        world.wait()
        if world.is_main:
            print(f"{len(source)} images -> {config.out}")
    return config.out


def open_trained_split(
    loaded: LoadedModel,
    split: str,
    *,
    root: Path | None = None,
    dataset: str | None = None,
    variant: str | None = None,
    skip_bad: bool = False,
) -> Source:
    """Images and masks of the data set that a network was trained on, or of another one with the same classes.

    Root and variant are those of the training unless given; its drawings, limits and exceptions do not apply.
    """
    trained = loaded.config.data
    if dataset not in (None, trained.dataset):
        trained = DataConfig()
    data = DataConfig(
        dataset=dataset or trained.dataset,
        root=root or trained.root,
        variant=trained.variant if variant is None else variant,
        skip_bad=skip_bad,
    )
    source = open_split(data, split)
    if source.classes.names != loaded.classes.names:
        raise ValueError(
            f"{data.dataset}: expected the classes of the checkpoint {loaded.classes.names}, got {source.classes.names}"
        )
    return source


def predictions(
    segmentation: nn.Module,
    source: Source,
    indices: Sequence[int],
    world: World,
    *,
    channels: int | None,
    config: InferenceConfig,
    workers: int = 0,
) -> Iterator[tuple[Record, Tensor]]:
    """The records at ``indices``, in order, each with its predicted classes, (H, W) uint8 on the device of ``world``.

    One image at a time, in evaluation mode: sizes may differ. ``channels``: of the network; None: as the image has.
    """
    was_training = segmentation.training
    segmentation.eval()
    try:
        for record in DataLoader(_Records(source, indices), batch_size=None, collate_fn=_as_it_is, num_workers=workers):
            if isinstance(record, Exception):
                raise record
            image = to_input(record.image, channels or record.image.shape[2], record.name).to(world.device)
            yield record, predict(segmentation, image, config, len(source.classes))[0]
    finally:
        segmentation.train(was_training)


class _Records(Dataset["Record | Exception"]):
    """An exception is handed over like a record: a worker's own way wraps it in a traceback of many lines."""

    def __init__(self, source: Source, indices: Sequence[int]):
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Record | Exception:
        try:
            return self.source.load(self.indices[place])
        except (ValueError, OSError) as error:
            return error


def _as_it_is(record: Any) -> Any:
    return record


class ImageFiles:
    """A `Source` of images without label maps. ``files``: name and path of each."""

    def __init__(self, files: list[tuple[str, Path]], classes: Classes):
        self.files, self.classes = files, classes

    def __len__(self) -> int:
        return len(self.files)

    def name(self, index: int) -> str:
        return self.files[index][0]

    def kinds(self, index: int) -> frozenset[str]:
        return frozenset()

    def load(self, index: int) -> Record:
        name, path = self.files[index]
        return Record(name, read_image(path))


def find_images(images: Path, *, but: Path | None = None) -> list[tuple[str, Path]]:
    """Relative path without suffix, and path, of one image or of all in a folder, in alphabetical order. What is below
    ``but`` is left out: the predictions of the last call, perhaps."""
    if images.is_file():
        return [(images.stem, images)]
    if not images.is_dir():
        raise FileNotFoundError(f"images: expected an image or a folder of images, got {images}, which does not exist")
    outside = [
        (name, path)
        for name, path in find_files(images, *IMAGE_SUFFIXES).items()
        if but is None or but.resolve() not in path.resolve().parents
    ]
    if not outside:
        raise FileNotFoundError(f"images: expected images ({', '.join(IMAGE_SUFFIXES)}) in {images}, found none")
    return outside


def prepare_folder(option: str, folder: Path, world: World, *, overwrite: bool) -> None:
    """Fail before the work rather than after it. Every process looks before any writes."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{option}: expected a folder, got the file {folder}")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{option}: expected an empty or new folder, or --overwrite, got {folder} with files in it")
    world.wait()
    folder.mkdir(parents=True, exist_ok=True)


def write_labels(folder: Path, name: str, predicted: np.ndarray, classes: Classes) -> None:
    """(H, W) uint8 classes -> folder/name.png with the values of the data set's label files."""
    Image.fromarray(classes.encode(predicted)).save(_file(folder, name))


def write_overlay(folder: Path, record: Record, predicted: np.ndarray, classes: Classes) -> None:
    """folder/name.png: half the image, half the colours of its classes."""
    image = np.broadcast_to(record.image, (*predicted.shape, 3))
    blended = Image.blend(Image.fromarray(np.ascontiguousarray(image)), Image.fromarray(classes.paint(predicted)), 0.5)
    blended.save(_file(folder, record.name))


def _file(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"  # not with_suffix: a name may have dots
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
