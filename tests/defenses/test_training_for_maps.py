"""Trainings that make maps steady: their losses, and what they claim, against a fine-tuning of the same length."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import maps as ops
from robustexplain import models
from robustexplain.attacks import PGD
from robustexplain.autograd.rectifiers import Softplus, swapped
from robustexplain.data import Data, stack, take
from robustexplain.defenses import (
    FineTuned,
    GradientAlignment,
    ImageAlignment,
    InputGradientPenalty,
    RankThickness,
    Retrained,
    RobustAttribution,
    SmoothCurvature,
    SmoothSurface,
)
from robustexplain.defenses.models.distances import cosine, dissimilarity
from robustexplain.defenses.models.input_gradients import classified, gradient, score
from robustexplain.defenses.models.loss_module import HardeningLoss, LossModule
from robustexplain.defenses.models.rank_thickness import overtaking, size
from robustexplain.defenses.models.smooth_surface import drawn, largest_eigenvalue
from robustexplain.errors import FieldError, InputError, UnsupportedModelError
from robustexplain.models import Classifier
from robustexplain.training import Samples, Training, TrainingStep, cross_entropy, fit

NOW = TrainingStep(3, 1, 0.5)
WITHIN = PGD(0.1, steps=3, step_size=0.05, random_start=True)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    """Two layers of rectifiers on colour images of six pixels, four classes, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        layers = nn.Sequential(nn.Flatten(), nn.Linear(18, 12), nn.ReLU(), nn.Linear(12, 4))
    with torch.no_grad():
        layers[3].weight.mul_(4)
    return layers.double().eval()


@pytest.fixture(scope="module")
def batch() -> tuple[Tensor, Tensor]:
    """Three images and their labels."""
    rng = torch.Generator().manual_seed(2)
    return torch.rand(3, 3, 2, 3, generator=rng, dtype=torch.float64), torch.tensor([2, 0, 3])


def value_of(defense: FineTuned, net: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, HardeningLoss, int]:
    """The losses, the loss, and how many inputs the network was shown for its terms."""
    loss = defense._loss(net, x[:1])
    others, shown = loss.others(x, y, NOW), []
    handle = net.register_forward_hook(lambda _m, given, _o: shown.append(len(given[0])))
    found: Tensor = LossModule(net, net)(x, loss.terms, y, NOW, others)
    handle.remove()
    assert torch.equal(found.detach(), loss(LossModule(net, net), x, y, NOW).detach())
    return found, loss, sum(shown)


def slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a function of one input, by itself."""
    return torch.autograd.functional.jacobian(function, x)[0]


def entropy(net: nn.Module, label: int) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(net(x), torch.tensor([label]))[None]


def logit(net: nn.Module, label: int) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x)[:, label]


# --- the losses ---


@pytest.mark.parametrize("of", ["cross_entropy", "certainty"])
def test_the_penalty_is_that_of_each_samples_own_gradient(
    of: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    found, _, shown = value_of(InputGradientPenalty(weight=3.0, score=of), net, x, y)  # type: ignore[arg-type]
    assert shown == 3
    for i in range(3):
        own = entropy(net, int(y[i]))
        score = own if of == "cross_entropy" else lambda z: -net(z).log_softmax(1).mean(1)
        expected = own(x[i : i + 1]) + 1.5 * slope(score, x[i : i + 1]).square().sum()
        torch.testing.assert_close(found[i : i + 1], expected)


@pytest.mark.parametrize("channels", ["mean", "all"])
def test_ssrs_eigenvalue_is_that_of_the_full_hessian(
    channels: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    found, _, shown = value_of(SmoothSurface(alpha=0.4, scale=2.0, channels=channels), net, x, y)  # type: ignore[arg-type]
    assert shown == 3
    for i in range(3):
        own = entropy(net, int(y[i]))
        full = torch.autograd.functional.hessian(lambda z: own(z)[0], x[i : i + 1]).reshape(3, 6, 3, 6)  # noqa: B023
        matrix = full.mean((0, 2)) if channels == "mean" else full.reshape(18, 18)
        expected = 0.6 * own(x[i : i + 1]) + 0.8 * torch.linalg.eigvalsh(matrix)[-1]
        torch.testing.assert_close(found[i : i + 1], expected)
    # A sure network, whose probabilities underflow, has a finite gradient.
    sure = copy.deepcopy(net).float()
    with torch.no_grad():
        sure[3].weight.mul_(1e4)
    value_of(SmoothSurface(), sure, x.float(), y)[0].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in sure.parameters() if p.grad is not None)


def test_ssrs_eigenvalue_is_not_one_of_half_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's autocast, unlike the CPU's, gives eigenvalues what products of matrices made half."""
    given: list[torch.dtype] = []
    real = torch.linalg.eigvalsh

    def eigvalsh(values: Tensor) -> Tensor:
        given.append(values.dtype)
        return real(values)

    monkeypatch.setattr(torch.linalg, "eigvalsh", eigvalsh)
    jacobian, log_p = torch.randn(2, 6, 3), torch.randn(2, 3).log_softmax(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = largest_eigenvalue(jacobian, log_p)
    assert given == [torch.float32]
    assert torch.equal(found, largest_eigenvalue(jacobian, log_p))


def test_ssr_of_some_classes_is_that_of_a_classifier_that_only_knows_these(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    found, loss, _ = value_of(SmoothSurface(alpha=0.5, scale=1.0, classes=2, channels="all"), net, x, y)
    chosen = drawn(y, 4, 2, loss.others(x, y, NOW)[0])
    assert torch.equal(chosen[:, 0], y)
    assert not bool((chosen[:, 1] == y).any())
    for i in range(3):
        few = lambda z, i=i: F.cross_entropy(net(z)[:, chosen[i]], torch.tensor([0]))  # noqa: E731
        matrix = torch.autograd.functional.hessian(few, x[i : i + 1]).reshape(18, 18)
        expected = (entropy(net, int(y[i]))(x[i : i + 1]) + torch.linalg.eigvalsh(matrix)[-1]) / 2
        torch.testing.assert_close(found[i : i + 1], expected)
    rows = drawn(torch.arange(50) % 7, 7, 4, torch.arange(50))
    assert all(len(set(row)) == 4 for row in rows.tolist())
    assert set(rows[:, 1:].flatten().tolist()) == set(range(7))


@pytest.mark.parametrize("of", ["label", "cross_entropy"])
def test_the_curvature_is_an_estimate_of_the_hessians_norm(
    of: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    smooth = nn.Sequential(net[0], net[1], nn.Softplus(3), net[3])
    found, loss, shown = value_of(SmoothCurvature(weight=0.5, draws=2, score=of), smooth, x, y)  # type: ignore[arg-type]
    assert shown == 3
    directions = loss.others(x, y, NOW)
    assert len(directions) == 2
    assert not torch.equal(*directions)
    # Scaled unit vectors in place of draws give the norm itself.
    units = tuple(unit.expand_as(x) * 18**0.5 for unit in torch.eye(18).double().reshape(18, 1, 3, 2, 3))
    norms = loss.curvature(smooth, x, y, units)  # type: ignore[attr-defined]
    for i in range(3):
        own, label = entropy(smooth, int(y[i])), logit(smooth, int(y[i]))
        score = label if of == "label" else own
        full = torch.autograd.functional.hessian(lambda z: score(z)[0], x[i : i + 1]).reshape(18, 18)  # noqa: B023
        torch.testing.assert_close(norms[i], full.square().sum())
        products = [(full @ v[i].flatten()).square().sum() for v in directions]
        torch.testing.assert_close(found[i : i + 1], own(x[i : i + 1]) + 0.25 * sum(products))


@pytest.mark.parametrize("neighbour", ["uniform", "gaussian", "gradient", "sign"])
def test_aga_compares_the_gradients_at_an_input_and_at_its_neighbour(
    neighbour: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    smooth = nn.Sequential(net[0], net[1], nn.Softplus(3), net[3])
    defense = GradientAlignment(l2=2.0, cosine=3.0, eps=0.05, neighbour=neighbour, detach=False)  # type: ignore[arg-type]
    found, loss, shown = value_of(defense, smooth, x, y)
    assert shown == 6
    for i in range(3):
        label, own = logit(smooth, int(y[i])), x[i : i + 1]
        g = slope(label, own)
        drawn_noise = loss.others(x, y, NOW)
        step = {"sign": 0.05 * g.sign(), "gradient": 0.05 * 18**0.5 * g / g.norm()}
        z = drawn_noise[0][i] if drawn_noise else step[neighbour][0]
        assert float(z.norm()) == pytest.approx(0.05 * 18**0.5, rel=0.6 if drawn_noise else 1e-9)
        near = slope(label, (own + z).clamp(0, 1))
        turned = (1 - F.cosine_similarity(g.flatten(), near.flatten(), dim=0)) / 2
        expected = entropy(smooth, int(y[i]))(own) + 2 * (g - near).square().sum() + 3 * turned
        torch.testing.assert_close(found[i : i + 1], expected)
    # A detached input's gradient is a constant: same value, another gradient to the weights.
    other = value_of(replace(defense, detach=True), smooth, x, y)[0]
    torch.testing.assert_close(other, found)
    weight = smooth[1].weight
    pulls = [torch.autograd.grad(v.sum(), weight)[0] for v in (found, other)]
    assert not torch.allclose(*pulls)


@pytest.mark.parametrize("task", ["clean", "attacked"])
@pytest.mark.parametrize("distance", ["path", "pearson", "cosine"])
def test_rar_adds_the_distance_of_attributions(
    distance: str, task: str, net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    settings = {"distance": distance, "task": task, "points": 4, "inner_points": 2}
    defense = RobustAttribution(attack=WITHIN, weight=0.7, **settings)  # type: ignore[arg-type]
    found, loss, shown = value_of(defense, net, x, y)
    assert shown == (15 - 3 * (task == "attacked") if distance == "path" else 24)
    (forged,) = loss.others(x, y, NOW)
    assert 0 < float((forged - x).abs().max()) <= 0.1 + 1e-9
    for i in range(3):
        own, label = entropy(net, int(y[i])), logit(net, int(y[i]))
        a, b = x[i : i + 1], forged[i : i + 1]
        if distance == "path":
            inner = sum(slope(own, a + k / 4 * (b - a)) for k in (1, 2, 3, 4)) / 4
            moved = ((b - a) * inner).abs().sum()
        else:
            maps = [(v * sum(slope(label, k / 4 * v) for k in (1, 2, 3, 4)) / 4).flatten() for v in (a, b)]
            if distance == "pearson":
                maps = [v - v.mean() for v in maps]
            moved = 1 - F.cosine_similarity(*maps, dim=0)
        torch.testing.assert_close(found[i : i + 1], own(b if task == "attacked" else a) + 0.7 * moved)


def test_rars_inner_attack_maximises_the_distance_or_the_whole(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    strong = replace(WITHIN, steps=12, step_size=0.03)
    for task in ("clean", "attacked"):
        for distance in ("path", "cosine"):
            weak, better = (
                RobustAttribution(  # type: ignore[call-arg]
                    attack=attack,
                    points=4,
                    inner_points=4,
                    distance=distance,
                    task=task,  # type: ignore[arg-type]
                )
                for attack in (replace(WITHIN, steps=1, step_size=1e-9), strong)
            )
            before, after = (value_of(defense, net, x, y)[0].detach() for defense in (weak, better))
            assert bool((after > before).all()), (task, distance)


def test_art_is_a_triplet_loss_of_an_image_and_its_gradients(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    x, y = batch
    found, loss, shown = value_of(ImageAlignment(attack=WITHIN, weight=0.6, k=5), net, x, y)
    assert shown == 6
    (forged,) = loss.others(x, y, NOW)
    for i in range(3):
        images = x[i : i + 1], forged[i : i + 1]
        rival = [int(net(v)[0].argsort(descending=True)[int(net(v)[0].argmax() == y[i])]) for v in images]
        label = [slope(logit(net, int(y[i])), v).flatten() for v in images]
        other = [slope(logit(net, r), v).flatten() for r, v in zip(rival, images, strict=True)]
        value = torch.zeros((), dtype=torch.float64)
        for v in images:
            far = max(1 - F.cosine_similarity(v.flatten(), g, dim=0) for g in label)
            near = min(1 - F.cosine_similarity(v.flatten(), g, dim=0) for g in other)
            value = value + (far - near).exp().log1p() / 2
        torch.testing.assert_close(found[i : i + 1], entropy(net, int(y[i]))(forged[i : i + 1]) + 0.6 * value)


def test_r2et_adds_the_margin_at_the_kth_rank_and_a_finite_difference(
    net: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    x, y = batch
    k, smooth = 2, nn.Sequential(net[0], net[1], nn.Softplus(3), net[3])
    plain = RankThickness(k=k, ranks=3.0, curvature=2.0, adaptive=False, h=1e-4)
    found, _, shown = value_of(plain, smooth, x, y)
    adapted = value_of(replace(plain, adaptive=True), smooth, x, y)[0]
    assert shown == 6
    for i in range(3):
        own = entropy(smooth, int(y[i]))
        g = slope(own, x[i : i + 1])
        m = g.abs().sum(1).flatten().sort(descending=True).values
        pairs = [(j, k - 1) for j in range(k - 1)] + [(k - 1, k + j) for j in range(k)]
        ranks = sum(m[low] - m[high] for high, low in pairs)
        full = torch.autograd.functional.hessian(lambda z: own(z)[0], x[i : i + 1]).reshape(18, 18)  # noqa: B023
        bend = (full @ g.sign().flatten() / 18**0.5).norm()
        task = own(x[i : i + 1])[0]
        torch.testing.assert_close(found[i], task + 3 * ranks + 2 * bend, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(adapted[i], task + (2.0 - 3.0) * (task + 1))
    assert bool((overtaking(x, 3) <= 0).all())


def test_similarities_keep_their_gradient_on_tiny_maps_and_have_none_on_empty_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 12, generator=rng), torch.rand(2, 12, generator=rng)
    for how, reference in (("cosine", F.cosine_similarity(a, b)), ("pearson", ops.correlation(a, b))):
        for scale in (1.0, 1e-25):
            tiny = (scale * a).requires_grad_()
            found = dissimilarity(tiny, scale * b, how)  # type: ignore[arg-type]
            torch.testing.assert_close(found, 1 - reference)
            found.sum().backward()
            assert tiny.grad is not None
            assert bool((tiny.grad != 0).any())
        empty = torch.zeros_like(a).requires_grad_()
        found = dissimilarity(empty, b, how)  # type: ignore[arg-type]
        found.sum().backward()
        assert not bool(found.any())
        assert empty.grad is not None
        assert not bool(empty.grad.any())
    assert torch.equal(cosine(torch.zeros_like(a), b), torch.ones(2))


# --- what they claim ---

TRAINING = Training(epochs=4, batch_size=32, lr=2e-3, weight_decay=0.0)


@pytest.fixture(scope="module")
def small(digits: Data) -> tuple[nn.Module, Samples, Tensor, Tensor]:
    """A network trained on noisy digits of eight pixels, its samples, and others that judge."""
    parts = [stack(part) for part in (take(digits.train, 448), take(digits.test, 128))]
    rng = torch.Generator().manual_seed(0)
    noisy = [(F.avg_pool2d(x, 4) + 0.2 * torch.randn(len(x), 1, 8, 8, generator=rng)).clamp(0, 1) for x, _ in parts]
    data = TensorDataset(noisy[0], parts[0][1])
    model = models.build("small-cnn", num_classes=10, in_channels=1)
    fit(model, cross_entropy, data, Training(epochs=4, batch_size=32, lr=1e-2), name="small")
    return model, TensorDataset(*(part[:256] for part in data.tensors)), noisy[1], parts[1][1]


def input_gradients(model: nn.Module, x: Tensor, y: Tensor, of: str = "label") -> Tensor:
    given, logits = classified(model, x)
    return gradient(score(logits, y, of), given, graph=False).flatten(1)  # type: ignore[arg-type]


def loss_slope(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(input_gradients(model, x, y, "cross_entropy").norm(dim=1).mean())


def curvature(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with swapped(Softplus(3.0)):
        loss = SmoothCurvature()._loss(model, x[:1])
        return float(loss.curvature(model, x, y, loss.others(x, y, NOW)).detach().mean())  # type: ignore[attr-defined]


def surface(model: nn.Module, x: Tensor, y: Tensor) -> float:
    loss = SmoothSurface(alpha=1.0, scale=1.0)._loss(model, x[:1])
    return float(loss.terms(model, x, y, NOW, ()).detach().mean())


def path_length(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The distance that a stronger attack than the training's finds, with more points."""
    strong = PGD(0.1, steps=5, step_size=0.03, random_start=True)
    x, y, loss = x[:48], y[:48], RobustAttribution(attack=strong, points=6, inner_points=6)._loss(model, x[:1])
    return float((loss(LossModule(model, model), x, y, NOW) - loss.task(model(x), y)).detach().mean())


def noisy(x: Tensor) -> Tensor:
    return (x + 0.15 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)


def turn_under_noise(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float(1 - F.cosine_similarity(*(input_gradients(model, v, y) for v in (x, noisy(x)))).mean())


def lost_of_the_top(model: nn.Module, x: Tensor, y: Tensor, k: int = 16) -> float:
    """Share of the top pixels of the loss's gradient that noise replaces."""
    a, b = (ops.top_k(input_gradients(model, v, y, "cross_entropy").abs(), k) for v in (x, noisy(x)))
    return 1 - float((a * b).sum(1).mean()) / k


def unlike_the_image(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """How much farther from the image the label's gradient is than its rival's, as odds."""
    image = x.flatten(1) - 0.5
    near, far = (F.cosine_similarity(input_gradients(model, x, y, of), image) for of in ("label", "runner_up"))
    return float((far - near).exp().mean())


@dataclass(frozen=True)
class Claim:
    """A training, the same without what it is for, what falls, and to which share of the control's at most."""

    defense: FineTuned
    control: FineTuned
    figure: Callable[[nn.Module, Tensor, Tensor], float]
    share: float


WEAK = replace(WITHIN, steps=2)
PLAIN = Retrained(norms="eval", training=TRAINING)
SMOOTH = replace(PLAIN, softplus=3.0)
CLAIMS = {
    "input-gradient-penalty": Claim(InputGradientPenalty(weight=4.0, training=TRAINING), PLAIN, loss_slope, 0.8),
    "ssr": Claim(SmoothSurface(training=TRAINING), PLAIN, surface, 0.75),
    "smooth-curvature": Claim(SmoothCurvature(weight=1e-2, training=TRAINING), SMOOTH, curvature, 0.3),
    "aga": Claim(GradientAlignment(cosine=10.0, eps=0.15, neighbour="sign", training=TRAINING), SMOOTH,
                 turn_under_noise, 0.85),
    "rar": Claim(RobustAttribution(attack=WEAK, points=3, inner_points=2, training=TRAINING), PLAIN, path_length, 0.6),
    "art": Claim(ImageAlignment(attack=WEAK, weight=5.0, training=TRAINING), PLAIN, unlike_the_image, 0.95),
    "r2et": Claim(RankThickness(k=16, softplus=3.0, ranks=0.5, curvature=0.5, training=TRAINING), SMOOTH,
                  lost_of_the_top, 0.92),
}  # fmt: skip


@pytest.fixture(scope="module")
def controls(small: tuple[nn.Module, Samples, Tensor, Tensor]) -> dict[FineTuned, nn.Module]:
    """The networks that the trainings must beat."""
    return {defense: defense.hardened(*small[:2]) for defense in (PLAIN, SMOOTH)}


@pytest.mark.parametrize("name", list(CLAIMS))
def test_it_lowers_what_it_says_against_a_plain_fine_tuning(
    name: str, small: tuple[nn.Module, Samples, Tensor, Tensor], controls: dict[FineTuned, nn.Module]
) -> None:
    claim, (trained, data, x, y) = CLAIMS[name], small
    control, hardened = controls[claim.control], claim.defense.hardened(trained, data)
    figures = [claim.figure(model, x, y) for model in (control, hardened)]
    accuracy = [float((model(x).argmax(1) == y).float().mean()) for model in (control, hardened)]
    print(f"{name}: {figures[0]:.4g} to {figures[1]:.4g}, accuracy {accuracy[0]:.0%} to {accuracy[1]:.0%}")
    assert figures[1] < claim.share * figures[0]
    assert accuracy[1] > accuracy[0] - 0.2


# --- the door ---


def test_what_has_nothing_to_learn_from_is_refused(trained: Classifier, digits: Data) -> None:
    data = take(digits.train, 20)
    for make in (RobustAttribution, ImageAlignment):
        with pytest.raises(FieldError, match=r"attack\.eps must be above 0"):
            make(attack=PGD(0.0))
    with pytest.raises(FieldError, match=r"GradientAlignment\.eps must be above 0"):
        GradientAlignment(eps=0.0)
    with pytest.raises(FieldError, match=r"ranks must be above 0, or curvature must be"):
        RankThickness(ranks=0.0, curvature=0.0)
    with pytest.raises(FieldError, match=r"ImageAlignment\.k must be a whole count, or a share"):
        ImageAlignment(k=1.5)
    with pytest.raises(UnsupportedModelError, match="is zero already, as that of rectifiers is: set softplus"):
        SmoothCurvature(softplus=None).hardened(trained, data)
    with pytest.raises(InputError, match="first 2 k = 1200 pixels, and an input has 1024"):
        RankThickness(k=600).hardened(trained, data)
    many = nn.Sequential(nn.Flatten(), nn.Linear(1024, 8), nn.ReLU(), nn.Linear(8, 300)).eval()
    with pytest.raises(InputError, match="backward pass of every class, and this network has 300: set classes"):
        SmoothSurface().hardened(many, data)
    with pytest.raises(InputError, match="two classes of a sample at least"):
        SmoothSurface(classes=1).hardened(many, data)
    settings = Training(epochs=1, batch_size=20)
    assert isinstance(SmoothSurface(classes=3, training=settings).hardened(many, data), nn.Module)


@pytest.mark.parametrize("beta", [-1.0, 0.0, float("inf"), float("nan"), True])
def test_a_softplus_that_is_none_is_refused_at_once(beta: float) -> None:
    with pytest.raises(FieldError, match=r"Retrained\.softplus must be"):
        Retrained(softplus=beta)


def test_the_size_of_hardly_anything_has_the_slope_of_its_direction() -> None:
    """A confident network leaves gradients whose squares are nothing in float32: a curvature alone ended in NaN."""
    rows = torch.tensor([[3e-22, -4e-22], [3.0, -4.0], [0.0, 0.0]], requires_grad=True)
    found = size(rows)
    (slope,) = torch.autograd.grad(found.sum(), rows)
    torch.testing.assert_close(found.detach(), torch.tensor([5e-22, 5.0, 0.0]), rtol=1e-6, atol=0)
    torch.testing.assert_close(slope, torch.tensor([[0.6, -0.8], [0.6, -0.8], [0.0, 0.0]]))
