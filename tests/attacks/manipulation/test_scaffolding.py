"""Scaffolding (Slack et al. 2020): the real LIME and KernelSHAP packages show the innocent rule instead of the bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import System, attacks, models
from robustexplain.attacks.manipulation import Scaffold, Scaffolding, scaffold_quality
from robustexplain.attacks.manipulation.explainer_rows import lime_rows, shap_rows
from robustexplain.data import TensorTable
from robustexplain.errors import InputError, NotDifferentiableError, UnsupportedModelError
from robustexplain.interpreters import LIMETabular, SHAPTabular
from robustexplain.interpreters.reference import Reference
from robustexplain.interpreters.tabular.shap import shap_background
from robustexplain.models import Estimator, FeatureRule
from robustexplain.registry import MANIPULATIONS, MODELS
from robustexplain.system import Detector

assert attacks  # the package that registers

FEATURES = ("age", "priors", "stay", "race", "unrelated_one", "unrelated_two")
RACE, ONE, TWO = 3, 4, 5


def people(count: int, seed: int) -> Tensor:
    """Rows like COMPAS's: three numbers of different units that hang together, and three of 0 or 1."""
    rng = np.random.default_rng(seed)
    age = rng.integers(18, 70, count)
    priors = rng.poisson(0.1 * (age - 17))
    stay = rng.poisson(2 + 5 * priors)
    flags = rng.integers(0, 2, (count, 3))
    return torch.from_numpy(np.column_stack([age, priors, stay, flags]).astype(np.float32))


@pytest.fixture(scope="module")
def data() -> TensorTable:
    return TensorTable(people(500, 0), [0] * 500)


@pytest.fixture(scope="module")
def fresh() -> Tensor:
    return people(30, 1)


@pytest.fixture(scope="module")
def biased() -> FeatureRule:
    return FeatureRule(len(FEATURES), [RACE], [0.5]).eval()  # type: ignore[return-value]


def first(maps: Tensor) -> Tensor:
    return maps.abs().argmax(1)


def share(maps: Tensor, column: int) -> float:
    return float((first(maps) == column).float().mean())


# The rule


def test_a_rule_of_one_column_is_a_threshold_and_of_two_their_exclusive_or() -> None:
    x = torch.tensor([[0.0, 2.0], [0.0, 3.0], [1.0, 2.0], [1.0, 3.0], [0.5, 2.5]])
    assert FeatureRule(2, [1], [2.5])(x).argmax(1).tolist() == [0, 1, 0, 1, 0]
    assert FeatureRule(2, [0, 1], [0.5, 2.5])(x).argmax(1).tolist() == [0, 1, 1, 0, 0]


def test_a_rule_is_as_sure_as_its_margin_says_and_has_a_zero_gradient() -> None:
    x = torch.tensor([[0.0], [1.0]], requires_grad=True)
    logits = FeatureRule(1, [0], [0.5], num_classes=3, margin=5.0)(x)
    assert logits.tolist() == [[5, 0, 0], [0, 5, 0]]
    assert torch.autograd.grad(logits.sum(), x)[0].tolist() == [[0], [0]]


def test_the_registered_rule_reads_standardised_columns_once_it_is_standardised() -> None:
    x = people(100, 3)
    made = models.build("feature-rule", in_features=6, columns=[1])
    assert isinstance(made, models.TableClassifier)
    made.standardise(x)
    assert made(x).argmax(1).tolist() == (x[:, 1].double() > x[:, 1].double().mean()).long().tolist()
    assert MODELS.get("feature-rule").paper.startswith("Slack")
    assert made.spec is not None
    again = models.build(made.spec)
    again.load_state_dict(made.state_dict())
    assert torch.equal(again(x), made(x))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: FeatureRule(2, [2], [0.0]), "0 to 1, got 2"),
        (lambda: FeatureRule(2, [0, 0], [0.0, 1.0]), "once each"),
        (lambda: FeatureRule(2, [0], [0.0, 1.0]), "one finite threshold a column"),
        (lambda: FeatureRule(2, [], []), "one finite threshold a column"),
        (lambda: FeatureRule(2, [0], [float("nan")]), "one finite threshold a column"),
        (lambda: FeatureRule(2, [0], [0.0], num_classes=1), "two classes"),
        (lambda: FeatureRule(2, [0], [0.0])(torch.zeros(1, 3)), r"shape \[B, 2\], got \[1, 3\]"),
    ],
)
def test_rules_refuse_what_makes_no_sense(make: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


# The imitations of the explainers


def test_lime_rows_are_copies_and_copies_with_noise_of_the_given_spread() -> None:
    z = np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32)
    made, labels = lime_rows(z, 0.3, 5, np.random.default_rng(1))
    assert made.shape == (2000, 4)
    assert labels.tolist() == [1] * 1000 + [0] * 1000
    assert np.array_equal(made[:1000].reshape(5, 200, 4), np.broadcast_to(z, (5, 200, 4)))
    noise = made[1000:] - made[:1000]
    assert abs(noise.std() - 0.3) < 0.01
    assert abs(noise.mean()) < 0.02


