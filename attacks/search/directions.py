"""Directions of a search: gradients of the system, of a surrogate or of an average, and estimated gradients."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.autograd.rectifiers import Smooth, Softplus, swapped
from robustexplain.autograd.second_derivatives import refuse_missing_derivatives
from robustexplain.autograd.straight_through import straight_through
from robustexplain.door import answer
from robustexplain.errors import InputError, NotDifferentiableError, ZeroDirectionWarning, ZeroMapGradientWarning
from robustexplain.fields import Count, Positive, check_fields
from robustexplain.hidden import refuse_hidden
from robustexplain.objectives import Goal, Objective, Observation, Weight, needs_of, sum_losses
from robustexplain.random_streams import Streams, derive
from robustexplain.rounding import wide
from robustexplain.system import System, draws

from ..threat import Threat


def observe(system: System, x: Tensor, goal: Goal, needs: frozenset[str]) -> Observation:
    """Evaluate the system: logits always; maps (of the goal's target, on their own grid) and score if needed."""
    score = None
    if "score" in needs:
        if system.detector is None:
            raise InputError("this objective needs a system with a detector, and the system has none")
        score = system.detector.soft_score(x)
    if "maps" not in needs:
        # Only a gradient cannot be had of NaN; a search that compares takes it for a failure (see ``best.rank``).
        logits = answer(system.model, x, finite=torch.is_grad_enabled())
        return Observation(x, logits, score=score, system=system)
    found = system.interpreter.explain(x, goal.target, native=True)
    return Observation(x, found.logits, found.maps, found.encoder_logits, score=score, system=system)


@dataclass(frozen=True)
class StepContext:
    """Everything that is fixed during one step, for the samples that the search has not finished."""

    system: System
    threat: Threat
    goal: Goal
    objective: Objective
    streams: Streams
    progress: float
    tick: int = 0
    """Number of steps before this one; seeds the redraws."""

    def place(self, variable: Tensor) -> Tensor:
        """The attacked inputs for ``variable``."""
        return self.threat.apply(self.goal.x, variable)

    def observe(self, variable: Tensor, x: Tensor | None = None) -> Observation:
        """Evaluate the system at the inputs for ``variable``; at ``x``, if they are computed already."""
        x = self.place(variable) if x is None else x
        seen = observe(self.system, x, self.goal, needs_of(self.objective))
        region = self.threat.region
        return replace(seen, variable=variable, progress=self.progress, streams=self.streams, region=region)

    @property
    def random(self) -> bool:
        """Whether the loss depends on random draws of the system or of the threat model."""
        needs, system = needs_of(self.objective), self.system
        parts = [system.model, *([system.interpreter] if "maps" in needs else [])]
        parts += [system.detector] if needs & {"score", "one detector's score"} else []
        return self.threat.random or any(map(draws, parts))

    def loss(self, seen: Observation) -> Tensor:
        """The objective's loss, ``[B]``."""
        return sum_losses(self.objective.terms(), seen, self.goal)


@dataclass(frozen=True)
class DirectionResult:
    """A direction and what its computation observed.

    Args:
        gradient: like the variable; the search steps against it.
        loss: ``[B]``, the loss computed with it (of the surrogate, if there is one).
        seen: the observation of the real system, if one was made; ``None`` otherwise.
        zero_direction: ``[B]`` bool, where the direction is zero: :attr:`Direction.zero_means` says why.
        queries: number of inputs evaluated by the system for each sample.
    """

    gradient: Tensor
    loss: Tensor
    seen: Observation | None
    zero_direction: Tensor
    queries: int


class Direction(ABC):
    """Gives the direction of a search step."""

    needs_graph: ClassVar[bool] = True
    """Whether the system's maps and logits must be differentiable."""
    zero_means: ClassVar[str] = "the search has no direction to go in"
    """End of a warning: why ``zero_direction`` is true, and what to do about it."""
    zero_warning: ClassVar[type[Warning]] = ZeroDirectionWarning
    """The category of that warning."""

    def zero_reason(self, objective: Objective) -> tuple[str, type[Warning]]:
        """Why ``zero_direction`` is true for the last stage's ``objective``, and the warning's category."""
        return self.zero_means, self.zero_warning

    @property
    @abstractmethod
    def summary(self) -> str:
        """A few words for tables; empty for the plain gradient."""

    @abstractmethod
    def __call__(self, context: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """The direction at ``variable``; with ``check``, ``zero_direction`` is computed, else it is false."""


@dataclass(frozen=True)
class BetaSchedule:
    """A softplus that approaches the rectifier during the search: ``beta = start (end / start)^progress``.

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
def as_surrogate(surrogate: Smooth | BetaSchedule | None, straight: bool, progress: float) -> Iterator[None]:
    """Within this block the model is replaced by its surrogate.

    Args:
        surrogate: replaces the rectifiers; ``None`` leaves them as they are.
        straight: straight-through gradients for rounding.
        progress: of the search, in ``[0, 1]``, for a :class:`BetaSchedule`.
    """
    smooth = surrogate.at(progress) if isinstance(surrogate, BetaSchedule) else surrogate
    with nullcontext() if smooth is None else swapped(smooth), straight_through() if straight else nullcontext():
        yield


_SCORES = frozenset({"score", "one detector's score"})
_FLAT_PREDICTION = (
    "the gradient of the prediction is exactly zero. Is there rounding in front of the model (go straight through it: "
    "adapt.straight), or is the model so confident that its cross-entropy underflows (use an attack on the margin)?"
)


@dataclass(frozen=True)
class GradientDirection(Direction):
    """The gradient by one backward pass, of the system itself or of a surrogate for it.

    Args:
        surrogate: replaces the rectifiers while the gradient of an objective on maps or scores is computed; ``None``
            uses the system itself.
        straight: straight-through gradients for rounding (see :mod:`robustexplain.autograd.straight_through`).
        draws: average the gradient over this many draws of the system's and the threat model's randomness.
        balanced: the gradient of the constraints and that of the other terms each at unit length, the latter without
            its part against the former (Yu et al. 2020, Algorithm 1): no weight between them is needed.
    """

    surrogate: Smooth | BetaSchedule | None = None
    straight: bool = False
    draws: Count = 1
    balanced: bool = False

    zero_means: ClassVar[str] = (
        "the map's gradient is exactly zero. A network of rectifiers has no second derivative: give the attack a "
        "surrogate (SmoothGradient, Softplus), or attack an interpreter that is not itself a gradient. A map that its "
        "own ReLU cut to zero has no gradient either, nor has one behind rounding, unless the attack goes straight "
        "through it (adapt.straight)"
    )
    zero_warning: ClassVar[type[Warning]] = ZeroMapGradientWarning

    def zero_reason(self, objective: Objective) -> tuple[str, type[Warning]]:
        """The map's gradient, or that of the prediction where the objective has no maps."""
        return super().zero_reason(objective) if _map_terms(objective) else (_FLAT_PREDICTION, ZeroDirectionWarning)

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def summary(self) -> str:
        """The surrogate, straight-through gradients, and the number of draws."""
        words = [type(self.surrogate).__name__] if self.surrogate is not None else []
        words += ["straight through"] if self.straight else []
        return ", ".join(words + ([f"mean of {self.draws} draws"] if self.draws > 1 else []))

    def __call__(self, context: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """The gradient of the mean loss over the draws; of one draw, if the loss does not depend on them.

        Raises:
            NotDifferentiableError: the maps have no gradient.
            InputError: more than one draw, and neither system nor threat model is random.
        """
        if self.draws > 1 and not (context.system.random or context.threat.random):
            raise InputError(f"draws={self.draws}: nothing in this system or threat model is random; use draws=1")
        if self.draws == 1 or not context.random:
            return self._once(context, variable, check)
        steps = [self._once(_redrawn(context, i), variable, check and not i) for i in range(self.draws)]
        gradient = torch.stack([step.gradient for step in steps]).mean(0)
        loss = torch.stack([step.loss for step in steps]).mean(0)
        return DirectionResult(gradient, loss, None, steps[0].zero_direction, self.draws)

    def _once(self, context: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        variable = variable.detach().requires_grad_()
        # The surrogate replaces rectifiers of the model only, so the threat model is applied outside of it. An
        # objective on the prediction alone needs no surrogate: its gradient does not vanish.
        x, surrogate = context.place(variable), self.surrogate if needs_of(context.objective) else None
        if surrogate is not None or self.straight:
            refuse_hidden(context.system.model, "a surrogate replaces function calls of the model")
        with as_surrogate(surrogate, self.straight, context.progress):
            seen = context.observe(variable, x)
            no = torch.zeros_like(context.goal.label, dtype=torch.bool)
            zero = _zero_map_gradient(context, seen, variable) if check else no
            if check:
                _warn_of_silent_score(context, seen, variable)
            loss = context.loss(seen)
            # The loss may have a gradient to the weights and none to the input.
            gradient = (_balanced if self.balanced else _whole)(context, seen, loss, variable)
            if gradient is None:
                raise NotDifferentiableError(
                    "the loss carries no gradient to the input: the model's graph is detached (no_grad, NumPy or "
                    "integers inside?); wrap such a step in StraightThrough, or use a search without gradients"
                )
        if check:
            _refuse_broken(gradient, "the loss")
        if check and not _map_terms(context.objective):
            with torch.no_grad():
                zero = (gradient.flatten(1) == 0).all(1) & ~context.objective.met(seen, context.goal)
        real = self.surrogate is None and not self.straight
        return DirectionResult(gradient, loss.detach(), seen if real else None, zero, 1)


@dataclass(frozen=True)
class EstimatedGradient(Direction):
    """A gradient estimated from losses alone: no gradient of model or interpreter is needed.

    ``1/n sum (L(v + sigma u) - L(v - sigma u)) / (2 sigma) u`` over pairs of antithetic points; ``u`` is normal (NES,
    Ilyas et al. 2018, Algorithm 1) or a vector of random signs (SPSA, Uesato et al. 2018, section 3.3). Inputs are
    clipped to ``[0, 1]`` before the system sees them.

    Args:
        kind: ``nes`` or ``spsa``.
        samples: queries for each sample and step, rounded up to whole pairs.
        sigma: scale of the random offsets, in units of the variable.
    """

    kind: Literal["nes", "spsa"] = "nes"
    samples: Count = 50
    sigma: Positive = 0.001

    needs_graph: ClassVar[bool] = False
    zero_means: ClassVar[str] = (
        "every difference of two losses was zero: what the system answers did not change within sigma of the input. "
        "Look farther (a larger sigma), or follow answers that are finer (probabilities instead of labels)"
    )

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def summary(self) -> str:
        """NES or SPSA."""
        return self.kind.upper()

    @torch.no_grad()
    def __call__(self, context: StepContext, variable: Tensor, check: bool) -> DirectionResult:
        """The estimated gradient, and where every difference was zero."""
        pairs = (self.samples + 1) // 2
        total = torch.zeros_like(wide(variable))
        loss = total.new_zeros(len(variable))
        for _ in range(pairs):
            noise = context.streams.normal(variable)
            noise = noise.sign() if self.kind == "spsa" else noise
            up, down = (self._loss(context, variable + s * self.sigma * noise) for s in (1, -1))
            # A pair with a point where the model answers NaN says nothing.
            slope = (up - down).nan_to_num(0.0, 0.0, 0.0)
            total += ops.expand(slope, noise) * noise / (2 * self.sigma)
            loss += (up + down) / 2
        zero = (
            (total.flatten(1) == 0).all(1) if check else torch.zeros(len(total), dtype=torch.bool, device=total.device)
        )
        return DirectionResult(total / pairs, loss / pairs, None, zero, 2 * pairs)

    @staticmethod
    def _loss(context: StepContext, variable: Tensor) -> Tensor:
        bounded = replace(context, threat=ClippedThreat(context.threat))
        return bounded.loss(bounded.observe(variable)).to(wide(variable).dtype)


@dataclass(frozen=True)
class ClippedThreat(Threat):
    """A threat model whose inputs are clipped to ``[0, 1]`` before the system sees them."""

    of: Threat

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The threat's input, clipped to ``[0, 1]``."""
        return ops.clipped(self.of.apply(x, variable))

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


def _redrawn(context: StepContext, draw: int) -> StepContext:
    # Seeded by the step alone, not by the samples: a system draws one noise for all images, and a sample's result
    # must not depend on the other samples of its batch.
    seed = derive(context.tick, "redraw", draw)
    return replace(context, system=context.system.redrawn(seed), threat=context.threat.redrawn(context.goal.x, seed))


def _zero_map_gradient(context: StepContext, seen: Observation, variable: Tensor) -> Tensor:
    """``[B]`` bool: where the gradient of the map terms is exactly zero and their loss is not at its least value."""
    map_terms = _map_terms(context.objective)
    if not map_terms:
        return torch.zeros_like(context.goal.label, dtype=torch.bool)
    loss = sum_losses(map_terms, seen, context.goal)
    refuse_missing_derivatives(loss)
    gradient = _grad_or_none(loss, variable)
    if gradient is None:
        raise NotDifferentiableError("the maps carry no gradient to the input: their graph is detached")
    _refuse_broken(gradient, "the map")
    return (gradient.flatten(1).abs().amax(1) == 0) & (loss.detach() > sum(part.least for _, part in map_terms))


def _warn_of_silent_score(context: StepContext, seen: Observation, variable: Tensor) -> None:
    """Warn where a detector's score is to be lowered and has no gradient: another term's may hide that."""
    terms = tuple((w, part) for w, part in context.objective.terms() if part.needs & _SCORES)
    loss = sum_losses(terms, seen, context.goal) if terms else None
    if loss is None or not bool((loss.detach() > 0).any()):
        return
    gradient = _grad_or_none(loss, variable)
    still = torch.ones_like(loss) == 1 if gradient is None else gradient.flatten(1).abs().amax(1) == 0
    silent = still & (loss.detach() > 0)
    if bool(silent.any()):
        warnings.warn(
            f"the detector's score has no gradient for {int(silent.sum())} of {len(silent)} samples, so that nothing "
            "leads away from its alarm, which looks like robustness: give its soft_score a stand-in with a gradient, "
            "or use a search without gradients",
            ZeroDirectionWarning,
            stacklevel=2,
        )


def _refuse_broken(gradient: Tensor, of: str) -> None:
    broken = ~torch.isfinite(gradient).flatten(1).all(1)
    if bool(broken.any()):
        first = int(broken.nonzero()[0])
        raise InputError(
            f"the gradient of {of} is NaN or infinite for sample {first} of {len(gradient)}, so that no direction can "
            "come of it: does the model, or its gradient, overflow on this input or in this precision, or divide by "
            "zero (the root or the norm of zero)?"
        )


def _whole(context: StepContext, seen: Observation, loss: Tensor, variable: Tensor) -> Tensor | None:
    """The gradient of the loss."""
    return _grad_or_none(loss, variable, again=False)


def _balanced(context: StepContext, seen: Observation, loss: Tensor, variable: Tensor) -> Tensor | None:
    """The unit gradient of the constraints, and that of the other terms without what points against it."""
    terms = context.objective.terms()
    losses = [
        sum_losses(tuple(t for t in terms if t[1].constraint is kind), seen, context.goal) for kind in (True, False)
    ]
    if not bool(losses[0].detach().any()):
        # Constraints that all samples meet have no part in the direction: a backward pass is saved.
        alone = _grad_or_none(losses[1], variable, again=False)
        if alone is not None:
            return _unit(alone)
    bound, free = (_grad_or_none(part, variable) for part in losses)
    if bound is None or free is None:
        return free if bound is None else bound
    bound, free = _unit(bound), _unit(free)
    against = (bound * free).flatten(1).sum(1).clamp(max=0)
    # In proportion to its loss: a constraint that is barely unmet would otherwise make the search go to and fro.
    weight = ops.clipped(losses[0].detach())
    return free + ops.expand(weight - against * (weight > 0), bound) * bound


def _unit(gradient: Tensor) -> Tensor:
    """Each sample's gradient at unit length; a zero gradient stays zero."""
    # By its largest entry first: the squares of tiny ones underflow.
    gradient = wide(gradient)
    largest = gradient.flatten(1).abs().amax(1)
    scaled = gradient / ops.expand(torch.where(largest > 0, largest, 1), gradient)
    return scaled / ops.expand(scaled.flatten(1).norm(dim=1).clamp(min=1e-12), scaled)


def _map_terms(objective: Objective) -> tuple[tuple[Weight, Objective], ...]:
    return tuple((w, part) for w, part in objective.terms() if "maps" in part.needs and not part.constraint)


def _grad_or_none(loss: Tensor, variable: Tensor, *, again: bool = True) -> Tensor | None:
    """The gradient of the sum of ``loss``; ``None`` if ``loss`` does not depend on the variable.

    ``again`` keeps the graph for another backward pass.
    """
    if not loss.requires_grad:
        return None
    ones = torch.ones_like(loss)
    return torch.autograd.grad(loss, variable, ones, retain_graph=again, allow_unused=True)[0]
