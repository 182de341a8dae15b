"""Occlusion, RISE, LIME and KernelSHAP against captum, scikit-learn, enumeration and slow loops."""

from __future__ import annotations

import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robustexplain.errors import FieldError, InputError
from robustexplain.interpreters import LIME, RISE, Fill, Interpreter, KernelSHAP, Occlusion, Segments
from robustexplain.interpreters.perturbation.lime_shap import kernel, ridge, shapley
from robustexplain.models import admit
from robustexplain.random_streams import Streams
from robustexplain.system import System


@pytest.fixture
def model(tiny_model: nn.Module) -> nn.Module:
    return copy.deepcopy(tiny_model).double()


@pytest.fixture
def x(grey: Tensor) -> Tensor:
    return grey[:2, :, :, :12].double()


# What is shared


@pytest.mark.parametrize("of", ["probability", "logit", "log_probability"])
def test_the_score_is_what_its_name_says(of: str, model: nn.Module, x: Tensor) -> None:
    maps = Occlusion(model, window=12, of=of)(x)  # type: ignore[arg-type]
    with torch.no_grad():
        logits, covered = model(x), model(torch.full_like(x, 0.5).index_copy(2, torch.arange(12, 16), x[:, :, 12:]))
    say = {"probability": lambda z: z.softmax(1), "logit": lambda z: z, "log_probability": lambda z: z.log_softmax(1)}
    c = logits.argmax(1)
    for b in range(2):
        fall = (say[of](logits) - say[of](covered))[b, c[b]]
        # The only window whose rows are covered by no other starts at 0, and pixels of row 0 see it alone.
        torch.testing.assert_close(maps[b, 0, 0], fall)


def test_fills(x: Tensor) -> None:
    assert torch.equal(Fill(value=0.3)(x), torch.full_like(x, 0.3))
    noise = Fill("noise", value=0.5, noise=0.1)(x.expand(-1, 3, -1, -1))
    assert 0.45 < float(noise.mean()) < 0.55
    assert 0.07 < float(noise.std()) < 0.13
    assert float(Fill("noise", noise=5.0)(x).min()) == 0
    torch.testing.assert_close(Fill("noise")(x)[1:], Fill("noise")(x[1:]))
    assert not torch.equal(Fill("noise")(x, 1), Fill("noise")(x, 2))


def test_the_blur_is_scipys(x: Tensor) -> None:
    from scipy.ndimage import gaussian_filter

    found = Fill("blur", blur=0.125)(x)
    for row, blurred in zip(x, found, strict=True):
        # 0.125 * 12 pixels; cut off where ours is, borders replicated.
        wanted = gaussian_filter(row[0].numpy(), sigma=1.5, mode="nearest", radius=5)
        np.testing.assert_allclose(blurred[0], wanted, atol=1e-10)


@pytest.mark.parametrize("how", ["constant", "blur", "noise"])
@pytest.mark.parametrize("cls", [Occlusion, RISE, LIME, KernelSHAP])
def test_every_fill_serves_every_method(cls: type[Interpreter], how: str, model: nn.Module, x: Tensor) -> None:
    few = {Occlusion: {"window": 6}, RISE: {"samples": 8}}.get(cls, {"samples": 20, "segments": Segments(number=4)})
    interpreter = cls(model, fill=Fill(how), **few)  # type: ignore[arg-type, call-arg]
    assert torch.isfinite(interpreter(x)).all()
    torch.testing.assert_close(interpreter(x)[1:], interpreter(x[1:]))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("cls", [Occlusion, RISE, LIME, KernelSHAP])
def test_the_size_of_a_pass_changes_nothing(
    cls: type[Interpreter], batch_size: int, model: nn.Module, x: Tensor
) -> None:
    few = {Occlusion: {"window": 6}, RISE: {"samples": 9}}.get(cls, {"samples": 20, "segments": Segments(number=9)})
    sizes: list[int] = []
    admit(model, x)
    with model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0]))):
        found = cls(model, batch_size=batch_size, **few)(x)  # type: ignore[call-arg]
    torch.testing.assert_close(found, cls(model, **few)(x))  # type: ignore[arg-type]
    assert max(sizes) <= max(batch_size, len(x))


@pytest.mark.parametrize("cls", [RISE, LIME, KernelSHAP])
def test_the_seed_decides(cls: type[Interpreter], model: nn.Module, x: Tensor) -> None:
    few = {"samples": 20} if cls is RISE else {"samples": 60, "segments": Segments(number=16)}
    first, again, other = (cls(model, seed=seed, **few)(x) for seed in (1, 1, 2))  # type: ignore[arg-type]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("cls", [Occlusion, RISE, LIME, KernelSHAP])
