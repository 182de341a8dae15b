"""Interpreters of vision transformers that multiply attention from the output back to the patches."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Literal

import annotated_types as at
import torch
from torch import Tensor, nn

from ...autograd.blanking import blanked, covers, outputs_seen, probe, transforms_left_out
from ...autograd.kept import Kept
from ...checks import Kind
from ...door import answer
from ...errors import UnsupportedModelError
from ...fields import Fraction
from ...hidden import refuse_hidden
from ...maps import positive
from ...models.in_front import in_input_coordinates
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class, pick, requiring_grad
from .token_grid import Attentions, Grid, token_grid

Discard = Annotated[float, at.Ge(0), at.Lt(1)]
"""A share of entries that are dropped: not all of them."""


@INTERPRETERS.register(
    "attention-rollout", paper="Abnar and Zuidema 2020; Chefer et al. 2021, eq. 5-6", needs=("attention",)
)
@dataclass(frozen=True, eq=False)
class AttentionRollout(Interpreter):
    """Attention rollout: the product of all layers' attention, each mixed with the identity for its residual path.

    ``A_l = (1 - r) fuse_h(attention) + r I`` with rows rescaled to sum to one; the map is the weight of each patch
    in ``A_L ... A_1`` for the tokens that reach the head (usually the class token; found by their gradient) (Abnar and
    Zuidema 2020, section 3). It is the same for every class. With ``weighting="gradient"`` it depends on the class:
    ``A_l = I + mean_h(ReLU(grad * attention))``, ``grad`` that of the logit (Chefer et al. 2021, eq. 5-6, for
    self-attention); the identity then has the paper's weight and rows are not rescaled.

    Attention is recorded where it is computed, whatever the layer's name; logits equal the model's up to the rounding
    of its fused attention. Only a model is taken whose tokens exchange information by nothing but the attention that is
    recorded, which is tested once for each size of the images: with the identity in its place, a blanked tile must
    change its own token alone. Models with attention in windows, between different sets of tokens, by class tokens or
    pooling queries alone, and hybrids whose convolutions or poolings mix patches, are refused.

    Args:
        weighting: ``none`` (rollout) or ``gradient`` (a map for each class).
        heads: how the heads of a layer become one matrix: ``mean`` (the papers), ``max`` or ``min``.
        residual: ``r``, the weight of the residual path; for ``weighting="none"``.
        discard: the share of each layer's smallest entries set to zero before the mixing, except in the columns of the
            prefix tokens; for ``weighting="none"``. Not in the papers.
    """

    weighting: Literal["none", "gradient"] = "none"
    heads: Literal["mean", "max", "min"] = "mean"
    residual: Fraction = 0.5
    discard: Discard = 0.0

    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    @property
    def class_specific(self) -> bool:  # type: ignore[override]
        """Whether maps depend on the class: only if weighted by its gradient."""
        return self.weighting == "gradient"

    @property
    def explains_scalars(self) -> bool:  # type: ignore[override]
        """Whether maps can be of a scalar: only if they depend on what is explained."""
        return self.class_specific

    @property
    def is_gradient(self) -> bool:  # type: ignore[override]
        """Whether a gradient is a part of the maps."""
        return self.weighting == "gradient"

    @cached_property
    def _tokens(self) -> Kept[tuple[int, ...], _Tokens]:
        """By the size of the images."""
        return Kept()

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        tokens = self._tokens.get_or(tuple(x.shape[-2:]), lambda: _find(self.model, x.detach()))
        x = requiring_grad(x)
        attention: list[Tensor] = []
        with Attentions(attention.append):
            logits = answer(self.model, x)
        classes = explained_class(logits, target)
        if self.weighting == "gradient":
            gradients = torch.autograd.grad(pick(logits, classes).sum(), attention, create_graph=graph)
            layers = [self._weighted(*pair) for pair in zip(attention, gradients, strict=True)]
        else:
            layers = [self._mixed(weights, tokens.grid.prefix) for weights in attention]
        flow = tokens.weights.to(x).expand(len(x), -1)
        # From the output backwards: a vector times each matrix, whereas the full product is cubic in the tokens.
        for layer in reversed(layers):
            flow = torch.einsum("bi,bij->bj", flow, layer)
        maps = tokens.grid.unfold(flow[:, :, None])[:, 0]
        return Explanation(logits, in_input_coordinates(self.model, maps, x))

    def _fused(self, weights: Tensor) -> Tensor:
        if self.heads == "mean":
            return weights.mean(1)
        return weights.amax(1) if self.heads == "max" else weights.amin(1)

    def _mixed(self, weights: Tensor, prefix: int) -> Tensor:
        """``(1 - r) A + r I`` with rows that sum to one, ``[B, N, N]``."""
        fused = _strongest(self._fused(weights), self.discard, prefix)
        identity = torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)
        mixed = (1 - self.residual) * fused + self.residual * identity
        sums = mixed.sum(-1, keepdim=True)
        return mixed / torch.where(sums > 0, sums, 1)

    def _weighted(self, weights: Tensor, gradient: Tensor) -> Tensor:
        """``I + fuse_h(ReLU(grad * A))``, ``[B, N, N]``."""
        fused = self._fused(positive(gradient * weights))
        return fused + torch.eye(fused.shape[-1], dtype=fused.dtype, device=fused.device)


def _strongest(fused: Tensor, discard: float, prefix: int) -> Tensor:
    """The matrices ``[B, N, N]`` with the weakest share of their patch columns set to zero."""
    patches = fused[:, :, prefix:]
    dropped = int(discard * patches[0].numel())
    if not dropped:
        return fused
    weakest = patches.flatten(1).topk(dropped, largest=False).indices
    kept = torch.ones_like(patches).flatten(1).scatter(1, weakest, 0).view_as(patches)
    return torch.cat([fused[:, :, :prefix], patches * kept], 2)


@dataclass(frozen=True)
class _Tokens:
    """The grid of the tokens, and the weight of each as an input of the head: ``[N]``, sums to one."""

    grid: Grid
    weights: Tensor


def _find(model: nn.Module, x: Tensor) -> _Tokens:
    """Check that all attention is over the same tokens, and find those that reach the head."""
    refuse_hidden(model, "attention rollout reads the attention of every layer")
    attention: list[Tensor] = []
    others: list[torch.Size] = []
    x = probe(x)
    with Attentions(attention.append, others.append), transforms_left_out(model):
        logits = answer(model, requiring_grad(x))
    name = type(model).__name__
    if not attention:
        raise UnsupportedModelError(
            f"{name} computes no self-attention [B, heads, N, N] in a forward pass, which attention rollout follows; "
            "use GradCAM or Gradient"
        )
    shapes = {(len(weights), weights.shape[-1]) for weights in attention}
    if len(shapes) > 1 or attention[0].shape[0] != 1:
        raise UnsupportedModelError(
            f"attention rollout needs every layer to attend over the same tokens of an image; {name} attends over "
            f"{', '.join(f'{b} x {n}' for b, n in sorted(shapes))} (sets x tokens): in windows, or tokens are merged"
        )
    if others:
        raise UnsupportedModelError(
            f"attention rollout follows attention of all tokens to all tokens; {name} also computes attention of shape "
            f"{list(others[0])}, which it would leave out (fewer keys than queries, or a class token's alone)"
        )
    # Logits get different weights, so that their gradients do not cancel.
    weights = torch.arange(1, logits.shape[1] + 1, device=x.device, dtype=x.dtype)
    (gradient,) = torch.autograd.grad((logits * weights).sum(), attention[-1])
    reached = (gradient.abs().sum((0, 1, 3)) > 0).to(x.dtype)
    if not reached.any():
        raise UnsupportedModelError(f"no token of the last attention of {name} reaches the logits")
    grid = token_grid(model, x, reached.numel())
    if not _covered(model, x, grid, bool(reached[grid.prefix :].any())):
        raise UnsupportedModelError(
            f"attention rollout needs attention to be all that mixes the tokens of {name}; with the identity in place "
            "of all attention that was recorded, a blanked patch still changes other tokens (convolutions, pooling, or "
            "attention that computes no softmax over tokens): use GradCAM or a gradient method"
        )
    return _Tokens(grid, reached / reached.sum())


@torch.no_grad()
def _covered(model: nn.Module, x: Tensor, grid: Grid, patches_are_read: bool) -> bool:
    """Whether tokens mix by the recorded attention alone, and no layer holds them in another order."""

    def identity(weights: Tensor) -> Tensor:
        return torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device).expand_as(weights)

    last: list[Tensor] = []

    def keep(name: str, output: Tensor) -> None:
        if output.dim() == 3 and output.shape[1] == grid.prefix + grid.cells:
            last[:] = [output]

    with Attentions(identity), outputs_seen(model, keep), transforms_left_out(model):
        logits = answer(model, blanked(probe(x)), finite=False)
    if not last:
        return False
    tokens = (last[0][1:] - last[0][:1]).abs().amax(2)
    changed = grid.unfold(tokens[:, :, None])[:, 0]
    own = covers(grid.height, grid.width).to(changed.device)
    least = 1e-4 * changed.amax((1, 2), keepdim=True)
    alone = bool((changed <= least)[~own].all() and changed.any() and (tokens[:, : grid.prefix] <= least[:, 0]).all())
    unread = patches_are_read or bool((logits[1:] - logits[:1]).abs().max() <= 1e-4 * logits.abs().max())
    return alone and unread
