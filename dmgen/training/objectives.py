"""The objectives that are defined by the advantage A of their gradient `E_q[A ∇log π]`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates.f_divergence import FDivergence, f_divergence
from dmgen.target import factor
from dmgen.target.ebm import EBM
from dmgen.training.baselines import BASELINES, Baseline
from dmgen.training.batch import Batch
from dmgen.training.config import TrainerConfig
from dmgen.training.objective import Objective
from dmgen.training.state import TrainState
from dmgen.validation import check_choice


def importance_weight(batch: Batch) -> Tensor:
    """Return P/(Zq) of each text, `(N,)`."""
    # log p first: then the two terms of GDC++ are equal to the last bit where π = p.
    return torch.exp(_log_target(batch) - batch.log_q)


@dataclass(frozen=True)
class Matching(Objective):
    """An objective with `A = G − κ π/q`: by default `G = P/(Zq)`, which descends KL(p‖π).

    Attributes:
        kappa: the objective's own κ.
        gain: from a batch to G of each text, `(N,)`.
        at_target: the κ at which A is 0 for every text if π = p; None without a target.
        reads_policy: whether G depends on log π.
        divergence: name of the divergence that is descended, if it is an option.
        baseline: another κ than the objective's own.

    Source: Parshakova et al. 2019; Khalifa et al. 2021; Korbak et al. 2022, eq. 12, Algorithm 1.
    Differs from the paper: both terms are divided by Z, so the scale of a step does not depend on
    the probability of the constraints.
    """

    name: str
    kappa: float = 0.0
    proposal_rule: str = "policy"
    gain: Callable[[Batch], Tensor] = importance_weight
    at_target: float | None = 1.0
    reads_policy: bool = False
    is_weighted: bool = True
    needs_support: bool = False
    divergence: str | None = None
    baseline: Baseline | None = None

    @property
    def needs(self) -> frozenset[str]:
        """See `Objective`."""
        names = {"log_policy"} if self.reads_policy or self._subtracts() else set()
        if self.baseline is not None and self.baseline.needs_batch:
            names.add("batch")
        return frozenset(names)

    def identity(self) -> dict[str, Any]:
        """See `Objective`."""
        facts = super().identity()
        return facts if self.divergence is None else facts | {"divergence": self.divergence}

    def check(self, config: TrainerConfig) -> None:
        """Refuse a baseline that does not exist for this objective."""
        if isinstance(config.baseline, str):
            has_target = self.at_target is not None
            allowed = [b.name for b in BASELINES.values() if has_target or not b.needs_target]
            check_choice(f"baseline of {self.name!r}", config.baseline, allowed)

    def with_baseline(self, baseline: str | Baseline | None) -> Objective:
        """See `Objective`."""
        chosen = BASELINES[baseline] if isinstance(baseline, str) else baseline
        return self if chosen is None else replace(self, baseline=chosen)

    def advantage(self, batch: Batch) -> Tensor:
        """Return `A = G − κ π/q`, float64 `(N,)`; raise FloatingPointError if it is not finite."""
        result = self.gain(batch)
        if self._subtracts():
            ratio = _ratio(batch)
            kappa: float | Tensor = self.kappa
            if self.baseline is not None and self.baseline.kappa is not None:
                kappa = self.baseline.kappa(result, ratio, self.at_target or 0.0)
            result = result - kappa * ratio
        return _finite(result, batch)

    def _subtracts(self) -> bool:
        """Return whether κ is not 0: if it is 0, log π is not needed."""
        return self.kappa != 0 if self.baseline is None else self.baseline.kappa is not None


def fdpg(divergence: str | tuple[str, float] | list[Any] | FDivergence) -> Matching:
    """Return the objective `A = −(π/q)(f'(π/p) − f'(1))`, which descends D(π‖p).

    Raise ValueError for an unknown divergence.

    Source: Go et al. 2023, Theorem 1.
    """
    if not isinstance(divergence, FDivergence):
        # YAML has no tuples.
        name = tuple(divergence) if isinstance(divergence, list) else divergence
        divergence = f_divergence(name)
    objective = Matching("fdpg", reads_policy=True, divergence=divergence.name)
    if divergence.name in ("kl", "alpha=1"):  # P/(Zq) does not overflow, unlike p/π for a small π
        return replace(objective, kappa=1.0)
    at_target = -divergence.f_prime_at_one
    return replace(
        objective,
        kappa=at_target,
        at_target=at_target,
        gain=partial(_f_gain, divergence),
        needs_support=math.isinf(divergence.f_prime_at_infinity),
    )


def _f_gain(f: FDivergence, batch: Batch) -> Tensor:
    """Return −(π/q) f'(π/p), `(N,)`."""
    log_target = _log_target(batch)
    outside = log_target == -math.inf
    if math.isinf(f.f_prime_at_infinity) and bool(outside.any()):
        raise ValueError(
            f"divergence {f.name!r} is infinite where P = 0, as for {int(outside.sum())} of "
            f'{len(outside)} texts: take "js", "tv" or "kl", or moments instead of hard '
            "constraints"
        )
    return _ratio(batch) * f.pseudo_reward(batch.column("log_policy").double() - log_target)


