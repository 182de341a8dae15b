"""The layer that the CAM family reads, how its output lies on the image, and the check that it does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...autograd import layers
from ...autograd.blanking import Blanked, Change, outputs_seen, probe, transforms_left_out
from ...door import answer
from ...errors import UnsupportedModelError
from ...hidden import refuse_hidden
from .token_grid import Grid, fitting_grid, token_grid, token_layer

Layout = Literal["channels first", "channels last", "tokens"]


@dataclass(frozen=True)
class Site:
    """A layer whose output is the feature map, how the output is laid out, and the grid of its tokens, if any."""

    name: str
    layout: Layout = "channels first"
    grid: Grid | None = None

    def read(self, output: Tensor) -> Tensor:
        """The layer's output, or a gradient of its shape, as ``[B, C, h, w]``."""
        if self.grid is not None:
            return self.grid.unfold(output)
        return output.permute(0, 3, 1, 2) if self.layout == "channels last" else output

    def changes(self, found: dict[str, Change]) -> Tensor | None:
        """The changes of the feature map ``[16, h, w]``, from those of all modules."""
        change = found.get(self.name)
        if change is None:
            return None
        if self.grid is not None:
            sums = change.sums[1][:, self.grid.prefix :]
            return sums.unflatten(1, (self.grid.height, self.grid.width)) if sums.shape[1] == self.grid.cells else None
        return change.sums.get(2 if self.layout == "channels last" else 0)


def find_site(model: nn.Module, x: Tensor, layer: str | None) -> Site:
    """The named layer, or the last one whose output is a feature map on the way from the image to the logits.

    What is taken for a map was seen to follow the image, by blanking patches of fixed random images of the size of
    ``x``: no value of ``x`` counts.

    Raises:
        UnsupportedModelError: if there is no such layer, or the named one gives no feature map.
        UnknownNameError: a layer that the model does not have.
    """
    refuse_hidden(model, "the layer that gives the feature map is looked for")
    if layer is not None:
        return _named(model, x, layers.full_name(model, layer))
    preferred = _preferred(model, x)
    if preferred is not None and preferred.layout == "tokens":
        if Blanked(model, x, [preferred.name]).agrees(preferred.changes):
            return preferred
        preferred = None
    blanked, behind = Blanked(model, x), True
    for site in _candidates(blanked, x):
        if preferred is not None and behind and not _is_behind(site.name, preferred.name, blanked):
            behind = False
            answered = blanked.agrees(preferred.changes)
            if answered or (answered is None and _on_the_way(model, x, preferred)):
                return preferred
        # A convolutional map behind the preferred one is a copy of it, or a map of class scores.
        copied = preferred is not None and behind and site.layout == "channels first"
        if not copied and blanked.agrees(site.changes) and _on_the_way(model, x, site):
            return site
    # A network of two branches has no layer that everything passes.
    if preferred is not None and blanked.agrees(preferred.changes) is not False:
        return preferred
    if next(_candidates(blanked, x), None) is None:
        # No output even has the shape of a map, which is said in its own words.
        layers.shaped_last_feature_layer(model, x)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no layer whose output can be shown to be a feature map: where a patch of the "
        "image is blanked, no output between image and logits changes most at that place (attention over the whole "
        "image, windows in an order of their own); name a layer, or use a gradient method such as Gradient"
    )


def _preferred(model: nn.Module, x: Tensor) -> Site | None:
    """What the model's kind suggests: the tokens in front of the last attention, or the last convolutional map."""
    try:
        name = token_layer(model, probe(x))
        if name is not None:
            output = _output(model, x, name)
            return Site(name, "tokens", token_grid(model, x, output.shape[1]))
    except UnsupportedModelError:
        pass
    try:
        return Site(layers.shaped_last_feature_layer(model, x).name)
    except UnsupportedModelError:
        return None


