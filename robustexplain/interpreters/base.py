"""The contract that every interpreter keeps."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Self

from .. import checks, maps
from ..autograd.layers import full_name
from ..autograd.second_derivatives import named_derivatives, twice_differentiable
from ..autograd.straight_through import straight_maps
from ..checks import Kind, kind_of
from ..door import admit
from ..errors import InputError, UnsupportedModelError
from ..fields import check_fields
from ..registry import INTERPRETERS
from .certificate import Certificate
from .saturation import warn_of_faint_maps
from .scalar import Scalar, ScalarOutput, Target
from .zero_gradient import ZeroGradientCheck

Channels = Literal["max", "abs_sum", "sum"]
"""How the channels of an attribution become one map: largest magnitude, sum of magnitudes, or signed sum.

A table has no channels: ``sum`` leaves the attribution of a column as it is, with its sign, the others give its
magnitude.
"""


class Explanation(NamedTuple):
    """The result of a forward pass: logits ``[B, K]``, maps ``[B, H, W]`` (or on the method's grid; tables ``[B, D]``).

    ``encoder_logits`` ``[B, K]`` are those of a model-guided interpreter's own network, where it has one;
    ``certificate`` is what is proved of the maps, by an interpreter that proves something.
    """

    logits: Tensor
    maps: Tensor
    encoder_logits: Tensor | None = None
    certificate: Certificate | None = None

    def detach(self) -> Explanation:
        """The same values, detached from the graph."""
        return Explanation(*(None if value is None else value.detach() for value in self))  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Interpreter(ABC):
    """An attribution method for a classifier.

    ``interpreter(x, target=None)`` gives raw, signed maps at the input's size: ``[B, H, W]`` for images, one number a
    column, ``[B, D]``, for tables; ``explain`` also gives the logits of the same forward pass. Maps are differentiable
    in ``x`` and in the model's weights whenever autograd is on, and detached under ``torch.no_grad()``. A subclass
    writes ``_explain``, which runs with autograd on.

    Args:
        model: takes ``[B, C, H, W]`` in ``[0, 1]``, or table rows ``[B, D]`` in the data's own units, gives logits
            ``[B, K]``; normalisation is a part of it.
    """

    model: nn.Module

    differentiable: ClassVar[bool] = True
    """Whether maps carry a gradient to ``x`` and to the weights."""
    is_gradient: ClassVar[bool] = False
    """Whether the maps are a gradient: their own derivative is then zero where the model is piecewise linear."""
    unit_range: ClassVar[bool] = False
    """Whether maps lie in ``[0, 1]`` by construction (masks): objectives then use them without rescaling."""
    class_specific: ClassVar[bool] = True
    """Whether maps depend on the explained class; those of attention rollout, for example, do not."""
    iterative: ClassVar[bool] = False
    """Whether the map results from an optimisation whose steps are differentiable: :class:`IterativeInterpreter`."""
    takes: ClassVar[tuple[Kind, ...]] = ("images", "tables")
    """The kinds of input that can be explained: methods that work on a grid of pixels take only images."""
    rounds: ClassVar[bool] = False
    """Whether maps are made of cuts or votes, whose derivative is zero: attacks then go straight through them."""
    explains_scalars: ClassVar[bool] = True
    """Whether it explains a scalar of the model's answer too, not only classes (which CAM's weights belong to)."""
    exact_where_confident: ClassVar[bool] = False
    """Whether a map of a probability keeps its direction where the probability rounds to 0 or 1."""
    keeps_draws: ClassVar[tuple[str, ...]] = ()
    """Names of the cached properties that hold random draws; :meth:`redrawn` clears them."""

    def __post_init__(self) -> None:
        """Check the annotated fields."""
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        check_fields(self)

    def __call__(self, x: Tensor, target: Target | None = None) -> Tensor:
        """Maps ``[B, H, W]`` that explain ``target`` (default: the predicted class) on ``x`` ``[B, C, H, W]``.

        Of table rows ``[B, D]`` the maps are ``[B, D]``.

        Args:
            x: the batch.
            target: as in :meth:`explain`.

        Raises:
            InputError: ``x`` not finite, empty or of a wrong shape, images outside ``[0, 1]``; ``target`` out of range,
                or a function that does not give one finite number an input; a map that is not finite.
            UnsupportedModelError: table rows for a method that works on a grid of pixels; a scalar for a method that
                explains classes only.
        """
        checks.inputs(x)
        return finite(self, self.explain(x, target)).maps

    def explain(self, x: Tensor, target: Target | None = None, *, native: bool = False) -> Explanation:
        """Logits and maps from one forward pass.

        Args:
            x: ``[B, C, H, W]`` in ``[0, 1]``, or ``[B, D]``; its values are checked only by ``__call__``, because
                attacks call this method in a loop.
            target: ``[B]`` classes to explain; default the prediction. Or a function of what the model answers, which
                then may be anything, that gives one number an input, ``[B]``: its value is explained as a logit would
                be, whatever the field ``of`` says. It is called with answers to any number of inputs. In the result
                the number, ``[B, 1]``, stands in place of the logits where the model gives none.
            native: keep the method's own grid (CAM's ``7 x 7``) instead of resizing to the input's size.

        Raises:
            InputError: a part of the model in train mode; an answer that is no finite logits ``[B, K]``.
        """
        check_input_kind(self, x)
        self._check(x)
        if target is not None and not isinstance(target, Tensor):
            return self._explain_scalar(x, target, native)
        if target is not None:
            checks.class_indices(target, x.shape[0], "target")
        with _translated(self, x):
            admit(self.model, x)
        attached = torch.is_grad_enabled()
        twice = twice_differentiable() if attached else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), named_derivatives(), twice, straight_maps():
            x, start_check = usable_by_autograd(x), None
            if attached:
                x, start_check = self._with_zero_gradient_check(x)
            with _translated(self, x):
                explanation = self._explain(x, None if target is None else usable_by_autograd(target), attached)
        self._check_shapes(x, explanation)
        if not native and x.dim() == 4:
            explanation = explanation._replace(maps=maps.resize(explanation.maps, x.shape[-2:]))
        if start_check is not None:
            start_check()
        if getattr(self, "of", None) == "probability" and not self.exact_where_confident:
            warn_of_faint_maps(type(self).__name__, explanation.maps, explanation.logits)
        return explanation if attached else explanation.detach()

    def _check_shapes(self, x: Tensor, found: Explanation) -> None:
        """Refuse what an interpreter of one's own gives for other inputs than these."""
        wanted = "[B, h, w]" if x.dim() == 4 else "[B, D]"
        fits = found.maps.shape == x.shape if x.dim() == 2 else found.maps.dim() == 3 and len(found.maps) == len(x)
        if not fits:
            raise InputError(
                f"maps of {type(self).__name__} must have shape {wanted} for x of shape {list(x.shape)}, got "
                f"{list(found.maps.shape)}"
            )
        if found.logits.dim() != 2 or len(found.logits) != len(x):
            raise InputError(
                f"logits of {type(self).__name__} must have shape [B, K] for x of shape {list(x.shape)}, got "
                f"{list(found.logits.shape)}"
            )

    def _check(self, x: Tensor) -> None:  # noqa: B027
        """Refuse inputs that do not fit the interpreter's own settings, before the model sees them."""

    def _explain_scalar(self, x: Tensor, scalar: Scalar, native: bool) -> Explanation:
        if not callable(scalar):
            raise InputError(
                "target must be an integer tensor of class indices, or a function of the model's answer, got "
                f"{type(scalar).__name__}"
            )
        twin = ScalarOutput(self.model, scalar, self.differentiable)
        first = torch.zeros(len(x), dtype=torch.long, device=x.device)
        found = self.on_scalar(twin).explain(x, first, native=native)
        return found._replace(logits=found.logits[:, 1:])

    @property
    def parts(self) -> tuple[Interpreter, ...]:
        """The interpreters that this one is made of."""
        return tuple(part for parts in self._parts().values() for part in parts)

    @property
    def random(self) -> bool:
        """Whether it, or one of its parts, uses random draws (SmoothGrad's noise, RISE's masks)."""
        return any(f.name == "seed" for f in fields(self)) or any(part.random for part in self.parts)

    @property
    def averaged(self) -> int:
        """Of how many random draws each map is made, at least; the more, the fewer an adversary needs of his own."""
        return 1

    def redrawn(self, seed: int) -> Self:
        """A copy with other random draws; the interpreter itself where nothing is random."""
        if not self.random:
            return self
        changes: dict[str, object] = {"seed": seed} if any(f.name == "seed" for f in fields(self)) else {}
        redrawn = self._copied(changes | self._change_parts(lambda part: part.redrawn(seed)))
        for name in self.keeps_draws:
            redrawn.__dict__.pop(name, None)
        return redrawn

    def on_model(self, model: nn.Module) -> Self:
        """A copy that explains another model of the same architecture; so do its parts."""
        return replace(self, model=model, **self._change_parts(lambda part: part.on_model(model)))

    def on_scalar(self, twin: ScalarOutput) -> Self:
        """A copy that explains a scalar of the model's answer: class 0 of ``twin``, by its logit; so do its parts.

        Raises:
            UnsupportedModelError: it explains classes only; lists what explains scalars too.
        """
        if not self.explains_scalars:
            suitable = ", ".join(e.name for e in INTERPRETERS if getattr(e.build, "explains_scalars", True))
            raise UnsupportedModelError(
                f"{type(self).__name__} explains classes, and target is a function: scalars are explained by {suitable}"
            )
        changes: dict[str, Any] = {"of": "logit"} if any(f.name == "of" for f in fields(self)) else {}
        layer: object = getattr(self, "layer", None)
        if isinstance(layer, str):
            changes["layer"] = f"{twin.layers_inside}.{full_name(self.model, layer)}"
        return replace(self, model=twin, **changes, **self._change_parts(lambda part: part.on_scalar(twin)))

    def with_shared_weights(self, model: nn.Module) -> Self:
        """A copy that explains a copy of the model with the same layers; what it has cached about them is kept."""
        return self._copied({"model": model, **self._change_parts(lambda part: part.with_shared_weights(model))})

    def described(self) -> list[object]:
        """Class and plain settings, and the same of its parts; networks and tensors are left out."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {k: v for k, v in settings.items() if v is None or isinstance(v, (bool, int, float, str))}
        return [type(self).__name__, plain, [part.described() for part in self.parts]]

    def lay_out(self, goal_map: Tensor, x: Tensor) -> Tensor:
        """A goal map ``[B, H, W]`` for ``x`` in the layout of this interpreter's maps; unchanged by default."""
        return goal_map

    def _parts(self) -> dict[str, tuple[Interpreter, ...]]:
        """The interpreters that it is made of, by field."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: value if isinstance(value, tuple) else (value,) for name, value in values.items()}
        return {n: p for n, p in parts.items() if p and all(isinstance(part, Interpreter) for part in p)}

    def _change_parts(self, change: Callable[[Interpreter], Interpreter]) -> dict[str, object]:
        """The fields that hold parts, with every part changed."""
        changed = {name: tuple(map(change, parts)) for name, parts in self._parts().items()}
        return {n: parts if isinstance(getattr(self, n), tuple) else parts[0] for n, parts in changed.items()}

    def _copied(self, changes: dict[str, object]) -> Self:
        # Unlike dataclasses.replace, this keeps cached properties, such as the feature layer that was found.
        copied = copy.copy(self)
        for name, value in changes.items():
            object.__setattr__(copied, name, value)
        return copied

    def _with_zero_gradient_check(self, x: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
        """``x`` with a hook that warns of a zero map gradient, and a function that starts the check, if one is due."""
        if not self.is_gradient or not x.requires_grad or not self._zero_gradient_check.needed:
            return x, None
        return self._zero_gradient_check.watch(x)

    @cached_property
    def _zero_gradient_check(self) -> ZeroGradientCheck:
        return ZeroGradientCheck(type(self).__name__)

    @abstractmethod
    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        """Logits and maps on the method's own grid; autograd is on.

        ``graph``: whether the caller differentiates the maps; pass it on as ``create_graph``.
        """


def finite(interpreter: Interpreter, found: Explanation) -> Explanation:
    """An explanation whose maps are finite; looked at where a map is handed out, not in the steps of a search.

    Raises:
        InputError: a map holds NaN or infinity.
    """
    bad = checks.not_finite(found.maps)
    if bad:
        name = type(interpreter).__name__
        raise InputError(
            f"{bad} of {len(found.maps)} maps of {name} hold NaN or infinity, although the logits of this "
            f"{type(interpreter.model).__name__} are finite: does its gradient divide by zero (the root or the norm of "
            "zero), or overflow in half precision?"
        )
    return found


@contextmanager
def _translated(interpreter: Interpreter, x: Tensor) -> Iterator[None]:
    """Within this block the model's errors about a dtype or a shape of ``x`` are those of the input."""
    try:
        with checks.one_dtype(x, interpreter):
            yield
    except AssertionError as error:
        # timm's and torchvision's transformers refuse an image of another size by an assertion.
        name = type(interpreter.model).__name__
        raise InputError(f"{name} refuses x of shape {list(x.shape)}: {error}") from error


