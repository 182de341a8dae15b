"""Harmless changes keep to what they say, draw from each sample's own stream, and are read from recipes by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from robustexplain import transforms
from robustexplain.errors import InputError
from robustexplain.recipe.experiment import Evaluation, foundation
from robustexplain.registry import HARMLESS
from robustexplain.schema import make
from robustexplain.transforms import HarmlessChange, default_changes, harmless_for

NAMES = [entry.name for entry in HARMLESS]
IMAGES = [name for name in NAMES if "images" in HARMLESS.get(name).build.takes]  # type: ignore[attr-defined]


def x_for(name: str) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    if name not in IMAGES:
        numbers = torch.randn(6, 4, generator=rng) * torch.tensor([1.0, 100.0, 1.0, 1.0]) + 50
        numbers[:, 2] = torch.tensor([0.0, 1.0, 0.0, 1.0, 1.0, 0.0])
        return numbers
    return torch.rand(6, 3, 16, 16, generator=rng)


def change_of(name: str) -> HarmlessChange:
    made: HarmlessChange = HARMLESS.get(name).build()
    return made.fitted(x_for(name))


@pytest.mark.parametrize("name", NAMES)
def test_a_change_depends_on_the_sample_and_the_seed_and_on_nothing_else(name: str) -> None:
    x, change, state = x_for(name), change_of(name), torch.get_rng_state()
    before = x.clone()
    changed = change(x, 3)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert (changed.shape, changed.dtype) == (x.shape, x.dtype)
    assert not torch.equal(changed, x)
    assert torch.equal(changed, change(x, 3))
    torch.testing.assert_close(change(x[2:4], 3), changed[2:4], atol=1e-6, rtol=0)
    random = not torch.equal(changed, change(x, 4))
    assert random is (name not in ("jpeg", "resize", "rounding"))
    if name in IMAGES:
        assert 0 <= float(changed.min()) <= float(changed.max()) <= 1
        with pytest.raises(InputError, match=f"{name} takes images"):
            change(torch.rand(2, 5))


def test_each_input_gets_one_of_several_changes_whatever_its_batch() -> None:
    x, changes = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(1)), default_changes((1, 8, 8))
    changed = transforms.one_of(changes, x, seed=3)
    each = torch.stack([change(x, 3) for change in changes])
    chosen = (each - changed).flatten(2).abs().amax(2) < 1e-6
    assert bool(chosen.any(0).all())
    assert int(chosen.sum(1).min()) >= 5, "each of three is drawn about as often"
    torch.testing.assert_close(transforms.one_of(changes, x[7:9], seed=3), changed[7:9], atol=1e-6, rtol=0)
    with pytest.raises(InputError, match="at least, got none"):
        transforms.one_of((), x)


def test_noise_is_as_large_as_it_says() -> None:
    x = torch.full((4, 1, 64, 64), 0.5)
    away = transforms.UniformNoise(eps=0.1)(x) - x
    assert 0.09 < float(away.abs().max()) <= 0.1 + 1e-6
    assert float(away.std()) == pytest.approx(0.1 / 3**0.5, rel=0.02)
    assert float((transforms.GaussianNoise(std=0.05)(x) - x).std()) == pytest.approx(0.05, rel=0.02)
    # Drawn from one's own stream: equal images draw equal noise.
    assert torch.equal(away[0], away[1])


def test_brightness_and_contrast_are_one_factor_an_image() -> None:
    x = 0.25 + 0.5 * torch.rand(200, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    factors = (transforms.Brightness(by=0.1)(x) / x).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    assert 0.9 <= float(factors.min()) < 0.92
    assert 1.08 < float(factors.max()) <= 1.1
    mean = x.flatten(1).mean(1)[:, None, None, None]
    contrast = transforms.Contrast(by=0.1)(x)
    torch.testing.assert_close(contrast.flatten(1).mean(1), x.flatten(1).mean(1))
    factors = ((contrast - mean) / (x - mean)).flatten(1)
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors), atol=1e-3, rtol=1e-3)


def test_a_shift_goes_to_each_of_eight_neighbours() -> None:
    x = torch.rand(200, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    moved, seen = transforms.Shift(pixels=1)(x), set()
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    for image, around in zip(moved, padded, strict=True):
        places = [
            (down, right)
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
            if torch.equal(image, around[:, 1 - down : 6 - down, 1 - right : 7 - right])
        ]
        assert len(places) == 1
        seen |= set(places)
    assert seen == {(d, r) for d in (-1, 0, 1) for r in (-1, 0, 1)} - {(0, 0)}


def test_compression_and_rounding_are_those_of_the_transforms() -> None:
    x = x_for("jpeg")
    assert torch.equal(transforms.Compression(75)(x), transforms.transform("jpeg-75")(x))
    assert torch.equal(transforms.Rounding()(x), transforms.transform("bit-depth-8")(x))
    with pytest.raises(InputError, match="from 1 to 100"):
        transforms.Compression(101)
    with pytest.raises(InputError, match="below 1"):
        transforms.Resize(scale=1.0)


def test_column_noise_moves_numbers_in_proportion_to_their_spread_and_no_categories() -> None:
    rng = torch.Generator().manual_seed(0)
    known = torch.randn(2000, 3, generator=rng) * torch.tensor([1.0, 1000.0, 1.0])
    known[:, 2] = (known[:, 2] > 0).float()
    change = transforms.ColumnNoise(share=0.1).fitted(known)
    away = change(known) - known
    assert not away[:, 2].any()
    assert (away[:, :2].std(0) / known[:, :2].std(0)).tolist() == pytest.approx([0.1, 0.1], rel=0.05)
    low, high = known.aminmax(dim=0)
    assert bool(((known + away >= low) & (known + away <= high)).all())
    with pytest.raises(InputError, match="fitted to 3 columns, got 2"):
        change(known[:, :2])
    assert change.entry == {"name": "column-noise", "share": 0.1}


def test_the_usual_changes_fit_the_inputs() -> None:
    assert [c.entry["name"] for c in default_changes((3, 8, 8))] == ["uniform-noise", "jpeg", "brightness"]
    assert [c.entry["name"] for c in default_changes((4, 8, 8))] == ["uniform-noise", "brightness"]
    assert harmless_for((), (3,), torch.rand(9, 3))[0].spread  # type: ignore[attr-defined]
    own = (transforms.Shift(),)
    assert harmless_for(own, (3, 8, 8), torch.rand(2, 3, 8, 8)) == own


def test_a_recipe_names_them_and_what_makes_a_map_plausible() -> None:
    entry = {"harmless": ["jpeg", {"name": "uniform-noise", "eps": 0.01}], "plausible": {"quantile": 0.9}}
    made: Evaluation = make(Evaluation, entry, "evaluation")
    assert made.harmless == (transforms.Compression(), transforms.UniformNoise(0.01))
    assert (made.plausible.distance, made.plausible.quantile, made.plausible.iou) == ("l1", 0.9, None)
    assert make(Evaluation, made.entry, "evaluation") == made  # as a run directory keeps it
    other = {**entry, "harmless": ["jpeg", "uniform-noise"]}
    assert foundation({"evaluation": entry}) != foundation({"evaluation": other})
    assert foundation({"evaluation": entry}) == foundation({"evaluation": {**entry, "bootstrap": 7}})


@pytest.mark.parametrize(
    "entry,said",
    [
        ({"harmless": ["jpg"]}, r"evaluation\.harmless\[0\]\.name: unknown harmless-change 'jpg'; did you mean 'jpeg'"),
        ({"harmless": [{"name": "jpeg", "quality": 0}]}, r"evaluation\.harmless\[0\]\.quality: .* got 0"),
        ({"harmless": [{"name": "column-noise", "spread": [1]}]}, r"harmless\[0\]\.spread: unknown key"),
        ({"plausible": 0.5}, r"evaluation\.plausible: 0\.5 alone was an IoU; it is written \{iou: 0\.5\} now"),
        ({"plausible": {"iou": 0.5, "quantile": 0.9}}, r"evaluation\.plausible\.iou: is another measure"),
        ({"plausible": {"distance": "entropy"}}, r"plausible\.distance: must be a metric that compares maps"),
        ({"plausible": {"quantile": 1.0}}, r"plausible\.quantile: must lie between 0 and 1"),
        ({"calibration": 18}, r"evaluation\.calibration: must be at least 19 for the 0\.95 quantile"),
    ],
)
def test_mistakes_in_a_recipe_are_named(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make(Evaluation, entry, "evaluation")


def test_a_number_alone_is_refused_in_python_too() -> None:
    with pytest.raises(InputError, match=r"plausible 0\.5 alone was an IoU"):
        Evaluation(plausible=0.5)  # type: ignore[arg-type]
    assert Evaluation(plausible=make(Evaluation, {"plausible": {"iou": 0.4}}, "e").plausible, calibration=0)
