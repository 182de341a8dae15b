"""Ranks, and figures of them, counted exactly: Spearman's and Kendall's correlation, the top pixels that maps share.

All of it is sorting and counting without gradients, in numpy: on a CPU it sorts and compares several times as fast as
torch. Maps of other devices are brought here; figures go back to theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import maps as ops

Rows = NDArray[Any]

_AT_ONCE = 1 << 16
"""Values processed together: the intermediate results, some ten words a value, then fit the caches for any batch."""
_WORD = np.uint64(32)
_UPPER = 1 if sys.byteorder == "little" else 0
"""Which half of a 64-bit word is the upper one."""


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Pearson's correlation ``[B]`` of the rows' ranks, ties by their average; NaN where a row of ``[B, N]`` is
    constant.
    """
    return _by_rows(_spearman, a, b)


def kendall_tau(a: Tensor, b: Tensor) -> Tensor:
    """Tau-b of the rows of two ``[B, N]``, ``[B]`` (Knight 1966); NaN where a row is constant."""
    return _by_rows(_kendall, a, b)


def top_k_shared(a: Tensor, b: Tensor, k: int) -> Tensor:
    """How many of their ``k`` largest values the rows of two ``[B, N]`` have in common, ``[B]``.

    Values tied at the last place share the places left (:func:`robustexplain.maps.top_k`), and are in common to the
    lesser degree.
    """
    shared = _by_rows(partial(_shared, k=k), a, b)
    tied = shared < 0
    if tied.any():
        shared[tied] = torch.minimum(*(ops.top_k(rows.detach()[tied], k) for rows in (a, b))).sum(1)
    return shared


def ranks(rows: Tensor) -> Tensor:
    """Ranks 1 to ``N`` of each row of ``[B, N]``, ties by their average; float64 for float64, float32 for the rest."""
    words = _placed(_codes(_array(rows)))
    found = np.empty(rows.shape)
    np.put_along_axis(found, _places(words), _mean_places(_equal(words)) + 1, 1)
    return torch.from_numpy(found).to(rows.device, torch.float64 if rows.dtype == torch.float64 else torch.float32)


def stable_order(rows: Tensor, *, descending: bool = False) -> Tensor:
    """The indices ``[B, N]`` that sort each row, equal values in their original order."""
    codes = _codes(_array(rows))
    return torch.from_numpy(_places(_placed(~codes if descending else codes))).to(rows.device)


def _array(rows: Tensor) -> Rows:
    # numpy has no bfloat16.
    found: Rows = (rows if rows.dtype == torch.float64 else rows.float()).numpy(force=True)
    return found


