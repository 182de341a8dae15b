"""Interpreters that read a feature map: CAM, Grad-CAM and what followed from it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from ...autograd import layers
from ...checks import Kind
from ...errors import UnsupportedModelError
from ...maps import positive
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, differentiable, explained_class, pick
from .token_grid import Attentions, Grid, token_grid, token_layer


@INTERPRETERS.register("cam", paper="Zhou et al. 2016; Zhang et al. 2020, eq. 6-7", needs=("pooled linear head",))
@dataclass(frozen=True, eq=False)
class CAM(Interpreter):
    """Class activation map: ``m_c[i, j] = sum_k w_{k,c} a_k[i, j]`` (Zhang et al. 2020, eq. 7), signed, no ReLU.

    The feature layer and the head are found by behaviour, once, on the first input: the logits must be one linear
    layer on the spatial average of the last feature map, or the model is refused.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @cached_property
    def _structure(self) -> dict[str, layers.PooledHead]:
        return {}

    def _head(self, x: Tensor) -> layers.PooledHead:
        if "head" not in self._structure:
            self._structure["head"] = layers.pooled_head(self.model, x.detach())
        return self._structure["head"]

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        found = self._head(x)
        with layers.captured(self.model, [found.features.name]) as outputs:
            logits = self.model(x)
        weight = layers.submodule(self.model, found.head).weight
        classes = explained_class(logits, target)
        maps = torch.einsum("bk,bkhw->bhw", weight[classes], outputs[found.features.name])  # type: ignore[index]
        return Explanation(logits, maps)


@INTERPRETERS.register(
    "gradcam", paper="Selvaraju et al. 2017; Zhang et al. 2020, A1", needs=("convolution or attention",)
)
@dataclass(frozen=True, eq=False)
class GradCAM(Interpreter):
    """Grad-CAM: ``m_c = ReLU(sum_k w_{k,c} a_k)``, ``w_{k,c}`` the mean of ``d f_c / d a_k`` (Zhang et al. eq. 14-15).

    ``f_c`` is the logit, as in Selvaraju et al.: the probability's gradient mixes all logits and vanishes on confident
    inputs. The channel weights stay in the graph. In a vision transformer the feature map is that of the patch tokens
    which the last attention reads, laid out on their grid; class tokens and registers take no part.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: eq. 15's ReLU; off for a signed map.

    Examples:
        >>> import torch
        >>> from robustexplain import interpreters, models
        >>> model = models.load("small-cnn", num_classes=10, in_channels=1)
        >>> gradcam, x = interpreters.GradCAM(model), torch.rand(2, 1, 32, 32)
        >>> gradcam(x).shape
        torch.Size([2, 32, 32])
        >>> gradcam.explain(x, native=True).maps.shape
        torch.Size([2, 8, 8])
    """

    layer: str | None = None
    relu: bool = True

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @cached_property
    def _sites(self) -> _Sites:
        return {}

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits, features, gradient = _read(self, x, target, graph)
        maps = torch.einsum("bk,bkhw->bhw", gradient.mean((2, 3)), features)
        return Explanation(logits, positive(maps) if self.relu else maps)


@INTERPRETERS.register(
    "gradcam++", paper="Chattopadhay et al. 2018, eq. 5, 7 and 19", needs=("convolution or attention",)
)
@dataclass(frozen=True, eq=False)
class GradCAMPlusPlus(Interpreter):
    """Grad-CAM++: channel weights ``w_k = sum_ij alpha_k[i, j] ReLU(d f_c / d a_k[i, j])`` (Chattopadhay et al. 2018).

    ``alpha = g^2 / (2 g^2 + g^3 sum a)`` (eq. 19) with ``g`` the logit's gradient, written as ``1 / (2 + g sum a)``:
    the same number, with no power that rounds to zero. Departures: the paper explains ``exp(f_c)``, which multiplies
    the whole map by ``exp(f_c)`` and is left out; channels at whose places ``2 + g sum a`` is not positive (only layers
    without a rectifier have some) are left out too, where the formula has a pole. Layers are those of
    :class:`GradCAM`.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: the ReLU on the sum over channels.
    """

    layer: str | None = None
    relu: bool = True

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @cached_property
    def _sites(self) -> _Sites:
        return {}

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits, features, gradient = _read(self, x, target, graph)
        below = 2 + gradient * features.sum((2, 3), keepdim=True)
        alpha = torch.where(below > 0, 1 / torch.where(below > 0, below, 1), 0)
        maps = torch.einsum("bk,bkhw->bhw", (alpha * positive(gradient)).sum((2, 3)), features)
        return Explanation(logits, positive(maps) if self.relu else maps)


