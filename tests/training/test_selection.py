"""Which epoch's weights a training ends with: the best of those that are admissible."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from robustexplain import training
from robustexplain.training import Selection, Session, Training, TrainingStep, Verdict, cross_entropy, fit

SETTINGS = Training(epochs=5, batch_size=16, lr=1e-2)


def points() -> TensorDataset:
    rng = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(64, 2, generator=rng), torch.arange(64) % 3)


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


class Script:
    """A judge that says what it is told, and remembers the weights it was shown."""

    def __init__(self, losses: list[float], admissible: list[bool]) -> None:
        self.said = list(zip(losses, admissible, strict=True))
        self.seen: list[dict[str, Tensor]] = []
        self.modes: list[bool] = []

    def __call__(self, module: nn.Module) -> Verdict:
        loss, admissible = self.said[len(self.seen)]
        self.seen.append({k: v.clone() for k, v in module.state_dict().items()})
        self.modes.append(module.training)
        return Verdict({"loss": loss}, loss, admissible)


def trained(script: Callable[[nn.Module], Verdict], **options: object) -> tuple[nn.Module, Selection]:
    selection = Selection(script)
    return fit(net(), cross_entropy, points(), SETTINGS, name="net", selection=selection, **options), selection  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("losses", "admissible", "kept"),
    [
        ([9, 5, 3, 4, 2, 6], [True] * 6, 4),
        ([9, 5, 3, 4, 2, 6], [True, True, True, True, False, True], 2),
        ([9, 5, 3, 4, 2, 6], [True] + [False] * 5, 0),
        ([1, 5, 3, 4, 2, 6], [True] * 6, 0),
    ],
)
def test_the_lowest_admissible_loss_wins_and_the_untrained_weights_take_part(
    losses: list[float], admissible: list[bool], kept: int
) -> None:
    script = Script(losses, admissible)
    module, selection = trained(script)
    assert selection.kept == kept
    assert [entry["loss"] for entry in selection.history] == losses
    assert all(torch.equal(value, script.seen[kept][name]) for name, value in module.state_dict().items())
    assert script.modes == [False] * 6


def test_untrained_weights_without_a_loss_are_beaten_by_any_that_have_one() -> None:
    _, selection = trained(Script([float("nan"), 5, 3, 4, 6, 7], [True] * 6))
    assert selection.kept == 2


def test_a_killed_training_goes_on_to_the_same_choice(tmp_path: Path) -> None:
    losses, admissible = [9, 5, 1, 4, 2, 6], [True] * 6
    whole, chosen = trained(Script(losses, admissible))

    def dying(module: nn.Module, x: Tensor, y: Tensor, moment: TrainingStep) -> Tensor:
        if moment.epoch == 3:
            raise KeyboardInterrupt
        return cross_entropy(module, x, y, moment)

    with pytest.raises(KeyboardInterrupt):
        fit(net(), dying, points(), SETTINGS, name="net", selection=Selection(Script(losses, admissible)),
            session=Session(folder=tmp_path), identity="points")  # fmt: skip
    rest = Selection(Script(losses[4:], admissible[4:]))
    resumed = fit(net(), cross_entropy, points(), SETTINGS, name="net", selection=rest,
                  session=Session(folder=tmp_path), identity="points")  # fmt: skip
    assert (rest.kept, rest.history) == (chosen.kept, chosen.history) == (2, [{"loss": v} for v in losses])
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())


def test_a_finished_training_is_read_with_its_choice(tmp_path: Path) -> None:
    first, _ = trained(Script([9, 5, 1, 4, 2, 6], [True] * 6), session=Session(folder=tmp_path))
    again, selection = trained(Script([], []), session=Session(folder=tmp_path))
    assert selection.kept == 2
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_every_process_judges_with_the_main_ones_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(training.loop, "broadcast", lambda buffer: said.append("shared"))

    def judge(module: nn.Module) -> Verdict:
        said.append("judged")
        return Verdict({}, 1.0, True)

    trained(judge)
    assert said.count("judged") == 6
    # The three buffers of the batch norm, before each judgement and at the end.
    assert said == [*["shared"] * 3, "judged"] * 6 + ["shared"] * 3


def test_in_eval_mode_the_statistics_of_batch_norms_stay() -> None:
    before = net()
    module = fit(net(), cross_entropy, points(), SETTINGS, name="net", evaluating=True)
    assert torch.equal(module[1].running_mean, before[1].running_mean)  # type: ignore[index]
    assert not torch.equal(module[0].weight, before[0].weight)  # type: ignore[index]
