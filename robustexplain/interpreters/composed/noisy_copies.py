"""Maps of noisy copies of an input, in batches, and what is made of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import maps as ops
from ...autograd.straight_through import is_straight
from ...checks import Kind
from ...errors import InputError, UnsupportedModelError
from ...fields import Count, Natural
from ...random_streams import derive
from ..base import Explanation
from ..certificate import Certificate
from ..gradients.integrated import predicted
from ..gradients.smoothgrad import Draw, normal
from .base import Wrapper, in_rows

PredictionOf = Literal["input", "copy"]
"""Whose prediction is explained on a noisy copy: that of the input, or that of the copy itself."""
SOFTNESS = 0.25
"""Width of the sigmoid that stands for a cut in gradients, as a share of the mean distance of a map to the cut."""
KEPT = 1 << 24
"""Numbers of noise that are kept between calls, at most."""


@dataclass(frozen=True, eq=False)
class OverCopies(Wrapper):
    """An interpreter that explains noisy copies by another one.

    Args:
        samples: noisy copies.
        seed: of the noise, which is the same for every input.
        batch_size: largest number of copies in one pass of the model.
    """

    samples: Count = field(default=20, kw_only=True)
    seed: Natural = field(default=0, kw_only=True)
    batch_size: Count = field(default=64, kw_only=True)

    keeps_draws: ClassVar[tuple[str, ...]] = ("_drawn",)

    @property
    def averaged(self) -> int:
        """As many as there are copies."""
        return self.samples

    @cached_property
    def _drawn(self) -> dict[Any, Tensor]:
        return {}


@dataclass(frozen=True, eq=False)
class ProvingCopies(OverCopies):
    """An interpreter of images that proves something of the maps of noisy copies, if there are enough of them."""

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    unit_range: ClassVar[bool] = True

    @abstractmethod
    def check_draws(self, size: tuple[int, ...] | None = None) -> None:
        """Refuse settings that could not prove anything about images of ``size``; of any size for ``None``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if "images" not in self.base.takes:
            name, base = type(self).__name__, type(self.base).__name__
            raise UnsupportedModelError(f"{name} adds noise to images, and {base} explains table rows")
        self.check_draws()

    def _check(self, x: Tensor) -> None:
        self.check_draws(tuple(x.shape[-2:]))
        super()._check(x)


@dataclass(frozen=True, eq=False)
class MarkingCopies(ProvingCopies):
    """A map that is the share of noisy copies which have a cell among their largest ones, with what is proved of it.

    Args:
        prediction_of: whose prediction is explained on a copy, the input's or the copy's own.
    """

    prediction_of: PredictionOf = field(default="input", kw_only=True)

    rounds: ClassVar[bool] = True

    @abstractmethod
    def _marks(self, x: Tensor, target: Tensor | None, graph: bool) -> Tensor:
        """What is counted of the copies, ``[..., b, h, w]``."""

    @abstractmethod
    def _shares(self, marks: Tensor) -> Tensor:
        """``[b, h, w]``."""

    @abstractmethod
    def _certificate(self, marks: Tensor) -> Certificate:
        """What they prove."""

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = x if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)
        target = classes if self.prediction_of == "input" else target
        follow = followed(graph)
        marks = torch.cat([self._marks(*rows, follow) for rows in in_rows(x, target, self.batch_size)], -3)
        maps = attached(self._shares(marks).to(x.dtype), logits)
        # A class that is given, by the caller or by an interpreter around this one, is explained on every copy.
        certificate = replace(self._certificate(marks.detach()), same_class=target is not None)
        return Explanation(logits, maps, certificate=certificate)


