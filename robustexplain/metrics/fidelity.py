"""Faithfulness without an order of pixels: infidelity and sufficiency."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from .. import maps as ops
from ..errors import InputError
from ..fields import Count, Fraction, Natural, Positive
from ..random_streams import Streams
from ..registry import METRICS
from .base import Better, Faithfulness
from .perturbing import Replacement, gathered, over_channels, parts, region_order, replaced


@METRICS.register("infidelity", paper="Yeh et al. 2019, definition 2.1", needs=("model",))
@dataclass(frozen=True)
class Infidelity(Faithfulness):
    """Mean squared gap between the score's change and what the map predicts, under noise; 0 is faithful.

    ``E_I (I^T phi - (f(x) - f(x - I)))^2``. A map ``[H, W]`` stands for every channel. Maps whose unit is not that of a
    gradient (magnitudes, CAM) need ``scaled``. ``x - I`` is not clipped to ``[0, 1]``, which would change ``I``.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        noise: ``gaussian`` for ``I ~ N(0, sigma^2)`` (the paper's noisy baseline: ``x - I`` is ``x`` plus noise), or
            ``square``: ``I = x`` on a random square and 0 elsewhere (section 2.2).
        sigma: of Gaussian noise, in the input's own units.
        side: of the square, in pixels.
        samples: the number of perturbations.
        scaled: first multiply each map by its best factor, as captum's ``normalize`` does.
        seed: of the perturbations.
    """

    noise: Literal["gaussian", "square"] = "gaussian"
    sigma: Positive = 0.2
    side: Count = 4
    samples: Count = 50
    scaled: bool = False
    seed: Natural = 0

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, torch.inf)

    def perturbations(self, x: Tensor) -> Iterator[Tensor]:
        """``samples`` batches of ``I``, each of the shape of ``x``, from the samples' own streams."""
        if x.dim() == 2 and self.noise == "square":
            raise InputError("infidelity with noise='square' looks at squares of pixels; for tables use 'gaussian'")
        streams = Streams.of(x, self.seed, "infidelity")
        if self.noise == "square":
            yield from self._squares(x, streams)
            return
        for _ in range(self.samples):
            yield self.sigma * streams.normal(x)

    def _squares(self, x: Tensor, streams: Streams) -> Iterator[Tensor]:
        height, width = x.shape[2:]
        down, across = min(self.side, height), min(self.side, width)
        # All corners of a sample in one draw: single draws would take as long as the model.
        drawn = [torch.rand(self.samples, 2, generator=g, dtype=torch.float64) for g in streams.generators]
        corners = torch.stack(drawn, 1) * torch.tensor([height - down + 1, width - across + 1])
        square = torch.arange(down)[:, None] * width + torch.arange(across)
        pixels = x.flatten(2)
        for rows, columns in zip(*corners.long().unbind(2), strict=True):
            places = (rows * width + columns)[:, None] + square.flatten()
            places = places.to(x.device)[:, None].expand(-1, x.shape[1], -1)
            yield torch.zeros_like(pixels).scatter_(2, places, pixels.gather(2, places)).reshape(x.shape)

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        whole = torch.cat([self._scores(model, a, t) for a, t in parts(x, target, self.batch_size)])
        predicted, drops = [], []
        for batch in gathered(self.perturbations(x), max(1, self.batch_size // len(x))):
            predicted.append((batch.to(maps.dtype) * over_channels(maps, x)).flatten(2).sum(2))
            perturbed, targets = (x - batch).flatten(0, 1), target.repeat(len(batch))
            scores = [self._scores(model, a, t) for a, t in parts(perturbed, targets, self.batch_size)]
            drops.append(whole - torch.cat(scores).reshape(len(batch), -1))
        return infidelity(torch.cat(predicted), torch.cat(drops), scaled=self.scaled)


def infidelity(predicted: Tensor, drops: Tensor, *, scaled: bool) -> Tensor:
    """``[B]`` from what the map predicts ``I^T phi`` and what the score lost, ``[S, B]`` each.

    ``scaled`` multiplies predictions by ``E[predicted drop] / E[predicted^2]``; one that predicts only 0 keeps 0.
    """
    if scaled:
        power = predicted.square().mean(0)
        best = (predicted * drops).mean(0) / torch.where(power > 0, power, torch.ones_like(power))
        predicted = best * predicted
    return (predicted - drops).square().mean(0)


@METRICS.register("sufficiency", paper="DeYoung et al. 2020, ERASER", needs=("model",))
@dataclass(frozen=True)
class Sufficiency(Faithfulness):
    """Fall of the score when only the most important share of pixels is kept; low is faithful.

    ``f(x) - f(x with the rest replaced)``. Not what Quantus calls sufficiency (Dasgupta et al. 2022: how often samples
    of like maps share a prediction), which depends on the batch.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        keep: share of pixels kept, at least one pixel.
        replacement: the value of the other pixels.
        seed: of noise.
    """

    keep: Fraction = 0.2
    replacement: Replacement = "mean"
    seed: Natural = 0

    better: ClassVar[Better] = "lower"

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        order, pixels = region_order(maps, 1)
        count = pixels if self.keep == 1 else ops.top_k_count(max(self.keep, 1e-12), pixels)
        gone = replaced(x, self.replacement, self.seed, model)
        kept = torch.where(over_channels(order < count, x), x, gone)
        pairs = zip(parts(x, target, self.batch_size), parts(kept, target, self.batch_size), strict=True)
        return torch.cat([self._scores(model, *whole) - self._scores(model, *part) for whole, part in pairs])
