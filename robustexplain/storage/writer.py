"""From a component to JSON, tensors and files."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import InputError
from ..fingerprint import Blob
from ..hidden import refuse_hidden
from ..models.rebuilding import describe
from ..registry import DETECTORS, HARMLESS, INTERPRETERS, PARTS, Registry
from .placed import Chain, chain_of

KINDS: dict[str, Registry] = {r.kind: r for r in (INTERPRETERS, DETECTORS, PARTS, HARMLESS)}
"""Registries of the components that can be stored, by kind."""


class Writer:
    """Walks a component, giving every distinct module and tensor one entry, however often it appears."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.specs: list[dict[str, Any] | None] = []
        self.blobs: dict[str, bytes] = {}
        self._own: list[Tensor] = []

    def tensors(self) -> dict[str, Tensor]:
        """Weights of modules and tensors, by the keys that :meth:`encode` gave them."""
        weights = {f"{i}.{key}": value for i, m in enumerate(self.modules) for key, value in m.state_dict().items()}
        return weights | {f"tensor.{i}": value for i, value in enumerate(self._own)}

    @property
    def around(self) -> Chain:
        """What stands around the deployed classifier, which may be handed in on loading."""
        return chain_of(self.modules[0]) if self.modules else []

    def encode(self, value: Any) -> Any:
        """A component, or a value of one of its fields, as JSON.

        Raises:
            InputError: what no registered class makes, and what JSON cannot hold.
        """
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"a system with the number {value!r} in it cannot be saved: it must be finite")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self.encode(item) for item in value]
        if isinstance(value, Mapping):
            return {"map": self._mapping(value)}
        if isinstance(value, nn.Module):
            return {"module": self._module(value)}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        return self._component(value)

    def _mapping(self, value: Mapping[Any, Any]) -> dict[str, Any]:
        strange = [key for key in value if not isinstance(key, str)]
        if strange:
            raise InputError(f"a dict is saved by its keys, which must be strings, got {strange[0]!r}")
        return {key: self.encode(item) for key, item in value.items()}

    def _component(self, value: Any) -> dict[str, Any]:
        kind, name = _name_of(value)
        if isinstance(value, Blob):
            file = f"{name}-{len(self.blobs)}.bin"
            self.blobs[file] = value.to_bytes()
            return {"kind": kind, "name": name, "file": file}
        if not dataclasses.is_dataclass(value):
            raise InputError(f"{type(value).__name__} cannot be saved: it is no dataclass and has no to_bytes")
        fields = {f.name: self.encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"kind": kind, "name": name, "fields": fields}

    def _tensor(self, value: Tensor) -> int:
        for index, known in enumerate(self._own):
            if known is value:
                return index
        self._own.append(value)
        return len(self._own) - 1

    def _module(self, module: nn.Module) -> int:
        for index, known in enumerate(self.modules):
            if known is module:
                return index
        refuse_hidden(module, "a system is saved by the names of its modules")
        self.specs.append(describe(module, self.modules[0]) if self.modules else _described_or_not(module))
        self.modules.append(module)
        return len(self.modules) - 1


def _described_or_not(deployed: nn.Module) -> dict[str, Any] | None:
    """The deployed classifier comes first; one that no builder makes is passed again on loading."""
    try:
        return describe(deployed)
    except InputError:
        return None


def _name_of(value: Any) -> tuple[str, str]:
    for kind, registry in KINDS.items():
        for entry in registry:
            if entry.build is type(value):
                return kind, entry.name
    raise InputError(f"{type(value).__name__} cannot be saved: it is no registered component")