@INTERPRETERS.register("layercam", paper="Jiang et al. 2021, eq. 4-6", needs=("convolution or attention",))
@dataclass(frozen=True, eq=False)
class LayerCAM(Interpreter):
    """LayerCAM: ``m_c = ReLU(sum_k ReLU(d f_c / d a_k) a_k)``, a weight for each place of each channel (Jiang et al.).

    Made for early layers too: name one. Departure: the paper's ``tanh`` rescaling of early layers' maps (eq. 8) is a
    matter of display and left to whoever draws them. Layers are those of :class:`GradCAM`.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: eq. 6's ReLU on the sum over channels.
    """

    layer: str | None = None
    relu: bool = True

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @cached_property
    def _sites(self) -> _Sites:
        return {}

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits, features, gradient = _read(self, x, target, graph)
        maps = (positive(gradient) * features).sum(1)
        return Explanation(logits, positive(maps) if self.relu else maps)


@dataclass(frozen=True)
class _Site:
    """A layer to read, and the grid of its tokens if it gives tokens."""

    name: str
    grid: Grid | None = None


_Sites = dict[tuple[int, ...], _Site]


def _read(
    of: GradCAM | GradCAMPlusPlus | LayerCAM, x: Tensor, target: Tensor | None, graph: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits ``[B, K]``, the layer's feature map ``[B, C, h, w]`` and the logit's gradient there, in one pass."""
    size = tuple(x.shape[-2:])
    if size not in of._sites:
        of._sites[size] = _find(of.model, x.detach(), of.layer)
    site = of._sites[size]
    x = differentiable(x)
    with layers.captured(of.model, [site.name]) as outputs:
        logits = of.model(x)
    features = outputs[site.name]
    score = pick(logits, explained_class(logits, target)).sum()
    (gradient,) = torch.autograd.grad(score, features, create_graph=graph, allow_unused=True)
    if gradient is None:
        raise UnsupportedModelError(f"layer {site.name!r} does not reach the logits: Grad-CAM needs one that does")
    if site.grid is None:
        return logits, features, gradient
    return logits, site.grid.unfold(features), site.grid.unfold(gradient)


@torch.no_grad()
def _find(model: nn.Module, x: Tensor, layer: str | None) -> _Site:
    name = layer or token_layer(model, x) or layers.last_feature_layer(model, x).name
    tokens: set[int] = set()
    with layers.captured(model, [name]) as outputs, Attentions(lambda weights: tokens.add(weights.shape[-1])):
        model(x[:1])
    if name not in outputs:
        raise UnsupportedModelError(f"layer {name!r} does not run in a forward pass: Grad-CAM needs one that does")
    found: object = outputs[name]
    if isinstance(found, Tensor) and found.dim() == 3 and found.shape[1] in tokens:
        return _Site(name, token_grid(model, x, found.shape[1]))
    pooled = isinstance(found, Tensor) and found.shape[2:] == (1, 1)
    if not pooled and not layers.is_feature_map(found, x):
        shape = [len(x), *found.shape[1:]] if isinstance(found, Tensor) else type(found).__name__
        raise UnsupportedModelError(
            f"layer {name!r} gives shape {shape}; Grad-CAM needs a feature map [B, C, h, w], or the tokens [B, N, D] "
            "of a transformer"
        )
    return _Site(name)
