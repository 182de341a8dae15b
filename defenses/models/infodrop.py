"""Informative dropout: texture is dropped while the network is fine-tuned, so that it relies on shape."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from robustexplain.errors import FieldError, UnsupportedModelError
from robustexplain.fields import Count, Natural, Positive, identified
from robustexplain.files import digest_tensors
from robustexplain.hidden import refuse_hidden
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, TrainingStep, cross_entropy, fit

from .fine_tuned import FineTuned, Norms
from .loss_module import HardeningLoss
from .self_information import Repetition, droppable, dropping


@DEFENSES.register("infodrop", paper="Shi et al. 2020 and code (InfoDrop)", needs=("convolution", "data"))
@dataclass(frozen=True)
class InfoDrop(FineTuned):
    """Fine-tune the classifier with the outputs of patches dropped that repeat their neighbourhood; then without.

    A patch of the first convolutions is dropped the more likely, the more it looks as patches around it: it carries
    little self-information, as texture does. A second training without the dropout follows, so that the deployed
    network is the plain one, with other weights.

    Departures: distances are divided by their mean over an input's own patches (in the code over the batch, so that a
    sample's dropout depends on the others), and neighbours are drawn for each input; each position is dropped by itself
    with the chance of being among ``rate`` times ``h w`` draws with replacement, where the code makes these draws; the
    mask lies on the rectifier behind the convolution, in front of a pooling that the code minimises over.

    Args:
        training: of the training with dropout; by default that of the code.
        norms: ``train`` by default: statistics are those of inputs with dropout, and are learned anew afterwards.
        softplus: must be ``None``.
        layers: so many of the first convolutions drop. The code's default for a ResNet-18 is the first alone.
        rate: ``r``, draws over the number of positions.
        temperature: ``T``; a small one drops only the most repetitive patches.
        bandwidth: ``h`` of the kernel density.
        radius: ``R`` of the neighbourhood, in pixels.
        neighbours: patches of the neighbourhood that are compared.
        after: of the training without dropout.

    Raises:
        UnsupportedModelError: a network whose first convolutions are followed by no rectifier, or that has none.
    """

    layers: Count = 1
    rate: Positive = 1.5
    temperature: Positive = 0.03
    bandwidth: Positive = 1.0
    radius: Natural = 3
    neighbours: Count = 9
    training: Training = field(default_factory=lambda: Training(epochs=30, lr=0.01, optimizer="sgd", weight_decay=5e-4))
    norms: Norms = "train"
    after: Training = field(default_factory=lambda: Training(epochs=20, lr=1e-3, optimizer="sgd", weight_decay=5e-4))

    twice: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.softplus is not None:
            name = type(self).__name__
            raise FieldError(name, "softplus", f"must be none: the dropout lies on rectifiers, got {self.softplus!r}")
        if self.radius == 0:
            raise FieldError(type(self).__name__, "radius", "must be above 0: a patch has no neighbours")

    def _loss(self, network: nn.Module, x: Tensor) -> HardeningLoss:
        refuse_hidden(network, "infodrop sees convolutions and rectifiers")
        repetition = Repetition(self.rate, self.temperature, self.bandwidth, self.radius, self.neighbours)
        found = droppable(network, x, self.layers, repetition)
        if found < self.layers:
            raise UnsupportedModelError(
                f"infodrop drops behind the first {self.layers} convolutions with a kernel above one pixel that a "
                f"rectifier follows, and this {type(network).__name__} has {found}; set layers to at most that"
            )
        return InfoDropLoss(network, self.layers, repetition)

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        known = [identified(self), digest_tensors(model.state_dict())]
        model = super()._harden(model, data, session)
        return fit(model, cross_entropy, data, self.after, name="infodrop-after", seed=self.seed, session=session,
                   identity=known, evaluating=self.norms == "eval")  # fmt: skip


@dataclass(frozen=True)
class InfoDropLoss(HardeningLoss):
    """Cross-entropy under informative dropout.

    Args:
        layers: so many of the first convolutions drop.
        repetition: how likely.
    """

    layers: int
    repetition: Repetition

    def terms(self, network: nn.Module, x: Tensor, y: Tensor, step: TrainingStep, others: tuple[Tensor, ...]) -> Tensor:
        """As the class says."""
        with dropping(self.layers, self.repetition, Streams.of(x, step.seed, "infodrop", step.epoch)):
            logits = network(x)
        return self.task(logits, y)
