"""`evaluate`: known scores of a known network, what is printed and written, over processes, and what cannot be scored."""

from __future__ import annotations

import json
import os
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
import tyro
from PIL import Image
from torch import Tensor, nn

from coarse_kernels import available_backends, use_backend
from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.config import DataConfig
from coarse_train.data import IGNORE, Classes, Record
from coarse_train.data.folder import open_split
from coarse_train.distributed import World
from coarse_train.inference import InferenceConfig, load_model, predictions, score, to_input
from coarse_train.run import CheckpointError
from tests.floats_formed import FloatsFormed, assert_most_probable
from tests.nearest_colour import (
    CLASSES,
    NETWORK,
    nearest_colour,
    random_maps,
    write_checkpoint,
    write_folder,
    write_street_checkpoint,
)

SIZES = ((5, 7), (8, 3), (16, 16), (1, 9), (6, 6))


def _perfect(tmp_path: Path) -> EvaluateConfig:
    """Five images of five sizes, in which all is as it looks."""
    maps = random_maps(*SIZES)
    root = write_folder(tmp_path / "data", "val", {f"town/{i}": (m, m) for i, m in enumerate(maps)})
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=root))
    return EvaluateConfig(checkpoint, network=NETWORK, device="cpu")


def _flawed(tmp_path: Path) -> tuple[EvaluateConfig, np.ndarray]:
    """The same sizes, but the masks are others than what is seen; the counts [true, predicted]."""
    seen, true = random_maps(*SIZES), random_maps(*SIZES, seed=1)
    for mask in true:
        mask[0, 0] = IGNORE
        mask[mask == 3] = 2  # sky is predicted, but in no mask
    root = write_folder(
        tmp_path / "data", "val", {f"town/{i}": pair for i, pair in enumerate(zip(seen, true, strict=True))}
    )
    counts = np.zeros((4, 4), int)
    for predicted, mask in zip(seen, true, strict=True):
        np.add.at(counts, (mask[mask != IGNORE], predicted[mask != IGNORE]), 1)
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=root))
    return EvaluateConfig(checkpoint, network=NETWORK, device="cpu"), counts


def test_a_network_that_is_always_right_scores_100(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run_evaluate(_perfect(tmp_path))
    assert {result[key] for key in ("mean_iou", "mean_dice", "pixel_accuracy", "mean_accuracy")} == {100.0}
    assert result["classes"] == {name: {"iou": 100.0, "dice": 100.0, "accuracy": 100.0} for name in CLASSES.names}
    assert (result["images"], result["pixels"]) == (5, sum(h * w for h, w in SIZES))
    assert capsys.readouterr().out == (
        f"{tmp_path}/best.pt, step 7, on folder val in {tmp_path}/data\n"
        f"5 images, {result['pixels']} labelled pixels, whole images\n"
        "\n"
        "                   IoU    Dice\n"
        "ground          100.00  100.00\n"
        "wall            100.00  100.00\n"
        "tree            100.00  100.00\n"
        "sky             100.00  100.00\n"
        "mean            100.00  100.00\n"
        "pixel accuracy  100.00\n"
    )


def test_a_network_that_errs_gets_the_scores_of_its_counts(tmp_path: Path) -> None:
    config, counts = _flawed(tmp_path)
    result = run_evaluate(config)
    assert result["confusion"] == counts.tolist()
    assert result["pixels"] == sum(h * w for h, w in SIZES) - len(SIZES)
    hit, true, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    iou = 100 * hit / (true + predicted - hit)
    assert [scores["iou"] for scores in result["classes"].values()] == pytest.approx(iou, rel=1e-14)
    assert result["mean_iou"] == pytest.approx(iou.mean(), rel=1e-14)
    assert result["mean_dice"] == pytest.approx((200 * hit / (true + predicted)).mean(), rel=1e-14)
    assert result["pixel_accuracy"] == pytest.approx(100 * hit.sum() / true.sum(), rel=1e-14)
    assert result["mean_accuracy"] == pytest.approx((100 * hit[:3] / true[:3]).mean(), rel=1e-14)
    assert result["classes"]["sky"] == {"iou": 0.0, "dice": 0.0, "accuracy": None}


def test_a_class_that_does_not_occur_prints_a_dash_and_is_null(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (classes,) = random_maps((8, 8), classes=3)
    root = write_folder(tmp_path / "data", "val", {"a": (classes, classes)})
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=root))
    config = EvaluateConfig(checkpoint, network=NETWORK, out=tmp_path / "new" / "s.json")
    result = run_evaluate(config)
    assert "sky                  -       -\n" in capsys.readouterr().out
    assert result["mean_iou"] == 100.0
    written = (tmp_path / "new" / "s.json").read_text()
    assert "NaN" not in written
    assert json.loads(written) == result
    assert result["classes"]["sky"] == {"iou": None, "dice": None, "accuracy": None}


