"""The test that moves the proposal: whether the policy is measurably closer to the target."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dmgen.estimates import weights as log_weights
from dmgen.training.batch import Batch
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState, copy_in_one_block

# A one-sided 95 % test: the policy must be closer to the target than the proposal is by this many
# standard errors, on at least this effective number of texts.
_CLOSER = 1.645
_MIN_ESS = 20.0
# The comparison uses the texts of this many rounds of `proposal_every` steps: older log-ratios are
# those of a policy that has moved since.
_MOST_ROUNDS = 20


def record_comparison(state: TrainState, batch: Batch, setup: Setup) -> None:
    """Add a batch to the texts that policy and proposal are compared on.

    With `base_share`, the mixtures of the base with the policy and with the proposal are compared.
    """
    config = setup.config
    if setup.proposal_rule not in ("kl", "tv"):
        return
    log_policy = batch.column("log_policy")
    if config.base_share:
        # Differs from base_share by rounding to whole texts.
        fraction = config.n_base / config.batch_size
        log_policy = log_mixture_with_base(log_policy, batch.column("log_base"), fraction)
    columns = torch.stack([batch.log_w, log_policy - batch.log_q])
    most = _MOST_ROUNDS * config.proposal_every * config.batch_size
    state.compared = torch.cat([state.compared, columns], dim=1)[:, -most:]


def move_proposal(state: TrainState, setup: Setup) -> bool:
    """Replace q by π if the texts since the last change show that π is closer to the target.

    Each text has the log-probability of the policy at its step: the test lags a little behind the
    policy, on the safe side, and no text is scored again. Return whether q was replaced.
    """
    log_w, log_ratio = state.compared
    due = setup.is_due(state, setup.config.proposal_every) and log_w.numel() > 0
    if not due or not is_closer(setup.proposal_rule, log_w, log_ratio, state.z.log_z):
        return False
    if state.proposal is None:
        state.proposal = copy_in_one_block(state.policy)
    else:
        state.proposal.load_state_dict(state.policy.state_dict())
    state.compared = torch.empty(2, 0, dtype=torch.float64)
    return True


def log_mixture_with_base(log_q: Tensor, log_base: Tensor, fraction: float) -> Tensor:
    """Return the log of `(1 − fraction)·q + fraction·a`, `(N,)`, nats."""
    return torch.logaddexp(log_q + math.log1p(-fraction), log_base + math.log(fraction))


def is_closer(rule: str, log_w: Tensor, log_ratio: Tensor, log_z: float) -> bool:
    """Return whether the policy is closer to the target than the proposal, by a paired test.

    The test is one-sided at 95 %, on texts of the proposal.

    Args:
        rule: the divergence, "kl" (KL(p‖·)) or "tv".
        log_w: log P − log q, `(N,)`, nats.
        log_ratio: log π − log q, `(N,)`, nats.
        log_z: log Z, nats.
    """
    if log_weights.ess(log_w) < _MIN_ESS:
        return False
    gain, stderr = _gain(rule, log_w, log_ratio, log_z)
    return gain > _CLOSER * stderr


def _gain(rule: str, log_w: Tensor, log_ratio: Tensor, log_z: float) -> tuple[float, float]:
    """Return D(p, q) − D(p, π), which is positive if π is closer, and its standard error."""
    if rule == "kl":
        value, stderr = log_weights.mean(log_w, log_ratio)
        return float(value), float(stderr)
    # This form of TV is bounded; the plain one is heavy-tailed where π/q is large.
    g, u = torch.exp(log_w - log_z), torch.exp(log_ratio)
    terms = (g - 1).clamp(min=0) - (g - u).clamp(min=0)
    return float(terms.mean()), float(terms.std()) / math.sqrt(len(terms))
