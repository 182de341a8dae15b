"""Many threads ask one model at once: each gets the serial answer, bit for bit."""

from __future__ import annotations

import copy
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain import interpreters, models
from robustexplain.attacks import ADV2, PGD
from robustexplain.autograd.hooks import _installed, hooks
from robustexplain.autograd.layers import captured
from robustexplain.defenses import (
    AggregatedInterpreter,
    AnyOf,
    BetaSmoothing,
    FeatureSqueezingDetector,
    InputTransform,
    XEnsembleDetector,
)
from robustexplain.defenses.detection.forest import Forest
from robustexplain.defenses.detection.map_network import MapNetwork
from robustexplain.interpreters import RTS, GradCAM, Gradient, Interpreter, MaskingModel, Reference
from robustexplain.interpreters.base import accepted_kinds
from robustexplain.models import Classifier
from robustexplain.registry import INTERPRETERS
from robustexplain.system import System
from robustexplain.transforms import transforms

THREADS = 20
FEW = interpreters.Segments(number=4)
# Cheap settings; the other interpreters are made of the model alone.
SETTINGS: dict[str, dict[str, Any]] = {
    "integrated-gradients": {"steps": 3},
    "expected-gradients": {"samples": 3},
    "smoothgrad": {"samples": 3, "of": "probability"},
    "vargrad": {"samples": 3, "of": "probability"},
    "mask": {"steps": 2},
    "relex": {"steps": 2, "samples": 2},
    "certified": {"samples": 45, "choose": 5, "grid": 4, "tau": 0.7},
    "sparsified": {"samples": 40, "keep": 0.2, "sigma": 0.25, "grid": 4, "bound": "clopper-pearson"},
    "metfa": {"samples": 8},
    "kernel-smoothed": {"samples": 3},
    "occlusion": {"window": 8, "stride": 8},
    "rise": {"samples": 4, "grid": 4},
    "lime": {"samples": 5, "segments": FEW},
    "kernel-shap": {"samples": 8, "segments": FEW},
    "captum": {"method": "DeepLift"},
}
# Asked more often than the others: what is quick.
QUICK = ("cam", "gradcam", "gradient", "rts", "rts again", "beta-smoothing", "layercam", "random front")
Systems = dict[str, tuple[System, list[Tensor]]]


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return make()


def interpreter(name: str, model: nn.Module, x: Tensor) -> Interpreter:
    cls: Any = INTERPRETERS.get(name).build
    if name == "expected-gradients":
        return cls(model, Reference(x[:2].clone()), **SETTINGS[name])  # type: ignore[no-any-return]
    if name == "projected":
        return cls(model, Gradient(model), Reference(x[:4].clone()), 3)  # type: ignore[no-any-return]
    if name == "rts":
        return RTS(model, seeded(lambda: MaskingModel.around(copy.deepcopy(model), x, width=4)).eval())
    if name == "of-transformed":
        front = models.Transformed(model, ["median-3"])
        return cls(front, GradCAM(front))  # type: ignore[no-any-return]
    if name == "of-draws":
        voted = models.Voted(model, "uniform-noise-0.05", 3)
        return cls(voted, GradCAM(voted))  # type: ignore[no-any-return]
    if name == "aggregate":
        return cls(model, (Gradient(model), GradCAM(model)))  # type: ignore[no-any-return]
    if name == "neighbour-mean":
        return cls(model, GradCAM(model), Reference(x.clone()), 2)  # type: ignore[no-any-return]
    if name in ("smoothed", "kernel-smoothed", "certified", "sparsified", "metfa"):
        return cls(model, GradCAM(model), **SETTINGS.get(name, {}))  # type: ignore[no-any-return]
    return cls(model, **SETTINGS.get(name, {}))  # type: ignore[no-any-return]


def x_ensemble(model: nn.Module) -> XEnsembleDetector:
    rng = torch.Generator().manual_seed(1)
    forest = Forest.fit(torch.rand(40, 2, generator=rng) - 0.5, torch.arange(40) % 2, 5, 0)
    networks = tuple(seeded(lambda: MapNetwork().eval().requires_grad_(False)) for _ in range(2))
    return XEnsembleDetector((Gradient(model), GradCAM(model)), networks, forest)


