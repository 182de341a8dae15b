"""Saved systems: equal to the bit after a round trip, refused clearly when damaged, and never running code."""

from __future__ import annotations

import copy
import errno
import hashlib
import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.data import TensorDataset

import robustexplain
from robustexplain import System, files, models, seals
from robustexplain.attacks import ADV2, PGD
from robustexplain.autograd.rectifiers import Softplus
from robustexplain.data import InputSpec
from robustexplain.defenses import AID, Aggregate, AggregatedInterpreter, BetaSmoothing, Defense, XEnsemble
from robustexplain.defenses.detection import FeatureSqueezingDetector, Forest
from robustexplain.errors import InputError, MissingDataError, RobustExplainWarning, UnknownNameError
from robustexplain.interpreters import (
    CAM,
    RTS,
    ExpectedGradients,
    GradCAM,
    Gradient,
    Interpreter,
    KernelSmoothed,
    MaskingModel,
    NeighbourMean,
    Projected,
    Reference,
    RelEx,
    RTSTraining,
    Smoothed,
    train_rts,
)
from robustexplain.models.half_huber import HalfHuberNetwork
from robustexplain.models.reformed import Reformed
from robustexplain.models.skops_file import dumped
from robustexplain.registry import DETECTORS
from robustexplain.storage import checksum
from robustexplain.training import Training
from robustexplain.transforms import transforms as squeezers


def rts(model: nn.Module, x: Tensor) -> RTS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return RTS(model, MaskingModel.around(copy.deepcopy(model), x, width=8).eval())


INTERPRETERS: dict[str, Callable[[nn.Module, Tensor], Interpreter]] = {
    "gradient": lambda model, x: Gradient(model, of="logit", channels="abs_sum"),
    "gradient by a layer": lambda model, x: Gradient(model, layer="net.features.5", pool=2),
    "cam": lambda model, x: CAM(model),
    "gradcam": lambda model, x: GradCAM(model, layer="net.features.8", relu=False),
    "smoothed": lambda model, x: Smoothed(model, Gradient(model), Softplus(0.7)),
    "kernel-smoothed": lambda model, x: KernelSmoothed(model, CAM(model), 0.07, samples=3, noise="uniform", seed=4),
    "neighbour-mean": lambda model, x: NeighbourMean(model, GradCAM(model), Reference(x), 2),
    "ranks": lambda model, x: Aggregate(model, (CAM(model), Gradient(model)), how="rank", weights=(0.25, 0.75)),
    "agg-var": lambda model, x: Aggregate(model, (CAM(model), Gradient(model)), how="var", floor=0.3),
    "projected": lambda model, x: Projected(model, Gradient(model), Reference(x), 2),
    "relex": lambda model, x: RelEx(model, samples=2, steps=3, lr=0.02, l1=0.01, baseline="mean", seed=5),
    "rts": rts,
    "aggregate": lambda model, x: Aggregate(model, (rts(model, x), CAM(model), Gradient(model)), "absmax"),
}


@pytest.fixture
def saved(tiny_model: nn.Module, tmp_path: Path) -> Path:
    return System(tiny_model, GradCAM(tiny_model)).save(tmp_path / "system")


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = True) -> None:
    """Change a description; sealed again, as somebody does who knows how checksums are made."""
    described = json.loads((folder / "system.json").read_text())
    change(described)
    if seal:
        sums = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in described["files"]}
        described = seals.sealed({**described, "files": sums})
    (folder / "system.json").write_text(json.dumps(described))


