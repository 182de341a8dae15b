"""Guided backpropagation, guided Grad-CAM and DeepLIFT against captum, their formulas and completeness."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from robustexplain import models
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import DeepLIFT, GuidedBackprop, GuidedGradCAM, InputXGradient

tv = torchvision.models

# captum tells of its hooks on every call.
pytestmark = pytest.mark.filterwarnings("ignore:Input Tensor|Setting (forward, )?backward hooks:UserWarning")


def ready(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and eval mode, without in-place ReLU, which captum's hooks cannot take."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().double()
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def image(batch: int = 2, side: int = 32) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-7) -> None:
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=0, atol=rtol * wanted.abs().max().item())


class Pattern(nn.Module):
    """Adds a fixed pattern: a flat baseline would tie in every pooling window, whose winner is arbitrary."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("pattern", 0.3 * torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(9)))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pattern


def plain_cnn(pool: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), pool or nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


def vgg11() -> nn.Module:
    return nn.Sequential(tv.vgg.make_layers(tv.vgg.cfgs["A"]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))


NETS: dict[str, Callable[[], nn.Module]] = {"plain": plain_cnn, "vgg11": vgg11}
TARGET = torch.tensor([1, 3])


# Guided backpropagation


@pytest.mark.parametrize("channels", ["sum", "abs_sum", "max"])
@pytest.mark.parametrize("net", [*NETS, "squeezenet"])
def test_guided_backprop_is_captums(net: str, channels: Any) -> None:
    model, x = ready(NETS.get(net, lambda: tv.squeezenet1_1(num_classes=5))), image()
    wanted = captum.attr.GuidedBackprop(model).attribute(x, TARGET)
    reduced = {"sum": wanted.sum(1), "abs_sum": wanted.abs().sum(1), "max": wanted.abs().amax(1)}
    close(GuidedBackprop(model, channels)(x, TARGET), reduced[channels])


def test_guided_backprop_is_captums_on_a_trained_network(
    trained: models.Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x, y = judged[0][:8], judged[1][:8]
    wanted = captum.attr.GuidedBackprop(copy.deepcopy(trained)).attribute(x.clone(), y)[:, 0]
    close(GuidedBackprop(trained)(x, y), wanted, rtol=1e-5)


@pytest.mark.parametrize("act", [nn.ReLU6, lambda: nn.Hardtanh(0, 6), lambda: nn.ReLU(inplace=True)])
def test_relu6_and_its_kin_are_guided_where_captum_leaves_the_plain_gradient(act: Callable[[], nn.Module]) -> None:
    model = ready(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), act(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5))
    )
    x = image().requires_grad_()
    (gradient,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    found = GuidedBackprop(model)(x, torch.ones(2, dtype=torch.long)).detach()
    assert float((found - gradient.sum(1)).abs().max()) > 0.1 * float(gradient.sum(1).abs().max())
    # By hand: only positive gradients pass.
    z = model[0](x).detach()
    open_ = (z > 0) & ((z < 6) | torch.tensor(not isinstance(model[1], (nn.ReLU6, nn.Hardtanh))))
    g = (model[4].weight[1] / (z.shape[2] * z.shape[3])).clamp(min=0)[None, :, None, None] * open_
    wanted = F.conv_transpose2d(g, model[0].weight).sum(1)
    close(found, wanted)


def test_efficientnet_lite0s_guided_map_differs_from_its_gradient() -> None:
    model, x = ready(lambda: timm.create_model("efficientnet_lite0", num_classes=5)), image()
    v = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model(v).gather(1, TARGET[:, None]).sum(), v)
    ours = GuidedBackprop(model)(x, TARGET)
    theirs = captum.attr.GuidedBackprop(model).attribute(x, TARGET).sum(1)
    close(theirs, gradient.sum(1))  # captum knows the class ReLU only
    # Behind a positive gate only positive parts stay: another map altogether.
    correlation = torch.corrcoef(torch.stack([ours.flatten(), gradient.sum(1).flatten()]))[0, 1]
    assert abs(float(correlation.detach())) < 0.5


