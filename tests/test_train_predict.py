"""`predict`: label files in the data set's own values, pictures, and which images are taken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from coarse_kernels import available_backends, use_backend
from coarse_train.commands.predict import PredictConfig, find_images, run_predict
from coarse_train.config import DataConfig
from coarse_train.inference import InferenceConfig, load_model, to_input
from coarse_train.pictures import draw_maps
from tests.floats_formed import FloatsFormed, assert_most_probable
from tests.nearest_colour import CLASSES, NETWORK, random_maps, write_checkpoint, write_folder, write_street_checkpoint

NAMES = ("a.png", "deep/er/b.v2.bmp", "deep/c.TIF")  # lossless: JPEG would change colours


def _files(folder: Path) -> set[str]:
    """Without the mark that says what has written them."""
    return {
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and path.name != ".predict"
    }


@pytest.fixture
def config(tmp_path: Path) -> PredictConfig:
    """Three images of three sizes and a text, in which all is as it looks."""
    for name, classes in zip(NAMES, random_maps((5, 7), (8, 3), (6, 6)), strict=True):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(CLASSES.paint(classes)).save(path)
    (tmp_path / "photos" / "notes.txt").write_text("not an image")
    checkpoint = write_checkpoint(tmp_path / "best.pt", DataConfig(root=tmp_path / "gone"))
    return PredictConfig(checkpoint, network=NETWORK, images=tmp_path / "photos", out=tmp_path / "out", device="cpu")


def test_a_folder_of_images_becomes_labels_and_pictures(
    config: PredictConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_predict(config) == config.out
    names = {"a.png", "deep/er/b.v2.png", "deep/c.png"}
    assert _files(config.out) == {f"{kind}/{name}" for kind in ("labels", "overlays") for name in names}
    for name, classes in zip(NAMES, random_maps((5, 7), (8, 3), (6, 6)), strict=True):
        out = Path(name).with_suffix(".png")
        np.testing.assert_array_equal(Image.open(config.out / "labels" / out), CLASSES.encode(classes))
        picture = draw_maps(
            CLASSES.paint(classes), {"prediction": classes}, CLASSES, title=str(Path(name).with_suffix(""))
        )
        np.testing.assert_array_equal(Image.open(config.out / "overlays" / out), picture)
    assert capsys.readouterr().out == f"3 images -> {config.out}\n"


@pytest.mark.parametrize(("opacity", "expected"), [(0.0, (100, 30, 230)), (0.5, (52, 52, 137)), (1.0, (30, 30, 200))])
def test_pictures_are_the_image_and_beside_it_the_colours_as_opaque_as_asked(
    config: PredictConfig, tmp_path: Path, opacity: float, expected: tuple[int, int, int]
) -> None:
    Image.new("RGB", (4, 3), (100, 30, 230)).save(tmp_path / "blue.png")  # nearest: sky, (30, 30, 200)
    run_predict(replace(config, images=tmp_path / "blue.png", opacity=opacity))
    assert _files(config.out) == {"labels/blue.png", "overlays/blue.png"}
    assert (np.array(Image.open(config.out / "labels/blue.png")) == 2).all()
    picture = np.array(Image.open(config.out / "overlays/blue.png"))
    image, overlay = picture[48:198, 8:208], picture[48:198, 216:416]  # enlarged 50 times
    assert (image == (100, 30, 230)).all()
    assert (overlay == expected).all()
    with pytest.raises(ValueError, match="opacity: expected a number from 0 to 1, got 2"):
        run_predict(replace(config, opacity=2))


def test_pictures_can_be_left_out(config: PredictConfig) -> None:
    run_predict(replace(config, overlays=False))
    assert {path.name for path in config.out.iterdir()} == {"labels", ".predict"}


def test_without_images_the_split_of_the_data_set_is_taken(config: PredictConfig, tmp_path: Path) -> None:
    (classes,) = random_maps((4, 5))
    root = write_folder(tmp_path / "data", "test", {"x/y": (classes, None)})
    run_predict(replace(config, images=None, split="test", root=root))
    assert _files(config.out / "labels") == {"x/y.png"}
    np.testing.assert_array_equal(Image.open(config.out / "labels/x/y.png"), CLASSES.encode(classes))


def test_grey_images_go_through_a_colour_network_and_come_back_in_colour(config: PredictConfig, tmp_path: Path) -> None:
    Image.new("L", (3, 2), 16).save(tmp_path / "grey.png")
    run_predict(replace(config, images=tmp_path / "grey.png"))
    assert (np.array(Image.open(config.out / "labels/grey.png")) == CLASSES.ids[0]).all()
    assert (np.array(Image.open(config.out / "overlays/grey.png")) == (18, 18, 18)).all(-1).sum() == 66 * 66 * 3 * 2


def test_colour_images_for_a_grey_network_are_named(config: PredictConfig) -> None:
    write_checkpoint(config.checkpoint, DataConfig(), channels=1)
    with pytest.raises(ValueError, match=r"a: expected an image of 1 channel\(s\) for this network, got 3"):
        run_predict(config)


def test_windows_and_mirrored_copies_change_nothing_for_a_network_without_context(config: PredictConfig) -> None:
    run_predict(config)
    again = replace(config, out=config.out.with_name("again"), inference=InferenceConfig(window=(4, 4), flips=True))
    run_predict(again)
    for name in _files(config.out):
        assert (config.out / name).read_bytes() == (again.out / name).read_bytes()


@pytest.mark.skipif("cpu" not in available_backends(), reason="the compiled extension is missing")
def test_logits_at_a_quarter_of_the_resolution_become_labels_and_nothing_larger(
    config: PredictConfig, tmp_path: Path
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "street.png")
    write_street_checkpoint(config.checkpoint, DataConfig())
    with use_backend("cpu"), FloatsFormed() as formed:
        run_predict(replace(config, images=tmp_path / "street.png"))
    assert formed.calls["coarse_kernels.label_map"] == 1
    assert formed.largest < len(CLASSES) * 64 * 96
    labels = CLASSES.decode(np.array(Image.open(config.out / "labels/street.png")), "street.png")
    network = load_model(config.checkpoint, torch.device("cpu")).model.segmentation.eval()
    with torch.no_grad():
        logits = network(to_input(image, 3, "street.png"))
    assert logits.shape[2:] == (16, 24)
    assert_most_probable(torch.from_numpy(labels)[None], logits)


def test_predictions_inside_the_folder_of_images_are_not_taken_for_images(config: PredictConfig) -> None:
    assert config.images is not None
    inside = replace(config, out=config.images / "predicted", overwrite=True)
    run_predict(inside)
    before = _files(inside.out)
    run_predict(inside)
    assert _files(inside.out) == before
    assert len(before) == 6


def test_what_an_earlier_run_predicted_among_the_photos_is_no_photo(config: PredictConfig) -> None:
    """`--images photos --out photos/first`, then the next checkpoint's into photos/second."""
    assert config.images is not None
    for out in ("first", "second"):
        run_predict(replace(config, out=config.images / out))
        assert len(list((config.images / out / "labels").rglob("*.png"))) == 3


