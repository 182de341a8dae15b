"""Finding layers by their behaviour in a forward pass, and reading their outputs with hooks that are removed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..door import answer
from ..errors import UnknownNameError, UnsupportedModelError
from ..hidden import refuse_hidden
from .blanking import Blanked, network_modules, probe
from .hooks import hooks as hooks


class _Outputs(dict[str, Tensor]):
    """Outputs of layers by name; a layer that did not run is an error that says why."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def __missing__(self, name: str) -> Tensor:
        raise UnsupportedModelError(f"layer {name!r} of {type(self.model).__name__} does not run in a forward pass")


@contextmanager
def captured(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of named submodules, filled in by the forward passes that this thread runs inside the block.

    The layer's output is replaced by a clone, so that an in-place activation behind the layer cannot overwrite the
    captured tensor.

    Raises:
        UnknownNameError: a name that no submodule has.
        UnsupportedModelError: a model whose modules cannot be seen; on reading, a layer that did not run.
    """
    refuse_hidden(model, "the output of a layer is read")
    outputs, layers = _Outputs(model), [submodule(model, name) for name in names]

    def keep(module: nn.Module, args: Any, output: Any) -> Tensor | None:
        # A module may go by several names.
        outputs.update({name: output for name, layer in zip(names, layers, strict=True) if layer is module})
        return output.clone() if isinstance(output, Tensor) else None

    with hooks(list(dict.fromkeys(layers)), keep):
        yield outputs


def submodule(model: nn.Module, name: str) -> nn.Module:
    """The submodule of that dotted name; ``UnknownNameError`` with the nearest names if there is none."""
    return model.get_submodule(full_name(model, name))


def full_name(model: nn.Module, name: str) -> str:
    """The name of a submodule in full, where it is one of the model that ``model`` stands around.

    Raises:
        UnknownNameError: with the nearest names.
    """
    modules = dict(model.named_modules())
    for full in names_inside(model, name):
        if full in modules and name:
            return full
    raise UnknownNameError("layer", name, (n for n in modules if n))


def names_inside(model: nn.Module, name: str) -> Iterator[str]:
    """What ``name`` may be called in full: as it is, or inside of the models that ``model`` stands around."""
    prefix = ""
    yield name
    while inside := getattr(model, "layers_inside", ""):
        model, prefix = model.get_submodule(inside), f"{prefix}{inside}."
        yield prefix + name


@dataclass(frozen=True)
class FeatureLayer:
    """A module that gave a feature map in a forward pass: its name, channels and grid."""

    name: str
    channels: int
    height: int
    width: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``C, h, w``."""
        return self.channels, self.height, self.width


def is_feature_map(output: Any, x: Tensor) -> bool:
    """Whether ``output`` is a map ``[B, C, h, w]`` above 1x1, and not one with its channels last.

    They are last where only the first two sides have the proportions of the image ``x``: windowed transformers.
    """
    if not isinstance(output, Tensor) or output.dim() != 4 or output.shape[2] * output.shape[3] <= 1:
        return False
    first, second, third = output.shape[1:]
    return proportional(second, third, x) or not proportional(first, second, x)


def proportional(height: int, width: int, x: Tensor) -> bool:
    """Whether a grid has the proportions of the image ``x``."""
    # A stride that does not divide the image, or a border, changes a side by a pixel or two.
    return abs(height * x.shape[3] - width * x.shape[2]) <= 2 * max(x.shape[2:])


@dataclass(frozen=True)
class _Captured:
    """A module's feature map: its mean over positions ``[1, C]``, and whether the module only passes its input on."""

    layer: FeatureLayer
    mean: Tensor
    passed_on: bool


@torch.no_grad()
def _feature_maps(model: nn.Module, x: Tensor) -> tuple[list[_Captured], Tensor]:
    """Every feature map of one forward pass in the order they were made, and the logits."""
    refuse_hidden(model, "feature maps are looked for in the outputs of layers")
    seen: list[_Captured] = []
    names = network_modules(model)
    before: Tensor | None = None

    def record(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal before
        if not is_feature_map(output, x):
            return
        bare = next(module.parameters(), None) is None
        layer = FeatureLayer(names[module], *output.shape[1:])
        seen.append(_Captured(layer, output.mean((2, 3)), bare and before is not None and _passed_on(before, output)))
        # A clone, because an in-place activation may overwrite the output.
        before = output.clone()

    with hooks(list(names), record):
        logits = answer(model, x[:1])
    return seen, logits


def _passed_on(before: Tensor, output: Tensor) -> bool:
    """Whether ``output`` is ``before``, as it is or spread over a larger grid."""
    larger = before.shape[1] == output.shape[1] and output.shape[2:].numel() > before.shape[2:].numel()
    return larger or torch.equal(before, output)


def feature_layers(model: nn.Module, x: Tensor) -> list[FeatureLayer]:
    """The modules that give a feature map ``[B, C, h, w]`` with a grid above 1x1, in the order they ran.

    A module that runs twice appears once: where it last ran.
    """
    last: dict[str, FeatureLayer] = {}
    for found in _feature_maps(model, x)[0]:
        last.pop(found.layer.name, None)
        last[found.layer.name] = found.layer
    return list(last.values())


def last_feature_layer(model: nn.Module, x: Tensor) -> FeatureLayer:
    """The last feature map before global pooling, which CAM and guided Grad-CAM use.

    A pooling to a fixed grid that changes nothing or enlarges (VGG's), a dropout, or a map of class scores whose
    average is the logits (SqueezeNet's) is skipped: the feature map in front of it is returned. It is seen to be a map
    of the image by blanking patches of random images of the size of ``x``.

    Raises:
        UnsupportedModelError: if no module gives a feature map, or the last one does not follow the image.
    """
    found = shaped_last_feature_layer(model, x)
    blanked = Blanked(model, x, [found.name])
    if blanked.agrees(lambda seen: seen[found.name].sums.get(0) if found.name in seen else None) is False:
        raise UnsupportedModelError(
            f"layer {found.name!r} of {type(model).__name__} gives shape {[len(x), *found.shape]}, but where a patch "
            "of the image is blanked it does not change most at that place: it is no feature map [B, C, h, w]; use "
            "GradCAM, which also reads tokens, or a gradient method such as Gradient"
        )
    return found


def shaped_last_feature_layer(model: nn.Module, x: Tensor) -> FeatureLayer:
    """The same by shape alone; ``UnsupportedModelError`` if no module gives a feature map."""
    seen, logits = _feature_maps(model, probe(x))
    if not seen:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no convolutional feature map (no module gives [B, C, h, w] with a grid above "
            "1x1); CAM methods need one: use a gradient method such as Gradient"
        )
    end = len(seen)
    mean, scores = seen[-1].mean, seen[-1].layer.channels
    # Behind a scalar to explain the model's own logits stand last.
    own = logits[:, -scores:]
    if mean.shape == own.shape and logits.shape[1] - scores <= 1 and _same(mean, own):
        while end > 0 and seen[end - 1].layer.channels == scores:
            end -= 1
    while end > 1 and seen[end - 1].passed_on:
        end -= 1
    return seen[end - 1].layer if end else seen[-1].layer


def pyramid(model: nn.Module, x: Tensor) -> list[FeatureLayer]:
    """The last feature map at each grid size, finest first, as a U-Net takes them from its encoder.

    Raises:
        UnsupportedModelError: if there are no feature maps at two grid sizes, as in a vision transformer.
    """
    by_grid: dict[tuple[int, int], FeatureLayer] = {}
    coarsest = x.shape[2] * x.shape[3]
    for layer in feature_layers(model, x):
        # An encoder's grids only shrink; attention's [B, heads, N, d] and [B, heads, N, N] are no feature maps.
        if proportional(layer.height, layer.width, x) and layer.height * layer.width <= coarsest:
            by_grid[layer.height, layer.width] = layer
            coarsest = layer.height * layer.width
    if len(by_grid) < 2:
        raise UnsupportedModelError(
            f"{type(model).__name__} has feature maps at {len(by_grid)} grid sizes; a U-Net needs at least two: take a "
            "convolutional network as the encoder"
        )
    return sorted(by_grid.values(), key=lambda layer: -layer.height * layer.width)


@dataclass(frozen=True)
class PooledHead:
    """A linear head behind global average pooling: the feature layer, and the head's weights by name."""

    features: FeatureLayer
    head: str


@torch.no_grad()
def pooled_head(model: nn.Module, x: Tensor) -> PooledHead:
    """Find, by its behaviour, the linear layer that turns pooled features into logits (CAM, eq. 6).

    Raises:
        UnsupportedModelError: if the logits are not one linear layer on the average of the last feature map.
    """
    layer, x = last_feature_layer(model, x), probe(x)
    with captured(model, [layer.name]) as outputs:
        heads = _logit_layers(model, x, halved=True)
    average = outputs[layer.name].mean((2, 3))
    for name, given in heads:
        if given.shape == average.shape and _same(given, average):
            return PooledHead(layer, name)
    raise UnsupportedModelError(
        f"CAM needs logits that are one linear layer on the global average of the last feature map; in "
        f"{type(model).__name__} that is not so behind layer {layer.name!r}. Use GradCAM, which needs no such head"
    )


def head_weight(model: nn.Module, pooled: PooledHead) -> Tensor:
    """The weights of the head, one row a class, ``[K, C]``."""
    weight: Tensor = submodule(model, pooled.head).weight  # type: ignore[assignment]
    return two_classes(weight.mT).mT if len(weight) == 1 else weight


def logit_layer(model: nn.Module, x: Tensor) -> str:
    """The name of the linear layer whose output is the logits, found by its behaviour on ``x[:1]``.

    Raises:
        UnsupportedModelError: if there is none.
    """
    found = _logit_layers(model, x)
    if not found:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layer whose output is the logits")
    return found[-1][0]


@torch.no_grad()
def _logit_layers(model: nn.Module, x: Tensor, *, halved: bool = False) -> list[tuple[str, Tensor]]:
    """The linear layers whose output is the logits of ``x[:1]``, in the order they ran, and their inputs.

    ``halved``: also a layer of one output ``z`` where the logits are ``[-z/2, z/2]``, as of a binary classifier.
    """
    refuse_hidden(model, "the layer that gives the logits is looked for")
    linears: dict[nn.Module, str] = {m: n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    seen: list[tuple[str, Tensor, Tensor]] = []

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        seen.append((linears[module], args[0], output))

    with hooks(list(linears), record):
        logits = answer(model, x[:1])
    as_logits = [(name, given, two_classes(o) if halved and o.shape[1:] == (1,) else o) for name, given, o in seen]
    return [
        (name, given) for name, given, output in as_logits if output.shape == logits.shape and _same(output, logits)
    ]


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one shape are the same up to rounding, whatever the size of their entries."""
    small = 1e-5 * min(1.0, float(other.abs().max()))
    return torch.allclose(one.to(other.dtype), other, rtol=1e-3, atol=small)


def two_classes(z: Tensor) -> Tensor:
    """``[-z/2, z/2]``: logits of two classes ``[B, 2]`` with the probabilities of one logit ``[B, 1]``."""
    return torch.cat([-z, z], 1) / 2
