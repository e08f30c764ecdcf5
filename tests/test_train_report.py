"""`report`: what the page says is what the run wrote, whatever its classes are called, and a browser shows all of it."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tomli_w
from PIL import Image

from coarse_train.cli import main, parse_fit
from coarse_train.commands.report import ReportConfig, read_rows, run_report
from tests import data_trees
from tests.runs import stop_after

NAMES = ("<script>document.title = 'stolen'</script>", 'a & "b" {{ 1 + 1 }}', "$\\frac_x")
OPTIONS = [
    "--steps",
    "4",
    "--evaluate-every",
    "2",
    "--save-every",
    "2",
    "--batch-size",
    "2",
    "--widths",
    "4",
    "8",
    "--threads",
    "1",
    "--workers",
    "0",
    "--crop",
    "None",
    "--scale",
    "1",
    "1",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps, of which two were made by a run that was stopped; names that HTML, matplotlib and Jinja may stumble over."""
    base = tmp_path_factory.mktemp("report")
    root = data_trees.write_folder_tree(base / "data")
    classes = [
        {"name": name, "id": number, "colour": list(colour)}
        for name, number, colour in zip(NAMES, (0, 7, 20), data_trees.FOLDER_CLASSES.colours, strict=True)
    ]
    (root / "classes.toml").write_text(tomli_w.dumps({"ignore": [9], "class": classes}))
    for kind in ("images", "masks"):
        (root / "val" / kind / "day0" / "val0.png").rename(root / "val" / kind / "<i>&.png")
        shutil.rmtree(root / "val" / {"images": "positives", "masks": "negatives"}[kind])
    out = base / "<b>run"
    out.mkdir()
    options = ["folder", "--root", str(root), "--out", str(out), *OPTIONS]
    stop_after(parse_fit(options), 2)
    assert main(["fit", *options, "--resume"]) == 0
    # steps that a killed run wrote and no resume has cut off yet, and the line that it was writing
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    with open(out / "metrics.jsonl", "a") as file:
        file.write("".join(line for line in lines if json.loads(line)["step"] > 2) + '{"step": 5, "lo')
    rounds = [
        {"steps": 2, "mean_iou": {"matrix": 60.0, "all trusted": 61.25, "pen, <matrix>": 62.0}},
        {"steps": 4, "mean_iou": {"all trusted": 65.5, "pen, <matrix>": 70.0}},
    ]
    selection = {"chosen": "pen, <matrix>", "rounds": rounds}
    (out / "selection.json").write_text(json.dumps(selection))
    assert main(["report", str(out)]) == 0
    return out


def _cells(page: str, table: str) -> dict[str, list[str]]:
    """The row of each name in a table of the page."""
    (body,) = re.findall(rf'id="{table}">.*?<tbody>(.*?)</tbody>', page, re.S)
    found = {}
    for row in re.findall(r"<tr>(.*?)</tr>", body, re.S):
        (name,) = re.findall(r'<th scope="row">(.*?)</th>', row, re.S)
        found[html.unescape(name)] = [cell.strip() for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)]
    return found


def _assert_says_what_the_run_wrote(page: str, run: Path) -> None:
    row = [row for row in read_rows(run / "metrics.jsonl") if "iou" in row][-1]
    classes, confusion, believed = (_cells(page, table) for table in ("classes", "confusion", "positive_cm"))
    assert tuple(classes) == tuple(confusion) == tuple(believed) == NAMES
    for name, counts in zip(NAMES, row["confusion"], strict=True):
        iou = row["iou"][name]
        assert classes[name][0] == ("-" if iou is None else f"{iou:.2f}")
        assert confusion[name] == [f"{100 * count / sum(counts):.0f}" if sum(counts) else "-" for count in counts]
        assert believed[name] == [f"{100 * share:.0f}" for share in row["positive_cm"][name]]
    candidates = _cells(page, "selection")
    assert list(candidates.items()) == [
        ("pen, <matrix>", ["62.00", "70.00", "0.00"]),
        ("all trusted", ["61.25", "65.50", "4.50"]),
        ("matrix", ["60.00", "-", "2.00"]),  # by what was known when it ended
    ]
    assert f'id="mean_iou">{row["mean_iou"]:.2f}<' in page
    assert 'id="steps">4 of 4<' in page


