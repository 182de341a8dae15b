"""Recipes: YAML files, each runnable as it is."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path


def names() -> list[str]:
    """The recipes that come with the package, as ``robustexplain run`` takes them."""
    root = Path(str(files(__name__)))
    return sorted(str(p.relative_to(root).with_suffix("")) for p in root.rglob("*.yaml"))


def path(name: str) -> Path:
    """The file of a recipe by name (``quickstart``, ``paper/fashion-mnist``)."""
    return Path(str(files(__name__))) / f"{name}.yaml"
