"""Sanity checks: what Adebayo et al. and Kindermans et al. published shows on a trained network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
import yaml
from torch import Tensor, nn
from typer.testing import CliRunner

from robustexplain import interpreters, models, sanity
from robustexplain.autograd import input_shift
from robustexplain.cli import app
from robustexplain.errors import InputError, UnknownNameError, UnsupportedModelError
from robustexplain.recipe import check
from robustexplain.sanity.run import run_sanity
from robustexplain.training import Session

MAGNITUDES = "rank correlation of magnitudes"


@pytest.fixture(scope="module")
def images(judged: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return judged[0][:24], judged[1][:24]


def curve(interpreter: interpreters.Interpreter, images: tuple[Tensor, Tensor], measure: str) -> list[float]:
    layers = sanity.stages(interpreter.model, images[0])
    return [float(o.similarities[measure].nanmean()) for o in sanity.cascading(interpreter, *images, layers)]


# The published split


def test_guided_backprop_hardly_moves_with_the_upper_layers_where_gradient_and_grad_cam_do(
    trained: models.Classifier, images: tuple[Tensor, Tensor]
) -> None:
    for measure in (MAGNITUDES, "SSIM", "HOG"):
        guided = curve(interpreters.GuidedBackprop(trained, channels="max"), images, measure)
        gradient = curve(interpreters.Gradient(trained, of="logit"), images, measure)
        cam = curve(interpreters.GradCAM(trained), images, measure)
        assert [guided[0], gradient[0], cam[0]] == pytest.approx([1.0] * 3, abs=1e-4)
        # Logits and the convolution below them at random: two of five layers.
        assert guided[2] > gradient[2] + 0.15, measure
        assert guided[2] > cam[2] + 0.15, measure
    assert curve(interpreters.GuidedBackprop(trained, channels="max"), images, MAGNITUDES)[1] > 0.7


def test_the_erratum_guided_backprop_does_move_with_the_lower_layers(
    trained: models.Classifier, images: tuple[Tensor, Tensor]
) -> None:
    guided = curve(interpreters.GuidedBackprop(trained, channels="max"), images, "SSIM")
    assert guided[-1] < guided[2] - 0.15
    lowest = list(
        sanity.independent(
            interpreters.GuidedBackprop(trained, channels="max"), *images, sanity.stages(trained, images[0])
        )
    )[-1]
    assert float(lowest.similarities["SSIM"].nanmean()) < 0.6


def test_methods_that_multiply_by_the_input_keep_their_ranks_on_black_backgrounds(
    trained: models.Classifier, images: tuple[Tensor, Tensor]
) -> None:
    assert curve(interpreters.InputXGradient(trained), images, MAGNITUDES)[-1] > 0.9
    assert curve(interpreters.InputXGradient(trained), images, "rank correlation")[-1] < 0.3


def test_a_shift_that_the_bias_takes_back_moves_only_methods_with_a_reference_point(
    trained: models.Classifier, images: tuple[Tensor, Tensor]
) -> None:
    still = (interpreters.Gradient, interpreters.GradCAM, interpreters.CAM, interpreters.GuidedBackprop)
    moved = (
        interpreters.InputXGradient,
        lambda m: interpreters.IntegratedGradients(m, steps=8),
        interpreters.DeepLIFT,
        interpreters.LRP,
    )
    for make in still:
        outcome = sanity.shifted(make(trained), *images, 0.3)
        assert float(outcome.similarities[MAGNITUDES].nan_to_num(1.0).min()) > 0.97, make
    for make in moved:
        outcome = sanity.shifted(make(trained), *images, 0.3)  # type: ignore[operator]
        assert float(outcome.similarities[MAGNITUDES].nanmean()) < 0.9, make


# Stages and random weights


def test_stages_go_from_the_logits_down_and_keep_norms_with_their_convolution() -> None:
    model = torchvision.models.resnet18(num_classes=5).eval()
    every = sanity.stages(model, torch.rand(1, 3, 32, 32), most=100)
    assert every[0].modules == ("fc",)
    assert every[1].modules == ("layer4.1.bn2", "layer4.1.conv2")
    assert every[-1].modules == ("bn1", "conv1")
    assert len(every) == 21
    few = sanity.stages(model, torch.rand(1, 3, 32, 32), most=6)
    assert len(few) == 6
    assert few[0].modules == ("fc",)
    assert [n for stage in few for n in stage.modules] == [n for stage in every for n in stage.modules]
    with pytest.raises(UnsupportedModelError, match="no weights"):
        sanity.stages(nn.Flatten(), torch.rand(1, 3, 4, 4))


class Attending(nn.Module):
    """A small transformer: a class token at its root, and attention whose last layer is used without a call of it."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.rand(1, 1, 16))
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.expand(len(x), -1, -1), self.embed(x).flatten(2).mT], 1)
        return self.head(self.block(tokens)[:, 0])