def test_deleting_what_the_map_shows_lowers_the_class_faster_than_deleting_at_random(
    cls: type[Interpreter], trained: nn.Module, judged: tuple[Tensor, Tensor]
) -> None:
    images = judged[0][:20]
    few = {Occlusion: {"window": 4, "stride": 2}, RISE: {"samples": 300}}.get(
        cls, {"samples": 150, "segments": Segments(number=16)}
    )
    shown = {name: fall(trained, images, order) for name, order in {
        "map": cls(trained, fill=Fill(value=0.0), **few)(images),  # type: ignore[arg-type]
        "random": torch.rand(images[:, 0].shape, generator=torch.Generator().manual_seed(1)),
    }.items()}  # fmt: skip
    assert shown["map"] > shown["random"] + 0.1


def fall(model: nn.Module, x: Tensor, order: Tensor, share: float = 0.2) -> float:
    """How far the predicted class falls on average when the top ``share`` of the pixels is blackened."""
    top = order.flatten(1).argsort(1, descending=True)[:, : int(share * order[0].numel())]
    kept = torch.ones_like(x).flatten(1).scatter(1, top, 0.0).reshape(x.shape)
    with torch.no_grad():
        p = model(x).softmax(1)
        c = p.argmax(1, keepdim=True)
        return float((p - model(x * kept).softmax(1)).gather(1, c).mean())


@pytest.mark.parametrize(
    "made",
    [
        lambda m: Occlusion(m, 4, 2, Fill("blur", blur=0.2), "logit"),
        lambda m: RISE(m, samples=5, keep=0.3),
        lambda m: LIME(m, 20, Segments(number=4), ridge=0.5),
        lambda m: KernelSHAP(m, 20, Segments(number=4)),
    ],
)
def test_a_saved_one_says_the_same_when_loaded(
    made: object, tiny_model: nn.Module, grey: Tensor, tmp_path: Path
) -> None:
    system = System(tiny_model, made(tiny_model))  # type: ignore[operator]
    loaded = System.load(system.save(tmp_path))
    assert torch.equal(loaded.interpreter(grey), system.interpreter(grey))


# Occlusion


@pytest.mark.parametrize(("window", "stride"), [(4, 2), (5, 3), (3, 3), (1, 1), (7, 5)])
def test_occlusion_agrees_with_captum(window: int, stride: int, model: nn.Module, x: Tensor) -> None:
    captum = pytest.importorskip("captum.attr")
    c = model(x).argmax(1)
    shape, strides = (1, window, window), (1, stride, stride)
    wanted = captum.Occlusion(model).attribute(x, shape, strides, baselines=0.2, target=c, perturbations_per_eval=16)
    found = Occlusion(model, window, stride, Fill(value=0.2), "logit")(x)
    assert wanted.dtype == torch.float32  # captum's own
    torch.testing.assert_close(found.float(), wanted[:, 0], rtol=1e-5, atol=1e-7)


def test_leave_one_out_is_a_window_of_one_pixel(model: nn.Module, x: Tensor) -> None:
    found = Occlusion(model, 1, 1, Fill(value=0.0), "logit")(x[:1])
    with torch.no_grad():
        c = int(model(x[:1]).argmax(1))
        for i, j in ((0, 0), (7, 3), (15, 11)):
            covered = x[:1].clone()
            covered[:, :, i, j] = 0
            assert float(found[0, i, j]) == pytest.approx(float((model(x[:1]) - model(covered))[0, c]), abs=1e-12)


def test_default_windows_follow_the_image(model: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(Occlusion(model)(x), Occlusion(model, 1, 1)(x))
    wide = torch.nn.functional.interpolate(x[:1], (17, 24))
    torch.testing.assert_close(Occlusion(model)(wide), Occlusion(model, 2, 1)(wide))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window": 13}, r"window of 13 pixels does not fit into images of \[16, 12\]"),
        ({"window": 3, "stride": 4}, "stride of 4 leaves gaps between windows of 3"),
        ({"window": 0}, "Occlusion.window must be at least 1, or None, got 0"),
        ({"stride": 1.5}, "Occlusion.stride must be a whole number, or None, got 1.5"),
        ({"of": "loss"}, "Occlusion.of must be one of 'probability'"),
    ],
)
def test_occlusion_refuses_windows_that_make_no_sense(
    fields: dict[str, object], message: str, model: nn.Module, x: Tensor
) -> None:
    with pytest.raises(InputError, match=message):
        Occlusion(model, **fields)(x)  # type: ignore[arg-type]


