"""Ancestral decoding of a causal transformer with a cache of keys and values."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf.batching import round_up_rows
from dmgen.models.hf.kv_cache import buffered_cache
from dmgen.models.protocols import Guide
from dmgen.models.random_draws import draw_tokens


def decode(
    model: Any, start: Tensor, u: Tensor, eos: int, guide: Guide | None = None
) -> tuple[Tensor, Tensor]:
    """Draw texts that follow the ids `start`, `(L,)`, from uniforms `u`, float64 `(n, T)`.

    `guide` changes the logits of each next token.

    Return tokens, long `(n, T)`, `eos` after the end, and log-probabilities, float64 `(n,)`, nats.
    """
    n, length = u.shape
    tokens = torch.full((n, length), eos, device=u.device)
    log_prob = torch.zeros(n, dtype=torch.float64, device=u.device)
    cache = buffered_cache(model.config, len(start) + length)
    past = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
    if guide is not None:
        past["output_hidden_states"] = True
    if len(start) > 1:
        # All texts share the prompt, so it is read once.
        model(start[None, :-1], **past)
        cache.reorder_cache(torch.zeros(n, dtype=torch.long, device=u.device))
    rows = torch.arange(n, device=u.device)
    unfinished = torch.ones_like(rows, dtype=torch.bool)
    inputs = start[-1:].expand(n, -1)
    for t in range(length):
        out = model(inputs, **past)
        logits = out.logits[:, -1]
        if guide is not None:
            logits = guide(tokens[rows, :t], out.hidden_states[-1][:, -1], logits)
        drawn, drawn_log_prob = draw_tokens(logits, u[rows, t])
        # Finished texts that are still in the batch keep their EOS.
        drawn = torch.where(unfinished, drawn, eos)
        tokens[rows, t] = drawn
        log_prob[rows] += torch.where(unfinished, drawn_log_prob, 0.0)
        unfinished = drawn != eos
        n_unfinished = int(unfinished.sum())
        if n_unfinished == 0:
            break
        # Dropping finished texts copies the cache, so wait until an eighth of them can go.
        n_kept = round_up_rows(n_unfinished)
        if t + 1 < length and n_kept <= 0.875 * len(rows):
            kept = unfinished.argsort(descending=True, stable=True)[:n_kept]
            cache.reorder_cache(kept)
            rows, drawn, unfinished = rows[kept], drawn[kept], unfinished[kept]
        inputs = drawn.unsqueeze(-1)
    return tokens, log_prob


def cache_argument(model: Any) -> str:
    """Return the name of the cache argument of the model's forward; transformers 5.x has two."""
    for kind in type(model).__mro__:
        forward = vars(kind).get("forward")
        parameters = inspect.signature(forward).parameters if forward else {}
        for name in ("cache", "past_key_values"):
            if name in parameters:
                return name
    return "past_key_values"
