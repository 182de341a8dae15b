"""Replacing an image's pixels in the order of a map, and what the model says on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..streams import Streams
from .filters import blurred

Replacement = Literal["zero", "mean", "noise", "blur"]
"""What a removed pixel shows: 0, the image's mean colour, uniform noise in ``[0, 1]``, or the image blurred."""


def replaced(x: Tensor, how: Replacement, seed: int) -> Tensor:
    """``[B, C, H, W]`` with every pixel replaced; noise comes from the sample's own stream.

    The blur has Petsiuk et al.'s kernel, 11 x 11 with a standard deviation of 5, with replicated borders where their
    code pads zeros, which darkens them.
    """
    if how == "zero":
        return torch.zeros_like(x)
    if how == "mean":
        return x.mean((2, 3), keepdim=True).expand_as(x)
    return blurred(x, sigma=5.0, radius=5) if how == "blur" else Streams.of(x, seed, "replacement").uniform(x)


def region_order(maps: Tensor, patch: int, *, ascending: bool = False) -> tuple[Tensor, int]:
    """When each pixel is replaced: ``[B, H, W]`` int64 from 0 on, and how many regions there are.

    Regions are squares of ``patch`` pixels from the top left, cut off at the right and the bottom; the one with the
    largest sum comes first (last if ``ascending``). Equal sums go in reading order either way.
    """
    height, width = maps.shape[1:]
    padded = F.pad(maps, (0, -width % patch, 0, -height % patch))
    sums = F.avg_pool2d(padded[:, None], patch)[:, 0] if patch > 1 else padded
    order = sums.flatten(1).argsort(stable=True, descending=not ascending)
    places = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=maps.device).expand_as(order)
    )
    grid = places.reshape(sums.shape).repeat_interleave(patch, 1).repeat_interleave(patch, 2)
    return grid[:, :height, :width], order.shape[1]


def sweep(
    score: Callable[[Tensor, Tensor], Tensor],
    start: Tensor,
    end: Tensor,
    order: Tensor,
    cuts: Tensor,
    target: Tensor,
    chunk: int,
) -> Tensor:
    """Scores ``[B, S]`` of images that show ``end`` where ``order < cuts[s]`` and ``start`` elsewhere.

    Args:
        score: ``score(x, target)`` gives ``[n]``.
        start: ``[B, C, H, W]``.
        end: the same shape.
        order: ``[B, H, W]``, as :func:`region_order` gives it.
        cuts: ``[S]``.
        target: ``[B]``.
        chunk: images at once, over samples and steps together.
    """
    found = []
    for pairs in torch.arange(len(start) * len(cuts), device=start.device).split(chunk):
        rows, steps = pairs // len(cuts), pairs % len(cuts)
        shown = (order[rows] < cuts[steps, None, None])[:, None]
        found.append(score(torch.where(shown, end[rows], start[rows]), target[rows]))
    return torch.cat(found).reshape(len(start), len(cuts))


def trapezoid(curve: Tensor) -> Tensor:
    """Area ``[B]`` under curves ``[B, S]`` at evenly spaced points of ``[0, 1]``."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def parts(x: Tensor, target: Tensor, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of at most ``chunk`` rows."""
    return zip(x.split(chunk), target.split(chunk), strict=True)


def gathered(batches: Iterator[Tensor], count: int) -> Iterator[Tensor]:
    """``count`` batches stacked at a time; each is drawn by itself, so draws do not depend on ``count``."""
    waiting: list[Tensor] = []
    for batch in batches:
        waiting.append(batch)
        if len(waiting) == count:
            yield torch.stack(waiting)
            waiting = []
    if waiting:
        yield torch.stack(waiting)
