"""Whether a layer's output is a map of the image: where one patch of the image is blanked, the map must change there.

The shape alone does not tell: heads and tokens ``[B, heads, N, d]``, windows, or channels in the last place look like a
feature map ``[B, C, h, w]``. The images are fixed random ones, never the user's, on which a layer may be dead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..door import answer
from .hooks import hooks

# Centres of the patches, as shares of the sides, and half a patch's side: no symmetry of a square keeps them.
_ROWS, _COLUMNS, _HALF = (0.2, 0.75), (0.2, 0.5, 0.8), 1 / 16
_PLACES = [(row, column) for row in _ROWS for column in _COLUMNS]
_SEEDS = (0, 1)
# Above the differences by chance in a layer that has forgotten all places; maps of deep networks exceed it by far.
_MARGIN = 1.02
# One pair of fifteen may disagree on the first image, if none does on the second.
_NEARLY = 0.9
# Each cell of a map of so few may see the whole image: that it does not follow the patches then says nothing.
_COARSE = 16


def probe(x: Tensor, seed: int = 0) -> Tensor:
    """A fixed random image ``[1, C, H, W]`` in ``[0, 1]`` like those of ``x``: noise, coarser for the second seed.

    Of a table it is the first row.
    """
    if x.dim() != 4:
        return x[:1]
    rng = torch.Generator().manual_seed(seed)
    _, channels, height, width = x.shape
    coarse = (-(-height // 4), -(-width // 4)) if seed else (height, width)
    image = torch.rand(1, channels, *coarse, generator=rng)
    if seed:
        image = image.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width]
    return image.to(x.device, x.dtype)


def blanked(image: Tensor) -> Tensor:
    """The image, and after it the image with one patch blanked at each of six places, ``[7, C, H, W]``."""
    images = image.repeat(1 + len(_PLACES), 1, 1, 1)
    for i, (rows, columns) in enumerate(_patches(*image.shape[2:]), 1):
        images[i, :, rows, columns] = 0.5
    return images


def _patches(height: int, width: int) -> list[tuple[slice, slice]]:
    return [(_span(height, row), _span(width, column)) for row, column in _PLACES]


def _span(side: int, centre: float) -> slice:
    start = min(math.floor((centre - _HALF) * side + 1e-6), side - 1)
    return slice(start, max(math.ceil((centre + _HALF) * side - 1e-6), start + 1))


def share_that_follows(changes: Tensor) -> float | None:
    """The share of pairs of patches for which a map's changes ``[6, h, w]`` are largest where each was blanked.

    For two patches in different cells, the changes at their own places must exceed those at each other's:
    ``c_ii c_jj > c_ij c_ji``, whatever a patch changes everywhere and a cell with every patch. A patch that changes
    nothing says nothing; ``None`` where none changes anything.
    """
    patches = _patches(*changes.shape[1:])
    found = torch.stack([changes[:, rows, columns].mean((1, 2)) for rows, columns in patches], 1).double()
    if not torch.isfinite(found).all():
        return None
    alive = [i for i in range(len(patches)) if changes[i].any()]
    pairs = [(i, j) for i in alive for j in alive if i < j and not _share_a_cell(patches[i], patches[j])]
    kept = [bool(found[i, i] * found[j, j] > _MARGIN * found[i, j] * found[j, i]) for i, j in pairs]
    return sum(kept) / len(kept) if kept else None


def _share_a_cell(one: tuple[slice, slice], other: tuple[slice, slice]) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def covers(height: int, width: int) -> Tensor:
    """The cells of a grid that each of the six patches touches, bool ``[6, h, w]``."""
    cells = torch.zeros(len(_PLACES), height, width, dtype=torch.bool)
    for i, (rows, columns) in enumerate(_patches(height, width)):
        cells[i, rows, columns] = True
    return cells


@dataclass(frozen=True)
class Change:
    """How far a module's output changed with each blanked patch.

    Args:
        name: the module's.
        shape: of one image's output.
        sums: the changes ``[6, *shape]`` summed over channels, by the axis of ``shape`` that holds these.
    """

    name: str
    shape: tuple[int, ...]
    sums: dict[int, Tensor]


@torch.no_grad()
def changes(model: nn.Module, x: Tensor, seed: int = 0, names: Sequence[str] | None = None) -> dict[str, Change]:
    """How far the output of every module (or of those named) changes with each blanked patch, in the order of running.

    Outputs ``[B, C, h, w]``, ``[B, h, w, C]`` and ``[B, N, D]`` are looked at, others left out.
    """
    images = blanked(probe(x, seed))
    found: dict[str, Change] = {}

    def keep(name: str, output: Tensor) -> None:
        found.pop(name, None)
        if names is not None and name not in names:
            return
        if output.shape[0] != len(images) or output.dim() not in (3, 4) or not output.is_floating_point():
            return
        moved = (output[1:] - output[:1]).abs().float()
        axes = (0, 2) if output.dim() == 4 else (1,)
        found[name] = Change(name, tuple(output.shape[1:]), {axis: moved.sum(axis + 1) for axis in axes})

    with outputs_seen(model, keep), transforms_left_out(model):
        answer(model, images)
    return found


@contextmanager
def outputs_seen(model: nn.Module, keep: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within this block, ``keep(name, output)`` sees every module's output, and may replace it."""
    names = {m: n for n, m in model.named_modules() if n and not getattr(m, "stands_in_front", False)}

    def hook(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        return keep(names[module], output) if isinstance(output, Tensor) else None

    with hooks(list(names), hook):
        yield


@contextmanager
def transforms_left_out(model: nn.Module) -> Iterator[None]:
    """Within this block the transforms in front of the model pass images on: some draw at random."""
    with hooks([m for m in model.modules() if getattr(m, "stands_in_front", False)], lambda m, args, output: args[0]):
        yield


class Blanked:
    """How the outputs of modules change with each blanked patch of random images of the size of ``x``.

    Args:
        names: the modules to look at; default all.
    """

    def __init__(self, model: nn.Module, x: Tensor, names: Sequence[str] | None = None) -> None:
        self.model, self.x, self.names = model, x, names
        self._seen: dict[int, dict[str, Change]] = {}

    def seen(self, seed: int = 0) -> dict[str, Change]:
        """The changes on the first or the second image."""
        if seed not in self._seen:
            self._seen[seed] = changes(self.model, self.x, seed, self.names) if self.x.dim() == 4 else {}
        return self._seen[seed]

    def agrees(self, read: Callable[[dict[str, Change]], Tensor | None]) -> bool | None:
        """Whether the map whose changes ``read`` picks follows the image; ``False`` where it gives ``None``.

        The second image is looked at only where the first does not settle it. ``None``: the map is dead on both, or
        too coarse to tell.
        """
        share: float | None = None
        cells = 0
        for seed in _SEEDS:
            found = read(self.seen(seed))
            if found is None:
                return False
            cells = found[0].numel()
            before, share = share, share_that_follows(found)
            if share == 1 and (before is None or before >= _NEARLY):
                return True
            share = before if share is None else share
        return None if share is None or cells <= _COARSE else False
