"""Smoothing of the explained network: softplus in place of rectifiers."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain.autograd.rectifiers import Softplus, require_rectifiers
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction, Positive
from robustexplain.interpreters import Smoothed, map_bound
from robustexplain.interpreters.composed.base import walk
from robustexplain.metrics import Spearman
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse
from .calibration import clean_inputs, least_that_holds, maps_of, predictions

LEAST, MOST = 0.01, 1000.0
"""The range of ``beta`` that a search looks at: the authors' code shows 1 to 10."""


@DEFENSES.register("beta-smoothing", paper="Dombrowski et al. 2019, section 5", needs=("rectifiers",))
@dataclass(frozen=True)
class BetaSmoothing(Defense):
    """Explain the network with softplus in place of rectifiers, whose bounded curvature bounds changes of the map.

    No training; the classifier and its predictions stay as they are. It costs one more forward pass per input. How far
    a smoothed gradient can move at most (:func:`robustexplain.interpreters.map_bound`) is said when it is made: the
    bound grows with ``beta``, and is far above what attacks reach.

    Args:
        beta: of ``softplus_beta``; the smaller, the smoother and the less faithful (the paper shows 10, 3, 1); or
            ``auto``: the least whose maps keep a rank correlation of ``correlation`` with the unsmoothed ones.
        correlation: mean Spearman's correlation over the defense's samples, of magnitudes; for ``auto``.
        images: how many of the defense's samples ``auto`` looks at.
        batch_size: of them at once.
    """

    beta: Positive | Literal["auto"] = 1.0
    correlation: Fraction = field(default=0.8, kw_only=True)
    images: Count = field(default=64, kw_only=True)
    batch_size: Count = field(default=32, kw_only=True)

    layer = "interpreter"
    wraps: ClassVar[bool] = True

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether ``beta`` is searched for."""
        return self.beta == "auto"

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        base = system.interpreter
        refuse(any(isinstance(part, Smoothed) for part in walk(base)), "the interpreter is smoothed already")
        sample = clean_inputs(system, data, 1, self.seed) if data is not None and len(data) else None
        if sample is not None:
            require_rectifiers(system.model, sample, "beta-smoothing")
        beta = self.beta if isinstance(self.beta, (int, float)) else self._searched(system, data, session)
        smoothed = Smoothed(system.model, base, Softplus(beta))
        if sample is not None:
            words = _bound_in_words(smoothed, sample)
            if words:
                session.progress.say(f"beta-smoothing: {words}")
        return replace(system, interpreter=smoothed)

    def _searched(self, system: System, data: Samples | None, session: Session) -> float:
        x = clean_inputs(system, data, self.images, self.seed)
        classes = predictions(system.model, x, self.batch_size)
        plain = maps_of(system.interpreter, x, classes, self.batch_size)
        correlation = Spearman(magnitude=True)

        def agreement(beta: float) -> float:
            smoothed = Smoothed(system.model, system.interpreter, Softplus(beta))
            values = correlation(maps_of(smoothed, x, classes, self.batch_size), plain)
            if bool(values.isnan().all()):
                raise InputError("every map is constant: there is no rank correlation to hold")
            return float(values.double().nanmean())

        try:
            beta, found = least_that_holds(agreement, self.correlation, LEAST, MOST)
        except InputError as error:
            raise InputError(f"BetaSmoothing.correlation: no beta holds it: {error}") from None
        session.progress.say(f"beta-smoothing: beta {beta:g}, rank correlation {found:.3f} on {len(x)} inputs")
        return beta


def _bound_in_words(smoothed: Smoothed, x: Tensor) -> str:
    """How far the map can move, relative to its own size on ``x``; empty where no bound is known."""
    try:
        bound = map_bound(smoothed, x)
    except InputError:
        return ""
    with torch.no_grad():
        size = float(smoothed.explain(x).maps.norm())
    return (
        f"a map moves by at most {bound:.3g} for a unit of the input (L2), of a map of norm {size:.3g} here: "
        f"{bound / size:.3g} of it"
    )
