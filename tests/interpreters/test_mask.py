"""MASK: its objective against a slow loop, its optimiser against torch's, its pieces against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.attacks import ADV2
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.defenses import Aggregate
from robustexplain.errors import FieldError, NotDifferentiableError
from robustexplain.interpreters import CAM, Fill, Mask, MaskState
from robustexplain.interpreters.masks.mask import adam
from robustexplain.models import admit
from robustexplain.random_streams import Streams
from robustexplain.system import System


@pytest.fixture
def model(tiny_model: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_model).double()


@pytest.fixture
def x(grey: Tensor) -> Tensor:
    return grey[:3].double()


def random_mask(seed: int = 0) -> Tensor:
    return torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Square(nn.Module):
    """Class 0 grows with the brightness of the 8 x 8 pixels in the middle, and sees nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        seen = x[:, 0, 4:12, 4:12].mean((1, 2))
        return torch.stack([12 * seen, torch.full_like(seen, 6.0)], 1)


# The objective, eq. 16


@pytest.mark.parametrize("of", ["probability", "logit", "log_probability"])
@pytest.mark.parametrize("power", [1.0, 3.0])
def test_the_loss_of_equation_16_against_a_slow_loop(of: str, power: float, model: nn.Module, x: Tensor) -> None:
    mask, c = random_mask(), torch.tensor([0, 3, 1])
    interpreter = Mask(model, l1=0.3, tv=0.7, power=power, of=of)  # type: ignore[arg-type]
    background = interpreter.background(x)
    found = interpreter.loss(x, background, mask, c).detach()
    say = {"probability": lambda z: z.softmax(1), "logit": lambda z: z, "log_probability": lambda z: z.log_softmax(1)}
    for b, m in enumerate(mask.tolist()):
        l1 = sum(abs(1 - v) for row in m for v in row) / 64
        down = sum(abs((m[i + 1][j] - m[i][j]) * 8 / 28) ** power for i in range(7) for j in range(8))
        right = sum(abs((m[i][j + 1] - m[i][j]) * 8 / 28) ** power for i in range(8) for j in range(7))
        full = F.interpolate(mask[b][None, None], (16, 16), mode="bilinear", align_corners=False)
        shown = full * x[b] + (1 - full) * background[b]
        with torch.no_grad():
            said = say[of](model(shown))[0, c[b]]
        assert float(found[b]) == pytest.approx(0.3 * l1 + 0.7 * (down + right) / 64 + float(said), rel=1e-10)


def test_the_defaults_weigh_as_the_authors_sums_over_28_by_28(model: nn.Module, x: Tensor) -> None:
    mask = torch.rand(3, 28, 28, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    c = torch.tensor([0, 3, 1])
    interpreter = Mask(model)
    penalty = interpreter.loss(x, x, mask, c) - model(x).softmax(1)[torch.arange(3), c]
    down, right = (mask.diff(dim=d).abs() ** 3 for d in (1, 2))
    tv = down.sum((1, 2)) + right.sum((1, 2))
    torch.testing.assert_close(penalty, 1e-4 * (1 - mask).abs().sum((1, 2)) + 1e-2 * tv)


def test_a_shift_moves_the_image_under_the_mask(model: nn.Module, x: Tensor) -> None:
    interpreter, mask, c = Mask(model), random_mask(), torch.tensor([0, 1, 2])
    shift = torch.tensor([[0, 0], [2, -3], [-1, 4]])
    moved = x.clone()
    for b, (down, right) in enumerate(shift.tolist()):
        for i in range(16):
            for j in range(16):
                moved[b, :, i, j] = x[b, :, min(max(i - down, 0), 15), min(max(j - right, 0), 15)]
    blank = torch.zeros_like(x)
    found = interpreter.loss(x, blank, mask, c, shift)
    torch.testing.assert_close(found, interpreter.loss(moved, blank, mask, c))


def test_jitter_is_in_whole_pixels_and_the_samples_own(model: nn.Module) -> None:
    x = torch.rand(200, 1, 24, 40, generator=torch.Generator().manual_seed(1))
    streams = Streams.of(x, 0)
    assert Mask(model, jitter=0.04).shifts(x, streams) is None
    found = Mask(model, jitter=2 / 24).shifts(x, streams)
    assert found is not None
    assert found.dtype == torch.int64
    assert found.unique().tolist() == [-2, -1, 0, 1, 2]
    again = Mask(model, jitter=2 / 24).shifts(x[7:9], Streams.of(x[7:9], 0))
    assert again is not None
    assert torch.equal(again, found[7:9])


# The optimiser


def test_adam_is_torchs() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.rand(2, 5, 5, generator=rng, dtype=torch.float64)
    gradients = [torch.randn(2, 5, 5, generator=rng, dtype=torch.float64) * 10.0**-k for k in range(6)]
    gradients[2] = gradients[2] * 0
    parameter = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([parameter], lr=0.1)
    state = MaskState(start, torch.zeros_like(start), torch.zeros_like(start))
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimiser.step()
        state = adam(state, gradient, 0.1)
    torch.testing.assert_close(state.mask, parameter.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 25])