def test_the_page_says_what_the_run_wrote(run: Path) -> None:
    _assert_says_what_the_run_wrote((run / "report.html").read_text(), run)


def test_the_page_asks_for_nothing_and_its_pictures_are_complete(run: Path) -> None:
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<i>" not in page
    assert not re.search(
        r"https?:|//[a-z]|@import|url\(|<link(?! rel=.icon. href=.data:,.)", re.sub(r"base64,[^\"]*", "", page)
    )
    addresses = re.findall(r'src="([^"]*)"', page)
    kinds = [re.fullmatch(r"data:image/(jpeg|svg\+xml);base64,(.*)", address) for address in addresses]
    assert all(kinds)
    assert [kind[1] for kind in kinds if kind] == ["svg+xml"] * 4 + ["jpeg"] * 3  # best, worst, training
    for kind in kinds:
        assert kind is not None
        content = base64.b64decode(kind[2])
        if kind[1] == "jpeg":
            Image.open(io.BytesIO(content)).load()
        else:
            ElementTree.fromstring(content)


def test_curves_have_every_step_once_after_a_resume(run: Path) -> None:
    rows = list(read_rows(run / "metrics.jsonl"))
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "mean_iou" in row] == [2, 4]


def test_a_long_run_is_a_page_of_the_same_size(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "config.toml", tmp_path)
    row = next(read_rows(run / "metrics.jsonl"))
    lines = [
        json.dumps({**row, "step": step, "loss": None if step == 9 else step * 7919 % 1000}) for step in range(1, 4_001)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    page = run_report(ReportConfig(tmp_path, out=tmp_path / "new" / "page.html")).read_text()
    assert len(page) < 200_000
    assert "No dense mask of the validation split has been scored." in page


def test_a_folder_that_is_no_run_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 1
    expected = f"error: run: expected the folder of a run, with its metrics.jsonl, got {tmp_path}/nothing"
    assert capsys.readouterr().err.startswith(expected)
    with pytest.raises(ValueError, match="out: expected a file to write, got the folder"):
        run_report(ReportConfig(run, out=tmp_path))


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], tuple[str, str]]:
    """A page -> its DOM, and what the browser said."""
    found = [path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))]
    if not found:
        pytest.skip("no chromium or google-chrome is installed")
    profile = tmp_path_factory.mktemp("profile")

    def open_page(page: Path) -> tuple[str, str]:
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ]
        options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--window-size=400,800"]
        done = subprocess.run(
            [found[0], *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout, done.stderr

    return open_page


def test_a_browser_shows_the_page_without_a_complaint(
    run: Path, tmp_path: Path, browse: Callable[[Path], tuple[str, str]]
) -> None:
    dom, said = browse(run / "report.html")
    assert "CONSOLE" not in said  # what the page's own policy refuses to load is said there too
    assert "<title>&lt;b&gt;run: folder</title>" in dom
    _assert_says_what_the_run_wrote(dom, run)
    # The page has no scripts and allows none; a copy without its policy gets one that asks what was decoded and how wide it is.
    text = (run / "report.html").read_text()
    script = """<script>onload = () => document.body.dataset.seen = JSON.stringify(
        [[...document.images].every(i => i.complete && i.naturalWidth > 0), document.images.length,
         document.documentElement.scrollWidth <= innerWidth])</script></body>"""
    asked = re.sub("<meta http-equiv=.*?>", "", text).replace("</body>", script)
    (tmp_path / "asked.html").write_text(asked)
    dom, said = browse(tmp_path / "asked.html")
    assert 'data-seen="[true,7,true]"' in dom, said
