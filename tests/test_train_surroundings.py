"""File systems, editors, terminals and launchers as people have them: a run works there, or one line says what is wrong."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unicodedata import normalize

import pytest
import torch

from coarse_train import __main__, cli, storage
from coarse_train import run as run_folder
from coarse_train.commands.evaluate import EvaluateConfig, run_evaluate
from coarse_train.commands.import_ import ImportConfig, run_import
from coarse_train.config import DataConfig, FitConfig, ModelConfig, load_toml
from coarse_train.data.classes import read_classes
from coarse_train.data.images import read_image
from coarse_train.distributed import join_world
from coarse_train.engine import fit
from coarse_train.storage import CheckpointError
from tests import data_trees
from tests.tool_exports import BOXES, labelme_shape, write_labelme

ROOT = Path(__file__).resolve().parents[1]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


def _config(tmp_path: Path) -> FitConfig:
    root = tmp_path / "data"
    if not root.exists():
        data_trees.write_folder_tree(root)
    model = ModelConfig(widths=(4, 8))
    return FitConfig(data=DataConfig(root=root), model=model, out=tmp_path / "run", steps=1, batch_size=2, threads=1)


def _failing(call: Callable[..., object], code: int, where: Callable[[int], bool]) -> Callable[..., object]:
    def failing(descriptor: int, *rest: object) -> object:
        if where(descriptor):
            raise OSError(code, os.strerror(code))
        return call(descriptor, *rest)

    return failing


def _is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


@pytest.fixture(autouse=True)
def _notes_are_new() -> None:
    storage._note.cache_clear()


# ---- file systems ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_gets_a_note(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing(fcntl.flock, code, lambda _: True))
    with storage.locked(tmp_path / ".lock") as free:
        assert free
    said = capsys.readouterr().err
    assert said == (
        f"note: {tmp_path}: the file system has no locks ({os.strerror(code)}); start no other run in this folder\n"
    )


def test_a_lock_that_fails_in_another_way_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", _failing(fcntl.flock, errno.EIO, lambda _: True))
    with pytest.raises(ValueError, match=r"out: expected a folder that can be written, got .*Input/output error"):
        fit(_config(tmp_path))


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_fsync_of_folders_gets_a_note(
    tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "fsync", _failing(os.fsync, code, _is_folder))
    for text in ("one", "two"):
        storage.write_text(tmp_path / "text", text)
    assert (tmp_path / "text").read_text() == "two"
    assert capsys.readouterr().err.count("note: ") == 1


def test_a_sync_that_fails_says_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_text(tmp_path / "text", "one")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", _failing(os.fsync, errno.EIO, lambda descriptor: not _is_folder(descriptor)))
        with pytest.raises(CheckpointError, match=r"text: .*Input/output error; the last good one is still there"):
            storage.write_text(tmp_path / "text", "two")
    assert (tmp_path / "text").read_text() == "one"
    monkeypatch.setattr(os, "fsync", _failing(os.fsync, errno.EIO, _is_folder))
    with pytest.raises(
        CheckpointError, match=r"text: .*Input/output error; it is there, but may not survive a power cut"
    ):
        storage.write_text(tmp_path / "text", "three")
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_what_stops_a_file_leaves_the_one_before_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    storage.write_text(tmp_path / "text", "one")

    def write(file: io.BufferedIOBase) -> None:
        file.write(b"half")
        raise error

    with pytest.raises((KeyboardInterrupt, CheckpointError)):
        storage.write_whole(tmp_path / "text", write)  # type: ignore[arg-type]
    assert (tmp_path / "text").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["text"]


def test_a_run_with_a_relative_root_is_used_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(tmp_path)
    relative = replace(config, data=replace(config.data, root=Path("data")), out=Path("run"))
    monkeypatch.chdir(tmp_path)
    fit(relative)
    monkeypatch.chdir("/")
    assert run_evaluate(EvaluateConfig(tmp_path / "run" / "last.pt"))["images"] == 2
    assert cli.main(["fit", str(tmp_path / "run" / "config.toml"), "--resume"]) == 0
    assert load_toml(tmp_path / "run" / "config.toml").data.root == tmp_path / "data"


# ---- names -------------------------------------------------------------------------------------------------------


def _rename(
    root: Path, old: str, new: bytes, kinds: tuple[str, ...] = ("images", "positives", "negatives", "masks")
) -> None:
    for kind in kinds:
        for path in (root / "train" / kind).rglob(f"{old}*"):
            path.rename(os.fsdecode(os.fsencode(path).replace(old.encode(), new)))


def test_an_image_whose_name_is_no_utf_8_is_trained_on(tmp_path: Path) -> None:
    config = _config(tmp_path)
    first = sorted(path.stem for path in (config.data.root / "train" / "images").rglob("*.*"))[0]  # type: ignore[operator]
    _rename(tmp_path / "data", first, b"caf\xe9")
    fit(replace(config, data=replace(config.data, simulate=None)))
    assert (tmp_path / "run" / "last.pt").exists()
    (tmp_path / "data").rename(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve"))
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve"))
    with pytest.raises(ValueError, match=r"root: expected a path in UTF-8 \(rename its folder\), got '.*/na.udcefve'"):
        fit(replace(config, data=replace(config.data, root=odd), out=tmp_path / "other"))
    assert not (tmp_path / "other").exists()


def test_a_drawing_whose_name_macos_took_apart_belongs_to_its_image(tmp_path: Path) -> None:
    config = _config(tmp_path)
    first = sorted(path.stem for path in (config.data.root / "train" / "images").rglob("*.*"))[0]  # type: ignore[operator]
    _rename(tmp_path / "data", first, "caf\u00e9".encode(), ("images",))
    _rename(tmp_path / "data", first, normalize("NFD", "caf\u00e9").encode(), ("positives", "negatives", "masks"))
    fit(config)
    assert (tmp_path / "run" / "last.pt").exists()


# ---- texts and terminals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_toml_is_read_whatever_windows_saved_it_as(tmp_path: Path, encoding: str) -> None:
    text = data_trees.FOLDER_TOML.replace("road", "Stra\u00dfe").replace("\n", "\r\n")
    (tmp_path / "classes.toml").write_bytes(text.encode(encoding))
    assert read_classes(tmp_path / "classes.toml").names == ("ground", "Stra\u00dfe", "car")
    (tmp_path / "config.toml").write_bytes("steps = 7\n".encode(encoding))
    assert load_toml(tmp_path / "config.toml").steps == 7


def test_toml_in_another_encoding_is_named(tmp_path: Path) -> None:
    for read in (read_classes, load_toml):
        (tmp_path / "a.toml").write_bytes("# caf\u00e9\n".encode("latin-1"))
        with pytest.raises(
            ValueError, match=r"a.toml: expected text in UTF-8, got none from byte 5 \(e9\) on; save it as"
        ):
            read(tmp_path / "a.toml")


def test_a_terminal_without_unicode_gets_help_and_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(tmp_path)
    table = (tmp_path / "data" / "classes.toml").read_text().replace("road", "\u0444\u043e\u043d")
    (tmp_path / "data" / "classes.toml").write_text(table, encoding="utf-8")
    fit(config)
    for arguments, expected in (
        (["--help"], "evaluate"),
        (["evaluate", str(tmp_path / "run" / "last.pt")], "???"),
        (["evaluate", str(tmp_path / "\u0444.pt")], r"\u0444.pt: expected a checkpoint"),
    ):
        printed = io.BytesIO()
        streams = {
            "stdout": io.TextIOWrapper(printed, "ascii"),
            "stderr": io.TextIOWrapper(printed, "ascii", "backslashreplace"),
        }
        for name, stream in streams.items():  # as Python makes them
            monkeypatch.setattr(sys, name, stream)
        monkeypatch.setattr(sys, "argv", ["coarse-train", *arguments])
        try:
            status = __main__.main()
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        for stream in streams.values():
            stream.flush()
        assert status == (1 if "\u0444.pt" in arguments[-1] else 0)
        assert expected in printed.getvalue().decode("ascii")


def test_an_option_may_be_called_as_in_files_and_a_misspelt_one_names_the_near_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["mnist", "--data.limit", "20", "--model.widths", "4", "8", "--optim.lr=0.5", "--workers", "3"]
    parsed = cli.parse_fit([cli.short(argument) for argument in arguments])
    assert (parsed.data.limit, parsed.model.widths, parsed.optim.lr, parsed.data.workers) == (20, (4, 8), 0.5, 3)
    for command in (["fit", "mnist"], ["evaluate", "last.pt"], ["simulate"]):
        with pytest.raises(SystemExit):
            cli.main([*command, "--data.worker", "2"])
        assert "--workers" in capsys.readouterr().err


# ---- files that are not what they should be ----------------------------------------------------------------------


def test_what_git_lfs_left_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    for name in ("last.pt", "image.png"):
        (tmp_path / name).write_bytes(LFS)
    with pytest.raises(
        CheckpointError, match=r"last.pt: expected a checkpoint, got a git-lfs pointer \(`git lfs pull`"
    ):
        run_folder.load(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"image.png: expected a complete image file, got a git-lfs pointer"):
        read_image(tmp_path / "image.png")
    for tool, name, what in (("labelme", "a.json", "JSON"), ("cvat", "annotations.xml", "XML")):
        (tmp_path / name).write_bytes(LFS)
        with pytest.raises(ValueError, match=rf"{name}: expected {what}, got a git-lfs pointer"):
            run_import(ImportConfig(tool, tmp_path / name, tmp_path / "out"))
    write_labelme(tmp_path, [labelme_shape(BOXES[0])], imagePath="image.png")
    with pytest.raises(ValueError, match=r"image.png: expected an image, got a git-lfs pointer"):
        run_import(ImportConfig("labelme", tmp_path / "a.json", tmp_path / "out"))


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("damage", "got"),
    [(lambda _: LFS, r"model.safetensors, a git-lfs pointer"), (lambda b: b[:100], "."), (lambda _: b"", ".")],
    ids=["pointer", "cut off", "empty"],
)
def test_damaged_weights_of_a_backbone_are_one_line(
    tmp_path: Path, damage: Callable[[bytes], bytes], got: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data_trees.save_small_segformer(tmp_path / "weights", 3)
    path = tmp_path / "weights" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    config = replace(_config(tmp_path), model=ModelConfig(network="segformer", weights=tmp_path / "weights"))
    with pytest.raises(
        ValueError, match=rf"weights: expected the weights of a SegFormer in .*weights, got {got}"
    ) as wrong:
        fit(config)
    assert "\n" not in str(wrong.value)


# ---- launchers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("4", "expected RANK, MASTER_ADDR, MASTER_PORT beside WORLD_SIZE=4, got none; start with `torchrun"),
        ("all", "expected a number of processes, got 'all'"),
    ],
)
def test_a_world_size_without_torchrun_is_explained(size: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", size)
    with pytest.raises(ValueError, match=f"WORLD_SIZE: {message}"), join_world("cpu"):
        pass
    monkeypatch.setenv("WORLD_SIZE", "1")
    with join_world("cpu") as world:
        assert (world.size, world.device) == (1, torch.device("cpu"))


@pytest.mark.parametrize(("given", "used"), [(None, "passive"), ("active", "active")])
def test_threads_of_the_command_sleep_while_they_wait_unless_told_otherwise(given: str | None, used: str) -> None:
    """OpenMP reads it when torch loads it. Threads that spin take twenty times the CPU beside other work."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    code = "import os, sys, coarse_train.__main__; print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "PYTHONPATH": str(ROOT), **({"OMP_WAIT_POLICY": given} if given else {})},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [used, "False"]
