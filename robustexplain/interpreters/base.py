"""The contract that every interpreter keeps."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import Self

from .. import checks, maps
from ..autograd.fixed_weights import fixed_weights
from ..autograd.straight_through import straight_maps
from ..checks import Kind, kind_of
from ..errors import InputError, UnsupportedModelError
from ..fields import check_fields
from ..registry import INTERPRETERS
from .zero_gradient import ZeroGradientCheck

Channels = Literal["max", "abs_sum", "sum"]
"""How the channels of an attribution become one map: largest magnitude, sum of magnitudes, or signed sum.

A table has no channels: ``sum`` leaves the attribution of a column as it is, with its sign, the others give its
magnitude.
"""


class Explanation(NamedTuple):
    """One forward pass's yield: logits ``[B, K]`` and maps ``[B, H, W]`` (or the method's own grid; tables ``[B, D]``).

    ``encoder_logits`` ``[B, K]`` are those of a model-guided interpreter's own network, where it has one.
    """

    logits: Tensor
    maps: Tensor
    encoder_logits: Tensor | None = None

    def detach(self) -> Explanation:
        """The same, cut from the graph."""
        return Explanation(*(None if value is None else value.detach() for value in self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Interpreter(ABC):
    """A classifier's attribution method.

    ``interpreter(x, target=None)`` gives raw, signed maps at the input's size: ``[B, H, W]`` for images, one number a
    column, ``[B, D]``, for tables; ``explain`` gives the logits of the same forward pass too. Maps are differentiable
    in ``x`` and in the model's weights whenever autograd is on, and detached under ``torch.no_grad()``. A subclass
    writes ``_explain``, which runs with autograd on.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, or table rows ``[B, D]`` in the data's own units, gives logits
            ``[B, K]``; normalisation lives inside it.
    """

    model: nn.Module

    differentiable: ClassVar[bool] = True
    """Whether maps carry a gradient to ``x`` and to the weights."""
    is_gradient: ClassVar[bool] = False
    """Whether the maps are themselves a gradient: their derivative vanishes where the model is piecewise linear."""
    unit_range: ClassVar[bool] = False
    """Whether maps lie in ``[0, 1]`` by construction (masks): objectives then take them as they are."""
    class_specific: ClassVar[bool] = True
    """Whether maps depend on the class explained; attention rollout, for one, shows the same map for every class."""
    iterative: ClassVar[bool] = False
    """Whether the map is the end of an optimisation whose steps are differentiable: :class:`IterativeInterpreter`."""
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")
    """What can be explained: methods that look at a grid of pixels take only images."""
    keeps_draws: ClassVar[tuple[str, ...]] = ()
    """Names of the cached properties that hold what was drawn: :meth:`redrawn` forgets them."""

    def __post_init__(self) -> None:
        """Check the annotated fields."""
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        check_fields(self)

    def __call__(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """Maps ``[B, H, W]`` that explain class ``target`` (default: the prediction) on ``x`` ``[B, C, H, W]``.

        Of table rows ``[B, D]`` the maps are ``[B, D]``.

        Raises:
            InputError: ``x`` not finite, empty or of a wrong shape, images outside ``[0, 1]``; ``target`` out of range.
            UnsupportedModelError: table rows for a method that looks at a grid of pixels.
        """
        checks.inputs(x)
        checks.evaluating(self.model)
        return self.explain(x, target).maps

    def explain(self, x: Tensor, target: Tensor | None = None, *, native: bool = False) -> Explanation:
        """Logits and maps from one forward pass.

        Args:
            x: ``[B, C, H, W]`` in ``[0, 1]``, or ``[B, D]``; its values are checked by ``__call__``, not here, where
                attacks loop.
            target: ``[B]`` classes to explain; default the prediction.
            native: keep the method's own grid (CAM's ``7 x 7``) instead of resizing to the input's size.
        """
        refuse_kind(self, x)
        if target is not None:
            checks.class_indices(target, x.shape[0], "target")
        if self.model.training:
            raise InputError("the model is in train mode, where batch norm mixes samples; call model.eval() first")
        attached = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.enable_grad(), _twice_differentiable(attached), straight_maps():
            x, start = self._gradient_checked(_recordable(x)) if attached else (_recordable(x), None)
            try:
                found = self._explain(x, None if target is None else _recordable(target), attached)
            except AssertionError as error:
                # How timm's and torchvision's transformers refuse an image of another size.
                raise InputError(f"{type(self.model).__name__} refuses x of shape {list(x.shape)}: {error}") from error
        if not native and x.dim() == 4:
            found = found._replace(maps=maps.resize(found.maps, x.shape[-2:]))
        if start is not None:
            start()
        return found if attached else found.detach()

    @property
    def parts(self) -> tuple[Interpreter, ...]:
        """The interpreters that this one is made of."""
        return tuple(part for parts in self._parts().values() for part in parts)

    @property
    def random(self) -> bool:
        """Whether it, or one that it is made of, draws (SmoothGrad's noise, RISE's masks)."""
        return any(f.name == "seed" for f in fields(self)) or any(part.random for part in self.parts)

    def redrawn(self, seed: int) -> Self:
        """The same with other draws; itself, where nothing is random."""
        if not self.random:
            return self
        changes: dict[str, object] = {"seed": seed} if any(f.name == "seed" for f in fields(self)) else {}
        made = self._copied(changes | self._each_part(lambda part: part.redrawn(seed)))
        for name in self.keeps_draws:
            made.__dict__.pop(name, None)
        return made

    def on_model(self, model: nn.Module) -> Self:
        """The same, and those that it is made of, explaining another model of the same architecture."""
        return replace(self, model=model, **self._each_part(lambda part: part.on_model(model)))

    def with_shared_weights(self, model: nn.Module) -> Self:
        """The same on a copy of its model that shares its layers: what was found out about them is kept."""
        return self._copied({"model": model, **self._each_part(lambda part: part.with_shared_weights(model))})

    def described(self) -> list[object]:
        """What it is but for its networks and tensors: class, settings, and the same of those it is made of."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v for k, v in settings.items() if v is None or isinstance(v, (bool, int, float, str))}
        return [type(self).__name__, plain, [part.described() for part in self.parts]]

    def lay_out(self, goal_map: Tensor, x: Tensor) -> Tensor:
        """A goal map ``[B, H, W]`` for ``x`` as this interpreter lays its maps out: as it is, for a single one."""
        return goal_map

    def _parts(self) -> dict[str, tuple[Interpreter, ...]]:
        """The interpreters that it is made of, by field."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: value if isinstance(value, tuple) else (value,) for name, value in found.items()}
        return {n: p for n, p in parts.items() if p and all(isinstance(part, Interpreter) for part in p)}

    def _each_part(self, change: Callable[[Interpreter], Interpreter]) -> dict[str, object]:
        changed = {name: tuple(map(change, parts)) for name, parts in self._parts().items()}
        return {n: parts if isinstance(getattr(self, n), tuple) else parts[0] for n, parts in changed.items()}

    def _copied(self, changes: dict[str, object]) -> Self:
        # A copy keeps what was found out about the model (its feature layer), which a new one would look for again.
        made = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(made, name, value)
        return made

    def _gradient_checked(self, x: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
        # A gradient map on rectifiers has no derivative; nobody would notice (see zero_gradient.py).
        if not self.is_gradient or not x.requires_grad or not self._zero_gradient_check.needed:
            return x, None
        return self._zero_gradient_check.over(x)

    @cached_property
    def _zero_gradient_check(self) -> ZeroGradientCheck:
        return ZeroGradientCheck(type(self).__name__)

    @abstractmethod
    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        """Logits and maps on the method's own grid; autograd is on.

        ``graph`` says whether the caller differentiates the maps: pass it on as ``create_graph``.
        """


def refuse_kind(interpreter: Interpreter, x: Tensor) -> None:
    """Refuse table rows for a method that looks at a grid of pixels, and images for one that asks about columns.

    Raises:
        UnsupportedModelError: naming the methods that take such inputs.
    """
    kind = kind_of(x)
    if kind in interpreter.takes or x.dim() not in (2, 4):
        return
    shown, name = list(x.shape), type(interpreter).__name__
    said = (
        f"{name} looks at a grid of pixels, and these are table rows [B, D] of shape {shown}"
        if kind == "tables"
        else f"{name} explains the columns of table rows [B, D], and these are images of shape {shown}"
    )
    able = ", ".join(e.name for e in INTERPRETERS if kind in taken(e.build))
    raise UnsupportedModelError(f"{said}; interpreters of {kind}: {able}")


def taken(build: object) -> tuple[Kind, ...]:
    """What an interpreter's class takes; both kinds, where that depends on its parts."""
    found: object = getattr(build, "takes", None)
    return found if isinstance(found, tuple) else ("images", "tables")


