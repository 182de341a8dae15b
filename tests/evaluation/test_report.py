"""The report: what it says in words, how it ranks, what it hatches and colours, what opens, and how large it is."""

from __future__ import annotations

import csv
import io
import itertools
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustexplain.evaluation import exports
from robustexplain.evaluation.doubts import NOT_AUDITED, doubts
from robustexplain.evaluation.drawings import roc_points
from robustexplain.evaluation.glossary import glossary
from robustexplain.evaluation.leaderboard import protocol
from robustexplain.evaluation.ranking import ranking
from robustexplain.evaluation.report import _in_figure, html, matrix_figure
from robustexplain.evaluation.strips import SIDE, encoded
from robustexplain.evaluation.sweeps import sweeps
from robustexplain.evaluation.tones import look, tone
from robustexplain.evaluation.verdict import verdict
from robustexplain.evaluation.worst import any_won, attackers, over_columns
from robustexplain.recipe.experiment import AttackFacts, Column
from robustexplain.registry import ATTACKS

from .made_up import column, page_of, results_of, row, wins

ROWS = [row("plain"), row("shield", "plain"), row("veil", "plain")]
COLUMNS = [column("clean", name="Clean"), column("mild"), column("strong", "adaptive")]
EVERY = range(40)
PICTURES = {
    **{name: torch.rand(2, 1, 8, 8) for name in ("x", "attacked_x")},
    **{name: torch.rand(2, 8, 8) for name in ("map", "attacked_map")},
    "label": torch.tensor([0, 1]),
    "prediction": torch.tensor([1, 7]),
}


def arrays_of(**cells: Any) -> dict[tuple[str, str], dict[str, Tensor]]:
    """Cells of ``ROWS`` and ``COLUMNS``: ``shield_strong=[...]`` are the samples that fell there."""
    known = {tuple(name.split("_")): wins(*won) for name, won in cells.items()}
    return {(r.label, c.label): known.get((r.label, c.label), wins()) for r in ROWS for c in COLUMNS}


def said(arrays: dict[tuple[str, str], dict[str, Tensor]], **flags: Any) -> str:
    results = results_of(ROWS, COLUMNS, arrays)
    found = doubts(results) | {tuple(name.split("_")): [why] for name, why in flags.items()}
    return " ".join(verdict(results, ranking(results, arrays, found), found, []))


def test_the_worst_case_is_taken_sample_by_sample_over_all_that_attack() -> None:
    arrays = arrays_of(plain_mild=[0, 1], plain_strong=[1, 2], plain_clean=[7, 8, 9])
    case = ranking(results_of(ROWS, COLUMNS, arrays), arrays, {}).cases["plain"]
    assert case.worst.several[0]["worst"].nonzero()[:, 0].tolist() == [0, 1, 2]
    assert case.share.count == 40
    undefined = any_won([torch.tensor([torch.nan, torch.nan, 1.0]), torch.tensor([torch.nan, 0.0, torch.nan])])
    torch.testing.assert_close(undefined, torch.tensor([torch.nan, 0.0, 1.0]).double(), equal_nan=True)


def test_what_a_row_gets_wrong_by_itself_is_no_win_of_the_worst_case() -> None:
    nan = float("nan")
    cell = wins(0, 1, of=4) | {"joint_correct": torch.tensor([nan, 1.0, 0.0, nan])}
    results = results_of([row("plain")], [column("pgd")], {("plain", "pgd"): cell})
    found = over_columns(results.experiment, results.experiment.columns, {0: {"pgd": cell}})
    assert found is not None
    assert (found.measures["worst"]["value"], found.measures["worst"]["count"]) == (0.5, 2)
    assert results.main == "joint_correct"


