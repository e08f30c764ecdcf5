"""Files that came from somebody else: checkpoints, configs, label files, exports, whole run folders. None of them makes code
run, is written through to another place, or fills the memory.
"""

from __future__ import annotations

import base64
import functools
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
from PIL import Image

from coarse_train import cli, storage
from coarse_train import run as run_folder
from coarse_train.commands.import_ import ImportConfig, run_import
from coarse_train.commands.predict import PredictConfig, run_predict
from coarse_train.config import DataConfig, FitConfig, ModelConfig, to_toml
from coarse_train.data.images import load_image, load_labels
from coarse_train.engine import fit
from coarse_train.inference import load_model
from coarse_train.model.segformer import SegFormer
from coarse_train.run import CheckpointError
from tests import data_trees
from tests.runs import ENVIRONMENT
from tests.tool_exports import BOXES, labelme_shape, save_photo, write_labelme


def _config(tmp_path: Path, **changes: Any) -> FitConfig:
    root = tmp_path / "data"
    if not root.exists():
        data_trees.write_folder_tree(root)
    config = FitConfig(
        data=DataConfig(root=root), model=ModelConfig(widths=(4, 8)), out=tmp_path / "run", steps=1, batch_size=2,
        threads=1, device="cpu", pictures=0,
    )  # fmt: skip
    return replace(config, **changes)


