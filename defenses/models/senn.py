"""Self-explaining networks: a classifier trained so that its own coefficients explain it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from robustexplain import models
from robustexplain.autograd import layers
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.errors import UnsupportedModelError
from robustexplain.fields import Count, NonNegative, identified
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Theta
from robustexplain.models.senn import explains_itself, self_explaining
from robustexplain.random_streams import Streams, derive
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep, fit

from ..base import refuse
from .base import ModelDefense
from .input_gradients import gradient
from .loss_module import HardeningLoss, LossModule


@DEFENSES.register("senn", paper="Alvarez-Melis & Jaakkola 2018, section 3 and code (grad3)", needs=("data",))
@dataclass(frozen=True)
class SelfExplaining(ModelDefense):
    """Put a self-explaining network in place of the classifier, trained from the start, explained by its coefficients.

    The network is ``f_c(x) = sum_i theta_ci(x) x_i + b_c`` (``models.load("senn")``), the interpreter becomes
    :class:`~robustexplain.interpreters.Theta`, and the loss of a sample is ``CE + weight * || theta(x) - df/dx ||``,
    the Frobenius norm over classes and pixels, in units of the normalised image: the coefficients are to be the
    gradient, so that ``f`` is locally linear in its concepts. A self-explaining network that is there already is
    trained further. With a ``weight`` of 0 it is the control: the same network without the penalty.

    Departures: ``f`` are logits, differentiated through ``theta`` and ``x``, as the paper defines the penalty; the code
    (``grad3``) differentiates the log-softmax, along ``theta^T h`` alone with the concepts detached. The norm is each
    sample's own (in the code one norm of a whole batch), so that the code's weight of 0.01 has no equal here. Concepts
    are the pixels, those of the code's ``h_type = input``; the network's layers are those of ``models.load("senn")``.

    Args:
        weight: of the penalty; the default is ours.
        classes: so many classes' coefficients are penalised in each step, drawn for each input; default all. A class
            costs a backward pass.
        training: epochs, batch, optimiser; by default those of the code.

    Raises:
        UnsupportedModelError: another defense has hardened the model, which would be lost; a model with transforms in
            front of it.
    """

    weight: NonNegative = 0.11
    classes: Count | None = None
    training: Training = field(
        default_factory=lambda: Training(epochs=10, batch_size=128, lr=1e-3, weight_decay=0.0, schedule="constant")
    )

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return None if len(shape) == 3 else f"senn takes images [C, H, W]; a sample has shape {list(shape)}"

    def _train(self, system: System, data: Samples, session: Session) -> System:
        refuse(
            system.detector is not None,
            "senn puts another network in place of the model, which the system's detector watches; apply senn first, "
            "then add the detector",
        )
        refuse(
            bool(system.defenses) and not explains_itself(system.model),
            "senn puts another network in place of the model, and would undo what was applied already "
            f"({', '.join(system.defenses)}): apply senn first",
        )
        model = self._hardened(system.model, data, session)
        return replace(system, model=model, interpreter=Theta(model))

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        x = stack(data, range(1))[0].to(session.device)
        why = self.misfit(tuple(x.shape[1:]))
        if why is not None:
            raise UnsupportedModelError(why)
        start = digest_tensors(model.state_dict()) if explains_itself(model) else None
        if start is None:
            model = self._built(model.eval(), x)
        loss = SelfExplainingLoss(model, self.weight, self.classes)
        fit(LossModule(model, model), loss, data, self.training, name="senn", seed=self.seed, session=session,
            identity=[identified(self), start])  # fmt: skip
        return model

    def _built(self, model: nn.Module, x: Tensor) -> nn.Module:
        refuse(
            bool(getattr(models.innermost(model), "transform_names", ())) or models.innermost(model) is not model,
            f"senn puts another network in place of this {type(model).__name__}, and what stands in front of it would "
            "be lost: build models.load('senn', transforms=...) and let the defense train that",
        )
        with torch.no_grad():
            num_classes = answer(model, x).shape[1]
        made = models.build(
            "senn", num_classes=num_classes, in_channels=x.shape[1], seed=derive(self.seed, "senn") % 2**32
        )
        made.inputs = getattr(model, "inputs", None)
        return made.to(x)


@dataclass(frozen=True)
class SelfExplainingLoss(HardeningLoss):
    """``CE + weight * || theta(x) - df/dx ||`` of each sample.

    Args:
        weight: of the penalty.
        classes: of how many classes; ``None``: of all.
    """

    weight: float
    classes: int | None = None

    def others(self, x: Tensor, y: Tensor, step: TrainingStep) -> tuple[Tensor, ...]:
        """The classes ``[b, n]`` whose coefficients are penalised."""
        with torch.no_grad():
            num_classes = self.network(x[:1]).shape[1]
        draws = Streams.of(x, step.seed, "senn", step.epoch).uniform(x.new_empty(len(x), num_classes))
        return (draws.argsort(1)[:, : self.classes],)

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        if not self.weight:
            return self.task(network(x), y)
        logits, distance = unfaithfulness(network, x, *others)
        return self.task(logits, y) + self.weight * distance


def unfaithfulness(network: nn.Module, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits ``[B, K]`` and ``|| theta(x) - df/dx ||``, ``[B]``, with a graph to the weights.

    Args:
        network: with a self-explaining network in it.
        x: ``[B, C, H, W]``.
        classes: ``[B, n]``, those whose coefficients are compared; their squares are scaled to all ``K``.
    """
    inside = self_explaining(network)
    concepts, parametriser = (f"{inside}.{part}" if inside else part for part in ("concepts", "parametriser"))
    with layers.captured(network, [concepts, parametriser]) as outputs:
        logits = network(x.detach().requires_grad_())
    theta = outputs[parametriser].unflatten(1, (logits.shape[1], -1))
    rows, total = torch.arange(len(x), device=x.device), 0.0
    for chosen in classes.T:
        slope = gradient(logits[rows, chosen], outputs[concepts])
        total = total + (theta[rows, chosen] - slope).flatten(1).square().sum(1)
    # The root has no derivative at zero.
    return logits, (total * logits.shape[1] / classes.shape[1]).clamp(min=1e-12).sqrt()
