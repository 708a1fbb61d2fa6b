"""`ImportanceResampling`: texts of a pool, drawn with probability proportional to their weight."""

from __future__ import annotations

import torch
from torch import Tensor

from dmgen.estimates import weights as log_weights
from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.monte_carlo.draws import Draws, at_least
from dmgen.target.ebm import EBM


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
        proposal: Sampler,
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
