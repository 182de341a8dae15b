"""What is looked at where a model enters: its answers, and that a sample's answer depends on that sample alone."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain import System, attacks, interpreters, metrics
from robustexplain.autograd.tape import record
from robustexplain.door import _admitted
from robustexplain.errors import InputError
from robustexplain.evaluation import evaluate
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


class Around(nn.Module):
    """A classifier with something else done around it."""

    def __init__(self, of: nn.Module, forward: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.of, self.does = of, forward

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self.of, x)


def _without_graph(of: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = of(x)
        return logits


def _under_inference_mode(of: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = of(x)
        return logits


@pytest.mark.parametrize("cut", [_without_graph, _under_inference_mode])
def test_a_model_whose_graph_is_cut_is_refused_by_what_differentiates_it(
    cut: Callable[[nn.Module, Tensor], Tensor], tiny_model: nn.Module, grey: Tensor
) -> None:
    model, y = Around(tiny_model, cut).eval(), torch.zeros(5, dtype=torch.long)
    for kind in (interpreters.Gradient, interpreters.GradCAM, interpreters.Mask, interpreters.LRP):
        with pytest.raises(InputError, match="graph is cut"):
            kind(model)(grey)
    system = System(model, interpreters.Occlusion(model))
    for attack in (attacks.PGD(), attacks.GDUAP().fitted):
        with pytest.raises(InputError, match="graph is cut"):
            attack(system, grey, y)
    for black in (interpreters.Occlusion, interpreters.CAM):
        torch.testing.assert_close(black(model)(grey), black(tiny_model)(grey).detach())


def test_a_gradient_that_is_not_finite_is_named_by_maps_and_attacks(tiny_model: nn.Module, grey: Tensor) -> None:
    def norm_of_zero(of: nn.Module, x: Tensor) -> Tensor:
        logits: Tensor = of(x) + (x - x).square().flatten(1).sum(1, keepdim=True).sqrt()
        return logits

    model, y = Around(tiny_model, norm_of_zero).eval(), torch.zeros(5, dtype=torch.long)
    system = System(model, interpreters.Gradient(model))
    with pytest.raises(InputError, match="5 of 5 maps of Gradient hold NaN"):
        system(grey)
    with pytest.raises(InputError, match="5 of 5 maps of IntegratedGradients hold NaN"):
        interpreters.IntegratedGradients(model)(grey)
    black_box = System(model, interpreters.Occlusion(model))
    for attack in (attacks.FGSM(), attacks.PGD(), attacks.StAdv()):
        with pytest.raises(InputError, match="gradient of the loss is NaN"):
            attack(black_box, grey, y)


def test_a_model_that_answers_with_a_buffer_of_its_own(tiny_model: nn.Module, grey: Tensor) -> None:
    buffer = torch.zeros(5, 4)

    def into_the_buffer(of: nn.Module, x: Tensor) -> Tensor:
        buffer[: len(x)] = of(x)
        return buffer[: len(x)]

    def mixing(of: nn.Module, x: Tensor) -> Tensor:
        return into_the_buffer(lambda z: of(z) - of(z).mean(0), x)  # type: ignore[arg-type]

    with torch.no_grad():
        first = answer(Around(tiny_model, into_the_buffer).eval(), grey)
        answer(Around(tiny_model, into_the_buffer).eval(), 1 - grey)
        torch.testing.assert_close(first, tiny_model(grey))
        with pytest.raises(InputError, match="mixes samples"):
            admit(Around(tiny_model, mixing).eval(), grey)


def test_a_write_through_data_is_a_change_in_place(tiny_model: nn.Module, grey: Tensor) -> None:
    def through_data(of: nn.Module, x: Tensor) -> Tensor:
        x.data.sub_(0.5)
        logits: Tensor = of(x)
        return logits

    model, x = Around(tiny_model, through_data).eval(), grey.clone()
    for call in (
        lambda: interpreters.Gradient(model)(x),
        lambda: record(model, x.requires_grad_()),
        lambda: attacks.FGSM()(System(model, interpreters.Gradient(model)), x, torch.zeros(5, dtype=torch.long)),
    ):
        with pytest.raises(InputError, match="changes its input in place"):
            call()
        assert torch.equal(x, grey)


def test_a_model_that_computes_in_half_precision_inside(tiny_model: nn.Module, grey: Tensor) -> None:
    def autocast(of: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = of(x)
        return logits.float()

    model = Around(tiny_model, autocast).eval()
    maps, expected = interpreters.CAM(model)(grey), interpreters.CAM(tiny_model)(grey)
    assert bool((F.cosine_similarity(maps.flatten(1), expected.flatten(1)) > 0.999).all())
    with pytest.raises(InputError, match="computes in another dtype inside"):
        interpreters.LRP(model)(grey)


def test_a_model_that_answers_in_double_precision(tiny_model: nn.Module, grey: Tensor) -> None:
    model = Around(tiny_model, lambda of, x: of(x).double()).eval()
    for kind in (interpreters.CAM, interpreters.RISE):
        options = {"samples": 20} if kind is interpreters.RISE else {}
        torch.testing.assert_close(kind(model, **options)(grey), kind(tiny_model, **options)(grey))


@pytest.mark.parametrize("error", [ZeroDivisionError, AssertionError, OSError])
def test_a_target_that_raises_is_named(error: type[Exception], tiny_model: nn.Module, grey: Tensor) -> None:
    def target(logits: Tensor) -> Tensor:
        raise error("no")

    with pytest.raises(InputError, match=f"target, a function of what .* failed .*: {error.__name__}: no"):
        interpreters.Gradient(tiny_model)(grey, target)


def test_what_only_looked_at_flags_tries_the_model_too(tiny_model: nn.Module, grey: Tensor, tmp_path: Path) -> None:
    def model() -> nn.Module:
        return Around(tiny_model, lambda of, x: of(x) - of(x).mean(0)).eval()

    other = model()
    with pytest.raises(InputError, match="mixes samples"):
        metrics.RelativeInputStability(samples=1)(interpreters.Occlusion(other), grey)
    with pytest.raises(InputError, match="mixes samples"):
        attacks.compensated(System(other := model(), interpreters.Occlusion(other)), grey * 0.5, 0.1)
    system = System(other := model(), interpreters.Occlusion(other))
    with pytest.raises(InputError, match="mixes samples"):
        evaluate({"a": system}, {"clean": attacks.Clean()}, (grey, torch.zeros(5).long()), out=tmp_path / "run")
