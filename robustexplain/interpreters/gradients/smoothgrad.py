"""Interpreters of the gradient around the input: its mean and its variance under noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor

from ...fields import Count, Natural, Positive
from ...random_streams import generator
from ...registry import INTERPRETERS
from ..base import Channels, Explanation, Interpreter, narrowed, reduce_channels, requiring_grad, wide_dtype
from .baselines import Units, deviation
from .gradient import Of
from .integrated import by_rows, point_gradients, predicted, total

Several = Annotated[int, at.Ge(2)]
"""A number of samples large enough for a variance."""
Noise = Literal["gaussian", "uniform"]
"""Normal noise of a standard deviation, or uniform noise of a half-width: the cube of that L-infinity radius."""
Draw = Callable[[Sequence[int], torch.Generator], Tensor]
"""Noise of scale one, of a shape."""


def normal(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """Standard normal."""
    return torch.randn(*shape, generator=rng, dtype=torch.float32)


def uniform(shape: Sequence[int], rng: torch.Generator) -> Tensor:
    """Uniform in ``[-1, 1]``."""
    return 2 * torch.rand(*shape, generator=rng, dtype=torch.float32) - 1


DRAWS: Mapping[Noise, Draw] = {"gaussian": normal, "uniform": uniform}


@INTERPRETERS.register("smoothgrad", paper="Smilkov et al. 2017, section 3; SmoothGrad-squared: Hooker et al. 2019")
@dataclass(frozen=True, eq=False)
class SmoothGrad(Interpreter):
    """SmoothGrad: the mean gradient over noisy copies, ``1/n sum_i d f_c(x + e_i) / d x`` (Smilkov et al. 2017).

    The noise is fixed by ``seed`` and the same for every sample: a map is a function of its input alone, and its
    derivative is exact. Noisy copies may leave ``[0, 1]``, as in the paper. Costs ``samples`` forward and backward
    passes and one forward pass for the logits.

    Args:
        samples: noisy copies.
        sigma: standard deviation of the noise (half-width of uniform noise) as a share of the value range, which is 1
            for images in ``[0, 1]``. Departure: the authors' code takes the range of each image. Papers that add noise
            behind the normalisation (Heo et al., 0.1) mean about 0.02 here; Noppel et al. use 0.2. A table's columns
            differ in range: choose ``units``.
        average: what is averaged: the ``signed`` gradient (the paper), its ``magnitude``, or its ``square``
            (SmoothGrad-squared).
        of: what is differentiated; ``logit`` is the paper's class activation.
        channels: how channels become one map, after averaging; sum of magnitudes as in the authors' code.
        seed: of the noise.
        batch_size: largest number of copies in one pass of the model.
        units: the unit of ``sigma``: ``input``, the input's own (``[0, 1]`` pixels; the columns of a table rarely share
            one); or ``model``, the standard deviation by which the model's own normalisation divides each channel or
            column, which is noise behind the normalisation.
        noise: ``gaussian``, the paper's, or ``uniform``: the uniform gradient of Wang et al. 2020.
    """

    samples: Count = 50
    sigma: Positive = 0.15
    average: Literal["signed", "magnitude", "square"] = "signed"
    of: Of = "logit"
    channels: Channels = "abs_sum"
    seed: Natural = 0
    batch_size: Count = 64
    units: Units = "input"
    noise: Noise = "gaussian"

    is_gradient: ClassVar[bool] = True
    keeps_draws: ClassVar[tuple[str, ...]] = ("_drawn",)

    @property
    def averaged(self) -> int:
        """As many as there are copies."""
        return self.samples

    @cached_property
    def _drawn(self) -> dict[Any, Tensor]:
        return {}

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x) if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)

        def mean(rows: Tensor, classes: Tensor) -> Tensor:
            gradients = noisy_gradients(self, rows, classes, graph)
            return total(self._transformed(gradient).sum(0) for gradient in gradients) / self.samples

        maps = reduce_channels(by_rows(x, classes, self.batch_size, mean), self.channels)
        return Explanation(logits, narrowed(maps, x.dtype, "SmoothGrad"))

    def _transformed(self, gradient: Tensor) -> Tensor:
        gradient = gradient.to(wide_dtype(gradient))
        if self.average == "signed":
            return gradient
        return gradient.abs() if self.average == "magnitude" else gradient.square()


@INTERPRETERS.register("vargrad", paper="Adebayo et al. 2018 (local explanation methods); Hooker et al. 2019, VarGrad")
@dataclass(frozen=True, eq=False)
class VarGrad(Interpreter):
    """VarGrad: the variance of the gradient over noisy copies of the input (Adebayo et al. 2018).

    The population variance (divided by ``n``), as captum's. Noise, cost and settings are those of :class:`SmoothGrad`.

    Args:
        samples: noisy copies, at least two.
        sigma: standard deviation of the noise, in ``units``.
        of: what is differentiated.
        channels: how the channels' variances become one map; ``abs_sum`` is ``sum``, since none is negative.
        seed: of the noise.
        batch_size: largest number of copies in one pass of the model.
        units: as in :class:`SmoothGrad`.
        noise: as in :class:`SmoothGrad`.
    """

    samples: Several = 50
    sigma: Positive = 0.15
    of: Of = "logit"
    channels: Channels = "sum"
    seed: Natural = 0
    batch_size: Count = 64
    units: Units = "input"
    noise: Noise = "gaussian"

    is_gradient: ClassVar[bool] = True
    keeps_draws: ClassVar[tuple[str, ...]] = ("_drawn",)

    @cached_property
    def _drawn(self) -> dict[Any, Tensor]:
        return {}

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x) if graph else x.detach()
        logits, classes = predicted(self.model, x, target, graph)

        def spread(rows: Tensor, classes: Tensor) -> Tensor:
            gradients = noisy_gradients(self, rows, classes, graph)
            return variance(part.to(wide_dtype(part)) for part in gradients)

        maps = reduce_channels(by_rows(x, classes, self.batch_size, spread), self.channels)
        return Explanation(logits, narrowed(maps, x.dtype, "VarGrad"))


def noisy_gradients(method: SmoothGrad | VarGrad, rows: Tensor, classes: Tensor, graph: bool) -> Iterator[Tensor]:
    """The class gradient at each noisy copy, ``[k, b, ...]`` at a time."""
    noise = fixed_noise(method, rows)
    scale = method.sigma * deviation(method.units, method.model, rows.detach())

    def place(rows: Tensor, points: slice) -> Tensor:
        return rows + scale * noise[points, None]

    samples, batch_size = method.samples, method.batch_size
    for _, gradient in point_gradients(method.model, rows, classes, place, samples, batch_size, method.of, graph):
        yield gradient


def fixed_noise(method: SmoothGrad | VarGrad, like: Tensor) -> Tensor:
    """Noise of scale one ``[samples, ...]`` for inputs like these, drawn once and kept until the size changes."""
    key = (like.shape[1:], like.device, like.dtype)
    known = method._drawn
    noise = known.get(key)
    if noise is None:
        # Drawn on the CPU in float32, so that the noise is the same on every device and in every dtype.
        draws = DRAWS[method.noise]((method.samples, *like.shape[1:]), generator(method.seed, "noise"))
        noise = draws.to(like.device, like.dtype)
        # Another thread may draw for another size: each returns its own.
        known.clear()
        known[key] = noise
    return noise


def variance(gradients: Iterator[Tensor]) -> Tensor:
    """Population variance over the first dimension of all parts ``[k, ...]``, without keeping them.

    Parts are merged by mean and sum of squared deviations: a difference of mean squares cancels in float32.
    """
    count = 0
    mean = squares = torch.zeros(())
    for part in gradients:
        size, centre = len(part), part.mean(0)
        squares_here = (part - centre).square().sum(0)
        if count == 0:
            count, mean, squares = size, centre, squares_here
            continue
        step = centre - mean
        squares = squares + squares_here + step.square() * (count * size / (count + size))
        mean = mean + step * (size / (count + size))
        count += size
    return squares / count
