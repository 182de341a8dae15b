"""A recipe is data: read, checked as a whole, and refused with one readable message before anything is trained."""

from __future__ import annotations

import contextlib
import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from robustexplain import recipes, training
from robustexplain.attacks import ADV2, PGD
from robustexplain.cli import main
from robustexplain.defenses import AID
from robustexplain.errors import InputError, MissingDataError
from robustexplain.recipe import check, check_data, read, short_of_reach
from robustexplain.recipe.experiment import Recipe

ROOT = Path(__file__).parents[2]
PACKAGED = sorted((ROOT / "recipes").rglob("*.yaml"))
TINY = Path(__file__).parents[1] / "tiny.yaml"


@pytest.fixture
def tree() -> dict[str, Any]:
    """The tiny recipe as plain data, to be broken."""
    return yaml.safe_load(TINY.read_text(encoding="utf-8"))


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command as the shell runs it: ``cli("validate", ...)`` gives exit code, output and errors."""

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["robustexplain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        return int(left.value.code or 0), *capsys.readouterr()

    return call


@pytest.fixture
def untrained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""

    def refuse(*args: object) -> float:
        raise AssertionError("an epoch was trained")

    monkeypatch.setattr(training.loop._Loop, "epoch", refuse)


def message(tree: Any) -> str:
    with pytest.raises(InputError) as error:
        check(tree)
    return str(error.value)


def test_a_recipe_without_a_name_is_called_after_its_file(tree: dict[str, Any], tmp_path: Path) -> None:
    del tree["name"]
    for file, name in (("mine.yaml", "mine"), ("-.yaml", "experiment")):
        (tmp_path / file).write_text(yaml.safe_dump(tree))
        assert read(tmp_path / file).name == name
    assert read(tmp_path / "mine.yaml", ["name=other"]).name == "other"


# ---- packaged recipes ----


@pytest.mark.parametrize("file", PACKAGED, ids=lambda f: f.stem)
def test_every_packaged_recipe_is_valid_without_its_data(file: Path) -> None:
    recipe = read(file)
    assert recipe.rows
    assert recipe.columns
    assert str(file.relative_to(ROOT / "recipes").with_suffix("")) in recipes.names()
    assert not short_of_reach(recipe)


def test_attacks_whose_steps_end_before_the_border_are_named() -> None:
    changes = [
        "attacks=[{name: pgd, eps: [0.05, 0.1], steps: 20}, "
        "{name: pgd, label: drawn, eps: 0.1, steps: 2, random_start: true}, {name: map-pgd, eps: 0.1, steps: 2}, "
        "{name: noise, eps: 0.1}, {name: auto, eps: 0.1}]",
        "defenses=[{name: x-ensemble, of: gradient, attack: {eps: 0.2, steps: 4, step_size: 0.04}}]",
    ]
    found = short_of_reach(read(TINY, ["interpreters=[gradient]", *changes]))
    assert found == [
        "pgd, eps 0.1: all steps together come to 0.0784, and eps is 0.1: set step_size, or more steps",
        "x-ensemble (gradient): attack: all steps together come to 0.16, and eps is 0.2: set step_size, or more steps",
    ]


@pytest.mark.parametrize("file", PACKAGED, ids=lambda f: f.stem)
def test_every_packaged_recipe_says_what_it_shows_how_to_launch_it_and_how_long_it_takes(file: Path) -> None:
    lines = file.read_text(encoding="utf-8").splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    for word in ("Shows:", "Launch:", "Takes:"):
        assert [line for line in head if line.startswith(f"# {word}") and len(line) > len(word) + 10], word
    launch = next(line for line in head if line.startswith("# Launch:"))
    name = str(file.relative_to(ROOT / "recipes").with_suffix(""))
    commands = (
        f"robustexplain {verb} {what}" for verb in ("run", "sanity", "scan") for what in (name, f"recipes/{name}.yaml")
    )
    assert any(command in launch for command in commands)


def test_a_packaged_recipe_is_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    digests = {read(word).digest for word in ("quickstart", "quickstart.yaml", "recipes/quickstart.yaml")}
    assert len(digests) == 1
    with pytest.raises(MissingDataError, match=r"quickstart, .*paper/fashion-mnist"):
        read("quickstrat")


# ---- wrong recipes ----

WRONG = {
    "typo at the top": ({"atacks": []}, "atacks: unknown key; did you mean 'attacks'?"),
    "typo in an attack": (
        {"attacks": ["clean", {"name": "pgd", "step": 3}]},
        "attacks[1].step: unknown key; did you mean",
    ),
    "typo below": (
        {"model": {"name": "small-cnn", "train": {"epoch": 3}}},
        "model.train.epoch: unknown key; did you mean",
    ),
    "typo in a defense": (
        {"defenses": [{"name": "aid", "of": "rts", "attack": {"epz": 0.1}}]},
        "defenses[0].attack.epz: unknown key; did you mean 'eps'?",
    ),
    "unknown attack": ({"attacks": ["clean", "avd2"]}, "attacks[1].name: unknown attack 'avd2'; did you mean 'adv2'"),
    "unknown model": ({"model": "small-cn"}, "model.name: unknown model 'small-cn'; did you mean 'small-cnn'"),
    "eps in grey levels": ({"attacks": [{"name": "pgd", "eps": 300}]}, "attacks[0].eps: must be at most 1, got 300"),
    "eps in grey levels, below": (
        {"defenses": [{"name": "aid", "of": "rts", "attack": {"eps": 300}}]},
        "defenses[0].attack.eps: must be at most 1, got 300",
    ),
    "text for a number": (
        {"attacks": [{"name": "pgd", "steps": "ten"}]},
        "attacks[0].steps: input should be a valid",
    ),
    "not a number": ({"attacks": [{"name": "pgd", "eps": float("nan")}]}, "attacks[0].eps: "),
    "knowledge": (
        {"attacks": [{"name": "pgd", "knowledge": "adapt"}]},
        "attacks[0].knowledge: input should be 'oblivious'",
    ),
    "old section": ({"judge": {"images": 5}}, "judge: unknown key; it is called 'evaluation' now"),
    "old knowledge": (
        {"attacks": [{"name": "pgd", "knowledge": ["oblivious", "adapts"]}]},
        "attacks[0].knowledge: unknown word 'adapts'; it is called 'adaptive' now",
    ),
    "old setting": (
        {"interpreters": [{"name": "smoothgrad", "n_samples": 4}, "cam", "rts"]},
        "interpreters[0].n_samples: unknown key; it is called 'samples' now",
    ),
    "old nested setting": (
        {"attacks": [{"name": "adv2", "mask": {"rehearse": True}}]},
        "attacks[0].mask.rehearse: unknown key; it is called 'from_start' now",
    ),
    "no knowledge": ({"attacks": [{"name": "pgd", "knowledge": []}]}, "attacks[0].knowledge: the list is empty"),
    "goal map of PGD": (
        {"attacks": [{"name": "pgd", "goal_map": "random-patch"}]},
        "attacks[0].goal_map: pgd does not",
    ),
    "micro batch": (
        {"model": {"name": "small-cnn", "train": {"batch_size": 64, "micro_batch": 48}}},
        "model.train: Training.micro_batch must divide batch_size, got 48 and 64",
    ),
    "of nobody": (
        {"defenses": [{"name": "aid", "of": "rst"}]},
        "defenses[0].of: no earlier row of the recipe is called 'rst'; there are cam, rts",
    ),
    "of is missing": ({"defenses": [{"name": "aid"}]}, "defenses[0].of: this key is needed"),
    "fractions": ({"data": {"name": "digits", "fractions": [0.5, 0.5, 0.5]}}, "data: fractions must be three shares"),
    "evaluation": (
        {"evaluation": {"images": 0}},
        "evaluation.images: input should be greater than or equal to 1, got 0",
    ),
    "seed": ({"seed": -1}, "seed: a whole number of at least 0 is needed, got -1"),
    "metric twice": ({"metrics": ["iou", {"name": "iou", "threshold": 0.2}]}, "metrics: iou stands there twice"),
    "two labels": ({"attacks": ["pgd", {"name": "pgd", "steps": 3}]}, "attacks: two are called 'pgd'"),
    "two rows": (
        {"interpreters": ["cam", "rts", "cam"]},
        "interpreters, manipulations and defenses: two are called 'cam'",
    ),
    "no row": (
        {"interpreters": ["aggregate", "cam", "rts"]},
        "interpreters[0].name: 'aggregate' is made of other parts",
    ),
    "not a list": ({"attacks": "clean"}, "attacks: a list is needed, got 'clean'"),
    "not an entry": ({"attacks": [3]}, "attacks[0]: a name, or a mapping with a name, is needed, got 3"),
    "an import path": ({"attacks": ["robustexplain.attacks.PGD"]}, "attacks[0].name: unknown attack"),
    "a class": ({"interpreters": [{"name": "cam", "class": "os.system"}, "rts"]}, "interpreters[0].class: unknown key"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_refused_with_the_path_in_the_file(case: str, tree: dict[str, Any]) -> None:
    change, expected = WRONG[case]
    said = message({**tree, **change})
    assert expected in said
    assert said.count("\n") == 0, f"one mistake, one line: {said}"


def test_the_unbroken_recipe_is_accepted(tree: dict[str, Any]) -> None:
    assert isinstance(check(tree), Recipe)


def test_all_mistakes_are_reported_at_once(tree: dict[str, Any]) -> None:
    tree |= {
        "data": "digit",
        "model": "small",
        "seed": "zero",
        "metrics": ["l3"],
        "evaluation": {"image": 1},
        "notes": 1,
    }
    tree["interpreters"][0] = {"name": "cam", "colour": "red"}
    tree["defenses"][0]["wait"] = 1
    tree["attacks"][2] |= {"eps": 300, "knowledge": "adaptive"}
    tree["attacks"].append("pdg")
    paths = [line.split(":")[0] for line in message(tree).splitlines()]
    assert sorted(paths) == [
        "attacks[2].eps",
        "attacks[4].name",
        "data.name",
        "defenses[0].wait",
        "evaluation.image",
        "interpreters[0].colour",
        "metrics[0].name",
        "model.name",
        "notes",
        "seed",
    ]


@pytest.mark.parametrize("content", ["", "- a\n- b", "just text", "3"])
def test_a_file_that_holds_no_mapping_is_refused(content: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(content)
    with pytest.raises(InputError, match=r"r\.yaml:\n  a recipe is a YAML mapping"):
        read(file)


@pytest.mark.parametrize(
    "content",
    [
        b"name: [unclosed",
        b"\xff\xfe\x00binary",
        b"name: !!python/object/apply:os.system ['touch pwned']",
        b"name: !!python/object:robustexplain.recipe.Model {}",
        b"name: !!python/name:os.system",
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused_and_runs_nothing(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    with pytest.raises(InputError, match="is not YAML"):
        read(file)
    assert list(tmp_path.iterdir()) == [file]


# ---- what is missing on this machine ----


def test_missing_weights_and_missing_images_are_reported_together(tree: dict[str, Any]) -> None:
    tree |= {"model": {"name": "small-cnn", "weights": "no.safetensors"}, "data": "image-folder:/no/images"}
    with pytest.raises(MissingDataError) as error:
        check_data(check(tree))
    first, second = str(error.value).splitlines()
    assert first == "model.weights: no file at no.safetensors"
    assert second.startswith("data: image-folder: no folder '/no/images'")


@pytest.mark.parametrize(
    "fractions,expected",
    [
        ([0.5, 0, 0.5], ["defenses: 'aid (rts)' trains", "defenses: 'x-ensemble (cam)' trains"]),
        ([0, 0.5, 0.5], ["model.train: trains, and the train part", "interpreters: 'rts' trains, and the train part"]),
        ([0.5, 0.5, 0], ["data: the test part of digits is empty"]),
    ],
)
def test_an_empty_part_that_is_needed_is_refused(
    fractions: list[float], expected: list[str], tree: dict[str, Any]
) -> None:
    tree["data"]["fractions"] = fractions
    with pytest.raises(InputError) as error:
        check_data(check(tree))
    lines = str(error.value).splitlines()
    assert [line[: len(words)] for line, words in zip(lines, expected, strict=True)] == expected


@pytest.mark.usefixtures("untrained")
@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize(
    "change,expected",
    [
        ("attacks[2].stepz=3", "attacks[2].stepz: unknown key; did you mean 'steps'?"),
        ("attacks[2].eps=300", "attacks[2].eps: must be at most 1, got 300"),
        ("attacks[9].eps=0.1", "there is no entry [9]"),
        ("attacks[x].eps=0.1", "--set attacks[x].eps=0.1"),
        ("interpreters[-1]=gradient", "'interpreters[-1]' is no key, nor a key with places in lists"),
        ("interpreters[0=gradient", "'interpreters[0' is no key"),
        ("attacks", "--set takes key.path=value"),
        ("model.weights=no.safetensors", "model.weights: no file at no.safetensors"),
        ("data={name: image-folder, path: /no/images}", "data: image-folder: no folder '/no/images'"),
        ("data.fractions=[0.5, 0, 0.5]", "defenses: 'aid (rts)' trains"),
    ],
)
def test_the_command_ends_with_code_2_one_message_and_no_training(
    cli: Any, tmp_path: Path, command: str, change: str, expected: str
) -> None:
    out = ["--out", tmp_path / "run"] if command == "run" else []
    code, _, said = cli(command, TINY, "--set", change, *out)
    assert code == 2
    assert said.startswith("error: ")
    assert expected in said
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_the_real_command_gives_code_2_and_no_traceback(tmp_path: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "robustexplain",
        "run",
        str(TINY),
        "--set",
        "attacks[1].epz=1",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "attacks[1].epz: unknown key; did you mean 'eps'?" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


# ---- values ----


@pytest.mark.parametrize(
    "text,value",
    [
        ("8/255", 8 / 255),
        ("' 8 / 255 '", 8 / 255),
        ("1e-3", 1e-3),
        ("1E-03", 1e-3),
        ("0.031", 0.031),
        ("1.5e-2", 0.015),
    ],
)
def test_fractions_and_exponents_are_numbers(text: str, value: float, tree: dict[str, Any]) -> None:
    tree["attacks"] = yaml.safe_load(f"[{{name: pgd, eps: {text}}}]")
    assert check(tree).columns[0].attack.eps == value


def test_an_exponent_is_a_number_where_a_whole_one_is_needed(tree: dict[str, Any]) -> None:
    tree["attacks"] = yaml.safe_load("[{name: pgd, steps: 1e2}]")  # YAML reads 1e2 as text
    assert check(tree).columns[0].attack.steps == 100


@pytest.mark.parametrize("text", ["8/0", "8/255/2", "one/255", "e-3"])
def test_what_only_looks_like_a_number_is_refused(text: str, tree: dict[str, Any]) -> None:
    tree["attacks"] = [{"name": "pgd", "eps": text}]
    assert message(tree).startswith("attacks[0].eps: input should be a valid number")


def test_set_changes_values_list_entries_and_bare_names() -> None:
    changes = [
        "attacks[2].eps=4/255",
        "attacks[0].label=benign",
        "evaluation.images=3",
        "model.train.lr=1e-4",
        "metrics=[l1]",
    ]
    recipe = read(TINY, [*changes, "interpreters[0]=gradcam", "interpreters[0].label=cam"])
    assert recipe.columns[2].attack.eps == 4 / 255
    assert recipe.columns[0].label == "benign"
    assert recipe.evaluation.images == 3
    assert recipe.evaluation.batch_size == read(TINY).evaluation.batch_size
    assert recipe.model.train is not None
    assert recipe.model.train.lr == 1e-4
    assert (recipe.rows[0].name, recipe.rows[0].label) == ("gradcam", "cam")
    assert list(recipe.metrics) == ["l1", "iou"]  # joint success needs the IoU


@pytest.mark.parametrize("file", [TINY, *PACKAGED], ids=lambda f: f.stem)
def test_the_resolved_recipe_read_again_is_the_same_experiment(file: Path, tmp_path: Path) -> None:
    columns = read(file).columns  # those of manipulated systems and of tables have no radius
    moved = len(columns) > 1 and columns[1].facts.eps is not None
    recipe = read(file, [*(["attacks[1].eps=7/255"] if moved else []), "evaluation.pictures=2", "seed=3"])
    again = tmp_path / "again.yaml"
    again.write_text(yaml.safe_dump(recipe.source, sort_keys=False))
    second = read(again)
    assert second.digest == recipe.digest
    assert (second.rows, second.columns, second.evaluation, second.seed) == (
        recipe.rows,
        recipe.columns,
        recipe.evaluation,
        3,
    )


def test_the_digest_knows_every_change_and_no_order_of_keys(tree: dict[str, Any]) -> None:
    same = check(dict(reversed(list(tree.items()))))
    assert same.digest == check(tree).digest
    changed = copy.deepcopy(tree)
    changed["attacks"][1]["eps"] = 0.21
    assert check(changed).digest != check(tree).digest


def test_the_digest_is_of_what_decides_the_matrix(tree: dict[str, Any]) -> None:
    described = {**tree, "about": "other words", "sanity": {"images": 4}}
    assert check(described).digest == check(tree).digest
    assert check({**tree, "evaluation": {**tree["evaluation"], "images": 5}}).digest != check(tree).digest


JUNK = [None, -1, float("nan"), [], {"a": {"b": [1]}}, [["x"]], {1: 2}, "9" * 5000, b"x"]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk)[:20])
def test_any_value_anywhere_is_read_or_refused_with_a_message(junk: Any, tree: dict[str, Any]) -> None:
    tree["attacks"] = [{"name": "pgd", "label": "a", "knowledge": "oblivious", "source": "cam", "eps": 0.1}]
    tree["defenses"] = [{"name": "aggregated", "of": ["cam"], "label": "b", "members": ["cam", {"name": "gradient"}]}]
    for section in tree:
        for broken in _broken(tree[section], junk):
            with contextlib.suppress(InputError):
                check({**tree, section: broken})


def _broken(value: Any, junk: Any) -> Iterator[Any]:
    """``value`` with ``junk`` in each of its places in turn."""
    yield junk
    places = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in places:
        for broken in _broken(inner, junk):
            copied = copy.copy(value)
            copied[key] = broken
            yield copied


def test_labels_name_the_defended_row_and_the_knowledge() -> None:
    recipe = read(TINY)
    assert [row.label for row in recipe.rows] == ["cam", "rts", "aid (rts)", "x-ensemble (cam)"]
    assert [row.base for row in recipe.rows] == ["cam", "rts", "rts", "cam"]
    assert [column.label for column in recipe.columns] == [
        "clean", "noise", "pgd", "adv2, oblivious", "adv2, transfer", "adv2, adaptive",
    ]  # fmt: skip
    assert [column.knowledge for column in recipe.columns[2:]] == ["oblivious", "oblivious", "transfer", "adaptive"]


def test_a_nested_entry_changes_the_defaults_of_its_field_and_not_of_its_class(tree: dict[str, Any]) -> None:
    tree["defenses"] = [{"name": "aid", "of": "rts", "attack": {"eps": 0.1}, "training": {"epochs": 3}}]
    aid = check(tree).rows[2].settings
    own = AID()
    assert own.attack.steps != ADV2().steps  # or this test shows nothing
    assert aid.attack == ADV2(eps=0.1, steps=own.attack.steps, step_size=own.attack.step_size, warm_start=0.5)
    assert (aid.training.epochs, aid.training.lr) == (3, own.training.lr)


def test_an_entry_gives_the_same_object_as_python(tree: dict[str, Any]) -> None:
    tree["attacks"] = [{"name": "pgd", "eps": "8/255", "steps": 7, "norm": "l2", "restarts": 2}]
    assert check(tree).columns[0].attack == PGD(eps=8 / 255, steps=7, norm="l2", restarts=2)


def test_reading_a_recipe_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    read(TINY)
    assert torch.equal(torch.random.get_rng_state(), before)
