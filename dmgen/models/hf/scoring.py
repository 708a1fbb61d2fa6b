"""Teacher-forced forward passes of a causal transformer: hidden states and log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf.batching import linear_head, round_up_rows
from dmgen.models.hf.chunked_log_softmax import chosen_log_prob


def states(model: Any, start: Tensor, tokens: Tensor) -> Tensor:
    """Return the last hidden state before each token, `(n, T, D)`."""
    hidden: Tensor = model.base_model(_inputs(start, tokens), use_cache=False).last_hidden_state
    return hidden[:, -tokens.shape[1] :]


def score(model: Any, start: Tensor, tokens: Tensor, mask: Tensor, *, chunked: bool) -> Tensor:
    """Return the log-probability of each token in nats, float32 `(n, T)`, 0 where masked.

    The formula is `log_softmax(logits)[token]`, from the model's own logits in float32. If
    `chunked`, they are computed as the output layer's linear map of `states`, in blocks of the
    vocabulary and at unmasked positions only.
    """
    if chunked and linear_head(model) is not None:
        return score_states(model, states(model, start, tokens), tokens, mask)
    lifted = logits(model, start, tokens).float()
    chosen = lifted.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where(mask, chosen - lifted.logsumexp(-1), 0.0)


def logits(model: Any, start: Tensor, tokens: Tensor) -> Tensor:
    """Return the model's own logits before each token, `(n, T, V)`."""
    length = tokens.shape[1]
    result: Tensor = model(_inputs(start, tokens), use_cache=False, logits_to_keep=length).logits
    return result


def score_states(model: Any, hidden: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Return `score` from the states before each token, `(n, T, D)`, by the output layer alone."""
    head = model.get_output_embeddings()
    rows = mask.flatten().nonzero().squeeze(-1)
    n = len(rows)
    rows = torch.nn.functional.pad(rows, (0, round_up_rows(n) - n))
    log_prob = chosen_log_prob(
        hidden.flatten(0, 1)[rows], head.weight, head.bias, tokens.flatten()[rows]
    )
    scored = torch.zeros(mask.shape, dtype=log_prob.dtype, device=mask.device)
    return scored.masked_scatter(mask, log_prob[:n])


def _inputs(start: Tensor, tokens: Tensor) -> Tensor:
    """Return the ids that the model reads to predict `tokens`, `(n, L + T - 1)`."""
    return torch.cat([start.expand(len(tokens), -1), tokens[:, :-1]], dim=1)
