"""Consistency of the map: an input whose map moves under harmless changes is suspicious."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from robustexplain import maps as ops
from robustexplain.data import stack
from robustexplain.errors import InputError
from robustexplain.fields import Count, Natural, check_fields
from robustexplain.interpreters import Interpreter
from robustexplain.interpreters.composed.base import same
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES, DETECTORS
from robustexplain.system import Explained, System, draws, redrawn
from robustexplain.training import Samples, Session
from robustexplain.transforms import HarmlessChange, harmless_for

from .base import Detector, DetectorDefense
from .directed import Explain, directed, plain


@DETECTORS.register("map-consistency", paper="this project; after Ghorbani et al. 2019")
@dataclass(frozen=True, eq=False)
class MapConsistencyDetector(Detector):
    """The mean distance of an input's map from those of harmlessly changed copies, in ``[0, 1]``.

    Args:
        interpreter: whose maps; of the class that is predicted on the input itself.
        changes: the harmless ones.
        copies: of each change.
        seed: of their draws, which an adversary does not know.
    """

    interpreter: Interpreter
    changes: tuple[HarmlessChange, ...]
    copies: Count = 1
    seed: Natural = 0

    random: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.changes:
            raise InputError("a map is compared with those after harmless changes: give one at least")

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The model that is explained."""
        return (self.interpreter.model,)

    @property
    def averaged(self) -> int:
        """The copies of a change; the maps that an interpreter draws are not more than its own."""
        return self.interpreter.averaged if draws(self.interpreter) else self.copies

    def redrawn(self, seed: int) -> Self:
        """With other draws of the changes, and of the interpreter's own."""
        return replace(self, seed=seed, interpreter=redrawn(self.interpreter, seed))

    def following(self, model: nn.Module, copy: nn.Module) -> Self:
        """The same comparison of the maps of ``copy``."""
        own = self.interpreter
        return replace(self, interpreter=own.with_shared_weights(copy)) if own.model is model else self

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the mean absolute difference of maps rescaled to ``[0, 1]``."""
        known = seen if seen is not None and same(seen.interpreter, self.interpreter) else None
        return self._moved(x, plain, known)

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same of maps with a gradient; changes without one, such as JPEG, are gone straight through."""
        return self._moved(x, directed, None)

    def _moved(self, x: Tensor, explain: Explain, known: Explained | None) -> Tensor:
        found = explain(self.interpreter, x, None) if known is None else known
        classes, own = found.logits.argmax(1), _shown(found.maps)
        others = (
            explain(self.interpreter, self._copy(change, x, i), classes).maps
            for i in range(self.copies)
            for change in self.changes
        )
        return torch.stack([(own - _shown(other)).abs().mean(1) for other in others]).mean(0)

    def _copy(self, change: HarmlessChange, x: Tensor, index: int) -> Tensor:
        made = change(x, derive(self.seed, "copy", index))
        return made if made.requires_grad or not x.requires_grad else x + (made - x).detach()


def _shown(maps: Tensor) -> Tensor:
    return ops.per_sample(ops.minmax(maps))


@DEFENSES.register("map-consistency", paper="this project; after Ghorbani et al. 2019", needs=("data",))
@dataclass(frozen=True)
class MapConsistency(DetectorDefense):
    """Add a detector that compares an input's map with those of harmlessly changed copies; nothing is trained.

    Fragile maps of clean inputs move too: what counts is whether those of attacked inputs, which lie near a border
    of the class or were fitted to one image, move more. A map costs one more for each copy of each change.

    Args:
        changes: what the copies are; none: the usual harmless changes of the kind of input.
        copies: of each change.
    """

    changes: tuple[HarmlessChange, ...] = ()
    copies: Count = 1

    trains: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "changes", tuple(self.changes))

    def _train(self, system: System, data: Samples, session: Session) -> System:
        x = stack(data, range(min(len(data), self.samples)))[0]
        fitted = replace(self, changes=harmless_for(self.changes, x.shape[1:], x))
        return super(MapConsistency, fitted)._train(system, data, session)

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        return MapConsistencyDetector(system.interpreter, self.changes, self.copies, self.seed)
