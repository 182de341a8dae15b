"""Networks with denoising blocks on their feature maps (Xie et al. 2019)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..autograd.layers import feature_layers, full_name, hooks, proportional, submodule
from ..door import answer
from ..errors import InputError, UnsupportedModelError
from ..hidden import refuse_hidden
from ..registry import PARTS
from .around import Around
from .classifier import Classifier, ModelSpec
from .rebuilding import describe
from .transformed import Transformed

Filter = Literal["non-local", "dot-product", "gaussian", "mean", "median"]
"""What a block does to a feature map before its 1x1 convolution."""
FILTERS: tuple[Filter, ...] = ("non-local", "dot-product", "gaussian", "mean", "median")
STAGES = 4
"""At how many grids blocks are put where no layers are named: the last ones, as in the paper's ResNets."""


class DenoisingBlock(nn.Module):
    """``x + BN(conv1x1(filter(x)))`` (Xie et al. 2019, section 4, Figure 4).

    The batch norm begins with a scale of zero, as in the authors' code: a new block changes nothing.

    Args:
        channels: ``C`` of the feature map.
        filter: ``non-local``: means over all positions weighted by ``softmax(theta(x_i) phi(x_j) / sqrt(C/2))``
            (section 4.1, Gaussian form), with embeddings of ``C/2`` channels. ``dot-product``: sums weighted by
            ``x_i^T x_j / N``, without embeddings (section 4.1). ``mean`` and ``median`` of 3x3 (sections 4.3 and 4.4).
            ``gaussian``: the 3x3 kernel ``[1 2 1] [1 2 1]^T / 16``, which is not in the paper.
    """

    def __init__(self, channels: int, filter: Filter = "non-local") -> None:
        super().__init__()
        if filter not in FILTERS:
            raise InputError(f"filter must be one of {', '.join(FILTERS)}, got {filter!r}")
        self.filter = filter
        if filter == "non-local":
            inner = max(1, channels // 2)
            self.theta = nn.Conv2d(channels, inner, 1, bias=False)
            self.phi = nn.Conv2d(channels, inner, 1, bias=False)
            for embedding in (self.theta, self.phi):
                nn.init.normal_(embedding.weight, std=0.01)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(self.bn.weight)

    def extra_repr(self) -> str:
        """The filter, by which two blocks without weights of their own are told apart."""
        return self.filter

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, h, w]``, as ``x``."""
        out: Tensor = x + self.bn(self.conv(self.filtered(x)))
        return out

    def filtered(self, x: Tensor) -> Tensor:
        """The feature map behind the filter, ``[B, C, h, w]``."""
        if self.filter == "non-local":
            theta, phi = self.theta(x).flatten(2), self.phi(x).flatten(2)
            return _weighted(x, (theta.mT @ phi / theta.shape[1] ** 0.5).softmax(2))
        if self.filter == "dot-product":
            given = x.flatten(2)
            return _weighted(x, given.mT @ given / given.shape[2])
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        if self.filter == "median":
            windows = F.unfold(padded, 3).unflatten(1, (x.shape[1], 9))
            # Not the median's own values: methods with rules for layers do not see what a named tuple holds.
            chosen = windows.detach().median(2, keepdim=True).indices
            found: Tensor = windows.gather(2, chosen)[:, :, 0].unflatten(2, x.shape[2:])
            return found
        row = x.new_tensor([1.0, 1.0, 1.0] if self.filter == "mean" else [0.75, 1.5, 0.75]) / 3
        kernel = (row[:, None] * row).expand(x.shape[1], 1, 3, 3)
        return F.conv2d(padded, kernel, groups=x.shape[1])


def _weighted(x: Tensor, weights: Tensor) -> Tensor:
    """``[B, C, h, w]``: at each position the sum over all positions, weighted by ``[B, h w, h w]``."""
    found: Tensor = (x.flatten(2) @ weights.mT).unflatten(2, x.shape[2:])
    return found


class _Followed(nn.Module):
    """A layer with a block behind it."""

    def __init__(self, layer: nn.Module, denoise: nn.Module) -> None:
        super().__init__()
        self.layer, self.denoise = layer, denoise

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = self.denoise(self.layer(*args, **kwargs))
        return out


@PARTS.register("denoised")
def denoised(
    model: nn.Module, layers: Mapping[str, int], filter: Filter = "non-local", transforms: Sequence[str] = ()
) -> nn.Module:
    """A copy of ``model`` with a new :class:`DenoisingBlock` behind each of ``layers``; its answers are the same.

    Layers keep their names, but for those inside of a layer that is neither an ``nn.Sequential`` nor stands in one.

    Args:
        model: any module; one that ``robustexplain.models`` builds can be saved and rebuilt with its blocks. A system
            with a model of your own is loaded with ``model=denoised(your_model, layers, filter)``.
        layers: the channels of each layer by its dotted name: :func:`stage_ends`.
        filter: of the blocks.
        transforms: names of transforms in front of a ``Classifier``; for a model that is rebuilt.

    Raises:
        UnknownNameError: a name that no layer has.
        UnsupportedModelError: a model whose modules cannot be seen.
    """
    refuse_hidden(model, "denoising blocks are put behind its layers")
    if not layers:
        raise InputError("denoising blocks are put behind layers: name one at least")
    names = {full_name(model, name): int(channels) for name, channels in layers.items()}
    if isinstance(model, (Around, Transformed)):
        prefix = f"{model.layers_inside}."
        inner = denoised(model.model, {name.removeprefix(prefix): c for name, c in names.items()}, filter)
        return model.around(inner) if isinstance(model, Around) else Transformed(inner, model.transform_names)
    described = _described(model)
    made = copy.deepcopy(model)
    like = next((p for p in made.parameters() if p.is_floating_point()), torch.empty(0))
    for name, channels in names.items():
        block = DenoisingBlock(channels, filter).to(like.device, like.dtype)
        _put_behind(made, name, block.train(submodule(made, name).training))
    for part in made.modules():
        # What described a part describes it no longer.
        if isinstance(getattr(part, "spec", None), ModelSpec):
            part.spec = None  # type: ignore[assignment]
    if described is not None:
        made.spec = ModelSpec("denoised", {"model": described, "layers": names, "filter": filter})  # type: ignore[assignment]
    return made.with_transforms(transforms) if transforms and isinstance(made, Classifier) else made


def _described(model: nn.Module) -> dict[str, Any] | None:
    if getattr(model, "spec", None) is None:
        return None
    try:
        return describe(model)
    except InputError:
        return None


def _put_behind(model: nn.Module, name: str, block: nn.Module) -> None:
    """Put ``block`` behind a layer, without another name for any layer where that can be."""
    path, _, own = name.rpartition(".")
    layer, parent = model.get_submodule(name), model.get_submodule(path)
    if _in_order(layer):
        layer.add_module("denoise", block)
    elif _in_order(parent):
        children = dict(parent.named_children())
        for child in children:
            delattr(parent, child)
        for child, part in children.items():
            parent.add_module(child, part)
            if child == own:
                parent.add_module(f"{own}_denoise", block)
    else:
        setattr(parent, own, _Followed(layer, block))


def _in_order(module: nn.Module) -> bool:
    """Whether a module calls its children in their order, and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def stage_ends(model: nn.Module, x: Tensor, most: int = STAGES) -> dict[str, int]:
    """The last layer at each grid size and its channels, finest first, at the last ``most`` grid sizes.

    A layer inside of a block that changes the grid (the first convolution of a strided residual block) is passed over.

    Args:
        model: in eval mode.
        x: one input at least, ``[B, C, H, W]``; what it shows does not matter.
        most: how many.

    Raises:
        UnsupportedModelError: no feature maps ``[B, C, h, w]``.
    """
    found = [layer for layer in feature_layers(model, x) if proportional(layer.height, layer.width, x)]
    grids = {layer.name: (layer.height, layer.width) for layer in found}
    changing = {
        name
        for name, grid in grids.items()
        if not _in_order(model.get_submodule(name))
        and any(inner.startswith(f"{name}.") and grids[inner] != grid for inner in grids)
    }
    ends: dict[tuple[int, int], tuple[str, int]] = {}
    coarsest = x.shape[2] * x.shape[3]
    for layer in found:
        # Grids only shrink: attention's [B, heads, N, N] is no feature map.
        if layer.height * layer.width > coarsest:
            continue
        coarsest = layer.height * layer.width
        if not any(layer.name.startswith(f"{name}.") for name in changing):
            ends.pop(grids[layer.name], None)
            ends[grids[layer.name]] = layer.name, layer.channels
    if not ends:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no feature maps [B, C, h, w] that could be denoised: take a convolutional "
            "network, or name layers that give some"
        )
    return dict(list(ends.values())[-most:])


@torch.no_grad()
def check_denoised(made: nn.Module, model: nn.Module, x: Tensor) -> None:
    """Refuse a network in which a new block does not run, or no longer answers as ``model`` does.

    Args:
        made: what :func:`denoised` made of ``model``.
        model: the network without blocks; both in eval mode.
        x: one input at least.

    Raises:
        UnsupportedModelError: naming the block.
    """
    ran: set[nn.Module] = set()
    blocks = {name: part for name, part in made.named_modules() if isinstance(part, DenoisingBlock)}
    try:
        with hooks(list(blocks.values()), lambda module, args, output: ran.add(module)):
            found = answer(made, x[:1])
    except (TypeError, AttributeError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with denoising blocks behind {', '.join(blocks)}: {error}"
        ) from error
    idle = [name for name, block in blocks.items() if block not in ran]
    if idle:
        raise UnsupportedModelError(
            f"the denoising block {idle[0]!r} does not run: {type(model).__name__} calls that layer in another way"
        )
    if not torch.allclose(found, answer(model, x[:1]), rtol=1e-4, atol=1e-5):
        raise UnsupportedModelError(
            f"{type(model).__name__} answers otherwise with denoising blocks that change nothing"
        )
