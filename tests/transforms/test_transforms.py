"""Transforms: JPEG against a real encoder, random resizing against loops, and what maps and attacks go through."""

from __future__ import annotations

import copy
import io
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustexplain.autograd.straight_through import rounded, straight_maps, straight_through
from robustexplain.errors import FieldError, InputError, MissingDataError
from robustexplain.interpreters import Gradient
from robustexplain.models import Classifier, with_transforms
from robustexplain.random_streams import Streams
from robustexplain.registry import TRANSFORMS
from robustexplain.transforms import BitDepth, ResizePad, Transform, transform, transforms


def photograph(name: str, height: int, width: int) -> np.ndarray:
    import skimage.data

    return np.ascontiguousarray(getattr(skimage.data, name)()[100 : 100 + height, 180 : 180 + width])


def encoded(image: np.ndarray, quality: int) -> np.ndarray:
    """What libjpeg's encoder and decoder make of an image."""
    memory = io.BytesIO()
    settings: dict[str, Any] = {"subsampling": "4:2:0"} if image.ndim == 3 else {}
    Image.fromarray(image).save(memory, "JPEG", quality=quality, **settings)
    return np.array(Image.open(memory)).astype(float)


@pytest.mark.parametrize("quality", [10, 50, 75, 95])
@pytest.mark.parametrize(
    ("name", "height", "width"), [("astronaut", 61, 75), ("astronaut", 96, 112), ("camera", 37, 51)]
)
def test_jpeg_is_that_of_a_real_encoder(name: str, height: int, width: int, quality: int) -> None:
    image = photograph(name, height, width)
    x = torch.from_numpy(image).reshape(height, width, -1).permute(2, 0, 1)[None] / 255
    found = 255 * transform(f"jpeg-{quality}")(x)[0].permute(1, 2, 0).reshape(image.shape).numpy()
    real = encoded(image, quality)
    away = np.abs(found - real)
    # In levels of 255. A block whose coefficient lies between two steps may come out one step off.
    assert away.mean() < 0.15
    assert away.max() < 8
    assert (away > 1.5).mean() < 0.02
    assert np.abs(found - encoded(image, quality - 3)).mean() > 3 * away.mean(), "another quality is as near"
    assert np.abs(image - real).mean() > 1, "nothing was lost: the test shows nothing"


NAMES = (
    *("jpeg-40", "resize-pad-4", "resize-pad-4-7", "bit-depth-3", "median-2", "nl-means-5-3-4"),
    *("uniform-noise-0.1", "uniform-noise-0.25-7", "tv-0.1", "wavelet-0.2"),
)
"""At least one name of each registered transform."""


def test_every_registered_transform_is_tested() -> None:
    assert {entry.name for entry in TRANSFORMS if not any(n.startswith(f"{entry.name}-") for n in NAMES)} == set()


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_keeps_images_apart_their_shape_range_and_dtype(name: str) -> None:
    change, x = transform(name), torch.rand(3, 3, 17, 20, generator=torch.Generator().manual_seed(5))
    found = change(x)
    assert change.name == name == transform(change.spec.options["name"]).name
    assert found.shape == x.shape
    assert 0 <= float(found.min()) <= float(found.max()) <= 1
    assert not torch.equal(found, x)
    torch.testing.assert_close(change(x[1:2]), found[1:2], rtol=0, atol=1e-6)
    for dtype in (torch.float64, torch.bfloat16):
        assert change(x.to(dtype)).dtype == dtype


