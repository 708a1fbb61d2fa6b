"""Monte Carlo samplers: texts of a target, drawn from a proposal and accepted, weighed or walked.

| sampler | law of a text it returns | texts independent |
| --- | --- | --- |
| `QuasiRejection` | `∝ min(P, βq)`; p itself if β >= max P/q | yes |
| `Rejection` | q given that every hard constraint holds; moments are not corrected | yes |
| `ImportanceResampling` | p up to a bias of order 1/n_pool | no: one pool a call |
| `MetropolisHastings` | p up to `(1 − 1/max(p/q))^burn_in` in TV | between chains |

The proposal is any language model: the base, or, far better, a policy trained on the target. None
of the weights can tell of a part of p that the proposal never visits. `log_prob` of what comes back
is the proposal's: the law of the samples is known up to a constant only. Every sampler counts in
`n_drawn` the texts that it has drawn from the proposal, for whatever purpose: that is the cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen import factor, log_weights
from dmgen.ebm import EBM
from dmgen.models.base import LanguageModel, Samples, stream
from dmgen.samplers import acceptance
from dmgen.samplers.draws import Draws, at_least
from dmgen.score import Score

__all__ = ["ImportanceResampling", "MetropolisHastings", "QuasiRejection", "Rejection"]


class QuasiRejection(Draws):
    """Accepts x ~ q with probability `min(1, P(x)/(β q(x)))`: texts of `p_β ∝ min(P, βq)`.

    They are independent. With β >= max P/q this is exact rejection sampling from p; a smaller β
    trades closeness for speed, and `diagnostics` says how much of each.

    Args:
        target: the EBM; β is measured in the unit of its unnormalised P.
        proposal: the model q to draw from; it must be able to say what p can.
        beta: β > 0; or
        acceptance_rate: share of texts to be accepted, in (0, 1]: β is the largest that does so on
            n_estimation texts, which are drawn at once. Exactly one of the two.
        n_estimation: texts to choose β on, and as many others for `diagnostics`.
        max_draws: a call of `sample` that needs more texts raises, as soon as that is clear.
        batch_size: texts drawn and scored at a time; it changes no text.
        seed: of the texts for β and for `diagnostics`.

    Attributes:
        log_beta: log β, nats.

    Raises:
        TypeError: target is no EBM, proposal no language model.
        ValueError: not exactly one of beta and acceptance_rate, an argument out of range, or a rate
            above the share of texts with P > 0.
        RuntimeError: none of the texts for β has P > 0.

    Source: Eikema et al. 2022, see `samplers.acceptance`.
    Differs from the paper: β is chosen on one pool and judged on another.
    """

    def __init__(
        self,
        target: EBM,
        proposal: LanguageModel,
        beta: float | None = None,
        acceptance_rate: float | None = None,
        *,
        n_estimation: int = 10_240,
        max_draws: int = 1_000_000,
        batch_size: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        at_least(2, n_estimation=n_estimation)
        at_least(1, max_draws=max_draws)
        if (beta is None) == (acceptance_rate is None):
            raise ValueError(
                f"give either beta or acceptance_rate; got beta={beta} and "
                f"acceptance_rate={acceptance_rate}"
            )
        if beta is not None and not 0 < beta < math.inf:
            raise ValueError(f"beta must be a finite number above 0, got {beta}")
        if acceptance_rate is not None and not 0 < acceptance_rate <= 1:
            raise ValueError(f"acceptance_rate must lie in (0, 1], got {acceptance_rate}")
        self.n_estimation, self.max_draws, self.seed = n_estimation, max_draws, seed
        if acceptance_rate is not None:
            _, log_w = self._pool(n_estimation, "quasi-rejection beta", seed)
            self.log_beta = acceptance.log_beta_for(log_w, acceptance_rate)
        elif beta is not None:
            self.log_beta = math.log(beta)

    @property
    def beta(self) -> float:
        """β in the unit of the unnormalised P; inf if that is beyond the range of floats."""
        return float(torch.tensor(self.log_beta, dtype=torch.float64).exp())

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """n independent texts of p_β; their `log_prob` is the proposal's.

        Raises:
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: it would take more than `max_draws` texts; says the rate and what to do.
        """
        at_least(1, n=n)
        return self._accepted(
            n, self._log_accept, max_draws=self.max_draws, purpose="quasi-rejection", seed=seed
        )

    def diagnostics(self) -> dict[str, Score]:
        """How fast the sampler is and how far p_β is from p, on texts that did not choose β.

        Returns:
            "acceptance_rate"; "tv", TV(p, p_β); "tv_bound", the p-mass where P/q > β, which TV
            does not exceed; "kl", KL(p‖p_β) in nats; "beta_normalised", β/Z. Each with its error;
            the texts are drawn once, at the first call.

        Raises:
            RuntimeError: none of the texts has P > 0.
        """
        if self._judged is None:
            _, log_w = self._pool(self.n_estimation, "quasi-rejection diagnostics", self.seed)
            log_r = acceptance.log_acceptance(log_w, self.log_beta)
            self._judged = {
                "acceptance_rate": acceptance.acceptance_rate(log_r),
                "tv": acceptance.tv(log_w, log_r),
                "tv_bound": acceptance.tv_bound(log_w, self.log_beta),
                "kl": acceptance.kl(log_w, log_r),
                "beta_normalised": acceptance.beta_normalised(log_w, self.log_beta),
            }
        return self._judged

    def _log_accept(self, samples: Samples) -> Tensor:
        return acceptance.log_acceptance(self._log_weights(samples), self.log_beta)


class Rejection(Draws):
    """Accepts x ~ q if every hard constraint holds: texts of q given that they all do.

    Of all laws that satisfy the hard constraints (`Pointwise`, and moments with infinite λ) this is
    the one closest to q, in KL(·‖q). Moments are left as the proposal has them: with a trained
    policy this is "train, then reject", which makes the pointwise part certain and brings the law
    closer to p by exactly `KL(p‖q) − KL(p‖q_accepted) = −log(acceptance rate)`. The texts are
    exact samples of p if the proposal is the base and no moment is soft. The base is not run to
    sample, only features are looked at.

    Args:
        target: the EBM, with one hard constraint at least.
        proposal: the model q to draw from.
        n_estimation: texts for `diagnostics`.
        max_draws, batch_size: as in `QuasiRejection`.
        seed: of the texts for `diagnostics`.

    Raises:
        TypeError: target is no EBM, proposal no language model.
        ValueError: no constraint is hard, so there is nothing to reject; an argument out of range.
    """

    def __init__(
        self,
        target: EBM,
        proposal: LanguageModel,
        *,
        n_estimation: int = 10_240,
        max_draws: int = 1_000_000,
        batch_size: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        at_least(2, n_estimation=n_estimation)
        at_least(1, max_draws=max_draws)
        pairs = factor.with_lambdas(target.constraints, target.lambdas)
        if not any(math.isinf(weight) for _, weight in pairs):
            raise ValueError(
                "the target has no hard constraint, so every text would be accepted and no moment "
                "corrected: use QuasiRejection, or add a Pointwise"
            )
        self.n_estimation, self.max_draws, self.seed = n_estimation, max_draws, seed

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """n independent texts of the proposal that satisfy every hard constraint.

        Raises:
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: it would take more than `max_draws` texts; says the rate and what to do.
        """
        at_least(1, n=n)
        return self._accepted(
            n, self._log_accept, max_draws=self.max_draws, purpose="rejection", seed=seed
        )

    def diagnostics(self) -> dict[str, Score]:
        """The acceptance rate, and how far the law of the texts is from p, on texts of their own.

        Returns:
            "acceptance_rate"; "tv" and "kl": TV(p, ·) and KL(p‖·) in nats, soft moments included.

        Raises:
            RuntimeError: none of the texts has P > 0.
        """
        if self._judged is None:
            pool, log_w = self._pool(self.n_estimation, "rejection diagnostics", self.seed)
            log_r = self._log_accept(pool)
            self._judged = {
                "acceptance_rate": acceptance.acceptance_rate(log_r),
                "tv": acceptance.tv(log_w, log_r),
                "kl": acceptance.kl(log_w, log_r),
            }
        return self._judged

    def _log_accept(self, samples: Samples) -> Tensor:
        possible = self.target.log_factor(self.target.values(samples)) > -math.inf
        return torch.where(possible, 0.0, -math.inf).double()


class ImportanceResampling(Draws):
    """Draws a pool from q and from it texts with probability proportional to P/q.

    The law of a text is p up to a bias of order 1/n_pool, `−E_q[(P/Zq)² (f − E_p f)]/n_pool` for
    the mean of f; a pool of one gives q. Texts of one call share the pool, so a text comes back
    in copies, and all together are worth no more than `diagnostics()["ess"]` independent ones.

    Args:
        target, proposal, batch_size: as in `QuasiRejection`.
        n_pool: texts drawn for each call of `sample`.

    Raises:
        TypeError: target is no EBM, proposal no language model.
        ValueError: an argument is out of range.

    Source: Rubin (1988), "Using the SIR algorithm to simulate posterior distributions".
    Differs from the paper: systematic resampling (Kitagawa 1996) in place of independent draws, so
    that a text with a share ω of the weights comes back nω times, rounded up or down.
    """

    def __init__(
        self,
        target: EBM,
        proposal: LanguageModel,
        *,
        n_pool: int = 10_240,
        batch_size: int = 1024,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        at_least(1, n_pool=n_pool)
        self.n_pool = n_pool

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """n texts of a fresh pool, in random order; their `log_prob` is the proposal's.

        Raises:
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: no text of the pool has P > 0.
        """
        at_least(1, n=n)
        pool, log_w = self._pool(self.n_pool, "resampling", seed)
        self._judged = {"ess": _ess(log_w)}
        coins = stream("resampling: coins", seed)
        u = float(torch.rand((), generator=coins, dtype=torch.float64))
        return pool[_resample(log_w, n, u)[torch.randperm(n, generator=coins)]]

    def diagnostics(self) -> dict[str, Score]:
        """The effective size `(Σ w)²/Σ w²` of the pool of the last `sample`, as "ess".

        Raises:
            RuntimeError: nothing was sampled yet.
        """
        return self._last()


class MetropolisHastings(Draws):
    """Independent Metropolis-Hastings: chains that move from x to y ~ q by `min(1, w(y)/w(x))`.

    With w = P/q, p is the stationary law. Chains start from q given P > 0 and are within
    `(1 − 1/max(p/q))^burn_in` of p in TV (Mengersen and Tweedie 1996, theorem 2.1): if the weights
    have no small maximum, no burn-in is long enough, and a chain stays on one text for long.
    Texts of one chain are dependent, those of different chains are not.

    Args:
        target, proposal, batch_size: as in `QuasiRejection`.
        n_chains: chains side by side; no more than texts are asked for.
        burn_in: steps of each chain before the first that counts.
        thin: every thin-th step after that is kept.
        max_draws: the search for starts with P > 0 raises if it would need more texts than this;
            the chains themselves take (burn_in + thin · n/n_chains) · n_chains.

    Raises:
        TypeError: target is no EBM, proposal no language model.
        ValueError: an argument is out of range.

    Source: Hastings (1970), "Monte Carlo sampling methods using Markov chains".
    """

    def __init__(
        self,
        target: EBM,
        proposal: LanguageModel,
        *,
        n_chains: int = 32,
        burn_in: int = 100,
        thin: int = 10,
        max_draws: int = 1_000_000,
        batch_size: int = 1024,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        at_least(1, n_chains=n_chains, thin=thin, max_draws=max_draws)
        at_least(0, burn_in=burn_in)
        self.n_chains, self.burn_in, self.thin = n_chains, burn_in, thin
        self.max_draws = max_draws

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """n texts, the kept states of all chains step by step; `log_prob` is the proposal's.

        Raises:
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: the search for texts with P > 0 needs more than `max_draws`.
        """
        at_least(1, n=n)
        chains = min(self.n_chains, n)
        last = self.burn_in + self.thin * math.ceil(n / chains)
        state = self._accepted(
            chains, self._possible, max_draws=self.max_draws, purpose="chain starts", seed=seed
        )
        held = self._log_weights(state)
        texts, coins = stream("chains", seed), stream("chains: coins", seed)
        parts: list[Samples] = []
        n_moves = torch.zeros(chains, dtype=torch.float64)
        size = max(1, self.batch_size // chains)
        for before in range(0, last, size):
            steps = min(size, last - before)
            drawn = self._draw(steps * chains, texts)
            u = torch.rand(steps, chains, generator=coins, dtype=torch.float64)
            log_w = torch.cat([held, self._log_weights(drawn)])
            at = _walk(log_w.view(steps + 1, chains), u)  # (S, C)
            step = torch.arange(1, steps + 1)[:, None]
            n_moves += ((at == step) & (before + step > self.burn_in)).sum(0)
            rows = at * chains + torch.arange(chains)
            seen = Samples.cat([state, drawn])
            after = before + step.squeeze(1) - self.burn_in
            parts.append(seen[rows[(after > 0) & (after % self.thin == 0)].flatten()])
            state, held = seen[rows[-1]], log_w[rows[-1]]
        rates = n_moves / (last - self.burn_in)
        stderr = log_weights.stderr_of_mean(rates)
        n_steps = chains * (last - self.burn_in)
        self._judged = {"acceptance_rate": Score(float(rates.mean()), stderr, n_steps)}
        return Samples.cat(parts)[:n]

    def diagnostics(self) -> dict[str, Score]:
        """The share of steps after burn-in that moved, in the last `sample`: "acceptance_rate".

        Its error comes from the spread of the chains, NaN if there was one only.

        Raises:
            RuntimeError: nothing was sampled yet.
        """
        return self._last()

    def _possible(self, samples: Samples) -> Tensor:
        possible = self._log_weights(samples) > -math.inf
        return torch.where(possible, 0.0, -math.inf).double()


def _walk(log_w: Tensor, u: Tensor) -> Tensor:
    """Where each chain stands after each step, as a row of log_w; long `(S, C)`.

    Args:
        log_w: (S + 1, C), nats: of the starts, finite, and of the text offered at each step.
        u: (S, C), uniform in [0, 1).
    """
    held, at = log_w[0], torch.zeros(log_w.shape[1], dtype=torch.long)
    rows = []
    for step in range(1, len(log_w)):
        moves = torch.log(u[step - 1]) < log_w[step] - held
        held = torch.where(moves, log_w[step], held)
        at = torch.where(moves, step, at)
        rows.append(at)
    return torch.stack(rows)


def _resample(log_w: Tensor, n: int, u: float) -> Tensor:
    """n positions, ascending; i comes nω_i times, rounded up or down, ω the share of its weight.

    Args:
        log_w: (N,), nats, not all `-inf`.
        u: uniform in [0, 1): where the grid of step 1/n begins on the cumulative weights.
    """
    edges = torch.exp(log_w - log_w.max()).cumsum(0)
    grid = (torch.arange(n, dtype=torch.float64) + u) * (edges[-1] / n)
    # Rounding can put the last at the very end, past the last text with a weight.
    grid = torch.minimum(grid, torch.nextafter(edges[-1], torch.zeros_like(edges[-1])))
    return torch.searchsorted(edges, grid, right=True)


def _ess(log_w: Tensor) -> Score:
    """The effective size with its error (delta method)."""
    g = torch.exp(log_w - log_weights.log_z(log_w)[0])
    square = g * g
    value = log_weights.ess(log_w)
    relative = log_weights.stderr_of_mean(2 * g - square / square.mean())
    return Score(value, value * relative, len(log_w))
