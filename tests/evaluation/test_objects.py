"""The matrix of one's own systems and attacks, in one call: judged, resumed, reported, refused."""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

import robustexplain as rx
from robustexplain import attacks, defenses, interpreters
from robustexplain.attacks import Attack, Plan, SearchResult
from robustexplain.autograd.rectifiers import Softplus
from robustexplain.cli import app
from robustexplain.data import Data
from robustexplain.errors import InputError, RobustExplainWarning, RunMismatchError
from robustexplain.evaluation import Defended, Evaluation, RunFolder, costs, matrix
from robustexplain.evaluation.adversaries import Adversaries
from robustexplain.evaluation.calibration import Calibrator, Draws
from robustexplain.evaluation.judged import Chunks
from robustexplain.evaluation.origins import Origins
from robustexplain.evaluation.own_data import Inputs, data_of
from robustexplain.evaluation.prepared import Prepared
from robustexplain.fingerprint import fingerprint
from robustexplain.metrics import Spearman
from robustexplain.objectives import Goal, Objective, Sum
from robustexplain.random_streams import Streams
from robustexplain.recipe.experiment import Experiment, Row
from robustexplain.recipe.plausible import Plausible

SETTINGS = Evaluation(images=24, batch_size=8, bootstrap=100, pictures=1)
USERS = """
import robustexplain as rx, torch
from robustexplain import attacks, defenses, interpreters

layers = torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3)
model = torch.nn.Sequential(*layers).eval()
x = torch.rand(8, 1, 8, 8)
plain = rx.System(model, interpreters.Gradient(model))
smooth = defenses.BetaSmoothing()(plain)
results = rx.evaluate(
    {"gradient": plain, "smoothed": (smooth, "gradient")},
    {"pgd": attacks.PGD(steps=2), "adv2": (attacks.ADV2(steps=2), "adaptive")},
    (x, model(x).argmax(1)),
    out="run",
)
assert 0 <= results.measure("smoothed", "adv2", "joint")["value"] <= 1
"""


def net(seed: int = 0, classes: int = 3) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(128, classes)).eval()


@dataclass(frozen=True)
class Own:
    """What a user brings."""

    plain: rx.System
    wrong: rx.System
    x: Tensor
    y: Tensor

    @property
    def systems(self) -> dict[str, Any]:
        smooth = defenses.BetaSmoothing()(self.plain)
        both = rx.System(smooth.model, interpreters.Smoothed(smooth.model, smooth.interpreter, Softplus(5.0)))
        return {
            "plain": self.plain,
            "smooth": Defended(smooth, "plain"),
            "smoother": (both, "smooth"),
            "other": (self.wrong, "plain"),
        }

    @property
    def attacks(self) -> dict[str, Any]:
        pgd = attacks.PGD(eps=0.2, steps=3, step_size=0.1)
        return {"clean": attacks.Clean(), "pgd": pgd, "knows": (pgd, "adaptive"), "moved": (pgd, "transfer")}


@pytest.fixture(scope="module")
def own() -> Own:
    model, changed = net(), net()
    x = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, y = model(x), model(x).argmax(1)
        margins = logits.topk(2).values.diff().neg()
        changed[-1].bias[y.mode().values] -= float(margins.median())  # another classifier: wrong on some inputs
        # And attacked otherwise: a bias alone seldom turns the sign of a gradient.
        changed[-1].weight += 0.1 * torch.randn(changed[-1].weight.shape, generator=torch.Generator().manual_seed(1))
    return Own(rx.System(model, interpreters.Gradient(model)), rx.System(changed, interpreters.Gradient(changed)), x, y)


def judge(own: Own, out: Path, **changes: Any) -> rx.evaluation.Results:
    given = {"systems": own.systems, "attacks": own.attacks, "data": (own.x, own.y), "evaluation": SETTINGS, **changes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RobustExplainWarning)
        return rx.evaluate(given.pop("systems"), given.pop("attacks"), given.pop("data"), out=out, **given)


