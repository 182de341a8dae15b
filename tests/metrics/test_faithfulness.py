"""Faithfulness against Quantus, captum and slow loops, and what its curves say of good and bad maps."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain.errors import InputError
from robustexplain.metrics import (
    AOPC,
    ROAD,
    Deletion,
    Faithfulness,
    Infidelity,
    Insertion,
    LeastRelevantFirst,
    NormalisedAOPC,
    Sufficiency,
)
from robustexplain.metrics.fidelity import infidelity
from robustexplain.metrics.filters import blurred
from robustexplain.metrics.perturbing import region_order, replaced, sweep
from robustexplain.models import admit
from robustexplain.registry import METRICS

KINDS: list[type[Faithfulness]] = [entry.build for entry in METRICS if issubclass(entry.build, Faithfulness)]  # type: ignore[arg-type, misc]


class Linear(nn.Module):
    """Two classes, the first one's logit a weighted sum of pixels: what each pixel does is known."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        score = (x * self.weights).flatten(1).sum(1)
        return torch.stack([score, -score], 1)


@pytest.fixture
def maps(grey: Tensor) -> Tensor:
    return torch.randn(5, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def target(tiny_model: nn.Module, grey: Tensor) -> Tensor:
    with torch.no_grad():
        return tiny_model(grey).argmax(1)


@pytest.fixture
def linear() -> tuple[Linear, Tensor, Tensor]:
    """A linear model, images without a zero, and its exact attribution ``w x``."""
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(1, 8, 8, generator=rng, dtype=torch.float64)
    x = 0.1 + 0.9 * torch.rand(3, 1, 8, 8, generator=rng, dtype=torch.float64)
    return Linear(weights).eval(), x, (x * weights)[:, 0]


# Order and replacement


@pytest.mark.parametrize("patch", [1, 3, 4, 16, 20])
def test_the_order_of_regions_against_a_slow_loop(maps: Tensor, patch: int) -> None:
    side = math.ceil(16 / patch)
    for ascending in (False, True):
        found, regions = region_order(maps, patch, ascending=ascending)
        assert regions == side**2
        for m, order in zip(maps.numpy(), found.numpy(), strict=True):
            spans = [(slice(patch * i, patch * i + patch), slice(patch * j, patch * j + patch))
                     for i in range(side) for j in range(side)]  # fmt: skip
            sums = np.array([m[span].sum() for span in spans])
            for place, region in enumerate(np.argsort(sums if ascending else -sums)):
                assert (order[spans[region]] == place).all()


def test_equal_regions_go_in_reading_order() -> None:
    found, _ = region_order(torch.zeros(1, 4, 6), 2)
    assert found[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_what_replaces_a_pixel(grey: Tensor) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    assert not replaced(grey, "zero", 0).any()
    assert replaced(grey, "mean", 0)[2, 0, 3, 4].item() == pytest.approx(grey[2].mean().item())
    wanted = ndimage.gaussian_filter(grey[1, 0].double().numpy(), 5.0, radius=5, mode="nearest")
    np.testing.assert_allclose(replaced(grey.double(), "blur", 0)[1, 0], wanted)
    noise = replaced(grey, "noise", 3)
    assert torch.equal(noise[1:2], replaced(grey[1:2], "noise", 3))
    assert not torch.equal(noise, replaced(grey, "noise", 4))
    assert noise.min() >= 0
    assert 0.45 < noise.mean() < 0.55
    assert blurred(torch.full((1, 2, 3, 3), 0.4), 5.0, 5).allclose(torch.tensor(0.4))


# Against Quantus


def by_quantus(metric: object, model: nn.Module, x: Tensor, maps: Tensor, target: Tensor) -> np.ndarray:
    found = metric(  # type: ignore[operator]
        model=model, x_batch=x.numpy(), y_batch=target.numpy(), a_batch=maps[:, None].numpy(), channel_first=True
    )
    return np.asarray(found)


def test_deletion_against_quantus_pixel_flipping(
    tiny_model: nn.Module, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    quantus = pytest.importorskip("quantus")
    oracle = quantus.PixelFlipping(features_in_step=16, perturb_baseline=0.0, normalise=False, disable_warnings=True)
    wanted = by_quantus(oracle, tiny_model, grey, maps, target)
    metric = Deletion()
    with torch.no_grad():
        curve = metric.curve(tiny_model, grey, maps, target)
        whole = tiny_model(grey).softmax(1).gather(1, target[:, None])[:, 0]
    # Quantus leaves the whole image out of the curve.
    np.testing.assert_allclose(curve[:, 1:], wanted, atol=1e-5)
    torch.testing.assert_close(curve[:, 0], whole)
    areas = np.trapezoid(curve.numpy(), axis=1) / 16
    assert metric(tiny_model, grey, maps, target).tolist() == pytest.approx(areas.tolist(), abs=1e-6)


@pytest.mark.parametrize("patch", [4, 8])
@pytest.mark.parametrize("kind,order", [(AOPC, "morf"), (LeastRelevantFirst, "lerf")])
def test_aopc_against_quantus_region_perturbation(
    kind: type[AOPC], order: str, patch: int, tiny_model: nn.Module, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    quantus = pytest.importorskip("quantus")
    oracle = quantus.RegionPerturbation(
        patch_size=patch,
        regions_evaluation=3,
        order=order,
        normalise=False,
        perturb_baseline=0.0,
        disable_warnings=True,
    )
    falls = by_quantus(oracle, tiny_model, grey, maps, target)
    found = kind(patch=patch, regions=3, replacement="zero")(tiny_model, grey, maps, target)
    # Quantus gives the falls themselves, without the first one, which is zero.
    assert found.tolist() == pytest.approx((falls.sum(1) / 4).tolist(), abs=1e-5)


def test_infidelity_against_quantus_on_its_own_perturbations(
    tiny_model: nn.Module, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    quantus = pytest.importorskip("quantus")
    oracle = quantus.Infidelity(
        perturb_baseline=0.0, perturb_patch_sizes=[4], n_perturb_samples=1, disable_warnings=True
    )
    wanted = by_quantus(oracle, tiny_model, grey, maps, target)
    # Quantus follows the logit, and replaces one 4 x 4 block after the other without putting any back: its I grow.
    predicted, drops = [], []
    with torch.no_grad():
        whole = tiny_model(grey).gather(1, target[:, None])[:, 0]
        shown = grey.clone()
        for i in range(4):
            for j in range(4):
                shown[:, :, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4] = 0
                predicted.append(((grey - shown)[:, 0] * maps).flatten(1).sum(1))
                drops.append(whole - tiny_model(shown).gather(1, target[:, None])[:, 0])
    found = infidelity(torch.stack(predicted), torch.stack(drops), scaled=False)
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


@pytest.mark.parametrize("noise", ["gaussian", "square"])
@pytest.mark.parametrize("scaled", [False, True])
def test_infidelity_against_captum(
    noise: str, scaled: bool, tiny_model: nn.Module, colour: Tensor, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    oracle = pytest.importorskip("captum.metrics").infidelity
    metric = Infidelity(noise=noise, scaled=scaled, samples=7, seed=3)  # type: ignore[arg-type]
    model, x = copy.deepcopy(tiny_model).double(), grey.double()
    drawn = torch.stack(list(metric.perturbations(x)), 1).flatten(0, 1)

    def perturb(given: Tensor) -> tuple[Tensor, Tensor]:
        return drawn, given - drawn

    wanted = oracle(
        lambda some: model(some).softmax(1), perturb, x, maps[:, None].double(), target=target,
        n_perturb_samples=7, normalize=scaled,
    )  # fmt: skip
    found = metric(model, x, maps.double(), target)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-9, atol=1e-12)


# What the figures say


def test_the_exact_map_of_a_linear_model_has_no_infidelity(linear: tuple[Linear, Tensor, Tensor]) -> None:
    model, x, _ = linear
    gradient = model.weights.expand(3, 8, 8)
    for noise in ("gaussian", "square"):
        metric = Infidelity(of="logit", noise=noise)  # type: ignore[arg-type]
        assert metric(model, x, gradient).max().item() < 1e-20 or metric(model, x, -gradient).max().item() < 1e-20
    target = torch.zeros(3, dtype=torch.int64)
    assert Infidelity(of="logit")(model, x, gradient, target).max().item() < 1e-20
    assert Infidelity(of="logit")(model, x, 5 * gradient, target).min().item() > 0.1
    assert Infidelity(of="logit", scaled=True)(model, x, 5 * gradient, target).max().item() < 1e-20


def test_exact_maps_beat_random_and_reversed_ones(linear: tuple[Linear, Tensor, Tensor]) -> None:
    model, x, exact = linear
    target, rng = torch.zeros(3, dtype=torch.int64), torch.Generator().manual_seed(0)
    random = torch.randn(16, *exact.shape, dtype=exact.dtype, generator=rng)
    for kind in KINDS:
        if kind is Infidelity:
            continue
        wanted = {"replacement": "zero", "of": "logit", "patch": 1}
        metric = kind(**{name: value for name, value in wanted.items() if name in dir(kind)})  # type: ignore[arg-type]
        good, bad = metric(model, x, exact, target), metric(model, x, -exact, target)
        noise = torch.stack([metric(model, x, maps, target) for maps in random])
        if kind is ROAD:
            # The map is exact for pixels set to zero; of pixels made from their neighbours it is so on average alone.
            noise = noise.mean(0)
        sign = 1 if metric.better == "higher" else -1
        assert (sign * good > sign * noise).all(), kind
        assert (sign * noise > sign * bad).all(), kind


def test_curves_of_a_linear_model_by_hand(linear: tuple[Linear, Tensor, Tensor]) -> None:
    model, x, exact = linear
    target = torch.zeros(3, dtype=torch.int64)
    ordered = exact.flatten(1).sort(1, descending=True).values
    left = ordered.sum(1, keepdim=True) - torch.cat([torch.zeros(3, 1), ordered.cumsum(1)], 1)
    torch.testing.assert_close(Deletion(of="logit", pixels=1).curve(model, x, exact, target), left)
    torch.testing.assert_close(
        Insertion(of="logit", pixels=1, replacement="zero").curve(model, x, exact, target), left[:, :1] - left
    )
    aopc = AOPC(of="logit", patch=1, regions=10, replacement="zero")
    torch.testing.assert_close(aopc(model, x, exact, target), (left[:, :1] - left[:, :11]).mean(1))
    kept = Sufficiency(of="logit", keep=0.25, replacement="zero")
    torch.testing.assert_close(kept(model, x, exact, target), left[:, 16])
    # Twenty do not divide 64 pixels: the last step takes four.
    uneven = Deletion(of="logit", pixels=20).curve(model, x, exact, target)
    torch.testing.assert_close(uneven, left[:, [0, 20, 40, 60, 64]])


def test_keeping_everything_changes_nothing(tiny_model: nn.Module, grey: Tensor, maps: Tensor) -> None:
    assert not Sufficiency(keep=1.0)(tiny_model, grey, maps).any()
    one = Sufficiency(keep=0.0)(tiny_model, grey, maps)
    assert one.isfinite().all()
    assert one.any()


# The contract


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request: pytest.FixtureRequest) -> type[Faithfulness]:
    found: type[Faithfulness] = request.param
    return found


def test_all_kinds_are_tested() -> None:
    assert {AOPC, LeastRelevantFirst, Deletion, Insertion, Infidelity, Sufficiency} <= set(KINDS)


def test_a_figure_depends_neither_on_the_batch_nor_on_the_chunk(
    kind: type[Faithfulness], tiny_model: nn.Module, grey: Tensor, maps: Tensor
) -> None:
    model, x, m = copy.deepcopy(tiny_model).double(), grey.double(), maps.double()
    target = torch.tensor([3, 0, 1, 2, 0])
    together = kind()(model, x, m, target)
    assert together.shape == (5,)
    assert together.isfinite().all()
    alone = torch.cat([kind()(model, x[i : i + 1], m[i : i + 1], target[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kind(batch_size=3)(model, x, m, target), together, rtol=1e-9, atol=1e-12)


def test_the_model_never_sees_more_than_a_chunk(
    kind: type[Faithfulness], tiny_model: nn.Module, grey: Tensor, maps: Tensor
) -> None:
    model = copy.deepcopy(tiny_model)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    kind(batch_size=4)(model, grey, maps)
    handle.remove()
    assert max(seen) <= 4


@pytest.mark.parametrize("batch_size", [1, 3, 5, 7, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sweep_shows_each_step_of_each_image_exactly(batch_size: int, channels: int, maps: Tensor) -> None:
    rng = torch.Generator().manual_seed(1)
    start, end = (torch.rand(5, channels, 16, 16, generator=rng) for _ in range(2))
    order, _ = region_order(maps, 3)
    cuts, target = torch.tensor([0, 1, 4, 9, 36]), torch.arange(5)
    seen: dict[tuple[int, int], Tensor] = {}
    steps = iter([(step, row) for step in range(5) for row in range(5)])

    def score(x: Tensor, classes: Tensor) -> Tensor:
        assert len(x) <= batch_size
        at = [next(steps) for _ in x]
        assert classes.tolist() == [row for _, row in at]
        seen.update(zip(at, x, strict=True))
        return torch.tensor([100.0 * step + row for step, row in at])

    found = sweep(score, start, end, order, cuts, target, batch_size)
    assert found.tolist() == [[100.0 * step + row for step in range(5)] for row in range(5)]
    for (step, row), x in seen.items():
        assert torch.equal(x, torch.where(order[row] < cuts[step], end[row], start[row]))


def test_the_model_runs_on_as_many_inputs_as_the_definition_asks_for_and_one(
    tiny_model: nn.Module, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    model = copy.deepcopy(tiny_model)
    admit(model, grey)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    # The one tells how many classes there are.
    for metric, passes in ((Deletion(), 17), (AOPC(patch=4), 17), (Infidelity(samples=6), 7), (Sufficiency(), 2)):
        for batch_size in (256, 4):
            seen.clear()
            replace(metric, batch_size=batch_size)(model, grey, maps, target)  # type: ignore[type-var]
            assert sum(seen) == 5 * passes + 1, metric
            # Samples and steps fill batches together, up to the last of them.
            if isinstance(metric, Deletion | AOPC):
                assert len(seen) == 1 + math.ceil(5 * passes / batch_size)
    handle.remove()


def test_squares_lie_anywhere_inside_and_are_as_large_as_they_can_be() -> None:
    x = torch.ones(40, 2, 5, 7)
    x += torch.arange(40.0)[:, None, None, None] / 100
    drawn = torch.stack(list(Infidelity(noise="square", side=3, samples=50).perturbations(x / 2)))
    inside = drawn != 0
    assert torch.equal(drawn[inside], (x / 2).expand_as(drawn)[inside])
    assert torch.equal(inside[:, :, 0], inside[:, :, 1])
    rows, columns = inside[:, :, 0].any(3), inside[:, :, 0].any(2)
    for hit, places in ((rows, 3), (columns, 5)):
        assert (hit.sum(2) == 3).all()
        first = hit.int().argmax(2).flatten()
        assert (hit.int().diff(dim=2).abs().sum(2) <= 2).all()
        counts = first.bincount(minlength=places).double()
        assert len(counts) == places
        # Each place is as likely: within five standard deviations.
        assert ((counts / len(first) - 1 / places).abs() < 5 * (0.25 / len(first)) ** 0.5).all()
    assert (inside[:, :, 0].flatten(2).sum(2) == 9).all()
    whole = next(Infidelity(noise="square", side=6, samples=1).perturbations(x / 2))
    assert (whole != 0).flatten(1).sum(1).tolist() == [2 * 5 * 6] * 40


def test_the_default_target_is_the_prediction(
    kind: type[Faithfulness], tiny_model: nn.Module, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    assert torch.equal(kind()(tiny_model, grey, maps), kind()(tiny_model, grey, maps, target))
    assert not torch.equal(kind()(tiny_model, grey, maps), kind()(tiny_model, grey, maps, (target + 1) % 4))


def test_the_global_random_state_and_the_model_are_left_alone(
    kind: type[Faithfulness], tiny_model: nn.Module, grey: Tensor, maps: Tensor
) -> None:
    model = copy.deepcopy(tiny_model)
    weights, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    found = kind()(model, grey.requires_grad_(False), maps.clone().requires_grad_())
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.requires_grad
    assert not model.training
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_work(
    kind: type[Faithfulness], dtype: torch.dtype, tiny_model: nn.Module, grey: Tensor, maps: Tensor
) -> None:
    found = kind()(copy.deepcopy(tiny_model).to(dtype), grey.to(dtype), maps.to(dtype))
    assert found.dtype == dtype
    assert found.isfinite().all()


def test_flat_maps_and_single_pixels_are_judged_too(kind: type[Faithfulness], tiny_model: nn.Module) -> None:
    x = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    assert kind()(tiny_model, x, torch.zeros(2, 16, 16)).isfinite().all()
    single = Linear(torch.ones(1, 1, 1)).eval()
    found = kind()(single, torch.rand(2, 1, 1, 1), torch.ones(2, 1, 1))
    assert found.isnan().all() if kind is NormalisedAOPC else found.isfinite().all()  # one region has one order


def test_bad_arguments_are_refused(
    kind: type[Faithfulness], tiny_model: nn.Module, grey: Tensor, maps: Tensor, target: Tensor
) -> None:
    cases: list[tuple[str, Callable[[], Tensor]]] = [
        (r"lie in \[0, 1\]", lambda: kind()(tiny_model, grey + 1, maps)),
        ("NaN or infinity", lambda: kind()(tiny_model, grey, maps / 0)),
        (r"maps must have shape \[5, 16, 16\]", lambda: kind()(tiny_model, grey, maps[:, :8])),
        ("target holds class 4", lambda: kind()(tiny_model, grey, maps, target * 0 + 4)),
        (r"target must have shape \[5\]", lambda: kind()(tiny_model, grey, maps, target[:2])),
        ("eval mode", lambda: kind()(copy.deepcopy(tiny_model).train(), grey, maps)),
        (r"batch_size must be at least 1, got 0", lambda: kind(batch_size=0)(tiny_model, grey, maps)),
        (r"of must be one of 'probability', 'logit'", lambda: kind(of="loss")(tiny_model, grey, maps)),  # type: ignore[arg-type]
    ]
    for words, call in cases:
        with pytest.raises(InputError, match=words):
            call()
