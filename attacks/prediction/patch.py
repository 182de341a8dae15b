"""Adversarial patches: attacks that change one patch of the image without a bound on the change."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Annotated, ClassVar, Literal

import annotated_types
import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.errors import InputError
from robustexplain.fields import Count, Natural, Positive
from robustexplain.objectives import Misclassify
from robustexplain.random_streams import Streams
from robustexplain.registry import ATTACKS
from robustexplain.rounding import wide
from robustexplain.system import System

from ..adaptive import Adaptation
from ..base import Attack
from ..search.loop import Plan, Search, Stage
from ..search.universal import Fitted, UniversalSearch, fit_universal
from ..search.updates import SignStep
from ..threat import Threat

Shape = Literal["square", "circle"]
"""A patch's outline: a square, or the circle in it."""
Place = Literal["top-left", "center", "random"]
"""Position of a patch: fixed, or random among the positions where it fits, drawn for each image."""
Size = Annotated[float, annotated_types.Gt(0), annotated_types.Le(1)]
"""A length as a share of the image's shorter side."""
Degrees = Annotated[float, annotated_types.Ge(0), annotated_types.Le(180)]
"""An angle."""
PATCH_64_OF_224 = 64 / 224
"""The side of Subramanya et al.'s patch."""


@dataclass(frozen=True, eq=False)
class Spot:
    """Positions of the patches of a batch.

    Args:
        mask: ``[B, H, W]``, 1 inside the patch and 0 outside.
        grid: ``[B, H, W, 2]``, for each pixel its column and row in the texture, from -1 to 1 between the edges.
    """

    mask: Tensor
    grid: Tensor


