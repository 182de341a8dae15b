"""Influence functions: how each training image changes the loss of a prediction."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import checks
from ...autograd import layers
from ...autograd.second_derivatives import named_derivatives, twice_differentiable
from ...door import admit
from ...errors import InputError
from ...fields import Count, NonNegative, Positive, check_fields
from ...hidden import refuse_hidden
from ..base import explained_class
from ..reference import Reference
from .hessian import (
    Logits,
    MatrixProduct,
    Solve,
    conjugate_gradients,
    directional,
    features,
    flat,
    last_linear,
    linear,
    lissa,
    whole,
)


class Influential(NamedTuple):
    """The most influential training images of each input: scores and indices in the reference, ``[B, k]`` each."""

    scores: Tensor
    indices: Tensor


class _TrainedPart(NamedTuple):
    """The trained part of the model as a function of a flat vector of parameters, and its training set."""

    logits: Logits
    weights: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence of training images on the loss of an input (Koh and Liang 2017, eq. 2); gives no map: no interpreter.

    ``score_bi = grad L(x_b)^T (H + damping)^-1 grad L(z_i)``, ``H`` the Hessian of the mean training loss: leaving
    ``z_i`` out of the ``N`` training images changes the loss of ``x_b`` by ``score_bi / N``. An image with a positive
    score lowers the loss; the score is Koh and Liang's ``I_up,loss`` with the opposite sign.

    Args:
        model: the classifier, trained to convergence; the formula holds at a minimum.
        reference: the training images and their labels.
        parameters: ``head`` (the last linear layer, all before it fixed: convex and fast) or ``all``.
        curvature: ``gauss_newton`` (positive semi-definite for every network; for the head it *is* the Hessian) or
            ``hessian``, which needs ``damping`` above its most negative eigenvalue.
        damping: added to the diagonal; include the weight decay of the training (``weight_decay / 2 |w|^2`` in the
            loss is a damping of ``weight_decay``).
        solver: ``cg`` (conjugate gradients), or ``lissa`` (the damped Neumann series of Agarwal et al. 2017, over the
            whole training set, without its sampling noise), which needs ``scale`` above the largest eigenvalue.
        iterations: the solver's largest number of iterations.
        tolerance: relative residual at which the solver stops.
        scale: of ``lissa``.
        batch_size: training images in a pass.

    Raises:
        InputError: a reference without labels; a solver that does not converge or meets negative curvature.
    """

    model: nn.Module
    reference: Reference
    parameters: Literal["head", "all"] = "head"
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    damping: NonNegative = 1e-3
    solver: Literal["cg", "lissa"] = "cg"
    iterations: Count = 500
    tolerance: Positive = 1e-5
    scale: Positive = 10.0
    batch_size: Count = 256

    def __post_init__(self) -> None:
        if not isinstance(self.model, nn.Module):
            raise InputError(f"model must be a torch.nn.Module, got {type(self.model).__name__}")
        if not isinstance(self.reference, Reference) or self.reference.y is None:
            raise InputError("influence needs a Reference with the labels of the training images")
        if self.reference.weights is not None:
            raise InputError("influence is about the mean loss over the training images: its Reference has no weights")
        check_fields(self)

    def scores(self, x: Tensor, target: Tensor | None = None) -> Tensor:
        """``[B, N]``: the influence of each training image on the loss of ``x`` at ``target`` (or the prediction).

        Differentiable in ``x``, exactly: the Hessian does not depend on ``x``, and the solve is differentiated by one
        more solve. Not differentiable in the weights.

        Args:
            x: ``[B, C, H, W]`` in ``[0, 1]``, or table rows ``[B, D]``.
            target: ``[B]`` classes whose loss is used.
        """
        checks.inputs(x)
        checks.evaluating(self.model)
        attached = torch.is_grad_enabled()
        with torch.enable_grad(), named_derivatives(), twice_differentiable():
            part = self._trained_part(x)
            admit(self.model, x)
            gradients = self._gradients(part, x, target)
            solved = Solve.apply(gradients, lambda b: self._solve(part, b))
            scores = self._products(part, solved)
        return scores if attached and x.requires_grad else scores.detach()

    def top(self, x: Tensor, k: int, target: Tensor | None = None, *, harmful: bool = False) -> Influential:
        """The ``k`` training images that lower the loss of ``x`` most (``harmful``: raise it most), in order.

        Raises:
            InputError: ``k`` outside of 1 to N.
        """
        if not 1 <= k <= len(self.reference.x):
            raise InputError(f"k must lie between 1 and the {len(self.reference.x)} training images, got {k!r}")
        with torch.no_grad():
            return Influential(*self.scores(x, target).topk(k, 1, largest=not harmful))

    # The trained part

    def _trained_part(self, like: Tensor) -> _TrainedPart:
        assert self.reference.y is not None
        refuse_hidden(self.model, "influence functions differentiate by the weights")
        x, y = self.reference.like(like), self.reference.y.to(like.device)
        if self.parameters == "head":
            head = self._head(like)
            with torch.no_grad():
                x = torch.cat([features(self.model, head, rows) for rows in x.split(self.batch_size)])
            logits: Logits = linear(head.in_features, head.bias is not None)
            weights = flat(list(head.parameters()))
        else:
            parameters: dict[str, Tensor] = dict(self.model.named_parameters())
            logits, weights = whole(self.model, parameters), flat(list(parameters.values()))
        with torch.no_grad():
            checks.classes(y, len(y), logits(weights, x[:1]).shape[1], "reference.y")
        return _TrainedPart(logits, weights, x, y.long())

    @cached_property
    def _names(self) -> dict[str, str]:
        return {}

    def _head(self, x: Tensor) -> nn.Linear:
        known = self._names
        if "head" not in known:
            known["head"] = last_linear(self.model, x.detach())
        head = layers.submodule(self.model, known["head"])
        assert isinstance(head, nn.Linear)
        return head

    # Gradients and curvature

    def _gradients(self, part: _TrainedPart, x: Tensor, target: Tensor | None) -> Tensor:
        """``grad L(x_b)``, ``[B, P]``, with a graph to ``x``."""
        weights = part.weights.clone().requires_grad_()
        inputs = features(self.model, self._head(x), x) if self.parameters == "head" else x
        logits = part.logits(weights, inputs)
        losses = F.cross_entropy(logits, explained_class(logits, target).long(), reduction="none")
        rows = [torch.autograd.grad(loss, weights, create_graph=True)[0] for loss in losses]
        return torch.stack(rows)

    def _curvature(self, part: _TrainedPart, v: Tensor) -> Tensor:
        """``(H + damping) v`` for a vector ``v``."""
        total = self.damping * v
        for x, y in _batches(part, self.batch_size):
            weights = part.weights.clone().requires_grad_()
            logits = part.logits(weights, x)
            if self.curvature == "hessian":
                loss = F.cross_entropy(logits, y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
                (product,) = torch.autograd.grad(gradient @ v, weights)
            else:
                change, p = directional(logits, weights, v), logits.detach().softmax(1)
                # The Hessian of the cross-entropy in the logits, diag(p) - p p^T, times the change.
                curved = p * (change - (p * change).sum(1, keepdim=True))
                (product,) = torch.autograd.grad(logits, weights, curved)
            total = total + product / len(part.y)
        return total

    def _products(self, part: _TrainedPart, directions: Tensor) -> Tensor:
        """``directions_b^T grad L(z_i)``, ``[B, N]``, differentiable in ``directions``."""
        columns = []
        for x, y in _batches(part, self.batch_size):
            weights = part.weights.clone().requires_grad_()
            losses = F.cross_entropy(part.logits(weights, x), y, reduction="none")
            columns.append(torch.stack([directional(losses, weights, d, graph=True) for d in directions]))
        return torch.cat(columns, 1)

    def _solve(self, part: _TrainedPart, b: Tensor) -> Tensor:
        """``(H + damping)^-1 b``, row by row: ``[B, P]``."""

        def product(v: Tensor) -> Tensor:
            return self._curvature(part, v)

        return torch.stack([self._solve_one(product, row) for row in b])

    def _solve_one(self, product: MatrixProduct, b: Tensor) -> Tensor:
        if self.solver == "cg":
            solution, residual = conjugate_gradients(product, b, self.iterations, self.tolerance)
        else:
            solution, residual = lissa(product, b, self.iterations, self.tolerance, self.scale)
        if not residual <= self.tolerance:
            advice = "raise scale or iterations" if self.solver == "lissa" else "raise iterations, damping or tolerance"
            raise InputError(
                f"{self.solver} did not converge in {self.iterations} iterations: relative residual {residual:.3g}, "
                f"tolerance {self.tolerance:.3g}; {advice}"
            )
        return solution


def _batches(part: _TrainedPart, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(part.x.split(size), part.y.split(size), strict=True)
