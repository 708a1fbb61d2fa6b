"""`ImportanceResampling`: texts of a pool, drawn with probability proportional to their weight."""

from __future__ import annotations

import torch
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.random_draws import stream
from dmgen.models.samples import Samples
from dmgen.monte_carlo.draws import Draws
from dmgen.target.ebm import EBM
from dmgen.validation import check_integer


class ImportanceResampling(Draws):
    """A sampler that draws a pool from q, and from it texts with probability proportional to P/q.

    The distribution of a text is p up to a bias of order 1/n_pool,
    `−E_q[(P/Zq)² (f − E_p f)]/n_pool` for the mean of f; a pool of one gives q. Texts of one call
    share the pool, so a text can occur several times, and together they are worth no more than
    `diagnostics()["ess"]` independent ones.

    Args:
        target: as in `QuasiRejection`.
        proposal: as in `QuasiRejection`.
        n_pool: number of texts drawn for each call of `sample`, at least 1.
        batch_size: as in `QuasiRejection`.

    Raises:
        TypeError: target is no EBM, proposal no language model, a size no whole number.
        ValueError: an argument is out of range.

    Source: Rubin (1988), "Using the SIR algorithm to simulate posterior distributions".
    Differs from the paper: systematic resampling (Kitagawa 1996) in place of independent draws, so
    that a text with a fraction ω of the weights occurs nω times, rounded up or down.
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
        check_integer("n_pool", n_pool, least=1)
        self.n_pool = n_pool

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """Return n texts of a fresh pool, in random order; their `log_prob` is the proposal's.

        Args:
            n: number of texts, at least 1.
            seed: of the draws; None for fresh ones.

        Raises:
            TypeError: n is no whole number.
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: no text of the pool has P > 0.
        """
        check_integer("n", n, least=1)
        pool, weights = self._pool(self.n_pool, "resampling", seed)
        self._diagnostics = {"ess": weights.ess.score()}
        coins = stream("resampling: coins", seed)
        u = float(torch.rand((), generator=coins, dtype=torch.float64))
        return pool[_resample(weights.log_w, n, u)[torch.randperm(n, generator=coins)]]

    def diagnostics(self) -> dict[str, Score]:
        """Return the effective size `(Σ w)²/Σ w²` of the pool of the last `sample`, as "ess".

        Raises:
            RuntimeError: nothing was sampled yet.
        """
        return self._last_diagnostics()


def _resample(log_w: Tensor, n: int, u: float) -> Tensor:
    """Return n ascending positions; i occurs nω_i times, rounded up or down, with ω = w / Σ w.

    Args:
        log_w: (N,), nats, not all `-inf`.
        n: number of positions.
        u: uniform in [0, 1): where the grid of step 1/n begins on the cumulative weights.
    """
    edges = torch.exp(log_w - log_w.max()).cumsum(0)
    grid = (torch.arange(n, dtype=torch.float64) + u) * (edges[-1] / n)
    # Rounding can put the last point at the end, after the last text with a weight.
    grid = torch.minimum(grid, torch.nextafter(edges[-1], torch.zeros_like(edges[-1])))
    return torch.searchsorted(edges, grid, right=True)
