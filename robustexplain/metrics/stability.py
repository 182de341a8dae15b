"""How far maps move when the input barely does: the contract, sensitivity and Lipschitz constants.

All of them draw inputs around ``x`` from each sample's own stream, clip images to ``[0, 1]`` (oracles such as Quantus
and captum do not clip) and explain the class that ``x`` was explained for. Radii are in the input's own units, those of
table rows in the data's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .. import checks, probe
from ..fields import Count, Natural, Positive
from ..registry import METRICS
from ..streams import Streams
from .base import Better, Metric, check_maps, widened
from .perturbing import gathered

if TYPE_CHECKING:
    from ..interpreters.base import Interpreter


class Seen(NamedTuple):
    """Inputs and what was seen of them, each ``[n, ...]`` flattened to ``[n, N]``."""

    x: Tensor
    logits: Tensor
    maps: Tensor
    features: Tensor | None

    def repeated(self, count: int) -> Seen:
        """All rows ``count`` times over."""
        if count == 1:
            return self
        features = None if self.features is None else self.features.repeat(count, 1)
        return Seen(self.x.repeat(count, 1), self.logits.repeat(count, 1), self.maps.repeat(count, 1), features)


@dataclass(frozen=True)
class Stability(Metric):
    """Holds maps against maps of near inputs, a number per sample: ``metric(interpreter, x, target)`` gives ``[B]``.

    Args:
        radius: half-width of uniform noise, standard deviation of Gaussian noise.
        noise: how neighbours are drawn.
        samples: how many.
        seed: of the draws.
        chunk: largest batch the interpreter sees.
    """

    radius: Positive = 0.02
    noise: Literal["uniform", "gaussian"] = "uniform"
    samples: Count = 10
    seed: Natural = 0
    chunk: Count = 256

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, torch.inf)
    worst: ClassVar[bool] = True
    """Whether the largest of the draws counts, or their mean."""
    kept_prediction: ClassVar[bool] = False
    """Whether only those draws count that are predicted as ``x`` is."""

    def __call__(self, interpreter: Interpreter, x: Tensor, target: Tensor | None = None) -> Tensor:
        """``[B]`` for the maps of class ``target`` (default: the prediction) around ``x``: images or table rows.

        NaN where no draw counts.

        Raises:
            InputError: bad ``x`` or ``target``, a model in train mode, or maps that are not finite.
        """
        checks.inputs(x)
        return self.along(interpreter, x, self.neighbours(x), target)

    def neighbours(self, x: Tensor) -> Iterator[Tensor]:
        """``samples`` batches of inputs near ``x``, each of its shape."""
        streams = Streams.of(x, self.seed, "neighbours")
        for _ in range(self.samples):
            noise = streams.normal(x) if self.noise == "gaussian" else streams.uniform(x, -1, 1)
            near = noise.mul_(self.radius).add_(x)
            yield near.clamp_(0, 1) if x.dim() == 4 else near

    @torch.no_grad()
    def along(
        self, interpreter: Interpreter, x: Tensor, neighbours: Iterator[Tensor], target: Tensor | None = None
    ) -> Tensor:
        """The same for given neighbours: batches of the shape of ``x``."""
        checks.evaluating(interpreter.model)
        layer = self._layer(interpreter, x)
        if target is not None:
            checks.class_indices(target, len(x), "target")
        center = self._seen(interpreter, x, target, layer)
        target = center.logits.argmax(1) if target is None else target
        values = []
        for batch in gathered(neighbours, max(1, self.chunk // len(x))):
            count = len(batch)
            around = self._seen(interpreter, batch.flatten(0, 1), target.repeat(count), layer)
            repeated = center.repeated(count)
            moved = self._moved(repeated, around)
            if self.kept_prediction:
                kept = around.logits.argmax(1) == repeated.logits.argmax(1)
                moved = torch.where(kept, moved, torch.full_like(moved, torch.nan))
            values.append(moved.reshape(count, -1))
        return _reduced(torch.cat(values), worst=self.worst).to(x.dtype)

    @abstractmethod
    def _moved(self, center: Seen, around: Seen) -> Tensor:
        """``[n]``: how far each neighbour's map is from its center's."""

    def _layer(self, interpreter: Interpreter, x: Tensor) -> str | None:
        return None

    def _seen(self, interpreter: Interpreter, x: Tensor, target: Tensor | None, layer: str | None) -> Seen:
        found = []
        for rows in (slice(at, at + self.chunk) for at in range(0, len(x), self.chunk)):
            part = None if target is None else target[rows]
            logits, maps = interpreter.explain(x[rows], part)[:2]
            check_maps(maps, "maps")
            features = None if layer is None else self._features(interpreter, x[rows], layer)
            found.append(Seen(widened(x[rows]).flatten(1), widened(logits), widened(maps).flatten(1), features))
        if len(found) == 1:
            return found[0]
        return Seen(
            torch.cat([seen.x for seen in found]),
            torch.cat([seen.logits for seen in found]),
            torch.cat([seen.maps for seen in found]),
            None if layer is None else torch.cat([seen.features for seen in found if seen.features is not None]),
        )

    @staticmethod
    def _features(interpreter: Interpreter, x: Tensor, layer: str) -> Tensor:
        # A pass of its own: inside ``explain`` an interpreter may run the model more than once.
        with probe.captured(interpreter.model, [layer]) as outputs:
            interpreter.model(x)
        return widened(outputs[layer]).flatten(1)


def _reduced(values: Tensor, *, worst: bool) -> Tensor:
    # [S, B] to [B] over the draws that count.
    counts = ~values.isnan()
    if worst:
        best = torch.where(counts, values, torch.full_like(values, -torch.inf)).amax(0)
        return torch.where(counts.any(0), best, torch.full_like(best, torch.nan))
    return torch.where(counts, values, torch.zeros_like(values)).sum(0) / counts.sum(0)


def norm(rows: Tensor) -> Tensor:
    """L2 norm ``[n]`` of the rows of ``[n, N]``."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _sensitivity(center: Seen, around: Seen, relative: bool) -> Tensor:
    moved = norm(around.maps - center.maps)
    return moved / norm(center.maps) if relative else moved


