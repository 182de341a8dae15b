"""RelEx: a mask that keeps the class on noisy copies of the image, and whose complement loses it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ... import maps as ops
from ...autograd.second_derivatives import twice_differentiable
from ...autograd.straight_through import straight_maps
from ...checks import Kind
from ...door import answer
from ...fields import Count, Fraction, Natural, NonNegative, Positive
from ...random_streams import Streams, generator
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class, wide_dtype
from ..gradients.baselines import Baseline, baseline_like, checked_baseline
from ..gradients.gradient import margin
from ..iterative import MaskState
from ..perturbation.removal import chunks
from ..saturation import warn_of_faint_maps

COPIES_AHEAD = 4
"""Noisy copies of a step that an adversary takes: the graph of all its steps must fit into memory."""
TINY = 1e-7


@INTERPRETERS.register("relex", paper="Lim et al. 2021 and code (RelEx)", needs=("gradients",))
@dataclass(frozen=True, eq=False)
class RelEx(Interpreter):
    """A mask that keeps the class on noisy copies of the image and whose complement loses it, found for each image.

    Minimises the mean over copies ``z = x + noise`` of ``-log p_c(z m) - outside log(1 - p_c(z (1 - m)))`` and
    ``l1 mean|m|`` over ``m`` in ``[0, 1]``, of the image's size and channels, by gradients of unit length with
    momentum; the map is the mean of ``m`` over channels. The noise of each step is fixed by ``seed`` and the same for
    every image, so that a map is a function of its input alone.

    Its robustness was published against attacks on other methods only: no graph leads from the map to ``x``, so an
    attack by gradient finds nothing. As MASK it is attacked by its own steps, which are differentiable (:meth:`step`),
    with fresh noise.

    Departures: weights and step size are for means over the mask, so that they fit any size of image; what the mask
    leaves out is ``baseline`` (the code multiplies the normalised image, as ``mean`` does here).

    Args:
        samples: noisy copies in each step; each costs two passes.
        steps: of the mask.
        lr: step size for a gradient with a root mean square of one: the authors' 0.1 for one of length one over
            3 x 224 x 224 is 2.58e-4.
        momentum: of the steps.
        l1: weight of the *mean* of ``|m|``: the authors' 1e-4 of the sum over 3 x 224 x 224 is 15.
        outside: weight of the complement's term.
        sigma: standard deviation of the noise as a share of each image's value range.
        baseline: what stands where the mask is 0, as in :class:`IntegratedGradients`.
        seed: of the start (uniform in ``[0, 0.01]``) and of the noise.
        batch_size: largest number of masked copies in one pass of the model, if a copy of the whole batch fits.
    """

    samples: Count = 50
    steps: Count = 50
    lr: Positive = 2.58e-4
    momentum: Fraction = 0.99
    l1: NonNegative = 15.0
    outside: NonNegative = 1.0
    sigma: NonNegative = 0.1
    baseline: Baseline = 0.0
    seed: Natural = 0
    batch_size: Count = 256

    differentiable: ClassVar[bool] = False
    unit_range: ClassVar[bool] = True
    iterative: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)
    explains_scalars: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "baseline", checked_baseline(self, self.baseline))

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes = explained_class(logits, target)
        state = self.optimise(x.detach(), classes)
        maps = self.map_of(state).to(x.dtype)
        warn_of_faint_maps("RelEx", maps, logits, "take a method that explains the logit, such as gradcam")
        return Explanation(logits, maps)

    def optimise(self, x: Tensor, classes: Tensor) -> MaskState:
        """The masks ``[B, C, H, W]`` for ``classes`` ``[B]`` after all steps; detached."""
        background, state = self.background(x), self.begin(x)
        for step in range(self.steps):
            draws = torch.randn(
                self.samples, *x.shape[1:], generator=generator(self.seed, "relex", step), dtype=torch.float32
            )
            state = self.step(x, background, state, classes, draws.to(x)[None])
        return state

    def begin(self, x: Tensor) -> MaskState:
        """The state before the first step."""
        start = torch.rand(x.shape[1:], generator=generator(self.seed, "relex start"), dtype=torch.float32) / 100
        mask = start.to(x.device, wide_dtype(x)).repeat(len(x), 1, 1, 1)
        return MaskState(mask, torch.zeros_like(mask), torch.zeros_like(mask))

    def map_of(self, state: MaskState) -> Tensor:
        """The mean of the mask over channels, ``[B, H, W]``."""
        return state.mask.mean(1)

    def background(self, x: Tensor) -> Tensor:
        """What stands where the mask is 0, ``[B, C, H, W]``."""
        return baseline_like(self.baseline, self.model, x.detach()).expand_as(x)

    def shifts(self, x: Tensor, streams: Streams) -> Tensor:
        """Fresh noise for a step that an adversary takes, ``[B, 4, C, H, W]``, standard normal."""
        return streams.normal(x.new_empty(len(x), COPIES_AHEAD, *x.shape[1:]))

    def loss(self, x: Tensor, background: Tensor, mask: Tensor, classes: Tensor, noise: Tensor) -> Tensor:
        """The mean over copies of both terms on the prediction, ``[B]``; differentiable in all but the noise.

        Args:
            x: ``[B, C, H, W]``.
            background: what stands where the mask is 0, of its shape.
            mask: ``m``, of its shape.
            classes: ``[B]``, which the mask is to keep.
            noise: ``[B, n, C, H, W]``, or ``[1, n, C, H, W]`` for all of them, standard normal.
        """
        size = noise.shape[1]
        extent = (x.detach().flatten(1).amax(1) - x.detach().flatten(1).amin(1)) * self.sigma
        noisy = x[:, None] + ops.expand(extent, noise) * noise
        kept, rest = mask[:, None].to(x.dtype), background[:, None]
        both = torch.stack([noisy * kept + rest * (1 - kept), noisy * (1 - kept) + rest * kept])
        logits = answer(self.model, both.flatten(0, 2)).to(mask.dtype)
        odds = margin(logits, classes.repeat_interleave(size).repeat(2)).unflatten(0, (2, len(x), size))
        inside, outside = -torch.nn.functional.logsigmoid(odds[0]), -((-odds[1]).sigmoid() + TINY).log()
        total: Tensor = (inside + self.outside * outside).mean(1)
        return total

    def step(
        self,
        x: Tensor,
        background: Tensor,
        state: MaskState,
        classes: Tensor,
        shift: Tensor | None = None,
        *,
        graph: bool = False,
    ) -> MaskState:
        """One step of momentum along the normalised gradient, projected to ``[0, 1]``.

        Args:
            x: as in :meth:`loss`.
            background: as in :meth:`loss`.
            state: where the step starts.
            classes: as in :meth:`loss`.
            shift: the noise of :meth:`loss`; ``None``: no noise.
            graph: keep the graph: the new state is differentiable in ``x``, in the old state and in the weights.
        """
        noise = x.new_zeros(1, 1, *x.shape[1:]) if shift is None else shift
        with torch.enable_grad(), straight_maps():
            mask = state.mask if graph and state.mask.requires_grad else state.mask.detach().requires_grad_()
            gradient = self.l1 / mask[0].numel() * torch.ones_like(mask)
            for part in chunks(noise.shape[1], 2 * len(x), self.batch_size):
                with twice_differentiable() if graph else nullcontext():
                    loss = self.loss(x, background, mask, classes, noise[:, part]).sum()
                (found,) = torch.autograd.grad(loss, mask, create_graph=graph)
                gradient = gradient + found * (len(range(*part.indices(noise.shape[1]))) / noise.shape[1])
            size = gradient.flatten(1).square().mean(1)
            # The root has no derivative at zero, where the step is zero too.
            size = torch.where(size > 0, size, torch.inf).sqrt()
            first = self.momentum * state.first + gradient / ops.expand(size, gradient)
            moved = ops.clipped((mask if graph else mask.detach()) - self.lr * first)
        return MaskState(moved, first, state.second, state.step + 1)
