"""Maps of noisy copies of an input, in batches, and what is made of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import maps as ops
from ...autograd.straight_through import is_straight
from ...errors import InputError, UnsupportedModelError
from ...random_streams import derive
from ..base import Interpreter
from ..gradients.smoothgrad import Draw, normal

PredictionOf = Literal["input", "copy"]
"""Whose prediction is explained on a noisy copy: that of the input, or that of the copy itself."""
SOFTNESS = 0.25
"""Width of the sigmoid that stands for a cut in gradients, as a share of the mean distance of a map to the cut."""
KEPT = 1 << 24
"""Numbers of noise that are kept between calls, at most."""


class OverCopies(Protocol):
    """An interpreter that explains noisy copies by another one."""

    @property
    def base(self) -> Interpreter:
        """Explains the copies."""
        ...

    @property
    def samples(self) -> int:
        """How many copies."""
        ...

    @property
    def seed(self) -> int:
        """Of their noise."""
        ...

    @property
    def batch_size(self) -> int:
        """The largest number of copies in one pass."""
        ...

    @property
    def _drawn(self) -> dict[Any, Tensor]: ...


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


def refuse_tables(method: Interpreter, base: Interpreter) -> None:
    """Refuse an interpreter of tables.

    Raises:
        UnsupportedModelError: with its name.
    """
    if "images" not in base.takes:
        name = type(method).__name__
        raise UnsupportedModelError(f"{name} adds noise to images, and {type(base).__name__} explains table rows")


def number_of_cells(name: str, grid: int, size: tuple[int, ...] | torch.Size) -> int:
    """How many cells a grid has on images of ``size``; their pixels for 0.

    Raises:
        InputError: a grid of one cell, or one finer than the images.
    """
    if grid == 1 or grid > min(size):
        raise InputError(f"{name}.grid: must be 2 to {min(size)} cells a side on images of {list(size)}, got {grid}")
    return grid * grid if grid else int(size[0]) * int(size[1])
