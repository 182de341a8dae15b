"""Interpreters that come with a certificate: votes, averages and order statistics over noisy copies."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from robustexplain.errors import InputError
from robustexplain.interpreters import Certified, MeTFA, Sparsified, Wrapper
from robustexplain.interpreters.composed.base import walk
from robustexplain.interpreters.composed.certified import CertifiedSettings
from robustexplain.interpreters.composed.metfa import MeTFASettings
from robustexplain.interpreters.composed.sparsified import SparsifiedSettings
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session

from ..base import Defense, refuse


@dataclass(frozen=True)
class CopiesDefense(Defense):
    """Explains by noisy copies: around the system's own interpreter, once, with its own settings."""

    layer = "interpreter"
    wraps: ClassVar[bool] = True
    explains_by: ClassVar[type[Wrapper]]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_draws()

    @abstractmethod
    def check_draws(self, size: tuple[int, ...] | None = None) -> None:
        """Refuse too few draws on images of ``size``."""

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: a table, too few draws for images of this size, a grid that does not fit them."""
        if len(shape) < 3:
            return f"{self.name} adds noise to images, and inputs are table rows of {shape[0]} columns"
        try:
            self.check_draws(shape[-2:])
        except InputError as error:
            return str(error)
        return None

    def _defend(self, system: System, data: Samples | None, session: Session) -> System:
        around = [type(part).__name__ for part in walk(system.interpreter) if isinstance(part, OVER_COPIES)]
        refuse(bool(around), f"the interpreter is made of noisy copies already: {''.join(around[:1])}")
        why = self.misfit(tuple(data[0][0].shape)) if data is not None and len(data) else None
        if why is not None:
            raise InputError(why)
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(system, interpreter=self.explains_by(system.model, system.interpreter, **settings))


OVER_COPIES = (Certified, Sparsified, MeTFA)
"""Interpreters that would cost the product of their copies inside one another."""


@DEFENSES.register("certified", paper="Anani et al. 2025")
@dataclass(frozen=True)
class CertifiedInterpreter(CertifiedSettings, CopiesDefense):
    """Explain by the share of noisy copies that find a cell important, certified cell by cell within an L2 radius.

    Any interpreter of images; no training. An explanation costs ``samples`` of the interpreter's and one forward pass.
    Settings as :class:`~robustexplain.interpreters.composed.certified.CertifiedSettings`.

    Examples:
        >>> import torch
        >>> import robustexplain as rx
        >>> from robustexplain import defenses, interpreters, models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> system = rx.System(model, interpreters.GradCAM(model))
        >>> hardened = defenses.CertifiedInterpreter(samples=60, grid=8)(system)
        >>> hardened(torch.rand(2, 1, 32, 32)).certificate.decided.shape
        torch.Size([2, 8, 8])
    """

    explains_by: ClassVar[type[Wrapper]] = Certified


@DEFENSES.register("sparsified-smoothgrad", paper="Levine et al. 2019")
@dataclass(frozen=True)
class SparsifiedSmoothGrad(SparsifiedSettings, CopiesDefense):
    """Explain by the mean of noisy copies' maps cut to 0 and 1; how much of its top stays is certified in L2.

    Around a gradient of the logit it is Sparsified SmoothGrad; any interpreter of images will do. No training. An
    explanation costs ``samples`` of the interpreter's and one forward pass.
    Settings as :class:`~robustexplain.interpreters.composed.sparsified.SparsifiedSettings`.
    """

    explains_by: ClassVar[type[Wrapper]] = Sparsified


@DEFENSES.register("metfa", paper="Gan et al. 2022")
@dataclass(frozen=True)
class MeTFADefense(MeTFASettings, CopiesDefense):
    """Explain by a trimmed mean of noisy copies' maps, or by which pixels are significantly important among them.

    Any interpreter of images; no training. An explanation costs ``samples`` of the interpreter's and one forward pass.
    Settings as :class:`~robustexplain.interpreters.composed.metfa.MeTFASettings`.
    """

    explains_by: ClassVar[type[Wrapper]] = MeTFA
