"""Systems that draw are judged on several fresh draws, of which the attacker's best counts."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import robustexplain as rx
from robustexplain import attacks, interpreters
from robustexplain.evaluation import Evaluation, RunFolder, evaluate
from robustexplain.evaluation.cell import JUDGED
from robustexplain.models.transformed import Transformed
from robustexplain.random_streams import derive
from robustexplain.recipe.plausible import Plausible


def test_a_random_system_is_judged_on_fresh_draws_and_the_worst_counts(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = nn.Sequential(nn.Conv2d(1, 6, 3), nn.Softplus(), nn.Flatten(), nn.Linear(600, 3))
    x = torch.rand(12, 1, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        inner[3].bias -= inner(x).mean(0)  # all classes near their borders
    model = Transformed(inner.eval().requires_grad_(False), ["resize-pad-4"]).eval()
    system = rx.System(model, interpreters.Gradient(model))
    assert system.random
    settings = Evaluation(
        batch_size=12,
        targeted=False,
        only_correct=False,
        bootstrap=20,
        plausible=Plausible(iou=0.5),
        calibration=0,
    )
    columns = {"pgd": attacks.PGD(eps=0.1, steps=3)}
    results = evaluate({"drawn": system}, columns, (x, model(x).argmax(1)), out=tmp_path, evaluation=settings)
    found = RunFolder(tmp_path).arrays("drawn", "pgd")
    order = torch.cdist(found["x"].flatten(1), x.flatten(1)).argmin(1)
    y, shown = model(x).argmax(1)[order], len(found["x"])
    fresh = [system.redrawn(derive(0, "judge", i)) for i in range(JUDGED)]
    with torch.no_grad():
        won = torch.stack([draw.model(found["attacked_x"]).argmax(1) != y for draw in fresh]).float()
    assert torch.equal(found["success"][:shown], won.amax(0))
    torch.testing.assert_close(found["success_mean"][:shown], won.mean(0))
    assert bool((won.amax(0) != won.mean(0)).any())  # some draws are won and others not
    worst, mean = (results.measure("drawn", "pgd", name) for name in ("joint", "joint_mean"))
    assert worst is not None
    assert mean is not None
    assert worst["value"] >= mean["value"]