@contextmanager
def _twice_differentiable(attached: bool) -> Iterator[None]:
    if not attached:
        yield
        return
    # The fused kernels of attention have no second derivative; the plain one is made of operations that have.
    with sdpa_kernel(SDPBackend.MATH), fixed_weights():
        yield


def _recordable(value: Tensor) -> Tensor:
    # Autograd cannot record a tensor that was made under inference_mode; a copy made outside of it is an ordinary one.
    return value.clone() if value.is_inference() else value


def explained_class(logits: Tensor, target: Tensor | None) -> Tensor:
    """The class to explain: ``target``, checked against the logits, or the prediction."""
    if target is None:
        return logits.argmax(1)
    target = target.to(logits.device)
    checks.classes(target, logits.shape[0], logits.shape[1], "target")
    return target


def pick(values: Tensor, classes: Tensor) -> Tensor:
    """``values[i, classes[i]]``: ``[B, K]`` and ``[B]`` to ``[B]``."""
    return values.gather(1, classes[:, None]).squeeze(1)


def reduce_channels(values: Tensor, how: Channels) -> Tensor:
    """``[B, C, H, W]`` to maps ``[B, H, W]``; a table's columns, ``[B, D]``, stay, as magnitudes unless ``sum``."""
    if values.dim() == 2:
        return values if how == "sum" else values.abs()
    if how == "sum":
        return values.sum(1)
    return values.abs().sum(1) if how == "abs_sum" else values.abs().amax(1)


def differentiable(x: Tensor) -> Tensor:
    """``x`` itself if it requires grad, or else a leaf of the same values that does.

    Without one there is no graph to differentiate: a model's weights may all be frozen.
    """
    return x if x.requires_grad else x.detach().requires_grad_()


def explain_together(
    members: Sequence[Interpreter], x: Tensor, target: Tensor | None, graph: bool
) -> tuple[list[Tensor], Explanation]:
    """Each member's map on its own grid, and what they share: logits, and encoder logits where a member has some.

    All of them explain one class, also where a member would go by a prediction of its own.
    """
    found: list[Explanation] = []
    for member in members:
        refuse_kind(member, x)
        found.append(member._explain(x, target, graph))
        target = found[-1].logits.detach().argmax(1) if target is None else target
    encoders = [part.encoder_logits for part in found if part.encoder_logits is not None]
    maps = [part.maps for part in found]
    return maps, Explanation(found[0].logits, maps[0], encoders[0] if encoders else None)
