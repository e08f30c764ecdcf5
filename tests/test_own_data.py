"""docs/own-data.md from its first command to its last, with the export of every tool: what a lab assistant types and sees."""

from __future__ import annotations

import html
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coarse_train.cli import main
from coarse_train.data.classes import read_classes

from .tool_exports import BOXES, IMAGES, SIZE, TOOLS, Box, expected, photo, save_photo, write_drawn

PAGE = (Path(__file__).parent.parent / "docs" / "own-data.md").read_text()
# drawn all over; a network learns nothing of such photos in two steps, but has to be right about what it says of them
ALL_OVER = (Box("road", 0, 0, SIZE[1], SIZE[0]), Box("car", 8, 5, 14, 11))
SHORT = "--steps 2 --evaluate-every 2 --batch-size 2 --widths 4 8 --crop None --scale 1 1 --workers 0 --threads 1 --pictures 1"


def _export(tool: str, folder: Path, boxes: tuple[Box, ...], names: tuple[str, ...]) -> None:
    source = write_drawn(tool, folder, dict.fromkeys(names, boxes), form="box" if tool == "voc" else "polygon")
    for number, name in enumerate(names):
        save_photo(source / IMAGES[tool] / name, photo(number))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("tool", TOOLS)
def test_the_commands_of_the_page_lead_from_drawings_to_predictions_and_a_report(
    tool: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    _export(tool, Path("drawings"), BOXES, ("a.png", "b.png"))
    _export(tool, Path("masks"), ALL_OVER, ("c.png",))
    save_photo(Path("photos/day 1/new.png"))
    block = re.search(r"((?:    coarse-train .*\n)+)", PAGE)
    assert block is not None
    printed: dict[str, str] = {}
    for line in block[1].splitlines():
        command = shlex.split(line.replace("import labelme", f"import {tool}"), comments=True)[1:]
        assert main([*command, *(SHORT.split() if command[0] == "fit" else [])]) == 0, capsys.readouterr().err
        printed[command[0]] = printed.get(command[0], "") + capsys.readouterr().out
    assert list(printed) == ["import", "check", "fit", "evaluate", "predict", "report"]

    classes = read_classes(Path("data/classes.toml"))
    assert set(classes.names) == {"road", "car"}
    road, car = classes.names.index("road"), classes.names.index("car")
    named = np.array([road, car, *[255] * 254], np.uint8)
    for file, labels in zip(("positives/a", "negatives/a"), (expected()[0], expected()[1][0]), strict=True):
        if "negatives" in file and road > car:  # of two negatives over one pixel the first class is in the first layer
            labels = np.where((expected()[1] == 1).any(0), 1, expected()[1][0])
        np.testing.assert_array_equal(np.array(Image.open(f"data/train/{file}.png")), named[labels])
    assert (
        "next: coarse-train check folder --root data\n      coarse-train fit folder --root data\n" in printed["import"]
    )

    rows = [line.split() for line in printed["check"].splitlines()]
    drawn = {name: str(2 * (expected()[0] == label).sum()) for name, label in (("road", 0), ("car", 1))}
    for name, count in drawn.items():
        assert [name, "2", count] in [row[:3] for row in rows]
    with Image.open("runs/check/check_train.png") as sheet:
        assert sheet.width >= 3 * 240  # the photo, positives, negatives

    score = re.search(r"runs/mine/last.pt: step 2 of 2, mean IoU ([\d.]+)", printed["fit"])
    assert score is not None
    table = {row[0]: row[1] for line in printed["evaluate"].splitlines() if len(row := line.split()) == 3}
    assert table["mean"] == score[1]
    assert {"road", "car"} <= table.keys()
    labels = np.array(Image.open("predicted/labels/day 1/new.png"))
    assert labels.shape == SIZE
    assert set(np.unique(labels)) <= {0, 1}
    assert Image.open("predicted/overlays/day 1/new.png").width > 2 * SIZE[1]
    page = html.unescape(Path("runs/mine/report.html").read_text())
    for text in ("road", "car", f'id="mean_iou">{score[1]}<', "worst 1: c, mean IoU"):
        assert text in page
