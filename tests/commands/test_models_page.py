"""``docs/models.md`` is what is measured, on a sample of its families."""

from __future__ import annotations

from pathlib import Path

import pytest

from robustexplain.commands import measured

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def row_of(family: str) -> dict[str, str]:
    (line,) = [line for line in PAGE.read_text().splitlines() if line.startswith(f"| {family} |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    return dict(zip(measured.CHECKS, cells[2:], strict=True))


@pytest.mark.parametrize(
    ("family", "columns"),
    [
        ("MobileNetV3", ("gradient", "lrp", "smoothed", "gradcam", "attention-rollout")),
        ("ViT", ("deeplift", "guided-backprop", "smoothed", "gradcam", "attention-rollout")),
        ("XCiT", ("smoothed", "gradcam", "attention-rollout")),
    ],
)
def test_the_page_says_what_is_measured(family: str, columns: tuple[str, ...]) -> None:
    written = row_of(family)
    found = measured.measure(family, columns)
    assert {column: written[column] for column in columns} == found.verdicts
    assert all(reason in PAGE.read_text() for reason in found.reasons.values())


def test_the_page_has_every_family_and_nothing_that_is_wrong() -> None:
    page = PAGE.read_text()
    for family, (model, _) in measured.FAMILIES.items():
        assert f"| {family} | `{model}` |" in page
    assert "wrong" not in page
    assert "nothing changes" not in page
