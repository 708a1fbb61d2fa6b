"""What a run asked, reached and paid, in sentences for a person who was not there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmgen.estimates.score import Score
from dmgen.evaluation.verdicts import LEVEL
from dmgen.report.read import Row, interval, policy_rows, score

__all__ = ["Price", "asked", "asked_in_numbers", "number", "prices", "reached", "span", "spread"]

# Of a text in the singular and of texts in the plural, by kind of feature and argument.
_GENDERS = {
    "female": (
        "is about a woman (more female than male pronouns)",
        "are about women (more female than male pronouns)",
    ),
    "male": (
        "is about a man (more male than female pronouns)",
        "are about men (more male than female pronouns)",
    ),
    "neither": ("is about neither a woman nor a man", "are about neither women nor men"),
}
_SHARES = {0.25: "a quarter", 1 / 3: "a third", 0.5: "half", 0.75: "three quarters"}


@dataclass(frozen=True)
class Price:
    """One of the distances: what it is called, how large it is, and what that means."""

    title: str
    symbol: str
    score: Score
    meaning: str


def asked(constraint: Mapping[str, Any], *, binary: bool) -> str:
    """A constraint as a sentence: "Half of the texts are about women".

    Args:
        constraint: as a configuration has it.
        binary: whether its feature is 0 or 1, so that its mean is a share of texts.
    """
    if "pointwise" in constraint:
        return f"Every text {_holds(constraint['pointwise'])[0]}"
    one, many = _holds(constraint["moment"])
    target = constraint["target"]
    given = constraint.get("given")
    of = f"Of the texts that {_holds(given)[1]}, " if given else ""
    if not binary:
        mean = f"the mean of {_name(constraint['moment'])} is {_edges(target)}"
        return (f"{of}{mean}") if given else mean[0].upper() + mean[1:]
    if target in (0, 1):
        text = ("every text" if target == 1 else "no text") if not given else "every one"
        if given and target == 0:
            text = "none"
        return _capital(of, f"{text} {one}")
    return _capital(of, f"{_share(target)} {'' if given else 'of the texts '}{many}")


def asked_in_numbers(row: Row, tolerance: float) -> str:
    """What a row of an evaluation was judged by: "mean of female = 0.5, met from 0.45 to 0.55"."""
    name, target = row["metric"].removeprefix("E[").removesuffix("]"), row["target"]
    if isinstance(target, Sequence):
        low, high = target
        wish = f"between {low:g} and {high:g}"
    else:
        low, high, wish = target, target, f"= {target:g}"
    return f"mean of {name} {wish}, met from {low - tolerance:g} to {high + tolerance:g}"


def reached(row: Row, tolerance: float) -> str:
    """Why the verdict on a row is what it is."""
    low, high = row["target"] if isinstance(row["target"], Sequence) else [row["target"]] * 2
    allowed = f"{low - tolerance:g} to {high + tolerance:g}"
    if row["verdict"] == "met":
        return f"The whole interval lies within what was allowed, {allowed}."
    if row["verdict"] == "not met":
        left, _ = interval(row)
        side = "above" if left > high + tolerance else "below"
        return f"The whole interval lies {side} what was allowed, {allowed}."
    needed = row.get("n_to_decide")
    more = f" About {needed:,} texts would decide." if needed else ""
    return f"The interval reaches over an edge of what was allowed, {allowed}.{more}"


def prices(evaluation: Row) -> list[Price]:
    """What the policy cost, the least that it could cost, the excess, and what is still missing."""
    found = {
        name: score(evaluation, name) or Score(math.nan, math.nan, 0)
        for name in ("kl_policy_base", "kl_target_base", "excess", "kl_target_policy")
    }
    unmet = any(row["verdict"] == "not met" for row in policy_rows(evaluation))
    paid, least = found["kl_policy_base"], found["kl_target_base"]
    return [
        Price("Paid", "KL(π‖a)", paid, _paid(paid)),
        Price(
            "The least possible",
            "KL(p‖a)",
            least,
            "Nothing that meets the constraints exactly can be closer to the base than this.",
        ),
        Price("Excess", "KL(π‖a) − KL(p‖a)", found["excess"], _excess(found["excess"], unmet)),
        Price(
            "Still missing",
            "KL(p‖π)",
            found["kl_target_policy"],
            _missing(found["kl_target_policy"], least),
        ),
    ]


def target_is_off(evaluation: Row) -> list[str]:
    """Moments that the target itself misses, by its 99 % interval: λ is not good enough."""
    rows = {row["metric"]: row for row in evaluation["rows"] if row["model"] == "target"}
    off = []
    for row in policy_rows(evaluation):
        low, high = row["target"] if isinstance(row["target"], Sequence) else [row["target"]] * 2
        left, right = interval(rows[row["metric"]])
        if right < low - evaluation["tolerance"] or left > high + evaluation["tolerance"]:
            off.append(row["metric"].removeprefix("E[").removesuffix("]"))
    return off


def number(found: Score) -> str:
    """A score as `value ± stderr`, or that it is not known."""
    return str(found) if math.isfinite(found.value) else "not finite"


def n_texts(evaluation: Row) -> int:
    """How many texts of the policy were drawn; a condition leaves fewer to a moment."""
    return max(int(row["n"]) for row in evaluation["rows"] if row["model"] == "policy")


def spread(row: Row) -> str:
    """The 99 % interval of a row of an evaluation."""
    return span(*interval(row))


def span(low: float, high: float) -> str:
    """An interval, with two digits of its width."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return "not known"
    width = high - low
    decimals = 3 if width <= 0 else max(0, min(6, 1 - math.floor(math.log10(width))))
    return f"{low:.{decimals}f} to {high:.{decimals}f}"


