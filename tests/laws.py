"""Statistical checks: estimates against exact values, within what chance allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dmgen.estimates.score import Score

# A check that is right fails by chance once in 1.7 million.
SIGMAS = 5.0


def is_close(score: Score, exact: float, rounding: float = 1e-9) -> bool:
    """Whether a score is within five of its standard errors of the exact value.

    Args:
        score: the estimate.
        exact: the value.
        rounding: of the sums behind it, which counts where there is no error at all.
    """
    return abs(score.value - exact) <= SIGMAS * score.stderr + rounding


def is_calibrated(z: Any) -> bool:
    """Whether z-scores have mean 0 and sd 1 up to five of their own standard errors.

    Args:
        z: (estimate - exact) / stderr of independent repeats.
    """
    z = np.asarray(z)
    of_mean, of_sd = SIGMAS / math.sqrt(len(z)), SIGMAS / math.sqrt(2 * len(z))
    return bool(abs(z.mean()) < of_mean and abs(z.std() - 1) < of_sd)


def uncalibrated(z: dict[str, Sequence[float]]) -> set[str]:
    """The names whose z-scores are not calibrated."""
    return {name for name, values in z.items() if not is_calibrated(values)}


def is_rate(frequency: float, n: int, exact: float) -> bool:
    """Whether a frequency among n independent texts is within five standard errors of a rate."""
    return abs(frequency - exact) < SIGMAS * math.sqrt(exact * (1 - exact) / n)


def random_log_probs(seed: int, n_states: int, scale: float = 1.0) -> torch.Tensor:
    """Log-probabilities of `n_states` states, the further from uniform the larger the scale."""
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(scale * torch.randn(n_states, generator=g, dtype=torch.float64), 0)