@dataclass(frozen=True)
class Patch(Threat):
    """One patch of the image may take any values in ``[0, 1]``; all other pixels are unchanged.

    The variable is the patch's texture ``[B, C, s, s]``, ``s`` being ``size`` of the image's shorter side in whole
    pixels. ``bind`` draws a place, an angle and a scale for each image from the image's own stream; ``redrawn`` draws
    them again. A square that is neither turned nor scaled covers ``s * s`` pixels and shows its texture pixel by pixel;
    otherwise the texture is interpolated. A pixel belongs to the patch if its centre does; edges are not blended.

    Args:
        size: side of the square or diameter of the circle, a share of the image's shorter side.
        shape: ``square`` or ``circle``.
        place: ``top-left``, ``center``, or ``random``: uniform over the places where the patch lies in the image.
        rotation: the angle is uniform in ``[-rotation, rotation]`` degrees.
        shrink: the scale is uniform in ``[shrink, 1]`` times ``size``.
        spot: positions of the patches; made by ``bind``.
    """

    size: Size = PATCH_64_OF_224
    shape: Shape = "square"
    place: Place = "top-left"
    rotation: Degrees = 0.0
    shrink: Size = 1.0
    spot: Spot | None = field(default=None, compare=False, repr=False)

    @property
    def summary(self) -> str:
        """Size, outline and place."""
        moves = [f"+-{self.rotation:g} degrees"] if self.rotation else []
        moves += [f"scale {self.shrink:g} to 1"] if self.shrink < 1 else []
        return ", ".join([f"Patch {self.size:.0%} of a side", self.shape, self.place, *moves])

    @property
    def random(self) -> bool:
        """Whether place, angle or scale are drawn."""
        return self.place == "random" or self.warped

    @property
    def warped(self) -> bool:
        """Whether patches are turned or scaled."""
        return self.rotation > 0 or self.shrink < 1

    @property
    def region(self) -> Tensor | None:
        """The pixels of the patch."""
        return None if self.spot is None else self.spot.mask

    def pixels(self, x: Tensor) -> int:
        """``s``: the side of the patch in whole pixels, at least one."""
        return max(1, round(self.size * min(x.shape[2:])))

    def bind(self, x: Tensor, streams: Streams) -> Patch:
        """The patch with a place drawn for each image."""
        none = wide(x.new_zeros(len(x), 4))
        draws = streams.uniform(none) if self.random else none
        return replace(self, spot=self._spot(x, draws))

    def select(self, rows: Tensor) -> Patch:
        """The patch for the images at ``rows``."""
        spot = self._bound()
        return replace(self, spot=Spot(spot.mask[rows], spot.grid[rows]))

    def redrawn(self, x: Tensor, seed: int) -> Patch:
        """The patch with other places, angles and scales."""
        return self.bind(x, Streams.of(x, seed, "patch")) if self.random else self

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        """A grey patch, or a random one. (The published codes begin with the data set's mean colour, and grey.)"""
        side = self.pixels(x)
        grey = wide(x.new_full((len(x), x.shape[1], side, side), 0.5))
        return grey if streams is None else self.sample(x, streams)

    def apply(self, x: Tensor, variable: Tensor) -> Tensor:
        """The images with the patch on them.

        Raises:
            InputError: a patch of another number of channels than the images.
        """
        if variable.shape[1] != x.shape[1]:
            raise InputError(f"the patch has {variable.shape[1]} channels, and the images have {x.shape[1]}")
        spot = self._bound()
        mode = "bilinear" if self.warped else "nearest"
        seen = F.grid_sample(variable, spot.grid.to(variable), mode, padding_mode="border", align_corners=False)
        # Interpolation weights may sum to slightly more than 1: clip the value, but keep the gradient.
        seen = seen + (ops.clipped(seen.detach()) - seen.detach()) if self.warped else seen
        return torch.where(spot.mask[:, None] > 0, seen.to(x.dtype), x)

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        """Clip to ``[0, 1]``."""
        return variable.clamp(0, 1)

    def sample(self, x: Tensor, streams: Streams) -> Tensor:
        """Uniform noise."""
        return streams.uniform(self.start(x))

    def _bound(self) -> Spot:
        if self.spot is None:
            raise InputError("this Patch has no place yet: bind it to the images first (threat.bind(x, streams))")
        return self.spot

    def _spot(self, x: Tensor, draws: Tensor) -> Spot:
        height, width = x.shape[2:]
        angle = (2 * draws[:, 2] - 1) * math.radians(self.rotation)
        side = self.pixels(x) * (self.shrink + (1 - self.shrink) * draws[:, 3])
        turned = side * (angle.cos().abs() + angle.sin().abs()) if self.shape == "square" else side
        top, left = (self._corner(room, turned, draw) for room, draw in ((height, draws[:, 0]), (width, draws[:, 1])))
        # Pixel centres in the patch's own frame, where it reaches from -1 to 1.
        down = torch.arange(height, device=x.device).to(draws)[None, :, None] + 0.5
        right = torch.arange(width, device=x.device).to(draws)[None, None, :] + 0.5
        dy, dx = (down - (top + turned / 2)[:, None, None]), (right - (left + turned / 2)[:, None, None])
        cos, sin, half = (v[:, None, None] for v in (angle.cos(), angle.sin(), side / 2))
        u, v = (dx * cos + dy * sin) / half, (dy * cos - dx * sin) / half
        inside = u.square() + v.square() <= 1 if self.shape == "circle" else (u.abs() <= 1) & (v.abs() <= 1)
        return Spot(inside.to(x.dtype), torch.stack(torch.broadcast_tensors(u, v), -1))

    def _corner(self, room: int, turned: Tensor, draw: Tensor) -> Tensor:
        """The first row or column of the patch's bounding box, a whole number where the box fits."""
        spare = room - turned
        free = (spare + 1e-4).floor().clamp(min=0)
        if self.place == "top-left":
            return torch.where(spare < 0, spare / 2, torch.zeros_like(spare))
        share = (draw * (free + 1)).floor().clamp(max=free) if self.place == "random" else (free / 2).floor()
        return torch.where(spare < -1e-4, spare / 2, share)


