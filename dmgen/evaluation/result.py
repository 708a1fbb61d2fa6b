"""`Evaluation`: the result of `evaluate`, as a table, as a frame and as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from dmgen.estimates.score import Score, finite
from dmgen.evaluation.verdicts import TOLERANCE
from dmgen.models.samples import Samples
from dmgen.table import aligned

# With fewer effective texts, the delta method's errors are not to be believed.
_FEW = 100


@dataclass(frozen=True)
class MomentRow:
    """One constraint: its mean under base, target and policy, and the verdict on the policy.

    Attributes:
        name: the constraint's name.
        target: the mean asked for; 1.0 for a `Pointwise`, (low, high) for an interval.
        base, reachable, policy: the mean under the base, under p itself, and under the policy.
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


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; every estimate carries its error. `print` it for a table.

    Attributes:
        moments: a row a constraint.
        kl_target_policy: KL(p‖π), what is still missing, nats.
        kl_policy_base: KL(π‖a), what it cost, nats.
        kl_target_base: KL(p‖a), the least that it can cost, nats.
        excess: KL(π‖a) − KL(p‖a), what was forgotten beyond the necessary, nats; its error knows
            that both come from the same texts.
        gain: KL(p‖a) − KL(p‖π), how much nearer to the target the policy is than the base, nats;
            likewise.
        tv, js: total variation distance and Jensen-Shannon divergence (nats) of p and π.
        ess: how many of the texts, of base and policy together, count for p: the effective sample
            size under its weights. Below 100, errors of what concerns p are too small.
        length: mean length in tokens, EOS included, of "base", "target" and "policy".
        perplexity: of the texts of "base", "target" and "policy" under the base, a token.
        self_bleu, distinct: Self-BLEU-3/4/5 and Distinct-1/2/3 by model and order, such as
            `self_bleu["policy", 5]`, for "base" and "policy".
        samples: the texts of "base" and "policy".
        tolerance: of the verdicts.
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
    samples: Mapping[str, Samples] = field(repr=False)
    tolerance: float = TOLERANCE

    def to_frame(self) -> pd.DataFrame:
        """One row a number.

        Columns: metric, model ("" where the name says it), value, stderr, n, signature, and for
        the moments of the policy target, low, high, verdict and n_to_decide.
        """
        return pd.DataFrame(self._rows())

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types, ready for JSON: None where a number is not finite."""
        return {"tolerance": self.tolerance, "rows": self._rows()}

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        """A table: base, target and policy side by side, intervals and verdicts."""
        n = len(self.samples["policy"])
        asked = f"asked ± {self.tolerance:g}"
        lines = [[f"{n:,} texts of each", asked, "base", "target p", "policy π", "99 %", "verdict"]]
        for m in self.moments:
            low, high = m.interval
            said = m.verdict
            if m.n_to_decide is not None:
                said += f" (about {m.n_to_decide:,} texts would decide)"
            scores = [str(m.base), str(m.reachable), str(m.policy)]
            lines.append([m.name, _text(m.target), *scores, f"{low:.3f} to {high:.3f}", said])
        least = str(self.kl_target_base)
        lines += [
            ["KL(·‖a) paid, nats", "", "", least, str(self.kl_policy_base)],
            ["  beyond the least", "", "", "", str(self.excess)],
            ["KL(p‖·) missing, nats", "", least, "", str(self.kl_target_policy)],
            ["  less than the base", "", "", "", str(self.gain)],
            ["TV(p, ·)", "", "", "", str(self.tv)],
            ["JS(p, ·) nats", "", "", "", str(self.js)],
            ["texts that count for p", "", "", f"{self.ess:.0f} of {2 * n:,}"],
        ]
        for label, scores_by_model in (
            ("length in tokens", self.length),
            ("perplexity under a", self.perplexity),
        ):
            models = ("base", "target", "policy")
            lines.append([label, "", *(str(scores_by_model[model]) for model in models)])
        for label, by_order in (("Self-BLEU", self.self_bleu), ("Distinct", self.distinct)):
            for order in sorted({order for _, order in by_order}):
                base, policy = by_order["base", order], by_order["policy", order]
                lines.append([f"{label}-{order}", "", str(base), "", str(policy)])
        table = aligned(lines)
        if self.ess < _FEW:
            table += (
                "\nToo few texts count for p: what concerns it may be further off than its errors "
                "say. Raise n_samples, or judge a policy that is closer to it."
            )
        return table

    def _rows(self) -> list[dict[str, Any]]:
        rows = []
        for m in self.moments:
            name = f"E[{m.name}]"
            rows += [_row(name, "base", m.base), _row(name, "target", m.reachable)]
            low, high = m.interval
            rows.append(
                _row(name, "policy", m.policy)
                | {"target": m.target, "low": finite(low), "high": finite(high)}
                | {"verdict": m.verdict, "n_to_decide": m.n_to_decide}
            )
        rows += [_row(name, "", getattr(self, name)) for name in _DISTANCES]
        n = sum(len(samples) for samples in self.samples.values())
        rows.append(_row("ess", "target", Score(self.ess, math.nan, n)))
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
        "value": finite(score.value),
        "stderr": finite(score.stderr),
        "n": score.n,
        "signature": score.signature,
    }


def _text(target: float | tuple[float, float]) -> str:
    return "{:g} to {:g}".format(*target) if isinstance(target, tuple) else f"{target:g}"
