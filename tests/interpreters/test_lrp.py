"""LRP against zennit, slow loops, conservation and finite differences."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from robustexplain import models
from robustexplain.autograd.rectifiers import SmoothGradient, Softplus, swapped
from robustexplain.errors import FieldError, InputError, UnknownNameError, UnsupportedModelError
from robustexplain.interpreters import LRP

tv = torchvision.models

COMPOSITES: dict[str, dict[str, Any]] = {
    "EpsilonPlus": {},
    "EpsilonPlusFlat": {"first": "flat"},
    "EpsilonAlpha2Beta1": {"conv": "alphabeta"},
    "EpsilonAlpha2Beta1Flat": {"conv": "alphabeta", "first": "flat"},
    "EpsilonGammaBox": {"conv": "gamma", "first": "box"},
}


def ready(make: Callable[[], nn.Module]) -> nn.Module:
    """In float64 and eval mode, batch norms with statistics of their own, no in-place ReLU (zennit's hooks break)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().eval().double().requires_grad_(False)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
                # zennit 0.5.1 folds without eps: without one, both fold the same.
                module.eps = 0.0
            if isinstance(module, nn.ReLU):
                module.inplace = False
    return model


def image(batch: int = 2, side: int = 32) -> Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def zennits(model: nn.Module, composite: str, x: Tensor, target: Tensor, canonizers: list[Any] | None = None) -> Tensor:
    composites = pytest.importorskip("zennit.composites")
    ends = (torch.zeros_like(x[:1]), torch.ones_like(x[:1])) if composite.endswith("Box") else ()
    x = x.clone().requires_grad_()
    with getattr(composites, composite)(*ends, canonizers=canonizers or []).context(copy.deepcopy(model)) as wrapped:
        logits = wrapped(x)
        seed = (F.one_hot(target, logits.shape[1]) * logits).detach()
        (relevance,) = torch.autograd.grad(logits, x, seed)
    return relevance.sum(1)


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-6) -> None:
    torch.testing.assert_close(found.detach(), wanted.to(found), rtol=0, atol=rtol * wanted.abs().max().item())


# zennit, where it covers the model


def _canonizers(name: str) -> list[Any]:
    pytest.importorskip("zennit")
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.torchvision import ResNetCanonizer

    return {"resnet18": [ResNetCanonizer()], "vgg11_bn": [SequentialMergeBatchNorm()]}.get(name, [])


def vgg11_bn() -> nn.Module:
    """VGG-11 with batch norm, without its hundred million dense weights."""
    features = tv.vgg.make_layers(tv.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5))


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize(("name", "side"), [("alexnet", 64), ("vgg11_bn", 32), ("resnet18", 32), ("squeezenet1_1", 32)])
def test_composites_are_zennits_on_torchvision(name: str, side: int, composite: str) -> None:
    model = ready(vgg11_bn if name == "vgg11_bn" else lambda: getattr(tv, name)(num_classes=5))
    x, target = image(side=side), torch.tensor([1, 3])
    found = LRP(model, **COMPOSITES[composite])(x, target)
    close(found, zennits(model, composite, x, target, _canonizers(name)))


@pytest.mark.parametrize("composite", COMPOSITES)
def test_composites_are_zennits_on_a_trained_network(
    composite: str, trained: models.Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    from zennit.canonizers import SequentialMergeBatchNorm

    net = ready(lambda: copy.deepcopy(trained.net))
    plain = nn.Sequential(net.features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), net.head).eval()
    x, y = judged[0][:6].double(), judged[1][:6]
    wanted = zennits(plain, composite, x, y, [SequentialMergeBatchNorm()])
    close(LRP(net, **COMPOSITES[composite])(x, y), wanted)


