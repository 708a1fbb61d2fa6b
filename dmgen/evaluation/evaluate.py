"""`evaluate`: what a policy reached, at what price, and with which certainty."""

from __future__ import annotations

import math

import torch

from dmgen.constraints.constraint import Moment
from dmgen.estimates.divergences import estimate_js, estimate_kl, estimate_tv
from dmgen.evaluation.diversity import distinct_n, self_bleu
from dmgen.evaluation.pooled_samples import MODELS, Pool
from dmgen.evaluation.result import Evaluation, MomentRow
from dmgen.evaluation.verdicts import TOLERANCE, interval, n_to_decide, verdict
from dmgen.models.protocols import LanguageModel
from dmgen.target.ebm import EBM
from dmgen.target.factor import Constraint

# Self-BLEU grows with the number of texts; beyond this, a fixed number keeps figures comparable.
_MOST_FOR_SELF_BLEU = 2048


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

    Two bounds that hold for any two models are checked on the way, because a violation means that
    texts, features and log-probabilities do not belong together (such as texts drawn with top-p
    and scored without): `KL(π‖a) >= KL(Bern(E_π φ)‖Bern(E_a φ))` for every binary feature φ, and
    `KL(p‖π) >= −log E_π[P > 0]`.

    Args:
        policy: the model to judge.
        target: what it should be like.
        n_samples: texts of each of the two models, at least 2.
        seed: of the draws; None for fresh ones.
        tolerance: a moment may be off by so much, see `verdicts.verdict`.

    Raises:
        ValueError: `n_samples` is under 2, or the tolerance negative.
        ArithmeticError: one of the bounds is violated by more than 5 joint standard errors.
    """
    if n_samples < 2:
        raise ValueError(f"n_samples must be at least 2, got {n_samples}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be at least 0, got {tolerance}")
    pool = Pool.draw(policy, target, n_samples, seed)
    pool.check_bounds()
    texts = {name: samples.texts for name, samples in pool.drawn.items()}
    n_tokens = torch.cat([samples.n_tokens for samples in pool.drawn.values()]).double()
    return Evaluation(
        moments=[_row_of(constraint, pool, tolerance) for constraint in target.constraints],
        kl_target_policy=pool.distance(estimate_kl, pool.log_policy).score(),
        kl_policy_base=pool.kl_policy_base(),
        kl_target_base=pool.distance(estimate_kl, pool.log_base).score(),
        excess=pool.excess(),
        gain=pool.gain(),
        tv=pool.distance(estimate_tv, pool.log_policy).score(),
        js=pool.distance(estimate_js, pool.log_policy).score(),
        ess=pool.ess(),
        length={model: pool.mean(model, n_tokens) for model in MODELS},
        perplexity={
            model: pool.ratio(model, -pool.log_base, n_tokens).exp().score() for model in MODELS
        },
        self_bleu={
            (model, n): self_bleu(t, n, max_texts=_MOST_FOR_SELF_BLEU)
            for model, t in texts.items()
            for n in (3, 4, 5)
        },
        distinct={(model, n): distinct_n(t, n) for model, t in texts.items() for n in (1, 2, 3)},
        n_samples=n_samples,
        tolerance=tolerance,
        samples=pool.drawn,
    )


def _row_of(constraint: Constraint, pool: Pool, tolerance: float) -> MomentRow:
    goal = constraint.target if isinstance(constraint, Moment) else 1.0
    base, reachable, policy = (pool.constraint_mean(model, constraint) for model in MODELS)
    column = pool.values[constraint.feature.name]
    binary = bool(((column == 0) | (column == 1)).all())
    needed = n_to_decide(policy, goal, tolerance, binary=binary)
    if needed is not None:
        # Only texts that meet the condition count, and it takes more draws to have so many.
        needed = math.ceil(needed * len(pool.drawn["policy"]) / policy.n)
    return MomentRow(
        constraint.name,
        goal,
        base,
        reachable,
        policy,
        interval(policy, binary=binary),
        verdict(policy, goal, tolerance, binary=binary),
        needed,
    )