# RISE


def test_rise_is_the_weighted_mean_of_its_masks(model: nn.Module, x: Tensor) -> None:
    rise = RISE(model, samples=6, grid=3, keep=0.4, seed=3)
    masks = rise._enlarged(*rise._draws(), x)
    with torch.no_grad():
        c = model(x).argmax(1)
    wanted = torch.zeros(2, 16, 12, dtype=torch.float64)
    for b, mask in itertools.product(range(2), masks):
        p = model(x[b : b + 1] * mask).detach().softmax(1)
        wanted[b] += float(p[0, c[b]]) * mask / (0.4 * 6)
    torch.testing.assert_close(rise(x), wanted)


def test_rise_masks_are_enlarged_coin_tosses_cut_out_at_random(model: nn.Module, x: Tensor) -> None:
    rise = RISE(model, samples=4000, grid=5, keep=0.3)
    cells, places = rise._draws()
    masks = rise._enlarged(cells, places, x)
    assert masks.shape == (4000, 16, 12)
    assert 0 <= float(masks.min()) < float(masks.max()) <= 1 + 1e-12
    assert float(masks.mean()) == pytest.approx(0.3, abs=0.01)
    # Cells of 4 x 3 pixels, enlarged to 24 x 18 by scipy's rule, and cut out at the place.
    from scipy.ndimage import map_coordinates

    for i in range(5):
        top, left = int(places[i, 0] * 4), int(places[i, 1] * 3)
        at = np.meshgrid((np.arange(16) + top + 0.5) / 24 * 5 - 0.5, (np.arange(12) + left + 0.5) / 18 * 5 - 0.5,
                         indexing="ij")  # fmt: skip
        wanted = map_coordinates(cells[i].double().numpy(), at, order=1, mode="nearest")
        np.testing.assert_allclose(masks[i], wanted, atol=1e-12)
    assert len({(int(t * 4), int(u * 3)) for t, u in places.tolist()}) == 12


def test_rise_finds_the_only_pixels_that_count() -> None:
    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen = x[:, 0, :4, :4].mean((1, 2))
            return torch.stack([4 * seen, 2 - 4 * seen], 1)

    maps = RISE(Corner().eval(), samples=600, grid=4)(torch.ones(1, 1, 16, 16))
    assert float(maps[0, :4, :4].mean()) > 1.15 * float(maps[0, 8:, 8:].mean())


# Segments


def test_a_grid_of_segments() -> None:
    found = Segments(number=4)(torch.zeros(3, 1, 4, 6))
    assert found.shape == (3, 4, 6)
    assert found[0].tolist() == [[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 3, 3, 3]] * 2
    tiny = Segments(number=100)(torch.zeros(1, 1, 2, 3))
    assert tiny[0].tolist() == [[0, 1, 2], [3, 4, 5]]
    uneven = Segments(number=9)(torch.zeros(1, 1, 7, 5))
    assert uneven[0].unique().tolist() == list(range(9))


@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_are_those_of_scikit_image(channels: int, colour: Tensor) -> None:
    segmentation = pytest.importorskip("skimage.segmentation")
    # SLIC merges noise into one patch.
    images = Fill("blur", blur=0.05)(colour[:, :channels])
    found = Segments("slic", number=12, compactness=0.1 if channels == 1 else 10.0)(images)
    for image, patches in zip(images, found, strict=True):
        assert patches.unique().tolist() == list(range(int(patches.max()) + 1))
        assert 4 <= int(patches.max()) + 1 <= 24
        pixels = image.permute(1, 2, 0).double().numpy()
        compactness = 0.1 if channels == 1 else 10.0
        wanted = segmentation.slic(pixels, 12, compactness, start_label=0, channel_axis=-1)
        pairs = set(zip(patches.flatten().tolist(), wanted.flatten().tolist(), strict=True))
        assert len(pairs) == int(patches.max()) + 1 == len(np.unique(wanted))