@pytest.mark.parametrize(
    "inference",
    [InferenceConfig(window=(4, 6)), InferenceConfig(flips=True), InferenceConfig((3, 3), 0.0, True)],
    ids=str,
)
def test_windows_and_mirrored_copies_change_nothing_for_a_network_without_context(
    tmp_path: Path, inference: InferenceConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config, counts = _flawed(tmp_path)
    assert run_evaluate(replace(config, inference=inference))["confusion"] == counts.tolist()
    assert str(inference) in capsys.readouterr().out


@pytest.mark.skipif("cpu" not in available_backends(), reason="the compiled extension is missing")
def test_logits_at_a_quarter_of_the_resolution_are_scored_without_being_enlarged(tmp_path: Path) -> None:
    (seen,) = random_maps((64, 96))
    root = write_folder(tmp_path / "data", "val", {"a": (seen, seen)})
    config = EvaluateConfig(write_street_checkpoint(tmp_path / "best.pt", DataConfig(root=root)), device="cpu")
    with use_backend("cpu"), FloatsFormed() as formed:
        result = run_evaluate(replace(config, export=tmp_path / "labels"))
    assert formed.calls["coarse_kernels.label_map"] == 1
    assert formed.largest < len(CLASSES) * 64 * 96
    predicted = CLASSES.decode(np.array(Image.open(tmp_path / "labels/a.png")), "a.png")
    assert result["confusion"] == np.bincount(4 * seen.ravel() + predicted.ravel(), minlength=16).reshape(4, 4).tolist()
    network = load_model(config.checkpoint, torch.device("cpu")).model.segmentation.eval()
    with torch.no_grad():
        logits = network(to_input(CLASSES.paint(seen), 3, "a"))
    assert_most_probable(torch.from_numpy(predicted)[None], logits)


def test_export_has_the_values_of_the_data_sets_label_files(tmp_path: Path) -> None:
    config = replace(_perfect(tmp_path), export=tmp_path / "labels")
    run_evaluate(config)
    written = sorted(path.relative_to(tmp_path / "labels").as_posix() for path in (tmp_path / "labels").rglob("*.png"))
    assert written == [f"town/{i}.png" for i in range(5)]
    for name in written:
        exported, mask = (np.array(Image.open(f / name)) for f in (tmp_path / "labels", tmp_path / "data/val/masks"))
        assert exported.dtype == np.uint8
        np.testing.assert_array_equal(exported, mask)
    with pytest.raises(ValueError, match=r"export: expected an empty or new folder, or --overwrite, got .*labels"):
        run_evaluate(config)
    assert run_evaluate(replace(config, overwrite=True))["mean_iou"] == 100.0


def test_limit_takes_the_first_images(tmp_path: Path) -> None:
    result = run_evaluate(replace(_perfect(tmp_path), limit=2))
    assert (result["images"], result["pixels"]) == (2, 5 * 7 + 8 * 3)
    with pytest.raises(ValueError, match="limit: expected a number >= 1, got 0"):
        run_evaluate(replace(_perfect(tmp_path), limit=0))


def test_the_drawings_and_limits_of_the_training_do_not_matter(tmp_path: Path) -> None:
    """Folders of drawings may be gone, or on another machine, when a network is scored."""
    config = _perfect(tmp_path)
    data = DataConfig(
        root=tmp_path / "data",
        positives=tmp_path / "gone",
        negatives=tmp_path / "gone",
        simulate="coarse",
        limit=1,
        crop=(64, 64),
        flip=True,
    )
    write_checkpoint(config.checkpoint, data)
    assert run_evaluate(config)["images"] == 5


def test_another_root_replaces_that_of_the_training(tmp_path: Path) -> None:
    config = _perfect(tmp_path)
    (tmp_path / "data").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="data: expected"):
        run_evaluate(config)
    result = run_evaluate(replace(config, root=tmp_path / "moved"))
    assert result["mean_iou"] == 100.0
    assert result["root"] == str(tmp_path / "moved")


