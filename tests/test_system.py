"""A system is whole: it says what it takes, moves with every part, refuses what it cannot answer for."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robustexplain import System, data, models
from robustexplain.attacks import PGD
from robustexplain.commands.explain import image_of
from robustexplain.data import Data, InputSpec, stack, take
from robustexplain.defenses import Aggregate, Retrained
from robustexplain.defenses.detection import FeatureSqueezingDetector, Forest, MapNetwork, XEnsembleDetector
from robustexplain.errors import FewScoresWarning, InputError, MissingDataError
from robustexplain.interpreters import RTS, ExpectedGradients, GradCAM, Gradient, Interpreter, MaskingModel, Reference
from robustexplain.metrics import auc, threshold_at
from robustexplain.system import Detector
from robustexplain.training import Training
from robustexplain.transforms import transforms as squeezers

# What it takes


def photograph(path: Path, size: tuple[int, int] = (40, 24), **options: Any) -> Path:
    """A picture of ``size`` (width, height) whose left half is dark."""
    pixels = np.random.default_rng(0).integers(100, 255, (size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2] //= 4
    Image.fromarray(pixels).save(path, **options)
    return path


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_system_reads_an_image_as_the_data_set_that_judged_it(resize: Any, channels: Any, tmp_path: Path) -> None:
    for kind in ("ant", "bee"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for index, size in enumerate([(40, 24), (17, 31), (16, 16)]):
            photograph(tmp_path / "images" / kind / f"{index}.png", size)
    judged = data.load(f"image-folder:{tmp_path / 'images'}", size=16, resize=resize, channels=channels)
    spec = InputSpec.of_data(judged)
    assert spec == InputSpec((16, 16), resize, channels, ("ant", "bee"))
    model = models.build("small-cnn", num_classes=2, in_channels=channels)
    system = System(model, Gradient(model), inputs=spec)
    files: Any = judged.train.dataset  # type: ignore[attr-defined]
    for name, (x, _) in zip(files.names, files, strict=True):
        path = tmp_path / "images" / name
        assert torch.equal(system.prepare(path)[0], x)
        assert torch.equal(system.prepare(str(path))[0], x)
        assert torch.equal(system.prepare(Image.open(path))[0], x)


def test_what_it_takes_is_stored_with_it(tiny_model: nn.Module, tmp_path: Path) -> None:
    spec = InputSpec((16, 20), "crop", 1, ("a", "b", "c", "d"))
    system = System(tiny_model, Gradient(tiny_model), inputs=spec)
    assert System.load(system.save(tmp_path)).inputs == spec
    assert system.without_detector().inputs == spec


def test_cropping_covers_any_size_and_keeps_proportions() -> None:
    picture = Image.fromarray(np.arange(60 * 90, dtype=np.uint32).reshape(60, 90).astype(np.uint8))
    for size in ((20, 30), (30, 20), (33, 33), (60, 90), (1, 7)):
        assert InputSpec(size, "crop", 1).read(picture).shape == (1, 1, *size)
    whole = InputSpec(None, "crop", 1).read(picture)[0, 0]
    assert torch.equal(InputSpec((60, 40), "crop", 1).read(picture)[0, 0], whole[:, 25:65])


def test_an_image_is_turned_upright_by_its_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise when shown
    turned = InputSpec().read(photograph(tmp_path / "a.png", exif=exif))
    plain = InputSpec().read(photograph(tmp_path / "b.png"))
    assert torch.equal(turned, plain.rot90(-1, (2, 3)))


def test_images_that_cannot_be_read_are_refused(tiny_model: nn.Module, tmp_path: Path) -> None:
    system = System(tiny_model, Gradient(tiny_model), inputs=InputSpec((16, 16), channels=1))
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(InputError, match=r"deep\.png.*more than 8 bits"):
        system.prepare(tmp_path / "deep.png")
    (tmp_path / "words.png").write_text("no image")
    with pytest.raises(InputError, match=r"cannot read the image .*words\.png"):
        system.prepare(tmp_path / "words.png")
    with pytest.raises(MissingDataError, match="no image at"):
        system.prepare(tmp_path / "none.png")
    with pytest.raises(InputError, match="inputs are not specified"):
        replace(system, inputs=None).prepare(tmp_path / "deep.png")


def test_inputs_of_another_size_are_refused(tiny_model: nn.Module, grey: Tensor) -> None:
    system = System(tiny_model, Gradient(tiny_model), inputs=InputSpec((16, 16), channels=1))
    assert system(grey).maps.shape == (5, 16, 16)
    with pytest.raises(InputError, match=r"takes images of 16 x 16 pixels, got 16 x 12; system\.prepare"):
        system(grey[..., :12])
    with pytest.raises(InputError, match=r"images of 1 channel\(s\).*got \[5, 3, 16, 16\]"):
        system(grey.expand(-1, 3, -1, -1))
    with pytest.raises(InputError, match=r"inputs say 3 channel\(s\), but the model takes 1"):
        replace(system, inputs=InputSpec())
    with pytest.raises(InputError, match="inputs name 2 classes, but the model has 4"):
        replace(system, inputs=InputSpec(channels=1, class_names=("a", "b")))
    for bad in ((16,), (0, 16), 16, (True, 2.5)):
        with pytest.raises(InputError, match="size must be"):
            InputSpec(bad)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"resize must be one of 'crop', 'squash', got 'cut'"):
        InputSpec(resize="cut")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="inputs must be an InputSpec, got tuple"):
        System(tiny_model, Gradient(tiny_model), inputs=(16, 16))  # type: ignore[arg-type]


def test_a_table_has_no_input_spec(digits: Data) -> None:
    assert InputSpec.of_data(digits) == InputSpec((32, 32), "squash", 1, tuple("0123456789"))
    assert InputSpec.of_data(replace(digits, shape=(2,), features=("a", "b"))) is None


def test_the_command_refuses_another_size_than_the_system_takes(tiny_model: nn.Module, tmp_path: Path) -> None:
    picture = photograph(tmp_path / "a.png")
    system = System(tiny_model, Gradient(tiny_model), inputs=InputSpec((16, 16), "crop", 1))
    assert torch.equal(image_of(system, picture, None), system.prepare(picture))
    with pytest.raises(InputError, match=r"--size 32: the system takes images of \(16, 16\)"):
        image_of(system, picture, 32)


# Where it is


def rts(model: nn.Module, x: Tensor) -> RTS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return RTS(model, MaskingModel.around(copy.deepcopy(model), x, width=8).eval())


def ensemble(model: nn.Module, x: Tensor) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        networks = (MapNetwork(8, 4).eval(), MapNetwork(8, 4).eval())
    members = (Gradient(model), rts(model, x))
    forest = Forest.fit(torch.rand(20, 2), torch.arange(20) % 2, 5, 0)
    return XEnsembleDetector(members, networks, forest, threshold=0.4, soft_threshold=0.1)


PARTS: dict[str, Callable[[nn.Module, Tensor], tuple[Interpreter, Detector | None]]] = {
    "gradcam": lambda m, x: (GradCAM(m), None),
    "rts": lambda m, x: (rts(m, x), None),
    "aggregate": lambda m, x: (Aggregate(m, (rts(m, x), Gradient(m))), None),
    "reference": lambda m, x: (ExpectedGradients(m, Reference(x), samples=4), None),
    "x-ensemble": lambda m, x: (GradCAM(m), ensemble(m, x)),
    "squeezing": lambda m, x: (GradCAM(m), FeatureSqueezingDetector(m, squeezers(["bit-depth-3", "median-2"]))),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", PARTS)
def test_every_part_moves_with_a_system(name: str, dtype: torch.dtype, tiny_model: nn.Module, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model)
    system = System(model, *PARTS[name](model, grey))
    before = system(grey)
    wide = system.to(dtype=dtype)
    assert wide.model is model
    seen = wide(grey.to(dtype))
    assert seen.logits.dtype == seen.maps.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.25
    assert torch.allclose(
        seen.logits.float(), before.logits, atol=tolerance * float(before.logits.detach().abs().max())
    )
    if system.detector is not None and wide.detector is not None:
        assert seen.score is not None
        assert wide.detector.soft_score(grey.to(dtype)).dtype == dtype
        assert wide.detector.threshold == system.detector.threshold
    floating = {t.dtype for _, module in wide._modules for t in module.state_dict().values() if t.is_floating_point()}
    assert floating == {dtype}
    back = wide.to("cpu", torch.float32)
    assert back(grey).logits.dtype == torch.float32


def test_tensors_of_parts_move_and_a_part_that_appears_twice_stays_one(tiny_model: nn.Module, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model)
    reference = Reference(grey, torch.arange(5))
    pair = (ExpectedGradients(model, reference, samples=2), ExpectedGradients(model, reference, samples=2))
    moved = System(model, Aggregate(model, pair)).to(dtype=torch.float64)
    first, second = moved.interpreter.members  # type: ignore[attr-defined]
    assert first.background is second.background
    assert first.background.x.dtype == torch.float64
    assert first.background.y.dtype == torch.int64
    assert reference.x.dtype == torch.float32


def test_bad_devices_and_dtypes_are_refused(tiny_model: nn.Module) -> None:
    system = System(tiny_model, Gradient(tiny_model))
    with pytest.raises(InputError, match="no device 'gpu' here"):
        system.to("gpu")
    with pytest.raises(InputError, match=r"floating point.*got torch\.int8"):
        system.to(dtype=torch.int8)
    with pytest.raises(InputError, match=r"a device and a dtype, got the dtypes torch\.float64 and torch\.float32"):
        system.to(torch.float64, torch.float32)
    assert system.to().model is tiny_model


def test_a_system_prints_in_one_line(tiny_model: nn.Module) -> None:
    shown = repr(System(tiny_model, Gradient(tiny_model), defenses=("aid",)))
    assert shown == f"System({type(tiny_model).__name__}, Gradient; inputs=None, defenses=('aid',))"


def test_a_dtype_alone_will_do_as_in_torch(tiny_model: nn.Module, grey: Tensor) -> None:
    model = copy.deepcopy(tiny_model)
    wide = System(model, Gradient(model)).to(torch.float64)
    assert wide(grey.double()).maps.dtype == torch.float64


class Opaque:
    """A detector that is no dataclass, with a network of its own."""

    threshold, soft_threshold = 1.0, 1.0

    def __init__(self) -> None:
        self.network = nn.Flatten().eval()

    def score(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    soft_score = score


def test_a_part_that_cannot_be_looked_into_is_not_left_behind_in_silence(tiny_model: nn.Module) -> None:
    system = System(tiny_model, Gradient(tiny_model), Opaque())
    with pytest.raises(InputError, match=r"a Opaque cannot be moved: it holds 'network'"):
        system.to(dtype=torch.float64)
    assert next(tiny_model.parameters()).dtype == torch.float32


# What it refuses


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (lambda s: s.model.net.features[4], r"the model must be in eval mode, but its part 'net\.features\.4'"),
        (lambda s: s.interpreter.masker.draw, "the interpreter must be in eval mode, but its part 'draw'"),
        (lambda s: s.detector.networks[1], "the detector must be in eval mode, but it is in train mode"),
    ],
    ids=["model", "interpreter", "detector"],
)
def test_a_part_in_train_mode_is_refused(
    part: Callable[[Any], nn.Module], message: str, tiny_model: nn.Module, grey: Tensor
) -> None:
    model = copy.deepcopy(tiny_model)
    system = System(model, rts(model, grey), ensemble(model, grey))
    system(grey)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    part(system).training = True
    with pytest.raises(InputError, match=message):
        system(grey)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


# When it rings


@dataclass(frozen=True, eq=False)
class Mean:
    """Scores by brightness."""

    threshold: float = 1.0
    soft_threshold: float = 1.0

    def score(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)

    soft_score = score

    def recalibrated(self, x: Tensor, false_alarms: float, batch_size: int) -> Mean:
        scores = torch.cat([self.score(part) for part in x.split(batch_size)])
        return replace(self, threshold=threshold_at(scores, false_alarms), soft_threshold=0.0)

    def p_values(self, x: Tensor) -> Tensor:
        return 1 - self.score(x)


def test_recalibrating_sets_the_thresholds_on_the_given_inputs(tiny_model: nn.Module, quiet: Detector) -> None:
    x = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    system = System(tiny_model, Gradient(tiny_model), Mean())
    again = system.recalibrated(x, 0.1, batch_size=7)
    alarm = again(x).alarm
    assert alarm is not None
    assert int(alarm.sum()) == 3  # a fourth would make a share of 5 / 41 of new inputs
    assert again.detector.soft_threshold == 0  # type: ignore[union-attr]
    assert system.detector.threshold == 1  # type: ignore[union-attr]
    with pytest.raises(InputError, match="has no detector, which cannot be recalibrated"):
        system.without_detector().recalibrated(x)
    with pytest.raises(InputError, match="has a Quiet, which cannot be recalibrated"):
        replace(system, detector=quiet).recalibrated(x)
    with pytest.raises(InputError, match="NaN"):
        system.recalibrated(x * math.nan)
    assert torch.equal(system.p_values(x), 1 - x.flatten(1).mean(1))
    with pytest.raises(InputError, match="has a Quiet, which keeps no scores"):
        replace(system, detector=quiet).p_values(x)


def test_scores_that_are_nan_give_no_threshold_and_no_curve() -> None:
    scores = torch.arange(20.0)
    bad = scores.clone()
    bad[3] = math.nan
    with pytest.raises(InputError, match="1 of 20 scores are NaN"):
        threshold_at(bad, 0.05)
    for clean, attacked in ((bad, scores), (scores, bad)):
        with pytest.raises(InputError, match="1 of 40 scores are NaN"):
            auc(clean, attacked)


def test_a_score_that_is_nan_raises_the_alarm(tiny_model: nn.Module, grey: Tensor) -> None:
    class Broken(Mean):
        def score(self, x: Tensor) -> Tensor:
            return torch.tensor([math.nan, 0.0, 2.0])

    seen = System(tiny_model, Gradient(tiny_model), Broken())(grey[:1].repeat(3, 1, 1, 1))
    assert seen.alarm is not None
    assert seen.alarm.tolist() == [True, False, True]


def test_few_scores_are_warned_about() -> None:
    with pytest.warns(FewScoresWarning, match=r"5\.00% false alarms is calibrated on 18 clean scores; it takes 19"):
        assert threshold_at(torch.arange(18.0), 0.05) == 17
    threshold_at(torch.arange(19.0), 0.05)
    threshold_at(torch.arange(2.0), 0.0)


# What the page says


def test_the_snippets_of_the_production_page_run_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    photograph(tmp_path / "photograph.jpg")
    page = (Path(__file__).parents[1] / "docs" / "production.md").read_text(encoding="utf-8")
    found: dict[str, Any] = {"__name__": "snippet"}
    snippets = re.findall(r"^```python\n(.*?)^```", page, flags=re.M | re.S)
    for code in snippets:
        exec(compile(code, "docs/production.md", "exec"), found)
    assert len(snippets) == 8
    assert len(found["answers"]) == 3
    assert found["seen"].logits.dtype == torch.bfloat16
    assert found["system"].inputs == found["inputs"]


# Serving code that computes in inference mode


def test_a_system_can_be_loaded_attacked_and_defended_in_inference_mode(digits: Data, tmp_path: Path) -> None:
    model = models.load("small-cnn", num_classes=10, in_channels=1, seed=0)
    System(model, GradCAM(model)).save(tmp_path)
    x, y = stack(take(digits.test, 4))
    usual = System.load(tmp_path)
    wanted = PGD(eps=0.1, steps=2)(usual, x, y).x
    with torch.inference_mode():
        system = System.load(tmp_path)
        inside = x.clone()
        assert torch.equal(system(inside).maps, usual(x).maps)
        assert torch.equal(PGD(eps=0.1, steps=2)(system, inside, y).x, wanted)
        trained = Retrained(training=Training(epochs=1, batch_size=32))(system, take(digits.train, 64))
        assert trained(inside).logits.isfinite().all()


def test_class_names_of_another_number_than_the_classes_are_refused_by_the_first_call(grey: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    system = System(model, Gradient(model), inputs=InputSpec(size=None, channels=1, class_names=("a", "b")))
    with pytest.raises(InputError, match="inputs name 2 classes, but the model has 3"):
        system(grey)
