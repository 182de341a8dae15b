"""Revealing training: a classifier whose maps move when its prediction is forged, and stand still otherwise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from robustexplain.attacks import ADV2, Attack, MapPGD
from robustexplain.data import stack
from robustexplain.errors import InputError
from robustexplain.fields import Fraction, NonNegative, identified
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import walk
from robustexplain.registry import DEFENSES
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, eval_mode, fit
from robustexplain.transforms import HarmlessChange, harmless_for

from .base import ModelDefense
from .fine_tuned import refuse_no_room, refuse_once_differentiable, weights_in_training
from .forger import Forger, no_images, refuse_other_maps, trainable_specs
from .revealing_loss import RevealingLoss


@DEFENSES.register("revealing", paper="this project", needs=("differentiable maps", "data"))
@dataclass(frozen=True)
class Revealing(ModelDefense):
    """Fine-tune the classifier until its maps move under a forgery and stand still under harmless changes.

    The loss of a sample is ``task + keep * kept - weight * |m(x) - m(forged x)| + harmless_weight * |m(x) - m(harmless
    x)|``. ``task`` is the cross-entropy of ``x`` and ``harmless x``, ``kept`` the divergence of their probabilities
    from those of the classifier as it was. Distances are means over pixels of maps as they are judged, at the input's
    size and rescaled to ``[0, 1]``: none exceeds 1, and a constant map has no part in them. The forged input is
    computed at each step against the current weights. Batch norms keep their statistics.

    Unlike AID it needs no interpreter with weights of its own, and unlike adversarial training it does not make the
    prediction harder to change: it makes a changed prediction visible to whoever has the benign map. Maps become more
    alike within a class, and a forgery that shows an ordinary map of its own class stays unseen without the benign one.

    Args:
        interpreters: whose maps are trained, by name, by class or with settings of their own; several at once count
            alike, and the inner attack must deceive all of them.
        weight: ``W``, of the distance to the forged input's map.
        harmless_weight: ``H``, of the distance to the map after a harmless change.
        keep: of the divergence from the probabilities of the classifier as it was.
        rise: share of the training over which ``weight`` rises linearly from 0.
        attack: ADV2 in training, towards a random class and the benign map.
        rival: a second forger: each input is then trained on the forgery that deceives, with the nearer map.
        training: epochs, batch, optimiser.
        harmless: the changes, of which each input gets one; none: the usual ones of images.

    Raises:
        NotDifferentiableError: an interpreter whose maps have no gradient to the weights, or are an optimisation's.
    """

    interpreters: Sequence[InterpreterSpec | type[Interpreter] | str] = ("gradcam",)
    weight: NonNegative = 4.0
    harmless_weight: NonNegative = 12.0
    keep: NonNegative = 3.0
    rise: Fraction = 0.0
    attack: ADV2 = field(default_factory=lambda: ADV2(steps=12, step_size=0.006, warm_start=0.5))
    rival: MapPGD | None = None
    training: Training = field(default_factory=lambda: Training(epochs=8, lr=1e-3, weight_decay=0.0))
    harmless: tuple[HarmlessChange, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "interpreters", trainable_specs(self, self.interpreters))
        object.__setattr__(self, "harmless", tuple(self.harmless))
        for attack, what in ((self.attack, "attack"), (self.rival, "rival")):
            if attack is not None:
                refuse_no_room(self, attack, what)

    @property
    def forgers(self) -> tuple[Attack, ...]:
        """The attacks in training."""
        return (self.attack,) if self.rival is None else (self.attack, replace(self.rival, aim="forge"))

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        return no_images(self, shape)

    def _train(self, system: System, data: Samples, session: Session) -> System:
        refuse_other_maps(self, self._specs, system)
        return super()._train(system, data, session)

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        x, y = (part.to(session.device) for part in stack(data, range(1)))
        why = self.misfit(tuple(x.shape[1:]))
        if why is not None:
            raise InputError(why)
        honest = copy.deepcopy(model).requires_grad_(False).eval()
        changes = harmless_for(self.harmless, x.shape[1:])
        forger = Forger.against(model, self._specs, self.forgers)
        trained = weights_in_training(self.name, model, self.training)
        if any(part.is_gradient for part in walk(forger.attacked)):
            with eval_mode(model):
                refuse_once_differentiable(model, trained, x, y)
        loss = RevealingLoss(self, forger, honest, changes)
        known = [identified(self), [change.entry for change in changes], digest_tensors(model.state_dict())]
        fit(forger.module, loss, data, self.training, name="revealing", seed=self.seed, session=session,
            identity=known, evaluating=True)  # fmt: skip
        return model

    @property
    def _specs(self) -> tuple[InterpreterSpec, ...]:
        return tuple(InterpreterSpec.of(member) for member in self.interpreters)
