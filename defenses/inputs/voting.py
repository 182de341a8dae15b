"""Defenses that classify several random versions of each image: resizing and padding, and the vote of a region."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor

from robustexplain.data import stack
from robustexplain.door import answer, suited
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction
from robustexplain.interpreters import OfDraws
from robustexplain.models import Voted
from robustexplain.models.voted import voting
from robustexplain.random_streams import generator
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, TrainedDefense, refuse
from .placed import placed

Explained = Literal["raw", "transformed"]
Radius = Annotated[float, at.Ge(1e-4), at.Le(1)]


@DEFENSES.register("random-resizing", paper="Xie et al. 2018 and code")
@dataclass(frozen=True)
class RandomResizing(Defense):
    """Average the logits of randomly resized and padded versions of each image; nothing is trained.

    Half of the versions are mirrored. The transform is ``resize-pad-PIXELS``: the image shrinks by up to so many pixels
    and is placed at random on grey. ``input-transform`` with that name is one draw of it.
    Passes of inference: ``draws``, and as many for the map unless it is that of the ``raw`` image. Who averages over
    draws of his own attacks it as if it stood still.

    Departures: those of ``resize-pad``; the authors sum probabilities, of an auxiliary head too, and mirror at random.

    Args:
        pixels: by how many the shorter side shrinks at most; the authors' range is 7% of the side.
        draws: versions of each image.
        mirrored: whether every other one is mirrored left to right.
        explained: ``transformed``: the mean of the maps of all versions, each taken back to the input's coordinates;
            ``raw``: the map of the input as it came, which the classifier never sees.
    """

    pixels: Count = 2
    draws: Count = 30
    mirrored: bool = True
    explained: Explained = "transformed"

    layer: ClassVar[Literal["model", "input", "interpreter", "detector"]] = "input"

    def oblivious_view(self, defended: System, root: System) -> System:
        """The system that an oblivious attacker assumes: one pass on the image as it came."""
        return root

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        return _voting(
            system, f"resize-pad-{self.pixels}", self.draws, "mean", self.mirrored, self.explained, self.seed
        )


@DEFENSES.register("region-voting", paper="Cao and Gong 2017", needs=("data",))
@dataclass(frozen=True)
class RegionVoting(TrainedDefense):
    """Answer with the class that most random points of a hypercube around the image get; nothing is trained.

    The radius is the largest, in steps of ``step``, at which the vote loses no more than ``loss`` of the plain model's
    accuracy on the defense's samples (Cao and Gong 2017), found with ``draws`` points each. Logits are those of the
    shares of the votes: their gradient is zero, and an adversary follows the expected share. Passes of inference:
    ``draws``, and as many for the map unless it is that of the ``raw`` image.

    Args:
        draws: points of the hypercube.
        radius: fixed; ``None`` searches for it.
        step: of the search; the smallest radius.
        most: the largest radius of the search.
        loss: share of accuracy that the vote may lose.
        samples: largest number of the defense's samples that the search uses, drawn at random.
        batch_size: of them at once.
        explained: ``transformed``: the mean of the maps of all points; ``raw``: the map of the image itself.
    """

    draws: Count = 1000
    radius: Radius | None = None
    step: Radius = 0.01
    most: Radius = 0.3
    loss: Fraction = 0.01
    samples: Count = 500
    batch_size: Count = 64
    explained: Explained = "transformed"

    layer: ClassVar[Literal["model", "input", "interpreter", "detector"]] = "input"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.radius is not None and not 1e-4 <= self.radius <= 1:
            raise InputError(f"RegionVoting.radius must be from 0.0001 to 1, or None, got {self.radius!r}")

    def oblivious_view(self, defended: System, root: System) -> System:
        """The system that an oblivious attacker assumes: one pass on the image as it came."""
        return root

    def _train(self, system: System, data: Samples, session: Session) -> System:
        radius = self._found(system, data) if self.radius is None else self.radius
        return _voting(system, f"uniform-noise-{radius:g}", self.draws, "majority", False, self.explained, self.seed)

    @torch.no_grad()
    def _found(self, system: System, data: Samples) -> float:
        draws = generator(self.seed, "radius")
        rows = torch.randperm(len(data), generator=draws)[: self.samples].tolist()
        x, y = stack(data, rows)
        x = suited(system.model, x)
        y = y.to(x.device)

        def voted(radius: float) -> torch.nn.Module:
            name = f"uniform-noise-{radius:g}"
            return Voted(system.model, name, self.draws, "majority", seed=self.seed) if radius else system.model

        return largest_radius(
            lambda radius: self._accuracy(voted(radius), x, y), step=self.step, most=self.most, loss=self.loss
        )

    def _accuracy(self, model: torch.nn.Module, x: Tensor, y: Tensor) -> float:
        found = torch.cat([answer(model, part).argmax(1) for part in x.split(self.batch_size)])
        return float((found == y).double().mean())


def largest_radius(accuracy: Callable[[float], float], *, step: float, most: float, loss: float) -> float:
    """The largest radius, in steps, at which a vote stays accurate enough (Cao and Gong 2017).

    Args:
        accuracy: of the vote within a radius; at 0 that of the plain model.
        step: by which the radius grows, and the least that is returned.
        most: the largest that is tried.
        loss: share of the plain model's accuracy that may be lost.
    """
    least, radius = accuracy(0.0) - loss, step
    while radius + step <= most + 1e-9 and accuracy(radius + step) >= least:
        radius += step
    return radius


def _voting(
    system: System,
    transform: str,
    draws: int,
    vote: Literal["mean", "majority"],
    mirrored: bool,
    explained: Explained,
    seed: int,
) -> System:
    inside = voting(system.model)
    refuse(inside is not None, f"the classifier answers by draws of {getattr(inside, 'transform_name', '')!r} already")
    model = Voted(system.model, transform, draws, vote, mirrored=mirrored, seed=seed)
    return placed(system, model, lambda m, interpreter: OfDraws(m, interpreter, explained))