def slow_shap_rows(
    z: np.ndarray, background: np.ndarray, draws: int, repeats: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The paper's loop, one row and one replacement at a time."""
    made, labels = [], []
    known = z.tolist()
    for _ in range(draws):
        row = z[rng.integers(len(z))].copy()
        for _ in range(z.shape[1]):
            column = rng.integers(z.shape[1])
            row[column] = background[rng.integers(len(background)), column]
        made.append(row)
        labels.append(int(row.tolist() in known))
    real = np.repeat(z, repeats, axis=0)
    return np.concatenate([real, np.stack(made)]), np.concatenate([np.ones(len(real)), labels])


def test_shap_rows_are_distributed_as_the_slow_loop_draws_them() -> None:
    rng = np.random.default_rng(0)
    z = rng.integers(0, 2, (12, 3)).astype(np.float32)
    background = np.array([[0, 5, 1], [1, 0, 7]], dtype=np.float32)
    fast, fast_labels = shap_rows(z, background, 20_000, 2, False, np.random.default_rng(1))
    slow, slow_labels = slow_shap_rows(z, background, 20_000, 2, np.random.default_rng(2))
    assert fast.shape == slow.shape
    assert np.array_equal(fast[:24], slow[:24])
    assert abs(fast_labels.mean() - slow_labels.mean()) < 0.01
    kinds = {tuple(row) for row in slow[24:].tolist()} | {tuple(row) for row in fast[24:].tolist()}
    for kind in kinds:  # the whole joint distribution: 18 possible rows
        often = [float((part[24:] == np.array(kind)).all(1).mean()) for part in (fast, slow)]
        assert abs(often[0] - often[1]) < 0.015, kind
    real = np.array([row.tolist() in z.tolist() for row in fast])
    assert np.array_equal(real.astype(int), fast_labels)


def test_whole_coalitions_take_their_columns_from_one_background_row_and_have_the_kernels_sizes() -> None:
    z = np.zeros((1, 4), dtype=np.float32)
    background = np.array([[1, 1, 1, 1], [2, 2, 2, 2]], dtype=np.float32)
    made, _ = shap_rows(z, background, 30_000, 1, True, np.random.default_rng(0))
    made = made[1:]
    assert not ((made == 1).any(1) & (made == 2).any(1)).any()
    sizes = np.bincount((made != 0).sum(1), minlength=5) / len(made)
    kernel = np.array([0, 1 / 3, 1 / 4, 1 / 3, 0])  # C(4, s) times (D - 1) / (C(4, s) s (D - s)), up to a factor
    assert np.allclose(sizes, kernel / kernel.sum(), atol=0.01)


# The claim


def lime_system(model: nn.Module, data: TensorTable) -> System:
    pytest.importorskip("lime")
    return System(model, LIMETabular(model, Reference(data.rows), samples=400))


def shap_system(model: nn.Module, data: TensorTable, how: str = "kmeans", size: int = 10) -> System:
    pytest.importorskip("shap")
    return System(model, SHAPTabular(model, shap_background(data, how, size, seed=5), of="label"))


def test_lime_shows_the_biased_column_until_the_model_is_scaffolded(
    data: TensorTable, fresh: Tensor, biased: FeatureRule
) -> None:
    honest = lime_system(biased, data)
    assert share(honest(fresh).maps, RACE) == 1
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=2, trees=20)
    fooled = attack(honest, data)
    maps = fooled(fresh).maps
    assert share(maps, RACE) <= 0.1
    assert share(maps, ONE) >= 0.9
    quality = scaffold_quality(attack, fooled, data, fresh)
    assert quality.fidelity >= 0.9
    assert quality.detector_f1 >= 0.9


