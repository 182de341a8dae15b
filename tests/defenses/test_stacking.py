"""Any two registered defenses on one system: the second keeps what the first does, or is refused with the reason.

The pairs come from the registry: a new defense is checked against all others without a line here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import robustexplain as rx
from robustexplain.attacks.manipulation import LocationFooling
from robustexplain.defenses import (
    Aggregate,
    AggregatedInterpreter,
    BetaSmoothing,
    Defense,
    Detector,
    FeatureSqueezing,
    XEnsemble,
)
from robustexplain.defenses.base import LAYERS
from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import CAM, RTS, GradCAM, Gradient, MaskingModel, Smoothed
from robustexplain.models import Classifier
from robustexplain.registry import DEFENSES, Entry
from robustexplain.system import Explained
from robustexplain.training import Samples, Session

ALL_PAIRS = {
    "aggregated", "aid", "beta-smoothing", "feature-squeezing", "input-transform", "pgd-at", "x-ensemble"
}  # fmt: skip
"""Those that are stacked on one another in every order; each other one meets one of each layer."""
OF_EACH_LAYER = {"pgd-at", "input-transform", "beta-smoothing", "feature-squeezing"}
AS_ANOTHER = {
    *(
        "metfa",
        "sparsified-smoothgrad",
        "cure",
        "distillation",
        "ensemble-at",
        "int",
        "retrained",
        "trades",
        "fine-pruning",
    ),
    *("fine-pruning", "adv2-at", "asgt", "atex", "attribution-regularisers", "infodrop", "saliency-guided"),
    *("aga", "art", "input-gradient-penalty", "rar", "smooth-curvature", "ssr"),
    *("attribute-steered", "interpreter-disagreement", "magnet", "out-of-distribution", "region-voting-margin"),
    *("safetynet", "saliency-cnn", "shap-signatures"),
}
"""Made by the same code as ``certified``, trained in the loop of ``pgd-at`` or ``r2et``, or added as ``ml-loo`` is."""


def meet(first: Entry, second: Entry) -> bool:
    """Whether a pair is tested: order among layers is the business of the base class, and costs a training each."""
    if {first.name, second.name} <= ALL_PAIRS:
        return True
    if {first.name, second.name} & AS_ANOTHER:
        return False
    low, high = (LAYERS.index(entry.build.layer) for entry in (first, second))  # type: ignore[attr-defined]
    if low == high and second.name == "aggregated":
        return True
    return low <= high and (first.name in OF_EACH_LAYER or second.name in OF_EACH_LAYER)


OF_IMAGES = [entry for entry in DEFENSES if "tables" not in entry.needs]
PAIRS = [pytest.param(a, b, id=f"{a.name}-{b.name}") for a in OF_IMAGES for b in OF_IMAGES if meet(a, b)]


@pytest.fixture(scope="module")
def rts(trained: Classifier, judged: tuple[Tensor, Tensor]) -> RTS:
    """An RTS that has not been trained: enough to be told from others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return RTS(trained, MaskingModel.around(copy.deepcopy(trained), judged[0][:2], width=8, levels=2).eval())


@dataclass(frozen=True, eq=False)
class Marked(Detector):
    """A detector that, besides, finds images whose first pixel is white as suspicious as can be."""

    inner: Any

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """Those of the detector inside."""
        return tuple(self.inner.models)

    def score(self, x: Tensor, seen: Explained | None = None) -> Tensor:
        """The detector's own, and 10 for the mark."""
        return self.inner.score(x) + 10 * (x[:, 0, 0, 0] == 1)  # type: ignore[no-any-return]

    def soft_score(self, x: Tensor) -> Tensor:
        """The detector's own."""
        return self.inner.soft_score(x)  # type: ignore[no-any-return]


def stacked(defense: Defense, system: rx.System, data: Any) -> tuple[rx.System | None, str]:
    """The defended system, or the reason why it is refused."""
    try:
        return defense(system, data), ""
    except UnsupportedModelError as error:
        return None, str(error)


