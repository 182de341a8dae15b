"""Fifteen models that misbehave, through every interpreter of images, every attack on inputs, and ``System``.

Either the answer is right (that of a plain twin, where there is one), or an ``InputError`` names the model's fault.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import System, attacks, evaluate, interpreters
from robustexplain.attacks import Attack, Attacked
from robustexplain.errors import InputError, SaturatedWarning
from robustexplain.evaluation.objects import Defended, Evaluation
from robustexplain.interpreters import Interpreter
from robustexplain.registry import ATTACKS, INTERPRETERS


def table_of(path: str) -> ModuleType:
    """A conformance table: how each registered class is made so that it runs quickly."""
    name = f"_table_of_{Path(path).parent.name}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / path)
        assert spec is not None and spec.loader is not None  # noqa: PT018
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


OF_INTERPRETERS, OF_ATTACKS = table_of("interpreters/test_conformance.py"), table_of("attacks/test_conformance.py")


class Net(nn.Module):
    """A small network on grey images of 8 pixels, three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.last = nn.Sequential(nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Any:
        logits: Tensor = self.head(self.last(self.norm(self.first(x)).relu()).mean((2, 3)))
        return logits


class Says(Net):
    """The network with another answer."""

    def __init__(self, of: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.of = of

    def forward(self, x: Tensor) -> Any:
        return self.of(super().forward(x), x)


class NaNOnPart(Net):
    """Divides by zero on some of its inputs."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(torch.where(x[:, :, :1, :1] > 0.5, torch.nan, x))


class InPlace(Net):
    """Normalises its input where it lies."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x.sub_(0.5).div_(0.5))


class OfTheBatch(Net):
    """Takes the statistics of the batch, by a function."""

    def forward(self, x: Tensor) -> Any:
        x = F.batch_norm(self.first(x), None, None, training=True)
        return self.head(self.last(x.relu()).mean((2, 3)))


def weighted(net: Net) -> Net:
    """Fixed random weights under which classes differ; in eval mode."""
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) * (0.5 if p.dim() > 1 else 0.1))
        net.norm.weight.fill_(1.0)
        net.head.weight.mul_(4)
    return net.eval()


def partly_training() -> nn.Module:
    net = weighted(Net())
    net.norm.train()
    return net


def scaled(by: float) -> nn.Module:
    net = weighted(Net())
    with torch.no_grad():
        net.head.weight.mul_(by)
        net.head.bias.mul_(by)
    return net


@dataclass(frozen=True)
class Hostile:
    """How a model is made, and what an error about it says; empty if its answers are those of a plain network."""

    make: Callable[[], nn.Module]
    says: str = ""
    scale: float = 1.0
    dtype: torch.dtype = torch.float32


