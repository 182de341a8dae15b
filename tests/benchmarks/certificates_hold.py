"""Whether any certificate is broken on many images: ``PYTHONPATH=. python tests/benchmarks/certificates_hold.py``.

Certificates of 200 digits (CAM; gradients of fewer) are attacked within their radius: on the map inside, on the
smoothed map, over fresh draws, and by ``auto`` (it moves the map inside, at the eps whose corners are at that radius;
of a few digits the shares of noisy copies too). All are judged by fresh draws, and so are certificates without their
error term. Ends non-zero where more inputs are broken than the certificates' own chance of error explains, or where the
wrong certificates are not caught.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

import robustexplain as rx
from robustexplain import attacks, models
from robustexplain import data as data_sets
from robustexplain.interpreters import CAM, Certified, Gradient, Interpreter, Sparsified
from robustexplain.interpreters.composed import certified, sparsified
from robustexplain.interpreters.composed.binomial import tails
from robustexplain.training import Training, cross_entropy, fit
from tests.defenses.breaking import certificate_of, flipped, lost

CHANCE = 1e-3
"""The chance of that many broken inputs among certificates that hold, below which they do not."""


@dataclass(frozen=True)
class Case:
    """An interpreter with one kind of certificate, and who counts what is broken."""

    method: Certified | Sparsified
    broken: Callable[..., Tensor]
    says: str


def cases(base: Interpreter, grid: int) -> tuple[Case, Case]:
    """Settings with which something is certified."""
    tops = Sparsified(
        base.model, base, samples=200, sigma=0.12, keep=0.3, radius=0.03, grid=grid, bound="clopper-pearson"
    )
    return (
        Case(Certified(base.model, base, sigma=0.08, keep=0.5, grid=grid), flipped, "certified_one"),
        Case(tops, lost, "certified_overlap"),
    )


def main() -> int:
    """Train a small classifier, certify and attack; 0 if all certificates hold and the wrong ones do not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--gradients", type=int, default=50, help="images of which gradients are certified")
    parser.add_argument("--through", type=int, default=12, help="images on which auto goes through the copies")
    parser.add_argument("--draws", type=int, default=600, help="fresh draws that judge an input that looks broken")
    asked = parser.parse_args()
    # A quarter of the pixels that digits have elsewhere: the same certificates and attacks at a quarter of the cost.
    data = data_sets.load("digits", size=16)
    model = models.build("small-cnn", num_classes=data.num_classes, in_channels=1)
    fit(model, cross_entropy, data.train, Training(epochs=6, batch_size=32, lr=1e-2), name="it")
    model.eval().requires_grad_(False)
    x, y = data_sets.stack(data_sets.take(data.test, asked.images))
    with torch.no_grad():
        print(f"{len(x)} images, accuracy {float((model(x).argmax(1) == y).float().mean()):.3f}", flush=True)
    cam, gradient = CAM(model), Gradient(model, of="logit", channels="abs_sum")
    missed = sum(not caught(case, x, asked.draws) for case in cases(cam, 4))
    wrong = sum(beyond_chance(case, x, asked.draws, asked.through) for case in cases(cam, 4))
    wrong += sum(beyond_chance(case, x[: asked.gradients], asked.draws, 0) for case in cases(gradient, 8))
    return wrong + missed


def beyond_chance(case: Case, x: Tensor, draws: int, through: int) -> bool:
    """Whether more inputs are broken than the chance of error explains; prints how many."""
    share, broken = measured(case, x, draws, through)
    count, alpha = int(broken.sum()), case.method.alpha
    name = f"{type(case.method.base).__name__}, {case.says} {float(share.mean()):.3f} ({int((share > 0).sum())} inputs)"
    print(f"{name}: {count} of {len(x)} broken within L2 {case.method.radius:.3f}; alpha {alpha}", flush=True)
    return float(tails(len(x), alpha)[count]) < CHANCE


def caught(case: Case, x: Tensor, draws: int) -> bool:
    """Whether certificates without their error term are found to be wrong on the same inputs."""
    # Where so large a share of the few copies agree, of all copies it does.
    as_they_are = mock.patch.object(certified, "rejected", lambda p, alpha, correction: p <= 0.8)
    exact = mock.patch.object(sparsified, "bounds", lambda n, alpha, kind: (torch.arange(n + 1.0).double() / n,) * 2)
    few = (
        {"samples": 2, "choose": 1}
        if isinstance(case.method, Certified)
        else {"samples": 1, "keep": 0.2, "radius": 0.002}
    )
    unchecked = mock.patch.object(type(case.method), "check_draws", return_value=None)
    with as_they_are, exact, unchecked:
        _, broken = measured(replace(case, method=replace(case.method, **few)), x, draws, 0, aimed=False)
    print(f"{case.says} without its error term: {int(broken.sum())} of {len(x)} broken", flush=True)
    return float(tails(len(x), case.method.alpha)[int(broken.sum())]) < CHANCE


def measured(case: Case, x: Tensor, draws: int, through: int, aimed: bool = True) -> tuple[Tensor, Tensor]:
    """What is certified of each input, and whether it is broken."""
    shares, broken, method = [], [], case.method
    for start, part in zip(range(0, len(x), 50), x.split(50), strict=False):
        with torch.no_grad():
            classes = method.model(part).argmax(1)
        others = [moved_by_auto(method.base, method.radius, part, classes)] if aimed else []
        left = max(0, min(through - start, len(part)))
        if left:
            votes = copies(method)
            moved = moved_by_auto(votes, method.radius, part[:left], classes[:left])
            others.append(torch.cat([moved, part[left:]]))
        shares.append(certificate_of(method, part, classes).shares()[case.says])
        broken.append(case.broken(method, part, classes, draws, others))
    return torch.cat(shares), torch.cat(broken)


@dataclass(frozen=True, eq=False)
class Attacked(Certified):
    """Shares over copies that stay the same: an average over more draws at each step would take hours."""

    @property
    def random(self) -> bool:
        """No."""
        return False


def copies(method: Certified | Sparsified) -> Attacked:
    """The shares of twelve copies of that noise, with settings for which twelve are enough."""
    base, sigma, keep, grid = method.base, method.sigma, method.keep, method.grid
    lax = {"tau": 0.51, "alpha": 0.5}
    return Attacked(base.model, base, samples=12, choose=1, sigma=sigma, keep=keep, grid=grid, seed=12345, **lax)


def moved_by_auto(interpreter: Interpreter, radius: float, x: Tensor, classes: Tensor) -> Tensor:
    """Inputs within ``radius`` whose map the standard attacker moved, with the same prediction."""
    eps = 0.999 * radius / x[0].numel() ** 0.5
    found = attacks.Auto(eps, aim="move")(rx.System(interpreter.model, interpreter), x, classes).x
    assert bool(((found - x).flatten(1).norm(dim=1) <= radius).all())
    return found


if __name__ == "__main__":
    sys.exit(main())
