"""Models that answer with more than logits, or with one logit."""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import attacks, interpreters, models
from robustexplain.errors import InputError
from robustexplain.models import BinaryLogit, Output
from robustexplain.recipe import check, read
from robustexplain.recipe.checking import check_data
from robustexplain.training import Training, classification_loss, cross_entropy, fit

Pair = namedtuple("Pair", "logits features")
SHAPES: dict[str, Any] = {
    "tuple": lambda logits, features: (features, logits),
    "list": lambda logits, features: [features, logits],
    "dict": lambda logits, features: {"features": features, "logits": logits},
    "namedtuple": lambda logits, features: Pair(logits, features),
    "object": lambda logits, features: SimpleNamespace(features=features, logits=logits),
}


class Answering(nn.Module):
    """A classifier that gives its logits together with something else."""

    def __init__(self, net: nn.Module, how: str) -> None:
        super().__init__()
        self.net, self.how = net, how

    def forward(self, x: Tensor) -> Any:
        return SHAPES[self.how](self.net(x), x.mean((2, 3)))


@pytest.mark.parametrize("how", SHAPES)
def test_an_output_is_taken_by_name_or_by_place(how: str, tiny_model: nn.Module, grey: Tensor) -> None:
    name = 1 if how in ("tuple", "list") else "logits"
    model = Output(Answering(tiny_model, how), name).eval()
    assert torch.equal(model(grey), tiny_model(grey))
    assert torch.equal(interpreters.GradCAM(model)(grey), interpreters.GradCAM(tiny_model)(grey))
    with pytest.raises(InputError, match=r"no output 'scores'; it has: .*\(\[\d+, \d+\]\)"):
        Output(Answering(tiny_model, how), "scores").eval()(grey)
    with pytest.raises(InputError, match="no output 7"):
        Output(Answering(tiny_model, how), 7)(grey)


