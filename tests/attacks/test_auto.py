"""The standard attacker: as strong as each member, quick where samples fall, and told apart by its version."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ADV2, AUTO_VERSION, Attack, Auto, Dombrowski, Known, MapPGD, random_classes
from robustexplain.attacks.joint import auto as auto_module
from robustexplain.attacks.joint.aimed import Aim
from robustexplain.errors import FieldError, InputError, NotDifferentiableError
from robustexplain.evaluation import Evaluation
from robustexplain.evaluation.adversaries import Adversaries
from robustexplain.evaluation.cell import Rule
from robustexplain.evaluation.origins import Origins
from robustexplain.evaluation.prepared import Prepared
from robustexplain.fingerprint import fingerprint
from robustexplain.interpreters import CAM, GradCAM, Occlusion, SmoothGrad
from robustexplain.metrics import L1
from robustexplain.objectives import Goal, Lead, LeaveMap, Observation
from robustexplain.recipe.columns import columns_of
from robustexplain.recipe.experiment import Column, Experiment, Row

EPS = 0.125
Images = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("robustexplain.attacks.joint.auto.STEPS", 10)


@pytest.fixture
def images(judged: Images) -> tuple[Tensor, Tensor, Tensor]:
    x, y = (t[:6] for t in judged)
    return x, y, random_classes(x, y, 10)


@torch.no_grad()
def reached(system: rx.System, attack: Attack, x: Tensor, made: Tensor, goal: Tensor | None) -> tuple[Tensor, Tensor]:
    """Whether each input is predicted as wanted, and how far its map is from the benign one."""
    benign, seen = system(x), system(made)
    wanted = benign.prediction if attack.keeps_prediction else goal
    return seen.prediction == wanted, L1()(seen.maps, benign.maps)


@pytest.mark.parametrize(("aim", "interpreter"), [("forge", GradCAM), ("move", CAM)])
def test_it_is_as_strong_as_each_of_its_members(
    aim: Aim, interpreter: type[GradCAM], trained: nn.Module, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, goal = images
    system, auto = rx.System(trained, interpreter(trained)), Auto(EPS, aim)
    wanted = goal if aim == "forge" else None
    made = auto(system, x, y, wanted)
    won, distance = reached(system, auto, x, made.x, wanted)
    assert made.member is not None
    assert set(made.member.tolist()) <= set(range(len(auto.names)))
    assert len(auto.members(system)) >= 4
    for member in auto.members(system):
        single = member.attack.adapted(system)(system, x, y, wanted)
        ours, theirs = reached(system, auto, x, single.x, wanted)
        assert bool((won | ~ours).all()), member.name
        further = theirs >= distance - 1e-6 if aim == "forge" else theirs <= distance + 1e-6
        assert bool((further | ~ours).all()), member.name


def test_samples_that_fell_cost_nothing_more(trained: nn.Module, images: tuple[Tensor, Tensor, Tensor]) -> None:
    x, y, goal = images
    system, first = rx.System(trained, GradCAM(trained)), MapPGD(EPS, steps=10)
    single = first(system, x, y, goal)
    won, distance = reached(system, first, x, single.x, goal)
    limit = float(distance[won].median())
    made = Auto(EPS).informed(Known(limit=limit))(system, x, y, goal)
    fell = won & (distance <= limit)
    assert 0 < int(fell.sum()) < len(x)
    assert bool((made.queries[fell] == single.queries[fell] + 1).all())
    assert bool((made.queries[~fell] > single.queries[~fell] + 1).all())


@contextmanager
def passes(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Counts forward passes of the model and backward passes of torch."""
    count, backward = [0], torch.autograd.grad

    def counted(*args: object, **settings: object) -> object:
        count[0] += 1
        return backward(*args, **settings)  # type: ignore[arg-type]

    def forward(*_: object) -> None:
        count[0] += 1

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", counted)
        handle = model.register_forward_hook(forward)
        yield count
        handle.remove()


