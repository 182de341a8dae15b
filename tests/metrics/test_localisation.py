"""Maps against objects: pointing game, mass inside, localisation error, boxes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.metrics import Localisation, LocalisationError, MassInside, PointingGame, regions_from_boxes
from robustexplain.metrics.localisation import box_iou, box_of
from robustexplain.registry import METRICS

KINDS: list[Localisation] = [entry.build() for entry in METRICS if issubclass(entry.build, Localisation)]  # type: ignore[arg-type]


@pytest.fixture
def maps() -> Tensor:
    return torch.randn(6, 12, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def region() -> Tensor:
    boxes = [[0, 0, 8, 6], [4, 2, 15, 12], [3, 3, 4, 4], [0, 6, 16, 12], [8, 0, 16, 12], [0, 0, 16, 12]]
    return regions_from_boxes(torch.tensor(boxes), (12, 16))


def peak(row: int, column: int) -> Tensor:
    maps = torch.zeros(1, 12, 16)
    maps[0, row, column] = 1
    return maps


def test_regions_of_boxes() -> None:
    found = regions_from_boxes(torch.tensor([[1, 2, 4, 3]]), (5, 6))
    assert found[0].nonzero().tolist() == [[2, 1], [2, 2], [2, 3]]
    two = regions_from_boxes(torch.tensor([[[0, 0, 1, 1], [4, 3, 9, 9]], [[0, 0, 2, 1], [0, 0, 0, 0]]]), (5, 6))
    assert two.flatten(1).sum(1).tolist() == [1 + 2 * 2, 2]
    # A pixel belongs to the box that covers its centre.
    assert regions_from_boxes(torch.tensor([[0.6, 0.0, 2.4, 1.0]]), (1, 4)).tolist() == [[[False, True, False, False]]]
    with pytest.raises(InputError, match=r"\[B, 4\] or \[B, n, 4\], got \[4\]"):
        regions_from_boxes(torch.zeros(4), (5, 5))
    with pytest.raises(InputError, match="NaN"):
        regions_from_boxes(torch.full((1, 4), math.nan), (5, 5))


def test_the_box_of_a_region_and_back() -> None:
    boxes = torch.tensor([[1, 2, 4, 3], [0, 0, 6, 5], [5, 4, 6, 5]])
    assert torch.equal(box_of(regions_from_boxes(boxes, (5, 6))), boxes)


def test_box_iou_against_torchvision() -> None:
    ops = pytest.importorskip("torchvision.ops")
    rng = torch.Generator().manual_seed(0)
    corners = torch.randint(20, (2, 30, 2), generator=rng)
    boxes = torch.cat([corners, corners + 1 + torch.randint(9, (2, 30, 2), generator=rng)], 2)
    torch.testing.assert_close(box_iou(*boxes), ops.box_iou(*boxes).diag(), check_dtype=False)


def test_the_pointing_game_against_quantus(maps: Tensor, region: Tensor) -> None:
    quantus = pytest.importorskip("quantus")
    oracle = quantus.PointingGame(disable_warnings=True)
    wanted = oracle.evaluate_batch(a_batch=maps.numpy(), s_batch=region.numpy())
    found = PointingGame()(maps, region)
    assert found.tolist() == [float(hit) for hit in wanted]
    assert 0 < found.mean() < 1


def test_the_pointing_game_forgives_a_miss_by_its_tolerance() -> None:
    region = regions_from_boxes(torch.tensor([[4, 4, 8, 8]]), (12, 16))
    for row, column, distance in ((4, 4, 0.0), (4, 10, 3.0), (2, 2, math.sqrt(8)), (10, 11, 5.0)):
        for tolerance in (0, 1, 2.8, 2.9, 3, 4.9, 5, 15):
            hit = PointingGame(tolerance)(peak(row, column), region).item()
            assert hit == float(distance <= tolerance), (row, column, tolerance)


def test_tied_peaks_hit_by_their_share() -> None:
    region = regions_from_boxes(torch.tensor([[0, 0, 4, 12]]), (12, 16))
    assert PointingGame()(torch.zeros(1, 12, 16), region).item() == 0.25
    assert PointingGame()(peak(0, 0) + peak(0, 15), region).item() == 0.5


def test_the_mass_inside_against_quantus(maps: Tensor, region: Tensor) -> None:
    quantus = pytest.importorskip("quantus")
    oracle = quantus.RelevanceMassAccuracy(disable_warnings=True)
    for kind, given in (("positive", maps.relu()), ("magnitude", maps.abs())):
        wanted = oracle.evaluate_batch(a_batch=given.numpy(), s_batch=region.numpy())
        assert MassInside(kind)(maps, region).tolist() == pytest.approx(list(wanted))  # type: ignore[arg-type]
    assert MassInside()(-maps.abs(), region)[3].item() == pytest.approx(0.5)


def slow_error(m: np.ndarray, region: np.ndarray, level: float, overlap: float) -> float:
    corners = []
    for mask in (m >= level, region):
        at = np.argwhere(mask)
        corners.append((*at.min(0), *(at.max(0) + 1)))
    filled = np.zeros((2, *m.shape), bool)
    for image, (top, left, bottom, right) in zip(filled, corners, strict=True):
        image[top:bottom, left:right] = True
    return float((filled[0] & filled[1]).sum() / (filled[0] | filled[1]).sum() < overlap)


@pytest.mark.parametrize("of", ["range", "mean"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 0.9, 1.0])
def test_the_localisation_error_against_filled_boxes(maps: Tensor, region: Tensor, of: str, threshold: float) -> None:
    maps = (maps / 2 + 2 * region).abs()
    wanted = []
    for m, r in zip(maps.numpy(), region.numpy(), strict=True):
        scaled = (m - m.min()) / (m.max() - m.min())
        wanted.append(slow_error(scaled, r, threshold * (1 if of == "range" else scaled.mean()), 0.5))
    found = LocalisationError(threshold, of)(maps, region)  # type: ignore[arg-type]
    assert found.tolist() == wanted


def test_a_map_that_fills_its_box_is_right_and_overlap_is_a_setting() -> None:
    region = regions_from_boxes(torch.tensor([[2, 2, 10, 8]]), (12, 16))
    assert LocalisationError()(region.float(), region).item() == 0.0
    half = regions_from_boxes(torch.tensor([[2, 2, 6, 8]]), (12, 16))  # IoU exactly 0.5
    assert LocalisationError()(half.float(), region).item() == 0.0
    assert LocalisationError(overlap=0.51)(half.float(), region).item() == 1.0
    # No value reaches three times the mean of a flat map, which then is one box as large as the image.
    assert LocalisationError(3.0, "mean")(torch.ones(1, 12, 16), region).item() == 1.0


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: type(metric).__name__)
def test_every_measure_keeps_the_contract(metric: Localisation, maps: Tensor, region: Tensor) -> None:
    found = metric(maps, region)
    assert ((found >= 0) & (found <= 1)).all()
    torch.testing.assert_close(found, torch.cat([metric(maps[i : i + 1], region[i : i + 1]) for i in range(6)]))
    torch.testing.assert_close(metric(1e-8 * maps, region), found)
    assert metric(maps.bfloat16(), region).dtype == torch.bfloat16
    assert metric.better in ("higher", "lower")
    for flat in (0.0, 0.7):
        assert metric(torch.full_like(maps, flat), region).isfinite().all()
    assert metric(torch.ones(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)).isfinite().all()
    if metric.differentiable:
        assert torch.autograd.gradcheck(lambda m: metric(m, region), maps.clone().requires_grad_()) is True


@pytest.mark.parametrize("metric", KINDS, ids=lambda metric: type(metric).__name__)
def test_regions_that_are_none_are_refused(metric: Localisation, maps: Tensor, region: Tensor) -> None:
    with pytest.raises(InputError, match=r"region must be bool \[6, 12, 16\], got torch\.float32"):
        metric(maps, region.float())
    with pytest.raises(InputError, match="region must be bool"):
        metric(maps, region[:2])
    empty = region.clone()
    empty[3] = False
    with pytest.raises(InputError, match="region is empty for sample 3"):
        metric(maps, empty)
    with pytest.raises(InputError, match="NaN or infinity"):
        metric(maps / 0, region)