def test_attackers_of_two_aims_have_a_worst_case_each_beside_the_common_one() -> None:
    columns = [column("forger"), Column("mover", AttackFacts("Dombrowski", True, True, True))]
    arrays = {("plain", "forger"): wins(0, 1), ("plain", "mover"): wins(1, 2, 3)}
    results = results_of(ROWS[:1], columns, arrays)
    ranked = ranking(results, arrays, {})
    case = ranked.cases["plain"]
    assert case.share.value == 4 / 40
    assert {aim: share.value for aim, share in case.aims.items()} == {"forge": 2 / 40, "move": 3 / 40}
    assert {"worst", "worst_forge", "worst_move"} < {line[4] for line in exports.lines(results, ranked, {})}


def test_where_attackers_want_two_things_rows_are_ranked_and_compared_for_each(tmp_path: Path) -> None:
    columns = [column("forger", "adaptive"), Column("mover", AttackFacts("Dombrowski", True, True, True), "adaptive")]
    fallen = {"plain": (EVERY, EVERY), "shield": (range(30), EVERY), "veil": ([0, 1], EVERY)}
    arrays = {(r, c.label): wins(*won) for r, both in fallen.items() for c, won in zip(columns, both, strict=True)}
    results = results_of(ROWS, columns, arrays)
    ranked = ranking(results, arrays, {})
    assert all(case.share.value == 1 for case in ranked.cases.values())
    assert list(ranked.cases) == list(ranked.aims["forge"].cases) == ["veil", "shield", "plain"]
    assert (ranked.aims["forge"].best, ranked.aims["forge"].cases["veil"].better) == ("veil", True)
    assert not any(case.better or case.worse for case in ranked.aims["move"].cases.values())
    gap = ranked.aims["forge"].cases["veil"].difference
    assert gap is not None
    assert gap.p is not None
    # Two differences to the root and one pair of defenses, for each of the aims; the smallest p of six.
    assert ranked.tests == ranked.aims["move"].tests == 6
    assert ranked.aims["forge"].cases["veil"].p == pytest.approx(6 * gap.p)
    words = " ".join(verdict(results, ranked, {}, []))
    assert words.startswith("Against attackers who want another prediction: of 2 defended systems “veil” held best")
    assert "Against attackers who want another map alone: no defense is shown to help." in words
    assert "the one attacker won 5%" in words
    page = page_of(results, {where: {**cell, **PICTURES} for where, cell in arrays.items()}, tmp_path)
    assert html(page).count('class="worst t-risk') == 6
    heads = [text.get_text() for text in matrix_figure(results, ranked, {}).axes[0].get_xticklabels()]
    assert heads[:2] == ["worst case,\nforge", "worst case,\nmove"]
    table = exports.as_markdown(results, ranked, {})
    assert table.startswith("|  | worst case, forge | worst case, move | forger | mover |")
    names = {line[4] for line in exports.lines(results, ranked, {})}
    assert {"worst_forge_minus_root", "worst_move_minus_root"} < names
    assert "worst_minus_root" not in names


def test_the_first_sentence_names_the_defense_that_held_best_and_whether_beyond_chance() -> None:
    arrays = arrays_of(plain_strong=EVERY, shield_strong=[0, 1], veil_strong=range(38))
    words = said(arrays)
    assert words.startswith(
        "Of 2 defended systems “shield” held best: in the worst case at least one of 2 attackers won 5%"
    )
    assert "-95 percentage points" in words
    assert "which is beyond chance (p < 0.0001, by Holm's correction for 3 comparisons)" in words
    assert "It lost fewer than “veil”, beyond chance." in words
    assert "“veil”" not in words.partition("Beyond chance better")[2]


def test_that_the_best_was_chosen_by_its_figures_is_corrected_for() -> None:
    rows = [row("plain"), *(row(f"d{i}", "plain") for i in range(6))]
    arrays = {(r.label, "strong"): wins(*range(30 + 2 * i)) for i, r in enumerate(rows[1:])}
    arrays |= {("plain", "strong"): wins(*EVERY)}
    ranked = ranking(results_of(rows, COLUMNS[2:], arrays), arrays, {})
    assert ranked.best == "d0"
    # Six differences to the root, and all pairs of six: any of them might have been the best.
    assert ranked.tests == 6 + 15
    gap, p = ranked.against["d5"]
    assert gap.p is not None
    assert p == pytest.approx(21 * gap.p)


