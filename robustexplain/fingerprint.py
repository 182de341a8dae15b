"""A short hash of components of any class: settings, weights and tensors."""

from __future__ import annotations

import hashlib
import inspect
import io
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from types import CellType, CodeType, FunctionType
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from . import files
from .errors import InputError

LIBRARIES = frozenset(
    {"robustexplain", "torch", "torchvision", "timm", "accelerate", "captum", "numpy", "sklearn", "builtins"}
) | frozenset(sys.stdlib_module_names)
"""Whose code is told by its version, as that of everything that was installed; a user's script, by what it says."""
INSTALLED = {"site-packages", "dist-packages"}
OF_MODULES = frozenset(vars(nn.Module()))
"""What torch keeps in every module: hooks, weights, the mode."""


@runtime_checkable
class Blob(Protocol):
    """A part with its own safe binary format, such as a forest."""

    def to_bytes(self) -> bytes:
        """The content of its file."""
        ...

    @classmethod
    def from_bytes(cls, content: bytes) -> Any:
        """The part, from the content of its file; must not run code from it."""
        ...


def fingerprint(value: Any) -> str:
    """A hash of a component; equal in all processes for the same class, settings and weights.

    Of a dataclass, its class and fields; of a module, its class, weights and plain attributes (of private ones numbers
    and texts alone: others may be caches); of a function, its code, defaults and the values that it encloses; of a part
    with a binary format of its own, the arrays in it; of another object, its class and attributes (private ones only if
    plain). Of a class that was not installed, such as one in the user's script, also the code of its methods, and of
    functions and classes of that kind that they call by name.

    Raises:
        InputError: an object in it whose content cannot be told.
    """
    return files.digest(_plain(value))


def _plain(value: Any, above: tuple[int, ...] = ()) -> Any:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return files.digest_tensors({"": value})
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), _bytes(value.tobytes())]
    if isinstance(value, type):
        return _class(value, above)
    if id(value) in above:  # a function that calls itself, an object that holds its own method
        return ["above", len(above) - above.index(id(value))]
    above = (*above, id(value))
    if isinstance(value, nn.Module):
        return _module(value, above)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, above) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, above) for inner in value]
    if isinstance(value, (set, frozenset)):
        return sorted(files.digest(_plain(inner, above)) for inner in value)
    if isinstance(value, CodeType):
        return _code(value, above)
    if callable(value) and (isinstance(value, partial) or inspect.isroutine(value)):
        return _function(value, above)
    return [_class(type(value), above), _content(value, above)]


def _class(cls: type, above: tuple[int, ...]) -> Any:
    """A class by name; one of the user's also by its code, and by that of the user's classes that it stands on."""
    if not _is_own(cls) or id(cls) in above:
        return _name(cls)
    above = (*above, id(cls))
    said = {name: _member(name, member, above) for name, member in vars(cls).items()}
    bases = [_class(base, above) for base in cls.__bases__ if _is_own(base)]
    return [_name(cls), {name: found for name, found in said.items() if found is not None}, bases]


def _member(name: str, member: Any, above: tuple[int, ...]) -> Any:
    """The code of a method, or a plain attribute of a class; ``None`` for what Python made."""
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    if isinstance(member, property):
        return [_member(name, part, above) for part in (member.fget, member.fset, member.fdel)]
    if isinstance(member, cached_property):
        member = member.func
    if inspect.isfunction(member):
        # Dataclasses write their methods from the fields, which are told by their values.
        return None if member.__code__.co_filename == "<string>" else _method(member, above)
    # Such as the line that it begins in.
    return None if name.startswith("__") or not _scalar(member) else member


def _method(member: FunctionType, above: tuple[int, ...]) -> Any:
    try:
        return _function(member, above)
    except InputError:  # something odd among what it encloses or its defaults
        return _code(member.__code__, above)


def _is_own(value: Any) -> bool:
    """Whether a class or function is the user's, and not of something that was installed."""
    return _is_users(str(getattr(value, "__module__", "builtins")))


