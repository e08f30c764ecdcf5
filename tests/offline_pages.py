"""That pages load nothing from a server: `python -m tests.offline_pages build/docs`, part of `make docs`.

Looked at is what HTML, styles and SVG name to be loaded; not what a script might fetch. What a reader follows (links) may lead
anywhere.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_SERVER = re.compile(r"\s*(https?:)?//", re.I)
_STYLE = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s]+)""", re.I)
_NAMED = ("src", "poster", "data", "background")
_REFERRED = {"image", "use", "feimage", "base"}  # elements whose href is loaded, or stands before all that is
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
        named = {name: [given[name]] for name in _NAMED if name in given}
        named |= {name: given[name].split(",") for name in ("srcset", "imagesrcset") if name in given}
        rel = set(given.get("rel", "").lower().split())
        if tag in _REFERRED or (tag == "link" and not (rel and rel <= _LINKS)):
            named |= {name: [given[name]] for name in ("href", "xlink:href") if name in given}
        self.found += [
            f"<{tag} {name}={given[name]!r}>" for name, urls in named.items() if any(map(_SERVER.match, urls))
        ]
        self.found += _STYLE.findall(given.get("style", ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "style" or self.lasttag == "style":  # of SVG, too
            self.found += _STYLE.findall(data)


def loaded(folder: Path) -> Iterator[tuple[Path, str]]:
    """(file, what it would get from a server), of pages, styles and drawings."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".html", ".svg"):
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
