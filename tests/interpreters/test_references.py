"""Each interpreter against a source that is not this library: captum, autograd, a formula, a slow loop."""

from __future__ import annotations

import copy
from collections.abc import Callable

import captum.attr
import numpy as np
import pytest
import scipy.ndimage
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import maps as ops
from robustexplain import models
from robustexplain.attacks import PGD
from robustexplain.autograd.layers import captured, last_feature_layer
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.errors import InputError, UnknownNameError, UnsupportedModelError, ZeroMapGradientWarning
from robustexplain.interpreters import (
    CAM,
    RTS,
    GradCAM,
    Gradient,
    Interpreter,
    MaskingModel,
    MaskObjective,
    Smoothed,
    clean_objective,
)
from robustexplain.interpreters.masks.rts import gaussian_blur
from robustexplain.random_streams import Streams


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted.to(found), rtol=rtol, atol=rtol * wanted.abs().max().item())


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


@pytest.fixture(scope="module", params=["small-cnn", "timm:resnet10t", "timm:test_resnet"])
def net_and_input(request: pytest.FixtureRequest, tiny_model: nn.Module, grey: Tensor, colour: Tensor) -> object:
    if request.param == "small-cnn":
        return tiny_model, grey
    return models.build(request.param, num_classes=5, seed=2), colour


# Gradient


@pytest.mark.parametrize("channels", ["max", "abs_sum"])
def test_gradient_of_the_logit_is_captums_saliency(net_and_input: tuple[nn.Module, Tensor], channels: str) -> None:
    model, x = net_and_input
    target = torch.arange(len(x)) % 4
    theirs = captum.attr.Saliency(model).attribute(x.clone().requires_grad_(), target, abs=True)
    wanted = theirs.amax(1) if channels == "max" else theirs.sum(1)
    close(Gradient(model, of="logit", channels=channels)(x, target), wanted)  # type: ignore[arg-type]


def test_gradient_of_a_probability_and_of_its_logarithm_agree_with_autograd(
    smooth_net: nn.Module, grey: Tensor
) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey.double().requires_grad_()
    target = torch.tensor([0, 1, 2, 3, 0])
    p = model(x).softmax(1).gather(1, target[:, None])
    (of_p,) = torch.autograd.grad(p.sum(), x, retain_graph=True)
    (of_log_p,) = torch.autograd.grad(p.log().sum(), x)
    close(Gradient(model, channels="sum")(x, target), of_p.sum(1), 1e-10)
    close(Gradient(model, of="log_probability", channels="sum")(x, target), of_log_p.sum(1), 1e-10)
    close(Gradient(model, of="log_probability")(x, target) * p[:, :, None].detach(), of_p.abs().amax(1), 1e-10)


@pytest.mark.parametrize("of", ["probability", "log_probability"])
@pytest.mark.parametrize("gap", [0.0, 10.0, 30.0, 80.0])
def test_a_confident_prediction_keeps_its_map_in_float32(
    tiny_model: nn.Module, grey: Tensor, of: str, gap: float
) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad():
        model.net.head.bias += torch.tensor([gap, 0, 0, 0])
    target = torch.zeros(len(grey), dtype=torch.int64)
    found = Gradient(model, of=of)(grey, target)  # type: ignore[arg-type]
    z = copy.deepcopy(model).double()(x := grey.double().requires_grad_())
    # In float64 by hand: grad log p_c = sum_k p_k (grad z_c - grad z_k), term by term.
    wanted = torch.zeros_like(x)
    for k in range(1, 4):
        p_k = z.softmax(1)[:, k, None, None, None].detach()
        wanted += p_k * torch.autograd.grad((z[:, 0] - z[:, k]).sum(), x, retain_graph=True)[0]
    if of == "probability":
        wanted *= z.softmax(1)[:, 0, None, None, None].detach()
    assert (found.flatten(1).amax(1) > 0).all()
    torch.testing.assert_close(found.double(), wanted.abs().amax(1), rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))


