"""A classifier that takes images in [0, 1], and the description that rebuilds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.inputs import InputSpec
from ..errors import InputError, UnsupportedModelError
from .in_front import InFront

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ModelSpec:
    """How to rebuild an architecture without its weights and without a download: ``models.rebuild(spec)``.

    Args:
        name: the name that ``build`` knows.
        options: keyword arguments of its builder: what JSON can write, and modules that it is made of.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)


class Classifier(InFront):
    """A network with its own normalisation folded in: ``logits = net((x - mean) / std)``.

    Transforms that stand in front of it change the images before they are normalised.

    ``mean`` and ``std`` are buffers of the state dict, so that a saved classifier keeps the normalisation it was
    trained with.

    Args:
        net: takes normalised images ``[B, C, H, W]``, gives logits ``[B, K]``.
        mean: a number a channel, in the units of [0, 1] pixels.
        std: a positive number a channel.
        spec: how to rebuild the architecture; ``None`` for a network that ``build`` does not know.
        num_classes: K; may be left out if ``spec`` holds it.
        input_size: the side in pixels that the network was made for; ``None`` if it does not say. Not enforced.
        transforms: names of the transforms in front of it, the first one first, such as ``("jpeg-75",)``; they join the
            options of ``spec``.

    Raises:
        InputError: for a normalisation that makes no sense, an unknown number of classes or an unknown transform.
    """

    mean: Tensor
    std: Tensor
    inputs: InputSpec | None = None
    """How images are prepared for it and what its classes are called, where its origin says so; for a ``System``."""

    def __init__(
        self,
        net: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        spec: ModelSpec | None = None,
        *,
        num_classes: int | None = None,
        input_size: int | None = None,
        transforms: Sequence[str] = (),
    ) -> None:
        super().__init__(transforms)
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise InputError(f"mean and std need one number a channel, std above 0; got {mean!r} and {std!r}")
        if num_classes is None and spec is not None:
            num_classes = spec.options.get("num_classes")
        if num_classes is None:
            raise InputError("num_classes is needed where no spec holds it: Classifier(..., num_classes=10)")
        self.net = net
        self.spec = None if spec is None else _in_front_of(spec, transforms)
        self.num_classes = num_classes
        self.in_channels = len(mean)
        self.input_size = input_size
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]`` of images ``[B, C, H, W]`` in [0, 1].

        Raises:
            InputError: for a wrong number of dimensions or channels.
        """
        # torch.fx traces with proxies, which are no tensors: the check must leave no trace in a graph.
        if isinstance(x, Tensor):
            self._check(x)
        x = self.transformed(x)
        logits: Tensor = self.net((x - self.mean) / self.std)
        return logits

    def with_transforms(self, names: Sequence[str]) -> Classifier:
        """The same network, its weights shared, with these transforms in front of it and no others.

        Raises:
            UnsupportedModelError: a subclass, whose own ``forward`` would be lost.
        """
        if type(self) is not Classifier:
            raise UnsupportedModelError(
                f"{type(self).__name__} may compute more than a Classifier does: put transforms around it, "
                "models.Transformed(model, names)"
            )
        plain = [0.0] * self.in_channels, [1.0] * self.in_channels
        made = Classifier(
            self.net, *plain, self.spec, num_classes=self.num_classes, input_size=self.input_size, transforms=names
        )
        made.mean, made.std, made.training = self.mean, self.std, self.training
        made.inputs = self.inputs
        return made

    def _check(self, x: Tensor) -> None:
        if x.dim() != 4:
            raise InputError(f"x must have shape [B, C, H, W], got {list(x.shape)}; a single image needs x[None]")
        if x.shape[1] == self.in_channels:
            return
        name = self.spec.name if self.spec else type(self.net).__name__
        raise InputError(
            f"x has {x.shape[1]} channel(s), shape {list(x.shape)}, but {name} takes {self.in_channels}; "
            f"load it with in_channels={x.shape[1]}, or convert the images"
        )


def _in_front_of(spec: ModelSpec, transforms: Sequence[str]) -> ModelSpec:
    options = {key: value for key, value in spec.options.items() if key != "transforms"}
    return replace(spec, options={**options, "transforms": list(transforms)} if transforms else options)


def per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    """A normalisation for another number of channels: as it is where the number fits, else its average for each."""
    if len(values) == channels:
        return tuple(float(v) for v in values)
    return (sum(values) / len(values),) * channels
