"""Attention by plain matrix products: on a CPU faster than torch's fused kernel for short texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

# Its name among transformers' attention implementations.
NAME = "dmgen"
# Beyond so many keys a fused kernel, which keeps no matrix of weights, is the better choice.
_MOST_KEYS = 256
# What some models add to attention, and `attend` does not know of.
_EXTRA = ("softcap", "position_bias", "cache", "s_aux")


def use(model: Any) -> None:
    """Switches a model that attends by `scaled_dot_product_attention` over to `attend`."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(NAME)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """`softmax(scaling · Q Kᵀ) V`, causal, in the form that transformers asks for.

    The heads that share keys are rows of one product, so that keys are never repeated. On other
    devices, for long texts, and wherever more is asked than causal attention, torch's own kernel
    does it. The gain is largest in bfloat16, and there in the backward pass.

    Args:
        module: the attention layer.
        query: `(n, heads, t, d)`; t is all positions, or 1 after those in `key`.
        key, value: `(n, key heads, keys, d)`; heads is a multiple of key heads.
        attention_mask: None, or torch's own kernel is used.
        scaling: None is `1/sqrt(d)`.
        dropout, is_causal: as in transformers.

    Returns:
        `(n, t, heads, d)`, and None for the weights.
    """
    n, heads, t, width = query.shape
    n_keys = key.shape[2]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = t == 1 or (t == n_keys and causal)
    asked = attention_mask is not None or dropout or any(others.get(k) is not None for k in _EXTRA)
    if query.device.type != "cpu" or not plain or asked or n_keys > _MOST_KEYS:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **others,
        )  # fmt: skip
    groups = heads // key.shape[1]
    scaled = query * (width**-0.5 if scaling is None else scaling)
    rows = scaled.reshape(n, key.shape[1], groups * t, width)
    logits = torch.matmul(rows, key.transpose(-1, -2)).view(n, -1, groups, t, n_keys).float()
    if t > 1:
        later = torch.ones(t, t, dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    weights = logits.softmax(-1).to(value.dtype).view(n, -1, groups * t, n_keys)
    found = torch.matmul(weights, value).view(n, heads, t, value.shape[-1])
    return found.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
