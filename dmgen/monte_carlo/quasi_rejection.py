"""`QuasiRejection`: texts of a proposal, accepted with probability min(1, P/(βq)).

The samplers of this package compared:

| sampler | distribution of a returned text | texts independent |
| --- | --- | --- |
| `QuasiRejection` | `∝ min(P, βq)`; p itself if β >= max P/q | yes |
| `Rejection` | q given that every hard constraint holds; moments are not corrected | yes |
| `ImportanceResampling` | p up to a bias of order 1/n_pool | no: one pool a call |
| `MetropolisHastings` | p up to `(1 − 1/max(p/q))^burn_in` in TV | between chains |

The proposal is any language model: the base or, far better, a policy trained on the target. The
weights show nothing of a part of p that the proposal never visits. `log_prob` of the returned
samples is the proposal's: their own distribution is known only up to a constant. `n_drawn` counts
the texts drawn from the proposal for any purpose: that is the cost.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.samples import Samples
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.draws import Draws
from dmgen.target.ebm import EBM
from dmgen.validation import check_integer, check_number


class QuasiRejection(Draws):
    """A sampler that accepts x ~ q with probability `min(1, P(x)/(β q(x)))`.

    Its texts are independent and follow `p_β ∝ min(P, βq)`. With β >= max P/q this is exact
    rejection sampling from p; a smaller β is faster and further from p. `diagnostics` reports both.

    Args:
        target: the EBM; β is measured in the unit of its unnormalised P.
        proposal: the model q to draw from; its support must contain that of p.
        beta: β > 0. Exactly one of beta, acceptance_rate and max_tv is given.
        acceptance_rate: fraction of texts to be accepted, in (0, 1]. β is the largest with this
            rate on n_estimation texts, which are drawn by the constructor.
        max_tv: largest TV(p, p_β), in (0, 1). β is the smallest that keeps it on such texts.
        n_estimation: texts to choose β on, and as many others for `diagnostics`; at least 2.
        max_draws: a call of `sample` that needs more texts raises, as soon as that is clear.
        batch_size: number of texts drawn and scored at a time; it changes no text.
        seed: of the texts for β and for `diagnostics`.

    Attributes:
        log_beta: log β, nats.

    Raises:
        TypeError: target is no EBM, proposal no language model, a size no whole number.
        ValueError: not exactly one of beta, acceptance_rate and max_tv, an argument out of range,
            or a rate above the fraction of texts with P > 0.
        RuntimeError: none of the texts for β has P > 0.

    Source: Eikema et al. (2022), see `acceptance`.
    Differs from the paper: β is chosen on one pool and evaluated on another.
    """

    def __init__(
        self,
        target: EBM,
        proposal: Sampler,
        beta: float | None = None,
        acceptance_rate: float | None = None,
        *,
        max_tv: float | None = None,
        n_estimation: int = 10_240,
        max_draws: int = 1_000_000,
        batch_size: int = 1024,
        seed: int | None = None,
    ) -> None:
        super().__init__(target, proposal, batch_size=batch_size)
        check_integer("n_estimation", n_estimation, least=2)
        check_integer("max_draws", max_draws, least=1)
        if sum(x is not None for x in (beta, acceptance_rate, max_tv)) != 1:
            raise ValueError(
                f"give either beta or acceptance_rate or max_tv; got beta={beta}, "
                f"acceptance_rate={acceptance_rate} and max_tv={max_tv}"
            )
        if max_tv is not None:
            check_number("max_tv", max_tv, above=0, below=1)
        if beta is not None and not 0 < beta < math.inf:
            raise ValueError(f"beta must be a finite number above 0, got {beta}")
        if acceptance_rate is not None and not 0 < acceptance_rate <= 1:
            raise ValueError(f"acceptance_rate must lie in (0, 1], got {acceptance_rate}")
        self.n_estimation, self.max_draws, self.seed = n_estimation, max_draws, seed
        if acceptance_rate is not None:
            _, weights = self._pool(n_estimation, "quasi-rejection beta", seed)
            self.log_beta = acceptance.log_beta_for(weights.log_w, acceptance_rate)
        elif max_tv is not None:
            _, weights = self._pool(n_estimation, "quasi-rejection beta", seed)
            self.log_beta = acceptance.log_beta_for_tv(weights.log_w, max_tv)
        elif beta is not None:
            self.log_beta = math.log(beta)

    @property
    def beta(self) -> float:
        """Return β in the unit of the unnormalised P; inf if it is beyond the range of floats."""
        return float(torch.tensor(self.log_beta, dtype=torch.float64).exp())

    def sample(self, n: int, *, seed: int | None = None) -> Samples:
        """Return n independent texts of p_β; their `log_prob` is the proposal's.

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
            n, self._log_accept, max_draws=self.max_draws, purpose="quasi-rejection", seed=seed
        )

    def diagnostics(self) -> dict[str, Score]:
        """Return the acceptance rate and distances of p_β from p, on texts that did not choose β.

        Returns:
            "acceptance_rate"; "tv", TV(p, p_β); "tv_bound", the probability under p that P/q > β,
            an upper bound of TV; "kl", KL(p‖p_β) in nats; "beta_normalised", β/Z. Each with its
            error; the texts are drawn once, at the first call.

        Raises:
            RuntimeError: none of the texts has P > 0.
        """
        if self._diagnostics is None:
            _, weights = self._pool(self.n_estimation, "quasi-rejection diagnostics", self.seed)
            log_w = weights.log_w
            log_r = acceptance.log_acceptance(log_w, self.log_beta)
            self._diagnostics = {
                "acceptance_rate": acceptance.acceptance_rate(log_r),
                "tv": acceptance.tv(log_w, log_r),
                "tv_bound": acceptance.tv_bound(log_w, self.log_beta),
                "kl": acceptance.kl(log_w, log_r),
                "beta_normalised": acceptance.beta_normalised(log_w, self.log_beta),
            }
        return self._diagnostics

    def _log_accept(self, samples: Samples) -> Tensor:
        return acceptance.log_acceptance(self._log_weights(samples), self.log_beta)
