"""Scanners: what judges a model, not an input, before it is trusted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from robustexplain.checks import Kind, kind
from robustexplain.data import stack, take
from robustexplain.door import suited
from robustexplain.errors import InputError
from robustexplain.fields import Count, Natural, check_fields
from robustexplain.metrics import Spearman
from robustexplain.system import System
from robustexplain.training import Samples, eval_mode, frozen


@dataclass(frozen=True)
class Scan:
    """What a scanner says of a model.

    Args:
        score: higher is more suspicious; it means something only beside the scores of honest models of the same kind.
        figures: what it was computed from, by name.
    """

    score: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelScanner(ABC):
    """Judges a model that its owner may have manipulated: ``scanner(system, data)`` gives a :class:`Scan`.

    It has no alarm of its own: the level of honest models is that of :func:`p_values`. The system stays as it is. A
    subclass implements ``_scan``.

    Args:
        probe: how many of the samples are used, classes in equal numbers.
        seed: of everything random.
    """

    probe: Count = field(default=32, kw_only=True)
    seed: Natural = field(default=0, kw_only=True)

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    """Kinds of samples that it takes."""
    needs_reference: ClassVar[bool] = False
    """Whether it compares with a system that the auditor trusts."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, system: System, data: Samples, reference: System | None = None) -> Scan:
        """The scan of the system's model and interpreter.

        Args:
            system: what is doubted.
            data: clean samples of the auditor, map-style, gives ``(x, label)``.
            reference: a system for the same task that the auditor trusts, with an interpreter of the same kind.

        Raises:
            InputError: no samples, samples of a kind not taken, no reference for a scanner that needs one.
        """
        if len(data) == 0:
            raise InputError(f"{type(self).__name__} needs clean samples, got none")
        if self.needs_reference and reference is None:
            raise InputError(f"{type(self).__name__} compares with a trusted system: give it a reference")
        x, y = self._samples(data)
        kind(x, self.takes, type(self).__name__)
        with frozen(system.model), eval_mode(system.model):
            x = suited(system.model, x)
            return self._scan(system, x, y.to(x.device), reference)

    def _samples(self, data: Samples) -> tuple[Tensor, Tensor]:
        """The samples that are used, and their labels."""
        return stack(take(data, min(self.probe, len(data)), self.seed))

    @abstractmethod
    def _scan(self, system: System, x: Tensor, y: Tensor, reference: System | None) -> Scan:
        """The scan; arguments are checked, the model is frozen and in eval mode."""


def agreement(maps: Tensor, other: Tensor, grid: int) -> Tensor:
    """Rank correlation ``[B]`` of the magnitudes of two maps, images averaged to ``grid x grid`` cells at most.

    On cells, because methods of different kinds agree on places, not on pixels; columns of a table stay as they are. A
    constant map agrees with nothing: 0.
    """
    if maps.dim() == 2:
        return torch.nan_to_num(Spearman()(*(m.detach().float().abs() for m in (maps, other))))
    cells = (min(grid, maps.shape[1]), min(grid, maps.shape[2]))
    coarse = (F.adaptive_avg_pool2d(m.detach().float().abs()[:, None], cells)[:, 0] for m in (maps, other))
    return torch.nan_to_num(Spearman()(*coarse))
