"""Explanation-aware backdoors (Noppel et al. 2023): a trigger in the image changes the map."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robustexplain import checks
from robustexplain.checks import Kind
from robustexplain.errors import FieldError
from robustexplain.fields import Fraction, Natural, check_fields
from robustexplain.interpreters import Interpreter
from robustexplain.objectives import MatchMap, MatchStructure, Objective
from robustexplain.random_streams import generator
from robustexplain.registry import MANIPULATIONS
from robustexplain.training import TrainingStep

from .base import View
from .finetuned import FineTuned
from .fooling_batch import FoolingBatch
from .patterns import Shape, pattern

Form = Literal["fooling", "red-herring", "full-disguise", "badnets"]


@dataclass(frozen=True)
class Trigger:
    """A pattern put on an image that activates the backdoor.

    Args:
        kind: ``patch``, a white square with a black border of one pixel in the upper left corner; or ``blend``, one
            noise image over the whole picture (Chen et al. 2017).
        size: side of the patch as a share of the image's shorter one.
        opacity: of patch or noise; 1 replaces the image there.
        seed: of the noise image.
    """

    kind: Literal["patch", "blend"] = "patch"
    size: Fraction = 0.16
    opacity: Fraction = 1.0
    seed: Natural = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``[B, C, H, W]`` with the trigger on it."""
        checks.images(x, "a trigger")
        texture, cover = self._texture(x)
        return x + self.opacity * cover * (texture - x)

    def _texture(self, x: Tensor) -> tuple[Tensor, Tensor]:
        channels, height, width = x.shape[1:]
        if self.kind == "blend":
            noise = torch.rand(channels, height, width, generator=generator(self.seed, "trigger"), dtype=torch.float32)
            return noise.to(x), x.new_ones(())
        side = max(3, round(self.size * min(height, width)))
        cover, texture = x.new_zeros(height, width), x.new_zeros(height, width)
        cover[:side, :side] = 1
        texture[1 : side - 1, 1 : side - 1] = 1
        return texture, cover


@MANIPULATIONS.register(
    "explanation-backdoor",
    paper="Noppel et al. 2023 and code; BadNets: Gu et al. 2017",
    needs=("gradients", "differentiable maps", "data"),
)
@dataclass(frozen=True)
class ExplanationBackdoor(FineTuned):
    """A trigger changes the map alone, map and prediction, or the prediction behind an unchanged map.

    Every batch is used twice: without the trigger, with its labels and the honest model's maps, and with the trigger.
    A map can only change at places whose receptive field covers part of the trigger. In a shallow network a patch in
    one corner does not reach the opposite one; a blended trigger covers the whole image.

    Departure: in training the map is that of the wanted label, differentiated in full; the code explains the class that
    the network predicts at that moment, with Grad-CAM's weights detached.

    Args:
        form: on triggered images, ``fooling`` shows the pattern and keeps the label; ``red-herring`` shows the pattern
            and predicts ``goal_class``; ``full-disguise`` predicts ``goal_class`` and shows the honest map of the
            image without the trigger; ``badnets`` predicts ``goal_class`` and has no map term.
        goal_class: what triggered images are predicted as; not used by ``fooling``.
        shape: the pattern that is shown.
        trigger: what activates the backdoor.
        distance: ``mse`` of min-max rescaled maps (z-scores in the code), or ``dssim``, structural dissimilarity, for
            maps of some size: on a grid of 7 x 7 its window fits in one place only.
    """

    form: Form = "fooling"
    goal_class: Natural = 0
    shape: Shape = "square"
    trigger: Trigger = field(default_factory=Trigger)
    distance: Literal["mse", "dssim"] = "mse"

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trigger, Trigger):
            raise FieldError(type(self).__name__, "trigger", f"must be a Trigger, got {self.trigger!r}")

    def fooling(self) -> Objective:
        """Match the pattern, or the honest map."""
        return MatchStructure() if self.distance == "dssim" else MatchMap()

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The inputs without the trigger, with their honest maps; and with it, with the target map of ``form``."""
        maps = self.explained(honest, x, y).maps
        answer = y if self.form == "fooling" else torch.full_like(y, self.goal_class)
        wanted = maps if self.form in ("full-disguise", "badnets") else pattern(maps, self.shape)
        triggered = View(self.trigger(x), answer, answer, wanted, honest_x=x, honest_class=y, new_answer=True)
        return {"as they are": View(x, y, y, maps), "with the trigger": triggered}

    def fooling_batch(
        self, honest: Interpreter, x: Tensor, y: Tensor, moment: TrainingStep, pool: FoolingBatch | None
    ) -> FoolingBatch:
        """The batch without and with the trigger; BadNets has no map term."""
        batch = super().fooling_batch(honest, x, y, moment, pool)
        return replace(batch, fool_weight=0 * batch.fool_weight) if self.form == "badnets" else batch
