"""Certificates: their figures against the papers', slow oracles, and attacks that are built to break them."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import robustexplain as rx
from robustexplain.attacks.adaptive import DRAWS, Adaptation, draws_for
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.autograd.straight_through import straight_through
from robustexplain.defenses import BetaSmoothing, CertifiedInterpreter, MeTFADefense, SparsifiedSmoothGrad
from robustexplain.errors import FieldError, InputError, UnsupportedModelError
from robustexplain.interpreters import (
    CAM,
    Certified,
    GradCAM,
    Gradient,
    KernelSmoothed,
    MeTFA,
    OfTransformed,
    Smoothed,
    SmoothGrad,
    VarGrad,
)
from robustexplain.interpreters import Sparsified as SparsifiedMap
from robustexplain.interpreters.composed import certified, sparsified
from robustexplain.interpreters.composed.binomial import Bound, bounds, rejected, slack, tails
from robustexplain.interpreters.composed.metfa import MeTFASettings, two_classes
from robustexplain.interpreters.composed.sparsified import apart
from robustexplain.models import Classifier, with_transforms

from .breaking import certificate_of, flipped, lost

# Figures of the papers


def test_so_many_of_ninety_copies_must_agree_as_in_the_papers_protocol() -> None:
    p = tails(90, 0.75)
    needed = [int((p > 0.001 / cells).sum()) for cells in (1, 14 * 14, 56 * 56, 224 * 224)]
    assert needed == [80, 85, 86, 88]
    radii = [CertifiedInterpreter(sigma=sigma).radius for sigma in (0.15, 0.25, 0.33)]
    assert radii == pytest.approx([0.101, 0.169, 0.223], abs=6e-4)


def test_hoeffdings_term_is_levines_and_the_exact_one_is_exact() -> None:
    found = [slack(q, 0.05 / (2 * 150528), "hoeffding") for q in (64, 256, 1024, 8192)]
    assert found == pytest.approx([0.349, 0.175, 0.087, 0.031], abs=6e-4)
    low, high = bounds(30, 0.01, "clopper-pearson")
    for k in (1, 7, 29):
        assert float(tails(30, float(low[k]))[k]) == pytest.approx(0.01)
        assert 1 - float(tails(30, float(high[k]))[k + 1]) == pytest.approx(0.01)
    wide = bounds(30, 0.01, "hoeffding")
    assert bool(((low >= wide[0]) & (high <= wide[1])).all())
    assert float(low[0]) == 0.0
    assert float(low[30]) == pytest.approx(1 - slack(30, 0.01, "clopper-pearson"))


def test_metfas_order_statistics() -> None:
    assert [MeTFASettings(n).lowest for n in (6, 10, 20, 50, 100)] == [0, 1, 5, 17, 39]
    values = torch.tensor([[1.0, 5.0, 1.2, 0.9, 4.8, 1.1]])
    assert float(two_classes(values)) == pytest.approx(1.2)


def test_a_map_of_one_place_has_one_class() -> None:
    assert two_classes(torch.tensor([[0.3], [0.7]])).tolist() == [[pytest.approx(0.3)], [pytest.approx(0.7)]]


def test_holms_steps_reject_what_a_loop_over_them_does() -> None:
    p = torch.rand(4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 4
    wanted = torch.zeros(4, 9, dtype=torch.bool)
    for i in range(4):
        for step, place in enumerate(p[i].argsort()):
            if p[i, place] > 0.2 / (9 - step):
                break
            wanted[i, place] = True
    found = rejected(p, 0.2, "holm")
    assert torch.equal(found, wanted)
    assert bool((found >= rejected(p, 0.2, "bonferroni")).all())
    assert 0 < int(found.sum()) < 36


def test_the_overlap_bound_is_the_least_over_all_tops_that_a_change_could_make(trained: Classifier) -> None:
    interpreter = SparsifiedMap(trained, CAM(trained), samples=60, sigma=0.2, radius=0.05, top=0.5, alpha=0.3, grid=3)
    low, high = bounds(60, 0.3 / 18, "hoeffding")
    for seed in range(12):
        hits = torch.randint(0, 61, (9,), generator=torch.Generator().manual_seed(seed))
        k, order = 4, hits.argsort(descending=True, stable=True).tolist()
        # The least and the largest share of each cell within the radius.
        least = torch.special.ndtr(torch.special.ndtri(low[hits]) - 0.25)
        most = torch.special.ndtr(torch.special.ndtri(high[hits]) + 0.25)
        possible = [
            top for top in itertools.combinations(range(9), k)
            if min(most[list(top)]) >= max(least[[i for i in range(9) if i not in top]])
        ]  # fmt: skip
        wanted = min((len(set(top) & set(order[:k])) for top in possible), default=k)
        found = interpreter._certificate(hits.reshape(1, 3, 3).float())
        assert found.overlap is not None
        assert round(float(found.overlap) * k) == wanted
    assert bool(apart(torch.tensor(0.9), torch.tensor(0.1), 0.0, 1.0))


# Attacks built to break them


@pytest.fixture
def some(trained: Classifier, judged: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Six digits and the classes that are explained."""
    x = judged[0][:6]
    with torch.no_grad():
        return x, trained(x).argmax(1)


