"""Models whose modules cannot be seen: the right map, or an error that says to pass the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robustexplain import interpreters, sanity
from robustexplain.attacks import ADV2, PGD
from robustexplain.autograd.input_shift import compensated
from robustexplain.defenses import BetaSmoothing
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.hidden import hidden, refuse_hidden
from robustexplain.interpreters import (
    CAM,
    LRP,
    RTS,
    Captum,
    DeepLIFT,
    GradCAM,
    Gradient,
    GuidedBackprop,
    Influence,
    Interpreter,
    MaskingModel,
    Reference,
    Smoothed,
    SmoothGrad,
    map_gradient_share,
)
from robustexplain.interpreters.module import ExplainingModel
from robustexplain.system import System

PASS = "pass the plain model"


def net() -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 6, 3), nn.ReLU())
        return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).eval()


def compiled_inside(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(torch.compile(model[0], backend="aot_eager"), *model[1:]).eval()


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="aot_eager")
    return model


def compiled_forward(model: nn.Module) -> nn.Module:
    model.forward = torch.compile(model.forward, backend="aot_eager")  # type: ignore[method-assign]
    return model


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which needs a group of processes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module(x)
        return logits


HIDDEN: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "compiled": lambda m: torch.compile(m, backend="aot_eager"),  # type: ignore[return-value]
    "compiled inside": compiled_inside,
    "compiled in place": compiled_in_place,
    "compiled forward": compiled_forward,
    "scripted": torch.jit.script,
    "traced": lambda m: torch.jit.trace(m, torch.rand(2, 1, 16, 16)),
    "traced inside": lambda m: nn.Sequential(torch.jit.trace(m[0], torch.rand(2, 1, 16, 16)), *m[1:]),
    "exported": lambda m: torch.export.export(
        m, (torch.rand(2, 1, 16, 16),), dynamic_shapes=({0: torch.export.Dim("b")},)
    ).module(),
    "spread": DistributedDataParallel,
}
VISIBLE: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "plain": lambda m: m,
    "fx": torch.fx.symbolic_trace,
    "data-parallel": nn.DataParallel,
    "prepared": lambda m: Accelerator(cpu=True).prepare(m),
}
FREE: tuple[Callable[[nn.Module], Interpreter], ...] = (
    Gradient,
    lambda m: interpreters.IntegratedGradients(m, steps=4),
    lambda m: SmoothGrad(m, samples=4),
    lambda m: interpreters.RISE(m, samples=8, grid=4),
)
LOOKING = (GradCAM, interpreters.LayerCAM, CAM, LRP, DeepLIFT, GuidedBackprop, Captum)


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, nn.Module]]:
    def of(make: Callable[[nn.Sequential], nn.Module]) -> nn.Module:
        model = make(net())
        # torch.export gives a module whose mode cannot be changed.
        return model if hasattr(model, "_guards_fn") or "export" in type(model).__module__ else model.eval()

    yield {name: of(make) for name, make in (HIDDEN | VISIBLE).items()}
    torch._dynamo.reset()


def difference(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max() / wanted.detach().abs().max())


@pytest.mark.parametrize("name", VISIBLE)
@pytest.mark.parametrize("cls", [*FREE, *LOOKING])
def test_a_model_that_can_be_seen_is_explained(
    name: str, cls: Callable[[nn.Module], Interpreter], made: dict[str, nn.Module], grey: Tensor
) -> None:
    assert hidden(made[name]) is None
    assert difference(cls(made[name])(grey), cls(net())(grey)) < 1e-4


@pytest.mark.parametrize("name", HIDDEN)
@pytest.mark.parametrize("attached", [True, False])
def test_what_only_asks_a_hidden_model_is_right_or_refused(
    name: str, attached: bool, made: dict[str, nn.Module], grey: Tensor
) -> None:
    right = []
    for cls in FREE:
        with torch.set_grad_enabled(attached):
            try:
                right.append(difference(cls(made[name])(grey), cls(net())(grey)) < 1e-4)
            except InputError as error:
                assert PASS in str(error) or "the plain model" in str(error)  # noqa: PT017  # right is as good
    assert right or name == "exported"
    assert all(right)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_looks_at_modules_says_to_pass_the_plain_model(
    name: str, made: dict[str, nn.Module], grey: Tensor, tmp_path: Path
) -> None:
    model, y = made[name], net()(grey).argmax(1)
    system, plain = System(model, Gradient(model)), net()
    masker = MaskingModel(plain, [("0.1", 6)], 4, 4).eval()
    masker.encoder = model
    labelled = Reference(grey, y=y)
    looks: list[Callable[[], object]] = [
        *(lambda cls=cls: cls(model)(grey) for cls in LOOKING),  # type: ignore[misc]
        lambda: GradCAM(model, layer="0.1")(grey),
        lambda: Gradient(model, layer="0.1")(grey),
        lambda: MaskingModel.around(model, grey),
        # An exported encoder would leave the masker in train mode.
        lambda: (GradCAM(model) if name == "exported" else RTS(plain, masker))(grey),
        lambda: Smoothed(model, Gradient(model))(grey),
        lambda: BetaSmoothing(beta=2.0)(system, [(x, 0) for x in grey]),
        lambda: Influence(model, labelled, parameters="all").scores(grey),
        lambda: sanity.stages(model, grey),
        lambda: compensated(model, grey, 0.1),
        lambda: system.save(tmp_path / "system"),
        lambda: map_gradient_share(Gradient(model), grey),
        lambda: ExplainingModel(Gradient(model), beta=3.0),
        lambda: ADV2(0.1, steps=2, step_size=0.05, surrogate="softplus")(system, grey, y),
        lambda: interpreters.AttentionRollout(model)(grey),
    ]
    for look in looks:
        with pytest.raises(InputError, match=PASS):
            look()


@pytest.mark.parametrize("name", HIDDEN)
def test_attacks_without_a_surrogate_run_on_hidden_models(name: str, made: dict[str, nn.Module], grey: Tensor) -> None:
    y = net()(grey).argmax(1)
    if name == "exported":
        with pytest.raises(InputError, match=PASS):
            PGD(0.1, 3, 0.05)(System(made[name], Gradient(made[name])), grey, y)
        return
    found, wanted = (PGD(0.1, 3, 0.05)(System(m, Gradient(m)), grey, y).x for m in (made[name], net()))
    assert (found - wanted).abs().mean() < 1e-3


@pytest.mark.parametrize("name", ["compiled", "scripted", "traced"])
def test_map_attacks_on_hidden_models_are_right_or_refused(name: str, made: dict[str, nn.Module], grey: Tensor) -> None:
    attack, y = ADV2(0.1, steps=3, step_size=0.05, surrogate="none"), net()(grey).argmax(1)
    wanted = attack(System(plain := net(), Gradient(plain)), grey, y).x
    try:
        found = attack(System(made[name], Gradient(made[name])), grey, y).x
    except UnsupportedModelError as error:
        assert "the plain model" in str(error)  # noqa: PT017  # right is as good
    else:
        assert (found - wanted).abs().mean() < 1e-3


def test_the_error_names_the_part_and_what_to_pass(made: dict[str, nn.Module]) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=r"a layer is read, which is hidden in this Sequential: its part '0' was compiled by torch.compile: pass "
        r"the plain model, its _orig_mod, as '0'",
    ):
        refuse_hidden(made["compiled inside"], "a layer is read")


def test_several_devices_hide_what_one_does_not() -> None:
    parallel = copy.copy(nn.DataParallel(net()))
    parallel.device_ids = [0, 1]
    assert hidden(parallel) == "it is spread over devices: pass the plain model, its .module"
