"""What was asked of a run, what was reached, and at what price: the page's answer."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dmgen.estimates.score import Score
from dmgen.report import phrasing
from dmgen.report.markup import Markup, join, tag
from dmgen.report.read import Row, RunRecord, as_score, interval, policy_rows

_BADGES = {"met": "met", "not met": "unmet", "undecided": "open"}


def headline(record: RunRecord) -> str:
    """The verdict in one line."""
    if record.final is None:
        return "Not measured yet"
    verdicts = [row["verdict"] for row in policy_rows(record.final)]
    n, met = len(verdicts), verdicts.count("met")
    if n == 1:
        return {"met": "The constraint is met", "not met": "The constraint is not met"}.get(
            verdicts[0], "Undecided whether the constraint is met"
        )
    rest = [f"{verdicts.count(v)} {v}" for v in ("not met", "undecided") if v in verdicts]
    return f"{met} of {n} constraints met" + (f" ({', '.join(rest)})" if rest else "")


def certificate(record: RunRecord) -> list[Markup]:
    """What was asked, what was reached, and at what price."""
    sentences = questions(record)
    if record.final is None:
        items = [tag("li", sentence) for sentence in sentences]
        return [tag("h2", "What was asked"), tag("ul", *items)] if items else []
    final = record.final
    rows = policy_rows(final)
    if len(sentences) != len(rows):  # made without a configuration
        sentences = [_capital(phrasing.asked_in_numbers(row, final["tolerance"])) for row in rows]
    bases = {r["metric"]: as_score(r) for r in final["rows"] if r["model"] == "base"}
    answers = [
        _answer(sentence, row, bases[row["metric"]], final["tolerance"])
        for sentence, row in zip(sentences, rows, strict=True)
    ]
    how_sure = (
        f"Measured on {phrasing.n_texts(final):,} fresh texts of the policy, which it was not "
        "trained on. A 99 % interval misses the true mean once in a hundred times; the verdict is "
        "“met” or “not met” only if the whole interval says so."
    )
    parts = [
        tag("h2", "What was asked, and what was reached"),
        tag("div", *answers, class_="cards"),
        tag("p", how_sure, class_="quiet"),
    ]
    off = phrasing.target_is_off(final)
    if off:
        text = (
            f"The target itself misses {', '.join(off)}: λ was fitted on too few texts, and a "
            "perfect policy would miss too. `dmgen fit` says how many texts it takes."
        )
        parts.append(tag("p", text, class_="note"))
    return [*parts, *_price(final)]


def questions(record: RunRecord) -> list[str]:
    """What was asked, a sentence a constraint; none where there is no configuration."""
    if record.config is None:
        return []
    pairs = zip(record.config.constraints, record.constraints, strict=True)
    return [phrasing.asked(entry, binary=bool(c.feature.binary)) for entry, c in pairs]


def _answer(sentence: str, row: Row, base: Score, tolerance: float) -> Markup:
    """A card: asked, reached, verdict."""
    found = as_score(row)
    return tag(
        "div",
        tag("p", tag("span", "Asked", class_="quiet")),
        tag("h3", f"{sentence}."),
        tag("p", f"({phrasing.asked_in_numbers(row, tolerance)})", class_="quiet"),
        tag(
            "p",
            tag("span", "Reached ", class_="quiet"),
            tag("data", f"{found.value:.3g}", value=repr(found.value), class_="big"),
            f" (99 % interval {phrasing.spread(row)}) ",
            tag("span", row["verdict"], class_=f"verdict {_BADGES[row['verdict']]}"),
        ),
        tag("p", f"{phrasing.reached(row, tolerance)} Before, the base had {base}."),
        _track(row, base, tolerance),
        class_="card",
    )  # fmt: skip


def _track(row: Row, base: Score, tolerance: float) -> Markup:
    """Where base, policy and target lie beside each other."""
    goal = row["target"] if isinstance(row["target"], Sequence) else [row["target"]] * 2
    low, high = interval(row)
    found = as_score(row).value
    marks = [goal[0] - tolerance, goal[1] + tolerance, low, high, found, base.value]
    marks = [mark for mark in marks if math.isfinite(mark)]
    left, right = min(marks), max(marks)
    if min(found, *goal, base.value) >= 0 and max(found, *goal, base.value) <= 1:
        left, right = 0.0, 1.0
    else:
        left, right = left - 0.1 * (right - left), right + 0.1 * (right - left)

    def place(x: float) -> float:
        return min(max(100 * (x - left) / (right - left), 0.0), 100.0) if right > left else 50.0

    def bar(class_: str, a: float, b: float) -> Markup:
        width = max(place(b) - place(a), 0.6)
        return tag("span", class_=class_, style=f"left:{place(a):.2f}%;width:{width:.2f}%")

    def dot(class_: str, x: float) -> Markup:
        return tag("span", class_=class_, style=f"left:{place(x):.2f}%")

    spans = [bar("goal", goal[0] - tolerance, goal[1] + tolerance), dot("dot was", base.value)]
    if math.isfinite(low) and math.isfinite(high):
        spans.append(bar("interval", low, high))
    return join(
        [
            tag("div", *spans, dot("dot", found), class_="track", aria_hidden="true"),
            tag(
                "div",
                tag("span", f"{left:.3g}"),
                tag("span", "green: allowed · ○ base · ● policy"),
                tag("span", f"{right:.3g}"),
                class_="ends",
            ),
        ]
    )


def _price(final: Row) -> list[Markup]:
    cards = [
        tag(
            "div",
            tag("h3", f"{price.title}: {price.symbol}"),
            tag(
                "p",
                tag(
                    "data",
                    phrasing.number(price.score),
                    value=repr(price.score.value),
                    class_="big",
                ),
                " nats",
            ),
            tag("p", price.meaning),
            class_="card",
        )
        for price in phrasing.prices(final)
    ]
    glossary = (
        "a is the base, π the policy, p the target: the distribution closest to the base that "
        "meets the constraints exactly. KL is a distance in nats, 0 for equal distributions. ± is "
        "one standard error."
    )
    return [
        tag("h2", "The price"),
        tag("div", *cards, class_="cards"),
        tag("p", glossary, class_="quiet"),
    ]


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