class _Add(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from zennit.layer import Sum

        self.sum = Sum()

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        total: Tensor = self.sum(torch.stack([a, b], -1))
        return total


def for_zennit(model: nn.Module) -> fx.GraphModule:
    """A copy in which additions are modules and batch norms folded, by torch.fx: zennit finds them by class."""

    class Tracer(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            notrace = tuple(timm.models.get_notrace_modules())
            return isinstance(m, (nn.BatchNorm2d, *notrace)) or super().is_leaf_module(m, name)

    model = copy.deepcopy(model)
    graph = fx.GraphModule(model, Tracer().trace(model))
    modules = dict(graph.named_modules())
    for i, node in enumerate(list(graph.graph.nodes)):
        if node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add):
            graph.add_submodule(f"add_{i}", _Add())
            with graph.graph.inserting_before(node):
                node.replace_all_uses_with(graph.graph.call_module(f"add_{i}", tuple(node.args[:2])))
            graph.graph.erase_node(node)
        elif node.op == "call_module" and isinstance(modules[node.target], nn.BatchNorm2d):
            before, norm = node.args[0], modules[node.target]
            if before.op == "call_module" and isinstance(modules[before.target], nn.Conv2d) and len(before.users) == 1:
                fused = torch.nn.utils.fusion.fuse_conv_bn_eval(modules[before.target], norm)
                graph.set_submodule(before.target, fused)
                graph.set_submodule(node.target, getattr(norm, "act", nn.Identity()))
    graph.recompile()
    return graph


@pytest.mark.parametrize("composite", ["EpsilonPlus", "EpsilonAlpha2Beta1Flat"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.create_model("resnet10t", num_classes=5),
        lambda: timm.create_model("efficientnet_lite0", num_classes=5),
        lambda: tv.densenet121(num_classes=5),
        lambda: tv.mobilenet_v2(num_classes=5),
    ],
    ids=["timm resnet10t", "timm efficientnet_lite0", "torchvision densenet121", "torchvision mobilenet_v2"],
)
def test_composites_are_zennits_on_rewritten_copies(make: Callable[[], nn.Module], composite: str) -> None:
    pytest.importorskip("zennit")
    model, x, target = ready(make), image(), torch.tensor([1, 3])
    rewritten = for_zennit(model)
    torch.testing.assert_close(rewritten(x), model(x), rtol=1e-9, atol=1e-12)
    close(LRP(model, **COMPOSITES[composite])(x, target), zennits(rewritten, composite, x, target), rtol=1e-5)


def test_relevance_at_a_layer_is_zennits() -> None:
    composites = pytest.importorskip("zennit.composites")
    model, x, target = ready(lambda: tv.alexnet(num_classes=5)), image(side=64), torch.tensor([1, 3])
    copied, seen = copy.deepcopy(model), []
    copied.features[5].register_forward_hook(lambda module, args, output: seen.append(output))
    with composites.EpsilonPlus().context(copied):
        logits = copied(x.clone().requires_grad_())
        seed = (F.one_hot(target, 5) * logits).detach()
        (wanted,) = torch.autograd.grad(logits, seen[0], seed)
    found = LRP(model, layer="features.5").explain(x, target, native=True).maps
    assert found.shape == wanted.shape[:1] + wanted.shape[2:]
    close(found, wanted.sum(1))


# Slow loops


def loop(x: np.ndarray, w: np.ndarray, b: np.ndarray, relevance: np.ndarray, rule: str) -> np.ndarray:
    """One dense layer's rule, contribution by contribution, as Bach et al. (2015) write it."""
    found = np.zeros_like(x)
    for k in range(len(b)):
        z = [x[j] * w[k, j] for j in range(len(x))]
        if rule == "epsilon":
            total = sum(z) + b[k]
            total += 0.25 if total >= 0 else -0.25
            shares = [value / total for value in z]
        else:
            up = sum(max(value, 0) for value in z) + max(b[k], 0)
            down = sum(min(value, 0) for value in z) + min(b[k], 0)
            alpha, beta = {"alphabeta": (2, 1), "zplus": (1, 0)}[rule]
            shares = [
                alpha * max(value, 0) / (up + 1e-6) - beta * min(value, 0) / (down + (1e-6 if down >= 0 else -1e-6))
                for value in z
            ]
        found += np.array(shares) * relevance[k]
    return found


@pytest.mark.parametrize("rule", ["epsilon", "zplus", "alphabeta"])
def test_rules_are_those_of_a_slow_loop(rule: Any) -> None:
    model = ready(lambda: nn.Sequential(nn.Flatten(), nn.Linear(12, 7), nn.ReLU(), nn.Linear(7, 4)))
    x = image(1, 2)
    hidden = model[1](x.flatten(1))
    logits = model(x)
    top = np.zeros(4)
    top[2] = float(logits[0, 2])
    numbers = [t.detach().numpy() for t in (model[3].weight, model[3].bias, model[1].weight, model[1].bias)]
    middle = loop(hidden.relu()[0].detach().numpy(), *numbers[:2], top, rule)
    bottom = loop(x.flatten().numpy(), *numbers[2:], middle, rule)
    found = LRP(model, dense=rule, epsilon=0.25)(x, torch.tensor([2]))
    np.testing.assert_allclose(found.detach()[0], bottom.reshape(3, 2, 2).sum(0), rtol=1e-9, atol=1e-12)


def test_sums_share_in_proportion() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch, self.head = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.head((x + self.branch(x)).mean((2, 3)))

    model, x = ready(Residual), image(1, 2)
    found = LRP(model, conv="epsilon")(x, torch.tensor([0])).detach()
    # In a linear model without biases every epsilon rule gives weight times input.
    total = torch.eye(3).double() + model.branch.weight[:, :, 0, 0]
    wanted = (model.head.weight[0] @ total)[:, None, None] * x[0] / 4
    torch.testing.assert_close(found[0], wanted.sum(0), rtol=1e-4, atol=1e-7)


# Conservation


@pytest.mark.parametrize("first", ["same", "flat", "box"])
@pytest.mark.parametrize("conv", ["zplus", "epsilon", "alphabeta", "gamma"])
def test_relevance_is_conserved_where_there_is_no_bias(conv: Any, first: Any) -> None:
    model = ready(lambda: tv.resnet18(num_classes=5))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
            module.bias.zero_()
    model.fc.bias.zero_()
    x = image()
    found = LRP(model, conv=conv, first=first, epsilon=1e-9).explain(x)
    wanted = found.logits.amax(1)
    # alpha-beta magnifies what the stabilisers take: shares of both signs cancel.
    torch.testing.assert_close(found.maps.sum((1, 2)), wanted, rtol=0.05 if conv == "alphabeta" else 2e-3, atol=0)


def test_relevance_is_conserved_at_a_layer_too() -> None:
    model = ready(lambda: tv.squeezenet1_1(num_classes=5))
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    for layer in ("features.4", "features.9.expand3x3"):
        found = LRP(model, layer=layer).explain(image(), native=True)
        if layer == "features.4":
            torch.testing.assert_close(found.maps.sum((1, 2)), found.logits.amax(1), rtol=1e-3, atol=0)
        else:  # one of two branches has a part of it
            assert (found.maps.sum((1, 2)).abs() < found.logits.amax(1)).all()


# How a model is written does not matter


class Written(nn.Module):
    """The same network in several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3)
        self.act, self.head = nn.ReLU(inplace=True), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(x))
        if self.how == "modules":
            return self.head(self.act(self.b(self.act(x))).mean((2, 3)))
        if self.how == "functions":
            return F.linear(F.relu(self.b(F.relu_(x))).mean((2, 3)), self.head.weight, self.head.bias)
        x = F.conv2d(torch.clamp(x, min=0), self.b.weight, self.b.bias).clamp_(min=0)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("how", ["functions", "tensor methods"])
def test_the_same_network_written_otherwise_has_the_same_map(how: str) -> None:
    wanted = LRP(ready(lambda: Written("modules")))(image(side=9), torch.tensor([0, 1]))
    close(LRP(ready(lambda: Written(how)))(image(side=9), torch.tensor([0, 1])), wanted, rtol=1e-9)


def test_a_reused_module_is_explained_like_two_copies() -> None:
    class Twice(nn.Module):
        def __init__(self, shared: bool) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 3, 3, padding=1)
            self.two = self.one if shared else copy.deepcopy(self.one)

        def forward(self, x: Tensor) -> Tensor:
            return self.two(self.one(x).relu()).relu().mean((2, 3))

    close(LRP(ready(lambda: Twice(True)))(image()), LRP(ready(lambda: Twice(False)))(image()), rtol=1e-12)


def test_it_explains_the_weights_that_are_there_now() -> None:
    model, x = ready(lambda: Written("modules")), image(side=9)
    interpreter = LRP(model)
    interpreter(x)
    other = {name: value + 0.05 if value.is_floating_point() else value for name, value in model.state_dict().items()}
    fresh = copy.deepcopy(model)
    fresh.load_state_dict(other)
    wanted = LRP(fresh)(x, torch.tensor([0, 1]))
    model.load_state_dict(other)
    close(interpreter(x, torch.tensor([0, 1])), wanted, rtol=1e-12)
    model.head = copy.deepcopy(fresh.head)
    close(interpreter(x, torch.tensor([0, 1])), wanted, rtol=1e-12)


# Derivatives


def smooth_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 3), nn.ReLU6(), nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    )  # fmt: skip


@pytest.mark.parametrize("settings", [
    {"conv": "zplus"}, {"conv": "epsilon", "epsilon": 0.1}, {"conv": "alphabeta"}, {"conv": "gamma"},
    {"dense": "zplus"}, {"dense": "gamma"}, {"first": "flat"}, {"first": "box"}, {"layer": "3"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("smooth", [Softplus(3.0), None], ids=["softplus", "relu"])
def test_the_derivative_by_input_and_weights_is_exact(settings: dict[str, Any], smooth: Softplus | None) -> None:
    model = ready(smooth_net).requires_grad_(True)
    # Not at the edge of a rule: weights and values away from zero. LRP needs no surrogate on rectifiers.
    x = image(1, 10).requires_grad_()
    interpreter, parameters = LRP(model, **settings), [*model.parameters()]
    values = [x, *parameters]
    rng = torch.Generator().manual_seed(4)
    directions = [torch.randn(v.shape, generator=rng, dtype=v.dtype) for v in values]

    def total() -> Tensor:
        maps = interpreter.explain(x, torch.tensor([1]), native=True).maps
        return (maps * torch.linspace(-1, 1, maps.numel()).reshape(maps.shape)).sum()

    def check() -> None:
        gradients = torch.autograd.grad(total(), values, allow_unused=True)
        for value, gradient, direction in zip(values, gradients, directions, strict=True):
            ends = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    value.add_(step * direction)
                    ends.append(float(total()))
                    value.sub_(step * direction)
            wanted = (ends[0] - ends[1]) / 2e-6
            slope = 0.0 if gradient is None else float((gradient * direction).sum())
            assert slope == pytest.approx(wanted, rel=2e-5, abs=2e-8)

    if smooth is None:
        check()
    else:
        with swapped(smooth):
            check()


@pytest.mark.parametrize("conv", ["gamma", "epsilon", "zplus"])
def test_the_derivative_is_exact_in_a_transformer(conv: Any) -> None:
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=5
        )
        x, direction, weights = torch.rand(1, 3, 32, 32), torch.randn(1, 3, 32, 32), torch.randn(32, 32)
    interpreter = LRP(model.double().eval(), conv=conv)
    x, direction, weights = x.double().requires_grad_(), direction.double(), weights.double()

    def total(at: Tensor) -> Tensor:
        return (interpreter.explain(at, torch.tensor([3])).maps[0] * weights).sum()

    (gradient,) = torch.autograd.grad(total(x), x)
    # A larger step than 1e-6 is off by percents: relevance bends where a denominator is near zero.
    ahead, behind = (total(x.detach() + h * direction).item() for h in (1e-7, -1e-7))
    assert float((gradient * direction).sum()) == pytest.approx((ahead - behind) / 2e-7, rel=1e-5)


def test_an_optimiser_step_moves_the_map() -> None:
    model, x = ready(lambda: Written("modules")).requires_grad_(True), image(side=9)
    interpreter = LRP(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = interpreter(x).detach()
    interpreter(x).square().sum().backward()
    assert all(
        p.grad is not None and p.grad.abs().sum() > 0 for p in [model.a.weight, model.norm.weight, model.head.bias]
    )
    optimiser.step()
    assert not torch.allclose(interpreter(x), before)


def test_the_smoothed_gradient_of_adv2_keeps_the_map() -> None:
    model, x = ready(lambda: Written("modules")), image(side=9)
    wanted = LRP(model)(x)
    with swapped(SmoothGradient()):
        close(LRP(model)(x), wanted, rtol=1e-12)


# Attention


class Attending(nn.Module):
    """One head of attention over 4 patches behind a layer norm, no biases, logits from the tokens' mean."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, self.norm = fused, nn.LayerNorm(3, bias=False)
        self.q, self.k, self.v, self.head = (nn.Linear(3, n, bias=False) for n in (3, 3, 3, 2))

    def forward(self, x: Tensor) -> Tensor:
        t = self.norm(x.flatten(2).mT)
        q, k, v = self.q(t)[:, None], self.k(t)[:, None], self.v(t)[:, None]
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v)
        else:
            mixed = (q @ k.transpose(-2, -1) / 3**0.5).softmax(-1) @ v
        return self.head(mixed[:, 0].mean(1))


