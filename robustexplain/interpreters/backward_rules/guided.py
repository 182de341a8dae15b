"""Guided backpropagation, and Grad-CAM at its resolution."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from ... import maps as ops
from ...autograd import layers
from ...autograd.kept import Kept
from ...autograd.tape import Call, Tape, record
from ...checks import Kind
from ...errors import UnsupportedModelError
from ...maps import positive
from ...models.in_front import in_input_coordinates
from ...registry import INTERPRETERS
from ..base import (
    Channels,
    Explanation,
    Interpreter,
    explained_class,
    narrowed,
    reduce_channels,
    requiring_grad,
    wide_dtype,
)


@INTERPRETERS.register("guided-backprop", paper="Springenberg et al. 2015, section 3.4", needs=("rectifiers",))
@dataclass(frozen=True, eq=False)
class GuidedBackprop(Interpreter):
    """Guided backpropagation: the logit's gradient, passed through a rectifier only where it is positive.

    Rectifiers are recognised among the functions that the model calls, so ReLU6, functional and fused ones are guided
    too. Under a smooth surrogate of the rectifiers, the gate on the gradient is smoothed like the one on the input (as
    in the code of Dombrowski et al. 2019).

    Args:
        channels: how channels become one map: signed sum, sum of magnitudes, or largest magnitude.

    Raises:
        UnsupportedModelError: on the first input, for a model without rectifiers (GELU, SiLU): its guided gradient
            would silently be the plain one.
    """

    channels: Channels = "sum"

    is_gradient: ClassVar[bool] = True

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        tape = record(self.model, requiring_grad(x))
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
    def _layers(self) -> Kept[tuple[int, ...], str]:
        return Kept()

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        x = requiring_grad(x)
        # Of a smaller image another layer may be the last with a grid.
        name = self.layer or self._layers.get_or(
            tuple(x.shape[-2:]), lambda: layers.last_feature_layer(self.model, x.detach()).name
        )
        tape = record(self.model, x, [name])
        classes = explained_class(tape.logits, target)
        cam = _grad_cam(tape, name, classes, graph)
        cam = positive(cam) if self.relu else cam
        cam = in_input_coordinates(self.model, cam, x)
        guided = reduce_channels(guided_gradient(tape, classes, graph), self.channels)
        wide = guided.to(wide_dtype(guided)) * ops.resize(cam, x.shape[-2:])
        return Explanation(tape.logits, narrowed(wide, x.dtype, "GuidedGradCAM"))


def guided_gradient(tape: Tape, classes: Tensor, graph: bool) -> Tensor:
    """The guided gradient of the logits of ``classes`` ``[B]`` by the recorded input, of its shape."""
    if not any(step.rectifies for step in tape.steps[1:]):
        raise UnsupportedModelError(
            "guided backpropagation changes the backward pass of rectifiers (ReLU, ReLU6, leaky ReLU), but this model "
            "calls none: the map would silently be the plain gradient; use Gradient or InputXGradient"
        )

    def rule(step: Call, at_outputs: list[Tensor]) -> list[Tensor | None]:
        # torch.relu, not torch.where: swapping the network's rectifiers for smooth ones then smooths this gate too.
        return list(step.vjp([torch.relu(at_outputs[0])] if step.rectifies else at_outputs, graph))

    return tape.backward(tape.start_at(classes), rule)


def _grad_cam(tape: Tape, name: str, classes: Tensor, graph: bool) -> Tensor:
    step, output = tape.layers[name]
    features = step.outputs[output]
    if features.dim() != 4:
        raise UnsupportedModelError(f"layer {name!r} gives shape {list(features.shape)}; a feature map is [B, C, h, w]")
    stop = step, output
    gradient = tape.backward(tape.start_at(classes), lambda s, at_outputs: list(s.vjp(at_outputs, graph)), stop)
    return torch.einsum("bk,bkhw->bhw", gradient.mean((2, 3)), features)
