"""Tests of a model before it is used: is it causal, and may it be scored in blocks?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmgen.models.hf.batching import linear_head, vocab_size
from dmgen.models.hf.decoding import decode
from dmgen.models.hf.scoring import score
from dmgen.models.hf.tokenization import context_length
from dmgen.models.random_draws import uniforms
from dmgen.models.samples import mask_until_eos


def check(model: Any, eos: int, dtype: torch.dtype) -> bool:
    """Refuse a model whose decoding disagrees with scoring; return if scores may be `chunked`."""
    name = getattr(model.config, "_name_or_path", "") or type(model).__name__
    if eos >= vocab_size(model):
        raise ValueError(
            f"the tokenizer's EOS has id {eos}, but {name} has {vocab_size(model)} tokens, so a "
            "text could not end; resize the model's embeddings or use the tokenizer it was "
            "trained with"
        )
    # An unused cache or attention to later tokens costs several nats, rounding in 16 bits some
    # tenths, in float32 less than a thousandth.
    allowed = 0.05 if dtype == torch.float32 else 1.0
    start = torch.tensor([eos], device=next(model.parameters()).device)
    u = uniforms(32, min(8, context_length(model)), seed=0, generator=None).to(start.device)
    tokens, log_prob = decode(model, start, u, eos)
    mask = mask_until_eos(tokens, eos)
    scored = score(model, start, tokens, mask, chunked=False)
    gap = (scored.sum(-1) - log_prob).abs().max().item()
    if gap > allowed:
        raise ValueError(
            f"{name} gives texts of {u.shape[1]} tokens log-probabilities that differ by "
            f"{gap:.1f} nats between cached decoding and scoring: it is not causal, or keeps "
            "its past elsewhere than in past_key_values; use a decoder-only transformer"
        )
    if not logits_are_linear(model, tokens[:1], dtype):
        return False
    chunked = score(model, start, tokens, mask, chunked=True)
    return bool(((chunked - scored).sum(-1).abs() <= allowed).all())


def logits_are_linear(model: Any, inputs: Tensor, dtype: torch.dtype) -> bool:
    """Return whether the logits are the output layer's linear map of the last hidden states.

    Some models cap or scale either of them, which small logits would not show: the hidden states at
    `inputs`, ids `(n, T)`, are replaced by random ones with logits of standard deviation 30 nats.
    """
    head = linear_head(model)
    if head is None:
        return False
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(*inputs.shape, head.in_features, generator=generator).to(head.weight)
    states *= 30 / head(states).float().std()

    def replace(module: Any, arguments: Any, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    handle = model.base_model.register_forward_hook(replace)
    try:
        logits = model(inputs, use_cache=False).logits.float()
    except (AttributeError, TypeError):  # The base model returns no `last_hidden_state`.
        return False
    finally:
        handle.remove()
    expected = head(states).float()
    # The same products twice, so they differ by rounding alone.
    error = 8 * torch.finfo(dtype).eps * expected.abs().max()
    return logits.shape == expected.shape and bool(((logits - expected).abs() <= error).all())
