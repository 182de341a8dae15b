"""What is taken for a feature map was seen to follow the image: tokens, heads, windows and channels in other places."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from robustexplain.autograd.blanking import Blanked, follows
from robustexplain.errors import UnsupportedModelError
from robustexplain.interpreters import CAM, AttentionRollout, GradCAM, GradCAMPlusPlus, LayerCAM
from robustexplain.interpreters.cam.sites import Site
from robustexplain.interpreters.cam.token_grid import Grid

WIDTH, PATCH = 24, 4


class Tokens(nn.Module):
    """Patches, prefix tokens, a layout of one's own between two layers, and a head on the mean or the first token."""

    def __init__(self, layout: str, prefix: int = 0) -> None:
        super().__init__()
        self.layout, self.patch = layout, nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.prefix = nn.Parameter(torch.randn(1, prefix, WIDTH))
        self.inner, self.heads = nn.Identity(), nn.Identity()
        self.body, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x)
        height, width = t.shape[2:]
        if self.layout == "last":
            return self.head(self.body(self.inner(t.permute(0, 2, 3, 1))).mean((1, 2)))
        t = t.flatten(2).mT
        if self.layout == "heads":
            t = self.heads(t.unflatten(2, (2, -1)).transpose(1, 2)).transpose(1, 2).flatten(2)
        if self.layout == "windows":
            # Windows of 2 x 2, one after another: a sequence of as many tokens in another order.
            t = t.unflatten(1, (height // 2, 2, width // 2, 2)).permute(0, 1, 3, 2, 4, 5).flatten(1, 4)
        t = torch.cat([self.prefix.expand(len(x), -1, -1), t], 1)
        return self.head(torch.tanh(self.body(self.inner(t))).mean(1))


def net(layout: str, prefix: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tokens(layout, prefix).eval()


@pytest.fixture
def x() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def site(model: nn.Module, x: Tensor, **settings: Any) -> Site:
    interpreter = GradCAM(model, **settings)
    interpreter.explain(x)
    found: Site = next(iter(interpreter._sites.values()))
    return found


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
def test_tokens_are_laid_on_an_image_that_is_not_square_behind_any_prefix(prefix: int, x: Tensor) -> None:
    assert site(net("tokens", prefix), x, layer="inner") == Site("inner", "tokens", Grid(prefix, 8, 12))
    assert site(net("tokens", prefix), x).grid == Grid(prefix, 8, 12)


def test_channels_in_the_last_place_are_found(x: Tensor) -> None:
    assert site(net("last"), x).layout == "channels last"
    assert GradCAM(net("last")).explain(x, native=True).maps.shape == (2, 8, 12)


@pytest.mark.parametrize("cls", [GradCAM, GradCAMPlusPlus, LayerCAM])
def test_tokens_in_windows_are_no_map(cls: Any, x: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="does not change where a patch of the image is blanked"):
        cls(net("windows"), layer="inner")(x)
    # The layer in front of the windows is one, and everything passes it.
    assert site(net("windows"), x) == Site("patch")


def test_heads_are_no_channels_and_tokens_no_rows() -> None:
    # 8 x 8 patches of 12 numbers a head: [B, 2, 64, 12] has the form of a feature map.
    square = torch.rand(1, 3, 32, 32)
    with pytest.raises(UnsupportedModelError, match=r"gives shape \[1, 2, 64, 12\], which does not change"):
        GradCAM(net("heads"), layer="heads")(square)
    assert site(net("heads"), square).name != "heads"


def test_a_map_that_is_turned_does_not_follow_and_one_that_changes_everywhere_too_does() -> None:
    changes = torch.stack([_blob(row, column) for row in range(4) for column in range(4)])
    assert follows([changes, changes]) is True
    # What a tile does everywhere, and cells that change with every tile, are not counted.
    assert follows([changes * torch.arange(1, 17)[:, None, None] + torch.rand(16, 16)]) is True
    windows = changes.reshape(16, 4, 4, 4, 4).transpose(2, 3).reshape(16, 16, 16)
    shifted = changes.flatten(1).roll(1, 1).reshape(16, 16, 16)
    for wrong in (
        changes.mT,
        changes.flip(1),
        changes.flip(2),
        windows,
        shifted,
        changes.mean(2, True).expand(16, 16, 16),
    ):
        assert follows([wrong, wrong]) is False
    assert follows([changes, changes.mT]) is False
    assert follows([torch.zeros(16, 16, 16)]) is None


def _blob(row: int, column: int) -> Tensor:
    at = (torch.arange(16) + 0.5) / 16
    return torch.exp(-((at[:, None] - (row + 0.5) / 4) ** 2 + (at - (column + 0.5) / 4) ** 2) * 20)


@pytest.mark.parametrize("mixing", ["none", "convolution", "attention"])
def test_no_wrong_order_of_a_random_network_is_taken_for_a_map(mixing: str) -> None:
    taken = []
    for seed in range(6):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model, order = Mixed(mixing).eval(), torch.randperm(8 * 12)
        for site in (Site("right"), Site("tokens", "tokens", Grid(0, 8, 12))):
            blanked = Blanked(model, torch.rand(1, 3, 32, 48))
            assert blanked.agrees(site.changes)
            cells = torch.arange(8 * 12)
            windows = cells.reshape(2, 4, 3, 4).transpose(1, 2).flatten()
            for wrong in (
                order,
                windows,
                windows.argsort(),
                cells.flip(0),
                cells.roll(1),
                cells.reshape(12, 8).mT.flatten(),
            ):
                read = lambda found, s=site, w=wrong: s.changes(found).flatten(1)[:, w].reshape(16, 8, 12)  # type: ignore[union-attr, misc] # noqa: E731
                taken.append(blanked.agrees(read))
    assert len(taken) == 72
    assert not any(taken)


class Mixed(nn.Module):
    """Patches that learn of each other by nothing, by a convolution, or by attention, as a map and as tokens."""

    def __init__(self, mixing: str) -> None:
        super().__init__()
        self.mixing, self.patch = mixing, nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.near, self.pair = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Linear(WIDTH, 2 * WIDTH)
        self.right, self.tokens, self.head = nn.Identity(), nn.Identity(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        t = self.patch(x)
        if self.mixing == "convolution":
            t = torch.relu(t + self.near(t))
        if self.mixing == "attention":
            tokens = t.flatten(2).mT
            query, key = self.pair(tokens).chunk(2, 2)
            t = t + (torch.softmax(query @ key.mT, 2) @ tokens).mT.unflatten(2, t.shape[2:])
        return self.head(self.tokens(self.right(t).flatten(2).mT).mean(1))


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("cls", [CAM, GradCAM])
def test_the_layer_does_not_depend_on_the_first_image(value: float, cls: Any, tiny_model: nn.Module) -> None:
    first = torch.full((1, 1, 32, 32), value)
    other = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    asked = cls(tiny_model)
    asked(first)
    assert torch.equal(asked(other), cls(tiny_model)(other))


def test_images_of_many_sizes_are_kept_for_a_few(tiny_model: nn.Module) -> None:
    interpreter = GradCAM(tiny_model)
    for side in range(24, 41):
        interpreter(torch.rand(1, 1, side, 32))
    assert len(interpreter._sites) == 16
    assert (24, 32) not in interpreter._sites
    assert (40, 32) in interpreter._sites


def test_registers_and_class_token_of_dinov2_are_left_out() -> None:
    model = timm.create_model(
        "vit_small_patch14_reg4_dinov2", img_size=(42, 56), depth=2, embed_dim=24, num_heads=2, num_classes=3
    ).eval()
    assert site(model, torch.rand(1, 3, 42, 56)).grid == Grid(5, 3, 4)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("pvt_v2_b0", {}, "also computes attention of shape|same tokens|still changes other tokens"),
        ("cait_xxs24_224", {"img_size": 64, "depth": 2}, "also computes attention of shape"),
        ("xcit_nano_12_p16_224", {"img_size": 64, "depth": 1}, "fit no grid|still changes other tokens|also computes"),
    ],
)
def test_rollout_refuses_what_it_does_not_cover(name: str, settings: dict[str, Any], message: str) -> None:
    side = settings.get("img_size", 64)
    model = timm.create_model(name, num_classes=3, **settings).eval()
    with pytest.raises(UnsupportedModelError, match=message):
        AttentionRollout(model)(torch.rand(1, 3, side, side))


def test_rollout_refuses_tokens_that_are_mixed_beside_the_attention() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=24, num_heads=3, num_classes=3
        ).eval()
    x = torch.rand(1, 3, 32, 32)
    assert AttentionRollout(model).explain(x, native=True).maps.shape == (1, 4, 4)
    model.blocks[0].mlp = nn.Sequential(model.blocks[0].mlp, Rolled()).eval()
    with pytest.raises(UnsupportedModelError, match="still changes other tokens"):
        AttentionRollout(model)(x)


class Rolled(nn.Module):
    """Mixes each token with the one before it."""

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + tokens.roll(1, 1)


def test_blanking_looks_through_transforms_that_draw(tiny_model: nn.Module) -> None:
    from robustexplain.models import Transformed

    model = Transformed(tiny_model, ("resize-pad-6",)).eval()
    name = GradCAM(tiny_model)
    x = torch.rand(1, 1, 32, 32)
    name(x)
    plain = next(iter(name._sites.values()))
    found = site(model, x)
    assert found.name == f"model.{plain.name}"
    assert Blanked(model, x, [found.name]).agrees(found.changes)
