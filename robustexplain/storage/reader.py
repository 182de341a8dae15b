"""From JSON, tensors and files back to a component: names are looked up, and every value is checked."""

from __future__ import annotations

import dataclasses
import inspect
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from ..errors import InputError
from ..fields import check_kinds
from ..models.rebuilding import at_most, rebuild
from ..models.weights import load_state
from ..renamed import FIELDS, PARTS, renamed
from .manifest import TREE, WEIGHTS
from .own_model import Weights, device_of, handed_in, in_precision_of
from .placed import Chain, as_stored
from .writer import KINDS

SPARE = 1 << 24
"""Numbers that a module may create beyond twice the stored ones, for buffers that are not stored."""


class Reader:
    """Rebuilds a component; the deployed classifier may be passed.

    Args:
        folder: where files of parts are.
        described: the content of ``system.json``, checked.
        tensors: the content of the weights file.
        model: the deployed classifier, for one that no registered builder makes.
        weights: whose weights it deploys.
    """

    def __init__(
        self,
        folder: Path,
        described: dict[str, Any],
        tensors: dict[str, Tensor],
        model: nn.Module | None,
        weights: Weights,
    ) -> None:
        self.folder, self.specs, self.files = folder, described["modules"], described["files"]
        self.around: Chain | None = described.get("around")  # earlier versions did not write it
        self.tensors, self.model, self.weights = tensors, model, weights
        self.device = device_of(model)
        self.modules: dict[int, nn.Module] = {}
        self._copies: dict[str, Tensor] = {}

    def decode(self, value: Any) -> Any:
        """The value that the writer encoded; lists become tuples."""
        if isinstance(value, list):
            return tuple(self.decode(item) for item in value)
        if not isinstance(value, dict):
            return value
        if "module" in value:
            return self._module(value["module"])
        if "tensor" in value:
            return self._tensor(f"tensor.{value['tensor']}")
        if "map" in value:
            return {key: self.decode(item) for key, item in value["map"].items()}
        return self._component(value)

    def _component(self, value: dict[str, Any]) -> Any:
        registry = KINDS.get(value["kind"])
        if registry is None:
            raise InputError(f"{self.folder / TREE} names a component of unknown kind {value['kind']!r}")
        name = value["name"]
        cls: Any = registry.get(name).build
        if "file" in value:
            return self._from_file(cls, name, value["file"])
        if not inspect.isclass(cls) or not dataclasses.is_dataclass(cls):
            raise InputError(f"{self.folder / TREE}: {name!r} is no component that is described by fields")
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for unknown in value["fields"].keys() - set(known):
            hint = renamed(unknown, FIELDS | PARTS) or f"; it has: {', '.join(known)}"
            raise InputError(f"{self.folder / TREE}: {name!r} has no field {unknown!r} in this version{hint}")
        made = cls(**{key: self.decode(item) for key, item in value["fields"].items()})
        check_kinds(made)
        return made

    def _from_file(self, cls: Any, name: str, file: str) -> Any:
        if file not in self.files or not hasattr(cls, "from_bytes"):
            raise InputError(f"{self.folder / TREE}: {name!r} is not stored in a file {file!r} of this system")
        path = self.folder / file
        try:
            return cls.from_bytes(path.read_bytes())
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(f"{path} does not hold what {name!r} is stored as: {error!r}") from error

    def _tensor(self, key: str) -> Tensor:
        if key not in self.tensors:
            raise InputError(f"{self.folder / TREE} names a tensor {key!r} that {WEIGHTS} does not hold")
        if key not in self._copies:
            # Aligned as torch's own tensors are: kernels round otherwise where memory begins elsewhere.
            self._copies[key] = self.tensors[key].to(self.device, copy=True)
        return self._copies[key]

    def _module(self, index: Any) -> nn.Module:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(self.specs):
            raise InputError(f"{self.folder / TREE} does not describe a system of this version: no module {index!r}")
        if index not in self.modules:
            self.modules[index] = self._made(index)
        return self.modules[index]

    def _made(self, index: int) -> nn.Module:
        prefix, source = f"{index}.", str(self.folder / WEIGHTS)
        state = {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}
        if index == 0 and self.model is not None:
            return handed_in(self._placed(self.model, state, source), state, self.weights, source)
        if self.specs[index] is None:
            raise InputError(
                f"the classifier in {self.folder} was not made by a registered builder: pass it as "
                "System.load(folder, model=your_model); its weights are compared with those in the folder"
            )
        deployed = self._module(0) if index else None
        with self._no_larger(self.specs[index], state):
            module = rebuild(self.specs[index], deployed=deployed)
        module = in_precision_of(state, module).to(self.device)
        load_state(module, state, source)
        return module.requires_grad_(False).eval()

    def _placed(self, model: nn.Module, state: dict[str, Tensor], source: str) -> nn.Module:
        """The model that was handed in, with what stood around it; as it is for a folder that does not say."""
        if self.around is None:
            return model
        with self._no_larger(self.around, state):
            made = as_stored(model, self.around, state, source)
        return made if made is model else made.to(self.device)

    def _no_larger(self, described: Any, state: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Within the block nothing is made that is far larger than what is stored of it."""
        stored = sum(value.numel() for value in state.values())
        message = f"{self.folder / TREE} describes {described!r:.200}, far larger than the {stored} stored numbers"
        return at_most(2 * stored + SPARE, message)
