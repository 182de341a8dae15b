"""Threat models: the variable of an attack, its projection, and how it is applied to the input."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

from robustexplain import maps as ops
from robustexplain.fields import Eps, Radius, check_fields
from robustexplain.random_streams import Streams
from robustexplain.rounding import is_half, toward, wide

Norm = Literal["linf", "l2"]
"""The norm in which the size of a change is measured."""


@dataclass(frozen=True)
class Threat(ABC):
    """A set of allowed inputs around ``x``. For norm balls the variable is the attacked image itself."""

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def summary(self) -> str:
        """A few words for tables."""
        return type(self).__name__

    @property
    def norm(self) -> Norm | None:
        """The norm, if the threat model is a norm ball; else ``None``."""
        return None

    def bind(self, x: Tensor, streams: Streams) -> Threat:
        """This threat model bound to the samples ``x``, with its random choices (a patch's place) drawn for each."""
        return self

    def select(self, rows: Tensor) -> Threat:
        """A bound threat model for the samples at ``rows``."""
        return self

    @property
    def random(self) -> bool:
        """Whether :meth:`redrawn` changes anything."""
        return False

    @property
    def region(self) -> Tensor | None:
        """``[B, H, W]``: 1 where this bound threat model may change the input, else 0; ``None``: everywhere."""
        return None

    def redrawn(self, x: Tensor, seed: int) -> Threat:
        """This bound threat model with its random choices (a patch's place) drawn again."""
        return self

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """The initial variable: no change, or with ``streams`` a random allowed one."""
        return x.clone() if streams is None else self.project(x, self.sample(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The attacked input ``[B, C, H, W]`` for ``variable``."""
        return variable

    def begun(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """:meth:`start`, as a search holds it from step to step: see :meth:`held`."""
        return self.start(x, streams)

    def held(self, x: Tensor, variable: Tensor) -> Tensor:
        """:meth:`project`, as a search holds the variable from step to step.

        Of inputs in half precision a norm ball's has more: a step that is smaller than their rounding would be lost.
        """
        return self.project(x, variable)

    @abstractmethod
    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """The nearest allowed variable; the attacked input stays in ``[0, 1]``."""

    @abstractmethod
    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """A random variable within the set, before projection onto ``[0, 1]``."""


@dataclass(frozen=True)
class _Ball(Threat):
    """A norm ball, whose variable is the attacked image: of an image in half precision, in float32."""

    def begun(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """The start in float32 at least."""
        return wide(self.start(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The image in its own precision, no farther from ``x`` than the variable, with the identity's gradient."""
        if variable.dtype == x.dtype or not is_half(x):
            return variable
        near = variable.to(x.dtype)
        return near + (toward(x, variable.detach()) - near.detach())


@dataclass(frozen=True)
class Linf(_Ball):
    """``max |x' - x| <= eps``, in the units of ``[0, 1]`` pixels; ``bind`` precomputes ``sides``.

    Examples:
        >>> import torch
        >>> from robustexplain.attacks import Linf
        >>> x, wanted = torch.tensor([[[[0.5, 0.95]]]]), torch.tensor([[[[0.8, 1.2]]]])
        >>> Linf(eps=0.1).project(x, wanted)
        tensor([[[[0.6000, 1.0000]]]])
    """

    eps: Eps = 8 / 255
    sides: tuple[Tensor, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def norm(self) -> Norm:
        """``linf``."""
        return "linf"

    def bind(self, x: Tensor, streams: Streams) -> Linf:
        """The same ball with its ``sides``, the clipped ends of the box around ``x``, computed once."""
        return replace(self, sides=self._sides(x))

    def select(self, rows: Tensor) -> Linf:
        """The ball around the images at ``rows``."""
        return self if self.sides is None else replace(self, sides=(self.sides[0][rows], self.sides[1][rows]))

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip to the box around ``x`` and to ``[0, 1]``."""
        low, high = self._sides(x) if self.sides is None else self.sides
        return variable.clamp(low, high).to(x.dtype)

    def held(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clipped likewise, in the variable's own precision."""
        if not is_half(x):
            return self.project(x, variable)
        low, high = self._sides(x) if self.sides is None else self.sides
        return variable.clamp(low.to(variable.dtype), high.to(variable.dtype))

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform in the box."""
        return x + streams.uniform(x, -self.eps, self.eps)

    def _sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if is_half(x):
            low, high = ((x.double() + side).clamp(0, 1) for side in (-self.eps, self.eps))
            return toward(x, low), toward(x, high)
        return (x - self.eps).clamp(0, 1), (x + self.eps).clamp(0, 1)


@dataclass(frozen=True)
class L2(_Ball):
    """``||x' - x||_2 <= eps`` over all pixels and channels of an image with values in ``[0, 1]``."""

    eps: Radius = 0.5

    @property
    def norm(self) -> Norm:
        """``l2``."""
        return "l2"

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Project onto the ball, then clip to ``[0, 1]`` (which never increases the distance to ``x``)."""
        inside = self._inside(x, variable)
        return toward(x, inside) if is_half(x) else inside

    def held(self, x: Tensor, variable: Tensor) -> Tensor:
        """Projected likewise, in float32 at least."""
        return self._inside(x, variable) if is_half(x) else self.project(x, variable)

    def _inside(self, x: Tensor, variable: Tensor) -> Tensor:
        start = wide(x)
        delta = variable - start
        norm = ops.expand(delta.flatten(1).norm(dim=1), delta)
        return (start + delta * (self.eps / norm.clamp(min=1e-12)).clamp(max=1)).clamp(0, 1)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform in direction, on the sphere."""
        noise = wide(streams.normal(x))
        return x + noise * (self.eps / ops.expand(noise.flatten(1).norm(dim=1), noise))