def _reward_gain(batch: Batch) -> Tensor:
    """Return (π/q) · reward, `(N,)`."""
    return _ratio(batch) * batch.column("reward")


@dataclass(frozen=True)
class ConstraintReward(Matching):
    """Maximise b(x) + λ·φ(x), on-policy: `A = (π/q) · reward`. Williams 1992."""

    gain: Callable[[Batch], Tensor] = _reward_gain
    at_target: float | None = None
    reads_policy: bool = True
    is_weighted: bool = False

    def prepare(self, state: TrainState, batch: Batch, target: EBM) -> Batch:
        """Add the reward."""
        return replace(batch, reward=constraint_reward(target, batch))


class ScoreReward(ConstraintReward):
    """Maximise P(x) in units of the largest P(x) so far. Korbak et al. 2022."""

    def init(self, policy: Any, target: EBM) -> dict[str, Tensor]:
        """Return the log of the unit, nats."""
        return {"log_unit": torch.tensor(-math.inf, dtype=torch.float64)}

    def prepare(self, state: TrainState, batch: Batch, target: EBM) -> Batch:
        """Add the reward, in 0..1; 0 while every text had P = 0."""
        log_score, log_unit = batch.column("log_score"), state.objective["log_unit"]
        log_unit.copy_(torch.maximum(log_unit, log_score.max()))
        if log_unit == -math.inf:
            return replace(batch, reward=torch.zeros_like(log_score))
        return replace(batch, reward=torch.exp(log_score - log_unit))


class VarianceOfLogRatio(Objective):
    """Descend `½ Var_q[log P − log π]`, which needs no Z. Richter et al. 2020 (VarGrad).

    On-policy that is the gradient of KL(π‖p). Its baseline is part of the variance.
    """

    name = "vargrad"
    needs_support = True
    needs = frozenset({"log_policy", "batch"})

    def check(self, config: TrainerConfig) -> None:
        """Refuse every baseline but "none"."""
        if config.baseline is not None:
            name = getattr(config.baseline, "name", config.baseline)
            check_choice(f"baseline of {self.name!r}", name, ["none"])

    def advantage(self, batch: Batch) -> Tensor:
        """Return log P/π minus its mean over the other texts, `(N,)`; refuse texts with P = 0."""
        log_score, log_policy = batch.column("log_score"), batch.column("log_policy")
        n_outside = int((log_score == -math.inf).sum())
        if n_outside:
            raise ValueError(
                f"vargrad is infinite where P = 0, as for {n_outside} of {len(log_score)} texts: "
                "take GDCpp, or moments instead of hard constraints"
            )
        terms = log_score.double() - log_policy
        n = len(terms)
        return _finite((terms - terms.mean()) * (n / max(n - 1, 1)), batch)


DPG = Matching("dpg")
GDC = Matching("gdc", proposal_rule="kl")
GDCPP = Matching("gdc++", kappa=1.0, proposal_rule="kl")
REINFORCE = ConstraintReward("reinforce")
REINFORCE_P = ScoreReward("reinforce-p")
VARGRAD = VarianceOfLogRatio()

# The methods of `advantage`.
METHODS = ("dpg", "gdc", "gdc++", "fdpg", "reinforce", "vargrad")


