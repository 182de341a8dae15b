"""Influence functions against the exact inverse Hessian, and against leaving images out and training again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.errors import InputError, UnsupportedModelError
from robustexplain.interpreters import Influence, Reference

DECAY = 0.02


class Tiny(nn.Module):
    """Smooth, 37 weights: small enough for its whole Hessian."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 3, bias=False)
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.first(x.flatten(1))) * self.scale[:4] * self.scale[4])
        return logits


class Logistic(nn.Module):
    """Logistic regression on the pixels."""

    def __init__(self, pixels: int, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(pixels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1))
        return logits


@pytest.fixture
def tiny() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Tiny().double().eval()


@pytest.fixture
def reference() -> Reference:
    rng = torch.Generator().manual_seed(2)
    return Reference(
        torch.rand(30, 1, 2, 2, generator=rng, dtype=torch.float64), torch.randint(3, (30,), generator=rng)
    )


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 1, 2, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def exact(
    model: nn.Module, names: list[str], reference: Reference, x: Tensor, target: Tensor, damping: float, ggn: bool
) -> Tensor:
    """Scores by the whole matrix: torch's own Hessian (or Jacobian), and a dense solve."""
    every = dict(model.named_parameters())
    flat = torch.cat([every[n].detach().flatten() for n in names])
    assert reference.y is not None

    def logits(w: Tensor, images: Tensor) -> Tensor:
        parts, start = {}, 0
        for n in names:
            parts[n] = w[start : start + every[n].numel()].view_as(every[n])
            start += every[n].numel()
        return torch.func.functional_call(model, parts, (images,))  # type: ignore[no-any-return]

    def losses(w: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits(w, images), labels, reduction="none")

    if ggn:
        jacobian = torch.autograd.functional.jacobian(lambda w: logits(w, reference.x), flat)
        p = logits(flat, reference.x).softmax(1).detach()
        bend = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        h = torch.einsum("nkp,nkl,nlq->pq", jacobian, bend, jacobian) / len(p)
    else:
        h = torch.autograd.functional.hessian(lambda w: losses(w, reference.x, reference.y).mean(), flat)
    h = h + damping * torch.eye(len(flat), dtype=flat.dtype)
    of_x = torch.autograd.functional.jacobian(lambda w: losses(w, x, target), flat)
    of_z = torch.autograd.functional.jacobian(lambda w: losses(w, reference.x, reference.y), flat)
    return of_x @ torch.linalg.solve(h, of_z.T)


# The exact inverse Hessian


@pytest.mark.parametrize("solver", ["cg", "lissa"])
@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
@pytest.mark.parametrize("parameters", ["all", "head"])
def test_scores_are_those_of_the_exact_inverse(
    parameters: Any, curvature: Any, solver: Any, tiny: nn.Module, reference: Reference, x: Tensor
) -> None:
    names = ["head.weight"] if parameters == "head" else [n for n, _ in tiny.named_parameters()]
    target = torch.tensor([0, 1, 2, 1])
    damping = 0.3 if solver == "cg" else 1.0
    wanted = exact(tiny, names, reference, x, target, damping, curvature == "gauss_newton")
    made = Influence(tiny, reference, parameters, curvature, damping, solver, 500, 1e-9, scale=1.2, batch_size=16)
    found = made.scores(x, target)
    assert found.shape == (4, 30)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)


def test_for_the_head_gauss_newton_is_the_hessian(tiny: nn.Module, reference: Reference, x: Tensor) -> None:
    both = [Influence(tiny, reference, "head", c, 0.1, tolerance=1e-10).scores(x) for c in ("hessian", "gauss_newton")]
    torch.testing.assert_close(both[0], both[1], rtol=1e-7, atol=1e-10)


def test_a_head_inside_a_convolutional_net(tiny_model: nn.Module, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model).double()
    reference = Reference(grey.double(), torch.tensor([0, 1, 2, 3, 0]))
    names = ["net.head.weight", "net.head.bias"]
    target = torch.tensor([1, 3])
    wanted = exact(model, names, reference, grey[:2].double(), target, 0.01, True)
    found = Influence(model, reference, damping=0.01, tolerance=1e-10).scores(grey[:2].double(), target)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


# Leaving out and training again


