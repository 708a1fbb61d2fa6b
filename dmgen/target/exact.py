"""`Exact`: the numbers of a target as sums, over a base whose texts can all be listed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import pandas as pd
import torch
from torch import Tensor

from dmgen.models.protocols import LanguageModel
from dmgen.models.samples import Samples


@dataclass(frozen=True, eq=False)
class Exact:
    """The exact numbers of a target; made by `EBM.exact()`.

    Attributes:
        samples: every text of the base once.
        log_base: log a of each, float64 `(N,)`, nats.
        log_prob: log p of each, normalised, float64 `(N,)`, nats; `-inf` where p = 0.
        log_z: log Z, nats.
        base_moments, moments: mean under a and under p of the feature of each constraint, by the
            constraint's name; among the texts with its condition if it has one.
        kl_target_base: KL(p‖a), nats.
    """

    samples: Samples = field(repr=False)
    log_base: Tensor = field(repr=False)
    log_prob: Tensor = field(repr=False)
    log_z: float
    base_moments: Mapping[str, float]
    moments: Mapping[str, float]
    kl_target_base: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kl_target_base", _kl(self.log_prob, self.log_base))

    def kl_target_policy(self, policy: LanguageModel) -> float:
        """Return KL(p‖π) in nats; inf if the policy assigns probability 0 to a text of the target.

        Args:
            policy: a model over the texts of the base.

        Raises:
            ValueError: the probabilities of these texts under the policy do not sum to 1.
        """
        return _kl(self.log_prob, self._log_policy(policy))

    def kl_policy_target(self, policy: LanguageModel) -> float:
        """Return KL(π‖p) in nats; inf if a text of the policy violates a hard constraint."""
        return _kl(self._log_policy(policy), self.log_prob)

    def kl_policy_base(self, policy: LanguageModel) -> float:
        """Return KL(π‖a) in nats."""
        return _kl(self._log_policy(policy), self.log_base)

    def tv(self, policy: LanguageModel) -> float:
        """Return the total variation distance `½ Σ |p − π|`, between 0 and 1."""
        return float(0.5 * (self.log_prob.exp() - self._log_policy(policy).exp()).abs().sum())

    def js(self, policy: LanguageModel) -> float:
        """Return the Jensen-Shannon divergence `½ KL(p‖m) + ½ KL(π‖m)`, m = (p + π)/2.

        It is in nats and at most log 2.
        """
        log_policy = self._log_policy(policy)
        log_middle = torch.logaddexp(self.log_prob, log_policy) - math.log(2)
        return 0.5 * (_kl(self.log_prob, log_middle) + _kl(log_policy, log_middle))

    def to_frame(self) -> pd.DataFrame:
        """Return a table with a row for each text and its probabilities `a` and `p`."""
        columns = {"a": self.log_base.exp(), "p": self.log_prob.exp()}
        probabilities = {name: column.numpy() for name, column in columns.items()}
        return pd.DataFrame({"text": self.samples.texts, **probabilities})

    def _log_policy(self, policy: LanguageModel) -> Tensor:
        """Return log π of every text; refuse a policy with other texts than those of the base."""
        log_policy = policy.log_prob(self.samples)
        total = float(log_policy.exp().sum())
        # Far above the rounding of a float32 model, far below any mass that would matter.
        if not abs(total - 1) < 1e-3:
            raise ValueError(
                f"the policy gives the texts of the base a total probability of {total:.6g}, not "
                "1: it must be a model over the same tokens, EOS and max_new_tokens"
            )
        return log_policy


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    """Return Σ p (log p − log q); a text with p = 0 adds 0."""
    support = log_p > -math.inf
    return float((log_p[support].exp() * (log_p[support] - log_q[support])).sum())
