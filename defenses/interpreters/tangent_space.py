"""Projection of gradients on the tangent space of the training data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import annotated_types as at

from robustexplain.errors import FieldError
from robustexplain.fields import Count
from robustexplain.interpreters import Interpreter, Projected, Reference
from robustexplain.interpreters.composed.base import walk
from robustexplain.interpreters.composed.projected import by_the_input, not_a_gradient
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse
from .calibration import clean_inputs


@DEFENSES.register("tangent-space", paper="Anders et al. 2020, tangent-space projection", needs=("data",))
@dataclass(frozen=True)
class TangentSpace(Defense):
    """Project every gradient of the interpreter on the tangent space of the training data.

    No training: images of the training part are kept with the system, and each explained input's nearest ones span its
    tangent space (:class:`robustexplain.interpreters.Projected`). Made against a manipulation of the *model* that
    leaves its answers on the data as they are. Who uses the system can read these images: leave it where the data are
    private.

    Args:
        neighbours: points that span the tangent space, the input among them; the paper takes 30.
        images: how many images of the data the bank holds, drawn at random; all of them if there are fewer. The paper
            keeps all.
    """

    neighbours: Annotated[int, at.Ge(2)] = 30
    images: Count = 10_000

    layer = "interpreter"
    wraps: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True
    part: ClassVar[Literal["train", "defense"]] = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images < self.neighbours:
            raise FieldError(
                type(self).__name__, "images", f"must be at least neighbours={self.neighbours}, got {self.images!r}"
            )

    @property
    def fewest(self) -> int:
        """As many as there are neighbours."""
        return self.neighbours

    def unfit(self, interpreter: type[Interpreter]) -> str | None:
        """As :meth:`Defense.unfit`: maps that are no gradients by the input."""
        return None if by_the_input(interpreter) else not_a_gradient(interpreter.__name__)

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: a table, whose rows are nearest only in some units."""
        if len(shape) < 3:
            return f"{self.name} looks for the nearest images, and inputs are table rows of {shape[0]} columns"
        return None

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        base = system.interpreter
        refuse(any(isinstance(part, Projected) for part in walk(base)), "the interpreter is projected already")
        bank = Reference(clean_inputs(system, data, self.images, self.seed))
        if system.inputs is not None and bank.x.dim() == 4:
            system.inputs.check(bank.x)
        return replace(system, interpreter=Projected(system.model, base, bank, self.neighbours))
