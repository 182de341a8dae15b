"""The kinds of metrics and their contracts: a number per sample, ``[B]``, from checked arguments.

Metrics of half-precision maps are computed in float32 and returned in the dtype of the maps; stability, which has no
bound, in float32. NaN is returned only where a metric is undefined; its docstring says where.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import checks
from ..checks import Kind, kind_of
from ..door import admit, answer
from ..errors import InputError
from ..fields import Count, check_fields
from .cell import Cell

_AT_ONCE = 1 << 17
"""Pixels of a batch that one thread processes together on a CPU."""

Better = Literal["higher", "lower"]


@dataclass(frozen=True)
class Metric(ABC):
    """A measure of explanations, attacks or models: a number per sample."""

    better: ClassVar[Better]
    """Which direction is good for the user of the explanation and bad for its attacker; map metrics have none."""
    bounds: ClassVar[tuple[float, float]] = (-math.inf, math.inf)
    """The smallest and the largest value that it can take."""
    binary: ClassVar[bool] = False
    """Whether its values are 0 and 1, but for ties, so that its mean is a share."""
    differentiable: ClassVar[bool] = False
    """Whether the value carries a gradient to the maps (or, for visibility, to the attacked input)."""
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")
    """The kinds of input: a metric that uses neighbouring pixels takes only images."""

    def __post_init__(self) -> None:
        check_fields(self)

    def of_cell(self, cell: Cell) -> Tensor:
        """``[B]`` for the attacked inputs of a cell of the matrix.

        Raises:
            InputError: the metric needs more than a cell has, such as regions.
        """
        raise InputError(f"{type(self).__name__} needs more than a cell of the matrix has")

    def against_references(self, cell: Cell) -> dict[str, Tensor]:
        """``[B]`` against each other reference than the benign maps, by name; empty unless the metric compares maps."""
        return {}

    @classmethod
    def all_of_cell(cls, metrics: Sequence[Any], cell: Cell) -> list[Tensor]:
        """:meth:`of_cell` of each metric; a kind whose metrics share work overrides this."""
        return [metric.of_cell(cell) for metric in metrics]


@dataclass(frozen=True)
class MapMetric(Metric):
    """Compares maps with reference maps, a number per sample: ``metric(maps, reference)`` gives ``[B]``."""

    higher_is_closer: ClassVar[bool]
    """Whether a larger value means that the maps resemble each other more."""

    def __call__(self, maps: Tensor, reference: Tensor) -> Tensor:
        """``[B]`` from two batches of maps ``[B, H, W]``, or ``[B, D]`` for tables.

        Raises:
            InputError: if the shapes differ, a map is not floating point or not finite, or of a kind not taken.
        """
        check_pair(maps, reference)
        check_kind(self, maps)
        return in_pieces(self._measure, widened(maps), widened(reference)).to(maps.dtype)

    def of_cell(self, cell: Cell) -> Tensor:
        """The maps of the attacked inputs against the benign ones."""
        return self(cell.seen.maps, cell.benign.maps)

    def against_references(self, cell: Cell) -> dict[str, Tensor]:
        """Against each of the cell's references, and ``nearer``: 1 where the goal map is nearer than the benign one."""
        found = {name: self(cell.seen.maps, maps) for name, maps in cell.references.items()}
        if "goal" in found:
            goal, benign = found["goal"], self.of_cell(cell)
            found["nearer"] = (goal > benign if self.higher_is_closer else goal < benign).float()
        return found

    @abstractmethod
    def _measure(self, maps: Tensor, reference: Tensor) -> Tensor:
        """``[B]``; maps are checked."""


@dataclass(frozen=True)
class MapScore(Metric):
    """Measures maps without a reference, a number per sample: ``metric(maps)`` gives ``[B]``."""

    def __call__(self, maps: Tensor) -> Tensor:
        """``[B]`` from maps ``[B, H, W]``, or ``[B, D]`` for tables.

        Raises:
            InputError: if the maps are of another shape, not floating point, not finite, or of a kind not
                taken.
        """
        check_maps(maps, "maps")
        check_kind(self, maps)
        return in_pieces(self._measure, widened(maps)).to(maps.dtype)

    def of_cell(self, cell: Cell) -> Tensor:
        """The maps of the attacked inputs."""
        return self(cell.seen.maps)

    @abstractmethod
    def _measure(self, maps: Tensor) -> Tensor:
        """``[B]``; maps are checked."""