def test_superpixels_without_scikit_image_name_the_extra(colour: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.segmentation", None)
    with pytest.raises(InputError, match=r"robustexplain\[superpixels\]"):
        Segments("slic")(colour)


@pytest.mark.parametrize("cls", [LIME, KernelSHAP])
def test_images_with_different_numbers_of_superpixels_share_a_batch(
    cls: type[LIME | KernelSHAP], model: nn.Module
) -> None:
    pytest.importorskip("skimage")
    plain = torch.full((1, 1, 16, 16), 0.4, dtype=torch.float64)
    busy = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x, segments = torch.cat([plain, busy]), Segments("slic", 12, 0.02)
    assert len({int(s.max()) for s in segments(x)}) == 2
    interpreter = cls(model, 120, segments)
    torch.testing.assert_close(
        interpreter(x), torch.cat([interpreter(x[:1]), interpreter(x[1:])]), rtol=1e-9, atol=1e-12
    )


# LIME


def coalitions_of(name: str, x: Tensor, row: int, seed: int) -> torch.Generator:
    return Streams.of(x, seed, name).generators[row]


def test_lime_is_scikit_learns_ridge_on_what_the_model_says(model: nn.Module, x: Tensor) -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    lime = LIME(model, samples=40, segments=Segments(number=9), fill=Fill(value=0.2), width=0.3, ridge=0.7, seed=5)
    maps, segments = lime(x), lime.segments(x)
    c = model(x).argmax(1)
    for b in range(2):
        z = lime._coalitions(9, coalitions_of("lime", x, b, 5)).numpy()
        assert z[0].all()
        y, w = [], []
        for row in z:
            on = torch.from_numpy(row)[segments[b]].bool()
            y.append(float(model(x[b : b + 1].where(on, 0.2)).softmax(1)[0, c[b]]))
            cosine = row.sum() / math.sqrt(row.sum() * 9) if row.any() else 0.0
            w.append(math.exp(-(((1 - cosine) / 0.3) ** 2)))
        fit = linear_model.Ridge(alpha=0.7).fit(z, y, sample_weight=w)
        np.testing.assert_allclose(maps[b], fit.coef_[segments[b].numpy()], rtol=1e-8, atol=1e-12)


def test_ridge_against_scikit_learn_with_a_patch_that_is_never_switched() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = torch.Generator().manual_seed(2)
    z = torch.randint(2, (30, 6), generator=rng).double()
    z[:, 3] = 1
    y, w = torch.randn(30, generator=rng).double(), torch.rand(30, generator=rng).double()
    wanted = linear_model.Ridge(alpha=2.0).fit(z.numpy(), y.numpy(), sample_weight=w.numpy()).coef_
    np.testing.assert_allclose(ridge(z, y, w, 2.0), wanted, atol=1e-12)
    assert ridge(z, y, w, 0.0)[3].abs() < 1e-9


# KernelSHAP


def exact_shapley(value: dict[tuple[int, ...], float], patches: int) -> list[float]:
    """Shapley values by their definition, from the value of every coalition."""
    found = []
    for i in range(patches):
        rest = [j for j in range(patches) if j != i]
        total = 0.0
        for size in range(patches):
            share = math.factorial(size) * math.factorial(patches - size - 1) / math.factorial(patches)
            for others in itertools.combinations(rest, size):
                total += share * (value[tuple(sorted((*others, i)))] - value[others])
        found.append(total)
    return found


def values_of(model: nn.Module, x: Tensor, segments: Tensor, c: int, value: float) -> dict[tuple[int, ...], float]:
    patches = int(segments.max()) + 1
    said = {}
    for size in range(patches + 1):
        for on in itertools.combinations(range(patches), size):
            mask = torch.isin(segments, torch.tensor(on, dtype=torch.int64))
            said[on] = float(model(x[None].where(mask, value)).softmax(1)[0, c])
    return said


@pytest.fixture
def four(model: nn.Module, x: Tensor) -> tuple[KernelSHAP, Tensor, list[list[float]]]:
    shap = KernelSHAP(model, samples=14, segments=Segments(number=4), fill=Fill(value=0.3))
    segments, c = shap.segments(x), model(x).argmax(1)
    with torch.no_grad():
        wanted = [exact_shapley(values_of(model, x[b], segments[b], int(c[b]), 0.3), 4) for b in range(2)]
    return shap, segments, wanted


def per_patch(maps: Tensor, segments: Tensor) -> list[list[float]]:
    return [[float(m[s == i].mean()) for i in range(int(s.max()) + 1)] for m, s in zip(maps, segments, strict=True)]


def test_kernel_shap_on_few_patches_gives_the_exact_shapley_values(
    four: tuple[KernelSHAP, Tensor, list[list[float]]], x: Tensor
) -> None:
    shap, segments, wanted = four
    maps = shap(x)
    np.testing.assert_allclose(per_patch(maps, segments), wanted, atol=1e-12)
    assert all(len(m[s == i].unique()) == 1 for m, s in zip(maps, segments, strict=True) for i in range(4))


def test_sampled_kernel_shap_comes_close_to_the_exact_values_and_closer_with_more(model: nn.Module, x: Tensor) -> None:
    segments = Segments(number=9)
    exact = KernelSHAP(model, 510, segments)(x)
    errors = [float((KernelSHAP(model, n, segments)(x) - exact).abs().max() / exact.abs().max()) for n in (40, 500)]
    assert errors[1] < 0.1
    assert errors[1] < errors[0] < 0.6


def test_one_patch_has_the_whole_difference(model: nn.Module, x: Tensor) -> None:
    maps = KernelSHAP(model, segments=Segments(number=1), fill=Fill(value=0.0), of="logit")(x)
    with torch.no_grad():
        wanted = (model(x) - model(x * 0)).gather(1, model(x).argmax(1, keepdim=True))
    torch.testing.assert_close(maps, wanted[:, None].expand(-1, 16, 12))


@pytest.mark.parametrize("samples", [18, 100, 510])
def test_kernel_shap_shares_out_the_whole_difference(samples: int, model: nn.Module, x: Tensor) -> None:
    shap = KernelSHAP(model, samples, Segments(number=9), Fill("blur"), of="logit")
    target = torch.tensor([0, 3])
    found = per_patch(shap(x, target), shap.segments(x))
    with torch.no_grad():
        difference = (model(x) - model(shap.fill(x))).gather(1, target[:, None])[:, 0]
    np.testing.assert_allclose(np.sum(found, 1), difference, atol=1e-12)


def test_the_shapley_kernel_of_the_paper() -> None:
    # Lundberg and Lee 2017, theorem 2, by hand for four patches: 3 / (4 * 1 * 3), 3 / (6 * 2 * 2).
    assert [kernel(4, s) for s in (1, 2, 3)] == pytest.approx([1 / 4, 1 / 8, 1 / 4])


def test_drawn_coalitions_come_in_pairs_with_the_kernels_sizes(model: nn.Module) -> None:
    z, w = KernelSHAP(model, samples=20000)._drawn(6, torch.Generator().manual_seed(0))
    assert (z[::2] + z[1::2] == 1).all()
    assert (w == 1).all()
    sizes = z.sum(1).bincount(minlength=7)[1:6].double() / 20000
    wanted = torch.tensor([kernel(6, s) * math.comb(6, s) for s in range(1, 6)]).double()
    torch.testing.assert_close(sizes, wanted / wanted.sum(), atol=0.01, rtol=0)
    assert z[z.sum(1) == 2].double().mean(0).sub(2 / 6).abs().max() < 0.03


def test_constrained_least_squares_against_the_kkt_system() -> None:
    rng = torch.Generator().manual_seed(4)
    z, y = torch.randint(2, (25, 5), generator=rng).double(), torch.randn(25, generator=rng).double()
    w = torch.rand(25, generator=rng).double()
    left = np.zeros((6, 6))
    left[:5, :5] = (z * w[:, None]).T @ z
    left[5, :5] = left[:5, 5] = 1
    wanted = np.linalg.solve(left, [*(z.T @ (w * y)).tolist(), 0.7])[:5]
    np.testing.assert_allclose(shapley(z, w, y, 0.7), wanted, atol=1e-12)


def test_coalitions_that_leave_patches_inseparable_are_drawn_again(x: Tensor) -> None:
    """In a linear model the regression is exact wherever they do not."""

    class Linear(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            score = (x[:, 0] * torch.linspace(-1, 2, 196).reshape(14, 14)).sum((1, 2))
            return torch.stack([score, -score], 1)

    weight = torch.linspace(-1, 2, 196).reshape(14, 14)
    for seed in range(8):
        image = torch.rand(1, 1, 14, 14, generator=torch.Generator().manual_seed(seed))
        shap = KernelSHAP(Linear().eval(), samples=98, fill=Fill(value=0.0), of="logit", seed=seed)
        parts = (weight * image)[:, 0].reshape(1, 7, 2, 7, 2).sum((2, 4))
        torch.testing.assert_close(shap(image, torch.tensor([0]))[:, ::2, ::2], parts, rtol=1e-3, atol=1e-3)


def test_too_few_samples_for_the_patches_are_refused(model: nn.Module, x: Tensor) -> None:
    with pytest.raises(InputError, match="separate 49 patches with samples=60; set 98 or more"):
        KernelSHAP(model, 60)(x)
    with pytest.raises(FieldError, match=r"Segments.number must be at least 1"):
        Segments(number=0)
