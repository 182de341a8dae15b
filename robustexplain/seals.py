"""Content hashes in JSON files: they show damage and careless edits. Whoever can write a file can write its hash."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from . import files
from .errors import DamagedFileError

CHECKSUM, ARRAYS = "sha256", "arrays_sha256"


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """The content with its own SHA-256: of its JSON with sorted keys and no spaces, without the checksum."""
    bare = {key: value for key, value in content.items() if key != CHECKSUM}
    text = json.dumps(bare, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**bare, CHECKSUM: hashlib.sha256(text.encode()).hexdigest()}


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, as hex."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()


def write(path: Path, content: dict[str, Any], arrays: Path | None = None) -> Path:
    """Write JSON with its own SHA-256, and with that of the file of arrays that belongs to it.

    Args:
        path: the JSON file.
        content: plain data whose keys are words.
        arrays: a file that is there already; the JSON, which is written last, vouches for it.
    """
    bound = {key: value for key, value in content.items() if key != ARRAYS}
    return files.write_json(path, sealed(bound if arrays is None else {**bound, ARRAYS: sha256_of(arrays)}))


def read(path: Path, *keys: str) -> dict[str, Any]:
    """The content of a file of :func:`write`; its arrays are not looked at: see :func:`check_arrays`.

    Args:
        path: the JSON file.
        keys: what a file of this kind holds; one that was written for another place may lack them.

    Raises:
        DamagedFileError: it is no JSON, was changed since it was written, or is a file of another kind.
    """
    content = files.read_json(path)
    if not isinstance(content, dict) or not _fits(content):
        raise DamagedFileError(f"{path} was changed after it was written, or is damaged: its checksum does not fit")
    if missing := [key for key in keys if key not in content]:
        raise DamagedFileError(f"{path} is a file of another kind: it has no {missing[0]!r}")
    return content


def _fits(content: dict[str, Any]) -> bool:
    try:
        return bool(content.get(CHECKSUM) == sealed(content)[CHECKSUM])
    except (ValueError, RecursionError):  # NaN and infinity, which are never written
        return False


def read_or_none(path: Path, *keys: str) -> dict[str, Any] | None:
    """The content of a sealed file that can be made again; ``None`` where it is missing, damaged or changed."""
    try:
        return read(path, *keys)
    except DamagedFileError:
        return None


def check_arrays(content: dict[str, Any], path: Path) -> None:
    """Refuse a file of arrays that is not the one that sealed content was written with.

    Raises:
        DamagedFileError: it is missing, damaged or changed.
    """
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing")
    if content.get(ARRAYS) != sha256_of(path):
        raise DamagedFileError(f"{path} was changed after it was written, or is damaged: its checksum does not fit")
