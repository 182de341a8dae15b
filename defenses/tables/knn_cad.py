"""KNN-CAD: LIME and KernelSHAP use only rows that the model answers as it answers real rows nearby."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from robustexplain.data import stack
from robustexplain.door import answer, suited
from robustexplain.errors import FieldError, InputError
from robustexplain.fields import Count, Fraction
from robustexplain.interpreters import LIMETabular, SHAPTabular
from robustexplain.interpreters.tabular.guard import NeighbourGuard, gap
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse

KEEP = {LIMETabular: 0.9, SHAPTabular: 0.75}
"""The scores from which the authors' code keeps a row, whatever threshold was fitted."""


@DEFENSES.register("knn-cad", paper="Carmichael and Scheirer 2023 and code (unfooling)", needs=("tables", "data"))
@dataclass(frozen=True)
class KNNCAD(Defense):
    """Let the explainer of a table use only made-up rows that look real by the model's own answers; nothing is trained.

    A row that a scaffold answers by its innocent rule is answered otherwise than the real rows around it. Its score is
    that of :class:`~robustexplain.interpreters.tabular.guard.NeighbourGuard`; of the system's own data, predictions of
    the very model count as classes. LIME draws again until it has its rows, KernelSHAP averages a coalition over those
    of its rows that are kept. Costs a second query of the model for each made-up row, and one for each row of the data.

    Departures: more than two classes; a coalition's rows are averaged instead of filled up with repetitions; a limit on
    how often LIME draws, where the code goes on for ever. Of tables with too many columns to enumerate, KernelSHAP's
    coalitions none of whose rows are kept are left out, where the code draws others (up to four times as many) until
    it has as many as asked for: maps of 28 columns vary up to three times as much with the seed. More ``samples`` help.

    Args:
        keep: the score from which a row is kept; ``None``: 0.9 for LIME and 0.75 for KernelSHAP, as in the code.
        k: neighbours; by default this and the next two are those of the authors' experiments (the class's own defaults
            are 20, ``median`` and 2).
        distance: of several neighbours of one class: their ``median`` or ``max``.
        p: of the Minkowski distance.
        at_least: where fewer rows are kept, the best-scored others are taken up to this number.
        samples: largest number of the defense's rows that are kept.
    """

    keep: Fraction | None = None
    k: Count = 15
    distance: Literal["median", "max"] = "max"
    p: Count = 1
    at_least: Count = 50
    samples: Count = 10_000

    layer: ClassVar[Literal["model", "input", "interpreter", "detector"]] = "interpreter"
    defends: ClassVar[tuple[str, ...]] = ("lime-tabular", "shap-tabular")
    needs_data: ClassVar[bool] = True
    part: ClassVar[Literal["train", "defense"]] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 <= self.keep <= 1:
            raise FieldError(type(self).__name__, "keep", f"must be from 0 to 1, or none, got {self.keep!r}")

    @property
    def fewest(self) -> int:
        """One more than neighbours, since a row is no neighbour of itself."""
        return self.k + 1

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        interpreter = system.interpreter
        name = type(interpreter).__name__
        refuse(
            not isinstance(interpreter, (LIMETabular, SHAPTabular)),
            f"knn-cad guards the rows that lime-tabular and shap-tabular make up, and {name} is none of them",
        )
        assert isinstance(interpreter, (LIMETabular, SHAPTabular))  # for the type checker
        refuse(interpreter.guard is not None, f"{name} has a guard of its rows already")
        assert data is not None  # checked before; for the type checker
        keep = KEEP[type(interpreter)] if self.keep is None else self.keep
        return replace(system, interpreter=replace(interpreter, guard=self.guard(system, data, keep)))

    def guard(self, system: System, data: Samples, keep: float) -> NeighbourGuard:
        """The rows of ``data`` with the model's answers, and which made-up ones are kept beside them.

        Raises:
            InputError: fewer rows than neighbours, or no table.
        """
        if len(data) < self.fewest:
            raise InputError(f"knn-cad of {self.k} neighbours needs {self.fewest} rows at least, got {len(data)}")
        rows = stack(data, range(min(len(data), self.samples)))[0]
        if rows.dim() != 2:
            raise InputError(f"knn-cad keeps table rows [N, D], and the data holds {list(rows.shape[1:])}")
        classes = _predicted(system, rows)
        return NeighbourGuard(rows, classes, keep, self.k, self.distance, self.p, self.at_least)


def query_gap(system: System, data: Samples, x: Tensor, defense: KNNCAD | None = None) -> float:
    """How differently a model answers its explainer's rows and real ones: the detector of Carmichael and Scheirer 2023.

    The area between the distributions of the scores of the data's rows and of the rows that the explainer asks about to
    explain ``x``; near 0 for an honest model. Only what the model answers is used.

    Args:
        system: with any explainer of tables, undefended.
        data: real rows.
        x: rows that are explained, ``[B, D]``.
        defense: the settings of the scores; default those of ``knn-cad``.

    Raises:
        InputError: fewer rows than neighbours; an explainer that asks about no row but ``x`` itself.
    """
    guard = (defense or KNNCAD()).guard(system, data, 0.0)
    rows = guard.rows.double().numpy()
    with _queries(system) as seen:
        system.interpreter(x)
    asked = torch.cat([q.double() for q in seen])
    own = (asked[:, None] == x.double().cpu()[None]).all(2).any(1)
    if bool(own.all()):
        raise InputError(f"{type(system.interpreter).__name__} asks the model about no row but the explained ones")
    made = asked[~own]
    real = guard.scores(rows, guard.classes.numpy(), itself=False)
    return gap(real, guard.scores(made.numpy(), _predicted(system, made.to(x.dtype)).numpy()))


@contextmanager
def _queries(system: System) -> Iterator[list[Tensor]]:
    """What the model is asked inside the block, batch by batch."""
    seen: list[Tensor] = []
    handle = system.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().cpu()))
    try:
        yield seen
    finally:
        handle.remove()


@torch.no_grad()
def _predicted(system: System, rows: Tensor) -> Tensor:
    """The classes of rows on the CPU, int64 ``[N]``."""
    parts = [answer(system.model, suited(system.model, part)).argmax(1).cpu() for part in rows.split(16384)]
    found = torch.cat(parts)
    return torch.from_numpy(np.asarray(found.numpy()))