def test_a_data_set_with_other_classes_is_refused(tmp_path: Path) -> None:
    config = _perfect(tmp_path)
    others = Classes(("ground", "wall", "tree", "sea"), CLASSES.colours)
    write_checkpoint(config.checkpoint, DataConfig(root=tmp_path / "data"), others)
    with pytest.raises(
        ValueError, match=r"folder: expected the classes of the checkpoint \(.*'sea'\), got \(.*'sky'\)"
    ):
        run_evaluate(config)


def test_images_without_a_mask_are_counted_and_the_others_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, _ = _flawed(tmp_path)
    before = run_evaluate(replace(config, limit=2))  # the same images, had the others no part in it
    capsys.readouterr()
    for bare in "234":
        (tmp_path / f"data/val/masks/town/{bare}.png").unlink()
    result = run_evaluate(config)
    assert (result["images"], result["images_without_mask"]) == (2, 3)
    assert result["confusion"] == before["confusion"]
    printed = capsys.readouterr().out.splitlines()
    assert printed[1:3] == ["2 images, 57 labelled pixels, whole images", "3 more have no mask and are not scored"]
    assert run_evaluate(replace(config, limit=1))["images"] == 1  # the first of those that have one


def test_a_split_without_masks_is_refused_before_the_first_image_is_read(tmp_path: Path) -> None:
    config = _perfect(tmp_path)
    shutil.rmtree(tmp_path / "data/val/masks")
    (tmp_path / "data/val/images/town/0.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="evaluate needs dense masks; not one of 5 images of val has one"):
        run_evaluate(config)


def test_what_is_confused_most_is_said_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = np.array([[0, 0, 0, 0, 1, 1, 1, 2]] * 4, np.uint8)
    mask = np.array([[0, 0, 0, 1, 1, 1, 1, 3]] * 4, np.uint8)
    root = write_folder(tmp_path / "data", "val", {"a": (seen, mask)})
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=root))
    result = run_evaluate(EvaluateConfig(checkpoint, network=NETWORK, device="cpu"))
    assert result["most_confused"] == [["wall", "ground", 25.0], ["sky", "tree", 100.0]]
    assert result["collapse"] is None
    assert capsys.readouterr().out.endswith(
        "most confused, the most pixels first, in percent of the class's pixels\n"
        "wall             25.00  predicted as ground\n"
        "sky             100.00  predicted as tree\n"
    )


def test_a_network_that_sees_one_class_everywhere_is_told_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (mask,) = random_maps((20, 20))
    root = write_folder(tmp_path / "data", "val", {"a": (np.full_like(mask, 2), mask)})
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=root))
    run_evaluate(EvaluateConfig(checkpoint, network=NETWORK, device="cpu"))
    share = 100 * (mask == 2).mean()
    assert (
        f"note: the network has collapsed to one class: 'tree' at 100.0 % of the pixels, of which it is {share:.1f} %; of all "
        "other classes 0.0 % is found." in capsys.readouterr().out
    )


def test_masks_without_one_labelled_pixel_are_refused(tmp_path: Path) -> None:
    (seen,) = random_maps((4, 4))
    root = write_folder(tmp_path / "data", "val", {"a": (seen, np.full_like(seen, IGNORE))})
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=root))
    with pytest.raises(ValueError, match="evaluate needs dense masks; not one pixel of 1 images of val has a class"):
        run_evaluate(EvaluateConfig(checkpoint, network=NETWORK))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_one_line_that_names_it(tmp_path: Path, workers: int) -> None:
    config = replace(_perfect(tmp_path), workers=workers)
    (tmp_path / "data/val/images/town/2.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"town/2.png: expected a complete image file") as caught:
        run_evaluate(config)
    assert "\n" not in str(caught.value)
    assert run_evaluate(replace(config, skip_bad=True))["images"] == 4


def test_a_missing_or_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.pt: expected a checkpoint"):
        run_evaluate(EvaluateConfig(tmp_path / "none.pt"))
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 and nothing more")
    with pytest.raises(CheckpointError, match=r"bad.pt: expected a checkpoint"):
        run_evaluate(EvaluateConfig(tmp_path / "bad.pt", export=tmp_path / "labels"))
    assert not (tmp_path / "labels").exists()


def test_out_that_is_a_folder_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="out: expected a file to write, got the folder"):
        run_evaluate(replace(_perfect(tmp_path), out=tmp_path))


