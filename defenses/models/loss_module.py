"""A network in training whose forward pass computes a loss, so that losses on input gradients run on many processes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.autograd.second_derivatives import twice_differentiable
from robustexplain.door import answer
from robustexplain.hidden import refuse_hidden
from robustexplain.training import TrainingStep
from robustexplain.training.losses import right

Terms = Callable[[nn.Module, Tensor, Tensor, TrainingStep, tuple[Tensor, ...]], Tensor]
"""``terms(network, x, y, step, others)`` gives ``[b]`` losses, with a graph to the weights."""


class Smoothed(nn.Module):
    """A network whose rectifiers are a softplus, with the same weights.

    Args:
        model: the network.
        beta: of the softplus.

    Raises:
        UnsupportedModelError: a model whose function calls cannot be seen.
    """

    def __init__(self, model: nn.Module, beta: float) -> None:
        super().__init__()
        refuse_hidden(model, "a softplus replaces rectifiers")
        self.model = model
        self.smooth = Softplus(beta)
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, K]``."""
        with swapped(self.smooth):
            logits: Tensor = self.model(x)
        return logits


class LossModule(nn.Module):
    """The network in training; its forward pass gives the losses of a batch, or, without terms, logits.

    A loss on input gradients differentiates the network twice. Under ``DistributedDataParallel`` gradients are averaged
    only for outputs of the wrapped module's own forward pass, so everything that has a graph is computed there.

    Args:
        model: the network as it will be deployed; its logits are what is validated.
        network: that network, perhaps :class:`Smoothed`, which the losses are computed on.
    """

    layers_inside: ClassVar[str] = "model"

    def __init__(self, model: nn.Module, network: nn.Module) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that its weights are not registered a second time.
        self._network = (network,)

    def forward(
        self,
        x: Tensor,
        terms: Terms | None = None,
        y: Tensor | None = None,
        step: TrainingStep | None = None,
        others: tuple[Tensor, ...] = (),
    ) -> Tensor:
        """``[b]`` losses by ``terms``; without terms the deployed network's logits ``[B, K]``."""
        if terms is None:
            logits: Tensor = self.model(x)
            return logits
        assert y is not None  # for the type checker
        assert step is not None
        with twice_differentiable():
            return terms(self._network[0], x, y, step, others)


@dataclass(frozen=True)
class HardeningLoss(ABC):
    """The loss of a training that hardens a classifier, ``[b]``; a subclass says which ``terms`` it has.

    Args:
        network: in training, not wrapped: what inner attacks differentiate.
        label_smoothing: share of the label's probability that is distributed over all classes.
    """

    network: nn.Module
    label_smoothing: float = field(default=0.0, kw_only=True)

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is a :class:`LossModule`, perhaps wrapped for data-parallel training."""
        losses: Tensor = module(x, self.terms, y, step, self.others(x, y, step))
        return losses

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """What the terms need besides the batch and has no graph: attacked or random neighbours, draws."""
        return ()

    @abstractmethod
    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """``[b]`` losses, within the module's forward pass; one sample's loss does not depend on the others.

        Args:
            network: answers with logits.
            x: ``[b, ...]``.
            y: ``[b]``.
            step: of the training.
            others: as :meth:`others` gave them.
        """

    def task(self, logits: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy ``[b]``, with label smoothing."""
        return F.cross_entropy(logits, y, reduction="none", label_smoothing=self.label_smoothing)

    def smoothed(self, label_smoothing: float) -> Self:
        """The same loss with label smoothing."""
        return replace(self, label_smoothing=label_smoothing)

    def figures(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> dict[str, Tensor]:
        """``accuracy`` of the deployed network."""
        return {"accuracy": right(answer(module, x, finite=False), y)}