@pytest.mark.parametrize("aim", ["forge", "match", "move"])
def test_a_sample_that_holds_costs_at_most_ten_times_adv2(
    aim: Aim, trained: nn.Module, images: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("robustexplain.attacks.joint.auto.STEPS", 24)
    x, y, goal = (t[:1] for t in images)
    root, system = rx.System(trained, CAM(trained)), rx.System(trained, GradCAM(trained))
    with passes(trained, monkeypatch) as single:
        adv2 = ADV2(EPS, steps=24)(system, x, y, goal)
    with passes(trained, monkeypatch) as all_members:
        made = Auto(EPS, aim).informed(Known(root=root))(system, x, y, goal if aim == "forge" else None)
    assert single[0] >= 48
    assert all_members[0] <= 10 * single[0]
    assert bool((made.queries <= 10 * adv2.queries).all())


def test_members_that_need_a_gradient_are_left_out_where_there_is_none(
    trained: nn.Module, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, goal = (t[:2] for t in images)
    system = rx.System(trained, Occlusion(trained, window=8, stride=8))
    assert not system.interpreter.differentiable
    assert [member.name for member in Auto(EPS).members(system)] == ["pgd on the prediction alone", "spsa"]
    assert bool(Auto(EPS)(system, x, y, goal).success.all())
    with pytest.raises(NotDifferentiableError):
        MapPGD(EPS)(system, x, y, goal)


@pytest.mark.parametrize("aim", ["forge", "match", "move"])
def test_a_transfer_needs_the_maps_of_the_system_that_it_comes_from(aim: Aim, trained: nn.Module) -> None:
    hidden, plain = rx.System(trained, Occlusion(trained, window=8, stride=8)), rx.System(trained, GradCAM(trained))

    def has_transfer(system: rx.System, root: rx.System) -> bool:
        members = Auto(EPS, aim).informed(Known(root=root)).members(system)  # type: ignore[attr-defined]
        return any(member.transfer for member in members)

    assert has_transfer(hidden, plain)
    assert has_transfer(plain, plain)
    assert not has_transfer(plain, hidden)
    assert not has_transfer(hidden, hidden)


def test_its_version_is_part_of_its_identity_and_can_be_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Auto().version == AUTO_VERSION
    other = Auto()
    object.__setattr__(other, "version", "0")
    assert fingerprint(Auto()) != fingerprint(other)
    with pytest.raises(FieldError, match="version"):
        Auto(version="0")  # type: ignore[arg-type]


def test_the_map_as_shown_comes_closer_than_by_adv2_and_dombrowski(
    trained: nn.Module, images: tuple[Tensor, Tensor, Tensor]
) -> None:
    x, y, goal = images
    system = rx.System(trained, GradCAM(trained))
    pairs = ((MapPGD(EPS, steps=40), ADV2(EPS, steps=40)), (MapPGD(EPS, "match", 40), Dombrowski(EPS, steps=40)))
    with torch.no_grad():
        goal_map = system(x.flip(0)).maps
    for ours, theirs in pairs:
        wanted = None if ours.keeps_prediction else goal
        target = goal_map if ours.keeps_prediction else system(x).maps.detach()
        found = []
        for attack in (ours, theirs):
            made = attack(system, x, y, wanted, goal_map if ours.keeps_prediction else None)
            found.append(float(L1()(system(made.x).maps.detach(), target)[made.success].mean()))
        assert found[0] < 0.8 * found[1]


def test_a_lead_is_met_as_soon_as_the_class_leads_and_pushes_until_its_slack() -> None:
    logits = torch.tensor([[1.0, 0.0], [1.0, 0.8], [0.0, 1.0]], requires_grad=True)
    seen, goal = Observation(torch.zeros(3, 1, 1, 1), logits), Goal(torch.zeros(3, 1, 1, 1), torch.zeros(3).long())
    kept = Lead(0.5, keep=True)
    assert kept.met(seen, goal).tolist() == [True, True, False]
    torch.testing.assert_close(kept.loss(seen, goal), torch.tensor([0.0, 0.3, 1.5]))
    assert Lead(0.5).met(seen, replace(goal, goal_class=torch.ones(3).long())).tolist() == [False, False, True]
    assert Lead(0.5).met(seen, goal).tolist() == [False, False, True]


def test_leaving_a_map_is_minus_the_squared_distance_of_the_rescaled_maps() -> None:
    now, benign = torch.tensor([[[0.0, 2.0], [1.0, 0.0]]]), torch.tensor([[[4.0, 0.0], [0.0, 0.0]]])
    seen = Observation(torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), now)
    goal = Goal(torch.zeros(1, 1, 2, 2), torch.zeros(1).long(), benign_map=benign)
    torch.testing.assert_close(LeaveMap().loss(seen, goal), torch.tensor([-(1 + 1 + 0.25 + 0) / 4]))


def test_only_an_adversary_who_knows_the_defense_is_told_the_limit_and_other_limits_are_other_jobs(
    trained: nn.Module,
) -> None:
    root, below = Row("root", "root", "gradcam", None, "root", "interpreter"), Row("own", "root", "any", None, "root")
    systems = {"root": rx.System(trained, GradCAM(trained)), "own": rx.System(trained, CAM(trained))}
    experiment = Experiment(name="", rows=(root, below), columns=(), metrics={}, evaluation=Evaluation())
    names, limits = [], []
    for limit, knowledge in ((0.1, "adaptive"), (0.2, "adaptive"), (0.1, "oblivious"), (0.2, "oblivious")):
        rule = Rule(L1(), limit)
        adversaries = Adversaries(experiment, Prepared(systems, systems), Origins(experiment), lambda _, r=rule: r)
        job = adversaries.job(below, Column("auto", Auto(EPS), knowledge))  # type: ignore[arg-type]
        assert isinstance(job.attack, Auto)
        names.append(job.name)
        limits.append(job.attack.known.limit)
        assert (job.attack.known.root is not None) == (knowledge == "adaptive")
        single = adversaries.job(below, Column("adv2", ADV2(EPS), knowledge))  # type: ignore[arg-type]
        assert single.attack == ADV2(EPS)
    assert limits == [0.1, 0.2, None, None]
    assert names[0] != names[1]
    assert names[2] == names[3]


def test_in_a_recipe_its_adversary_knows_the_defense_unless_the_recipe_says_otherwise() -> None:
    for entry, knowledge in (({}, "adaptive"), ({"knowledge": "transfer"}, "transfer")):
        (column,) = columns_of({"name": "auto", "eps": 0.1, **entry}, "attacks[0]", ["gradcam"])
        assert column.knowledge == knowledge
    with pytest.raises(InputError, match=r"attacks\[0\].version"):
        columns_of({"name": "auto", "version": "0"}, "attacks[0]", [])


def test_of_a_system_that_draws_a_sample_falls_only_where_it_falls_under_every_draw(
    trained: nn.Module, images: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, goal = (t[:2] for t in images)
    asked = []

    def verdict(
        self: object, system: rx.System, wanted: Tensor, rows: Tensor, made: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        asked.append(system.interpreter)
        falls = torch.tensor([True, len(asked) % 3 != 2])
        return (~falls).float(), torch.full((2,), float(len(asked) % 3)), falls

    monkeypatch.setattr("robustexplain.attacks.joint.auto._Judge._by", verdict)
    system = rx.System(trained, SmoothGrad(trained, samples=1))
    judge = auto_module._Judge.of(Auto(EPS), system, x, y, goal, None)
    unmet, distance, falls = judge(torch.arange(2), x)
    assert len({one.seed for one in asked}) == 3
    assert system.interpreter not in asked
    assert unmet.tolist() == [0, 1]
    assert distance.tolist() == [1, 1]
    assert falls.tolist() == [True, False]
    plain = auto_module._Judge.of(Auto(EPS), rx.System(trained, CAM(trained)), x, y, goal, None)
    assert len(plain.systems) == 1
