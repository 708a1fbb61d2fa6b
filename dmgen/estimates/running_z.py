"""`RunningZ`: the running estimate of log Z from all weights so far, of any proposals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dmgen.estimates.score import Score


@dataclass(frozen=True)
class RunningZ:
    """The sums of all weights P/q, each with its own q, kept in logs.

    Attributes:
        n: number of weights.
        n_hits: number of positive weights.
        log_sum: log of the sum of the weights, nats.
        log_sum_sq: log of the sum of their squares, nats.
    """

    n: int = 0
    n_hits: int = 0
    log_sum: float = -math.inf
    log_sum_sq: float = -math.inf

    @classmethod
    def from_score(cls, log_z: Score | None) -> RunningZ:
        """Return the sums behind an estimate of log Z from `n` weights; empty for None.

        A score does not tell how many weights were positive: all of them count as hits.
        """
        if log_z is None or not math.isfinite(log_z.value) or log_z.n == 0:
            return cls()
        log_n = math.log(log_z.n)
        # stderr² = (mean w² / mean² − 1) / (n − 1), solved for the mean of squares. A single
        # weight has no error and is its own mean.
        relative = math.log1p(log_z.stderr**2 * (log_z.n - 1)) if log_z.n > 1 else 0.0
        return cls(log_z.n, log_z.n, log_z.value + log_n, 2 * log_z.value + relative + log_n)

    def add(self, log_w: Tensor) -> RunningZ:
        """Return the sums with more log-weights, `(N,)`, nats."""
        both = torch.stack([log_w, 2 * log_w])
        sums = torch.logsumexp(both, dim=1).tolist()
        return RunningZ(
            self.n + len(log_w),
            self.n_hits + int((log_w > -math.inf).sum()),
            _log_add(self.log_sum, sums[0]),
            _log_add(self.log_sum_sq, sums[1]),
        )

    @property
    def log_z(self) -> float:
        """Return log Z in nats; `-inf` while no weight was positive."""
        return self.log_sum - math.log(self.n) if self.n else -math.inf

    @property
    def stderr(self) -> float:
        """Return the standard error of `log_z` in nats (delta method); inf where it is unknown."""
        if self.n < 2 or not math.isfinite(self.log_sum):
            return math.inf
        relative = math.exp(self.log_sum_sq + math.log(self.n) - 2 * self.log_sum) - 1
        return math.sqrt(max(0.0, relative) / (self.n - 1))

    def drift_from(self, other: RunningZ) -> float:
        """Return by how many joint standard errors this log Z is above another one.

        Both are right for any proposals. So a large value reveals log-probabilities that are not
        those of the distribution the texts were drawn from. 0 where one of the two is unknown.
        """
        stderr = math.hypot(self.stderr, other.stderr)
        gap = self.log_z - other.log_z
        return gap / stderr if math.isfinite(stderr) and stderr > 0 else 0.0


def _log_add(a: float, b: float) -> float:
    top = max(a, b)
    return top if top == -math.inf else top + math.log(math.exp(a - top) + math.exp(b - top))