def _paid(paid: Score) -> str:
    if not math.isfinite(paid.value):
        return "The policy writes texts that the base cannot write."
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
    if math.isnan(excess.value):
        return "It could not be measured."
    if unmet:
        return (
            "Zero within its error: the full price was paid, yet not all constraints are met, so "
            "part of it went elsewhere."
        )
    return "Zero within its error: no sign that more was changed than the constraints need."


def _missing(missing: Score, least: Score) -> str:
    what = "How far the policy is from the target p; 0 would be perfect."
    if not (math.isfinite(missing.value) and math.isfinite(least.value) and least.value > 0):
        return what
    share = 1 - missing.value / least.value
    if share < 0:
        return f"{what} The base itself is closer, at {least.value:.3g}."
    return f"{what} The base itself is {least.value:.3g} away: {share:.0%} of that is gone."


def _holds(feature: Mapping[str, Any]) -> tuple[str, str]:
    """ "mentions sports", "mention sports": a feature of one text, and of several."""
    ((kind, argument),) = feature.items()
    plain = argument if isinstance(argument, str) else None
    if kind in ("gender", "gender_gdc") and plain in _GENDERS:
        return _GENDERS[plain]
    if kind == "wordlist" and plain:
        return f"mentions {plain}", f"mention {plain}"
    if kind == "word" and plain:
        return f"contains “{plain}”", f"contain “{plain}”"
    if kind == "regex" and plain:
        return f"matches {plain}", f"match {plain}"
    return f"has {_name(feature)}", f"have {_name(feature)}"


def _name(feature: Mapping[str, Any]) -> str:
    """What to call a feature in a sentence."""
    ((kind, argument),) = feature.items()
    if kind == "length":
        unit = argument.get("unit", "words") if isinstance(argument, Mapping) else argument
        return f"length in {unit}"
    if isinstance(argument, Mapping):
        return str(argument.get("name") or f"{kind} {', '.join(map(str, argument.values()))}")
    return str(argument) if kind in ("gender", "gender_gdc", "wordlist") else f"{kind} {argument}"


def _share(target: float | Sequence[float]) -> str:
    """ "half", "12.5 %", "between 40 % and 60 %"."""
    if isinstance(target, Sequence):
        low, high = (f"{100 * edge:g} %" for edge in target)
        return f"between {low} and {high}"
    return _SHARES.get(target, f"{100 * target:g} %")


def _edges(target: float | Sequence[float]) -> str:
    if isinstance(target, Sequence):
        return "between {:g} and {:g}".format(*target)
    return f"{target:g}"


def _capital(of: str, rest: str) -> str:
    return of + rest if of else rest[0].upper() + rest[1:]