class _Attack:
    """Pickled, it makes a file where it is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.mark),)


# --- code ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_a_checkpoint_with_code_in_it_is_refused_before_the_code_runs(tmp_path: Path, form: str) -> None:
    mark, path = tmp_path / "mark", tmp_path / "run" / "last.pt"
    config = _config(tmp_path)
    fit(config)
    content = {**run_folder.load(path), "surprise": _Attack(mark)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["surprise"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    for use in (
        lambda: run_folder.load(path),
        lambda: load_model(path),
        lambda: fit(replace(config, resume=True)),
        lambda: run_predict(PredictConfig(path, images=tmp_path / "data" / "val" / "images", out=tmp_path / "out")),
    ):
        with pytest.raises(CheckpointError, match=r"last\.pt: expected a checkpoint, got a damaged or foreign file"):
            use()  # type: ignore[no-untyped-call]
    assert not mark.exists()
    pickle.loads(pickle.dumps(_Attack(mark)))  # it would have
    assert mark.exists()


_MODULE = "import pathlib, torch\npathlib.Path('mark').mkdir()\nnet = torch.nn.Conv2d\n"


def _evil_net(channels_in: int, num_classes: int) -> torch.nn.Module:
    return torch.nn.Conv2d(channels_in, num_classes, 1)


@pytest.mark.slow
def test_a_network_that_a_checkpoint_names_is_imported_only_if_it_is_named_again(tmp_path: Path) -> None:
    """A folder with a module and a checkpoint that names it: `evaluate` there would have run the module."""
    network = "tests.test_strangers:_evil_net"
    config = _config(tmp_path, model=ModelConfig(network=network))
    path = fit(config).checkpoint
    content = run_folder.load(path)
    content["config"]["model"]["network"] = "evil:net"
    run_folder.save(path, content)
    (tmp_path / "evil.py").write_text(_MODULE)

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "coarse_train", *arguments],
            cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
        )  # fmt: skip

    said = (
        f"error: network: expected {path} to have one of ('unet', 'street', 'segformer'), got 'evil:net', which is code that "
        "would be run; --network evil:net does\n"
    )
    images = ("--images", str(tmp_path / "data" / "val" / "images"), "--device", "cpu")
    done = command("predict", str(path), *images, "--out", "found")
    assert done.returncode == 1
    assert done.stderr.endswith(said)
    with pytest.raises(ValueError, match=r"got 'evil:net', not 'other:net', which is code that would be run"):
        load_model(path, network="other:net")
    assert not (tmp_path / "mark").exists()
    content["config"]["model"]["network"] = network
    run_folder.save(path, content)
    assert load_model(path, network=network).config.model.network == network


def test_a_network_that_a_config_names_is_imported_only_if_it_is_named_on_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = "tests.test_strangers:_evil_net"
    path = tmp_path / "config.toml"
    path.write_text(to_toml(_config(tmp_path, model=ModelConfig(network=network))))
    assert cli.main(["fit", str(path)]) == 1
    assert f"expected {path} to have one of ('unet', 'street', 'segformer'), got {network!r}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit) as asked:
        cli.main(["fit", str(path), "--help"])
    assert asked.value.code == 0
    assert cli.main(["fit", str(path), f"--model.network={network}"]) == 0
    assert cli.main(["fit", str(path), "--network", network, "--resume"]) == 0


@pytest.mark.slow
def test_weights_of_a_backbone_with_code_in_them_are_refused_before_it_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    data_trees.save_small_segformer(tmp_path / "weights", 3)
    (tmp_path / "weights" / "model.safetensors").unlink()
    torch.save({"a": _Attack(mark)}, tmp_path / "weights" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"weights: expected the weights of a SegFormer in .*weights, got "):
        SegFormer(3, 3, weights=tmp_path / "weights")
    assert not mark.exists()


@pytest.mark.slow
def test_an_architecture_in_a_checkpoint_says_sizes_and_nothing_of_whose_kernels_to_fetch(tmp_path: Path) -> None:
    data_trees.save_small_segformer(tmp_path / "weights", 3)
    network = SegFormer(3, 3, weights=tmp_path / "weights")
    content = json.loads(network.architecture())
    for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        content["config"][key] = "somebody/kernels"
    content["config"]["auto_map"] = {"AutoModel": "somebody/code--model.Model"}
    content["config"]["quantization_config"] = {"quant_method": "somebody"}
    again = SegFormer(3, 3, architecture=json.dumps(content))
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in network.state_dict().items()}
    assert "somebody" not in again.network.config.to_json_string()


def test_a_transition_file_with_code_in_it_is_refused_before_it_runs(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    np.save(tmp_path / "t.npy", np.array([_Attack(mark)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"t\.npy"):
        fit(_config(tmp_path, transition=tmp_path / "t.npy"))
    assert not mark.exists()


# --- places -----------------------------------------------------------------------------------------------------------------


def _everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}


def test_names_of_classes_and_images_never_lead_out_of_the_folders_that_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path, pictures=2, select_with=2, select_steps=2)
    names = ("../../../up", "/absolute", "C:\\drive\\car")
    tables = [
        {"name": name, "id": number, "colour": list(colour)}
        for name, number, colour in zip(names, (0, 7, 20), data_trees.FOLDER_CLASSES.colours, strict=True)
    ]
    (tmp_path / "data" / "classes.toml").write_text(tomli_w.dumps({"ignore": [9], "class": tables}))
    monkeypatch.chdir(tmp_path)
    before = _everything(tmp_path)
    fit(config)
    assert cli.main(["report", str(config.out)]) == 0
    options = ["--device", "cpu", "--root", str(tmp_path / "data")]
    assert cli.main(["evaluate", str(config.out / "last.pt"), *options, "--export", "run/exported"]) == 0
    assert cli.main(["predict", str(config.out / "last.pt"), *options, "--out", "run/predicted"]) == 0
    after = _everything(tmp_path)
    assert {name for name in after.keys() - before.keys() if not name.startswith("run" + os.sep)} == set()
    assert all(after[name] == content for name, content in before.items())


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    "name", [".last.pt.part", ".config.toml.part", ".metrics.jsonl.part", "last.pt", "config.toml"]
)
@pytest.mark.parametrize("there", [True, False])
def test_nothing_is_written_through_a_link_in_a_run_folder(tmp_path: Path, name: str, there: bool) -> None:
    """Where a checkpoint was about to be written lay a link to a file of the user's, which got the checkpoint."""
    config = _config(tmp_path)
    if name == "last.pt" or (name == "config.toml" and there):
        fit(config)  # such a link is read
    mine = tmp_path / "mine"
    if there:
        mine.write_bytes(b"mine" if not name.endswith((".pt", ".toml")) else (config.out / name).read_bytes())
    before = mine.read_bytes() if there else None
    config.out.mkdir(exist_ok=True)
    (config.out / name).unlink(missing_ok=True)
    (config.out / name).symlink_to(mine)
    fit(replace(config, steps=2, resume=True, resume_changed=True))
    assert (mine.read_bytes() if mine.exists() else None) == before
    assert not (config.out / name).is_symlink()


@pytest.mark.parametrize("name", ["metrics.jsonl", "tensorboard", "pictures", ".lock"])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_a_run_folder_that_would_be_written_to_is_refused(tmp_path: Path, name: str, there: bool) -> None:
    config = _config(tmp_path, pictures=1)
    config.out.mkdir()
    mine = tmp_path / "mine"
    if there:
        mine.mkdir() if name in ("tensorboard", "pictures") else mine.write_text("mine")
    (config.out / name).symlink_to(mine)
    with pytest.raises(
        ValueError, match=rf"out: expected no links in the folder of a run, got .*{name} to .*mine; remove it"
    ):
        fit(config)
    if not there:
        assert not mine.exists()
    elif mine.is_dir():
        assert not any(mine.iterdir())
    else:
        assert mine.read_text() == "mine"


def test_a_run_does_not_take_the_place_of_another_programs_config(tmp_path: Path) -> None:
    """`out` of a config that came from somebody else may be any folder, such as that of a package manager."""
    config = _config(tmp_path)
    config.out.mkdir()
    (config.out / "config.toml").write_text('[registry]\ndefault = "mine"\n')
    with pytest.raises(ValueError, match=r"out: expected a new folder or that of a run, got another config\.toml"):
        fit(config)
    assert (config.out / "config.toml").read_text().startswith("[registry]")
    (config.out / "config.toml").write_text(to_toml(config))  # of a run that was stopped before its first checkpoint
    fit(config)