def test_an_answer_that_is_one_tensor_needs_no_output(tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.raises(InputError, match="one tensor"):
        Output(tiny_model, "shape")(grey)
    with pytest.raises(InputError, match="several logits needs no BinaryLogit"):
        BinaryLogit(tiny_model)(grey)
    with pytest.raises(InputError, match="named by a key or a place"):
        Output(tiny_model, True)


def one_logit(seed: int = 1) -> models.Classifier:
    model = models.build("small-cnn", num_classes=1, in_channels=1, seed=seed)
    assert isinstance(model, models.Classifier)
    with torch.no_grad():
        model.net.head.weight.mul_(20)
    return model


def test_one_logit_is_two_classes_of_the_sigmoids_probabilities(grey: Tensor) -> None:
    net = one_logit()
    z, p = net(grey), BinaryLogit(net)(grey).softmax(1)
    torch.testing.assert_close(p, torch.cat([1 - z.sigmoid(), z.sigmoid()], 1))
    flat = nn.Sequential(net, nn.Flatten(0)).eval()  # [B] in place of [B, 1]
    assert torch.equal(BinaryLogit(flat)(grey), BinaryLogit(net)(grey))


def test_gradient_maps_of_one_logit_are_those_of_the_sigmoid_by_hand(grey: Tensor) -> None:
    net, x = one_logit(), grey.clone().requires_grad_()
    (by_hand,) = torch.autograd.grad(net(x).sigmoid().sum(), x)
    model = BinaryLogit(net)
    for target in (0, 1):
        target_class = torch.full((len(x),), target)
        found = interpreters.Gradient(model, channels="sum")(grey, target_class)
        torch.testing.assert_close(found, by_hand.sum(1) * (1 if target else -1))


def test_every_interpreter_explains_both_classes_of_one_logit(grey: Tensor) -> None:
    model = BinaryLogit(one_logit())
    x = grey[:2]
    for make in (
        lambda m: interpreters.CAM(m),
        lambda m: interpreters.GradCAM(m, relu=False),
        lambda m: interpreters.LRP(m),
        lambda m: interpreters.DeepLIFT(m),
        lambda m: interpreters.IntegratedGradients(m, steps=8),
        lambda m: interpreters.InputXGradient(m),
        lambda m: interpreters.GuidedBackprop(m),
        lambda m: interpreters.Occlusion(m),
        lambda m: interpreters.KernelSHAP(m, samples=128),
    ):
        no, yes = (make(model)(x, torch.full((2,), c)) for c in (0, 1))
        assert yes.abs().amax((1, 2)).min() > 1e-6, make(model)
        if not isinstance(make(model), interpreters.LRP | interpreters.GuidedBackprop):
            torch.testing.assert_close(no, -yes, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("attack", [attacks.PGD(eps=0.2, steps=20), attacks.DeepFool(), attacks.Square(eps=0.3)])
def test_attacks_cross_the_one_logits_boundary(attack: Any, grey: Tensor) -> None:
    net = one_logit()
    model = BinaryLogit(net)
    y = model(grey).argmax(1).detach()
    attacked = attack(rx.System(model, interpreters.GradCAM(model)), grey, y)
    assert attacked.success.any()
    crossed = (net(attacked.x)[:, 0] > 0).long() != y
    assert torch.equal(crossed, attacked.success)


@pytest.mark.parametrize("transforms", [(), ("resize-pad-3",)])
def test_a_system_around_an_adapter_is_saved_and_loaded(
    transforms: tuple[str, ...], grey: Tensor, tmp_path: Path
) -> None:
    model: nn.Module = BinaryLogit(one_logit())
    if transforms:
        model = models.with_transforms(model, transforms)
    system = rx.System(model, interpreters.CAM(model))
    assert system.random is bool(transforms)
    system.save(tmp_path)
    loaded = rx.System.load(tmp_path)
    assert torch.equal(loaded(grey).maps, system(grey).maps)
    assert interpreters.GradCAM(model, layer="net.features")(grey).shape == grey[:, 0].shape  # names as in the network


def test_random_transforms_inside_an_adapter_are_redrawn(grey: Tensor) -> None:
    inner = models.with_transforms(one_logit(), ["resize-pad-3"])
    for model in (BinaryLogit(inner), models.Transformed(BinaryLogit(inner), ["median-2"])):
        system = rx.System(model, interpreters.Gradient(model))
        assert system.random
        assert not torch.equal(system.redrawn(5).model(grey), model(grey))


def test_an_own_module_that_answers_with_a_dictionary_is_handed_in_again(
    tiny_model: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    model = Output(Answering(tiny_model, "dict"), "logits").eval()
    system = rx.System(model, interpreters.GradCAM(model))
    system.save(tmp_path)
    assert torch.equal(rx.System.load(tmp_path, model=model)(grey).maps, system(grey).maps)
    built = Output(models.build("small-cnn", num_classes=3, in_channels=1), 0)
    assert repr(models.rebuild(models.describe(built))) == repr(built)


# Auxiliary heads


@dataclass
class Answer:
    logits: Tensor
    aux_logits: Tensor


class Auxiliary(nn.Module):
    """A main head and, in train mode, one beside it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.main, self.side = nn.Linear(64, 3), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Any:
        main, side = self.main(x.flatten(1)), self.side(x.flatten(1))
        return Answer(main, side) if self.training else main


def test_training_adds_the_auxiliary_heads_loss_and_evaluation_takes_the_main_logits() -> None:
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    net = Auxiliary().train()
    main, side = net.main(x.flatten(1)), net.side(x.flatten(1))
    expected = F.cross_entropy(main, y, reduction="none") + 0.4 * F.cross_entropy(side, y, reduction="none")
    torch.testing.assert_close(classification_loss(net(x), y), expected)
    two = {"logits": main, "aux_logits1": side, "aux_logits2": side, "features": x}
    torch.testing.assert_close(classification_loss(two, y), expected + 0.2 * F.cross_entropy(side, y, reduction="none"))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    data = list(zip(x, y.tolist(), strict=True))
    trained = fit(net, cross_entropy, data, Training(epochs=1), name="net")
    assert all(not torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    fit(net, cross_entropy, data, Training(epochs=1, validation=0.25), name="validated")
    assert trained(x).shape == (12, 3)


def test_an_output_in_training_brings_its_auxiliary_heads_along() -> None:
    class Both(Auxiliary):
        def forward(self, x: Tensor) -> Any:
            return {"out": self.main(x.flatten(1)), "aux": self.side(x.flatten(1))}

    x, y = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    net = Both()
    for model in (Output(net, "out").train(), Output(net, "out", auxiliary=["aux"]).train()):
        by_hand = {"logits": net(x)["out"], "aux_logits": net(x)["aux"]}
        assert torch.equal(classification_loss(model(x), y), classification_loss(by_hand, y))
        assert model.eval()(x).shape == (6, 3)


def test_the_inceptions_normalisation_is_torchvisions_with_its_input_transform() -> None:
    import torchvision

    theirs = torchvision.models.googlenet(weights=None, init_weights=False, transform_input=True, num_classes=3).eval()
    ours = models.build("torchvision:googlenet", num_classes=3)
    ours.net.load_state_dict(theirs.state_dict())
    x = torch.rand(2, 3, 48, 48)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(ours(x), theirs((x - mean) / std))


def test_torchvisions_googlenet_is_trained_with_its_auxiliary_heads(tmp_path: Path) -> None:
    model = models.load("torchvision:googlenet", num_classes=3)
    x, y = torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    before = model.net.aux1.fc2.weight.clone()
    fit(model, cross_entropy, list(zip(x, y.tolist(), strict=True)), Training(epochs=1, batch_size=4), name="googlenet")
    assert not torch.equal(model.net.aux1.fc2.weight, before)
    system = rx.System(model, interpreters.Gradient(model))
    system.save(tmp_path)
    assert torch.equal(rx.System.load(tmp_path)(x).maps, system(x).maps)


# Recipes

OWN = """
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(in_channels, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, num_classes)
    def forward(self, x):
        return {"features": self.body(x), "logits": self.head(self.body(x))}
"""
RECIPE = """
data: {{name: digits, size: 16}}
model: {model}
interpreters: [gradcam]
attacks: [clean]
"""


def test_a_recipe_names_the_output_of_an_own_model(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model="{name: Net, file: own.py, output: logits}"))
    recipe = read(file, trust_code=True)
    check_data(recipe)
    assert isinstance(recipe.model.load((1, 16, 16), 10, 0), Output)
    file.write_text(RECIPE.format(model="{name: Net, file: own.py}"))
    with pytest.raises(InputError, match=r"model: .*say which .* output: one of 'features', 'logits'"):
        check_data(read(file, trust_code=True))
    file.write_text(RECIPE.format(model="{name: Net, file: own.py, output: scores}"))
    with pytest.raises(InputError, match=r"model: .*no output 'scores'"):
        check_data(read(file, trust_code=True))


def test_a_recipe_says_that_a_model_gives_one_logit() -> None:
    tree = {"data": "digits", "interpreters": ["gradcam"], "attacks": ["clean"]}
    recipe = check({**tree, "model": {"name": "small-cnn", "binary": True}})
    model = recipe.model.load((1, 16, 16), 2, 0)
    assert model(torch.rand(2, 1, 16, 16)).shape == (2, 2)
    with pytest.raises(InputError, match=r"model: binary: one logit is for two classes, and the data have 10"):
        check_data(recipe)
    with pytest.raises(InputError, match=r"model.output: .*one tensor"):
        check_data(check({**tree, "model": {"name": "small-cnn", "output": "logits"}}))
    with pytest.raises(InputError, match=r"model.output: .*key or the place"):
        check({**tree, "model": {"name": "small-cnn", "output": True}})
