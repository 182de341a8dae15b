"""Interpreters that read the last feature map: CAM and Grad-CAM."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .. import probe
from ..errors import UnsupportedModelError
from ..registry import INTERPRETERS
from .base import Explanation, Interpreter, explained_class, pick


@INTERPRETERS.register("cam", paper="Zhou et al. 2016; Zhang et al. 2020, eq. 6-7", needs=("pooled linear head",))
@dataclass(frozen=True, eq=False)
class CAM(Interpreter):
    """Class activation map: ``m_c[i, j] = sum_k w_{k,c} a_k[i, j]`` (Zhang et al. 2020, eq. 7), signed, no ReLU.

    The feature layer and the head are found by behaviour, once, on the first input: the logits must be one linear
    layer on the spatial average of the last feature map, or the model is refused.
    """

    @cached_property
    def _structure(self) -> dict[str, probe.PooledHead]:
        return {}

    def _head(self, x: Tensor) -> probe.PooledHead:
        if "head" not in self._structure:
            self._structure["head"] = probe.pooled_head(self.model, x.detach())
        return self._structure["head"]

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        found = self._head(x)
        with probe.captured(self.model, [found.features.name]) as outputs:
            logits = self.model(x)
        weight = probe.submodule(self.model, found.head).weight
        classes = explained_class(logits, target)
        maps = torch.einsum("bk,bkhw->bhw", weight[classes], outputs[found.features.name])  # type: ignore[index]
        return Explanation(logits, maps)


@INTERPRETERS.register("gradcam", paper="Selvaraju et al. 2017; Zhang et al. 2020, A1", needs=("convolution",))
@dataclass(frozen=True, eq=False)
class GradCAM(Interpreter):
    """Grad-CAM: ``m_c = ReLU(sum_k w_{k,c} a_k)``, ``w_{k,c}`` the mean of ``d f_c / d a_k`` (Zhang et al. eq. 14-15).

    ``f_c`` is the logit, as in Selvaraju et al.: the probability's gradient mixes all logits and vanishes on confident
    inputs. The channel weights stay in the graph.

    Args:
        layer: dotted name of the layer; default the last one that gives a feature map.
        relu: eq. 15's ReLU; off for a signed map.
    """

    layer: str | None = None
    relu: bool = True

    @cached_property
    def _structure(self) -> dict[str, str]:
        return {}

    def _layer(self, x: Tensor) -> str:
        if "layer" not in self._structure:
            layer = self.layer or probe.last_feature_layer(self.model, x.detach()).name
            self._structure["layer"] = layer
        return self._structure["layer"]

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        name = self._layer(x)
        # Without a leaf that requires grad there is no graph to differentiate: weights may all be frozen.
        x = x if x.requires_grad else x.detach().requires_grad_()
        with probe.captured(self.model, [name]) as outputs:
            logits = self.model(x)
        features = _feature_map(name, outputs)
        score = pick(logits, explained_class(logits, target)).sum()
        (gradient,) = torch.autograd.grad(score, features, create_graph=graph)
        maps = torch.einsum("bk,bkhw->bhw", gradient.mean((2, 3)), features)
        # Not maps.relu(): a swap of the network's rectifiers must leave the method's own alone.
        return Explanation(logits, torch.where(maps > 0, maps, 0) if self.relu else maps)


def _feature_map(name: str, outputs: dict[str, Tensor]) -> Tensor:
    if name not in outputs:
        raise UnsupportedModelError(f"layer {name!r} does not run in a forward pass: Grad-CAM needs one that does")
    if outputs[name].dim() != 4:
        raise UnsupportedModelError(
            f"layer {name!r} gives shape {list(outputs[name].shape)}; Grad-CAM needs a feature map [B, C, h, w]"
        )
    return outputs[name]