def copy_maps(
    method: OverCopies,
    x: Tensor,
    target: Tensor | None,
    graph: bool,
    scale: float | Tensor,
    draw: Draw = normal,
    clip: bool = False,
) -> Iterator[Tensor]:
    """Maps ``[k, B, h, w]`` of noisy copies, some at a time, until there are ``samples``; on the grid of ``base``.

    Args:
        method: explains them by its ``base``, at most ``batch_size`` in a pass unless one copy of each is more.
        x: ``[B, ...]``.
        target: ``[B]``; ``None``: each copy's own prediction.
        graph: whether the maps are differentiated; without it they are detached.
        scale: of the noise; a number, or ``[1, ...]`` like ``x``.
        draw: the noise of one copy, the same for all inputs.
        clip: whether copies are clipped to ``[0, 1]``.
    """
    at_once = max(1, method.batch_size // len(x))
    for start in range(0, method.samples, at_once):
        size = min(at_once, method.samples - start)
        copies = (x + scale * noise(method, x, range(start, start + size), draw)[:, None]).flatten(0, 1)
        copies = ops.clipped(copies) if clip else copies
        found = method.base._explain(copies, None if target is None else target.repeat(size), graph).maps
        yield (found if graph else found.detach()).unflatten(0, (size, len(x)))


def noise(method: OverCopies, like: Tensor, copies: range, draw: Draw) -> Tensor:
    """The noise of some copies, ``[k, ...]``: each copy has a generator of its own."""
    shape, known = like.shape[1:], method._drawn
    if method.samples * shape.numel() > KEPT:
        return _draws(method.seed, like, copies, draw)
    key = (shape, like.device, like.dtype)
    found = known.get(key)
    if found is None:
        found = _draws(method.seed, like, range(method.samples), draw)
        # Another thread may draw for another size: each returns its own.
        known.clear()
        known[key] = found
    return found[copies.start : copies.stop]


def _draws(seed: int, like: Tensor, copies: range, draw: Draw) -> Tensor:
    rngs = (torch.Generator().manual_seed(derive(seed, "copy", i)) for i in copies)
    # On the CPU in float32, so that the noise is the same on every device and in every dtype.
    return torch.stack([draw(like.shape[1:], rng) for rng in rngs]).to(like.device, like.dtype)


def followed(graph: bool) -> bool:
    """Whether the copies' maps need a graph although they are cut: only where a search goes straight through cuts."""
    return graph and is_straight()


def attached(maps: Tensor, logits: Tensor) -> Tensor:
    """``maps`` with the derivative of cut ones, zero, where nothing else gives them one."""
    if maps.requires_grad or not logits.requires_grad:
        return maps
    return maps + 0 * ops.expand(logits.sum(1), maps)


def cells(found: Tensor, size: torch.Size, grid: int) -> Tensor:
    """Magnitudes of maps ``[k, B, h, w]`` as numbers of cells, ``[k, B, grid, grid]``: means over each cell.

    ``grid`` of 0: the pixels of the input, of ``size``.
    """
    flat = found.flatten(0, 1).abs()
    if grid == 0 or grid > min(flat.shape[-2:]):
        flat = ops.resize(flat, size)
    if grid and tuple(flat.shape[-2:]) != (grid, grid):
        flat = F.adaptive_avg_pool2d(flat[:, None], grid)[:, 0]
    values: Tensor = flat.unflatten(0, found.shape[:2])
    return values


def kept(keep: float, number: int) -> int:
    """How many of so many cells a share ``keep`` is: one at least, and not all."""
    return min(ops.top_k_count(keep, number), number - 1)


def marked(values: Tensor, keep: float, graph: bool) -> Tensor:
    """1 at the cells of each map ``[k, B, h, w]`` that are among its largest, 0 elsewhere.

    Cells tied with the first that is left out are left out too: a map that is zero nearly everywhere marks no zeros.
    """
    rows = values.flatten(0, 1).flatten(1)
    cut = ops.kth_largest(rows.detach(), kept(keep, rows.shape[1]) + 1)
    return above(rows, cut, graph).reshape(values.shape)


def above(rows: Tensor, cut: Tensor, graph: bool) -> Tensor:
    """1 where rows ``[m, n]`` are above their cut ``[m, 1]``, else 0.

    With ``graph`` the derivative is that of ``sigmoid((row - cut) / T)``; the true one is zero.
    """
    hard = (rows.detach() > cut).to(rows.dtype)
    if not graph:
        return hard
    width = SOFTNESS * (rows.detach() - cut).abs().mean(1, keepdim=True)
    soft = ((rows - cut) / torch.where(width > 0, width, 1)).sigmoid()
    return hard + (soft - soft.detach())


def number_of_cells(name: str, grid: int, size: tuple[int, ...] | torch.Size) -> int:
    """How many cells a grid has on images of ``size``; their pixels for 0.

    Raises:
        InputError: a grid of one cell, or one finer than the images.
    """
    if grid == 1 or grid > min(size):
        raise InputError(f"{name}.grid: must be 2 to {min(size)} cells a side on images of {list(size)}, got {grid}")
    return grid * grid if grid else int(size[0]) * int(size[1])
