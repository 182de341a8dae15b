"""Self-information of patches, and a dropout of those that repeat their neighbourhood (InfoDrop)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustexplain.autograd.rectifiers import is_in_place, is_rectifier
from robustexplain.random_streams import Streams

Pair = tuple[int, int]


@dataclass(frozen=True)
class Patches:
    """How a convolution reads its input: kernel, stride, padding and dilation, each as rows and columns."""

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair

    @classmethod
    def of_call(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Patches | None:
        """Those of a call of ``conv2d``; ``None`` for a kernel of one pixel, and for a padding that is a word."""

        def argument(place: int, name: str, default: Any) -> Any:
            return args[place] if len(args) > place else kwargs.get(name, default)

        rows, columns = argument(1, "weight", None).shape[2:]
        padding = argument(4, "padding", 0)
        if rows * columns == 1 or isinstance(padding, str):
            return None
        return cls((rows, columns), _pair(argument(3, "stride", 1)), _pair(padding), _pair(argument(5, "dilation", 1)))


@dataclass(frozen=True)
class Repetition:
    """How likely a patch is dropped that looks as those around it.

    Args:
        rate: ``r``: draws over the number of positions.
        temperature: ``T``; a small one drops only the most repetitive patches.
        bandwidth: ``h`` of the kernel density.
        radius: ``R`` of the neighbourhood, in pixels.
        neighbours: patches of the neighbourhood that are compared, drawn anew for each input.
    """

    rate: float
    temperature: float
    bandwidth: float
    radius: int
    neighbours: int

    def chances(self, x: Tensor, patches: Patches, streams: Streams) -> Tensor:
        """``[b, h, w]``: the chance of each position of the convolution's output to be dropped.

        ``p`` is proportional to ``(mean_j exp(-|patch - patch_j|^2 / (2 h^2 s)))^(1 / T)`` with ``s`` the mean of an
        input's own squared distances, and sums to 1 over positions; the chance is that of being among ``r h w`` draws
        with replacement, ``1 - (1 - p)^(r h w)``.
        """
        with torch.no_grad():
            distances = torch.stack([self._distance(x, patches, offset) for offset in self._offsets(x, streams)], 1)
            scale = distances.mean((1, 2, 3), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)
            density = (-distances / (2 * self.bandwidth**2 * scale)).exp().mean(1)
            p = density.double() ** (1 / self.temperature)
            p = p / p.sum((1, 2), keepdim=True).clamp(min=1e-300)
            draws = int(self.rate * p[0].numel())
            return (1 - (1 - p) ** draws).to(x.dtype)

    def _offsets(self, x: Tensor, streams: Streams) -> list[Tensor]:
        # One grid position for each neighbour and input: rows and columns ``[2, b]``.
        side = 2 * self.radius + 1
        drawn = torch.stack([streams.integers(side * side) for _ in range(self.neighbours)]).to(x.device)
        return [torch.stack([where // side, where % side]) for where in drawn]

    def _distance(self, x: Tensor, patches: Patches, offset: Tensor) -> Tensor:
        (down, right), radius = patches.padding, self.radius
        padded = F.pad(x, (right + radius, right + radius, down + radius, down + radius))
        rows = torch.arange(x.shape[2] + 2 * down, device=x.device)
        columns = torch.arange(x.shape[3] + 2 * right, device=x.device)
        batch = torch.arange(len(x), device=x.device)[:, None, None]
        here = padded[:, :, radius : radius + len(rows), radius : radius + len(columns)].permute(0, 2, 3, 1)
        moved_rows = (rows + offset[0][:, None])[:, :, None]
        moved_columns = (columns + offset[1][:, None])[:, None, :]
        difference = (here - padded[batch, :, moved_rows, moved_columns]).square().sum(3)
        ones = x.new_ones(1, 1, *patches.kernel)
        return F.conv2d(difference[:, None], ones, stride=patches.stride, dilation=patches.dilation)[:, 0]


@dataclass
class Dropped:
    """What a forward pass did.

    Args:
        shares: by layer, the share of its outputs that were dropped.
    """

    shares: list[float] = field(default_factory=list)


class _Dropping(TorchFunctionMode):
    def __init__(self, layers: int, repetition: Repetition, streams: Streams, seen: Dropped) -> None:
        super().__init__()
        self.layers, self.repetition, self.streams, self.seen = layers, repetition, streams, seen
        self.keep: Tensor | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.keep is not None and is_rectifier(func, args, kwargs):
            given = args[0] if args else kwargs["input"]
            if given.shape == self.keep.shape:
                return self._rectified(func, given, args, kwargs)
        out = func(*args, **kwargs)
        if func is F.conv2d and len(self.seen.shares) < self.layers and self.keep is None:
            patches = Patches.of_call(args, kwargs)
            if patches is not None:
                with torch._C.DisableTorchFunction():
                    self.keep = self._kept(args[0] if args else kwargs["input"], out, patches)
        return out

    def _kept(self, x: Tensor, out: Tensor, patches: Patches) -> Tensor:
        chances = self.repetition.chances(x.detach(), patches, self.streams)
        return (self.streams.uniform(out.detach()) >= chances[:, None]).to(out.dtype)

    def _rectified(self, func: Any, given: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.keep is not None
        with torch._C.DisableTorchFunction():
            keep, self.keep = self.keep, None
            self.seen.shares.append(1 - float(keep.mean()))
            if not is_in_place(func, args, kwargs):
                out: Tensor = func(*args, **kwargs) * keep
                return out
            # The model may use the tensor that it passed; autograd needs its old values.
            rest = {name: value for name, value in kwargs.items() if name != "input"}
            return given.copy_(func(given.clone(), *args[1:], **rest) * keep)


@contextmanager
def dropping(layers: int, repetition: Repetition, streams: Streams) -> Iterator[Dropped]:
    """Within this block, outputs of the first convolutions are dropped where their input repeats its neighbourhood.

    The mask lies on the output of the rectifier that follows a convolution with a kernel above one pixel. Function
    calls of this thread are seen, however the model makes them.

    Args:
        layers: how many of the first convolutions.
        repetition: how likely a patch is dropped.
        streams: the random streams of the inputs.
    """
    seen = Dropped()
    with _Dropping(layers, repetition, streams, seen):
        yield seen


def _pair(value: Any) -> Pair:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[-1]))


def droppable(network: nn.Module, x: Tensor, layers: int, repetition: Repetition) -> int:
    """In how many of the first ``layers`` convolutions ``network`` can drop; one forward pass on ``x[:1]``."""
    with torch.no_grad(), dropping(layers, repetition, Streams.of(x[:1], 0)) as seen:
        network(x[:1].clone())
    return len(seen.shares)