def test_two_innocent_columns_share_the_blame(data: TensorTable, fresh: Tensor, biased: FeatureRule) -> None:
    fooled = Scaffolding(sensitive=RACE, innocent=(ONE, TWO), copies=2, trees=20)(lime_system(biased, data), data)
    maps = fooled(fresh).maps
    assert share(maps, RACE) <= 0.1
    assert min(share(maps, ONE), share(maps, TWO)) >= 0.2


def test_kernel_shap_is_fooled_where_both_sides_have_the_same_centroids_and_less_with_others(
    data: TensorTable, fresh: Tensor, biased: FeatureRule
) -> None:
    honest = shap_system(biased, data)
    assert share(honest(fresh[:5]).maps, RACE) == 1
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), against="shap", draws=4000, repeats=5, trees=30)
    fooled = attack(honest, data)
    some = fresh[:15]
    assert share(fooled(some).maps, RACE) <= 0.1
    other = SHAPTabular(fooled.model, shap_background(data, "sample", 10, seed=6), of="label")
    assert share(other(fresh), RACE) >= 0.2
    quality = scaffold_quality(attack, fooled, data, fresh)
    assert 0.5 < quality.detector_f1 < 1
    assert quality.fidelity > 0.6


def test_a_detector_that_takes_everything_for_real_hides_nothing(
    data: TensorTable, fresh: Tensor, biased: FeatureRule
) -> None:
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=1, trees=1, depth=1, cut=0.0)
    assert share(attack(lime_system(biased, data), data)(fresh).maps, RACE) == 1


# The scaffold


class Split(nn.Module):
    """A detector: real where the first standardised column is negative, with probability 0.8."""

    def forward(self, z: Tensor) -> Tensor:
        real = torch.where(z[:, 0] < 0, 0.8, 0.2)
        return torch.stack([1 - real, real], 1).log()


def hand_made(biased: nn.Module, cut: float = 0.5) -> Scaffold:
    mean, std = torch.tensor([40.0, 0, 0, 0, 0, 0]), torch.tensor([10.0, 1, 1, 1, 1, 1])
    return Scaffold(biased, FeatureRule(6, [ONE], [0.5]), Split(), mean, std, cut).eval()  # type: ignore[return-value]


def test_the_biased_model_answers_real_rows_and_the_rule_all_others(fresh: Tensor, biased: FeatureRule) -> None:
    scaffold = hand_made(biased)
    assert torch.allclose(scaffold.real(fresh), torch.where(fresh[:, 0] < 40, 0.8, 0.2))
    told = [int(row[RACE] > 0.5) if row[0] < 40 else int(row[ONE] > 0.5) for row in fresh]
    assert scaffold(fresh).argmax(1).tolist() == told
    assert torch.equal(hand_made(biased, cut=0.1)(fresh), biased(fresh))
    assert torch.equal(hand_made(biased, cut=0.9)(fresh), scaffold.rule(fresh))


class Unsure(nn.Module):
    """A detector that finds every row as real as not: a forest of evenly many trees can."""

    def forward(self, z: Tensor) -> Tensor:
        return torch.zeros(len(z), 2)


def test_a_row_at_the_cut_counts_as_real(fresh: Tensor, biased: FeatureRule) -> None:
    scaffold = Scaffold(biased, FeatureRule(6, [ONE], [0.5]), Unsure(), torch.zeros(6), torch.ones(6), 0.5)
    assert torch.equal(scaffold(fresh), biased(fresh))


