"""The scores of pytorch-ood, a library that detects inputs of another distribution, as one detector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from robustexplain.autograd.layers import logit_layer, submodule
from robustexplain.errors import InputError, MissingDataError
from robustexplain.fields import Count, check_fields
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session

from .base import Detector, DetectorDefense
from .detector import in_batches
from .penultimate import penultimate

Score = Literal["energy", "max-logit", "max-softmax", "mahalanobis", "vim", "knn"]
"""Of the logits, or (the last three) of the units in front of them."""
ON_LOGITS = {"energy": "EnergyBased", "max-logit": "MaxLogit", "max-softmax": "MaxSoftmax"}
PAPER = "Kirchheim et al. 2022 (pytorch-ood); Liu et al. 2020, Lee et al. 2018, Wang et al. 2022, Sun et al. 2022"


@DETECTORS.register("out-of-distribution", paper=PAPER)
@dataclass(frozen=True, eq=False)
class OutOfDistributionDetector(Detector):
    """One of pytorch-ood's scores of the logits or of the units in front of them.

    Args:
        model: the deployed classifier.
        by: the score.
        layer: name of the linear layer that gives the logits.
        units: ``[N, U]``, its inputs on clean training inputs, to which the score is fitted; kept, not the fit.
        labels: ``[N]``, from 0, each of them there.
        neighbours: of ``knn``.
    """

    model: nn.Module
    by: Score
    layer: str
    units: Tensor
    labels: Tensor
    neighbours: Count = 10

    def __post_init__(self) -> None:
        check_fields(self)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the library's."""
        units, logits = self._seen(x)
        found: Tensor = (
            self._fitted.predict_logits(logits) if self.by in ON_LOGITS else self._fitted.predict_features(units)
        )
        return found.to(x)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same; of units computed here from what the library fitted, because its own has no gradient."""
        units, logits = self._seen(x)
        if self.by in ON_LOGITS:
            found: Tensor = self._fitted.predict_logits(logits)
            return found
        ways: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "mahalanobis": self._mahalanobis,
            "vim": self._vim,
            "knn": self._knn,
        }
        return ways[self.by](units, logits)

    def _seen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Units and logits, in the precision of the library."""
        units, logits = penultimate(self.model, self.layer, x)
        return units.float(), logits.float()

    def _mahalanobis(self, units: Tensor, logits: Tensor) -> Tensor:
        apart = units[:, None] - self._fitted.mu
        found: Tensor = ((apart @ self._fitted.precision) * apart).sum(2).amin(1) / 2
        return found

    def _vim(self, units: Tensor, logits: Tensor) -> Tensor:
        residual = (units - self._fitted.u) @ self._fitted.principal_subspace
        found: Tensor = torch.linalg.vector_norm(residual, dim=1) * self._fitted.alpha - logits.logsumexp(1)
        return found

    def _knn(self, units: Tensor, logits: Tensor) -> Tensor:
        known, own = (nn.functional.normalize(part, dim=1) for part in (self.units.to(units), units))
        return torch.cdist(own, known).topk(self.neighbours, largest=False).values[:, -1]

    @cached_property
    def _fitted(self) -> Any:
        library, units = _library(), self.units.float()
        if self.by in ON_LOGITS:
            return getattr(library, ON_LOGITS[self.by])(None)
        if self.by == "mahalanobis":
            return library.Mahalanobis(None).fit_features(units, self.labels)
        if self.by == "knn":
            return library.KNN(None, k=self.neighbours).fit_features(units.cpu(), self.labels.cpu())
        head = submodule(self.model, self.layer)
        weight, bias = head.weight, head.bias
        assert isinstance(weight, Tensor)  # of a linear layer; for the type checker
        weight = weight.float()
        bias = weight.new_zeros(len(weight)) if bias is None else bias.float()
        # As many dimensions as classes: the library's users choose between 16 and 512 for wider networks.
        return library.ViM(None, min(len(weight), weight.shape[1] // 2), weight, bias).fit_features(units, self.labels)


@DEFENSES.register("out-of-distribution", paper=PAPER, needs=("data",))
@dataclass(frozen=True)
class OutOfDistribution(DetectorDefense):
    """Add one of pytorch-ood's scores as a detector: is the input, by its logits or late units, of another kind?

    No attack is used. The library is an extra: ``pip install robustexplain[ood]``.

    Args:
        by: ``energy``, ``max-logit`` or ``max-softmax``, of the logits; ``mahalanobis``, ``vim`` or ``knn``, of the
            units in front of them.
        neighbours: of ``knn``.

    Raises:
        MissingDataError: the library is not installed.
        InputError: fewer inputs than ``knn`` needs.
    """

    by: Score = "mahalanobis"
    neighbours: Count = 10

    @property
    def fewest(self) -> int:
        """The neighbours and the fifth of the samples that calibrates."""
        return max(20, 2 * self.neighbours if self.by == "knn" else 0)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        _library()
        layer = logit_layer(system.model, x)
        if self.by == "knn" and len(x) < self.neighbours:
            raise InputError(f"knn needs {self.neighbours} inputs to be near to, got {len(x)}")
        units = in_batches(lambda part: penultimate(system.model, layer, part)[0], x, self.batch_size)
        labels = y.unique(return_inverse=True)[1]
        return OutOfDistributionDetector(system.model, self.by, layer, units, labels, self.neighbours)


def _library() -> Any:
    try:
        from pytorch_ood import detector
    except ImportError as error:
        raise MissingDataError(
            f"the scores {', '.join(get_args(Score))} are pytorch-ood's, which is not installed: pip install "
            "'robustexplain[ood]'"
        ) from error
    return detector
