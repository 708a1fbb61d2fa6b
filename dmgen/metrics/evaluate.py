"""`evaluate`: what a policy reached, at what price, and with which certainty."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from dmgen import divergences, log_weights
from dmgen.constraints import Moment
from dmgen.ebm import EBM
from dmgen.metrics.diversity import distinct_n, self_bleu
from dmgen.models.base import LanguageModel, Samples
from dmgen.score import Score

LEVEL = 0.99
TOLERANCE = 0.05


@dataclass(frozen=True)
class MomentRow:
    """One constraint: its mean under the base, the target and the policy, and the verdict."""

    name: str
    target: float | tuple[float, float]
    base: Score
    reachable: Score
    policy: Score
    verdict: str


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found; every number carries its error. `print` it for a table.

    Attributes:
        moments: a row a constraint.
        kl_target_policy: KL(p‖π), what is still missing, nats.
        kl_policy_base: KL(π‖a), what it cost, nats.
        kl_target_base: KL(p‖a), the least that it can cost, nats.
        self_bleu: Self-BLEU-5 of the policy's and the base's texts, by model.
        distinct: Distinct-1 likewise.
        samples: the texts of the policy and the base, by model.
    """

    moments: list[MomentRow]
    kl_target_policy: Score
    kl_policy_base: Score
    kl_target_base: Score
    self_bleu: Mapping[str, Score]
    distinct: Mapping[str, Score]
    samples: Mapping[str, Samples] = field(repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row a number: what, target, value, stderr, n, and the verdict where there is one."""
        rows: list[dict[str, Any]] = []
        for m in self.moments:
            for model, score in (("base", m.base), ("policy", m.policy)):
                verdict = m.verdict if model == "policy" else ""
                rows.append(
                    _row(f"E[{m.name}]", model, score) | {"target": m.target, "verdict": verdict}
                )
        for name in ("kl_target_policy", "kl_policy_base", "kl_target_base"):
            rows.append(_row(name, "", getattr(self, name)))
        for name, by_model in (("self_bleu_5", self.self_bleu), ("distinct_1", self.distinct)):
            rows += [_row(name, model, score) for model, score in by_model.items()]
        return pd.DataFrame(rows)

    def to_dict(self) -> dict[str, Any]:
        """The same in plain types."""
        return {"rows": json.loads(self.to_frame().to_json(orient="records"))}

    def to_json(self) -> str:
        """The same as JSON text."""
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [f"{'':24}{'base':>18}{'target':>14}{'policy':>18}   99 % interval     verdict"]
        for m in self.moments:
            low, high = m.policy.interval(LEVEL)
            goal = (
                f"{m.target:.3f}"
                if isinstance(m.target, float)
                else "{:.2f}-{:.2f}".format(*m.target)
            )
            lines.append(
                f"{m.name[:24]:24}{m.base!s:>18}{goal:>14}{m.policy!s:>18}   "
                f"[{low:.3f}, {high:.3f}]    {m.verdict}"
            )
        for label, score in (
            ("KL(p‖π)  still missing", self.kl_target_policy),
            ("KL(π‖a)  paid", self.kl_policy_base),
            ("KL(p‖a)  least possible", self.kl_target_base),
        ):
            lines.append(f"{label:24}{'':18}{'':14}{score!s:>18}   nats")
        for label, by_model in (("Self-BLEU-5", self.self_bleu), ("Distinct-1", self.distinct)):
            lines.append(f"{label:24}{by_model['base']!s:>18}{'':14}{by_model['policy']!s:>18}")
        return "\n".join(lines)


def evaluate(
    policy: LanguageModel,
    target: EBM,
    *,
    n_samples: int = 2048,
    seed: int | None = None,
    tolerance: float = TOLERANCE,
) -> Evaluation:
    """Moments, divergences and diversity of `policy` against `target`, on fresh samples.

    Draws `n_samples` texts from the base and as many from the policy. Moments and KL(π‖a) come
    from the policy's own texts; what concerns the target comes from both, pooled with the balance
    heuristic: the base alone misses rare targets, the policy alone has heavy tails.

    A moment is "met" if its 99 % interval lies inside target ± tolerance, "not met" if it lies
    outside, and "undecided" otherwise.

    Raises:
        ValueError: `n_samples` is under 2.
    """
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    models = {"base": target.base, "policy": policy}
    drawn = {
        name: model.sample(
            n_samples,
            prompt=target.prompt,
            max_new_tokens=target.max_new_tokens,
            generator=generator,
        )
        for name, model in models.items()
    }
    pooled = Samples.cat([drawn["base"], drawn["policy"]])
    log_base = torch.cat([drawn["base"].log_prob, target.base.log_prob(drawn["policy"])])
    log_policy = torch.cat([policy.log_prob(drawn["base"]), drawn["policy"].log_prob])
    log_score = target.log_score(pooled, base_log_prob=log_base)
    counts = torch.tensor([n_samples, n_samples])
    log_mixture = log_weights.log_mixture(torch.stack([log_base, log_policy], dim=1), counts)
    strata = torch.arange(2).repeat_interleave(n_samples)
    texts = {name: samples.texts for name, samples in drawn.items()}
    return Evaluation(
        moments=_moments(target, drawn, pooled, log_score - log_mixture, tolerance),
        kl_target_policy=divergences.kl(log_score, log_policy, log_mixture, strata=strata),
        kl_policy_base=divergences.reverse_kl(log_policy[n_samples:], log_base[n_samples:]),
        kl_target_base=divergences.kl(log_score, log_base, log_mixture, strata=strata),
        self_bleu={name: self_bleu(t, max_texts=2000) for name, t in texts.items()},
        distinct={name: distinct_n(t, 1) for name, t in texts.items()},
        samples=drawn,
    )


def _moments(
    target: EBM, drawn: Mapping[str, Samples], pooled: Samples, log_w: Tensor, tolerance: float
) -> list[MomentRow]:
    rows = []
    values = {name: target.values(samples) for name, samples in drawn.items()}
    pooled_values = target.values(pooled)
    for constraint in target.constraints:
        is_moment = isinstance(constraint, Moment)
        goal = constraint.target if is_moment else 1.0
        policy = _mean(constraint, values["policy"])
        rows.append(
            MomentRow(
                constraint.name,
                goal,
                base=_mean(constraint, values["base"]),
                reachable=_mean(constraint, pooled_values, log_w),
                policy=policy,
                verdict=verdict(policy, goal, tolerance),
            )
        )
    return rows


def _mean(constraint: Any, values: Mapping[str, Tensor], log_w: Tensor | None = None) -> Score:
    """The mean of a constraint's feature, among the texts with its condition if it has one."""
    column = values[constraint.feature.name]
    weights = torch.zeros_like(column) if log_w is None else log_w
    if isinstance(constraint, Moment) and constraint.given is not None:
        weights = weights.masked_fill(values[constraint.given.name] == 0, -math.inf)
    value, stderr = log_weights.mean(weights, column)
    return Score(float(value), float(stderr), int((weights > -math.inf).sum()))


def verdict(score: Score, target: float | tuple[float, float], tolerance: float = TOLERANCE) -> str:
    """ "met", "not met" or "undecided": where the 99 % interval lies against target ± tolerance."""
    low, high = target if isinstance(target, tuple) else (target, target)
    low, high = low - tolerance, high + tolerance
    left, right = score.interval(LEVEL)
    if low <= left and right <= high:
        return "met"
    return "not met" if right < low or left > high else "undecided"
