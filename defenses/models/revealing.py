"""Revealing training: a classifier whose maps move when its prediction is forged, and stand still otherwise."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from torch import nn

from robustexplain.attacks import ADV2, Attack, MapPGD
from robustexplain.attacks.joint.aimed import Shown
from robustexplain.attacks.joint.member_maps import MemberMaps
from robustexplain.data import stack
from robustexplain.errors import FieldError, InputError, NotDifferentiableError
from robustexplain.fields import Fraction, NonNegative
from robustexplain.files import digest_tensors
from robustexplain.interpreters import Interpreter, InterpreterSpec
from robustexplain.interpreters.composed.base import walk
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.registry import DEFENSES, INTERPRETERS, Entry
from robustexplain.system import System
from robustexplain.training import Samples, Session, Training, fit
from robustexplain.transforms import HarmlessChange, harmless_for

from ..base import refuse
from .base import ModelDefense
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
        specs = tuple(InterpreterSpec.of(member) for member in self.interpreters)
        object.__setattr__(self, "interpreters", specs)
        object.__setattr__(self, "harmless", tuple(self.harmless))
        name = type(self).__name__
        if not specs:
            raise FieldError(name, "interpreters", "must name one at least, got none")
        for spec in specs:
            _refuse_untrainable(spec)
        for attack, what in ((self.attack, "attack"), (self.rival, "rival")):
            if attack is not None and attack.eps == 0:
                raise FieldError(name, f"{what}.eps", "must be above 0: there is no forgery to learn from")

    @property
    def forgers(self) -> tuple[Attack, ...]:
        """The attacks in training."""
        return (self.attack,) if self.rival is None else (self.attack, replace(self.rival, aim="forge"))

    def misfit(self, shape: tuple[int, ...]) -> str | None:
        """As :meth:`Defense.misfit`: inputs that are no images."""
        if len(shape) == 3:
            return None
        return f"revealing forges images [C, H, W] in training; a sample has shape {list(shape)}"

    def _train(self, system: System, data: Samples, session: Session) -> System:
        explaining = {type(part) for part in walk(system.interpreter)}
        names = ", ".join(map(str, self.interpreters))
        refuse(
            not any(spec.entry.build in explaining for spec in self._specs),
            f"revealing trains the maps of {names}, and the system explains by {type(system.interpreter).__name__}: "
            "name that one in interpreters, or harden the model alone with hardened(model, data)",
        )
        return super()._train(system, data, session)

    def _harden(self, model: nn.Module, data: Samples, session: Session) -> nn.Module:
        x = stack(data, range(1))[0]
        why = self.misfit(tuple(x.shape[1:]))
        if why is not None:
            raise InputError(why)
        members = tuple(spec.build(model) for spec in self._specs)
        shown = MemberMaps(model, tuple(Shown(model, member) for member in members))
        attacked = members[0] if len(members) == 1 else MemberMaps(model, members)
        honest = copy.deepcopy(model).requires_grad_(False).eval()
        changes = harmless_for(self.harmless, x.shape[1:])
        module = ExplainingModel(shown)
        loss = RevealingLoss(self, module, attacked, honest, changes)
        known = [asdict(self), [change.entry for change in changes], digest_tensors(model.state_dict())]
        fit(module, loss, data, self.training, name="revealing", seed=self.seed, session=session, identity=known,
            evaluating=True)  # fmt: skip
        return model

    @property
    def _specs(self) -> tuple[InterpreterSpec, ...]:
        return tuple(InterpreterSpec.of(member) for member in self.interpreters)


def _refuse_untrainable(spec: InterpreterSpec) -> None:
    if spec.refusal is not None:
        raise InputError(f"revealing trains the classifier's own maps: {spec.refusal}")
    if not _trainable(spec.entry):
        able = ", ".join(e.name for e in INTERPRETERS if _trainable(e) and InterpreterSpec(e.name).refusal is None)
        raise NotDifferentiableError(
            f"revealing differentiates maps in the classifier's weights, and those of {spec.name!r} have no such "
            f"gradient; interpreters that do: {able}"
        )


def _trainable(entry: Entry) -> bool:
    # Of an interpreter made of others it is a property, which the class does not know.
    build = entry.build
    return getattr(build, "differentiable", False) is True and not getattr(build, "iterative", False)
