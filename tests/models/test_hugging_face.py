"""Image classifiers in Hugging Face's format, small ones of random weights, through their real loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import robustexplain as rx
from robustexplain import attacks, interpreters, models
from robustexplain.errors import InputError, MissingDataError, UnsupportedModelError
from robustexplain.recipe import check
from robustexplain.recipe.checking import Situation, another_order_of_classes

transformers = pytest.importorskip("transformers")
MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
NAMES = {"id2label": {0: "cat", 1: "dog", 2: "fox"}, "label2id": {"cat": 0, "dog": 1, "fox": 2}}

CONFIGS: dict[str, Callable[[], Any]] = {
    "vit": lambda: transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.3, **NAMES,
    ),
    "deit": lambda: transformers.DeiTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=32, patch_size=8,
        initializer_range=0.3, architectures=["DeiTForImageClassification"], **NAMES,
    ),
    "resnet": lambda: transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **NAMES
    ),
    "convnext": lambda: transformers.ConvNextConfig(
        num_stages=2, hidden_sizes=[8, 16], depths=[1, 1], patch_size=2, initializer_range=0.3, **NAMES
    ),
    "swin": lambda: transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4, **NAMES
    ),
    "mobilenet_v2": lambda: transformers.MobileNetV2Config(image_size=32, depth_multiplier=0.25, **NAMES),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each architecture, as ``save_pretrained`` writes it."""
    made = {}
    transformers.utils.logging.set_verbosity_error()
    for name, config in CONFIGS.items():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            net = transformers.AutoModelForImageClassification.from_config(config())
        made[name] = tmp_path_factory.mktemp(name)
        net.save_pretrained(made[name])
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
        processor.save_pretrained(made[name])
    return made


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any attempt to reach the hub or a folder fails."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a rebuilt model looks nothing up")

    for auto in (
        transformers.AutoConfig,
        transformers.AutoImageProcessor,
        transformers.AutoModelForImageClassification,
    ):
        monkeypatch.setattr(auto, "from_pretrained", refuse)


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_librarys_own_and_a_system_is_loaded_without_a_network(
    name: str, folders: dict[str, Path], x: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(folders[name], tmp_path / "model")
    model = models.load(f"hf:{folder}")
    theirs = transformers.AutoModelForImageClassification.from_pretrained(folders[name]).eval()
    images = (x * 255).round()
    processor = transformers.AutoImageProcessor.from_pretrained(folders[name])
    arrays = list(images.permute(0, 2, 3, 1).numpy().astype(np.uint8))
    with torch.no_grad():
        expected = theirs(**processor(images=arrays, return_tensors="pt")).logits
        torch.testing.assert_close(model(images / 255), expected, rtol=1e-4, atol=1e-4)
    assert (model.num_classes, model.in_channels, model.input_size) == (3, 3, 32)
    assert model.inputs == rx.data.InputSpec((32, 32), "squash", 3, ("cat", "dog", "fox"))
    system = rx.System(model, interpreters.Gradient(model), inputs=model.inputs)
    system.save(tmp_path / "system")
    offline(monkeypatch)
    shutil.rmtree(folder)
    loaded = rx.System.load(tmp_path / "system")
    assert torch.equal(loaded(x).maps, system(x).maps)
    assert loaded.inputs == model.inputs


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_a_small_model_is_explained_and_attacked(name: str, folders: dict[str, Path], x: Tensor) -> None:
    model = models.load(f"hf:{folders[name]}")
    y = model(x).argmax(1)
    for make in (interpreters.GradCAM, interpreters.IntegratedGradients, interpreters.InputXGradient):
        maps = make(model)(x)
        assert maps.shape == (2, 32, 32)
        assert maps.isfinite().all()
        assert maps.abs().sum() > 0
    system = rx.System(model, interpreters.GradCAM(model, relu=False))
    goal = (y + 1) % 3
    attacked = attacks.ADV2(eps=0.1, steps=2, warm_start=0)(system, x, y, goal_class=goal)
    assert (attacked.x - x).abs().amax() > 0.001
    assert attacks.PGD(eps=0.5, steps=20, step_size=0.1)(system, x, y).success.any()


def test_attention_of_a_vision_transformer_is_seen_and_grad_cam_is_on_its_patches(
    folders: dict[str, Path], x: Tensor
) -> None:
    model = models.load(f"hf:{folders['vit']}")
    rollout = interpreters.AttentionRollout(model).explain(x, native=True).maps
    assert rollout.shape == (2, 4, 4)
    # By hand, from the attention that the library itself gives.
    net = model.net.model
    with torch.no_grad():
        layers = net(((x - model.mean) / model.std), output_attentions=True).attentions
    flow = torch.zeros(2, 17)
    flow[:, 0] = 1
    for attention in reversed(layers):
        flow = torch.einsum("bi,bij->bj", flow, (attention.mean(1) + torch.eye(17)) / 2)
    torch.testing.assert_close(rollout.flatten(1), flow[:, 1:], rtol=1e-4, atol=1e-6)
    assert interpreters.GradCAM(model).explain(x, native=True).maps.shape == (2, 4, 4)
    with pytest.raises(UnsupportedModelError):
        interpreters.AttentionRollout(models.load(f"hf:{folders['swin']}"))(x)


def test_the_second_derivative_of_a_map_exists_and_is_right(folders: dict[str, Path], x: Tensor) -> None:
    model = models.load(f"hf:{folders['vit']}").double()
    x = x.double() * 0.9 + 0.05
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).double()

    def total(x: Tensor) -> Tensor:
        return interpreters.Gradient(model, of="logit", channels="sum")(x, torch.tensor([0, 1])).square().sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(leaf), leaf)
    # The library takes the softmax of attention in float32 whatever the input's dtype: no shorter step.
    numeric = (total(x + 1e-3 * direction) - total(x - 1e-3 * direction)) / 2e-3
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=2e-3, atol=1e-6)