class _Sizes:
    """Grey images of the sizes (height, width); one of None cannot be read."""

    def __init__(self, *sizes: tuple[int, int] | None):
        self.sizes, self.classes = sizes, Classes(("a", "b"), ((0, 0, 0), (1, 1, 1)))

    def __len__(self) -> int:
        return len(self.sizes)

    def name(self, index: int) -> str:
        return str(index)

    def kinds(self, index: int) -> frozenset[str]:
        return frozenset({"mask"})

    def load(self, index: int) -> Record:
        size = self.sizes[index]
        if size is None:
            raise ValueError("a damaged one")
        return Record(str(index), np.full((*size, 1), index, np.uint8), mask=np.zeros(size, np.uint8))


class _Seen(nn.Module):
    """Keeps the shapes of its batches; class "b" where the image's number is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        self.batches.append(tuple(image.shape))
        odd = (image * 255).round() % 2
        return torch.cat([1 - odd, odd], 1)


def test_small_images_of_one_size_go_through_the_network_together_and_large_ones_alone() -> None:
    source, seen = _Sizes(*[(8, 8)] * 3, (8, 9), (8, 8), *[(400, 400)] * 2), _Seen()
    config, world = InferenceConfig(), World(0, 1, torch.device("cpu"))
    found = list(predictions(seen, source, range(7), world, channels=1, config=config))
    assert [record.name for record, _ in found] == list("0123456")
    assert all(predicted.unique().tolist() == [n % 2] for n, (_, predicted) in enumerate(found))
    assert [tuple(predicted.shape) for _, predicted in found] == list(source.sizes)
    assert [shape[0] for shape in seen.batches] == [3, 1, 1, 1, 1]


def test_images_ahead_of_one_that_cannot_be_read_are_predicted() -> None:
    source, world = _Sizes((8, 8), (8, 8), None, (8, 8)), World(0, 1, torch.device("cpu"))
    found = predictions(_Seen(), source, range(4), world, channels=1, config=InferenceConfig())
    assert [next(found)[0].name, next(found)[0].name] == ["0", "1"]
    with pytest.raises(ValueError, match="a damaged one"):
        next(found)


@pytest.mark.parametrize("training", [True, False])
def test_scoring_leaves_the_network_in_its_mode(tmp_path: Path, training: bool) -> None:
    _perfect(tmp_path)
    modes = []
    network = nearest_colour(3, 4).train(training)
    network.register_forward_hook(lambda module, *_: modes.append(module.training))
    source = open_split(DataConfig(root=tmp_path / "data"), "val")
    score(network, source, world=World(0, 1, torch.device("cpu")))
    assert modes == [False] * 5
    assert network.training is training


def _evaluate(rank: int, port: int, config: EvaluateConfig) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    result = run_evaluate(config)
    (config.checkpoint.parent / f"result{rank}.json").write_text(json.dumps(result))


@pytest.mark.slow
def test_two_processes_count_each_of_five_images_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, counts = _flawed(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(
        _evaluate, args=(port, replace(config, export=tmp_path / "labels", out=tmp_path / "scores.json")), nprocs=2
    )
    printed = capfd.readouterr().out
    assert printed.count("pixel accuracy") == 1
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["confusion"] == counts.tolist()
    assert scores["images"] == 5
    assert [json.loads((tmp_path / f"result{rank}.json").read_text()) for rank in (0, 1)] == [scores, scores]
    assert len(list((tmp_path / "labels").rglob("*.png"))) == 5


def test_options_of_the_command_line() -> None:
    arguments = ["best.pt", "--split", "test", "--window", "512", "1024", "--flips", "--export", "labels"]
    config = tyro.cli(EvaluateConfig, args=arguments)
    expected = EvaluateConfig(Path("best.pt"), split="test", export=Path("labels"))
    assert config == replace(expected, inference=InferenceConfig(window=(512, 1024), flips=True))