def test_stages_of_a_transformer_begin_at_its_head_and_hold_every_weight() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Attending().eval()
    x = torch.rand(4, 3, 16, 16)
    found = sanity.stages(model, x, most=100)
    assert found[0].modules == ("head",)
    assert found[-1].name == "Attending"  # the class token, which is used before what is called
    before = {name: value.clone() for name, value in model.named_parameters()}
    for stage in found:
        sanity.randomise(model, stage, x, seed=0)
    same = [name for name, value in model.named_parameters() if value.dim() > 1 and torch.equal(value, before[name])]
    assert same == []
    wrapped = torchvision.models.vit_b_16(num_classes=3, image_size=32, weights=None).eval()
    assert sanity.stages(wrapped, torch.rand(1, 3, 32, 32))[0].modules == ("heads.head",)


class WithAuxiliaryHead(nn.Module):
    """A head beside the network's that runs in training alone."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head, self.auxiliary = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), nn.Sequential(nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).relu().mean((2, 3)))


def test_what_no_forward_pass_uses_is_in_no_stage() -> None:
    found = sanity.stages(WithAuxiliaryHead().eval(), torch.rand(1, 3, 8, 8), most=100)
    assert [stage.modules for stage in found] == [("head",), ("body",)]


def test_norms_without_weights_are_measured_again_too() -> None:
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)
    model = nn.Sequential(*layers).eval()
    with torch.no_grad():
        model[1].running_mean.fill_(100.0)  # type: ignore[union-attr]
    x = torch.rand(16, 1, 8, 8)
    for stage in sanity.stages(model, x):
        sanity.randomise(model, stage, x, seed=0)
    assert float(model[:3](x).detach().amax()) > 0


def test_random_weights_depend_on_seed_and_layer_and_nothing_else(trained: models.Classifier) -> None:
    x = torch.rand(4, 1, 32, 32)
    layers = sanity.stages(trained, x)
    state = torch.get_rng_state()
    one, two, three = (copy.deepcopy(trained) for _ in range(3))
    for stage in layers:
        sanity.randomise(one, stage, x, seed=1)
    sanity.randomise(two, layers[2], x, seed=1)
    sanity.randomise(three, layers[2], x, seed=2)
    name = layers[2].modules[-1]
    weights = [m.get_submodule(name).weight for m in (one, two, three, trained)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert not torch.equal(weights[1], weights[3])
    assert torch.equal(
        two.get_submodule(layers[3].modules[-1]).weight, trained.get_submodule(layers[3].modules[-1]).weight
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m.training for m in one.modules())


def test_norms_of_random_layers_are_measured_again(trained: models.Classifier) -> None:
    x = torch.rand(16, 1, 32, 32)
    model = copy.deepcopy(trained)
    for stage in sanity.stages(model, x):
        sanity.randomise(model, stage, x, seed=0)
    seen: list[Tensor] = []
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    for out in seen[:1]:
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-3, rtol=0)


def test_a_shift_that_a_method_or_a_model_cannot_take_back_is_refused(trained: models.Classifier) -> None:
    x, target = torch.rand(2, 1, 32, 32), torch.tensor([0, 1])
    clipping = interpreters.MeTFA(trained, interpreters.GradCAM(trained), samples=8)
    with pytest.raises(UnsupportedModelError, match=r"MeTFA clips its copies to \[0, 1\]"):
        sanity.shifted(clipping, x, target, 0.3)
    patches = nn.Sequential(nn.Unflatten(2, (2, 16)), nn.Flatten(3), nn.Flatten(1, 2), nn.Linear(512, 4), nn.Flatten())
    with pytest.raises(UnsupportedModelError, match="on the whole image"):
        input_shift.compensated(patches.eval(), x, 0.3)


def test_the_checked_interpreter_stays_as_it_was(trained: models.Classifier, images: tuple[Tensor, Tensor]) -> None:
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    interpreter = interpreters.GradCAM(trained)
    maps = interpreter(images[0])
    layers = sanity.stages(trained, images[0])
    list(sanity.cascading(interpreter, *images, layers))
    list(sanity.independent(interpreter, *images, layers))
    sanity.shifted(interpreter, *images, 0.2)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert torch.equal(interpreter(images[0]), maps)


def test_an_interpreter_that_does_not_ask_the_model_does_not_move(
    trained: models.Classifier, images: tuple[Tensor, Tensor]
) -> None:
    class Edges(interpreters.Interpreter):
        def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> interpreters.Explanation:
            return interpreters.Explanation(self.model(x), (x - F.avg_pool2d(x, 3, 1, 1)).abs().amax(1))

    assert curve(Edges(trained), images, "SSIM") == pytest.approx([1.0] * 6, abs=1e-4)


# The compensated network


@pytest.mark.parametrize("shift", [0.3, -0.7])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=5),
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=(2, 0), stride=2, bias=True), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5)
        ),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 1024, 8), nn.ReLU(), nn.Linear(8, 5)),
        lambda: models.build("small-resnet", num_classes=5, in_channels=3, seed=1),
        lambda: timm.create_model("test_vit", num_classes=5, img_size=32),
    ],
    ids=["resnet18", "padding", "dense", "normalised", "vit"],
)
def test_the_compensated_network_answers_alike(make: Callable[[], nn.Module], shift: float) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval()
        x = torch.rand(3, 3, 32, 32)
        wanted = model(x)
    copied = input_shift.compensated(model, x, shift)
    torch.testing.assert_close(copied(x + shift), wanted, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(copied(x), wanted, rtol=1e-3, atol=1e-4)


def test_a_model_whose_first_layer_cannot_take_it_back_is_refused() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=5).eval()
    with pytest.raises(UnsupportedModelError, match=r"plain, zero-padded torch\.nn\.Conv2d.*it is Conv2dSame"):
        input_shift.compensated(model, torch.rand(2, 3, 32, 32), 0.3)

    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x**2).mean((2, 3))

    with pytest.raises(UnsupportedModelError, match="still differ"):
        input_shift.compensated(Squares().eval(), torch.rand(2, 3, 8, 8), 0.3)


# The command

TREE = {
    "name": "checked",
    "data": {"name": "digits"},
    "model": {"name": "small-cnn", "train": {"epochs": 1, "lr": 1e-2}},
    "interpreters": ["gradient", "gradcam", {"name": "gradcam", "label": "at the head", "layer": "net.head"}],
    "attacks": ["noise"],
    "sanity": {"images": 6, "stages": 3, "pictures": 1, "label_epochs": 1},
}


def test_the_command_writes_a_page_and_resumes(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(yaml.safe_dump(TREE))
    done = CliRunner().invoke(app, ["sanity", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    page = (tmp_path / "run/sanity.html").read_text()
    assert "gradcam" in page
    assert "training accuracy on random labels" in page
    assert "at the head, cascading: unsupported" in page
    assert (tmp_path / "run/sanity.png").stat().st_size > 5000
    lines = (tmp_path / "run/sanity.csv").read_text().splitlines()
    assert lines[0] == "interpreter,check,stage,layer,measure,value,low,high,count"
    assert sum(line.startswith("gradient,cascading,3,") for line in lines) == 4
    assert any(line.startswith("gradient,shift,0,x + 0.3,SSIM,") for line in lines)
    files = sorted((tmp_path / "run/sanity").glob("*.json"))
    assert len(files) == 12
    stamps = [f.stat().st_mtime_ns for f in files]
    assert run_sanity(check(TREE), tmp_path / "run", Session()) == 0
    assert [f.stat().st_mtime_ns for f in files] == stamps
    # A check that failed is run again.
    (tmp_path / "run/report.html").write_text("a matrix that was judged before")
    files[0].write_text(json.dumps({**json.loads(files[0].read_text()), "status": "failed"}))
    assert run_sanity(check(TREE), tmp_path / "run", Session(), ["cascading"]) == 0
    assert json.loads(files[0].read_text())["status"] != "failed"
    assert "Do the explanations depend on the model?" in (tmp_path / "run/report.html").read_text()
    # Other settings are another check, in the same directory.
    other = check({**TREE, "about": "fewer", "sanity": {**TREE["sanity"], "images": 4}})  # type: ignore[dict-item]
    assert run_sanity(other, tmp_path / "run", Session(), ["shift"]) == 0
    seen = {f.name: json.loads(f.read_text())["settings"]["images"] for f in files}
    assert {name: images for name, images in seen.items() if "shift" in name} != {}
    assert all(images == (4 if "shift" in name else 6) for name, images in seen.items())


def test_what_cannot_be_checked_is_an_error_before_anything_is_trained(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean 'cascading'"):
        run_sanity(check(TREE), tmp_path, Session(), ["cascade"])
    fixed = {**TREE, "model": {"name": "small-cnn"}}
    with pytest.raises(InputError, match=r"no model\.train"):
        run_sanity(check(fixed), tmp_path, Session(), ["labels"])
    with pytest.raises(InputError, match=r"sanity\.imagse"):
        check({**TREE, "sanity": {"imagse": 3}})
