"""MagNet's reformer: an auto-encoder in front of the classifier moves images back to where natural ones lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from robustexplain import maps as ops
from robustexplain.data import stack
from robustexplain.fields import Count, NonNegative, identified
from robustexplain.models import AutoEncoder
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep, fit

from .placed import TrainedInput, drawn_anew


@DEFENSES.register("magnet-reformer", paper="Meng and Chen 2017 and code", needs=("data",))
@dataclass(frozen=True)
class MagNetReformer(TrainedInput):
    """Put an auto-encoder in front of the classifier that was trained to restore clean images from noisy ones.

    The squared error to the clean image, under Gaussian noise (Meng and Chen 2017). It sees neither the classifier nor
    an attack. By default the network, noise and number of epochs of the authors' code for MNIST, whose penalty of 1e-9
    on activities is left out. Passes of inference: one of each network.

    Args:
        width: channels of every hidden layer.
        pooled: whether it halves the image in between.
        noise: standard deviation of the noise in training.
        training: epochs, batch, optimiser.
        explained: which image the interpreter explains: the input, through the auto-encoder (``raw``), or what it made.
    """

    width: Count = 3
    pooled: bool = True
    noise: NonNegative = 0.1
    training: Training = field(default_factory=lambda: Training(epochs=100, batch_size=256, lr=1e-3))

    def _train(self, system: System, data: Samples, session: Session) -> System:
        channels = stack(data, range(1))[0].shape[1]
        network = drawn_anew(lambda: AutoEncoder(channels, self.width, pooled=self.pooled), self.seed, session.device)
        fit(network, ReconstructionLoss(self.noise), data, self.training, name="magnet-reformer", seed=self.seed,
            session=session, identity=identified(self))  # fmt: skip
        return self._placed(system, network)


@dataclass(frozen=True)
class ReconstructionLoss:
    """The mean squared error to the clean image.

    Args:
        noise: standard deviation on the image that the network sees.
    """

    noise: float

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the auto-encoder."""
        noise = Streams.of(x, step.seed, "reformer", step.epoch).normal(x)
        restored: Tensor = module(ops.clipped(x + self.noise * noise))
        return (restored - x).square().flatten(1).mean(1)
