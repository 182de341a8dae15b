"""Saved systems: equal to the bit after a round trip, refused clearly when damaged, and never running code."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import robustexplain
from robustexplain import System, files
from robustexplain.autograd.rectifiers import Softplus
from robustexplain.defenses import Aggregate
from robustexplain.errors import InputError, MissingDataError, UnknownNameError
from robustexplain.interpreters import CAM, RTS, GradCAM, Gradient, Interpreter, MaskingModel, Smoothed


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
    "rts": rts,
    "aggregate": lambda model, x: Aggregate(model, (rts(model, x), CAM(model), Gradient(model)), "absmax"),
}


@pytest.fixture
def saved(tiny_model: nn.Module, tmp_path: Path) -> Path:
    return System(tiny_model, GradCAM(tiny_model)).save(tmp_path / "system")


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    described = json.loads((folder / "system.json").read_text())
    change(described)
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


# Models made by hand


def test_a_hand_made_model_is_handed_in_again_and_gets_its_weights(
    smooth_net: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    system = System(smooth_net, Gradient(smooth_net))
    system.save(tmp_path)
    blank = copy.deepcopy(smooth_net)
    for parameter in blank.parameters():
        nn.init.zeros_(parameter)
    loaded = System.load(tmp_path, model=blank)
    assert loaded.model is blank
    assert torch.equal(loaded(grey).maps, system(grey).maps)


def test_a_hand_made_model_that_is_not_handed_in_is_asked_for(smooth_net: nn.Module, tmp_path: Path) -> None:
    System(smooth_net, Gradient(smooth_net)).save(tmp_path)
    with pytest.raises(InputError, match=r"not made by a registered builder.*load\(folder, model=your_model\)"):
        System.load(tmp_path)
    with pytest.raises(InputError, match=r"do not fit: .*missing keys: weight, bias"):
        System.load(tmp_path, model=nn.Linear(3, 3))


def test_a_masker_on_a_hand_made_encoder_cannot_be_saved(
    tiny_model: nn.Module, smooth_net: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    system = System(tiny_model, RTS(tiny_model, MaskingModel.around(smooth_net, grey)))
    with pytest.raises(InputError, match=r"MaskingModel cannot be saved.*registered builder"):
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


@pytest.mark.parametrize("found", [0, 2, "1", None])
def test_another_format_is_refused(saved: Path, found: object) -> None:
    edit(saved, lambda d: d.update(format=found))
    with pytest.raises(InputError, match=rf"has format {found!r}; this version reads 1"):
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
    "unknown field": (lambda d: d["tree"]["fields"].update(colour=1), "does not describe.*colour"),
    "bad field": (lambda d: d["tree"]["fields"].update(interpreter=3), "interpreter must be an Interpreter, got 3"),
    "no tree": (lambda d: d.pop("tree"), "does not describe.*tree"),
    "no modules": (lambda d: d.pop("modules"), "does not describe.*modules"),
    "module out of range": (lambda d: d["modules"].clear(), "does not describe"),
    "no fields": (lambda d: d["tree"].pop("fields"), "does not describe.*fields"),
    "other options": (lambda d: d["modules"][0]["options"].update(num_classes=7), r"net\.head\.weight is \[4, 64\]"),
    "not a system": (lambda d: d.update(tree=d["tree"]["fields"]["interpreter"]), "holds a GradCAM, not a System"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_description_that_was_tampered_with_is_refused(saved: Path, change: str) -> None:
    edit(saved, CHANGES[change][0])
    with pytest.raises(InputError, match=CHANGES[change][1]):
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
