"""The modules of a component, found in its fields, and the component on another device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .errors import InputError

T = TypeVar("T")


def modules_of(part: Any) -> Iterator[nn.Module]:
    """Every module that a component holds, in its fields and in those of its parts; not the modules inside modules."""
    if isinstance(part, nn.Module):
        yield part
    elif isinstance(part, (list, tuple)):
        for item in part:
            yield from modules_of(item)
    elif isinstance(part, Mapping):
        yield from modules_of(tuple(part.values()))
    elif _has_fields(part):
        yield from modules_of([getattr(part, f.name) for f in fields(part)])


def moved(part: T, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> T:
    """A component on another device or in another floating-point dtype: modules in place, the rest copied.

    Raises:
        InputError: no such device, no floating-point dtype, or networks or tensors of a part that is no dataclass.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise InputError(f"dtype must be of floating point, such as torch.bfloat16, got {dtype!r}")
    try:
        place = None if device is None else torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, TypeError, AssertionError) as error:
        raise InputError(f"no device {device!r} here: {error}") from error
    _refuse_opaque(part)
    found: T = _moved(part, place, dtype, {})
    return found


def _refuse_opaque(part: Any) -> None:
    if isinstance(part, (nn.Module, Tensor)):
        return
    if isinstance(part, Mapping):
        part = tuple(part.values())
    if isinstance(part, (list, tuple)):
        for item in part:
            _refuse_opaque(item)
    elif _has_fields(part):
        _refuse_opaque([getattr(part, f.name) for f in fields(part)])
    else:
        for name, value in getattr(part, "__dict__", {}).items():
            if isinstance(value, (nn.Module, Tensor)):
                raise InputError(f"a {type(part).__name__} cannot be moved: it holds {name!r} and is no dataclass")


def _moved(part: Any, device: torch.device | None, dtype: torch.dtype | None, done: dict[int, Any]) -> Any:
    if isinstance(part, nn.Module):
        return part.to(device=device, dtype=dtype)
    if isinstance(part, Tensor):
        return part.to(device=device, dtype=dtype if part.is_floating_point() else None)
    if isinstance(part, (list, tuple)):
        inner = [_moved(item, device, dtype, done) for item in part]
        return type(part)(*inner) if hasattr(part, "_fields") else type(part)(inner)
    if isinstance(part, Mapping):
        return {key: _moved(item, device, dtype, done) for key, item in part.items()}
    if not _has_fields(part):
        return part
    # A part that appears twice stays one object. It is built again, which clears what it cached on the old device.
    if id(part) not in done:
        inside = {f.name: _moved(getattr(part, f.name), device, dtype, done) for f in fields(part) if f.init}
        done[id(part)] = replace(part, **inside)
    return done[id(part)]


def _has_fields(part: Any) -> bool:
    return is_dataclass(part) and not isinstance(part, type)
