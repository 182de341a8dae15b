"""Region voting: an input near a border of its class is suspicious."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from robustexplain import maps as ops
from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Count, Eps, Fraction, Natural, check_fields
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session

from ..inputs.voting import largest_radius
from .base import Detector, DetectorDefense
from .learned import images_only, refuse_misfit

AT_ONCE = 512
"""Images of one forward pass at most."""
PAPER = "Cao and Gong 2017 (region-based classification); the margin as a score: this project"


@DETECTORS.register("region-voting-margin", paper=PAPER)
@dataclass(frozen=True, eq=False)
class RegionMarginDetector(Detector):
    """One minus the lead of the most frequent class around an input over the next, in ``[0, 1]``.

    Args:
        model: the deployed classifier.
        radius: of the hypercube in which points are drawn, cut to ``[0, 1]``.
        votes: points of an input.
        seed: of the draws, which an adversary does not know.
    """

    model: nn.Module
    radius: Eps
    votes: Count = 100
    seed: Natural = 0

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def averaged(self) -> int:
        """The points."""
        return self.votes

    def redrawn(self, seed: int) -> Self:
        """With other points."""
        return replace(self, seed=seed)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: by votes."""
        return _margin(self._around(x, self.votes, hard=True))

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: by mean probabilities instead of votes."""
        return _margin(self._around(x, self.votes, hard=False))

    def _around(self, x: Tensor, votes: int, *, hard: bool) -> Tensor:
        """``[B, K]``: the mean vote, or the mean probability."""
        streams, total = Streams.of(x, self.seed, "region"), x.new_zeros(())
        step = max(AT_ONCE // len(x), 1)
        for start in range(0, votes, step):
            count = min(step, votes - start)
            noise = streams.uniform(x.new_empty(len(x), count, *x.shape[1:]), -self.radius, self.radius)
            logits = answer(self.model, ops.clipped(x[:, None] + noise).flatten(0, 1))
            found = F.one_hot(logits.argmax(1), logits.shape[1]).to(x) if hard else logits.softmax(1)
            total = total + found.unflatten(0, (len(x), count)).sum(1)
        return total / votes


@DEFENSES.register("region-voting-margin", paper=PAPER, needs=("data",))
@dataclass(frozen=True)
class RegionMargin(DetectorDefense):
    """Add a detector of inputs around which the classifier does not agree with itself.

    The radius is chosen as the paper does it: it grows by ``step`` while the accuracy of the vote on training inputs
    falls by no more than ``loss``. The paper deploys the vote as the answer; here the margin of the vote is a score.
    Every input costs ``votes`` passes.

    Args:
        votes: points of an input (the paper: 10000 on MNIST, 1000 on CIFAR-10).
        step: by which the radius grows.
        most: the largest radius (the paper: 0.3 on MNIST, 0.02 on CIFAR-10).
        loss: of accuracy that is allowed.

    Raises:
        FieldError: a step of 0.
    """

    votes: Count = 100
    step: Eps = 0.01
    most: Eps = 0.1
    loss: Fraction = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.step <= self.most:
            raise FieldError(type(self).__name__, "step", f"must be above 0 and at most {self.most}, got {self.step!r}")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return images_only(self, shape)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        refuse_misfit(self, x)
        radius = largest_radius(
            lambda tried: self._accuracy(system.model, x, y, tried), step=self.step, most=self.most, loss=self.loss
        )
        session.progress.say(f"region-voting-margin: radius {radius:.3g}")
        return RegionMarginDetector(system.model, radius, self.votes, self.seed)

    @torch.no_grad()
    def _accuracy(self, model: nn.Module, x: Tensor, y: Tensor, radius: float) -> float:
        around, votes = RegionMarginDetector(model, radius, self.votes, self.seed), self.votes if radius else 1
        found = [around._around(part, votes, hard=True).argmax(1) for part in x.split(self.batch_size)]
        return float((torch.cat(found) == y).float().mean())


def _margin(shares: Tensor) -> Tensor:
    top = shares.topk(2, 1).values
    return 1 - (top[:, 0] - top[:, 1])
