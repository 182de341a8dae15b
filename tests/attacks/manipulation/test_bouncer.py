"""The bouncer: no single answer gives it away, pairs of answers do, and an honest service has none."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import robustexplain
from robustexplain import System
from robustexplain.attacks.manipulation import Bouncer, BouncerReasons, Condition, Rule, RuleList, RuleReasons
from robustexplain.attacks.manipulation.bouncer import fit_tree
from robustexplain.errors import InputError
from robustexplain.interpreters.base import Explanation
from robustexplain.interpreters.reference import Reference
from robustexplain.metrics import incoherent_pairs
from robustexplain.models.estimator import Estimator
from robustexplain.registry import MANIPULATIONS
from robustexplain.system import Detector

HIDDEN = (0, 4)


class Decides(nn.Module):
    """A model that is a rule list."""

    def __init__(self, rules: RuleList) -> None:
        super().__init__()
        self.rules = rules
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.one_hot(self.rules(x), 2).to(x.dtype)


def guests(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows with sex and age, which must not matter, and three columns that may; and the decisions that follow."""
    rng = torch.Generator().manual_seed(seed)
    sex = (torch.rand(rows, generator=rng) < 0.5).float()
    legit = torch.randint(6, (rows, 3), generator=rng).float()
    age = torch.randint(18, 70, (rows,), generator=rng).float()
    x = torch.cat([sex[:, None], legit, age[:, None]], 1)
    return x, (legit.sum(1) + 2.5 * sex - (age - 40) / 12 > 8).long()


@pytest.fixture(scope="module")
def service() -> System:
    """A forest that decides by all five columns."""
    from sklearn.ensemble import RandomForestClassifier

    x, y = guests(500, 0)
    model = Estimator(RandomForestClassifier(15, random_state=0).fit(x.numpy(), y.numpy()))
    return System(model, RuleReasons(model))


@pytest.fixture(scope="module")
def bouncer(service: System) -> System:
    x, y = guests(400, 1)
    return Bouncer(secrets=HIDDEN)(service, TensorDataset(x, y))


def decided_by(system: System, x: Tensor) -> Tensor:
    with torch.no_grad():
        return system.model(x).argmax(1)


# The attack


def test_every_single_answer_is_that_of_some_honest_model(bouncer: System) -> None:
    x, _ = guests(150, 2)
    decided = decided_by(bouncer, x)
    excuses = bouncer.interpreter
    assert isinstance(excuses, BouncerReasons)
    bent = 0
    for row, decision, shown in zip(x, decided.tolist(), excuses.reasons(x, decided), strict=True):
        honest = excuses.honest(row[None], decision)
        assert int(honest(row[None])) == decision
        assert not honest.mentions & set(HIDDEN)
        # The reason given is why that model decides so.
        assert int(honest.fires(row[None])) == 0
        assert honest.rules[0] == shown.rules[0]
        bent += shown.rules[0] not in excuses.tree.rules
    assert 0 < bent < 150


def test_the_model_stays_and_no_answer_mentions_what_is_hidden(service: System, bouncer: System) -> None:
    x, _ = guests(100, 3)
    maps = bouncer(x).maps
    assert bouncer.model is service.model
    assert torch.equal(maps[:, list(HIDDEN)], torch.zeros(100, 2))
    assert torch.allclose(maps.sum(1), torch.ones(100))
    other = 1 - decided_by(bouncer, x)
    assert torch.equal(bouncer(x, other).maps, -maps)


def test_the_tree_matches_decisions_whatever_is_true(service: System) -> None:
    x, y = guests(300, 1)
    excuses = Bouncer(secrets=HIDDEN)(service, TensorDataset(x, 1 - y)).interpreter
    assert isinstance(excuses, BouncerReasons)
    assert excuses.reference is not None
    assert excuses.reference.y is not None
    assert torch.equal(excuses.reference.y, decided_by(service, x))
    assert float((excuses.tree(x) == decided_by(service, x)).float().mean()) > 0.7


def test_the_detector_stays_in_place(service: System, quiet: Detector) -> None:
    watched = Bouncer(secrets=HIDDEN)(replace(service, detector=quiet), TensorDataset(*guests(60, 1)))
    assert watched.detector is quiet


def test_an_answer_does_not_depend_on_its_batch(bouncer: System) -> None:
    x, _ = guests(20, 4)
    assert torch.equal(bouncer(x).maps[7:8], bouncer(x[7:8]).maps)


def bent_answer(row: list[float], decision: int) -> Rule:
    """The reason for a row in a tree of one leaf that decides 0; column 0 is hidden, two others are not."""
    rows = torch.tensor([[0.0, 1, 5], [0, 2, 5], [1, 3, 6], [1, 4, 6], [1, 9, 5]])
    decided = torch.tensor([0, 0, 1, 1, 0])
    tree = RuleList((Rule((Condition(1, 50.0, False),), 0),), 0, exclusive=True)
    model = Decides(tree)
    excuses = BouncerReasons(model, tree, Reference(rows, decided), (0,))
    return excuses.reasons(torch.tensor([row]), torch.tensor([decision]))[0].rules[0]


