"""What makes a map plausible: how near it must be to the map that it should resemble."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import FieldError, InputError
from ..fields import Fraction, check_fields
from ..metrics import MapMetric
from ..registry import METRICS
from ..schema import make

PAPERS = 0.5
"""The IoU above which Zhang et al. 2020 (section 4) call a map plausible."""


@dataclass(frozen=True)
class Plausible:
    """A map is plausible if harmless changes move this row's maps as far, or, in the papers' way, by its IoU.

    ``{distance: l1, quantile: 0.95}``: its distance to the map that it should resemble is at most that quantile of the
    distances by which harmless changes move the row's maps. ``{iou: 0.5}``: its IoU with that map is above 0.5,
    whatever the row (Zhang et al. 2020, section 4).

    Args:
        distance: a metric that compares maps.
        quantile: of the distances under harmless changes.
        iou: the IoU that must be exceeded; ``None``: by distance.
    """

    distance: str = "l1"
    quantile: Fraction = 0.95
    iou: Fraction | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        if self.iou is not None and (self.distance, self.quantile) != ("l1", 0.95):
            raise FieldError("Plausible", "iou", "is another measure than distance and quantile: give one of them")
        if not 0 < self.quantile < 1:
            raise FieldError("Plausible", "quantile", f"must lie between 0 and 1, got {self.quantile!r}")
        self.metric  # noqa: B018  (refuses what is no metric of maps)

    @property
    def metric(self) -> MapMetric:
        """The metric that is the distance.

        Raises:
            InputError: an unknown one, or one that does not compare maps.
        """
        build: Any = METRICS.get(self.distance).build
        if not (isinstance(build, type) and issubclass(build, MapMetric)):
            raise FieldError("Plausible", "distance", f"must be a metric that compares maps, got {self.distance!r}")
        made: MapMetric = build()
        return made

    @property
    def least(self) -> int:
        """How many distances a split-conformal quantile needs: 19 for 0.95; by IoU none."""
        return 0 if self.iou is not None else math.ceil(self.quantile / (1 - self.quantile) - 1e-9)

    @property
    def entry(self) -> dict[str, Any]:
        """As a recipe writes it."""
        return {"distance": self.distance, "quantile": self.quantile} if self.iou is None else {"iou": self.iou}

    @classmethod
    def from_entry(cls, entry: Any, path: str) -> Plausible:
        """What an entry of a recipe says.

        Raises:
            InputError: neither form; a number alone, which was an IoU.
        """
        if isinstance(entry, Plausible):
            return entry
        if isinstance(entry, (int, float)) and not isinstance(entry, bool):
            raise InputError(f"{path}: {bare(entry)}")
        made: Plausible = make(cls, entry, path)
        return made


def bare(number: float) -> str:
    """What an error says of a number alone."""
    return (
        f"{number!r} alone was an IoU; it is written {{iou: {number!r}}} now. The default is "
        "{distance: l1, quantile: 0.95}: calibrated for each row on harmless changes"
    )
