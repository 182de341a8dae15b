"""Replacing an image's pixels, or a row's columns, in the order of a map, and the model's scores at each step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..random_streams import Streams
from .filters import blurred
from .ranking import stable_order

Replacement = Literal["zero", "mean", "noise", "blur"]
"""The value of a removed pixel: 0, the image's mean colour, uniform noise in ``[0, 1]``, or the image blurred.

A removed column of a table becomes 0, or the mean by which the model's own normalisation centres it (``mean``).
"""


def replaced(x: Tensor, how: Replacement, seed: int, model: nn.Module | None = None) -> Tensor:
    """``[B, C, H, W]`` with every pixel replaced, or ``[B, D]`` with every column; noise has one stream a sample.

    The blur has Petsiuk et al.'s kernel, 11 x 11 with a standard deviation of 5, with replicated borders where their
    code pads zeros, which darkens them. The mean of a table's columns is that of ``model``.

    Raises:
        InputError: noise or a blur for table rows.
        UnsupportedModelError: the mean for table rows, and a model that has none.
    """
    if how == "zero":
        return torch.zeros_like(x)
    if x.dim() == 2:
        return _replaced_columns(x, how, model)
    if how == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    return blurred(x, sigma=5.0, radius=5) if how == "blur" else Streams.of(x, seed, "replacement").uniform(x)


def _replaced_columns(x: Tensor, how: Replacement, model: nn.Module | None) -> Tensor:
    # Imported here: at the top it would make metrics depend on interpreters at import.
    from ..interpreters.gradients.baselines import baseline_like

    if how != "mean" or model is None:
        raise InputError(f"a removed column of a table shows 'zero', or the model's 'mean'; got replacement {how!r}")
    return baseline_like("mean", model, x).expand_as(x)


def region_order(maps: Tensor, patch: int, *, ascending: bool = False) -> tuple[Tensor, int]:
    """When each pixel is replaced: ``[B, H, W]`` int64 from 0 on, and how many regions there are.

    Regions are squares of ``patch`` pixels from the top left, cut off at the right and the bottom; the one with the
    largest sum comes first (last if ``ascending``). Equal sums go in reading order either way. In a table, ``[B, D]``,
    every column is a region.
    """
    if maps.dim() == 2:
        return _places(maps, ascending), maps.shape[1]
    height, width = maps.shape[1:]
    padded = F.pad(maps, (0, -width % patch, 0, -height % patch))
    sums = F.avg_pool2d(padded[:, None], patch)[:, 0] if patch > 1 else padded
    places = _places(sums.flatten(1), ascending)
    grid = places.reshape(sums.shape).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return grid[:, :height, :width], places.shape[1]


def _places(sums: Tensor, ascending: bool) -> Tensor:
    order = stable_order(sums, descending=not ascending)
    counted = torch.arange(order.shape[1], device=sums.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, counted)


def over_channels(values: Tensor, x: Tensor) -> Tensor:
    """A value a pixel, ``[B, H, W]``, to broadcast against images ``x``; a value a column, ``[B, D]``, as it is."""
    return values[:, None] if x.dim() == 4 else values


def sweep(
    score: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    order: Tensor,
    cuts: Tensor,
    target: Tensor,
    batch_size: int,
) -> Tensor:
    """Scores ``[B, S]`` of images that show ``end`` where ``order < cuts[s]`` and ``start`` elsewhere.

    Args:
        score: ``score(x, target)`` gives ``[n]``.
        start: ``[B, C, H, W]`` or ``[B, D]``.
        end: the same shape.
        order: ``[B, H, W]`` or ``[B, D]``, as :func:`region_order` gives it.
        cuts: ``[S]``.
        target: ``[B]``.
        batch_size: images at once, over samples and steps together.
    """
    batch, limits = len(start), cuts.tolist()
    order = over_channels(order, start).float()
    found = []
    for first in range(0, batch * len(cuts), batch_size):
        stretches = list(_stretches(first, min(first + batch_size, batch * len(cuts)), batch))
        batches = [_mixed(start[rows], end[rows], order[rows], limits[step]) for step, rows in stretches]
        found.append(score(_joined(batches), _joined([target[rows] for _, rows in stretches])))
    return torch.cat(found).reshape(len(cuts), batch).mT


def _stretches(first: int, last: int, batch: int) -> Iterator[tuple[int, slice]]:
    # Rows first .. last of the concatenated steps, ``batch`` rows each, as (step, rows) pairs.
    while first < last:
        step, low = divmod(first, batch)
        high = min(batch, low + last - first)
        yield step, slice(low, high)
        first += high - low


def _joined(pieces: list[Tensor]) -> Tensor:
    return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


def _mixed(start: Tensor, end: Tensor, order: Tensor, cut: int) -> Tensor:
    # Weights of 0 and 1 select exactly, and on a CPU five times as fast as torch.where.
    weights = torch.lt(order, cut, out=torch.empty_like(order))
    return torch.lerp(start, end, weights.to(start.dtype))


def trapezoid(curve: Tensor) -> Tensor:
    """Area ``[B]`` under curves ``[B, S]`` at evenly spaced points of ``[0, 1]``."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def parts(x: Tensor, target: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most ``batch_size`` rows."""
    return zip(x.split(batch_size), target.split(batch_size), strict=True)


def gathered(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """``count`` batches stacked at a time; each is drawn by itself, so draws do not depend on ``count``."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == count:
            yield torch.stack(waiting) if count > 1 else batch[None]
            waiting = []
    if waiting:
        yield torch.stack(waiting)
