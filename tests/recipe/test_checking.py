"""What can be known before training is said before training."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.utils.data import TensorDataset

from robustexplain import models
from robustexplain.data import Data, stack
from robustexplain.errors import InputError
from robustexplain.recipe import check, check_data

TINY = Path(__file__).parents[1] / "tiny.yaml"

SMOOTH: dict[str, Any] = {
    "name": "timm",
    "options": {"architecture": "vit_tiny_patch16_224", "input_size": 16},
}
"""Of GELU alone."""

FINDINGS: dict[str, tuple[dict[str, Any], str]] = {
    "package of a metric": ({"metrics": ["lpips"]}, "metrics: 'lpips': LPIPS needs the lpips package"),
    "package of an attack": ({"attacks": ["torchattacks"]}, "attacks: 'torchattacks': this attack needs torchattacks"),
    "layer": (
        {"interpreters": [{"name": "gradcam", "layer": "features"}]},
        "interpreters: 'gradcam': unknown layer 'features'; did you mean 'net.features'",
    ),
    "layer of a member": (
        {"defenses": [{"name": "aggregated", "of": "cam", "members": ["cam", {"name": "gradcam", "layer": "conv"}]}]},
        "defenses: member \"gradcam(layer='conv')\" of 'aggregated (cam)': unknown layer 'conv'",
    ),
    "layer without what stands before it": (
        {"model": "small-resnet", "interpreters": [{"name": "gradcam", "layer": "0.conv1"}]},
        "interpreters: 'gradcam': unknown layer '0.conv1'; did you mean 'net.stages.0.conv1'",
    ),
    "a label that writes on the terminal": (
        {"interpreters": [{"name": "cam", "label": "\x1b[31mred"}]},
        "interpreters[0].label: letters, digits and signs on one line are allowed, got '\\x1b[31mred'",
    ),
    "number of resamples": (
        {"evaluation": {"bootstrap": 10**15}},
        "evaluation.bootstrap: input should be less than or equal to 1000000000, got 1000000000000000",
    ),
    "number of steps": (
        {"attacks": [{"name": "pgd", "steps": 10**12}]},
        "attacks[0].steps: input should be less than or equal to 1000000000, got 1000000000000",
    ),
    "number of classes": (
        {"model": {"name": "small-cnn", "options": {"num_classes": 10**9}}},
        "model.options.num_classes: the data say it; leave it out, got 1000000000",
    ),
    "size of the data": (
        {"data": {"name": "digits", "size": 800_000_000}},
        "data: cannot be made: RuntimeError: Storage size calculation overflowed",
    ),
    "attention": (
        {"interpreters": ["attention-rollout"]},
        "interpreters: 'attention-rollout': small-cnn computes no self-attention",
    ),
    "coefficients": (
        {"interpreters": ["theta"]},
        "interpreters: 'theta': small-cnn is no self-explaining network: use model senn",
    ),
    "columns": (
        {"interpreters": ["lime-tabular"]},
        "interpreters: 'lime-tabular': lime-tabular takes tables, and digits holds images",
    ),
    "harmless changes": (
        {"evaluation": {"harmless": ["jpeg", "column-noise"]}},
        "evaluation.harmless[1]: column-noise changes tables, and digits holds images",
    ),
    "pool": (
        {"interpreters": [{"name": "gradient", "pool": 64}]},
        "interpreters: 'gradient': pool is 64, and images of digits are [16, 16]",
    ),
    "made of parts": (
        {"defenses": [{"name": "aggregated", "of": "cam", "members": ["aggregate", "cam"]}]},
        "defenses: 'aggregated (cam)' cannot have the member 'aggregate': 'aggregate' is made of other parts",
    ),
    "trained": (
        {"defenses": [{"name": "aggregated", "of": "cam", "members": ["rts", "cam"]}]},
        "defenses: 'aggregated (cam)' cannot have the member 'rts': 'rts' is trained",
    ),
    "architecture": ({"model": "timm:../../x"}, "model: unknown timm model '../../x'"),
    "a network that is smooth": (
        {"model": SMOOTH, "interpreters": ["gradient"], "defenses": [{"name": "beta-smoothing", "of": "gradient"}]},
        "defenses: 'beta-smoothing (gradient)': it replaces rectifiers",
    ),
    "a member that guides rectifiers": (
        {
            "model": SMOOTH,
            "interpreters": ["gradient"],
            "defenses": [{"name": "aggregated", "of": "gradient", "members": ["gradient", "guided-backprop"]}],
        },
        "defenses: member 'guided-backprop' of 'aggregated (gradient)': it replaces rectifiers",
    ),
    "a bank that is larger than the data": (
        {
            "interpreters": ["gradient"],
            "defenses": [{"name": "tangent-space", "of": "gradient", "neighbours": 3000}],
        },
        "defenses: 'tangent-space (gradient)' needs at least 3000 samples, and the train part of ",
    ),
    "a detector of a handful of samples": (
        {
            "data": {"name": "digits", "size": 16, "fractions": [0.9, 0.005, 0.095]},
            "defenses": [{"name": "feature-squeezing", "of": "cam"}],
        },
        "defenses: 'feature-squeezing (cam)' needs at least 20 samples, and the defense part of ",
    ),
    "no gradient by the input": (
        {"interpreters": ["gradcam"], "defenses": [{"name": "tangent-space", "of": "gradcam"}]},
        "defenses: 'tangent-space (gradcam)': a tangent space holds gradients by the input, and GradCAM gives none",
    ),
    "size": (
        {"model": "timm:vit_tiny_patch16_224"},
        "model: timm:vit_tiny_patch16_224 refuses images of shape [1, 16, 16]",
    ),
}


def findings(**sections: Any) -> str:
    tree = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    quiet = {"interpreters": ["cam"], "defenses": [], "attacks": ["clean"]}
    with pytest.raises(InputError) as error:
        check_data(check({**tree, **quiet, **sections}))
    return str(error.value)


@pytest.mark.parametrize("case", FINDINGS)
def test_it_is_found_before_training(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lpips", "torchattacks"):
        monkeypatch.setitem(sys.modules, package, None)
    change, expected = FINDINGS[case]
    said = findings(**change)
    assert said.startswith(expected)
    assert len(said) < 1200, "thousands of names help nobody"
    assert "\n" not in said


def test_an_attack_that_the_other_library_does_not_have() -> None:
    pytest.importorskip("foolbox")
    attacks = [{"name": "foolbox", "attack": "LinfPDG"}]
    assert findings(attacks=attacks).startswith("attacks: 'foolbox': unknown attack of foolbox.attacks 'LinfPDG'")


def test_weights_of_another_architecture(tmp_path: Path) -> None:
    torch.save(models.load("small-resnet").state_dict(), tmp_path / "w.pt")
    said = findings(model={"name": "small-cnn", "weights": str(tmp_path / "w.pt")})
    assert said.startswith("model: weights of")
    assert "missing keys" in said or "do not fit" in said


def test_a_trained_member_is_in_order_where_the_row_has_it() -> None:
    tree = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    tree["defenses"] = [{"name": "aggregated", "of": "rts", "members": ["rts", "cam"]}]
    assert check_data(check(tree)).name == "digits"


def test_attention_is_found_where_it_is() -> None:
    tree = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    tree |= {"model": "timm:test_vit", "interpreters": ["attention-rollout"], "defenses": [], "attacks": ["clean"]}
    tree["data"] = {"name": "digits", "size": 160}
    assert check_data(check(tree)).shape == (1, 160, 160)


def test_the_model_is_looked_at_without_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    build = models.build

    def watched(*words: Any, **options: Any) -> Any:
        model = build(*words, **options)
        made.extend(p.device.type for p in model.parameters())
        return model

    monkeypatch.setattr(models, "build", watched)
    check_data(check(yaml.safe_load(TINY.read_text(encoding="utf-8"))))
    assert set(made) == {"meta"}


def test_a_data_set_without_a_digest_gets_one_of_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    load = type(check(tree).data).load

    def found(change: Callable[[Tensor], Tensor]) -> str:
        def silent(self: Any) -> Data:
            whole = load(self)
            x, y = stack(whole.test)
            return replace(whole, digest="", test=TensorDataset(change(x), y))

        monkeypatch.setattr(type(check(tree).data), "load", silent)
        return check_data(check(tree)).digest

    usual = found(lambda x: x)
    assert len(usual) == 64
    assert found(lambda x: x) == usual
    assert found(lambda x: 1 - x) != usual
