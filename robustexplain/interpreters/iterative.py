"""Interpreters whose map results from an optimisation, with the interface that attacks on their steps use."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from ..random_streams import Streams


class MaskState(NamedTuple):
    """A mask ``m`` ``[B, h, w]`` during its optimisation (1 keeps), Adam's two moments, and the steps so far.

    RelEx's mask has channels, ``[B, C, H, W]``; its momentum is ``first``, and ``second`` is not used.
    """

    mask: Tensor
    first: Tensor
    second: Tensor
    step: int = 0

    def select(self, rows: Tensor) -> MaskState:
        """The state of some samples."""
        return MaskState(self.mask[rows], self.first[rows], self.second[rows], self.step)

    def copy(self) -> MaskState:
        """A copy that shares no memory."""
        return MaskState(self.mask.clone(), self.first.clone(), self.second.clone(), self.step)

    def store(self, rows: Tensor, state: MaskState) -> None:
        """Overwrite the state of some samples."""
        for whole, part in zip(self[:3], state[:3], strict=True):
            whole[rows] = part


@runtime_checkable
class IterativeInterpreter(Protocol):
    """What a bilevel attack needs of an interpreter whose ``iterative`` is true: its own steps, differentiable."""

    @property
    def steps(self) -> int:
        """The largest number of steps."""
        ...

    @property
    def seed(self) -> int:
        """The random seed of its steps."""
        ...

    def optimise(self, x: Tensor, classes: Tensor) -> MaskState:
        """The state at the end of its own optimisation, detached."""
        ...

    def begin(self, x: Tensor) -> MaskState:
        """The state before the first step."""
        ...

    def background(self, x: Tensor) -> Tensor:
        """What replaces ``x`` where the mask is 0, ``[B, C, H, W]``; differentiable in ``x``."""
        ...

    def shifts(self, x: Tensor, streams: Streams) -> Tensor | None:
        """What is drawn at random for a step, for each sample (MASK: a shift; RelEx: noise); ``None`` for nothing."""
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
        """The map ``[B, h, w]`` of a state."""
        ...
