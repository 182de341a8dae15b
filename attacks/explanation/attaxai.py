"""AttaXAI: an evolution strategy that changes the map and keeps the prediction, without any gradient."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Eps, Fraction, NonNegative, Positive
from robustexplain.objectives import Goal, KeepPrediction, MatchMap, Objective
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.system import System

from ..base import Attack
from ..goals import random_patch_maps
from ..search.best import BestIterates, SearchRecord
from ..search.directions import StepContext
from ..search.loop import Plan, SearchResult
from ..search.updates import Adam
from ..threat import Linf, Threat

_PIXELS = 32 * 32
"""The map size to which the published weights belong."""


@dataclass
class _Generation:
    """Sums over a population, one entry per sample, from which both gradients follow without storing members."""

    loss: list[Tensor]
    noise: Tensor
    weighted: Tensor
    spread: list[Tensor]

    @classmethod
    def none(cls, x: Tensor) -> _Generation:
        return cls([], torch.zeros_like(x), torch.zeros_like(x), [])

    def add(self, loss: Tensor, z: Tensor) -> None:
        """Add the member ``mean + sigma z`` with its loss."""
        self.loss.append(loss)
        self.noise += z
        self.weighted += ops.expand(loss, z) * z
        self.spread.append(z.square().flatten(1).mean(1) - 1)

    def gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the standardised reward: to the mean (times ``sigma``, as in the code) and to ``sigma``."""
        loss = torch.stack(self.loss)
        middle, scale = loss.mean(0), loss.std(0).clamp(min=1e-5)
        mean = (ops.expand(middle, self.noise) * self.noise - self.weighted) / ops.expand(scale, self.noise)
        reward = (middle - loss) / scale
        # The first member is the mean itself, without noise: it is left out of the gradient to sigma.
        sigma = (reward[1:] * torch.stack(self.spread)[1:]).mean(0)
        return mean / len(loss), sigma


@dataclass(frozen=True)
class _EvolutionStrategy(Plan):
    """A population around a mean, which Adam updates along the reward; the spread is updated by its own gradient."""

    threat: Threat
    map_weight: float
    prediction_weight: float
    steps: int
    population: int
    sigma: float
    sigma_step: float
    lr: float
    decay: float

    @property
    def aim(self) -> Objective:
        return KeepPrediction() + MatchMap("sum")

    @property
    def summary(self) -> str:
        return f"evolution strategy, population of {self.population}"

    @torch.no_grad()
    def run(self, system: System, goal: Goal, streams: Streams) -> SearchResult:
        if goal.goal_map is None:
            raise InputError("evolution needs a goal map")
        # For maps that sum to one, the mean squared error falls with the square of the number of pixels.
        scale = (goal.goal_map[0].numel() / _PIXELS) ** 2
        objective = self.map_weight * scale * MatchMap("sum") + self.prediction_weight * KeepPrediction()
        mean, sigma = goal.x.clone(), goal.x.new_full((len(goal.x),), self.sigma)
        best, record = BestIterates.none(goal.x), SearchRecord.none(goal.x)
        memory = Adam().begin(mean)
        for step in range(self.steps):
            context = StepContext(system, self.threat, goal, objective, streams, 1.0, step)
            sums = _Generation.none(goal.x)
            for member, z in enumerate(latin_normal(goal.x, self.population - 1, streams)):
                seen = context.observe((mean + ops.expand(sigma, z) * z).clamp(0, 1))
                sums.add(context.loss(seen).to(goal.x.dtype), z)
                if member == 0:
                    best.update(slice(None), seen, goal, objective)
            record.queries += self.population
            ascent, widen = sums.gradients()
            moved, memory = Adam(self.lr * self.decay**step)(mean, -ascent, 0.0, memory)
            mean = self.threat.project(goal.x, moved)
            grown = sigma + (widen / sigma).clamp(-self.sigma_step, self.sigma_step)
            sigma = grown.clamp(min=self.sigma / 1000)
        return SearchResult.judged(best, record)


def latin_normal(x: Tensor, count: int, streams: Streams) -> Iterator[Tensor]:
    """A zero and ``count`` normal draws like ``x``, one at a time: a Latin hypercube over all of a sample's pixels.

    In each pixel each of ``count`` intervals of equal probability is used once.
    """
    yield torch.zeros_like(x)
    size = x[0].numel()
    orders = []
    for i in range(len(x)):
        draw = streams.select([i]).uniform(torch.empty(1, count, size, dtype=torch.float32))
        # The orders of all samples are kept in memory: two bytes per entry.
        orders.append(draw[0].argsort(0).to(torch.int16 if count <= 2**15 else torch.int32))
    order = torch.stack(orders).to(x.device)
    edge = 2.0**-24
    for member in range(count):
        inside = streams.uniform(torch.empty(len(x), size, dtype=torch.float64, device=x.device))
        share = ((order[:, member] + inside) / count).clamp(edge, 1 - edge)
        yield torch.special.ndtri(share).to(x.dtype).reshape(x.shape)


@ATTACKS.register("evolution", paper="Tamam et al. 2023, AttaXAI")
@dataclass(frozen=True)
class Evolution(Attack):
    """Black-box attack that moves the map towards a goal map and keeps the prediction, by an evolution strategy.

    The system is queried on a population around a mean image. Rewards are standardised; Adam updates the mean along
    them, and the spread is updated by its own gradient. Only probabilities and maps are used, so interpreters without a
    gradient can be attacked. The authors work in normalised pixels of deviation about 0.25: their figures are divided
    by four here. Departures: the mean stays in an L-infinity ball, images are clipped before each query, and the result
    is the mean with the nearest map among those that keep the prediction (they take the lowest loss). Without a goal
    map it aims at a random patch (they take the map of another image).

    Args:
        eps: L-infinity radius (the authors': 0.25).
        steps: generations.
        step_size: Adam's learning rate (the authors': 0.0125 normalised).
        decay: of the learning rate, each generation.
        population: queries per generation, the mean included.
        sigma: the first spread of the population (the authors': 0.1 normalised).
        sigma_step: largest change of the spread in a generation (the authors': 0.01 normalised); 0 keeps it.
        map_weight: of the mean squared error of maps that sum to one, at 32 x 32 pixels; other sizes are scaled to it.
        prediction_weight: of the squared distance of probabilities, summed over classes (the authors': 1e6 for a mean
            over 100 classes).
    """

    eps: Eps = 0.25
    steps: Count = 400
    step_size: Positive = 0.003
    decay: Fraction = 0.995
    population: Count = 125
    sigma: Positive = 0.025
    sigma_step: NonNegative = 0.0025
    map_weight: NonNegative = 1e7
    prediction_weight: NonNegative = 1e4

    needs_maps: ClassVar[bool] = True
    keeps_prediction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.population < 3:
            raise FieldError("Evolution", "population", f"must be at least 3, got {self.population}")

    def differentiates(self, system: System) -> bool:
        """Never: it uses the maps' values only."""
        return False

    def default_goal_map(self, x: Tensor) -> Tensor:
        """A random patch, since the benign map is the start."""
        return random_patch_maps(x, self.seed)

    def plan(self, system: System) -> Plan:
        """The evolution strategy."""
        return _EvolutionStrategy(
            Linf(self.eps),
            self.map_weight,
            self.prediction_weight,
            self.steps,
            self.population,
            self.sigma,
            self.sigma_step,
            self.step_size,
            self.decay,
        )
