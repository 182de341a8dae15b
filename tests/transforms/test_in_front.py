"""Classifiers behind transforms: names, storage, draws, and the defense that puts them there."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import models
from robustexplain.defenses import InputTransform
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import CAM, LRP, RTS, GradCAM, Gradient, MaskingModel, OfTransformed, Smoothed
from robustexplain.models import Classifier, Transformed, with_transforms
from robustexplain.transforms import transform

NAMES = ("jpeg-60", "bit-depth-4")


class Bare(nn.Module):
    """Somebody's own module: no builder knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.deep(self.stem(x).relu()).relu().mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def bare() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Bare().eval()


def test_transforms_stand_before_the_normalisation_and_share_the_weights(tiny_model: Classifier, grey: Tensor) -> None:
    model = tiny_model.with_transforms(NAMES)
    torch.testing.assert_close(model(grey), tiny_model(transform(NAMES[1])(transform(NAMES[0])(grey))))
    assert model.net is tiny_model.net
    assert not model.training
    assert list(model.state_dict()) == list(tiny_model.state_dict())
    assert (model.rounds, model.random) == (True, False)
    assert (tiny_model.rounds, tiny_model.spec.options.get("transforms")) == (False, None)  # type: ignore[union-attr]
    again = with_transforms(model, ["median-2"])
    assert again.transform_names == ("median-2", *NAMES)


@pytest.mark.parametrize("foreign", [False, True])
def test_layers_keep_their_names(foreign: bool, bare: nn.Module, tiny_model: Classifier, grey: Tensor) -> None:
    plain = bare if foreign else tiny_model
    layer = "deep" if foreign else next(n for n, m in plain.named_modules() if isinstance(m, nn.Conv2d))
    model = with_transforms(plain, ["median-1"])
    torch.testing.assert_close(GradCAM(model, layer)(grey), GradCAM(plain, layer)(grey))
    if not foreign:
        torch.testing.assert_close(CAM(model)(grey), CAM(plain)(grey))


@pytest.mark.parametrize("explained", ["raw", "transformed"])
def test_a_system_behind_transforms_comes_back_from_its_folder(
    explained: Literal["raw", "transformed"], tiny_model: Classifier, grey: Tensor, tmp_path: Path
) -> None:
    defended = InputTransform(("resize-pad-3", "jpeg-60"), explained, seed=4)(
        rx.System(tiny_model, Gradient(tiny_model))
    )
    loaded = rx.System.load(defended.save(tmp_path))
    assert loaded.model.transform_names == ("resize-pad-3-4", "jpeg-60")
    assert isinstance(loaded.interpreter, OfTransformed) is (explained == "transformed")
    for found, kept in zip(
        (loaded(grey).logits, loaded(grey).maps), (defended(grey).logits, defended(grey).maps), strict=True
    ):
        assert torch.equal(found, kept)


