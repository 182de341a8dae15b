"""Interpreters based on a feature map: CAM, Grad-CAM, Grad-CAM++ and LayerCAM."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ...autograd import layers
from ...autograd.kept import Kept
from ...checks import Kind
from ...door import answer
from ...errors import UnsupportedModelError
from ...maps import positive
from ...models.in_front import in_input_coordinates
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class, pick, requiring_grad, usable_by_autograd
from .sites import Site, find_site


@INTERPRETERS.register("cam", paper="Zhou et al. 2016; Zhang et al. 2020, eq. 6-7", needs=("pooled linear head",))
@dataclass(frozen=True, eq=False)
class CAM(Interpreter):
    """Class activation map: ``m_c[i, j] = sum_k w_{k,c} a_k[i, j]`` (Zhang et al. 2020, eq. 7), signed, no ReLU.

    The feature layer and the head are found once for each size of the images, on random ones: the logits must be one
    linear layer on the spatial average of the last feature map; other models are refused.
    """

    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    explains_scalars: ClassVar[bool] = False

    @cached_property
    def _structure(self) -> Kept[tuple[int, ...], layers.PooledHead]:
        """By the size of the images."""
        return Kept()

    def _head(self, x: Tensor) -> layers.PooledHead:
        return self._structure.get_or(tuple(x.shape[-2:]), lambda: layers.pooled_head(self.model, x.detach()))

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        pooled = self._head(x)
        with layers.captured(self.model, [pooled.features.name]) as outputs:
            logits = answer(self.model, x)
        weight = layers.head_weight(self.model, pooled)
        classes = explained_class(logits, target)
        features = usable_by_autograd(outputs[pooled.features.name])
        # A model may compute in half precision inside.
        weight = weight.to(torch.promote_types(weight.dtype, features.dtype))
        maps = torch.einsum("bk,bkhw->bhw", weight[classes], features.to(weight.dtype))
        return Explanation(logits, in_input_coordinates(self.model, maps, x))


@dataclass(frozen=True, eq=False)
class LayerMap(Interpreter):
    """A map computed from a layer's feature map and the gradient of the class's logit there.

    Once for each size of the images, the layer is found and seen to be a map of the image, by blanking patches of
    random images; the feature map may be ``[B, C, h, w]``, ``[B, h, w, C]`` or tokens ``[B, N, D]``. A model where none
    can be shown to be one is refused. A subclass writes ``_combine``.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: the ReLU on the sum over channels; off for a signed map.
    """

    layer: str | None = None
    relu: bool = True

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @cached_property
    def _sites(self) -> Kept[tuple[int, ...], Site]:
        """By the size of the images."""
        return Kept()

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits, features, gradient = self._features(x, target, graph)
        maps = self._combine(features, gradient)
        maps = positive(maps) if self.relu else maps
        return Explanation(logits, in_input_coordinates(self.model, maps, x))

    @abstractmethod
    def _combine(self, features: Tensor, gradient: Tensor) -> Tensor:
        """Maps ``[B, h, w]`` without the ReLU, from features and gradient ``[B, C, h, w]``."""

    def _features(self, x: Tensor, target: Tensor | None, graph: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[B, K]``, the layer's feature map ``[B, C, h, w]`` and the logit's gradient there, in one pass."""
        site = self._sites.get_or(tuple(x.shape[-2:]), lambda: find_site(self.model, x.detach(), self.layer))
        x = requiring_grad(x)
        with layers.captured(self.model, [site.name]) as outputs:
            logits = answer(self.model, x)
        features = outputs[site.name]
        score = pick(logits, explained_class(logits, target)).sum()
        (gradient,) = torch.autograd.grad(score, features, create_graph=graph, allow_unused=True)
        if gradient is None:
            raise UnsupportedModelError(f"layer {site.name!r} does not reach the logits: Grad-CAM needs one that does")
        return logits, site.read(features), site.read(gradient)


@INTERPRETERS.register(
    "gradcam", paper="Selvaraju et al. 2017; Zhang et al. 2020, A1", needs=("convolution or attention",)
)
@dataclass(frozen=True, eq=False)
class GradCAM(LayerMap):
    """Grad-CAM: ``m_c = ReLU(sum_k w_{k,c} a_k)``, ``w_{k,c}`` the mean of ``d f_c / d a_k`` (Zhang et al. eq. 14-15).

    ``f_c`` is the logit, as in Selvaraju et al.: the probability's gradient mixes all logits and vanishes on confident
    inputs. The channel weights stay in the graph. In a vision transformer the feature map consists of
    the patch tokens that enter the last attention, arranged on their grid, without class tokens and registers.

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

    def _combine(self, features: Tensor, gradient: Tensor) -> Tensor:
        return torch.einsum("bk,bkhw->bhw", gradient.mean((2, 3)), features)


@INTERPRETERS.register(
    "gradcam++", paper="Chattopadhay et al. 2018, eq. 5, 7 and 19", needs=("convolution or attention",)
)
@dataclass(frozen=True, eq=False)
class GradCAMPlusPlus(LayerMap):
    """Grad-CAM++: channel weights ``w_k = sum_ij alpha_k[i, j] ReLU(d f_c / d a_k[i, j])`` (Chattopadhay et al. 2018).

    ``alpha = g^2 / (2 g^2 + g^3 sum a)`` (eq. 19) with ``g`` the logit's gradient, written as ``1 / (2 + g sum a)``,
    which is equal and does not underflow. Departures: the paper explains ``exp(f_c)``; its only effect, a factor of
    ``exp(f_c)`` on the whole map, is left out. Places where ``2 + g sum a`` is not positive, near the pole of the
    formula, get weight 0; they occur only in layers without a rectifier. Layers are those of :class:`GradCAM`.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: the ReLU on the sum over channels.
    """

    def _combine(self, features: Tensor, gradient: Tensor) -> Tensor:
        denominator = 2 + gradient * features.sum((2, 3), keepdim=True)
        alpha = torch.where(denominator > 0, 1 / torch.where(denominator > 0, denominator, 1), 0)
        return torch.einsum("bk,bkhw->bhw", (alpha * positive(gradient)).sum((2, 3)), features)


@INTERPRETERS.register("layercam", paper="Jiang et al. 2021, eq. 4-6", needs=("convolution or attention",))
@dataclass(frozen=True, eq=False)
class LayerCAM(LayerMap):
    """LayerCAM: ``m_c = ReLU(sum_k ReLU(d f_c / d a_k) a_k)``, one weight a position and channel (Jiang et al.).

    Suited to early layers too: name one. Departure: the paper's ``tanh`` rescaling of early layers' maps (eq. 8)
    concerns their display and is left out. Layers are those of :class:`GradCAM`.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: eq. 6's ReLU on the sum over channels.
    """

    def _combine(self, features: Tensor, gradient: Tensor) -> Tensor:
        return (positive(gradient) * features).sum(1)
