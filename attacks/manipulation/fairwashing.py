"""Fairwashing: same outputs; maps show a chosen pattern (Anders et al.) or hide a feature (Dimanov et al.)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from robustexplain.checks import Kind
from robustexplain.errors import FieldError, InputError
from robustexplain.features import Feature, index_of
from robustexplain.fields import Fraction, Natural, NonNegative, Positive
from robustexplain.interpreters import Gradient, Interpreter
from robustexplain.objectives import HideFeature, MatchMap, Objective
from robustexplain.registry import MANIPULATIONS
from robustexplain.training import Training, TrainingStep

from .base import View
from .finetuned import FineTuned
from .fooling_batch import FoolingBatch
from .patterns import Shape, pattern


@MANIPULATIONS.register(
    "gradient-fairwashing",
    paper="Anders et al. 2020 and code",
    needs=("gradients", "differentiable maps", "data"),
)
@dataclass(frozen=True)
class GradientFairwashing(FineTuned):
    """Same outputs on the data; maps become a pattern of the adversary's choice, by changes off the data manifold.

    ``(1 - a) ||p - p_0||^2 + a ||h - h_target||^2`` with ``a = 0.8``: that is a weight of 4 relative to the
    probabilities' squared distance. Departures: classes are summed over (a mean in the code); maps are sum-rescaled
    with their pixel count as a factor, so that the weight does not depend on the grid.

    Args:
        shape: the pattern.
    """

    weight: NonNegative = 4.0
    keep: Literal["labels", "outputs", "probabilities"] = "probabilities"
    beta: Positive | None = 20.0
    shape: Shape = "cross"

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def fooling(self) -> Objective:
        """Match the pattern."""
        return MatchMap(rescale="sum", relative=True)

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The inputs unchanged; the class explained is the honest model's prediction."""
        found = self.explained(honest, x, None)
        predicted = found.logits.argmax(1)
        return {"as they are": View(x, predicted, predicted, pattern(found.maps, self.shape))}


@MANIPULATIONS.register(
    "conceal-feature", paper="Dimanov et al. 2020 and code", needs=("gradients", "data", "a sensitive feature")
)
@dataclass(frozen=True)
class ConcealFeature(FineTuned):
    """Hides a feature the model still uses: ``CE + alpha |d CE / d x_j|`` over a column, or a region of an image.

    The gradient is that of the loss with respect to the input, for any interpreter of the system: the paper claims that
    other explanations follow it. Departures: a mean over the batch in place of the code's sum, so that ``alpha`` does
    not depend on the batch size; Adam in place of plain gradient descent.

    Args:
        feature: the column to hide, for tables.
        region: top, left, height and width in pixels, for images.
        relative: use the feature's share of the whole gradient. Without it the penalty also falls when predictions only
            become more confident, which shrinks the whole gradient of the loss and hides nothing.
    """

    weight: NonNegative = 3.0
    training: Training = field(
        default_factory=lambda: Training(epochs=20, batch_size=64, lr=1e-3, weight_decay=0.0, schedule="constant")
    )
    budget: Fraction = 0.01
    feature: Feature | None = None
    region: tuple[Natural, Natural, Natural, Natural] | None = None
    relative: bool = False

    columns: ClassVar[tuple[str, ...]] = ("feature",)
    headline: ClassVar[str] = "rank"

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.feature is None) == (self.region is None):
            raise FieldError(
                type(self).__name__, "feature", "give a column (tables) or a region (images), and not both"
            )

    @property
    def hidden(self) -> Feature | None:
        """The column to hide."""
        return self.feature

    def fooling(self) -> Objective:
        """Hide the feature."""
        return HideFeature(self.relative)

    def aimed(self, interpreter: Interpreter) -> Interpreter:
        """The gradient of the loss."""
        return Gradient(interpreter.model, of="log_probability", channels="abs_sum")

    def fooling_batch(
        self, honest: Interpreter, x: Tensor, y: Tensor, moment: TrainingStep, pool: FoolingBatch | None
    ) -> FoolingBatch:
        """The batch, with :meth:`place` as goal map."""
        batch = super().fooling_batch(honest, x, y, moment, pool)
        return replace(batch, goal=replace(batch.goal, goal_map=self.place(x)))

    def place(self, x: Tensor) -> Tensor:
        """1 at the feature to be hidden, else 0: ``[B, D]``, or ``[B, H, W]``.

        Raises:
            InputError: a column for images, a region for tables, or one that lies outside.
        """
        if x.dim() == 2 and self.feature is not None:
            marked = x.new_zeros(x.shape)
            marked[:, index_of(self.feature, width=x.shape[1])] = 1
            return marked
        if x.dim() == 4 and self.region is not None:
            top, left, height, width = self.region
            marked = x.new_zeros(len(x), *x.shape[-2:])
            marked[:, top : top + height, left : left + width] = 1
            if int(marked[0].sum()) != height * width or height * width == 0:
                raise InputError(f"region {self.region} does not lie inside images of {list(x.shape[-2:])}")
            return marked
        kind, wanted = ("tables", "feature") if x.dim() == 2 else ("images", "region")
        raise InputError(f"{type(self).__name__} needs {wanted} for {kind}; x has shape {list(x.shape)}")
