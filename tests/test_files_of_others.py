"""What a command replaces or clears away is what it has written itself: files of others in its way are an error, and stay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coarse_train.cli import main
from coarse_train.engine import fit
from tests.runs import _config
from tests.tool_exports import save_photo, write_tool


def _everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "name", ["best.pt", "metrics.jsonl", "selection.json", "tensorboard/events", "pictures/mine.png"]
)
def test_a_run_takes_no_folder_with_files_that_it_would_replace(name: str, tmp_path: Path) -> None:
    """A best.pt of somebody's was deleted, before the error that there are no images."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    part = name.split("/")[0]
    for resume in (False, True):
        with pytest.raises(
            ValueError, match=f"out: expected a new folder or that of a run, got .* with {part} of no run"
        ):
            fit(_config(tmp_path, resume=resume))
    assert {path for path in _everything(tmp_path) if path.name != ".lock"} == {tmp_path / name}
    assert (tmp_path / name).read_text() == "mine"


def test_the_best_checkpoint_of_a_run_is_kept_when_its_last_one_is_gone(tmp_path: Path) -> None:
    fit(_config(tmp_path, select_with=4, select_steps=0))
    (tmp_path / "last.pt").unlink()
    best = (tmp_path / "best.pt").read_bytes()
    with pytest.raises(
        ValueError, match=r"out: expected a new folder or --resume, got .* with the checkpoint best\.pt"
    ):
        fit(_config(tmp_path))
    assert (tmp_path / "best.pt").read_bytes() == best


def test_a_pen_that_was_measured_before_is_kept_where_masks_choose(tmp_path: Path) -> None:
    (tmp_path / "pen.json").write_text("mine")
    with pytest.raises(ValueError, match=r"got .* with pen\.json of no run"):
        fit(_config(tmp_path, select_with=4))
    assert (tmp_path / "pen.json").read_text() == "mine"


@pytest.mark.slow
def test_a_run_is_known_without_its_lock(tmp_path: Path) -> None:
    """Which goes with the process on Windows."""
    config = _config(tmp_path, select_with=4, select_steps=2, steps=2)
    fit(config)
    before = {path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    for path in [*tmp_path.rglob(".lock"), *tmp_path.rglob("config.toml"), tmp_path / "last.pt", tmp_path / "best.pt"]:
        path.unlink()
    assert fit(replace(config, seed=5)).steps == 2
    after = {path.read_text() for path in tmp_path.rglob("metrics.jsonl")}
    assert len(after) == 8  # four candidates, one in four folds besides: cleared away, and made again
    assert not before & after


def test_folders_called_trial_and_files_called_part_are_not_all_ours(tmp_path: Path) -> None:
    config = _config(tmp_path, select_with=4, select_steps=2, steps=2)
    (tmp_path / "trial_photos").mkdir()
    (tmp_path / "trial_photos" / "a.jpg").write_text("mine")
    (tmp_path / ".video.part").write_text("mine")
    fit(config)
    assert (tmp_path / "trial_photos" / "a.jpg").read_text() == "mine"
    assert (tmp_path / ".video.part").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("taken", ["last.pt", "config.toml", "metrics.jsonl", "notes.json"])
def test_scores_and_reports_take_the_place_of_their_own_kind_alone(
    taken: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`evaluate last.pt --out last.pt` replaced the checkpoint by its scores."""
    fit(_config(tmp_path, steps=2))
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    before = (tmp_path / taken).read_bytes()
    score = ["evaluate", str(tmp_path / "last.pt"), "--device", "cpu", "--limit", "2", "--out"]
    report = ["report", str(tmp_path), "--out"]
    for command, name in ((score, "scores.json"), (report, "page.html")):
        assert main([*command, str(tmp_path / taken)]) == 1
        assert "out: expected a new file, or an older one of this command" in capsys.readouterr().err
        assert (tmp_path / taken).read_bytes() == before
        for _ in range(2):
            assert main([*command, str(tmp_path / name)]) == 0


@pytest.mark.parametrize("name", ["train/masks/a.png", "train/images/mine.png", "val/masks/b.png", "README.txt"])
def test_import_replaces_nothing_that_was_made_by_hand(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tool("labelme", tmp_path / "export")
    save_photo(source / "a.png")
    out = tmp_path / "out"
    command = ["import", "labelme", str(source), "--out", str(out)]
    assert main(command) == 0
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("mine")
    before = _everything(out)
    split = ["--add"] if name.startswith("train") else []
    for more in ([], split):
        assert main([*command, "--overwrite", *more]) == 1
        assert f"expected nothing but what import has written, got {out / name}; move" in capsys.readouterr().err
        assert _everything(out) == before
    (out / name).unlink()
    (out / "train" / ".DS_Store").write_text("of a file manager")
    assert main([*command, "--overwrite"]) == 0


def test_import_replaces_what_it_has_written_even_if_less_comes_of_it_now(tmp_path: Path) -> None:
    """With the last negative drawing deleted in the tool, or without the validation split."""
    source = write_tool("labelme", tmp_path / "export")
    save_photo(source / "a.png")
    out = tmp_path / "out"
    command = ["import", "labelme", str(source), "--out", str(out)]
    assert main([*command, "--as", "masks"]) == 0
    assert main([*command, "--split", "val", "--add"]) == 0
    assert main([*command, "--add", "--overwrite"]) == 0
    assert (out / "train" / "positives").is_dir()
    assert not (out / "train" / "masks").exists()
    assert main([*command, "--overwrite"]) == 0
    assert not (out / "val").exists()


def test_a_quick_experiment_takes_the_place_of_no_full_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = '{"experiment": "sanity", "quick": false, "rows": []}'
    (tmp_path / "results.json").write_text(results)
    assert main(["experiment", "sanity", "--quick", "--tables", "alike", "--out", str(tmp_path), "--jobs", "1"]) == 1
    assert "out: expected another folder for a quick run" in capsys.readouterr().err
    assert (tmp_path / "results.json").read_text() == results


@pytest.mark.parametrize("content", ["mine", '{"task": "hasty"}', "[1]"])
@pytest.mark.parametrize("tune", [False, True])
def test_the_demo_takes_the_place_of_no_other_table(
    content: str, tune: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / ("tuning.json" if tune else "results.json")
    path.write_text(content)
    assert main(["demo", "--out", str(tmp_path), "--steps", "1", "--limit", "4", *(["--tune"] if tune else [])]) == 1
    assert "out: expected a new folder or one of task majority" in capsys.readouterr().err
    assert path.read_text() == content