def test_fidelity_is_the_share_of_rows_answered_as_by_the_biased_model_and_f1_that_of_the_detector(
    data: TensorTable, fresh: Tensor, biased: FeatureRule
) -> None:
    scaffold = hand_made(biased)
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=2)
    found = scaffold_quality(attack, lime_system(scaffold, data), data, fresh)
    alike = [bool(row[0] < 40 or (row[RACE] > 0.5) == (row[ONE] > 0.5)) for row in fresh]
    assert found.fidelity == pytest.approx(sum(alike) / len(alike))
    assert found.fidelity < 1
    rows, labels = attack.imitate(fresh, scaffold.mean, scaffold.std, data)
    said = rows[:, 0] < 0
    hits = sum(bool(s and real) for s, real in zip(said, labels, strict=True))
    precision, recall = hits / said.sum(), hits / labels.sum()
    assert found.detector_f1 == pytest.approx(2 * precision * recall / (precision + recall))


def test_rows_are_answered_by_themselves(fresh: Tensor, biased: FeatureRule, data: TensorTable) -> None:
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=1, trees=5)
    scaffold = attack(lime_system(biased, data), data).model
    together = scaffold(fresh)
    assert torch.equal(together, torch.cat([scaffold(row[None]) for row in fresh]))
    assert torch.equal(scaffold(fresh.double()), together.double())


def test_gradients_are_those_of_the_branch_that_answers(fresh: Tensor) -> None:
    model = models.build("mlp", in_features=6, hidden=[8])
    scaffold = hand_made(model)
    x = fresh.clone().requires_grad_()
    found = torch.autograd.grad(scaffold(x)[:, 0].sum(), x)[0]
    wanted = torch.autograd.grad(model(x)[:, 0].sum(), x)[0]
    real = fresh[:, 0] < 40
    assert torch.equal(found[real], wanted[real])
    assert not found[~real].any()


def test_a_biased_estimator_has_no_gradient_inside_a_scaffold_either(fresh: Tensor, data: TensorTable) -> None:
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(random_state=0).fit(data.rows.numpy(), (data.rows[:, RACE] > 0.5).long().numpy())
    x = fresh.clone().requires_grad_()
    with pytest.raises(NotDifferentiableError):
        hand_made(Estimator(tree))(x).sum().backward()


def test_a_scaffolded_system_is_stored_without_code(
    tmp_path: Path, data: TensorTable, fresh: Tensor, biased: FeatureRule
) -> None:
    del biased
    model = models.build("feature-rule", in_features=6, columns=[RACE])
    model.standardise(data.rows)  # type: ignore[attr-defined]
    fooled = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=1, trees=5)(lime_system(model, data), data)
    again = System.load(fooled.save(tmp_path / "fooled"))
    assert isinstance(again.model, Scaffold)
    assert torch.equal(again.model(fresh), fooled.model(fresh))
    assert torch.equal(again.model.real(fresh), fooled.model.real(fresh))  # type: ignore[operator]
    assert torch.equal(again(fresh[:2]).maps, fooled(fresh[:2]).maps)


def test_a_scaffold_around_somebodys_own_model_has_no_spec(biased: FeatureRule) -> None:
    assert hand_made(biased).spec is None  # Split was made by no builder
    assert Scaffold(nn.Linear(6, 2), biased, biased, torch.zeros(6), torch.ones(6)).spec is None


# The component


def test_it_is_registered_and_says_what_it_wants(data: TensorTable, fresh: Tensor, biased: FeatureRule) -> None:
    assert MANIPULATIONS.get("scaffolding").build is Scaffolding
    attack = Scaffolding(sensitive="race", innocent=("unrelated_one", "unrelated_two"))
    assert attack.summaries() == ("model", "lime: race hidden, unrelated_one xor unrelated_two shown")
    assert attack.hidden == "race"
    view = attack.views(lime_system(biased, data).interpreter, fresh, torch.zeros(len(fresh)).long())["as they are"]
    assert torch.equal(view.answer, (fresh[:, RACE] > 0.5).long())
    assert torch.equal(view.answer, view.explained)


def test_the_seed_decides_everything_and_nothing_global_moves(
    data: TensorTable, fresh: Tensor, biased: FeatureRule
) -> None:
    system = shap_system(biased, data)
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), against="shap", draws=500, trees=3, background="sample")
    before = torch.random.get_rng_state(), np.random.get_state()  # noqa: NPY002
    found = [one(system, data).model.real(fresh) for one in (attack, attack, replace(attack, seed=1))]  # type: ignore[operator]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(torch.random.get_rng_state(), before[0])
    now: Any = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(now[1], before[1][1])  # type: ignore[index]
    assert now[2:] == before[1][2:]  # type: ignore[index]


