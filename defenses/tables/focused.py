"""Focused sampling: LIME and KernelSHAP ask about rows of a generator that was fitted to the data."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from robustexplain.interpreters import LIMETabular, RowGenerating, SHAPTabular
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import TrainedDefense, refuse


@DEFENSES.register(
    "focused-sampling", paper="Vres and Robnik-Sikonja 2022 and code (gLIME, gSHAP)", needs=("tables", "data")
)
@dataclass(frozen=True)
class FocusedSampling(TrainedDefense):
    """Let the explainer of a table ask about rows that a generator fitted to the data makes, not independent columns.

    LIME regresses on the generator's rows near the explained one; KernelSHAP takes the values of left-out columns from
    them. A scaffold that knows the packages' own rows takes these for real ones; one that was trained on such a
    generator's rows need not. The background that the interpreter holds no longer counts, whoever chose it. With
    ``kind: neighbours`` nothing is made up: LIME asks about real rows, and KernelSHAP's values are conditional. Who has
    the system has these rows; of ``mcd-vae`` only the network.

    Departures: columns of one category stay columns of their own in KernelSHAP; which columns hold whole numbers or
    categories is read off the data.

    Args:
        generator: which rows, and how they are made.
    """

    generator: RowGenerating = field(default_factory=RowGenerating)

    layer: ClassVar[Literal["model", "input", "interpreter", "detector"]] = "interpreter"
    defends: ClassVar[tuple[str, ...]] = ("lime-tabular", "shap-tabular")
    part: ClassVar[Literal["train", "defense"]] = "train"

    @property
    def fewest(self) -> int:
        """As many as the generator needs."""
        return self.generator.fewest

    def _train(self, system: System, data: Samples, session: Session) -> System:
        interpreter, name = system.interpreter, type(system.interpreter).__name__
        refuse(
            not isinstance(interpreter, (LIMETabular, SHAPTabular)),
            f"focused-sampling makes the rows of lime-tabular and shap-tabular, and {name} is none of them",
        )
        assert isinstance(interpreter, (LIMETabular, SHAPTabular))  # for the type checker
        refuse(interpreter.generator is not None, f"the rows of {name} come from a generator already")
        return replace(
            system, interpreter=replace(interpreter, generator=self.generator.fitted(data, self.seed, session))
        )
