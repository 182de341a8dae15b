"""Gradients projected on the tangent space of the data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...autograd.hooks import hooks
from ...checks import Kind
from ...errors import FieldError, InputError, UnsupportedModelError
from ...fields import Count
from ...hidden import refuse_hidden
from ...registry import INTERPRETERS
from ..backward_rules.guided import GuidedBackprop, GuidedGradCAM
from ..base import Explanation, wide_dtype
from ..reference import Reference
from .base import Wrapper, in_rows, walk

GUIDED = (GuidedBackprop, GuidedGradCAM)
"""Methods whose gradients are not the model's."""


@INTERPRETERS.register("projected", paper="Anders et al. 2020, tangent-space projection", needs=("bank",))
@dataclass(frozen=True, eq=False)
class Projected(Wrapper):
    """``base`` with every gradient by the input projected on the data's tangent space, before anything else is done.

    ``g`` becomes ``P g``, where ``P`` projects on the span of the differences between the input and its nearest images
    in ``bank`` (Euclidean, in pixels): what a model does off the data leaves no trace in the map. As in the code, the
    projection comes before the product with the input, magnitudes and sums over channels, and the input counts as one
    of the ``neighbours``, so that the span has ``neighbours - 1`` dimensions; its ``d = 30`` singular vectors of 30
    points are all of them, and there is no other cut here. ``P`` has a ridge of 100 roundings of the mean squared
    distance, so that an input that is in the bank gives no division by zero. Methods that integrate or average use the
    tangent space of the input itself at every point.

    The map's derivative is exact for the neighbours of the present input, the dependence of ``P`` on it included; which
    images these are is found anew for each input, and has no derivative.

    Args:
        base: a method made of gradients by the input (gradient, its product with the input, integrated gradients,
            SmoothGrad).
        bank: images of the data, of the size of the inputs: the more, the nearer the span to the tangent space. They
            are saved with the system.
        neighbours: points that span the tangent space, the input among them.

    Raises:
        InputError: more neighbours than images in the bank, or, on the first input, images of another size.
        UnsupportedModelError: a base whose maps are no gradients by the input.
    """

    bank: Reference = field()
    neighbours: Count = 30

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.bank, Reference):
            raise InputError(f"bank must be a Reference of images, got {type(self.bank).__name__}")
        if self.bank.x.dim() != 4:
            shape = list(self.bank.x.shape)
            raise InputError(
                f"bank must hold images [N, C, H, W], got {shape}: a table's columns have units of their own, in which "
                "no row is nearest"
            )
        held = len(self.bank.x)
        if not 2 <= self.neighbours <= held:
            raise FieldError(
                type(self).__name__,
                "neighbours",
                f"must be from 2 to the {held} images in the bank, got {self.neighbours!r}",
            )
        for part in walk(self.base):
            if not part.parts and not by_the_input(part):
                raise UnsupportedModelError(not_a_gradient(type(part).__name__))

    def _check(self, x: Tensor) -> None:
        # Other channels are the model's to refuse.
        if x.shape[2:] != self.bank.x.shape[2:]:
            raise InputError(f"the bank holds images {list(self.bank.x.shape[1:])}, got {list(x.shape[1:])}")

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        # Methods split what is larger into parts that this wrapper would not see.
        size = min((part.batch_size for part in walk(self.base) if hasattr(part, "batch_size")), default=len(x))
        found = [self._of_rows(rows, of, graph) for rows, of in in_rows(x, target, size)]
        if len(found) == 1:
            return found[0]
        return Explanation(torch.cat([f.logits for f in found]), torch.cat([f.maps for f in found]))

    def _of_rows(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        refuse_hidden(self.model, "a projection changes gradients at the model's input")
        projection = _Projection(self.tangents(x if graph else x.detach()))
        with projection.of(self.model):
            found = self.base._explain(x, target, graph)
        projection.finish()
        if not projection.used:
            raise UnsupportedModelError(not_a_gradient(type(self.base).__name__))
        return found

    def tangents(self, x: Tensor) -> Tensor:
        """The differences that span the tangent space, ``[B, neighbours - 1, C H W]``; differentiable in ``x``."""
        rows = x.flatten(1).to(wide_dtype(x))
        with torch.no_grad():
            bank = self.bank.like(x).flatten(1).to(rows.dtype)
            # |x - b|^2 less |x|^2, which all images of the bank share.
            nearest = torch.addmm(bank.square().sum(1), rows, bank.T, alpha=-2).topk(self.neighbours - 1, largest=False)
            chosen = bank[nearest.indices]
        return chosen - rows[:, None]


class _Projection:
    """The projection of gradients while a method explains, and the identity for who differentiates its map.

    Args:
        tangents: ``[b, k, n]``: what spans each row's space.
    """

    def __init__(self, tangents: Tensor) -> None:
        self.tangents, self.used, self._explaining = tangents, False, True
        # Here, where autograd is as the caller wants it: a backward pass without a graph would cut this one's.
        self._gram = _with_ridge(tangents @ tangents.mT)

    def of(self, model: nn.Module) -> AbstractContextManager[None]:
        """Within this block gradients by the model's input are projected."""

        def project(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            return (_Projected.apply(args[0], self), *args[1:])

        return hooks([model], before=project)

    def finish(self) -> None:
        """The method is done: gradients from now on are the adversary's, of the whole space."""
        self._explaining = False

    def __call__(self, gradient: Tensor) -> Tensor:
        """``P g`` of ``[m b, ...]``, rows repeated in order; ``g`` itself when the method is done."""
        if not self._explaining:
            return gradient
        self.used = True
        rows = gradient.reshape(-1, *self.tangents.shape[::2]).movedim(0, 2).to(self.tangents.dtype)
        along = torch.linalg.solve(self._gram, self.tangents @ rows)
        projected: Tensor = self.tangents.mT @ along
        return projected.movedim(2, 0).reshape(gradient.shape).to(gradient.dtype)


def _with_ridge(gram: Tensor) -> Tensor:
    ridge = 100 * torch.finfo(gram.dtype).eps * gram.diagonal(dim1=1, dim2=2).mean(1)
    # Where all neighbours are the input itself there is no direction, and nothing is left of the gradient.
    ridge = torch.where(ridge > 0, ridge, 1)
    return gram + torch.diag_embed(ridge[:, None].expand(-1, gram.shape[1]))


class _Projected(torch.autograd.Function):
    """The identity, with a projected gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.projection = projection
        # A copy: a model may write into its input, which autograd refuses for a view.
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.projection(grads[0]), None


def by_the_input(part: object) -> bool:
    """Whether a method (or its class) gives gradients of the model by its input; guided ones are none of the model."""
    guided = part in GUIDED or type(part) in GUIDED
    return getattr(part, "is_gradient", False) is True and not guided and getattr(part, "layer", None) is None


def not_a_gradient(name: str) -> str:
    """What is said of an interpreter of class ``name`` that gives no gradients by the input."""
    able = ", ".join(e.name for e in INTERPRETERS if by_the_input(e.build))
    return f"a tangent space holds gradients by the input, and {name} gives none; methods that do: {able}"
