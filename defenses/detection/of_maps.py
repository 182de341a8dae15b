"""What detectors that look at the maps of several interpreters share."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn
from typing_extensions import Self

from robustexplain.interpreters import Interpreter
from robustexplain.system import draws, redrawn

from .base import Detector


@dataclass(frozen=True, eq=False)
class MapsDetector(Detector):
    """A detector that looks at the maps of several interpreters, and is drawn again with them.

    Args:
        interpreters: the kinds of map, of the deployed model.
    """

    interpreters: tuple[Interpreter, ...]

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The models that are explained."""
        return tuple(interpreter.model for interpreter in self.interpreters)

    @property
    def random(self) -> bool:
        """Whether an interpreter uses random draws."""
        return any(map(draws, self.interpreters))

    def redrawn(self, seed: int) -> Self:
        """With other random draws of its interpreters."""
        return replace(self, interpreters=tuple(redrawn(i, seed) for i in self.interpreters))

    def following(self, model: nn.Module, copy: nn.Module) -> Self:
        """The same detector on the maps of ``copy``."""
        found = (i.with_shared_weights(copy) if i.model is model else i for i in self.interpreters)
        return replace(self, interpreters=tuple(found))