def _named(model: nn.Module, x: Tensor, name: str) -> Site:
    output, blanked = _output(model, x, name), Blanked(model, x)
    sites = []
    if isinstance(output, Tensor) and output.dim() == 4:
        if output.shape[2:] == (1, 1):
            return Site(name)
        sites = [Site(name)]
        if _proportional(output.shape[1:3], x):
            sites.append(Site(name, "channels last"))
    elif isinstance(output, Tensor) and output.dim() == 3:
        sites = [Site(name, "tokens", grid) for grid in _grids(output.shape[1], blanked.seen(), x)]
    verdicts = [blanked.agrees(site.changes) for site in sites]
    for wanted in (True, None):
        for site, verdict in zip(sites, verdicts, strict=True):
            # Coarse maps are believed where no order of tokens is in question.
            if verdict is wanted and (verdict or site.layout == "channels first"):
                return site
    shape = [len(x), *output.shape[1:]] if isinstance(output, Tensor) else type(output).__name__
    moved = ", which does not change where a patch of the image is blanked" if sites else ""
    raise UnsupportedModelError(
        f"layer {name!r} gives shape {shape}{moved}; Grad-CAM needs a feature map [B, C, h, w] or [B, h, w, C], or the "
        "tokens [B, N, D] of a transformer"
    )


@torch.no_grad()
def _output(model: nn.Module, x: Tensor, name: str) -> Tensor:
    with layers.captured(model, [name]) as outputs:
        answer(model, probe(x), finite=False)
    if name not in outputs:
        raise UnsupportedModelError(f"layer {name!r} does not run in a forward pass: Grad-CAM needs one that does")
    return outputs[name]


def _is_behind(name: str, other: str, blanked: Blanked) -> bool:
    order = list(blanked.seen())
    return other in order and order.index(name) > order.index(other)


def _candidates(blanked: Blanked, x: Tensor) -> Iterator[Site]:
    """The modules whose output has the shape of a map, from the last to run."""
    found = blanked.seen()
    for name, change in reversed(found.items()):
        if len(change.shape) == 2:
            for grid in _grids(change.shape[0], found, x):
                yield Site(name, "tokens", grid)
        elif math.prod(change.shape[1:]) > 1:
            if _proportional(change.shape[1:], x):
                yield Site(name)
            if _proportional(change.shape[:2], x):
                yield Site(name, "channels last")


def _grids(tokens: int, found: dict[str, Change], x: Tensor) -> list[Grid]:
    maps = [c.shape[1:] for c in found.values() if len(c.shape) == 3 and _proportional(c.shape[1:], x)]
    grid = fitting_grid(tokens, maps, x)
    return [] if grid is None else [grid]


def _proportional(grid: Sequence[int], x: Tensor) -> bool:
    height, width = grid
    return layers.proportional(height, width, x)


def _mixed(logits: Tensor) -> Tensor:
    # Logits get different weights, so that their gradients do not cancel.
    return (logits * torch.arange(1, logits.shape[1] + 1, device=logits.device, dtype=logits.dtype)).sum()


@torch.enable_grad()
def _on_the_way(model: nn.Module, x: Tensor, site: Site) -> bool:
    """Whether everything that the logits know of the image passes the layer, and its map reaches them."""
    image, cut = probe(x).requires_grad_(), []

    def keep(name: str, output: Tensor) -> Tensor | None:
        if name != site.name:
            return None
        cut.append(output.detach().requires_grad_())
        # A clone, because an in-place activation may overwrite it.
        return cut[-1].clone()

    with outputs_seen(model, keep), transforms_left_out(model):
        logits = answer(model, image, finite=False)
    if not cut or not logits.requires_grad:
        return False
    found: Sequence[Tensor | None] = torch.autograd.grad(_mixed(logits), [image, cut[-1]], allow_unused=True)
    past, reached = found
    # Where the head's weights are zero, as some are initialised, nothing reaches it yet.
    return past is None and reached is not None and (not reached.any() or bool(site.read(reached).any()))
