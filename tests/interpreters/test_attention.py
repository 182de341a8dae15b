"""Vision transformers: tokens as a feature map, attention rolled out, second derivatives through fused attention."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from robustexplain import maps as ops
from robustexplain import models
from robustexplain.errors import InputError, UnknownNameError, UnsupportedModelError
from robustexplain.interpreters import AttentionRollout, GradCAM, GradCAMPlusPlus, Gradient, LayerCAM
from robustexplain.interpreters.cam.sites import Site
from robustexplain.interpreters.cam.token_grid import Attentions, Grid, token_grid, token_layer

SIDE, PATCH = 32, 8


def close(found: Tensor, wanted: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted.to(found), rtol=rtol, atol=rtol * wanted.abs().max().item())


def randomised(net: nn.Module, seed: int = 3) -> nn.Module:
    """The net with weights that make attention and classes differ."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * (0.5 if "token" in name else 0.2))
    return net.eval()


def vit(kind: str, fused: bool = True, **options: Any) -> nn.Module:
    """A small transformer of timm or torchvision on 32 pixels in patches of 8."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "torchvision":
            return randomised(VisionTransformer(SIDE, PATCH, 3, 3, 24, 48, num_classes=5))
        names = {"distilled": "deit_tiny_distilled_patch16_224"}
        extra: dict[str, Any] = {
            "registers": {"reg_tokens": 3},
            "average": {"global_pool": "avg", "class_token": False, "fc_norm": False},
        }.get(kind, {})
        net = timm.create_model(
            names.get(kind, "vit_tiny_patch16_224"),
            **{"img_size": SIDE, "patch_size": PATCH, "depth": 3, "embed_dim": 24, "num_heads": 3, "num_classes": 5},
            **extra,
            **options,
        )
    for block in net.blocks:
        block.attn.fused_attn = fused
    return randomised(net)


KINDS = {"plain": (1, [0]), "distilled": (2, [0, 1]), "registers": (4, [0]), "average": (0, list(range(16)))}
KINDS["torchvision"] = (1, [0])


@pytest.fixture
def x() -> Tensor:
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(5))


TARGET = torch.tensor([0, 2, 4])


def attention_by_hand(net: nn.Module, x: Tensor) -> list[Tensor]:
    """The weights of every block from its own projections, ``[B, heads, N, N]`` each."""
    found: list[Tensor] = []

    def timms(module: nn.Module, args: Any, output: Any) -> None:
        b, n, d = args[0].shape
        q, k, _ = module.qkv(args[0]).reshape(b, n, 3, 3, d // 3).permute(2, 0, 3, 1, 4)
        found.append(torch.exp(q @ k.transpose(2, 3) / (d // 3) ** 0.5))
        found[-1] = found[-1] / found[-1].sum(-1, keepdim=True)

    def torchvisions(module: nn.MultiheadAttention, args: Any, output: Any) -> None:
        tokens = args[0].transpose(0, 1)
        _, weights = F.multi_head_attention_forward(
            tokens, tokens, tokens, 24, 3, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
            module.out_proj.weight, module.out_proj.bias, training=False, average_attn_weights=False,
        )  # fmt: skip
        found.append(weights)

    blocks = [m for m in net.modules() if hasattr(m, "qkv") or isinstance(m, nn.MultiheadAttention)]
    handles = [m.register_forward_hook(timms if hasattr(m, "qkv") else torchvisions) for m in blocks]
    net(x)
    for handle in handles:
        handle.remove()
    return [weights.detach() for weights in found]


# Attention is seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fused", [True, False])
def test_attention_is_seen_however_it_is_computed_and_logits_stay(kind: str, fused: bool, x: Tensor) -> None:
    net, seen = vit(kind, fused), []
    with Attentions(seen.append):
        logits = net(x)
    close(logits, net(x), 1e-5)
    for found, wanted in zip(seen, attention_by_hand(net, x), strict=True):
        close(found, wanted, 1e-5)
    (gradient,) = torch.autograd.grad(logits.sum(), seen[0])
    assert gradient.abs().sum() > 0


def test_attention_in_inference_mode_and_without_gradients_is_seen(x: Tensor) -> None:
    for kind in ("plain", "torchvision"):
        net, seen = vit(kind), []
        with torch.inference_mode(), Attentions(seen.append):
            net(x)
        assert [w.shape for w in seen] == [(3, 3, 17, 17)] * 3


@pytest.mark.parametrize("options", ["none", "bool mask", "float mask", "causal", "scale", "groups"])
def test_attention_from_its_definition_is_torchs(options: str) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 6, 8, generator=rng) for _ in range(3))
    given: dict[str, Any] = {
        "bool mask": {"attn_mask": torch.rand(6, 6, generator=rng).fill_diagonal_(1) > 0.5},
        "float mask": {"attn_mask": torch.randn(2, 1, 6, 6, generator=rng)},
        "causal": {"is_causal": True},
        "scale": {"scale": 0.7},
        "groups": {"enable_gqa": True},
    }.get(options, {})
    if options == "groups":
        k, v = k[:, :2], v[:, :2]
    wanted, seen = F.scaled_dot_product_attention(q, k, v, **given), []
    with Attentions(seen.append):
        found = F.scaled_dot_product_attention(q, k, v, **given)
    close(found, wanted, 1e-5)
    assert len(seen) == 1
    close(seen[0].sum(-1), torch.ones(2, 4, 6), 1e-6)


# Grad-CAM on tokens


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_found_is_the_last_blocks_first_norm(kind: str, x: Tensor) -> None:
    name = "encoder.layers.encoder_layer_2.ln_1" if kind == "torchvision" else "blocks.2.norm1"
    assert token_layer(vit(kind), x) == name


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_the_full_sized_models_are_read_at_their_own_layer(name: str) -> None:
    net = timm.create_model(name, num_classes=3, depth=2)
    maps = GradCAM(net.eval()).explain(torch.rand(1, 3, 224, 224), native=True).maps
    assert maps.shape == (1, 14, 14)
    assert token_layer(net, torch.rand(1, 3, 224, 224)) == "blocks.1.norm1"


@pytest.mark.parametrize("kind", KINDS)
def test_gradcam_on_tokens_drops_the_prefix_and_averages_over_patches(kind: str, x: Tensor) -> None:
    net, (prefix, _) = vit(kind), KINDS[kind]
    layer = net.get_submodule(token_layer(net, x) or "")
    kept: list[Tensor] = []
    with layer.register_forward_hook(lambda m, args, out: kept.append(out)):
        logits = net(x)
    (gradient,) = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), kept[0])
    a, g = kept[0][:, prefix:].detach(), gradient[:, prefix:]
    wanted = torch.zeros(3, 4, 4)
    for b in range(3):
        for patch in range(16):
            wanted[b, patch // 4, patch % 4] = sum(g[b, :, d].mean() * a[b, patch, d] for d in range(24))
    close(GradCAM(net, relu=False).explain(x, TARGET, native=True).maps, wanted)
    close(GradCAM(net).explain(x, TARGET, native=True).maps, wanted.clamp(min=0))


@pytest.mark.parametrize("cls", [GradCAM, LayerCAM])
@pytest.mark.parametrize("kind", ["plain", "distilled", "torchvision"])
def test_maps_of_tokens_are_those_of_pytorch_grad_cam(kind: str, cls: type[GradCAM], x: Tensor) -> None:
    theirs = pytest.importorskip("pytorch_grad_cam")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    net, prefix = vit(kind), KINDS[kind][0]
    layer = net.get_submodule(token_layer(net, x) or "")

    def grid(tokens: Tensor) -> Tensor:
        return tokens[:, prefix:].reshape(len(tokens), 4, 4, -1).permute(0, 3, 1, 2)

    cam = getattr(theirs, cls.__name__)(net, [layer], reshape_transform=grid)
    wanted = torch.from_numpy(cam(x, [ClassifierOutputTarget(c) for c in TARGET.tolist()]))
    torch.testing.assert_close(ops.minmax(cls(net)(x, TARGET).detach()), wanted, rtol=1e-4, atol=1e-4)


def test_a_layer_of_tokens_or_of_patches_can_be_named(x: Tensor) -> None:
    net = vit("plain")
    assert GradCAM(net, layer="blocks.1").explain(x, native=True).maps.shape == (3, 4, 4)
    assert GradCAMPlusPlus(net, layer="patch_embed.proj").explain(x, native=True).maps.shape == (3, 4, 4)
    with pytest.raises(UnknownNameError, match=r"did you mean .*'blocks\.1\.norm1'"):
        GradCAM(net, layer="blocks.1.norm")(x)
    with pytest.raises(UnsupportedModelError, match=r"layer 'head' gives shape \[3, 5\]"):
        GradCAM(net, layer="head")(x)


def test_a_hybrid_that_ends_in_a_feature_map_is_read_there(x: Tensor) -> None:
    class Hybrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.last, self.head = vit("plain"), nn.Conv2d(24, 7, 3), nn.Linear(7, 5)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.inner.forward_features(x)[:, 1:]
            return self.head(self.last(tokens.mT.unflatten(2, (4, 4))).mean((2, 3)))

    model = Hybrid().eval()
    assert token_layer(model, x) is None
    # Each cell of the last map sees the whole image: with some weights the one in front of it is what can be shown.
    assert GradCAM(model).explain(x, native=True).maps.shape in ((3, 2, 2), (3, 4, 4))


# Attention rollout


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("heads", ["mean", "max", "min"])
def test_rollout_is_the_product_of_the_layers(kind: str, heads: Any, x: Tensor) -> None:
    net, (prefix, read) = vit(kind).double(), KINDS[kind]
    x = x.double()
    product = torch.eye(16 + prefix).double()
    for weights in attention_by_hand(net, x):
        fused = {"mean": weights.mean(1), "max": weights.amax(1), "min": weights.amin(1)}[heads]
        mixed = 0.5 * fused + 0.5 * torch.eye(16 + prefix).double()
        product = (mixed / mixed.sum(-1, keepdim=True)) @ product
    wanted = product[:, read].mean(1)[:, prefix:].reshape(3, 4, 4)
    found = AttentionRollout(net, heads=heads).explain(x, native=True)
    close(found.maps, wanted, 1e-9)
    close(found.logits, net(x), 1e-9)
    if heads == "mean" and prefix == 0:
        close(found.maps.sum((1, 2)), torch.ones(3).double(), 1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_weighted_rollout_is_chefers_update(kind: str, x: Tensor) -> None:
    net, (prefix, read) = vit(kind).double(), KINDS[kind]
    x = x.double()
    attention: list[Tensor] = []
    with Attentions(attention.append):
        logits = net(x)
    gradients = torch.autograd.grad(logits.gather(1, TARGET[:, None]).sum(), attention)
    for seen, wanted in zip(attention, attention_by_hand(net, x), strict=True):
        close(seen, wanted, 1e-9)
    wanted = torch.zeros(3, 4, 4).double()
    for b in range(3):
        relevance = torch.eye(16 + prefix).double()
        for weights, gradient in zip(attention, gradients, strict=True):
            mean = (gradient[b] * weights[b]).clamp(min=0).mean(0).detach()
            relevance = relevance + mean @ relevance
        wanted[b] = relevance[read].mean(0)[prefix:].reshape(4, 4)
    close(AttentionRollout(net, weighting="gradient").explain(x, TARGET, native=True).maps, wanted, 1e-9)


def test_gradients_of_the_attention_are_right(x: Tensor) -> None:
    # The logit's derivative by one attention weight, by finite differences: the block is recomputed with it changed.
    net, x = vit("plain", fused=False).double(), x[:1].double()
    attention: list[Tensor] = []
    with Attentions(attention.append):
        logits = net(x)
    (gradient,) = torch.autograd.grad(logits[0, 2], attention[1])

    def logit(step: float) -> float:
        def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            moved = output.clone()
            moved[0, 1, 3, 4] += step
            return moved

        with net.blocks[1].attn.attn_drop.register_forward_hook(change):
            return float(net(x)[0, 2].detach())

    assert float(gradient[0, 1, 3, 4]) == pytest.approx((logit(1e-4) - logit(-1e-4)) / 2e-4, rel=1e-6)


def test_rollout_explains_no_class_and_its_weighted_form_each(x: Tensor) -> None:
    net = vit("plain")
    plain, weighted = AttentionRollout(net), AttentionRollout(net, weighting="gradient")
    assert torch.equal(plain(x, TARGET), plain(x, TARGET.flip(0)))
    assert not torch.allclose(weighted(x, TARGET), weighted(x, (TARGET + 1) % 5))
    assert (plain.class_specific, weighted.class_specific) == (False, True)
    assert (plain.is_gradient, weighted.is_gradient) == (False, True)


def test_the_residual_share_decides_between_identity_and_attention(x: Tensor) -> None:
    net = vit("plain").double()
    x = x.double()
    assert not AttentionRollout(net, residual=1.0)(x).any()
    product = torch.eye(17).double()
    for weights in attention_by_hand(net, x):
        product = weights.mean(1) @ product
    found = AttentionRollout(net, residual=0.0).explain(x, native=True).maps
    close(found, product[:, 0, 1:].reshape(3, 4, 4), 1e-9)


def test_discarding_drops_the_weakest_entries_of_each_sample(x: Tensor) -> None:
    net = vit("plain").double()
    x = x.double()
    wanted = torch.zeros(3, 4, 4).double()
    layers = attention_by_hand(net, x)
    for b in range(3):
        product = torch.eye(17).double()
        for weights in layers:
            fused = weights[b].mean(0)
            limit = fused[:, 1:].flatten().sort().values[int(0.6 * 17 * 16)]
            fused = torch.cat([fused[:, :1], fused[:, 1:] * (fused[:, 1:] >= limit)], 1)
            mixed = (fused + torch.eye(17).double()) / 2
            product = (mixed / mixed.sum(1, keepdim=True)) @ product
        wanted[b] = product[0, 1:].reshape(4, 4)
    close(AttentionRollout(net, discard=0.6).explain(x, native=True).maps, wanted, 1e-9)


# Grids


def test_a_grid_that_is_not_square_is_laid_out_right(x: Tensor) -> None:
    net = vit("plain", dynamic_img_size=True)
    wide = torch.cat([x, x[..., :16]], 3)
    for interpreter in (GradCAM(net), AttentionRollout(net)):
        assert interpreter.explain(wide, native=True).maps.shape == (3, 4, 6)
        assert interpreter.explain(x, native=True).maps.shape == (3, 4, 4)
        assert interpreter(wide).shape == (3, 32, 48)
    tokens = torch.arange(2 + 6.0)[None, :, None]
    assert Grid(2, 2, 3).unfold(tokens).tolist() == [[[[2, 3, 4], [5, 6, 7]]]]


def test_without_a_feature_map_the_grid_has_the_proportions_of_the_image() -> None:
    for shape, tokens, grid in (
        ((8, 8), 17, Grid(1, 4, 4)),
        ((8, 8), 16, Grid(0, 4, 4)),
        ((8, 16), 33, Grid(1, 4, 8)),
        ((16, 8), 34, Grid(2, 8, 4)),
    ):
        net = nn.Sequential(nn.Flatten(), nn.Linear(shape[0] * shape[1], 2)).eval()
        assert token_grid(net, torch.rand(1, 1, *shape), tokens) == grid
    with pytest.raises(
        UnsupportedModelError, match=r"30 tokens of Sequential fit no grid on an image of 8 x 40 pixels"
    ):
        token_grid(nn.Sequential(nn.Flatten(), nn.Linear(320, 2)), torch.rand(1, 1, 8, 40), 30)


@pytest.mark.parametrize("make", [GradCAM, AttentionRollout, Gradient])
def test_an_image_of_a_size_that_the_model_does_not_take_is_refused(make: Any, x: Tensor) -> None:
    with pytest.raises(InputError, match=r"refuses x of shape \[3, 3, 24, 32\]: .*[Hh]eight"):
        make(vit("plain"))(x[:, :, :24])
    with pytest.raises(InputError, match=r"refuses x of shape \[3, 3, 30, 32\]: .*divisible by patch size"):
        make(vit("plain", dynamic_img_size=True))(x[:, :, :30])
    with pytest.raises(InputError, match=r"refuses x of shape \[3, 3, 24, 32\]: .*[Hh]eight"):
        make(vit("torchvision"))(x[:, :, :24])


# Models that are refused


def test_rollout_refuses_a_convolutional_network(tiny_model: nn.Module, grey: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"computes no self-attention .*use GradCAM or Gradient"):
        AttentionRollout(tiny_model)(grey)


def test_attention_in_windows_is_not_rolled_out_and_its_map_is_read_with_channels_last() -> None:
    with torch.random.fork_rng(devices=[]):
        net = timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=56, depths=(1, 1), num_heads=(2, 2), embed_dim=16, num_classes=3
        ).eval()
    x = torch.rand(1, 3, 56, 56)
    with pytest.raises(UnsupportedModelError, match="same tokens of an image; SwinTransformer attends over"):
        AttentionRollout(net)(x)
    gradcam = GradCAM(net)
    assert gradcam.explain(x, native=True).maps.shape == (1, 7, 7)
    assert next(iter(gradcam._sites.values())) == Site("norm", "channels last")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": "median"}, r"heads must be one of 'mean', 'max', 'min', got 'median'"),
        ({"weighting": "lrp"}, "weighting must be one of"),
        ({"residual": 1.5}, r"residual must be at most 1, got 1\.5"),
        ({"discard": 1.0}, r"discard must be below 1, got 1\.0"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        AttentionRollout(vit("plain"), **settings)


# Second derivatives through fused attention


@pytest.mark.parametrize("kind", ["plain", "torchvision"])
def test_a_gradient_map_of_fused_attention_is_twice_differentiable(kind: str, x: Tensor) -> None:
    net = vit(kind).double()
    x = x[:1].double().requires_grad_()
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    interpreter, target = Gradient(net, channels="sum"), torch.tensor([3])
    loss = interpreter(x, target).square().sum()
    (gradient,) = torch.autograd.grad(loss, x)

    def value(t: float) -> float:
        return float(interpreter.explain(x.detach() + t * v, target).maps.detach().square().sum())

    slope = float((gradient * v).sum())
    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-6)


@pytest.mark.parametrize("kind", ["plain", "torchvision"])
def test_gradient_weighted_rollout_is_differentiable_by_input_and_weights(kind: str, x: Tensor) -> None:
    net, x = vit(kind).double(), x[:1].double().requires_grad_()
    interpreter, target = AttentionRollout(net, weighting="gradient"), torch.tensor([3])
    ways = [x, *net.parameters()]
    rng = torch.Generator().manual_seed(1)
    moves = [torch.randn(p.shape, generator=rng).double() * 0.1 for p in ways]
    loss = interpreter(x, target).square().sum()
    gradients = torch.autograd.grad(loss, ways, allow_unused=True)

    def value(t: float, moved: slice) -> float:
        with torch.no_grad():
            for p, move in zip(ways[moved], moves[moved], strict=True):
                p.add_(t * move)
            found = float(interpreter.explain(x.detach(), target).maps.square().sum())
            for p, move in zip(ways[moved], moves[moved], strict=True):
                p.sub_(t * move)
        return found

    for moved in (slice(0, 1), slice(1, None)):
        slope = sum(float((g * v).sum()) for g, v in zip(gradients[moved], moves[moved], strict=True) if g is not None)
        assert slope == pytest.approx((value(1e-6, moved) - value(-1e-6, moved)) / 2e-6, rel=1e-5)


def test_the_fused_kernel_alone_is_not() -> None:
    # If this one fails, torch has learnt it, and Interpreter.explain need not ask for the plain kernel any more.
    x = torch.rand(1, 3, SIDE, SIDE, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        (first,) = torch.autograd.grad(vit("plain")(x)[0, 0], x, create_graph=True)
        with pytest.raises(RuntimeError, match=r"not implemented|not supported|does not require grad"):
            torch.autograd.grad(first.square().sum(), x)


def test_the_choice_of_kernels_is_left_as_it_was(x: Tensor) -> None:
    before = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    Gradient(vit("plain"))(x)
    assert (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()) == before


def test_a_transformer_of_the_library_is_explained_by_name() -> None:
    model = models.build("timm:test_vit", num_classes=4, seed=1)
    x = torch.rand(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))
    maps = AttentionRollout(copy.deepcopy(model))(x)
    assert maps.shape == (2, 160, 160)
    assert (maps.flatten(1).std(1) > 0).all()
