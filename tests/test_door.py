"""What is looked at where a model enters: its answers, and that a sample's answer depends on that sample alone."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import System, attacks, interpreters, metrics
from robustexplain.autograd.tape import record
from robustexplain.door import _admitted
from robustexplain.errors import InputError
from robustexplain.models import Transformed, admit, answer


class Table(nn.Module):
    """Rows of three columns, standardised by their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head((x - x.mean(0)) / x.std(0, correction=0).clamp(min=1e-6))
        return logits


class Counting(nn.Module):
    """A classifier that counts its passes."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.of, self.passes = of, 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits: Tensor = self.of(x)
        return logits


def test_a_model_is_tried_once_and_a_copy_again(tiny_model: nn.Module, grey: Tensor) -> None:
    model = Counting(tiny_model).eval()
    for _ in range(3):
        admit(model, grey)
    assert model.passes == 2
    copied = copy.deepcopy(model)
    admit(copied, grey)
    assert copied.passes == 4
    key = id(copied)
    del copied
    gc.collect()
    assert key not in _admitted._known


def test_rows_of_a_table_are_tried_for_mixing_as_soon_as_there_are_two() -> None:
    model, x = Table().eval(), torch.tensor([[1.0, 50.0, 3.0], [0.0, 20.0, 9.0], [5.0, 21.0, 1.0]])
    admit(model, x[:1])
    with pytest.raises(InputError, match="mixes samples"):
        admit(model, x)


def test_our_own_random_transforms_are_no_dropout(tiny_model: nn.Module, grey: Tensor) -> None:
    model = Transformed(tiny_model, ["resize-pad-4"]).eval()
    assert model.random
    admit(model, grey)
    assert _admitted.level(model.redrawn(3)) == 2


def test_images_that_are_constant_show_mixed_samples_too() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), _Norm(), nn.Flatten(), nn.LazyLinear(3)).eval()
    for value in (0.0, 0.5, 1.0):
        with pytest.raises(InputError, match="mixes samples"):
            admit(model, torch.full((1, 1, 8, 8), value))


class _Norm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def test_a_norm_without_running_statistics_is_named_and_one_of_each_sample_is_not(grey: Tensor) -> None:
    def net(norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()

    for norm in (nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.BatchNorm2d(4)):
        admit(net(norm), grey)
    with pytest.raises(InputError, match=r"its part '1' is a BatchNorm2d without running statistics"):
        interpreters.Gradient(net(nn.BatchNorm2d(4, track_running_stats=False))).explain(grey)


def test_a_model_that_writes_into_its_input_only_sometimes_does_no_harm(tiny_model: nn.Module, grey: Tensor) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = tiny_model

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.of(x.sub_(0.1) if len(x) == 5 else x)
            return logits

    model, x = Sometimes().eval(), grey.clone()
    assert answer(model, x[:4]).shape == (4, 4)
    for call in (
        lambda: answer(model, x),
        lambda: System(model, interpreters.Gradient(model))(x),
        lambda: interpreters.Occlusion(model)(x),
        lambda: metrics.Deletion()(model, x, torch.rand(5, 16, 16)),
        lambda: record(model, x.clone().requires_grad_() * 1),
    ):
        with pytest.raises(InputError, match="changes its input in place"):
            call()
        assert torch.equal(x, grey)


def test_nan_is_no_success_of_an_attack_that_is_led_there(tiny_model: nn.Module, grey: Tensor) -> None:
    class Overflows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.of = tiny_model

        def forward(self, x: Tensor) -> Tensor:
            moved = (x - grey.to(x)).flatten(1).any(1) if len(x) == 5 else x.new_zeros(len(x)).bool()
            return torch.where(moved[:, None], torch.nan, self.of(x))

    model = Overflows().eval()
    system = System(model, interpreters.Gradient(model))
    y = tiny_model(grey).argmax(1)
    for attack in (attacks.Noise(eps=0.1), attacks.Square(eps=0.1, max_queries=3)):
        assert not attack(system, grey, y).success.any()


@pytest.mark.parametrize("y", [0, 1])
def test_nan_is_neither_a_hit_nor_a_confidence(y: int) -> None:
    logits = torch.tensor([[torch.nan, 1.0], [3.0, 1.0]])
    assert metrics.hit(logits, torch.tensor([y, 1])).tolist() == [False, True]
    assert metrics.hit(logits, torch.tensor([y, 1]), torch.tensor([1 - y, 0])).tolist() == [False, True]
    with pytest.raises(InputError, match="NaN for 1 of 2"):
        metrics.confidence(logits, torch.tensor([y, 1]))


def test_a_finite_answer_whose_sum_overflows_is_no_fault() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    assert answer(model, torch.ones(1, 1, 1, 1)).isfinite().all()