def test_nothing_is_called_better_that_chance_may_explain() -> None:
    words = said(arrays_of(plain_strong=range(38), shield_strong=range(36), veil_strong=range(38)))
    assert "held best" not in words
    assert words.startswith("No defense is shown to help. Least was lost by “shield”")
    assert "which chance alone may explain" in words


def test_attacks_that_leave_the_undefended_row_alone_are_said_to_show_nothing() -> None:
    assert "need not be robust" in said(arrays_of(plain_strong=range(20)))
    assert "need not be robust" not in said(arrays_of(plain_strong=EVERY))


def test_a_row_in_doubt_is_not_the_best_and_its_reason_is_said() -> None:
    arrays = arrays_of(plain_strong=EVERY, shield_strong=[], veil_strong=[0, 1, 2])
    words = said(arrays, shield_strong="gradients are masked")
    assert "“veil” held" in words
    assert "“shield” shows 0% (95% interval 0% to 9%), which is not to be believed: gradients are masked." in words
    assert "1 of 9 cells are not to be believed and are hatched: gradients are masked (“shield” / “strong”)." in words


def over_seeds(*each: dict[tuple[str, str], dict[str, Tensor]]) -> str:
    """What is said of a run of several seeds, each with cells of its own."""
    results = results_of(ROWS, COLUMNS, each[0])
    results.rows.update({r.label: {"accuracy": 0.9, "ms": 1.0} for r in ROWS})
    for cell in results.cells.values():
        assert cell is not None
        cell["seeds"] = {"count": len(each), "measures": cell["measures"], "against_undefended": {}}
    for r in ROWS:
        seeds = {i: {c.label: arrays[r.label, c.label] for c in COLUMNS} for i, arrays in enumerate(each)}
        found = over_columns(results.experiment, attackers(results.experiment), seeds)
        assert found is not None
        results.worst[r.label] = found
    return " ".join(verdict(results, ranking(results, each[0], {}), {}, []))


def test_of_several_seeds_better_is_said_only_where_it_holds_over_all_of_them() -> None:
    steady = [arrays_of(plain_strong=EVERY, shield_strong=range(n), veil_strong=EVERY) for n in (2, 3, 4)]
    words = over_seeds(*steady)
    assert words.startswith("Of 2 defended systems “shield” held best")
    assert "which is beyond chance" in words
    assert "It lost fewer than “veil”, beyond chance." in words
    assert "Everything was trained 3 times" in words
    assert "Its price in the first training: clean accuracy 90.0%" in words
    # One training alone would call it better; another shows that it may be none.
    lucky = [arrays_of(plain_strong=EVERY, shield_strong=range(n), veil_strong=EVERY) for n in (2, 38, 40)]
    assert "which is beyond chance" in said(lucky[0])
    words = over_seeds(*lucky)
    assert "held best" not in words
    assert words.startswith("No defense is shown to help.")
    assert "chance alone may explain" in words


def test_a_row_with_a_missing_attacker_is_in_doubt() -> None:
    arrays = arrays_of(plain_strong=EVERY, veil_strong=[0])
    del arrays["shield", "mild"]
    cases = ranking(results_of(ROWS, COLUMNS, arrays), arrays, {}).cases
    assert cases["shield"].doubted == ("mild failed or is missing",)
    assert cases["veil"].doubted == ()


def test_doubts_are_the_audit_s_and_a_cell_that_it_has_not_seen_is_in_doubt() -> None:
    results = results_of(ROWS, COLUMNS, arrays_of())
    flagged, unseen = results.cells["veil", "strong"], results.cells["veil", "mild"]
    assert flagged is not None
    assert unseen is not None
    flagged["flags"] = [{"name": "planted", "reason": "attack not proven"}] * 2
    del unseen["flags"]
    assert doubts(results) == {("veil", "strong"): ["attack not proven"], ("veil", "mild"): [NOT_AUDITED]}