@dataclass(frozen=True)
class Localisation(Metric):
    """Compares maps with the object's region, a number per sample: ``metric(maps, region)`` gives ``[B]``."""

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __call__(self, maps: Tensor, region: Tensor) -> Tensor:
        """``[B]`` from maps ``[B, H, W]`` and the object's pixels, bool ``[B, H, W]``.

        Raises:
            InputError: wrong shapes or types, maps that are not finite, or a sample whose region is empty.
        """
        check_maps(maps, "maps")
        check_kind(self, maps)
        if not isinstance(region, Tensor) or region.dtype != torch.bool or region.shape != maps.shape:
            got = f"{region.dtype} {list(region.shape)}" if isinstance(region, Tensor) else type(region).__name__
            raise InputError(f"region must be bool {list(maps.shape)}, got {got}; see regions_from_boxes")
        # As bytes: amax is several times faster than any.
        empty = region.view(torch.uint8).amax((1, 2)) == 0
        if empty.any():
            raise InputError(f"region is empty for sample {int(empty.nonzero()[0])}: every sample needs an object")
        return in_pieces(self._measure, widened(maps), region).to(maps.dtype)

    @abstractmethod
    def _measure(self, maps: Tensor, region: Tensor) -> Tensor:
        """``[B]``; arguments are checked."""


