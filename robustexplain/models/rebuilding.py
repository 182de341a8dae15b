"""Modules as JSON and back, without code: a name of a builder, its options, and the modules that it is made of."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import InputError, UnknownNameError
from ..registry import MODELS, PARTS
from .classifier import ModelSpec
from .loading import PREFIXES, build

LIKE = {"like": "the deployed model"}
"""Describes a module that no registered builder makes, but that is built as the deployed model is."""


def describe(module: nn.Module, deployed: nn.Module | None = None) -> dict[str, Any]:
    """A module without its weights, as JSON that :func:`rebuild` reads.

    Args:
        module: made by a registered builder (it has a ``spec``), or built as ``deployed`` is.
        deployed: the classifier that is there when the module is rebuilt.

    Raises:
        InputError: neither of both, or layers that were changed after the builder made them.
    """
    spec = getattr(module, "spec", None)
    if spec is not None:
        described = {"name": spec.name, "options": _described(spec.options, deployed)}
        _check_unchanged(module, rebuild(described, deployed=deployed))
        return described
    if deployed is not None and _built_alike(module, deployed):
        return dict(LIKE)
    raise InputError(
        f"{type(module).__name__} cannot be saved: it was not made by a registered builder and is not built as the "
        "deployed model is, so nothing could rebuild it without code; build it with robustexplain.models, or register "
        "its builder"
    )


def rebuild(spec: ModelSpec | Mapping[str, Any], *, deployed: nn.Module | None = None) -> nn.Module:
    """The module that :func:`describe` described, with random weights: nothing is downloaded, no weights are read.

    Names are looked up among the models (``timm:NAME``, ``torchvision:NAME``, ``hf:NAME`` too), then among the parts.
    Options that describe modules are rebuilt first, at any depth, and handed to the builder as modules.

    Args:
        spec: a :class:`ModelSpec`, or ``{"name": ..., "options": {...}}``.
        deployed: the classifier that a module of no registered builder is a copy of.

    Raises:
        UnknownNameError: with the nearest names.
        InputError: options that the builder refuses; a copy of a model that is not there.
    """
    described = {"name": spec.name, "options": spec.options} if isinstance(spec, ModelSpec) else dict(spec)
    if described == LIKE:
        if deployed is None:
            raise InputError("a part was built as the deployed model is, which is not there; pass model=your_model")
        return copy.deepcopy(deployed)
    name, options = described["name"], _rebuilt(described["options"], deployed)
    if not isinstance(name, str) or not isinstance(options, dict):
        raise InputError(f"a module is described by a name and options, got {described!r:.200}")
    made: Any
    if name in MODELS or name.partition(":")[0] in PREFIXES:
        made = build(name, **options)
    elif name in PARTS:
        made = _part(name, options)
    else:
        raise UnknownNameError("model", name, [entry.name for kind in (MODELS, PARTS) for entry in kind])
    if not isinstance(made, nn.Module):
        raise InputError(f"{name!r} does not name a module")
    return made


def _check_unchanged(module: nn.Module, rebuilt: nn.Module) -> None:
    """Refuse a module whose layers are others than its builder makes: it would come back as another function."""
    for own, made in zip_longest(repr(module).splitlines(), repr(rebuilt).splitlines(), fillvalue="nothing"):
        if own != made:
            raise InputError(
                f"{type(module).__name__} cannot be saved: it was changed after its builder made it ({own.strip()} in "
                f"place of {made.strip()}), and would come back unchanged; register a builder for it, or set its spec "
                "to None and load with model=your_model"
            )
    extra = sorted(set(module.state_dict()) - set(rebuilt.state_dict()))
    if odd := [name for name in extra if name.endswith("_orig") or "parametrizations." in name]:
        raise InputError(
            f"{type(module).__name__} cannot be saved: its weights have other names than its builder gives them "
            f"({odd[0]!r}), as pruning and parametrisations make them; take these off first (prune.remove), or set its "
            "spec to None and load with model=your_model"
        )


def _part(name: str, options: dict[str, Any]) -> Any:
    try:
        # Random weights that are overwritten anyway must not move the global random state.
        with torch.random.fork_rng(devices=[]):
            return PARTS.get(name).build(**options)
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"part {name!r} cannot be made with options {', '.join(options) or 'none'}: {error}"
        ) from error


def _described(value: Any, deployed: nn.Module | None) -> Any:
    if isinstance(value, nn.Module):
        return describe(value, deployed)
    if isinstance(value, ModelSpec):
        return {"name": value.name, "options": _described(value.options, deployed)}
    if isinstance(value, Mapping):
        return {key: _described(inner, deployed) for key, inner in value.items()}
    return [_described(inner, deployed) for inner in value] if isinstance(value, (list, tuple)) else value


def _rebuilt(value: Any, deployed: nn.Module | None) -> Any:
    if isinstance(value, (ModelSpec, Mapping)):
        if isinstance(value, ModelSpec) or value == LIKE or value.keys() == {"name", "options"}:
            return rebuild(value, deployed=deployed)
        return {key: _rebuilt(inner, deployed) for key, inner in value.items()}
    return [_rebuilt(inner, deployed) for inner in value] if isinstance(value, (list, tuple)) else value


def _built_alike(module: nn.Module, deployed: nn.Module) -> bool:
    """Whether two modules have the same classes with the same printed settings, and weights of the same shapes."""
    shapes = [{name: value.shape for name, value in m.state_dict().items()} for m in (module, deployed)]
    return type(module) is type(deployed) and repr(module) == repr(deployed) and shapes[0] == shapes[1]


class _Limit(TorchDispatchMode):
    """Refuses to create tensors with more numbers than a limit in all, before memory is allocated."""

    def __init__(self, limit: int, message: str) -> None:
        super().__init__()
        self.limit, self.message, self.created = limit, message, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        sizes = [_count(arg) for arg in args if not isinstance(arg, torch.Tensor)]
        largest = max(sizes, default=0)
        # Calls without tensor arguments, like torch.empty, create one; others create no more than their size arguments.
        if not any(isinstance(arg, torch.Tensor) for arg in args):
            self.created += largest
        if max(largest, self.created) > self.limit:
            raise InputError(self.message)
        return func(*args, **(kwargs or {}))


def _count(size: Any) -> int:
    if isinstance(size, (list, tuple)) and all(type(side) is int for side in size):
        return abs(math.prod(size))
    return abs(size) if type(size) is int else 0


@contextmanager
def at_most(numbers: int, message: str) -> Iterator[None]:
    """Within the block at most this many numbers are created in tensors: more raises an ``InputError``.

    Args:
        numbers: the limit.
        message: the error's message.
    """
    with _Limit(numbers, message):
        yield
