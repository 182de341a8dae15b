"""A short hash of components of any class: settings, weights and tensors."""

from __future__ import annotations

import hashlib
import inspect
import io
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from .. import files
from ..storage.writer import Blob


def fingerprint(value: Any) -> str:
    """A hash of a component; equal in all processes for the same class, settings and weights.

    Of a dataclass, its class and fields; of a module, its class and weights; of a part with a binary format of its
    own, the arrays in it; of another object, its class and public attributes.
    """
    return files.digest(_plain(value))


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return files.digest_tensors({"": value})
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), _bytes(value.tobytes())]
    if isinstance(value, nn.Module):
        weights = files.digest_tensors(value.state_dict())
        return [_name(type(value)), str(getattr(value, "spec", None)), _bytes(repr(value).encode()), weights]
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(fingerprint(inner) for inner in value)
    if isinstance(value, type) or inspect.isroutine(value):
        return _name(value)
    return [_name(type(value)), _content(value)]


def _content(value: Any) -> Any:
    if isinstance(value, Blob):
        return _arrays(value.to_bytes())
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value) if f.init}
    if hasattr(value, "__dict__"):
        return {name: _plain(inner) for name, inner in vars(value).items() if not name.startswith("_")}
    return str(value)


def _name(cls: Any) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _arrays(content: bytes) -> Any:
    """The arrays of a zip, without its time stamps and object ids; all bytes of other files."""
    if not zipfile.is_zipfile(io.BytesIO(content)):
        return _bytes(content)
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        return sorted(entry.CRC for entry in packed.infolist() if entry.filename.endswith(".npy"))


def _bytes(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=10).hexdigest()
