"""Recipes: YAML files, each runnable as it is."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

_NOTE = re.compile(r"#\s*([A-Z]\w*):\s*(.*)")


def names() -> list[str]:
    """The recipes that come with the package, as ``robustexplain run`` takes them; those of no folder first."""
    root = Path(str(files(__name__)))
    found = (p.relative_to(root).with_suffix("").as_posix() for p in root.rglob("*.yaml"))
    return sorted(found, key=lambda name: (name.count("/"), name))


def path(name: str) -> Path:
    """The file of a recipe by name (``quickstart``, ``paper/fashion-mnist``)."""
    return Path(str(files(__name__))) / f"{name}.yaml"


def notes(file: Path) -> dict[str, str]:
    """What the comment at the top of a recipe says, by its headings in lower case: shows, needs, launch, takes."""
    found: dict[str, str] = {}
    heading = ""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if match := _NOTE.match(line):
            heading, text = match[1].lower(), match[2]
            found[heading] = text.strip()
        elif heading:
            found[heading] += "\n" + line.lstrip("# ").rstrip()
    return found