def test_a_module_of_ones_own_is_read_back_behind_its_transforms(bare: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    model = Transformed(bare, NAMES)
    rx.System(model, Gradient(model)).save(tmp_path)
    fresh = Transformed(Bare().eval(), NAMES)
    assert torch.equal(rx.System.load(tmp_path, model=fresh, weights="stored").model(grey), model(grey))
    with pytest.raises(InputError, match="pass it as"):
        rx.System.load(tmp_path)
    built = models.build("small-cnn", num_classes=4, in_channels=1)
    spec = Transformed(built, NAMES).spec
    assert spec is not None
    assert spec.options["transforms"] == list(NAMES)
    assert models.load("small-cnn", num_classes=4, in_channels=1, transforms=NAMES).transform_names == NAMES


def test_a_random_transform_is_redrawn_and_shares_weights_and_what_was_found(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:3]
    model = with_transforms(trained, ["resize-pad-3"])
    system = rx.System(model, GradCAM(model))
    system(x)
    other = system.redrawn(9)
    assert system.random
    assert not system.rounds
    assert other.model.net is trained.net
    assert other.interpreter.model is other.model
    assert other.interpreter._sites is system.interpreter._sites  # type: ignore[attr-defined]
    assert not torch.equal(other(x).logits, system(x).logits)
    assert torch.equal(other(x).logits, system.redrawn(9)(x).logits)
    assert rx.System(trained, GradCAM(trained)).redrawn(9).model is trained


def test_a_map_is_of_the_image_that_came_or_of_what_the_transform_made(
    trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:4]
    root = rx.System(trained, Gradient(trained, of="logit", channels="sum"))
    raw, made = (InputTransform(["median-3"], how)(root) for how in ("raw", "transformed"))  # type: ignore[arg-type]
    leaf = x.clone().requires_grad_()
    target = raw.model(x).argmax(1)
    slope = torch.autograd.grad(raw.model(leaf).gather(1, target[:, None]).sum(), leaf)[0].sum(1)
    torch.testing.assert_close(raw(x).maps.detach(), slope)
    torch.testing.assert_close(made(x).maps.detach(), root.interpreter(transform("median-3")(x), target).detach())
    assert torch.equal(raw(x).logits, made(x).logits)
    assert not torch.allclose(raw(x).maps, made(x).maps)
    # Relevance knows no rule for a median, and none is needed behind it.
    assert InputTransform(["median-3"], "transformed")(rx.System(trained, LRP(trained)))(x).maps.isfinite().all()
    assert InputTransform(["median-3"]).oblivious_view(raw, root) is root


def test_interpreters_are_carried_over_with_their_parts_and_networks(tiny_model: Classifier, grey: Tensor) -> None:
    masker = MaskingModel.around(tiny_model, grey, width=8).eval()
    rts = InputTransform(["bit-depth-2"])(rx.System(tiny_model, RTS(tiny_model, masker)))
    assert isinstance(rts.interpreter, RTS)
    assert rts.interpreter.masker is masker
    smoothed = InputTransform(["jpeg-75"])(rx.System(tiny_model, Smoothed(tiny_model, Gradient(tiny_model))))
    assert smoothed.interpreter.parts[0].model is smoothed.model
    assert smoothed(grey).maps.abs().amax() > 0


def test_what_cannot_stand_behind_a_transform_is_refused(tiny_model: Classifier, quiet: rx.system.Detector) -> None:
    with pytest.raises(InputError, match="apply them before it"):
        InputTransform()(rx.System(tiny_model, Gradient(tiny_model), quiet))
    with pytest.raises(InputError, match="has no transforms in front of it"):
        OfTransformed(tiny_model, Gradient(tiny_model))
    with pytest.raises(InputError, match="transforms are of images"):
        with_transforms(models.build("mlp", num_classes=2, in_features=3), ["jpeg-75"])
    with pytest.raises(InputError, match="unknown transform"):
        InputTransform(("jpeg",))


def test_only_the_model_whose_image_is_transformed_already_is_passed_by(trained: Classifier) -> None:
    inner = with_transforms(trained, ["bit-depth-1"])
    outer = Transformed(nn.Sequential(inner).eval(), ["median-3"])
    x = torch.rand(3, 1, 32, 32)
    found = OfTransformed(outer, Gradient(outer)).explain(x).logits
    torch.testing.assert_close(found, outer(x))
    assert rx.System(outer.model, Gradient(outer.model)).rounds, "a part of a model that rounds makes the system round"


class Sharp(Classifier):
    """A classifier of somebody's own."""

    def forward(self, x: Tensor) -> Tensor:
        return 7 * super().forward(x)


def test_a_subclass_of_the_classifier_keeps_what_it_computes_behind_transforms() -> None:
    x = torch.rand(2, 1, 16, 16)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    model = Sharp(net, (0.5,), (0.5,), num_classes=3).eval()
    torch.testing.assert_close(with_transforms(model, ["median-1"])(x), model(x))
    with pytest.raises(UnsupportedModelError, match="Sharp may compute more"):
        model.with_transforms(["median-1"])
