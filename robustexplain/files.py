"""Files that are never half-written: write aside, then rename."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import DamagedFileError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that takes no more: whatever comes next fails as well."""


def replace_file(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file beside ``path``, then rename it into place in one step."""
    with _naming(path):
        aside = _beside(path)
        try:
            write(aside)
            aside.chmod(0o644)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    return path


@contextmanager
def replacing(folder: Path) -> Iterator[Callable[[str, Callable[[Path], Any]], Path]]:
    """Replace several files of a folder: in the block all are written aside, at its end they are renamed into place.

    The block gets a function of a name and of what fills the file; it gives the path of the file aside. They are
    renamed in the order in which they were written, and on the disk before: what lists the others is written last.
    An error in the block leaves the folder's files as they were.
    """
    asides: dict[str, Path] = {}

    def write_aside(name: str, write: Callable[[Path], Any]) -> Path:
        with _naming(folder / name):
            aside = asides[name] = _beside(folder / name)
            write(aside)
            aside.chmod(0o644)
            _flush(aside)
        return aside

    try:
        yield write_aside
        for name, aside in asides.items():
            with _naming(folder / name):
                os.replace(aside, folder / name)
    finally:
        for aside in asides.values():
            aside.unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    """A new, empty file in the folder of ``path``, which is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    return Path(name)


def _flush(path: Path) -> None:
    """Wait until the content is on the disk: a rename can be there before it when the power fails."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An error of the system names the file that was to be written, not the one aside; safetensors' become such."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    except SafetensorError as error:
        found = re.search(r"os error\s+(\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk takes no more: it is full, or it may not be written."""
    return isinstance(error, OSError) and error.errno in FULL


def write_text(path: Path, text: str) -> Path:
    """Write a text file in one step."""
    return replace_file(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def json_text(content: Any) -> str:
    """Content as JSON; NaN and infinity are refused (they are not JSON)."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_json(path: Path, content: Any) -> Path:
    """Write JSON in one step, as :func:`json_text` gives it."""
    return write_text(path, json_text(content))


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DamagedFileError: it is missing, or no JSON, or nested too deeply.
    """
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise DamagedFileError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file in one step."""
    return replace_file(path, lambda aside: fill_with_tensors(aside, tensors, metadata))


def fill_with_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file where it is, not aside: for :func:`replacing`."""
    ready = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    save_file(ready, str(path), metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and metadata of a safetensors file.

    Raises:
        DamagedFileError: it is missing, cut off, or no such file.
    """
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file, which is not cut off.

    Raises:
        DamagedFileError: it is missing, cut off, or no such file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise DamagedFileError(f"{path} is missing")
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def as_text(word: str) -> str:
    """A word that a spreadsheet takes for text: one that would begin a formula gets an apostrophe in front."""
    return f"'{word}" if word[:1] in ("=", "+", "-", "@", "\t", "\r") else word


def digest(content: Any) -> str:
    """A short hash of anything that JSON can write, independent of key order."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=10).hexdigest()


def digest_tensors(tensors: dict[str, Tensor]) -> str:
    """A short hash of named tensors: names, dtypes, shapes and bits."""
    state = hashlib.blake2b(digest_size=10)
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        state.update(f"{name}:{value.dtype}:{list(value.shape)}".encode())
        state.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return state.hexdigest()