def _is_users(module: str) -> bool:
    file = getattr(sys.modules.get(module), "__file__", None)
    return module.split(".")[0] not in LIBRARIES and not (file and INSTALLED & set(Path(file).parts))


def _module(value: nn.Module, above: tuple[int, ...]) -> Any:
    weights = value.state_dict()
    hidden = {name: buffer for name, buffer in value.named_buffers() if name not in weights}
    own = {_name(kind): _class(kind, above) for kind in {type(part) for part in value.modules()} if _is_own(kind)}
    described = [_name(type(value)), own, str(getattr(value, "spec", None)), _bytes(repr(value).encode())]
    attributes = {
        f"{place}.{name}": _plain(inner, above)
        for place, part in value.named_modules()
        for name, inner in vars(part).items()
        if name not in OF_MODULES and (_scalar(inner) if name.startswith("_") else _simple(inner))
    }
    return [*described, files.digest_tensors(weights), files.digest_tensors(hidden), attributes]


def _function(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, partial):
        return ["partial", *(_plain(part, above) for part in (value.func, value.args, value.keywords))]
    if inspect.ismethod(value):
        return [_plain(value.__self__, above), _plain(value.__func__, above)]
    name = getattr(value, "__qualname__", repr(value))
    if not inspect.isfunction(value):
        owner = getattr(value, "__self__", None)
        return [
            str(getattr(value, "__module__", None)),
            name,
            None if inspect.ismodule(owner) else _plain(owner, above),
        ]
    enclosed = [_plain(_cell(cell), above) for cell in value.__closure__ or ()]
    known = {key: _plain(inner, above) for key, inner in _constants(value) if _simple(inner) or _is_code(inner)}
    given = [_plain(part, above) for part in (value.__defaults__, value.__kwdefaults__)]
    return [_name(value), _code(value.__code__, above), given, enclosed, known]


def _code(code: CodeType, above: tuple[int, ...]) -> Any:
    return [_bytes(code.co_code), list(code.co_names), [_plain(inner, above) for inner in code.co_consts]]


def _cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


def _constants(function: FunctionType) -> list[tuple[str, Any]]:
    """What stands in the function's file under names that it uses; of functions and classes only the user's."""
    found = function.__globals__
    used = ((name, found[name]) for name in _names(function.__code__) if name in found)
    return [(name, value) for name, value in used if not callable(value) or _is_code(value)]


def _names(code: CodeType) -> list[str]:
    """The names that code uses, also within functions that it makes."""
    inner = [name for part in code.co_consts if isinstance(part, CodeType) for name in _names(part)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _is_code(value: Any) -> bool:
    return (inspect.isfunction(value) or isinstance(value, type)) and _is_own(value)


def _simple(value: Any) -> bool:
    """Whether an attribute is a setting: a number, a text, an array, a function, or several of them."""
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_simple, value))
    if isinstance(value, Mapping):
        return all(map(_simple, value.values()))
    if value is None or isinstance(value, (bool, int, float, str, Tensor, np.ndarray, np.generic, partial)):
        return True
    return inspect.isroutine(value) or (is_dataclass(value) and not isinstance(value, type))


def _scalar(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_scalar, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _content(value: Any, above: tuple[int, ...]) -> Any:
    if isinstance(value, Blob):
        return _arrays(value.to_bytes())
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name), above) for f in fields(value) if f.init}
    if hasattr(value, "__dict__"):
        kept = {name: inner for name, inner in vars(value).items() if not name.startswith("_") or _simple(inner)}
        return {name: _plain(inner, above) for name, inner in kept.items()}
    said = repr(value)
    return said if " at 0x" not in said else _parts(value, above)


def _parts(value: Any, above: tuple[int, ...]) -> Any:
    """What an object says that a copy of it needs: its text names only where it is in memory."""
    try:
        made = value.__reduce_ex__(2)
    except TypeError:
        raise InputError(
            f"what is in {value!r:.80} cannot be told, so that nobody knows when it changed; hold its settings in a "
            "dataclass instead"
        ) from None
    return made if isinstance(made, str) else [_plain(part, above) for part in made[1:3]]


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
