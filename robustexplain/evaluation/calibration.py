"""Each row calibrated on harmless changes: how far they move its maps, and how often they raise its alarm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import scipy.stats  # type: ignore[import-untyped]
import torch
from torch import Tensor

from .. import data as data_sets
from ..errors import InputError
from ..metrics import MapMetric
from ..random_streams import derive
from ..recipe.experiment import Evaluation
from ..recipe.plausible import Plausible
from ..system import Explained, System, knows
from ..transforms import HarmlessChange, harmless_for
from .statistics import Estimate, separation, share, share_of_draws

ROUNDING = 1e-6
"""By how much equal maps may differ, by a distance in ``[0, 1]``."""
Part = Literal["test", "defense", "judged"]
"""Where the calibration's inputs are from: the test part beyond the judged ones, the defense part, the judged ones."""


@dataclass(frozen=True, eq=False)
class Draws:
    """Some of the inputs that a row is calibrated on, each for one harmless change of every kind.

    Args:
        index: of the chunk.
        x: ``[B, ...]``.
        samples: ``[B]``, positions in their part.
        draw: ``[B]``, the how-manieth time its input stands there.
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
        """Of every kind, each draw: the distance of the maps, whether the prediction stayed, scores and alarms."""
        benign = system(draws.x)
        kinds = [self._measured(system, draws, benign, kind) for kind in range(len(self.changes))]
        return {name: torch.cat([found[name] for found in kinds]) for name in kinds[0]}

    def _measured(self, system: System, draws: Draws, benign: Explained, kind: int) -> dict[str, Tensor]:
        """Those of one kind of change, ``[B]`` each."""
        changed = draws.x.clone()
        for turn in draws.draw.unique().tolist():
            rows = (draws.draw == turn).nonzero()[:, 0].to(draws.x.device)
            changed[rows] = self.changes[kind](draws.x[rows], derive(self.seed, "harmless", turn))
        seen = system(changed)
        found = {
            "distance": distance_of(self.distance, seen.maps, benign.maps),
            "kept": (seen.prediction == benign.prediction).float(),
            "change": torch.full((len(changed),), kind),
            "sample": draws.samples,
            "draw": draws.draw,
        }
        if benign.score is not None and seen.score is not None and benign.alarm is not None and seen.alarm is not None:
            found |= {"clean_score": benign.score, "score": seen.score}
            # On inputs that the detector was made with, an alarm says nothing of its false alarms.
            known = knows(system.detector, draws.x)
            alarms = {"clean_alarm": benign.alarm, "alarm": seen.alarm}
            found |= {name: alarm.float().masked_fill(known, math.nan) for name, alarm in alarms.items()}
        return {name: value.cpu() for name, value in found.items()}

    def summary(self, arrays: dict[str, Tensor], plausible: Plausible) -> dict[str, Any]:
        """What a row's JSON says of its calibration.

        The limit is the largest of the kinds' own: in a mixture, changes that move nothing would lower it, and an
        attacker who may go as far as the strongest of them would look held.

        Raises:
            InputError: so many changes of a kind change the prediction that too few distances are left.
        """
        limits = [self._limit(arrays, kind, plausible) for kind in range(len(self.changes))]
        highest = max(range(len(limits)), key=limits.__getitem__)
        kinds = [change.entry for change in self.changes]
        known, changed = arrays["kept"] > 0, 1 - arrays["kept"]
        inputs = _inputs(arrays)
        return {
            "part": self.part,
            "inputs": inputs,
            "draws_made": len(known),
            "draws": int(known.sum()),
            "distance": plausible.distance,
            "quantile": plausible.quantile,
            "limit": _finite(limits[highest]),
            "limit_by": [_finite(limit) for limit in limits],
            "limit_range": self._range(arrays, plausible),
            "limit_from": kinds[highest],
            "harmless": kinds,
            "changed_prediction": share_of_draws(changed, inputs).as_dict(),
            "changed_prediction_by": [
                share_of_draws(changed[arrays["change"] == i], inputs).as_dict() for i in range(len(kinds))
            ],
            "false_alarms": self._false_alarms(arrays) if "alarm" in arrays else None,
        }

    def _range(self, arrays: dict[str, Tensor], plausible: Plausible) -> list[float | None]:
        """Where the row's limit would be if all inputs of the source were known, with 95% for the kind that decides."""
        known = [(arrays["change"] == i) & (arrays["kept"] > 0) for i in range(len(self.changes))]
        ends = [quantile_range(arrays["distance"][rows], plausible.quantile, _inputs(arrays, rows)) for rows in known]
        return [_finite(max(low for low, _ in ends)), _finite(max(high for _, high in ends))]

    def _limit(self, arrays: dict[str, Tensor], kind: int, plausible: Plausible) -> float:
        of_kind = arrays["change"] == kind
        kept = of_kind & (arrays["kept"] > 0)
        distances = arrays["distance"][kept]
        limit = conformal_quantile(distances, plausible.quantile, _inputs(arrays, kept))
        if tuple(map(float, self.distance.bounds)) == (0.0, 1.0):
            # Maps that nothing moves differ by rounding, and no attack is held by that.
            limit = max(limit, ROUNDING)
        if math.isinf(limit) and plausible.iou is None:
            made = int(of_kind.sum())
            raise InputError(
                f"{self.changes[kind].entry['name']}: this harmless change changes the prediction for "
                f"{made - len(distances)} of {made} inputs: the {plausible.quantile:g} quantile of the others needs "
                f"{plausible.least}, got {len(distances)}"
            )
        return limit

    def _false_alarms(self, arrays: dict[str, Tensor]) -> dict[str, Any]:
        """Of clean inputs, of each kind of change, and of the kind with most; all of inputs new to the detector."""
        inputs = _inputs(arrays, ~arrays["alarm"].isnan())
        kinds = [share_of_draws(arrays["alarm"][arrays["change"] == i], inputs) for i in range(len(self.changes))]
        most = max(range(len(kinds)), key=lambda i: kinds[i].value or 0.0)
        # A clean input stands there once for each of its draws.
        first = (arrays["draw"] == 0) & (arrays["change"] == 0)
        return {
            "clean": share(arrays["clean_alarm"][first]).as_dict(),
            "harmless": kinds[most].as_dict(),
            "harmless_by": [kind.as_dict() for kind in kinds],
            "harmless_from": self.changes[most].entry,
        }