def by_hand(model: Attending, x: Tensor, target: int) -> Tensor:
    """AttnLRP of one image ``[3, 2, 2]``, step by step in loops (Achtibat et al. 2024, eq. 8 and 13-15)."""
    t = x.flatten(1).T
    centred = t - t.mean(1, keepdim=True)
    norm = centred / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    q, k, v = (norm @ layer.weight.T for layer in (model.q, model.k, model.v))
    a = (q @ k.T) / 3**0.5
    s = a.softmax(1)
    o = s @ v
    logit = o.mean(0) @ model.head.weight[target]
    r_o = o / 4 * model.head.weight[target] * logit / logit
    r_s, r_v = torch.zeros_like(s), torch.zeros_like(v)
    for i in range(4):
        for p in range(3):
            for j in range(4):
                share = s[i, j] * v[j, p] * r_o[i, p] / (2 * o[i, p])
                r_s[i, j] += share
                r_v[j, p] += share
    r_a = a * (r_s - s * r_s.sum(1, keepdim=True))
    r_q, r_k = torch.zeros_like(q), torch.zeros_like(k)
    for i in range(4):
        for j in range(4):
            for p in range(3):
                share = q[i, p] * k[j, p] / 3**0.5 * r_a[i, j] / (2 * a[i, j])
                r_q[i, p] += share
                r_k[j, p] += share
    r_norm = sum(
        norm * ((r / z) @ layer.weight) for r, z, layer in ((r_q, q, model.q), (r_k, k, model.k), (r_v, v, model.v))
    )
    scale = r_norm / norm * model.norm.weight / (t.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    return (t * (scale - scale.mean(1, keepdim=True))).sum(1).reshape(2, 2)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_has_the_rules_of_attnlrp(fused: bool) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = Attending(fused).double().eval(), torch.rand(2, 3, 2, 2).double()
    found = LRP(model, epsilon=1e-12)(x, torch.tensor([1, 0]))
    for i, target in enumerate((1, 0)):
        close(found[i], by_hand(model, x[i], target).detach(), rtol=1e-3)


def test_without_its_softmax_all_relevance_of_attention_arrives() -> None:
    # Half of a product goes to each factor; a layer norm takes its deviation as a constant.
    class Linear(Attending):
        def forward(self, x: Tensor) -> Tensor:
            t = self.norm(x.flatten(2).mT)
            return self.head((self.q(t) @ (self.k(t).mT @ self.v(t))).mean(1))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model, x = Linear(False).double().eval(), torch.rand(2, 3, 2, 2).double()
    found = LRP(model, epsilon=1e-12).explain(x, torch.tensor([1, 0]))
    close(found.maps.sum((1, 2)), found.logits.gather(1, torch.tensor([[1], [0]]))[:, 0], rtol=1e-3)


# What it refuses


@pytest.mark.parametrize(
    ("make", "operation"),
    [
        (lambda: timm.create_model("efficientnet_b0", num_classes=5), "mul"),
    ],
    ids=["gates"],
)
def test_an_operation_without_a_rule_is_named(make: Callable[[], nn.Module], operation: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"no rule for '{operation}'.*use a gradient method"):
        LRP(ready(make))(image())


def test_statistics_of_the_batch_are_refused() -> None:
    class Shared(Written):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.batch_norm(self.a(x), None, None, training=True).mean((2, 3)))

    with pytest.raises(InputError, match="take the batch's statistics"):
        LRP(ready(lambda: Shared("")))(image())


def test_settings_are_checked() -> None:
    model = ready(lambda: Written("modules"))
    with pytest.raises(FieldError, match=r"beta must be alpha - 1, got alpha 2\.0 and beta 0\.5"):
        LRP(model, beta=0.5)
    with pytest.raises(FieldError, match="conv must be one of"):
        LRP(model, conv="z+")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="did you mean 'norm'"):
        LRP(model, layer="nrom")(image(side=9))
    with pytest.raises(UnsupportedModelError, match=r"at layer 'head' has shape \[2, 4\]"):
        LRP(model, layer="head")(image(side=9))
