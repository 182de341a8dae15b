"""How far maps change when the input hardly does: the contract, sensitivity and Lipschitz constants.

All of them draw inputs around ``x`` from each sample's own stream, clip images to ``[0, 1]`` (oracles such as Quantus
and captum do not clip) and explain the class that ``x`` was explained for. Radii are in the input's own units, those of
table rows in the data's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from .. import checks
from ..autograd.layers import captured
from ..door import admit, answer
from ..fields import Count, Natural, Positive
from ..random_streams import Streams
from ..registry import METRICS
from .base import Better, Metric, check_maps, widened
from .cell import Cell
from .perturbing import gathered

if TYPE_CHECKING:
    from ..interpreters.base import Interpreter


class Explanations(NamedTuple):
    """Inputs with their explanations, each ``[n, ...]`` flattened to ``[n, N]``, and outputs of the layers needed."""

    x: Tensor
    logits: Tensor
    maps: Tensor
    features: dict[str, Tensor]

    def repeated(self, count: int) -> Explanations:
        """All rows repeated ``count`` times."""
        if count == 1:
            return self
        features = {layer: value.repeat(count, 1) for layer, value in self.features.items()}
        return Explanations(self.x.repeat(count, 1), self.logits.repeat(count, 1), self.maps.repeat(count, 1), features)


@dataclass(frozen=True)
class Stability(Metric):
    """Compares maps with maps of near inputs, a number per sample: ``metric(interpreter, x, target)`` gives ``[B]``.

    Args:
        radius: half-width of uniform noise, standard deviation of Gaussian noise.
        noise: how neighbours are drawn.
        samples: how many.
        seed: of the draws.
        batch_size: largest batch the interpreter sees.
    """

    radius: Positive = 0.02
    noise: Literal["uniform", "gaussian"] = "uniform"
    samples: Count = 10
    seed: Natural = 0
    batch_size: Count = 256

    better: ClassVar[Better] = "lower"
    bounds: ClassVar[tuple[float, float]] = (0, torch.inf)
    worst: ClassVar[bool] = True
    """Whether the largest value over the draws is returned, or their mean."""
    kept_prediction: ClassVar[bool] = False
    """Whether draws with another prediction than ``x`` are left out."""

    def __call__(self, interpreter: Interpreter, x: Tensor, target: Tensor | None = None) -> Tensor:
        """``[B]`` for the maps of class ``target`` (default: the prediction) around ``x``: images or table rows.

        NaN where no draw counts.

        Raises:
            InputError: bad ``x`` or ``target``, a model in train mode, or maps that are not finite.
        """
        return stabilities([self], interpreter, x, target)[0]

    def of_cell(self, cell: Cell) -> Tensor:
        """Around the attacked inputs, for the class that is predicted on them."""
        return self.all_of_cell([self], cell)[0]

    @classmethod
    def all_of_cell(cls, metrics: Sequence[Stability], cell: Cell) -> list[Tensor]:
        """Metrics that draw the same neighbours explain them only once."""
        return stabilities(metrics, cell.system.interpreter, cell.attacked, cell.seen.prediction)

    def neighbours(self, x: Tensor) -> Iterator[Tensor]:
        """``samples`` batches of inputs near ``x``, each of its shape."""
        streams = Streams.of(x, self.seed, "neighbours")
        for _ in range(self.samples):
            noise = streams.normal(x) if self.noise == "gaussian" else streams.uniform(x, -1, 1)
            near = noise.mul_(self.radius).add_(x)
            yield near.clamp_(0, 1) if x.dim() == 4 else near

    def along(
        self, interpreter: Interpreter, x: Tensor, neighbours: Iterator[Tensor], target: Tensor | None = None
    ) -> Tensor:
        """``[B]`` for given neighbours: batches of the shape of ``x``."""
        return _along([self], interpreter, x, neighbours, target)[0]

    @abstractmethod
    def _moved(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        """``[n]``: how far each neighbour's map is from its center's."""

    def _layer(self, interpreter: Interpreter, x: Tensor) -> str | None:
        """The layer whose output is needed, if any."""
        return None

    def _counted(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        moved = self._moved(center, around, layer)
        if not self.kept_prediction:
            return moved
        kept = around.logits.argmax(1) == center.logits.argmax(1)
        return torch.where(kept, moved, torch.full_like(moved, torch.nan))


def stabilities(
    metrics: Sequence[Stability], interpreter: Interpreter, x: Tensor, target: Tensor | None = None
) -> list[Tensor]:
    """The value of each metric, ``[B]`` each, with fewer explanations than one by one.

    Metrics of one ``radius``, ``noise``, ``samples``, ``seed`` and ``batch_size`` draw the same neighbours: these are
    drawn and explained once for all of them.

    Args:
        metrics: any of this kind, in any order.
        interpreter: whose maps are judged.
        x: images or table rows.
        target: ``[B]`` classes to explain; default the prediction.

    Raises:
        InputError: bad ``x`` or ``target``, a model in train mode, or maps that are not finite.
    """
    checks.inputs(x)
    sharing: dict[tuple[object, ...], list[int]] = {}
    for at, metric in enumerate(metrics):
        # A subclass may draw other neighbours.
        drawn = (type(metric).neighbours, metric.radius, metric.noise, metric.samples, metric.seed, metric.batch_size)
        sharing.setdefault(drawn, []).append(at)
    found: dict[int, Tensor] = {}
    for places in sharing.values():
        some = [metrics[at] for at in places]
        found |= zip(places, _along(some, interpreter, x, some[0].neighbours(x), target), strict=True)
    return [found[at] for at in range(len(metrics))]


@torch.no_grad()
def _along(
    metrics: Sequence[Stability],
    interpreter: Interpreter,
    x: Tensor,
    neighbours: Iterator[Tensor],
    target: Tensor | None,
) -> list[Tensor]:
    """Several metrics over the same neighbours, ``batch_size`` inputs at a time as the first of them has it."""
    admit(interpreter.model, x)
    if target is not None:
        checks.class_indices(target, len(x), "target")
    batch_size, layers = metrics[0].batch_size, [metric._layer(interpreter, x) for metric in metrics]
    read = sorted({layer for layer in layers if layer is not None})
    center = _seen(interpreter, x, target, read, batch_size)
    target = center.logits.argmax(1) if target is None else target
    values: list[list[Tensor]] = [[] for _ in metrics]
    for batch in gathered(neighbours, max(1, batch_size // len(x))):
        count = len(batch)
        around = _seen(interpreter, batch.flatten(0, 1), target.repeat(count), read, batch_size)
        repeated = center.repeated(count)
        for metric, layer, own in zip(metrics, layers, values, strict=True):
            own.append(metric._counted(repeated, around, layer).reshape(count, -1))
    # These have no bound: float16 would write some of them as infinity.
    return [_reduced(torch.cat(own), worst=metric.worst) for metric, own in zip(metrics, values, strict=True)]


def _seen(
    interpreter: Interpreter, x: Tensor, target: Tensor | None, layers: Sequence[str], batch_size: int
) -> Explanations:
    found = []
    for rows in (slice(at, at + batch_size) for at in range(0, len(x), batch_size)):
        part = None if target is None else target[rows]
        logits, maps = interpreter.explain(x[rows], part)[:2]
        check_maps(maps, "maps")
        features = _features(interpreter, x[rows], layers) if layers else {}
        found.append(Explanations(widened(x[rows]).flatten(1), widened(logits), widened(maps).flatten(1), features))
    if len(found) == 1:
        return found[0]
    return Explanations(
        torch.cat([seen.x for seen in found]),
        torch.cat([seen.logits for seen in found]),
        torch.cat([seen.maps for seen in found]),
        {layer: torch.cat([seen.features[layer] for seen in found]) for layer in layers},
    )


def _features(interpreter: Interpreter, x: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    # In a separate pass: inside ``explain`` an interpreter may run the model more than once.
    with captured(interpreter.model, layers) as outputs:
        answer(interpreter.model, x)
    return {layer: widened(outputs[layer]).flatten(1) for layer in layers}


def _reduced(values: Tensor, *, worst: bool) -> Tensor:
    # [S, B] to [B] over the draws that are not left out.
    counts = ~values.isnan()
    if worst:
        best = torch.where(counts, values, torch.full_like(values, -torch.inf)).amax(0)
        return torch.where(counts.any(0), best, torch.full_like(best, torch.nan))
    return torch.where(counts, values, torch.zeros_like(values)).sum(0) / counts.sum(0)


def norm(rows: Tensor) -> Tensor:
    """L2 norm ``[n]`` of the rows of ``[n, N]``."""
    length: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return length


def _sensitivity(center: Explanations, around: Explanations, relative: bool) -> Tensor:
    moved = norm(around.maps - center.maps)
    return moved / norm(center.maps) if relative else moved


@METRICS.register("max-sensitivity", paper="Yeh et al. 2019 (max-sensitivity)", needs=("interpreter",))
@dataclass(frozen=True)
class MaxSensitivity(Stability):
    """Largest change of the map among near inputs, relative to the map's norm; 0 is stable.

    Args:
        radius: half-width of uniform noise (the paper: 0.2 of its normalised inputs).
        noise: how neighbours are drawn.
        samples: how many (the paper: 50).
        seed: of the draws.
        batch_size: largest batch the interpreter sees.
        relative: divide by the map's norm, as Quantus and captum do; the paper does not. An all-zero map is then NaN if
            it stays, infinite if it moves.
    """

    relative: bool = True

    def _moved(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        return _sensitivity(center, around, self.relative)


@METRICS.register(
    "avg-sensitivity", paper="Yeh et al. 2019 (sensitivity); average: Bhatt et al. 2020", needs=("interpreter",)
)
@dataclass(frozen=True)
class AvgSensitivity(Stability):
    """Mean change of the map among near inputs, relative to the map's norm; 0 is stable.

    Args:
        radius: half-width of uniform noise.
        noise: how neighbours are drawn.
        samples: how many.
        seed: of the draws.
        batch_size: largest batch the interpreter sees.
        relative: as in :class:`MaxSensitivity`.
    """

    relative: bool = True

    worst: ClassVar[bool] = False

    def _moved(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        return _sensitivity(center, around, self.relative)


@METRICS.register(
    "lipschitz",
    paper="Alvarez-Melis and Jaakkola 2018, on the robustness of interpretability methods",
    needs=("interpreter",),
)
@dataclass(frozen=True)
class LocalLipschitz(Stability):
    """Largest ratio of the map's change to the input's among near inputs (local Lipschitz estimate); low is stable.

    The paper searches the neighbour; this is the largest of random ones, as in Quantus: a lower bound of it. NaN where
    no neighbour differs from ``x``.
    """

    def _moved(self, center: Explanations, around: Explanations, layer: str | None) -> Tensor:
        return norm(around.maps - center.maps) / norm(around.x - center.x)
