"""`Rejection`: texts of a proposal that satisfy every hard constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.samples import Samples
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.draws import Draws
from dmgen.target import factor
from dmgen.target.ebm import EBM
from dmgen.validation import check_integer


class Rejection(Draws):
    """A sampler that accepts x ~ q if every hard constraint holds.

    Of all distributions that satisfy the hard constraints (`Pointwise`, and moments with infinite
    λ) this is the closest to q in KL(·‖q). Soft moments are not corrected. With a trained policy
    as proposal the result is closer to p by exactly
    `KL(p‖q) − KL(p‖q_accepted) = −log(acceptance rate)`. The texts are exact samples of p if the
    proposal is the base and no moment is soft. Acceptance needs the features alone, no pass of the
    base.

    Args:
        target: the EBM, with at least one hard constraint.
        proposal: the model q to draw from.
        n_estimation: number of texts for `diagnostics`, at least 2.
        max_draws: as in `QuasiRejection`.
        batch_size: as in `QuasiRejection`.
        seed: of the texts for `diagnostics`.

    Raises:
        TypeError: target is no EBM, proposal no language model, a size no whole number.
        ValueError: no constraint is hard, so there is nothing to reject; an argument out of range.
    """

    def __init__(
        self,
        target: EBM,
        proposal: Sampler,
        *,
        n_estimation: int = 10_240,
        max_draws: int = 1_000_000,
        batch_size: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        check_integer("n_estimation", n_estimation, least=2)
        check_integer("max_draws", max_draws, least=1)
        pairs = factor.with_lambdas(target.constraints, target.lambdas)
        if not any(math.isinf(weight) for _, weight in pairs):
            raise ValueError(
                "the target has no hard constraint, so every text would be accepted and no moment "
                "corrected: use QuasiRejection, or add a Pointwise"
            )
        self.n_estimation, self.max_draws, self.seed = n_estimation, max_draws, seed

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """Return n independent texts of the proposal that satisfy every hard constraint.

        Args:
            n: number of texts, at least 1.
            seed: of the draws; None for fresh ones.

        Raises:
            TypeError: n is no whole number.
            ValueError: n is not positive, or a model gave NaN.
            RuntimeError: it would take more than `max_draws` texts; names the rate and a remedy.
        """
        check_integer("n", n, least=1)
        return self._accepted(
            n, self._log_accept, max_draws=self.max_draws, purpose="rejection", seed=seed
        )

    def diagnostics(self) -> dict[str, Score]:
        """Return the acceptance rate and the distances of the accepted texts from p.

        Returns:
            "acceptance_rate"; "tv" and "kl": TV(p, ·) and KL(p‖·) in nats, soft moments included.
            The texts are drawn once, at the first call.

        Raises:
            RuntimeError: none of the texts has P > 0.
        """
        if self._diagnostics is None:
            pool, weights = self._pool(self.n_estimation, "rejection diagnostics", self.seed)
            log_r = self._log_accept(pool)
            self._diagnostics = {
                "acceptance_rate": acceptance.acceptance_rate(log_r),
                "tv": acceptance.tv(weights.log_w, log_r),
                "kl": acceptance.kl(weights.log_w, log_r),
            }
        return self._diagnostics

    def _log_accept(self, samples: Samples) -> Tensor:
        allowed = self.target.log_factor(self.target.values(samples)) > -math.inf
        return torch.where(allowed, 0.0, -math.inf).double()
