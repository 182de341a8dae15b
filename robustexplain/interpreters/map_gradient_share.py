"""How much of a map's derivative there is: near nothing for a gradient map on a network of rectifiers."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd.rectifiers import Smooth, Softplus, swapped
from ..random_streams import generator
from .base import Interpreter
from .zero_gradient import unchecked


def map_gradient_share(
    interpreter: Interpreter, x: Tensor, target: Tensor | None = None, surrogate: Smooth | None = None, seed: int = 0
) -> Tensor:
    """How much of its surrogate's map gradient an interpreter has on the real model, ``[B]``; near 0 is flat.

    The ratio of the norms of ``d <v, m(x)> / dx`` on the model and on its smooth twin, for a random direction ``v`` of
    map space. A ReLU network's gradient maps of logits give exactly 0; those of probabilities a few percent at most,
    from the softmax alone.

    Args:
        interpreter: differentiable.
        x: ``[B, C, H, W]`` in ``[0, 1]``.
        target: ``[B]`` classes to explain; default the prediction.
        surrogate: default softplus, beta 10.
        seed: of the direction.
    """
    with torch.no_grad():
        found = interpreter.explain(x, target)
    target = found.logits.argmax(1) if target is None else target
    direction = torch.randn(found.maps.shape[1:], generator=generator(seed, "direction")).to(found.maps)
    real = _gradient(interpreter, x, target, direction)
    with swapped(surrogate or Softplus()):
        smooth = _gradient(interpreter, x, target, direction)
    tiny = torch.finfo(smooth.dtype).tiny
    share: Tensor = real / smooth.clamp(min=tiny)
    return share


def _gradient(interpreter: Interpreter, x: Tensor, target: Tensor, direction: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    # The figure says it.
    with unchecked():
        maps = interpreter.explain(x, target).maps
        # Each map at its own scale, so that twins of other scale compare.
        size = torch.linalg.vector_norm(maps.detach().flatten(1), dim=1)
        total = ((maps * direction).flatten(1).sum(1) / size.clamp(min=torch.finfo(size.dtype).tiny)).sum()
        (gradient,) = torch.autograd.grad(total, x)
    norms: Tensor = torch.linalg.vector_norm(gradient.flatten(1), dim=1)
    return norms
