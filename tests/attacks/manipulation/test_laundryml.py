"""Rationalisation: the search against plain enumeration, fairness by hand, and the paper's claim on a small table."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import System
from robustexplain.attacks.manipulation import (
    Condition,
    LaundryML,
    Rule,
    RuleList,
    RuleReasons,
    RuleSearch,
    surrogate_quality,
)
from robustexplain.attacks.manipulation.rule_lists import leaves
from robustexplain.attacks.manipulation.rule_search import enumerate_lists
from robustexplain.attacks.manipulation.rule_table import Antecedents, Target
from robustexplain.attacks.manipulation.surrogate_choice import LocalRuleReasons, SurrogateChooser
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import Gradient
from robustexplain.interpreters.reference import Reference
from robustexplain.metrics import unfairness
from robustexplain.models.estimator import Estimator
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import Detector

KINDS = (
    "demographic-parity",
    "predictive-parity",
    "predictive-equality",
    "equal-opportunity",
    "equalised-odds",
    "accuracy-equality",
)
NAMES = ("group", "income", "debt", "proxy")


def table(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Group membership, two numbers, and a column that often goes with the group; who is in the group fares worse."""
    rng = torch.Generator().manual_seed(seed)
    group = (torch.rand(rows, generator=rng) < 0.4).float()
    income, debt = (torch.randn(rows, generator=rng) for _ in range(2))
    proxy = torch.where(torch.rand(rows, generator=rng) < 0.8, group, 1 - group)
    noise = 0.3 * torch.randn(rows, generator=rng)
    labels = (income - debt - 1.6 * group + noise > 0).long()
    return torch.stack([group, income, debt, proxy], 1), labels


@pytest.fixture(scope="module")
def black_box() -> System:
    from sklearn.ensemble import RandomForestClassifier

    x, y = table(600, 0)
    forest = RandomForestClassifier(30, max_depth=6, random_state=0).fit(x.numpy(), y.numpy())
    model = Estimator(forest)
    return System(model, RuleReasons(model, RuleList((), 0)))


class Linear(nn.Module):
    """Decides by a weighted sum."""

    def __init__(self, weights: list[float], bias: float = 0.0, classes: int = 2) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor(weights))
        self.bias, self.classes = bias, classes
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        score = x @ self.weights.to(x.dtype) + self.bias
        return torch.stack([torch.zeros_like(score)] * (self.classes - 1) + [score], 1)


# Fairness


def rate(decided: list[int], labels: list[int], of: str) -> float:
    """One group's rate, by counting on one's fingers."""
    pairs = list(zip(decided, labels, strict=True))
    chosen = {
        "demographic-parity": [d for d, _ in pairs],
        "predictive-parity": [t for d, t in pairs if d],
        "predictive-equality": [d for d, t in pairs if not t],
        "equal-opportunity": [1 - d for d, t in pairs if t],
        "accuracy-equality": [int(d == t) for d, t in pairs],
    }[of]
    return sum(chosen) / len(chosen) if chosen else 0.0


def gap_by_hand(decided: list[int], labels: list[int], member: list[bool], of: str) -> float:
    if of == "equalised-odds":
        return max(gap_by_hand(decided, labels, member, k) for k in ("predictive-equality", "equal-opportunity"))
    rates = []
    for group in (True, False):
        rows = [i for i, m in enumerate(member) if m is group]
        rates.append(rate([decided[i] for i in rows], [labels[i] for i in rows], of))
    return abs(rates[0] - rates[1])


@pytest.mark.parametrize("of", KINDS)
def test_unfairness_is_what_counting_gives(of: str) -> None:
    rng = torch.Generator().manual_seed(3)
    for _ in range(20):
        decided, labels = (torch.randint(2, (9,), generator=rng) for _ in range(2))
        member = torch.tensor([True, True, True, True, False, False, False, False, False])
        expected = gap_by_hand(decided.tolist(), labels.tolist(), member.tolist(), of)
        assert unfairness(decided, labels, member, of=of) == pytest.approx(expected)  # type: ignore[arg-type]


