"""Stand-ins for rectifiers, and where the swap finds a rectifier to replace."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robustexplain.autograd import rectifiers
from robustexplain.autograd.rectifiers import SmoothGradient, Softplus, count_rectifiers, require_rectifiers, swapped
from robustexplain.errors import InputError, UnsupportedModelError

Z = torch.linspace(-3, 9, 97, dtype=torch.float64)


class Calls(nn.Module):
    """A net of one function call."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


def in_place(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    """Changes its tensor and goes on with it, not with what the call returned."""

    def call(z: Tensor) -> Tensor:
        z = z * 1
        change(z)
        return z

    return call


def slope(f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    z = z.clone().requires_grad_()
    (g,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
    return g


# Each with the value it must take for softplus: r(z), or r(z) - r(z - cap).
RECTIFIERS: dict[str, tuple[Callable[[Tensor], Tensor], float | None]] = {
    "nn.ReLU": (nn.ReLU(), None),
    "nn.ReLU in place": (lambda z: nn.ReLU(inplace=True)(z * 1), None),
    "F.relu": (F.relu, None),
    "F.relu(inplace=True), its result dropped": (in_place(lambda z: F.relu(z, inplace=True)), None),
    "F.relu(z, True), its result dropped": (in_place(lambda z: F.relu(z, True)), None),
    "torch.relu": (torch.relu, None),
    "torch.relu_": (in_place(torch.relu_), None),
    "z.relu()": (lambda z: z.relu(), None),
    "z.relu_()": (in_place(lambda z: z.relu_()), None),
    "nn.ReLU6": (nn.ReLU6(), 6.0),
    "nn.ReLU6 in place": (in_place(nn.ReLU6(inplace=True)), 6.0),
    "F.relu6": (F.relu6, 6.0),
    "nn.Hardtanh(0, 2)": (nn.Hardtanh(0, 2), 2.0),
    "z.clamp(min=0)": (lambda z: z.clamp(min=0), None),
    "z.clamp(0)": (lambda z: z.clamp(0), None),
    "z.clamp_(0, 3)": (in_place(lambda z: z.clamp_(0, 3)), 3.0),
    "torch.clamp(z, min=0.0)": (lambda z: torch.clamp(z, min=0.0), None),
    "torch.clamp_min": (lambda z: torch.clamp_min(z, 0), None),
    "z.clip(0)": (lambda z: z.clip(0), None),
    "F.threshold": (lambda z: F.threshold(z, 0, 0), None),
}

NOT_RECTIFIERS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "clamp(max=0)": lambda z: z.clamp(max=0),
    "clamp(-1, 1)": lambda z: z.clamp(-1, 1),
    "clamp_min(0.5)": lambda z: z.clamp_min(0.5),
    "hardtanh(-1, 1)": F.hardtanh,
    "threshold(1, 0)": lambda z: F.threshold(z, 1, 0),
}


@pytest.mark.parametrize("name", RECTIFIERS)
def test_every_spelling_of_a_rectifier_is_swapped(name: str) -> None:
    call, cap = RECTIFIERS[name]
    wanted = F.softplus(Z, 2.0) if cap is None else F.softplus(Z, 2.0) - F.softplus(Z - cap, 2.0)
    plain = call(Z.clone())
    with swapped(Softplus(2.0)):
        found = call(Z.clone())
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(plain, Z.clamp(0, math.inf if cap is None else cap))
    assert count_rectifiers(Calls(call), Z) == 1


@pytest.mark.parametrize("name", NOT_RECTIFIERS)
def test_nothing_else_is_swapped(name: str) -> None:
    call = NOT_RECTIFIERS[name]
    with swapped(Softplus(2.0)):
        found = call(Z.clone())
    assert torch.equal(found, call(Z.clone()))
    assert count_rectifiers(Calls(call), Z) == 0


def test_a_leaky_relu_keeps_its_slope_far_from_zero() -> None:
    z = torch.tensor([-30.0, 30.0], dtype=torch.float64)
    for call in (nn.LeakyReLU(0.2), lambda v: F.leaky_relu(v, 0.2), in_place(nn.LeakyReLU(0.2, inplace=True))):
        with swapped(Softplus(2.0)):
            assert call(z).tolist() == pytest.approx([-6.0, 30.0])
    with swapped(SmoothGradient()):
        assert torch.equal(F.leaky_relu(Z, 0.2), torch.where(Z > 0, Z, 0.2 * Z))


# The stand-ins


def test_softplus_is_log_one_plus_exp_and_so_are_its_derivatives() -> None:
    beta = 3.0
    r = Softplus(beta)
    torch.testing.assert_close(r(Z), torch.log1p(torch.exp(beta * Z)) / beta, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(slope(r, Z), torch.sigmoid(beta * Z), rtol=1e-9, atol=1e-12)
    s = torch.sigmoid(beta * Z)
    torch.testing.assert_close(slope(lambda z: slope(r, z), Z), beta * s * (1 - s), rtol=1e-7, atol=1e-9)


def test_softplus_keeps_curvature_where_torchs_own_cuts_it_off() -> None:
    z = torch.tensor([3.0], dtype=torch.float64)
    assert slope(lambda v: slope(Softplus(10.0), v), z).item() == pytest.approx(10 * math.exp(-30), rel=1e-6)


def test_softplus_is_smooth_at_exactly_zero_where_dead_units_sit() -> None:
    for zero in (0.0, -0.0):
        z = torch.tensor([zero])
        assert slope(Softplus(8.0), z).item() == 0.5
        assert slope(lambda v: slope(Softplus(8.0), v), z).item() == 2.0


def test_softplus_converges_to_relu_at_rate_log2_over_beta() -> None:
    for beta in (1.0, 10.0, 100.0):
        gap = (Softplus(beta)(Z) - Z.relu()).abs().max().item()
        assert gap == pytest.approx(math.log(2) / beta, rel=1e-6)


def test_softplus_does_not_overflow() -> None:
    z = torch.tensor([-1e4, 1e4], requires_grad=True)
    value = Softplus(50.0)(z)
    assert value.tolist() == [0.0, 1e4]
    assert torch.autograd.grad(value.sum(), z)[0].tolist() == [0.0, 1.0]


def test_softplus_is_exactly_flat_where_its_slope_would_be_a_denormal_number_of_a_few_products() -> None:
    z = torch.tensor([-5.0, -3.0], requires_grad=True)
    value = Softplus(10.0)(z)
    first = slope(Softplus(10.0), z)
    second = slope(lambda v: slope(Softplus(10.0), v), z)
    for flat, alive in (value.tolist(), first.tolist(), second.tolist()):
        assert flat == 0
        assert 0 < alive < 1e-10


def test_softplus_has_a_third_derivative() -> None:
    s = torch.sigmoid(3.0 * Z)
    third = slope(lambda a: slope(lambda b: slope(Softplus(3.0), b), a), Z)
    torch.testing.assert_close(third, 9.0 * s * (1 - s) * (1 - 2 * s), rtol=1e-7, atol=1e-9)


def test_a_second_derivative_works_the_softplus_slope_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    worked_out = []

    def counted(z: Tensor, beta: float) -> Tensor:
        worked_out.append(z.shape)
        return torch.sigmoid(beta * z)

    monkeypatch.setattr(rectifiers, "_softplus_slope", counted)
    z = Z.clone().requires_grad_()
    s = torch.sigmoid(3.0 * Z)
    value = Softplus(3.0)(z)
    (first,) = torch.autograd.grad(value.square().sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    assert len(worked_out) == 1
    torch.testing.assert_close(second, 2 * s * s + 2 * value.detach() * 3.0 * s * (1 - s), rtol=1e-7, atol=1e-9)


def test_a_softplus_can_be_gone_through_again_after_its_second_derivative() -> None:
    z = Z.clone().requires_grad_()
    value = Softplus(3.0)(z)
    twice = []
    for _ in range(2):
        (first,) = torch.autograd.grad(value.sum(), z, create_graph=True)
        twice.append(torch.autograd.grad(first.sum(), z)[0])
    assert torch.equal(*twice)


@pytest.mark.parametrize("beta", [0.0, -1.0, math.nan])
def test_a_beta_that_makes_no_sense_is_refused(beta: float) -> None:
    with pytest.raises(InputError, match=r"Softplus\.beta must be"):
        Softplus(beta)


def test_smooth_gradient_has_the_slope_h_of_adv2() -> None:
    h = slope(SmoothGradient(1e-4), torch.tensor([0.01, -0.01, 0.0, 1.0, -1.0], dtype=torch.float64))
    assert h.tolist() == pytest.approx([2**-0.5, 1 - 2**-0.5, 0.0, 1.0, 0.0], abs=1e-4)
    assert [round(v, 4) for v in h.tolist()[:2]] == [0.7071, 0.2929]


def test_smooth_gradients_second_derivative_is_that_of_h() -> None:
    tau, step = 1e-2, 1e-6
    z = torch.tensor([-0.7, -0.1, -0.02, 0.03, 0.1, 0.8], dtype=torch.float64)

    def h(z: Tensor) -> Tensor:
        s = z / (z * z + tau).sqrt()
        return torch.where(z < 0, 1 + s, s)

    torch.testing.assert_close(slope(SmoothGradient(tau), z), h(z))
    second = slope(lambda v: slope(SmoothGradient(tau), v), z)
    torch.testing.assert_close(second, (h(z + step) - h(z - step)) / (2 * step), rtol=1e-6, atol=1e-6)
    assert (second > 0.01).all()


def test_smooth_gradient_passes_the_incoming_gradient_through_twice() -> None:
    z = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: 3 * SmoothGradient(0.1)(2 * v), (z,)) is True


@pytest.mark.parametrize("architecture", ["resnet10t", "test_efficientnet"])
def test_smooth_gradient_leaves_the_forward_pass_as_it_is_to_the_bit(architecture: str, colour: Tensor) -> None:
    net = timm.create_model(architecture, num_classes=5, act_layer=nn.ReLU).eval()
    with torch.no_grad():
        plain = net(colour)
        with swapped(SmoothGradient()):
            assert torch.equal(net(colour), plain)


# The swap as a block of code


@pytest.mark.parametrize(
    ("architecture", "count"), [("resnet10t", 11), ("test_resnet", None), ("tf_efficientnet_lite0", 33)]
)
def test_rectifiers_of_timm_nets_are_found(architecture: str, count: int | None, colour: Tensor) -> None:
    net = timm.create_model(architecture, num_classes=5).eval()
    found = count_rectifiers(net, colour)
    modules = sum(isinstance(m, (nn.ReLU, nn.ReLU6)) for m in net.modules())
    assert found == modules
    assert count is None or found == count


def test_the_swap_ends_with_its_block_and_with_an_exception() -> None:
    with swapped(Softplus(1.0)):
        pass
    assert torch.equal(F.relu(Z), Z.clamp(min=0))
    with pytest.raises(RuntimeError, match="stop"), swapped(Softplus(1.0)):
        raise RuntimeError("stop")
    assert torch.equal(F.relu(Z), Z.clamp(min=0))


@pytest.mark.parametrize("outer", [Softplus(1.0), SmoothGradient(0.5)])
@pytest.mark.parametrize("inner", [Softplus(4.0), SmoothGradient(1e-3)])
def test_of_nested_swaps_the_innermost_alone_decides(
    outer: Softplus | SmoothGradient, inner: Softplus | SmoothGradient
) -> None:
    with swapped(outer):
        with swapped(inner):
            value, gradient = F.relu6(Z), slope(F.relu, Z)
            second = slope(lambda z: slope(F.relu, z), Z)
        after = F.relu(Z)
    torch.testing.assert_close(value, inner(Z) - inner(Z - 6), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope(inner, Z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(second, slope(lambda z: slope(inner, z), Z), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(after, outer(Z), rtol=1e-12, atol=1e-12)


def test_an_in_place_rectifier_behind_a_batch_norm_can_be_differentiated(grey: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3)).eval()
    other = copy.deepcopy(net)
    other[2] = nn.Softplus(beta=2.0)
    x = grey.clone().requires_grad_()
    with swapped(Softplus(2.0)):
        found = net(x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    (wanted,) = torch.autograd.grad(other(x).square().sum(), x)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [nn.GELU, nn.Tanh, nn.SiLU])
def test_a_net_without_rectifiers_is_refused(activation: type[nn.Module], grey: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), activation())
    with pytest.raises(UnsupportedModelError, match=r"beta-smoothing replaces rectifiers.*Sequential calls none"):
        require_rectifiers(net, grey, "beta-smoothing")
    require_rectifiers(nn.Sequential(net, nn.ReLU()), grey, "beta-smoothing")


def test_a_clamp_of_places_is_no_rectifier() -> None:
    places = torch.arange(-2, 6)
    with swapped(Softplus(1.0)):
        assert places.clamp(0, 3).tolist() == [0, 0, 0, 1, 2, 3, 3, 3]


def test_within_unswapped_rectifiers_are_what_they_are_and_swaps_inside_count() -> None:
    z = torch.tensor([-1.0, 0.5])
    smooth = Softplus(1.0)
    with swapped(smooth), rectifiers.unswapped():
        assert torch.equal(torch.relu(z), torch.tensor([0.0, 0.5]))
        assert torch.equal(z.clamp(min=0), torch.tensor([0.0, 0.5]))
        with swapped(Softplus(2.0)):
            inner = torch.relu(z)
    torch.testing.assert_close(inner, Softplus(2.0)(z))
    with swapped(smooth):
        torch.testing.assert_close(torch.relu(z), smooth(z))
