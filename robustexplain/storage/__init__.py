"""Saving systems without code and without pickle: a JSON tree of registered components beside a safetensors file.

A folder holds ``system.json`` (what the parts are, how they fit together, and the SHA-256 of every file),
``weights.safetensors`` (weights of modules, and tensors) and a file for each part that has a safe format of its own.
Loading compares the checksums first and looks names up in the registries; nothing in the folder can name code.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, get_args

from torch import nn

from .. import files
from ..errors import InputError
from ..registry import DETECTORS, INTERPRETERS, PARTS
from ..seals import CHECKSUM
from . import manifest, probe
from .manifest import TREE, WEIGHTS
from .own_model import Weights
from .reader import Reader
from .writer import Writer

__all__ = ["Weights", "checksum", "load_component", "save_component"]


def save_component(component: Any, folder: Path) -> Path:
    """Write a component and all its parts into ``folder``; see :meth:`robustexplain.System.save`."""
    writer = Writer()
    tree, answers = writer.encode(component), probe.asked(component)
    # A process that is killed while the files are renamed leaves parts of two systems. The tree comes last, and the
    # checksums in it are not those of the others then: such a folder is refused on loading.
    with files.replacing(folder) as aside:
        written = {
            name: aside(name, lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
            for name, content in writer.blobs.items()
        }
        written[WEIGHTS] = aside(WEIGHTS, lambda path: files.fill_with_tensors(path, writer.tensors() | answers))
        content = manifest.text({"modules": writer.specs, "around": writer.around, "tree": tree}, written)
        aside(TREE, lambda path: path.write_text(content, encoding="utf-8"))
    _remove_old_parts(folder, keep=writer.blobs)
    return folder


def load_component(
    folder: Path, *, model: nn.Module | None = None, weights: Weights = "same", sha256: str | None = None
) -> Any:
    """Read what :func:`save_component` wrote; see :meth:`robustexplain.System.load`."""
    if weights not in get_args(Weights) or (weights != "same" and model is None):
        raise InputError(f"weights must be one of {get_args(Weights)}, of a model that is handed in, got {weights!r}")
    described = manifest.read(folder, sha256)
    tensors, _ = files.read_tensors(folder / WEIGHTS)
    try:
        made = Reader(folder, described, tensors, model, weights).decode(described["tree"])
        if weights != "own":
            probe.compare(made, tensors, str(folder))
        return made
    except InputError:
        raise
    # Maliciously written files can raise any of these.
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"{folder / TREE} does not describe a system of this version: {error!r}") from error


def checksum(folder: str | Path) -> str:
    """The SHA-256 of a saved system, as hex: kept elsewhere, it shows on loading that the folder was not changed.

    Raises:
        MissingDataError: if the folder holds no saved system.
        InputError: if a file is damaged or was changed.
    """
    found: str = manifest.read(Path(folder))[CHECKSUM]
    return found


def _remove_old_parts(folder: Path, keep: Collection[str]) -> None:
    """Remove what parts of an earlier system left in the folder, and nothing else."""
    names = {re.escape(entry.name) for kind in (INTERPRETERS, DETECTORS, PARTS) for entry in kind}
    written = re.compile(rf"({'|'.join(names)})-\d+\.bin")
    for path in folder.glob("*.bin"):
        if path.name not in keep and written.fullmatch(path.name):
            path.unlink()