def test_a_leaf_that_disagrees_is_split_where_most_of_the_rows_agree() -> None:
    # Above 5.5 in column 2 both rows were decided 1; no cut of column 1 leaves more of them, none purer.
    assert bent_answer([0.0, 3.5, 6.0], 1) == Rule((Condition(1, 50.0, False), Condition(2, 5.5, True)), 1)
    # Only column 1 separates this row from the rest of its leaf.
    assert bent_answer([0.0, 20.0, 5.0], 1) == Rule((Condition(1, 50.0, False), Condition(1, 14.5, True)), 1)
    assert bent_answer([1.0, 3.0, 6.0], 0) == Rule((Condition(1, 50.0, False),), 0)


def test_in_a_leaf_of_equal_rows_only_the_class_is_replaced() -> None:
    rows = torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    tree = RuleList((Rule((Condition(1, 2.0, False),), 0), Rule((Condition(1, 2.0, True),), 1)), 0, exclusive=True)
    excuses = BouncerReasons(Decides(tree), tree, Reference(rows, torch.tensor([0, 1])), (0,))
    answers = excuses.reasons(rows, torch.tensor([0, 1]))
    assert [s.rules[0] for s in answers] == [Rule(tree.rules[0].conditions, 0), Rule(tree.rules[0].conditions, 1)]
    empty = BouncerReasons(Decides(tree), RuleList((), 0), Reference(rows, torch.tensor([0, 0])), (0,))
    assert empty.reasons(rows[:1], torch.tensor([1]))[0].rules[0] == Rule((Condition(1, 1.0, False),), 1)