def test_a_logits_gradient_on_rectifiers_has_no_derivative_of_its_own(tiny_model: nn.Module, grey: Tensor) -> None:
    x = grey.clone().requires_grad_()
    with pytest.warns(ZeroMapGradientWarning):
        (gradient,) = torch.autograd.grad(Gradient(tiny_model, of="logit")(x).sum(), x)
    assert not gradient.any()


@pytest.mark.parametrize("settings", [{"of": "loss"}, {"channels": "mean"}])
def test_a_word_that_gradient_does_not_know_is_refused(tiny_model: nn.Module, settings: dict[str, str]) -> None:
    (field,) = settings
    with pytest.raises(InputError, match=rf"Gradient\.{field} must be one of '.*, got '{settings[field]}'"):
        Gradient(tiny_model, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("channels", ["abs_sum", "sum"])
def test_gradient_by_a_layer_is_captums(tiny_model: nn.Module, grey: Tensor, channels: str) -> None:
    target = torch.tensor([3, 2, 1, 0, 3])
    layer = tiny_model.get_submodule("net.features.5")
    captums = captum.attr.LayerGradientXActivation(tiny_model, layer, multiply_by_inputs=False)
    theirs = captums.attribute(grey, target).detach()
    of_layer = Gradient(tiny_model, of="logit", channels=channels, layer="net.features.5")  # type: ignore[arg-type]
    found = of_layer.explain(grey, target, native=True)
    close(found.maps, theirs.abs().sum(1) if channels == "abs_sum" else theirs.sum(1))
    close(of_layer(grey, target), ops.resize(found.maps, grey.shape[-2:]))
    assert torch.equal(found.logits, tiny_model(grey))


def test_gradient_of_a_probability_by_a_layer_agrees_with_autograd(smooth_net: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey.double()
    (name,) = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][1:2]
    with captured(model, [name]) as outputs:
        p = model(x.requires_grad_()).softmax(1)[:, 2]
    (wanted,) = torch.autograd.grad(p.sum(), outputs[name])
    target = torch.full((len(x),), 2)
    found = Gradient(model, channels="sum", layer=name).explain(x, target, native=True).maps
    close(found, wanted.sum(1), 1e-10)


def test_a_pooled_gradient_is_averaged_over_squares(tiny_model: nn.Module, grey: Tensor) -> None:
    fine, coarse = (Gradient(tiny_model, pool=pool).explain(grey, native=True).maps for pool in (1, 4))
    blocks = pytest.importorskip("skimage.measure").block_reduce(fine.detach().numpy(), (1, 4, 4), np.mean)
    close(coarse, torch.from_numpy(blocks))
    assert Gradient(tiny_model, pool=4)(grey).shape == grey[:, 0].shape
    with pytest.raises(InputError, match=r"Gradient.pool: maps of \[16, 16\] hold no square of side 17"):
        Gradient(tiny_model, pool=17)(grey)


def test_a_gradient_by_a_layer_has_the_right_derivatives(smooth_net: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(smooth_net).double(), grey[:2, :, :5, :5].double().requires_grad_()
    target, wave = torch.tensor([1, 3]), torch.linspace(-1, 1, 25, dtype=torch.float64).reshape(5, 5)
    of_layer = Gradient(model, channels="sum", layer="1")

    def shown(inputs: Tensor) -> Tensor:
        return of_layer.explain(inputs, target, native=True).maps

    assert torch.autograd.gradcheck(shown, x)
    for weight in (model.get_parameter("2.weight"), model.get_parameter("6.weight")):
        weight.requires_grad_()
        (found,) = torch.autograd.grad((shown(x) * wave).sum(), weight)
        step = torch.randn(weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-5 * step
            values.append((shown(x) * wave).sum().item())
            with torch.no_grad():
                weight -= sign * 1e-5 * step
        assert float((found * step).sum()) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ("net.feature.5", UnknownNameError, "unknown layer 'net.feature.5'; did you mean 'net.features.5'"),
        ("net.head", UnsupportedModelError, r"layer 'net.head' gives \[5, 4\]; a gradient map needs a feature map"),
    ],
)
def test_a_gradient_by_no_feature_map_is_refused(
    tiny_model: nn.Module, grey: Tensor, layer: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Gradient(tiny_model, layer=layer)(grey)


# CAM and Grad-CAM


def test_gradcam_is_captums(net_and_input: tuple[nn.Module, Tensor]) -> None:
    model, x = net_and_input
    target = torch.arange(len(x)) % 4
    name = last_feature_layer(model, x).name
    layer = model.get_submodule(name)
    theirs = captum.attr.LayerGradCam(model, layer).attribute(x, target)[:, 0]
    close(GradCAM(model, relu=False).explain(x, target, native=True).maps, theirs)
    close(GradCAM(model).explain(x, target, native=True).maps, theirs.relu())
    close(GradCAM(model, layer=name, relu=False)(x, target), ops.resize(theirs, x.shape[-2:]))


def test_gradcam_of_a_named_earlier_layer_is_captums(tiny_model: nn.Module, grey: Tensor) -> None:
    target = torch.tensor([3, 2, 1, 0, 3])
    theirs = captum.attr.LayerGradCam(tiny_model, tiny_model.net.features[4]).attribute(grey, target)[:, 0]
    found = GradCAM(tiny_model, layer="net.features.4", relu=False).explain(grey, target, native=True)
    assert found.maps.shape == (5, 8, 8)
    close(found.maps, theirs)


def test_cam_is_the_heads_weights_on_the_last_feature_map(tiny_model: nn.Module, grey: Tensor) -> None:
    net = tiny_model.net
    features = net.features((grey - tiny_model.mean) / tiny_model.std)
    target = torch.tensor([0, 1, 2, 3, 0])
    wanted = torch.stack([
        sum(net.head.weight[c, k] * features[i, k] for k in range(64)) for i, c in enumerate(target.tolist())
    ])  # fmt: skip
    close(CAM(tiny_model).explain(grey, target, native=True).maps, wanted)


def test_cams_maps_average_to_the_logits(net_and_input: tuple[nn.Module, Tensor]) -> None:
    model, x = net_and_input
    bias = [m for m in model.modules() if isinstance(m, nn.Linear)][-1].bias
    for c in range(4):
        target = torch.full((len(x),), c)
        maps = CAM(model).explain(x, target, native=True).maps
        close(maps.mean((1, 2)) + bias[c], model(x)[:, c])


def test_cam_is_signed_gradcam_times_the_size_of_the_grid(net_and_input: tuple[nn.Module, Tensor]) -> None:
    model, x = net_and_input
    cam = CAM(model).explain(x, native=True).maps
    gradcam = GradCAM(model, relu=False).explain(x, native=True).maps
    close(cam, gradcam * cam[0].numel())
    every = torch.cat([CAM(model)(x, torch.full((len(x),), c)) for c in range(4)])
    assert (every < 0).any()


def test_maps_on_a_coarse_grid_are_resized_bilinearly(tiny_model: nn.Module, grey: Tensor) -> None:
    native = CAM(tiny_model).explain(grey, native=True).maps
    assert native.shape == (5, 4, 4)
    wanted = F.interpolate(native[:, None], size=(16, 16), mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(CAM(tiny_model)(grey), wanted)


def convolution() -> list[nn.Module]:
    return [nn.Conv2d(1, 6, 3, stride=2, padding=1), nn.ReLU()]


UNPOOLED = {
    "flattened": lambda: nn.Sequential(*convolution(), nn.Flatten(), nn.Linear(6 * 64, 3)),
    "max pooled": lambda: nn.Sequential(*convolution(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
    "two layers": lambda: nn.Sequential(
        *convolution(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)
    ),
    "scaled logits": lambda: nn.Sequential(
        *convolution(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3), nn.Hardtanh(-0.01, 0.01)
    ),
}


@pytest.mark.parametrize("head", UNPOOLED)
def test_cam_refuses_a_net_without_a_pooled_linear_head(head: str, grey: Tensor) -> None:
    model = seeded(UNPOOLED[head])
    with pytest.raises(UnsupportedModelError, match=r"one linear layer on the global average.*Use GradCAM"):
        CAM(model)(grey)
    assert GradCAM(model)(grey).shape == (5, 16, 16)


@pytest.mark.parametrize("cls", [CAM, GradCAM])
def test_a_net_without_feature_maps_is_refused(cls: type[Interpreter], grey: Tensor) -> None:
    mlp = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 8), nn.ReLU(), nn.Linear(8, 3)))
    with pytest.raises(UnsupportedModelError, match=r"no convolutional feature map.*such as Gradient"):
        cls(mlp)(grey)
    assert Gradient(mlp)(grey).shape == (5, 16, 16)


def test_a_layer_that_is_not_there_is_refused_with_near_names(tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.raises(UnknownNameError, match=r"unknown layer 'net\.feature\.11'; did you mean 'net\.features\.11'"):
        GradCAM(tiny_model, layer="net.feature.11")(grey)


def test_a_layer_that_gives_no_map_or_does_not_run_is_refused(grey: Tensor) -> None:
    model = seeded(UNPOOLED["flattened"])
    with pytest.raises(UnsupportedModelError, match=r"layer '3' gives shape \[5, 3\]"):
        GradCAM(model, layer="3")(grey)
    model.idle = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    model.forward = lambda x: nn.Sequential(*list(model)[:4])(x)  # type: ignore[method-assign]
    with pytest.raises(UnsupportedModelError, match="layer 'idle' does not run"):
        GradCAM(model, layer="idle")(grey)


def test_an_in_place_activation_does_not_corrupt_the_features_before_it(grey: Tensor) -> None:
    def build(inplace: bool) -> nn.Module:
        layers = [nn.Conv2d(1, 6, 3), nn.ReLU(inplace), nn.Conv2d(6, 5, 3), nn.ReLU(inplace)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3))

    ours, reference = seeded(lambda: build(True)), seeded(lambda: build(False))
    for layer in ("0", "2", "3"):
        found, wanted = (GradCAM(m, layer=layer, relu=False)(grey) for m in (ours, reference))
        assert torch.equal(found, wanted)
        with captured(ours, [layer]) as outputs:
            ours(grey)
        inner = nn.Sequential(*list(reference)[: int(layer) + 1])(grey)
        assert torch.equal(outputs[layer], inner)
    assert (wanted != 0).any()


@pytest.mark.parametrize("cls", [CAM, GradCAM, Gradient])
def test_a_net_whose_weights_are_all_frozen_is_explained(
    cls: type[Interpreter], tiny_model: nn.Module, grey: Tensor
) -> None:
    frozen = copy.deepcopy(tiny_model).requires_grad_(False)
    assert torch.equal(cls(frozen)(grey), cls(tiny_model)(grey))


@pytest.mark.parametrize("architecture", ["small-cnn", "timm:resnet10t"])
def test_cam_recognises_a_pooled_head_in_bfloat16(architecture: str, colour: Tensor) -> None:
    model = models.build(architecture, num_classes=5, in_channels=3)
    wanted = CAM(model)(colour)
    found = CAM(copy.deepcopy(model).bfloat16())(colour.bfloat16()).float()
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.98


# Smoothed


class Functional(nn.Module):
    """Calls its rectifier as a function, twice, around two convolutions and a pooled head."""

    def __init__(self, rectifier: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rectifier = rectifier
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.rectifier(self.two(self.rectifier(self.one(x)))).mean((2, 3)))
        return logits


def dropped(x: Tensor) -> Tensor:
    F.relu(x, inplace=True)
    return x


NETS: dict[str, Callable[[], nn.Module]] = {
    "F.relu": lambda: Functional(F.relu),
    "F.relu in place, its result dropped": lambda: Functional(dropped),
    "nn.ReLU": lambda: Functional(nn.ReLU()),
    "nn.ReLU in place": lambda: Functional(nn.ReLU(inplace=True)),
    "ReLU6": lambda: Functional(nn.ReLU6()),
    "clamp": lambda: Functional(lambda z: z.clamp(min=0)),
    "timm": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=5),
}


@pytest.mark.parametrize("name", NETS)
def test_smoothed_explains_a_smoother_twin_and_keeps_the_models_logits(name: str, colour: Tensor) -> None:
    model = seeded(NETS[name])
    base = Gradient(model, of="logit", channels="sum")
    plain, smoothed = base.explain(colour), Smoothed(model, base, Softplus(2.0)).explain(colour)
    assert torch.equal(smoothed.logits, model(colour))
    difference = (smoothed.maps - plain.maps).flatten(1).norm(dim=1) / plain.maps.flatten(1).norm(dim=1)
    assert (difference > 0.05).all()
    x = colour.clone().requires_grad_()
    maps = Smoothed(model, base, Softplus(2.0))(x)
    assert torch.autograd.grad(maps.square().sum(), x)[0].abs().max() > 0


def test_smoothed_equals_the_net_with_its_rectifiers_replaced_by_hand(colour: Tensor) -> None:
    model, twin = seeded(NETS["nn.ReLU"]), seeded(lambda: Functional(nn.Softplus(beta=3.0, threshold=1e9)))
    twin.load_state_dict(model.state_dict())
    target = torch.tensor([0, 1, 2])
    for base in (Gradient(model), CAM(model), GradCAM(model)):
        found = Smoothed(model, base, Softplus(3.0))(colour, target)
        close(found, type(base)(twin)(colour, target))


def test_a_smoother_twin_moves_less_and_a_sharp_one_is_the_base(tiny_model: nn.Module, grey: Tensor) -> None:
    base = GradCAM(tiny_model)
    sharp = Smoothed(tiny_model, base, Softplus(1e5))(grey)
    close(sharp, base(grey), 1e-3)
    distances = [(Smoothed(tiny_model, base, Softplus(b))(grey) - base(grey)).norm().item() for b in (1.0, 5.0, 50.0)]
    assert distances == sorted(distances, reverse=True)


def test_smoothed_explains_the_real_models_prediction_and_model(tiny_model: nn.Module, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model)
    with torch.no_grad(), swapped(Softplus(1.0)):
        twin = model(grey)
    with torch.no_grad():
        # Halfway between the two nets' logits: what one prefers, the other does not.
        model.net.head.bias -= (model(grey).mean(0) + twin.mean(0)) / 2
        real = model(grey).argmax(1)
        with swapped(Softplus(1.0)):
            assert (model(grey).argmax(1) != real).any()
    found = Smoothed(model, CAM(model), Softplus(1.0))
    assert torch.equal(found(grey), found(grey, real))
    with pytest.raises(InputError, match="must explain the same model"):
        Smoothed(tiny_model, GradCAM(copy.deepcopy(tiny_model)))
    with pytest.raises(InputError, match="base must be an Interpreter"):
        Smoothed(tiny_model, GradCAM)  # type: ignore[arg-type]


# RTS


@pytest.fixture
def masker(tiny_model: nn.Module, grey: Tensor) -> MaskingModel:
    made = seeded(lambda: MaskingModel.around(copy.deepcopy(tiny_model), grey, width=8))
    assert isinstance(made, MaskingModel)
    with torch.no_grad():
        made.selector.weight.mul_(10)
    return made


def test_a_masks_values_lie_in_0_1_and_depend_on_the_class(
    tiny_model: nn.Module, masker: MaskingModel, grey: Tensor
) -> None:
    rts = RTS(tiny_model, masker)
    maps = torch.stack([rts(grey, torch.full((5,), c)) for c in range(4)])
    assert ((maps > 0) & (maps < 1)).all()
    for a in range(4):
        for b in range(a):
            assert not torch.allclose(maps[a], maps[b], atol=1e-5)
    with torch.no_grad():
        masker.selector.weight.copy_(masker.selector.weight[:1].expand(4, -1))
    assert torch.equal(rts(grey, torch.full((5,), 1)), rts(grey, torch.full((5,), 2)))


def test_a_masks_class_is_that_of_the_deployed_model_not_of_the_encoder(
    tiny_model: nn.Module, masker: MaskingModel, grey: Tensor
) -> None:
    deployed = copy.deepcopy(tiny_model)
    with torch.no_grad():
        deployed.net.head.bias += torch.tensor([0.0, 0.0, 0.0, 100.0])
    found = RTS(deployed, masker).explain(grey)
    assert (found.logits.argmax(1) == 3).all()
    assert torch.equal(found.maps, RTS(deployed, masker)(grey, torch.full((5,), 3)))
    assert found.encoder_logits is not None
    assert torch.equal(found.encoder_logits, masker.encoder(grey))


def test_a_mask_is_drawn_on_the_finest_of_its_levels(tiny_model: nn.Module, grey: Tensor) -> None:
    for levels, side in ((1, 4), (2, 8)):
        made = MaskingModel.around(tiny_model, grey, width=4, levels=levels)
        assert made(grey)[0].shape == (5, side, side)


def test_a_masker_in_train_mode_or_of_another_kind_is_refused(
    tiny_model: nn.Module, masker: MaskingModel, grey: Tensor
) -> None:
    with pytest.raises(InputError, match="masker must be a MaskingModel, got Classifier"):
        RTS(tiny_model, tiny_model)  # type: ignore[arg-type]
    masker.encoder.train()
    with pytest.raises(InputError, match=r"masker is in train mode.*masker\.eval\(\)"):
        RTS(tiny_model, masker)(grey)


def test_a_masker_that_trains_keeps_its_encoders_batch_norm_in_eval_mode(masker: MaskingModel) -> None:
    assert not masker.train().encoder.training
    assert masker.training


def test_the_blur_is_scipys(grey: Tensor) -> None:
    sigma = torch.tensor([0.4, 1.0, 2.2, 3.0, 1.7], dtype=torch.float64)
    x = torch.cat([grey, grey.flip(3)], 1).double()[..., :13]
    found = gaussian_blur(x, sigma)
    for image, s, blurred in zip(x.numpy(), sigma.tolist(), found.numpy(), strict=True):
        for channel, wanted in zip(image, blurred, strict=True):
            theirs = scipy.ndimage.gaussian_filter(channel, s, mode="nearest", radius=int(3 * s) + 1)
            np.testing.assert_allclose(wanted, theirs, atol=1e-12)


def test_a_samples_blur_does_not_depend_on_its_batch(grey: Tensor) -> None:
    sigma = torch.tensor([0.4, 1.0, 2.2, 3.0, 1.7])
    alone = torch.cat([gaussian_blur(grey[i : i + 1], sigma[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(gaussian_blur(grey, sigma), alone)


def test_the_background_is_one_colour_or_the_images_own_blur(colour: Tensor) -> None:
    x = colour[..., ::4, ::4].repeat(8, 1, 1, 1) * torch.linspace(0.5, 1, 24)[:, None, None, None]
    found = MaskObjective().background(x, Streams.of(x, 0))
    flat = (found == found[:, :, :1, :1]).flatten(1).all(1)
    assert 4 < flat.sum() < 20
    assert (found >= 0).all()
    assert (found <= 1).all()
    for image, blurred in zip(x[~flat], found[~flat], strict=True):
        # Replicated borders shift a mean a little; a blur stays within the image's range and is smoother.
        assert ops.total_variation(blurred).sum() < 0.5 * ops.total_variation(image).sum()
        assert blurred.mean().item() == pytest.approx(image.mean().item(), abs=0.1)


def test_the_terms_of_the_mask_objective_agree_with_a_slow_loop(tiny_model: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(tiny_model).double(), grey.double()
    y = torch.tensor([0, 1, 2, 3, 0])
    mask = torch.rand(5, 16, 16, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    objective = MaskObjective(tv=1.5, average=3.0, destroy=2.5, power=0.4)
    found = objective.terms(model, x, y, mask, Streams.of(x, 1))
    assert set(found) == {"tv", "average", "preserve", "destroy"}
    background = objective.background(x, Streams.of(x, 1))
    for i in range(5):
        m, b = mask[i], background[i]
        down, right = (m[1:] - m[:-1]) ** 2, (m[:, 1:] - m[:, :-1]) ** 2
        p_kept = model((m * x[i] + (1 - m) * b)[None]).softmax(1)[0, y[i]]
        p_removed = model(((1 - m) * x[i] + m * b)[None]).softmax(1)[0, y[i]]
        wanted = {
            "tv": 1.5 * (down.mean() + right.mean()),
            "average": 3.0 * m.mean(),
            "preserve": -p_kept.log(),
            "destroy": 2.5 * p_removed**0.4,
        }
        for term, value in wanted.items():
            assert found[term][i].item() == pytest.approx(value.item(), rel=1e-9), term


def test_a_coarse_mask_is_stretched_over_the_image_and_regularised_on_its_own_grid(
    tiny_model: nn.Module, grey: Tensor
) -> None:
    y, mask = torch.zeros(5, dtype=torch.int64), torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(7))
    coarse = MaskObjective().terms(tiny_model, grey, y, mask, Streams.of(grey, 0))
    full = MaskObjective().terms(tiny_model, grey, y, ops.resize(mask, (16, 16)), Streams.of(grey, 0))
    for term in ("preserve", "destroy"):
        torch.testing.assert_close(coarse[term], full[term])
    torch.testing.assert_close(coarse["tv"], 2.0 * ops.total_variation(mask))


def test_the_destroy_term_has_a_finite_gradient_at_probability_zero(tiny_model: nn.Module, grey: Tensor) -> None:
    sure = copy.deepcopy(tiny_model)
    with torch.no_grad():
        sure.net.head.bias += torch.tensor([500.0, 0.0, 0.0, 0.0])
    mask = torch.full((5, 4, 4), 0.5, requires_grad=True)
    terms = MaskObjective().terms(sure, grey, torch.full((5,), 2), mask, Streams.of(grey, 0))
    (gradient,) = torch.autograd.grad(terms["destroy"].sum(), mask)
    assert torch.isfinite(gradient).all()


def test_the_clean_objective_is_the_sum_of_its_terms_and_the_same_for_the_same_seed(tiny_model: nn.Module) -> None:
    x = torch.rand(5, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    y = torch.zeros(5, dtype=torch.int64)
    rts = RTS(tiny_model, MaskingModel.around(copy.deepcopy(tiny_model), x).eval())
    found = clean_objective(rts, x, y)
    parts = found["tv"] + found["average"] + found["preserve"] + found["destroy"]
    torch.testing.assert_close(found["objective"], parts)
    torch.testing.assert_close(clean_objective(rts, x[2:3], y[2:3])["objective"], found["objective"][2:3])
    assert not torch.equal(clean_objective(rts, x, y, seed=1)["objective"], found["objective"])


def test_a_part_in_train_mode_is_found_behind_a_model_in_eval_mode(tiny_model: nn.Module) -> None:
    model = copy.deepcopy(tiny_model).eval()
    dict(model.named_modules())["net.features"].train()
    with pytest.raises(InputError, match=r"its part 'net\.features' is in train mode"):
        Gradient(model)(torch.rand(1, 1, 32, 32))


def test_a_count_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(InputError, match=r"steps must be a whole number, got 2\.5"):
        PGD(steps=2.5)  # type: ignore[arg-type]


# RTS on other people's networks


@pytest.mark.parametrize(
    "name", ["efficientnet_lite0", "mobilenetv3_small_050", "convnext_atto", "regnetx_002", "densenet121"]
)
def test_rts_draws_on_timms_feature_extractors(name: str) -> None:
    encoder = seeded(lambda: timm.create_model(name, num_classes=5)).requires_grad_(False)
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    masker = MaskingModel.around(encoder, x).eval()
    assert len(masker.levels) == 3
    found = RTS(encoder, masker).explain(x, torch.tensor([0, 1]), native=True)
    assert found.maps.shape[0] == 2
    assert found.maps.shape[1] >= 4
    assert float(found.maps.detach().min()) >= 0
    assert float(found.maps.detach().max()) <= 1
    torch.testing.assert_close(found.encoder_logits, found.logits)


def test_rts_on_a_transformer_is_refused(tiny_vit: nn.Module) -> None:
    with pytest.raises(UnsupportedModelError, match="a U-Net needs at least two: take a convolutional network"):
        MaskingModel.around(tiny_vit, torch.rand(1, 1, 16, 16))