def test_what_a_killed_process_was_writing_is_cleared_away(tmp_path: Path) -> None:
    config = _config(tmp_path)
    config.out.mkdir()
    for name in (".best.pt.part", ".metrics.jsonl.part"):
        (config.out / name).write_bytes(b"half")
    fit(config)
    assert not list(config.out.glob(".*.part"))


def test_a_file_is_written_beside_a_link_and_not_through_it(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".text.part").symlink_to(tmp_path / "mine")
    (tmp_path / "text").symlink_to(tmp_path / "mine")
    storage.write_text(tmp_path / "text", "new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "text").read_text() == "new"
    assert not (tmp_path / "text").is_symlink()


def test_links_in_an_export_are_never_written_through(tmp_path: Path) -> None:
    """The new folder is new: a link to where it will be, or with its names, does not get a byte."""
    export, mine = tmp_path / "export", tmp_path / "mine"
    save_photo(export / "a.png")
    write_labelme(export, [labelme_shape(box) for box in BOXES])
    mine.mkdir()
    (tmp_path / "out").symlink_to(mine)
    run_import(ImportConfig("labelme", export, tmp_path / "out" / "inner"))
    assert {path.name for path in mine.iterdir()} == {"inner"}  # the user's own link, which --out names
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises((ValueError, OSError)):
        run_import(ImportConfig("labelme", export, tmp_path / "dangling"))
    assert not (tmp_path / "nowhere").exists()


# --- memory -----------------------------------------------------------------------------------------------------------------


@functools.cache
def _packed() -> bytes:
    """A PNG of fifty kilobytes that is made of more pixels than memory has room for."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    lines = zlib.compress(bytes(50_000_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", lines) + chunk(b"IEND", b"")


def _bomb(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_packed())
    return path


@pytest.mark.parametrize("read", [load_image, load_labels])
def test_an_image_bomb_is_refused_by_its_header(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(ValueError, match=r"a\.png: expected at most 178956970 pixels, got 40000x40000"):
        read(_bomb(tmp_path / "a.png"))


@pytest.mark.parametrize("kind", ["images", "positives", "negatives", "masks"])
def test_an_image_bomb_stops_a_run_before_its_first_step(tmp_path: Path, kind: str) -> None:
    config = _config(tmp_path)
    path = next((tmp_path / "data" / "train" / kind).rglob("*.png"))
    _bomb(path)
    with pytest.raises(ValueError, match=r"expected at most 178956970 pixels, got 40000x40000"):
        fit(config)
    assert not (config.out / "last.pt").exists()


def test_an_image_bomb_among_images_to_predict_is_refused(tmp_path: Path) -> None:
    path = fit(_config(tmp_path)).checkpoint
    _bomb(tmp_path / "photos" / "a.png")
    with pytest.raises(ValueError, match=r"expected at most 178956970 pixels, got 40000x40000"):
        run_predict(PredictConfig(path, images=tmp_path / "photos", out=tmp_path / "found", device="cpu"))


@pytest.mark.parametrize("place", ["image", "inside", "mask"])
def test_an_image_bomb_in_an_export_is_refused(tmp_path: Path, place: str) -> None:
    shape = labelme_shape(BOXES[0])
    encoded = base64.b64encode(_bomb(tmp_path / "bomb" / "a.png").read_bytes()).decode()
    save_photo(tmp_path / "export" / "a.png")
    if place == "image":
        _bomb(tmp_path / "export" / "a.png")
        write_labelme(tmp_path / "export", [shape], imageHeight=40_000, imageWidth=40_000)
    elif place == "inside":
        write_labelme(tmp_path / "export", [shape], imagePath="none.png", imageData=encoded)
    else:
        mask = shape | {"shape_type": "mask", "points": [[0, 0], [39_999, 39_999]], "mask": encoded}
        write_labelme(tmp_path / "export", [mask])
    with pytest.raises(ValueError, match=r"expected at most 178956970 pixels, got 40000x40000"):
        run_import(ImportConfig("labelme", tmp_path / "export", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_page_of_a_run_folder_runs_no_script(tmp_path: Path) -> None:
    """Text of the user's is escaped (test_train_report.py); so are names in metrics that no run has written."""
    config = _config(tmp_path)
    fit(config)
    row = json.dumps({"step": 1, "loss": 1.0, "<script>alert(1)</script>": 2.0})
    with open(config.out / "metrics.jsonl", "a") as file:
        file.write(row + "\n")
    assert cli.main(["report", str(config.out)]) == 0
    assert "<script>alert(1)" not in (config.out / "report.html").read_text()


def test_pillow_still_warns_of_bombs_outside_of_the_reader() -> None:
    """The limit that is lifted while a file is opened, since it is the whole process's, is put back."""
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