def says(of: Callable[[Tensor, Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: weighted(Says(of))


FAULTS = {
    "in place": Hostile(lambda: weighted(InPlace()), "changes its input in place"),
    "nan on part": Hostile(lambda: weighted(NaNOnPart()), "NaN or infinite logits on 1 of"),
    "batch statistics": Hostile(lambda: weighted(OfTheBatch()), "mixes samples"),
    "partly training": Hostile(partly_training, "its part '(model.)?norm' is in train mode"),
    "one logit": Hostile(says(lambda y, x: y[:, :1]), r"one logit, \[\d, 1\]: models.BinaryLogit"),
    "tuple": Hostile(says(lambda y, x: (y, y.mean())), r"tuple of 2.*models.Output\(model, 0\)"),
    "dictionary": Hostile(says(lambda y, x: {"logits": y}), r'dict with logits.*models.Output\(model, "logits"\)'),
    "class maps": Hostile(says(lambda y, x: y[..., None, None].expand(-1, -1, 4, 4)), r"\[\d, 3, 4, 4\].*target="),
    "integer": Hostile(says(lambda y, x: y.round().long()), "answers with torch.int64"),
    "not deterministic": Hostile(says(lambda y, x: F.dropout(y, 0.5, training=True)), "not deterministic"),
}
FAIR = {
    "confident": Hostile(lambda: scaled(1e4), scale=1e4),
    "zero": Hostile(lambda: scaled(0.0), scale=0.0),
    "compiled": Hostile(lambda: torch.compile(weighted(Net()), backend="eager")),  # type: ignore[arg-type, return-value]
    "scripted": Hostile(lambda: torch.jit.script(weighted(Net()))),
    "half precision": Hostile(lambda: weighted(Net()).bfloat16(), dtype=torch.bfloat16),
}

X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))
X[:, :, 0, 0] = torch.tensor([0.2, 0.7, 0.1])[:, None]
"""The second is one of those on which ``nan on part`` says NaN."""
NAMES = [e.name for e in INTERPRETERS if "images" in interpreters.base.accepted_kinds(e.build)]


@cache
def hostile(name: str) -> nn.Module:
    return {**FAULTS, **FAIR}[name].make()


@cache
def twin() -> Net:
    return weighted(Net())


def interpreter(name: str, model: nn.Module, x: Tensor) -> Interpreter:
    if name == "rts":
        # Its own network is an honest one.
        return interpreters.RTS(model, OF_INTERPRETERS.masker(twin(), x.float()).to(x.dtype))
    made: Interpreter = OF_INTERPRETERS.plain(name)(model, x)
    return made


def attack_of(name: str) -> Attack:
    if name in ("torchattacks", "foolbox", "art"):
        pytest.importorskip(name)
    few = {**OF_ATTACKS.FEW, "steps": 2, **OF_ATTACKS.SMALL.get(name, {})}
    found: Attack = OF_ATTACKS.set_where_known(ATTACKS.get(name).build(), **few)
    return OF_ATTACKS.set_where_known(found, max_queries=14)  # type: ignore[no-any-return]


def attacked(attack: Attack, model: nn.Module, x: Tensor) -> Attacked:
    system = System(model, interpreters.GradCAM(model))
    y = torch.tensor([0, 1, 2])
    if attack.needs_data:
        attack = attack.fitted(system, x, y)
    return attack(system, x, y)


@pytest.fixture(autouse=True)
def _no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_an_interpreter_names_the_fault(name: str, fault: str) -> None:
    x = X.clone()
    # A method that refuses every such network need not look at what this one says of the second image.
    says = "no self-attention" if (name, fault) == ("attention-rollout", "nan on part") else FAULTS[fault].says
    with pytest.raises(InputError, match=says):
        interpreter(name, hostile(fault), x)(x)
    assert torch.equal(x, X)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", [e.name for e in ATTACKS])
def test_an_attack_names_the_fault(name: str, fault: str) -> None:
    x = X.clone()
    if (name, fault) == ("universal-hiding-patch", "nan on part"):
        # It lies over the pixel at which that model stumbles.
        assert hostile(fault)(attacked(attack_of(name), hostile(fault), x).x).isfinite().all()
        return
    with pytest.raises(InputError, match=FAULTS[fault].says):
        attacked(attack_of(name), hostile(fault), x)
    assert torch.equal(x, X)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_system_names_the_fault(fault: str, grad: bool) -> None:
    model = hostile(fault)
    for x in (X.clone().requires_grad_(grad), X.clone()):
        with torch.set_grad_enabled(grad), pytest.raises(InputError, match=FAULTS[fault].says):
            System(model, interpreters.Gradient(model))(x)
        assert torch.equal(x, X)


def pairs(names: list[str]) -> list[Any]:
    """Every name with every fair model."""
    return [pytest.param(n, kind, id=f"{n}-{kind}") for n in names for kind in FAIR]


HIDDEN = "plain model|torch.compile|[Ss]cript"
"""An error about a model whose calls cannot be seen says so."""


def maps_of(name: str, model: nn.Module, dtype: torch.dtype) -> Tensor | InputError:
    x = X.to(dtype)
    try:
        return interpreter(name, model, x)(x, torch.tensor([0, 1, 2])).detach().float()
    except InputError as error:
        return error


@pytest.mark.parametrize(("name", "kind"), pairs(NAMES))
def test_an_interpreter_explains_a_fair_model_as_its_twin(name: str, kind: str) -> None:
    found, expected = maps_of(name, hostile(kind), FAIR[kind].dtype), maps_of(name, twin(), torch.float32)
    if isinstance(expected, InputError):
        assert isinstance(found, InputError)
        return
    if isinstance(found, InputError):
        assert kind in ("compiled", "scripted"), found
        assert re.search(HIDDEN, str(found))
        return
    assert found.isfinite().all()
    likeness = torch.stack([alike(a, b) for a, b in zip(found, expected, strict=True)])
    if kind == "confident":
        least = CONFIDENT.get(name, 0.99)
        assert bool((likeness > least).all()) or warned(name, hostile(kind)), likeness
    elif kind != "zero":
        least = HALF.get(name, 0.97) if kind == "half precision" else 0.9999
        assert bool((likeness > least).all()), likeness


# Their directions depend on the size of the logits: Grad-CAM++ by ``2 + g sum a``, aggregates by the mean with it, a
# probability by the weights of the other classes, of which only the nearest is left.
CONFIDENT = {"gradcam++": 0.8, "aggregate": 0.95, "vargrad": 0.9, "gradient": 0.85, "projected": 0.85}
# Where x nearly cancels, small differences of scores are ranked or squared, and bfloat16 has two digits.
HALF = {"input-x-gradient": 0.85, "kernel-shap": 0.85, "lime": 0.85, "mask": 0.9}


def alike(one: Tensor, other: Tensor) -> Tensor:
    """The cosine of two maps of any size, also far below that of usual numbers; 1 where both are zero."""
    one, other = (m.double().flatten() for m in (one, other))
    if not (one.any() or other.any()):
        return torch.ones((), dtype=torch.float64)
    return (F.normalize(one, dim=0, eps=1e-300) * F.normalize(other, dim=0, eps=1e-300)).sum()


def warned(name: str, model: nn.Module) -> bool:
    """Whether it says that probabilities of this model are saturated."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        interpreter(name, model, X)(X, torch.tensor([0, 1, 2]))
    return any(issubclass(w.category, SaturatedWarning) for w in caught)


@pytest.mark.parametrize(("name", "kind"), pairs([e.name for e in ATTACKS]))
def test_an_attack_on_a_fair_model_says_the_truth(name: str, kind: str) -> None:
    attack, x = attack_of(name), X.to(FAIR[kind].dtype)
    try:
        found = attacked(attack, hostile(kind), x)
    except InputError as error:
        assert re.search(HIDDEN, str(error)), error  # noqa: PT017
        return
    assert found.x.dtype == x.dtype
    assert 0 <= float(found.x.min()) <= float(found.x.max()) <= 1
    prediction = hostile(kind)(found.x).argmax(1)
    kept = hostile(kind)(x).argmax(1)
    wanted = prediction == kept if attack.keeps_prediction else prediction != torch.tensor([0, 1, 2])
    assert torch.equal(found.success, wanted)


@pytest.mark.parametrize("kind", FAIR)
def test_a_system_of_a_fair_model_answers_as_its_twin(kind: str) -> None:
    model, x = hostile(kind), X.to(FAIR[kind].dtype)
    seen = System(model, interpreters.Gradient(model))(x)
    expected = twin()(X) * FAIR[kind].scale
    rtol = 2e-2 if kind == "half precision" else 1e-5
    torch.testing.assert_close(seen.logits.float(), expected, rtol=rtol, atol=0.05)


def test_rows_of_a_model_that_is_nan_on_part_fail_with_that_reason_and_others_stay(tmp_path: Path) -> None:
    x = X.repeat(4, 1, 1, 1)
    good, bad = twin(), weighted(NaNOnPart())
    systems = {"good": System(good, interpreters.GradCAM(good))}
    kinds = (interpreters.Gradient, interpreters.GradCAM, interpreters.CAM, interpreters.Occlusion)
    rows = {kind.__name__: Defended(System(bad, kind(bad)), "good") for kind in kinds}
    columns: dict[str, Attack] = {"clean": attacks.Clean(), "fgsm": attacks.FGSM()}
    evaluation = Evaluation(images=12)
    found = evaluate({**systems, **rows}, columns, (x, good(x).argmax(1)), out=tmp_path / "run", evaluation=evaluation)
    assert found.measure("good", "clean", "joint") is not None
    for row in rows:
        for column in columns:
            cell = found.cells[row, column]
            assert cell is not None
            assert cell["status"] == "failed"
            assert "InputError: this NaNOnPart answers with NaN or infinite logits" in cell["traceback"]
