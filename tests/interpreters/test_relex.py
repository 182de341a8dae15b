"""RelEx against a plain loop, its derivative by the input, and what it refuses."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from robustexplain.errors import FieldError, UnsupportedModelError
from robustexplain.interpreters import MaskState, RelEx
from robustexplain.random_streams import Streams

CLASSES = torch.tensor([0, 3])


@pytest.fixture
def relex(smooth_net: nn.Module) -> RelEx:
    """On a network without kinks, in float64, with logits that differ."""
    net = copy.deepcopy(smooth_net).double()
    with torch.no_grad():
        net[-1].weight.mul_(10)
    return RelEx(net, samples=3, steps=4, lr=0.02, l1=0.3, outside=0.7, baseline=0.4, batch_size=8)


@pytest.fixture
def x(grey: Tensor) -> Tensor:
    return 0.1 + 0.8 * grey[:2].double()


def state(x: Tensor) -> MaskState:
    mask, first = torch.rand(2, *x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    return MaskState(0.2 + 0.6 * mask, first - 0.5, torch.zeros_like(mask), 3)


def slow_step(relex: RelEx, x: Tensor, begin: MaskState, noise: Tensor) -> Tensor:
    """The published step image by image and copy by copy, with nothing of the library's but the network."""
    moved = []
    for i in range(len(x)):
        m = begin.mask[i].clone().requires_grad_()
        total = torch.zeros((), dtype=x.dtype)
        for copy_noise in noise[i]:
            z = x[i] + relex.sigma * (x[i].max() - x[i].min()).detach() * copy_noise
            kept = relex.model((z * m + 0.4 * (1 - m))[None]).softmax(1)[0, CLASSES[i]]
            left = relex.model((z * (1 - m) + 0.4 * m)[None]).softmax(1)[0, CLASSES[i]]
            total = total + (-kept.log() - relex.outside * (1 - left + 1e-7).log()) / noise.shape[1]
        (g,) = torch.autograd.grad(total + relex.l1 * m.abs().mean(), m)
        step = relex.momentum * begin.first[i] + g / g.norm() * m.numel() ** 0.5
        moved.append((m - relex.lr * step).detach().clamp(0, 1))
    return torch.stack(moved)


def test_a_step_is_that_of_the_published_loop(relex: RelEx, x: Tensor) -> None:
    noise = relex.shifts(x, Streams.of(x, 0))
    assert noise.shape == (2, 4, 1, 16, 16)
    found = relex.step(x, relex.background(x), state(x), CLASSES, noise)
    torch.testing.assert_close(found.mask, slow_step(relex, x, state(x), noise), rtol=1e-9, atol=1e-12)
    assert not found.mask.requires_grad
    assert found.step == 4
    # Passes of another size are the same mean over copies.
    split = replace(relex, batch_size=2).step(x, relex.background(x), state(x), CLASSES, noise)
    torch.testing.assert_close(split.mask, found.mask, rtol=1e-9, atol=1e-12)


def test_steps_are_differentiable_in_the_input(relex: RelEx, x: Tensor) -> None:
    noise = relex.shifts(x, Streams.of(x, 0))

    def after_two(x: Tensor) -> Tensor:
        now = state(x)
        for _ in range(2):
            now = relex.step(x, relex.background(x), now, CLASSES, noise, graph=True)
        return relex.map_of(now)

    leaf = x.clone().requires_grad_()
    weight, v = torch.randn(2, 2, 16, 16, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    v = v[:, None]
    (gradient,) = torch.autograd.grad((after_two(leaf) * weight).sum(), leaf)
    # The noise scales with the image's range, whose two pixels the derivative leaves alone.
    flat = x.flatten(1)
    v.flatten(1).scatter_(1, torch.stack([flat.argmax(1), flat.argmin(1)], 1), 0)
    step = 1e-5
    slope = ((after_two(x + step * v) - after_two(x - step * v)) * weight).sum() / (2 * step)
    assert abs(float(slope.detach())) > 1e-3
    assert float((gradient * v).sum().detach()) == pytest.approx(float(slope.detach()), rel=1e-5)


def test_the_map_belongs_to_the_image_and_the_seed_alone(relex: RelEx, x: Tensor) -> None:
    maps = relex(x)
    assert torch.equal(maps, relex(x))
    assert relex.random
    assert not torch.equal(maps, relex.redrawn(7)(x))
    assert 0 <= float(maps.min()) < float(maps.max()) <= 1


def test_what_it_refuses(relex: RelEx) -> None:
    with pytest.raises(FieldError, match="samples"):
        replace(relex, samples=0)
    with pytest.raises(FieldError, match="batch_size"):
        replace(relex, batch_size=0)
    with pytest.raises(FieldError, match="baseline"):
        replace(relex, baseline=1.5)
    table = nn.Sequential(nn.Linear(6, 3)).eval()
    with pytest.raises(UnsupportedModelError, match="grid of pixels"):
        RelEx(table)(torch.rand(2, 6))