@dataclass(frozen=True)
class Faithfulness(Metric):
    """Compares maps with the model's behaviour: ``metric(model, x, maps, target=None)`` gives ``[B]``.

    The model runs without autograd, and never on more than ``batch_size`` inputs at once: samples and perturbation
    steps are batched together.

    Args:
        of: the score: the softmax ``probability`` of the target, or its ``logit``.
        batch_size: largest batch in a pass of the model.
    """

    of: Literal["probability", "logit"] = "probability"
    batch_size: Count = 256

    @torch.no_grad()
    def __call__(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor | None = None) -> Tensor:
        """``[B]`` for maps ``[B, H, W]`` (tables ``[B, D]``) that explain class ``target`` (default: the prediction).

        Raises:
            InputError: bad ``x``, maps that do not fit it, a class out of range, a model in train mode.
        """
        return self._measure(model, x, widened(maps), self._checked_target(model, x, maps, target)).to(maps.dtype)

    def of_cell(self, cell: Cell) -> Tensor:
        """The maps of the attacked inputs, for the class that is predicted on them."""
        return self(cell.system.model, cell.attacked, cell.seen.maps, cell.seen.prediction)

    @abstractmethod
    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        """``[B]``; arguments are checked, autograd is off."""

    def _checked_target(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor | None) -> Tensor:
        """Check all arguments; the target, or the prediction."""
        checks.inputs(x)
        admit(model, x)
        check_maps(maps, "maps")
        checks.maps_like(maps, x, "maps")
        check_kind(self, maps)
        if target is not None:
            checks.class_indices(target, len(x), "target")
        if target is None:
            return torch.cat([answer(model, part) for part in x.split(self.batch_size)]).argmax(1)
        # One input is enough for the number of classes: the metric itself runs the model on all of them.
        logits = answer(model, x[:1])
        checks.classes(target, len(x), logits.shape[1], "target")
        return target.to(logits.device).long()

    def _scores(self, model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        """The score of each row's target, ``[n]``; the caller passes at most ``batch_size`` rows."""
        logits = widened(answer(model, x))
        values = logits.softmax(1) if self.of == "probability" else logits
        return values.gather(1, target[:, None])[:, 0]


@dataclass(frozen=True)
class Visibility(Metric):
    """How visible a perturbation is, a number per sample: ``metric(x, attacked)`` gives ``[B]``."""

    better: ClassVar[Better] = "higher"

    def __call__(self, x: Tensor, attacked: Tensor) -> Tensor:
        """``[B]`` from images and attacked images, ``[B, C, H, W]`` in ``[0, 1]``.

        Raises:
            InputError: unequal shapes, values outside ``[0, 1]`` or not finite.
        """
        checks.images(x, type(self).__name__)
        checks.images(attacked, type(self).__name__)
        if x.shape != attacked.shape:
            raise InputError(f"x and attacked must have equal shapes, got {list(x.shape)} and {list(attacked.shape)}")
        return self._measure(widened(x), widened(attacked)).to(x.dtype)

    def of_cell(self, cell: Cell) -> Tensor:
        """The attacked inputs against the benign ones."""
        return self(cell.clean, cell.attacked)

    @abstractmethod
    def _measure(self, x: Tensor, attacked: Tensor) -> Tensor:
        """``[B]``; images are checked."""


def in_pieces(measure: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """``measure`` on some samples at a time, ``[B]``.

    On a CPU the intermediate results of a large batch do not fit the caches, and allocating them costs more than the
    arithmetic.
    """
    first = batches[0]
    step = max(1, _AT_ONCE * torch.get_num_threads() // first[0].numel())
    if first.device.type != "cpu" or step >= len(first):
        return _a_number_each(measure, batches)
    return torch.cat([_a_number_each(measure, some) for some in zip(*(b.split(step) for b in batches), strict=True)])


def _a_number_each(measure: Callable[..., Tensor], batches: tuple[Tensor, ...]) -> Tensor:
    found, size = measure(*batches), len(batches[0])
    if found.shape != (size,):
        name = getattr(measure, "__qualname__", "a metric")
        raise InputError(f"{name} must give a number a sample, [{size}], got {list(found.shape)}")
    return found


def check_pair(maps: Tensor, reference: Tensor) -> None:
    """Refuse anything but two equal, finite, floating ``[B, H, W]`` or ``[B, D]``."""
    for value in (maps, reference):
        if not isinstance(value, Tensor):
            raise InputError(f"maps must be two equal [B, H, W], or [B, D] for tables, got {type(value).__name__}")
    if maps.shape != reference.shape or maps.dim() not in (2, 3):
        found = f"{list(maps.shape)} and {list(reference.shape)}"
        raise InputError(f"maps must be two equal [B, H, W], or [B, D] for tables, got {found}")
    check_maps(maps, "maps")
    check_maps(reference, "reference")


def check_maps(maps: Tensor, name: str) -> None:
    """Refuse anything but finite, non-empty, floating maps ``[B, H, W]`` or ``[B, D]``."""
    if not isinstance(maps, Tensor):
        raise InputError(f"{name} must be a torch.Tensor, got {type(maps).__name__}")
    if maps.dim() not in (2, 3) or maps.numel() == 0:
        found = list(maps.shape)
        raise InputError(f"{name} must be non-empty and have shape [B, H, W], or [B, D] for tables, got {found}")
    if not maps.is_floating_point():
        raise InputError(f"{name} must be floating point, got {maps.dtype}; for masks use .float()")
    low, high = (float(value) for value in maps.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        bad = ~torch.isfinite(maps.detach()).flatten(1).all(1)
        raise InputError(f"{name} holds NaN or infinity, first in sample {int(bad.nonzero()[0])}")


def check_kind(metric: Metric, maps: Tensor) -> None:
    """Refuse maps of tables for a metric that uses neighbouring pixels, and maps of images for one of columns.

    Raises:
        InputError: with the name of the metric.
    """
    kind = kind_of(maps)
    if kind in metric.takes:
        return
    name, shown = type(metric).__name__, list(maps.shape)
    if kind == "tables":
        raise InputError(
            f"{name} uses the positions of pixels, which columns of a table do not have: it takes maps [B, H, W], "
            f"got {shown}"
        )
    raise InputError(f"{name} is about a column of a table: it takes maps [B, D], got {shown}")


def widened(values: Tensor) -> Tensor:
    """Half precision as float32: it is too inaccurate for sums over pixels."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
