"""`MetropolisHastings`: independent Metropolis-Hastings chains over texts."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.monte_carlo.draws import Draws, at_least
from dmgen.target.ebm import EBM


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
        proposal: Sampler,
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
