"""The report's first paragraph: what a run shows, in sentences that claim no more than the figures do."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from .audit_page import FIGURES, Audited
from .doubts import Doubts
from .ranking import CHANCE, Ranking, WorstCase
from .results import Results
from .statistics import Estimate
from .worst import AIMS, attackers

MOST = 3
"""How many reasons, or labels, a sentence holds."""
WANTED = {"forge": "another prediction", "move": "another map alone"}
"""What attackers of each aim want."""
OPEN = 0.9
"""The share of an undefended row that attacks should win; with less, they are too weak to judge a defense by."""


def verdict(results: Results, ranked: Ranking, doubts: Doubts, audits: list[Audited]) -> list[str]:
    """The sentences: what owners hide, which defense held best, whether beyond chance, its price, what is in doubt."""
    found = [hidden(audited) for audited in audits]
    if not attackers(results.experiment):
        return [*found, "No attacker on inputs stands in this run."]
    if not ranked.cases:
        none = "No cell of a row with an honest owner is done: nothing can be said of defenses."
        return found or [none]
    for aim, side in (ranked.aims or {"": ranked}).items():
        columns = [c for c in attackers(results.experiment) if not aim or c.facts.keeps_prediction is AIMS[aim]]
        found += _of_aim(aim, _told(results, side, len(columns)))
    return [line for line in (*found, _seeds(results), *_in_doubt(results, doubts)) if line]


def _told(results: Results, ranked: Ranking, count: int) -> list[str]:
    """Which defense held best against ``count`` attackers, whether beyond chance, and its price."""
    found = _held(results, ranked, count)
    if ranked.best is not None:
        found += [_compared(ranked), *_helped(_defended(results, ranked), ranked.best)]
        found += _price(results, ranked.best)
    return [line for line in (*found, *_tempting(ranked)) if line]


def _of_aim(aim: str, lines: list[str]) -> list[str]:
    """The sentences, the first with the attackers that they are about, where there are others."""
    if not aim or not lines:
        return lines
    first = lines[0][:1].lower() + lines[0][1:]
    return [f"Against attackers who want {WANTED[aim]}: {first}", *lines[1:]]


def hidden(audited: Audited) -> str:
    """What the maps of a manipulated row hide, in a sentence."""
    name, row = audited.headline, audited.row
    now, before = audited.shown(row.root, name), audited.shown(row.root, f"{name}_before")
    words = [f"“{row.label}” was manipulated by its owner so that it hides what “{row.root}” shows"]
    if now is not None:
        honest = "" if before is None else f" (honest: {before:.2f})"
        figure = FIGURES.get(name, name)
        figure = figure if figure[:2].isupper() else figure[:1].lower() + figure[1:]
        words.append(f"{figure}: {now:.2f}{honest}")
    if audited.accuracy is not None:
        words.append(f"accuracy: {audited.accuracy[1]:.1%} (honest: {audited.accuracy[0]:.1%})")
    return "; ".join(words) + "."


def _held(results: Results, ranked: Ranking, count: int) -> list[str]:
    things = results.things
    tried = "the one attacker" if count == 1 else f"at least one of {count} attackers"
    defended = _defended(results, ranked)
    if not defended:
        first = next(iter(ranked.cases.values()))
        line = f"“{first.row}” lost least: {tried} won {percent(first.share)} of its {first.share.count} {things}."
        return [f"No defense of an honest system stands in this run. {line}", *_weak(first)]
    if ranked.best is None:
        return ["No defense can be said to have held: of every defended row, the cells that decide are in doubt."]
    case = ranked.cases[ranked.best]
    root = ranked.cases.get(results.experiment.reference(results.experiment.row(case.row)).label)
    line = f"{tried} won {percent(case.share)} of its {case.share.count} {things}"
    if root is not None:
        line += f", and {percent(root.share)} of those of “{root.row}”, which has no defense"
    many, helped = len([one for one in defended if not one.doubted]), _helped(defended, case.row)
    if not case.better:
        opening = f"{'' if helped else 'No defense is shown to help. '}Least was lost by “{case.row}”"
    else:
        opening = f"Of {many} defended systems “{case.row}” held best" if many > 1 else f"“{case.row}” held"
    lines = [f"{opening}: in the worst case {line}.", *_weak(root)]
    found = case.difference
    if found is None or found.value is None or found.low is None or found.high is None or case.p is None:
        return lines
    points = (
        f"{100 * found.value:+.0f} percentage points (95% interval {100 * found.low:+.0f} to {100 * found.high:+.0f})"
    )
    if case.better:
        chance = "which is beyond chance"
    elif case.worse:
        chance = "which is beyond chance: the defense makes it worse"
    else:
        chance = "which chance alone may explain"
    several = f"{ranked.tests} comparisons" if ranked.tests > 1 else "one comparison"
    tests = f"p {written(case.p)}, by Holm's correction for {several}"
    if case.p >= CHANCE and found.low * found.high > 0:
        tests += "; the interval is that of this comparison alone"
    return [*lines, f"The difference on the same {things} is {points}, {chance} ({tests})."]


def _defended(results: Results, ranked: Ranking) -> list[WorstCase]:
    return [case for case in ranked.cases.values() if results.experiment.row(case.row).derived]


def _helped(defended: list[WorstCase], best: str) -> list[str]:
    """The other defenses that are better, or worse, than what they stand on."""
    others = [case for case in defended if case.row != best and not case.doubted]
    better = [case.row for case in others if case.better]
    worse = [case.row for case in others if case.worse]
    lines = []
    if better:
        lines.append(f"Beyond chance better than the undefended row that they stand on: {named(better)}.")
    if worse:
        lines.append(f"Beyond chance worse than it: {named(worse)}.")
    return lines


def _weak(root: WorstCase | None) -> list[str]:
    """An attack that leaves even undefended systems alone shows nothing of defenses."""
    if root is None or root.share.value is None or root.share.value >= OPEN:
        return []
    return [
        f"The attacks of this run did not win {OPEN:.0%} of what has no defense, so a row that lost little need not be "
        "robust."
    ]


def _compared(ranked: Ranking) -> str:
    """The best defended row against the others."""
    worse = [other for other, (gap, p) in ranked.against.items() if p < CHANCE and (gap.value or 0.0) < 0]
    same = [other for other, (_, p) in ranked.against.items() if p >= CHANCE]
    lines = []
    if worse:
        lines.append(f"It lost fewer than {named(worse)}, beyond chance.")
    if same:
        lines.append(f"These figures cannot tell it from {named(same)}.")
    return " ".join(lines)


def _price(results: Results, best: str) -> list[str]:
    cost = results.rows.get(best)
    plain = results.rows.get(results.experiment.reference(results.experiment.row(best)).label)
    if cost is None or plain is None:
        return []
    lines = [f"clean accuracy {cost['accuracy']:.1%} instead of {plain['accuracy']:.1%}"]
    key, what = (
        ("ms_single", "a single input")
        if "ms_single" in cost and "ms_single" in plain
        else ("ms", "an input of a batch")
    )
    times = cost[key] / plain[key]
    lines.append(f"{cost[key]:.3g} ms for {what}, {times:.1f} times the undefended {plain[key]:.3g} ms")
    alarms = results.calibrations.get(best, {}).get("false_alarms")
    if alarms:
        known = {kind: alarms[kind]["value"] for kind in ("clean", "harmless") if alarms.get(kind)}
        rates = " and ".join(f"{value:.1%} of {kind}" for kind, value in known.items() if value is not None)
        lines.append(f"false alarms on {rates} inputs" if rates else "false alarms not known: no input was new to it")
    whose = " in the first training" if results.seeds > 1 else ""
    return [f"Its price{whose}: {'; '.join(lines)}."]


def _tempting(ranked: Ranking) -> list[str]:
    """Rows that seem to do better than the best one and are in doubt."""
    limit = float("inf") if ranked.best is None else ranked.cases[ranked.best].share.value or 0.0
    cases = [c for c in ranked.cases.values() if c.doubted and (c.share.value or 0.0) <= limit and ranked.best]
    return [
        f"“{c.row}” shows {percent(c.share)}, which is not to be believed: {'; '.join(c.doubted[:MOST])}."
        for c in cases
    ]


def _seeds(results: Results) -> str:
    if results.seeds > 1:
        return f"Everything was trained {results.seeds} times: intervals cover seeds and {results.things}."
    trained = any(results.experiment.row(row.label).derived for row in results.experiment.rows)
    one = "One seed was run: intervals are over {things} and do not cover another training."
    return one.format(things=results.things) if trained else ""


def _in_doubt(results: Results, doubts: Doubts) -> list[str]:
    whole = sum(1 for cell in results.cells.values() if cell and cell["status"] == "done")
    gone = sum(1 for cell in results.cells.values() if cell is None or cell["status"] != "done")
    lines = [f"{gone} of {len(results.cells)} cells failed or are missing."] if gone else []
    if not doubts:
        return [*lines, "No cell is in doubt by the checks that were made."] if whole else lines
    first: dict[str, str] = {}
    by_kind: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for where, reasons in doubts.items():
        # Reasons hold figures of single cells; the names of their flags do not.
        kinds = {flag["reason"]: flag["name"] for flag in results.flags(*where)}
        for why in reasons:
            kind = kinds.get(why, why)
            first.setdefault(kind, why)
            by_kind[kind].append(where)
    order = sorted(by_kind, key=lambda kind: -len(by_kind[kind]))
    said = "; ".join(f"{first[kind]} ({_places(by_kind[kind])})" for kind in order[:MOST])
    more = f"; and {len(order) - MOST} more reasons below" if len(order) > MOST else ""
    return [*lines, f"{len(doubts)} of {whole} cells are not to be believed and are hatched: {said}{more}."]


def _places(places: list[tuple[str, str]]) -> str:
    rows = list(dict.fromkeys(row for row, _ in places))
    if len(rows) == 1:
        return f"{len(places)} of “{rows[0]}”" if len(places) > 1 else f"“{rows[0]}” / “{places[0][1]}”"
    return f"{len(places)} cells in {len(rows)} rows"


def named(labels: list[str]) -> str:
    """Labels in a sentence, the first few by name."""
    shown = [f"“{label}”" for label in labels[:MOST]]
    if len(labels) > MOST:
        return f"{', '.join(shown)} and {len(labels) - MOST} more"
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def percent(share: Estimate | dict[str, Any]) -> str:
    """A share with its interval: ``13% (95% interval 7% to 21%)``."""
    e = share.as_dict() if isinstance(share, Estimate) else share
    if e["value"] is None:
        return "an unknown share"
    return f"{100 * e['value']:.3g}% (95% interval {e['low']:.0%} to {e['high']:.0%})"


def written(p: float) -> str:
    """A p-value in two digits, as it stands after ``p``."""
    return "< 0.0001" if p < 1e-4 else f"= {p:.2g}"