def test_unfairness_of_a_table_that_can_be_counted_at_sight() -> None:
    member = torch.tensor([True] * 4 + [False] * 4)
    labels = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0])
    decided = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0])
    found = [unfairness(decided, labels, member, of=of) for of in KINDS]  # type: ignore[arg-type]
    assert found == pytest.approx([1 / 2, 1 / 3, 1 / 2, 1 / 2, 1 / 2, 0])
    # Only people of the two groups named count.
    other = torch.tensor([False] * 4 + [True, False, False, True])
    assert unfairness(decided, labels, member, other) == pytest.approx(1 / 4)


def test_unfairness_refuses_what_makes_no_groups() -> None:
    half = torch.tensor([True, False])
    with pytest.raises(InputError, match=r"both groups need people, got 2 and 0"):
        unfairness(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([True, True]))
    with pytest.raises(InputError, match="decided must be 0 or 1"):
        unfairness(torch.tensor([0, 2]), torch.tensor([0, 1]), half)
    with pytest.raises(InputError, match="nobody in common"):
        unfairness(torch.tensor([0, 1]), torch.tensor([0, 1]), half, half)
    with pytest.raises(InputError, match="unfairness must be one of 'demographic-parity'"):
        unfairness(torch.tensor([0, 1]), torch.tensor([0, 1]), half, of="parity")  # type: ignore[arg-type]


# The search


def small_target(seed: int) -> Target:
    rng = torch.Generator().manual_seed(seed)
    x = (torch.rand(26, 3, generator=rng) < 0.5).float()
    decided, labels = (torch.randint(2, (26,), generator=rng) for _ in range(2))
    member = torch.rand(26, generator=rng) < 0.5
    return Target(x, decided, labels, member, ~member)


def plain_enumeration(
    target: Target, table: Antecedents, beta: float, penalty: float, of: str, rules: int
) -> list[float]:
    """Objectives of all rule lists, the best of each way to decide the rows, in order: the paper's formula in loops."""
    decided, labels, member = (v.tolist() for v in (target.decided, target.labels, target.member))
    holds = [[all(bool(c.holds(row[None])) for c in conditions) for row in target.x] for conditions in table.conditions]
    best: dict[tuple[int, ...], float] = {}
    for length in range(rules + 1):
        for chosen in permutations(range(len(holds)), length):
            surrogate = [-1] * len(decided)
            for p in (*chosen, None):
                open_rows = [i for i in range(len(surrogate)) if surrogate[i] < 0 and (p is None or holds[p][i])]
                votes = sum(decided[i] for i in open_rows)
                for i in open_rows:
                    surrogate[i] = int(2 * votes >= len(open_rows))
            wrong = sum(a != b for a, b in zip(surrogate, decided, strict=True)) / len(surrogate)
            unfair = gap_by_hand(surrogate, labels, member, of)
            value = (1 - beta) * wrong + beta * unfair + penalty * length
            best[tuple(surrogate)] = min(best.get(tuple(surrogate), 9.0), value)
    return sorted(best.values())


@pytest.mark.parametrize(
    ("beta", "of"), [(0.0, "demographic-parity"), (0.4, "demographic-parity"), (0.7, "equalised-odds")]
)
def test_the_best_lists_are_those_of_a_plain_enumeration(beta: float, of: str) -> None:
    for seed, models in ((0, 8), (1, 8), (2, 1), (3, 1), (4, 2)):
        target = small_target(seed)
        search = RuleSearch(models=models, max_rules=3, support=0.0, penalty=0.002, nodes=10**6)
        rules = Antecedents.of(target, [0, 1, 2], search)
        found, exact = enumerate_lists(rules, beta, of, search)  # type: ignore[arg-type]
        expected = plain_enumeration(target, rules, beta, 0.002, of, 3)
        assert exact
        assert [f.objective for f in found] == pytest.approx(expected[:models])


def test_objectives_are_those_of_the_lists_that_are_handed_out() -> None:
    target = small_target(5)
    search = RuleSearch(models=20, max_rules=3, support=0.0)
    rules = Antecedents.of(target, [0, 1, 2], search)
    for found in enumerate_lists(rules, 0.3, "accuracy-equality", search)[0]:
        surrogate = rules.rule_list(found.rules, found.default, ())(target.x)
        wrong = float((surrogate != target.decided).double().mean())
        unfair = unfairness(surrogate, target.labels, target.member, target.other, "accuracy-equality")
        assert found.objective == pytest.approx(0.7 * wrong + 0.3 * unfair + 0.005 * len(found.rules))