@pytest.mark.parametrize("name", ["mask", "relex"])
def test_weights_that_are_trained_stay_so_while_threads_explain(name: str) -> None:
    model = models.build("small-cnn", num_classes=3, in_channels=1, seed=0).eval()
    explained, x = interpreter(name, model, torch.rand(4, 1, 16, 16)), torch.rand(1, 1, 16, 16)
    start, seen = threading.Barrier(8), []

    def ask() -> None:
        start.wait()
        for _ in range(4):
            explained(x)
            seen.append(all(weight.requires_grad for weight in model.parameters()))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(seen)
    assert all(weight.requires_grad for weight in model.parameters())


def tables() -> Systems:
    model = models.build("mlp", in_features=4, num_classes=3, seed=0).eval()
    rows = torch.rand(6, 4, generator=torch.Generator().manual_seed(2))
    lime = interpreters.LIMETabular(model, Reference(rows), samples=20)
    shap = interpreters.SHAPTabular(model, Reference(rows[:2]), samples=8)
    return {i: (System(model, m), list(rows.split(1))) for i, m in (("lime-tabular", lime), ("shap-tabular", shap))}


def systems(model: Classifier, vit: Classifier, x: Tensor) -> Systems:
    """Every interpreter and every defended system, all of one model, with nothing found out about it yet."""
    images = list(x.split(1))
    made = {e.name: e.name for e in INTERPRETERS if "images" in accepted_kinds(e.build)}
    for special in ("attention-rollout", "theta"):
        made.pop(special)
    found: dict[str, System] = {}
    for name in made:
        explained = interpreter(name, model, x)
        found[name] = System(explained.model, explained)
    plain = System(model, GradCAM(model))
    found["rts again"] = found["rts"]
    found["beta-smoothing"] = BetaSmoothing(beta=3.0)(System(model, Gradient(model)))
    found["aggregated"] = AggregatedInterpreter(["gradient", "gradcam"])(plain)
    found["x-ensemble"] = System(model, plain.interpreter, x_ensemble(model))
    squeezing = FeatureSqueezingDetector(model, transforms(("median-2", "bit-depth-3")))
    found["squeezing"] = System(model, plain.interpreter, squeezing)
    found["any of"] = System(model, plain.interpreter, AnyOf((squeezing, x_ensemble(model))).calibrated(x, 0.2))
    found["random front"] = InputTransform(("resize-pad-2",))(plain)
    found["vit rollout"] = System(vit, interpreters.AttentionRollout(vit, weighting="gradient"))
    found["vit gradcam"] = System(vit, GradCAM(vit))
    return {name: (system, images) for name, system in found.items()} | tables()


def answer(system: System, x: Tensor, attached: bool) -> list[np.ndarray]:
    with torch.set_grad_enabled(attached):
        seen = system(x)
    parts = (seen.logits, seen.maps, seen.score)
    return [part.detach().numpy().copy() for part in parts if part is not None]


def in_threads(work: Callable[[int], None]) -> None:
    """Run ``work`` in every thread, from one moment on; the first exception is raised."""
    start, errors = threading.Barrier(THREADS), []

    def run(index: int) -> None:
        try:
            start.wait()
            work(index)
        except Exception as error:  # raised in the main thread
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@pytest.fixture
def switching() -> Iterator[Callable[[float], None]]:
    """Sets how long a thread runs before another may, in seconds."""
    before = sys.getswitchinterval()
    yield sys.setswitchinterval
    sys.setswitchinterval(before)


@pytest.fixture(scope="module")
def serial(tiny_model: Classifier, tiny_vit: Classifier, grey: Tensor) -> dict[tuple[str, int, bool], list[np.ndarray]]:
    """The answers of every system to each image, without and with a graph."""
    return {
        (name, i, attached): answer(system, image, attached)
        for name, (system, images) in systems(tiny_model, tiny_vit, grey[:3]).items()
        for i, image in enumerate(images)
        for attached in (False, True)
    }


