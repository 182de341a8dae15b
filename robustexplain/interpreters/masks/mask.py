"""MASK: the smallest region whose removal lowers the class score, found by optimising a mask for each image."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import annotated_types as at
import torch
from torch import Tensor

from ... import maps as ops
from ...autograd.second_derivatives import twice_differentiable
from ...autograd.straight_through import straight_maps
from ...checks import Kind
from ...door import answer
from ...fields import Count, Fraction, NonNegative, Positive
from ...random_streams import Streams
from ...registry import INTERPRETERS
from ..base import Explanation, Interpreter, explained_class, wide_dtype
from ..iterative import MaskState
from ..perturbation.removal import Fill, Score, score

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
CHECK_EVERY = 10
REFERENCE_SIDE = 28


@INTERPRETERS.register("mask", paper="Fong and Vedaldi 2017; Zhang et al. 2020, eq. 9 and 16", needs=("gradients",))
@dataclass(frozen=True, eq=False)
class Mask(Interpreter):
    """The smallest smooth region whose removal lowers the class score, by Adam on a mask for each image (MASK).

    Minimises ``l1 mean|1 - m| + tv r_tv(m) + f_c(phi(x; m))`` over ``m`` in ``[0, 1]`` (eq. 16), where ``phi`` keeps
    ``x`` where ``m`` is 1 and replaces it by ``fill`` elsewhere; the map is ``1 - m``: 1 where the pixel matters.
    (By the text of Zhang et al., section 3.5, 1 is replaced; by eq. 9, which makes ``1 - m`` sparse, 1 is kept, as by
    Fong and Vedaldi and the authors' code.) Each sample stops by itself, when its mask no longer changes.

    Not differentiable as a whole: the map results from some hundred steps, whose graph is too deep to keep, and the
    stopping rule is discontinuous. Attacks use single steps (Zhang et al., Algorithm 1), which are differentiable in
    ``x``, in the mask and in the weights: see :meth:`loss` and :meth:`step`.

    Args:
        size: side of the mask, at most half the image's. It is enlarged bilinearly.
        steps: the largest number of steps of Adam.
        lr: its learning rate.
        l1: weight of the *mean* of ``|1 - m|``. The authors' 1e-4 of the sum over 28 x 28 is 0.0784.
        tv: weight of ``r_tv``: the sums of ``|m_i - m_j|^power`` over vertical and over horizontal neighbours, divided
            by the mask's area. Differences are taken per 1/28 of the side, so that a coarser mask need not be
            flatter. The authors' 1e-2 of the sum over 28 x 28 is 7.84.
        power: the exponent in ``r_tv``.
        start: the mask's first value, everywhere.
        fill: what replaces the pixels where the mask is 0.
        of: ``f_c``.
        jitter: largest shift of the image under the mask (``tau`` of eq. 16), as a share of its shorter side, in whole
            pixels (none on small images) and drawn anew each step.
        tolerance: a sample stops when its mask changed by less than this in ten steps, on average over the mask; 0
            runs all the steps, as the authors do. With jitter a mask rarely stops changing, and all the steps run.
        seed: of the jitter and of a noise fill.
    """

    size: Count = 28
    steps: Count = 300
    lr: Positive = 0.1
    l1: NonNegative = 0.0784
    tv: NonNegative = 7.84
    power: Annotated[float, at.Ge(1)] = 3.0
    start: Fraction = 0.5
    fill: Fill = field(default_factory=lambda: Fill("blur"))
    of: Score = "probability"
    jitter: Fraction = 4 / 224
    tolerance: NonNegative = 2e-3
    seed: int = 0

    differentiable: ClassVar[bool] = False
    unit_range: ClassVar[bool] = True
    iterative: ClassVar[bool] = True
    takes: ClassVar[tuple[Kind, ...]] = ("images",)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = answer(self.model, x)
        classes = explained_class(logits, target)
        state = self.optimise(x.detach(), classes)
        return Explanation(logits, self.map_of(state).to(x.dtype))

    def optimise(self, x: Tensor, classes: Tensor) -> MaskState:
        """The optimal masks ``[B, h, w]`` (1 keeps) for ``classes`` ``[B]``, with Adam's moments; detached.

        ``step`` is that of the sample that took the most steps.
        """
        background, streams = self.background(x), Streams.of(x, self.seed, "mask")
        state, active = self.begin(x), torch.arange(len(x), device=x.device)
        done, previous = state.copy(), state.mask
        for step in range(1, self.steps + 1):
            state = self.step(x, background, state, classes, self.shifts(x, streams))
            if step % CHECK_EVERY or not self.tolerance:
                continue
            changing = (state.mask - previous).abs().flatten(1).mean(1) >= self.tolerance
            if not changing.all():
                done.store(active, state)
                x, background, classes, active = (t[changing] for t in (x, background, classes, active))
                state, streams = state.select(changing), streams.select(changing.nonzero()[:, 0])
                if not len(active):
                    break
            previous = state.mask
        done.store(active, state)
        return done._replace(step=step)

    def begin(self, x: Tensor) -> MaskState:
        """The state before the first step."""
        size = [min(self.size, max(1, side // 2)) for side in x.shape[-2:]]
        mask = torch.full((len(x), *size), self.start, dtype=wide_dtype(x), device=x.device)
        return MaskState(mask, torch.zeros_like(mask), torch.zeros_like(mask))

    def map_of(self, state: MaskState) -> Tensor:
        """``1 - m``, ``[B, h, w]``."""
        return 1 - state.mask

    def background(self, x: Tensor) -> Tensor:
        """What replaces ``x`` where the mask is 0, ``[B, C, H, W]``; differentiable in ``x`` unless it is noise."""
        return self.fill(x, self.seed)

    def shifts(self, x: Tensor, streams: Streams) -> Tensor | None:
        """A random shift of each sample in pixels, ``[B, 2]``, or ``None`` if the jitter is less than a pixel."""
        largest = int(self.jitter * min(x.shape[-2:]) + 1e-9)
        if largest == 0:
            return None
        draws = streams.uniform(x.new_empty(len(x), 2, dtype=torch.float64))
        return (draws * (2 * largest + 1)).long() - largest

    def loss(self, x: Tensor, background: Tensor, mask: Tensor, classes: Tensor, shift: Tensor | None = None) -> Tensor:
        """``l_map(m; x)`` of eq. 16, ``[B]``: differentiable in ``x``, ``background``, ``mask`` and the weights.

        Args:
            x: ``[B, C, H, W]``.
            background: what replaces ``x`` where the mask is 0, of its shape.
            mask: ``m``, ``[B, h, w]`` in ``[0, 1]``.
            classes: ``[B]``, whose score is minimised.
            shift: of image and background under the mask, ``[B, 2]`` whole pixels; borders are replicated.
        """
        if shift is not None:
            x, background = _shifted(x, shift), _shifted(background, shift)
        full = ops.resize(mask, x.shape[-2:])[:, None].to(x.dtype)
        logits = answer(self.model, x * full + background * (1 - full))
        sparsity = (1 - mask).abs().flatten(1).mean(1)
        return self.l1 * sparsity + self.tv * _variation(mask, self.power) + score(logits, classes, self.of)

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
        """One step of Adam on :meth:`loss`, projected to ``[0, 1]``.

        Args:
            x: as in :meth:`loss`.
            background: as in :meth:`loss`.
            state: where the step starts.
            classes: as in :meth:`loss`.
            shift: as in :meth:`loss`.
            graph: keep the graph: the new state is differentiable in ``x``, in the old state and in the weights.
        """
        with torch.enable_grad(), straight_maps():
            mask = state.mask if graph and state.mask.requires_grad else state.mask.detach().requires_grad_()
            with twice_differentiable() if graph else nullcontext():
                loss = self.loss(x, background, mask, classes, shift).sum()
            (gradient,) = torch.autograd.grad(loss, mask, create_graph=graph)
        moved = adam(state._replace(mask=mask if graph else mask.detach()), gradient, self.lr)
        return moved._replace(mask=ops.clipped(moved.mask))


def adam(state: MaskState, gradient: Tensor, lr: float) -> MaskState:
    """One step of Adam (Kingma and Ba 2015, Algorithm 1), differentiable in ``state`` and ``gradient``."""
    step = state.step + 1
    first = BETA1 * state.first + (1 - BETA1) * gradient
    second = BETA2 * state.second + (1 - BETA2) * gradient.square()
    variance = second / (1 - BETA2**step)
    # The root has no derivative at zero, where the step is zero too.
    positive = variance > 0
    root = torch.where(positive, torch.where(positive, variance, 1).sqrt(), 0)
    mask = state.mask - lr * (first / (1 - BETA1**step)) / (root + EPSILON)
    return MaskState(mask, first, second, step)


def _variation(mask: Tensor, power: float) -> Tensor:
    height, width = (side / REFERENCE_SIDE for side in mask.shape[1:])
    down = ((mask[:, 1:] - mask[:, :-1]) * height).abs().pow(power).flatten(1).sum(1)
    right = ((mask[:, :, 1:] - mask[:, :, :-1]) * width).abs().pow(power).flatten(1).sum(1)
    total: Tensor = (down + right) / mask[0].numel()
    return total


def _shifted(x: Tensor, shift: Tensor) -> Tensor:
    """``x[.., i - shift_0, j - shift_1]`` for each image; borders are replicated."""
    height, width = x.shape[-2:]
    shift = shift.to(x.device)
    rows = (torch.arange(height, device=x.device) - shift[:, :1]).clamp(0, height - 1)
    columns = (torch.arange(width, device=x.device) - shift[:, 1:]).clamp(0, width - 1)
    index = torch.arange(len(x), device=x.device)
    moved = x.movedim(1, -1)[index[:, None, None], rows[:, :, None], columns[:, None]]
    return moved.movedim(-1, 1)
