"""Why no cell of a row is to be believed: what is wrong with its system."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..recipe.auditing import Auditing
from ..recipe.experiment import Row
from .calibration import ROUNDING
from .probing import Probes
from .store import RunFolder

Flag = dict[str, str]
"""``name`` and ``reason``."""


def flag(name: str, reason: str) -> Flag:
    """A flag as it stands in a cell."""
    return {"name": name, "reason": reason}


@dataclass(frozen=True)
class RowAudit:
    """The audit of rows, from what a run's directory holds.

    Args:
        folder: it.
        probes: what was run for the audit.
    """

    folder: RunFolder
    probes: Probes

    @property
    def settings(self) -> Auditing:
        """Thresholds."""
        return self.probes.settings

    def flags(self, row: Row) -> Iterator[Flag]:
        """Flags of the row's system."""
        known, limits = self.probes.read(self.probes.row(row)), self.settings
        if known is not None:
            output, maps = float(known["output_change"].amax()), float(known["map_change"].amax())
            if output > limits.output_change or maps > limits.map_change:
                yield flag(
                    "random-output",
                    f"the system answers the same input differently (logits by {output:.2g}, maps by {maps:.2g}) and "
                    "does not say that it is random: it is judged on one draw, and no attack averages over them",
                )
            if float(known["softmax"].amin()):
                yield flag(
                    "softmax-output",
                    "the classifier's logits are probabilities: where they saturate, gradients vanish, and attacks "
                    "fail that would succeed on its logits",
                )
            if float(known["constant"].amin()):
                yield flag("constant-map", "all inputs have the same map: it explains nothing, and nothing forges it")
            if "promise" in known:
                yield from self._gradients(known["promise"])
        calibrated = self.folder.calibrated(row.label)
        if calibrated is None:
            return
        yield from self._weights(row, calibrated[0]["limit"])
        distances = calibrated[1]["distance"][calibrated[1]["kept"] > 0]
        if len(distances) and float(distances.abs().amax()) <= ROUNDING:
            yield flag(
                "still-map",
                f"none of {len(distances)} harmless changes moves the map at all: it does not follow the input (a map "
                "that is looked up, or does not depend on it), so that attacks on it prove nothing",
            )
        yield from self._alarms(calibrated[0])

    def _gradients(self, promise: Tensor) -> Iterator[Flag]:
        """Of each input, the share of what the classifier's gradient promises that a small step brings."""
        n, infinite = len(promise), int(promise.isinf().sum())
        far = promise.isfinite() & ((promise < 0.5) | (promise > 2))
        hardly, wrong = int((far & (promise.abs() < 0.05)).sum()), int(far.sum())
        if infinite or hardly > self.settings.unstable * n:
            what = f"is not finite for {infinite}" if infinite else f"promises twenty times what is there for {hardly}"
            yield flag(
                "exploding-gradient", f"the classifier's gradient {what} of {n} inputs: no attack can follow such a one"
            )
        elif wrong > self.settings.unstable * n:
            yield flag(
                "unstable-loss",
                f"for {wrong} of {n} inputs the shortest step along the gradient changes the margin by less than half, "
                "or more than twice, of what the gradient says: what attacks follow is not what is there",
            )

    def _weights(self, row: Row, limit: float | None) -> Iterator[Flag]:
        """Maps that stay where the classifier's weights are drawn anew."""
        name = self.probes.weights(row)
        found = self.probes.read(name) if name in self.probes.row_names(row) else None
        if found is None or limit is None or not len(found["distance"]):
            return
        n, same = len(found["distance"]), int((found["distance"] <= limit).sum())
        if same > self.settings.weights * n:
            yield flag(
                "weights-ignored",
                f"with all weights of the classifier drawn anew, {same} of {n} maps stay within what harmless changes "
                "do: they hardly depend on the model that they are to explain",
            )

    def _alarms(self, known: dict[str, Any]) -> Iterator[Flag]:
        if known["false_alarms"] is None:
            return
        kinds = [entry["name"] for entry in known["harmless"]]
        rates = [known["false_alarms"]["clean"], *known["false_alarms"]["harmless_by"]]
        for name, rate in zip(["clean inputs", *kinds], rates, strict=True):
            if rate["value"] is not None and rate["low"] > self.settings.false_alarms:
                yield flag(
                    "false-alarms",
                    f"the detector rings for {rate['value']:.0%} of {name} [{rate['low']:.0%}, {rate['high']:.0%}]: it "
                    "does not tell attacks from harmless inputs",
                )
