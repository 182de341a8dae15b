"""Patches: what they may change, how they are put down, and the papers' claims on a small network trained on digits."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import robustexplain as rx
from robustexplain.attacks import (
    Adaptation,
    AdversarialPatch,
    Attacked,
    Fitted,
    HidingPatch,
    ImagePatch,
    Patch,
    UniversalHidingPatch,
    random_classes,
)
from robustexplain.data import Data, stack, take
from robustexplain.errors import InputError, NotDifferentiableError
from robustexplain.interpreters import CAM, GradCAM, Gradient
from robustexplain.models import Classifier
from robustexplain.objectives import Capped, Goal, LeaveRegion, Misclassify, Observation, UntilMet
from robustexplain.random_streams import Streams

QUARTER = 0.25
"""8 of 32 pixels: exactly 2 x 2 of the 8 x 8 cells of the small network's maps."""
THIRD = 0.375
"""12 of 32 pixels: 3 x 3 cells."""


def pictures(batch: int, height: int = 24, width: int = 40) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def bound(patch: Patch, x: Tensor, seed: int = 0) -> Patch:
    return patch.bind(x, Streams.of(x, seed, "test"))


# --- the threat model ---

PATCHES = [
    Patch(0.3, "square", "top-left"),
    Patch(0.3, "square", "center"),
    Patch(0.3, "square", "random"),
    Patch(0.5, "circle", "random"),
    Patch(0.4, "square", "random", rotation=40.0),
    Patch(0.6, "circle", "center", rotation=180.0, shrink=0.5),
    Patch(1.0, "square", "random", shrink=0.3),
]


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.summary)
def test_only_the_patch_changes_whatever_the_variable_is(patch: Patch) -> None:
    x = pictures(9)
    placed = bound(patch, x)
    wild = 5 * torch.randn(9, 3, patch.pixels(x), patch.pixels(x), dtype=torch.float64) + 0.5
    patched = placed.apply(x, placed.project(x, wild))
    assert placed.region is not None
    inside = placed.region > 0
    assert torch.equal(patched.permute(0, 2, 3, 1)[~inside], x.permute(0, 2, 3, 1)[~inside])
    assert 0 <= float(patched.min()) <= float(patched.max()) <= 1
    # Every pixel inside is the patch's: none of them shows the image.
    shown = placed.apply(x, torch.zeros_like(wild)).permute(0, 2, 3, 1)[inside]
    assert not shown.any()


