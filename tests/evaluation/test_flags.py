"""Planted fakes: each looks robust for a false reason, and its cells say which."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import robustexplain as rx
from robustexplain import attacks, interpreters
from robustexplain.errors import InputError, RobustExplainWarning
from robustexplain.evaluation import Evaluation, Results, RunFolder, evaluate, run
from robustexplain.evaluation.controls import with_frozen_draws
from robustexplain.evaluation.flags import Audit
from robustexplain.evaluation.judged import Chunk
from robustexplain.evaluation.probing import iterates, probe, promise
from robustexplain.models.transformed import Transformed
from robustexplain.random_streams import frozen
from robustexplain.recipe import read
from robustexplain.recipe.auditing import Auditing
from robustexplain.recipe.plausible import Plausible
from robustexplain.registry import INTERPRETERS
from robustexplain.system import Detector
from robustexplain.transforms import UniformNoise

from .fakes import Rounding

TINY = Path(__file__).parents[1] / "tiny.yaml"
X = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def net(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.Softplus(), nn.Flatten(), nn.Linear(216, 3)).eval()


def quantised() -> nn.Module:
    return Rounding(net())


class Saturated(nn.Module):
    """Answers with probabilities, which saturate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.inner(x) * 50, 1)


class RandomResize(nn.Module):
    """Shrinks its inputs by a random size, and does not say that it is random; a few alone it leaves as they are."""

    def __init__(self, spared: int = 4) -> None:
        super().__init__()
        self.inner, self.spared = net(), spared

    def forward(self, x: Tensor) -> Tensor:
        size = 8 if len(x) <= self.spared else int(torch.randint(4, 8, ()))
        logits: Tensor = self.inner(F.interpolate(F.interpolate(x, size=size), size=8))
        return logits


class Constant(interpreters.Gradient):
    """The same map for every input."""

    def _maps(self, x: Tensor) -> Tensor:
        ramp = torch.linspace(0, 1, x[0, 0].numel(), device=x.device, dtype=x.dtype).view(x.shape[2:])
        return ramp.expand(len(x), *x.shape[2:]) + 0 * x.sum(1)

    def explain(self, x: Tensor, target: Tensor | None = None, *, native: bool = False) -> Any:
        seen = super().explain(x, target, native=native)
        return type(seen)(seen.logits, self._maps(x))


class LookUp(Constant):
    """The map of the nearest known input."""

    def _maps(self, x: Tensor) -> Tensor:
        nearest = torch.cdist(x.flatten(1), X.to(x).flatten(1)).argmin(1)
        return X.to(x)[nearest, 0] + 0 * x.sum(1)


class Rings:
    """A detector that rings for everything."""

    threshold, soft_threshold = 0.0, 0.0

    def score(self, x: Tensor) -> Tensor:
        return torch.ones(len(x))

    def soft_score(self, x: Tensor) -> Tensor:
        return x.flatten(1).mean(1)


def results_of(
    system: rx.System,
    out: Path,
    attack: attacks.Attack | None = None,
    audit: Auditing | None = None,
    others: dict[str, attacks.Attack] | None = None,
) -> Results:
    attack = attack or attacks.PGD(eps=0.5, steps=25, step_size=0.1)
    settings = Evaluation(
        batch_size=12, targeted=False, calibration=24, harmless=(UniformNoise(0.02),), bootstrap=50, pictures=1
    )
    torch.manual_seed(0)
    given = (X, system.model(X).argmax(1))
    columns = {"noise": attacks.Noise(eps=0.5), "attack": attack, **(others or {})}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        results = evaluate({"row": system}, columns, given, out=out, evaluation=settings, audit=audit)
    cell = results.cells["row", "attack"]
    assert cell is not None
    assert cell["status"] == "done", cell["traceback"]
    return results


def flags_of(
    system: rx.System, out: Path, attack: attacks.Attack | None = None, audit: Auditing | None = None
) -> dict[str, str]:
    results = results_of(system, out, attack, audit)
    return {flag["name"]: flag["reason"] for flag in results.flags("row", "attack")}


def gradient(make: Callable[[], nn.Module]) -> rx.System:
    model = make().eval().requires_grad_(False)
    return rx.System(model, interpreters.Gradient(model))


