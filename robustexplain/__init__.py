"""RobustExplain: attacks on explanations, defenses against them, and an honest comparison of the two.

The words: a ``System`` is what is deployed (a classifier, its interpreter, perhaps a detector); an attack deceives a
system; a defense makes a system harder to deceive; a metric is a number per sample.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._version import __version__

# In a checkout, `attacks`, `defenses` and `recipes` stand beside this folder instead of inside it. Python puts the
# current directory first on its path there, so this folder shadows an installed package: let it find its other rooms.
_here = Path(__file__).resolve().parent
if not (_here / "attacks").is_dir() and (_here.parent / "attacks" / "__init__.py").is_file():
    __path__.append(str(_here.parent))

if TYPE_CHECKING:
    from . import attacks, data, defenses, interpreters, metrics, models, objectives, recipes
    from .evaluation.objects import evaluate
    from .system import Explained, System

__all__ = [
    "Explained",
    "System",
    "__version__",
    "attacks",
    "data",
    "defenses",
    "evaluate",
    "interpreters",
    "metrics",
    "models",
    "objectives",
    "recipes",
]

_MODULES = {"attacks", "data", "defenses", "interpreters", "metrics", "models", "objectives", "recipes"}


def __getattr__(name: str) -> Any:
    # Imported on first use: `import robustexplain` itself must stay light.
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name == "evaluate":
        return importlib.import_module(".evaluation.objects", __name__).evaluate
    if name in ("System", "Explained"):
        return getattr(importlib.import_module(".system", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
