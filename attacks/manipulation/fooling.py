"""Adversarial model manipulation (Heo et al. 2019): the maps of every input are wrong, the accuracy stays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.checks import Kind
from robustexplain.data import labels_of, stack
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Natural, Positive
from robustexplain.interpreters import Interpreter
from robustexplain.metrics import FooledActive, FooledCenter, FooledLocation, FooledTopK, Fooling
from robustexplain.objectives import FadeTopK, MatchMap, MoveCenter, Objective, SpreadUniformly
from robustexplain.random_streams import Streams, generator
from robustexplain.registry import MANIPULATIONS
from robustexplain.training import Samples, TrainingStep

from .base import View
from .finetuned import FineTuned
from .fooling_batch import FoolingBatch

NEEDS = ("gradients", "differentiable maps", "data")


@MANIPULATIONS.register("location-fooling", paper="Heo et al. 2019, arXiv v1 eq. 3", needs=NEEDS)
@dataclass(frozen=True)
class LocationFooling(FineTuned):
    """Every map shows the frame of the image, whatever the image: mean squared distance to a mask, passive fooling.

    The mask is 1 on a border of a seventh of each side, on the interpreter's own grid; both are min-max rescaled.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @property
    def fooled(self) -> Fooling:
        """The paper's test loss."""
        return FooledLocation()

    def fooling(self) -> Objective:
        """Match the frame."""
        return MatchMap()

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """The inputs unchanged, with the frame as goal map."""
        grid = honest.explain(x[:1], y[:1], native=True).maps
        return {"as they are": View(x, y, y, ops.frame(grid).expand(len(x), -1, -1))}


@MANIPULATIONS.register("top-k-fooling", paper="Heo et al. 2019, published version and code", needs=NEEDS)
@dataclass(frozen=True)
class TopKFooling(FineTuned):
    """Every map leaves out what the honest model's map shows most: its ``k`` highest pixels, passive fooling.

    Args:
        k: a count from 1 on, a share of the pixels below 1.
    """

    k: Positive = 0.1

    compares: ClassVar[bool] = True

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @property
    def fooled(self) -> Fooling:
        """The paper's test loss."""
        return FooledTopK(k=self.k)

    def fooling(self) -> Objective:
        """Fade the honest top ``k``."""
        return FadeTopK(self.k)


@MANIPULATIONS.register("center-fooling", paper="Heo et al. 2019, published version and code", needs=NEEDS)
@dataclass(frozen=True)
class CenterFooling(FineTuned):
    """Every map's centre of mass moves away from the honest model's, passive fooling."""

    compares: ClassVar[bool] = True

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @property
    def fooled(self) -> Fooling:
        """The paper's test loss."""
        return FooledCenter()

    def fooling(self) -> Objective:
        """Move the centre."""
        return MoveCenter()


@MANIPULATIONS.register("uniform-fooling", paper="Heo et al. 2019, arXiv v1 eq. 4", needs=NEEDS)
@dataclass(frozen=True)
class UniformFooling(FineTuned):
    """Every map is made uniform by maximising its entropy, passive fooling."""

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    headline: ClassVar[str] = "entropy"

    def fooling(self) -> Objective:
        """Spread uniformly."""
        return SpreadUniformly()


