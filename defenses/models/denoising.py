"""Feature denoising: blocks that filter feature maps, inserted into the classifier and trained on attacked inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robustexplain import models
from robustexplain.attacks import PGD
from robustexplain.autograd.layers import captured
from robustexplain.data import stack
from robustexplain.door import answer
from robustexplain.errors import FieldError, InputError, UnsupportedModelError
from robustexplain.fields import identified
from robustexplain.files import digest_tensors
from robustexplain.models.denoised import Filter, check_denoised
from robustexplain.random_streams import derive
from robustexplain.registry import DEFENSES
from robustexplain.training import Samples, Session, Training, eval_mode, fit

from .adversarial import AdversarialLoss
from .base import ModelDefense
from .fine_tuned import refuse_no_room


@DEFENSES.register("feature-denoising", paper="Xie et al. 2019, section 4", needs=("data",))
@dataclass(frozen=True)
class FeatureDenoising(ModelDefense):
    """Insert denoising blocks into the classifier and train it on PGD's inputs (Xie et al. 2019, section 4).

    A block is ``x + BN(conv1x1(filter(x)))`` and changes nothing before it is trained. The network that comes out is
    another one than the system's: it is saved with its blocks where ``robustexplain.models`` builds the network; a
    model of your own is loaded with ``model=models.denoised(your_model, models.stage_ends(your_model, x), filter)``.

    Departures: training begins with the system's weights; the inner attack is untargeted, begins at random in every
    step (the paper's in 80%), and returns its best iterate; training is that of ``pgd-at``, whose row without blocks
    is the control.

    Args:
        layers: dotted names of the layers behind which blocks stand; none: the last layer at each of the last four grid
            sizes, as in the paper's ResNets.
        filter: of the blocks: see :class:`~robustexplain.models.DenoisingBlock`.
        attack: PGD in training; by default the paper's: 30 steps of 1/255 in a ball of 16/255.
        training: epochs, batch, optimiser. With ``validation``, the epoch of the best robust accuracy is kept.

    Raises:
        FieldError: an ``eps`` of 0.
        UnsupportedModelError: a network without feature maps, or one that does not run with blocks behind its layers.
    """

    layers: Sequence[str] = ()
    filter: Filter = "non-local"
    attack: PGD = field(default_factory=lambda: PGD(16 / 255, steps=30, step_size=1 / 255, random_start=True))
    training: Training = field(default_factory=Training)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layers, str):
            raise FieldError(type(self).__name__, "layers", f"must be a list of names, got {self.layers!r}")
        object.__setattr__(self, "layers", tuple(self.layers))
        refuse_no_room(self, self.attack, "attack")

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        if len(shape) == 3:
            return None
        return f"feature denoising filters maps of images [C, H, W]; a sample has shape {list(shape)}"

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        x = stack(data, range(1))[0].to(session.device)
        why = self.misfit(tuple(x.shape[1:]))
        if why is not None:
            raise InputError(why)
        start = digest_tensors(model.state_dict())
        with eval_mode(model):
            layers = self._channels(model, x) if self.layers else models.stage_ends(model, x)
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(derive(self.seed, "blocks") % 2**32)
                made = models.denoised(model, layers, self.filter).to(session.device).eval()
            check_denoised(made, model, x)
        return fit(made, AdversarialLoss(attack=self.attack, model=made), data, self.training, name="feature-denoising",
                   seed=self.seed, session=session, identity=[identified(self), start])  # fmt: skip

    def _channels(self, model: nn.Module, x: Tensor) -> dict[str, int]:
        """The channels of the named layers."""
        with torch.no_grad(), captured(model, self.layers) as outputs:
            answer(model, x)
        for name in self.layers:
            found = outputs[name]
            if not isinstance(found, Tensor) or found.dim() != 4:
                raise UnsupportedModelError(
                    f"layer {name!r} gives no feature map [B, C, h, w]; layers that do: "
                    f"{', '.join(models.stage_ends(model, x))}"
                )
        return {name: outputs[name].shape[1] for name in self.layers}
