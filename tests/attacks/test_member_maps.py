"""Several interpreters attacked at once: the panel that lays their maps out, and ADV2 on it and on aggregates."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks import ADV2, PGD, Attacked, random_classes
from robustexplain.attacks.joint.member_maps import MemberMaps, members_apart
from robustexplain.defenses import Aggregate
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.interpreters import CAM, RTS, GradCAM, Gradient, InputXGradient, Interpreter, Mask, MaskingModel
from robustexplain.maps import minmax
from robustexplain.metrics import L1
from robustexplain.models import Classifier
from robustexplain.objectives import Goal, MatchMap, Observation

EPS = 0.125


@pytest.fixture
def model(tiny_model: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_model).double()


@pytest.fixture
def x(grey: Tensor) -> Tensor:
    return grey.double()


def masked(model: nn.Module, x: Tensor) -> RTS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made = MaskingModel.around(copy.deepcopy(model), x, width=8)
    return RTS(model, made.to(x.dtype).eval())


# What it shows


def test_the_members_maps_stand_one_below_the_other_on_a_common_grid(model: nn.Module, x: Tensor) -> None:
    members = (CAM(model), Gradient(model))
    maps = MemberMaps(model, members).explain(x, native=True).maps
    side = members[0].explain(x, native=True).maps.shape[-1]
    assert side < 16
    assert maps.shape == (5, 32, 16)
    coarse, fine = (minmax(member.explain(x, native=True).maps) for member in members)
    each = 16 // side
    torch.testing.assert_close(maps[:, :16], coarse.repeat_interleave(each, 1).repeat_interleave(each, 2))
    torch.testing.assert_close(maps[:, 16:], fine)


def test_matching_a_panel_is_the_mean_over_members_of_matching_each(model: nn.Module, x: Tensor) -> None:
    members = (CAM(model), Gradient(model), masked(model, x))
    label = torch.zeros(5, dtype=torch.int64)

    def loss(interpreter: Interpreter, rescale: str) -> Tensor:
        now, wanted = (interpreter.explain(v, label, native=True) for v in (x, x.flip(0)))
        seen = Observation(x, now.logits, now.maps)
        return MatchMap(rescale).loss(seen, Goal(x, label, goal_map=wanted.maps)).detach()  # type: ignore[arg-type]

    parts = [loss(member, "none" if member.unit_range else "minmax") for member in members]
    assert len({round(float(part[0]), 6) for part in parts}) == 3
    torch.testing.assert_close(loss(MemberMaps(model, members), "none"), torch.stack(parts).mean(0))


def test_grids_that_do_not_divide_each_other_meet_on_a_multiple(model: nn.Module, x: Tensor) -> None:
    panel = MemberMaps(model, (CAM(model), CAM(model)))
    maps = [torch.rand(5, 2, 3, dtype=x.dtype), torch.rand(5, 3, 5, dtype=x.dtype)]
    found = panel._beside(maps, x)
    assert found.shape == (5, 12, 15)
    for part, own in zip(found.split(6, 1), maps, strict=True):
        torch.testing.assert_close(part.mean((1, 2)), minmax(own).mean((1, 2)))
    larger = panel._beside([torch.rand(5, 7, 7), torch.rand(5, 16, 16)], x)
    assert larger.shape == (5, 32, 16)


def test_members_explain_one_class_and_the_first_ones_logits_are_given(model: nn.Module, x: Tensor) -> None:
    panel = MemberMaps(model, (CAM(model), GradCAM(model)))
    predicted = model(x).argmax(1)
    found, wanted = panel.explain(x), panel.explain(x, predicted)
    torch.testing.assert_close(found.maps, wanted.maps)
    torch.testing.assert_close(found.logits, model(x))
    assert panel(x).shape == (5, 16, 16)
    assert MemberMaps(model, (masked(model, x), CAM(model))).explain(x).encoder_logits is not None


def test_it_is_what_its_members_are(model: nn.Module, x: Tensor) -> None:
    plain = MemberMaps(model, (CAM(model), GradCAM(model)))
    assert (plain.differentiable, plain.is_gradient, plain.unit_range, plain.class_specific) == (
        True,
        False,
        True,
        True,
    )
    assert MemberMaps(model, (CAM(model), Gradient(model))).is_gradient
    assert not MemberMaps(model, (CAM(model), Mask(model))).differentiable


@pytest.mark.parametrize(
    ("members", "says"),
    [
        (lambda model: (), "at least one member, got none"),
        (lambda model: (CAM,), "must be an Interpreter"),
        (lambda model: (CAM(copy.deepcopy(model)),), "the same model"),
    ],
)
def test_bad_members_are_refused(
    members: Callable[[nn.Module], tuple[Interpreter, ...]], says: str, model: nn.Module
) -> None:
    with pytest.raises(InputError, match=says):
        MemberMaps(model, members(model))


def test_a_goal_map_is_wanted_of_every_member_on_its_own_grid(model: nn.Module, x: Tensor) -> None:
    members = (CAM(model), Gradient(model))
    wanted = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    found = MemberMaps(model, members).lay_out(wanted, x)
    side = members[0].explain(x, native=True).maps.shape[-1]
    small = F.interpolate(wanted[:, None], (side, side), mode="bilinear", align_corners=False, antialias=True)[:, 0]
    each = 16 // side
    torch.testing.assert_close(found[:, :16], minmax(small).repeat_interleave(each, 1).repeat_interleave(each, 2))
    torch.testing.assert_close(found[:, 16:], minmax(wanted))


def test_only_what_is_made_of_several_comes_apart(model: nn.Module) -> None:
    members = (CAM(model), Gradient(model))
    apart = members_apart(Aggregate(model, members))
    assert isinstance(apart, MemberMaps)
    assert apart.members == members
    cam = CAM(model)
    assert members_apart(cam) is cam


# ADV2 on it


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Attacked]:
    x, y = judged[0][:12], judged[1][:12]
    goal = random_classes(x, y, 10)
    return x, y, goal, PGD(EPS, 40, 0.01)(rx.System(trained, CAM(trained)), x, y, goal)


def distance(interpreter: Interpreter, x: Tensor, goal: Tensor, benign: Tensor) -> float:
    return float(L1()(interpreter(x, goal).detach(), benign).mean())


def test_one_attack_keeps_the_maps_of_all_interpreters(
    trained: Classifier, bench: tuple[Tensor, Tensor, Tensor, Attacked]
) -> None:
    x, y, goal, pgd = bench
    members = (CAM(trained), GradCAM(trained), InputXGradient(trained, channels="abs_sum"))
    attack = ADV2(EPS, steps=45, step_size=0.01)
    found = attack(rx.System(trained, MemberMaps(trained, members)), x, y, goal)
    assert float(found.success.float().mean()) >= 0.95
    for member, share in zip(members, (0.6, 0.6, 0.9), strict=True):
        benign = member(x).detach()
        assert distance(member, found.x, goal, benign) < share * distance(member, pgd.x, goal, benign)
    # An attack on one of them alone leaves another one nearer to where PGD leaves it.
    alone = attack(rx.System(trained, members[0]), x, y, goal)
    last, benign = members[2], members[2](x).detach()
    assert distance(last, found.x, goal, benign) < 0.9 * distance(last, alone.x, goal, benign)


def test_one_goal_map_is_shown_by_all_of_them(
    trained: Classifier, bench: tuple[Tensor, Tensor, Tensor, Attacked]
) -> None:
    x, y, goal, _ = bench
    members = (CAM(trained), GradCAM(trained))
    wanted = members[0](x.flip(0)).detach()
    system, attack = rx.System(trained, MemberMaps(trained, members)), ADV2(EPS, steps=45, step_size=0.01)
    found, other = attack(system, x, y, goal, wanted), attack(system, x, y, goal)
    for member in members:
        assert distance(member, found.x, goal, wanted) < 0.7 * distance(member, other.x, goal, wanted)


def test_an_aggregate_is_attacked_as_it_is_shown_or_member_by_member(
    trained: Classifier, bench: tuple[Tensor, Tensor, Tensor, Attacked]
) -> None:
    x, y, goal, pgd = bench
    aggregate = Aggregate(trained, (CAM(trained), GradCAM(trained)), rescale="minmax")
    system = rx.System(trained, aggregate)
    attack = ADV2(EPS, steps=45, step_size=0.01)
    assert attack.adapted(system) == attack
    benign = aggregate(x).detach()
    far = distance(aggregate, pgd.x, goal, benign)
    whole = attack(system, x, y, goal)
    apart = ADV2(EPS, steps=45, step_size=0.01, members=True)(system, x, y, goal)
    for found in (whole, apart):
        assert float(found.success.float().mean()) >= 0.95
        assert distance(aggregate, found.x, goal, benign) < 0.5 * far
    same = ADV2(EPS, steps=45, step_size=0.01)(rx.System(trained, MemberMaps(trained, aggregate.members)), x, y, goal)
    assert torch.equal(apart.x, same.x)
    assert not torch.equal(apart.x, whole.x)


def test_an_interpreter_that_is_one_is_attacked_the_same_with_members(
    trained: Classifier, bench: tuple[Tensor, Tensor, Tensor, Attacked]
) -> None:
    x, y, goal, _ = bench
    system = rx.System(trained, CAM(trained))
    whole, apart = (ADV2(EPS, 6, 0.02, members=flag)(system, x[:4], y[:4], goal[:4]) for flag in (False, True))
    assert torch.equal(whole.x, apart.x)


def test_a_member_without_a_gradient_is_refused(
    trained: Classifier, bench: tuple[Tensor, Tensor, Tensor, Attacked]
) -> None:
    x, y, goal, _ = bench
    system = rx.System(trained, Aggregate(trained, (CAM(trained), Mask(trained, steps=1))))
    for members in (False, True):
        with pytest.raises(NotDifferentiableError, match="MemberMaps" if members else "Aggregate"):
            ADV2(EPS, 4, members=members)(system, x, y, goal)
