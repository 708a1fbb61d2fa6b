"""`Evaluation`: the result of `evaluate`, as a table, as a frame and as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from dmgen.estimates.score import Score, finite
from dmgen.evaluation.verdicts import TOLERANCE
from dmgen.models.samples import Samples
from dmgen.table import aligned

# With fewer effective texts, the errors of the delta method are not reliable.
_FEW = 100
# Columns of a row that hold a float, which may be NaN or infinite.
_FLOATS = ("value", "stderr", "low", "high")


@dataclass(frozen=True)
class MomentRow:
    """One constraint: its mean under base, target and policy, and the verdict on the policy.

    Attributes:
        name: the constraint's name.
        target: the requested mean; 1.0 for a `Pointwise`, (low, high) for an interval.
        base: the mean under the base.
        reachable: the mean under p itself.
        policy: the mean under the policy.
        interval: 99 % interval of the policy's mean.
        verdict: "met", "not met" or "undecided", see `verdicts.verdict`.
        n_to_decide: for "undecided", about how many texts would decide; None if no number would.
    """

    name: str
    target: float | tuple[float, float]
    base: Score
    reachable: Score
    policy: Score
    interval: tuple[float, float]
    verdict: str
    n_to_decide: int | None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of `evaluate`; every estimate carries its error. `print` it for a table.

    Two evaluations are equal if `to_dict` is, so NaN equals NaN and the texts do not matter.

    Attributes:
        moments: a row for each constraint.
        kl_target_policy: KL(p‖π), the remaining distance to the target, nats.
        kl_policy_base: KL(π‖a), the distance from the base, nats.
        kl_target_base: KL(p‖a), the least distance from the base at which the target is met, nats.
        excess: KL(π‖a) − KL(p‖a), nats, with the error of a difference from the same texts.
        gain: KL(p‖a) − KL(p‖π), nats, likewise.
        tv: total variation distance of p and π.
        js: Jensen-Shannon divergence of p and π, nats.
        ess: effective number of the texts, of base and policy together, under the weights of p.
            Below 100, the errors of all estimates of p are too small.
        length: tokens of a text, for "base", "target" and "policy".
        perplexity: exp of −log a for each token, for "base", "target" and "policy".
        self_bleu: Self-BLEU of orders 3 to 5 by (model, order), for "base" and "policy".
        distinct: Distinct-n of orders 1 to 3 by (model, order), for "base" and "policy".
        n_samples: texts of each model.
        tolerance: of the verdicts.
        samples: the texts of "base" and "policy"; empty where they were not kept.
    """

    moments: list[MomentRow]
    kl_target_policy: Score
    kl_policy_base: Score
    kl_target_base: Score
    excess: Score
    gain: Score
    tv: Score
    js: Score
    ess: float
    length: Mapping[str, Score]
    perplexity: Mapping[str, Score]
    self_bleu: Mapping[tuple[str, int], Score]
    distinct: Mapping[tuple[str, int], Score]
    n_samples: int
    tolerance: float = TOLERANCE
    samples: Mapping[str, Samples] = field(default_factory=dict, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """Return a frame with one row for each number.

        Columns: metric, model ("" where the name says it), value, stderr, n, signature, and for
        the moments of the policy target, low, high, verdict and n_to_decide.
        """
        return pd.DataFrame([_plain(row) for row in self._rows()])

    def to_dict(self) -> dict[str, Any]:
        """Return plain types, ready for JSON: None where a number is not finite.

        Infinities are also listed under "infinite" as (row, column, sign).
        """
        rows = self._rows()
        infinite = [
            [i, column, math.copysign(1.0, row[column])]
            for i, row in enumerate(rows)
            for column in _FLOATS
            if math.isinf(row.get(column, 0.0))
        ]
        facts = {"tolerance": self.tolerance, "n_samples": self.n_samples}
        more = {"infinite": infinite} if infinite else {}
        return {**facts, "rows": [_plain(row) for row in rows], **more}

    def to_json(self) -> str:
        """Return `to_dict` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, mapping: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that `to_dict` wrote, without its texts.

        Args:
            mapping: may have further keys, which are ignored. Rows of version 0.1, which had no
                "n_samples", are read too.

        Raises:
            KeyError: a number is missing.
        """
        rows = [_numbers(row) for row in mapping["rows"]]
        for i, column, sign in mapping.get("infinite", ()):
            rows[i][column] = sign * math.inf
        scores = {(row["metric"], row["model"]): _score_of(row) for row in rows}
        n_moments = [row["metric"] for row in rows].index(_DISTANCES[0]) // 3
        distances: dict[str, Any] = {name: scores[name, ""] for name in _DISTANCES}
        ess = scores["ess", "target"]

        def by_model(name: str) -> dict[str, Score]:
            return {model: score for (metric, model), score in scores.items() if metric == name}

        def by_order(name: str) -> dict[tuple[str, int], Score]:
            return {
                (model, int(metric.removeprefix(f"{name}_"))): score
                for (metric, model), score in scores.items()
                if metric.startswith(f"{name}_")
            }

        return cls(
            moments=[_moment(rows[3 * i : 3 * i + 3]) for i in range(n_moments)],
            **distances,
            ess=ess.value,
            length=by_model("length"),
            perplexity=by_model("perplexity"),
            self_bleu=by_order("self_bleu"),
            distinct=by_order("distinct"),
            n_samples=mapping.get("n_samples", ess.n // 2),
            tolerance=mapping["tolerance"],
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Evaluation):
            return NotImplemented
        return self.to_dict() == other.to_dict()

    def __str__(self) -> str:
        """Return a table: base, target and policy side by side, intervals and verdicts."""
        head = [f"{self.n_samples:,} texts of each", f"requested ± {self.tolerance:g}"]
        head += ["base", "target p", "policy π", "99 %", "verdict"]
        least = str(self.kl_target_base)
        lines = [
            head,
            *map(_moment_line, self.moments),
            ["KL(·‖a), nats", "", "", least, str(self.kl_policy_base)],
            ["  policy − target", "", "", "", str(self.excess)],
            ["KL(p‖·), nats", "", least, "", str(self.kl_target_policy)],
            ["  base − policy", "", "", "", str(self.gain)],
            ["TV(p, ·)", "", "", "", str(self.tv)],
            ["JS(p, ·), nats", "", "", "", str(self.js)],
            ["effective texts of p", "", "", f"{self.ess:.0f} of {2 * self.n_samples:,}"],
        ]
        for label, by_model in (
            ("length in tokens", self.length),
            ("perplexity under a", self.perplexity),
        ):
            lines.append([label, "", *(str(by_model[m]) for m in ("base", "target", "policy"))])
        for label, by_order in (("Self-BLEU", self.self_bleu), ("Distinct", self.distinct)):
            for order in sorted({order for _, order in by_order}):
                base, policy = by_order["base", order], by_order["policy", order]
                lines.append([f"{label}-{order}", "", str(base), "", str(policy)])
        table = aligned(lines)
        if self.ess < _FEW:
            table += (
                "\nToo few effective texts of p: estimates of p may be further off than their "
                "errors. Raise n_samples, or evaluate a policy that is closer to the target."
            )
        return table

    def _rows(self) -> list[dict[str, Any]]:
        """Return all numbers, one row each, as they are."""
        rows = []
        for m in self.moments:
            name = f"E[{m.name}]"
            rows += [_row(name, "base", m.base), _row(name, "target", m.reachable)]
            low, high = m.interval
            rows.append(
                _row(name, "policy", m.policy)
                | {"target": m.target, "low": low, "high": high}
                | {"verdict": m.verdict, "n_to_decide": m.n_to_decide}
            )
        rows += [_row(name, "", getattr(self, name)) for name in _DISTANCES]
        rows.append(_row("ess", "target", Score(self.ess, math.nan, 2 * self.n_samples)))
        for name in ("length", "perplexity"):
            rows += [_row(name, model, score) for model, score in getattr(self, name).items()]
        for name in ("self_bleu", "distinct"):
            by_order = getattr(self, name).items()
            rows += [_row(f"{name}_{order}", model, score) for (model, order), score in by_order]
        return rows


_DISTANCES = ("kl_target_policy", "kl_policy_base", "kl_target_base", "excess", "gain", "tv", "js")


def _row(metric: str, model: str, score: Score) -> dict[str, Any]:
    return {
        "metric": metric,
        "model": model,
        "value": score.value,
        "stderr": score.stderr,
        "n": score.n,
        "signature": score.signature,
    }


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with None for numbers that are not finite."""
    return {k: finite(v) if k in _FLOATS else v for k, v in row.items()}


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row with NaN for None in the columns of floats."""
    return {k: math.nan if k in _FLOATS and v is None else v for k, v in row.items()}


def _score_of(row: Mapping[str, Any]) -> Score:
    return Score(row["value"], row["stderr"], row["n"], row["signature"])


def _moment(rows: Sequence[Mapping[str, Any]]) -> MomentRow:
    """Return the constraint that has three rows: of base, target and policy."""
    row, target = rows[2], rows[2]["target"]
    return MomentRow(
        name=row["metric"][2:-1],  # of E[name]
        target=tuple(target) if isinstance(target, Sequence) else target,
        base=_score_of(rows[0]),
        reachable=_score_of(rows[1]),
        policy=_score_of(row),
        interval=(row["low"], row["high"]),
        verdict=row["verdict"],
        n_to_decide=row["n_to_decide"],
    )


def _moment_line(m: MomentRow) -> list[str]:
    low, high = m.interval
    verdict = m.verdict
    if m.n_to_decide is not None:
        verdict += f" (about {m.n_to_decide:,} texts would decide)"
    target = "{:g} to {:g}".format(*m.target) if isinstance(m.target, tuple) else f"{m.target:g}"
    scores = [str(score) for score in (m.base, m.reachable, m.policy)]
    return [m.name, target, *scores, f"{low:.3f} to {high:.3f}", verdict]
