"""The HTML pages that the command writes: one style for all of them, each a file that loads nothing."""

from __future__ import annotations

from typing import Any


def render(package: str, template: str, **context: Any) -> str:
    """A page from a template of a package; it may include ``style.css.j2`` and, to sort and unfold, ``page.js.j2``."""
    from jinja2 import ChoiceLoader, Environment, PackageLoader

    loaders = ChoiceLoader([PackageLoader(package, "."), PackageLoader("robustexplain", ".")])
    environment = Environment(loader=loaders, autoescape=True)
    return environment.get_template(template).render(**context)
