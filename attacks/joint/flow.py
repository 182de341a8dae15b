"""Attacks that move pixels instead of changing their values: StAdv, and ADV2 on top of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.fields import Count, Fraction, NonNegative, Positive, Radius
from robustexplain.objectives import FlowLoss, Margin
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import wide
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.loop import Plan, Search, Stage
from ..search.surrogates import Surrogate, surrogate_for
from ..search.updates import Adam
from ..threat import Threat
from .adv2 import ADV2


@dataclass(frozen=True)
class Flow(Threat):
    """A flow ``[B, 2, H, W]`` in pixels, rows first: where each pixel takes its value from.

    Pixel ``(i, j)`` of the attacked image is the image at ``(i + flow[0], j + flow[1])``, by bilinear interpolation
    between the four pixels around it (Xiao et al. 2018, eq. 1; Zhang et al. 2020, A4): a weighted mean of pixels, which
    stays in ``[0, 1]``. Beyond the border the last pixel is repeated, as in the authors' code (the papers' formula
    fades to black there). A flow of zero returns the image exactly.

    Args:
        bound: largest ``|flow|`` of a pixel along either axis, in pixels.
        start_range: largest ``|flow|`` of a random start (0.1 in the authors' code).
    """

    bound: Radius = 2.0
    start_range: NonNegative = 0.1

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """No flow, or with ``streams`` a small random one."""
        none = wide(x.new_zeros(len(x), 2, *x.shape[-2:]))
        return none if streams is None else self.project(x, self.sample(x, streams))

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The moved image."""
        height, width = x.shape[-2:]
        rows = torch.arange(height, device=x.device, dtype=variable.dtype)[:, None]
        columns = torch.arange(width, device=x.device, dtype=variable.dtype)
        top, down = _cells(rows + variable[:, 0], height)
        left, across = _cells(columns + variable[:, 1], width)
        bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
        above = _taken(x, top, left) * (1 - across) + _taken(x, top, right) * across
        below = _taken(x, bottom, left) * (1 - across) + _taken(x, bottom, right) * across
        # The weights sum to one up to rounding.
        return ops.clipped(above * (1 - down) + below * down).to(x.dtype)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip each component to the bound."""
        return variable.clamp(-self.bound, self.bound)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform within ``start_range``."""
        like = wide(x.new_empty(len(x), 2, *x.shape[-2:]))
        return streams.uniform(like, -self.start_range, self.start_range)


def _cells(places: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The pixel before each place ``[B, H, W]``, and the distance from it ``[B, 1, H, W]``, in ``[0, 1]``."""
    places = places.clamp(0, size - 1)
    before = places.detach().floor().clamp(max=max(size - 2, 0))
    return before.long(), (places - before)[:, None]


def _taken(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``x[b, c, rows[b, i, j], columns[b, i, j]]``."""
    index = (rows * x.shape[-1] + columns).flatten(1)[:, None].expand(-1, x.shape[1], -1)
    taken: Tensor = x.flatten(2).gather(2, index).unflatten(2, rows.shape[1:])
    return taken


@ATTACKS.register("stadv", paper="Xiao et al. 2018, eq. 2-4", needs=("gradients",))
@dataclass(frozen=True)
class StAdv(Attack):
    """Misclassify by moving pixels along a smooth flow: ``l_adv + tau l_flow``.

    ``l_adv`` is the logit margin, flat once the wanted class leads by ``confidence`` (eq. 3). Returned is the iterate
    with the smoothest flow among those that are predicted as wanted. Departures: Adam as in Zhang et al. (section B2;
    their code adds AMSGrad) in place of L-BFGS with a line search; a bound on the flow, which the papers do not have.

    Args:
        bound: largest flow of a pixel along either axis, in pixels.
        steps: of Adam.
        step_size: its learning rate, in pixels.
        flow: ``tau``, for the mean over pixels: 0.05 of Xiao et al.'s sum over 28 x 28 is 39, over 32 x 32 it is 51.
        confidence: ``kappa``, in logits.
        neighbours: of the flow loss: ``axes`` as the papers write it, ``diagonals`` as their codes do.
        random_start: begin at a flow of up to 0.1 pixels, as in the code of Zhang et al.
        restarts: number of runs, of which the best counts.
        adapt: to a defense.
    """

    bound: Radius = 2.0
    steps: Count = 300
    step_size: Positive = 0.01
    flow: NonNegative = 25.0
    confidence: NonNegative = 0.0
    neighbours: Literal["axes", "diagonals"] = "axes"
    random_start: bool = False
    restarts: Count = 1
    adapt: Adaptation = field(default_factory=Adaptation)

    def plan(self, system: System) -> Plan:
        """Adam on the margin and the flow's unevenness."""
        objective = Margin(self.confidence) + self.flow * FlowLoss(self.neighbours) + self.adapt.evasion(system)
        stage, direction = Stage(objective, self.steps, Adam(self.step_size)), self.adapt.direction()
        return Search(Flow(self.bound), (stage,), direction, random_start=self.random_start, restarts=self.restarts)


@ATTACKS.register(
    "adv2-stadv", paper="Zhang et al. 2020, A4, eq. 21, Table 12", needs=("gradients", "differentiable maps")
)
@dataclass(frozen=True)
class ADV2StAdv(Attack):
    """ADV2 by moving pixels: ``l_prd + lambda l_int + tau l_flow`` along a flow, by Adam (Zhang et al. 2020, eq. 21).

    A warm start minimises prediction and flow terms only, then all three are minimised. Objectives and the choice of
    the best iterate are those of :class:`ADV2`. Departures: no AMSGrad (the code has it, the paper says Adam); a bound
    on the flow.

    Args:
        bound: largest flow of a pixel along either axis, in pixels.
        steps: in all, warm start included (Table 12: 600 to 1000).
        step_size: learning rate of Adam, in pixels.
        weight: ``lambda`` for the mean over a map's pixels at the start of the joint stage. Those of Table 12 are for
            sums: 0.653 over CAM's ``7 x 7`` is 32 here, 0.023 over GRAD's ``56 x 56`` is 72.
        growth: ``lambda`` at the end over ``lambda`` at the start.
        flow: ``tau`` for the mean over pixels: 0.0005 of the sum over 224 x 224 is 25.1.
        neighbours: of the flow loss: ``axes`` as the papers write it, ``diagonals`` as their codes do.
        warm_start: share of the steps without the map.
        confidence: as in :class:`ADV2` (0.75 on GRAD in the code).
        encoder_weight: as in :class:`ADV2`.
        smoothing: as in :class:`ADV2`.
        surrogate: as in :class:`ADV2`, except that ``auto`` is ``h(z)`` for gradient maps, which gets closer than
            ``softplus`` here, and that ``softplus`` has a ``beta`` of 10.
        pool: as in :class:`ADV2`.
        random_start: begin at a flow of up to 0.1 pixels, as in the code.
        restarts: number of runs, of which the best counts; all but the first begin at random.
        adapt: to a defense.
    """

    bound: Radius = 2.0
    steps: Count = 800
    step_size: Positive = 0.01
    weight: NonNegative = 32.0
    growth: Positive = 2.0
    flow: NonNegative = 25.0
    neighbours: Literal["axes", "diagonals"] = "axes"
    warm_start: Fraction = 0.25
    confidence: Fraction = 0.75
    encoder_weight: NonNegative = 0.1
    smoothing: Fraction = 0.05
    surrogate: Surrogate = "auto"
    pool: Count = 1
    random_start: bool = False
    restarts: Count = 1
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_maps: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        """Adam on the flow, first without the map."""
        pixels = ADV2(
            weight=self.weight,
            growth=self.growth,
            confidence=self.confidence,
            encoder_weight=self.encoder_weight,
            smoothing=self.smoothing,
            pool=self.pool,
            adapt=self.adapt,
        )
        even = self.flow * FlowLoss(self.neighbours)
        warm, update = round(self.steps * self.warm_start), Adam(self.step_size)
        stages = (
            Stage(pixels.prediction(system) + even, warm, update),
            Stage(pixels.objective(system) + even, self.steps - warm, update),
        )
        direction = self.adapt.direction(surrogate_for(system.interpreter, self.surrogate))
        return Search(Flow(self.bound), stages, direction, random_start=self.random_start, restarts=self.restarts)
