"""Saving systems without code and without pickle: a JSON tree of registered components beside a safetensors file.

A folder holds ``system.json`` (what the parts are and how they fit together), ``weights.safetensors`` (their weights)
and a file for each part that has a safe format of its own. Loading looks names up in the registries; nothing in the
folder can name code.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from torch import Tensor, nn

from . import files
from ._version import __version__
from .errors import InputError, MissingDataError
from .models import build
from .models.weights import load_state
from .registry import DETECTORS, INTERPRETERS, PARTS, Registry

FORMAT = 1
TREE, WEIGHTS = "system.json", "weights.safetensors"

_STORED: dict[str, Registry] = {r.kind: r for r in (INTERPRETERS, DETECTORS, PARTS)}


@runtime_checkable
class Blob(Protocol):
    """A part with a safe binary format of its own, such as a forest."""

    def to_bytes(self) -> bytes:
        """The content of its file."""
        ...

    @classmethod
    def from_bytes(cls, content: bytes) -> Any:
        """The part, from the content of its file; must not run code from it."""
        ...


def save_component(component: Any, folder: Path) -> Path:
    """Write a component and all its parts into ``folder``; see :meth:`robustexplain.System.save`."""
    writer = _Writer()
    tree = writer.encode(component)
    # The tree goes first and comes last: a folder that is being overwritten holds no system, never half of two.
    (folder / TREE).unlink(missing_ok=True)
    for name, content in writer.blobs.items():
        files.replace_file(folder / name, lambda aside, content=content: aside.write_bytes(content))  # type: ignore[misc]
    files.write_tensors(folder / WEIGHTS, writer.tensors())
    described = {"format": FORMAT, "version": __version__, "modules": writer.specs, "tree": tree}
    files.write_json(folder / TREE, described)
    return folder


def load_component(folder: Path, *, model: nn.Module | None = None) -> Any:
    """Read what :func:`save_component` wrote; see :meth:`robustexplain.System.load`."""
    if not (folder / TREE).is_file() or not (folder / WEIGHTS).is_file():
        raise MissingDataError(f"{folder} holds no saved system: {TREE} and {WEIGHTS} are expected there")
    described = _described(folder / TREE)
    try:
        tensors, _ = files.read_tensors(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"{folder / WEIGHTS} is damaged: {error}") from error
    try:
        return _Reader(folder, described["modules"], tensors, model).decode(described["tree"])
    except FileNotFoundError as error:
        raise MissingDataError(f"{folder} is incomplete: {error.filename} is missing") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / TREE} does not describe a system of this version: {error!r}") from error


def _described(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}") from error
    found = described.get("format") if isinstance(described, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}; this version reads {FORMAT}")
    return dict(described)


class _Writer:
    """Walks a component, giving every distinct module one entry, however often it appears."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.specs: list[dict[str, Any] | None] = []
        self.blobs: dict[str, bytes] = {}
        self.plain: dict[str, Tensor] = {}

    def tensors(self) -> dict[str, Tensor]:
        weights = {f"{i}.{key}": value for i, m in enumerate(self.modules) for key, value in m.state_dict().items()}
        return weights | self.plain

    def encode(self, value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self.encode(item) for item in value]
        if isinstance(value, nn.Module):
            return {"module": self._module(value)}
        if isinstance(value, Tensor):
            key = f"tensor.{len(self.plain)}"
            self.plain[key] = value
            return {"tensor": key}
        kind, name = _name_of(value)
        if isinstance(value, Blob):
            file = f"{name}-{len(self.blobs)}.bin"
            self.blobs[file] = value.to_bytes()
            return {"kind": kind, "name": name, "file": file}
        fields = {f.name: self.encode(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"kind": kind, "name": name, "fields": fields}

    def _module(self, module: nn.Module) -> int:
        for index, known in enumerate(self.modules):
            if known is module:
                return index
        spec = getattr(module, "spec", None)
        if spec is None and self.modules:
            raise InputError(
                f"{type(module).__name__} cannot be saved: it was not made by a registered builder, so nothing could "
                "rebuild it without code; build it with robustexplain.models, or register its builder"
            )
        self.modules.append(module)
        self.specs.append(None if spec is None else {"name": spec.name, "options": spec.options})
        return len(self.modules) - 1


class _Reader:
    """Rebuilds a component; the deployed classifier may be handed in."""

    def __init__(
        self, folder: Path, specs: list[dict[str, Any] | None], tensors: dict[str, Tensor], model: nn.Module | None
    ) -> None:
        self.folder, self.specs, self.tensors, self.model = folder, specs, tensors, model
        self.modules: dict[int, nn.Module] = {}

    def decode(self, value: Any) -> Any:
        if isinstance(value, list):
            return tuple(self.decode(item) for item in value)
        if not isinstance(value, dict):
            return value
        if "module" in value:
            return self._module(value["module"])
        if "tensor" in value:
            return self.tensors[value["tensor"]]
        registry = _STORED.get(value["kind"])
        if registry is None:
            raise InputError(f"{self.folder / TREE} names a component of unknown kind {value['kind']!r}")
        cls = registry.get(value["name"]).build
        if "file" in value:
            return cls.from_bytes((self.folder / Path(value["file"]).name).read_bytes())  # type: ignore[attr-defined]
        return cls(**{key: self.decode(item) for key, item in value["fields"].items()})

    def _module(self, index: int) -> nn.Module:
        if index in self.modules:
            return self.modules[index]
        spec = self.specs[index]
        if index == 0 and self.model is not None:
            module = self.model
        elif spec is None:
            raise InputError(
                f"the classifier in {self.folder} was not made by a registered builder: pass it as "
                "System.load(folder, model=your_model); its weights are read from the folder"
            )
        elif spec["name"] in PARTS:
            module = PARTS.get(spec["name"]).build(**spec["options"])
        else:
            module = build(spec["name"], **spec["options"])
        prefix = f"{index}."
        weights = {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}
        load_state(module, weights, str(self.folder / WEIGHTS))
        self.modules[index] = module.requires_grad_(False).eval() if index else module.eval()
        return self.modules[index]


def _name_of(value: Any) -> tuple[str, str]:
    for kind, registry in _STORED.items():
        for entry in registry:
            if entry.build is type(value):
                return kind, entry.name
    raise InputError(f"{type(value).__name__} cannot be saved: it is no registered component")