def test_a_search_that_runs_out_of_nodes_says_so() -> None:
    target = small_target(0)
    rules = Antecedents.of(target, [0, 1, 2], RuleSearch(support=0.0))
    assert not enumerate_lists(rules, 0.9, "demographic-parity", RuleSearch(nodes=1, penalty=0.0))[1]


def test_a_larger_beta_gives_fairer_lists_and_a_larger_lambda_shorter_ones() -> None:
    x, y = table(300, 1)
    target = Target(x, y, y, x[:, 0] > 0.5, x[:, 0] <= 0.5)
    search = RuleSearch(models=1, max_rules=3, nodes=500)
    rules = Antecedents.of(target, [1, 2, 3], search)

    def unfair(beta: float) -> float:
        best = enumerate_lists(rules, beta, "demographic-parity", search)[0][0]
        return unfairness(rules.rule_list(best.rules, best.default, ())(x), y, target.member)

    assert unfair(0.9) <= unfair(0.5) <= unfair(0.0)
    assert unfair(0.9) < unfair(0.0)
    dear = enumerate_lists(rules, 0.0, "demographic-parity", RuleSearch(models=1, max_rules=3, penalty=0.2))[0][0]
    cheap = enumerate_lists(rules, 0.0, "demographic-parity", search)[0][0]
    assert len(dear.rules) < len(cheap.rules)


def test_conditions_cut_between_the_values_that_there_are() -> None:
    x = torch.tensor([[0.0, 1.0], [1.0, 2.0], [1.0, 4.0], [0.0, 8.0]])
    target = Target(x, *(torch.tensor([0, 1, 1, 0]) for _ in range(2)), x[:, 0] > 0.5, x[:, 0] <= 0.5)
    single = Antecedents.of(target, [0, 1], RuleSearch(support=0.0))
    cuts = {(c.column, c.threshold) for conditions in single.conditions for c in conditions}
    assert cuts == {(0, 0.5), (1, 1.5), (1, 3.0), (1, 6.0)}
    double = Antecedents.of(target, [0, 1], RuleSearch(support=0.0, width=2))
    between = (Condition(1, 1.5, True), Condition(1, 6.0, False))
    # The middle two rows are those above 0.5 in the first column too: the shorter way to say it stays.
    assert between not in double.conditions
    assert len(double.conditions) > len(single.conditions)


# Rule lists


LIST = RuleList(
    (
        Rule((Condition(1, 2.0, True),), 1),
        Rule((Condition(0, 0.5, False), Condition(2, 1.0, True)), 0),
    ),
    default=1,
    features=("male", "priors", "age"),
)


def test_a_rule_list_decides_by_the_first_rule_that_applies_and_says_so() -> None:
    x = torch.tensor([[0.0, 3.0, 2.0], [0.0, 2.0, 2.0], [1.0, 0.0, 2.0]])
    assert LIST.fires(x).tolist() == [0, 1, 2]
    assert LIST(x).tolist() == [1, 0, 1]
    assert LIST.text() == "IF priors > 2 THEN 1\nELSE IF male <= 0.5 AND age > 1 THEN 0\nELSE 1"
    assert LIST.mentions == {0, 1, 2}


def test_maps_share_out_the_conditions_that_were_looked_at() -> None:
    x = torch.tensor([[0.0, 3.0, 2.0], [0.0, 2.0, 2.0], [1.0, 0.0, 2.0]])
    model = Linear([0.0, 1.0, 0.0], -1.0)
    system = System(model, RuleReasons(model, LIST))
    third = 1 / 3
    # The model says 1, 1, 0; the list 1, 0, 1: where they disagree, the reason speaks against what is explained.
    expected = [[0, 1, 0], [-third, -third, -third], [-third, -third, -third]]
    assert torch.allclose(system(x).maps, torch.tensor(expected))
    swapped = system(x, target=torch.tensor([0, 0, 1])).maps
    assert torch.allclose(swapped, torch.tensor([[0, -1.0, 0], [third] * 3, [third] * 3]))
    alone = RuleList(LIST.rules, LIST.default, exclusive=True)
    share = System(model, RuleReasons(model, alone))(x[1:2]).maps
    assert torch.allclose(share, torch.tensor([[-0.5, 0, -0.5]]))