def _by_rows(count: Callable[[Rows, Rows], Rows], a: Tensor, b: Tensor) -> Tensor:
    first, second = _array(a), _array(b)
    step = max(1, _AT_ONCE // first.shape[1])
    found = [count(first[at : at + step], second[at : at + step]) for at in range(0, len(first), step)]
    return torch.from_numpy(np.concatenate(found)).to(a)


def _shared(a: Rows, b: Rows, k: int) -> Rows:
    # How many top pixels two rows share; -1 where more than k are at least as large as the k-th.
    chosen = []
    for rows in (a, b):
        codes = _codes(rows) if rows.dtype == np.float32 else rows
        chosen.append(codes >= np.partition(codes, -k, axis=1)[:, -k, None])
    first, second, both = (
        np.add.reduce(which.view(np.uint8), axis=1, dtype=np.int32) for which in (*chosen, chosen[0] & chosen[1])
    )
    return np.where((first > k) | (second > k), -1, both)


def _spearman(a: Rows, b: Rows) -> Rows:
    first, second = _ordered(a, b)
    n = a.shape[1]
    middle = (n - 1) / 2
    places = second.astype(np.uint32)
    # Without ties the ranks are 1 to N, whose sums have closed forms.
    size = np.full(len(a), n * (n * n - 1) / 12)
    product = places.astype(np.float64) @ (np.arange(n) - middle)
    equal = _equal(first), _equal(second)
    tied = equal[0].any(1) | equal[1].any(1)
    if tied.any():
        x, y = (_mean_places(which[tied]) - middle for which in equal)
        size[tied] = np.sqrt(np.square(x).sum(1)) * np.sqrt(np.square(y).sum(1))
        product[tied] = (np.take_along_axis(x, _places(second[tied]), 1) * y).sum(1)
    return _ratio(product, size)


def _kendall(a: Rows, b: Rows) -> Rows:
    first, second = _ordered(a, b)
    n = a.shape[1]
    pairs = n * (n - 1) / 2
    tied_a, tied_b = _tied_pairs(_equal(first)), _tied_pairs(_equal(second))
    # Only where pairs are tied in a can they be tied in both.
    tied_both = _tied_pairs(first[:, 1:] == first[:, :-1]) if tied_a.any() else 0
    discordant = inversions(second.astype(np.int32))
    excess = pairs - tied_a - tied_b + tied_both - 2 * discordant
    return _ratio(excess, np.sqrt(pairs - tied_a) * np.sqrt(pairs - tied_b))


def _ratio(part: Rows, whole: Rows) -> Rows:
    # A correlation: NaN where nothing varies.
    found: Rows = np.clip(part / np.where(whole > 0, whole, np.nan), -1, 1)
    return found


def _ordered(a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """Both rows' values sorted, as 64-bit words ``[B, N]``.

    The first holds a value of ``a`` above the value of ``b`` that belongs to it, so that ties in ``a`` are ordered by
    ``b``; the second holds a value of ``b`` above its place in the first. One sort of words that need no index is
    cheaper than a sort of indices, and what follows needs to gather nothing.
    """
    first = _codes(a).astype(np.uint64)
    first <<= _WORD
    first |= _codes(b)
    first.sort(axis=1)
    return first, _placed(first)


def _placed(values: Rows) -> Rows:
    # The lower halves of integers sorted, as words that hold a value above its place.
    words = values.astype(np.uint64) << _WORD
    words |= np.arange(values.shape[1], dtype=np.uint64)
    words.sort(axis=1)
    return words


def _places(words: Rows) -> NDArray[np.int64]:
    return words.astype(np.uint32).astype(np.int64)


def _codes(rows: Rows) -> NDArray[np.uint32]:
    """32-bit integers in the order of the rows' values, equal where these are equal."""
    if rows.dtype != np.float32:
        return _dense_ranks(rows)
    # The bits of a positive float increase with it, those of a negative one decrease; adding 0 turns -0 into 0.
    bits = (rows + np.float32(0)).view(np.int32)
    flipped: NDArray[np.int32] = bits ^ ((bits >> 31) | np.int32(-(2**31)))
    return flipped.view(np.uint32)


def _dense_ranks(rows: Rows) -> NDArray[np.uint32]:
    order = np.argsort(rows, axis=1)
    ordered = np.take_along_axis(rows, order, 1)
    ranks = np.zeros(rows.shape, np.uint32)
    np.cumsum(ordered[:, 1:] != ordered[:, :-1], axis=1, out=ranks[:, 1:])
    np.put_along_axis(codes := np.empty_like(ranks), order, ranks, 1)
    return codes


def _equal(words: Rows) -> NDArray[np.bool_]:
    # Where a sorted row's upper half equals that of the word before it, [B, N - 1].
    upper = words.view(np.uint32)[:, _UPPER::2]
    found: NDArray[np.bool_] = upper[:, 1:] == upper[:, :-1]
    return found


def _runs(equal: NDArray[np.bool_]) -> tuple[Rows, Rows]:
    # Where each run of equal values starts, counted over all rows, and how long it is.
    new = np.ones((len(equal), equal.shape[1] + 1), bool)
    np.logical_not(equal, out=new[:, 1:])
    starts = np.flatnonzero(new)
    return starts, np.diff(starts, append=new.size)


def _mean_places(equal: NDArray[np.bool_]) -> Rows:
    # The average place of each sorted value's run, [B, N] from 0 on.
    n = equal.shape[1] + 1
    starts, lengths = _runs(equal)
    return np.repeat(starts % n + (lengths - 1) / 2, lengths).reshape(-1, n)


def _tied_pairs(equal: NDArray[np.bool_]) -> Rows:
    # How many pairs of each row are equal, [B].
    pairs, rows = np.zeros(len(equal)), equal.any(1)
    if not rows.any():
        return pairs
    starts, lengths = _runs(equal[rows])
    pairs[rows] = np.bincount(starts // (equal.shape[1] + 1), lengths * (lengths - 1) / 2, minlength=rows.sum())
    return pairs


def inversions(permutations: NDArray[np.int32]) -> NDArray[np.int64]:
    """``[B]``: pairs ``i < j`` with ``p[i] > p[j]`` in each row of ``[B, N]``, a permutation of ``0 .. N - 1``.

    Places are numbers of digits of five bits at most. Two places differ first in some digit: they lie in the same block
    of all places with equal higher digits, and are inverted if, in the order of the values, the larger digit comes
    first. So a digit is one sort of blocks and one count of :func:`_digit_inversions`, over all rows at once; the
    work is that of sorting, without a loop over rows or pairs.
    """
    batch, n = permutations.shape
    bits = max(1, (n - 1).bit_length())
    places = np.empty((batch, 1 << bits), np.int32 if bits <= 26 else np.int64)
    places[:, :n], places[:, n:] = permutations, np.arange(n, 1 << bits)
    total, low = np.zeros(batch, np.int64), 0
    for left in range(-(-bits // 5), 0, -1):
        width = -(-(bits - low) // left)
        blocks = places.reshape(-1, 1 << (low + width))
        if low == 0:
            # The smallest blocks hold each digit once: their values can be compared as they are.
            found = _pairs_out_of_order(blocks.T)
        else:
            keys = (blocks << width) | (np.arange(blocks.shape[1], dtype=places.dtype) >> low)
            keys.sort(axis=1)
            keys &= (1 << width) - 1
            found = _digit_inversions(keys, 1 << width)
        total += found.reshape(batch, -1).sum(1, dtype=np.int64)
        low += width
    return total


def _digit_inversions(digits: Rows, base: int) -> Rows:
    """``[M]``: pairs ``i < j`` with ``d[i] > d[j]`` in each row of ``[M, L]``; ``base``, a power of two, divides ``L``.

    A row is cut into stretches of ``base`` digits. Pairs within one are compared; those of two are counted from how
    often each digit occurs in each.
    """
    count = digits.shape[1] // base
    stretches = digits.reshape(-1, base)
    within: Rows = _pairs_out_of_order(stretches.T).reshape(-1, count).sum(1, dtype=np.int64)
    places = stretches + (base * np.arange(len(stretches), dtype=digits.dtype))[:, None]
    # Sums of counts are exact in float32 up to 2^24, at half of L^2 at most.
    exact = np.float32 if digits.shape[1] <= 1 << 12 else np.float64
    histogram = torch.bincount(torch.from_numpy(places.ravel()), minlength=places.size).numpy()
    counts: Rows = histogram.astype(exact).reshape(-1, count, base)
    # How often each digit occurs in earlier stretches, then how often a larger digit does.
    before: Rows = np.tri(count, k=-1).astype(exact) @ counts if count <= 64 else counts.cumsum(1) - counts
    larger: Rows = before @ np.tri(base, k=-1).astype(exact)
    between: Rows = np.einsum("mcd,mcd->m", counts, larger).astype(np.int64)
    return within + between


def _pairs_out_of_order(columns: Rows) -> NDArray[np.uint16]:
    """``[M]``: pairs ``i < j`` with ``c[i] > c[j]`` in each column of ``[L, M]``; ``L`` is at most 32."""
    # The narrower the type, the more values an instruction compares.
    kind = next(kind for kind in (np.uint8, np.uint16, np.int64) if columns.max() <= np.iinfo(kind).max)
    columns = np.ascontiguousarray(columns, kind)
    # A distance at a time: all pairs that lie so far apart. A place's count stays below 32.
    counts, smaller = np.zeros(columns.shape, np.uint8), np.empty(columns.shape, bool)
    for apart in range(1, len(columns)):
        found = np.less(columns[apart:], columns[:-apart], out=smaller[apart:])
        np.add(counts[apart:], found.view(np.uint8), out=counts[apart:])
    total: NDArray[np.uint16] = np.add.reduce(counts, axis=0, dtype=np.uint16)
    return total