@pytest.mark.parametrize("place", ["top-left", "center", "random"])
@pytest.mark.parametrize("size", [0.05, 0.3, 64 / 224, 1.0])
def test_a_square_covers_its_side_squared_and_shows_its_texture_pixel_by_pixel(size: float, place: str) -> None:
    for x in (pictures(7), pictures(7).float()):
        placed = bound(Patch(size, "square", place), x)  # type: ignore[arg-type]
        side = round(size * 24)
        texture = torch.rand(7, 3, side, side, dtype=x.dtype)
        patched = placed.apply(x, texture)
        assert placed.region is not None
        for i in range(7):
            rows, columns = placed.region[i].any(1).nonzero()[:, 0], placed.region[i].any(0).nonzero()[:, 0]
            top, left = int(rows[0]), int(columns[0])
            assert (len(rows), len(columns), int(placed.region[i].sum())) == (side, side, side * side)
            assert torch.equal(patched[i, :, top : top + side, left : left + side], texture[i])
            if place != "random":
                assert (top, left) == ((0, 0) if place == "top-left" else ((24 - side) // 2, (40 - side) // 2))


def test_a_circle_is_the_pixels_whose_centres_are_in_it() -> None:
    x = pictures(1)
    placed = bound(Patch(0.5, "circle", "center"), x)
    expected = [[float(math.hypot(r + 0.5 - 12, c + 0.5 - 20) <= 6) for c in range(40)] for r in range(24)]
    assert placed.region is not None
    assert placed.region[0].tolist() == expected


def test_a_quarter_turn_turns_the_texture_and_half_the_scale_averages_it() -> None:
    x, texture = pictures(1), torch.rand(1, 3, 8, 8, dtype=torch.float64)
    turned = Patch(8 / 24, "square", "top-left", rotation=90.0)
    for draw, k in ((0.0, 1), (1.0, -1)):
        placed = replace(turned, spot=turned._spot(x, torch.tensor([[0, 0, draw, 0]], dtype=torch.float64)))
        wanted = torch.rot90(texture, k, (2, 3))
        torch.testing.assert_close(placed.apply(x, texture)[..., :8, :8], wanted, rtol=0, atol=1e-12)
    small = Patch(8 / 24, "square", "top-left", shrink=0.5)
    placed = replace(small, spot=small._spot(x, torch.zeros(1, 4, dtype=torch.float64)))
    assert placed.region is not None
    assert int(placed.region.sum()) == 16
    torch.testing.assert_close(placed.apply(x, texture)[..., :4, :4], F.avg_pool2d(texture, 2), rtol=0, atol=1e-12)


def test_random_places_are_uniform_and_the_whole_patch_lies_in_the_image() -> None:
    x = pictures(1500, 12, 16)
    placed = bound(Patch(0.75, "square", "random"), x)
    assert placed.region is not None
    assert bool((placed.region.sum((1, 2)) == 81).all())
    top, left = placed.region.amax(2).argmax(1), placed.region.amax(1).argmax(1)
    counts = torch.zeros(4, 8).index_put((top, left), torch.ones(1500), accumulate=True)
    # 1500 draws among 32 places: a count is 47 with a standard deviation of 7.
    assert 15 < float(counts.min()) <= float(counts.max()) < 85


def test_redrawing_moves_the_patch_and_the_same_seed_moves_it_to_the_same_place() -> None:
    x = pictures(12)
    placed = bound(Patch(0.3, "circle", "random", rotation=20.0, shrink=0.5), x)
    again, other = placed.redrawn(x, 1), placed.redrawn(x, 2)
    assert placed.random
    for one, two in ((placed, again), (again, other)):
        assert not torch.equal(one.region, two.region)  # type: ignore[arg-type]
    assert torch.equal(placed.redrawn(x, 1).region, again.region)  # type: ignore[arg-type]
    assert torch.equal(placed.redrawn(x[4:6], 1).region, again.region[4:6])  # type: ignore[arg-type, index]
    assert torch.equal(placed.select(torch.tensor([3, 1])).region, placed.region[[3, 1]])  # type: ignore[arg-type, index]
    fixed = bound(Patch(), x)
    assert not fixed.random
    assert fixed.redrawn(x, 1) is fixed


@pytest.mark.parametrize("patch", [PATCHES[2], PATCHES[4], PATCHES[5]], ids=lambda p: p.summary)
def test_the_patch_passes_exact_gradients_on(patch: Patch) -> None:
    x = pictures(2, 8, 9)
    placed = bound(patch, x)
    texture = torch.rand(2, 3, placed.pixels(x), placed.pixels(x), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: placed.apply(x, v), (texture,))


def test_a_patch_says_what_it_lacks() -> None:
    x = pictures(2)
    with pytest.raises(InputError, match="bind it"):
        Patch().apply(x, Patch().start(x))
    with pytest.raises(InputError, match="1 channels, and the images have 3"):
        bound(Patch(), x).apply(x, torch.zeros(2, 1, 7, 7, dtype=torch.float64))
    for wrong in ({"size": 0.0}, {"size": 1.1}, {"shape": "star"}, {"place": "left"}, {"rotation": 200.0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            ImagePatch(**wrong)  # type: ignore[arg-type]


# --- objectives ---


def test_leave_region_is_the_share_of_positive_heat_in_the_covered_cells() -> None:
    maps = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    region = torch.zeros(3, 8, 10, dtype=torch.float64)
    region[0, :4, :4] = 1
    region[1, 3:6, 1:5] = 1
    region[2] = 1
    expected = []
    for m, r in zip(maps.tolist(), region.tolist(), strict=True):
        inside, total = 0.0, 1e-10
        for i in range(4):
            for j in range(5):
                cover = sum(r[2 * i + a][2 * j + b] for a in (0, 1) for b in (0, 1)) / 4
                inside, total = inside + cover * max(m[i][j], 0), total + max(m[i][j], 0)
        expected.append(inside / total)
    logits, x = torch.zeros(3, 2), torch.zeros(3, 1, 8, 10)
    seen, goal = Observation(x, logits, maps, region=region), Goal(x, torch.zeros(3, dtype=torch.int64))
    found = LeaveRegion().loss(seen, goal)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)
    assert float(found[2]) == pytest.approx(1)
    assert not LeaveRegion().loss(replace(seen, maps=-maps.abs()), goal).any()
    with pytest.raises(InputError, match="region"):
        LeaveRegion().loss(replace(seen, region=None), goal)


def test_until_met_is_silent_where_the_prediction_is_as_wanted() -> None:
    logits = torch.tensor([[2.0, 1.0], [1.0, 2.0]], requires_grad=True)
    seen, goal = (
        Observation(torch.zeros(2, 1, 1, 1), logits),
        Goal(torch.zeros(2), torch.tensor([1, 1]), torch.tensor([0, 0])),
    )
    loss = UntilMet().loss(seen, goal)
    plain = Misclassify().loss(seen, goal)
    assert loss.tolist() == [0.0, plain[1].item()]
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert not gradient[0].any()
    assert bool(gradient[1].any())
    assert UntilMet().met(seen, goal).tolist() == [True, False]
    assert UntilMet().unmet(seen, goal).tolist() == [0.0, 2.0]


def test_a_capped_loss_lets_go_of_what_is_beyond_it() -> None:
    logits = torch.tensor([[0.0, 3.0], [0.0, 20.0], [5.0, 0.0]], requires_grad=True)
    seen, goal = Observation(torch.zeros(3, 1, 1, 1), logits), Goal(torch.zeros(3), torch.zeros(3, dtype=torch.int64))
    loss = Capped(cap=9.0).loss(seen, goal)
    cross_entropy = [math.log(1 + math.exp(v)) for v in (3.0, 20.0, -5.0)]
    torch.testing.assert_close(loss, torch.tensor([-min(v, 9.0) for v in cross_entropy]))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert [bool(row.any()) for row in gradient] == [True, False, True]


# --- the attacks, on digits ---


@dataclass
class Bench:
    """System, inputs and goals, and the results that several tests use."""

    system: rx.System
    x: Tensor
    y: Tensor
    goal: Tensor
    own_x: Tensor
    own_y: Tensor

    def double(self, rows: int = 4) -> tuple[rx.System, Tensor, Tensor, Tensor]:
        """In float64, where a sign step does not hang on rounding."""
        model = copy.deepcopy(self.system.model).double()
        system = rx.System(model, type(self.system.interpreter)(model))
        return system, self.x[:rows].double(), self.y[:rows], self.goal[:rows]

    def share(self, x: Tensor, target: Tensor | None = None, size: float = THIRD) -> Tensor:
        """Share of the heat in the patch at the top left, counted in cells."""
        maps = self.system.interpreter.explain(x, target, native=True).maps.detach().clamp(min=0)
        cells = round(size * maps.shape[-1])
        return maps[:, :cells, :cells].sum((1, 2)) / (maps.sum((1, 2)) + 1e-10)


@pytest.fixture(scope="module")
def bench(trained: Classifier, judged: tuple[Tensor, Tensor], digits: Data) -> Bench:
    x, y = judged[0][:16], judged[1][:16]
    own_x, own_y = stack(take(digits.defense, 96))
    return Bench(rx.System(trained, GradCAM(trained)), x, y, random_classes(x, y, 10), own_x, own_y)


def rate(found: Attacked) -> float:
    return float(found.success.float().mean())


SHORT = {"size": THIRD, "steps": 50, "step_size": 0.04}


@pytest.fixture(scope="module")
def ordinary(bench: Bench) -> Attacked:
    return ImagePatch(**SHORT)(bench.system, bench.x, bench.y, bench.goal)


@pytest.fixture(scope="module")
def hiding(bench: Bench) -> Attacked:
    return HidingPatch(**SHORT)(bench.system, bench.x, bench.y, bench.goal)


@pytest.mark.parametrize("targeted", [True, False])
def test_an_image_patch_is_the_best_iterate_of_a_plain_loop(bench: Bench, targeted: bool) -> None:
    system, x, y, goal = bench.double()
    texture = torch.full((4, 1, 8, 8), 0.5, dtype=torch.float64)
    seen, losses, hits = [], [], []
    for _ in range(9):
        leaf = texture.clone().requires_grad_()
        patched = x.clone()
        patched[:, :, :8, :8] = leaf
        logits = system.model(patched)
        sign = 1 if targeted else -1
        loss = sign * F.cross_entropy(logits, goal if targeted else y, reduction="none")
        seen.append(patched.detach())
        losses.append(loss.detach())
        hits.append(logits.argmax(1) == goal if targeted else logits.argmax(1) != y)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        texture = (texture - 0.07 * gradient.sign()).clamp(0, 1)
    found = ImagePatch(QUARTER, steps=8, step_size=0.07)(system, x, y, goal if targeted else None)
    for i in range(4):
        best = min(range(9), key=lambda k: (not hits[k][i], float(losses[k][i])))
        torch.testing.assert_close(found.x[i], seen[best][i], rtol=0, atol=1e-12)


def test_a_patch_decides_the_prediction_where_a_random_one_does_not(bench: Bench, ordinary: Attacked) -> None:
    noise = bound(Patch(THIRD), bench.x)
    drawn = noise.apply(bench.x, noise.start(bench.x, Streams.of(bench.x, 0)))
    hit = bench.system.model(drawn).argmax(1) == bench.goal
    assert rate(ordinary) >= 0.7
    assert float(hit.float().mean()) < 0.25


def test_a_hiding_patch_is_the_best_iterate_of_the_published_loop(bench: Bench) -> None:
    system, x, y, goal = bench.double()
    texture, lam = torch.full((4, 1, 16, 16), 0.5, dtype=torch.float64), 0.05
    net, seen, shares, hits = system.model.net, [], [], []
    for _ in range(13):
        leaf = texture.clone().requires_grad_()
        patched = x.clone()
        patched[:, :, :16, :16] = leaf
        features = net.features((patched - system.model.mean) / system.model.std)
        logits = net.head(features.mean((2, 3)))
        score = logits.gather(1, goal[:, None]).sum()
        (slopes,) = torch.autograd.grad(score, features, create_graph=True)
        maps = (slopes.sum((2, 3), keepdim=True) * features).sum(1).relu()
        maps = maps / (maps.sum((1, 2), keepdim=True) + 1e-10)
        inside = maps[:, :4, :4].abs().sum((1, 2)) / 16
        hit = logits.argmax(1) == goal
        cross_entropy = F.cross_entropy(logits, goal, reduction="none")
        seen.append(patched.detach())
        shares.append(inside.detach())
        hits.append(hit)
        loss = inside + lam * torch.where(hit, 0, cross_entropy)
        (gradient,) = torch.autograd.grad(loss.sum(), leaf)
        texture = (texture - 0.08 * gradient.sign()).clamp(0, 1)
    # The code divides the share by the 16 cells of the patch: its weight is 16 times as large beside the share.
    found = HidingPatch(0.5, steps=12, step_size=0.08, weight=16 * lam)(system, x, y, goal)
    assert 0 < int(torch.stack(hits).sum()) < 4 * 13
    for i in range(4):
        best = min(range(13), key=lambda k: (not hits[k][i], float(shares[k][i])))
        torch.testing.assert_close(found.x[i], seen[best][i], rtol=0, atol=1e-9)


def test_a_hiding_patch_decides_as_often_as_an_ordinary_one_and_takes_the_heat_away_from_itself(
    bench: Bench, ordinary: Attacked, hiding: Attacked
) -> None:
    assert rate(hiding) >= rate(ordinary) - 0.1
    shown, hidden = bench.share(ordinary.x, bench.goal), bench.share(hiding.x, bench.goal)
    assert float(shown.mean()) > 0.15
    assert float(hidden.mean()) < 0.35 * float(shown.mean())
    both = ordinary.success & hiding.success
    assert float((hidden < shown)[both].float().mean()) >= 0.9


def test_an_untargeted_hiding_patch_hides_from_the_map_of_what_is_predicted(bench: Bench) -> None:
    shown = ImagePatch(**SHORT)(bench.system, bench.x, bench.y)
    hidden = HidingPatch(**SHORT)(bench.system, bench.x, bench.y)
    assert rate(hidden) >= rate(shown) - 0.1
    assert float(bench.share(hidden.x).mean()) < 0.5 * float(bench.share(shown.x).mean())


# A rectified map can be zero under a patch from the first step, where there is nothing to hide.
@pytest.mark.filterwarnings("ignore::robustexplain.errors.ZeroMapGradientWarning")
def test_a_hiding_patch_hides_at_a_random_place_too(bench: Bench) -> None:
    kind = {"size": THIRD, "steps": 30, "step_size": 0.06, "place": "random"}
    placed = Patch(THIRD, "square", "random")
    shares = []
    for attack in (ImagePatch(**kind), HidingPatch(**kind)):
        found = attack(bench.system, bench.x, bench.y, bench.goal)
        region = placed.bind(bench.x, Streams.of(bench.x, 0, type(attack).__name__)).region
        assert region is not None
        outside = (found.x != bench.x).any(1) & (region == 0)
        assert not bool(outside.any())
        maps = bench.system.interpreter.explain(found.x, bench.goal, native=True).maps.detach().clamp(min=0)
        cover = F.avg_pool2d(region[:, None], 4)[:, 0]
        shares.append(float(((maps * cover).sum((1, 2)) / (maps.sum((1, 2)) + 1e-10)).mean()))
    assert shares[1] < 0.5 * shares[0]


def test_a_patch_hides_from_maps_that_are_gradients_through_a_surrogate(bench: Bench) -> None:
    system = rx.System(bench.system.model, Gradient(bench.system.model))
    x, y, goal = bench.x[:6], bench.y[:6], bench.goal[:6]
    near, far = (
        attack(system, x, y, goal).x
        for attack in (HidingPatch(**SHORT), ImagePatch(**SHORT))  # type: ignore[arg-type]
    )
    maps = [system.interpreter(found, goal).detach() for found in (near, far)]
    shares = [float((m[:, :12, :12].sum((1, 2)) / m.sum((1, 2))).mean()) for m in maps]
    assert shares[0] < 0.8 * shares[1]


def test_a_universal_patch_works_on_images_that_it_was_not_made_from_wherever_it_lies(bench: Bench) -> None:
    kind = AdversarialPatch(size=0.5, shrink=0.8, steps=60, step_size=0.05, goal_class=1)
    moving = kind.fitted(bench.system, bench.own_x, bench.own_y)
    still = replace(kind, place="center", rotation=0.0, shrink=1.0).fitted(bench.system, bench.own_x, bench.own_y)
    moved = Fitted(kind, replace(still.applied, threat=moving.applied.threat))
    grey = Fitted(kind, replace(moving.applied, variable=torch.full_like(moving.applied.variable, 0.5)))
    logits = [bench.system.model(attack(bench.system, bench.x, bench.y).x) for attack in (moving, moved, grey)]
    losses = [float(F.cross_entropy(v, torch.ones_like(bench.y)).detach()) for v in logits]
    # Made for the middle of the image, a patch is worth less elsewhere (expectation over transformation).
    assert losses[0] < min(losses[1:]) - 1
    assert moving.applied.variable.shape == (1, 1, 16, 16)


def test_every_step_of_a_fit_puts_the_patch_elsewhere(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    places: list[Tensor] = []
    bind = Patch.bind

    def recorded(self: Patch, x: Tensor, streams: Streams) -> Patch:
        found = bind(self, x, streams)
        assert found.region is not None
        places.append(found.region)
        return found

    monkeypatch.setattr(Patch, "bind", recorded)
    attack = AdversarialPatch(0.25, "square", "random", 0.0, 1.0, steps=8, batch_size=2)
    attack.fitted(bench.system, bench.own_x[:2], bench.own_y[:2])
    assert len(places) == 10
    assert len({tuple(one.flatten().tolist()) for step in places for one in step}) > 15


def test_a_universal_patch_has_one_goal_class_and_success_is_judged_by_the_callers(bench: Bench) -> None:
    attack = AdversarialPatch(
        0.5, "square", "center", 0.0, 1.0, steps=40, step_size=0.05, goal_class=3
    ).fitted(bench.system, bench.own_x, bench.own_y)  # fmt: skip
    rows = bench.y != 3
    x, y = bench.x[rows], bench.y[rows]
    found = attack(bench.system, x, y, torch.full_like(y, 3))
    assert rate(found) > 0.9
    other = (y + 1) % 10
    asked = attack(bench.system, x, y, other)
    assert torch.equal(asked.x, found.x)
    assert torch.equal(asked.success, bench.system.model(found.x).argmax(1) == other)
    assert rate(attack(bench.system, x, y)) >= rate(found)


def test_a_universal_hiding_patch_is_one_texture_that_hides(bench: Bench) -> None:
    shared = {"size": 0.375, "steps": 60, "step_size": 0.04, "batch_size": 24}
    plain = AdversarialPatch(shape="square", place="top-left", rotation=0.0, shrink=1.0, **shared)  # type: ignore[arg-type]
    found = [
        attack.fitted(bench.system, bench.own_x, bench.own_y)(bench.system, bench.x, bench.y)
        for attack in (plain, UniversalHidingPatch(**shared))  # type: ignore[arg-type]
    ]
    shown, hidden = found
    assert all(torch.equal(f.x[:, :, :12, :12], f.x[:1, :, :12, :12].expand(16, 1, 12, 12)) for f in found)
    assert rate(hidden) > 0.5
    assert float(bench.share(hidden.x, size=THIRD).mean()) < 0.6 * float(bench.share(shown.x, size=THIRD).mean())


def test_a_patch_for_random_places_gains_from_averaging_over_them(bench: Bench) -> None:
    x, y, goal = bench.x[:8], bench.y[:8], bench.goal[:8]
    kind = ImagePatch(0.5, place="random", steps=25, step_size=0.05)
    elsewhere = []
    for draws in (1, 6):
        attack = replace(kind, adapt=Adaptation(draws=draws))
        found = attack(bench.system, x, y, goal)
        placed = attack.plan(bench.system).threat.bind(x, Streams.of(x, 0, "ImagePatch"))
        sides = [placed.region[i].nonzero()[0].tolist() for i in range(8)]  # type: ignore[attr-defined]
        texture = torch.stack([v[:, r : r + 16, c : c + 16] for v, (r, c) in zip(found.x, sides, strict=True)])
        logits = [bench.system.model(placed.redrawn(x, s).apply(x, texture)) for s in range(40, 52)]
        elsewhere.append(float(torch.stack([F.cross_entropy(v, goal) for v in logits]).detach().mean()))
        assert int(found.queries[0]) >= 25 * draws
    assert elsewhere[1] < elsewhere[0] - 0.2


@dataclass(frozen=True, eq=False)
class Opaque(CAM):
    """An interpreter that says it has no gradient."""

    differentiable = False


def test_a_universal_hiding_patch_is_not_fitted_on_maps_without_a_gradient(bench: Bench) -> None:
    model = bench.system.model
    with pytest.raises(NotDifferentiableError, match="Opaque"):
        UniversalHidingPatch(steps=1).fitted(rx.System(model, Opaque(model)), bench.own_x, bench.own_y)