def test_no_certified_cell_is_flipped_within_the_radius_and_a_wrong_certificate_is_caught(
    trained: Classifier, some: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Certified(trained, CAM(trained), samples=60, grid=8, keep=0.3)
    assert float(certificate_of(right, *some).shares()["certified_one"].mean()) > 0.02, "hardly anything is certified"
    assert not flipped(right, *some).any()
    # The error term dropped: where so large a share of the few copies agree, of all copies it does.
    monkeypatch.setattr(certified, "rejected", lambda p, alpha, correction: p <= 0.8)
    monkeypatch.setattr(Certified, "check_draws", lambda self, size=None: None)
    assert flipped(replace(right, samples=2, choose=1), *some).any()


def test_no_top_loses_more_than_is_certified_and_a_wrong_certificate_is_caught(
    trained: Classifier, some: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Those whose certificates say something.
    some = some[0][[1, 2, 5]], some[1][[1, 2, 5]]
    right = SparsifiedMap(
        trained, CAM(trained), samples=200, sigma=0.2, keep=0.3, radius=0.05, grid=8, bound="clopper-pearson"
    )
    assert float(certificate_of(right, *some).shares()["certified_overlap"].mean()) > 0.2, (
        "hardly anything is certified"
    )
    assert not lost(right, *some).any()
    monkeypatch.setattr(
        sparsified, "bounds", lambda draws, alpha, kind: (torch.arange(draws + 1.0).double() / draws,) * 2
    )
    monkeypatch.setattr(SparsifiedMap, "check_draws", lambda self, size=None: None)
    assert lost(replace(right, samples=1, keep=0.2, radius=0.002), *some, draws=400).any()


# What the maps are


def test_a_certified_map_is_the_share_of_copies_that_mark_a_cell(
    trained: Classifier, some: tuple[Tensor, Tensor]
) -> None:
    x, classes = some[0][:2], some[1][:2]
    interpreter = Certified(trained, CAM(trained), samples=30, choose=5, tau=0.6, alpha=0.05, grid=4, keep=0.3)
    shares = torch.zeros(2, 4, 4)
    for noise in interpreter_noise(interpreter, x):
        maps = CAM(trained).explain(x + 0.15 * noise, classes, native=True).maps.abs()
        pooled = torch.nn.functional.adaptive_avg_pool2d(maps, 4).detach()
        for i in range(2):
            # 4 of 16 cells, 0.3 of them.
            places = pooled[i].flatten().argsort(descending=True)[:4]
            shares[i].view(-1)[places] += 1 / 30
    found = interpreter.explain(x, classes, native=True)
    torch.testing.assert_close(found.maps.detach(), shares)
    assert found.certificate is not None
    assert found.certificate.decided is not None
    kinds = [found.certificate.one, found.certificate.zero, found.certificate.abstain]
    assert int(sum(kind.sum() for kind in kinds if kind is not None)) == 32


def interpreter_noise(interpreter: Certified, x: Tensor) -> Tensor:
    from robustexplain.interpreters.composed.noisy_copies import noise
    from robustexplain.interpreters.gradients.smoothgrad import normal

    return noise(interpreter, x, range(interpreter.samples), normal)


def test_the_noise_does_not_depend_on_how_it_is_batched_and_changes_with_the_seed(
    trained: Classifier, some: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = some[0][:3]
    one = MeTFA(trained, CAM(trained), samples=8)
    with torch.no_grad():
        together, split = one(x), replace(one, batch_size=2)(x)
        torch.testing.assert_close(together, split)
        assert not torch.equal(one.redrawn(1)(x), together)
        monkeypatch.setattr("robustexplain.interpreters.composed.noisy_copies.KEPT", 0)
        assert torch.equal(replace(one)(x), together)


def test_metfas_maps_say_the_same_of_a_pixel(trained: Classifier, some: tuple[Tensor, Tensor]) -> None:
    smoothed = MeTFA(trained, Gradient(trained), samples=20)
    with torch.no_grad():
        mean = smoothed.explain(some[0], some[1])
        width = replace(smoothed, shown="interval").explain(some[0], some[1])
        marks = replace(smoothed, shown="significance").explain(some[0], some[1])
    assert mean.certificate is not None
    assert mean.certificate.decided is not None
    assert mean.certificate.radius == 0
    assert set(marks.maps.unique().tolist()) <= {0.0, 0.5, 1.0}
    assert torch.equal(marks.maps == 1, mean.certificate.decided == 1)
    assert float(width.maps.min()) >= 0
    assert float(mean.maps[marks.maps == 1].mean()) > 2 * float(mean.maps[marks.maps == 0].mean())


# Attacks and other parts of a system


def test_an_adaptive_attack_goes_straight_through_the_votes(trained: Classifier, some: tuple[Tensor, Tensor]) -> None:
    system = CertifiedInterpreter(samples=60, grid=8)(rx.System(trained, CAM(trained)))
    assert system.rounds
    assert system.random
    adapted = Adaptation().to(system)
    assert adapted.straight
    assert adapted.draws > 1
    assert not MeTFADefense()(rx.System(trained, CAM(trained))).rounds
    assert MeTFADefense(shown="significance")(rx.System(trained, CAM(trained))).rounds
    x = some[0][:2].clone().requires_grad_()
    (zero,) = torch.autograd.grad(system.interpreter(x, some[1][:2])[:, :16].sum(), x)
    assert not zero.any()
    with straight_through():
        (found,) = torch.autograd.grad(system.interpreter(x, some[1][:2])[:, :16].sum(), x)
    assert float(found.abs().amax()) > 0


def test_the_certificate_travels_with_the_map_where_it_holds(trained: Classifier, some: tuple[Tensor, Tensor]) -> None:
    plain = rx.System(trained, CAM(trained))
    assert plain(some[0]).certificate is None
    defense = SparsifiedSmoothGrad(samples=60, sigma=0.25, radius=0.01, grid=4)
    system = BetaSmoothing()(defense(plain))
    with torch.no_grad():
        for made, one_class in ((defense(plain), False), (system, True)):
            found = made(some[0]).certificate
            assert found is not None
            assert found.same_class is one_class
    front = with_transforms(copy.deepcopy(trained), ["median-2"])
    inner = Certified(front, CAM(front), samples=60, grid=8)
    with torch.no_grad():
        assert inner.explain(some[0]).certificate is not None
        assert OfTransformed(front, inner).explain(some[0]).certificate is None


def test_with_the_copies_own_predictions_the_certificate_asks_for_no_class(
    trained: Classifier, some: tuple[Tensor, Tensor]
) -> None:
    one = Certified(trained, Gradient(trained), samples=60, grid=8, sigma=0.5, prediction_of="copy")
    with torch.no_grad():
        own, fixed = one(some[0]), one(some[0], some[1])
        assert torch.equal(fixed, replace(one, prediction_of="input")(some[0]))
        assert not torch.equal(own, fixed)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CertifiedInterpreter(sigma=0), "sigma must be above 0"),
        (lambda: CertifiedInterpreter(tau=0.5), "tau must be above 0.5"),
        (lambda: CertifiedInterpreter(samples=10), "choose must be below samples"),
        (lambda: CertifiedInterpreter(samples=20), "samples must be at least 35"),
        (lambda: SparsifiedSmoothGrad(samples=8), r"8 draws certify nothing.*\b32 would do"),
        (lambda: SparsifiedSmoothGrad(radius=3), "a larger sigma, or a smaller radius"),
        (lambda: MeTFADefense(samples=5), "5 draws give no interval at alpha 0.05: at least 6"),
        (lambda: MeTFADefense(noise=0), "noise: must be above 0"),
    ],
)
def test_settings_that_prove_nothing_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises((InputError, FieldError), match=message):
        make()


