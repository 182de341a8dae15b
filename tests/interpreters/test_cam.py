"""Grad-CAM, Grad-CAM++, LayerCAM and the layers they find, against captum, pytorch-grad-cam and formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable

import captum.attr
import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from robustexplain import maps as ops
from robustexplain import models
from robustexplain.autograd import layers
from robustexplain.errors import UnknownNameError, UnsupportedModelError
from robustexplain.interpreters import CAM, GradCAM, GradCAMPlusPlus, Gradient, LayerCAM

Case = tuple[nn.Module, Tensor, Tensor]
Cam = type[GradCAM] | type[GradCAMPlusPlus] | type[LayerCAM]
FAMILY: list[Cam] = [GradCAM, GradCAMPlusPlus, LayerCAM]


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted.to(found), rtol=rtol, atol=rtol * wanted.abs().max().item())


NETS = ["trained", "timm:test_resnet", "torchvision:squeezenet1_1", "torchvision:mobilenet_v3_small"]


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest, trained: nn.Module, judged: tuple[Tensor, Tensor], colour: Tensor) -> Case:
    """A model, inputs, and classes that are not all predicted."""
    if request.param == "trained":
        return trained, judged[0][:3], torch.tensor([1, 4, 7])
    return models.build(request.param, num_classes=5, seed=2), colour, torch.tensor([0, 2, 4])


def found_layer(model: nn.Module, x: Tensor) -> nn.Module:
    return model.get_submodule(layers.last_feature_layer(model, x).name)


def features_and_gradient(model: nn.Module, layer: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's output and the gradient of the targets' logits there."""
    kept: list[Tensor] = []
    with layer.register_forward_hook(lambda m, args, out: kept.append(out)):
        logits = model(x.clone().requires_grad_())
    (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), kept[0])
    return kept[0].detach(), gradient


# Values


def test_gradcam_is_captums(case: Case) -> None:
    model, x, target = case
    theirs = captum.attr.LayerGradCam(model, found_layer(model, x)).attribute(x, target)[:, 0].detach()
    close(GradCAM(model, relu=False).explain(x, target, native=True).maps, theirs)


@pytest.mark.parametrize("cls", FAMILY)
def test_rescaled_maps_are_those_of_pytorch_grad_cam(case: Case, cls: Cam) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x, target = case
    model = copy.deepcopy(model)
    with torch.no_grad():
        # Their Grad-CAM++ adds 1e-6 to squares of gradients: it shows the formula where those are much larger.
        last = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][-1]
        last.weight.mul_(30_000)
    cam = getattr(theirs, cls.__name__)(model, [found_layer(model, x)])
    wanted = torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in target.tolist()]))
    # They rescale to [0, 1] before and after the resize; ours are raw.
    found = ops.minmax(cls(model)(x, target).detach())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_gradcam_plus_plus_is_its_formula_on_derivatives_of_the_exponential() -> None:
    # Eq. 5, 7 and 19 on Y = exp(S), where S is linear in the feature map: its derivatives are exp(S) g, g^2, g^3.
    rng = torch.Generator().manual_seed(3)
    w, x = torch.randn(4, 3, 3, 3, generator=rng).double(), torch.rand(2, 4, 3, 3, generator=rng).double()

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bcij,cijk->bk", self.features(x), w)

    model, target = Linear().eval(), torch.tensor([2, 0])
    found = GradCAMPlusPlus(model, layer="features")(x, target)
    for i in range(2):
        g, a = w[..., target[i]], x[i]
        y = (g * a).sum().exp()
        first, second, third = y * g, y * g**2, y * g**3
        alpha = second / (2 * second + a.sum((1, 2), keepdim=True) * third)
        weights = (alpha * first.clamp(min=0)).sum((1, 2))
        wanted = torch.einsum("c,cij->ij", weights, a).clamp(min=0)
        # The paper's factor exp(S) is left out.
        close(found[i], wanted / y, 1e-9)


def test_gradcam_plus_plus_stays_finite_where_the_formula_has_a_pole() -> None:
    class Pole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            z = self.features(1 - 2 * x).sum((2, 3))
            return torch.cat([z, -z], 1)

    # One channel of four places, each -1/2: g sum a = -2.
    x = torch.full((1, 1, 2, 2), 0.75)
    model = Pole().eval()
    assert torch.equal(GradCAMPlusPlus(model, layer="features", relu=False)(x, torch.tensor([0])), torch.zeros(1, 2, 2))
    assert torch.isfinite(GradCAMPlusPlus(model, layer="features")(x, torch.tensor([1]))).all()


