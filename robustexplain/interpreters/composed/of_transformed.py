"""Maps of the image that a model's transforms produce."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...checks import Kind
from ...errors import InputError
from ...models.in_front import in_front_of, transformed_already
from ...registry import INTERPRETERS
from ..base import Explanation
from .base import Wrapper


@INTERPRETERS.register("of-transformed", needs=("transforms",))
@dataclass(frozen=True, eq=False)
class OfTransformed(Wrapper):
    """Explains the transformed image that the model's transforms produce, not the input itself.

    The maps are those of ``base`` on the transformed image, by the network behind the transforms, taken back to the
    coordinates of the input where a transform moves pixels.

    Args:
        base: explains ``model``, which has transforms in front of it.

    Raises:
        InputError: a model without transforms, or a ``base`` that explains another one.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if in_front_of(self.model) is None:
            name = type(self.model).__name__
            raise InputError(f"{name} has no transforms in front of it: see models.with_transforms")

    def lay_out(self, goal_map: Tensor, x: Tensor) -> Tensor:
        """As ``base`` does."""
        return self.base.lay_out(goal_map, x)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        model = in_front_of(self.model)
        if model is None:
            # Another one around it has explained what the transforms make already.
            return self.base._explain(x, target, graph)
        transformed = model.transformed(x)
        with transformed_already(model):
            # What is proved is of the transformed image: two inputs of a small distance need not give two such images.
            found = self.base._explain(transformed, target, graph)
        return found._replace(maps=model.taken_back(found.maps, x), certificate=None)
