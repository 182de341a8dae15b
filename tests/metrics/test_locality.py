"""LENS against sets of pixels, and the traps of the authors' code."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from robustexplain.errors import InputError
from robustexplain.metrics import LENS, TopK


def some_maps(batch: int = 3, seed: int = 0, side: int = 12) -> Tensor:
    return torch.randn(batch, side, side, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def peak(*at: tuple[int, int], side: int = 6) -> Tensor:
    """A map with its largest values at these pixels, the first the largest."""
    m = torch.zeros(1, side, side)
    for rank, (row, column) in enumerate(at):
        m[0, row, column] = 10 - rank
    return m


def near(pixels: set[tuple[int, int]], reach: int, side: int) -> set[tuple[int, int]]:
    return {
        (r + i, c + j)
        for (r, c), i, j in itertools.product(pixels, *[range(-reach, reach + 1)] * 2)
        if 0 <= r + i < side and 0 <= c + j < side
    }


@pytest.mark.parametrize("window", [3, 5])
def test_recall_and_precision_against_sets_of_pixels(window: int) -> None:
    maps, reference = some_maps(), some_maps(seed=1)
    for row in range(3):
        tops = [
            {divmod(int(i), 12) for i in m[row].abs().flatten().argsort(descending=True)[:15]}
            for m in (maps, reference)
        ]
        recall = len(near(tops[1], window // 2, 12) & tops[0]) / 15
        precision = len(near(tops[0], window // 2, 12) & tops[1]) / 15
        assert LENS(15, window)(maps, reference)[row].item() == pytest.approx(recall)
        assert LENS(15, window, "precision")(maps, reference)[row].item() == pytest.approx(precision)


def test_a_window_of_one_is_top_k_with_ties_too() -> None:
    maps, reference = some_maps(), some_maps(seed=1)
    for a, b in ((maps, reference), (maps.round(), reference.round())):
        torch.testing.assert_close(LENS(20, 1)(a, b), TopK(20)(a, b))


def test_a_shift_by_a_pixel_is_forgiven_and_one_by_two_is_not() -> None:
    maps = some_maps(side=32)
    for shift, window, kept in ((1, 3, True), (2, 3, False), (2, 5, True)):
        moved = maps.roll(shift, 2)
        assert (LENS(0.1, window)(moved, maps).mean() > 0.9) == kept
    assert TopK(0.1)(maps.roll(1, 2), maps).mean() < 0.3


def test_windows_end_at_the_border_and_the_first_pixel_takes_part() -> None:
    # Pixel (2, 0) follows (1, 5) in memory, and lies at the other end of the image.
    assert LENS(1)(peak((2, 0)), peak((1, 5))).item() == 0
    assert LENS(1)(peak((0, 0)), peak((0, 0))).item() == 1
    assert LENS(1)(peak((0, 1)), peak((0, 0))).item() == 1


def test_diverse_picks_keep_their_distance_and_the_second_one() -> None:
    # The two largest are neighbours: the second pick is the third largest, far away.
    wide = peak((1, 1), (1, 2), (4, 4))
    other = peak((1, 1), (4, 4))
    assert LENS(2, 3, diverse=False)(wide, other).item() == pytest.approx(1.0)
    assert LENS(2, 1)(wide, other).item() == pytest.approx(0.5)
    assert LENS(2, 3, diverse=True)(wide, other).item() == 1.0
    assert LENS(2, 3, diverse=True)(peak((1, 1), (4, 1)), other).item() == 0.5
    # Nine windows of three cover the image: there are no more picks than that.
    assert LENS(36, 3, diverse=True)(some_maps(1, side=6), some_maps(1, side=6)).item() == 1.0


def test_noise_looks_weaker_than_under_top_k() -> None:
    maps = some_maps(16, side=32)
    noisy = maps + 0.5 * some_maps(16, seed=5, side=32)
    assert LENS(0.1)(noisy, maps).mean() > TopK(0.1)(noisy, maps).mean() + 0.05


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"LENS\.window must be odd, got 4"):
        LENS(window=4)
    with pytest.raises(InputError, match=r"LENS\.k must be"):
        LENS(2.5)
    with pytest.raises(InputError, match="positions of pixels"):
        LENS()(torch.rand(2, 5), torch.rand(2, 5))
