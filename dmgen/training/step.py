"""One step of training: a function of the state and a batch."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates.running_z import RunningZ
from dmgen.training.batch import Batch
from dmgen.training.diagnostics import batch_statistics, gradient_variance
from dmgen.training.gradient import backward, update
from dmgen.training.health import watch
from dmgen.training.proposal import move_proposal, record_comparison
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState
from dmgen.training.step_size import follow_kl, measured_log_prob

# A row of metrics, which no step reads.
Info = dict[str, Any]


def step(state: TrainState, batch: Batch, setup: Setup) -> Info:
    """Change `state` by one step on texts with log q, log P and features; return its metrics."""
    # The batch's own weights would bias its gradient, so they count in Z from the next step on,
    # unless they are the only ones.
    z = state.z if state.z.n_hits else state.z.add(batch.log_w)
    if batch.is_new:
        state.z, state.z_round = state.z.add(batch.log_w), state.z_round.add(batch.log_w)
    extra: Info = {}
    if z.n_hits:
        batch = replace(batch, log_z=torch.full_like(batch.log_q, z.log_z))
        batch, advantage, extra = _descend(state, batch, setup)
    else:
        if batch.log_policy is None:
            log_policy = state.policy.log_prob(batch.texts)
            batch = replace(batch, log_policy=setup.processes.gather(log_policy))
        advantage = torch.zeros_like(batch.log_q)
    state.step += 1
    state.n_drawn += setup.config.batch_size
    row: Info = {
        "step": state.step,
        "samples": state.n_drawn,
        "seconds": 0.0,
        "log_z": state.z.log_z,
        "log_z_stderr": state.z.stderr,
        "learning_rate": state.optimizer.param_groups[0]["lr"],
    }
    row |= batch_statistics(batch, advantage) | extra
    if batch.from_proposal:
        record_comparison(state, batch, setup)
    row["proposal_updated"] = move_proposal(state, setup)
    row["log_z_drift"] = _drift(state, setup)
    state.health = watch(
        state.health,
        row,
        batch_size=setup.config.batch_size,
        is_weighted=setup.objective.is_weighted,
    )
    return row | setup.objective.follow(state, batch)


def _descend(state: TrainState, batch: Batch, setup: Setup) -> tuple[Batch, Tensor, Info]:
    """Take the gradient steps on a batch; return it with log π, its advantage, and metrics."""
    objective, config = setup.objective, setup.config
    batch = objective.prepare(state, batch, setup.target)
    before = measured_log_prob(state, batch, setup)
    log_policy, a = backward(state, batch, setup)
    advantage = objective.text_advantage(batch, a)
    extra: Info = {}
    if config.diagnose_every and (state.step + 1) % config.diagnose_every == 0:
        extra = gradient_variance(state.policy, batch.texts, a[batch.own])
    update(state, setup)
    for _ in range(config.reuse - 1):
        backward(state, replace(batch, log_policy=None), setup)
        update(state, setup)
    after = measured_log_prob(state, batch, setup)
    extra["step_kl"] = follow_kl(state, batch, setup, before, after)
    return replace(batch, log_policy=log_policy), advantage, extra


def _drift(state: TrainState, setup: Setup) -> float:
    """Return the difference of the last two estimates of log Z, in standard errors."""
    if not setup.is_due(state, setup.config.proposal_every):
        return math.nan
    drift = state.z_round.drift_from(state.z_before)
    state.z_before, state.z_round = state.z, RunningZ()
    return drift
