"""What the README and the docs show is true: snippets run, recipes validate, tables come from the code."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import yaml

from robustexplain import recipe
from robustexplain.commands.list import markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("page", ["metrics", "attacks", "manipulations"])
def test_the_snippet_of_the_page_runs(page: str) -> None:
    (code,) = blocks("python", (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8"))
    exec(compile(code, f"docs/{page}.md", "exec"), {})


def test_recipe_of_the_readme_validates() -> None:
    (text,) = blocks("yaml")
    checked = recipe.check(yaml.safe_load(text))
    assert [row.name for row in checked.rows] == ["gradcam", "aggregated"]
    assert {column.knowledge for column in checked.columns} == {"ignores", "carried-over", "adapts"}


@pytest.mark.parametrize("kind", ["attacks", "manipulations", "defenses", "interpreters", "metrics"])
def test_tables_of_the_readme_are_those_of_the_code(kind: str) -> None:
    assert markdown(kind) in README, f"run `robustexplain list {kind} --markdown` and put its table into the README"


def test_the_first_two_shell_blocks_are_the_two_commands() -> None:
    setup, tests = blocks("sh")
    assert "robustexplain run recipes/quickstart.yaml" in setup
    assert tests.strip() == ".venv/bin/python -m pytest"


@pytest.mark.parametrize("page", ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))])
def test_links_to_files_of_the_project_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which is not there"


def test_files_that_the_docs_name_are_there() -> None:
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for path in re.findall(r"`((?:attacks|defenses|robustexplain)/[\w/]+\.py)`", text):
        assert (ROOT / path).is_file(), path