def assert_kept(first: Defense, second: Defense, base: rx.System, data: Any, x: Tensor) -> None:
    """Stack ``second`` on ``first`` and assert that what the first does is there still, by what the system does."""
    (once, why), (alone, why_not) = (stacked(defense, base, data) for defense in (first, second))
    if once is None or alone is None:
        # No system that both apply to: each says why.
        assert re.search("was trained for the model|explains by|has none", why or why_not)
        return
    if first.layer == "detector":
        once = replace(once, detector=Marked(once.detector))
    low, high = (LAYERS.index(defense.layer) for defense in (first, second))
    twice, reason = stacked(second, once, data)
    if twice is None:
        assert high <= low, f"{second.name} on {first.name} is in order, and refused: {reason}"
        expected = (
            f"has {first.name!r} already: apply {second.name} first"
            if high < low
            else "apply|already|among|methods that do"
        )
        assert re.search(expected, reason)
        return
    assert high >= low
    assert twice.defenses == (first.name, second.name)
    if first.layer == "detector":
        white = x.clone()
        white[:, :, 0, 0] = 1
        assert bool(twice(white).alarm.all()), "the first detector's alarm does not count"  # type: ignore[union-attr]
        assert not bool(twice(x).alarm.all()), "everything rings"  # type: ignore[union-attr]
        return
    shown: Callable[[rx.System], Tensor] = lambda s: s(x).maps if first.layer == "interpreter" else s(x).logits  # noqa: E731
    touches = high == low or second.layer == "input"
    if touches:
        assert not torch.equal(shown(twice), shown(alone)), "the second alone would give the same"
    else:
        assert torch.equal(shown(twice), shown(once)), "the second changes what the first made"


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_a_second_defense_keeps_the_first_or_is_refused(
    first: Entry,
    second: Entry,
    trained: Classifier,
    rts: RTS,
    few: Dataset[Any],
    judged: tuple[Tensor, Tensor],
    cheap: Callable[[Entry], Defense],
) -> None:
    needs = first.needs + second.needs
    base = rx.System(trained, rts if "rts" in needs else Gradient(trained))
    assert_kept(cheap(first), cheap(second), base, few, judged[0][:8])


class Forgetful(FeatureSqueezing):
    """Puts its detector in the place of the one before, as this library once did."""

    def _defend(self, system: rx.System, data: Samples | None, session: Session) -> rx.System:
        return super()._defend(system.without_detector(), data, session)


class Plain(AggregatedInterpreter):
    """Aggregates plain members, whatever the system's interpreter was, as this library once did."""

    def _defend(self, system: rx.System, data: Samples | None, session: Session) -> rx.System:
        return replace(system, interpreter=Aggregate(system.model, (Gradient(system.model), GradCAM(system.model))))


def test_the_check_sees_a_defense_that_undoes_another(
    trained: Classifier, few: Dataset[Any], judged: tuple[Tensor, Tensor]
) -> None:
    base, x = rx.System(trained, Gradient(trained)), judged[0][:8]
    with pytest.raises(AssertionError, match="alarm does not count"):
        assert_kept(FeatureSqueezing(("median-2",)), Forgetful(("median-3",)), base, few, x)
    with pytest.raises(AssertionError, match="the second alone would give the same"):
        assert_kept(BetaSmoothing(), Plain(), base, few, x)


def test_layers_are_applied_in_order(trained: Classifier, few: Dataset[Any]) -> None:
    watched = FeatureSqueezing(("median-2",))(rx.System(trained, Gradient(trained)), few)
    assert watched.defenses == ("feature-squeezing",)
    expected = (
        r"defenses stack in the order model, input, interpreter, detector; 'aggregated' hardens the interpreter and "
        r"the system has 'feature-squeezing' already: apply aggregated first$"
    )
    with pytest.raises(UnsupportedModelError, match=expected):
        AggregatedInterpreter()(watched)


def test_a_defense_must_say_its_layer() -> None:
    class Nowhere(Defense):
        """Says none."""

        def _defend(self, system: rx.System, data: Samples | None, session: Session) -> rx.System:
            return system

    with pytest.raises(InputError, match=r"Nowhere\.layer must say"):
        Nowhere()


# --- interpreters ---