def test_the_masks_are_those_of_a_plain_loop_over_each_image(steps: int, model: nn.Module, x: Tensor) -> None:
    interpreter = Mask(model, steps=steps, of="logit", l1=0.01, tv=0.1, tolerance=0.0, fill=Fill(value=0.2))
    c = model(x).argmax(1)
    found = interpreter.explain(x, native=True).maps
    for b in range(3):
        m = torch.full((8, 8), 0.5, dtype=torch.float64).requires_grad_()
        optimiser = torch.optim.Adam([m], lr=0.1)
        for _ in range(steps):
            full = F.interpolate(m[None, None], (16, 16), mode="bilinear", align_corners=False)
            z = model(x[b] * full + 0.2 * (1 - full))[0, c[b]]
            tv = (m[1:] - m[:-1]).abs().pow(3).sum() + (m[:, 1:] - m[:, :-1]).abs().pow(3).sum()
            (m.grad,) = torch.autograd.grad(z + 0.01 * (1 - m).abs().mean() + 0.1 * tv / 64 * (8 / 28) ** 3, m)
            optimiser.step()
            with torch.no_grad():
                m.clamp_(0, 1)
        torch.testing.assert_close(found[b], 1 - m.detach(), rtol=1e-6, atol=1e-8)


def test_the_loss_goes_down(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    images = judged[0][:8]
    interpreter = Mask(trained, steps=60)
    c = trained(images).argmax(1)
    state, background = interpreter.optimise(images, c), interpreter.background(images)
    first = interpreter.loss(images, background, interpreter.begin(images).mask, c)
    last = interpreter.loss(images, background, state.mask, c)
    untouched = interpreter.loss(images, background, torch.ones_like(state.mask), c)
    assert (last < first).all()
    assert (last < untouched).all()


# Early stopping and the batch


def test_each_sample_stops_on_its_own_and_costs_nothing_more(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    images = judged[0][:6]
    interpreter = Mask(trained, steps=120, tolerance=1e-2)

    def run(given: Tensor) -> tuple[Tensor, list[int]]:
        sizes: list[int] = []
        with trained.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
            maps = interpreter(given)
        return maps, sizes[1:]

    together, sizes = run(images)
    alone = [run(image[None]) for image in images]
    torch.testing.assert_close(together, torch.cat([maps for maps, _ in alone]), rtol=0, atol=2e-3)
    lengths = [len(steps) for _, steps in alone]
    assert len(set(lengths)) > 1
    assert max(lengths) < 120
    assert sizes == [sum(n > step for n in lengths) for step in range(max(lengths))]


def test_without_a_tolerance_every_step_runs(model: nn.Module, x: Tensor) -> None:
    calls: list[int] = []
    admit(model, x)
    with model.register_forward_hook(lambda *_: calls.append(1)):
        Mask(model, steps=40, tolerance=0.0)(x)
    assert len(calls) == 41
    calls.clear()
    with model.register_forward_hook(lambda *_: calls.append(1)):
        Mask(model, steps=40, tolerance=10.0)(x)
    assert len(calls) == 11


def test_the_moments_are_kept_for_those_who_go_on(model: nn.Module, x: Tensor) -> None:
    interpreter, c = Mask(model, steps=12, of="logit", l1=0.01, tolerance=0.0), model(x).argmax(1)
    state, background = interpreter.begin(x), interpreter.background(x)
    for _ in range(12):
        state = interpreter.step(x, background, state, c)
    found = interpreter.optimise(x, c)
    assert found.step == state.step == 12
    for a, b in zip(found[:3], state[:3], strict=True):
        assert torch.equal(a, b)


def test_the_logits_still_lead_to_the_weights(model: nn.Module, x: Tensor) -> None:
    gradients = torch.autograd.grad(Mask(model, steps=2).explain(x).logits.sum(), list(model.parameters()))
    for a, b in zip(gradients, torch.autograd.grad(model(x).sum(), list(model.parameters())), strict=True):
        torch.testing.assert_close(a, b)


def test_jittered_masks_do_not_depend_on_the_batch(model: nn.Module, x: Tensor) -> None:
    interpreter = Mask(model, steps=30, of="logit", l1=0.01, jitter=0.2)
    assert interpreter.shifts(x, Streams.of(x, 0)) is not None
    together = interpreter(x)
    torch.testing.assert_close(together, torch.cat([interpreter(row[None]) for row in x]), rtol=1e-6, atol=1e-8)
    assert not torch.allclose(together, Mask(model, steps=30, of="logit", l1=0.01, jitter=0.2, seed=1)(x))


# What it shows


def test_the_map_is_high_where_the_class_is_and_low_elsewhere() -> None:
    x = torch.full((1, 1, 16, 16), 1.0)
    maps = Mask(Square().eval(), fill=Fill(value=0.0))(x)
    assert 0 <= float(maps.min()) <= float(maps.max()) <= 1
    assert float(maps[0, 5:11, 5:11].mean()) > 0.6
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[2:14, 2:14] = False
    assert float(maps[0][outside].mean()) < 0.15
    assert float(maps[0, 7, 7]) > 0.95


def test_heavier_sparsity_gives_smaller_masks(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    images = judged[0][:6]
    areas = [float(Mask(trained, steps=40, l1=l1)(images).mean()) for l1 in (0.01, 0.1, 1.0)]
    assert areas[0] > areas[1] > areas[2]


def test_a_rougher_mask_is_what_no_total_variation_gives(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    images = judged[0][:6]
    rough, smooth = (Mask(trained, steps=60, tv=tv).explain(images, native=True).maps for tv in (0.0, 50.0))
    assert float(rough.diff(dim=1).abs().mean()) > 2 * float(smooth.diff(dim=1).abs().mean())


def test_deleting_what_the_mask_shows_lowers_the_class_faster_than_deleting_at_random(
    trained: nn.Module, judged: tuple[Tensor, Tensor]
) -> None:
    images = judged[0][:20]
    maps = Mask(trained, steps=60, fill=Fill(value=0.0))(images)
    chance = torch.rand(maps.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = trained(images).softmax(1)
        c = before.argmax(1, keepdim=True)
        falls = []
        for order in (maps, chance):
            top = order.flatten(1).argsort(1, descending=True)[:, : order[0].numel() // 5]
            left = images.flatten(1).scatter(1, top, 0.0).reshape(images.shape)
            falls.append(float((before - trained(left).softmax(1)).gather(1, c).mean()))
    assert falls[0] > falls[1] + 0.1


def test_the_grid_is_never_finer_than_half_the_image(model: nn.Module, x: Tensor) -> None:
    assert Mask(model, steps=1).explain(x[..., :10], native=True).maps.shape == (3, 8, 5)
    assert Mask(model, size=4, steps=1).explain(x, native=True).maps.shape == (3, 4, 4)


# What attacks on MASK need: Algorithm 1 of Zhang et al. 2020


@pytest.fixture
def smooth(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """``x`` to the mask after two plain and three unrolled steps: smooth in ``x``, no kinks of the network's."""
    interpreter = Mask(model, of="logit", l1=0.01, tv=0.1, lr=0.02)
    c = torch.tensor([0, 3, 1])

    def unrolled(x: Tensor) -> Tensor:
        with swapped(Softplus(4.0)):
            background, state = interpreter.background(x), interpreter.begin(x)
            for _ in range(3):
                state = interpreter.step(x, background, state, c, graph=True)
        return state.mask

    return unrolled


def test_unrolled_steps_have_the_derivative_of_finite_differences(
    smooth: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    rng = torch.Generator().manual_seed(7)
    x = (0.1 + 0.8 * x).requires_grad_()
    direction = torch.randn(x.shape, generator=rng, dtype=x.dtype)
    weight = torch.randn(3, 8, 8, generator=rng, dtype=x.dtype)
    (gradient,) = torch.autograd.grad((smooth(x) * weight).sum(), x)
    slope = float((gradient * direction).sum())

    def difference(step: float) -> float:
        with torch.no_grad():
            return float(((smooth(x + step * direction) - smooth(x - step * direction)) * weight).sum()) / (2 * step)

    assert abs(slope) > 1e-3
    assert slope == pytest.approx((4 * difference(5e-7) - difference(1e-6)) / 3, rel=1e-6)


def test_a_step_has_the_derivative_of_finite_differences_in_the_weights(model: nn.Module, x: Tensor) -> None:
    interpreter, c = Mask(model, of="logit", l1=0.01, tv=0.1), torch.tensor([0, 3, 1])
    background, start = torch.full_like(x, 0.2), MaskState(random_mask(), 0.01 * random_mask(1), random_mask(2), 5)
    weight = next(model.parameters())
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3), dtype=weight.dtype)
    kept = weight.data

    def after(shift: float) -> Tensor:
        weight.data = kept + shift * direction
        with swapped(Softplus(4.0)):
            return interpreter.step(x, background, start, c, graph=True).mask.square().sum()

    (gradient,) = torch.autograd.grad(after(0.0), weight)
    slope = float((gradient * direction).sum())
    assert abs(slope) > 1e-6
    assert slope == pytest.approx(float((after(1e-4) - after(-1e-4)).detach()) / 2e-4, rel=1e-4)


def test_a_zero_gradient_has_a_finite_derivative() -> None:
    zero = torch.zeros(1, 2, 2, requires_grad=True)
    state = MaskState(torch.ones(1, 2, 2), torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    (gradient,) = torch.autograd.grad(adam(state, zero * 1.0, 0.1).mask.sum(), zero)
    assert torch.isfinite(gradient).all()


def test_a_step_without_a_graph_is_the_same_and_detached(model: nn.Module, x: Tensor) -> None:
    interpreter, c = Mask(model), torch.tensor([0, 3, 1])
    background, start = interpreter.background(x), interpreter.begin(x)
    plain = interpreter.step(x, background, start, c)
    attached = interpreter.step(x.clone().requires_grad_(), background, start, c, graph=True)
    assert not any(part.requires_grad for part in plain[:3])
    assert attached.mask.requires_grad
    torch.testing.assert_close(plain.mask, attached.mask.detach())
    assert plain.step == 1


def test_one_look_ahead_moves_the_mask_towards_a_target(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    """Lines 3 and 4 of Algorithm 1: the mask by its own loss, ``x`` by the distance of the mask one step ahead."""
    images = judged[0][:4]
    interpreter = Mask(trained, steps=40)
    c = trained(images).argmax(1)
    goal = interpreter.optimise(images.flip(0), c.flip(0)).mask
    state, x = interpreter.begin(images), images.clone()
    for _ in range(30):
        state = interpreter.step(x, interpreter.background(x), state, c)
    begin, distances = state, []
    for _ in range(8):
        x.requires_grad_()
        ahead = interpreter.step(x, interpreter.background(x), begin, c, graph=True).mask
        distance = (ahead - goal).square().sum((1, 2))
        (gradient,) = torch.autograd.grad(distance.sum(), x)
        distances.append(float(distance.detach().sum()))
        x = (x.detach() - 0.02 * gradient.sign()).clamp(0, 1)
    assert distances[-1] < distances[0]


def test_an_attack_that_needs_gradients_of_maps_refuses_it(tiny_model: nn.Module, grey: Tensor) -> None:
    # MASK itself is attacked step by step; a mean that it is a part of is not.
    system = System(tiny_model, Aggregate(tiny_model, (Mask(tiny_model), CAM(tiny_model))))
    with pytest.raises(NotDifferentiableError):
        ADV2(steps=1)(system, grey, tiny_model(grey).argmax(1), goal_map=torch.zeros(5, 16, 16))


# Precision, storage, errors


def test_half_precision_optimises_in_float32(tiny_model: nn.Module, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model).bfloat16()
    interpreter = Mask(model, steps=30, of="logit", l1=0.01, tv=0.1)
    x = grey.bfloat16()
    assert interpreter.optimise(x, model(x).argmax(1)).mask.dtype == torch.float32
    maps = interpreter(x).float()
    wanted = Mask(tiny_model, steps=30, of="logit", l1=0.01, tv=0.1)(x.float(), model(x).argmax(1))
    assert float((maps - wanted).abs().mean()) < 0.15


def test_a_saved_one_says_the_same_when_loaded(tiny_model: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    interpreter = Mask(tiny_model, 6, 5, 0.2, of="logit", fill=Fill("noise", noise=0.4), seed=3)
    system = System(tiny_model, interpreter)
    loaded = System.load(system.save(tmp_path))
    assert torch.equal(loaded.interpreter(grey), system.interpreter(grey))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "Mask.steps must be at least 1, got 0"),
        ({"lr": 0.0}, "Mask.lr must be above 0"),
        ({"power": 0.5}, "Mask.power must be at least 1, got 0.5"),
        ({"start": 1.5}, "Mask.start must be at most 1, got 1.5"),
        ({"of": "odds"}, "Mask.of must be one of"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, object], message: str, model: nn.Module) -> None:
    with pytest.raises(FieldError, match=message):
        Mask(model, **fields)  # type: ignore[arg-type]


def test_a_swap_of_rectifiers_leaves_the_masks_own_bounds_alone(smooth_net: nn.Module, grey: Tensor) -> None:
    mask, classes = Mask(smooth_net, size=4, jitter=0.25), torch.zeros(5, dtype=torch.int64)
    state, shift = mask.begin(grey), torch.tensor([[1, -1]] * 5)
    state = state._replace(mask=torch.rand(state.mask.shape, generator=torch.Generator().manual_seed(0)))
    plain = mask.step(grey, mask.background(grey), state, classes, shift)
    with swapped(Softplus(1.0)):
        within = mask.step(grey, mask.background(grey), state, classes, shift)
    assert torch.equal(within.mask, plain.mask)
