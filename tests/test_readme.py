"""What the README and the docs show is true: snippets run, recipes validate, tables come from the code."""

from __future__ import annotations

import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest
import yaml

import robustexplain
from robustexplain import recipe
from robustexplain.commands import list as listing
from robustexplain.registry import ALL

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "defenses").glob("*.md")]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.M | re.S)


@pytest.mark.parametrize("index", range(len(blocks("python"))))
def test_python_snippets_of_the_readme_run(index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from robustexplain.registry import ATTACKS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ATTACKS, "_entries", dict(ATTACKS._entries) if list(ATTACKS) else {})
    # Dataclasses look their annotations up in the module that defines them.
    module = types.ModuleType("snippet")
    monkeypatch.setitem(sys.modules, "snippet", module)
    exec(compile(blocks("python")[index], f"README.md python {index}", "exec"), module.__dict__)


@pytest.mark.parametrize(
    "page",
    ["index", "concepts", "interpreters", "metrics", "attacks", "manipulations", "defenses/tables",
     "defenses/manipulated-models"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::robustexplain.errors.RobustExplainWarning")
def test_the_snippet_of_the_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = blocks("python", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    assert found
    for code in found:
        exec(compile(code, f"docs/{page}.md", "exec"), {})


def test_recipe_of_the_readme_validates() -> None:
    (text,) = blocks("yaml")
    checked = recipe.check(yaml.safe_load(text))
    assert [row.name for row in checked.rows] == ["gradcam", "aggregated"]
    assert {column.knowledge for column in checked.columns} == {"oblivious", "transfer", "adaptive"}


def test_the_page_of_tables_is_that_of_the_code() -> None:
    page = (ROOT / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert page == f"{listing.page()}\n", "run `robustexplain list all --markdown > docs/zoo.md`"


def test_the_counts_and_examples_of_the_readme_are_those_of_the_code() -> None:
    lines = re.findall(r"^\| \[(\w+)\]\(docs/zoo\.md#(\w+)\) \| (\d+) \| (.*) \|$", README, flags=re.M)
    assert {kind for kind, *_ in lines} == set(ALL) - {"detectors", "harmless-changes"}
    for kind, anchor, count, examples in lines:
        names = re.findall(r"`([^`]+)`", examples)
        assert (anchor, int(count), len(names)) == (kind, len(list(ALL[kind])), 3), kind
        assert all(name in ALL[kind] for name in names), kind


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 140


def test_the_first_two_shell_blocks_are_the_two_commands_a_line_each() -> None:
    setup, tests = blocks("sh")
    assert re.fullmatch(
        r"python3 -m venv \.venv && .+ && \.venv/bin/robustexplain run recipes/quickstart\.yaml\n", setup
    )
    assert tests == ".venv/bin/python -m pytest\n"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in PAGES)])
def test_links_to_files_of_the_project_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which is not there"


def test_files_that_the_docs_name_are_there() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:attacks|defenses|robustexplain)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room in re.findall(r"`((?:attacks|defenses|robustexplain|tests)/[\w/.]*)`", contributing):
        assert (ROOT / room).exists(), room


def test_pages_of_the_reference_name_what_there_is() -> None:
    """And every room of the package that has public names has a page."""
    pages = sorted((ROOT / "docs" / "reference").glob("*.md"))
    named = [name for page in pages for name in re.findall(r"^::: (.+)$", page.read_text(encoding="utf-8"), flags=re.M)]
    assert all(pkgutil.resolve_name(name) is not None for name in named)
    assert {f"robustexplain.{room}" for room in robustexplain._MODULES - {"recipes"}} <= set(named)
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in [*pages, *PAGES]:
        assert f"- {page.relative_to(ROOT / 'docs').as_posix()}" in listed, f"{page} is not in mkdocs.yml"
