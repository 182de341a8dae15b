"""What image files hold: a hash of each, and whether it can be read. Kept, so that a second look is quick."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from .. import files
from ..errors import InputError
from .arrays import default_root
from .pictures import fault_of

FEW_BYTES = 2**24
"""Looking at so few bytes is quicker than keeping what was found is worth."""
FEW_FILES = 5000
"""Files of larger data sets are not all decoded to see whether they can be."""
SETTLED_S = 2.0
"""A file that changed so lately may change again without another time: what it holds is not kept."""


class Content(NamedTuple):
    """SHA-256 of a file's bytes, as hex, and why it cannot be read as an image (empty where it can)."""

    sha256: str
    fault: str


def contents(folder: Path, names: Sequence[str]) -> list[Content]:
    """What the files of a folder hold.

    Read again only if size, times (of content and of inode) or inode differ from those at the last look, which is
    kept in the user's cache folder (``XDG_CACHE_HOME``).

    Args:
        folder: where the files are.
        names: relative to ``folder``.

    Raises:
        InputError: a file that is not there or may not be read.
    """
    path = default_root() / "contents" / f"{hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]}.json"
    thorough = len(names) <= FEW_FILES
    known = _read(path)
    if thorough:  # what was only looked at may be found damaged now
        known = {name: entry for name, entry in known.items() if entry[6]}
    begun, root = time.time(), os.fspath(folder)
    stamps = {name: _stamp(os.path.join(root, name)) for name in names}
    found = {n: Content(*known[n][4:6]) for n, stamp in stamps.items() if n in known and known[n][:4] == stamp}
    new = [name for name in stamps if name not in found]
    threads = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        looks = threads.map(lambda name: _look(folder / name, thorough), new)
        found.update(zip(new, looks, strict=True))
    finally:
        threads.shutdown(cancel_futures=True)
    if sum(stamps[name][0] for name in new) > FEW_BYTES:
        # Stamps were taken before the files were read: a change meanwhile shows in their times.
        # A fault is looked at again: it may be the machine's.
        sure = [name for name in new if not found[name].fault]
        settled = [name for name in sure if begun - max(stamps[name][1:3]) / 1e9 > SETTLED_S]
        _write(path, {**known, **{name: [*stamps[name], *found[name], thorough] for name in settled}})
    return [found[name] for name in names]


def _stamp(path: str) -> list[int]:
    try:
        status = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        # Opening a pipe would wait for somebody who writes into it.
        raise InputError(f"{path!r} is no file")
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _look(path: Path, thorough: bool) -> Content:
    state = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**20):
                state.update(block)
    except OSError as error:
        raise _unreadable(str(path), error) from error
    return Content(state.hexdigest(), fault_of(path, thorough))


def _unreadable(path: str, error: OSError) -> InputError:
    what = "is a link to nothing" if os.path.islink(path) else f"cannot be read: {error.strerror or error}"
    return InputError(f"{path!r} {what}")


def _reader() -> list[Any]:
    """What decides whether an image can be read, besides its content."""
    return [2, PIL.__version__, PIL.Image.MAX_IMAGE_PIXELS]


def _read(path: Path) -> dict[str, list[Any]]:
    """What was kept, by name; nothing where there is none, another reader's or a damaged one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        known = found["files"] if found["reader"] == _reader() else {}
        return {n: e for n, e in known.items() if _is_entry(e)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _is_entry(entry: Any) -> bool:
    kinds = (int, int, int, int, str, str, bool)
    return isinstance(entry, list) and len(entry) == len(kinds) and all(map(isinstance, entry, kinds))


def _write(path: Path, kept: dict[str, list[Any]]) -> None:
    try:
        files.write_text(path, json.dumps({"reader": _reader(), "files": kept}))
    except OSError:
        # A full disk or a folder that may not be written: the next look is as slow as this one.
        return
