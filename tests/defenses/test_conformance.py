"""What every registered defense must keep, and what each one claims, on a small network trained on digits."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain.attacks import ADV2, PGD, random_classes
from robustexplain.data import Data, stack, take
from robustexplain.defenses import (
    Aggregate,
    AggregatedInterpreter,
    BetaSmoothing,
    Defense,
    ModelDefense,
    XEnsemble,
)
from robustexplain.defenses.interpreters.aggregated import member_of
from robustexplain.errors import InputError, UnknownNameError, UnsupportedModelError
from robustexplain.interpreters import CAM, RTS, GradCAM, Gradient, MaskObjective
from robustexplain.metrics import L1, auc
from robustexplain.models import Classifier
from robustexplain.registry import DEFENSES
from robustexplain.system import Detector
from robustexplain.training import Session, Training

EPS = 0.125
# On so little training the masks stay all ones, unless their size weighs more.
SMALL = MaskObjective(average=10.0)
INNER = ADV2(EPS, steps=8, step_size=0.03, warm_start=0.5)


@pytest.fixture(params=[e for e in DEFENSES if "tables" not in e.needs], ids=lambda entry: entry.name)
def defended(
    request: pytest.FixtureRequest, trained: Classifier, rts: RTS, cheap: Callable[[Any], Defense]
) -> tuple[Defense, rx.System]:
    """A defense and a system that it can defend."""
    defense = cheap(request.param)
    return defense, rx.System(trained, rts if "rts" in request.param.needs else Gradient(trained))


def weights(*modules: nn.Module) -> list[Tensor]:
    return [t.clone() for m in modules for t in m.state_dict().values()]


def test_a_defense_gives_a_system_and_leaves_its_own_alone(
    defended: tuple[Defense, rx.System], few: Dataset[Any], rts: RTS
) -> None:
    defense, system = defended
    before = weights(system.model, rts.masker)
    flags = [(p.requires_grad, p.grad is None) for p in system.model.parameters()]
    parts = (system.model, system.interpreter, system.detector)
    with torch.random.fork_rng(devices=[]):
        state = torch.get_rng_state()
        hardened = defense(system, few)
        assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(hardened, rx.System)
    assert hardened is not system
    assert (system.model, system.interpreter, system.detector) == parts
    assert all(torch.equal(a, b) for a, b in zip(before, weights(system.model, rts.masker), strict=True))
    assert [(p.requires_grad, p.grad is None) for p in system.model.parameters()] == flags
    assert not any(m.training for m in system.model.modules())
    assert hardened.interpreter != system.interpreter or hardened.detector is not None
    plain = defense.oblivious_view(hardened, system)
    assert plain.detector is None
    if isinstance(defense, ModelDefense):
        assert hardened.model is not system.model
        assert plain.model is hardened.model
    else:
        assert plain.interpreter is system.interpreter


@dataclass(frozen=True)
class InPlace(Defense):
    """The natural mistake: it trains the model that it was given."""

    how: str = "weights"
    fails: bool = False

    needs_data: ClassVar[bool] = False
    layer: ClassVar[str] = "model"

    def _defend(self, system: rx.System, data: Any, session: Session) -> rx.System:
        if self.how == "weights":
            with torch.no_grad():
                next(system.model.parameters()).mul_(2)
        else:
            system.model.train()
        if self.fails:
            raise ValueError("something else")
        return system


def test_a_defense_of_ones_own_that_changes_the_given_model_is_refused_and_undone(trained: Classifier) -> None:
    system, before = rx.System(trained, CAM(trained)), copy.deepcopy(trained.state_dict())
    for how, words in (("weights", "changed weights of the given system in place, '"), ("mode", "changed the mode of")):
        with pytest.raises(InputError, match=words):
            InPlace(how)(system)
        with pytest.raises(ValueError, match="something else"):
            InPlace(how, fails=True)(system)
        assert not trained.training
        assert all(torch.equal(a, b) for a, b in zip(before.values(), trained.state_dict().values(), strict=True))


def test_a_saved_defended_system_says_the_same(
    defended: tuple[Defense, rx.System], few: Dataset[Any], judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    defense, system = defended
    hardened = defense(system, few)
    loaded = rx.System.load(hardened.save(tmp_path / "system"))
    x = judged[0][:6]
    with torch.no_grad():
        a, b = hardened(x), loaded(x)
    assert torch.equal(a.logits, b.logits)
    assert torch.equal(a.maps, b.maps)
    if hardened.detector is not None:
        assert loaded.detector is not None
        assert a.score is not None
        assert b.score is not None
        assert torch.equal(a.score, b.score)
        assert loaded.detector.threshold == hardened.detector.threshold
        assert torch.equal(loaded.detector.soft_score(x), hardened.detector.soft_score(x))
    content = b"".join(p.read_bytes() for p in (tmp_path / "system").iterdir())
    assert b"cpickle" not in content.lower()
    assert not list((tmp_path / "system").glob("*.pkl"))


def test_the_same_seed_gives_the_same_defense(
    defended: tuple[Defense, rx.System], few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    defense, system = defended
    x = judged[0][:4]
    first, second = (defense(system, few)(x) for _ in range(2))
    assert torch.equal(first.maps, second.maps)
    assert (first.score is None) == (second.score is None)
    if first.score is not None and second.score is not None:
        assert torch.equal(first.score, second.score)


def test_a_defense_that_trains_refuses_missing_data(defended: tuple[Defense, rx.System], few: Dataset[Any]) -> None:
    defense, system = defended
    if not defense.needs_data:
        assert isinstance(defense(system), rx.System)
        return
    for nothing in (None, torch.utils.data.Subset(few, [])):
        with pytest.raises(InputError, match="needs data"):
            defense(system, nothing)


@pytest.mark.parametrize("entry", list(DEFENSES), ids=lambda e: e.name)
def test_the_seed_is_never_taken_by_position(entry: Any) -> None:
    assert all(f.kw_only for f in fields(entry.build) if f.name == "seed")
    with pytest.raises(ValueError, match="seed"):
        entry.build(seed=-1)


@pytest.mark.parametrize("entry", list(DEFENSES), ids=lambda e: e.name)
def test_no_setting_hides_what_every_defense_answers(entry: Any) -> None:
    assert {f.name for f in fields(entry.build)} & set(dir(Defense)) == {f.name for f in fields(Defense)}  # type: ignore[type-abstract]


# --- beta-smoothing ---


def test_beta_smoothing_refuses_what_it_cannot_smooth(trained: Classifier, few: Dataset[Any]) -> None:
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.Tanh(), nn.Linear(8, 10)).eval()
    with pytest.raises(UnsupportedModelError, match="rectifiers"):
        BetaSmoothing()(rx.System(smooth, Gradient(smooth)), few)
    once = BetaSmoothing()(rx.System(trained, Gradient(trained)), few)
    with pytest.raises(UnsupportedModelError, match="smoothed already"):
        BetaSmoothing()(once, few)


def test_beta_smoothed_maps_move_less_and_predictions_not_at_all(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:24], judged[1][:24]
    plain = rx.System(trained, Gradient(trained))
    smoothed = BetaSmoothing(beta=1.0)(plain)
    assert torch.equal(plain(x).logits, smoothed(x).logits)
    noise = 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    moved = [L1()(s.interpreter(x, y), s.interpreter((x + noise).clamp(0, 1), y)).detach() for s in (smoothed, plain)]
    assert float(moved[0].mean()) < 0.6 * float(moved[1].mean())
    # In the limit of a large beta the twin is the network itself.
    sharp = BetaSmoothing(beta=1e5)(plain)
    assert float(L1()(sharp.interpreter(x, y).detach(), plain.interpreter(x, y).detach()).mean()) < 1e-3


# --- aggregation ---


def test_an_aggregate_is_the_mean_of_rescaled_maps(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:5].double(), judged[1][:5]
    model = copy.deepcopy(trained).double()
    members = Gradient(model), CAM(model)
    for rescale in ("sum", "minmax", "absmax"):
        found = Aggregate(model, members, rescale)(x, y).detach()  # type: ignore[arg-type]
        for i in range(5):
            expected = torch.zeros(32, 32, dtype=torch.float64)
            for member in members:
                m = member(x, y)[i].detach()
                if rescale == "sum":
                    m = m.abs() / m.abs().sum() * 32 * 32
                else:
                    m = (m - m.min()) / (m.max() - m.min()) if rescale == "minmax" else m / m.abs().max()
                expected += m / 2
            torch.testing.assert_close(found[i], expected, rtol=1e-9, atol=1e-12)


def test_an_aggregate_is_differentiable(smooth_net: nn.Module, grey: Tensor) -> None:
    net = copy.deepcopy(smooth_net).double()
    aggregate = Aggregate(net, (Gradient(net, channels="sum"), GradCAM(net, relu=False)))
    target = torch.tensor([1])

    def maps(x: Tensor) -> Tensor:
        return aggregate.explain(x, target).maps[:, ::7, ::7]

    x = (0.1 + 0.8 * grey[:1, :, :8, :8]).double().requires_grad_()
    assert torch.autograd.gradcheck(maps, (x,), eps=1e-6, atol=1e-5)
    assert aggregate.differentiable
    assert aggregate.is_gradient


def test_an_aggregates_members_explain_the_same_class(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x = judged[0][:4]
    aggregate = Aggregate(trained, (CAM(trained), GradCAM(trained)))
    prediction = trained(x).argmax(1)
    assert torch.equal(aggregate(x), aggregate(x, prediction))


def test_a_member_of_the_systems_own_class_is_the_systems_own(trained: Classifier, rts: RTS) -> None:
    system = rx.System(trained, rts)
    assert member_of(system, RTS) is rts
    assert member_of(system, Gradient).model is trained
    defended = AggregatedInterpreter(["rts", Gradient])(system)
    assert isinstance(defended.interpreter, Aggregate)
    assert defended.interpreter.members[0] is rts
    with pytest.raises(InputError, match="'rts' is trained"):
        AggregatedInterpreter([RTS, CAM])(rx.System(trained, CAM(trained)))


def test_an_aggregate_refuses_what_is_none(trained: Classifier) -> None:
    with pytest.raises(InputError, match="two members"):
        AggregatedInterpreter([Gradient])
    with pytest.raises(UnknownNameError, match="gradcam"):
        AggregatedInterpreter(["gradcm", "gradient"])
    with pytest.raises(InputError, match="same model"):
        Aggregate(trained, (CAM(trained), CAM(copy.deepcopy(trained))))


# --- X-Ensemble ---


@dataclass
class DetectorCase:
    system: rx.System
    clean: Tensor
    forged: Tensor
    rest: Tensor

    @property
    def detector(self) -> Detector:
        assert self.system.detector is not None
        return self.system.detector


@pytest.fixture(scope="module")
def watched(trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]) -> DetectorCase:
    """X-Ensemble on a small budget, and held-out digits with and without an attack."""
    system = rx.System(trained, GradCAM(trained))
    attack = PGD(EPS, 10, 0.03)
    defense = XEnsemble(attack=attack, training=Training(epochs=4, batch_size=32, lr=5e-3), trees=60)
    x, y = judged
    forged = attack(system, x, y, random_classes(x, y, 10)).x
    return DetectorCase(defense(system, take(digits.defense, 300)), x, forged, stack(digits.test)[0])


def test_x_ensemble_tells_attacked_from_clean(watched: DetectorCase) -> None:
    for score in (watched.detector.score, watched.detector.soft_score):
        clean, forged = (score(x).detach() for x in (watched.clean, watched.forged))
        print(f"AUC {auc(clean, forged):.3f}")
        assert auc(clean, forged) >= 0.9


def test_x_ensemble_alarms_at_about_the_calibrated_rate(watched: DetectorCase) -> None:
    with torch.no_grad():
        hard = watched.detector.score(watched.rest) > watched.detector.threshold
        soft = watched.detector.soft_score(watched.rest) > watched.detector.soft_threshold
    # 60 samples calibrate, so the rate itself has a standard error of three points.
    for alarms in (hard, soft):
        print(f"false alarms {float(alarms.float().mean()):.3f}")
        assert float(alarms.float().mean()) < 0.15
    explained = watched.system(watched.forged)
    assert explained.alarm is not None
    assert float(explained.alarm.float().mean()) > 0.5


def test_x_ensembles_score_is_a_share_and_its_soft_score_has_a_gradient(watched: DetectorCase) -> None:
    score = watched.detector.score(watched.clean)
    assert 0 <= float(score.min()) <= float(score.max()) <= 1
    assert len(score.unique()) > 2
    x = watched.clean[:4].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(watched.detector.soft_score(x).sum(), x)
    assert bool((gradient.flatten(1).abs().amax(1) > 0).all())
    step = (x + 1e-3 * gradient.sign()).detach().clamp(0, 1)
    assert float(watched.detector.soft_score(step).sum()) > float(watched.detector.soft_score(x).sum())


def test_an_adaptive_attack_evades_x_ensemble(watched: DetectorCase, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:8], judged[1][:8]
    goal = random_classes(x, y, 10)
    attack = ADV2(EPS, steps=20, step_size=0.02)
    found = [a(watched.system, x, y, goal).x for a in (attack, attack.adapted(watched.system))]
    blind, aware = (float(watched.detector.soft_score(f).mean()) for f in found)
    assert aware < blind


def test_x_ensemble_refuses_a_handful_of_samples(trained: Classifier, few: Dataset[Any]) -> None:
    with pytest.raises(InputError, match="dozens of samples"):
        XEnsemble()(rx.System(trained, GradCAM(trained)), torch.utils.data.Subset(few, range(8)))
