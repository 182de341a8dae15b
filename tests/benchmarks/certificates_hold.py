"""Whether any certificate is broken on many images: ``python tests/benchmarks/certificates_hold.py --images 200``.

Three attacks within each certificate's radius (on the map inside, on the smoothed map, over fresh draws), judged by
fresh draws. Prints how much is certified and how much of that is broken; the last line is of a certificate without its
error term. Ends non-zero where a certificate is broken.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from robustexplain import data as data_sets
from robustexplain import models
from robustexplain.interpreters import CAM, Certified, GradCAM, Gradient, Interpreter, Sparsified
from robustexplain.interpreters.composed import certified
from robustexplain.training import Training, cross_entropy, fit
from tests.defenses.breaking import certificate_of, flipped, lost


def main() -> int:
    """Train a small classifier, certify and attack; the number of broken statements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--draws", type=int, default=300, help="fresh draws that judge an attacked input")
    asked = parser.parse_args()
    data = data_sets.load(asked.data)
    model = models.build("small-cnn", num_classes=data.num_classes, in_channels=data.shape[0])
    fit(
        model,
        cross_entropy,
        data_sets.take(data.train, min(1000, len(data.train))),
        Training(epochs=6, batch_size=32, lr=1e-2),
        name="it",
    )
    model.eval().requires_grad_(False)
    x, _ = data_sets.stack(data_sets.take(data.test, asked.images))
    broken = 0
    for base in (CAM(model), GradCAM(model), Gradient(model, of="logit", channels="abs_sum")):
        broken += certified_cells(base, x, asked.draws) + certified_tops(base, x, asked.draws)
    print(f"{broken} statements broken; every one has at most the certificate's chance of error")
    certified.rejected = lambda p, alpha, correction: p <= 0.8  # type: ignore[assignment]
    Certified.check_draws = lambda self, size=None: None  # type: ignore[method-assign]
    wrong = Certified(model, CAM(model), samples=2, choose=1, grid=8)
    some, classes = x[:20], model(x[:20]).argmax(1)
    print(f"without the error term, 20 images: {flipped(wrong, some, classes, asked.draws)} cells broken")
    return broken


def certified_cells(base: Interpreter, x: torch.Tensor, draws: int) -> int:
    """Cells that are broken, over all images."""
    method, found, shares = Certified(base.model, base, samples=100, grid=8), 0, []
    for part in x.split(20):
        classes = base.model(part).argmax(1)
        shares.append(certificate_of(method, part, classes).shares()["certified_one"])
        found += flipped(method, part, classes, draws)
    print(f"{type(base).__name__}: {float(torch.cat(shares).mean()):.3f} certified as important, {found} cells broken")
    return found


def certified_tops(base: Interpreter, x: torch.Tensor, draws: int) -> int:
    """Inputs whose top is broken."""
    method = Sparsified(base.model, base, samples=256, sigma=0.2, radius=0.05, grid=8, bound="clopper-pearson")
    found, shares = 0, []
    for part in x.split(20):
        classes = base.model(part).argmax(1)
        shares.append(certificate_of(method, part, classes).shares()["certified_overlap"])
        found += lost(replace(method), part, classes, draws)
    print(f"{type(base).__name__}: {float(torch.cat(shares).mean()):.3f} of the top certified, {found} inputs broken")
    return found


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
