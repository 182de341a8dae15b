"""One run at a time in a directory: the operating system's lock on a file that says who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

from ..errors import RobustExplainWarning, RunBusyError

try:
    import fcntl
except ImportError:  # Windows: there is no such lock, and the file alone must do
    fcntl = None  # type: ignore[assignment]

LOCK = "run.lock"
"""Its name: a JSON object of process, host and time."""
_HELD: set[int] = set()
"""Descriptors of this process's locks: its children must not hold them any longer than it lives."""


def _let_go_in_child() -> None:
    for handle in list(_HELD):
        with contextlib.suppress(OSError):
            os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)


@contextmanager
def held(root: Path) -> Iterator[None]:
    """Hold a directory, which is made if it is not there, for the length of the block.

    A process that ends in whatever way holds nothing any more. On a file system without locks the file itself is the
    lock: one that a killed process of this host left is taken over, one of another host must be deleted by hand.

    Raises:
        RunBusyError: another process (or another run in this one) holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    path = root / LOCK
    handle = _locked(path) if fcntl is not None else None
    if handle is None:
        _take_without_locks(path)
    try:
        if handle is not None:
            _note(handle, path)
        yield
    finally:
        # Somebody may have deleted the file by hand, and another run have made its own.
        with contextlib.suppress(OSError):
            if handle is None or os.path.samestat(os.fstat(handle), path.stat()):
                path.unlink()
        if handle is not None:
            _HELD.discard(handle)
            os.close(handle)


def _locked(path: Path) -> int | None:
    """An open file with the lock; ``None`` where the file system has none."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            _refuse(path)
        except OSError as error:
            os.close(handle)
            warnings.warn(
                f"the file system of {path.parent} has no locks ({error.strerror}): make sure that no other machine "
                "writes this directory",
                RobustExplainWarning,
                stacklevel=4,
            )
            return None
        # Its former holder may have removed the file between our opening and our locking it.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), path.stat()):
                _HELD.add(handle)
                return handle
        os.close(handle)


def _note(handle: int, path: Path) -> None:
    try:
        os.ftruncate(handle, 0)
        os.write(handle, _words())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _take_without_locks(path: Path) -> None:
    known = _read(path)
    if known and (known.get("host") != socket.gethostname() or _alive(known.get("process"))):
        _refuse(path, f"; if that process is no more, delete {path}")
    path.write_bytes(_words())


def _alive(process: Any) -> bool:
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def _words() -> bytes:
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now}).encode()


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse(path: Path, advice: str = "") -> NoReturn:
    known = _read(path)
    who = f"process {known.get('process', 'of unknown number')} on {known.get('host', 'an unknown host')}"
    since = f" since {known['since']}" if "since" in known else ""
    raise RunBusyError(
        f"{path.parent} is being written by {who}{since}: wait until it ends, or choose another --out{advice}"
    )
