"""MagNet's detectors: what an autoencoder of clean images does not give back, and what it changes of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Count, NonNegative, Positive, check_fields, identified
from robustexplain.models import AutoEncoder
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System
from robustexplain.training import Session, Training, fit

from ..inputs.magnet import ReconstructionLoss
from ..inputs.placed import drawn_anew
from .any_of import AnyOf
from .base import Detector, DetectorDefense
from .detector import fingerprints
from .learned import images_only, refuse_misfit


@DETECTORS.register("magnet", paper="Meng and Chen 2017 and code")
@dataclass(frozen=True, eq=False)
class MagNetDetector(Detector):
    """The error of a reconstruction, or the divergence of the answers on an image and on its reconstruction.

    Args:
        model: the deployed classifier.
        autoencoder: trained on clean images.
        by: ``error``: the mean of ``|x - A(x)|^p``; ``divergence``: the Jensen-Shannon divergence of the
            probabilities at a temperature, in nats.
        p: of the error.
        temperature: of the divergence: at 1 the probabilities of a confident network are all alike.
    """

    model: nn.Module
    autoencoder: AutoEncoder
    by: Literal["error", "divergence"] = "error"
    p: Positive = 2.0
    temperature: Positive = 10.0

    def __post_init__(self) -> None:
        check_fields(self)

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: error or divergence."""
        known = seen is not None and seen.interpreter is not None and seen.interpreter.model is self.model
        return self._score(x, seen.logits if known else None)  # type: ignore[union-attr]

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same."""
        return self._score(x, None)

    def _score(self, x: Tensor, logits: Tensor | None) -> Tensor:
        again = self.autoencoder(x)
        if self.by == "error":
            error: Tensor = (x - again).abs().pow(self.p).flatten(1).mean(1)
            return error
        logits = answer(self.model, x) if logits is None else logits
        one, other = ((z / self.temperature).log_softmax(1) for z in (logits, answer(self.model, again)))
        middle = torch.logaddexp(one, other) - torch.tensor(2.0).log().to(one)
        return torch.stack([(part.exp() * (part - middle)).sum(1) for part in (one, other)]).mean(0)


@DEFENSES.register("magnet", paper="Meng and Chen 2017 and code", needs=("data",))
@dataclass(frozen=True)
class MagNet(DetectorDefense):
    """Add MagNet's detectors, by the errors of two autoencoders and by the divergence of answers; each may ring.

    As in the code for MNIST: autoencoder I (with pooling) is judged by the squared error, II by the absolute one; the
    divergence is that of I. They ring together at the defense's rate of false alarms, where the code drops a share of
    0.001 of the clean images by each.

    Departures: the code's penalty of 1e-9 on activities is left out, and a weight decay of 1e-9 stands there instead;
    AdamW at 1e-2 in batches of 64 (the code: Adam at 1e-3, batches of 256).

    Args:
        temperatures: of the divergence, a detector each; none: errors alone.
        width: channels inside of the autoencoders (the code: 3).
        noise: deviation of the Gaussian noise that is added to their inputs in training (the code: 0.1).
        training: of each autoencoder (the code: 100 epochs).

    Raises:
        FieldError: a temperature that is not above 0.
    """

    temperatures: Sequence[float] = (10.0, 40.0)
    width: Count = 3
    noise: NonNegative = 0.1
    training: Training = field(default_factory=lambda: Training(epochs=100, lr=1e-2, weight_decay=1e-9))

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "temperatures", tuple(self.temperatures))
        if not all(temperature > 0 for temperature in self.temperatures):
            raise FieldError(type(self).__name__, "temperatures", f"must be above 0, got {self.temperatures!r}")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return images_only(self, shape)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        refuse_misfit(self, x)
        first, second = (self._autoencoder(x, y, session, pooled=pooled) for pooled in (True, False))
        known = fingerprints(x)
        errors = ((first, 2.0), (second, 1.0))
        by_error = (MagNetDetector(system.model, made, p=p, trained_on=known) for made, p in errors)
        by_answer = (
            MagNetDetector(system.model, first, "divergence", temperature=warmth, trained_on=known)
            for warmth in self.temperatures
        )
        return AnyOf((*by_error, *by_answer))

    def _autoencoder(self, x: Tensor, y: Tensor, session: Session, *, pooled: bool) -> AutoEncoder:
        channels, name = x.shape[1], "magnet-1" if pooled else "magnet-2"
        made = drawn_anew(lambda: AutoEncoder(channels, self.width, pooled=pooled), self.seed, x.device)
        data = TensorDataset(x.cpu(), y.cpu())
        fit(made, ReconstructionLoss(self.noise), data, self.training, name=name, seed=self.seed, session=session,
            identity=identified(self))  # fmt: skip
        return made.requires_grad_(False)
