"""ROAD: removal of pixels by imputation from their neighbours, which leaves no trace of which they were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..checks import Kind
from ..errors import FieldError
from ..fields import Natural, NonNegative
from ..random_streams import Streams
from ..registry import METRICS
from .base import Better, Faithfulness, widened
from .imputation import imputed
from .perturbing import region_order


@METRICS.register("road", paper="Rong et al. 2022 (arXiv:2202.00449)", needs=("model",))
@dataclass(frozen=True)
class ROAD(Faithfulness):
    """Score without the least relevant pixels minus score without the most relevant ones; high is faithful.

    Mean over the shares removed. Each pixel removed is a weighted mean of its neighbours plus noise: a model cannot
    read the object's outline off the removed pixels, which replacing by one value lets it do. :meth:`curves` gives
    both orders by themselves. Departures: noise is drawn once for the image, values are cut off at ``[0, 1]``, the
    figure is the score of one image where the paper has the accuracy over all.

    Args:
        of: the score: ``probability`` or ``logit``.
        batch_size: largest batch in a pass of the model.
        shares: shares of the pixels that are removed, each in ``(0, 1)``.
        noise: standard deviation of the noise (the authors' code: 0.01).
        seed: of the noise.
    """

    shares: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
    noise: NonNegative = 0.01
    seed: Natural = 0

    better: ClassVar[Better] = "higher"
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.shares or not all(0 < share < 1 for share in self.shares):
            raise FieldError(type(self).__name__, "shares", f"must be shares in (0, 1), got {self.shares}")

    def curves(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The score at each share, ``[B, S]``, most and least relevant pixels first; arguments are not checked."""
        most, pixels = region_order(maps, 1)
        least, _ = region_order(maps, 1, ascending=True)
        grain = self.noise * Streams.of(x, self.seed, "road").normal(x)
        return self._curve(model, x, most, pixels, grain, target), self._curve(model, x, least, pixels, grain, target)

    def _measure(self, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> Tensor:
        most, least = self.curves(model, x, maps, target)
        return (least - most).mean(1)

    def _curve(self, model: nn.Module, x: Tensor, order: Tensor, pixels: int, grain: Tensor, target: Tensor) -> Tensor:
        found = []
        for share in self.shares:
            missing = order < max(1, round(share * pixels))
            # In half precision the solver would not converge.
            filled = imputed(widened(x), missing).to(x.dtype)
            removed = torch.where(missing[:, None], (filled + grain).clamp(0, 1), x)
            parts = zip(removed.split(self.batch_size), target.split(self.batch_size), strict=True)
            found.append(torch.cat([self._scores(model, some, classes) for some, classes in parts]))
        return torch.stack(found, 1)
