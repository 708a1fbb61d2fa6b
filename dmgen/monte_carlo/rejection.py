"""`Rejection`: texts of a proposal that satisfy every hard constraint."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.samples import Samples
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.draws import Draws, at_least
from dmgen.target import factor
from dmgen.target.ebm import EBM


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
        proposal: Sampler,
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
