"""`MetropolisHastings`: independent Metropolis-Hastings chains over texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.estimate import Estimate
from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.monte_carlo.draws import Draws
from dmgen.target.ebm import EBM
from dmgen.validation import check_integer


class MetropolisHastings(Draws):
    """A sampler by chains that move from x to y ~ q with probability `min(1, w(y)/w(x))`.

    With w = P/q, p is the stationary distribution. Chains start from q given P > 0 and are within
    `(1 − 1/max(p/q))^burn_in` of p in TV (Mengersen and Tweedie 1996, theorem 2.1): if the maximum
    of p/q is large, a chain stays on one text for long and no burn-in is sufficient. Texts of one
    chain are dependent, those of different chains are not.

    Args:
        target: as in `QuasiRejection`.
        proposal: as in `QuasiRejection`.
        n_chains: number of parallel chains; `sample` uses at most one for each text.
        burn_in: number of steps of each chain before the first that counts.
        thin: every thin-th step after that is kept.
        max_draws: the search for starts with P > 0 raises if it would need more texts than this;
            the chains themselves take (burn_in + thin · n/n_chains) · n_chains.
        batch_size: as in `QuasiRejection`.

    Raises:
        TypeError: target is no EBM, proposal no language model, a size no whole number.
        ValueError: an argument is out of range.

    Source: Hastings (1970), "Monte Carlo sampling methods using Markov chains".
    """

    def __init__(
        self,
        target: EBM,
        proposal: Sampler,
        *,
        n_chains: int = 32,
        burn_in: int = 100,
        thin: int = 10,
        max_draws: int = 1_000_000,
        batch_size: int = 1024,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        check_integer("n_chains", n_chains, least=1)
        check_integer("burn_in", burn_in, least=0)
        check_integer("thin", thin, least=1)
        check_integer("max_draws", max_draws, least=1)
        self.n_chains, self.burn_in, self.thin = n_chains, burn_in, thin
        self.max_draws = max_draws

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """Return n texts, the kept states of all chains step by step.

        Their `log_prob` is the proposal's.

        Args:
            n: number of texts, at least 1.
            seed: of the draws; None for fresh ones.

        Raises:
            TypeError: n is no whole number.
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: the search for texts with P > 0 needs more than `max_draws`.
        """
        check_integer("n", n, least=1)
        chains = min(self.n_chains, n)
        last = self.burn_in + self.thin * math.ceil(n / chains)
        state = self._accepted(
            chains, self._in_support, max_draws=self.max_draws, purpose="chain starts", seed=seed
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
            candidates = Samples.cat([state, drawn])
            after = before + step.squeeze(1) - self.burn_in
            parts.append(candidates[rows[(after > 0) & (after % self.thin == 0)].flatten()])
            state, held = candidates[rows[-1]], log_w[rows[-1]]
        n_steps = last - self.burn_in
        rate = Estimate.mean(n_moves / n_steps)
        self._diagnostics = {"acceptance_rate": rate.score(n=chains * n_steps)}
        return Samples.cat(parts)[:n]

    def diagnostics(self) -> dict[str, Score]:
        """Return the fraction of steps after burn-in that moved, in the last `sample`.

        Returns:
            "acceptance_rate"; its error comes from the spread of the chains, NaN for one chain.

        Raises:
            RuntimeError: nothing was sampled yet.
        """
        return self._last_diagnostics()

    def _in_support(self, samples: Samples) -> Tensor:
        """Return log r of a start: 0 where P > 0, `-inf` elsewhere."""
        in_support = self._log_weights(samples) > -math.inf
        return torch.where(in_support, 0.0, -math.inf).double()


def _walk(log_w: Tensor, u: Tensor) -> Tensor:
    """Return the state of each chain after each step, as a row of log_w; long `(S, C)`.

    Args:
        log_w: (S + 1, C), nats: of the starts, finite, and of the proposed text of each step.
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
