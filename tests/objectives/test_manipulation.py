"""What an adversary who owns the model wants of its maps: each loss against the paper's formula as a plain loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from robustexplain.errors import FieldError, InputError
from robustexplain.metrics import FooledCenter, FooledTopK
from robustexplain.objectives import (
    Distill,
    FadeTopK,
    Goal,
    HideFeature,
    MatchStructure,
    MoveCenter,
    Objective,
    Observation,
    SpreadUniformly,
)


def maps(seed: int, height: int = 6, width: int = 8) -> Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(objective: Objective, now: Tensor, honest: Tensor | None = None, goal: Tensor | None = None) -> Tensor:
    logits = torch.zeros(len(now), 4, dtype=now.dtype)
    x, label = torch.zeros(len(now), 1, 2, 2), torch.zeros(len(now), dtype=torch.int64)
    return objective.loss(Observation(x, logits, now), Goal(x, label, benign_map=honest, goal_map=goal))


def rescaled(values: list[float]) -> list[float]:
    return [(v - min(values)) / (max(values) - min(values)) for v in values]


def test_fading_the_top_k_is_the_mean_square_of_the_rescaled_map_where_the_honest_one_was_highest() -> None:
    now, honest = maps(0), maps(1)
    for k, count in ((5, 5), (0.25, 12)):
        for i, value in enumerate(loss(FadeTopK(k), now, honest).tolist()):
            flat, truth = rescaled(now[i].flatten().tolist()), honest[i].flatten().tolist()
            chosen = sorted(range(len(truth)), key=truth.__getitem__)[-count:]
            assert value == pytest.approx(sum(flat[j] ** 2 for j in chosen) / count, rel=1e-12)
        assert torch.allclose(loss(FadeTopK(k), now, honest), FooledTopK(k=k)(now, honest))
    with pytest.raises(FieldError, match="whole count"):
        FadeTopK(2.5)


def test_moving_the_centre_adds_up_shares_of_the_sides_and_not_their_squares() -> None:
    now, honest = maps(2), maps(3)

    def centre(plane: Tensor) -> tuple[float, float]:
        height, width = plane.shape
        flat = rescaled(plane.flatten().tolist())
        cells = [(i, j, flat[i * width + j] / sum(flat)) for i in range(height) for j in range(width)]
        return sum(i * v for i, _, v in cells), sum(j * v for _, j, v in cells)

    for i, value in enumerate(loss(MoveCenter(), now, honest).tolist()):
        (a, b), (c, d) = centre(now[i]), centre(honest[i])
        assert value == pytest.approx(-(abs(a - c) / 5 + abs(b - d) / 7), rel=1e-10)
        assert float(FooledCenter()(now, honest)[i]) == pytest.approx(
            math.hypot((a - c) / 5, (b - d) / 7) / math.sqrt(2), rel=1e-10
        )


def test_spreading_is_the_negative_entropy_of_the_magnitudes_shares() -> None:
    now = maps(4)
    for i, value in enumerate(loss(SpreadUniformly(), now).tolist()):
        sizes = [abs(v) for v in now[i].flatten().tolist()]
        shares = [v / sum(sizes) for v in sizes]
        assert value == pytest.approx(sum(p * math.log(p) for p in shares), rel=1e-12)
    flat = torch.ones(1, 4, 4, dtype=torch.float64)
    assert float(loss(SpreadUniformly(), flat)) == pytest.approx(-math.log(16))


def test_structural_dissimilarity_is_half_of_one_minus_the_similarity() -> None:
    structural = pytest.importorskip("skimage.metrics").structural_similarity
    now, goal = maps(5, 24, 24), maps(6, 24, 24)
    for i, value in enumerate(loss(MatchStructure(), now, goal=goal).tolist()):
        a, b = (torch.tensor(rescaled(m[i].flatten().tolist())).double().reshape(24, 24).numpy() for m in (now, goal))
        _, full = structural(
            a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1.0, full=True
        )
        # Where the window fits: the definition of ours.
        assert value == pytest.approx((1 - full[5:-5, 5:-5].mean()) / 2, abs=1e-6)
    assert float(loss(MatchStructure(), goal, goal=3 * goal + 1).abs().max()) < 1e-12


def test_hiding_takes_the_mean_magnitude_of_the_marked_place_or_its_share_of_the_whole() -> None:
    now = maps(7)
    place = torch.zeros_like(now)
    place[:, 1:3, 2:5] = 1
    for i in range(3):
        inside = now[i, 1:3, 2:5].abs()
        assert float(loss(HideFeature(), now, goal=place)[i]) == pytest.approx(float(inside.mean()))
        share = float(inside.sum() / now[i].abs().sum())
        assert float(loss(HideFeature(relative=True), now, goal=place)[i]) == pytest.approx(share)
    table, column = now[:, :, 0], torch.zeros(3, 6, dtype=torch.float64)
    column[:, 4] = 1
    assert torch.allclose(loss(HideFeature(), table, goal=column), table[:, 4].abs())


def test_distillation_is_the_cross_entropy_towards_the_wanted_probabilities() -> None:
    logits, wanted = maps(8)[:, 0], maps(9)[:, 0].softmax(1)
    x, label = torch.zeros(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    found = Distill().loss(Observation(x, logits), Goal(x, label, wanted=wanted))
    for i, value in enumerate(found.tolist()):
        p, q = wanted[i].tolist(), logits[i].softmax(0).tolist()
        assert value == pytest.approx(-sum(a * math.log(b) for a, b in zip(p, q, strict=True)), rel=1e-12)


@pytest.mark.parametrize("objective", [FadeTopK(), MoveCenter(), SpreadUniformly(), MatchStructure(), HideFeature()])
def test_the_losses_agree_with_finite_differences(objective: Objective) -> None:
    now, other = maps(10).requires_grad_(), maps(11)
    goal = (other > 0).double()
    assert torch.autograd.gradcheck(lambda m: loss(objective, m, other, goal), (now,), eps=1e-6, atol=1e-5)


def test_what_is_missing_is_said() -> None:
    now = maps(12)
    with pytest.raises(InputError, match="FadeTopK needs the benign map"):
        loss(FadeTopK(), now)
    for objective in (MatchStructure(), HideFeature()):
        with pytest.raises(InputError, match="needs a goal map"):
            loss(objective, now)
    with pytest.raises(InputError, match="needs the wanted probabilities"):
        loss(Distill(), now)