def test_what_does_not_fit_the_inputs_is_refused_before_anything_is_computed(trained: Classifier) -> None:
    system = rx.System(trained, CAM(trained))
    table = [(torch.rand(5), 0)]
    with pytest.raises(InputError, match="inputs are table rows of 5 columns"):
        CertifiedInterpreter()(system, table)  # type: ignore[arg-type]
    assert "2 to 32 cells a side" in str(CertifiedInterpreter(grid=40, samples=200).misfit((1, 32, 32)))
    assert "samples must be at least" in str(CertifiedInterpreter(samples=50).misfit((3, 224, 224)))
    assert CertifiedInterpreter().misfit((3, 224, 224)) is None
    calls: list[int] = []
    with trained.register_forward_hook(lambda *_: calls.append(1)), pytest.raises(InputError, match="at least"):
        CertifiedInterpreter(samples=50)(system)(torch.rand(1, 1, 32, 32))
    assert not calls
    once = MeTFADefense()(system)
    with pytest.raises(UnsupportedModelError, match="made of noisy copies already: MeTFA"):
        CertifiedInterpreter()(once)


def test_the_smallest_number_of_draws_is_the_one_that_the_error_names() -> None:
    for cells in (1, 196):
        needed = certified.draws_needed(0.75, 0.001 / cells)
        assert 0.75**needed <= 0.001 / cells < 0.75 ** (needed - 1)
    assert math.isclose(MeTFASettings(6).lowest, 0)


