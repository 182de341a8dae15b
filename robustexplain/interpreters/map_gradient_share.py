"""The size of a map's derivative, relative to a smooth surrogate: near 0 for gradient maps on rectifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd.rectifiers import Smooth, Softplus, swapped
from ..hidden import refuse_hidden
from ..random_streams import generator
from .base import Interpreter
from .zero_gradient import unchecked


def map_gradient_share(
    interpreter: Interpreter, x: Tensor, target: Tensor | None = None, surrogate: Smooth | None = None, seed: int = 0
) -> Tensor:
    """The norm of the map's gradient on the model, as a share of its norm on a smooth surrogate: ``[B]``.

    The ratio of the norms of ``d <v, m(x)> / dx`` on the model and on the surrogate, for a random direction ``v`` of
    map space. On a ReLU network it is exactly 0 for gradient maps of logits, and a few percent at most for those of
    probabilities, from the softmax alone. 1 where the surrogate's map does not depend on the input either.

    Args:
        interpreter: differentiable.
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        target: ``[B]`` classes to explain; default the prediction.
        surrogate: of the rectifiers; default softplus, beta 10.
        seed: of the direction.
    """
    refuse_hidden(interpreter.model, "a surrogate replaces rectifiers")
    with torch.no_grad():
        logits, maps, *_ = interpreter.explain(x, target)
    target = logits.argmax(1) if target is None else target
    direction = torch.randn(maps.shape[1:], generator=generator(seed, "direction"), dtype=torch.float32).to(maps)
    real = _gradient(interpreter, x, target, direction)
    with swapped(surrogate or Softplus()):
        smooth = _gradient(interpreter, x, target, direction)
    return torch.where(smooth > 0, real / torch.where(smooth > 0, smooth, 1), 1.0)


def _gradient(interpreter: Interpreter, x: Tensor, target: Tensor, direction: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    # A zero gradient is a result here, so no warning.
    with unchecked():
        maps = interpreter.explain(x, target).maps
        # Each map at its own scale: model and surrogate may give maps of different scale.
        size = torch.linalg.vector_norm(maps.detach().flatten(1), dim=1)
        total = ((maps * direction).flatten(1).sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny)).sum()
        if not total.requires_grad:  # of a linear model
            return x.new_zeros(len(x))
        (gradient,) = torch.autograd.grad(total, x)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return norms
