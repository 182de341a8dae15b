"""Smoothing of any interpreter: the mean of its maps over noisy copies of the input."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch

from robustexplain.errors import InputError
from robustexplain.fields import Count, NonNegative, Positive
from robustexplain.interpreters import Interpreter, KernelSmoothed
from robustexplain.interpreters.composed.base import walk
from robustexplain.interpreters.gradients.smoothgrad import Noise
from robustexplain.metrics import Infidelity, MaxSensitivity
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse
from .calibration import clean_inputs, maps_of, predictions

WIDTHS = (0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
"""The widths that a search compares, in the input's units."""


@DEFENSES.register("kernel-smoothing", paper="Yeh et al. 2019 (smoothed explanations)")
@dataclass(frozen=True)
class KernelSmoothing(Defense):
    """Replace the map by its mean over noisy copies of the input, which moves less and fits the model less closely.

    No training. Works for any interpreter (:class:`robustexplain.interpreters.KernelSmoothed`); the cost is that of
    ``samples`` maps.

    Args:
        width: of the kernel: the standard deviation of the noise, half its width if it is uniform; or ``auto``: of
            0.01 to 0.3, that with the least max-sensitivity whose infidelity is at most ``1 + loss`` times that of the
            unsmoothed map, as means over the defense's samples.
        samples: noisy copies.
        noise: the kernel.
        loss: how much infidelity ``auto`` gives up, relative; infidelity is that of maps at their best scale.
        images: how many of the defense's samples ``auto`` looks at.
        batch_size: largest number of copies in one pass.
    """

    width: Positive | Literal["auto"] = 0.1
    samples: Count = 20
    noise: Noise = "gaussian"
    loss: NonNegative = field(default=0.1, kw_only=True)
    images: Count = field(default=16, kw_only=True)
    batch_size: Count = field(default=64, kw_only=True)

    layer = "interpreter"
    wraps: ClassVar[bool] = True

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether the width is searched for."""
        return self.width == "auto"

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        own = system.interpreter
        refuse(any(isinstance(part, KernelSmoothed) for part in walk(own)), "the interpreter is smoothed already")
        width = self.width if isinstance(self.width, (int, float)) else self._searched(system, data, session)
        return replace(system, interpreter=self._smoothed(system, width))

    def _smoothed(self, system: System, width: float) -> KernelSmoothed:
        return KernelSmoothed(
            system.model,
            system.interpreter,
            width,
            self.noise,
            samples=self.samples,
            seed=self.seed,
            batch_size=self.batch_size,
        )

    def _searched(self, system: System, data: Samples | None, session: Session) -> float:
        x = clean_inputs(system, data, self.images, self.seed)
        classes = predictions(system.model, x, self.batch_size)
        infidelity, sensitivity = Infidelity(scaled=True, seed=self.seed), MaxSensitivity(samples=5, seed=self.seed)

        @torch.no_grad()
        def judged(interpreter: Interpreter) -> tuple[float, float]:
            maps = maps_of(interpreter, x, classes, self.batch_size)
            unfaithful = infidelity(system.model, x, maps, classes)
            return _mean(unfaithful), _mean(sensitivity(interpreter, x, classes))

        plain = judged(system.interpreter)
        best, chosen = plain, 0.0
        for width in WIDTHS:
            found = judged(self._smoothed(system, width))
            if found[0] <= (1 + self.loss) * plain[0] and found[1] < best[1]:
                best, chosen = found, width
        if not chosen:
            raise InputError(
                f"KernelSmoothing.width: no width of {WIDTHS[0]:g} to {WIDTHS[-1]:g} lowers the sensitivity "
                f"({plain[1]:.3g}) at an infidelity of at most {1 + self.loss:g} times {plain[0]:.3g}"
            )
        session.progress.say(
            f"kernel-smoothing: width {chosen:g}, infidelity {plain[0]:.3g} -> {best[0]:.3g}, "
            f"max-sensitivity {plain[1]:.3g} -> {best[1]:.3g} on {len(x)} inputs"
        )
        return chosen


def _mean(values: torch.Tensor) -> float:
    """The mean of the values that are finite; infinity if none is."""
    known = values[values.isfinite()].double()
    return float(known.mean()) if len(known) else math.inf