def test_layercam_weighs_every_place_by_its_own_gradient(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged
    name = layers.feature_layers(trained, x)[2].name
    a, g = features_and_gradient(trained, trained.get_submodule(name), x, y)
    wanted = torch.stack([sum(g[i, k].clamp(min=0) * a[i, k] for k in range(a.shape[1])) for i in range(len(a))])
    close(LayerCAM(trained, layer=name, relu=False).explain(x, y, native=True).maps, wanted)
    close(LayerCAM(trained, layer=name).explain(x, y, native=True).maps, wanted.clamp(min=0))


def test_on_a_pooled_linear_head_gradcam_is_cam(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged
    cam = CAM(trained).explain(x, y, native=True).maps
    places = cam.shape[1] * cam.shape[2]
    close(GradCAM(trained, relu=False).explain(x, y, native=True).maps * places, cam)


# Layers


def quiet(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


TORCHVISION = {
    "resnet18": ("layer4", 512, 3),
    "vgg11": ("features", 512, 3),
    "densenet121": ("features", 1024, 3),
    "mobilenet_v2": ("features", 1280, 3),
    "efficientnet_b0": ("features", 1280, 3),
    "convnext_tiny": ("features", 768, 3),
    "squeezenet1_0": ("features", 512, 5),
    "swin_t": ("permute", 768, 3),
}
TIMM = {
    "resnet18": ("layer4", 512, 3),
    "efficientnet_lite0": ("bn2", 1280, 3),
    "vgg11_bn": ("features", 512, 3),
    "mobilenetv3_small_100": ("blocks", 576, 3),
    "convnext_atto": ("stages", 320, 3),
}


def check_layer(model: nn.Module, x: Tensor, expected: tuple[str, int, int]) -> None:
    layer = layers.last_feature_layer(model, x)
    assert (layer.name, layer.channels, layer.height) == expected
    kept: list[Tensor] = []
    with model.get_submodule(layer.name).register_forward_hook(lambda m, args, out: kept.append(out)):
        model(x)
    assert kept[0].shape[1:] == (layer.channels, layer.height, layer.width)


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_layer_found_in_torchvisions_families_is_the_last_stage(name: str) -> None:
    extra = {"init_weights": False} if name.startswith("vgg") else {}
    model = quiet(lambda: torchvision.models.get_model(name, weights=None, num_classes=10, **extra))
    check_layer(model, torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)), TORCHVISION[name])


@pytest.mark.parametrize("name", TIMM)
def test_the_layer_found_in_timms_families_is_the_last_stage(name: str) -> None:
    model = quiet(lambda: timm.create_model(name, num_classes=10))
    check_layer(model, torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0)), TIMM[name])


def test_a_pooling_that_copies_or_enlarges_the_grid_is_not_the_layer() -> None:
    torch.manual_seed(0)  # with some weights, 3 of 100, the check refuses the right layer of so tiny a network
    for side in (7, 2):
        net = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)),
            nn.AdaptiveAvgPool2d(7),
            nn.Dropout(),
            nn.Flatten(),
            nn.Linear(196, 2),
        ).eval()
        assert layers.last_feature_layer(net, torch.rand(1, 3, side, side)).name == "0"


def test_an_activation_behind_the_last_convolution_is_the_layer(smooth_net: nn.Module, grey: Tensor) -> None:
    assert layers.last_feature_layer(smooth_net, grey).name == "3"


def test_a_map_of_class_scores_is_not_a_feature_map() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert layers.last_feature_layer(net.eval(), torch.rand(1, 3, 9, 9)).name == "1"


def test_channels_in_the_last_place_are_read_as_channels() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.mix, self.head = nn.Conv2d(3, 24, 4, stride=4), nn.Linear(24, 24), nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.mix(self.conv(x).permute(0, 2, 3, 1)).mean((1, 2)))

    model, x, target = Last().eval(), torch.rand(1, 3, 32, 48), torch.tensor([3])
    assert [layer.name for layer in layers.feature_layers(model, x)] == ["conv"]
    features = model.mix(model.conv(x).permute(0, 2, 3, 1)).detach()
    wanted = torch.einsum("bhwc,c->bhw", features, model.head.weight[3].detach()) / 96
    for named in (None, "mix"):
        close(GradCAM(model, layer=named, relu=False).explain(x, target, native=True).maps, wanted)


@pytest.mark.parametrize("cls", FAMILY)
def test_a_layer_that_cannot_be_read_is_refused(cls: Cam, trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    x = judged[0][:2]
    name = layers.last_feature_layer(trained, x).name
    with pytest.raises(UnknownNameError, match=f"did you mean .*'{name}'"):
        cls(trained, layer=f"{name}s")(x)
    with pytest.raises(UnsupportedModelError, match=r"gives shape \[2, 10\]; Grad-CAM needs a feature map"):
        cls(trained, layer="net.head")(x)


def test_a_layer_that_does_not_reach_the_logits_is_refused() -> None:
    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.aside, self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.head(self.conv(x).mean((2, 3)))

    with pytest.raises(UnsupportedModelError, match="layer 'aside' does not reach the logits"):
        GradCAM(Aside().eval(), layer="aside")(torch.rand(1, 3, 8, 8))
    with pytest.raises(UnsupportedModelError, match="do not depend on the input, or the layer, of the gradient"):
        Gradient(Aside().eval(), layer="aside")(torch.rand(1, 3, 8, 8))


def test_a_layer_that_gives_several_tensors_is_refused(tiny_model: nn.Module, grey: Tensor) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.inner = nn.LSTM(16, 4, batch_first=True), copy.deepcopy(tiny_model)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.pair(x[:, 0])[0].sum((1, 2))[:, None]

    with pytest.raises(UnsupportedModelError, match="layer 'pair' gives shape tuple"):
        GradCAM(Pair().eval(), layer="pair")(grey)
