"""Whether a layer's output is a map of the image: where a tile of the image is blanked, the map must change there.

The shape alone does not tell: heads and tokens ``[B, heads, N, d]``, windows, or channels in the last place look like a
feature map ``[B, C, h, w]``. The images are two fixed random ones, never the user's, on which a layer may be dead.

On random networks of known layout (patches, convolutions, attention, global averages; grids of 3 x 3 to 14 x 14) wrong
readings (turned, flipped, shuffled, windows, shifted by one cell, heads, channels elsewhere) are taken for a map in
4 of 12,516 cases, and right ones refused in 52 of 500: deep ones that have all but forgotten places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..door import answer
from .hooks import hooks

# The image is blanked in each of 4 x 4 tiles. Fewer places take windows for rows where these happen to agree on them.
_TILES = 4
_SEEDS = (0, 1)
# Of the pairs of tiles, and of the cells, that must be as the grid says. Deep convolutional networks blur the cells.
_PAIRS, _CELLS = 0.9, 0.25
# Strides that round move a map by a part of a cell: another order must fit in more cells than by that.
_BETTER = 0.05
# Each cell of a map of so few may see the whole image: only another order that fits clearly speaks against it.
_COARSE, _CLEARLY = 16, 0.9
_PIXELS_AT_ONCE = 16 * 256**2


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
    """The image, and after it the image with each of 16 tiles blanked, by rows, ``[17, C, H, W]``."""
    images = image.repeat(1 + _TILES**2, 1, 1, 1)
    rows, columns = (_spans(side) for side in image.shape[2:])
    for i in range(_TILES**2):
        images[1 + i, :, rows[i // _TILES], columns[i % _TILES]] = 0.5
    return images


def _spans(side: int) -> list[slice]:
    edges = [round(i * side / _TILES) for i in range(_TILES + 1)]
    return [slice(min(start, side - 1), max(end, start + 1)) for start, end in pairwise(edges)]


def _overlap(height: int, width: int) -> Tensor:
    """The share of each cell of a grid that lies in each tile, ``[16, h, w]``."""

    def along(side: int) -> Tensor:
        tile, cell = torch.arange(_TILES)[:, None] / _TILES, torch.arange(side) / side
        shared = torch.minimum(tile + 1 / _TILES, cell + 1 / side) - torch.maximum(tile, cell)
        return (shared * side).clamp(min=0).double()

    shares = along(height)[:, None, :, None] * along(width)[None, :, None, :]
    # Rounding leaves a trace where a cell ends at a tile's edge.
    return torch.where(shares > 1e-4, shares, 0).flatten(0, 1)


def covers(height: int, width: int) -> Tensor:
    """The cells of a grid that each of the tiles touches, bool ``[16, h, w]``."""
    return _overlap(height, width) > 0


def follows(maps: Sequence[Tensor]) -> bool | None:
    """Whether a map follows the image, from its changes ``[16, h, w]`` with each blanked tile of each image.

    First, for two tiles the changes at their own places must exceed those at each other's, ``c_ii c_jj > c_ij c_ji``,
    whatever a tile changes everywhere and a cell with every tile: in 90% of pairs. Second, the tile that changes a cell
    most, as a share of what it changes, must be the cell's own: in a quarter of cells at least, and no other order of
    the cells (flipped, transposed, windows, shifted by one) may have more.

    ``None`` where nothing changes, or where the map is too coarse to tell: at most 16 cells and no clear answer.
    """
    seen = [m.cpu().double() for m in maps if torch.isfinite(m).all() and m.any()]
    if not seen:
        return None
    height, width = seen[0].shape[1:]
    most, own = torch.stack([_strongest(m) for m in seen]), _own(height, width)

    def right(order: Tensor) -> float:
        return float(own.gather(0, most[:, order.flatten()]).double().mean())

    cells = torch.arange(height * width).reshape(height, width)
    here = right(cells)
    if here >= _CELLS and all((_pairs(m) or 0.0) >= _PAIRS for m in seen):
        return all(right(order) <= here + _BETTER for order in _other_orders(cells))
    if height * width > _COARSE or any(right(order) >= _CLEARLY for order in _other_orders(cells)):
        return False
    return None


def _own(height: int, width: int) -> Tensor:
    """Whether each cell lies in each tile, or as far in it as in any other: bool ``[17, h w]``, none in the last."""
    shares = _overlap(height, width).flatten(1)
    return torch.cat([shares >= shares.amax(0) - 1e-4, torch.zeros(1, height * width, dtype=torch.bool)])


def _strongest(changes: Tensor) -> Tensor:
    """The tile that changes each cell most, as a share of all that it changes ``[h w]``; 16 where none does."""
    shares = (changes / changes.sum((1, 2), keepdim=True).clamp(min=1e-300)).flatten(1)
    return torch.where(shares.amax(0) > 0, shares.argmax(0), _TILES**2)


def _pairs(changes: Tensor) -> float | None:
    """The share of pairs of tiles, in different cells, of which each changes its own place more than the other's."""
    places = _overlap(*changes.shape[1:]).flatten(1)
    places = places / places.sum(1, keepdim=True)
    found = changes.flatten(1) @ places.mT
    alive = changes.flatten(1).any(1)
    apart = torch.cdist(places, places) > 1e-6
    asked = torch.triu(alive[:, None] & alive & apart, 1)
    kept = found.diag()[:, None] * found.diag() > found * found.mT
    return float(kept[asked].double().mean()) if asked.any() else None


