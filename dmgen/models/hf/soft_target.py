"""The cross-entropy of the next token with a base's own distribution, tilted, as the label."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf.precision import product_dtype

# Logits in memory at a time, see `chunked_log_softmax`.
_CHUNK = 2**22


def soft_cross_entropy(
    hidden: Tensor,
    head: Any,
    base_hidden: Tensor,
    base_head: Any,
    tilt: tuple[Tensor, Tensor] | None,
    soft: Tensor,
    hard: Tensor,
    tokens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return `−soft Σ_v m(v) log π(v) − hard log π(token)` a row, and log π(token), detached.

    π is the softmax of `head(hidden)`; m is the softmax of `base_head(base_hidden)` times the tilt,
    normalised. The gradient of a row's logits is `(soft + hard) π − soft m − hard onehot`, which
    is made in blocks of rows during the forward pass, so that no more than a block of logits is
    ever in memory. It is therefore exact only for a sum in which all rows have one factor.

    Args:
        hidden: `(M, D)`, with a graph.
        head: linear output layer of the policy.
        base_hidden: `(M, D')`.
        base_head: linear output layer of the base.
        tilt: ids `(C,)` and their log-factors `(M, C)`, nats; None for the base itself.
        soft: `(M,)`.
        hard: `(M,)`.
        tokens: long `(M,)`.

    Raises:
        RuntimeError: in the backward pass, for rows of different factors.
    """
    dtype = product_dtype(hidden.device, hidden.dtype)
    ids, factors = (None, None) if tilt is None else tilt
    loss, log_prob = _SoftCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, base_hidden, base_head, ids, factors, soft, hard, tokens,
        dtype,
    )  # fmt: skip
    return loss, log_prob


class _SoftCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base_hidden: Tensor,
        base_head: Any,
        ids: Tensor | None,
        factors: Tensor | None,
        soft: Tensor,
        hard: Tensor,
        tokens: Tensor,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        narrow = weight.to(dtype)
        to_hidden = torch.empty_like(hidden, dtype=torch.float32)
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        losses, log_probs = [], []
        size = max(1, _CHUNK // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for first in range(0, len(hidden), size):
                part = slice(first, first + size)
                states, chosen = hidden[part].to(dtype), tokens[part].unsqueeze(-1)
                log_p = _logits(states, narrow, bias).log_softmax(-1)
                label = _label(base_hidden[part], base_head, ids, factors, part, dtype)
                at_token = log_p.gather(1, chosen).squeeze(-1)
                losses.append(-soft[part] * (label * log_p).sum(-1) - hard[part] * at_token)
                log_probs.append(at_token)
                total = (soft + hard)[part].unsqueeze(-1)
                change = log_p.exp_().mul_(total).sub_(label.mul_(soft[part].unsqueeze(-1)))
                change.scatter_add_(1, chosen, -hard[part].unsqueeze(-1).to(change))
                rounded = change.to(dtype)
                to_hidden[part] = rounded @ narrow
                if to_weight is not None:
                    to_weight += rounded.T @ states
                if to_bias is not None:
                    to_bias += change.sum(0)
        ctx.save_for_backward(to_hidden.to(hidden.dtype), to_weight, to_bias)
        log_prob = torch.cat(log_probs)
        ctx.mark_non_differentiable(log_prob)
        return torch.cat(losses), log_prob

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients that the forward pass made, times the one factor of all rows."""
        if not bool((grad == grad[0]).all()):
            raise RuntimeError("soft_cross_entropy: all rows must have one factor in the loss")
        made = [None if x is None else x * grad[0].to(x) for x in ctx.saved_tensors]
        return (*made, *[None] * 8)


def _logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    logits = (states @ weight.T).float()
    return logits if bias is None else logits.add_(bias.float())


def _label(
    states: Tensor,
    head: Any,
    ids: Tensor | None,
    factors: Tensor | None,
    part: slice,
    dtype: torch.dtype,
) -> Tensor:
    """Return the label m of some rows, `(m, V)`."""
    label = _logits(states.to(dtype), head.weight.to(dtype), head.bias).softmax(-1)
    if ids is None or factors is None:
        return label
    label[:, ids] *= factors[part].exp().to(label)
    return label.div_(label.sum(-1, keepdim=True))
