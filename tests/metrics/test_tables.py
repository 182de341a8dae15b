"""Metrics on maps of table rows, what they say of one column, and the bars that show a row."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustexplain import metrics, plots
from robustexplain.errors import InputError, UnknownNameError, UnsupportedModelError
from robustexplain.features import with_indices
from robustexplain.interpreters import Gradient
from robustexplain.metrics import (
    AOPC,
    Deletion,
    Faithfulness,
    FeatureFirst,
    FeatureRank,
    FeatureShare,
    Infidelity,
    Insertion,
    LeastRelevantFirst,
    LocalLipschitz,
    MapMetric,
    MapScore,
    MaxSensitivity,
    Sufficiency,
    regions_from_boxes,
)
from robustexplain.registry import METRICS

NAMES = ("age", "priors", "race", "sex", "stay", "unrelated")


def some_maps(seed: int = 0, number: int = 4) -> Tensor:
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def m() -> Tensor:
    return some_maps()


class Linear(nn.Module):
    """Two classes whose log odds are linear in the row; it says by which mean it centres its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([[40.0, 3, 0.4, 0.5, 90, 0]]))
        self.register_buffer("slopes", torch.tensor([0.03, 0.2, 1.5, -0.4, 0.005, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        odds = (x - self.mean.to(x)) @ self.slopes.to(x)  # type: ignore[operator]
        return torch.stack([-odds / 2, odds / 2], 1)


@pytest.fixture
def model() -> Linear:
    return Linear().eval()


@pytest.fixture
def x() -> Tensor:
    rng = torch.Generator().manual_seed(5)
    return torch.randn(4, 6, generator=rng) * torch.tensor([12.0, 5, 0.5, 0.5, 60, 1]) + 30


# Maps of rows are measured as maps of one line of pixels are


def kinds(cls: type, takes: str) -> list[str]:
    found = [e for e in METRICS if isinstance(e.build, type) and issubclass(e.build, cls)]
    return [e.name for e in found if takes in e.build.takes]  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in kinds(MapMetric, "tables") if n in kinds(MapMetric, "images")])
def test_a_comparison_of_rows_is_that_of_images_one_pixel_high(name: str, m: Tensor) -> None:
    metric, other = METRICS.get(name).build(), m + some_maps(1)
    found = metric(m, other)
    assert found.shape == (4,)
    torch.testing.assert_close(found, metric(m[:, None], other[:, None]), equal_nan=True)
    torch.testing.assert_close(found[2:3], metric(m[2:3], other[2:3]), equal_nan=True)


@pytest.mark.parametrize("name", [n for n in kinds(MapScore, "tables") if n in kinds(MapScore, "images")])
def test_a_score_of_rows_is_that_of_images_one_pixel_high(name: str, m: Tensor) -> None:
    score = METRICS.get(name).build()
    torch.testing.assert_close(score(m), score(m[:, None]))


def test_rank_correlations_of_rows_are_scipys(m: Tensor) -> None:
    stats = pytest.importorskip("scipy.stats")
    other = m + some_maps(1)
    for metric, theirs in (
        (metrics.Spearman(), stats.spearmanr),
        (metrics.Kendall(), stats.kendalltau),
        (metrics.Pearson(), stats.pearsonr),
    ):
        wanted = [theirs(a, b)[0] for a, b in zip(m.numpy(), other.numpy(), strict=True)]
        assert metric(m, other).tolist() == pytest.approx(wanted)


def test_which_measures_take_rows_and_which_do_not() -> None:
    assert {"ssim", "hog", "center-shift", "emd"}.isdisjoint(kinds(MapMetric, "tables"))
    pixelwise = {"l1", "l2", "mse", "iou", "pearson", "spearman", "kendall", "top-k", "cosine", "sign-correlation"}
    assert pixelwise <= set(kinds(MapMetric, "tables"))
    assert {"entropy", "sparseness", "complexity", "feature-rank"} <= set(kinds(MapScore, "tables"))
    assert kinds(MapScore, "tables")
    assert not kinds(metrics.Localisation, "tables")


@pytest.mark.parametrize("name", [n for n in kinds(MapMetric, "images") if n not in kinds(MapMetric, "tables")])
def test_a_comparison_that_looks_at_neighbours_refuses_rows(name: str, m: Tensor) -> None:
    with pytest.raises(InputError, match=r"uses the positions of pixels.*takes maps \[B, H, W\], got \[4, 6\]"):
        METRICS.get(name).build()(m, m)


def test_other_measures_that_look_at_neighbours_refuse_rows(m: Tensor, x: Tensor, model: nn.Module) -> None:
    refused: list[Callable[[], object]] = [
        lambda: metrics.LocationCorrelation()(m),
        lambda: metrics.FooledLocation()(m, m),
        lambda: metrics.FooledCenter()(m, m),
        lambda: metrics.PointingGame()(m, regions_from_boxes(torch.ones(4, 4), (6, 6))),
    ]
    for measure in refused:
        with pytest.raises(InputError, match="uses the positions of pixels"):
            measure()
    with pytest.raises(InputError, match=r"Perturbation takes images \[B, C, H, W\]"):
        metrics.Perturbation()(x, x)
    with pytest.raises(InputError, match="looks at squares of pixels"):
        Infidelity(noise="square")(model, x, m.float())


# One column


def test_the_rank_of_a_column_is_scipys(m: Tensor) -> None:
    stats = pytest.importorskip("scipy.stats")
    m[1] = torch.tensor([1.0, -1, 0.5, 0.5, 0.5, 3])
    m[2] = torch.tensor([0.0, 0, 2, 0, 0, 0])
    wanted = np.stack([stats.rankdata(-np.abs(row), method="average") for row in m.numpy()])
    for column in range(6):
        assert FeatureRank(column)(m).tolist() == wanted[:, column].tolist()


def test_what_is_said_of_a_column_by_hand() -> None:
    maps = torch.tensor([[3.0, -5, 1, 1], [2, -2, 0, 0], [0, 0, 0, 0], [-1, -1, 1, 1]])
    assert FeatureRank(1)(maps).tolist() == [1, 1.5, 2.5, 2.5]
    assert FeatureRank(2)(maps).tolist() == [3.5, 3.5, 2.5, 2.5]
    assert FeatureFirst(1)(maps).tolist() == [1, 0.5, 0.25, 0.25]
    assert FeatureFirst(0)(maps).tolist() == [0, 0.5, 0.25, 0.25]
    assert FeatureShare(1)(maps).tolist() == [0.5, 0.5, 0.25, 0.25]
    assert FeatureRank(0)(maps.bfloat16()).dtype == torch.bfloat16


def test_first_places_and_shares_of_all_columns_add_up_to_one(m: Tensor) -> None:
    m[0], m[1, :2] = 0, m.abs().max()
    for measure in (FeatureFirst, FeatureShare):
        total = sum(measure(column)(m) for column in range(6))
        torch.testing.assert_close(total, torch.ones(4, dtype=torch.float64))
    assert torch.autograd.gradcheck(FeatureShare(2), some_maps(3).requires_grad_()) is True


@pytest.mark.parametrize("measure", [FeatureRank, FeatureFirst, FeatureShare])
def test_a_column_by_name_is_resolved_before_it_is_measured(measure: type[MapScore], m: Tensor) -> None:
    named = measure("race")  # type: ignore[call-arg]
    with pytest.raises(InputError, match="'race' is a name"):
        named(m)
    torch.testing.assert_close(with_indices(named, NAMES)(m), measure(2)(m))  # type: ignore[call-arg]
    with pytest.raises(UnknownNameError, match="did you mean 'race'"):
        with_indices(measure("races"), NAMES)  # type: ignore[call-arg]
    with pytest.raises(InputError, match="column 6 does not exist: places are 0 to 5"):
        measure(6)(m)  # type: ignore[call-arg]
    with pytest.raises(InputError, match=r"is about a column of a table: it takes maps \[B, D\], got \[4, 1, 6\]"):
        measure(2)(m[:, None])  # type: ignore[call-arg]


# Faithfulness


def by_hand(model: nn.Module, x: Tensor, maps: Tensor, gone: Tensor, ascending: bool = False) -> np.ndarray:
    """The probability of the prediction as columns are replaced one after the other, ``[B, D + 1]``."""
    curves = []
    for row, attribution in zip(x, maps, strict=True):
        c = int(model(row[None]).argmax())
        shown, curve = row.clone(), [float(model(row[None]).softmax(1)[0, c])]
        for j in sorted(range(len(row)), key=lambda j: float(attribution[j]), reverse=not ascending):
            shown[j] = gone[j]
            curve.append(float(model(shown[None]).softmax(1)[0, c]))
        curves.append(curve)
    return np.array(curves)


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_columns_are_replaced_one_by_one(replacement: str, model: Linear, x: Tensor) -> None:
    maps = some_maps(7).float()
    gone = torch.zeros(6) if replacement == "zero" else model.mean[0]  # type: ignore[index]
    how: dict[str, object] = {"replacement": replacement}
    falling = by_hand(model, x, maps, gone)  # type: ignore[arg-type]
    area = pytest.importorskip("scipy.integrate").trapezoid
    assert Deletion(**how)(model, x, maps).tolist() == pytest.approx(area(falling, axis=1) / 6, abs=1e-6)  # type: ignore[arg-type]
    two = area(falling[:, ::2], axis=1) / 3
    assert Deletion(pixels=2, **how)(model, x, maps).tolist() == pytest.approx(two, abs=1e-6)  # type: ignore[arg-type]
    fall = (falling[:, :1] - falling).mean(1)
    assert AOPC(**how)(model, x, maps).tolist() == pytest.approx(fall, abs=1e-6)  # type: ignore[arg-type]
    other = by_hand(model, x, maps, gone, ascending=True)  # type: ignore[arg-type]
    least = (other[:, :1] - other).mean(1)
    assert LeastRelevantFirst(**how)(model, x, maps).tolist() == pytest.approx(least, abs=1e-6)  # type: ignore[arg-type]
    # Showing the most important first is removing the least important first, run backwards.
    rising = area(other[:, ::-1], axis=1) / 6
    assert Insertion(**how)(model, x, maps).tolist() == pytest.approx(rising, abs=1e-6)  # type: ignore[arg-type]
    kept = Sufficiency(keep=0.5, **how)(model, x, maps)  # type: ignore[arg-type]
    assert kept.tolist() == pytest.approx(other[:, 0] - other[:, 3], abs=1e-6)


@pytest.mark.parametrize("name", kinds(Faithfulness, "tables"))
def test_a_row_is_judged_alone(name: str, model: Linear, x: Tensor) -> None:
    cls, maps = METRICS.get(name).build, some_maps(7).float()
    metric = cls(samples=3) if cls is Infidelity else cls(replacement="mean")
    together = metric(model, x, maps)
    torch.testing.assert_close(together, torch.cat([metric(model, x[i][None], maps[i][None]) for i in range(4)]))
    with pytest.raises(InputError, match=r"maps must have shape \[4, 6\], got \[4, 5\]"):
        metric(model, x, maps[:, :5])


def test_the_gradient_of_a_linear_model_has_no_infidelity(model: Linear, x: Tensor) -> None:
    model, x = model.double(), x.double()
    gradient = Gradient(model, of="logit", channels="sum")(x)
    assert Infidelity(of="logit", sigma=3.0)(model, x, gradient).max() < 1e-20
    assert Infidelity(of="logit", sigma=3.0)(model, x, -gradient).min() > 0.1


def test_replacements_that_a_table_does_not_have_are_refused(model: Linear, x: Tensor, m: Tensor) -> None:
    for metric in (AOPC(), Insertion(), Deletion(replacement="blur")):
        with pytest.raises(InputError, match="a removed column of a table shows 'zero', or the model's 'mean'; got"):
            metric(model, x, m.float())
    with pytest.raises(UnsupportedModelError, match="does not say by which mean"):
        Sufficiency()(nn.Linear(6, 2).eval(), x, m.float())


def test_stability_moves_rows_by_the_datas_own_units(model: Linear, x: Tensor) -> None:
    x = x.double()
    near = list(MaxSensitivity(radius=2.0, samples=3).neighbours(x))
    assert all(float((n - x).abs().max()) <= 2 for n in near)
    assert max(float((n - x).abs().max()) for n in near) > 1.5
    steady = Gradient(model.double(), of="logit", channels="sum")
    assert LocalLipschitz(radius=2.0)(steady, x).max() < 1e-12
    assert LocalLipschitz(radius=2.0)(Gradient(model), x).min() > 0


# Bars


def size(png: bytes) -> tuple[int, int]:
    return Image.open(io.BytesIO(png)).size


def test_bars_show_at_most_a_dozen_columns_and_both_sides() -> None:
    values = torch.linspace(-1, 1, 40)
    names = [f"column {i}" for i in range(40)]
    one, few = plots.bars(values, names), plots.bars(values[:3], names[:3], title="three")
    assert one == plots.bars(values, names)
    assert size(one)[1] > 1.5 * size(few)[1]
    both = plots.bars(values, names, values.flip(0), marked=(20,))
    assert size(both)[0] > 1.2 * size(one)[0]
    assert size(both)[1] == size(one)[1]
    assert plots.bars(torch.zeros(2), ["a", "b"])


def test_bars_are_ordered_by_magnitude_and_keep_what_is_marked() -> None:
    values, other = (np.array(v) for v in ([0.1, -3.0, 0.0, 2.0, 0.2], [0.0, 0.1, 9.0, 0.0, 0.0]))
    assert plots._drawn_columns([values], (), 3) == [1, 3, 4]
    assert plots._drawn_columns([values, other], (), 3) == [1, 3, 2]
    assert plots._drawn_columns([values], (0,), 2) == [1, 0]


def test_bars_of_what_does_not_fit_are_refused() -> None:
    for values, other in (
        (torch.zeros(3), None),
        (torch.zeros(2), torch.zeros(3)),
        (torch.tensor([0, torch.nan]), None),
    ):
        with pytest.raises(InputError, match=r"bars need finite values \[2\], one a name"):
            plots.bars(values, ["a", "b"], other)