def _other_orders(cells: Tensor) -> Iterator[Tensor]:
    """Other orders in which a grid of cells ``[h, w]`` could be written."""
    height, width = cells.shape
    yield from (cells.mT.reshape(height, width), cells.reshape(width, height).mT, cells.rot90(2))
    for flipped in ((0,), (1,)):
        yield cells.flip(flipped)
    if height == width:
        yield cells.rot90(1)
        yield cells.rot90(3)
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            if down or right:
                yield cells.roll((down * max(1, height // 16), right * max(1, width // 16)), (0, 1))
    for rows in range(1, height + 1):
        for columns in range(1, width):
            if height % rows == 0 and width % columns == 0 and rows * columns > 1:
                windows = cells.reshape(height // rows, rows, width // columns, columns)
                for order in (windows.permute(0, 2, 1, 3).flatten(), windows.permute(1, 3, 0, 2).flatten()):
                    yield order.reshape(height, width)
                    yield order.argsort().reshape(height, width)


@dataclass(frozen=True)
class Change:
    """How far a module's output changed with each blanked tile.

    Args:
        name: the module's.
        shape: of one image's output.
        sums: the changes ``[16, *shape]`` summed over channels, by the axis of ``shape`` that holds these.
    """

    name: str
    shape: tuple[int, ...]
    sums: dict[int, Tensor]


@torch.no_grad()
def changes(model: nn.Module, x: Tensor, seed: int = 0, names: Sequence[str] | None = None) -> dict[str, Change]:
    """How far the output of every module (or of those named) changes with each blanked tile, in the order of running.

    Outputs ``[B, C, h, w]``, ``[B, h, w, C]`` and ``[B, N, D]`` are looked at, others left out.
    """
    images = blanked(probe(x, seed))
    at_once = max(1, min(len(images) - 1, _PIXELS_AT_ONCE // math.prod(images.shape[2:])))
    parts = [_changes(model, torch.cat([images[:1], part]), names) for part in images[1:].split(at_once)]
    first, *others = parts
    return {
        name: Change(name, change.shape, {a: torch.cat([part[name].sums[a] for part in parts]) for a in change.sums})
        for name, change in first.items()
        if all(name in part and part[name].shape == change.shape for part in others)
    }


def _changes(model: nn.Module, images: Tensor, names: Sequence[str] | None) -> dict[str, Change]:
    """How far outputs for the images behind the first differ from those for the first."""
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
        answer(model, images, finite=False)
    return found


def network_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules of a network by their names, without what stands in front of it and the parts of that."""
    modules = dict(model.named_modules())
    front = tuple(f"{name}." for name, module in modules.items() if getattr(module, "stands_in_front", False))
    return {module: name for name, module in modules.items() if name and not f"{name}.".startswith(front)}


@contextmanager
def outputs_seen(model: nn.Module, keep: Callable[[str, Tensor], Tensor | None]) -> Iterator[None]:
    """Within this block, ``keep(name, output)`` sees every module's output, and may replace it."""
    names = network_modules(model)

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
    """How the outputs of modules change with each blanked tile of random images of the size of ``x``.

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
        """:func:`follows` for the map whose changes ``read`` picks; ``False`` where it gives ``None``."""
        maps = [read(self.seen(seed)) for seed in _SEEDS]
        known = [m for m in maps if m is not None]
        return follows(known) if len(known) == len(maps) else False
