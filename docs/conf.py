"""Settings of Sphinx, which `make docs` runs.

All that a page needs is made here, so that the pages work without a network: search is Sphinx's own, equations are MathML
(latex2mathml: pure Python, where imgmath needs LaTeX and MathJax a script from a server), the theme brings its files along.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.math import get_node_equation_number

from coarse_kernels import __version__

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent

project = "coarse_kernels"
version = release = __version__
copyright = "the coarse_kernels maintainers, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
default_role = "py:obj"  # `name` in a docstring is a link where that name has an entry, else code

html_theme = "furo"
html_title = f"coarse_kernels {version}"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
html_math_renderer = "mathml"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_ivar = True
napoleon_use_rtype = False

# Markdown that lies outside of this folder and is included in a page: links to it lead to that page.
PAGES = {
    "README.md": "index",
    "CHANGELOG.md": "changelog",
    "CONTRIBUTING.md": "contributing",
    "coarse_train/README.md": "training/index",
    "examples/README.md": "examples",
    "benchmarks/README.md": "benchmarks/index",
    "benchmarks/NOTES.md": "benchmarks/notes",
    "benchmarks/CANDIDATES.md": "benchmarks/candidates",
    "benchmarks/results/xeon-processor-avx512-2-cores/report.md": "benchmarks/cpu",
    "benchmarks/results/xeon-processor-avx512-2-cores/step.md": "benchmarks/step",
    "benchmarks/results/nvidia-h200/report.md": "benchmarks/gpu",
    "tests/gpu/README.md": "benchmarks/gpu-tests",
    "docs/experiments": "experiments/index",
}
_ENTRY = re.compile(r"[a-z_][\w, ]*: ")
_fields: dict[str, list[str]] = {}  # their docstrings, until napoleon has seen them
_LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def linked(text: str, folder: Path, docname: str) -> str:
    """Markdown that lies in ``folder``, for the page ``docname``: its links to files of the repository lead to pages, or are
    downloads where a file has none; of links to folders the words are left."""
    page = (DOCS / docname).parent

    def link(match: re.Match[str]) -> str:
        words, target, fragment = match[1], folder / match[2], match[3] or ""
        if not target.exists():
            return match[0]
        name = os.path.relpath(target, ROOT)
        if name in PAGES:
            target = DOCS / f"{PAGES[name]}.md"
        elif target.is_dir():
            return words
        relative = os.path.relpath(target, page)
        is_page = target.suffix == ".md" and DOCS in target.resolve().parents
        is_image = text[: match.start()].endswith("!")
        return f"[{words}]({relative if is_page or is_image else f'path:{relative}'}{fragment})"

    return _LINK.sub(link, text)


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    if (DOCS / f"{docname}.md").is_file():
        content[0] = linked(content[0], (DOCS / docname).parent, docname)


def _included(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    content[0] = linked(content[0], (DOCS / path).resolve().parent, app.env.docname)


def _docstring(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """As people read it in an editor -> reStructuredText: lines ``name: what it is`` are a section of their own, what is
    indented after an empty line is code, and ``(B, *S)`` outside of code begins no emphasis."""
    if what == "attribute":
        _fields[name] = list(lines)
        return
    blocks = "\n".join(lines).split("\n\n")
    for k, block in enumerate(blocks):
        own = block.strip("\n").split("\n")
        heads = [line for line in own if not line.startswith("    ")]
        if heads and all(_ENTRY.match(line) for line in heads):
            blocks[k] = "\n    ".join(("Attributes:" if what == "class" else "Args:", *own))
    lines[:] = "\n\n".join(blocks).split("\n")
    written: list[str] = []
    for line in lines:
        above = next((one for one in reversed(written) if one.strip()), "")
        indent = len(above) - len(above.lstrip())
        begins = written and not written[-1].strip() and len(line) - len(line.lstrip()) > indent
        if begins and line.strip() and not above.endswith("::"):
            written += [" " * indent + "::", ""]
        written.append(line)
    parts = "\n".join(written).split("``")
    parts[::2] = [re.sub(r"(?<![\\\w])\*(?=[\w(])", r"\\*", part) for part in parts[::2]]
    lines[:] = "``".join(parts).split("\n")


def _field(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Of a field napoleon takes what stands before a colon for its type."""
    lines[:] = _fields.pop(name, lines)


def _skipped(app: Sphinx, what: str, name: str, thing: object, skip: bool, options: object) -> bool | None:
    """Fields of a NamedTuple, of which its own docstring tells more."""
    return True if (getattr(thing, "__doc__", None) or "").startswith("Alias for field number") else None


def _inline(writer: Any, node: nodes.math) -> None:
    writer.body.append(convert(node.astext(), display="inline"))
    raise nodes.SkipNode


def _block(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(writer.starttag(node, "div", CLASS="math"))
    if node["number"]:
        writer.body.append(f'<span class="eqno">({get_node_equation_number(writer, node)})</span>')
    writer.body.append(convert(node.astext().strip(), display="block") + "</div>\n")
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    app.connect("source-read", _read)
    app.connect("include-read", _included)
    app.connect("autodoc-process-docstring", _docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", _field, priority=600)
    app.connect("autodoc-skip-member", _skipped)
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
