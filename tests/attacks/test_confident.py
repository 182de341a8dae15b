"""Networks with the same decisions and logits ten thousand times as large, or as small: attacks find as much."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import attacks as A
from robustexplain.attacks import Attack
from robustexplain.attacks.base import rescaled
from robustexplain.interpreters import GradCAM, Gradient
from robustexplain.metrics import L1
from robustexplain.models import Classifier
from robustexplain.objectives import Goal, KeepPrediction, Lead, MatchProbabilities, Observation
from robustexplain.objectives.confident import away, bounded, lost, nats, scale_of, toward


class Scaled(nn.Module):
    def __init__(self, net: nn.Module, factor: float) -> None:
        super().__init__()
        self.net, self.factor = net, factor

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.factor


ATTACKS: dict[str, Attack] = {
    "fgsm": A.FGSM(0.15),
    "bim": A.BIM(0.15, 10, 0.02),
    "mi-fgsm": A.MIFGSM(0.15, 10, 0.02),
    "mi-fgsm-l2": A.MIFGSM(1.5, 10, 0.2, norm="l2"),
    "pgd": A.PGD(0.15, 10, 0.02),
    "pgd-l2": A.PGD(1.5, 10, 0.2, norm="l2"),
    "adv2": A.ADV2(0.15, 16, 0.02),
    "lbfgs": A.LBFGS(5, 4, 1.0),
    "cw": A.CW(steps=15, search_steps=3, step_size=0.05, initial_constant=1.0),
    "deepfool": A.DeepFool(10),
    "square": A.Square(0.15, 30),
    "spsa": A.SPSA(0.15, 0.03, 0.01, 20, 200),
    "nes": A.NES(0.15, 0.03, 0.01, 20, 200),
    "uap": A.UAP(0.2, 10, 0.05, batch_size=5),
    "stadv": A.StAdv(steps=20, step_size=0.05),
    "patch": A.ImagePatch(steps=10, step_size=0.1),
}


CASES = [
    *[(name, name in ("cw", "lbfgs", "nes", "spsa"), 1e4) for name in ATTACKS],
    *[(name, True, 1e4) for name in ("pgd", "adv2", "uap")],
    *[(name, name == "adv2", 1e-4) for name in ("pgd-l2", "adv2", "square", "uap", "stadv")],
]


@pytest.mark.parametrize(("name", "targeted", "factor"), CASES)
def test_attacks_succeed_as_often_whatever_the_scale_of_the_logits(
    name: str, targeted: bool, factor: float, tiny_model: Classifier, grey: Tensor
) -> None:
    attack, found = ATTACKS[name], []
    for k in (1.0, factor):
        model = Scaled(tiny_model, k).eval()
        system, y = rx.System(model, GradCAM(model)), tiny_model(grey).argmax(1)
        ready = attack.fitted(system, grey, y) if attack.needs_data else attack
        found.append(ready(system, grey, y, (y + 1) % 4 if targeted else None))
    usual, other = (float(result.success.float().mean()) for result in found)
    # One of five samples may differ: the losses' slopes are alike, not the same.
    assert other >= usual - 0.2 - 1e-6
    assert not bool((found[1].stalled & ~found[0].stalled & found[0].success).any())


@pytest.mark.parametrize("factor", [0.02, 1e-4, 1e4])
def test_a_forged_map_is_as_near_whatever_the_scale_of_the_logits(
    factor: float, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:12], judged[1][:12]
    far = []
    for k in (1.0, factor):
        model = Scaled(trained, k).eval()
        system = rx.System(model, GradCAM(model))
        made = A.MapPGD(0.125, steps=40)(system, x, y, A.random_classes(x, y, 10))
        assert bool(made.success.all())
        far.append(float(L1()(system(made.x).maps.detach(), system(x).maps.detach()).mean()))
    assert far[1] < 1.25 * far[0]


@pytest.mark.parametrize("factor", [1e-4, 0.02, 1.0, 1e4])
def test_the_lead_that_is_asked_for_is_of_the_size_of_the_logits(factor: float) -> None:
    benign = torch.tensor([[5.0, 0.0, 2.0]]) * factor
    x = torch.rand(1, 1, 2, 2)
    goal = Goal(x, torch.tensor([0]), torch.tensor([1]), benign_logits=benign, scale=scale_of(benign))
    usual = 5.0 if goal.scale is None else 16.0
    losses = []
    for lead in (-0.3, 0.05, 0.2):  # of the spread
        now = torch.tensor([[0.0, lead, -1.0]]) * 5 * factor
        losses.append(float(Lead().loss(Observation(x, now), goal)))
    assert losses == pytest.approx([max(0.5 - lead * usual, 0) for lead in (-0.3, 0.05, 0.2)], rel=1e-4)


@pytest.mark.filterwarnings("error")
def test_stalled_says_so_where_a_search_gets_nowhere(tiny_model: Classifier, grey: Tensor) -> None:
    model = Scaled(tiny_model, 1e4).eval()
    y = tiny_model(grey).argmax(1)
    found = A.PGD(1e-6, 5, 1e-7)(rx.System(model, GradCAM(model)), grey, y)
    assert not bool(found.zero_direction.any())
    assert not bool(found.success.any())


def test_losses_are_the_cross_entropy_bit_for_bit_on_usual_logits() -> None:
    logits = 6 * torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    classes = torch.arange(200) % 10
    plain = nn.functional.cross_entropy(logits, classes, reduction="none")
    assert torch.equal(toward(logits, classes), plain)
    assert torch.equal(away(logits, classes), -plain)
    assert torch.equal(bounded(logits / 3), logits / 3)
    assert scale_of(logits) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_losses_keep_falling_and_have_a_gradient_at_any_lead(dtype: torch.dtype) -> None:
    lead = torch.tensor([-3e4, -1e3, -120.0, -100.0, -20.0, -1.0, 1.0, 9.0, 15.0, 17.0, 40.0, 110.0, 1e3, 3e4])
    logits = torch.stack([lead, torch.zeros_like(lead), torch.full_like(lead, -1.0)], 1).to(dtype).requires_grad_()
    first = torch.zeros(len(lead), dtype=torch.int64)
    left = away(logits, first)
    assert bool((left.diff() > 0).all())
    (gradient,) = torch.autograd.grad(left.sum(), logits)
    assert bool(torch.isfinite(gradient).all())
    assert bool((gradient[:, 0] > 0).all())
    loss = toward(logits, first)
    assert bool((loss.diff()[:9] < 0).all())
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert bool((gradient[lead < 5, 0] < 0).all())


def test_losses_on_probabilities_lead_back_from_a_certain_other_class() -> None:
    x = torch.zeros(1, 1, 4, 4)
    logits = torch.tensor([[0.0, 5e3, 10.0]]).requires_grad_()
    goal = Goal(x, torch.tensor([0]), benign_logits=torch.tensor([[5e3, 0.0, 0.0]]), wanted=torch.tensor([[1.0, 0, 0]]))
    for objective in (KeepPrediction(), MatchProbabilities()):
        loss = objective.loss(Observation(x, logits), goal)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert float(gradient[0, 0]) < 0 < float(gradient[0, 1])
    assert torch.equal(lost(torch.tensor([[0.0, 9.0]]), torch.tensor([0])), torch.zeros(1))
    assert float(nats(torch.tensor(50.0))) == 50


@pytest.mark.parametrize("masked", [1, 3])
def test_impossible_classes_do_not_set_the_scale(masked: int) -> None:
    logits = torch.tensor([[3.0, 1.0, 0.5], [0.2, -1.0, 4.0]])
    for fill in (-1e4, -1e9):
        assert scale_of(torch.cat([logits, torch.full((2, masked), fill)], 1)) is None
    huge = scale_of(torch.cat([1e4 * logits, torch.full((2, masked), -1e9)], 1))
    assert huge is not None
    usual = scale_of(1e4 * logits)
    assert usual is not None
    assert torch.equal(huge, usual)


def test_a_sample_has_its_own_scale_whatever_is_first_in_its_batch() -> None:
    x, label = torch.zeros(2, 1, 4, 4), torch.tensor([0, 0])
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).eval()
    benign = torch.tensor([[1.0, 0.0, -1.0], [1e4, 0.0, -1e4]])
    goal = rescaled(rx.System(net, Gradient(net)), Goal(x, label, benign_logits=benign), benign[:1])
    assert goal.scale is not None
    assert goal.scale.tolist() == pytest.approx([1.0, 16 / 2e4])
