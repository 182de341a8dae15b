"""For the API reference: the four rooms as one package, and docstrings without Sphinx's roles."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from griffe import Extension, Object

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "build" / "reference" / "robustexplain"
_ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`(?:~[\w.]*?(?=\w+`))?([^`]+)`")


def on_startup(**_: Any) -> None:
    """Link the rooms into one folder: in a checkout, three of them stand beside the package and not in it."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    rooms = [ROOT / name for name in ("attacks", "defenses", "recipes")]
    for part in [*(ROOT / "robustexplain").iterdir(), *rooms]:
        (PACKAGE / part.name).symlink_to(part)


class Roles(Extension):
    """``:func:`name` `` in a docstring becomes ``name`` in code."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
