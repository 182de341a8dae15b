"""Random changes of training images, each drawn from its sample's own stream."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ..data.base import Samples
from ..errors import FieldError, InputError
from ..random_streams import generator

Operation = Callable[[Tensor, torch.Generator], Tensor]
"""An image ``[C, H, W]`` in [0, 1] and the sample's generator to an image of the same shape in [0, 1]."""

_NAME = re.compile(r"^(flip|crop|rotate|colour)(?:-(\d+(?:\.\d+)?))?$")


def operation(name: str) -> Operation:
    """The change of that name: ``flip``, ``crop-N``, ``rotate-D``, ``colour-S``.

    Raises:
        FieldError: of ``Training.augment``, for a name that is none of these or a number out of range.
    """
    found = _NAME.match(name) if isinstance(name, str) else None
    if found is not None:
        kind, size = found[1], float(found[2] or 0)
        if kind == "flip" and found[2] is None:
            return _flip
        if kind == "crop" and size >= 1 and size == int(size):
            return lambda x, rng: _crop(x, rng, int(size))
        if kind == "rotate" and 0 < size <= 180:
            return lambda x, rng: _rotate(x, rng, size)
        if kind == "colour" and 0 < size <= 1:
            return lambda x, rng: _colour(x, rng, size)
    allowed = "flip, crop-N (whole pixels), rotate-D (up to 180 degrees) or colour-S (up to 1)"
    raise FieldError("Training", "augment", f"must name {allowed}, got {name!r}")


@dataclass(frozen=True)
class Augmented(Dataset[tuple[Tensor, int]]):
    """Samples as they are seen in one epoch, changed at random; sample ``i`` always draws the same in it.

    Args:
        samples: images ``[C, H, W]`` in [0, 1].
        names: of the changes, in order.
        seed: of the training.
        epoch: which pass over the data.

    Raises:
        InputError: on the first sample, if it is no image.
    """

    samples: Samples
    names: tuple[str, ...]
    seed: int
    epoch: int

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        x, y = self.samples[index]
        if x.dim() != 3:
            raise InputError(f"Training.augment changes images [C, H, W]; a sample has shape {list(x.shape)}")
        rng = generator(self.seed, "augment", self.epoch, index)
        for name in self.names:
            x = operation(name)(x, rng)
        return x, y


def _uniform(rng: torch.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(torch.rand((), generator=rng, dtype=torch.float64))


def _flip(x: Tensor, rng: torch.Generator) -> Tensor:
    return x.flip(-1) if _uniform(rng, 0, 1) < 0.5 else x


def _crop(x: Tensor, rng: torch.Generator, margin: int) -> Tensor:
    top, left = torch.randint(2 * margin + 1, (2,), generator=rng).tolist()
    wide = F.pad(x, (margin, margin, margin, margin))
    return wide[:, top : top + x.shape[1], left : left + x.shape[2]]


def _rotate(x: Tensor, rng: torch.Generator, degrees: float) -> Tensor:
    angle = math.radians(_uniform(rng, -degrees, degrees))
    # The grid's units are half sides: on an image that is not square a turn in pixels is a shear there.
    ratio = x.shape[1] / x.shape[2]
    turn = [[math.cos(angle), -math.sin(angle) * ratio, 0.0], [math.sin(angle) / ratio, math.cos(angle), 0.0]]
    grid = F.affine_grid(x.new_tensor([turn]), [1, *x.shape], align_corners=False)
    return F.grid_sample(x[None], grid, align_corners=False)[0].clamp(0, 1)


def _colour(x: Tensor, rng: torch.Generator, strength: float) -> Tensor:
    brightness, contrast, saturation = (_uniform(rng, 1 - strength, 1 + strength) for _ in range(3))
    x = (x * brightness).clamp(0, 1)
    x = _blend(x, _grey(x).mean(), contrast)
    return _blend(x, _grey(x), saturation)


def _grey(x: Tensor) -> Tensor:
    # Luma of ITU-R BT.601, as in torchvision; an image of other than three channels has no colour to weigh.
    weights = x.new_tensor([0.299, 0.587, 0.114]) if x.shape[0] == 3 else x.new_full((x.shape[0],), 1 / x.shape[0])
    return (weights[:, None, None] * x).sum(0, keepdim=True)


def _blend(x: Tensor, towards: Tensor, share: float) -> Tensor:
    return (share * x + (1 - share) * towards).clamp(0, 1)
