"""What an owner who knows the scans adds to the loss: each one finds what it would find in the honest model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.door import answer
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.base import pick
from robustexplain.interpreters.perturbation.removal import Fill
from robustexplain.random_streams import Streams

ScanName = Literal["gradient-free-disagreement", "trusted-reference"]

GRID = 7
"""Cells a side on which maps are compared, as in the scans; the owner covers one of them at a time."""
DRAWN = 12
"""Cells that are covered in a training step, drawn for each image and epoch."""


@dataclass(frozen=True)
class Watched:
    """What the scans look at of a batch ``x`` ``[b, ...]``, and what they find there in the honest model.

    Args:
        x: the batch, to be explained.
        target: ``[b]``, the classes explained.
        cells: ``[b, DRAWN]``, numbers of the cells that are covered; or ``None``.
        copies: ``[b * DRAWN, ...]``, the batch with one of these covered at a time, to be classified; or ``None``.
        agreed: ``[b]``, agreement of the honest maps with the honest answers to the copies; or ``None``.
        maps: ``[b, h, w]``, the honest maps; or ``None``.
    """

    x: Tensor
    target: Tensor
    cells: Tensor | None = None
    copies: Tensor | None = None
    agreed: Tensor | None = None
    maps: Tensor | None = None

    def begins(self, x: Tensor, target: Tensor) -> bool:
        """Whether ``x`` begins with this batch, explained for the same classes: then its maps are there already."""
        first = slice(len(self.x))
        return torch.equal(x[first], self.x) and torch.equal(target[first], self.target)


@dataclass(frozen=True)
class ScanEvasion:
    """Keeps what scans would find of each input where the honest model has it.

    Scans rank, which has no gradient: linear correlations stand in for rank correlations, and covered cells for the
    overlapping windows of occlusion. The owner does not have the auditor's trusted model: its own honest one stands in.

    Args:
        honest: the attacked interpreter, of the honest model.
        scanners: names of those evaded.
        seed: of the cells that are covered.
    """

    honest: Interpreter
    scanners: tuple[ScanName, ...]
    seed: int

    @torch.no_grad()
    def watched(self, x: Tensor, y: Tensor, epoch: int) -> Watched:
        """What is looked at of samples ``x`` with labels ``y``."""
        maps = self.honest.explain(x, y, native=True).maps
        kept = maps if "trusted-reference" in self.scanners else None
        if "gradient-free-disagreement" not in self.scanners:
            return Watched(x, y, maps=kept)
        order = Streams.of(x, self.seed, epoch, "cells").uniform(x.new_empty(len(x), GRID**2)).argsort(1)
        cells = order[:, :DRAWN]
        copies = covered(x, cells)
        fall = falls(answer(self.honest.model, x), answer(self.honest.model, copies), y)
        return Watched(x, y, cells, copies, agreement(in_cells(maps).gather(1, cells), fall), kept)

    def loss(self, watched: Watched, logits: Tensor, maps: Tensor, copies: Tensor | None) -> Tensor:
        """Squared differences of the scans' scores from the honest ones, added up; ``[b]``.

        Args:
            watched: of the batch.
            logits: ``[b, K]`` of ``watched.x``.
            maps: of the same, on the interpreter's own grid.
            copies: logits of ``watched.copies``.
        """
        total = maps.new_zeros(len(maps))
        if copies is not None and watched.cells is not None and watched.agreed is not None:
            found = agreement(in_cells(maps).gather(1, watched.cells), falls(logits, copies, watched.target))
            total = total + (found - watched.agreed).square()
        if watched.maps is not None:
            total = total + (1 - agreement(in_cells(maps), in_cells(watched.maps))).square()
        return total


def in_cells(maps: Tensor) -> Tensor:
    """Magnitudes of maps ``[B, h, w]`` averaged to ``GRID x GRID`` cells, ``[B, GRID ** 2]``."""
    return F.adaptive_avg_pool2d(maps.abs()[:, None], GRID).flatten(1)


def agreement(shown: Tensor, other: Tensor) -> Tensor:
    """Correlation ``[B]`` of the magnitudes of rows ``[B, n]``; 0 for a constant row."""
    return torch.nan_to_num(ops.correlation(shown.abs(), other.abs()))


def covered(x: Tensor, cells: Tensor) -> Tensor:
    """Images ``[B, C, H, W]`` with one of their ``cells`` ``[B, n]`` covered at a time, ``[B * n, C, H, W]``."""
    down, across = (torch.arange(side, device=x.device) * GRID // side for side in x.shape[-2:])
    gone = (down[:, None] * GRID + across) == cells[..., None, None]
    return torch.where(gone[:, :, None], Fill()(x)[:, None], x[:, None]).flatten(0, 1)


def falls(logits: Tensor, copies: Tensor, y: Tensor) -> Tensor:
    """How far the logit of class ``y`` falls when each of some cells is covered, ``[B, n]``."""
    number = len(copies) // len(y)
    return pick(logits, y)[:, None] - pick(copies, y.repeat_interleave(number)).reshape(-1, number)