@METRICS.register("max-sensitivity", paper="Yeh et al. 2019 (max-sensitivity)", needs=("interpreter",))
@dataclass(frozen=True)
class MaxSensitivity(Stability):
    """Largest move of the map among near inputs, relative to the map's norm; 0 is stable.

    Args:
        radius: half-width of uniform noise (the paper: 0.2 of its normalised inputs).
        noise: how neighbours are drawn.
        samples: how many (the paper: 50).
        seed: of the draws.
        chunk: largest batch the interpreter sees.
        relative: divide by the map's norm, as Quantus and captum do; the paper does not. An all-zero map is then NaN if
            it stays, infinite if it moves.
    """

    relative: bool = True

    def _moved(self, center: Seen, around: Seen) -> Tensor:
        return _sensitivity(center, around, self.relative)


@METRICS.register(
    "avg-sensitivity", paper="Yeh et al. 2019 (sensitivity); average: Bhatt et al. 2020", needs=("interpreter",)
)
@dataclass(frozen=True)
class AvgSensitivity(Stability):
    """Mean move of the map among near inputs, relative to the map's norm; 0 is stable.

    Args:
        radius: half-width of uniform noise.
        noise: how neighbours are drawn.
        samples: how many.
        seed: of the draws.
        chunk: largest batch the interpreter sees.
        relative: as in :class:`MaxSensitivity`.
    """

    relative: bool = True

    worst: ClassVar[bool] = False

    def _moved(self, center: Seen, around: Seen) -> Tensor:
        return _sensitivity(center, around, self.relative)


@METRICS.register(
    "lipschitz",
    paper="Alvarez-Melis and Jaakkola 2018, on the robustness of interpretability methods",
    needs=("interpreter",),
)
@dataclass(frozen=True)
class LocalLipschitz(Stability):
    """Largest ratio of the map's move to the input's among near inputs (local Lipschitz estimate); low is stable.

    The paper searches the neighbour; this is the largest of random ones, as in Quantus: a lower bound of it. NaN where
    no neighbour differs from ``x``.
    """

    def _moved(self, center: Seen, around: Seen) -> Tensor:
        return norm(around.maps - center.maps) / norm(around.x - center.x)