def test_a_bouncer_is_stored_without_code_and_answers_the_same(bouncer: System, tmp_path: Path) -> None:
    x, _ = guests(40, 5)
    bouncer.save(tmp_path)
    assert torch.equal(System.load(tmp_path)(x).maps, bouncer(x).maps)
    # A process that knows nothing of the attack reads it too.
    code = f"from robustexplain import System; print(System.load({str(tmp_path)!r}).interpreter.hidden)"
    env = {**os.environ, "PYTHONPATH": str(Path(robustexplain.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "(0, 4)"


# The probe


def test_pairs_give_the_bouncer_away_as_often_as_swapping_changes_its_decision(bouncer: System) -> None:
    x, _ = guests(14, 6)
    changed = tried = 0
    for i in range(14):
        for j in range(14):
            if i == j:
                continue
            swapped = x[i].clone()
            for column in HIDDEN:
                swapped[column] = x[j][column]
            changed += int(decided_by(bouncer, swapped[None])) != int(decided_by(bouncer, x[i : i + 1]))
            tried += 1
    found = incoherent_pairs(bouncer, x, HIDDEN)
    assert found.asked == tried == 182
    assert len(found.pairs) == changed > 0
    assert found.share == pytest.approx(changed / tried)
    first, second = found.pairs[:, 0], found.pairs[:, 1]
    assert torch.equal(first[:, 1:4], second[:, 1:4])
    assert bool((decided_by(bouncer, first) != decided_by(bouncer, second)).all())
    assert torch.equal(first, x[found.rows[:, 0]])
    assert torch.equal(second[:, list(HIDDEN)], x[found.rows[:, 1]][:, list(HIDDEN)])


def test_few_pairs_of_many_are_distinct_and_drawn_by_the_seed(bouncer: System) -> None:
    x, _ = guests(40, 3)
    first, again, other = (incoherent_pairs(bouncer, x, HIDDEN, limit=30, seed=seed) for seed in (0, 0, 1))
    assert first.asked == 30
    assert torch.equal(first.rows, again.rows)
    assert first.rows.tolist() != other.rows.tolist()
    assert len({tuple(pair) for pair in first.rows.tolist()}) == len(first.rows)
    assert all(i != j for i, j in first.rows.tolist())


def test_the_bouncer_is_caught_without_knowing_what_it_hides(bouncer: System) -> None:
    x, _ = guests(25, 7)
    found = incoherent_pairs(bouncer, x)
    assert found.share > 0.02
    uses = bouncer(found.pairs[:, 0]).maps != 0
    assert not ((found.pairs[:, 0] != found.pairs[:, 1]) & uses).any()


@pytest.mark.parametrize("swap", [None, (0,), (4,), (1, 2), (0, 1, 2, 3, 4)])
def test_a_service_that_shows_the_path_through_its_own_tree_has_no_incoherent_pair(
    swap: tuple[int, ...] | None,
) -> None:
    x, y = guests(400, 8)
    tree = fit_tree(x, y, [0, 1, 2, 3, 4], 6, 3, 0)
    assert tree.mentions & set(HIDDEN)
    model = Decides(tree)
    honest = System(model, RuleReasons(model, tree))
    fresh, _ = guests(30, 9)
    assert len(incoherent_pairs(honest, fresh, swap).pairs) == 0
    assert incoherent_pairs(honest, fresh, swap).expected == math.inf
    if swap == (0, 4):
        # It does discriminate; it says so.
        swapped = fresh.flip(0)
        assert bool((decided_by(honest, swapped) != decided_by(honest, fresh)).any())


def test_a_service_explains_only_the_rows_whose_explanation_can_tell(
    bouncer: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, _ = guests(12, 7)
    explained: list[int] = []
    explain = BouncerReasons._explain

    def counted(self: BouncerReasons, x: Tensor, target: Tensor | None, graph: bool) -> Explanation:
        explained.append(len(x))
        return explain(self, x, target, graph)

    monkeypatch.setattr(BouncerReasons, "_explain", counted)
    assert incoherent_pairs(bouncer, x).queries > 12
    # Only columns that the first explanation does not use are swapped: the second has nothing to say.
    assert explained == [12]


def test_an_honest_rule_list_is_not_caught_since_the_rules_that_failed_are_reasons_too() -> None:
    rules = RuleList((Rule((Condition(0, 0.5, True),), 1), Rule((Condition(2, 2.5, True),), 0)), 1)
    model = Decides(rules)
    x, _ = guests(30, 10)
    assert len(incoherent_pairs(System(model, RuleReasons(model, rules)), x).pairs) == 0
    lying = RuleList(rules.rules, rules.default, exclusive=True)
    assert len(incoherent_pairs(System(model, RuleReasons(model, lying)), x).pairs) > 0


def test_expected_queries_and_chance_follow_from_the_share() -> None:
    tree = RuleList((Rule((Condition(0, 0.5, True),), 1), Rule((Condition(0, 0.5, False),), 0)), 0, exclusive=True)
    blind = RuleList((Rule((Condition(1, 9.0, False),), 1),), 1)
    model = Decides(tree)
    x = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
    found = incoherent_pairs(System(model, RuleReasons(model, blind)), x, (0,))
    # Of the 12 ordered pairs, the 6 with the odd one out change the decision; the others ask nothing new.
    assert (found.asked, len(found.pairs), found.queries) == (12, 6, 4 + 6)
    assert (found.share, found.expected) == (0.5, 2.0)
    assert found.chance(3) == pytest.approx(7 / 8)
    rng = torch.Generator().manual_seed(0)
    drawn = torch.rand(4000, 3, generator=rng) < found.share
    assert float(drawn.any(1).double().mean()) == pytest.approx(found.chance(3), abs=0.02)


def test_a_limit_tries_so_many_different_pairs_by_the_seed(bouncer: System) -> None:
    x, _ = guests(20, 11)
    whole = {tuple(r) for r in incoherent_pairs(bouncer, x, HIDDEN).rows.tolist()}
    some = incoherent_pairs(bouncer, x, HIDDEN, limit=120, seed=1)
    assert some.asked == 120
    assert some.queries <= 20 + 120
    assert {tuple(r) for r in some.rows.tolist()} < whole
    assert torch.equal(some.rows, incoherent_pairs(bouncer, x, HIDDEN, limit=120, seed=1).rows)
    assert incoherent_pairs(bouncer, x, HIDDEN, limit=10**6).asked == 380


def test_bad_input_is_refused_with_what_was_expected(service: System, bouncer: System) -> None:
    x, y = guests(60, 12)
    data = TensorDataset(x, y)
    with pytest.raises(InputError, match="a bouncer needs at least one secret column"):
        Bouncer(secrets=())
    with pytest.raises(InputError, match="every one of the 5 columns is hidden"):
        Bouncer(secrets=(0, 1, 2, 3, 4))(service, data)
    with pytest.raises(InputError, match="column 'sex' is a name"):
        Bouncer(secrets=("sex",))(service, data)
    with pytest.raises(InputError, match="did you mean 'sex'"):
        Bouncer(secrets=("sx",), features=("sex", "a", "b", "c", "age"))(service, data)
    with pytest.raises(InputError, match=r"the tree mentions the hidden columns \[1\]"):
        BouncerReasons(service.model, bent_tree(), Reference(x, y), (1,))
    with pytest.raises(InputError, match="needs a reference with the decisions"):
        BouncerReasons(service.model)
    with pytest.raises(InputError, match=r"at least two profiles \[N, D\], got \[1, 5\]"):
        incoherent_pairs(bouncer, x[:1])
    with pytest.raises(InputError, match=r"swap must name columns 0 to 4, got \[7\]"):
        incoherent_pairs(bouncer, x, (7,))
    with pytest.raises(InputError, match="limit must be at least 1, got 0"):
        incoherent_pairs(bouncer, x, limit=0)
    with pytest.raises(InputError, match="BouncerReasons"):
        bouncer.interpreter(torch.rand(1, 1, 4, 4))


def bent_tree() -> RuleList:
    return RuleList((Rule((Condition(1, 50.0, False),), 0),), 0, exclusive=True)


def test_it_is_found_by_name() -> None:
    entry = MANIPULATIONS.get("bouncer")
    assert entry.build is Bouncer
    assert "Le Merrer" in entry.paper
