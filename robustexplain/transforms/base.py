"""The contract of transforms, and how they are made by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from ..autograd.straight_through import straight_through
from ..errors import FieldError, InputError
from ..registry import PARTS, TRANSFORMS, Entry


class _Spec(NamedTuple):
    """How storage rebuilds a transform: from its name, without code."""

    name: str
    options: dict[str, str]


class Transform(nn.Module):
    """A map of images ``[B, C, H, W]`` in ``[0, 1]`` to images of the same shape and range; samples are kept apart.

    A subclass is registered in ``TRANSFORMS``; the numbers in a name are the arguments of its ``__init__``, in order.
    One that takes none goes by its registered name.

    Args:
        name: as :func:`transform` takes it: it says everything.
    """

    form: ClassVar[str] = ""
    """How a name is written, such as ``median-SIZE``."""
    random: ClassVar[bool] = False
    """Whether it uses random draws, which :meth:`redrawn` changes."""
    rounds: ClassVar[bool] = False
    """Whether it rounds, so that its derivative is zero."""
    moves: ClassVar[bool] = False
    """Whether it moves pixels, so that a map of its output lies elsewhere than one of its input: :meth:`taken_back`."""

    stands_in_front: ClassVar[bool] = True
    """Its outputs are images, not features of a network."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.spec = _Spec("transform", {"name": name})
        self.eval()

    def straight(self, x: Tensor) -> Tensor:
        """The same value as :meth:`forward`, with the gradient that an adversary follows.

        Straight through rounding (Athalye et al. 2018); that of the transform itself elsewhere.
        """
        with straight_through():
            transformed: Tensor = self(x)
        return transformed

    def taken_back(self, maps: Tensor, x: Tensor) -> Tensor:
        """Maps ``[B, H, W]`` of the transformed images of ``x``, in the coordinates of ``x``."""
        return maps

    def redrawn(self, seed: int) -> Transform:
        """The transform with other random draws; itself where nothing is random."""
        return self


@PARTS.register("transform")
def transform(name: str) -> Transform:
    """A transform by its name, such as ``jpeg-75`` or ``median-2``.

    Raises:
        InputError: no such name, or a number that the transform refuses.
    """
    for entry in sorted(TRANSFORMS, key=lambda e: len(e.name), reverse=True):
        if name == entry.name or name.startswith(f"{entry.name}-"):
            return _made(entry, name)
    raise _unknown(name)


def transforms(names: Sequence[str]) -> tuple[Transform, ...]:
    """Several of them, in order.

    Raises:
        InputError: none, or one twice.
    """
    if isinstance(names, str) or not names or len(set(names)) != len(names):
        raise InputError(f"transforms must be a list of different names, got {names!r}")
    return tuple(map(transform, names))


def within(component: str, field: str, value: int, low: int, high: int) -> None:
    """Refuse values other than whole numbers from ``low`` to ``high``.

    Raises:
        FieldError: with the value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(component, field, f"must be a whole number from {low} to {high}, got {value!r}")


def _made(entry: Entry, name: str) -> Transform:
    parts = name[len(entry.name) + 1 :].split("-") if name != entry.name else []
    try:
        numbers = [int(part) if part.isdigit() else float(part) for part in parts]
    except ValueError:
        raise _unknown(name) from None
    parameters = list(inspect.signature(entry.build).parameters)
    # A seed may be left out: it is 0 then.
    if len(numbers) not in (len(parameters), len(parameters) - parameters.count("seed")):
        raise _unknown(name)
    made: Transform = entry.build(*numbers)
    if made.name != name and transform_prefix(made.name) != entry.name:
        raise InputError(
            f"the transform {name!r} calls itself {made.name!r}, by which nothing could rebuild it: its __init__ "
            f"must hand {entry.name!r} and its numbers to super().__init__"
        )
    return made


def transform_prefix(name: str) -> str:
    """The registered name that a transform's name begins with; empty where there is none."""
    known = [entry.name for entry in TRANSFORMS if name == entry.name or name.startswith(f"{entry.name}-")]
    return max(known, key=len, default="")


def _unknown(name: str) -> InputError:
    forms = ", ".join(getattr(entry.build, "form", "") or entry.name for entry in TRANSFORMS)
    return InputError(f"unknown transform {name!r}; expected one of {forms}, such as 'bit-depth-3' or 'jpeg-75'")
