"""Influence functions: which training images a prediction owes its loss to."""

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
from ...errors import InputError
from ...fields import Count, NonNegative, Positive, check_fields
from ..base import explained_class
from ..reference import Reference
from .hessian import (
    Logits,
    Product,
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
    """The training images that matter most to each input: scores ``[B, k]`` and their places in the reference."""

    scores: Tensor
    indices: Tensor


class _Problem(NamedTuple):
    """The trained part of the model as a function of a flat vector of parameters, and its training set."""

    logits: Logits
    weights: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True, eq=False)
class Influence:
    """Influence of training images on the loss of an input (Koh and Liang 2017, eq. 2); no map, so no interpreter.

    ``score_bi = grad L(x_b)^T (H + damping)^-1 grad L(z_i)``, ``H`` the Hessian of the mean training loss: leaving
    ``z_i`` out of the ``N`` training images changes the loss of ``x_b`` by ``score_bi / N``. A positive score is an
    image that helps; it is Koh and Liang's ``I_up,loss`` with the sign turned.

    Args:
        model: the classifier, trained to its optimum; the formula is about a minimum.
        reference: the training images and their labels.
        parameters: ``head`` (the last linear layer, all before it fixed: convex, quick) or ``all``.
        curvature: ``gauss_newton`` (positive semi-definite for every network; for the head it *is* the Hessian) or
            ``hessian``, which needs ``damping`` above its most negative eigenvalue.
        damping: added to the diagonal; the weight decay of the training belongs in here (``weight_decay / 2 |w|^2`` in
            the loss is a damping of ``weight_decay``).
        solver: ``cg`` (conjugate gradients), or ``lissa`` (the damped Neumann series of Agarwal et al. 2017, over the
            whole training set, without its sampling noise), which needs ``scale`` above the largest eigenvalue.
        iterations: of the solver, at most.
        tolerance: relative residual at which the solver stops.
        scale: of ``lissa``.
        batch_size: training images a pass.

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
        """``[B, N]``: what each training image does for the loss of ``x`` at ``target`` (default: the prediction).

        Differentiable in ``x``, exactly: the Hessian does not depend on ``x``, and the solve is differentiated by one
        more solve. Not differentiable in the weights.

        Args:
            x: ``[B, C, H, W]`` in ``[0, 1]``, or table rows ``[B, D]``.
            target: ``[B]`` classes whose loss is looked at.
        """
        checks.inputs(x)
        checks.evaluating(self.model)
        attached = torch.is_grad_enabled()
        with torch.enable_grad():
            problem = self._problem(x)
            gradients = self._gradients(problem, x, target)
            solved = Solve.apply(gradients, lambda b: self._solve(problem, b))
            scores = self._products(problem, solved)
        return scores if attached and x.requires_grad else scores.detach()

    def top(self, x: Tensor, k: int, target: Tensor | None = None, *, harmful: bool = False) -> Influential:
        """The ``k`` training images that help ``x`` most, best first; or those that harm it most.

        Raises:
            InputError: ``k`` outside of 1 to N.
        """
        if not 1 <= k <= len(self.reference.x):
            raise InputError(f"k must lie between 1 and the {len(self.reference.x)} training images, got {k!r}")
        with torch.no_grad():
            return Influential(*self.scores(x, target).topk(k, 1, largest=not harmful))

    # What the trained part is

    def _problem(self, like: Tensor) -> _Problem:
        assert self.reference.y is not None
        x, y = self.reference.like(like), self.reference.y.to(like.device)
        if self.parameters == "head":
            head = self._head(like)
            with torch.no_grad():
                x = torch.cat([features(self.model, head, part) for part in x.split(self.batch_size)])
            logits: Logits = linear(head.in_features, head.bias is not None)
            weights = flat(list(head.parameters()))
        else:
            parameters: dict[str, Tensor] = dict(self.model.named_parameters())
            logits, weights = whole(self.model, parameters), flat(list(parameters.values()))
        with torch.no_grad():
            checks.classes(y, len(y), logits(weights, x[:1]).shape[1], "reference.y")
        return _Problem(logits, weights, x, y.long())

    @cached_property
    def _found(self) -> dict[str, str]:
        return {}

    def _head(self, x: Tensor) -> nn.Linear:
        if "head" not in self._found:
            self._found["head"] = last_linear(self.model, x.detach())
        head = layers.submodule(self.model, self._found["head"])
        assert isinstance(head, nn.Linear)
        return head

    # Gradients and curvature

    def _gradients(self, problem: _Problem, x: Tensor, target: Tensor | None) -> Tensor:
        """``grad L(x_b)``, ``[B, P]``, with a graph to ``x``."""
        weights = problem.weights.clone().requires_grad_()
        given = features(self.model, self._head(x), x) if self.parameters == "head" else x
        logits = problem.logits(weights, given)
        losses = F.cross_entropy(logits, explained_class(logits, target).long(), reduction="none")
        rows = [torch.autograd.grad(loss, weights, create_graph=True)[0] for loss in losses]
        return torch.stack(rows)

    def _curvature(self, problem: _Problem, v: Tensor) -> Tensor:
        """``(H + damping) v`` for a vector ``v``."""
        total = self.damping * v
        for x, y in _batches(problem, self.batch_size):
            weights = problem.weights.clone().requires_grad_()
            logits = problem.logits(weights, x)
            if self.curvature == "hessian":
                loss = F.cross_entropy(logits, y, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
                (product,) = torch.autograd.grad(gradient @ v, weights)
            else:
                moved, p = directional(logits, weights, v), logits.detach().softmax(1)
                bent = p * (moved - (p * moved).sum(1, keepdim=True))
                (product,) = torch.autograd.grad(logits, weights, bent)
            total = total + product / len(problem.y)
        return total

    def _products(self, problem: _Problem, directions: Tensor) -> Tensor:
        """``directions_b^T grad L(z_i)``, ``[B, N]``, differentiable in ``directions``."""
        columns = []
        for x, y in _batches(problem, self.batch_size):
            weights = problem.weights.clone().requires_grad_()
            losses = F.cross_entropy(problem.logits(weights, x), y, reduction="none")
            columns.append(torch.stack([directional(losses, weights, d, graph=True) for d in directions]))
        return torch.cat(columns, 1)

    def _solve(self, problem: _Problem, b: Tensor) -> Tensor:
        """``(H + damping)^-1 b``, row by row: ``[B, P]``."""

        def product(v: Tensor) -> Tensor:
            return self._curvature(problem, v)

        return torch.stack([self._solve_one(product, row) for row in b])

    def _solve_one(self, product: Product, b: Tensor) -> Tensor:
        if self.solver == "cg":
            found, residual = conjugate_gradients(product, b, self.iterations, self.tolerance)
        else:
            found, residual = lissa(product, b, self.iterations, self.tolerance, self.scale)
        if not residual <= self.tolerance:
            advice = "raise scale or iterations" if self.solver == "lissa" else "raise iterations, damping or tolerance"
            raise InputError(
                f"{self.solver} did not converge in {self.iterations} iterations: relative residual {residual:.3g}, "
                f"wanted {self.tolerance:.3g}; {advice}"
            )
        return found


def _batches(problem: _Problem, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(problem.x.split(size), problem.y.split(size), strict=True)