def fitted(x: Tensor, y: Tensor, keep: Tensor | None = None) -> Logistic:
    """The minimum of the mean loss plus ``DECAY / 2 |w|^2``; without the images that are not kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Logistic(x[0].numel(), 3).double()
    share = (torch.ones(len(y)) if keep is None else keep).double() / len(y)
    optimiser = torch.optim.LBFGS(model.parameters(), lr=1, max_iter=200, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = (share * F.cross_entropy(model(x), y, reduction="none")).sum()
        loss = loss + DECAY / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimiser.step(closure)  # type: ignore[arg-type]
    return model.eval()


def test_influence_predicts_what_leaving_an_image_out_does() -> None:
    """Koh and Liang 2017, figure 2: predicted against actual differences in loss after retraining."""
    rng = torch.Generator().manual_seed(8)
    y = torch.arange(60) % 3
    centres = torch.rand(3, 1, 3, 3, generator=rng, dtype=torch.float64)
    x = (centres[y] + 0.25 * torch.randn(60, 1, 3, 3, generator=rng, dtype=torch.float64)).clamp(0, 1)
    y = torch.where(torch.rand(60, generator=rng) < 0.1, (y + 1) % 3, y)
    tests, labels = (centres + 0.1).clamp(0, 1), torch.arange(3)
    model = fitted(x, y)
    scores = Influence(model, Reference(x, y), damping=DECAY, tolerance=1e-8).scores(tests, labels) / 60
    with torch.no_grad():
        base = F.cross_entropy(model(tests), labels, reduction="none")
        actual = torch.stack([left_out(x, y, i, tests, labels) - base for i in range(0, 60, 3)], 1)
    for row, wanted in zip(scores[:, ::3], actual, strict=True):
        assert np.corrcoef(row.detach(), wanted)[0, 1] > 0.98
        slope = float((row.detach() * wanted).sum() / wanted.square().sum())
        assert 0.8 < slope < 1.1


def left_out(x: Tensor, y: Tensor, i: int, tests: Tensor, labels: Tensor) -> Tensor:
    with torch.enable_grad():
        model = fitted(x, y, torch.arange(len(y)) != i)
    return F.cross_entropy(model(tests), labels, reduction="none")


# Derivatives


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_scores_have_the_derivative_of_finite_differences_in_the_input(
    parameters: Any, tiny: nn.Module, reference: Reference, x: Tensor
) -> None:
    influence = Influence(tiny, reference, parameters, damping=0.3, tolerance=1e-12)
    target = torch.tensor([0, 1, 2, 1])
    rng = torch.Generator().manual_seed(3)
    x = (0.1 + 0.8 * x).requires_grad_()
    weight = torch.randn(4, 30, generator=rng, dtype=x.dtype)
    direction = torch.randn(x.shape, generator=rng, dtype=x.dtype)
    scores = influence.scores(x, target)
    (gradient,) = torch.autograd.grad((scores * weight).sum(), x)
    slope = float((gradient * direction).sum())

    def value(t: float) -> float:
        with torch.no_grad():
            return float((influence.scores(x + t * direction, target) * weight).sum())

    assert abs(slope) > 1e-3
    assert slope == pytest.approx((value(1e-4) - value(-1e-4)) / 2e-4, rel=1e-6)


def test_one_sign_step_pushes_the_most_helpful_image_down(tiny: nn.Module, reference: Reference, x: Tensor) -> None:
    """The attack of Ghorbani et al. 2019, section 2: one step against the most influential training images."""
    influence = Influence(tiny, reference, damping=0.1)
    target = tiny(x).argmax(1)
    top = influence.top(x, 3, target).indices
    x = (0.1 + 0.8 * x).requires_grad_()
    before = influence.scores(x, target).gather(1, top).sum(1)
    (gradient,) = torch.autograd.grad(before.sum(), x)
    after = influence.scores(x.detach() - 8 / 255 * gradient.sign(), target).gather(1, top).sum(1)
    assert (after < before).all()


# The most influential images


def test_top_gives_the_largest_and_harmful_the_smallest(tiny: nn.Module, reference: Reference, x: Tensor) -> None:
    influence = Influence(tiny, reference, damping=0.1)
    scores = influence.scores(x)
    helpful, harmful = influence.top(x, 4), influence.top(x, 4, harmful=True)
    order = scores.argsort(1, descending=True)
    assert torch.equal(helpful.indices, order[:, :4])
    assert torch.equal(harmful.indices, order.flip(1)[:, :4])
    torch.testing.assert_close(helpful.scores, scores.gather(1, helpful.indices).detach())
    assert not helpful.scores.requires_grad
    with pytest.raises(InputError, match="k must lie between 1 and the 30 training images, got 31"):
        influence.top(x, 31)


def test_an_image_of_the_training_set_helps_itself(trained: nn.Module, judged: tuple[Tensor, Tensor]) -> None:
    x, y = judged
    found = Influence(trained, Reference(x, y), damping=1e-2).scores(x[:10], y[:10])
    itself = found[torch.arange(10), torch.arange(10)]
    assert (itself > 0).all()
    same = y[None] == y[:10, None]
    means = [float(found[same].mean()), float(found[~same].mean())]
    assert means[0] > 0 > means[1]


# The contract


@pytest.mark.parametrize("parameters", ["head", "all"])
def test_scores_do_not_depend_on_the_batch_and_leave_the_model_alone(
    parameters: Any, tiny_model: nn.Module, grey: Tensor
) -> None:
    model = copy.deepcopy(tiny_model).double()
    reference = Reference(grey.double(), torch.tensor([0, 1, 2, 3, 0]))
    next(model.parameters()).requires_grad_(False)
    flags = [(id(p), p.requires_grad, float(p.detach().sum())) for p in model.parameters()]
    influence = Influence(model, reference, parameters, damping=0.5, iterations=2000, tolerance=1e-8)
    given, state = grey[:3].double(), torch.get_rng_state()
    together = influence.scores(given)
    torch.testing.assert_close(
        together, torch.cat([influence.scores(row[None]) for row in given]), rtol=1e-6, atol=1e-9
    )
    assert [(id(p), p.requires_grad, float(p.detach().sum())) for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        torch.testing.assert_close(influence.scores(given), together)
    assert not together.requires_grad


def test_float32_agrees_with_float64(tiny_model: nn.Module, grey: Tensor) -> None:
    y = torch.tensor([0, 1, 2, 3, 0])
    found = Influence(tiny_model, Reference(grey, y), damping=0.1).scores(grey[:2])
    double = copy.deepcopy(tiny_model).double()
    wanted = Influence(double, Reference(grey.double(), y), damping=0.1).scores(grey[:2].double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def negative(model: nn.Module, reference: Reference, x: Tensor) -> Tensor:
    return Influence(model, reference, "all", "hessian", 0.0, iterations=200).scores(x)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda m, r, x: Influence(m, Reference(r.x)), "needs a Reference with the labels"),
        (lambda m, r, x: Influence(m, r.x), "needs a Reference with the labels"),
        (lambda m, r, x: Influence(lambda x: x, r), r"torch\.nn\.Module, got function"),
        (lambda m, r, x: Influence(m, r, damping=-1.0), "Influence.damping must be at least 0"),
        (lambda m, r, x: Influence(m, r, solver="qr"), "Influence.solver must be one of 'cg', 'lissa', got 'qr'"),
        (lambda m, r, x: Influence(m, r).scores(x + 1), r"\[0, 1\]"),
        (lambda m, r, x: Influence(m, r).scores(x[..., :1]), r"holds images \[1, 2, 2\], got \[1, 2, 1\]"),
        (lambda m, r, x: Influence(m, r).scores(x, torch.tensor([0, 1, 2, 3])), "target holds class 3"),
        (lambda m, r, x: Influence(m, Reference(r.x, r.y + 1)).scores(x), "reference.y holds class 3"),
        (lambda m, r, x: Influence(m, r, damping=1e-6, iterations=2).scores(x), "cg did not converge in 2 iterations"),
        (lambda m, r, x: Influence(m, r, solver="lissa", scale=0.02).scores(x), "lissa did not converge.*raise scale"),
        (negative, "not positive definite.*raise damping, or use curvature='gauss_newton'"),
    ],
)
def test_bad_input_and_failed_solves_are_refused(
    ask: Callable[[nn.Module, Reference, Tensor], object],
    message: str,
    tiny: nn.Module,
    reference: Reference,
    x: Tensor,
) -> None:
    with pytest.raises(InputError, match=message):
        ask(tiny, reference, x)


def test_logits_that_are_no_linear_layers_output_need_all_parameters(reference: Reference, x: Tensor) -> None:
    class Doubled(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = Doubled().double().eval()
    with pytest.raises(UnsupportedModelError, match="not the output of a linear layer; use parameters='all'"):
        Influence(model, reference).scores(x)
    assert Influence(model, reference, "all", damping=0.1).scores(x).shape == (4, 30)


def test_a_model_in_train_mode_is_refused(tiny: nn.Module, reference: Reference, x: Tensor) -> None:
    with pytest.raises(InputError, match="train mode"):
        Influence(tiny.train(), reference).scores(x)
