"""`Pool`: fresh texts of the base and of a policy, scored by both, as one sample.

Half of the texts come from each model, so under the mixture of the two no weight of either exceeds
2, and what concerns the target has light tails as long as one of the two covers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dmgen.estimates import divergences
from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.models.protocols import LanguageModel
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.target.ebm import EBM
from dmgen.target.factor import Constraint, constraint_mean

__all__ = ["MODELS", "Pool"]

MODELS = ("base", "target", "policy")
# A bound that is violated by so many of its own standard errors is not violated by chance.
_SIGMAS = 5.0
# With fewer texts the errors are guesses themselves, and the bounds are not checked.
_FEWEST_CHECKED = 100


@dataclass(frozen=True, eq=False)
class Pool:
    """n texts of the base, then n of the policy; all tensors float64 `(2n,)`, nats.

    Attributes:
        drawn: the texts of "base" and "policy".
        values: feature values by name.
        log_base, log_policy, log_score: log a, log π and log P of every text.
        log_mixture: log of (a + π)/2, the law of the pool.
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
        """A pool of n fresh texts of each model."""
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
            log_weights.log_mixture(
                torch.stack([log_base, log_policy], dim=1), torch.tensor([n, n])
            ),
            torch.arange(2).repeat_interleave(n),
        )

    def mean(self, model: str, column: Tensor) -> Score:
        """The mean of a column `(2n,)` under "base", "policy" (their own texts) or "target"."""
        rows, log_w, strata = self._weights(model)
        if not bool(column[rows][log_w > -math.inf].isfinite().all()):
            return Score(math.inf, math.nan, len(log_w))
        return Score(*log_weights.mean(log_w, column[rows], strata), n=len(log_w))

    def constraint_mean(self, model: str, constraint: Constraint) -> Score:
        """The mean of a constraint's feature under a model, see `factor.constraint_mean`."""
        rows, log_w, strata = self._weights(model)
        values = {name: column[rows] for name, column in self.values.items()}
        return constraint_mean(constraint, values, log_w, strata)

    def ratio(self, model: str, column: Tensor, other: Tensor) -> Score:
        """`mean(column) / mean(other)` under a model, with the error of a ratio (delta method)."""
        above, below = self.mean(model, column), self.mean(model, other)
        value = above.value / below.value
        stderr = self.mean(model, column - value * other).stderr / below.value
        return Score(value, stderr, above.n)

    def distance(self, measure: Callable[..., Score], other: Tensor) -> Score:
        """D(p, other) by an estimator of `divergences`; `other` is log-probabilities `(2n,)`."""
        return measure(self.log_score, other, self.log_mixture, strata=self.strata)

    def ess(self) -> float:
        """How many of the 2n texts count for p."""
        return log_weights.ess(self.log_score - self.log_mixture)

    def excess(self) -> Score:
        """KL(π‖a) − KL(p‖a), nats; its error knows that both come from the same texts."""
        paid, least = self._kl_policy_base(), self._kl_target(self.log_base)
        return self._score(paid[0] - least[0], paid[1] - least[1])

    def gain(self) -> Score:
        """KL(p‖a) − KL(p‖π), nats; its error knows that both come from the same texts."""
        before, after = self._kl_target(self.log_base), self._kl_target(self.log_policy)
        return self._score(before[0] - after[0], before[1] - after[1])

    def kl_policy_base(self) -> Score:
        """KL(π‖a), nats, from the policy's texts."""
        n = len(self.drawn["policy"])
        return divergences.reverse_kl(self.log_policy[n:], self.log_base[n:])

    def check_bounds(self) -> None:
        """Checks two inequalities that hold for any base, policy, feature and target.

        `KL(π‖a) >= KL(Bern(E_π φ)‖Bern(E_a φ))` for every binary φ (data processing), tight for
        one binary moment at π = p, and `KL(p‖π) >= −log E_π[P > 0]`. Here the rates are plain
        frequencies among the texts drawn and the divergences come from log-probabilities, so a
        violation says that the two do not belong together.

        Raises:
            ArithmeticError: one is violated by more than 5 joint standard errors.
        """
        n = len(self.drawn["policy"])
        if n < _FEWEST_CHECKED:
            return
        paid = self._kl_policy_base()
        for name, column in self.values.items():
            if not bool(((column == 0) | (column == 1)).all()):
                continue
            (m, m_error), (r, r_error) = self._frequency(1, column), self._frequency(0, column)
            if not 0 < r < 1:
                continue  # the base's texts say nothing about the rate
            bound = _kl_bernoulli(m, r)
            # A frequency of 0 or 1 has an error of 0 here, whatever its slope.
            slope = math.log(m / (1 - m)) - math.log(r / (1 - r)) if 0 < m < 1 else 0.0
            error = paid[1] - slope * m_error - (r - m) / (r * (1 - r)) * r_error
            self._hold(
                f"KL(π‖a) = {paid[0]:.4g} nats",
                f"KL(Bern({m:.4g})‖Bern({r:.4g})) = {bound:.4g} nats, from how often {name!r} is 1 "
                "among the texts of policy and base",
                self._score(paid[0] - bound, error),
            )
        missing = self._kl_target(self.log_policy)
        possible, error = self._frequency(1, (self.log_score > -math.inf).double())
        if possible > 0:
            self._hold(
                f"KL(p‖π) = {missing[0]:.4g} nats",
                f"−log({possible:.4g}) = {-math.log(possible):.4g} nats, from the share of the "
                "policy's texts that the target allows",
                self._score(missing[0] + math.log(possible), missing[1] + error / possible),
            )

    def _hold(self, left: str, right: str, gap: Score) -> None:
        """Refuses a gap left − right that is negative beyond chance."""
        # Both sides have a bias of order 1/n, which counts where the error is of that order too.
        if gap.value < -_SIGMAS * gap.stderr - 1 / len(self.drawn["policy"]):
            raise ArithmeticError(
                f"{left} must not be less than {right}, but it is, by {-gap.value:.4g} ± "
                f"{gap.stderr:.2g}: the texts were not drawn from the law that log_prob gives "
                "(top-p, another temperature, dropout?), or a feature is not deterministic"
            )

    def _weights(self, model: str) -> tuple[slice, Tensor, Tensor | None]:
        """Rows, log-weights and strata that make up a model."""
        if model == "target":
            return slice(None), self.log_score - self.log_mixture, self.strata
        n = len(self.drawn["base"])
        rows = slice(0, n) if model == "base" else slice(n, None)
        return rows, torch.zeros(n, dtype=torch.float64), None

    # Below, an estimate comes with its influences (2n,): its error is the error of their mean, so
    # the error of a difference is that of the mean of the difference.

    def _score(self, value: float, influences: Tensor) -> Score:
        stderr = log_weights.stderr_of_mean(influences, self.strata)
        return Score(value, stderr, len(influences))

    def _frequency(self, stratum: int, column: Tensor) -> tuple[float, Tensor]:
        """The plain mean over the texts of one model."""
        own = self.strata == stratum
        value = float(column[own].mean())
        return value, torch.where(own, 2 * (column - value), 0.0)

    def _kl_policy_base(self) -> tuple[float, Tensor]:
        """KL(π‖a)."""
        return self._frequency(1, self.log_policy - self.log_base)

    def _kl_target(self, log_other: Tensor) -> tuple[float, Tensor]:
        """KL(p‖other) = E_p[log P − log other] − log Z."""
        log_w = self.log_score - self.log_mixture
        log_z = log_weights.log_z(log_w)[0]
        g = torch.exp(log_w - log_z)  # NaN throughout if Z = 0
        t = torch.where(log_w > -math.inf, self.log_score - log_other, 0.0)
        mean = float((g * t).mean())
        return mean - log_z, g * (t - mean) - (g - 1)


def _kl_bernoulli(m: float, r: float) -> float:
    """KL(Bern(m)‖Bern(r)) in nats, for 0 < r < 1."""
    return sum(x * math.log(x / y) for x, y in ((m, r), (1 - m, 1 - r)) if x > 0)
