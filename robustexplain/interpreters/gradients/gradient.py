"""Interpreters that differentiate the prediction with respect to the input, at the input itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ...autograd import layers
from ...door import answer
from ...errors import InputError, UnsupportedModelError
from ...fields import Count
from ...maps import expand
from ...models.in_front import in_input_coordinates
from ...registry import INTERPRETERS
from ..base import (
    Channels,
    Explanation,
    Interpreter,
    explained_class,
    pick,
    reduce_channels,
    requiring_grad,
    wide_dtype,
)

Of = Literal["probability", "logit", "log_probability"]
"""What is differentiated: the class's softmax probability, its logit, or the logarithm of its probability."""


@INTERPRETERS.register("gradient", paper="Simonyan et al. 2013; GRAD of Zhang et al. 2020, eq. 5")
@dataclass(frozen=True, eq=False)
class Gradient(Interpreter):
    """Gradient saliency: ``m = |d f_c(x) / d x|`` (Zhang et al. 2020, eq. 5).

    On a network of rectifiers the map's own derivative comes only from the softmax (zero for ``of="logit"``), so an
    attack on it needs a surrogate (:mod:`robustexplain.autograd.rectifiers`).

    Args:
        of: what is differentiated: ``probability`` (eq. 5), ``logit`` (Ghorbani et al.) or ``log_probability`` (the
            loss, as in the code of Zhang et al.; after rescaling the same map as ``probability``). Where a probability
            is so close to 0 or 1 that its gradient underflows, the map is that of the log odds, very small.
        channels: how channels become one map: largest magnitude (Zhang et al.), sum of magnitudes (Dombrowski et al.,
            Ghorbani et al.), or signed sum.
        layer: dotted name: differentiate by this module's output instead of the input (SimpleGrad at a layer, as the
            code of Heo et al. 2019 trains it). A layer directly in front of global pooling gives a constant map:
            name an earlier one.
        pool: side of the squares over which the map is averaged. GRAD in the code of Zhang et al. is pooled by 4:
            56 x 56 on images of 224. Choose a divisor of the map's sides: a remainder at the lower and right border
            is left out.

    Raises:
        InputError: squares larger than the map, or a table, which has none.
        UnsupportedModelError: on the first input, for a layer that gives no feature map or does not reach the logits.
    """

    of: Of = "probability"
    channels: Channels = "max"
    layer: str | None = None
    pool: Count = 1

    is_gradient: ClassVar[bool] = True
    exact_where_confident: ClassVar[bool] = True

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x)
        logits, explained = (answer(self.model, x), x) if self.layer is None else self._read(x, self.layer)
        gradient = class_gradient(logits, explained_class(logits, target), explained, self.of, graph)
        maps = self._pooled(reduce_channels(gradient, self.channels))
        return Explanation(logits, maps if self.layer is None else in_input_coordinates(self.model, maps, x))

    def _pooled(self, maps: Tensor) -> Tensor:
        if self.pool == 1:
            return maps
        if maps.dim() != 3 or self.pool > min(maps.shape[1:]):
            raise InputError(f"Gradient.pool: maps of {list(maps.shape[1:])} hold no square of side {self.pool}")
        return F.avg_pool2d(maps[:, None], self.pool)[:, 0]

    def _read(self, x: Tensor, layer: str) -> tuple[Tensor, Tensor]:
        """Logits, and the feature map of the layer in the same forward pass."""
        with layers.captured(self.model, [layer]) as outputs:
            logits = answer(self.model, x)
        features = outputs.get(layer)
        if not layers.is_feature_map(features, x):
            shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UnsupportedModelError(
                f"layer {layer!r} gives {shape}; a gradient map needs a feature map [B, C, h, w] above 1 x 1"
            )
        assert features is not None  # no feature map otherwise; for the type checker
        return logits, features


@INTERPRETERS.register("input-x-gradient", paper="Shrikumar et al. 2016; Kindermans et al. 2016")
@dataclass(frozen=True, eq=False)
class InputXGradient(Interpreter):
    """Input times gradient: ``m = x * d f_c(x) / d x``, each pixel's first-order contribution to the class score.

    ``x`` is the image in ``[0, 1]``, so black pixels get 0. Departure: the code of Dombrowski et al. multiplies with
    the *normalised* image, where the mean colour gets 0; here normalisation is a part of the model. For a table row
    ``x`` is in the data's own units: a column at 0 gets 0.

    Args:
        of: what is differentiated; ``logit`` as in the papers, ``probability`` or ``log_probability``.
        channels: how the channels' products become one map: signed sum, sum of magnitudes, or largest magnitude.
    """

    of: Of = "logit"
    channels: Channels = "sum"

    is_gradient: ClassVar[bool] = True
    exact_where_confident: ClassVar[bool] = True

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x)
        logits = answer(self.model, x)
        gradient = class_gradient(logits, explained_class(logits, target), x, self.of, graph)
        return Explanation(logits, reduce_channels(x * gradient, self.channels))


def class_gradient(logits: Tensor, classes: Tensor, x: Tensor, of: Of, graph: bool) -> Tensor:
    """``d f_c / d x`` of each sample's own class, the shape of ``x``.

    Args:
        logits: ``[B, K]``, computed from ``x``.
        classes: ``[B]``.
        x: ``[B, C, H, W]`` or ``[B, D]``, followed by autograd.
        of: which ``f_c``.
        graph: whether the gradient is differentiated again.
    """
    score = pick(logits, classes) if of == "logit" else margin(logits, classes)
    (gradient,) = torch.autograd.grad(score.sum(), x, create_graph=graph, allow_unused=True)
    if gradient is None:
        raise UnsupportedModelError("the logits do not depend on the input, or the layer, of the gradient")
    if of == "logit":
        return gradient
    # p = sigmoid(margin), so grad p = p (1 - p) grad margin and grad log p = (1 - p) grad margin. With 1 - p as
    # sigmoid(-margin), the map stays exact where p rounds to one.
    odds, steep = (part.to(wide_dtype(part)) for part in (score, gradient))
    scale = (-odds).sigmoid() * (odds.sigmoid() if of == "probability" else 1)
    # A probability that cannot be told from 0 or 1 would give a map of zeros. A small scale keeps its direction.
    tiny = torch.finfo(steep.dtype).tiny
    scale = torch.where(scale < 64 * tiny, tiny**0.75, scale)
    if gradient.dtype == torch.float16:
        # What float16 cannot write: the map's largest value is then the smallest one that it writes in full.
        largest = steep.detach().abs().flatten(1).amax(1).clamp(min=tiny**0.25)
        scale = torch.maximum(scale, torch.finfo(torch.float16).tiny / largest)
    return (steep * expand(scale, steep)).to(gradient.dtype)


def margin(logits: Tensor, target: Tensor) -> Tensor:
    """``z_c - log sum_{k != c} exp z_k``, ``[B]``: the log odds of class ``c``."""
    others = logits.scatter(1, target[:, None].long(), -torch.inf).logsumexp(1)
    return pick(logits, target) - others
