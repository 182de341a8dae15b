"""Interpreters whose map is the end of an optimisation, as an attack sees them: step by step."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..random_streams import Streams


class MaskState(NamedTuple):
    """A mask ``m`` ``[B, h, w]`` on its way (1 keeps), Adam's two moments, and how many steps were taken."""

    mask: Tensor
    first: Tensor
    second: Tensor
    step: int = 0

    def select(self, rows: Tensor) -> MaskState:
        """The state of some samples."""
        return MaskState(self.mask[rows], self.first[rows], self.second[rows], self.step)

    def copy(self) -> MaskState:
        """The same, in memory of its own."""
        return MaskState(self.mask.clone(), self.first.clone(), self.second.clone(), self.step)

    def store(self, rows: Tensor, found: MaskState) -> None:
        """Overwrite the state of some samples."""
        for whole, part in zip(self[:3], found[:3], strict=True):
            whole[rows] = part


@runtime_checkable
class IterativeInterpreter(Protocol):
    """What a bilevel attack asks of an interpreter that says ``iterative``: differentiable steps of its own."""

    @property
    def steps(self) -> int:
        """How many steps it takes, at most."""
        ...

    @property
    def seed(self) -> int:
        """Of what is random in its steps."""
        ...

    def optimise(self, x: Tensor, classes: Tensor) -> MaskState:
        """The state at the end of its own optimisation, detached."""
        ...

    def begin(self, x: Tensor) -> MaskState:
        """The state before the first step."""
        ...

    def background(self, x: Tensor) -> Tensor:
        """What stands where the mask is 0, ``[B, C, H, W]``; differentiable in ``x``."""
        ...

    def shifts(self, x: Tensor, streams: Streams) -> Tensor | None:
        """What a step draws for each sample; ``None`` if nothing."""
        ...

    def step(
        self,
        x: Tensor,
        background: Tensor,
        state: MaskState,
        classes: Tensor,
        shift: Tensor | None = None,
        *,
        graph: bool = False,
    ) -> MaskState:
        """One step; with ``graph`` differentiable in ``x`` and in the old state."""
        ...

    def map_of(self, state: MaskState) -> Tensor:
        """The map ``[B, h, w]`` that a state shows."""
        ...