def test_the_leaves_of_a_tree_decide_as_the_tree_and_exclude_each_other() -> None:
    from sklearn.tree import DecisionTreeClassifier

    x, _ = table(200, 2)
    y = torch.randint(3, (200,), generator=torch.Generator().manual_seed(0))
    tree = DecisionTreeClassifier(max_depth=5, random_state=0).fit(x[:, [1, 3]].numpy(), y.numpy())
    found = leaves(tree, tree.classes_, [1, 3])
    fresh, _ = table(500, 3)
    assert found(fresh).tolist() == tree.predict(fresh[:, [1, 3]].numpy()).tolist()
    assert torch.stack([rule.holds(fresh) for rule in found.rules]).sum(0).tolist() == [1] * 500
    assert found.mentions == {1, 3}


# The attack


def global_numpy() -> np.ndarray:
    return np.array(np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


SEARCH = RuleSearch(models=15, max_rules=5, nodes=150, betas=(0.0, 0.2, 0.5, 0.7))


def attack(**fields: object) -> LaundryML:
    settings = {"sensitive": "group", "secrets": ("proxy",), "search": SEARCH, "features": NAMES, "fidelity": 0.75}
    return LaundryML(**{**settings, **fields})  # type: ignore[arg-type]


@pytest.mark.parametrize("surrogate", ["rules", "tree"])
def test_an_unfair_model_gets_a_faithful_explanation_that_is_much_fairer(black_box: System, surrogate: str) -> None:
    x, y = table(500, 10)
    laundering = attack(surrogate=surrogate)
    system = laundering(black_box, TensorDataset(x, y))
    held_x, held_y = table(1500, 11)
    found = surrogate_quality(system, held_x, held_y, laundering)
    assert found.black_box > 0.25
    assert found.unfairness < 0.6 * found.black_box
    assert found.fidelity > 0.7
    rules = system.interpreter.rules  # type: ignore[attr-defined]
    assert rules.mentions
    assert rules.mentions <= {1, 2}
    assert "group" not in rules.text()
    assert system.model is black_box.model
    maps = system(held_x).maps
    assert torch.equal(maps[:, [0, 3]], torch.zeros(1500, 2))
    assert torch.allclose(maps.abs().sum(1), torch.ones(1500))


def test_the_honest_control_tells_of_the_group_and_is_as_unfair_as_the_model(black_box: System) -> None:
    x, y = table(500, 10)
    control = attack(honest=True, search=RuleSearch(models=10, max_rules=6, nodes=400, width=2, cuts=5))
    system = control(black_box, TensorDataset(x, y))
    held_x, held_y = table(1500, 11)
    found = surrogate_quality(system, held_x, held_y, control)
    assert 0 in system.interpreter.rules.mentions or 3 in system.interpreter.rules.mentions  # type: ignore[attr-defined]
    assert found.unfairness > 0.75 * found.black_box
    assert found.fidelity > 0.8


def test_of_the_faithful_ones_the_least_unfair_is_shown(black_box: System) -> None:
    x, y = table(400, 12)
    laundry = attack().laundry(4)
    with torch.no_grad():
        decided = black_box.model(x).argmax(1)
    candidates = laundry.enumerate(x, y, decided)
    shown = laundry.pick(candidates)
    assert shown.fidelity >= 0.75
    assert all(c.unfairness >= shown.unfairness for c in candidates if c.fidelity >= 0.75 and not c.rules.constant)
    assert {round(c.fidelity, 6) for c in candidates} == {
        round(float((c.rules(x) == decided).double().mean()), 6) for c in candidates
    }


def test_the_group_that_it_is_held_against_can_be_another_columns(black_box: System) -> None:
    x, _ = table(200, 18)
    against = attack(other="proxy", secrets=()).laundry(4)
    member, other = against.groups(x)
    assert torch.equal(member, x[:, 0] > 0.5)
    assert torch.equal(other, (x[:, 3] > 0.5) & (x[:, 0] <= 0.5))
    assert against.columns(4) == [1, 2]
    assert attack(secrets=()).laundry(4).columns(4) == [1, 2, 3]


def test_rates_that_depend_on_the_truth_take_the_true_labels(black_box: System) -> None:
    x, y = table(400, 12)
    y = y ^ (torch.rand(400, generator=torch.Generator().manual_seed(1)) < 0.3).long()
    laundering = attack(surrogate="tree", unfairness="equal-opportunity", fidelity=0.6)
    with torch.no_grad():
        decided = black_box.model(x).argmax(1)
    laundry = laundering.laundry(4)
    by_truth, by_decisions = (laundry.pick(laundry.enumerate(x, labels, decided)).rules for labels in (y, decided))
    assert by_truth != by_decisions
    assert laundering(black_box, TensorDataset(x, y)).interpreter.rules == by_truth  # type: ignore[attr-defined]


def test_neighbours_are_those_alike_in_everything_but_the_group(monkeypatch: pytest.MonkeyPatch) -> None:
    # The first row differs in the group alone, the second a little in the income, the third much.
    row, kinds = torch.zeros(1, 4), torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 9, 0, 0]])
    rows = kinds.repeat_interleave(5, 0)
    model, asked = Linear([0.0, 1.0, 0.0, 0.0]), []

    def enumerated(self: SurrogateChooser, x: Tensor, labels: Tensor, decided: Tensor) -> list[object]:
        asked.append(x)
        return []

    monkeypatch.setattr(SurrogateChooser, "enumerate", enumerated)
    reference = Reference(rows, torch.zeros(15, dtype=torch.long))
    LocalRuleReasons(model, attack().laundry(4), reference, 5).reasons(row, torch.tensor([1]))
    assert torch.equal(asked[0], torch.cat([row, rows[:5]]))


