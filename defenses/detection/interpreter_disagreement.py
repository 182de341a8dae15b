"""Disagreement between interpreters: an attack that was fitted to one kind of map leaves the others behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain import maps as ops
from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Count
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import same
from robustexplain.registry import DEFENSES, DETECTORS, INTERPRETERS
from robustexplain.system import Explained, System
from robustexplain.training import Session

from ..interpreters.aggregated import member_of, resolve
from .base import Detector, DetectorDefense
from .detector import in_batches
from .directed import Explain, directed, plain
from .of_maps import MapsDetector

PRIOR = 4.0
"""How many inputs the mean of all classes counts for in that of one."""


@DETECTORS.register("interpreter-disagreement", paper="this project")
@dataclass(frozen=True, eq=False)
class InterpreterDisagreementDetector(MapsDetector):
    """How unusual for the predicted class the distances are between several interpreters' maps.

    Args:
        interpreters: two or more, of one model.
        mean: ``[K, P]``, of each pair's distance on clean inputs of each predicted class.
        std: ``[P]``, within the classes.
        grid: side of the grid on which maps are compared.
    """

    mean: Tensor
    std: Tensor
    grid: Count = 8

    @torch.no_grad()
    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """``[B]``: the root of the mean square of the pairs' standardised distances, too large and too small alike."""
        return self._unusual(*distances(self.interpreters, x, self.grid, plain, seen))

    def soft_score(self, x: Tensor) -> Tensor:
        """``[B]``: the same of maps with a gradient."""
        return self._unusual(*distances(self.interpreters, x, self.grid, directed))

    @torch.no_grad()
    def reasons(self, x: Tensor) -> dict[str, Tensor]:
        """The score, and each pair's standardised distance under the names of both."""
        names = [INTERPRETERS.name_of(type(interpreter)) for interpreter in self.interpreters]
        apart = self._standardised(*distances(self.interpreters, x, self.grid, plain))
        pairs = [f"{one} and {other}" for one, other in combinations(names, 2)]
        return {"score": self.score(x)} | dict(zip(pairs, apart.unbind(1), strict=True))

    def _standardised(self, found: Tensor, classes: Tensor) -> Tensor:
        return (found - self.mean.to(found)[classes]) / self.std.to(found)

    def _unusual(self, found: Tensor, classes: Tensor) -> Tensor:
        square = self._standardised(found, classes).square().mean(1)
        # The smallest number keeps the root's derivative finite at the mean itself.
        return square.clamp(min=torch.finfo(found.dtype).tiny).sqrt()


@DEFENSES.register("interpreter-disagreement", paper="this project", needs=("data",))
@dataclass(frozen=True)
class InterpreterDisagreement(DetectorDefense):
    """Add a detector of inputs on which several interpreters disagree more, or less, than on clean ones of the class.

    No attack is used: mean and deviation of each pair's distance are those of clean training inputs. A class of which
    few are predicted among them takes part of its mean from all (as if four more inputs had that one).

    Args:
        members: kinds of map, as names, classes or names with settings; may include the system's own interpreter.
        grid: side of the grid on which maps are compared, by their magnitudes as shares: finer than a class
            activation map's, gradients differ everywhere.

    Raises:
        FieldError: fewer than two kinds of map.
    """

    members: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradient", "gradcam", "integrated-gradients")
    grid: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "members", tuple(resolve(member) for member in self.members))
        if len(self.members) < 2:
            raise FieldError(type(self).__name__, "members", f"must be two or more, got {len(self.members)}")

    def _fit(self, system: System, x: Tensor, y: Tensor, session: Session) -> Detector:
        interpreters = tuple(member_of(system, resolve(member)) for member in self.members)
        found = in_batches(lambda part: distances(interpreters, part, self.grid, plain)[0], x, self.batch_size)
        logits = in_batches(lambda part: answer(system.model, part), x, self.batch_size)
        member = F.one_hot(logits.argmax(1), logits.shape[1]).to(found)
        mean = (member.mT @ found + PRIOR * found.mean(0)) / (member.sum(0)[:, None] + PRIOR)
        std = (found - member @ mean).square().mean(0).sqrt().clamp(min=1e-6)
        return InterpreterDisagreementDetector(interpreters, mean, std, self.grid)


def distances(
    interpreters: Sequence[Interpreter], x: Tensor, grid: int, explain: Explain, seen: Explained | None = None
) -> tuple[Tensor, Tensor]:
    """``[B, P]``: for each pair half the absolute difference of the maps' shares, in ``[0, 1]``; and the classes."""
    shares: list[Tensor] = []
    classes = None if seen is None else seen.logits.argmax(1)
    for interpreter in interpreters:
        if seen is not None and same(seen.interpreter, interpreter):
            maps = seen.maps
        else:
            found = explain(interpreter, x, classes)
            maps, classes = found.maps, found.logits.argmax(1) if classes is None else classes
        small = maps if maps.dim() == 2 else F.adaptive_avg_pool2d(maps.abs()[:, None], grid)[:, 0]
        shares.append(ops.distribution(small))
    pairs = [(one - other).abs().sum(1) / 2 for one, other in combinations(shares, 2)]
    assert classes is not None  # there are two interpreters at least; for the type checker
    return torch.stack(pairs, 1), classes
