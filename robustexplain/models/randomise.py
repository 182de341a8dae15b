"""Random weights: the network from the logits down, or one layer at a time (Adebayo et al. 2018, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..autograd.layers import hooks, submodule
from ..door import answer
from ..errors import UnsupportedModelError
from ..hidden import refuse_hidden
from ..random_streams import derive, global_state, seed_global_state


@dataclass(frozen=True)
class LayerGroup:
    """Some layers that are randomised together.

    Args:
        name: that of the layer nearest to the logits.
        modules: dotted names of the modules that own the weights.
    """

    name: str
    modules: tuple[str, ...]


def stages(model: nn.Module, x: Tensor, most: int = 12) -> list[LayerGroup]:
    """The layers of a model from the logits down, in at most ``most`` groups.

    A layer is a module with a weight matrix or kernel, together with the norms and scales that run behind it. Layers
    are found by what runs in a forward pass on ``x[:1]``, in the order in which it begins to.

    Raises:
        UnsupportedModelError: if no module owns a weight.
    """
    refuse_hidden(model, "layers are randomised one after the other")
    layers: list[list[str]] = []
    for name, module in _in_order(model, x):
        kernel = any(p.dim() > 1 for p in module.parameters(recurse=False))
        if kernel or not layers:
            layers.append([name])
        else:
            layers[-1].append(name)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no weights that a forward pass uses")
    down = [tuple(reversed(layer)) for layer in reversed(layers)]
    # The logits' layer is a group of its own, as in the paper's figures; the others are divided evenly.
    rest = down[1:]
    cuts = torch.linspace(0, len(rest), min(most - 1, len(rest)) + 1).round().int().tolist()
    groups = [down[:1], *(rest[a:b] for a, b in pairwise(cuts))] if rest else [down]
    modules = [tuple(name for layer in group for name in layer) for group in groups]
    return [LayerGroup(group[0][-1] or type(model).__name__, own) for group, own in zip(groups, modules, strict=True)]


def _in_order(model: nn.Module, x: Tensor) -> list[tuple[str, nn.Module]]:
    """Modules with weights or statistics of their own, in the order in which their first calls begin.

    One whose weights are used without a call of it, such as the last layer of an attention, follows the module that it
    is in; a module's own parameters, such as a class token, are used before what it calls.
    """
    names = {module: name for name, module in model.named_modules()}
    seen: dict[str, list[str]] = {}

    def begun(module: nn.Module, args: object, kwargs: object) -> None:
        seen.setdefault(names[module], [names[module]])

    with hooks(list(names), before=begun), torch.no_grad():
        answer(model, x[:1])
    for name in _used(model, {name: module for module, name in names.items() if name not in seen}, x):
        around = name
        while around and around not in seen:
            around = around.rpartition(".")[0]
        seen.setdefault(around, [around]).append(name)
    modules = {name: module for module, name in names.items()}
    order = [(name, modules[name]) for some in seen.values() for name in some]
    return [(name, module) for name, module in order if _drawn(module)]


def _used(model: nn.Module, uncalled: dict[str, nn.Module], x: Tensor) -> list[str]:
    """Those of the modules that are not called whose own weights reach the logits all the same; no auxiliary heads."""
    own = {name: list(module.parameters(recurse=False)) for name, module in uncalled.items()}
    weights = [weight for some in own.values() for weight in some]
    if not weights:
        return []
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            logits = answer(model, x[:1]).sum()
            slopes = torch.autograd.grad(logits, weights, allow_unused=True) if logits.requires_grad else ()
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)
    reached = {id(weight) for weight, slope in zip(weights, slopes, strict=False) if slope is not None}
    return [name for name, some in own.items() if any(id(weight) in reached for weight in some)]


def _drawn(module: nn.Module) -> bool:
    own = any(True for _ in module.parameters(recurse=False))
    return own or isinstance(module, nn.modules.batchnorm._BatchNorm)


@torch.no_grad()
def randomise(model: nn.Module, stage: LayerGroup, x: Tensor, seed: int) -> None:
    """Draw the weights of a stage anew, in place, as they are before training.

    Statistics of batch norms are measured again on ``x`` where they are drawn anew: those of the trained network would
    silence or blow up what is random now.

    Args:
        model: in eval mode; stays so.
        stage: which layers.
        x: images ``[B, C, H, W]``.
        seed: of the draws; the same layer gets the same weights whichever layers went before.
    """
    norms = []
    for name in stage.modules:
        module = submodule(model, name) if name else model
        with global_state(x.device):
            seed_global_state(derive(seed, name), x.device)
            _draw(module)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            norms.append(module)
    _measure(model, norms, x)


def _draw(module: nn.Module) -> None:
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
        return
    for parameter in module.parameters(recurse=False):
        noise = torch.randn(parameter.shape, dtype=parameter.dtype).to(parameter.device)
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs()
        parameter.copy_(parameter.mean() + spread * noise)


def _measure(model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], x: Tensor) -> None:
    if not norms or len(x) < 2:
        return
    kept = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
        answer(model, x)
    finally:
        for norm, momentum in zip(norms, kept, strict=True):
            norm.momentum = momentum
            norm.eval()
