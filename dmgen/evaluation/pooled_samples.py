"""`Pool`: fresh texts of the base and of a policy, scored by both, as one sample.

Half of the texts come from each model, so under the mixture of the two no weight of either exceeds
2, and estimates of the target have light tails as long as one of the two covers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dmgen.estimates.divergences import estimate_kl, reverse_kl
from dmgen.estimates.estimate import Estimate
from dmgen.estimates.score import Score
from dmgen.estimates.weights import Weights, log_mixture
from dmgen.models.protocols import LanguageModel
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.target.ebm import EBM
from dmgen.target.factor import Constraint, constraint_mean

MODELS = ("base", "target", "policy")
# A bound that is violated by more standard errors than this is not violated by chance.
_SIGMAS = 5.0
# With fewer texts the errors are unreliable, and the bounds are not checked.
_FEWEST_CHECKED = 100


@dataclass(frozen=True, eq=False)
class Pool:
    """The texts of the base, then those of the policy; all tensors float64 `(2n,)`, nats.

    Attributes:
        drawn: the n texts of each of "base" and "policy".
        values: feature values by name.
        log_base: log a of every text.
        log_policy: log π of every text.
        log_score: log P of every text, unnormalised.
        log_mixture: log of (a + π)/2, the density of the pool.
        strata: 0 for the base's texts, 1 for the policy's.
    """

    drawn: Mapping[str, Samples]
    values: Mapping[str, Tensor]
    log_base: Tensor
    log_policy: Tensor
    log_score: Tensor
    log_mixture: Tensor
    strata: Tensor

    @classmethod
    def draw(cls, policy: LanguageModel, target: EBM, n: int, seed: int | None) -> Pool:
        """Return a pool of n fresh texts of each model."""
        generator = stream("evaluate", seed)

        def sample(model: LanguageModel) -> Samples:
            limit = target.max_new_tokens
            return model.sample(n, prompt=target.prompt, max_new_tokens=limit, generator=generator)

        base = target.base
        of_base, of_policy = sample(base), sample(policy)
        pooled = Samples.cat([of_base, of_policy])
        log_base = torch.cat([of_base.log_prob, base.log_prob(of_policy)])
        log_policy = torch.cat([policy.log_prob(of_base), of_policy.log_prob])
        return cls(
            {"base": of_base, "policy": of_policy},
            target.values(pooled),
            log_base,
            log_policy,
            target.log_score(pooled, base_log_prob=log_base),
            log_mixture(torch.stack([log_base, log_policy], dim=1), torch.tensor([n, n])),
            torch.arange(2).repeat_interleave(n),
        )

    def mean(self, model: str, column: Tensor) -> Score:
        """Return the mean of a column `(2n,)` under a model.

        Args:
            model: "base" or "policy", from their own texts, or "target", from all.
            column: a number for each text; infinite ones with weight make the mean infinite.
        """
        return self._mean(model, column).score()

    def constraint_mean(self, model: str, constraint: Constraint) -> Score:
        """Return the mean of a constraint's feature under a model, see `factor.constraint_mean`."""
        rows, weights = self._weights(model)
        values = {name: column[rows] for name, column in self.values.items()}
        return constraint_mean(constraint, values, weights.log_w, weights.strata)

    def ratio(self, model: str, column: Tensor, other: Tensor) -> Estimate:
        """Return `mean(column) / mean(other)` under a model, see `mean`."""
        return self._mean(model, column) / self._mean(model, other)

    def distance(self, measure: Callable[[Weights, Weights], Estimate], other: Tensor) -> Estimate:
        """Return the distance of the target from another distribution.

        Args:
            measure: `estimate_kl`, `estimate_tv` or `estimate_js` of `estimates.divergences`.
            other: log-probabilities under the other distribution, `(2n,)`, nats.
        """
        weights = Weights(other - self.log_mixture, self.strata, known_log_z=0.0)
        return measure(self._weights("target")[1], weights)

    def ess(self) -> float:
        """Return the effective number of texts under the weights of p, of 2n."""
        return self._weights("target")[1].ess.value

    def excess(self) -> Score:
        """Return KL(π‖a) − KL(p‖a), nats, with the error of a difference from the same texts."""
        return (self._joint_kl_policy_base() - self.distance(estimate_kl, self.log_base)).score()

    def gain(self) -> Score:
        """Return KL(p‖a) − KL(p‖π), nats, with the error of a difference from the same texts."""
        before, after = (self.distance(estimate_kl, x) for x in (self.log_base, self.log_policy))
        return (before - after).score()

    def kl_policy_base(self) -> Score:
        """Return KL(π‖a), nats, from the policy's texts."""
        n = len(self.drawn["policy"])
        return reverse_kl(self.log_policy[n:], self.log_base[n:])

    def check_bounds(self) -> None:
        """Raise if one of the inequalities of `bounds` is violated.

        Raises:
            ArithmeticError: by more than 5 joint standard errors.
        """
        n = len(self.drawn["policy"])
        if n < _FEWEST_CHECKED:
            return
        for left, right, gap in self.bounds():
            # Both sides have a bias of order 1/n, which counts where the error is of that order.
            if gap.value < -_SIGMAS * gap.stderr - 1 / n:
                raise ArithmeticError(
                    f"{left} must not be less than {right}, but it is, by {-gap.value:.4g} ± "
                    f"{gap.stderr:.2g}: the texts were not drawn from the distribution that "
                    "log_prob gives (top-p, another temperature, dropout?), or a feature is not "
                    "deterministic"
                )

    def bounds(self) -> Iterator[tuple[str, str, Score]]:
        """Yield two kinds of inequality that hold for any base, policy, feature and target.

        `KL(π‖a) >= KL(Bern(E_π φ)‖Bern(E_a φ))` for every binary φ (data processing), tight for
        one binary moment at π = p, and `KL(p‖π) >= −log E_π[P > 0]`. The rates are plain
        frequencies in the texts drawn and the divergences come from log-probabilities, so a
        violation means that the two do not belong together.

        Yields:
            (left, right, gap): both sides in words, and left − right in nats.
        """
        paid = self._joint_kl_policy_base()
        for name, column in self.values.items():
            if not bool(((column == 0) | (column == 1)).all()):
                continue
            m, r = self._joint_mean("policy", column), self._joint_mean("base", column)
            if not 0 < r.value < 1:
                continue  # the base's texts do not show its rate
            bound = _kl_bernoulli(m, r)
            yield (
                f"KL(π‖a) = {paid.value:.4g} nats",
                f"KL(Bern({m.value:.4g})‖Bern({r.value:.4g})) = {bound.value:.4g} nats, from how "
                f"often {name!r} is 1 in the texts of policy and base",
                (paid - bound).score(),
            )
        missing = self.distance(estimate_kl, self.log_policy)
        in_support = self._joint_mean("policy", (self.log_score > -math.inf).double())
        if in_support.value > 0:
            bound = -in_support.log()
            yield (
                f"KL(p‖π) = {missing.value:.4g} nats",
                f"−log({in_support.value:.4g}) = {bound.value:.4g} nats, from the fraction of the "
                "policy's texts that the target allows",
                (missing - bound).score(),
            )

    def _weights(self, model: str) -> tuple[slice, Weights]:
        """Return the rows and weights that represent a model."""
        if model == "target":
            return slice(None), Weights(self.log_score - self.log_mixture, self.strata)
        n = len(self.drawn["base"])
        rows = slice(0, n) if model == "base" else slice(n, None)
        return rows, Weights(torch.zeros(n))

    def _mean(self, model: str, column: Tensor) -> Estimate:
        rows, weights = self._weights(model)
        return _mean(weights, column[rows])

    def _joint_mean(self, model: str, column: Tensor) -> Estimate:
        """Return a mean over a model's own texts with influences of all texts of the pool.

        Only such estimates combine with those of the target.
        """
        own = self.strata == int(model == "policy")
        return _mean(Weights(torch.where(own, 0.0, -math.inf), self.strata), column)

    def _joint_kl_policy_base(self) -> Estimate:
        return self._joint_mean("policy", self.log_policy - self.log_base)


def _mean(weights: Weights, column: Tensor) -> Estimate:
    """Return a weighted mean; `inf` if a value with weight is infinite."""
    if not bool(column[weights.log_w > -math.inf].isfinite().all()):
        return Estimate(math.inf, torch.full_like(column, math.nan), weights.strata)
    return weights.mean(column)


def _kl_bernoulli(m: Estimate, r: Estimate) -> Estimate:
    """Return KL(Bern(m)‖Bern(r)) in nats, for 0 < r < 1."""
    first = m * (m / r).log() if m.value > 0 else 0.0 * m
    return first + ((1 - m) * ((1 - m) / (1 - r)).log() if m.value < 1 else 0.0 * m)