@dataclass(frozen=True, eq=False)
class Calibration:
    """How far harmless changes move the maps of a row.

    Args:
        distances: of each kind of change, ``[N]``: of the draws that kept the prediction.
        limit: the distance that a plausible map does not exceed; ``None`` where there are too few of them.
        inputs: how many inputs they are from.
    """

    distances: tuple[Tensor, ...]
    limit: float | None
    inputs: int

    @classmethod
    def read(cls, known: dict[str, Any], arrays: dict[str, Tensor]) -> Calibration:
        """From a row's JSON and arrays."""
        kept = arrays["kept"] > 0
        kinds = (arrays["distance"][kept & (arrays["change"] == i)] for i in range(len(known["harmless"])))
        return cls(tuple(kinds), known["limit"], known["inputs"])

    def separations(self, distances: Tensor) -> list[Estimate | None]:
        """How well distances of attacked maps are told from those of each kind of change.

        The smallest is the row's separation. ``None`` where no draw of the kind counted.
        """
        return [separation(kind, distances, self.inputs) if len(kind) else None for kind in self.distances]


def _inputs(arrays: dict[str, Tensor], rows: Tensor | None = None) -> int:
    """From how many inputs some draws are."""
    samples = arrays["sample"]
    return len((samples if rows is None else samples[rows]).unique())


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def conformal_quantile(values: Tensor, quantile: float, inputs: int | None = None) -> float:
    """The value of rank ``ceil((n + 1) quantile)`` of ``values`` ``[n]``; infinite where ``n`` is below that rank.

    Another value from the same source is above it with a chance of at most ``1 - quantile`` (Papadopoulos et al. 2002;
    Vovk et al. 2005, the split-conformal quantile). Where they are several of each of so many ``inputs``, the rank is
    ``ceil(n (inputs + 1) / inputs quantile)``, for a value of another input (Lee, Barber and Willett 2023, with equal
    numbers), and the largest value's where inputs are too few for the promise.
    """
    n = len(values)
    # Less a rounding error: 0.95 x 200 is not to be 191.
    rank = math.ceil((n + 1) * quantile - 1e-9)
    if rank <= n and inputs is not None and 0 < inputs < n:
        rank = min(math.ceil(n * (inputs + 1) / inputs * quantile - 1e-9), n)
    return math.inf if rank > n else float(values.sort().values[rank - 1])


def quantile_range(values: Tensor, quantile: float, inputs: int | None = None) -> tuple[float, float]:
    """The two of ``values`` ``[n]`` between which their source's quantile lies with a chance of 95%, whatever it is.

    Infinite where they are too few. The ranks are quantiles of a binomial distribution (David and Nagaraja 2003,
    Order Statistics, section 7.1), of so many ``inputs`` where several values are of one.
    """
    count = min(inputs or len(values), len(values))
    times = len(values) / max(count, 1)
    first, last = scipy.stats.binom.ppf([0.025, 0.975], count, quantile)
    low, high = math.floor(first * times), math.ceil(last * times)
    ordered = values.sort().values.tolist()
    # The value of rank r + 1 is the first with more than r values below or at the quantile.
    return ordered[low - 1] if low >= 1 else -math.inf, ordered[high] if high < len(values) else math.inf


def distance_of(metric: MapMetric, maps: Tensor, reference: Tensor) -> Tensor:
    """``[B]``: how far apart maps are; of a metric that is higher for closer maps, what it lacks to its upper bound.

    So it is 0 for equal maps, and half of it is half the way.

    Raises:
        InputError: the metric is undefined for some.
    """
    found = metric(maps, reference)
    if bool(found.isnan().any()):
        name = type(metric).__name__
        raise InputError(f"{name} is undefined for {int(found.isnan().sum())} of {len(found)} maps: it is no distance")
    return metric.bounds[1] - found if metric.higher_is_closer else found


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
    judged ones. Each is changed once by every kind of harmless change; fewer inputs than asked for, several times.

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
