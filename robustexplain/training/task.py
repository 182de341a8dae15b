"""What is trained on what, and how."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from functools import cached_property

import torch

from .. import files
from ..data.base import Samples, labels_of, subset
from ..errors import FieldError, InputError
from ..fingerprint import fingerprint
from ..random_streams import derive, generator
from .glimpse import Glimpse, glimpse_of
from .losses import ClassifierLoss, Loss, Weighted, balanced
from .selection import Selection, Validation, held_out
from .session import Session
from .settings import Training


@dataclass(frozen=True)
class Task:
    """What is trained on what, and how: all that decides the result besides the module (see :func:`fit`)."""

    name: str
    loss: Loss
    data: Samples
    settings: Training
    seed: int = 0
    identity: object = None
    evaluating: bool = False
    source: Samples | None = None

    @cached_property
    def stream(self) -> int:
        """The seed of everything that this training draws."""
        return derive(self.seed, self.name)

    @cached_property
    def stamp(self) -> str:
        """What its checkpoints carry: what was asked for, by name, settings, seed, identity, and number of samples."""
        known = self.identity if self.identity is not None else _told(self.loss)
        evaluating = ["evaluating"] if self.evaluating else []
        return files.digest([self.name, self.seed, asdict(self.settings), len(self.data), known, *evaluating])

    @cached_property
    def glimpse(self) -> Glimpse:
        """A look at the data, or at what they were computed from."""
        return glimpse_of(self.data if self.source is None else self.source)

    def limited(self) -> Task:
        """The same with as many of the samples as the settings ask for, in their order."""
        if self.settings.samples is None or self.settings.samples >= len(self.data):
            return self
        order = torch.randperm(len(self.data), generator=generator(self.seed, "samples"))
        return replace(self, data=subset(self.data, order[: self.settings.samples].sort().values.tolist()))

    def smoothed(self) -> Task:
        """The same with labels smoothed as the settings say."""
        if not self.settings.label_smoothing:
            return self
        return replace(self, loss=self._classifiers("label_smoothing").smoothed(self.settings.label_smoothing))

    def weighted(self) -> Task:
        """The same with classes weighted as the settings say, by the labels that are trained on."""
        if self.settings.class_weights is None:
            return self
        return replace(self, loss=Weighted(self._classifiers("class_weights"), balanced(labels_of(self.data))))

    def split(self, session: Session) -> tuple[Task, Selection | None]:
        """The same without the samples that are held out, and the choice of weights by them."""
        settings = self.settings
        if not settings.validation:
            return self, None
        loss = self._classifiers("validation")
        data, held = held_out(self.data, settings.validation, self.stream)
        validation = Validation(loss, held, settings.micro_batch or settings.batch_size, self.stream, session)
        return replace(self, data=data), Selection(validation, patience=settings.patience)

    def _classifiers(self, field: str) -> ClassifierLoss:
        if isinstance(self.loss, ClassifierLoss):
            return self.loss
        raise FieldError("Training", field, f"is for classifiers, and {self.name!r} trains something else")


def _told(loss: Loss) -> str:
    """What tells one loss from another where nobody says what it is made of; by name alone where it cannot be told."""
    try:
        return fingerprint(loss)
    except InputError:
        return getattr(loss, "__qualname__", type(loss).__qualname__)
