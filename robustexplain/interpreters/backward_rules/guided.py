"""Guided backpropagation, and Grad-CAM at its resolution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ... import maps as ops
from ...autograd import layers
from ...autograd.tape import Call, Tape, record
from ...checks import Kind
from ...errors import UnsupportedModelError
from ...maps import positive
from ...registry import INTERPRETERS
from ..base import Channels, Explanation, Interpreter, differentiable, explained_class, reduce_channels


@INTERPRETERS.register("guided-backprop", paper="Springenberg et al. 2015, section 3.4", needs=("rectifiers",))
@dataclass(frozen=True, eq=False)
class GuidedBackprop(Interpreter):
    """Guided backpropagation: the logit's gradient, which passes a rectifier only where it is positive itself.

    Rectifiers are found by what the model calls, so ReLU6, functional and fused ones are guided too. Under a smooth
    stand-in for the rectifiers, the gate on the gradient is smoothed like the one on the input (as in the code of
    Dombrowski et al. 2019).

    Args:
        channels: how channels become one map: signed sum, sum of magnitudes, or largest magnitude.

    Raises:
        UnsupportedModelError: on the first input, for a model without rectifiers (GELU, SiLU): its guided gradient
            would silently be the plain one.
    """

    channels: Channels = "sum"

    is_gradient: ClassVar[bool] = True

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        tape = record(self.model, differentiable(x))
        guided = guided_gradient(tape, explained_class(tape.logits, target), graph)
        return Explanation(tape.logits, reduce_channels(guided, self.channels))


@INTERPRETERS.register(
    "guided-gradcam", paper="Selvaraju et al. 2017, section 3.2", needs=("rectifiers", "convolution")
)
@dataclass(frozen=True, eq=False)
class GuidedGradCAM(Interpreter):
    """Guided Grad-CAM: guided backpropagation times Grad-CAM's map, resized to the input.

    Args:
        layer: dotted name of Grad-CAM's layer; default the last one that gives a feature map.
        channels: how channels of the guided gradient become one map.
        relu: Grad-CAM's ReLU; off for a signed map.

    Raises:
        UnsupportedModelError: on the first input, for a model without rectifiers or without a feature map.
    """

    layer: str | None = None
    channels: Channels = "sum"
    relu: bool = True

    is_gradient: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @cached_property
    def _structure(self) -> dict[str, str]:
        return {}

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = differentiable(x)
        if "layer" not in self._structure:
            self._structure["layer"] = self.layer or layers.last_feature_layer(self.model, x.detach()).name
        name = self._structure["layer"]
        tape = record(self.model, x, [name])
        classes = explained_class(tape.logits, target)
        cam = _grad_cam(tape, name, classes, graph)
        cam = positive(cam) if self.relu else cam
        guided = reduce_channels(guided_gradient(tape, classes, graph), self.channels)
        return Explanation(tape.logits, guided * ops.resize(cam, x.shape[-2:]))


def guided_gradient(tape: Tape, classes: Tensor, graph: bool) -> Tensor:
    """The guided gradient of the logits of ``classes`` ``[B]`` by the recorded input, of its shape."""
    if not any(step.rectifies for step in tape.steps[1:]):
        raise UnsupportedModelError(
            "guided backpropagation changes the backward pass of rectifiers (ReLU, ReLU6, leaky ReLU), but this model "
            "calls none: the map would silently be the plain gradient; use Gradient or InputXGradient"
        )

    def rule(step: Call, at: list[Tensor]) -> list[Tensor | None]:
        # torch.relu, not torch.where: a swap of the network's rectifiers smooths this gate with the others.
        return list(step.vjp([torch.relu(at[0])] if step.rectifies else at, graph))

    return tape.back(tape.seed(classes), rule)


def _grad_cam(tape: Tape, name: str, classes: Tensor, graph: bool) -> Tensor:
    step, output = tape.layers[name]
    features = step.outputs[output]
    if features.dim() != 4:
        raise UnsupportedModelError(f"layer {name!r} gives shape {list(features.shape)}; a feature map is [B, C, h, w]")
    stop = step, output
    gradient = tape.back(tape.seed(classes), lambda s, at: list(s.vjp(at, graph)), stop)
    return torch.einsum("bk,bkhw->bhw", gradient.mean((2, 3)), features)