def test_an_honest_system_under_a_strong_attack_has_no_flags(quiet: Detector, tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    assert flags_of(rx.System(model, interpreters.Gradient(model), quiet), tmp_path) == {}


def test_a_quantiser_masks_gradients(tmp_path: Path) -> None:
    found = flags_of(gradient(quantised), tmp_path)
    assert "first gradient was exactly zero for 24 of 24 that it did not win" in found["zero-gradient"]


def test_a_saturated_softmax_answers_with_probabilities(tmp_path: Path) -> None:
    assert "logits are probabilities" in flags_of(gradient(Saturated), tmp_path)["softmax-output"]


def test_a_random_resize_that_does_not_say_so_is_judged_on_one_draw(tmp_path: Path) -> None:
    assert "answers the same input differently" in flags_of(gradient(RandomResize), tmp_path)["random-output"]
    with pytest.raises(InputError, match="not deterministic"):
        flags_of(gradient(lambda: RandomResize(0)), tmp_path / "open")  # the door sees one that does not hide it


@pytest.mark.parametrize(("fake", "name"), [(Constant, "constant-map"), (LookUp, "still-map")])
def test_maps_that_do_not_follow_the_input(fake: Any, name: str, tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    found = flags_of(rx.System(model, fake(model)), tmp_path)
    assert "still-map" in found
    assert name in found
    assert ("constant-map" in found) is (fake is Constant)


def test_a_detector_that_always_rings(tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    found = flags_of(rx.System(model, interpreters.Gradient(model), Rings()), tmp_path)  # type: ignore[arg-type]
    assert "rings for 100% of" in found["false-alarms"]


def test_an_attack_of_three_steps(tmp_path: Path) -> None:
    found = flags_of(gradient(net), tmp_path, attacks.PGD(eps=0.5, steps=3, step_size=0.001))
    assert {"few-steps", "undefended-weak"} <= found.keys()
    assert "takes 3 steps" in found["few-steps"]


@dataclass(frozen=True)
class Forgets(attacks.PGD):
    """Finds what it looks for and returns the benign inputs."""

    def __call__(self, system: rx.System, x: Tensor, *others: Any, **named: Any) -> attacks.Attacked:
        made = super().__call__(system, x, *others, **named)
        return replace(made, x=x, success=torch.zeros_like(made.success))


def test_an_attack_that_wins_and_does_not_return_it(tmp_path: Path) -> None:
    full, settings = Auditing(level="full", planted=False, draws=2), {"eps": 0.5, "steps": 25, "step_size": 0.1}
    found = flags_of(gradient(net), tmp_path / "fake", Forgets(**settings), full)
    assert "for 16 of 16 an iterate won and was not returned" in found["silent-success"]
    assert flags_of(gradient(net), tmp_path / "honest", attacks.PGD(**settings), full) == {}


@dataclass(frozen=True)
class Broken(attacks.PGD):
    """Breaks where it is given twice its steps."""

    def __call__(self, system: rx.System, x: Tensor, *others: Any, **named: Any) -> attacks.Attacked:
        if self.steps > 25:
            raise RuntimeError("no memory for so many steps")
        return super().__call__(system, x, *others, **named)


def test_a_check_that_broke_is_not_taken_for_one_that_was_passed(tmp_path: Path) -> None:
    full, attack = Auditing(level="full", planted=False, draws=2), Broken(eps=0.5, steps=25, step_size=0.1)
    found = flags_of(gradient(net), tmp_path, attack, full)
    assert list(found) == ["not-audited"]
    assert found["not-audited"] == "the audit could not check steps: RuntimeError: no memory for so many steps"


class Blended(interpreters.Gradient):
    """Shows the classifier a black input too, as integrated gradients do."""

    def explain(self, x: Tensor, target: Tensor | None = None, *, native: bool = False) -> Any:
        self.model(torch.zeros_like(x))
        return super().explain(x, target, native=native)


def test_what_an_interpreter_shows_to_the_classifier_is_no_iterate() -> None:
    model, goal = net(), torch.zeros(12, dtype=torch.int64)
    goal += model(torch.zeros(1, 1, 8, 8)).argmax(1)
    attack = attacks.ADV2(eps=1e-6, steps=2, step_size=1e-6)
    away = model(X).argmax(1) != goal[0]
    chunk = Chunk(0, X[away][:4], model(X[away][:4]).argmax(1), goal[:4], torch.arange(4))
    found = iterates(attack, rx.System(model, Blended(model)), chunk, None)
    assert found["success"].sum() == found["won"].sum() == 0


@dataclass(frozen=True)
class Shy(attacks.PGD):
    """Gives up where it may go far."""

    def __call__(self, system: rx.System, x: Tensor, *others: Any, **named: Any) -> attacks.Attacked:
        made = super().__call__(system, x, *others, **named)
        return made if self.eps <= 0.5 else replace(made, x=x, success=torch.zeros_like(made.success))


def test_an_attack_that_wins_less_with_a_larger_eps(tmp_path: Path) -> None:
    columns = {f"eps {eps}": Shy(eps=eps, steps=25, step_size=0.1) for eps in (0.4, 0.5, 0.6)}
    settings = Evaluation(batch_size=12, targeted=False, calibration=24, harmless=(UniformNoise(0.02),), bootstrap=50)
    model = net().requires_grad_(False)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        systems, data = {"mine": rx.System(model, interpreters.Gradient(model))}, (X, model(X).argmax(1))
        results = evaluate(
            systems, columns, data, out=tmp_path, evaluation=replace(settings, plausible=Plausible(iou=0.0))
        )
    names = [[flag["name"] for flag in results.flags("mine", label)] for label in columns]
    assert ["not-monotone" in some for some in names] == [False, False, True]


def test_a_full_audit_finds_that_twice_the_steps_and_eps_win_more(tmp_path: Path) -> None:
    made = read(TINY, [
        "interpreters=[gradient]", "defenses=[]", "attacks=[{name: pgd, eps: 0.3, steps: 2, step_size: 0.03}]",
        "model.train.epochs=1", "evaluation.calibration=20", "evaluation.harmless=[uniform-noise]",
        "audit={level: full, steps_gain: 0, planted: false, draws: 2}",
    ])  # fmt: skip
    assert run(made, tmp_path / "run") == 0
    folder = RunFolder(tmp_path / "run")
    kept = sorted((folder.root / "audited").rglob("*.safetensors"))
    # The row, with other weights; twice the steps and eps, eps 1, five restarts, random and frozen draws, iterates.
    assert len(kept) == 9
    names = {flag["name"] for flag in Results.read(folder).flags("gradient", "pgd")}
    assert "unbounded-fails" in names  # two steps do not get there
    stamps = [path.stat().st_mtime_ns for path in kept]
    assert run(made, tmp_path / "run") == 0
    assert [path.stat().st_mtime_ns for path in kept] == stamps
    kept[0].write_bytes(kept[0].read_bytes()[:-9])
    assert run(made, tmp_path / "run") == 0
    after = [path.stat().st_mtime_ns for path in kept]
    assert (after[0] != stamps[0], after[1:]) == (True, stamps[1:])


def test_steps_that_win_more_are_taken_and_the_cell_says_so(tmp_path: Path) -> None:
    slow, raising = attacks.PGD(eps=0.5, steps=2, step_size=0.02), Auditing.from_entry({"raise": True}, "audit")
    results = results_of(gradient(net), tmp_path, slow, raising)
    cell = results.cells["row", "attack"]
    assert cell is not None
    assert cell["raised"]["asked"] == 2
    assert cell["raised"]["to"] in (8, 16)
    assert "needs-more-steps" not in {flag["name"] for flag in cell["flags"]}
    found = results.measure("row", "attack", "success")
    assert found is not None
    assert found["value"] > 0.9  # 0.4 with two steps
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Twice the steps won more: {cell['raised']['to']} are taken instead of 2" in page
    stamp = RunFolder(tmp_path).cell("row", "attack").stat().st_mtime_ns
    assert results_of(gradient(net), tmp_path, slow, raising).cells == results.cells
    assert RunFolder(tmp_path).cell("row", "attack").stat().st_mtime_ns == stamp


class Rippled(nn.Module):
    """Adds ripples to its input that are too small to see, and whose slope is not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x + 1e-4 * torch.sin(1e5 * x))
        return logits


class NoGradient(nn.Module):
    """Its gradient is infinite."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x + 0 * (x - x.detach()).abs().sqrt())
        return logits


def test_a_gradient_that_is_not_there_is_told_from_one_that_is(tmp_path: Path) -> None:
    honest, masked, broken = (promise(gradient(make), X) for make in (net, quantised, NoGradient))
    assert bool(((honest > 0.95) & (honest < 1.05)).all())
    assert bool(masked.isnan().all())  # zero is another flag's
    assert bool(broken.isinf().all())
    assert "promises twenty times what is there" in flags_of(gradient(Rippled), tmp_path)["exploding-gradient"]


class Edges(Constant):
    """A map of the image's own contrast: it follows the input, and not the model."""

    def _maps(self, x: Tensor) -> Tensor:
        return (x - x.mean((2, 3), keepdim=True)).abs().sum(1)


def test_a_map_that_does_not_depend_on_the_weights(tmp_path: Path) -> None:
    model, full = net().requires_grad_(False), Auditing(level="full", planted=False, draws=2, images=8)
    fake, honest = rx.System(model, Edges(model)), rx.System(model, interpreters.Gradient(model))
    attack = attacks.PGD(eps=0.5, steps=20, step_size=0.1)
    assert "hardly depend on the model" in flags_of(fake, tmp_path / "fake", attack, full)["weights-ignored"]
    assert "weights-ignored" not in flags_of(honest, tmp_path / "honest", attack, full)


def resized(step: float) -> tuple[rx.System, dict[str, Tensor]]:
    """A system behind a random resize that says so, and what an attack does to it whose draws are frozen."""
    model = Transformed(net().requires_grad_(False), ["resize-pad-4"]).eval()
    system = rx.System(model, interpreters.Gradient(model))
    chunk = Chunk(0, X, model(X).argmax(1), None, torch.arange(len(X)))
    attack = attacks.PGD(eps=0.5, steps=20, step_size=step).adapted(system)
    assert attack.adapt.draws > 1
    return system, with_frozen_draws(attack, system, chunk)


def test_frozen_draws_tell_a_weak_attack_from_randomness(tmp_path: Path) -> None:
    system, strong = resized(0.1)
    assert float(strong["success"].mean()) > 0.9
    assert float(resized(1e-4)[1]["success"].mean()) < 0.5
    with frozen():
        assert torch.equal(system.model(X[:2]), system.model(X[:2]))
    # It says that it is random: that is no fault, and its gradient is tried with its draws frozen.
    row = probe(system, X)
    assert float(row["output_change"]) == 0
    assert float((row["promise"] - 1).abs().nanmedian()) < 0.1
    audit = Auditing(level="full", planted=False, draws=2, images=8)
    weak = attacks.PGD(eps=0.5, steps=20, step_size=1e-4)
    found = flags_of(system, tmp_path, weak, audit)
    assert "with its draws frozen" in found["fixed-noise"]
    assert "random-output" not in found


def test_an_attack_without_gradients_that_wins_more(tmp_path: Path) -> None:
    square, pgd = attacks.Square(eps=0.5, max_queries=200), attacks.PGD(eps=0.5, steps=25, step_size=0.1)
    for make, name in ((quantised, "fake"), (net, "honest")):
        results = results_of(gradient(make), tmp_path / name, pgd, others={"square": square})
        found = {flag["name"] for flag in results.flags("row", "attack")}
        assert ("black-box-stronger" in found) is (name == "fake")


def test_who_knows_more_or_may_change_more_says_nothing_about_gradients(tmp_path: Path) -> None:
    system = gradient(quantised)
    columns: dict[str, Any] = {
        "attack": attacks.PGD(eps=0.1, steps=25, step_size=0.02),
        "square": (attacks.Square(eps=0.1, max_queries=200), "adaptive"),
        "noise": attacks.Noise(eps=0.9),
    }
    settings = Evaluation(batch_size=12, targeted=False, plausible=Plausible(iou=0.5), calibration=0, bootstrap=50)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        given = (X, system.model(X).argmax(1))
        results = evaluate({"row": system}, columns, given, out=tmp_path, evaluation=settings)
    names = {flag["name"] for flag in results.flags("row", "attack")}
    assert not {"black-box-stronger", "random-as-good"} & names


class NaNs(interpreters.Gradient):
    """Gives maps of NaN."""

    def explain(self, x: Tensor, target: Tensor | None = None, *, native: bool = False) -> Any:
        seen = super().explain(x, target, native=native)
        return type(seen)(seen.logits, seen.maps * math.nan)


class Sometimes(nn.Module):
    """Answers NaN to bright images."""

    def __init__(self, bright: float) -> None:
        super().__init__()
        self.inner, self.bright = net(), bright

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.inner(x)
        return torch.where((x.mean((1, 2, 3)) > self.bright)[:, None], torch.nan, logits)


@pytest.mark.parametrize("interpreter", ["gradient", "occlusion"])
def test_a_classifier_that_answers_nan_fails_its_row_whatever_the_interpreter(interpreter: str, tmp_path: Path) -> None:
    model = Sometimes(float(X.mean((1, 2, 3)).sort().values[-3]) - 1e-6).eval().requires_grad_(False)
    good, bad = net().requires_grad_(False), rx.System(model, INTERPRETERS.get(interpreter).build(model))
    systems = {"good": gradient(lambda: good), "bad": bad}
    assert "logits" in failure(systems, tmp_path)


def test_an_interpreter_that_answers_nan_fails_its_row(tmp_path: Path) -> None:
    model = net().requires_grad_(False)
    systems = {"good": gradient(lambda: model), "bad": rx.System(model, NaNs(model))}
    assert "maps of NaNs hold NaN" in failure(systems, tmp_path)


def failure(systems: dict[str, rx.System], out: Path) -> str:
    """Why the cells of the row ``bad`` failed; those of ``good`` did not."""
    settings = Evaluation(
        batch_size=12, targeted=False, calibration=24, harmless=(UniformNoise(0.02),), bootstrap=50, only_correct=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        given = (X, systems["good"].model(X).argmax(1))
        results = evaluate(systems, {"noise": attacks.Noise(eps=0.1)}, given, out=out, evaluation=settings)
    good, bad = (results.cells[row, "noise"] for row in ("good", "bad"))
    assert good is not None
    assert good["status"] == "done"
    assert bad is not None
    assert bad["status"] == "failed"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Cells that failed" in page
    return str(bad["traceback"])


def test_the_audit_s_settings() -> None:
    assert Auditing.from_entry("full", "audit") == Auditing(level="full")
    assert Auditing.from_entry(None, "audit") == Auditing()
    assert Auditing.from_entry({"few_steps": 5}, "audit").few_steps == 5
    with pytest.raises(InputError, match=r"audit"):
        Auditing.from_entry("thorough", "audit")
    with pytest.raises(InputError, match=r"audit\.random_factor"):
        Auditing.from_entry({"random_factor": math.nan}, "audit")


@dataclass(frozen=True)
class Partly(attacks.PGD):
    """Leaves every so manieth input as it is."""

    every: int = 2

    def __call__(self, system: rx.System, x: Tensor, *others: Any, **named: Any) -> attacks.Attacked:
        made = super().__call__(system, x, *others, **named)
        left = torch.arange(len(x)) % self.every == 0
        return replace(made, x=torch.where(left[:, None, None, None], x, made.x), success=made.success & ~left)


@pytest.mark.parametrize(("every", "weak"), [(2, True), (6, False)])
def test_an_attack_is_weak_on_the_undefended_system_where_that_is_beyond_chance(
    every: int, weak: bool, tmp_path: Path
) -> None:
    found = flags_of(gradient(net), tmp_path, Partly(eps=0.5, steps=20, step_size=0.1, every=every))
    assert ("undefended-weak" in found) is weak  # 50% of 24, and 83%, which nine tenths may give


@dataclass(frozen=True)
class Blind(Partly):
    """And says of every search that it had no gradient."""

    def __call__(self, system: rx.System, x: Tensor, *others: Any, **named: Any) -> attacks.Attacked:
        made = super().__call__(system, x, *others, **named)
        return replace(made, zero_direction=torch.ones_like(made.zero_direction))


def test_a_search_without_a_gradient_is_doubted_where_it_did_not_win(tmp_path: Path) -> None:
    found = flags_of(gradient(net), tmp_path, Blind(eps=0.5, steps=20, step_size=0.1, every=6))
    assert "exactly zero for 4 of 24 that it did not win" in found["zero-gradient"]


@pytest.mark.parametrize(("more", "told"), [(3, None), (12, "wins 0.62 and this one 0.12")])
def test_another_column_outdoes_an_attack_beyond_chance_alone(more: int, told: str | None) -> None:
    mine, theirs = torch.zeros(24), torch.zeros(24)
    mine[:3], theirs[: 3 + more] = 1, 1
    folder = SimpleNamespace(arrays=lambda row, column: {"joint": theirs})
    audit = Audit(SimpleNamespace(audit=Auditing()), folder, None)  # type: ignore[arg-type]
    row = SimpleNamespace(label="row")
    assert audit._outdone(row, "other", {"joint": mine}, "joint", 0.02) == told  # type: ignore[arg-type]