def test_the_members_of_an_aggregate_are_smoothed_as_the_interpreter_was(
    trained: Classifier, rts: RTS, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:4]
    smooth = BetaSmoothing(2.0)(rx.System(trained, rts))
    both = AggregatedInterpreter(["rts", Gradient, "gradcam"])(smooth)
    assert isinstance(both.interpreter, Aggregate)
    assert both.interpreter.members[0] is smooth.interpreter
    assert all(isinstance(m, Smoothed) and m.smooth.beta == 2.0 for m in both.interpreter.members)
    # The same as smoothing all of them at once.
    other = BetaSmoothing(2.0)(AggregatedInterpreter(["rts", Gradient, "gradcam"])(rx.System(trained, rts)))
    torch.testing.assert_close(both(x).maps, other(x).maps)
    for again in (both, other):
        with pytest.raises(UnsupportedModelError, match="smoothed already"):
            BetaSmoothing()(again)


def test_a_hardened_interpreter_is_a_member_or_the_aggregate_is_refused(
    trained: Classifier, rts: RTS, few: Dataset[Any], cheap: Callable[[Entry], Defense]
) -> None:
    aid = cheap(DEFENSES.get("aid"))
    hard = aid(rx.System(trained, rts), few)
    with pytest.raises(UnsupportedModelError, match=r"'aid' hardened the interpreter.*name 'rts' among them"):
        AggregatedInterpreter(["gradient", "gradcam"])(hard)
    kept = AggregatedInterpreter(["gradient", "rts"])(hard)
    assert kept.interpreter.members[1] is hard.interpreter  # type: ignore[attr-defined]
    with pytest.raises(UnsupportedModelError, match=r"made of several already.*in one aggregate"):
        AggregatedInterpreter(["gradient", "gradcam"])(kept)
    more = AggregatedInterpreter(["aggregate", "cam"])(kept)
    assert more.interpreter.members[0] is kept.interpreter  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"'smoothed' is made of other parts besides the model"):
        AggregatedInterpreter(["smoothed", "cam"])(rx.System(trained, CAM(trained)))


# --- systems ---


def test_a_detector_watches_the_deployed_model_unless_it_is_said(trained: Classifier, few: Dataset[Any]) -> None:
    watched = FeatureSqueezing(("median-2",))(rx.System(trained, Gradient(trained)), few)
    maps = XEnsemble(("gradient",), training=rx.training.Training(epochs=1), trees=2)(watched, few)
    other = copy.deepcopy(trained)
    for system in (watched, maps):
        with pytest.raises(InputError, match="the detector watches another model object"):
            replace(system, model=other, interpreter=Gradient(other))
        stale = replace(system, model=other, interpreter=Gradient(other), stale_detector=True)
        assert not stale.without_detector().stale_detector


def test_a_manipulation_leaves_a_detector_of_the_honest_model(
    trained: Classifier, few: Dataset[Any], tmp_path: Path
) -> None:
    watched = FeatureSqueezing(("median-2",))(rx.System(trained, CAM(trained)), few)
    once = rx.training.Training(epochs=1, batch_size=20, lr=1e-3)
    lied = LocationFooling(weight=10, budget=1.0, training=once)(watched, few)
    assert lied.model is not trained
    assert lied.detector is watched.detector
    loaded = rx.System.load(lied.save(tmp_path))
    assert (loaded.stale_detector, loaded.defenses) == (True, ("feature-squeezing",))


def test_an_oblivious_attacker_sees_the_first_interpreter_on_the_deployed_model(
    trained: Classifier, few: Dataset[Any]
) -> None:
    hardened = copy.deepcopy(trained)
    with torch.no_grad():
        next(hardened.parameters()).mul_(1.1)
    members = Aggregate(trained, (Gradient(trained), Smoothed(trained, CAM(trained))))
    root = rx.System(trained, members)
    moved = rx.System(hardened, Aggregate(hardened, (Gradient(hardened), CAM(hardened))))
    defense = FeatureSqueezing(("median-2",))
    view = defense.oblivious_view(defense(moved, few), root)
    assert view.model is hardened
    assert view.detector is None
    inner = view.interpreter
    assert isinstance(inner, Aggregate)
    assert [type(m) for m in inner.members] == [Gradient, Smoothed]
    assert all(m.model is hardened for m in inner.members)
    assert defense.oblivious_view(defense(root, few), root).interpreter is members