def test_columns_that_differ_in_eps_alone_are_drawn_as_a_curve_hollow_where_in_doubt(tmp_path: Path) -> None:
    columns = [column("a", eps=0.1, family="x"), column("b", eps=0.2, family="x"), column("c", eps=0.2, family="y")]
    arrays = {("plain", "a"): wins(*range(30)), ("plain", "b"): wins(0), ("plain", "c"): wins(0)}
    results = results_of(ROWS[:1], columns, arrays)
    assert [[c.label for c in sweep.columns] for sweep in sweeps(columns)] == [["a", "b"]]
    ((_, chart),) = page_of(results, arrays, tmp_path, {("plain", "b"): ["not monotone"]}).charts
    assert chart.count('class="hollow') == 1
    assert chart.count('class="dot') == 1


def test_an_attack_whose_steps_were_raised_stands_at_those_it_took(tmp_path: Path) -> None:
    columns = [column("two", eps=0.1, steps=2, family="x"), column("four", eps=0.1, steps=4, family="x")]
    arrays = {("plain", "two"): {**wins(*range(30)), **PICTURES}, ("plain", "four"): {**wins(0), **PICTURES}}
    results = results_of(ROWS[:1], columns, arrays)
    before = protocol(results)
    results.cells["plain", "two"]["raised"] = {"asked": 2, "to": 16}  # type: ignore[index]
    assert protocol(results) != before
    page = page_of(results, arrays, tmp_path)
    ((_, chart),) = page.charts
    assert re.findall(r'text-anchor="middle">(\d+)<', chart) == ["2", "4", "16"]
    first, second = (float(x) for x in re.findall(r'class="dot s0f" cx="([\d.]+)"', chart))
    assert (first, second) == (81.4, 330)  # of 2 to 16, on 40 to 330
    ranked = ranking(results, arrays, {})
    found = list(csv.DictReader(io.StringIO(exports.as_csv(results, ranked, {}))))
    assert {line["column"]: line["steps"] for line in found if line["measure"] == "joint"} == {"two": "16", "four": "4"}
    assert exports.as_markdown(results, ranked, {}).count("(16 steps)") == 1
    assert html(page).count("<br>16 steps</small>") >= 2  # the matrix, and the measures' own tables
    assert "16 steps" in _in_figure({"value": 0.5, "low": 0.4, "high": 0.6}, 16)


def test_alarms_are_good_on_attacks_and_faults_on_what_is_none_and_clean_inputs_are_no_evidence() -> None:
    attack, clean, noise = (c.facts for c in (column("a"), column("b", name="Clean"), column("c", name="Noise")))
    assert tone("alarm", "high", attack, 0.9)[1] == pytest.approx(0.1)
    assert tone("alarm", "high", clean, 0.03)[1] == pytest.approx(0.03)
    assert tone("alarm", "high", noise, 0.73)[1] == pytest.approx(0.73)
    assert tone("joint", "low", noise, 0.0) == ("control", 0.0)
    assert tone("joint", "low", attack, 1.0) == ("risk", 1.0)


def test_the_glossary_explains_every_row_and_attacker_of_a_run_once() -> None:
    results = results_of([row("lrp"), row("gradient")], [column("mine", name="ShiftedCenter"), column("pgd")], {})
    attack = next(entry for entry in ATTACKS if entry.name == "square")
    columns = [*results.experiment.columns, column("q", name=attack.build.__name__)]
    results = replace(results, experiment=replace(results.experiment, columns=tuple(columns)))
    words = [term.word for term in glossary(results)]
    assert {"lrp", "gradient", "pgd", "square", "worst case"} <= set(words)
    assert len(words) == len(set(words))