def constraint_reward(target: EBM, batch: Batch) -> Tensor:
    """Return b(x) + λ·φ(x) of each text, `(N,)`.

    b(x) is 1 where all hard constraints hold and 0 elsewhere; without any, it is left out.
    """
    soft = factor.soft_moments(target.constraints, target.lambdas)
    values = dict(batch.features)
    total = factor.statistics(soft, values) @ target.lambdas[target.lambdas.isfinite()]
    if len(soft) == len(target.constraints):
        return total
    return total + (target.log_factor(values) > -math.inf).double()


def advantage(
    method: str,
    log_score: Tensor,
    log_proposal: Tensor,
    log_policy: Tensor,
    log_z: float | Tensor,
    *,
    reward: Tensor | None = None,
    divergence: str | tuple[str, float] | None = None,
    baseline: str | None = None,
) -> Tensor:
    """Return the advantage `A = G − κ π/q` of each text in `∇ = E_q[A ∇log π]`, for ascent.

    | method | G | κ |
    | --- | --- | --- |
    | "dpg", "gdc" | P/(Zq) | 0 |
    | "gdc++" | P/(Zq) | 1: A is 0 for every text when π = p |
    | "fdpg" | −(π/q) f'(π/p), for `divergence` | −f'(1), likewise |
    | "reinforce" | (π/q) · reward | 0 |
    | "vargrad" | log P/π minus its mean over the other texts | 0 |

    `baseline` chooses another κ than the method's own, see `baselines`:

    | baseline | κ |
    | --- | --- |
    | "none" | 0 |
    | "z" | the value at which A is 0 when π = p; not for "reinforce", which has no target |
    | "leave_one_out" | the mean of G over the other texts |
    | "optimal" | ΣGu / Σu², u = π/q, over the half of the batch without the text: least variance |

    Args:
        method: one of the above.
        log_score: log P, `(N,)`, nats, unnormalised; `-inf` is legal except for "vargrad".
        log_proposal: log q of the distribution the texts were drawn from, `(N,)`, nats.
        log_policy: log π, `(N,)`, nats, detached.
        log_z: log Z, a number or `(N,)`, nats.
        reward: `(N,)`, for "reinforce".
        divergence: as in `f_divergence`, for "fdpg".
        baseline: one of the above, or None for the method's own.

    Returns:
        float64 `(N,)`.

    Raises:
        ValueError: unknown method or baseline, or one that does not go with the method; a missing
            reward or divergence; a text with P = 0 where the divergence is infinite.
        FloatingPointError: an advantage is not finite; names the text's log-probabilities.

    Source: Korbak et al. 2022, eq. 12, Algorithm 1; Go et al. 2023, Theorem 1; Richter et al. 2020.
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; it must be one of {METHODS}")
    if method == "fdpg" and divergence is None:
        raise ValueError('method "fdpg" needs divergence=, e.g. "js"')
    fixed = {o.name: o for o in (DPG, GDC, GDCPP, REINFORCE, VARGRAD)}
    objective = fdpg(divergence) if divergence and method == "fdpg" else fixed[method]
    objective.check(TrainerConfig(baseline=baseline))
    if method == "reinforce" and reward is None:
        raise ValueError('method "reinforce" needs reward=, one number a text')
    z = torch.as_tensor(log_z, dtype=torch.float64).expand(len(log_proposal))
    batch = Batch(log_proposal, log_score=log_score, log_policy=log_policy, log_z=z, reward=reward)
    return objective.with_baseline(baseline).advantage(batch)


def _log_target(batch: Batch) -> Tensor:
    """Return log p = log P − log Z, `(N,)`."""
    return batch.column("log_score").double() - batch.column("log_z")


def _ratio(batch: Batch) -> Tensor:
    """Return π/q, `(N,)`."""
    return torch.exp(batch.column("log_policy").double() - batch.log_q)


def _finite(result: Tensor, batch: Batch) -> Tensor:
    """Return the advantages, or raise FloatingPointError with the terms of one not finite."""
    finite = result.isfinite()
    if bool(finite.all()):
        return result
    i = int((~finite).nonzero()[0])
    columns = zip(
        "PqπZ", (batch.log_score, batch.log_q, batch.log_policy, batch.log_z), strict=True
    )
    terms = ", ".join(f"log {name} {c[i].item():g}" for name, c in columns if c is not None)
    raise FloatingPointError(f"the advantage of a text is {result[i].item()}: {terms}")
