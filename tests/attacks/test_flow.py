"""Moving pixels: the flow and its loss against slow loops and other libraries, and what the attacks claim."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustexplain as rx
from robustexplain.attacks import PGD, ADV2StAdv, Flow, StAdv, random_classes
from robustexplain.errors import FieldError, InputError, NotDifferentiableError
from robustexplain.interpreters import CAM, GradCAM, Gradient, Mask
from robustexplain.metrics import L1
from robustexplain.models import Classifier
from robustexplain.objectives import FlowLoss, Goal, Observation
from robustexplain.random_streams import Streams


def image(batch: int = 2, channels: int = 3, height: int = 6, width: int = 9, seed: int = 0) -> Tensor:
    return torch.rand(
        batch, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def flow(x: Tensor, size: float, seed: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.rand(len(x), 2, *x.shape[-2:], generator=rng, dtype=x.dtype) - 1) * size


# The flow: A4 of Zhang et al. 2020


def test_a_moved_pixel_is_the_sum_of_a4() -> None:
    x = image()
    moved = flow(x, 2.5)
    found = Flow().apply(x, moved)
    for b in range(2):
        for i in range(6):
            for j in range(9):
                u = min(max(i + float(moved[b, 0, i, j]), 0), 5)
                v = min(max(j + float(moved[b, 1, i, j]), 0), 8)
                for c in range(3):
                    total = sum(
                        float(x[b, c, k, m]) * max(0.0, 1 - abs(u - k)) * max(0.0, 1 - abs(v - m))
                        for k in range(6)
                        for m in range(9)
                    )
                    assert float(found[b, c, i, j]) == pytest.approx(total, abs=1e-12)


def test_moved_images_are_those_of_scipy_and_of_torch() -> None:
    scipy = pytest.importorskip("scipy.ndimage")
    x = image(height=12, width=10)
    moved = flow(x, 4.0)
    found = Flow().apply(x, moved)
    rows, columns = torch.meshgrid(torch.arange(12.0), torch.arange(10.0), indexing="ij")
    for b in range(2):
        where = torch.stack([rows + moved[b, 0], columns + moved[b, 1]]).numpy()
        for c in range(3):
            wanted = scipy.map_coordinates(x[b, c].numpy(), where, order=1, mode="nearest")
            torch.testing.assert_close(found[b, c], torch.from_numpy(wanted), rtol=0, atol=1e-12)
    grid = torch.stack([(columns + moved[:, 1]) / 9, (rows + moved[:, 0]) / 11], -1) * 2 - 1
    sampled = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=True)
    torch.testing.assert_close(found, sampled, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(6, 9), (1, 5), (5, 1)])
def test_no_flow_gives_the_image_back_bit_by_bit(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = image(4, 2, *shape).to(dtype)
    x[:, :, 0, 0], x[:, :, -1, -1] = 0, 1
    threat = Flow()
    assert torch.equal(threat.apply(x, threat.start(x)), x)


def test_a_flow_of_whole_pixels_shifts_the_image() -> None:
    x = image()
    moved = torch.zeros(2, 2, 6, 9, dtype=torch.float64)
    moved[:, 0], moved[:, 1] = 1, -2
    found = Flow().apply(x, moved)
    assert torch.equal(found[:, :, :-1, 2:], x[:, :, 1:, :-2])
    assert torch.equal(found[:, :, -1, 2:], x[:, :, -1, :-2])


def test_moved_images_stay_in_the_unit_range_and_between_their_pixels() -> None:
    threat = Flow(bound=1.0)
    for seed in range(20):
        x = image(seed=seed).float()
        x = torch.where(x > 0.7, 1.0, torch.where(x < 0.3, 0.0, x))
        found = threat.apply(x, threat.project(x, flow(x, 3.0, seed)))
        assert 0 <= float(found.min()) <= float(found.max()) <= 1
        # A pixel that moves by at most one is between the least and the largest of its nine.
        high = F.max_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        low = -F.max_pool2d(-F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
        assert bool((found <= high + 1e-6).all())
        assert bool((found >= low - 1e-6).all())


def test_projection_clips_each_component_in_pixels() -> None:
    x = image()
    wild = flow(x, 5.0)
    projected = Flow(bound=0.75).project(x, wild)
    assert float(projected.abs().max()) == 0.75
    inside = wild.abs() <= 0.75
    assert torch.equal(projected[inside], wild[inside])
    assert torch.equal(Flow(bound=0.75).project(x, projected), projected)


def test_a_random_start_is_small_and_the_samples_own() -> None:
    x = image(5)
    start = Flow().start(x, Streams.of(x, 0))
    assert start.shape == (5, 2, 6, 9)
    assert 0.09 < float(start.abs().max()) <= 0.1
    assert torch.equal(Flow().start(x[2:3], Streams.of(x[2:3], 0)), start[2:3])
    assert float(Flow(bound=0.03).start(x, Streams.of(x, 0)).abs().max()) <= 0.03


def test_the_derivative_is_that_of_finite_differences() -> None:
    x, moved = image(), flow(image(), 1.5)
    weight = image(seed=5)
    leaf = moved.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((Flow().apply(x, leaf) * weight).sum(), leaf)
    direction = flow(x, 1.0, seed=7)

    def at(step: float) -> float:
        return float((Flow().apply(x, moved + step * direction) * weight).sum())

    assert float((gradient * direction).sum()) == pytest.approx((at(1e-7) - at(-1e-7)) / 2e-7, rel=1e-5)


def test_without_a_flow_yet_there_is_a_direction() -> None:
    x = image()
    leaf = torch.zeros(2, 2, 6, 9, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(Flow().apply(x, leaf)[:, 0, 2, 3].sum(), leaf)
    torch.testing.assert_close(gradient[:, 0, 2, 3], x[:, 0, 3, 3] - x[:, 0, 2, 3])
    torch.testing.assert_close(gradient[:, 1, 2, 3], x[:, 0, 2, 4] - x[:, 0, 2, 3])
    assert int((gradient != 0).sum()) == 4


# The flow loss


def seen_with(moved: Tensor) -> tuple[Observation, Goal]:
    x = moved.new_zeros(len(moved), 1, *moved.shape[-2:])
    return Observation(x, moved.new_zeros(len(moved), 2), variable=moved), Goal(
        x, torch.zeros(len(moved), dtype=torch.int64)
    )


@pytest.mark.parametrize("neighbours", ["axes", "diagonals"])
def test_the_flow_loss_is_that_of_a_plain_loop(neighbours: str) -> None:
    moved = flow(image(), 1.0)
    offsets = [(0, 1), (0, -1), (1, 0), (-1, 0)] if neighbours == "axes" else [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    expected = []
    for r in moved.tolist():
        total = 0.0
        for i in range(6):
            for j in range(9):
                for down, across in offsets:
                    k, m = min(max(i + down, 0), 5), min(max(j + across, 0), 8)
                    total += math.sqrt((r[0][i][j] - r[0][k][m]) ** 2 + (r[1][i][j] - r[1][k][m]) ** 2)
        expected.append(total / 54)
    found = FlowLoss(neighbours).loss(*seen_with(moved))  # type: ignore[arg-type]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=0)


def test_the_flow_loss_is_zero_with_a_finite_derivative_where_all_pixels_move_together() -> None:
    for value in (0.0, 0.7):
        even = torch.full((2, 2, 5, 5), value, requires_grad=True)
        loss = FlowLoss().loss(*seen_with(even))
        assert loss.tolist() == [0.0, 0.0]
        (gradient,) = torch.autograd.grad(loss.sum(), even)
        assert not bool(gradient.any())


def test_the_diagonals_of_the_authors_code_do_not_see_a_chessboard() -> None:
    i, j = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    chess = ((i + j) % 2).double().expand(1, 2, 16, 16)
    inner = FlowLoss("diagonals").loss(*seen_with(chess)), FlowLoss("axes").loss(*seen_with(chess))
    # What is left of the diagonals is at the border, where the flow goes on.
    assert float(inner[0]) < 0.25 * float(inner[1])


def test_tau_of_table_12_weighs_the_same_as_the_sum_of_the_paper() -> None:
    moved = torch.rand(1, 2, 224, 224, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    down, across = moved.diff(dim=2), moved.diff(dim=3)
    total = 2 * (down.square().sum(1).sqrt().sum() + across.square().sum(1).sqrt().sum())
    found = 25.1 * float(FlowLoss().loss(*seen_with(moved)))
    assert found == pytest.approx(0.0005 * float(total), rel=1e-3)


def test_a_flow_loss_without_a_flow_is_an_error() -> None:
    seen, goal = seen_with(flow(image(), 1.0))
    for wrong in (None, seen.x):
        with pytest.raises(InputError, match="needs a flow"):
            FlowLoss().loss(replace(seen, variable=wrong), goal)


# StAdv


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor]) -> tuple[rx.System, Tensor, Tensor, Tensor]:
    x, y = judged[0][:14], judged[1][:14]
    with torch.no_grad():
        right = trained(x).argmax(1) == y
    x, y = x[right], y[right]
    return rx.System(trained, CAM(trained)), x, y, random_classes(x, y, 10)


def test_stadv_is_the_best_iterate_of_a_plain_loop_with_torchs_adam(
    bench: tuple[rx.System, Tensor, Tensor, Tensor],
) -> None:
    system, x, y, goal = bench
    model = copy.deepcopy(system.model).double()
    x, y, goal = x[:4].double(), y[:4], goal[:4]
    tau, steps, bound = 2.0, 25, 1.0
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")

    def shown(moved: Tensor) -> Tensor:
        grid = torch.stack([(columns + moved[:, 1]) / 31, (rows + moved[:, 0]) / 31], -1) * 2 - 1
        return F.grid_sample(x, grid, padding_mode="border", align_corners=True)

    def uneven(moved: Tensor) -> Tensor:
        total = torch.zeros(len(moved), dtype=moved.dtype)
        for dim in (2, 3):
            root = (moved.diff(dim=dim).square().sum(1) + 1e-8).sqrt() - 1e-4
            total = total + 2 * root.flatten(1).sum(1) / 1024
        return total

    moved = torch.zeros(4, 2, 32, 32, dtype=torch.float64)
    # Half-way between two pixels no slope jumps: a start at zero would ask the two samplers for one-sided slopes.
    moved = (moved + 0.05).requires_grad_()
    optimiser = torch.optim.Adam([moved], lr=0.05)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(steps + 1):
        logits = model(shown(moved))
        own = logits.gather(1, goal[:, None])[:, 0]
        rival = logits.scatter(1, goal[:, None], -math.inf).amax(1)
        seen.append((shown(moved).detach(), (rival - own).detach(), uneven(moved).detach()))
        if step < steps:
            loss = (rival - own).clamp(min=0) + tau * uneven(moved)
            optimiser.zero_grad()
            loss.sum().backward(inputs=[moved])
            optimiser.step()
            with torch.no_grad():
                moved.clamp_(-bound, bound)
    attack = StAdv(bound, steps, 0.05, tau)
    plan = attack.plan(system)
    start = torch.full((4, 2, 32, 32), 0.05, dtype=torch.float64)
    plan = replace(plan, threat=StartedFlow(bound, start=start))  # type: ignore[type-var]
    found = plan.run(rx.System(model, CAM(model)), Goal(x, y, goal), Streams.of(x, 0)).x
    hits = torch.stack([margin < 0 for _, margin, _ in seen])
    costs = torch.stack([cost for _, _, cost in seen])
    assert bool(hits.any(0).sum() >= 2), "nothing succeeds: the test shows nothing"
    for b in range(4):
        ranked = costs[:, b].masked_fill(~hits[:, b], math.inf) if bool(hits[:, b].any()) else costs[:, b]
        torch.testing.assert_close(found[b], seen[int(ranked.argmin())][0][b], rtol=0, atol=1e-6)


class StartedFlow(Flow):
    """A flow with a given start."""

    def __init__(self, bound: float, start: Tensor) -> None:
        super().__init__(bound)
        object.__setattr__(self, "given", start)

    def start(self, x: Tensor, streams: Streams | None = None) -> Tensor:
        given: Tensor = self.__dict__["given"]
        return given.clone()


def test_stadv_succeeds_by_moving_pixels(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    system, x, y, goal = bench
    attack = StAdv(steps=50, step_size=0.08, flow=1.0)
    for targeted in (True, False):
        found = attack(system, x, y, goal if targeted else None)
        assert float(found.success.float().mean()) >= 0.9
        # Moved by at most two pixels, each value is one of its neighbourhood's.
        high = F.max_pool2d(F.pad(x, (2, 2, 2, 2), mode="replicate"), 5, 1)
        assert bool((found.x <= high + 1e-6).all())
    assert torch.equal(replace(attack, bound=0.0)(system, x, y, goal).x, x)


class RecordingFlow(Flow):
    """A flow that records its last projection."""

    def project(self, x: Tensor, variable: Tensor) -> Tensor:
        found = super().project(x, variable)
        object.__setattr__(self, "last", found)
        return found


def test_a_heavier_tau_gives_a_smoother_flow(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    system, x, y, goal = bench
    uneven = []
    for tau in (0.02, 2.0):
        watched = RecordingFlow()
        plan = replace(StAdv(steps=40, step_size=0.05, flow=tau).plan(system), threat=watched)  # type: ignore[type-var]
        plan.run(system, Goal(x[:8], y[:8], goal[:8]), Streams.of(x[:8], 0))
        uneven.append(float(FlowLoss().loss(*seen_with(watched.__dict__["last"])).mean()))
    assert 0 < uneven[1] < 0.7 * uneven[0]


@pytest.mark.parametrize("interpreter", [CAM, GradCAM])
def test_adv2_on_stadv_keeps_its_success_and_the_benign_map(
    interpreter: type[CAM] | type[GradCAM], bench: tuple[rx.System, Tensor, Tensor, Tensor]
) -> None:
    system, x, y, goal = bench
    system = rx.System(system.model, interpreter(system.model))
    plain = StAdv(steps=50, step_size=0.08, flow=1.0)(system, x, y, goal)
    both = ADV2StAdv(steps=80, step_size=0.08, flow=1.0, confidence=0.5)(system, x, y, goal)
    assert float(both.success.float().mean()) >= float(plain.success.float().mean()) - 0.05
    benign = system.interpreter(x).detach()
    near, far = (L1()(system.interpreter(found.x, goal).detach(), benign) for found in (both, plain))
    assert float(near.mean()) < 0.6 * float(far.mean())


def test_adv2_on_stadv_follows_gradient_maps_through_a_surrogate(
    bench: tuple[rx.System, Tensor, Tensor, Tensor],
) -> None:
    system, x, y, goal = bench
    attack = ADV2StAdv(steps=4, warm_start=0.0)
    gradient = rx.System(system.model, Gradient(system.model, of="logit"))
    assert attack.plan(gradient).summaries()[2] == "Adam, SmoothGradient, after misclassify + flow-loss"
    assert not bool(attack(gradient, x[:2], y[:2], goal[:2]).zero_direction.any())
    with pytest.raises(NotDifferentiableError, match="Mask has none"):
        attack(rx.System(system.model, Mask(system.model, steps=1)), x[:2], y[:2], goal[:2])


def test_equation_21_weighs_three_losses(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    words = ADV2StAdv().plan(bench[0]).summaries()
    assert words == (
        "Flow",
        "misclassify + match-map + agree-encoder + flow-loss",
        "Adam, after misclassify + flow-loss",
    )
    warm, joint = ADV2StAdv(steps=100, warm_start=0.3, flow=7.0).plan(bench[0]).stages  # type: ignore[attr-defined]
    assert (warm.steps, joint.steps) == (30, 70)
    assert [weight for weight, part in joint.objective.terms() if isinstance(part, FlowLoss)] == [7.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bound": -1.0}, "bound must be at least 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"neighbours": "all"}, "neighbours must be one of 'axes', 'diagonals'"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, object], message: str) -> None:
    for attack in (StAdv, ADV2StAdv):
        with pytest.raises(FieldError, match=message):
            attack(**fields)  # type: ignore[arg-type]


def test_pgd_moves_values_where_stadv_moves_places(bench: tuple[rx.System, Tensor, Tensor, Tensor]) -> None:
    """Xiao et al. 2018, section 1: large changes of values, which a ball in pixel values does not hold."""
    system, x, y, goal = bench
    moved = StAdv(steps=50, step_size=0.08, flow=1.0)(system, x, y, goal).x
    pgd = PGD(0.125, 40, 0.01)(system, x, y, goal).x
    assert float((moved - x).abs().amax()) > 2 * float((pgd - x).abs().amax())
