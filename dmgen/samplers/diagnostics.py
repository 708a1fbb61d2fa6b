"""The variance of the gradient estimate, as in the GDC++ paper's Figure 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmgen.models.base import Samples


def gradient_variance(policy: Any, samples: Samples, advantage: Tensor) -> dict[str, float]:
    """Trace of the covariance of the texts' gradients `g_i = A_i ∇log π(x_i)`, and ‖mean g_i‖.

    `grad_variance = mean ‖g_i‖² − ‖mean g_i‖²`, `grad_norm = ‖mean g_i‖`, over all trainable
    parameters. One backward pass a text, and none where A = 0; memory is that of one gradient.

    Args:
        policy: the model whose gradient it is.
        samples: N texts.
        advantage: `(N,)`, detached.

    Returns:
        "grad_variance" and "grad_norm", in 1/nats² and 1/nats of the parameters' unit.

    Source: Korbak et al. 2022, section 4.4 and Figure 5.
    """
    parameters = [p for p in policy.parameters() if p.requires_grad]
    total = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
    sum_sq = 0.0
    for i in advantage.nonzero().squeeze(-1).tolist():
        objective = policy.log_prob(samples[i : i + 1], grad=True).sum() * float(advantage[i])
        # What no text uses, such as the part of a model that sees images, has a gradient of 0.
        grads = torch.autograd.grad(
            objective, parameters, allow_unused=True, materialize_grads=True
        )
        for t, g in zip(total, grads, strict=True):
            t += g
            sum_sq += float(g.square().sum(dtype=torch.float64))
    n = len(samples)
    mean_sq = sum(float((t / n).square().sum()) for t in total)
    return {"grad_variance": sum_sq / n - mean_sq, "grad_norm": mean_sq**0.5}
