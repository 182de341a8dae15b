"""Another interpreter in place of the system's."""

from __future__ import annotations

from dataclasses import dataclass, replace

from robustexplain.errors import FieldError
from robustexplain.interpreters import Composed, InterpreterSpec
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, applied, refuse


@DEFENSES.register("replaced", paper="Lim et al. 2021 (RelEx); any interpreter")
@dataclass(frozen=True)
class Replaced(Defense):
    """Explain by another method, one that is claimed to be harder to deceive: RelEx, by default.

    An oblivious adversary crafts inputs for the method that was replaced, which is how such methods are usually tested.

    Args:
        by: an interpreter by name, or with settings of its own (``{name: relex, samples: 10}``); it must need only the
            model.
    """

    by: InterpreterSpec | str = "relex"

    layer = "interpreter"

    def __post_init__(self) -> None:
        super().__post_init__()
        spec = InterpreterSpec.of(self.by)
        object.__setattr__(self, "by", spec)
        if spec.refusal is not None:
            raise FieldError(type(self).__name__, "by", f"must need only the model: {spec.refusal}")

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        hardened = [name for name, cls in applied(system).items() if cls.layer == "interpreter"]
        refuse(
            bool(hardened) or isinstance(system.interpreter, Composed),
            f"another interpreter would undo what hardened this one ({', '.join(hardened) or 'it is composed'}): apply "
            "'replaced' first",
        )
        return replace(system, interpreter=InterpreterSpec.of(self.by).build(system.model))
