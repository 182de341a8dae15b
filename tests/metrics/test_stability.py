"""Stability against Quantus and captum on the same perturbations, and what the figures say."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain.autograd.layers import captured, feature_layers, last_feature_layer
from robustexplain.errors import InputError, UnknownNameError
from robustexplain.interpreters import GradCAM, Gradient, Interpreter
from robustexplain.interpreters.base import Explanation, explained_class
from robustexplain.metrics import (
    AvgSensitivity,
    LocalLipschitz,
    MaxSensitivity,
    RelativeInputStability,
    RelativeOutputStability,
    RelativeRepresentationStability,
    Stability,
    stabilities,
)
from robustexplain.registry import METRICS

KINDS: list[type[Stability]] = [entry.build for entry in METRICS if issubclass(entry.build, Stability)]  # type: ignore[arg-type, misc]


@dataclass(frozen=True, eq=False)
class Scaled(Interpreter):
    """The image itself, times a factor: every move is known."""

    factor: float = 3.0

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        logits = self.model(x)
        explained_class(logits, target)
        return Explanation(logits, self.factor * x.sum(1))


@pytest.fixture
def interpreter(tiny_model: nn.Module) -> Gradient:
    return Gradient(tiny_model, of="logit")


def neighbours(x: Tensor, samples: int = 4, radius: float = 0.05) -> list[Tensor]:
    rng = torch.Generator().manual_seed(7)
    return [(x + radius * (2 * torch.rand(x.shape, generator=rng) - 1)).clamp(0, 1) for _ in range(samples)]


def by_quantus(
    oracle: type, interpreter: Interpreter, x: Tensor, around: list[Tensor], **settings: object
) -> np.ndarray:
    waiting = iter(around)
    model = interpreter.model
    with torch.no_grad():
        target = model(x).argmax(1)

    def perturb(arr: np.ndarray, indices: np.ndarray, **_: object) -> np.ndarray:
        return next(waiting).numpy().reshape(arr.shape).copy()

    def explain(model: nn.Module, inputs: object, targets: object, **_: object) -> np.ndarray:
        given, classes = (torch.as_tensor(np.asarray(v)) for v in (inputs, targets))
        return interpreter(given.float(), classes.long()).detach()[:, None].numpy()

    metric = oracle(nr_samples=len(around), perturb_func=perturb, normalise=False, disable_warnings=True, **settings)
    found = metric(
        model=model, x_batch=x.numpy().copy(), y_batch=target.numpy(), explain_func=explain, channel_first=True
    )
    return np.asarray(found)


def test_sensitivities_against_quantus(interpreter: Gradient, grey: Tensor) -> None:
    quantus = pytest.importorskip("quantus")
    around = neighbours(grey)
    for metric, oracle in (
        (MaxSensitivity(), quantus.MaxSensitivity),
        (AvgSensitivity(), quantus.AvgSensitivity),
        (LocalLipschitz(), quantus.LocalLipschitzEstimate),
    ):
        wanted = by_quantus(oracle, interpreter, grey, around)
        found = metric.along(interpreter, grey, iter(around))
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-4)


@pytest.mark.parametrize("radius", [1e-4, 0.3])
def test_relative_stability_against_quantus(interpreter: Gradient, grey: Tensor, radius: float) -> None:
    quantus = pytest.importorskip("quantus")
    around = neighbours(grey, 5, radius)
    modules = dict(interpreter.model.named_modules())
    names = [layer.name for layer in feature_layers(interpreter.model, grey)]
    # Quantus does not look into containers.
    layer = [name for name in names if not isinstance(modules[name], nn.Sequential)][-1]
    for metric, oracle, settings in (
        (RelativeInputStability(), quantus.RelativeInputStability, {}),
        (RelativeOutputStability(), quantus.RelativeOutputStability, {}),
        (
            RelativeRepresentationStability(layer=layer),
            quantus.RelativeRepresentationStability,
            {"layer_names": [layer]},
        ),
    ):
        wanted = by_quantus(oracle, interpreter, grey, around, return_nan_when_prediction_changes=False, **settings)
        found = metric.along(interpreter, grey, iter(around)).numpy()
        with torch.no_grad():
            kept = torch.stack([interpreter.model(a).argmax(1) for a in around]) == interpreter.model(grey).argmax(1)
        always = kept.all(0).numpy()
        assert always.any()
        # Both in float32, and small values of a map divide large moves.
        np.testing.assert_allclose(found[always], wanted[always], rtol=2e-3)


def test_relative_stability_by_hand_in_float64(tiny_model: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(tiny_model).double(), grey.double()
    x[:, :, 3] = 0  # values that something is divided by
    interpreter, layer = Gradient(model), last_feature_layer(model, x).name
    around = [a.double() for a in neighbours(x.float(), 3, 0.01)]
    figures: dict[type[Stability], list[np.ndarray]] = {}
    with torch.no_grad(), captured(model, [layer]) as outputs:
        seen = []
        for image in (x, *around):
            logits = model(image)
            seen.append([v.numpy().reshape(5, -1) for v in (image, logits, outputs[layer])])
        target = model(x).argmax(1)
    maps = [interpreter(image, target).detach().numpy().reshape(5, -1) for image in (x, *around)]

    def moved(before: np.ndarray, after: np.ndarray) -> np.ndarray:
        size: np.ndarray = np.linalg.norm((after - before) / np.where(before == 0, 1e-6, before), axis=1)
        return size

    for (image, logits, features), drawn in zip(seen[1:], maps[1:], strict=True):
        above = moved(maps[0], drawn)
        figures.setdefault(RelativeInputStability, []).append(above / moved(seen[0][0], image))
        figures.setdefault(RelativeOutputStability, []).append(above / np.linalg.norm(logits - seen[0][1], axis=1))
        figures.setdefault(RelativeRepresentationStability, []).append(above / moved(seen[0][2], features))
    for kind, values in figures.items():
        found = kind().along(interpreter, x, iter(around))
        np.testing.assert_allclose(found, np.max(values, axis=0), rtol=1e-8)


def test_neighbours_that_change_the_prediction_do_not_count(grey: Tensor) -> None:
    bright = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with torch.no_grad():
        bright[0].weight.copy_(torch.tensor([1.0, -1.0])[:, None, None, None])
        bright[0].bias.copy_(torch.tensor([-0.5, 0.5]))
    interpreter = Scaled(bright.eval())
    x = 0.5 * grey
    near, far = 0.9 * x, 1 - x
    for kind in (RelativeInputStability, RelativeOutputStability, RelativeRepresentationStability):
        metric = kind(layer="0") if kind is RelativeRepresentationStability else kind()  # type: ignore[call-arg]
        kept = metric.along(interpreter, x, iter([near]))
        assert kept.isfinite().all()
        assert torch.equal(metric.along(interpreter, x, iter([near, far])), kept)
        assert metric.along(interpreter, x, iter([far])).isnan().all()
    both = MaxSensitivity().along(interpreter, x, iter([near, far]))
    assert (both > MaxSensitivity().along(interpreter, x, iter([near]))).all()


def test_max_sensitivity_against_captum(interpreter: Gradient, grey: Tensor) -> None:
    oracle = pytest.importorskip("captum.metrics").sensitivity_max
    around = neighbours(grey, 6)
    drawn = torch.stack(around, 1).flatten(0, 1)
    with torch.no_grad():
        target = interpreter.model(grey).argmax(1)

    def explain(inputs: tuple[Tensor, ...], target: Tensor) -> tuple[Tensor]:
        return (interpreter(inputs[0], target).detach()[:, None],)

    wanted = oracle(explain, (grey,), perturb_func=lambda _: (drawn,), n_perturb_samples=6, target=target)
    found = MaxSensitivity().along(interpreter, grey, iter(around))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_figures_of_a_map_whose_moves_are_known(tiny_model: nn.Module, grey: Tensor) -> None:
    model, x = copy.deepcopy(tiny_model).double(), grey.double()
    interpreter = Scaled(model)
    around = [a.double() for a in neighbours(grey)]
    moves = torch.stack([(a - x).flatten(1).norm(dim=1) for a in around])
    size = x.flatten(1).norm(dim=1)
    torch.testing.assert_close(MaxSensitivity().along(interpreter, x, iter(around)), moves.amax(0) / size)
    torch.testing.assert_close(AvgSensitivity().along(interpreter, x, iter(around)), moves.mean(0) / size)
    absolute = MaxSensitivity(relative=False)
    torch.testing.assert_close(absolute.along(interpreter, x, iter(around)), 3 * moves.amax(0))
    assert LocalLipschitz()(interpreter, x).tolist() == pytest.approx([3.0] * 5)
    assert RelativeInputStability()(interpreter, x).tolist() == pytest.approx([1.0] * 5)


def test_neighbours_lie_around_x_inside_the_image_range(grey: Tensor) -> None:
    drawn = torch.stack(list(MaxSensitivity(radius=0.1, samples=20).neighbours(grey)))
    assert drawn.shape == (20, 5, 1, 16, 16)
    assert (drawn - grey).abs().max().item() <= 0.1 + 1e-6
    assert ((drawn >= 0) & (drawn <= 1)).all()
    inside = (grey > 0.1) & (grey < 0.9)
    assert (drawn - grey)[:, inside].std().item() == pytest.approx(0.1 / 3**0.5, rel=0.03)
    normal = torch.stack(list(MaxSensitivity(radius=0.02, noise="gaussian", samples=20).neighbours(grey)))
    assert (normal - grey)[:, inside].std().item() == pytest.approx(0.02, rel=0.03)


def test_a_larger_radius_is_less_stable(interpreter: Gradient, grey: Tensor) -> None:
    for kind in (MaxSensitivity, AvgSensitivity):
        near, far = (kind(radius=r)(interpreter, grey) for r in (0.001, 0.2))
        assert (far > near).all()


def test_smooth_maps_are_steadier(tiny_model: nn.Module, grey: Tensor) -> None:
    assert MaxSensitivity()(GradCAM(tiny_model), grey).mean() < MaxSensitivity()(Gradient(tiny_model), grey).mean()


# The contract


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Stability]:
    found: type[Stability] = request.param
    return found


def test_a_figure_depends_neither_on_the_batch_nor_on_the_chunk(
    kind: type[Stability], tiny_model: nn.Module, grey: Tensor
) -> None:
    interpreter, x = Gradient(copy.deepcopy(tiny_model).double()), grey.double()
    target = torch.tensor([3, 0, 1, 2, 0])
    together = kind(samples=4)(interpreter, x, target)
    assert together.shape == (5,)
    assert (together.isfinite() & (together >= 0)).all()
    alone = torch.cat([kind(samples=4)(interpreter, x[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(kind(samples=4, batch_size=3)(interpreter, x, target), together, rtol=1e-6, atol=1e-12)
    flipped = kind(samples=4)(interpreter, x.flip(0), target.flip(0)).flip(0)
    torch.testing.assert_close(flipped, together, rtol=1e-6, atol=1e-12)


def test_a_seed_gives_the_same_bits_and_another_other_ones(
    kind: type[Stability], interpreter: Gradient, grey: Tensor
) -> None:
    state = torch.get_rng_state()
    first = kind()(interpreter, grey)
    assert torch.equal(first, kind()(interpreter, grey))
    assert not torch.equal(first, kind(seed=1)(interpreter, grey))
    assert torch.equal(torch.get_rng_state(), state)
    assert not first.requires_grad
    assert not any(m._forward_hooks for m in interpreter.model.modules())


def test_the_target_is_held_fixed(kind: type[Stability], interpreter: Gradient, grey: Tensor) -> None:
    with torch.no_grad():
        target = interpreter.model(grey).argmax(1)
    assert torch.equal(kind()(interpreter, grey), kind()(interpreter, grey, target))
    assert not torch.equal(kind()(interpreter, grey), kind()(interpreter, grey, (target + 1) % 4))


def test_other_precisions_work(kind: type[Stability], tiny_model: nn.Module, grey: Tensor) -> None:
    found = kind(samples=2)(GradCAM(copy.deepcopy(tiny_model).bfloat16()), grey.bfloat16())
    assert found.dtype == torch.float32, "it has no bound, and float16 would write infinity"


def test_bad_arguments_are_refused(kind: type[Stability], interpreter: Gradient, grey: Tensor) -> None:
    with pytest.raises(InputError, match=r"lie in \[0, 1\]"):
        kind()(interpreter, grey + 1)
    with pytest.raises(InputError, match=r"target must have shape \[5\]"):
        kind()(interpreter, grey, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(InputError, match="target holds class 9"):
        kind()(interpreter, grey, torch.full((5,), 9))
    with pytest.raises(InputError, match="eval mode"):
        kind()(Gradient(copy.deepcopy(interpreter.model).train()), grey)
    with pytest.raises(InputError, match="maps holds NaN or infinity"):
        kind()(Scaled(interpreter.model, float("nan")), grey)
    for bad in ({"radius": 0.0}, {"samples": 0}, {"noise": "pink"}):
        with pytest.raises(InputError, match=f"{kind.__name__}.{next(iter(bad))} must be"):
            kind(**bad)  # type: ignore[arg-type]


def test_an_all_zero_map_that_stays_is_undefined(tiny_model: nn.Module, grey: Tensor) -> None:
    zero = Scaled(tiny_model, 0.0)
    assert MaxSensitivity()(zero, grey).isnan().all()
    assert not MaxSensitivity(relative=False)(zero, grey).any()
    assert not LocalLipschitz()(zero, grey).any()


def test_an_unknown_layer_is_named_with_the_nearest(interpreter: Gradient, grey: Tensor) -> None:
    with pytest.raises(UnknownNameError, match="layer"):
        RelativeRepresentationStability(layer="nowhere")(interpreter, grey)


def drained(batches: Iterator[Tensor]) -> int:
    return sum(1 for _ in batches)


def test_neighbours_come_one_by_one(grey: Tensor) -> None:
    assert drained(LocalLipschitz(samples=3).neighbours(grey)) == 3


# Several at once


@dataclass(frozen=True, eq=False)
class Counted(Interpreter):
    """A gradient map, and how many inputs were explained."""

    asked: list[int] = field(default_factory=list)

    def _explain(self, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        self.asked.append(len(x))
        return Gradient(self.model, of="logit")._explain(x, target, graph)


@dataclass(frozen=True)
class Still(MaxSensitivity):
    """Every neighbour is the input itself."""

    def neighbours(self, x: Tensor) -> Iterator[Tensor]:
        yield from [x] * self.samples


def test_a_metric_with_neighbours_of_its_own_shares_none(interpreter: Gradient, grey: Tensor) -> None:
    plain, still = stabilities([MaxSensitivity(samples=2), Still(samples=2)], interpreter, grey)
    assert torch.equal(plain, MaxSensitivity(samples=2)(interpreter, grey))
    assert not still.any()


def test_metrics_of_the_same_neighbours_share_their_explanations(tiny_model: nn.Module, grey: Tensor) -> None:
    interpreter = Counted(tiny_model)
    layers = [layer.name for layer in feature_layers(tiny_model, grey)]
    # In an order that puts metrics of other draws between those that share, two layers among them.
    metrics: list[Stability] = [
        RelativeRepresentationStability(samples=4, layer=layers[0]),
        MaxSensitivity(samples=4),
        LocalLipschitz(samples=3),
        RelativeRepresentationStability(samples=4),
        AvgSensitivity(samples=4, seed=1),
        RelativeInputStability(samples=4),
        AvgSensitivity(samples=4, relative=False),
        RelativeOutputStability(samples=4, eps=0.5),
        MaxSensitivity(samples=4, radius=0.1),
        LocalLipschitz(samples=4, noise="gaussian"),
    ]
    target = torch.tensor([3, 0, 1, 2, 0])
    found = stabilities(metrics, interpreter, grey, target)
    assert sum(interpreter.asked) == 5 * (5 + 4 + 5 + 5 + 5)
    for metric, together in zip(metrics, found, strict=True):
        assert torch.equal(together, metric(interpreter, grey, target)), metric
    interpreter.asked.clear()
    assert stabilities([], interpreter, grey) == []
    assert not interpreter.asked
