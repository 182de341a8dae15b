"""How visible a perturbation is."""

from __future__ import annotations

import math
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from robustexplain.errors import InputError, MissingDataError
from robustexplain.metrics import LPIPS, ImageSSIM, Perturbation, Visibility, visibility


@pytest.fixture
def x() -> Tensor:
    return torch.rand(4, 3, 20, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture
def attacked(x: Tensor) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mask = torch.rand(4, 1, 20, 18, generator=torch.Generator().manual_seed(2)) < 0.3
    return (x + 0.1 * noise * mask).clamp(0, 1)


def test_norms_against_numpy(x: Tensor, attacked: Tensor) -> None:
    change = (attacked - x).numpy()
    wanted = {
        0: (np.abs(change).max(1) > 0).sum((1, 2)),
        1: np.abs(change).sum((1, 2, 3)),
        2: np.sqrt((change**2).sum((1, 2, 3))),
        "inf": np.abs(change).max((1, 2, 3)),
    }
    for p, values in wanted.items():
        assert Perturbation(p)(x, attacked).tolist() == pytest.approx(values.tolist())  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"Perturbation\.p must be one of 0, 1, 2, 'inf', got 3"):
        Perturbation(3)  # type: ignore[arg-type]


def test_ssim_of_images_against_scikit_image(x: Tensor, attacked: Tensor) -> None:
    skimage = pytest.importorskip("skimage.metrics")
    wanted = [
        skimage.structural_similarity(
            a.numpy(), b.numpy(), data_range=1, channel_axis=0, gaussian_weights=True, use_sample_covariance=False
        )
        for a, b in zip(x, attacked, strict=True)
    ]
    assert ImageSSIM()(x, attacked).tolist() == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize(
    "metric", [Perturbation(0), Perturbation(1), Perturbation(2), Perturbation(), ImageSSIM()], ids=str
)
def test_every_measure_keeps_the_contract(metric: Visibility, x: Tensor, attacked: Tensor) -> None:
    found = metric(x, attacked)
    assert ((found >= metric.bounds[0]) & (found <= metric.bounds[1])).all()
    alone = [metric(x[i : i + 1], attacked[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(found, torch.cat(alone))
    untouched = metric(x, x.clone())
    assert untouched.tolist() == pytest.approx([1.0 if isinstance(metric, ImageSSIM) else 0.0] * 4)
    assert metric(x.bfloat16(), attacked.bfloat16()).dtype == torch.bfloat16
    if metric not in (Perturbation(0), Perturbation(1)):
        given = attacked.clone().requires_grad_()
        assert torch.isfinite(torch.autograd.grad(metric(x, given).sum(), given)[0]).all()
        given = x.clone().requires_grad_()
        assert torch.isfinite(torch.autograd.grad(metric(x, given).sum(), given)[0]).all()
    with pytest.raises(InputError, match="equal shapes"):
        metric(x, attacked[:2])
    with pytest.raises(InputError, match=r"lie in \[0, 1\]"):
        metric(x, attacked + 1)


def test_lpips_without_its_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, x: Tensor) -> None:
    visibility._network.cache_clear()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(MissingDataError, match=r"robustexplain\[visibility\]"):
        LPIPS()(x, x)


class Distance(torch.nn.Module):
    """Stands in for the package's network: its contract is ``[B, 1, 1, 1]`` from three channels."""

    def __init__(self, net: str, verbose: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.rand(()) * 0 + 2)
        if net == "vgg":
            raise OSError("no route to host")

    def forward(self, a: Tensor, b: Tensor, normalize: bool) -> Any:
        assert normalize
        assert a.shape[1] == b.shape[1] == 3
        return self.scale * (a - b).square().mean((1, 2, 3), keepdim=True)


def test_lpips_asks_the_package(monkeypatch: pytest.MonkeyPatch, x: Tensor, attacked: Tensor) -> None:
    package = ModuleType("lpips")
    package.LPIPS = Distance  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", package)
    visibility._network.cache_clear()
    before = torch.get_rng_state()
    found = LPIPS()(x, attacked)
    assert found.tolist() == pytest.approx((2 * (attacked - x).square().mean((1, 2, 3))).tolist())
    assert LPIPS()(x[:, :1], attacked[:, :1]).shape == (4,)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(MissingDataError, match="weights of its vgg backbone: no route"):
        LPIPS("vgg")(x, attacked)
    visibility._network.cache_clear()
    assert math.isinf(LPIPS.bounds[1])
