"""The base of modules that stand around a model and change what it answers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Self

from ..errors import InputError
from .classifier import ModelSpec

PASSED_ON = ("num_classes", "in_channels", "in_features", "input_size", "mean", "std", "inputs")
"""What a model says of itself and its inputs, which stays true of the module around it."""


class Around(nn.Module):
    """A module around a model: layers keep the names that they have in the model, and so does its normalisation.

    Args:
        model: any module.

    Raises:
        InputError: ``model`` is no module.
    """

    layers_inside: ClassVar[str] = "model"
    """Where layers are looked for whose name is none of this module's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError(f"{type(self).__name__} stands around a torch.nn.Module, got {type(model).__name__}")
        self.model = model
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name not in PASSED_ON:
                raise
            return getattr(super().__getattr__("model"), name)

    @abstractmethod
    def around(self, model: nn.Module) -> Self:
        """The same around another model."""

    @property
    def random(self) -> bool:
        """Whether the model uses random draws."""
        return getattr(self.model, "random", False) is True

    def redrawn(self, seed: int) -> Self:
        """The same around the model with other random draws; itself where nothing is random."""
        inner: Any = self.model
        return self.around(inner.redrawn(seed)) if self.random else self


class PlacedAround(Around):
    """One that a registered part puts around any model: a subclass says by what name and settings."""

    @property
    @abstractmethod
    def placed(self) -> ModelSpec:
        """How to put it around its model, whoever made that."""

    @property
    def spec(self) -> ModelSpec | None:
        """How to rebuild it; ``None`` around a model that no registered builder makes."""
        return None if getattr(self.model, "spec", None) is None else self.placed

    def placed_as(self, part: str, **options: Any) -> ModelSpec:
        """As that part, around its model."""
        return ModelSpec(part, {"model": self.model, **options})


def innermost(model: nn.Module) -> nn.Module:
    """The model inside of everything that stands around it."""
    while inside := getattr(model, "layers_inside", ""):
        model = model.get_submodule(inside)
    return model
