"""Each row calibrated on harmless changes: how far they move its maps, and how often they raise its alarm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import data as data_sets
from ..errors import InputError
from ..metrics import MapMetric
from ..random_streams import derive
from ..recipe.experiment import Evaluation
from ..recipe.plausible import Plausible
from ..system import System
from ..transforms import HarmlessChange, harmless_for, mixed
from .statistics import Estimate, separation, share

ROUNDING = 1e-6
"""By how much equal maps may differ, by a distance in ``[0, 1]``."""
Part = Literal["test", "defense", "judged"]
"""Where the calibration's inputs are from: the test part beyond the judged ones, the defense part, the judged ones."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Some of the inputs that a row is calibrated on, each for one harmless change.

    Args:
        index: of the chunk.
        x: ``[B, ...]``.
        samples: ``[B]``, positions in their part.
        draw: ``[B]``, the how-manieth change of its input each is.
    """

    index: int
    x: Tensor
    samples: Tensor
    draw: Tensor


@dataclass(frozen=True)
class Calibrator:
    """Which inputs every row is calibrated on, and by what.

    Args:
        part: where they are from.
        draws: the inputs in chunks.
        changes: the harmless changes, fitted to the data.
        distance: the metric of maps.
        seed: of the draws.
    """

    part: Part
    draws: tuple[Draws, ...]
    changes: tuple[HarmlessChange, ...]
    distance: MapMetric
    seed: int

    @torch.no_grad()
    def measure(self, system: System, draws: Draws) -> dict[str, Tensor]:
        """Of each draw: the distance of the maps, whether the prediction stayed, the change, scores and alarms."""
        changed, which = draws.x.clone(), torch.zeros(len(draws.x), dtype=torch.int64)
        for turn in draws.draw.unique().tolist():
            rows = (draws.draw == turn).nonzero()[:, 0]
            here, chosen = mixed(self.changes, draws.x[rows.to(draws.x.device)], derive(self.seed, "harmless", turn))
            changed[rows.to(draws.x.device)], which[rows.cpu()] = here, chosen
        benign, seen = system(draws.x), system(changed)
        found = {
            "distance": distance_of(self.distance, seen.maps, benign.maps),
            "kept": (seen.prediction == benign.prediction).float(),
            "change": which,
            "sample": draws.samples,
            "draw": draws.draw,
        }
        if benign.score is not None and seen.score is not None and benign.alarm is not None and seen.alarm is not None:
            found |= {"clean_score": benign.score, "score": seen.score}
            found |= {"clean_alarm": benign.alarm.float(), "alarm": seen.alarm.float()}
        return {name: value.cpu() for name, value in found.items()}

    def summary(self, arrays: dict[str, Tensor], plausible: Plausible) -> dict[str, Any]:
        """What a row's JSON says of its calibration.

        Raises:
            InputError: so many changes change the prediction that too few distances are left.
        """
        distances = arrays["distance"][arrays["kept"] > 0]
        limit = conformal_quantile(distances, plausible.quantile)
        if tuple(map(float, self.distance.bounds)) == (0.0, 1.0):
            # Maps that nothing moves differ by rounding, and no attack is held by that.
            limit = max(limit, ROUNDING)
        if math.isinf(limit) and plausible.iou is None:
            raise InputError(
                f"harmless changes change the prediction for {len(arrays['kept']) - len(distances)} of "
                f"{len(arrays['kept'])} inputs: the {plausible.quantile:g} quantile of the others needs "
                f"{plausible.least}, got {len(distances)}"
            )
        kinds = {i: change.entry for i, change in enumerate(self.changes)}
        first = arrays["draw"] == 0
        return {
            "part": self.part,
            "inputs": len(arrays["sample"].unique()),
            "draws_made": len(arrays["kept"]),
            "draws": len(distances),
            "distance": plausible.distance,
            "quantile": plausible.quantile,
            "limit": _finite(limit),
            "limit_by": [_finite(self._limit_of(i, arrays, plausible.quantile)) for i in kinds],
            "harmless": list(kinds.values()),
            "changed_prediction": share(1 - arrays["kept"]).as_dict(),
            "changed_prediction_by": [share(1 - arrays["kept"][arrays["change"] == i]).as_dict() for i in kinds],
            "false_alarms": None
            if "alarm" not in arrays
            # A clean input stands there once for each of its draws.
            else {"clean": share(arrays["clean_alarm"][first]).as_dict(), "harmless": share(arrays["alarm"]).as_dict()},
        }

    def _limit_of(self, change: int, arrays: dict[str, Tensor], quantile: float) -> float:
        kept = (arrays["kept"] > 0) & (arrays["change"] == change)
        return conformal_quantile(arrays["distance"][kept], quantile)


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far harmless changes move the maps of a row.

    Args:
        distances: ``[N]``, of the draws that kept the prediction.
        limit: the distance that a plausible map does not exceed; ``None`` where there are too few of them.
        inputs: how many inputs they are from.
    """

    distances: Tensor
    limit: float | None
    inputs: int

    @classmethod
    def read(cls, known: dict[str, Any], arrays: dict[str, Tensor]) -> Calibration:
        """From a row's JSON and arrays."""
        return cls(arrays["distance"][arrays["kept"] > 0], known["limit"], known["inputs"])

    def separation(self, distances: Tensor) -> Estimate | None:
        """How well distances of attacked maps are told from harmless ones; ``None`` where no draw counted."""
        if not len(self.distances):
            return None
        return separation(self.distances, distances, self.inputs)


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def conformal_quantile(values: Tensor, quantile: float) -> float:
    """The value of rank ``ceil((n + 1) quantile)`` of ``values`` ``[n]``; infinite where ``n`` is below that rank.

    Another value from the same source is above it with a chance of at most ``1 - quantile`` (Papadopoulos et al. 2002;
    Vovk et al. 2005, the split-conformal quantile).
    """
    # Less a rounding error: 0.95 x 200 is not to be 191.
    rank = math.ceil((len(values) + 1) * quantile - 1e-9)
    return math.inf if rank > len(values) else float(values.sort().values[rank - 1])


