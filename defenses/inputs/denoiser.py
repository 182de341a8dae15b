"""A denoiser in front of the classifier, trained through it: the high-level representation guided denoiser."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain.attacks import PGD
from robustexplain.attacks.inner import attacked
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.errors import FieldError
from robustexplain.fields import Count, identified
from robustexplain.files import digest_tensors
from robustexplain.models import DenoisingUNet
from robustexplain.random_streams import Streams
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, TrainingStep, fit, frozen

from .placed import TrainedInput, drawn_anew


@DEFENSES.register("hgd", paper="Liao et al. 2018 (logits guided)", needs=("data",))
@dataclass(frozen=True)
class GuidedDenoiser(TrainedInput):
    """Put a denoiser in front of the classifier that was trained to restore its logits on attacked images.

    ``|f(D(x*)) - f(x)|`` in L1, with the classifier ``f`` fixed and ``x*`` an attack on ``f`` alone: the adversary of
    the training does not know the denoiser (Liao et al. 2018, LGD). One who does differentiates through it. Passes of
    inference: one of the denoiser and one of the classifier.

    Departures: attacked images are made anew in each epoch against the system's own classifier instead of once against
    several networks, and lie at a random share of the way from the clean image, where the paper draws ``eps``.

    Args:
        attack: against the classifier alone, untargeted; the authors mix one step and several.
        width: channels of the U-Net's first block.
        levels: its scales.
        training: epochs, batch, optimiser.
        explained: which image the interpreter explains: the input, through the denoiser (``raw``), or the denoised one.

    Raises:
        FieldError: an ``eps`` of 0.
    """

    attack: PGD = field(default_factory=lambda: PGD(8 / 255, 4, 3 / 255))
    width: Count = 16
    levels: Count = 2
    training: Training = field(default_factory=lambda: Training(epochs=20, lr=1e-3))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.attack.eps == 0:
            raise FieldError(type(self).__name__, "attack.eps", "must be above 0: there is no attack to learn from")
        DenoisingUNet(1, self.width, self.levels)

    def _train(self, system: System, data: Samples, session: Session) -> System:
        model = system.model.to(session.device)
        channels = stack(data, range(1))[0].shape[1]
        network = drawn_anew(lambda: DenoisingUNet(channels, self.width, self.levels), self.seed, session.device)
        known = [identified(self), digest_tensors(model.state_dict())]
        with frozen(model):
            fit(network, GuidedLoss(model, self.attack), data, self.training, name="hgd", seed=self.seed,
                session=session, identity=known)  # fmt: skip
        return self._placed(system, network)


@dataclass(frozen=True)
class GuidedLoss:
    """The L1 distance of the logits of a denoised attacked image to those of the clean one.

    Args:
        model: the classifier, in eval mode.
        attack: on it alone.
    """

    model: nn.Module
    attack: PGD

    def __call__(self, module: nn.Module, x: Tensor, y: Tensor, step: TrainingStep) -> Tensor:
        """``[b]`` losses; ``module`` is the denoiser, perhaps wrapped for data-parallel training."""
        far = attacked(self.attack, self.model, x, y, step)
        share = Streams.of(x, step.seed, "hgd", step.epoch).uniform(x.new_empty(len(x), 1, 1, 1))
        with torch.no_grad():
            wanted = answer(self.model, x)
        return (answer(self.model, module(x + share * (far - x))) - wanted).abs().mean(1)
