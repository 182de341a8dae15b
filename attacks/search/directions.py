"""Which way a search goes: along a gradient (of the real system, a stand-in, an average), or along an estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.autograd.rectifiers import Smooth, Softplus, swapped
from robustexplain.autograd.straight_through import straight_through
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.fields import Count, Positive, check_fields
from robustexplain.objectives import Goal, Objective, Observation, needs_of, sum_losses
from robustexplain.random_streams import Streams, derive
from robustexplain.system import System

from ..threat import Threat


def observe(system: System, x: Tensor, goal: Goal, needs: frozenset[str]) -> Observation:
    """One look at the system: logits always, maps (of the goal's target, on their own grid) and score if needed."""
    score = None
    if "score" in needs:
        if system.detector is None:
            raise InputError("this objective needs a system with a detector, and the system has none")
        score = system.detector.soft_score(x)
    if "maps" not in needs:
        return Observation(x, system.model(x), score=score, system=system)
    found = system.interpreter.explain(x, goal.target, native=True)
    return Observation(x, *found, score=score, system=system)


@dataclass(frozen=True)
class StepContext:
    """What is fixed while one step is taken, for the samples that are still searched for."""

    system: System
    threat: Threat
    goal: Goal
    objective: Objective
    streams: Streams
    progress: float
    tick: int = 0
    """How many steps the search took before this one: what redraws are seeded by."""

    def place(self, variable: Tensor) -> Tensor:
        """The inputs that the variable stands for."""
        return self.threat.apply(self.goal.x, variable)

    def observe(self, variable: Tensor, x: Tensor | None = None) -> Observation:
        """One look at the system through the threat model; at ``x``, if the inputs are made already."""
        x = self.place(variable) if x is None else x
        seen = observe(self.system, x, self.goal, needs_of(self.objective))
        region = self.threat.region
        return replace(seen, variable=variable, progress=self.progress, streams=self.streams, region=region)

    def loss(self, seen: Observation) -> Tensor:
        """The objective's loss, ``[B]``."""
        return sum_losses(self.objective.terms(), seen, self.goal)


@dataclass(frozen=True)
class DirectionResult:
    """What a direction found.

    Args:
        gradient: like the variable; the search goes against it.
        loss: ``[B]``, as seen on the way (a stand-in's loss, where one is followed).
        seen: the look that was taken, if it was at the real system; ``None`` otherwise.
        no_map_gradient: ``[B]`` bool, where the map's part of the gradient is exactly zero.
        queries: how many inputs were shown to the system for each sample.
    """

    gradient: Tensor
    loss: Tensor
    seen: Observation | None
    no_map_gradient: Tensor
    queries: int


class Direction(ABC):
    """Which way a search goes, and what finding out costs."""

    needs_graph: bool = True
    """Whether the system's maps and logits must be differentiable."""

    @property
    @abstractmethod
    def summary(self) -> str:
        """For tables: empty for the plain gradient."""

    @abstractmethod
    def __call__(self, problem: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """The direction at ``variable``; ``check`` asks whether the map's part of the gradient is zero."""


@dataclass(frozen=True)
class BetaSchedule:
    """A softplus that turns into a rectifier on the way: ``beta = start (end / start)^progress``.

    Dombrowski et al. 2019, section 3 (their code: 10 to 100).
    """

    start: Positive = 10.0
    end: Positive = 100.0

    def __post_init__(self) -> None:
        check_fields(self)

    def at(self, progress: float) -> Softplus:
        """The softplus at ``progress`` in ``[0, 1]``."""
        return Softplus(self.start * (self.end / self.start) ** progress)


@contextmanager
def followed(surrogate: Smooth | BetaSchedule | None, straight: bool, progress: float) -> Iterator[None]:
    """Within this block the model is the stand-in that a direction follows.

    Args:
        surrogate: what rectifiers compute; ``None`` leaves them as they are.
        straight: go straight through rounding.
        progress: of the search, for a stand-in that changes on the way.
    """
    smooth = surrogate.at(progress) if isinstance(surrogate, BetaSchedule) else surrogate
    with nullcontext() if smooth is None else swapped(smooth), straight_through() if straight else nullcontext():
        yield


@dataclass(frozen=True)
class GradientDirection(Direction):
    """The gradient, by one backward pass: of the system itself, or of a stand-in for it.

    Args:
        surrogate: what rectifiers compute while a direction is sought that looks at maps or scores; ``None`` follows
            the system itself.
        straight: go straight through rounding (see :mod:`robustexplain.autograd.straight_through`).
        draws: average the gradient over so many draws of the system's and the threat's randomness.
    """

    surrogate: Smooth | BetaSchedule | None = None
    straight: bool = False
    draws: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def summary(self) -> str:
        """The stand-in, and the average."""
        said = [type(self.surrogate).__name__] if self.surrogate is not None else []
        said += ["straight through"] if self.straight else []
        return ", ".join(said + ([f"mean of {self.draws} draws"] if self.draws > 1 else []))

    def __call__(self, problem: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """The gradient of the mean loss over the draws.

        Raises:
            NotDifferentiableError: if the maps carry no gradient.
            InputError: more than one draw of a system in which nothing is random.
        """
        if self.draws == 1:
            return self._once(problem, variable, check)
        if not (problem.system.random or problem.threat.random):
            raise InputError(f"draws={self.draws}: nothing in this system or threat model is random; use draws=1")
        steps = [self._once(_redrawn(problem, i), variable, check and not i) for i in range(self.draws)]
        gradient = torch.stack([step.gradient for step in steps]).mean(0)
        loss = torch.stack([step.loss for step in steps]).mean(0)
        return DirectionResult(gradient, loss, None, steps[0].no_map_gradient, self.draws)

    def _once(self, problem: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        variable = variable.detach().requires_grad_()
        # A stand-in is one for the model: what the threat model computes is none of it. And the prediction alone needs
        # no stand-in for rectifiers: it has its gradient.
        x, surrogate = problem.place(variable), self.surrogate if needs_of(problem.objective) else None
        with followed(surrogate, self.straight, problem.progress):
            seen = problem.observe(variable, x)
            stuck = _flat(problem, seen, variable) if check else torch.zeros_like(problem.goal.label, dtype=torch.bool)
            loss = problem.loss(seen)
            # The loss may hang on the weights and still not on the input.
            gradient = _grad_or_none(loss, variable, again=False)
            if gradient is None:
                raise NotDifferentiableError(
                    "the loss carries no gradient to the input: the model's graph is detached (no_grad, NumPy or "
                    "integers inside?); wrap such a step in StraightThrough, or use a search without gradients"
                )
        real = self.surrogate is None and not self.straight
        return DirectionResult(gradient, loss.detach(), seen if real and self.draws == 1 else None, stuck, 1)


@dataclass(frozen=True)
class EstimatedGradient(Direction):
    """A gradient estimated from losses alone: no gradient of model or interpreter is needed.

    ``1/n sum (L(v + sigma u) - L(v - sigma u)) / (2 sigma) u`` over pairs of antithetic points; ``u`` is normal (NES,
    Ilyas et al. 2018, Algorithm 1) or a vector of random signs (SPSA, Uesato et al. 2018, section 3.3). Inputs are
    clipped to ``[0, 1]`` before they are shown.

    Args:
        kind: ``nes`` or ``spsa``.
        samples: inputs shown for each sample and step, rounded up to whole pairs.
        sigma: how far from the variable, in its units.
    """

    kind: Literal["nes", "spsa"] = "nes"
    samples: Count = 50
    sigma: Positive = 0.001

    needs_graph = False

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def summary(self) -> str:
        """NES or SPSA."""
        return self.kind.upper()

    @torch.no_grad()
    def __call__(self, problem: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """The estimated gradient; where every difference was zero, it says so as a map gradient of zero."""
        pairs = (self.samples + 1) // 2
        total, loss = torch.zeros_like(variable), variable.new_zeros(len(variable))
        for _ in range(pairs):
            noise = problem.streams.normal(variable)
            noise = noise.sign() if self.kind == "spsa" else noise
            up, down = (self._loss(problem, variable + s * self.sigma * noise) for s in (1, -1))
            total += ops.expand(up - down, noise) * noise / (2 * self.sigma)
            loss += (up + down) / 2
        flat = (total.flatten(1) == 0).all(1)
        return DirectionResult(total / pairs, loss / pairs, None, flat if check else torch.zeros_like(flat), 2 * pairs)

    @staticmethod
    def _loss(problem: StepContext, variable: Tensor) -> Tensor:
        bounded = replace(problem, threat=ClippedThreat(problem.threat))
        return bounded.loss(bounded.observe(variable)).to(variable.dtype)


@dataclass(frozen=True)
class ClippedThreat(Threat):
    """A threat whose inputs are clipped to images before anybody sees them."""

    of: Threat

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The threat's input, clipped to ``[0, 1]``."""
        return self.of.apply(x, variable).clamp(0, 1)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """The threat's own projection."""
        return self.of.project(x, variable)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """The threat's own draw."""
        return self.of.sample(x, streams)

    @property
    def region(self) -> Tensor | None:
        """The threat's own region."""
        return self.of.region


def _redrawn(problem: StepContext, draw: int) -> StepContext:
    # Seeded by the step alone, not by the samples: a system draws one noise for all images, and a sample's result
    # must not depend on its batch.
    seed = derive(problem.tick, "redraw", draw)
    return replace(problem, system=problem.system.redrawn(seed), threat=problem.threat.redrawn(problem.goal.x, seed))


def _flat(problem: StepContext, seen: Observation, variable: Tensor) -> Tensor:
    """``[B]``: where the gradient of the objective's map part is exactly zero, and its loss is not."""
    terms = problem.objective.terms()
    about_maps = tuple((w, part) for w, part in terms if "maps" in part.needs and not part.constraint)
    if not about_maps:
        return torch.zeros_like(problem.goal.label, dtype=torch.bool)
    loss = sum_losses(about_maps, seen, problem.goal)
    alone = _grad_or_none(loss, variable)
    if alone is None:
        raise NotDifferentiableError("the maps carry no gradient to the input: their graph is detached")
    broken = ~torch.isfinite(alone).flatten(1).all(1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise InputError(
            f"the map of sample {first} of {len(alone)}, or its gradient, is NaN or infinite: no direction can "
            "come of it; does the model overflow on this input, or in this precision?"
        )
    return (alone.flatten(1).abs().amax(1) == 0) & (loss.detach() > sum(part.least for _, part in about_maps))


def _grad_or_none(loss: Tensor, variable: Tensor, *, again: bool = True) -> Tensor | None:
    """The gradient of the sum of ``loss``; ``None`` if the graph does not lead to the variable (to the weights it may).

    The graph is kept to be gone through ``again``.
    """
    if not loss.requires_grad:
        return None
    ones = torch.ones_like(loss)
    return torch.autograd.grad(loss, variable, ones, retain_graph=again, allow_unused=True)[0]