@pytest.mark.parametrize("name", INTERPRETERS)
def test_a_loaded_system_says_the_same_to_the_bit(
    name: str, tiny_model: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    system = System(tiny_model, INTERPRETERS[name](tiny_model, grey))
    loaded = System.load(system.save(tmp_path))
    assert loaded.model is not system.model
    assert type(loaded.interpreter) is type(system.interpreter)
    assert not loaded.model.training
    for target in (None, torch.tensor([3, 2, 1, 0, 3])):
        ours, theirs = loaded(grey, target), system(grey, target)
        assert torch.equal(ours.maps, theirs.maps)
        assert torch.equal(ours.logits, theirs.logits)


def test_a_fresh_process_loads_what_was_saved(tiny_model: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    system = System(tiny_model, INTERPRETERS["aggregate"](tiny_model, grey))
    save_file({"x": grey}, str(system.save(tmp_path) / "x.safetensors"))
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file; from robustexplain import System\n"
        "torch.set_num_threads(1); f = sys.argv[1]; x = load_file(f + '/x.safetensors')['x']\n"
        "save_file({'maps': System.load(f)(x).maps.detach()}, f + '/maps.safetensors')"
    )
    root = str(Path(robustexplain.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env={**os.environ, "PYTHONPATH": root})
    assert torch.equal(load_file(tmp_path / "maps.safetensors")["maps"], system(grey).maps)


def test_members_of_a_loaded_system_share_one_model(tiny_model: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    system = System(tiny_model, INTERPRETERS["aggregate"](tiny_model, grey))
    loaded = System.load(system.save(tmp_path))
    assert isinstance(loaded.interpreter, Aggregate)
    assert all(member.model is loaded.model for member in loaded.interpreter.members)
    described = json.loads((tmp_path / "system.json").read_text())
    assert [spec["name"] for spec in described["modules"]] == ["small-cnn", "masking-model"]


def test_saving_again_replaces_and_leaves_nothing_aside(saved: Path, tiny_model: nn.Module) -> None:
    before = sorted(path.name for path in saved.iterdir())
    System(tiny_model, CAM(tiny_model)).save(saved)
    assert sorted(path.name for path in saved.iterdir()) == before == ["system.json", "weights.safetensors"]
    assert isinstance(System.load(saved).interpreter, CAM)


def test_saving_over_a_system_removes_its_parts_and_nothing_else(
    saved: Path, tiny_model: nn.Module, grey: Tensor
) -> None:
    (saved / "notes.bin").write_text("mine")
    System(tiny_model, ExpectedGradients(tiny_model, Reference(grey))).save(saved)
    assert (saved / "reference-0.bin").is_file()
    System(tiny_model, CAM(tiny_model)).save(saved)
    assert {path.name for path in saved.iterdir()} == {"system.json", "weights.safetensors", "notes.bin"}


def failing(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, after: int = 0) -> None:
    """From its call number ``after`` on, a function says that the disk is full."""
    own, calls = getattr(module, name), iter(range(10**6))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, call)


@pytest.mark.parametrize(("module", "name"), [(files, "save_file"), (Path, "write_text"), (Path, "write_bytes")])
def test_a_system_outlives_a_disk_that_is_full_while_another_is_saved_over_it(
    module: Any, name: str, tiny_model: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    old = System(tiny_model, ExpectedGradients(tiny_model, Reference(grey))).save(tmp_path)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    with pytest.MonkeyPatch.context() as broken:
        failing(broken, module, name)
        with pytest.raises(OSError, match="No space left"):
            System(tiny_model, ExpectedGradients(tiny_model, Reference(1 - grey))).save(old)
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert isinstance(System.load(old).interpreter, ExpectedGradients)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_parts_of_two_systems_are_never_loaded(after: int, tiny_model: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    System(tiny_model, ExpectedGradients(tiny_model, Reference(grey))).save(tmp_path)
    other = copy.deepcopy(tiny_model)
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.MonkeyPatch.context() as broken:
        failing(broken, os, "replace", after)
        with pytest.raises(OSError, match="No space left"):
            System(other, ExpectedGradients(other, Reference(1 - grey))).save(tmp_path)
    assert not list(tmp_path.glob(".*"))
    if after:
        with pytest.raises(InputError, match="is damaged or was changed after saving"):
            System.load(tmp_path)
    else:
        assert torch.equal(System.load(tmp_path)(grey).logits, tiny_model(grey))
    System(other, CAM(other)).save(tmp_path)
    assert torch.equal(System.load(tmp_path)(grey).logits, other(grey))
    assert {path.name for path in tmp_path.iterdir()} == {"system.json", "weights.safetensors"}


# Tensors, dicts, nested modules


@dataclass(frozen=True, eq=False)
class Signatures:
    """A detector with what detectors may keep: tensors, dicts of them, settings."""

    scores: Tensor
    by_class: dict[str, Any]
    threshold: float = 0.5
    soft_threshold: float = 0.5

    def score(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1) + self.scores.mean()

    soft_score = score


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    list(DETECTORS)
    monkeypatch.setattr(DETECTORS, "_entries", dict(DETECTORS._entries))
    DETECTORS.register("signatures")(Signatures)


@pytest.mark.usefixtures("registered")
def test_tensors_and_dicts_of_a_detector_come_back_to_the_bit(tiny_model: nn.Module, tmp_path: Path) -> None:
    scores = torch.rand(7, dtype=torch.float64)
    by_class = {"cat": scores, "dog": torch.arange(3), "deep": {"names": ("a", "b"), "none": None, "share": 0.1}}
    System(tiny_model, CAM(tiny_model), Signatures(scores, by_class)).save(tmp_path)
    found: Any = System.load(tmp_path).detector
    assert torch.equal(found.scores, scores)
    assert found.scores.dtype == torch.float64
    assert torch.equal(found.by_class["dog"], torch.arange(3))
    assert found.by_class["deep"] == by_class["deep"]
    assert found.by_class["cat"] is found.scores
    tensors = load_file(tmp_path / "weights.safetensors")
    assert sorted(key for key in tensors if key.startswith("tensor.")) == ["tensor.0", "tensor.1"]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("by_class", "message"),
    [
        ({1: 2}, "keys, which must be strings, got 1"),
        ({"a": math.inf}, "number inf.*finite"),
        ({"a": {3}}, "set cannot"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(
    by_class: dict[str, Any], message: str, tiny_model: nn.Module, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        System(tiny_model, CAM(tiny_model), Signatures(torch.ones(1), by_class)).save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_nested_modules_are_described_and_rebuilt_at_any_depth(tiny_model: nn.Module, grey: Tensor) -> None:
    inner = MaskingModel.around(copy.deepcopy(tiny_model), grey, width=4)
    described = json.loads(json.dumps(models.describe(MaskingModel(inner.encoder, inner.levels, 4, 6))))
    made = models.rebuild(described)
    assert isinstance(made, MaskingModel)
    assert type(made.encoder) is type(tiny_model)
    assert made.width == 6
    assert models.rebuild(models.ModelSpec("masking-model", inner.spec.options)).state_dict().keys() == (
        inner.state_dict().keys()
    )
    with pytest.raises(UnknownNameError, match="masking-model"):
        models.rebuild({"name": "masking-modell", "options": {}})
    with pytest.raises(InputError, match="'softplus' does not name a module"):
        models.rebuild({"name": "softplus", "options": {"beta": 1.0}})


def test_a_system_in_double_precision_comes_back_in_it(tiny_model: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(tiny_model).double()
    with torch.no_grad():
        next(model.parameters()).mul_(1 + 1e-12)
    system = System(model, Gradient(model))
    loaded = System.load(system.save(tmp_path))
    assert torch.equal(loaded(grey.double()).logits, system(grey.double()).logits)


def test_an_own_module_comes_back_in_the_precision_in_which_it_was_saved(grey: Tensor, tmp_path: Path) -> None:
    model = own_net().double()
    system = System(model, Gradient(model))
    system.save(tmp_path)
    loaded = System.load(tmp_path, model=own_net(), weights="stored")
    assert torch.equal(loaded(grey.double()).logits, system(grey.double()).logits)
    with pytest.raises(InputError, match=r"0\.bias and 13 more differ \(torch\.float32, stored torch\.float64\)"):
        System.load(tmp_path, model=own_net())


# Models made by hand


def own_net() -> nn.Sequential:
    """Nobody's registered builder made it; with batch norm, at two grid sizes, and a head that CAM can read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        convolutions = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
        more = [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*convolutions, *more, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()


@pytest.fixture(scope="module")
def samples() -> TensorDataset:
    x = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return TensorDataset(x, torch.arange(40) % 4)


QUICK = Training(epochs=1, batch_size=20)


def own_system(name: str, data: Any) -> System:
    model = own_net()
    if name in ("rts", "aid"):
        system = System(model, train_rts(model, data, RTSTraining(training=QUICK, width=4, levels=2)))
        return AID(attack=ADV2(0.1, steps=2), training=QUICK)(system, data) if name == "aid" else system
    made: dict[str, Defense] = {
        "aggregated": AggregatedInterpreter(),
        "beta-smoothing": BetaSmoothing(),
        "x-ensemble": XEnsemble(attack=PGD(0.1, 2), training=QUICK, trees=5),
    }
    system = System(model, Gradient(model) if name == "beta-smoothing" else GradCAM(model))
    return made[name](system, data) if name in made else system


@pytest.mark.parametrize("name", ["gradcam", "aggregated", "beta-smoothing", "x-ensemble", "rts", "aid"])
def test_a_system_of_an_own_module_comes_back_around_it(name: str, samples: TensorDataset, tmp_path: Path) -> None:
    system = own_system(name, samples)
    if isinstance(system.interpreter, RTS):
        # The encoder is another network than the model by now: its weights must come from the folder.
        with torch.no_grad():
            next(system.interpreter.masker.encoder.parameters()).mul_(1.5)
    mine = copy.deepcopy(system.model).requires_grad_(True)
    mine[0].weight.requires_grad_(False)
    loaded = System.load(system.save(tmp_path), model=mine)
    assert loaded.model is mine
    assert [p.requires_grad for p in mine.parameters()] == [False, *[True] * 9]
    x = samples.tensors[0][:4]
    for name in ("logits", "maps", "score"):
        ours, theirs = getattr(loaded(x), name), getattr(system(x), name)
        assert (ours is None and theirs is None) or torch.equal(ours, theirs)
    if isinstance(loaded.interpreter, RTS):
        assert not any(p.requires_grad for p in loaded.interpreter.masker.parameters())
        described = json.loads((tmp_path / "system.json").read_text())
        assert described["modules"][1]["options"]["encoder"] == {"like": "the deployed model"}


AROUND: dict[str, Callable[[nn.Module], nn.Module]] = {
    "transformed": lambda model: models.Transformed(model, ("bit-depth-1",)),
    "voted": lambda model: models.Voted(model, "resize-pad-1", 2),
    "half-huber": lambda model: HalfHuberNetwork(model, 0.5),
    "reformed": lambda model: Reformed(model, seeded_autoencoder()),
    "twice": lambda model: models.Voted(models.Transformed(model, ("bit-depth-2",)), "resize-pad-1", 3, "majority"),
}
OTHERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "transformed": lambda model: models.Transformed(model, ("median-3",)),
    "voted": lambda model: models.Voted(model, "resize-pad-1", 2, seed=9),
    "half-huber": lambda model: HalfHuberNetwork(model, 5.0),
    "reformed": lambda model: models.Transformed(model, ()),
    "twice": lambda model: models.Voted(models.Transformed(model, ("bit-depth-1",)), "resize-pad-1", 3, "majority"),
}


def seeded_autoencoder() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return models.AutoEncoder(1, 2)


@pytest.mark.parametrize("name", AROUND)
def test_what_stands_around_an_own_module_comes_back_or_is_compared(
    name: str, samples: TensorDataset, tmp_path: Path
) -> None:
    x, own = samples.tensors[0][:4], own_net()
    around = AROUND[name](own).eval()
    System(around, Gradient(around)).save(tmp_path)
    expected = around(x)
    for mine in (AROUND[name](copy.deepcopy(own)).eval(), copy.deepcopy(own)):
        state = {key: value.clone() for key, value in mine.state_dict().items()}
        loaded = System.load(tmp_path, model=mine)
        assert torch.equal(loaded(x).logits, expected)
        assert all(torch.equal(state[key], value) for key, value in mine.state_dict().items())
        assert models.innermost(loaded.model) is models.innermost(mine)
    other = own_net()
    with torch.no_grad():
        other[-1].weight.add_(1)  # type: ignore[operator]
    assert torch.equal(System.load(tmp_path, model=other, weights="stored")(x).logits, expected)
    with pytest.raises(InputError, match=r"around the model that was handed in stands .*hand in the model without"):
        System.load(tmp_path, model=OTHERS[name](own).eval(), weights="stored")


def test_transforms_of_a_classifier_of_an_own_network_come_back(tmp_path: Path, grey: Tensor) -> None:
    plain = models.Classifier(own_net(), [0.5], [0.5], num_classes=4).eval()
    changed = plain.with_transforms(["bit-depth-1"])
    System(changed, Gradient(changed)).save(tmp_path)
    assert torch.equal(System.load(tmp_path, model=plain)(grey).logits, changed(grey))
    with pytest.raises(InputError, match=r"stands classifier\(transforms=\['median-3'\]\)"):
        System.load(tmp_path, model=plain.with_transforms(["median-3"]))


def test_a_folder_that_does_not_say_what_stood_around_loads_as_it_did(tmp_path: Path, grey: Tensor) -> None:
    around = models.Transformed(own_net(), ("bit-depth-1",))
    System(around, Gradient(around)).save(tmp_path)
    edit(tmp_path, lambda d: d.pop("around"))
    assert System.load(tmp_path, model=around).model is around


def test_a_model_that_is_handed_in_is_left_alone(tmp_path: Path) -> None:
    model = own_net()
    System(model, Gradient(model)).save(tmp_path)
    model.train()
    assert System.load(tmp_path, model=model).model.training
    other = own_net().train()
    with torch.no_grad():
        other[-1].weight.add_(1)  # type: ignore[operator]
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(InputError, match=r"other weights than .*weights\.safetensors': 9\.weight differ"):
        System.load(tmp_path, model=other)
    with pytest.warns(RobustExplainWarning, match=r"9\.weight differ"):
        assert System.load(tmp_path, model=other, weights="own").model is other
    taken = System.load(tmp_path, model=other, weights="stored").model
    assert taken is not other
    assert not any(p.requires_grad for p in taken.parameters())
    assert all(torch.equal(taken.state_dict()[key], value) for key, value in model.state_dict().items())
    assert other.training
    assert all(torch.equal(other.state_dict()[key], value) for key, value in before.items())


def test_a_hand_made_model_that_is_not_handed_in_is_asked_for(smooth_net: nn.Module, tmp_path: Path) -> None:
    System(smooth_net, Gradient(smooth_net)).save(tmp_path)
    with pytest.raises(InputError, match=r"not made by a registered builder.*load\(folder, model=your_model\)"):
        System.load(tmp_path)
    with pytest.raises(InputError, match=r"do not fit: .*missing keys: bias, weight; unexpected keys: 0\.bias"):
        System.load(tmp_path, model=nn.Linear(3, 3), weights="own")
    with pytest.raises(InputError, match=r"weights must be one of .*'new'"):
        System.load(tmp_path, model=smooth_net, weights="new")  # type: ignore[arg-type]


def test_a_masker_on_another_hand_made_encoder_than_the_model_cannot_be_saved(
    tiny_model: nn.Module, smooth_net: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    system = System(tiny_model, RTS(tiny_model, MaskingModel.around(smooth_net, grey)))
    with pytest.raises(InputError, match=r"Sequential cannot be saved.*registered builder"):
        system.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_an_interpreter_that_is_not_registered_cannot_be_saved(tiny_model: nn.Module, tmp_path: Path) -> None:
    class Own(Gradient):
        """Nobody knows it."""

    with pytest.raises(InputError, match="Own cannot be saved: it is no registered component"):
        System(tiny_model, Own(tiny_model)).save(tmp_path)


# Damage


def test_a_folder_without_a_system_is_named(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(MissingDataError, match=r"nowhere holds no saved system: system\.json and weights"):
        System.load(tmp_path / "nowhere")
    for name in ("weights.safetensors", "system.json"):
        (saved / name).unlink()
        with pytest.raises(MissingDataError, match="holds no saved system"):
            System.load(saved)


@pytest.mark.parametrize("name", ["system.json", "weights.safetensors"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.9])
def test_a_truncated_file_is_refused(saved: Path, name: str, share: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        System.load(saved)


@pytest.mark.parametrize("name", ["system.json", "weights.safetensors"])
def test_a_file_of_noise_is_refused(saved: Path, name: str) -> None:
    (saved / name).write_bytes(bytes(range(256)) * 4)
    with pytest.raises(InputError, match=rf"{name} is damaged"):
        System.load(saved)


@pytest.mark.parametrize("found", [0, 1, 3, "2", None])
def test_another_format_is_refused(saved: Path, found: object) -> None:
    edit(saved, lambda d: d.update(format=found))
    with pytest.raises(InputError, match=rf"has format {found!r}; this version reads 2"):
        System.load(saved)


@pytest.mark.parametrize("version", ["99.0", "0.2.0", "", None, "one"])
def test_a_newer_or_unreadable_version_is_refused(saved: Path, version: object) -> None:
    edit(saved, lambda d: d.update(version=version))
    with pytest.raises(InputError, match=rf"written by version {version!r}; this is RobustExplain .*update"):
        System.load(saved)
    edit(saved, lambda d: d.update(version="0.0.9"))
    System.load(saved)


@pytest.mark.parametrize("seal", [False, True])
def test_an_edited_threshold_is_noticed_unless_everything_is_sealed_again(
    seal: bool, tiny_model: nn.Module, tmp_path: Path
) -> None:
    folder = System(tiny_model, CAM(tiny_model), FeatureSqueezingDetector(tiny_model, squeezers(["bit-depth-3"]))).save(
        tmp_path
    )
    kept = checksum(folder)
    edit(folder, lambda d: d["tree"]["fields"]["detector"]["fields"].update(threshold=1e9), seal=seal)
    if not seal:
        with pytest.raises(InputError, match=r"system\.json is damaged or was changed after saving"):
            System.load(folder)
        return
    assert System.load(folder).detector.threshold == 1e9  # type: ignore[union-attr]
    with pytest.raises(InputError, match=rf"another system than expected: sha256 \w+, not {kept}"):
        System.load(folder, sha256=kept)
    assert System.load(folder, sha256=checksum(folder).upper()) is not None


def test_a_flipped_bit_of_the_weights_is_noticed(saved: Path) -> None:
    content = bytearray((saved / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (saved / "weights.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=r"weights\.safetensors is damaged or was changed after saving"):
        System.load(saved)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_threshold_that_is_no_number_is_refused(number: str, saved: Path, tiny_model: nn.Module) -> None:
    text = (saved / "system.json").read_text()
    (saved / "system.json").write_text(text.replace('"relu": true', f'"relu": {number}'))
    with pytest.raises(InputError, match=rf"system\.json is damaged: it holds {number}"):
        System.load(saved)
    with pytest.raises(InputError, match="threshold must be a number, got nan"):
        System(tiny_model, CAM(tiny_model), Signatures(torch.ones(1), {}, math.nan))


@pytest.mark.parametrize("depth", [400, 100_000])
def test_deeply_nested_json_is_refused(depth: int, saved: Path) -> None:
    text = (saved / "system.json").read_text()
    (saved / "system.json").write_text(text.replace('"relu": true', f'"relu": {"[" * depth}{"]" * depth}'))
    with pytest.raises(InputError, match=r"damaged|does not describe"):
        System.load(saved)


@pytest.mark.parametrize(
    "options",
    [{"num_classes": 10**9}, {"in_channels": 10**8}],
)
def test_a_description_of_a_huge_model_is_refused_before_memory_is_taken(options: dict[str, int], saved: Path) -> None:
    edit(saved, lambda d: d["modules"][0]["options"].update(options))
    with pytest.raises(InputError, match="far larger than the"):
        System.load(saved)


def bomb(size: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("schema.json", b" " * size)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [(bomb(80 << 20), "would inflate from"), (b"no zip", "no archive of skops"), (b"", "no archive")],
    ids=["bomb", "no zip", "empty"],
)
def test_a_forest_that_is_a_bomb_or_no_archive_is_refused(content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Forest.from_bytes(content)


def test_a_forged_forest_is_an_error_that_names_its_file(samples: TensorDataset, tmp_path: Path) -> None:
    system = own_system("x-ensemble", samples)
    system.save(tmp_path)
    for content in (b"no zip", dumped(StandardScaler().fit([[0.0]]))):
        (tmp_path / "forest-0.bin").write_bytes(content)
        with pytest.raises(InputError, match=r"forest-0\.bin is damaged or was changed"):
            System.load(tmp_path, model=system.model)
        edit(tmp_path, lambda d: None)
        with pytest.raises(InputError, match=r"forest-0\.bin: the stored"):
            System.load(tmp_path, model=system.model)
        edit(tmp_path, lambda d: None)
    (tmp_path / "forest-0.bin").unlink()
    with pytest.raises(MissingDataError, match=r"incomplete: forest-0\.bin is missing"):
        System.load(tmp_path, model=system.model)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("n_samples", "has no field 'n_samples' in this version; it is called 'samples' now"),
        ("colour", "has no field 'colour' in this version; it has: model, layer, relu"),
    ],
)
def test_a_field_of_another_version_is_named(field: str, message: str, saved: Path) -> None:
    edit(saved, lambda d: d["tree"]["fields"]["interpreter"]["fields"].update({field: 3}))
    with pytest.raises(InputError, match=rf"system\.json: 'gradcam' {message}"):
        System.load(saved)


def test_a_file_that_is_no_object_is_refused(saved: Path) -> None:
    (saved / "system.json").write_text("[1, 2]")
    with pytest.raises(InputError, match="has format None"):
        System.load(saved)


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown kind": (lambda d: d["tree"].update(kind="attack"), "unknown kind 'attack'"),
    "unknown name": (lambda d: d["tree"]["fields"]["interpreter"].update(name="gradcan"), "did you mean 'gradcam'"),
    "unknown part": (lambda d: d["tree"].update(name="sistem"), "unknown part 'sistem'; did you mean 'system'"),
    "unknown model": (lambda d: d["modules"][0].update(name="small-cn"), "did you mean 'small-cnn'"),
    "unknown field": (lambda d: d["tree"]["fields"].update(colour=1), "no field 'colour'"),
    "bad field": (lambda d: d["tree"]["fields"].update(interpreter=3), "interpreter must be an Interpreter, got 3"),
    "no tree": (lambda d: d.pop("tree"), "does not describe.*tree"),
    "no modules": (lambda d: d.pop("modules"), "does not describe.*modules"),
    "module out of range": (lambda d: d["modules"].clear(), "does not describe"),
    "no fields": (lambda d: d["tree"].pop("fields"), "does not describe.*fields"),
    "other options": (lambda d: d["modules"][0]["options"].update(num_classes=7), r"net\.head\.weight is \[4, 64\]"),
    "no tensor": (lambda d: d["tree"]["fields"].update(inputs={"tensor": 3}), r"tensor 'tensor\.3' that weights"),
    "negative module": (lambda d: d["tree"]["fields"].update(model={"module": -1}), "no module -1"),
    "a builder for a component": (lambda d: d["tree"].update(name="transform"), "no component that is described by"),
    "file elsewhere": (lambda d: d["tree"].update(file="../a.bin"), r"not stored in a file '\.\./a\.bin'"),
    "not a system": (lambda d: d.update(tree=d["tree"]["fields"]["interpreter"]), "holds a GradCAM, not a System"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_description_that_was_tampered_with_is_refused(saved: Path, change: str) -> None:
    edit(saved, CHANGES[change][0])
    with pytest.raises(InputError, match=CHANGES[change][1]):
        System.load(saved)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("squeezers", None),
        ("squeezers", 3),
        ("threshold", True),
        ("threshold", None),
        ("threshold", [1]),
        ("scores", 3),
    ],
)
def test_a_value_of_another_kind_is_refused(where: str, value: object, tiny_model: nn.Module, tmp_path: Path) -> None:
    watched = System(tiny_model, CAM(tiny_model), FeatureSqueezingDetector(tiny_model, squeezers(["bit-depth-3"])))
    watched.save(tmp_path)
    edit(tmp_path, lambda d: d["tree"]["fields"]["detector"]["fields"].update({where: value}))
    with pytest.raises(InputError, match=f"{where} must be|does not describe"):
        System.load(tmp_path)


@pytest.mark.parametrize("value", [7, "aid", None, True])
def test_defenses_that_are_no_list_are_refused(value: object, saved: Path) -> None:
    edit(saved, lambda d: d["tree"]["fields"].update(defenses=value))
    with pytest.raises(InputError, match=r"System\.defenses must be tuple|does not describe"):
        System.load(saved)


def test_an_unknown_component_is_refused_with_near_names(saved: Path) -> None:
    edit(saved, CHANGES["unknown name"][0])
    with pytest.raises(UnknownNameError) as caught:
        System.load(saved)
    assert "gradcam" in caught.value.known


# Code


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return os.mkdir, (str(self.mark),)


def test_a_planted_pickle_is_not_run(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(mark))
    for name in ("system.pkl", "weights.pt", "gradcam-0.bin"):
        (saved / name).write_bytes(bomb)
    System.load(saved)
    for name in ("weights.safetensors", "system.json"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(bomb)
        with pytest.raises(InputError):
            System.load(saved)
        (saved / name).write_bytes(content)
    assert not mark.exists()
    pickle.loads(bomb)  # noqa: S301 - the bomb is live
    assert mark.exists()


def test_a_description_cannot_reach_out_of_its_folder_or_name_code(saved: Path) -> None:
    for name in ("os:mkdir", "robustexplain.files.write_text", "../gradcam"):
        edit(saved, lambda d, name=name: d["tree"]["fields"]["interpreter"].update(name=name))  # type: ignore[misc]
        with pytest.raises(UnknownNameError):
            System.load(saved)
    edit(
        saved, lambda d: d["tree"]["fields"].update(interpreter={"kind": "part", "name": "softplus", "file": "/etc/x"})
    )
    with pytest.raises(InputError):
        System.load(saved)


def test_loading_needs_no_pickle_at_all(saved: Path, grey: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert System.load(saved)(grey).maps.shape == (5, 16, 16)


# Files


def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "a.json", "old")

    def half(aside: Path) -> None:
        aside.write_text("ne")
        raise OSError("disk full")

    for target in (path, tmp_path / "new.json"):
        with pytest.raises(OSError, match="disk full"):
            files.replace_file(target, half)
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"


def test_a_reader_never_sees_a_half_written_file(tmp_path: Path) -> None:
    path = files.write_text(tmp_path / "deep" / "a.txt", "old")

    def slowly(aside: Path) -> None:
        aside.write_text("n")
        assert path.read_text() == "old"
        aside.write_text("new")

    assert files.replace_file(path, slowly).read_text() == "new"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_tensors_keep_bits_dtypes_and_metadata(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tensors = {"a": shared[::2], "b": shared.bfloat16(), "c": torch.tensor(True), "d": torch.empty(0, 3), "e": shared}
    path = files.write_tensors(tmp_path / "t.safetensors", tensors, {"epoch": "3"})
    found, meta = files.read_tensors(path)
    assert meta == {"epoch": "3"}
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in tensors.items())


def test_digests_see_names_dtypes_shapes_and_bits_but_not_order() -> None:
    a = torch.arange(4.0)
    digest = files.digest_tensors({"a": a, "b": a + 1})
    assert digest == files.digest_tensors({"b": a + 1, "a": a})
    others = [{"a": a + 1, "b": a}, {"a": a.double(), "b": a + 1}, {"a": a.view(2, 2), "b": a + 1}, {"a": a}]
    assert len({digest, *map(files.digest_tensors, others)}) == 5
    assert files.digest({"x": 1, "y": [2]}) == files.digest({"y": [2], "x": 1}) != files.digest({"x": 1, "y": [3]})


class Scaled(nn.Module):
    """What it does to its input has no weights."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.by * x - 0.5)  # type: ignore[no-any-return]


def test_a_model_that_computes_something_else_with_the_same_weights_is_refused(tmp_path: Path) -> None:
    model = Scaled(2.0).eval()
    System(model, GradCAM(model), inputs=InputSpec((16, 16), channels=1)).save(tmp_path / "a")
    other = Scaled(1.0).eval()
    other.load_state_dict(model.state_dict())
    for weights in ("same", "stored"):
        with pytest.raises(
            InputError, match=r"the Scaled answers otherwise than the one that was saved in .*, with the"
        ):
            System.load(tmp_path / "a", model=other, weights=weights)  # type: ignore[arg-type]
        assert System.load(tmp_path / "a", model=copy.deepcopy(model), weights=weights).model is not model  # type: ignore[arg-type]
    System.load(tmp_path / "a", model=copy.deepcopy(model).double(), weights="stored")


def test_a_pruned_model_is_not_rebuilt_and_a_hook_that_changes_answers_is_missed(tmp_path: Path) -> None:
    model = models.build("small-cnn", num_classes=4, in_channels=1)
    handle = model.net.register_forward_hook(lambda *given: 2 * given[2])
    System(model, GradCAM(model), inputs=InputSpec((16, 16), channels=1)).save(tmp_path / "hooked")
    handle.remove()
    with pytest.raises(InputError, match="the Classifier answers otherwise than the one that was saved in"):
        System.load(tmp_path / "hooked")
    prune.l1_unstructured(model.net.features[0], "weight", 0.5)
    with pytest.raises(
        InputError, match=r"other names than its builder gives them \('net.features.0.weight_orig'\), as"
    ):
        models.describe(model)
    System(model, GradCAM(model)).save(tmp_path / "pruned")
    with pytest.raises(InputError, match="pass it as"):
        System.load(tmp_path / "pruned")
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(System.load(tmp_path / "pruned", model=model)(x).logits, model(x))


def test_a_model_that_was_changed_after_its_builder_made_it_is_not_rebuilt_as_what_it_was(tmp_path: Path) -> None:
    model = models.build("small-cnn", num_classes=4, in_channels=1)
    model.net.features[2] = nn.Softplus().eval()
    with pytest.raises(InputError, match=r"was changed after its builder made it \(\(2\): Softplus.* in place of "):
        models.describe(model)
    System(model, GradCAM(model)).save(tmp_path)
    with pytest.raises(InputError, match="pass it as"):
        System.load(tmp_path)
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(System.load(tmp_path, model=model)(x).logits, model(x))