def test_a_surrogate_smooths_both_gates() -> None:
    model = ready(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)))
    x = image(side=8)
    with swapped(Softplus(2.0)):
        found = GuidedBackprop(model)(x, TARGET)
    z = model[0](x)
    g = F.softplus(model[3].weight[TARGET].reshape(z.shape), 2.0) * torch.sigmoid(2 * z)
    close(found, F.conv_transpose2d(g, model[0].weight).sum(1))


def test_a_network_without_rectifiers_is_refused() -> None:
    model = ready(lambda: timm.create_model("convnext_atto", num_classes=5))
    for interpreter in (GuidedBackprop(model), GuidedGradCAM(model)):
        with pytest.raises(UnsupportedModelError, match="silently be the plain gradient"):
            interpreter(image())


def test_guided_grad_cam_is_captums() -> None:
    model, x = ready(plain_cnn), image()
    wanted = captum.attr.GuidedGradCam(model, model[5]).attribute(x, TARGET, interpolate_mode="bilinear")
    close(GuidedGradCAM(model, layer="5")(x, TARGET), wanted.sum(1))


def test_guided_grad_cam_finds_its_layer() -> None:
    model, x = ready(plain_cnn), image()
    assert torch.equal(GuidedGradCAM(model)(x), GuidedGradCAM(model, layer="5")(x))
    with pytest.raises(UnsupportedModelError, match=r"'7' gives shape \[2, 6\]"):
        GuidedGradCAM(model, layer="7")(x)


# DeepLIFT


def deltas(model: nn.Module, x: Tensor, baseline: float) -> Tensor:
    both = [model(v).gather(1, TARGET[:, None])[:, 0] for v in (x, torch.full_like(x, baseline))]
    return both[0] - both[1]


def strided() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ELU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 6, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_deeplift_is_captums(baseline: float) -> None:
    model, x = ready(strided), image()
    wanted = captum.attr.DeepLift(model).attribute(x, torch.full_like(x, baseline), TARGET).sum(1)
    close(DeepLIFT(model, baseline)(x, TARGET), wanted)


def test_deeplift_is_captums_through_max_pooling_where_the_baseline_is_silent() -> None:
    # Without biases a black image gives nothing anywhere, and every pooling window is won by the input.
    model, x = ready(vgg11), image()
    for module in model.modules():
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            nn.init.zeros_(module.bias)
    wanted = captum.attr.DeepLift(model).attribute(x, torch.zeros_like(x), TARGET).sum(1)
    close(DeepLIFT(model)(x, TARGET), wanted)


def test_deeplift_is_captums_on_a_trained_network(trained: models.Classifier, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged[0][:8], judged[1][:8]
    wanted = captum.attr.DeepLift(copy.deepcopy(trained)).attribute(x.clone(), torch.zeros_like(x), y)[:, 0]
    close(DeepLIFT(trained)(x, y), wanted, rtol=1e-4)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tv.resnet18(num_classes=5),
        lambda: tv.densenet121(num_classes=5),
        lambda: tv.squeezenet1_1(num_classes=5),
        lambda: timm.create_model("efficientnet_lite0", num_classes=5),
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Conv2d(4, 4, 3), nn.GELU(), nn.Flatten(), nn.LazyLinear(5)
        ),
    ],
    ids=["resnet18", "densenet121", "squeezenet", "efficientnet_lite0", "other activations"],
)
def test_deeplift_is_complete(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        model.eval()(torch.rand(1, 3, 32, 32))
    model = ready(lambda: model)
    x = image()
    torch.testing.assert_close(DeepLIFT(model)(x, TARGET).sum((1, 2)), deltas(model, x, 0.0), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("pool", [nn.MaxPool2d(2), nn.MaxPool2d(3, 2)], ids=["apart", "overlapping"])
def test_deeplift_stays_complete_through_max_pooling_where_captums_does_not(pool: nn.Module) -> None:
    model, x = ready(lambda: nn.Sequential(Pattern(), *plain_cnn(pool))), image()
    wanted = deltas(model, x, 0.0)
    torch.testing.assert_close(DeepLIFT(model)(x, TARGET).sum((1, 2)), wanted, rtol=1e-9, atol=1e-12)
    # captum loses shares where the baseline wins a window next to a rectifier, and where windows overlap.
    theirs = captum.attr.DeepLift(model).attribute(x, torch.zeros_like(x), TARGET).sum((1, 2, 3))
    assert float((theirs - wanted).abs().max()) > 0.05 * float(wanted.abs().max())


def test_a_pooling_window_shares_its_difference_between_the_two_winners() -> None:
    # A window (3, 1) against (0, 2): of the difference 3 - 2, all belongs to the input's winner. Against (0, 5) the
    # winner of the baseline takes 3 - 5.
    class Two(nn.Module):
        def __init__(self, reference: float) -> None:
            super().__init__()
            self.register_buffer("shift", torch.tensor([0.0, reference]).reshape(1, 1, 1, 2))
            self.register_buffer("gain", torch.tensor([3.0, 1.0 - reference]).reshape(1, 1, 1, 2))

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(x * self.gain + self.shift, (1, 2)).flatten(1).expand(-1, 2)

    x = torch.ones(1, 1, 1, 2, dtype=torch.float64)
    first, second = (DeepLIFT(ready(lambda r=r: Two(r)))(x, torch.tensor([0]))[0, 0].tolist() for r in (2.0, 5.0))
    assert first == pytest.approx([1.0, 0.0])
    assert second == pytest.approx([0.0, -2.0])


def test_deeplift_of_a_linear_model_is_input_times_gradient() -> None:
    model, x = ready(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 900, 5))), image()
    close(DeepLIFT(model)(x, TARGET), InputXGradient(model)(x, TARGET))