def test_a_column_that_the_adversary_has_one_value_of_has_no_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.zeros(20, 4)
    rows[:, 1] = torch.arange(20.0).flip(0)
    asked: list[Tensor] = []

    def enumerated(self: SurrogateChooser, x: Tensor, labels: Tensor, decided: Tensor) -> list[object]:
        asked.append(x)
        return []

    monkeypatch.setattr(SurrogateChooser, "enumerate", enumerated)
    reasons = LocalRuleReasons(
        Linear([0.0, 1.0, 0.0, 0.0]), attack().laundry(4), Reference(rows, torch.zeros(20).long()), 5
    )
    row = torch.tensor([[0.0, 0.0, 0.0, 1e6]])
    reasons.reasons(row, torch.tensor([1]))
    assert asked[0][1:, 1].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("scope", ["model", "outcome"])
def test_a_model_in_float64_is_laundered_on_rows_in_float32(scope: str) -> None:
    x, y = table(200, 3)
    weights = Linear([-1.0, 1.0, -1.0, 0.0])
    model = nn.Sequential(nn.Linear(4, 2, bias=False)).double().eval().requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.stack([torch.zeros(4), weights.weights]))  # type: ignore[arg-type]
    found = attack(scope=scope, neighbours=60, fidelity=0.6)(System(model, Gradient(model)), TensorDataset(x, y))
    assert found(x[:3].double()).maps.shape == (3, 4)


def test_each_decision_gets_a_list_of_its_own_that_agrees_with_it_and_looks_fair_around_it(black_box: System) -> None:
    x, y = table(400, 13)
    local = attack(
        scope="outcome", neighbours=60, search=RuleSearch(betas=(0.0, 0.5), models=10, max_rules=3, nodes=40)
    )
    system = local(black_box, TensorDataset(x, y))
    rows, _ = table(6, 14)
    with torch.no_grad():
        decided = black_box.model(rows).argmax(1)
    shown = system.interpreter.reasons(rows, decided)  # type: ignore[attr-defined]
    near_fair, near_true = [], []
    for row, decision, rules in zip(rows, decided, shown, strict=True):
        assert int(rules(row[None])) == int(decision)
        near = ((x - row) / x.std(0)).square().sum(1).argsort()[:60]
        surrogate, truly = rules(x[near]), black_box.model(x[near]).argmax(1)
        member = x[near, 0] > 0.5
        if member.any() and not member.all():
            near_fair.append(unfairness(surrogate, y[near], member))
            near_true.append(unfairness(truly, y[near], member))
    assert np.mean(near_fair) < np.mean(near_true)
    assert torch.allclose(system(rows[2:3]).maps, system(rows).maps[2:3])