@ATTACKS.register("image-patch", paper="Brown et al. 2017, the form for one image", needs=("gradients",))
@dataclass(frozen=True)
class ImagePatch(Attack):
    """Adversarial patch for one image: sign steps on the cross-entropy, by the pixels of the patch only.

    The baseline for :class:`HidingPatch`. The returned iterate is the one with the lowest
    cross-entropy among those that are predicted as wanted.

    Args:
        size: side of the square or diameter of the circle, a share of the image's shorter side.
        shape: ``square`` or ``circle``.
        place: ``top-left``, ``center``, or ``random`` (drawn once for each image, and known to the adversary).
        rotation: largest angle in degrees, drawn for each image.
        shrink: smallest scale, drawn for each image.
        steps: iterations.
        step_size: of one sign step, in the units of ``[0, 1]`` pixels.
        early_stop: stop a sample at its first success.
        adapt: to a defense; ``draws`` also vary places, angles and scales.
    """

    size: Size = PATCH_64_OF_224
    shape: Shape = "square"
    place: Place = "top-left"
    rotation: Degrees = 0.0
    shrink: Size = 1.0
    steps: Count = 250
    step_size: Positive = 4 / 255
    early_stop: bool = False
    adapt: Adaptation = field(default_factory=Adaptation)

    random_threat: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        """Sign descent on the cross-entropy."""
        return Search(
            threat_of(self),
            (Stage(Misclassify() + self.adapt.evasion(system), self.steps, SignStep(self.step_size)),),
            self.adapt.direction(),
            early_stop=self.early_stop,
        )


@ATTACKS.register("patch", paper="Brown et al. 2017", needs=("gradients", "data"))
@dataclass(frozen=True)
class AdversarialPatch(Attack):
    """Universal adversarial patch: one texture for all images, at random places, angles and scales.

    Maximises ``E_{x, t, l} log Pr(goal | A(p, x, l, t))`` over images, places ``l`` and transformations ``t``,
    a new draw for every image and step; the untargeted form minimises the log-probability of the label. It is applied
    at a place, angle and scale drawn from each image's own stream. Departures: places are those where the whole patch
    lies in the image; sign steps on a texture kept in ``[0, 1]`` (their code: Adam on a texture under a tanh); no
    camouflage term.

    The attack is computed by :meth:`fitted`; the texture is ``fitted.applied.variable``, ``[1, C, s, s]``.

    Args:
        size: diameter or side, a share of the image's shorter side.
        shape: ``circle`` or ``square``.
        place: ``random``, or always ``top-left`` or in the ``center``.
        rotation: largest angle in degrees (their code: 22.5).
        shrink: smallest scale, a share of ``size`` (their code trains from 0.1 to 1).
        steps: mini-batches (their code: 500).
        step_size: of one sign step, in the units of ``[0, 1]`` pixels.
        batch_size: images per step (their code: 16).
        goal_class: the class to be predicted for every image; ``None``: any but its label. Success depends on the goal
            of the call.
        adapt: to a defense; ``draws`` also vary each image's place, angle and scale.
    """

    size: Size = 0.4
    shape: Shape = "circle"
    place: Place = "random"
    rotation: Degrees = 22.5
    shrink: Size = 0.75
    steps: Count = 500
    step_size: Positive = 4 / 255
    batch_size: Count = 16
    goal_class: Natural | None = None
    adapt: Adaptation = field(default_factory=Adaptation)

    needs_data: ClassVar[bool] = True
    random_threat: ClassVar[bool] = True

    def plan(self, system: System) -> Plan:
        """Mini-batch sign descent on the expected cross-entropy."""
        aim, update = Misclassify() + self.adapt.evasion(system), SignStep(self.step_size)
        return UniversalSearch(threat_of(self), aim, self.steps, update, self.batch_size, self.adapt.direction())

    def fitted(self, system: System, x: Tensor, y: Tensor) -> Fitted:
        """The attack with its patch computed on ``x`` ``[N, C, H, W]`` with labels ``y`` ``[N]``.

        Raises:
            InputError: bad tensors, or a goal class out of range.
        """
        return fit_universal(self, system, x, y, self.goal_class)


def threat_of(attack: ImagePatch | AdversarialPatch) -> Patch:
    """The patch that an attack's fields describe."""
    return Patch(attack.size, attack.shape, attack.place, attack.rotation, attack.shrink)
