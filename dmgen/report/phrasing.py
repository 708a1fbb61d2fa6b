"""Sentences of the pages: requests, verdicts and prices, for a reader who does not know the run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dmgen.constraints.constraint import Moment, Pointwise
from dmgen.constraints.feature import Feature
from dmgen.estimates.score import Score
from dmgen.evaluation.result import Evaluation, MomentRow
from dmgen.evaluation.verdicts import LEVEL
from dmgen.experiment.result import Run
from dmgen.report.run_values import Target, constraints_of

_FRACTIONS = {0.25: "a quarter", 1 / 3: "a third", 0.5: "half", 0.75: "three quarters"}


@dataclass(frozen=True)
class Price:
    """One of the distances.

    Attributes:
        title: its name on a page.
        symbol: its formula.
        score: its value, nats.
        meaning: one or two sentences about this value.
    """

    title: str
    symbol: str
    score: Score
    meaning: str


def headline(evaluation: Evaluation | None) -> str:
    """Return the verdict in one line."""
    if evaluation is None:
        return "Not measured yet"
    verdicts = [row.verdict for row in evaluation.moments]
    n, n_met = len(verdicts), verdicts.count("met")
    if n == 1:
        return {"met": "The constraint is met", "not met": "The constraint is not met"}.get(
            verdicts[0], "Undecided whether the constraint is met"
        )
    rest = [f"{verdicts.count(v)} {v}" for v in ("not met", "undecided") if v in verdicts]
    return f"{n_met} of {n} constraints met" + (f" ({', '.join(rest)})" if rest else "")


def requests(run: Run) -> list[str]:
    """Return the constraints of a run, a sentence each; in numbers where they are not known."""
    if constraints_of(run):
        return [request(constraint) for constraint in constraints_of(run)]
    evaluation = run.evaluation
    if evaluation is None:
        return []
    sentences = [request_in_numbers(row, evaluation.tolerance) for row in evaluation.moments]
    return [_capital(sentence) for sentence in sentences]


def request(constraint: Pointwise | Moment) -> str:
    """Return a constraint as a sentence: "Half of the texts are about women"."""
    feature = constraint.feature
    one, many = _predicates(feature)
    if isinstance(constraint, Pointwise):
        return f"Every text {one}"
    target, given = constraint.target, constraint.given
    prefix = "" if given is None else f"Of the texts that {_predicates(given)[1]}, "
    if not feature.binary:
        sentence = f"the mean of {feature.noun or feature.name} is {_edges(target)}"
    elif target in (0, 1):
        subject = "every text" if target == 1 else "no text"
        if given is not None:
            subject = "every one" if target == 1 else "none"
        sentence = f"{subject} {one}"
    else:
        sentence = f"{_fraction(target)} {'' if given else 'of the texts '}{many}"
    return prefix + sentence if prefix else _capital(sentence)


def request_in_numbers(row: MomentRow, tolerance: float) -> str:
    """Return the rule of a verdict: "mean of female = 0.5, met from 0.45 to 0.55"."""
    low, high = _bounds(row.target)
    wish = _edges(row.target) if isinstance(row.target, tuple) else f"= {low:g}"
    return f"mean of {row.name} {wish}, met from {low - tolerance:g} to {high + tolerance:g}"


def verdict_reason(row: MomentRow, tolerance: float) -> str:
    """Return why the verdict on a row is what it is."""
    low, high = _bounds(row.target)
    allowed = f"{low - tolerance:g} to {high + tolerance:g}"
    if row.verdict == "met":
        return f"The whole interval lies within the allowed range, {allowed}."
    if row.verdict == "not met":
        side = "above" if row.interval[0] > high + tolerance else "below"
        return f"The whole interval lies {side} the allowed range, {allowed}."
    more = f" About {row.n_to_decide:,} texts would decide." if row.n_to_decide else ""
    return f"The interval reaches over an edge of the allowed range, {allowed}.{more}"


def prices(evaluation: Evaluation) -> list[Price]:
    """Return KL(π‖a), the least that it could be, their difference, and KL(p‖π)."""
    unmet = any(row.verdict == "not met" for row in evaluation.moments)
    paid, least = evaluation.kl_policy_base, evaluation.kl_target_base
    excess, missing = evaluation.excess, evaluation.kl_target_policy
    least_meaning = (
        "Nothing that meets the constraints exactly can be closer to the base than this."
    )
    return [
        Price("Paid", "KL(π‖a)", paid, _paid(paid)),
        Price("The least possible", "KL(p‖a)", least, least_meaning),
        Price("Excess", "KL(π‖a) − KL(p‖a)", excess, _excess(excess, unmet)),
        Price("Still missing", "KL(p‖π)", missing, _missing(missing, least)),
    ]


def off_target(evaluation: Evaluation) -> list[str]:
    """Return the moments that the target itself misses, by its 99 % interval: λ is not exact."""
    names = []
    for row in evaluation.moments:
        low, high = _bounds(row.target)
        left, right = row.reachable.interval(LEVEL)
        if right < low - evaluation.tolerance or left > high + evaluation.tolerance:
            names.append(row.name)
    return names


def number(score: Score) -> str:
    """Return a score as `value ± stderr`, or that it is not finite."""
    return str(score) if math.isfinite(score.value) else "not finite"


def span(low: float, high: float) -> str:
    """Return an interval as text, with two digits of its width."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    width = high - low
    decimals = 3 if width <= 0 else max(0, min(6, 1 - math.floor(math.log10(width))))
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def _paid(paid: Score) -> str:
    if not math.isfinite(paid.value):
        return "The policy writes texts to which the base assigns probability 0."
    times = math.exp(min(max(paid.value, 0.0), 700.0))
    return (
        "How far the policy has moved from the base: what it writes is, on (geometric) average, "
        f"{times:.3g} times as probable under the policy as under the base."
    )