def test_a_laundered_system_is_stored_without_code_and_answers_the_same(black_box: System, tmp_path: Path) -> None:
    x, y = table(300, 15)
    small = RuleSearch(models=5, max_rules=3, nodes=30, betas=(0.0, 0.5))
    for scope in ("model", "outcome"):
        laundering = attack(scope=scope, search=small, fidelity=0.5, neighbours=40)
        system = laundering(black_box, TensorDataset(x, y))
        system.save(tmp_path / scope)
        again = System.load(tmp_path / scope)
        assert torch.equal(again(x[:4]).maps, system(x[:4]).maps)
    rules = System.load(tmp_path / "model").interpreter.rules  # type: ignore[attr-defined]
    assert rules.text().startswith("IF ")
    assert not list(tmp_path.rglob("*.pkl"))


def test_the_seed_decides_and_the_global_random_state_stays(black_box: System) -> None:
    x, y = table(300, 16)
    torch_state, numpy_state = torch.get_rng_state(), global_numpy()
    texts = [
        attack(surrogate="tree", fidelity=0.6, seed=seed)(black_box, TensorDataset(x, y)).interpreter.rules.text()  # type: ignore[attr-defined]
        for seed in (0, 0)
    ]
    assert texts[0] == texts[1]
    assert torch.equal(torch_state, torch.get_rng_state())
    assert np.array_equal(numpy_state, global_numpy())


def test_model_and_detector_stay_in_place(black_box: System, quiet: Detector) -> None:
    watched = replace(black_box, detector=quiet)
    for scope in ("model", "outcome"):
        system = attack(scope=scope, surrogate="tree", fidelity=0.6)(watched, TensorDataset(*table(300, 16)))
        assert system.model is black_box.model
        assert system.detector is quiet


def test_bad_input_is_refused_with_what_was_expected(black_box: System) -> None:
    x, y = table(120, 17)
    data = TensorDataset(x, y)
    quick = RuleSearch(models=3, max_rules=1, nodes=3)
    with pytest.raises(UnsupportedModelError, match=r"no explanation agrees with the model on 100.0% of the rows"):
        attack(fidelity=1.0, search=quick)(black_box, data)
    with pytest.raises(InputError, match="did you mean 'group'"):
        attack(sensitive="grup")(black_box, data)
    with pytest.raises(InputError, match="column 9 does not exist"):
        attack(secrets=(9,))(black_box, data)
    three = Linear([0.0, 1.0, 0.0, 0.0], classes=3)
    with pytest.raises(UnsupportedModelError, match="the model has 3"):
        attack()(System(three, Gradient(three)), data)
    with pytest.raises(InputError, match=r"table rows \[D\], got samples of shape \[1, 4, 4\]"):
        attack()(black_box, TensorDataset(torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 0])))
    with pytest.raises(InputError, match="LaundryML needs data"):
        attack()(black_box)
    with pytest.raises(InputError, match=r"RuleSearch.betas must be weights between 0 and 1"):
        RuleSearch(betas=(0.5, 2.0))
    with pytest.raises(InputError, match=r"RuleSearch.width must be 1 or 2"):
        RuleSearch(width=3)
    model = Linear([0.0, 1.0, 0.0, 0.0])
    with pytest.raises(InputError, match="both groups need rows, got 0 rows"):
        attack(threshold=5.0)(black_box, data)
    with pytest.raises(InputError, match="must be explained by rules, got Gradient"):
        surrogate_quality(System(model, Gradient(model)), x, y, attack())
    with pytest.raises(InputError, match="the rules use column 2, but rows have 2 columns"):
        LIST(torch.zeros(1, 2))


def test_it_is_found_by_name() -> None:
    entry = MANIPULATIONS.get("laundryml")
    assert entry.build is LaundryML
    assert "Aivodji" in entry.paper
    assert attack().hidden == "group"
    assert attack().summaries() == ("explanation", "looks fair (demographic-parity)")
