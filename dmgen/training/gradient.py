"""The gradient of a batch, in passes that fit into memory, and the step of the optimiser."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dmgen.training.averaging import update_average
from dmgen.training.batch import Batch
from dmgen.training.setup import Setup
from dmgen.training.state import TrainState


def backward(state: TrainState, batch: Batch, setup: Setup) -> tuple[Tensor, Tensor]:
    """Set the gradient of the batch's loss; return log π `(N,)` and the advantage, detached.

    If log π is unknown and the advantage of a text does not depend on the other texts, log π comes
    from the pass that is differentiated. Texts whose advantage is known to be 0 are left out.
    """
    objective, gather = setup.objective, setup.processes.gather
    blind = "log_policy" in objective.needs and batch.log_policy is None
    if blind and (setup.config.backward_size or "batch" in objective.needs):
        batch = replace(batch, log_policy=gather(state.policy.log_prob(batch.texts)))
        blind = False
    advantage = None if blind else objective.advantage(batch)
    rows, scale = _chosen(advantage, batch, state, setup)
    state.optimizer.zero_grad(set_to_none=True)
    local = torch.arange(len(batch))[batch.own]
    chosen, idle = local[torch.isin(local, rows)], local[~torch.isin(local, rows)]
    known = batch.log_policy
    log_policy = torch.zeros_like(batch.log_q) if known is None else known
    if known is None and len(idle):
        log_policy[idle] = state.policy.log_prob(batch[idle].texts)
    # torch.split of nothing gives one part of length 0.
    parts = torch.split(chosen, state.micro_batch(batch.texts)) if len(chosen) else ()
    for part in parts:
        some = batch[part]
        output = objective.forward(state, some)
        if known is None:
            log_policy[part] = objective.log_prob_of(output).detach().cpu().double()
            some = replace(some, log_policy=log_policy[part])
        a = objective.advantage(some) if advantage is None else advantage[part]
        loss = objective.loss(some, output, a)
        torch.autograd.backward((scale[part].to(loss) * loss).sum())
    if not len(chosen):  # a gradient of 0, not None: the optimiser's moments decay
        for parameter in state.parameters:
            parameter.grad = torch.zeros_like(parameter)
    setup.processes.sum_gradients(state.parameters)
    if known is None:
        log_policy = gather(log_policy[batch.own])
    if advantage is None:
        advantage = objective.advantage(replace(batch, log_policy=log_policy))
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
    """Take one step of the optimiser; raise FloatingPointError for a gradient not finite."""
    config, parameters = setup.config, state.parameters
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if not bool(norm.isfinite()):
        raise FloatingPointError(
            f"the gradient of step {state.step + 1} has norm {float(norm)}: lower the learning "
            "rate or set max_grad_norm, and resume from the last checkpoint"
        )
    if config.max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = state.rate * config.share_at(state.step)
    state.optimizer.step()
    # Gradients take as much memory as the weights, and are not needed while texts are drawn.
    state.optimizer.zero_grad(set_to_none=True)
    if config.average_decay is not None:
        update_average(state, config.average_decay)


def inclusion_probabilities(advantage: Tensor, n: int) -> Tensor:
    """Return each text's probability to be kept, `(N,)`, proportional to |advantage|, at most 1.

    They sum to `n`; if no more than `n` texts have an advantage `(N,)` other than 0, exactly those
    are kept. A sum over all texts is estimated without bias by the kept ones, each divided by its
    probability.

    Source: Horvitz and Thompson 1952.
    """
    size = advantage.abs().double()
    if int((size > 0).sum()) <= n:
        return (size > 0).double()
    certain = torch.zeros_like(size, dtype=torch.bool)
    # A cap at 1 raises the probabilities of the others, which can need a cap too: at most N rounds.
    while True:
        rest = torch.where(certain, 0.0, size)
        keep = rest * ((n - int(certain.sum())) / rest.sum())
        capped = ~certain & (keep >= 1)
        if not bool(capped.any()):
            return torch.where(certain, 1.0, keep)
        certain |= capped


def systematic_sample(probabilities: Tensor, u: float) -> Tensor:
    """Return positions, long, ascending, each of the N kept with its probability, `(N,)`.

    One uniform `u` in [0, 1) places a grid of step 1 on the cumulative sum, so the number kept is
    the sum of the probabilities, rounded up or down.
    """
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), probabilities.double().cumsum(0)])
    hits = torch.ceil(edges - u)
    return (hits[1:] > hits[:-1]).nonzero().squeeze(-1)
