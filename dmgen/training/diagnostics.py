"""Diagnostics of a step: statistics of its batch, and the variance of its gradient."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dmgen.estimates import divergences
from dmgen.estimates import weights as log_weights
from dmgen.models.samples import Samples
from dmgen.training.batch import Batch


def batch_statistics(batch: Batch, advantage: Tensor) -> dict[str, float]:
    """Return metrics of a batch with log P and log π, from its log-probabilities alone.

    They are the ESS in texts, KL(p‖π) and KL(p‖q) in nats (NaN where every text has P = 0), mean,
    mean size and variance of the advantage `(N,)`, the largest weight as a fraction (unless all are
    0), and the policy's moments, "moment/NAME".
    """
    log_w, log_policy = batch.log_w, batch.column("log_policy")
    any_hit = bool((log_w > -math.inf).any())
    to_policy, to_proposal = (
        divergences.kl(batch.column("log_score"), log_x, batch.log_q).value if any_hit else math.nan
        for log_x in (log_policy, batch.log_q)
    )
    statistics = {
        "ess": log_weights.ess(log_w),
        "kl_target_policy": to_policy,
        "kl_target_proposal": to_proposal,
        "advantage_mean": float(advantage.mean()),
        "advantage_abs_mean": float(advantage.abs().mean()),
        "advantage_var": float(advantage.var(correction=0)),
    }
    if any_hit:
        statistics["largest_weight"] = float(torch.softmax(log_w, 0).max())
    for name, column in batch.features.items():
        statistics[f"moment/{name}"] = float(log_weights.mean(log_policy - batch.log_q, column)[0])
    return statistics


def gradient_variance(policy: Any, samples: Samples, advantage: Tensor) -> dict[str, float]:
    """Return the variance and the norm of the mean of the texts' gradients `g_i = A_i ∇log π(x_i)`.

    `grad_variance = mean ‖g_i‖² − ‖mean g_i‖²`, `grad_norm = ‖mean g_i‖`, over all trainable
    parameters; the advantage is `(N,)`, detached. It costs one backward pass a text, none where
    A = 0, and the memory of one gradient.

    Source: Korbak et al. 2022, section 4.4 and Figure 5.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    sum_sq = 0.0
    for i in advantage.nonzero().squeeze(-1).tolist():
        objective = policy.log_prob(samples[i : i + 1], grad=True).sum() * float(advantage[i])
        # Parameters that no text uses, such as those for images, have a gradient of 0.
        grads = torch.autograd.grad(
            objective, parameters, allow_unused=True, materialize_grads=True
        )
        for t, g in zip(total, grads, strict=True):
            t += g
            sum_sq += float(g.square().sum(dtype=torch.float64))
    n = len(samples)
    mean_sq = sum(float((t / n).square().sum()) for t in total)
    return {"grad_variance": sum_sq / n - mean_sq, "grad_norm": mean_sq**0.5}