def test_photos_are_found_where_predictions_go_into_their_folder_or_the_one_above(config: PredictConfig) -> None:
    """`--images photos --out .` said that there are no images."""
    assert config.images is not None
    for out in (config.images.parent, config.images):
        beside = replace(config, out=out, overwrite=True)
        for _ in range(2):
            run_predict(beside)
            assert len(list((out / "labels").rglob("*.png"))) == 3


def test_a_folder_with_files_is_kept_unless_told(config: PredictConfig) -> None:
    config.out.mkdir()
    (config.out / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out: expected an empty or new folder, or --overwrite, got .*out with files"):
        run_predict(config)
    assert _files(config.out) == {"mine.txt"}
    run_predict(replace(config, overwrite=True))
    assert (config.out / "mine.txt").read_text() == "mine"
    with pytest.raises(ValueError, match=r"out: expected a folder, got the file .*mine.txt"):
        run_predict(replace(config, out=config.out / "mine.txt"))


def test_no_images_are_named_and_nothing_is_written(config: PredictConfig, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"images: expected images \(.png, .*\) in .*empty, found none"):
        run_predict(replace(config, images=tmp_path / "empty"))
    with pytest.raises(FileNotFoundError, match=r"images: expected an image or a folder of images, got .*nowhere"):
        run_predict(replace(config, images=tmp_path / "nowhere"))
    assert not config.out.exists()


def test_two_images_of_one_name_are_refused(config: PredictConfig) -> None:
    assert config.images is not None
    Image.new("RGB", (2, 2)).save(config.images / "a.bmp")
    with pytest.raises(ValueError, match=r"expected one file for 'a', got also"):
        find_images(config.images)


def test_a_damaged_image_is_named(config: PredictConfig) -> None:
    assert config.images is not None
    (config.images / "a.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"photos/a.png: expected a complete image file"):
        run_predict(config)


def test_options_of_the_command_line() -> None:
    config = tyro.cli(PredictConfig, args=["last.pt", "--images", "photos", "--no-overlays", "--window", "256", "256"])
    expected = PredictConfig(Path("last.pt"), images=Path("photos"), overlays=False)
    assert config == replace(expected, inference=InferenceConfig(window=(256, 256)))
