"""Harmless changes: what reaches a system where there is no adversary.

A row's maps and alarms are calibrated on them: a forged map is plausible if it is no further from the map that it
should resemble than such changes move the map. They are components of a recipe: ``{name: uniform-noise, eps: 2/255}``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import Self

from .. import checks
from ..checks import Kind
from ..errors import InputError
from ..fields import check_fields
from ..random_streams import Streams
from ..registry import HARMLESS
from ..schema import make


@dataclass(frozen=True)
class HarmlessChange(ABC):
    """A change of inputs that an honest world makes: ``change(x, seed=0)`` gives inputs of the same shape and range.

    Each sample's draws come from its own random stream. A subclass is a frozen dataclass, registered in ``HARMLESS``.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """The kinds of input that it changes."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, x: Tensor, seed: int = 0) -> Tensor:
        """The changed inputs, ``[B, C, H, W]`` in ``[0, 1]`` (tables ``[B, D]``).

        Raises:
            InputError: bad ``x``, or of a kind that it does not take.
        """
        checks.inputs(x)
        name = HARMLESS.name_of(type(self))
        checks.kind(x, self.takes, name)
        changed = self._changed(x, Streams.of(x, seed, name))
        if changed.shape != x.shape:
            raise InputError(f"{name} must keep the shape {list(x.shape)}, got {list(changed.shape)}")
        return changed

    @abstractmethod
    def _changed(self, x: Tensor, streams: Streams) -> Tensor:
        """The changed inputs; ``x`` is checked."""

    def fitted(self, x: Tensor) -> Self:
        """The change for data of which ``x`` are samples; itself where nothing depends on them."""
        return self

    @property
    def entry(self) -> dict[str, Any]:
        """As a recipe writes it."""
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.metadata.get("recipe", True)}
        return {"name": HARMLESS.name_of(type(self)), **own}

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> HarmlessChange:
        """The change that an entry of a recipe describes: a name, or a mapping with a name and settings.

        Raises:
            InputError: an unknown name, or a setting that it does not have.
        """
        if isinstance(entry, HarmlessChange):
            return entry
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise InputError(f"{path}: a name, or a mapping with a name, is needed, got {entry!r}")
        try:
            build: Any = HARMLESS.get(entry["name"]).build
        except InputError as error:
            raise InputError(f"{path}.name: {error}") from None
        made: HarmlessChange = make(build, {k: v for k, v in entry.items() if k != "name"}, path)
        return made