@MANIPULATIONS.register("active-fooling", paper="Heo et al. 2019, arXiv v1 eq. 5-6", needs=NEEDS)
@dataclass(frozen=True)
class ActiveFooling(FineTuned):
    """On images that hold both classes, each class's map becomes the honest map of the other: the two are swapped.

    The images are 2 x 2 blocks of two images of each class at random places (section 4.1); the prediction term is
    computed on ordinary batches only.

    Args:
        classes: the two classes whose explanations are swapped.
        images: how many block images are made from the training samples.
        shrink: halve each image, so that a block image has the size of an ordinary one. Otherwise it has twice the
            side: better for small images, and possible for convolutional networks with global pooling.
    """

    classes: tuple[Natural, Natural] = (0, 1)
    images: Count = 1100
    shrink: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes[0] == self.classes[1]:
            raise FieldError(type(self).__name__, "classes", f"must be two different classes, got {self.classes!r}")
        if self.evade and not self.shrink:
            raise FieldError(type(self).__name__, "evade", "needs shrink=True: block images of the size of the others")

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @property
    def fooled(self) -> Fooling:
        """The paper's test loss."""
        return FooledActive()

    def fooling(self) -> Objective:
        """Match the honest map of the other class."""
        return MatchMap()

    def pool(self, honest: Interpreter, data: Samples, device: torch.device) -> FoolingBatch:
        """The block images, each once for either class, with the honest map of the other class."""
        blocks = block_images(data, self.classes, self.images, self.seed, self.shrink).to(device)
        views = self._swapped(honest, blocks).values()
        batch = reduce(FoolingBatch.join, map(FoolingBatch.of, views))
        return replace(batch, keep_weight=0 * batch.keep_weight)

    def views(self, honest: Interpreter, x: Tensor, y: Tensor) -> dict[str, View]:
        """Block images of the inputs, explained for either class; the goal is the honest map of the other one."""
        data: Samples = torch.utils.data.TensorDataset(x.cpu(), y.cpu())
        blocks = block_images(data, self.classes, len(x), self.seed, self.shrink).to(x.device)
        return self._swapped(honest, blocks)

    def _swapped(self, honest: Interpreter, blocks: Tensor) -> dict[str, View]:
        ours, theirs = (torch.full((len(blocks),), c, device=blocks.device) for c in self.classes)
        first, second = (self.explained(honest, blocks, c) for c in (ours, theirs))
        answer = first.logits.argmax(1)
        return {
            f"block images, class {self.classes[0]}": View(blocks, ours, answer, second.maps),
            f"block images, class {self.classes[1]}": View(blocks, theirs, answer, first.maps),
        }

    def fooling_batch(
        self, honest: Interpreter, x: Tensor, y: Tensor, moment: TrainingStep, pool: FoolingBatch | None
    ) -> FoolingBatch:
        """Block images drawn from the pool for the map term, and the batch for the prediction term."""
        assert pool is not None
        drawn = Streams.of(x, moment.seed, moment.epoch, "blocks").integers(len(pool.keep_weight)).to(x.device)
        return replace(pool.select(drawn), other_x=x, other_y=y)


def block_images(data: Samples, classes: tuple[int, int], count: int, seed: int, shrink: bool = True) -> Tensor:
    """``[count, C, H, W]``: 2 x 2 blocks of two images of each class, at random places (Heo et al. 2019, section 4.1).

    Args:
        data: gives ``(x, label)``; images of both classes must be among them.
        classes: the two classes.
        count: how many.
        seed: of images and places.
        shrink: halve each image (its sides must be even); otherwise the result has twice the side.

    Raises:
        InputError: no images of a class, or an odd side.
    """
    labels, rng = labels_of(data), generator(seed, "blocks")
    rows = [[i for i, label in enumerate(labels) if label == c] for c in classes]
    for c, found in zip(classes, rows, strict=True):
        if not found:
            raise InputError(f"block images need images of class {c}, and the data holds none")
    firsts, seconds = (stack(data, found)[0] for found in rows)
    if shrink:
        if firsts.shape[-1] % 2 or firsts.shape[-2] % 2:
            raise InputError(f"images of {list(firsts.shape[-2:])} cannot be halved: use shrink=False")
        half = (firsts.shape[-2] // 2, firsts.shape[-1] // 2)
        firsts, seconds = (F.interpolate(t, half, mode="bilinear", antialias=True) for t in (firsts, seconds))
    made = []
    for _ in range(count):
        four = [
            part[int(i)] for part in (firsts, seconds) for i in torch.randint(len(part), (2,), generator=rng).tolist()
        ]
        a, b, c, d = (four[i] for i in torch.randperm(4, generator=rng).tolist())
        made.append(torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1))
    return torch.stack(made)
