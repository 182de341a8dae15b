"""Which weights a training changes, and how fast each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..autograd.layers import names_inside, submodule
from ..errors import FieldError, UnknownNameError
from .modes import frozen
from .settings import Training


def resting(module: nn.Module, settings: Training) -> list[nn.Module]:
    """The modules that ``settings.freeze`` names.

    Raises:
        UnknownNameError: a name that there is not, with the nearest ones.
    """
    return [submodule(module, name) for name in settings.freeze]


@contextmanager
def at_rest(parts: list[nn.Module]) -> Iterator[None]:
    """No parameter of ``parts`` requires grad for the length of a block; each flag is restored afterwards."""
    with ExitStack() as stack:
        for part in parts:
            stack.enter_context(frozen(part))
        yield


def groups(module: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """The parameters that are trained, in groups for an optimiser, one for each ``factor`` of the learning rate.

    Raises:
        UnknownNameError: a name in ``settings.lr_factors`` under which no parameter stands.
        FieldError: one under which nothing is trained.
    """
    still = {id(p) for part in resting(module, settings) for p in part.parameters()}
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) not in still}
    factors = {_prefix(module, name): factor for name, factor in settings.factors.items()}
    found: dict[float, list[nn.Parameter]] = {}
    used: set[str | None] = set()
    for name, parameter in trained.items():
        prefix = max((p for p in factors if _under(name, p)), key=len, default=None)
        used.add(prefix)
        found.setdefault(1.0 if prefix is None else factors[prefix], []).append(parameter)
    if idle := [prefix for prefix in factors if prefix not in used]:
        raise FieldError("Training", "lr_factors", f"has no effect on {idle[0]!r}: nothing under it is trained")
    return [{"params": parameters, "factor": factor} for factor, parameters in found.items()]


def _prefix(module: nn.Module, name: str) -> str:
    """The name in full: layers of a network inside of another module are called as in that network."""
    names = [own for own, _ in module.named_parameters()]
    for full in names_inside(module, name):
        if any(_under(own, full) for own in names):
            return full
    known = {own.rsplit(".", cut)[0] for own in names for cut in range(own.count(".") + 1)}
    raise UnknownNameError("layer", name, known)


def _under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")
