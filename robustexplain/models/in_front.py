"""Models with transforms of the image in front of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from ..door import admit_as
from ..errors import InputError
from ..maps import resize
from ..random_streams import derive
from ..transforms import transforms as by_names

_passed_by: ContextVar[tuple[nn.Module, ...]] = ContextVar("models whose images are transformed already", default=())


@runtime_checkable
class Front(Protocol):
    """A model that changes its images before it classifies them: by transforms, or by a network of its own."""

    @property
    def transforms(self) -> nn.ModuleList:
        """What changes them, in order."""
        ...

    def transformed(self, x: Tensor) -> Tensor:
        """The changed images; ``x`` itself inside :func:`transformed_already`."""
        ...

    def taken_back(self, maps: Tensor, x: Tensor) -> Tensor:
        """Maps of the changed images in the coordinates of ``x``."""
        ...


class InFront(nn.Module):
    """A model that transforms its images first.

    Args:
        transforms: names of the transforms, the first one first.

    Raises:
        InputError: an unknown transform, or one twice.
    """

    def __init__(self, transforms: Sequence[str] = ()) -> None:
        super().__init__()
        # No parameters and no stored buffers: the weights' names are those of the model without them.
        self.transforms = nn.ModuleList(by_names(tuple(transforms)) if len(transforms) else ()).eval()

    @property
    def random(self) -> bool:
        """Whether a transform uses random draws."""
        return any(t.random for t in self.transforms)

    @property
    def rounds(self) -> bool:
        """Whether a transform rounds."""
        return any(t.rounds for t in self.transforms)

    @property
    def transform_names(self) -> tuple[str, ...]:
        """The names of the transforms."""
        return tuple(str(t.name) for t in self.transforms)

    def transformed(self, x: Tensor) -> Tensor:
        """The transformed images, as the network behind the transforms gets them, ``[B, C, H, W]``."""
        if passed_by(self):
            return x
        for transform in self.transforms:
            before, x = x, transform(x)
            if x.shape != before.shape:
                raise InputError(
                    f"the transform {transform.name!r} must give images of the shape of its input, "
                    f"{list(before.shape)}, got {list(x.shape)}"
                )
        return x

    def taken_back(self, maps: Tensor, x: Tensor) -> Tensor:
        """Maps ``[B, h, w]`` of the transformed images in the coordinates of ``x``; at its size where pixels moved."""
        if not any(t.moves for t in self.transforms):
            return maps
        with torch.no_grad():
            images = list(accumulate(self.transforms, lambda image, t: t(image), initial=x.detach()))
        maps = resize(maps, x.shape[-2:])
        for transform, image in zip(reversed(self.transforms), reversed(images[:-1]), strict=True):
            maps = transform.taken_back(maps, image)  # type: ignore[operator]
        return maps

    @abstractmethod
    def with_transforms(self, names: Sequence[str]) -> InFront:
        """The same network, its weights shared, with these transforms in front of it and no others."""

    def redrawn(self, seed: int) -> InFront:
        """The model with other random draws of its transforms; itself where nothing is random."""
        # Each transform has draws of its own, also where one stands there twice.
        seeds = [seed, *(derive(seed, i) % 2**31 for i in range(1, len(self.transforms)))]
        names = [t.redrawn(own).name for t, own in zip(self.transforms, seeds, strict=False)]  # type: ignore[operator]
        if not self.random:
            return self
        made = self.with_transforms(names)
        admit_as(made, self)
        return made


def passed_by(model: nn.Module) -> bool:
    """Whether the model takes images that were changed already, and changes them no more."""
    return any(model is each for each in _passed_by.get())


def in_front_of(model: nn.Module) -> Front | None:
    """The outermost model that still changes its images, among ``model`` and those that it stands around."""
    return next(_fronts(model), None)


def in_input_coordinates(model: nn.Module, maps: Tensor, x: Tensor) -> Tensor:
    """Maps ``[B, h, w]`` of a layer's grid in the coordinates of ``x``: as they are, unless pixels move before it."""
    fronts = list(_fronts(model))
    if not any(getattr(part, "moves", False) for front in fronts for part in front.transforms):
        return maps
    images = [x.detach()]
    with torch.no_grad():
        for front in fronts:
            images.append(front.transformed(images[-1]))
    for front, image in zip(reversed(fronts), reversed(images[:-1]), strict=True):
        maps = front.taken_back(maps, image)
    return maps


def _fronts(model: nn.Module) -> Iterator[Front]:
    """From the outside in."""
    while True:
        if isinstance(model, Front) and len(model.transforms) and not passed_by(model):
            yield model
        inside = getattr(model, "layers_inside", "")
        if not inside:
            return
        model = model.get_submodule(inside)


@contextmanager
def transformed_already(model: object) -> Iterator[None]:
    """Within this block ``model`` takes images that it has changed already; so do those of the blocks around it."""
    token = _passed_by.set((*_passed_by.get(), model))  # type: ignore[arg-type]
    try:
        yield
    finally:
        _passed_by.reset(token)