@pytest.fixture(scope="module")
def finished(own: Own, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "run"
    judge(own, root, evaluation=replace(SETTINGS, targeted=False))
    return root


def test_the_matrix_of_an_own_module_on_own_tensors_takes_a_dozen_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len([line for line in USERS.splitlines() if line.strip()]) < 16
    monkeypatch.chdir(tmp_path)
    exec(compile(USERS, "a user's script", "exec"), {})
    assert {"cells", "matrix.csv", "report.html", "run.json"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_accuracy_is_measured_once_for_each_model_in_batches_of_their_own(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[nn.Module, int]] = []
    measure = costs.clean_accuracy

    def counted(model: nn.Module, data: Data, size: int, images: int, device: torch.device) -> float:
        asked.append((model, size))
        return measure(model, data, size, images, device)

    monkeypatch.setattr(costs, "clean_accuracy", counted)
    results = judge(own, tmp_path / "run", attacks={"clean": attacks.Clean()})
    # Three rows explain one model, the fourth another.
    assert [model for model, _ in asked] == [own.plain.model, own.wrong.model]
    assert {size for _, size in asked} == {costs.FORWARD}
    assert results.rows["plain"]["accuracy"] == results.rows["smooth"]["accuracy"] == 1.0
    assert results.rows["other"]["accuracy"] < 1.0


def test_a_row_s_own_clean_errors_are_no_success_of_the_attacker(finished: Path) -> None:
    found = RunFolder(finished).arrays("other", "clean")
    wrong = found["correct"] == 0
    assert 0 < int(wrong.sum()) < len(wrong)
    assert torch.equal(found["success"] > 0, wrong)  # untargeted: its own errors count as successes
    assert torch.equal(found["success_correct"].isnan(), wrong)
    assert not found["success_correct"][~wrong].any()
    cell = RunFolder(finished).read_cell("other", "clean")
    assert cell is not None
    assert cell["measures"]["success_correct"]["value"] == 0
    assert cell["measures"]["success_correct"]["count"] == int((~wrong).sum())
    assert cell["against_undefended"]["success_correct"]["value"] == 0
    for row in ("plain", "smooth", "smoother"):
        same = RunFolder(finished).read_cell(row, "pgd")
        assert same is not None
        assert same["measures"]["success_correct"] == same["measures"]["success"]
        assert same["measures"]["joint_correct"] == same["measures"]["joint"]
    report = (finished / "report.html").read_text()
    assert "Attack success where clean inputs are right" in report
    assert "no success of the attacker" in report


def test_a_stack_is_compared_with_its_root_and_taken_for_it(finished: Path) -> None:
    folder = RunFolder(finished)
    cell = folder.read_cell("smoother", "pgd")
    assert cell is not None
    assert cell["base"] == "smooth"
    mine, root = (folder.arrays(row, "pgd")["l1"].double() for row in ("smoother", "plain"))
    assert cell["against_undefended"]["l1"]["value"] == pytest.approx(float((mine - root).mean()))
    for column in ("pgd", "knows", "moved"):  # PGD looks at logits alone, and all of these have the same
        inputs = [folder.arrays(row, column)["attacked_x"] for row in ("plain", "smooth", "smoother")]
        assert torch.equal(inputs[0], inputs[1])
        assert torch.equal(inputs[0], inputs[2])
    assert not torch.equal(folder.arrays("other", "pgd")["attacked_x"], folder.arrays("plain", "pgd")["attacked_x"])
    assert torch.equal(folder.arrays("other", "moved")["attacked_x"], folder.arrays("plain", "pgd")["attacked_x"])


def test_the_same_call_goes_on_after_a_kill_and_then_does_nothing(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: Path
) -> None:
    settings, real, left = replace(SETTINGS, targeted=False), matrix.measure, [7]

    def killed(*args: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(matrix, "measure", killed)
        with pytest.raises(KeyboardInterrupt):
            judge(own, tmp_path / "run", evaluation=settings)
    assert 0 < len(list((tmp_path / "run/cells").glob("*.json"))) < 16
    judge(own, tmp_path / "run", evaluation=settings)
    assert (tmp_path / "run/matrix.csv").read_bytes() == (finished / "matrix.csv").read_bytes()
    monkeypatch.setattr(matrix, "measure", None)
    judge(own, tmp_path / "run", evaluation=settings)


def test_another_experiment_is_refused_and_what_differs_is_named(own: Own, finished: Path) -> None:
    settings = replace(SETTINGS, targeted=False)
    with pytest.raises(RunMismatchError, match=r"experiment differs \(experiment: evaluation.targeted, seed\)"):
        judge(own, finished, seed=3)
    x = own.x.clone()
    x[3, 0, 0, 0] = 1 - x[3, 0, 0, 0]
    with pytest.raises(RunMismatchError, match="its data differs"):
        judge(own, finished, evaluation=settings, data=(x, own.y))


def test_report_works_on_it_and_explain_says_that_the_model_must_be_handed_in(finished: Path, tmp_path: Path) -> None:
    before = (finished / "matrix.csv").read_bytes()
    done = CliRunner().invoke(app, ["report", str(finished)])
    assert done.exit_code == 0, done.output
    assert "smoother" in done.output
    assert (finished / "matrix.csv").read_bytes() == before
    from robustexplain.commands.explain import systems_of_run

    with pytest.raises(InputError, match="was not made by a registered builder"):
        systems_of_run(finished, ["plain"])


@dataclass(frozen=True)
class _Add(Plan):
    delta: Tensor
    aim: ClassVar[Objective] = Sum()
    summary: ClassVar[str] = "adds"
    threat: ClassVar[Any] = attacks.Linf(1.0)

    def run(self, system: rx.System, goal: Goal, streams: Streams) -> SearchResult:
        return SearchResult.of((goal.x + self.delta).clamp(0, 1))


@dataclass(frozen=True, eq=False)
class Pattern(Attack):
    """Somebody's own attack: adds a pattern."""

    pattern: Tensor

    def plan(self, system: rx.System) -> Plan:
        return _Add(self.pattern)


class Odd(nn.Module):
    """A module that no builder makes, inside an interpreter."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, eq=False)
class Painted(interpreters.Gradient):
    """Somebody's own interpreter, with a network of its own."""

    paint: nn.Module | None = None


def test_own_classes_are_judged_and_what_cannot_be_stored_is_noted(own: Own, tmp_path: Path) -> None:
    model = own.plain.model
    systems = {"painted": rx.System(model, Painted(model, paint=Odd().eval()))}
    dots, half = torch.zeros(1, 8, 8), torch.zeros(1, 8, 8)
    dots[0, 3, 3], half[0, :4] = 1, 0.5
    samples = [(a, int(b)) for a, b in zip(own.x, own.y, strict=True)]
    patterns = {"dots": Pattern(dots), "half": Pattern(half)}
    changes = {"systems": systems, "attacks": patterns, "metrics": ("l1", Spearman()), "data": samples}
    results = judge(own, tmp_path / "run", **changes)
    folder = RunFolder(tmp_path / "run")
    assert {cell["status"] for cell in results.cells.values() if cell} == {"done"}
    # Attacks of one class with other tensors are not taken for each other.
    dotted, halved = (folder.arrays("painted", name)["perturbation"] for name in ("dots", "half"))
    assert float(dotted.max()) > 0.6
    assert float(halved.max()) <= 0.5 + 1e-6
    assert results.measure("painted", "dots", "spearman") is not None
    assert "cannot be saved" in str(folder.unsaved("painted"))
    from robustexplain.commands.explain import systems_of_run

    with pytest.raises(InputError, match=r"the system of 'painted' is not in .*cannot be saved"):
        systems_of_run(tmp_path / "run", [])
    assert json.loads((tmp_path / "run/run.json").read_text())["shape"] == [1, 8, 8]


def test_a_registered_data_set_is_judged_on_its_test_part_by_name(own: Own, tmp_path: Path) -> None:
    model = net(classes=10)
    results = judge(own, tmp_path / "run", systems={"plain": rx.System(model, interpreters.Gradient(model))},
                    attacks={"clean": attacks.Clean()}, data="digits",
                    evaluation=replace(SETTINGS, only_correct=False))  # fmt: skip
    assert results.judged == 24
    assert results.measure("plain", "clean", "correct")["value"] < 0.5  # type: ignore[index]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"systems": {}}, "at least one system"),
        ({"systems": {"a": 3}}, r"systems\['a'\] must be a System"),
        ({"attacks": {}}, "at least one attack"),
        ({"attacks": {"a": "pgd"}}, r"attacks\['a'\] must be an Attack"),
        ({"attacks": {"a": (attacks.PGD(), "psychic")}}, "'psychic' is none of oblivious, transfer, adaptive"),
        ({"attacks": {"a": attacks.UAP()}}, "needs inputs of the adversary's own"),
        ({"metrics": ["pointing-game"]}, "no metric that a cell can measure"),
        ({"metrics": ["l1", "l1"]}, "l1 stands there twice"),
        ({"data": "digits"}, "digits has 10 classes, and the classifiers tell 3 apart"),
        ({"data": 3}, "data must be tensors"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.rand(4))}, "y must hold a class for each of 4 inputs"),
        ({"data": (torch.rand(4, 1, 8, 8), torch.full((4,), 3))}, "label 3, but the classes are 0 to 2"),
        ({"data": (torch.rand(4, 1, 8, 8) + 1, torch.zeros(4, dtype=torch.int64))}, r"must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments_are_named_and_leave_no_directory(
    own: Own, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        judge(own, tmp_path / "run", **changes)
    with pytest.raises(InputError, match="nothing to judge: none of the 60 inputs"):
        judge(own, tmp_path / "run", data=(own.x, (own.y + 1) % 3))
    assert not (tmp_path / "run").exists()


def test_systems_that_stand_on_nothing_or_each_other_are_refused(own: Own, tmp_path: Path) -> None:
    for systems, said in (
        ({"a": (own.plain, "b")}, "stands on 'b', which is none of a"),
        ({"a": (own.plain, "b"), "b": (own.plain, "a")}, "in a circle"),
    ):
        with pytest.raises(InputError, match=said):
            judge(own, tmp_path / "run", systems=systems)


# ---- fingerprints ----


def test_a_fingerprint_sees_settings_weights_and_tensors_and_nothing_else(own: Own) -> None:
    model = own.plain.model
    assert fingerprint(net()) == fingerprint(net())
    assert fingerprint(net()) != fingerprint(net(1))
    assert fingerprint(nn.Sequential(nn.ReLU())) != fingerprint(nn.Sequential(nn.Tanh()))
    assert fingerprint(attacks.PGD()) == fingerprint(attacks.PGD())
    assert fingerprint(attacks.PGD()) != fingerprint(attacks.PGD(steps=3))
    dotted = torch.zeros(9999)
    dotted[5000] = 1
    assert fingerprint(Pattern(torch.zeros(9999))) != fingerprint(Pattern(dotted))
    smooth = [interpreters.Smoothed(model, interpreters.Gradient(model), Softplus(beta)) for beta in (1.0, 1.0, 2.0)]
    prints = [fingerprint(rx.System(model, each)) for each in smooth]
    assert prints[0] == prints[1] != prints[2]


# ---- fingerprints ----


def _times(k: float) -> Any:
    return lambda x: k * x


class _Scaled(nn.Module):
    def __init__(self, k: float) -> None:
        super().__init__()
        self.k = k


class _Private(nn.Module):
    """What its forward does hangs on a private setting; the last input, which it keeps, is none."""

    def __init__(self, k: float, last: Tensor | None = None) -> None:
        super().__init__()
        self._k, self._last = k, last


class _Slotted:
    __slots__ = ("k",)

    def __init__(self, k: float) -> None:
        self.k = k


def test_functions_and_modules_that_compute_different_things_have_different_fingerprints() -> None:
    pairs = (
        (lambda x: x, lambda x: -x),
        (lambda x: torch.sin(x), lambda x: torch.cos(x)),
        (lambda x, k=1: x, lambda x, k=2: x),
        (_times(1.0), _times(2.0)),
        (partial(max, 1), partial(max, 2)),
        (partial(max, 1), partial(min, 1)),
        (_Scaled(1.0), _Scaled(-1.0)),
        (nn.Sequential(_Scaled(1.0)), nn.Sequential(_Scaled(-1.0))),
        (_Slotted(1.0), _Slotted(2.0)),
        (_Private(True), _Private(False)),
        (nn.Sequential(_Private(1)), nn.Sequential(_Private(2))),
    )
    for one, other in pairs:
        assert fingerprint(one) != fingerprint(other)
    assert fingerprint(_Private(1, torch.ones(2))) == fingerprint(_Private(1, torch.zeros(2)))
    for make in (_times, _Scaled, _Slotted, lambda k: partial(max, k)):
        assert fingerprint(make(3.0)) == fingerprint(make(3.0))
    with pytest.raises(InputError, match="cannot be told"):
        fingerprint(i for i in range(3))


SCRIPT = """
from dataclasses import dataclass
from torch import nn

LIMIT = 3

class Made:
    def __init__(self, x):
        self.x = x

def helper(x):
    return [LIMIT * part for part in Made(x).x]

class Base:
    size = 1

    @property
    def wide(self):
        return self.size + 1

@dataclass(frozen=True)
class Mine(Base):
    k: float = 1.0

    def __call__(self, x):
        return helper(x)

    def __reduce__(self):
        return super().__reduce__()

class Net(nn.Module):
    def forward(self, x):
        return x.relu()
"""


def _script(**edits: tuple[str, str]) -> tuple[str, str]:
    """Fingerprints of a component and of a module of a script, of which some lines were edited."""
    text = SCRIPT
    for before, after in edits.values():
        assert before in text
        text = text.replace(before, after)
    names: dict[str, Any] = {"__name__": "a_script_of_ones_own"}
    exec(compile(text, "mine.py", "exec"), names)
    return fingerprint(names["Mine"]()), fingerprint(nn.Sequential(names["Net"]()))


def test_edited_code_of_ones_own_components_is_seen_and_moved_lines_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "a_script_of_ones_own", ModuleType("a_script_of_ones_own"))
    usual = _script()
    assert _script(edit=("from torch", "\n\n# a remark\nfrom torch")) == usual
    edits = {
        "a helper": ("for part in Made(x).x]", "for part in Made(x).x[1:]]"),
        "a class that it makes": ("self.x = x", "self.x = -x"),
        "a constant": ("LIMIT = 3", "LIMIT = 4"),
        "a base's attribute": ("size = 1", "size = 2"),
        "a property": ("self.size + 1", "self.size - 1"),
        "a method": ("return helper(x)", "return helper(x) + x"),
    }
    for what, edit in edits.items():
        changed = _script(edit=edit)
        assert changed[0] != usual[0], what
        assert changed[1] == usual[1], what
    changed = _script(edit=("x.relu()", "x.tanh()"))
    assert (changed[0], changed[1] != usual[1]) == (usual[0], True)


# ---- faults ----


def test_differences_that_a_killed_call_did_not_come_to_are_made_by_the_next(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"systems": {"plain": own.plain, "other": (own.wrong, "plain")}, "attacks": {"clean": attacks.Clean()}}
    measure = matrix.measure

    def failing(trial: Any, *rest: Any) -> Any:
        if trial.system is own.plain:
            raise RuntimeError("out of memory")
        return measure(trial, *rest)

    def killed(summaries: Any) -> None:
        if RunFolder(tmp_path).done("plain", "clean") is not None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(matrix, "measure", failing)
        judge(own, tmp_path, **given)
    with monkeypatch.context() as patch:
        patch.setattr(matrix.Summaries, "compare_late", killed)
        with pytest.raises(KeyboardInterrupt):
            judge(own, tmp_path, **given)
    judge(own, tmp_path, **given)
    cell = RunFolder(tmp_path).done("other", "clean")
    assert cell is not None
    assert "success" in cell["against_undefended"]


def test_an_attack_that_cannot_be_adapted_to_a_system_leaves_a_hole_and_the_other_cells(
    own: Own, tmp_path: Path
) -> None:
    class Odd(attacks.PGD):
        def adapted(self, system: rx.System) -> Any:
            raise InputError("cannot adapt to this")

    given = {"clean": attacks.Clean(), "odd": (Odd(steps=1), "adaptive")}
    judge(own, tmp_path, systems={"plain": own.plain}, attacks=given)
    cell = RunFolder(tmp_path).read_cell("plain", "odd")
    assert cell is not None
    assert "cannot adapt to this" in cell["traceback"]
    assert RunFolder(tmp_path).done("plain", "clean") is not None


def test_a_defense_that_brings_its_interpreter_is_its_own_reference(own: Own) -> None:
    row = Row("root", "root", "any", None, "root", "defense")
    parts = {"columns": (), "metrics": {}, "evaluation": SETTINGS}
    experiment = Experiment(name="", rows=(row,), **parts)
    assert experiment.undefended(row) is row is experiment.reference(row)
    adversaries = Adversaries(experiment, Prepared({"root": own.plain}), Origins(experiment))
    assert adversaries.oblivious(row)[0] is own.plain


def test_an_attack_fitted_on_other_inputs_is_made_anew(own: Own, tmp_path: Path) -> None:
    given = {"systems": {"plain": own.plain}, "attacks": {"uap": attacks.UAP(eps=0.2)}}
    test, nothing = Inputs(own.x, tuple(own.y.tolist())), Inputs((), ())
    found = []
    for x, out in ((own.x, "run"), (1 - own.x, "run"), (1 - own.x, "fresh")):
        part = Inputs(x, tuple(own.plain.model(x).argmax(1).tolist()))
        data = Data("mine", ("0", "1", "2"), (1, 8, 8), nothing, part, test, "", ())
        judge(own, tmp_path / out, data=data, evaluation=replace(SETTINGS, targeted=False), **given)
        found.append(RunFolder(tmp_path / out).arrays("plain", "uap")["attacked_x"])
    assert not torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_other_calibration_inputs_of_data_without_a_digest_make_another_limit(own: Own, tmp_path: Path) -> None:
    test, nothing = Inputs(own.x[:24], tuple(own.y[:24].tolist())), Inputs((), ())
    limits = []
    for scale, out in ((1.0, "run"), (0.05, "run"), (0.05, "fresh")):
        part = Inputs(scale * own.x, tuple(own.y.tolist()))
        data = Data("mine", ("0", "1", "2"), (1, 8, 8), nothing, part, test, "", ())
        judge(
            own, tmp_path / out, data=data, systems={"plain": own.plain}, attacks={"noise": attacks.Noise(eps=0.1)},
            evaluation=replace(SETTINGS, targeted=False, calibration=40),
        )  # fmt: skip
        known = RunFolder(tmp_path / out).calibrated("plain")
        assert known is not None
        assert known[0]["part"] == "defense"
        limits.append(known[0]["limit"])
    assert limits[0] != limits[1] == limits[2]


def test_rows_that_need_no_calibration_stand_beside_one_that_has_it(
    own: Own, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Calibrator.measure

    def measure(self: Calibrator, system: rx.System, draws: Draws) -> dict[str, Tensor]:
        if system.interpreter is not own.plain.interpreter:
            raise RuntimeError("no memory")
        return real(self, system, draws)

    monkeypatch.setattr(Calibrator, "measure", measure)
    settings = replace(SETTINGS, targeted=False, calibration=20, plausible=Plausible(iou=0.5))
    systems = {"plain": own.plain, "other": (own.wrong, "plain")}
    found = judge(
        own, tmp_path / "run", systems=systems, attacks={"noise": attacks.Noise(eps=0.1)}, evaluation=settings
    )
    assert [cell and cell["status"] for cell in found.cells.values()] == ["done", "done"]


class Turned(Dataset[Any]):
    """Like torchvision's folders: labels in ``targets``, and what they become in ``target_transform``."""

    def __init__(self, x: Tensor, y: Tensor, name: str = "targets") -> None:
        self.x, self.target_transform = x, lambda label: 2 - label
        setattr(self, name, y.tolist())
        self.y = y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], self.target_transform(int(self.y[index]))


@pytest.mark.parametrize("name", ["targets", "labels"])
def test_labels_are_those_of_the_items_whatever_the_data_set_keeps(name: str, own: Own) -> None:
    given = Turned(own.x, own.y, name)
    assert data_of(given, lambda x: 3).test.labels == tuple((2 - own.y).tolist())  # type: ignore[attr-defined]


def test_systems_and_inputs_of_bfloat16_are_judged(own: Own, tmp_path: Path) -> None:
    model = net().bfloat16()
    systems = {"plain": rx.System(model, interpreters.Gradient(model))}
    settings = replace(SETTINGS, images=8)
    results = judge(own, tmp_path / "run", systems=systems, data=(own.x.bfloat16(), own.y), evaluation=settings)
    assert results.measure("plain", "pgd", "l1") is not None


def test_a_cell_keeps_the_first_pictures_and_the_figures_of_all(finished: Path) -> None:
    arrays = RunFolder(finished).arrays("plain", "pgd")
    assert len(arrays["success"]) == SETTINGS.images > SETTINGS.batch_size
    assert {len(arrays[name]) for name in ("x", "attacked_x", "map", "attacked_map")} == {SETTINGS.pictures}


def test_chunks_are_read_when_they_are_asked_for(own: Own) -> None:
    read: list[int] = []

    class Noted(Turned):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            read.append(index)
            return super().__getitem__(index)

    loaded = data_of(Noted(own.x, own.y), lambda x: 3)
    read.clear()
    made = Chunks([5, 3, 9, 11, 2], loaded, replace(SETTINGS, batch_size=2), 0, torch.device("cpu"))
    assert len(made) == 3
    assert not read
    assert torch.equal(made[-1].x, own.x[[2]])
    assert read == [2]
    whole = Chunks([5, 3, 9, 11, 2], loaded, replace(SETTINGS, batch_size=5), 0, torch.device("cpu"))[0]
    for name in ("x", "y", "goal_class", "samples"):
        assert torch.equal(torch.cat([getattr(chunk, name) for chunk in made]), getattr(whole, name)), name
    assert [chunk.index for chunk in made] == [0, 1, 2]
    assert [len(chunk.x) for chunk in made[:2]] == [2, 2]
    with pytest.raises(IndexError):
        made[3]
