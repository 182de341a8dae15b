"""Tangent-space projection (Anders et al. 2020): the formula, its claim on a manipulated network, what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain as rx
from robustexplain.attacks.manipulation.patterns import pattern
from robustexplain.data import Data, stack
from robustexplain.data.inputs import InputSpec
from robustexplain.defenses import BetaSmoothing, Replaced, TangentSpace
from robustexplain.errors import FieldError, InputError, UnsupportedModelError
from robustexplain.interpreters import (
    LRP,
    Aggregate,
    GradCAM,
    Gradient,
    GuidedBackprop,
    InputXGradient,
    Projected,
    Reference,
    RelEx,
    SmoothGrad,
)
from robustexplain.metrics import Pearson
from robustexplain.models import Classifier

K = 12


@pytest.fixture(scope="module")
def bank(digits: Data) -> Reference:
    return Reference(stack(digits.train)[0])


def slow_projector(x: Tensor, bank: Tensor, k: int) -> Tensor:
    """``V V^T`` of an image as in the authors' code: singular vectors of the image and its neighbours, centred."""
    flat, point = bank.flatten(1).double(), x.flatten().double()
    nearest = (flat - point).norm(dim=1).argsort()[: k - 1]
    points = torch.cat([point[None], flat[nearest]])
    _, _, v = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    return v[: k - 1].T @ v[: k - 1]


def test_gradients_are_projected_before_anything_else(
    trained: Classifier, bank: Reference, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:3], judged[1][:3]
    raw = Gradient(trained, of="logit", channels="sum")(x, y).detach().double()
    for base, after in (
        (Gradient(trained, of="logit"), lambda g, x: g.abs()),
        (InputXGradient(trained), lambda g, x: x.double() * g),
    ):
        found = Projected(trained, base, bank, K)(x, y).detach().double()
        for i in range(3):
            g = slow_projector(x[i], bank.x, K) @ raw[i].flatten()
            wanted = after(g, x[i].flatten()).reshape(32, 32)
            torch.testing.assert_close(found[i], wanted, rtol=0, atol=1e-3 * float(wanted.abs().max()))


def test_the_adversary_goes_through_the_whole_space(smooth_net: nn.Module, grey: Tensor) -> None:
    x = grey[:1].double().requires_grad_()
    net = smooth_net.double()
    bank = Reference(torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(0)))
    method = Projected(net, Gradient(net, of="logit", channels="sum"), bank, 4)
    (gradient,) = torch.autograd.grad(method(x, torch.tensor([1])).square().sum(), x)
    smooth_net.float()
    inside = slow_projector(x.detach()[0], bank.x, 4) @ gradient.flatten()
    assert float((gradient.flatten() - inside).norm()) > 0.3 * float(gradient.norm())


class OffTheData(nn.Module):
    """The authors' construction for data in a hyperplane: what it adds is zero there, and its gradient is not."""

    def __init__(self, net: nn.Module, texture: Tensor) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("texture", texture)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.net(x)
        return logits + (x.flatten(1) @ self.texture)[:, None]


def test_it_undoes_a_manipulated_model(trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:24], judged[1][:24]
    honest = rx.System(trained, Gradient(trained, of="logit", channels="abs_sum"))
    raw = honest.interpreter(x, y).detach()
    goal = pattern(raw, "cross")
    images = torch.cat([stack(part)[0] for part in (digits.train, digits.test)]).flatten(1).double()
    _, size, directions = torch.linalg.svd(images, full_matrices=False)
    data = directions[size > 1e-5 * size[0]]
    assert len(data) < 512, "the data fill the space"
    checks = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 2.0 - 1
    texture = (goal[0] * checks).flatten().double()
    texture = texture - data.T @ (data @ texture)
    texture *= 3 * float(raw.flatten(1).norm(dim=1).mean()) / texture.norm()
    washed = OffTheData(trained, texture.float()).eval()
    lying = rx.System(washed, Gradient(washed, of="logit", channels="abs_sum"))
    torch.testing.assert_close(lying(x).logits, honest(x).logits, rtol=1e-3, atol=1e-3)
    clean, mended = (TangentSpace()(system, digits.train) for system in (honest, lying))

    def likeness(system: rx.System, maps: Tensor) -> float:
        with torch.no_grad():
            return float(Pearson()(system.interpreter(x, y), maps).mean())

    found = {
        "plain, honest": likeness(lying, raw),
        "plain, cross": likeness(lying, goal),
        "projected, honest projected": likeness(mended, clean.interpreter(x, y).detach()),
        "projected, honest": likeness(mended, raw),
        "honest projected, honest": likeness(clean, raw),
        "projected, cross": likeness(mended, goal),
    }
    print("correlation:", {name: round(value, 3) for name, value in found.items()})
    assert found["plain, cross"] > 0.6
    assert found["plain, honest"] < 0.5
    assert found["projected, honest projected"] > 0.99
    # The projected map of the honest network has as much of a cross in it.
    assert found["projected, cross"] < 0.5


