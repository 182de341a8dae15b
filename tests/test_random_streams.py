"""One random stream a sample."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from robustexplain.interpreters import Captum
from robustexplain.interpreters.masks.rts_training import RTSTraining, new_masker
from robustexplain.models import Classifier
from robustexplain.models.randomise import randomise, stages
from robustexplain.random_streams import Streams, derive, generator, global_state, seed_global_state


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def test_global_states_of_other_devices_are_not_seeded(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Classifier, grey: Tensor
) -> None:
    """``torch.manual_seed`` seeds every CUDA device, and what forks the CPU's state alone puts none of them back."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    new_masker(tiny_model, grey[:1], RTSTraining(), 3)
    Captum(tiny_model, "Lime")(grey[:1])
    model = copy.deepcopy(tiny_model)
    randomise(model, stages(model, grey)[0], grey, 5)
    with global_state(torch.device("cpu")):
        seed_global_state(7, torch.device("cpu"))
        assert float(torch.rand(())) == float(torch.rand((), generator=torch.Generator().manual_seed(7)))
    assert not seeded


def test_derived_seeds_are_stable_across_runs_and_machines() -> None:
    assert derive(0, "order", 1) == 4672741961019256271
    assert derive(7) == 8333924190356522945


def test_every_word_of_a_derived_seed_counts() -> None:
    seeds = {derive(0), derive(1), derive(0, "a"), derive(0, "a", 1), derive(0, "a", 2), derive(0, 1, "a")}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_generator_is_seeded_by_its_words() -> None:
    a, b, c = (torch.rand(4, generator=generator(0, word)) for word in ("a", "a", "b"))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_samples_draws_do_not_depend_on_its_place_or_its_batch(x: Tensor) -> None:
    whole = Streams.of(x, 3)
    order = torch.tensor([4, 0, 5])
    part = Streams.of(x[order], 3)
    for _ in range(2):
        assert torch.equal(whole.normal(x)[order], part.normal(x[order]))
        assert torch.equal(whole.uniform(x, -2, 2)[order], part.uniform(x[order], -2, 2))
        assert torch.equal(whole.integers(1000)[order], part.integers(1000))


def test_other_samples_seeds_and_words_draw_otherwise(x: Tensor) -> None:
    draws = [Streams.of(x, 0).normal(x), Streams.of(x, 1).normal(x), Streams.of(x, 0, "b").normal(x)]
    rows = torch.cat(draws).flatten(1)
    assert (torch.cdist(rows, rows) + torch.eye(18) > 0.1).all()


def test_equal_samples_of_a_batch_draw_alike_but_from_streams_of_their_own(x: Tensor) -> None:
    twice = x[[1, 1]]
    noise = Streams.of(twice, 0).normal(twice)
    assert torch.equal(noise[0], noise[1])


@pytest.mark.parametrize("rows", [torch.tensor([1, 3]), [1, 3]], ids=["tensor", "list"])
def test_selected_streams_go_on_where_they_were(x: Tensor, rows: Tensor | list[int]) -> None:
    ours, reference = Streams.of(x, 0), Streams.of(x, 0)
    first, second = reference.normal(x), reference.normal(x)
    assert torch.equal(ours.normal(x), first)
    assert torch.equal(ours.select(rows).normal(x[rows]), second[rows])


def test_the_global_random_state_is_left_alone(x: Tensor) -> None:
    before = torch.get_rng_state()
    streams = Streams.of(x, 0)
    streams.normal(x), streams.uniform(x), streams.integers(5)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_follow_shape_dtype_and_range(x: Tensor) -> None:
    streams = Streams.of(x, 0)
    many = x.double().repeat(1, 50, 2, 2)
    uniform, normal = streams.uniform(many, 2, 5), streams.normal(many)
    assert uniform.shape == normal.shape == many.shape
    assert uniform.dtype == normal.dtype == torch.float64
    assert 2 <= uniform.min() < 2.01
    assert 4.99 < uniform.max() <= 5
    assert uniform.mean().item() == pytest.approx(3.5, abs=0.02)
    assert (normal.mean().item(), normal.std().item()) == pytest.approx((0, 1), abs=0.02)
    integers = torch.stack([streams.integers(3) for _ in range(50)])
    assert integers.dtype == torch.int64
    assert integers.unique().tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_streams_take_any_dtype_and_tensors_with_a_graph(x: Tensor, dtype: torch.dtype) -> None:
    x = x.to(dtype).requires_grad_()
    assert torch.isfinite(Streams.of(x, 0).normal(x)).all()
