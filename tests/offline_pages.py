"""That pages as HTML load nothing from a server: `python -m tests.offline_pages build/docs`, part of `make docs`.

What a reader follows (links) may lead anywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_SERVER = re.compile(r"\s*(https?:)?//", re.I)
_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.I)
_LINKS = {
    "canonical",
    "alternate",
    "author",
    "license",
    "next",
    "prev",
    "search",
    "index",
}  # rel of <link> that loads nothing


class _Loaded(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        names = ["src", "srcset", "poster", "data"]
        if tag == "link" and not set(given.get("rel", "").split()) <= _LINKS:
            names.append("href")
        for name in names:
            if _SERVER.match(given.get(name, "")):
                self.found.append(f"<{tag} {name}={given[name]!r}>")
        self.found += _STYLE.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style":
            self.found += _STYLE.findall(data)


def loaded(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, what it would get from a server), of pages and styles."""
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".html":
            parser = _Loaded()
            parser.feed(path.read_text(encoding="utf-8"))
            yield from ((path, what) for what in parser.found)
        elif path.suffix == ".css":
            yield from ((path, what) for what in _STYLE.findall(path.read_text(encoding="utf-8")))


def main(folder: str) -> int:
    if not any(Path(folder).rglob("*.html")):
        raise SystemExit(f"no page in {folder}")
    found = list(loaded(Path(folder)))
    for path, what in found:
        print(f"{path}: {what}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