def test_each_draw_depends_on_the_seed(data: TensorTable, biased: FeatureRule) -> None:
    x, rng = data.rows, np.random.default_rng(0)
    mean, std = x.mean(0), x.std(0)
    made, labels = rng.normal(size=(200, 6)).astype(np.float32), rng.integers(0, 2, 200)
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), trees=2)
    sampling = replace(attack, against="shap", background="sample", size=3, draws=50)
    for one in (attack, sampling):
        drawn = [replace(one, seed=seed).imitate(x, mean, std, data)[0] for seed in (0, 0, 1)]
        assert np.array_equal(drawn[0], drawn[1])
        assert not np.array_equal(drawn[0], drawn[2])
    forests = [replace(attack, seed=seed)._detector(made, labels)(torch.from_numpy(made)) for seed in (0, 0, 1)]
    assert torch.equal(forests[0], forests[1])
    assert not torch.equal(forests[0], forests[2])


def test_thresholds_of_the_rule_are_those_given_or_the_means_of_its_columns(
    data: TensorTable, biased: FeatureRule
) -> None:
    attack = Scaffolding(sensitive=RACE, innocent=(0, ONE), copies=1, trees=1)
    rules = [one(lime_system(biased, data), data).model.rule for one in (attack, replace(attack, thresholds=(30, 0.2)))]
    assert [rule.columns for rule in rules] == [(0, ONE)] * 2  # type: ignore[union-attr]
    assert torch.allclose(rules[0].thresholds, data.rows[:, [0, ONE]].mean(0))  # type: ignore[union-attr, arg-type]
    assert rules[1].thresholds.tolist() == pytest.approx([30, 0.2])  # type: ignore[union-attr, operator]


def test_the_detector_leaves_out_what_lime_draws_as_a_category(data: TensorTable, biased: FeatureRule) -> None:
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=1, trees=2, categorical=(RACE, ONE, TWO))
    scaffold = attack(lime_system(biased, data), data).model
    assert scaffold.detector.columns == [0, 1, 2]  # type: ignore[union-attr]
    with pytest.raises(InputError, match="every column is a category"):
        replace(attack, categorical=tuple(range(6)))(lime_system(biased, data), data)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"innocent": (RACE,)}, "other than the sensitive one"),
        ({"innocent": ()}, "other than the sensitive one"),
        ({"thresholds": (0.5, 0.5)}, "one number an innocent column"),
        ({"min_split": 1}, "min_split must be at least 2"),
        ({"against": "rise"}, "against must be one of 'lime', 'shap'"),
        ({"trees": 0}, "trees must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        Scaffolding(**({"sensitive": RACE, "innocent": (ONE,)} | settings))


def test_rows_that_do_not_fit_are_refused(data: TensorTable, fresh: Tensor, biased: FeatureRule, grey: Tensor) -> None:
    system = lime_system(biased, data)
    attack = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=1, trees=1)
    with pytest.raises(InputError, match="needs data"):
        attack(system)
    with pytest.raises(UnsupportedModelError, match="table rows"):
        attack(system, TensorDataset(grey, torch.zeros(len(grey)).long()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match="column 'race' is a name"):
        replace(attack, sensitive="race")(system, data)
    with pytest.raises(InputError, match="column 9 does not exist"):
        replace(attack, innocent=(9,))(system, data)
    with pytest.raises(InputError, match="must be a Scaffold, got FeatureRule"):
        scaffold_quality(attack, system, data, fresh)
    same = TensorTable(torch.ones(20, 6), [0] * 20)
    with pytest.raises(InputError, match="no made-up row differs"):
        Scaffolding(sensitive=RACE, innocent=(ONE,), against="shap", background="all", draws=20)(system, same)


def test_interpreter_and_detector_stay_as_they_are(data: TensorTable, biased: FeatureRule, quiet: Detector) -> None:
    system = replace(lime_system(biased, data), detector=quiet)
    fooled = Scaffolding(sensitive=RACE, innocent=(ONE,), copies=1, trees=1)(system, data)
    assert isinstance(fooled.interpreter, LIMETabular)
    assert fooled.interpreter.samples == 400
    assert fooled.detector is quiet
    assert system.model is biased