# By default a thread runs for 5 milliseconds.
@pytest.mark.parametrize(("interval", "calls"), [(5e-3, 3000), (1e-5, 1000)])
def test_twenty_threads_get_the_serial_answers(
    interval: float,
    calls: int,
    tiny_model: Classifier,
    tiny_vit: Classifier,
    grey: Tensor,
    serial: dict[tuple[str, int, bool], list[np.ndarray]],
    switching: Callable[[float], None],
) -> None:
    asked = systems(tiny_model, tiny_vit, grey[:3])
    weights = [1.0 if name in QUICK else 0.05 for name in asked]
    wrong: list[str] = []

    def work(index: int) -> None:
        rng = random.Random(index)
        for name in rng.choices(list(asked), weights, k=calls // THREADS):
            system, images = asked[name]
            i, attached = rng.randrange(len(images)), rng.random() < 0.3
            found = answer(system, images[i], attached)
            if not all(map(np.array_equal, found, serial[name, i, attached])):
                wrong.append(name)

    switching(interval)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        in_threads(work)
    assert not wrong
    assert not [w for w in said if "delayed" in str(w.message)]
    assert not _installed
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in (*tiny_model.modules(), *tiny_vit.modules()))


def test_attacks_in_threads_are_the_serial_ones(tiny_model: Classifier, grey: Tensor) -> None:
    system = System(tiny_model, GradCAM(tiny_model))
    smoothed = System(tiny_model, Gradient(tiny_model))
    y = torch.tensor([0])
    attacks = [(PGD(0.1, 3, 0.05), system), (ADV2(0.1, steps=3, step_size=0.05), smoothed)]
    serial = [[attack(s, x, y).x for x in grey.split(1)] for attack, s in attacks]
    same: list[bool] = []

    def work(index: int) -> None:
        (attack, s), i = attacks[index % 2], index % 5
        same.append(torch.equal(attack(s, grey[i : i + 1], y).x, serial[index % 2][i]))

    in_threads(work)
    assert same == [True] * THREADS


def test_a_hook_sees_its_own_thread_only_and_goes_after_an_exception() -> None:
    layer, seen = nn.Identity(), {i: [] for i in range(THREADS)}  # type: ignore[var-annotated]

    def work(index: int) -> None:
        for number in range(50):
            with hooks([layer], lambda module, args, output: seen[index].append(int(output))):
                layer(torch.tensor(100 * index + number))
        with pytest.raises(ArithmeticError), captured(nn.Sequential(layer), ["0"]):
            raise ArithmeticError

    in_threads(work)
    assert all(seen[i] == list(range(100 * i, 100 * i + 50)) for i in range(THREADS))
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_fused_attention_stays_as_it_was_set(tiny_vit: Classifier, grey: Tensor) -> None:
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    inside: list[tuple[bool, bool]] = []
    flags = torch.backends.cuda
    net = copy.deepcopy(tiny_vit)
    net.register_forward_hook(lambda *_: inside.append((flags.flash_sdp_enabled(), flags.math_sdp_enabled())))
    GradCAM(net)(grey)
    assert set(inside) == {before}


def test_the_forest_votes_as_scikit_learns(grey: Tensor) -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 3, generator=rng)
    forest = Forest.fit(rows, (rows[:, 0] > 0).long(), 15, 0)
    assert np.array_equal(forest(rows).numpy(), forest.forest.predict_proba(rows.numpy())[:, 1].astype(np.float32))
    assert forest(torch.tensor([[0.0, torch.nan, 0.0]])).isnan().all()


def test_a_copy_made_while_a_module_is_hooked_runs_its_own_hook_once() -> None:
    module, seen = nn.Linear(2, 2), []

    def note(*_: object) -> None:
        seen.append(1)

    with hooks([module], note, note):
        copied = copy.deepcopy(module)
    with hooks([copied], note, note):
        copied(torch.zeros(1, 2))
    assert len(seen) == 2
    assert not copied._forward_hooks
    assert not copied._forward_pre_hooks


def test_blocks_of_two_generators_end_in_any_order() -> None:
    module, seen = nn.Linear(2, 2), []

    def watching(name: str) -> Iterator[None]:
        with hooks([module], lambda *_: seen.append(name)):
            yield

    first, second = watching("first"), watching("second")
    next(first), next(second)
    first.close()
    module(torch.zeros(1, 2))
    second.close()
    assert seen == ["second"]
    assert not module._forward_hooks
