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

from dmgen.estimates.score import Score
from dmgen.models.protocols import Sampler
from dmgen.models.samples import Samples
from dmgen.monte_carlo import acceptance
from dmgen.monte_carlo.draws import Draws, at_least
from dmgen.target.ebm import EBM


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
        proposal: Sampler,
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