def _excess(excess: Score, unmet: bool) -> str:
    low, high = excess.interval(LEVEL)
    if high < 0:
        return (
            "Less than the least was paid, which is possible only because the constraints are not "
            "met exactly."
        )
    if low > 0:
        return (
            "The policy has moved further from the base than the constraints need: this much was "
            "forgotten on the way."
        )
    if not math.isfinite(excess.value):
        return "It could not be measured."
    if unmet:
        return (
            "Zero within its error: the full price was paid, yet not all constraints are met, so "
            "part of it went elsewhere."
        )
    return "Zero within its error: no sign that more was changed than the constraints need."


def _missing(missing: Score, least: Score) -> str:
    meaning = "How far the policy is from the target p; 0 would be perfect."
    if not (math.isfinite(missing.value) and math.isfinite(least.value) and least.value > 0):
        return meaning
    gone = 1 - missing.value / least.value
    if gone < 0:
        return f"{meaning} The base itself is closer, at {least.value:.3g}."
    return f"{meaning} The base itself is {least.value:.3g} away: {gone:.0%} of that is gone."


def _predicates(feature: Feature) -> tuple[str, str]:
    """Return the predicate of one text and of several: "mentions sports", "mention sports"."""
    noun = feature.noun or feature.name
    return feature.phrase or (f"has {noun}", f"have {noun}")


def _fraction(target: Target) -> str:
    """Return "half", "12.5 %", "between 40 % and 60 %"."""
    if isinstance(target, tuple):
        low, high = (f"{100 * edge:g} %" for edge in target)
        return f"between {low} and {high}"
    return _FRACTIONS.get(target, f"{100 * target:g} %")


def _edges(target: Target) -> str:
    return "between {:g} and {:g}".format(*target) if isinstance(target, tuple) else f"{target:g}"


def _bounds(target: Target) -> tuple[float, float]:
    return target if isinstance(target, tuple) else (target, target)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