def distance_of(metric: MapMetric, maps: Tensor, reference: Tensor) -> Tensor:
    """``[B]``: how far apart maps are; the negative of a metric that is higher for closer maps.

    Raises:
        InputError: the metric is undefined for some.
    """
    found = metric(maps, reference)
    if bool(found.isnan().any()):
        name = type(metric).__name__
        raise InputError(f"{name} is undefined for {int(found.isnan().sum())} of {len(found)} maps: it is no distance")
    return -found if metric.higher_is_closer else found


def calibrator(
    data: data_sets.Data,
    evaluation: Evaluation,
    judged: Sequence[int],
    beyond: Sequence[int],
    seed: int,
    device: torch.device,
) -> Calibrator:
    """What the rows are calibrated on.

    The inputs are those of the test part beyond the judged ones, chosen alike; where they are fewer than half of
    ``evaluation.calibration``, those of the defense part if there are more of them; where there are none at all, the
    judged ones. Fewer inputs than draws are changed several times each.

    Args:
        data: the data set.
        evaluation: its settings; it asks for some calibration.
        judged: positions of the judged inputs in the test part.
        beyond: positions of others there, chosen alike.
        seed: of the draws.
        device: of the systems.
    """
    wanted = evaluation.calibration
    part: Part = "test"
    positions, samples = list(beyond), data.test
    if 2 * len(beyond) < wanted and len(beyond) < len(data.defense):
        part, samples = "defense", data.defense
        positions = list(data_sets.take(samples, min(wanted, len(samples)), seed).indices)
    elif not positions:
        part, positions = "judged", list(judged)
    size, known = evaluation.batch_size, positions[:wanted]
    turns = [(known[i % len(known)], i // len(known)) for i in range(wanted)]
    chunks = []
    for start in range(0, wanted, size):
        some, draw = zip(*turns[start : start + size], strict=True)
        x = data_sets.stack(samples, some)[0].to(device)
        chunks.append(Draws(start // size, x, torch.tensor(some), torch.tensor(draw)))
    changes = harmless_for(evaluation.harmless, data.shape, _samples(data, chunks))
    return Calibrator(part, tuple(chunks), changes, evaluation.plausible.metric, derive(seed, "calibration"))


def _samples(data: data_sets.Data, chunks: Sequence[Draws]) -> Tensor:
    """Rows of the train part, from which changes of tables know the columns' spread; else those that are changed."""
    if len(data.shape) == 1 and len(data.train):
        return data_sets.stack(data_sets.take(data.train, min(len(data.train), 1024)))[0]
    return torch.cat([chunk.x for chunk in chunks]).cpu()