def test_the_bank_is_saved_with_the_system(
    trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    system = TangentSpace(neighbours=5, images=20)(rx.System(trained, SmoothGrad(trained, 4)), digits.train)
    loaded = rx.System.load(system.save(tmp_path))
    assert isinstance(system.interpreter, Projected)
    assert isinstance(loaded.interpreter, Projected)
    assert len(loaded.interpreter.bank.x) == 20
    assert torch.equal(loaded.interpreter.bank.x, system.interpreter.bank.x)
    assert torch.equal(loaded(judged[0][:3]).maps, system(judged[0][:3]).maps)


def test_what_it_refuses(trained: Classifier, digits: Data, bank: Reference, judged: tuple[Tensor, Tensor]) -> None:
    gradient = Gradient(trained)
    with pytest.raises(FieldError, match="neighbours must be from 2 to the 3 images in the bank, got 4"):
        Projected(trained, gradient, Reference(bank.x[:3]), 4)
    with pytest.raises(InputError, match="columns have units of their own"):
        Projected(trained, gradient, Reference(torch.rand(40, 6)))
    with pytest.raises(InputError, match=r"the bank holds images \[1, 16, 16\], got \[1, 32, 32\]"):
        Projected(trained, gradient, Reference(bank.x[..., :16, :16]))(judged[0][:2])
    for base in (
        GradCAM(trained),
        LRP(trained),
        GuidedBackprop(trained),
        Aggregate(trained, (gradient, GradCAM(trained))),
    ):
        with pytest.raises(UnsupportedModelError, match=r"gives none; methods that do: .*gradient, .*smoothgrad"):
            Projected(trained, base, bank)
    with pytest.raises(FieldError, match="images must be at least neighbours=30, got 10"):
        TangentSpace(images=10)
    system = rx.System(trained, gradient)
    few = TensorDataset(bank.x[:8], torch.zeros(8, dtype=torch.long))
    with pytest.raises(FieldError, match="from 2 to the 8 images"):
        TangentSpace()(system, few)
    once = TangentSpace(neighbours=5)(system, few)
    with pytest.raises(UnsupportedModelError, match="projected already"):
        TangentSpace(neighbours=5)(once, few)
    sized = replace(system, inputs=InputSpec((32, 32), channels=1))
    small = TensorDataset(bank.x[:8, :, :16, :16], torch.zeros(8, dtype=torch.long))
    with pytest.raises(InputError, match="32 x 32 pixels"):
        TangentSpace(neighbours=5)(sized, small)


def test_it_stands_on_other_wrappers(trained: Classifier, digits: Data, judged: tuple[Tensor, Tensor]) -> None:
    system = BetaSmoothing(5.0)(rx.System(trained, Gradient(trained)))
    both = TangentSpace(neighbours=5, images=50)(system, digits.train)
    assert both.defenses == ("beta-smoothing", "tangent-space")
    assert not torch.equal(both(judged[0][:2]).maps, system(judged[0][:2]).maps)


def test_a_replaced_interpreter(trained: Classifier, judged: tuple[Tensor, Tensor]) -> None:
    system = rx.System(trained, Gradient(trained))
    relex = Replaced({"name": "relex", "samples": 2, "steps": 2})(system)  # type: ignore[arg-type]
    assert isinstance(relex.interpreter, RelEx)
    assert relex.interpreter.samples == 2
    with pytest.raises(FieldError, match="'rts' is trained"):
        Replaced("rts")
    with pytest.raises(UnsupportedModelError, match="would undo what hardened"):
        Replaced()(BetaSmoothing()(system))
