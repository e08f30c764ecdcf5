"""The licence of everything that this project depends on. `python -m tests.licences` (part of `make licences`) writes
docs/licences.md from the metadata of what is installed."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PAGE = Path(__file__).resolve().parents[1] / "docs" / "licences.md"
OWN = "coarse-kernels"
# extra of pyproject.toml -> who needs it. Each package stands with the first that brings it.
EXTRAS = {
    "": "Whoever imports coarse_kernels",
    "triton": "The Triton kernels",
    "train": "coarse_train",
    "cityscapes": "Cityscapes' own evaluator",
    "transformers": "Networks of Hugging Face",
    "build": "Whoever compiles it",
    "test": "The tests",
    "docs": "These pages",
    "lint": "Whoever changes the code",
    "release": "Whoever makes a release",
}
# What metadata calls otherwise.
_SPDX = {
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0 License": "Apache-2.0",
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "FreeBSD": "BSD-2-Clause",
    "GNU General Public License (GPL)": "GPL",
    "GNU General Public License v3 or later (GPLv3+)": "GPL-3.0-or-later",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
}
_HEAD = """# Licences

coarse_kernels is under Apache-2.0. None of the packages below is part of it or of its wheel: who installs it gets those
of the first table, and those of an extra with the extra. Each stands where it is first needed, with what its own metadata
say, in the version that `make licences` found under Linux. A torch for CUDA brings NVIDIA's libraries, which have terms of
their own; this is a torch for CPUs. For the wheel and what it brings the same command writes dist/LICENCES.md and a bill
of materials (CycloneDX), dist/sbom.json."""


def needed(extra: str) -> dict[str, Distribution | None]:
    """By name, of what the extra brings, with all that these need under this Python and system; None: not installed."""
    found: dict[str, Distribution | None] = {}
    waiting = [(OWN, frozenset({extra}))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            installed = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        if name != OWN:
            found[name] = installed
        for line in installed.requires or ():
            requirement = Requirement(line)
            marker = requirement.marker
            if marker is None or any(marker.evaluate({"extra": one}) for one in extras or {""}):
                waiting.append((canonicalize_name(requirement.name), frozenset(requirement.extras) or frozenset({""})))
    return found


def licence(package: Distribution) -> str:
    """SPDX where the package says so, else its classifiers, else its one line."""
    metadata = package.metadata.json
    if expression := metadata.get("license_expression"):
        return str(expression)
    named = [line.rsplit(" :: ", 1)[-1] for line in metadata.get("classifier", []) if line.startswith("License ::")]
    named = [name for name in named if name != "OSI Approved"]
    line = str(metadata.get("license", "")).strip()
    if not named or (named == ["BSD License"] and re.fullmatch(r"[\w.-]*BSD[\w.-]*", line)):
        named = [line] if line and "\n" not in line else named
    named = [f"[its own]({name})" if name.startswith("https://") else _SPDX.get(name, name) for name in named]
    return ", ".join(named) or "not said in its metadata"


def page() -> str:
    lines = [_HEAD]
    told: set[str] = set()
    for extra, words in EXTRAS.items():
        packages = {name: there for name, there in sorted(needed(extra).items()) if name not in told}
        told |= packages.keys()
        lines += ["", f"## {words}" + (f": `{OWN}[{extra}]`" if extra else ""), ""]
        lines += ["| package | seen | licence |", "|---|---|---|"]
        for name, there in packages.items():
            seen, terms = ("not here", "") if there is None else (there.version, licence(there))
            lines.append(f"| {name} | {seen} | {terms} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
