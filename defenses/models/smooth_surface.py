"""SSR: a small largest eigenvalue of the loss's Hessian, in closed form for a network of rectifiers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from robustexplain.door import answer
from robustexplain.errors import InputError
from robustexplain.fields import Count, Fraction, NonNegative
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.rounding import wide
from robustexplain.training import TrainingStep

from .fine_tuned import FineTuned
from .input_gradients import classified, gradient
from .loss_module import HardeningLoss

MANY = 100
"""Classes from which on the closed form over all of them is refused: it takes a backward pass of each."""


@DEFENSES.register("ssr", paper="Wang et al. 2020", needs=("data",))
@dataclass(frozen=True)
class SmoothSurface(FineTuned):
    """Fine-tune the classifier towards a small curvature of its cross-entropy: smooth surface regularisation.

    The loss of a sample is ``(1 - alpha) * CE + alpha * scale * xi``. Of a piecewise linear network the Hessian of the
    cross-entropy in the input is ``W (diag p - p p^T) W^T``, with ``W`` the Jacobian of the logits, ``[pixels,
    classes]``, and ``p`` the probabilities (Wang et al. 2020). Its largest eigenvalue ``xi`` is that of the small
    matrix ``L^T W^T W L`` with ``L L^T = diag p - p p^T``, so that it needs a backward pass of each class and no
    iteration. ``L = diag(sqrt p) - p sqrt(p)^T`` here, where the code takes a root by its eigenvalues.

    A step takes one forward pass and a double backward of each class. With ``classes`` only so many of a sample take
    part: its label and others, drawn at random. ``xi`` is then that of the classifier that only knows these. It is our
    way to many classes; for an estimate over all of them take ``smooth-curvature`` with ``score: cross_entropy``.

    On a network of rectifiers ``xi`` is the curvature of the loss between the kinks; how many kinks there are, and how
    logits bend, it does not see. With a ``softplus``, or GELU, the Hessian has a second part that is left out.

    Departure: the code trains from random weights (Adam at 1e-3, batches of 32, 50 epochs).

    Args:
        alpha: share of the curvature in the loss.
        scale: of the curvature; the code's command line has 0.3, its function 1e6.
        classes: so many classes of a sample take part; default all.
        channels: ``mean`` averages ``W`` over the channels of a pixel, as in the code; ``all`` keeps them.

    Raises:
        InputError: hundreds of classes and no number of ``classes``.
    """

    alpha: Fraction = 0.3
    scale: NonNegative = 0.3
    classes: Count | None = None
    channels: Literal["mean", "all"] = "mean"

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        with torch.no_grad():
            known = answer(network, x).shape[1]
        if known >= MANY and self.classes is None:
            raise InputError(
                f"ssr takes a backward pass of every class, and this network has {known}: set classes, how many of "
                "them take part for a sample (10), or take smooth-curvature with score: cross_entropy"
            )
        if self.classes == 1:
            raise InputError("ssr needs two classes of a sample at least, got classes = 1")
        return SurfaceLoss(network, self)


@dataclass(frozen=True)
class SurfaceLoss(HardeningLoss):
    """``(1 - alpha) * CE + alpha * scale * xi``.

    Args:
        settings: the defense.
    """

    settings: SmoothSurface

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """Random numbers ``[b]``, of which each sample's classes are drawn."""
        if self.settings.classes is None:
            return ()
        return (Streams.of(x, step.seed, step.epoch, "classes").integers(2**31).to(x.device),)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """The loss."""
        settings = self.settings
        given, logits = classified(network, x)
        part = logits
        if settings.classes is not None and settings.classes < logits.shape[1]:
            part = logits.gather(1, drawn(y, logits.shape[1], settings.classes, others[0]))
        jacobian = torch.stack([gradient(column, given) for column in part.unbind(1)], -1)
        if settings.channels == "mean" and given.dim() == 4:
            jacobian = jacobian.mean(1)
        curvature = largest_eigenvalue(jacobian.flatten(1, -2), part.log_softmax(1))
        return (1 - settings.alpha) * self.task(logits, y) + settings.alpha * settings.scale * curvature


def largest_eigenvalue(jacobian: Tensor, log_p: Tensor) -> Tensor:
    """``[b]``: the largest eigenvalue of ``W (diag p - p p^T) W^T``, for ``W`` ``[b, N, C]``, ``log p`` ``[b, C]``."""
    # Half precision has no eigenvalues, and CUDA's autocast makes products of matrices half ones.
    with torch.autocast(jacobian.device.type, enabled=False):
        # The root by the logarithm: that of a probability that underflows has no finite derivative.
        root = (wide(log_p) / 2).exp()
        factor = torch.diag_embed(root) - root.square()[:, :, None] * root[:, None]
        product = wide(jacobian) @ factor
        values: Tensor = torch.linalg.eigvalsh(product.mT @ product)
    return values[:, -1]


def drawn(y: Tensor, num_classes: int, count: int, numbers: Tensor) -> Tensor:
    """``[b, count]`` different classes of each sample, its label first, the others at random by its number."""
    rows = []
    for label, number in zip(y.tolist(), numbers.tolist(), strict=True):
        order = torch.randperm(num_classes - 1, generator=torch.Generator().manual_seed(number))[: count - 1]
        rows.append(torch.cat([torch.tensor([label]), order + (order >= label)]))
    return torch.stack(rows).to(y.device)
