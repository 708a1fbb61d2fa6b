"""The gradient of a batch: which texts are differentiated, in passes that fit into memory."""

from __future__ import annotations

import torch
from torch import Tensor

from dmgen.training.averaging import update_average
from dmgen.training.batch import Batch
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState
from dmgen.training.subset import inclusion_probabilities, systematic_sample

__all__ = ["backward", "update"]


def backward(state: TrainState, batch: Batch, setup: Setup) -> tuple[Tensor, Tensor]:
    """Set the gradient of the batch's loss and return log π and the advantage.

    Where log π is unknown and no text needs to know of the others, the π inside the advantage is
    that of the very pass that is differentiated. Texts whose advantage is known to be 0 are not
    differentiated.

    Returns:
        log π `(N,)` and the advantage, `(N,)` or `(N, T)`, of the texts of all processes, detached.
    """
    objective, gather = setup.objective, setup.processes.gather
    blind = "log_policy" in objective.needs and batch.log_policy is None
    if blind and (setup.config.backward_size or "batch" in objective.needs):
        batch = batch.with_(log_policy=gather(state.policy.log_prob(batch.texts)))
        blind = False
    advantage = None if blind else objective.advantage(batch)
    rows, scale = _chosen(advantage, batch, state, setup)
    state.optimizer.zero_grad(set_to_none=True)
    mine = torch.arange(len(batch))[batch.own]
    chosen, idle = mine[torch.isin(mine, rows)], mine[~torch.isin(mine, rows)]
    known = batch.log_policy
    log_policy = torch.zeros_like(batch.log_q) if known is None else known
    if known is None and len(idle):
        log_policy[idle] = state.policy.log_prob(batch[idle].texts)
    # torch.split gives one part of length 0 where there is nothing to split.
    parts = torch.split(chosen, state.micro_batch(batch.texts)) if len(chosen) else ()
    for part in parts:
        some = batch[part]
        output = objective.forward(state, some)
        if known is None:
            log_policy[part] = objective.log_prob_of(output).detach().cpu().double()
            some = some.with_(log_policy=log_policy[part])
        a = objective.advantage(some) if advantage is None else advantage[part]
        loss = objective.loss(some, output, a)
        torch.autograd.backward((scale[part].to(loss) * loss).sum())
    if not len(chosen):  # a gradient of 0, not none: the optimiser's moments decay
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
    setup.processes.sum_gradients(state.parameters)
    if known is None:
        log_policy = gather(log_policy[batch.own])
    if advantage is None:
        advantage = objective.advantage(batch.with_(log_policy=log_policy))
    return log_policy, advantage


def _chosen(
    advantage: Tensor | None, batch: Batch, state: TrainState, setup: Setup
) -> tuple[Tensor, Tensor]:
    """Return the rows that are differentiated, ascending, and the weight of each text's loss."""
    everything, scale = torch.arange(len(batch)), setup.objective.text_weights(batch)
    if advantage is None or advantage.ndim != 1:
        return everything, scale
    size, u = setup.config.backward_size or len(batch), 0.0
    if size < len(batch):
        u = float(torch.rand((), generator=state.generator, dtype=torch.float64))
    keep = inclusion_probabilities(advantage, size)
    return systematic_sample(keep, u), scale / keep


def update(state: TrainState, setup: Setup) -> None:
    """Take one step of the optimiser.

    Raises:
        FloatingPointError: the gradient is not finite; nothing is changed.
    """
    config, parameters = setup.config, state.parameters
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not bool(norm.isfinite()):
        raise FloatingPointError(
            f"the gradient of step {state.step + 1} has norm {float(norm)}: lower the learning "
            "rate or set max_grad_norm, and go on from the last checkpoint"
        )
    if config.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = state.rate * config.share_at(state.step)
    state.optimizer.step()
    # As large as the weights, and not needed while texts are drawn, scored and judged.
    state.optimizer.zero_grad(set_to_none=True)
    update_average(state, config.average_decay)