def test_an_adversary_draws_less_where_the_map_is_a_mean_of_draws(trained: nn.Module) -> None:
    base = GradCAM(trained)
    assert draws_for(rx.System(trained, Certified(trained, base, samples=60, grid=4))) == 2
    assert draws_for(rx.System(trained, KernelSmoothed(trained, base, samples=4))) == 3
    assert draws_for(rx.System(trained, base)) == 1
    assert draws_for(rx.System(trained, SmoothGrad(trained, samples=4))) == 3
    assert draws_for(rx.System(trained, VarGrad(trained, samples=4))) == DRAWS


def overlap_of(interpreter: SparsifiedMap, x: Tensor) -> Tensor:
    found = interpreter.explain(x).certificate
    assert found is not None
    assert found.overlap is not None
    return found.overlap


@pytest.mark.parametrize("bound", ["hoeffding", "clopper-pearson"])
def test_a_surrogate_of_the_network_leaves_certificates_alone(
    trained: Classifier, some: tuple[Tensor, Tensor], bound: Bound
) -> None:
    """The bounds are kept for later: one that a softplus had spoiled would spoil every certificate after it."""
    x = some[0][:2]
    interpreter = SparsifiedMap(
        trained, Gradient(trained, of="logit"), samples=64, grid=2, radius=0.01, sigma=0.2, alpha=0.1, bound=bound
    )
    bounds.cache_clear()
    wanted = overlap_of(interpreter, x)
    bounds.cache_clear()
    with swapped(Softplus(1.0)):
        low, high = bounds(64, 0.1 / 8, bound)
        assert float(low[0]) == 0
        assert float(high[-1]) == 1
        spoiled = apart(torch.tensor(0.3), torch.tensor(0.2), 0.01, 0.2)
    assert bool(spoiled) == bool(apart(torch.tensor(0.3), torch.tensor(0.2), 0.01, 0.2))
    smoothed = Smoothed(trained, interpreter, Softplus(1.0))
    smoothed.explain(x)
    assert torch.equal(overlap_of(interpreter, x), wanted)
