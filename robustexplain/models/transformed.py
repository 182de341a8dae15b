"""Transforms in front of any model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from ..door import admit_as
from ..errors import InputError
from ..registry import PARTS
from .classifier import Classifier, ModelSpec
from .in_front import InFront
from .tables import TableClassifier


class Transformed(InFront):
    """Any module that takes images, with transforms in front of it; for a ``Classifier`` see its ``transforms``.

    The names of the module's layers stay valid (``GradCAM(layer="layer4")``).

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, gives logits ``[B, K]``.
        transforms: names of the transforms, the first one first.

    Raises:
        InputError: an unknown transform.
    """

    layers_inside: ClassVar[str] = "model"
    """Where layers are looked for whose name is none of this module's own."""

    def __init__(self, model: nn.Module, transforms: Sequence[str]) -> None:
        super().__init__(transforms)
        self.model = model
        self.training = model.training
        self.spec = None if getattr(model, "spec", None) is None else self.placed

    @property
    def placed(self) -> ModelSpec:
        """How to put it around its model."""
        return ModelSpec("transformed", {"model": self.model, "transforms": list(self.transform_names)})

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of the transformed images."""
        logits: Tensor = self.model(self.transformed(x))
        return logits

    @property
    def random(self) -> bool:
        """Whether a transform, here or in the module, uses random draws."""
        return super().random or getattr(self.model, "random", False) is True

    def redrawn(self, seed: int) -> Transformed:
        """The model with other random draws of its transforms; itself where nothing is random."""
        if not self.random:
            return self
        inner: Any = self.model
        inner = inner.redrawn(seed) if getattr(inner, "random", False) is True else inner
        made = Transformed(inner, super().redrawn(seed).transform_names)
        admit_as(made, self)
        return made

    def with_transforms(self, names: Sequence[str]) -> Transformed:
        """The same module, its weights shared, with these transforms in front of it and no others."""
        return Transformed(self.model, names)


PARTS.register("transformed")(Transformed)


def with_transforms(model: nn.Module, names: Sequence[str]) -> InFront:
    """``model`` with transforms in front of it, before those that it has already; its weights are shared.

    Raises:
        InputError: an unknown transform, one that stands there already, or a model that takes a table's rows.
    """
    if isinstance(model, TableClassifier) or not names:
        raise InputError(f"transforms are of images, and at least one is needed: got {type(model).__name__}, {names!r}")
    # A classifier of somebody's own may do more than a classifier does: it is taken as any other module.
    if type(model) in (Classifier, Transformed):
        assert isinstance(model, InFront)  # for the type checker
        return model.with_transforms([*names, *model.transform_names])
    return Transformed(model, names)