def test_an_opened_cell_says_what_the_limit_s_own_luck_would_make_of_it(tmp_path: Path) -> None:
    arrays = {("plain", name): {**wins(0, 1), **PICTURES} for name in ("near", "far")}
    results = results_of([row("plain")], [column("near"), column("far")], arrays)
    results.cells["plain", "near"]["joint_by_limit"] = [0.9, 0.1]  # type: ignore[index]
    results.cells["plain", "far"]["joint_by_limit"] = [0.1, 0.1]  # type: ignore[index]
    page = page_of(results, arrays, tmp_path)
    said = {(cell.row, cell.column): " ".join(cell.audited) for _, some in page.opened for cell in some}
    assert "joint success is 0.10 and 0.90" in said["plain", "near"]
    assert said["plain", "far"] == ""


def test_a_cell_in_doubt_is_hatched_in_every_table_and_picture(tmp_path: Path) -> None:
    arrays = arrays_of(plain_strong=EVERY)
    arrays = {where: {**cell, **PICTURES} for where, cell in arrays.items()}
    results = results_of(ROWS, COLUMNS, arrays)
    found = {("shield", "strong"): ["<masked>"]}
    page = page_of(results, arrays, tmp_path, found)
    drawn = html(page)
    # The matrix, its worst case, the comparison, the table of success, and the cell's own part.
    assert len(re.findall(r'class="[^"]*\bdoubt\b[^"]*"[^>]*(?:title|style)', drawn)) == 5
    assert "in doubt: &lt;masked&gt;" in drawn
    assert "<masked>" not in drawn
    assert "cat → dog" in drawn
    assert "dog → class 7" in drawn
    places = [list(page.ranked.cases).index("shield") - 0.5]
    hatched = [p for p in matrix_figure(results, page.ranked, found).axes[0].patches if p.get_hatch()]
    assert sorted((p.get_x(), p.get_y()) for p in hatched) == [(-0.5, places[0]), (1.5, places[0])]
    assert look(results, found, "shield", "strong", "joint").why == ("<masked>",)
    assert look(results, found, "shield", "clean", "joint").kind == "none"  # nobody attacks there
    table = exports.as_markdown(results, page.ranked, found)
    assert table.count("]?") == 2


def test_tables_escape_what_their_formats_take_for_their_own() -> None:
    rows = [row("a_b & 50%|c")]
    arrays = {("a_b & 50%|c", "mild"): wins(1)}
    results = results_of(rows, COLUMNS[1:2], arrays)
    ranked = ranking(results, arrays, {})
    assert r"a\_b \& 50\%|c & 0.03" in exports.as_latex(results, ranked, {})
    assert r"| a_b & 50%\|c | 0.03" in exports.as_markdown(results, ranked, {})
    lines = exports.as_csv(results, ranked, {}).splitlines()
    assert lines[1].startswith("a_b & 50%|c,a_b & 50%|c,worst case,,worst,0.025,")


