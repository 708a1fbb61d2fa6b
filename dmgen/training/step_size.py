"""The step size that follows the KL divergence of each step: `learning_rate="auto"`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.training.batch import Batch
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState

# The first step size, the bounds of its change in a step, and the number of texts on which the KL
# of a step is measured.
FIRST_RATE, _SLOWEST, _FASTEST, _N_MEASURED = 1e-5, 0.5, 1.3, 128


def measured_log_prob(state: TrainState, batch: Batch, setup: Setup) -> Tensor | None:
    """Return log π of the texts on which the KL of a step is measured, `(n,)`; None if not "auto".

    The same pass is made before and after the step: in half precision, the log-probability recorded
    while drawing differs from it by more than a small step does.
    """
    if setup.config.learning_rate != "auto":
        return None
    n = max(2, _N_MEASURED // setup.processes.count)
    log_policy: Tensor = state.policy.log_prob(batch.texts[:n])
    return log_policy


def follow_kl(
    state: TrainState, batch: Batch, setup: Setup, before: Tensor | None, after: Tensor | None
) -> float:
    """Return KL(π before‖π after) in nats and set the next rate by it; NaN if not "auto".

    The KL of a small step grows with the square of its size.
    """
    if before is None or after is None:
        return math.nan
    log_ratio = after - before
    # Each term is positive, unlike those of the plain mean of −log_ratio.
    weights = torch.exp(before - batch.log_q[batch.first :][: len(before)])
    terms = weights * (torch.expm1(log_ratio) - log_ratio)
    kl = float(setup.processes.gather(terms).mean())
    requested = setup.config.step_kl * setup.config.share_at(state.step) ** 2
    factor = math.sqrt(requested / kl) if kl > 0 else _FASTEST
    state.rate *= min(max(factor, _SLOWEST), _FASTEST)
    return kl