def check_input_kind(interpreter: Interpreter, x: Tensor) -> None:
    """Refuse table rows for a method that works on a grid of pixels, and images for one that explains columns.

    Raises:
        UnsupportedModelError: with the names of the methods that take such inputs.
    """
    kind = kind_of(x)
    if kind in interpreter.takes or x.dim() not in (2, 4):
        return
    shape, name = list(x.shape), type(interpreter).__name__
    problem = (
        f"{name} looks at a grid of pixels, and these are table rows [B, D] of shape {shape}"
        if kind == "tables"
        else f"{name} explains the columns of table rows [B, D], and these are images of shape {shape}"
    )
    suitable = ", ".join(e.name for e in INTERPRETERS if kind in accepted_kinds(e.build))
    raise UnsupportedModelError(f"{problem}; interpreters of {kind}: {suitable}")


def accepted_kinds(build: object) -> tuple[Kind, ...]:
    """The kinds of input that an interpreter's class takes; both, where that depends on its parts."""
    kinds: object = getattr(build, "takes", None)
    return kinds if isinstance(kinds, tuple) else ("images", "tables")


def usable_by_autograd(value: Tensor) -> Tensor:
    """The tensor, or a copy of one made under inference_mode, which autograd cannot record."""
    # What is no tensor is refused by name further on.
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


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
    """``[B, C, H, W]`` to maps ``[B, H, W]``; table columns ``[B, D]`` to magnitudes, or unchanged for ``sum``."""
    if values.dim() == 2:
        return values if how == "sum" else values.abs()
    if how == "sum":
        return values.sum(1)
    return values.abs().sum(1) if how == "abs_sum" else values.abs().amax(1)


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype of ``x``, or float32 for half precision, in which sums, squares and products are too inaccurate."""
    return torch.promote_types(x.dtype, torch.float32)


def narrowed(maps: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Maps ``[B, ...]`` in the dtype of the input.

    Raises:
        InputError: a map of which nothing is left there.
    """
    found = maps.to(dtype)
    if dtype == maps.dtype:
        return found
    gone = (maps.detach().flatten(1) != 0).any(1) & ~(found.detach().flatten(1) != 0).any(1)
    if bool(gone.any()):
        largest = float(maps.detach()[gone].abs().max())
        raise InputError(
            f"{int(gone.sum())} of {len(maps)} maps of {name} hold nothing above {largest:.1e}, which is 0 in {dtype}; "
            "explain in bfloat16 or float32"
        )
    return found


def requiring_grad(x: Tensor) -> Tensor:
    """``x`` if it requires grad, otherwise a leaf of the same values that does.

    A model's weights may all be frozen: then there is no graph to differentiate unless the input requires grad.
    """
    return x if x.requires_grad else x.detach().requires_grad_()


def explain_together(
    members: Sequence[Interpreter], x: Tensor, target: Tensor | None, graph: bool
) -> tuple[list[Tensor], Explanation]:
    """Each member's maps on its own grid, and one explanation with the logits and, if any, the encoder logits.

    All members explain the same class: ``target``, or the prediction of the first.
    """
    explanations: list[Explanation] = []
    for member in members:
        check_input_kind(member, x)
        explanations.append(member._explain(x, target, graph))
        target = explanations[-1].logits.detach().argmax(1) if target is None else target
    encoder_logits = [e.encoder_logits for e in explanations if e.encoder_logits is not None]
    maps = [e.maps for e in explanations]
    return maps, Explanation(explanations[0].logits, maps[0], encoder_logits[0] if encoder_logits else None)