def test_parquet_holds_every_line(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    arrays = arrays_of(plain_strong=EVERY)
    del arrays["veil", "mild"]
    results = results_of(ROWS, COLUMNS, arrays)
    ranked = ranking(results, arrays, {})
    assert exports.write_parquet(tmp_path / "m.parquet", results, ranked, {})
    table = parquet.read_table(tmp_path / "m.parquet").to_pylist()
    assert len(table) == len(list(exports.lines(results, ranked, {})))
    assert [line["value"] for line in table if line["measure"] == "status"] == [None]


def test_a_roc_curve_ends_in_its_corners_and_has_the_area_of_the_separation() -> None:
    harmless, attacked = torch.arange(100.0), torch.arange(100.0) + 40
    points = roc_points(harmless, attacked, most=500)
    assert (points[0], points[-1]) == ((0.0, 0.0), (1.0, 1.0))
    area = sum((x2 - x1) * (y1 + y2) / 2 for (x1, y1), (x2, y2) in itertools.pairwise(points))
    assert area == pytest.approx(float((attacked[:, None] > harmless).float().mean()), abs=0.01)


def test_pictures_are_small_and_a_picture_that_cells_share_is_stored_once(tmp_path: Path) -> None:
    uri, width, height = encoded(torch.rand(300, 150, 3).numpy())
    assert uri.startswith("data:image/jpeg")
    assert (width, height) == (SIDE // 2, SIDE)
    assert encoded(torch.rand(16, 16, 3).numpy())[0].startswith("data:image/png")
    large = _large(tmp_path)
    assert len(large) < 15e6
    assert large.count('<details class="cell"') == 120
    assert large.count('class="cell" id="c') == len(re.findall(r'class="cell" id="c\d+-\d+" open', large)) * 3
    uses, images = large.count("<use "), large.count("<image ")
    assert uses == 120 * 4 * 5
    # The benign image once for the whole page, the benign map once a row.
    assert images == 4 * (1 + 10 + 3 * 120)


def _large(root: Path) -> str:
    """The page of 10 rows and 12 columns, 40 of 120 cells unfolded, of photographs that are all noise."""
    rows = [row(f"row {i}") for i in range(10)]
    columns = [column(f"column {i}", "adaptive" if i % 3 == 0 else "oblivious") for i in range(12)]
    rng = torch.Generator().manual_seed(0)
    x, maps, arrays = torch.rand(4, 3, 96, 96, generator=rng), {}, {}
    for r in rows:
        maps[r.label] = torch.rand(4, 96, 96, generator=rng)
        for c in columns:
            own = {"x": x, "map": maps[r.label], "attacked_x": torch.rand(4, 3, 96, 96, generator=rng)}
            own |= {
                "attacked_map": torch.rand(4, 96, 96, generator=rng),
                "label": torch.zeros(4),
                "prediction": torch.ones(4),
            }
            arrays[r.label, c.label] = {**wins(0), **own}
    return html(page_of(results_of(rows, columns, arrays, pictures=6), arrays, root))


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
PROBE = """
const out = [];
const heads = [...document.querySelectorAll("table.matrix thead th")];
const first = () => document.querySelector("table.matrix tbody th").firstChild.textContent.trim();
out.push(first());
heads[1].querySelector("button").click(); heads[1].querySelector("button").click();
out.push(first(), heads[1].getAttribute("aria-sort"));
location.hash = document.querySelector("table.matrix td a").getAttribute("href");
setTimeout(() => {
  const cell = document.getElementById(location.hash.slice(1));
  const wide = [innerWidth, document.documentElement.scrollWidth];
  const paper = getComputedStyle(document.body).backgroundColor;
  parent.postMessage(JSON.stringify([...out, cell.open, ...wide, paper]), "*");
}, 50);
"""


# A window of Chromium's is never as narrow as a phone.
PHONE = """<!doctype html><meta name="color-scheme" content="light dark"><body>
<script>onmessage = (message) => { document.body.dataset.found = message.data }</script>
<iframe src="page.html" style="width: 400px; height: 800px; border: 0"></iframe></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser_the_page_sorts_opens_fits_a_phone_and_is_dark_where_wanted(tmp_path: Path) -> None:
    arrays = arrays_of(plain_strong=EVERY, shield_strong=[0])
    arrays = {where: {**cell, **PICTURES} for where, cell in arrays.items()}
    page = tmp_path / "page.html"
    drawn = html(page_of(results_of(ROWS, COLUMNS, arrays), arrays, tmp_path))
    page.write_text(drawn.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    phone = tmp_path / "phone.html"
    phone.write_text(PHONE, encoding="utf-8")
    words = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--hide-scrollbars",
    ]
    words += [f"--user-data-dir={tmp_path / 'profile'}", "--blink-settings=preferredColorScheme=0"]
    asked = [*words, "--virtual-time-budget=2000", "--dump-dom", phone.as_uri()]
    seen = subprocess.run(asked, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in seen.stderr
    found = re.search(r'data-found="([^"]*)"', seen.stdout)
    assert found is not None, seen.stdout[-500:]
    assert found[1].replace("&quot;", '"') == '["veil","plain","descending",true,400,400,"rgb(20, 25, 31)"]'
