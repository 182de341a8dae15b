"""``system.json``: the content and the checksums of every file and of itself, checked on reading."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import files
from .._version import __version__
from ..errors import InputError, MissingDataError
from ..seals import CHECKSUM, sealed, sha256_of

FORMAT = 2
"""The format of the folder; a version reads the formats that it supports."""
TREE, WEIGHTS = "system.json", "weights.safetensors"


def text(content: dict[str, Any], written: Mapping[str, Path]) -> str:
    """The file's text: ``content`` with format, version, and the checksums of the files, by name and where they are."""
    sums = {name: sha256_of(path) for name, path in written.items()}
    return files.json_text(sealed({"format": FORMAT, "version": __version__, "files": sums, **content}))


def read(folder: Path, expected: str | None = None) -> dict[str, Any]:
    """The content, with every file that it lists compared.

    Args:
        folder: of a saved system.
        expected: its checksum, from elsewhere.

    Raises:
        MissingDataError: no saved system, or a file of it is missing.
        InputError: damaged, changed after saving, of another format or a newer version, or not the one expected.
    """
    path = folder / TREE
    if not path.is_file() or not (folder / WEIGHTS).is_file():
        raise MissingDataError(f"{folder} holds no saved system: {TREE} and {WEIGHTS} are expected there")
    content = _parsed(path)
    _check_origin(path, content)
    if content.get(CHECKSUM) != sealed(content)[CHECKSUM]:
        raise InputError(f"{path} is damaged or was changed after saving: its checksum is not the one that it holds")
    if expected is not None and content[CHECKSUM] != expected.lower():
        raise InputError(f"{folder} holds another system than expected: sha256 {content[CHECKSUM]}, not {expected}")
    _check_files(folder, content.get("files"))
    return content


def _parsed(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise InputError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    return content if isinstance(content, dict) else {}


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text}, where only finite numbers make sense")
    return value


def _check_origin(path: Path, content: dict[str, Any]) -> None:
    found, version = content.get("format"), content.get("version")
    if found != FORMAT or isinstance(found, bool):
        hint = "; save the system again, with this version" if found == 1 else ""
        raise InputError(f"{path} has format {found!r}; this version reads {FORMAT}{hint}")
    if _release(version) > _release(__version__):
        raise InputError(
            f"{path} was written by version {version!r}; this is RobustExplain {__version__}, which reads what it and "
            "earlier versions wrote: update it"
        )


def _release(version: object) -> tuple[float, float]:
    """Major and minor number of a version; infinity for other text."""
    found = re.match(r"(\d{1,6})\.(\d{1,6})(\D|$)", version) if isinstance(version, str) else None
    return (math.inf, math.inf) if found is None else (int(found[1]), int(found[2]))


def _check_files(folder: Path, sums: object) -> None:
    if not isinstance(sums, dict) or WEIGHTS not in sums or any(Path(name).name != name for name in sums):
        raise InputError(f"{folder / TREE} does not describe a system of this version: it lists no checksums of files")
    for name, expected in sums.items():
        path = folder / name
        if not path.is_file():
            raise MissingDataError(f"{folder} is incomplete: {name} is missing")
        if sha256_of(path) != expected:
            raise InputError(f"{path} is damaged or was changed after saving: its sha256 is not the one in {TREE}")