def test_a_head_for_other_classes_is_new_and_the_rest_is_kept(folders: dict[str, Path], x: Tensor) -> None:
    model, whole = (models.load(f"hf:{folders['resnet']}", num_classes=k) for k in (5, 3))
    assert model(x).shape == (2, 5)
    assert model.inputs is not None
    assert model.inputs.class_names == ()
    old, new = whole.net.state_dict(), model.net.state_dict()
    assert (
        {name for name in old if not torch.equal(old[name], new[name])}
        == {"model.classifier.1.weight", "model.classifier.1.bias"}
        if all(old[n].shape == new[n].shape for n in old)
        else True
    )
    with pytest.raises(InputError, match=r"take 3 channel\(s\), got in_channels=1"):
        models.load(f"hf:{folders['resnet']}", in_channels=1)
    assert models.build(f"hf:{folders['resnet']}", in_channels=1)(x[:, :1]).shape == (2, 3)


def test_the_librarys_weights_file_is_read_into_a_model_of_the_same_configuration(
    folders: dict[str, Path], x: Tensor
) -> None:
    folder = folders["resnet"]
    expected = models.load(f"hf:{folder}")
    loaded = models.load(f"hf:{folder}", weights=folder / "model.safetensors")
    assert torch.equal(loaded(x), expected(x))


def processor_of(folder: Path, target: Path, **changes: Any) -> Path:
    """The model with another image processor."""
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    file = target / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return target


def test_normalisation_is_what_the_image_processor_does(folders: dict[str, Path], tmp_path: Path) -> None:
    def load(**changes: Any) -> models.Classifier:
        return models.load(f"hf:{processor_of(folders['resnet'], tmp_path, **changes)}")  # type: ignore[return-value]

    plain = load(do_normalize=False)
    assert (plain.mean.flatten().tolist(), plain.std.flatten().tolist()) == ([0, 0, 0], [1, 1, 1])
    doubled = load(rescale_factor=2 / 255, image_mean=[1.0] * 3, image_std=[1.0] * 3)
    torch.testing.assert_close(doubled.mean.flatten(), torch.full((3,), 0.5))
    torch.testing.assert_close(doubled.std.flatten(), torch.full((3,), 0.5))
    cropped = load(
        image_processor_type="BitImageProcessor", size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32},
        do_center_crop=True, do_convert_rgb=True,
    )  # fmt: skip
    assert cropped.inputs is not None
    assert (cropped.inputs.size, cropped.inputs.resize) == ((32, 32), "crop")


def test_channels_in_the_other_order_are_flipped(folders: dict[str, Path], x: Tensor, tmp_path: Path) -> None:
    flipping = {"image_processor_type": "MobileViTImageProcessor", "do_flip_channel_order": True}
    sizes = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, "do_center_crop": True}
    model = models.load(f"hf:{processor_of(folders['resnet'], tmp_path, **flipping, **sizes)}")
    torch.testing.assert_close(model(x), model.net.model(x.flip(1)).logits)
    assert repr(models.rebuild(models.describe(model))) == repr(model)


def test_what_is_no_trained_image_classifier_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match="no folder"):
        models.load(f"hf:{tmp_path}/none")
    for file in ("config.json", "preprocessor_config.json"):
        (tmp_path / file).write_bytes((folders["vit"] / file).read_bytes())
    with pytest.raises(MissingDataError, match="cannot get hf:"):
        models.load(f"hf:{tmp_path}")
    # Weights as a pickle are not looked at.
    torch.save({"a": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(MissingDataError, match="safetensors"):
        models.load(f"hf:{tmp_path}")
    base = transformers.ViTModel(CONFIGS["vit"]())
    base.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"holds no weights for classifier.bias, .*no trained image classifier"):
        models.load(f"hf:{tmp_path}")
    assert models.load(f"hf:{tmp_path}", num_classes=4).num_classes == 4
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(MissingDataError, match=r"image processor of .*mean=\[...\]"):
        models.load(f"hf:{tmp_path}", num_classes=4)
    assert models.load(f"hf:{tmp_path}", num_classes=4, mean=MEAN, std=STD).mean.flatten()[0] == MEAN[0]


def test_a_name_that_is_not_here_says_so_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(MissingDataError, match=r"cannot get hf:nobody/nothing.*hf:./folder"):
        models.load("hf:nobody/nothing")
    with pytest.raises(InputError, match="unknown model_type of transformers"):
        models.build("hf:mine", config={"model_type": "vitt"}, mean=MEAN, std=STD)


def test_an_image_of_another_size_is_refused_in_one_message(folders: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"refuses images of shape \[1, 3, 40, 40\]"):
        models.load(f"hf:{folders['vit']}")(torch.rand(1, 3, 40, 40))


def test_validate_builds_it_without_memory_and_compares_the_classes(folders: dict[str, Path]) -> None:
    tree = {"data": "digits", "interpreters": ["gradcam"], "attacks": ["clean"]}
    recipe = check({**tree, "model": {"name": f"hf:{folders['resnet']}"}})
    with torch.device("meta"):
        model = models.build(recipe.model.name, num_classes=3)
    assert all(p.is_meta for p in model.parameters())
    for classes, problems in ((("cat", "dog", "fox"), 0), (("dog", "cat", "fox"), 1), (("a", "b", "c"), 0)):
        found = another_order_of_classes(Situation(recipe, SimpleNamespace(name="pets", classes=classes), model))  # type: ignore[arg-type]
        assert len(found) == problems
