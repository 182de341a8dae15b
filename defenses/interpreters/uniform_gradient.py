"""The gradient averaged uniformly over a neighbourhood."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

from robustexplain.fields import Count, Positive
from robustexplain.interpreters import Aggregate, Gradient, SmoothGrad
from robustexplain.interpreters.composed.base import innermost, walk, wrapped_like
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse


@DEFENSES.register("uniform-gradient", paper="Wang et al. 2020 (Smoothed geometry), stochastic smoothing")
@dataclass(frozen=True)
class UniformGradient(Defense):
    """Explain by the mean gradient over uniform noise around the input, whose jumps the mean evens out.

    No training. It is :class:`robustexplain.interpreters.SmoothGrad` with uniform noise, of what the system's own
    gradient differentiates and reduced as it is; the neighbourhood is the cube of the L-infinity radius ``radius``. The
    cost is that of ``samples`` gradients.

    Args:
        radius: of the neighbourhood.
        samples: noisy copies; with few of them the mean has jumps of its own, which an adaptive attack uses.
        batch_size: largest number of copies in one pass.
    """

    radius: Positive = 0.1
    samples: Count = 50
    batch_size: Count = field(default=64, kw_only=True)

    layer = "interpreter"
    defends: ClassVar[tuple[str, ...]] = ("gradient",)

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        own = system.interpreter
        refuse(
            any(isinstance(part, SmoothGrad) for part in walk(own)),
            "it averages over noisy copies already",
        )
        refuse(
            any(isinstance(part, Aggregate) for part in walk(own)),
            "the interpreter is an aggregate: apply uniform-gradient to the gradient first",
        )
        base = innermost(own)
        kind = type(base).__name__
        refuse(
            not isinstance(base, Gradient),
            f"uniform-gradient averages gradients, and the system explains by {kind}; see kernel-smoothing",
        )
        assert isinstance(base, Gradient)  # refused above; for the type checker
        refuse(
            base.layer is not None or base.pool != 1,
            "uniform-gradient averages the gradient by the input, not pooled, and the system explains by another: "
            f"layer {base.layer!r}, pool {base.pool}",
        )
        smooth = SmoothGrad(
            system.model, self.samples, self.radius, of=base.of, channels=base.channels, seed=self.seed,
            batch_size=self.batch_size, noise="uniform",
        )  # fmt: skip
        return replace(system, interpreter=wrapped_like(own, smooth))