def test_images_shrink_and_lie_anywhere_on_grey_as_each_sample_draws() -> None:
    change = ResizePad(3, seed=2)
    x = torch.rand(40, 2, 10, 12, generator=torch.Generator().manual_seed(6))
    found, sizes, corners = change(x), set(), set()
    for image, made, draw in zip(
        x, found, Streams.of(x, 2, "resize-pad").uniform(torch.zeros(40, 3).double()), strict=True
    ):
        short = 9 - int(3 * draw[0])
        height, width = short, 12 * short // 10
        top, left = int(draw[1] * (10 - height + 1)), int(draw[2] * (12 - width + 1))
        slow = torch.full_like(image, 0.5)
        for i in range(height):
            for j in range(width):
                slow[:, top + i, left + j] = image[:, i * 10 // height, j * 12 // width]
        assert torch.equal(made, slow)
        sizes.add(short)
        corners.add((top, left))
    assert sizes == {7, 8, 9}
    assert len(corners) > 6
    assert torch.equal(change.redrawn(2)(x), found)
    assert not torch.equal(change.redrawn(3)(x), found)


def test_a_map_behind_resizing_comes_back_to_where_the_image_shows_it() -> None:
    x = torch.rand(30, 1, 12, 14, generator=torch.Generator().manual_seed(8))
    change = ResizePad(4, seed=3)
    made = change(x)
    # A map that is the transformed image itself: of a place that is shown it must hold that place's pixel.
    back = change.taken_back(made[:, 0], x)[:, None]
    shown = (back == x).flatten(1).float().mean(1)
    assert float(shown.min()) > 0.4
    assert float((made == x).float().mean()) < 0.5 * float(shown.mean()), "without taking back it would hold as well"
    assert not bool((back == 0.5).any()), "grey is nowhere in the image"


def test_smoothing_is_that_of_scikit_image_and_counts_as_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    from skimage.restoration import denoise_tv_chambolle, denoise_wavelet

    x = torch.rand(2, 3, 12, 13, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    for name, oracle in (
        ("tv-0.1", lambda image: denoise_tv_chambolle(image, weight=0.1, channel_axis=-1)),
        ("wavelet-0.2", lambda image: denoise_wavelet(image, sigma=0.2, channel_axis=-1)),
    ):
        change = transform(name)
        expected = np.stack([oracle(image) for image in x.permute(0, 2, 3, 1).numpy()]).clip(0, 1)
        torch.testing.assert_close(change(x).permute(0, 2, 3, 1), torch.from_numpy(expected))
        leaf = x.clone().requires_grad_()
        assert not torch.autograd.grad(change(leaf).sum(), leaf)[0].any()
        assert bool((torch.autograd.grad(change.straight(leaf).sum(), leaf)[0] == 1).all())
    monkeypatch.setitem(sys.modules, "skimage.restoration", None)
    with pytest.raises(MissingDataError, match=r"robustexplain\[smoothing\]"):
        transform("tv-0.1")(x)


def test_names_that_make_no_sense_are_refused() -> None:
    for name in ("jpeg", "jpeg-", "jpeg-high", "jpeg-75-1", "blur-3", "resize-pad-1-2-3"):
        with pytest.raises(InputError, match=r"unknown transform .*jpeg-QUALITY.*resize-pad-PIXELS\[-SEED\]"):
            transform(name)
    for name in ("jpeg-0", "jpeg-101", "resize-pad-0"):
        with pytest.raises(FieldError, match="must be a whole number from 1"):
            transform(name)
    with pytest.raises(InputError, match="list of different names"):
        transforms(["jpeg-75", "jpeg-75"])
    with pytest.raises(InputError, match="grey or RGB images, got 2 channels"):
        transform("jpeg-75")(torch.rand(1, 2, 16, 16))
    with pytest.raises(InputError, match="cannot shrink by up to 16 pixels"):
        ResizePad(16)(torch.rand(1, 1, 16, 20))


# --- what goes straight through rounding ---


@pytest.mark.parametrize("told", [False, True])
def test_a_map_is_made_straight_through_rounding_and_its_derivative_only_where_told(told: bool) -> None:
    x = torch.tensor([0.3, 1.6, 2.4], dtype=torch.float64, requires_grad=True)

    def made() -> tuple[Tensor, Tensor]:
        with straight_maps():
            value = rounded(x).pow(3)
            return value, torch.autograd.grad(value.sum(), x, create_graph=True)[0]

    if told:
        with straight_through():
            value, slope = made()
            second, first = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (slope, value))
    else:
        value, slope = made()
        second, first = (torch.autograd.grad(v.sum(), x, retain_graph=True)[0] for v in (slope, value))
    r = x.detach().round()
    torch.testing.assert_close(slope.detach(), 3 * r**2)
    torch.testing.assert_close(second, 6 * r if told else 0 * r)
    torch.testing.assert_close(first, 3 * r**2 if told else 0 * r)
    assert not torch.autograd.grad(rounded(x).sum(), x)[0].any()


@pytest.mark.parametrize("name", ["bit-depth-3", "jpeg-50"])
def test_the_gradient_map_of_a_classifier_behind_rounding_is_not_zero(
    name: str, trained: Classifier, judged: tuple[Tensor, Tensor]
) -> None:
    x = judged[0][:4]
    model = with_transforms(trained, [name])
    maps = Gradient(model)(x)
    assert float(maps.abs().amax((1, 2)).min()) > 0
    if name == "bit-depth-3":
        target = model(x).argmax(1)
        torch.testing.assert_close(maps, Gradient(trained)(BitDepth(3)(x), target), rtol=0, atol=1e-6)
    leaf = x.clone().requires_grad_()
    assert not torch.autograd.grad(model(leaf).sum(), leaf)[0].any(), "whoever is not told gets the true derivative"
    with straight_through():
        assert torch.autograd.grad(model(leaf).sum(), leaf)[0].any()


def test_random_resizing_has_the_derivatives_of_a_selection(smooth_net: nn.Module) -> None:
    net, change = copy.deepcopy(smooth_net).double(), ResizePad(3)
    x = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    weights = torch.rand(2, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = change(x)
    (slope,) = torch.autograd.grad((net(seen) * weights).sum(), x, create_graph=True)
    behind = change(x.detach()).requires_grad_()
    (inner,) = torch.autograd.grad((net(behind) * weights).sum(), behind, create_graph=True)
    # Each pixel gets what the places that show it get.
    (spread,) = torch.autograd.grad((change(x) * inner.detach()).sum(), x)
    torch.testing.assert_close(slope.detach(), spread)
    assert torch.autograd.grad(slope.square().sum(), x)[0].any(), "there is a second derivative"


class Smaller(Transform):
    """Gives smaller images under its own name, or calls itself something else."""

    def __init__(self, size: int) -> None:
        super().__init__(f"smaller-{size}" if size < 9 else "another")
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.size, : self.size]


def test_a_transform_of_ones_own_that_cannot_be_rebuilt_or_changes_the_shape_is_refused(
    smooth_net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TRANSFORMS, "_entries", dict(TRANSFORMS._entries) if list(TRANSFORMS) else {})
    TRANSFORMS.register("smaller")(Smaller)
    assert transform("smaller-4").name == "smaller-4"
    with pytest.raises(InputError, match="'smaller-9' calls itself 'another'"):
        transform("smaller-9")
    with pytest.raises(InputError, match=r"'smaller-4' must give images of the shape of its input, \[1, 1, 8, 8\]"):
        with_transforms(smooth_net, ["smaller-4"])(torch.rand(1, 1, 8, 8))