def test_at_the_baseline_deeplift_is_zero_with_a_finite_gradient() -> None:
    model, x = ready(plain_cnn), torch.full((1, 3, 32, 32), 0.5, dtype=torch.float64).requires_grad_()
    found = DeepLIFT(model, 0.5)(x, torch.tensor([1]))
    (gradient,) = torch.autograd.grad(found.square().sum() + found.sum(), x)
    assert not found.any()
    assert torch.isfinite(gradient).all()


def test_two_values_at_one_place_are_weighed_by_their_slope() -> None:
    # One rectifier between -1 and 2: the slope is (2 - 0) / 3.
    model = ready(lambda: nn.Sequential(nn.Flatten(), nn.Linear(3, 1), nn.ReLU(), nn.Linear(1, 2)))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[3.0, 0, 0]]))
        model[1].bias.fill_(-1.0)
        model[3].weight.fill_(1.0)
    x = torch.tensor([1.0, 0.3, 0.2]).double().reshape(1, 3, 1, 1)
    assert DeepLIFT(model)(x, torch.tensor([0])).item() == pytest.approx(2.0)


@pytest.mark.parametrize("name", ["efficientnet_b0", "convnext_atto"])
def test_an_operation_that_the_rule_does_not_hold_for_is_named(name: str) -> None:
    model = ready(lambda: timm.create_model(name, num_classes=5))
    with pytest.raises(UnsupportedModelError, match=r"rescale rule does not hold for '(mul|layer_norm)'"):
        DeepLIFT(model)(image())


def test_a_model_that_takes_another_path_for_the_baseline_is_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = x.mean((2, 3))
            return self.head(h.relu() if float(x.sum()) > 0 else h)

    with pytest.raises(UnsupportedModelError, match="same path"):
        DeepLIFT(ready(Fickle))(image())


@pytest.mark.parametrize(
    "activation", [nn.Softplus(), nn.Sigmoid(), nn.Tanh(), nn.GELU()], ids=lambda m: type(m).__name__
)
def test_deeplift_on_flat_parts_is_no_noise_over_noise(activation: nn.Module) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 6, 3, bias=False), activation, nn.Flatten(), nn.Linear(600, 3)).eval()
    with torch.no_grad():
        # Filters of zero sum: on the flat parts their answer is rounding noise.
        net[0].weight -= net[0].weight.mean((1, 2, 3), keepdim=True)
    x = torch.full((1, 1, 12, 12), 0.3)
    x[..., 6:] = 0.7
    exact = DeepLIFT(copy.deepcopy(net).double())(x.double())
    assert float((DeepLIFT(net)(x) - exact).abs().max()) < 1e-3 * float(exact.abs().max())
